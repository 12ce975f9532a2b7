//! Address validation by the balancer's forwarder on virtual time: our clients come in at hundreds
//! of handshakes a second over links that lose datagrams, and validation begins, keys change, and
//! forged tokens arrive meanwhile. No handshake fails.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::{net::SocketAddr, time::Duration};

use quic::{
    token::{CLOCK_SKEW, TokenKey, TokenKeys},
    transport::{ClientConfig, EndpointConfig, ServerConfig, TokenPolicy, TokenResult},
};
use quic_lb_config::{Config, RetryMode};
use quic_lb_tests::sim::{
    NodeId, World,
    balancer::Balancer,
    crypto::{self, CertificateSize},
    files::{Fetch, FileClient, FileServer},
    fleet::{self, SERVERS, add_balancer_as, issuer},
    for_seeds,
    host::Host,
    link::LinkConfig,
    rng::Rng,
};

const FRONTS: [&str; 2] = ["192.0.2.9:443", "192.0.2.10:443"];
/// From one client to the next: 500 handshakes a second.
const STEP: Duration = Duration::from_millis(2);

fn key(n: u8) -> TokenKey {
    TokenKey::new(n, [n + 1; 16], [0; 12]).unwrap()
}

fn keys(all: &[u8]) -> Vec<TokenKey> {
    all.iter().copied().map(key).collect()
}

struct Site {
    world: World,
    rng: Rng,
    /// Clients go to each in turns.
    balancers: Vec<NodeId>,
    servers: Vec<NodeId>,
    clients: Vec<NodeId>,
    link: LinkConfig,
}

impl Site {
    /// One balancer, and servers that honour tokens of key 0.
    fn new(seed: u64, loss: u32) -> Self {
        Self::with_balancers(1, seed, loss)
    }

    fn with_balancers(count: u8, seed: u64, loss: u32) -> Self {
        let mut rng = Rng::new(seed);
        let mut world = World::new(rng.number());
        let balancers = (100..100 + count)
            .zip(FRONTS)
            .map(|(number, front)| add_balancer_as(&mut world, front.parse().unwrap(), number));
        let balancers = balancers.collect();
        let servers = (1..=SERVERS).map(|server| {
            let tls = crypto::server(rng.number(), CertificateSize::Small);
            let mut config =
                EndpointConfig::server(ServerConfig::new(tls), issuer(server, 0), rng.octets());
            config.tokens = Some(TokenPolicy::Nat(TokenKeys::new(keys(&[0]))));
            let address = fleet::address(server, false);
            world.add(&[address], Host::new(address, config, FileServer::default()))
        });
        let servers = servers.collect();
        let link = LinkConfig { loss, rate: 0, ..LinkConfig::default() };
        Self { world, rng, balancers, servers, clients: Vec::new(), link }
    }

    fn configure(&mut self, change: impl Fn(&mut Config)) {
        for balancer in self.balancers.clone() {
            self.configure_one(balancer, &change);
        }
    }

    fn configure_one(&mut self, balancer: NodeId, change: impl FnOnce(&mut Config)) {
        let now = self.world.now();
        self.world.node::<Balancer>(balancer).configure(now, change);
    }

    fn use_keys_on_servers(&mut self, all: &[u8]) {
        for server in self.servers.clone() {
            self.use_keys_on_server(server, all);
        }
    }

    fn use_keys_on_server(&mut self, server: NodeId, all: &[u8]) {
        let host = self.world.node::<Host<FileServer>>(server);
        host.endpoint.set_token_policy(TokenPolicy::Nat(TokenKeys::new(keys(all))));
    }

    /// So many clients, one after the other, each behind a NAT.
    fn arrive(&mut self, count: u16) {
        for _ in 0..count {
            let number = u16::try_from(self.clients.len()).unwrap();
            let tls = crypto::client(self.rng.number(), CertificateSize::Small, None);
            let files = vec![Fetch { download: 1000, upload: 10 }];
            let front = FRONTS[usize::from(number) % self.balancers.len()];
            let app = FileClient::new(ClientConfig::new(tls), front.parse().unwrap(), files);
            let inside = SocketAddr::from(([172, 16, 0, 1], 5000 + number));
            let outside = SocketAddr::from(([198, 51, 100, 1], 40_000 + number));
            let host = Host::new(inside, EndpointConfig::client(self.rng.octets()), app);
            let (up, down) = (self.link.clone(), self.link.clone());
            let client = self.world.add_behind(&[inside], host, up, down, Some((outside, None)));
            self.clients.push(client);
            self.world.pass(STEP);
        }
    }

