//! The endpoint: which connection a datagram belongs to, and what becomes of those that belong to
//! none.
//!
//! Everything a stranger can reach is bounded: connections and half-open ones by configuration,
//! replies by one per datagram, tables by the connections they point to.

#[cfg(test)]
mod check;
mod issuer;
mod shared;
mod tokens;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    hash::BuildHasher,
    net::{IpAddr, SocketAddr},
    sync::{Arc, MutexGuard},
    time::{Instant, SystemTime},
};

pub use issuer::CidIssuer;
use issuer::Issuers;
use rustls::pki_types::ServerName;
pub use shared::SharedConnection;
use siphasher::sip::SipHasher13;
use tokens::{SpentTokens, Tokens, Verdict};
pub use tokens::{TokenPolicy, TokenResult};

use super::{
    config::{ClientConfig, RetryPolicy, ServerConfig},
    connection::{Arrival, Connection, Event, Setup},
    ecn::Ecn,
    error::Code,
    frame,
    packet::{Builder, DropReason, Header, Outgoing, PacketKind, open},
    parameters::{MIN_UDP_PAYLOAD, Preferred},
    reset::{self, ResetKey},
    space::Space,
    stream_id::Side,
    tls::{TAG_LEN, initial_keys},
};
use crate::{
    connection_id::{ConnectionId, MAX_LEN},
    header::{Kind, LongType, Version},
    invariants::{LongHeader, Packet},
    random::Random,
    retry,
};

/// Octets of the connection ID that a client draws for its first flight.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-7.2>
const FIRST_DCID_LEN: usize = 8;
/// Replies that wait to be fetched; more than one only when the calling rule is not kept.
const MAX_REPLIES: usize = 64;
/// Servers whose tokens a client keeps, and tokens for each.
const MAX_TOKEN_SERVERS: usize = 256;
const TOKENS_PER_SERVER: usize = 2;
/// The versions to offer in Version Negotiation.
const VERSIONS: [u32; 1] = [Version::V1.to_wire()];

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
    Nonces(#[from] crate::routable::NoncesExhausted),
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
    by_reset_token: HashMap<(SocketAddr, [u8; 16]), usize, Keyed>,
    /// Connections to look at, each once.
    ready: VecDeque<usize>,
    deadlines: BTreeSet<(Instant, usize)>,
    replies: VecDeque<Reply>,
    events: VecDeque<(ConnectionHandle, Event)>,
    unclaimed: Option<ConnectionId>,
    /// Tokens for servers by name.
    kept_tokens: BTreeMap<String, VecDeque<Vec<u8>>>,
    spent_tokens: SpentTokens,
    drops: [u64; DropReason::COUNT],
    token_results: [u64; TokenResult::COUNT],
}

struct Entry {
    connection: SharedConnection,
    generation: u64,
    /// In the queue of those to look at.
    ready: bool,
    half_open: bool,
    /// The deadline it is registered with.
    deadline: Option<Instant>,
    first_dcid: Option<(SocketAddr, ConnectionId)>,
    /// Where its client was seen when it began, and where a Retry token said that it is.
    sealed_client: Option<(SocketAddr, SocketAddr)>,
    reset_tokens: Vec<(SocketAddr, [u8; 16])>,
    server_name: Option<String>,
}

impl Entry {
    /// Where the client is that speaks from `remote`, as far as a Retry token has told.
    fn sealed_client(&self, remote: SocketAddr) -> Option<SocketAddr> {
        self.sealed_client.filter(|(seen, _)| *seen == remote).map(|(_, client)| client)
    }
}

struct Reply {
    remote: SocketAddr,
    local: Option<IpAddr>,
    octets: Vec<u8>,
}

