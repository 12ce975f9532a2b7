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
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use quic_lb_config::{Admission, Backend, Config, Listener};
use tracing::{debug, info, warn};

use super::{
    health::{Health, Signal},
    restart::{is_same, needs_restart},
    validation::Validation,
};
use crate::{
    admission::{Gate, Ledger, tokens::TokensMade},
    backend::{BackendId, BackendState},
    memory::Memory,
    metrics::{BackendReading, ListenerReading, Reading, Reloads},
    registry::Registry,
    routing::{BackendRoute, Routing},
    totals::{BackendTotals, Baselines, Totals},
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
    baselines: Baselines,
    /// By listener.
    validations: Vec<Validation>,
    /// Keys of tokens that were warned of.
    keys_warned_of: BTreeSet<u8>,
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
    gates: Vec<Gate>,
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
        let Self { of, wanted, gates, before } = self;
        let routing = Routing::build(&of.config, &wanted, gates, Some(&before));
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
}

/// A backend, and what was seen of it.
#[derive(Debug)]
struct Watched {
    id: BackendId,
    address: SocketAddr,
    health: Health,
    /// The counters when the last tick ended.
    last: BackendTotals,
    /// What it said of its half-open connections, and when.
    half_open: Option<(u64, Instant)>,
}

/// How long a report of half-open connections is believed: a server that has stopped reporting has
/// other troubles.
const REPORT_LIFETIME: Duration = Duration::from_secs(10);

impl ControlPlane {
    /// The control plane of `config`, before there are workers. Nobody outside should know `seed`:
    /// see [`Ledger::new`].
    pub(crate) fn new(config: Config, memory: Arc<Memory>, seed: [u64; 2]) -> Self {
        let mut registry = Registry::default();
        registry.ledger = Ledger::new(seed);
        let listeners = config.listeners.iter();
        let validations =
            listeners.map(|listener| Validation::at_start(config.retry_mode(listener))).collect();
        let none = |_: &str, _: &str| None;
        let healthy = |_: &str, _: &str| BackendState::Active;
        let wanted = Wanted::new(&config.pools, none, healthy, &mut registry);
        let gates = registry.ledger.gates(&config);
        let routing = Routing::build(&config, &wanted, gates, None);
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
            baselines: Baselines::default(),
            validations,
            keys_warned_of: BTreeSet::new(),
            reloads: Reloads::default(),
            stage: Stage::Running,
        };
        plane.watch_wanted();
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
        let gates = self.registry.ledger.gates(&self.config);
        let (wanted, before) = (Arc::clone(&self.wanted), self.routing.load_full());
        Some(BuildOrder { of, wanted, gates, before })
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
                report(&routing.pool(backend.pool).name, backend, was);
            }
        }
        debug!(
            number = self.in_force.number,
            tables = routing.tables_not_in(&before),
            "snapshot in force"
        );
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
        self.want();
        Applied::Changed
    }

    /// Counts a file that could not even be read as a configuration.
    pub(crate) const fn on_rejected(&mut self) {
        self.reloads.rejected += 1;
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
            let before = watched.health.state();
            watched.health = watched.health.on_tick(now, Signal::new(seen.returned, seen.refused));
            changed |= watched.health.state() != before;
        }
        if changed {
            self.want();
        }
        if self.validate(now) {
            self.newest += 1;
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
                registry.ledger.set_phase(index, mode, validation.phase());
                changed = true;
            }
        }
        for TokensMade { sequence, made, limit } in registry.ledger.tokens_made() {
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
        };
        Reading {
            listeners,
            backends: self.views(now).into_iter().map(backend).collect(),
            remembered: self.memory.sizes(),
            remembered_limits: self.memory.capacity(),
            flow_limit: self.flow_capacity,
            workers: self.workers,
            ready: self.stage == Stage::Running,
            tokens_made: self.registry.ledger.tokens_made(),
            reloads: Reloads { applied: self.in_force.applied, ..self.reloads },
            digest: config.digest(),
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
            })
        })
        .collect()
    }

    /// Takes note of what is wanted now; a snapshot of it can be ordered.
    fn want(&mut self) {
        let Self { config, registry, commands, backends, .. } = self;
        let named: BTreeMap<Name, SocketAddr> = config
            .pools
            .iter()
            .flat_map(|pool| pool.backends.iter().map(move |backend| (pool, backend)))
            .map(|(pool, backend)| ((pool.name.clone(), backend.name.clone()), backend.address))
            .collect();
        commands.retain(|name, _| named.contains_key(name));
        backends.retain(|name, watched| named.get(name) == Some(&watched.address));
        let name = |pool: &str, name: &str| (pool.to_owned(), name.to_owned());
        let command = |pool: &str, backend: &str| commands.get(&name(pool, backend)).copied();
        let health = |pool: &str, backend: &str| {
            let watched = backends.get(&name(pool, backend));
            watched.map_or(BackendState::Active, |watched| watched.health.state())
        };
        self.wanted = Arc::new(Wanted::new(&config.pools, command, health, registry));
        self.newest += 1;
        self.watch_wanted();
    }

    /// Begins to watch the backends that have appeared.
    fn watch_wanted(&mut self) {
        for (pool, wanted) in self.config.pools.iter().zip(self.wanted.pools()) {
            for backend in wanted {
                let name = (pool.name.clone(), backend.name.clone());
                self.backends.entry(name).or_insert_with(|| {
                    self.baselines.begin(&self.totals, backend.id);
                    Watched {
                        id: backend.id,
                        address: backend.address.0,
                        health: Health::default(),
                        last: self.totals.of_backend(backend.id.slot()),
                        half_open: None,
                    }
                });
            }
        }
    }
}

