//! Connection IDs on the simulator: rotation of a configuration under load, a server without one,
//! stateless resets, and what the balancer's tokens do.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use quic::{
    ConnectionId,
    routable::{CidConfig, CidGenerator, ConfigId, Key, Partition, ServerId},
    token::{RetryClaim, TokenKey, TokenKeys, nat},
    transport::{
        CidIssuer, ClientConfig, ConnectionError, Endpoint, EndpointConfig, MigrateError, ResetKey,
        RetryPolicy, ServerConfig, TokenPolicy,
    },
};
use quic_lb_tests::sim::{
    NodeId, World,
    crypto::{self, CertificateSize},
    files::{Fetch, FileClient, FileServer, fetch_all},
    for_seeds,
    host::Host,
    link::LinkConfig,
    origin,
    rng::Rng,
    wall,
};

const SERVER: &str = "192.0.2.1:443";

fn server_id() -> ServerId {
    ServerId::new(&[0xab, 0xcd]).unwrap()
}

fn cid_config(id: u8) -> CidConfig {
    let nonce = if id.is_multiple_of(2) { 14 } else { 6 };
    CidConfig::new(ConfigId::new(id).unwrap(), 2, nonce, Some(&Key::new([id; 16]))).unwrap()
}

fn issuer(id: u8) -> CidIssuer {
    let generator =
        CidGenerator::new(cid_config(id), server_id(), Partition::Whole, [id; 32]).unwrap();
    CidIssuer::routable(generator, ResetKey::new([id; 32]))
}

struct Scene {
    world: World,
    server: NodeId,
    clients: Vec<NodeId>,
}

fn scene(seed: u64, cids: CidIssuer, clients: u16, download: usize, loss: u32) -> Scene {
    let mut rng = Rng::new(seed);
    let address: SocketAddr = SERVER.parse().unwrap();
    let config = server_config(&mut rng);
    let server = EndpointConfig::server(config, cids, rng.octets());
    let mut world = World::new(rng.number());
    let server = world.add(&[address], Host::new(address, server, FileServer::default()));
    let link = LinkConfig { loss, ..LinkConfig::default() };
    let clients = (0..clients).map(|index| {
        let tls = crypto::client(rng.number(), CertificateSize::Small, None);
        let files = vec![Fetch { download, upload: 0 }];
        let app = FileClient::new(ClientConfig::new(tls), address, files);
        let inside = SocketAddr::from(([10, 0, 0, 1], 5000 + index));
        let outside = SocketAddr::from(([198, 51, 100, 1], 20_000 + index));
        let host = Host::new(inside, EndpointConfig::client(rng.octets()), app);
        world.add_behind(&[inside], host, link.clone(), link.clone(), Some((outside, None)))
    });
    let clients = clients.collect();
    Scene { world, server, clients }
}

fn server_config(rng: &mut Rng) -> ServerConfig {
    let mut config = ServerConfig::new(crypto::server(rng.number(), CertificateSize::Small));
    config.retry = RetryPolicy::Never;
    config
}

impl Scene {
    fn finish(&mut self) {
        fetch_all(&mut self.world, &self.clients, Duration::from_secs(120));
    }

    fn server_cids(&mut self) -> Vec<Vec<ConnectionId>> {
        let endpoint = &self.world.node::<Host<FileServer>>(self.server).endpoint;
        let connections = endpoint.connections().filter_map(|handle| endpoint.connection(handle));
        connections.map(|connection| connection.local_cids().collect()).collect()
    }
}

