//! Active checks: asks each backend of the pools that say so again and again, and tells the plane what came
//! of it.
//!
//! Each backend has a task, which does one thing after the other: ask, wait, tell, sleep. So there is never
//! more than one question to a backend under way, and one that hangs, lies or floods keeps nobody
//! waiting but its own task, which reads a few datagrams and gives up. What the tasks find out goes through
//! one bounded channel and is told to the plane in batches.
//!
//! Each backend has a socket too, connected to it, and another one after each check that failed. The kernel
//! lets nobody else's datagrams in and says when nobody listens; what a flood brings fills no buffer but that of
//! whoever sends it. One socket for all would need fewer system calls, and could be filled for everybody by
//! one. Sockets of flows have no part in it.

#![expect(
    clippy::disallowed_methods,
    reason = "the shell around the state of the control plane: it gives it the time and its randomness"
)]

mod probe;
pub(super) mod state;

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use quic_lb_config::{CheckKind, Config};
use tokio::{
    net::UdpSocket,
    sync::mpsc,
    task::JoinHandle,
    time::{sleep, sleep_until, timeout},
};
use tracing::{debug, warn};

use super::{plane::backends::CheckTarget, shared::Shared};
use crate::{backend::MAX_BACKENDS, check::CheckResult, refusal::Refusal};
use probe::{Probe, RANDOM};

/// Datagrams that are read in search of an answer.
const READS: usize = 8;

/// The most octets of an answer that are looked at: more than a hundred versions.
const ANSWER_LEN: usize = 512;

/// From one batch of results to the next: each may change what is wanted.
const BATCH: Duration = Duration::from_millis(20);

/// From one warning that nothing can be asked to the next.
const UNSENT_SAID_EVERY: Duration = Duration::from_secs(60);

/// A result, and whose it is.
type Told = (Arc<CheckTarget>, CheckResult);

/// Checks for as long as the process lives.
pub(super) async fn check(shared: Arc<Shared>) {
    let (tell, mut results) = mpsc::channel(MAX_BACKENDS);
    let mut in_force = shared.in_force();
    let mut tasks = Tasks::default();
    let mut batch = Vec::new();
    let mut unsent_said: Option<Instant> = None;
    tasks.follow(&shared, &tell);
    loop {
        tokio::select! {
            changed = in_force.changed() => match changed {
                Ok(()) => tasks.follow(&shared, &tell),
                Err(_) => return,
            },
            _ = results.recv_many(&mut batch, MAX_BACKENDS) => {
                let now = Instant::now();
                shared.change(|plane| plane.on_checks(now, &batch));
                let unsent = batch.drain(..).filter(|(_, result)| *result == CheckResult::Unsent);
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
#[derive(Default)]
struct Tasks {
    of: Option<Arc<Config>>,
    running: BTreeMap<(String, String), (Arc<CheckTarget>, Task)>,
}

impl Tasks {
    /// Begins and ends tasks, so that all backends are checked as the configuration says, and no others.
    fn follow(&mut self, shared: &Shared, tell: &mpsc::Sender<Told>) {
        let plane = shared.plane();
        let config = plane.shared_config();
        if self.of.as_ref().is_some_and(|of| Arc::ptr_eq(of, &config)) {
            return;
        }
        let targets = plane.check_targets();
        drop(plane);
        self.of = Some(config);
        let mut before = std::mem::take(&mut self.running);
        for target in targets {
            let name = target.name.clone();
            let running = before.remove(&name).filter(|(of, _)| **of == target);
            let running = running.unwrap_or_else(|| {
                let target = Arc::new(target);
                let task = Task(tokio::spawn(look_after(Arc::clone(&target), tell.clone())));
                (target, task)
            });
            self.running.insert(name, running);
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

/// Checks one backend again and again.
async fn look_after(target: Arc<CheckTarget>, tell: mpsc::Sender<Told>) {
    // A fleet that begins is not asked all at once.
    let spread = target.check.interval.min(Duration::from_secs(1)) / 4;
    sleep(share_of(spread)).await;
    let mut socket = None;
    loop {
        let asked = tokio::time::Instant::now();
        let result = match target.check.kind {
            CheckKind::VersionNegotiation => ask_for_versions(&target, &mut socket).await,
        };
        if result != CheckResult::Answered {
            socket = None;
        }
        if tell.send((Arc::clone(&target), result)).await.is_err() {
            return;
        }
        let interval = target.check.interval;
        sleep_until(asked + interval - share_of(interval / 10)).await;
    }
}

/// Between nothing and all of it, at random.
fn share_of(whole: Duration) -> Duration {
    // Without randomness, all of it is as good.
    let random = getrandom::u32().unwrap_or(u32::MAX);
    whole.mul_f64(f64::from(random) / f64::from(u32::MAX))
}

/// Asks from `socket`, or from a new one.
async fn ask_for_versions(target: &CheckTarget, socket: &mut Option<UdpSocket>) -> CheckResult {
    let mut random = [0; RANDOM];
    if let Err(error) = getrandom::fill(&mut random) {
        return failure(target, &io::Error::other(error));
    }
    let probe = Probe::new(&random);
    let socket = match socket {
        Some(socket) => Ok(&*socket),
        None => connect(target).map(|new| &*socket.insert(new)),
    };
    let socket = match socket {
        Ok(socket) => socket,
        Err(error) => return failure(target, &error),
    };
    let answered = timeout(target.check.timeout, async {
        if let Err(error) = socket.send(&probe.datagram()).await {
            return failure(target, &error);
        }
        let mut octets = [0; ANSWER_LEN];
        for _ in 0..READS {
            match socket.recv(&mut octets).await {
                Ok(len) if probe.is_answered_by(&octets[..len]) => return CheckResult::Answered,
                Ok(_) => {}
                Err(error) => return failure(target, &error),
            }
        }
        CheckResult::Wrong
    });
    answered.await.unwrap_or(CheckResult::Timeout)
}

/// A new socket, connected to where the backend is checked.
fn connect(target: &CheckTarget) -> io::Result<UdpSocket> {
    let any = match target.address {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let socket = std::net::UdpSocket::bind((target.source.unwrap_or(any), 0))?;
    socket.set_nonblocking(true)?;
    socket.connect(target.address)?;
    UdpSocket::from_std(socket)
}

fn failure(target: &CheckTarget, error: &io::Error) -> CheckResult {
    let (pool, backend) = &target.name;
    debug!(pool, backend, address = %target.address, %error, "check");
    if Refusal::of(error).is_about_backend() { CheckResult::Refused } else { CheckResult::Unsent }
}
