//! The table of the module's documentation, row by row, through the forwarder.

use std::time::{Duration, UNIX_EPOCH};

use quic::{
    header::Version,
    initial::{Initial, Refusal, is_authentic},
    retry,
    routable::ServerId,
    token::{TokenKey, shared_state},
};
use quic_lb_config::{Admittance, NewConnections, TokenFormat};

use std::net::SocketAddr;

use super::*;
use crate::{
    client_path::{ClientAddr, ClientPath, ListenerIndex},
    fixtures::{self, cid_config, client_initial, initial, sealed_initial, server_id, written},
    forwarder::{Clock, Datagram, Forwarder, Outcome, Returned, Start},
    memory::Memory,
    registry::Registry,
    routing::Routing,
    verdict::{ReplyKind, Verdict},
};

const DCID: &[u8] = b"client drew this";
const SCID: &[u8] = b"client";
const PORT: u16 = 50_001;
/// The usual port of another address.
const ELSEWHERE: ([u8; 4], u16) = ([192, 0, 2, 9], PORT);

/// A forwarder whose phase can be set, and the clock it lives by.
struct Bench {
    config: Config,
    registry: Registry,
    forwarder: Forwarder,
    now: Instant,
}

fn key() -> TokenKey {
    TokenKey::new(3, [9; 16], [0; 12]).unwrap()
}

impl Bench {
    fn new(change: impl FnOnce(&mut Config)) -> Self {
        let mut config = fixtures::config(true);
        config.retry.mode = RetryMode::Adaptive;
        config.retry.keys = vec![key()];
        change(&mut config);
        let now = Instant::now();
        let mut registry = Registry::default();
        let routing = Routing::new(&config, &mut registry, |_, _| Default::default());
        let memory = Arc::new(Memory::new(1000, now, [5; 4]));
        let clock = Clock { now, unix: UNIX_EPOCH + Duration::from_secs(1_000_000) };
        let start = Start { clock, seed: [1; 32] };
        let forwarder = Forwarder::new(800, Arc::new(routing), memory, &start);
        Self { config, registry, forwarder, now }
    }

    fn in_phase(phase: &str) -> Self {
        let mut bench = Self::new(|_| {});
        bench.set_phase(phase);
        bench
    }

    fn set_phase(&mut self, phase: &str) {
        let phase = match phase {
            "inactive" => Phase::Inactive,
            "transition" => Phase::Transition { until: self.now + Duration::from_millis(200) },
            _ => Phase::Active,
        };
        self.registry.admission.set_phase(0, phase);
        let routing = Routing::new(&self.config, &mut self.registry, |_, _| Default::default());
        self.forwarder.set_routing(Arc::new(routing));
    }

    /// The verdict, in a word, and the Retry if there is one.
    fn send(&mut self, port: u16, octets: &[u8]) -> (&'static str, Option<Vec<u8>>) {
        let client = SocketAddr::from(([192, 0, 2, 1], port));
        self.send_from(client, octets)
    }

    fn send_from(&mut self, client: SocketAddr, octets: &[u8]) -> (&'static str, Option<Vec<u8>>) {
        let datagram =
            Datagram { path: ClientPath { client: ClientAddr(client), local: None }, octets };
        let explained = self.forwarder.explain(self.now, ListenerIndex(0), &datagram).outcome;
        let mut verdicts = [Verdict::Drop(DropReason::Empty)];
        self.forwarder.decide_batch(self.now, ListenerIndex(0), &[datagram], &mut verdicts);
        let reply = self.forwarder.replies().next().map(|reply| reply.octets.to_vec());
        assert!(self.forwarder.replies().count() <= 1);
        assert!(reply.as_ref().is_none_or(|reply| reply.len() <= octets.len()));
        let word = match (verdicts[0], explained) {
            (Verdict::Forward { .. }, Outcome::Forward { retry, .. }) => {
                assert_eq!(retry, reply.is_some());
                "forward"
            }
            (Verdict::Reply(ReplyKind::Retry), Outcome::Reply(ReplyKind::Retry)) => "reply",
            (Verdict::Reply(ReplyKind::InvalidToken), Outcome::Reply(ReplyKind::InvalidToken)) => {
                "refused"
            }
            (Verdict::Drop(reason), Outcome::Drop(explained)) => {
                assert_eq!(reason, explained);
                reason.label()
            }
            (verdict, explained) => panic!("{verdict:?}, explained as {explained:?}"),
        };
        (word, reply)
    }

    /// As [`Self::send`], from another address.
    fn send_from_elsewhere(&mut self, octets: &[u8]) -> (&'static str, Option<Vec<u8>>) {
        self.send_from(ELSEWHERE.into(), octets)
    }

    /// As [`Self::send`], of an Initial from the usual port.
    fn initial(&mut self, dcid: &[u8], token: &[u8]) -> (&'static str, Option<Vec<u8>>) {
        self.send(PORT, &initial(Version::V1, dcid, SCID, token))
    }

    /// Gets a Retry and says what to send next: connection ID and token.
    fn retried(&mut self, port: u16, scid: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let (_, reply) = self.send(port, &initial(Version::V1, DCID, scid, &[]));
        read(&reply.expect("a Retry"))
    }

