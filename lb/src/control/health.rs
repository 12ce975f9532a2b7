//! Passive health of one backend, pure: what the workers saw during a tick goes in, with the time;
//! the state comes out. Two of these watch each backend: whether it can be sent to, and whether it answers under its
//! own connection IDs; what is called to refuse here is then to answer under another's.
//!
//! A backend that refuses, that the kernel does not send to, or that is silent ([`silence`](super::silence)) gets no new
//! connections for a while. Then it is tried with few, and gets its share when it answers. What it has
//! keeps going to it all the time: only the client and the server know when a connection is dead.
//!
//! ```text
//!            refused ≥ 3 in a row                   time is over                 answered
//!   Well ─────────── or ────────────► Down(level) ────────────────► Trial(level) ─────────► Recovering(level)
//!    ▲             silent              ▲    │  answered, first fall   │   │                   │   │
//!    │                                 │    └────────────────────────►│   │                   │   │
//!    │                                 └──── refused or silent, level + 1 ┴───────────────────┘   │
//!    └───────────────────────────── nothing bad for PROBATION ────────────────────────────────────┘
//! ```
//!
//! The time without new connections doubles with each fall that comes before it is well. From the second fall on
//! an answer does not end it early: a backend that toggles changes its state at most twice per hold. A trial that nobody
//! has a question for ends by itself, too.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Refusals without an answer in between that make a backend count as down. One or two also
/// happen to a server that restarts its socket.
const REFUSALS: u32 = 3;

/// Refusals further apart than this do not add up.
const STREAK_WINDOW: Duration = Duration::from_secs(10);

/// How long the first fall lasts.
const FIRST_HOLD: Duration = Duration::from_secs(2);

/// How long a fall lasts at most: longer would cost a recovered backend more than trying it costs
/// the few clients that hit it.
const LONGEST_HOLD: Duration = Duration::from_secs(30);

/// A backend that was down and has not refused for this long is as good as any other.
pub(super) const PROBATION: Duration = Duration::from_secs(30);

/// What the workers saw of a backend during one tick.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    /// Nothing.
    Quiet,
    /// At least one datagram came back; refusals in the same tick do not count.
    Answered,
    /// The kernel said so often that it cannot be sent to, and nothing came back.
    Refused(u32),
    /// Nothing came back for so long that it counts as down.
    Silent,
}

impl Signal {
    pub(crate) fn new(answered: u64, refused: u64) -> Self {
        match (answered, refused) {
            (0, 0) => Self::Quiet,
            (0, refused) => Self::Refused(u32::try_from(refused).unwrap_or(u32::MAX)),
            _ => Self::Answered,
        }
    }

    /// What connection IDs say for and against a backend: so many of its connections were `misnamed`,
    /// answered under another's connection ID, and so many well. Those of a server that draws them at random hit
    /// upon another's now and then: fewer than half mean nothing.
    pub(crate) fn of_names(well_named: u64, misnamed: u64) -> Self {
        let means_nothing = well_named >= misnamed;
        Self::new(if means_nothing { well_named } else { 0 }, misnamed)
    }
}

/// The health of one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Health<T = Instant> {
    /// Nothing is known against it.
    Well(Streak<T>),
    /// It refuses; no new connections until then.
    Down {
        /// How often it has fallen without recovering.
        level: u32,
        /// When it is tried again.
        until: T,
    },
    /// It gets a few new connections and has to answer.
    Trial {
        /// As before the trial.
        level: u32,
        /// Since when nothing speaks against it.
        since: T,
    },
    /// It has answered, gets its share again, and is not trusted yet.
    Recovering {
        /// As before the trial.
        level: u32,
        /// When the trial began.
        since: T,
    },
}

/// Refusals in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Streak<T = Instant> {
    refused: u32,
    last: Option<T>,
}

impl<T> Default for Streak<T> {
    fn default() -> Self {
        Self { refused: 0, last: None }
    }
}

impl<T> Health<T> {
    /// The same, with its moments on another clock.
    pub(crate) fn map<U>(self, clock: impl Fn(T) -> U) -> Health<U> {
        match self {
            Self::Well(Streak { refused, last }) => {
                Health::Well(Streak { refused, last: last.map(clock) })
            }
            Self::Down { level, until } => Health::Down { level, until: clock(until) },
            Self::Trial { level, since } => Health::Trial { level, since: clock(since) },
            Self::Recovering { level, since } => Health::Recovering { level, since: clock(since) },
        }
    }
}

impl Default for Health {
    fn default() -> Self {
        Self::Well(Streak::default())
    }
}

