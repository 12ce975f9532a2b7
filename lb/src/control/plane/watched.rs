//! One backend, and what was seen of it.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use quic::routable::ConfigId;
use quic_lb_config::Admission;

use crate::{
    backend::{BackendId, BackendState},
    check::{CheckCounts, CheckResult},
    control::{
        checks::{
            contract::{Breach, Contract, Shown},
            honours::Honours,
            slow_start::SlowStart,
            state::{Checked, Thresholds},
        },
        health::{Health, Signal},
        silence::{Norm, Seen, Silence},
    },
    refusal::Refusal,
    routing::Routing,
    totals::BackendTotals,
};

/// The names of a pool and of a backend in it.
pub(crate) type Name = (String, String);

/// A backend, and what was seen of it.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) id: BackendId,
    pub(super) address: SocketAddr,
    /// Which pool of the newest configuration it is in, and which backend there.
    pub(super) place: (usize, usize),
    /// What the operator wants of it, by command or else by the file.
    pub(super) admission: Admission,
    /// Whether it can be sent to, and answers.
    pub(super) health: Health,
    /// Whether it does not answer.
    pub(super) silence: Silence,
    /// Whether it answers under its own connection IDs.
    pub(super) wiring: Health,
    /// How long it takes its share of new connections to grow when it gets them again.
    pub(super) slow_start: Duration,
    /// That growth, while it goes on.
    pub(super) starting: Option<SlowStart>,
    /// What its active checks have shown, if there are any.
    pub(super) checked: Option<Checked>,
    /// Whether its checks show connection IDs that lead to it.
    pub(super) contract: Contract,
    /// What was wrong with them when they did not, as long as it is so.
    pub(super) breach: Option<Breach>,
    /// The configuration that it makes connection IDs by, if its last check has shown that.
    pub(super) makes_cids_by: Option<ConfigId>,
    pub(super) last_check: Option<CheckResult>,
    pub(super) checks: CheckCounts,
    /// What the kernel said lately instead of sending to it, if it ever did.
    pub(super) refusal: Option<Refusal>,
    /// Whether it is down because it was silent.
    pub(super) fell_silent: bool,
    /// The counters when the last tick ended, and what they had grown by in the last one in which they had.
    pub(super) last: BackendTotals,
    pub(super) seen: BackendTotals,
    /// What it said of its half-open connections, and when.
    pub(super) half_open: Option<(u64, Instant)>,
    /// Whether it honours the tokens of Retries.
    pub(super) honours: Honours,
    /// Whether it has honoured tokens of each key, the last time; those that it said nothing of are not there.
    pub(super) token_keys: BTreeMap<u8, bool>,
    /// By how many seconds its clock is ahead, as far as its tokens have shown.
    pub(super) clock_skew: Option<i64>,
    /// Since when it drains, counted from the beginning of the process.
    pub(super) drains_since: Option<Duration>,
}

/// A backend that is to get no new connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DrainView {
    /// For how long it has got none.
    pub(crate) lasts: Duration,
    /// For how long nothing was heard of those that it had.
    pub(crate) silent: Duration,
}

impl DrainView {
    /// Whether no connection is left, for all that can be told.
    pub(crate) fn is_complete(&self) -> bool {
        self.silent >= QUIET
    }
}

/// A connection that was not heard for so long is over, where nobody says otherwise: longer than common clients keep
/// quiet that keep connections open for requests to come.
pub(crate) const QUIET: Duration = Duration::from_secs(8);

/// How the active checks of a backend go.
#[derive(Clone, Debug)]
pub(crate) struct CheckView {
    /// `None` while nothing is known.
    pub(crate) passes: Option<bool>,
    pub(crate) last: Option<CheckResult>,
    pub(crate) counts: CheckCounts,
    /// What is wrong with its connection IDs, if they are known and something is.
    pub(crate) breach: Option<Breach>,
    /// The configuration that it makes them by, if that is known.
    pub(crate) config_id: Option<ConfigId>,
}

/// How long a report of half-open connections is believed: a server that has stopped reporting has
/// other troubles.
const REPORT_LIFETIME: Duration = Duration::from_secs(10);

impl Watched {
    /// One that nothing is known of. Its counters may have been used before: they showed this when it began.
    pub(super) fn new(id: BackendId, address: SocketAddr, last: BackendTotals) -> Self {
        Self {
            id,
            address,
            place: (0, 0),
            admission: Admission::default(),
            health: Health::default(),
            silence: Silence::default(),
            wiring: Health::default(),
            slow_start: Duration::ZERO,
            starting: None,
            checked: None,
            contract: Contract::default(),
            breach: None,
            makes_cids_by: None,
            last_check: None,
            checks: CheckCounts::default(),
            refusal: None,
            fell_silent: false,
            last,
            seen: BackendTotals::default(),
            half_open: None,
            honours: Honours::default(),
            token_keys: BTreeMap::new(),
            clock_skew: None,
            drains_since: None,
        }
    }

    /// What is known of it: its traffic or its checks alone are enough to have it down.
    pub(super) fn state(&self) -> BackendState {
        if self.checked.is_some_and(Checked::is_down) {
            return BackendState::Down;
        }
        self.state_of_traffic()
    }

