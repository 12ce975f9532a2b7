//! Workers between clients and backends on loopback, with datagrams made by hand.

#![allow(clippy::disallowed_methods, reason = "tests are their own shell")]
#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test says so by failing"
)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    collections::HashSet,
    net::{SocketAddr, TcpListener, UdpSocket},
    num::{NonZeroU32, NonZeroUsize},
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use quic::{
    header::Version,
    routable::{CidConfig, ConfigId, Key, ServerId},
    token::TokenKey,
};
use quic_lb::{
    backend::BackendState,
    memory::Memory,
    refusal::Refusal,
    registry::Registry,
    routing::Routing,
    socket::{
        Departure, HopLimit, Marks, Peer, PortUse, Received, Receiver, SLOTS, Sender, Sharing,
        Socket, TrafficClass,
    },
    totals::{BackendTotals, ListenerTotals},
    verdict::{DropReason, Rule},
    worker::{Listen, StartError, Workers},
};
use quic_lb_config::{
    Admission, Backend, Config, HashBy, Limits, Listener, Log, Pool, RetryMode, Timeouts,
};

/// Counts what every thread of this program allocates.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes on to the system's allocator unchanged.
#[expect(unsafe_code, reason = "the only way to see allocations")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, SeqCst);
        // SAFETY: as our caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as our caller promises.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Tests run one at a time: allocations are counted for the whole program.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

const PATIENCE: Duration = Duration::from_secs(5);

struct Balancer {
    workers: Workers,
    routing: Arc<Routing>,
    registry: Registry,
    snapshot: Arc<ArcSwap<Routing>>,
}

impl Balancer {
    fn start(config: &Config) -> Self {
        Self::try_start(config).unwrap()
    }

    fn try_start(config: &Config) -> Result<Self, StartError> {
        Self::try_start_with(config, Listen::at_addresses_of(config))
    }

    fn try_start_with(config: &Config, listeners: Vec<Listen>) -> Result<Self, StartError> {
        let mut registry = Registry::default();
        let state = |_: &str, _: &str| BackendState::Active;
        let routing = Arc::new(Routing::new(config, &mut registry, state));
        let memory = Arc::new(Memory::new(config.limits.remembered.get(), Instant::now(), [1; 4]));
        let snapshot = Arc::new(ArcSwap::new(Arc::clone(&routing)));
        let workers = Workers::start(config, listeners, Arc::clone(&snapshot), memory, false)?;
        Ok(Self { workers, routing, registry, snapshot })
    }

    /// Gives the running workers another snapshot.
    fn reload(&mut self, config: &Config) {
        let state = |_: &str, _: &str| BackendState::Active;
        self.routing = Arc::new(Routing::new(config, &mut self.registry, state));
        self.snapshot.store(Arc::clone(&self.routing));
    }

    fn address(&self) -> SocketAddr {
        self.workers.local_addresses()[0].0
    }

    fn totals(&self) -> ListenerTotals {
        self.workers.totals().of_listener(0)
    }

    fn of_backend(&self, name: &str) -> BackendTotals {
        let backend = self.routing.backends().find(|backend| *backend.name == *name).unwrap();
        self.workers.totals().of_backend(backend.id.slot())
    }

    fn dropped(&self, reason: DropReason) -> u64 {
        self.totals().dropped[reason as usize]
    }

    fn forwarded(&self) -> u64 {
        self.totals().forwarded.iter().sum()
    }

    fn received(&self) -> u64 {
        self.totals().received
    }

    fn flows(&self) -> u64 {
        self.totals().flows
    }

    fn evicted(&self) -> u64 {
        self.totals().evicted.iter().sum()
    }

    /// Waits for `received` datagrams, and for each to be accounted for.
    fn settle(&self, received: u64) {
        let all = || {
            self.forwarded()
                + DropReason::ALL.map(|reason| self.dropped(reason)).iter().sum::<u64>()
        };
        wait_until("every datagram is received", || self.received() >= received);
        wait_until("every datagram has a verdict", || self.received() == all());
        assert_eq!(self.received(), received);
    }
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "in vain: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Sends everything back until it is dropped.
struct Echo {
    address: SocketAddr,
    peers: Arc<Mutex<HashSet<SocketAddr>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    fn start(address: &str) -> Self {
        let address: SocketAddr = address.parse().unwrap();
        let (bound, ready) = std::sync::mpsc::channel();
        let (stop, peers) =
            (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(HashSet::new())));
        let (stopped, seen) = (Arc::clone(&stop), Arc::clone(&peers));
        let thread = thread::spawn(move || {
            let socket = Socket::listener(address, Sharing::First).unwrap();
            bound.send(socket.local_address().unwrap()).unwrap();
            let (mut receiver, mut sender) = (Receiver::new(), Sender::new());
            while !stopped.load(SeqCst) {
                let got = receiver.receive(&socket, 0..SLOTS, Peer::Asked).unwrap();
                for slot in 0..got {
                    let message = receiver.received(slot);
                    seen.lock().unwrap().insert(message.from);
                    let mut outgoing = sender.compose();
                    outgoing.push(&answer(message), [receiver.octets(slot, 0..message.len)]);
                    outgoing.send(&socket, 0).unwrap();
                }
                if got == 0 {
                    thread::sleep(Duration::from_micros(200));
                }
            }
        });
        Self { address: ready.recv().unwrap(), peers, stop, thread: Some(thread) }
    }

    fn peers(&self) -> usize {
        self.peers.lock().unwrap().len()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        self.thread.take().unwrap().join().unwrap();
    }
}

