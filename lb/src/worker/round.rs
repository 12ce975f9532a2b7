//! The loop of one worker.
//!
//! Each round asks the poller once, reads the clock once, serves the listeners that have something
//! and the flows whose backends have answered, and does a little of the housekeeping. The poller is
//! level-triggered: what a round leaves behind when its budget ends is reported again, and the
//! kernel takes ready sockets in turns, so that nothing has to be remembered and nobody starves.
//! Every receive counts against the budgets, whether it brought octets or not.

#![expect(
    clippy::disallowed_methods,
    reason = "the shell around a forwarder: it reads the clock once per round"
)]

use std::{
    io, mem,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime},
};

use arc_swap::{ArcSwap, Cache};
use quic::invariants::Packet;
use quic_lb_config::MAX_LISTENERS;
use tracing::error;

use super::{
    back::{Listener, ReturnPlan},
    burst::Burst,
    first_flights::FirstFlights,
    forward::{ForwardPlan, onward},
    loops::{Passages, UpstreamPorts},
    mailbox::{Answer, Close, Mailbox, Open, Place, Question, Request, Sample},
    orders::{Order, Report},
    panics::{self, Origin, Panic, Panics, Suspect, Told},
    ports::NotOpened,
    replies::Outbox,
    setup::Setup,
    succession::{Belongings, Inheritance, PATIENCE},
    transmit::Transmitter,
    upstreams::{Connected, Connection, Upstreams, flow_of},
};
use crate::{
    backend::{BackendId, BackendState},
    cid_tag::CidTag,
    client_path::{ClientAddr, ClientPath, ListenerAddr, ListenerIndex},
    connection_log::{
        ledger::Ledger,
        record::{Begun, EndReason},
    },
    counters::{ListenerCounters, WorkerCounters},
    explained::Explained,
    forwarder::{AnsweredAs, BATCH, Clock, Datagram, Forwarder, OnFailure, Returned, Start, Tally},
    refusal::Refusal,
    routing::Routing,
    socket::{self, Channel, Peer, Poller, Ready, Receiver, SLOTS, Sharing, Socket},
    succession::HashKeys,
    verdict::{DropReason, Ended, FlowId, Opened, ReplyKind, Rule, TokenResult, Verdict, Via},
};

/// The longest that a worker sleeps, and the time from one sweep of its flows to the next.
const TICK: Duration = Duration::from_millis(100);
/// How many ready sockets one round serves.
const READY: usize = 256;
/// How many full batches one round takes from one listener.
const LISTENER_BATCHES: usize = 4;
/// How many messages one round takes from one flow, at least: with few flows, each may have more.
const FLOW_MESSAGES: usize = 8;

/// The token of the channel that orders come by, beyond those of listeners.
const ORDERS: u64 = u32::MAX as u64;

/// What stands where no verdict was written yet.
const UNDECIDED: Verdict = Verdict::Drop(DropReason::Empty);

/// One worker at work.
pub(super) struct Datapath {
    worker: usize,
    stop: Arc<AtomicBool>,
    /// What the process orders; `None` when it has nothing to say any more.
    orders: Option<Channel>,
    mailbox: Arc<Mailbox>,
    panics: Arc<Panics>,
    routing: Cache<Arc<ArcSwap<Routing>>, Arc<Routing>>,
    /// The one that the forwarder has.
    snapshot: Arc<Routing>,
    max_flows: usize,
    /// Descriptors that are neither those of listeners nor those of flows.
    other_descriptors: u64,
    forwarder: Forwarder,
    /// By number.
    listeners: Vec<Option<Listener>>,
    upstreams: Upstreams,
    /// Those of all workers.
    upstream_ports: Arc<UpstreamPorts>,
    passages: Passages,
    poller: Poller,
    receiver: Receiver,
    transmitter: Transmitter,
    outbox: Outbox,
    /// What is to be decided about together.
    bursts: Vec<Burst>,
    /// Memory for the first datagram of each; empty in between.
    question: Vec<Datagram<'static>>,
    /// What the forwarder says of them.
    verdicts: Vec<Verdict>,
    /// Datagrams of one burst that have to be decided about one by one.
    singles: Vec<Burst>,
    /// What the forwarder says of those.
    single_verdicts: Vec<Verdict>,
    forward: ForwardPlan,
    first_flights: FirstFlights,
    /// How often it has heard of backends that refuse something.
    heard_of_refusals: u64,
    back: ReturnPlan,
    expired: Vec<Ended>,
    counters: Arc<WorkerCounters>,
    /// Flows that had come to nothing before this one began.
    unfinished_before: u64,
    /// What the worker is at: whoever catches a panic looks here.
    at: At,
    /// What the forwarder was asked about last.
    asked: Vec<Burst>,
    /// Whether a worker of another process has its flows.
    is_succeeded: bool,
}

/// The datagram that a worker is at.
enum At {
    /// None, or several.
    Nothing,
    /// Those that the forwarder is asked about.
    Asked(ListenerIndex),
    /// The first one of a burst of which the forwarder has decided.
    Decided(ListenerIndex, Burst),
    /// One that a backend has sent.
    Returned { flow: FlowId, slot: usize, datagram: Range<usize> },
}

