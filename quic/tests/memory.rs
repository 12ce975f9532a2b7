//! What connections cost in memory, counted by the allocator: idle ones, many of them, and packets
//! of a bulk transfer.

#![allow(clippy::disallowed_methods, reason = "tests are their own shell")]
#![expect(clippy::unwrap_used, reason = "a test")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    collections::VecDeque,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use quic::transport::{
    CidIssuer, ClientConfig, ConnectionHandle, Dir, Endpoint, EndpointConfig, Event, Read,
    Received, ResetKey, ServerConfig, StreamLimits, Transmit, TransportConfig,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

/// Rounds of an exchange that do not end by themselves are given up after so many.
const MAX_ROUNDS: usize = 100_000;

/// Counts what is allocated and how often.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static COUNT: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged; the counters do not touch memory.
#[expect(unsafe_code, reason = "the only way to see allocations")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `memory` came from `alloc` above, hence from the system's allocator.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Tests of this file share the counters and run one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Octets in use, with what C code and the allocator itself need.
#[cfg(target_env = "gnu")]
fn in_use() -> usize {
    // SAFETY: it reads the statistics of the C library's allocator and nothing else.
    #[expect(unsafe_code, reason = "TLS keeps its keys in memory that Rust's allocator never sees")]
    let info = unsafe { libc::mallinfo2() };
    info.uordblks + info.hblkhd
}

/// Octets in use, as Rust asked for them.
#[cfg(not(target_env = "gnu"))]
fn in_use() -> usize {
    LIVE.load(Ordering::Relaxed)
}

/// Longer than the handshakes of a test take.
const PATIENCE: Duration = Duration::from_secs(300);

/// What an idle connection may take.
const BUDGET: usize = 12 * 1024;

#[test]
fn an_idle_connection_takes_at_most_12_kib_at_either_end() {
    let _alone = alone();
    let cost = Fleet::connected(500).cost();
    println!("octets per idle connection: {cost:?}");
    assert!(cost.server <= BUDGET && cost.client <= BUDGET, "{cost:?}");
}

#[test]
fn a_connection_that_rests_after_bulk_takes_no_more() {
    let _alone = alone();
    let mut fleet = Fleet::connected(100);
    for index in 0..=100 {
        fleet.download(index, 2 << 20);
    }
    for _ in 0..4 {
        fleet.pass(Duration::from_millis(700));
    }
    let cost = fleet.cost();
    println!("octets per idle connection, after 2 MiB: {cost:?}");
    assert!(cost.server <= BUDGET && cost.client <= BUDGET, "{cost:?}");
}

#[test]
fn ten_thousand_idle_connections_fit_one_endpoint_and_leave_nothing_behind() {
    let _alone = alone();
    let mut fleet = Fleet::connected(10_000);
    let total = in_use() - fleet.before;
    println!("10,000 idle connections, both ends: {total} octets");
    assert!(total <= 10_000 * 2 * BUDGET, "{total}");
    assert_eq!((fleet.server.connection_count(), fleet.server.half_open()), (10_001, 0));
    // A message on each still finds its way.
    for index in (0..10_000).step_by(997) {
        fleet.download(index, 1000);
    }
    fleet.pass(PATIENCE + Duration::from_secs(1));
    assert_eq!(fleet.server.connection_count() + fleet.client.connection_count(), 0);
    assert_eq!((fleet.server.deadline(), fleet.client.deadline()), (None, None));
    let left = in_use().saturating_sub(fleet.before);
    println!("after they have ended: {left} octets");
    // What remains is the capacity of the tables at both ends.
    assert!(left <= 10_000 * 2048, "{left}");
}

#[test]
fn bulk_transfer_allocates_next_to_nothing_per_packet() {
    let _alone = alone();
    let mut fleet = Fleet::connected(0);
    fleet.download(0, 16 << 20);
    let (allocations, packets) = (COUNT.load(Ordering::Relaxed), fleet.packets);
    fleet.download(0, 32 << 20);
    let allocations = COUNT.load(Ordering::Relaxed) - allocations;
    let packets = fleet.packets - packets;
    println!("{allocations} allocations for {packets} packets, both ends");
    assert!(packets > 20_000);
    assert!(allocations * 100 <= packets, "{allocations} allocations for {packets} packets");
}

#[test]
fn bulk_transfer_with_thousands_of_packets_in_flight_allocates_next_to_nothing_either() {
    let _alone = alone();
    let streams = StreamLimits {
        stream_window: 32 << 20,
        connection_window: 32 << 20,
        send_buffer: 8 << 20,
        max_send_buffer: 8 << 20,
        ..StreamLimits::default()
    };
    let mut fleet = Fleet::with(0, streams);
    let mut path = LongPath::new();
    let (allocations, packets) = fleet.download_over(&mut path, 128 << 20);
    println!("{allocations} allocations for {packets} packets, at most {} under way", path.most);
    assert!(path.most > 3000, "{} under way", path.most);
    assert!(allocations * 100 <= packets, "{allocations} allocations for {packets} packets");
}

/// What one connection costs at each end.
#[derive(Debug)]
struct Cost {
    server: usize,
    client: usize,
}

