//! The rules, admission and flows through the forwarder's face.

mod learning;
mod refusals;
mod room;

use std::{
    collections::BTreeSet,
    time::{Duration, UNIX_EPOCH},
};

use proptest::prelude::*;
use quic::routable::{CidConfig, ConfigId, Key};
use quic_lb_config::HashBy;

use super::*;
use crate::{
    backend::{BackendState, PoolIndex},
    client_path::ClientPath,
    fixtures::{self, cid_config, server_id},
    registry::Registry,
    verdict::Standing,
};

const V1: u32 = 1;
const EDGE: ListenerIndex = ListenerIndex(0);
const INNER: ListenerIndex = ListenerIndex(1);

/// A forwarder and the clock it lives by.
struct Bench {
    forwarder: Forwarder,
    registry: Registry,
    memory: Arc<Memory>,
    now: Instant,
}

impl Bench {
    fn new(routable: bool) -> Self {
        Self::with_flows(routable, 800)
    }

    fn with_flows(routable: bool, max_flows: usize) -> Self {
        let now = Instant::now();
        let memory = Arc::new(Memory::new(1000, now, [5; 4]));
        let mut registry = Registry::default();
        let routing =
            Routing::new(&fixtures::config(routable), &mut registry, |_, _| Default::default());
        let start = Start { clock: Clock { now, unix: UNIX_EPOCH }, seed: [7; 32] };
        let forwarder = Forwarder::new(max_flows, Arc::new(routing), Arc::clone(&memory), &start);
        Self { forwarder, registry, memory, now }
    }

    fn sizes(&self) -> crate::memory::Sizes {
        self.memory.sizes(&self.forwarder.routing)
    }

    fn reload(&mut self, change: impl FnOnce(&mut quic_lb_config::Config), routable: bool) {
        self.reload_with(change, routable, |_| BackendState::Active);
    }

    fn reload_with(
        &mut self,
        change: impl FnOnce(&mut quic_lb_config::Config),
        routable: bool,
        state: impl Fn(&str) -> BackendState,
    ) {
        let mut config = fixtures::config(routable);
        change(&mut config);
        let routing = Routing::new(&config, &mut self.registry, |_, name| state(name));
        self.forwarder.set_routing(Arc::new(routing));
    }

    fn send(&mut self, port: u16, octets: &[u8]) -> Verdict {
        self.send_on(EDGE, port, octets)
    }

    fn send_on(&mut self, listener: ListenerIndex, port: u16, octets: &[u8]) -> Verdict {
        let path = path(port);
        let mut verdict = [Verdict::Drop(DropReason::Empty)];
        self.forwarder.decide_batch(self.now, listener, &[Datagram { path, octets }], &mut verdict);
        verdict[0]
    }

    /// The backend's name, the rule, and the flow that a datagram was forwarded with.
    fn forwarded(&mut self, port: u16, octets: &[u8]) -> (String, Rule, FlowId) {
        self.forwarded_on(EDGE, port, octets)
    }

    fn forwarded_on(
        &mut self,
        listener: ListenerIndex,
        port: u16,
        octets: &[u8],
    ) -> (String, Rule, FlowId) {
        match self.send_on(listener, port, octets) {
            Verdict::Forward { backend, rule, via } => {
                let flow = via.flow().expect("pools forward through flows");
                assert_eq!(self.forwarder.flow(flow).backend, backend);
                let name = &self.forwarder.routing.backend(backend).unwrap().name;
                (name.to_string(), rule, flow)
            }
            other => panic!("not forwarded: {other:?}"),
        }
    }
}

fn path(port: u16) -> ClientPath {
    ClientPath { client: ([192, 0, 2, 1], 50_000 + port).into(), local: None }
}

fn long(version: u32, dcid: &[u8], scid: &[u8]) -> Vec<u8> {
    let mut out = vec![0xc0];
    out.extend_from_slice(&version.to_be_bytes());
    for id in [dcid, scid] {
        out.push(u8::try_from(id.len()).unwrap());
        out.extend_from_slice(id);
    }
    out.resize(1200, 0);
    out
}

fn short(dcid: &[u8]) -> Vec<u8> {
    let mut out = vec![0x40];
    out.extend_from_slice(dcid);
    out.resize(60, 0x55);
    out
}

fn routable_cid(server: u8, nonce: u8) -> Vec<u8> {
    cid_config().encode(&server_id(server), &[nonce; 6]).unwrap().to_vec()
}

#[test]
fn rule_1_a_routable_cid_goes_to_its_server_from_anywhere() {
    let mut bench = Bench::new(true);
    for (server, name) in [(1, "a"), (2, "b"), (3, "c")] {
        for port in 1..20 {
            let cid = routable_cid(server, 9);
            assert_eq!(bench.forwarded(port, &short(&cid)).0, name);
            let (backend, rule, _) = bench.forwarded(port, &long(V1, &cid, b"client"));
            assert_eq!((backend.as_str(), rule), (name, Rule::Cid));
        }
    }
}

