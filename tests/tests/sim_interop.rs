//! The cases of the public interop runner that concern the transport, on the simulator: the same
//! links, the same files, the same checks. Each case runs twice: against a server directly, and
//! against three of them behind the balancer's forwarder ([`Topology`]).
//!
//! Every fourth seed moves files of the runner's size. The others move a fifth, with events five
//! times as often, so that many seeds can be tried.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::{cell::RefCell, net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use quic::{
    header::{Kind, LongType, Version, packets},
    invariants::Packet as Quic,
    transport::{
        CidIssuer, ClientConfig, DropReason, Ecn, EndpointConfig, ResetKey, RetryPolicy,
        ServerConfig, StreamLimits, TransportConfig,
    },
};
use quic_lb_tests::sim::{
    NodeId, Packet, Rebinding, World,
    balancer::Balancer,
    crypto::{self, CertificateSize},
    files::{Fetch, FileClient, FileServer},
    fleet, for_seeds,
    host::Host,
    link::{EcnTreatment, LinkConfig},
    rng::Rng,
};

/// Makes a test of each case for each topology: `direct::transfer`, `balanced::transfer`. The number
/// is how many seeds run unless the environment says otherwise.
macro_rules! cases {
    ($($name:ident: $seeds:literal,)*) => {
        mod direct {
            use super::*;
            $(#[test] fn $name() { run_case(Topology::Direct, stringify!($name), $seeds, super::$name); })*
        }
        mod balanced {
            use super::*;
            $(#[test] fn $name() { run_case(Topology::Balanced, stringify!($name), $seeds, super::$name); })*
        }
    };
}

cases! {
    handshake: 5,
    transfer: 5,
    upload: 5,
    longrtt: 5,
    chacha20: 5,
    multiplexing: 5,
    retry: 5,
    resumption: 5,
    blackhole: 5,
    keyupdate: 5,
    ecn: 5,
    ecn_marks_slow_down: 5,
    ecn_bleached_or_changed: 5,
    amplificationlimit: 5,
    handshakeloss: 5,
    transferloss: 5,
    handshakecorruption: 5,
    transfercorruption: 5,
    ipv6: 5,
    rebind_port: 5,
    rebind_addr: 5,
    connectionmigration: 5,
}

fn run_case(topology: Topology, name: &str, seeds: u64, case: fn(Setting)) {
    let module = match topology {
        Topology::Direct => "direct",
        Topology::Balanced => "balanced",
    };
    for_seeds(&format!("{module}::{name}"), seeds, |seed| case(Setting { topology, seed }));
}

/// What the client speaks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Topology {
    /// A server.
    Direct,
    /// The balancer's forwarder, with servers behind it that issue routable connection IDs and
    /// share their tickets.
    Balanced,
}

/// How a case is run.
#[derive(Clone, Copy, Debug)]
struct Setting {
    topology: Topology,
    seed: u64,
}

impl Setting {
    /// Whether this run moves as much as the runner does, or a fifth.
    const fn is_full(self) -> bool {
        self.seed.is_multiple_of(4)
    }

    const fn octets(self, full: usize) -> usize {
        if self.is_full() { full } else { full / 5 }
    }

    fn time(self, full: Duration) -> Duration {
        if self.is_full() { full } else { full / 5 }
    }
}

/// A client, the link before it, and what it speaks to.
struct Case {
    setting: Setting,
    link: LinkConfig,
    files: Vec<Fetch>,
    connections: u32,
    server: TransportConfig,
    client: TransportConfig,
    retry: RetryPolicy,
    certificate: CertificateSize,
    suite: Option<rustls::SupportedCipherSuite>,
    rebinding: Option<Rebinding>,
    ipv6: bool,
    limit: Duration,
}

/// A case at work.
struct Running {
    world: World,
    servers: Vec<NodeId>,
    balancer: Option<NodeId>,
    client: NodeId,
    trace: Rc<RefCell<Vec<(Duration, Packet)>>>,
    /// The address that the client speaks to.
    front: SocketAddr,
}

/// What all servers have seen, together.
#[derive(Debug, Default)]
struct Served {
    connected: u64,
    resumed: u64,
    moves: u64,
    /// Datagrams that belong to no connection of the server they came to, or that the balancer
    /// has dropped.
    astray: u64,
}

impl Case {
    fn new(setting: Setting, files: &[usize]) -> Self {
        let files = files.iter().map(|&download| Fetch { download, upload: 0 }).collect();
        Self {
            setting,
            link: LinkConfig::default(),
            files,
            connections: 1,
            server: TransportConfig::default(),
            client: TransportConfig::default(),
            retry: RetryPolicy::Never,
            certificate: CertificateSize::Small,
            suite: None,
            rebinding: None,
            ipv6: false,
            limit: Duration::from_secs(60),
        }
    }

    fn start(self) -> Running {
        let mut rng = Rng::new(self.setting.seed ^ 0x5eed);
        let (front, client_address, outside): (SocketAddr, SocketAddr, SocketAddr) = if self.ipv6 {
            (addr("[2001:db8::1]:443"), addr("[2001:db8:1::1]:5000"), addr("[2001:db8:2::1]:9"))
        } else {
            (addr("192.0.2.1:443"), addr("10.0.0.1:5000"), addr("198.51.100.1:20000"))
        };
        let mut server = ServerConfig::new(crypto::server(rng.number(), self.certificate));
        server.transport = Arc::new(self.server);
        server.retry = self.retry;
        let tls = crypto::client(rng.number(), self.certificate, self.suite);
        let mut client = ClientConfig::new(tls);
        client.transport = Arc::new(self.client);
        let mut app = FileClient::new(client, front, self.files);
        app.connections_left = self.connections;

        let mut world = World::new(rng.number());
        let mut add_server = |world: &mut World, address, cids| {
            let config = EndpointConfig::server(server.clone(), cids, rng.octets());
            world.add(&[address], Host::new(address, config, FileServer::default()))
        };
        let (balancer, servers) = match self.setting.topology {
            Topology::Direct => {
                let cids = CidIssuer::standalone(9, [9; 32], ResetKey::new([8; 32]));
                (None, vec![add_server(&mut world, front, cids)])
            }
            Topology::Balanced => {
                let balancer = fleet::add_balancer(&mut world, front);
                let servers = (1..=fleet::SERVERS).map(|number| {
                    let address = fleet::address(number, self.ipv6);
                    add_server(&mut world, address, fleet::issuer(number, 0))
                });
                (Some(balancer), servers.collect())
            }
        };
        let host = Host::new(client_address, EndpointConfig::client(rng.octets()), app);
        let nat = Some((outside, self.rebinding));
        let up = self.link.clone();
        let client = world.add_behind(&[client_address], host, up, self.link, nat);
        let trace = Rc::new(RefCell::new(Vec::new()));
        let sink = Rc::clone(&trace);
        world.watch(move |at, packet| {
            if packet.to == front || packet.from == front {
                sink.borrow_mut().push((at, packet.clone()));
            }
        });
        Running { world, servers, balancer, client, trace, front }
    }

    fn run(self) -> Running {
        let (limit, connections, files) = (self.limit, self.connections, self.files.len());
        let clean = self.link.loss == 0 && self.link.corrupt == 0 && self.link.blackout.is_none();
        let mut running = self.start();
        running.finish(limit);
        let app = running.app();
        assert_eq!(app.done, files * connections as usize);
        assert_eq!(app.closed, connections);
        if clean {
            assert_eq!(running.served().astray, 0, "datagrams that went astray");
        }
        running
    }
}

impl Running {
    /// Runs until the client has all it wanted.
    fn finish(&mut self, limit: Duration) {
        let client = self.client;
        let done =
            self.world.run(limit, |world| world.node::<Host<FileClient>>(client).app.is_done());
        let elapsed = self.world.elapsed();
        let app = self.app();
        assert!(done, "not done after {elapsed:?}: {app:?}");
        assert_eq!(app.failed, [], "connections that failed");
    }

    fn app(&mut self) -> &mut FileClient {
        &mut self.world.node::<Host<FileClient>>(self.client).app
    }

    fn served(&mut self) -> Served {
        let mut served = Served::default();
        for &server in &self.servers {
            let host = self.world.node::<Host<FileServer>>(server);
            served.connected += host.app.connected;
            served.resumed += host.app.resumed;
            served.moves += host.app.moves;
            served.astray += host.endpoint.dropped(DropReason::UnknownConnection);
        }
        if let Some(balancer) = self.balancer {
            served.astray += self.world.node::<Balancer>(balancer).dropped.len() as u64;
        }
        served
    }

    /// The ECN marks with which datagrams left one side.
    fn marks(&self, from_server: bool) -> Vec<Option<Ecn>> {
        let trace = self.trace.borrow();
        let sent = trace.iter().filter(|(_, packet)| (packet.from == self.front) == from_server);
        sent.map(|(_, packet)| packet.ecn).collect()
    }

    /// Long-header packets of one type, with their direction.
    fn count(&self, from_server: bool, wanted: LongType) -> usize {
        let trace = self.trace.borrow();
        let sent = trace.iter().filter(|(_, packet)| (packet.from == self.front) == from_server);
        let types = sent.flat_map(|(_, packet)| packets(&packet.octets).flatten().filter_map(long));
        types.filter(|&found| found == wanted).count()
    }
}

fn long(packet: Quic<'_>) -> Option<LongType> {
    let Quic::Long(header) = packet else { return None };
    match header.kind() {
        Kind::Known(version, long_type) => {
            assert_eq!(version, Version::V1);
            Some(long_type)
        }
        _ => None,
    }
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn handshake(setting: Setting) {
    let mut running = Case::new(setting, &[1024]).run();
    assert_eq!(running.count(true, LongType::Retry), 0);
    assert_eq!(running.served().connected, 1);
}

fn transfer(setting: Setting) {
    let mut case =
        Case::new(setting, &[2 << 20, 3 << 20, 5 << 20].map(|full| setting.octets(full)));
    let window = 64 * 1024;
    case.client.streams =
        StreamLimits { stream_window: window, connection_window: window, ..Default::default() };
    case.run();
}

fn upload(setting: Setting) {
    let mut case = Case::new(setting, &[]);
    case.files = vec![Fetch { download: 1000, upload: setting.octets(3 << 20) }; 2];
    case.run();
}

fn longrtt(setting: Setting) {
    let mut case = Case::new(setting, &[1024]);
    case.link.delay = Duration::from_millis(750);
    let mut running = case.run();
    // The first flight takes two Initials; a probe timeout repeats it.
    assert!(running.count(false, LongType::Initial) > 2);
    assert_eq!(running.served().connected, 1);
}

fn chacha20(setting: Setting) {
    let mut case = Case::new(setting, &[setting.octets(3 << 20)]);
    case.suite = Some(rustls::crypto::aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256);
    case.run();
}

fn multiplexing(setting: Setting) {
    let mut running = Case::new(setting, &[32; 1999]).run();
    assert!(running.app().peak <= 100);
    assert_eq!(running.served().connected, 1);
}

fn retry(setting: Setting) {
    let mut case = Case::new(setting, &[1024]);
    case.retry = RetryPolicy::Always;
    let mut running = case.run();
    assert!(running.count(true, LongType::Retry) >= 1);
    assert_eq!(running.served().connected, 1);
}

fn resumption(setting: Setting) {
    let mut case = Case::new(setting, &[5000]);
    case.connections = 2;
    let mut running = case.run();
    assert_eq!((running.app().connected, running.app().resumed), (2, 1));
    assert_eq!((running.served().connected, running.served().resumed), (2, 1));
}

fn blackhole(setting: Setting) {
    let mut case = Case::new(setting, &[setting.octets(10 << 20)]);
    let (on, off) = (Duration::from_secs(5), Duration::from_secs(2));
    case.link.blackout = Some((setting.time(on), setting.time(off)));
    case.limit = Duration::from_secs(300);
    let mut running = case.run();
    assert_eq!(running.served().connected, 1);
}

fn keyupdate(setting: Setting) {
    let mut case = Case::new(setting, &[3 << 20]);
    case.client.key_update_after = Some(50);
    case.server.key_update_after = Some(300);
    let mut running = case.run();
    let updates = running.app().stats.key_updates;
    assert!(updates > 5, "{updates} updates");
}

fn ecn(setting: Setting) {
    let running = Case::new(setting, &[setting.octets(1 << 20)]).run();
    // Both sides mark what they send, from the first datagram to the last but for those that wait
    // for the first marks to be acknowledged.
    for from_server in [false, true] {
        let marks = running.marks(from_server);
        let marked = marks.iter().filter(|&&mark| mark == Some(Ecn::Ect0)).count();
        assert!(marked * 10 >= marks.len() * 9, "{marked} of {}", marks.len());
        assert_eq!((marks[0], late(&marks)), (Some(Ecn::Ect0), Some(Ecn::Ect0)));
        assert!(!marks.contains(&Some(Ecn::Ce)) && !marks.contains(&Some(Ecn::Ect1)));
    }
}

/// A mark of the time when the path is known, and the connection not yet about to close.
fn late(marks: &[Option<Ecn>]) -> Option<Ecn> {
    marks[marks.len() * 9 / 10]
}

/// A client that uploads over a link that loses nothing, and treats ECN marks in some way.
fn marked_upload(setting: Setting, parts_per_million: u32, treatment: EcnTreatment) -> Running {
    let mut case = Case::new(setting, &[]);
    case.files = vec![Fetch { download: 100, upload: 2 << 20 }];
    case.link.rate = 0;
    case.link.mark = parts_per_million;
    case.link.ecn = treatment;
    let mut running = case.run();
    let stats = running.app().stats;
    assert_eq!(stats.lost_packets, 0);
    running
}

fn ecn_marks_slow_down(setting: Setting) {
    let free = marked_upload(setting, 0, EcnTreatment::Kept).world.elapsed();
    let marked = marked_upload(setting, 20_000, EcnTreatment::Kept);
    assert_eq!(late(&marked.marks(false)), Some(Ecn::Ect0));
    let marked = marked.world.elapsed();
    assert!(marked > 2 * free, "{marked:?} with marks, {free:?} without");
}

fn ecn_bleached_or_changed(setting: Setting) {
    for treatment in [EcnTreatment::Bleached, EcnTreatment::Replaced(Ecn::Ect1)] {
        let running = marked_upload(setting, 0, treatment);
        let marks = running.marks(false);
        assert_eq!((marks[0], late(&marks)), (Some(Ecn::Ect0), None));
    }
}

fn amplificationlimit(setting: Setting) {
    let mut case = Case::new(setting, &[5000]);
    case.certificate = CertificateSize::Large;
    let mut running = case.start();
    running.world.access(running.client).up.config.drop_list = 2..=7;
    running.finish(Duration::from_secs(60));
    // Strictly three times what came in, at every instant before the client's address is
    // known: what the client has sent is an upper bound, less what the list drops.
    let (mut sent, mut received, mut index) = (0, 0, 0);
    for (_, packet) in running.trace.borrow().iter() {
        let octets = packet.octets.len();
        if packet.from == running.front {
            sent += octets;
            assert!(sent <= 3 * received, "{sent} octets for {received}");
            continue;
        }
        index += 1;
        if !(2..=7).contains(&index) {
            received += octets;
            let handshake = |found| long(found) == Some(LongType::Handshake);
            if packets(&packet.octets).flatten().any(handshake) {
                break;
            }
        }
    }
    assert!(sent > 0);
}

fn lossy(setting: Setting, parts_per_million: u32, corrupt: bool, files: &[usize]) -> Case {
    let mut case = Case::new(setting, files);
    if corrupt {
        case.link.corrupt = parts_per_million;
    } else {
        case.link.loss = parts_per_million;
    }
    // Flights get lost several times over, each time the wait doubles.
    for config in [&mut case.client, &mut case.server] {
        config.handshake_timeout = Duration::from_secs(120);
        config.idle_timeout = Duration::from_secs(120);
    }
    case.limit = Duration::from_secs(300);
    case
}

fn handshakeloss(setting: Setting) {
    let mut case = lossy(setting, 300_000, false, &[1024]);
    case.connections = 50;
    let mut running = case.run();
    assert_eq!(running.app().connected, 50);
}

fn transferloss(setting: Setting) {
    lossy(setting, 20_000, false, &[2 << 20]).run();
}

fn handshakecorruption(setting: Setting) {
    let mut case = lossy(setting, 300_000, true, &[1024]);
    case.connections = 50;
    let mut running = case.run();
    assert_eq!(running.app().connected, 50);
}

fn transfercorruption(setting: Setting) {
    lossy(setting, 20_000, true, &[2 << 20]).run();
}

fn ipv6(setting: Setting) {
    let mut case = Case::new(setting, &[5000]);
    case.ipv6 = true;
    case.run();
}

fn rebinding(setting: Setting, address: bool) {
    let mut case = Case::new(setting, &[setting.octets(10 << 20)]);
    let (first, every) = (Duration::from_secs(1), Duration::from_secs(5));
    case.rebinding =
        Some(Rebinding { first: setting.time(first), every: setting.time(every), address });
    let mut running = case.run();
    assert!(running.served().moves >= 2, "{} moves", running.served().moves);
    assert_eq!(running.served().connected, 1);
}

fn rebind_port(setting: Setting) {
    rebinding(setting, false);
}

fn rebind_addr(setting: Setting) {
    rebinding(setting, true);
}

fn connectionmigration(setting: Setting) {
    let mut running = Case::new(setting, &[setting.octets(5 << 20)]).start();
    let client = running.client;
    let mut used = Vec::new();
    for migration in 1..=5 {
        running.world.run(setting.time(Duration::from_secs(1)) * migration, |_| false);
        let now = running.world.now();
        running.world.rebind_nat(client, true);
        let host = running.world.node::<Host<FileClient>>(client);
        let Some(current) = host.app.current else { break };
        let mut connection = host.endpoint.connection_mut(current).unwrap();
        if !connection.is_over() {
            used.push(connection.remote_cid());
            connection.migrate(now, None).unwrap();
            assert!(!used.contains(&connection.remote_cid()), "a connection ID used twice");
        }
    }
    running.finish(Duration::from_secs(60));
    let Served { moves, astray, .. } = running.served();
    assert!(moves >= used.len() as u64 && used.len() >= 3, "{moves} moves");
    assert_eq!(astray, 0, "datagrams that went astray");
}

#[test]
fn the_same_seed_gives_the_same_octets() {
    let digest = |seed| {
        let setting = Setting { topology: Topology::Balanced, seed };
        let mut case = lossy(setting, 50_000, false, &[200_000; 3]);
        case.link.reorder = 50_000;
        case.link.duplicate = 20_000;
        case.link.jitter = Duration::from_millis(5);
        let mut running = case.run();
        let client = running.world.node::<Host<FileClient>>(running.client).digest;
        let servers = running.servers.iter();
        let servers = servers.map(|&id| running.world.node::<Host<FileServer>>(id).digest);
        (client, servers.collect::<Vec<_>>())
    };
    assert_eq!(digest(7), digest(7));
    assert_ne!(digest(7), digest(8));
}
