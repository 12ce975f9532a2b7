//! The admin interface over HTTP: metrics, health, backends, the masked configuration, a page.
//!
//! It knows no users and no passwords, and is meant for loopback or a management network. What it
//! takes is bounded: connections, the size of a request's head, the time for it, the life of a
//! connection, the body of the one request that has one. Commands that a browser sends on behalf of some
//! other page are refused.

#![expect(
    clippy::disallowed_methods,
    reason = "the shell around the state of the control plane: it gives it the time"
)]

use std::{
    convert::Infallible,
    net::TcpListener,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, Path, Request, State, rejection::JsonRejection},
    http::{HeaderValue, Method, StatusCode, header},
    middleware::{self, Next},
    response::{Html, IntoResponse, Response},
    routing::{get, post},
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use quic_lb_config::Admission;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::{net::TcpStream, sync::Semaphore, time};
use tracing::{debug, warn};

use super::{
    answers::error,
    explain, page,
    plane::{BackendView, Stage},
    shared::Shared,
};

/// Far above a few scrapers and operators.
const MAX_CONNECTIONS: usize = 64;
/// For the head of a request, its first one and the ones that follow.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// For the body of a request, in octets: a number and its name.
const MAX_BODY: usize = 256;
/// For the head of a request, in octets.
const MAX_HEAD: usize = 16 * 1024;
/// Keeps a reader that does not read from holding a connection for ever.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(600);
/// To finish an answer when that is over.
const LAST_ANSWER: Duration = Duration::from_secs(10);

/// Serves for as long as the process lives.
pub(super) async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let listener = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return warn!(%error, "no admin interface"),
    };
    let router = router(shared);
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = Arc::clone(&connections).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let router = router.clone();
                tokio::spawn(async move {
                    connection(stream, router).await;
                    drop(permit);
                });
            }
            Err(error) => {
                // Out of descriptors, most likely; those come back.
                warn!(%error, "admin connection not accepted");
                time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, router: Router) {
    let service = TowerToHyperService::new(router);
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(stream), service)
    );
    let outcome = match time::timeout(CONNECTION_LIFETIME, connection.as_mut()).await {
        Ok(outcome) => outcome,
        Err(_) => {
            connection.as_mut().graceful_shutdown();
            time::timeout(LAST_ANSWER, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = outcome {
        debug!(%error, "admin connection");
    }
}

pub(super) fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/", get(status_page))
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/api/v1/config", get(config))
        .route("/api/v1/explain", get(explain::explain))
        .route("/api/v1/backends", get(backends))
        .route("/api/v1/backends/{pool}/{name}/drain", post(drain))
        .route("/api/v1/backends/{pool}/{name}/activate", post(activate))
        .route("/api/v1/backends/{pool}/{name}/half_open", post(half_open))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn(guard))
        .with_state(shared)
}

/// Refuses commands from foreign pages, and adds what browsers should know about every answer.
async fn guard(request: Request, next: Next) -> Result<Response, Infallible> {
    let reads = matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
    let mut response = if !reads && request.headers().contains_key(header::ORIGIN) {
        error(StatusCode::FORBIDDEN, "commands are not taken from web pages")
    } else {
        next.run(request).await
    };
    for (name, value) in [
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CONTENT_SECURITY_POLICY, "default-src 'none'; style-src 'unsafe-inline'"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    Ok(response)
}

async fn status_page(State(shared): State<Arc<Shared>>) -> Html<String> {
    let plane = shared.plane();
    let now = Instant::now();
    let (reading, views) = (plane.reading(now), plane.views(now));
    drop(plane);
    Html(page::status(&reading, &views))
}

async fn metrics(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    let format = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, format)], shared.metrics())
}

