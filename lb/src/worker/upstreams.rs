//! The upstream socket of each flow, by the number of the flow.
//!
//! Sockets of flows that have ended are closed a few at a time: closing is slow, and many flows end
//! together.

use std::{collections::VecDeque, io, mem, sync::Arc, time::Instant};

use super::{
    loops::UpstreamPorts,
    ports::{HandedPorts, Lease, NotOpened, Ports},
};
use crate::{
    cid_tag::CidTag,
    client_path::ListenerIndex,
    connection_log::{
        ledger::Ledger,
        record::{Begun, EndReason, Traffic},
    },
    counters::WorkerCounters,
    forwarder::Flow,
    routing::{BackendRoute, Routing},
    socket::{Marks, Poller, Socket},
    verdict::{DropReason, Ended, FlowId, Opened, Opening},
};

/// Sockets of ended flows that one round closes.
const CLOSINGS: usize = 32;
/// No flow of the batch has this queue.
pub(super) const NO_QUEUE: u16 = u16::MAX;
/// Tokens of the poller below this are listeners, all others flows.
const FIRST_FLOW: u64 = 1 << 32;

/// The sockets.
pub(super) struct Upstreams {
    sockets: Vec<Upstream>,
    ports: Ports,
    closing: VecDeque<(Socket, Lease, Option<CidTag>)>,
    ledger: Ledger,
}

/// The socket of a flow.
pub(super) struct Upstream {
    pub(super) connection: Connection,
    /// How the socket marks datagrams that do not say.
    pub(super) marks: Marks,
    pub(super) ipv6: bool,
    /// Where its datagrams of the current batch are.
    pub(super) queue: u16,
    pub(super) listener: u16,
    pub(super) backend: u16,
    /// What went through it.
    pub(super) traffic: Traffic,
}

pub(super) enum Connection {
    Open(Socket, Lease),
    /// There is none: this is what becomes of datagrams that wanted one.
    Missing(DropReason),
}

/// The socket of a flow that begins.
pub(super) struct Connected {
    socket: Socket,
    lease: Lease,
    backend: u16,
    ipv6: bool,
}

/// What a predecessor has handed over for a flow.
pub(super) struct Taken {
    pub(super) socket: Socket,
    pub(super) lease: Lease,
    pub(super) marks: Marks,
    pub(super) traffic: Traffic,
    pub(super) begun: Option<Begun>,
}

/// The flow whose socket the poller reports as `token`; `None` when it is a listener.
pub(super) fn flow_of(token: u64) -> Option<FlowId> {
    let flow = token.checked_sub(FIRST_FLOW)?;
    #[expect(clippy::cast_possible_truncation, reason = "flows are numbered by u32")]
    Some(FlowId(flow as u32))
}

impl Upstreams {
    /// Their local ports are among `ports`; those in use are `in_use`.
    pub(super) fn new(ports: Vec<u16>, in_use: Arc<UpstreamPorts>, ledger: Ledger) -> Self {
        let ports = Ports::new(ports, in_use);
        Self { sockets: Vec::new(), ports, closing: VecDeque::new(), ledger }
    }

    /// What a successor has to know of their ports.
    pub(super) fn handed_ports(&self, now: Instant) -> HandedPorts {
        self.ports.handed(now, self.closing.iter().map(|(_, lease, cid)| (*lease, *cid)))
    }

    /// With the ports that a predecessor had, and no sockets yet.
    pub(super) fn succeeding(
        now: Instant,
        handed: HandedPorts,
        ports: Vec<u16>,
        in_use: Arc<UpstreamPorts>,
        ledger: Ledger,
    ) -> Self {
        let ports = Ports::succeeding(now, handed, ports, in_use);
        Self { sockets: Vec::new(), ports, closing: VecDeque::new(), ledger }
    }

