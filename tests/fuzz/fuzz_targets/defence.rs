//! The forwarder while addresses are validated, or begin to be, or are not any more: whatever arrives
//! gets one verdict and at most one answer, which is never longer than what asked for it; whatever
//! claims to be the token of a Retry and is not reaches nobody and is not answered; the token of a
//! Retry that the target itself got is good for its address until it expires, and with any bit
//! changed for nothing; routable connection IDs reach their servers all the time.
#![no_main]

use std::{
    fmt::Write as _,
    sync::{Arc, LazyLock, OnceLock},
    time::{Duration, Instant, UNIX_EPOCH},
};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use quic::{
    header::{Kind, LongType, Version},
    invariants::Packet,
    retry,
    token::{CLOCK_SKEW, is_new_token},
    varint,
};
use quic_lb::{
    admission::mode::Phase,
    client_path::{ClientPath, ListenerIndex},
    forwarder::{BATCH, Clock, Datagram, Forwarder, Start},
    memory::{Memory, Sizes},
    registry::Registry,
    routing::Routing,
    verdict::{DropReason, Ended, FlowId, Verdict},
};
use quic_lb_config::{Config, RetryMode, Surroundings, TokenFormat, from_str};

#[derive(Arbitrary, Debug)]
struct Plan {
    adaptive: bool,
    shared_state: bool,
    /// Rarely, since it makes everything anew.
    limits: u8,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// Datagrams in one batch.
    Batch(Vec<Sent>),
    /// A first flight, and what follows a Retry.
    Visit { port: u8, first: Initial, after_ms: u16, flipped: u16 },
    /// A server answers.
    Returned { flow: u8, octets: Vec<u8> },
    /// Time passes.
    Pass { ms: u16 },
    /// Validation begins or ends.
    Phase(u8),
}

#[derive(Arbitrary, Debug)]
struct Sent {
    port: u8,
    packet: Anything,
}

#[derive(Arbitrary, Debug)]
enum Anything {
    Octets { octets: Vec<u8>, padded: bool },
    Initial { initial: Initial, token: Vec<u8> },
}

/// The fields of an Initial that a balancer reads.
#[derive(Arbitrary, Clone, Debug)]
struct Initial {
    version_2: bool,
    dcid: [u8; 20],
    dcid_len: u8,
    scid: [u8; 20],
    scid_len: u8,
}

impl Initial {
    const fn version(&self) -> Version {
        if self.version_2 { Version::V2 } else { Version::V1 }
    }

    fn scid(&self) -> &[u8] {
        &self.scid[..usize::from(self.scid_len % 21)]
    }

    /// As a client may draw it.
    fn dcid(&self) -> &[u8] {
        &self.dcid[..8 + usize::from(self.dcid_len % 13)]
    }

    fn towards(&self, dcid: &[u8], token: &[u8]) -> Vec<u8> {
        let mut octets = vec![if self.version_2 { 0xd0 } else { 0xc0 }];
        octets.extend_from_slice(&self.version().to_wire().to_be_bytes());
        for id in [dcid, self.scid()] {
            octets.push(u8::try_from(id.len()).expect("at most 20"));
            octets.extend_from_slice(id);
        }
        varint::write(token.len() as u64, &mut octets);
        octets.extend_from_slice(token);
        octets.resize(octets.len().max(1200), 0);
        octets
    }
}

/// By mode, format and whether what begins is limited.
static CONFIGS: LazyLock<Vec<Config>> = LazyLock::new(|| (0..8).map(config).collect());
/// When every plan begins.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);
/// For each phase of each configuration without limits, which leaves nothing behind for the next plan.
static ROUTINGS: [[OnceLock<Arc<Routing>>; PHASES]; 4] =
    [const { [const { OnceLock::new() }; PHASES] }; 4];
/// Phases to choose from.
const PHASES: usize = 4;