#[test]
fn rule_1_holds_for_versions_nobody_knows() {
    let mut bench = Bench::new(true);
    let (backend, rule, _) = bench.forwarded(1, &long(0x1a2a_3a4a, &routable_cid(2, 1), &[3; 200]));
    assert_eq!((backend.as_str(), rule), ("b", Rule::Cid));
}

/// Whoever has agreed on it with the other end sends any value (RFC 9287), in packets of every form.
#[test]
fn the_fixed_bit_decides_nothing() {
    const FIXED: u8 = 0x40;
    let mut bench = Bench::new(true);
    let hello = long(V1, b"client drawn", b"client");
    let chosen = bench.forwarded(7, &hello);
    let (established, later) =
        (long(V1, &routable_cid(3, 9), b"client"), short(&routable_cid(2, 9)));
    for (mut packet, name) in [(established, "c"), (later, "b"), (hello, chosen.0.as_str())] {
        packet[0] ^= FIXED;
        assert_eq!(bench.forwarded(7, &packet).0, name);
    }
}

#[test]
fn rule_2_a_handshake_stays_although_the_pool_changes() {
    let mut bench = Bench::new(true);
    let hello = long(V1, b"client drawn", b"client");
    let (before, rule, _) = bench.forwarded(7, &hello);
    assert_eq!(rule, Rule::Fallback);
    for drained in ["a", "b", "c"] {
        bench.reload(
            |config| {
                let is = |b: &&mut quic_lb_config::Backend| b.name == drained;
                let backend = config.pools[0].backends.iter_mut().find(is).unwrap();
                backend.admission = quic_lb_config::Admission::Draining;
            },
            true,
        );
        let (after, rule, _) = bench.forwarded(7, &hello);
        assert_eq!((after, rule), (before.clone(), Rule::FourTupleScid));
    }
}

#[test]
fn rule_2_an_attempt_that_nobody_answered_leaves_a_backend_that_is_down() {
    for routable in [true, false] {
        let mut bench = Bench::new(routable);
        let hello = long(V1, b"client drawn", b"client");
        let (dead, ..) = bench.forwarded(7, &hello);
        let is_dead = |name: &str| {
            if name == dead { BackendState::Down } else { BackendState::Active }
        };
        bench.reload_with(|_| {}, routable, is_dead);
        let (second, ..) = bench.forwarded(7, &hello);
        assert_ne!(second, dead);
        // Both datagrams of a first flight go the same way.
        assert_eq!(bench.forwarded(7, &hello).0, second);
    }
}

#[test]
fn an_attempt_that_nobody_answered_leaves_a_backend_that_is_tried_unless_it_is_new() {
    for routable in [true, false] {
        let mut bench = Bench::new(routable);
        let hello = long(V1, b"client drawn", b"client");
        let (tried, _, flow) = bench.forwarded(7, &hello);
        let is_tried = |name: &str| {
            if name == tried { BackendState::Probing } else { BackendState::Active }
        };
        bench.reload_with(|_| {}, routable, is_tried);
        bench.now += Duration::from_millis(499);
        assert_eq!(bench.forwarded(7, &hello).0, tried, "it may be the second datagram");
        bench.now += Duration::from_millis(1);
        let (second, rule, _) = bench.forwarded(7, &hello);
        assert_ne!(second, tried);
        assert_eq!(rule, Rule::Fallback);
        assert_eq!(bench.forwarded(7, &hello).0, second);
        // Once it answers, what is its own stays there.
        let _ = bench.forwarder.returned(bench.now, flow, &long(V1, b"client", &[0xff; 11]));
        assert_eq!(bench.forwarded(7, &hello).0, tried);
    }
}

#[test]
fn first_flights_are_asked_answered_and_left_unanswered_once_each() {
    let mut bench = Bench::new(true);
    let asks = |verdict| match verdict {
        Verdict::Forward { via: Via::NewFlow(opened), .. } => opened.asks,
        Verdict::Forward { .. } => false,
        Verdict::Reply(_) | Verdict::Drop(_) => panic!("{verdict:?}"),
    };
    let hello = long(V1, b"client drawn", b"client");
    assert!(asks(bench.send(7, &hello)));
    assert!(!asks(bench.send(7, &hello)), "it is repeated");
    assert!(!asks(bench.send(8, &short(&routable_cid(1, 1)))), "it is known");
    assert!(asks(bench.send(9, &long(V1, b"another one", b"client"))));
    let (_, _, flow) = bench.forwarded(7, &hello);
    let mut is_first = |cid| match bench.forwarder.returned(
        bench.now,
        flow,
        &long(V1, b"client", &routable_cid(1, cid)),
    ) {
        Returned::ForClient { is_first, .. } => is_first,
        Returned::Stale => panic!("not for its client"),
    };
    assert!(is_first(1));
    assert!(!is_first(2));
    let counters = WorkerCounters::new(1);
    bench.now += Duration::from_secs(600);
    for _ in 0..16 {
        bench.forwarder.sweep(bench.now, &mut vec![]);
        bench.forwarder.tell_live(&counters);
    }
    let unanswered = counters.backends.iter().map(|of| of.unanswered.get());
    assert_eq!((bench.forwarder.flow_count(), unanswered.sum::<u64>()), (0, 1));
}

