//! One shard: a core endpoint under one lock, its connections each under their own, and what
//! handles leave for the shard's task.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    task::Waker,
    time::Instant,
};

use bytes::Bytes;
use tokio::sync::Notify;

use super::{
    connection::{Connection, Incoming},
    link::{Link, Tie},
    sharding::Others,
    socket::Socket,
};
use crate::{
    connection_id::ConnectionId,
    transport::{self, ConnectionHandle, Event, Received, SharedConnection, Side},
};

/// Connections that wait to be accepted; beyond it they are closed. An application that is this
/// far behind has more than it can serve.
const MAX_WAITING: usize = 4096;

/// A shard, as handles and its task share it.
#[derive(Debug)]
pub(super) struct Shard {
    state: Mutex<State>,
    inbox: Mutex<Inbox>,
    /// The last connection is gone.
    pub(super) idle: Notify,
}

/// What is behind the lock.
#[derive(Debug)]
pub(super) struct State {
    pub(super) core: transport::Endpoint,
    /// Connections that the application has handles of.
    pub(super) ties: HashMap<ConnectionHandle, Arc<Tie>>,
    /// Where the socket is.
    pub(super) address: SocketAddr,
    /// A socket to use from now on.
    pub(super) fresh_socket: Option<Socket>,
    /// Present where the endpoint has several shards.
    pub(super) others: Option<Others>,
    /// Who counts datagrams of connections that are not here.
    unclaimed: Option<Unclaimed>,
    /// No endpoint handle is left.
    pub(super) abandoned: bool,
    accepts: Arc<Accepts>,
}

/// What handles leave for the task. Its lock is taken last, and for a few instructions.
#[derive(Debug, Default)]
struct Inbox {
    /// Connections that were acted on and have something to send, each once.
    acted_on: Vec<Arc<Tie>>,
    task: Option<Waker>,
    /// The task was woken and has not looked yet.
    woken: bool,
}

