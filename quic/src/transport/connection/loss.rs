//! Acknowledgments, losses and probe timeouts: what they mean for frames, paths and timers.
//!
//! <https://www.rfc-editor.org/rfc/rfc9002.html>

use std::time::{Duration, Instant};

use super::Connection;
use crate::transport::{
    error::TransportError,
    frame::Ack,
    parameters::MIN_UDP_PAYLOAD,
    path::{Path, PathId},
    record::{CongestionSign, CongestionState, Record, RecoveryMetrics},
    recovery::{Missed, SentFrame, SentPacket, persistent_congestion_after},
    space::Space,
};

/// Probe packets per timeout.
///
/// <https://www.rfc-editor.org/rfc/rfc9002.html#section-6.2.4>
const PROBES: u8 = 2;
/// Doublings of the probe timeout, at most.
const MAX_BACKOFF: u32 = 12;

impl Connection {
    // Acknowledgments.

    /// Takes an ACK frame.
    pub(super) fn on_ack(
        &mut self,
        now: Instant,
        space: Space,
        ack: &Ack<'_>,
    ) -> Result<(), TransportError> {
        // A frame before this one may have completed the handshake, and ended its space.
        if self.spaces[space.index()].discarded {
            return Ok(());
        }
        let mut acked = std::mem::take(&mut self.scratch);
        let state = &mut self.spaces[space.index()];
        let before = state.sent.largest_acked();
        let newer = before.is_none_or(|largest| ack.largest > largest);
        state.sent.on_ack(ack, &mut acked)?;
        for late in state.sent.take_late(ack) {
            self.on_late(now, space, &late, before);
        }
        if !acked.is_empty() {
            let rtt = self.sample_rtt(now, space, ack, &acked);
            if newer {
                self.on_ecn_counts(now, space, ack, &acked);
            }
            for packet in &acked {
                if let Some(path) = path_by_id(&mut self.paths, packet.path) {
                    path.mtu.on_survived(packet.stamp.at, packet.stamp.size);
                }
            }
            self.detect_lost(now, space);
            self.note_acked(&acked);
            for packet in acked.drain(..) {
                self.on_acked(now, space, packet);
            }
            let active = self.paths[0].id;
            for path in &mut self.paths {
                path.on_ack_end(now, rtt.filter(|_| path.id == active));
            }
            if space == Space::Handshake {
                self.handshake.server_knows_us = true;
            }
            // A client keeps backing off until the server is known to have validated it.
            if self.is_validated_by_peer() {
                self.pto_count = 0;
            }
            self.streams.set_congestion_window(self.paths[0].congestion.window());
            self.note_recovery(now);
            // "the client [...] MAY consider the handshake to be confirmed when it receives an
            // acknowledgment for a 1-RTT packet"
            // https://www.rfc-editor.org/rfc/rfc9001.html#section-4.1.2
            if space == Space::Data && self.handshake.complete {
                self.on_handshake_confirmed(now);
            }
        }
        self.scratch = acked;
        Ok(())
    }

    /// Remembers what separates one run of losses from the next.
    fn note_acked(&mut self, acked: &[SentPacket]) {
        let sent = || acked.iter().map(|packet| packet.stamp.at);
        self.latest_acked = self.latest_acked.max(sent().max());
        if let Some(run) = self.loss_run {
            let after = sent().filter(|&at| run.is_before(at)).min();
            self.acked_after_run = [self.acked_after_run, after].into_iter().flatten().min();
        }
    }

    /// Takes a sample of the active path's round-trip time, if these acknowledgments give one.
    fn sample_rtt(
        &mut self,
        now: Instant,
        space: Space,
        ack: &Ack<'_>,
        acked: &[SentPacket],
    ) -> Option<Duration> {
        let largest = acked.first().filter(|packet| packet.number == ack.largest)?;
        let eliciting = acked.iter().any(|packet| packet.ack_eliciting);
        if !eliciting || largest.path != self.paths[0].id {
            return None;
        }
        let delay = self.peer_delay(space, ack.delay);
        let rtt = now.saturating_duration_since(largest.stamp.at);
        let path = &mut self.paths[0];
        path.rtt.sample(rtt, delay);
        path.measured_since.get_or_insert(now);
        Some(rtt)
    }

