//! One network path: its addresses, whether the peer was proved to be there, and everything
//! learned about it.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use super::{
    congestion::{self, Algorithm, Controller, Delivery, Stamp},
    ecn::Ecn,
    frame::EcnCounts,
    mtu::Mtu,
    pacer::{Pace, Pacer, window_rate},
    parameters::MIN_UDP_PAYLOAD,
    reordering::{Reduction, Reordering},
    rtt::Rtt,
};

/// Octets that may be sent for each one received, before the peer's address is validated.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-8>
const AMPLIFICATION: u64 = 3;
/// Packets that carry an ECN mark before it is known whether the path bears it.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#appendix-A.4>
const ECN_TRIALS: u8 = 10;
/// How often the wait between challenges doubles at most. Validation fails long before.
const MAX_BACKOFF: u32 = 16;
/// Challenges whose responses still count.
const CHALLENGES: usize = 3;

/// A path of a connection, never used for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PathId(pub(crate) u32);

/// The state of one path.
#[derive(Debug)]
pub(crate) struct Path {
    pub(crate) id: PathId,
    pub(crate) remote: SocketAddr,
    pub(crate) local: Option<IpAddr>,
    /// The number of the peer's connection ID that packets on this path carry.
    pub(crate) cid: u64,
    pub(crate) rtt: Rtt,
    /// When the first sample was taken: earlier losses say nothing about persistent congestion.
    pub(crate) measured_since: Option<Instant>,
    pub(crate) reordering: Reordering,
    pub(crate) congestion: Box<dyn Controller>,
    /// The latest reduction of the window.
    reduction: Option<Reduction>,
    pub(crate) mtu: Mtu,
    pub(crate) ecn: EcnState,
    pub(crate) in_flight: u64,
    usage: Usage,
    delivery: Delivery,
    pacer: Pacer,
    validated: bool,
    /// Chosen by ourselves: then it takes no address validation to send there.
    chosen: bool,
    received: u64,
    sent: u64,
    validation: Option<Validation>,
    /// The latest challenge to answer. Older ones are superseded: a peer that asks twice is
    /// content with one answer, and so nothing can pile up.
    pub(crate) response_due: Option<[u8; 8]>,
}

/// How much of the window was used, in this round trip and in the one before.
#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    /// When this round trip began.
    since: Option<Instant>,
    round: Round,
    before: Round,
}

#[derive(Clone, Copy, Debug, Default)]
struct Round {
    /// The most octets that were in flight.
    most: u64,
    /// There was no room for another datagram.
    full: bool,
}

impl Usage {
    /// With a packet that left, so many octets are in flight.
    fn on_sent(&mut self, in_flight: u64, full: bool) {
        self.round.most = self.round.most.max(in_flight);
        self.round.full |= full;
    }

    /// A packet that left at `sent` was acknowledged while so many octets were in flight, its own
    /// included. The first one that left within a round trip ends it.
    fn on_acked(&mut self, now: Instant, sent: Instant, in_flight: u64) {
        if self.since.is_none_or(|since| sent >= since) {
            self.since = Some(now);
            self.before =
                std::mem::replace(&mut self.round, Round { most: in_flight, full: false });
        }
    }
}

/// A validation in progress.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-8.2>
#[derive(Clone, Debug)]
struct Validation {
    challenges: [Option<Challenge>; CHALLENGES],
    /// A challenge is due.
    due: bool,
    /// How many have left.
    sent: u32,
    repeat_at: Option<Instant>,
    fail_at: Instant,
}

#[derive(Clone, Copy, Debug)]
struct Challenge {
    data: [u8; 8],
    /// Whether its datagram had the full size, so that the answer proves the path carries it.
    full_size: bool,
}

/// What a PATH_RESPONSE means for the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Unknown,
    /// The peer is there; whether the path carries full datagrams is asked next.
    AddressOnly,
    Validated,
}

/// Whether the path bears ECN marks.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-13.4.2>
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EcnState {
    /// So many packets are still to be marked before an answer is awaited.
    Testing(u8),
    Capable,
    Failed,
}

