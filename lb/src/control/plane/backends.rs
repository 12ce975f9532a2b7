//! The backends as far as their health goes: who is watched and checked, what checks have come to, what that means for a
//! pool as a whole, and what is said of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use quic::connection_id::ConnectionId;
use quic_lb_config::{Admission, Backend, CheckKind, Config, HealthCheck, Pool, TokenFormat};
use tracing::{info, warn};

use super::{
    ControlPlane,
    watched::{Name, Watched},
};
use crate::{
    admission::tokens::Tokens,
    backend::BackendState,
    check::{CheckResult, Finding},
    control::checks::{
        contract::{Shown, breach, made_by},
        honours::{Honours, TokenAnswer, question},
        state::{Checked, Thresholds},
    },
    refusal::Refusal,
    routing::BackendRoute,
    wanted::WantedBackend,
};

/// Whom to check, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CheckTarget {
    pub(crate) name: Name,
    /// Where the backend listens.
    pub(super) backend: SocketAddr,
    /// Where it is checked.
    pub(crate) address: SocketAddr,
    /// Where questions leave from, if that is not left to the kernel.
    pub(crate) source: Option<IpAddr>,
    /// That of its pool.
    pub(crate) check: Arc<HealthCheck>,
}

/// A server to ask, and what has to be asked anew with when it changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TokenTarget {
    pub(crate) target: CheckTarget,
    /// The keys of tokens, and their format.
    pub(crate) keys: Vec<(u8, [u8; 16])>,
    pub(crate) shared_state: bool,
}

/// From one growth of the shares of a pool's backends to the next, at least: each fills its table anew.
pub(super) const GROWTH: Duration = Duration::from_secs(1);

impl ControlPlane {
    /// Takes note of what active checks have found.
    pub(crate) fn on_checks(&mut self, now: Instant, findings: &[(Arc<CheckTarget>, Finding)]) {
        let config = Arc::clone(&self.config);
        let mut changed = false;
        for (target, Finding { result, cids, took }) in findings {
            let (pool, name) = &target.name;
            let watched = self.fleet.get_mut(pool, name);
            // It may have moved, or be no more.
            let watched = watched.filter(|watched| watched.address == target.backend);
            let Some(watched) = watched else { continue };
            let HealthCheck { rise, fall, .. } = *target.check;
            let thresholds = Thresholds { rise, fall };
            let shown = shown(&config, watched.place, target, cids);
            let on_check =
                |watched: &mut Watched| watched.on_check(now, thresholds, *result, shown);
            changed |= watched.change(now, on_check);
            if *result == CheckResult::Answered {
                match self.check_times.get_mut(pool) {
                    Some(times) => times.add(*took),
                    None => self.check_times.entry(pool.clone()).or_default().add(*took),
                }
            }
        }
        if changed {
            self.want();
        }
    }

    /// Has the shares of backends that start slowly grow; says whether any did. Each growth fills the table of a pool
    /// anew, so that those of a pool grow together.
    pub(super) fn grow_shares(&mut self, now: Instant) -> bool {
        let Self { config, fleet, grown, .. } = self;
        let mut any = false;
        for (pool, backends) in config.pools.iter().zip(fleet.pools_mut()) {
            if backends.iter().all(|watched| watched.starting.is_none()) {
                grown.remove(&pool.name);
                continue;
            }
            // That it has begun has filled the table too.
            let last = grown.entry(pool.name.clone()).or_insert(now);
            if now.saturating_duration_since(*last) < GROWTH {
                continue;
            }
            for watched in backends {
                let before = watched.starting;
                watched.starting = before.and_then(|of| of.on_time(now, watched.slow_start));
                if watched.starting != before {
                    any = true;
                    *last = now;
                }
            }
        }
        any
    }

    /// The backends that are to be checked.
    pub(crate) fn check_targets(&self) -> Vec<CheckTarget> {
        let checked = |pool: &Pool| {
            let check = Arc::new(pool.health_check.clone()?);
            Some(targets(pool, &check))
        };
        self.config().pools.iter().filter_map(checked).flatten().collect()
    }

