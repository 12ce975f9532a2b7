//! Connections that are new: the first handle of each, and those that wait to be accepted.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Waker,
    time::Instant,
};

use bytes::Bytes;
use tokio::sync::Notify;

use super::{
    connection::{Connection, Incoming},
    shard::{Shard, State},
    waiters::{ConnectionInner, Waiters},
};
use crate::transport::{ConnectionHandle, Event, SharedConnection, Side};

/// Connections that wait to be accepted; beyond it they are closed. An application that is this
/// far behind has more than it can serve.
const MAX_WAITING: usize = 4096;

/// Connections of all shards of an endpoint that wait to be accepted.
///
/// Its lock is taken while a shard's is held, never the other way round; therefore no connection is
/// dropped under it.
#[derive(Debug, Default)]
pub(super) struct AcceptQueue {
    waiting: Mutex<Waiting>,
    arrived: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    connections: VecDeque<Incoming>,
    closed: bool,
}

impl AcceptQueue {
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

impl State {
    /// Hands the core's events to those who wait for them; `wakers` are for the caller to wake,
    /// without the lock.
    pub(super) fn dispatch(
        &mut self,
        now: Instant,
        shard: &Arc<Shard>,
        accepts: &AcceptQueue,
        wakers: &mut Vec<Waker>,
    ) {
        while let Some((handle, event)) = self.core.poll_event() {
            match self.connections.get(&handle) {
                Some(inner) => inner.waiters().on_event(event, wakers),
                None => self.on_newcomer(now, shard, accepts, handle, event),
            }
        }
    }

    /// Gives a new connection its first handle.
    pub(super) fn adopt(
        &mut self,
        shard: &Arc<Shard>,
        handle: ConnectionHandle,
        waiters: Waiters,
        remote: SocketAddr,
        connection: SharedConnection,
    ) -> Connection {
        let inner = Arc::new(ConnectionInner::new(handle, connection, waiters));
        self.connections.insert(handle, Arc::clone(&inner));
        Connection::new(shard, inner, remote)
    }

    /// A connection without handles has an event: either it is new, or nobody is interested.
    fn on_newcomer(
        &mut self,
        now: Instant,
        shard: &Arc<Shard>,
        accepts: &AcceptQueue,
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
                let mut waiters = Waiters::new(Side::Server);
                waiters.connected = true;
                let accepted = accepts.offer(|| {
                    let new = self.adopt(shard, handle, waiters, remote, shared.clone());
                    Incoming::new(remote, Ok(new))
                });
                if !accepted {
                    shared.lock().close(now, 0, Bytes::from_static(b"overloaded"));
                    self.core.look_at(handle);
                    shard.wake();
                }
            }
            Event::Closed(error) if !connected => {
                accepts.offer(|| Incoming::new(remote, Err(error)));
            }
            _ => {}
        }
    }
}
