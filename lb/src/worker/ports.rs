//! Upstream sockets: one per flow, each with a local port that stands for its client path towards
//! its backend.
//!
//! Ports are scarce: one source address has about 28,000 by default. A port can serve any number
//! of backends at once, since the kernel tells connected sockets apart by all four parts of the
//! 4-tuple, so a port that this worker has is tried for other backends before a new one is taken.
//! What must never happen is two sockets with the same 4-tuple: the client of one would get what
//! was meant for the client of the other. Therefore
//!
//! - a port is first bound exclusively, which fails if anybody else has it, be it another worker;
//! - only while one of our sockets holds it are further sockets bound beside that one;
//! - each pair of source address and backend keeps account of the ports it may use.
//!
//! Ports come back in the order in which they were given up, so that a port rests for as long as
//! can be before it stands for somebody else.

use std::{
    collections::VecDeque,
    io,
    net::{IpAddr, SocketAddr, SocketAddrV6},
    time::{Duration, Instant},
};

use hashbrown::HashMap;

use crate::{
    backend::BackendAddr,
    socket::{PortUse, Socket},
    verdict::DropReason,
};

/// For how long a source address without free ports is not asked for one again: the kernel looks
/// through its whole table before it says no.
const EXHAUSTED: Duration = Duration::from_secs(1);
/// How many ports of ours that turn out to be taken by somebody else are tried for one flow.
const ATTEMPTS: usize = 8;

/// The ports of one worker.
#[derive(Debug, Default)]
pub(super) struct Ports {
    sources: Vec<Source>,
    pairs: Vec<Pair>,
    free_pairs: Vec<u32>,
    pair_of: HashMap<(usize, SocketAddr), u32, ahash::RandomState>,
    /// The source address that the kernel picked, by backend.
    picked: HashMap<SocketAddr, IpAddr, ahash::RandomState>,
    /// Where the search among several source addresses begins, so that they fill evenly.
    turn: usize,
}

/// A port towards a backend, to be handed back once the socket is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(super) struct Lease {
    pair: u32,
    port: u32,
}

#[derive(Debug)]
struct Source {
    address: IpAddr,
    ports: Vec<Port>,
    index_of: HashMap<u16, u32, ahash::RandomState>,
    exhausted_until: Option<Instant>,
}

/// A port that this worker has had; without users it may have become somebody else's.
#[derive(Debug)]
struct Port {
    number: u16,
    users: u32,
}

/// A source address and a backend.
#[derive(Debug)]
struct Pair {
    source: usize,
    peer: SocketAddr,
    users: u32,
    /// Ports of the source from here on have never been used by this pair.
    unseen: usize,
    /// Ports that this pair has given up, the one that rested longest first.
    rested: VecDeque<u32>,
}

impl Ports {
    /// Opens a socket to `peer` from one of `sources`; from the address that the kernel picks if
    /// there are none.
    pub(super) fn open(
        &mut self,
        now: Instant,
        BackendAddr(peer): BackendAddr,
        sources: &[IpAddr],
    ) -> Result<(Socket, Lease), DropReason> {
        if sources.is_empty() {
            return self.open_from_picked(now, peer).map_err(|error| reason(&error));
        }
        self.turn = self.turn.wrapping_add(1);
        let mut refusal = DropReason::PortsExhausted;
        for at in 0..sources.len() {
            let source = sources[self.turn.wrapping_add(at) % sources.len()];
            match self.open_from(now, source, peer) {
                Ok(opened) => return Ok(opened),
                Err(error) => match reason(&error) {
                    DropReason::DescriptorLimit => return Err(DropReason::DescriptorLimit),
                    reason => refusal = reason,
                },
            }
        }
        Err(refusal)
    }

    /// Takes back the port of a socket that has been closed.
    pub(super) fn release(&mut self, lease: Lease) {
        let pair = &mut self.pairs[lease.pair as usize];
        self.sources[pair.source].ports[lease.port as usize].users -= 1;
        pair.rested.push_back(lease.port);
        pair.users -= 1;
        if pair.users == 0 {
            // Backends come and go with the configuration; what is not in use is forgotten.
            self.pair_of.remove(&(pair.source, pair.peer));
            pair.rested = VecDeque::new();
            self.free_pairs.push(lease.pair);
        }
    }

    fn open_from_picked(&mut self, now: Instant, peer: SocketAddr) -> io::Result<(Socket, Lease)> {
        if let Some(&source) = self.picked.get(&peer) {
            let opened = self.open_from(now, source, peer);
            let gone = |e: &io::Error| e.kind() == io::ErrorKind::AddrNotAvailable;
            if !opened.as_ref().is_err_and(gone) {
                return opened;
            }
        }
        let source = Socket::source_towards(peer)?;
        self.picked.insert(peer, source);
        self.open_from(now, source, peer)
    }

