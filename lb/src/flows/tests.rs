//! The tables of flows and of affinity beside a model of both, which allocates, searches and does not
//! care.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::fixtures;

const EDGE: ListenerIndex = ListenerIndex(0);
const MAX_FLOWS: usize = 8;
/// Fewer than there are client paths, so that the table fills.
const PATHS: usize = 6;
const LIFETIMES: Lifetimes = Lifetimes {
    flow_idle: Duration::from_secs(20),
    flow_unanswered: Duration::from_secs(5),
    learnt: Duration::from_secs(20),
};

#[derive(Clone, Debug)]
enum Step {
    /// A datagram that a flow carries, which is opened if there is none; with a connection ID of a
    /// server, perhaps.
    Send {
        path: u8,
        backend: u8,
        claim: u8,
        cid: u8,
    },
    /// A datagram that goes without a flow.
    Direct {
        path: u8,
        backend: u8,
    },
    /// The backend answers, of a flow that lives or has ended, with many octets or few.
    Answer {
        flow: u8,
        large: bool,
    },
    /// The socket of one of the flows cannot be opened.
    Fail {
        flow: u8,
        short: bool,
    },
    Sweep,
    Later(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0u8..10, 0u8..3, 0u8..4, 0u8..4)
            .prop_map(|(path, backend, claim, cid)| Step::Send { path, backend, claim, cid }),
        2 => (0u8..10, 0u8..3).prop_map(|(path, backend)| Step::Direct { path, backend }),
        4 => (any::<u8>(), any::<bool>()).prop_map(|(flow, large)| Step::Answer { flow, large }),
        2 => (any::<u8>(), any::<bool>()).prop_map(|(flow, short)| Step::Fail { flow, short }),
        2 => Just(Step::Sweep),
        3 => (0u8..12).prop_map(Step::Later),
    ]
}

/// A path's entry in the model.
#[derive(Debug)]
struct Belongs {
    backend: BackendId,
    answered: bool,
    holders: BTreeSet<u32>,
    used: Option<Instant>,
}

/// The tables, and what should be in them.
struct Model {
    flows: FlowTable,
    affinity: AffinityTable,
    backends: [BackendId; 3],
    start: Instant,
    now: Instant,
    /// By number: path, backend, when it was used last.
    live: BTreeMap<u32, (u8, BackendId, Instant)>,
    paths: BTreeMap<u8, Belongs>,
    /// How many numbers were given.
    numbers: u32,
    /// Numbers of flows that have ended at this very moment and had been used in it.
    warm: BTreeSet<u32>,
}

fn client(path: u8) -> ClientPath {
    ClientPath { client: ([192, 0, 2, 1], 50_000 + u16::from(path)).into(), local: None }
}

impl Model {
    fn new() -> Self {
        let now = Instant::now();
        let hash = ahash::RandomState::with_seeds(1, 2, 3, 4);
        Self {
            flows: FlowTable::new(MAX_FLOWS, now, &hash),
            affinity: AffinityTable::new(PATHS, now, &hash),
            backends: fixtures::backend_ids(),
            start: now,
            now,
            live: BTreeMap::new(),
            paths: BTreeMap::new(),
            numbers: 0,
            warm: BTreeSet::new(),
        }
    }

    /// A flow has ended, which must be told of once.
    fn ended(&mut self, Ended { flow, .. }: Ended) {
        let (path, _, used) = self.live.remove(&flow.0).expect("only flows that live end");
        if used == self.now {
            self.warm.insert(flow.0);
        }
        let Some(belongs) = self.paths.get_mut(&path) else { return };
        belongs.holders.remove(&flow.0);
        if belongs.holders.is_empty() && belongs.used.is_none() {
            self.paths.remove(&path);
        }
    }

    fn belongs(&mut self, path: u8, backend: BackendId) -> Option<&mut Belongs> {
        if !self.paths.contains_key(&path) && self.paths.len() == PATHS {
            return None;
        }
        let fresh = Belongs { backend, answered: false, holders: BTreeSet::new(), used: None };
        Some(self.paths.entry(path).or_insert(fresh))
    }

