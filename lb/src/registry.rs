//! What outlives snapshots: the numbers of backends, what admission has counted, and what was learnt
//! of each pool.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    net::SocketAddr,
    sync::Arc,
};

use quic_lb_config::Config;
use serde::{Deserialize, Serialize};

use crate::{
    admission::{AdmissionState, Gate},
    backend::{BackendId, MAX_BACKENDS},
    learnt::LearntCids,
    listeners::{HandedListener, ListenerNumbers, Placed},
    refusing::Refusing,
};

/// What outlives snapshots: who has which [`BackendId`], what admission has counted, and what was
/// learnt of each pool.
#[derive(Debug, Default)]
pub struct Registry {
    slots: Vec<Slot>,
    /// The slots of the backends at an address.
    by_address: BTreeMap<SocketAddr, Vec<usize>>,
    /// What admission has counted, and where each listener stands.
    pub admission: AdmissionState,
    /// Who has which [`ListenerIndex`](crate::client_path::ListenerIndex).
    pub(crate) listeners: ListenerNumbers,
    /// What workers are told of backends that refuse something.
    pub(crate) refusing: Arc<Refusing>,
    /// By the name of the pool.
    learnt: BTreeMap<String, Arc<LearntCids>>,
}

/// What a snapshot shares with those before it.
#[derive(Debug)]
pub(crate) struct Lasting {
    /// Those that have sockets.
    pub(crate) listeners: Vec<(Placed, Gate)>,
    /// Of each pool, in the order of its configuration.
    pub(crate) learnt: Vec<Arc<LearntCids>>,
    pub(crate) refusing: Arc<Refusing>,
}

/// Who has which number, for a successor.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct HandedNumbers {
    backends: Vec<Slot>,
    listeners: Vec<HandedListener>,
}

/// Who has a number, or had it last.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Slot {
    pool: String,
    name: String,
    #[serde(with = "crate::zoned")]
    address: SocketAddr,
    generation: u16,
    in_use: bool,
}

impl Registry {
    /// Who has which number, for a successor.
    pub(crate) fn handed(&self) -> HandedNumbers {
        HandedNumbers { backends: self.slots.clone(), listeners: self.listeners.handed() }
    }

    /// One in which everybody has the number that they had for the predecessor.
    pub(crate) fn succeeding(handed: HandedNumbers) -> Self {
        let HandedNumbers { backends: slots, listeners } = handed;
        let listeners = ListenerNumbers::succeeding(listeners);
        let mut by_address: BTreeMap<SocketAddr, Vec<usize>> = BTreeMap::new();
        for (number, slot) in slots.iter().take(MAX_BACKENDS).enumerate() {
            by_address.entry(slot.address).or_default().push(number);
        }
        Self { slots, by_address, listeners, ..Self::default() }
    }