    /// The backends that are to be asked whether they honour the tokens of Retries.
    pub(crate) fn token_targets(&self) -> Vec<TokenTarget> {
        let config = self.config();
        let keys: Vec<_> = check_values(config).collect();
        let shared_state = config.retry.format == TokenFormat::SharedState;
        let of_pool = |pool: &Pool| {
            let check = Arc::new(question(pool.health_check.as_ref()));
            // Whoever answers checks elsewhere, it is the backend that gets the clients' tokens.
            let target = |backend: &Backend| TokenTarget {
                target: target(pool, backend, backend.address, &check),
                keys: keys.clone(),
                shared_state,
            };
            pool.backends.iter().map(target).collect::<Vec<_>>()
        };
        let asked = config.pools.iter().filter(|pool| config.asks_for_tokens(pool));
        asked.flat_map(of_pool).collect()
    }

    /// What makes Retries and their tokens, if there are keys.
    pub(crate) fn tokens(&self) -> Option<Arc<Tokens>> {
        let routing = self.routing.load();
        let gate = &routing.listeners().next()?.gate;
        (!self.config().retry.keys.is_empty()).then(|| Arc::clone(gate.tokens()))
    }

    /// What is watched of a backend that was asked about tokens; it may have moved since, or be no more.
    fn asked(&mut self, target: &CheckTarget) -> Option<&mut Watched> {
        let (pool, name) = &target.name;
        let watched = self.fleet.get_mut(pool, name);
        watched.filter(|watched| watched.address == target.backend)
    }

    /// Takes note of by how many seconds the clock of a server is ahead, if that could be told.
    pub(crate) fn on_skew(&mut self, target: &CheckTarget, ahead: Option<i64>) {
        let Some(watched) = self.asked(target) else { return };
        let differs = |skew: Option<i64>| {
            skew.is_some_and(|ahead| ahead.unsigned_abs() > quic::token::CLOCK_SKEW.as_secs())
        };
        let (before, now) = (differs(watched.clock_skew), differs(ahead));
        watched.clock_skew = ahead;
        let (pool, backend) = &target.name;
        let address = target.backend;
        match (before, now) {
            (false, true) => {
                let hint = "tokens of Retries that are good for some seconds are refused where clocks differ by more: \
                            see to NTP on both machines";
                warn!(pool, backend, %address, ahead_seconds = ahead, hint, "the clock of the backend differs from ours");
            }
            (true, false) if ahead.is_some() => {
                info!(pool, backend, %address, "the clock of the backend does not differ any more");
            }
            _ => {}
        }
    }

    /// Takes note of whether a server has honoured tokens of each key.
    pub(crate) fn on_token_keys(
        &mut self,
        target: &CheckTarget,
        tokens: &Tokens,
        honoured: BTreeMap<u8, bool>,
    ) {
        // There may be others with the same numbers by now.
        if !tokens.check_values().eq(check_values(&self.config)) {
            return;
        }
        if let Some(watched) = self.asked(target) {
            watched.token_keys = honoured;
        }
    }

    /// Takes note of what a server has made of a token; says what is known now.
    pub(crate) fn on_token(&mut self, target: &CheckTarget, answer: TokenAnswer) -> Honours {
        let Some(watched) = self.asked(target) else { return Honours::Unknown };
        let before = watched.honours;
        watched.honours = before.on_answer(answer);
        let (pool, backend) = &target.name;
        let address = target.backend;
        match (before, watched.honours) {
            (Honours::Unknown | Honours::Yes { .. }, Honours::No) => {
                let says = "backend does not honour the tokens of Retries: clients of its pool are not asked for proof of their address";
                let hint = "compare retry.keys, retry.format and clocks; the log has why at the level debug";
                let answer = answer.label();
                warn!(pool, backend, %address, answer, hint, "{says}");
            }
            (Honours::Unknown | Honours::No, Honours::Yes { .. }) => {
                info!(pool, backend, %address, "backend honours the tokens of Retries");
            }
            _ => {}
        }
        watched.honours
    }

    /// What servers have made of keys says nothing of those of another configuration with the same numbers.
    pub(super) fn forget_token_keys(&mut self, new: &Config) {
        if !check_values(&self.config).eq(check_values(new)) {
            self.fleet.iter_mut().for_each(|watched| watched.token_keys.clear());
        }
    }

