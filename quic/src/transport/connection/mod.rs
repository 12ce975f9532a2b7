//! One connection: everything between the datagrams it is handed and the streams it offers.
//!
//! A connection is passive. Its [`Endpoint`](super::Endpoint) hands it datagrams and deadlines,
//! the application calls the methods below, and after each input whoever called drains
//! transmissions and events. The parts:
//!
//! | file | what it does |
//! | --- | --- |
//! | `receive.rs` | a datagram, its packets, their frames, top-down |
//! | `transmit.rs` | the next datagrams, their packets, their frames, top-down |
//! | `handshake.rs` | TLS: CRYPTO data, keys, transport parameters, Retry, Version Negotiation |
//! | `loss.rs` | acknowledgments, losses, probe timeouts |
//! | `migration.rs` | paths: validation, NAT rebinding, active migration |
//! | `closing.rs` | closing, draining, and the end |
//! | `timers.rs` | everything that comes due with time |
//! | `journal.rs` | what is counted, and told to whoever observes |

mod closing;
#[cfg(any(test, fuzzing))]
mod forge;
mod handshake;
mod journal;
mod loss;
mod migration;
mod receive;
mod timers;
mod transmit;

pub use migration::MigrateError;

use std::{
    collections::VecDeque,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use rustls::pki_types::CertificateDer;

#[cfg(test)]
pub(crate) use self::forge::{Life, Seen};
use self::{closing::State, handshake::Handshake, journal::Journal};
pub(crate) use self::{receive::Arrival, transmit::Transmission};
use super::{
    assembler::Assembler,
    cids,
    config::TransportConfig,
    datagrams,
    error::ConnectionError,
    frame::EcnCounts,
    keys::OneRttKeys,
    packet::DropReason,
    parameters::Preferred,
    path::{Path, PathId},
    record::Subject,
    recovery::{LossRun, Sent, SentFrame, SentPacket},
    send_buffer::SendBuffer,
    space::Space,
    stream_id::{Dir, Side, StreamId},
    streams::{Read, ReadError, StreamEvent, Streams, WriteError},
    tls::Keys,
};
use crate::{
    connection_id::ConnectionId, header::Version, random::Random, transport::acks::Received,
};

/// The acknowledgment delay we promise to keep.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-18.2>
const MAX_ACK_DELAY: Duration = Duration::from_millis(25);
/// The exponent that scales our acknowledgment delays.
const ACK_DELAY_EXPONENT: u8 = 3;

/// Something an application may want to know.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The handshake is complete: data may flow both ways.
    Connected,
    /// Something about a stream.
    Stream(StreamEvent),
    /// A DATAGRAM frame waits to be read.
    DatagramReceived,
    /// There is room for DATAGRAM frames again, after one was refused.
    DatagramsUnblocked,
    /// The peer's address has changed, and the new one is where packets go now.
    PeerMoved(SocketAddr),
    /// The connection is over. Nothing follows.
    Closed(ConnectionError),
}

/// Figures of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Datagrams and octets handed out for sending.
    pub sent: Traffic,
    /// Datagrams and octets received.
    pub received: Traffic,
    /// Packets found lost, not counting MTU probes.
    pub lost_packets: u64,
    /// Packets that were found lost and arrived after all.
    pub late_packets: u64,
    /// Probe timeouts that expired.
    pub probe_timeouts: u64,
    /// Key updates, by either side.
    pub key_updates: u64,
    /// Paths whose validation began.
    pub path_validations: u64,
    /// DATAGRAM frames dropped because nobody read them in time.
    pub dropped_datagrams: u64,
}

/// A count of datagrams and their octets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// UDP datagrams.
    pub datagrams: u64,
    /// Octets of their payload.
    pub octets: u64,
}

/// The active path as it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathInfo {
    /// The peer's address.
    pub remote: SocketAddr,
    /// The smoothed round-trip time.
    pub rtt: Duration,
    /// The shortest round-trip time.
    pub min_rtt: Duration,
    /// Octets that may be in flight.
    pub congestion_window: u64,
    /// Octets in flight.
    pub in_flight: u64,
    /// Octets a datagram may have.
    pub mtu: u16,
    /// Whether the path bears ECN marks.
    pub ecn: bool,
    /// Whether the peer was proved to be there.
    pub validated: bool,
}

/// Why a DATAGRAM frame cannot be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendDatagramError {
    /// The peer takes none.
    #[error("the peer does not accept DATAGRAM frames")]
    Unsupported,
    /// It does not fit into a packet now.
    #[error("the message is larger than the path or the peer allows")]
    TooLarge,
    /// The buffer is full; [`Event::DatagramsUnblocked`] follows.
    #[error("the send buffer is full")]
    Blocked,
}

