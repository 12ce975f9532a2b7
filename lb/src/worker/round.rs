//! The loop of one worker.
//!
//! Each round asks the poller once, reads the clock once, serves the listeners that have something
//! and the flows whose backends have answered, and does a little of the housekeeping. The poller is
//! level-triggered: what a round leaves behind when its budget ends is reported again, and the
//! kernel takes ready sockets in turns, so that nothing has to be remembered and nobody starves.
//! Every receive counts against the budgets, whether it brought octets or not.

use std::{
    collections::VecDeque,
    io, mem,
    ops::Range,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant, SystemTime},
};

use arc_swap::{ArcSwap, Cache};
use quic::routable::Decoder;

use super::{
    Birth, Shared,
    plan::{Bundle, NO_RUN, Run},
    ports::{Lease, Ports},
    replies::Outbox,
    transmit::{Sent, Transmitter},
};
use crate::{
    backend::BackendId,
    client_path::ClientPath,
    counters::{ListenerCounters, WorkerCounters},
    forwarder::{BATCH, Birth as ForwarderBirth, Clock, Datagram, Forwarder, Tally},
    routing::Routing,
    socket::{
        Departure, Ecn, MAX_SEGMENTS, Peer, Poller, Ready, Received, Receiver, SLOTS, Socket,
    },
    verdict::{DropReason, FlowId, Opening, Rule, TokenResult, Verdict},
};

/// The longest that a worker sleeps, and the time from one sweep of its flows to the next.
const TICK: Duration = Duration::from_millis(100);
/// How many ready sockets one round serves.
const READY: usize = 256;
/// How many full batches one round takes from one listener.
const LISTENER_BATCHES: usize = 4;
/// How many messages one round takes from one flow, at least: with few flows, each may have more.
const FLOW_MESSAGES: usize = 8;
/// Runs that one batch is split into at most before it is sent.
const RUNS: usize = 1_024;
/// Sockets of ended flows that one round closes: closing is slow, and many flows end together.
const CLOSINGS: usize = 32;
/// No flow of the batch has this queue.
const NO_QUEUE: u16 = u16::MAX;
/// Tokens below this are listeners, all others flows.
const FIRST_FLOW: u64 = 1 << 32;

/// One worker at work.
pub(super) struct Datapath {
    shared: Arc<Shared>,
    routing: Cache<Arc<ArcSwap<Routing>>, Arc<Routing>>,
    /// The one that the forwarder has.
    snapshot: Arc<Routing>,
    forwarder: Forwarder,
    listeners: Vec<Listener>,
    upstreams: Vec<Upstream>,
    ports: Ports,
    poller: Poller,
    receiver: Receiver,
    transmitter: Transmitter,
    outbox: Outbox,
    forward: ForwardPlan,
    back: ReturnPlan,
    closing: VecDeque<(Socket, Lease)>,
    expired: Vec<FlowId>,
    counters: Arc<WorkerCounters>,
    max_flows: usize,
}

struct Listener {
    socket: Socket,
    ipv6: bool,
}

/// The socket of a flow, by its number.
struct Upstream {
    link: Link,
    /// How the socket marks datagrams that do not say.
    ecn: Ecn,
    ipv6: bool,
    /// Where its datagrams of the current batch are.
    queue: u16,
    listener: u16,
    backend: u16,
}

/// The socket of a flow that begins.
struct Connected {
    socket: Socket,
    lease: Lease,
    backend: BackendId,
    ipv6: bool,
}

enum Link {
    Open(Socket, Lease),
    /// There is none: this is what becomes of datagrams that wanted one.
    Missing(DropReason),
}

/// What a batch from a listener becomes: the datagrams of each flow, in order.
struct ForwardPlan {
    runs: Vec<Run>,
    queues: Vec<Queue>,
    bundles: Vec<Bundle>,
    /// What is to be decided about together.
    bursts: Vec<Burst>,
    /// Memory for the first datagram of each; empty in between.
    question: Vec<Datagram<'static>>,
    /// Datagrams of one burst that have to be decided about one by one.
    singles: Vec<Burst>,
}

#[derive(Clone, Copy)]
struct Queue {
    flow: FlowId,
    first: u16,
    last: u16,
}

