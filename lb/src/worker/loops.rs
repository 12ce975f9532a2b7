//! Datagrams that come round again: where a backend's address leads back to the balancer, by way of
//! other balancers or directly.
//!
//! The hop limit ends such a circle. Until then each datagram in it would begin a flow with every
//! passage, since each passage comes from another port. So two things are looked at where a flow
//! begins, which no datagram of a flow that exists pays for: whether its client is a port of our
//! own, and whether the very same datagram has begun flows before with more hops left each time.
//! No sender of QUIC repeats a datagram octet by octet, much less from elsewhere.

use std::{
    array,
    net::{IpAddr, SocketAddr},
    sync::{
        OnceLock,
        atomic::{
            AtomicU64,
            Ordering::{Acquire, Release},
        },
    },
};

use crate::socket::HopLimit;

/// Datagrams that are remembered; a power of two. A newer one takes the place of an older one.
const PASSAGES: usize = 1_024;
/// With so many passages, each with fewer hops left than the one before, a datagram goes round. One
/// more than somebody brings about who copies what a client sends.
const DEPTH: u8 = 3;

/// Datagrams that began flows lately.
pub(super) struct Passages {
    hash: ahash::RandomState,
    last: Box<[Passage; PASSAGES]>,
}

#[derive(Clone, Copy)]
struct Passage {
    datagram: u64,
    hops: HopLimit,
    depth: u8,
}

impl Passages {
    /// Nobody outside should know the keys of `hash`.
    pub(super) fn new(hash: ahash::RandomState) -> Self {
        let none = Passage { datagram: 0, hops: HopLimit::new(0), depth: 0 };
        Self { hash, last: Box::new([none; PASSAGES]) }
    }

    /// Takes note of a datagram that begins a flow, and says whether it goes round.
    pub(super) fn go_round(&mut self, datagram: &[u8], hops: HopLimit) -> bool {
        let datagram = self.hash.hash_one(datagram);
        #[expect(clippy::cast_possible_truncation, reason = "the lower bits are what is wanted")]
        let last = &mut self.last[datagram as usize % PASSAGES];
        let again = last.depth > 0 && last.datagram == datagram;
        let depth = match again {
            true if hops < last.hops => last.depth.saturating_add(1),
            // The same one, by another way.
            true => return false,
            false => 1,
        };
        *last = Passage { datagram, hops, depth };
        depth >= DEPTH
    }
}

/// The ports that upstream sockets of all workers have, by source address. A worker changes those of
/// its own sockets, everybody reads all of them, and nobody waits.
#[derive(Debug, Default)]
pub(super) struct UpstreamPorts {
    first: Link,
}

/// Source addresses are few, and those of the configuration and of the kernel: one that has been
/// used stays.
type Link = OnceLock<Box<OfAddress>>;

#[derive(Debug)]
struct OfAddress {
    address: IpAddr,
    /// A bit for each port.
    ports: [AtomicU64; 1 << 10],
    next: Link,
}

impl UpstreamPorts {
    /// Says that a socket of ours has this address, and before it has sent anything.
    pub(super) fn add(&self, address: IpAddr, port: u16) {
        let (word, bit) = OfAddress::place(port);
        self.of(address).ports[word].fetch_or(bit, Release);
    }

    /// Says that no socket of ours has it any more.
    pub(super) fn remove(&self, address: IpAddr, port: u16) {
        let (word, bit) = OfAddress::place(port);
        self.of(address).ports[word].fetch_and(!bit, Release);
    }

    pub(super) fn contains(&self, address: SocketAddr) -> bool {
        let (word, bit) = OfAddress::place(address.port());
        let mut link = &self.first;
        while let Some(of) = link.get() {
            if of.address == address.ip() {
                return of.ports[word].load(Acquire) & bit != 0;
            }
            link = &of.next;
        }
        false
    }

    fn of(&self, address: IpAddr) -> &OfAddress {
        let mut link = &self.first;
        loop {
            let of = link.get_or_init(|| Box::new(OfAddress::new(address)));
            if of.address == address {
                return of;
            }
            link = &of.next;
        }
    }
}

impl OfAddress {
    fn new(address: IpAddr) -> Self {
        Self { address, ports: array::from_fn(|_| AtomicU64::new(0)), next: Link::new() }
    }

    /// The word and the bit that stand for a port.
    fn place(port: u16) -> (usize, u64) {
        (usize::from(port >> 6), 1 << (port & 63))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passages() -> Passages {
        Passages::new(ahash::RandomState::with_seeds(1, 2, 3, 4))
    }

    fn hops(hops: u8) -> HopLimit {
        HopLimit::new(hops)
    }

    #[test]
    fn a_datagram_that_comes_back_with_fewer_hops_each_time_goes_round() {
        let mut passages = passages();
        assert!(!passages.go_round(b"one", hops(64)));
        assert!(!passages.go_round(b"two", hops(64)));
        assert!(!passages.go_round(b"one", hops(62)));
        assert!(passages.go_round(b"one", hops(60)));
        assert!(passages.go_round(b"one", hops(58)), "and does so until it ends");
        assert!(!passages.go_round(b"two", hops(63)));
    }

    #[test]
    fn copies_that_come_by_several_ways_do_not() {
        let mut passages = passages();
        for left in [60, 60, 64, 61, 60, 59, 60, 59, 64] {
            assert!(!passages.go_round(b"one", hops(left)), "{left}");
        }
    }

    #[test]
    fn datagrams_that_differ_do_not_whatever_they_share() {
        let mut passages = passages();
        let token = [7; 1_000];
        for (number, left) in (0..200u8).zip((1..=64).rev().cycle()) {
            assert!(!passages.go_round(&[&token[..], &[number]].concat(), hops(left)));
        }
    }

    #[test]
    fn the_ports_of_each_address_are_its_own() {
        let ports = UpstreamPorts::default();
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        let (a, b) = (address("192.0.2.1"), address("2001:db8::1"));
        let contains = |address, port| ports.contains(SocketAddr::new(address, port));
        assert!(!contains(a, 0));
        for port in [0, 63, 64, 40_000, 65_535] {
            ports.add(a, port);
            assert!(contains(a, port) && !contains(b, port));
            ports.add(b, port);
            ports.remove(a, port);
            assert!(!contains(a, port) && contains(b, port));
        }
        assert!(!contains(b, 1) && !contains(b, 62) && !contains(b, 65_534));
    }
}
