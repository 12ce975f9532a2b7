//! How fast a transfer is on paths that are not at fault for being slow: as fast as they carry.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use quic::transport::congestion::Algorithm;
use quic::transport::{
    CidIssuer, ClientConfig, Connection, EndpointConfig, ResetKey, ServerConfig, Stats,
    StreamLimits, TransportConfig,
};
use quic_lb_tests::sim::{
    NodeId, World,
    crypto::{self, CertificateSize},
    files::{Fetch, FileClient, FileServer},
    for_seeds,
    host::Host,
    link::LinkConfig,
    rng::Rng,
};

const MIB: usize = 1 << 20;

/// 50 Mbit/s and a queue of a round trip.
const RATE: u64 = 50_000_000 / 8;
/// Each way; what is reordered is half of the way down late, hence 12.5 ms of 100.
const DOWN: Duration = Duration::from_millis(25);
const UP: Duration = Duration::from_millis(75);

/// What a download has shown.
#[derive(Debug)]
struct Seen {
    time: Duration,
    /// Of the server.
    stats: Stats,
}

/// A download over a path of 100 ms.
struct Transfer {
    world: World,
    server: NodeId,
    client: NodeId,
}

impl Transfer {
    fn start(seed: u64, size: usize, transport: TransportConfig, down: LinkConfig) -> Self {
        let mut rng = Rng::new(seed ^ 0x4a7e);
        let address = |text: &str| text.parse::<SocketAddr>().expect("an address");
        let (front, inside) = (address("192.0.2.1:443"), address("10.0.0.1:5000"));
        let transport = Arc::new(transport);
        let mut server = ServerConfig::new(crypto::server(rng.number(), CertificateSize::Small));
        server.transport = Arc::clone(&transport);
        let tls = crypto::client(rng.number(), CertificateSize::Small, None);
        let mut client = ClientConfig::new(tls);
        client.transport = transport;
        let app = FileClient::new(client, front, vec![Fetch { download: size, upload: 0 }]);
        let mut world = World::new(rng.number());
        let cids = CidIssuer::standalone(9, [9; 32], ResetKey::new([8; 32]));
        let config = EndpointConfig::server(server, cids, rng.octets());
        let server = world.add(&[front], Host::new(front, config, FileServer::default()));
        let host = Host::new(inside, EndpointConfig::client(rng.octets()), app);
        let up = LinkConfig { delay: UP, rate: 0, ..LinkConfig::default() };
        let client = world.add_behind(&[inside], host, up, down, None);
        Self { world, server, client }
    }

    /// Looks at the server's end, as long as there is one.
    fn at_server<T>(&mut self, look: impl FnOnce(&Connection) -> T) -> Option<T> {
        let host = self.world.node::<Host<FileServer>>(self.server);
        let handle = host.endpoint.connections().next()?;
        host.endpoint.connection(handle).map(|connection| look(&connection))
    }

    /// Octets that the client has received.
    fn received(&mut self) -> u64 {
        let host = self.world.node::<Host<FileClient>>(self.client);
        let connection = host.app.current.and_then(|handle| host.endpoint.connection(handle));
        connection.expect("it goes on").stats().received.octets
    }

    fn client(&mut self) -> &mut FileClient {
        &mut self.world.node::<Host<FileClient>>(self.client).app
    }
}

/// Downloads `size` octets at 50 Mbit/s.
fn download(seed: u64, size: usize, down: impl FnOnce(&mut LinkConfig)) -> Seen {
    let mut link =
        LinkConfig { delay: DOWN, rate: RATE, queue: 450, burst: 1, ..LinkConfig::default() };
    down(&mut link);
    let mut transfer = Transfer::start(seed, size, TransportConfig::default(), link);
    let mut stats = Stats::default();
    for _ in 0..12_000 {
        transfer.world.pass(Duration::from_millis(10));
        stats = transfer.at_server(Connection::stats).unwrap_or(stats);
        if transfer.client().is_done() {
            break;
        }
    }
    let time = transfer.world.elapsed();
    let app = transfer.client();
    assert!(app.is_done() && app.failed.is_empty() && app.done == 1, "{app:?}");
    Seen { time, stats }
}