    /// Every client has fetched what it wanted, and no server has seen an invalid token.
    fn finish(&mut self) {
        let clients = self.clients.clone();
        self.world.run(Duration::from_secs(300), |world| {
            clients.iter().all(|&client| world.node::<Host<FileClient>>(client).app.is_done())
        });
        for (number, &client) in clients.iter().enumerate() {
            let app = &self.world.node::<Host<FileClient>>(client).app;
            assert!(app.failed.is_empty() && app.done == 1, "client {number}: {:?}", app.failed);
        }
        for &server in &self.servers {
            let endpoint = &self.world.node::<Host<FileServer>>(server).endpoint;
            assert_eq!(endpoint.tokens(TokenResult::Invalid), 0);
        }
        for balancer in self.balancers.clone() {
            assert_eq!(self.world.node::<Balancer>(balancer).dropped, &[]);
        }
    }

    fn retries(&mut self) -> u64 {
        let balancers = self.balancers.clone();
        let retries = balancers.iter().map(|&balancer| {
            let decided = &self.world.node::<Balancer>(balancer).decided;
            decided.get("retry").copied().unwrap_or(0)
        });
        retries.sum()
    }

    fn proved(&mut self) -> u64 {
        let servers = self.servers.clone();
        let proved = servers.iter().map(|&server| {
            let host = self.world.node::<Host<FileServer>>(server);
            host.endpoint.tokens(TokenResult::Retry)
        });
        proved.sum()
    }
}

#[test]
fn every_client_proves_its_address_and_gets_in() {
    for_seeds("every_client_proves_its_address", 4, |seed| {
        let mut site = Site::new(seed, 20_000);
        site.configure(|config| {
            config.retry.keys = keys(&[0]);
            config.retry.mode = RetryMode::Always;
            config.retry.transition = Duration::ZERO;
        });
        site.arrive(50);
        site.finish();
        assert!(site.retries() >= 50);
        assert_eq!(site.proved(), 50);
    });
}

#[test]
fn validation_that_begins_amid_500_handshakes_a_second_fails_none() {
    for_seeds("validation_that_begins_amid", 4, |seed| {
        let mut site = Site::new(seed, if seed.is_multiple_of(2) { 0 } else { 20_000 });
        site.configure(|config| config.retry.keys = keys(&[0]));
        for _ in 0..2 {
            site.arrive(75);
            site.configure(|config| config.retry.mode = RetryMode::Always);
            // Through the transition, and out of it.
            site.arrive(150);
            site.configure(|config| config.retry.mode = RetryMode::Off);
        }
        site.finish();
        assert!(site.proved() > 50, "{} proved", site.proved());
    });
}

#[test]
fn keys_change_amid_500_handshakes_a_second_and_none_fails() {
    for_seeds("keys_change_amid", 4, |seed| {
        let mut site = Site::new(seed, 10_000);
        site.configure(|config| {
            config.retry.keys = keys(&[0]);
            config.retry.mode = RetryMode::Always;
        });
        site.arrive(120);
        for new in 1..4 {
            let old = new - 1;
            site.use_keys_on_servers(&[old, new]);
            for step in [[old, new], [new, old]] {
                site.configure(|config| config.retry.keys = keys(&step));
                site.arrive(30);
            }
            // What the old key has made is good for ten seconds, of which a client that loses
            // datagrams may need some.
            site.world.pass(Duration::from_secs(12));
            site.configure(|config| config.retry.keys = keys(&[new]));
            site.use_keys_on_servers(&[new]);
        }
        site.finish();
        assert!(site.proved() >= 180, "{} proved", site.proved());
    });
}

/// As an operator does it, node by node, with handshakes between any two of them. Balancers mint with
/// different keys for a while, servers know more than balancers need and the reverse.
#[test]
fn keys_are_rotated_over_two_balancers_and_their_servers_one_by_one_under_load() {
    const LIFETIME: Duration = Duration::from_secs(3);
    // And by how much clocks may differ.
    let end_of_tokens = LIFETIME + CLOCK_SKEW;
    for_seeds("keys_are_rotated_over_two_balancers", 2, |seed| {
        let mut site = Site::with_balancers(2, seed, if seed == 0 { 0 } else { 5_000 });
        site.use_keys_on_servers(&[1]);
        site.configure(|config| {
            config.retry.keys = keys(&[1]);
            config.retry.mode = RetryMode::Always;
            config.retry.transition = Duration::ZERO;
            config.retry.lifetime = LIFETIME;
        });
        site.arrive(40);
        let (servers, balancers) = (site.servers.clone(), site.balancers.clone());
        for step in [&[1, 2][..], &[2, 1], &[2]] {
            if step == [2] {
                let begun = site.world.now();
                while site.world.now() < begun + end_of_tokens {
                    site.arrive(50);
                }
            }
            for &server in &servers {
                site.use_keys_on_server(server, step);
                site.arrive(20);
            }
            for &balancer in &balancers {
                site.configure_one(balancer, |config| config.retry.keys = keys(step));
                site.arrive(20);
            }
        }
        site.arrive(40);
        let clients = site.clients.len() as u64;
        site.finish();
        assert_eq!(site.proved(), clients, "each has proved its address");
        assert!(site.retries() >= clients);
    });
}