/// Datagrams side by side in one slot about which the forwarder would say the same, if it says that
/// their connection ID is routable: they came as one message, on one client path therefore, and
/// begin with the same short header as far as a routable connection ID goes.
#[derive(Clone, Copy)]
struct Burst {
    slot: u8,
    ecn: Ecn,
    start: u16,
    len: u16,
    segment: u16,
    count: u16,
}

/// What the backends sent, slot by slot.
struct ReturnPlan {
    filled: usize,
    flows: [FlowId; SLOTS],
    runs: Vec<Run>,
    bundles: Vec<Bundle>,
}

impl Datapath {
    pub(super) fn new(birth: &Birth, sockets: Vec<Socket>, max_flows: usize) -> io::Result<Self> {
        let poller = Poller::new()?;
        let mut listeners = Vec::with_capacity(sockets.len());
        for (token, socket) in sockets.into_iter().enumerate() {
            poller.watch(&socket, token as u64)?;
            let ipv6 = socket.local_address()?.is_ipv6();
            listeners.push(Listener { socket, ipv6 });
        }
        let mut routing = Cache::new(Arc::clone(&birth.routing));
        let snapshot = Arc::clone(routing.load());
        let limits = birth.shared.limits(max_flows);
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(io::Error::other)?;
        let clock = Clock { now: Instant::now(), unix: SystemTime::now() };
        let start = ForwarderBirth { clock, seed };
        Ok(Self {
            shared: Arc::clone(&birth.shared),
            routing,
            snapshot: Arc::clone(&snapshot),
            forwarder: Forwarder::new(limits, snapshot, Arc::clone(&birth.memory), &start),
            listeners,
            upstreams: Vec::new(),
            ports: Ports::default(),
            poller,
            receiver: Receiver::new(),
            transmitter: Transmitter::new(),
            outbox: Outbox::new(),
            forward: ForwardPlan::new(),
            back: ReturnPlan::new(),
            closing: VecDeque::new(),
            expired: Vec::new(),
            counters: Arc::clone(&birth.counters),
            max_flows,
        })
    }

    pub(super) fn run(&mut self) -> io::Result<()> {
        let mut ready = Ready::new(READY);
        let mut next_sweep = Instant::now() + TICK;
        let mut patience = TICK;
        while !self.shared.stop.load(Relaxed) {
            self.poller.wait(&mut ready, patience)?;
            let now = Instant::now();
            self.transmitter.begin();
            self.refresh_routing();
            self.serve(now, &ready);
            if now >= next_sweep {
                self.sweep(now);
                next_sweep = now + TICK;
            }
            self.close_some();
            patience = match self.closing.is_empty() {
                true => next_sweep.saturating_duration_since(now),
                false => Duration::ZERO,
            };
        }
        Ok(())
    }

    fn refresh_routing(&mut self) {
        let current = self.routing.load();
        if !Arc::ptr_eq(current, &self.snapshot) {
            self.snapshot = Arc::clone(current);
            self.forwarder.set_routing(Arc::clone(current));
        }
    }

    fn serve(&mut self, now: Instant, ready: &Ready) {
        let share = (SLOTS / ready.len().max(1)).max(FLOW_MESSAGES);
        for at in 0..ready.len() {
            if let Some(flow) = ready.token(at).checked_sub(FIRST_FLOW) {
                #[expect(clippy::cast_possible_truncation, reason = "flows are numbered by u32")]
                self.collect(now, FlowId(flow as u32), share);
            }
        }
        self.send_back();
        // With so many flows that the list was cut, listeners may have been left out of it.
        let all = ready.is_full();
        let reported = (0..ready.len()).map(|at| ready.token(at)).filter(|t| *t < FIRST_FLOW);
        let reported = reported.fold(0u64, |set, token| set | 1 << (token & 63));
        for listener in 0..self.listeners.len() {
            if all || reported & 1 << (listener & 63) != 0 {
                self.serve_listener(now, listener);
            }
        }
    }

    fn serve_listener(&mut self, now: Instant, listener: usize) {
        for _ in 0..LISTENER_BATCHES {
            let socket = &self.listeners[listener].socket;
            // An error is not about any datagram: a listener is not connected to anyone.
            let received = self.receiver.receive(socket, 0..SLOTS, Peer::Asked).unwrap_or(0);
            self.forward(now, listener, received);
            if received < SLOTS {
                break;
            }
        }
    }