fn answer(message: &Received) -> Departure {
    Departure {
        to: Some(message.from),
        from: None,
        class: Some(message.marks.class),
        hops: Some(message.marks.hops),
        segment: (message.datagrams() > 1).then(|| u16::try_from(message.segment).unwrap()),
        ipv6: message.from.is_ipv6(),
    }
}

fn cid_config() -> CidConfig {
    CidConfig::new(ConfigId::new(0).unwrap(), 2, 6, Some(&Key::new([9; 16]))).unwrap()
}

fn server_id(n: usize) -> ServerId {
    ServerId::new(&[0, u8::try_from(n).unwrap()]).unwrap()
}

fn config(listener: &str, backends: &[SocketAddr]) -> Config {
    let backend = |(n, address): (usize, &SocketAddr)| Backend {
        name: format!("b{n}"),
        address: *address,
        server_ids: vec![(cid_config().id(), server_id(n))],
        weight: NonZeroU32::MIN,
        admission: Admission::Active,
        check_address: None,
    };
    Config {
        workers: NonZeroUsize::new(1),
        listeners: vec![Listener {
            name: "edge".into(),
            address: listener.parse().unwrap(),
            both_families: false,
            pool: 0,
            retry_mode: None,
        }],
        pools: vec![Pool {
            name: "web".into(),
            cid_configs: vec![cid_config()],
            backends: backends.iter().enumerate().map(backend).collect(),
            source_addresses: vec![],
            reset_secret: None,
            hash: HashBy::Dcid,
            health_check: None,
            honours_tokens: quic_lb_config::HonoursTokens::Yes,
            report_token: None,
        }],
        admin: None,
        limits: Limits {
            flows: 1000.try_into().unwrap(),
            remembered: 1000.try_into().unwrap(),
            new_connections: Default::default(),
            unknown_short_headers: Default::default(),
        },
        timeouts: Timeouts {
            flow_idle: Duration::from_secs(60),
            flow_unanswered: Duration::from_secs(60),
            learnt: Duration::from_secs(600),
            drain: Duration::from_secs(1),
        },
        state_dir: None,
        log: Log { level: Default::default(), format: Default::default(), connections: None },
        retry: Default::default(),
    }
}

/// A short header for backend `n`, then a counter, then a pattern, `len` octets in all.
fn packet(n: usize, number: u32, len: usize) -> Vec<u8> {
    let cid = cid_config().encode(&server_id(n), &[1, 2, 3, 4, 5, 6]).unwrap();
    let mut octets = vec![0x40];
    octets.extend_from_slice(&cid);
    octets.extend_from_slice(&number.to_be_bytes());
    octets.extend((octets.len()..len).map(|at| (at as u8).wrapping_mul(number as u8 | 1)));
    octets.truncate(len);
    octets
}

