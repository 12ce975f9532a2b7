//! One shard: a core endpoint under one lock, its connections each under their own, and what
//! handles leave for the shard's task.

use std::{
    collections::HashMap,
    fmt,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    task::Waker,
    time::Instant,
};

use bytes::Bytes;
use tokio::sync::Notify;

use super::{sharding::Others, socket::Socket, waiters::ConnectionInner};
use crate::{
    connection_id::ConnectionId,
    transport::{self, ConnectionHandle, Received},
};

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
    pub(super) connections: HashMap<ConnectionHandle, Arc<ConnectionInner>>,
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
}

/// What handles leave for the task. Its lock is taken last, and for a few instructions.
#[derive(Debug, Default)]
struct Inbox {
    /// Connections that were acted on and have something to send, each once.
    acted_on: Vec<Arc<ConnectionInner>>,
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
    ) -> Self {
        let state = State {
            core,
            connections: HashMap::new(),
            address,
            fresh_socket: None,
            others,
            unclaimed,
            abandoned: false,
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
    pub(super) fn look_at(&self, inner: &Arc<ConnectionInner>) {
        // Left already, and not looked at yet.
        if !inner.queued.swap(true, Ordering::Relaxed) {
            self.leave(Some(inner));
        }
    }

    fn leave(&self, inner: Option<&Arc<ConnectionInner>>) {
        let mut inbox = self.inbox();
        inbox.acted_on.extend(inner.cloned());
        let task = if inbox.woken { None } else { inbox.task.clone() };
        inbox.woken = true;
        drop(inbox);
        if let Some(task) = task {
            task.wake();
        }
    }

    /// The task looks now, and wants to be woken by `waker` from now on. What was left for it is
    /// exchanged for `acted_on`, which is empty.
    pub(super) fn on_look(&self, waker: &Waker, acted_on: &mut Vec<Arc<ConnectionInner>>) {
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
    /// Has the core look at connections that handles have acted on.
    pub(super) fn take_acted_on(&mut self, acted_on: &mut Vec<Arc<ConnectionInner>>) {
        for inner in acted_on.drain(..) {
            // Before the core looks: what is done meanwhile is left again.
            inner.queued.store(false, Ordering::Relaxed);
            self.core.look_at(inner.handle);
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
