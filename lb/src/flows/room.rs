//! Who makes room for a flow: the least recently used of the weakest standing, by what is known of the one
//! who starts it.

use std::time::{Duration, Instant};

use super::{Claim, Flow, FlowTable};
use crate::{backend::BackendId, cid_tag::CidTag, client_path::network, verdict::Standing};

/// How much of the table is kept for connections that exist, which show it by a connection ID of a
/// server: one part in eight. Half of that is for those that were seen before.
const RESERVE_DIVISOR: usize = 8;

/// Strangers may have this part of the table at the cost of proved flows that are idle: one part in
/// eight.
const STRANGERS_DIVISOR: usize = 8;

/// A proved flow that was not used for so long makes room for strangers.
pub(super) const IDLE: Duration = Duration::from_secs(1);

/// Once half of the table is taken, one source network may have one part in sixteen of it for flows
/// that are not proved.
const NETWORK_DIVISOR: usize = 16;
/// Or so many, if that is more.
const MIN_NETWORK_SHARE: usize = 16;

/// Among how many flows that were linked first the least recently used one is looked for.
const CANDIDATES: usize = 16;
/// How often, if none of them can go: more flows altogether than can be used within one moment.
const ROUNDS: usize = 2 * crate::forwarder::BATCH / CANDIDATES;

/// Where there is room for a flow.
pub(super) enum Room {
    /// With this number.
    Free(u32),
    /// Where this flow ends, whose number it gets.
    After(u32),
    Nowhere,
}

impl From<Option<u32>> for Room {
    fn from(makes_room: Option<u32>) -> Self {
        makes_room.map_or(Self::Nowhere, Self::After)
    }
}

impl FlowTable {
    /// Where there is room for a flow.
    pub(super) fn room(&mut self, now: Instant, flow: &Flow, claim: Claim) -> Room {
        let (len, max) = (self.len(), self.max_flows);
        let network = network(flow.path.client.ip());
        let share = (max / NETWORK_DIVISOR).max(MIN_NETWORK_SHARE);
        let is_stranger = matches!(claim, Claim::None | Claim::Routable);
        if is_stranger && len >= max / 2 && self.of_network.len(network) >= share {
            let same = self.unused(now, Among::Network(network), Duration::ZERO, None);
            if same.is_some() || claim == Claim::None {
                return same.into();
            }
        }
        let limit = match claim {
            Claim::None | Claim::Validated => max - max / RESERVE_DIVISOR,
            Claim::Routable => max - max / RESERVE_DIVISOR / 2,
            Claim::Known => max,
        };
        if len < limit
            && let Some(number) = self.number(now)
        {
            return Room::Free(number);
        }
        self.weakest(now, claim, Scope::All, None).into()
    }

    /// The flow that can make room for one with this claim, and is not of the connection `of`.
    pub(super) fn weakest(
        &mut self,
        now: Instant,
        claim: Claim,
        scope: Scope,
        of: Option<CidTag>,
    ) -> Option<u32> {
        use Standing::{Proven, Superseded, Unproven};
        let len = |standing| self.len_of(scope.standing(standing));
        let total = Standing::ALL.into_iter().map(len).sum::<usize>();
        let has_its_share = len(Unproven) * STRANGERS_DIVISOR >= total;
        let order = match claim {
            Claim::None | Claim::Routable if !has_its_share => [Superseded, Proven, Unproven],
            Claim::None | Claim::Routable | Claim::Validated | Claim::Known => {
                [Superseded, Unproven, Proven]
            }
        };
        order.into_iter().find_map(|standing| {
            let idle = match (standing, claim) {
                (Proven, Claim::None | Claim::Routable | Claim::Validated) => IDLE,
                _ => Duration::ZERO,
            };
            self.unused(now, scope.standing(standing), idle, of)
        })
    }

    /// The weakest flow that is idle and not of the connection `of`.
    pub(super) fn idle(&mut self, now: Instant, scope: Scope, of: Option<CidTag>) -> Option<u32> {
        let all = Standing::ALL.into_iter().map(|standing| scope.standing(standing));
        all.into_iter().find_map(|among| self.unused(now, among, IDLE, of))
    }

    /// The least recently used of some flows that was not used for at least `idle`, nor at this very
    /// moment. Order is kept lazily: of the first few, those that were used since they were linked
    /// are put behind all others.
    fn unused(
        &mut self,
        now: Instant,
        among: Among,
        idle: Duration,
        not_of: Option<CidTag>,
    ) -> Option<u32> {
        for _ in 0..ROUNDS {
            let mut first = [(0, now); CANDIDATES];
            let count = self.first(among, &mut first);
            let mut least = None;
            for &(index, since) in &first[..count] {
                let slot = &self.slots[index as usize];
                let last_used = slot.last_used;
                let is_idle = now.saturating_duration_since(last_used) >= idle;
                let is_other = not_of.is_none() || slot.cid != not_of;
                let can_go = last_used != now && is_idle && is_other;
                if can_go && least.is_none_or(|(_, used)| last_used < used) {
                    least = Some((index, last_used));
                }
                if last_used > since || !can_go {
                    self.link_anew(now, among, index);
                }
            }
            if least.is_some() || count < CANDIDATES {
                return least.map(|(index, _)| index);
            }
        }
        None
    }

    /// The first of some flows, and how many those are.
    fn first(&self, among: Among, into: &mut [(u32, Instant)]) -> usize {
        match among {
            Among::Standing(standing) => self.by_standing.first(standing, into),
            Among::Backend(backend, standing) => self.of_backend.first((backend, standing), into),
            Among::Network(network) => self.of_network.first(network, into),
        }
    }

    fn len_of(&self, among: Among) -> usize {
        match among {
            Among::Standing(standing) => self.by_standing.len(standing),
            Among::Backend(backend, standing) => self.of_backend.len((backend, standing)),
            Among::Network(network) => self.of_network.len(network),
        }
    }

    fn link_anew(&mut self, now: Instant, among: Among, index: u32) {
        match among {
            Among::Standing(standing) => self.by_standing.link_anew(standing, index, now),
            Among::Backend(backend, standing) => {
                self.of_backend.link_anew((backend, standing), index, now);
            }
            Among::Network(network) => self.of_network.link_anew(network, index, now),
        }
    }
}

/// Among which flows one is looked for that can make room.
#[derive(Clone, Copy)]
pub(super) enum Scope {
    All,
    Backend(BackendId),
}

/// Some flows that are in a list.
#[derive(Clone, Copy)]
enum Among {
    Standing(Standing),
    Backend(BackendId, Standing),
    Network(u128),
}

impl Scope {
    const fn standing(self, standing: Standing) -> Among {
        match self {
            Self::All => Among::Standing(standing),
            Self::Backend(backend) => Among::Backend(backend, standing),
        }
    }
}
