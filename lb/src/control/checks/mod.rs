//! Active checks: asks each backend of the pools that say so again and again, and tells the plane what came
//! of it.
//!
//! Checks have a thread of their own: handshakes are work, and whoever waits for an answer of the control plane
//! should not wait for them. Each backend has a task there, which does one thing after the other: ask, wait,
//! tell, sleep. So there is never more than one question to a backend under way, and one that hangs, lies or
//! floods keeps nobody waiting but its own task, which reads a few datagrams and gives up. What the tasks
//! find out goes through one bounded channel and is told to the plane in batches.
//!
//! Connections take memory, so that only so many are begun at once. Backends of which the last check failed
//! have places of their own among them: one that hangs takes the place of others once.
//!
//! Each backend has a socket too, connected to it: for each connection another one, otherwise another one
//! after each check that failed. The kernel lets nobody else's datagrams in and says when nobody listens;
//! what a flood brings fills no buffer but that of whoever sends it. One socket for all would need fewer
//! system calls, and could be filled for everybody by one. Sockets of flows have no part in it.

#![expect(
    clippy::disallowed_methods,
    reason = "the shell around the state of the control plane: it gives it the time and its randomness"
)]

mod ask;
pub(super) mod contract;
mod handshake;
pub(super) mod honours;
mod http3;
mod probe;
mod retry;
mod skew;
pub(super) mod slow_start;
pub(super) mod state;

