//! What a worker is started with. Everything that may change while it runs reaches it by the routing
//! snapshot.

use std::{
    os::fd::OwnedFd,
    sync::{Arc, atomic::AtomicBool},
};

use arc_swap::ArcSwap;
use quic_lb_config::{Config, Listener};

use super::{loops::UpstreamPorts, mailbox::Mailbox, panics::Panics};
use crate::{
    client_path::ListenerAddr,
    connection_log::queue::Queue,
    counters::WorkerCounters,
    memory::Memory,
    routing::Routing,
    socket::{Families, Lent, Sharing},
};

/// Where the sockets of a listener come from.
#[derive(Debug)]
pub enum Listen {
    /// Every worker opens one at this address.
    Bind(ListenerAddr, Families),
    /// They are open, one for each worker, at one address that they share (SO_REUSEPORT).
    Inherit(Vec<OwnedFd>),
}

impl Listen {
    /// At the addresses of `config`.
    #[must_use]
    pub fn at_addresses_of(config: &Config) -> Vec<Self> {
        let bind = |listener: &Listener| {
            let families = if listener.both_families { Families::Both } else { Families::Own };
            Self::Bind(ListenerAddr(listener.address), families)
        };
        config.listeners.iter().map(bind).collect()
    }
}

/// Where a worker's socket of one listener comes from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source {
    /// The worker opens it.
    Bind(ListenerAddr, Families, Sharing),
    /// It is open.
    Inherit(Lent),
}

impl Source {
    /// What the process lends the worker for it.
    pub(super) const fn lent(&self) -> Option<Lent> {
        match self {
            Self::Bind(..) => None,
            Self::Inherit(lent) => Some(*lent),
        }
    }
}

/// Where the sockets of a worker come from.
#[derive(Clone, Debug)]
pub(super) enum Sockets {
    /// Those of its listeners, in the order of the configuration.
    Listeners(Vec<Source>),
    /// A worker of the process before this one hands them over, with all that it has: so many listeners.
    Predecessor(Lent, usize),
}

/// All that a worker is started with.
pub(super) struct Setup {
    /// Its number.
    pub(super) worker: usize,
    pub(super) sockets: Sockets,
    /// Where it gets its orders, in the table of the process.
    pub(super) orders: Lent,
    pub(super) flows: usize,
    pub(super) descriptors: usize,
    pub(super) siblings: usize,
    /// The local ports that its upstream sockets may have.
    pub(super) ports: Vec<u16>,
    /// Becomes true when it is to end.
    pub(super) stop: Arc<AtomicBool>,
    pub(super) routing: Arc<ArcSwap<Routing>>,
    pub(super) memory: Arc<Memory>,
    pub(super) counters: Arc<WorkerCounters>,
    pub(super) mailbox: Arc<Mailbox>,
    /// Whether it gives up what it does not need, once its listeners are open.
    pub(super) confined: bool,
    /// Those of all workers.
    pub(super) upstream_ports: Arc<UpstreamPorts>,
    /// What is logged of flows.
    pub(super) records: Arc<Queue>,
    /// Where panics of all workers are told.
    pub(super) panics: Arc<Panics>,
}