/// What a connection starts from.
pub(crate) struct Setup {
    pub(crate) now: Instant,
    pub(crate) version: Version,
    pub(crate) config: Arc<TransportConfig>,
    pub(crate) remote: SocketAddr,
    pub(crate) local: Option<IpAddr>,
    /// Our first connection ID and its reset token.
    pub(crate) local_cid: ConnectionId,
    pub(crate) reset_token: [u8; 16],
    /// Where we send: a client's first choice, or the client's connection ID.
    pub(crate) remote_cid: ConnectionId,
    /// What the client sent to in the first place.
    pub(crate) original_dcid: ConnectionId,
    /// The source connection ID of the Retry that came before, on a server.
    pub(crate) retry_scid: Option<ConnectionId>,
    /// What a client puts into its Initials.
    pub(crate) token: Vec<u8>,
    /// The client has proved its address by a token.
    pub(crate) address_validated: bool,
    /// Whether we tell the peer not to migrate.
    pub(crate) disable_active_migration: bool,
    /// Where a server wants its clients to go.
    pub(crate) preferred: Option<Preferred>,
    pub(crate) random: Random,
}

/// A QUIC connection.
pub struct Connection {
    side: Side,
    version: Version,
    config: Arc<TransportConfig>,
    random: Random,
    state: State,
    /// What to close with when everything is delivered.
    last_words: Option<(u64, Bytes)>,
    handshake: Handshake,
    /// Packets that came before their keys.
    waiting: Vec<receive::Waiting>,
    spaces: [SpaceState; 3],
    one_rtt: Option<OneRttKeys>,
    /// The active path first; the others await validation or serve as a way back.
    paths: Vec<Path>,
    next_path: u32,
    /// The connection ID of ours that the peer last used on the active path.
    peer_used: ConnectionId,
    /// The datagram under construction has to be padded for the sake of a path frame.
    pad_for_path: bool,
    local_cids: cids::Local,
    /// Numbers of our connection IDs to announce.
    announce: VecDeque<u64>,
    /// Connection IDs the peer has retired, for the endpoint to forget.
    retired: Vec<ConnectionId>,
    remote_cids: cids::Remote,
    streams: Streams,
    incoming: datagrams::Queue,
    outgoing: datagrams::Queue,
    outgoing_blocked: bool,
    handshake_done_due: bool,
    /// A NEW_TOKEN token for the client, until acknowledged, and whether it is due.
    new_token: Option<Vec<u8>>,
    new_token_due: bool,
    /// The endpoint should make one.
    wants_token: bool,
    /// Tokens from the server.
    tokens: Vec<Vec<u8>>,
    spin: bool,
    pto_count: u32,
    /// What persistent congestion is judged by: the latest run of losses, in any space; when the
    /// first packet after it left that was acknowledged; and when the latest one did.
    loss_run: Option<LossRun>,
    acked_after_run: Option<Instant>,
    latest_acked: Option<Instant>,
    pacing_until: Option<Instant>,
    /// When the connection began, and when the last packet came or the first eliciting one left
    /// after that: idle time counts from there.
    started: Instant,
    active_since: Instant,
    eliciting_since_received: bool,
    last_sent: Instant,
    non_eliciting: u32,
    key_update_due: bool,
    /// Packets came or went since memory was last given back.
    stirred: bool,
    events: VecDeque<Event>,
    journal: Journal,
    /// Spare vectors for the frames of packets, so that sending allocates nothing.
    spare_frames: Vec<Vec<SentFrame>>,
    scratch: Vec<SentPacket>,
}

/// What exists once per packet number space.
#[derive(Default)]
struct SpaceState {
    /// Initial and Handshake keys; those of 1-RTT have phases and stand elsewhere.
    keys: Option<Keys>,
    discarded: bool,
    received: Received,
    sent: Sent,
    crypto_in: Assembler,
    crypto_out: SendBuffer,
    /// Probe packets that may leave regardless of the window.
    probes: u8,
    ping_due: bool,
    /// The peer's latest ECN counts.
    ecn: EcnCounts,
}

