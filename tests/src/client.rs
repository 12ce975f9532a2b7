//! A quinn client that changes its port and its address when told to, and checks what it gets.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::ensure;
use sha2::{Digest as _, Sha256};

use crate::{
    audit::MarkedResets,
    certificate::{self, SERVER_NAME},
    origin, pattern,
};

/// One UDP socket and the connections that go through it.
#[derive(Clone, Debug)]
pub struct Client {
    endpoint: quinn::Endpoint,
    config: quinn::ClientConfig,
    rebinds: Arc<AtomicUsize>,
}

impl Client {
    /// A client at a port of `ip` that trusts the certificate `der`.
    ///
    /// # Errors
    ///
    /// When `ip` is not an address of this machine.
    pub fn new(ip: IpAddr, der: &[u8]) -> anyhow::Result<Self> {
        let socket = UdpSocket::bind(SocketAddr::new(ip, 0))?;
        let marked = quinn::EndpointConfig::new(Arc::new(MarkedResets));
        let endpoint = quinn::Endpoint::new(marked, None, socket, Arc::new(quinn::TokioRuntime))?;
        let mut config = quinn::ClientConfig::new(Arc::new(certificate::client(der)?));
        config.transport_config(Arc::new(origin::transport()));
        Ok(Self { endpoint, config, rebinds: Arc::default() })
    }

    /// The client with connections that say something now and then, also while they only listen.
    #[must_use]
    pub fn with_keep_alive(mut self) -> Self {
        let mut transport = origin::transport();
        transport.keep_alive_interval(Some(Duration::from_millis(300)));
        self.config.transport_config(Arc::new(transport));
        self
    }

    /// A connection to `target`.
    ///
    /// # Errors
    ///
    /// When the handshake fails.
    pub async fn connect(&self, target: SocketAddr) -> anyhow::Result<quinn::Connection> {
        Ok(self.endpoint.connect_with(self.config.clone(), target, SERVER_NAME)?.await?)
    }

    /// Moves all connections to a new port of `ip`; where that is another address than before, they
    /// migrate.
    ///
    /// # Errors
    ///
    /// When `ip` is not an address of this machine.
    pub fn rebind(&self, ip: IpAddr) -> anyhow::Result<()> {
        self.endpoint.rebind(UdpSocket::bind(SocketAddr::new(ip, 0))?)?;
        self.rebinds.fetch_add(1, Relaxed);
        Ok(())
    }

    /// How often it has moved.
    #[must_use]
    pub fn rebinds(&self) -> usize {
        self.rebinds.load(Relaxed)
    }

    /// Closes all connections and waits until their servers know.
    pub async fn close(self) {
        self.endpoint.close(0u8.into(), b"done");
        self.endpoint.wait_idle().await;
    }
}

/// Downloads `length` octets and compares their digest. After each part that arrived, `progress` is
/// told how many there are.
///
/// # Errors
///
/// When the connection is lost or the content is not what it should be.
pub async fn download(
    connection: &quinn::Connection,
    length: usize,
    progress: impl FnMut(usize),
) -> anyhow::Result<()> {
    let (mut send, recv) = connection.open_bi().await?;
    send.write_all(format!("GET {length}\n").as_bytes()).await?;
    send.finish()?;
    receive(recv, length, progress).await
}

/// Sends `length` octets and compares the digest of what comes back.
///
/// # Errors
///
/// As [`download`].
pub async fn echo(
    connection: &quinn::Connection,
    length: usize,
    progress: impl FnMut(usize),
) -> anyhow::Result<()> {
    let (mut send, recv) = connection.open_bi().await?;
    let sending = async move {
        for block in pattern::blocks(length) {
            send.write_all(&block).await?;
        }
        Ok(send.finish()?)
    };
    let ((), ()) = tokio::try_join!(sending, receive(recv, length, progress))?;
    Ok(())
}

/// The name of the server at the other end.
///
/// # Errors
///
/// When the connection is lost.
pub async fn who(connection: &quinn::Connection) -> anyhow::Result<String> {
    ask(connection, "WHO").await
}

/// The address that the server sees this connection come from.
///
/// # Errors
///
/// When the connection is lost.
pub async fn from(connection: &quinn::Connection) -> anyhow::Result<String> {
    ask(connection, "FROM").await
}

async fn ask(connection: &quinn::Connection, question: &str) -> anyhow::Result<String> {
    const MAX_ANSWER: usize = 64;
    let (mut send, mut recv) = connection.open_bi().await?;
    send.write_all(question.as_bytes()).await?;
    send.finish()?;
    Ok(String::from_utf8(recv.read_to_end(MAX_ANSWER).await?)?)
}

async fn receive(
    mut recv: quinn::RecvStream,
    length: usize,
    mut progress: impl FnMut(usize),
) -> anyhow::Result<()> {
    let (mut hasher, mut received) = (Sha256::new(), 0);
    while let Some(chunk) = recv.read_chunk(usize::MAX, true).await? {
        hasher.update(&chunk.bytes);
        received += chunk.bytes.len();
        progress(received);
    }
    ensure!(received == length, "{received} octets instead of {length}");
    ensure!(pattern::Digest::from(hasher.finalize()) == pattern::digest(length), "other content");
    Ok(())
}

/// Calls `action` each time another `every` octets have arrived; for `progress`.
pub fn each(every: usize, mut action: impl FnMut()) -> impl FnMut(usize) {
    let mut next = every;
    move |received| {
        if received >= next {
            next = received + every;
            action();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        audit::Issued,
        certificate::Certificate,
        document::free_address,
        origin::{Cids, Origin},
        site::LOCAL,
    };

    #[tokio::test]
    async fn without_a_balancer_in_between_nothing_is_lost_either() {
        let (issued, certificate) = (Issued::default(), Certificate::new().unwrap());
        let address = free_address(LOCAL);
        let server = Origin::start("a", address, Cids::Opaque(8), &issued, &certificate).unwrap();
        let client = Client::new(LOCAL, certificate.der()).unwrap();
        let connection = client.connect(address).await.unwrap();

        let rebind = each(1 << 18, || client.rebind(LOCAL).unwrap());
        download(&connection, 3 << 20, rebind).await.unwrap();
        echo(&connection, 1 << 20, |_| {}).await.unwrap();
        assert_eq!(who(&connection).await.unwrap(), "a");

        assert!(client.rebinds() >= 10);
        client.close().await;
        let arrivals = server.arrivals();
        assert!(arrivals.own > 0 && arrivals.opening > 0, "{arrivals:?}");
        assert!(arrivals.misdelivered.is_empty() && arrivals.unknown == 0, "{arrivals:?}");
        assert_eq!((server.accepted(), server.lost()), (1, vec![]));
    }

    #[test]
    fn actions_are_called_once_for_each_part() {
        let mut calls = 0;
        let _ = [10, 100, 101, 350, 400, 449, 450].map(each(100, || calls += 1));
        assert_eq!(calls, 3);
    }
}