impl Path {
    pub(crate) fn new(
        id: PathId,
        remote: SocketAddr,
        local: Option<IpAddr>,
        cid: u64,
        defaults: &PathDefaults,
    ) -> Self {
        Self {
            id,
            remote,
            local,
            cid,
            rtt: Rtt::new(defaults.initial_rtt),
            measured_since: None,
            reordering: Reordering::default(),
            congestion: defaults.congestion.controller(MIN_UDP_PAYLOAD),
            reduction: None,
            mtu: Mtu::new(defaults.mtu_ceiling),
            ecn: if defaults.ecn { EcnState::Testing(ECN_TRIALS) } else { EcnState::Failed },
            in_flight: 0,
            usage: Usage::default(),
            delivery: Delivery::default(),
            pacer: Pacer::default(),
            validated: false,
            chosen: false,
            received: 0,
            sent: 0,
            validation: None,
            response_due: None,
        }
    }

    /// Takes over what was learned about the path from the same host: only a NAT has moved.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-9.4>
    pub(crate) fn inherit(&mut self, other: &mut Self, defaults: &PathDefaults) {
        self.rtt = other.rtt;
        self.measured_since = other.measured_since;
        let fresh = defaults.congestion.controller(other.mtu.current());
        self.congestion = std::mem::replace(&mut other.congestion, fresh);
        self.reordering = other.reordering;
        // What its losses led to stands: whether they were some shows on the other path.
        self.reduction = other.reduction.take();
        if let Some(reduction) = &mut self.reduction {
            reduction.settle();
        }
        // What the controller counts by; packets of the other path still refer to it there.
        self.delivery = other.delivery.clone();
        self.mtu = other.mtu.clone();
    }

    pub(crate) fn matches(&self, remote: SocketAddr, local: Option<IpAddr>) -> bool {
        self.remote == remote && (self.local.is_none() || local.is_none() || self.local == local)
    }

    // Address validation.

    pub(crate) fn on_datagram_received(&mut self, octets: usize) {
        self.received += octets as u64;
    }

    pub(crate) fn on_datagram_sent(&mut self, octets: usize) {
        self.sent += octets as u64;
    }

    /// Octets that may leave in one datagram now.
    pub(crate) fn allowance(&self) -> usize {
        if self.validated || self.chosen {
            return usize::MAX;
        }
        let left = (AMPLIFICATION * self.received).saturating_sub(self.sent);
        usize::try_from(left).unwrap_or(usize::MAX)
    }

    pub(crate) const fn is_validated(&self) -> bool {
        self.validated
    }

    pub(crate) const fn set_validated(&mut self) {
        self.validated = true;
    }

    /// The path leads where we want to go, not where the peer claims to be.
    pub(crate) const fn set_chosen(&mut self) {
        self.chosen = true;
    }

    /// Starts asking the peer whether it is there.
    pub(crate) fn start_validation(&mut self, now: Instant, pto: Duration) {
        // "a value of three times the larger of the current PTO or the PTO for the new path"
        // https://www.rfc-editor.org/rfc/rfc9000.html#section-8.2.4
        let fail_at = now + 3 * pto;
        self.validation = Some(Validation {
            challenges: [None; CHALLENGES],
            due: true,
            sent: 0,
            repeat_at: None,
            fail_at,
        });
    }

    pub(crate) const fn is_validating(&self) -> bool {
        self.validation.is_some()
    }

    pub(crate) fn challenge_is_due(&self) -> bool {
        self.validation.as_ref().is_some_and(|validation| validation.due)
    }

    /// Notes a challenge that leaves with `data` in a datagram of full size or less.
    pub(crate) fn on_challenge_sent(&mut self, now: Instant, data: [u8; 8], full_size: bool) {
        let pto = self.rtt.pto();
        if let Some(validation) = &mut self.validation {
            // "An endpoint SHOULD NOT send PATH_CHALLENGE frames more frequently than it would send
            // an Initial packet": from the third on, each wait is twice the last. On a path of which
            // nothing is known yet, three leave before validation fails.
            // https://www.rfc-editor.org/rfc/rfc9000.html#section-8.2.1
            let doublings = validation.sent.saturating_sub(1).min(MAX_BACKOFF);
            let repeat_at = now + pto * (1 << doublings);
            validation.sent += 1;
            validation.challenges.rotate_right(1);
            validation.challenges[0] = Some(Challenge { data, full_size });
            validation.due = false;
            validation.repeat_at = Some(repeat_at);
        }
    }

