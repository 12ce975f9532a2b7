//! What workers remember together: handshakes in progress, and connection IDs of servers that have
//! no routable ones. Bounded, timed, and never touched on the way of a routable short header.
//!
//! An entry is only ever added where none is: whoever forges a packet cannot move what is there.
//! Handshakes are kept by 4-tuple, so that a forger's entries are of no use to anyone else;
//! connection IDs are learnt from servers alone.

use std::{
    hash::{BuildHasherDefault, Hasher},
    sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed},
    time::{Duration, Instant},
};

use dashmap::{DashMap, Entry};
use quic::{ConnectionId, invariants::LongHeader};

use crate::{
    admission::Handshake,
    backend::BackendId,
    client_path::{ClientPath, ListenerIndex},
    routing::{Lifetimes, PoolRoute},
};

/// How long a handshake is remembered after its last packet: longer than any client goes on trying
/// without an answer that carries a routable connection ID.
const HANDSHAKE_LIFETIME: Duration = Duration::from_secs(30);

/// Many small shards: sweeping one holds up a worker for microseconds at most.
const SHARDS: usize = 256;

/// Remembered handshakes and connection IDs.
#[derive(Debug)]
pub struct Memory {
    hash: ahash::RandomState,
    epoch: Instant,
    handshakes: Bounded,
    connection_ids: Bounded,
    /// Bit `n` stands for connection IDs of `n` octets: what to try behind a short header.
    learnt_lengths: AtomicU32,
}

/// What finding an entry does to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// It counts as used now.
    Prolong,
    /// Nothing: the decision is only told.
    Peek,
}

/// When and to what end something is looked up, or remembered: made once for a batch, since it takes
/// longer than what it is for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lookup {
    handshakes: Moment,
    connection_ids: Moment,
    usage: Use,
}

/// A handshake that goes to a backend.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewHandshake<'a> {
    pub(crate) listener: ListenerIndex,
    pub(crate) path: &'a ClientPath,
    /// Of the packet at hand.
    pub(crate) header: &'a LongHeader<'a>,
    pub(crate) backend: BackendId,
    /// Whether the client has proved its address.
    pub(crate) validated: bool,
}

/// Numbers of entries, by table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Sizes {
    /// Handshakes in progress.
    pub handshakes: usize,
    /// Connection IDs that were learnt from servers.
    pub connection_ids: usize,
}

impl Memory {
    /// Room for `capacity` entries, half of them handshakes. Nobody outside may know `seed`, so that
    /// nobody can aim at a shard or make keys collide.
    #[must_use]
    pub fn new(capacity: usize, epoch: Instant, seed: [u64; 4]) -> Self {
        let half = capacity.div_ceil(2);
        let [a, b, c, d] = seed;
        Self {
            hash: ahash::RandomState::with_seeds(a, b, c, d),
            epoch,
            // Forged senders must not crowd out those who prove to be none.
            handshakes: Bounded::new(half, half / 2),
            connection_ids: Bounded::new(half, 0),
            learnt_lengths: AtomicU32::new(0),
        }
    }

    /// What is looked up at the moment `now`.
    pub(crate) fn lookup(&self, now: Instant, lifetimes: &Lifetimes, usage: Use) -> Lookup {
        Lookup {
            handshakes: self.moment(now, HANDSHAKE_LIFETIME),
            connection_ids: self.moment(now, lifetimes.learnt),
            usage,
        }
    }

    /// The backend that holds the handshake with this 4-tuple and source connection ID.
    pub(crate) fn handshake(
        &self,
        lookup: &Lookup,
        listener: ListenerIndex,
        path: &ClientPath,
        scid: &[u8],
    ) -> Option<BackendId> {
        let key = self.handshake_key(listener, path, scid);
        self.handshakes.get(key, lookup.handshakes, lookup.usage)
    }

    /// What is remembered of the handshake that an Initial towards `dcid` belongs to.
    pub(crate) fn handshake_state(
        &self,
        lookup: &Lookup,
        listener: ListenerIndex,
        path: &ClientPath,
        dcid: &[u8],
        scid: &[u8],
    ) -> Option<Handshake> {
        let key = self.handshake_key(listener, path, scid);
        let note = self.handshakes.note(key, lookup.handshakes)?;
        let same_dcid = note & !VALIDATED == self.dcid_note(dcid);
        Some(Handshake { validated: note & VALIDATED != 0, same_dcid })
    }