    fn open_from(
        &mut self,
        now: Instant,
        source: IpAddr,
        peer: SocketAddr,
    ) -> io::Result<(Socket, Lease)> {
        if source.is_ipv4() != peer.is_ipv4() {
            return Err(io::ErrorKind::AddrNotAvailable.into());
        }
        let source = self.source(source);
        let pair = self.pair(source, peer);
        let opened = self.sources[source].open(now, &mut self.pairs[pair as usize]);
        if self.pairs[pair as usize].users == 0 {
            self.pair_of.remove(&(source, peer));
            self.free_pairs.push(pair);
        }
        opened.map(|(socket, port)| (socket, Lease { pair, port }))
    }

    fn source(&mut self, address: IpAddr) -> usize {
        self.sources.iter().position(|source| source.address == address).unwrap_or_else(|| {
            self.sources.push(Source {
                address,
                ports: Vec::new(),
                index_of: HashMap::default(),
                exhausted_until: None,
            });
            self.sources.len() - 1
        })
    }

    #[expect(clippy::cast_possible_truncation, reason = "pairs are fewer than descriptors")]
    fn pair(&mut self, source: usize, peer: SocketAddr) -> u32 {
        let Self { pairs, free_pairs, .. } = self;
        *self.pair_of.entry((source, peer)).or_insert_with(|| {
            let pair = Pair { source, peer, users: 0, unseen: 0, rested: VecDeque::new() };
            if let Some(free) = free_pairs.pop() {
                pairs[free as usize] = pair;
                return free;
            }
            pairs.push(pair);
            (pairs.len() - 1) as u32
        })
    }
}

impl Source {
    #[expect(clippy::cast_possible_truncation, reason = "there are at most 65,536 ports")]
    fn open(&mut self, now: Instant, pair: &mut Pair) -> io::Result<(Socket, u32)> {
        let known = self.ports.len() - pair.unseen + pair.rested.len();
        for _ in 0..known.min(ATTEMPTS) {
            let index = if pair.unseen < self.ports.len() {
                pair.unseen += 1;
                (pair.unseen - 1) as u32
            } else {
                pair.rested.pop_front().expect("ports that are known and not unseen have rested")
            };
            let port = &mut self.ports[index as usize];
            let port_use = if port.users > 0 { PortUse::Shared } else { PortUse::Exclusive };
            let local = local(self.address, port.number, pair.peer);
            match Socket::upstream(local, pair.peer, port_use) {
                Ok(socket) => {
                    port.users += 1;
                    pair.users += 1;
                    return Ok((socket, index));
                }
                Err(error) => {
                    pair.rested.push_back(index);
                    if error.kind() != io::ErrorKind::AddrInUse {
                        return Err(error);
                    }
                }
            }
        }
        self.open_fresh(now, pair)
    }

    /// A port that the kernel chooses.
    #[expect(clippy::cast_possible_truncation, reason = "there are at most 65,536 ports")]
    fn open_fresh(&mut self, now: Instant, pair: &mut Pair) -> io::Result<(Socket, u32)> {
        if self.exhausted_until.is_some_and(|until| now < until) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        let any_port = local(self.address, 0, pair.peer);
        let opened = Socket::upstream(any_port, pair.peer, PortUse::Exclusive);
        let exhausted = |error: &io::Error| error.kind() == io::ErrorKind::AddrInUse;
        self.exhausted_until = opened.as_ref().is_err_and(exhausted).then(|| now + EXHAUSTED);
        let socket = opened?;
        let number = socket.local_address()?.port();
        let Self { ports, index_of, .. } = self;
        let index = *index_of.entry(number).or_insert_with(|| {
            ports.push(Port { number, users: 0 });
            (ports.len() - 1) as u32
        });
        ports[index as usize].users += 1;
        pair.users += 1;
        // It may be one that was given up and not tried this time; it must not be tried again.
        while pair.unseen <= index as usize {
            if pair.unseen != index as usize {
                pair.rested.push_back(pair.unseen as u32);
            }
            pair.unseen += 1;
        }
        pair.rested.retain(|rested| *rested != index);
        Ok((socket, index))
    }
}

/// A link-local address means nothing without its link, which is the backend's.
fn local(source: IpAddr, port: u16, peer: SocketAddr) -> SocketAddr {
    match (source, peer) {
        (IpAddr::V6(source), SocketAddr::V6(peer)) if source.is_unicast_link_local() => {
            SocketAddrV6::new(source, port, 0, peer.scope_id()).into()
        }
        _ => SocketAddr::new(source, port),
    }
}