#[test]
fn rule_3_cids_of_servers_without_routable_ones_are_learnt_and_survive_a_rebinding() {
    for routable in [false, true] {
        let mut bench = Bench::new(routable);
        let (backend, _, flow) = bench.forwarded(7, &long(V1, b"client drawn", b"client"));
        // 0xff: no configuration has these bits.
        let cid = [0xff; 11];
        let _ = bench.forwarder.returned(bench.now, flow, &long(V1, b"client", &cid));
        for port in [7, 8, 9] {
            let (after, rule, _) = bench.forwarded(port, &short(&cid));
            assert_eq!((after, rule), (backend.clone(), Rule::Dcid));
        }
    }
}

#[test]
fn rule_3_is_not_asked_to_remember_what_decodes() {
    let mut bench = Bench::new(true);
    let (backend, _, flow) = bench.forwarded(7, &long(V1, b"client drawn", b"client"));
    let server = backend.as_bytes()[0] - b'a' + 1;
    let _ =
        bench.forwarder.returned(bench.now, flow, &long(V1, b"client", &routable_cid(server, 1)));
    assert_eq!(bench.sizes().connection_ids, 0);
    // One that decodes to somebody else would lead packets astray only if it were not learnt,
    // and rule 1 goes first in any case.
    let other = server % 3 + 1;
    let _ =
        bench.forwarder.returned(bench.now, flow, &long(V1, b"client", &routable_cid(other, 1)));
    assert_eq!(bench.sizes().connection_ids, 1);
}

/// How many backends such packets go to, one from each client, when nothing is known of any.
fn backends_of_strangers(
    hash: HashBy,
    routable: bool,
    clients: impl Iterator<Item = ClientAddr>,
    packet: &[u8],
) -> BTreeSet<usize> {
    let mut bench = Bench::new(routable);
    bench.reload(|config| config.pools[0].hash = hash, routable);
    let chosen = clients.map(|client| {
        let datagram = Datagram { path: ClientPath { client, local: None }, octets: packet };
        match bench.forwarder.explain(bench.now, EDGE, &datagram).outcome {
            Outcome::Forward { backend, rule: Rule::Fallback, .. } => backend.slot(),
            other => panic!("{other:?}"),
        }
    });
    chosen.collect()
}

#[test]
fn rule_5_goes_by_what_the_pool_says() {
    use HashBy::{ClientAddress, ClientAddressAndPort, Dcid};
    let ports = || (0..60).map(|port| ClientAddr::from(([192, 0, 2, 1], 50_000 + port)));
    let hello = long(V1, b"client drawn", b"client");
    let unknown = short(&[0xff; 12]);
    for routable in [true, false] {
        let all = |hash, packet: &[u8]| backends_of_strangers(hash, routable, ports(), packet);
        assert_eq!(all(ClientAddressAndPort, &hello).len(), 3);
        assert_eq!(all(ClientAddressAndPort, &unknown).len(), 3);
        assert_eq!(all(Dcid, &hello).len(), 1);
        assert_eq!(all(Dcid, &unknown).len(), 3);
        // First and later packets of a client go one way by its address.
        assert_eq!(all(ClientAddress, &hello).len(), 1);
        assert_eq!(all(ClientAddress, &hello), all(ClientAddress, &unknown));
        // Other addresses, other servers.
        let addresses = (1..60).map(|n| ClientAddr::from(([192, 0, 2, n], 50_000)));
        assert_eq!(backends_of_strangers(ClientAddress, routable, addresses, &hello).len(), 3);
    }
}

#[test]
fn rule_5_takes_an_ipv6_network_for_one_client() {
    let within = |n: u16| ClientAddr::from(([0x2001, 0xdb8, 0, 7, n, 1, 2, n], 50_000 + n));
    let across = |n: u16| ClientAddr::from(([0x2001, 0xdb8, 0, n, 1, 1, 2, 3], 50_000));
    let hello = long(V1, b"client drawn", b"client");
    let of = |client: &dyn Fn(u16) -> ClientAddr| {
        let clients = (0..60).map(client);
        backends_of_strangers(HashBy::ClientAddress, false, clients, &hello).len()
    };
    assert_eq!(of(&within), 1);
    assert_eq!(of(&across), 3);
}

#[test]
fn a_pool_without_routable_ids_keeps_clients_that_move_to_another_port() {
    let mut bench = Bench::new(false);
    let (server, ..) = bench.forwarded(1, &long(V1, b"client drawn", b"client"));
    // An ID that no balancer has seen, from ports that none has seen.
    for port in 2..60 {
        assert_eq!(bench.forwarded(port, &short(&[0xee; 12])).0, server);
    }
}

