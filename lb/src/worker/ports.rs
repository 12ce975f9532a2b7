//! Upstream sockets: one per flow, each with a local port that stands for its client path towards
//! its backend.
//!
//! Ports are scarce: one source address has about 28,000 by default. A port can serve any number
//! of backends at once, since the kernel tells connected sockets apart by all four parts of the
//! 4-tuple, so a port that this worker has is tried for other backends before a new one is taken.
//! What must never happen is two sockets with the same 4-tuple: the client of one would get what
//! was meant for the client of the other. Therefore
//!
//! - workers have ports of their own (`port_range`);
//! - a port is first bound exclusively, which fails if anybody else has it;
//! - only while one of our sockets holds it are further sockets bound beside that one;
//! - each pair of source address and backend keeps account of the ports it may use.
//!
//! A port that was given up rests: for as long as the backend may go on sending to it, and take it for the
//! path of a connection that it knows. Ports that the backend has not seen come first, then those that have rested
//! for [`PORT_REST`], the longest rested first. Where there are neither, the port that has rested longest is taken
//! all the same, but never for the connection that was the last to use it: its server would take the client's new
//! address for the old one, and validate nothing. Where none rests, another flow has to make room.

use std::{
    collections::VecDeque,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6},
    sync::Arc,
    time::{Duration, Instant},
};

use hashbrown::HashMap;
use serde::{Deserialize, Serialize};

use super::loops::UpstreamPorts;
use crate::{
    backend::BackendAddr,
    cid_tag::CidTag,
    refusal::Refusal,
    socket::{PortUse, Socket},
    succession::Offset,
    verdict::DropReason,
};

/// For how long a port rests: longer than servers go on sending to a client that has fallen silent, whose idle timeouts
/// are 30 seconds mostly.
const PORT_REST: Duration = Duration::from_secs(60);
/// For how long a source address without free ports is not asked for one again.
const EXHAUSTED: Duration = Duration::from_secs(1);
/// How many ports that turn out to be taken by somebody else are tried for one flow.
const ATTEMPTS: usize = 8;
/// How many ports that are in use already are passed over for one flow.
const STEPS: usize = 256;
/// How many resting ports are looked at for one that had another user.
const CANDIDATES: usize = 64;

/// The ports of one worker.
#[derive(Debug)]
pub(super) struct Ports {
    /// The ports that are in use, for all workers to see.
    in_use: Arc<UpstreamPorts>,
    /// Those that it may take.
    share: Vec<u16>,
    sources: Vec<Source>,
    pairs: Vec<Pair>,
    free_pairs: Vec<u32>,
    pair_of: HashMap<(usize, SocketAddr), u32, ahash::RandomState>,
    /// The source address that the kernel picked, by backend.
    picked: HashMap<SocketAddr, IpAddr, ahash::RandomState>,
    /// Where the search among several source addresses begins, so that they fill evenly.
    turn: usize,
}

/// Why there is no socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NotOpened {
    /// What becomes of datagrams that wanted it.
    pub(super) reason: DropReason,
    /// What the kernel said, if that is about the backend or the way to it.
    pub(super) refusal: Option<Refusal>,
}

/// A port towards a backend, to be handed back once the socket is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// How many ports of the share were looked at since it was begun with.
    walked: usize,
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
    /// Ports that this pair has given up, the one that has rested longest first.
    resting: VecDeque<Resting>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Resting<T = Instant> {
    port: u32,
    /// `None` if the pair has never used it.
    since: Option<T>,
    /// The connection that was the last to use it.
    cid: Option<CidTag>,
}

/// What a successor has to know of ports: which there were, and which rest. Leases keep their meaning.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct HandedPorts {
    sources: Vec<(IpAddr, Vec<u16>)>,
    /// `None` for numbers that nobody has.
    pairs: Vec<Option<HandedPair>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct HandedPair {
    source: u32,
    #[serde(with = "crate::zoned")]
    peer: SocketAddr,
    unseen: u32,
    resting: Vec<Resting<Offset>>,
}

impl Ports {
    /// Of `share`, none is taken yet. Those that are in use are `in_use`, for all workers to see.
    pub(super) fn new(share: Vec<u16>, in_use: Arc<UpstreamPorts>) -> Self {
        Self {
            in_use,
            share,
            sources: Vec::new(),
            pairs: Vec::new(),
            free_pairs: Vec::new(),
            pair_of: HashMap::default(),
            picked: HashMap::default(),
            turn: 0,
        }
    }

