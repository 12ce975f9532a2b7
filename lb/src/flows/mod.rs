//! The flows of one worker: client paths bound to one backend each, by whose upstream sockets their
//! datagrams leave.
//!
//! One flow is one upstream socket. A flow never changes its client path or its backend: a known
//! connection ID on another client path makes another flow, so that the server sees another peer
//! address and validates it. A flow holds the affinity of its client path.
//!
//! The table is a cache. When there is no room for a flow, the least recently used one of the
//! weakest [`Standing`] makes it: first the paths that connections have left, then flows that
//! have not been proved by what a forged sender cannot know (`evidence`), then the rest. A full
//! table refuses nobody as long as a flow is idle, and strangers take nothing from connections that
//! are in use: they share what is theirs, and those of one network share their part of it.
//!
//! Flows end in three ways, and each is told to whoever owns the sockets: evicted, to make room;
//! failed, because their socket could not be opened; expired, because nobody used them. A number
//! that was used at this very moment does not come to mean another flow: datagrams of this moment
//! may still be waiting to be sent by it.

pub(crate) mod census;
mod evidence;
mod handed;
mod lists;
mod room;
#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use hashbrown::HashMap;
use serde::{Deserialize, Serialize};

use crate::{
    affinity::{AffinityTable, Held},
    backend::{BackendId, MAX_BACKENDS},
    cid_tag::CidTag,
    client_path::{ClientPath, ListenerIndex, PathKey, network},
    routing::Lifetimes,
    verdict::{DropReason, Ended, FlowId, Standing},
};
use census::{Census, ConfigIndex, Lately, Live};
use evidence::{ClientCids, Evidence, InUse};
pub(crate) use handed::HandedFlow;
use lists::Lists;
use room::{Room, Scope};

/// A client path bound to one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// Where the client's datagrams arrive.
    pub listener: ListenerIndex,
    /// The client's side.
    pub path: ClientPath,
    /// The server's side.
    pub backend: BackendId,
}

/// What to do about a flow whose upstream socket could not be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFailure {
    /// This flow has ended to make room: its socket is to be closed, and the other one to be opened
    /// once more.
    RetryAfter(Ended),
    /// The flow has ended, and this becomes of its datagrams.
    Drop(DropReason),
}

/// How many connection IDs may be learnt from a flow at once; one more every minute.
const LEARNT_AT_FIRST: u64 = 16;

/// How often it is noted which connection ID a flow uses, if that changes.
const NOTE_INTERVAL: Duration = Duration::from_secs(1);

/// Who has proved an address goes on with the server's connection ID within this time; servers that refuse the token give none.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// A backend that has not answered for so long is not going to: longer than all datagrams of one first flight take, shorter
/// than clients wait before they repeat it.
const CHANCE: Duration = Duration::from_millis(500);

/// A sweep looks at this part of the slots, so that sixteen sweeps have seen them all.
const SWEEP_DIVISOR: usize = 16;

/// What is known of the one who starts a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Claim {
    /// Nothing.
    None,
    /// It shows a connection ID of a server, which was not seen before, or too often without proof.
    Routable,
    /// A token has proved its address.
    Validated,
    /// It shows a connection ID that was seen with proof before.
    Known,
}

/// What a datagram of a client shows of its connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shown<'a> {
    /// The connection ID of the server, if it is known to be one.
    pub(crate) cid: Option<CidTag>,
    /// Of that one.
    pub(crate) config: ConfigIndex,
    /// The destination connection ID, with all that follows it in a short header.
    pub(crate) dcid: &'a [u8],
    /// The source connection ID of a long header.
    pub(crate) scid: Option<&'a [u8]>,
    /// Whether a token has proved the address.
    pub(crate) validated: bool,
    /// Whether it is a first flight, to which a backend was chosen.
    pub(crate) asks: bool,
}

/// Whether the backend of a flow has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Talk {
    /// Not yet.
    Unanswered,
    /// Not yet, to a first flight to which it was chosen.
    Asked,
    /// It has.
    Answered,
}

/// A flow that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) flow: FlowId,
    /// A connection ID that a proved flow uses, and did not use before.
    pub(crate) seen: Option<CidTag>,
}

