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
//!
//! | file | what it does |
//! | --- | --- |
//! | `fleet.rs` | all that are watched, in their order and by name |
//! | `backends.rs` | who is watched and checked, and what their health means for a pool |
//! | `watched.rs` | one backend, and what was seen of it |
//! | `progress.rs` | whether all workers make progress |
//! | `removals.rs` | what a new configuration takes away from live connections |
//! | `alarms.rs` | what somebody has to know of the traffic |
//! | `handed.rs` | what a successor takes over |
//! | `views.rs` | what is exported and shown |

mod alarms;
pub(super) mod backends;
mod fleet;
pub(super) mod handed;
mod progress;
pub(crate) mod removals;
#[cfg(test)]
mod tests;
pub(super) mod views;
pub(super) mod watched;

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroU32,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use backends::{Left, report};
use fleet::Fleet;
use progress::Progress;
use quic_lb_config::{Admission, Backend, Config, HonoursTokens, Listener, RetryMode};
use removals::InUse;
use tracing::{debug, error, info, warn};
use watched::{QUIET, Watched};

use super::{
    checks::honours::may_validate,
    commands::{Author, Command, Commands},
    health::Health,
    restart::{is_same, not_followed},
    silence::Norm,
    validation::Validation,
};
use crate::{
    admission::{AdmissionState, tokens::TokensMade},
    backend::BackendState,
    check::CheckTimes,
    client_path::ListenerIndex,
    connection_log::queue::Queues,
    listeners::{ListenerNumbers, Opening, Placed},
    memory::Memory,
    metrics::Reloads,
    registry::{Lasting, Registry},
    routing::{BackendRoute, Routing},
    totals::{Baselines, Totals},
    wanted::{Known, Wanted},
};

/// Within this time the sweep has looked at each flow: sixteen times at a part of them, ten a second.
const CENSUS: Duration = Duration::from_secs(2);

/// For how long something may be remembered under the number of a listener, besides its flows: handshakes.
const REMEMBERED_FOR: Duration = Duration::from_secs(60);

/// The state of the control plane.
#[derive(Debug)]
pub(crate) struct ControlPlane {
    /// The newest configuration; it may not be in force yet.
    config: Arc<Config>,
    digest: Arc<OnceLock<String>>,
    registry: Registry,
    /// The backends that follow from the newest configuration, commands and health.
    wanted: Arc<Wanted>,
    /// How often that, or what listeners let in, has changed.
    newest: u64,
    in_force: InForce,
    routing: Arc<ArcSwap<Routing>>,
    memory: Arc<Memory>,
    totals: Totals,
    /// What the workers have left for the connection log, once they run.
    records: Option<Arc<Queues>>,
    workers: usize,
    /// Flows that the workers have room for.
    flow_capacity: usize,
    /// What the operator wants instead of what the file says.
    commands: Commands,
    fleet: Fleet,
    /// How the backends of each pool fare that answer.
    norms: BTreeMap<String, Norm>,
    /// How long the passed checks of each pool took.
    check_times: BTreeMap<String, CheckTimes>,
    /// When the shares of a pool's backends, some of which start slowly, have grown last.
    grown: BTreeMap<String, Instant>,
    /// Pools of which so few backends pass their checks that these are ignored.
    panics: BTreeSet<String>,
    baselines: Baselines,
    validations: BTreeMap<ListenerIndex, Validation>,
    /// The numbers of listeners as they are to be with the next configuration, while its sockets are being opened.
    planned: Option<(ListenerNumbers, Vec<Opening>)>,
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
    progress: Progress,
    /// When this process began to listen, as time since the first of those began that have handed over to each other.
    knows_since: Duration,
}

/// What the snapshot that workers see was made from.
#[derive(Clone, Debug)]
struct InForce {
    /// The number of its order.
    number: u64,
    config: Arc<Config>,
    /// Of the configuration, once somebody has asked: with thousands of backends it takes milliseconds.
    digest: Arc<OnceLock<String>>,
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
    /// It cannot become the running one while the process lives, for these reasons, with what it takes.
    NotFollowed(Vec<String>),
    /// A listener of it cannot be opened, for this reason.
    NotListening(String),
    /// Nobody has forced it to take these away.
    InUse(Vec<InUse>),
}