    /// For a successor. Of sockets that are about to be closed, `given_up` says which port they have, and who was the last to
    /// use it.
    #[expect(clippy::cast_possible_truncation, reason = "fewer than ports and descriptors")]
    pub(super) fn handed(
        &self,
        now: Instant,
        given_up: impl IntoIterator<Item = (Lease, Option<CidTag>)>,
    ) -> HandedPorts {
        let numbers = |source: &Source| source.ports.iter().map(|port| port.number).collect();
        let sources = self.sources.iter().map(|source| (source.address, numbers(source)));
        let offset = |moment| Offset::new(now, moment);
        let resting = |&Resting { port, since, cid }: &Resting| Resting {
            port,
            since: since.map(offset),
            cid,
        };
        let pair = |(index, pair): (u32, &Pair)| {
            let is_known = self.pair_of.get(&(pair.source, pair.peer)) == Some(&index);
            is_known.then(|| HandedPair {
                source: pair.source as u32,
                peer: pair.peer,
                unseen: pair.unseen as u32,
                resting: pair.resting.iter().map(resting).collect(),
            })
        };
        let mut pairs: Vec<_> = (0..).zip(&self.pairs).map(pair).collect();
        for (lease, cid) in given_up {
            if let Some(Some(pair)) = pairs.get_mut(lease.pair as usize) {
                pair.resting.push(Resting { port: lease.port, since: Some(offset(now)), cid });
            }
        }
        HandedPorts { sources: sources.collect(), pairs }
    }

    /// As a predecessor has handed them over: nobody uses any yet.
    pub(super) fn succeeding(
        now: Instant,
        handed: HandedPorts,
        share: Vec<u16>,
        in_use: Arc<UpstreamPorts>,
    ) -> Self {
        let HandedPorts { sources, pairs } = handed;
        let source = |(address, numbers): (IpAddr, Vec<u16>)| {
            let ports = numbers.into_iter().map(|number| Port { number, users: 0 }).collect();
            let source = Source {
                address,
                ports,
                index_of: HashMap::default(),
                walked: 0,
                exhausted_until: None,
            };
            source.without_users()
        };
        let mut after =
            Self { sources: sources.into_iter().map(source).collect(), ..Self::new(share, in_use) };
        for (index, handed) in (0..).zip(pairs) {
            let known = handed.and_then(|HandedPair { source, peer, unseen, resting }| {
                let source = source as usize;
                let ports = after.sources.get(source)?.ports.len();
                let resting = resting.into_iter().filter(|resting| (resting.port as usize) < ports);
                let resting = resting.map(|Resting { port, since, cid }| Resting {
                    port,
                    since: since.map(|since| since.from(now)),
                    cid,
                });
                let (unseen, resting) = ((unseen as usize).min(ports), resting.collect());
                Some(Pair { source, peer, users: 0, unseen, resting })
            });
            match known {
                Some(pair) => {
                    after.pair_of.insert((pair.source, pair.peer), index);
                    after.pairs.push(pair);
                }
                None => {
                    after.free_pairs.push(index);
                    after.pairs.push(Pair::nobodys());
                }
            }
        }
        after
    }

    /// Goes on with a port that a predecessor's socket has; says whom it is towards. `None` when there is no such port.
    pub(super) fn take_over(&mut self, lease: Lease) -> Option<SocketAddr> {
        let pair = self.pairs.get_mut(lease.pair as usize)?;
        let source = self.sources.get_mut(pair.source)?;
        let port = source.ports.get_mut(lease.port as usize)?;
        port.users += 1;
        pair.users += 1;
        self.in_use.add(source.address, port.number);
        Some(pair.peer)
    }