    fn pass(&mut self, milliseconds: u64) {
        self.now += Duration::from_millis(milliseconds);
    }

    fn tokens(&self, result: TokenResult) -> u64 {
        self.forwarder.tally().tokens[result as usize]
    }
}

fn read(retry: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let Ok(Packet::Long(header)) = Packet::read(retry) else { panic!("a long header") };
    (header.scid.to_vec(), header.rest[..header.rest.len() - retry::TAG_LEN].to_vec())
}

fn server_cid(server: u8) -> Vec<u8> {
    cid_config().encode(&server_id(server), &[5; 6]).unwrap().to_vec()
}

/// A long header of `kind` with 1,200 octets.
fn long(kind: LongType, dcid: &[u8], scid: &[u8]) -> Vec<u8> {
    let mut octets = initial(Version::V1, dcid, scid, &[]);
    octets[0] = 0xc0 | kind.to_first_octet(Version::V1);
    octets
}

fn short(dcid: &[u8]) -> Vec<u8> {
    [&[0x40], dcid, &[7; 40]].concat()
}

#[test]
fn an_initial_without_token_meets_what_the_phase_says() {
    for (phase, word, retry) in
        [("inactive", "forward", false), ("transition", "forward", true), ("active", "reply", true)]
    {
        let mut bench = Bench::in_phase(phase);
        // Again and again, and also its second half, which is another datagram.
        for _ in 0..3 {
            let (got, reply) = bench.initial(DCID, &[]);
            assert_eq!((got, reply.is_some()), (word, retry), "{phase}");
        }
    }
}

#[test]
fn a_retry_is_for_its_client_and_of_its_version() {
    for version in [Version::V1, Version::V2] {
        let mut bench = Bench::in_phase("active");
        let hello = initial(version, DCID, SCID, &[]);
        let (_, reply) = bench.send(PORT, &hello);
        let reply = reply.unwrap();
        assert!(retry::verify(version, DCID, &reply));
        let Ok(Packet::Long(header)) = Packet::read(&reply) else { panic!("a long header") };
        assert_eq!(header.dcid, SCID);
        assert_ne!(header.scid, DCID);
    }
}

#[test]
fn a_valid_token_is_forwarded_in_every_phase_and_nothing_is_kept_before_it() {
    for phase in ["inactive", "transition", "active"] {
        let mut bench = Bench::in_phase("active");
        let flows = |bench: &Bench| bench.forwarder.flow_count();
        let (dcid, token) = bench.retried(PORT, SCID);
        assert_eq!(flows(&bench), 0);
        bench.set_phase(phase);
        assert_eq!(bench.initial(&dcid, &token), ("forward", None));
        assert_eq!(bench.tokens(TokenResult::Valid), 1);
        assert_eq!(flows(&bench), 1);
        // Its second datagram, and its repetition.
        assert_eq!(bench.initial(&dcid, &token), ("forward", None));
        assert_eq!(flows(&bench), 1);
    }
}

#[test]
fn the_initial_after_a_retry_reaches_the_same_backend_through_any_balancer() {
    let (mut one, mut other) = (Bench::in_phase("active"), Bench::in_phase("active"));
    for port in 50_000..50_100 {
        let (dcid, token) = one.retried(port, SCID);
        let backend = |bench: &mut Bench| {
            let octets = initial(Version::V1, &dcid, SCID, &token);
            let client = SocketAddr::from(([192, 0, 2, 1], port));
            let datagram = Datagram {
                path: ClientPath { client: ClientAddr(client), local: None },
                octets: &octets,
            };
            match bench.forwarder.explain(bench.now, ListenerIndex(0), &datagram).outcome {
                Outcome::Forward { backend, rule, retry: false } => (backend, rule),
                outcome => panic!("{outcome:?}"),
            }
        };
        assert_eq!(backend(&mut one), backend(&mut other));
    }
}

#[test]
fn an_invalid_retry_token_reaches_no_server_and_is_counted_by_reason() {
    for phase in ["inactive", "transition", "active"] {
        let mut bench = Bench::in_phase("active");
        let (dcid, token) = bench.retried(PORT, SCID);
        bench.set_phase(phase);
        let at_home = ([192, 0, 2, 1], PORT);
        let mut refused = |from: ([u8; 4], u16), dcid: &[u8], token: &[u8], result: TokenResult| {
            let octets = initial(Version::V1, dcid, b"other", token);
            let sent = bench.send_from(from.into(), &octets);
            assert_eq!(sent, ("invalid_token", None), "{phase} {result:?}");
            assert_eq!(bench.tokens(result), 1, "{phase} {result:?}");
        };
        refused(ELSEWHERE, &dcid, &token, TokenResult::Address);
        refused(at_home, DCID, &token, TokenResult::Seal);
        refused(at_home, &dcid, &token[..token.len() - 1], TokenResult::Truncated);
        refused(at_home, &dcid, &token[..1], TokenResult::Truncated);
        let length = [&[7][..], &token[1..]].concat();
        refused(at_home, &dcid, &length, TokenResult::OriginalDcidLength);
        for bit in 0..token.len() * 8 {
            let mut flipped = token.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let (word, reply) = bench.initial(&dcid, &flipped);
            // The first bit makes it a token of a NEW_TOKEN frame, which is no forgery of a Retry's.
            match (bit, phase) {
                (7, "inactive") => assert_eq!(word, "forward"),
                (7, "transition") => assert_eq!((word, reply.is_some()), ("forward", true)),
                (7, _) => assert_eq!((word, reply.is_some()), ("reply", true)),
                _ => assert_eq!((word, reply), ("invalid_token", None), "{phase}, bit {bit}"),
            }
        }
        bench.pass(12_000);
        assert_eq!(bench.initial(&dcid, &token).0, "forward", "{phase}: skew of clocks");
        bench.pass(1_000);
        let (word, reply) = bench.initial(&dcid, &token);
        assert_eq!((word, reply), ("invalid_token", None));
        assert_eq!(bench.tokens(TokenResult::Expired), 1);
    }
}

