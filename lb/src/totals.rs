//! Counters of all sources, added up: what `/metrics` shows and what the control plane decides by.
//!
//! A source is a block of [`WorkerCounters`] with one writer: each worker keeps one. Whatever else
//! comes to carry datagrams (a program in the kernel, say) is counted in a block of its own, which
//! whoever reads its maps writes; the block joins the list here, and nobody else has to know.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic},
    time::Duration,
};

use quic::routable::ConfigId;

use crate::{
    backend::BackendId,
    counters::{BackendCounters, ListenerCounters, LiveCounters, WorkerCounters},
    flows::census::CONFIGS,
    refusal::{Refusal, Refusals},
    verdict::{DropReason, ReplyKind, Rule, Standing, TokenResult},
};

/// The sources of all counters, and their sums.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    sources: Vec<Arc<WorkerCounters>>,
}

impl Totals {
    /// Adds a source. What it counts is part of every sum from now on.
    pub fn add(&mut self, source: Arc<WorkerCounters>) {
        self.sources.push(source);
    }

    /// Has the counters of a backend made, of every source: workers make nothing amid packets.
    pub(crate) fn make_room(&self, id: BackendId) {
        for source in &self.sources {
            let _ = &source.backends[id.slot()];
        }
    }

    /// The sums for the listener with this index.
    #[must_use]
    pub fn of_listener(&self, listener: usize) -> ListenerTotals {
        self.of_listeners([listener])
    }

    /// The sums for all listeners with these indices.
    #[must_use]
    pub fn of_listeners(&self, listeners: impl IntoIterator<Item = usize>) -> ListenerTotals {
        let mut totals = ListenerTotals::default();
        for listener in listeners {
            for counters in self.sources.iter().filter_map(|source| source.listeners.get(listener))
            {
                totals.add(counters);
            }
        }
        totals
    }

    /// The sums for the backend in this slot.
    #[must_use]
    pub fn of_backend(&self, slot: usize) -> BackendTotals {
        let mut totals = BackendTotals::default();
        for counters in self.sources.iter().filter_map(|source| source.backends.get(slot)) {
            totals.add(counters);
        }
        totals
    }

    /// The live connections of a backend, as of the last sweep of each source.
    #[must_use]
    pub fn live(&self, id: BackendId) -> LiveTotals {
        let mut totals = LiveTotals::default();
        let live =
            self.sources.iter().filter_map(|source| Some(&source.backends.get(id.slot())?.live));
        live.filter(|live| live.generation.get() == u64::from(id.generation()))
            .for_each(|live| totals.add(live));
        totals
    }

    /// When a connection of any backend was heard last, as time since the process began.
    #[must_use]
    pub fn last_heard(&self) -> Option<Duration> {
        let live = self.sources.iter().flat_map(|source| source.backends.iter()).map(|of| &of.live);
        let mut all = LiveTotals::default();
        live.for_each(|live| all.add(live));
        all.last_heard()
    }

    /// Flows that have begun with a valid token and come to nothing.
    #[must_use]
    pub fn unfinished_flows(&self) -> u64 {
        self.sources.iter().map(|source| source.unfinished_flows.get()).sum()
    }

    /// What the kernel had no room for on these listeners, for each source.
    #[must_use]
    pub fn receive_dropped(&self, listeners: &[usize]) -> Vec<u64> {
        let of = |source: &Arc<WorkerCounters>| {
            let counters = listeners.iter().filter_map(|listener| source.listeners.get(*listener));
            counters.map(|counters| counters.receive_dropped.get()).sum()
        };
        self.sources.iter().map(of).collect()
    }

    /// How often each source has received something, and the time that it has had of a processor.
    #[must_use]
    pub fn usage(&self) -> Vec<Usage> {
        let of = |source: &Arc<WorkerCounters>| Usage {
            batches: source.batches.get(),
            cpu: Duration::from_micros(source.cpu_micros.get()),
            descriptors: source.descriptors.get(),
            descriptor_limit: source.descriptor_limit.get(),
        };
        self.sources.iter().map(of).collect()
    }

    /// How often each source has panicked and begun anew, in the order of workers.
    #[must_use]
    pub fn panics(&self) -> Vec<u64> {
        self.sources.iter().map(|source| source.panics.get()).collect()
    }