/// The flow table.
#[derive(Debug)]
pub(crate) struct FlowTable {
    max_flows: usize,
    hash: ahash::RandomState,
    slots: Vec<Slot>,
    /// Numbers of flows that have ended, the one that ended first first.
    free: VecDeque<u32>,
    by_key: HashMap<FlowKey, u32, ahash::RandomState>,
    /// The proved flow that was noted last with a connection ID.
    by_cid: HashMap<(BackendId, CidTag), u32, ahash::RandomState>,
    by_standing: Lists<Standing>,
    of_backend: Lists<(BackendId, Standing)>,
    /// Flows that are not proved.
    of_network: Lists<u128>,
    sweep_from: usize,
    /// How many have begun with a valid token and come to nothing.
    unfinished: u64,
    /// Flows that have asked a backend and ended without its answer, by its slot, until they are told of.
    unanswered: Box<[u32]>,
    /// Whether there are any.
    any_unanswered: bool,
    census: Census,
}

/// In this order, so that what every datagram of a proved flow looks at is in one cache line.
#[derive(Debug)]
#[repr(C, align(64))]
struct Slot {
    last_used: Instant,
    /// The connection ID of the server that its client has used last.
    cid: Option<CidTag>,
    evidence: Evidence,
    affinity: Option<Held>,
    /// `None` when there is no flow.
    standing: Option<Standing>,
    talk: Talk,
    /// Whether the server was heard after the client, as far as learning goes.
    server_spoke: bool,
    claim: Claim,
    client_cids: ClientCids,
    flow: Flow,
    lately: Lately,
    /// Whether another flow has made room for its socket already.
    retried: bool,
    opened: Instant,
    in_use: InUse,
    /// Octets of the server's connection IDs, as far as known.
    cid_len: u8,
    /// How many connection IDs were learnt from it.
    learnt: u32,
    /// The connection ID that `by_cid` has this flow under, and since when.
    noted: Option<(CidTag, Instant)>,
    /// Whether it counts among the unfinished.
    unfinished: bool,
}

const _: () = assert!(std::mem::offset_of!(Slot, claim) < 64);

impl Slot {
    /// Whether its client has proved its address, and has used no connection ID of a server since.
    fn waits(&self) -> bool {
        self.claim == Claim::Validated && self.cid.is_none() && !self.unfinished
    }