    /// Goes on with the socket of a flow that a predecessor had. An error leaves the flow without one.
    pub(super) fn take_over(
        &mut self,
        counters: &WorkerCounters,
        poller: &Poller,
        id: FlowId,
        flow: &Flow,
        taken: Taken,
    ) -> io::Result<()> {
        let Taken { socket, lease, marks, traffic, begun } = taken;
        poller.watch(&socket, FIRST_FLOW + id.index() as u64)?;
        let peer = self.ports.take_over(lease).ok_or(io::ErrorKind::InvalidData)?;
        if self.sockets.len() <= id.index() {
            self.sockets.resize_with(id.index() + 1, Upstream::default);
        }
        #[expect(clippy::cast_possible_truncation, reason = "each has a descriptor")]
        let listener = flow.listener.0 as u16;
        #[expect(clippy::cast_possible_truncation, reason = "below MAX_BACKENDS")]
        let backend = flow.backend.slot() as u16;
        let connection = Connection::Open(socket, lease);
        let ipv6 = peer.is_ipv6();
        self.sockets[id.index()] =
            Upstream { connection, marks, ipv6, queue: NO_QUEUE, listener, backend, traffic };
        if let Some(begun) = begun {
            self.ledger.take_over(id, begun);
        }
        if let Some(counters) = counters.listeners.get(flow.listener.0) {
            counters.flows.add(1);
        }
        Ok(())
    }

    /// As they are once all sockets are closed, wherever the worker was amid its work; their ports rest. `cid` says which
    /// connection ID of a server the client of a flow has used last.
    pub(super) fn after_loss(
        mut self,
        now: Instant,
        cid: impl Fn(FlowId) -> Option<CidTag>,
    ) -> Self {
        self.end_all(now, EndReason::Panic);
        let Self { sockets, ports, closing, ledger } = self;
        let mut leases = Vec::with_capacity(sockets.len() + closing.len());
        leases.extend(closing.into_iter().map(|(_, lease, cid)| (lease, cid)));
        for (flow, Upstream { connection, .. }) in (0..).zip(sockets) {
            if let Connection::Open(_, lease) = connection {
                leases.push((lease, cid(FlowId(flow))));
            }
        }
        let ports = ports.after_loss(now, leases);
        Self { sockets: Vec::new(), ports, closing: VecDeque::new(), ledger }
    }

    /// Has all flows told as ended.
    pub(super) fn end_all(&mut self, now: Instant, reason: EndReason) {
        let Self { sockets, ledger, .. } = self;
        let traffic = |flow: FlowId| sockets.get(flow.index()).map(|upstream| upstream.traffic);
        ledger.end_all(now, reason, |flow| traffic(flow).unwrap_or_default());
    }

    /// What is logged of flows.
    pub(super) const fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// As [`Self::ledger`], to be changed.
    pub(super) const fn ledger_mut(&mut self) -> &mut Ledger {
        &mut self.ledger
    }

    #[inline]
    pub(super) fn get(&self, flow: FlowId) -> Option<&Upstream> {
        self.sockets.get(flow.index())
    }

    #[inline]
    pub(super) fn get_mut(&mut self, flow: FlowId) -> Option<&mut Upstream> {
        self.sockets.get_mut(flow.index())
    }

    /// The socket of a flow that a verdict names.
    #[inline]
    pub(super) fn of(&mut self, flow: FlowId) -> &mut Upstream {
        &mut self.sockets[flow.index()]
    }

    /// Opens a socket for `flow` towards `backend`, and counts for it what the kernel says against that.
    pub(super) fn connect(
        &mut self,
        now: Instant,
        poller: &Poller,
        routing: &Routing,
        flow: FlowId,
        backend: &BackendRoute,
        cid: Option<CidTag>,
    ) -> Result<Connected, NotOpened> {
        let sources = &routing.pool(backend.pool).source_addresses;
        let (socket, lease) = self.ports.open(now, backend.address, sources, cid)?;
        if poller.watch(&socket, FIRST_FLOW + flow.index() as u64).is_err() {
            drop(socket);
            self.ports.release(now, lease, None);
            return Err(NotOpened { reason: DropReason::DescriptorLimit, refusal: None });
        }
        #[expect(clippy::cast_possible_truncation, reason = "below MAX_BACKENDS")]
        let slot = backend.id.slot() as u16;
        Ok(Connected { socket, lease, backend: slot, ipv6: backend.address.0.is_ipv6() })
    }

