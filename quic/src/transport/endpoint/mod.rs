//! The endpoint: which connection a datagram belongs to, and what becomes of those that belong to
//! none.
//!
//! Everything a stranger can reach is bounded: connections and half-open ones by configuration,
//! replies by one per datagram, tables by the connections they point to.

#[cfg(test)]
mod check;
mod issuer;
mod keyed;
mod shared;
mod strangers;
mod tables;
mod tokens;

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    net::{IpAddr, SocketAddr},
    sync::{Arc, MutexGuard},
    time::{Instant, SystemTime},
};

pub use issuer::CidIssuer;
use issuer::Issuers;
use keyed::Keyed;
use rustls::pki_types::ServerName;
pub use shared::SharedConnection;
use strangers::{Reply, Stranger};
use tables::{Entry, Turns};
use tokens::{KeptTokens, SpentTokens, Tokens};
pub use tokens::{TokenPolicy, TokenResult};

use super::{
    config::{ClientConfig, ServerConfig},
    connection::{Arrival, Connection, Event, Setup, Transmission},
    ecn::Ecn,
    packet::DropReason,
    reset::ResetKey,
};
use crate::{
    bucket::Bucket,
    connection_id::ConnectionId,
    header::{Kind, LongType},
    invariants::Packet,
    random::Random,
    routable::NoncesExhausted,
    token::InvalidToken,
};

/// Octets of the connection ID that a client draws for its first flight.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-7.2>
const FIRST_DCID_LEN: usize = 8;

/// Stateless resets in a second, and at once: enough for the clients of a server that has started anew, who each ask until they
/// are told; a small part of a core for those who ask in other people's names.
const RESETS_PER_SECOND: u32 = 1000;
const RESETS_AT_ONCE: u32 = 1000;

/// What an endpoint is made of.
#[derive(Debug)]
pub struct EndpointConfig {
    /// Where connection IDs come from.
    pub cids: CidIssuer,
    /// Present on servers.
    pub server: Option<ServerConfig>,
    /// Whose address tokens are honoured; `None` for this endpoint's own.
    pub tokens: Option<TokenPolicy>,
    /// Decides all random choices; has to come from a cryptographic source.
    pub seed: [u8; 32],
}

impl EndpointConfig {
    /// An endpoint that only connects.
    #[must_use]
    pub fn client(seed: [u8; 32]) -> Self {
        let mut random = Random::new(seed);
        let reset_key = ResetKey::new(random.octets());
        let cids = CidIssuer::standalone(FIRST_DCID_LEN, random.octets(), reset_key);
        Self { cids, server: None, tokens: None, seed: random.octets() }
    }

    /// An endpoint that accepts, with connection IDs from `cids`.
    #[must_use]
    pub const fn server(server: ServerConfig, cids: CidIssuer, seed: [u8; 32]) -> Self {
        Self { cids, server: Some(server), tokens: None, seed }
    }
}

/// Where a datagram came from.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// The source.
    pub remote: SocketAddr,
    /// The destination, where it is known.
    pub local: Option<IpAddr>,
    /// The ECN mark.
    pub ecn: Option<Ecn>,
}

/// Datagrams to send, appended to the buffer given to [`Endpoint::poll_transmit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// The destination.
    pub remote: SocketAddr,
    /// The source, where one was seen or chosen.
    pub local: Option<IpAddr>,
    /// The ECN mark.
    pub ecn: Option<Ecn>,
    /// Octets of each datagram; the last one may be shorter.
    pub segment: usize,
    /// Octets of all datagrams.
    pub len: usize,
}

/// Which connection of an endpoint. Never used again for another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionHandle {
    index: usize,
    generation: u64,
}

