//! How fast a transfer is on paths that are not at fault for being slow: as fast as they carry.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use quic::transport::{
    CidIssuer, ClientConfig, EndpointConfig, ResetKey, ServerConfig, Stats, TransportConfig,
};
use quic_lb_tests::sim::{
    World,
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

/// Downloads `size` octets over a path of 50 Mbit/s and 100 ms.
fn download(seed: u64, size: usize, down: impl FnOnce(&mut LinkConfig)) -> Seen {
    let mut rng = Rng::new(seed ^ 0x4a7e);
    let address = |text: &str| text.parse::<SocketAddr>().expect("an address");
    let (front, inside) = (address("192.0.2.1:443"), address("10.0.0.1:5000"));
    let transport = Arc::new(TransportConfig::default());
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
    let mut link = LinkConfig { delay: DOWN, rate: RATE, queue: 450, burst: 1, ..up.clone() };
    down(&mut link);
    let client = world.add_behind(&[inside], host, up, link, None);
    let mut stats = Stats::default();
    let done = world.run(Duration::from_secs(120), |world| {
        let host = world.node::<Host<FileServer>>(server);
        let first = host.endpoint.connections().next();
        if let Some(connection) = first.and_then(|handle| host.endpoint.connection(handle)) {
            stats = connection.stats();
        }
        world.node::<Host<FileClient>>(client).app.is_done()
    });
    let app = &world.node::<Host<FileClient>>(client).app;
    assert!(done && app.failed.is_empty() && app.done == 1, "{app:?}");
    Seen { time: world.elapsed(), stats }
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
        for seed in 0..8 {
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
