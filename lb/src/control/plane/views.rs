//! What is shown of the state: all that is exported, and each backend as the admin interface has it.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use quic::routable::{CidConfig, ConfigId};
use quic_lb_config::{Admission, Backend, Config, MAX_LISTENERS, Pool};

use super::{
    ControlPlane, Stage,
    watched::{CheckView, DrainView, QUIET, Watched},
};
use crate::{
    admission::mode::{Phase, Reason},
    backend::{BackendState, PoolIndex},
    client_path::ListenerIndex,
    control::{
        checks::{honours::Honours, slow_start::SlowStart},
        commands::Command,
        validation::Validation,
    },
    metrics::{BackendReading, ListenerReading, PoolReading, Reading, Reloads},
    totals::{BackendTotals, LiveTotals},
};

/// One backend as the admin interface shows it.
#[derive(Clone, Debug)]
pub(crate) struct BackendView {
    pub(crate) pool: String,
    pub(crate) backend: Backend,
    pub(crate) state: BackendState,
    pub(crate) wanted: Admission,
    /// The operator's, if it is not the file that wants it.
    pub(crate) command: Option<Command>,
    pub(crate) totals: BackendTotals,
    /// Half-open connections, if it has reported any lately.
    pub(crate) half_open: Option<u64>,
    /// Whether it honours the tokens of Retries, if it is asked.
    pub(crate) honours: Option<Honours>,
    /// Whether it honours tokens of each key, as far as that is known, if it is asked.
    pub(crate) token_keys: Option<BTreeMap<u8, bool>>,
    /// By how many seconds its clock is ahead, if that is known.
    pub(crate) clock_skew: Option<i64>,
    /// How much of its share of new connections it has, while that grows.
    pub(crate) starting: Option<SlowStart>,
    /// How its active checks go, if there are any.
    pub(crate) check: Option<CheckView>,
    /// Its live connections, as far as traffic tells.
    pub(crate) live: LiveTotals,
    /// If it is to get no new ones.
    pub(crate) drain: Option<DrainView>,
}

/// One configuration of connection IDs, and whether it is in use.
#[derive(Clone, Debug)]
pub(crate) struct RotationView {
    pub(crate) pool: String,
    pub(crate) config_id: ConfigId,
    /// Connections that use it, about.
    pub(crate) connections: u64,
    /// For how long none was heard; `None` when none ever was.
    pub(crate) silent: Option<Duration>,
    /// Whether no connection needs it, for all that can be told.
    pub(crate) is_unused: bool,
}

impl ControlPlane {
    /// Everything that is exported.
    pub(crate) fn reading(&self, now: Instant) -> Reading {
        let config = Arc::clone(&self.in_force.config);
        let names = config.listeners.iter().map(|listener| listener.name.clone());
        // Those that leave have connections.
        let leaving = self.registry.listeners.placed().filter(|placed| placed.leaves);
        let leaving = leaving.map(|placed| placed.listener.name);
        let leaving = leaving.filter(|name| config.listeners.iter().all(|of| of.name != *name));
        let listeners = names.chain(leaving).map(|name| self.listener_reading(name)).collect();
        let time = self.memory.since_epoch(now);
        let backend = |view: BackendView| BackendReading {
            config_ids: config_ids(&config, &view.pool),
            pool: view.pool,
            name: view.backend.name,
            state: view.state,
            totals: view.totals,
            half_open: view.half_open,
            retry_unsupported: view.honours.map(|honours| honours == Honours::No),
            clock_skew: view.clock_skew,
            live: view.live,
            silent: view.live.last_heard().map(|heard| time.saturating_sub(heard)),
            checks: view.check.map(|check| check.counts),
        };
        let pools = config.pools.iter().filter(|pool| pool.health_check.is_some());
        let pool = |pool: &Pool| PoolReading {
            name: pool.name.clone(),
            panic: self.panics.contains(&pool.name),
            times: self.check_times.get(&pool.name).cloned().unwrap_or_default(),
        };
        let routing = self.routing.load();
        Reading {
            listeners,
            all_listeners: self.totals.of_listeners(0..MAX_LISTENERS),
            pools: pools.map(pool).collect(),
            backends: self.views(now).into_iter().map(backend).collect(),
            remembered: self.memory.sizes(&routing),
            remembered_limits: self.memory.capacity(&routing),
            flow_limit: self.flow_capacity,
            unfinished_flows: self.totals.unfinished_flows(),
            unproven_flows: self.totals.unproven_flows(),
            workers: self.workers,
            panics: self.totals.panics(),
            usage: self.totals.usage(),
            stuck: self.stuck().len(),
            ready: self.stage == Stage::Running && self.stuck().is_empty(),
            tokens_made: self.registry.admission.tokens_made(),
            reloads: Reloads {
                applied: self.in_force.applied + self.reloads.corrected,
                ..self.reloads
            },
            digest: self.digest().to_owned(),
            connection_log: self.records.as_ref().map(|of| of.counts()).unwrap_or_default(),
        }
    }