impl ControlPlane {
    /// The control plane of `config`, before there are workers. Nobody outside should know `seed`:
    /// see [`AdmissionState::new`].
    pub(crate) fn new(config: Config, memory: Arc<Memory>, seed: [u64; 2]) -> Self {
        Self::with(config, memory, seed, Registry::default())
    }

    fn with(config: Config, memory: Arc<Memory>, seed: [u64; 2], mut registry: Registry) -> Self {
        registry.admission = AdmissionState::new(seed);
        let wanted = Wanted::new(&config.pools, &mut registry);
        let lasting = registry.lasting(&config);
        let routing = Routing::build(&config, &wanted, lasting, None);
        let (config, digest) = (Arc::new(config), Arc::default());
        let mut plane = Self {
            in_force: InForce {
                number: 0,
                config: Arc::clone(&config),
                digest: Arc::clone(&digest),
                applied: 0,
            },
            config,
            digest,
            registry,
            wanted: Arc::new(wanted),
            newest: 0,
            routing: Arc::new(ArcSwap::from_pointee(routing)),
            memory,
            totals: Totals::default(),
            records: None,
            workers: 0,
            flow_capacity: 0,
            commands: Commands::new(),
            fleet: Fleet::default(),
            norms: BTreeMap::new(),
            check_times: BTreeMap::new(),
            grown: BTreeMap::new(),
            panics: BTreeSet::new(),
            baselines: Baselines::default(),
            validations: BTreeMap::new(),
            planned: None,
            flood_said: None,
            unfinished_seen: None,
            keys_warned_of: BTreeSet::new(),
            loops_warned_of: (0, None),
            reloads: Reloads::default(),
            stage: Stage::Running,
            progress: Progress::default(),
            knows_since: Duration::ZERO,
        };
        plane.watch();
        plane
    }

    /// Takes note of the workers, once they run: how many there are, what they count and how many
    /// flows they have room for.
    pub(crate) fn set_workers(&mut self, workers: usize, totals: Totals, flow_capacity: usize) {
        (self.workers, self.totals, self.flow_capacity) = (workers, totals, flow_capacity);
        let Self { fleet, totals, .. } = self;
        fleet.iter_mut().for_each(|watched| totals.make_room(watched.id));
    }

    /// Takes note of where the workers leave records of connections.
    pub(crate) fn set_records(&mut self, records: Arc<Queues>) {
        self.records = Some(records);
    }

    pub(crate) fn set_stage(&mut self, stage: Stage) {
        self.stage = stage;
    }

