//! Handles of connections.

use std::{
    future::{Future, IntoFuture},
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use bytes::Bytes;
use rustls::pki_types::CertificateDer;

use super::{
    error::SendDatagramError,
    owner::Owner,
    shard::Shard,
    stream::{RecvStream, SendStream},
    waiters::{ConnectionInner, Waiters},
};
use crate::{
    connection_id::ConnectionId,
    transport::{self, ConnectionError, Dir, MigrateError, PathInfo, Side, Stats, StreamId},
};

/// A connection whose handshake goes on. Resolves when that is done.
#[derive(Debug)]
#[must_use = "dropping it gives the connection up"]
pub struct Connecting {
    connection: Option<Connection>,
}

impl Connecting {
    pub(super) const fn new(connection: Connection) -> Self {
        Self { connection: Some(connection) }
    }
}

impl Future for Connecting {
    type Output = Result<Connection, ConnectionError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(connection) = self.connection.take() else {
            return Poll::Ready(Err(ConnectionError::Internal("polled after it was done")));
        };
        let outcome =
            connection.owner.with_waiters(|waiters| match (&waiters.error, waiters.connected) {
                (Some(error), _) => Some(Err(error.clone())),
                (None, true) => Some(Ok(())),
                (None, false) => {
                    waiters.connecting = Some(cx.waker().clone());
                    None
                }
            });
        match outcome {
            Some(result) => Poll::Ready(result.map(|()| connection)),
            None => {
                self.connection = Some(connection);
                Poll::Pending
            }
        }
    }
}

/// A client's handshake with us, done or failed. Awaiting it tells which.
#[derive(Debug)]
#[must_use = "dropping it closes the connection"]
pub struct Incoming {
    remote: SocketAddr,
    outcome: Result<Connection, ConnectionError>,
}

impl Incoming {
    pub(super) const fn new(
        remote: SocketAddr,
        outcome: Result<Connection, ConnectionError>,
    ) -> Self {
        Self { remote, outcome }
    }

    /// The client's address.
    #[must_use]
    pub const fn remote_address(&self) -> SocketAddr {
        self.remote
    }
}

impl IntoFuture for Incoming {
    type Output = Result<Connection, ConnectionError>;
    type IntoFuture = std::future::Ready<Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        std::future::ready(self.outcome)
    }
}

/// A connection. Clones are handles of the same one.
#[derive(Clone, Debug)]
pub struct Connection {
    pub(super) owner: Arc<Owner>,
}

impl Connection {
    pub(super) fn new(
        shard: &Arc<Shard>,
        inner: Arc<ConnectionInner>,
        first_remote: SocketAddr,
    ) -> Self {
        Self { owner: Arc::new(Owner::new(shard, inner, first_remote)) }
    }

    // Streams.

