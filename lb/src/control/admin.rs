//! The admin interface over HTTP: metrics, health, backends, the masked configuration, a page.
//!
//! It knows no users and no passwords but a token, and is meant for loopback or a management network. Commands may have a door of
//! their own. What it takes is bounded by [`connections`] and [`guard`], which also refuses what a browser sends on behalf
//! of some other page.

#![expect(
    clippy::disallowed_methods,
    reason = "the shell around the state of the control plane: it gives it the time"
)]

use std::{
    fmt::Write,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use axum::{
    Extension, Json, Router,
    extract::{Path, RawQuery, State, rejection::JsonRejection},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header},
    middleware,
    response::{Html, IntoResponse, Response},
    routing::{get, post},
};
use quic::routable::ConfigId;
use quic_lb_config::{Admission, Commands};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::task;

use super::{
    agreement,
    answers::error,
    changes::Changes,
    checks::{contract::Breach, honours::Honours},
    commands::{Author, Command},
    connections::{self, Tls},
    doors::{Access, Door},
    explain,
    guard::{self, Guard, MayCommand},
    gzip, page,
    plane::{
        Stage,
        views::{BackendView, RotationView},
        watched::CheckView,
    },
    reloads::Reloaded,
    shared::{Shared, Succeeded},
};
use crate::{
    check::CheckResult,
    client_path::ListenerIndex,
    wanted::STEPS,
    worker::panics::{Panic, Suspect, Told},
};

/// Serves for as long as the process lives.
pub(super) async fn serve(door: Door, access: Access, shared: Arc<Shared>) {
    let of_commands = Arc::clone(&shared);
    let tls: Tls = match access {
        Access::Everything | Access::Reading => Arc::new(|| None),
        Access::WithProof => Arc::new(move || {
            match of_commands.plane().config().admin.as_ref()?.commands.as_ref()? {
                Commands::Certificates(_, tls) => Some(Arc::clone(&tls.config)),
                Commands::Unix(_) | Commands::Token(..) => None,
            }
        }),
    };
    connections::serve(door, router(shared, access), tls).await;
}

pub(super) fn router(shared: Arc<Shared>, access: Access) -> Router {
    let guard = Arc::new(Guard::new(Arc::clone(&shared), access));
    Router::new()
        .route("/", get(status_page))
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/api/v1/config", get(config))
        .route("/api/v1/decisions", get(agreement::decisions))
        .route("/api/v1/running", get(agreement::running))
        .route("/api/v1/explain", get(explain::explain))
        .route("/api/v1/panics", get(panics))
        .route("/api/v1/backends", get(backends))
        .route("/api/v1/rotation", get(rotation))
        .route("/api/v1/reload", post(reload))
        .route("/api/v1/upgrade", post(upgrade))
        .route("/api/v1/backends/{pool}/{name}", get(backend))
        .route("/api/v1/backends/{pool}/{name}/drain", post(drain))
        .route("/api/v1/backends/{pool}/{name}/activate", post(activate))
        .route("/api/v1/backends/{pool}/{name}/half_open", post(half_open))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(guard, guard::guard))
        .with_state(shared)
}

async fn status_page(State(shared): State<Arc<Shared>>) -> Html<String> {
    let plane = shared.plane();
    let now = Instant::now();
    let (reading, views) = (plane.reading(now), plane.views(now));
    drop(plane);
    Html(page::status(&reading, &views))
}