    /// The order for the snapshot of what is wanted now; `None` while that is in force.
    pub(crate) fn order(&mut self) -> Option<BuildOrder> {
        if self.in_force.number == self.newest {
            return None;
        }
        let (config, digest) = (Arc::clone(&self.config), Arc::clone(&self.digest));
        let of = InForce { number: self.newest, config, digest, applied: self.reloads.applied };
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
                let watched = self.fleet.get(pool, &backend.name);
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

    /// Says which listeners need sockets for this configuration. Until it is applied, or given up by [`Self::give_up`], none ends.
    ///
    /// # Errors
    ///
    /// That there is nothing to apply, or that it cannot be.
    pub(crate) fn plan(
        &mut self,
        now: Instant,
        config: &Config,
        forced: bool,
    ) -> Result<Vec<Opening>, Applied> {
        if is_same(&self.config, config) {
            return Err(Applied::Unchanged);
        }
        let mut reasons = not_followed(&self.config.own_document(), &config.own_document());
        let planned = self.registry.listeners.planned(config);
        if planned.is_none() {
            reasons
                .push("there are more new listeners than numbers that others have left, which needs a restart".to_owned());
        }
        if !reasons.is_empty() {
            return Err(Applied::NotFollowed(reasons));
        }
        let in_use = self.taken_in_use(now, config);
        if !in_use.is_empty() && !forced {
            return Err(Applied::InUse(in_use));
        }
        self.planned = planned;
        Ok(self.planned.iter().flat_map(|(_, opened)| opened.iter().cloned()).collect())
    }

    /// Gives up what was planned.
    pub(crate) fn give_up(&mut self) {
        self.planned = None;
    }

    /// Replaces the configuration as a whole, or leaves all as it is. It takes nothing away that live connections use,
    /// unless it is `forced` to.
    pub(crate) fn apply(&mut self, now: Instant, config: Config, forced: bool) -> Applied {
        if self.planned.is_none()
            && let Err(applied) = self.plan(now, &config, forced)
        {
            return applied;
        }
        if let Some((numbers, opened)) = self.planned.take() {
            self.registry.listeners = numbers;
            for Opening { index, listener } in opened {
                let mode = config.retry_mode_at_start(&listener);
                if let Some(validation) = self.validations.get_mut(&index) {
                    validation.begin_anew(mode);
                }
                let phase = Validation::at_start(mode).phase();
                self.registry.admission.set_phase(index.0, phase);
            }
        }
        let leaving = self.registry.listeners.placed().filter(|placed| placed.leaves);
        for Placed { listener, .. } in leaving {
            let (listener, address) = (listener.name, listener.address);
            info!(listener, %address, "no new connections; the listener ends with those that it has");
        }
        for taken in self.taken_in_use(now, &config) {
            warn!(%taken, "taken away although it is in use");
        }
        self.forget_token_keys(&config);
        self.config = Arc::new(config);
        self.digest = Arc::default();
        self.reloads.applied += 1;
        // It may be what was wrong; what still is shows again.
        self.fleet.iter_mut().for_each(|watched| watched.wiring = Health::default());
        self.wanted = Arc::new(Wanted::new(&self.config.pools, &mut self.registry));
        self.watch();
        self.want();
        Applied::Changed
    }

    /// Takes note of how a reload ended, and when, since 1970.
    pub(crate) fn on_reload(&mut self, time: Duration, successful: bool) {
        self.reloads.last = Some((time, successful));
    }

    /// Counts a file that was corrected to what is running anyway.
    pub(crate) const fn on_corrected(&mut self) {
        self.reloads.corrected += 1;
    }

    /// Counts a file that cannot become the running configuration.
    pub(crate) const fn on_rejected(&mut self) {
        self.reloads.rejected += 1;
    }

    /// Counts a look at the file that did not end in its time, or that such a one was in the way of.
    pub(crate) const fn on_hang(&mut self) {
        self.reloads.hung += 1;
    }

    /// Does what the operator says about a backend. It holds over reloads until the operator says
    /// otherwise. `false` when there is no such backend.
    pub(crate) fn command(&mut self, pool: &str, name: &str, command: Command) -> bool {
        let wanted = command.wanted;
        let Some(backend) = find(&self.config, pool, name) else { return false };
        let key = (pool.to_owned(), name.to_owned());
        // What the file says already needs no command, unless one is to be taken back; a command to
        // drain stays even then, so that an edit of the file does not end it by accident.
        if backend.admission == wanted && wanted == Admission::Active {
            self.commands.remove(&key);
        } else {
            self.commands.insert(key, command.clone());
        }
        let Author { by, reason } = command.author;
        let wanted = wanted.as_str();
        info!(pool, backend = name, wanted, by, reason, "operator's command");
        self.heed_commands();
        self.want();
        true
    }

    /// What the operator wants of backends instead of what the file says.
    pub(crate) const fn commands(&self) -> &Commands {
        &self.commands
    }

    /// Takes over what was commanded before this process began, of backends that there still are.
    pub(crate) fn restore(&mut self, commands: Commands) {
        for ((pool, backend), Command { wanted, author: Author { by, reason }, .. }) in &commands {
            if find(&self.config, pool, backend).is_some() {
                let wanted = wanted.as_str();
                info!(pool, backend, wanted, by, reason, "operator's command from before");
            }
        }
        self.commands = commands;
        self.heed_commands();
        self.want();
    }

    /// Looks at what the workers have seen of each backend since the last tick.
    pub(crate) fn on_tick(&mut self, now: Instant) {
        let mut changed = false;
        let (mut refusing, mut busy, mut any_starts) = (vec![], vec![], !self.grown.is_empty());
        let time = self.memory.since_epoch(now);
        let routing = self.routing.load();
        for (pool, backends) in self.config.pools.iter().zip(self.fleet.pools_mut()) {
            let norm = self.norms.entry(pool.name.clone()).or_default();
            busy.clear();
            // A fleet may have thousands of them, of which few have anything to do.
            for (nth, watched) in backends.iter_mut().enumerate() {
                watched.watch_drain(time, &routing);
                any_starts |= watched.starting.is_some();
                let totals = self.totals.of_backend(watched.id.slot());
                if totals == watched.last && watched.is_settled() {
                    continue;
                }
                busy.push(nth);
                watched.seen = totals.since(watched.last);
                watched.last = totals;
                if watched.seen.refused.about_backend().any(|(_, n)| n > 0) {
                    refusing.push(watched.id);
                }
                if watched.seen.returned > 0 {
                    norm.asked += watched.seen.asked;
                    norm.answered += watched.seen.answered;
                }
            }
            let norm = *norm;
            for &nth in &busy {
                let watched = &mut backends[nth];
                changed |= watched.change(now, |watched| watched.on_traffic(now, norm));
                any_starts |= watched.starting.is_some();
            }
        }
        if !refusing.is_empty() {
            self.registry.refusing.tell(refusing);
        }
        drop(routing);
        self.watch_progress();
        changed |= any_starts && self.grow_shares(now);
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
        if self.validate(now) | self.end_listeners(now) {
            self.newest += 1;
        }
        self.warn_of_loops(now);
    }

    fn watch_progress(&mut self) {
        for (worker, is_stuck) in self.progress.on_tick(&self.totals.rounds()) {
            match is_stuck {
                true => error!(worker, "a worker makes no progress"),
                false => info!(worker, "the worker makes progress again"),
            }
        }
    }

    /// The workers that make no progress.
    pub(crate) fn stuck(&self) -> Vec<usize> {
        self.progress.stuck()
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
        let watched = self.fleet.get_mut(pool, name);
        watched.is_some_and(|watched| {
            watched.half_open = Some((half_open, now));
            true
        })
    }

    /// Ends listeners that leave and have no flow; says whether there was any.
    fn end_listeners(&mut self, now: Instant) -> bool {
        if self.planned.is_some() {
            return false;
        }
        let Self { registry, totals, config, .. } = self;
        let is_left = |ListenerIndex(index)| totals.of_listener(index).flows > 0;
        let remembered_for = config.timeouts.flow_idle.max(REMEMBERED_FOR);
        let ended = registry.listeners.on_tick(now, remembered_for, is_left);
        for listener in &ended {
            let (listener, address) = (&listener.name, listener.address);
            info!(listener, %address, "the listener has ended");
        }
        !ended.is_empty()
    }

    /// The number of a listener of the configuration.
    pub(crate) fn listener_index(&self, listener: &Listener) -> Option<ListenerIndex> {
        self.registry.listeners.of(listener)
    }

    /// The name of the listener with this number.
    pub(crate) fn listener_name(&self, index: ListenerIndex) -> Option<&str> {
        self.registry.listeners.name(index)
    }

    /// Decides about address validation on each listener; says whether anything changed.
    fn validate(&mut self, now: Instant) -> bool {
        let Self { config, validations, fleet, totals, registry, routing, .. } = self;
        let snapshot = routing.load();
        let mut changed = false;
        for listener in &config.listeners {
            let Some(index) = registry.listeners.of(listener) else { continue };
            let Some(pool) = config.pools.get(listener.pool) else { continue };
            let of_pool = || fleet.pools().get(listener.pool).into_iter().flatten();
            let takes = |of: &&Watched| {
                let route = snapshot.backend(of.id);
                route.is_some_and(|route| route.state.takes_connections())
            };
            let honour = || may_validate(of_pool().filter(takes).map(|watched| watched.honours));
            let mode = match (config.retry_mode(listener), pool.honours_tokens) {
                (RetryMode::Off, _) => RetryMode::Off,
                (mode, HonoursTokens::Yes) => mode,
                (mode, HonoursTokens::Probe) if honour() => mode,
                (_, HonoursTokens::Probe | HonoursTokens::No) => RetryMode::Off,
            };
            let at_start = Validation::at_start(config.retry_mode_at_start(listener));
            let validation = validations.entry(index).or_insert(at_start);
            let attempts = totals.of_listener(index.0).attempts;
            let half_open = || of_pool().filter_map(|watched| watched.half_open(now)).max();
            let half_open = if mode == RetryMode::Off { None } else { half_open() }.unwrap_or(0);
            if validation.on_tick(now, config, listener, mode, attempts, half_open) {
                registry.admission.set_phase(index.0, validation.phase());
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

    /// The newest configuration, which may not be in force yet.
    pub(crate) fn newest_config(&self) -> Arc<Config> {
        Arc::clone(&self.config)
    }

    /// Its digest.
    pub(crate) fn digest(&self) -> &str {
        let InForce { config, digest, .. } = &self.in_force;
        digest.get_or_init(|| config.digest())
    }

    /// Work that finds the digest, if nobody has asked for it yet: better done before somebody waits for it.
    pub(crate) fn digest_to_find(&self) -> Option<impl FnOnce() + Send + use<>> {
        let InForce { config, digest, .. } = &self.in_force;
        let (config, digest) = (Arc::clone(config), Arc::clone(digest));
        digest.get().is_none().then_some(move || {
            digest.get_or_init(|| config.digest());
        })
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

    /// Whether all that was to be seen since `began` says that no connection lives any more. Flows outlive their connections:
    /// nobody between client and server can read the end of one.
    pub(crate) fn is_quiet(&self, now: Instant, began: Instant) -> bool {
        let heard = || self.totals.last_heard().map(|heard| self.ago(now, heard));
        now.saturating_duration_since(began) >= CENSUS && heard().is_none_or(|ago| ago >= QUIET)
    }

    /// Flows of all workers and listeners.
    pub(crate) fn flows(&self) -> u64 {
        self.totals.flows()
    }

    /// Takes note of what is wanted now of each backend; a snapshot of it can be ordered.
    fn want(&mut self) {
        let panics = self.failing_pools();
        let Self { config, fleet, wanted, .. } = self;
        // A snapshot may still be built of what was wanted before.
        let wanted = Arc::make_mut(wanted);
        let panics_of: Vec<_> = config.pools.iter().map(|pool| panics.get(&pool.name)).collect();
        wanted.decide(|pool, nth, _| {
            let watched = &fleet.pools()[pool][nth];
            let of_traffic = watched.state_of_traffic();
            // Where nobody passes, all are tried, and it shows that they are down.
            let ignores_checks = panics_of[pool] == Some(&Left::Few);
            let health = if ignores_checks { of_traffic } else { watched.state() };
            let step = match of_traffic {
                BackendState::Probing => Some(NonZeroU32::MIN),
                _ => watched.starting.and_then(|starting| NonZeroU32::new(starting.step())),
            };
            Known { admission: watched.admission, health, step }
        });
        self.newest += 1;
        self.say_panics(panics.into_keys().collect());
    }
}

fn find<'a>(config: &'a Config, pool: &str, name: &str) -> Option<&'a Backend> {
    let pool = config.pools.iter().find(|candidate| candidate.name == pool)?;
    pool.backends.iter().find(|backend| backend.name == name)
}
