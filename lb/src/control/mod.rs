//! The control plane: the life of the process around the workers.
//!
//! [`run`] reads the configuration, starts the workers, and then looks after them on one thread of
//! its own: reloads, health, the admin interface, signals; active checks have another beside it. It shares with the workers a routing
//! snapshot that it swaps, a memory that it sweeps and counters that it reads; it never waits for
//! them, nor they for it.

mod activation;
mod admin;
mod agreement;
mod answers;
mod build;
pub(crate) mod changes;
mod checks;
mod commands;
mod connections;
mod doors;
mod explain;
mod guard;
mod gzip;
mod health;
mod listening;
mod page;
pub(crate) mod plane;
mod query;
mod reloads;
pub(crate) mod restart;
mod seen;
mod shared;
mod silence;
mod systemd;
mod upgrade;
mod validation;
mod watch;

use std::{
    env,
    fs::File,
    future, io, mem,
    net::SocketAddr,
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use quic_lb_config::{
    Admin, Config, ConnectionLog, Loaded, LogTarget, Report,
    system_error::{reason, why_not_listening},
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::{self, JoinHandle},
    time::{self, MissedTickBehavior},
};
use tracing::{debug, error, info, warn};

use crate::{
    connection_log::writer::Log,
    logging::Logging,
    memory::Memory,
    routing::Routing,
    socket::{self, Confined, Execution},
    worker::{StartError, Workers},
};
use checks::Checks;
use commands::{Commands, Keeper, kept_in};
use doors::{Access, Door, Handed, Place, Where};
use plane::{ControlPlane, Stage};
use shared::{Shared, Succeeded, UpgradeRequest};
use upgrade::{Binary, Predecessor, Upgrader};

/// From one look at the health of backends and workers to the next.
const TICK: Duration = Duration::from_millis(200);

/// From one sweep of the memory to the next.
const SWEEP: Duration = Duration::from_secs(5);

/// For answers that are under way when the process ends because another one has taken over.
const FAREWELL: Duration = Duration::from_millis(300);

/// Runs the balancer as the file at `path` says, until a signal ends it. If it is to be `confined`, it gives up all capabilities and
/// the right to change or execute files once its sockets are open, and leaves no core dumps.
///
/// # Errors
///
/// [`RunError`], when it could not start or had to stop.
pub fn run(path: &Path, confined: bool) -> Result<Ending, RunError> {
    let predecessor = Predecessor::of_this_process().map_err(RunError::Predecessor)?;
    let outcome = run_after(predecessor.as_ref(), path, confined);
    if let (Some(predecessor), Err(error)) = (&predecessor, &outcome) {
        predecessor.refuse(error);
    }
    outcome
}

#[expect(clippy::disallowed_methods, reason = "the shell gives the state its time")]
fn run_after(
    predecessor: Option<&Predecessor>,
    path: &Path,
    confined: bool,
) -> Result<Ending, RunError> {
    let binary = Binary::of_this_process().map_err(RunError::Runtime)?;
    // Before there are keys in it.
    let private = if confined { socket::keep_memory_private() } else { Ok(()) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(RunError::Runtime)?;
    // From here on a signal waits until it can be followed.
    let signals = runtime.block_on(async { Signals::catch() })?;
    let Loaded { config, warnings } = quic_lb_config::load(path).map_err(RunError::Config)?;
    let logging = Logging::start(&config.log);
    watch::log_mistakes(&warnings);
    if let Err(error) = private {
        warn!(%error, "core dumps of this process would have keys in them");
    }
    // Everything that can fail is tried before the first datagram is taken.
    let legacy = predecessor.map(|predecessor| predecessor.legacy(&config)).transpose();
    let mut legacy = legacy.map_err(RunError::Predecessor)?;
    let handed = legacy.as_mut().map(|legacy| mem::take(&mut legacy.doors));
    let mut handed = handed.unwrap_or_default();
    let doors = config.admin.as_ref().map(|admin| open_addresses(admin, &mut handed));
    let mut doors = doors.transpose()?.unwrap_or_default();
    let commands = match config.admin.as_ref().map(Place::of) {
        Some(Place::Unix(path)) => Some(path),
        _ => None,
    };
    let folder = config.state_dir.clone();
    let of_folder = |error| RunError::State { folder: folder.clone().unwrap_or_default(), error };
    let handed_file = folder.as_ref().and_then(|of| handed.take(&Where::State(of.clone())));
    let commanded = match (&folder, &handed_file) {
        // Before it is too late to refuse: it may have no right to make files.
        (Some(_), None) if predecessor.is_some() => {
            let sentence = "the running process keeps none there, and it takes a restart to begin";
            return Err(of_folder(io::Error::other(sentence)));
        }
        (Some(folder), None) => kept_in(folder).map_err(of_folder)?,
        _ => Commands::new(),
    };
    // One that is not handed over cannot be opened as long as its owner lives.
    let mut socket = commands.as_ref().and_then(|path| handed.take(&Where::Path(path.clone())));

    let (now, remembered) = (Instant::now(), config.limits.remembered.get());
    let was_confined = legacy.as_ref().is_some_and(|legacy| legacy.confined);
    let (memory, mut plane, workers);
    match (predecessor, legacy) {
        (Some(predecessor), Some(legacy)) => {
            if let (Some(path), None) = (&commands, &socket) {
                socket = Some(open_path(path)?.into());
            }
            memory = Arc::new(Memory::succeeding(remembered, now, &legacy.memory));
            let (shared, numbers) = (Arc::clone(&memory), legacy.numbers);
            plane = ControlPlane::succeeding(config, shared, seed()?, numbers)
                .map_err(RunError::NotOpened)?;
            plane.take_over(now, legacy.plane);
            let (routing, shared) = (Arc::clone(plane.routing()), Arc::clone(&memory));
            let waiting =
                Workers::succeed(plane.config(), legacy.workers, routing, shared, confined)?;
            workers = predecessor.take_over(waiting, &mut plane, &memory)?;
        }
        _ => {
            memory = Arc::new(Memory::new(remembered, now, seed()?));
            plane = ControlPlane::new(config, Arc::clone(&memory), seed()?);
            plane.restore(commanded);
            let (routing, shared) = (Arc::clone(plane.routing()), Arc::clone(&memory));
            let sockets = socket::activated().map_err(RunError::Activation)?;
            let listeners = activation::listen(plane.config(), sockets);
            let listeners = listeners.map_err(RunError::Activation)?;
            workers = Workers::start(plane.config(), listeners, routing, shared, confined)?;
        }
    }
    if let Some(path) = commands {
        // Not before: whoever may not listen takes nobody's place.
        let listener = match socket {
            Some(socket) => socket.into(),
            None => open_path(&path)?,
        };
        info!(path = %path.display(), "commands");
        doors.push((Where::Path(path), Door::Unix(listener), Access::Everything));
    }
    let keeper = match (&folder, handed_file) {
        (_, Some(file)) => Some(Keeper::succeeding(file.into())),
        (Some(folder), None) => Some(Keeper::begin(folder, plane.commands()).map_err(of_folder)?),
        (None, None) => None,
    };
    // Threads that are started from here on begin without it.
    let connections = plane.config().log.connections.clone();
    if confined && !was_confined {
        confine(path, &folders_of_logs(connections.as_ref()));
    }
    let log = Log::start(Arc::clone(workers.records()), Arc::clone(plane.routing()));
    let log = Arc::new(log.map_err(RunError::Runtime)?);
    log.set(connections);
    plane.on_reload(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(), true);
    plane.set_workers(workers.count(), workers.totals().clone(), workers.flow_capacity());
    plane.set_records(Arc::clone(workers.records()));

    let handed = Handed::of(&doors).and_then(|mut handed| {
        if let (Some(keeper), Some(folder)) = (&keeper, &folder) {
            handed.0.push((Where::State(folder.clone()), keeper.try_clone()?.into()));
        }
        Ok(handed)
    });
    let upgrader = Upgrader {
        binary,
        orders: Arc::clone(workers.orders()),
        memory,
        doors: handed.map_err(RunError::Runtime)?,
        confined,
    };
    let life =
        Life { path, workers: &workers, doors, logging, log: Arc::clone(&log), signals, upgrader };
    let outcome = runtime.block_on(look_after(life, plane, keeper));
    // A configuration that is being read from a slow disk is not waited for.
    runtime.shutdown_background();
    let failure = workers.stop();
    // They have told of the flows that they had.
    log.finish();
    match (outcome, failure) {
        (Err(RunError::WorkerEnded(worker)), Some(reason)) => {
            Err(RunError::WorkerEnded(format!("{worker}: {reason}")))
        }
        (outcome, _) => outcome,
    }
}

/// Gives up what the control plane does not need either, now that everything is open.
fn confine(path: &Path, writable: &[PathBuf]) {
    match socket::confine_thread(Execution::Kept, writable) {
        Ok(Confined { files }) => debug!(files, "confined"),
        Err(error) => warn!(%error, "the process keeps rights that it does not need"),
    }
    if let Err(error) = File::open(path) {
        let file = path.display();
        warn!(%file, %error, "reloads will fail: the file can be read with the rights of root alone");
    }
}

/// Where the connection log may be from now on: in the folder that it is in, and in those that the service manager has made for
/// logs. A successor has no more rights than this process.
fn folders_of_logs(connections: Option<&ConnectionLog>) -> Vec<PathBuf> {
    let folder = match connections.map(|log| &log.to) {
        Some(LogTarget::File(path)) => path.parent().map(Path::to_owned),
        Some(LogTarget::Stdout) | None => None,
    };
    // As systemd lists them.
    let managed = env::var_os("LOGS_DIRECTORY").unwrap_or_default();
    let managed = env::split_paths(&managed).filter(|path| path.is_absolute()).collect::<Vec<_>>();
    folder.into_iter().chain(managed).collect()
}

/// How the balancer ended when it was asked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// No connection was left, or the time to drain was over.
    Drained,
    /// A second signal cut the drain short.
    CutShort,
    /// Another process goes on with everything.
    HandedOver,
}

/// The signals that are followed, and those that would kill and mean nothing here.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    user: [Signal; 2],
}

