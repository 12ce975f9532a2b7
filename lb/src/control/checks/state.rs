//! The active checks of one backend, pure: results go in, with the time; whether it gets new connections
//! comes out.
//!
//! ```text
//!             the first result decides
//!   Unknown ──────────────┬───────────────► Up
//!                         │                 │ ▲
//!                         ▼  failed × fall  │ │ passed × rise, and from the second fall
//!                        Down ◄─────────────┘ │ on not before its time
//!                         └───────────────────┘
//! ```
//!
//! The time that a fall lasts at least doubles with each that comes soon after the last one, as where no
//! checks are ([`health`](super::super::health)): a backend that toggles does not take the fleet along.
//! The first fall ends as soon as checks pass.

use std::{num::NonZeroU32, time::Instant};

use serde::{Deserialize, Serialize};

use super::super::health::{PROBATION, hold};
use crate::check::CheckResult;

/// How many results in a row it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Thresholds {
    /// So many passed checks end a fall.
    pub(crate) rise: NonZeroU32,
    /// So many failed ones begin it.
    pub(crate) fall: NonZeroU32,
}

/// What the checks of a backend have shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Checked<T = Instant> {
    /// Nothing yet.
    Unknown {
        /// Whether it gets new connections until then. Those of a process that begins do: somebody has to.
        /// One that joins others waits for its first answer.
        trusted: bool,
    },
    /// It answers.
    Up {
        /// How often it has fallen without recovering.
        falls: u32,
        /// Since when.
        since: T,
        /// Failed checks in a row.
        failed: u32,
    },
    /// It does not.
    Down {
        /// How often it has fallen without recovering.
        falls: u32,
        /// Before this, only the first fall ends.
        until: T,
        /// Passed checks in a row.
        passed: u32,
    },
}

impl<T> Checked<T> {
    /// The same, with its moments on another clock.
    pub(crate) fn map<U>(self, clock: impl Fn(T) -> U) -> Checked<U> {
        match self {
            Self::Unknown { trusted } => Checked::Unknown { trusted },
            Self::Up { falls, since, failed } => Checked::Up { falls, since: clock(since), failed },
            Self::Down { falls, until, passed } => {
                Checked::Down { falls, until: clock(until), passed }
            }
        }
    }
}

impl Checked {
    /// The state after a check has come to `result` at `now`.
    #[must_use]
    pub(crate) fn on_result(
        self,
        now: Instant,
        result: CheckResult,
        Thresholds { rise, fall }: Thresholds,
    ) -> Self {
        let passes = match result {
            CheckResult::Answered | CheckResult::Miswired => true,
            CheckResult::Timeout
            | CheckResult::Refused
            | CheckResult::Wrong
            | CheckResult::Closed
            | CheckResult::Certificate
            | CheckResult::Status => false,
            // Where nothing can be asked, nobody can be kept waiting for an answer.
            CheckResult::Unsent => {
                let waits = matches!(self, Self::Unknown { .. });
                return if waits { Self::Unknown { trusted: true } } else { self };
            }
        };
        match (self, passes) {
            (Self::Unknown { .. }, true) => Self::Up { falls: 0, since: now, failed: 0 },
            (Self::Unknown { .. }, false) => Self::down(now, 1),
            (Self::Up { falls, since, .. }, true) => {
                let recovered = now.saturating_duration_since(since) >= PROBATION;
                Self::Up { falls: if recovered { 0 } else { falls }, since, failed: 0 }
            }
            (Self::Up { falls, since, failed }, false) => {
                let failed = failed.saturating_add(1);
                if failed < fall.get() {
                    Self::Up { falls, since, failed }
                } else {
                    Self::down(now, falls.saturating_add(1))
                }
            }
            (Self::Down { falls, until, passed }, true) => {
                let passed = passed.saturating_add(1);
                if passed >= rise.get() && (falls == 1 || now >= until) {
                    Self::Up { falls, since: now, failed: 0 }
                } else {
                    Self::Down { falls, until, passed }
                }
            }
            (Self::Down { falls, until, .. }, false) => Self::Down { falls, until, passed: 0 },
        }
    }

    /// The state after its traffic has shown that it is down: from there on it has to pass checks.
    #[must_use]
    pub(crate) fn on_refused(self, now: Instant) -> Self {
        match self {
            Self::Unknown { .. } => Self::down(now, 1),
            Self::Up { falls, .. } => Self::down(now, falls.saturating_add(1)),
            Self::Down { falls, until, .. } => Self::Down { falls, until, passed: 0 },
        }
    }

    /// Whether it passes; `None` while nothing is known.
    #[must_use]
    pub(crate) const fn passes(self) -> Option<bool> {
        match self {
            Self::Unknown { .. } => None,
            Self::Up { .. } => Some(true),
            Self::Down { .. } => Some(false),
        }
    }

    /// Whether it gets no new connections.
    #[must_use]
    pub(crate) const fn is_down(self) -> bool {
        match self {
            Self::Unknown { trusted } => !trusted,
            Self::Up { .. } => false,
            Self::Down { .. } => true,
        }
    }