    /// What the peer says it waited, as far as it is to be believed.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9002.html#section-5.3>
    fn peer_delay(&self, space: Space, raw: u64) -> Duration {
        let Some(peer) = self.handshake.peer.as_ref().filter(|_| space == Space::Data) else {
            return Duration::ZERO;
        };
        let scaled = raw.saturating_mul(1 << peer.ack_delay_exponent);
        let delay = Duration::from_micros(scaled);
        if self.handshake.confirmed { delay.min(peer.max_ack_delay) } else { delay }
    }

    fn on_ecn_counts(&mut self, now: Instant, space: Space, ack: &Ack<'_>, acked: &[SentPacket]) {
        let active = self.paths[0].id;
        let marked = acked.iter().filter(|packet| packet.ect && packet.path == active).count();
        let before = self.spaces[space.index()].ecn;
        let congested = self.paths[0].on_ecn(marked as u64, ack.ecn, before);
        if let Some(counts) = ack.ecn {
            self.space(space).ecn = counts;
        }
        if congested && let Some(largest) = acked.first() {
            self.paths[0].on_marks(now, largest.stamp.at);
            self.journal.note(now, Record::Congestion(CongestionSign::Ecn));
        }
    }

    fn on_acked(&mut self, now: Instant, space: Space, packet: SentPacket) {
        self.journal.note(now, Record::PacketAcked { space, number: packet.number });
        if let Some(path) = path_by_id(&mut self.paths, packet.path)
            && path.on_packet_acked(now, packet.number, &packet.stamp)
        {
            self.journal.note(now, Record::MtuUpdated { mtu: path.mtu.current() });
        }
        if let Some(number) = packet.reported {
            self.space(space).received.on_report_acked(number);
        }
        if space == Space::Data
            && let Some(keys) = &mut self.one_rtt
        {
            keys.on_acked(packet.number);
        }
        for frame in &packet.frames {
            self.on_frame_acked(space, frame);
        }
        self.recycle(packet.frames);
    }

    fn on_frame_acked(&mut self, space: Space, frame: &SentFrame) {
        match frame {
            SentFrame::Crypto(range) => self.space(space).crypto_out.on_acked(range.clone()),
            SentFrame::Stream { id, range, fin } => {
                self.streams.on_stream_acked(*id, range.clone(), *fin);
            }
            SentFrame::ResetStream(id) => self.streams.on_reset_acked(*id),
            SentFrame::RetireConnectionId(sequence) => self.remote_cids.on_retire_acked(*sequence),
            SentFrame::NewToken => self.new_token = None,
            SentFrame::StopSending(_)
            | SentFrame::MaxData
            | SentFrame::MaxStreamData(_)
            | SentFrame::MaxStreams(_)
            | SentFrame::DataBlocked
            | SentFrame::StreamDataBlocked(_)
            | SentFrame::StreamsBlocked(_)
            | SentFrame::NewConnectionId(_)
            | SentFrame::HandshakeDone => {}
        }
    }

    // Losses.

    /// A packet that counts as lost is acknowledged after all, when `largest` was before.
    fn on_late(&mut self, now: Instant, space: Space, late: &Missed, largest: Option<u64>) {
        self.journal.note(now, Record::PacketLate { space, number: late.number });
        let overtaken_by = largest.map_or(0, |largest| largest.saturating_sub(late.number));
        if let Some(path) = path_by_id(&mut self.paths, late.path)
            && path.on_packet_late(now, late.at, late.size, overtaken_by)
        {
            self.journal.note(now, Record::CongestionUndone);
            self.note_recovery(now);
        }
    }

    fn detect_lost(&mut self, now: Instant, space: Space) {
        let (rtt, measured_since) = (self.paths[0].rtt, self.paths[0].measured_since);
        let reordering = self.paths[0].reordering;
        let mut lost = Vec::new();
        let sent = &mut self.spaces[space.index()].sent;
        let run = sent.detect_lost(now, &rtt, &reordering, measured_since, &mut lost);
        if lost.is_empty() {
            return;
        }
        let (mut latest, mut count) = (None, 0);
        for (packet, reason) in lost {
            self.journal.note(
                now,
                Record::PacketLost {
                    space,
                    number: packet.number,
                    size: usize::from(packet.stamp.size),
                    reason,
                    mtu_probe: packet.mtu_probe,
                },
            );
            if let Some(path) = path_by_id(&mut self.paths, packet.path) {
                if packet.mtu_probe {
                    path.on_mtu_probe_lost(packet.number, &packet.stamp);
                } else if path.on_packet_lost(now, &packet.stamp) {
                    self.journal.note(now, Record::MtuUpdated { mtu: path.mtu.current() });
                }
            }
            if !packet.mtu_probe && packet.path == self.paths[0].id {
                latest = Some(packet.stamp.at);
                count += 1;
            }
            self.resend(space, &packet.frames);
            self.recycle(packet.frames);
        }
        let Some(at) = latest else { return };
        let path = &mut self.paths[0];
        path.on_losses(now, at, count);
        self.journal.note(now, Record::Congestion(CongestionSign::Loss));
        let max_ack_delay = self.handshake.peer.as_ref().map(|peer| peer.max_ack_delay);
        let long = persistent_congestion_after(&rtt, max_ack_delay.unwrap_or_default());
        let Some(run) = run.map(|run| run.joined(self.loss_run, self.acked_after_run)) else {
            return;
        };
        self.loss_run = Some(run);
        self.acked_after_run = self.latest_acked.filter(|&at| run.is_before(at));
        if run.duration() > long {
            path.on_persistent_congestion();
            self.journal.note(now, Record::Congestion(CongestionSign::Persistent));
            self.loss_run = None;
        }
    }