impl Datapath {
    pub(super) fn new(
        setup: &Setup,
        orders: Channel,
        sockets: Vec<Socket>,
        max_flows: usize,
    ) -> io::Result<Self> {
        let listener = |socket| Listener::new(socket).map(Some);
        let listeners = sockets.into_iter().map(listener).collect::<io::Result<_>>()?;
        let in_use = Arc::clone(&setup.upstream_ports);
        let upstreams = Upstreams::new(setup.ports.clone(), in_use, ledger(setup)?);
        Self::begin(setup, Some(orders), listeners, upstreams, max_flows, None)
    }

    /// A worker that goes on where one of another process has stopped.
    pub(super) fn succeeding(
        setup: &Setup,
        orders: Channel,
        inheritance: Inheritance,
        max_flows: usize,
    ) -> io::Result<Self> {
        let Inheritance { listeners, hash_keys, ports, flows } = inheritance;
        let now = Instant::now();
        let listener = |socket: Option<Socket>| socket.map(Listener::new).transpose();
        let listeners = listeners.into_iter().map(listener).collect::<io::Result<_>>()?;
        let in_use = Arc::clone(&setup.upstream_ports);
        let ledger = ledger(setup)?;
        let upstreams = Upstreams::succeeding(now, ports, setup.ports.clone(), in_use, ledger);
        let keys = Some(hash_keys);
        let mut new = Self::begin(setup, Some(orders), listeners, upstreams, max_flows, keys)?;
        let Self { forwarder, upstreams, poller, counters, .. } = &mut new;
        flows.take_over(now, max_flows, forwarder, upstreams, poller, counters)?;
        new.count_flows();
        Ok(new)
    }

    /// Where its listeners listen.
    pub(super) fn local_addresses(&self) -> io::Result<Vec<ListenerAddr>> {
        let address = |listener: &Listener| Ok(ListenerAddr(listener.socket.local_address()?));
        self.listeners.iter().flatten().map(address).collect()
    }

    /// A worker that takes the place of this one, which has panicked somewhere. Its listeners are the same sockets, so that
    /// each client path remains its own; everything else is new. Its flows are gone, and their ports rest.
    pub(super) fn anew(self, setup: &Setup) -> io::Result<Self> {
        let Self { orders, listeners, upstreams, forwarder, max_flows, other_descriptors, .. } =
            self;
        let upstreams = upstreams.after_loss(Instant::now(), |flow| forwarder.cid_of(flow));
        let anew = Self::begin(setup, orders, listeners, upstreams, max_flows, None)?;
        Ok(Self { other_descriptors, ..anew })
    }

    fn begin(
        setup: &Setup,
        orders: Option<Channel>,
        listeners: Vec<Option<Listener>>,
        mut upstreams: Upstreams,
        max_flows: usize,
        hash_keys: Option<HashKeys>,
    ) -> io::Result<Self> {
        let poller = Poller::new()?;
        if let Some(orders) = &orders {
            poller.watch(orders, ORDERS)?;
        }
        for (token, listener) in listeners.iter().enumerate() {
            if let Some(listener) = listener.as_ref().filter(|listener| listener.serves) {
                poller.watch(&listener.socket, token as u64)?;
            }
        }
        let mut routing = Cache::new(Arc::clone(&setup.routing));
        let snapshot = Arc::clone(routing.load());
        upstreams.ledger_mut().set_sample(snapshot.logged);
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(io::Error::other)?;
        let passages = random_hash()?;
        let clock = Clock { now: Instant::now(), unix: SystemTime::now() };
        let (start, memory) = (Start { clock, seed }, Arc::clone(&setup.memory));
        let routing_now = Arc::clone(&snapshot);
        let forwarder = match hash_keys {
            None => Forwarder::new(max_flows, routing_now, memory, &start),
            Some(keys) => Forwarder::succeeding(max_flows, routing_now, memory, &start, keys),
        };
        let mut begun = Self {
            worker: setup.worker,
            other_descriptors: 0,
            stop: Arc::clone(&setup.stop),
            orders,
            mailbox: Arc::clone(&setup.mailbox),
            panics: Arc::clone(&setup.panics),
            routing,
            snapshot,
            max_flows,
            forwarder,
            listeners,
            upstreams,
            upstream_ports: Arc::clone(&setup.upstream_ports),
            passages: Passages::new(passages),
            poller,
            receiver: Receiver::new(),
            transmitter: Transmitter::new(),
            outbox: Outbox::new(),
            bursts: Vec::with_capacity(BATCH),
            question: Vec::with_capacity(BATCH),
            verdicts: vec![UNDECIDED; BATCH],
            singles: Vec::with_capacity(BATCH),
            single_verdicts: vec![UNDECIDED; BATCH],
            forward: ForwardPlan::new(),
            first_flights: FirstFlights::new(),
            heard_of_refusals: 0,
            back: ReturnPlan::new(),
            expired: Vec::new(),
            counters: Arc::clone(&setup.counters),
            unfinished_before: setup.counters.unfinished_flows.get(),
            at: At::Nothing,
            asked: Vec::with_capacity(BATCH),
            is_succeeded: false,
        };
        // The snapshot may be another one than that which they were served by.
        begun.refresh_listeners();
        Ok(begun)
    }

