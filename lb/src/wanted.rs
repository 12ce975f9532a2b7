//! Which backends there are to be, and whether each of them gets new connections: what the file
//! says, what the operator has commanded since and how the backends' health looks, put together.
//!
//! It stands between the control plane, which knows those three, and the routing snapshot, which
//! follows from the outcome. Backends get their numbers here.
//!
//! | the file says | the operator's command | the backend's health | its state |
//! | --- | --- | --- | --- |
//! | active | none | active | active |
//! | active | none | probing | probing |
//! | active | none | down | down |
//! | active | none | miswired | miswired |
//! | draining | none | any | draining |
//! | any | active | active | active |
//! | any | active | probing | probing |
//! | any | active | down | down |
//! | any | active | miswired | miswired |
//! | any | drain | any | draining |
//!
//! Health is what traffic says, and active checks where there are any: either has a backend down. Where too few of a
//! pool would be left, what checks say does not count, and what is left of health comes in here.
//!
//! A command goes before the file: it is the later word of the same person. To be drained goes
//! before health: a draining backend gets no new connections, whatever its health, not even when
//! all others are down.

use std::num::NonZeroU32;

use quic::routable::{ConfigId, ServerId};
use quic_lb_config::{Admission, Pool};

use crate::{
    backend::{BackendAddr, BackendId, BackendState},
    registry::Registry,
};

/// The backends of every pool.
#[derive(Clone, Debug)]
pub struct Wanted {
    pools: Vec<Vec<WantedBackend>>,
}

/// One backend, with its number and its state.
#[derive(Clone, Debug)]
pub struct WantedBackend {
    /// Its number.
    pub id: BackendId,
    /// The metric label.
    pub name: String,
    /// Where it listens.
    pub address: BackendAddr,
    /// What its connection IDs carry, one for each of the pool's configurations.
    pub server_ids: Vec<(ConfigId, ServerId)>,
    /// Its share of new connections relative to the others of the pool, as the file says it.
    pub weight: NonZeroU32,
    /// That share for now: in proportion to `weight`, but for backends that start slowly.
    pub share: NonZeroU32,
    /// Whether it gets new connections.
    pub state: BackendState,
}

impl Wanted {
    /// The backends of `pools`. `command` is what the operator wants of a backend (pool name,
    /// backend name) instead of what the file says, `health` what was observed of it; numbers come
    /// from `registry`.
    pub fn new(
        pools: &[Pool],
        command: impl Fn(&str, &str) -> Option<Admission>,
        health: impl Fn(&str, &str) -> BackendState,
        registry: &mut Registry,
    ) -> Self {
        let all = || pools.iter().flat_map(|pool| pool.backends.iter().map(move |b| (pool, b)));
        let names = all().map(|(pool, backend)| (&*pool.name, &*backend.name, backend.address));
        let mut ids = registry.assign(names).into_iter();
        let pools = pools.iter().map(|pool| {
            let numbered = pool.backends.iter().zip(ids.by_ref());
            let wanted = numbered.filter_map(|(backend, id)| {
                let command = command(&pool.name, &backend.name);
                Some(WantedBackend {
                    id: id?,
                    name: backend.name.clone(),
                    address: BackendAddr(backend.address),
                    server_ids: backend.server_ids.clone(),
                    weight: backend.weight,
                    share: backend.weight,
                    state: state(backend.admission, command, health(&pool.name, &backend.name)),
                })
            });
            wanted.collect()
        });
        Self { pools: pools.collect() }
    }

    /// The same with less for backends that start slowly: `step` says of a backend (pool name, backend name) how many
    /// of `steps` it has of its share.
    #[must_use]
    pub fn with_slow_starts(
        mut self,
        pools: &[Pool],
        steps: NonZeroU32,
        step: impl Fn(&str, &str) -> Option<NonZeroU32>,
    ) -> Self {
        for (pool, backends) in pools.iter().zip(&mut self.pools) {
            let found: Vec<_> =
                backends.iter().map(|backend| step(&pool.name, &backend.name)).collect();
            if found.iter().all(Option::is_none) {
                continue;
            }
            // Weights are whole numbers, and may be 1: the others get more.
            for (backend, step) in backends.iter_mut().zip(found) {
                backend.share = backend.weight.saturating_mul(step.unwrap_or(steps));
            }
        }
        self
    }