fn client(address: SocketAddr) -> UdpSocket {
    let socket =
        UdpSocket::bind(if address.is_ipv6() { "[::1]:0" } else { "127.0.0.1:0" }).unwrap();
    socket.connect(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn receive(socket: &UdpSocket) -> Vec<u8> {
    let mut octets = vec![0; 65_536];
    let len = socket.recv(&mut octets).unwrap();
    octets.truncate(len);
    octets
}

#[test]
fn datagrams_and_their_boundaries_pass_both_ways_in_both_families() {
    let _alone = alone();
    for (listen, backend) in [
        ("127.0.0.1:0", "127.0.0.1:0"),
        ("[::1]:0", "[::1]:0"),
        ("127.0.0.1:0", "[::1]:0"),
        ("0.0.0.0:0", "127.0.0.1:0"),
    ] {
        let echo = Echo::start(backend);
        let balancer = Balancer::start(&config(listen, &[echo.address]));
        let mut address = balancer.address();
        if address.ip().is_unspecified() {
            address.set_ip([127, 0, 0, 5].into());
        }
        let client = client(address);
        let lengths = [1200, 1200, 1200, 700, 1200, 1, 30, 1200, 1472, 30, 30];
        for (number, len) in (0..).zip(lengths) {
            client.send(&packet(0, number, len)).unwrap();
        }
        let got: Vec<_> = lengths.iter().map(|_| receive(&client)).collect();
        let sent: Vec<_> = (0..).zip(lengths).map(|(number, len)| packet(0, number, len)).collect();
        // One octet carries no connection ID and goes where its 4-tuple went before. Datagrams of
        // one flow keep their order.
        assert!(got == sent, "{listen} -> {backend}: not what was sent");
        balancer.settle(lengths.len() as u64);
        assert_eq!(balancer.dropped(DropReason::SendFailed), 0);
        let returned = || balancer.totals().returned;
        wait_until("all are returned", || returned() == lengths.len() as u64);
        let octets: usize = lengths.iter().sum();
        assert_eq!(balancer.totals().received_bytes, octets as u64);
        assert_eq!(balancer.totals().returned_bytes, octets as u64);
        assert_eq!(balancer.of_backend("b0").forwarded, lengths.len() as u64);
        assert_eq!(balancer.of_backend("b0").returned, lengths.len() as u64);
        assert_eq!((balancer.flows(), echo.peers()), (1, 1));
    }
}

#[test]
fn a_listener_of_both_families_serves_clients_of_both_as_what_they_are() {
    let _alone = alone();
    let echo = Echo::start("127.0.0.1:0");
    let backend = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut config = config("[::]:0", &[echo.address, backend.local_addr().unwrap()]);
    config.listeners[0].both_families = true;
    let balancer = Balancer::start(&config);
    let port = balancer.address().port();
    for ip in ["127.0.0.5", "::1", "127.0.0.1"] {
        let client = marking_client(SocketAddr::new(ip.parse().unwrap(), port));
        let class = TrafficClass::ECT_0.with_dscp(46);
        let departure = Departure {
            to: None,
            from: None,
            class: Some(class),
            hops: Some(HopLimit::new(60)),
            segment: Some(300),
            ipv6: ip == "::1",
        };
        let datagrams = [packet(0, 1, 300), packet(0, 2, 300)].concat();
        let mut sender = Sender::new();
        let mut outgoing = sender.compose();
        outgoing.push(&departure, [datagrams.as_slice()]);
        outgoing.send(&client, 0).unwrap();
        let mut receiver = Receiver::new();
        let mut got = Vec::new();
        while got.len() < datagrams.len() {
            // The client is connected: it hears nobody but the address that it asked.
            let message = next(&mut receiver, &client);
            assert_eq!(message.marks, Marks { class, hops: HopLimit::new(58) }, "{ip}");
            got.extend_from_slice(receiver.octets(0, 0..message.len));
        }
        assert!(got == datagrams, "{ip}: not what was sent");
    }
    // What is known of IPv4 addresses is known of those that arrive here.
    let from_backend = packet(0, 1, 41);
    backend.send_to(&from_backend, SocketAddr::new([127, 0, 0, 1].into(), port)).unwrap();
    balancer.settle(7);
    assert_eq!(balancer.dropped(DropReason::BackendAddress), 1);
    // IPv4 is taken, as far as it goes.
    let error = UdpSocket::bind(SocketAddr::new([0, 0, 0, 0].into(), port)).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
}

#[test]
fn joined_datagrams_arrive_as_they_were_sent_with_their_marks() {
    let _alone = alone();
    for loopback in ["127.0.0.1:0", "[::1]:0"] {
        let echo = Echo::start(loopback);
        let balancer = Balancer::start(&config(loopback, &[echo.address]));
        let address = balancer.address();
        let local = SocketAddr::new(Socket::source_towards(address).unwrap(), 0);
        let client = Socket::upstream(local, address, PortUse::Exclusive).unwrap();
        let mut sent = Vec::new();
        let mut number = 0;
        let mut sender = Sender::new();
        let mut receiver = Receiver::new();
        let mut got = Vec::new();
        for (segment, count, last, class, hops) in [
            (1200, 40, 1200, TrafficClass::ECT_0, 64),
            (1200, 3, 40, TrafficClass::ECT_0, 64),
            (100, 64, 100, TrafficClass::CE, 64),
            (100, 64, 100, TrafficClass::CE.with_dscp(46), 30),
            (300, 10, 17, TrafficClass::NOT_ECT, 30),
            (1200, 1, 1200, TrafficClass::ECT_1, 30),
            (1200, 1, 1200, TrafficClass::ECT_1.with_dscp(63), 30),
            (1200, 1, 1200, TrafficClass::ECT_1.with_dscp(63), 4),
            (1200, 1, 1200, TrafficClass::ECT_1.with_dscp(63), 255),
        ] {
            let octets: Vec<u8> = (0..count)
                .flat_map(|at| {
                    number += 1;
                    let octets = packet(0, number, if at + 1 == count { last } else { segment });
                    // One hop to the backend, which answers as it was spoken to, and one back.
                    let marks = Marks { class, hops: HopLimit::new(hops.min(64) - 2) };
                    sent.push((octets.clone(), marks));
                    octets
                })
                .collect();
            let mut outgoing = sender.compose();
            let departure = Departure {
                to: None,
                from: None,
                class: Some(class),
                hops: Some(HopLimit::new(hops)),
                segment: (count > 1).then(|| u16::try_from(segment).unwrap()),
                ipv6: address.is_ipv6(),
            };
            outgoing.push(&departure, [octets.as_slice()]);
            outgoing.send(&client, 0).unwrap();
            let start = Instant::now();
            while got.len() < sent.len() {
                assert!(start.elapsed() < PATIENCE, "{} of {} came back", got.len(), sent.len());
                for slot in 0..receiver.receive(&client, 0..SLOTS, Peer::Known).unwrap() {
                    let message = *receiver.received(slot);
                    let octets = receiver.octets(slot, 0..message.len);
                    got.extend(octets.chunks(message.segment).map(|d| (d.to_vec(), message.marks)));
                }
            }
        }
        assert!(got == sent, "{loopback}: not what was sent");
        balancer.settle(sent.len() as u64);
        assert_eq!(balancer.totals().forwarded[Rule::Cid as usize], sent.len() as u64);
    }
}

/// A socket connected to `address`, whose messages say how they are marked.
fn marking_client(address: SocketAddr) -> Socket {
    let local = SocketAddr::new(Socket::source_towards(address).unwrap(), 0);
    Socket::upstream(local, address, PortUse::Exclusive).unwrap()
}

fn send_with_hops(socket: &Socket, to: Option<SocketAddr>, hops: u8, octets: &[u8]) {
    let departure = Departure {
        to,
        from: None,
        class: None,
        hops: Some(HopLimit::new(hops)),
        segment: None,
        ipv6: socket.local_address().unwrap().is_ipv6(),
    };
    let mut sender = Sender::new();
    let mut outgoing = sender.compose();
    outgoing.push(&departure, [octets]);
    outgoing.send(socket, 0).unwrap();
}

/// The next message, and who sent it.
fn next(receiver: &mut Receiver, socket: &Socket) -> Received {
    let start = Instant::now();
    while receiver.receive(socket, 0..1, Peer::Asked).unwrap() == 0 {
        assert!(start.elapsed() < PATIENCE, "nothing came");
        thread::sleep(Duration::from_micros(200));
    }
    *receiver.received(0)
}

#[test]
fn a_datagram_goes_as_far_as_its_sender_said_and_no_further_both_ways() {
    let _alone = alone();
    for loopback in ["127.0.0.1:0", "[::1]:0"] {
        let backend = Socket::listener(loopback.parse().unwrap(), Sharing::First).unwrap();
        let balancer = Balancer::start(&config(loopback, &[backend.local_address().unwrap()]));
        let client = marking_client(balancer.address());
        let mut receiver = Receiver::new();
        send_with_hops(&client, None, 1, &packet(0, 1, 100));
        send_with_hops(&client, None, 2, &packet(0, 2, 100));
        let got = next(&mut receiver, &backend);
        assert_eq!(receiver.octets(0, 0..100), packet(0, 2, 100));
        assert_eq!(got.marks.hops, HopLimit::new(1));
        send_with_hops(&backend, Some(got.from), 1, &[1]);
        send_with_hops(&backend, Some(got.from), 200, &[2]);
        let back = next(&mut receiver, &client);
        assert_eq!((receiver.octets(0, 0..1), back.marks.hops), (&[2][..], HopLimit::new(199)));
        balancer.settle(2);
        assert_eq!(balancer.dropped(DropReason::HopLimit), 1);
        wait_until("both are counted", || {
            (balancer.totals().returned, balancer.totals().return_failed) == (1, 1)
        });
    }
}

/// Balancers of which each takes the next one for a server, and the last the first.
fn circle(balancers: usize, workers: usize) -> Vec<Balancer> {
    let nobody = "127.0.0.1:9".parse().unwrap();
    let with_server = |server| {
        let mut config = config("127.0.0.1:0", &[server]);
        config.workers = NonZeroUsize::new(workers);
        config
    };
    let mut circle: Vec<_> =
        (0..balancers).map(|_| Balancer::start(&with_server(nobody))).collect();
    for at in 0..balancers {
        let server = circle[(at + 1) % balancers].address();
        circle[at].reload(&with_server(server));
    }
    circle
}

/// The sum of what `balancers` have received, once nothing arrives any more.
fn received_when_silent(balancers: &[Balancer]) -> u64 {
    let received = || balancers.iter().map(Balancer::received).sum();
    wait_until("they fall silent", || {
        let before: u64 = received();
        thread::sleep(Duration::from_millis(100));
        before > 0 && received() == before
    });
    for balancer in balancers {
        balancer.settle(balancer.received());
    }
    received()
}

#[test]
fn balancers_that_send_to_each_other_in_a_circle_fall_silent() {
    let _alone = alone();
    for (balancers, workers) in [(1, 1), (2, 1), (3, 1), (1, 3), (2, 3)] {
        for hops in [64, 255] {
            let circle = circle(balancers, workers);
            let client = marking_client(circle[0].address());
            send_with_hops(&client, None, hops, &packet(0, 1, 41));
            let received = received_when_silent(&circle);
            assert!(received <= 64, "{balancers} balancers: {received} of one datagram");
            if workers == 1 {
                let flows: u64 = circle.iter().map(Balancer::flows).sum();
                assert!(flows <= 6, "{balancers} balancers: {flows} flows of one datagram");
            }
            // Where flows exist, the way round is cut no shorter than by the hop limit.
            for number in 0..20 {
                send_with_hops(&client, None, hops, &packet(0, number, 41));
            }
            // One that nobody can read has its own way round.
            send_with_hops(&client, None, hops, &[&[0x40, 0xff], &[7; 40][..]].concat());
            let received = received_when_silent(&circle);
            assert!(received <= 22 * 64, "{balancers} balancers: {received} of 22 datagrams");
        }
    }
}

#[test]
fn a_port_of_our_own_is_no_client_whichever_worker_has_it() {
    let _alone = alone();
    for _ in 0..8 {
        let circle = circle(1, 3);
        client(circle[0].address()).send(&packet(0, 1, 41)).unwrap();
        assert_eq!(received_when_silent(&circle), 2);
        assert_eq!(circle[0].dropped(DropReason::OwnAddress), 1);
    }
}

#[test]
fn balancers_in_a_row_are_no_circle() {
    let _alone = alone();
    let echo = Echo::start("127.0.0.1:0");
    let last = Balancer::start(&config("127.0.0.1:0", &[echo.address]));
    let middle = Balancer::start(&config("127.0.0.1:0", &[last.address()]));
    let first = Balancer::start(&config("127.0.0.1:0", &[middle.address()]));
    for _ in 0..3 {
        // The same again and again, from another port each time.
        let client = client(first.address());
        client.send(&packet(0, 1, 41)).unwrap();
        assert_eq!(receive(&client), packet(0, 1, 41));
    }
}

#[test]
fn what_comes_from_the_address_of_a_backend_goes_to_none() {
    let _alone = alone();
    let backends: [_; 2] = std::array::from_fn(|_| UdpSocket::bind("127.0.0.1:0").unwrap());
    let addresses = [0, 1].map(|n: usize| backends[n].local_addr().unwrap());
    let balancer = Balancer::start(&config("127.0.0.1:0", &addresses));
    for backend in &backends {
        backend.send_to(&packet(0, 1, 41), balancer.address()).unwrap();
    }
    balancer.settle(2);
    assert_eq!(balancer.dropped(DropReason::BackendAddress), 2);
}

#[test]
fn a_message_may_hold_datagrams_for_several_backends_and_for_none_in_particular() {
    let _alone = alone();
    let echoes: Vec<Echo> = (0..3).map(|_| Echo::start("127.0.0.1:0")).collect();
    let addresses: Vec<_> = echoes.iter().map(|echo| echo.address).collect();
    let balancer = Balancer::start(&config("127.0.0.1:0", &addresses));
    let address = balancer.address();
    let local = SocketAddr::new(Socket::source_towards(address).unwrap(), 0);
    let client = Socket::upstream(local, address, PortUse::Exclusive).unwrap();
    // Runs for one backend and singles in turns, and short headers that are not routable.
    let mut datagrams: Vec<Vec<u8>> = (0..48)
        .map(|number| match number {
            0..10 => packet(0, number, 200),
            40.. => [&[0x40, 0xff], &packet(1, number, 198)[..]].concat(),
            _ => packet(number as usize % 3, number, 200),
        })
        .collect();
    let octets = datagrams.concat();
    let departure = Departure {
        to: None,
        from: None,
        class: None,
        hops: None,
        segment: Some(200),
        ipv6: false,
    };
    let mut sender = Sender::new();
    let mut outgoing = sender.compose();
    outgoing.push(&departure, [octets.as_slice()]);
    outgoing.send(&client, 0).unwrap();
    let mut receiver = Receiver::new();
    let mut got: Vec<Vec<u8>> = Vec::new();
    let start = Instant::now();
    while got.len() < datagrams.len() {
        assert!(start.elapsed() < PATIENCE, "{} of {} came back", got.len(), datagrams.len());
        for slot in 0..receiver.receive(&client, 0..SLOTS, Peer::Known).unwrap() {
            let message = *receiver.received(slot);
            let octets = receiver.octets(slot, 0..message.len);
            got.extend(octets.chunks(message.segment).map(<[u8]>::to_vec));
        }
    }
    got.sort();
    datagrams.sort();
    assert!(got == datagrams, "not what was sent");
    balancer.settle(48);
    assert_eq!(balancer.totals().forwarded[Rule::Cid as usize], 40);
    assert_eq!(balancer.totals().forwarded[Rule::FourTuple as usize], 8);
    assert_eq!(balancer.of_backend("b1").forwarded, 10);
    assert_eq!(balancer.flows(), 3);
}

#[test]
fn each_client_path_and_backend_has_a_port_of_its_own() {
    let _alone = alone();
    let echoes: Vec<Echo> = (0..3).map(|_| Echo::start("127.0.0.1:0")).collect();
    let addresses: Vec<_> = echoes.iter().map(|echo| echo.address).collect();
    let mut config = config("127.0.0.1:0", &addresses);
    config.workers = NonZeroUsize::new(3);
    let balancer = Balancer::start(&config);
    let clients: Vec<_> = (0..20).map(|_| client(balancer.address())).collect();
    for round in 0..3 {
        for client in &clients {
            for backend in 0..3 {
                client.send(&packet(backend, round, 200)).unwrap();
            }
            let mut got: Vec<_> = (0..3).map(|_| receive(client)).collect();
            let mut sent: Vec<_> = (0..3).map(|backend| packet(backend, round, 200)).collect();
            got.sort();
            sent.sort();
            assert!(got == sent);
        }
    }
    balancer.settle(180);
    assert_eq!(balancer.flows(), 60);
    assert_eq!(balancer.totals().path_changes, 60);
    for echo in &echoes {
        assert_eq!(echo.peers(), 20);
    }
}

#[test]
fn datagrams_without_octets_are_dropped_and_counted_and_starve_nobody() {
    let _alone = alone();
    let echo = Echo::start("127.0.0.1:0");
    let balancer = Balancer::start(&config("127.0.0.1:0", &[echo.address]));
    let client = client(balancer.address());
    for _ in 0..100 {
        client.send(&[]).unwrap();
    }
    client.send(&packet(0, 1, 100)).unwrap();
    assert_eq!(receive(&client), packet(0, 1, 100));
    balancer.settle(101);
    assert_eq!(balancer.dropped(DropReason::Empty), 100);
}

#[test]
fn a_backend_may_answer_with_nothing_in_a_datagram() {
    let _alone = alone();
    let backend = UdpSocket::bind("127.0.0.1:0").unwrap();
    let balancer = Balancer::start(&config("127.0.0.1:0", &[backend.local_addr().unwrap()]));
    let client = client(balancer.address());
    client.send(&packet(0, 1, 100)).unwrap();
    let (_, peer) = backend.recv_from(&mut [0; 2000]).unwrap();
    for answer in [&[][..], &[1, 2, 3], &[], &[4, 5, 6], &[7]] {
        backend.send_to(answer, peer).unwrap();
    }
    let got: Vec<_> = (0..5).map(|_| receive(&client)).collect();
    assert_eq!(got, [&[][..], &[1, 2, 3], &[], &[4, 5, 6], &[7]]);
}

#[test]
fn a_backend_that_refuses_is_noted_and_others_go_on() {
    let _alone = alone();
    let gone = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let echo = Echo::start("127.0.0.1:0");
    let balancer = Balancer::start(&config("127.0.0.1:0", &[gone, echo.address]));
    let client = client(balancer.address());
    for number in 0..20 {
        client.send(&packet(0, number, 300)).unwrap();
        client.send(&packet(1, number, 300)).unwrap();
        assert_eq!(receive(&client), packet(1, number, 300));
    }
    balancer.settle(40);
    let refused: Vec<_> = balancer.of_backend("b0").refused.iter().collect();
    assert!(matches!(refused[..], [(Refusal::ConnectionRefused, 1..)]), "{refused:?}");
    assert_eq!(balancer.of_backend("b1").refused.total(), 0);
    assert_eq!(balancer.forwarded(), 40);
}

#[test]
fn what_the_kernel_says_against_a_backend_is_counted_with_it() {
    let _alone = alone();
    // One address that nobody may send to, and one that means nothing without a link.
    let nowhere = ["255.255.255.255:443", "[fe80::1]:443"].map(|address| address.parse().unwrap());
    let echo = Echo::start("127.0.0.1:0");
    let backends = [nowhere[0], nowhere[1], echo.address];
    let balancer = Balancer::start(&config("127.0.0.1:0", &backends));
    let client = client(balancer.address());
    for number in 0..4 {
        client.send(&packet(0, number, 100)).unwrap();
        client.send(&packet(1, number, 100)).unwrap();
        client.send(&packet(2, number, 100)).unwrap();
        assert_eq!(receive(&client), packet(2, number, 100));
    }
    balancer.settle(12);
    assert_eq!(balancer.dropped(DropReason::SendFailed), 8);
    let of = |name| balancer.of_backend(name).refused.iter().collect::<Vec<_>>();
    assert_eq!(of("b0"), [(Refusal::AccessDenied, 4)]);
    assert_eq!(of("b1"), [(Refusal::Invalid, 4)]);
    assert_eq!(of("b2"), []);
}

#[test]
fn idle_flows_end_and_their_sockets_close() {
    let _alone = alone();
    let echo = Echo::start("127.0.0.1:0");
    let mut config = config("127.0.0.1:0", &[echo.address]);
    config.timeouts.flow_idle = Duration::from_millis(200);
    let balancer = Balancer::start(&config);
    let descriptors = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
        let open =
            tasks.map(|task| std::fs::read_dir(task.path().join("fd")).map_or(0, Iterator::count));
        open.max().unwrap()
    };
    let before = descriptors();
    let clients: Vec<_> = (0..200).map(|_| client(balancer.address())).collect();
    for client in &clients {
        client.send(&packet(0, 1, 100)).unwrap();
        receive(client);
    }
    assert_eq!(balancer.flows(), 200);
    assert!(descriptors() >= before + 200);
    drop(clients);
    wait_until("the flows end", || balancer.flows() == 0);
    wait_until("their sockets close", || descriptors() <= before + 1);
    // The balancer goes on, with new flows in the old slots.
    let again = client(balancer.address());
    again.send(&packet(0, 2, 100)).unwrap();
    assert_eq!(receive(&again), packet(0, 2, 100));
}

#[test]
fn a_reload_with_a_shorter_idle_time_ends_flows_of_running_workers() {
    let _alone = alone();
    let echo = Echo::start("127.0.0.1:0");
    let mut config = config("127.0.0.1:0", &[echo.address]);
    let mut balancer = Balancer::start(&config);
    let client = client(balancer.address());
    client.send(&packet(0, 1, 100)).unwrap();
    receive(&client);
    wait_until("there is a flow", || balancer.flows() == 1);
    config.timeouts.flow_idle = Duration::from_millis(100);
    balancer.reload(&config);
    wait_until("it ends", || balancer.flows() == 0);
}

#[test]
fn a_backend_sees_another_port_after_a_flow_has_ended_however_soon_that_is() {
    let _alone = alone();
    let backend = UdpSocket::bind("127.0.0.1:0").unwrap();
    backend.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut config = config("127.0.0.1:0", &[backend.local_addr().unwrap()]);
    config.timeouts.flow_idle = Duration::from_millis(100);
    config.timeouts.flow_unanswered = Duration::from_millis(100);
    let balancer = Balancer::start(&config);
    // One connection, from another address each time.
    let mut ports = HashSet::new();
    for number in 0..4 {
        let client = client(balancer.address());
        client.send(&packet(0, number, 100)).unwrap();
        let (_, from) = backend.recv_from(&mut [0; 200]).unwrap();
        assert!(ports.insert(from.port()), "{} stood for another address before", from.port());
        wait_until("the flow ends", || balancer.flows() == 0);
    }
    assert_eq!(balancer.totals().path_changes, 4);
}

#[test]
fn what_is_for_another_client_of_the_port_is_not_sent_on() {
    let _alone = alone();
    let backend = UdpSocket::bind("127.0.0.1:0").unwrap();
    backend.set_read_timeout(Some(PATIENCE)).unwrap();
    let balancer = Balancer::start(&config("127.0.0.1:0", &[backend.local_addr().unwrap()]));
    let client = client(balancer.address());
    let long = |dcid: &[u8], scid: &[u8]| {
        let id = |id: &[u8]| [&[u8::try_from(id.len()).unwrap()], id].concat();
        [&[0xc0, 0, 0, 0, 1][..], &id(dcid), &id(scid), &[0; 1200]].concat()
    };
    client.send(&long(b"client drawn", b"client")).unwrap();
    let (_, port) = backend.recv_from(&mut [0; 2000]).unwrap();
    backend.send_to(&long(b"somebody", b"server"), port).unwrap();
    wait_until("it has come back", || balancer.totals().return_stale == 1);
    let answer = long(b"client", b"server");
    backend.send_to(&answer, port).unwrap();
    assert_eq!(receive(&client), answer);
    wait_until("it is counted", || balancer.totals().returned == 1);
    assert_eq!(balancer.totals().return_stale, 1);
}

#[test]
fn a_full_table_of_flows_refuses_nobody() {
    let _alone = alone();
    let echo = Echo::start("127.0.0.1:0");
    let mut config = config("127.0.0.1:0", &[echo.address]);
    config.limits.flows = 16.try_into().unwrap();
    let balancer = Balancer::start(&config);
    assert_eq!(balancer.workers.flow_capacity(), 16);
    let speak = |client: &UdpSocket, number| {
        client.send(&packet(0, number, 100)).unwrap();
        assert_eq!(receive(client), packet(0, number, 100));
    };
    // One that goes on speaking keeps its flow, and each of the others gets its answer. One flow is kept for
    // connections that were seen before.
    let regular = client(balancer.address());
    speak(&regular, 1);
    // They stay open, lest one get the port of another.
    let others: Vec<_> = (2..102).map(|number| (number, client(balancer.address()))).collect();
    for (number, other) in &others {
        speak(other, 1);
        speak(&regular, *number);
    }
    balancer.settle(201);
    assert_eq!(balancer.dropped(DropReason::FlowLimit), 0);
    assert_eq!((balancer.flows(), balancer.evicted()), (15, 101 - 15));
    // Whoever lost its flow gets another.
    let returning = client(balancer.address());
    speak(&returning, 1);
    for _ in 0..16 {
        speak(&client(balancer.address()), 1);
    }
    speak(&returning, 2);
}

#[test]
fn what_is_too_big_for_the_link_is_counted_as_that() {
    let _alone = alone();
    let echo = Echo::start("[::1]:0");
    // IPv4 leaves 20 octets more than IPv6 does on a loopback of 65,536 octets.
    let balancer = Balancer::start(&config("127.0.0.1:0", &[echo.address]));
    let client = client(balancer.address());
    client.send(&packet(0, 1, 65_500)).unwrap();
    client.send(&packet(0, 2, 1_000)).unwrap();
    assert_eq!(receive(&client), packet(0, 2, 1_000));
    balancer.settle(2);
    assert_eq!(balancer.dropped(DropReason::TooBig), 1);
}

#[test]
fn an_address_that_is_taken_is_reported_in_one_sentence() {
    let _alone = alone();
    let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let config = config(&address.to_string(), &[address]);
    let error = Balancer::try_start(&config).map(|_| ()).unwrap_err();
    assert!(matches!(error, StartError::Listen { address: at, .. } if at.0 == address));
    let text = error.to_string();
    assert!(
        text.starts_with(&format!("cannot listen on {address}: the address is in use;")),
        "{text}"
    );
    // A balancer does not silently share its addresses with another one either.
    drop(taken);
    let first = Balancer::start(&config);
    assert!(Balancer::try_start(&config).is_err());
    drop(first);
    assert!(Balancer::try_start(&config).is_ok());
}

/// A socket that shares its address.
fn shared_socket(address: SocketAddr) -> OwnedFd {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None).unwrap();
    socket.set_reuse_port(true).unwrap();
    socket.bind(&address.into()).unwrap();
    socket.into()
}

