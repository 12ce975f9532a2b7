//! The simulator: any number of nodes and the network between them in one process, on virtual
//! time, decided by one number.
//!
//! A [`World`] holds [`Node`]s with addresses. A node that stands behind an [`Access`] sends and
//! receives through its two links, and through a NAT if it has one; all others are joined without
//! delay. Nothing here reads a clock or draws entropy: the same seed gives the same run, octet by
//! octet, and a run that fails prints the command that replays it ([`for_seeds`]).
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`link`] | delay, rate, queue, loss, reordering, duplication, corruption, marks, blackouts |
//! | [`host`] | a node that is an endpoint of ours with an application |
//! | [`balancer`] | a node that is the balancer's own forwarder |
//! | [`fleet`] | servers behind it: addresses, server IDs, configurations |
//! | [`splitter`] | several balancers behind one address |
//! | [`files`] | the applications: a server of files and clients that fetch and check them |
//! | [`crypto`] | TLS with seeded randomness |
//! | [`rng`] | the randomness of the network |

pub mod balancer;
pub mod crypto;
pub mod files;
pub mod fleet;
pub mod host;
pub mod link;
pub mod rng;
pub mod splitter;

use std::{
    any::Any,
    collections::{BTreeMap, BinaryHeap},
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant, SystemTime},
};

use quic::transport::Ecn;

use self::{
    link::{Link, LinkConfig},
    rng::Rng,
};

/// A datagram under way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// The source.
    pub from: SocketAddr,
    /// The destination.
    pub to: SocketAddr,
    /// The ECN mark.
    pub ecn: Option<Ecn>,
    /// The payload.
    pub octets: Vec<u8>,
}

/// Something that has addresses.
pub trait Node: Any {
    /// Takes a datagram.
    fn handle(&mut self, now: Instant, packet: Packet);

    /// Does what is due and appends what it sends.
    fn drive(&mut self, now: Instant, out: &mut Vec<Packet>);

    /// When it has something to do.
    fn deadline(&mut self) -> Option<Instant>;
}

/// Which node of a world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeId(usize);

/// What a node behind a link, and perhaps a NAT, is connected by.
#[derive(Debug)]
pub struct Access {
    /// From the node.
    pub up: Link,
    /// To the node.
    pub down: Link,
    nat: Option<Nat>,
}

/// A NAT for one inside address. Bindings that were given up are forgotten at once.
#[derive(Debug)]
struct Nat {
    inside: Option<SocketAddr>,
    outside: SocketAddr,
    every: Option<Rebinding>,
}

/// When a NAT moves, and how.
#[derive(Clone, Copy, Debug)]
pub struct Rebinding {
    /// The first time.
    pub first: Duration,
    /// And then always again.
    pub every: Duration,
    /// To another address, not only to another port.
    pub address: bool,
}

/// All nodes and what is between them.
pub struct World {
    start: Instant,
    now: Duration,
    rng: Rng,
    nodes: Vec<Box<dyn Node>>,
    access: Vec<Option<Access>>,
    addresses: BTreeMap<SocketAddr, NodeId>,
    /// Nodes that have all ports of an address.
    hosts: BTreeMap<IpAddr, NodeId>,
    queue: BinaryHeap<Scheduled>,
    sequence: u64,
    next_outside: u16,
    watch: Option<Watch>,
    steps: u64,
}

/// Sees every datagram as it leaves a node.
type Watch = Box<dyn FnMut(Duration, &Packet)>;

#[derive(Debug)]
struct Scheduled {
    at: Duration,
    sequence: u64,
    what: What,
}

#[derive(Debug)]
enum What {
    Arrive(NodeId, Packet),
    Rebind(NodeId),
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.sequence) == (other.at, other.sequence)
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    /// The earliest is the greatest, for a heap that gives the greatest first.
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (other.at, other.sequence).cmp(&(self.at, self.sequence))
    }
}

/// More steps than any scenario takes: somebody sends without end.
const MAX_STEPS: u64 = 20_000_000;