impl Health {
    /// The state after a tick at `now` in which `signal` was seen.
    #[must_use]
    pub(crate) fn on_tick(self, now: Instant, signal: Signal) -> Self {
        match (self, signal) {
            (Self::Well(streak), Signal::Quiet) => Self::Well(streak),
            (Self::Well(_), Signal::Answered) => Self::default(),
            (Self::Well(streak), Signal::Refused(refused)) => {
                let streak = streak.add(now, refused);
                if streak.refused < REFUSALS { Self::Well(streak) } else { Self::down(now, 1) }
            }
            (Self::Well(_), Signal::Silent) => Self::down(now, 1),
            (Self::Down { level: 1, .. }, Signal::Answered) => Self::Trial { level: 1, since: now },
            (Self::Down { until, .. }, _) if now < until => self,
            (Self::Down { level, .. }, Signal::Refused(_) | Signal::Silent) => {
                Self::down(now, level.saturating_add(1))
            }
            (Self::Down { level, .. }, Signal::Quiet | Signal::Answered) => {
                Self::Trial { level, since: now }
            }
            (
                Self::Trial { level, .. } | Self::Recovering { level, .. },
                Signal::Refused(_) | Signal::Silent,
            ) => Self::down(now, level.saturating_add(1)),
            (Self::Trial { since, .. } | Self::Recovering { since, .. }, _)
                if now.saturating_duration_since(since) >= PROBATION =>
            {
                Self::default()
            }
            (Self::Trial { level, since }, Signal::Answered) => Self::Recovering { level, since },
            (Self::Trial { .. } | Self::Recovering { .. }, Signal::Quiet | Signal::Answered) => {
                self
            }
        }
    }

    /// Whether it gets new connections.
    #[must_use]
    pub(crate) const fn is_down(self) -> bool {
        match self {
            Self::Well(_) | Self::Trial { .. } | Self::Recovering { .. } => false,
            Self::Down { .. } => true,
        }
    }

    /// Whether it has to answer first to get its share of them.
    #[must_use]
    pub(crate) const fn is_tried(self) -> bool {
        match self {
            Self::Trial { .. } => true,
            Self::Well(_) | Self::Down { .. } | Self::Recovering { .. } => false,
        }
    }

    fn down(now: Instant, level: u32) -> Self {
        Self::Down { level, until: now + hold(level) }
    }
}

impl Streak {
    fn add(self, now: Instant, refused: u32) -> Self {
        let recent = |last| now.saturating_duration_since(last) <= STREAK_WINDOW;
        let before = if self.last.is_some_and(recent) { self.refused } else { 0 };
        Self { refused: before.saturating_add(refused), last: Some(now) }
    }
}

