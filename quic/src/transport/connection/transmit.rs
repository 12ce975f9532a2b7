//! Transmitting: the next datagrams, their packets, their frames, top-down.

use std::{
    net::{IpAddr, SocketAddr},
    time::Instant,
};

use super::{ACK_DELAY_EXPONENT, Connection, closing::State};
use crate::{
    connection_id::ConnectionId,
    transport::{
        ecn::Ecn,
        error::ConnectionError,
        frame::{self, types},
        packet::{Builder, Outgoing},
        parameters::MIN_UDP_PAYLOAD,
        path::PathId,
        record::Record,
        recovery::{SentFrame, SentPacket},
        space::Space,
        tls::TAG_LEN,
    },
    varint,
};

/// Packets that elicit no acknowledgment, before one gets a PING so that the peer tells us which
/// of our ACK frames it has.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-13.2.4>
const PING_AFTER: u32 = 32;
/// Less room than this is not worth a packet.
const MIN_PAYLOAD: usize = 32;
/// Packets that may wait for an acknowledgment besides what two congestion windows hold.
const CROWD: u64 = 64;
/// Packet numbers between two that are left out, at least; the rest is random and grows with the
/// congestion window.
const SKIP_DISTANCE: u64 = 16;

/// One or more datagrams for the same destination, appended to the caller's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Transmission {
    pub(crate) remote: SocketAddr,
    pub(crate) local: Option<IpAddr>,
    pub(crate) ecn: Option<Ecn>,
    /// Octets of each datagram; the last one may be shorter.
    pub(crate) segment: usize,
}

/// What may go into a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// Nothing that elicits an acknowledgment: the congestion window is full.
    AcksOnly,
    Anything,
}

/// A packet that takes frames.
pub(super) struct Open {
    builder: Builder,
    space: Space,
    /// Octets up to which frames may go: the datagram's end less the tag.
    end: usize,
    ack_eliciting: bool,
    reported: Option<u64>,
    frames: Vec<SentFrame>,
}

impl Connection {
    /// Appends the next datagrams, at most `max_segments` of one size.
    pub(crate) fn poll_transmit(
        &mut self,
        now: Instant,
        max_segments: usize,
        out: &mut Vec<u8>,
    ) -> Option<Transmission> {
        match self.state {
            State::Open => {}
            State::Closing(_) => return self.transmit_close(now, out),
            State::Draining { .. } | State::Gone(_) => return None,
        }
        // "If the packet number for sending reaches 2^62-1, the sender MUST close the connection
        // without sending a CONNECTION_CLOSE frame or any further packets."
        // https://www.rfc-editor.org/rfc/rfc9000.html#section-12.3
        if self.spaces.iter().any(|state| state.sent.next_number() >= varint::MAX) {
            self.vanish(now, ConnectionError::Internal("the packet numbers are used up"));
            return None;
        }
        if let Some(transmission) = self.transmit_off_path(now, out) {
            return Some(transmission);
        }
        self.update_keys_when_due(now);
        // A sender that never runs out of data would never come to search.
        if self.paths[0].in_flight > 0
            && let Some(transmission) = self.transmit_mtu_probe(now, out)
        {
            return Some(transmission);
        }
        let ecn = self.paths[0].mark();
        let start = out.len();
        let mut segment = None;
        for _ in 0..max_segments.max(1) {
            let size = segment.unwrap_or_else(|| self.next_size());
            let Some(len) = self.datagram(now, size, ecn, out) else { break };
            segment.get_or_insert(len);
            // The mark may change while the path is tested: one mark per batch.
            if len < size || self.paths[0].mark() != ecn {
                break;
            }
        }
        let Some(segment) = segment else { return self.transmit_mtu_probe(now, out) };
        debug_assert!(out.len() > start);
        Some(self.transmission(0, ecn, segment))
    }

    /// Whether [`Self::poll_transmit`] has something to send, as far as it knows without the time:
    /// for callers that would have to wake somebody to ask.
    #[cfg(feature = "driver")]
    pub(crate) fn has_output(&self) -> bool {
        self.close_is_due()
            || Space::ALL.into_iter().any(|space| self.has_eliciting_output(space))
            || self.paths.iter().any(|path| path.challenge_is_due() || path.response_due.is_some())
    }

