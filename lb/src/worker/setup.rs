//! What a worker is started with. Everything that may change while it runs reaches it by the routing
//! snapshot.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::AtomicBool},
};

use arc_swap::ArcSwap;

use crate::{counters::WorkerCounters, memory::Memory, routing::Routing, socket::Sharing};

/// All that a worker is started with.
pub(super) struct Setup {
    pub(super) sharing: Sharing,
    pub(super) addresses: Vec<SocketAddr>,
    pub(super) flows: usize,
    pub(super) descriptors: usize,
    pub(super) siblings: usize,
    /// Becomes true when it is to end.
    pub(super) stop: Arc<AtomicBool>,
    pub(super) routing: Arc<ArcSwap<Routing>>,
    pub(super) memory: Arc<Memory>,
    pub(super) counters: Arc<WorkerCounters>,
}
