//! The decision about each datagram, pure: time comes in, a verdict goes out.
//!
//! ```text
//! invariants ──► the five rules, in order ──► admission of what begins ──► flow
//! ```
//!
//! The worker that owns a forwarder carries its verdicts out; the simulator and `explain` run the
//! same code. Nothing here reads a clock, draws from the system's randomness, opens a socket or
//! allocates per datagram.
//!
//! The rules are those of draft-ietf-quic-load-balancers-21, section 4: routable connection ID;
//! remembered (4-tuple, source connection ID) of a long header; remembered connection ID;
//! remembered 4-tuple; consistent hashing. An unroutable connection ID is never a reason to drop.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Instant, SystemTime},
};

use quic::{
    header::{Kind, LongType, Version},
    invariants::{LongHeader, Malformed, Packet},
    random::Random,
    routable::{Decoded, Unroutable},
};

pub use crate::flows::{Flow, FlowLimits};
use crate::{
    admission::{Arrival, Judgement, Ruling, tokens::MAX_RETRY_LEN},
    backend::{BackendId, BackendState},
    client_path::ClientPath,
    flows::{Claim, FlowTable},
    memory::Memory,
    routing::{FallbackKey, PoolRoute, Routing},
    verdict::{DropReason, FlowId, Opening, ReplyKind, Rule, TokenResult, Verdict},
};

/// The most datagrams that [`Forwarder::decide_batch`] takes at a time.
pub const BATCH: usize = 64;

/// The shortest connection ID that a client may draw for its first flight
/// (<https://www.rfc-editor.org/rfc/rfc9000.html#section-7.2>); shorter ones are not random enough
/// to hash by.
const MIN_FIRST_DCID_LEN: usize = 8;

/// One UDP datagram from a client.
#[derive(Clone, Copy, Debug)]
pub struct Datagram<'a> {
    /// Where it came from and was sent to.
    pub path: ClientPath,
    /// The UDP payload.
    pub octets: &'a [u8],
}

/// Where the datagrams of a new flow go.
#[derive(Clone, Copy, Debug)]
pub struct Upstream<'a> {
    /// The backend.
    pub backend: BackendId,
    /// Its address.
    pub address: SocketAddr,
    /// The local addresses to choose from; empty lets the kernel choose.
    pub sources: &'a [IpAddr],
}

/// What a forwarder needs of the world before it begins.
#[derive(Clone, Copy, Debug)]
pub struct Birth {
    /// The time, on both clocks.
    pub clock: Clock,
    /// What its randomness comes from: a secret that no two forwarders share.
    pub seed: [u8; 32],
}

/// The same moment on the clock that only goes forward and on the one that tokens are dated by.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// The former.
    pub now: Instant,
    /// The latter.
    pub unix: SystemTime,
}

impl Clock {
    fn unix_at(&self, now: Instant) -> SystemTime {
        let since = now.saturating_duration_since(self.now);
        self.unix.checked_add(since).unwrap_or(self.unix)
    }
}

/// What the forwarder answers to a datagram by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply<'a> {
    /// The number of the datagram in its batch.
    pub datagram: usize,
    /// What it is.
    pub kind: ReplyKind,
    /// The UDP payload: never longer than that of the datagram.
    pub octets: &'a [u8],
}

/// What admission saw of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Tally {
    /// Attempts to begin a connection.
    pub attempts: u64,
    /// Tokens looked at, by result.
    pub tokens: [u64; TokenResult::ALL.len()],
}

/// The forwarder of one worker.
#[derive(Debug)]
pub struct Forwarder {
    routing: Arc<Routing>,
    memory: Arc<Memory>,
    flows: FlowTable,
    hash: ahash::RandomState,
    clock: Clock,
    random: Random,
    replies: Replies,
    tally: Tally,
}

impl Forwarder {
    /// A forwarder without flows.
    #[must_use]
    pub fn new(
        limits: FlowLimits,
        routing: Arc<Routing>,
        memory: Arc<Memory>,
        birth: &Birth,
    ) -> Self {
        Self {
            routing,
            memory,
            flows: FlowTable::new(limits),
            hash: ahash::RandomState::new(),
            clock: birth.clock,
            random: Random::new(birth.seed),
            replies: Replies::new(),
            tally: Tally::default(),
        }
    }