    /// Remembers which backend holds a handshake, unless another is remembered to; and, for good, that
    /// its client has been validated.
    pub(crate) fn remember_handshake(&self, lookup: &Lookup, handshake: &NewHandshake<'_>) {
        let &NewHandshake { listener, path, header, backend, validated } = handshake;
        let key = self.handshake_key(listener, path, header.scid);
        let flag = if validated { VALIDATED } else { 0 };
        let note = self.dcid_note(header.dcid) | flag;
        self.handshakes.insert(key, backend, note, lookup.handshakes);
    }

    /// The backend that was seen to use the connection ID of a long header.
    pub(crate) fn connection_id(
        &self,
        lookup: &Lookup,
        pool: &PoolRoute,
        dcid: &[u8],
    ) -> Option<BackendId> {
        let learnt = self.learnt_lengths.load(Relaxed);
        let possible =
            u32::try_from(dcid.len()).is_ok_and(|len| len < 32 && learnt >> len & 1 == 1);
        if !possible {
            return None;
        }
        let key = self.connection_id_key(pool, dcid);
        self.connection_ids.get(key, lookup.connection_ids, lookup.usage)
    }

    /// The backend that was seen to use the connection ID at the start of `rest`, the octets after
    /// the first one of a short header. Every length that a server has used is tried.
    pub(crate) fn connection_id_in_front(
        &self,
        lookup: &Lookup,
        pool: &PoolRoute,
        rest: &[u8],
    ) -> Option<BackendId> {
        let mut lengths = self.learnt_lengths.load(Relaxed);
        while lengths != 0 {
            let len = lengths.trailing_zeros();
            lengths &= lengths - 1;
            if let Some(dcid) = rest.get(..len as usize)
                && let Some(backend) = self.connection_id(lookup, pool, dcid)
            {
                return Some(backend);
            }
        }
        None
    }

    /// Remembers that `backend` uses a connection ID, unless another is remembered to. IDs without
    /// octets, and those longer than versions 1 and 2 allow, are not remembered.
    pub(crate) fn learn_connection_id(
        &self,
        lookup: &Lookup,
        pool: &PoolRoute,
        cid: &[u8],
        backend: BackendId,
    ) {
        let Some(cid) = ConnectionId::new(cid).filter(|cid| !cid.is_empty()) else { return };
        self.learnt_lengths.fetch_or(1 << cid.len(), Relaxed);
        let key = self.connection_id_key(pool, &cid);
        self.connection_ids.insert(key, backend, 0, lookup.connection_ids);
    }

    /// Forgets what has not been used for long. To be called every few seconds, by no worker.
    pub fn sweep(&self, now: Instant, lifetimes: &Lifetimes) {
        self.handshakes.sweep(self.moment(now, HANDSHAKE_LIFETIME));
        self.connection_ids.sweep(self.moment(now, lifetimes.learnt));
    }

    /// How many entries there are.
    #[must_use]
    pub fn sizes(&self) -> Sizes {
        let (handshakes, connection_ids) = (&self.handshakes.len, &self.connection_ids.len);
        Sizes { handshakes: handshakes.load(Relaxed), connection_ids: connection_ids.load(Relaxed) }
    }

    /// How many entries there can be.
    #[must_use]
    pub const fn capacity(&self) -> Sizes {
        let (handshakes, connection_ids) = (&self.handshakes, &self.connection_ids);
        Sizes { handshakes: handshakes.capacity, connection_ids: connection_ids.capacity }
    }

    fn handshake_key(&self, listener: ListenerIndex, path: &ClientPath, scid: &[u8]) -> u64 {
        self.hash.hash_one((listener, path, scid))
    }

    /// What stands for a destination connection ID in a note.
    fn dcid_note(&self, dcid: &[u8]) -> u32 {
        #[expect(clippy::cast_possible_truncation, reason = "a part of a hash")]
        let part = self.hash.hash_one(dcid) as u32;
        part & !VALIDATED
    }

    fn connection_id_key(&self, pool: &PoolRoute, cid: &[u8]) -> u64 {
        self.hash.hash_one((pool.tag, cid))
    }

    fn moment(&self, now: Instant, lifetime: Duration) -> Moment {
        let seconds = |time: Duration| u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
        let since_epoch = now.saturating_duration_since(self.epoch);
        Moment { now: seconds(since_epoch), lifetime: seconds(lifetime) }
    }
}

