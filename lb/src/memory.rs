//! What workers remember together: handshakes in progress, connections that were seen with proof of
//! their client's address, and by pool the connection IDs of servers that have no routable ones.
//! Bounded, timed, and never touched on the way of a routable short header of a flow that is known.
//!
//! An entry is only ever added where none is: whoever forges a packet cannot move what is there.
//! Handshakes are kept by 4-tuple, so that a forger's entries are of no use to anyone else;
//! connection IDs are learnt from servers, and from clients on paths that servers answer.

use std::{
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::{Duration, Instant},
};

use quic::{
    ConnectionId,
    header::{Kind, LongType},
    invariants::LongHeader,
};

use serde::{Deserialize, Serialize};

use crate::{
    admission::Handshake,
    backend::BackendId,
    bounded::{Bounded, Entry, Moment, Use, VALIDATED},
    cid_tag::CidTag,
    client_path::{ClientPath, ListenerIndex},
    routing::{Lifetimes, PoolRoute, Routing},
    succession::{HashKeys, Offset},
};

/// How long a handshake is remembered after its last packet: longer than any client goes on trying
/// without an answer that carries a routable connection ID.
const HANDSHAKE_LIFETIME: Duration = Duration::from_secs(30);

/// How many flows a connection that was seen may begin within [`NEW_PATHS_PERIOD`] without proof that
/// it is there. Copies of its packets from forged addresses take part in it.
const NEW_PATHS: u32 = 4;
const NEW_PATHS_PERIOD: u32 = 8;

/// How many Initials from other addresses may be directed at a connection ID that a server has
/// given in the handshake of a validated client.
const MOVED_INITIALS: u32 = 32;

/// How many packets go on in a second that may belong to a handshake which another balancer has begun
/// with, or whose token was made for another port of their address: for each of the two.
const MOVED_A_SECOND: u32 = 64;

/// What is remembered of clients.
#[derive(Debug)]
pub struct Memory {
    keys: HashKeys,
    hash: ahash::RandomState,
    epoch: Instant,
    /// By 4-tuple and source connection ID, and by connection ID that a server has given.
    handshakes: Bounded,
    /// Connections whose clients were proved to be somewhere, by connection ID.
    connections: Bounded,
    /// Packets of handshakes that another balancer may have begun with.
    from_elsewhere: PerSecond,
    /// Tokens from another port of the address that they were made for.
    from_other_ports: PerSecond,
}

/// How much of something there was within a second: the second and the number.
#[derive(Debug, Default)]
struct PerSecond(AtomicU32);

/// When and to what end something is looked up, or remembered: made once for a batch, since it takes
/// longer than what it is for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lookup {
    handshakes: Moment,
    connections: Moment,
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
    /// Connections whose clients were proved to be somewhere.
    pub connections: usize,
    /// Connection IDs of servers that have no routable ones, of all pools.
    pub connection_ids: usize,
}

/// What the memory of a successor begins with.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct HandedBasis {
    epoch: Offset,
    keys: HashKeys,
}

/// What a successor is to remember.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Handed {
    handshakes: Vec<Entry>,
    connections: Vec<Entry>,
    /// By the name of the pool.
    learnt: Vec<(String, Vec<Entry>)>,
}

impl Memory {
    /// Room for `capacity` entries: half of them handshakes, the other half connections that were
    /// seen. Nobody outside may know `seed`, so that nobody can aim at a shard or make keys collide.
    #[must_use]
    pub fn new(capacity: usize, epoch: Instant, seed: [u64; 4]) -> Self {
        Self::with_keys(capacity, epoch, HashKeys::new(seed))
    }

    /// One that can take over what a predecessor remembers, and counts time from the same moment.
    pub(crate) fn succeeding(capacity: usize, now: Instant, of: &HandedBasis) -> Self {
        Self::with_keys(capacity, of.epoch.from(now), of.keys)
    }