    /// Says what time it is, now and then, so that a clock that was set is followed.
    pub fn set_clock(&mut self, clock: Clock) {
        self.clock = clock;
    }

    /// Replaces the routing snapshot. Flows stay as they are.
    pub fn set_routing(&mut self, routing: Arc<Routing>) {
        self.routing = routing;
    }

    /// Changes how long flows live. How many there may be stays as it was at the start, since the
    /// tables have been made for it.
    pub fn set_timeouts(&mut self, limits: FlowLimits) {
        self.flows.set_timeouts(limits);
    }

    /// Decides about `datagrams`, which arrived on one listener: `verdicts[n]` becomes the verdict
    /// on `datagrams[n]`. Connection IDs are decoded side by side.
    ///
    /// # Panics
    ///
    /// When there are more than [`BATCH`] datagrams, or fewer verdicts than datagrams.
    pub fn decide_batch(
        &mut self,
        now: Instant,
        listener: usize,
        datagrams: &[Datagram<'_>],
        verdicts: &mut [Verdict],
    ) {
        let count = datagrams.len();
        let mut packets = [Err(Malformed::Empty); BATCH];
        let mut cids: [&[u8]; BATCH] = [&[]; BATCH];
        let mut decoded = [Err(Unroutable::Empty); BATCH];
        for (index, datagram) in datagrams.iter().enumerate() {
            packets[index] = Packet::read(datagram.octets);
            cids[index] = match &packets[index] {
                Ok(Packet::Long(header)) => header.dcid,
                Ok(Packet::Short(header)) => header.rest,
                Err(_) => &[],
            };
        }
        self.replies.clear();
        self.tally = Tally::default();
        // The snapshot is taken out for the loop so that the flow table can change meanwhile.
        let routing = Arc::clone(&self.routing);
        routing.pool_of(listener).decoder.decode_batch(&cids[..count], &mut decoded[..count]);
        for index in 0..count {
            let question = Question {
                now,
                listener,
                path: &datagrams[index].path,
                len: datagrams[index].octets.len(),
                packet: packets[index],
                decoded: decoded[index],
            };
            verdicts[index] = self.decide(&routing, &question, index);
        }
    }

    /// What to answer to datagrams of the last batch: to those with [`Verdict::Reply`], and while
    /// address validation begins also to some that are forwarded.
    pub fn replies(&self) -> impl Iterator<Item = Reply<'_>> {
        self.replies.iter()
    }

    /// What admission saw of the last batch.
    #[must_use]
    pub const fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Says which rules were asked about `datagram`, what they saw, and what becomes of it. It
    /// changes nothing.
    #[must_use]
    pub fn explain(&self, now: Instant, listener: usize, datagram: &Datagram<'_>) -> Explanation {
        let packet = Packet::read(datagram.octets);
        let pool = self.routing.pool_of(listener);
        let decoded = match &packet {
            Ok(Packet::Long(header)) => pool.decoder.decode(header.dcid),
            Ok(Packet::Short(header)) => pool.decoder.decode(header.rest),
            Err(_) => Err(Unroutable::Empty),
        };
        let mut steps = Vec::new();
        let len = datagram.octets.len();
        let question = Question { now, listener, path: &datagram.path, len, packet, decoded };
        let routing = &self.routing;
        let answer = match self.route(routing, &question, &mut steps) {
            Ok(answer) => answer,
            Err(reason) => {
                return Explanation { steps, admission: None, outcome: Outcome::Drop(reason) };
            }
        };
        let judgement = self.judge(routing, &question, &answer);
        let limits = routing.listeners[listener].gate.limits();
        let forward = Outcome::Forward { answer, retry: false };
        let outcome = match judgement.ruling {
            Ruling::Pass => forward,
            Ruling::Retry(_) => Outcome::Reply(ReplyKind::Retry),
            Ruling::Drop(reason) => Outcome::Drop(reason),
            Ruling::Begin { retry, .. } => match limits.peek(now, datagram.path.client.ip()) {
                Ok(()) => Outcome::Forward { answer, retry: retry.is_some() },
                Err(reason) => Outcome::Drop(reason),
            },
        };
        let phase = routing.listeners[listener].gate.phase(now).label();
        let saw = judgement.why.to_string();
        Explanation { steps, admission: Some(AdmissionStep { phase, saw }), outcome }
    }

