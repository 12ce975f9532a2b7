//! The state of the control plane and its decisions: the configuration, what the operator said
//! since, what the backends' health is, and the routing snapshot that follows.
//!
//! Everything that changes what is wanted ends in a new snapshot, swapped in as a whole. No flow is
//! touched by it. Filling the tables of a snapshot takes tens of milliseconds where a pool has
//! thousands of backends, so that the snapshot is ordered here and built elsewhere:
//! [`ControlPlane::order`] hands out the newest order, [`ControlPlane::install`] takes what was
//! built. What is shown (configuration, digest, states, reloads) is what is in force.
//!
//! Nothing here reads a clock, draws entropy, waits, or opens anything: the time and the seed come
//! in as arguments. What an operator has to know leaves as log records.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use quic_lb_config::{Admission, Backend, Config, HealthCheck, Listener, Pool};
use tracing::{debug, info, warn};

use super::{
    checks::state::{Checked, Thresholds},
    health::{Health, Signal},
    restart::{is_same, needs_restart},
    validation::Validation,
};
use crate::{
    admission::{AdmissionState, tokens::TokensMade},
    backend::{BackendId, BackendState},
    check::{CheckCounts, CheckResult},
    memory::Memory,
    metrics::{BackendReading, ListenerReading, PoolReading, Reading, Reloads},
    refusal::Refusal,
    registry::{Lasting, Registry},
    routing::{BackendRoute, Routing},
    totals::{BackendTotals, Baselines, Totals},
    verdict::DropReason,
    wanted::Wanted,
};

/// The names of a pool and of a backend in it.
type Name = (String, String);

/// The state of the control plane.
#[derive(Debug)]
pub(crate) struct ControlPlane {
    /// The newest configuration; it may not be in force yet.
    config: Arc<Config>,
    registry: Registry,
    /// The backends that follow from the newest configuration, commands and health.
    wanted: Arc<Wanted>,
    /// How often that, or what listeners let in, has changed.
    newest: u64,
    in_force: InForce,
    routing: Arc<ArcSwap<Routing>>,
    memory: Arc<Memory>,
    totals: Totals,
    workers: usize,
    /// Flows that the workers have room for.
    flow_capacity: usize,
    /// What the operator wants instead of what the file says.
    commands: BTreeMap<Name, Admission>,
    backends: BTreeMap<Name, Watched>,
    /// Pools of which so few backends pass their checks that these are ignored.
    panics: BTreeSet<String>,
    baselines: Baselines,
    /// By listener.
    validations: Vec<Validation>,
    /// When it was said last that most flows may be forged.
    flood_said: Option<Instant>,
    /// When it was looked last how many flows with a valid token had come to nothing, and how many.
    unfinished_seen: Option<(Instant, u64)>,
    /// Keys of tokens that were warned of.
    keys_warned_of: BTreeSet<u8>,
    /// Datagrams that went round, of which a warning has told, and when the last one did.
    loops_warned_of: (u64, Option<Instant>),
    reloads: Reloads,
    stage: Stage,
}

/// What the snapshot that workers see was made from.
#[derive(Clone, Debug)]
struct InForce {
    /// The number of its order.
    number: u64,
    config: Arc<Config>,
    /// Configurations that had been applied by then.
    applied: u64,
}

/// All that a routing snapshot is made from, at one moment.
#[derive(Debug)]
pub(crate) struct BuildOrder {
    of: InForce,
    wanted: Arc<Wanted>,
    lasting: Lasting,
    /// The snapshot in force, whose tables are taken over where nothing has changed.
    before: Arc<Routing>,
}

/// A snapshot, and the order that it was built to.
#[derive(Debug)]
pub(crate) struct Built {
    of: InForce,
    routing: Routing,
}

impl BuildOrder {
    /// Builds the snapshot. It takes as long as the tables that have to be filled.
    pub(crate) fn build(self) -> Built {
        let Self { of, wanted, lasting, before } = self;
        let routing = Routing::build(&of.config, &wanted, lasting, Some(&before));
        Built { of, routing }
    }
}

/// Where the process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Takes everything.
    Running,
    /// Goes on for a while, and should not be sent anything new.
    Draining,
    /// A worker has ended, which none should.
    Broken,
}

/// What became of a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Applied {
    /// It is the running one.
    Unchanged,
    /// It is going to be the running one, as soon as its snapshot is in force.
    Changed,
    /// It cannot become the running one while the process lives, for these reasons.
    NeedsRestart(Vec<String>),
}

/// One backend as the admin interface shows it.
#[derive(Clone, Debug)]
pub(crate) struct BackendView {
    pub(crate) pool: String,
    pub(crate) backend: Backend,
    pub(crate) state: BackendState,
    pub(crate) wanted: Admission,
    /// Whether the operator wants it, and not the file.
    pub(crate) commanded: bool,
    pub(crate) totals: BackendTotals,
    /// Half-open connections, if it has reported any lately.
    pub(crate) half_open: Option<u64>,
    /// How its active checks go, if there are any.
    pub(crate) check: Option<CheckView>,
}

/// How the active checks of a backend go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CheckView {
    /// `None` while nothing is known.
    pub(crate) passes: Option<bool>,
    pub(crate) last: Option<CheckResult>,
    pub(crate) counts: CheckCounts,
}

/// Whom to check, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CheckTarget {
    pub(crate) name: Name,
    /// Where the backend listens.
    backend: SocketAddr,
    /// Where it is checked.
    pub(crate) address: SocketAddr,
    /// Where questions leave from, if that is not left to the kernel.
    pub(crate) source: Option<IpAddr>,
    pub(crate) check: HealthCheck,
}

/// A backend, and what was seen of it.
#[derive(Debug)]
struct Watched {
    id: BackendId,
    address: SocketAddr,
    /// Whether it can be sent to.
    health: Health,
    /// Whether it answers under its own connection IDs.
    wiring: Health,
    /// What its active checks have shown, if there are any.
    checked: Option<Checked>,
    last_check: Option<CheckResult>,
    checks: CheckCounts,
    /// What the kernel said lately instead of sending to it, if it ever did.
    refusal: Option<Refusal>,
    /// The counters when the last tick ended.
    last: BackendTotals,
    /// What it said of its half-open connections, and when.
    half_open: Option<(u64, Instant)>,
}

