//! Receiving: a datagram, its packets, their frames, top-down.

use std::{
    net::{IpAddr, SocketAddr},
    time::Instant,
};

use bytes::Bytes;

use super::{Connection, Event, closing::State};
use crate::{
    connection_id::ConnectionId,
    transport::{
        ecn::Ecn,
        error::{Code, ConnectionError, TransportError},
        frame::{Frame, Frames},
        packet::{DropReason, Header, PacketKind, open},
        path::PathId,
        record::Record,
        space::Space,
    },
};

/// Packets that wait for their keys, which are still to come.
///
/// <https://www.rfc-editor.org/rfc/rfc9001.html#section-5.7>
const MAX_WAITING: usize = 5;
/// Tokens from a server that are kept until the endpoint fetches them.
const MAX_TOKENS: usize = 4;

/// Where and when a datagram came in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival {
    pub(crate) now: Instant,
    pub(crate) remote: SocketAddr,
    pub(crate) local: Option<IpAddr>,
    pub(crate) ecn: Option<Ecn>,
    /// Octets of the whole datagram.
    pub(crate) len: usize,
}

/// A packet whose keys are not there yet.
#[derive(Debug)]
pub(super) struct Waiting {
    arrival: Arrival,
    packet: Vec<u8>,
}

/// What the frames of a packet amount to.
#[derive(Clone, Copy, Debug, Default)]
struct Summary {
    ack_eliciting: bool,
    /// Other than probing frames.
    non_probing: bool,
}

impl Connection {
    /// Takes a datagram whose first packet is addressed to one of our connection IDs, of
    /// `dcid_len` octets.
    pub(crate) fn handle_datagram(
        &mut self,
        arrival: Arrival,
        datagram: &mut [u8],
        dcid_len: usize,
    ) {
        self.journal.note(arrival.now, Record::DatagramReceived { size: datagram.len() });
        if self.is_over() {
            self.drop_packet(arrival.now, datagram, DropReason::Closing);
            self.note_close(arrival, datagram, dcid_len);
            return self.answer_while_closing();
        }
        if !self.may_arrive_from(&arrival) {
            return self.drop_packet(arrival.now, datagram, DropReason::UnexpectedAddress);
        }
        if let Some(path) = self.path_of(&arrival) {
            path.on_datagram_received(datagram.len());
        }
        // Decryption in place may destroy the token of a stateless reset.
        let tail = datagram.last_chunk::<16>().copied();
        let mut authentic = false;
        self.walk(arrival.now, datagram, dcid_len, &mut |connection, header, packet| {
            let outcome = connection.handle_packet(&arrival, header, packet);
            authentic |= outcome;
        });
        if !authentic
            && let Some(tail) = tail
            && arrival.len >= 21
            && self.remote_cids.is_reset(&tail)
        {
            return self.drain(arrival.now, ConnectionError::Reset);
        }
        self.retry_waiting(arrival.now);
        self.close_if_delivered(arrival.now);
    }

    /// Walks over the packets of a datagram.
    fn walk(
        &mut self,
        now: Instant,
        datagram: &mut [u8],
        dcid_len: usize,
        handle: &mut dyn FnMut(&mut Self, &Header, &mut [u8]),
    ) {
        let mut rest = datagram;
        let mut first_dcid: Option<ConnectionId> = None;
        while !rest.is_empty() && matches!(self.state, State::Open) {
            let header = match Header::read(rest, dcid_len) {
                Ok(header) => header,
                Err(reason) => return self.drop_packet(now, rest, reason),
            };
            let (packet, after) = rest.split_at_mut(header.len);
            rest = after;
            // "Receivers SHOULD ignore any subsequent packets with a different Destination
            // Connection ID than the first packet in the datagram."
            // https://www.rfc-editor.org/rfc/rfc9000.html#section-12.2
            if *first_dcid.get_or_insert(header.dcid) != header.dcid {
                self.drop_packet(now, packet, DropReason::OtherConnection);
                continue;
            }
            handle(self, &header, packet);
        }
    }