    /// Takes note of a datagram that the backend of `flow` has sent to the client.
    pub fn returned(&mut self, now: Instant, flow: FlowId, octets: &[u8]) {
        self.flows.answered(now, flow);
        // Only long headers show the server's connection ID and its length.
        if octets.first().is_some_and(|first| first & 0x80 != 0) {
            self.learn(now, flow, octets);
        }
    }

    /// Where `flow` leads; to be asked right after the verdict that opened it. `None` when its
    /// backend has been removed since.
    #[must_use]
    pub fn upstream(&self, flow: FlowId) -> Option<Upstream<'_>> {
        let backend = self.flows.get(flow).backend;
        let route = self.routing.backend(backend)?;
        let sources = self.routing.pools[route.pool].source_addresses.as_slice();
        Some(Upstream { backend, address: route.address, sources })
    }

    /// Forgets a flow whose upstream socket could not be opened or has failed for good.
    pub fn abandon(&mut self, flow: FlowId) {
        self.flows.close(flow);
    }

    /// Makes room for `flow`, which the last batch started and for whose upstream socket there was no
    /// port or descriptor: ends a half-open flow with the same backend. `None` when there is none.
    pub fn reclaim(&mut self, now: Instant, flow: FlowId) -> Option<FlowId> {
        self.flows.reclaim(now, flow)
    }

    /// Ends flows that have been idle for too long and appends them to `expired`. Sixteen calls
    /// look at every flow once.
    pub fn sweep(&mut self, now: Instant, expired: &mut Vec<FlowId>) {
        self.flows.sweep(now, expired);
    }

    /// The flow behind a number from a verdict.
    #[must_use]
    pub fn flow(&self, flow: FlowId) -> &Flow {
        self.flows.get(flow)
    }

    /// How many flows there are.
    #[must_use]
    pub fn flow_count(&self) -> usize {
        self.flows.len()
    }

    fn decide(&mut self, routing: &Routing, question: &Question<'_>, index: usize) -> Verdict {
        let answer = match self.route(routing, question, &mut Untraced) {
            Ok(answer) => answer,
            Err(reason) => return Verdict::Drop(reason),
        };
        let Answer { backend, rule } = answer;
        let &Question { now, listener, path, .. } = question;
        let judgement = self.judge(routing, question, &answer);
        self.tally.attempts += u64::from(judgement.attempt);
        if let Some(token) = judgement.token {
            self.tally.tokens[token as usize] += 1;
        }
        let (begins, validated) = match judgement.ruling {
            Ruling::Pass => (false, false),
            Ruling::Begin { validated, retry } => {
                let limits = routing.listeners[listener].gate.limits();
                if let Err(reason) = limits.take(now, path.client.ip()) {
                    return Verdict::Drop(reason);
                }
                if let Some(version) = retry {
                    // Without a Retry it is forwarded all the same.
                    let _ = self.reply_retry(routing, question, version, index);
                }
                (true, validated)
            }
            Ruling::Retry(version) => {
                return match self.reply_retry(routing, question, version, index) {
                    Ok(()) => Verdict::Reply(ReplyKind::Retry),
                    Err(reason) => Verdict::Drop(reason),
                };
            }
            Ruling::Drop(reason) => return Verdict::Drop(reason),
        };
        if let Ok(Packet::Long(header)) = &question.packet
            && (validated || matches!(rule, Rule::FourTuple | Rule::Fallback))
        {
            self.memory.remember_handshake(now, listener, path, header, backend, validated);
        }
        if let Some(flow) = self.flows.find(now, listener, path, backend) {
            return Verdict::Forward { flow, rule, opening: Opening::Existing };
        }
        let opening = match question.packet {
            Ok(Packet::Short(_)) if rule == Rule::Cid => Opening::PathChange,
            _ => Opening::New,
        };
        let claim = match rule {
            _ if validated => Claim::Validated,
            Rule::Cid | Rule::Dcid if !begins => Claim::Established,
            _ => Claim::None,
        };
        match self.flows.open(now, Flow { listener, path: *path, backend }, claim) {
            Some(flow) => Verdict::Forward { flow, rule, opening },
            None => Verdict::Drop(DropReason::FlowLimit),
        }
    }

    /// Whether a packet that a backend was found for may go there. Packets of connections that
    /// exist are let through on sight.
    fn judge(&self, routing: &Routing, question: &Question<'_>, answer: &Answer) -> Judgement {
        let &Question { now, listener, path, len, packet, .. } = question;
        let packet = match packet {
            Ok(Packet::Short(_)) if answer.rule != Rule::Fallback => return Judgement::NOT_ASKED,
            Ok(packet) => packet,
            Err(_) => return Judgement::NOT_ASKED,
        };
        let initial = match &packet {
            Packet::Long(header) if is_initial(header) => Some(header),
            _ => None,
        };
        let to_server_cid = match answer.rule {
            Rule::Cid | Rule::Dcid => true,
            Rule::FourTupleScid => initial.is_some_and(|header| {
                let pool = routing.pool_of(listener);
                self.memory.connection_id(now, pool, header.dcid).is_some()
            }),
            Rule::FourTuple | Rule::Fallback => false,
        };
        let handshake = initial.and_then(|header| {
            self.memory.handshake_state(now, listener, path, header.dcid, header.scid)
        });
        routing.listeners[listener].gate.judge(&Arrival {
            now,
            unix: self.clock.unix_at(now),
            client: path.client,
            local: path.local,
            datagram_len: len,
            packet,
            rule: answer.rule,
            to_server_cid,
            handshake,
        })
    }

    /// Adds the Retry that answers datagram number `index` to the replies.
    fn reply_retry(
        &mut self,
        routing: &Routing,
        question: &Question<'_>,
        version: Version,
        index: usize,
    ) -> Result<(), DropReason> {
        let Ok(Packet::Long(initial)) = &question.packet else { return Err(DropReason::Malformed) };
        let client = question.path.client;
        let unix = self.clock.unix_at(question.now);
        let tokens = routing.listeners[question.listener].gate.tokens();
        let random = &mut self.random;
        self.replies.push(index, ReplyKind::Retry, |out| {
            // Never more than came in.
            let room = out.len().min(question.len);
            tokens.write_retry(random, version, initial, client, unix, &mut out[..room])
        })
    }

    /// The five rules.
    fn route(
        &self,
        routing: &Routing,
        question: &Question<'_>,
        trace: &mut impl Trace,
    ) -> Result<Answer, DropReason> {
        let &Question { now, listener, path, packet, decoded, .. } = question;
        let packet = packet.map_err(|malformed| match malformed {
            Malformed::Empty => DropReason::Empty,
            Malformed::Truncated => DropReason::Malformed,
        })?;
        let pool = routing.pool_of(listener);

        let server = decoded.map(|decoded| pool.server(&decoded));
        let present = server.ok().flatten().filter(|&id| routing.backend(id).is_some());
        trace.step(Rule::Cid, present, || saw::decoded(pool, decoded, present));
        if let Some(backend) = present {
            return Ok(Answer { backend, rule: Rule::Cid });
        }

        let remembered = match packet {
            Packet::Long(header) => self.memory.handshake(now, listener, path, header.scid),
            Packet::Short(_) => None,
        };
        // What still comes this way has had no answer with a connection ID that leads to its
        // server; a server that is down is not going to give one, another may.
        let may_answer = |id| routing.backend(id).is_some_and(|b| b.state != BackendState::Down);
        let present = remembered.filter(|&id| may_answer(id));
        trace.step(Rule::FourTupleScid, present, || saw::handshake(packet, remembered, present));
        if let Some(backend) = present {
            return Ok(Answer { backend, rule: Rule::FourTupleScid });
        }

        let remembered = match packet {
            Packet::Long(header) => self.memory.connection_id(now, pool, header.dcid),
            Packet::Short(header) => self.memory.connection_id_in_front(now, pool, header.rest),
        };
        let present = remembered.filter(|&id| routing.backend(id).is_some());
        trace.step(Rule::Dcid, present, || saw::learnt(remembered));
        if let Some(backend) = present {
            return Ok(Answer { backend, rule: Rule::Dcid });
        }

        let remembered = self.flows.of_path(listener, path);
        let present = remembered.filter(|&id| may_keep(routing, pool, packet, id));
        trace.step(Rule::FourTuple, present, || saw::four_tuple(remembered, present));
        if let Some(backend) = present {
            return Ok(Answer { backend, rule: Rule::FourTuple });
        }

        let key = fallback_key(pool, packet, path);
        let present = pool.fallback(key);
        trace.step(Rule::Fallback, present, || saw::fallback(key));
        let backend = present.ok_or(DropReason::NoBackend)?;
        Ok(Answer { backend, rule: Rule::Fallback })
    }

    /// Learns the connection ID of a server that has no routable ones from the long headers that
    /// it sends, so that its connections survive a rebinding of the client too.
    fn learn(&mut self, now: Instant, flow: FlowId, octets: &[u8]) {
        let Ok(Packet::Long(header)) = Packet::read(octets) else { return };
        // Version Negotiation echoes the client's connection IDs; they are not the server's.
        if header.version == 0 || header.scid.is_empty() {
            return;
        }
        if !self.flows.is_news(flow, self.hash.hash_one(header.scid)) {
            return;
        }
        let &Flow { listener, backend, .. } = self.flows.get(flow);
        let pool = self.routing.pool_of(listener);
        let decoded = pool.decoder.decode(header.scid);
        if decoded.is_ok_and(|decoded| pool.server(&decoded) == Some(backend)) {
            return;
        }
        self.memory.learn_connection_id(now, pool, header.scid, backend);
    }
}