    /// Watches the backends of a new configuration: goes on with those that are where they were, and begins with the others.
    pub(super) fn watch(&mut self) {
        let Self { config, norms, check_times, grown, .. } = self;
        let is_pool = |name: &String| config.pools.iter().any(|pool| pool.name == *name);
        norms.retain(|name, _| is_pool(name));
        check_times.retain(|name, _| is_pool(name));
        grown.retain(|name, _| is_pool(name));
        let mut before = std::mem::take(&mut self.fleet).into_named();
        for (nth, (pool, wanted)) in config.pools.iter().zip(self.wanted.pools()).enumerate() {
            let mut before = before.remove(&pool.name).unwrap_or_default();
            let mut known = |of: &WantedBackend| {
                let watched = before.remove(&of.name)?;
                (watched.address == of.address.0).then_some(watched)
            };
            let mut known: Vec<_> = wanted.iter().map(&mut known).collect();
            if pool.health_check.is_none() {
                for watched in known.iter_mut().flatten() {
                    watched.checked = None;
                    watched.forget_cids();
                }
            }
            let is_known = |watched: &Watched| watched.checked.and_then(Checked::passes).is_some();
            // Where others have been checked before, a new one has to answer first.
            let is_established = known.iter().flatten().any(is_known);
            let mut places = pool.backends.iter().enumerate();
            let watched = known.into_iter().zip(wanted).map(|(known, of)| {
                let trusted = known.is_some() || !is_established;
                let mut watched = known.unwrap_or_else(|| {
                    self.totals.make_room(of.id);
                    self.baselines.begin(&self.totals, of.id);
                    let last = self.totals.of_backend(of.id.slot());
                    Watched::new(of.id, of.address.0, last)
                });
                // In the same order, though one for which there is no number is left out.
                let place = places.find(|(_, backend)| backend.name == *of.name);
                watched.place = (nth, place.map_or(0, |(place, _)| place));
                let slow_start = pool.health_check.as_ref().map(|check| check.slow_start);
                watched.slow_start = slow_start.unwrap_or_default();
                if pool.health_check.is_some() && watched.checked.is_none() {
                    watched.checked = Some(Checked::Unknown { trusted });
                }
                (Arc::clone(&of.name), watched)
            });
            self.fleet.add(&pool.name, watched);
        }
        self.heed_commands();
    }

    /// Takes note of what the operator wants of each backend, and forgets it of those that there are not.
    pub(super) fn heed_commands(&mut self) {
        let Self { commands, fleet, .. } = self;
        commands.retain(|(pool, name), _| fleet.get(pool, name).is_some());
        let wanted = self.wanted.pools().iter().flatten();
        for (watched, wanted) in self.fleet.iter_mut().zip(wanted) {
            watched.admission = wanted.admission;
        }
        for ((pool, name), command) in &self.commands {
            if let Some(watched) = self.fleet.get_mut(pool, name) {
                watched.admission = command.wanted;
            }
        }
    }

    /// The pools of which so few backends would be left that failed checks are to be ignored. Backends that wait for
    /// their first check, and those that are drained, do not count.
    pub(super) fn failing_pools(&self) -> BTreeMap<String, Left> {
        let of = |(pool, backends): (&Pool, &Vec<Watched>)| {
            let threshold = usize::from(pool.health_check.as_ref()?.panic_below);
            let (mut all, mut left, mut failing) = (0, 0, 0);
            for watched in backends {
                let awaited = watched.checked == Some(Checked::Unknown { trusted: false });
                if watched.admission == Admission::Draining || awaited {
                    continue;
                }
                all += 1;
                left += usize::from(watched.state().takes_connections());
                failing += usize::from(watched.checked.is_some_and(Checked::is_down));
            }
            let panics = failing > 0 && left * 100 < all * threshold;
            let left = if left == 0 { Left::None } else { Left::Few };
            panics.then(|| (pool.name.clone(), left))
        };
        self.config.pools.iter().zip(self.fleet.pools()).filter_map(of).collect()
    }

