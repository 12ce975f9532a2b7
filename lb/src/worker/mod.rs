//! The threads that carry the datagrams: one per core, each with its own sockets on every
//! listener, its own flows and its own counters.
//!
//! ```text
//! listener ── receive a batch ──► decide ──► group by flow ──► one send per flow ──► backends
//! clients ◄── one send per batch ◄── note the answers ◄── receive from each ready flow ── backends
//! ```
//!
//! The kernel spreads client paths over the workers' sockets (SO_REUSEPORT), so that a client path
//! is always the same worker's and nothing has to be shared. A worker reads the routing snapshot
//! anew for each round, never waits for anyone else, and allocates nothing per datagram. One that panics
//! begins anew with the same listeners, and without its flows.
//!
//! | part | what it is for |
//! | --- | --- |
//! | `setup` | what a worker is started with |
//! | `thread` | the thread: descriptors, listeners, the report that it is ready |
//! | `round` | the loop of one worker |
//! | `burst` | what the forwarder is asked about at once |
//! | `forward` | from a listener to the backends |
//! | `back` | from the backends to the clients |
//! | `first_flights` | first flights that another backend may have to answer |
//! | `mailbox` | questions from outside, one a round |
//! | `panics` | what is kept of panics |
//! | `upstreams` | the socket of each flow |
//! | `succession` | the hand-over to a worker of another process |
//! | `orders` | what the process orders the workers |
//! | `ports` | the local ports that those have |
//! | `loops` | datagrams that come round again |
//! | `plan` | which datagrams may leave together |
//! | `replies` | what the balancer answers by itself |
//! | `transmit` | sending them, and what to do when the kernel refuses |

mod back;
mod burst;
mod first_flights;
mod forward;
mod loops;
pub(crate) mod mailbox;
pub(crate) mod orders;
pub(crate) mod panics;
mod plan;
mod port_range;
mod ports;
mod replies;
mod round;
mod setup;
mod succession;
#[cfg(test)]
mod tests;
mod thread;
mod transmit;
mod upstreams;

use std::{
    io,
    num::NonZeroUsize,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc,
    },
    thread::JoinHandle,
    time::Duration,
};

use arc_swap::ArcSwap;
use quic_lb_config::{Config, MAX_LISTENERS};

use crate::{
    client_path::ListenerAddr,
    connection_log::queue::Queues,
    counters::WorkerCounters,
    memory::Memory,
    routing::Routing,
    socket::{self, Channel, Lent, Sharing},
    totals::Totals,
};
use loops::UpstreamPorts;
use mailbox::Mailboxes;
use orders::Orders;
use panics::Panics;
use port_range::PortRange;
pub use setup::Listen;
use setup::{Setup, Sockets, Source};
use thread::Report;
pub use thread::StartError;

/// How long a worker may take to open its listeners.
const READY_WITHIN: Duration = Duration::from_secs(10);

/// Running workers.
#[derive(Debug)]
pub struct Workers {
    threads: Vec<JoinHandle<io::Result<()>>>,
    stop: Arc<AtomicBool>,
    totals: Totals,
    mailboxes: Mailboxes,
    orders: Arc<Orders>,
    panics: Arc<Panics>,
    records: Arc<Queues>,
    addresses: Vec<ListenerAddr>,
    flow_capacity: usize,
}

impl Workers {
    /// Starts the workers of `config` with the sockets of its `listeners`, which are in its order.
    /// When this returns, all listeners are open, and those that were inherited belong to the workers
    /// alone; if they are to be `confined`, the workers have given up what they do not need any more.
    ///
    /// # Errors
    ///
    /// [`StartError`]; no worker is left behind.
    pub fn start(
        config: &Config,
        listeners: Vec<Listen>,
        routing: Arc<ArcSwap<Routing>>,
        memory: Arc<Memory>,
        confined: bool,
    ) -> Result<Self, StartError> {
        let count = worker_count(config);
        for listener in &listeners {
            if let Listen::Inherit(sockets) = listener
                && sockets.len() != count
            {
                return Err(StartError::Inherited { sockets: sockets.len(), workers: count });
            }
        }
        let (mut workers, ends) = Self::none(config, count)?;
        let spawner = Spawner::new(config, routing, memory, confined, count)?;
        for (at, end) in ends.iter().enumerate() {
            // The first worker takes the addresses, and finds out which ports stand for 0; the
            // others join it.
            let sharing = if at == 0 { Sharing::First } else { Sharing::Join };
            let source = |(listener, &address)| match listener {
                &Listen::Bind(first, families) if at == 0 => Source::Bind(first, families, sharing),
                &Listen::Bind(_, families) => Source::Bind(address, families, sharing),
                Listen::Inherit(sockets) => Source::Inherit(Lent::new(&sockets[at])),
            };
            let sources = listeners.iter().zip(&workers.addresses).map(source).collect();
            workers.spawn(&spawner, at, Sockets::Listeners(sources), Lent::new(end))?;
            if at == 0 {
                workers.take(&spawner.reports)?;
            }
        }
        for _ in 1..count {
            workers.take(&spawner.reports)?;
        }
        Ok(workers)
    }