#[test]
fn a_client_with_an_invalid_token_is_told_so_in_both_versions() {
    for phase in ["inactive", "transition", "active"] {
        for version in [Version::V1, Version::V2] {
            let mut bench = Bench::in_phase("active");
            let (dcid, token) = bench.retried(PORT, SCID);
            bench.set_phase(phase);
            let second = sealed_initial(version, &dcid, SCID, &token);
            let (word, reply) = bench.send_from_elsewhere(&second);
            assert_eq!(word, "refused", "{phase}");
            assert_eq!(bench.tokens(TokenResult::Address), 1);
            let reply = reply.unwrap();
            assert!(reply.len() <= Refusal::MAX_LEN && !is_authentic(&reply), "a server's");
            let Ok(Packet::Long(header)) = Packet::read(&reply) else { panic!("a long header") };
            assert_eq!(header.kind(), Kind::Known(version, LongType::Initial));
            assert_eq!(header.dcid, SCID);
            assert_eq!(header.scid[0] >> 5, 0b111, "it decodes to no server");
            // What the client says to it, if anything, is answered by nothing.
            let last =
                Initial { dcid: header.scid, ..client_initial(version, &dcid, SCID, &token) };
            assert_eq!(bench.send_from_elsewhere(&written(&last)), ("invalid_token", None));
            assert_eq!(bench.forwarder.flow_count(), 0);
            assert_eq!(bench.send(PORT, &second).0, "forward", "it is good where it belongs");
        }
    }
}

/// It is no attempt of a client; one that sees its own Initial changed on the way repeats it.
#[test]
fn an_initial_that_was_changed_on_the_way_is_dropped_and_nobody_is_told() {
    let mut bench = Bench::in_phase("active");
    let (dcid, token) = bench.retried(PORT, SCID);
    let second = sealed_initial(Version::V1, &dcid, SCID, &token);
    let token_at = second.windows(token.len()).position(|window| window == token).unwrap();
    for at in [token_at + token.len() - 1, token_at + token.len() + 100] {
        let mut changed = second.clone();
        changed[at] ^= 1;
        assert_eq!(bench.send_from_elsewhere(&changed), ("invalid_token", None));
    }
    // Nor is one that goes on with a handshake: it has a connection ID of its server, and the keys of another.
    let towards = b"of the server";
    let further = Initial { dcid: towards, ..client_initial(Version::V1, &dcid, SCID, &token) };
    assert_eq!(bench.send_from_elsewhere(&written(&further)), ("invalid_token", None));
    assert_eq!(bench.send(PORT, &second).0, "forward");
}

#[test]
fn invalid_tokens_are_answered_at_a_bounded_rate() {
    let mut bench = Bench::in_phase("active");
    let (dcid, token) = bench.retried(PORT, SCID);
    let second = sealed_initial(Version::V1, &dcid, SCID, &token);
    let told = |bench: &mut Bench| {
        let words = (0..2000).map(|_| bench.send_from_elsewhere(&second).0);
        words.filter(|word| *word == "refused").count()
    };
    assert_eq!(told(&mut bench), 100);
    bench.pass(10);
    assert_eq!(told(&mut bench), 10);
    bench.pass(60_000);
    let datagram =
        Datagram { path: ClientPath { client: ELSEWHERE.into(), local: None }, octets: &second };
    let explained = bench.forwarder.explain(bench.now, ListenerIndex(0), &datagram);
    let finding = explained.admission.unwrap().finding;
    assert_eq!(finding, "claims to be of a Retry: the token has expired; the client is told so");
    assert_eq!(told(&mut bench), 100, "to explain takes nothing of it");
}