    fn with_keys(capacity: usize, epoch: Instant, keys: HashKeys) -> Self {
        let half = capacity.div_ceil(2);
        Self {
            keys,
            hash: keys.hasher(),
            epoch,
            // Forged senders must not crowd out those who prove to be none.
            handshakes: Bounded::new(half, half / 2),
            connections: Bounded::new(half, 0),
            from_elsewhere: PerSecond::default(),
            from_other_ports: PerSecond::default(),
        }
    }

    /// What a successor has to begin with.
    pub(crate) fn basis(&self, now: Instant) -> HandedBasis {
        HandedBasis { epoch: Offset::new(now, self.epoch), keys: self.keys }
    }

    /// All that is remembered, for a successor.
    pub(crate) fn handed(&self, routing: &Routing) -> Handed {
        let learnt = routing.pools().map(|pool| (pool.name.clone(), pool.learnt.handed()));
        Handed {
            handshakes: self.handshakes.handed(),
            connections: self.connections.handed(),
            learnt: learnt.collect(),
        }
    }

    /// Takes over what a predecessor remembers. `false` where its hashes mean nothing here, and with them all of that.
    pub(crate) fn take_over(&self, routing: &Routing, handed: Handed) -> bool {
        if !self.keys.mean_the_same_here() {
            return false;
        }
        let Handed { handshakes, connections, learnt } = handed;
        self.handshakes.take_over(handshakes, drop);
        self.connections.take_over(connections, drop);
        for (name, entries) in learnt {
            if let Some(pool) = routing.pools().find(|pool| pool.name == name) {
                pool.learnt.take_over(entries);
            }
        }
        true
    }

    /// When `moment` was, counted from when the process began.
    pub(crate) fn since_epoch(&self, moment: Instant) -> Duration {
        moment.saturating_duration_since(self.epoch)
    }

    /// What is looked up at the moment `now`.
    pub(crate) fn lookup(&self, now: Instant, lifetimes: &Lifetimes, usage: Use) -> Lookup {
        Lookup {
            handshakes: self.moment(now, HANDSHAKE_LIFETIME),
            connections: self.moment(now, lifetimes.flow_idle),
            connection_ids: self.moment(now, lifetimes.learnt),
            usage,
        }
    }

    /// The backend that holds the handshake with this 4-tuple and source connection ID. One that
    /// began with another connection ID of the client's is another's.
    pub(crate) fn handshake(
        &self,
        lookup: &Lookup,
        listener: ListenerIndex,
        path: &ClientPath,
        header: &LongHeader<'_>,
    ) -> Option<BackendId> {
        let key = self.handshake_key(listener, path, header);
        if is_first_flight(header) {
            let note = self.handshakes.note(key, lookup.handshakes)?;
            if note & !VALIDATED != self.dcid_note(header.dcid) {
                return None;
            }
        }
        self.handshakes.get(key, lookup.handshakes, lookup.usage)
    }

    /// What is remembered of the handshake that an Initial belongs to.
    pub(crate) fn handshake_state(
        &self,
        lookup: &Lookup,
        listener: ListenerIndex,
        path: &ClientPath,
        header: &LongHeader<'_>,
    ) -> Option<Handshake> {
        let key = self.handshake_key(listener, path, header);
        let note = self.handshakes.note(key, lookup.handshakes)?;
        let same_dcid = note & !VALIDATED == self.dcid_note(header.dcid);
        Some(Handshake { validated: note & VALIDATED != 0, same_dcid })
    }

    /// Remembers which backend holds a handshake, unless another is remembered to; and, for good, that
    /// its client has been validated.
    pub(crate) fn remember_handshake(&self, lookup: &Lookup, handshake: &NewHandshake<'_>) {
        let &NewHandshake { listener, path, header, backend, validated } = handshake;
        let key = self.handshake_key(listener, path, header);
        let flag = if validated { VALIDATED } else { 0 };
        let note = self.dcid_note(header.dcid) | flag;
        self.handshakes.insert(key, backend, note, lookup.handshakes);
    }

