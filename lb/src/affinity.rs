//! Affinity: which backend a client path belongs to, whatever carries the datagrams there. Rule 4
//! goes by it.
//!
//! A path belongs to the first backend that answered on it, before that to the first that it went
//! to, for as long as the entry lives; from a backend that is down or gone it goes to the next one
//! that answers. Nobody but backends can move it. Where flows carry
//! the datagrams, they hold the entry, and it ends with the last of them. Where nothing is kept per
//! path besides, the entry lives by its use. The table has a fixed size; when it is full, paths that
//! are new are not remembered.

use std::{
    num::NonZeroU32,
    time::{Duration, Instant},
};

use hashbrown::HashTable;

use crate::{
    backend::BackendId,
    client_path::{ClientPath, ListenerIndex, PathKey},
};

/// A sweep looks at this part of the entries, so that sixteen sweeps have seen them all.
const SWEEP_DIVISOR: usize = 16;

/// The table.
#[derive(Debug)]
pub(crate) struct AffinityTable {
    capacity: usize,
    hash: ahash::RandomState,
    epoch: Instant,
    entries: Vec<Entry>,
    free: Vec<u32>,
    by_path: HashTable<u32>,
    sweep_from: usize,
    /// How often a path has gone from a backend that had answered on it to another, counted from one.
    moves: u32,
}

/// An entry that a flow holds; to be released when the flow ends.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub(crate) struct Held {
    entry: u32,
    /// [`AffinityTable::moves`] when the path was seen to belong to the backend of the flow; 0 before.
    settled: u32,
}

#[derive(Debug)]
struct Entry {
    path: PathKey,
    backend: BackendId,
    /// Whether that one has answered.
    answered: bool,
    /// Flows that hold it.
    holders: u32,
    /// When it was last used without a flow, in seconds since the epoch.
    last_used: Option<NonZeroU32>,
}

impl AffinityTable {
    /// An empty table for `capacity` client paths.
    pub(crate) fn new(capacity: usize, epoch: Instant, hash: &ahash::RandomState) -> Self {
        Self {
            capacity,
            hash: hash.clone(),
            epoch,
            entries: Vec::with_capacity(capacity),
            free: Vec::with_capacity(capacity),
            by_path: HashTable::with_capacity(capacity),
            sweep_from: 0,
            moves: 1,
        }
    }

    /// The backend of a client path.
    pub(crate) fn get(&self, listener: ListenerIndex, path: &ClientPath) -> Option<BackendId> {
        let path = PathKey::new(listener, path);
        let same = |&index: &u32| self.entries[index as usize].path == path;
        let index = *self.by_path.find(self.hash.hash_one(path), same)?;
        Some(self.entries[index as usize].backend)
    }

    /// Holds the entry of a client path for a flow, which makes it one of `backend` if it is new.
    /// `None` when there is no room.
    pub(crate) fn hold(&mut self, path: PathKey, backend: BackendId) -> Option<Held> {
        let index = self.entry(path, backend)?;
        self.entries[index as usize].holders += 1;
        Some(Held { entry: index, settled: 0 })
    }

    /// The backend of the path of an entry, and whether it has answered: for a successor.
    pub(crate) fn handed(&self, held: &Held) -> (BackendId, bool) {
        let entry = &self.entries[held.entry as usize];
        (entry.backend, entry.answered)
    }

    /// As [`Self::hold`], of a path that a predecessor has said this of.
    pub(crate) fn take_over(
        &mut self,
        path: PathKey,
        (backend, answered): (BackendId, bool),
    ) -> Option<Held> {
        let held = self.hold(path, backend)?;
        self.entries[held.entry as usize].answered |= answered;
        Some(held)
    }

    /// Whether an answer of the flow's backend would change nothing: mostly, and then nothing of the entry has
    /// to be looked at.
    #[inline]
    pub(crate) const fn is_settled(&self, held: &Held) -> bool {
        held.settled == self.moves
    }