/// Servers that have other keys, or another clock, refuse what the balancer found valid.
#[test]
fn what_begins_with_a_valid_token_and_comes_to_nothing_is_counted() {
    let mut bench = Bench::in_phase("active");
    let unfinished = |bench: &mut Bench| {
        bench.pass(11_000);
        (0..16).for_each(|_| bench.forwarder.sweep(bench.now, &mut Vec::new()));
        bench.forwarder.unfinished()
    };
    for (port, goes_on) in [(PORT, true), (PORT + 1, false), (PORT + 2, true)] {
        let (dcid, token) = bench.retried(port, SCID);
        let second = initial(Version::V1, &dcid, SCID, &token);
        assert_eq!(bench.send(port, &second).0, "forward");
        if goes_on {
            // Its server is one of them.
            for server in 1..=3 {
                assert_eq!(bench.send(port, &short(&server_cid(server))).0, "forward");
            }
        }
    }
    assert_eq!(bench.forwarder.unfinished(), 0, "there is time");
    assert_eq!(unfinished(&mut bench), 1);
    // Once, also when it ends.
    bench.pass(3_600_000);
    assert_eq!(unfinished(&mut bench), 1);
    assert_eq!(bench.forwarder.flow_count(), 0);
}

#[test]
fn a_clock_that_was_set_is_followed() {
    let mut bench = Bench::in_phase("active");
    let (dcid, token) = bench.retried(PORT, SCID);
    let hour = Duration::from_secs(3600);
    let unix = UNIX_EPOCH + Duration::from_secs(1_000_000) + hour;
    bench.forwarder.set_clock(Clock { now: bench.now, unix });
    assert_eq!(bench.initial(&dcid, &token).0, "invalid_token");
    // Made and checked by the same clock, tokens are good whatever it says.
    let (dcid, token) = bench.retried(PORT, b"again");
    assert_eq!(bench.send(PORT, &initial(Version::V1, &dcid, b"again", &token)).0, "forward");
}

#[test]
fn tokens_of_new_token_frames_spare_the_round_trip_to_their_address_alone() {
    for format in [TokenFormat::Nat, TokenFormat::SharedState] {
        let mut bench = Bench::new(|config| config.retry.format = format);
        bench.set_phase("active");
        let client = [192, 0, 2, 1].into();
        let later = UNIX_EPOCH + Duration::from_secs(1_000_060);
        let token = shared_state::seal_new_token(&key(), [4; 12], client, later).unwrap();
        assert_eq!(bench.initial(DCID, &token), ("forward", None));
        assert_eq!(bench.tokens(TokenResult::Valid), 1);
        let hello = initial(Version::V1, DCID, SCID, &token);
        let (word, reply) = bench.send_from("192.0.2.2:50001".parse().unwrap(), &hello);
        assert_eq!((word, reply.is_some()), ("reply", true));
        assert_eq!(bench.tokens(TokenResult::Seal), 1);
        bench.pass(63_000);
        assert_eq!(bench.initial(b"another connection", &token).0, "reply");
        assert_eq!(bench.tokens(TokenResult::Expired), 1);
    }
}

#[test]
fn what_goes_on_with_a_validated_handshake_needs_no_token_that_fits() {
    let mut bench = Bench::in_phase("active");
    let (dcid, token) = bench.retried(PORT, SCID);
    assert_eq!(bench.initial(&dcid, &token).0, "forward");
    // The server has answered with a connection ID of its own; the token stays what it was.
    for server in 1..=3 {
        assert_eq!(bench.initial(&server_cid(server), &token), ("forward", None));
        // An acknowledgement need not be large to belong to a connection.
        let small = &initial(Version::V1, &server_cid(server), SCID, &token)[..200];
        assert_eq!(bench.send(PORT, small), ("forward", None));
    }
    // Nor may another connection of the same client use the connection ID without one.
    let other = initial(Version::V1, &server_cid(1), b"other", &[]);
    assert_eq!(bench.send(PORT, &other).0, "reply");
}

/// A handshake whose client has proved its address, until its server has answered with a connection
/// ID of its own; that, and the token.
fn answered(bench: &mut Bench, scid: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let (dcid, token) = bench.retried(PORT, scid);
    let octets = initial(Version::V1, &dcid, scid, &token);
    let path = ClientPath { client: ([192, 0, 2, 1], PORT).into(), local: None };
    let mut verdicts = [Verdict::Drop(DropReason::Empty)];
    let datagram = Datagram { path, octets: &octets };
    bench.forwarder.decide_batch(bench.now, ListenerIndex(0), &[datagram], &mut verdicts);
    let [Verdict::Forward { backend, via, .. }] = verdicts else { panic!("not forwarded") };
    let cid = server_cid(u8::try_from(backend.slot()).unwrap() + 1);
    let reply = long(LongType::Handshake, scid, &cid);
    let returned = bench.forwarder.returned(bench.now, via.flow().unwrap(), &reply);
    assert_ne!(returned, Returned::Stale);
    (cid, token)
}

#[test]
fn a_client_that_moves_amid_its_handshake_goes_on_with_it() {
    for scid in [SCID, b""] {
        let mut bench = Bench::in_phase("active");
        let (cid, token) = answered(&mut bench, scid);
        // It repeats its Initial towards the server's connection ID; the token does not fit that, nor
        // any other address.
        for port in [PORT, PORT + 1, PORT + 2] {
            let moved = initial(Version::V1, &cid, scid, &token);
            assert_eq!(bench.send(port, &moved), ("forward", None), "{port}");
            assert_eq!(bench.send(port, &moved[..200]), ("forward", None), "an acknowledgement");
        }
        // That is no way around Retry for everybody: there is an end to it.
        let moved = |port: u16| initial(Version::V1, &cid, scid, &token[..usize::from(port % 2)]);
        let passed = (2_000..3_000).filter(|&port| bench.send(port, &moved(port)).0 == "forward");
        assert!(passed.count() <= 32 + 64);
    }
}