impl Endpoint {
    /// An endpoint at the moment `now`, which is `wall` for the rest of the world.
    #[must_use]
    pub fn new(config: EndpointConfig, now: Instant, wall: SystemTime) -> Self {
        let mut random = Random::new(config.seed);
        let hash = Keyed { keys: (random.number(), random.number()) };
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
            by_cid: HashMap::with_hasher(hash),
            by_first_dcid: HashMap::with_hasher(hash),
            by_reset_token: HashMap::with_hasher(hash),
            ready: VecDeque::new(),
            deadlines: BTreeSet::new(),
            replies: VecDeque::new(),
            events: VecDeque::new(),
            unclaimed: None,
            kept_tokens: BTreeMap::new(),
            spent_tokens: SpentTokens::default(),
            drops: [0; DropReason::COUNT],
            token_results: [0; TokenResult::COUNT],
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
        let token = self.kept_tokens.get_mut(server_name).and_then(VecDeque::pop_back);
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

    /// Appends the next datagrams, at most `max_segments` of one size, to `out`.
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
        while let Some(index) = self.ready.pop_front() {
            let Some(entry) = &self.connections[index] else { continue };
            let shared = entry.connection.clone();
            let mut connection = shared.lock();
            self.supply(now, index, &mut connection);
            let start = out.len();
            if let Some(sent) = connection.poll_transmit(now, max_segments, out) {
                self.ready.push_back(index);
                let len = out.len() - start;
                let super::connection::Transmission { remote, local, ecn, segment } = sent;
                return Some(Transmit { remote, local, ecn, segment, len });
            }
            self.settle(index, &mut connection);
        }
        None
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<(ConnectionHandle, Event)> {
        self.events.pop_front()
    }

    /// Whether [`Self::poll_transmit`] or [`Self::poll_event`] should be called: something was
    /// changed since they gave nothing more.
    #[must_use]
    pub fn has_work(&self) -> bool {
        !self.ready.is_empty() || !self.events.is_empty() || !self.replies.is_empty()
    }

    /// When [`Self::handle_deadline`] has something to do.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
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

    /// Has the next [`Self::poll_transmit`] look at a connection that was acted on.
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

    // Datagrams of no connection.

    fn on_unknown_short(&mut self, arrival: &Arrival, datagram: &[u8]) -> Result<(), DropReason> {
        if let Some(tail) = datagram.last_chunk::<16>()
            && let Some(&index) = self.by_reset_token.get(&(arrival.remote, *tail))
        {
            if let Some(entry) = &self.connections[index] {
                entry.connection.lock().handle_reset(arrival.now);
                self.touch(index);
            }
            return Ok(());
        }
        let token = datagram.get(1..).and_then(|rest| self.issuers.reset_token(rest));
        let token = token.filter(|_| self.server.is_some()).ok_or(DropReason::UnknownConnection)?;
        let mut octets = Vec::new();
        if !reset::write(&token, datagram.len(), &mut self.random, &mut octets) {
            return Err(DropReason::UnknownConnection);
        }
        self.note_unclaimed(datagram);
        self.reply(arrival, octets);
        Ok(())
    }

    /// Remembers whom a datagram was meant for that no connection here is, until
    /// [`Self::take_unclaimed`].
    fn note_unclaimed(&mut self, datagram: &[u8]) {
        let meant = match Packet::read(datagram) {
            Ok(Packet::Long(header)) => ConnectionId::new(header.dcid),
            Ok(Packet::Short(short)) => {
                let len = short.rest.len().min(MAX_LEN);
                ConnectionId::new(&short.rest[..len])
            }
            Err(_) => None,
        };
        self.unclaimed = meant;
    }

    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-6.1>
    fn on_unknown_version(&mut self, arrival: &Arrival, datagram: &[u8]) -> Result<(), DropReason> {
        let large_enough = datagram.len() >= usize::from(MIN_UDP_PAYLOAD);
        let Ok(Packet::Long(header)) = Packet::read(datagram) else {
            return Err(DropReason::Malformed);
        };
        if self.server.is_none() || !large_enough {
            return Err(DropReason::UnknownVersion);
        }
        let octets = self.version_negotiation(&header);
        self.reply(arrival, octets);
        Ok(())
    }

    fn version_negotiation(&mut self, header: &LongHeader<'_>) -> Vec<u8> {
        let random: [u8; 5] = self.random.octets();
        let mut octets = vec![0x80 | random[0], 0, 0, 0, 0];
        for id in [header.scid, header.dcid] {
            #[expect(clippy::cast_possible_truncation, reason = "its length came in one octet")]
            octets.push(id.len() as u8);
            octets.extend_from_slice(id);
        }
        // A reserved version keeps clients in the habit of ignoring what they do not know.
        let reserved =
            [random[1], random[2], random[3], random[4]].map(|octet| octet & 0xf0 | 0x0a);
        octets.extend_from_slice(&reserved);
        for version in VERSIONS {
            octets.extend_from_slice(&version.to_be_bytes());
        }
        octets
    }

    fn on_initial(
        &mut self,
        arrival: &Arrival,
        version: Version,
        datagram: &mut [u8],
    ) -> Result<(), DropReason> {
        if self.server.is_none() {
            return Err(DropReason::UnknownConnection);
        }
        if !VERSIONS.contains(&version.to_wire()) {
            return self.on_unknown_version(arrival, datagram);
        }
        // "A server MUST discard an Initial packet that is carried in a UDP datagram with a
        // payload that is smaller than the smallest allowed maximum datagram size of 1200 bytes."
        // https://www.rfc-editor.org/rfc/rfc9000.html#section-14.1
        if datagram.len() < usize::from(MIN_UDP_PAYLOAD) {
            return Err(DropReason::SmallInitial);
        }
        let header = Header::read(datagram, 0)?;
        let PacketKind::Initial { scid, token, .. } = header.kind.clone() else {
            return Err(DropReason::Malformed);
        };
        if header.dcid.len() < FIRST_DCID_LEN {
            return Err(DropReason::Malformed);
        }
        let token = datagram[token].to_vec();
        let verdict = self.judge(arrival, &token, &header.dcid);
        let Some(server) = &self.server else { return Err(DropReason::UnknownConnection) };
        let retry_wanted = match server.retry {
            RetryPolicy::Never => false,
            RetryPolicy::Always => true,
            RetryPolicy::AboveHalfOpen(limit) => self.half_open >= limit,
        };
        let (original_dcid, retry_scid) = match verdict {
            Verdict::Retried(claim) => (claim.original_dcid, Some(header.dcid)),
            Verdict::Invalid => {
                return self.refuse(arrival, version, &header, datagram, Code::INVALID_TOKEN);
            }
            Verdict::Nothing if retry_wanted => {
                return self.send_retry(arrival, version, header.dcid, &scid);
            }
            Verdict::Known | Verdict::Nothing => (header.dcid, None),
        };
        if self.half_open >= server.max_half_open {
            return Err(DropReason::Saturated);
        }
        if self.count >= server.max_connections {
            return self.refuse(arrival, version, &header, datagram, Code::CONNECTION_REFUSED);
        }
        let tls = Arc::clone(&server.tls);
        let config = Arc::clone(&server.transport);
        let preferred = server.preferred_address.filter(|_| self.issuers.per_connection() > 1);
        let preferred = match preferred
            .map(|address| (address, self.issuers.issue(|id| self.by_cid.contains_key(id))))
        {
            Some((address, Ok((connection_id, stateless_reset_token)))) => {
                Some(Preferred { address, connection_id, stateless_reset_token })
            }
            _ => None,
        };
        let preferred_cid = preferred.as_ref().map(|preferred| preferred.connection_id);
        let (local_cid, reset_token) = self
            .issuers
            .issue(|id| self.by_cid.contains_key(id))
            .map_err(|_| DropReason::Saturated)?;
        let setup = Setup {
            now: arrival.now,
            version,
            config,
            remote: arrival.remote,
            local: arrival.local,
            local_cid,
            reset_token,
            remote_cid: scid,
            original_dcid,
            retry_scid,
            token: Vec::new(),
            address_validated: verdict != Verdict::Nothing,
            disable_active_migration: !self.issuers.allows_migration(),
            preferred,
            random: Random::new(self.random.octets()),
        };
        let limit = self.issuers.per_connection();
        let Ok(mut connection) = Connection::server(setup, tls, limit) else {
            return self.refuse(arrival, version, &header, datagram, Code::INTERNAL_ERROR);
        };
        connection.handle_datagram(*arrival, datagram, header.dcid.len());
        // Whatever does not open with the keys that anybody can derive is noise, not a client.
        if !connection.is_heard() {
            return Err(DropReason::Undecryptable);
        }
        if verdict != Verdict::Nothing {
            self.spent_tokens.insert(self.by_cid.hasher(), &token);
        }
        if let Verdict::Retried(claim) = verdict {
            self.supersede(arrival.remote, claim.original_dcid, scid);
        }
        let first = (arrival.remote, header.dcid);
        let index = self.insert(connection, Some(first), None);
        if let (Verdict::Retried(claim), Some(entry)) = (verdict, &mut self.connections[index]) {
            entry.sealed_client = Some((arrival.remote, claim.client));
        }
        for id in std::iter::once(local_cid).chain(preferred_cid) {
            self.by_cid.insert(id, index);
        }
        self.by_first_dcid.insert(first, index);
        Ok(())
    }

    /// Judges the token of an Initial, and counts what came of it.
    fn judge(&mut self, arrival: &Arrival, token: &[u8], dcid: &ConnectionId) -> Verdict {
        if token.is_empty() {
            return Verdict::Nothing;
        }
        let now = self.wall_clock(arrival.now);
        let verdict = self.tokens.judge(token, arrival.remote, dcid, now);
        let (verdict, result) = match verdict {
            Verdict::Invalid => (verdict, TokenResult::Invalid),
            Verdict::Nothing => (verdict, TokenResult::Ignored),
            _ if self.spent_tokens.contains(self.by_cid.hasher(), token) => {
                (Verdict::Nothing, TokenResult::Spent)
            }
            Verdict::Retried(_) => (verdict, TokenResult::Retry),
            Verdict::Known => (verdict, TokenResult::NewToken),
        };
        self.token_results[result as usize] += 1;
        verdict
    }

    /// A client has answered a Retry: what its first Initial began here before the Retry was asked
    /// for, it knows nothing of. That happens while a balancer in front starts sending Retries.
    fn supersede(&mut self, remote: SocketAddr, original: ConnectionId, client_cid: ConnectionId) {
        let Some(&older) = self.by_first_dcid.get(&(remote, original)) else { return };
        let Some(entry) = &self.connections[older] else { return };
        let shared = entry.connection.clone();
        let connection = shared.lock();
        if connection.is_half_open()
            && !connection.path().validated
            && connection.remote_cid() == client_cid
        {
            self.remove(older, &connection);
        }
    }

    fn send_retry(
        &mut self,
        arrival: &Arrival,
        version: Version,
        original_dcid: ConnectionId,
        client_scid: &ConnectionId,
    ) -> Result<(), DropReason> {
        let (scid, _) = self
            .issuers
            .issue(|id| self.by_cid.contains_key(id))
            .map_err(|_| DropReason::Saturated)?;
        let now = self.wall_clock(arrival.now);
        let token = self.tokens.retry(&mut self.random, arrival.remote, original_dcid, &scid, now);
        let token = token.ok_or(DropReason::Saturated)?;
        let retry = retry::Retry {
            version,
            dcid: client_scid,
            scid: &scid,
            original_dcid: &original_dcid,
            token: &token,
        };
        let mut octets = vec![0; retry::MAX_LEN];
        let [unused] = self.random.octets();
        let len = retry.write(unused, &mut octets).ok_or(DropReason::Malformed)?;
        octets.truncate(len);
        self.reply(arrival, octets);
        Ok(())
    }

    /// Answers an Initial by CONNECTION_CLOSE, without keeping anything; if it is authentic, lest
    /// a corrupted token end a connection that a clean one would begin.
    fn refuse(
        &mut self,
        arrival: &Arrival,
        version: Version,
        initial: &Header,
        datagram: &mut [u8],
        code: Code,
    ) -> Result<(), DropReason> {
        let PacketKind::Initial { scid: client_scid, .. } = &initial.kind else {
            return Err(DropReason::Malformed);
        };
        let keys = initial_keys(version, &initial.dcid, Side::Server);
        let packet = &mut datagram[..initial.len];
        let unprotected = initial.unprotect(&*keys.remote.header, packet, None)?;
        open(&*keys.remote.packet, &unprotected, packet)?;
        let header = Outgoing {
            space: Space::Initial,
            version,
            dcid: client_scid,
            scid: &initial.dcid,
            token: &[],
            number: 0,
            largest_acked: None,
            key_phase: false,
            spin: false,
        };
        let mut octets = Vec::new();
        let builder = Builder::start(&header, &mut octets);
        let close = frame::Close::Transport { code, frame_type: 0, reason: &[] };
        frame::write_close(&close, 64, &mut octets);
        let sealed = builder.finish(&*keys.local.header, &*keys.local.packet, 0, &mut octets);
        sealed.map_err(|_| DropReason::Malformed)?;
        debug_assert!(octets.len() > TAG_LEN);
        self.reply(arrival, octets);
        Ok(())
    }

    fn reply(&mut self, arrival: &Arrival, octets: Vec<u8>) {
        if self.replies.len() < MAX_REPLIES {
            let Arrival { remote, local, .. } = *arrival;
            self.replies.push_back(Reply { remote, local, octets });
        }
    }

    // Keeping the tables in step with the connections.

    fn insert(
        &mut self,
        connection: Connection,
        first_dcid: Option<(SocketAddr, ConnectionId)>,
        server_name: Option<String>,
    ) -> usize {
        let generation = self.next_generation;
        self.next_generation += 1;
        let entry = Entry {
            connection: SharedConnection::new(connection),
            generation,
            ready: false,
            half_open: true,
            deadline: None,
            first_dcid,
            sealed_client: None,
            reset_tokens: Vec::new(),
            server_name,
        };
        let index = self.free.pop().unwrap_or(self.connections.len());
        if index == self.connections.len() {
            self.connections.push(Some(entry));
        } else {
            self.connections[index] = Some(entry);
        }
        self.count += 1;
        self.half_open += 1;
        self.touch(index);
        index
    }

    fn entry(&self, handle: ConnectionHandle) -> Option<&Entry> {
        let entry = self.connections.get(handle.index)?.as_ref()?;
        (entry.generation == handle.generation).then_some(entry)
    }

    fn handle_of(&self, index: usize) -> ConnectionHandle {
        let generation = self.connections[index].as_ref().map_or(0, |entry| entry.generation);
        ConnectionHandle { index, generation }
    }

    /// Has a connection looked at by the next [`Self::poll_transmit`].
    fn touch(&mut self, index: usize) {
        if let Some(entry) = &mut self.connections[index]
            && !entry.ready
        {
            entry.ready = true;
            self.ready.push_back(index);
        }
    }

    /// Gives a connection what it wants before it transmits: connection IDs, and a token.
    fn supply(&mut self, now: Instant, index: usize, connection: &mut Connection) {
        for _ in 0..connection.wanted_cids() {
            let Ok((id, reset_token)) = self.issuers.issue(|id| self.by_cid.contains_key(id))
            else {
                break;
            };
            self.by_cid.insert(id, index);
            connection.issue_cid(id, reset_token);
        }
        if connection.take_token_request() {
            let wall = self.wall_clock(now);
            let remote = connection.path().remote;
            let sealed = self.connections[index].as_ref();
            let sealed = sealed.and_then(|entry| entry.sealed_client(remote));
            let sealed = sealed.map(|client| client.ip());
            let token = self.tokens.new_token(&mut self.random, remote.ip(), sealed, wall);
            if let Some(token) = token {
                connection.send_token(token.to_vec());
            }
        }
    }

    /// Brings the tables up to date after a connection was looked at.
    fn settle(&mut self, index: usize, connection: &mut Connection) {
        let Some(entry) = &mut self.connections[index] else { return };
        entry.ready = false;
        let handle = ConnectionHandle { index, generation: entry.generation };
        while let Some(event) = connection.poll_event() {
            self.events.push_back((handle, event));
        }
        for id in connection.take_retired() {
            self.by_cid.remove(&id);
        }
        if let Some(name) = &entry.server_name {
            for token in connection.take_tokens() {
                keep_token(&mut self.kept_tokens, name, token);
            }
        }
        if entry.half_open && !connection.is_half_open() {
            entry.half_open = false;
            self.half_open -= 1;
        }
        if connection.is_confirmed()
            && let Some(first) = entry.first_dcid.take()
        {
            self.by_first_dcid.remove(&first);
        }
        if !connection.reset_tokens().eq(entry.reset_tokens.iter().copied()) {
            for token in entry.reset_tokens.drain(..) {
                self.by_reset_token.remove(&token);
            }
            entry.reset_tokens.extend(connection.reset_tokens());
            for &token in &entry.reset_tokens {
                self.by_reset_token.insert(token, index);
            }
        }
        if connection.is_gone() {
            return self.remove(index, connection);
        }
        // A deadline that has moved back stays registered: when it comes, the connection is asked
        // again. That saves an update per datagram.
        let deadline = connection.deadline();
        if let Some(at) = deadline
            && entry.deadline.is_none_or(|registered| at < registered)
        {
            if let Some(registered) = entry.deadline.replace(at) {
                self.deadlines.remove(&(registered, index));
            }
            self.deadlines.insert((at, index));
        }
    }

    fn remove(&mut self, index: usize, connection: &Connection) {
        let Some(entry) = self.connections[index].take() else { return };
        for id in connection.local_cids() {
            self.by_cid.remove(&id);
        }
        if let Some(first) = entry.first_dcid {
            self.by_first_dcid.remove(&first);
        }
        for token in entry.reset_tokens {
            self.by_reset_token.remove(&token);
        }
        if let Some(at) = entry.deadline {
            self.deadlines.remove(&(at, index));
        }
        self.half_open -= usize::from(entry.half_open);
        self.count -= 1;
        self.free.push(index);
    }

    /// Tokens kept for connections to come.
    #[cfg(test)]
    pub(crate) fn kept_tokens(&self) -> usize {
        self.kept_tokens.values().map(VecDeque::len).sum()
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

/// What kind of datagram belongs to no connection.
enum Stranger {
    Short,
    Initial(Version),
    Version,
    Other(DropReason),
}

fn keep_token(kept: &mut BTreeMap<String, VecDeque<Vec<u8>>>, server: &str, token: Vec<u8>) {
    if kept.len() >= MAX_TOKEN_SERVERS && !kept.contains_key(server) {
        kept.pop_first();
    }
    let tokens = kept.entry(server.to_owned()).or_default();
    if tokens.len() == TOKENS_PER_SERVER {
        tokens.pop_front();
    }
    tokens.push_back(token);
}

/// SipHash with keys from the endpoint's seed: peers choose what is hashed.
#[derive(Clone, Copy)]
struct Keyed {
    keys: (u64, u64),
}

impl BuildHasher for Keyed {
    type Hasher = SipHasher13;

    fn build_hasher(&self) -> SipHasher13 {
        SipHasher13::new_with_keys(self.keys.0, self.keys.1)
    }
}