    /// Carries the first `received` slots from a listener to the backends.
    fn forward(&mut self, now: Instant, listener: usize, received: usize) {
        // Before any verdict, so that a scrape never sees more verdicts than datagrams.
        let counters = &self.counters.listeners[listener];
        let messages = || (0..received).map(|slot| self.receiver.received(slot));
        counters.received.add(messages().map(|message| message.datagrams() as u64).sum());
        counters.received_bytes.add(messages().map(|message| message.len as u64).sum());

        let snapshot = Arc::clone(&self.snapshot);
        let decoder = &snapshot.pool_of(listener).decoder;
        for slot in 0..received {
            let message = *self.receiver.received(slot);
            let mut rest = Burst::of_message(slot, &message);
            while rest.count > 0 {
                let burst = rest.split_off_front(&self.receiver, decoder);
                self.forward.bursts.push(burst);
                if self.forward.bursts.len() == BATCH {
                    self.decide(now, listener);
                }
            }
        }
        self.decide(now, listener);
        self.send_forward(listener);
    }

    /// Asks the forwarder about the bursts that have been gathered, and puts them where its
    /// verdicts say.
    fn decide(&mut self, now: Instant, listener: usize) {
        let mut bursts = mem::take(&mut self.forward.bursts);
        let verdicts = self.ask(now, listener, &bursts);
        for (burst, verdict) in bursts.iter().zip(verdicts) {
            let is_about_all = matches!(verdict, Verdict::Forward { rule: Rule::Cid, .. });
            if burst.count == 1 || is_about_all {
                self.carry_out(now, listener, burst, verdict);
            } else {
                self.decide_singly(now, listener, burst, verdict);
            }
        }
        bursts.clear();
        self.forward.bursts = bursts;
    }

    /// As [`Self::decide`], for a burst of whose first datagram only `verdict` speaks.
    fn decide_singly(&mut self, now: Instant, listener: usize, burst: &Burst, verdict: Verdict) {
        let mut singles = mem::take(&mut self.forward.singles);
        singles.extend(burst.singles());
        self.carry_out(now, listener, &singles[0], verdict);
        for singles in singles[1..].chunks(BATCH) {
            let verdicts = self.ask(now, listener, singles);
            for (single, verdict) in singles.iter().zip(verdicts) {
                self.carry_out(now, listener, single, verdict);
            }
        }
        singles.clear();
        self.forward.singles = singles;
    }

    /// What the forwarder says of the first datagram of each burst. What it answers by itself is
    /// sent and counted here.
    fn ask(&mut self, now: Instant, listener: usize, bursts: &[Burst]) -> [Verdict; BATCH] {
        let mut verdicts = [Verdict::Drop(DropReason::Empty); BATCH];
        let mut question = recycled(mem::take(&mut self.forward.question));
        question.extend(bursts.iter().map(|burst| {
            let message = self.receiver.received(usize::from(burst.slot));
            let path = ClientPath { client: message.from, local: message.local };
            Datagram { path, octets: burst.first_datagram(&self.receiver) }
        }));
        self.forwarder.decide_batch(now, listener, &question, &mut verdicts);
        let counters = &self.counters.listeners[listener];
        count(self.forwarder.tally(), counters);
        let Listener { socket, ipv6 } = &self.listeners[listener];
        let replies = self.forwarder.replies();
        self.outbox.send(socket, *ipv6, &question, replies, |reply, sent| {
            if sent {
                counters.retries.add(1);
            }
            // One that goes with a datagram which is forwarded is nobody's verdict.
            match verdicts[reply.datagram] {
                Verdict::Reply(kind) if sent => counters.reply(kind, 1),
                Verdict::Reply(_) => counters.drop(DropReason::SendFailed, 1),
                Verdict::Forward { .. } | Verdict::Drop(_) => {}
            }
        });
        self.forward.question = recycled(question);
        verdicts
    }

    fn carry_out(&mut self, now: Instant, listener: usize, burst: &Burst, verdict: Verdict) {
        if self.forward.runs.len() == RUNS {
            self.send_forward(listener);
        }
        match verdict {
            Verdict::Drop(reason) => self.drop(listener, reason, burst),
            // Sent and counted when it was asked for.
            Verdict::Reply(_) => {}
            Verdict::Forward { flow, rule, opening } => {
                if opening != Opening::Existing {
                    self.open(now, listener, flow, opening);
                }
                match self.upstreams[flow.index()].link {
                    Link::Open(..) => self.enqueue(flow, burst.run(rule)),
                    Link::Missing(reason) => self.drop(listener, reason, burst),
                }
            }
        }
    }