fn phase(number: usize) -> Phase {
    match number {
        0 => Phase::Inactive,
        1 => Phase::Transition { until: *START + Duration::from_secs(1) },
        2 => Phase::Transition { until: *START + Duration::from_secs(20) },
        _ => Phase::Active,
    }
}

fn config(kind: u8) -> Config {
    let mut text = r#"
listeners: [{ name: edge, address: "127.0.0.1:4433", pool: web }]
pools:
  - name: web
    honours_tokens: true
    quic_lb: [{ config_id: 0, server_id_length: 2, nonce_length: 6 }]
    backends:
      - { name: a, address: "127.0.0.1:5001", server_id: "0001" }
      - { name: b, address: "127.0.0.1:5002", server_id: "0002" }
"#
    .to_owned();
    let mode = if kind & 1 == 0 { "always" } else { "adaptive" };
    let format = if kind & 2 == 0 { "nat" } else { "shared_state" };
    let limits = match kind & 4 {
        0 => "",
        _ => ", new_connections_per_second: { per_address: 3, per_network: 5, total: 9 }",
    };
    writeln!(
        text,
        "retry: {{ mode: {mode}, format: {format}, lifetime: \"5s\", keys: \
         [{{ sequence: 3, key: \"000102030405060708090a0b0c0d0e0f\", iv: \"{iv}\" }}] }}\n\
         limits: {{ unknown_short_headers: refuse{limits} }}",
        iv = "0a".repeat(12),
    )
    .expect("strings take all");
    let surroundings =
        Surroundings::of_text("fuzz.yaml");
    from_str(&text, &surroundings).expect("the configuration is right").config
}

/// A balancer and what has been seen of it.
struct Scene {
    /// Its number.
    kind: usize,
    config: &'static Config,
    /// What limited configurations count in.
    registry: Registry,
    routing: Arc<Routing>,
    forwarder: Forwarder,
    memory: Arc<Memory>,
    now: Instant,
    phase: Phase,
    open: Vec<FlowId>,
}

/// A verdict, and what was answered.
struct Outcome {
    verdict: Verdict,
    reply: Option<Vec<u8>>,
}

/// No forwarder decides so; workers do when the kernel refuses.
const UNDECIDED: Verdict = Verdict::Drop(DropReason::SendFailed);
const FLOWS: usize = 16;

impl Scene {
    fn new(plan: &Plan) -> Self {
        let limited = plan.limits % 16 == 1;
        let bits = [plan.adaptive, plan.shared_state, limited].map(usize::from);
        let kind = bits[0] + 2 * bits[1] + 4 * bits[2];
        let config = &CONFIGS[kind];
        let now = *START;
        let mut registry = Registry::default();
        let number = if plan.adaptive { 0 } else { 3 };
        let routing = routing(kind, number, &mut registry);
        let memory = Arc::new(Memory::new(32, now, [7; 4]));
        let start = Start { clock: Clock { now, unix: UNIX_EPOCH }, seed: [7; 32] };
        let forwarder = Forwarder::new(FLOWS, Arc::clone(&routing), Arc::clone(&memory), &start);
        let phase = phase(number);
        Self { kind, config, registry, routing, forwarder, memory, now, phase, open: Vec::new() }
    }

    fn path(port: u8) -> ClientPath {
        // Of no service that is reflected from, and of two addresses in one network.
        let client = ([192, 0, 2, 1 + (port & 1)], 40_000 + u16::from(port)).into();
        ClientPath { client, local: None }
    }

    fn phase(&self) -> Phase {
        self.phase.at(self.now)
    }