    /// The backends of each pool, in the order of the configuration.
    #[must_use]
    pub fn pools(&self) -> &[Vec<WantedBackend>] {
        &self.pools
    }
}

/// The table at the top of this file.
const fn state(file: Admission, command: Option<Admission>, health: BackendState) -> BackendState {
    let admission = match command {
        Some(command) => command,
        None => file,
    };
    match admission {
        Admission::Draining => BackendState::Draining,
        Admission::Active => health,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    #[test]
    fn every_combination_of_file_command_and_health_has_its_state() {
        use Admission::{Active as A, Draining as D};
        use BackendState::{Active, Down, Draining, Miswired, Probing};
        let table = [
            (A, None, Active, Active),
            (A, None, Probing, Probing),
            (A, None, Down, Down),
            (A, None, Miswired, Miswired),
            (A, Some(A), Active, Active),
            (A, Some(A), Down, Down),
            (A, Some(D), Active, Draining),
            (A, Some(D), Down, Draining),
            (D, None, Active, Draining),
            (D, None, Down, Draining),
            (D, Some(A), Active, Active),
            (D, Some(A), Probing, Probing),
            (D, Some(A), Down, Down),
            (D, Some(A), Miswired, Miswired),
            (D, Some(D), Miswired, Draining),
            (D, Some(D), Active, Draining),
            (D, None, Probing, Draining),
            (D, Some(D), Down, Draining),
        ];
        for (file, command, health, state) in table {
            let mut config = fixtures::config(true);
            config.pools[0].backends[1].admission = file;
            let of_b = |pool: &str, name: &str| (pool, name) == ("web", "b");
            let wanted = Wanted::new(
                &config.pools,
                |pool, name| command.filter(|_| of_b(pool, name)),
                |pool, name| if of_b(pool, name) { health } else { Active },
                &mut Registry::default(),
            );
            let states: Vec<_> = wanted.pools()[0].iter().map(|backend| backend.state).collect();
            assert_eq!(states, [Active, state, Active], "{file:?}, {command:?}, {health:?}");
        }
    }

    #[test]
    fn backends_keep_their_order_and_what_the_file_says_about_them() {
        let config = fixtures::config(true);
        let mut registry = Registry::default();
        let mut wanted =
            || Wanted::new(&config.pools, |_, _| None, |_, _| BackendState::Active, &mut registry);
        let (first, second) = (wanted(), wanted());
        for ((backend, wanted), again) in
            config.pools[0].backends.iter().zip(&first.pools()[0]).zip(&second.pools()[0])
        {
            assert_eq!(wanted.name, backend.name);
            assert_eq!(wanted.address, BackendAddr(backend.address));
            assert_eq!(wanted.server_ids, backend.server_ids);
            assert_eq!(wanted.weight, backend.weight);
            assert_eq!(wanted.id, again.id, "a number stays with its backend");
        }
    }

    #[test]
    fn shares_are_weights_but_for_who_starts_slowly() {
        let mut config = fixtures::config(true);
        config.pools.push(Pool { name: "api".into(), ..config.pools[0].clone() });
        config.pools[0].backends[1].weight = NonZeroU32::new(7).unwrap();
        let shares = |slow: &[(&str, u32)]| {
            let slow: Vec<_> = slow.iter().map(|(name, n)| (*name, NonZeroU32::new(*n))).collect();
            let step = |pool: &str, name: &str| {
                let found = slow.iter().find(|(slow, _)| pool == "web" && *slow == name);
                found.and_then(|(_, step)| *step)
            };
            let active = |_: &str, _: &str| BackendState::Active;
            let wanted = Wanted::new(&config.pools, |_, _| None, active, &mut Registry::default());
            let wanted = wanted.with_slow_starts(&config.pools, NonZeroU32::new(10).unwrap(), step);
            let shares = |pool: &Vec<WantedBackend>| {
                pool.iter().map(|backend| backend.share.get()).collect::<Vec<_>>()
            };
            wanted.pools().iter().map(shares).collect::<Vec<_>>()
        };
        assert_eq!(shares(&[]), [[1, 7, 1], [1, 1, 1]]);
        assert_eq!(shares(&[("a", 1)]), [[1, 70, 10], [1, 1, 1]]);
        assert_eq!(shares(&[("b", 3), ("c", 9)]), [[10, 21, 9], [1, 1, 1]]);
    }
}