/// How long a report of half-open connections is believed: a server that has stopped reporting has
/// other troubles.
const REPORT_LIFETIME: Duration = Duration::from_secs(10);

/// From one warning that datagrams go round to the next, at least.
const LOOP_WARNINGS: Duration = Duration::from_secs(60);

/// How often it is logged that handshakes come to nothing, and from how many on.
const UNFINISHED_SAID_EVERY: Duration = Duration::from_secs(60);
const MANY_UNFINISHED: u64 = 5;

/// How often a flood that goes on is logged.
const FLOOD_SAID_EVERY: Duration = Duration::from_secs(60);

impl ControlPlane {
    /// The control plane of `config`, before there are workers. Nobody outside should know `seed`:
    /// see [`AdmissionState::new`].
    pub(crate) fn new(config: Config, memory: Arc<Memory>, seed: [u64; 2]) -> Self {
        let mut registry = Registry::default();
        registry.admission = AdmissionState::new(seed);
        let listeners = config.listeners.iter();
        let validations =
            listeners.map(|listener| Validation::at_start(config.retry_mode(listener))).collect();
        let none = |_: &str, _: &str| None;
        let healthy = |_: &str, _: &str| BackendState::Active;
        let wanted = Wanted::new(&config.pools, none, healthy, &mut registry);
        let lasting = registry.lasting(&config);
        let routing = Routing::build(&config, &wanted, lasting, None);
        let config = Arc::new(config);
        let mut plane = Self {
            in_force: InForce { number: 0, config: Arc::clone(&config), applied: 0 },
            config,
            registry,
            wanted: Arc::new(wanted),
            newest: 0,
            routing: Arc::new(ArcSwap::from_pointee(routing)),
            memory,
            totals: Totals::default(),
            workers: 0,
            flow_capacity: 0,
            commands: BTreeMap::new(),
            backends: BTreeMap::new(),
            panics: BTreeSet::new(),
            baselines: Baselines::default(),
            validations,
            flood_said: None,
            unfinished_seen: None,
            keys_warned_of: BTreeSet::new(),
            loops_warned_of: (0, None),
            reloads: Reloads::default(),
            stage: Stage::Running,
        };
        plane.watch_wanted(&BTreeSet::new());
        plane
    }

    /// Takes note of the workers, once they run: how many there are, what they count and how many
    /// flows they have room for.
    pub(crate) fn set_workers(&mut self, workers: usize, totals: Totals, flow_capacity: usize) {
        (self.workers, self.totals, self.flow_capacity) = (workers, totals, flow_capacity);
    }

    pub(crate) fn set_stage(&mut self, stage: Stage) {
        self.stage = stage;
    }

    /// The order for the snapshot of what is wanted now; `None` while that is in force.
    pub(crate) fn order(&mut self) -> Option<BuildOrder> {
        if self.in_force.number == self.newest {
            return None;
        }
        let config = Arc::clone(&self.config);
        let of = InForce { number: self.newest, config, applied: self.reloads.applied };
        let lasting = self.registry.lasting(&self.config);
        let (wanted, before) = (Arc::clone(&self.wanted), self.routing.load_full());
        Some(BuildOrder { of, wanted, lasting, before })
    }

    /// Puts a snapshot in force, unless one of a newer order is, and says which backends changed
    /// their state.
    pub(crate) fn install(&mut self, Built { of, routing }: Built) {
        if of.number <= self.in_force.number {
            return;
        }
        let before = self.routing.swap(Arc::new(routing));
        self.in_force = of;
        let routing = self.routing.load();
        for backend in routing.backends() {
            let was = before.backend(backend.id).map(|before| before.state);
            if let Some(was) = was.filter(|was| *was != backend.state) {
                let pool = &routing.pool(backend.pool).name;
                let watched = self.backends.get(&(pool.clone(), backend.name.clone()));
                let named = watched.and_then(|watched| self.named(&routing, watched));
                report(pool, backend, was, watched, named);
            }
        }
        debug!(
            number = self.in_force.number,
            tables = routing.tables_not_in(&before),
            "snapshot in force"
        );
    }

