//! Spreads a congestion window over a round trip, so that no burst exceeds what a path's first
//! queue can be expected to hold.
//!
//! <https://www.rfc-editor.org/rfc/rfc9002.html#section-7.7>

use std::time::{Duration, Instant};

/// Datagrams that may leave back to back.
const BURST_DATAGRAMS: u64 = 10;
/// The time a burst may stand for, so that fast paths wake rarely enough for segmentation offload.
const BURST_TIME: Duration = Duration::from_millis(1);

/// A bucket of octets that fills at a [`Pace`].
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pacer {
    tokens: u64,
    filled: Option<Instant>,
}

/// How fast, and in pieces of what size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    /// Octets per second.
    pub(crate) rate: u64,
    pub(crate) datagram: u16,
}

/// The rate, in octets per second, that spreads a congestion window over a round trip: 1.25 windows
/// in each, and two in slow start, so that the window is what limits.
pub(crate) fn window_rate(window: u64, rtt: Duration, slow_start: bool) -> u64 {
    let gain = if slow_start { 200 } else { 125 };
    let rtt = u64::try_from(rtt.as_nanos()).unwrap_or(u64::MAX).max(1);
    let scaled = u128::from(window) * gain * 10_000_000 / u128::from(rtt);
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

impl Pace {
    fn burst(&self) -> u64 {
        let timed = u128::from(self.rate) * BURST_TIME.as_micros() / 1_000_000;
        u64::try_from(timed).unwrap_or(u64::MAX).max(BURST_DATAGRAMS * u64::from(self.datagram))
    }
}

impl Pacer {
    /// When a full datagram may leave; `None` for now.
    pub(crate) fn delay(&mut self, now: Instant, pace: &Pace) -> Option<Instant> {
        let burst = pace.burst();
        match self.filled {
            None => self.tokens = burst,
            Some(filled) => {
                let elapsed = now.saturating_duration_since(filled).as_nanos();
                let earned = elapsed.saturating_mul(u128::from(pace.rate)) / 1_000_000_000;
                let earned = u64::try_from(earned).unwrap_or(u64::MAX);
                if earned == 0 && self.tokens < u64::from(pace.datagram) {
                    return Some(self.due(now, pace));
                }
                self.tokens = self.tokens.saturating_add(earned).min(burst);
            }
        }
        self.filled = Some(now);
        if self.tokens >= u64::from(pace.datagram) { None } else { Some(self.due(now, pace)) }
    }

    fn due(&self, now: Instant, pace: &Pace) -> Instant {
        // Waiting for some datagrams at once saves wake-ups.
        let wanted = (2 * u64::from(pace.datagram)).min(pace.burst()) - self.tokens;
        let nanos = u128::from(wanted) * 1_000_000_000 / u128::from(pace.rate.max(1));
        let wait = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        now + wait.clamp(Duration::from_micros(1), Duration::from_secs(10))
    }

    pub(crate) fn on_sent(&mut self, octets: u64) {
        self.tokens = self.tokens.saturating_sub(octets);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn req_k05_a_window_leaves_over_four_fifths_of_a_round_trip_after_the_first_burst() {
        let rate = window_rate(120_000, Duration::from_millis(100), false);
        let pace = Pace { rate, datagram: 1200 };
        let start = Instant::now();
        let (mut now, mut pacer, mut sent) = (start, Pacer::default(), 0u64);
        while sent < 120_000 {
            match pacer.delay(now, &pace) {
                None => {
                    pacer.on_sent(1200);
                    sent += 1200;
                }
                Some(at) => {
                    assert!(at > now);
                    now = at;
                }
            }
        }
        let took = now - start;
        assert!(took > Duration::from_millis(65) && took < Duration::from_millis(81), "{took:?}");
    }
}
