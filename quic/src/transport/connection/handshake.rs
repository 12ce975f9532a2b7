//! The handshake: CRYPTO data in and out of the TLS session, the keys that come of it, the
//! peer's transport parameters, and what may happen before: Retry and Version Negotiation.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::pki_types::ServerName;

use super::{Connection, Event, MAX_ACK_DELAY, Setup, SpaceState};
use crate::{
    connection_id::ConnectionId,
    invariants::Packet,
    retry,
    transport::{
        cids::{self, ACTIVE_LIMIT},
        error::{Code, ConnectionError, TransportError},
        frame::NewConnectionId,
        keys::OneRttKeys,
        packet::DropReason,
        parameters::TransportParameters,
        record::Record,
        space::Space,
        stream_id::Side,
        tls::{KeyChange, Session, initial_keys},
    },
};

/// CRYPTO data beyond what TLS has read, per space. A ClientHello with post-quantum key exchange
/// is below 2 KiB; certificate chains are larger.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-7.5>
const CRYPTO_BUFFER: [u64; 3] = [8 * 1024, 64 * 1024, 16 * 1024];
/// Where a ClientHello has the length of its session ID: after type, length, version and random.
const LEGACY_SESSION_ID: usize = 4 + 2 + 32;
/// The number of the connection ID that comes with a preferred address.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-5.1.1>
pub(super) const PREFERRED_SEQUENCE: u64 = 1;
/// The largest DATAGRAM frame we take.
const MAX_DATAGRAM_FRAME: u64 = 65_535;

/// What is known about the handshake.
pub(super) struct Handshake {
    pub(super) session: Session,
    /// The peer's transport parameters. Authentic once `complete`.
    pub(super) peer: Option<TransportParameters>,
    pub(super) complete: bool,
    pub(super) confirmed: bool,
    /// The space that TLS writes to.
    write_space: Space,
    /// What the client sent to in the first place.
    pub(super) original_dcid: ConnectionId,
    /// Our first connection ID.
    pub(super) local_cid: ConnectionId,
    /// What the peer chose; a client learns it from the first Initial.
    pub(super) remote_scid: Option<ConnectionId>,
    pub(super) retry_scid: Option<ConnectionId>,
    /// What a client puts into its Initials.
    pub(super) token: Vec<u8>,
    /// Whether any packet was processed: then neither Retry nor Version Negotiation count.
    pub(super) any_processed: bool,
    /// A server has acknowledged a Handshake packet: it has validated our address.
    pub(super) server_knows_us: bool,
    pub(super) cids_per_connection: u64,
    /// A client has moved to the server's preferred address.
    pub(super) moved_to_preferred: bool,
}

impl Connection {
    /// A connection to `name`, whose first Initial is ready to leave.
    pub(crate) fn client(
        setup: Setup,
        tls: Arc<rustls::ClientConfig>,
        name: ServerName<'static>,
        cids_per_connection: u64,
    ) -> Result<Self, rustls::Error> {
        let (parameters, setup) = parameters(Side::Client, setup);
        let session = Session::client(tls, setup.version, name, parameters)?;
        Self::start(Side::Client, setup, session, None, cids_per_connection)
    }

    /// A connection that an Initial asked for; it is still to be handed in.
    pub(crate) fn server(
        setup: Setup,
        tls: Arc<rustls::ServerConfig>,
        cids_per_connection: u64,
    ) -> Result<Self, rustls::Error> {
        let (parameters, setup) = parameters(Side::Server, setup);
        let session = Session::server(tls, setup.version, parameters)?;
        let remote_scid = Some(setup.remote_cid);
        Self::start(Side::Server, setup, session, remote_scid, cids_per_connection)
    }

    fn start(
        side: Side,
        mut setup: Setup,
        session: Session,
        remote_scid: Option<ConnectionId>,
        cids_per_connection: u64,
    ) -> Result<Self, rustls::Error> {
        let handshake = Handshake {
            session,
            peer: None,
            complete: false,
            confirmed: false,
            write_space: Space::Initial,
            original_dcid: setup.original_dcid,
            local_cid: setup.local_cid,
            remote_scid,
            retry_scid: setup.retry_scid,
            token: std::mem::take(&mut setup.token),
            any_processed: false,
            server_knows_us: false,
            cids_per_connection,
            moved_to_preferred: false,
        };
        // After a Retry, the client sends to the Retry's connection ID.
        let initial_dcid = setup.retry_scid.unwrap_or(setup.original_dcid);
        let keys = initial_keys(setup.version, &initial_dcid, side);
        let now = setup.now;
        let mut connection = Self::new(side, setup, handshake);
        connection.space(Space::Initial).keys = Some(keys);
        connection.journal.note(now, Record::KeysInstalled(Space::Initial));
        connection
            .drive_tls(now)
            .map_err(|_| rustls::Error::General("the handshake cannot be started".into()))?;
        Ok(connection)
    }