    /// Starts one worker for each of those of the process before this one, which are going to hand over by `predecessors`.
    pub(crate) fn succeed(
        config: &Config,
        predecessors: Vec<OwnedFd>,
        routing: Arc<ArcSwap<Routing>>,
        memory: Arc<Memory>,
        confined: bool,
    ) -> Result<Successors, StartError> {
        let predecessors = Predecessors(predecessors.into_iter().map(Channel::from).collect());
        let count = predecessors.0.len();
        let (mut workers, ends) = Self::none(config, count)?;
        let spawner = Spawner::new(config, routing, memory, confined, count)?;
        for (at, (end, predecessor)) in ends.iter().zip(&predecessors.0).enumerate() {
            let sockets = Sockets::Predecessor(Lent::new(predecessor), config.listeners.len());
            workers.spawn(&spawner, at, sockets, Lent::new(end))?;
        }
        let reports = spawner.reports;
        Ok(Successors { _predecessors: predecessors, workers, reports, _ends: ends })
    }

    /// None of so many, and where each is to get its orders.
    fn none(config: &Config, count: usize) -> Result<(Self, Vec<OwnedFd>), StartError> {
        let (orders, ends) = Orders::new(count).map_err(StartError::Orders)?;
        let addresses = config.listeners.iter().map(|listener| ListenerAddr(listener.address));
        let workers = Self {
            threads: Vec::new(),
            stop: Arc::default(),
            totals: Totals::default(),
            mailboxes: Mailboxes::new(count),
            orders: Arc::new(orders),
            panics: Arc::new(Panics::new(count)),
            records: Arc::new(Queues::new(count)),
            addresses: addresses.collect(),
            flow_capacity: 0,
        };
        Ok((workers, ends))
    }

    /// Starts one. What is lent has to stay open until it has reported.
    fn spawn(
        &mut self,
        spawner: &Spawner<'_>,
        at: usize,
        sockets: Sockets,
        orders: Lent,
    ) -> Result<(), StartError> {
        let Spawner { config, count, .. } = *spawner;
        let counters = Arc::new(WorkerCounters::new(MAX_LISTENERS));
        let setup = Setup {
            worker: at,
            sockets,
            orders,
            flows: config.limits.flows.get().div_ceil(count),
            descriptors: spawner.descriptors,
            siblings: count,
            ports: spawner.ports.share(at, count).map_err(StartError::Poll)?,
            stop: Arc::clone(&self.stop),
            routing: Arc::clone(&spawner.routing),
            memory: Arc::clone(&spawner.memory),
            counters: Arc::clone(&counters),
            mailbox: self.mailboxes.of(at),
            confined: spawner.confined,
            upstream_ports: Arc::clone(&spawner.upstream_ports),
            records: self.records.of(at),
            panics: Arc::clone(&self.panics),
        };
        let report = spawner.report.clone();
        let thread = std::thread::Builder::new()
            .name(format!("worker-{at}"))
            .spawn(move || setup.run(&report))
            .map_err(StartError::Thread)?;
        self.threads.push(thread);
        self.totals.add(counters);
        Ok(())
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    /// What they count, added up.
    #[must_use]
    pub const fn totals(&self) -> &Totals {
        &self.totals
    }

    /// What is known of their panics.
    pub(crate) const fn panics(&self) -> &Arc<Panics> {
        &self.panics
    }

    /// What they leave for the connection log.
    pub(crate) const fn records(&self) -> &Arc<Queues> {
        &self.records
    }

    /// The way to order them something.
    pub(crate) const fn orders(&self) -> &Arc<Orders> {
        &self.orders
    }

    /// The way to ask them something.
    pub(crate) const fn mailboxes(&self) -> &Mailboxes {
        &self.mailboxes
    }

    /// Where the listeners listen, in the order of the configuration.
    #[must_use]
    pub fn local_addresses(&self) -> &[ListenerAddr] {
        &self.addresses
    }

    /// How many flows there can be: fewer than configured when there are not enough descriptors.
    #[must_use]
    pub const fn flow_capacity(&self) -> usize {
        self.flow_capacity
    }

    /// Why a worker has ended, which none should before [`Workers::stop`].
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        let ended = |thread: &&JoinHandle<_>| thread.is_finished();
        let name = |thread: &JoinHandle<_>| thread.thread().name().unwrap_or("worker").to_owned();
        self.threads.iter().find(ended).map(|thread| format!("{} has ended", name(thread)))
    }

