//! What a worker is started with, and what it is told while it runs.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use quic_lb_config::Timeouts;

use crate::{
    counters::WorkerCounters, flows::FlowLimits, memory::Memory, routing::Routing, socket::Sharing,
};

/// All that a worker is started with.
pub(super) struct Setup {
    pub(super) sharing: Sharing,
    pub(super) addresses: Vec<SocketAddr>,
    pub(super) flows: usize,
    pub(super) descriptors: usize,
    pub(super) siblings: usize,
    pub(super) shared: Arc<Shared>,
    pub(super) routing: Arc<ArcSwap<Routing>>,
    pub(super) memory: Arc<Memory>,
    pub(super) counters: Arc<WorkerCounters>,
}

/// What the workers are told while they run.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) stop: AtomicBool,
    idle_ms: AtomicU64,
    unanswered_ms: AtomicU64,
}

impl Shared {
    pub(super) fn new(timeouts: &Timeouts) -> Self {
        let (stop, idle_ms, unanswered_ms) = Default::default();
        let shared = Self { stop, idle_ms, unanswered_ms };
        shared.set_timeouts(timeouts);
        shared
    }

    pub(super) fn set_timeouts(&self, timeouts: &Timeouts) {
        let milliseconds =
            |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        self.idle_ms.store(milliseconds(timeouts.flow_idle), Relaxed);
        self.unanswered_ms.store(milliseconds(timeouts.flow_unanswered), Relaxed);
    }

    pub(super) fn limits(&self, max_flows: usize) -> FlowLimits {
        FlowLimits {
            max_flows,
            idle: Duration::from_millis(self.idle_ms.load(Relaxed)),
            unanswered: Duration::from_millis(self.unanswered_ms.load(Relaxed)),
        }
    }
}