    /// Packets that came before their keys get another chance. Those that have waited for a probe
    /// timeout were sent again since; acknowledging them now would only spoil the peer's estimate
    /// of the round-trip time.
    fn retry_waiting(&mut self, now: Instant) {
        if self.waiting.is_empty() {
            return;
        }
        let oldest = self.pto(Space::Initial);
        for mut waiting in std::mem::take(&mut self.waiting) {
            if now.saturating_duration_since(waiting.arrival.now) > oldest {
                self.drop_packet(now, &waiting.packet, DropReason::NoKeys);
                continue;
            }
            let dcid_len = self.handshake.local_cid.len();
            if let Ok(header) = Header::read(&waiting.packet, dcid_len)
                && !self.is_over()
            {
                self.handle_packet(&waiting.arrival, &header, &mut waiting.packet);
            }
        }
    }

    /// Handles one packet; returns whether it was authentic.
    fn handle_packet(&mut self, arrival: &Arrival, header: &Header, packet: &mut [u8]) -> bool {
        if !self.may_carry(arrival, &header.kind) {
            self.drop_packet(arrival.now, packet, DropReason::UnexpectedAddress);
            return false;
        }
        let result = match &header.kind {
            PacketKind::Retry { version, .. }
            | PacketKind::Initial { version, .. }
            | PacketKind::Handshake { version, .. }
            | PacketKind::ZeroRtt { version }
                if *version != self.version =>
            {
                Err(DropReason::UnknownVersion)
            }
            PacketKind::Retry { scid, .. } => self.on_retry(arrival.now, *scid, packet),
            PacketKind::VersionNegotiation { scid } => {
                let ours = *scid == self.remote_cid();
                let versions = packet.get(7 + header.dcid.len() + scid.len()..);
                match versions {
                    Some(versions) if ours => self.on_version_negotiation(arrival.now, versions),
                    _ => Err(DropReason::UnexpectedNegotiation),
                }
            }
            PacketKind::ZeroRtt { .. } => Err(DropReason::NoKeys),
            PacketKind::Initial { .. } => {
                return self.handle_protected(arrival, header, Space::Initial, packet);
            }
            PacketKind::Handshake { .. } => {
                return self.handle_protected(arrival, header, Space::Handshake, packet);
            }
            PacketKind::OneRtt => {
                return self.handle_protected(arrival, header, Space::Data, packet);
            }
        };
        match result {
            Ok(()) => true,
            Err(reason) => {
                self.drop_packet(arrival.now, packet, reason);
                false
            }
        }
    }

    fn handle_protected(
        &mut self,
        arrival: &Arrival,
        header: &Header,
        space: Space,
        packet: &mut [u8],
    ) -> bool {
        // "Once a client has received a valid Initial packet from the server, it MUST discard any
        // subsequent packet it receives on that connection with a different Source Connection ID";
        // servers likewise. https://www.rfc-editor.org/rfc/rfc9000.html#section-7.2
        if let PacketKind::Initial { scid, .. } | PacketKind::Handshake { scid, .. } = &header.kind
            && self.handshake.remote_scid.is_some_and(|known| known != *scid)
        {
            self.drop_packet(arrival.now, packet, DropReason::OtherConnection);
            return false;
        }
        if self.must_wait(space) {
            if self.waiting.len() < MAX_WAITING {
                self.waiting.push(Waiting { arrival: *arrival, packet: packet.to_vec() });
                let size = packet.len();
                self.journal.note(arrival.now, Record::PacketBuffered { space, size });
            } else {
                self.drop_packet(arrival.now, packet, DropReason::NoKeys);
            }
            return false;
        }
        let size = packet.len();
        let opened = match self.open_packet(header, space, packet) {
            Ok(opened) => opened,
            Err(reason) => {
                self.journal.note(arrival.now, Record::PacketDropped { reason, size });
                if self
                    .one_rtt
                    .as_ref()
                    .is_some_and(crate::transport::keys::OneRttKeys::is_exhausted)
                {
                    let reason = "too many packets failed authentication";
                    let error = TransportError::new(Code::AEAD_LIMIT_REACHED, reason);
                    self.close_for(arrival.now, error);
                }
                return false;
            }
        };
        self.journal.note(
            arrival.now,
            Record::PacketReceived { space, number: opened.number, size, frames: opened.payload },
        );
        if let Err(error) = self.on_packet(arrival, header, space, &opened) {
            match error {
                ConnectionError::Peer(error) => self.close_for(arrival.now, error),
                error => self.close_for_tls(arrival.now, error),
            }
        }
        true
    }