    /// Opens a stream that carries data both ways. Waits while the peer allows no more.
    ///
    /// # Errors
    ///
    /// When the connection is over.
    pub async fn open_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        let id = self.open(Dir::Bi).await?;
        Ok((SendStream::new(&self.owner, id), RecvStream::new(&self.owner, id)))
    }

    /// Opens a stream that carries data to the peer. Waits while the peer allows no more.
    ///
    /// # Errors
    ///
    /// When the connection is over.
    pub async fn open_uni(&self) -> Result<SendStream, ConnectionError> {
        Ok(SendStream::new(&self.owner, self.open(Dir::Uni).await?))
    }

    /// The next stream that the peer opens both ways.
    ///
    /// # Errors
    ///
    /// When the connection is over.
    pub async fn accept_bi(&self) -> Result<(SendStream, RecvStream), ConnectionError> {
        let id = self.accept(Dir::Bi).await?;
        Ok((SendStream::new(&self.owner, id), RecvStream::new(&self.owner, id)))
    }

    /// The next stream that the peer opens one way.
    ///
    /// # Errors
    ///
    /// When the connection is over.
    pub async fn accept_uni(&self) -> Result<RecvStream, ConnectionError> {
        Ok(RecvStream::new(&self.owner, self.accept(Dir::Uni).await?))
    }

    // Datagrams.

    /// Sends a message that arrives once or not at all.
    ///
    /// # Errors
    ///
    /// [`SendDatagramError`] says what is in the way.
    pub fn send_datagram(&self, message: Bytes) -> Result<(), SendDatagramError> {
        self.owner.act(|connection, _| connection.send_datagram(message))??;
        Ok(())
    }

    /// [`Self::send_datagram`], waiting for room.
    ///
    /// # Errors
    ///
    /// [`SendDatagramError`], but never that the buffer is full.
    pub async fn send_datagram_wait(&self, message: Bytes) -> Result<(), SendDatagramError> {
        self.owner
            .until(&self.owner.signals.datagram_room, |connection, _| {
                match connection.send_datagram(message.clone()) {
                    Err(transport::SendDatagramError::Blocked) => None,
                    result => Some(result),
                }
            })
            .await??;
        Ok(())
    }

    /// The next message from the peer.
    ///
    /// # Errors
    ///
    /// When the connection is over.
    pub async fn read_datagram(&self) -> Result<Bytes, ConnectionError> {
        let signal = &self.owner.signals.datagram;
        self.owner.until(signal, |connection, _| connection.receive_datagram()).await
    }

    /// Octets that a message may have now; `None` when the peer takes none.
    #[must_use]
    pub fn max_datagram_size(&self) -> Option<usize> {
        self.look(transport::Connection::max_datagram).flatten()
    }

    // The connection as a whole.

    /// Closes with a code and words of the application. What was not delivered is lost.
    pub fn close(&self, code: u64, reason: &[u8]) {
        let reason = Bytes::copy_from_slice(reason);
        // An error says that it is closed already.
        let _ = self.owner.act(|connection, _| connection.close(Instant::now(), code, reason));
    }

    /// Closes like [`Self::close`] once the peer has everything that was written, which
    /// [`Self::closed`] waits for. A peer that does not take it keeps the connection open.
    pub fn close_when_delivered(&self, code: u64, reason: &[u8]) {
        let reason = Bytes::copy_from_slice(reason);
        // An error says that it is closed already.
        let _ = self.owner.act(|connection, _| {
            connection.close_when_delivered(Instant::now(), code, reason);
        });
    }

    /// Waits until the connection is over, and says why.
    pub async fn closed(&self) -> ConnectionError {
        loop {
            let closed = self.owner.signals.closed.notified();
            if let Some(error) = self.close_reason() {
                return error;
            }
            closed.await;
        }
    }

    /// Why the connection is over, if it is.
    #[must_use]
    pub fn close_reason(&self) -> Option<ConnectionError> {
        self.owner.with_waiters(|waiters| waiters.error.clone())
    }

    /// Goes on from another address of ours, `local` where the socket has several, with a fresh
    /// connection ID. [`Endpoint::migrate`](super::Endpoint::migrate) moves to another socket.
    ///
    /// # Errors
    ///
    /// [`MigrateError`] when that is not possible now.
    pub fn migrate(&self, local: Option<IpAddr>) -> Result<(), MigrateError> {
        let outcome = self.owner.act(|connection, _| connection.migrate(Instant::now(), local));
        outcome.unwrap_or(Err(MigrateError::NotEstablished))
    }

    /// Starts a key update as soon as one is allowed.
    pub fn update_keys(&self) {
        let _ = self.owner.act(|connection, _| {
            connection.update_keys();
            // A packet has to carry the new phase to the peer.
            connection.ping();
        });
    }

    /// Sends a PING, so that an answer comes.
    pub fn ping(&self) {
        let _ = self.owner.act(|connection, _| connection.ping());
    }

    // What reads.

    /// Which side of the connection this is.
    #[must_use]
    pub fn side(&self) -> Option<Side> {
        self.look(transport::Connection::side)
    }

    /// The peer's address.
    #[must_use]
    pub fn remote_address(&self) -> SocketAddr {
        self.path().map_or(self.owner.first_remote, |path| path.remote)
    }

    /// Where the client is, as a Retry token has told: its true address, where a balancer made the
    /// token and rewrites addresses. `None` without such a token, and once the client has moved.
    #[must_use]
    pub fn sealed_client(&self) -> Option<SocketAddr> {
        self.owner.shard.lock().core.sealed_client(self.owner.inner.handle)
    }

    /// How often the peer was found at another address so far.
    #[must_use]
    pub fn path_changes(&self) -> u64 {
        self.owner.with_waiters(|waiters| waiters.moves)
    }

    /// The active path; `None` once the connection is forgotten.
    #[must_use]
    pub fn path(&self) -> Option<PathInfo> {
        self.look(transport::Connection::path)
    }

    /// Figures so far; `None` once the connection is forgotten.
    #[must_use]
    pub fn stats(&self) -> Option<Stats> {
        self.look(transport::Connection::stats)
    }

    /// The application protocol.
    #[must_use]
    pub fn alpn(&self) -> Option<Vec<u8>> {
        self.look(|connection| connection.alpn().map(<[u8]>::to_vec)).flatten()
    }

    /// The server name that the client asked for, on a server.
    #[must_use]
    pub fn server_name(&self) -> Option<String> {
        self.look(|connection| connection.server_name().map(str::to_owned)).flatten()
    }

    /// The peer's certificate chain.
    #[must_use]
    pub fn peer_certificates(&self) -> Option<Vec<CertificateDer<'static>>> {
        self.look(|connection| connection.peer_certificates().map(<[_]>::to_vec)).flatten()
    }

    /// The cipher suite.
    #[must_use]
    pub fn cipher_suite(&self) -> Option<rustls::CipherSuite> {
        self.look(transport::Connection::cipher_suite).flatten()
    }

    /// Whether the TLS session is a resumed one.
    #[must_use]
    pub fn is_resumed(&self) -> bool {
        self.look(transport::Connection::is_resumed).unwrap_or(false)
    }

    /// Fills `out` with key material that both sides derive alike (RFC 5705).
    ///
    /// # Errors
    ///
    /// When the connection is over.
    pub fn export_keying_material(
        &self,
        out: &mut [u8],
        label: &[u8],
        context: Option<&[u8]>,
    ) -> Result<(), rustls::Error> {
        let exported =
            self.look(|connection| connection.export_keying_material(out, label, context));
        exported.unwrap_or(Err(rustls::Error::HandshakeNotComplete))
    }

    /// Our connection IDs that the peer may use.
    #[must_use]
    pub fn local_cids(&self) -> Vec<ConnectionId> {
        self.look(|connection| connection.local_cids().collect()).unwrap_or_default()
    }

    /// The connection ID that packets to the peer carry now.
    #[must_use]
    pub fn remote_cid(&self) -> Option<ConnectionId> {
        self.look(transport::Connection::remote_cid)
    }

    // Private parts.

    async fn open(&self, dir: Dir) -> Result<StreamId, ConnectionError> {
        let signal = self.owner.signals.available(dir);
        let open = |connection: &mut transport::Connection, waiters: &mut Waiters| {
            let id = connection.open(dir)?;
            waiters.add_sender(id);
            Some(id)
        };
        self.owner.until(signal, open).await
    }

    async fn accept(&self, dir: Dir) -> Result<StreamId, ConnectionError> {
        let signal = self.owner.signals.opened(dir);
        let accept = |connection: &mut transport::Connection, waiters: &mut Waiters| {
            let id = connection.accept(dir)?;
            if dir == Dir::Bi {
                waiters.add_sender(id);
            }
            Some(id)
        };
        self.owner.until(signal, accept).await
    }

    fn look<R>(&self, look: impl FnOnce(&transport::Connection) -> R) -> Option<R> {
        let connection = self.owner.inner.connection.lock();
        (!connection.is_gone()).then(|| look(&connection))
    }
}
