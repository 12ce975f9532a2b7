//! Finds how large datagrams a path carries (DPLPMTUD, RFC 8899 with RFC 9000, section 14.3), and
//! falls back when it carries less than it did.

use std::time::{Duration, Instant};

use super::parameters::MIN_UDP_PAYLOAD;

/// Lost probes of one size before that size counts as too large.
///
/// <https://www.rfc-editor.org/rfc/rfc8899.html#section-5.1.2>
const MAX_PROBES: u8 = 3;
/// A path that says nothing is searched again after this.
///
/// <https://www.rfc-editor.org/rfc/rfc8899.html#section-5.1.1>
const RAISE_AFTER: Duration = Duration::from_secs(600);
/// One that is in use is searched again sooner, as probes may have been lost for other reasons, and
/// less and less often while it carries no more.
const RAISE_SOON: Duration = Duration::from_secs(5);
/// The search ends when it knows the size this well.
const PRECISION: u16 = 12;
/// Losses of large datagrams that none of their size survived, which mean a black hole.
const BLACK_HOLE_LOSSES: usize = 6;

/// The state of one path.
#[derive(Clone, Debug)]
pub(crate) struct Mtu {
    /// What the path is known to carry.
    current: u16,
    /// What it may carry at most, as far as anybody said.
    ceiling: u16,
    /// The smallest size known not to pass, or the ceiling and one.
    too_large: u16,
    /// What passed before the path fell back, which it most likely does again.
    before: u16,
    probe: Option<Probe>,
    /// Lost probes of the size in question.
    failures: u8,
    /// When the last search ended, if it may find more the next time.
    rests_since: Option<Instant>,
    /// How long it rests while there is traffic.
    rest: Duration,
    /// Lost datagrams that nothing of their size survived.
    lost: [Option<Sent>; BLACK_HOLE_LOSSES],
    /// The last that survived of those of full size, and of the large ones.
    survivors: [Option<Sent>; 2],
}

#[derive(Clone, Copy, Debug)]
struct Probe {
    number: u64,
    size: u16,
}

/// A datagram larger than every path carries.
#[derive(Clone, Copy, Debug)]
struct Sent {
    at: Instant,
    size: u16,
}

impl Sent {
    /// Whether its arrival shows that `other` was not lost for its size.
    fn acquits(self, other: Self) -> bool {
        self.at >= other.at && self.size >= other.size
    }
}

impl Mtu {
    /// Starts at the size every path carries. `ceiling` is the most to try; at the base or below
    /// it, nothing is searched.
    pub(crate) fn new(ceiling: u16) -> Self {
        let ceiling = ceiling.max(MIN_UDP_PAYLOAD);
        Self {
            current: MIN_UDP_PAYLOAD,
            ceiling,
            too_large: ceiling.saturating_add(1),
            before: MIN_UDP_PAYLOAD,
            probe: None,
            failures: 0,
            rests_since: None,
            rest: RAISE_SOON,
            lost: [None; BLACK_HOLE_LOSSES],
            survivors: [None; 2],
        }
    }

    /// Octets a datagram may have.
    pub(crate) const fn current(&self) -> u16 {
        self.current
    }

    /// Lowers the ceiling to what the peer accepts.
    pub(crate) fn limit(&mut self, max_udp_payload_size: u64) {
        let limit = u16::try_from(max_udp_payload_size).unwrap_or(u16::MAX);
        self.ceiling = self.ceiling.min(limit.max(MIN_UDP_PAYLOAD));
        self.too_large = self.too_large.min(self.ceiling.saturating_add(1));
        self.current = self.current.min(self.ceiling);
        self.before = self.before.min(self.ceiling);
    }

    /// The size of a probe to send now; `in_use` says whether there is traffic that it would join.
    pub(crate) fn poll_probe(&mut self, now: Instant, in_use: bool) -> Option<u16> {
        if in_use && self.rests_since.is_some_and(|since| since + self.rest <= now) {
            self.rest = (self.rest * 5 / 4).min(RAISE_AFTER);
            self.search();
        }
        if self.probe.is_some() || self.rests_since.is_some() {
            return None;
        }
        let gap = self.too_large.saturating_sub(self.current);
        if gap <= 1 || (gap <= PRECISION && self.too_large <= self.ceiling) {
            if self.ceiling > self.current {
                self.rests_since = Some(now);
            }
            return None;
        }
        if (self.current + 1..self.too_large).contains(&self.before) {
            return Some(self.before);
        }
        // Most paths carry the ceiling; try that first, then halve.
        let untried = self.too_large > self.ceiling;
        Some(if untried { self.ceiling } else { self.current + gap / 2 })
    }

