//! What was sent in one packet number space and is not acknowledged yet, and which of it is lost.
//!
//! <https://www.rfc-editor.org/rfc/rfc9002.html#section-6>

use std::{
    collections::VecDeque,
    ops::Range,
    time::{Duration, Instant},
};

use super::{
    congestion::Stamp,
    error::TransportError,
    frame::Ack,
    path::PathId,
    record::LossReason,
    reordering::Reordering,
    rtt::Rtt,
    stream_id::{Dir, StreamId},
};

/// <https://www.rfc-editor.org/rfc/rfc9002.html#section-7.6.1>
const PERSISTENT_CONGESTION_THRESHOLD: u32 = 3;
/// Packet numbers left out on purpose that are remembered.
const MAX_SKIPPED: usize = 16;
/// Lost packets that are remembered, since they may arrive yet.
const MAX_MISSED: usize = 1024;
/// Round trips after it left for which that is so.
const MISSED_FOR: u32 = 4;

/// A frame that has to be looked at again when its packet is acknowledged or lost. Only what the
/// frame was about: what goes out again is the state of then.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-13.3>
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SentFrame {
    Crypto(Range<u64>),
    Stream { id: StreamId, range: Range<u64>, fin: bool },
    ResetStream(StreamId),
    StopSending(StreamId),
    MaxData,
    MaxStreamData(StreamId),
    MaxStreams(Dir),
    DataBlocked,
    StreamDataBlocked(StreamId),
    StreamsBlocked(Dir),
    NewConnectionId(u64),
    RetireConnectionId(u64),
    HandshakeDone,
    NewToken,
}

/// A packet in flight.
#[derive(Debug)]
pub(crate) struct SentPacket {
    pub(crate) number: u64,
    /// When it left, its size, and what its path had delivered then.
    pub(crate) stamp: Stamp,
    pub(crate) ack_eliciting: bool,
    /// Marked ECT(0).
    pub(crate) ect: bool,
    pub(crate) mtu_probe: bool,
    pub(crate) path: PathId,
    /// The highest number in the ACK frame it carried.
    pub(crate) reported: Option<u64>,
    pub(crate) frames: Vec<SentFrame>,
}

/// The send side of a packet number space.
#[derive(Debug, Default)]
pub(crate) struct Sent {
    /// By ascending number. The first one is always in flight.
    packets: VecDeque<Slot>,
    next_number: u64,
    largest_acked: Option<u64>,
    loss_at: Option<Instant>,
    /// When the latest ack-eliciting packet left, and how many are in flight.
    last_eliciting: Option<Instant>,
    eliciting: usize,
    skip_at: u64,
    skipped: VecDeque<u64>,
    /// Packets that count as lost since lately, by ascending number.
    missed: VecDeque<Missed>,
}

/// A packet that counts as lost, and may arrive yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Missed {
    pub(crate) number: u64,
    /// When it left.
    pub(crate) at: Instant,
    pub(crate) size: u16,
    pub(crate) path: PathId,
}

#[derive(Debug)]
enum Slot {
    InFlight(SentPacket),
    Acked(u64),
    Lost(u64),
}

impl Slot {
    const fn number(&self) -> u64 {
        match self {
            Self::InFlight(packet) => packet.number,
            Self::Acked(number) | Self::Lost(number) => *number,
        }
    }
}

/// The times at which the first and the last ack-eliciting packet of a run left that is wholly
/// lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LossRun {
    first: Instant,
    last: Instant,
}

impl LossRun {
    pub(crate) fn duration(&self) -> Duration {
        self.last - self.first
    }

    /// This run together with an `earlier` one, which may be of another packet number space, unless
    /// a packet was acknowledged that left after that and before the end of this, at `acked`.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9002.html#section-7.6.2>
    pub(crate) fn joined(self, earlier: Option<Self>, acked: Option<Instant>) -> Self {
        let Some(earlier) = earlier else { return self };
        if acked.is_some_and(|acked| acked < self.last) {
            return self;
        }
        Self { first: self.first.min(earlier.first), last: self.last.max(earlier.last) }
    }

    /// Whether a packet that left at this time left after it.
    pub(crate) fn is_before(&self, sent: Instant) -> bool {
        self.last < sent
    }
}

impl Sent {
    /// The number of the next packet.
    pub(crate) const fn next_number(&self) -> u64 {
        self.next_number
    }