    /// Sends a batch, and looks at what came of it.
    fn send(&mut self, batch: &[(u8, &[u8])]) -> Vec<Outcome> {
        let datagrams: Vec<_> = batch
            .iter()
            .map(|&(port, octets)| Datagram { path: Self::path(port), octets })
            .collect();
        let mut verdicts = vec![UNDECIDED; batch.len()];
        self.forwarder.decide_batch(self.now, ListenerIndex(0), &datagrams, &mut verdicts);
        let mut outcomes: Vec<_> =
            verdicts.into_iter().map(|verdict| Outcome { verdict, reply: None }).collect();
        for reply in self.forwarder.replies() {
            let (_, asked) = batch[reply.datagram];
            assert!(reply.octets.len() <= asked.len(), "the answer is longer than the question");
            let answered = outcomes[reply.datagram].reply.replace(reply.octets.to_vec());
            assert_eq!(answered, None, "answered twice");
        }
        for (&(_, octets), outcome) in batch.iter().zip(&outcomes) {
            self.look_at(octets, outcome);
        }
        outcomes
    }

    fn look_at(&mut self, octets: &[u8], outcome: &Outcome) {
        assert_ne!(outcome.verdict, UNDECIDED);
        match outcome.verdict {
            Verdict::Reply(_) => assert!(outcome.reply.is_some(), "an answer was promised"),
            Verdict::Drop(_) => assert_eq!(outcome.reply, None, "dropped and answered"),
            Verdict::Forward { via, .. } => {
                let begins = self.phase().is_transition();
                assert!(outcome.reply.is_none() || begins, "forwarded and answered");
                if let Some(flow) = via.flow()
                    && !self.open.contains(&flow)
                {
                    self.open.push(flow);
                }
            }
        }
        let Some(retry) = &outcome.reply else { return };
        let Ok(Packet::Long(asked)) = Packet::read(octets) else {
            panic!("answered what is no packet")
        };
        let Kind::Known(version, LongType::Initial) = asked.kind() else {
            panic!("answered what is no Initial")
        };
        assert!(retry::verify(version, asked.dcid, retry), "a Retry that no client takes");
        let (token_len, rest) = varint::read(asked.rest).expect("whole Initials are answered");
        let token = &rest[..usize::try_from(token_len).expect("it fits")];
        assert_ne!(is_new_token(token), Some(false), "a Retry for the token of a Retry");
    }

