//! From the backends to the clients: what was received for each flow, and sending it.

use std::{io, ops::Range};

use super::{
    burst::Burst,
    plan::{Bundle, Run},
    transmit::{Sent, Transmitter},
    upstreams::{Connection, Upstream},
};
use crate::{
    client_path::ListenerIndex,
    counters::WorkerCounters,
    forwarder::Forwarder,
    refusal::Refusal,
    socket::{Departure, Marks, Peer, Received, Receiver, SLOTS, Socket, TrafficClass},
    verdict::FlowId,
};

/// Runs that fit before memory has to be taken.
const RUNS: usize = 1_024;

/// What the backends sent, slot by slot.
pub(super) struct ReturnPlan {
    filled: usize,
    flows: [FlowId; SLOTS],
    /// Whether a slot is for nobody.
    withheld: [bool; SLOTS],
    runs: Vec<Run<()>>,
    bundles: Vec<Bundle>,
}

/// The socket of a listener.
pub(super) struct Listener {
    pub(super) socket: Socket,
    pub(super) ipv6: bool,
    /// Whether a snapshot has the listener. Nothing is taken from the socket before.
    pub(super) serves: bool,
    /// What the kernel had had no room for when it was asked last.
    pub(super) dropped: u32,
}

impl Listener {
    pub(super) fn new(socket: Socket) -> io::Result<Self> {
        let ipv6 = socket.local_address()?.is_ipv6();
        // One that was inherited has a past.
        let dropped = socket.receive_dropped().unwrap_or(0);
        Ok(Self { socket, ipv6, serves: true, dropped })
    }
}

impl ReturnPlan {
    pub(super) fn new() -> Self {
        Self {
            filled: 0,
            flows: [FlowId(0); SLOTS],
            withheld: [false; SLOTS],
            runs: Vec::with_capacity(RUNS),
            bundles: Vec::with_capacity(RUNS),
        }
    }

    /// Whether it has to be sent before more can be received.
    pub(super) const fn is_full(&self) -> bool {
        self.filled == SLOTS
    }

    /// Receives what the backend of `flow` has sent, as far as its `share` of slots goes; says
    /// into which slots, or what the kernel has said instead.
    pub(super) fn receive(
        &mut self,
        receiver: &mut Receiver,
        upstream: &mut Upstream,
        counters: &WorkerCounters,
        flow: FlowId,
        share: usize,
    ) -> Result<Range<usize>, Refusal> {
        let first = self.filled;
        // A socket that is about to be closed may still be reported.
        let Connection::Open(socket, _) = &upstream.connection else { return Ok(first..first) };
        let backend = &counters.backends[usize::from(upstream.backend)];
        let slots = first..SLOTS.min(first + share);
        match receiver.receive(socket, slots, Peer::Known) {
            Ok(received) => self.filled += received,
            // Errors are about datagrams that went the other way.
            Err(error) => {
                let refusal = Refusal::of(&error);
                backend.refuse(refusal, 1);
                return Err(refusal);
            }
        }
        let slots = first..self.filled;
        self.flows[slots.clone()].fill(flow);
        self.withheld[slots.clone()].fill(false);
        let messages = || slots.clone().map(|slot| receiver.received(slot));
        let datagrams = messages().map(|message| message.datagrams() as u64).sum();
        backend.returned.add(datagrams);
        upstream
            .traffic
            .returned
            .add(datagrams, messages().map(|message| message.len as u64).sum());
        Ok(slots)
    }

    /// Keeps what was received into `slot` from being sent.
    pub(super) const fn withhold(&mut self, slot: usize) {
        self.withheld[slot] = true;
    }

    /// Sends what was received to the clients, counts it, and is empty again.
    pub(super) fn send(
        &mut self,
        forwarder: &Forwarder,
        receiver: &Receiver,
        transmitter: &mut Transmitter,
        listeners: &[Option<Listener>],
        counters: &WorkerCounters,
    ) {
        if self.filled == 0 {
            return;
        }
        // What is for clients of a listener that has ended is for nobody.
        let listeners = listeners.iter().enumerate();
        for (index, listener) in listeners.filter_map(|(n, of)| Some((n, of.as_ref()?))) {
            let Self { filled, flows, withheld, runs, bundles } = self;
            let mut stale = 0;
            runs.clear();
            bundles.clear();
            let (mut returned, mut octets, mut failed) = (0, 0, 0);
            let mut planned = None;
            for (slot, &flow) in flows[..*filled].iter().enumerate() {
                if forwarder.flow(flow).listener != ListenerIndex(index) {
                    continue;
                }
                let message = receiver.received(slot);
                if withheld[slot] {
                    stale += message.datagrams() as u64;
                    planned = None;
                } else if let Some(marks) = message.marks.onward() {
                    plan_slot(slot, message, marks, planned == Some(flow), runs, bundles);
                    planned = Some(flow);
                } else {
                    failed += message.datagrams() as u64;
                }
            }
            let departure = |bundle: &Bundle| {
                let slot = usize::from(runs[usize::from(bundle.first)].slot);
                let path = &forwarder.flow(flows[slot]).path;
                let Marks { class, hops } = bundle.marks;
                Departure {
                    to: Some(path.client.0),
                    from: path.local,
                    class: (class != TrafficClass::default()).then_some(class),
                    hops: Some(hops),
                    segment: None,
                    ipv6: listener.ipv6,
                }
            };
            let done = |sent: Sent<'_, ()>| match sent.fate {
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
            counters.return_stale.add(stale);
        }
        // About clients, and nobody's business but theirs.
        transmitter.take_refusals();
        self.filled = 0;
    }
}

/// Adds the datagrams in `slot`, which leave with `marks`, to `runs` and `bundles`; they are of the same
/// flow as those before them if it `follows`.
fn plan_slot(
    slot: usize,
    message: &Received,
    marks: Marks,
    follows: bool,
    runs: &mut Vec<Run<()>>,
    bundles: &mut Vec<Bundle>,
) {
    let mut follows = follows;
    let mut rest = Burst::of_message(slot, message, marks);
    while rest.count > 0 {
        let run = rest.split_off_whole().run(());
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
