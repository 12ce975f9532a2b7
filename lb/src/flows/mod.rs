//! The flows of one worker: client paths bound to one backend each, by whose upstream sockets their
//! datagrams leave.
//!
//! One flow is one upstream socket. A flow never changes its client path or its backend: a known
//! connection ID on another client path makes another flow, so that the server sees another peer
//! address and validates it. A flow holds the affinity of its client path.
//!
//! A flow is half-open until its client was heard again after an answer of the backend, or has
//! proved its address by a token. Senders that were forged never get further. When there is no room
//! for a flow, one of the oldest half-open ones makes it; others are never touched.
//!
//! Flows end in three ways, and each is told to whoever owns the sockets: evicted, to make room;
//! failed, because their socket could not be opened; expired, because nobody used them. A number
//! that was used at this very moment does not come to mean another flow: datagrams of this moment
//! may still be waiting to be sent by it.

mod half_open;
#[cfg(test)]
mod tests;

use std::{collections::VecDeque, time::Instant};

use hashbrown::HashMap;

use crate::{
    affinity::{AffinityTable, Held},
    backend::BackendId,
    client_path::{ClientPath, ListenerIndex, PathKey},
    routing::Lifetimes,
    verdict::{DropReason, FlowId},
};
use half_open::HalfOpen;

/// A client path bound to one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// This half-open flow has ended to make room: its socket is to be closed, and the other one to
    /// be opened once more.
    RetryAfter(FlowId),
    /// The flow has ended, and this becomes of its datagrams.
    Drop(DropReason),
}

/// How much of the table is kept for connections that exist, which show it by a routable
/// connection ID on a new client path: one part in eight.
const RESERVE_DIVISOR: usize = 8;

/// A sweep looks at this part of the slots, so that sixteen sweeps have seen them all.
const SWEEP_DIVISOR: usize = 16;

/// The oldest half-open flows, among which one is looked for that can make room.
const EVICTION_CANDIDATES: usize = 64;

/// What is known of the one who starts a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Claim {
    /// Nothing.
    None,
    /// A token has proved its address.
    Validated,
    /// It shows a connection ID of a server.
    Established,
}

/// The flow table.
#[derive(Debug)]
pub(crate) struct FlowTable {
    max_flows: usize,
    slots: Vec<Slot>,
    /// Numbers of flows that have ended, the one that ended first first.
    free: VecDeque<u32>,
    by_key: HashMap<FlowKey, u32, ahash::RandomState>,
    half_open: HalfOpen,
    sweep_from: usize,
}

