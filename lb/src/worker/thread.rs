//! The thread of a worker: its descriptors, its listeners, its report that it is ready, and that it goes on after
//! a panic.

#![expect(
    clippy::disallowed_methods,
    reason = "the shell around a worker: it says when a panic was"
)]

use std::{
    io,
    os::fd::OwnedFd,
    sync::{atomic::Ordering::Relaxed, mpsc},
    thread,
    time::{Duration, Instant, SystemTime},
};

use quic_lb_config::system_error::{reason, why_not_listening};
use tracing::{error, warn};

use super::{
    panics::{self, Panic, Told},
    round::Datapath,
    setup::{Setup, Sockets, Source},
    succession::Inheritance,
};
use crate::{
    client_path::ListenerAddr,
    socket::{self, Channel, Execution, Socket},
};

/// Descriptors of a worker that are not flows: standard streams, the poller, the short-lived
/// sockets that source addresses are found with; listeners come on top.
const SPARE_DESCRIPTORS: usize = 16;

/// The standard streams, the poller and the way that orders come by.
const FEWEST_DESCRIPTORS: usize = 5;

/// The longest that a worker which pauses does not look whether it is to end.
const NAP: Duration = Duration::from_millis(50);

/// Why the workers could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A listener could not be opened.
    #[error("cannot listen on {address}: {}", why_not_listening(error))]
    Listen {
        /// Its address.
        address: ListenerAddr,
        /// What the kernel said.
        error: io::Error,
    },
    /// A socket that was to be taken over cannot be.
    #[error("cannot take over the socket of a listener: {}", reason(.0))]
    Inherit(io::Error),
    /// There is no way to order workers something.
    #[error("cannot make channels to workers: {}", reason(.0))]
    Orders(io::Error),
    /// What the process before this one hands over cannot be taken over.
    #[error("cannot take over from the process before: {}", reason(.0))]
    Predecessor(io::Error),
    /// There is not one socket for each worker.
    #[error(
        "the sockets of a listener to take over are not one for each worker: {sockets} for {workers}"
    )]
    Inherited {
        /// Sockets of the listener.
        sockets: usize,
        /// Workers.
        workers: usize,
    },
    /// The poller could not be made.
    #[error("cannot wait for datagrams: {}", reason(.0))]
    Poll(io::Error),
    /// The limit on descriptors could not be read.
    #[error("cannot read the limit on descriptors: {}", reason(.0))]
    Descriptors(io::Error),
    /// A thread could not be started.
    #[error("cannot start a worker thread: {}", reason(.0))]
    Thread(io::Error),
    /// A worker ended before it was ready.
    #[error("a worker ended before it was ready")]
    Ended,
}

/// What a worker reports when its listeners are open.
pub(super) struct Readiness {
    pub(super) addresses: Vec<ListenerAddr>,
    pub(super) flow_capacity: usize,
}

pub(super) type Report = Result<Readiness, StartError>;

impl Setup {
    /// The life of the thread.
    pub(super) fn run(self, report: &mpsc::Sender<Report>) -> io::Result<()> {
        let opened = self.open();
        // Nobody listens any more when another worker has failed to start.
        match opened {
            Ok((datapath, ready)) => {
                if self.confined
                    && let Err(error) = socket::confine_thread(Execution::GivenUp, &[])
                {
                    warn!(%error, "a worker keeps rights that it does not need");
                }
                let _ = report.send(Ok(ready));
                if self.takes_over() && !datapath.wait_to_begin() {
                    return Ok(());
                }
                self.work(datapath)
            }
            Err(error) => {
                let _ = report.send(Err(error));
                Ok(())
            }
        }
    }

    /// Runs until the worker is to end. After each panic it begins anew.
    fn work(&self, mut datapath: Datapath) -> io::Result<()> {
        loop {
            let told = match panics::caught(|| datapath.run()) {
                Ok(ended) => return ended,
                Err(told) => told,
            };
            let pause = self.tell(&datapath, told);
            datapath = datapath.anew(self)?;
            self.pause(pause);
        }
    }

    /// Tells of a panic; says how long to wait after it.
    fn tell(&self, datapath: &Datapath, told: Told) -> Duration {
        let worker = self.worker;
        let flows = self.counters.on_panic();
        let suspect = panics::caught(|| datapath.suspect()).unwrap_or_default();
        let Told { message, place } = told.clone();
        let panic = Panic { time: SystemTime::now(), worker, told, flows, suspect };
        let pause = self.panics.add(Instant::now(), panic);
        error!(worker, message, place, flows, ?pause, "a worker has panicked and begins anew");
        pause
    }

    fn pause(&self, pause: Duration) {
        let until = Instant::now() + pause;
        while !self.stop.load(Relaxed) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            thread::sleep(left.min(NAP));
        }
    }

    fn takes_over(&self) -> bool {
        matches!(self.sockets, Sockets::Predecessor(..))
    }

    fn open(&self) -> Result<(Datapath, Readiness), StartError> {
        let mut lent = vec![self.orders];
        match &self.sockets {
            Sockets::Listeners(sources) => lent.extend(sources.iter().filter_map(Source::lent)),
            Sockets::Predecessor(predecessor, _) => lent.push(*predecessor),
        }
        let table = socket::unshare_descriptors(&lent).map_err(StartError::Inherit)?;
        // Where it is forbidden, the workers share one table, and its limit.
        let tables = if table.is_own { 1 } else { self.siblings };
        let listeners = match &self.sockets {
            Sockets::Listeners(sources) => sources.len(),
            Sockets::Predecessor(_, listeners) => *listeners,
        };
        let spare = SPARE_DESCRIPTORS + listeners;
        let max_flows = self.flows.min((self.descriptors / tables).saturating_sub(spare));
        let mut inherited = table.inherited.into_iter();
        let mut next = || inherited.next().expect("each that was lent was taken over");
        let orders = Channel::from(next());
        let mut datapath = match &self.sockets {
            Sockets::Listeners(sources) => {
                let sockets = open_listeners(sources, next)?;
                Datapath::new(self, orders, sockets, max_flows).map_err(StartError::Poll)?
            }
            Sockets::Predecessor(..) => {
                let inheritance = Inheritance::receive(next());
                let inheritance = inheritance.map_err(StartError::Predecessor)?;
                let taken = Datapath::succeeding(self, orders, inheritance, max_flows);
                taken.map_err(StartError::Predecessor)?
            }
        };
        // Where the table is not its own, what others have is not.
        let counted = if table.is_own { socket::open_descriptors() } else { None };
        datapath.set_descriptors(counted.unwrap_or(FEWEST_DESCRIPTORS) as u64);
        self.counters.descriptor_limit.set(self.descriptors as u64);
        let addresses = datapath.local_addresses().map_err(StartError::Inherit)?;
        Ok((datapath, Readiness { addresses, flow_capacity: max_flows }))
    }
}

/// The sockets of listeners; `next` is the next one of those that were lent.
fn open_listeners(
    sources: &[Source],
    mut next: impl FnMut() -> OwnedFd,
) -> Result<Vec<Socket>, StartError> {
    let open = |source: &Source| match *source {
        Source::Bind(address, families, sharing) => {
            let socket = Socket::listener_of(address.0, families, sharing);
            socket.map_err(|error| StartError::Listen { address, error })
        }
        Source::Inherit(_) => Socket::inherited(next()).map_err(StartError::Inherit),
    };
    sources.iter().map(open).collect()
}