    /// Forgets a handshake that `backend` was to hold, and refuses.
    pub(crate) fn forget_handshake(
        &self,
        listener: ListenerIndex,
        path: &ClientPath,
        header: &LongHeader<'_>,
        backend: BackendId,
    ) {
        self.handshakes.remove(self.handshake_key(listener, path, header), backend);
    }

    /// Remembers a connection ID that `backend` has given in the handshake of a validated client.
    pub(crate) fn remember_given(&self, lookup: &Lookup, cid: &[u8], backend: BackendId) {
        let key = self.given_key(cid);
        self.handshakes.insert(key, backend, VALIDATED, lookup.handshakes);
    }

    /// Whether a server has given this connection ID in the handshake of a validated client, so that
    /// an Initial towards it may go on, wherever it comes from. There is a bound to that.
    pub(crate) fn was_given(&self, lookup: &Lookup, cid: &[u8]) -> bool {
        let key = self.given_key(cid);
        self.handshakes.spend(key, lookup.handshakes, lookup.usage, |note| {
            let spent = note & !VALIDATED;
            (spent < MOVED_INITIALS).then_some(VALIDATED | (spent + 1))
        })
    }

    /// Whether a packet may go on with a handshake that nothing is known about: another balancer may
    /// have begun with it.
    pub(crate) fn may_be_from_elsewhere(&self, lookup: &Lookup) -> bool {
        self.from_elsewhere.take(MOVED_A_SECOND, lookup)
    }

    /// Whether a token is good for a port that it was not made for: its client's NAT may have moved.
    pub(crate) fn may_have_another_port(&self, lookup: &Lookup) -> bool {
        self.from_other_ports.take(MOVED_A_SECOND, lookup)
    }

    /// Remembers a connection whose client was proved to be somewhere.
    pub(crate) fn remember_connection(&self, lookup: &Lookup, backend: BackendId, cid: CidTag) {
        let key = self.hash.hash_one((backend, cid));
        self.connections.renew(key, backend, lookup.connections);
    }

    /// Whether a connection was seen with proof, and may begin another flow on the strength of it.
    pub(crate) fn may_move(&self, lookup: &Lookup, backend: BackendId, cid: CidTag) -> bool {
        let key = self.hash.hash_one((backend, cid));
        let second = lookup.connections.now;
        self.connections.spend(key, lookup.connections, lookup.usage, |note| {
            let (since, count) = unpack(note);
            let is_over = (second & SECONDS).wrapping_sub(since) & SECONDS >= NEW_PATHS_PERIOD;
            match count {
                0 => Some(pack(second, 1)),
                _ if is_over => Some(pack(second, 1)),
                _ => (count < NEW_PATHS).then(|| pack(since, count + 1)),
            }
        })
    }

    /// The backend that was seen to use the connection ID of a long header.
    pub(crate) fn connection_id(
        &self,
        lookup: &Lookup,
        pool: &PoolRoute,
        dcid: &[u8],
    ) -> Option<BackendId> {
        let learnt = pool.learnt.lengths();
        let possible =
            u32::try_from(dcid.len()).is_ok_and(|len| len < 32 && learnt >> len & 1 == 1);
        if !possible {
            return None;
        }
        let key = self.hash.hash_one(dcid);
        pool.learnt.get(key, lookup.connection_ids, lookup.usage)
    }

