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

use std::{num::NonZeroU32, sync::Arc};

use quic::routable::{ConfigId, ServerId};
use quic_lb_config::{Admission, Pool};

use crate::{
    backend::{BackendAddr, BackendId, BackendState},
    registry::Registry,
};

/// The whole share of a backend that starts slowly.
pub const STEPS: NonZeroU32 = NonZeroU32::new(10).expect("it is more than 0");

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
    pub name: Arc<str>,
    /// Where it listens.
    pub address: BackendAddr,
    /// What its connection IDs carry, one for each of the pool's configurations.
    pub server_ids: Arc<[(ConfigId, ServerId)]>,
    /// Whether it is to get new connections, as the file says it.
    pub admission: Admission,
    /// Its share of new connections relative to the others of the pool, as the file says it.
    pub weight: NonZeroU32,
    /// That share for now: in proportion to `weight`, but for backends that start slowly.
    pub share: NonZeroU32,
    /// Whether it gets new connections.
    pub state: BackendState,
}

/// What the state of a backend, and its share, follow from.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// What the operator wants of it, by command or else by the file.
    pub admission: Admission,
    /// What was observed of it.
    pub health: BackendState,
    /// How many steps of [`STEPS`] it has of its share, while it starts slowly.
    pub step: Option<NonZeroU32>,
}

impl Wanted {
    /// The backends of `pools`, with numbers from `registry`, and each as the file says it: well. One for which there is no
    /// number is left out.
    pub fn new(pools: &[Pool], registry: &mut Registry) -> Self {
        let all = || pools.iter().flat_map(|pool| pool.backends.iter().map(move |b| (pool, b)));
        let names = all().map(|(pool, backend)| (&*pool.name, &*backend.name, backend.address));
        let mut ids = registry.assign(names).into_iter();
        let pools = pools.iter().map(|pool| {
            let numbered = pool.backends.iter().zip(ids.by_ref());
            let wanted = numbered.filter_map(|(backend, id)| {
                Some(WantedBackend {
                    id: id?,
                    name: backend.name.as_str().into(),
                    address: BackendAddr(backend.address),
                    server_ids: backend.server_ids.as_slice().into(),
                    admission: backend.admission,
                    weight: backend.weight,
                    share: backend.weight,
                    state: state(backend.admission, BackendState::Active),
                })
            });
            wanted.collect()
        });
        Self { pools: pools.collect() }
    }

    /// Decides about each backend by what is `known` of it: the pool's place, its own there, and the backend.
    pub fn decide(&mut self, mut known: impl FnMut(usize, usize, &WantedBackend) -> Known) {
        for (pool, backends) in self.pools.iter_mut().enumerate() {
            let mut any_starts = false;
            for (nth, backend) in backends.iter_mut().enumerate() {
                let Known { admission, health, step } = known(pool, nth, backend);
                backend.state = state(admission, health);
                // Weights are whole numbers, and may be 1: the others get more.
                backend.share = backend.weight.saturating_mul(step.unwrap_or(STEPS));
                any_starts |= step.is_some();
            }
            if !any_starts {
                backends.iter_mut().for_each(|backend| backend.share = backend.weight);
            }
        }
    }

    /// The backends of each pool, in the order of the configuration.
    #[must_use]
    pub fn pools(&self) -> &[Vec<WantedBackend>] {
        &self.pools
    }
}

/// The table at the top of this file.
const fn state(admission: Admission, health: BackendState) -> BackendState {
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
            let mut wanted = Wanted::new(&config.pools, &mut Registry::default());
            wanted.decide(|pool, nth, backend| {
                let is_b = of_b(&config.pools[pool].name, &backend.name);
                assert_eq!(is_b, (pool, nth) == (0, 1));
                Known {
                    admission: command.filter(|_| is_b).unwrap_or(backend.admission),
                    health: if is_b { health } else { Active },
                    step: None,
                }
            });
            let states: Vec<_> = wanted.pools()[0].iter().map(|backend| backend.state).collect();
            assert_eq!(states, [Active, state, Active], "{file:?}, {command:?}, {health:?}");
        }
    }

    #[test]
    fn backends_keep_their_order_and_what_the_file_says_about_them() {
        let config = fixtures::config(true);
        let mut registry = Registry::default();
        let mut wanted = || Wanted::new(&config.pools, &mut registry);
        let (first, second) = (wanted(), wanted());
        for ((backend, wanted), again) in
            config.pools[0].backends.iter().zip(&first.pools()[0]).zip(&second.pools()[0])
        {
            assert_eq!(*wanted.name, *backend.name);
            assert_eq!(wanted.address, BackendAddr(backend.address));
            assert_eq!(*wanted.server_ids, *backend.server_ids);
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
            let mut wanted = Wanted::new(&config.pools, &mut Registry::default());
            wanted.decide(|pool, _, backend| {
                let found = slow.iter().find(|(slow, _)| pool == 0 && *slow == &*backend.name);
                Known {
                    admission: backend.admission,
                    health: BackendState::Active,
                    step: found.and_then(|(_, step)| NonZeroU32::new(*step)),
                }
            });
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