    // Datagrams.

    /// Appends one datagram on the active path, of at most `size` octets; returns its length.
    fn datagram(
        &mut self,
        now: Instant,
        size: usize,
        ecn: Option<Ecn>,
        out: &mut Vec<u8>,
    ) -> Option<usize> {
        let size = self.affordable(size)?;
        let start = out.len();
        let end = start + size;
        let mut pad = false;
        let mut last: Option<Open> = None;
        for space in Space::ALL {
            let Some(content) = self.content(now, space) else { continue };
            if let Some(packet) = last.take() {
                let room = end.saturating_sub(out.len() + TAG_LEN);
                if room < self.overhead(space) + MIN_PAYLOAD {
                    last = Some(packet);
                    break;
                }
                self.seal(now, 0, packet, 0, ecn, out);
            }
            let first = out.len() == start;
            let mut packet = self.packet(now, space, content, end, out);
            if packet.builder.is_empty(out) {
                if first {
                    packet.builder.abandon(out);
                    self.recycle(packet.frames);
                    continue;
                }
                // The packet before is sealed, so that this one has to carry the padding.
                frame::write_fields(types::PING, &[], out);
                packet.ack_eliciting = true;
            }
            // "A client MUST expand the payload of all UDP datagrams carrying Initial packets to
            // at least the smallest allowed maximum datagram size of 1200 bytes [...] Similarly, a
            // server MUST expand the payload of all UDP datagrams carrying ack-eliciting Initial
            // packets" https://www.rfc-editor.org/rfc/rfc9000.html#section-14.1
            pad |= space == Space::Initial && (self.side.is_client() || packet.ack_eliciting);
            pad |= self.pad_for_path;
            last = Some(packet);
        }
        self.pad_for_path = false;
        let packet = last?;
        let pad_to = if pad { start + size.min(usize::from(MIN_UDP_PAYLOAD)) } else { 0 };
        self.seal(now, 0, packet, pad_to, ecn, out);
        let len = out.len() - start;
        self.on_datagram_sent(now, 0, len, ecn);
        Some(len)
    }

    /// Bytes that the next datagram on the active path may have. Probes have the size that every
    /// path carries: where one carries less than it did, nothing larger would ever be answered, and
    /// so nothing would count as lost.
    fn next_size(&self) -> usize {
        let probing = self.spaces.iter().any(|state| state.probes > 0);
        if probing { usize::from(MIN_UDP_PAYLOAD) } else { self.paths[0].datagram_size() }
    }

    /// How much of `size` may leave now: less before the peer's address is validated.
    fn affordable(&self, size: usize) -> Option<usize> {
        let allowance = self.paths[0].allowance();
        // Initials need their full size; later, anything that fits a packet may help.
        let least = if self.has_keys(Space::Initial) {
            usize::from(MIN_UDP_PAYLOAD)
        } else {
            self.short_overhead() + MIN_PAYLOAD
        };
        (allowance >= least).then_some(size.min(allowance))
    }

    pub(super) fn is_amplification_limited(&self) -> bool {
        self.affordable(usize::from(MIN_UDP_PAYLOAD)).is_none()
    }

    /// Appends a challenge or a response on a path that is not the active one.
    fn transmit_off_path(&mut self, now: Instant, out: &mut Vec<u8>) -> Option<Transmission> {
        if self.one_rtt.is_none() || self.is_crowded() {
            return None;
        }
        let index = (1..self.paths.len()).find(|&index| {
            let path = &self.paths[index];
            let due = path.response_due.is_some() || path.challenge_is_due();
            due && path.allowance() >= self.short_overhead() + 2 * frame::PATH_SIZE
        })?;
        let size = usize::from(MIN_UDP_PAYLOAD).min(self.paths[index].allowance());
        let start = out.len();
        let mut packet = self.open_packet_for(Space::Data, index, start + size, out);
        self.write_path_frames(now, index, size, &mut packet, out);
        self.pad_for_path = false;
        self.seal(now, index, packet, start + size, None, out);
        let len = out.len() - start;
        self.on_datagram_sent(now, index, len, None);
        Some(self.transmission(index, None, len))
    }

