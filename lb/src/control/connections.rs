//! The connections of the admin interface: how many there may be, and how long each may take.
//!
//! A connection costs little until a request has arrived whole; what it may cost then is for
//! [`guard`](super::guard). Where there are as many as there may be, the one that has been kept open
//! longest without being served makes room, so that whoever says nothing keeps nobody out.

use std::{
    collections::VecDeque,
    io,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{Router, body::Body, http::Request};
use hyper::{
    body::Incoming,
    server::conn::http1,
    service::{Service as _, service_fn},
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    task::AbortHandle,
    time,
};
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig};
use tracing::{debug, warn};

use super::doors::Door;

/// What connections may take.
#[derive(Clone, Copy, Debug)]
struct Limits {
    connections: usize,
    /// For the head of a request, its first one and the ones that follow: an idle connection ends
    /// with it.
    head: Duration,
    /// Keeps a reader that does not read from holding a connection for ever.
    lifetime: Duration,
    /// To finish an answer when that is over.
    last_answer: Duration,
}

const LIMITS: Limits = Limits {
    // Twice as many as are served at a time, and far above a few scrapers and operators.
    connections: 128,
    head: Duration::from_secs(10),
    lifetime: Duration::from_secs(60),
    last_answer: Duration::from_secs(10),
};

/// For the head of a request, in bytes.
const MAX_HEAD: usize = 16 * 1024;

/// The connection that a request came by.
#[derive(Clone, Debug, Default)]
pub(super) struct Connection {
    in_service: Arc<AtomicBool>,
    has_certificate: bool,
}

/// A request that is being served. Its connection is not closed meanwhile to make room.
#[derive(Debug)]
pub(super) struct InService(Connection);

impl Connection {
    /// Whether it is one of TLS whose client has shown a certificate that is trusted.
    pub(super) const fn has_certificate(&self) -> bool {
        self.has_certificate
    }

    pub(super) fn serve(&self) -> InService {
        self.in_service.store(true, Ordering::Relaxed);
        InService(self.clone())
    }
}

impl Drop for InService {
    fn drop(&mut self) {
        self.0.in_service.store(false, Ordering::Relaxed);
    }
}

/// How TLS is spoken on the next connection, which a reload may change; `None` where it is not.
pub(super) type Tls = Arc<dyn Fn() -> Option<Arc<ServerConfig>> + Send + Sync>;

/// Serves for as long as the process lives.
pub(super) async fn serve(door: Door, router: Router, tls: Tls) {
    match door {
        Door::Tcp(listener) => match TcpListener::from_std(listener) {
            Ok(listener) => accept(listener, router, LIMITS, tls).await,
            Err(error) => warn!(%error, "no admin interface"),
        },
        Door::Unix(listener) => match UnixListener::from_std(listener) {
            Ok(listener) => accept(listener, router, LIMITS, Arc::new(|| None)).await,
            Err(error) => warn!(%error, "no commands"),
        },
    }
}

