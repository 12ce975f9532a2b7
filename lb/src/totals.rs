//! What all workers counted, added up: what `/metrics` shows and what the control plane decides by.

use std::{
    collections::HashMap,
    sync::{Arc, atomic},
};

use crate::{
    backend::BackendId,
    counters::{BackendCounters, ListenerCounters, WorkerCounters},
    verdict::{DropReason, ReplyKind, Rule, TokenResult},
};

/// [`ListenerCounters`] of all workers, added up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "named and documented like the counters")]
pub struct ListenerTotals {
    pub received: u64,
    pub forwarded: [u64; Rule::ALL.len()],
    pub dropped: [u64; DropReason::ALL.len()],
    pub replied: [u64; ReplyKind::ALL.len()],
    pub retries: u64,
    pub tokens: [u64; TokenResult::ALL.len()],
    pub attempts: u64,
    pub returned: u64,
    pub return_failed: u64,
    pub received_bytes: u64,
    pub returned_bytes: u64,
    pub flows: u64,
    pub evicted: u64,
    pub path_changes: u64,
}

impl ListenerTotals {
    /// The sums for the listener with this index.
    #[must_use]
    pub fn sum(workers: &[Arc<WorkerCounters>], listener: usize) -> Self {
        let mut totals = Self::default();
        for counters in workers.iter().filter_map(|worker| worker.listeners.get(listener)) {
            totals.add(counters);
        }
        totals
    }

    /// Datagrams from clients that have their verdict.
    #[must_use]
    pub fn verdicts(&self) -> u64 {
        self.forwarded.iter().chain(&self.dropped).chain(&self.replied).sum()
    }

    fn add(&mut self, counters: &ListenerCounters) {
        for (total, counter) in self.forwarded.iter_mut().zip(&counters.forwarded) {
            *total += counter.get();
        }
        for (total, counter) in self.dropped.iter_mut().zip(&counters.dropped) {
            *total += counter.get();
        }
        for (total, counter) in self.replied.iter_mut().zip(&counters.replied) {
            *total += counter.get();
        }
        for (total, counter) in self.tokens.iter_mut().zip(&counters.tokens) {
            *total += counter.get();
        }
        self.retries += counters.retries.get();
        self.attempts += counters.attempts.get();
        atomic::fence(atomic::Ordering::SeqCst);
        self.received += counters.received.get();
        self.returned += counters.returned.get();
        self.return_failed += counters.return_failed.get();
        self.received_bytes += counters.received_bytes.get();
        self.returned_bytes += counters.returned_bytes.get();
        self.flows += counters.flows.get();
        self.evicted += counters.evicted.get();
        self.path_changes += counters.path_changes.get();
    }
}

/// [`BackendCounters`] of all workers, added up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "named and documented like the counters")]
pub struct BackendTotals {
    pub forwarded: u64,
    pub returned: u64,
    pub refused: u64,
}

impl BackendTotals {
    /// The sums for the backend in this slot.
    #[must_use]
    pub fn sum(workers: &[Arc<WorkerCounters>], slot: usize) -> Self {
        let mut totals = Self::default();
        for counters in workers.iter().filter_map(|worker| worker.backends.get(slot)) {
            let BackendCounters { forwarded, returned, refused } = counters;
            totals.forwarded += forwarded.get();
            totals.returned += returned.get();
            totals.refused += refused.get();
        }
        totals
    }

    /// What has been added since `earlier`.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Self {
        Self {
            forwarded: self.forwarded.saturating_sub(earlier.forwarded),
            returned: self.returned.saturating_sub(earlier.returned),
            refused: self.refused.saturating_sub(earlier.refused),
        }
    }
}

/// What the counters of a slot showed when it was given to its present backend.
#[derive(Debug, Default)]
pub(crate) struct Baselines(HashMap<usize, (u16, BackendTotals)>);

impl Baselines {
    /// To be called when a backend appears. A backend that comes back goes on where it was.
    pub(crate) fn begin(&mut self, counters: &[Arc<WorkerCounters>], id: BackendId) {
        let known = self.0.get(&id.slot()).map(|(generation, _)| *generation);
        if known == Some(id.generation()) {
            return;
        }
        let baseline = match id.generation() {
            0 => BackendTotals::default(),
            _ => BackendTotals::sum(counters, id.slot()),
        };
        self.0.insert(id.slot(), (id.generation(), baseline));
    }

    pub(crate) fn totals(&self, counters: &[Arc<WorkerCounters>], id: BackendId) -> BackendTotals {
        let baseline = self.0.get(&id.slot()).map(|(_, totals)| *totals).unwrap_or_default();
        BackendTotals::sum(counters, id.slot()).since(baseline)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{backend::BackendState, fixtures, registry::Registry, routing::Routing};

    #[test]
    fn the_verdicts_on_all_workers_add_up_to_the_datagrams_received() {
        let workers: Vec<_> = (0..3).map(|_| Arc::new(WorkerCounters::new(2))).collect();
        for worker in &workers {
            let edge = &worker.listeners[1];
            for (n, rule) in (1..).zip(Rule::ALL) {
                edge.received.add(n);
                edge.forward(rule, n);
            }
            for (n, reason) in (1..).zip(DropReason::ALL) {
                edge.received.add(n);
                edge.drop(reason, n);
            }
            for (n, kind) in (1..).zip(ReplyKind::ALL) {
                edge.received.add(n);
                edge.reply(kind, n);
            }
        }
        let totals = ListenerTotals::sum(&workers, 1);
        assert_eq!(totals.received, 3 * (15 + 210 + 1));
        assert_eq!(totals.verdicts(), totals.received);
        assert_eq!(ListenerTotals::sum(&workers, 0), ListenerTotals::default());
    }

    #[test]
    fn a_backend_that_comes_back_counts_on_and_a_new_one_in_its_place_from_zero() {
        let counters = [Arc::new(WorkerCounters::new(1))];
        let routing = Routing::new(&fixtures::config(true), &mut Registry::default(), |_, _| {
            BackendState::Active
        });
        let id = routing.backends().next().unwrap().id;
        counters[0].backends[id.slot()].forwarded.add(10);
        let mut baselines = Baselines::default();
        baselines.0.insert(id.slot(), (7, BackendTotals::default()));
        baselines.begin(&counters, id);
        assert_eq!(baselines.totals(&counters, id).forwarded, 10, "generation 0 starts at zero");
        baselines.0.insert(id.slot(), (1, BackendTotals::sum(&counters, id.slot())));
        assert_eq!(baselines.totals(&counters, id).forwarded, 0);
    }
}