impl Signals {
    fn catch() -> Result<Self, RunError> {
        let of = |kind| signal(kind).map_err(RunError::Runtime);
        Ok(Self {
            terminate: of(SignalKind::terminate())?,
            interrupt: of(SignalKind::interrupt())?,
            hangup: of(SignalKind::hangup())?,
            user: [of(SignalKind::user_defined1())?, of(SignalKind::user_defined2())?],
        })
    }
}

/// What belongs to the life of a process beside its state.
struct Life<'a> {
    path: &'a Path,
    workers: &'a Workers,
    doors: Vec<(Where, Door, Access)>,
    logging: Logging,
    log: Arc<Log>,
    signals: Signals,
    upgrader: Upgrader,
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
    /// The Unix socket for commands cannot be had.
    #[error("cannot listen at {} for commands: {}", path.display(), why_not_listening(error))]
    AdminSocket {
        /// Its path.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It was to take over from a process, and cannot.
    #[error("cannot take over: {}", reason(.0))]
    Predecessor(io::Error),
    /// It was to take over from a process that has not opened all listeners.
    #[error("cannot take over: {}; reload first, then upgrade", .0.join(", "))]
    NotOpened(Vec<String>),
    /// What outlives the process cannot be kept where it is to be.
    #[error("cannot keep commands in {} (state_dir): {}", folder.display(), reason(error))]
    State {
        /// The folder.
        folder: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The sockets that the service manager has opened cannot be used.
    #[error("cannot use the sockets that the service manager has opened: {}", reason(.0))]
    Activation(io::Error),
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
    life: Life<'_>,
    plane: ControlPlane,
    keeper: Option<Keeper>,
) -> Result<Ending, RunError> {
    let Life { path, workers, doors, logging, log, signals, upgrader } = life;
    let Signals { mut terminate, mut interrupt, hangup, user: [mut user1, mut user2] } = signals;
    announce(plane.config(), workers, &doors);
    let shared =
        Arc::new(Shared::new(plane, workers.mailboxes().clone(), Arc::clone(workers.panics())));
    if let Some(keeper) = keeper {
        shared.set_keeper(keeper);
    }
    let serve = |(_, door, access)| tokio::spawn(admin::serve(door, access, Arc::clone(&shared)));
    let doors: Vec<_> = doors.into_iter().map(serve).collect();
    let memory = Arc::clone(&upgrader.memory);
    let mut upgrades = Upgrades::new(upgrader);
    let mut upgrade_requests = shared.upgrade_requests();
    tokio::spawn(build::build(Arc::clone(&shared)));
    let _checks = Checks::start(Arc::clone(&shared)).map_err(RunError::Runtime)?;
    if let Some(requests) = shared.reload_requests() {
        let shared = Arc::clone(&shared);
        let log = Arc::clone(&log);
        tokio::spawn(watch::watch(path.to_owned(), shared, logging, log, hangup, requests));
    }
    systemd::ready();

    let mut ticks = time::interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut next_sweep = Instant::now() + SWEEP;
    let mut draining: Option<Instant> = None;
    let watchdog = systemd::watchdog_interval();
    let mut next_feed = Instant::now();
    loop {
        let asked_to_end = tokio::select! {
            _ = ticks.tick() => false,
            _ = terminate.recv() => true,
            _ = interrupt.recv() => true,
            _ = user1.recv() => {
                let is_file = log.reopen();
                info!(signal = "SIGUSR1", is_file, "the connection log is opened anew, if it is a file");
                false
            }
            _ = user2.recv() => {
                // What comes of it is in the log.
                upgrades.begin(&shared, None);
                false
            }
            Some(request) = upgrade_requests.recv() => {
                upgrades.begin(&shared, Some(request));
                false
            }
            outcome = upgrades.outcome() => match outcome {
                Some(succeeded) => {
                    systemd::main_process(succeeded.process);
                    doors.iter().for_each(JoinHandle::abort);
                    // Whoever has asked is told.
                    time::sleep(FAREWELL).await;
                    return Ok(Ending::HandedOver);
                }
                None => false,
            },
        };
        if asked_to_end {
            if draining.is_some() {
                end("second signal");
                return Ok(Ending::CutShort);
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
        if let Some(interval) = watchdog
            && now >= next_feed
            && shared.plane().stuck().is_empty()
        {
            systemd::feed_watchdog();
            next_feed = now + interval.saturating_sub(TICK);
        }
        if now >= next_sweep {
            next_sweep = now + SWEEP;
            sweep(&memory, now, shared.plane().routing().load_full());
            // Those of backends that have left the file are to end for good.
            if let Err(error) = shared.keep_commands().await {
                warn!(%error, "commands would not survive a restart");
            }
        }
        if let Some(began) = draining {
            if shared.plane().flows() == 0 {
                end("no flow is left");
                return Ok(Ending::Drained);
            }
            if shared.plane().is_quiet(now, began) {
                end("no connection lives");
                return Ok(Ending::Drained);
            }
            if now.saturating_duration_since(began) >= timeouts.drain {
                end("time to drain is over");
                return Ok(Ending::Drained);
            }
        }
    }
}

/// The upgrade that is under way, if there is one.
struct Upgrades {
    upgrader: Arc<Upgrader>,
    running: Option<JoinHandle<Result<Succeeded, String>>>,
    asked_by: Option<UpgradeRequest>,
}

impl Upgrades {
    fn new(upgrader: Upgrader) -> Self {
        Self { upgrader: Arc::new(upgrader), running: None, asked_by: None }
    }

    fn begin(&mut self, shared: &Arc<Shared>, asked_by: Option<UpgradeRequest>) {
        if self.running.is_some() {
            return;
        }
        let (upgrader, shared) = (Arc::clone(&self.upgrader), Arc::clone(shared));
        info!(binary = %upgrader.binary.path().display(), "upgrade begins");
        self.running = Some(task::spawn_blocking(move || upgrader.upgrade(&shared)));
        self.asked_by = asked_by;
    }

    /// Waits for the end of the upgrade: `None` if this process goes on.
    async fn outcome(&mut self) -> Option<Succeeded> {
        let Some(running) = &mut self.running else { return future::pending().await };
        let outcome = running.await.unwrap_or_else(|error| Err(error.to_string()));
        self.running = None;
        match &outcome {
            Ok(Succeeded { process, flows, standstill }) => {
                info!(process, flows, ?standstill, "handed over");
            }
            Err(reason) => error!(reason, "upgrade failed, this process goes on"),
        }
        if let Some(asked_by) = self.asked_by.take() {
            // Nobody may wait any more.
            let _ = asked_by.send(outcome.clone());
        }
        outcome.ok()
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

fn end(reason: &str) {
    info!(reason, "ended");
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
fn sweep(memory: &Arc<Memory>, now: Instant, routing: Arc<Routing>) {
    let memory = Arc::clone(memory);
    task::spawn_blocking(move || memory.sweep(now, &routing));
}

fn open_path(path: &Path) -> Result<UnixListener, RunError> {
    doors::open_path(path).map_err(|error| RunError::AdminSocket { path: path.to_owned(), error })
}

/// The address of the admin interface, and that for commands if they have one, which may be handed over.
fn open_addresses(
    admin: &Admin,
    handed: &mut Handed,
) -> Result<Vec<(Where, Door, Access)>, RunError> {
    let place = Place::of(admin);
    let mut wanted = vec![(admin.address, place.access_at_address())];
    if let Place::Address(address) = place {
        wanted.push((address, Access::WithProof));
    }
    let open = |(address, access)| {
        let listener = match handed.take(&Where::Address(address)) {
            Some(listener) => listener.into(),
            None => {
                doors::open_address(address).map_err(|error| RunError::Admin { address, error })?
            }
        };
        if !address.ip().is_loopback() && access == Access::Everything {
            warn!(%address, "the admin interface has no passwords and is not on loopback");
        }
        Ok((Where::Address(address), Door::Tcp(listener), access))
    };
    wanted.into_iter().map(open).collect()
}

/// One record for each address, so that whoever starts the process can read where it listens.
fn announce(config: &Config, workers: &Workers, doors: &[(Where, Door, Access)]) {
    for (listener, address) in config.listeners.iter().zip(workers.local_addresses()) {
        info!(listener = listener.name, %address, "listening");
    }
    for (_, door, access) in doors {
        let Door::Tcp(listener) = door else { continue };
        let Ok(address) = listener.local_addr() else { continue };
        match access {
            Access::Everything | Access::Reading => info!(%address, "admin interface"),
            Access::WithProof => info!(%address, "commands"),
        }
    }
    let (wanted, flows) = (config.limits.flows.get(), workers.flow_capacity());
    if flows < wanted {
        warn!(flows, wanted, "descriptors for fewer flows than limits.flows: raise LimitNOFILE");
    }
    let (version, digest) = (env!("CARGO_PKG_VERSION"), config.digest());
    info!(version, digest, workers = workers.count(), flows, "running");
}
