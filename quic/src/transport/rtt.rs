//! Round-trip times and what follows from them.
//!
//! <https://www.rfc-editor.org/rfc/rfc9002.html#section-5>

use std::time::Duration;

/// <https://www.rfc-editor.org/rfc/rfc9002.html#section-6.2.2>
pub(crate) const INITIAL_RTT: Duration = Duration::from_millis(333);
/// The granularity of timers.
///
/// <https://www.rfc-editor.org/rfc/rfc9002.html#section-6.1.2>
pub(crate) const GRANULARITY: Duration = Duration::from_millis(1);

/// The estimate of one path.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rtt {
    latest: Duration,
    smoothed: Duration,
    variation: Duration,
    min: Option<Duration>,
}

impl Rtt {
    pub(crate) fn new(initial: Duration) -> Self {
        Self { latest: initial, smoothed: initial, variation: initial / 2, min: None }
    }

    /// Takes a sample. `ack_delay` is what the peer says it waited, already capped where that is
    /// due.
    pub(crate) fn sample(&mut self, latest: Duration, ack_delay: Duration) {
        self.latest = latest;
        let Some(min) = self.min else {
            self.min = Some(latest);
            self.smoothed = latest;
            self.variation = latest / 2;
            return;
        };
        // "min_rtt ignores the acknowledgment delay", section 5.2.
        let min = min.min(latest);
        self.min = Some(min);
        let adjusted = if latest >= min + ack_delay { latest - ack_delay } else { latest };
        self.variation = (self.variation * 3 + self.smoothed.abs_diff(adjusted)) / 4;
        self.smoothed = (self.smoothed * 7 + adjusted) / 8;
    }

    /// Whether a sample was ever taken.
    pub(crate) const fn is_measured(&self) -> bool {
        self.min.is_some()
    }

    pub(crate) const fn smoothed(&self) -> Duration {
        self.smoothed
    }

    pub(crate) const fn latest(&self) -> Duration {
        self.latest
    }

    pub(crate) const fn variation(&self) -> Duration {
        self.variation
    }

    pub(crate) fn min(&self) -> Duration {
        self.min.unwrap_or(self.latest)
    }

    /// The larger of the smoothed and the latest value.
    pub(crate) fn conservative(&self) -> Duration {
        self.smoothed.max(self.latest)
    }

    /// The probe timeout without the peer's delay or backoff.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9002.html#section-6.2.1>
    pub(crate) fn pto(&self) -> Duration {
        self.smoothed + (self.variation * 4).max(GRANULARITY)
    }

    /// How much later than it left a packet counts as lost, so many eighths of a round trip late.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9002.html#section-6.1.2>
    pub(crate) fn loss_delay(&self, eighths: u32) -> Duration {
        (self.conservative() * (8 + eighths) / 8).max(GRANULARITY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn req_j01_samples_follow_the_published_formulas() {
        let mut rtt = Rtt::new(INITIAL_RTT);
        rtt.sample(ms(100), ms(30));
        assert_eq!((rtt.smoothed(), rtt.min(), rtt.pto()), (ms(100), ms(100), ms(300)));
        // 140 less 20 is above the minimum: adjusted 120.
        rtt.sample(ms(140), ms(20));
        assert_eq!(rtt.smoothed(), Duration::from_micros(102_500));
        assert_eq!(rtt.variation, Duration::from_micros(42_500));
        // 110 less 20 would be below the minimum: not adjusted.
        let before = rtt.smoothed();
        rtt.sample(ms(110), ms(20));
        assert_eq!(rtt.smoothed(), (before * 7 + ms(110)) / 8);
        assert_eq!(rtt.min(), ms(100));
    }

    #[test]
    fn req_j04_without_a_sample_the_probe_timeout_is_999_ms() {
        assert_eq!(Rtt::new(INITIAL_RTT).pto(), ms(999));
    }

    #[test]
    fn req_j02_losses_are_declared_after_nine_eighths_of_the_rtt() {
        let mut rtt = Rtt::new(INITIAL_RTT);
        rtt.sample(ms(80), ms(0));
        assert_eq!(rtt.loss_delay(1), ms(90));
        let mut tiny = Rtt::new(INITIAL_RTT);
        tiny.sample(Duration::from_micros(10), ms(0));
        assert_eq!(tiny.loss_delay(1), GRANULARITY);
    }
}
