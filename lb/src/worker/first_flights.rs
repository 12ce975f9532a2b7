//! First flights that no backend has answered yet, kept for the moment that it takes to learn that nobody listens there: their clients
//! need not wait for a timeout of theirs. Most hosts tell it of few datagrams a second, so that what is said of one goes for all that went
//! to the same backend lately; and the rest of them go elsewhere when it has been found to be down.
//!
//! The memory is a ring of fixed size: who comes takes the place of who came first. What is kept for a second is never
//! sent twice to the same backend, and to three others at most, so that nobody can have more sent by it than a few times what they send.

use std::time::{Duration, Instant};

use crate::{backend::BackendId, forwarder::Flow, socket::Marks, verdict::FlowId};

/// Datagrams that are kept, of all flows of a worker: those of a few thousand connections a second for longer than an error
/// takes to come back, in less than a megabyte.
const KEPT: usize = 512;
/// Larger ones are not kept: links carry no more.
const MAX_OCTETS: usize = 1_500;
/// An error that comes later is about a client that has repeated what it sent.
const FRESH: Duration = Duration::from_secs(1);
/// Backends that one may have asked in vain, and that it is not sent to again.
pub(super) const MAX_TRIED: usize = 3;

/// The ring.
pub(super) struct FirstFlights {
    /// What they are, apart from their octets, so that looking for one is quick.
    kept: Vec<Option<Kept>>,
    octets: Box<[u8]>,
    next: usize,
}

/// A datagram.
#[derive(Clone, Copy)]
struct Kept {
    id: FlowId,
    flow: Flow,
    at: Instant,
    marks: Marks,
    len: usize,
    tried: Tried,
}

/// Backends that have refused a first flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct Tried([Option<BackendId>; MAX_TRIED]);

impl Tried {
    /// These and one more; `None` where there are as many as there may be.
    fn and(mut self, backend: BackendId) -> Option<Self> {
        *self.0.iter_mut().find(|tried| tried.is_none())? = Some(backend);
        Some(self)
    }

    /// Which.
    pub(super) fn backends(&self) -> impl Iterator<Item = BackendId> + Clone + '_ {
        self.0.iter().flatten().copied()
    }
}

impl FirstFlights {
    pub(super) fn new() -> Self {
        // The system gives memory when it is written.
        let octets = vec![0; KEPT * MAX_OCTETS].into();
        Self { kept: vec![None; KEPT], octets, next: 0 }
    }

    /// Keeps a datagram that is about to be sent by `flow`.
    pub(super) fn keep(
        &mut self,
        now: Instant,
        (id, flow): (FlowId, Flow),
        marks: Marks,
        octets: &[u8],
    ) {
        if octets.len() > MAX_OCTETS {
            return;
        }
        let at = self.next;
        self.next = (at + 1) % KEPT;
        self.octets[at * MAX_OCTETS..][..octets.len()].copy_from_slice(octets);
        let tried = Tried::default();
        self.kept[at] = Some(Kept { id, flow, at: now, marks, len: octets.len(), tried });
    }

    /// The numbers of those that were sent by `flow` a moment ago, in their order, which are all; and which backends have
    /// refused them, that of `flow` among them. `None` where there are none, or they have been refused often enough.
    pub(super) fn refused(&self, now: Instant, flow: &Flow) -> Option<(Vec<usize>, Tried)> {
        let is_it = |at: &usize| {
            self.kept[*at].as_ref().is_some_and(|kept| {
                kept.flow == *flow && now.saturating_duration_since(kept.at) <= FRESH
            })
        };
        let all: Vec<_> = (self.next..KEPT).chain(0..self.next).filter(is_it).collect();
        let tried = self.kept[*all.first()?]?.tried.and(flow.backend)?;
        Some((all, tried))
    }

    /// The flows by which backends like this were sent something a moment ago, some of them several times.
    pub(super) fn of(
        &self,
        now: Instant,
        is_gone: impl Fn(BackendId) -> bool,
    ) -> Vec<(FlowId, Flow)> {
        let kept = self.kept.iter().flatten();
        let kept = kept.filter(|kept| now.saturating_duration_since(kept.at) <= FRESH);
        let gone = kept.filter(|kept| is_gone(kept.flow.backend));
        gone.map(|kept| (kept.id, kept.flow)).collect()
    }

