//! The checked configuration: every reference resolved, every length right, every name unique.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    num::{NonZeroU32, NonZeroUsize},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use quic::{
    routable::{CidConfig, ConfigId, ServerId},
    token::TokenKey,
};
use rustls::pki_types::TrustAnchor;
use zeroize::Zeroizing;

/// How many backends all pools of a [`Config`] together have at most.
pub const MAX_BACKENDS: usize = 16_384;

/// How many listeners a [`Config`] has at most; each costs a socket for each worker.
pub const MAX_LISTENERS: usize = 64;

/// The `TimeoutStopSec` of the unit file that comes with the balancer.
pub const UNIT_STOP_LIMIT: Duration = Duration::from_secs(60);

/// How many slots a table of consistent hashing has at most. A backend gets at least one, also where its
/// share of the weights of its pool is less.
pub const MAX_HASH_SLOTS: usize = 1_048_583;

/// A configuration in which nothing needs to be checked again.
#[derive(Clone, Debug)]
pub struct Config {
    /// Worker threads; `None` for one per core.
    pub workers: Option<NonZeroUsize>,
    /// At least one, with unique names and addresses.
    pub listeners: Vec<Listener>,
    /// Those of the file, with unique names.
    pub pools: Vec<Pool>,
    /// The admin interface; `None` switches it off.
    pub admin: Option<Admin>,
    /// Where commands are kept over restarts.
    pub state_dir: Option<PathBuf>,
    /// What bounds memory and descriptors.
    pub limits: Limits,
    /// What ends flows and the process.
    pub timeouts: Timeouts,
    /// What is logged and how.
    pub log: Log,
    /// Address validation on behalf of the servers.
    pub retry: Retry,
}

/// An address that receives client datagrams.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// The metric label.
    pub name: String,
    /// Where it listens. An unspecified address covers every local address of its family.
    pub address: SocketAddr,
    /// Whether it covers those of the other family too, which takes `[::]`.
    pub both_families: bool,
    /// Index into [`Config::pools`].
    pub pool: usize,
    /// When its clients have to prove their address; `None` for what [`Retry::mode`] says.
    pub retry_mode: Option<RetryMode>,
}

/// A named set of servers that share configurations of connection IDs.
#[derive(Clone, Debug)]
pub struct Pool {
    /// The metric label.
    pub name: String,
    /// How connection IDs are read, in the order of the file: the last is what servers make them by. Empty for
    /// servers without routable connection IDs.
    pub cid_configs: Vec<CidConfig>,
    /// Names and addresses are unique within the pool.
    pub backends: Vec<Backend>,
    /// Local addresses that datagrams to the backends leave from; empty lets the kernel choose.
    pub source_addresses: Vec<IpAddr>,
    /// What the servers derive the tokens of stateless resets from.
    pub reset_secret: Option<ResetSecret>,
    /// What decides about the backend of a packet whose server nobody knows.
    pub hash: HashBy,
    /// How the backends are checked, if they are.
    pub health_check: Option<HealthCheck>,
    /// Whether the servers honour the tokens of address validation.
    pub honours_tokens: HonoursTokens,
    /// What they show when they report something; `None` where reports are taken as commands are.
    pub report_token: Option<BearerToken>,
}

/// How the backends of a pool are checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// What is asked.
    pub kind: CheckKind,
    /// From one check of a backend to the next.
    pub interval: Duration,
    /// How long a check waits for its answer; at most the interval.
    pub timeout: Duration,
    /// So many checks in a row have to pass after a fall.
    pub rise: NonZeroU32,
    /// So many failed ones in a row are a fall.
    pub fall: NonZeroU32,
    /// The port that is checked, if it is not that of the backend.
    pub port: Option<u16>,
    /// Where fewer percent of the backends would be left, failed checks are ignored.
    pub panic_below: u8,
    /// How long the share of a backend grows that gets new connections again; zero for not at all.
    pub slow_start: Duration,
}

/// What a check asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CheckKind {
    /// Which versions the server has. Any QUIC server answers that, and needs nothing for it.
    VersionNegotiation,
    /// For a connection, as clients do.
    Quic(Handshake),
    /// For something over HTTP/3.
    Http3(Handshake, Request),
}

/// What a check asks for over HTTP/3.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The path, with a query if there is one.
    pub path: String,
    /// Answers that are good; at least one.
    pub expect_status: Vec<u16>,
}

/// How a check begins its connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handshake {
    /// The application protocol that is asked for.
    pub alpn: String,
    /// The name that is asked for, and that the certificate has to carry; `None` for the address that is
    /// checked.
    pub server_name: Option<String>,
    /// Which certificates are good.
    pub certificate: CertificatePolicy,
}