    /// Queues what `frames` were about, as it is now.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-13.3>
    pub(super) fn resend(&mut self, space: Space, frames: &[SentFrame]) {
        for frame in frames {
            match frame {
                SentFrame::Crypto(range) => self.space(space).crypto_out.on_lost(range.clone()),
                SentFrame::Stream { id, range, fin } => {
                    self.streams.on_stream_lost(*id, range.clone(), *fin);
                }
                SentFrame::ResetStream(id) => self.streams.on_reset_lost(*id),
                SentFrame::StopSending(id) => self.streams.on_stop_lost(*id),
                SentFrame::MaxData => self.streams.on_max_data_lost(),
                SentFrame::MaxStreamData(id) => self.streams.on_max_stream_data_lost(*id),
                SentFrame::MaxStreams(dir) => self.streams.on_max_streams_lost(*dir),
                SentFrame::DataBlocked => self.streams.on_data_blocked_lost(),
                SentFrame::StreamDataBlocked(id) => self.streams.on_stream_data_blocked_lost(*id),
                SentFrame::StreamsBlocked(dir) => self.streams.on_streams_blocked_lost(*dir),
                SentFrame::NewConnectionId(sequence) => {
                    let alive = self.local_cids.get(*sequence).is_some();
                    if alive && !self.announce.contains(sequence) {
                        self.announce.push_back(*sequence);
                    }
                }
                SentFrame::RetireConnectionId(sequence) => {
                    self.remote_cids.on_retire_lost(*sequence);
                }
                SentFrame::HandshakeDone => self.handshake_done_due = true,
                SentFrame::NewToken => self.new_token_due = self.new_token.is_some(),
            }
        }
    }

    /// Takes a packet off its path's account.
    pub(super) fn forget_in_flight(&mut self, packet: &SentPacket) {
        if let Some(path) = path_by_id(&mut self.paths, packet.path) {
            path.on_packet_gone(&packet.stamp);
        }
    }

    /// Keeps the memory of `frames` for a packet to come: of as many as a window holds, and some more.
    pub(super) fn recycle(&mut self, mut frames: Vec<SentFrame>) {
        const SPARE: u64 = 256;
        let window = self.paths[0].congestion.window() / u64::from(MIN_UDP_PAYLOAD);
        if (self.spare_frames.len() as u64) < SPARE + window && frames.capacity() > 0 {
            frames.clear();
            self.spare_frames.push(frames);
        }
    }

    // Timeouts.

    /// The probe timeout, not backed off.
    pub(super) fn pto(&self, space: Space) -> Duration {
        let delay = match (space, &self.handshake.peer) {
            (Space::Data, Some(peer)) => peer.max_ack_delay,
            _ => Duration::ZERO,
        };
        self.paths[0].rtt.pto() + delay
    }

    /// By what probe timeouts are multiplied after those that expired.
    pub(super) fn pto_backoff(&self) -> u32 {
        1 << self.pto_count.min(MAX_BACKOFF)
    }

    /// When packets count as lost, or a probe is due.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9002.html#appendix-A.8>
    pub(super) fn loss_deadline(&self) -> Option<Instant> {
        let lost = self.spaces.iter().filter_map(|state| state.sent.loss_at()).min();
        lost.or_else(|| self.pto_deadline().map(|(at, _)| at))
    }