    pub(super) fn run(&mut self) -> io::Result<()> {
        let mut ready = Ready::new(READY);
        let mut next_sweep = Instant::now() + TICK;
        let mut sleep = TICK;
        while !self.stop.load(Relaxed) {
            self.poller.wait(&mut ready, sleep)?;
            let now = Instant::now();
            self.counters.rounds.add(1);
            self.transmitter.begin();
            self.refresh_routing(now);
            if self.serve(now, &ready) {
                self.obey();
            }
            if let Some(request) = self.mailbox.take() {
                self.answer(now, request);
            }
            self.at = At::Nothing;
            if now >= next_sweep {
                self.sweep(now);
                next_sweep = now + TICK;
            }
            let all_closed = self.upstreams.close_some(now);
            sleep = match all_closed {
                true => next_sweep.saturating_duration_since(now),
                false => Duration::ZERO,
            };
        }
        if !self.is_succeeded {
            self.upstreams.end_all(Instant::now(), EndReason::Stopped);
        }
        Ok(())
    }

    #[cold]
    fn answer(&mut self, now: Instant, request: Request) {
        match request {
            Request::Explain(question) => self.explain(now, question),
            Request::Open(Open { places, sharing, answers }) => {
                let open = |place: &Place| {
                    self.open_listener(place, sharing).map_err(|error| (place.listener, error))
                };
                let opened = places.iter().map(open).collect();
                // Whoever has asked may not wait any more, and asks to have it closed.
                let _ = answers.send(opened);
            }
            Request::Close(Close { listeners, answers }) => {
                for listener in listeners.iter() {
                    if let Some(place) = self.listeners.get_mut(listener.0) {
                        place.take_if(|listener| !listener.serves);
                    }
                }
                let _ = answers.send(());
            }
        }
    }

    /// Opens the socket of a listener that the snapshot does not have yet.
    fn open_listener(&mut self, place: &Place, sharing: Sharing) -> io::Result<ListenerAddr> {
        let &Place { listener, address: ListenerAddr(address), families } = place;
        let ListenerIndex(index) = listener;
        if index >= MAX_LISTENERS || self.snapshot.has_listener(listener) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let socket = Socket::listener_of(address, families, sharing)?;
        let address = socket.local_address()?;
        let opened = Listener { socket, ipv6: address.is_ipv6(), serves: false, dropped: 0 };
        if self.listeners.len() <= index {
            self.listeners.resize_with(index + 1, || None);
        }
        self.listeners[index] = Some(opened);
        Ok(ListenerAddr(address))
    }

    /// Serves the listeners that the snapshot has, and closes those that it has no more.
    fn refresh_listeners(&mut self) {
        let Self { listeners, snapshot, poller, .. } = self;
        for (index, place) in listeners.iter_mut().enumerate() {
            let is_wanted = snapshot.has_listener(ListenerIndex(index));
            place.take_if(|listener| listener.serves && !is_wanted);
            if let Some(listener) = place.as_mut().filter(|listener| is_wanted && !listener.serves)
            {
                match poller.watch(&listener.socket, index as u64) {
                    Ok(()) => listener.serves = true,
                    // With the next snapshot again; out of memory, most likely.
                    Err(error) => error!(listener = index, %error, "a listener is not served"),
                }
            }
        }
    }

    /// Says what would become of a datagram, and changes nothing, so that a panic is nothing but the lack of an answer.
    #[cold]
    fn explain(&self, now: Instant, Question { sample, answers }: Question) {
        let Sample { listener, path, octets } = &sample;
        if !self.snapshot.has_listener(*listener) {
            return;
        }
        let answer = panics::caught(|| {
            let datagram = Datagram { path: *path, octets };
            let explanation = self.forwarder.explain(now, *listener, &datagram);
            Answer {
                explained: Explained::new(octets, explanation, &self.snapshot),
                knows_path: self.forwarder.knows(*listener, path),
            }
        });
        match answer {
            // Whoever has asked may not wait any more.
            Ok(answer) => drop(answers.send(answer)),
            Err(told) => {
                let (worker, listener, octets) = (self.worker, *listener, (**octets).into());
                let Told { message, place } = &told;
                error!(
                    worker,
                    message, place, "a question about a datagram has made a worker panic"
                );
                let client = path.client.0;
                let suspect = Some(Suspect { origin: Origin::Question, client, listener, octets });
                self.panics.keep(Panic {
                    time: SystemTime::now(),
                    worker,
                    told,
                    flows: 0,
                    suspect,
                });
            }
        }
    }

