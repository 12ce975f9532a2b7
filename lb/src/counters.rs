//! Counters of one worker: written by that worker alone, read by the control plane at a scrape.
//!
//! With a single writer an addition needs no locked instruction: a relaxed load and a relaxed
//! store. Readers may see a value that is a moment old, never a torn one.

use std::{
    ops::Index,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use quic::routable::ConfigId;

use crate::{
    backend::{BackendId, MAX_BACKENDS},
    flows::census::{CONFIGS, Live},
    refusal::Refusal,
    verdict::{DropReason, ReplyKind, Rule, Standing, TokenResult},
};

/// One number, written by one thread.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`. Only the worker that owns the counter may call this.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// Takes `n` away; for values that go up and down.
    pub fn sub(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_sub(n), Relaxed);
    }

    /// Makes it `n`.
    pub fn set(&self, n: u64) {
        self.0.store(n, Relaxed);
    }

    /// The value.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// What one worker counted.
#[derive(Debug)]
pub struct WorkerCounters {
    /// By listener, in the order of the configuration.
    pub listeners: Vec<ListenerCounters>,
    /// By the slot of [`crate::backend::BackendId`].
    pub backends: PerBackend,
    /// Flows that have not shown that there is a client at their address.
    pub unproven_flows: Counter,
    /// Flows that have begun with a valid token and come to nothing.
    pub unfinished_flows: Counter,
    /// How often the worker has panicked and begun anew.
    pub panics: Counter,
    /// How often it has received something from listeners: at most a batch at once.
    pub batches: Counter,
    /// The time that its thread has had of a processor, in microseconds.
    pub cpu_micros: Counter,
    /// Descriptors that its table has.
    pub descriptors: Counter,
    /// How many it may have.
    pub descriptor_limit: Counter,
    /// Rounds of the worker, ten a second at least.
    pub rounds: Counter,
}

/// What happened on one listener. `received` is the sum of all `forwarded`, all `dropped` and all
/// `replied`.
#[derive(Debug, Default)]
pub struct ListenerCounters {
    /// Datagrams from clients.
    pub received: Counter,
    /// Datagrams that the kernel had no room for.
    pub receive_dropped: Counter,
    /// Datagrams sent to backends, by rule.
    pub forwarded: [Counter; Rule::ALL.len()],
    /// Datagrams not sent, by reason.
    pub dropped: [Counter; DropReason::ALL.len()],
    /// Datagrams answered by the balancer and not sent, by the kind of the answer.
    pub replied: [Counter; ReplyKind::ALL.len()],
    /// Retry packets sent: to datagrams that were answered, and to some that were forwarded.
    pub retries: Counter,
    /// Tokens looked at, by result.
    pub tokens: [Counter; TokenResult::ALL.len()],
    /// Attempts to begin a connection.
    pub attempts: Counter,
    /// Short headers with a connection ID of a server that nobody knows, by configuration.
    pub unknown_server_ids: [Counter; ConfigId::COUNT],
    /// Datagrams from backends sent to clients.
    pub returned: Counter,
    /// Datagrams from backends that could not be sent to their clients.
    pub return_failed: Counter,
    /// UDP payload octets from clients.
    pub received_bytes: Counter,
    /// UDP payload octets sent to clients.
    pub returned_bytes: Counter,
    /// Flows that are open.
    pub flows: Counter,
    /// Datagrams from backends that were for a client who had the upstream port before.
    pub return_stale: Counter,
    /// Flows that ended to make room, by what was known of their clients.
    pub evicted: [Counter; Standing::ALL.len()],
    /// Connection IDs of servers, routable or learnt, on a client path not seen with them.
    pub path_changes: Counter,
}

/// Counters of each backend that there may be, by its slot. They are made in pieces, when the first of a piece is there: few
/// balancers have thousands, and each worker has counters of its own.
#[derive(Debug)]
pub struct PerBackend(Box<[OnceLock<Box<[BackendCounters]>>]>);

/// So many are made at once.
const PIECE: usize = 256;

impl Default for PerBackend {
    fn default() -> Self {
        Self(std::iter::repeat_with(OnceLock::new).take(MAX_BACKENDS.div_ceil(PIECE)).collect())
    }
}

impl PerBackend {
    /// Those of the backend in this slot, unless they have not been made: all are 0 then.
    #[must_use]
    pub fn get(&self, slot: usize) -> Option<&BackendCounters> {
        self.0.get(slot / PIECE)?.get()?.get(slot % PIECE)
    }

    /// All that have been made.
    pub fn iter(&self) -> impl Iterator<Item = &BackendCounters> {
        self.0.iter().filter_map(OnceLock::get).flatten()
    }
}

/// Whoever writes finds them made by the control plane, before it hears of the backend.
impl Index<usize> for PerBackend {
    type Output = BackendCounters;

    #[inline]
    fn index(&self, slot: usize) -> &BackendCounters {
        let make = || std::iter::repeat_with(BackendCounters::default).take(PIECE).collect();
        &self.0[slot / PIECE].get_or_init(make)[slot % PIECE]
    }
}

