//! One UDP socket, and the batches that go through it.

use std::{
    collections::VecDeque,
    io::{self, IoSliceMut},
    net::{SocketAddr, UdpSocket},
    ops::Range,
    task::{Context, Poll, ready},
};

use quinn_udp::{EcnCodepoint, RecvMeta, UdpSocketState};
use tokio::io::Interest;

use crate::transport::{Ecn, Received, Transmit};

/// Octets that one slot takes: as much as the kernel puts together.
const SLOT: usize = 1 << 16;
/// Slots of one receiving system call.
const SLOTS: usize = 16;
/// What one sending system call may carry: an IP packet, as far as length fields go.
const MAX_SEND: usize = 65_000;
/// Datagrams of the usual size that fit [`MAX_SEND`].
const MAX_SEGMENTS: usize = 44;
/// What is asked of the kernel for each direction: a burst of a fast sender, while the task is not
/// scheduled. The kernel gives what its administrator allows.
const SOCKET_BUFFER: usize = 2 << 20;

/// A socket that tells where datagrams were sent to, and what marks they bore.
#[derive(Debug)]
pub(super) struct Socket {
    io: tokio::net::UdpSocket,
    state: UdpSocketState,
    address: SocketAddr,
    #[cfg(test)]
    pub(super) full: std::sync::Arc<super::tests::Full>,
}

impl Socket {
    /// A socket at `address`. With `shared`, several can have it, and the kernel spreads clients
    /// over them.
    pub(super) fn bind(address: SocketAddr, shared: bool) -> io::Result<UdpSocket> {
        let domain = socket2::Domain::for_address(address);
        let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, None)?;
        if address.is_ipv6() {
            // As far as the system can do both: otherwise IPv6 alone.
            let _ = socket.set_only_v6(false);
        }
        socket.set_reuse_port(shared)?;
        socket.bind(&address.into())?;
        Ok(socket.into())
    }

    pub(super) fn new(socket: UdpSocket) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let state = UdpSocketState::new((&socket).into())?;
        let reference = socket2::SockRef::from(&socket);
        let _ = reference.set_recv_buffer_size(SOCKET_BUFFER);
        let _ = reference.set_send_buffer_size(SOCKET_BUFFER);
        let address = socket.local_addr()?;
        Ok(Self {
            io: tokio::net::UdpSocket::from_std(socket)?,
            state,
            address,
            #[cfg(test)]
            full: std::sync::Arc::default(),
        })
    }

    pub(super) const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Datagrams that may leave by one system call.
    pub(super) fn max_segments(&self) -> usize {
        self.state.max_gso_segments().clamp(1, MAX_SEGMENTS)
    }

    /// `remote` in the form that this socket uses.
    pub(super) fn reachable(local: SocketAddr, remote: SocketAddr) -> Option<SocketAddr> {
        match (local, remote) {
            _ if remote.port() == 0 => None,
            (SocketAddr::V4(_), SocketAddr::V6(_)) => None,
            (SocketAddr::V6(_), SocketAddr::V4(v4)) => {
                Some(SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()))
            }
            _ => Some(remote),
        }
    }

    fn try_send(&self, batch: &quinn_udp::Transmit<'_>) -> io::Result<()> {
        #[cfg(test)]
        self.full.check(batch)?;
        self.state.try_send((&self.io).into(), batch)
    }

    fn poll_io<R>(
        &self,
        cx: &mut Context<'_>,
        interest: Interest,
        mut operation: impl FnMut() -> io::Result<R>,
    ) -> Poll<io::Result<R>> {
        loop {
            ready!(if interest.is_readable() {
                self.io.poll_recv_ready(cx)
            } else {
                self.io.poll_send_ready(cx)
            })?;
            match self.io.try_io(interest, &mut operation) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }
}

/// Where received datagrams are put.
pub(super) struct Inbound {
    octets: Box<[u8]>,
    metas: [RecvMeta; SLOTS],
    /// Slots in use.
    count: usize,
}

