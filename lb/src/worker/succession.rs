//! The hand-over from a worker to the one that goes on with its work in another process.
//!
//! A worker that is ordered to hand over stops between two rounds, where nothing is half done, and tells its successor all that it
//! has: listeners, then flows with their sockets. It changes nothing of its own by that. Then it stays where it is: until it is
//! told to go on, because the successor has failed, or until the process ends. What arrives meanwhile waits in the sockets, which both
//! have, and whoever goes on reads it.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    time::{Duration, Instant},
};

use quic_lb_config::MAX_LISTENERS;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{
    ports::{HandedPorts, Lease},
    upstreams::{Connection, Taken, Upstream, Upstreams},
};
use crate::{
    backend::MAX_BACKENDS,
    client_path::ListenerIndex,
    connection_log::record::{HandedBegun, Traffic},
    counters::WorkerCounters,
    flows::HandedFlow,
    forwarder::Forwarder,
    socket::{Channel, Marks, Poller, Socket},
    succession::HashKeys,
    verdict::FlowId,
};

/// Flows that cross at once.
const BATCH: usize = 1_012;
/// How long a worker waits for its successor, or its predecessor, while they speak.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// What comes first, with the sockets of the listeners.
#[derive(Debug, Serialize, Deserialize)]
struct Head {
    hash_keys: HashKeys,
    ports: HandedPorts,
    flows: usize,
    /// The numbers of the listeners.
    listeners: Vec<ListenerIndex>,
}

/// A flow, and what belongs to its socket.
#[derive(Debug, Serialize, Deserialize)]
struct Handed {
    flow: HandedFlow,
    lease: Lease,
    marks: Marks,
    traffic: Traffic,
    /// How it began, if it is logged.
    begun: Option<HandedBegun>,
}

/// What a worker has.
pub(super) struct Belongings<'a> {
    pub(super) listeners: Vec<(ListenerIndex, &'a Socket)>,
    pub(super) forwarder: &'a Forwarder,
    pub(super) upstreams: &'a Upstreams,
}

impl Belongings<'_> {
    /// Tells `successor` all of it; says how many flows there are.
    pub(super) fn hand_over(&self, now: Instant, successor: &Channel) -> io::Result<usize> {
        let Self { listeners, forwarder, upstreams } = self;
        let open = |flow: FlowId| {
            let upstream = upstreams.get(flow)?;
            match &upstream.connection {
                Connection::Open(socket, lease) => Some((flow, socket, *lease, upstream)),
                Connection::Missing(_) => None,
            }
        };
        let flows: Vec<_> = forwarder.flows_by_last_use().into_iter().filter_map(open).collect();
        let head = Head {
            hash_keys: forwarder.hash_keys(),
            ports: upstreams.handed_ports(now),
            flows: flows.len(),
            listeners: listeners.iter().map(|(number, _)| *number).collect(),
        };
        let sockets: Vec<_> = listeners.iter().map(|(_, socket)| socket.as_fd()).collect();
        successor.send(&head, &sockets)?;
        for batch in flows.chunks(BATCH) {
            let (mut handed, mut sockets) = (Vec::new(), Vec::new());
            for &(flow, socket, lease, &Upstream { marks, traffic, .. }) in batch {
                let begun = upstreams.ledger().of(flow).map(|begun| begun.handed(now));
                let flow = forwarder.handed(now, flow).ok_or(io::ErrorKind::InvalidData)?;
                handed.push(Handed { flow, lease, marks, traffic, begun });
                sockets.push(socket.as_fd());
            }
            successor.send(&handed, &sockets)?;
        }
        Ok(flows.len())
    }
}

/// What comes from a predecessor.
pub(super) struct Inheritance {
    /// By number.
    pub(super) listeners: Vec<Option<Socket>>,
    pub(super) hash_keys: HashKeys,
    pub(super) ports: HandedPorts,
    /// They are still to be received.
    pub(super) flows: Flows,
}

/// The flows that a predecessor is about to hand over.
pub(super) struct Flows {
    count: usize,
    predecessor: Channel,
}

impl Inheritance {
    /// Waits until the predecessor hands over.
    pub(super) fn receive(predecessor: OwnedFd) -> io::Result<Self> {
        let predecessor = Channel::from(predecessor);
        predecessor.set_patience(Some(PATIENCE))?;
        let (Head { hash_keys, ports, flows: count, listeners: numbers }, sockets) =
            predecessor.receive()?;
        let mut listeners = vec![];
        listeners.resize_with(MAX_LISTENERS, || None);
        if sockets.len() != numbers.len() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        for (ListenerIndex(number), socket) in numbers.into_iter().zip(sockets) {
            let place = listeners.get_mut(number).ok_or(io::ErrorKind::InvalidData)?;
            *place = Some(Socket::taken_over(socket));
        }
        Ok(Self { listeners, hash_keys, ports, flows: Flows { count, predecessor } })
    }
}

impl Flows {
    /// Goes on with them, of which there can be so many.
    pub(super) fn take_over(
        self,
        now: Instant,
        max_flows: usize,
        forwarder: &mut Forwarder,
        upstreams: &mut Upstreams,
        poller: &Poller,
        counters: &WorkerCounters,
    ) -> io::Result<()> {
        let Self { count, predecessor } = self;
        // Those that were used last come last.
        let mut left_out = count.saturating_sub(max_flows);
        if left_out > 0 {
            warn!(flows = left_out, "there is no room for flows that are taken over: they end");
        }
        let mut taken = 0;
        while taken < count {
            let (batch, sockets) = predecessor.receive::<Vec<Handed>>()?;
            if batch.is_empty() || batch.len() != sockets.len() {
                return Err(io::ErrorKind::InvalidData.into());
            }
            taken += batch.len();
            let skipped = left_out.min(batch.len());
            left_out -= skipped;
            let batch = batch.into_iter().zip(sockets).skip(skipped);
            for (Handed { flow: handed, lease, marks, traffic, begun }, socket) in batch {
                let (flow, asks) = (*handed.flow(), handed.asks());
                let Some(id) = forwarder.take_over(now, handed) else { continue };
                let socket = Socket::taken_over(socket);
                let begun = begun.map(|begun| begun.taken_over(now, &flow));
                let taken = Taken { socket, lease, marks, traffic, begun };
                upstreams.take_over(counters, poller, id, &flow, taken)?;
                if asks && flow.backend.slot() < MAX_BACKENDS {
                    counters.backends[flow.backend.slot()].asked.add(1);
                }
            }
        }
        Ok(())
    }
}
