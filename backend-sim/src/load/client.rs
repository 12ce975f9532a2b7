//! One client: a connection at a time, its requests, and its moves.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use h3::error::{Code, StreamError};
use http::Method;
use quic::driver::Endpoint;
use tokio::{task::JoinSet, time};
use tracing::debug;

use super::{
    Shared,
    schedule::Schedule,
    session::{OpenError, RequestError, Session},
};
use crate::{BACKEND_HEADER, cause, pattern};

/// After a failure, so that whoever is in trouble is not asked all the time.
const PAUSE: Duration = Duration::from_millis(100);
/// How long the clock waits for the first connections.
const CONNECTING: Duration = Duration::from_secs(30);
/// How long the last answers may take after the time is over.
const PATIENCE: Duration = Duration::from_secs(10);

/// How late the timer may be, which knows whole milliseconds.
const TIMER_LAG: Duration = Duration::from_millis(3);
/// Handshakes that take longer than this when the time is over have failed.
const SLOW_HANDSHAKE: Duration = Duration::from_secs(1);

/// A server that says nothing for this long, though it was asked, may be gone.
const SILENCE: Duration = Duration::from_secs(1);

/// How a client stands.
#[derive(Clone, Debug, Default)]
pub struct ClientView {
    /// The address it sends from.
    pub address: Option<SocketAddr>,
    /// Who answers its present connection.
    pub backend: Option<String>,
    /// Connections it has had.
    pub connections: u64,
    /// Its verified requests.
    pub requests: u64,
    /// Its changes of port.
    pub rebinds: u64,
    /// Its migrations.
    pub migrations: u64,
    /// Its requests that are not answered to the end.
    waiting: u64,
    /// When it heard something last, or began to wait.
    heard: Option<Instant>,
}

impl ClientView {
    /// Whether it has waited for longer than servers take that answer at all.
    pub(super) fn is_silent(&self, now: Instant) -> bool {
        let since = self.heard.filter(|_| self.waiting > 0);
        since.is_some_and(|since| now.saturating_duration_since(since) > SILENCE)
    }

    fn on_request(&mut self) {
        if self.waiting == 0 {
            self.heard = Some(Instant::now());
        }
        self.waiting += 1;
    }

    fn on_heard(&mut self) {
        self.heard = Some(Instant::now());
    }

    fn on_request_over(&mut self) {
        self.waiting = self.waiting.saturating_sub(1);
    }
}

/// Connects, and again whenever a connection is over, until the time is.
pub(super) async fn run(shared: Arc<Shared>, number: usize) {
    let mut first = true;
    let patience = time::Instant::now() + CONNECTING;
    loop {
        let began = Instant::now();
        let opened = tokio::select! {
            opened = open(&shared, number) => opened,
            () = over(&shared) => {
                if began.elapsed() > SLOW_HANDSHAKE {
                    shared.tally.on_handshake_failed("unfinished");
                }
                return;
            }
            () = time::sleep_until(patience), if first => {
                shared.tally.on_handshake_failed("unfinished");
                None
            }
        };
        if std::mem::take(&mut first) {
            shared.on_first_attempt();
        }
        let schedule = started(&shared).await;
        match opened {
            Some((endpoint, session)) => {
                use_up(&shared, number, &schedule, &endpoint, session).await;
                // Whoever is told that a connection is over has to be told before we go.
                endpoint.wait_idle().await;
            }
            None => time::sleep(PAUSE).await,
        }
        if schedule.is_over(Instant::now()) {
            return;
        }
    }
}

async fn open(shared: &Shared, number: usize) -> Option<(Endpoint, Session)> {
    let _permit = shared.handshakes.acquire().await.ok()?;
    if shared.tally.is_stopped() {
        return None;
    }
    let endpoint = match Endpoint::client(shared.local()) {
        Ok(endpoint) => endpoint,
        Err(error) => {
            debug!(%error, "no socket");
            shared.tally.on_handshake_failed("no_socket");
            return None;
        }
    };
    let began = Instant::now();
    let options = &shared.options;
    match Session::open(&endpoint, &shared.config, options.target, &options.name).await {
        Ok(session) => {
            let stats = session.connection().stats();
            let is_repeated = stats.is_some_and(|stats| stats.probe_timeouts > 0);
            shared.tally.on_handshake(began.elapsed(), is_repeated);
            shared.see(number, |view| {
                view.connections += 1;
                view.address = Some(endpoint.local_addr());
                view.backend = None;
            });
            Some((endpoint, session))
        }
        Err(error) => {
            debug!(%error, "no connection");
            shared.tally.on_handshake_failed(match &error {
                OpenError::Connect(_) => "not_started",
                OpenError::Handshake(error) => cause::word(error),
                OpenError::Http(_) => "http3",
            });
            None
        }
    }
}