#[test]
fn a_server_that_answers_under_anothers_connection_id_is_told_once_for_each() {
    let mut bench = Bench::new(true);
    let (backend, _, flow) = bench.forwarded(7, &long(V1, b"client drawn", b"client"));
    let server = backend.as_bytes()[0] - b'a' + 1;
    let other = server % 3 + 1;
    let id_of = |bench: &Bench, server: u8| {
        let name = [b'a' + server - 1];
        let mut all = bench.forwarder.routing.backends();
        all.find(|backend| backend.name.as_bytes() == name).unwrap().id
    };
    let mut answer = |octets: &[u8]| match bench.forwarder.returned(bench.now, flow, octets) {
        Returned::ForClient { named, .. } => named,
        Returned::Stale => panic!("not for its client"),
    };
    let [own, foreign] = [server, other].map(|server| routable_cid(server, 1));
    assert_eq!(answer(&short(&foreign)), None, "a short header has the client's");
    assert_eq!(answer(&long(0, b"client", &foreign)), None, "Version Negotiation too");
    let another = answer(&long(V1, b"client", &foreign));
    assert_eq!(answer(&long(V1, b"client", &foreign)), None, "it is no news");
    assert_eq!(answer(&long(V1, b"client", &own)), Some(AnsweredAs::Itself));
    assert_eq!(answer(&long(V1, b"client", &[0xff; 9])), Some(AnsweredAs::Nobody));
    assert_eq!(another, Some(AnsweredAs::Another(id_of(&bench, other))));
    // One server that is two backends is not another.
    let merge = |config: &mut quic_lb_config::Config| {
        let at = |server: u8| usize::from(server - 1);
        let address = config.pools[0].backends[at(server)].address;
        let mut twin = config.pools[0].backends.remove(at(other));
        (twin.address, twin.name) = (address, "twin".into());
        config.pools[0].backends.push(twin);
    };
    bench.reload(merge, true);
    let mut answer = |octets: &[u8]| match bench.forwarder.returned(bench.now, flow, octets) {
        Returned::ForClient { named, .. } => named,
        Returned::Stale => panic!("not for its client"),
    };
    assert_eq!(answer(&long(V1, b"client", &foreign)), Some(AnsweredAs::Nobody));
}

#[test]
fn rule_4_unreadable_short_headers_follow_the_path() {
    for routable in [false, true] {
        let mut bench = Bench::new(routable);
        let (backend, ..) = bench.forwarded(7, &long(V1, b"client drawn", b"client"));
        let (after, rule, _) = bench.forwarded(7, &short(&[0xff; 8]));
        assert_eq!((after, rule), (backend, Rule::FourTuple));
    }
}

#[test]
fn rule_4_new_connections_of_a_socket_spread_when_cids_are_routable_and_stay_otherwise() {
    for (routable, backends) in [(true, 3), (false, 1)] {
        let mut bench = Bench::new(routable);
        let mut seen = std::collections::HashSet::new();
        for n in 0..50u8 {
            seen.insert(bench.forwarded(7, &long(V1, &[n; 8], &[n; 4])).0);
        }
        assert_eq!(seen.len(), backends);
    }
}

#[test]
fn rule_5_is_the_same_on_every_balancer_and_whatever_the_path_for_routable_pools() {
    let (mut one, mut other) = (Bench::new(true), Bench::new(true));
    for n in 0..100u8 {
        let hello = long(V1, &[n; 9], &[n; 3]);
        assert_eq!(one.forwarded(1, &hello).0, other.forwarded(u16::from(n) + 2, &hello).0);
    }
    let (mut one, mut other) = (Bench::new(false), Bench::new(false));
    for port in 1..100 {
        assert_eq!(
            one.forwarded(port, &short(&[1; 9])).0,
            other.forwarded(port, &short(&[2; 9])).0
        );
    }
}

#[test]
fn a_known_cid_on_a_new_path_gets_a_socket_of_its_own() {
    let mut bench = Bench::new(true);
    let datagram = short(&routable_cid(1, 1));
    let (_, _, first) = bench.forwarded(1, &datagram);
    let Verdict::Forward { via: Via::NewFlow(Opened { flow, evicted, opening, .. }), .. } =
        bench.send(2, &datagram)
    else {
        panic!()
    };
    assert_eq!((evicted, opening), (None, Opening::PathChange));
    assert_ne!(flow, first);
    assert_eq!(bench.forwarder.flow(first).path, path(1));
    assert_eq!(bench.forwarder.flow(flow).path, path(2));
}

#[test]
fn a_forged_packet_moves_nothing_of_anybody_else() {
    let mut bench = Bench::new(false);
    let (victim, _, flow) = bench.forwarded(1, &long(V1, b"client drawn", b"client"));
    let cid = [0xee; 9];
    let _ = bench.forwarder.returned(bench.now, flow, &long(V1, b"client", &cid));
    // From another address, with the victim's connection IDs in every place.
    for port in 2..40 {
        bench.send(port, &long(V1, &cid, b"client"));
        bench.send(port, &long(V1, b"client drawn", &cid));
        bench.send(port, &short(&cid));
    }
    // From the victim's own address.
    for server in 1..=3 {
        bench.send(1, &short(&routable_cid(server, 1)));
        bench.send(1, &long(V1, &routable_cid(server, 1), b"other"));
    }
    assert_eq!(bench.forwarded(1, &short(&cid)).0, victim);
    assert_eq!(bench.forwarded(1, &short(&[0xdd; 9])).0, victim);
    assert_eq!(bench.forwarded(1, &long(V1, b"client drawn", b"client")).0, victim);
}

