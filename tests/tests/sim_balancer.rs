//! Our clients and servers through the balancer's own forwarder: NATs that move, clients that
//! migrate, configurations that rotate. Nothing is lost and nothing goes astray.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use quic::{
    routable::ConfigId,
    transport::{
        ClientConfig, DropReason, EndpointConfig, RetryPolicy, ServerConfig, TransportConfig,
    },
};
use quic_lb_tests::sim::{
    NodeId, Rebinding, World,
    balancer::Balancer,
    crypto::{self, CertificateSize},
    files::{Fetch, FileClient, FileServer, fetch_all},
    fleet::{self, SERVERS, add_balancer, cid_config, issuer},
    for_seeds,
    host::Host,
    link::LinkConfig,
    origin,
    rng::Rng,
};

const FRONT: &str = "192.0.2.9:443";
struct Site {
    world: World,
    balancer: NodeId,
    servers: Vec<NodeId>,
    clients: Vec<NodeId>,
}

struct Plan {
    clients: u16,
    download: usize,
    loss: u32,
    retry: RetryPolicy,
    rebinding: Option<Rebinding>,
}

fn site(seed: u64, plan: &Plan) -> Site {
    let mut rng = Rng::new(seed);
    let mut world = World::new(rng.number());
    let front: SocketAddr = FRONT.parse().unwrap();
    let balancer = add_balancer(&mut world, front);
    let servers = (1..=SERVERS).map(|server| {
        let tls = crypto::server(rng.number(), CertificateSize::Small);
        let mut config = ServerConfig::new(tls);
        config.retry = plan.retry;
        let config = EndpointConfig::server(config, issuer(server, 0), rng.octets());
        let address = fleet::address(server, false);
        world.add(&[address], Host::new(address, config, FileServer::default()))
    });
    let servers = servers.collect();
    let link = LinkConfig { loss: plan.loss, ..LinkConfig::default() };
    let clients = (0..plan.clients).map(|client| {
        let tls = crypto::client(rng.number(), CertificateSize::Small, None);
        let files = vec![Fetch { download: plan.download, upload: plan.download / 10 }];
        let mut config = ClientConfig::new(tls);
        // Behind a NAT that moves while nothing of the client's is in flight, only the client can
        // tell the server where it is.
        let keep_alive = Some(Duration::from_secs(1));
        config.transport = Arc::new(TransportConfig { keep_alive, ..TransportConfig::default() });
        let app = FileClient::new(config, front, files);
        let inside = SocketAddr::from(([172, 16, 0, 1], 5000 + client));
        let outside = SocketAddr::from(([198, 51, 100, 1], 40_000 + client));
        let host = Host::new(inside, EndpointConfig::client(rng.octets()), app);
        let nat = Some((outside, plan.rebinding));
        world.add_behind(&[inside], host, link.clone(), link.clone(), nat)
    });
    let clients = clients.collect();
    Site { world, balancer, servers, clients }
}

impl Site {
    fn finish(&mut self) {
        fetch_all(&mut self.world, &self.clients, Duration::from_secs(300));
        let mut connected = 0;
        for &server in &self.servers {
            let host = self.world.node::<Host<FileServer>>(server);
            connected += host.app.connected;
            let astray = host.endpoint.dropped(DropReason::UnknownConnection);
            assert_eq!(astray, 0, "datagrams of other servers");
        }
        assert_eq!(connected, self.clients.len() as u64);
        assert_eq!(self.world.node::<Balancer>(self.balancer).dropped, []);
    }
}

#[test]
fn connections_survive_nats_that_move_and_clients_that_migrate() {
    for_seeds("connections_survive_nats", 5, |seed| {
        let rebinding = Rebinding {
            first: Duration::from_millis(700),
            every: Duration::from_millis(900),
            address: !seed.is_multiple_of(2),
        };
        let mut site = site(
            seed,
            &Plan {
                clients: 6,
                download: 3 << 20,
                loss: 5_000,
                retry: if seed.is_multiple_of(3) {
                    RetryPolicy::Always
                } else {
                    RetryPolicy::Never
                },
                rebinding: Some(rebinding),
            },
        );
        for round in 0..3 {
            site.world.pass(Duration::from_millis(500));
            let now = site.world.now();
            let client = site.clients[round];
            let host = site.world.node::<Host<FileClient>>(client);
            if let Some(mut connection) =
                host.app.current.and_then(|current| host.endpoint.connection_mut(current))
            {
                let _ = connection.migrate(now, None);
            }
        }
        site.finish();
        let moves: u64 = (0..usize::from(SERVERS))
            .map(|server| site.world.node::<Host<FileServer>>(site.servers[server]).app.moves)
            .sum();
        assert!(moves >= 6, "{moves} moves seen by the servers");
        let decided = &site.world.node::<Balancer>(site.balancer).decided;
        assert!(decided["cid"] > 100 && decided["fallback"] >= 6, "{decided:?}");
    });
}