    /// The datagram that the worker was at when it panicked, as far as that can be told.
    pub(super) fn suspect(&self) -> Option<Suspect> {
        match &self.at {
            At::Nothing => None,
            &At::Asked(listener) => {
                let at = self.forwarder.at().or_else(|| self.undecodable(listener))?;
                Some(self.arrived(listener, self.asked.get(at)?))
            }
            At::Decided(listener, burst) => Some(self.arrived(*listener, burst)),
            At::Returned { flow, slot, datagram } => {
                let flow = self.forwarder.flow(*flow);
                let octets = self.receiver.octets(*slot, datagram.clone()).into();
                let (client, listener) = (flow.path.client.0, flow.listener);
                Some(Suspect { origin: Origin::Backend, client, listener, octets })
            }
        }
    }

    /// The first of the datagrams asked about of which not even can be told what would become of it.
    fn undecodable(&self, listener: ListenerIndex) -> Option<usize> {
        self.asked.iter().position(|burst| {
            let datagram = self.datagram(burst);
            let now = Instant::now();
            panics::caught(|| drop(self.forwarder.explain(now, listener, &datagram))).is_err()
        })
    }

    fn arrived(&self, listener: ListenerIndex, burst: &Burst) -> Suspect {
        let Datagram { path, octets } = self.datagram(burst);
        Suspect { origin: Origin::Client, client: path.client.0, listener, octets: octets.into() }
    }