    /// Ends the workers and closes their sockets; says why one had ended before.
    pub fn stop(mut self) -> Option<String> {
        self.end()
    }

    fn take(&mut self, reports: &mpsc::Receiver<Report>) -> Result<(), StartError> {
        // A worker reports within microseconds; one that panics before never does.
        let report = reports.recv_timeout(READY_WITHIN);
        let ready = report.unwrap_or(Err(StartError::Ended))?;
        self.addresses = ready.addresses;
        self.flow_capacity += ready.flow_capacity;
        Ok(())
    }

    fn end(&mut self) -> Option<String> {
        self.stop.store(true, Relaxed);
        // Whoever has handed over waits for an order.
        self.orders.close();
        let mut failure = None;
        for thread in self.threads.drain(..) {
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => failure = Some(error.to_string()),
                Err(_) => failure = Some("a worker panicked".to_owned()),
            }
        }
        failure
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.end();
    }
}

/// How many workers there are to be.
pub(crate) fn worker_count(config: &Config) -> usize {
    let count = config.workers.or_else(|| std::thread::available_parallelism().ok());
    count.map_or(1, NonZeroUsize::get)
}

/// Workers that wait for those of the process before this one.
pub(crate) struct Successors {
    // In this order: whoever waits for a predecessor would not end.
    _predecessors: Predecessors,
    workers: Workers,
    reports: mpsc::Receiver<Report>,
    _ends: Vec<OwnedFd>,
}

/// The channels by which workers hand over. Nobody waits at them any more when they are dropped.
struct Predecessors(Vec<Channel>);

impl Successors {
    /// Waits until all have taken over. They begin when they are ordered to.
    pub(crate) fn taken_over(self) -> Result<Workers, StartError> {
        let Self { mut workers, reports, .. } = self;
        (0..workers.count()).try_for_each(|_| workers.take(&reports))?;
        Ok(workers)
    }
}

impl Drop for Predecessors {
    fn drop(&mut self) {
        self.0.iter().for_each(Channel::close);
    }
}

/// What all workers have in common when they are started.
struct Spawner<'a> {
    config: &'a Config,
    count: usize,
    routing: Arc<ArcSwap<Routing>>,
    memory: Arc<Memory>,
    confined: bool,
    descriptors: usize,
    ports: PortRange,
    upstream_ports: Arc<UpstreamPorts>,
    report: mpsc::Sender<Report>,
    reports: mpsc::Receiver<Report>,
}

impl<'a> Spawner<'a> {
    fn new(
        config: &'a Config,
        routing: Arc<ArcSwap<Routing>>,
        memory: Arc<Memory>,
        confined: bool,
        count: usize,
    ) -> Result<Self, StartError> {
        let descriptors = socket::raise_descriptor_limit().map_err(StartError::Descriptors)?;
        panics::tell_by_catching();
        let (report, reports) = mpsc::channel();
        Ok(Self {
            config,
            count,
            routing,
            memory,
            confined,
            descriptors: usize::try_from(descriptors).unwrap_or(usize::MAX),
            ports: PortRange::of_the_system(),
            upstream_ports: Arc::default(),
            report,
            reports,
        })
    }
}