#[test]
fn req_m09_a_rotation_through_the_balancer_loses_nothing() {
    for_seeds("req_m09_a_rotation_through", 5, |seed| {
        let plan = Plan {
            clients: 4,
            download: 4 << 20,
            loss: 10_000,
            retry: RetryPolicy::Never,
            rebinding: Some(Rebinding {
                first: Duration::from_secs(1),
                every: Duration::from_secs(1),
                address: false,
            }),
        };
        let mut site = site(seed, &plan);
        for round in 1..4u8 {
            site.world.pass(Duration::from_millis(800));
            // The balancer first, then its servers, then the old configuration goes.
            let both = [cid_config(round - 1), cid_config(round)];
            site.world.node::<Balancer>(site.balancer).reload(&both, &fleet::backends(false));
            site.world.pass(Duration::from_millis(100));
            for server in 1..=SERVERS {
                let node = site.servers[usize::from(server) - 1];
                let host = site.world.node::<Host<FileServer>>(node);
                host.endpoint.set_cid_config(issuer(server, round));
            }
            site.world.pass(Duration::from_secs(1));
            for &server in &site.servers {
                let endpoint = &site.world.node::<Host<FileServer>>(server).endpoint;
                let connections = endpoint.connections().filter_map(|id| endpoint.connection(id));
                for cid in
                    connections.flat_map(|connection| connection.local_cids().collect::<Vec<_>>())
                {
                    assert_eq!(ConfigId::from_first_octet(cid[0]), ConfigId::new(round));
                }
            }
            let new = [cid_config(round)];
            site.world.node::<Balancer>(site.balancer).reload(&new, &fleet::backends(false));
        }
        site.finish();
    });
}

#[test]
fn a_drain_is_over_soon_after_the_last_connection_and_never_before() {
    const QUIET: Duration = Duration::from_secs(8);
    const LATEST: Duration = Duration::from_secs(10);
    const STEP: Duration = Duration::from_millis(100);
    for_seeds("a_drain_is_over_soon_after", 5, |seed| {
        let mut rng = Rng::new(seed ^ 0xd7a1);
        let mut world = World::new(rng.number());
        let front: SocketAddr = FRONT.parse().unwrap();
        let balancer = add_balancer(&mut world, front);
        let servers = (1..=SERVERS).map(|server| {
            let tls = crypto::server(rng.number(), CertificateSize::Small);
            let config =
                EndpointConfig::server(ServerConfig::new(tls), issuer(server, 0), rng.octets());
            let address = fleet::address(server, false);
            world.add(&[address], Host::new(address, config, FileServer::default()))
        });
        let servers: Vec<_> = servers.collect();
        // Clients come for a while, behind NATs of their own, some of which move; each goes on saying
        // something every few seconds, until it closes.
        let mut ends = Vec::new();
        let clients = (0..9u8).map(|client| {
            let tls = crypto::client(rng.number(), CertificateSize::Small, None);
            let mut config = ClientConfig::new(tls);
            let keep_alive = Some(Duration::from_millis(500 + rng.number() % 5_500));
            config.transport =
                Arc::new(TransportConfig { keep_alive, ..TransportConfig::default() });
            let files = vec![Fetch { download: 50_000, upload: 5_000 }];
            let mut app = FileClient::new(config, front, files);
            app.stay = true;
            ends.push(Duration::from_millis(3_000 + rng.number() % 30_000));
            let inside = SocketAddr::from(([172, 16, 0, 1], 5000));
            let outside = SocketAddr::from(([198, 51, 100, client], 40_000));
            let every = Duration::from_secs(3);
            let rebinding = Rebinding { first: every, every, address: false };
            let nat = Some((outside, client.is_multiple_of(2).then_some(rebinding)));
            let host = Host::new(inside, EndpointConfig::client(rng.octets()), app);
            let link = LinkConfig { loss: 10_000, ..LinkConfig::default() };
            (client, world.add_behind(&[inside], host, link.clone(), link, nat))
        });
        let clients: Vec<_> = clients.collect();

        let drained = usize::try_from(rng.number() % u64::from(SERVERS)).unwrap();
        let drain_at = Duration::from_millis(2_000 + rng.number() % 3_000);
        let (mut drained_since, mut over_since, mut complete) = (None, None, false);
        let start = origin();
        for step in 0..700u32 {
            let time = STEP * step;
            world.pass(STEP);
            let now = world.now();
            for (&(_, client), &end) in clients.iter().zip(&ends) {
                let host = world.node::<Host<FileClient>>(client);
                if time >= end
                    && let Some(mut connection) =
                        host.app.current.and_then(|current| host.endpoint.connection_mut(current))
                {
                    connection.close(now, 0, bytes::Bytes::new());
                }
            }
            let node = world.node::<Balancer>(balancer);
            node.sweep(now);
            if time >= drain_at && drained_since.is_none() {
                node.drain(drained);
                drained_since = Some(now);
            }
            let live = node.live(drained);
            let went = node.went.clone();
            let open = clients.iter().filter(|&&(client, node)| {
                let outside = [198, 51, 100, client].into();
                went.get(&outside) == Some(&drained)
                    && world.node::<Host<FileClient>>(node).app.current.is_some()
            });
            let open = open.count();
            let server = &world.node::<Host<FileServer>>(servers[drained]).app;
            let held = server.connected.saturating_sub(server.closed.len() as u64);
            let Some(since) = drained_since else { continue };
            if open > 0 || held > 0 {
                over_since = None;
            } else {
                over_since.get_or_insert(now);
            }
            complete = live.silence(since - start, now - start) >= QUIET;
            assert!(!complete || open == 0, "{open} connections are left at {time:?}: {live:?}");
            let over = over_since.unwrap_or(now);
            assert!(complete || now - over < LATEST, "over since {:?}: {live:?}", now - over);
        }
        assert!(complete);
        for (_, client) in clients {
            let app = &world.node::<Host<FileClient>>(client).app;
            assert!(app.failed.is_empty() && app.connected == 1, "{app:?}");
        }
    });
}