/// With thousands of backends a page is megabytes, which the thread that answers everybody does not write itself.
async fn metrics(State(shared): State<Arc<Shared>>, headers: HeaderMap) -> Response {
    let accepts_gzip = gzip::is_accepted(&headers);
    let render = move || {
        let text = shared.metrics();
        let compressed = if accepts_gzip { gzip::compressed(&text).ok() } else { None };
        compressed.ok_or(text)
    };
    let format = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    let vary = (header::VARY, HeaderValue::from_static("accept-encoding"));
    let head = [(header::CONTENT_TYPE, format), vary];
    match task::spawn_blocking(render).await {
        Ok(Ok(octets)) => {
            let coding = [(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"))];
            (head, coding, octets).into_response()
        }
        Ok(Err(text)) => (head, text).into_response(),
        Err(_) => error(StatusCode::INTERNAL_SERVER_ERROR, "the metrics could not be written"),
    }
}

/// Whether this process does its work; if not, it should be replaced.
async fn healthz(State(shared): State<Arc<Shared>>) -> Response {
    let plane = shared.plane();
    let stuck = plane.stuck();
    let mut body = match plane.stage() {
        Stage::Broken => json!({ "healthy": false, "reason": "a worker has ended" }),
        Stage::Running | Stage::Draining if stuck.is_empty() => {
            return Json(json!({ "healthy": true })).into_response();
        }
        Stage::Running | Stage::Draining => json!({ "healthy": false, "reason": STUCK }),
    };
    if !stuck.is_empty() {
        body["workers"] = json!(stuck);
    }
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
}

/// Why a process with such a worker is not healthy, and not ready.
const STUCK: &str = "a worker makes no progress";

/// Whether this process should be sent anything new. One whose workers panic again and again should: what does it here
/// would do it to the next one.
async fn readyz(State(shared): State<Arc<Shared>>) -> Response {
    let plane = shared.plane();
    let reason = match plane.stage() {
        Stage::Running if !plane.stuck().is_empty() => STUCK,
        Stage::Running => {
            let (mut answer, mut details) = (json!({ "ready": true }), vec![]);
            let restless = shared.panics().restless(Instant::now());
            if !restless.is_empty() {
                details.push("workers panic again and again: see /api/v1/panics");
                answer["workers"] = json!(restless);
            }
            let miswired = plane.miswired();
            if !miswired.is_empty() {
                details.push("backends answer under connection IDs that do not lead to them: see /api/v1/backends");
                answer["miswired"] = json!(miswired);
            }
            if !details.is_empty() {
                answer["detail"] = json!(details.join("; "));
            }
            return Json(answer).into_response();
        }
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
    let (now, plane) = (Instant::now(), shared.plane());
    let views = plane.views(now);
    Json(views.iter().map(|view| backend_json(view, |moment| plane.ago(now, moment))).collect())
}

async fn backend(
    State(shared): State<Arc<Shared>>,
    Path((pool, name)): Path<(String, String)>,
) -> Response {
    show_backend(&shared, &pool, &name).unwrap_or_else(|| unknown_backend(&pool, &name))
}

fn show_backend(shared: &Shared, pool: &str, name: &str) -> Option<Response> {
    let (now, plane) = (Instant::now(), shared.plane());
    let views = plane.views(now);
    let view = views.iter().find(|view| view.pool == *pool && view.backend.name == *name)?;
    Some(Json(backend_json(view, |moment| plane.ago(now, moment))).into_response())
}

/// Which configurations of connection IDs are in use.
async fn rotation(State(shared): State<Arc<Shared>>) -> Json<Vec<Value>> {
    let views = shared.plane().rotation(Instant::now());
    let view = |view: &RotationView| {
        json!({
            "pool": view.pool,
            "config_id": view.config_id.get(),
            "connections": view.connections,
            "heard_seconds_ago": view.silent.map(seconds),
            "unused": view.is_unused,
        })
    };
    Json(views.iter().map(view).collect())
}

/// The newest panics of workers, with what they were at.
async fn panics(State(shared): State<Arc<Shared>>) -> Json<Vec<Value>> {
    let kept = shared.panics().kept();
    let plane = shared.plane();
    let name = |index| plane.listener_name(index);
    Json(kept.iter().map(|panic| panic_json(panic, name)).collect())
}

/// Answers when another process has taken over, or why not.
async fn upgrade(State(shared): State<Arc<Shared>>) -> Response {
    match shared.upgrade().await {
        Ok(Succeeded { process, flows, standstill }) => Json(json!({
            "process": process,
            "flows": flows,
            "standstill_seconds": seconds(standstill),
        }))
        .into_response(),
        Err(reason) => error(StatusCode::SERVICE_UNAVAILABLE, &reason),
    }
}

async fn drain(
    state: State<Arc<Shared>>,
    path: Path<(String, String)>,
    query: RawQuery,
) -> Response {
    command(&state.0, &path.0, query, Admission::Draining).await
}

async fn activate(
    state: State<Arc<Shared>>,
    path: Path<(String, String)>,
    query: RawQuery,
) -> Response {
    command(&state.0, &path.0, query, Admission::Active).await
}

/// Reads the configuration, and answers when it is in force or refused.
async fn reload(State(shared): State<Arc<Shared>>, RawQuery(query): RawQuery) -> Response {
    let forced = match query.as_deref() {
        None => false,
        Some("force=true") => true,
        Some(_) => return error(StatusCode::BAD_REQUEST, "the query may be ?force=true"),
    };
    let Some(outcome) = shared.reload(forced).await else {
        let sentence = "as many reloads wait as there may be; ask again";
        return error(StatusCode::SERVICE_UNAVAILABLE, sentence);
    };
    match outcome {
        Reloaded::Applied { digest, changes: Changes { told, more } } => {
            let changes: Vec<_> = told.iter().map(ToString::to_string).collect();
            Json(json!({
                "result": "applied", "digest": digest, "changes": changes, "more_changes": more,
            }))
            .into_response()
        }
        Reloaded::Unchanged { digest } => {
            Json(json!({ "result": "unchanged", "digest": digest })).into_response()
        }
        Reloaded::Taken => {
            let sentence = "the configuration is taken, and not in force yet";
            error(StatusCode::SERVICE_UNAVAILABLE, sentence)
        }
        Reloaded::Rejected(mistakes) => {
            let sentence = "the configuration was rejected, the old one goes on";
            let body = Json(json!({ "error": sentence, "mistakes": mistakes }));
            (StatusCode::UNPROCESSABLE_ENTITY, body).into_response()
        }
        Reloaded::Unread(sentence) => error(StatusCode::SERVICE_UNAVAILABLE, &sentence),
    }
}

/// What a server says of itself.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct HalfOpen {
    half_open: u64,
}

/// A server's report of its half-open connections, or that of somebody who asks it. It shows the token of its pool, or comes
/// from whoever may command.
async fn half_open(
    shared: State<Arc<Shared>>,
    Extension(MayCommand(may_command)): Extension<MayCommand>,
    Path((pool, name)): Path<(String, String)>,
    headers: HeaderMap,
    report: Result<Json<HalfOpen>, JsonRejection>,
) -> Response {
    let token = {
        let plane = shared.plane();
        let pool = plane.config().pools.iter().find(|of| of.name == pool);
        pool.and_then(|pool| pool.report_token.clone())
    };
    match token {
        Some(token) if guard::shows(&headers, &token) => {}
        Some(_) => return guard::wants_token("report_token_file of the pool"),
        None if may_command => {}
        None => {
            let sentence = "reports are taken where commands are, or from who shows the token in report_token_file of the pool";
            return error(StatusCode::FORBIDDEN, sentence);
        }
    }
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

/// Answers when the command is in force, and kept if there is a place for that.
async fn command(
    shared: &Shared,
    (pool, name): &(String, String),
    RawQuery(query): RawQuery,
    wanted: Admission,
) -> Response {
    let author = match Author::read(query.as_deref().unwrap_or_default()) {
        Ok(author) => author,
        Err(sentence) => return error(StatusCode::BAD_REQUEST, &sentence),
    };
    let unix_time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let command = Command { wanted, author, unix_time };
    if !shared.change(|plane| plane.command(pool, name, command)) {
        return unknown_backend(pool, name);
    }
    if !shared.until_in_force().await {
        let sentence = "the command is taken, and not in force yet: see /api/v1/backends";
        return error(StatusCode::SERVICE_UNAVAILABLE, sentence);
    }
    if let Err(why) = shared.keep_commands().await {
        let sentence = format!("the command is in force, and will not survive a restart: {why}");
        return error(StatusCode::INTERNAL_SERVER_ERROR, &sentence);
    }
    show_backend(shared, pool, name).unwrap_or_else(|| unknown_backend(pool, name))
}

fn unknown_backend(pool: &str, name: &str) -> Response {
    let sentence = format!("there is no backend \"{name}\" in a pool \"{pool}\"");
    error(StatusCode::NOT_FOUND, &sentence)
}

/// Of moments `ago` says how long ago they were.
fn backend_json(view: &BackendView, ago: impl Fn(Duration) -> Duration) -> Value {
    let BackendView { pool, backend, state, wanted, command, totals, half_open, .. } = view;
    let BackendView { starting, check, live, drain, .. } = view;
    let percent = starting.map_or(100, |starting| 100 * starting.step() / STEPS);
    let ago = |moment: Option<Duration>| moment.map(|moment| seconds(ago(moment)));
    let of_config = live.by_config.iter().enumerate();
    let heard = of_config.filter(|(_, of_config)| of_config.last_heard.is_some());
    let by_config = heard.map(|(index, of_config)| {
        let id = if index < ConfigId::COUNT { index.to_string() } else { "none".to_owned() };
        let connections = of_config.connections;
        let heard = ago(of_config.last_heard);
        (id, json!({ "connections": connections, "heard_seconds_ago": heard }))
    });
    let command = command.as_ref().map(|Command { author: Author { by, reason }, unix_time, .. }| {
        json!({ "by": by, "reason": reason, "unix_time": unix_time })
    });
    let drain = drain.map(|drain| {
        json!({
            "seconds": seconds(drain.lasts),
            "silent_seconds": seconds(drain.silent),
            "complete": drain.is_complete(),
        })
    });
    let check = check.as_ref().map(|CheckView { passes, last, counts, breach, config_id }| {
        let results = counts.iter().map(|(result, n)| (result.label().to_owned(), n.into()));
        json!({
            "passes": passes,
            "last": last.map(CheckResult::label),
            "results": results.collect::<Map<_, _>>(),
            "config_id": config_id.map(ConfigId::get),
            "connection_ids": breach.as_ref().map(|Breach { expected, found }| {
                json!({ "expected": expected, "found": found.to_string() })
            }),
        })
    });
    let server_ids = backend.server_ids.iter();
    let server_ids: Map<_, _> =
        server_ids.map(|(id, server)| (id.to_string(), server.to_string().into())).collect();
    let refused = totals.refused.iter();
    let refused: Map<_, _> = refused.map(|(r, n)| (r.label().to_owned(), n.into())).collect();
    json!({
        "pool": pool,
        "name": backend.name,
        "address": backend.address,
        "state": state.label(),
        "wanted": wanted.as_str(),
        "wanted_by": if command.is_some() { "operator" } else { "file" },
        "command": command,
        "weight": backend.weight,
        "weight_percent": percent,
        "server_ids": server_ids,
        "datagrams_forwarded": totals.forwarded,
        "datagrams_returned": totals.returned,
        "refused": totals.refused.total(),
        "refused_by_errno": refused,
        "misnamed": totals.misnamed,
        "half_open": half_open,
        "honours_tokens": view.honours.map(Honours::label),
        "token_keys": view.token_keys,
        "clock_skew_seconds": view.clock_skew,
        "check": check,
        "live": {
            "connections": live.connections(),
            "flows": live.flows,
            "heard_seconds_ago": ago(live.last_heard()),
            "by_config_id": by_config.collect::<Map<_, _>>(),
        },
        "drain": drain,
    })
}

fn seconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e3).round() / 1e3
}

fn panic_json<'a>(panic: &Panic, name: impl Fn(ListenerIndex) -> Option<&'a str>) -> Value {
    let Panic { time, worker, told: Told { message, place }, flows, suspect } = panic;
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let datagram = suspect.as_ref().map(|Suspect { origin, client, listener, octets }| {
        let hex = octets.iter().fold(String::with_capacity(2 * octets.len()), |mut hex, octet| {
            // Writing to a string cannot fail.
            let _ = write!(hex, "{octet:02x}");
            hex
        });
        json!({
            "of": origin.label(),
            "client": client,
            "listener": name(*listener),
            "bytes": octets.len(),
            "hex": hex,
        })
    });
    json!({
        "unix_time": seconds,
        "worker": worker,
        "message": message,
        "place": place,
        "flows_lost": flows,
        "datagram": datagram,
    })
}