fn reason(error: &io::Error) -> DropReason {
    match error.raw_os_error() {
        Some(libc::EMFILE | libc::ENFILE) => DropReason::DescriptorLimit,
        _ if error.kind() == io::ErrorKind::AddrInUse => DropReason::PortsExhausted,
        _ => DropReason::SendFailed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::HashSet, net::UdpSocket};

    fn backends<const N: usize>() -> ([UdpSocket; N], [BackendAddr; N]) {
        let sockets = std::array::from_fn(|_| UdpSocket::bind("127.0.0.1:0").unwrap());
        let addresses = std::array::from_fn(|n: usize| {
            let sockets: &[UdpSocket; N] = &sockets;
            BackendAddr(sockets[n].local_addr().unwrap())
        });
        (sockets, addresses)
    }

    #[test]
    fn a_port_is_used_for_every_backend_before_another_is_taken() {
        let (_sockets, [a, b, c]) = backends();
        let mut ports = Ports::default();
        let now = Instant::now();
        let mut open = |peer| {
            let (socket, lease) = ports.open(now, peer, &[]).unwrap();
            (socket.local_address().unwrap().port(), socket, lease)
        };
        let to_a: Vec<_> = (0..3).map(|_| open(a)).collect();
        let to_b: Vec<_> = (0..3).map(|_| open(b)).collect();
        let to_c: Vec<_> = (0..4).map(|_| open(c)).collect();
        let set = |opened: &[(u16, Socket, Lease)]| {
            opened.iter().map(|(port, ..)| *port).collect::<HashSet<_>>()
        };
        assert_eq!(set(&to_a).len(), 3);
        assert_eq!(set(&to_b), set(&to_a));
        assert_eq!(set(&to_c).len(), 4);
        assert!(set(&to_c).is_superset(&set(&to_a)));
    }

    #[test]
    fn no_two_sockets_share_a_4_tuple_over_many_openings_and_closings() {
        let (_sockets, peers) = backends::<3>();
        let sources: Vec<IpAddr> = vec!["127.0.0.1".parse().unwrap(), "127.0.0.2".parse().unwrap()];
        let mut workers = [Ports::default(), Ports::default()];
        let mut open: Vec<(usize, SocketAddr, BackendAddr, Socket, Lease)> = Vec::new();
        let now = Instant::now();
        let mut random = 1u64;
        for _ in 0..4_000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let dice = (random >> 33) as usize;
            if dice % 5 < 3 || open.is_empty() {
                let (worker, peer) = (dice / 8 % 2, peers[dice / 16 % 3]);
                let (socket, lease) = workers[worker].open(now, peer, &sources).unwrap();
                let local = socket.local_address().unwrap();
                let twin = open.iter().find(|(_, l, p, ..)| (*l, *p) == (local, peer));
                assert!(twin.is_none(), "{local} -> {peer} twice");
                let stranger = open.iter().find(|(w, l, ..)| *w != worker && *l == local);
                assert!(stranger.is_none(), "{local} in two workers");
                open.push((worker, local, peer, socket, lease));
            } else {
                let (worker, .., socket, lease) = open.swap_remove(dice / 8 % open.len());
                drop(socket);
                workers[worker].release(lease);
            }
            if open.len() > 300 {
                for (worker, .., socket, lease) in open.drain(100..) {
                    drop(socket);
                    workers[worker].release(lease);
                }
            }
        }
        for (worker, .., socket, lease) in open {
            drop(socket);
            workers[worker].release(lease);
        }
        assert!(workers.iter().all(|ports| ports.pair_of.is_empty()));
    }

    #[test]
    fn a_port_that_was_given_up_and_taken_by_a_stranger_is_left_alone() {
        let (_sockets, [a]) = backends();
        let mut ports = Ports::default();
        let now = Instant::now();
        let keep = ports.open(now, a, &[]).unwrap();
        let (socket, lease) = ports.open(now, a, &[]).unwrap();
        let given_up = socket.local_address().unwrap();
        drop(socket);
        ports.release(lease);
        let stranger = UdpSocket::bind(given_up).unwrap();
        let other = ports.open(now, a, &[]).unwrap();
        assert_ne!(other.0.local_address().unwrap(), given_up);
        drop(stranger);
        let (socket, _lease) = ports.open(now, a, &[]).unwrap();
        assert_eq!(socket.local_address().unwrap(), given_up);
        drop(other);
        drop(keep);
    }

    #[test]
    fn what_cannot_be_opened_is_refused_with_a_reason() {
        let (_sockets, [a]) = backends();
        let mut ports = Ports::default();
        let now = Instant::now();
        let elsewhere: IpAddr = "192.0.2.1".parse().unwrap();
        let six: IpAddr = "::1".parse().unwrap();
        for sources in [vec![elsewhere], vec![six]] {
            assert_eq!(ports.open(now, a, &sources).unwrap_err(), DropReason::SendFailed);
        }
        let (socket, _lease) =
            ports.open(now, a, &[elsewhere, "127.0.0.9".parse().unwrap()]).unwrap();
        assert_eq!(socket.local_address().unwrap().ip().to_string(), "127.0.0.9");
    }

    #[test]
    fn an_exhausted_source_is_not_asked_again_for_a_while() {
        let (_sockets, [a]) = backends();
        let mut ports = Ports::default();
        let now = Instant::now();
        let source: IpAddr = "127.0.0.3".parse().unwrap();
        let index = ports.source(source);
        ports.sources[index].exhausted_until = Some(now + EXHAUSTED);
        let next: IpAddr = "127.0.0.4".parse().unwrap();
        assert_eq!(ports.open(now, a, &[source]).unwrap_err(), DropReason::PortsExhausted);
        assert!(ports.open(now, a, &[source, next]).is_ok());
        assert!(ports.open(now + EXHAUSTED, a, &[source]).is_ok());
    }
}
