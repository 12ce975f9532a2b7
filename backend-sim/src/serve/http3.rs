//! From HTTP/3 to the routes and back: one task for each connection and one for each request.

use std::{sync::Arc, time::Duration};

use axum::{Router, body::Body};
use bytes::{Buf as _, Bytes};
use futures_util::stream;
use h3::{
    error::{Code, StreamError},
    server::{RequestResolver, RequestStream},
};
use http::Request;
use http_body_util::BodyExt as _;
use quic::{
    driver::{self, Incoming},
    h3::{Connection, RecvStream},
};
use tokio::{sync::watch, task::JoinSet, time};
use tower::ServiceExt as _;
use tracing::debug;

use super::{Shared, routes::Peer};
use crate::cause;

/// For the fields of a request, in octets.
const MAX_FIELDS: u64 = 64 * 1024;

/// How long a client has, after its last answer, to learn that there will be no more.
const LINGER: Duration = Duration::from_secs(1);

type Resolver = RequestResolver<Connection, Bytes>;

/// Serves a connection from its handshake to its end.
pub(super) async fn serve(
    shared: Arc<Shared>,
    router: Router,
    incoming: Incoming,
    draining: watch::Receiver<bool>,
) {
    let metrics = &shared.metrics;
    let connection = match incoming.await {
        Ok(connection) => connection,
        Err(error) => {
            metrics.handshakes_failed.with_label_values(&[cause::word(&error)]).inc();
            debug!(%error, "handshake failed");
            return;
        }
    };
    metrics.accepted.inc();
    metrics.active.inc();
    if let Err(error) = requests(&connection, router, draining).await {
        debug!(%error, "connection ended");
    }
    connection.close(Code::H3_NO_ERROR.value(), b"");
    if let Some(error) = connection.close_reason() {
        metrics.ended.with_label_values(&[cause::word(&error)]).inc();
    }
    metrics.path_changes.inc_by(connection.path_changes());
    metrics.active.dec();
}

/// Serves requests until the connection ends, or until the last one is answered while draining.
async fn requests(
    connection: &driver::Connection,
    router: Router,
    mut draining: watch::Receiver<bool>,
) -> Result<(), h3::error::ConnectionError> {
    let mut http: h3::server::Connection<_, Bytes> = h3::server::builder()
        .max_field_section_size(MAX_FIELDS)
        .build(Connection::from(connection.clone()))
        .await?;
    let mut tasks = JoinSet::new();
    let mut told = false;
    loop {
        tokio::select! {
            accepted = http.accept() => {
                let Some(resolver) = accepted? else { return Ok(()) };
                let (router, peer) = (router.clone(), Peer::Quic(connection.clone()));
                tasks.spawn(async move {
                    if let Err(error) = request(resolver, router, peer).await {
                        debug!(%error, "request ended");
                    }
                });
            }
            Some(_) = tasks.join_next() => {}
            // The client closes once it knows; if not, it has nothing more to say.
            () = time::sleep(LINGER), if told && tasks.is_empty() => return Ok(()),
            // The origin is gone when nobody can say so any more.
            asked = async { draining.wait_for(|draining| *draining).await.is_ok() }, if !told => {
                if !asked {
                    return Ok(());
                }
                told = true;
                // Those before the next one are answered, says the GOAWAY then.
                http.shutdown(1).await?;
            }
        }
    }
}

async fn request(resolver: Resolver, router: Router, peer: Peer) -> Result<(), StreamError> {
    let (request, stream) = resolver.resolve_request().await?;
    let (mut send, recv) = stream.split();
    let (mut parts, ()) = request.into_parts();
    parts.extensions.insert(peer);
    let request = Request::from_parts(parts, body(recv));
    let Ok(response) = router.oneshot(request).await;
    let (parts, mut body) = response.into_parts();
    send.send_response(http::Response::from_parts(parts, ())).await?;
    while let Some(frame) = body.frame().await {
        match frame.map(http_body::Frame::into_data) {
            Ok(Ok(data)) => send.send_data(data).await?,
            Ok(Err(_)) => {}
            Err(error) => {
                debug!(%error, "response abandoned");
                send.stop_stream(Code::H3_EXCESSIVE_LOAD);
                return Ok(());
            }
        }
    }
    send.finish().await
}

/// The body of a request, read as it is wanted.
fn body(recv: RequestStream<RecvStream, Bytes>) -> Body {
    Body::from_stream(stream::try_unfold(recv, |mut recv| async move {
        let data = recv.recv_data().await?;
        let piece = data.map(|mut data| data.copy_to_bytes(data.remaining()));
        Ok::<_, StreamError>(piece.map(|piece| (piece, recv)))
    }))
}