    /// Takes a PATH_RESPONSE.
    pub(crate) fn on_response(&mut self, data: [u8; 8]) -> Answer {
        let Some(validation) = &mut self.validation else { return Answer::Unknown };
        let answered = validation.challenges.iter().flatten().find(|sent| sent.data == data);
        let Some(answered) = answered else { return Answer::Unknown };
        let full_size = answered.full_size;
        self.validated = true;
        if full_size {
            self.validation = None;
            Answer::Validated
        } else {
            // "If an endpoint [...] does not expand the datagram [...] it MUST perform a second
            // path validation with an expanded datagram"
            // https://www.rfc-editor.org/rfc/rfc9000.html#section-8.2.1
            validation.due = true;
            Answer::AddressOnly
        }
    }

    /// Repeats a challenge when that is due; returns whether validation failed.
    pub(crate) fn handle_deadline(&mut self, now: Instant) -> bool {
        let Some(validation) = &mut self.validation else { return false };
        if validation.fail_at <= now {
            self.validation = None;
            return true;
        }
        if validation.repeat_at.is_some_and(|at| at <= now) {
            validation.repeat_at = None;
            validation.due = true;
        }
        false
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        let validation = self.validation.as_ref()?;
        Some(validation.repeat_at.map_or(validation.fail_at, |at| at.min(validation.fail_at)))
    }

    // Sending.

    /// Octets that one datagram may have.
    pub(crate) fn datagram_size(&self) -> usize {
        usize::from(self.mtu.current())
    }

    /// When a full datagram may leave; `None` for now.
    pub(crate) fn pacing_delay(&mut self, now: Instant) -> Option<Instant> {
        let controller = &self.congestion;
        let rate = controller.pacing_rate().unwrap_or_else(|| {
            window_rate(controller.window(), self.rtt.smoothed(), controller.in_slow_start())
        });
        self.pacer.delay(now, &Pace { rate, datagram: self.mtu.current() })
    }

    /// Whether the congestion window has room for a full datagram.
    pub(crate) fn has_window(&self) -> bool {
        self.in_flight + u64::from(self.mtu.current()) <= self.congestion.window()
    }

    /// There is nothing to send.
    pub(crate) fn on_nothing_to_send(&mut self) {
        if self.has_window() {
            self.delivery.on_app_limited(self.in_flight);
        }
    }

    /// Whether the window was used lately, so that it may grow. What there is to send does not show
    /// that: a pacer may hold it back, or a buffer, long before the window does. In slow start half of
    /// it is enough, since its growth outruns what leaves.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9002.html#section-7.8>
    fn uses_window(&self) -> bool {
        let rounds = [self.usage.round, self.usage.before];
        if self.congestion.in_slow_start() {
            let most = rounds.iter().map(|round| round.most).max();
            2 * most.unwrap_or_default() > self.congestion.window()
        } else {
            rounds.iter().any(|round| round.full)
        }
    }

    // Packets in flight.

    /// A packet of `size` octets leaves that will be in flight.
    pub(crate) fn on_packet_sent(&mut self, now: Instant, size: u16) -> Stamp {
        let stamp = self.delivery.on_sent(now, size, self.in_flight);
        self.congestion.on_sent(&congestion::Sent {
            now,
            size: u64::from(size),
            in_flight: self.in_flight,
            app_limited: self.delivery.is_app_limited(),
        });
        self.in_flight += u64::from(size);
        let full = !self.has_window();
        self.usage.on_sent(self.in_flight, full);
        self.pacer.on_sent(u64::from(size));
        stamp
    }

    /// Packet `number` was acknowledged. Returns whether datagrams may be larger now.
    pub(crate) fn on_packet_acked(&mut self, now: Instant, number: u64, stamp: &Stamp) -> bool {
        let app_limited = !self.uses_window();
        self.usage.on_acked(now, stamp.at, self.in_flight);
        self.on_packet_gone(stamp);
        self.delivery.on_acked(now, stamp);
        self.congestion.on_acked(&congestion::Acked {
            now,
            sent: stamp.at,
            size: u64::from(stamp.size),
            rtt: self.rtt.smoothed(),
            app_limited,
        });
        let grew = self.mtu.on_acked(number);
        if grew {
            self.congestion.set_datagram(self.mtu.current());
        }
        grew
    }