impl Shard {
    pub(super) fn new(
        core: transport::Endpoint,
        address: SocketAddr,
        others: Option<Others>,
        unclaimed: Option<Unclaimed>,
        accepts: Arc<Accepts>,
    ) -> Self {
        let state = State {
            core,
            ties: HashMap::new(),
            address,
            fresh_socket: None,
            others,
            unclaimed,
            abandoned: false,
            accepts,
        };
        Self { state: Mutex::new(state), inbox: Mutex::default(), idle: Notify::new() }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // A panic of one handle's caller leaves the state as valid as any error would.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the task look for something to do.
    pub(super) fn wake(&self) {
        self.leave(None);
    }

    /// Has the task look at a connection that was acted on.
    pub(super) fn look_at(&self, tie: &Arc<Tie>) {
        // Left already, and not looked at yet.
        if !tie.left.swap(true, Ordering::Relaxed) {
            self.leave(Some(tie));
        }
    }

    fn leave(&self, tie: Option<&Arc<Tie>>) {
        let mut inbox = self.inbox();
        inbox.acted_on.extend(tie.cloned());
        let task = if inbox.woken { None } else { inbox.task.clone() };
        inbox.woken = true;
        drop(inbox);
        if let Some(task) = task {
            task.wake();
        }
    }

    /// The task looks now, and wants to be woken by `waker` from now on. What was left for it is
    /// exchanged for `acted_on`, which is empty.
    pub(super) fn on_look(&self, waker: &Waker, acted_on: &mut Vec<Arc<Tie>>) {
        let mut inbox = self.inbox();
        inbox.woken = false;
        std::mem::swap(&mut inbox.acted_on, acted_on);
        if !inbox.task.as_ref().is_some_and(|task| task.will_wake(waker)) {
            inbox.task = Some(waker.clone());
        }
    }

    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Gives a new connection its first handle.
    pub(super) fn adopt(
        &mut self,
        shard: &Arc<Shard>,
        handle: ConnectionHandle,
        link: Link,
        remote: SocketAddr,
        connection: SharedConnection,
    ) -> Connection {
        let tie = Arc::new(Tie::new(handle, connection, link));
        self.ties.insert(handle, Arc::clone(&tie));
        Connection::new(shard, tie, remote)
    }

    /// Has the core look at connections that handles have acted on.
    pub(super) fn take_acted_on(&mut self, acted_on: &mut Vec<Arc<Tie>>) {
        for tie in acted_on.drain(..) {
            // Before the core looks: what is done meanwhile is left again.
            tie.left.store(false, Ordering::Relaxed);
            self.core.look_at(tie.handle);
        }
    }

    /// Takes a datagram from the socket.
    pub(super) fn handle_datagram(&mut self, now: Instant, from: Received, datagram: &mut [u8]) {
        let elsewhere = self.others.as_mut().is_some_and(|others| others.hand_over(from, datagram));
        if !elsewhere {
            self.take_datagram(now, from, datagram);
        }
    }

    /// Takes a datagram that is for this shard and no other.
    pub(super) fn take_datagram(&mut self, now: Instant, from: Received, datagram: &mut [u8]) {
        self.core.handle_datagram(now, from, datagram);
        if let (Some(id), Some(unclaimed)) = (self.core.take_unclaimed(), &self.unclaimed) {
            unclaimed.on_datagram(&id);
        }
    }

    /// Hands the core's events to those who wait for them; `wakers` are for the caller to wake,
    /// without the lock.
    pub(super) fn dispatch(&mut self, now: Instant, shard: &Arc<Shard>, wakers: &mut Vec<Waker>) {
        while let Some((handle, event)) = self.core.poll_event() {
            match self.ties.get(&handle) {
                Some(tie) => tie.link().on_event(event, wakers),
                None => self.on_newcomer(now, shard, handle, event),
            }
        }
    }

    /// Closes all connections; the task has to be woken.
    pub(super) fn close_all(&mut self, now: Instant, code: u64, reason: &Bytes) {
        self.core.set_server_config(None);
        let handles: Vec<_> = self.core.connections().collect();
        for handle in handles {
            if let Some(mut connection) = self.core.connection_mut(handle) {
                connection.close(now, code, reason.clone());
            }
        }
    }

    /// A connection without handles has an event: either it is new, or nobody is interested.
    fn on_newcomer(
        &mut self,
        now: Instant,
        shard: &Arc<Shard>,
        handle: ConnectionHandle,
        event: Event,
    ) {
        let Some(shared) = self.core.share(handle) else { return };
        let (side, connected, remote) = {
            let connection = shared.lock();
            (connection.side(), connection.is_connected(), connection.path().remote)
        };
        if side != Side::Server {
            return;
        }
        match event {
            Event::Connected => {
                let accepts = Arc::clone(&self.accepts);
                let mut link = Link::new(Side::Server);
                link.connected = true;
                let accepted = accepts.offer(|| {
                    let new = self.adopt(shard, handle, link, remote, shared.clone());
                    Incoming::new(remote, Ok(new))
                });
                if !accepted {
                    shared.lock().close(now, 0, Bytes::from_static(b"overloaded"));
                    self.core.look_at(handle);
                    shard.wake();
                }
            }
            Event::Closed(error) if !connected => {
                self.accepts.offer(|| Incoming::new(remote, Err(error)));
            }
            _ => {}
        }
    }
}

/// Is told whom each datagram was meant for that no connection of the endpoint is: misrouted ones,
/// and those that come after their connection has ended. Runs in the task of the endpoint and under
/// its lock: it may count, and nothing slower.
#[derive(Clone)]
pub struct Unclaimed(Arc<dyn Fn(&ConnectionId) + Send + Sync>);

impl Unclaimed {
    /// Tells `observe` the destination connection ID; where the header is short and does not say
    /// how long that is, up to 20 octets that start with it.
    pub fn new(observe: impl Fn(&ConnectionId) + Send + Sync + 'static) -> Self {
        Self(Arc::new(observe))
    }

    fn on_datagram(&self, id: &ConnectionId) {
        (self.0)(id);
    }
}

impl fmt::Debug for Unclaimed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Unclaimed")
    }
}

/// Connections of all shards of an endpoint that wait to be accepted.
///
/// Its lock is taken while a shard's is held, never the other way round; therefore no connection is
/// dropped under it.
#[derive(Debug, Default)]
pub(super) struct Accepts {
    waiting: Mutex<Waiting>,
    arrived: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    connections: VecDeque<Incoming>,
    closed: bool,
}

impl Accepts {
    /// The next one; `None` once the endpoint is closed.
    pub(super) async fn next(&self) -> Option<Incoming> {
        loop {
            let arrived = self.arrived.notified();
            {
                let mut waiting = self.lock();
                if waiting.closed {
                    return None;
                }
                if let Some(next) = waiting.connections.pop_front() {
                    return Some(next);
                }
            }
            arrived.await;
        }
    }

    /// No more are accepted. What waited is returned.
    pub(super) fn close(&self) -> VecDeque<Incoming> {
        let mut waiting = self.lock();
        waiting.closed = true;
        self.arrived.notify_waiters();
        std::mem::take(&mut waiting.connections)
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    fn offer(&self, new: impl FnOnce() -> Incoming) -> bool {
        let mut waiting = self.lock();
        let room = !waiting.closed && waiting.connections.len() < MAX_WAITING;
        if room {
            waiting.connections.push_back(new());
            self.arrived.notify_one();
        }
        room
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
