//! Finds how large datagrams a path carries (DPLPMTUD, RFC 8899 with RFC 9000, section 14.3), and
//! falls back when it carries less than it did.

use std::time::{Duration, Instant};

use super::parameters::MIN_UDP_PAYLOAD;

/// Lost probes of one size before that size counts as too large.
///
/// <https://www.rfc-editor.org/rfc/rfc8899.html#section-5.1.2>
const MAX_PROBES: u8 = 3;
/// <https://www.rfc-editor.org/rfc/rfc8899.html#section-5.1.1>
const RAISE_AFTER: Duration = Duration::from_secs(600);
/// The search ends when it knows the size this well.
const PRECISION: u16 = 20;
/// Losses of full-size datagrams in a row, none acknowledged between, that mean a black hole.
const BLACK_HOLE_LOSSES: u8 = 6;

/// The state of one path.
#[derive(Clone, Debug)]
pub(crate) struct Mtu {
    /// What the path is known to carry.
    current: u16,
    /// What it may carry at most, as far as anybody said.
    ceiling: u16,
    /// The smallest size known not to pass, or the ceiling and one.
    too_large: u16,
    probe: Option<Probe>,
    /// Lost probes of the size in question.
    failures: u8,
    next_search: Option<Instant>,
    losses: u8,
}

#[derive(Clone, Copy, Debug)]
struct Probe {
    number: u64,
    size: u16,
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
            probe: None,
            failures: 0,
            next_search: None,
            losses: 0,
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
    }

    /// The size of a probe to send now.
    pub(crate) fn poll_probe(&mut self, now: Instant) -> Option<u16> {
        if self.probe.is_some() || self.next_search.is_some() {
            return None;
        }
        let gap = self.too_large.saturating_sub(self.current);
        if gap <= 1 || (gap <= PRECISION && self.too_large <= self.ceiling) {
            if self.ceiling > self.current {
                self.next_search = Some(now + RAISE_AFTER);
            }
            return None;
        }
        // Most paths carry the ceiling; try that first, then halve.
        let untried = self.too_large > self.ceiling;
        Some(if untried { self.ceiling } else { self.current + gap / 2 })
    }

    /// When to search again.
    pub(crate) const fn deadline(&self) -> Option<Instant> {
        self.next_search
    }

    /// Begins to search again, when that is due.
    pub(crate) fn handle_deadline(&mut self, now: Instant) {
        if self.next_search.is_some_and(|at| at <= now) {
            self.next_search = None;
            self.too_large = self.ceiling.saturating_add(1);
        }
    }

    pub(crate) fn on_probe_sent(&mut self, number: u64, size: u16) {
        self.probe = Some(Probe { number, size });
    }

    /// Packet `number`, of `size` octets, was acknowledged. Returns whether the size grew.
    pub(crate) fn on_acked(&mut self, number: u64, size: u16) -> bool {
        if size >= self.current {
            self.losses = 0;
        }
        match self.probe {
            Some(probe) if probe.number == number => {
                self.probe = None;
                self.failures = 0;
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

    /// A packet of `size` octets that was no probe is lost. Returns whether the path fell back to
    /// the base size, because only large datagrams vanish.
    pub(crate) fn on_lost(&mut self, now: Instant, size: u16) -> bool {
        if size <= MIN_UDP_PAYLOAD {
            return false;
        }
        self.losses += 1;
        if self.losses < BLACK_HOLE_LOSSES {
            return false;
        }
        self.losses = 0;
        self.too_large = self.current;
        self.current = MIN_UDP_PAYLOAD;
        self.probe = None;
        self.failures = 0;
        self.next_search = Some(now + RAISE_AFTER);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Searches a path that carries `limit` octets.
    fn search(mtu: &mut Mtu, now: Instant, limit: u16) -> u32 {
        let mut number = 0;
        while let Some(size) = mtu.poll_probe(now) {
            mtu.on_probe_sent(number, size);
            assert_eq!(mtu.poll_probe(now), None, "one probe at a time");
            if size <= limit {
                assert!(mtu.on_acked(number, size));
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

    #[test]
    fn req_l03_a_black_hole_falls_back_to_the_base() {
        let now = Instant::now();
        let mut mtu = Mtu::new(1452);
        search(&mut mtu, now, 9000);
        for _ in 1..BLACK_HOLE_LOSSES {
            assert!(!mtu.on_lost(now, 1452));
        }
        mtu.on_acked(999, 1452);
        for _ in 1..BLACK_HOLE_LOSSES {
            assert!(!mtu.on_lost(now, 1452));
        }
        assert!(mtu.on_lost(now, 1452));
        assert_eq!(mtu.current(), 1200);
        assert_eq!(mtu.poll_probe(now), None);
    }

    #[test]
    fn req_l05_the_search_resumes_after_ten_minutes() {
        let now = Instant::now();
        let mut mtu = Mtu::new(1452);
        search(&mut mtu, now, 1300);
        assert_eq!(mtu.deadline(), Some(now + RAISE_AFTER));
        let later = now + RAISE_AFTER;
        mtu.handle_deadline(later.checked_sub(Duration::from_nanos(1)).unwrap());
        assert_eq!(mtu.poll_probe(later), None);
        mtu.handle_deadline(later);
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
            assert!(!mtu.on_lost(now, 1200));
        }
        assert_eq!((mtu.current(), mtu.poll_probe(now)), (1200, None));
    }
}