    /// An ACK frame was taken that gave this sample of the round-trip time.
    pub(crate) fn on_ack_end(&mut self, now: Instant, rtt: Option<Duration>) {
        let min_rtt = self.rtt.min();
        let Some(progress) = self.delivery.on_ack_end(min_rtt) else { return };
        self.congestion.on_delivered(&congestion::Delivered {
            now,
            acked: progress.acked,
            lost: progress.lost,
            delivered: progress.delivered,
            in_flight: self.in_flight,
            rtt,
            min_rtt,
            rate: progress.rate,
        });
    }

    /// A packet is lost that was no MTU probe. Returns whether datagrams have to be smaller now.
    pub(crate) fn on_packet_lost(&mut self, now: Instant, stamp: &Stamp) -> bool {
        self.on_packet_gone(stamp);
        let lost = self.delivery.on_lost(stamp);
        self.congestion.on_lost(&congestion::Lost {
            now,
            sent: stamp.at,
            size: u64::from(stamp.size),
            lost,
            in_flight: stamp.in_flight(),
        });
        let shrank = self.mtu.on_lost(stamp.at, stamp.size);
        if shrank {
            self.congestion.set_datagram(self.mtu.current());
        }
        shrank
    }

    /// So many packets were lost at once, the latest of which left at `sent`.
    pub(crate) fn on_losses(&mut self, now: Instant, sent: Instant, count: usize) {
        if Reduction::note(&mut self.reduction, now, sent, Some(count)) {
            self.reordering.on_reduction();
        }
        self.congestion.on_congestion(now, sent);
    }

    /// Packets were marked on their way, the latest of which left at `sent`.
    pub(crate) fn on_marks(&mut self, now: Instant, sent: Instant) {
        Reduction::note(&mut self.reduction, now, sent, None);
        self.congestion.on_congestion(now, sent);
    }

    /// Nothing got through for long.
    pub(crate) fn on_persistent_congestion(&mut self) {
        self.reduction = None;
        // What was in flight before says nothing about the window that begins.
        self.usage = Usage::default();
        self.congestion.on_persistent_congestion();
    }

    /// A packet of `size` octets that left at `sent` and counted as lost was acknowledged, when one
    /// so many packets after it had been. Returns whether the window is as it was before it did.
    pub(crate) fn on_packet_late(
        &mut self,
        now: Instant,
        sent: Instant,
        size: u16,
        overtaken_by: u64,
    ) -> bool {
        self.reordering.on_late(&self.rtt, now.saturating_duration_since(sent), overtaken_by);
        self.mtu.on_survived(sent, size);
        let undo = self.reduction.as_mut().is_some_and(|reduction| reduction.on_late(sent));
        if undo {
            self.reduction = None;
            self.congestion.on_spurious_congestion();
        }
        undo
    }

    /// MTU probe `number` is lost, which says nothing about congestion.
    pub(crate) fn on_mtu_probe_lost(&mut self, number: u64, stamp: &Stamp) {
        self.on_packet_gone(stamp);
        self.mtu.on_probe_lost(number);
    }

    /// A packet is not in flight any more.
    pub(crate) fn on_packet_gone(&mut self, stamp: &Stamp) {
        self.in_flight = self.in_flight.saturating_sub(u64::from(stamp.size));
    }

    // ECN.

    /// The mark of the next datagram.
    pub(crate) const fn mark(&self) -> Option<Ecn> {
        match self.ecn {
            EcnState::Testing(1..) | EcnState::Capable => Some(Ecn::Ect0),
            EcnState::Testing(0) | EcnState::Failed => None,
        }
    }

    pub(crate) const fn on_marked(&mut self) {
        if let EcnState::Testing(left @ 1..) = &mut self.ecn {
            *left -= 1;
        }
    }

