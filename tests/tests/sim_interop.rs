//! The cases of the public interop runner that concern the transport, on the simulator: the same
//! links, the same files, the same checks.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::{cell::RefCell, net::SocketAddr, rc::Rc, sync::Arc, time::Duration};

use quic::{
    header::{Kind, LongType, Version, packets},
    invariants::Packet as Quic,
    transport::{
        CidIssuer, ClientConfig, EndpointConfig, ResetKey, RetryPolicy, ServerConfig, StreamLimits,
        TransportConfig,
    },
};
use quic_lb_tests::sim::{
    NodeId, Packet, Rebinding, World,
    crypto::{self, CertificateSize},
    files::{Fetch, FileClient, FileServer},
    for_seeds,
    host::Host,
    link::LinkConfig,
    rng::Rng,
};

/// A server, a client, and the link between them.
struct Case {
    seed: u64,
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
    stay: bool,
    limit: Duration,
}

/// A case at work.
struct Running {
    world: World,
    server: NodeId,
    client: NodeId,
    trace: Rc<RefCell<Vec<(Duration, Packet)>>>,
    server_address: SocketAddr,
}

impl Case {
    fn new(seed: u64, files: &[usize]) -> Self {
        let files = files.iter().map(|&download| Fetch { download, upload: 0 }).collect();
        Self {
            seed,
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
            stay: false,
            limit: Duration::from_secs(60),
        }
    }

    fn start(self) -> Running {
        let mut rng = Rng::new(self.seed ^ 0x5eed);
        let (server_address, client_address, outside): (SocketAddr, SocketAddr, SocketAddr) =
            if self.ipv6 {
                (addr("[2001:db8::1]:443"), addr("[2001:db8:1::1]:5000"), addr("[2001:db8:2::1]:9"))
            } else {
                (addr("192.0.2.1:443"), addr("10.0.0.1:5000"), addr("198.51.100.1:20000"))
            };
        let tls = crypto::server(rng.number(), self.certificate);
        let mut server = ServerConfig::new(tls);
        server.transport = Arc::new(self.server);
        server.retry = self.retry;
        let reset_key = ResetKey::new(rng.octets());
        let cids = CidIssuer::standalone(9, rng.octets(), reset_key);
        let server = EndpointConfig::server(server, cids, rng.octets());
        let tls = crypto::client(rng.number(), self.certificate, self.suite);
        let mut client = ClientConfig::new(tls);
        client.transport = Arc::new(self.client);
        let mut app = FileClient::new(client, server_address, self.files);
        app.connections_left = self.connections;
        app.stay = self.stay;

        let mut world = World::new(rng.number());
        let host = Host::new(server_address, server, FileServer::default());
        let server = world.add(&[server_address], host);
        let host = Host::new(client_address, EndpointConfig::client(rng.octets()), app);
        let nat = Some((outside, self.rebinding));
        let up = self.link.clone();
        let client = world.add_behind(&[client_address], host, up, self.link, nat);
        let trace = Rc::new(RefCell::new(Vec::new()));
        let sink = Rc::clone(&trace);
        world.watch(move |at, packet| sink.borrow_mut().push((at, packet.clone())));
        Running { world, server, client, trace, server_address }
    }

    fn run(self) -> Running {
        let (limit, connections, files) = (self.limit, self.connections, self.files.len());
        let mut running = self.start();
        let client = running.client;
        let done =
            running.world.run(limit, |world| world.node::<Host<FileClient>>(client).app.is_done());
        let elapsed = running.world.elapsed();
        let app = running.app();
        assert!(done, "not done after {elapsed:?}: {app:?}");
        assert_eq!(app.failed, [], "connections that failed");
        assert_eq!(app.done, files * connections as usize);
        assert_eq!(app.closed, connections);
        running
    }
}

impl Running {
    fn app(&mut self) -> &mut FileClient {
        &mut self.world.node::<Host<FileClient>>(self.client).app
    }

    fn serving(&mut self) -> &mut FileServer {
        &mut self.world.node::<Host<FileServer>>(self.server).app
    }

