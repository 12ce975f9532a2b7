//! Flows on their way to the worker that goes on with them in another process.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::{
    Claim, Flow, FlowKey, FlowTable, Slot, Talk,
    census::Lately,
    evidence::{ClientCids, Evidence, InUse},
};
use crate::{
    affinity::AffinityTable,
    backend::BackendId,
    cid_tag::CidTag,
    client_path::PathKey,
    succession::Offset,
    verdict::{FlowId, Standing},
};

/// All that is known of a flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HandedFlow {
    flow: Flow,
    standing: Standing,
    claim: Claim,
    opened: Offset,
    last_used: Offset,
    cid: Option<CidTag>,
    cid_len: u8,
    noted: Option<(CidTag, Offset)>,
    learnt: u32,
    in_use: InUse<Offset>,
    evidence: Evidence,
    talk: Talk,
    server_spoke: bool,
    client_cids: ClientCids,
    lately: Lately,
    retried: bool,
    unfinished: bool,
    /// Which backend its path belongs to, if that is remembered, and whether it has answered there.
    path_of: Option<(BackendId, bool)>,
}

impl HandedFlow {
    pub(crate) const fn flow(&self) -> &Flow {
        &self.flow
    }

    /// Whether its backend is still to answer a first flight.
    pub(crate) fn asks(&self) -> bool {
        self.talk == Talk::Asked
    }
}

impl FlowTable {
    /// The flows, those that were used last at the end: in this order they are to be taken over.
    pub(crate) fn by_last_use(&self) -> Vec<FlowId> {
        let slots = (0..).zip(&self.slots).filter(|(_, slot)| slot.standing.is_some());
        let mut flows: Vec<_> = slots.map(|(index, slot)| (slot.last_used, index)).collect();
        flows.sort_unstable();
        flows.into_iter().map(|(_, index)| FlowId(index)).collect()
    }

    /// What a successor has to know of a flow.
    pub(crate) fn handed(
        &self,
        now: Instant,
        id: FlowId,
        affinity: &AffinityTable,
    ) -> Option<HandedFlow> {
        let slot = &self.slots[id.index()];
        let offset = |moment| Offset::new(now, moment);
        Some(HandedFlow {
            flow: slot.flow,
            standing: slot.standing?,
            claim: slot.claim,
            opened: offset(slot.opened),
            last_used: offset(slot.last_used),
            cid: slot.cid,
            cid_len: slot.cid_len,
            noted: slot.noted.map(|(cid, since)| (cid, offset(since))),
            learnt: slot.learnt,
            in_use: slot.in_use.handed(now),
            evidence: slot.evidence,
            talk: slot.talk,
            server_spoke: slot.server_spoke,
            client_cids: slot.client_cids,
            lately: slot.lately,
            retried: slot.retried,
            unfinished: slot.unfinished,
            path_of: slot.affinity.as_ref().map(|held| affinity.handed(held)),
        })
    }

    /// Goes on with a flow of a predecessor. `hashes_hold` says whether its hashes are what they would be here. `None` where
    /// there is no room, or such a flow already.
    pub(crate) fn take_over(
        &mut self,
        now: Instant,
        handed: HandedFlow,
        hashes_hold: bool,
        affinity: &mut AffinityTable,
    ) -> Option<FlowId> {
        let HandedFlow { flow, standing, path_of, noted, client_cids, .. } = handed;
        let path = PathKey::new(flow.listener, &flow.path);
        let key = FlowKey { path, backend: flow.backend };
        let index = u32::try_from(self.slots.len()).ok()?;
        if self.slots.len() >= self.max_flows || self.by_key.contains_key(&key) {
            return None;
        }
        let last_used = handed.last_used.from(now);
        self.slots.push(Slot {
            last_used,
            cid: handed.cid,
            evidence: handed.evidence,
            affinity: path_of.and_then(|of| affinity.take_over(path, of)),
            standing: None,
            talk: handed.talk,
            server_spoke: handed.server_spoke,
            claim: handed.claim,
            // Better a datagram too many than a handshake too few.
            client_cids: if hashes_hold { client_cids } else { ClientCids::ANY },
            flow,
            lately: handed.lately,
            retried: handed.retried,
            opened: handed.opened.from(now),
            in_use: handed.in_use.taken_over(now),
            cid_len: handed.cid_len,
            learnt: handed.learnt,
            noted: noted.map(|(cid, since)| (cid, since.from(now))),
            unfinished: handed.unfinished,
        });
        self.set_standing(last_used, index, Some(standing));
        self.by_key.insert(key, index);
        if let Some((cid, _)) = noted {
            self.by_cid.insert((flow.backend, cid), index);
        }
        Some(FlowId(index))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        client_path::{ClientPath, ListenerIndex},
        fixtures,
        flows::{Found, Shown, census::ConfigIndex},
        routing::Lifetimes,
        succession::HashKeys,
    };

    const LIFETIMES: Lifetimes = Lifetimes {
        flow_idle: Duration::from_secs(20),
        flow_unanswered: Duration::from_secs(5),
        learnt: Duration::from_secs(20),
    };

