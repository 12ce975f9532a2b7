//! What an origin answers, over HTTP/3 and over TLS on TCP alike.

use std::{
    net::SocketAddr,
    path::Path as FilePath,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use axum::{
    Extension, Json, Router,
    body::{Body, Bytes},
    extract::{MatchedPath, Path, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware::{self, Next},
    response::{Html, IntoResponse, Response},
    routing::{get, post},
};
use futures_util::{StreamExt as _, stream};
use quic::{ConnectionId, driver};
use serde_json::{Value, json};
use tower_http::services::ServeDir;

use super::{Shared, misbehaviour::Misbehaviour, ranges};
use crate::{BACKEND_HEADER, pattern};

/// The longest that `/delay` waits.
const MAX_DELAY: Duration = Duration::from_secs(3600);
/// From one piece of `/stream` to the next.
const BEAT: Duration = Duration::from_millis(100);

/// The other end of a request.
#[derive(Clone, Debug)]
pub(crate) enum Peer {
    Quic(driver::Connection),
    Tcp(SocketAddr),
}

/// All routes. Where there is a `root`, its files answer for whatever is not a route.
pub(crate) fn router(shared: Arc<Shared>, root: Option<&FilePath>) -> Router {
    let routes = Router::new()
        .route("/", get(page))
        .route("/whoami", get(whoami))
        .route("/bytes/{length}", get(bytes))
        .route("/echo", post(echo))
        .route("/delay/{milliseconds}", get(delay))
        .route("/stream", get(endless))
        .route("/health", get(health));
    let routes = match root {
        Some(root) => {
            let files = Router::new().fallback_service(ServeDir::new(root));
            routes.fallback_service(files.layer(middleware::from_fn(ranges::serve)))
        }
        None => routes.fallback(not_found),
    };
    routes.layer(middleware::from_fn_with_state(Arc::clone(&shared), around)).with_state(shared)
}

/// What holds for every answer: it names the backend, says where HTTP/3 is, and is counted.
async fn around(State(shared): State<Arc<Shared>>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().cloned();
    if let Misbehaviour::Slow(delay) = shared.misbehaviour {
        tokio::time::sleep(delay).await;
    }
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(BACKEND_HEADER, shared.name_header.clone());
    if shared.misbehaviour == Misbehaviour::TwoFaced
        && shared.answers.fetch_add(1, Relaxed) % 2 == 1
    {
        headers.insert(BACKEND_HEADER, HeaderValue::from_static("somebody-else"));
    }
    if let Some(alternative) = &shared.alt_svc {
        headers.insert(header::ALT_SVC, alternative.clone());
    }
    let route = route.as_ref().map_or("other", MatchedPath::as_str);
    let status = response.status();
    shared.metrics.requests.with_label_values(&[route, status.as_str()]).inc();
    response
}

async fn page(State(shared): State<Arc<Shared>>, Extension(peer): Extension<Peer>) -> Html<String> {
    let identity = shared.identity.load();
    let (backend, pool) = (escaped(&identity.backend), escaped(&identity.pool));
    let protocol = protocol(&peer);
    let client = client(&peer);
    Html(format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{backend}</title>\
         <style>body {{ font: 1.2rem system-ui, sans-serif; margin: 3rem }}</style></head>\n\
         <body><h1>Backend <span id=\"backend\">{backend}</span></h1>\n\
         <p>of pool {pool}, over <span id=\"protocol\">{protocol}</span>, to {client}.</p>\n\
         <p><a href=\"/whoami\">whoami</a> · <a href=\"/bytes/1000\">1,000 bytes</a> · \
         <a href=\"/stream\">a stream that never ends</a></p></body></html>\n"
    ))
}

async fn whoami(
    State(shared): State<Arc<Shared>>,
    Extension(peer): Extension<Peer>,
) -> Json<Value> {
    let identity = shared.identity.load();
    let (config_id, server_id) = identity
        .scheme
        .as_ref()
        .map(|(config, id)| (config.id().get(), hex(id.as_slice())))
        .unzip();
    let connection = match &peer {
        Peer::Quic(connection) => Some(connection),
        Peer::Tcp(_) => None,
    };
    let cid = |id: ConnectionId| hex(id.as_slice());
    Json(json!({
        "backend": identity.backend,
        "pool": identity.pool,
        "config_id": config_id,
        "server_id": server_id,
        "protocol": protocol(&peer),
        "client": client(&peer),
        "true_client": connection
            .and_then(driver::Connection::sealed_client)
            .map(|address| address.to_string()),
        "connection_ids": connection.map(|connection| {
            connection.local_cids().into_iter().map(cid).collect::<Vec<_>>()
        }),
        "client_connection_id": connection.and_then(driver::Connection::remote_cid).map(cid),
        "path_changes": connection.map(driver::Connection::path_changes),
    }))
}

async fn bytes(State(shared): State<Arc<Shared>>, Path(length): Path<u64>) -> Response {
    let wrong = shared.misbehaviour == Misbehaviour::WrongBody;
    let mut at = 0;
    let mut blocks = pattern::blocks(length).map(move |block| {
        at += block.len() as u64;
        if wrong && at == length { with_last_octet_wrong(&block) } else { block }
    });
    let body = match length {
        // One piece needs no stream.
        0..=65_536 => Body::from(blocks.next().unwrap_or_default()),
        _ => Body::from_stream(stream::iter(blocks.map(Ok::<_, TooLarge>))),
    };
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_LENGTH, length.into());
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    (headers, body).into_response()
}

