//! The decision about each datagram, pure: time comes in, a verdict goes out.
//!
//! ```text
//! invariants ──► known ──────────────► admit ────────────► choose ──────────► flow
//!                rules 1 to 4:         may what begins     rule 5, where      client path
//!                whose is it?          something begin?    nobody is known    and backend
//! ```
//!
//! The worker that owns a forwarder carries its verdicts out; the simulator and `explain` run the
//! same code. Nothing here reads a clock, draws from the system's randomness, opens a socket or
//! allocates per datagram: the same seed, snapshots and datagrams give the same verdicts.
//!
//! Admission stands between the rules that know and the one that chooses: a packet that it answers or
//! drops gets that verdict although no backend may take connections, and one that it lets through has
//! taken its limits when it turns out that none does.
//!
//! | part | what it is for |
//! | --- | --- |
//! | `rules` | which server is known, which one is chosen |
//! | `admit` | what admission is told |
//! | `replies` | what the balancer answers by itself |
//! | `explain` | the decision told and not taken |
//! | `trace` | what the rules saw, in words |
//! | `clock` | the time, on both clocks |
//!
//! The rules are those of draft-ietf-quic-load-balancers-21, section 4: routable connection ID;
//! remembered (4-tuple, source connection ID) of a long header; remembered connection ID;
//! remembered 4-tuple; consistent hashing. An unroutable connection ID is never a reason to drop.

mod admit;
mod clock;
mod explain;
mod replies;
mod rules;
mod trace;

use std::{array, fmt, sync::Arc, time::Instant};

use quic::{
    bucket::Bucket,
    header::Version,
    initial,
    invariants::{LongHeader, Malformed, Packet},
    random::Random,
    routable::{ConfigId, Unroutable},
};

#[cfg(test)]
use crate::fixtures;
pub use crate::flows::{Flow, OnFailure};
use crate::{
    admission::Ruling,
    affinity::AffinityTable,
    backend::{BackendId, BackendState},
    bounded::Use,
    cid_tag::CidTag,
    client_path::{ClientAddr, ClientPath, ListenerIndex},
    counters::WorkerCounters,
    flows::{Claim, FlowTable, Found, HandedFlow, Shown, census::ConfigIndex},
    memory::{Lookup, Memory, NewHandshake},
    routing::{BackendRoute, Forwarding, Routing},
    succession::HashKeys,
    verdict::{
        DropReason, Ended, FlowId, Opened, Opening, ReplyKind, Rule, TokenResult, Verdict, Via,
    },
};
pub use clock::Clock;
pub use explain::{AdmissionStep, Explanation, Outcome};
use replies::Replies;
pub use replies::{BATCH, Reply};
pub use rules::Datagram;
use rules::{Known, Question, Rules};
pub use trace::Step;
use trace::Untraced;

/// How many clients a worker tells in a second, and how many at once, that their tokens are invalid. To tell one takes opening its
/// Initial and sealing the answer with keys derived for each, some microseconds: at this rate less than a hundredth of a worker's
/// time. Those beyond are dropped.
const REFUSALS_PER_SECOND: u32 = 1000;
const REFUSALS_AT_ONCE: u32 = 100;

/// What a forwarder is started with.
#[derive(Clone, Copy)]
pub struct Start {
    /// The time, on both clocks.
    pub clock: Clock,
    /// What its randomness and the keys of its hashes come from: a secret that no two forwarders share.
    pub seed: [u8; 32],
}

impl fmt::Debug for Start {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Start").field("clock", &self.clock).finish_non_exhaustive()
    }
}

/// What admission saw of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Tally {
    /// Attempts to begin a connection.
    pub attempts: u64,
    /// Tokens looked at, by result.
    pub tokens: [u64; TokenResult::ALL.len()],
    /// Short headers with a connection ID of a server that nobody knows, by configuration.
    pub unknown_server_ids: [u64; ConfigId::COUNT],
}