#[test]
fn req_m09_a_rotation_replaces_every_cid_of_every_live_connection() {
    for_seeds("req_m09_a_rotation", 5, |seed| {
        let mut scene = scene(seed, issuer(0), 5, 5 << 20, 10_000);
        for round in 1..4u8 {
            scene.world.pass(Duration::from_secs(1));
            let host = scene.world.node::<Host<FileServer>>(scene.server);
            host.endpoint.set_cid_config(issuer(round));
            scene.world.pass(Duration::from_millis(600));
            let all = scene.server_cids();
            assert_eq!(all.len(), 5);
            for cids in all {
                assert!((2..=4).contains(&cids.len()), "{cids:?}");
                for cid in cids {
                    assert_eq!(ConfigId::from_first_octet(cid[0]), ConfigId::new(round));
                    assert_eq!(cid_config(round).decode(&cid), Some(server_id()));
                }
            }
            for &client in &scene.clients {
                let host = scene.world.node::<Host<FileClient>>(client);
                let connection = host.endpoint.connection(host.app.current.unwrap()).unwrap();
                let used = connection.remote_cid();
                assert_eq!(ConfigId::from_first_octet(used[0]), ConfigId::new(round));
            }
        }
        scene.finish();
    });
}

#[test]
fn req_m10_without_a_config_one_unroutable_cid_and_no_migration() {
    for_seeds("req_m10_without", 3, |seed| {
        let cids = CidIssuer::unroutable(8, [3; 32], ResetKey::new([4; 32]));
        let mut scene = scene(seed, cids, 2, 1 << 20, 0);
        scene.world.pass(Duration::from_millis(500));
        for cids in scene.server_cids() {
            assert_eq!(cids.len(), 1);
            assert_eq!(cids[0][0] >> 5, 0b111);
        }
        let now = scene.world.now();
        let host = scene.world.node::<Host<FileClient>>(scene.clients[0]);
        let mut connection = host.endpoint.connection_mut(host.app.current.unwrap()).unwrap();
        assert_eq!(connection.migrate(now, None), Err(MigrateError::Disabled));
        drop(connection);
        scene.finish();
    });
}

#[test]
fn req_h06_a_server_that_lost_its_state_resets_and_another_server_does_not() {
    for same_server in [true, false] {
        let mut scene = scene(1, issuer(2), 1, 50 << 20, 0);
        scene.world.pass(Duration::from_secs(1));
        // The process restarts: same configuration and reset key, no connections. Or the packets
        // go astray to another server with the same configuration.
        let id = if same_server { [0xab, 0xcd] } else { [0x12, 0x34] };
        let generator = CidGenerator::new(
            cid_config(2),
            ServerId::new(&id).unwrap(),
            Partition::Whole,
            [9; 32],
        );
        let cids = CidIssuer::routable(generator.unwrap(), ResetKey::new([2; 32]));
        let config = server_config(&mut Rng::new(5));
        let config = EndpointConfig::server(config, cids, [6; 32]);
        let host = scene.world.node::<Host<FileServer>>(scene.server);
        host.endpoint = Endpoint::new(config, origin(), wall());
        scene.world.pass(Duration::from_secs(2));
        let app = &scene.world.node::<Host<FileClient>>(scene.clients[0]).app;
        let expected: &[_] = if same_server { &[ConnectionError::Reset] } else { &[] };
        assert_eq!(app.failed, expected);
    }
}