const SERVER: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 443);

/// One server, and as many connections of one client endpoint.
struct Fleet {
    before: usize,
    count: usize,
    now: Instant,
    server: Endpoint,
    client: Endpoint,
    client_config: ClientConfig,
    at_client: Vec<ConnectionHandle>,
    at_server: Vec<ConnectionHandle>,
    buffer: Vec<u8>,
    chunk: Vec<u8>,
    /// Datagrams exchanged so far.
    packets: usize,
}

impl Fleet {
    /// After `count` handshakes, with nothing left to say.
    fn connected(count: usize) -> Self {
        Self::with(count, StreamLimits::default())
    }

    fn with(count: usize, streams: StreamLimits) -> Self {
        let (server_tls, client_tls) = tls();
        let now = Instant::now();
        let mut config = ServerConfig::new(server_tls);
        config.retry = quic::transport::RetryPolicy::Never;
        let patient =
            TransportConfig { idle_timeout: PATIENCE, streams, ..TransportConfig::default() };
        let transport = Arc::new(patient);
        config.transport = Arc::clone(&transport);
        let cids = CidIssuer::standalone(8, [1; 32], ResetKey::new([2; 32]));
        let config = EndpointConfig::server(config, cids, [3; 32]);
        let server = Endpoint::new(config, now, SystemTime::UNIX_EPOCH);
        let client = Endpoint::new(EndpointConfig::client([4; 32]), now, SystemTime::UNIX_EPOCH);
        let mut fleet = Self {
            before: 0,
            count,
            now,
            server,
            client,
            client_config: ClientConfig { transport, ..ClientConfig::new(client_tls) },
            at_client: Vec::with_capacity(count + 1),
            at_server: Vec::with_capacity(count + 1),
            buffer: Vec::with_capacity(1 << 16),
            chunk: vec![7; 1 << 16],
            packets: 0,
        };
        // One to warm up what is made once.
        fleet.connect();
        fleet.before = in_use();
        for _ in 0..count {
            fleet.connect();
        }
        for _ in 0..10 {
            fleet.pass(Duration::from_millis(500));
        }
        fleet
    }