    /// Takes note that `backend`, that of a flow, has answered on the path of an entry. `is_gone` says which
    /// backends give no answers any more.
    pub(crate) fn answered(
        &mut self,
        held: &mut Held,
        backend: BackendId,
        is_gone: impl Fn(BackendId) -> bool,
    ) {
        let entry = &mut self.entries[held.entry as usize];
        if entry.backend != backend {
            if entry.answered {
                if !is_gone(entry.backend) {
                    return;
                }
                self.moves = self.moves.wrapping_add(1).max(1);
            }
            entry.backend = backend;
        }
        entry.answered = true;
        held.settled = self.moves;
    }

    /// Gives up what a flow has held.
    pub(crate) fn release(&mut self, held: Held) {
        let Held { entry: index, .. } = held;
        let entry = &mut self.entries[index as usize];
        entry.holders -= 1;
        if entry.is_over() {
            self.remove(index);
        }
    }

    /// Takes note of a datagram that goes to `backend` without a flow.
    pub(crate) fn used(
        &mut self,
        now: Instant,
        listener: ListenerIndex,
        path: &ClientPath,
        backend: BackendId,
    ) {
        let seconds = self.seconds(now);
        if let Some(index) = self.entry(PathKey::new(listener, path), backend) {
            self.entries[index as usize].last_used = Some(seconds);
        }
    }

    /// Forgets paths that no flow holds and that were not used for longer than `idle`. Each call
    /// looks at a part of the table.
    pub(crate) fn sweep(&mut self, now: Instant, idle: Duration) {
        let now = self.seconds(now);
        let share = self.entries.len().div_ceil(SWEEP_DIVISOR);
        for _ in 0..share {
            let index = self.sweep_from;
            self.sweep_from = (index + 1) % self.entries.len();
            let entry = &mut self.entries[index];
            let is_stale =
                |used: NonZeroU32| u64::from(now.get().saturating_sub(used.get())) > idle.as_secs();
            if entry.last_used.is_some_and(is_stale) {
                entry.last_used = None;
                if entry.is_over() {
                    #[expect(clippy::cast_possible_truncation, reason = "numbered by u32")]
                    self.remove(index as u32);
                }
            }
        }
    }

    /// How many client paths there are.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.by_path.len()
    }

    /// The entry of `path`, which is made if there is room.
    fn entry(&mut self, path: PathKey, backend: BackendId) -> Option<u32> {
        let Self { hash, entries, free, by_path, .. } = self;
        let key = hash.hash_one(path);
        if let Some(&index) = by_path.find(key, |&index| entries[index as usize].path == path) {
            return Some(index);
        }
        let entry = Entry { path, backend, answered: false, holders: 0, last_used: None };
        let index = match free.pop() {
            Some(index) => {
                entries[index as usize] = entry;
                index
            }
            None if entries.len() < self.capacity => {
                let index = u32::try_from(entries.len()).ok()?;
                entries.push(entry);
                index
            }
            None => return None,
        };
        by_path.insert_unique(key, index, |&index| hash.hash_one(entries[index as usize].path));
        Some(index)
    }

    fn remove(&mut self, index: u32) {
        let key = self.hash.hash_one(self.entries[index as usize].path);
        if let Ok(entry) = self.by_path.find_entry(key, |&other| other == index) {
            entry.remove();
            self.free.push(index);
        }
    }

    /// Since the epoch, which was a second after nothing.
    fn seconds(&self, now: Instant) -> NonZeroU32 {
        let since = now.saturating_duration_since(self.epoch).as_secs();
        NonZeroU32::MIN.saturating_add(u32::try_from(since).unwrap_or(u32::MAX))
    }
}

