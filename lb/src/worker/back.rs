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
    socket::{Departure, Ecn, Peer, Received, Receiver, SLOTS, Socket},
    verdict::FlowId,
};

/// Runs that fit before memory has to be taken.
const RUNS: usize = 1_024;

/// What the backends sent, slot by slot.
pub(super) struct ReturnPlan {
    filled: usize,
    flows: [FlowId; SLOTS],
    runs: Vec<Run<()>>,
    bundles: Vec<Bundle>,
}

/// The socket of a listener.
pub(super) struct Listener {
    pub(super) socket: Socket,
    pub(super) ipv6: bool,
}

impl ReturnPlan {
    pub(super) fn new() -> Self {
        Self {
            filled: 0,
            flows: [FlowId(0); SLOTS],
            runs: Vec::with_capacity(RUNS),
            bundles: Vec::with_capacity(RUNS),
        }
    }

    /// Whether it has to be sent before more can be received.
    pub(super) const fn is_full(&self) -> bool {
        self.filled == SLOTS
    }

    /// Receives what the backend of `flow` has sent, as far as its `share` of slots goes; says
    /// into which slots.
    pub(super) fn receive(
        &mut self,
        receiver: &mut Receiver,
        upstream: &Upstream,
        counters: &WorkerCounters,
        flow: FlowId,
        share: usize,
    ) -> Range<usize> {
        let first = self.filled;
        // A socket that is about to be closed may still be reported.
        let Connection::Open(socket, _) = &upstream.connection else { return first..first };
        let backend = &counters.backends[usize::from(upstream.backend)];
        let slots = first..SLOTS.min(first + share);
        match receiver.receive(socket, slots, Peer::Known) {
            Ok(received) => self.filled += received,
            // Other errors are about datagrams that went the other way, too, and say less.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                backend.refused.add(1);
            }
            Err(_) => {}
        }
        let slots = first..self.filled;
        self.flows[slots.clone()].fill(flow);
        let datagrams = slots.clone().map(|slot| receiver.received(slot).datagrams() as u64);
        backend.returned.add(datagrams.sum());
        slots
    }

    /// Sends what was received to the clients, counts it, and is empty again.
    pub(super) fn send(
        &mut self,
        forwarder: &Forwarder,
        receiver: &Receiver,
        transmitter: &mut Transmitter,
        listeners: &[Listener],
        counters: &WorkerCounters,
    ) {
        if self.filled == 0 {
            return;
        }
        for (index, listener) in listeners.iter().enumerate() {
            let Self { filled, flows, runs, bundles } = self;
            runs.clear();
            bundles.clear();
            for slot in 0..*filled {
                if forwarder.flow(flows[slot]).listener == ListenerIndex(index) {
                    let follows = slot > 0 && flows[slot - 1] == flows[slot];
                    plan_slot(slot, receiver.received(slot), follows, runs, bundles);
                }
            }
            let departure = |bundle: &Bundle| {
                let slot = usize::from(runs[usize::from(bundle.first)].slot);
                let path = &forwarder.flow(flows[slot]).path;
                Departure {
                    to: Some(path.client.0),
                    from: path.local,
                    ecn: (bundle.ecn != Ecn::NOT_ECT).then_some(bundle.ecn),
                    segment: None,
                    ipv6: listener.ipv6,
                }
            };
            let (mut returned, mut octets, mut failed) = (0, 0, 0);
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
        }
        transmitter.take_refused();
        self.filled = 0;
    }
}

/// Adds the datagrams in `slot` to `runs` and `bundles`; they are of the same flow as those before
/// them if it `follows`.
fn plan_slot(
    slot: usize,
    message: &Received,
    follows: bool,
    runs: &mut Vec<Run<()>>,
    bundles: &mut Vec<Bundle>,
) {
    let mut follows = follows;
    let mut rest = Burst::of_message(slot, message);
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