    /// Rounds that each source has made, in the order of workers.
    #[must_use]
    pub fn rounds(&self) -> Vec<u64> {
        self.sources.iter().map(|source| source.rounds.get()).collect()
    }

    /// Flows that have not shown that there is a client at their address.
    #[must_use]
    pub fn unproven_flows(&self) -> u64 {
        self.sources.iter().map(|source| source.unproven_flows.get()).sum()
    }

    /// Flows of all listeners.
    #[must_use]
    pub fn flows(&self) -> u64 {
        let listeners = self.sources.iter().flat_map(|source| &source.listeners);
        listeners.map(|counters| counters.flows.get()).sum()
    }
}

/// What a source has done, and what that took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Usage {
    /// How often it has received something from listeners.
    pub batches: u64,
    /// Time of a processor.
    pub cpu: Duration,
    /// Descriptors that are open.
    pub descriptors: u64,
    /// How many there can be.
    pub descriptor_limit: u64,
}

/// [`ListenerCounters`] of all sources, added up.
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
    pub unknown_server_ids: [u64; ConfigId::COUNT],
    pub returned: u64,
    pub return_failed: u64,
    pub received_bytes: u64,
    pub returned_bytes: u64,
    pub flows: u64,
    pub return_stale: u64,
    pub evicted: [u64; Standing::ALL.len()],
    pub path_changes: u64,
}

impl ListenerTotals {
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
        for (total, counter) in self.unknown_server_ids.iter_mut().zip(&counters.unknown_server_ids)
        {
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
        for (total, counter) in self.evicted.iter_mut().zip(&counters.evicted) {
            *total += counter.get();
        }
        self.return_stale += counters.return_stale.get();
        self.path_changes += counters.path_changes.get();
    }
}

/// [`BackendCounters`] of all sources, added up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "named and documented like the counters")]
pub struct BackendTotals {
    pub forwarded: u64,
    pub returned: u64,
    pub asked: u64,
    pub answered: u64,
    pub unanswered: u64,
    pub moved: u64,
    pub refused: Refusals,
    pub well_named: u64,
    pub misnamed: u64,
    /// As the counter says in one of the sources.
    pub named: u64,
}

/// [`LiveCounters`] of all sources: added up, and the latest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct LiveTotals {
    /// Flows, whatever they have shown.
    pub flows: u64,
    /// By configuration ID; those without one come last.
    pub by_config: [LiveConfigTotals; CONFIGS],
}

/// Those with connection IDs of one configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct LiveConfigTotals {
    /// How many, about.
    pub connections: u64,
    /// When one of them was heard last, as time since the process began.
    pub last_heard: Option<Duration>,
}

impl LiveTotals {
    /// How many, about.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.by_config.iter().map(|config| config.connections).sum()
    }

    /// When any of them was heard last.
    #[must_use]
    pub fn last_heard(&self) -> Option<Duration> {
        self.by_config.iter().filter_map(|config| config.last_heard).max()
    }

    /// For how long nothing was heard of any, of a backend that gets no new connections since then. Both moments
    /// are counted from the beginning of the process.
    #[must_use]
    pub fn silence(&self, since: Duration, now: Duration) -> Duration {
        now.saturating_sub(self.last_heard().map_or(since, |heard| heard.max(since)))
    }

    fn add(&mut self, counters: &LiveCounters) {
        let LiveCounters { generation: _, flows, by_config } = counters;
        self.flows += flows.get();
        for (totals, counters) in self.by_config.iter_mut().zip(by_config) {
            totals.connections += counters.connections.get();
            let heard = counters.last_heard.get().checked_sub(1).map(Duration::from_millis);
            totals.last_heard = totals.last_heard.max(heard);
        }
    }
}

