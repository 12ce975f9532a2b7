//! Faults that a fleet has to survive, on the simulator: routers that hash anew, balancers and
//! servers that go away. Connections lost are counted, and only those that had to be may be.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use quic::transport::{
    ClientConfig, ConnectionError, DropReason, EndpointConfig, RetryPolicy, ServerConfig,
    TransportConfig,
};
use quic_lb_tests::sim::{
    NodeId, Rebinding, World,
    balancer::Balancer,
    crypto::{self, CertificateSize},
    files::{Fetch, FileClient, FileServer},
    fleet::{self, SERVERS, cid_config, issuer},
    for_seeds,
    host::Host,
    link::LinkConfig,
    rng::Rng,
    splitter::Splitter,
};

const FRONT: &str = "192.0.2.9:443";
const CLIENTS: u16 = 8;
const DOWNLOAD: usize = 2 << 20;

/// Two balancers behind one address, three servers, clients behind NATs.
struct Fleet {
    world: World,
    rng: Rng,
    splitter: NodeId,
    servers: Vec<NodeId>,
    clients: Vec<NodeId>,
}

impl Fleet {
    fn new(seed: u64, rebinding: Option<Rebinding>) -> Self {
        let mut rng = Rng::new(seed ^ 0xfa_017);
        let mut world = World::new(rng.number());
        let front: SocketAddr = FRONT.parse().unwrap();
        let balancers = [100, 101].map(|host| {
            let inside = fleet::address(host, false).ip();
            let backends = fleet::backends(false);
            (inside, Balancer::new(front, inside, &[cid_config(0)], &backends))
        });
        let insides = [balancers[0].0, balancers[1].0];
        let splitter = world.add(&[front], Splitter::new(front, balancers.into()));
        for inside in insides {
            world.give(inside, splitter);
        }
        let mut servers = Vec::new();
        for number in 1..=SERVERS {
            let address = fleet::address(number, false);
            let host = Host::new(address, server(number, &mut rng), FileServer::default());
            // A link without delay, rate or loss: something to cut.
            let wire = LinkConfig { delay: Duration::ZERO, rate: 0, ..LinkConfig::default() };
            servers.push(world.add_behind(&[address], host, wire.clone(), wire, None));
        }
        let clients = (0..CLIENTS).map(|client| {
            let tls = crypto::client(rng.number(), CertificateSize::Small, None);
            let files = vec![Fetch { download: DOWNLOAD, upload: DOWNLOAD / 10 }];
            let mut config = ClientConfig::new(tls);
            let transport =
                TransportConfig { keep_alive: Some(Duration::from_secs(1)), ..Default::default() };
            config.transport = Arc::new(transport);
            let app = FileClient::new(config, front, files);
            let inside = SocketAddr::from(([172, 16, 0, 1], 5000 + client));
            let outside = SocketAddr::from(([198, 51, 100, 1], 40_000 + client));
            let host = Host::new(inside, EndpointConfig::client(rng.octets()), app);
            let link = LinkConfig { loss: 5_000, ..LinkConfig::default() };
            let nat = Some((outside, rebinding));
            world.add_behind(&[inside], host, link.clone(), link, nat)
        });
        let clients = clients.collect();
        Self { world, rng, splitter, servers, clients }
    }

    fn splitter(&mut self) -> &mut Splitter {
        self.world.node(self.splitter)
    }

    /// Waits until every handshake is complete. One whose path moves every few packets can run out of
    /// time.
    fn connect(&mut self) {
        while self.connected() < u64::from(CLIENTS) {
            assert!(self.world.elapsed() < Duration::from_secs(30), "handshakes do not end");
            self.world.pass(Duration::from_millis(10));
        }
    }

    fn connected(&mut self) -> u64 {
        let Self { world, servers, .. } = self;
        servers.iter().map(|&server| world.node::<Host<FileServer>>(server).app.connected).sum()
    }

    fn is_done(&mut self) -> bool {
        let Self { world, clients, .. } = self;
        clients.iter().all(|&client| world.node::<Host<FileClient>>(client).app.is_done())
    }

    /// Calls `event` every `interval`, as long as there is somebody to disturb.
    fn disturb(&mut self, interval: Duration, mut event: impl FnMut(&mut Self, u32)) {
        for turn in 0..300 {
            self.world.pass(interval);
            if self.is_done() {
                return;
            }
            event(self, turn);
        }
    }

    /// Lets everything come to its end. Returns how the clients' connections failed, if they did.
    fn finish(&mut self) -> Vec<Vec<ConnectionError>> {
        let clients = self.clients.clone();
        let limit = self.world.elapsed() + Duration::from_secs(300);
        let done = self.world.run(limit, |world| {
            clients.iter().all(|&client| world.node::<Host<FileClient>>(client).app.is_done())
        });
        assert!(done, "somebody waits without end");
        let failed = clients.iter().map(|&client| {
            let app = &self.world.node::<Host<FileClient>>(client).app;
            assert_eq!(app.done + app.failed.len(), 1, "{app:?}");
            app.failed.clone()
        });
        failed.collect()
    }