    /// The numbers of backends (pool name, backend name, address) that are wanted from now on, in
    /// their order; `None` for those that there is no number left for.
    ///
    /// A backend keeps its number for as long as it is wanted, and gets it back when it returns. One
    /// that changes its address is another backend. Slots of backends that are gone are given away
    /// again only when none is fresh.
    pub(crate) fn assign<'a>(
        &mut self,
        wanted: impl Iterator<Item = (&'a str, &'a str, SocketAddr)> + Clone,
    ) -> Vec<Option<BackendId>> {
        self.slots.iter_mut().for_each(|slot| slot.in_use = false);
        // All that are known come before the first that is new, lest that one take the slot of a
        // backend that stands further down.
        let mut slots: Vec<_> = wanted.clone().map(|backend| self.known(backend)).collect();
        slots.iter().flatten().for_each(|&slot| self.slots[slot].in_use = true);
        for (slot, backend) in slots.iter_mut().zip(wanted) {
            // The same backend may be wanted twice.
            *slot = slot.or_else(|| self.known(backend)).or_else(|| self.take(backend));
        }
        slots.into_iter().map(|slot| slot.map(|slot| self.id(slot))).collect()
    }

    /// What a snapshot of `config` is to share with those before it.
    pub(crate) fn lasting(&mut self, config: &Config) -> Lasting {
        // Of what may be remembered, half is for connection IDs, and each pool has its share.
        let share = config.limits.remembered.get().div_ceil(2) / config.pools.len().max(1);
        let mut before = std::mem::take(&mut self.learnt);
        let learnt: Vec<_> = config
            .pools
            .iter()
            .map(|pool| {
                let known = before.remove(&pool.name);
                let learnt = known.unwrap_or_else(|| Arc::new(LearntCids::new(share)));
                learnt.set_capacity(share);
                self.learnt.insert(pool.name.clone(), Arc::clone(&learnt));
                learnt
            })
            .collect();
        self.listeners.assign(config);
        let placed: Vec<_> = self.listeners.placed().collect();
        let gates = self.admission.gates(config, &placed);
        let refusing = Arc::clone(&self.refusing);
        Lasting { listeners: placed.into_iter().zip(gates).collect(), learnt, refusing }
    }

    fn known(&self, (pool, name, address): (&str, &str, SocketAddr)) -> Option<usize> {
        let slots = self.by_address.get(&address)?;
        let is_it =
            |&&slot: &&usize| self.slots[slot].name == name && self.slots[slot].pool == pool;
        slots.iter().find(is_it).copied()
    }

    fn take(&mut self, (pool, name, address): (&str, &str, SocketAddr)) -> Option<usize> {
        let mut taken = Slot {
            pool: pool.to_owned(),
            name: name.to_owned(),
            address,
            generation: 0,
            in_use: true,
        };
        let slot = if self.slots.len() < MAX_BACKENDS {
            self.slots.push(taken);
            self.slots.len() - 1
        } else {
            let slot = self.slots.iter().position(|slot| !slot.in_use)?;
            let before = &mut self.slots[slot];
            taken.generation = before.generation.wrapping_add(1);
            if let Entry::Occupied(mut of_address) = self.by_address.entry(before.address) {
                of_address.get_mut().retain(|other| *other != slot);
                if of_address.get().is_empty() {
                    of_address.remove();
                }
            }
            *before = taken;
            slot
        };
        self.by_address.entry(address).or_default().push(slot);
        Some(slot)
    }

    fn id(&self, slot: usize) -> BackendId {
        let generation = self.slots[slot].generation;
        #[expect(clippy::cast_possible_truncation, reason = "below MAX_BACKENDS")]
        BackendId { slot: slot as u16, generation }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Backend = (&'static str, String, SocketAddr);

    fn backend(n: usize) -> Backend {
        ("web", format!("b{n}"), ([127, 0, 0, 1], u16::try_from(n).unwrap()).into())
    }

    fn assign(registry: &mut Registry, wanted: &[Backend]) -> Vec<Option<BackendId>> {
        registry.assign(wanted.iter().map(|(pool, name, address)| (*pool, &**name, *address)))
    }

    #[test]
    fn a_number_stays_with_pool_name_and_address() {
        let mut registry = Registry::default();
        let [a, b] = [backend(1), backend(2)];
        let [Some(of_a), Some(of_b)] = assign(&mut registry, &[a.clone(), b.clone()])[..] else {
            panic!("there is room")
        };
        assert_ne!(of_a, of_b);
        assert_eq!(assign(&mut registry, &[b.clone(), a.clone()]), [Some(of_b), Some(of_a)]);
        assert_eq!(assign(&mut registry, std::slice::from_ref(&b)), [Some(of_b)]);
        let mut others = [a.clone(), a.clone(), a.clone()];
        others[0].0 = "api";
        others[1].1 = "c".into();
        others[2].2 = b.2;
        for other in others {
            let id = assign(&mut registry, std::slice::from_ref(&other))[0].unwrap();
            assert!(id != of_a && id != of_b, "{other:?}");
        }
        assert_eq!(assign(&mut registry, &[a, b]), [Some(of_a), Some(of_b)]);
    }

    #[test]
    fn a_successor_gives_everybody_the_number_that_they_had() {
        let mut registry = Registry::default();
        let [a, b, c] = [backend(1), backend(2), backend(3)];
        let before = assign(&mut registry, &[a.clone(), b.clone()]);
        let mut successor = Registry::succeeding(registry.handed());
        let after = assign(&mut successor, &[c, b, a]);
        assert_eq!([after[2], after[1]], before[..]);
        assert!(!before.contains(&after[0]), "the new one has another");
    }

    #[test]
    fn a_full_registry_gives_away_numbers_of_backends_that_are_gone_and_no_others() {
        let mut registry = Registry::default();
        let all: Vec<_> = (1..=MAX_BACKENDS).map(backend).collect();
        let ids = assign(&mut registry, &all);
        assert!(ids.iter().all(Option::is_some));

        // The new one stands in front of all that stay; the last of the others is gone.
        let mut wanted = vec![backend(MAX_BACKENDS + 1)];
        wanted.extend_from_slice(&all[..MAX_BACKENDS - 1]);
        let after = assign(&mut registry, &wanted);
        assert_eq!(after[1..], ids[..MAX_BACKENDS - 1], "who stays keeps the number");
        let (new, gone) = (after[0].unwrap(), ids[MAX_BACKENDS - 1].unwrap());
        assert_eq!((new.slot(), new.generation()), (gone.slot(), gone.generation() + 1));

        // Whose slot was given away is somebody else when it comes back.
        wanted[0] = backend(MAX_BACKENDS);
        let back = assign(&mut registry, &wanted)[0].unwrap();
        assert_eq!((back.slot(), back.generation()), (gone.slot(), gone.generation() + 2));

        wanted.push(backend(MAX_BACKENDS + 2));
        assert_eq!(assign(&mut registry, &wanted).last(), Some(&None), "there is no number left");
    }
}