    /// Gives a flow that begins its socket, or the reason why it has none.
    pub(super) fn put(
        &mut self,
        counters: &WorkerCounters,
        listener: ListenerIndex,
        &Opened { flow, opening, .. }: &Opened,
        connected: Result<Connected, DropReason>,
    ) {
        if self.sockets.len() <= flow.index() {
            self.sockets.resize_with(flow.index() + 1, Upstream::default);
        }
        self.sockets[flow.index()] = match connected {
            Ok(Connected { socket, lease, backend, ipv6 }) => {
                let counters = &counters.listeners[listener.0];
                counters.flows.add(1);
                if opening == Opening::PathChange {
                    counters.path_changes.add(1);
                }
                #[expect(clippy::cast_possible_truncation, reason = "each has a descriptor")]
                let listener = listener.0 as u16;
                let connection = Connection::Open(socket, lease);
                Upstream {
                    connection,
                    marks: Marks::UNSET,
                    ipv6,
                    queue: NO_QUEUE,
                    listener,
                    backend,
                    traffic: Traffic::default(),
                }
            }
            Err(reason) => {
                Upstream { connection: Connection::Missing(reason), ..Upstream::default() }
            }
        };
    }

    /// Closes the socket of a flow that has ended to make room. Nothing waits to be sent by it: a
    /// flow that was used in this round does not end in it.
    pub(super) fn evict(&mut self, now: Instant, counters: &WorkerCounters, ended: Ended) {
        let Ended { flow, standing, cid } = ended;
        let upstream = mem::take(&mut self.sockets[flow.index()]);
        self.ledger.end(now, flow, &upstream.traffic, || EndReason::of_evicted(&ended));
        debug_assert_eq!(upstream.queue, NO_QUEUE, "{flow:?} was used in this round");
        if let Connection::Open(socket, lease) = upstream.connection {
            let counters = &counters.listeners[usize::from(upstream.listener)];
            counters.flows.sub(1);
            counters.evicted[standing as usize].add(1);
            drop(socket);
            self.ports.release(now, lease, cid);
        }
    }

    /// Has the socket of a flow that has expired closed in one of the next rounds.
    pub(super) fn expire(&mut self, now: Instant, counters: &WorkerCounters, ended: Ended) {
        let Ended { flow, cid, .. } = ended;
        let upstream = mem::take(&mut self.sockets[flow.index()]);
        let traffic = upstream.traffic;
        self.ledger.end(now, flow, &traffic, || EndReason::of_expired(&ended, &traffic));
        self.close(counters, upstream, cid);
    }

    /// As [`Self::expire`], of a flow whose backend has refused what it began with.
    pub(super) fn refuse(&mut self, now: Instant, counters: &WorkerCounters, ended: Ended) {
        let Ended { flow, cid, .. } = ended;
        let upstream = mem::take(&mut self.sockets[flow.index()]);
        self.ledger.end(now, flow, &upstream.traffic, || EndReason::Refused);
        self.close(counters, upstream, cid);
    }

    fn close(&mut self, counters: &WorkerCounters, upstream: Upstream, cid: Option<CidTag>) {
        if let Connection::Open(socket, lease) = upstream.connection {
            counters.listeners[usize::from(upstream.listener)].flows.sub(1);
            self.closing.push_back((socket, lease, cid));
        }
    }

    /// Closes some of the sockets of expired flows; says whether all are closed.
    pub(super) fn close_some(&mut self, now: Instant) -> bool {
        for _ in 0..CLOSINGS {
            let Some((socket, lease, cid)) = self.closing.pop_front() else { break };
            drop(socket);
            self.ports.release(now, lease, cid);
        }
        self.closing.is_empty()
    }

    /// Sockets that are still to be closed.
    pub(super) fn closing(&self) -> usize {
        self.closing.len()
    }

    /// Forgets what is known of ports that have rested. To be called now and then.
    pub(super) fn sweep(&mut self, now: Instant) {
        self.ports.sweep(now);
    }
}

impl Default for Upstream {
    fn default() -> Self {
        Self {
            connection: Connection::Missing(DropReason::SendFailed),
            marks: Marks::UNSET,
            ipv6: false,
            queue: NO_QUEUE,
            listener: 0,
            backend: 0,
            traffic: Traffic::default(),
        }
    }
}