/// What happened towards one backend.
#[derive(Debug, Default)]
pub struct BackendCounters {
    /// Datagrams sent to it.
    pub forwarded: Counter,
    /// Datagrams received from it.
    pub returned: Counter,
    /// Flows that began with a first flight, to which it was chosen.
    pub asked: Counter,
    /// Those of them that it has answered.
    pub answered: Counter,
    /// Those of them that have ended without an answer.
    pub unanswered: Counter,
    /// First flights that it has refused, or left unanswered until it went down, and that another backend was sent.
    pub moved: Counter,
    /// What the kernel said instead of sending to it, or of what it had sent.
    pub refused: [Counter; Refusal::ALL.len()],
    /// Connections that it answered with a connection ID of its own, or of nobody.
    pub well_named: Counter,
    /// Connections that it answered with a connection ID of another backend.
    pub misnamed: Counter,
    /// The slot of that other one, the last time, plus one.
    pub named: Counter,
    /// Its live connections.
    pub live: LiveCounters,
}

/// The live connections of one backend, as of the last sweep.
#[derive(Debug, Default)]
pub struct LiveCounters {
    /// The backend's, of which slot and generation are the name.
    pub generation: Counter,
    /// Flows, whatever they have shown.
    pub flows: Counter,
    /// By configuration ID; those without one come last.
    pub by_config: [LiveConfigCounters; CONFIGS],
}

/// Those with connection IDs of one configuration.
#[derive(Debug, Default)]
pub struct LiveConfigCounters {
    /// How many, about.
    pub connections: Counter,
    /// When one of them was heard last, in milliseconds since the process began, plus one; 0 for never.
    pub last_heard: Counter,
}

impl LiveCounters {
    /// Tells of `live`; of instants `millis` says how many milliseconds after the beginning of the process they were.
    pub(crate) fn publish(&self, live: &Live, millis: impl Fn(std::time::Instant) -> u64) {
        let is_another = self.generation.get() != u64::from(live.generation);
        self.generation.set(live.generation.into());
        self.flows.set(live.flows.into());
        for (counters, live) in self.by_config.iter().zip(&live.by_config) {
            counters.connections.set(live.connections.into());
            // What is over is not forgotten; flows are.
            let before = if is_another { 0 } else { counters.last_heard.get() };
            let heard = live.last_heard.map_or(0, |heard| millis(heard) + 1);
            counters.last_heard.set(before.max(heard));
        }
    }
}

impl BackendCounters {
    /// Counts `n` refusals.
    pub fn refuse(&self, refusal: Refusal, n: u64) {
        self.refused[refusal as usize].add(n);
    }

    /// Counts a connection that was answered with a connection ID of `another` backend, or not.
    pub fn answer(&self, another: Option<BackendId>) {
        match another {
            None => self.well_named.add(1),
            Some(another) => {
                self.misnamed.add(1);
                self.named.set(another.slot() as u64 + 1);
            }
        }
    }
}

impl WorkerCounters {
    /// All zero.
    #[must_use]
    pub fn new(listeners: usize) -> Self {
        Self {
            listeners: std::iter::repeat_with(ListenerCounters::default).take(listeners).collect(),
            backends: PerBackend::default(),
            unproven_flows: Counter::default(),
            unfinished_flows: Counter::default(),
            panics: Counter::default(),
            batches: Counter::default(),
            cpu_micros: Counter::default(),
            descriptors: Counter::default(),
            descriptor_limit: Counter::default(),
            rounds: Counter::default(),
        }
    }

    /// Counts a panic: no flow is left, and datagrams that had no verdict have one now. Says how many flows there were.
    pub fn on_panic(&self) -> u64 {
        self.panics.add(1);
        self.unproven_flows.set(0);
        let flows = |listener: &ListenerCounters| {
            listener.drop(
                DropReason::Panic,
                listener.received.get().saturating_sub(listener.verdicts()),
            );
            let flows = listener.flows.get();
            listener.flows.set(0);
            flows
        };
        self.listeners.iter().map(flows).sum()
    }
}

impl ListenerCounters {
    /// Counts `n` datagrams forwarded by `rule`.
    pub fn forward(&self, rule: Rule, n: u64) {
        self.forwarded[rule as usize].add(n);
    }

    /// Counts `n` datagrams answered by the balancer.
    pub fn reply(&self, kind: ReplyKind, n: u64) {
        self.replied[kind as usize].add(n);
    }

    /// Counts `n` datagrams dropped for `reason`.
    pub fn drop(&self, reason: DropReason, n: u64) {
        self.dropped[reason as usize].add(n);
    }

    /// Datagrams from clients that have their verdict.
    fn verdicts(&self) -> u64 {
        let all = self.forwarded.iter().chain(&self.dropped).chain(&self.replied);
        all.map(Counter::get).sum()
    }
}