/// The time in whole seconds, and for how many an entry is kept after its last use.
#[derive(Clone, Copy, Debug)]
struct Moment {
    now: u32,
    lifetime: u32,
}

impl Moment {
    const fn is_stale(self, last_used: u32) -> bool {
        self.now.saturating_sub(last_used) > self.lifetime
    }
}

/// A map from keyed 64-bit hashes to backends that never holds more than `capacity` entries. Of a
/// full map, new entries are refused: what is there belongs to somebody.
#[derive(Debug)]
struct Bounded {
    map: DashMap<u64, Remembered, BuildHasherDefault<AlreadyHashed>>,
    len: AtomicUsize,
    capacity: usize,
    /// How much of that is for handshakes whose clients have proved their address.
    reserve: usize,
}

#[derive(Debug)]
struct Remembered {
    backend: BackendId,
    last_used: AtomicU32,
    /// Of a handshake: the flag [`VALIDATED`], and what stands for the destination connection ID
    /// that it began with.
    note: AtomicU32,
}

/// The client of this handshake has proved its address.
const VALIDATED: u32 = 1 << 31;

impl Bounded {
    fn new(capacity: usize, reserve: usize) -> Self {
        let map = DashMap::with_capacity_and_hasher_and_shard_amount(
            capacity,
            BuildHasherDefault::default(),
            SHARDS,
        );
        Self { map, len: AtomicUsize::new(0), capacity, reserve }
    }

    fn get(&self, key: u64, moment: Moment, usage: Use) -> Option<BackendId> {
        let entry = self.map.get(&key)?;
        if moment.is_stale(entry.last_used.load(Relaxed)) {
            return None;
        }
        if usage == Use::Prolong {
            entry.last_used.store(moment.now, Relaxed);
        }
        Some(entry.backend)
    }

    fn note(&self, key: u64, moment: Moment) -> Option<u32> {
        let entry = self.map.get(&key)?;
        let stale = moment.is_stale(entry.last_used.load(Relaxed));
        (!stale).then(|| entry.note.load(Relaxed))
    }