/// Before its token is back a client cannot be asked again: it accepts one Retry.
#[test]
fn a_client_whose_port_changes_after_the_retry_goes_on_within_a_bound() {
    let mut bench = Bench::in_phase("active");
    let (dcid, token) = bench.retried(PORT, SCID);
    let second = initial(Version::V1, &dcid, SCID, &token);
    // What it repeats is not counted again.
    for time in 0..100 {
        assert_eq!(bench.send(PORT + 1, &second), ("forward", None));
        assert_eq!(bench.tokens(TokenResult::Port), 1);
        assert_eq!(bench.forwarder.tally().attempts, u64::from(time == 0));
    }
    let passed = |bench: &mut Bench, ports: std::ops::Range<u16>| {
        ports.filter(|&port| bench.send(port, &second).0 == "forward").count()
    };
    assert_eq!(passed(&mut bench, 10_000..11_000), 63);
    assert_eq!(bench.send(PORT + 1, &second).0, "forward", "it is known");
    assert_eq!(bench.send(PORT, &second).0, "forward", "it is at home");
    bench.pass(1_000);
    assert_eq!(passed(&mut bench, 12_000..13_000), 64);
    bench.set_phase("inactive");
    assert_eq!(passed(&mut bench, 14_000..14_200), 200, "nobody has to prove anything");

    // Where servers check tokens themselves, they would refuse it.
    let mut bench = Bench::new(|config| config.retry.format = TokenFormat::SharedState);
    bench.set_phase("active");
    let (dcid, token) = bench.retried(PORT, SCID);
    let second = initial(Version::V1, &dcid, SCID, &token);
    assert_eq!(bench.send(PORT + 1, &second).0, "invalid_token");
    assert_eq!(bench.tokens(TokenResult::Port), 1);
}

/// Where servers have no routable connection IDs, nobody can tell theirs from others.
#[test]
fn another_balancer_takes_over_amid_a_handshake_also_without_routable_ids() {
    for phase in ["inactive", "active"] {
        let mut bench = Bench::new(|config| {
            *config = {
                let retry = std::mem::take(&mut config.retry);
                Config { retry, ..fixtures::config(false) }
            }
        });
        bench.set_phase("active");
        let (dcid, mut token) = bench.retried(PORT, SCID);
        bench.set_phase(phase);
        *token.last_mut().unwrap() ^= 1;
        assert_eq!(bench.initial(&dcid, &token), ("invalid_token", None), "{phase}");
        let further = initial(Version::V1, b"of a server", SCID, &token);
        assert_eq!(bench.send(PORT + 1, &further), ("forward", None), "{phase}");
        let attempts = bench.forwarder.tally().attempts;
        assert_eq!((attempts, bench.tokens(TokenResult::Seal)), (1, 1), "{phase}");
        let finished = long(LongType::Handshake, b"of a server", SCID);
        assert_eq!(bench.send(PORT + 2, &finished), ("forward", None), "{phase}");
        assert_eq!(bench.forwarder.tally().attempts, u64::from(phase == "active"), "{phase}");
        let passed = |bench: &mut Bench, octets: &[u8], first_port: u16| {
            let ports = first_port..first_port + 1_000;
            ports.filter(|&port| bench.send(port, octets).0 == "forward").count()
        };
        if phase == "active" {
            assert_eq!(passed(&mut bench, &further, 10_000), 62);
            assert_eq!(passed(&mut bench, &finished, 11_000), 0);
            bench.pass(1_000);
            assert_eq!(passed(&mut bench, &finished, 12_000), 64);
            assert_eq!(passed(&mut bench, &further, 13_000), 0);
        }
    }
}

#[test]
fn another_balancer_takes_over_amid_a_handshake_within_a_bound() {
    let mut bench = Bench::in_phase("active");
    let (_, token) = bench.retried(PORT, SCID);
    // Nothing is remembered here of the connection, whose server is known by its ID.
    let passed = |bench: &mut Bench, token: &[u8]| {
        let initials = (0..1_000u16).map(|n| {
            let [_, n] = n.to_be_bytes();
            initial(Version::V1, &server_cid(n % 3 + 1), &[n; 3], token)
        });
        let initials: Vec<_> = initials.collect();
        let send = |(port, octets): (u16, &Vec<u8>)| bench.send(port, octets).0;
        (10_000..).zip(&initials).map(send).filter(|word| *word == "forward").count()
    };
    assert_eq!(passed(&mut bench, &token), 64);
    assert_eq!(passed(&mut bench, &token), 0);
    bench.pass(1_000);
    assert_eq!(passed(&mut bench, &token), 64);
    // Without the token of a Retry, none.
    bench.pass(1_000);
    assert_eq!(passed(&mut bench, &[]), 0);
    // The bound is for connection IDs of servers.
    let stranger = initial(Version::V1, b"whose is it", SCID, &token);
    assert_eq!(bench.send(PORT + 9, &stranger).0, "invalid_token");
}