impl World {
    /// An empty one.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            start: origin(),
            now: Duration::ZERO,
            rng: Rng::new(seed),
            nodes: Vec::new(),
            access: Vec::new(),
            addresses: BTreeMap::new(),
            hosts: BTreeMap::new(),
            queue: BinaryHeap::new(),
            sequence: 0,
            next_outside: 20_000,
            watch: None,
            steps: 0,
        }
    }

    /// Adds a node that is joined without delay.
    pub fn add(&mut self, addresses: &[SocketAddr], node: impl Node) -> NodeId {
        let id = NodeId(self.nodes.len());
        self.nodes.push(Box::new(node));
        self.access.push(None);
        for &address in addresses {
            self.addresses.insert(address, id);
        }
        id
    }

    /// Gives a node all ports of an address.
    pub fn give(&mut self, address: IpAddr, node: NodeId) {
        self.hosts.insert(address, node);
    }

    /// Adds a node behind links, and behind a NAT with `outside` as its first address if there is
    /// one.
    pub fn add_behind(
        &mut self,
        addresses: &[SocketAddr],
        node: impl Node,
        up: LinkConfig,
        down: LinkConfig,
        nat: Option<(SocketAddr, Option<Rebinding>)>,
    ) -> NodeId {
        let inside: &[SocketAddr] = if nat.is_some() { &[] } else { addresses };
        let id = self.add(inside, node);
        if let Some((outside, every)) = nat {
            self.addresses.insert(outside, id);
            if let Some(rebinding) = every {
                self.schedule(rebinding.first, What::Rebind(id));
            }
        }
        self.access[id.0] = Some(Access {
            up: Link::new(up),
            down: Link::new(down),
            nat: nat.map(|(outside, every)| Nat { inside: None, outside, every }),
        });
        id
    }

    /// Shows every datagram as it leaves a node (before the link), to `watch`.
    pub fn watch(&mut self, watch: impl FnMut(Duration, &Packet) + 'static) {
        self.watch = Some(Box::new(watch));
    }

    /// Runs until `done`, at most until `limit`. Returns whether it was done.
    pub fn run(&mut self, limit: Duration, mut done: impl FnMut(&mut Self) -> bool) -> bool {
        loop {
            self.drive_all();
            if done(self) {
                return true;
            }
            let Some(next) = self.next_time().filter(|&next| next <= limit) else { return false };
            self.now = self.now.max(next);
            self.steps += 1;
            assert!(self.steps < MAX_STEPS, "somebody keeps sending without end");
            while self.queue.peek().is_some_and(|scheduled| scheduled.at <= self.now) {
                let Some(scheduled) = self.queue.pop() else { break };
                match scheduled.what {
                    What::Arrive(node, packet) => self.deliver(node, packet),
                    What::Rebind(node) => self.rebind(node),
                }
            }
        }
    }

    /// Runs for `time`.
    pub fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        self.run(until, |_| false);
        self.now = until;
    }

    /// Time since the start.
    #[must_use]
    pub const fn elapsed(&self) -> Duration {
        self.now
    }

    /// The virtual instant.
    #[must_use]
    pub fn now(&self) -> Instant {
        self.start + self.now
    }

    /// A node, as what it is.
    ///
    /// # Panics
    ///
    /// When it is something else.
    pub fn node<T: Node>(&mut self, id: NodeId) -> &mut T {
        let node: &mut dyn Any = &mut *self.nodes[id.0];
        node.downcast_mut().expect("a node of this type")
    }

    /// The links of a node.
    ///
    /// # Panics
    ///
    /// When it has none.
    pub fn access(&mut self, id: NodeId) -> &mut Access {
        self.access[id.0].as_mut().expect("a node behind links")
    }

    /// Gives the NAT of a node a new outside address: another port, and with `address` another
    /// host too.
    pub fn rebind_nat(&mut self, id: NodeId, address: bool) {
        let Some(nat) = self.access[id.0].as_mut().and_then(|access| access.nat.as_mut()) else {
            return;
        };
        self.addresses.remove(&nat.outside);
        self.next_outside += 1;
        nat.outside.set_port(self.next_outside);
        if address {
            let ip = match nat.outside.ip() {
                IpAddr::V4(ip) => {
                    std::net::Ipv4Addr::from_bits(u32::from(ip).wrapping_add(256)).into()
                }
                IpAddr::V6(ip) => {
                    std::net::Ipv6Addr::from_bits(u128::from(ip).wrapping_add(1 << 64)).into()
                }
            };
            nat.outside.set_ip(ip);
        }
        self.addresses.insert(nat.outside, id);
    }

    fn rebind(&mut self, id: NodeId) {
        let nat = self.access[id.0].as_ref().and_then(|access| access.nat.as_ref());
        if let Some(rebinding) = nat.and_then(|nat| nat.every) {
            self.rebind_nat(id, rebinding.address);
            self.schedule(self.now + rebinding.every, What::Rebind(id));
        }
    }

    fn drive_all(&mut self) {
        let now = self.now();
        let mut out = Vec::new();
        for index in 0..self.nodes.len() {
            self.nodes[index].drive(now, &mut out);
            for packet in out.drain(..) {
                if let Some(watch) = &mut self.watch {
                    watch(self.now, &packet);
                }
                self.leave(index, packet);
            }
        }
    }

    /// A datagram leaves a node: through its NAT and its link.
    fn leave(&mut self, from: usize, mut packet: Packet) {
        let mut arrivals = Vec::new();
        if let Some(access) = &mut self.access[from] {
            if let Some(nat) = &mut access.nat {
                nat.inside = Some(packet.from);
                packet.from = nat.outside;
            }
            access.up.send(self.now, packet, &mut self.rng, &mut arrivals);
        } else {
            arrivals.push((self.now, packet));
        }
        for (at, packet) in arrivals {
            self.towards(at, packet);
        }
    }

    /// A datagram goes on to its destination, through the link and NAT of that.
    fn towards(&mut self, at: Duration, mut packet: Packet) {
        let host = || self.hosts.get(&packet.to.ip());
        let Some(&node) = self.addresses.get(&packet.to).or_else(host) else { return };
        let mut arrivals = Vec::new();
        if let Some(access) = &mut self.access[node.0] {
            if let Some(nat) = &access.nat {
                let Some(inside) = nat.inside else { return };
                packet.to = inside;
            }
            access.down.send(at, packet, &mut self.rng, &mut arrivals);
        } else {
            arrivals.push((at, packet));
        }
        for (at, packet) in arrivals {
            self.schedule(at, What::Arrive(node, packet));
        }
    }

    fn deliver(&mut self, node: NodeId, packet: Packet) {
        let now = self.now();
        self.nodes[node.0].handle(now, packet);
        // What a node does must not depend on what else arrives at the same instant.
        let mut out = Vec::new();
        self.nodes[node.0].drive(now, &mut out);
        for packet in out {
            if let Some(watch) = &mut self.watch {
                watch(self.now, &packet);
            }
            self.leave(node.0, packet);
        }
    }

    fn schedule(&mut self, at: Duration, what: What) {
        self.sequence += 1;
        self.queue.push(Scheduled { at, sequence: self.sequence, what });
    }

    fn next_time(&mut self) -> Option<Duration> {
        let deadlines = self.nodes.iter_mut().filter_map(|node| node.deadline());
        let deadlines = deadlines.map(|at| at.saturating_duration_since(self.start));
        let queued = self.queue.peek().map(|scheduled| scheduled.at);
        deadlines.chain(queued).min()
    }
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World").field("now", &self.now).finish_non_exhaustive()
    }
}

