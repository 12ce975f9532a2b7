//! What is shown of the state: all that is exported, and each backend as the admin interface has it.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use quic_lb_config::{Admission, Backend, Listener, Pool};

use super::{
    ControlPlane, Stage,
    watched::{CheckView, Watched},
};
use crate::{
    backend::BackendState,
    control::checks::slow_start::SlowStart,
    metrics::{BackendReading, ListenerReading, PoolReading, Reading, Reloads},
    totals::BackendTotals,
};

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
    /// How much of its share of new connections it has, while that grows.
    pub(crate) starting: Option<SlowStart>,
    /// How its active checks go, if there are any.
    pub(crate) check: Option<CheckView>,
}

impl ControlPlane {
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
            times: self.check_times.get(&pool.name).cloned().unwrap_or_default(),
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

    /// The backends in force that answer under connection IDs that do not lead to them, as `pool/backend`.
    pub(crate) fn miswired(&self) -> Vec<String> {
        let routing = self.routing.load();
        let miswired = routing.backends().filter(|of| of.state == BackendState::Miswired);
        miswired.map(|of| format!("{}/{}", routing.pool(of.pool).name, of.name)).collect()
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
                starting: backends.get(&name).and_then(|watched| watched.starting),
                check: backends.get(&name).and_then(Watched::check),
            })
        })
        .collect()
    }
}