    /// Long-header packets of one type, with their direction.
    fn count(&self, from_server: bool, wanted: LongType) -> usize {
        let trace = self.trace.borrow();
        let sent =
            trace.iter().filter(|(_, packet)| (packet.from == self.server_address) == from_server);
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

#[test]
fn handshake() {
    for_seeds("handshake", 5, |seed| {
        let mut running = Case::new(seed, &[1024]).run();
        assert_eq!(running.count(true, LongType::Retry), 0);
        assert_eq!(running.serving().connected, 1);
    });
}

#[test]
fn transfer() {
    for_seeds("transfer", 3, |seed| {
        let mut case = Case::new(seed, &[2 << 20, 3 << 20, 5 << 20]);
        let window = 64 * 1024;
        case.client.streams =
            StreamLimits { stream_window: window, connection_window: window, ..Default::default() };
        case.run();
    });
}

#[test]
fn upload() {
    for_seeds("upload", 3, |seed| {
        let mut case = Case::new(seed, &[]);
        case.files = vec![Fetch { download: 1000, upload: 3 << 20 }; 2];
        case.run();
    });
}

#[test]
fn longrtt() {
    for_seeds("longrtt", 5, |seed| {
        let mut case = Case::new(seed, &[1024]);
        case.link.delay = Duration::from_millis(750);
        let mut running = case.run();
        // The first flight takes two Initials; a probe timeout repeats it.
        assert!(running.count(false, LongType::Initial) > 2);
        assert_eq!(running.serving().connected, 1);
    });
}

#[test]
fn chacha20() {
    for_seeds("chacha20", 2, |seed| {
        let mut case = Case::new(seed, &[3 << 20]);
        case.suite = Some(rustls::crypto::aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256);
        case.run();
    });
}

#[test]
fn multiplexing() {
    for_seeds("multiplexing", 2, |seed| {
        let mut running = Case::new(seed, &[32; 1999]).run();
        assert!(running.app().peak <= 100);
        assert_eq!(running.serving().connected, 1);
    });
}

#[test]
fn retry() {
    for_seeds("retry", 5, |seed| {
        let mut case = Case::new(seed, &[1024]);
        case.retry = RetryPolicy::Always;
        let mut running = case.run();
        assert!(running.count(true, LongType::Retry) >= 1);
        assert_eq!(running.serving().connected, 1);
    });
}

#[test]
fn resumption() {
    for_seeds("resumption", 5, |seed| {
        let mut case = Case::new(seed, &[5000]);
        case.connections = 2;
        let mut running = case.run();
        assert_eq!((running.app().connected, running.app().resumed), (2, 1));
        assert_eq!((running.serving().connected, running.serving().resumed), (2, 1));
    });
}

#[test]
fn blackhole() {
    for_seeds("blackhole", 3, |seed| {
        let mut case = Case::new(seed, &[10 << 20]);
        case.link.blackout = Some((Duration::from_secs(5), Duration::from_secs(2)));
        case.limit = Duration::from_secs(300);
        let mut running = case.run();
        assert_eq!(running.serving().connected, 1);
    });
}

#[test]
fn keyupdate() {
    for_seeds("keyupdate", 3, |seed| {
        let mut case = Case::new(seed, &[3 << 20]);
        case.client.key_update_after = Some(50);
        case.server.key_update_after = Some(300);
        let mut running = case.run();
        let updates = running.app().stats.key_updates;
        assert!(updates > 5, "{updates} updates");
    });
}

#[test]
fn amplificationlimit() {
    for_seeds("amplificationlimit", 5, |seed| {
        let mut case = Case::new(seed, &[5000]);
        case.certificate = CertificateSize::Large;
        let mut running = case.start();
        running.world.access(running.client).up.config.drop_list = 2..=7;
        let client = running.client;
        let done = running.world.run(Duration::from_secs(60), |world| {
            world.node::<Host<FileClient>>(client).app.is_done()
        });
        assert!(done && running.app().failed.is_empty(), "{:?}", running.app());
        // Strictly three times what came in, at every instant before the client's address is
        // known: what the client has sent is an upper bound, less what the list drops.
        let (mut sent, mut received, mut index) = (0, 0, 0);
        for (_, packet) in running.trace.borrow().iter() {
            let octets = packet.octets.len();
            if packet.from == running.server_address {
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
    });
}

fn lossy(seed: u64, parts_per_million: u32, corrupt: bool, files: &[usize]) -> Case {
    let mut case = Case::new(seed, files);
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

#[test]
fn handshakeloss() {
    for_seeds("handshakeloss", 4, |seed| {
        let mut case = lossy(seed, 300_000, false, &[1024]);
        case.connections = 50;
        let mut running = case.run();
        assert_eq!(running.app().connected, 50);
    });
}

#[test]
fn transferloss() {
    for_seeds("transferloss", 5, |seed| {
        lossy(seed, 20_000, false, &[2 << 20]).run();
    });
}

#[test]
fn handshakecorruption() {
    for_seeds("handshakecorruption", 4, |seed| {
        let mut case = lossy(seed, 300_000, true, &[1024]);
        case.connections = 50;
        let mut running = case.run();
        assert_eq!(running.app().connected, 50);
    });
}

#[test]
fn transfercorruption() {
    for_seeds("transfercorruption", 5, |seed| {
        lossy(seed, 20_000, true, &[2 << 20]).run();
    });
}

#[test]
fn ipv6() {
    for_seeds("ipv6", 2, |seed| {
        let mut case = Case::new(seed, &[5000]);
        case.ipv6 = true;
        case.run();
    });
}

fn rebinding(seed: u64, address: bool) {
    let mut case = Case::new(seed, &[10 << 20]);
    case.rebinding =
        Some(Rebinding { first: Duration::from_secs(1), every: Duration::from_secs(5), address });
    let mut running = case.run();
    assert!(running.serving().moves >= 2, "{} moves", running.serving().moves);
    assert_eq!(running.serving().connected, 1);
}

#[test]
fn rebind_port() {
    for_seeds("rebind_port", 3, |seed| rebinding(seed, false));
}

#[test]
fn rebind_addr() {
    for_seeds("rebind_addr", 3, |seed| rebinding(seed, true));
}

#[test]
fn connectionmigration() {
    for_seeds("connectionmigration", 3, |seed| {
        let mut running = Case::new(seed, &[5 << 20]).start();
        let (client, server) = (running.client, running.server);
        let mut used = Vec::new();
        for migration in 1..=5 {
            running.world.run(Duration::from_secs(migration), |_| false);
            let now = running.world.now();
            running.world.rebind_nat(client, true);
            let host = running.world.node::<Host<FileClient>>(client);
            let Some(current) = host.app.current else { break };
            let connection = host.endpoint.connection_mut(current).unwrap();
            if !connection.is_over() {
                used.push(connection.remote_cid());
                connection.migrate(now, None).unwrap();
                assert!(!used.contains(&connection.remote_cid()), "a connection ID used twice");
            }
        }
        let done = running.world.run(Duration::from_secs(60), |world| {
            world.node::<Host<FileClient>>(client).app.is_done()
        });
        assert!(done && running.app().failed.is_empty(), "{:?}", running.app());
        let moves = running.world.node::<Host<FileServer>>(server).app.moves;
        assert!(moves >= used.len() as u64 && used.len() >= 3, "{moves} moves");
    });
}

#[test]
fn the_same_seed_gives_the_same_octets() {
    let digest = |seed| {
        let mut case = lossy(seed, 50_000, false, &[200_000; 3]);
        case.link.reorder = 50_000;
        case.link.duplicate = 20_000;
        case.link.jitter = Duration::from_millis(5);
        let mut running = case.run();
        let (client, server) = (running.client, running.server);
        let client = running.world.node::<Host<FileClient>>(client).digest;
        (client, running.world.node::<Host<FileServer>>(server).digest)
    };
    assert_eq!(digest(7), digest(7));
    assert_ne!(digest(7), digest(8));
}
