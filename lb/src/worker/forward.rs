//! From a listener to the backends: what a batch becomes, flow by flow.

use super::{
    plan::{Bundle, NO_RUN, Run},
    transmit::{Sent, Transmitter},
    upstreams::{Connection, NO_QUEUE, Upstreams},
};
use crate::{
    client_path::ListenerIndex,
    counters::WorkerCounters,
    refusal::Refusals,
    socket::{Departure, HopLimit, Marks, Receiver},
    verdict::{FlowId, Rule},
};

/// Runs that one batch is split into at most before it is sent.
const RUNS: usize = 1_024;
/// As if no datagram had more hops before it than this when it arrived. Most systems begin with so many.
/// Servers are near; where balancers send to each other in a circle by mistake, it ends within so many
/// datagrams, whatever the sender wrote.
const MOST_HOPS: HopLimit = HopLimit::new(64);

/// The datagrams of a batch that are to be sent, by flow, each flow's in order.
pub(super) struct ForwardPlan {
    runs: Vec<Run<Rule>>,
    queues: Vec<FlowRuns>,
    bundles: Vec<Bundle>,
    /// Flows whose backends cannot be sent to, as the kernel has said since this was looked at.
    pub(super) refused: Vec<FlowId>,
}

/// The runs of one flow, linked.
#[derive(Clone, Copy)]
struct FlowRuns {
    flow: FlowId,
    first: u16,
    last: u16,
}

impl ForwardPlan {
    pub(super) fn new() -> Self {
        Self {
            runs: Vec::with_capacity(RUNS),
            queues: Vec::with_capacity(RUNS),
            bundles: Vec::with_capacity(RUNS),
            refused: Vec::with_capacity(RUNS),
        }
    }

    /// Whether it has to be sent before another run fits.
    #[inline]
    pub(super) fn is_full(&self) -> bool {
        self.runs.len() == RUNS
    }

    /// Adds datagrams of `flow`.
    #[inline]
    pub(super) fn enqueue(&mut self, upstreams: &mut Upstreams, flow: FlowId, run: Run<Rule>) {
        let Self { runs, queues, .. } = self;
        #[expect(clippy::cast_possible_truncation, reason = "below RUNS")]
        let index = runs.len() as u16;
        let upstream = upstreams.of(flow);
        if upstream.queue == NO_QUEUE {
            #[expect(clippy::cast_possible_truncation, reason = "no more than runs")]
            let queue = queues.len() as u16;
            upstream.queue = queue;
            queues.push(FlowRuns { flow, first: index, last: index });
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

    /// Sends what is queued for each flow, counts it, and is empty again.
    pub(super) fn send(
        &mut self,
        receiver: &Receiver,
        transmitter: &mut Transmitter,
        upstreams: &mut Upstreams,
        counters: &WorkerCounters,
        listener: ListenerIndex,
    ) {
        let Self { runs, queues, bundles, refused } = self;
        let mut by_rule = [0u64; Rule::ALL.len()];
        for queue in queues.drain(..) {
            let upstream = upstreams.of(queue.flow);
            upstream.queue = NO_QUEUE;
            let Connection::Open(socket, _) = &upstream.connection else { continue };
            let backend = &counters.backends[usize::from(upstream.backend)];
            let first = &runs[usize::from(queue.first)];
            // Senders keep to one mark, and a mark that the socket has costs nothing per message.
            // Congestion is the exception that is not worth changing the socket for.
            if first.marks != upstream.marks
                && !first.marks.class.is_congested()
                && socket.set_marks(upstream.ipv6, upstream.marks, first.marks).is_ok()
            {
                upstream.marks = first.marks;
            }
            let alone = first.next == NO_RUN && first.count == 1 && first.marks == upstream.marks;
            if alone {
                let octets = receiver.octets(usize::from(first.slot), first.range());
                if transmitter.send_lone(socket, octets) {
                    by_rule[first.tag as usize] += 1;
                    backend.forwarded.add(1);
                    upstream.traffic.forwarded.add(1, u64::from(first.len));
                    continue;
                }
            }
            bundles.clear();
            bundle_linked(runs, queue.first, bundles);
            let departure = |bundle: &Bundle| {
                let Marks { class, hops } = bundle.marks;
                Departure {
                    to: None,
                    from: None,
                    class: (class != upstream.marks.class).then_some(class),
                    hops: (hops != upstream.marks.hops).then_some(hops),
                    segment: None,
                    ipv6: upstream.ipv6,
                }
            };
            let (mut forwarded, mut octets) = (0, 0);
            transmitter.send(socket, receiver, runs, bundles, departure, |sent: Sent<'_, Rule>| {
                match sent.fate {
                    None => {
                        by_rule[sent.run.tag as usize] += sent.count;
                        forwarded += sent.count;
                        octets += sent.octets;
                    }
                    Some(reason) => counters.listeners[listener.0].drop(reason, sent.count),
                }
            });
            backend.forwarded.add(forwarded);
            upstream.traffic.forwarded.add(forwarded, octets);
            for (refusal, n) in transmitter.take_refusals().iter().flat_map(Refusals::iter) {
                backend.refuse(refusal, n);
                if refusal.is_about_backend() {
                    refused.push(queue.flow);
                }
            }
        }
        for (rule, count) in Rule::ALL.into_iter().zip(by_rule) {
            if count > 0 {
                counters.listeners[listener.0].forward(rule, count);
            }
        }
        runs.clear();
    }
}

/// What a datagram that arrived with `marks` leaves towards a backend with; `None` when it has come to its
/// end.
pub(super) fn onward(marks: Marks) -> Option<Marks> {
    Marks { hops: marks.hops.min(MOST_HOPS), ..marks }.onward()
}

/// The runs of a flow, beginning with number `first`, as bundles.
fn bundle_linked(runs: &[Run<Rule>], first: u16, bundles: &mut Vec<Bundle>) {
    let mut index = first;
    while index != NO_RUN {
        let run = &runs[usize::from(index)];
        if !bundles.last_mut().is_some_and(|bundle| bundle.extend(run)) {
            bundles.push(Bundle::new(index, run));
        }
        index = run.next;
    }
}