    fn drop(&self, listener: usize, reason: DropReason, burst: &Burst) {
        self.counters.listeners[listener].drop(reason, u64::from(burst.count));
    }

    fn enqueue(&mut self, flow: FlowId, run: Run) {
        let ForwardPlan { runs, queues, .. } = &mut self.forward;
        #[expect(clippy::cast_possible_truncation, reason = "below RUNS")]
        let index = runs.len() as u16;
        let upstream = &mut self.upstreams[flow.index()];
        if upstream.queue == NO_QUEUE {
            #[expect(clippy::cast_possible_truncation, reason = "no more than runs")]
            let queue = queues.len() as u16;
            upstream.queue = queue;
            queues.push(Queue { flow, first: index, last: index });
            runs.push(run);
            return;
        }
        let queue = &mut queues[usize::from(upstream.queue)];
        let last = &mut runs[usize::from(queue.last)];
        if !last.extend(&run) {
            last.next = index;
            queue.last = index;
            runs.push(run);
        }
    }

    /// Opens the upstream socket of a new flow. A half-open flow whose number it has, or whose port
    /// or descriptor it needs, ends.
    fn open(&mut self, now: Instant, listener: usize, flow: FlowId, opening: Opening) {
        self.give_up(listener, flow);
        let mut opened = self.connect(now, flow);
        if matches!(opened, Err(DropReason::PortsExhausted | DropReason::DescriptorLimit))
            && let Some(half_open) = self.forwarder.reclaim(now, flow)
        {
            self.give_up(listener, half_open);
            opened = self.connect(now, flow);
        }
        if self.upstreams.len() <= flow.index() {
            self.upstreams.resize_with(flow.index() + 1, Upstream::default);
        }
        self.upstreams[flow.index()] = match opened {
            Ok(Connected { socket, lease, backend, ipv6 }) => {
                let counters = &self.counters.listeners[listener];
                counters.flows.add(1);
                if opening == Opening::PathChange {
                    counters.path_changes.add(1);
                }
                #[expect(
                    clippy::cast_possible_truncation,
                    reason = "each has a descriptor or more"
                )]
                let (listener, backend) = (listener as u16, backend.slot() as u16);
                let link = Link::Open(socket, lease);
                Upstream { link, ecn: Ecn::NOT_ECT, ipv6, queue: NO_QUEUE, listener, backend }
            }
            Err(reason) => {
                self.forwarder.abandon(flow);
                Upstream { link: Link::Missing(reason), ..Upstream::default() }
            }
        };
    }

    fn connect(&mut self, now: Instant, flow: FlowId) -> Result<Connected, DropReason> {
        let upstream = self.forwarder.upstream(flow).ok_or(DropReason::NoBackend)?;
        let (socket, lease) = self.ports.open(now, upstream.address, upstream.sources)?;
        if self.poller.watch(&socket, FIRST_FLOW + flow.index() as u64).is_err() {
            drop(socket);
            self.ports.release(lease);
            return Err(DropReason::DescriptorLimit);
        }
        let ipv6 = upstream.address.is_ipv6();
        Ok(Connected { socket, lease, backend: upstream.backend, ipv6 })
    }

    /// Closes the socket of a flow that has ended to make room, if it has one.
    fn give_up(&mut self, listener: usize, flow: FlowId) {
        let Some(upstream) = self.upstreams.get(flow.index()) else { return };
        if upstream.queue != NO_QUEUE {
            self.send_forward(listener);
        }
        let upstream = mem::take(&mut self.upstreams[flow.index()]);
        if let Link::Open(socket, lease) = upstream.link {
            let counters = &self.counters.listeners[usize::from(upstream.listener)];
            counters.flows.sub(1);
            counters.evicted.add(1);
            drop(socket);
            self.ports.release(lease);
        }
    }

    /// Sends what is queued for each flow.
    fn send_forward(&mut self, listener: usize) {
        let Self { receiver, transmitter, upstreams, counters, .. } = self;
        let ForwardPlan { runs, queues, bundles, .. } = &mut self.forward;
        let mut by_rule = [0u64; Rule::ALL.len()];
        for queue in queues.drain(..) {
            let upstream = &mut upstreams[queue.flow.index()];
            upstream.queue = NO_QUEUE;
            let Link::Open(socket, _) = &upstream.link else { continue };
            let backend = &counters.backends[usize::from(upstream.backend)];
            let first = &runs[usize::from(queue.first)];
            // Senders keep to one mark, and a mark that the socket has costs nothing per message.
            // Congestion is the exception that is not worth changing the socket for.
            if first.ecn != upstream.ecn
                && first.ecn != Ecn::CE
                && socket.set_ecn(upstream.ipv6, first.ecn).is_ok()
            {
                upstream.ecn = first.ecn;
            }
            let alone = first.next == NO_RUN && first.count == 1 && first.ecn == upstream.ecn;
            if alone {
                match socket.send(receiver.octets(usize::from(first.slot), first.range())) {
                    Ok(()) => {
                        by_rule[first.rule as usize] += 1;
                        backend.forwarded.add(1);
                        continue;
                    }
                    // About an earlier datagram; this one is tried again below, as after any error.
                    Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                        backend.refused.add(1);
                    }
                    Err(_) => {}
                }
            }
            bundles.clear();
            bundle_linked(runs, queue.first, bundles);
            let departure = |bundle: &Bundle| Departure {
                to: None,
                from: None,
                ecn: (bundle.ecn != upstream.ecn).then_some(bundle.ecn),
                segment: None,
                ipv6: upstream.ipv6,
            };
            let mut forwarded = 0;
            transmitter.send(
                socket,
                receiver,
                runs,
                bundles,
                departure,
                |sent: Sent<'_>| match sent.fate {
                    None => {
                        by_rule[sent.run.rule as usize] += sent.count;
                        forwarded += sent.count;
                    }
                    Some(reason) => counters.listeners[listener].drop(reason, sent.count),
                },
            );
            backend.forwarded.add(forwarded);
            backend.refused.add(transmitter.take_refused());
        }
        for (rule, count) in Rule::ALL.into_iter().zip(by_rule) {
            if count > 0 {
                counters.listeners[listener].forward(rule, count);
            }
        }
        runs.clear();
    }

    /// Receives what the backend of `flow` has sent, as far as its `share` of slots goes.
    fn collect(&mut self, now: Instant, flow: FlowId, share: usize) {
        if self.back.filled == SLOTS {
            self.send_back();
        }
        let Some(upstream) = self.upstreams.get(flow.index()) else { return };
        // A socket that is about to be closed may still be reported.
        let Link::Open(socket, _) = &upstream.link else { return };
        let backend = &self.counters.backends[usize::from(upstream.backend)];
        let first = self.back.filled;
        let slots = first..SLOTS.min(first + share);
        let received = match self.receiver.receive(socket, slots, Peer::Known) {
            Ok(received) => received,
            Err(error) => {
                // Other errors are about datagrams that went the other way, too, and say less.
                if error.kind() == io::ErrorKind::ConnectionRefused {
                    backend.refused.add(1);
                }
                return;
            }
        };
        let mut datagrams = 0;
        for slot in first..first + received {
            let message = self.receiver.received(slot);
            for datagram in Burst::of_message(slot, message).datagrams() {
                self.forwarder.returned(now, flow, self.receiver.octets(slot, datagram));
                datagrams += 1;
            }
            self.back.flows[slot] = flow;
        }
        backend.returned.add(datagrams);
        self.back.filled += received;
    }

    /// Sends what was collected to the clients.
    fn send_back(&mut self) {
        if self.back.filled == 0 {
            return;
        }
        let Self { receiver, transmitter, forwarder, counters, .. } = self;
        for (index, listener) in self.listeners.iter().enumerate() {
            let ReturnPlan { filled, flows, runs, bundles } = &mut self.back;
            runs.clear();
            bundles.clear();
            for slot in 0..*filled {
                if forwarder.flow(flows[slot]).listener == index {
                    let follows = slot > 0 && flows[slot - 1] == flows[slot];
                    plan_slot(slot, receiver.received(slot), follows, runs, bundles);
                }
            }
            let departure = |bundle: &Bundle| {
                let slot = usize::from(runs[usize::from(bundle.first)].slot);
                let path = &forwarder.flow(flows[slot]).path;
                Departure {
                    to: Some(path.client),
                    from: path.local,
                    ecn: (bundle.ecn != Ecn::NOT_ECT).then_some(bundle.ecn),
                    segment: None,
                    ipv6: listener.ipv6,
                }
            };
            let (mut returned, mut octets, mut failed) = (0, 0, 0);
            let done = |sent: Sent<'_>| match sent.fate {
                None => {
                    returned += sent.count;
                    octets += sent.octets;
                }
                Some(_) => failed += sent.count,
            };
            transmitter.send(&listener.socket, receiver, runs, bundles, departure, done);
            let counters = &counters.listeners[index];
            counters.returned.add(returned);
            counters.returned_bytes.add(octets);
            counters.return_failed.add(failed);
        }
        transmitter.take_refused();
        self.back.filled = 0;
    }

    fn sweep(&mut self, now: Instant) {
        self.forwarder.set_timeouts(self.shared.limits(self.max_flows));
        self.forwarder.set_clock(Clock { now, unix: SystemTime::now() });
        let mut expired = mem::take(&mut self.expired);
        self.forwarder.sweep(now, &mut expired);
        for flow in expired.drain(..) {
            let upstream = mem::take(&mut self.upstreams[flow.index()]);
            if let Link::Open(socket, lease) = upstream.link {
                self.counters.listeners[usize::from(upstream.listener)].flows.sub(1);
                self.closing.push_back((socket, lease));
            }
        }
        self.expired = expired;
    }

    fn close_some(&mut self) {
        for _ in 0..CLOSINGS {
            let Some((socket, lease)) = self.closing.pop_front() else { break };
            drop(socket);
            self.ports.release(lease);
        }
    }
}