    // CRYPTO data.

    /// Takes a CRYPTO frame of `space`.
    pub(super) fn on_crypto(
        &mut self,
        now: Instant,
        space: Space,
        offset: u64,
        data: &[u8],
    ) -> Result<(), ConnectionError> {
        let read_space = self.read_space();
        let state = self.space(space);
        let end = offset + data.len() as u64;
        let read = state.crypto_in.read_offset();
        if end > read + CRYPTO_BUFFER[space.index()] {
            return Err(peer(Code::CRYPTO_BUFFER_EXCEEDED, "too much CRYPTO data"));
        }
        // "If the packet is from a previously installed encryption level, it MUST NOT contain data
        // that extends past the end of previously received data in that flow. Implementations MUST
        // treat any violations of this requirement as a connection error of type
        // PROTOCOL_VIOLATION." https://www.rfc-editor.org/rfc/rfc9001.html#section-4.1.3
        if space < read_space && end > read {
            return Err(peer(Code::PROTOCOL_VIOLATION, "new CRYPTO data at an old level"));
        }
        state.crypto_in.insert(offset, data);
        if space == read_space { self.feed_tls(now, space) } else { Ok(()) }
    }

    /// The space whose CRYPTO data TLS reads next.
    fn read_space(&self) -> Space {
        if self.spaces[Space::Handshake.index()].keys.is_none()
            && !self.spaces[Space::Handshake.index()].discarded
        {
            Space::Initial
        } else if self.handshake.session.is_handshaking() {
            Space::Handshake
        } else {
            Space::Data
        }
    }

    fn feed_tls(&mut self, now: Instant, space: Space) -> Result<(), ConnectionError> {
        loop {
            let state = &mut self.spaces[space.index()];
            let data = state.crypto_in.peek();
            if data.is_empty() {
                return Ok(());
            }
            // "A server SHOULD treat the receipt of a TLS ClientHello with a non-empty
            // legacy_session_id field as a connection error of type PROTOCOL_VIOLATION."
            // https://www.rfc-editor.org/rfc/rfc9001.html#section-8.4
            let first = space == Space::Initial && state.crypto_in.read_offset() == 0;
            if self.side.is_server() && first {
                match data.get(LEGACY_SESSION_ID) {
                    Some(0) => {}
                    Some(_) => return Err(peer(Code::PROTOCOL_VIOLATION, "a legacy session ID")),
                    None => return Ok(()),
                }
            }
            // "client authentication after the handshake", key updates of TLS and the like come as
            // messages that TLS itself refuses over QUIC.
            let count = self.handshake.session.read(data)?;
            if count == 0 {
                return Ok(());
            }
            state.crypto_in.consume(count);
            self.drive_tls(now)?;
            // "When TLS provides keys for a higher encryption level, if there is data from a
            // previous encryption level that TLS has not consumed, this MUST be treated as a
            // connection error of type PROTOCOL_VIOLATION."
            // https://www.rfc-editor.org/rfc/rfc9001.html#section-4.1.3
            if self.read_space() > space && !self.space(space).crypto_in.is_drained() {
                return Err(peer(Code::PROTOCOL_VIOLATION, "CRYPTO data left at an old level"));
            }
        }
    }

    /// Takes from TLS what it has to send, and its keys.
    fn drive_tls(&mut self, now: Instant) -> Result<(), ConnectionError> {
        let mut octets = Vec::new();
        loop {
            octets.clear();
            let change = self.handshake.session.write(&mut octets);
            let space = self.handshake.write_space;
            self.space(space).crypto_out.write(&octets);
            match change {
                None if octets.is_empty() => break,
                None => {}
                Some(KeyChange::Handshake { keys }) => {
                    self.space(Space::Handshake).keys = Some(keys);
                    self.journal.note(now, Record::KeysInstalled(Space::Handshake));
                    self.handshake.write_space = Space::Handshake;
                }
                Some(KeyChange::OneRtt { keys, next }) => {
                    let update_after = self.config.key_update_after;
                    self.one_rtt = Some(OneRttKeys::new(keys, next, update_after));
                    self.journal.note(now, Record::KeysInstalled(Space::Data));
                    self.handshake.write_space = Space::Data;
                }
            }
        }
        self.take_peer_parameters()?;
        if !self.handshake.complete && !self.handshake.session.is_handshaking() {
            self.on_handshake_complete(now)?;
        }
        Ok(())
    }