    /// Appends a probe for a larger size.
    fn transmit_mtu_probe(&mut self, now: Instant, out: &mut Vec<u8>) -> Option<Transmission> {
        let path = &self.paths[0];
        let after_timeout = self.spaces.iter().any(|state| state.probes > 0);
        if !self.handshake.confirmed || !path.is_validated() || !path.has_window() || after_timeout
        {
            return None;
        }
        let in_use = path.in_flight > 0;
        let size = self.paths[0].mtu.poll_probe(now, in_use)?;
        let start = out.len();
        let end = start + usize::from(size);
        let mut packet = self.open_packet_for(Space::Data, 0, end, out);
        frame::write_fields(types::PING, &[], out);
        packet.ack_eliciting = true;
        let number = packet.builder.number();
        self.paths[0].mtu.on_probe_sent(number, size);
        self.seal(now, 0, packet, end, None, out);
        let len = out.len() - start;
        self.on_datagram_sent(now, 0, len, None);
        Some(self.transmission(0, None, len))
    }

    /// Appends CONNECTION_CLOSE in every space that the peer may have keys for.
    fn transmit_close(&mut self, now: Instant, out: &mut Vec<u8>) -> Option<Transmission> {
        if !self.close_is_due() {
            return None;
        }
        let size = self.affordable(usize::from(MIN_UDP_PAYLOAD))?;
        self.on_close_sent();
        let start = out.len();
        let end = start + size;
        let spaces: Vec<_> = Space::ALL.into_iter().filter(|&space| self.has_keys(space)).collect();
        let spaces: Vec<_> = match spaces[..] {
            // Once the peer has certainly 1-RTT keys, only those are used.
            [.., Space::Data] if self.handshake.confirmed => vec![Space::Data],
            _ => spaces,
        };
        let count = spaces.len();
        for (index, space) in spaces.into_iter().enumerate() {
            if end.saturating_sub(out.len()) < self.overhead(space) + MIN_PAYLOAD {
                break;
            }
            let share = (end - out.len()) / (count - index);
            let packet = self.open_packet_for(space, 0, out.len() + share, out);
            let room = packet.end.saturating_sub(out.len());
            self.write_close(space, room, out);
            let initial = self.has_keys(Space::Initial);
            let pad_to = if index + 1 == count && initial { end } else { 0 };
            self.seal(now, 0, packet, pad_to, None, out);
        }
        let len = out.len() - start;
        if len == 0 {
            return None;
        }
        self.on_datagram_sent(now, 0, len, None);
        Some(self.transmission(0, None, len))
    }

    fn transmission(&self, index: usize, ecn: Option<Ecn>, segment: usize) -> Transmission {
        let path = &self.paths[index];
        Transmission { remote: path.remote, local: path.local, ecn, segment }
    }

    fn on_datagram_sent(&mut self, now: Instant, index: usize, len: usize, ecn: Option<Ecn>) {
        self.journal.note(now, Record::DatagramSent { size: len });
        let path = &mut self.paths[index];
        path.on_datagram_sent(len);
        if ecn.is_some() {
            path.on_marked();
        }
    }

    // Packets.

    /// What a packet of `space` could carry now; `None` when there is no reason to send one.
    fn content(&mut self, now: Instant, space: Space) -> Option<Content> {
        if !self.has_keys(space) {
            return None;
        }
        let delay = self.ack_delay(space);
        let state = &self.spaces[space.index()];
        let ack_due = state.received.is_due(now, delay);
        let probing = state.probes > 0;
        let urgent = space == Space::Data && !self.is_crowded() && {
            let path = &self.paths[0];
            path.response_due.is_some() || path.challenge_is_due()
        };
        let eliciting = urgent || probing || self.has_eliciting_output(space);
        if eliciting && (probing || urgent || self.may_send_more(now)) {
            return Some(Content::Anything);
        }
        if !eliciting && space == Space::Data {
            self.paths[0].on_nothing_to_send();
        }
        ack_due.then_some(Content::AcksOnly)
    }

    /// Whether so many packets wait for an acknowledgment that those have to wait too which leave
    /// in spite of a full window: path frames, and the PINGs of acknowledgments. A peer that asks
    /// and never acknowledges must not fill our memory with them.
    fn is_crowded(&self) -> bool {
        let window = self.paths[0].congestion.window() / u64::from(MIN_UDP_PAYLOAD);
        self.spaces[Space::Data.index()].sent.len() as u64 > CROWD + 2 * window
    }