impl Connection {
    fn new(side: Side, setup: Setup, handshake: Handshake) -> Self {
        let mut random = setup.random;
        let defaults = setup.config.path_defaults();
        let mut path = Path::new(PathId(0), setup.remote, setup.local, 0, &defaults);
        // A client chose the server's address itself.
        if side.is_client() || setup.address_validated {
            path.set_validated();
        }
        let now = setup.now;
        let subject = Subject { side, original_dcid: setup.original_dcid, remote: setup.remote };
        let observers = setup.config.observers.as_ref();
        let observer = observers.and_then(|observers| observers.observe(&subject));
        let mut local_cids = cids::Local::new(setup.local_cid, setup.reset_token);
        if let Some(preferred) = &setup.preferred {
            // The transport parameter announces it.
            local_cids.issue(preferred.connection_id, preferred.stateless_reset_token);
        }
        Self {
            side,
            version: setup.version,
            state: State::Open,
            last_words: None,
            handshake,
            waiting: Vec::new(),
            spaces: Default::default(),
            one_rtt: None,
            paths: vec![path],
            next_path: 1,
            peer_used: setup.local_cid,
            pad_for_path: false,
            local_cids,
            announce: VecDeque::new(),
            retired: Vec::new(),
            remote_cids: cids::Remote::new(setup.remote_cid),
            streams: Streams::new(
                side,
                setup.config.streams.clone(),
                setup.config.send_memory.clone(),
            ),
            incoming: datagrams::Queue::new(setup.config.datagram_receive_buffer),
            outgoing: datagrams::Queue::new(setup.config.datagram_send_buffer),
            outgoing_blocked: false,
            handshake_done_due: false,
            new_token: None,
            new_token_due: false,
            wants_token: false,
            tokens: Vec::new(),
            spin: random.below(2) == 1,
            pto_count: 0,
            loss_run: None,
            acked_after_run: None,
            latest_acked: None,
            pacing_until: None,
            started: now,
            active_since: now,
            eliciting_since_received: false,
            last_sent: now,
            non_eliciting: 0,
            key_update_due: false,
            stirred: true,
            events: VecDeque::new(),
            journal: Journal::new(observer),
            spare_frames: Vec::new(),
            scratch: Vec::new(),
            config: setup.config,
            random,
        }
    }

    // What the application does.

    /// Opens a stream; `None` while the peer allows no more, and
    /// [`StreamEvent::Available`] follows.
    pub fn open(&mut self, dir: Dir) -> Option<StreamId> {
        if self.is_over() { None } else { self.streams.open(dir) }
    }

    /// The next stream that the peer has opened.
    pub fn accept(&mut self, dir: Dir) -> Option<StreamId> {
        self.streams.accept(dir)
    }

    /// Buffers as much of `data` as limits allow and says how much that was; after less than all
    /// of it, [`StreamEvent::Writable`] follows.
    ///
    /// # Errors
    ///
    /// [`WriteError`] when the stream takes no data any more.
    pub fn write(&mut self, id: StreamId, data: &[u8]) -> Result<usize, WriteError> {
        if self.is_over() { Err(WriteError::Closed) } else { self.streams.write(id, data) }
    }

    /// Ends a stream after what was written; [`StreamEvent::Finished`] follows.
    ///
    /// # Errors
    ///
    /// [`WriteError`] when the stream is not open for writing.
    pub fn finish(&mut self, id: StreamId) -> Result<(), WriteError> {
        self.streams.finish(id)
    }

    /// Abandons a stream with a code of the application.
    ///
    /// # Errors
    ///
    /// [`WriteError`] when the stream is not open for writing.
    pub fn reset(&mut self, id: StreamId, code: u64) -> Result<(), WriteError> {
        self.streams.reset(id, code)
    }

    /// Sets the priority of a stream: higher ones are sent first, the default is 0, equal ones
    /// take turns.
    ///
    /// # Errors
    ///
    /// [`WriteError`] when the stream is not open for writing.
    pub fn set_priority(&mut self, id: StreamId, priority: i32) -> Result<(), WriteError> {
        self.streams.set_priority(id, priority)
    }

    /// Reads from a stream. After [`Read::Blocked`], [`StreamEvent::Readable`] follows.
    ///
    /// # Errors
    ///
    /// [`ReadError`] when the stream was reset or is closed.
    pub fn read(&mut self, id: StreamId, out: &mut [u8]) -> Result<Read, ReadError> {
        self.streams.read(id, out)
    }

    /// Asks the peer to send no more on a stream, with a code of the application.
    ///
    /// # Errors
    ///
    /// [`ReadError`] when the stream is closed for reading.
    pub fn stop(&mut self, id: StreamId, code: u64) -> Result<(), ReadError> {
        self.streams.stop(id, code)
    }

