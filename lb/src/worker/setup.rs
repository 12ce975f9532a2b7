//! What a worker is started with. Everything that may change while it runs reaches it by the routing
//! snapshot.

use std::{
    net::SocketAddr,
    os::fd::OwnedFd,
    sync::{Arc, atomic::AtomicBool},
};

use arc_swap::ArcSwap;
use quic_lb_config::Config;

use super::mailbox::Mailbox;
use crate::{
    counters::WorkerCounters,
    memory::Memory,
    routing::Routing,
    socket::{Lent, Sharing},
};

/// Where the sockets of a listener come from.
#[derive(Debug)]
pub enum Listen {
    /// Every worker opens one at this address.
    Bind(SocketAddr),
    /// They are open, one for each worker, at one address that they share (SO_REUSEPORT).
    Inherit(Vec<OwnedFd>),
}

impl Listen {
    /// At the addresses of `config`.
    #[must_use]
    pub fn at_addresses_of(config: &Config) -> Vec<Self> {
        config.listeners.iter().map(|listener| Self::Bind(listener.address)).collect()
    }
}

/// Where a worker's socket of one listener comes from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source {
    /// The worker opens it.
    Bind(SocketAddr, Sharing),
    /// It is open.
    Inherit(Lent),
}

/// All that a worker is started with.
pub(super) struct Setup {
    /// In the order of the configuration.
    pub(super) listeners: Vec<Source>,
    pub(super) flows: usize,
    pub(super) descriptors: usize,
    pub(super) siblings: usize,
    /// Becomes true when it is to end.
    pub(super) stop: Arc<AtomicBool>,
    pub(super) routing: Arc<ArcSwap<Routing>>,
    pub(super) memory: Arc<Memory>,
    pub(super) counters: Arc<WorkerCounters>,
    pub(super) mailbox: Arc<Mailbox>,
}