#[test]
fn draining_and_down_backends_keep_what_they_have_and_get_nothing_new() {
    for state in [BackendState::Draining, BackendState::Down, BackendState::Miswired] {
        for routable in [true, false] {
            let mut bench = Bench::new(routable);
            bench.reload_with(
                |_| {},
                routable,
                |name| if name == "a" { state } else { BackendState::Active },
            );
            for n in 0..60u8 {
                let hello = long(V1, &[n; 8], &[n; 4]);
                assert_ne!(bench.forwarded(u16::from(n) + 1, &hello).0, "a");
            }
            if routable {
                assert_eq!(bench.forwarded(99, &short(&routable_cid(1, 4))).0, "a");
            }
        }
    }
}

#[test]
fn when_every_backend_seems_down_they_are_tried_and_when_all_drain_nothing_new_is_taken() {
    let mut bench = Bench::new(true);
    bench.reload_with(|_| {}, true, |_| BackendState::Down);
    bench.forwarded(1, &long(V1, &[1; 8], b"client"));
    bench.reload_with(|_| {}, true, |_| BackendState::Miswired);
    bench.forwarded(2, &long(V1, &[2; 8], b"miswired"));
    // One that may be well beats one that is known not to be.
    let state = |name: &str| match name {
        "a" => BackendState::Draining,
        "b" => BackendState::Down,
        _ => BackendState::Miswired,
    };
    bench.reload_with(|_| {}, true, state);
    for n in 10..30u8 {
        assert_eq!(bench.forwarded(u16::from(n), &long(V1, &[n; 8], b"client")).0, "b");
    }
    bench.reload_with(|_| {}, true, |_| BackendState::Draining);
    assert_eq!(bench.send(2, &long(V1, &[2; 8], b"other")), Verdict::Drop(DropReason::NoBackend));
    assert_eq!(bench.forwarded(3, &short(&routable_cid(2, 1))).0, "b");
}

#[test]
fn a_removed_backend_is_forgotten_and_its_flows_stay_open_for_returns() {
    let mut bench = Bench::new(true);
    let (_, _, flow) = bench.forwarded(1, &short(&routable_cid(1, 1)));
    bench.reload(|config| drop(config.pools[0].backends.remove(0)), true);
    assert_ne!(bench.forwarded(1, &short(&routable_cid(1, 1))).0, "a");
    let _ = bench.forwarder.returned(bench.now, flow, &short(&[1; 8]));
    assert_eq!(bench.forwarder.flow(flow).path, path(1));
}

#[test]
fn a_backend_that_comes_back_has_its_old_number() {
    let mut bench = Bench::new(true);
    let number = |bench: &mut Bench| {
        let (_, _, flow) = bench.forwarded(1, &short(&routable_cid(3, 1)));
        bench.forwarder.flow(flow).backend
    };
    let before = number(&mut bench);
    bench.reload(|config| drop(config.pools[0].backends.pop()), true);
    bench.reload(|_| {}, true);
    assert_eq!(number(&mut bench), before);
}

/// A first flight, unlike those of other ports.
fn hello(port: u16) -> Vec<u8> {
    long(V1, &u64::from(port).to_be_bytes(), &port.to_be_bytes())
}

fn small(n: u32) -> u16 {
    u16::try_from(n).unwrap()
}

/// What a server answers first, and gives its connection ID with.
fn answer(port: u16, cid: &[u8]) -> Vec<u8> {
    long(V1, &port.to_be_bytes(), cid)
}

/// A stateless reset, as long as most servers make it.
const RESET: [u8; 43] = [0x41; 43];

/// Some path that no other number has, in a network of its own.
fn somewhere(n: u32) -> ClientPath {
    let [a, b, c, d] = n.to_be_bytes();
    ClientPath { client: ([11 + a, b, c, 1], 1024 + u16::from(d)).into(), local: None }
}

/// The connection ID that the server called `backend` gave to client number `n`.
fn cid_of(backend: &str, n: u32) -> Vec<u8> {
    let [_, a, b, c] = n.to_be_bytes();
    let server = server_id(backend.as_bytes()[0] - b'a' + 1);
    cid_config().encode(&server, &[1, 2, 3, a, b, c]).unwrap().to_vec()
}

impl Bench {
    /// What becomes of a datagram from somewhere.
    fn send_from(&mut self, path: ClientPath, octets: &[u8]) -> Verdict {
        let mut verdict = [Verdict::Drop(DropReason::Empty)];
        self.forwarder.decide_batch(self.now, EDGE, &[Datagram { path, octets }], &mut verdict);
        verdict[0]
    }

    /// The flow that a datagram from somewhere leaves by, if it is forwarded.
    fn flow_from(&mut self, path: ClientPath, octets: &[u8]) -> Option<FlowId> {
        match self.send_from(path, octets) {
            Verdict::Forward { via, .. } => via.flow(),
            Verdict::Reply(_) | Verdict::Drop(_) => None,
        }
    }