    /// The backend whose connection IDs another one has used lately.
    fn named<'a>(&self, routing: &'a Routing, watched: &Watched) -> Option<&'a BackendRoute> {
        let slot = usize::try_from(watched.last.named).ok()?.checked_sub(1)?;
        routing.backends().find(|backend| backend.id.slot() == slot)
    }

    /// How often what is wanted has changed: the number of the newest order.
    pub(crate) const fn newest(&self) -> u64 {
        self.newest
    }

    /// The number of the order that is in force.
    pub(crate) const fn in_force(&self) -> u64 {
        self.in_force.number
    }

    /// Replaces the configuration as a whole, or leaves all as it is.
    pub(crate) fn apply(&mut self, config: Config) -> Applied {
        if is_same(&self.config, &config) {
            return Applied::Unchanged;
        }
        let reasons = needs_restart(&self.config, &config);
        if !reasons.is_empty() {
            self.reloads.rejected += 1;
            return Applied::NeedsRestart(reasons);
        }
        self.config = Arc::new(config);
        self.reloads.applied += 1;
        // It may be what was wrong; what still is shows again.
        self.backends.values_mut().for_each(|watched| watched.wiring = Health::default());
        self.want();
        Applied::Changed
    }

    /// Counts a file that could not even be read as a configuration.
    pub(crate) const fn on_rejected(&mut self) {
        self.reloads.rejected += 1;
    }

    /// Counts a look at the file that did not end in its time, or that such a one was in the way of.
    pub(crate) const fn on_hang(&mut self) {
        self.reloads.hung += 1;
    }

    /// Does what the operator says about a backend. It holds over reloads until the operator says
    /// otherwise, or the process ends. `false` when there is no such backend.
    pub(crate) fn command(&mut self, pool: &str, name: &str, wanted: Admission) -> bool {
        let Some(backend) = find(&self.config, pool, name) else { return false };
        let key = (pool.to_owned(), name.to_owned());
        // What the file says already needs no command, unless one is to be taken back; a command to
        // drain stays even then, so that an edit of the file does not end it by accident.
        if backend.admission == wanted && wanted == Admission::Active {
            self.commands.remove(&key);
        } else {
            self.commands.insert(key, wanted);
        }
        let wanted = wanted.as_str();
        info!(pool, backend = name, wanted, "operator's command");
        self.want();
        true
    }

    /// Looks at what the workers have seen of each backend since the last tick.
    pub(crate) fn on_tick(&mut self, now: Instant) {
        let mut changed = false;
        for watched in self.backends.values_mut() {
            let totals = self.totals.of_backend(watched.id.slot());
            let seen = totals.since(watched.last);
            watched.last = totals;
            let before = watched.states();
            let was_down = watched.health.is_down();
            let refused: u64 = seen.refused.about_backend().map(|(_, n)| n).sum();
            watched.health = watched.health.on_tick(now, Signal::new(seen.returned, refused));
            if watched.health.is_down() && !was_down {
                watched.checked = watched.checked.map(|checked| checked.on_refused(now));
            }
            let most = seen.refused.about_backend().max_by_key(|(_, n)| *n);
            watched.refusal = most.map(|(refusal, _)| refusal).or(watched.refusal);
            let names = Signal::of_names(seen.well_named, seen.misnamed);
            watched.wiring = watched.wiring.on_tick(now, names);
            changed |= watched.states() != before;
        }
        if changed {
            self.want();
        }
        self.watch_flows(now);
        if let Some(flows) = self.unfinished(now) {
            warn!(
                flows,
                hint = "compare retry.keys, retry.format and clocks with those of the servers",
                "clients with valid tokens get no connection"
            );
        }
        if self.validate(now) {
            self.newest += 1;
        }
        self.warn_of_loops(now);
    }

    /// Takes note of what active checks have come to.
    pub(crate) fn on_checks(&mut self, now: Instant, results: &[(Arc<CheckTarget>, CheckResult)]) {
        let mut changed = false;
        for (target, result) in results {
            let watched = self.backends.get_mut(&target.name);
            // It may have moved, or be no more.
            let watched = watched.filter(|watched| watched.address == target.backend);
            let Some(watched) = watched else { continue };
            let HealthCheck { rise, fall, .. } = target.check;
            let before = watched.states();
            let Some(checked) = &mut watched.checked else { continue };
            *checked = checked.on_result(now, *result, Thresholds { rise, fall });
            watched.checks.add(*result);
            watched.last_check = Some(*result);
            changed |= watched.states() != before;
        }
        if changed {
            self.want();
        }
    }

    /// The backends that are to be checked.
    pub(crate) fn check_targets(&self) -> Vec<CheckTarget> {
        let checked = |pool: &'_ Pool| {
            let check = pool.health_check?;
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
                            check,
                        }
                    })
                    .collect::<Vec<_>>(),
            )
        };
        self.config().pools.iter().filter_map(checked).flatten().collect()
    }

    /// Says now and then that datagrams go round.
    fn warn_of_loops(&mut self, now: Instant) {
        let listeners = 0..self.config.listeners.len();
        let dropped =
            listeners.map(|n| self.totals.of_listener(n).dropped[DropReason::Loop as usize]);
        let (told, last) = self.loops_warned_of;
        let seen: u64 = dropped.sum();
        let lately = |last| now.saturating_duration_since(last) < LOOP_WARNINGS;
        if seen > told && !last.is_some_and(lately) {
            let datagrams = seen - told;
            warn!(datagrams, "datagrams go round: a backend's address leads back to this balancer");
            self.loops_warned_of = (seen, Some(now));
        }
    }

    /// Takes note of how many half-open connections a backend says it has. `false` when there is
    /// no such backend.
    pub(crate) fn on_half_open(
        &mut self,
        now: Instant,
        pool: &str,
        name: &str,
        half_open: u64,
    ) -> bool {
        let watched = self.backends.get_mut(&(pool.to_owned(), name.to_owned()));
        watched.is_some_and(|watched| {
            watched.half_open = Some((half_open, now));
            true
        })
    }

    /// Decides about address validation on each listener; says whether anything changed.
    fn validate(&mut self, now: Instant) -> bool {
        let Self { config, validations, backends, totals, registry, .. } = self;
        let mut changed = false;
        for (index, (listener, validation)) in config.listeners.iter().zip(validations).enumerate()
        {
            let pool = &config.pools[listener.pool].name;
            let of_pool = backends.iter().filter(|((of, _), _)| of == pool);
            let half_open = of_pool.filter_map(|(_, watched)| watched.half_open(now)).max();
            let attempts = totals.of_listener(index).attempts;
            let half_open = half_open.unwrap_or(0);
            if validation.on_tick(now, config, listener, attempts, half_open) {
                let mode = config.retry_mode(listener);
                registry.admission.set_phase(index, mode, validation.phase());
                changed = true;
            }
        }
        for TokensMade { sequence, made, limit } in registry.admission.tokens_made() {
            // Half of the tokens that there may be is time to warn.
            if let Some(limit) = limit
                && made >= limit / 2
                && self.keys_warned_of.insert(sequence)
            {
                warn!(sequence, made, limit, "a key has made many tokens: put a new one in front");
            }
        }
        changed
    }

    /// The configuration in force.
    pub(crate) fn config(&self) -> &Config {
        &self.in_force.config
    }

    /// As [`Self::config`], to be kept.
    pub(crate) fn shared_config(&self) -> Arc<Config> {
        Arc::clone(&self.in_force.config)
    }

    pub(crate) const fn stage(&self) -> Stage {
        self.stage
    }

    /// Where workers find the current snapshot.
    pub(crate) const fn routing(&self) -> &Arc<ArcSwap<Routing>> {
        &self.routing
    }

    /// Flows of all workers and listeners.
    pub(crate) fn flows(&self) -> u64 {
        self.totals.flows()
    }

    /// Everything that is exported.
    pub(crate) fn reading(&self, now: Instant) -> Reading {
        let config = Arc::clone(&self.in_force.config);
        let listener = |(index, listener): (usize, &Listener)| ListenerReading {
            name: listener.name.clone(),
            totals: self.totals.of_listener(index),
            phase: self.validations[index].phase().label(),
            switches: self.validations[index].switches(),
        };
        let listeners = config.listeners.iter().enumerate().map(listener).collect();
        let backend = |view: BackendView| BackendReading {
            pool: view.pool,
            name: view.backend.name,
            state: view.state,
            totals: view.totals,
            half_open: view.half_open,
            checks: view.check.map(|check| check.counts),
        };
        let pools = config.pools.iter().filter(|pool| pool.health_check.is_some());
        let pool = |pool: &Pool| PoolReading {
            name: pool.name.clone(),
            panic: self.panics.contains(&pool.name),
        };
        let routing = self.routing.load();
        Reading {
            listeners,
            pools: pools.map(pool).collect(),
            backends: self.views(now).into_iter().map(backend).collect(),
            remembered: self.memory.sizes(&routing),
            remembered_limits: self.memory.capacity(&routing),
            flow_limit: self.flow_capacity,
            unfinished_flows: self.totals.unfinished_flows(),
            unproven_flows: self.totals.unproven_flows(),
            workers: self.workers,
            panics: self.totals.panics(),
            ready: self.stage == Stage::Running,
            tokens_made: self.registry.admission.tokens_made(),
            reloads: Reloads { applied: self.in_force.applied, ..self.reloads },
            digest: config.digest(),
        }
    }

    /// How many flows that began with a valid token have come to nothing within the last minute, once a minute; those of clients that
    /// went away are not worth a word.
    fn unfinished(&mut self, now: Instant) -> Option<u64> {
        let count = self.totals.unfinished_flows();
        let (since, before) = *self.unfinished_seen.get_or_insert((now, count));
        if now.saturating_duration_since(since) < UNFINISHED_SAID_EVERY {
            return None;
        }
        self.unfinished_seen = Some((now, count));
        Some(count - before).filter(|&more| more >= MANY_UNFINISHED)
    }

    /// Says so when most of the flow table is held by senders that may be forged.
    fn watch_flows(&mut self, now: Instant) {
        let unproven = self.totals.unproven_flows();
        let is_flood = unproven > self.flow_capacity as u64 / 2;
        let may_say_so = self
            .flood_said
            .is_none_or(|said| now.saturating_duration_since(said) >= FLOOD_SAID_EVERY);
        if is_flood && may_say_so {
            self.flood_said = Some(now);
            let limit = self.flow_capacity;
            warn!(
                unproven,
                limit, "most flows may be forged: their clients have shown no proof of being there"
            );
        }
    }

    /// Every backend, in the order of the configuration.
    pub(crate) fn views(&self, now: Instant) -> Vec<BackendView> {
        let Self { in_force, routing, totals, commands, backends, baselines, .. } = self;
        let routing = routing.load();
        let routes = routing.backends().map(|route| {
            let pool = &routing.pool(route.pool).name;
            ((pool.as_str(), route.name.as_str()), route)
        });
        let routes: BTreeMap<_, _> = routes.collect();
        let pools = in_force.config.pools.iter();
        let all = pools.flat_map(|pool| pool.backends.iter().map(move |b| (pool, b)));
        all.filter_map(|(pool, backend)| {
            let route = routes.get(&(pool.name.as_str(), backend.name.as_str()))?;
            let name = (pool.name.clone(), backend.name.clone());
            let command = commands.get(&name).copied();
            Some(BackendView {
                pool: pool.name.clone(),
                backend: backend.clone(),
                state: route.state,
                wanted: command.unwrap_or(backend.admission),
                commanded: command.is_some(),
                totals: baselines.since_it_appeared(totals, route.id),
                half_open: backends.get(&name).and_then(|watched| watched.half_open(now)),
                check: backends.get(&name).and_then(Watched::check),
            })
        })
        .collect()
    }

    /// Takes note of what is wanted now; a snapshot of it can be ordered.
    fn want(&mut self) {
        let Self { config, registry, commands, backends, .. } = self;
        let named: BTreeMap<Name, (SocketAddr, bool)> = config
            .pools
            .iter()
            .flat_map(|pool| pool.backends.iter().map(move |backend| (pool, backend)))
            .map(|(pool, backend)| {
                let name = (pool.name.clone(), backend.name.clone());
                (name, (backend.address, pool.health_check.is_some()))
            })
            .collect();
        commands.retain(|name, _| named.contains_key(name));
        backends.retain(|name, watched| {
            let (address, is_checked) = named.get(name).copied().unzip();
            watched.checked = watched.checked.filter(|_| is_checked == Some(true));
            address == Some(watched.address)
        });
        let panics = panics(config, commands, backends);
        let established = established(config, backends);
        let name = |pool: &str, name: &str| (pool.to_owned(), name.to_owned());
        let command = |pool: &str, backend: &str| commands.get(&name(pool, backend)).copied();
        let health = |pool: &str, backend: &str| match backends.get(&name(pool, backend)) {
            // Where nobody passes, all are tried, and it shows that they are down.
            Some(watched) if panics.get(pool) == Some(&Left::Few) => watched.state_of_traffic(),
            Some(watched) => watched.state(),
            // It has to answer first.
            None if established.contains(pool) => BackendState::Down,
            None => BackendState::Active,
        };
        self.wanted = Arc::new(Wanted::new(&config.pools, command, health, registry));
        self.newest += 1;
        self.watch_wanted(&established);
        self.say_panics(panics.into_keys().collect());
    }

    /// Begins to watch the backends that have appeared, and to check where that is new. In pools that are
    /// `established`, others have been checked before.
    fn watch_wanted(&mut self, established: &BTreeSet<String>) {
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
    fn say_panics(&mut self, panics: BTreeSet<String>) {
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

/// How many backends of a pool in panic get new connections when checks decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    None,
    Few,
}

/// The pools of which so few backends would be left that failed checks are to be ignored. Backends that wait for
/// their first check, and those that are drained, do not count.
fn panics(
    config: &Config,
    commands: &BTreeMap<Name, Admission>,
    backends: &BTreeMap<Name, Watched>,
) -> BTreeMap<String, Left> {
    let of = |pool: &Pool| {
        let threshold = usize::from(pool.health_check?.panic_below);
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
fn established(config: &Config, backends: &BTreeMap<Name, Watched>) -> BTreeSet<String> {
    let checked = backends
        .iter()
        .filter(|(_, watched)| watched.checked.is_some_and(|checked| checked.passes().is_some()));
    let pools: BTreeSet<_> = checked.map(|((pool, _), _)| pool.clone()).collect();
    let is_checked = |pool: &&Pool| pool.health_check.is_some() && pools.contains(&pool.name);
    config.pools.iter().filter(is_checked).map(|pool| pool.name.clone()).collect()
}

impl Watched {
    /// What is known of it: its traffic or its checks alone are enough to have it down.
    fn state(&self) -> BackendState {
        if self.checked.is_some_and(Checked::is_down) {
            return BackendState::Down;
        }
        self.state_of_traffic()
    }

    /// What is known of it without checks.
    fn state_of_traffic(&self) -> BackendState {
        match (self.health.is_down(), self.wiring.is_down()) {
            (true, _) => BackendState::Down,
            (false, true) => BackendState::Miswired,
            (false, false) => BackendState::Active,
        }
    }

    /// All that what is wanted goes by.
    fn states(&self) -> (BackendState, BackendState) {
        (self.state(), self.state_of_traffic())
    }

    fn check(&self) -> Option<CheckView> {
        let passes = self.checked?.passes();
        Some(CheckView { passes, last: self.last_check, counts: self.checks })
    }

    fn half_open(&self, now: Instant) -> Option<u64> {
        let (half_open, at) = self.half_open?;
        (now.saturating_duration_since(at) < REPORT_LIFETIME).then_some(half_open)
    }
}

fn report(
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
            let says =
                "backend answers under connection IDs of another, and gets no new connections";
            warn!(pool, backend, %address, was, state, names, "{says}");
        }
    }
}

fn find<'a>(config: &'a Config, pool: &str, name: &str) -> Option<&'a Backend> {
    let pool = config.pools.iter().find(|candidate| candidate.name == pool)?;
    pool.backends.iter().find(|backend| backend.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{counters::WorkerCounters, fixtures};

    const TICK: Duration = Duration::from_millis(200);

    struct Bench {
        plane: ControlPlane,
        worker: Arc<WorkerCounters>,
        now: Instant,
    }

    impl Bench {
        fn new() -> Self {
            Self::of(fixtures::config(true))
        }

        fn of(config: Config) -> Self {
            let now = Instant::now();
            let memory = Arc::new(Memory::new(100, now, [0; 4]));
            let mut plane = ControlPlane::new(config, memory, [1, 2]);
            let worker = Arc::new(WorkerCounters::new(1));
            let mut totals = Totals::default();
            totals.add(Arc::clone(&worker));
            plane.set_workers(1, totals, 1000);
            Self { plane, worker, now }
        }

        fn tick(&mut self) {
            self.now += TICK;
            self.plane.on_tick(self.now);
            self.build();
        }

        /// What the builder does.
        fn build(&mut self) {
            while let Some(order) = self.plane.order() {
                self.plane.install(order.build());
            }
        }

        fn command(&mut self, name: &str, wanted: Admission) -> bool {
            let known = self.plane.command("web", name, wanted);
            self.build();
            known
        }

        fn reload(&mut self, change: impl FnOnce(&mut Config)) -> Applied {
            let mut config = fixtures::config(true);
            change(&mut config);
            let applied = self.plane.apply(config);
            self.build();
            applied
        }

        fn view(&self, name: &str) -> BackendView {
            self.plane.views(self.now).into_iter().find(|view| view.backend.name == name).unwrap()
        }

        fn state(&self, name: &str) -> BackendState {
            self.view(name).state
        }

        fn slot(&self, name: &str) -> usize {
            let routing = self.plane.routing().load();
            routing.backends().find(|backend| backend.name == name).unwrap().id.slot()
        }
    }

    fn name(backend: &str) -> Name {
        ("web".to_owned(), backend.to_owned())
    }

    #[test]
    fn handshakes_that_come_to_nothing_are_told_once_a_minute_if_there_are_several() {
        let mut bench = Bench::new();
        for (second, more, told) in [
            (0, 7, None),
            (30, 9, None),
            (60, 0, Some(9)),
            (90, 9, None),
            (121, 1, Some(10)),
            (200, 4, None),
            (300, 4, None),
        ] {
            bench.worker.unfinished_flows.add(more);
            let at = bench.now + Duration::from_secs(second);
            assert_eq!(bench.plane.unfinished(at), told, "{second}");
        }
    }

    #[test]
    fn a_backend_that_refuses_goes_down_and_comes_back_when_it_answers() {
        let mut bench = Bench::new();
        let slot = bench.slot("a");
        bench.worker.backends[slot].refuse(Refusal::ConnectionRefused, 3);
        bench.tick();
        assert_eq!(bench.state("a"), BackendState::Down);
        assert_eq!(bench.state("b"), BackendState::Active);
        bench.worker.backends[slot].returned.add(1);
        bench.tick();
        assert_eq!(bench.state("a"), BackendState::Active);
    }

    #[test]
    fn a_backend_that_cannot_be_sent_to_goes_down_whatever_the_kernel_calls_it() {
        for refusal in Refusal::ALL {
            let mut bench = Bench::new();
            let slot = bench.slot("a");
            bench.worker.backends[slot].refuse(refusal, 2);
            bench.tick();
            assert_eq!(bench.state("a"), BackendState::Active, "{refusal:?}, twice");
            bench.worker.backends[slot].refuse(refusal, 1);
            bench.tick();
            let (state, said) = match refusal.is_about_backend() {
                true => (BackendState::Down, Some(refusal)),
                false => (BackendState::Active, None),
            };
            assert_eq!(bench.state("a"), state, "{refusal:?}");
            assert_eq!(bench.plane.backends[&name("a")].refusal, said);
            assert_eq!(bench.state("b"), BackendState::Active);
        }
    }

    /// A bench of which the pool is checked.
    fn checked() -> Bench {
        let mut config = fixtures::config(true);
        config.pools[0].health_check = Some(health_check());
        Bench::of(config)
    }

    fn health_check() -> HealthCheck {
        HealthCheck {
            kind: quic_lb_config::CheckKind::VersionNegotiation,
            interval: Duration::from_secs(1),
            timeout: Duration::from_millis(500),
            rise: 2.try_into().unwrap(),
            fall: 2.try_into().unwrap(),
            port: Some(7),
            panic_below: 50,
        }
    }

    impl Bench {
        fn target(&self, backend: &str) -> Arc<CheckTarget> {
            let targets = self.plane.check_targets().into_iter();
            Arc::new({ targets }.find(|target| target.name == name(backend)).unwrap())
        }

        fn check(&mut self, backend: &str, results: &[CheckResult]) -> BackendState {
            for result in results {
                let told = [(self.target(backend), *result)];
                self.plane.on_checks(self.now, &told);
            }
            self.build();
            self.state(backend)
        }
    }

    #[test]
    fn failed_checks_take_a_backend_down_and_passed_ones_bring_it_back() {
        use CheckResult::{Answered, Timeout, Wrong};
        let mut bench = checked();
        assert_eq!(bench.check("a", &[Answered]), BackendState::Active);
        assert_eq!(bench.check("a", &[Timeout]), BackendState::Active);
        assert_eq!(bench.check("a", &[Wrong]), BackendState::Down);
        assert_eq!(bench.state("b"), BackendState::Active);
        let view = bench.view("a").check.unwrap();
        assert_eq!((view.passes, view.last), (Some(false), Some(Wrong)));
        assert_eq!(view.counts.iter().map(|(_, n)| n).collect::<Vec<_>>(), [1, 1, 0, 1, 0]);
        assert_eq!(bench.check("a", &[Answered]), BackendState::Down);
        assert_eq!(bench.check("a", &[Answered]), BackendState::Active);
        // A draining one is checked too, and stays what the operator wants.
        bench.command("a", Admission::Draining);
        assert_eq!(bench.check("a", &[Timeout, Timeout]), BackendState::Draining);
    }

    #[test]
    fn the_first_check_of_a_process_decides_alone_and_until_then_all_get_connections() {
        let mut bench = checked();
        for backend in ["a", "b", "c"] {
            assert_eq!(bench.state(backend), BackendState::Active);
        }
        assert_eq!(bench.check("a", &[CheckResult::Timeout]), BackendState::Down);
    }

    #[test]
    fn who_joins_a_pool_that_is_checked_has_to_answer_first() {
        let mut bench = checked();
        bench.check("a", &[CheckResult::Answered]);
        let change = |config: &mut Config| {
            config.pools[0].health_check = Some(health_check());
            let backend = config.pools[0].backends[0].clone();
            let address = ([127, 0, 0, 1], 6001).into();
            let server_ids = vec![(fixtures::cid_config().id(), fixtures::server_id(9))];
            let joined = Backend { name: "d".into(), address, server_ids, ..backend };
            config.pools[0].backends.push(joined);
        };
        assert_eq!(bench.reload(change), Applied::Changed);
        let states = ["a", "b", "c", "d"].map(|name| bench.state(name));
        let (active, down) = (BackendState::Active, BackendState::Down);
        assert_eq!(states, [active, active, active, down]);
        assert!(bench.plane.panics.is_empty());
        // Where nothing can be asked, nobody is kept waiting.
        assert_eq!(bench.check("d", &[CheckResult::Unsent]), active);
        assert_eq!(bench.check("d", &[CheckResult::Timeout]), down);
        assert_eq!(bench.check("d", &[CheckResult::Answered; 2]), active);
    }

    #[test]
    fn who_was_refused_has_to_pass_its_checks_too() {
        let mut bench = checked();
        let slot = bench.slot("a");
        bench.check("a", &[CheckResult::Answered]);
        bench.worker.backends[slot].refuse(Refusal::ConnectionRefused, 3);
        bench.tick();
        assert_eq!(bench.state("a"), BackendState::Down);
        // Its traffic alone would have it back.
        bench.worker.backends[slot].returned.add(1);
        bench.tick();
        assert_eq!(bench.state("a"), BackendState::Down);
        assert_eq!(bench.check("a", &[CheckResult::Answered; 2]), BackendState::Active);
        // And its checks alone do not help against what its traffic says.
        bench.worker.backends[slot].refuse(Refusal::ConnectionRefused, 1);
        bench.tick();
        bench.now += Duration::from_secs(3);
        assert_eq!(bench.check("a", &[CheckResult::Answered; 9]), BackendState::Down);
    }

    #[test]
    fn where_fewer_than_half_are_left_failed_checks_are_ignored() {
        let mut bench = checked();
        let failed = [CheckResult::Timeout; 2];
        let states = |bench: &Bench| ["a", "b", "c"].map(|name| bench.state(name));
        let panics = |bench: &Bench| bench.plane.reading(bench.now).pools[0].panic;
        let (active, down) = (BackendState::Active, BackendState::Down);
        bench.check("a", &failed);
        assert_eq!((states(&bench), panics(&bench)), ([down, active, active], false));
        bench.check("b", &failed);
        assert_eq!((states(&bench), panics(&bench)), ([active; 3], true));
        // One that was refused is not believed to be well.
        let slot = bench.slot("b");
        bench.worker.backends[slot].refuse(Refusal::ConnectionRefused, 3);
        bench.tick();
        assert_eq!((states(&bench), panics(&bench)), ([active, down, active], true));
        // Where none is left, all are tried anyway, and are shown as what they are.
        bench.check("c", &failed);
        assert_eq!((states(&bench), panics(&bench)), ([down; 3], true));
        bench.check("a", &[CheckResult::Answered; 2]);
        assert_eq!((states(&bench), panics(&bench)), ([active, down, active], true));
        bench.check("c", &[CheckResult::Answered; 2]);
        assert_eq!((states(&bench), panics(&bench)), ([active, down, active], false));
        // Drained ones are not missed.
        bench.command("a", Admission::Draining);
        assert!(!panics(&bench));
    }

    #[test]
    fn checks_that_the_file_does_not_name_any_more_mean_nothing() {
        let mut bench = checked();
        let before = bench.target("a");
        assert_eq!((before.address.port(), before.backend.port()), (7, 5001));
        bench.check("a", &[CheckResult::Timeout]);
        assert_eq!(bench.reload(|_| {}), Applied::Changed);
        assert!(bench.plane.check_targets().is_empty());
        assert_eq!(bench.state("a"), BackendState::Active);
        bench.plane.on_checks(bench.now, &[(Arc::clone(&before), CheckResult::Timeout)]);
        bench.build();
        assert_eq!(bench.state("a"), BackendState::Active);
        assert!(bench.view("a").check.is_none());
        // One that has moved is another.
        let move_away = |config: &mut Config| {
            config.pools[0].health_check = Some(health_check());
            config.pools[0].backends[0].address.set_port(6001);
        };
        bench.reload(move_away);
        bench.plane.on_checks(bench.now, &[(before, CheckResult::Timeout)]);
        bench.build();
        assert_eq!(bench.state("a"), BackendState::Active);
    }

    #[test]
    fn a_backend_that_answers_under_anothers_name_is_miswired_until_it_does_not() {
        let mut bench = Bench::new();
        let [a, b] = ["a", "b"].map(|name| bench.slot(name));
        let another = bench.plane.routing().load().backends().find(|of| of.name == "b").unwrap().id;
        let answer = |bench: &mut Bench, another| {
            bench.worker.backends[a].answer(another);
            bench.tick();
            bench.state("a")
        };
        // Now and then is chance, and so is what is mixed with good ones.
        for _ in 0..10 {
            assert_eq!(answer(&mut bench, Some(another)), BackendState::Active);
            assert_eq!(answer(&mut bench, Some(another)), BackendState::Active);
            assert_eq!(answer(&mut bench, None), BackendState::Active);
        }
        assert_eq!(answer(&mut bench, Some(another)), BackendState::Active);
        assert_eq!(answer(&mut bench, Some(another)), BackendState::Active);
        assert_eq!(answer(&mut bench, Some(another)), BackendState::Miswired);
        assert_eq!(bench.state("b"), BackendState::Active);
        let routing = bench.plane.routing().load_full();
        let named = bench.plane.named(&routing, &bench.plane.backends[&name("a")]).unwrap();
        assert_eq!((named.name.as_str(), named.id.slot()), ("b", b));
        // What is worse goes before it, and what the operator wants before both.
        bench.worker.backends[a].refuse(Refusal::ConnectionRefused, 3);
        bench.tick();
        assert_eq!(bench.state("a"), BackendState::Down);
        bench.worker.backends[a].returned.add(1);
        bench.tick();
        assert_eq!(bench.state("a"), BackendState::Miswired);
        bench.command("a", Admission::Draining);
        assert_eq!(bench.state("a"), BackendState::Draining);
        bench.command("a", Admission::Active);
        assert_eq!(bench.state("a"), BackendState::Miswired);
        assert_eq!(answer(&mut bench, None), BackendState::Active);
    }

    #[test]
    fn a_miswired_backend_is_tried_again_and_a_reload_forgives_it() {
        let mut bench = Bench::new();
        let slot = bench.slot("a");
        let another = bench.plane.routing().load().backends().find(|of| of.name == "b").unwrap().id;
        let misnamed = |bench: &mut Bench| {
            (0..3).for_each(|_| bench.worker.backends[slot].answer(Some(another)));
            bench.tick();
            assert_eq!(bench.state("a"), BackendState::Miswired);
        };
        misnamed(&mut bench);
        for _ in 0..100 {
            bench.tick();
        }
        assert_eq!(bench.state("a"), BackendState::Active, "for a trial");
        misnamed(&mut bench);
        let mend = |config: &mut Config| config.pools[0].backends[0].weight = 7.try_into().unwrap();
        assert_eq!(bench.reload(mend), Applied::Changed);
        assert_eq!(bench.state("a"), BackendState::Active);
    }

    #[test]
    fn health_survives_a_reload_and_ends_with_the_address() {
        let mut bench = Bench::new();
        let slot = bench.slot("a");
        bench.worker.backends[slot].refuse(Refusal::ConnectionRefused, 3);
        bench.tick();
        let weigh = |config: &mut Config| {
            config.pools[0].backends[0].weight = 7.try_into().unwrap();
        };
        assert_eq!(bench.reload(weigh), Applied::Changed);
        assert_eq!(bench.state("a"), BackendState::Down);
        let move_away = |config: &mut Config| config.pools[0].backends[0].address.set_port(6001);
        assert_eq!(bench.reload(move_away), Applied::Changed);
        assert_eq!(bench.state("a"), BackendState::Active);
        assert_ne!(bench.slot("a"), slot);
    }

    #[test]
    fn the_operators_command_holds_over_reloads_until_the_opposite() {
        let mut bench = Bench::new();
        assert!(bench.command("a", Admission::Draining));
        assert_eq!(bench.state("a"), BackendState::Draining);
        let weigh = |config: &mut Config| {
            config.pools[0].backends[1].weight = 7.try_into().unwrap();
        };
        bench.reload(weigh);
        assert_eq!(bench.state("a"), BackendState::Draining);
        let view = bench.view("a");
        assert_eq!((view.wanted, view.commanded), (Admission::Draining, true));
        assert!(bench.command("a", Admission::Active));
        let view = bench.view("a");
        assert_eq!((view.state, view.commanded), (BackendState::Active, false));
    }

    #[test]
    fn the_operator_can_activate_what_the_file_drains() {
        let mut bench = Bench::new();
        let drain =
            |config: &mut Config| config.pools[0].backends[0].admission = Admission::Draining;
        bench.reload(drain);
        assert_eq!(bench.state("a"), BackendState::Draining);
        assert!(bench.command("a", Admission::Active));
        assert_eq!(bench.state("a"), BackendState::Active);
        assert!(bench.view("a").commanded);
    }

    #[test]
    fn a_command_to_nobody_changes_nothing() {
        let mut bench = Bench::new();
        let before = bench.plane.routing().load_full();
        assert!(!bench.command("x", Admission::Draining));
        assert!(!bench.plane.command("x", "a", Admission::Draining));
        assert!(Arc::ptr_eq(&before, &bench.plane.routing().load_full()));
    }

    #[test]
    fn a_command_ends_with_its_backend() {
        let mut bench = Bench::new();
        bench.command("a", Admission::Draining);
        bench.reload(|config| drop(config.pools[0].backends.remove(0)));
        assert_eq!(bench.reload(|_| {}), Applied::Changed);
        assert_eq!(bench.state("a"), BackendState::Active);
    }

    #[test]
    fn the_same_configuration_is_no_event() {
        let mut bench = Bench::new();
        let before = bench.plane.routing().load_full();
        assert_eq!(bench.reload(|_| {}), Applied::Unchanged);
        assert!(Arc::ptr_eq(&before, &bench.plane.routing().load_full()));
        assert_eq!(bench.plane.reading(bench.now).reloads, Reloads::default());
    }

    #[test]
    fn a_new_key_alone_is_a_change() {
        use quic::routable::{CidConfig, ConfigId, Key};
        let mut bench = Bench::new();
        let id = ConfigId::new(0).unwrap();
        let other = CidConfig::new(id, 2, 6, Some(&Key::new([8; 16]))).unwrap();
        assert_eq!(bench.reload(|c| c.pools[0].cid_configs = vec![other]), Applied::Changed);
        assert_eq!(
            bench.plane.reading(bench.now).reloads,
            Reloads { applied: 1, rejected: 0, hung: 0 }
        );
    }

    #[test]
    fn what_needs_a_restart_is_refused_as_a_whole_and_named() {
        let mut bench = Bench::new();
        let before = bench.plane.routing().load_full();
        let outcome = bench.reload(|config| {
            config.workers = 4.try_into().ok();
            let address = "127.0.0.1:9090".parse().unwrap();
            config.admin = Some(quic_lb_config::Admin { address, host_names: vec![] });
            config.limits.flows = 7.try_into().unwrap();
            config.limits.remembered = 7.try_into().unwrap();
            config.log.format = quic_lb_config::LogFormat::Json;
            config.listeners[0].name = "other".into();
            config.pools[0].backends.clear();
        });
        let Applied::NeedsRestart(reasons) = outcome else { panic!("{outcome:?}") };
        assert_eq!(
            reasons,
            [
                "workers changes from one for each core to 4",
                "admin.address changes from no address to 127.0.0.1:9090",
                "limits.flows changes from 1000 to 7",
                "limits.remembered changes from 1000 to 7",
                "log.format changes from text to json",
                "listener edge is gone",
                "listener other is new",
            ]
        );
        assert!(Arc::ptr_eq(&before, &bench.plane.routing().load_full()));
        assert_eq!(
            bench.plane.reading(bench.now).reloads,
            Reloads { applied: 0, rejected: 1, hung: 0 }
        );
    }

    #[test]
    fn a_backend_that_comes_back_counts_on() {
        let mut bench = Bench::new();
        let slot = bench.slot("a");
        bench.worker.backends[slot].forwarded.add(10);
        bench.reload(|config| drop(config.pools[0].backends.remove(0)));
        bench.reload(|config| config.pools[0].backends[1].weight = 7.try_into().unwrap());
        assert_eq!(bench.view("a").totals.forwarded, 10);
    }

    #[test]
    fn the_newest_order_wins_and_an_older_one_changes_nothing() {
        let mut bench = Bench::new();
        assert!(bench.plane.order().is_none(), "all that is wanted is in force");
        assert!(bench.plane.command("web", "a", Admission::Draining));
        let older = bench.plane.order().unwrap();
        assert!(bench.plane.command("web", "b", Admission::Draining));
        assert_eq!(bench.state("a"), BackendState::Active, "nothing is in force yet");
        let newer = bench.plane.order().unwrap();
        bench.plane.install(newer.build());
        assert_eq!(bench.plane.in_force(), bench.plane.newest());
        let states = |bench: &Bench| (bench.state("a"), bench.state("b"));
        assert_eq!(states(&bench), (BackendState::Draining, BackendState::Draining));
        bench.plane.install(older.build());
        assert_eq!(states(&bench), (BackendState::Draining, BackendState::Draining));
        assert!(bench.plane.order().is_none());
    }

    #[test]
    fn what_is_shown_is_what_is_in_force() {
        let mut bench = Bench::new();
        let mut config = fixtures::config(true);
        config.pools[0].backends.remove(0);
        let digest = config.digest();
        assert_eq!(bench.plane.apply(config), Applied::Changed);
        let shown = |bench: &Bench| {
            let reading = bench.plane.reading(bench.now);
            let masked = bench.plane.config().digest();
            (
                reading.digest == digest,
                masked == digest,
                reading.reloads.applied,
                reading.backends.len(),
            )
        };
        assert_eq!(shown(&bench), (false, false, 0, 3));
        bench.build();
        assert_eq!(shown(&bench), (true, true, 1, 2));
    }

    #[test]
    fn a_backend_that_changes_its_state_rebuilds_the_table_of_its_pool_alone() {
        let mut config = fixtures::config(true);
        let mut other = config.pools[0].clone();
        other.name = "api".into();
        config.pools.push(other);
        let mut bench = Bench::of(config);
        let tables = |bench: &mut Bench, change: &dyn Fn(&mut Bench)| {
            let before = bench.plane.routing().load_full();
            change(bench);
            bench.build();
            let after = bench.plane.routing().load_full();
            assert!(!Arc::ptr_eq(&before, &after), "another snapshot");
            after.tables_not_in(&before)
        };
        let drain =
            |bench: &mut Bench| assert!(bench.plane.command("web", "a", Admission::Draining));
        assert_eq!(tables(&mut bench, &drain), 1);
        let down = |bench: &mut Bench| {
            bench.worker.backends[bench.slot("b")].refuse(Refusal::ConnectionRefused, 3);
            bench.plane.on_tick(bench.now);
        };
        assert_eq!(tables(&mut bench, &down), 1);
        // What is wanted is the same, and what a listener lets in is not in any table.
        let repeat =
            |bench: &mut Bench| assert!(bench.plane.command("web", "a", Admission::Draining));
        assert_eq!(tables(&mut bench, &repeat), 0);
        let both = |bench: &mut Bench| {
            assert!(bench.plane.command("web", "a", Admission::Active));
            assert!(bench.plane.command("api", "a", Admission::Draining));
        };
        assert_eq!(tables(&mut bench, &both), 2);
    }

    #[test]
    fn datagrams_that_go_round_are_told_of_once_a_minute() {
        let mut bench = Bench::new();
        let told = |bench: &Bench| bench.plane.loops_warned_of.0;
        bench.worker.listeners[0].drop(DropReason::Loop, 3);
        bench.tick();
        assert_eq!(told(&bench), 3);
        bench.worker.listeners[0].drop(DropReason::Loop, 2);
        bench.tick();
        assert_eq!(told(&bench), 3);
        bench.now += LOOP_WARNINGS;
        bench.tick();
        assert_eq!(told(&bench), 5);
    }

    #[test]
    fn ready_is_said_while_running_only() {
        let mut bench = Bench::new();
        for (stage, ready) in
            [(Stage::Running, true), (Stage::Draining, false), (Stage::Broken, false)]
        {
            bench.plane.set_stage(stage);
            assert_eq!(bench.plane.reading(bench.now).ready, ready);
        }
    }
}