    /// Says which pools begin or cease to ignore their checks.
    pub(super) fn say_panics(&mut self, panics: BTreeSet<String>) {
        for pool in panics.difference(&self.panics) {
            warn!(
                pool,
                "too few backends pass their checks: these are ignored for new connections"
            );
        }
        for pool in self.panics.difference(&panics) {
            info!(pool, "enough backends pass their checks: these decide again");
        }
        self.panics = panics;
    }
}

/// The backends of a pool, to be checked like this.
fn targets(pool: &Pool, check: &Arc<HealthCheck>) -> Vec<CheckTarget> {
    let checked = |backend: &Backend| {
        let mut checked_at = backend.address;
        checked_at.set_port(check.port.unwrap_or(checked_at.port()));
        target(pool, backend, backend.check_address.unwrap_or(checked_at), check)
    };
    pool.backends.iter().map(checked).collect()
}

/// A backend of a pool, to be checked at `address`.
fn target(
    pool: &Pool,
    backend: &Backend,
    address: SocketAddr,
    check: &Arc<HealthCheck>,
) -> CheckTarget {
    let source = pool.source_addresses.iter();
    CheckTarget {
        name: (pool.name.clone(), backend.name.clone()),
        backend: backend.address,
        address,
        source: source.copied().find(|ip| ip.is_ipv4() == address.is_ipv4()),
        check: Arc::clone(check),
    }
}

/// What a passed check shows of connection IDs, which are those of the backend at this place.
fn shown(
    config: &Config,
    (pool, backend): (usize, usize),
    target: &CheckTarget,
    cids: &[ConnectionId],
) -> Shown {
    let Some(pool) = config.pools.get(pool) else { return Shown::Nothing };
    match pool.backends.get(backend) {
        Some(backend) if shows_cids(target) && !pool.cid_configs.is_empty() => {
            let good = || Shown::Good(made_by(pool, cids));
            breach(pool, backend, cids).map_or_else(good, Shown::Breach)
        }
        _ => Shown::Nothing,
    }
}

/// Whether a check shows, when it has passed, the connection IDs that clients get from the server. What answers
/// elsewhere may be another server.
fn shows_cids(target: &CheckTarget) -> bool {
    match target.check.kind {
        CheckKind::Quic(_) | CheckKind::Http3(..) => target.address == target.backend,
        CheckKind::VersionNegotiation => false,
    }
}

/// What tells the keys of tokens from others, in the order of the file.
fn check_values(config: &Config) -> impl Iterator<Item = (u8, [u8; 16])> {
    config.retry.keys.iter().map(|key| (key.sequence(), key.check_value()))
}

/// How many backends of a pool in panic get new connections when checks decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    None,
    Few,
}

pub(super) fn report(
    pool: &str,
    backend: &BackendRoute,
    was: BackendState,
    watched: Option<&Watched>,
    named: Option<&BackendRoute>,
) {
    let BackendRoute { name, address, state: is, .. } = backend;
    let (backend, was, state) = (&**name, was.label(), is.label());
    match is {
        BackendState::Active | BackendState::Probing | BackendState::Draining => {
            info!(pool, backend, %address, was, state, "backend changed its state");
        }
        BackendState::Down => {
            let by_traffic = watched.filter(|watched| watched.health.is_down());
            let silent = by_traffic.is_some_and(|watched| watched.fell_silent);
            let errno = by_traffic.and_then(|watched| watched.refusal).map(Refusal::label);
            let by_check = watched.filter(|watched| watched.checked.is_some_and(Checked::is_down));
            let check = by_check.and_then(|watched| watched.last_check).map(CheckResult::label);
            warn!(
                pool,
                backend,
                %address,
                was,
                state,
                silent,
                errno,
                check,
                "backend gets no new connections"
            );
        }
        BackendState::Miswired => {
            let names = named.map(|named| &*named.name);
            let breach = watched.and_then(|watched| watched.breach.as_ref());
            let expected = breach.map(|breach| &breach.expected);
            let found = breach.map(|breach| breach.found.to_string());
            let says = "backend answers under connection IDs that do not lead to it, and gets no new connections";
            warn!(pool, backend, %address, was, state, names, expected, found, "{says}");
        }
    }
}
