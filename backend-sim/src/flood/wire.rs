//! How datagrams leave: by a raw socket from senders of our invention, or from many sockets.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket},
};

use etherparse::PacketBuilder;
use quic::random::Random;
use socket2::{Domain, Protocol, Socket, Type};

/// IPPROTO_RAW: the packets bring their own IP headers.
const RAW: i32 = 255;
/// Sockets that stand in for senders where none can be forged.
const SOCKETS: usize = 256;
/// Forged senders towards other hosts are of this network, which no host has
/// (<https://www.rfc-editor.org/rfc/rfc2544.html#appendix-C.2.2>).
const BENCHMARK: u32 = 0xc612_0000;

pub(super) struct Wire {
    target: SocketAddr,
    kind: Kind,
}

enum Kind {
    Raw { socket: Socket, target: SocketAddrV4, packet: Vec<u8> },
    Bound(Vec<UdpSocket>),
}

/// A sender: what stands for it depends on the wire.
#[derive(Clone, Copy)]
pub(super) struct Sender(u64);

impl Wire {
    pub(super) fn new(target: SocketAddr) -> io::Result<Self> {
        if let SocketAddr::V4(v4) = target
            && let Ok(socket) = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(RAW)))
        {
            let kind = Kind::Raw { socket, target: v4, packet: Vec::with_capacity(2048) };
            return Ok(Self { target, kind });
        }
        let sockets = (0..SOCKETS).map(|n| {
            let ip = match target.ip() {
                // All of 127.0.0.0/8 is ours.
                IpAddr::V4(_) => {
                    let n = u32::try_from(n).unwrap_or(0);
                    IpAddr::V4(Ipv4Addr::from_bits(0x7f09_0001 + n))
                }
                v6 => v6,
            };
            UdpSocket::bind((ip, 0))
        });
        Ok(Self { target, kind: Kind::Bound(sockets.collect::<Result<_, _>>()?) })
    }

    pub(super) const fn is_forging(&self) -> bool {
        matches!(self.kind, Kind::Raw { .. })
    }

    pub(super) fn sender(&self, random: &mut Random) -> Sender {
        Sender(random.number())
    }

    pub(super) fn send(&mut self, Sender(number): Sender, octets: &[u8]) -> io::Result<()> {
        match &mut self.kind {
            Kind::Raw { socket, target, packet } => {
                #[expect(clippy::cast_possible_truncation, reason = "parts of a random number")]
                let (host, port) = ((number >> 16) as u32, number as u16 | 0x8000);
                let from = match target.ip().is_loopback() {
                    true => 0x7f00_0000 | host & 0x00ff_ffff,
                    false => BENCHMARK | host & 0x0001_ffff,
                };
                packet.clear();
                let from = Ipv4Addr::from_bits(from).octets();
                let headers = PacketBuilder::ipv4(from, target.ip().octets(), 64);
                let headers = headers.udp(port, target.port());
                headers.write(packet, octets).map_err(io::Error::other)?;
                socket.send_to(packet, &SocketAddr::V4(*target).into()).map(drop)
            }
            Kind::Bound(sockets) => {
                let count = sockets.len() as u64;
                let socket = usize::try_from(number % count).unwrap_or(0);
                sockets[socket].send_to(octets, self.target).map(drop)
            }
        }
    }
}
