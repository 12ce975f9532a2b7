//! One shard: a core endpoint, and who waits for what, under one lock.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Waker,
    time::Instant,
};

use bytes::Bytes;
use tokio::sync::Notify;

use super::{
    connection::{Connection, Incoming},
    link::Link,
    sharding::Others,
    socket::Socket,
};
use crate::{
    ConnectionId,
    transport::{self, ConnectionError, ConnectionHandle, Event, Received, Side},
};

/// Connections that wait to be accepted; beyond it they are closed. An application that is this
/// far behind has more than it can serve.
const MAX_WAITING: usize = 4096;

/// A shard, as handles and its task share it.
#[derive(Debug)]
pub(super) struct Shard {
    state: Mutex<State>,
    /// The last connection is gone.
    pub(super) idle: Notify,
}

/// What is behind the lock.
#[derive(Debug)]
pub(super) struct State {
    pub(super) core: transport::Endpoint,
    pub(super) links: HashMap<ConnectionHandle, Link>,
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
            links: HashMap::new(),
            address,
            fresh_socket: None,
            others,
            unclaimed,
            abandoned: false,
            accepts,
            task: None,
            woken: false,
        };
        Self { state: Mutex::new(state), idle: Notify::new() }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // A panic of one handle's caller leaves the state as valid as any error would.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Has the task look for datagrams to send.
    pub(super) fn wake(&mut self) {
        if !self.woken {
            self.woken = true;
            if let Some(task) = &self.task {
                task.wake_by_ref();
            }
        }
    }

    /// The task looks now, and wants to be woken by `waker` from now on.
    pub(super) fn on_look(&mut self, waker: &Waker) {
        self.woken = false;
        if !self.task.as_ref().is_some_and(|task| task.will_wake(waker)) {
            self.task = Some(waker.clone());
        }
    }

    /// A connection to act on, and what is to be said once it is over.
    pub(super) fn connection(
        &mut self,
        handle: ConnectionHandle,
    ) -> Result<(&mut transport::Connection, &mut Link), ConnectionError> {
        let link = self.links.get_mut(&handle);
        let link = link.ok_or(ConnectionError::ClosedLocally)?;
        match self.core.connection_mut(handle) {
            Some(connection) => Ok((connection, link)),
            None => Err(link.error.clone().unwrap_or(ConnectionError::ClosedLocally)),
        }
    }

    /// Gives a new connection of ours its first handle.
    pub(super) fn adopt(
        &mut self,
        shard: &Arc<Shard>,
        handle: ConnectionHandle,
        remote: SocketAddr,
    ) -> Connection {
        let link = Link::new(Side::Client);
        let connection = Connection::new(shard, handle, remote, Arc::clone(&link.signals));
        self.links.insert(handle, link);
        connection
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
            match self.links.get_mut(&handle) {
                Some(link) => link.on_event(event, wakers),
                None => self.on_newcomer(now, shard, handle, event),
            }
        }
    }

    /// Closes all connections.
    pub(super) fn close_all(&mut self, now: Instant, code: u64, reason: &Bytes) {
        self.core.set_server_config(None);
        let handles: Vec<_> = self.core.connections().collect();
        for handle in handles {
            if let Some(connection) = self.core.connection_mut(handle) {
                connection.close(now, code, reason.clone());
            }
        }
        self.wake();
    }

    /// A connection without handles has an event: either it is new, or nobody is interested.
    fn on_newcomer(
        &mut self,
        now: Instant,
        shard: &Arc<Shard>,
        handle: ConnectionHandle,
        event: Event,
    ) {
        let Some(connection) = self.core.connection(handle) else { return };
        if connection.side() != Side::Server {
            return;
        }
        let remote = connection.path().remote;
        match event {
            Event::Connected => {
                let mut link = Link::new(Side::Server);
                link.connected = true;
                let accepted = self.accepts.offer(|| {
                    let new = Connection::new(shard, handle, remote, Arc::clone(&link.signals));
                    Incoming::new(remote, Ok(new))
                });
                if accepted {
                    self.links.insert(handle, link);
                } else if let Some(connection) = self.core.connection_mut(handle) {
                    connection.close(now, 0, Bytes::from_static(b"overloaded"));
                    self.wake();
                }
            }
            Event::Closed(error) if !connection.is_connected() => {
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