/// What a datagram from a backend is to the flow that it came by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Returned {
    /// For somebody who had the upstream port before.
    Stale,
    /// For the client, as far as can be seen.
    ForClient {
        /// Whose connection ID the server has answered with, if that is new on this flow.
        named: Option<AnsweredAs>,
        /// Whether it is the first answer to the first flight that the flow began with.
        is_first: bool,
    },
}

/// Whose connection ID a server has answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnsweredAs {
    /// Its own.
    Itself,
    /// One that leads to another server, which has never heard of the connection.
    Another(BackendId),
    /// One that leads nowhere in particular.
    Nobody,
}

/// The forwarder of one worker.
#[derive(Debug)]
pub struct Forwarder {
    routing: Arc<Routing>,
    memory: Arc<Memory>,
    flows: FlowTable,
    affinity: AffinityTable,
    /// Those of the two.
    hash_keys: HashKeys,
    clock: Clock,
    random: Random,
    replies: Replies,
    refusals: Bucket,
    tally: Tally,
    /// The datagram of the batch at hand that is being looked at, if it is one.
    at: Option<usize>,
}

impl Forwarder {
    /// A forwarder without flows, and with room for `max_flows` and as many client paths.
    #[must_use]
    pub fn new(
        max_flows: usize,
        routing: Arc<Routing>,
        memory: Arc<Memory>,
        start: &Start,
    ) -> Self {
        let mut random = Random::new(start.seed);
        let hash_keys = HashKeys::new(array::from_fn(|_| random.number()));
        Self::with(max_flows, routing, memory, start.clock, random, hash_keys)
    }

    /// One that can take over the flows of a forwarder in another process, which has these keys. Its randomness is its own.
    pub(crate) fn succeeding(
        max_flows: usize,
        routing: Arc<Routing>,
        memory: Arc<Memory>,
        start: &Start,
        hash_keys: HashKeys,
    ) -> Self {
        let random = Random::new(start.seed);
        Self::with(max_flows, routing, memory, start.clock, random, hash_keys)
    }

    fn with(
        max_flows: usize,
        routing: Arc<Routing>,
        memory: Arc<Memory>,
        clock: Clock,
        random: Random,
        hash_keys: HashKeys,
    ) -> Self {
        let hash = hash_keys.hasher();
        Self {
            routing,
            memory,
            flows: FlowTable::new(max_flows, clock.now, &hash),
            affinity: AffinityTable::new(max_flows, clock.now, &hash),
            hash_keys,
            clock,
            random,
            replies: Replies::new(),
            refusals: Bucket::new(clock.now, REFUSALS_PER_SECOND, REFUSALS_AT_ONCE),
            tally: Tally::default(),
            at: None,
        }
    }

    /// Says what time it is, now and then, so that a clock that was set is followed.
    pub fn set_clock(&mut self, clock: Clock) {
        self.clock = clock;
    }