async fn not_found() -> Response {
    error(
        StatusCode::NOT_FOUND,
        "there is /, /metrics, /healthz, /readyz, /api/v1/backends, /api/v1/config, \
         /api/v1/decisions, /api/v1/explain, /api/v1/panics, /api/v1/rotation, /api/v1/running, /api/v1/backends/{pool}/{name}, and POST /api/v1/reload, /api/v1/upgrade, /api/v1/backends/{pool}/{name}/drain, /activate and /half_open",
    )
}

async fn method_not_allowed(method: Method) -> Response {
    error(StatusCode::METHOD_NOT_ALLOWED, &format!("{method} is not possible here"))
}

#[cfg(test)]
mod tests {
    use axum::body;
    use axum::http::Request;
    use hyper::service::Service as _;
    use hyper_util::service::TowerToHyperService;

    use super::*;
    use crate::{
        control::plane::ControlPlane,
        fixtures,
        memory::Memory,
        worker::{
            mailbox::Mailboxes,
            panics::{Origin, Panics},
        },
    };

    #[tokio::test]
    async fn metrics_are_compressed_for_who_takes_them_so() {
        let memory = Arc::new(Memory::new(10, Instant::now(), [0; 4]));
        let plane = ControlPlane::new(fixtures::config(true), memory, [1, 2]);
        let shared = Shared::new(plane, Mailboxes::default(), Arc::new(Panics::new(2)));
        let router = router(Arc::new(shared), Access::Everything);
        let get = async |accepts: &str| {
            let request = Request::get("/metrics").header(header::HOST, "localhost");
            let request = request.header(header::ACCEPT_ENCODING, accepts);
            let request = request.body(body::Body::empty()).unwrap();
            let answer = TowerToHyperService::new(router.clone()).call(request).await.unwrap();
            let coding = answer.headers().get(header::CONTENT_ENCODING).cloned();
            assert_eq!(answer.headers()[header::VARY], "accept-encoding");
            (coding, body::to_bytes(answer.into_body(), 1 << 20).await.unwrap())
        };
        let (coding, plain) = get("identity").await;
        assert_eq!(coding, None);
        assert!(plain.starts_with(b"# HELP quic_lb_"));
        let (coding, octets) = get("deflate, gzip").await;
        assert_eq!(coding.unwrap(), "gzip");
        let mut decoder = flate2::read::GzDecoder::new(&octets[..]);
        let mut told = String::new();
        std::io::Read::read_to_string(&mut decoder, &mut told).unwrap();
        assert!(told.starts_with("# HELP quic_lb_"), "{told}");
    }