    fn take_peer_parameters(&mut self) -> Result<(), ConnectionError> {
        // Until then, a client that resumes is shown the parameters of the former connection.
        let early = self.side.is_client() && self.handshake.session.is_handshaking();
        if self.handshake.peer.is_some() || early {
            return Ok(());
        }
        let Some(octets) = self.handshake.session.peer_parameters() else { return Ok(()) };
        let peer = TransportParameters::read(octets, self.side.peer())
            .and_then(|peer| self.check_connection_ids(&peer).map(|()| peer))
            .map_err(ConnectionError::Peer)?;
        self.streams.set_peer_limits(&peer);
        let limit = peer.active_connection_id_limit.min(self.handshake.cids_per_connection);
        self.local_cids.set_limit(limit);
        for path in &mut self.paths {
            path.mtu.limit(peer.max_udp_payload_size);
        }
        if let Some(token) = peer.stateless_reset_token {
            self.remote_cids.set_initial_token(token);
        }
        if let Some(preferred) = &peer.preferred_address {
            let issued = NewConnectionId {
                sequence: PREFERRED_SEQUENCE,
                retire_prior_to: 0,
                id: preferred.connection_id,
                reset_token: preferred.stateless_reset_token,
            };
            self.remote_cids.on_new(&issued).map_err(ConnectionError::Peer)?;
        }
        self.handshake.peer = Some(peer);
        Ok(())
    }

    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-7.3>
    pub(super) fn check_connection_ids(
        &self,
        peer: &TransportParameters,
    ) -> Result<(), TransportError> {
        let mismatch = |what| Err(TransportError::new(Code::TRANSPORT_PARAMETER_ERROR, what));
        if peer.initial_source_connection_id != self.handshake.remote_scid {
            return mismatch("initial_source_connection_id is missing or differs");
        }
        if self.side.is_server() {
            return Ok(());
        }
        if peer.original_destination_connection_id != Some(self.handshake.original_dcid) {
            return mismatch("original_destination_connection_id is missing or differs");
        }
        if peer.retry_source_connection_id != self.handshake.retry_scid {
            return mismatch("retry_source_connection_id does not match the Retry, or its absence");
        }
        // "A server that chooses a zero-length connection ID MUST NOT provide a preferred address."
        // https://www.rfc-editor.org/rfc/rfc9000.html#section-18.2
        if peer.preferred_address.is_some()
            && self.handshake.remote_scid.is_some_and(|id| id.is_empty())
        {
            return mismatch("a preferred address from a server without connection IDs");
        }
        Ok(())
    }

    fn on_handshake_complete(&mut self, now: Instant) -> Result<(), ConnectionError> {
        if self.handshake.peer.is_none() {
            // "endpoints MUST treat a missing quic_transport_parameters extension as a connection
            // error equivalent to a fatal missing_extension alert"
            // https://www.rfc-editor.org/rfc/rfc9001.html#section-8.2
            return Err(peer(Code::crypto(109), "no transport parameters"));
        }
        // "endpoints MUST immediately close a connection [...] with a no_application_protocol TLS
        // alert [...] if an application protocol is not negotiated"
        // https://www.rfc-editor.org/rfc/rfc9001.html#section-8.1
        if self.handshake.session.alpn().is_none() {
            return Err(ConnectionError::Tls {
                error: rustls::Error::NoApplicationProtocol,
                code: Code::crypto(120),
            });
        }
        self.handshake.complete = true;
        self.events.push_back(Event::Connected);
        if self.side.is_server() {
            // "the TLS handshake is considered confirmed at the server when the handshake
            // completes. The server MUST send a HANDSHAKE_DONE frame as soon as the handshake is
            // complete." https://www.rfc-editor.org/rfc/rfc9001.html#section-4.1.2
            self.handshake_done_due = true;
            self.wants_token = true;
            self.on_handshake_confirmed(now);
            self.validate_paths(now);
        }
        Ok(())
    }

    /// Both sides are done: Handshake keys go, and paths may change.
    pub(super) fn on_handshake_confirmed(&mut self, now: Instant) {
        if !self.handshake.confirmed {
            self.handshake.confirmed = true;
            self.discard_space(now, Space::Initial);
            self.discard_space(now, Space::Handshake);
            self.follow_preferred_address(now);
        }
    }

    /// Forgets the keys of a space and everything that waits for them.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9001.html#section-4.9>
    pub(super) fn discard_space(&mut self, now: Instant, space: Space) {
        if self.space(space).discarded {
            return;
        }
        self.journal.note(now, Record::KeysDiscarded(space));
        let gone: Vec<_> = self.space(space).sent.clear().collect();
        for packet in gone {
            self.forget_in_flight(&packet);
            self.recycle(packet.frames);
        }
        *self.space(space) = SpaceState { discarded: true, ..SpaceState::default() };
        self.pto_count = 0;
        self.last_sent = self.last_sent.max(now);
    }

