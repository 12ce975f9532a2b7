//! The control plane: the life of the process around the workers.
//!
//! [`run`] reads the configuration, starts the workers, and then looks after them on one thread of
//! its own: reloads, health, the admin interface, signals. It shares with the workers a routing
//! snapshot that it swaps, a memory that it sweeps and counters that it reads; it never waits for
//! them, nor they for it.

mod admin;
mod answers;
mod build;
mod explain;
mod health;
mod page;
mod plane;
mod restart;
mod shared;
mod systemd;
mod validation;
mod watch;

use std::{
    io,
    net::{SocketAddr, TcpListener},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use quic_lb_config::{
    Config, Loaded, Report,
    system_error::{reason, why_not_listening},
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    time::{self, MissedTickBehavior},
};
use tracing::{error, info, warn};

use crate::{
    logging::Logging,
    memory::Memory,
    routing::Lifetimes,
    worker::{Listen, StartError, Workers},
};
use plane::{ControlPlane, Stage};
use shared::Shared;

/// From one look at the health of backends and workers to the next.
const TICK: Duration = Duration::from_millis(200);

/// From one sweep of the memory to the next.
const SWEEP: Duration = Duration::from_secs(5);

/// Runs the balancer as the file at `path` says, until a signal ends it.
///
/// # Errors
///
/// [`RunError`], when it could not start or had to stop.
#[expect(clippy::disallowed_methods, reason = "the shell gives the state its time")]
pub fn run(path: &Path) -> Result<(), RunError> {
    let Loaded { config, warnings } = quic_lb_config::load(path).map_err(RunError::Config)?;
    let logging = Logging::start(&config.log);
    watch::log_mistakes(&warnings);
    // Everything that can fail is tried before the first datagram is taken.
    let admin = config.admin.map(bind_admin).transpose()?;

    let memory = Memory::new(config.limits.remembered.get(), Instant::now(), seed()?);
    let memory = Arc::new(memory);
    let mut plane = ControlPlane::new(config, Arc::clone(&memory), seed()?);
    let routing = Arc::clone(plane.routing());
    let listeners = Listen::at_addresses_of(plane.config());
    let workers = Workers::start(plane.config(), listeners, routing, Arc::clone(&memory))?;
    plane.set_workers(workers.count(), workers.totals().clone(), workers.flow_capacity());

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(RunError::Runtime)?;
    let outcome = runtime.block_on(look_after(path, plane, memory, &workers, admin, logging));
    // A configuration that is being read from a slow disk is not waited for.
    runtime.shutdown_background();
    match (outcome, workers.stop()) {
        (Err(RunError::WorkerEnded(worker)), Some(reason)) => {
            Err(RunError::WorkerEnded(format!("{worker}: {reason}")))
        }
        (outcome, _) => outcome,
    }
}

/// Why the balancer does not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration file has mistakes.
    #[error("{0}")]
    Config(Report),
    /// The admin address cannot be had.
    #[error("cannot listen on {address} for the admin interface: {}", why_not_listening(error))]
    Admin {
        /// The address.
        address: SocketAddr,
        /// Why.
        error: io::Error,
    },
    /// The workers cannot be started.
    #[error(transparent)]
    Workers(#[from] StartError),
    /// The control plane cannot be started.
    #[error("cannot start the control plane: {}", reason(.0))]
    Runtime(io::Error),
    /// A worker has ended by itself.
    #[error("{0}, which none should")]
    WorkerEnded(String),
}

#[expect(clippy::disallowed_methods, reason = "the shell gives the state its time")]
async fn look_after(
    path: &Path,
    plane: ControlPlane,
    memory: Arc<Memory>,
    workers: &Workers,
    admin: Option<TcpListener>,
    logging: Logging,
) -> Result<(), RunError> {
    let mut terminate = signals(SignalKind::terminate())?;
    let mut interrupt = signals(SignalKind::interrupt())?;
    let hangups = signals(SignalKind::hangup())?;
    announce(plane.config(), workers, admin.as_ref());
    let shared = Arc::new(Shared::new(plane, workers.mailboxes().clone()));
    if let Some(admin) = admin {
        tokio::spawn(admin::serve(admin, Arc::clone(&shared)));
    }
    tokio::spawn(build::build(Arc::clone(&shared)));
    tokio::spawn(watch::watch(path.to_owned(), Arc::clone(&shared), logging, hangups));
    systemd::ready();

    let mut ticks = time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut next_sweep = Instant::now() + SWEEP;
    let mut draining: Option<Instant> = None;
    loop {
        let asked_to_end = tokio::select! {
            _ = ticks.tick() => false,
            _ = terminate.recv() => true,
            _ = interrupt.recv() => true,
        };
        if asked_to_end {
            if draining.is_some() {
                return end("second signal");
            }
            draining = Some(begin_drain(&shared));
        }
        let now = Instant::now();
        let timeouts = shared.change(|plane| {
            plane.on_tick(now);
            plane.config().timeouts
        });
        if let Some(reason) = workers.failure() {
            shared.plane().set_stage(Stage::Broken);
            error!(reason, "a worker has ended by itself");
            return Err(RunError::WorkerEnded(reason));
        }
        if now >= next_sweep {
            next_sweep = now + SWEEP;
            sweep(&memory, now, Lifetimes::from(&timeouts));
        }
        if let Some(began) = draining {
            if shared.plane().flows() == 0 {
                return end("no flow is left");
            }
            if now.saturating_duration_since(began) >= timeouts.drain {
                return end("time to drain is over");
            }
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "the shell gives the state its time")]
fn begin_drain(shared: &Shared) -> Instant {
    systemd::stopping();
    let mut plane = shared.plane();
    plane.set_stage(Stage::Draining);
    let (flows, time_limit) = (plane.flows(), plane.config().timeouts.drain);
    info!(flows, patience = ?time_limit, "draining");
    Instant::now()
}

fn end(reason: &str) -> Result<(), RunError> {
    info!(reason, "ended");
    Ok(())
}

/// Two numbers that nobody outside can guess.
#[expect(clippy::disallowed_methods, reason = "the shell gives the state its seed")]
fn seed<const N: usize>() -> Result<[u64; N], RunError> {
    let mut seed = [0; N];
    for part in &mut seed {
        *part = getrandom::u64().map_err(|error| RunError::Runtime(io::Error::other(error)))?;
    }
    Ok(seed)
}

/// A full table takes tens of milliseconds, too long for the thread that answers scrapes.
fn sweep(memory: &Arc<Memory>, now: Instant, lifetimes: Lifetimes) {
    let memory = Arc::clone(memory);
    tokio::task::spawn_blocking(move || memory.sweep(now, &lifetimes));
}

fn signals(kind: SignalKind) -> Result<Signal, RunError> {
    signal(kind).map_err(RunError::Runtime)
}

fn bind_admin(address: SocketAddr) -> Result<TcpListener, RunError> {
    let listener = TcpListener::bind(address)
        .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
        .map_err(|error| RunError::Admin { address, error })?;
    if !address.ip().is_loopback() {
        warn!(%address, "the admin interface has no passwords and is not on loopback");
    }
    Ok(listener)
}

/// One record for each address, so that whoever starts the process can read where it listens.
fn announce(config: &Config, workers: &Workers, admin: Option<&TcpListener>) {
    for (listener, address) in config.listeners.iter().zip(workers.local_addresses()) {
        info!(listener = listener.name, %address, "listening");
    }
    if let Some(address) = admin.and_then(|admin| admin.local_addr().ok()) {
        info!(%address, "admin interface");
    }
    let (wanted, flows) = (config.limits.flows.get(), workers.flow_capacity());
    if flows < wanted {
        warn!(flows, wanted, "descriptors for fewer flows than limits.flows: raise LimitNOFILE");
    }
    let (version, digest) = (env!("CARGO_PKG_VERSION"), config.digest());
    info!(version, digest, workers = workers.count(), flows, "running");
}