    fn tables(now: Instant, max_flows: usize) -> (FlowTable, AffinityTable) {
        let hash = HashKeys::new([1, 2, 3, 4]).hasher();
        (FlowTable::new(max_flows, now, &hash), AffinityTable::new(max_flows, now, &hash))
    }

    fn path(port: u16) -> ClientPath {
        ClientPath { client: ([192, 0, 2, 1], port).into(), local: None }
    }

    const EDGE: ListenerIndex = ListenerIndex(0);

    fn shown<'a>(scid: &'a [u8], cid: Option<&[u8]>) -> Shown<'a> {
        let cid = cid.map(CidTag::new);
        Shown {
            cid,
            config: ConfigIndex::NONE,
            dcid: &[],
            scid: Some(scid),
            validated: false,
            asks: false,
        }
    }

    fn hand_over(
        (flows, affinity): &(FlowTable, AffinityTable),
        now: Instant,
        (to_flows, to_affinity): &mut (FlowTable, AffinityTable),
        later: Instant,
        hashes_hold: bool,
    ) -> Vec<Option<FlowId>> {
        let handed = flows.by_last_use().into_iter().map(|flow| {
            let handed = flows.handed(now, flow, affinity).unwrap();
            let octets = postcard::to_stdvec(&handed).unwrap();
            let handed = postcard::from_bytes(&octets).unwrap();
            to_flows.take_over(later, handed, hashes_hold, to_affinity)
        });
        handed.collect()
    }

    #[test]
    fn a_successor_knows_of_each_flow_what_was_known() {
        let [a, b] = fixtures::backend_ids();
        let start = Instant::now();
        let seconds = |n| start + Duration::from_secs(n);
        let mut before = tables(start, 10);
        let (flows, affinity) = &mut before;
        for (n, backend, claim, cid) in [
            (1, a, Claim::Validated, Some(&b"one"[..])),
            (2, b, Claim::None, None),
            (3, a, Claim::Known, Some(b"three")),
        ] {
            let flow = Flow { listener: EDGE, path: path(n), backend };
            let shown = shown(b"client", cid);
            let (id, _) = flows.open(seconds(n.into()), flow, claim, &shown, affinity).unwrap();
            flows.find(seconds(n.into()), EDGE, &path(n), backend, &shown);
            if n != 2 {
                flows.answered(seconds(4 - u64::from(n)), id, 1_200, 2, affinity, |_| false);
            }
        }
        let (now, later) = (seconds(5), seconds(1_000));
        let mut after = tables(later, 10);
        assert_eq!(hand_over(&before, now, &mut after, later, true).len(), 3);
        let again = |tables: &(FlowTable, AffinityTable), now| {
            let (flows, affinity) = tables;
            let all = flows.by_last_use().into_iter();
            all.map(|flow| flows.handed(now, flow, affinity).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(again(&after, later), again(&before, now));
        let (flows, affinity) = &mut after;
        assert_eq!((flows.len(), flows.unproven()), (3, 2));
        for (n, backend) in [(1, a), (2, b), (3, a)] {
            assert_eq!(affinity.get(EDGE, &path(n)), Some(backend), "{n}");
            let found = flows.find(later, EDGE, &path(n), backend, &shown(b"another", None));
            let Some(Found { flow, .. }) = found else { panic!("{n} is there") };
            assert!(flows.is_for(flow, b"client") && !flows.is_for(flow, b"nobody"));
        }
        // Each has been used now; without an answer they end in their time, counted on.
        let mut expired = vec![];
        (0..20).for_each(|_| {
            let at = later + Duration::from_secs(6);
            flows.sweep(at, &LIFETIMES, affinity, &mut expired, |_, _| {});
        });
        assert_eq!(expired.len(), 1);
    }

    #[test]
    fn where_hashes_differ_no_datagram_is_withheld() {
        let [a, _] = fixtures::backend_ids();
        let now = Instant::now();
        let mut before = tables(now, 10);
        let (flows, affinity) = &mut before;
        let flow = Flow { listener: EDGE, path: path(1), backend: a };
        flows.open(now, flow, Claim::None, &shown(b"client", None), affinity).unwrap();
        let mut after = tables(now, 10);
        let taken = hand_over(&before, now, &mut after, now, false);
        assert!(after.0.is_for(taken[0].unwrap(), b"whoever"));
    }

    #[test]
    fn a_smaller_table_takes_no_more_than_it_has_room_for() {
        let [a, _] = fixtures::backend_ids();
        let now = Instant::now();
        let mut before = tables(now, 10);
        for n in 0..8 {
            let (flows, affinity) = &mut before;
            let flow = Flow { listener: EDGE, path: path(n), backend: a };
            flows.open(now, flow, Claim::None, &shown(b"client", None), affinity).unwrap();
        }
        let mut after = tables(now, 5);
        let taken = hand_over(&before, now, &mut after, now, true);
        assert_eq!(taken.iter().flatten().count(), 5);
        assert_eq!(after.0.len(), 5);
    }
}