#[derive(Debug)]
struct Slot {
    flow: Flow,
    last_used: Instant,
    state: SlotState,
    /// Whether another flow has made room for its socket already.
    retried: bool,
    affinity: Option<Held>,
    /// Whether the backend's own connection IDs of this flow have been learnt; a hash of the last.
    learnt: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SlotState {
    Free,
    Unanswered,
    Answered,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct FlowKey {
    path: PathKey,
    backend: BackendId,
}

impl FlowTable {
    pub(crate) fn new(max_flows: usize, hash: &ahash::RandomState) -> Self {
        Self {
            max_flows,
            slots: Vec::with_capacity(max_flows),
            free: VecDeque::with_capacity(max_flows),
            by_key: HashMap::with_capacity_and_hasher(max_flows, hash.clone()),
            half_open: HalfOpen::with_capacity(max_flows),
            sweep_from: 0,
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
    ) -> Option<FlowId> {
        let key = FlowKey { path: PathKey::new(listener, path), backend };
        let index = *self.by_key.get(&key)?;
        let slot = &mut self.slots[index as usize];
        slot.last_used = now;
        if slot.state == SlotState::Answered {
            self.half_open.remove(index);
        }
        Some(FlowId(index))
    }

    /// Starts a flow: its number, and the flow that was evicted for it. At the limit, which lies
    /// lower unless the claim is to be established, one of the oldest half-open flows makes room,
    /// whose number the new one gets; `None` when none can.
    pub(crate) fn open(
        &mut self,
        now: Instant,
        flow: Flow,
        claim: Claim,
        affinity: &mut AffinityTable,
    ) -> Option<(FlowId, Option<FlowId>)> {
        let max = self.max_flows;
        let limit = match claim {
            Claim::Established => max,
            Claim::None | Claim::Validated => max - max / RESERVE_DIVISOR,
        };
        let evicted = if self.by_key.len() >= limit {
            let oldest = self.evictable(now, |_| true)?;
            self.end(oldest, affinity);
            Some(oldest)
        } else {
            None
        };
        let index = match evicted {
            Some(FlowId(index)) => index,
            None => self.number(now)?,
        };
        let path = PathKey::new(flow.listener, &flow.path);
        let slot = Slot {
            flow,
            last_used: now,
            state: SlotState::Unanswered,
            retried: false,
            affinity: affinity.hold(path, flow.backend),
            learnt: 0,
        };
        match self.slots.get_mut(index as usize) {
            Some(free) => *free = slot,
            None => self.slots.push(slot),
        }
        if claim != Claim::Validated {
            self.half_open.push(index);
        }
        self.by_key.insert(FlowKey { path, backend: flow.backend }, index);
        Some((FlowId(index), evicted))
    }

    /// Says what to do about flow `id`, whose upstream socket could not be opened. Where ports or
    /// descriptors are used up, one of the oldest half-open flows with the same backend makes room,
    /// once.
    pub(crate) fn fail(
        &mut self,
        now: Instant,
        id: FlowId,
        why: DropReason,
        affinity: &mut AffinityTable,
    ) -> OnFailure {
        let Slot { flow, retried, last_used, .. } = &mut self.slots[id.index()];
        *last_used = now;
        let backend = flow.backend;
        let is_short = matches!(why, DropReason::PortsExhausted | DropReason::DescriptorLimit);
        if is_short
            && !std::mem::replace(retried, true)
            && let Some(evicted) = self.evictable(now, |flow| flow.backend == backend)
        {
            self.end_and_free(evicted, affinity);
            return OnFailure::RetryAfter(evicted);
        }
        self.end_and_free(id, affinity);
        OnFailure::Drop(why)
    }

    /// Ends and reports flows that have not been used for too long. Each call looks at a part of
    /// the table.
    pub(crate) fn sweep(
        &mut self,
        now: Instant,
        lifetimes: &Lifetimes,
        affinity: &mut AffinityTable,
        expired: &mut Vec<FlowId>,
    ) {
        let share = self.slots.len().div_ceil(SWEEP_DIVISOR);
        for _ in 0..share {
            let index = self.sweep_from;
            self.sweep_from = (index + 1) % self.slots.len();
            let slot = &self.slots[index];
            let lifetime = match slot.state {
                SlotState::Free => continue,
                SlotState::Unanswered => lifetimes.flow_unanswered,
                SlotState::Answered => lifetimes.flow_idle,
            };
            if now.saturating_duration_since(slot.last_used) > lifetime {
                #[expect(clippy::cast_possible_truncation, reason = "slots are numbered by u32")]
                let id = FlowId(index as u32);
                self.end_and_free(id, affinity);
                expired.push(id);
            }
        }
    }

    /// Notes a datagram from the backend; of a flow that has ended it means nothing.
    pub(crate) fn answered(&mut self, now: Instant, id: FlowId) {
        let slot = &mut self.slots[id.index()];
        slot.last_used = now;
        if slot.state == SlotState::Unanswered {
            slot.state = SlotState::Answered;
        }
    }

    /// Whether `hash` stands for another connection ID than the one learnt last from this flow.
    pub(crate) fn is_news(&mut self, id: FlowId, hash: u64) -> bool {
        std::mem::replace(&mut self.slots[id.index()].learnt, hash) != hash
    }

    pub(crate) fn get(&self, id: FlowId) -> &Flow {
        &self.slots[id.index()].flow
    }

    pub(crate) fn len(&self) -> usize {
        self.by_key.len()
    }

    /// One of the oldest half-open flows that `fits` and was not used at this very moment.
    fn evictable(&self, now: Instant, fits: impl Fn(&Flow) -> bool) -> Option<FlowId> {
        let can_go = |number: &u32| {
            let slot = &self.slots[*number as usize];
            slot.last_used != now && fits(&slot.flow)
        };
        self.half_open.iter().take(EVICTION_CANDIDATES).find(can_go).map(FlowId)
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

    fn end_and_free(&mut self, id: FlowId, affinity: &mut AffinityTable) {
        if self.end(id, affinity) {
            self.free.push_back(id.0);
        }
    }

    /// Ends a flow, whose number is the caller's to give away. `false` when it has ended before.
    fn end(&mut self, id: FlowId, affinity: &mut AffinityTable) -> bool {
        let slot = &mut self.slots[id.index()];
        if slot.state == SlotState::Free {
            return false;
        }
        slot.state = SlotState::Free;
        if let Some(held) = slot.affinity.take() {
            affinity.release(held);
        }
        let path = PathKey::new(slot.flow.listener, &slot.flow.path);
        self.by_key.remove(&FlowKey { path, backend: slot.flow.backend });
        self.half_open.remove(id.0);
        true
    }
}