    /// Datagrams that came to a server which does not know them.
    fn astray(&mut self) -> u64 {
        let servers = self.servers.iter();
        let astray = servers.map(|&server| {
            let host = self.world.node::<Host<FileServer>>(server);
            host.endpoint.dropped(DropReason::UnknownConnection)
        });
        astray.sum()
    }

    fn lose_nothing(&mut self) {
        let lost: Vec<_> = self.finish().into_iter().flatten().collect();
        assert_eq!(lost, [], "connections lost");
        assert_eq!(self.astray(), 0, "datagrams that went astray");
        for balancer in self.splitter().balancers() {
            assert_eq!(balancer.dropped, []);
        }
    }
}

fn server(number: u8, rng: &mut Rng) -> EndpointConfig {
    let mut config = ServerConfig::new(crypto::server(rng.number(), CertificateSize::Small));
    config.retry = RetryPolicy::Never;
    EndpointConfig::server(config, issuer(number, 0), rng.octets())
}

/// R06: half of the paths move to the other balancer, again and again, while NATs rebind (R14).
#[test]
fn r06_r14_paths_move_between_balancers_and_nothing_is_lost() {
    for_seeds("r06_r14", 5, |seed| {
        let rebinding = Rebinding {
            first: Duration::from_millis(1500),
            every: Duration::from_millis(400),
            address: seed.is_multiple_of(2),
        };
        let mut fleet = Fleet::new(seed, Some(rebinding));
        fleet.connect();
        fleet.disturb(Duration::from_millis(100), |fleet, _| fleet.splitter().reshuffle());
        fleet.lose_nothing();
        for balancer in fleet.splitter().balancers() {
            assert!(balancer.decided["cid"] > 100, "{:?}", balancer.decided);
        }
    });
}

/// R05: one of two balancers dies in the midst of everything, handshakes included.
#[test]
fn r05_a_balancer_dies_and_nothing_is_lost() {
    for_seeds("r05", 5, |seed| {
        let mut fleet = Fleet::new(seed, None);
        let when = Duration::from_millis(fleet.rng.below(1500));
        fleet.world.pass(when);
        fleet.splitter().kill(0);
        fleet.lose_nothing();
    });
}

/// R22: a server is cut off for some seconds, then it is back.
#[test]
fn r22_a_server_is_cut_off_for_a_while_and_nothing_is_lost() {
    for_seeds("r22", 5, |seed| {
        let mut fleet = Fleet::new(seed, None);
        fleet.world.pass(Duration::from_millis(300 + seed % 1000));
        let cut = fleet.servers[0];
        for loss in [1_000_000, 0] {
            let access = fleet.world.access(cut);
            for link in [&mut access.up, &mut access.down] {
                (link.config.loss, link.config.burst) = (loss, u32::MAX);
            }
            fleet.world.pass(Duration::from_secs(5));
        }
        fleet.lose_nothing();
    });
}

/// R28: a server starts again without its state. Its own clients hear so by a stateless reset, and
/// nobody else does.
#[test]
fn r28_a_server_starts_again_and_only_its_clients_are_reset() {
    for_seeds("r28", 5, |seed| {
        let mut fleet = Fleet::new(seed, None);
        fleet.world.pass(Duration::from_millis(600));
        let node = fleet.servers[0];
        let fresh = server(1, &mut fleet.rng);
        let address = fleet::address(1, false);
        let host = fleet.world.node::<Host<FileServer>>(node);
        let had = host.endpoint.connection_count();
        *host = Host::new(address, fresh, FileServer::default());
        let failed = fleet.finish();
        let reset: Vec<_> = failed.iter().flatten().collect();
        assert!(reset.iter().all(|&error| *error == ConnectionError::Reset), "{reset:?}");
        assert_eq!(reset.len(), had, "connections lost, of {had}");
    });
}

/// R07: a server is taken out of the configuration while paths move between balancers. What is lost
/// is at most its own.
#[test]
fn r07_a_server_is_removed_while_paths_move_and_at_most_its_own_is_lost() {
    for_seeds("r07", 5, |seed| {
        let mut fleet = Fleet::new(seed, None);
        fleet.world.pass(Duration::from_millis(600));
        let node = fleet.servers[0];
        let own = fleet.world.node::<Host<FileServer>>(node).endpoint.connection_count();
        let left = &fleet::backends(false)[1..];
        for balancer in fleet.splitter().balancers() {
            balancer.reload(&[cid_config(0)], left);
        }
        fleet.disturb(Duration::from_millis(200), |fleet, _| fleet.splitter().reshuffle());
        let lost = fleet.finish().into_iter().flatten().count();
        assert!(lost <= own, "{lost} connections lost, and the server had {own}");
    });
}