    fn answer(&mut self, flow: FlowId, octets: &[u8]) {
        assert_ne!(self.forwarder.returned(self.now, flow, octets), Returned::Stale);
    }

    fn backend_of(&self, flow: FlowId) -> String {
        let backend = self.forwarder.flow(flow).backend;
        self.forwarder.routing.backend(backend).unwrap().name.to_string()
    }

    /// A handshake until the client has used the connection ID of its server.
    fn establish(&mut self, port: u16) -> FlowId {
        let (backend, _, flow) = self.forwarded(port, &hello(port));
        let cid = cid_of(&backend, port.into());
        self.answer(flow, &answer(port, &cid));
        let (_, _, again) = self.forwarded(port, &short(&cid));
        assert_eq!(again, flow);
        assert!(self.is_proven(flow));
        flow
    }

    fn is_proven(&self, flow: FlowId) -> bool {
        self.forwarder.flows.standing(flow) == Some(Standing::Proven)
    }

    fn later(&mut self) {
        self.now += Duration::from_millis(1);
    }
}

#[test]
fn datagrams_that_are_not_quic_are_dropped_by_name() {
    let mut bench = Bench::new(true);
    assert_eq!(bench.send(1, &[]), Verdict::Drop(DropReason::Empty));
    assert_eq!(bench.send(1, &[0xc0, 0, 0, 0, 1, 9]), Verdict::Drop(DropReason::Malformed));
    assert_eq!(bench.forwarder.flow_count(), 0);
}

#[test]
fn explain_says_what_the_packet_path_does_and_changes_nothing() {
    let mut bench = Bench::new(true);
    let hello = long(V1, b"client drawn", b"client");
    let datagram = Datagram { path: path(1), octets: &hello };
    let explained = bench.forwarder.explain(bench.now, EDGE, &datagram);
    assert_eq!(explained.known.len(), 4);
    assert_eq!(explained.choice.as_ref().map(|step| step.rule), Some(Rule::Fallback));
    assert_eq!(bench.forwarder.flow_count(), 0);
    let (_, rule, flow) = bench.forwarded(1, &hello);
    let backend = bench.forwarder.flow(flow).backend;
    assert_eq!(explained.outcome, Outcome::Forward { backend, rule, retry: false });
    let explained = bench.forwarder.explain(bench.now, EDGE, &datagram);
    assert_eq!(explained.known.last().map(|step| step.rule), Some(Rule::FourTupleScid));
    assert!(explained.choice.is_none());
}

#[test]
fn explain_says_what_each_rule_saw() {
    let mut bench = Bench::new(true);
    let (hello, cid) = (long(V1, b"client drawn", b"client"), [0xee; 9]);
    let (_, _, flow) = bench.forwarded(1, &hello);
    bench.answer(flow, &long(V1, b"client", &cid));
    let says = |port, octets: &[u8]| -> Vec<String> {
        let datagram = Datagram { path: path(port), octets };
        let explained = bench.forwarder.explain(bench.now, EDGE, &datagram);
        explained.known.into_iter().chain(explained.choice).map(|step| step.finding).collect()
    };
    let contain = |findings: &[String], parts: &[&str]| {
        assert_eq!(findings.len(), parts.len(), "{findings:?}");
        for (finding, part) in findings.iter().zip(parts) {
            assert!(finding.contains(part), "{findings:?}");
        }
    };
    contain(&says(1, &short(&routable_cid(1, 1))), &["server ID 0001"]);
    contain(&says(1, &hello), &["no configuration", "are remembered"]);
    let stranger = ["no configuration", "not remembered", "no server was seen", "not remembered"];
    contain(&says(9, &hello), &[&stranger[..], &["hashed the destination"]].concat());
    contain(&says(9, &short(&cid)), &["0b111", "short header", "a server was seen"]);
    let unknown = ["0b111", "short header", "no server was seen", "4-tuple is remembered"];
    contain(&says(1, &short(&[0xff; 8])), &unknown);
    let second = long(V1, b"another one", b"another");
    let findings = says(1, &second);
    contain(&findings[3..4], &["does not bind"]);
}

/// Two listeners: `edge` in front of the pools `web` and `api`, `inner` in front of `api` alone.
/// The connection IDs of `web` have configuration 0, those of `api` 1, if they are routable.
fn two_pools(routable: bool) -> Bench {
    let mut bench = Bench::new(routable);
    let mut config = fixtures::config(routable);
    let mut api = config.pools[0].clone();
    api.name = "api".into();
    for (n, backend) in (4..).zip(&mut api.backends) {
        backend.name = ["d", "e", "f"][n - 4].into();
        backend.address.set_port(5000 + u16::try_from(n).unwrap());
        for (config, _) in &mut backend.server_ids {
            *config = api_config().id();
        }
    }
    if routable {
        api.cid_configs = vec![api_config()];
    }
    config.pools.push(api);
    let mut inner = config.listeners[0].clone();
    inner.name = "inner".into();
    config.listeners.push(inner);
    let behind = |listener: &quic_lb_config::Listener| match listener.name.as_str() {
        "edge" => vec![PoolIndex(0), PoolIndex(1)],
        _ => vec![PoolIndex(1)],
    };
    let state = |_: &str, _: &str| BackendState::Active;
    let routing = Routing::behind(&config, behind, &mut bench.registry, state);
    bench.forwarder.set_routing(Arc::new(routing));
    bench
}