    /// Says that one is about to be sent by another flow.
    pub(super) fn moved(&mut self, number: usize, (id, flow): (FlowId, Flow), tried: Tried) {
        if let Some(kept) = &mut self.kept[number] {
            (kept.id, kept.flow, kept.tried) = (id, flow, tried);
        }
    }

    /// One that is kept.
    pub(super) fn datagram(&self, number: usize) -> Option<(Marks, &[u8])> {
        let Kept { marks, len, .. } = self.kept[number]?;
        Some((marks, &self.octets[number * MAX_OCTETS..][..len]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        client_path::{ClientPath, ListenerIndex},
        fixtures,
    };

    fn flow(port: u16, backend: BackendId) -> Flow {
        let path = ClientPath { client: ([192, 0, 2, 1], port).into(), local: None };
        Flow { listener: ListenerIndex(0), path, backend }
    }

    fn flow_of(port: u16, backend: BackendId) -> (FlowId, Flow) {
        (FlowId(port.into()), flow(port, backend))
    }

    #[test]
    fn what_is_kept_comes_back_in_order_for_its_flow_and_for_a_second() {
        let [a, b, ..] = fixtures::backend_ids::<3>();
        let (mut flights, now) = (FirstFlights::new(), Instant::now());
        for (port, octets) in [(1, &b"one"[..]), (2, b"other"), (1, b"two")] {
            flights.keep(now, flow_of(port, a), Marks::UNSET, octets);
        }
        flights.keep(now, flow_of(1, a), Marks::UNSET, &[0; MAX_OCTETS + 1]);
        let of = |flights: &FirstFlights, now, flow: &Flow| -> Vec<Vec<u8>> {
            let numbers = flights.refused(now, flow).map(|(numbers, _)| numbers);
            let datagram = |number| flights.datagram(number).unwrap().1.to_vec();
            numbers.into_iter().flatten().map(datagram).collect()
        };
        assert_eq!(of(&flights, now, &flow(1, a)), [b"one", b"two"]);
        assert_eq!(of(&flights, now + FRESH, &flow(2, a)), [b"other"]);
        assert!(of(&flights, now, &flow(1, b)).is_empty());
        let of_a = flights.of(now, |backend| backend == a);
        assert_eq!(of_a, [1, 2, 1].map(|port| flow_of(port, a)));
        assert!(flights.of(now, |backend| backend == b).is_empty());
        let late = now + FRESH + Duration::from_millis(1);
        assert!(flights.of(late, |_| true).is_empty());
        assert!(of(&flights, late, &flow(1, a)).is_empty());
    }

    #[test]
    fn it_goes_to_so_many_backends_and_never_twice_to_one() {
        let all = fixtures::backend_ids::<5>();
        let (mut flights, now) = (FirstFlights::new(), Instant::now());
        flights.keep(now, flow_of(1, all[0]), Marks::UNSET, b"hello");
        for (at, &backend) in all[..MAX_TRIED].iter().enumerate() {
            let (numbers, tried) = flights.refused(now, &flow(1, backend)).unwrap();
            assert_eq!(tried.backends().collect::<Vec<_>>(), all[..=at]);
            flights.moved(numbers[0], flow_of(1, all[at + 1]), tried);
        }
        assert_eq!(flights.refused(now, &flow(1, all[MAX_TRIED])), None);
    }

    #[test]
    fn however_many_come_the_memory_is_the_same_and_the_newest_are_there() {
        let [a] = fixtures::backend_ids();
        let (mut flights, now) = (FirstFlights::new(), Instant::now());
        let ports = 1..=3_000;
        for port in ports.clone() {
            flights.keep(now, flow_of(port, a), Marks::UNSET, &port.to_be_bytes());
        }
        let there = |port: &u16| flights.refused(now, &flow(*port, a)).is_some();
        assert_eq!(ports.filter(there).collect::<Vec<_>>(), (2_489..=3_000).collect::<Vec<_>>());
    }
}