    fn insert(&self, key: u64, backend: BackendId, note: u32, moment: Moment) {
        let fresh = || {
            let (last_used, note) = (AtomicU32::new(moment.now), AtomicU32::new(note));
            Remembered { backend, last_used, note }
        };
        match self.map.entry(key) {
            Entry::Occupied(mut entry) => {
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
            Entry::Vacant(entry) => {
                let limit = match note & VALIDATED {
                    0 => self.capacity - self.reserve,
                    _ => self.capacity,
                };
                let reserved =
                    self.len.fetch_update(Relaxed, Relaxed, |len| (len < limit).then_some(len + 1));
                if reserved.is_ok() {
                    entry.insert(fresh());
                }
            }
        }
    }

    #[expect(clippy::disallowed_methods, reason = "which entries go does not depend on the order")]
    fn sweep(&self, moment: Moment) {
        let mut gone = 0;
        self.map.retain(|_, entry| {
            let stale = moment.is_stale(entry.last_used.load(Relaxed));
            gone += usize::from(stale);
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

#[cfg(test)]
mod tests {
    use quic::{header::Version, invariants::Packet};

    use super::*;
    use crate::{backend::PoolIndex, registry::Registry, routing::Routing};

    fn backends() -> (Routing, Vec<BackendId>) {
        let config = crate::fixtures::config(true);
        let routing = Routing::new(&config, &mut Registry::default(), |_, _| Default::default());
        let ids = routing.backends().map(|backend| backend.id).collect();
        (routing, ids)
    }

    const LIFETIMES: Lifetimes = Lifetimes {
        flow_idle: Duration::from_secs(180),
        flow_unanswered: Duration::from_secs(10),
        learnt: Duration::from_secs(180),
    };

    fn at(memory: &Memory, now: Instant) -> Lookup {
        memory.lookup(now, &LIFETIMES, Use::Prolong)
    }

    #[test]
    fn an_entry_is_never_moved_to_another_backend_while_it_lives() {
        let (routing, ids) = backends();
        let pool = routing.pool(PoolIndex(0));
        let start = Instant::now();
        let memory = Memory::new(100, start, [3; 4]);
        memory.learn_connection_id(&at(&memory, start), pool, b"12345678", ids[0]);
        memory.learn_connection_id(&at(&memory, start), pool, b"12345678", ids[1]);
        assert_eq!(memory.connection_id(&at(&memory, start), pool, b"12345678"), Some(ids[0]));
        let later = start + Duration::from_secs(182);
        memory.learn_connection_id(&at(&memory, later), pool, b"12345678", ids[1]);
        assert_eq!(memory.connection_id(&at(&memory, later), pool, b"12345678"), Some(ids[1]));
    }

    #[test]
    fn entries_live_as_long_as_they_are_used() {
        let (routing, ids) = backends();
        let pool = routing.pool(PoolIndex(0));
        let start = Instant::now();
        let memory = Memory::new(100, start, [3; 4]);
        memory.learn_connection_id(&at(&memory, start), pool, b"12345678", ids[0]);
        for minutes in 1..10 {
            let now = start + Duration::from_secs(minutes * 150);
            memory.sweep(now, &LIFETIMES);
            assert_eq!(memory.connection_id(&at(&memory, now), pool, b"12345678"), Some(ids[0]));
        }
        memory.sweep(start + Duration::from_secs(9 * 150 + 181), &LIFETIMES);
        assert_eq!(memory.sizes(), Sizes::default());
    }

    #[test]
    fn a_full_table_keeps_what_it_has_and_refuses_the_rest() {
        let (routing, ids) = backends();
        let pool = routing.pool(PoolIndex(0));
        let start = Instant::now();
        let memory = Memory::new(19, start, [3; 4]);
        assert_eq!(memory.capacity(), Sizes { handshakes: 10, connection_ids: 10 });
        for n in 0..1000u64 {
            memory.learn_connection_id(&at(&memory, start), pool, &n.to_be_bytes(), ids[0]);
        }
        assert_eq!(memory.sizes().connection_ids, 10);
        for n in 0..10u64 {
            assert_eq!(
                memory.connection_id(&at(&memory, start), pool, &n.to_be_bytes()),
                Some(ids[0])
            );
        }
        memory.sweep(start + Duration::from_secs(200), &LIFETIMES);
        let later = start + Duration::from_secs(200);
        memory.learn_connection_id(&at(&memory, later), pool, b"another!", ids[1]);
        assert_eq!(memory.connection_id(&at(&memory, later), pool, b"another!"), Some(ids[1]));
    }

    #[test]
    fn forged_handshakes_leave_room_for_validated_ones() {
        let (_, ids) = backends();
        let now = Instant::now();
        let memory = Memory::new(40, now, [3; 4]);
        let path = ClientPath { client: ([192, 0, 2, 1], 50_000).into(), local: None };
        let remember = |n: u64, validated| {
            let scid = n.to_be_bytes();
            let octets = crate::fixtures::initial(Version::V1, &[1; 8], &scid, &[]);
            let Ok(Packet::Long(header)) = Packet::read(&octets) else { panic!("a long header") };
            let (listener, path, header) = (ListenerIndex(0), &path, &header);
            let backend = ids[0];
            let new = NewHandshake { listener, path, header, backend, validated };
            memory.remember_handshake(&at(&memory, now), &new);
            memory.handshake(&at(&memory, now), listener, path, &scid).is_some()
        };
        assert_eq!((0..100).filter(|&n| remember(n, false)).count(), 10);
        assert_eq!((100..200).filter(|&n| remember(n, true)).count(), 10);
        // One that was there becomes validated, whether there is room or not.
        assert!(remember(0, true));
    }

    #[test]
    fn short_headers_are_tried_with_every_length_seen() {
        let (routing, ids) = backends();
        let pool = routing.pool(PoolIndex(0));
        let now = Instant::now();
        let memory = Memory::new(20, now, [3; 4]);
        memory.learn_connection_id(&at(&memory, now), pool, b"fourteen octet", ids[0]);
        memory.learn_connection_id(&at(&memory, now), pool, b"eight oc", ids[1]);
        assert_eq!(
            memory.connection_id_in_front(
                &at(&memory, now),
                pool,
                b"fourteen octets and a payload"
            ),
            Some(ids[0])
        );
        assert_eq!(
            memory.connection_id_in_front(&at(&memory, now), pool, b"eight octets and a payload"),
            Some(ids[1])
        );
        assert_eq!(memory.connection_id_in_front(&at(&memory, now), pool, b"neither"), None);
    }
}