impl Watched {
    fn half_open(&self, now: Instant) -> Option<u64> {
        let (half_open, at) = self.half_open?;
        (now.saturating_duration_since(at) < REPORT_LIFETIME).then_some(half_open)
    }
}

fn report(pool: &str, backend: &BackendRoute, was: BackendState) {
    let BackendRoute { name, address, state: is, .. } = backend;
    let (backend, was, state) = (name, was.label(), is.label());
    match is {
        BackendState::Active | BackendState::Draining => {
            info!(pool, backend, %address, was, state, "backend changed its state");
        }
        BackendState::Down => {
            warn!(pool, backend, %address, was, state, "backend gets no new connections");
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

    #[test]
    fn a_backend_that_refuses_goes_down_and_comes_back_when_it_answers() {
        let mut bench = Bench::new();
        let slot = bench.slot("a");
        bench.worker.backends[slot].refused.add(3);
        bench.tick();
        assert_eq!(bench.state("a"), BackendState::Down);
        assert_eq!(bench.state("b"), BackendState::Active);
        bench.worker.backends[slot].returned.add(1);
        bench.tick();
        assert_eq!(bench.state("a"), BackendState::Active);
    }

    #[test]
    fn health_survives_a_reload_and_ends_with_the_address() {
        let mut bench = Bench::new();
        let slot = bench.slot("a");
        bench.worker.backends[slot].refused.add(3);
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
        assert_eq!(bench.plane.reading(bench.now).reloads, Reloads { applied: 1, rejected: 0 });
    }

    #[test]
    fn what_needs_a_restart_is_refused_as_a_whole_and_named() {
        let mut bench = Bench::new();
        let before = bench.plane.routing().load_full();
        let outcome = bench.reload(|config| {
            config.workers = 4.try_into().ok();
            config.admin = "127.0.0.1:9090".parse().ok();
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
        assert_eq!(bench.plane.reading(bench.now).reloads, Reloads { applied: 0, rejected: 1 });
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
            bench.worker.backends[bench.slot("b")].refused.add(3);
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