/// Whether the 4-tuple's memory decides about this packet.
fn may_keep(routing: &Routing, pool: &PoolRoute, packet: Packet<'_>, id: BackendId) -> bool {
    let Some(backend) = routing.backend(id) else { return false };
    match packet {
        Packet::Short(_) => true,
        // A long header that got here begins a connection, which has no claim on the backend of
        // another one: where connection IDs are routable it is free to go elsewhere, and a backend
        // that takes no new connections does not get it.
        Packet::Long(_) => !pool.routable && backend.state == BackendState::Active,
    }
}

fn fallback_key<'a>(pool: &PoolRoute, packet: Packet<'a>, path: &ClientPath) -> FallbackKey<'a> {
    match packet {
        Packet::Long(header) if pool.routable && header.dcid.len() >= MIN_FIRST_DCID_LEN => {
            FallbackKey::ConnectionId(header.dcid)
        }
        _ => FallbackKey::Client(path.client),
    }
}

fn is_initial(header: &LongHeader<'_>) -> bool {
    matches!(header.kind(), Kind::Known(_, LongType::Initial))
}

/// The answers to one batch, in memory that is there from the start.
#[derive(Debug)]
struct Replies {
    octets: Box<[u8]>,
    entries: Vec<ReplyEntry>,
}

#[derive(Clone, Copy, Debug)]
struct ReplyEntry {
    datagram: usize,
    kind: ReplyKind,
    len: usize,
}