    /// The ports of a worker that has lost its sockets, wherever it was amid its work: all that were in use are given up now.
    /// Of those, `leases` says who was the last to use them, as far as that is known.
    pub(super) fn after_loss(
        self,
        now: Instant,
        leases: impl IntoIterator<Item = (Lease, Option<CidTag>)>,
    ) -> Self {
        let Self { in_use, share, sources, pairs, pair_of, picked, turn, .. } = self;
        let mut cids: HashMap<_, _, ahash::RandomState> = HashMap::default();
        cids.extend(leases.into_iter().map(|(Lease { pair, port }, cid)| ((pair, port), cid)));
        for source in &sources {
            source.ports.iter().for_each(|port| in_use.remove(source.address, port.number));
        }
        let sources = sources.into_iter().map(Source::without_users).collect();
        let mut after = Self { sources, picked, turn, ..Self::new(share, in_use) };
        for (index, before) in (0..).zip(pairs) {
            // Numbers of pairs that have been forgotten mean nothing.
            if pair_of.get(&(before.source, before.peer)) == Some(&index) {
                let ports = after.sources.get(before.source).map_or(0, |source| source.ports.len());
                let cid = |port| cids.get(&(index, port)).copied().flatten();
                let pair = after.pair(before.source, before.peer);
                after.pairs[pair as usize] = before.without_users(now, ports, cid);
            }
        }
        after
    }

    /// Opens a socket to `peer` from one of `sources`, for a client that uses `cid`; from the address
    /// that the kernel picks if there are none.
    pub(super) fn open(
        &mut self,
        now: Instant,
        BackendAddr(peer): BackendAddr,
        sources: &[IpAddr],
        cid: Option<CidTag>,
    ) -> Result<(Socket, Lease), NotOpened> {
        if sources.is_empty() {
            let opened = self.open_from_picked(now, peer, cid);
            return opened.map_err(NotOpened::from);
        }
        self.turn = self.turn.wrapping_add(1);
        let mut refusal = NotOpened::from(io::Error::from_raw_os_error(libc::EADDRNOTAVAIL));
        for at in 0..sources.len() {
            let source = sources[self.turn.wrapping_add(at) % sources.len()];
            if source.is_ipv4() != peer.is_ipv4() {
                continue;
            }
            match self.open_from(now, source, peer, cid) {
                Ok(opened) => return Ok(opened),
                Err(error) => match NotOpened::from(error) {
                    none_left @ NotOpened { reason: DropReason::DescriptorLimit, .. } => {
                        return Err(none_left);
                    }
                    // Where ports are used up, other addresses that cannot be used are not the reason.
                    _ if refusal.reason == DropReason::PortsExhausted => {}
                    other => refusal = other,
                },
            }
        }
        Err(refusal)
    }

    /// Takes back the port of a socket that has been closed, which `cid` was the last to use.
    pub(super) fn release(&mut self, now: Instant, lease: Lease, cid: Option<CidTag>) {
        let pair = &mut self.pairs[lease.pair as usize];
        let source = &mut self.sources[pair.source];
        let port = &mut source.ports[lease.port as usize];
        port.users -= 1;
        if port.users == 0 {
            self.in_use.remove(source.address, port.number);
        }
        pair.resting.push_back(Resting { port: lease.port, since: Some(now), cid });
        pair.users -= 1;
    }

    /// Forgets pairs that are not in use, once all their ports have rested: backends come and go with
    /// the configuration.
    #[expect(clippy::disallowed_methods, reason = "which pairs go does not depend on the order")]
    pub(super) fn sweep(&mut self, now: Instant) {
        let Self { pairs, free_pairs, pair_of, .. } = self;
        pair_of.retain(|_, &mut index| {
            let pair = &mut pairs[index as usize];
            let has_rested = |last: &Resting| has_rested(now, last);
            let is_over = pair.users == 0 && pair.resting.back().is_none_or(has_rested);
            if is_over {
                pair.resting = VecDeque::new();
                free_pairs.push(index);
            }
            !is_over
        });
    }

    fn open_from_picked(
        &mut self,
        now: Instant,
        peer: SocketAddr,
        cid: Option<CidTag>,
    ) -> io::Result<(Socket, Lease)> {
        if let Some(&source) = self.picked.get(&peer) {
            let opened = self.open_from(now, source, peer, cid);
            let gone = |e: &io::Error| e.kind() == io::ErrorKind::AddrNotAvailable;
            if !opened.as_ref().is_err_and(gone) {
                return opened;
            }
        }
        let source = Socket::source_towards(peer)?;
        self.picked.insert(peer, source);
        self.open_from(now, source, peer, cid)
    }