#[test]
fn handshakes_from_before_are_asked_too_and_not_cut_in_the_transition() {
    let mut bench = Bench::in_phase("inactive");
    assert_eq!(bench.initial(DCID, &[]), ("forward", None));
    bench.set_phase("transition");
    let (word, reply) = bench.initial(DCID, &[]);
    assert_eq!((word, reply.is_some()), ("forward", true));
    // One that has heard from its server would ignore a Retry.
    assert_eq!(bench.initial(&server_cid(1), &[]), ("forward", None));
    bench.pass(199);
    assert_eq!(bench.initial(DCID, &[]).0, "forward");
    bench.pass(1);
    assert_eq!(bench.initial(DCID, &[]).0, "reply");
    assert_eq!(bench.initial(&server_cid(1), &[]), ("forward", None));
    let other = initial(Version::V1, &server_cid(1), b"other", &[]);
    assert_eq!(bench.send(PORT, &other).0, "reply");
    bench.pass(9_999);
    assert_eq!(bench.initial(&server_cid(1), &[]), ("forward", None));
    bench.pass(1);
    assert_eq!(bench.initial(&server_cid(1), &[]).0, "reply");
}

#[test]
fn what_is_established_meets_no_limit_no_phase_and_no_policy() {
    let mut bench = Bench::new(|config| {
        config.limits.new_connections = NewConnections {
            total: 1.try_into().ok(),
            per_listener: 1.try_into().ok(),
            per_address: 1.try_into().ok(),
            per_network: 1.try_into().ok(),
        };
        config.limits.unknown_short_headers = UnknownPackets::Refuse;
        config.retry.other_versions = Admittance::Deny;
    });
    let learnt = [0xff; 11];
    assert_eq!(bench.initial(DCID, &[]).0, "forward");
    let datagram = initial(Version::V1, DCID, SCID, &[]);
    let path = ClientPath { client: ([192, 0, 2, 1], PORT).into(), local: None };
    let mut verdicts = [Verdict::Drop(DropReason::Empty)];
    let datagram = Datagram { path, octets: &datagram };
    bench.forwarder.decide_batch(bench.now, ListenerIndex(0), &[datagram], &mut verdicts);
    let Verdict::Forward { via, .. } = verdicts[0] else { panic!("{verdicts:?}") };
    let flow = via.flow().expect("a pool with flows");
    let _ = bench.forwarder.returned(bench.now, flow, &long(LongType::Handshake, SCID, &learnt));
    for phase in ["inactive", "transition", "active"] {
        bench.set_phase(phase);
        for n in 0..100u16 {
            // From known ports and unknown ones, and from those of reflectors.
            for port in [PORT, 51_000 + n, 53, 11_211] {
                assert_eq!(bench.send(port, &short(&server_cid(1))).0, "forward");
                assert_eq!(bench.send(port, &short(&learnt)).0, "forward");
                let handshake = long(LongType::Handshake, &server_cid(2), b"any");
                assert_eq!(bench.send(port, &handshake).0, "forward");
            }
            // Not from where we listen: what goes back there would come here again.
            let own = "127.0.0.1:4433".parse().unwrap();
            assert_eq!(bench.send_from(own, &short(&server_cid(1))).0, "own_address");
            let mut unknown_version = long(LongType::Handshake, &server_cid(3), b"any");
            unknown_version[1..5].copy_from_slice(&[0xff, 0, 0, 29]);
            assert_eq!(bench.send(PORT, &unknown_version).0, "forward");
            // On the client's own path everything short goes on.
            assert_eq!(bench.send(PORT, &short(&[0xfe; 9])).0, "forward");
        }
    }
}

#[test]
fn limits_count_what_begins_and_not_what_is_repeated() {
    let mut bench = Bench::new(|config| {
        config.retry.mode = RetryMode::Off;
        config.limits.new_connections.per_address = 2.try_into().ok();
    });
    let hello = |n: u8| initial(Version::V1, &[n; 9], &[n], &[]);
    for _ in 0..5 {
        assert_eq!(bench.send(PORT, &hello(1)).0, "forward");
        assert_eq!(bench.send(PORT, &hello(2)).0, "forward");
    }
    assert_eq!(bench.send(PORT, &hello(3)).0, "address_limit");
    // Under the same source connection ID, another first flight is another connection.
    assert_eq!(bench.send(PORT, &initial(Version::V1, &[9; 9], &[1], &[])).0, "address_limit");
    bench.pass(500);
    assert_eq!(bench.send(PORT, &hello(3)).0, "forward");
    assert_eq!(bench.send(PORT, &hello(4)).0, "address_limit");
    assert_eq!(bench.forwarder.tally().attempts, 1);
}

#[test]
fn while_addresses_are_validated_false_senders_use_up_nobodys_share() {
    let mut bench = Bench::new(|config| {
        config.limits.new_connections.per_address = 2.try_into().ok();
    });
    bench.set_phase("active");
    for n in 0..100u8 {
        assert_eq!(bench.send(PORT, &initial(Version::V1, &[n; 9], &[n], &[])).0, "reply");
    }
    for n in 0..3u8 {
        let (dcid, token) = bench.retried(PORT, &[n; 4]);
        let second = initial(Version::V1, &dcid, &[n; 4], &token);
        let expected = if n < 2 { "forward" } else { "address_limit" };
        for _ in 0..3 {
            assert_eq!(bench.send(PORT, &second).0, expected);
        }
    }
}

