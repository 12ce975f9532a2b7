//! Which packets of one space have arrived, and when that has to be said.
//!
//! <https://www.rfc-editor.org/rfc/rfc9000.html#section-13.2>

use std::time::{Duration, Instant};

use super::{ecn::Ecn, frame::EcnCounts, ranges::RangeSet};

/// Ranges remembered, and thus named in an ACK frame. Older ones are forgotten; packets below the
/// oldest range count as duplicates then.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-13.2.3>
pub(crate) const MAX_RANGES: usize = 64;
/// Ack-eliciting packets received before an ACK is due at once.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-13.2.2>
const ACK_EVERY: u32 = 2;

/// The receive side of a packet number space.
#[derive(Debug, Default)]
pub(crate) struct Received {
    ranges: RangeSet,
    /// Packets below this number are treated as received.
    floor: u64,
    /// When the packet with the highest number arrived.
    largest_at: Option<Instant>,
    /// Ack-eliciting packets since the last ACK frame.
    unacked: u32,
    /// When the first of them arrived.
    unacked_since: Option<Instant>,
    /// An ACK should leave without waiting.
    immediate: bool,
    ecn: EcnCounts,
}

impl Received {
    /// Whether packet `number` came before, or might have.
    pub(crate) fn is_duplicate(&self, number: u64) -> bool {
        number < self.floor || self.ranges.contains(number)
    }

    /// Notes packet `number`, after it was processed.
    pub(crate) fn on_packet(
        &mut self,
        now: Instant,
        number: u64,
        ack_eliciting: bool,
        ecn: Option<Ecn>,
    ) {
        let largest = self.ranges.max();
        self.ranges.insert(number..number + 1);
        if self.ranges.len() > MAX_RANGES
            && let Some(oldest) = self.ranges.pop_first()
        {
            self.floor = self.floor.max(oldest.end);
        }
        if largest.is_none_or(|largest| number > largest) {
            self.largest_at = Some(now);
        }
        match ecn {
            Some(Ecn::Ect0) => self.ecn.ect0 += 1,
            Some(Ecn::Ect1) => self.ecn.ect1 += 1,
            Some(Ecn::Ce) => self.ecn.ce += 1,
            None => {}
        }
        if !ack_eliciting {
            return;
        }
        self.unacked += 1;
        self.unacked_since.get_or_insert(now);
        // "an endpoint SHOULD generate and send an ACK frame without delay when it receives an
        // ack-eliciting packet either: when the received packet has a packet number less than
        // another ack-eliciting packet that has been received, or when the packet has a packet
        // number larger than the highest-numbered ack-eliciting packet that has been received and
        // there are missing packets between"; and for those marked CE.
        // https://www.rfc-editor.org/rfc/rfc9000.html#section-13.2.1
        let in_order = largest.map_or(number == 0, |largest| number == largest + 1);
        if !in_order || ecn == Some(Ecn::Ce) || self.unacked >= ACK_EVERY {
            self.immediate = true;
        }
    }

    /// Makes the next ACK immediate, as in the Initial and Handshake spaces.
    pub(crate) fn hurry(&mut self) {
        self.immediate |= self.unacked > 0;
    }

    /// When an ACK frame comes due that is not due yet.
    pub(crate) fn deadline(&self, max_delay: Duration) -> Option<Instant> {
        self.unacked_since.filter(|_| !self.immediate).map(|since| since + max_delay)
    }

    /// Makes an ACK frame due that has waited long enough. It leaves as soon as anything may: until
    /// then, time has nothing to add.
    pub(crate) fn handle_deadline(&mut self, now: Instant, max_delay: Duration) {
        self.immediate |= self.deadline(max_delay).is_some_and(|at| at <= now);
    }

    /// Whether an ACK frame is due.
    pub(crate) fn is_due(&self, now: Instant, max_delay: Duration) -> bool {
        self.immediate || self.deadline(max_delay).is_some_and(|at| at <= now)
    }

    /// Whether an ACK frame would tell the peer anything it waits for.
    pub(crate) const fn is_wanted(&self) -> bool {
        self.unacked > 0
    }

    /// What an ACK frame sent now says: ranges, delay, and counts if any mark was seen.
    pub(crate) fn report(&self, now: Instant) -> (&RangeSet, Duration, Option<EcnCounts>) {
        let delay = self.largest_at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        let marked = self.ecn != EcnCounts::default();
        (&self.ranges, delay, marked.then_some(self.ecn))
    }

    /// Notes that an ACK frame was sent.
    pub(crate) fn on_reported(&mut self) {
        self.unacked = 0;
        self.unacked_since = None;
        self.immediate = false;
    }

    /// Forgets packets up to `number`: the peer has acknowledged an ACK frame that named them.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-13.2.4>
    pub(crate) fn on_report_acked(&mut self, number: u64) {
        // The highest one stays: every ACK frame names it.
        let Some(largest) = self.ranges.max() else { return };
        let floor = (number + 1).min(largest);
        self.ranges.remove(0..floor);
        self.floor = self.floor.max(floor);
    }

    /// Gives spare memory back.
    pub(crate) fn shrink(&mut self) {
        self.ranges.shrink();
    }

    /// The highest number received.
    pub(crate) fn largest(&self) -> Option<u64> {
        self.ranges.max()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DELAY: Duration = Duration::from_millis(25);

    #[test]
    fn req_f05_every_second_packet_is_acknowledged_at_once() {
        let now = Instant::now();
        let mut received = Received::default();
        received.on_packet(now, 0, true, None);
        assert_eq!(received.deadline(DELAY), Some(now + DELAY));
        received.on_packet(now, 1, true, None);
        assert!(received.is_due(now, DELAY));
    }

    #[test]
    fn req_f03_reordering_gaps_and_ce_are_acknowledged_at_once() {
        let now = Instant::now();
        for (number, ecn, due) in
            [(6, None, false), (7, None, true), (3, None, true), (6, Some(Ecn::Ce), true)]
        {
            let mut received = Received::default();
            for before in 0..6 {
                if before != 3 {
                    received.on_packet(now, before, true, None);
                }
            }
            received.on_reported();
            received.on_packet(now, number, true, ecn);
            assert_eq!(received.is_due(now, DELAY), due, "{number} {ecn:?}");
        }
    }

    #[test]
    fn req_f04_packets_that_elicit_nothing_are_not_acknowledged_by_themselves() {
        let now = Instant::now();
        let mut received = Received::default();
        for number in [0, 5, 9, 3] {
            received.on_packet(now, number, false, None);
        }
        assert_eq!(received.deadline(DELAY), None);
    }

    #[test]
    fn req_f06_ranges_are_bounded_and_what_is_forgotten_counts_as_received() {
        let now = Instant::now();
        let mut received = Received::default();
        for number in 0..1_000_000 {
            received.on_packet(now, 2 * number, true, None);
        }
        assert_eq!(received.ranges.len(), MAX_RANGES);
        assert_eq!(received.largest(), Some(1_999_998));
        assert!(received.is_duplicate(1) && received.is_duplicate(1_999_998));
        assert!(!received.is_duplicate(1_999_997));
    }

    #[test]
    fn req_f06_what_the_peer_knows_we_know_is_dropped_except_the_highest() {
        let now = Instant::now();
        let mut received = Received::default();
        for number in 0..10 {
            received.on_packet(now, number, true, None);
        }
        received.on_report_acked(9);
        assert!(received.ranges.iter().eq([&(9..10)]));
        assert!(received.is_duplicate(4));
    }
}