    /// A first flight, and after `wait` what its client makes of the Retry, if it gets one.
    fn visit(&mut self, port: u8, first: &Initial, wait: Duration, flipped: u16) {
        let hello = first.towards(first.dcid(), &[]);
        let outcome = self.send(&[(port, &hello)]).remove(0);
        let Some(retry) = outcome.reply else { return };
        let Ok(Packet::Long(header)) = Packet::read(&retry) else { panic!("no Retry") };
        assert_eq!(header.dcid, first.scid());
        assert_ne!(header.scid, first.dcid(), "clients discard that");
        let token = &header.rest[..header.rest.len() - retry::TAG_LEN];
        self.pass(wait);
        let format = self.config.retry.format;
        let judged = format == TokenFormat::Nat || self.phase() != Phase::Inactive;
        let bit = usize::from(flipped) % (8 * token.len());
        let mut changed = token.to_vec();
        changed[bit / 8] ^= 0x80 >> (bit % 8);
        let outcome = self.send(&[(port, &first.towards(header.scid, &changed))]).remove(0);
        // The first bit makes a token of the other type of it, as good as none.
        match outcome.verdict {
            _ if !judged => {}
            verdict if bit == 0 => assert_ne!(verdict, Verdict::Drop(DropReason::InvalidToken)),
            verdict => assert_eq!(verdict, Verdict::Drop(DropReason::InvalidToken), "bit {bit}"),
        }
        let again = first.towards(header.scid, token);
        // Whole seconds may have been rounded down when it was made.
        let lifetime = self.config.retry.lifetime + CLOCK_SKEW;
        let good = wait + Duration::from_secs(1) <= lifetime;
        let old = wait > lifetime;
        if judged {
            let other = self.send(&[(port ^ 1, &again)]).remove(0);
            assert_eq!(other.verdict, Verdict::Drop(DropReason::InvalidToken), "another address");
        }
        let outcome = self.send(&[(port, &again)]).remove(0);
        assert_eq!(outcome.reply, None, "asked twice");
        match outcome.verdict {
            Verdict::Drop(DropReason::InvalidToken) => assert!(!good && judged, "it was good"),
            Verdict::Forward { .. } => assert!(!old || !judged, "it was old"),
            Verdict::Drop(
                DropReason::AddressLimit
                | DropReason::NetworkLimit
                | DropReason::TotalLimit
                | DropReason::FlowLimit,
            ) => {}
            other => panic!("{other:?}"),
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        let mut expired = Vec::new();
        self.forwarder.sweep(self.now, &mut expired);
        self.memory.sweep(self.now, &self.routing);
        self.open.retain(|&flow| !expired.iter().any(|ended: &Ended| ended.flow == flow));
    }

    fn set_phase(&mut self, number: u8) {
        let mut number = usize::from(number) % PHASES;
        if self.config.retry.mode == RetryMode::Always {
            number = number.max(1);
        }
        self.phase = phase(number);
        self.routing = routing(self.kind, number, &mut self.registry);
        self.forwarder.set_routing(Arc::clone(&self.routing));
    }
}

/// The configuration `kind` in the phase `number`. With limits it goes on counting in `registry`.
fn routing(kind: usize, number: usize, registry: &mut Registry) -> Arc<Routing> {
    let make = |registry: &mut Registry| {
        let config = &CONFIGS[kind];
        registry.admission.set_phase(0, phase(number));
        Arc::new(Routing::new(config, registry, |_, _| Default::default()))
    };
    match ROUTINGS.get(kind) {
        None => make(registry),
        Some(phases) => Arc::clone(phases[number].get_or_init(|| make(&mut Registry::default()))),
    }
}

fuzz_target!(|plan: Plan| {
    let mut scene = Scene::new(&plan);
    for step in plan.steps {
        match step {
            Step::Batch(batch) => {
                let octets = |sent: &Sent| match &sent.packet {
                    Anything::Octets { octets, padded: false } => octets.clone(),
                    Anything::Octets { octets, padded: true } => {
                        let len = octets.len().max(1200);
                        octets.iter().copied().chain(std::iter::repeat(0)).take(len).collect()
                    }
                    Anything::Initial { initial, token } => initial.towards(initial.dcid(), token),
                };
                let batch: Vec<_> =
                    batch.iter().take(BATCH).map(|sent| (sent.port, octets(sent))).collect();
                let batch: Vec<_> =
                    batch.iter().map(|(port, octets)| (*port, octets.as_slice())).collect();
                scene.send(&batch);
            }
            Step::Visit { port, first, after_ms, flipped } => {
                // Up to twice as long as tokens live.
                let wait = Duration::from_millis(u64::from(after_ms) % 14_000);
                scene.visit(port, &first, wait, flipped);
            }
            Step::Returned { flow, octets } => {
                if let Some(&flow) = scene.open.get(usize::from(flow)) {
                    let _ = scene.forwarder.returned(scene.now, flow, &octets);
                }
            }
            Step::Pass { ms } => scene.pass(Duration::from_millis(ms.into())),
            Step::Phase(number) => scene.set_phase(number),
        }
        assert!(scene.forwarder.flow_count() <= FLOWS && scene.open.len() <= FLOWS);
        let Sizes { handshakes, connections, .. } = scene.memory.sizes(&scene.routing);
        assert!(handshakes <= 16 && connections <= 16);
    }
    for server in [1, 2] {
        let cid = [0x40, 0x08, 0, server, 1, 2, 3, 4, 5, 6, 9, 9, 9];
        let outcome = scene.send(&[(0, &cid)]).remove(0);
        match outcome.verdict {
            Verdict::Forward { backend, .. } => {
                assert_eq!(backend.slot(), usize::from(server) - 1);
            }
            verdict => assert_eq!(verdict, Verdict::Drop(DropReason::FlowLimit)),
        }
    }
});
