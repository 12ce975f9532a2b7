//! What a new configuration takes away from connections that live.

use std::{collections::HashMap, fmt, time::Instant};

use quic::routable::{CidConfig, ConfigId, ServerId};
use quic_lb_config::{Backend, Config, Pool};

use super::{ControlPlane, watched::QUIET};
use crate::{backend::BackendState, routing::BackendRoute};

/// What would be taken away, and from how many connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InUse {
    pub(crate) pool: String,
    pub(crate) backend: String,
    pub(crate) what: Taken,
    pub(crate) connections: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// The backend itself.
    Backend,
    /// Connection IDs that lead to it.
    CidConfig(ConfigId),
}

impl fmt::Display for InUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pool, backend, what, connections } = self;
        match what {
            Taken::Backend => write!(f, "backend {pool}/{backend}")?,
            Taken::CidConfig(id) => {
                write!(f, "connection IDs of {pool}/{backend} with config ID {id}")?
            }
        }
        write!(f, ": about {connections} live connections would lose their way")
    }
}

impl ControlPlane {
    /// What `new` takes away from connections that were heard lately. Those of a backend that is down are lost
    /// already.
    pub(super) fn taken_in_use(&self, now: Instant, new: &Config) -> Vec<InUse> {
        let routing = self.routing.load();
        let (old, new) = (named(&self.in_force.config), named(new));
        let of_route = |route: &BackendRoute| {
            let name = (&*routing.pool(route.pool).name, &*route.name);
            let &before = old.get(&name)?;
            Some(self.taken_from(now, before, route, new.get(&name).copied()))
        };
        let alive = routing.backends().filter(|route| route.state != BackendState::Down);
        alive.filter_map(of_route).flatten().collect()
    }

    /// All that could be taken away from connections that were heard lately.
    pub(crate) fn in_use(&self, now: Instant) -> Vec<InUse> {
        let routing = self.routing.load();
        let is_heard = |heard: Option<_>| heard.is_some_and(|heard| self.ago(now, heard) < QUIET);
        let mut all = vec![];
        for route in routing.backends().filter(|route| route.state != BackendState::Down) {
            let live = self.totals.live(route.id);
            let mut add = |what, connections| {
                let pool = routing.pool(route.pool).name.clone();
                all.push(InUse { pool, backend: route.name.to_string(), what, connections });
            };
            if is_heard(live.last_heard()) {
                add(Taken::Backend, live.connections());
            }
            // The last is of those that no configuration reads.
            for (id, of_config) in (0..).map_while(ConfigId::new).zip(&live.by_config) {
                if is_heard(of_config.last_heard) {
                    add(Taken::CidConfig(id), of_config.connections);
                }
            }
        }
        all
    }

    fn taken_from(
        &self,
        now: Instant,
        (pool, backend): InPool<'_>,
        route: &BackendRoute,
        left: Option<InPool<'_>>,
    ) -> Vec<InUse> {
        let live = self.totals.live(route.id);
        let in_use = |what, connections| InUse {
            pool: pool.name.clone(),
            backend: backend.name.clone(),
            what,
            connections,
        };
        let is_heard = |heard| self.ago(now, heard) < QUIET;
        let Some((in_pool, left)) = left else {
            let is_used = live.last_heard().is_some_and(is_heard);
            let taken = is_used.then(|| in_use(Taken::Backend, live.connections()));
            return taken.into_iter().collect();
        };
        let old = pool
            .cid_configs
            .iter()
            .filter_map(|config| Some((config, server_id(backend, config)?)));
        let taken = old.filter(|&(config, id)| {
            let same = in_pool.cid_configs.iter().find(|of| of.id() == config.id());
            !same.is_some_and(|same| {
                reads_alike(config, same, id) && server_id(left, same) == Some(id)
            })
        });
        taken
            .filter_map(|(config, _)| {
                let of_config = live.by_config[usize::from(config.id().get())];
                of_config
                    .last_heard
                    .is_some_and(is_heard)
                    .then(|| in_use(Taken::CidConfig(config.id()), of_config.connections))
            })
            .collect()
    }
}

/// A backend and its pool.
type InPool<'a> = (&'a Pool, &'a Backend);

/// The backends of a configuration by the names of their pools and their own.
fn named(config: &Config) -> HashMap<(&str, &str), InPool<'_>> {
    let all = config.pools.iter().flat_map(|pool| pool.backends.iter().map(move |of| (pool, of)));
    all.map(|(pool, of)| ((&*pool.name, &*of.name), (pool, of))).collect()
}

fn server_id<'a>(backend: &'a Backend, config: &CidConfig) -> Option<&'a ServerId> {
    backend.server_ids.iter().find(|(of, _)| *of == config.id()).map(|(_, id)| id)
}

/// Whether what one makes of a server ID the other reads.
fn reads_alike(old: &CidConfig, new: &CidConfig, id: &ServerId) -> bool {
    let made = old.encode(id, &vec![0; old.nonce_len()]).ok();
    old.nonce_len() == new.nonce_len() && made.is_some_and(|made| new.decode(&made) == Some(*id))
}