/// Whatever connections come by.
trait Accept {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    fn accept_one(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

impl Accept for TcpListener {
    type Stream = TcpStream;

    async fn accept_one(&self) -> io::Result<TcpStream> {
        Ok(self.accept().await?.0)
    }
}

impl Accept for UnixListener {
    type Stream = UnixStream;

    async fn accept_one(&self) -> io::Result<UnixStream> {
        Ok(self.accept().await?.0)
    }
}

async fn accept(listener: impl Accept, router: Router, limits: Limits, tls: Tls) {
    // The oldest first.
    let mut open: VecDeque<(AbortHandle, Connection)> = VecDeque::new();
    loop {
        let stream = match listener.accept_one().await {
            Ok(stream) => stream,
            Err(error) => {
                // Out of descriptors, most likely; those come back.
                warn!(%error, "admin connection not accepted");
                time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        open.retain(|(task, _)| !task.is_finished());
        if open.len() >= limits.connections {
            let unserved =
                |(_, connection): &(_, Connection)| !connection.in_service.load(Ordering::Relaxed);
            let Some((task, _)) = open.iter().position(unserved).and_then(|at| open.remove(at))
            else {
                continue;
            };
            task.abort();
        }
        let tls = tls();
        let connection = Connection { has_certificate: tls.is_some(), ..Connection::default() };
        let (router, of) = (router.clone(), connection.clone());
        let task = match tls {
            None => tokio::spawn(carry(stream, router, of, limits)),
            Some(tls) => tokio::spawn(carry_tls(stream, tls, router, of, limits)),
        };
        open.push_back((task.abort_handle(), connection));
    }
}

/// Whoever shows no certificate that is trusted gets no further. The handshake has the time of a head.
async fn carry_tls(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    tls: Arc<ServerConfig>,
    router: Router,
    connection: Connection,
    limits: Limits,
) {
    match time::timeout(limits.head, TlsAcceptor::from(tls).accept(stream)).await {
        Ok(Ok(stream)) => carry(stream, router, connection, limits).await,
        Ok(Err(error)) => debug!(%error, "admin connection without TLS as it is wanted"),
        Err(_) => debug!("admin connection whose handshake takes too long"),
    }
}

async fn carry(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    router: Router,
    connection: Connection,
    limits: Limits,
) {
    let service = service_fn(move |request: Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(connection.clone());
        TowerToHyperService::new(router.clone()).call(request)
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.head)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(stream), service)
    );
    let outcome = match time::timeout(limits.lifetime, connection.as_mut()).await {
        Ok(outcome) => outcome,
        Err(_) => {
            connection.as_mut().graceful_shutdown();
            time::timeout(limits.last_answer, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = outcome {
        debug!(%error, "admin connection");
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use axum::{Extension, routing::get};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        sync::Semaphore,
    };

    use super::*;

    const HEAD: &[u8] = b"GET / HTTP/1.1\r\nhost: localhost\r\n";

    /// Far longer than anything here takes.
    const AGES: Duration = Duration::from_secs(600);

    async fn listening(limits: Limits, router: Router) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(accept(listener, router, limits, Arc::new(|| None)));
        address
    }

    async fn connected(address: SocketAddr, octets: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(octets).await.unwrap();
        stream
    }

    /// All that comes until the end; a reset is an end, too.
    async fn rest_of(mut stream: TcpStream) -> String {
        let mut answer = vec![];
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8(answer).unwrap()
    }

    #[tokio::test]
    async fn whoever_says_nothing_makes_room_for_others_the_oldest_first() {
        let limits = Limits { connections: 2, head: AGES, lifetime: AGES, last_answer: AGES };
        let address = listening(limits, Router::new().route("/", get(|| async { "hello" }))).await;
        let first = connected(address, b"").await;
        let second = connected(address, HEAD).await;
        let mut third = connected(address, HEAD).await;
        assert_eq!(rest_of(first).await, "", "closed");
        third.write_all(b"connection: close\r\n\r\n").await.unwrap();
        assert!(rest_of(third).await.ends_with("hello"));
        let mut second = second;
        second.write_all(b"connection: close\r\n\r\n").await.unwrap();
        assert!(rest_of(second).await.ends_with("hello"), "there was room for two");
    }

    #[tokio::test]
    async fn what_is_being_served_is_not_closed_for_others() {
        let limits = Limits { connections: 1, head: AGES, lifetime: AGES, last_answer: AGES };
        let gate = Arc::new(Semaphore::new(0));
        let begun = Arc::new(Semaphore::new(0));
        let (opened, begins) = (Arc::clone(&gate), Arc::clone(&begun));
        let handler = move |Extension(connection): Extension<Connection>| async move {
            let _in_service = connection.serve();
            begins.add_permits(1);
            let _ = opened.acquire().await;
            "done"
        };
        let address = listening(limits, Router::new().route("/", get(handler))).await;
        let request = [HEAD, b"connection: close\r\n\r\n"].concat();
        let first = connected(address, &request).await;
        begun.acquire().await.unwrap().forget();
        let second = connected(address, &request).await;
        assert_eq!(rest_of(second).await, "", "refused");
        gate.add_permits(1);
        assert!(rest_of(first).await.ends_with("done"));
    }

    #[tokio::test]
    async fn a_head_and_a_connection_have_their_time() {
        let short = Duration::from_millis(20);
        let router = || Router::new().route("/", get(|| async { "hello" }));
        let limits = Limits { connections: 2, head: short, lifetime: AGES, last_answer: AGES };
        let address = listening(limits, router()).await;
        assert_eq!(rest_of(connected(address, HEAD).await).await, "", "a head that has no end");
        let idle = connected(address, &[HEAD, b"\r\n"].concat()).await;
        assert!(rest_of(idle).await.ends_with("hello"), "idle after its answer, and closed");

        let limits = Limits { connections: 2, head: AGES, lifetime: short, last_answer: short };
        let address = listening(limits, router()).await;
        assert_eq!(rest_of(connected(address, HEAD).await).await, "");
    }
}