    fn down(now: Instant, falls: u32) -> Self {
        Self::Down { falls, until: now + hold(falls), passed: 0 }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use CheckResult::{
        Answered, Certificate, Closed, Miswired, Refused, Status, Timeout, Unsent, Wrong,
    };

    fn thresholds(rise: u32, fall: u32) -> Thresholds {
        Thresholds { rise: rise.try_into().unwrap(), fall: fall.try_into().unwrap() }
    }

    /// Every state × every result, on both sides of every threshold and deadline.
    #[test]
    fn every_state_meets_every_result() {
        let t0 = Instant::now();
        let at = |ms: u64| t0 + Duration::from_millis(ms);
        let unknown = |trusted| Checked::Unknown { trusted };
        let up = |falls, ms, failed| Checked::Up { falls, since: at(ms), failed };
        let down = |falls, ms, passed| Checked::Down { falls, until: at(ms), passed };
        let table = [
            // The first result decides, whether it was trusted or not.
            (unknown(true), 5, Answered, up(0, 5, 0)),
            (unknown(false), 5, Answered, up(0, 5, 0)),
            (unknown(false), 5, Miswired, up(0, 5, 0)),
            (unknown(true), 0, Timeout, down(1, 2_000, 0)),
            (unknown(false), 0, Timeout, down(1, 2_000, 0)),
            (unknown(true), 0, Refused, down(1, 2_000, 0)),
            (unknown(true), 0, Wrong, down(1, 2_000, 0)),
            (unknown(true), 0, Unsent, unknown(true)),
            (unknown(false), 0, Unsent, unknown(true)),
            // Up: three failures in a row are a fall, an answer in between clears them.
            (up(0, 0, 0), 100, Answered, up(0, 0, 0)),
            (up(0, 0, 0), 100, Timeout, up(0, 0, 1)),
            (up(0, 0, 1), 100, Refused, up(0, 0, 2)),
            (up(0, 0, 1), 100, Unsent, up(0, 0, 1)),
            (up(0, 0, 2), 100, Answered, up(0, 0, 0)),
            (up(0, 0, 2), 100, Unsent, up(0, 0, 2)),
            (up(0, 0, 2), 100, Timeout, down(1, 2_100, 0)),
            (up(0, 0, 2), 100, Refused, down(1, 2_100, 0)),
            (up(0, 0, 2), 100, Wrong, down(1, 2_100, 0)),
            (up(0, 0, 2), 100, Closed, down(1, 2_100, 0)),
            (up(0, 0, 2), 100, Certificate, down(1, 2_100, 0)),
            // Up after a fall: half a minute clears the past.
            (up(1, 0, 0), 29_999, Answered, up(1, 0, 0)),
            (up(1, 0, 0), 30_000, Answered, up(0, 0, 0)),
            (up(1, 0, 2), 29_999, Timeout, down(2, 33_999, 0)),
            (up(u32::MAX, 0, 2), 0, Timeout, down(u32::MAX, 30_000, 0)),
            // Down: two answers in a row end the first fall at once, later ones not before their time.
            (down(1, 2_000, 0), 1, Answered, down(1, 2_000, 1)),
            (down(1, 2_000, 1), 1, Answered, up(1, 1, 0)),
            (down(1, 2_000, 1), 1, Timeout, down(1, 2_000, 0)),
            (down(1, 2_000, 1), 1, Refused, down(1, 2_000, 0)),
            (down(1, 2_000, 1), 1, Wrong, down(1, 2_000, 0)),
            (down(1, 2_000, 1), 1, Closed, down(1, 2_000, 0)),
            (down(1, 2_000, 1), 1, Certificate, down(1, 2_000, 0)),
            (down(1, 2_000, 1), 1, Status, down(1, 2_000, 0)),
            (down(1, 2_000, 1), 1, Unsent, down(1, 2_000, 1)),
            (down(2, 4_000, 1), 3_999, Answered, down(2, 4_000, 2)),
            (down(2, 4_000, 2), 3_999, Answered, down(2, 4_000, 3)),
            (down(2, 4_000, 3), 4_000, Answered, up(2, 4_000, 0)),
            (down(2, 4_000, 3), 4_000, Timeout, down(2, 4_000, 0)),
        ];
        for (before, ms, result, after) in table {
            let got = before.on_result(at(ms), result, thresholds(2, 3));
            assert_eq!(got, after, "{before:?} at {ms} ms: {result:?}");
        }
        for (before, after) in [
            (unknown(true), down(1, 2_000, 0)),
            (unknown(false), down(1, 2_000, 0)),
            (up(0, 0, 0), down(1, 2_000, 0)),
            (up(1, 0, 2), down(2, 4_000, 0)),
            (down(1, 700, 1), down(1, 700, 0)),
        ] {
            assert_eq!(before.on_refused(at(0)), after, "{before:?}");
        }
    }

    #[test]
    fn only_who_answers_or_is_trusted_gets_new_connections() {
        let now = Instant::now();
        let table = [
            (Checked::Unknown { trusted: true }, false, None),
            (Checked::Unknown { trusted: false }, true, None),
            (Checked::Up { falls: 1, since: now, failed: 1 }, false, Some(true)),
            (Checked::Down { falls: 1, until: now, passed: 1 }, true, Some(false)),
        ];
        for (state, down, passes) in table {
            assert_eq!((state.is_down(), state.passes()), (down, passes), "{state:?}");
        }
    }

    /// R20: a backend that toggles every two seconds, checked each second for ten minutes.
    #[test]
    fn a_flapping_backend_settles_into_long_holds() {
        let start = Instant::now();
        let mut state = Checked::Unknown { trusted: true };
        let mut changes = vec![];
        for second in 0..600 {
            let now = start + Duration::from_secs(second);
            let result = if second / 2 % 2 == 0 { Answered } else { Timeout };
            let before = state.is_down();
            state = state.on_result(now, result, thresholds(2, 2));
            if state.is_down() != before {
                changes.push(second);
            }
        }
        let late = changes.iter().filter(|&&second| second >= 120).count();
        assert!(late <= 2 * (480 / 30 + 1), "{late} changes in eight minutes: {changes:?}");
    }
}
