//! When address validation begins and ends on one listener, pure: the time and the load go in, the
//! state comes out.
//!
//! ```text
//!             asked for, or too much                  time is over
//!   Inactive ────────────────────────► Transition ──────────────────► Active
//!      ▲                                   │                             │
//!      └───────── not asked for any more, or little for long ────────────┘
//! ```
//!
//! In the transition clients are asked for proof and their Initials are forwarded all the same, so
//! that handshakes in progress are not cut in two. A process that starts with the mode "always"
//! starts active: there is nothing in progress that it knows of.

use std::time::{Duration, Instant};

use quic_lb_config::{Adaptive, RetryMode};

/// What an Initial without proof meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It is forwarded.
    Inactive,
    /// It is answered by a Retry and forwarded, until then; after that, the phase is active.
    Transition {
        /// The end.
        until: Instant,
    },
    /// It is answered by a Retry.
    Active,
}

impl Phase {
    /// The metric labels of the phases.
    pub const LABELS: [&'static str; 3] = ["inactive", "transition", "active"];

    /// Where a listener with this mode stands when the process begins.
    #[must_use]
    pub const fn at_start(mode: RetryMode) -> Self {
        match mode {
            RetryMode::Always => Self::Active,
            RetryMode::Off | RetryMode::Adaptive => Self::Inactive,
        }
    }

    /// What it has become by `now`.
    #[must_use]
    pub fn at(self, now: Instant) -> Self {
        match self {
            Self::Transition { until } if now >= until => Self::Active,
            _ => self,
        }
    }

    /// Whether validation has begun with a transition that is not over for longer than `grace`.
    #[must_use]
    pub fn is_within(self, grace: Duration, now: Instant) -> bool {
        matches!(self, Self::Transition { until } if now < until + grace)
    }

    /// Whether it is the transition.
    #[must_use]
    pub const fn is_transition(self) -> bool {
        matches!(self, Self::Transition { .. })
    }

    /// The metric label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Inactive => Self::LABELS[0],
            Self::Transition { .. } => Self::LABELS[1],
            Self::Active => Self::LABELS[2],
        }
    }
}

/// Why validation began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The file says so.
    Configured,
    /// Many connections began.
    Rate,
    /// A server has many half-open connections.
    HalfOpen,
}

impl Reason {
    /// Every reason.
    pub const ALL: [Self; 3] = [Self::Configured, Self::Rate, Self::HalfOpen];

    /// The metric label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Configured => "configured",
            Self::Rate => "rate",
            Self::HalfOpen => "half_open",
        }
    }
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// When clients have to prove their address.
    pub mode: RetryMode,
    /// How long the transition is.
    pub transition: Duration,
    /// Thresholds of [`RetryMode::Adaptive`].
    pub adaptive: Adaptive,
}

/// What was seen lately.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Load {
    /// Attempts to begin a connection in a second.
    pub rate: u64,
    /// The most half-open connections that a server reports.
    pub half_open: u64,
}

/// Where a listener stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switch {
    /// Nobody has to prove anything.
    Inactive,
    /// Validation is beginning.
    Transition {
        /// When the transition is over.
        until: Instant,
        /// Why it began.
        reason: Reason,
    },
    /// Validation is on.
    Active {
        /// Why it began.
        reason: Reason,
        /// Since when there has been little to do.
        quiet_since: Option<Instant>,
    },
}

impl Switch {
    /// Where a listener with this mode stands when the process begins.
    #[must_use]
    pub const fn at_start(mode: RetryMode) -> Self {
        match Phase::at_start(mode) {
            Phase::Active => Self::Active { reason: Reason::Configured, quiet_since: None },
            _ => Self::Inactive,
        }
    }

