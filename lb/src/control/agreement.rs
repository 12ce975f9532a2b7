//! What a balancer is compared by: with others of its fleet, by what its decisions follow from, the states of backends as it sees them, and
//! what operators have commanded; with a file, by all of its configuration, and what of it live connections use.

#![expect(
    clippy::disallowed_methods,
    reason = "the shell around the state of the control plane: it gives it the time"
)]

use std::{sync::Arc, time::Instant};

use axum::{
    Json,
    extract::State,
    http::StatusCode,
    response::{IntoResponse as _, Response},
};
use serde_json::{Map, Value, json};
use tokio::task;

use super::{
    answers::error,
    commands::{Author, Command},
    plane::{
        removals::{InUse, Taken},
        views::BackendView,
    },
    shared::Shared,
};

/// Everything in maps by name, so that a difference has a place.
pub(super) async fn decisions(State(shared): State<Arc<Shared>>) -> Response {
    beside(move || decided_by(&shared)).await
}

/// What a file has to be compared with: would a reload be refused?
pub(super) async fn running(State(shared): State<Arc<Shared>>) -> Response {
    beside(move || run_by(&shared)).await
}

/// With thousands of backends a document takes milliseconds, for which the thread that answers everybody is not to wait.
async fn beside(work: impl FnOnce() -> Value + Send + 'static) -> Response {
    let made = task::spawn_blocking(move || Json(work()).into_response()).await;
    let failed = || error(StatusCode::INTERNAL_SERVER_ERROR, "the document could not be made");
    made.unwrap_or_else(|_| failed())
}

fn decided_by(shared: &Shared) -> Value {
    let (config, digest, views) = {
        let plane = shared.plane();
        (plane.shared_config(), plane.digest().to_owned(), plane.views(Instant::now()))
    };
    let (mut states, mut commands) = (Map::new(), Map::new());
    for BackendView { pool, backend, state, command, .. } in views {
        let of_pool = states.entry(&pool).or_insert_with(|| json!({}));
        of_pool[&backend.name] = json!(state.label());
        if let Some(Command { wanted, author: Author { by, reason }, unix_time }) = command {
            commands.insert(
                format!("{pool}/{}", backend.name),
                json!({ "wanted": wanted.as_str(), "by": by, "reason": reason, "unix_time": unix_time }),
            );
        }
    }
    json!({
        "digest": digest,
        "decisions": config.decisions(),
        "states": states,
        "commands": commands,
    })
}

fn run_by(shared: &Shared) -> Value {
    let (config, in_use) = {
        let plane = shared.plane();
        (plane.shared_config(), plane.in_use(Instant::now()))
    };
    let in_use = in_use.iter().map(|InUse { pool, backend, what, connections }| {
        let config_id = match what {
            Taken::Backend => None,
            Taken::CidConfig(id) => Some(id.get()),
        };
        json!({ "pool": pool, "backend": backend, "config_id": config_id, "connections": connections })
    });
    json!({ "config": config.compared_document(), "in_use": in_use.collect::<Vec<_>>() })
}