impl Replies {
    fn new() -> Self {
        let octets = vec![0; BATCH * MAX_RETRY_LEN].into_boxed_slice();
        Self { octets, entries: Vec::with_capacity(BATCH) }
    }

    fn clear(&mut self) {
        self.entries.clear();
    }

    fn push(
        &mut self,
        datagram: usize,
        kind: ReplyKind,
        write: impl FnOnce(&mut [u8]) -> Result<usize, DropReason>,
    ) -> Result<(), DropReason> {
        // A batch has no more answers than datagrams.
        let room = self.octets.chunks_exact_mut(MAX_RETRY_LEN).nth(self.entries.len());
        let len = write(room.ok_or(DropReason::Malformed)?)?;
        self.entries.push(ReplyEntry { datagram, kind, len });
        Ok(())
    }

    fn iter(&self) -> impl Iterator<Item = Reply<'_>> {
        let octets = self.octets.chunks_exact(MAX_RETRY_LEN);
        self.entries.iter().zip(octets).map(|(&ReplyEntry { datagram, kind, len }, octets)| Reply {
            datagram,
            kind,
            octets: &octets[..len],
        })
    }
}

/// All that a decision depends on besides what is remembered.
struct Question<'a> {
    now: Instant,
    listener: usize,
    path: &'a ClientPath,
    /// Octets of the datagram.
    len: usize,
    packet: Result<Packet<'a>, Malformed>,
    decoded: Result<Decoded, Unroutable>,
}