    fn open_from(
        &mut self,
        now: Instant,
        source: IpAddr,
        peer: SocketAddr,
        cid: Option<CidTag>,
    ) -> io::Result<(Socket, Lease)> {
        if source.is_ipv4() != peer.is_ipv4() {
            return Err(io::Error::from_raw_os_error(libc::EADDRNOTAVAIL));
        }
        let source = self.source(source);
        let pair = self.pair(source, peer);
        let Self { in_use, share, sources, pairs, .. } = self;
        let source = &mut sources[source];
        let opened = source.open(now, share, &mut pairs[pair as usize], cid);
        opened.map(|(socket, port)| {
            in_use.add(source.address, source.ports[port as usize].number);
            (socket, Lease { pair, port })
        })
    }

    fn source(&mut self, address: IpAddr) -> usize {
        self.sources.iter().position(|source| source.address == address).unwrap_or_else(|| {
            self.sources.push(Source {
                address,
                ports: Vec::new(),
                index_of: HashMap::default(),
                walked: 0,
                exhausted_until: None,
            });
            self.sources.len() - 1
        })
    }

    #[expect(clippy::cast_possible_truncation, reason = "pairs are fewer than descriptors")]
    fn pair(&mut self, source: usize, peer: SocketAddr) -> u32 {
        let Self { pairs, free_pairs, .. } = self;
        *self.pair_of.entry((source, peer)).or_insert_with(|| {
            let pair = Pair { source, peer, users: 0, unseen: 0, resting: VecDeque::new() };
            if let Some(free) = free_pairs.pop() {
                pairs[free as usize] = pair;
                return free;
            }
            pairs.push(pair);
            (pairs.len() - 1) as u32
        })
    }
}

impl Pair {
    /// One that has a number and no meaning.
    fn nobodys() -> Self {
        let peer = (IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0).into();
        Self { source: 0, peer, users: 0, unseen: 0, resting: VecDeque::new() }
    }

    /// As it is when nobody uses it any more. The source has so many `ports`; `cid` says who was the last to use one.
    fn without_users(
        mut self,
        now: Instant,
        ports: usize,
        cid: impl Fn(u32) -> Option<CidTag>,
    ) -> Self {
        self.unseen = self.unseen.min(ports);
        let mut rests = vec![false; self.unseen];
        self.resting.retain(|resting| {
            let rests = rests.get_mut(resting.port as usize);
            rests.is_some_and(|rests| !std::mem::replace(rests, true))
        });
        let used = (0..).zip(rests).filter(|(_, rests)| !rests);
        let given_up = used.map(|(port, _)| Resting { port, since: Some(now), cid: cid(port) });
        self.resting.extend(given_up);
        Self { users: 0, ..self }
    }
}

impl Source {
    /// As it is when nobody uses it any more.
    fn without_users(self) -> Self {
        let Self { mut ports, .. } = self;
        ports.iter_mut().for_each(|port| port.users = 0);
        let index_of = (0..).zip(&ports).map(|(index, port)| (port.number, index)).collect();
        Self { ports, index_of, ..self }
    }

