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
//! anew for each round, never waits for anyone else, and allocates nothing per datagram.
//!
//! | part | what it is for |
//! | --- | --- |
//! | `round` | the loop of one worker |
//! | `ports` | upstream sockets and their ports |
//! | `plan` | which datagrams may leave together |
//! | `replies` | what the balancer answers by itself |
//! | `transmit` | sending them, and what to do when the kernel refuses |

mod plan;
mod ports;
mod replies;
mod round;
mod transmit;

use std::{
    fmt, io,
    net::SocketAddr,
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use arc_swap::ArcSwap;
use quic_lb_config::{Config, Timeouts};

use crate::{
    counters::WorkerCounters,
    flows::FlowLimits,
    memory::Memory,
    routing::Routing,
    socket::{self, Sharing, Socket},
    totals::Totals,
};
use round::Datapath;

/// Descriptors of a worker that are not flows: standard streams, the poller, the short-lived
/// sockets that source addresses are found with; listeners come on top.
const SPARE_DESCRIPTORS: usize = 16;

/// How long a worker may take to open its listeners.
const BIRTH: Duration = Duration::from_secs(10);

/// Running workers.
#[derive(Debug)]
pub struct Workers {
    threads: Vec<JoinHandle<io::Result<()>>>,
    shared: Arc<Shared>,
    totals: Totals,
    addresses: Vec<SocketAddr>,
    flow_capacity: usize,
}

impl Workers {
    /// Starts the workers of `config`. When this returns, all listeners are open.
    ///
    /// # Errors
    ///
    /// [`StartError`]; no worker is left behind.
    pub fn start(
        config: &Config,
        routing: Arc<ArcSwap<Routing>>,
        memory: Arc<Memory>,
    ) -> Result<Self, StartError> {
        let count = config.workers.or_else(|| thread::available_parallelism().ok());
        let count = count.map_or(1, NonZeroUsize::get);
        let mut workers = Self {
            threads: Vec::new(),
            shared: Arc::new(Shared::new(&config.timeouts)),
            totals: Totals::default(),
            addresses: config.listeners.iter().map(|listener| listener.address).collect(),
            flow_capacity: 0,
        };
        let descriptors = socket::raise_descriptor_limit().map_err(StartError::Descriptors)?;
        let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX);
        let (report, reports) = mpsc::channel();
        // The first worker takes the addresses, and finds out which ports stand for 0; the
        // others join it.
        for (at, sharing) in (0..count).map(|at| (at, sharing_of(at))) {
            let counters = Arc::new(WorkerCounters::new(config.listeners.len()));
            let birth = Birth {
                sharing,
                addresses: workers.addresses.clone(),
                flows: config.limits.flows.get().div_ceil(count),
                descriptors,
                siblings: count,
                shared: Arc::clone(&workers.shared),
                routing: Arc::clone(&routing),
                memory: Arc::clone(&memory),
                counters: Arc::clone(&counters),
            };
            let report = report.clone();
            let thread = thread::Builder::new()
                .name(format!("worker-{at}"))
                .spawn(move || birth.live(&report))
                .map_err(StartError::Thread)?;
            workers.threads.push(thread);
            workers.totals.add(counters);
            if sharing == Sharing::First {
                workers.take(&reports)?;
            }
        }
        for _ in 1..count {
            workers.take(&reports)?;
        }
        Ok(workers)
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

    /// Where the listeners listen, in the order of the configuration.
    #[must_use]
    pub fn local_addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// How many flows there can be: fewer than configured when there are not enough descriptors.
    #[must_use]
    pub const fn flow_capacity(&self) -> usize {
        self.flow_capacity
    }

    /// Changes how long flows live.
    pub fn set_timeouts(&self, timeouts: &Timeouts) {
        self.shared.set_timeouts(timeouts);
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
        let report = reports.recv_timeout(BIRTH);
        let ready = report.unwrap_or(Err(StartError::Ended))?;
        self.addresses = ready.addresses;
        self.flow_capacity += ready.flow_capacity;
        Ok(())
    }

    fn end(&mut self) -> Option<String> {
        self.shared.stop.store(true, Relaxed);
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

/// Why the workers could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A listener could not be opened.
    #[error("cannot listen on {address}: {}", Advice(error))]
    Listen {
        /// Its address.
        address: SocketAddr,
        /// What the kernel said.
        error: io::Error,
    },
    /// The poller could not be made.
    #[error("cannot wait for datagrams: {0}")]
    Poll(io::Error),
    /// The limit on descriptors could not be read.
    #[error("cannot read the limit on descriptors: {0}")]
    Descriptors(io::Error),
    /// A thread could not be started.
    #[error("cannot start a worker thread: {0}")]
    Thread(io::Error),
    /// A worker ended before it was ready.
    #[error("a worker ended before it was ready")]
    Ended,
}

/// What to do about an address that cannot be had.
struct Advice<'a>(&'a io::Error);

impl fmt::Display for Advice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0.kind() {
            io::ErrorKind::AddrInUse => {
                "the address is in use; stop the process that listens there, or change the \
                 listener's address"
            }
            io::ErrorKind::AddrNotAvailable => {
                "this host does not have the address; add it to an interface, or change the \
                 listener's address"
            }
            io::ErrorKind::PermissionDenied => {
                "permission denied; ports below 1024 need the capability CAP_NET_BIND_SERVICE"
            }
            _ => return self.0.fmt(f),
        })
    }
}