    /// The backend that was seen to use the connection ID at the start of `rest`, the octets after
    /// the first one of a short header, and the length of that. Every length that a server of the pool
    /// has used is tried.
    pub(crate) fn connection_id_in_front(
        &self,
        lookup: &Lookup,
        pool: &PoolRoute,
        rest: &[u8],
    ) -> Option<(BackendId, usize)> {
        let mut lengths = pool.learnt.lengths();
        while lengths != 0 {
            let len = lengths.trailing_zeros();
            lengths &= lengths - 1;
            if let Some(dcid) = rest.get(..len as usize)
                && let Some(backend) = self.connection_id(lookup, pool, dcid)
            {
                return Some((backend, len as usize));
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
        let key = self.hash.hash_one(&*cid);
        pool.learnt.insert(key, cid.len(), backend, lookup.connection_ids);
    }

    /// Forgets what has not been used for long. To be called every few seconds, by no worker.
    pub fn sweep(&self, now: Instant, routing: &Routing) {
        let lifetimes = &routing.lifetimes;
        self.handshakes.sweep(self.moment(now, HANDSHAKE_LIFETIME), drop);
        self.connections.sweep(self.moment(now, lifetimes.flow_idle), drop);
        for pool in routing.pools() {
            pool.learnt.sweep(self.moment(now, lifetimes.learnt));
        }
    }

    /// How many entries there are.
    #[must_use]
    pub fn sizes(&self, routing: &Routing) -> Sizes {
        Sizes {
            handshakes: self.handshakes.len.load(Relaxed),
            connections: self.connections.len.load(Relaxed),
            connection_ids: routing.pools().map(|pool| pool.learnt.len()).sum(),
        }
    }

    /// How many entries there can be.
    #[must_use]
    pub fn capacity(&self, routing: &Routing) -> Sizes {
        let of = |table: &Bounded| table.capacity.load(Relaxed);
        Sizes {
            handshakes: of(&self.handshakes),
            connections: of(&self.connections),
            connection_ids: routing.pools().map(|pool| pool.learnt.capacity()).sum(),
        }
    }

    /// The 4-tuple and the source connection ID; where that is empty, as it is of most browsers,
    /// together they name no connection, and the destination connection ID has to.
    fn handshake_key(
        &self,
        listener: ListenerIndex,
        path: &ClientPath,
        header: &LongHeader<'_>,
    ) -> u64 {
        let dcid = if header.scid.is_empty() { header.dcid } else { &[] };
        self.hash.hash_one((listener, path, header.scid, dcid))
    }

    fn given_key(&self, cid: &[u8]) -> u64 {
        self.hash.hash_one(("given", cid))
    }

    /// What stands for a destination connection ID in a note.
    fn dcid_note(&self, dcid: &[u8]) -> u32 {
        #[expect(clippy::cast_possible_truncation, reason = "a part of a hash")]
        let part = self.hash.hash_one(dcid) as u32;
        part & !VALIDATED
    }

    fn moment(&self, now: Instant, lifetime: Duration) -> Moment {
        let seconds = |time: Duration| u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
        Moment { now: seconds(self.since_epoch(now)), lifetime: seconds(lifetime) }
    }
}

impl PerSecond {
    /// Whether there is another one left of so many in this second, which is taken unless only looked at.
    fn take(&self, most: u32, lookup: &Lookup) -> bool {
        let second = lookup.handshakes.now;
        let next = |state| {
            let (since, count) = unpack(state);
            match since == second & SECONDS {
                true if count < most => Some(pack(second, count + 1)),
                true => None,
                false => Some(pack(second, 1)),
            }
        };
        match lookup.usage {
            Use::Prolong => self.0.fetch_update(Relaxed, Relaxed, next).is_ok(),
            Use::Peek => next(self.0.load(Relaxed)).is_some(),
        }
    }
}

/// Whether a packet belongs to the first flight of its client, which goes to the connection ID that the client
/// has drawn, or has got by a Retry.
fn is_first_flight(header: &LongHeader<'_>) -> bool {
    matches!(header.kind(), Kind::Known(_, LongType::Initial | LongType::ZeroRtt))
}

/// A second and a count in one number.
const fn pack(second: u32, count: u32) -> u32 {
    second << 8 | count
}

const fn unpack(packed: u32) -> (u32, u32) {
    (packed >> 8, packed & 0xff)
}

/// What is left of the number of a second in [`pack`].
const SECONDS: u32 = u32::MAX >> 8;

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

    /// A pool with room for so many connection IDs.
    fn with_room(routing: &Routing, capacity: usize) -> &PoolRoute {
        let pool = routing.pool(PoolIndex(0));
        pool.learnt.set_capacity(capacity);
        pool
    }

    const LIFETIMES: Lifetimes = Lifetimes {
        flow_idle: Duration::from_secs(180),
        flow_unanswered: Duration::from_secs(10),
        learnt: Duration::from_secs(600),
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
        let later = start + Duration::from_secs(602);
        memory.learn_connection_id(&at(&memory, later), pool, b"12345678", ids[1]);
        assert_eq!(memory.connection_id(&at(&memory, later), pool, b"12345678"), Some(ids[1]));
    }

    #[test]
    fn a_successor_remembers_what_it_is_handed() {
        let (routing, ids) = backends();
        let pool = routing.pool(PoolIndex(0));
        let start = Instant::now();
        let memory = Memory::new(100, start, [3; 4]);
        let later = start + Duration::from_secs(77);
        memory.learn_connection_id(&at(&memory, later), pool, b"12345678", ids[1]);
        memory.remember_connection(&at(&memory, later), ids[0], CidTag::new(b"abc"));

        let (successors, _) = backends();
        let pool = successors.pool(PoolIndex(0));
        let (basis, handed) = (memory.basis(later), memory.handed(&routing));
        // It has clocks of its own.
        let now = later + Duration::from_secs(1_000);
        let successor = Memory::succeeding(100, now, &basis);
        assert!(successor.take_over(&successors, handed));
        assert_eq!(successor.sizes(&successors), memory.sizes(&routing));
        let lookup = at(&successor, now);
        let rest = b"12345678 and a payload";
        assert_eq!(successor.connection_id_in_front(&lookup, pool, rest), Some((ids[1], 8)));
        assert!(successor.may_move(&lookup, ids[0], CidTag::new(b"abc")));
        assert!(!successor.may_move(&lookup, ids[1], CidTag::new(b"abc")));
        // What was old remains so.
        let lookup = at(&successor, now + Duration::from_secs(601));
        assert_eq!(successor.connection_id_in_front(&lookup, pool, rest), None);
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
            memory.sweep(now, &routing);
            assert_eq!(memory.connection_id(&at(&memory, now), pool, b"12345678"), Some(ids[0]));
        }
        memory.sweep(start + Duration::from_secs(9 * 150 + 601), &routing);
        assert_eq!(memory.sizes(&routing), Sizes::default());
    }