/// How `api` makes connection IDs: another configuration, with other lengths.
fn api_config() -> CidConfig {
    CidConfig::new(ConfigId::new(1).unwrap(), 2, 9, Some(&Key::new([8; 16]))).unwrap()
}

#[test]
fn a_listener_reads_the_connection_ids_of_every_pool_behind_it() {
    let mut bench = two_pools(true);
    for (server, web, api) in [(1, "a", "d"), (2, "b", "e"), (3, "c", "f")] {
        let of_web = short(&routable_cid(server, 5));
        let cid = api_config().encode(&server_id(server), &[5; 9]).unwrap();
        let of_api = short(&cid);
        assert_eq!(bench.forwarded(1, &of_web).1, Rule::Cid);
        assert_eq!(bench.forwarded(1, &of_web).0, web);
        assert_eq!(bench.forwarded(1, &of_api).1, Rule::Cid);
        assert_eq!(bench.forwarded(1, &of_api).0, api);
        // A listener in front of one of them reads that one's alone.
        let (backend, rule, _) = bench.forwarded_on(INNER, 1, &of_api);
        assert_eq!((backend.as_str(), rule), (api, Rule::Cid));
        assert_ne!(bench.forwarded_on(INNER, 1, &of_web).1, Rule::Cid);
    }
}

#[test]
fn what_is_learnt_of_a_pool_holds_on_every_listener_in_front_of_it() {
    for routable in [true, false] {
        let mut bench = two_pools(routable);
        let hello = long(V1, b"client drawn", b"client");
        // 0xff: no configuration has these bits.
        let (of_web, of_api) = ([0xff; 11], [0xfe; 12]);
        let (web, rule, flow) = bench.forwarded_on(EDGE, 1, &hello);
        assert_eq!(rule, Rule::Fallback);
        assert!("abc".contains(&*web), "the first pool gets what nobody is known for");
        let _ = bench.forwarder.returned(bench.now, flow, &long(V1, b"client", &of_web));
        let (api, _, flow) = bench.forwarded_on(INNER, 2, &hello);
        assert!("def".contains(&*api));
        let _ = bench.forwarder.returned(bench.now, flow, &long(V1, b"client", &of_api));

        let (backend, rule, _) = bench.forwarded_on(EDGE, 3, &short(&of_web));
        assert_eq!((backend, rule), (web.clone(), Rule::Dcid));
        for listener in [EDGE, INNER] {
            let (backend, rule, _) = bench.forwarded_on(listener, 4, &short(&of_api));
            assert_eq!((backend, rule), (api.clone(), Rule::Dcid));
        }
        // A connection ID is learnt for the pool of the server that uses it, whichever pool the
        // listener sends strangers to.
        let (_, _, flow) = bench.forwarded_on(EDGE, 4, &long(V1, &of_api, b"client"));
        let another = [0xfd; 10];
        let _ = bench.forwarder.returned(bench.now, flow, &long(V1, b"client", &another));
        let (backend, rule, _) = bench.forwarded_on(INNER, 6, &short(&another));
        assert_eq!((backend, rule), (api, Rule::Dcid));
        // What was learnt of a pool means nothing to a listener that does not lead there.
        assert_ne!(bench.forwarded_on(INNER, 5, &short(&of_web)).1, Rule::Dcid);
    }
}

/// Everything that a forwarder has and remembers, down to when each entry was used last.
fn dump(bench: &Bench) -> String {
    format!("{:?}", bench.forwarder)
}

#[test]
fn explain_prolongs_nothing_in_any_table() {
    for routable in [true, false] {
        let mut bench = Bench::new(routable);
        let change = |config: &mut quic_lb_config::Config| {
            config.limits.new_connections.total = 1000.try_into().ok();
        };
        bench.reload(change, routable);
        let cid = [0xee; 9];
        let (_, _, flow) = bench.forwarded(1, &long(V1, b"client drawn", b"client"));
        let _ = bench.forwarder.returned(bench.now, flow, &long(V1, b"client", &cid));
        bench.forwarded(2, &short(&routable_cid(1, 1)));
        bench.now += Duration::from_secs(2);
        let datagrams = [
            (1, long(V1, b"client drawn", b"client"), Rule::FourTupleScid),
            (1, long(V1, &cid, b"client"), Rule::Dcid),
            (9, long(V1, &cid, b"client"), Rule::Dcid),
            (9, short(&cid), Rule::Dcid),
            (1, short(&[0xff; 8]), Rule::FourTuple),
            (3, long(V1, b"another one", b"another"), Rule::Fallback),
            (3, short(&[0xff; 8]), Rule::Fallback),
        ];
        let before = dump(&bench);
        for (port, octets, expected) in &datagrams {
            let datagram = Datagram { path: path(*port), octets };
            match bench.forwarder.explain(bench.now, EDGE, &datagram).outcome {
                Outcome::Forward { rule, .. } => assert_eq!(rule, *expected),
                outcome => panic!("{outcome:?}"),
            }
            assert!(dump(&bench) == before, "changed by {expected:?}");
        }
        // The dump shows what deciding changes.
        for (port, octets, _) in &datagrams {
            let before = dump(&bench);
            bench.send(*port, octets);
            assert_ne!(dump(&bench), before);
            bench.now += Duration::from_secs(1);
        }
    }
}