    #[expect(clippy::cast_possible_truncation, reason = "there are at most 65,536 ports")]
    fn open(
        &mut self,
        now: Instant,
        share: &[u16],
        pair: &mut Pair,
        cid: Option<CidTag>,
    ) -> io::Result<(Socket, u32)> {
        let mut attempts = ATTEMPTS;
        while pair.unseen < self.ports.len() && attempts > 0 {
            let index = pair.unseen as u32;
            let opened = self.open_known(pair, index)?;
            pair.unseen += 1;
            match opened {
                Some(socket) => return Ok((socket, index)),
                // Somebody else's now: another time.
                None => {
                    pair.resting.push_back(Resting { port: index, since: Some(now), cid: None });
                }
            }
            attempts -= 1;
        }
        match self.open_fresh(now, share, pair) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            opened => return opened,
        }
        for _ in 0..attempts.min(pair.resting.len()) {
            let rested = pair.resting.pop_front_if(|longest| has_rested(now, longest));
            let Some(rested) = rested.or_else(|| of_another(pair, cid)) else { break };
            match self.open_known(pair, rested.port) {
                Ok(Some(socket)) => return Ok((socket, rested.port)),
                Ok(None) => pair.resting.push_back(Resting { since: Some(now), ..rested }),
                Err(error) => {
                    pair.resting.push_front(rested);
                    return Err(error);
                }
            }
        }
        Err(io::ErrorKind::AddrInUse.into())
    }

    /// A port that this worker has had; `None` when it is somebody else's now.
    fn open_known(&mut self, pair: &mut Pair, index: u32) -> io::Result<Option<Socket>> {
        let port = &mut self.ports[index as usize];
        let port_use = if port.users > 0 { PortUse::Shared } else { PortUse::Exclusive };
        let local = local(self.address, port.number, pair.peer);
        match Socket::upstream(local, pair.peer, port_use) {
            Ok(socket) => {
                port.users += 1;
                pair.users += 1;
                Ok(Some(socket))
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A port of the share that this worker has not had.
    #[expect(clippy::cast_possible_truncation, reason = "there are at most 65,536 ports")]
    fn open_fresh(
        &mut self,
        now: Instant,
        share: &[u16],
        pair: &mut Pair,
    ) -> io::Result<(Socket, u32)> {
        let in_use = || io::Error::from(io::ErrorKind::AddrInUse);
        if self.exhausted_until.is_some_and(|until| now < until) {
            return Err(in_use());
        }
        let mut attempts = ATTEMPTS;
        for _ in 0..STEPS {
            let Some(&number) = share.get(self.walked) else {
                self.walked = 0;
                self.exhausted_until = Some(now + EXHAUSTED);
                return Err(in_use());
            };
            self.walked += 1;
            if self.index_of.contains_key(&number) {
                continue;
            }
            let local = local(self.address, number, pair.peer);
            match Socket::upstream(local, pair.peer, PortUse::Exclusive) {
                Ok(socket) => {
                    let index = self.ports.len() as u32;
                    self.ports.push(Port { number, users: 1 });
                    self.index_of.insert(number, index);
                    pair.users += 1;
                    for port in pair.unseen as u32..index {
                        pair.resting.push_front(Resting { port, since: None, cid: None });
                    }
                    pair.unseen = self.ports.len();
                    return Ok((socket, index));
                }
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => attempts -= 1,
                Err(error) => return Err(error),
            }
            if attempts == 0 {
                break;
            }
        }
        Err(in_use())
    }
}

fn has_rested(now: Instant, resting: &Resting) -> bool {
    resting.since.is_none_or(|since| now.saturating_duration_since(since) >= PORT_REST)
}

/// The port that has rested longest among those that another connection was the last to use.
fn of_another(pair: &mut Pair, cid: Option<CidTag>) -> Option<Resting> {
    let is_others = |resting: &Resting| resting.cid.is_none() || resting.cid != cid;
    let at = pair.resting.iter().take(CANDIDATES).position(is_others)?;
    pair.resting.remove(at)
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

impl From<io::Error> for NotOpened {
    fn from(error: io::Error) -> Self {
        let ours = |reason| Self { reason, refusal: None };
        match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE) => ours(DropReason::DescriptorLimit),
            _ if error.kind() == io::ErrorKind::AddrInUse => ours(DropReason::PortsExhausted),
            _ => Self { reason: DropReason::SendFailed, refusal: Some(Refusal::of(&error)) },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{HashMap, HashSet},
        net::UdpSocket,
    };

    use proptest::prelude::*;

    use super::{super::port_range::PortRange, *};

    fn backends<const N: usize>() -> ([UdpSocket; N], [BackendAddr; N]) {
        let sockets = std::array::from_fn(|_| UdpSocket::bind("127.0.0.1:0").unwrap());
        let addresses = std::array::from_fn(|n: usize| {
            let sockets: &[UdpSocket; N] = &sockets;
            BackendAddr(sockets[n].local_addr().unwrap())
        });
        (sockets, addresses)
    }

    const ANYONE: Option<CidTag> = None;

    /// Those of the only worker.
    fn ports() -> Ports {
        Ports::new(PortRange::of_the_system().share(0, 1).unwrap(), Arc::default())
    }

    #[test]
    fn a_port_is_used_for_every_backend_before_another_is_taken() {
        let (_sockets, [a, b, c]) = backends();
        let mut ports = ports();
        let now = Instant::now();
        let mut open = |peer| {
            let (socket, lease) = ports.open(now, peer, &[], ANYONE).unwrap();
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

    /// Sockets cross too: here they stay open.
    #[test]
    fn a_successor_knows_which_ports_are_in_use_and_which_rest() {
        let (_sockets, [a, b]) = backends();
        let (start, mut before) = (Instant::now(), ports());
        let open: Vec<_> = (0..4).map(|_| before.open(start, a, &[], ANYONE).unwrap()).collect();
        let (to_b, of_b) = before.open(start, b, &[], ANYONE).unwrap();
        let number = |socket: &Socket| socket.local_address().unwrap().port();
        let mut open = open.into_iter();
        let (closed, given_up) = open.next().unwrap();
        let (closing, about_to) = open.next().unwrap();
        let last = CidTag::new(b"the last");
        let resting = [number(&closed), number(&closing)];
        drop(closed);
        before.release(start, given_up, Some(last));

        let now = start + Duration::from_secs(1);
        let handed = before.handed(now, [(about_to, Some(last))]);
        drop(closing);
        let octets = postcard::to_stdvec(&handed).unwrap();
        let handed = postcard::from_bytes(&octets).unwrap();
        let later = now + Duration::from_secs(1_000);
        let share = PortRange::of_the_system().share(0, 1).unwrap();
        let in_use = Arc::new(UpstreamPorts::default());
        let mut after = Ports::succeeding(later, handed, share, Arc::clone(&in_use));
        let open: Vec<_> = open.collect();
        for (socket, lease) in &open {
            assert_eq!(after.take_over(*lease), Some(a.0));
            assert!(in_use.contains(socket.local_address().unwrap()));
        }
        assert_eq!(after.take_over(of_b), Some(b.0));
        assert!(after.take_over(Lease { pair: 77, ..of_b }).is_none());
        assert!(after.take_over(Lease { port: 77, ..of_b }).is_none());

        let taken: HashSet<_> = open.iter().map(|(socket, _)| number(socket)).collect();
        let (another, _) = after.open(later, a, &[], ANYONE).unwrap();
        assert!(!taken.contains(&number(&another)) && !resting.contains(&number(&another)));
        // A port of the one is good for the other, and those in use are tried beside their sockets.
        let (beside, _) = after.open(later, b, &[], ANYONE).unwrap();
        assert_ne!(number(&beside), number(&to_b));
        // When they have rested they are used again.
        let rested = later + PORT_REST;
        let mut seen = HashSet::new();
        for _ in 0..4 {
            let (socket, lease) = after.open(rested, a, &[], ANYONE).unwrap();
            seen.insert(number(&socket));
            std::mem::forget((socket, lease));
        }
        assert!(seen.is_disjoint(&taken), "{seen:?} {taken:?}");
    }

    #[test]
    fn no_two_sockets_share_a_4_tuple_over_many_openings_and_closings() {
        let (_sockets, peers) = backends::<3>();
        let sources: Vec<IpAddr> = vec!["127.0.0.1".parse().unwrap(), "127.0.0.2".parse().unwrap()];
        let range = PortRange::of_the_system();
        let mut workers =
            [0, 1].map(|worker| Ports::new(range.share(worker, 2).unwrap(), Arc::default()));
        let mut open: Vec<(usize, SocketAddr, BackendAddr, Socket, Lease)> = Vec::new();
        let mut now = Instant::now();
        let mut random = 1u64;
        for _ in 0..4_000 {
            now += Duration::from_millis(500);
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let dice = (random >> 33) as usize;
            if dice % 5 < 3 || open.is_empty() {
                let (worker, peer) = (dice / 8 % 2, peers[dice / 16 % 3]);
                let opened = workers[worker].open(now, peer, &sources, ANYONE);
                let (socket, lease) = opened.unwrap();
                let local = socket.local_address().unwrap();
                let twin = open.iter().find(|(_, l, p, ..)| (*l, *p) == (local, peer));
                assert!(twin.is_none(), "{local} -> {peer} twice");
                let stranger = open.iter().find(|(w, l, ..)| *w != worker && *l == local);
                assert!(stranger.is_none(), "{local} in two workers");
                open.push((worker, local, peer, socket, lease));
            } else {
                let (worker, .., socket, lease) = open.swap_remove(dice / 8 % open.len());
                drop(socket);
                workers[worker].release(now, lease, None);
            }
            if open.len() > 300 {
                for (worker, .., socket, lease) in open.drain(100..) {
                    drop(socket);
                    workers[worker].release(now, lease, None);
                }
            }
        }
        for (worker, .., socket, lease) in open {
            drop(socket);
            workers[worker].release(now, lease, None);
        }
        // What is not in use is forgotten when it has rested, and not before.
        workers.iter_mut().for_each(|ports| ports.sweep(now));
        assert!(workers.iter().all(|ports| !ports.pair_of.is_empty()));
        workers.iter_mut().for_each(|ports| ports.sweep(now + PORT_REST));
        assert!(workers.iter().all(|ports| ports.pair_of.is_empty()));
    }

    #[test]
    fn a_port_that_was_given_up_and_taken_by_a_stranger_is_left_alone() {
        let (_sockets, [a]) = backends();
        let mut ports = ports();
        // Two ports, so that the one given up is the only one that is left.
        ports.share.truncate(2);
        let now = Instant::now();
        let _keep = ports.open(now, a, &[], ANYONE).unwrap();
        let (socket, lease) = ports.open(now, a, &[], ANYONE).unwrap();
        let given_up = socket.local_address().unwrap();
        drop(socket);
        ports.release(now, lease, None);
        let stranger = UdpSocket::bind(given_up).unwrap();
        let later = now + PORT_REST;
        let none_left = ports.open(later, a, &[], ANYONE).unwrap_err();
        assert_eq!(none_left.reason, DropReason::PortsExhausted);
        drop(stranger);
        let (socket, _lease) = ports.open(later + PORT_REST, a, &[], ANYONE).unwrap();
        assert_eq!(socket.local_address().unwrap(), given_up);
    }

    /// What may happen to a port.
    #[derive(Clone, Debug)]
    enum Step {
        Open(u8),
        Close(u8),
        Later(u16),
        LoseAll,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0u8..6).prop_map(Step::Open),
            3 => any::<u8>().prop_map(Step::Close),
            1 => (0u16..90).prop_map(Step::Later),
            1 => Just(Step::LoseAll),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Over opening, idling, evicting, losing all and opening again: a backend sees no port again before it has
        /// rested, unless nothing else is left; and even then not with the connection that was the last to use it, which would be on a new path unnoticed. Of rested
        /// ports the longest rested is first, and nobody is refused while one has rested.
        #[test]
        fn a_port_rests_before_a_backend_sees_it_again(
            steps in prop::collection::vec(step(), 1..120)
        ) {
            let (_sockets, [a]) = backends();
            let mut ports = ports();
            ports.share.truncate(8);
            // One that other tests take no ports of meanwhile.
            let source: IpAddr = "127.0.77.1".parse().unwrap();
            let mut now = Instant::now();
            let mut open: Vec<(u16, Socket, Lease, Option<CidTag>)> = Vec::new();
            let mut given_up: HashMap<u16, (Instant, Option<CidTag>)> = HashMap::new();
            for step in steps {
                let has_rested = |(since, _): &(Instant, _)| now - *since >= PORT_REST;
                match step {
                    Step::Open(client) => {
                        let cid = (client > 0).then(|| CidTag::new(&[client; 8]));
                        let any_rested = given_up.values().any(has_rested);
                        let is_others = |(_, user): &(_, Option<CidTag>)| user.is_none() || *user != cid;
                        let any_of_others = given_up.values().any(is_others);
                        let Ok((socket, lease)) = ports.open(now, a, &[source], cid) else {
                            prop_assert!(!any_rested && !any_of_others, "there was one");
                            continue;
                        };
                        let port = socket.local_address().unwrap().port();
                        if let Some(before) = given_up.remove(&port) {
                            if !has_rested(&before) {
                                prop_assert!(!any_rested);
                                prop_assert!(before.1.is_none() || before.1 != cid);
                            }
                            let older = given_up.values().filter(|other| other.0 < before.0);
                            let others = older.filter(|other| has_rested(other));
                            prop_assert_eq!(others.count(), 0, "another has rested longer");
                        }
                        open.push((port, socket, lease, cid));
                    }
                    Step::Close(at) if !open.is_empty() => {
                        let at = usize::from(at) % open.len();
                        let (port, socket, lease, cid) = open.swap_remove(at);
                        drop(socket);
                        ports.release(now, lease, cid);
                        given_up.insert(port, (now, cid));
                    }
                    Step::Close(_) => {}
                    Step::LoseAll => {
                        let leases = open.drain(..).map(|(port, socket, lease, cid)| {
                            drop(socket);
                            given_up.insert(port, (now, cid));
                            (lease, cid)
                        });
                        let leases: Vec<_> = leases.collect();
                        ports = ports.after_loss(now, leases);
                    }
                    Step::Later(seconds) => {
                        now += Duration::from_secs(seconds.into());
                        let has_rested = |(since, _): &(Instant, _)| now - *since >= PORT_REST;
                        ports.sweep(now);
                        // Of a pair that is forgotten, all have rested.
                        if open.is_empty() && given_up.values().all(has_rested) {
                            given_up.clear();
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn ports_of_sockets_that_nobody_knows_of_any_more_rest_too() {
        let (_sockets, [a, b]) = backends();
        let mut ports = ports();
        ports.share.truncate(2);
        let now = Instant::now();
        let in_use = Arc::clone(&ports.in_use);
        let address = |socket: &Socket| socket.local_address().unwrap();
        let (known, lease) = ports.open(now, a, &[], ANYONE).unwrap();
        let (unknown, _) = ports.open(now, a, &[], ANYONE).unwrap();
        let (elsewhere, _) = ports.open(now, b, &[], ANYONE).unwrap();
        let [known_at, unknown_at] = [address(&known), address(&unknown)];
        assert!(in_use.contains(known_at) && in_use.contains(unknown_at));
        drop((known, unknown, elsewhere));
        let later = now + PORT_REST / 2;
        let cid = Some(CidTag::new(&[7; 8]));
        let mut ports = ports.after_loss(later, [(lease, cid)]);
        assert!(!in_use.contains(known_at) && !in_use.contains(unknown_at));
        let (fresh, _) = ports.open(later, b, &[], ANYONE).unwrap();
        assert_ne!(address(&fresh), known_at, "this one has the backend seen");
        let (first, _) = ports.open(later, a, &[], cid).unwrap();
        assert_eq!(address(&first), unknown_at, "the other one was used by the same connection");
        let refused = ports.open(later, a, &[], cid).unwrap_err();
        assert_eq!(refused.reason, DropReason::PortsExhausted);
        let (second, _) = ports.open(later + PORT_REST, a, &[], cid).unwrap();
        assert_eq!(address(&second), known_at);
        assert!(in_use.contains(known_at) && in_use.contains(unknown_at));
    }

    #[test]
    fn what_cannot_be_opened_is_refused_with_a_reason() {
        let (_sockets, [a]) = backends();
        let mut ports = ports();
        let now = Instant::now();
        let elsewhere: IpAddr = "192.0.2.1".parse().unwrap();
        let six: IpAddr = "::1".parse().unwrap();
        for sources in [vec![elsewhere], vec![six]] {
            let error = ports.open(now, a, &sources, ANYONE).unwrap_err();
            assert_eq!(error.reason, DropReason::SendFailed);
            assert_eq!(error.refusal, Some(Refusal::NoSourceAddress));
        }
        let (socket, _lease) =
            ports.open(now, a, &[elsewhere, "127.0.0.9".parse().unwrap()], ANYONE).unwrap();
        assert_eq!(socket.local_address().unwrap().ip().to_string(), "127.0.0.9");
    }

    #[test]
    fn an_exhausted_source_is_not_asked_again_for_a_while() {
        let (_sockets, [a]) = backends();
        let mut ports = ports();
        let now = Instant::now();
        let source: IpAddr = "127.0.0.3".parse().unwrap();
        let index = ports.source(source);
        ports.sources[index].exhausted_until = Some(now + EXHAUSTED);
        let next: IpAddr = "127.0.0.4".parse().unwrap();
        let none_left = NotOpened { reason: DropReason::PortsExhausted, refusal: None };
        assert_eq!(ports.open(now, a, &[source], ANYONE).unwrap_err(), none_left);
        assert!(ports.open(now, a, &[source, next], ANYONE).is_ok());
        assert!(ports.open(now + EXHAUSTED, a, &[source], ANYONE).is_ok());
    }
}