    /// Replaces the routing snapshot, and with it every setting that may change while the process
    /// runs. Flows stay as they are.
    pub fn set_routing(&mut self, routing: Arc<Routing>) {
        self.routing = routing;
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
            self.at = Some(index);
            packets[index] = Packet::read(datagram.octets);
            cids[index] = match &packets[index] {
                Ok(Packet::Long(header)) => header.dcid,
                Ok(Packet::Short(header)) => header.rest,
                Err(_) => &[],
            };
        }
        self.at = None;
        self.replies.clear();
        self.tally = Tally::default();
        // The snapshot is taken out for the loop so that the flow table can change meanwhile.
        let routing = Arc::clone(&self.routing);
        let route = routing.listener(listener);
        let lookup = &self.memory.lookup(now, &routing.lifetimes, Use::Prolong);
        #[cfg(test)]
        datagrams
            .iter()
            .for_each(|datagram| fixtures::trip(fixtures::AT_DECODING, datagram.octets));
        route.decoder.decode_batch(&cids[..count], &mut decoded[..count]);
        for index in 0..count {
            self.at = Some(index);
            verdicts[index] = match packets[index] {
                Ok(packet) => {
                    let Datagram { path, octets } = &datagrams[index];
                    let decoded = decoded[index];
                    let question =
                        Question { now, listener, route, path, octets, packet, decoded, lookup };
                    self.verdict(&routing, &question, index)
                }
                Err(malformed) => Verdict::Drop(malformed.into()),
            };
        }
        self.at = None;
    }

    /// The number, in its batch, of the datagram that is being decided about; `None` between batches and while
    /// connection IDs are decoded, which is done to all of them side by side.
    pub(crate) const fn at(&self) -> Option<usize> {
        self.at
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
    /// changes nothing: what is looked up for it lives no longer than it would have.
    #[must_use]
    pub fn explain(
        &self,
        now: Instant,
        listener: ListenerIndex,
        datagram: &Datagram<'_>,
    ) -> Explanation {
        #[cfg(test)]
        fixtures::trip(fixtures::AT_DECODING, datagram.octets);
        let rules = self.rules(&self.routing);
        explain::explain(&rules, &self.clock, &self.refusals, now, listener, datagram)
    }

    /// Whether this forwarder has seen the client path, which the kernel gives to one worker alone.
    pub(crate) fn knows(&self, listener: ListenerIndex, path: &ClientPath) -> bool {
        self.affinity.get(listener, path).is_some()
    }

    /// Takes note of a datagram that the backend of `flow` has sent; says whether it is for the client
    /// of that flow, as far as can be seen, and whose connection ID it came with. What a server goes on
    /// sending to the client that had the port before is for nobody.
    pub fn returned(&mut self, now: Instant, flow: FlowId, octets: &[u8]) -> Returned {
        #[cfg(test)]
        fixtures::trip(fixtures::AT_RETURN, octets);
        let (mut len, mut answered_as) = (octets.len(), None);
        // Only long headers show connection IDs and their lengths.
        if octets.first().is_some_and(|first| first & 0x80 != 0)
            && let Ok(Packet::Long(header)) = Packet::read(octets)
        {
            if !self.flows.is_for(flow, header.dcid) {
                return Returned::Stale;
            }
            answered_as = self.learn(now, flow, &header);
            if header.version == 0 {
                len = 0;
            }
        }
        let is_first = self.answered(now, flow, len, 1);
        Returned::ForClient { named: answered_as, is_first }
    }

    /// As [`Self::returned`], of `count` datagrams with short headers, of which `octets` are the first: nothing in
    /// them is for us, and each has as many octets, or the last one fewer.
    pub fn returned_short(&mut self, now: Instant, flow: FlowId, octets: &[u8], count: usize) {
        #[cfg(test)]
        fixtures::trip(fixtures::AT_RETURN, octets);
        // Servers answer a first flight with a long header.
        let _ = self.answered(now, flow, octets.len(), count);
    }

    fn answered(&mut self, now: Instant, flow: FlowId, len: usize, count: usize) -> bool {
        let Self { routing, flows, affinity, .. } = self;
        flows.answered(now, flow, len, count, affinity, |id| {
            routing.backend(id).is_none_or(|backend| backend.state == BackendState::Down)
        })
    }

    /// Says what to do about `flow`, which the last batch started, whose upstream socket could not be
    /// opened for the reason `why`.
    pub fn flow_failed(&mut self, now: Instant, flow: FlowId, why: DropReason) -> OnFailure {
        self.flows.fail(now, flow, why, &mut self.affinity)
    }

    /// Whether `flow` began with a first flight, which nothing came of yet.
    #[inline]
    pub(crate) fn asks(&self, flow: FlowId) -> bool {
        self.flows.asks(flow)
    }

    /// Ends a flow whose backend has refused the first flight that it began with, and says what is to carry its `datagrams` to another
    /// backend, which has not `refused` them: their handshakes are the other one's from now on. `None` where nothing can be
    /// done, and nothing has changed; the second is `None` where there is no room.
    pub(crate) fn refused<'a>(
        &mut self,
        now: Instant,
        flow: FlowId,
        datagrams: impl Iterator<Item = &'a [u8]> + Clone,
        refused: impl Iterator<Item = BackendId> + Clone,
    ) -> Option<(Ended, Option<(BackendId, Via)>)> {
        if !self.flows.asks(flow) {
            return None;
        }
        let long = |octets| match Packet::read(octets) {
            Ok(Packet::Long(header)) => Some(header),
            _ => None,
        };
        let routing = Arc::clone(&self.routing);
        let Flow { listener, path, backend } = *self.flows.get(flow);
        let headers = datagrams.filter_map(long);
        let first = headers.clone().next()?;
        if !routing.has_listener(listener) || routing.listener(listener).leaves {
            return None;
        }
        let pool = routing.pool(routing.listener(listener).default_pool);
        let key = rules::fallback_key(pool, Packet::Long(first), &path);
        let other = pool.fallback_after(key, refused.chain([backend]))?;
        if routing.forwarding(other) == Forwarding::Direct {
            return None;
        }
        let (ended, claim) = self.flows.refuse(now, flow, &mut self.affinity)?;
        let validated = claim == Claim::Validated;
        let lookup = &self.memory.lookup(now, &routing.lifetimes, Use::Prolong);
        for header in headers {
            self.memory.forget_handshake(listener, &path, &header, backend);
            let (header, path) = (&header, &path);
            let handshake = NewHandshake { listener, path, header, backend: other, validated };
            self.memory.remember_handshake(lookup, &handshake);
        }
        let shown = Shown {
            cid: None,
            config: ConfigIndex::NONE,
            dcid: first.dcid,
            scid: Some(first.scid),
            validated,
            asks: true,
        };
        // Another connection of its client may be there.
        if let Some(Found { flow, .. }) = self.flows.find(now, listener, &path, other, &shown) {
            return Some((ended, Some((other, Via::Flow(flow)))));
        }
        let flow = Flow { listener, path, backend: other };
        let opened = self.flows.open(now, flow, claim, &shown, &mut self.affinity);
        let via = opened.map(|(flow, evicted)| {
            Via::NewFlow(Opened { flow, evicted, opening: Opening::New, asks: true })
        });
        Some((ended, via.map(|via| (other, via))))
    }

    /// Ends flows that have been idle for too long and appends them to `expired`, and forgets client
    /// paths that nothing came from for as long. Sixteen calls look at everything once.
    pub fn sweep(&mut self, now: Instant, expired: &mut Vec<Ended>) {
        let Self { routing, memory, flows, affinity, .. } = self;
        let lifetimes = &routing.lifetimes;
        let lookup = memory.lookup(now, lifetimes, Use::Prolong);
        let in_use = |backend, cid| memory.remember_connection(&lookup, backend, cid);
        flows.sweep(now, lifetimes, affinity, expired, in_use);
        affinity.sweep(now, lifetimes.flow_idle);
    }

    /// Tells `counters` of the live connections of each backend, whenever the sweep has been through, and of flows that
    /// have ended without any answer.
    pub fn tell_live(&mut self, counters: &WorkerCounters) {
        for (slot, count) in self.flows.take_unanswered() {
            counters.backends[slot].unanswered.add(count);
        }
        let Self { flows, memory, .. } = self;
        let millis =
            |moment| u64::try_from(memory.since_epoch(moment).as_millis()).unwrap_or(u64::MAX - 1);
        for (slot, live) in flows.take_census().unwrap_or(&[]).iter().enumerate() {
            counters.backends[slot].live.publish(live, millis);
        }
    }

    /// The flow behind a number from a verdict.
    #[must_use]
    pub fn flow(&self, flow: FlowId) -> &Flow {
        self.flows.get(flow)
    }

    /// Whether the client of a flow began it with a valid token.
    pub(crate) fn is_validated(&self, flow: FlowId) -> bool {
        self.flows.is_validated(flow)
    }

    /// The connection ID of a server that the client of a flow uses.
    pub(crate) fn cid_of(&self, flow: FlowId) -> Option<CidTag> {
        self.flows.cid(flow)
    }

    /// The keys of its hashes, for a successor.
    pub(crate) const fn hash_keys(&self) -> HashKeys {
        self.hash_keys
    }

    /// Its flows, in the order in which a successor is to take them over.
    pub(crate) fn flows_by_last_use(&self) -> Vec<FlowId> {
        self.flows.by_last_use()
    }

    /// What a successor has to know of a flow.
    pub(crate) fn handed(&self, now: Instant, flow: FlowId) -> Option<HandedFlow> {
        self.flows.handed(now, flow, &self.affinity)
    }

    /// Goes on with a flow of a predecessor, if there is room.
    pub(crate) fn take_over(&mut self, now: Instant, handed: HandedFlow) -> Option<FlowId> {
        let hashes_hold = self.hash_keys.mean_the_same_here();
        self.flows.take_over(now, handed, hashes_hold, &mut self.affinity)
    }

    /// How many flows there are.
    #[must_use]
    pub fn flow_count(&self) -> usize {
        self.flows.len()
    }

    /// How many have begun with a valid token so far, and come to nothing.
    #[must_use]
    pub const fn unfinished(&self) -> u64 {
        self.flows.unfinished()
    }

    /// How many of them have not shown that there is a client at their address.
    #[must_use]
    pub fn unproven_flow_count(&self) -> usize {
        self.flows.unproven()
    }

    /// The verdict on datagram number `index` of its batch.
    fn verdict(&mut self, routing: &Routing, question: &Question<'_>, index: usize) -> Verdict {
        #[cfg(test)]
        fixtures::trip(fixtures::AT_VERDICT, question.octets);
        let known = self.rules(routing).known(question, &mut Untraced);
        if known.is_none_or(|known| known.rule == Rule::FourTuple)
            && let Some(config) = question.unknown_server_id()
        {
            self.tally.unknown_server_ids[usize::from(config.get())] += 1;
        }
        let admitted = match (known, &question.packet) {
            (Some(_), Packet::Short(_)) => Admitted { begins: false, validated: false },
            _ => match self.admit(routing, question, known, index) {
                Ok(admitted) => admitted,
                Err(verdict) => return verdict,
            },
        };
        let found = known.or_else(|| {
            let backend = self.rules(routing).choose(question, &mut Untraced)?;
            Some(Known { rule: Rule::Fallback, backend, cid_len: 0 })
        });
        match found {
            Some(known) => self.forward(routing, question, known, admitted),
            None => Verdict::Drop(DropReason::NoBackend),
        }
    }

    /// Whether a packet may go on. What admission says of it is counted, whatever limits it takes
    /// part in are taken, and a Retry is written where one is due.
    fn admit(
        &mut self,
        routing: &Routing,
        question: &Question<'_>,
        known: Option<Known>,
        index: usize,
    ) -> Result<Admitted, Verdict> {
        let judgement = self.rules(routing).judge(question, known, &self.clock);
        self.tally.attempts += u64::from(judgement.attempt);
        if let Some(token) = judgement.token {
            self.tally.tokens[token as usize] += 1;
        }
        match judgement.ruling {
            Ruling::Pass => Ok(Admitted { begins: false, validated: false }),
            Ruling::Begin { validated, retry } => {
                let limits = question.route.gate.limits();
                limits.take(question.now, question.path.client.ip()).map_err(Verdict::Drop)?;
                if let Some(version) = retry {
                    // Without a Retry it is forwarded all the same.
                    let _ = self.reply_retry(question, version, index);
                }
                Ok(Admitted { begins: true, validated })
            }
            Ruling::Retry(version) => Err(match self.reply_retry(question, version, index) {
                Ok(()) => Verdict::Reply(ReplyKind::Retry),
                Err(reason) => Verdict::Drop(reason),
            }),
            Ruling::Refuse(version) => Err(match self.reply_refusal(question, version, index) {
                Ok(()) => Verdict::Reply(ReplyKind::InvalidToken),
                Err(reason) => Verdict::Drop(reason),
            }),
            Ruling::Drop(reason) => Err(Verdict::Drop(reason)),
        }
    }

    /// By what means a packet goes to its backend: where that takes a flow, a new one if there is none.
    fn forward(
        &mut self,
        routing: &Routing,
        question: &Question<'_>,
        known: Known,
        admitted: Admitted,
    ) -> Verdict {
        let &Question { now, listener, path, lookup, .. } = question;
        let Known { rule, backend, cid_len } = known;
        let Admitted { begins, validated } = admitted;
        let scid = match &question.packet {
            Packet::Long(header) => {
                if validated || matches!(rule, Rule::FourTuple | Rule::Fallback) {
                    let handshake = NewHandshake { listener, path, header, backend, validated };
                    self.memory.remember_handshake(lookup, &handshake);
                }
                Some(header.scid)
            }
            Packet::Short(_) => None,
        };
        let dcid = question.dcid();
        let cid = dcid.get(..cid_len).filter(|cid| !cid.is_empty());
        let config = match cid {
            Some(cid) if rule == Rule::Cid => ConfigIndex::of_routable(cid),
            _ => ConfigIndex::NONE,
        };
        let asks = begins && rule == Rule::Fallback;
        let shown = Shown { cid: cid.map(CidTag::new), config, dcid, scid, validated, asks };
        let forward = |via| Verdict::Forward { backend, rule, via };
        if let Some(Found { flow, seen }) = self.flows.find(now, listener, path, backend, &shown) {
            if let Some(cid) = seen {
                self.memory.remember_connection(lookup, backend, cid);
            }
            if rule == Rule::FourTuple && scid.is_none() {
                self.learn_used(routing, lookup, now, flow, dcid);
            }
            return forward(Via::Flow(flow));
        }
        if let Some(reason) = question.route.gate.refuse(path.client, path.local) {
            return Verdict::Drop(reason);
        }
        if routing.forwarding(backend) == Forwarding::Direct {
            self.affinity.used(now, listener, path, backend);
            return forward(Via::Direct);
        }
        let (opening, attempts) = match rule {
            Rule::Cid | Rule::Dcid if scid.is_none() => (Opening::PathChange, 1),
            _ => (Opening::New, 0),
        };
        self.tally.attempts += attempts;
        let may_move = |cid| self.memory.may_move(lookup, backend, cid);
        let claim = match shown.cid {
            _ if validated => Claim::Validated,
            Some(cid) if !begins && may_move(cid) => Claim::Known,
            Some(_) if !begins => Claim::Routable,
            _ => Claim::None,
        };
        let flow = Flow { listener, path: *path, backend };
        match self.flows.open(now, flow, claim, &shown, &mut self.affinity) {
            Some((flow, evicted)) => {
                if let Some(cid) = cid.filter(|_| rule == Rule::Dcid) {
                    self.flows.set_cid_len(flow, cid.len());
                }
                forward(Via::NewFlow(Opened { flow, evicted, opening, asks }))
            }
            None => Verdict::Drop(DropReason::FlowLimit),
        }
    }

    #[inline]
    fn rules<'a>(&'a self, routing: &'a Routing) -> Rules<'a> {
        let Self { memory, affinity, flows, .. } = self;
        Rules { routing, memory, affinity, flows }
    }

    /// Adds the Retry that answers datagram number `index` to the replies.
    fn reply_retry(
        &mut self,
        question: &Question<'_>,
        version: Version,
        index: usize,
    ) -> Result<(), DropReason> {
        let Packet::Long(initial) = &question.packet else { return Err(DropReason::Malformed) };
        let ClientAddr(client) = question.path.client;
        let unix = self.clock.unix_at(question.now);
        let tokens = question.route.gate.tokens();
        let random = &mut self.random;
        self.replies.push(index, ReplyKind::Retry, |out| {
            // Never more than came in.
            let room = out.len().min(question.octets.len());
            tokens.write_retry(random, version, initial, client, unix, &mut out[..room])
        })
    }

    /// Adds the refusal of datagram number `index` to the replies, if one more client may be told, and if a client sent it:
    /// what was changed on the way would end a handshake that the next repetition would go on with.
    fn reply_refusal(
        &mut self,
        question: &Question<'_>,
        version: Version,
        index: usize,
    ) -> Result<(), DropReason> {
        let Packet::Long(header) = &question.packet else { return Err(DropReason::Malformed) };
        if !self.refusals.take(question.now) || !initial::is_authentic(question.octets) {
            return Err(DropReason::InvalidToken);
        }
        let tokens = question.route.gate.tokens();
        let random = &mut self.random;
        self.replies.push(index, ReplyKind::InvalidToken, |out| {
            // Never more than came in.
            let room = out.len().min(question.octets.len());
            tokens.write_refusal(random, version, header, &mut out[..room])
        })
    }

    /// Learns from a long header of the backend of `flow` which connection ID it has: if that is not a
    /// routable one, so that the connection survives a rebinding of the client too; if the client has
    /// proved its address, so that its handshake does.
    fn learn(&mut self, now: Instant, flow: FlowId, header: &LongHeader<'_>) -> Option<AnsweredAs> {
        // Version Negotiation echoes the client's connection IDs; they are not the server's.
        if header.version == 0 || header.scid.is_empty() || !self.flows.is_news(flow, header.scid) {
            return None;
        }
        let &Flow { listener, backend, .. } = self.flows.get(flow);
        let server = self.routing.backend(backend)?;
        let lookup = self.memory.lookup(now, &self.routing.lifetimes, Use::Prolong);
        if self.flows.is_validated(flow) {
            self.memory.remember_given(&lookup, header.scid, backend);
        }
        let route = self.routing.listener(listener);
        let decoded = route.decoder.decode(header.scid);
        let named = decoded.ok().and_then(|decoded| route.server(&decoded));
        if named == Some(backend) {
            return Some(AnsweredAs::Itself);
        }
        let pool = self.routing.pool(server.pool);
        // Connections that share a flow take turns.
        let is_known = self.memory.connection_id(&lookup, pool, header.scid).is_some();
        if !is_known && self.flows.may_learn(now, flow) {
            self.memory.learn_connection_id(&lookup, pool, header.scid, backend);
        }
        // The same server may be in several pools.
        let is_another = |other: &&BackendRoute| other.address != server.address;
        let another = named.and_then(|named| self.routing.backend(named)).filter(is_another);
        Some(another.map_or(AnsweredAs::Nobody, |another| AnsweredAs::Another(another.id)))
    }

    /// Learns the connection ID at the front of `dcid` that a client goes on using on the path of
    /// `flow` while its server goes on answering. Servers hand out most of their IDs where nobody can
    /// read them; they are as long as the one that was seen.
    ///
    /// Whoever sends from a path of their own can have IDs learnt for their own server, a few of each
    /// flow and none that is known to be another's; to harm somebody they have to know an ID that was
    /// never used before, which is to be on the path.
    fn learn_used(
        &mut self,
        routing: &Routing,
        lookup: &Lookup,
        now: Instant,
        flow: FlowId,
        dcid: &[u8],
    ) {
        let Some(cid) = self.flows.cid_in_use(now, flow, dcid) else { return };
        let backend = self.flows.get(flow).backend;
        if let Some(server) = routing.backend(backend)
            && self.flows.may_learn(now, flow)
        {
            let pool = routing.pool(server.pool);
            self.memory.learn_connection_id(lookup, pool, cid, backend);
        }
    }
}

/// What admission made of a packet that goes on.
#[derive(Clone, Copy)]
struct Admitted {
    /// Whether it begins something.
    begins: bool,
    /// Whether its client has proved its address.
    validated: bool,
}

#[cfg(test)]
mod tests;
