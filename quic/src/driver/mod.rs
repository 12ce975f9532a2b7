//! The transport on tokio and UDP sockets.
//!
//! The shell around the [transport](crate::transport): it reads the clock, draws entropy and moves
//! datagrams, with segmentation and receive offload, ECN marks and local addresses where the kernel
//! has them. An [`Endpoint`] has one socket and one task that drives it; handles are cheap to clone
//! and may be used from any task. Back-pressure is everywhere: a write waits for the peer's limits
//! and for the send buffer, what is not read holds the peer back, and what cannot be queued waits.
//!
//! A server on several cores runs one endpoint per core, each with a socket of its own and
//! connection IDs that name it (a server ID or a nonce partition of its own).

mod connection;
mod socket;
mod state;
mod stream;

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::{Instant, SystemTime},
};

pub use connection::Connection;
use socket::Socket;
use state::{Shared, Shareholder};
pub use stream::{RecvStream, SendStream, StreamError};

use crate::transport::{
    self, CidIssuer, ClientConfig, ConnectError, ConnectionError, EndpointConfig, ServerConfig,
};

/// A socket and its connections.
pub struct Endpoint {
    shared: Arc<Shared>,
}

/// Why a connection could not be made.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ConnectingError {
    /// It could not even be started.
    #[error(transparent)]
    Start(#[from] ConnectError),
    /// The handshake failed.
    #[error(transparent)]
    Handshake(#[from] ConnectionError),
}

impl Endpoint {
    /// An endpoint on `socket`, with its driver on the current tokio runtime.
    ///
    /// # Errors
    ///
    /// When the socket does not do what QUIC needs.
    pub fn new(socket: UdpSocket, config: EndpointConfig) -> io::Result<Self> {
        let socket = Arc::new(Socket::new(socket)?);
        let endpoint = transport::Endpoint::new(config, Instant::now(), SystemTime::now());
        let shared = Arc::new(Shared::new(endpoint, socket));
        tokio::spawn(Arc::clone(&shared).drive());
        Ok(Self { shared })
    }

    /// An endpoint for clients, bound to `local`.
    ///
    /// # Errors
    ///
    /// When there is no such socket, or no entropy.
    pub fn client(local: SocketAddr) -> io::Result<Self> {
        Self::new(UdpSocket::bind(local)?, EndpointConfig::client(seed()?))
    }

    /// An endpoint for servers, bound to `local`, with connection IDs from `cids`.
    ///
    /// # Errors
    ///
    /// When there is no such socket, or no entropy.
    pub fn server(local: SocketAddr, server: ServerConfig, cids: CidIssuer) -> io::Result<Self> {
        Self::new(UdpSocket::bind(local)?, EndpointConfig::server(server, cids, seed()?))
    }

    /// Connects to `server_name` at `remote` and waits for the handshake.
    ///
    /// # Errors
    ///
    /// [`ConnectingError`] says what went wrong, and what to do about it where that is known.
    pub async fn connect(
        &self,
        config: &ClientConfig,
        remote: SocketAddr,
        server_name: &str,
    ) -> Result<Connection, ConnectingError> {
        let inner = {
            let mut state = self.shared.lock();
            if state.failed {
                return Err(ConnectionError::Internal("the socket failed").into());
            }
            let handle = state.endpoint.connect(Instant::now(), config, remote, server_name)?;
            Shareholder::new(&self.shared, &mut state, handle)
        };
        self.shared.work.notify_one();
        let (handle, changed) = (inner.handle, Arc::clone(&inner.changed));
        let outcome = self.shared.until(&changed, |state| {
            if let Some(error) = state.error(handle) {
                return Some(Err(error));
            }
            state.known.get(&handle).filter(|known| known.connected).map(|_| Ok(()))
        });
        outcome.await?;
        Ok(Connection { inner })
    }

    /// Waits for a connection of a client whose handshake is complete; `None` when the socket has
    /// failed.
    pub async fn accept(&self) -> Option<Connection> {
        let accepted = self.shared.until(&self.shared.connections, |state| {
            let Some(handle) = state.accepted.pop_front() else {
                return state.failed.then_some(None);
            };
            let inner = Shareholder::new(&self.shared, state, handle);
            Some(Some(Connection { inner }))
        });
        accepted.await
    }

    /// Moves to another socket: the client's connections migrate to it, each with a connection ID
    /// not used before.
    ///
    /// # Errors
    ///
    /// When the socket does not do what QUIC needs.
    pub fn rebind(&self, socket: UdpSocket) -> io::Result<()> {
        self.replace_socket(socket)?;
        let mut state = self.shared.lock();
        let handles: Vec<_> = state.endpoint.connections().collect();
        for handle in handles {
            if let Some(connection) = state.endpoint.connection_mut(handle) {
                // Those that cannot migrate look to their servers like clients behind a NAT that
                // has moved.
                let _ = connection.migrate(Instant::now(), None);
            }
        }
        self.shared.work.notify_one();
        Ok(())
    }

    /// Moves to another socket without telling the connections, as a NAT does.
    ///
    /// # Errors
    ///
    /// When the socket does not do what QUIC needs.
    pub fn replace_socket(&self, socket: UdpSocket) -> io::Result<()> {
        self.shared.lock().socket = Arc::new(Socket::new(socket)?);
        self.shared.work.notify_one();
        Ok(())
    }

    /// Switches to another issuer of connection IDs, on all connections.
    pub fn set_cid_config(&self, cids: CidIssuer) {
        self.with(|endpoint| endpoint.set_cid_config(cids));
    }

    /// Replaces the configuration for connections to come; `None` accepts no more.
    pub fn set_server_config(&self, server: Option<ServerConfig>) {
        self.with(|endpoint| endpoint.set_server_config(server));
    }

    /// Acts on the endpoint itself, for what has no method here.
    pub fn with<T>(&self, act: impl FnOnce(&mut transport::Endpoint) -> T) -> T {
        let done = act(&mut self.shared.lock().endpoint);
        self.shared.work.notify_one();
        done
    }

    /// The address of the socket.
    ///
    /// # Errors
    ///
    /// When the system does not tell.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.shared.lock().socket.local_addr()
    }

    /// Closes all connections with a code of the application.
    pub fn close(&self, code: u64, reason: &[u8]) {
        let reason = bytes::Bytes::copy_from_slice(reason);
        self.with(|endpoint| {
            endpoint.set_server_config(None);
            let handles: Vec<_> = endpoint.connections().collect();
            for handle in handles {
                if let Some(connection) = endpoint.connection_mut(handle) {
                    connection.close(Instant::now(), code, reason.clone());
                }
            }
        });
    }

    /// Waits until no connection is left, closing ones included.
    pub async fn wait_idle(&self) {
        // Connections vanish without an event when they have drained.
        const STEP: std::time::Duration = std::time::Duration::from_millis(10);
        while self.shared.lock().endpoint.connection_count() > 0 {
            tokio::time::sleep(STEP).await;
        }
    }
}

impl Clone for Endpoint {
    fn clone(&self) -> Self {
        self.shared.lock().handles += 1;
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.shared.lock().handles -= 1;
        self.shared.work.notify_one();
    }
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint").field("local", &self.local_addr()).finish()
    }
}

/// A seed from the operating system.
///
/// # Errors
///
/// When it has none.
pub fn seed() -> io::Result<[u8; 32]> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(io::Error::other)?;
    Ok(seed)
}
