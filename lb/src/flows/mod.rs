//! The flows of one worker: which client path is bound to which backend, since when unused.
//!
//! One flow is one upstream socket. A flow never changes its client path or its backend: a known
//! connection ID on another client path makes another flow, so that the server sees another peer
//! address and validates it.
//!
//! A flow is half-open until its client was heard again after an answer of the backend, or has
//! proved its address by a token. Senders that were forged never get further. When there is no room
//! for a flow, the oldest half-open one makes it; others are never touched.

mod queue;

use std::time::Instant;

use hashbrown::HashMap;

use crate::{
    backend::BackendId,
    client_path::{ClientPath, ListenerIndex, PathKey},
    routing::Lifetimes,
    verdict::FlowId,
};
use queue::Queue;

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

/// How much of the table is kept for connections that exist, which show it by a routable
/// connection ID on a new client path: one part in eight.
const RESERVE_DIVISOR: usize = 8;

/// A sweep looks at this part of the slots, so that sixteen sweeps have seen them all.
const SWEEP_DIVISOR: usize = 16;

/// Half-open flows among which one with a certain backend is looked for.
const RECLAIM_CANDIDATES: usize = 64;

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
    free: Vec<u32>,
    by_key: HashMap<FlowKey, u32, ahash::RandomState>,
    by_path: HashMap<PathKey, PathState, ahash::RandomState>,
    half_open: Queue,
    sweep_from: usize,
}

#[derive(Debug)]
struct Slot {
    flow: Flow,
    opened: Instant,
    last_used: Instant,
    state: SlotState,
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

#[derive(Clone, Copy, Debug)]
struct PathState {
    /// Where undecodable packets of this path go: the backend of the first flow.
    backend: BackendId,
    flows: u32,
}

impl FlowTable {
    pub(crate) fn new(max_flows: usize, hash: &ahash::RandomState) -> Self {
        Self {
            max_flows,
            slots: Vec::with_capacity(max_flows),
            free: Vec::with_capacity(max_flows),
            by_key: HashMap::with_capacity_and_hasher(max_flows, hash.clone()),
            by_path: HashMap::with_capacity_and_hasher(max_flows, hash.clone()),
            half_open: Queue::with_capacity(max_flows),
            sweep_from: 0,
        }
    }

    /// The flow between `path` and `backend`, if there is one, for a datagram of the client; it
    /// counts as used now.
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

    /// Starts a flow. At the limit, which lies lower unless the claim is to be established, it takes
    /// the number of the oldest half-open flow, which ends, or else there is `None`. Flows that were
    /// started at this very moment do not end: what they were started for is still to be done.
    pub(crate) fn open(&mut self, now: Instant, flow: Flow, claim: Claim) -> Option<FlowId> {
        let max = self.max_flows;
        let limit = match claim {
            Claim::Established => max,
            Claim::None | Claim::Validated => max - max / RESERVE_DIVISOR,
        };
        if self.by_key.len() >= limit {
            let oldest = self.half_open.iter().next()?;
            if self.slots[oldest as usize].opened == now {
                return None;
            }
            self.close(FlowId(oldest));
        }
        let path = PathKey::new(flow.listener, &flow.path);
        let state = SlotState::Unanswered;
        let slot = Slot { flow, opened: now, last_used: now, state, learnt: 0 };
        let index = match self.free.pop() {
            Some(index) => {
                self.slots[index as usize] = slot;
                index
            }
            None => {
                self.slots.push(slot);
                u32::try_from(self.slots.len() - 1).ok()?
            }
        };
        if claim != Claim::Validated {
            self.half_open.push(index);
        }
        self.by_key.insert(FlowKey { path, backend: flow.backend }, index);
        self.by_path.entry(path).or_insert(PathState { backend: flow.backend, flows: 0 }).flows +=
            1;
        Some(FlowId(index))
    }

    pub(crate) fn close(&mut self, id: FlowId) {
        let slot = &mut self.slots[id.index()];
        if slot.state == SlotState::Free {
            return;
        }
        slot.state = SlotState::Free;
        self.half_open.remove(id.0);
        let path = PathKey::new(slot.flow.listener, &slot.flow.path);
        self.by_key.remove(&FlowKey { path, backend: slot.flow.backend });
        if let Some(state) = self.by_path.get_mut(&path) {
            state.flows -= 1;
            if state.flows == 0 {
                self.by_path.remove(&path);
            }
        }
        self.free.push(id.0);
    }

    /// Ends one of the oldest half-open flows with the backend of flow `id`, but not one that was
    /// started at this very moment.
    pub(crate) fn reclaim(&mut self, now: Instant, id: FlowId) -> Option<FlowId> {
        let backend = self.get(id).backend;
        let fits = |number: &u32| {
            let slot = &self.slots[*number as usize];
            slot.flow.backend == backend && slot.opened != now
        };
        let number = self.half_open.iter().take(RECLAIM_CANDIDATES).find(fits)?;
        self.close(FlowId(number));
        Some(FlowId(number))
    }

    /// Closes and reports flows that have not been used for too long. Each call looks at a part of
    /// the table.
    pub(crate) fn sweep(&mut self, now: Instant, lifetimes: &Lifetimes, expired: &mut Vec<FlowId>) {
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
                self.close(id);
                expired.push(id);
            }
        }
    }

    /// Notes a datagram from the backend.
    pub(crate) fn answered(&mut self, now: Instant, id: FlowId) {
        let slot = &mut self.slots[id.index()];
        slot.last_used = now;
        slot.state = SlotState::Answered;
    }

    /// Whether `hash` stands for another connection ID than the one learnt last from this flow.
    pub(crate) fn is_news(&mut self, id: FlowId, hash: u64) -> bool {
        std::mem::replace(&mut self.slots[id.index()].learnt, hash) != hash
    }

    pub(crate) fn get(&self, id: FlowId) -> &Flow {
        &self.slots[id.index()].flow
    }

    /// The backend that the 4-tuple is remembered with.
    pub(crate) fn of_path(&self, listener: ListenerIndex, path: &ClientPath) -> Option<BackendId> {
        self.by_path.get(&PathKey::new(listener, path)).map(|state| state.backend)
    }

    pub(crate) fn len(&self) -> usize {
        self.by_key.len()
    }
}