/// Waits until the time is over, or nobody wants to begin any more.
async fn over(shared: &Shared) {
    let is_over = || {
        let schedule = shared.schedule.borrow();
        schedule.as_ref().is_some_and(|schedule| schedule.is_over(Instant::now()))
    };
    while !is_over() {
        time::sleep(PAUSE).await;
    }
}

/// Waits until all have connected.
async fn started(shared: &Shared) -> Arc<Schedule> {
    let mut schedule = shared.schedule.subscribe();
    loop {
        if let Some(schedule) = &*schedule.borrow_and_update() {
            return Arc::clone(schedule);
        }
        if schedule.changed().await.is_err() {
            // The sender lives in `shared`.
            std::future::pending::<()>().await;
        }
    }
}

/// What the requests of a connection have in common.
struct Use {
    shared: Arc<Shared>,
    number: usize,
    schedule: Arc<Schedule>,
    session: Session,
    /// Who gave the first answer.
    backend: OnceLock<String>,
    /// No more requests on this connection.
    retired: AtomicBool,
    turn: AtomicU64,
}

/// Makes requests until the connection is over, its life is, or the time is.
async fn use_up(
    shared: &Arc<Shared>,
    number: usize,
    schedule: &Arc<Schedule>,
    endpoint: &Endpoint,
    session: Session,
) {
    let connection = session.connection().clone();
    let used = Arc::new(Use {
        shared: Arc::clone(shared),
        number,
        schedule: Arc::clone(schedule),
        session,
        backend: OnceLock::new(),
        retired: AtomicBool::new(false),
        // Not all of them begin with the same size.
        turn: AtomicU64::new(number as u64),
    });
    let mut workers = JoinSet::new();
    for _ in 0..shared.options.concurrency.max(1) {
        workers.spawn(requests(Arc::clone(&used)));
    }
    let done = all(&mut workers);
    let age = async {
        match shared.options.lifetime {
            // Spread, so that not all of them are young at the same time.
            Some(life) => time::sleep(life.mul_f64(0.75 + 0.5 * phase(shared, number))).await,
            None => std::future::pending().await,
        }
        used.retired.store(true, Relaxed);
        time::sleep(PATIENCE).await;
    };
    let time = async {
        over(shared).await;
        time::sleep(PATIENCE).await;
    };
    let silent = async {
        tokio::select! { () = age => {} () = time => {} }
    };
    let lost = tokio::select! {
        error = connection.closed() => (!cause::is_wished(&error)).then(|| cause::word(&error)),
        () = moves(shared, number, endpoint, &connection) => None,
        () = done => connection.close_reason().filter(|error| !cause::is_wished(error)).as_ref().map(cause::word),
        () = silent => Some("silent"),
    };
    match lost {
        Some(cause) => {
            debug!(cause, "connection lost");
            shared.tally.on_lost(cause);
        }
        // Whoever waits for an answer still has to find out that there will be none.
        None => all(&mut workers).await,
    }
    drop(workers);
    shared.see(number, |view| view.waiting = 0);
}

async fn all(workers: &mut JoinSet<()>) {
    while workers.join_next().await.is_some() {}
}

async fn requests(used: Arc<Use>) {
    let Use { shared, schedule, session, .. } = &*used;
    while !used.retired.load(Relaxed) {
        let Some(due) = schedule.next(Instant::now()) else {
            // The last request may be due long before the end, and the connection stays until then.
            return over(shared).await;
        };
        time::sleep_until(due.into()).await;
        if session.connection().close_reason().is_some() {
            return;
        }
        // Who is late because of the timer did not wait for the server.
        let now = Instant::now();
        let late = now.saturating_duration_since(due) > TIMER_LAG;
        shared.see(used.number, ClientView::on_request);
        let exchanged = used.exchange(if late { due } else { now }).await;
        shared.see(used.number, ClientView::on_request_over);
        match exchanged {
            Ok(()) => {}
            Err(Failure::Refused) => return,
            Err(Failure::Wrong(_)) if let Some(error) = session.connection().close_reason() => {
                // A connection that is lost counts as that. One that was closed owes an answer.
                if cause::is_wished(&error) {
                    shared.tally.on_request_failed("closed");
                }
                return;
            }
            Err(Failure::Wrong(cause)) => {
                shared.tally.on_request_failed(cause);
                time::sleep(PAUSE).await;
            }
        }
    }
}