    /// The first one of a burst.
    fn datagram(&self, burst: &Burst) -> Datagram<'_> {
        let message = self.receiver.received(usize::from(burst.slot));
        let path = ClientPath { client: ClientAddr(message.from), local: message.local };
        Datagram { path, octets: burst.first_datagram(&self.receiver) }
    }

    fn refresh_routing(&mut self, now: Instant) {
        if let Some(refusing) = self.snapshot.refusing.news(&mut self.heard_of_refusals) {
            self.leave_all(now, |id| refusing.contains(&id));
        }
        let current = self.routing.load();
        if !Arc::ptr_eq(current, &self.snapshot) {
            let before = mem::replace(&mut self.snapshot, Arc::clone(current));
            self.forwarder.set_routing(Arc::clone(current));
            self.upstreams.ledger_mut().set_sample(current.logged);
            self.refresh_listeners();
            let snapshot = Arc::clone(&self.snapshot);
            let state = |routing: &Routing, id| routing.backend(id).map(|backend| backend.state);
            self.leave_all(now, |id| {
                state(&before, id).is_some_and(BackendState::takes_connections)
                    && state(&snapshot, id) == Some(BackendState::Down)
            });
        }
    }

    /// Waits for the word to begin with what was taken over. `false` when the process ends instead.
    pub(super) fn wait_to_begin(&self) -> bool {
        let orders = self.orders.as_ref().map(Channel::receive::<Order>);
        matches!(orders, Some(Ok((Order::Begin, _))))
    }

    /// Does what the process orders.
    #[cold]
    fn obey(&mut self) {
        if self.follow_order().is_err() {
            // The process is about to end, and says so otherwise too.
            self.orders = None;
        }
    }

    fn follow_order(&mut self) -> io::Result<()> {
        let Some(orders) = &self.orders else { return Ok(()) };
        let (Order::HandOver(attempt), successor) = orders.receive()? else { return Ok(()) };
        let outcome = match successor.into_iter().next() {
            Some(successor) => self.hand_over(&Channel::from(successor)),
            None => Err(io::ErrorKind::InvalidData.into()),
        };
        let outcome = outcome.map_err(|error| error.to_string());
        self.is_succeeded = outcome.is_ok();
        orders.send(&Report { attempt, outcome }, &[])?;
        // From now on the successor may read what arrives.
        while !matches!(orders.receive()?, (Order::GoOn, _)) {}
        self.is_succeeded = false;
        Ok(())
    }

    fn hand_over(&self, successor: &Channel) -> io::Result<usize> {
        successor.set_patience(Some(PATIENCE))?;
        let Self { listeners, forwarder, upstreams, .. } = self;
        let listeners = listeners.iter().enumerate();
        let listeners = listeners.filter_map(|(number, listener)| {
            let listener = listener.as_ref().filter(|listener| listener.serves)?;
            Some((ListenerIndex(number), &listener.socket))
        });
        let listeners = listeners.collect();
        Belongings { listeners, forwarder, upstreams }.hand_over(Instant::now(), successor)
    }

    /// Serves what is ready; says whether there is an order too.
    fn serve(&mut self, now: Instant, ready: &Ready) -> bool {
        let share = (SLOTS / ready.len().max(1)).max(FLOW_MESSAGES);
        for at in 0..ready.len() {
            if let Some(flow) = flow_of(ready.token(at)) {
                self.collect(now, flow, share);
            }
        }
        self.send_back();
        // With so many flows that the list was cut, listeners may have been left out of it.
        let all = ready.is_full();
        let reported = (0..ready.len()).map(|at| ready.token(at));
        let reported = reported.filter(|&token| flow_of(token).is_none());
        let mut is_ordered = false;
        let reported = reported.fold(0u64, |set, token| {
            is_ordered |= token == ORDERS;
            if token == ORDERS { set } else { set | 1 << (token & 63) }
        });
        for listener in 0..self.listeners.len() {
            if all || reported & 1 << (listener & 63) != 0 {
                self.serve_listener(now, ListenerIndex(listener));
            }
        }
        is_ordered
    }

    fn serve_listener(&mut self, now: Instant, listener: ListenerIndex) {
        for _ in 0..LISTENER_BATCHES {
            let Some(Some(Listener { socket, serves: true, .. })) = self.listeners.get(listener.0)
            else {
                return;
            };
            // An error is not about any datagram: a listener is not connected to anyone.
            let received = self.receiver.receive(socket, 0..SLOTS, Peer::Asked).unwrap_or(0);
            self.forward(now, listener, received);
            if received < SLOTS {
                break;
            }
        }
    }

    /// Carries the first `received` slots from a listener to the backends.
    fn forward(&mut self, now: Instant, listener: ListenerIndex, received: usize) {
        // Before any verdict, so that a scrape never sees more verdicts than datagrams.
        if received > 0 {
            self.counters.batches.add(1);
        }
        let counters = &self.counters.listeners[listener.0];
        let messages = || (0..received).map(|slot| self.receiver.received(slot));
        counters.received.add(messages().map(|message| message.datagrams() as u64).sum());
        counters.received_bytes.add(messages().map(|message| message.len as u64).sum());

        let snapshot = Arc::clone(&self.snapshot);
        let decoder = &snapshot.listener(listener).decoder;
        for slot in 0..received {
            let message = *self.receiver.received(slot);
            let Some(marks) = onward(message.marks) else {
                let counters = &self.counters.listeners[listener.0];
                counters.drop(DropReason::HopLimit, message.datagrams() as u64);
                continue;
            };
            let mut rest = Burst::of_message(slot, &message, marks);
            while rest.count > 0 {
                let burst = rest.split_off_front(&self.receiver, decoder);
                self.bursts.push(burst);
                if self.bursts.len() == BATCH {
                    self.forward_bursts(now, listener);
                }
            }
        }
        self.forward_bursts(now, listener);
        self.send_forward(listener);
        // Not before: verdicts that were waiting may have named them.
        let mut refused = mem::take(&mut self.forward.refused);
        for flow in refused.drain(..) {
            self.leave(now, flow);
        }
        self.forward.refused = refused;
    }

    /// Has all first flights that went to the backend of `flow` lately sent to others, since it has refused something.
    #[cold]
    fn leave(&mut self, now: Instant, flow: FlowId) {
        let gone = self.forwarder.flow(flow).backend;
        self.leave_all(now, |backend| backend == gone);
    }

    fn leave_all(&mut self, now: Instant, is_gone: impl Fn(BackendId) -> bool) {
        for (id, flow) in self.first_flights.of(now, is_gone) {
            // Its number may be another's by now.
            if *self.forwarder.flow(id) == flow {
                self.go_elsewhere(now, id);
            }
        }
    }

    /// Has the first flight that `flow` began with sent to another backend, since its own has refused it.
    #[cold]
    fn go_elsewhere(&mut self, now: Instant, flow: FlowId) {
        if !self.forwarder.asks(flow) {
            return;
        }
        let before = *self.forwarder.flow(flow);
        let Some((numbers, tried)) = self.first_flights.refused(now, &before) else { return };
        let Self { forwarder, first_flights, upstreams, counters, .. } = self;
        let datagrams = numbers.iter().filter_map(|at| Some(first_flights.datagram(*at)?.1));
        let moved = forwarder.refused(now, flow, datagrams, tried.backends());
        let Some((ended, other)) = moved else { return };
        upstreams.refuse(now, counters, ended);
        let Some((backend, via)) = other else { return };
        if let Via::NewFlow(opened) = via {
            let version = numbers.first().and_then(|at| self.first_flights.datagram(*at));
            let version = version.and_then(|(_, octets)| version_of(octets));
            self.begin_flow(now, before.listener, backend, Rule::Fallback, &opened, None, version);
        }
        let Some(flow) = via.flow() else { return };
        let Self { forwarder, first_flights, upstreams, counters, .. } = self;
        let upstream = upstreams.of(flow);
        let Connection::Open(socket, _) = &upstream.connection else { return };
        let is_at = (flow, *forwarder.flow(flow));
        let of_other = &counters.backends[backend.slot()];
        for number in numbers {
            first_flights.moved(number, is_at, tried);
            let Some((marks, octets)) = first_flights.datagram(number) else { continue };
            if marks != upstream.marks
                && socket.set_marks(upstream.ipv6, upstream.marks, marks).is_ok()
            {
                upstream.marks = marks;
            }
            // An error may be about the one before. What is refused again comes back here.
            let sent = socket.send(octets).or_else(|error| {
                of_other.refuse(Refusal::of(&error), 1);
                socket.send(octets)
            });
            if sent.is_ok() {
                of_other.forwarded.add(1);
                upstream.traffic.forwarded.add(1, octets.len() as u64);
            }
        }
        counters.backends[before.backend.slot()].moved.add(1);
    }

    /// Asks the forwarder about the bursts that have been gathered, and puts them where its
    /// verdicts say.
    fn forward_bursts(&mut self, now: Instant, listener: ListenerIndex) {
        let mut bursts = mem::take(&mut self.bursts);
        let mut verdicts = mem::take(&mut self.verdicts);
        self.ask(now, listener, &bursts, &mut verdicts);
        for (burst, verdict) in bursts.iter().zip(&verdicts) {
            let is_about_all = matches!(verdict, Verdict::Forward { rule: Rule::Cid, .. });
            if burst.count == 1 || is_about_all {
                self.carry_out(now, listener, burst, verdict);
            } else {
                self.forward_singly(now, listener, burst, verdict);
            }
        }
        bursts.clear();
        self.bursts = bursts;
        self.verdicts = verdicts;
    }

    /// As [`Self::forward_bursts`], for a burst of whose first datagram only `verdict` speaks.
    fn forward_singly(
        &mut self,
        now: Instant,
        listener: ListenerIndex,
        burst: &Burst,
        verdict: &Verdict,
    ) {
        let mut singles = mem::take(&mut self.singles);
        singles.extend(burst.singles());
        let mut verdicts = mem::take(&mut self.single_verdicts);
        self.carry_out(now, listener, &singles[0], verdict);
        for singles in singles[1..].chunks(BATCH) {
            self.ask(now, listener, singles, &mut verdicts);
            for (single, verdict) in singles.iter().zip(&verdicts) {
                self.carry_out(now, listener, single, verdict);
            }
        }
        singles.clear();
        self.singles = singles;
        self.single_verdicts = verdicts;
    }

    /// What the forwarder says of the first datagram of each burst. What it answers by itself is
    /// sent and counted here, and the sockets of flows that begin are opened: what is asked next,
    /// and carried out before, may be about them.
    fn ask(
        &mut self,
        now: Instant,
        listener: ListenerIndex,
        bursts: &[Burst],
        verdicts: &mut [Verdict],
    ) {
        self.asked.clear();
        self.asked.extend_from_slice(bursts);
        self.at = At::Asked(listener);
        let mut question = recycled(mem::take(&mut self.question));
        question.extend(bursts.iter().map(|burst| {
            let message = self.receiver.received(usize::from(burst.slot));
            let path = ClientPath { client: ClientAddr(message.from), local: message.local };
            Datagram { path, octets: burst.first_datagram(&self.receiver) }
        }));
        self.forwarder.decide_batch(now, listener, &question, verdicts);
        self.at = At::Nothing;
        let counters = &self.counters.listeners[listener.0];
        count(self.forwarder.tally(), counters);
        let Some(Listener { socket, ipv6, .. }) = &self.listeners[listener.0] else {
            unreachable!("what is asked about was received there")
        };
        let replies = self.forwarder.replies();
        self.outbox.send(socket, *ipv6, &question, replies, |reply, sent| {
            if sent && reply.kind == ReplyKind::Retry {
                counters.retries.add(1);
            }
            // One that goes with a datagram which is forwarded is nobody's verdict.
            match verdicts[reply.datagram] {
                Verdict::Reply(kind) if sent => counters.reply(kind, 1),
                Verdict::Reply(_) => counters.drop(DropReason::SendFailed, 1),
                Verdict::Forward { .. } | Verdict::Drop(_) => {}
            }
        });
        self.question = recycled(question);
        for (burst, verdict) in bursts.iter().zip(&*verdicts) {
            if let Verdict::Forward { backend, rule, via: Via::NewFlow(opened) } = verdict {
                self.at = At::Decided(listener, *burst);
                self.open(now, listener, *backend, *rule, opened, burst);
            }
        }
    }

    fn carry_out(
        &mut self,
        now: Instant,
        listener: ListenerIndex,
        burst: &Burst,
        verdict: &Verdict,
    ) {
        if self.forward.is_full() {
            self.send_forward(listener);
        }
        self.at = At::Decided(listener, *burst);
        match *verdict {
            Verdict::Drop(reason) => self.drop(listener, reason, burst),
            // Sent and counted when it was asked for.
            Verdict::Reply(_) => {}
            // No pool of a configuration is forwarded to directly: nothing here can do it.
            Verdict::Forward { via: Via::Direct, .. } => {
                self.drop(listener, DropReason::SendFailed, burst);
            }
            Verdict::Forward {
                rule,
                via: Via::Flow(flow) | Via::NewFlow(Opened { flow, .. }),
                ..
            } => match self.upstreams.of(flow).connection {
                Connection::Open(..) => {
                    // Nothing else can be a part of a first flight.
                    if matches!(rule, Rule::Fallback | Rule::FourTupleScid)
                        && self.forwarder.asks(flow)
                    {
                        let octets = burst.first_datagram(&self.receiver);
                        let flow = (flow, *self.forwarder.flow(flow));
                        self.first_flights.keep(now, flow, burst.marks, octets);
                    }
                    self.forward.enqueue(&mut self.upstreams, flow, burst.run(rule));
                }
                Connection::Missing(reason) => self.drop(listener, reason, burst),
            },
        }
    }

    fn drop(&self, listener: ListenerIndex, reason: DropReason, burst: &Burst) {
        self.counters.listeners[listener.0].drop(reason, u64::from(burst.count));
    }

    /// Opens the upstream socket of a flow that begins with `burst`, and closes those of flows that make
    /// room.
    fn open(
        &mut self,
        now: Instant,
        listener: ListenerIndex,
        backend: BackendId,
        rule: Rule,
        opened: &Opened,
        burst: &Burst,
    ) {
        let comes_back = self.comes_back(opened.flow, burst);
        let version = version_of(burst.first_datagram(&self.receiver));
        self.begin_flow(now, listener, backend, rule, opened, comes_back, version);
    }

    /// As [`Self::open`], unless the flow is not to begin for the reason `why_not`.
    #[expect(clippy::too_many_arguments, reason = "what is told of a flow")]
    fn begin_flow(
        &mut self,
        now: Instant,
        listener: ListenerIndex,
        backend: BackendId,
        rule: Rule,
        opened: &Opened,
        why_not: Option<DropReason>,
        version: Option<u32>,
    ) {
        let Opened { flow, evicted, .. } = *opened;
        if let Some(evicted) = evicted {
            self.upstreams.evict(now, &self.counters, evicted);
        }
        // The forwarder lets a flow be tried once more at most.
        let cid = self.forwarder.cid_of(flow);
        let connected = loop {
            match why_not.map_or_else(|| self.connect(now, flow, backend, cid), Err) {
                Ok(connected) => break Ok(connected),
                Err(why) => match self.forwarder.flow_failed(now, flow, why) {
                    OnFailure::RetryAfter(evicted) => {
                        self.upstreams.evict(now, &self.counters, evicted);
                    }
                    OnFailure::Drop(reason) => break Err(reason),
                },
            }
        };
        if opened.asks && connected.is_ok() {
            self.counters.backends[backend.slot()].asked.add(1);
        }
        let is_open = connected.is_ok();
        self.upstreams.put(&self.counters, listener, opened, connected);
        if is_open {
            let Self { upstreams, forwarder, .. } = self;
            upstreams.ledger_mut().begin(flow, || Begun {
                at: now,
                listener,
                client: forwarder.flow(flow).path.client,
                backend,
                rule,
                opening: opened.opening,
                version,
                retry: forwarder.is_validated(flow),
            });
        }
        self.counters.unproven_flows.set(self.forwarder.unproven_flow_count() as u64);
    }

    /// Why a flow is not to begin with `burst`, which we ourselves have sent, directly or round some
    /// corners.
    fn comes_back(&mut self, flow: FlowId, burst: &Burst) -> Option<DropReason> {
        if self.upstream_ports.contains(self.forwarder.flow(flow).path.client.0) {
            return Some(DropReason::OwnAddress);
        }
        let datagram = burst.first_datagram(&self.receiver);
        self.passages.go_round(datagram, burst.marks.hops).then_some(DropReason::Loop)
    }

    fn connect(
        &mut self,
        now: Instant,
        flow: FlowId,
        backend: BackendId,
        cid: Option<CidTag>,
    ) -> Result<Connected, DropReason> {
        let Self { upstreams, poller, snapshot, counters, .. } = self;
        let backend = snapshot.backend(backend).ok_or(DropReason::NoBackend)?;
        let connected = upstreams.connect(now, poller, snapshot, flow, backend, cid);
        connected.map_err(|NotOpened { reason, refusal }| {
            if let Some(refusal) = refusal {
                counters.backends[backend.id.slot()].refuse(refusal, 1);
            }
            reason
        })
    }

    /// Sends what is queued for each flow.
    fn send_forward(&mut self, listener: ListenerIndex) {
        self.at = At::Nothing;
        let Self { forward, receiver, transmitter, upstreams, counters, .. } = self;
        forward.send(receiver, transmitter, upstreams, counters, listener);
    }

    /// Receives what the backend of `flow` has sent, as far as its `share` of slots goes.
    fn collect(&mut self, now: Instant, flow: FlowId, share: usize) {
        if self.back.is_full() {
            self.send_back();
        }
        let Self { back, forwarder, receiver, upstreams, counters, at, .. } = self;
        let Some(upstream) = upstreams.get_mut(flow) else { return };
        let slots = match back.receive(receiver, upstream, counters, flow, share) {
            Ok(slots) => slots,
            Err(refusal) => {
                if refusal.is_about_backend() {
                    self.leave(now, flow);
                }
                return;
            }
        };
        for slot in slots {
            let message = receiver.received(slot);
            let mut short: Option<(Range<usize>, usize)> = None;
            for datagram in Burst::of_message(slot, message, message.marks).datagrams() {
                if is_short(receiver.octets(slot, datagram.clone())) {
                    short.get_or_insert((datagram, 0)).1 += 1;
                    continue;
                }
                *at = At::Returned { flow, slot, datagram: datagram.clone() };
                match forwarder.returned(now, flow, receiver.octets(slot, datagram)) {
                    Returned::Stale => back.withhold(slot),
                    Returned::ForClient { named, is_first } => {
                        let counters = &counters.backends[usize::from(upstream.backend)];
                        if is_first {
                            counters.answered.add(1);
                        }
                        match named {
                            None => {}
                            Some(AnsweredAs::Another(another)) => counters.answer(Some(another)),
                            Some(AnsweredAs::Itself | AnsweredAs::Nobody) => counters.answer(None),
                        }
                    }
                }
            }
            if let Some((datagram, count)) = short {
                *at = At::Returned { flow, slot, datagram: datagram.clone() };
                forwarder.returned_short(now, flow, receiver.octets(slot, datagram), count);
            }
        }
    }

    /// Sends what was collected to the clients.
    fn send_back(&mut self) {
        self.at = At::Nothing;
        let Self { back, forwarder, receiver, transmitter, listeners, counters, .. } = self;
        back.send(forwarder, receiver, transmitter, listeners, counters);
    }

    /// Tells what the kernel had no room for, and what all this takes.
    fn tell_usage(&mut self) {
        let counters = &self.counters;
        for (listener, counters) in self.listeners.iter_mut().zip(&counters.listeners) {
            let Some(listener) = listener else { continue };
            // A kernel that does not say it has nothing to add.
            let dropped = listener.socket.receive_dropped().unwrap_or(listener.dropped);
            counters.receive_dropped.add(dropped.wrapping_sub(listener.dropped).into());
            listener.dropped = dropped;
        }
        let micros = u64::try_from(socket::thread_time().as_micros()).unwrap_or(u64::MAX);
        counters.cpu_micros.set(micros);
        counters.descriptors.set(self.other_descriptors + self.sockets());
    }

    /// Takes note of how many descriptors there are.
    pub(super) fn set_descriptors(&mut self, all: u64) {
        self.other_descriptors = all.saturating_sub(self.sockets());
        self.tell_usage();
    }

    /// Sockets of listeners and flows that are open.
    fn sockets(&self) -> u64 {
        let listeners = self.listeners.iter().flatten().count();
        let flows: u64 = self.counters.listeners.iter().map(|of| of.flows.get()).sum();
        flows + (listeners + self.upstreams.closing()) as u64
    }

    fn sweep(&mut self, now: Instant) {
        self.forwarder.set_clock(Clock { now, unix: SystemTime::now() });
        let mut expired = mem::take(&mut self.expired);
        self.forwarder.sweep(now, &mut expired);
        for flow in expired.drain(..) {
            self.upstreams.expire(now, &self.counters, flow);
        }
        self.expired = expired;
        self.forwarder.tell_live(&self.counters);
        self.tell_usage();
        self.upstreams.sweep(now);
        self.count_flows();
    }

    fn count_flows(&self) {
        self.counters.unproven_flows.set(self.forwarder.unproven_flow_count() as u64);
        self.counters.unfinished_flows.set(self.unfinished_before + self.forwarder.unfinished());
    }
}

