//! Counters of one worker: written by that worker alone, read by the control plane at a scrape.
//!
//! With a single writer an addition needs no locked instruction: a relaxed load and a relaxed
//! store. Readers may see a value that is a moment old, never a torn one.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::{
    backend::MAX_BACKENDS,
    verdict::{DropReason, ReplyKind, Rule, TokenResult},
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
    pub backends: Box<[BackendCounters]>,
}

/// What happened on one listener. `received` is the sum of all `forwarded`, all `dropped` and all
/// `replied`.
#[derive(Debug, Default)]
pub struct ListenerCounters {
    /// Datagrams from clients.
    pub received: Counter,
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
    /// Half-open flows that ended to make room.
    pub evicted: Counter,
    /// Routable connection IDs on a client path not seen with them.
    pub path_changes: Counter,
}

/// What happened towards one backend.
#[derive(Debug, Default)]
pub struct BackendCounters {
    /// Datagrams sent to it.
    pub forwarded: Counter,
    /// Datagrams received from it.
    pub returned: Counter,
    /// "Connection refused" reports of the kernel.
    pub refused: Counter,
}

impl WorkerCounters {
    /// All zero.
    #[must_use]
    pub fn new(listeners: usize) -> Self {
        Self {
            listeners: std::iter::repeat_with(ListenerCounters::default).take(listeners).collect(),
            backends: std::iter::repeat_with(BackendCounters::default).take(MAX_BACKENDS).collect(),
        }
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
}
