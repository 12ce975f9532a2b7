//! What the tasks of the control plane share: its state behind a lock, the word that there is a
//! snapshot to be built, which snapshot is in force, the way to the workers, and the registry of
//! metrics.

#![expect(
    clippy::disallowed_methods,
    reason = "the shell around the state of the control plane: it gives it the time"
)]

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    task, time,
};

use super::{
    commands::Keeper,
    plane::{Built, ControlPlane},
    reloads::{Reloaded, Request},
};
use crate::{
    metrics::Metrics,
    worker::{mailbox::Mailboxes, panics::Panics},
};

/// How long whoever changes something waits for it to be in force. Tables of thousands of backends
/// take tens of milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// Requests to reload that may wait: each takes a reading of the file.
const MAX_RELOADS: usize = 4;

/// Where the outcome of an upgrade is told.
pub(crate) type UpgradeRequest = oneshot::Sender<Result<Succeeded, String>>;

/// A successor that serves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Succeeded {
    pub(crate) process: u32,
    pub(crate) flows: usize,
    /// For how long nobody has read.
    pub(crate) standstill: Duration,
}

/// What the tasks of the control plane have in common.
pub(crate) struct Shared {
    plane: Arc<Mutex<ControlPlane>>,
    changed: Notify,
    /// The number of the order that is in force.
    in_force: watch::Sender<u64>,
    /// Held by whoever asks the workers something.
    mailboxes: tokio::sync::Mutex<Mailboxes>,
    panics: Arc<Panics>,
    metrics: Metrics,
    reloads: mpsc::Sender<Request>,
    /// What keeps commands, if anything does.
    keeper: OnceLock<Arc<Mutex<Keeper>>>,
    /// Until the task that reloads has taken them.
    reload_requests: Mutex<Option<mpsc::Receiver<Request>>>,
    upgrades: mpsc::Sender<UpgradeRequest>,
    asked_to_upgrade: Mutex<Option<mpsc::Receiver<UpgradeRequest>>>,
}

impl Shared {
    pub(crate) fn new(plane: ControlPlane, mailboxes: Mailboxes, panics: Arc<Panics>) -> Self {
        let in_force = watch::Sender::new(plane.in_force());
        let plane = Arc::new(Mutex::new(plane));
        let read = Arc::clone(&plane);
        let metrics = Metrics::new(move || locked(&read).reading(Instant::now()));
        let mailboxes = tokio::sync::Mutex::new(mailboxes);
        let (reloads, requests) = mpsc::channel(MAX_RELOADS);
        let (upgrades, asked_to_upgrade) = mpsc::channel(1);
        Self {
            plane,
            changed: Notify::new(),
            in_force,
            mailboxes,
            panics,
            metrics,
            reloads,
            keeper: OnceLock::new(),
            reload_requests: Mutex::new(Some(requests)),
            upgrades,
            asked_to_upgrade: Mutex::new(Some(asked_to_upgrade)),
        }
    }

    /// Has the configuration read, and waits for what comes of it; `forced` takes away what live connections use. `None` when as many wait as there may be, or nobody
    /// reads.
    pub(super) async fn reload(&self, forced: bool) -> Option<Reloaded> {
        let (answer, outcome) = oneshot::channel();
        self.reloads.try_send(Request { forced, answer }).ok()?;
        outcome.await.ok()
    }

    /// Has commands kept from now on.
    pub(super) fn set_keeper(&self, keeper: Keeper) {
        // There is one at most.
        let _ = self.keeper.set(Arc::new(Mutex::new(keeper)));
    }

    /// Keeps the commands that are in force, if there is a place for them.
    pub(super) async fn keep_commands(&self) -> io::Result<()> {
        let Some(keeper) = self.keeper.get().map(Arc::clone) else { return Ok(()) };
        let commands = self.plane().commands().clone();
        let keep = move || keeper.lock().unwrap_or_else(PoisonError::into_inner).keep(commands);
        task::spawn_blocking(keep).await.unwrap_or_else(|error| Err(io::Error::other(error)))
    }

    /// The requests to read the configuration; `None` the second time.
    pub(super) fn reload_requests(&self) -> Option<mpsc::Receiver<Request>> {
        self.reload_requests.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The state, to be read. To be given back before anything is awaited.
    pub(crate) fn plane(&self) -> MutexGuard<'_, ControlPlane> {
        locked(&self.plane)
    }

    /// Changes the state. When a snapshot follows from that, the builder is told.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut ControlPlane) -> T) -> T {
        let mut plane = self.plane();
        let outcome = change(&mut plane);
        if plane.newest() != plane.in_force() {
            self.changed.notify_one();
        }
        outcome
    }

    /// Waits until the state may have changed.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Puts a snapshot in force.
    pub(crate) fn install(&self, built: Built) {
        let mut plane = self.plane();
        plane.install(built);
        self.in_force.send_replace(plane.in_force());
    }

    /// Waits until all that was changed so far is in force. `false` when it takes too long.
    pub(crate) async fn until_in_force(&self) -> bool {
        let newest = self.plane().newest();
        let mut in_force = self.in_force.subscribe();
        let waited = time::timeout(PATIENCE, in_force.wait_for(|number| *number >= newest));
        waited.await.is_ok_and(|waited| waited.is_ok())
    }

    /// The number of the order that is in force, as it changes.
    pub(crate) fn in_force(&self) -> watch::Receiver<u64> {
        self.in_force.subscribe()
    }

    /// The way to the workers, when nobody else asks them something.
    pub(crate) async fn mailboxes(&self) -> tokio::sync::MutexGuard<'_, Mailboxes> {
        self.mailboxes.lock().await
    }

    /// Asks for an upgrade, and waits for what comes of it: the sentence of an error says why there is none.
    pub(crate) async fn upgrade(&self) -> Result<Succeeded, String> {
        let (answer, answered) = oneshot::channel();
        let busy = || "another upgrade is under way".to_owned();
        self.upgrades.try_send(answer).map_err(|_| busy())?;
        answered.await.unwrap_or_else(|_| Err(busy()))
    }

    /// Where requests for upgrades arrive: for the one who follows them.
    pub(crate) fn upgrade_requests(&self) -> mpsc::Receiver<UpgradeRequest> {
        let requests = self.asked_to_upgrade.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Asked for again: none arrive there.
        requests.unwrap_or_else(|| mpsc::channel(1).1)
    }

    /// What is known of the panics of workers.
    pub(crate) fn panics(&self) -> &Panics {
        &self.panics
    }

    /// What `/metrics` shows; the state must not be held meanwhile.
    pub(crate) fn metrics(&self) -> String {
        self.metrics.render()
    }
}

fn locked(plane: &Mutex<ControlPlane>) -> MutexGuard<'_, ControlPlane> {
    // The state is replaced piece by piece, each of them whole: a panic leaves nothing half done
    // that would be worse than to stop.
    plane.lock().unwrap_or_else(PoisonError::into_inner)
}