impl Inbound {
    pub(super) fn new() -> Self {
        let octets = vec![0; SLOT * SLOTS].into_boxed_slice();
        Self { octets, metas: [RecvMeta::default(); SLOTS], count: 0 }
    }

    /// Receives what there is, and says whether there was anything.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, socket: &Socket) -> bool {
        let Self { octets, metas, count } = self;
        let received = socket.poll_io(cx, Interest::READABLE, || {
            let mut slots = octets.chunks_exact_mut(SLOT);
            let mut slots: [IoSliceMut<'_>; SLOTS] =
                std::array::from_fn(|_| IoSliceMut::new(slots.next().unwrap_or_default()));
            socket.state.recv((&socket.io).into(), &mut slots, metas)
        });
        *count = match received {
            Poll::Ready(Ok(count)) => count,
            // An ICMP message about an earlier datagram: QUIC finds out by itself.
            Poll::Ready(Err(_)) => {
                cx.waker().wake_by_ref();
                0
            }
            Poll::Pending => 0,
        };
        *count > 0
    }

    /// Takes what was received, datagram by datagram.
    pub(super) fn drain(&mut self, mut take: impl FnMut(Received, &mut [u8])) {
        let slots = self.octets.chunks_exact_mut(SLOT).zip(&self.metas).take(self.count);
        for (slot, meta) in slots {
            let from = Received {
                remote: meta.addr,
                local: meta.dst_ip,
                ecn: meta.ecn.and_then(|mark| Ecn::from_bits(mark as u8)),
            };
            let octets = &mut slot[..meta.len.min(SLOT)];
            octets.chunks_mut(meta.stride.max(1)).for_each(|datagram| take(from, datagram));
        }
        self.count = 0;
    }
}

/// Datagrams on their way out.
pub(super) struct Outbound {
    octets: Vec<u8>,
    batches: VecDeque<(Transmit, Range<usize>)>,
    /// What comes before this place in `octets` leaves one by one.
    singly: usize,
}

/// Octets in [`Outbound`] from which on the core is asked for no more.
const ENOUGH: usize = 2 * MAX_SEND;