impl Entry {
    const fn is_over(&self) -> bool {
        self.holders == 0 && self.last_used.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    const EDGE: ListenerIndex = ListenerIndex(0);

    fn path(port: u16) -> ClientPath {
        ClientPath { client: ([192, 0, 2, 1], port).into(), local: None }
    }

    fn table(capacity: usize) -> (AffinityTable, Instant) {
        let now = Instant::now();
        let hash = ahash::RandomState::with_seeds(1, 2, 3, 4);
        (AffinityTable::new(capacity, now, &hash), now)
    }

    fn sweep(table: &mut AffinityTable, now: Instant) {
        (0..SWEEP_DIVISOR).for_each(|_| table.sweep(now, Duration::from_secs(10)));
    }

    #[test]
    fn an_entry_without_flows_lives_by_its_use_and_is_never_re_pointed() {
        let [a, b] = fixtures::backend_ids();
        let (mut table, start) = table(10);
        for seconds in (0..60).step_by(10) {
            let now = start + Duration::from_secs(seconds);
            table.used(now, EDGE, &path(1), if seconds == 0 { a } else { b });
            sweep(&mut table, now + Duration::from_secs(10));
            assert_eq!(table.get(EDGE, &path(1)), Some(a), "at {seconds} s");
        }
        sweep(&mut table, start + Duration::from_secs(61));
        assert_eq!(table.get(EDGE, &path(1)), None);
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn a_full_table_keeps_what_it_has_and_refuses_the_rest() {
        let [a, _] = fixtures::backend_ids();
        let (mut table, start) = table(10);
        for port in 1..100 {
            table.used(start, EDGE, &path(port), a);
        }
        assert_eq!(table.len(), 10);
        assert_eq!(table.hold(PathKey::new(EDGE, &path(50)), a), None);
        // One that is there can be held.
        let held = table.hold(PathKey::new(EDGE, &path(1)), a).unwrap();
        let later = start + Duration::from_secs(11);
        sweep(&mut table, later);
        assert_eq!((table.len(), table.get(EDGE, &path(1))), (1, Some(a)));
        table.used(later, EDGE, &path(50), a);
        assert_eq!(table.get(EDGE, &path(50)), Some(a));
        table.release(held);
        assert_eq!(table.get(EDGE, &path(1)), None);
    }

    /// Each answer of a flow's backend, as the flow table tells it.
    fn answer(table: &mut AffinityTable, held: &mut Held, backend: BackendId, gone: &[BackendId]) {
        if !table.is_settled(held) {
            table.answered(held, backend, |id| gone.contains(&id));
        }
    }

    #[test]
    fn a_path_goes_to_and_fro_between_backends_as_they_go_and_answer() {
        let [a, b] = fixtures::backend_ids();
        let (mut table, _) = table(10);
        let key = PathKey::new(EDGE, &path(1));
        let mut of_a = table.hold(key, a).unwrap();
        let mut of_b = table.hold(key, b).unwrap();
        let owner = |table: &AffinityTable| table.get(EDGE, &path(1));
        // Who answers first has it, and keeps it.
        answer(&mut table, &mut of_b, b, &[]);
        assert_eq!(owner(&table), Some(b));
        answer(&mut table, &mut of_a, a, &[]);
        assert_eq!(owner(&table), Some(b));
        for _ in 0..3 {
            answer(&mut table, &mut of_a, a, &[b]);
            assert_eq!(owner(&table), Some(a));
            assert!(table.is_settled(&of_a));
            answer(&mut table, &mut of_b, b, &[]);
            assert_eq!(owner(&table), Some(a));
            answer(&mut table, &mut of_b, b, &[a]);
            assert_eq!(owner(&table), Some(b));
            assert!(table.is_settled(&of_b) && !table.is_settled(&of_a));
        }
        table.release(of_a);
        table.release(of_b);
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn listeners_have_paths_of_their_own() {
        let [a, b] = fixtures::backend_ids();
        let (mut table, start) = table(10);
        table.used(start, EDGE, &path(1), a);
        table.used(start, ListenerIndex(1), &path(1), b);
        assert_eq!(table.get(EDGE, &path(1)), Some(a));
        assert_eq!(table.get(ListenerIndex(1), &path(1)), Some(b));
    }
}