/// Gives back what comes, as it comes, up to the limit.
async fn echo(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let limit = shared.max_body;
    let headers = request.headers();
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok());
    if announced.is_some_and(|length| length.parse().is_ok_and(|length: u64| length > limit)) {
        return (StatusCode::PAYLOAD_TOO_LARGE, too_large(limit)).into_response();
    }
    let kind = headers.get(header::CONTENT_TYPE).cloned();
    let mut left = limit;
    let mut pieces = request.into_body().into_data_stream();
    // The answer begins with the first of them: whoever waits to be told to send it is told, and not answered without it.
    let first = stream::iter(pieces.next().await);
    let body = first.chain(pieces).map(move |piece| {
        let piece: Bytes = piece.map_err(|_| TooLarge(limit))?;
        left = left.checked_sub(piece.len() as u64).ok_or(TooLarge(limit))?;
        Ok::<_, TooLarge>(piece)
    });
    let kind = kind.unwrap_or(HeaderValue::from_static("application/octet-stream"));
    ([(header::CONTENT_TYPE, kind)], Body::from_stream(body)).into_response()
}

async fn delay(Path(milliseconds): Path<u64>) -> Response {
    let delay = Duration::from_millis(milliseconds);
    if delay > MAX_DELAY {
        let sentence = format!("at most {} milliseconds\n", MAX_DELAY.as_millis());
        return (StatusCode::BAD_REQUEST, sentence).into_response();
    }
    tokio::time::sleep(delay).await;
    format!("{milliseconds} milliseconds later\n").into_response()
}

/// A line now and then, for as long as somebody reads.
async fn endless() -> Response {
    let beats = stream::unfold(0_u64, |nth| async move {
        if nth > 0 {
            tokio::time::sleep(BEAT).await;
        }
        Some((Ok::<_, TooLarge>(Bytes::from(format!("{nth}\n"))), nth + 1))
    });
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    ([(header::CONTENT_TYPE, kind)], Body::from_stream(beats)).into_response()
}

async fn health() -> &'static str {
    "ok\n"
}

async fn not_found() -> (StatusCode, &'static str) {
    (StatusCode::NOT_FOUND, "nothing is here\n")
}

fn with_last_octet_wrong(block: &[u8]) -> Bytes {
    let mut octets = block.to_vec();
    octets.last_mut().into_iter().for_each(|last| *last ^= 1);
    octets.into()
}

/// A body that is larger than it may be, found out on the way.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("{}", too_large(*.0))]
struct TooLarge(u64);

fn too_large(limit: u64) -> String {
    format!("a body may have {limit} bytes\n")
}

const fn protocol(peer: &Peer) -> &'static str {
    match peer {
        Peer::Quic(_) => "h3",
        Peer::Tcp(_) => "http/1.1",
    }
}

fn client(peer: &Peer) -> String {
    match peer {
        Peer::Quic(connection) => connection.remote_address().to_string(),
        Peer::Tcp(address) => address.to_string(),
    }
}

pub(super) fn hex(octets: &[u8]) -> String {
    use std::fmt::Write as _;
    octets.iter().fold(String::new(), |mut out, octet| {
        let _ = write!(out, "{octet:02x}");
        out
    })
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