use std::{
    collections::BTreeMap,
    convert::Infallible,
    io,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use ask::ask_for_versions;
use handshake::Client;
use quic_lb_config::{CheckKind, Config, Handshake, Request};
use retry::Questions;
use tokio::{
    runtime,
    sync::{Semaphore, mpsc, oneshot},
    task::JoinHandle,
    time::{MissedTickBehavior, interval, sleep, sleep_until},
};
use tracing::{error, warn};

use super::{plane::backends::CheckTarget, shared::Shared};
use crate::{
    backend::MAX_BACKENDS,
    check::{CheckResult, Finding},
};

/// Connections to backends that are begun at once: some 50 KiB each.
const CONNECTIONS: usize = 512;

/// Of them, those to backends of which the last check failed.
const CONNECTIONS_TO_FAILING: usize = 128;

/// From one batch of results to the next: each may change what is wanted.
const BATCH: Duration = Duration::from_millis(20);

/// From one warning that nothing can be asked to the next.
const UNSENT_SAID_EVERY: Duration = Duration::from_secs(60);

/// From one look whether all tasks live to the next.
const REVIVAL: Duration = Duration::from_secs(1);

/// What was found, and of whom.
type Told = (Arc<CheckTarget>, Finding);

/// The thread of the checks. It ends with this.
pub(super) struct Checks(
    #[expect(dead_code, reason = "to be dropped")] oneshot::Sender<Infallible>,
);

impl Checks {
    /// Begins to check.
    pub(super) fn start(shared: Arc<Shared>) -> io::Result<Self> {
        let (stop, stopped) = oneshot::channel();
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let run = move || {
            runtime.block_on(async {
                tokio::select! {
                    () = check(shared) => {}
                    _ = stopped => {}
                }
            });
        };
        thread::Builder::new().name("checks".to_owned()).spawn(run)?;
        Ok(Self(stop))
    }
}

/// Checks for as long as the control plane lives.
async fn check(shared: Arc<Shared>) {
    let (tell, mut results) = mpsc::channel(MAX_BACKENDS);
    let mut in_force = shared.in_force();
    let mut tasks = Tasks::new(tell);
    let mut batch = Vec::new();
    let mut unsent_said: Option<Instant> = None;
    let mut revival = interval(REVIVAL);
    revival.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut questions = Questions::new();
    tasks.follow(&shared);
    questions.follow(&shared);
    loop {
        tokio::select! {
            changed = in_force.changed() => match changed {
                Ok(()) => {
                    tasks.follow(&shared);
                    questions.follow(&shared);
                }
                Err(_) => return,
            },
            _ = revival.tick() => tasks.revive(),
            _ = results.recv_many(&mut batch, MAX_BACKENDS) => {
                let now = Instant::now();
                shared.change(|plane| plane.on_checks(now, &batch));
                let unsent = batch.drain(..).filter(|(_, of)| of.result == CheckResult::Unsent);
                let unsent = unsent.count();
                let lately = |said| now.saturating_duration_since(said) < UNSENT_SAID_EVERY;
                if unsent > 0 && !unsent_said.is_some_and(lately) {
                    unsent_said = Some(now);
                    let hint = "the log has why at the level debug: descriptors and memory, above all";
                    warn!(unsent, hint, "backends cannot be checked");
                }
                sleep(BATCH).await;
            }
        }
    }
}

/// The task of each backend that is checked.
struct Tasks {
    of: Option<Arc<Config>>,
    running: BTreeMap<(String, String), (Checker, Task)>,
    places: Arc<Places>,
    tell: mpsc::Sender<Told>,
}

/// Places for connections.
struct Places {
    all: Semaphore,
    failing: Semaphore,
}

impl Tasks {
    fn new(tell: mpsc::Sender<Told>) -> Self {
        let all = Semaphore::new(CONNECTIONS - CONNECTIONS_TO_FAILING);
        let places = Places { all, failing: Semaphore::new(CONNECTIONS_TO_FAILING) };
        Self { of: None, running: BTreeMap::new(), places: Arc::new(places), tell }
    }

    /// Begins and ends tasks, so that all backends are checked as the configuration says, and no others.
    fn follow(&mut self, shared: &Shared) {
        let plane = shared.plane();
        let config = plane.shared_config();
        if self.of.as_ref().is_some_and(|of| Arc::ptr_eq(of, &config)) {
            return;
        }
        let targets = plane.check_targets();
        drop(plane);
        self.of = Some(config);
        let mut before = std::mem::take(&mut self.running);
        let mut methods = BTreeMap::new();
        for target in targets {
            let name = target.name.clone();
            let running = before.remove(&name).filter(|(checker, _)| *checker.target == target);
            let running = running.unwrap_or_else(|| {
                let method = methods.entry(name.0.clone()).or_insert_with(|| Method::of(&target));
                let (places, tell) = (Arc::clone(&self.places), self.tell.clone());
                let method = method.clone();
                let checker = Checker { target: Arc::new(target), method, places, tell };
                let task = checker.start();
                (checker, task)
            });
            self.running.insert(name, running);
        }
    }

    /// Begins tasks anew that have ended, which none should: a backend that nobody looks at keeps the
    /// state that it has.
    fn revive(&mut self) {
        for ((pool, backend), (checker, task)) in &mut self.running {
            if task.0.is_finished() {
                error!(pool, backend, "a check has ended by itself, and begins anew");
                *task = checker.start();
            }
        }
    }
}

/// A task that ends with this.
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What the backends of a pool are asked with.
#[derive(Clone)]
enum Method {
    Versions,
    /// The connections of a pool have one configuration, if one can be made.
    Connection(Arc<Result<Client, rustls::Error>>),
}

impl Method {
    fn of(target: &CheckTarget) -> Self {
        match &target.check.kind {
            CheckKind::VersionNegotiation => Self::Versions,
            CheckKind::Quic(handshake) => Self::connection(target, handshake, None),
            CheckKind::Http3(handshake, request) => {
                Self::connection(target, handshake, Some(request))
            }
        }
    }

    fn connection(target: &CheckTarget, handshake: &Handshake, request: Option<&Request>) -> Self {
        Self::Connection(Arc::new(Client::new(handshake, request, target.check.timeout)))
    }
}

/// All that it takes to check one backend.
#[derive(Clone)]
struct Checker {
    target: Arc<CheckTarget>,
    method: Method,
    places: Arc<Places>,
    tell: mpsc::Sender<Told>,
}

impl Checker {
    fn start(&self) -> Task {
        Task(tokio::spawn(self.clone().look_after()))
    }

    /// Checks again and again.
    async fn look_after(self) {
        let Self { target, method, places, tell } = self;
        // A fleet that begins is not asked all at once.
        let spread = target.check.interval.min(Duration::from_secs(1)) / 4;
        sleep(share_of(spread)).await;
        let mut socket = None;
        let mut failed = false;
        loop {
            let (asked, mut finding) = match &method {
                Method::Versions => {
                    let asked = tokio::time::Instant::now();
                    (asked, ask_for_versions(&target, &mut socket).await.into())
                }
                Method::Connection(client) => {
                    let places = if failed { &places.failing } else { &places.all };
                    // They are never closed.
                    let _place = places.acquire().await.ok();
                    let asked = tokio::time::Instant::now();
                    (asked, handshake::try_out(&target, client).await)
                }
            };
            finding.took = asked.elapsed();
            failed = finding.result != CheckResult::Answered;
            if failed {
                socket = None;
            }
            if tell.send((Arc::clone(&target), finding)).await.is_err() {
                return;
            }
            let interval = target.check.interval;
            sleep_until(asked + interval - share_of(interval / 10)).await;
        }
    }
}

/// Between nothing and all of it, at random.
fn share_of(whole: Duration) -> Duration {
    // Without randomness, all of it is as good.
    let random = getrandom::u32().unwrap_or(u32::MAX);
    whole.mul_f64(f64::from(random) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use quic_lb_config::{CertificatePolicy, HealthCheck};
    use tokio::time::timeout;

    use super::*;
    use crate::{control::plane::ControlPlane, fixtures, memory::Memory};

    /// A check of an address at which nobody listens, which is known at once.
    fn target(kind: CheckKind) -> CheckTarget {
        let mut config = fixtures::config(true);
        config.pools[0].health_check = Some(HealthCheck {
            kind,
            interval: Duration::from_millis(100),
            timeout: Duration::from_secs(60),
            rise: 1.try_into().unwrap(),
            fall: 1.try_into().unwrap(),
            port: Some(1),
            panic_below: 0,
            slow_start: Duration::ZERO,
        });
        let memory = Arc::new(Memory::new(10, Instant::now(), [0; 4]));
        ControlPlane::new(config, memory, [1, 2]).check_targets().remove(0)
    }

    #[tokio::test]
    async fn a_check_that_has_ended_begins_anew() {
        let target = target(CheckKind::VersionNegotiation);
        let (tell, mut results) = mpsc::channel(8);
        let mut tasks = Tasks::new(tell.clone());
        let checker = Checker {
            target: Arc::new(target.clone()),
            method: Method::Versions,
            places: Arc::clone(&tasks.places),
            tell,
        };
        let ended = Task(tokio::spawn(async {}));
        tasks.running.insert(target.name.clone(), (checker, ended));
        while !tasks.running[&target.name].1.0.is_finished() {
            tokio::task::yield_now().await;
        }
        tasks.revive();
        let found = results.recv().await.map(|(_, finding)| finding.result);
        assert_eq!(found, Some(CheckResult::Refused));
    }

    #[tokio::test]
    async fn connections_have_a_bounded_number_of_places_and_those_that_fail_have_their_own() {
        let kind = CheckKind::Quic(Handshake {
            alpn: "h3".into(),
            server_name: None,
            certificate: CertificatePolicy::Ignored,
        });
        let target = target(kind);
        let (tell, mut results) = mpsc::channel(1);
        let places = Tasks::new(tell.clone()).places;
        assert_eq!(
            places.all.available_permits() + places.failing.available_permits(),
            CONNECTIONS
        );
        let taken = places.all.acquire_many(384).await.unwrap();
        let method = Method::of(&target);
        let checker =
            Checker { target: Arc::new(target), method, places: Arc::clone(&places), tell };
        let _task = checker.start();
        let a_while = Duration::from_millis(300);
        assert!(timeout(a_while, results.recv()).await.is_err(), "there is no place");
        drop(taken);
        let next_is_refused = async |results: &mut mpsc::Receiver<Told>| {
            let told = timeout(Duration::from_secs(60), results.recv()).await;
            told.unwrap().unwrap().1.result == CheckResult::Refused
        };
        assert!(next_is_refused(&mut results).await);
        // It has failed: the places of the others are not for it, and it does not need them.
        let _taken = places.all.acquire_many(384).await.unwrap();
        for _ in 0..5 {
            assert!(next_is_refused(&mut results).await);
        }
        let _others = places.failing.acquire_many(128).await.unwrap();
        // What was under way may still come, and what the channel holds.
        let mut more = 0;
        while timeout(a_while, results.recv()).await.is_ok() {
            more += 1;
            assert!(more <= 3, "there is no place");
        }
    }
}