/// The backend of a packet, and the rule that found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The backend.
    pub backend: BackendId,
    /// The rule.
    pub rule: Rule,
}

/// How a decision came about.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// The rules that were asked, in order; the last one answered, if any did.
    pub steps: Vec<Step>,
    /// What admission saw, if a backend was found.
    pub admission: Option<AdmissionStep>,
    /// What came out.
    pub outcome: Outcome,
}

/// What comes out of a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is forwarded.
    Forward {
        /// Where to, and why.
        answer: Answer,
        /// Whether the client gets a Retry besides.
        retry: bool,
    },
    /// It is answered and not forwarded.
    Reply(ReplyKind),
    /// Neither.
    Drop(DropReason),
}

/// The step of admission.
#[derive(Clone, Debug)]
pub struct AdmissionStep {
    /// Whether addresses are being validated: a label of [`crate::admission::mode::Phase`].
    pub phase: &'static str,
    /// What it saw, for people.
    pub saw: String,
}

/// One rule.
#[derive(Clone, Debug)]
pub struct Step {
    /// Which.
    pub rule: Rule,
    /// What it saw, for people.
    pub saw: String,
    /// What it answered.
    pub backend: Option<BackendId>,
}

/// Somebody who wants to know how a decision comes about.
trait Trace {
    fn step(&mut self, rule: Rule, backend: Option<BackendId>, saw: impl FnOnce() -> String);
}

/// Nobody: what the packet path passes.
struct Untraced;

impl Trace for Untraced {
    fn step(&mut self, _: Rule, _: Option<BackendId>, _: impl FnOnce() -> String) {}
}

impl Trace for Vec<Step> {
    fn step(&mut self, rule: Rule, backend: Option<BackendId>, saw: impl FnOnce() -> String) {
        self.push(Step { rule, saw: saw(), backend });
    }
}

/// What the rules saw, in words.
mod saw {
    use super::*;

    pub(super) fn decoded(
        pool: &PoolRoute,
        decoded: Result<Decoded, Unroutable>,
        present: Option<BackendId>,
    ) -> String {
        match decoded {
            _ if !pool.routable => format!("pool {} has no quic_lb configuration", pool.name),
            Err(unroutable) => unroutable.to_string(),
            Ok(Decoded { config_id, server_id }) if present.is_some() => {
                format!("config {config_id}, server ID {server_id}")
            }
            Ok(Decoded { config_id, server_id }) => {
                format!("config {config_id}, server ID {server_id}, which no backend has")
            }
        }
    }

    pub(super) fn handshake(
        packet: Packet<'_>,
        remembered: Option<BackendId>,
        present: Option<BackendId>,
    ) -> String {
        let ids = "this 4-tuple and source connection ID are";
        match (packet, remembered, present) {
            (Packet::Short(_), ..) => "a short header has no source connection ID".into(),
            (_, None, _) => format!("{ids} not remembered"),
            (_, _, Some(_)) => format!("{ids} remembered"),
            (_, Some(_), None) => format!("{ids} remembered with a backend that is down or gone"),
        }
    }

    pub(super) fn learnt(remembered: Option<BackendId>) -> String {
        match remembered {
            None => "no server was seen to use this connection ID".into(),
            Some(_) => "a server was seen to use this connection ID".into(),
        }
    }

    pub(super) fn four_tuple(remembered: Option<BackendId>, present: Option<BackendId>) -> String {
        match (remembered, present) {
            (None, _) => "this 4-tuple is not remembered".into(),
            (Some(_), Some(_)) => "this 4-tuple is remembered".into(),
            (Some(_), None) => "this 4-tuple is remembered, which does not bind this packet".into(),
        }
    }

