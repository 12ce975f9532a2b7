//! The flows of a worker that are logged: what was said when they began is said again when they end, so that each record of an
//! end can be read alone.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    queue::Queue,
    record::{Begun, End, EndReason, Record, Traffic},
    sample::Sample,
};
use crate::verdict::FlowId;

/// How often a worker that ends tries to leave a record, and how long it waits in between: altogether a second.
const LAST_TRIES: u32 = 50;
const LAST_PAUSE: Duration = Duration::from_millis(20);

/// The logged flows of one worker.
#[derive(Debug)]
pub(crate) struct Ledger {
    queue: Arc<Queue>,
    /// `None` while the log is off.
    sample: Option<Sample>,
    /// What flows draw numbers from.
    hash: ahash::RandomState,
    drawn: u64,
    /// By number. Empty until the first flow is logged.
    flows: Vec<Option<Begun>>,
}

impl Ledger {
    /// Nobody outside should know what `hash` is keyed with, lest they choose to be overlooked.
    pub(crate) const fn new(queue: Arc<Queue>, hash: ahash::RandomState) -> Self {
        Self { queue, sample: None, hash, drawn: 0, flows: Vec::new() }
    }

    /// Goes on with this share of the flows that begin.
    pub(crate) const fn set_sample(&mut self, sample: Option<Sample>) {
        self.sample = sample;
    }

    /// A flow begins.
    pub(crate) fn begin(&mut self, flow: FlowId, begun: impl FnOnce() -> Begun) {
        let Some(sample) = self.sample else { return };
        self.drawn = self.drawn.wrapping_add(1);
        if !self.queue.is_open() || !sample.takes(self.hash.hash_one(self.drawn)) {
            return;
        }
        let begun = begun();
        self.put(flow, begun);
        self.queue.leave(Record { begun, end: None });
    }

    /// A flow has ended.
    pub(crate) fn end(
        &mut self,
        now: Instant,
        flow: FlowId,
        traffic: &Traffic,
        reason: impl FnOnce() -> EndReason,
    ) {
        let Some(begun) = self.flows.get_mut(flow.index()).and_then(Option::take) else { return };
        if self.sample.is_some() {
            let end = End { at: now, traffic: *traffic, reason: reason() };
            self.queue.leave(Record { begun, end: Some(end) });
        }
    }

    /// All flows end, with the worker or with what it knows of them. It waits a moment for the writer where there are many.
    pub(crate) fn end_all(
        &mut self,
        now: Instant,
        reason: EndReason,
        traffic: impl Fn(FlowId) -> Traffic,
    ) {
        let mut tries = LAST_TRIES;
        for (number, begun) in (0..).zip(std::mem::take(&mut self.flows)) {
            let Some(begun) = begun.filter(|_| self.sample.is_some()) else { continue };
            let end = Some(End { at: now, traffic: traffic(FlowId(number)), reason });
            let record = Record { begun, end };
            while tries > 0 && !self.queue.has_taken(record) {
                tries -= 1;
                std::thread::sleep(LAST_PAUSE);
            }
            if tries == 0 {
                self.queue.leave(record);
            }
        }
    }

    /// How a flow began, if it is logged.
    pub(crate) fn of(&self, flow: FlowId) -> Option<&Begun> {
        self.flows.get(flow.index())?.as_ref()
    }

    /// Goes on with a flow that was logged when it began.
    pub(crate) fn take_over(&mut self, flow: FlowId, begun: Begun) {
        self.put(flow, begun);
    }

    fn put(&mut self, flow: FlowId, begun: Begun) {
        if self.flows.len() <= flow.index() {
            self.flows.resize(flow.index() + 1, None);
        }
        self.flows[flow.index()] = Some(begun);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        client_path::ListenerIndex,
        connection_log::queue::Queues,
        fixtures,
        verdict::{Opening, Rule},
    };

    fn begun(at: Instant) -> Begun {
        let [backend] = fixtures::backend_ids();
        Begun {
            at,
            listener: ListenerIndex(0),
            client: ([192, 0, 2, 1], 4242).into(),
            backend,
            rule: Rule::Fallback,
            opening: Opening::New,
            version: Some(1),
            retry: false,
        }
    }