#[test]
fn a_path_that_reorders_is_as_fast_as_one_that_does_not() {
    for_seeds("--test sim_rates a_path_that_reorders_is", 3, |seed| {
        let plain = download(seed, 32 * MIB, |_| {});
        for reorder in [10_000, 50_000] {
            let seen = download(seed, 32 * MIB, |link| link.reorder = reorder);
            assert!(seen.time * 10 <= plain.time * 11, "{reorder} ppm: {seen:?}, {plain:?}");
            // It is known after some, and not found out anew with each one.
            assert!((1..100).contains(&seen.stats.late_packets), "{reorder} ppm: {seen:?}");
        }
    });
}

#[test]
fn losses_are_losses_on_a_path_that_reorders() {
    // Which packets are lost makes a difference of its own; together they are as good as each other.
    for loss in [1000, 10_000] {
        let mut times = [Duration::ZERO; 2];
        for seed in 0..40 {
            for (time, reorder) in times.iter_mut().zip([0, 10_000]) {
                let seen = download(seed, 8 * MIB, |link| {
                    (link.loss, link.reorder) = (loss, reorder);
                });
                assert!(seen.stats.lost_packets > seen.stats.late_packets, "{seen:?}");
                *time += seen.time;
            }
        }
        let [plain, reordered] = times;
        assert!(reordered * 100 <= plain * 115, "{loss} ppm lost: {reordered:?}, {plain:?}");
        assert!(plain * 100 <= reordered * 130, "{loss} ppm lost: {reordered:?}, {plain:?}");
    }
}

#[test]
fn req_k04_a_window_that_a_buffer_keeps_from_being_used_does_not_grow() {
    for_seeds("--test sim_rates req_k04", 2, |seed| {
        for congestion in [Algorithm::Cubic, Algorithm::NewReno] {
            for lossy in [false, true] {
                let buffer = 128 * 1024;
                let streams = StreamLimits {
                    send_buffer: buffer,
                    max_send_buffer: buffer,
                    ..StreamLimits::default()
                };
                let config = TransportConfig { streams, congestion, ..TransportConfig::default() };
                let link = LinkConfig { delay: DOWN, rate: 0, ..LinkConfig::default() };
                let mut transfer = Transfer::start(seed, 1 << 30, config, link);
                transfer.world.pass(Duration::from_secs(1));
                if lossy {
                    // It avoids congestion from here on.
                    transfer.world.access(transfer.client).down.config.loss = 1_000_000;
                    transfer.world.pass(Duration::from_millis(1));
                    transfer.world.access(transfer.client).down.config.loss = 0;
                }
                transfer.world.pass(Duration::from_secs(20));
                let window = transfer.at_server(|server| server.path().congestion_window);
                let window = usize::try_from(window.expect("it goes on")).unwrap();
                assert!(window >= buffer, "{congestion:?}, {lossy}: {window} octets");
                assert!(window <= 5 * buffer / 2, "{congestion:?}, {lossy}: {window} octets");
            }
        }
    });
}

#[test]
fn a_gigabit_over_100_ms_is_used_with_the_limits_that_are_the_default() {
    for_seeds("--test sim_rates a_gigabit", 1, |seed| {
        const GIGABIT: u64 = 125_000_000;
        let link = LinkConfig { delay: DOWN, rate: GIGABIT, queue: 6000, ..LinkConfig::default() };
        let mut transfer = Transfer::start(seed, 2 << 30, TransportConfig::default(), link);
        transfer.world.pass(Duration::from_secs(3));
        let before = transfer.received();
        transfer.world.pass(Duration::from_secs(3));
        let rate = (transfer.received() - before) / 3;
        assert!(rate * 10 >= GIGABIT * 9, "{rate} octets per second");
    });
}