#[test]
fn small_initials_and_impossible_sources_begin_nothing() {
    for mode in [RetryMode::Off, RetryMode::Adaptive, RetryMode::Always] {
        let mut bench = Bench::new(|config| config.retry.mode = mode);
        let hello = initial(Version::V1, DCID, SCID, &[]);
        let second = initial(Version::V2, DCID, SCID, &[]);
        for small in [&hello[..1199], &second[..1199]] {
            assert_eq!(bench.send(PORT, small), ("small_initial", None));
        }
        let unknown = short(&[0xfe; 9]);
        let other_version = [&[0xc0, 0xff, 0, 0, 29, 8][..], &[1; 8], &[0], &[0; 1200]].concat();
        for octets in [&hello, &unknown, &other_version] {
            assert_eq!(bench.send(53, octets), ("reflector_port", None));
        }
        // The last one begins no connection, but a flow.
        for octets in [&hello, &unknown, &other_version, &short(&server_cid(1))] {
            let own = "127.0.0.1:4433".parse().unwrap();
            assert_eq!(bench.send_from(own, octets), ("own_address", None));
            let backend = "127.0.0.1:5002".parse().unwrap();
            assert_eq!(bench.send_from(backend, octets), ("backend_address", None));
        }
        assert_eq!(bench.forwarder.flow_count(), 0);
    }
}

#[test]
fn packets_that_begin_with_no_initial_are_dropped_while_addresses_are_validated() {
    for kind in [LongType::ZeroRtt, LongType::Handshake, LongType::Retry] {
        for (phase, expected) in
            [("inactive", "forward"), ("transition", "forward"), ("active", "unvalidated")]
        {
            let mut bench = Bench::in_phase(phase);
            assert_eq!(bench.send(PORT, &long(kind, DCID, SCID)), (expected, None));
        }
    }
    // 0-RTT behind its Initial is remembered.
    let mut bench = Bench::in_phase("active");
    let (dcid, token) = bench.retried(PORT, SCID);
    assert_eq!(bench.initial(&dcid, &token).0, "forward");
    assert_eq!(bench.send(PORT, &long(LongType::ZeroRtt, &dcid, SCID)).0, "forward");
}

#[test]
fn other_versions_follow_the_list_and_get_no_retry() {
    let version = |number: u32| {
        [&[0xc0][..], &number.to_be_bytes(), &[8], &[1; 8], &[0], &[0; 1200]].concat()
    };
    for (others, listed, unlisted) in
        [(Admittance::Allow, "version", "forward"), (Admittance::Deny, "forward", "version")]
    {
        let mut bench = Bench::new(|config| {
            config.retry.other_versions = others;
            config.retry.except_versions = vec![0xff00_001d];
        });
        assert_eq!(bench.send(PORT, &version(0xff00_001d)), ("forward", None));
        assert_eq!(bench.send(PORT, &version(0x0a0a_0a0a)), ("forward", None));
        bench.set_phase("active");
        assert_eq!(bench.send(PORT + 1, &version(0xff00_001d)), (listed, None));
        assert_eq!(bench.send(PORT + 2, &version(0x0a0a_0a0a)), (unlisted, None));
        assert_eq!(bench.send(PORT + 3, &version(0)), ("unvalidated", None));
    }
}

#[test]
fn short_headers_that_nothing_is_known_about_are_refused_under_attack_if_wanted() {
    for (policy, expected) in
        [(UnknownPackets::Forward, "forward"), (UnknownPackets::Refuse, "unknown_short_header")]
    {
        let mut bench = Bench::new(|config| config.limits.unknown_short_headers = policy);
        assert_eq!(bench.send(PORT, &short(&[0xfe; 9])).0, "forward");
        bench.set_phase("active");
        assert_eq!(bench.send(PORT + 1, &short(&[0xfe; 9])).0, expected);
        assert_eq!(bench.forwarder.tally().attempts, 1, "so that a flood is noticed");
        // Where the path is known, there may be a connection.
        assert_eq!(bench.send(PORT, &short(&[0xfe; 9])).0, "forward");
        assert_eq!(bench.forwarder.tally().attempts, 0);
    }
}

