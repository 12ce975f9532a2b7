//! The checked configuration: every reference resolved, every length right, every name unique.

use std::{
    net::{IpAddr, SocketAddr},
    num::{NonZeroU32, NonZeroUsize},
    time::Duration,
};

use quic::routable::{CidConfig, ConfigId, ServerId};

/// A configuration in which nothing needs to be checked again.
#[derive(Clone, Debug)]
pub struct Config {
    /// Worker threads; `None` for one per core.
    pub workers: Option<NonZeroUsize>,
    /// At least one, with unique names and addresses.
    pub listeners: Vec<Listener>,
    /// Those of the file, with unique names.
    pub pools: Vec<Pool>,
    /// Where the admin interface listens; `None` switches it off.
    pub admin: Option<SocketAddr>,
    /// What bounds memory and descriptors.
    pub limits: Limits,
    /// What ends flows and the process.
    pub timeouts: Timeouts,
    /// What is logged and how.
    pub log: Log,
}

/// An address that receives client datagrams.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// The metric label.
    pub name: String,
    /// Where it listens. An unspecified address covers every local address of its family.
    pub address: SocketAddr,
    /// Index into [`Config::pools`].
    pub pool: usize,
}

/// A named set of servers that share configurations of connection IDs.
#[derive(Clone, Debug)]
pub struct Pool {
    /// The metric label.
    pub name: String,
    /// How connection IDs are read, by ascending config ID; empty for servers without routable
    /// connection IDs.
    pub cid_configs: Vec<CidConfig>,
    /// Names and addresses are unique within the pool.
    pub backends: Vec<Backend>,
    /// Local addresses that datagrams to the backends leave from; empty lets the kernel choose.
    pub source_addresses: Vec<IpAddr>,
}

/// One server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// The metric label.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// What its connection IDs carry, one for each of the pool's configurations.
    pub server_ids: Vec<(ConfigId, ServerId)>,
    /// Its share of new connections relative to the others of the pool.
    pub weight: NonZeroU32,
    /// Whether it gets new connections.
    pub admission: Admission,
}

/// What the operator wants of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Admission {
    /// Gets everything.
    #[default]
    Active,
    /// Keeps its connections, gets no new ones.
    Draining,
}

/// What bounds memory and descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Flows of all workers together; each holds one descriptor and one upstream port.
    pub flows: NonZeroUsize,
    /// Remembered connection IDs and handshakes, of all listeners together.
    pub remembered: NonZeroUsize,
}

/// What ends flows and the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// A flow without a datagram in either direction for this long is forgotten.
    pub flow_idle: Duration,
    /// A flow whose backend has not answered yet is forgotten after this long.
    pub flow_unanswered: Duration,
    /// How long the process goes on forwarding after SIGTERM.
    pub drain: Duration,
}

/// What is logged and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// The least severe level that is written.
    pub level: LogLevel,
    /// How records look.
    pub format: LogFormat,
}

/// The levels of `tracing`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum LogLevel {
    /// Nothing works any more.
    Error,
    /// Someone may have to look.
    Warn,
    /// What an operator did or must know.
    #[default]
    Info,
    /// Decisions per connection.
    Debug,
    /// Decisions per packet.
    Trace,
}

/// How log records look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}
