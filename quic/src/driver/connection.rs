//! A connection for an application: open and accept streams, send and receive datagrams, close.

use std::time::Instant;

use bytes::Bytes;
use rustls::pki_types::CertificateDer;

use super::{
    state::Shareholder,
    stream::{RecvStream, SendStream},
};
use crate::transport::{
    self, ConnectionError, Dir, MigrateError, PathInfo, SendDatagramError, Stats, StreamId,
};

/// A connection whose handshake is complete. Clones are the same connection; when the last one and
/// its last stream are dropped, it closes with code 0.
#[derive(Clone)]
pub struct Connection {
    pub(super) inner: Shareholder,
}

impl Connection {
    /// Opens a bidirectional stream, waiting until the peer allows one.
    ///
    /// # Errors
    ///
    /// Why the connection is over.
    pub async fn open_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        let id = self.open(Dir::Bi).await?;
        Ok((SendStream::new(self.inner.clone(), id), RecvStream::new(self.inner.clone(), id)))
    }

    /// Opens a unidirectional stream, waiting until the peer allows one.
    ///
    /// # Errors
    ///
    /// Why the connection is over.
    pub async fn open_uni(&self) -> Result<SendStream, ConnectionError> {
        let id = self.open(Dir::Uni).await?;
        Ok(SendStream::new(self.inner.clone(), id))
    }

    /// Waits for a bidirectional stream of the peer's.
    ///
    /// # Errors
    ///
    /// Why the connection is over.
    pub async fn accept_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        let id = self.wait(|connection| connection.accept(Dir::Bi)).await?;
        Ok((SendStream::new(self.inner.clone(), id), RecvStream::new(self.inner.clone(), id)))
    }

    /// Waits for a unidirectional stream of the peer's.
    ///
    /// # Errors
    ///
    /// Why the connection is over.
    pub async fn accept_uni(&self) -> Result<RecvStream, ConnectionError> {
        let id = self.wait(|connection| connection.accept(Dir::Uni)).await?;
        Ok(RecvStream::new(self.inner.clone(), id))
    }

    /// Sends a message that arrives once or not at all, waiting for room.
    ///
    /// # Errors
    ///
    /// [`SendDatagramError`] when it can never be sent; [`SendDatagramError::Unsupported`] too when
    /// the connection is over.
    pub async fn send_datagram(&self, message: Bytes) -> Result<(), SendDatagramError> {
        let sent = self
            .wait(|connection| match connection.send_datagram(message.clone()) {
                Err(SendDatagramError::Blocked) => None,
                result => Some(result),
            })
            .await;
        sent.unwrap_or(Err(SendDatagramError::Unsupported))
    }

    /// Waits for a message.
    ///
    /// # Errors
    ///
    /// Why the connection is over.
    pub async fn read_datagram(&self) -> Result<Bytes, ConnectionError> {
        self.wait(transport::Connection::receive_datagram).await
    }

    /// Octets a message may have now; `None` when the peer takes none.
    #[must_use]
    pub fn max_datagram_size(&self) -> Option<usize> {
        self.with(|connection| connection.max_datagram()).flatten()
    }

    /// Closes at once; what was not delivered is lost.
    pub fn close(&self, code: u64, reason: &[u8]) {
        let reason = Bytes::copy_from_slice(reason);
        self.with(|connection| connection.close(Instant::now(), code, reason));
    }

    /// Waits until the connection is over, and says why.
    pub async fn closed(&self) -> ConnectionError {
        let handle = self.inner.handle;
        self.inner.shared.until(&self.inner.changed, |state| state.error(handle)).await
    }

    /// Why the connection is over, if it is.
    #[must_use]
    pub fn close_reason(&self) -> Option<ConnectionError> {
        self.inner.shared.lock().error(self.inner.handle)
    }

    /// Starts a key update as soon as one is allowed.
    pub fn force_key_update(&self) {
        self.with(transport::Connection::update_keys);
    }

    /// Moves to another local address, after the endpoint's socket was changed.
    ///
    /// # Errors
    ///
    /// [`MigrateError`] when that is not possible.
    pub fn migrate(&self) -> Result<(), MigrateError> {
        self.with(|connection| connection.migrate(Instant::now(), None))
            .unwrap_or(Err(MigrateError::NotEstablished))
    }

    /// The active path.
    #[must_use]
    pub fn path(&self) -> Option<PathInfo> {
        self.with(|connection| connection.path())
    }

    /// Figures so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.with(|connection| connection.stats()).unwrap_or_default()
    }

    /// The application protocol that was negotiated.
    #[must_use]
    pub fn alpn(&self) -> Option<Vec<u8>> {
        self.with(|connection| connection.alpn().map(<[u8]>::to_vec)).flatten()
    }

    /// Whether the TLS session is a resumed one.
    #[must_use]
    pub fn is_resumed(&self) -> bool {
        self.with(|connection| connection.is_resumed()).unwrap_or(false)
    }

    /// The certificate chain of the peer.
    #[must_use]
    pub fn peer_certificates(&self) -> Option<Vec<CertificateDer<'static>>> {
        self.with(|connection| connection.peer_certificates().map(<[_]>::to_vec)).flatten()
    }

    async fn open(&self, dir: Dir) -> Result<StreamId, ConnectionError> {
        self.wait(|connection| connection.open(dir)).await
    }

    /// Waits until `poll` gives something, or the connection is over.
    async fn wait<T>(
        &self,
        mut poll: impl FnMut(&mut transport::Connection) -> Option<T>,
    ) -> Result<T, ConnectionError> {
        let Shareholder { shared, handle, changed } = &self.inner;
        let value = shared
            .until(changed, |state| {
                if let Some(error) = state.error(*handle) {
                    return Some(Err(error));
                }
                let Some(connection) = state.endpoint.connection_mut(*handle) else {
                    return Some(Err(ConnectionError::Internal("a connection that is forgotten")));
                };
                poll(connection).map(Ok)
            })
            .await;
        shared.work.notify_one();
        value
    }

    fn with<T>(&self, act: impl FnOnce(&mut transport::Connection) -> T) -> Option<T> {
        let mut state = self.inner.shared.lock();
        let done = state.endpoint.connection_mut(self.inner.handle).map(act);
        self.inner.shared.work.notify_one();
        done
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Connection").field(&self.inner.handle).finish()
    }
}