    fn connect(&mut self) {
        let connected = self.client.connect(self.now, &self.client_config, SERVER, "server.test");
        self.at_client.push(connected.unwrap());
        for _ in 0..4 {
            self.pass(Duration::from_millis(1));
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.client.handle_deadline(self.now);
        self.server.handle_deadline(self.now);
        self.exchange();
    }

    fn exchange(&mut self) {
        let from = |remote| Received { remote, local: None, ecn: None };
        let client: SocketAddr = SocketAddr::new([192, 0, 2, 2].into(), 1000);
        for _ in 0..MAX_ROUNDS {
            let mut quiet = true;
            while let Some(sent) = self.client.poll_transmit(self.now, 10, &mut self.buffer) {
                quiet = false;
                self.packets += sent.len.div_ceil(sent.segment);
                deliver(&mut self.server, self.now, from(client), sent, &mut self.buffer);
            }
            while let Some(sent) = self.server.poll_transmit(self.now, 10, &mut self.buffer) {
                quiet = false;
                self.packets += sent.len.div_ceil(sent.segment);
                deliver(&mut self.client, self.now, from(SERVER), sent, &mut self.buffer);
            }
            while self.client.poll_event().is_some() {}
            while let Some((handle, event)) = self.server.poll_event() {
                if event == Event::Connected {
                    self.at_server.push(handle);
                }
            }
            if quiet {
                return;
            }
        }
        panic!("the endpoints never fall silent");
    }

    /// Has the server send `len` octets on connection `index`.
    fn download(&mut self, index: usize, len: usize) {
        let (at_server, at_client) = (self.at_server[index], self.at_client[index]);
        let stream = self.server.connection_mut(at_server).unwrap().open(Dir::Uni).unwrap();
        let (mut written, mut read) = (0, 0);
        for _ in 0..MAX_ROUNDS {
            let mut server = self.server.connection_mut(at_server).unwrap();
            let left = (len - written).min(self.chunk.len());
            written += server.write(stream, &self.chunk[..left]).unwrap_or(0);
            if written == len {
                let _ = server.finish(stream);
            }
            drop(server);
            self.exchange();
            let mut client = self.client.connection_mut(at_client).unwrap();
            while client.accept(Dir::Uni).is_some() {}
            loop {
                match client.read(stream, &mut self.chunk) {
                    Ok(Read::Data(count)) => read += count,
                    Ok(Read::Blocked) => break,
                    Ok(Read::Finished) => {
                        assert_eq!(read, len);
                        drop(client);
                        return self.pass(Duration::from_millis(30));
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            drop(client);
            self.pass(Duration::from_millis(1));
        }
        panic!("{read} of {len} octets have arrived");
    }

    /// Has the server send `len` octets on the first connection over a long path. Returns how often
    /// memory was allocated for how many packets, once half of them had arrived.
    fn download_over(&mut self, path: &mut LongPath, len: usize) -> (usize, usize) {
        let (at_server, at_client) = (self.at_server[0], self.at_client[0]);
        let stream = self.server.connection_mut(at_server).unwrap().open(Dir::Uni).unwrap();
        let (mut written, mut read) = (0, 0);
        let mut half = None;
        for _ in 0..MAX_ROUNDS {
            let mut server = self.server.connection_mut(at_server).unwrap();
            while written < len {
                let left = (len - written).min(self.chunk.len());
                match server.write(stream, &self.chunk[..left]).unwrap() {
                    0 => break,
                    count => written += count,
                }
            }
            if written == len {
                let _ = server.finish(stream);
            }
            drop(server);
            path.carry(self);
            let mut client = self.client.connection_mut(at_client).unwrap();
            while client.accept(Dir::Uni).is_some() {}
            while let Ok(Read::Data(count)) = client.read(stream, &mut self.chunk) {
                read += count;
            }
            drop(client);
            let count = (COUNT.load(Ordering::Relaxed), self.packets);
            if read >= len / 2 {
                half.get_or_insert(count);
            }
            if read == len {
                let (allocations, packets) = half.unwrap_or_default();
                return (count.0 - allocations, count.1 - packets);
            }
            self.now += Duration::from_micros(500);
        }
        panic!("{read} of {len} octets have arrived");
    }

    fn cost(self) -> Cost {
        let Self { before, count, server, client, .. } = self;
        let both = in_use() - before;
        drop(client);
        let of_server = in_use().saturating_sub(before);
        drop(server);
        Cost { server: of_server / count, client: (both - of_server) / count }
    }
}

/// A path of 100 ms there and back, with memory of its own for all that can be under way.
/// Acknowledgments come in bunches, as over a radio link, each of more packets than leave at once.
struct LongPath {
    /// Down, and up.
    under_way: [VecDeque<(Instant, Vec<u8>)>; 2],
    began: Option<Instant>,
    spare: Vec<Vec<u8>>,
    /// Datagrams under way at once.
    most: usize,
}

impl LongPath {
    fn new() -> Self {
        const MOST: usize = 16_384;
        let spare = (0..MOST).map(|_| Vec::with_capacity(1500)).collect();
        let under_way = [(); 2].map(|()| VecDeque::with_capacity(MOST));
        Self { under_way, began: None, spare, most: 0 }
    }

    /// What arrives by now, and what leaves.
    fn carry(&mut self, fleet: &mut Fleet) {
        let from = |remote| Received { remote, local: None, ecn: None };
        let client: SocketAddr = SocketAddr::new([192, 0, 2, 2].into(), 1000);
        let began = *self.began.get_or_insert(fleet.now);
        for up in [false, true] {
            if up && !(fleet.now - began).as_micros().is_multiple_of(20_000) {
                continue;
            }
            let due = |(at, _): &(Instant, Vec<u8>)| *at <= fleet.now;
            while self.under_way[usize::from(up)].front().is_some_and(due) {
                let Some((_, mut datagram)) = self.under_way[usize::from(up)].pop_front() else {
                    return;
                };
                match up {
                    true => fleet.server.handle_datagram(fleet.now, from(client), &mut datagram),
                    false => fleet.client.handle_datagram(fleet.now, from(SERVER), &mut datagram),
                }
                datagram.clear();
                self.spare.push(datagram);
            }
        }
        fleet.client.handle_deadline(fleet.now);
        fleet.server.handle_deadline(fleet.now);
        for up in [true, false] {
            let end = if up { &mut fleet.client } else { &mut fleet.server };
            while let Some(sent) = end.poll_transmit(fleet.now, 10, &mut fleet.buffer) {
                for datagram in fleet.buffer.chunks(sent.segment) {
                    let mut kept = self.spare.pop().unwrap_or_default();
                    kept.extend_from_slice(datagram);
                    fleet.packets += 1;
                    let arrival = fleet.now + Duration::from_millis(50);
                    self.under_way[usize::from(up)].push_back((arrival, kept));
                }
                fleet.buffer.clear();
            }
            while end.poll_event().is_some() {}
        }
        self.most = self.most.max(self.under_way[0].len());
    }
}

fn deliver(to: &mut Endpoint, now: Instant, from: Received, sent: Transmit, buffer: &mut Vec<u8>) {
    for datagram in buffer.chunks_mut(sent.segment) {
        to.handle_datagram(now, from, datagram);
    }
    buffer.clear();
}

fn tls() -> (Arc<rustls::ServerConfig>, Arc<rustls::ClientConfig>) {
    let made = rcgen::generate_simple_self_signed(["server.test".to_owned()]).unwrap();
    let der = CertificateDer::from(made.cert);
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider.kx_groups.retain(|group| group.name() == rustls::NamedGroup::X25519);
    let provider = Arc::new(provider);
    let mut server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![der.clone()], key)
        .unwrap();
    server.alpn_protocols = vec![b"test".to_vec()];
    let mut roots = rustls::RootCertStore::empty();
    roots.add(der).unwrap();
    let mut client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.alpn_protocols = vec![b"test".to_vec()];
    (Arc::new(server), Arc::new(client))
}