    /// What is known of it, but for checks that it has failed.
    pub(super) fn state_of_traffic(&self) -> BackendState {
        let miswired = self.wiring.is_down() || self.contract.is_broken();
        let is_tried = self.health.is_tried() || self.wiring.is_tried();
        match (self.health.is_down(), miswired, is_tried) {
            (true, _, _) => BackendState::Down,
            (false, true, _) => BackendState::Miswired,
            (false, false, true) => BackendState::Probing,
            (false, false, false) => BackendState::Active,
        }
    }

    /// Takes note of what `change` shows of it; says whether what is wanted follows.
    pub(super) fn change(&mut self, now: Instant, change: impl FnOnce(&mut Self)) -> bool {
        let before = self.states();
        change(self);
        let after = self.states();
        if after.0 != BackendState::Active {
            self.starting = None;
        } else if before.0 != BackendState::Active && !self.slow_start.is_zero() {
            self.starting = Some(SlowStart::begin(now));
        }
        after != before
    }

    /// All that what is wanted goes by.
    pub(super) fn states(&self) -> (BackendState, BackendState) {
        (self.state(), self.state_of_traffic())
    }

    /// Takes note of whether it drains at `time`, since when that is in force.
    pub(super) fn watch_drain(&mut self, time: Duration, routing: &Routing) {
        let drains = self.admission == Admission::Draining
            && routing.backend(self.id).is_some_and(|of| !of.state.takes_connections());
        self.drains_since = drains.then(|| self.drains_since.unwrap_or(time));
    }

    /// Whether nothing is known against it, so that a tick in which nothing was seen of it changes nothing.
    pub(super) fn is_settled(&self) -> bool {
        self.silence == Silence::default()
            && self.health == Health::default()
            && self.wiring == Health::default()
    }

    pub(super) fn check(&self) -> Option<CheckView> {
        let passes = self.checked?.passes();
        let breach = self.breach.clone();
        let (last, counts, config_id) = (self.last_check, self.checks, self.makes_cids_by);
        Some(CheckView { passes, last, counts, breach, config_id })
    }

    /// Takes note of what the workers have seen of it during a tick, when its pool fares by `norm`.
    pub(super) fn on_traffic(&mut self, now: Instant, norm: Norm) {
        let seen = self.seen;
        let was_down = self.health.is_down();
        let refused: u64 = seen.refused.about_backend().map(|(_, n)| n).sum();
        let (heard, is_refused) = (seen.returned > 0, refused > 0);
        let asked = Seen { asked: seen.asked, heard, refused: is_refused };
        let is_silent = self.silence.on_tick(now, asked, norm);
        let signal = if is_silent { Signal::Silent } else { Signal::new(seen.returned, refused) };
        self.health = self.health.on_tick(now, signal);
        if self.health.is_down() != was_down {
            self.fell_silent = is_silent;
        }
        if self.health.is_down() && !was_down {
            self.checked = self.checked.map(|checked| checked.on_refused(now));
        }
        let most = seen.refused.about_backend().max_by_key(|(_, n)| *n);
        self.refusal = most.map(|(refusal, _)| refusal).or(self.refusal);
        let names = Signal::of_names(seen.well_named, seen.misnamed);
        self.wiring = self.wiring.on_tick(now, names);
    }

    /// Takes note of a check.
    pub(super) fn on_check(
        &mut self,
        now: Instant,
        thresholds: Thresholds,
        result: CheckResult,
        shown: Shown,
    ) {
        // The result may be late.
        let Some(checked) = self.checked else { return };
        let checked = checked.on_result(now, result, thresholds);
        self.checked = Some(checked);
        // Its checks have tried it.
        if checked.passes() == Some(true) && self.health.is_tried() {
            self.health = self.health.on_tick(now, Signal::Answered);
        }
        let mut counted = result;
        if result == CheckResult::Answered {
            match shown {
                Shown::Nothing => self.forget_cids(),
                Shown::Good(config_id) => {
                    self.on_cids(None);
                    self.makes_cids_by = config_id;
                }
                Shown::Breach(breach) => {
                    counted = CheckResult::Miswired;
                    self.on_cids(Some(breach));
                }
            }
        }
        self.checks.add(counted);
        self.last_check = Some(counted);
    }

    /// Takes note of connection IDs, and of what is wrong with them.
    fn on_cids(&mut self, breach: Option<Breach>) {
        self.makes_cids_by = None;
        self.contract = self.contract.on_check(breach.is_none());
        // While it counts as miswired it has to be known why.
        if breach.is_some() || !self.contract.is_broken() {
            self.breach = breach;
        }
    }

    /// Nothing is known of its connection IDs any more.
    pub(super) fn forget_cids(&mut self) {
        (self.contract, self.breach) = (Contract::default(), None);
        self.makes_cids_by = None;
    }

    pub(super) fn half_open(&self, now: Instant) -> Option<u64> {
        let (half_open, at) = self.half_open?;
        (now.saturating_duration_since(at) < REPORT_LIFETIME).then_some(half_open)
    }
}