    fn ledger(queues: &Queues, millionths: u32) -> Ledger {
        let mut ledger = Ledger::new(queues.of(0), ahash::RandomState::with_seeds(1, 2, 3, 4));
        ledger.set_sample(Some(Sample::of_millionths(millionths)));
        ledger
    }

    #[test]
    fn what_has_begun_ends_once_with_what_went_through_it() {
        let queues = Queues::new(1);
        let records = queues.open().remove(0);
        let mut ledger = ledger(&queues, 1_000_000);
        let (now, flow) = (Instant::now(), FlowId(7));
        ledger.begin(flow, || begun(now));
        let mut traffic = Traffic::default();
        traffic.returned.add(2, 2_400);
        (0..2).for_each(|_| ledger.end(now, flow, &traffic, || EndReason::Idle));
        // Nobody has seen that one begin.
        ledger.end(now, FlowId(6), &traffic, || EndReason::Idle);
        let end = Some(End { at: now, traffic, reason: EndReason::Idle });
        let expected = [None, end].map(|end| Record { begun: begun(now), end });
        assert_eq!(records.try_iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn a_share_of_the_flows_is_logged_and_of_each_both_ends_or_none() {
        let now = Instant::now();
        let mut counts = [0; 4];
        for (count, millionths) in counts.iter_mut().zip([0, 1, 250_000, 1_000_000]) {
            let queues = Queues::new(1);
            let records = queues.open().remove(0);
            let mut ledger = ledger(&queues, millionths);
            for flow in (0..4_000).map(FlowId) {
                ledger.begin(flow, || begun(now));
            }
            *count = records.try_iter().count();
            for flow in (0..4_000).map(FlowId) {
                ledger.end(now, flow, &Traffic::default(), || EndReason::Unanswered);
            }
            assert_eq!(records.try_iter().count(), *count);
        }
        let [none, few, quarter, all] = counts;
        assert_eq!((none, all), (0, 4_000));
        assert!(few <= 1 && (900..1_100).contains(&quarter), "{few}, {quarter}");
    }

    #[test]
    fn a_log_that_is_turned_off_says_nothing_more_and_one_that_nobody_reads_nothing() {
        let now = Instant::now();
        let queues = Queues::new(1);
        let mut before = ledger(&queues, 1_000_000);
        before.begin(FlowId(0), || unreachable!("nobody reads"));
        let records = queues.open().remove(0);
        let mut ledger = ledger(&queues, 1_000_000);
        ledger.begin(FlowId(0), || begun(now));
        ledger.set_sample(None);
        ledger.end(now, FlowId(0), &Traffic::default(), || EndReason::Idle);
        ledger.begin(FlowId(1), || unreachable!("it is off"));
        assert_eq!(records.try_iter().count(), 1);
        assert_eq!(queues.counts().queue_full, 0);
    }

    #[test]
    fn what_does_not_fit_is_counted_and_not_waited_for() {
        let now = Instant::now();
        let queues = Queues::new(1);
        let records = queues.open().remove(0);
        let mut ledger = ledger(&queues, 1_000_000);
        let flows = 10_000;
        (0..flows).for_each(|flow| ledger.begin(FlowId(flow), || begun(now)));
        let kept = records.try_iter().count() as u64;
        assert_eq!(queues.counts().queue_full, u64::from(flows) - kept);
        assert!(kept < flows.into());
        // There is room again.
        ledger.end(now, FlowId(0), &Traffic::default(), || EndReason::Idle);
        assert_eq!(records.try_iter().count(), 1);
    }

    #[test]
    fn a_worker_that_ends_tells_of_all_its_flows() {
        let now = Instant::now();
        let queues = Queues::new(1);
        let records = queues.open().remove(0);
        let mut ledger = ledger(&queues, 1_000_000);
        [3, 5].into_iter().for_each(|flow| ledger.begin(FlowId(flow), || begun(now)));
        ledger.end_all(now, EndReason::Stopped, |FlowId(flow)| {
            let mut traffic = Traffic::default();
            traffic.forwarded.add(flow.into(), 0);
            traffic
        });
        let ends = records.try_iter().filter_map(|record| record.end);
        let ends: Vec<_> = ends.map(|end| (end.reason, end.traffic.forwarded.datagrams)).collect();
        assert_eq!(ends, [(EndReason::Stopped, 3), (EndReason::Stopped, 5)]);
    }
}