impl Default for Upstream {
    fn default() -> Self {
        Self {
            link: Link::Missing(DropReason::SendFailed),
            ecn: Ecn::NOT_ECT,
            ipv6: false,
            queue: NO_QUEUE,
            listener: 0,
            backend: 0,
        }
    }
}

impl ForwardPlan {
    fn new() -> Self {
        Self {
            runs: Vec::with_capacity(RUNS),
            queues: Vec::with_capacity(RUNS),
            bundles: Vec::with_capacity(RUNS),
            bursts: Vec::with_capacity(BATCH),
            question: Vec::with_capacity(BATCH),
            singles: Vec::with_capacity(BATCH),
        }
    }
}

impl ReturnPlan {
    fn new() -> Self {
        Self {
            filled: 0,
            flows: [FlowId(0); SLOTS],
            runs: Vec::with_capacity(RUNS),
            bundles: Vec::with_capacity(RUNS),
        }
    }
}

impl Burst {
    /// All that arrived in `slot`, whether it begins alike or not.
    #[expect(clippy::cast_possible_truncation, reason = "a message has less than 65,536 octets")]
    fn of_message(slot: usize, message: &Received) -> Self {
        let Received { len, segment, ecn, .. } = *message;
        let (len, segment, count) = (len as u16, segment as u16, message.datagrams() as u16);
        Self { slot: slot as u8, ecn, start: 0, len, segment, count }
    }

