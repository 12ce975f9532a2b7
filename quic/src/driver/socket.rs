//! One UDP socket with everything the kernel offers for QUIC: segmentation and receive offload,
//! ECN marks, and the local address of each datagram.

use std::{
    io::{self, IoSliceMut},
    net::SocketAddr,
};

use quinn_udp::{BATCH_SIZE, EcnCodepoint, RecvMeta, UdpSockRef, UdpSocketState};
use tokio::{io::Interest, net::UdpSocket};

use crate::transport::{Ecn, Received, Transmit};

/// Octets of one receive buffer: the most that receive offload puts together.
const BUFFER: usize = 64 * 1024;
/// What the socket should be able to hold; the kernel may give less.
const SOCKET_BUFFER: usize = 4 << 20;

/// A socket.
pub(super) struct Socket {
    io: UdpSocket,
    state: UdpSocketState,
}

/// Where datagrams are received to.
pub(super) struct Buffers {
    octets: Vec<u8>,
    metas: [RecvMeta; BATCH_SIZE],
}

impl Buffers {
    pub(super) fn new() -> Self {
        Self { octets: vec![0; BUFFER * BATCH_SIZE], metas: [RecvMeta::default(); BATCH_SIZE] }
    }
}

impl Socket {
    pub(super) fn new(socket: std::net::UdpSocket) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        let reference = UdpSockRef::from(&socket);
        // Best effort: small buffers cost throughput, not correctness.
        let _ = state.set_send_buffer_size(UdpSockRef::from(&socket), SOCKET_BUFFER);
        let _ = state.set_recv_buffer_size(reference, SOCKET_BUFFER);
        Ok(Self { io: UdpSocket::from_std(socket)?, state })
    }

    pub(super) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.io.local_addr()
    }

    /// Datagrams that one send may hold.
    pub(super) fn max_segments(&self) -> usize {
        self.state.max_gso_segments()
    }

    pub(super) async fn readable(&self) -> io::Result<()> {
        self.io.readable().await
    }

    /// Receives what is there, one batch, and hands each datagram to `handle`. Returns how many
    /// there were; none when the socket is empty.
    pub(super) fn receive(
        &self,
        buffers: &mut Buffers,
        handle: &mut dyn FnMut(Received, &mut [u8]),
    ) -> io::Result<usize> {
        let Buffers { octets, metas } = buffers;
        let mut slices = octets.chunks_mut(BUFFER).map(IoSliceMut::new);
        let mut slices: [IoSliceMut<'_>; BATCH_SIZE] =
            std::array::from_fn(|_| slices.next().unwrap_or_else(|| IoSliceMut::new(&mut [])));
        let received = self.io.try_io(Interest::READABLE, || {
            self.state.recv(UdpSockRef::from(&self.io), &mut slices, metas)
        });
        let batch = match received {
            Ok(batch) => batch,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(0),
            // What an ICMP message said about an earlier datagram; nothing of ours depends on it.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(1),
            Err(error) => return Err(error),
        };
        let mut count = 0;
        for (meta, slice) in metas[..batch].iter().zip(&mut slices) {
            let from = Received {
                remote: meta.addr,
                local: meta.dst_ip,
                ecn: meta.ecn.and_then(|ecn| Ecn::from_bits(ecn as u8)),
            };
            let stride = meta.stride.max(1);
            for datagram in slice[..meta.len.min(BUFFER)].chunks_mut(stride) {
                handle(from, datagram);
                count += 1;
            }
            // An empty datagram counts as well, lest a flood of them starve everything else.
            count += usize::from(meta.len == 0);
        }
        Ok(count)
    }

    /// Sends, waiting for room if need be. Errors are those of the network: QUIC recovers, or
    /// times out.
    pub(super) async fn send(&self, transmit: &Transmit, octets: &[u8]) {
        let transmit = quinn_udp::Transmit {
            destination: transmit.remote,
            ecn: transmit.ecn.and_then(|ecn| EcnCodepoint::from_bits(ecn.to_bits())),
            contents: octets,
            segment_size: (transmit.len > transmit.segment).then_some(transmit.segment),
            src_ip: transmit.local,
        };
        loop {
            let sent = self.io.try_io(Interest::WRITABLE, || {
                self.state.try_send(UdpSockRef::from(&self.io), &transmit)
            });
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.io.writable().await.is_err() {
                        return;
                    }
                }
                _ => return,
            }
        }
    }
}