    /// Queues a message that arrives once or not at all.
    ///
    /// # Errors
    ///
    /// [`SendDatagramError`] says what is in the way.
    pub fn send_datagram(&mut self, message: Bytes) -> Result<(), SendDatagramError> {
        let max = self.max_datagram().ok_or(SendDatagramError::Unsupported)?;
        if message.len() > max {
            return Err(SendDatagramError::TooLarge);
        }
        if !self.outgoing.has_room(&message) {
            self.outgoing_blocked = true;
            return Err(SendDatagramError::Blocked);
        }
        self.outgoing.push(message);
        Ok(())
    }

    /// The oldest message that waits to be read.
    pub fn receive_datagram(&mut self) -> Option<Bytes> {
        self.incoming.pop()
    }

    /// Octets a message may have now; `None` when the peer takes none.
    #[must_use]
    pub fn max_datagram(&self) -> Option<usize> {
        let peer = self.handshake.peer.as_ref()?.max_datagram_frame_size;
        if peer == 0 {
            return None;
        }
        let peer = usize::try_from(peer).unwrap_or(usize::MAX);
        // The type, and a length of at most two octets.
        let room = self.paths[0].datagram_size().saturating_sub(self.short_overhead() + 3);
        Some(room.min(peer.saturating_sub(3)))
    }

    /// Starts a key update as soon as one is allowed.
    pub fn update_keys(&mut self) {
        self.key_update_due = true;
    }

    /// Sends a PING, so that an answer comes.
    pub fn ping(&mut self) {
        self.spaces[Space::Data.index()].ping_due = true;
    }

    // What reads.

    /// What is known of a sending half: `None` when it is gone, because everything was
    /// acknowledged; otherwise whether, and with what code, the peer wants no more of it.
    #[must_use]
    pub fn send_state(&self, id: StreamId) -> Option<Option<u64>> {
        self.streams.send_state(id)
    }

    /// Which side of the connection this is.
    #[must_use]
    pub const fn side(&self) -> Side {
        self.side
    }

    /// The version in use.
    #[must_use]
    pub const fn version(&self) -> Version {
        self.version
    }

    /// Whether the handshake is complete.
    #[must_use]
    pub const fn is_connected(&self) -> bool {
        self.handshake.complete
    }

    /// Whether the handshake is confirmed: the peer is known to have completed it too.
    #[must_use]
    pub const fn is_confirmed(&self) -> bool {
        self.handshake.confirmed
    }

