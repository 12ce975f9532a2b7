//! What all handles of a connection share: it acts on the connection for them, and closes it when
//! the last of them is gone.

use std::{fmt, net::SocketAddr, sync::Arc, time::Instant};

use bytes::Bytes;
use tokio::sync::Notify;

use super::{
    link::{Link, Signals, Tie},
    shard::Shard,
};
use crate::transport::{self, ConnectionError};

/// What all handles and streams of a connection share. Closes it at the end.
pub(super) struct Owner {
    pub(super) shard: Arc<Shard>,
    pub(super) tie: Arc<Tie>,
    pub(super) signals: Arc<Signals>,
    pub(super) first_remote: SocketAddr,
}

impl Owner {
    pub(super) fn new(shard: &Arc<Shard>, tie: Arc<Tie>, first_remote: SocketAddr) -> Self {
        let (shard, signals) = (Arc::clone(shard), Arc::clone(&tie.link().signals));
        Self { shard, tie, signals, first_remote }
    }

    /// Acts on the connection, and has the task look if there is something to send then.
    pub(super) fn act<R>(
        &self,
        act: impl FnOnce(&mut transport::Connection, &mut Link) -> R,
    ) -> Result<R, ConnectionError> {
        let mut link = self.tie.link();
        let mut connection = self.tie.connection.lock();
        if connection.is_gone() {
            let known = link.error.as_ref().or(connection.error());
            return Err(known.cloned().unwrap_or(ConnectionError::ClosedLocally));
        }
        let result = act(&mut connection, &mut link);
        let output = connection.has_output();
        drop(connection);
        drop(link);
        if output {
            self.shard.look_at(&self.tie);
        }
        Ok(result)
    }

    /// Acts on the connection again whenever `signal` says so, until that has a result.
    pub(super) async fn until<R>(
        &self,
        signal: &Notify,
        mut act: impl FnMut(&mut transport::Connection, &mut Link) -> Option<R>,
    ) -> Result<R, ConnectionError> {
        loop {
            let signalled = signal.notified();
            let result = self.act(|connection, link| {
                let result = act(connection, link);
                // What there is can be had also when the connection is over.
                result.map(Ok).or_else(|| link.error.clone().map(Err))
            });
            if let Some(result) = result? {
                return result;
            }
            signalled.await;
        }
    }

    pub(super) fn with_link<R>(&self, look: impl FnOnce(&mut Link) -> R) -> R {
        look(&mut self.tie.link())
    }

    pub(super) fn signals(&self) -> &Signals {
        &self.signals
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let mut state = self.shard.lock();
        state.ties.remove(&self.tie.handle);
        if let Some(mut connection) = state.core.connection_mut(self.tie.handle) {
            connection.close(Instant::now(), 0, Bytes::new());
        }
        drop(state);
        self.shard.wake();
    }
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Owner").field("handle", &self.tie.handle).finish_non_exhaustive()
    }
}