    /// Holds the counts of an ACK frame that acknowledges `marked` new packets with a mark against
    /// those `before`. Returns whether congestion was reported.
    pub(crate) fn on_ecn(
        &mut self,
        marked: u64,
        counts: Option<EcnCounts>,
        before: EcnCounts,
    ) -> bool {
        if self.ecn == EcnState::Failed {
            return false;
        }
        let Some(counts) = counts else {
            if marked > 0 {
                self.ecn = EcnState::Failed;
            }
            return false;
        };
        let increase = |now: u64, before: u64| now.checked_sub(before);
        let (Some(ect0), Some(ect1), Some(ce)) = (
            increase(counts.ect0, before.ect0),
            increase(counts.ect1, before.ect1),
            increase(counts.ce, before.ce),
        ) else {
            self.ecn = EcnState::Failed;
            return false;
        };
        // We never send ECT(1); a network that turns our marks into it is broken.
        if ect0.saturating_add(ce) < marked || ect1 > 0 {
            self.ecn = EcnState::Failed;
            return false;
        }
        if marked > 0 {
            self.ecn = EcnState::Capable;
        }
        ce > 0
    }
}

/// What new paths start from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PathDefaults {
    pub(crate) initial_rtt: Duration,
    pub(crate) congestion: Algorithm,
    pub(crate) mtu_ceiling: u16,
    pub(crate) ecn: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path() -> Path {
        let defaults = PathDefaults {
            initial_rtt: Duration::from_millis(100),
            congestion: Algorithm::NewReno,
            mtu_ceiling: 1452,
            ecn: true,
        };
        Path::new(PathId(0), "192.0.2.1:1".parse().unwrap(), None, 0, &defaults)
    }

    #[test]
    fn req_e01_three_octets_may_leave_for_each_one_that_came() {
        let mut path = path();
        assert_eq!(path.allowance(), 0);
        path.on_datagram_received(1200);
        path.on_datagram_sent(3000);
        assert_eq!(path.allowance(), 600);
        path.on_datagram_sent(601);
        assert_eq!(path.allowance(), 0);
        path.set_validated();
        assert_eq!(path.allowance(), usize::MAX);
    }

    #[test]
    fn req_i04_only_matching_data_validates_and_small_datagrams_only_the_address() {
        let now = Instant::now();
        let mut path = path();
        path.start_validation(now, Duration::from_secs(1));
        assert!(path.challenge_is_due());
        path.on_challenge_sent(now, [1; 8], false);
        assert_eq!(path.on_response([2; 8]), Answer::Unknown);
        assert!(!path.is_validated());
        assert_eq!(path.on_response([1; 8]), Answer::AddressOnly);
        assert!(path.is_validated() && path.challenge_is_due());
        path.on_challenge_sent(now, [3; 8], true);
        assert_eq!(path.on_response([3; 8]), Answer::Validated);
        assert!(!path.is_validating());
    }

    #[test]
    fn req_i04_validation_fails_after_three_probe_timeouts() {
        let now = Instant::now();
        let mut path = path();
        path.start_validation(now, Duration::from_secs(1));
        path.on_challenge_sent(now, [1; 8], true);
        assert!(!path.handle_deadline(now + Duration::from_secs(2)));
        assert!(path.challenge_is_due(), "repeated meanwhile");
        assert!(path.handle_deadline(now + Duration::from_secs(3)));
        assert_eq!(path.on_response([1; 8]), Answer::Unknown);
    }

    #[test]
    fn req_k11_wrong_counts_end_the_use_of_ecn() {
        let before = EcnCounts { ect0: 5, ect1: 0, ce: 1 };
        for (marked, counts, state, congestion) in [
            (2, Some(EcnCounts { ect0: 7, ..before }), EcnState::Capable, false),
            (2, Some(EcnCounts { ect0: 6, ce: 2, ..before }), EcnState::Capable, true),
            (2, Some(EcnCounts { ect0: 6, ..before }), EcnState::Failed, false),
            (1, None, EcnState::Failed, false),
            (0, None, EcnState::Testing(ECN_TRIALS), false),
            (0, Some(EcnCounts { ect0: 4, ..before }), EcnState::Failed, false),
            (1, Some(EcnCounts { ect0: 6, ect1: 1, ..before }), EcnState::Failed, false),
        ] {
            let mut path = path();
            assert_eq!(path.on_ecn(marked, counts, before), congestion);
            assert_eq!(path.ecn, state);
        }
    }

    #[test]
    fn req_k11_ten_packets_are_marked_before_an_answer_is_awaited() {
        let mut path = path();
        for _ in 0..ECN_TRIALS {
            assert_eq!(path.mark(), Some(Ecn::Ect0));
            path.on_marked();
        }
        assert_eq!(path.mark(), None);
    }
}