    // Before the handshake.

    /// A Retry has come: `packet` is all of it.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-17.2.5.2>
    pub(super) fn on_retry(
        &mut self,
        now: Instant,
        scid: ConnectionId,
        packet: &[u8],
    ) -> Result<(), DropReason> {
        let handshake = &mut self.handshake;
        let honoured = handshake.any_processed || handshake.retry_scid.is_some();
        if self.side.is_server() || honoured {
            return Err(DropReason::UnexpectedNegotiation);
        }
        if !retry::verify(self.version, &handshake.original_dcid, packet) {
            return Err(DropReason::Undecryptable);
        }
        let Ok(Packet::Long(header)) = Packet::read(packet) else {
            return Err(DropReason::Malformed);
        };
        let token_len = header.rest.len().saturating_sub(retry::TAG_LEN);
        let token = &header.rest[..token_len];
        // A client "MUST discard a Retry packet that contains a Source Connection ID field that is
        // identical to the Destination Connection ID field of its Initial packet", section 17.2.5.1.
        if token.is_empty() || scid == handshake.original_dcid {
            return Err(DropReason::UnexpectedNegotiation);
        }
        handshake.token = token.to_vec();
        handshake.retry_scid = Some(scid);
        self.remote_cids = cids::Remote::new(scid);
        // The same ClientHello goes out again, under new keys; packet numbers go on.
        let keys = initial_keys(self.version, &scid, self.side);
        let state = self.space(Space::Initial);
        state.keys = Some(keys);
        state.probes = 0;
        let sent_at = state.sent.last_eliciting();
        let gone: Vec<_> = state.sent.clear().collect();
        for packet in gone {
            self.forget_in_flight(&packet);
            self.resend(Space::Initial, &packet.frames);
            self.recycle(packet.frames);
        }
        self.pto_count = 0;
        self.journal.note(now, Record::KeysInstalled(Space::Initial));
        // Section 6.3 of RFC 9002: the Retry may serve as a first sample.
        if let Some(at) = sent_at.filter(|_| self.journal.stats().probe_timeouts == 0) {
            self.paths[0].rtt.sample(now.saturating_duration_since(at), Duration::ZERO);
        }
        Ok(())
    }

    /// A Version Negotiation packet has come, with these `versions`.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-6.2>
    pub(super) fn on_version_negotiation(
        &mut self,
        now: Instant,
        versions: &[u8],
    ) -> Result<(), DropReason> {
        let handshake = &self.handshake;
        if self.side.is_server() || handshake.any_processed || handshake.retry_scid.is_some() {
            return Err(DropReason::UnexpectedNegotiation);
        }
        let offered: Vec<u32> = versions
            .chunks_exact(4)
            .map(|version| version.iter().fold(0, |all, &one| all << 8 | u32::from(one)))
            .collect();
        if offered.is_empty() || offered.contains(&self.version.to_wire()) {
            return Err(DropReason::UnexpectedNegotiation);
        }
        self.vanish(now, ConnectionError::VersionMismatch(offered));
        Ok(())
    }
}

/// Our transport parameters, encoded.
fn parameters(side: Side, mut setup: Setup) -> (Vec<u8>, Setup) {
    let config = &setup.config;
    let server = side.is_server();
    let mut parameters = TransportParameters {
        original_destination_connection_id: server.then_some(setup.original_dcid),
        initial_source_connection_id: Some(setup.local_cid),
        retry_source_connection_id: setup.retry_scid.filter(|_| server),
        stateless_reset_token: server.then_some(setup.reset_token),
        max_idle_timeout: config.idle_timeout,
        max_ack_delay: MAX_ACK_DELAY,
        ack_delay_exponent: super::ACK_DELAY_EXPONENT,
        active_connection_id_limit: ACTIVE_LIMIT,
        disable_active_migration: setup.disable_active_migration,
        preferred_address: setup.preferred.clone(),
        max_datagram_frame_size: if config.datagram_receive_buffer > 0 {
            MAX_DATAGRAM_FRAME
        } else {
            0
        },
        ..TransportParameters::default()
    };
    config.streams.announce(&mut parameters);
    let mut octets = Vec::new();
    parameters.write(setup.random.below(1 << 24), &mut octets);
    (octets, setup)
}

fn peer(code: Code, reason: &'static str) -> ConnectionError {
    ConnectionError::Peer(TransportError::new(code, reason))
}