/// Why a connection cannot be started.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ConnectError {
    /// The server name is neither a DNS name nor an IP address.
    #[error("{0:?} is not a server name")]
    ServerName(String),
    /// TLS cannot start with this configuration.
    #[error("the TLS configuration does not serve QUIC: {0}")]
    Tls(#[from] rustls::Error),
    /// No connection IDs are left.
    #[error("{0}")]
    Nonces(#[from] NoncesExhausted),
}

/// A socket's worth of connections.
pub struct Endpoint {
    random: Random,
    server: Option<ServerConfig>,
    issuers: Issuers,
    tokens: Tokens,
    /// A moment and the wall-clock time it was.
    clock: (Instant, SystemTime),
    connections: Vec<Option<Entry>>,
    free: Vec<usize>,
    next_generation: u64,
    count: usize,
    half_open: usize,
    by_cid: HashMap<ConnectionId, usize, Keyed>,
    /// Connection IDs that clients drew, until their handshake is confirmed.
    by_first_dcid: HashMap<(SocketAddr, ConnectionId), usize, Keyed>,
    /// By the connection ID of the Retry that a connection began with, as long as that is in the table above.
    by_retry: HashMap<ConnectionId, usize, Keyed>,
    by_reset_token: HashMap<(SocketAddr, [u8; 16]), usize, Keyed>,
    /// Connections that were acted on since the tables and the application were told of them.
    to_settle: Turns,
    /// Connections that may have something to send.
    may_send: Turns,
    deadlines: BTreeSet<(Instant, usize)>,
    replies: VecDeque<Reply>,
    events: VecDeque<(ConnectionHandle, Event)>,
    unclaimed: Option<ConnectionId>,
    kept_tokens: KeptTokens,
    spent_tokens: SpentTokens,
    drops: [u64; DropReason::COUNT],
    token_results: [u64; TokenResult::COUNT],
    tokens_refused: [u64; InvalidToken::ALL.len()],
    resets: Bucket,
    resets_sent: u64,
}

impl Endpoint {
    /// An endpoint at the moment `now`, which is `wall` for the rest of the world.
    #[must_use]
    pub fn new(config: EndpointConfig, now: Instant, wall: SystemTime) -> Self {
        let mut random = Random::new(config.seed);
        let hasher = Keyed::new(&mut random);
        let tokens = config.tokens.map_or_else(|| Tokens::own(&mut random), Tokens::new);
        Self {
            server: config.server,
            issuers: Issuers::new(config.cids),
            tokens,
            clock: (now, wall),
            connections: Vec::new(),
            free: Vec::new(),
            next_generation: 0,
            count: 0,
            half_open: 0,
            by_cid: HashMap::with_hasher(hasher),
            by_first_dcid: HashMap::with_hasher(hasher),
            by_retry: HashMap::with_hasher(hasher),
            by_reset_token: HashMap::with_hasher(hasher),
            to_settle: Turns::default(),
            may_send: Turns::default(),
            deadlines: BTreeSet::new(),
            replies: VecDeque::new(),
            events: VecDeque::new(),
            unclaimed: None,
            kept_tokens: KeptTokens::default(),
            spent_tokens: SpentTokens::new(hasher),
            drops: [0; DropReason::COUNT],
            token_results: [0; TokenResult::COUNT],
            tokens_refused: [0; InvalidToken::ALL.len()],
            resets: Bucket::new(now, RESETS_PER_SECOND, RESETS_AT_ONCE),
            resets_sent: 0,
            random,
        }
    }

    /// Starts a connection to `server_name` at `remote`.
    ///
    /// # Errors
    ///
    /// [`ConnectError`] says what is wrong with the name or the configuration.
    pub fn connect(
        &mut self,
        now: Instant,
        config: &ClientConfig,
        remote: SocketAddr,
        server_name: &str,
    ) -> Result<ConnectionHandle, ConnectError> {
        let name = ServerName::try_from(server_name.to_owned())
            .map_err(|_| ConnectError::ServerName(server_name.to_owned()))?;
        let (local_cid, reset_token) = self.issuers.issue(|id| self.by_cid.contains_key(id))?;
        let first: [u8; FIRST_DCID_LEN] = self.random.octets();
        let first = ConnectionId::new(&first).expect("8 octets fit");
        let token = self.kept_tokens.take(server_name);
        let setup = Setup {
            now,
            version: config.version,
            config: Arc::clone(&config.transport),
            remote,
            local: None,
            local_cid,
            reset_token,
            remote_cid: first,
            original_dcid: first,
            retry_scid: None,
            token: token.unwrap_or_default(),
            address_validated: true,
            disable_active_migration: false,
            preferred: None,
            random: Random::new(self.random.octets()),
        };
        let limit = self.issuers.per_connection();
        let connection = Connection::client(setup, Arc::clone(&config.tls), name, limit)?;
        let index = self.insert(connection, None, Some(server_name.to_owned()));
        self.by_cid.insert(local_cid, index);
        Ok(self.handle_of(index))
    }

    /// Takes a datagram. Its octets are decrypted in place.
    pub fn handle_datagram(&mut self, now: Instant, from: Received, datagram: &mut [u8]) {
        let arrival = Arrival {
            now,
            remote: from.remote,
            local: from.local,
            ecn: from.ecn,
            len: datagram.len(),
        };
        match self.find(&arrival, datagram) {
            Ok((index, dcid_len)) => self.deliver(index, arrival, datagram, dcid_len),
            Err(stranger) => {
                let outcome = match stranger {
                    Stranger::Short => self.on_unknown_short(&arrival, datagram),
                    Stranger::Initial(version) => self.on_initial(&arrival, version, datagram),
                    Stranger::Version => self.on_unknown_version(&arrival, datagram),
                    Stranger::Other(reason) => Err(reason),
                };
                if matches!(outcome, Err(DropReason::UnknownConnection)) {
                    self.note_unclaimed(datagram);
                }
                if let Err(reason) = outcome {
                    self.drops[reason as usize] += 1;
                }
            }
        }
    }

    /// Does what is due at `now`.
    pub fn handle_deadline(&mut self, now: Instant) {
        while let Some(&(at, index)) = self.deadlines.first()
            && at <= now
        {
            self.deadlines.pop_first();
            let Some(entry) = &mut self.connections[index] else { continue };
            entry.deadline = None;
            entry.connection.lock().handle_deadline(now);
            self.touch(index);
        }
    }

    /// Appends the next datagrams, at most `max_segments` of one size, to `out`. Whoever has no room
    /// for them need not ask: nothing else depends on it.
    pub fn poll_transmit(
        &mut self,
        now: Instant,
        max_segments: usize,
        out: &mut Vec<u8>,
    ) -> Option<Transmit> {
        if let Some(reply) = self.replies.pop_front() {
            out.extend_from_slice(&reply.octets);
            let len = reply.octets.len();
            let Reply { remote, local, .. } = reply;
            return Some(Transmit { remote, local, ecn: None, segment: len, len });
        }
        while let Some(index) = self.may_send.next() {
            let Some(entry) = &self.connections[index] else { continue };
            let shared = entry.connection.clone();
            let mut connection = shared.lock();
            self.supply(now, index, &mut connection);
            let start = out.len();
            if let Some(sent) = connection.poll_transmit(now, max_segments, out) {
                self.touch(index);
                let len = out.len() - start;
                let Transmission { remote, local, ecn, segment } = sent;
                return Some(Transmit { remote, local, ecn, segment, len });
            }
            // The lock is at hand, and sending is what moves deadlines last.
            self.settle(index, &mut connection);
        }
        None
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<(ConnectionHandle, Event)> {
        self.settle_all();
        self.events.pop_front()
    }

    /// Whether [`Self::poll_transmit`] or [`Self::poll_event`] should be called: something was
    /// changed since they gave nothing more.
    #[must_use]
    pub fn has_work(&self) -> bool {
        let connections = !self.may_send.is_empty() || !self.to_settle.is_empty();
        connections || !self.events.is_empty() || !self.replies.is_empty()
    }

    /// When [`Self::handle_deadline`] has something to do.
    pub fn deadline(&mut self) -> Option<Instant> {
        self.settle_all();
        self.deadlines.first().map(|&(at, _)| at)
    }

    /// Switches to another issuer: every connection gets connection IDs of the new one, and the
    /// old ones are asked back.
    ///
    /// draft-ietf-quic-load-balancers-21, section 3
    pub fn set_cid_config(&mut self, new: CidIssuer) {
        self.issuers.replace(new);
        let limit = self.issuers.per_connection();
        for index in 0..self.connections.len() {
            if let Some(entry) = &self.connections[index] {
                entry.connection.lock().rotate_cids(limit);
                self.touch(index);
            }
        }
    }

    /// Replaces the configuration for connections to come; `None` accepts no more.
    pub fn set_server_config(&mut self, server: Option<ServerConfig>) {
        self.server = server;
    }

    /// Replaces the tokens that are honoured.
    pub fn set_token_policy(&mut self, tokens: TokenPolicy) {
        self.tokens.replace(tokens);
    }

    /// Tells the wall-clock time at `now`; worth repeating when the system's clock was set.
    pub const fn set_wall_clock(&mut self, now: Instant, wall: SystemTime) {
        self.clock = (now, wall);
    }

    /// A connection, until it is over and forgotten.
    #[must_use]
    pub fn connection(&self, handle: ConnectionHandle) -> Option<MutexGuard<'_, Connection>> {
        self.entry(handle).map(|entry| entry.connection.lock())
    }

    /// Where the client of a connection is, as a Retry token has told: its true address, where a
    /// balancer made the token and rewrites addresses. `None` without such a token, and once the
    /// client has moved: of other paths the token said nothing.
    #[must_use]
    pub fn sealed_client(&self, handle: ConnectionHandle) -> Option<SocketAddr> {
        let entry = self.entry(handle)?;
        let remote = entry.connection.lock().path().remote;
        entry.sealed_client(remote)
    }

    /// A connection, to act on.
    pub fn connection_mut(
        &mut self,
        handle: ConnectionHandle,
    ) -> Option<MutexGuard<'_, Connection>> {
        self.look_at(handle);
        self.connection(handle)
    }

    /// A connection, to act on by whoever has it, without the endpoint. [`Self::look_at`] has to
    /// follow.
    #[must_use]
    pub fn share(&self, handle: ConnectionHandle) -> Option<SharedConnection> {
        self.entry(handle).map(|entry| entry.connection.clone())
    }

    /// Has the outputs follow what was done to a connection: its datagrams, events and deadlines.
    pub fn look_at(&mut self, handle: ConnectionHandle) {
        if self.entry(handle).is_some() {
            self.touch(handle.index);
        }
    }

    /// Connections that are not forgotten yet.
    pub fn connections(&self) -> impl Iterator<Item = ConnectionHandle> {
        let entries = self.connections.iter().enumerate();
        entries.filter_map(|(index, entry)| {
            let generation = entry.as_ref()?.generation;
            Some(ConnectionHandle { index, generation })
        })
    }

    /// How many connections there are, closing ones included.
    #[must_use]
    pub const fn connection_count(&self) -> usize {
        self.count
    }

    /// How many of them are in their handshake.
    #[must_use]
    pub const fn half_open(&self) -> usize {
        self.half_open
    }

    /// Address tokens of Initials that asked for a connection, by what became of them.
    #[must_use]
    pub const fn tokens(&self, result: TokenResult) -> u64 {
        self.token_results[result as usize]
    }

    /// Tokens that claimed to be of a Retry and whose clients were refused, by what was wrong with them.
    #[must_use]
    pub const fn tokens_refused(&self, why: InvalidToken) -> u64 {
        self.tokens_refused[why as usize]
    }

    /// Stateless resets sent.
    #[must_use]
    pub const fn resets_sent(&self) -> u64 {
        self.resets_sent
    }

    /// Datagrams dropped for this reason before they reached a connection.
    #[must_use]
    pub const fn dropped(&self, reason: DropReason) -> u64 {
        self.drops[reason as usize]
    }

    /// Whom a datagram was meant for that no connection here is: its destination connection ID, or,
    /// where the header is short and does not tell the length, the octets that start with it. For
    /// those who count what was misrouted, or came after its connection had ended. The last one
    /// stands until it is taken.
    pub fn take_unclaimed(&mut self) -> Option<ConnectionId> {
        self.unclaimed.take()
    }

    // Finding the connection of a datagram.

    /// The connection that a datagram is addressed to, with the length of its connection ID.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-5.2>
    fn find(&self, arrival: &Arrival, datagram: &[u8]) -> Result<(usize, usize), Stranger> {
        let header = match Packet::read(datagram) {
            Err(_) => return Err(Stranger::Other(DropReason::Malformed)),
            Ok(Packet::Short(short)) => {
                let first = short.rest.first().copied().unwrap_or_default();
                let found = self.issuers.lengths(first).find_map(|len| {
                    let id = ConnectionId::new(short.rest.get(..len)?)?;
                    self.by_cid.get(&id).map(|&index| (index, len))
                });
                return found.ok_or(Stranger::Short);
            }
            Ok(Packet::Long(header)) => header,
        };
        let Some(dcid) = ConnectionId::new(header.dcid) else {
            return Err(match header.kind() {
                Kind::UnknownVersion => Stranger::Version,
                _ => Stranger::Other(DropReason::Malformed),
            });
        };
        let known = self.by_cid.get(&dcid);
        let first = || self.by_first_dcid.get(&(arrival.remote, dcid));
        if let Some(&index) = known.or_else(first) {
            return Ok((index, dcid.len()));
        }
        Err(match header.kind() {
            Kind::Known(version, LongType::Initial) => Stranger::Initial(version),
            Kind::UnknownVersion => Stranger::Version,
            Kind::Known(..) | Kind::VersionNegotiation => {
                Stranger::Other(DropReason::UnknownConnection)
            }
        })
    }

    fn deliver(&mut self, index: usize, arrival: Arrival, datagram: &mut [u8], dcid_len: usize) {
        if let Some(entry) = &self.connections[index] {
            entry.connection.lock().handle_datagram(arrival, datagram, dcid_len);
            self.touch(index);
        }
    }

    /// Delivers a datagram of a client that has moved amid its handshake, and has proved that it may.
    fn deliver_moved(
        &mut self,
        index: usize,
        arrival: &Arrival,
        datagram: &mut [u8],
        dcid: &ConnectionId,
    ) {
        if let Some(entry) = &self.connections[index] {
            entry.connection.lock().hear_from(arrival, dcid);
        }
        self.deliver(index, *arrival, datagram, dcid.len());
    }

    /// Tokens kept for connections to come.
    #[cfg(test)]
    pub(crate) fn kept_tokens(&self) -> usize {
        self.kept_tokens.len()
    }

    fn wall_clock(&self, now: Instant) -> SystemTime {
        self.clock.1 + now.saturating_duration_since(self.clock.0)
    }
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint")
            .field("connections", &self.count)
            .field("half_open", &self.half_open)
            .finish_non_exhaustive()
    }
}