    pub(super) fn fallback(key: FallbackKey<'_>) -> String {
        match key {
            FallbackKey::ConnectionId(_) => "hashed the destination connection ID".into(),
            FallbackKey::Client(_) => "hashed the client's address and port".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use proptest::prelude::*;

    use super::*;
    use crate::{
        fixtures::{self, cid_config, server_id},
        registry::Registry,
    };

    const V1: u32 = 1;

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
            let memory = Arc::new(Memory::new(1000, Duration::from_secs(180), now));
            let mut registry = Registry::default();
            let routing =
                Routing::new(&fixtures::config(routable), &mut registry, |_, _| Default::default());
            let idle = Duration::from_secs(180);
            let limits = FlowLimits { max_flows, idle, unanswered: Duration::from_secs(10) };
            let birth = Birth { clock: Clock { now, unix: UNIX_EPOCH }, seed: [7; 32] };
            let forwarder = Forwarder::new(limits, Arc::new(routing), Arc::clone(&memory), &birth);
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
            let path = path(port);
            let mut verdict = [Verdict::Drop(DropReason::Empty)];
            self.forwarder.decide_batch(self.now, 0, &[Datagram { path, octets }], &mut verdict);
            verdict[0]
        }

        /// The backend's name, the rule, and the flow that a datagram was forwarded with.
        fn forwarded(&mut self, port: u16, octets: &[u8]) -> (String, Rule, FlowId) {
            match self.send(port, octets) {
                Verdict::Forward { flow, rule, .. } => {
                    let backend = self.forwarder.flow(flow).backend;
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
        let (backend, rule, _) =
            bench.forwarded(1, &long(0x1a2a_3a4a, &routable_cid(2, 1), &[3; 200]));
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
        assert_eq!(bench.memory.sizes().1, 0);
        // One that decodes to somebody else would lead packets astray only if it were not learnt,
        // and rule 1 goes first in any case.
        let other = server % 3 + 1;
        bench.forwarder.returned(bench.now, flow, &long(V1, b"client", &routable_cid(other, 1)));
        assert_eq!(bench.memory.sizes().1, 1);
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
        let Verdict::Forward { flow, opening, .. } = bench.send(2, &datagram) else { panic!() };
        assert_eq!(opening, Opening::PathChange);
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
    fn draining_down_and_miswired_backends_keep_what_they_have_and_get_nothing_new() {
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
        bench.reload_with(|_| {}, true, |_| BackendState::Draining);
        assert_eq!(
            bench.send(2, &long(V1, &[2; 8], b"other")),
            Verdict::Drop(DropReason::NoBackend)
        );
        assert_eq!(bench.forwarded(3, &short(&routable_cid(2, 1))).0, "b");
    }

    #[test]
    fn a_removed_backend_is_forgotten_and_its_flows_stay_open_for_returns() {
        let mut bench = Bench::new(true);
        let (_, _, flow) = bench.forwarded(1, &short(&routable_cid(1, 1)));
        bench.reload(|config| drop(config.pools[0].backends.remove(0)), true);
        assert_ne!(bench.forwarded(1, &short(&routable_cid(1, 1))).0, "a");
        assert!(bench.forwarder.upstream(flow).is_none());
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
        assert_eq!(
            bench.send(110, &short(&routable_cid(1, 1))),
            Verdict::Drop(DropReason::FlowLimit)
        );
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
        let given: Vec<_> = std::iter::from_fn(|| bench.forwarder.reclaim(now, new)).collect();
        assert!(!given.is_empty());
        assert_eq!(given, alike);
        assert_eq!(bench.forwarder.flow_count(), count - given.len());
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
        let explained = bench.forwarder.explain(bench.now, 0, &datagram);
        assert_eq!(explained.steps.len(), 5);
        assert_eq!(bench.forwarder.flow_count(), 0);
        let (_, rule, flow) = bench.forwarded(1, &hello);
        let backend = bench.forwarder.flow(flow).backend;
        let answer = Answer { backend, rule };
        assert_eq!(explained.outcome, Outcome::Forward { answer, retry: false });
        let explained = bench.forwarder.explain(bench.now, 0, &datagram);
        assert_eq!(explained.steps.last().map(|step| step.rule), Some(Rule::FourTupleScid));
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
            batched.forwarder.decide_batch(batched.now, 0, &batch, &mut verdicts);
            for ((port, octets), verdict) in datagrams.iter().zip(verdicts) {
                prop_assert_eq!(single.send(*port, octets), verdict);
            }
        }
    }
}