    fn pto_deadline(&self) -> Option<(Instant, Space)> {
        // "If no additional data can be sent, the server's PTO timer MUST NOT be armed until
        // datagrams have been received from the client"
        // https://www.rfc-editor.org/rfc/rfc9002.html#section-6.2.2.1
        if self.is_amplification_limited() {
            return None;
        }
        let backoff = self.pto_backoff();
        let armed = Space::ALL.into_iter().filter_map(|space| {
            // "An endpoint MUST NOT set its PTO timer for the Application Data packet number space
            // until the handshake is confirmed." Section 6.2.1.
            if space == Space::Data && !self.handshake.confirmed {
                return None;
            }
            let state = &self.spaces[space.index()];
            // Probes that wait to leave set it when they do.
            let sent = state.sent.last_eliciting().filter(|_| state.probes == 0)?;
            Some((sent + self.pto(space) * backoff, space))
        });
        if let Some(first) = armed.min_by_key(|&(at, _)| at) {
            return Some(first);
        }
        // A client has to keep going until the server has certainly validated its address, lest
        // both wait for each other.
        if self.is_validated_by_peer() {
            return None;
        }
        let space = if self.has_keys(Space::Handshake) { Space::Handshake } else { Space::Initial };
        if self.spaces[space.index()].probes > 0 {
            return None;
        }
        Some((self.last_sent.max(self.active_since) + self.pto(space) * backoff, space))
    }

    /// Whether the peer has certainly validated our address.
    fn is_validated_by_peer(&self) -> bool {
        self.side.is_server() || self.handshake.server_knows_us || self.handshake.confirmed
    }

    pub(super) fn on_loss_deadline(&mut self, now: Instant) {
        let lost = Space::ALL
            .into_iter()
            .filter(|space| self.spaces[space.index()].sent.loss_at().is_some_and(|at| at <= now));
        let lost: Vec<_> = lost.collect();
        if !lost.is_empty() {
            for space in lost {
                self.detect_lost(now, space);
            }
            self.note_recovery(now);
            return;
        }
        let Some((_, space)) = self.pto_deadline().filter(|&(at, _)| at <= now) else { return };
        self.pto_count += 1;
        self.journal.note(now, Record::ProbeTimeout { space, count: self.pto_count });
        // Both sides of a handshake get on faster when all of its spaces are probed; and one whose
        // packets are all lost may be kept waiting by those of another that fill the window.
        let others = Space::ALL.into_iter().filter(|&other| {
            let in_flight = self.spaces[other.index()].sent.last_eliciting().is_some();
            let waiting = self.has_keys(other) && self.has_eliciting_output(other);
            other != Space::Data && (in_flight || waiting)
        });
        let mut spaces: Vec<_> = others.collect();
        if !spaces.contains(&space) {
            spaces.push(space);
        }
        for space in spaces {
            self.probe(space);
        }
        self.note_recovery(now);
    }

    /// Tells an observer what loss detection and congestion control go by now.
    fn note_recovery(&mut self, now: Instant) {
        if !self.journal.is_observed() {
            return;
        }
        let path = &self.paths[0];
        let metrics = RecoveryMetrics {
            smoothed_rtt: path.rtt.smoothed(),
            latest_rtt: path.rtt.latest(),
            min_rtt: path.rtt.min(),
            rtt_variation: path.rtt.variation(),
            pto_count: self.pto_count,
            congestion_window: path.congestion.window(),
            in_flight: path.in_flight,
            pacing_rate: path.congestion.pacing_rate(),
        };
        let state = match path.congestion.in_slow_start() {
            true => CongestionState::SlowStart,
            false => CongestionState::CongestionAvoidance,
        };
        self.journal.note(now, Record::RecoveryUpdated(metrics));
        self.journal.note_congestion_state(now, state);
    }

    /// Lets probes leave, with as much of what is oldest as fits them. Were it less, a small loss
    /// at the front would keep everything behind it waiting, probe after probe.
    fn probe(&mut self, space: Space) {
        let room = usize::from(PROBES) * usize::from(MIN_UDP_PAYLOAD);
        let state = &mut self.spaces[space.index()];
        state.probes = PROBES;
        let mut used = 0;
        let oldest = state.sent.oldest_eliciting().take_while(|packet| {
            let fits = used < room;
            used += usize::from(packet.stamp.size);
            fits
        });
        let frames: Vec<_> = oldest.flat_map(|packet| packet.frames.iter().cloned()).collect();
        self.resend(space, &frames);
    }
}

fn path_by_id(paths: &mut [Path], id: PathId) -> Option<&mut Path> {
    paths.iter_mut().find(|path| path.id == id)
}