    pub(super) fn has_eliciting_output(&self, space: Space) -> bool {
        let state = &self.spaces[space.index()];
        let common = state.ping_due || state.crypto_out.has_output(u64::MAX);
        match space {
            Space::Initial | Space::Handshake => common,
            Space::Data => {
                common
                    || self.handshake_done_due
                    || self.new_token_due
                    || !self.announce.is_empty()
                    || self.remote_cids.has_retirements()
                    || !self.outgoing.is_empty()
                    || self.streams.has_output()
            }
        }
    }

    /// Whether the congestion window and the pacer let another datagram leave.
    fn may_send_more(&mut self, now: Instant) -> bool {
        let path = &mut self.paths[0];
        if !path.has_window() {
            return false;
        }
        self.pacing_until = path.pacing_delay(now);
        self.pacing_until.is_none()
    }

    /// Appends the header and frames of a packet on the active path.
    fn packet(
        &mut self,
        now: Instant,
        space: Space,
        content: Content,
        end: usize,
        out: &mut Vec<u8>,
    ) -> Open {
        if space == Space::Data && self.spaces[space.index()].sent.skip_is_due() {
            let window = self.paths[0].congestion.window() / u64::from(MIN_UDP_PAYLOAD);
            let spread = u32::try_from(window).unwrap_or(u32::MAX).max(16);
            let distance = SKIP_DISTANCE + u64::from(self.random.below(spread));
            self.space(space).sent.skip(distance);
        }
        let mut packet = self.open_packet_for(space, 0, end, out);
        self.write_ack(now, &mut packet, out);
        if content == Content::AcksOnly {
            let ask = self.non_eliciting >= PING_AFTER && !self.is_crowded();
            if space == Space::Data && ask {
                frame::write_fields(types::PING, &[], out);
                packet.ack_eliciting = true;
            }
            return packet;
        }
        let state = &mut self.spaces[space.index()];
        if std::mem::take(&mut state.ping_due) && packet.room(out) > 0 {
            frame::write_fields(types::PING, &[], out);
            packet.ack_eliciting = true;
        }
        if space == Space::Data {
            let size = end - packet.start();
            self.write_path_frames(now, 0, size, &mut packet, out);
            self.write_first(&mut packet, out);
        }
        self.write_crypto(&mut packet, out);
        if space == Space::Data {
            self.write_connection_ids(&mut packet, out);
            let rtt = self.paths[0].rtt.smoothed();
            self.streams.write_control(now, rtt, packet.end, out, &mut packet.frames);
            self.write_token(&mut packet, out);
            packet.ack_eliciting |= self.write_datagrams(packet.end, out);
            self.streams.write_data(packet.end, out, &mut packet.frames);
        }
        packet.ack_eliciting |= !packet.frames.is_empty();
        if !packet.ack_eliciting && self.spaces[space.index()].probes > 0 && packet.room(out) > 0 {
            frame::write_fields(types::PING, &[], out);
            packet.ack_eliciting = true;
        }
        packet
    }

    pub(super) fn open_packet_for(
        &mut self,
        space: Space,
        path: usize,
        end: usize,
        out: &mut Vec<u8>,
    ) -> Open {
        let dcid = self.remote_cid_of(path);
        let sent = &mut self.spaces[space.index()].sent;
        let header = Outgoing {
            space,
            version: self.version,
            dcid: &dcid,
            scid: &self.handshake.local_cid,
            token: &self.handshake.token,
            number: sent.next_number(),
            largest_acked: sent.largest_acked(),
            key_phase: self.one_rtt.as_ref().is_some_and(|keys| keys.phase()),
            spin: self.spin,
        };
        Open {
            builder: Builder::start(&header, out),
            space,
            end: end - TAG_LEN,
            ack_eliciting: false,
            reported: None,
            frames: self.spare_frames.pop().unwrap_or_default(),
        }
    }

