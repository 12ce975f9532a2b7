//! The connection IDs of servers that have no routable ones, by pool: part of the routing snapshot, and
//! older than it.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use crate::{
    backend::BackendId,
    bounded::{Bounded, Entry, Moment, Use},
};

/// The connection IDs of one pool's servers that have no routable ones: the share of each pool is its
/// own.
#[derive(Debug)]
pub struct LearntCids {
    cids: Bounded,
    /// Bit `n` stands for connection IDs of `n` octets: what to try behind a short header.
    lengths: AtomicU32,
    /// Those that were learnt since the last sweep.
    new_lengths: AtomicU32,
}

impl LearntCids {
    /// Room for `capacity` entries.
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            cids: Bounded::new(capacity, 0),
            lengths: AtomicU32::new(0),
            new_lengths: AtomicU32::new(0),
        }
    }

    /// Has room for so many entries from now on; those that are there stay.
    pub(crate) fn set_capacity(&self, capacity: usize) {
        self.cids.capacity.store(capacity, Relaxed);
    }

    /// The lengths that are worth trying, each as a bit.
    pub(crate) fn lengths(&self) -> u32 {
        self.lengths.load(Relaxed)
    }

    /// The backend that uses the connection ID with this hash.
    pub(crate) fn get(&self, key: u64, moment: Moment, usage: Use) -> Option<BackendId> {
        self.cids.get(key, moment, usage)
    }

    /// Remembers that `backend` uses the connection ID of `len` octets with this hash, unless another
    /// is remembered to.
    pub(crate) fn insert(&self, key: u64, len: usize, backend: BackendId, moment: Moment) {
        let length = 1 << len;
        self.new_lengths.fetch_or(length, Relaxed);
        self.lengths.fetch_or(length, Relaxed);
        self.cids.insert(key, backend, length, moment);
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.cids.len.load(Relaxed)
    }

    /// How many there can be.
    pub(crate) fn capacity(&self) -> usize {
        self.cids.capacity.load(Relaxed)
    }

    /// All of them, for a successor.
    pub(crate) fn handed(&self) -> Vec<Entry> {
        self.cids.handed()
    }

    /// Takes over what a predecessor had learnt.
    pub(crate) fn take_over(&self, entries: Vec<Entry>) {
        let mut lengths = 0;
        self.cids.take_over(entries, |length| lengths |= length);
        self.lengths.fetch_or(lengths, Relaxed);
    }

    pub(crate) fn sweep(&self, moment: Moment) {
        self.new_lengths.store(0, Relaxed);
        let mut lengths = 0;
        self.cids.sweep(moment, |length| lengths |= length);
        // What was learnt meanwhile stays; a length that is missed comes back with the next sweep.
        self.lengths.fetch_and(lengths | self.new_lengths.load(Relaxed), Relaxed);
        self.lengths.fetch_or(lengths, Relaxed);
    }
}
