//! What backends and pools are called, and whether a backend gets new connections.
//!
//! Backends are named by [`BackendId`], which stays with a backend over reloads, so that flows and
//! remembered connection IDs go on pointing at it, and never comes to mean another one.

use std::{fmt, net::SocketAddr};

use serde::{Deserialize, Serialize};

/// How many backends all pools together may have.
pub const MAX_BACKENDS: usize = quic_lb_config::MAX_BACKENDS;

/// One backend, as long as the process lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BackendId {
    pub(crate) slot: u16,
    pub(crate) generation: u16,
}

impl BackendId {
    /// Where the backend stands in tables kept by backend; below [`MAX_BACKENDS`].
    #[must_use]
    pub const fn slot(self) -> usize {
        self.slot as usize
    }

    /// How often the slot had been given to another backend before.
    #[must_use]
    pub const fn generation(self) -> u16 {
        self.generation
    }
}

/// A pool, by its place in the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PoolIndex(pub usize);

/// Where a backend listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BackendAddr(pub SocketAddr);

impl fmt::Display for BackendAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whether a backend gets new connections. Each state but a removed backend keeps those it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum BackendState {
    /// Gets everything.
    #[default]
    Active,
    /// Was down or miswired and is tried again: it gets a small share of new connections until it answers.
    Probing,
    /// Keeps its connections, gets no new ones.
    Draining,
    /// Does not answer.
    Down,
    /// Answers under connection IDs that do not lead to it.
    Miswired,
}

impl BackendState {
    /// Every state.
    pub const ALL: [Self; 5] =
        [Self::Active, Self::Probing, Self::Draining, Self::Down, Self::Miswired];

    /// Whether it gets new connections as long as others do too.
    #[must_use]
    pub const fn takes_connections(self) -> bool {
        match self {
            Self::Active | Self::Probing => true,
            Self::Draining | Self::Down | Self::Miswired => false,
        }
    }

    /// The metric label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Probing => "probing",
            Self::Draining => "draining",
            Self::Down => "down",
            Self::Miswired => "miswired",
        }
    }
}
