//! A shard whose socket takes no datagrams for a while, as when the kernel's send buffer is full:
//! handles hear of what arrives all the same.

use std::{
    future::poll_fn,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::Poll,
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::time::timeout;

use super::{
    accept::AcceptQueue, connection::Connection, endpoint, error::SendDatagramError, shard::Shard,
    socket, task::Task,
};
use crate::transport::{CidIssuer, ClientConfig, Endpoint, EndpointConfig, ResetKey, ServerConfig};

/// How long anything may take before it counts as never.
const PATIENCE: Duration = Duration::from_secs(20);

/// Whether a socket's send buffer is to count as full. Over the loopback interface, which takes
/// datagrams as fast as they come, it never is.
#[derive(Debug, Default)]
pub(super) struct Full {
    is_full: AtomicBool,
    no_batches: AtomicBool,
    refused: AtomicU64,
}

impl Full {
    /// What the kernel answers when its buffer is full, or its device takes no batches.
    pub(super) fn check(&self, batch: &quinn_udp::Transmit<'_>) -> io::Result<()> {
        if batch.segment_size.is_some() && self.no_batches.load(Ordering::Relaxed) {
            return Err(io::Error::other("EIO"));
        }
        if self.is_full.load(Ordering::Relaxed) {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(())
    }

    pub(super) fn refuse_batches(&self) {
        self.no_batches.store(true, Ordering::Relaxed);
    }

    fn set(&self, is_full: bool) {
        self.is_full.store(is_full, Ordering::Relaxed);
    }

    async fn was_met(&self) {
        while self.refused.load(Ordering::Relaxed) == 0 {
            tokio::task::yield_now().await;
        }
    }
}

/// A connection from both ends, and what the server's stands on.
struct Scene {
    shard: Arc<Shard>,
    full: Arc<Full>,
    server: Connection,
    client: Connection,
    _endpoint: endpoint::Endpoint,
}

async fn scene() -> Scene {
    let (server_tls, client_tls) = tls();
    let socket = socket::Socket::bind(localhost(), false).unwrap();
    let socket = socket::Socket::new(socket).unwrap();
    let (full, address) = (Arc::clone(&socket.full), socket.address());
    let cids = CidIssuer::standalone(8, [1; 32], ResetKey::new([2; 32]));
    let config = EndpointConfig::server(ServerConfig::new(server_tls), cids, [3; 32]);
    let core = Endpoint::new(config, Instant::now(), SystemTime::now());
    let shard = Arc::new(Shard::new(core, address, None, None));
    let accepts = Arc::<AcceptQueue>::default();
    tokio::spawn(Task::new(Arc::clone(&shard), Arc::clone(&accepts), socket, None));
    let endpoint = endpoint::Endpoint::client(localhost()).unwrap();
    let config = ClientConfig::new(client_tls);
    let connecting = endpoint.connect_with(&config, address, "server.test").unwrap();
    let client = timeout(PATIENCE, connecting).await.unwrap().unwrap();
    let server = timeout(PATIENCE, accepts.next()).await.unwrap().unwrap().await.unwrap();
    Scene { shard, full, server, client, _endpoint: endpoint }
}

fn localhost() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

fn tls() -> (Arc<rustls::ServerConfig>, Arc<rustls::ClientConfig>) {
    let made = rcgen::generate_simple_self_signed(["server.test".to_owned()]).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let mut server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.into()], key)
        .unwrap();
    server.alpn_protocols = vec![b"test".to_vec()];
    let mut client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.alpn_protocols = vec![b"test".to_vec()];
    (Arc::new(server), Arc::new(client))
}

/// What a future gives that is asked only when it is woken: a timeout would ask it once more itself.
async fn when_woken<T: Send + 'static>(
    future: impl Future<Output = T> + Send + 'static,
) -> Result<T, tokio::time::error::Elapsed> {
    Ok(timeout(PATIENCE, tokio::spawn(future)).await?.unwrap())
}

#[tokio::test]
async fn readers_and_deadlines_are_served_while_the_socket_takes_nothing() {
    let scene = scene().await;
    let (mut to_server, mut from_server) = scene.client.open_bi().await.unwrap();
    to_server.write_all(b"first").await.unwrap();
    let accepted = timeout(PATIENCE, scene.server.accept_bi()).await;
    let (mut to_client, mut from_client) = accepted.unwrap().unwrap();
    let mut octets = [0; 5];
    timeout(PATIENCE, from_client.read_exact(&mut octets)).await.unwrap().unwrap();
    // An answer finds the socket full.
    scene.full.set(true);
    to_client.write_all(b"answer").await.unwrap();
    timeout(PATIENCE, scene.full.was_met()).await.unwrap();
    to_server.write_all(b"after").await.unwrap();
    let read = when_woken(async move {
        from_client.read_exact(&mut octets).await.unwrap();
        octets
    });
    assert_eq!(&read.await.expect("the reader is woken"), b"after");
    // When the socket takes datagrams again, the answer leaves.
    scene.full.set(false);
    let mut answer = [0; 6];
    timeout(PATIENCE, from_server.read_exact(&mut answer)).await.unwrap().unwrap();
    assert_eq!(&answer, b"answer");
    // A connection that is closed is forgotten in time, although its last words never leave.
    scene.full.set(true);
    scene.server.close(7, b"bye");
    let server = scene.server.clone();
    when_woken(async move { server.closed().await }).await.expect("the end is told");
    let forgotten = async {
        while scene.shard.lock().core.connection_count() > 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, forgotten).await.expect("the deadline is kept");
}

#[tokio::test]
async fn a_message_waits_for_room_where_the_buffer_of_the_connection_is_full() {
    let scene = scene().await;
    scene.full.set(true);
    let message = Bytes::from_static(&[7; 1000]);
    let mut fill = (0..1_000_000).map(|_| scene.server.send_datagram(message.clone()));
    let refused = fill.find_map(Result::err).expect("the buffer has an end");
    assert!(matches!(refused, SendDatagramError::Blocked), "{refused:?}");
    timeout(PATIENCE, scene.full.was_met()).await.unwrap();
    // What the task has taken made room for some.
    let mut fill = (0..1_000_000).map(|_| scene.server.send_datagram(message.clone()));
    fill.find_map(Result::err).expect("the buffer has an end");
    let (server, last) = (scene.server.clone(), Bytes::from_static(b"last"));
    let mut waits = Box::pin(async move { server.send_datagram_wait(last).await });
    let pending = poll_fn(|cx| Poll::Ready(waits.as_mut().poll(cx).is_pending())).await;
    assert!(pending, "there is no room");
    // The socket takes datagrams again, which its next event shows.
    scene.full.set(false);
    scene.client.ping();
    when_woken(waits).await.expect("there is room again").unwrap();
    let received = timeout(PATIENCE, scene.client.read_datagram()).await.unwrap().unwrap();
    assert_eq!(received, message);
}