    /// Takes the number for a packet that leaves.
    pub(crate) fn use_number(&mut self) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        number
    }

    /// Goes on with `number`.
    #[cfg(test)]
    pub(crate) const fn set_next_number(&mut self, number: u64) {
        self.next_number = number;
    }

    /// Whether the next number is the one to leave out.
    pub(crate) const fn skip_is_due(&self) -> bool {
        self.next_number >= self.skip_at
    }

    /// Leaves a number out, so that a peer which acknowledges what it never received gives itself
    /// away, and plans the next one `distance` packets on.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-21.4>
    pub(crate) fn skip(&mut self, distance: u64) {
        if self.skip_at > 0 {
            if self.skipped.len() == MAX_SKIPPED {
                self.skipped.pop_front();
            }
            self.skipped.push_back(self.next_number);
            self.next_number += 1;
        }
        self.skip_at = self.next_number + distance.max(1);
    }

    /// Remembers a packet that left; only those in flight are.
    pub(crate) fn on_sent(&mut self, packet: SentPacket) {
        if packet.ack_eliciting {
            self.last_eliciting = Some(packet.stamp.at);
            self.eliciting += 1;
        }
        self.packets.push_back(Slot::InFlight(packet));
    }

    /// Takes an ACK frame: appends newly acknowledged packets to `acked`, the highest first.
    ///
    /// # Errors
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-13.1>: "An endpoint SHOULD treat
    /// receipt of an acknowledgment for a packet it did not send as a connection error of type
    /// PROTOCOL_VIOLATION".
    pub(crate) fn on_ack(
        &mut self,
        ack: &Ack<'_>,
        acked: &mut Vec<SentPacket>,
    ) -> Result<(), TransportError> {
        if ack.largest >= self.next_number {
            return Err(TransportError::protocol_violation(
                "an acknowledgment for a packet that was not sent",
            ));
        }
        for (low, high) in ack.ranges() {
            if self.skipped.iter().any(|skipped| (low..=high).contains(skipped)) {
                return Err(TransportError::protocol_violation(
                    "an acknowledgment for a packet number that was left out",
                ));
            }
            let first = self.packets.partition_point(|slot| slot.number() < low);
            let last = self.packets.partition_point(|slot| slot.number() <= high);
            for slot in self.packets.range_mut(first..last).rev() {
                if matches!(slot, Slot::InFlight(_)) {
                    let number = slot.number();
                    if let Slot::InFlight(packet) = std::mem::replace(slot, Slot::Acked(number)) {
                        self.eliciting -= usize::from(packet.ack_eliciting);
                        acked.push(packet);
                    }
                }
            }
        }
        self.largest_acked = self.largest_acked.max(Some(ack.largest));
        self.trim();
        Ok(())
    }

    /// Takes out the packets that this ACK frame acknowledges although they count as lost. To be
    /// called after [`Self::on_ack`], which checks the frame.
    pub(crate) fn take_late(&mut self, ack: &Ack<'_>) -> Vec<Missed> {
        let mut late = Vec::new();
        if self.missed.is_empty() {
            return late;
        }
        for (low, high) in ack.ranges() {
            let first = self.missed.partition_point(|missed| missed.number < low);
            let last = self.missed.partition_point(|missed| missed.number <= high);
            if first < last {
                late.extend(self.missed.drain(first..last));
            }
        }
        late
    }

    /// Appends packets that count as lost now to `lost`, the lowest first, and notes when the next
    /// one will. Returns the longest run of losses among packets sent since the first round-trip
    /// sample.
    pub(crate) fn detect_lost(
        &mut self,
        now: Instant,
        rtt: &Rtt,
        reordering: &Reordering,
        measured_since: Option<Instant>,
        lost: &mut Vec<(SentPacket, LossReason)>,
    ) -> Option<LossRun> {
        self.loss_at = None;
        let largest_acked = self.largest_acked?;
        let delay = reordering.delay(rtt);
        let forget = rtt.conservative() * MISSED_FOR;
        while self.missed.front().is_some_and(|missed| missed.at + forget < now) {
            self.missed.pop_front();
        }
        let mut longest: Option<LossRun> = None;
        let mut run: Option<Instant> = None;
        for slot in &mut self.packets {
            let number = slot.number();
            if number > largest_acked {
                break;
            }
            let packet = match slot {
                Slot::InFlight(packet) => packet,
                Slot::Lost(_) => continue,
                Slot::Acked(_) => {
                    run = None;
                    continue;
                }
            };
            let due = packet.stamp.at + delay;
            let reason = if largest_acked - number >= reordering.packets() {
                LossReason::PacketThreshold
            } else if due <= now {
                LossReason::TimeThreshold
            } else {
                self.loss_at = Some(self.loss_at.map_or(due, |at| at.min(due)));
                run = None;
                continue;
            };
            let counts = measured_since.is_some_and(|since| packet.stamp.at >= since);
            if packet.ack_eliciting && !packet.mtu_probe && counts {
                let found =
                    LossRun { first: *run.get_or_insert(packet.stamp.at), last: packet.stamp.at };
                if longest.is_none_or(|longest| longest.duration() <= found.duration()) {
                    longest = Some(found);
                }
            }
            if let Slot::InFlight(packet) = std::mem::replace(slot, Slot::Lost(number)) {
                self.eliciting -= usize::from(packet.ack_eliciting);
                if !packet.mtu_probe {
                    if self.missed.len() == MAX_MISSED {
                        self.missed.pop_front();
                    }
                    let (at, size) = (packet.stamp.at, packet.stamp.size);
                    self.missed.push_back(Missed { number, at, size, path: packet.path });
                }
                lost.push((packet, reason));
            }
        }
        self.trim();
        longest
    }

    /// The oldest packets that elicit acknowledgments, for probes to repeat.
    pub(crate) fn oldest_eliciting(&self) -> impl Iterator<Item = &SentPacket> {
        self.packets.iter().filter_map(|slot| match slot {
            Slot::InFlight(packet) if packet.ack_eliciting && !packet.mtu_probe => Some(packet),
            _ => None,
        })
    }

    /// Takes everything out: the keys are gone, or the packets are beyond the peer.
    pub(crate) fn clear(&mut self) -> impl Iterator<Item = SentPacket> {
        self.loss_at = None;
        self.last_eliciting = None;
        self.eliciting = 0;
        self.missed = VecDeque::new();
        std::mem::take(&mut self.packets).into_iter().filter_map(|slot| match slot {
            Slot::InFlight(packet) => Some(packet),
            Slot::Acked(_) | Slot::Lost(_) => None,
        })
    }

    /// How many packets are remembered.
    pub(crate) fn len(&self) -> usize {
        self.packets.len()
    }

    /// Whether nothing is remembered.
    pub(crate) fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }

    /// Gives spare memory back.
    pub(crate) fn shrink(&mut self) {
        self.packets.shrink_to_fit();
        // Who rests has waited longer than they may be late.
        self.missed = VecDeque::new();
        self.skipped.shrink_to_fit();
    }

    /// When [`Self::detect_lost`] will find something without a further ACK.
    pub(crate) const fn loss_at(&self) -> Option<Instant> {
        self.loss_at
    }

    /// When the latest ack-eliciting packet left, while one is in flight.
    pub(crate) fn last_eliciting(&self) -> Option<Instant> {
        self.last_eliciting.filter(|_| self.eliciting > 0)
    }

    pub(crate) const fn largest_acked(&self) -> Option<u64> {
        self.largest_acked
    }

    fn trim(&mut self) {
        while matches!(self.packets.front(), Some(Slot::Acked(_) | Slot::Lost(_))) {
            self.packets.pop_front();
        }
    }
}