    #[tokio::test]
    async fn panics_are_shown_with_what_the_worker_was_at() {
        let memory = Arc::new(Memory::new(10, Instant::now(), [0; 4]));
        let plane = ControlPlane::new(fixtures::config(true), memory, [1, 2]);
        let panics = Arc::new(Panics::new(2));
        let router = router(
            Arc::new(Shared::new(plane, Mailboxes::default(), Arc::clone(&panics))),
            Access::Everything,
        );
        let get = async |path: &str| {
            let request = Request::get(path).header(header::HOST, "localhost");
            let request = request.body(body::Body::empty()).unwrap();
            let answer = TowerToHyperService::new(router.clone()).call(request).await.unwrap();
            assert_eq!(answer.status(), StatusCode::OK, "{path}");
            let octets = body::to_bytes(answer.into_body(), 1 << 20).await.unwrap();
            serde_json::from_slice::<Value>(&octets).unwrap()
        };
        assert_eq!(get("/api/v1/panics").await, json!([]));
        assert_eq!(get("/readyz").await, json!({ "ready": true }));

        let suspect = Suspect {
            origin: Origin::Client,
            client: "192.0.2.7:50000".parse().unwrap(),
            listener: ListenerIndex(0),
            octets: [0x40, 7].into(),
        };
        let told = Told { message: "no".to_owned(), place: "lb/src/x.rs:1:2".to_owned() };
        let time = UNIX_EPOCH + Duration::from_secs(5);
        let panic = Panic { time, worker: 1, told, flows: 3, suspect: None };
        for _ in 0..4 {
            panics.add(Instant::now(), panic.clone());
        }
        assert_eq!(get("/readyz").await, json!({ "ready": true }));
        panics.add(Instant::now(), Panic { suspect: Some(suspect), ..panic });
        let ready = get("/readyz").await;
        assert_eq!((&ready["ready"], &ready["workers"]), (&json!(true), &json!([1])));
        let shown = get("/api/v1/panics").await;
        assert_eq!(shown.as_array().unwrap().len(), 5);
        assert_eq!(shown[0]["datagram"], Value::Null);
        let datagram = json!({
            "of": "client", "client": "192.0.2.7:50000", "listener": "edge", "bytes": 2, "hex": "4007",
        });
        assert_eq!(
            shown[4],
            json!({
                "unix_time": 5, "worker": 1, "message": "no", "place": "lb/src/x.rs:1:2", "flows_lost": 3,
                "datagram": datagram,
            })
        );
    }
}
