//! What an origin says over TCP: to browsers, that HTTP/3 is to be had; to scrapers, its metrics.

use std::{
    convert::Infallible, future::Future, net::SocketAddr, pin::pin, sync::Arc, time::Duration,
};

use arc_swap::ArcSwap;
use axum::{Extension, Router, http::header, routing::get};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time,
};
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig};
use tracing::{debug, warn};

use super::{Shared, routes::Peer};

/// Connections of one listener at once.
const MAX_CONNECTIONS: usize = 1024;
/// For the head of a request, and for a TLS handshake.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// For the head of a request, in octets.
const MAX_HEAD: usize = 64 * 1024;
/// Keeps a reader that does not read from holding a connection for ever.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(600);

/// Serves the routes over TLS.
pub(super) async fn https(listener: TcpListener, tls: Arc<ArcSwap<ServerConfig>>, router: Router) {
    accept(listener, move |stream, peer| {
        let (tls, router) = (TlsAcceptor::from(tls.load_full()), router.clone());
        async move {
            match time::timeout(HEAD_TIMEOUT, tls.accept(stream)).await {
                Ok(Ok(stream)) => http(stream, router.layer(Extension(Peer::Tcp(peer)))).await,
                Ok(Err(error)) => debug!(%error, "TLS handshake"),
                Err(_) => debug!("TLS handshake took too long"),
            }
        }
    })
    .await;
}

/// Serves `/metrics`.
pub(super) async fn metrics(listener: TcpListener, shared: Arc<Shared>) {
    let text = [(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)];
    let router = Router::new().route(
        "/metrics",
        get(move || {
            let answer = (text, shared.metrics.render());
            async move { Ok::<_, Infallible>(answer) }
        }),
    );
    accept(listener, move |stream, _| http(stream, router.clone())).await;
}

async fn accept<F>(listener: TcpListener, serve: impl Fn(TcpStream, SocketAddr) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, peer)) => {
                let serving = serve(stream, peer);
                tokio::spawn(async move {
                    if time::timeout(CONNECTION_LIFETIME, serving).await.is_err() {
                        debug!("connection lived too long");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                // Out of descriptors, most likely; those come back.
                warn!(%error, "connection not accepted");
                time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn http(stream: impl AsyncRead + AsyncWrite + Unpin, router: Router) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    if let Err(error) = pin!(connection).await {
        debug!(%error, "connection over TCP");
    }
}