/// Why a request does not count.
enum Failure {
    /// The server wants no more requests on this connection; another one may take them.
    Refused,
    Wrong(&'static str),
}

impl From<RequestError> for Failure {
    fn from(error: RequestError) -> Self {
        debug!(%error, "request failed");
        match error {
            RequestError::Stream(StreamError::RemoteClosing) => Self::Refused,
            RequestError::Stream(StreamError::RemoteTerminate { code, .. })
                if code == Code::H3_REQUEST_REJECTED =>
            {
                Self::Refused
            }
            RequestError::Stream(StreamError::RemoteTerminate { .. }) => Self::Wrong("reset"),
            RequestError::Stream(StreamError::ConnectionError(_)) => Self::Wrong("connection"),
            RequestError::Stream(_) => Self::Wrong("stream"),
            RequestError::Request(_) => Self::Wrong("not_sent"),
        }
    }
}

impl Use {
    /// Makes a request and verifies its answer; its latency counts since `since`.
    async fn exchange(&self, since: Instant) -> Result<(), Failure> {
        let size = self.next_size();
        let path = format!("/bytes/{size}");
        let mut answer = self.session.request(Method::GET, &path, Bytes::new()).await?;
        if !answer.head.status().is_success() {
            return Err(Failure::Wrong("status"));
        }
        let backend = answer.head.headers().get(BACKEND_HEADER);
        let backend = backend.and_then(|name| name.to_str().ok()).unwrap_or("unnamed").to_owned();
        let mut received = 0;
        while let Some(piece) = answer.next().await? {
            self.shared.see(self.number, ClientView::on_heard);
            if !pattern::matches(received, &piece) {
                return Err(Failure::Wrong("body"));
            }
            received += piece.len() as u64;
        }
        if received != size {
            return Err(Failure::Wrong("length"));
        }
        let first = self.backend.get_or_init(|| {
            self.shared.see(self.number, |view| view.backend = Some(backend.clone()));
            backend.clone()
        });
        if *first != backend {
            self.shared.tally.on_misrouted();
        }
        self.shared.tally.on_answer(since.elapsed(), received, &backend);
        self.shared.see(self.number, |view| view.requests += 1);
        Ok(())
    }

    fn next_size(&self) -> u64 {
        let sizes = &self.shared.options.sizes;
        let turn = usize::try_from(self.turn.fetch_add(1, Relaxed)).unwrap_or_default();
        sizes.get(turn % sizes.len().max(1)).copied().unwrap_or_default()
    }
}

/// Moves the connection to another socket now and then, for ever.
async fn moves(
    shared: &Shared,
    number: usize,
    endpoint: &Endpoint,
    connection: &quic::driver::Connection,
) {
    let options = &shared.options;
    let mut rebinds = timer(options.rebind_every, phase(shared, number));
    let mut migrations = timer(options.migrate_every, phase(shared, number));
    let (mut here, mut migrated_before) = (shared.local(), 0);
    loop {
        let migrate = tokio::select! {
            () = due(&mut rebinds) => false,
            () = due(&mut migrations) => true,
        };
        let to = if migrate { shared.elsewhere(number, migrated_before) } else { here };
        let Ok(socket) = UdpSocket::bind(to) else { continue };
        migrated_before += u64::from(migrate);
        let address = socket.local_addr().ok();
        here = SocketAddr::new(to.ip(), 0);
        let before = connection.remote_cid();
        let moved = if migrate { endpoint.migrate(socket) } else { endpoint.rebind(socket) };
        if moved.is_err() {
            continue;
        }
        // Without a fresh connection ID it was a change of port, whatever was asked for.
        let migrated = migrate && connection.remote_cid() != before;
        if migrated {
            shared.tally.on_migration();
        } else {
            shared.tally.on_rebind();
        }
        shared.see(number, |view| {
            view.address = address;
            *(if migrated { &mut view.migrations } else { &mut view.rebinds }) += 1;
        });
    }
}

fn timer(every: Option<Duration>, phase: f64) -> Option<time::Interval> {
    let every = every.filter(|every| !every.is_zero())?;
    let first = time::Instant::now() + every.mul_f64(0.5 + phase / 2.0);
    let mut timer = time::interval_at(first, every);
    timer.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
    Some(timer)
}

async fn due(timer: &mut Option<time::Interval>) {
    match timer {
        Some(timer) => drop(timer.tick().await),
        None => std::future::pending().await,
    }
}

/// Where among all clients this one stands, from 0 to 1: they do not act all at once.
fn phase(shared: &Shared, number: usize) -> f64 {
    number as f64 / shared.views.len() as f64
}