#[test]
fn hashes_are_keyed_by_the_seed_alone() {
    let now = Instant::now();
    let state = |seed: u8| {
        let memory = Arc::new(Memory::new(100, now, [seed.into(); 4]));
        let mut registry = Registry::default();
        let config = fixtures::config(true);
        let routing = Routing::new(&config, &mut registry, |_, _| BackendState::Active);
        let start = Start { clock: Clock { now, unix: UNIX_EPOCH }, seed: [seed; 32] };
        let mut forwarder = Forwarder::new(50, Arc::new(routing), memory, &start);
        let octets = hello(1);
        let mut verdict = [Verdict::Drop(DropReason::Empty)];
        let datagram = Datagram { path: path(1), octets: &octets };
        forwarder.decide_batch(now, EDGE, &[datagram], &mut verdict);
        // Keys of the memory are hashes.
        (forwarder.flows.hash().hash_one(b"client"), format!("{:?}", forwarder.memory))
    };
    assert_eq!(state(1), state(1));
    let (one, other) = (state(1), state(2));
    assert_ne!(one.0, other.0);
    assert_ne!(one.1, other.1);
}

#[test]
fn a_pool_that_is_forwarded_to_directly_needs_no_flow_for_rule_4() {
    let mut bench = Bench::with_flows(false, 20);
    let mut routing =
        Routing::new(&fixtures::config(false), &mut bench.registry, |_, _| BackendState::Active);
    routing.set_forwarding(PoolIndex(0), Forwarding::Direct);
    bench.forwarder.set_routing(Arc::new(routing));
    let direct = |bench: &mut Bench, port, octets: &[u8]| match bench.send(port, octets) {
        Verdict::Forward { backend, rule, via: Via::Direct } => (backend, rule),
        other => panic!("{other:?}"),
    };
    let (backend, rule) = direct(&mut bench, 1, &hello(1));
    assert_eq!(rule, Rule::Fallback);
    for _ in 0..4 {
        bench.now += Duration::from_secs(100);
        (0..16).for_each(|_| bench.forwarder.sweep(bench.now, &mut Vec::new()));
        assert_eq!(direct(&mut bench, 1, &short(&[0xff; 8])), (backend, Rule::FourTuple));
    }
    assert_eq!(bench.forwarder.flow_count(), 0);
    // The table is bounded: forwarding goes on, by rule 5.
    for port in 2..100 {
        direct(&mut bench, port, &hello(port));
    }
    assert_eq!(bench.forwarder.affinity.len(), 20);
    assert_eq!(direct(&mut bench, 1, &short(&[0xff; 8])), (backend, Rule::FourTuple));
    assert_eq!(direct(&mut bench, 99, &short(&[0xff; 8])).1, Rule::Fallback);
    // What nobody uses is forgotten.
    bench.now += Duration::from_secs(182);
    (0..16).for_each(|_| bench.forwarder.sweep(bench.now, &mut Vec::new()));
    assert_eq!(bench.forwarder.affinity.len(), 0);
}

proptest! {
    /// Whatever arrives: no panic, one verdict each, flows within bounds, and what is routable
    /// goes where it says, in the middle of it all.
    #[test]
    fn any_datagrams_leave_routable_ones_alone(
        noise in proptest::collection::vec((1u16..50, proptest::collection::vec(any::<u8>(), 0..80)), 0..64),
        server in 1u8..=3,
    ) {
        let mut bench = Bench::with_flows(true, 64);
        for (port, octets) in &noise {
            bench.send(*port, octets);
            prop_assert!(bench.forwarder.flow_count() <= 64);
        }
        let name = ["a", "b", "c"][usize::from(server) - 1];
        prop_assert_eq!(bench.forwarded(7, &short(&routable_cid(server, 1))).0, name);
    }

    #[test]
    fn a_batch_decides_as_one_by_one(
        datagrams in proptest::collection::vec((1u16..4, proptest::collection::vec(any::<u8>(), 0..40)), 1..BATCH),
    ) {
        let (mut batched, mut single) = (Bench::new(true), Bench::new(true));
        let batch: Vec<_> = datagrams
            .iter()
            .map(|(port, octets)| Datagram { path: path(*port), octets })
            .collect();
        let mut verdicts = vec![Verdict::Drop(DropReason::Empty); batch.len()];
        batched.forwarder.decide_batch(batched.now, EDGE, &batch, &mut verdicts);
        for ((port, octets), verdict) in datagrams.iter().zip(verdicts) {
            prop_assert_eq!(single.send(*port, octets), verdict);
        }
    }
}
