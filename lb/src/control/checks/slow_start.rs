//! The slow start of a backend that gets new connections again, pure: its share of them grows in steps, so that caches
//! are warm and connections are pooled before it has all of it.

use std::time::{Duration, Instant};

use crate::wanted::STEPS;

/// A slow start that has not come to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlowStart {
    since: Instant,
    step: u32,
}

impl SlowStart {
    /// The beginning of one.
    #[must_use]
    pub(crate) const fn begin(now: Instant) -> Self {
        Self { since: now, step: 1 }
    }

    /// What becomes of it by `now` where it takes the `whole` time; `None` when it is over.
    #[must_use]
    pub(crate) fn on_time(self, now: Instant, whole: Duration) -> Option<Self> {
        let passed = now.saturating_duration_since(self.since);
        // Both fit: the longest is an hour.
        let steps = passed.as_millis() * u128::from(STEPS.get() - 1);
        let steps = steps.checked_div(whole.as_millis()).and_then(|n| u32::try_from(n).ok())?;
        let step = steps.saturating_add(1);
        (step < STEPS.get()).then_some(Self { step, ..self })
    }

    /// So many of [`STEPS`] are its share.
    #[must_use]
    pub(crate) const fn step(self) -> u32 {
        self.step
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_grows_in_steps_alike_until_it_is_whole() {
        let start = Instant::now();
        let begun = SlowStart::begin(start);
        assert_eq!(begun.step(), 1);
        let step = |ms, whole| {
            let now = start + Duration::from_millis(ms);
            begun.on_time(now, Duration::from_millis(whole)).map(SlowStart::step)
        };
        for (ms, expected) in [
            (0, Some(1)),
            (999, Some(1)),
            (1000, Some(2)),
            (7999, Some(8)),
            (8000, Some(9)),
            (8999, Some(9)),
            (9000, None),
            (u64::from(u32::MAX), None),
        ] {
            assert_eq!(step(ms, 9000), expected, "{ms}");
        }
        assert_eq!(step(0, 0), None);
    }
}