    fn send(&mut self, path: u8, backend: BackendId, claim: Claim, cid: u8) {
        let now = self.now;
        let octets = [cid; 8];
        let cid = (cid > 0).then(|| CidTag::new(&octets));
        let validated = claim == Claim::Validated;
        let config = ConfigIndex::NONE;
        let shown = Shown { cid, config, dcid: &octets, scid: None, validated, asks: false };
        let found = self.flows.find(now, EDGE, &client(path), backend, &shown);
        if let Some(Found { flow, seen: Some(seen) }) = found {
            assert_eq!(Some(seen), self.flows.cid(flow));
            assert_eq!(self.flows.slots[flow.index()].standing, Some(Standing::Proven));
        }
        let found = found.map(|found| found.flow);
        let known = self.live.iter().find(|(_, (p, b, _))| (*p, *b) == (path, backend));
        let known = known.map(|(&number, _)| number);
        assert_eq!(found.map(|id| id.0), known);
        if let Some(number) = known {
            self.live.insert(number, (path, backend, now));
            return;
        }
        let flow = Flow { listener: EDGE, path: client(path), backend };
        let opened = self.flows.open(now, flow, claim, &shown, &mut self.affinity);
        let Some((opened, evicted)) = opened else {
            self.refused(claim);
            return;
        };
        if let Some(evicted) = evicted {
            let (_, _, used) = self.live[&evicted.flow.0];
            assert_ne!(used, now, "{evicted:?} was used at this very moment");
            self.ended(evicted);
        }
        assert!(!self.warm.contains(&opened.0), "{opened:?} has just meant another flow");
        let twice = self.live.insert(opened.0, (path, backend, now));
        assert_eq!(twice, None, "{opened:?} lives twice");
        assert_eq!(*self.flows.get(opened), flow);
        self.numbers = self.numbers.max(opened.0 + 1);
        if let Some(belongs) = self.belongs(path, backend) {
            belongs.holders.insert(opened.0);
        }
    }

    /// Nobody is refused while a flow is idle, or only unproved: that one could make room.
    fn refused(&self, claim: Claim) {
        for (&number, (.., used)) in &self.live {
            let idle = self.now - *used;
            let standing = self.flows.slots[number as usize].standing.unwrap();
            let could_go = match (standing, claim) {
                (Standing::Proven, Claim::None | Claim::Routable | Claim::Validated) => {
                    idle >= room::IDLE
                }
                _ => idle > Duration::ZERO,
            };
            assert!(
                !could_go,
                "{claim:?} was refused while {number} was {standing:?}, {idle:?} idle"
            );
        }
    }

    fn fail(&mut self, flow: FlowId, short: bool) {
        self.live.entry(flow.0).and_modify(|(.., used)| *used = self.now);
        let why = if short { DropReason::PortsExhausted } else { DropReason::SendFailed };
        // As a worker does, with a bound.
        for _ in 0..2 {
            match self.flows.fail(self.now, flow, why, &mut self.affinity) {
                OnFailure::RetryAfter(evicted) => {
                    assert!(short);
                    assert_ne!(evicted.flow, flow);
                    let backend = |flow: FlowId| self.live[&flow.0].1;
                    assert_eq!(backend(evicted.flow), backend(flow), "other backend");
                    let cid = self.flows.cid(flow);
                    assert!(cid.is_none() || evicted.cid != cid, "of the same connection");
                    self.ended(evicted);
                }
                OnFailure::Drop(reason) => {
                    assert_eq!(reason, why);
                    self.ended(Ended { flow, standing: Standing::Unproven, cid: None });
                    return;
                }
            }
        }
        panic!("a flow is retried once");
    }

    fn sweep(&mut self) {
        let mut expired = Vec::new();
        for _ in 0..SWEEP_DIVISOR {
            let in_use = |_, _| {};
            self.flows.sweep(self.now, &LIFETIMES, &mut self.affinity, &mut expired, in_use);
            self.affinity.sweep(self.now, LIFETIMES.flow_idle);
        }
        for ended in expired {
            let (_, _, used) = self.live[&ended.flow.0];
            assert!(self.now - used > LIFETIMES.flow_unanswered, "{ended:?} was in use");
            self.ended(ended);
        }
        let seconds = |time: Instant| (time - self.start).as_secs();
        for belongs in self.paths.values_mut() {
            belongs.used = belongs
                .used
                .filter(|&used| seconds(self.now) - seconds(used) <= LIFETIMES.flow_idle.as_secs());
        }
        self.paths.retain(|_, belongs| !belongs.holders.is_empty() || belongs.used.is_some());
    }