    /// Where it stands after a look at the load at `now`.
    #[must_use]
    pub fn on_load(self, now: Instant, load: Load, settings: &Settings) -> Self {
        let Settings { mode, transition, adaptive } = *settings;
        match (self, mode) {
            (_, RetryMode::Off) => Self::Inactive,
            (Self::Inactive, _) => match reason_to_begin(mode, load, &adaptive) {
                Some(reason) => Self::Transition { until: now + transition, reason },
                None => Self::Inactive,
            },
            (Self::Transition { until, .. }, _) if now < until => self,
            (Self::Transition { reason, .. }, _) => {
                Self::Active { reason, quiet_since: None }.on_load(now, load, settings)
            }
            (Self::Active { .. }, RetryMode::Always) => {
                Self::Active { reason: Reason::Configured, quiet_since: None }
            }
            (Self::Active { reason, quiet_since }, RetryMode::Adaptive) => {
                let is_quiet = load.rate < u64::from(adaptive.off_rate)
                    && load.half_open < u64::from(adaptive.off_half_open);
                let since = quiet_since.unwrap_or(now);
                let over = now.saturating_duration_since(since) >= adaptive.hold;
                match is_quiet {
                    true if over => Self::Inactive,
                    true => Self::Active { reason, quiet_since: Some(since) },
                    false => Self::Active { reason, quiet_since: None },
                }
            }
        }
    }

    /// What an Initial without proof meets.
    #[must_use]
    pub const fn phase(self) -> Phase {
        match self {
            Self::Inactive => Phase::Inactive,
            Self::Transition { until, .. } => Phase::Transition { until },
            Self::Active { .. } => Phase::Active,
        }
    }

    /// Why validation is on, if it is.
    #[must_use]
    pub const fn reason(self) -> Option<Reason> {
        match self {
            Self::Inactive => None,
            Self::Transition { reason, .. } | Self::Active { reason, .. } => Some(reason),
        }
    }
}