/// Whether this process does its work; if not, it should be replaced.
async fn healthz(State(shared): State<Arc<Shared>>) -> Response {
    match shared.plane().stage() {
        Stage::Running | Stage::Draining => Json(json!({ "healthy": true })).into_response(),
        Stage::Broken => {
            let body = Json(json!({ "healthy": false, "reason": "a worker has ended" }));
            (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
        }
    }
}

/// Whether this process should be sent anything new.
async fn readyz(State(shared): State<Arc<Shared>>) -> Response {
    let reason = match shared.plane().stage() {
        Stage::Running => return Json(json!({ "ready": true })).into_response(),
        Stage::Draining => "draining",
        Stage::Broken => "a worker has ended",
    };
    let body = Json(json!({ "ready": false, "reason": reason }));
    (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
}

async fn config(State(shared): State<Arc<Shared>>) -> Json<Value> {
    Json(shared.plane().config().masked_document())
}

async fn backends(State(shared): State<Arc<Shared>>) -> Json<Vec<Value>> {
    let views = shared.plane().views(Instant::now());
    Json(views.iter().map(backend_json).collect())
}

async fn drain(state: State<Arc<Shared>>, path: Path<(String, String)>) -> Response {
    command(&state.0, &path.0, Admission::Draining).await
}

async fn activate(state: State<Arc<Shared>>, path: Path<(String, String)>) -> Response {
    command(&state.0, &path.0, Admission::Active).await
}

/// What a server says of itself.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct HalfOpen {
    half_open: u64,
}

/// A server's report of its half-open connections, or that of somebody who asks it.
async fn half_open(
    shared: State<Arc<Shared>>,
    Path((pool, name)): Path<(String, String)>,
    report: Result<Json<HalfOpen>, JsonRejection>,
) -> Response {
    let Json(HalfOpen { half_open }) = match report {
        Ok(report) => report,
        Err(rejection) => {
            let sentence = "the body has to be JSON such as { \"half_open\": 12 }";
            return error(rejection.status(), sentence);
        }
    };
    if shared.plane().on_half_open(Instant::now(), &pool, &name, half_open) {
        StatusCode::NO_CONTENT.into_response()
    } else {
        unknown_backend(&pool, &name)
    }
}

/// Answers when the command is in force.
async fn command(shared: &Shared, (pool, name): &(String, String), wanted: Admission) -> Response {
    if !shared.change(|plane| plane.command(pool, name, wanted)) {
        return unknown_backend(pool, name);
    }
    if !shared.until_in_force().await {
        let sentence = "the command is taken, and not in force yet: see /api/v1/backends";
        return error(StatusCode::SERVICE_UNAVAILABLE, sentence);
    }
    let views = shared.plane().views(Instant::now());
    let named = |view: &&BackendView| view.pool == *pool && view.backend.name == *name;
    Json(views.iter().find(named).map(backend_json)).into_response()
}

fn unknown_backend(pool: &str, name: &str) -> Response {
    let sentence = format!("there is no backend \"{name}\" in a pool \"{pool}\"");
    error(StatusCode::NOT_FOUND, &sentence)
}

fn backend_json(view: &BackendView) -> Value {
    let BackendView { pool, backend, state, wanted, commanded, totals, half_open } = view;
    let server_ids = backend.server_ids.iter();
    let server_ids: Map<_, _> =
        server_ids.map(|(id, server)| (id.to_string(), server.to_string().into())).collect();
    json!({
        "pool": pool,
        "name": backend.name,
        "address": backend.address,
        "state": state.label(),
        "wanted": wanted.as_str(),
        "wanted_by": if *commanded { "operator" } else { "file" },
        "weight": backend.weight,
        "server_ids": server_ids,
        "datagrams_forwarded": totals.forwarded,
        "datagrams_returned": totals.returned,
        "refused": totals.refused,
        "half_open": half_open,
    })
}

async fn not_found() -> Response {
    error(
        StatusCode::NOT_FOUND,
        "there is /, /metrics, /healthz, /readyz, /api/v1/backends, /api/v1/config, \
         /api/v1/explain, and POST /api/v1/backends/{pool}/{name}/drain, /activate and /half_open",
    )
}

async fn method_not_allowed(method: Method) -> Response {
    error(StatusCode::METHOD_NOT_ALLOWED, &format!("{method} is not possible here"))
}