const fn sharing_of(worker: usize) -> Sharing {
    if worker == 0 { Sharing::First } else { Sharing::Join }
}

/// What the workers are told while they run.
#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    idle_ms: AtomicU64,
    unanswered_ms: AtomicU64,
}

impl Shared {
    fn new(timeouts: &Timeouts) -> Self {
        let (stop, idle_ms, unanswered_ms) = Default::default();
        let shared = Self { stop, idle_ms, unanswered_ms };
        shared.set_timeouts(timeouts);
        shared
    }

    fn set_timeouts(&self, timeouts: &Timeouts) {
        let milliseconds =
            |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        self.idle_ms.store(milliseconds(timeouts.flow_idle), Relaxed);
        self.unanswered_ms.store(milliseconds(timeouts.flow_unanswered), Relaxed);
    }

    fn limits(&self, max_flows: usize) -> FlowLimits {
        FlowLimits {
            max_flows,
            idle: Duration::from_millis(self.idle_ms.load(Relaxed)),
            unanswered: Duration::from_millis(self.unanswered_ms.load(Relaxed)),
        }
    }
}

/// What a worker reports when its listeners are open.
struct Readiness {
    addresses: Vec<SocketAddr>,
    flow_capacity: usize,
}

type Report = Result<Readiness, StartError>;

/// All that a worker is started with.
struct Birth {
    sharing: Sharing,
    addresses: Vec<SocketAddr>,
    flows: usize,
    descriptors: usize,
    siblings: usize,
    shared: Arc<Shared>,
    routing: Arc<ArcSwap<Routing>>,
    memory: Arc<Memory>,
    counters: Arc<WorkerCounters>,
}

impl Birth {
    fn live(self, report: &mpsc::Sender<Report>) -> io::Result<()> {
        // Where it is forbidden, the workers share one table, and its limit.
        let tables = if socket::unshare_descriptors().is_ok() { 1 } else { self.siblings };
        let spare = SPARE_DESCRIPTORS + self.addresses.len();
        let max_flows = self.flows.min((self.descriptors / tables).saturating_sub(spare));
        let opened = self.open().and_then(|(listeners, addresses)| {
            let datapath = Datapath::new(&self, listeners, max_flows).map_err(StartError::Poll)?;
            Ok((datapath, Readiness { addresses, flow_capacity: max_flows }))
        });
        // Nobody listens any more when another worker has failed to start.
        match opened {
            Ok((mut datapath, ready)) => {
                let _ = report.send(Ok(ready));
                datapath.run()
            }
            Err(error) => {
                let _ = report.send(Err(error));
                Ok(())
            }
        }
    }

    fn open(&self) -> Result<(Vec<Socket>, Vec<SocketAddr>), StartError> {
        let open = |&address: &SocketAddr| {
            let refused = |error| StartError::Listen { address, error };
            let socket = Socket::listener(address, self.sharing).map_err(refused)?;
            let address = socket.local_address().map_err(refused)?;
            Ok((socket, address))
        };
        self.addresses.iter().map(open).collect()
    }
}
