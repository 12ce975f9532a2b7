//! A map that never holds more than it has room for, and forgets what is not used: what the tables are
//! made of that all workers share.

use std::{
    hash::{BuildHasherDefault, Hasher},
    sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed},
};

use dashmap::{DashMap, Entry as Place};

use crate::backend::BackendId;

/// An entry as a successor gets it: key, backend, second of its last use, note.
pub(crate) type Entry = (u64, BackendId, u32, u32);

/// Many small shards: sweeping one holds up a worker for microseconds at most.
const SHARDS: usize = 256;

/// What finding an entry does to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// It counts as used now.
    Prolong,
    /// Nothing: the decision is only told.
    Peek,
}

/// The time in whole seconds, and for how many an entry is kept after its last use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    pub(crate) now: u32,
    pub(crate) lifetime: u32,
}

impl Moment {
    const fn is_stale(self, last_used: u32) -> bool {
        self.now.saturating_sub(last_used) > self.lifetime
    }
}

/// A map from keyed 64-bit hashes to backends that never holds more than `capacity` entries. Of a
/// full map, new entries are refused: what is there belongs to somebody.
#[derive(Debug)]
pub(crate) struct Bounded {
    map: DashMap<u64, Remembered, BuildHasherDefault<AlreadyHashed>>,
    pub(crate) len: AtomicUsize,
    pub(crate) capacity: AtomicUsize,
    /// How much of that is for handshakes whose clients have proved their address.
    reserve: usize,
}

#[derive(Debug)]
struct Remembered {
    backend: BackendId,
    last_used: AtomicU32,
    /// Of a handshake: the flag [`VALIDATED`], and what stands for the destination connection ID
    /// that it began with. Of a connection ID that a server has given: that flag, and how many
    /// Initials from elsewhere have gone on. Of a connection: since when, and how many flows it has
    /// begun without proof. Of a learnt connection ID: its length, as a bit.
    note: AtomicU32,
}

/// The client of this handshake has proved its address.
pub(crate) const VALIDATED: u32 = 1 << 31;

impl Bounded {
    pub(crate) fn new(capacity: usize, reserve: usize) -> Self {
        let map = DashMap::with_capacity_and_hasher_and_shard_amount(
            capacity,
            BuildHasherDefault::default(),
            SHARDS,
        );
        Self { map, len: AtomicUsize::new(0), capacity: capacity.into(), reserve }
    }

    pub(crate) fn get(&self, key: u64, moment: Moment, usage: Use) -> Option<BackendId> {
        let entry = self.map.get(&key)?;
        if moment.is_stale(entry.last_used.load(Relaxed)) {
            return None;
        }
        if usage == Use::Prolong {
            entry.last_used.store(moment.now, Relaxed);
        }
        Some(entry.backend)
    }

    pub(crate) fn note(&self, key: u64, moment: Moment) -> Option<u32> {
        let entry = self.map.get(&key)?;
        let stale = moment.is_stale(entry.last_used.load(Relaxed));
        (!stale).then(|| entry.note.load(Relaxed))
    }

    /// Whether there is an entry, and its note can become what `next` says.
    pub(crate) fn spend(
        &self,
        key: u64,
        moment: Moment,
        usage: Use,
        next: impl Fn(u32) -> Option<u32>,
    ) -> bool {
        let Some(entry) = self.map.get(&key) else { return false };
        if moment.is_stale(entry.last_used.load(Relaxed)) {
            return false;
        }
        match usage {
            Use::Prolong => entry.note.fetch_update(Relaxed, Relaxed, next).is_ok(),
            Use::Peek => next(entry.note.load(Relaxed)).is_some(),
        }
    }

    /// The entry was used now, and its note is empty.
    pub(crate) fn renew(&self, key: u64, backend: BackendId, moment: Moment) {
        if let Some(entry) = self.map.get(&key) {
            entry.last_used.store(moment.now, Relaxed);
            entry.note.store(0, Relaxed);
            return;
        }
        self.insert(key, backend, 0, moment);
    }

    pub(crate) fn insert(&self, key: u64, backend: BackendId, note: u32, moment: Moment) {
        let fresh = || {
            let (last_used, note) = (AtomicU32::new(moment.now), AtomicU32::new(note));
            Remembered { backend, last_used, note }
        };
        match self.map.entry(key) {
            Place::Occupied(mut entry) => {
                let stale = moment.is_stale(entry.get().last_used.load(Relaxed));
                if stale {
                    entry.insert(fresh());
                } else {
                    entry.get().last_used.store(moment.now, Relaxed);
                    // The backend stays; that its client is who it says may become known.
                    if note & VALIDATED != 0 {
                        entry.get().note.store(note, Relaxed);
                    }
                }
            }
            Place::Vacant(entry) => {
                let capacity = self.capacity.load(Relaxed);
                let limit = match note & VALIDATED {
                    0 => capacity - self.reserve,
                    _ => capacity,
                };
                let reserved =
                    self.len.fetch_update(Relaxed, Relaxed, |len| (len < limit).then_some(len + 1));
                if reserved.is_ok() {
                    entry.insert(fresh());
                }
            }
        }
    }

    /// Removes an entry, if it is of this backend.
    pub(crate) fn remove(&self, key: u64, backend: BackendId) {
        if self.map.remove_if(&key, |_, entry| entry.backend == backend).is_some() {
            self.len.fetch_sub(1, Relaxed);
        }
    }

    /// All entries, for a successor.
    #[expect(clippy::disallowed_methods, reason = "they go into a map again")]
    pub(crate) fn handed(&self) -> Vec<Entry> {
        let entries = self.map.iter();
        let entry = |key: u64, of: &Remembered| {
            (key, of.backend, of.last_used.load(Relaxed), of.note.load(Relaxed))
        };
        entries.map(|of| entry(*of.key(), of.value())).collect()
    }

    /// Takes over what a predecessor had, as far as there is room.
    pub(crate) fn take_over(&self, entries: Vec<Entry>, mut kept: impl FnMut(u32)) {
        let room = self.capacity.load(Relaxed).saturating_sub(self.len.load(Relaxed));
        for (key, backend, last_used, note) in entries.into_iter().take(room) {
            let (last_used, new_note) = (AtomicU32::new(last_used), AtomicU32::new(note));
            let entry = Remembered { backend, last_used, note: new_note };
            if self.map.insert(key, entry).is_none() {
                self.len.fetch_add(1, Relaxed);
            }
            kept(note);
        }
    }

    /// Removes stale entries, and shows the notes of the others.
    #[expect(clippy::disallowed_methods, reason = "which entries go does not depend on the order")]
    pub(crate) fn sweep(&self, moment: Moment, mut kept: impl FnMut(u32)) {
        let mut gone = 0;
        self.map.retain(|_, entry| {
            let stale = moment.is_stale(entry.last_used.load(Relaxed));
            gone += usize::from(stale);
            if !stale {
                kept(entry.note.load(Relaxed));
            }
            !stale
        });
        self.len.fetch_sub(gone, Relaxed);
    }
}

/// Keys are hashes already.
#[derive(Debug, Default)]
struct AlreadyHashed(u64);

impl Hasher for AlreadyHashed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write_u64(&mut self, key: u64) {
        self.0 = key;
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("keys are u64");
    }
}