/// The instant at which every simulation starts. Its value does not matter, only that all use one.
#[must_use]
pub fn origin() -> Instant {
    static ORIGIN: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    *ORIGIN.get_or_init(Instant::now)
}

/// The wall-clock time at [`origin`].
#[must_use]
pub fn wall() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

/// Runs a scenario for seeds 0, 1, 2, … as many as `QUIC_SIM_SEEDS` says, or `default`; or for
/// `QUIC_SIM_SEED` alone. A run that panics is followed by the command that repeats it.
///
/// # Panics
///
/// When the scenario does.
pub fn for_seeds(test: &str, default: u64, scenario: impl Fn(u64)) {
    let number = |name| std::env::var(name).ok().and_then(|text: String| text.parse().ok());
    let seeds = match number("QUIC_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("QUIC_SIM_SEEDS").unwrap_or(default),
    };
    for seed in seeds {
        let guard = Replay { test, seed };
        scenario(seed);
        std::mem::forget(guard);
    }
}

struct Replay<'a> {
    test: &'a str,
    seed: u64,
}

impl Drop for Replay<'_> {
    #[expect(clippy::print_stderr, reason = "this is what it is for")]
    fn drop(&mut self) {
        let Self { test, seed } = self;
        eprintln!("replay: QUIC_SIM_SEED={seed} cargo test -p quic-lb-tests {test}");
    }
}