    /// Takes off the datagrams in front that form a burst: one, or more if they begin alike.
    fn split_off_front(&mut self, receiver: &Receiver, decoder: &Decoder) -> Self {
        let mut burst = Self { count: 1, len: self.len.min(self.segment), ..*self };
        if self.count > 1 {
            let octets = receiver.octets(usize::from(self.slot), self.range());
            let short = |octets: &[u8]| octets.first().is_some_and(|first| first & 0x80 == 0);
            let routable = if short(octets) { decoder.needed(&octets[1..]).ok() } else { None };
            if let Some(cid_len) = routable.filter(|len| *len < usize::from(self.segment)) {
                let cid = &octets[1..=cid_len];
                let alike = octets
                    .chunks(usize::from(self.segment))
                    .take(MAX_SEGMENTS)
                    .take_while(|datagram| {
                        short(datagram) && datagram.get(1..=cid_len) == Some(cid)
                    })
                    .count();
                #[expect(clippy::cast_possible_truncation, reason = "at most MAX_SEGMENTS")]
                let count = alike.clamp(1, MAX_SEGMENTS) as u16;
                let full = u32::from(self.segment) * u32::from(count);
                burst.count = count;
                #[expect(clippy::cast_possible_truncation, reason = "at most what it was")]
                let len = full.min(u32::from(self.len)) as u16;
                burst.len = len;
            }
        }
        self.advance(&burst);
        burst
    }