    /// Whether packets of this space are for later: their keys are still to come.
    fn must_wait(&self, space: Space) -> bool {
        // "a server MUST NOT process incoming 1-RTT protected packets before the TLS handshake is
        // complete" https://www.rfc-editor.org/rfc/rfc9001.html#section-5.7
        let early = space == Space::Data && !self.handshake.complete;
        early || (!self.has_keys(space) && !self.spaces[space.index()].discarded)
    }

    /// Removes the protection of a packet.
    fn open_packet<'a>(
        &mut self,
        header: &Header,
        space: Space,
        packet: &'a mut [u8],
    ) -> Result<Opened<'a>, DropReason> {
        let state = &mut self.spaces[space.index()];
        let largest = state.received.largest();
        let opened = match (space, &mut self.one_rtt, &state.keys) {
            (Space::Data, Some(keys), _) => {
                let unprotected = header.unprotect(keys.remote_header(), packet, largest)?;
                let opened = keys.open(&unprotected, packet)?;
                Opened {
                    payload: opened.payload,
                    number: unprotected.number,
                    reserved_bits: unprotected.reserved_bits,
                    key_phase: unprotected.key_phase,
                    next_phase: opened.next_phase,
                }
            }
            (_, _, Some(keys)) => {
                let unprotected = header.unprotect(&*keys.remote.header, packet, largest)?;
                Opened {
                    payload: open(&*keys.remote.packet, &unprotected, packet)?,
                    number: unprotected.number,
                    reserved_bits: unprotected.reserved_bits,
                    key_phase: false,
                    next_phase: false,
                }
            }
            _ => return Err(DropReason::NoKeys),
        };
        if state.received.is_duplicate(opened.number) {
            return Err(DropReason::Duplicate);
        }
        Ok(opened)
    }

    /// Handles an authentic packet.
    fn on_packet(
        &mut self,
        arrival: &Arrival,
        header: &Header,
        space: Space,
        opened: &Opened<'_>,
    ) -> Result<(), ConnectionError> {
        let now = arrival.now;
        if opened.reserved_bits {
            return Err(violation("a reserved bit is set"));
        }
        self.on_authentic(arrival, header, space)?;
        if space == Space::Data {
            let discard_at = now + 3 * self.pto(Space::Data);
            if let Some(keys) = &mut self.one_rtt {
                if opened.next_phase {
                    keys.follow(opened.number, discard_at).map_err(ConnectionError::Peer)?;
                    self.journal.note(now, Record::KeysUpdated { by_peer: true });
                }
                keys.on_received(opened.number, opened.key_phase, discard_at);
            }
        }
        if space != Space::Initial {
            self.ensure_path(arrival, &header.dcid);
        }
        let largest = self.space(space).received.largest();
        let summary = self.on_frames(arrival, header, space, opened.payload)?;
        let newest = largest.is_none_or(|largest| opened.number > largest);
        // Initials, which whoever has seen one can make, decide where a token has proved the address.
        let may_decide = space != Space::Initial
            || self.path_of(arrival).is_some_and(|path| path.is_validated());
        if may_decide && !self.is_over() {
            let decides = newest && summary.non_probing;
            self.on_path_of_packet(arrival, &header.dcid, decides);
        }
        if self.space(space).discarded {
            return Ok(());
        }
        let received = &mut self.space(space).received;
        received.on_packet(now, opened.number, summary.ack_eliciting, arrival.ecn);
        if space != Space::Data {
            received.hurry();
        }
        Ok(())
    }

    /// What the mere arrival of an authentic packet means.
    fn on_authentic(
        &mut self,
        arrival: &Arrival,
        header: &Header,
        space: Space,
    ) -> Result<(), ConnectionError> {
        let now = arrival.now;
        self.handshake.any_processed = true;
        self.active_since = now;
        self.stirred = true;
        self.eliciting_since_received = false;
        if let PacketKind::Initial { scid, token, .. } = &header.kind {
            // "a server MUST set the Token Length field to 0; clients that receive an Initial
            // packet with a non-zero Token Length field MUST either discard the packet or generate
            // a connection error" https://www.rfc-editor.org/rfc/rfc9000.html#section-17.2.2
            if self.side.is_client() && !token.is_empty() {
                return Err(violation("a token in a server's Initial"));
            }
            if self.side.is_client() && self.handshake.remote_scid.is_none() {
                self.handshake.remote_scid = Some(*scid);
                self.remote_cids.set_initial(*scid);
            }
        }
        let first = !self.space(Space::Initial).discarded;
        if space == Space::Handshake && self.side.is_server() && first {
            // A Handshake packet proves that the client got our Initial, which went to the address
            // that the handshake began at. Of the one that this packet came from, it proves nothing:
            // it may be a copy.
            self.paths[0].set_validated();
            self.discard_space(now, Space::Initial);
        }
        Ok(())
    }

    fn on_frames(
        &mut self,
        arrival: &Arrival,
        header: &Header,
        space: Space,
        payload: &[u8],
    ) -> Result<Summary, ConnectionError> {
        let mut summary = Summary::default();
        for frame in Frames::new(payload).map_err(ConnectionError::Peer)? {
            let frame = frame.map_err(ConnectionError::Peer)?;
            let frame_type = frame.frame_type();
            if space != Space::Data && !frame.allowed_before_one_rtt() {
                let error = TransportError::protocol_violation("a frame of another packet type");
                return Err(ConnectionError::Peer(error.in_frame(frame_type)));
            }
            summary.ack_eliciting |= frame.is_ack_eliciting();
            summary.non_probing |= !frame.is_probing();
            self.on_frame(arrival, header, space, frame).map_err(|error| match error {
                ConnectionError::Peer(error) => ConnectionError::Peer(error.in_frame(frame_type)),
                other => other,
            })?;
            if self.is_over() {
                break;
            }
        }
        Ok(summary)
    }

    fn on_frame(
        &mut self,
        arrival: &Arrival,
        header: &Header,
        space: Space,
        frame: Frame<'_>,
    ) -> Result<(), ConnectionError> {
        let now = arrival.now;
        let result = match frame {
            Frame::Padding | Frame::Ping => Ok(()),
            Frame::Ack(ack) => self.on_ack(now, space, &ack),
            Frame::Crypto { offset, data } => return self.on_crypto(now, space, offset, data),
            Frame::Close(close) => {
                self.on_peer_close(now, &close);
                Ok(())
            }
            Frame::Stream(frame) => self.streams.on_stream(&frame),
            Frame::ResetStream(frame) => self.streams.on_reset_stream(&frame),
            Frame::StopSending { id, code } => self.streams.on_stop_sending(id, code),
            Frame::MaxData(limit) => {
                self.streams.on_max_data(limit);
                Ok(())
            }
            Frame::MaxStreamData { id, limit } => self.streams.on_max_stream_data(id, limit),
            Frame::MaxStreams { dir, limit } => {
                self.streams.on_max_streams(dir, limit);
                Ok(())
            }
            Frame::StreamDataBlocked { id } => self.streams.on_stream_data_blocked(id),
            // What we allow depends on what the application reads, not on being asked.
            Frame::DataBlocked | Frame::StreamsBlocked => Ok(()),
            Frame::NewConnectionId(new) => {
                self.remote_cids.on_new(&new).and_then(|()| self.replace_retired_cids())
            }
            Frame::RetireConnectionId { sequence } => {
                let retired = self.local_cids.on_retired(sequence, &header.dcid);
                retired.map(|retired| self.retired.extend(retired))
            }
            Frame::PathChallenge(data) => {
                self.on_path_challenge(arrival, data);
                Ok(())
            }
            Frame::PathResponse(data) => {
                self.on_path_response(now, data);
                Ok(())
            }
            Frame::NewToken(token) => self.on_new_token(token),
            Frame::HandshakeDone => self.on_handshake_done(now),
            Frame::Datagram(data) => self.on_datagram_frame(now, data),
        };
        result.map_err(ConnectionError::Peer)
    }

    fn on_new_token(&mut self, token: &[u8]) -> Result<(), TransportError> {
        if self.side.is_server() {
            return Err(TransportError::protocol_violation("NEW_TOKEN from a client"));
        }
        if self.tokens.len() < MAX_TOKENS {
            self.tokens.push(token.to_vec());
        }
        Ok(())
    }

    fn on_handshake_done(&mut self, now: Instant) -> Result<(), TransportError> {
        if self.side.is_server() {
            return Err(TransportError::protocol_violation("HANDSHAKE_DONE from a client"));
        }
        if self.handshake.complete {
            self.on_handshake_confirmed(now);
        }
        Ok(())
    }

    fn on_datagram_frame(&mut self, now: Instant, data: &[u8]) -> Result<(), TransportError> {
        if self.config.datagram_receive_buffer == 0 {
            return Err(TransportError::protocol_violation(
                "a DATAGRAM frame that was not offered",
            ));
        }
        let count = self.incoming.push(Bytes::copy_from_slice(data));
        if count > 0 {
            self.journal.note(now, Record::MessagesDropped { count });
        }
        if !self.events.contains(&Event::DatagramReceived) {
            self.events.push_back(Event::DatagramReceived);
        }
        Ok(())
    }

    fn drop_packet(&mut self, now: Instant, packet: &[u8], reason: DropReason) {
        self.journal.note(now, Record::PacketDropped { reason, size: packet.len() });
    }

    /// While closing, only the peer's own close is looked for, so that we can fall silent.
    fn note_close(&mut self, arrival: Arrival, datagram: &mut [u8], dcid_len: usize) {
        if !matches!(self.state, State::Closing(_)) {
            return;
        }
        let Ok(header) = Header::read(datagram, dcid_len) else { return };
        let packet = &mut datagram[..header.len];
        if header.kind != PacketKind::OneRtt {
            return;
        }
        let Ok(opened) = self.open_packet(&header, Space::Data, packet) else { return };
        let Ok(frames) = Frames::new(opened.payload) else { return };
        if frames.flatten().any(|frame| matches!(frame, Frame::Close(_))) {
            self.drain(arrival.now, ConnectionError::ClosedLocally);
        }
    }

    /// A stateless reset came that did not look like a packet to any connection ID of ours.
    pub(crate) fn handle_reset(&mut self, now: Instant) {
        self.drain(now, ConnectionError::Reset);
    }

    /// Whether any packet was authentic so far.
    pub(crate) const fn is_heard(&self) -> bool {
        self.handshake.any_processed
    }

    pub(super) fn path_of(
        &mut self,
        arrival: &Arrival,
    ) -> Option<&mut crate::transport::path::Path> {
        self.paths.iter_mut().find(|path| path.matches(arrival.remote, arrival.local))
    }

    /// The path a packet came on, if it is one we know.
    pub(super) fn path_id_of(&self, arrival: &Arrival) -> Option<PathId> {
        let mut paths = self.paths.iter();
        paths.find(|path| path.matches(arrival.remote, arrival.local)).map(|path| path.id)
    }
}

/// A packet without its protection.
struct Opened<'a> {
    payload: &'a [u8],
    number: u64,
    reserved_bits: bool,
    key_phase: bool,
    next_phase: bool,
}

fn violation(reason: &'static str) -> ConnectionError {
    ConnectionError::Peer(TransportError::protocol_violation(reason))
}