/// How long nothing may get through before a path counts as congested for good.
///
/// <https://www.rfc-editor.org/rfc/rfc9002.html#section-7.6.1>
pub(crate) fn persistent_congestion_after(rtt: &Rtt, max_ack_delay: Duration) -> Duration {
    (rtt.pto() + max_ack_delay) * PERSISTENT_CONGESTION_THRESHOLD
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            congestion::Delivery,
            frame::{Frame, Frames, write_ack},
            ranges::RangeSet,
            rtt::INITIAL_RTT,
        },
        *,
    };

    fn send(sent: &mut Sent, at: Instant) -> u64 {
        let number = sent.use_number();
        sent.on_sent(SentPacket {
            number,
            stamp: Delivery::default().on_sent(at, 1200, 0),
            ack_eliciting: true,
            ect: false,
            mtu_probe: false,
            path: PathId(0),
            reported: None,
            frames: vec![],
        });
        number
    }

    fn ack<const N: usize>(
        sent: &mut Sent,
        ranges: [(u64, u64); N],
    ) -> Result<Vec<u64>, TransportError> {
        let mut set = RangeSet::default();
        for (start, end) in ranges {
            set.insert(start..end);
        }
        let mut octets = Vec::new();
        assert!(write_ack(&set, 0, None, 10_000, &mut octets));
        let Some(Ok(Frame::Ack(ack))) = Frames::new(&octets).unwrap().next() else { panic!("ACK") };
        let mut acked = vec![];
        sent.on_ack(&ack, &mut acked)?;
        Ok(acked.iter().map(|packet| packet.number).collect())
    }

    fn lost(sent: &mut Sent, now: Instant) -> Vec<(u64, LossReason)> {
        let mut rtt = Rtt::new(INITIAL_RTT);
        rtt.sample(Duration::from_millis(80), Duration::ZERO);
        let mut lost = vec![];
        sent.detect_lost(now, &rtt, &Reordering::default(), None, &mut lost);
        lost.iter().map(|(packet, reason)| (packet.number, *reason)).collect()
    }

    #[test]
    fn req_j02_three_packets_or_nine_eighths_of_the_rtt_later_a_packet_is_lost() {
        let now = Instant::now();
        let mut sent = Sent::default();
        for _ in 0..6 {
            send(&mut sent, now);
        }
        assert_eq!(ack(&mut sent, [(4, 5)]).unwrap(), [4]);
        let late = LossReason::TimeThreshold;
        let overtaken = LossReason::PacketThreshold;
        assert_eq!(lost(&mut sent, now), [(0, overtaken), (1, overtaken)]);
        assert_eq!(sent.loss_at(), Some(now + Duration::from_millis(90)));
        assert_eq!(lost(&mut sent, now + Duration::from_millis(89)), []);
        assert_eq!(lost(&mut sent, now + Duration::from_millis(90)), [(2, late), (3, late)]);
        assert_eq!(sent.loss_at(), None);
        assert_eq!(sent.packets.len(), 1);
    }

    #[test]
    fn req_f11_packets_never_sent_or_left_out_cannot_be_acknowledged() {
        let now = Instant::now();
        let mut sent = Sent::default();
        for _ in 0..3 {
            send(&mut sent, now);
        }
        assert!(ack(&mut sent, [(3, 4)]).is_err());
        sent.skip(0);
        sent.skip(10);
        send(&mut sent, now);
        assert!(ack(&mut sent, [(0, 3), (4, 5)]).is_ok());
        assert!(ack(&mut sent, [(0, 5)]).is_err());
    }

    #[test]
    fn a_packet_that_is_never_acknowledged_does_not_hold_the_later_ones() {
        let now = Instant::now();
        let mut sent = Sent::default();
        send(&mut sent, now);
        for _ in 0..100_000 {
            let number = send(&mut sent, now);
            assert_eq!(ack(&mut sent, [(number, number + 1)]).unwrap(), [number]);
            lost(&mut sent, now);
            assert!(sent.packets.len() <= 4);
        }
    }

    fn late<const N: usize>(sent: &mut Sent, ranges: [(u64, u64); N]) -> Vec<u64> {
        let mut set = RangeSet::default();
        for (start, end) in ranges {
            set.insert(start..end);
        }
        let mut octets = Vec::new();
        assert!(write_ack(&set, 0, None, 10_000, &mut octets));
        let Some(Ok(Frame::Ack(ack))) = Frames::new(&octets).unwrap().next() else { panic!("ACK") };
        sent.take_late(&ack).iter().map(|late| late.number).collect()
    }

    #[test]
    fn packets_that_count_as_lost_are_late_once_and_for_four_round_trips() {
        let now = Instant::now();
        let mut sent = Sent::default();
        for _ in 0..9 {
            send(&mut sent, now);
        }
        assert_eq!(late(&mut sent, [(0, 9)]), [], "none is lost");
        ack(&mut sent, [(8, 9)]).unwrap();
        assert_eq!(lost(&mut sent, now).len(), 6);
        assert_eq!(late(&mut sent, [(1, 3), (5, 9)]), [5, 1, 2]);
        assert_eq!(late(&mut sent, [(1, 3), (5, 9)]), [], "told once");
        lost(&mut sent, now + Duration::from_millis(320));
        assert_eq!(late(&mut sent, [(3, 4)]), [3]);
        lost(&mut sent, now + Duration::from_millis(321));
        assert_eq!(late(&mut sent, [(0, 9)]), []);
    }

    #[test]
    fn what_is_remembered_of_lost_packets_is_bounded() {
        let now = Instant::now();
        let mut sent = Sent::default();
        let last = (0..3000).map(|_| send(&mut sent, now)).last().unwrap();
        ack(&mut sent, [(last, last + 1)]).unwrap();
        assert_eq!(lost(&mut sent, now).len(), 2997);
        assert_eq!(late(&mut sent, [(0, last)]).len(), MAX_MISSED);
    }

    #[test]
    fn req_j10_a_run_of_losses_spans_no_acknowledged_packet() {
        let start = Instant::now();
        let step = Duration::from_secs(1);
        let mut sent = Sent::default();
        for number in 0..10 {
            send(&mut sent, start + step * number);
        }
        ack(&mut sent, [(4, 5), (9, 10)]).unwrap();
        let mut found = vec![];
        let rtt = Rtt::new(INITIAL_RTT);
        let now = start + step * 20;
        let run = sent.detect_lost(now, &rtt, &Reordering::default(), Some(start), &mut found);
        assert_eq!(found.len(), 8);
        assert_eq!(run.map(|run| run.duration()), Some(step * 3));
    }

    #[test]
    fn req_j10_runs_of_several_spaces_are_one_unless_something_between_arrived() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let earlier = LossRun { first: at(1), last: at(2) };
        let later = LossRun { first: at(4), last: at(6) };
        for (acked, seconds) in [(None, 5), (Some(6), 5), (Some(7), 5), (Some(3), 2)] {
            let joined = later.joined(Some(earlier), acked.map(at));
            assert_eq!(joined.duration(), Duration::from_secs(seconds), "{acked:?}");
        }
        assert_eq!(later.joined(None, None), later);
    }
}