#[test]
fn tokens_of_a_balancer_that_rewrites_addresses_are_honoured() {
    let key = TokenKey::new(1, [7; 16], [0; 12]).unwrap();
    let mut rng = Rng::new(3);
    let address: SocketAddr = SERVER.parse().unwrap();
    let mut config = EndpointConfig::server(server_config(&mut rng), issuer(1), rng.octets());
    config.tokens = Some(TokenPolicy::Nat(TokenKeys::new([key.clone()])));
    let mut world = World::new(3);
    let server = Host::new(address, config, FileServer::default());
    let server = world.add(&[address], server);

    // The balancer, played here: it answers the first Initial by a Retry of its own.
    let front: SocketAddr = "192.0.2.9:443".parse().unwrap();
    let tls = crypto::client(rng.number(), CertificateSize::Small, None);
    let files = vec![Fetch { download: 5000, upload: 0 }];
    let app = FileClient::new(ClientConfig::new(tls), front, files);
    let client_address: SocketAddr = "198.51.100.1:1234".parse().unwrap();
    let host = Host::new(client_address, EndpointConfig::client(rng.octets()), app);
    let client = world.add(&[client_address], host);
    let balancer = Balancer { front, server: address, client: None, key, out: Vec::new() };
    world.add(&[front], balancer);
    let done = world
        .run(Duration::from_secs(10), |world| world.node::<Host<FileClient>>(client).app.is_done());
    let app = &world.node::<Host<FileClient>>(client).app;
    assert!(done && app.failed.is_empty() && app.done == 1, "{app:?}");
    let server = world.node::<Host<FileServer>>(server);
    assert_eq!(server.app.connected, 1);
    let connection = server.endpoint.connections().next().expect("it has not closed");
    let told = server.endpoint.sealed_client(connection);
    assert_eq!(told, Some(client_address), "the server knows where its client is");
}

/// Sends a Retry for Initials without a token, and forwards everything else under its own address.
struct Balancer {
    front: SocketAddr,
    server: SocketAddr,
    client: Option<SocketAddr>,
    key: TokenKey,
    out: Vec<quic_lb_tests::sim::Packet>,
}

impl quic_lb_tests::sim::Node for Balancer {
    fn handle(&mut self, _now: std::time::Instant, mut packet: quic_lb_tests::sim::Packet) {
        use quic::{
            header::{Kind, LongType},
            invariants::Packet,
            varint,
        };
        if packet.from == self.server {
            packet.to = self.client.expect("a client spoke first");
            packet.from = self.front;
            self.out.push(packet);
            return;
        }
        self.client = Some(packet.from);
        if let Ok(Packet::Long(header)) = Packet::read(&packet.octets)
            && let Kind::Known(version, LongType::Initial) = header.kind()
            && varint::read(header.rest).is_some_and(|(len, _)| len == 0)
        {
            let original_dcid = ConnectionId::new(header.dcid).unwrap();
            if original_dcid.len() == 8 {
                let scid = ConnectionId::new(&[0x5a; 12]).unwrap();
                let expires: SystemTime = wall() + Duration::from_secs(10);
                let claim = RetryClaim { original_dcid, client: packet.from, expires };
                let token = nat::seal(&self.key, [1; 12], &claim, &scid).unwrap();
                let retry = quic::retry::Retry {
                    version,
                    dcid: header.scid,
                    scid: &scid,
                    original_dcid: &original_dcid,
                    token: &token,
                };
                let mut octets = vec![0; quic::retry::MAX_LEN];
                let len = retry.write(0, &mut octets).unwrap();
                octets.truncate(len);
                packet.to = packet.from;
                packet.from = self.front;
                packet.octets = octets;
                self.out.push(packet);
                return;
            }
        }
        packet.from = self.front;
        packet.to = self.server;
        self.out.push(packet);
    }

    fn drive(&mut self, _now: std::time::Instant, out: &mut Vec<quic_lb_tests::sim::Packet>) {
        out.append(&mut self.out);
    }

    fn deadline(&mut self) -> Option<std::time::Instant> {
        None
    }
}

#[test]
fn a_certificate_problem_reaches_the_caller_with_advice() {
    let mut scene = scene(1, issuer(0), 1, 1000, 0);
    let stranger = crypto::client(9, CertificateSize::Large, None);
    let host = scene.world.node::<Host<FileClient>>(scene.clients[0]);
    host.app.config.tls = Arc::clone(&stranger);
    scene.world.pass(Duration::from_secs(1));
    let app = &scene.world.node::<Host<FileClient>>(scene.clients[0]).app;
    let [ConnectionError::Tls { code, .. }] = &app.failed[..] else { panic!("{app:?}") };
    assert!(code.alert().is_some());
    assert!(app.failed[0].to_string().contains("trust anchors"), "{}", app.failed[0]);
}