    fn take(&mut self, step: Step) {
        let nth = |live: &BTreeMap<u32, _>, n: u8| {
            live.keys().nth(usize::from(n) % live.len().max(1)).copied().map(FlowId)
        };
        match step {
            Step::Send { path, backend, claim, cid } => {
                let claims = [Claim::None, Claim::Validated, Claim::Known, Claim::Routable];
                let backend = self.backends[usize::from(backend)];
                self.send(path, backend, claims[usize::from(claim)], cid);
            }
            Step::Direct { path, backend } => {
                let (backend, now) = (self.backends[usize::from(backend)], self.now);
                self.affinity.used(now, EDGE, &client(path), backend);
                if let Some(belongs) = self.belongs(path, backend) {
                    belongs.used = Some(now);
                }
            }
            Step::Answer { flow, large } => {
                let flow = u32::from(flow) % self.numbers.max(1);
                if flow < self.numbers {
                    let len = if large { 1200 } else { 40 };
                    let id = FlowId(flow);
                    self.flows.answered(self.now, id, len, 1, &mut self.affinity, |_| false);
                    if let Some((path, backend, used)) = self.live.get_mut(&flow) {
                        *used = self.now;
                        if let Some(belongs) = self.paths.get_mut(path)
                            && belongs.holders.contains(&flow)
                            && (belongs.backend == *backend || !belongs.answered)
                        {
                            (belongs.backend, belongs.answered) = (*backend, true);
                        }
                    }
                }
            }
            Step::Fail { flow, short } => {
                if let Some(flow) = nth(&self.live, flow) {
                    self.fail(flow, short);
                }
            }
            Step::Sweep => self.sweep(),
            Step::Later(seconds) => {
                self.now += Duration::from_secs(u64::from(seconds)) + Duration::from_nanos(1);
                self.warm.clear();
            }
        }
    }

    fn check(&self) {
        assert_eq!(self.flows.len(), self.live.len());
        assert!(self.flows.len() <= MAX_FLOWS && self.affinity.len() <= PATHS);
        for (&number, (path, backend, _)) in &self.live {
            let flow = Flow { listener: EDGE, path: client(*path), backend: *backend };
            assert_eq!(*self.flows.get(FlowId(number)), flow);
        }
        // Each flow is in the lists of its standing, and of its network while it may be forged.
        let len = |standing| self.flows.by_standing.len(standing);
        assert_eq!(Standing::ALL.map(len).iter().sum::<usize>(), self.live.len());
        let network = network(client(0).client.ip());
        assert_eq!(self.flows.of_network.len(network), len(Standing::Unproven));
        assert!(self.flows.by_cid.len() <= self.live.len());
        assert_eq!(self.affinity.len(), self.paths.len());
        for path in 0..10 {
            let belongs = self.paths.get(&path).map(|belongs| belongs.backend);
            assert_eq!(self.affinity.get(EDGE, &client(path)), belongs, "path {path}");
        }
    }
}

proptest! {
    /// Whatever happens: no number means two flows at once or within one moment, each end is told
    /// once, both tables are bounded, and a path belongs to the backend that was first for as long
    /// as its entry is held or used.
    #[test]
    fn flows_and_affinity_agree_with_their_model(steps in prop::collection::vec(step(), 1..300)) {
        let mut model = Model::new();
        for step in steps {
            model.take(step);
            model.check();
        }
    }
}

#[test]
fn flows_that_anybody_may_have_begun_are_counted_and_hold_no_drain_up() {
    let now = Instant::now();
    for (claim, is_there) in [(Claim::Routable, false), (Claim::None, true), (Claim::Known, true)] {
        let mut model = Model::new();
        let backend = model.backends[0];
        let octets = [1; 8];
        let cid = (claim != Claim::None).then(|| CidTag::new(&octets));
        let config = ConfigIndex::of_routable(&octets);
        let shown = Shown { cid, config, dcid: &octets, scid: None, validated: false, asks: false };
        let flow = Flow { listener: EDGE, path: client(1), backend };
        assert!(model.flows.open(now, flow, claim, &shown, &mut model.affinity).is_some());
        model.flows.sweep(now, &LIFETIMES, &mut model.affinity, &mut vec![], |_, _| {});
        let live = model.flows.take_census().unwrap()[backend.slot()];
        let heard = live.by_config.iter().any(|config| config.last_heard.is_some());
        assert_eq!((live.flows, heard), (1, is_there), "{claim:?}");
    }
}