    /// Whether the connection is closing, draining or gone.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        !matches!(self.state, State::Open)
    }

    /// Why the connection ended, if it has.
    #[must_use]
    pub const fn error(&self) -> Option<&ConnectionError> {
        self.state.error()
    }

    /// The application protocol that was negotiated.
    #[must_use]
    pub fn alpn(&self) -> Option<&[u8]> {
        self.handshake.session.alpn()
    }

    /// Whether the TLS session is a resumed one.
    #[must_use]
    pub fn is_resumed(&self) -> bool {
        self.handshake.session.is_resumed()
    }

    /// The server name the client asked for, on a server.
    #[must_use]
    pub fn server_name(&self) -> Option<&str> {
        self.handshake.session.server_name()
    }

    /// The certificate chain of the peer.
    #[must_use]
    pub fn peer_certificates(&self) -> Option<&[CertificateDer<'static>]> {
        self.handshake.session.peer_certificates()
    }

    /// The cipher suite that was negotiated.
    #[must_use]
    pub fn cipher_suite(&self) -> Option<rustls::CipherSuite> {
        self.handshake.session.cipher_suite()
    }

    /// Fills `out` with key material that both sides derive alike (RFC 5705).
    ///
    /// # Errors
    ///
    /// When the handshake is not complete, or the TLS session was not kept after it:
    /// [`TransportConfig::keep_tls_session`].
    pub fn export_keying_material(
        &self,
        out: &mut [u8],
        label: &[u8],
        context: Option<&[u8]>,
    ) -> Result<(), rustls::Error> {
        self.handshake.session.export(out, label, context)
    }

    /// The active path.
    #[must_use]
    pub fn path(&self) -> PathInfo {
        let path = &self.paths[0];
        PathInfo {
            remote: path.remote,
            rtt: path.rtt.smoothed(),
            min_rtt: path.rtt.min(),
            congestion_window: path.congestion.window(),
            in_flight: path.in_flight,
            mtu: path.mtu.current(),
            ecn: path.ecn == super::path::EcnState::Capable,
            validated: path.is_validated(),
        }
    }

    /// Figures so far.
    #[must_use]
    pub const fn stats(&self) -> Stats {
        self.journal.stats()
    }

    /// Packets dropped for this reason.
    #[must_use]
    pub const fn dropped(&self, reason: DropReason) -> u64 {
        self.journal.dropped(reason)
    }

    /// Our connection IDs that the peer may use.
    pub fn local_cids(&self) -> impl Iterator<Item = ConnectionId> {
        self.local_cids.iter().map(|issued| issued.id)
    }

    /// The connection ID that packets to the peer carry now.
    #[must_use]
    pub fn remote_cid(&self) -> ConnectionId {
        self.remote_cids.get(self.paths[0].cid).map(|cid| cid.id).unwrap_or_default()
    }

    /// The connection IDs of the peer that may be used: the one that it chose in the handshake, as long as it
    /// is not retired, and those that it gave since. Until a packet of the peer has come, a client's own
    /// choice.
    pub fn remote_cids(&self) -> impl Iterator<Item = ConnectionId> {
        self.remote_cids.iter().map(|cid| cid.id)
    }

    // What the endpoint does.

    pub(crate) fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front().or_else(|| self.streams.poll_event().map(Event::Stream))
    }

    /// How many connection IDs the endpoint should add by [`Self::issue_cid`].
    pub(crate) fn wanted_cids(&self) -> u64 {
        if self.one_rtt.is_some() && !self.is_over() { self.local_cids.wanted() } else { 0 }
    }

    pub(crate) fn issue_cid(&mut self, id: ConnectionId, reset_token: [u8; 16]) {
        let sequence = self.local_cids.issue(id, reset_token);
        self.announce.push_back(sequence);
    }

    /// Asks the peer to give all connection IDs back; `limit` new ones take their place.
    pub(crate) fn rotate_cids(&mut self, limit: u64) {
        self.handshake.cids_per_connection = limit;
        let peer = self.handshake.peer.as_ref();
        let peer = peer.map_or(1, |peer| peer.active_connection_id_limit);
        self.local_cids.set_limit(peer.min(limit));
        self.local_cids.retire_all();
    }

    pub(crate) fn take_retired(&mut self) -> impl Iterator<Item = ConnectionId> {
        self.retired.drain(..)
    }

    /// Whether the endpoint should make a NEW_TOKEN token now: it says that the client is where it is.
    pub(crate) fn take_token_request(&mut self) -> bool {
        self.paths[0].is_validated() && std::mem::take(&mut self.wants_token)
    }

    pub(crate) fn send_token(&mut self, token: Vec<u8>) {
        self.new_token = Some(token);
        self.new_token_due = true;
    }

    /// Tokens from the server, for later connections.
    pub(crate) fn take_tokens(&mut self) -> impl Iterator<Item = Vec<u8>> {
        self.tokens.drain(..)
    }

    /// Reset tokens of the peer's connection IDs in use, and the address they come from.
    pub(crate) fn reset_tokens(&self) -> impl Iterator<Item = (SocketAddr, [u8; 16])> {
        let remote = self.paths[0].remote;
        self.remote_cids.tokens().map(move |token| (remote, token))
    }

    /// Whether the handshake is still going on.
    pub(crate) const fn is_half_open(&self) -> bool {
        !self.handshake.complete && matches!(self.state, State::Open)
    }

    fn has_keys(&self, space: Space) -> bool {
        match space {
            Space::Data => self.one_rtt.is_some(),
            _ => self.spaces[space.index()].keys.is_some(),
        }
    }

    /// How long an ACK may wait.
    const fn ack_delay(&self, space: Space) -> Duration {
        match space {
            Space::Data => MAX_ACK_DELAY,
            Space::Initial | Space::Handshake => Duration::ZERO,
        }
    }

    fn space(&mut self, space: Space) -> &mut SpaceState {
        &mut self.spaces[space.index()]
    }

    /// Gives memory back that only a connection with traffic needs.
    fn rest(&mut self) {
        self.stirred = false;
        if !self.config.keep_tls_session {
            self.handshake.session.release();
        }
        self.spare_frames = Vec::new();
        self.scratch = Vec::new();
        self.waiting = Vec::new();
        self.tokens.shrink_to_fit();
        self.retired.shrink_to_fit();
        self.announce.shrink_to_fit();
        self.events.shrink_to_fit();
        self.incoming.shrink();
        self.outgoing.shrink();
        self.streams.shrink();
        for state in &mut self.spaces {
            state.sent.shrink();
            state.received.shrink();
            state.crypto_in.shrink();
            state.crypto_out.shrink();
        }
    }

    /// Octets of a short-header packet besides its frames, at most.
    fn short_overhead(&self) -> usize {
        1 + self.remote_cid().len() + 4 + super::tls::TAG_LEN
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("side", &self.side)
            .field("remote", &self.paths[0].remote)
            .field("state", &self.state)
            .field("connected", &self.handshake.complete)
            .finish_non_exhaustive()
    }
}
