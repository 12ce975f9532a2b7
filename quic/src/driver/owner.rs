//! What all handles of a connection share: it acts on the connection for them, and closes it when
//! the last of them is gone.

use std::{fmt, net::SocketAddr, sync::Arc, time::Instant};

use bytes::Bytes;
use tokio::sync::Notify;

use super::{
    shard::Shard,
    waiters::{ConnectionInner, Signals, Waiters},
};
use crate::transport::{self, ConnectionError};

/// What all handles and streams of a connection share. Closes it at the end.
pub(super) struct Owner {
    pub(super) shard: Arc<Shard>,
    pub(super) inner: Arc<ConnectionInner>,
    pub(super) signals: Arc<Signals>,
    pub(super) first_remote: SocketAddr,
}

impl Owner {
    pub(super) fn new(
        shard: &Arc<Shard>,
        inner: Arc<ConnectionInner>,
        first_remote: SocketAddr,
    ) -> Self {
        let (shard, signals) = (Arc::clone(shard), Arc::clone(&inner.waiters().signals));
        Self { shard, inner, signals, first_remote }
    }

    /// Acts on the connection, and has the task look if there is something to send then.
    pub(super) fn act<R>(
        &self,
        act: impl FnOnce(&mut transport::Connection, &mut Waiters) -> R,
    ) -> Result<R, ConnectionError> {
        let mut waiters = self.inner.waiters();
        let mut connection = self.inner.connection.lock();
        if connection.is_gone() {
            let known = waiters.error.as_ref().or(connection.error());
            return Err(known.cloned().unwrap_or(ConnectionError::ClosedLocally));
        }
        let result = act(&mut connection, &mut waiters);
        let output = connection.has_output();
        drop(connection);
        drop(waiters);
        if output {
            self.shard.look_at(&self.inner);
        }
        Ok(result)
    }

    /// Acts on the connection again whenever `signal` says so, until that has a result.
    pub(super) async fn until<R>(
        &self,
        signal: &Notify,
        mut act: impl FnMut(&mut transport::Connection, &mut Waiters) -> Option<R>,
    ) -> Result<R, ConnectionError> {
        loop {
            let signalled = signal.notified();
            let result = self.act(|connection, waiters| {
                let result = act(connection, waiters);
                // What there is can be had also when the connection is over.
                result.map(Ok).or_else(|| waiters.error.clone().map(Err))
            });
            if let Some(result) = result? {
                return result;
            }
            signalled.await;
        }
    }

    pub(super) fn with_waiters<R>(&self, look: impl FnOnce(&mut Waiters) -> R) -> R {
        look(&mut self.inner.waiters())
    }

    pub(super) fn signals(&self) -> &Signals {
        &self.signals
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let mut state = self.shard.lock();
        state.connections.remove(&self.inner.handle);
        if let Some(mut connection) = state.core.connection_mut(self.inner.handle) {
            connection.close(Instant::now(), 0, Bytes::new());
        }
        drop(state);
        self.shard.wake();
    }
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Owner").field("handle", &self.inner.handle).finish_non_exhaustive()
    }
}