impl Outbound {
    pub(super) fn new() -> Self {
        Self { octets: Vec::with_capacity(ENOUGH + SLOT), batches: VecDeque::new(), singly: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// Asks for datagrams until there are enough or no more; returns whether there may be more.
    pub(super) fn fill(&mut self, mut next: impl FnMut(&mut Vec<u8>) -> Option<Transmit>) -> bool {
        while self.octets.len() < ENOUGH {
            let start = self.octets.len();
            let Some(transmit) = next(&mut self.octets) else { return false };
            self.batches.push_back((transmit, start..self.octets.len()));
        }
        true
    }

    /// Sends until all is gone or the socket takes no more; returns whether all is gone.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>, socket: &Socket) -> bool {
        while let Some((transmit, range)) = self.batches.front_mut() {
            let segment = transmit.segment.max(1);
            let most = if range.start < self.singly { 1 } else { socket.state.max_gso_segments() };
            let segments = (MAX_SEND / segment).clamp(1, most.max(1));
            let len = range.len().min(segments * segment);
            let batch = quinn_udp::Transmit {
                destination: transmit.remote,
                ecn: transmit.ecn.and_then(|mark| EcnCodepoint::from_bits(mark.to_bits())),
                contents: &self.octets[range.start..range.start + len],
                segment_size: (len > segment).then_some(segment),
                src_ip: transmit.local,
            };
            match socket.poll_io(cx, Interest::WRITABLE, || socket.try_send(&batch)) {
                Poll::Pending => return false,
                // A device that cannot take batches apart, or a path that became narrower than some of this one.
                Poll::Ready(Err(_)) if len > segment => {
                    self.singly = range.start + len;
                    continue;
                }
                Poll::Ready(_) => {}
            }
            // What the system refuses is lost, as if on the way: loss recovery knows what to do,
            // and MTU probes are meant to be refused at times.
            range.start += len;
            if range.start == range.end {
                self.batches.pop_front();
            }
        }
        self.octets.clear();
        self.singly = 0;
        true
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, net::IpAddr, time::Duration};

    use super::*;

    const DATAGRAMS: u8 = 20;
    const SIZE: usize = 1200;

    fn socket(address: &str) -> Socket {
        Socket::new(Socket::bind(address.parse().unwrap(), false).unwrap()).unwrap()
    }

    /// Sends a batch with a mark and says what was told of each of its datagrams.
    async fn exchange(
        from: &Socket,
        to: &Socket,
        at: IpAddr,
        mark: Ecn,
    ) -> Vec<(Received, Vec<u8>)> {
        let remote = Socket::reachable(from.address(), SocketAddr::new(at, to.address().port()));
        let transmit = Transmit {
            remote: remote.unwrap(),
            local: None,
            ecn: Some(mark),
            segment: SIZE,
            len: usize::from(DATAGRAMS) * SIZE,
        };
        let mut outbound = Outbound::new();
        let mut batch = Some(transmit);
        outbound.fill(|octets| {
            let transmit = batch.take()?;
            (0..DATAGRAMS).for_each(|n| octets.resize(octets.len() + SIZE, n));
            Some(transmit)
        });
        let mut inbound = Inbound::new();
        let mut told = Vec::new();
        let all = poll_fn(|cx| {
            let _ = outbound.poll_flush(cx, from);
            while told.len() < DATAGRAMS.into() && inbound.poll(cx, to) {
                inbound.drain(|meta, datagram| told.push((meta, datagram.to_vec())));
            }
            if told.len() < DATAGRAMS.into() { Poll::Pending } else { Poll::Ready(()) }
        });
        tokio::time::timeout(Duration::from_secs(20), all).await.expect("all arrive");
        told
    }

    #[tokio::test]
    async fn what_a_device_refuses_as_a_batch_leaves_one_by_one() {
        let (to, from) = (socket("127.0.0.1:0"), socket("127.0.0.1:0"));
        from.full.refuse_batches();
        let told = exchange(&from, &to, to.address().ip(), Ecn::Ect0).await;
        for (n, (_, datagram)) in (0..DATAGRAMS).zip(&told) {
            assert_eq!(datagram, &[n; SIZE]);
        }
    }

    /// A control message that does not fit is cut off: then a mark, an address or a boundary is missing.
    #[tokio::test]
    async fn req_k11_marks_addresses_and_boundaries_of_a_batch_arrive_with_it() {
        for (server, client, at) in [
            ("127.0.0.1:0", "127.0.0.1:0", "127.0.0.1"),
            ("0.0.0.0:0", "127.0.0.1:0", "127.0.0.3"),
            ("[::1]:0", "[::1]:0", "::1"),
            ("[::]:0", "[::1]:0", "::1"),
            ("[::]:0", "127.0.0.1:0", "127.0.0.3"),
            ("[::]:0", "[::]:0", "127.0.0.3"),
            ("0.0.0.0:0", "[::]:0", "127.0.0.3"),
        ] {
            let (to, from, at): (_, _, IpAddr) =
                (socket(server), socket(client), at.parse().unwrap());
            assert!(from.max_segments() > 1, "batches are what this is about");
            for mark in [Ecn::Ect0, Ecn::Ect1, Ecn::Ce] {
                let told = exchange(&from, &to, at, mark).await;
                for (n, (meta, datagram)) in (0..DATAGRAMS).zip(&told) {
                    assert_eq!(datagram, &[n; SIZE], "{server} {client}");
                    assert_eq!(meta.ecn, Some(mark), "{server} {client}: {n}");
                    let local = meta.local.map(|ip| ip.to_canonical());
                    assert_eq!(local, Some(at), "{server} {client}: {n}");
                }
            }
        }
    }
}