    /// Takes off as many datagrams in front as can leave together.
    fn split_off_whole(&mut self) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "a small constant")]
        let count = self.count.min(MAX_SEGMENTS as u16);
        let len = u32::from(self.len).min(u32::from(self.segment) * u32::from(count));
        #[expect(clippy::cast_possible_truncation, reason = "at most what it was")]
        let burst = Self { count, len: len as u16, ..*self };
        self.advance(&burst);
        burst
    }

    fn advance(&mut self, taken: &Self) {
        // At the very end of the largest message there is nothing left to point at.
        self.start = self.start.wrapping_add(taken.len);
        self.len -= taken.len;
        self.count -= taken.count;
    }

    fn range(&self) -> Range<usize> {
        usize::from(self.start)..usize::from(self.start) + usize::from(self.len)
    }

    fn first_datagram<'a>(&self, receiver: &'a Receiver) -> &'a [u8] {
        let start = usize::from(self.start);
        let len = usize::from(self.len.min(self.segment));
        receiver.octets(usize::from(self.slot), start..start + len)
    }

    fn datagrams(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        // The rule says nothing here; any will do.
        self.run(Rule::Cid).datagrams()
    }

    /// Each datagram by itself.
    #[expect(clippy::cast_possible_truncation, reason = "parts of a message")]
    fn singles(&self) -> impl Iterator<Item = Self> + use<> {
        let burst = *self;
        self.datagrams().map(move |range| Self {
            start: range.start as u16,
            len: range.len() as u16,
            count: 1,
            ..burst
        })
    }

    fn run(&self, rule: Rule) -> Run {
        let Self { slot, ecn, start, len, count, .. } = *self;
        let segment = if count == 1 { len } else { self.segment };
        Run { slot, rule, ecn, count, segment, start, len, next: NO_RUN }
    }
}

/// Counts what admission saw of a batch; mostly nothing.
fn count(tally: &Tally, counters: &ListenerCounters) {
    if tally.attempts > 0 {
        counters.attempts.add(tally.attempts);
    }
    for (result, &count) in TokenResult::ALL.into_iter().zip(&tally.tokens) {
        if count > 0 {
            counters.tokens[result as usize].add(count);
        }
    }
}

/// The runs of a flow, beginning with number `first`, as bundles.
fn bundle_linked(runs: &[Run], first: u16, bundles: &mut Vec<Bundle>) {
    let mut index = first;
    while index != NO_RUN {
        let run = &runs[usize::from(index)];
        if !bundles.last_mut().is_some_and(|bundle| bundle.extend(run)) {
            bundles.push(Bundle::new(index, run));
        }
        index = run.next;
    }
}

/// Adds the datagrams in `slot` to `runs` and `bundles`; they are of the same flow as those before
/// them if it `follows`.
fn plan_slot(
    slot: usize,
    message: &Received,
    follows: bool,
    runs: &mut Vec<Run>,
    bundles: &mut Vec<Bundle>,
) {
    let mut follows = follows;
    let mut rest = Burst::of_message(slot, message);
    while rest.count > 0 {
        // The rule says nothing about this direction; any will do.
        let run = rest.split_off_whole().run(Rule::Cid);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "fewer than RUNS for all slots together"
        )]
        let number = runs.len() as u16;
        if follows && bundles.last_mut().is_some_and(|bundle| bundle.extend(&run)) {
            runs[usize::from(number) - 1].next = number;
        } else {
            bundles.push(Bundle::new(number, &run));
        }
        runs.push(run);
        follows = true;
    }
}

/// The memory of `datagrams`, for others that live elsewhere.
fn recycled<'a>(mut datagrams: Vec<Datagram<'_>>) -> Vec<Datagram<'a>> {
    datagrams.clear();
    // The standard library collects into the memory that it iterates over.
    datagrams.into_iter().map(|_| unreachable!("it has been cleared")).collect()
}