/// Which certificates of servers are good. Whichever it is, the server has to hold its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CertificatePolicy {
    /// All of them.
    Ignored,
    /// Those of today, for the name that is asked for, that lead to one of these.
    Verified(TrustAnchors),
}

/// Whom certificates have to lead to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustAnchors {
    /// The file that they were read from, as it is called in the configuration.
    pub file: String,
    /// At least one.
    pub anchors: Arc<Vec<TrustAnchor<'static>>>,
}

/// What consistent hashing goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HashBy {
    /// The client's address: all of an IPv4 one, the first 64 bits of an IPv6 one.
    ClientAddress,
    /// The client's address and port.
    ClientAddressAndPort,
    /// The destination connection ID that the client has drawn for its first packets; of packets that
    /// do not show it, the client's address and port.
    Dcid,
}

impl HashBy {
    /// What a pool goes by that does not say, with `routable` connection IDs or without.
    #[must_use]
    pub const fn default_of(routable: bool) -> Self {
        if routable { Self::Dcid } else { Self::ClientAddress }
    }
}

/// What servers derive the tokens of stateless resets from. Its octets are never printed, and end with it; they are in
/// one place, wherever it is moved.
#[derive(Clone, PartialEq, Eq)]
pub struct ResetSecret(Arc<Zeroizing<[u8; 16]>>);

impl ResetSecret {
    pub(crate) fn new(octets: [u8; 16]) -> Self {
        Self(Arc::new(Zeroizing::new(octets)))
    }

    /// Its octets.
    #[must_use]
    pub fn octets(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Debug for ResetSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ResetSecret(masked)")
    }
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
    /// Where it is checked, if that is not where it listens, or another port there.
    pub check_address: Option<SocketAddr>,
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

/// The admin interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admin {
    /// Where it listens.
    pub address: SocketAddr,
    /// Names that it is asked by, besides `localhost` and addresses.
    pub host_names: Vec<String>,
    /// Where commands are taken, if the file says so.
    pub commands: Option<Commands>,
}

/// Where commands are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Commands {
    /// At a Unix socket.
    Unix(PathBuf),
    /// At an address, from whoever has the token.
    Token(SocketAddr, BearerToken),
    /// At an address over TLS, from whoever has a certificate that is trusted for it.
    Certificates(SocketAddr, ServerTls),
}

/// How a server shows who it is, and knows its clients.
#[derive(Clone)]
pub struct ServerTls {
    /// The files, as they are called in the configuration.
    pub cert_file: String,
    /// The one with the private key.
    pub key_file: String,
    /// What the certificates of clients have to lead to.
    pub clients: TrustAnchors,
    /// All of it as TLS takes it.
    pub config: Arc<rustls::ServerConfig>,
    /// Of the certificates and the key.
    pub(crate) hash: [u8; 32],
}

impl PartialEq for ServerTls {
    fn eq(&self, other: &Self) -> bool {
        let all = |of: &Self| (of.cert_file.clone(), of.key_file.clone(), of.hash);
        all(self) == all(other) && self.clients == other.clients
    }
}

impl Eq for ServerTls {}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTls").field("cert_file", &self.cert_file).finish_non_exhaustive()
    }
}

/// What whoever sends a command, or a report, has to show. It is never printed, and ends with this.
#[derive(Clone, PartialEq, Eq)]
pub struct BearerToken {
    /// The file that it was read from, as it is called in the configuration.
    pub file: String,
    token: Arc<Zeroizing<String>>,
}

impl BearerToken {
    pub(crate) fn new(file: String, token: Zeroizing<String>) -> Self {
        Self { file, token: Arc::new(token) }
    }

    /// As it is shown: the value of the header `Authorization`.
    #[must_use]
    pub fn header(&self) -> Zeroizing<String> {
        const SCHEME: &str = "Bearer ";
        let mut header = Zeroizing::new(String::with_capacity(SCHEME.len() + self.token.len()));
        header.push_str(SCHEME);
        header.push_str(&self.token);
        header
    }

    /// Whether this is it. How long that takes tells nothing but its length.
    #[must_use]
    pub fn is(&self, shown: &[u8]) -> bool {
        let token = self.token.as_bytes();
        let differ = token.iter().zip(shown).fold(0, |differ, (one, other)| differ | (one ^ other));
        token.len() == shown.len() && std::hint::black_box(differ) == 0
    }
}

impl fmt::Debug for BearerToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BearerToken(masked)")
    }
}

/// What bounds memory and descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Flows of all workers together; each holds one descriptor and one upstream port.
    pub flows: NonZeroUsize,
    /// Remembered connection IDs and handshakes, of all listeners together.
    pub remembered: NonZeroUsize,
    /// How many connections may begin in a second.
    pub new_connections: NewConnections,
    /// What becomes of short headers that nothing is known about, while addresses are validated.
    pub unknown_short_headers: UnknownPackets,
}