    fn overhead(&self, space: Space) -> usize {
        let dcid = self.remote_cid();
        Builder::overhead(&Outgoing {
            space,
            version: self.version,
            dcid: &dcid,
            scid: &self.handshake.local_cid,
            token: &self.handshake.token,
            number: 0,
            largest_acked: None,
            key_phase: false,
            spin: false,
        })
    }

    fn remote_cid_of(&self, path: usize) -> ConnectionId {
        self.remote_cids.get(self.paths[path].cid).map(|cid| cid.id).unwrap_or_default()
    }

    /// Seals a packet, and remembers it while it is in flight.
    pub(super) fn seal(
        &mut self,
        now: Instant,
        path: usize,
        packet: Open,
        pad_to: usize,
        ecn: Option<Ecn>,
        out: &mut Vec<u8>,
    ) {
        let Open { builder, space, ack_eliciting, reported, frames, .. } = packet;
        let padded = pad_to > out.len() + TAG_LEN;
        let number = self.space(space).sent.use_number();
        debug_assert_eq!(number, builder.number());
        let keys = match (space, &mut self.one_rtt) {
            (Space::Data, Some(keys)) => Some(keys.seal_with(number)),
            _ => self.spaces[space.index()].keys.as_ref().map(|keys| &keys.local),
        };
        let Some(keys) = keys else { return builder.abandon(out) };
        builder.pad(pad_to, out);
        self.journal.note(
            now,
            Record::PacketSent {
                space,
                number,
                size: builder.sealed_len(out),
                ack_eliciting,
                frames: builder.frames(out),
            },
        );
        // Sealing fails only for payloads beyond the cipher's limit, far above a datagram.
        let sealed = builder.finish(&*keys.header, &*keys.packet, pad_to, out);
        let Ok(len) = sealed else { return builder.abandon(out) };
        self.last_sent = now;
        self.stirred = true;
        if let Some(largest) = reported {
            self.space(space).received.on_reported();
            if let (Space::Data, Some(keys)) = (space, &mut self.one_rtt) {
                keys.on_ack_sent(largest);
            }
        }
        if ack_eliciting {
            self.non_eliciting = 0;
            // Idle time restarts with the first such packet since one was received.
            if !self.eliciting_since_received {
                self.eliciting_since_received = true;
                self.active_since = now;
            }
        } else {
            self.non_eliciting = self.non_eliciting.saturating_add(1);
        }
        let over = self.is_over();
        if (ack_eliciting || padded) && !over {
            let id: PathId = self.paths[path].id;
            let size = u16::try_from(len).unwrap_or(u16::MAX);
            let mtu_probe = len > self.paths[path].datagram_size();
            let stamp = self.paths[path].on_packet_sent(now, size);
            let state = self.space(space);
            state.probes = state.probes.saturating_sub(u8::from(ack_eliciting));
            state.sent.on_sent(SentPacket {
                number,
                stamp,
                ack_eliciting,
                ect: ecn.is_some(),
                mtu_probe,
                path: id,
                reported,
                frames,
            });
        } else {
            self.recycle(frames);
        }
        // "a client MUST discard Initial keys when it first sends a Handshake packet"
        // https://www.rfc-editor.org/rfc/rfc9001.html#section-4.9.1
        if space == Space::Handshake && self.side.is_client() && !over {
            self.discard_space(now, Space::Initial);
        }
    }

    fn update_keys_when_due(&mut self, now: Instant) {
        let Some(keys) = &mut self.one_rtt else { return };
        let wanted = self.key_update_due || keys.wants_update();
        if wanted && self.handshake.confirmed && keys.may_update() {
            keys.update();
            self.key_update_due = false;
            self.journal.note(now, Record::KeysUpdated { by_peer: false });
        }
    }

    // Frames.

    pub(super) fn write_ack(&mut self, now: Instant, packet: &mut Open, out: &mut Vec<u8>) {
        let received = &self.spaces[packet.space.index()].received;
        if !received.is_wanted() {
            return;
        }
        let (ranges, delay, ecn) = received.report(now);
        let micros = u64::try_from(delay.as_micros()).unwrap_or(0);
        let delay = if packet.space == Space::Data { micros >> ACK_DELAY_EXPONENT } else { 0 };
        if frame::write_ack(ranges, delay, ecn, packet.room(out), out) {
            packet.reported = ranges.max();
        }
    }