    /// What was counted under a name, also while its listener was elsewhere.
    fn listener_reading(&self, name: String) -> ListenerReading {
        let numbers = || self.registry.listeners.named(&name);
        let totals = self.totals.of_listeners(numbers().map(|ListenerIndex(index)| index));
        let known = || numbers().filter_map(|index| self.validations.get(&index));
        let mut switches = [0; Reason::ALL.len()];
        for validation in known() {
            let counts = switches.iter_mut().zip(validation.switches());
            counts.for_each(|(sum, count)| *sum += count);
        }
        let phase = known().last().map_or(Phase::Inactive, Validation::phase).label();
        let numbered: Vec<_> = numbers().map(|ListenerIndex(index)| index).collect();
        let receive_dropped = self.totals.receive_dropped(&numbered);
        ListenerReading { name, totals, phase, switches, receive_dropped }
    }

    /// The backends in force that answer under connection IDs that do not lead to them, as `pool/backend`.
    pub(crate) fn miswired(&self) -> Vec<String> {
        let routing = self.routing.load();
        let miswired = routing.backends().filter(|of| of.state == BackendState::Miswired);
        miswired.map(|of| format!("{}/{}", routing.pool(of.pool).name, of.name)).collect()
    }

    /// Every backend, in the order of the configuration.
    pub(crate) fn views(&self, now: Instant) -> Vec<BackendView> {
        let Self { in_force, routing, totals, commands, fleet, baselines, .. } = self;
        let routing = routing.load();
        let routes = routing.backends().map(|route| {
            let pool = &routing.pool(route.pool).name;
            ((pool.as_str(), &*route.name), route)
        });
        let routes: HashMap<_, _> = routes.collect();
        let time = self.memory.since_epoch(now);
        let pools = in_force.config.pools.iter();
        let all = pools.flat_map(|pool| pool.backends.iter().map(move |b| (pool, b)));
        all.filter_map(|(pool, backend)| {
            let route = routes.get(&(pool.name.as_str(), backend.name.as_str()))?;
            let watched = fleet.get(&pool.name, &backend.name);
            let command = match commands.is_empty() {
                true => None,
                false => commands.get(&(pool.name.clone(), backend.name.clone())),
            };
            let wanted = command.map_or(backend.admission, |command| command.wanted);
            let live = totals.live(route.id);
            let is_asked = in_force.config.asks_for_tokens(pool);
            let drain = (wanted == Admission::Draining).then(|| {
                let since = watched.and_then(|watched| watched.drains_since);
                // Otherwise it begins about now.
                let since = since.unwrap_or(time);
                let (lasts, silent) = (time.saturating_sub(since), live.silence(since, time));
                DrainView { lasts, silent }
            });
            Some(BackendView {
                pool: pool.name.clone(),
                backend: backend.clone(),
                state: route.state,
                wanted,
                command: command.cloned(),
                totals: baselines.since_it_appeared(totals, route.id),
                half_open: watched.and_then(|watched| watched.half_open(now)),
                honours: is_asked
                    .then(|| watched.map(|watched| watched.honours).unwrap_or_default()),
                token_keys: is_asked
                    .then(|| watched.map(|watched| watched.token_keys.clone()).unwrap_or_default()),
                clock_skew: watched.and_then(|watched| watched.clock_skew),
                starting: watched.and_then(|watched| watched.starting),
                check: watched.and_then(Watched::check),
                live,
                drain,
            })
        })
        .collect()
    }

    /// Moments that totals tell, as how long ago they were.
    pub(crate) fn ago(&self, now: Instant, moment: Duration) -> Duration {
        self.memory.since_epoch(now).saturating_sub(moment)
    }

    /// Every configuration of connection IDs, in the order of the file.
    pub(crate) fn rotation(&self, now: Instant) -> Vec<RotationView> {
        let Self { in_force, routing, totals, .. } = self;
        let routing = routing.load();
        let of_pool = |(index, pool): (usize, &Pool)| {
            let backends = routing.backends().filter(|route| route.pool == PoolIndex(index));
            let live: Vec<_> = backends.map(|route| totals.live(route.id)).collect();
            let view = |config: &CidConfig| {
                let of_config =
                    || live.iter().map(|live| live.by_config[usize::from(config.id().get())]);
                let heard = of_config().filter_map(|of| of.last_heard).max();
                let silent = heard.map(|heard| self.ago(now, heard));
                // Of what was used before this process began it knows nothing until it was heard.
                let known_for = self.ago(now, self.knows_since);
                RotationView {
                    pool: pool.name.clone(),
                    config_id: config.id(),
                    connections: of_config().map(|of| of.connections).sum(),
                    silent,
                    is_unused: silent.unwrap_or(known_for) >= QUIET,
                }
            };
            pool.cid_configs.iter().map(view).collect::<Vec<_>>()
        };
        in_force.config.pools.iter().enumerate().flat_map(of_pool).collect()
    }
}

/// Those of a pool's configurations.
fn config_ids(config: &Config, pool: &str) -> Vec<ConfigId> {
    let pool = config.pools.iter().find(|candidate| candidate.name == pool);
    pool.map(|pool| pool.cid_configs.iter().map(CidConfig::id).collect()).unwrap_or_default()
}