/// How many connections may begin in a second; `None` for any number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct NewConnections {
    /// On all listeners together.
    pub total: Option<NonZeroU32>,
    /// On each listener.
    pub per_listener: Option<NonZeroU32>,
    /// From each IPv4 address and each IPv6 network of 64 bits.
    pub per_address: Option<NonZeroU32>,
    /// From each IPv4 network of 24 bits and each IPv6 network of 48 bits.
    pub per_network: Option<NonZeroU32>,
}

/// What becomes of packets that nothing is known about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum UnknownPackets {
    /// They go to the backend that consistent hashing says.
    #[default]
    Forward,
    /// They are dropped.
    Refuse,
}

/// Address validation on behalf of the servers.
#[derive(Clone, Debug)]
pub struct Retry {
    /// When clients have to prove their address, on listeners that do not say themselves.
    pub mode: RetryMode,
    /// How tokens are made.
    pub format: TokenFormat,
    /// The keys of tokens, with unique sequence numbers; not empty where validation can begin.
    /// Tokens are made with the first that has not made too many.
    pub keys: Vec<TokenKey>,
    /// How long the token of a Retry is good for.
    pub lifetime: Duration,
    /// For how long Initials without token are forwarded besides being answered, when validation
    /// begins.
    pub transition: Duration,
    /// What becomes of versions of which no Retry is known.
    pub other_versions: Admittance,
    /// Versions for which the opposite holds.
    pub except_versions: Vec<u32>,
    /// When [`RetryMode::Adaptive`] begins and ends validation.
    pub adaptive: Adaptive,
}

/// When clients have to prove their address before their Initials are forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum RetryMode {
    /// Never.
    #[default]
    Off,
    /// Always.
    Always,
    /// When many connections begin, or servers report many that are half open.
    Adaptive,
}

/// Whether servers honour the tokens of address validation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum HonoursTokens {
    /// That has to be shown by asking them.
    #[default]
    Probe,
    /// They do.
    Yes,
    /// They do not.
    No,
}

/// How tokens are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum TokenFormat {
    /// For servers that see the balancer's addresses: `quic::token::nat`.
    #[default]
    Nat,
    /// For servers that see those of the clients: `quic::token::shared_state`.
    SharedState,
}

/// Whether something is let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Admittance {
    /// It is.
    #[default]
    Allow,
    /// It is not.
    Deny,
}

/// When validation begins and ends by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Adaptive {
    /// It begins when so many connections begin on the listener in a second,
    pub on_rate: u32,
    /// or a server of its pool reports so many half-open ones.
    pub on_half_open: u32,
    /// It ends when there are fewer attempts than this in a second,
    pub off_rate: u32,
    /// and every server reports fewer half-open connections than this,
    pub off_half_open: u32,
    /// for this long.
    pub hold: Duration,
}

impl Config {
    /// When clients of `listener` have to prove their address.
    #[must_use]
    pub fn retry_mode(&self, listener: &Listener) -> RetryMode {
        listener.retry_mode.unwrap_or(self.retry.mode)
    }

    /// Whether the servers of a pool are asked if they honour the tokens of address validation.
    #[must_use]
    pub fn asks_for_tokens(&self, pool: &Pool) -> bool {
        let validates = |listener: &Listener| {
            let of = self.pools.get(listener.pool);
            self.retry_mode(listener) != RetryMode::Off && of.is_some_and(|of| of.name == pool.name)
        };
        pool.honours_tokens == HonoursTokens::Probe && self.listeners.iter().any(validates)
    }

    /// By which mode it is decided when nothing is known of the servers yet: no Retry is sent where that they honour
    /// tokens has to be shown first.
    #[must_use]
    pub fn retry_mode_at_start(&self, listener: &Listener) -> RetryMode {
        match self.pools.get(listener.pool).map(|pool| pool.honours_tokens) {
            Some(HonoursTokens::Yes) => self.retry_mode(listener),
            Some(HonoursTokens::Probe | HonoursTokens::No) | None => RetryMode::Off,
        }
    }
}

/// What ends flows and the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// A flow without a datagram in either direction for this long is forgotten.
    pub flow_idle: Duration,
    /// A flow whose backend has not answered yet is forgotten after this long.
    pub flow_unanswered: Duration,
    /// A connection ID that was learnt from a server without routable ones is forgotten after it was
    /// not used for this long.
    pub learnt: Duration,
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
    /// A record for each connection, if there is to be one.
    pub connections: Option<ConnectionLog>,
}

/// The connection log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionLog {
    /// Where it goes.
    pub to: LogTarget,
    /// How many of a million connections are logged.
    pub sample_millionths: u32,
    /// How records look.
    pub format: LogFormat,
}

/// Where records go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogTarget {
    /// The standard output of the process.
    Stdout,
    /// This file.
    File(PathBuf),
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