impl BackendTotals {
    /// What has been added since `earlier`.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            forwarded: self.forwarded.saturating_sub(earlier.forwarded),
            returned: self.returned.saturating_sub(earlier.returned),
            asked: self.asked.saturating_sub(earlier.asked),
            answered: self.answered.saturating_sub(earlier.answered),
            unanswered: self.unanswered.saturating_sub(earlier.unanswered),
            moved: self.moved.saturating_sub(earlier.moved),
            refused: self.refused.since(&earlier.refused),
            well_named: self.well_named.saturating_sub(earlier.well_named),
            misnamed: self.misnamed.saturating_sub(earlier.misnamed),
            named: self.named,
        }
    }

    fn add(&mut self, counters: &BackendCounters) {
        let BackendCounters {
            forwarded,
            returned,
            asked,
            answered,
            unanswered,
            moved,
            refused,
            well_named,
            misnamed,
            named,
            live: _,
        } = counters;
        self.forwarded += forwarded.get();
        self.returned += returned.get();
        self.asked += asked.get();
        self.answered += answered.get();
        self.unanswered += unanswered.get();
        self.moved += moved.get();
        self.well_named += well_named.get();
        self.misnamed += misnamed.get();
        self.named = self.named.max(named.get());
        for (refusal, counter) in Refusal::ALL.into_iter().zip(refused) {
            self.refused.add(refusal, counter.get());
        }
    }
}

/// What the counters of a slot showed when it was given to its present backend.
#[derive(Debug, Default)]
pub(crate) struct Baselines(BTreeMap<usize, (u16, BackendTotals)>);

impl Baselines {
    /// To be called when a backend appears. A backend that comes back goes on where it was.
    pub(crate) fn begin(&mut self, totals: &Totals, id: BackendId) {
        let known = self.0.get(&id.slot()).map(|(generation, _)| *generation);
        if known == Some(id.generation()) {
            return;
        }
        let baseline = match id.generation() {
            0 => BackendTotals::default(),
            _ => totals.of_backend(id.slot()),
        };
        self.0.insert(id.slot(), (id.generation(), baseline));
    }

    /// What has been counted for this backend alone.
    pub(crate) fn since_it_appeared(&self, totals: &Totals, id: BackendId) -> BackendTotals {
        let baseline = self.0.get(&id.slot()).map(|(_, totals)| *totals).unwrap_or_default();
        totals.of_backend(id.slot()).since(baseline)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{backend::BackendState, fixtures, registry::Registry, routing::Routing};

    /// So many sources that count for two listeners.
    fn sources(count: usize) -> (Vec<Arc<WorkerCounters>>, Totals) {
        let sources: Vec<_> = (0..count).map(|_| Arc::new(WorkerCounters::new(2))).collect();
        let mut totals = Totals::default();
        sources.iter().for_each(|source| totals.add(Arc::clone(source)));
        (sources, totals)
    }

    #[test]
    fn the_verdicts_of_all_sources_add_up_to_the_datagrams_received() {
        let (sources, totals) = sources(3);
        for source in &sources {
            let edge = &source.listeners[1];
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
        let edge = totals.of_listener(1);
        assert_eq!(edge.received, 3 * (15 + 325 + 3));
        assert_eq!(edge.verdicts(), edge.received);
        assert_eq!(totals.of_listener(0), ListenerTotals::default());
        assert_eq!(totals.of_listener(2), ListenerTotals::default(), "nobody counts for it");
    }

    #[test]
    fn a_source_that_joins_late_counts_from_then_on_in_every_sum() {
        let (sources, mut totals) = sources(1);
        sources[0].listeners[0].flows.add(2);
        sources[0].backends[7].forwarded.add(20);
        let late = Arc::new(WorkerCounters::new(2));
        late.listeners[0].flows.add(3);
        late.listeners[1].flows.add(4);
        late.backends[7].forwarded.add(30);
        assert_eq!((totals.flows(), totals.of_backend(7).forwarded), (2, 20));
        totals.add(late);
        assert_eq!((totals.flows(), totals.of_backend(7).forwarded), (9, 50));
        assert_eq!(totals.of_listener(0).flows, 5);
    }

    #[test]
    fn a_backend_that_comes_back_counts_on_and_a_new_one_in_its_place_from_zero() {
        let (sources, totals) = sources(2);
        let routing = Routing::new(&fixtures::config(true), &mut Registry::default(), |_, _| {
            BackendState::Active
        });
        let id = routing.backends().next().unwrap().id;
        sources[1].backends[id.slot()].forwarded.add(10);
        let mut baselines = Baselines::default();
        baselines.0.insert(id.slot(), (7, BackendTotals::default()));
        baselines.begin(&totals, id);
        let forwarded = baselines.since_it_appeared(&totals, id).forwarded;
        assert_eq!(forwarded, 10, "generation 0 starts at zero");
        baselines.0.insert(id.slot(), (1, totals.of_backend(id.slot())));
        assert_eq!(baselines.since_it_appeared(&totals, id).forwarded, 0);
    }
}