/// What the kernel calls a descriptor, whatever its number.
fn name_of(fd: &OwnedFd) -> PathBuf {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap()
}

/// The threads in whose tables a descriptor is, by what the kernel calls it.
fn holders(name: &Path) -> Vec<String> {
    let mut holders = Vec::new();
    for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let Ok(descriptors) = std::fs::read_dir(task.path().join("fd")) else { continue };
        let mut names = descriptors.flatten().filter_map(|fd| std::fs::read_link(fd.path()).ok());
        if names.any(|other| other == name) {
            let thread = std::fs::read_to_string(task.path().join("comm")).unwrap();
            holders.push(thread.trim().to_owned());
        }
    }
    holders.sort();
    holders
}

#[test]
fn inherited_listeners_serve_and_belong_to_their_workers_alone() {
    let _alone = alone();
    let echo = Echo::start("127.0.0.1:0");
    let mut config = config("127.0.0.1:0", &[echo.address]);
    config.workers = NonZeroUsize::new(3);
    let first = shared_socket("127.0.0.1:0".parse().unwrap());
    let address = socket2::SockRef::from(&first).local_addr().unwrap().as_socket().unwrap();
    let sockets = vec![first, shared_socket(address), shared_socket(address)];
    let names: Vec<_> = sockets.iter().map(name_of).collect();
    let listeners = vec![Listen::Inherit(sockets)];
    let balancer = Balancer::try_start_with(&config, listeners).unwrap();
    assert_eq!(balancer.address(), address);
    for (n, name) in names.iter().enumerate() {
        assert_eq!(holders(name), [format!("worker-{n}")]);
    }
    // The kernel spreads clients over all three: with 60 of them, none is left out.
    let clients: Vec<_> = (0..60).map(|_| client(address)).collect();
    for client in &clients {
        client.send(&packet(0, 1, 300)).unwrap();
        assert_eq!(receive(client), packet(0, 1, 300));
    }
    balancer.settle(60);
    assert_eq!(balancer.workers.stop(), None);
    assert!(names.iter().all(|name| holders(name).is_empty()));
    UdpSocket::bind(address).expect("nobody has the address any more");
}