/// The mode "adaptive" goes by their number.
#[test]
fn what_may_begin_something_is_an_attempt_and_what_goes_on_is_none() {
    let hello = initial(Version::V1, DCID, SCID, &[]);
    let other_version = [&[0xc0, 0xff, 0, 0, 29, 8][..], &[1; 8], &[0], &[0; 1200]].concat();
    for phase in ["inactive", "transition", "active"] {
        for (octets, expected) in [
            (&hello[..], 1),
            (&other_version, 1),
            (&short(&[0xfe; 9]), 1),
            (&hello[..1199], 0),
            (&long(LongType::Handshake, DCID, SCID), 0),
        ] {
            let mut bench = Bench::in_phase(phase);
            bench.send(PORT, octets);
            let attempts = bench.forwarder.tally().attempts;
            assert_eq!(attempts, expected, "{phase}: {:x?}", &octets[..6]);
        }
    }
    let mut bench = Bench::in_phase("inactive");
    for expected in [1, 0, 0] {
        bench.send(PORT, &hello);
        assert_eq!(bench.forwarder.tally().attempts, expected, "a repetition");
    }
    let mut bench = Bench::in_phase("active");
    let (dcid, token) = bench.retried(PORT, SCID);
    for _ in 0..2 {
        assert_eq!(bench.initial(&dcid, &token).0, "forward");
        assert_eq!(bench.forwarder.tally().attempts, 0, "the Initial before the Retry was one");
    }
}

#[test]
fn keys_are_rotated_without_an_invalid_token() {
    let mut bench = Bench::in_phase("active");
    let key = |n: u8| TokenKey::new(n, [n; 16], [0; 12]).unwrap();
    let mut waiting = Vec::new();
    let mut keys = vec![key(0)];
    for round in 0..20u8 {
        // At the end, then to the front, then the old one goes.
        match round % 3 {
            0 => keys.push(key(round + 1)),
            1 => keys.rotate_right(1),
            _ => drop(keys.pop()),
        }
        bench.config.retry.keys = keys.clone();
        bench.set_phase("active");
        waiting.push((round, bench.retried(PORT, &[round])));
        // A client that takes its time gets through the next step too.
        if waiting.len() > 1 {
            let (n, (dcid, token)) = waiting.remove(0);
            let second = initial(Version::V1, &dcid, &[n], &token);
            assert_eq!(bench.send(PORT, &second).0, "forward", "round {round}");
        }
    }
}

#[test]
fn balancers_with_the_same_keys_accept_each_others_tokens() {
    let (mut one, mut other) = (Bench::in_phase("active"), Bench::in_phase("active"));
    let (dcid, token) = one.retried(PORT, SCID);
    assert_eq!(other.initial(&dcid, &token), ("forward", None));
    let mut stranger = Bench::new(|config| {
        config.retry.keys = vec![TokenKey::new(3, [8; 16], [0; 12]).unwrap()];
    });
    stranger.set_phase("active");
    assert_eq!(stranger.initial(&dcid, &token), ("invalid_token", None));
}

#[test]
fn the_same_seed_and_datagrams_give_the_same_octets() {
    let run = || {
        let mut bench = Bench::in_phase("active");
        (0..20u8).map(|n| bench.initial(&[n; 8], &[]).1).collect::<Vec<_>>()
    };
    let (one, other) = (run(), run());
    assert_eq!(one, other);
    assert!(
        one.iter()
            .flatten()
            .map(|retry| read(retry).0)
            .collect::<std::collections::HashSet<_>>()
            .len()
            == 20
    );
}

#[test]
fn a_first_connection_id_that_happens_to_decode_changes_nothing() {
    let mut bench = Bench::in_phase("active");
    let hit = server_cid(2);
    assert_eq!(bench.initial(&hit, &[]).0, "reply");
    let id = ServerId::new(&[0, 2]).unwrap();
    assert_eq!(cid_config().decode(&hit), Some(id));
    assert_eq!(bench.forwarder.flow_count(), 0);
}

/// Whether a backend takes connections is asked last: what admission answers or drops is answered
/// or dropped although none does.
#[test]
fn admission_goes_before_the_choice_of_a_backend() {
    let nobody = |config: &mut Config| {
        for backend in &mut config.pools[0].backends {
            backend.admission = quic_lb_config::Admission::Draining;
        }
    };
    let mut bench = Bench::new(nobody);
    assert_eq!(bench.initial(DCID, &[]), ("no_backend", None));
    assert_eq!(bench.send(53, &initial(Version::V1, DCID, SCID, &[])).0, "reflector_port");
    assert_eq!(bench.send(PORT, &initial(Version::V1, DCID, SCID, &[])[..100]).0, "small_initial");
    bench.set_phase("active");
    let (dcid, token) = bench.retried(PORT, SCID);
    assert_eq!(bench.initial(&dcid, &token), ("no_backend", None));
    let stolen = initial(Version::V1, &dcid, SCID, &token);
    assert_eq!(bench.send_from_elsewhere(&stolen).0, "invalid_token");
    assert_eq!(bench.send(PORT, &[0x40; 60]).0, "no_backend");

    // A Retry takes nothing of the limits, and what is let through has taken its part when no
    // backend is found.
    let mut bench = Bench::new(|config| {
        nobody(config);
        config.limits.new_connections.per_address = 1.try_into().ok();
    });
    bench.set_phase("active");
    for _ in 0..3 {
        assert_eq!(bench.initial(DCID, &[]).0, "reply");
    }
    let (dcid, token) = bench.retried(PORT, SCID);
    assert_eq!(bench.initial(&dcid, &token).0, "no_backend");
    let (dcid, token) = bench.retried(PORT + 1, SCID);
    let again = initial(Version::V1, &dcid, SCID, &token);
    assert_eq!(bench.send(PORT + 1, &again).0, "address_limit");
}
