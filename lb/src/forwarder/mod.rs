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

use std::{sync::Arc, time::Instant};

use quic::{
    header::Version,
    invariants::{Malformed, Packet},
    random::Random,
    routable::Unroutable,
};

pub use crate::flows::{Flow, OnFailure};
use crate::{
    admission::Ruling,
    affinity::AffinityTable,
    backend::BackendId,
    client_path::{ClientAddr, ClientPath, ListenerIndex},
    flows::{Claim, FlowTable},
    memory::{Memory, NewHandshake, Use},
    routing::{Forwarding, Routing},
    verdict::{DropReason, FlowId, Opened, Opening, ReplyKind, Rule, TokenResult, Verdict, Via},
};
pub use clock::Clock;
pub use explain::{AdmissionStep, Explanation, Outcome};
use replies::Replies;
pub use replies::{BATCH, Reply};
pub use rules::Datagram;
use rules::{Known, Question, Rules};
pub use trace::Step;
use trace::Untraced;

/// What a forwarder is started with.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// The time, on both clocks.
    pub clock: Clock,
    /// What its randomness and the keys of its hashes come from: a secret that no two forwarders share.
    pub seed: [u8; 32],
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
    affinity: AffinityTable,
    hash: ahash::RandomState,
    clock: Clock,
    random: Random,
    replies: Replies,
    tally: Tally,
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
        let hash = hasher(&mut random);
        Self {
            routing,
            memory,
            flows: FlowTable::new(max_flows, &hash),
            affinity: AffinityTable::new(max_flows, start.clock.now, &hash),
            hash,
            clock: start.clock,
            random,
            replies: Replies::new(),
            tally: Tally::default(),
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
        let lookup = &self.memory.lookup(now, &routing.lifetimes, Use::Prolong);
        route.decoder.decode_batch(&cids[..count], &mut decoded[..count]);
        for index in 0..count {
            verdicts[index] = match packets[index] {
                Ok(packet) => {
                    let Datagram { path, octets } = &datagrams[index];
                    let (len, decoded) = (octets.len(), decoded[index]);
                    let question =
                        Question { now, listener, route, path, len, packet, decoded, lookup };
                    self.verdict(&routing, &question, index)
                }
                Err(malformed) => Verdict::Drop(malformed.into()),
            };
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
    /// changes nothing: what is looked up for it lives no longer than it would have.
    #[must_use]
    pub fn explain(
        &self,
        now: Instant,
        listener: ListenerIndex,
        datagram: &Datagram<'_>,
    ) -> Explanation {
        explain::explain(&self.rules(&self.routing), &self.clock, now, listener, datagram)
    }

    /// Whether this forwarder has seen the client path, which the kernel gives to one worker alone.
    pub(crate) fn knows(&self, listener: ListenerIndex, path: &ClientPath) -> bool {
        self.affinity.get(listener, path).is_some()
    }

    /// Takes note of a datagram that the backend of `flow` has sent to the client.
    pub fn returned(&mut self, now: Instant, flow: FlowId, octets: &[u8]) {
        self.flows.answered(now, flow);
        // Only long headers show the server's connection ID and its length.
        if octets.first().is_some_and(|first| first & 0x80 != 0) {
            self.learn(now, flow, octets);
        }
    }

    /// Says what to do about `flow`, which the last batch started, whose upstream socket could not be
    /// opened for the reason `why`.
    pub fn flow_failed(&mut self, now: Instant, flow: FlowId, why: DropReason) -> OnFailure {
        self.flows.fail(now, flow, why, &mut self.affinity)
    }

    /// Ends flows that have been idle for too long and appends them to `expired`, and forgets client
    /// paths that nothing came from for as long. Sixteen calls look at everything once.
    pub fn sweep(&mut self, now: Instant, expired: &mut Vec<FlowId>) {
        let lifetimes = &self.routing.lifetimes;
        self.flows.sweep(now, lifetimes, &mut self.affinity, expired);
        self.affinity.sweep(now, lifetimes.flow_idle);
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

    /// The verdict on datagram number `index` of its batch.
    fn verdict(&mut self, routing: &Routing, question: &Question<'_>, index: usize) -> Verdict {
        let known = self.rules(routing).known(question, &mut Untraced);
        let admitted = match (known, &question.packet) {
            (Some(_), Packet::Short(_)) => Admitted { begins: false, validated: false },
            _ => match self.admit(routing, question, known, index) {
                Ok(admitted) => admitted,
                Err(verdict) => return verdict,
            },
        };
        let found = known.or_else(|| {
            let backend = self.rules(routing).choose(question, &mut Untraced)?;
            Some(Known { rule: Rule::Fallback, backend })
        });
        match found {
            Some(Known { rule, backend }) => {
                self.forward(routing, question, backend, rule, admitted)
            }
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
            Ruling::Drop(reason) => Err(Verdict::Drop(reason)),
        }
    }

    /// By what means a packet goes to `backend`: where that takes a flow, a new one if there is none.
    fn forward(
        &mut self,
        routing: &Routing,
        question: &Question<'_>,
        backend: BackendId,
        rule: Rule,
        admitted: Admitted,
    ) -> Verdict {
        let &Question { now, listener, path, lookup, .. } = question;
        let Admitted { begins, validated } = admitted;
        if let Packet::Long(header) = &question.packet
            && (validated || matches!(rule, Rule::FourTuple | Rule::Fallback))
        {
            let handshake = NewHandshake { listener, path, header, backend, validated };
            self.memory.remember_handshake(lookup, &handshake);
        }
        let forward = |via| Verdict::Forward { backend, rule, via };
        if let Some(flow) = self.flows.find(now, listener, path, backend) {
            return forward(Via::Flow(flow));
        }
        if routing.forwarding(backend) == Forwarding::Direct {
            self.affinity.used(now, listener, path, backend);
            return forward(Via::Direct);
        }
        let opening = match question.packet {
            Packet::Short(_) if rule == Rule::Cid => Opening::PathChange,
            _ => Opening::New,
        };
        let claim = match rule {
            _ if validated => Claim::Validated,
            Rule::Cid | Rule::Dcid if !begins => Claim::Established,
            _ => Claim::None,
        };
        let flow = Flow { listener, path: *path, backend };
        match self.flows.open(now, flow, claim, &mut self.affinity) {
            Some((flow, evicted)) => forward(Via::NewFlow(Opened { flow, evicted, opening })),
            None => Verdict::Drop(DropReason::FlowLimit),
        }
    }

    #[inline]
    fn rules<'a>(&'a self, routing: &'a Routing) -> Rules<'a> {
        Rules { routing, memory: &self.memory, affinity: &self.affinity }
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
            let room = out.len().min(question.len);
            tokens.write_retry(random, version, initial, client, unix, &mut out[..room])
        })
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
        let lookup = self.memory.lookup(now, &self.routing.lifetimes, Use::Prolong);
        self.memory.learn_connection_id(&lookup, pool, header.scid, backend);
    }
}

/// A hasher whose keys come from `random`.
fn hasher(random: &mut Random) -> ahash::RandomState {
    let [a, b, c, d] = std::array::from_fn(|_| random.number());
    ahash::RandomState::with_seeds(a, b, c, d)
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