#[test]
fn what_cannot_be_inherited_is_refused_in_one_sentence() {
    let _alone = alone();
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let mut config = config("127.0.0.1:0", &[any]);
    config.workers = NonZeroUsize::new(2);
    let refused = |sockets| {
        let listeners = vec![Listen::Inherit(sockets)];
        Balancer::try_start_with(&config, listeners).map(|_| ()).unwrap_err().to_string()
    };
    assert_eq!(
        refused(vec![shared_socket(any)]),
        "the sockets of a listener to take over are not one for each worker: 1 for 2"
    );
    let stream = || OwnedFd::from(TcpListener::bind(any).unwrap());
    for sockets in [vec![stream(), stream()], vec![shared_socket(any), stream()]] {
        let names: Vec<_> = sockets.iter().map(name_of).collect();
        let error = refused(sockets);
        assert_eq!(error, "cannot take over the socket of a listener: not a bound UDP socket");
        assert!(names.iter().all(|name| holders(name).is_empty()), "something is left behind");
    }
}

#[test]
fn in_steady_state_nothing_is_allocated() {
    let _alone = alone();
    // Sinks that do not allocate either: std sockets with fixed buffers.
    let backend = UdpSocket::bind("127.0.0.1:0").unwrap();
    backend.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut config = config("127.0.0.1:0", &[backend.local_addr().unwrap()]);
    config.timeouts.flow_unanswered = Duration::from_millis(100);
    let balancer = Balancer::start(&config);
    // A sweep that finds something grows the list of expired flows: one passes before the count.
    client(balancer.address()).send(&packet(0, 0, 1_200)).unwrap();
    backend.recv(&mut [0; 2_000]).unwrap();
    wait_until("the flow without an answer has ended", || balancer.flows() == 0);
    let clients: Vec<_> = (0..50).map(|_| client(balancer.address())).collect();
    let packet = packet(0, 1, 1_200);
    let mut buffer = [0; 2_000];
    let mut round = |per_client: usize| {
        for client in &clients {
            for _ in 0..per_client {
                client.send(&packet).unwrap();
            }
            for _ in 0..per_client {
                let (len, peer) = backend.recv_from(&mut buffer).unwrap();
                backend.send_to(&buffer[..len], peer).unwrap();
            }
            for _ in 0..per_client {
                client.recv(&mut buffer).unwrap();
            }
        }
    };
    round(20);
    let before = ALLOCATIONS.load(SeqCst);
    for _ in 0..10 {
        round(20);
    }
    assert_eq!(ALLOCATIONS.load(SeqCst) - before, 0);
    balancer.settle(1 + 11 * 20 * 50);
}

