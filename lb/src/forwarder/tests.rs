//! The rules, admission and flows through the forwarder's face.

use std::time::{Duration, UNIX_EPOCH};

use proptest::prelude::*;
use quic::routable::{CidConfig, ConfigId, Key};

use super::*;
use crate::{
    backend::{BackendState, PoolIndex},
    client_path::ClientPath,
    fixtures::{self, cid_config, server_id},
    registry::Registry,
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
                (name.clone(), rule, flow)
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
fn rule_3_cids_of_servers_without_routable_ones_are_learnt_and_survive_a_rebinding() {
    for routable in [false, true] {
        let mut bench = Bench::new(routable);
        let (backend, _, flow) = bench.forwarded(7, &long(V1, b"client drawn", b"client"));
        // 0xff: no configuration has these bits.
        let cid = [0xff; 11];
        bench.forwarder.returned(bench.now, flow, &long(V1, b"client", &cid));
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
    bench.forwarder.returned(bench.now, flow, &long(V1, b"client", &routable_cid(server, 1)));
    assert_eq!(bench.memory.sizes().connection_ids, 0);
    // One that decodes to somebody else would lead packets astray only if it were not learnt,
    // and rule 1 goes first in any case.
    let other = server % 3 + 1;
    bench.forwarder.returned(bench.now, flow, &long(V1, b"client", &routable_cid(other, 1)));
    assert_eq!(bench.memory.sizes().connection_ids, 1);
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
    let Verdict::Forward { via: Via::NewFlow(Opened { flow, evicted, opening }), .. } =
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
    bench.forwarder.returned(bench.now, flow, &long(V1, b"client", &cid));
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
    for state in [BackendState::Draining, BackendState::Down] {
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
    bench.forwarder.returned(bench.now, flow, &short(&[1; 8]));
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

impl Bench {
    /// A handshake until the client has answered the server.
    fn establish(&mut self, port: u16) -> FlowId {
        let (_, _, flow) = self.forwarded(port, &hello(port));
        self.forwarder.returned(self.now, flow, &short(&[1; 8]));
        let (_, _, again) = self.forwarded(port, &hello(port));
        assert_eq!(again, flow);
        flow
    }

    fn later(&mut self) {
        self.now += Duration::from_millis(1);
    }
}

#[test]
fn at_the_limit_new_undecodable_traffic_is_refused_and_the_rest_goes_on() {
    let mut bench = Bench::with_flows(true, 80);
    for port in 1..=70 {
        bench.establish(port);
    }
    bench.later();
    assert_eq!(bench.send(71, &hello(71)), Verdict::Drop(DropReason::FlowLimit));
    for port in 1..=70 {
        bench.forwarded(port, &hello(port));
    }
    // A connection that changes its path is not new: it may use the reserve.
    for port in 100..110 {
        bench.forwarded(port, &short(&routable_cid(1, 1)));
    }
    assert_eq!(bench.send(110, &short(&routable_cid(1, 1))), Verdict::Drop(DropReason::FlowLimit));
}

#[test]
fn at_the_limit_the_oldest_half_open_flow_makes_room() {
    let mut bench = Bench::with_flows(true, 80);
    let established = bench.establish(1);
    let unanswered = bench.forwarded(2, &hello(2)).2;
    let answered = bench.forwarded(3, &hello(3)).2;
    bench.forwarder.returned(bench.now, answered, &short(&[1; 8]));
    for port in 4..=70 {
        bench.forwarded(port, &hello(port));
    }
    // Nothing that was started in the same round, since its socket is still to be opened.
    assert_eq!(bench.send(71, &hello(71)), Verdict::Drop(DropReason::FlowLimit));
    bench.later();
    // They have the numbers of those that they follow.
    assert_eq!(bench.forwarded(71, &hello(71)).2, unanswered);
    assert_eq!(bench.forwarded(72, &hello(72)).2, answered);
    assert_eq!(bench.forwarder.flow_count(), 70);
    // However many come, the established one stays.
    for port in 1000..2000 {
        bench.later();
        bench.forwarded(port, &hello(port));
    }
    assert_eq!(bench.forwarded(1, &hello(1)).2, established);
    // A connection on a new path takes the reserve first.
    for port in 100..110 {
        bench.forwarded(port, &short(&routable_cid(1, 1)));
    }
    assert_eq!(bench.forwarder.flow_count(), 80);
    bench.later();
    bench.forwarded(110, &short(&routable_cid(1, 1)));
    assert_eq!(bench.forwarder.flow_count(), 80);
}

#[test]
fn a_flow_without_a_port_takes_one_of_a_half_open_flow_with_its_backend() {
    let mut bench = Bench::new(true);
    bench.establish(1);
    let old: Vec<_> = (2..10).map(|port| bench.forwarded(port, &hello(port)).2).collect();
    let backend = |bench: &Bench, flow| bench.forwarder.flow(flow).backend;
    bench.later();
    let (_, _, new) = bench.forwarded(10, &hello(10));
    let alike: Vec<_> =
        old.into_iter().filter(|&flow| backend(&bench, flow) == backend(&bench, new)).collect();
    let (now, count) = (bench.now, bench.forwarder.flow_count());
    // The oldest of them makes room once; then the new one is given up.
    let why = DropReason::PortsExhausted;
    let failed = |bench: &mut Bench| bench.forwarder.flow_failed(now, new, why);
    assert_eq!(failed(&mut bench), OnFailure::RetryAfter(alike[0]));
    assert_eq!(failed(&mut bench), OnFailure::Drop(why));
    assert_eq!(bench.forwarder.flow_count(), count - 2);
    // Other failures are not for want of room.
    let (_, _, new) = bench.forwarded(11, &hello(11));
    let failed = bench.forwarder.flow_failed(now, new, DropReason::SendFailed);
    assert_eq!(failed, OnFailure::Drop(DropReason::SendFailed));
}

#[test]
fn flows_end_when_unused_and_sooner_when_never_answered() {
    let mut bench = Bench::new(true);
    let (_, _, answered) = bench.forwarded(1, &short(&routable_cid(1, 1)));
    let (_, _, unanswered) = bench.forwarded(2, &short(&routable_cid(1, 1)));
    bench.forwarder.returned(bench.now, answered, &short(&[1; 8]));
    let mut sweep = |after: u64| {
        let mut expired = Vec::new();
        let now = bench.now + Duration::from_secs(after);
        (0..16).for_each(|_| bench.forwarder.sweep(now, &mut expired));
        expired
    };
    assert_eq!(sweep(10), []);
    assert_eq!(sweep(11), [unanswered]);
    assert_eq!(sweep(180), []);
    assert_eq!(sweep(181), [answered]);
    assert_eq!(bench.forwarder.flow_count(), 0);
}

#[test]
fn a_reload_with_shorter_timeouts_ends_flows_and_forgets_what_was_learnt() {
    let mut bench = Bench::new(false);
    let cid = [0xee; 9];
    let (backend, _, answered) = bench.forwarded(1, &hello(1));
    bench.forwarder.returned(bench.now, answered, &long(V1, b"client", &cid));
    let (_, _, unanswered) = bench.forwarded(2, &hello(2));
    bench.now += Duration::from_secs(6);
    let sweep = |bench: &mut Bench| {
        let mut expired = Vec::new();
        (0..16).for_each(|_| bench.forwarder.sweep(bench.now, &mut expired));
        bench.memory.sweep(bench.now, &bench.forwarder.routing.lifetimes);
        expired
    };
    assert_eq!(sweep(&mut bench), []);
    assert_eq!(bench.memory.sizes().connection_ids, 1);

    bench.reload(|config| config.timeouts.flow_unanswered = Duration::from_secs(5), false);
    assert_eq!(sweep(&mut bench), [unanswered]);
    // From an address that nothing is remembered of, so that the connection ID alone tells.
    assert_eq!(bench.forwarded(3, &short(&cid)).1, Rule::Dcid);

    bench.now += Duration::from_secs(6);
    bench.reload(|config| config.timeouts.flow_idle = Duration::from_secs(5), false);
    assert_ne!(bench.forwarded(4, &short(&cid)).1, Rule::Dcid, "{backend} is not remembered");
    assert!(sweep(&mut bench).contains(&answered));
    assert_eq!(bench.memory.sizes().connection_ids, 0);
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
        bench.forwarder.returned(bench.now, flow, &long(V1, b"client", &of_web));
        let (api, _, flow) = bench.forwarded_on(INNER, 2, &hello);
        assert!("def".contains(&*api));
        bench.forwarder.returned(bench.now, flow, &long(V1, b"client", &of_api));

        let (backend, rule, _) = bench.forwarded_on(EDGE, 3, &short(&of_web));
        assert_eq!((backend, rule), (web.clone(), Rule::Dcid));
        for listener in [EDGE, INNER] {
            let (backend, rule, _) = bench.forwarded_on(listener, 4, &short(&of_api));
            assert_eq!((backend, rule), (api.clone(), Rule::Dcid));
        }
        // A connection ID is learnt for the pool of the server that uses it, whichever pool the
        // listener sends strangers to.
        let (_, _, flow) = bench.forwarded_on(EDGE, 4, &short(&of_api));
        let another = [0xfd; 10];
        bench.forwarder.returned(bench.now, flow, &long(V1, b"client", &another));
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
        bench.forwarder.returned(bench.now, flow, &long(V1, b"client", &cid));
        bench.forwarded(2, &short(&routable_cid(1, 1)));
        bench.now += Duration::from_secs(2);
        let datagrams = [
            (1, long(V1, b"client drawn", b"client"), Rule::FourTupleScid),
            (1, long(V1, &cid, b"client"), Rule::FourTupleScid),
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
        (forwarder.hash.hash_one(b"client"), format!("{:?}", forwarder.memory))
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