fn reason_to_begin(mode: RetryMode, load: Load, adaptive: &Adaptive) -> Option<Reason> {
    match mode {
        RetryMode::Off => None,
        RetryMode::Always => Some(Reason::Configured),
        RetryMode::Adaptive if load.rate >= u64::from(adaptive.on_rate) => Some(Reason::Rate),
        RetryMode::Adaptive if load.half_open >= u64::from(adaptive.on_half_open) => {
            Some(Reason::HalfOpen)
        }
        RetryMode::Adaptive => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADAPTIVE: Adaptive = Adaptive {
        on_rate: 100,
        on_half_open: 40,
        off_rate: 50,
        off_half_open: 20,
        hold: Duration::from_secs(30),
    };

    /// Every state × every mode × every kind of load, on both sides of every deadline and
    /// threshold.
    #[test]
    fn every_state_meets_every_mode_and_load() {
        use Reason::{Configured, HalfOpen, Rate};
        use RetryMode::{Adaptive, Always, Off};
        let t0 = Instant::now();
        let at = |ms: u64| t0 + Duration::from_millis(ms);
        let load = |rate, half_open| Load { rate, half_open };
        let (idle, busy) = (load(0, 0), load(1_000_000, 1_000_000));
        let inactive = Switch::Inactive;
        let transition = |ms, reason| Switch::Transition { until: at(ms), reason };
        let active =
            |reason, quiet: Option<u64>| Switch::Active { reason, quiet_since: quiet.map(at) };
        let table = [
            // Off: whatever was, is over.
            (inactive, 0, Off, idle, inactive),
            (inactive, 0, Off, busy, inactive),
            (transition(200, Rate), 0, Off, busy, inactive),
            (transition(200, Rate), 300, Off, idle, inactive),
            (active(Rate, None), 0, Off, busy, inactive),
            (active(Configured, Some(0)), 0, Off, idle, inactive),
            // Always: through the transition, and then for good.
            (inactive, 0, Always, idle, transition(200, Configured)),
            (inactive, 0, Always, busy, transition(200, Configured)),
            (transition(200, Configured), 199, Always, busy, transition(200, Configured)),
            (transition(200, Configured), 200, Always, idle, active(Configured, None)),
            (transition(200, Rate), 200, Always, idle, active(Configured, None)),
            (active(Configured, None), 99_999, Always, idle, active(Configured, None)),
            (active(Rate, Some(0)), 99_999, Always, idle, active(Configured, None)),
            (active(Rate, None), 0, Always, busy, active(Configured, None)),
            // Adaptive: begins at either threshold.
            (inactive, 0, Adaptive, idle, inactive),
            (inactive, 0, Adaptive, load(99, 39), inactive),
            (inactive, 0, Adaptive, load(100, 0), transition(200, Rate)),
            (inactive, 0, Adaptive, load(0, 40), transition(200, HalfOpen)),
            (inactive, 0, Adaptive, busy, transition(200, Rate)),
            // The transition is as long as it is.
            (transition(200, Rate), 199, Adaptive, idle, transition(200, Rate)),
            (transition(200, Rate), 200, Adaptive, busy, active(Rate, None)),
            (transition(200, Rate), 200, Adaptive, idle, active(Rate, Some(200))),
            // It ends when both are low for long.
            (active(Rate, None), 0, Adaptive, busy, active(Rate, None)),
            (active(Rate, None), 0, Adaptive, load(50, 0), active(Rate, None)),
            (active(Rate, None), 0, Adaptive, load(0, 20), active(Rate, None)),
            (active(Rate, None), 7, Adaptive, load(49, 19), active(Rate, Some(7))),
            (active(Rate, Some(7)), 30_006, Adaptive, idle, active(Rate, Some(7))),
            (active(Rate, Some(7)), 30_007, Adaptive, idle, inactive),
            (active(Rate, Some(7)), 30_007, Adaptive, load(50, 0), active(Rate, None)),
            (active(HalfOpen, Some(7)), 20, Adaptive, load(0, 20), active(HalfOpen, None)),
            (active(Configured, None), 7, Adaptive, idle, active(Configured, Some(7))),
        ];
        let transition = Duration::from_millis(200);
        for (before, ms, mode, load, after) in table {
            let settings = Settings { mode, transition, adaptive: ADAPTIVE };
            let got = before.on_load(at(ms), load, &settings);
            assert_eq!(got, after, "{before:?} at {ms} ms, {mode:?}, {load:?}");
        }
    }

    #[test]
    fn a_process_begins_where_its_mode_ends_up() {
        for mode in [RetryMode::Off, RetryMode::Always, RetryMode::Adaptive] {
            let expected = if mode == RetryMode::Always { Phase::Active } else { Phase::Inactive };
            assert_eq!(Switch::at_start(mode).phase(), expected);
            assert_eq!(Phase::at_start(mode), expected);
        }
    }

    #[test]
    fn a_transition_ends_by_itself() {
        let now = Instant::now();
        let until = now + Duration::from_millis(200);
        let phase = Phase::Transition { until };
        assert_eq!(phase.at(until - Duration::from_nanos(1)), phase);
        assert_eq!(phase.at(until), Phase::Active);
        assert_eq!(Phase::Inactive.at(until), Phase::Inactive);
    }

    /// Load that hovers around a threshold for ten minutes.
    #[test]
    fn hovering_load_switches_once() {
        let settings = Settings {
            mode: RetryMode::Adaptive,
            transition: Duration::from_millis(200),
            adaptive: ADAPTIVE,
        };
        let start = Instant::now();
        let mut switch = Switch::Inactive;
        let mut changes = 0;
        for tick in 0..3000u32 {
            let load = Load { rate: if tick % 2 == 0 { 101 } else { 10 }, half_open: 0 };
            let next = switch.on_load(start + Duration::from_millis(200) * tick, load, &settings);
            changes += u32::from(next.reason() != switch.reason());
            switch = next;
        }
        assert_eq!(changes, 1);
    }
}