    #[test]
    fn a_full_table_keeps_what_it_has_and_refuses_the_rest() {
        let (routing, ids) = backends();
        let pool = with_room(&routing, 10);
        let start = Instant::now();
        let memory = Memory::new(19, start, [3; 4]);
        assert_eq!(
            memory.capacity(&routing),
            Sizes { handshakes: 10, connections: 10, connection_ids: 10 }
        );
        for n in 0..1000u64 {
            memory.learn_connection_id(&at(&memory, start), pool, &n.to_be_bytes(), ids[0]);
        }
        assert_eq!(memory.sizes(&routing).connection_ids, 10);
        for n in 0..10u64 {
            assert_eq!(
                memory.connection_id(&at(&memory, start), pool, &n.to_be_bytes()),
                Some(ids[0])
            );
        }
        memory.sweep(start + Duration::from_secs(700), &routing);
        let later = start + Duration::from_secs(700);
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
            memory.handshake(&at(&memory, now), listener, path, header).is_some()
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
            Some((ids[0], 14))
        );
        assert_eq!(
            memory.connection_id_in_front(&at(&memory, now), pool, b"eight octets and a payload"),
            Some((ids[1], 8))
        );
        assert_eq!(memory.connection_id_in_front(&at(&memory, now), pool, b"neither"), None);
    }
}