    /// When to search again although there is no traffic.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.rests_since.map(|since| since + RAISE_AFTER)
    }

    /// Begins to search again, when that is due.
    pub(crate) fn handle_deadline(&mut self, now: Instant) {
        if self.deadline().is_some_and(|at| at <= now) {
            self.search();
        }
    }

    const fn search(&mut self) {
        self.rests_since = None;
        self.too_large = self.ceiling.saturating_add(1);
        self.failures = 0;
    }

    pub(crate) fn on_probe_sent(&mut self, number: u64, size: u16) {
        self.probe = Some(Probe { number, size });
    }

    /// A packet of `size` octets that left at `at` has arrived: those before it that were no larger
    /// were not lost for their size. To be told before the losses that show at the same time.
    pub(crate) fn on_survived(&mut self, at: Instant, size: u16) {
        if size <= MIN_UDP_PAYLOAD {
            return;
        }
        let survivor = Sent { at, size };
        let [full, any] = &mut self.survivors;
        if size >= self.current && full.is_none_or(|full| at >= full.at) {
            *full = Some(survivor);
        }
        if any.is_none_or(|any| at >= any.at) {
            *any = Some(survivor);
        }
        for lost in &mut self.lost {
            *lost = lost.filter(|&lost| !survivor.acquits(lost));
        }
    }

    /// Packet `number` was acknowledged. Returns whether the size grew.
    pub(crate) fn on_acked(&mut self, number: u64) -> bool {
        match self.probe {
            Some(probe) if probe.number == number => {
                self.probe = None;
                self.failures = 0;
                self.rest = RAISE_SOON;
                self.current = probe.size.max(self.current);
                true
            }
            _ => false,
        }
    }

    /// Packet `number` is lost, if it was the probe: that says nothing about congestion.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-14.4>
    pub(crate) fn on_probe_lost(&mut self, number: u64) -> bool {
        let Some(probe) = self.probe.filter(|probe| probe.number == number) else { return false };
        self.probe = None;
        self.failures += 1;
        if self.failures >= MAX_PROBES {
            self.failures = 0;
            self.too_large = probe.size;
        }
        true
    }

    /// A packet of `size` octets that left at `at` and was no probe is lost. Returns whether the path fell back to
    /// the base size, because only large datagrams vanish. As everything vanishes in an outage too, what
    /// passed before is searched for at once.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc8899.html#section-4.3>
    pub(crate) fn on_lost(&mut self, at: Instant, size: u16) -> bool {
        let lost = Sent { at, size };
        if size <= MIN_UDP_PAYLOAD
            || self.current <= MIN_UDP_PAYLOAD
            || self.survivors.iter().flatten().any(|survivor| survivor.acquits(lost))
        {
            return false;
        }
        let Some(free) = self.lost.iter_mut().find(|lost| lost.is_none()) else { return false };
        *free = Some(lost);
        if self.lost.iter().any(Option::is_none) {
            return false;
        }
        self.lost = [None; BLACK_HOLE_LOSSES];
        self.before = self.current;
        self.current = MIN_UDP_PAYLOAD;
        self.probe = None;
        self.rest = RAISE_SOON;
        self.search();
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Searches a path that carries `limit` octets.
    fn search(mtu: &mut Mtu, now: Instant, limit: u16) -> u32 {
        let mut number = 0;
        while let Some(size) = mtu.poll_probe(now, true) {
            mtu.on_probe_sent(number, size);
            assert_eq!(mtu.poll_probe(now, true), None, "one probe at a time");
            if size <= limit {
                mtu.on_survived(now, size);
                assert!(mtu.on_acked(number));
            } else {
                assert!(mtu.on_probe_lost(number));
            }
            number += 1;
            assert!(number < 60);
        }
        u32::try_from(number).unwrap()
    }

    #[test]
    fn req_l01_the_search_finds_what_the_path_carries() {
        let now = Instant::now();
        for limit in [1200, 1280, 1350, 1452, 1500, 9000] {
            let mut mtu = Mtu::new(1452);
            assert_eq!(mtu.current(), 1200);
            search(&mut mtu, now, limit);
            assert!(mtu.current() <= limit && mtu.current() + PRECISION >= limit.min(1452));
        }
    }

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn req_l03_a_black_hole_falls_back_to_the_base() {
        let now = Instant::now();
        let mut mtu = Mtu::new(1452);
        search(&mut mtu, now, 9000);
        let late = now + MS;
        for _ in 1..BLACK_HOLE_LOSSES {
            assert!(!mtu.on_lost(late, 1452));
        }
        // What left before them, or is smaller, says nothing of them.
        mtu.on_survived(now, 1452);
        mtu.on_survived(late + MS, 1451);
        assert!(mtu.on_lost(late, 1452));
        assert_eq!(mtu.current(), 1200);
        // As everything is lost in an outage, what passed before is tried first; then it is halved.
        assert_eq!(mtu.poll_probe(now, true), Some(1452));
        search(&mut mtu, now, 1300);
        assert!((1300 - PRECISION..=1300).contains(&mtu.current()), "{}", mtu.current());
    }

    #[test]
    fn req_l03_losses_that_something_of_their_size_survived_are_no_black_hole() {
        let now = Instant::now();
        let mut mtu = Mtu::new(1452);
        search(&mut mtu, now, 9000);
        // A burst that the same acknowledgment shows to be one.
        mtu.on_survived(now + 2 * MS, 1452);
        for _ in 0..100 {
            assert!(!mtu.on_lost(now + MS, 1452));
        }
        // One that is known to be one a little later, and smaller datagrams of a sender that has no more to say.
        for size in [1452, 1400] {
            for burst in 1..20 {
                let at = now + 10 * burst * MS;
                for _ in 1..BLACK_HOLE_LOSSES {
                    assert!(!mtu.on_lost(at, size));
                }
                mtu.on_survived(at + MS, size);
            }
        }
        assert_eq!(mtu.current(), 1452);
        // Losses of before the fall do not make it fall again once it has found more.
        let at = now + 1000 * MS;
        let fell = (0..BLACK_HOLE_LOSSES).map(|_| mtu.on_lost(at, 1452));
        assert_eq!(fell.filter(|fell| *fell).count(), 1);
        search(&mut mtu, at + MS, 9000);
        for _ in 0..100 {
            assert!(!mtu.on_lost(at, 1452));
        }
        assert_eq!(mtu.current(), 1452);
    }

    #[test]
    fn req_l05_the_search_resumes_soon_where_there_is_traffic_and_less_and_less_often() {
        let mut now = Instant::now();
        let mut mtu = Mtu::new(1452);
        let mut rest = RAISE_SOON;
        for _ in 0..30 {
            search(&mut mtu, now, 1300);
            assert!((1300 - PRECISION..=1300).contains(&mtu.current()));
            now += rest.checked_sub(MS).unwrap();
            assert_eq!(mtu.poll_probe(now, true), None);
            now += MS;
            assert_eq!(mtu.poll_probe(now, false), None);
            assert_eq!(mtu.poll_probe(now, true), Some(1452));
            rest = (rest * 5 / 4).min(RAISE_AFTER);
        }
        assert_eq!(rest, RAISE_AFTER);
        search(&mut mtu, now, 9000);
        assert_eq!((mtu.current(), mtu.deadline()), (1452, None));
    }

    #[test]
    fn req_l05_the_search_resumes_after_ten_minutes_without_traffic() {
        let now = Instant::now();
        let mut mtu = Mtu::new(1452);
        search(&mut mtu, now, 1300);
        assert_eq!(mtu.deadline(), Some(now + RAISE_AFTER));
        let later = now + RAISE_AFTER;
        mtu.handle_deadline(later.checked_sub(Duration::from_nanos(1)).unwrap());
        assert!(mtu.deadline().is_some());
        mtu.handle_deadline(later);
        assert_eq!(mtu.deadline(), None);
        search(&mut mtu, later, 9000);
        assert_eq!(mtu.current(), 1452);
    }

    #[test]
    fn req_l06_the_peer_limits_the_size() {
        let mut mtu = Mtu::new(9000);
        mtu.limit(1250);
        search(&mut mtu, Instant::now(), 9000);
        assert_eq!(mtu.current(), 1250);
    }

    #[test]
    fn req_a09_nothing_below_the_base_is_ever_used() {
        let now = Instant::now();
        let mut mtu = Mtu::new(500);
        mtu.limit(0);
        assert_eq!(mtu.current(), 1200);
        for _ in 0..100 {
            assert!(!mtu.on_lost(now, 1452));
        }
        assert_eq!((mtu.current(), mtu.poll_probe(now, true)), (1200, None));
    }
}
