//! The load client: connections that make requests, change their ports and addresses, and believe
//! nothing.
//!
//! Every connection has a socket of its own, so that each can move by itself. First all of them
//! connect; then the clock starts. An answer counts once every octet of its body is verified, and a
//! connection's answers all have to come from the backend that gave the first one. With a rate,
//! requests are due at fixed times whatever became of those before (open loop), and latency counts
//! from when a request was due; without one, each connection makes its next request when it has
//! the answer.

mod client;
mod report;
mod schedule;
mod session;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use quic::{
    h3::ALPN,
    transport::{ClientConfig, TransportConfig},
};
use tokio::{
    sync::{Semaphore, watch},
    task::JoinSet,
};

pub use client::ClientView;
pub use report::{Latency, Report};
pub use session::{Answer, OpenError, RequestError, Session};

use crate::certificate::{CertificateError, Trust};
use report::Tally;
use schedule::Schedule;

/// Handshakes at once: more of them would time each other out.
const HANDSHAKES: usize = 64;

/// How long a handshake may take before another one is tried.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// What load to make.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the server is.
    pub target: SocketAddr,
    /// What it is called in its certificate.
    pub name: String,
    /// Whose certificates are believed.
    pub trust: Trust,
    /// Connections at once.
    pub connections: usize,
    /// Requests at once on each.
    pub concurrency: usize,
    /// Requests per second of all connections together; `None` for as many as are answered.
    pub rate: Option<f64>,
    /// Octets of the bodies to ask for, in turns.
    pub sizes: Vec<u64>,
    /// From one change of a connection's port to the next, with the same connection ID, as behind a
    /// NAT.
    pub rebind_every: Option<Duration>,
    /// From one migration of a connection to the next, with a fresh connection ID.
    pub migrate_every: Option<Duration>,
    /// How long a connection is used before another one takes its place.
    pub lifetime: Option<Duration>,
    /// How long to make requests.
    pub duration: Duration,
}

impl Options {
    /// One connection that asks for a kibioctet at a time, for ten seconds.
    #[must_use]
    pub fn new(target: SocketAddr, name: impl Into<String>, trust: Trust) -> Self {
        Self {
            target,
            name: name.into(),
            trust,
            connections: 1,
            concurrency: 1,
            rate: None,
            sizes: vec![1024],
            rebind_every: None,
            migrate_every: None,
            lifetime: None,
            duration: Duration::from_secs(10),
        }
    }
}

/// A load that is being made. Dropping it ends its connections.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    clients: JoinSet<()>,
}

/// What the connections have in common.
#[derive(Debug)]
struct Shared {
    options: Options,
    config: ClientConfig,
    /// Present from when all have connected.
    schedule: watch::Sender<Option<Arc<Schedule>>>,
    handshakes: Semaphore,
    tally: Tally,
    views: Vec<Mutex<ClientView>>,
}

impl Load {
    /// Starts making load. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// When a trusted certificate is of no use.
    pub fn start(options: Options) -> Result<Self, CertificateError> {
        let mut config = ClientConfig::new(Arc::new(options.trust.client(&[ALPN])?));
        config.transport = Arc::new(TransportConfig {
            handshake_timeout: HANDSHAKE_TIMEOUT,
            ..TransportConfig::default()
        });
        let count = options.connections.max(1);
        let shared = Arc::new(Shared {
            config,
            schedule: watch::Sender::new(None),
            handshakes: Semaphore::new(HANDSHAKES),
            tally: Tally::new(count),
            views: (0..count).map(|_| Mutex::default()).collect(),
            options,
        });
        let mut clients = JoinSet::new();
        for number in 0..count {
            clients.spawn(client::run(Arc::clone(&shared), number));
        }
        Ok(Self { shared, clients })
    }

    /// What was measured so far.
    #[must_use]
    pub fn report(&self) -> Report {
        let schedule = self.shared.schedule.borrow().clone();
        let elapsed = schedule.map_or(Duration::ZERO, |schedule| schedule.elapsed());
        let now = Instant::now();
        let silent = self.shared.views.iter().filter(|view| locked(view).is_silent(now)).count();
        Report { silent: silent as u64, ..self.shared.tally.report(elapsed) }
    }

    /// How the connections stand.
    #[must_use]
    pub fn clients(&self) -> Vec<ClientView> {
        self.shared.views.iter().map(|view| locked(view).clone()).collect()
    }

    /// Waits until the time is over and the last answers are in.
    pub async fn finish(mut self) -> Report {
        self.wait().await;
        self.report()
    }

    /// [`Self::finish`], for those who want to look on meanwhile.
    pub async fn wait(&mut self) {
        while self.clients.join_next().await.is_some() {}
    }

    /// Ends it before its time.
    pub fn stop(&self) {
        // In this order: whoever makes the schedule looks whether it is still wanted.
        self.shared.tally.stop();
        if let Some(schedule) = &*self.shared.schedule.borrow() {
            schedule.end();
        }
    }
}

impl Shared {
    /// Takes note that one more connection has connected for the first time, or failed to.
    fn on_first_attempt(&self) {
        if self.tally.on_first_attempt() {
            let Options { rate, duration, .. } = self.options;
            let schedule = Schedule::new(Instant::now(), duration, rate);
            if self.tally.is_stopped() {
                schedule.end();
            }
            self.schedule.send_replace(Some(Arc::new(schedule)));
        }
    }

    /// Any port of an address that reaches the target.
    fn local(&self) -> SocketAddr {
        let target = self.options.target;
        let ip = match target.ip() {
            // Other machines cannot be reached from loopback, nor loopback from elsewhere.
            ip if ip.is_loopback() => ip,
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        SocketAddr::new(ip, 0)
    }

    /// Any port of an address that a client has migrated to: on loopback another one each time,
    /// since all of 127.0.0.0/8 is this machine's.
    fn elsewhere(&self, number: usize, migrations: u64) -> SocketAddr {
        let here = self.local();
        if here.is_ipv4() && here.ip().is_loopback() {
            // No 0 and no 255, which would mean networks and all of them.
            let octet = |number: u64| u8::try_from(number % 254 + 1).unwrap_or(1);
            let ip = Ipv4Addr::new(127, 0, octet(migrations + 1), octet(number as u64));
            return SocketAddr::new(ip.into(), 0);
        }
        here
    }

    fn see(&self, number: usize, change: impl FnOnce(&mut ClientView)) {
        if let Some(view) = self.views.get(number) {
            change(&mut locked(view));
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // What is behind these locks is figures, each of which is right by itself.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