/// A hash whose keys nobody knows.
fn random_hash() -> io::Result<ahash::RandomState> {
    let key = || getrandom::u64().map_err(io::Error::other);
    Ok(ahash::RandomState::with_seeds(key()?, key()?, key()?, key()?))
}

/// What is logged of the flows of a worker: nothing yet.
fn ledger(setup: &Setup) -> io::Result<Ledger> {
    Ok(Ledger::new(Arc::clone(&setup.records), random_hash()?))
}

/// Whether a datagram begins with a short header, or with nothing.
fn is_short(datagram: &[u8]) -> bool {
    datagram.first().is_none_or(|first| first & 0x80 == 0)
}

/// The version of a datagram that begins with a long header.
fn version_of(datagram: &[u8]) -> Option<u32> {
    match Packet::read(datagram) {
        Ok(Packet::Long(header)) => Some(header.version),
        _ => None,
    }
}

/// Counts what admission saw of a batch; mostly nothing.
fn count(tally: &Tally, counters: &ListenerCounters) {
    if tally.attempts > 0 {
        counters.attempts.add(tally.attempts);
    }
    for (counter, &count) in counters.unknown_server_ids.iter().zip(&tally.unknown_server_ids) {
        if count > 0 {
            counter.add(count);
        }
    }
    for (result, &count) in TokenResult::ALL.into_iter().zip(&tally.tokens) {
        if count > 0 {
            counters.tokens[result as usize].add(count);
        }
    }
}

/// The memory of `datagrams`, for others that live elsewhere.
fn recycled<'a>(mut datagrams: Vec<Datagram<'_>>) -> Vec<Datagram<'a>> {
    datagrams.clear();
    // The standard library collects into the memory that it iterates over.
    datagrams.into_iter().map(|_| unreachable!("it has been cleared")).collect()
}