    fn write_path_frames(
        &mut self,
        now: Instant,
        index: usize,
        size: usize,
        packet: &mut Open,
        out: &mut Vec<u8>,
    ) {
        let path = &mut self.paths[index];
        if packet.room(out) < 2 * frame::PATH_SIZE {
            return;
        }
        if let Some(data) = path.response_due.take() {
            frame::write_path(types::PATH_RESPONSE, data, out);
            packet.ack_eliciting = true;
            self.pad_for_path = true;
        }
        if path.challenge_is_due() {
            let data = self.random.octets();
            frame::write_path(types::PATH_CHALLENGE, data, out);
            path.on_challenge_sent(now, data, size >= usize::from(MIN_UDP_PAYLOAD));
            packet.ack_eliciting = true;
            self.pad_for_path = true;
        }
    }

    fn write_first(&mut self, packet: &mut Open, out: &mut Vec<u8>) {
        if self.handshake_done_due && packet.room(out) > 0 {
            self.handshake_done_due = false;
            frame::write_fields(types::HANDSHAKE_DONE, &[], out);
            packet.frames.push(SentFrame::HandshakeDone);
        }
    }

    pub(super) fn write_crypto(&mut self, packet: &mut Open, out: &mut Vec<u8>) {
        let buffer = &mut self.spaces[packet.space.index()].crypto_out;
        loop {
            let room = packet.room(out);
            if room < frame::STREAM_OVERHEAD + 1 {
                return;
            }
            let Some(range) = buffer.poll(room - frame::STREAM_OVERHEAD, u64::MAX) else { return };
            let len = usize::try_from(range.end - range.start).unwrap_or(0);
            frame::write_crypto_header(range.start, len, out);
            buffer.copy(&range, out);
            packet.frames.push(SentFrame::Crypto(range));
        }
    }

    fn write_connection_ids(&mut self, packet: &mut Open, out: &mut Vec<u8>) {
        while packet.room(out) >= frame::NEW_CONNECTION_ID_SIZE {
            let Some(sequence) = self.announce.pop_front() else { break };
            let Some(issued) = self.local_cids.get(sequence) else { continue };
            let new = frame::NewConnectionId {
                sequence,
                retire_prior_to: self.local_cids.retire_prior_to().min(sequence),
                id: issued.id,
                reset_token: issued.reset_token,
            };
            frame::write_new_connection_id(&new, out);
            packet.frames.push(SentFrame::NewConnectionId(sequence));
        }
        while packet.room(out) >= frame::CONTROL_SIZE {
            let Some(sequence) = self.remote_cids.poll_retire() else { break };
            frame::write_fields(types::RETIRE_CONNECTION_ID, &[sequence], out);
            packet.frames.push(SentFrame::RetireConnectionId(sequence));
        }
    }

    fn write_token(&mut self, packet: &mut Open, out: &mut Vec<u8>) {
        let Some(token) = self.new_token.as_ref().filter(|_| self.new_token_due) else { return };
        if packet.room(out) >= token.len() + 3 {
            frame::write_octets(types::NEW_TOKEN, token, out);
            packet.frames.push(SentFrame::NewToken);
            self.new_token_due = false;
        }
    }

    /// Appends DATAGRAM frames that fit; returns whether there was one.
    fn write_datagrams(&mut self, end: usize, out: &mut Vec<u8>) -> bool {
        let mut any = false;
        while let Some(message) = self.outgoing.front() {
            if end.saturating_sub(out.len()) < message.len() + 3 {
                // The path may carry less than when the message was queued.
                if Some(message.len()) > self.max_datagram() {
                    self.outgoing.pop();
                    continue;
                }
                break;
            }
            frame::write_octets(types::DATAGRAM_WITH_LENGTH, message, out);
            self.outgoing.pop();
            any = true;
        }
        if any && std::mem::take(&mut self.outgoing_blocked) {
            self.events.push_back(super::Event::DatagramsUnblocked);
        }
        any
    }
}

impl Open {
    /// Octets that frames may still take.
    fn room(&self, out: &[u8]) -> usize {
        self.end.saturating_sub(out.len())
    }

    const fn start(&self) -> usize {
        self.builder.start_of_packet()
    }
}