/// How long the `level`th fall in a row lasts.
pub(super) fn hold(level: u32) -> Duration {
    let factor = 1u32.checked_shl(level.saturating_sub(1)).unwrap_or(u32::MAX);
    FIRST_HOLD.saturating_mul(factor).min(LONGEST_HOLD)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(200);

    /// Every state × every signal, on both sides of every deadline and threshold.
    #[test]
    fn every_state_meets_every_signal() {
        let t0 = Instant::now();
        let at = |ms: u64| t0 + Duration::from_millis(ms);
        let well = Health::default();
        let streak = |refused, ms| Health::Well(Streak { refused, last: Some(at(ms)) });
        let down = |level, ms| Health::Down { level, until: at(ms) };
        let trial = |level, ms| Health::Trial { level, since: at(ms) };
        let recovering = |level, ms| Health::Recovering { level, since: at(ms) };
        let (quiet, answered, refused) = (Signal::Quiet, Signal::Answered, Signal::Refused);
        let silent = Signal::Silent;
        let table = [
            // Well: nothing and answers change nothing, refusals add up.
            (well, 0, quiet, well),
            (well, 0, answered, well),
            (well, 0, refused(1), streak(1, 0)),
            (well, 0, refused(2), streak(2, 0)),
            (well, 0, refused(3), down(1, 2_000)),
            (well, 0, refused(u32::MAX), down(1, 2_000)),
            (well, 0, silent, down(1, 2_000)),
            (streak(1, 0), 200, silent, down(1, 2_200)),
            (streak(2, 0), 200, quiet, streak(2, 0)),
            (streak(2, 0), 200, answered, well),
            (streak(1, 0), 200, refused(1), streak(2, 200)),
            (streak(2, 0), 200, refused(1), down(1, 2_200)),
            // A streak ends after ten seconds.
            (streak(2, 0), 10_000, refused(1), down(1, 12_000)),
            (streak(2, 0), 10_001, refused(1), streak(1, 10_001)),
            // Down, first fall: an answer ends it, nothing else before its time.
            (down(1, 2_000), 1_999, quiet, down(1, 2_000)),
            (down(1, 2_000), 200, answered, trial(1, 200)),
            (down(1, 2_000), 1_999, refused(9), down(1, 2_000)),
            (down(1, 2_000), 1_999, silent, down(1, 2_000)),
            (down(1, 2_000), 2_000, silent, down(2, 6_000)),
            (down(1, 2_000), 2_000, quiet, trial(1, 2_000)),
            (down(1, 2_000), 2_000, answered, trial(1, 2_000)),
            (down(1, 2_000), 2_000, refused(1), down(2, 6_000)),
            // Down after a relapse: nothing ends it before its time.
            (down(2, 4_000), 3_999, quiet, down(2, 4_000)),
            (down(2, 4_000), 3_999, answered, down(2, 4_000)),
            (down(2, 4_000), 3_999, refused(9), down(2, 4_000)),
            (down(2, 4_000), 4_000, quiet, trial(2, 4_000)),
            (down(2, 4_000), 4_000, answered, trial(2, 4_000)),
            (down(2, 4_000), 4_000, refused(1), down(3, 12_000)),
            (down(2, 4_000), 3_999, silent, down(2, 4_000)),
            (down(2, 4_000), 4_000, silent, down(3, 12_000)),
            (down(4, 0), 0, refused(1), down(5, 30_000)),
            (down(u32::MAX, 0), 0, refused(1), down(u32::MAX, 30_000)),
            // Trial: one refusal is enough, an answer ends it, and so does peace for thirty seconds.
            (trial(1, 0), 200, quiet, trial(1, 0)),
            (trial(1, 0), 200, answered, recovering(1, 0)),
            (trial(1, 0), 200, refused(1), down(2, 4_200)),
            (trial(1, 0), 200, silent, down(2, 4_200)),
            (trial(1, 0), 29_999, quiet, trial(1, 0)),
            (trial(1, 0), 29_999, answered, recovering(1, 0)),
            (trial(1, 0), 30_000, quiet, well),
            (trial(1, 0), 30_000, answered, well),
            (trial(1, 0), 30_000, refused(1), down(2, 34_000)),
            (trial(1, 0), 30_000, silent, down(2, 34_000)),
            // It has answered: peace for thirty seconds clears the past.
            (recovering(1, 0), 200, quiet, recovering(1, 0)),
            (recovering(1, 0), 200, answered, recovering(1, 0)),
            (recovering(1, 0), 200, refused(1), down(2, 4_200)),
            (recovering(1, 0), 200, silent, down(2, 4_200)),
            (recovering(1, 0), 29_999, quiet, recovering(1, 0)),
            (recovering(1, 0), 29_999, answered, recovering(1, 0)),
            (recovering(2, 0), 30_000, quiet, well),
            (recovering(2, 0), 30_000, answered, well),
            (recovering(2, 0), 30_000, refused(1), down(3, 38_000)),
            (recovering(2, 0), 30_000, silent, down(3, 38_000)),
        ];
        for (before, ms, signal, after) in table {
            assert_eq!(before.on_tick(at(ms), signal), after, "{before:?} at {ms} ms: {signal:?}");
        }
    }

    #[test]
    fn only_a_fall_keeps_new_connections_away() {
        let now = Instant::now();
        assert!(!Health::default().is_down());
        let [trial, recovering] =
            [Health::Trial { level: 3, since: now }, Health::Recovering { level: 3, since: now }];
        assert!(!trial.is_down() && trial.is_tried());
        assert!(!recovering.is_down() && !recovering.is_tried());
        let down = Health::Down { level: 1, until: now };
        assert!(down.is_down() && !down.is_tried() && !Health::default().is_tried());
    }

    #[test]
    fn holds_double_up_to_thirty_seconds() {
        let seconds: Vec<_> = (1..8).map(|level| hold(level).as_secs()).collect();
        assert_eq!(seconds, [2, 4, 8, 16, 30, 30, 30]);
        assert_eq!(hold(u32::MAX), LONGEST_HOLD);
    }

    #[test]
    fn an_answer_outweighs_refusals_of_the_same_tick() {
        assert_eq!(Signal::new(0, 0), Signal::Quiet);
        assert_eq!(Signal::new(1, 500), Signal::Answered);
        assert_eq!(Signal::new(0, 2), Signal::Refused(2));
        assert_eq!(Signal::new(0, u64::MAX), Signal::Refused(u32::MAX));
    }

    #[test]
    fn connection_ids_speak_against_a_backend_where_most_are_anothers() {
        assert_eq!(Signal::of_names(0, 0), Signal::Quiet);
        assert_eq!(Signal::of_names(1, 0), Signal::Answered);
        assert_eq!(Signal::of_names(5, 5), Signal::Answered);
        assert_eq!(Signal::of_names(5, 6), Signal::Refused(6));
        assert_eq!(Signal::of_names(0, 1), Signal::Refused(1));
    }

    /// R20: a backend that toggles every two seconds, seen for ten minutes.
    #[test]
    fn a_flapping_backend_settles_into_long_holds() {
        let start = Instant::now();
        let mut health = Health::default();
        let mut changes = vec![];
        for tick in 0..3_000 {
            let now = start + TICK * tick;
            let up = tick / 10 % 2 == 0;
            let signal = if up { Signal::Answered } else { Signal::Refused(5) };
            let before = health.is_down();
            health = health.on_tick(now, signal);
            if health.is_down() != before {
                changes.push(now);
            }
        }
        let settled = start + Duration::from_secs(120);
        let late: Vec<_> = changes.into_iter().filter(|&at| at >= settled).collect();
        // Two changes, up and down again, per hold of thirty seconds.
        assert!(late.len() <= 2 * (480 / 30 + 1), "{} changes in eight minutes", late.len());
    }
}
