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

mod replies;
mod trace;

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
    admission::{Arrival, Judgement, Ruling},
    backend::{BackendId, BackendState},
    client_path::{ClientPath, ListenerIndex},
    flows::{Claim, FlowTable},
    memory::Memory,
    routing::{FallbackKey, ListenerRoute, PoolRoute, Routing},
    verdict::{DropReason, FlowId, Opening, ReplyKind, Rule, TokenResult, Verdict},
};
use replies::Replies;
pub use replies::{BATCH, Reply};
pub use trace::Step;
use trace::{Trace, Untraced};

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
        listener: ListenerIndex,
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
        let route = routing.listener(listener);
        route.decoder.decode_batch(&cids[..count], &mut decoded[..count]);
        for index in 0..count {
            let question = Question {
                now,
                listener,
                route,
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
    pub fn explain(
        &self,
        now: Instant,
        listener: ListenerIndex,
        datagram: &Datagram<'_>,
    ) -> Explanation {
        let packet = Packet::read(datagram.octets);
        let route = self.routing.listener(listener);
        let decoded = match &packet {
            Ok(Packet::Long(header)) => route.decoder.decode(header.dcid),
            Ok(Packet::Short(header)) => route.decoder.decode(header.rest),
            Err(_) => Err(Unroutable::Empty),
        };
        let mut steps = Vec::new();
        let len = datagram.octets.len();
        let question =
            Question { now, listener, route, path: &datagram.path, len, packet, decoded };
        let routing = &self.routing;
        let answer = match self.route(routing, &question, &mut steps) {
            Ok(answer) => answer,
            Err(reason) => {
                return Explanation { steps, admission: None, outcome: Outcome::Drop(reason) };
            }
        };
        let judgement = self.judge(routing, &question, &answer);
        let limits = route.gate.limits();
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
        let phase = route.gate.phase(now).label();
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
        let sources = self.routing.pool(route.pool).source_addresses.as_slice();
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
        let &Question { now, listener, route, path, .. } = question;
        let judgement = self.judge(routing, question, &answer);
        self.tally.attempts += u64::from(judgement.attempt);
        if let Some(token) = judgement.token {
            self.tally.tokens[token as usize] += 1;
        }
        let (begins, validated) = match judgement.ruling {
            Ruling::Pass => (false, false),
            Ruling::Begin { validated, retry } => {
                let limits = route.gate.limits();
                if let Err(reason) = limits.take(now, path.client.ip()) {
                    return Verdict::Drop(reason);
                }
                if let Some(version) = retry {
                    // Without a Retry it is forwarded all the same.
                    let _ = self.reply_retry(question, version, index);
                }
                (true, validated)
            }
            Ruling::Retry(version) => {
                return match self.reply_retry(question, version, index) {
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
        let &Question { now, listener, route, path, len, packet, .. } = question;
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
                let mut pools = routing.pools_behind(route);
                pools.any(|pool| self.memory.connection_id(now, pool, header.dcid).is_some())
            }),
            Rule::FourTuple | Rule::Fallback => false,
        };
        let handshake = initial.and_then(|header| {
            self.memory.handshake_state(now, listener, path, header.dcid, header.scid)
        });
        route.gate.judge(&Arrival {
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
        question: &Question<'_>,
        version: Version,
        index: usize,
    ) -> Result<(), DropReason> {
        let Ok(Packet::Long(initial)) = &question.packet else { return Err(DropReason::Malformed) };
        let client = question.path.client;
        let unix = self.clock.unix_at(question.now);
        let tokens = question.route.gate.tokens();
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
        let &Question { now, listener, route, path, packet, decoded, .. } = question;
        let packet = packet.map_err(|malformed| match malformed {
            Malformed::Empty => DropReason::Empty,
            Malformed::Truncated => DropReason::Malformed,
        })?;
        // Whoever is in the table is in the snapshot.
        let present = decoded.ok().and_then(|decoded| route.server(&decoded));
        trace.step(Rule::Cid, present, || trace::decoded(routing, route, decoded, present));
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
        trace.step(Rule::FourTupleScid, present, || trace::handshake(packet, remembered, present));
        if let Some(backend) = present {
            return Ok(Answer { backend, rule: Rule::FourTupleScid });
        }

        let remembered = routing.pools_behind(route).find_map(|pool| match packet {
            Packet::Long(header) => self.memory.connection_id(now, pool, header.dcid),
            Packet::Short(header) => self.memory.connection_id_in_front(now, pool, header.rest),
        });
        let present = remembered.filter(|&id| routing.backend(id).is_some());
        trace.step(Rule::Dcid, present, || trace::learnt(remembered));
        if let Some(backend) = present {
            return Ok(Answer { backend, rule: Rule::Dcid });
        }

        let remembered = self.flows.of_path(listener, path);
        let present = remembered.filter(|&id| may_keep(routing, packet, id));
        trace.step(Rule::FourTuple, present, || trace::four_tuple(remembered, present));
        if let Some(backend) = present {
            return Ok(Answer { backend, rule: Rule::FourTuple });
        }

        let pool = routing.pool(route.default_pool);
        let key = fallback_key(pool, packet, path);
        let present = pool.fallback(key);
        trace.step(Rule::Fallback, present, || trace::fallback(key));
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
        let Some(server) = self.routing.backend(backend) else { return };
        let route = self.routing.listener(listener);
        let decoded = route.decoder.decode(header.scid);
        if decoded.is_ok_and(|decoded| route.server(&decoded) == Some(backend)) {
            return;
        }
        let pool = self.routing.pool(server.pool);
        self.memory.learn_connection_id(now, pool, header.scid, backend);
    }
}

/// Whether the 4-tuple's memory decides about this packet.
fn may_keep(routing: &Routing, packet: Packet<'_>, id: BackendId) -> bool {
    let Some(backend) = routing.backend(id) else { return false };
    match packet {
        Packet::Short(_) => true,
        // A long header that got here begins a connection, which has no claim on the backend of
        // another one: where connection IDs are routable it is free to go elsewhere, and a backend
        // that takes no new connections does not get it.
        Packet::Long(_) => {
            !routing.pool(backend.pool).routable && backend.state == BackendState::Active
        }
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

/// All that a decision depends on besides what is remembered.
struct Question<'a> {
    now: Instant,
    listener: ListenerIndex,
    /// What the listener leads to.
    route: &'a ListenerRoute,
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

#[cfg(test)]
mod tests;