    /// Whether a connection lives on it, for all that is known: copies of packets of connections that are over
    /// are no sign of that, nor is the path that a connection has left.
    fn is_there(&self) -> bool {
        match self.standing {
            Some(Standing::Proven) => true,
            Some(Standing::Unproven) => self.claim != Claim::Routable,
            Some(Standing::Superseded) | None => false,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct FlowKey {
    path: PathKey,
    backend: BackendId,
}

impl FlowTable {
    pub(crate) fn new(max_flows: usize, now: Instant, hash: &ahash::RandomState) -> Self {
        let map = || HashMap::with_capacity_and_hasher(max_flows, hash.clone());
        Self {
            max_flows,
            hash: hash.clone(),
            slots: Vec::with_capacity(max_flows),
            free: VecDeque::with_capacity(max_flows),
            by_key: map(),
            by_cid: HashMap::with_capacity_and_hasher(max_flows, hash.clone()),
            by_standing: Lists::with_capacity(max_flows, Standing::ALL.len(), hash),
            of_backend: Lists::with_capacity(max_flows, 0, hash),
            of_network: Lists::with_capacity(max_flows, max_flows, hash),
            sweep_from: 0,
            unfinished: 0,
            unanswered: vec![0; MAX_BACKENDS].into(),
            any_unanswered: false,
            census: Census::new(now),
        }
    }

    /// The flow between `path` and `backend`, if there is one, for a datagram of the client; it
    /// counts as used now.
    #[inline]
    pub(crate) fn find(
        &mut self,
        now: Instant,
        listener: ListenerIndex,
        path: &ClientPath,
        backend: BackendId,
        shown: &Shown<'_>,
    ) -> Option<Found> {
        let key = FlowKey { path: PathKey::new(listener, path), backend };
        let index = *self.by_key.get(&key)?;
        let slot = &mut self.slots[index as usize];
        slot.last_used = now;
        if let Some(scid) = shown.scid {
            slot.client_cids.insert(scid, &self.hash);
        }
        let is_proven = slot.standing == Some(Standing::Proven);
        let is_usual = is_proven && (shown.cid.is_none() || shown.cid == slot.cid);
        let seen = if is_usual { None } else { self.heard(now, index, shown) };
        Some(Found { flow: FlowId(index), seen })
    }

    /// Whether a first flight has asked `backend` on `path` some time ago, and nothing came back.
    pub(crate) fn is_unanswered(
        &self,
        now: Instant,
        listener: ListenerIndex,
        path: &ClientPath,
        backend: BackendId,
    ) -> bool {
        let key = FlowKey { path: PathKey::new(listener, path), backend };
        self.by_key.get(&key).is_some_and(|&index| {
            let Slot { talk, opened, .. } = &self.slots[index as usize];
            *talk == Talk::Asked && now.saturating_duration_since(*opened) >= CHANCE
        })
    }

    /// Starts a flow: its number, and the flow that was evicted for it. `None` when there is no room,
    /// and nothing that can make it for such a claim.
    pub(crate) fn open(
        &mut self,
        now: Instant,
        flow: Flow,
        claim: Claim,
        shown: &Shown<'_>,
        affinity: &mut AffinityTable,
    ) -> Option<(FlowId, Option<Ended>)> {
        let (index, evicted) = match self.room(now, &flow, claim) {
            Room::Free(index) => (index, None),
            Room::After(index) => (index, self.end(now, index, affinity)),
            Room::Nowhere => return None,
        };
        let path = PathKey::new(flow.listener, &flow.path);
        let mut client_cids = ClientCids::default();
        if let Some(scid) = shown.scid {
            client_cids.insert(scid, &self.hash);
        }
        let mut lately = Lately::default();
        if shown.cid.is_some() {
            lately.note(shown.cid, shown.config);
        }
        let slot = Slot {
            last_used: now,
            cid: shown.cid,
            evidence: Evidence::default(),
            affinity: affinity.hold(path, flow.backend),
            standing: None,
            talk: if shown.asks { Talk::Asked } else { Talk::Unanswered },
            server_spoke: false,
            claim,
            client_cids,
            flow,
            lately,
            retried: false,
            opened: now,
            in_use: InUse::default(),
            cid_len: 0,
            learnt: 0,
            noted: None,
            unfinished: false,
        };
        match self.slots.get_mut(index as usize) {
            Some(free) => *free = slot,
            None => self.slots.push(slot),
        }
        let standing = match claim {
            Claim::Validated => Standing::Proven,
            Claim::None | Claim::Routable | Claim::Known => Standing::Unproven,
        };
        self.set_standing(now, index, Some(standing));
        self.by_key.insert(FlowKey { path, backend: flow.backend }, index);
        Some((FlowId(index), evicted))
    }

    /// Says what to do about flow `id`, whose upstream socket could not be opened. Where ports or
    /// descriptors are used up, another flow makes room, once: of ports, one with the same backend and
    /// of another connection; for a connection that nobody has seen, one that is idle, lest copies of
    /// its packets, which cannot have each other's ports, take those of everybody else.
    pub(crate) fn fail(
        &mut self,
        now: Instant,
        id: FlowId,
        why: DropReason,
        affinity: &mut AffinityTable,
    ) -> OnFailure {
        let Slot { flow, retried, last_used, claim, cid, .. } = &mut self.slots[id.index()];
        *last_used = now;
        let (claim, cid) = (*claim, *cid);
        let scope = match why {
            DropReason::PortsExhausted => Some((Scope::Backend(flow.backend), cid)),
            DropReason::DescriptorLimit => Some((Scope::All, None)),
            _ => None,
        };
        if let Some((scope, not_of)) = scope
            && !std::mem::replace(retried, true)
            && let Some(index) = match (claim, not_of) {
                (Claim::Routable, Some(_)) => self.idle(now, scope, not_of),
                _ => self.weakest(now, claim, scope, not_of),
            }
            && let Some(ended) = self.end_and_free(now, index, affinity)
        {
            return OnFailure::RetryAfter(ended);
        }
        self.slots[id.index()].talk = Talk::Unanswered;
        self.end_and_free(now, id.0, affinity);
        OnFailure::Drop(why)
    }

    /// Ends and reports flows that have not been used for too long, shows the connection IDs of proved ones
    /// that are in use to `in_use`, and counts live connections. Each call looks at a part of the table.
    pub(crate) fn sweep(
        &mut self,
        now: Instant,
        lifetimes: &Lifetimes,
        affinity: &mut AffinityTable,
        expired: &mut Vec<Ended>,
        mut in_use: impl FnMut(BackendId, CidTag),
    ) {
        let share = self.slots.len().div_ceil(SWEEP_DIVISOR);
        for _ in 0..share {
            let index = self.sweep_from;
            if index == 0 {
                self.census.begin(now);
            }
            self.sweep_from = (index + 1) % self.slots.len();
            self.sweep_one(now, index, lifetimes, affinity, expired, &mut in_use);
            if self.sweep_from == 0 {
                self.census.end();
            }
        }
    }

    fn sweep_one(
        &mut self,
        now: Instant,
        index: usize,
        lifetimes: &Lifetimes,
        affinity: &mut AffinityTable,
        expired: &mut Vec<Ended>,
        mut in_use: impl FnMut(BackendId, CidTag),
    ) {
        let slot = &mut self.slots[index];
        if slot.standing.is_some()
            && slot.waits()
            && now.saturating_duration_since(slot.opened) > HANDSHAKE
        {
            slot.unfinished = true;
            self.unfinished += 1;
        }
        let lifetime = match slot.standing {
            None => return,
            Some(_) if slot.talk == Talk::Answered => lifetimes.flow_idle,
            Some(_) => lifetimes.flow_unanswered,
        };
        if now.saturating_duration_since(slot.last_used) > lifetime {
            #[expect(clippy::cast_possible_truncation, reason = "slots are numbered by u32")]
            expired.extend(self.end_and_free(now, index as u32, affinity));
            return;
        }
        if slot.standing == Some(Standing::Proven)
            && let Some(cid) = slot.cid
        {
            in_use(slot.flow.backend, cid);
        }
        let is_there = slot.is_there();
        let Slot { flow, last_used, cid, lately, .. } = slot;
        self.census.count(now, flow.backend, *last_used, *cid, lately, is_there);
    }

    /// The live connections of each backend, by its slot, whenever the whole table has been swept once more.
    pub(crate) fn take_census(&mut self) -> Option<&[Live]> {
        self.census.take()
    }

    /// How many flows have asked each backend, by its slot, and ended without its answer since this was called last.
    pub(crate) fn take_unanswered(&mut self) -> impl Iterator<Item = (usize, u64)> {
        let any = std::mem::take(&mut self.any_unanswered);
        let all = self.unanswered.iter_mut().enumerate().take(if any { MAX_BACKENDS } else { 0 });
        all.map(|(slot, count)| (slot, u64::from(std::mem::take(count))))
    }

    /// Notes `count` datagrams from the backend, of `len` octets, or of none if that is a Version Negotiation,
    /// which anybody gets; of a flow that has ended it means nothing. Says whether it is the first answer to one
    /// that has asked.
    pub(crate) fn answered(
        &mut self,
        now: Instant,
        id: FlowId,
        len: usize,
        count: usize,
        affinity: &mut AffinityTable,
        is_gone: impl Fn(BackendId) -> bool,
    ) -> bool {
        let slot = &mut self.slots[id.index()];
        slot.last_used = now;
        let is_first = std::mem::replace(&mut slot.talk, Talk::Answered) == Talk::Asked;
        if len > 0 {
            slot.evidence.server_was_heard(len, count);
        }
        slot.server_spoke = true;
        if let Some(held) = &mut slot.affinity
            && !affinity.is_settled(held)
        {
            affinity.answered(held, slot.flow.backend, is_gone);
        }
        is_first
    }

    /// Whether `cid` is another connection ID than the backend gave last on this flow.
    pub(crate) fn is_news(&mut self, id: FlowId, cid: &[u8]) -> bool {
        self.set_cid_len(id, cid.len());
        let hash = self.hash.hash_one(cid);
        std::mem::replace(&mut self.slots[id.index()].evidence.server_cid, hash) != hash
    }

    /// Says how long the connection IDs of the server are that is at the end of a flow.
    pub(crate) fn set_cid_len(&mut self, id: FlowId, len: usize) {
        self.slots[id.index()].cid_len = u8::try_from(len).unwrap_or(0);
    }

    /// Whether one more connection ID may be learnt from a flow, which counts.
    pub(crate) fn may_learn(&mut self, now: Instant, id: FlowId) -> bool {
        let Slot { opened, learnt, .. } = &mut self.slots[id.index()];
        let minutes = now.saturating_duration_since(*opened).as_secs() / 60;
        let may = u64::from(*learnt) < LEARNT_AT_FIRST + minutes;
        *learnt += u32::from(may);
        may
    }

    /// The connection ID at the front of `dcid`, which nobody knows, if the client of a proved flow
    /// goes on using it and the server goes on answering: once, and again after a while.
    pub(crate) fn cid_in_use<'a>(
        &mut self,
        now: Instant,
        id: FlowId,
        dcid: &'a [u8],
    ) -> Option<&'a [u8]> {
        let slot = &mut self.slots[id.index()];
        let cid = dcid.get(..usize::from(slot.cid_len)).filter(|cid| !cid.is_empty())?;
        let is_proven = slot.standing == Some(Standing::Proven);
        if !is_proven {
            return None;
        }
        let server_spoke = std::mem::take(&mut slot.server_spoke);
        slot.in_use.client_was_heard(now, cid, server_spoke, &self.hash).then_some(cid)
    }

    /// Whether a token has proved the address of the client that began a flow.
    pub(crate) fn is_validated(&self, id: FlowId) -> bool {
        self.slots[id.index()].claim == Claim::Validated
    }

    /// Whether a flow began with a first flight, and nothing came of it yet: neither an answer, nor a connection ID of a server.
    #[inline]
    pub(crate) fn asks(&self, id: FlowId) -> bool {
        let Slot { talk, cid, standing, .. } = &self.slots[id.index()];
        *talk == Talk::Asked && cid.is_none() && standing.is_some()
    }

    /// Ends a flow whose backend has refused what it began with; says what was known of its client.
    pub(crate) fn refuse(
        &mut self,
        now: Instant,
        id: FlowId,
        affinity: &mut AffinityTable,
    ) -> Option<(Ended, Claim)> {
        let claim = self.slots[id.index()].claim;
        Some((self.end_and_free(now, id.0, affinity)?, claim))
    }

    /// Whether a packet with a long header that the backend directs at `cid` can be for a client of
    /// this flow: the port may have been another flow's before.
    pub(crate) fn is_for(&self, id: FlowId, cid: &[u8]) -> bool {
        self.slots[id.index()].client_cids.may_contain(cid, &self.hash)
    }

    /// The connection ID of the server that its client has used last.
    pub(crate) fn cid(&self, id: FlowId) -> Option<CidTag> {
        self.slots.get(id.index())?.cid
    }

    #[cfg(test)]
    pub(crate) const fn hash(&self) -> &ahash::RandomState {
        &self.hash
    }

    #[cfg(test)]
    pub(crate) fn standing(&self, id: FlowId) -> Option<Standing> {
        self.slots[id.index()].standing
    }

    #[cfg(test)]
    pub(crate) fn is_known(&self, id: FlowId) -> bool {
        self.slots[id.index()].claim == Claim::Known
    }

    pub(crate) fn get(&self, id: FlowId) -> &Flow {
        &self.slots[id.index()].flow
    }

    /// How many have begun with a valid token so far, and come to nothing: within [`HANDSHAKE`] their client has used no connection
    /// ID of a server.
    pub(crate) const fn unfinished(&self) -> u64 {
        self.unfinished
    }

    pub(crate) fn len(&self) -> usize {
        self.by_key.len()
    }

    /// How many flows are not proved.
    pub(crate) fn unproven(&self) -> usize {
        self.by_standing.len(Standing::Unproven)
    }

    /// A datagram of the client of a flow that is not proved, or with another connection ID than the
    /// one before; the ID if it is to be noted of a proved flow.
    fn heard(&mut self, now: Instant, index: u32, shown: &Shown<'_>) -> Option<CidTag> {
        let slot = &mut self.slots[index as usize];
        let standing = slot.standing?;
        let known = slot.claim == Claim::Known && (shown.cid.is_none() || shown.cid == slot.cid);
        slot.cid = shown.cid.or(slot.cid);
        if shown.cid.is_some() {
            slot.lately.note(shown.cid, shown.config);
        }
        let dcid = shown.dcid.get(..usize::from(slot.cid_len)).filter(|cid| !cid.is_empty());
        let is_proven = standing == Standing::Proven
            || shown.validated
            || slot.evidence.client_was_heard(dcid, known, &self.hash);
        // To a flow that was left, its client has come back.
        let standing_now = if is_proven { Standing::Proven } else { Standing::Unproven };
        if standing_now != standing {
            self.set_standing(now, index, Some(standing_now));
        }
        if is_proven { self.note_cid(now, index) } else { None }
    }

    /// Notes which connection ID a proved flow uses, now and then: connections that share a socket take
    /// turns with every datagram.
    fn note_cid(&mut self, now: Instant, index: u32) -> Option<CidTag> {
        let Slot { flow: Flow { backend, .. }, cid, noted, .. } = &mut self.slots[index as usize];
        let (backend, cid) = (*backend, (*cid)?);
        if let Some((before, since)) = *noted {
            if before == cid || now.saturating_duration_since(since) < NOTE_INTERVAL {
                return None;
            }
            self.by_cid.remove(&(backend, before));
        }
        *noted = Some((cid, now));
        if let Some(left) = self.by_cid.insert((backend, cid), index)
            && left != index
        {
            self.leave(now, left, cid);
        }
        Some(cid)
    }

    /// The connection with this ID is proved to be on another path than the flow `index`.
    fn leave(&mut self, now: Instant, index: u32, cid: CidTag) {
        let slot = &mut self.slots[index as usize];
        slot.noted = None;
        // Other connections may share it.
        if slot.cid == Some(cid) {
            slot.evidence.forget_exchanges();
            self.set_standing(now, index, Some(Standing::Superseded));
        }
    }

    fn set_standing(&mut self, now: Instant, index: u32, standing: Option<Standing>) {
        let slot = &mut self.slots[index as usize];
        let Flow { path, backend, .. } = slot.flow;
        let before = std::mem::replace(&mut slot.standing, standing);
        let network = network(path.client.ip());
        if let Some(before) = before {
            self.by_standing.remove(before, index);
            self.of_backend.remove((backend, before), index);
            self.of_network.remove(network, index);
        }
        if let Some(standing) = standing {
            self.by_standing.push(standing, index, now);
            self.of_backend.push((backend, standing), index, now);
            if standing == Standing::Unproven {
                self.of_network.push(network, index, now);
            }
        }
    }

    /// A number that no flow has, and none had at this very moment.
    fn number(&mut self, now: Instant) -> Option<u32> {
        let rested = |&mut index: &mut u32| self.slots[index as usize].last_used != now;
        let free = self.free.pop_front_if(rested);
        free.or_else(|| {
            let fresh = self.slots.len() < self.max_flows;
            fresh.then(|| u32::try_from(self.slots.len()).ok()).flatten()
        })
    }

    fn end_and_free(
        &mut self,
        now: Instant,
        index: u32,
        affinity: &mut AffinityTable,
    ) -> Option<Ended> {
        let ended = self.end(now, index, affinity)?;
        self.free.push_back(index);
        Some(ended)
    }

    /// Ends a flow, whose number is the caller's to give away. `None` when it has ended before.
    fn end(&mut self, now: Instant, index: u32, affinity: &mut AffinityTable) -> Option<Ended> {
        let slot = &mut self.slots[index as usize];
        let standing = slot.standing?;
        self.unfinished += u64::from(slot.waits());
        let Flow { listener, path, backend } = slot.flow;
        if slot.talk == Talk::Asked {
            self.unanswered[backend.slot()] += 1;
            self.any_unanswered = true;
        }
        let cid = slot.cid;
        if let Some(held) = slot.affinity.take() {
            affinity.release(held);
        }
        if let Some((noted, _)) = slot.noted.take() {
            self.by_cid.remove(&(backend, noted));
        }
        self.set_standing(now, index, None);
        self.by_key.remove(&FlowKey { path: PathKey::new(listener, &path), backend });
        Some(Ended { flow: FlowId(index), standing, cid })
    }
}
