//! One backend, and what was seen of it.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use crate::{
    backend::{BackendId, BackendState},
    check::{CheckCounts, CheckResult},
    control::{checks::state::Checked, health::Health},
    refusal::Refusal,
    totals::BackendTotals,
};

/// The names of a pool and of a backend in it.
pub(crate) type Name = (String, String);

/// A backend, and what was seen of it.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) id: BackendId,
    pub(super) address: SocketAddr,
    /// Whether it can be sent to.
    pub(super) health: Health,
    /// Whether it answers under its own connection IDs.
    pub(super) wiring: Health,
    /// What its active checks have shown, if there are any.
    pub(super) checked: Option<Checked>,
    pub(super) last_check: Option<CheckResult>,
    pub(super) checks: CheckCounts,
    /// What the kernel said lately instead of sending to it, if it ever did.
    pub(super) refusal: Option<Refusal>,
    /// The counters when the last tick ended.
    pub(super) last: BackendTotals,
    /// What it said of its half-open connections, and when.
    pub(super) half_open: Option<(u64, Instant)>,
}

/// How the active checks of a backend go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CheckView {
    /// `None` while nothing is known.
    pub(crate) passes: Option<bool>,
    pub(crate) last: Option<CheckResult>,
    pub(crate) counts: CheckCounts,
}

/// How long a report of half-open connections is believed: a server that has stopped reporting has
/// other troubles.
const REPORT_LIFETIME: Duration = Duration::from_secs(10);

impl Watched {
    /// What is known of it: its traffic or its checks alone are enough to have it down.
    pub(super) fn state(&self) -> BackendState {
        if self.checked.is_some_and(Checked::is_down) {
            return BackendState::Down;
        }
        self.state_of_traffic()
    }

    /// What is known of it without checks.
    pub(super) fn state_of_traffic(&self) -> BackendState {
        match (self.health.is_down(), self.wiring.is_down()) {
            (true, _) => BackendState::Down,
            (false, true) => BackendState::Miswired,
            (false, false) => BackendState::Active,
        }
    }

    /// All that what is wanted goes by.
    pub(super) fn states(&self) -> (BackendState, BackendState) {
        (self.state(), self.state_of_traffic())
    }

    pub(super) fn check(&self) -> Option<CheckView> {
        let passes = self.checked?.passes();
        Some(CheckView { passes, last: self.last_check, counts: self.checks })
    }

    pub(super) fn half_open(&self, now: Instant) -> Option<u64> {
        let (half_open, at) = self.half_open?;
        (now.saturating_duration_since(at) < REPORT_LIFETIME).then_some(half_open)
    }
}
