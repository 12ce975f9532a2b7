//! What outlives snapshots: the numbers of backends, and what admission has counted.

use std::net::SocketAddr;

use crate::{
    admission::Ledger,
    backend::{BackendId, MAX_BACKENDS},
};

/// What outlives snapshots: who has which [`BackendId`], and what admission has counted.
#[derive(Debug, Default)]
pub struct Registry {
    slots: Vec<Slot>,
    /// What admission has counted, and where each listener stands.
    pub ledger: Ledger,
}

#[derive(Debug)]
struct Slot {
    pool: String,
    name: String,
    address: SocketAddr,
    generation: u16,
    in_use: bool,
}

impl Registry {
    pub(crate) fn begin(&mut self) {
        self.slots.iter_mut().for_each(|slot| slot.in_use = false);
    }

    /// The number of the backend with this identity. A backend that changes its address is another
    /// backend. Slots of backends that are gone are given away again only when none is fresh.
    pub(crate) fn id(&mut self, pool: &str, name: &str, address: SocketAddr) -> Option<BackendId> {
        let known = self
            .slots
            .iter()
            .position(|slot| slot.name == name && slot.pool == pool && slot.address == address);
        let slot = match known {
            Some(slot) => slot,
            None if self.slots.len() < MAX_BACKENDS => {
                let (pool, name) = (pool.to_owned(), name.to_owned());
                self.slots.push(Slot { pool, name, address, generation: 0, in_use: false });
                self.slots.len() - 1
            }
            None => {
                let free = self.slots.iter().position(|slot| !slot.in_use)?;
                let slot = &mut self.slots[free];
                slot.generation = slot.generation.wrapping_add(1);
                (slot.pool, slot.name, slot.address) = (pool.to_owned(), name.to_owned(), address);
                free
            }
        };
        self.slots[slot].in_use = true;
        let generation = self.slots[slot].generation;
        #[expect(clippy::cast_possible_truncation, reason = "below MAX_BACKENDS")]
        Some(BackendId { slot: slot as u16, generation })
    }
}
