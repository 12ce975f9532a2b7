//! A node that is several balancers behind one address, as routers with equal-cost paths make them:
//! each client path goes to one of them, by a keyed hash, until the routers hash anew.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::{IpAddr, SocketAddr},
    time::Instant,
};

use super::{Node, Packet, balancer::Balancer};

/// The balancers, and how paths are spread over them.
#[derive(Debug)]
pub struct Splitter {
    front: SocketAddr,
    /// Each with the address that it speaks to servers from.
    balancers: Vec<(IpAddr, Balancer)>,
    key: u64,
    /// The balancers that take part.
    alive: Vec<usize>,
}

impl Splitter {
    /// In front of these, all of which listen on `front`.
    #[must_use]
    pub fn new(front: SocketAddr, balancers: Vec<(IpAddr, Balancer)>) -> Self {
        let alive = (0..balancers.len()).collect();
        Self { front, balancers, key: 0, alive }
    }

    /// Hashes anew: most paths go to another balancer from now on.
    pub const fn reshuffle(&mut self) {
        self.key += 1;
    }

    /// A balancer is no more; its paths go to the others.
    pub fn kill(&mut self, index: usize) {
        self.alive.retain(|&alive| alive != index);
    }

    /// The balancers.
    pub fn balancers(&mut self) -> impl Iterator<Item = &mut Balancer> {
        self.balancers.iter_mut().map(|(_, balancer)| balancer)
    }
}

impl Node for Splitter {
    fn handle(&mut self, now: Instant, packet: Packet) {
        let index = if packet.to == self.front {
            let mut hasher = DefaultHasher::new();
            (self.key, packet.from).hash(&mut hasher);
            let place = hasher.finish() % self.alive.len().max(1) as u64;
            usize::try_from(place).ok().and_then(|place| self.alive.get(place).copied())
        } else {
            let inside = packet.to.ip();
            let found = self.balancers.iter().position(|&(ip, _)| ip == inside);
            found.filter(|index| self.alive.contains(index))
        };
        if let Some(index) = index {
            self.balancers[index].1.handle(now, packet);
        }
    }

    fn drive(&mut self, now: Instant, out: &mut Vec<Packet>) {
        for (_, balancer) in &mut self.balancers {
            balancer.drive(now, out);
        }
    }

    fn deadline(&mut self) -> Option<Instant> {
        None
    }
}
