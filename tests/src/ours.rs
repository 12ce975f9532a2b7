//! Servers and clients on our own stack.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use quic::{
    driver::{Connection, Endpoint, Options},
    transport::{ClientConfig, ConnectionError, PeerClose, ServerConfig},
};
use rustls::crypto::CryptoProvider;

use crate::{certificate::Certificate, certificate::client_tls, exchange};

/// A running server that answers [`exchange`] requests and returns datagrams. Dropping it closes
/// its connections.
#[derive(Debug)]
pub struct Server {
    /// Its endpoint.
    pub endpoint: Endpoint,
    log: Arc<Log>,
}

/// What became of connections.
#[derive(Debug, Default)]
struct Log {
    accepted: AtomicUsize,
    connections: Mutex<Vec<Connection>>,
    lost: Mutex<Vec<String>>,
}

impl Server {
    /// A server made of `options`.
    ///
    /// # Errors
    ///
    /// When the address is taken.
    pub fn start(options: Options) -> anyhow::Result<Self> {
        let endpoint = Endpoint::new(options)?;
        let log = Arc::<Log>::default();
        tokio::spawn(accept(endpoint.clone(), Arc::clone(&log)));
        Ok(Self { endpoint, log })
    }

    /// A server on loopback whose configuration `change` has changed.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub fn on_loopback(
        ip: IpAddr,
        certificate: &Certificate,
        provider: CryptoProvider,
        change: impl FnOnce(&mut Options, &mut ServerConfig),
    ) -> anyhow::Result<Self> {
        let mut config = ServerConfig::new(Arc::new(certificate.server_tls(provider)?));
        let mut options = Options::client(SocketAddr::new(ip, 0));
        change(&mut options, &mut config);
        options.server = Some(config);
        Self::start(options)
    }

    /// Where it is.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.endpoint.local_addr()
    }

    /// Its connections so far.
    #[must_use]
    pub fn connections(&self) -> Vec<Connection> {
        self.log.connections.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many connections were established.
    #[must_use]
    pub fn accepted(&self) -> usize {
        self.log.accepted.load(Relaxed)
    }

    /// Why connections and handshakes ended other than by their client's wish, one entry each.
    #[must_use]
    pub fn lost(&self) -> Vec<String> {
        self.log.lost.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.endpoint.close(0, b"the server ends");
    }
}

/// What a client needs to connect to servers with the certificate `der`.
///
/// # Errors
///
/// When `der` is not a certificate.
pub fn client(der: &[u8], provider: CryptoProvider) -> anyhow::Result<ClientConfig> {
    Ok(ClientConfig::new(Arc::new(client_tls(der, provider)?)))
}

async fn accept(endpoint: Endpoint, log: Arc<Log>) {
    while let Some(incoming) = endpoint.accept().await {
        let log = Arc::clone(&log);
        tokio::spawn(async move {
            let reason = match incoming.await {
                Ok(connection) => {
                    log.accepted.fetch_add(1, Relaxed);
                    let connections = log.connections.lock();
                    connections.unwrap_or_else(PoisonError::into_inner).push(connection.clone());
                    answer(&connection).await
                }
                Err(reason) => reason,
            };
            let wished = matches!(
                reason,
                ConnectionError::ClosedLocally
                    | ConnectionError::PeerClosed(PeerClose::Application { .. })
            );
            if !wished {
                let mut lost = log.lost.lock().unwrap_or_else(PoisonError::into_inner);
                lost.push(reason.to_string());
            }
        });
    }
}

/// Answers requests and returns datagrams until the connection ends, and says why it did.
async fn answer(connection: &Connection) -> ConnectionError {
    let datagrams = connection.clone();
    tokio::spawn(async move {
        while let Ok(message) = datagrams.read_datagram().await {
            // Without room, it is lost, as datagrams are at times.
            let _ = datagrams.send_datagram(message);
        }
    });
    loop {
        match connection.accept_bi().await {
            Ok((send, recv)) => {
                // A stream that ends early belongs to a connection that does, or to a client that
                // changed its mind.
                tokio::spawn(async move {
                    let _ = exchange::serve(send, recv).await;
                });
            }
            Err(reason) => return reason,
        }
    }
}