/// A flood of Initials without tokens, with forged ones and with good ones.
#[test]
fn a_flood_is_answered_and_dropped_without_allocating() {
    let _alone = alone();
    let backend = UdpSocket::bind("127.0.0.1:0").unwrap();
    backend.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut config = config("127.0.0.1:0", &[backend.local_addr().unwrap()]);
    config.retry.mode = RetryMode::Always;
    config.retry.keys = vec![TokenKey::new(1, [2; 16], [0; 12]).unwrap()];
    config.limits.new_connections.per_address = 100_000.try_into().ok();
    config.timeouts.flow_unanswered = Duration::from_millis(100);
    let balancer = Balancer::start(&config);
    // A sweep that finds something grows the list of expired flows: one passes before the count.
    client(balancer.address()).send(&packet(0, 0, 1_200)).unwrap();
    backend.recv(&mut [0; 2_000]).unwrap();
    wait_until("the flow without an answer has ended", || balancer.flows() == 0);
    let clients: Vec<_> = (0..20).map(|_| client(balancer.address())).collect();
    let hello = initial(&[3; 8], &[]);
    let mut forged = initial(&[3; 8], &[8; 76]);
    forged[20] = 8;
    let mut buffer = [0; 2_000];
    let mut answered = 0;
    let mut round = |count: usize| {
        for client in &clients {
            for _ in 0..count {
                client.send(&hello).unwrap();
                client.send(&forged).unwrap();
            }
            for _ in 0..count {
                answered = client.recv(&mut buffer).unwrap();
            }
        }
    };
    round(20);
    let before = ALLOCATIONS.load(SeqCst);
    for _ in 0..10 {
        round(20);
    }
    assert_eq!(ALLOCATIONS.load(SeqCst) - before, 0);
    assert!(quic::retry::verify(Version::V1, &[3; 8], &buffer[..answered]));
    wait_until("every datagram has a verdict", || {
        let replied = balancer.totals().replied[0];
        replied == 11 * 20 * 20 && balancer.dropped(DropReason::InvalidToken) == replied
    });
    assert_eq!(balancer.received(), 1 + 2 * 11 * 20 * 20);
    assert_eq!(balancer.flows(), 0, "nothing is kept");
}

/// An Initial that says nothing, of 1,200 octets.
fn initial(dcid: &[u8], token: &[u8]) -> Vec<u8> {
    let mut octets = vec![0xc0, 0, 0, 0, 1, dcid.len() as u8];
    octets.extend_from_slice(dcid);
    octets.extend_from_slice(&[4, 9, 9, 9, 9]);
    quic::varint::write(token.len() as u64, &mut octets);
    octets.extend_from_slice(token);
    octets.resize(1_200, 0);
    octets
}
