//! The backends as far as their health goes: who is watched and checked, what checks have come to, what that means for a
//! pool as a whole, and what is said of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use quic_lb_config::{Admission, CheckKind, Config, HealthCheck, Pool};
use tracing::{info, warn};

use super::{
    ControlPlane, find,
    watched::{Name, Watched},
};
use crate::{
    backend::BackendState,
    check::{CheckCounts, CheckResult, Finding},
    control::{
        checks::{
            contract::{Contract, breach},
            state::{Checked, Thresholds},
        },
        health::Health,
    },
    refusal::Refusal,
    routing::BackendRoute,
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

impl ControlPlane {
    /// Takes note of what active checks have found.
    pub(crate) fn on_checks(&mut self, now: Instant, findings: &[(Arc<CheckTarget>, Finding)]) {
        let config = Arc::clone(&self.config);
        let mut changed = false;
        for (target, Finding { result, cids }) in findings {
            let watched = self.backends.get_mut(&target.name);
            // It may have moved, or be no more.
            let watched = watched.filter(|watched| watched.address == target.backend);
            let Some(watched) = watched else { continue };
            let HealthCheck { rise, fall, .. } = *target.check;
            let before = watched.states();
            let Some(checked) = &mut watched.checked else { continue };
            *checked = checked.on_result(now, *result, Thresholds { rise, fall });
            let mut result = *result;
            if result == CheckResult::Answered {
                let (pool, name) = &target.name;
                match find(&config, pool, name) {
                    Some((pool, backend)) if shows_cids(target) && !pool.cid_configs.is_empty() => {
                        let breach = breach(pool, backend, cids);
                        if breach.is_some() {
                            result = CheckResult::Miswired;
                        }
                        watched.on_cids(breach);
                    }
                    _ => watched.forget_cids(),
                }
            }
            watched.checks.add(result);
            watched.last_check = Some(result);
            changed |= watched.states() != before;
        }
        if changed {
            self.want();
        }
    }

    /// The backends that are to be checked.
    pub(crate) fn check_targets(&self) -> Vec<CheckTarget> {
        let checked = |pool: &'_ Pool| {
            let check = Arc::new(pool.health_check.clone()?);
            Some(
                pool.backends
                    .iter()
                    .map(move |backend| {
                        let address = backend.address;
                        let source = pool.source_addresses.iter();
                        let source = source.copied().find(|ip| ip.is_ipv4() == address.is_ipv4());
                        let mut checked_at = address;
                        checked_at.set_port(check.port.unwrap_or(address.port()));
                        CheckTarget {
                            name: (pool.name.clone(), backend.name.clone()),
                            backend: address,
                            address: checked_at,
                            source,
                            check: Arc::clone(&check),
                        }
                    })
                    .collect::<Vec<_>>(),
            )
        };
        self.config().pools.iter().filter_map(checked).flatten().collect()
    }

    /// Begins to watch the backends that have appeared, and to check where that is new. In pools that are
    /// `established`, others have been checked before.
    pub(super) fn watch_wanted(&mut self, established: &BTreeSet<String>) {
        for (pool, wanted) in self.config.pools.iter().zip(self.wanted.pools()) {
            for backend in wanted {
                let name = (pool.name.clone(), backend.name.clone());
                let mut trusted = true;
                let watched = self.backends.entry(name).or_insert_with(|| {
                    trusted = !established.contains(&pool.name);
                    self.baselines.begin(&self.totals, backend.id);
                    Watched {
                        id: backend.id,
                        address: backend.address.0,
                        health: Health::default(),
                        wiring: Health::default(),
                        checked: None,
                        contract: Contract::default(),
                        breach: None,
                        last_check: None,
                        checks: CheckCounts::default(),
                        refusal: None,
                        last: self.totals.of_backend(backend.id.slot()),
                        half_open: None,
                    }
                });
                if pool.health_check.is_some() && watched.checked.is_none() {
                    watched.checked = Some(Checked::Unknown { trusted });
                }
            }
        }
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

/// Whether a check of this kind shows connection IDs of the server when it has passed.
fn shows_cids(target: &CheckTarget) -> bool {
    match target.check.kind {
        CheckKind::Quic(_) | CheckKind::Http3(..) => true,
        CheckKind::VersionNegotiation => false,
    }
}

/// How many backends of a pool in panic get new connections when checks decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    None,
    Few,
}

/// The pools of which so few backends would be left that failed checks are to be ignored. Backends that wait for
/// their first check, and those that are drained, do not count.
pub(super) fn panics(
    config: &Config,
    commands: &BTreeMap<Name, Admission>,
    backends: &BTreeMap<Name, Watched>,
) -> BTreeMap<String, Left> {
    let of = |pool: &Pool| {
        let threshold = usize::from(pool.health_check.as_ref()?.panic_below);
        let (mut all, mut left, mut failing) = (0, 0, 0);
        for backend in &pool.backends {
            let name = (pool.name.clone(), backend.name.clone());
            let admission = commands.get(&name).copied().unwrap_or(backend.admission);
            let Some(watched) = backends.get(&name) else { continue };
            let awaited = watched.checked == Some(Checked::Unknown { trusted: false });
            if admission == Admission::Draining || awaited {
                continue;
            }
            all += 1;
            left += usize::from(watched.state() == BackendState::Active);
            failing += usize::from(watched.checked.is_some_and(Checked::is_down));
        }
        let panics = failing > 0 && left * 100 < all * threshold;
        panics.then(|| (pool.name.clone(), if left == 0 { Left::None } else { Left::Few }))
    };
    config.pools.iter().filter_map(of).collect()
}

/// The pools of which some backend has been checked.
pub(super) fn established(config: &Config, backends: &BTreeMap<Name, Watched>) -> BTreeSet<String> {
    let checked = backends
        .iter()
        .filter(|(_, watched)| watched.checked.is_some_and(|checked| checked.passes().is_some()));
    let pools: BTreeSet<_> = checked.map(|((pool, _), _)| pool.clone()).collect();
    let is_checked = |pool: &&Pool| pool.health_check.is_some() && pools.contains(&pool.name);
    config.pools.iter().filter(is_checked).map(|pool| pool.name.clone()).collect()
}

pub(super) fn report(
    pool: &str,
    backend: &BackendRoute,
    was: BackendState,
    watched: Option<&Watched>,
    named: Option<&BackendRoute>,
) {
    let BackendRoute { name, address, state: is, .. } = backend;
    let (backend, was, state) = (name, was.label(), is.label());
    match is {
        BackendState::Active | BackendState::Draining => {
            info!(pool, backend, %address, was, state, "backend changed its state");
        }
        BackendState::Down => {
            let by_traffic = watched.filter(|watched| watched.health.is_down());
            let errno = by_traffic.and_then(|watched| watched.refusal).map(Refusal::label);
            let by_check = watched.filter(|watched| watched.checked.is_some_and(Checked::is_down));
            let check = by_check.and_then(|watched| watched.last_check).map(CheckResult::label);
            warn!(pool, backend, %address, was, state, errno, check, "backend gets no new connections");
        }
        BackendState::Miswired => {
            let names = named.map(|named| &named.name);
            let breach = watched.and_then(|watched| watched.breach.as_ref());
            let expected = breach.map(|breach| &breach.expected);
            let found = breach.map(|breach| breach.found.to_string());
            let says = "backend answers under connection IDs that do not lead to it, and gets no new connections";
            warn!(pool, backend, %address, was, state, names, expected, found, "{says}");
        }
    }
}
