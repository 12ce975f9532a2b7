//! What listeners and backends are called, also for a while after they have left the configuration: records come by number.

use std::sync::Arc;

use crate::{
    backend::{BackendId, MAX_BACKENDS},
    client_path::ListenerIndex,
    routing::Routing,
};

/// The names, as of all snapshots that were looked at.
pub(super) struct Names {
    seen: Option<Arc<Routing>>,
    listeners: Vec<Option<String>>,
    /// By slot, those that had it last.
    backends: Vec<Option<Backend>>,
}

struct Backend {
    id: BackendId,
    pool: String,
    name: Arc<str>,
}

/// What a backend is called of which nothing is known any more.
const UNKNOWN: &str = "unknown";

impl Names {
    pub(super) fn new() -> Self {
        let mut backends = Vec::new();
        backends.resize_with(MAX_BACKENDS, || None);
        Self { seen: None, listeners: Vec::new(), backends }
    }

    /// Takes note of those in a snapshot.
    pub(super) fn see(&mut self, routing: &Arc<Routing>) {
        if self.seen.as_ref().is_some_and(|seen| Arc::ptr_eq(seen, routing)) {
            return;
        }
        for (ListenerIndex(number), name) in routing.listener_names() {
            if self.listeners.len() <= number {
                self.listeners.resize(number + 1, None);
            }
            if self.listeners[number].as_deref() != Some(name) {
                self.listeners[number] = Some(name.to_owned());
            }
        }
        for backend in routing.backends() {
            let place = &mut self.backends[backend.id.slot()];
            if place.as_ref().is_none_or(|known| known.id != backend.id) {
                let (pool, name) =
                    (routing.pool(backend.pool).name.clone(), Arc::clone(&backend.name));
                *place = Some(Backend { id: backend.id, pool, name });
            }
        }
        self.seen = Some(Arc::clone(routing));
    }

    pub(super) fn knows(&self, id: BackendId) -> bool {
        self.backends[id.slot()].as_ref().is_some_and(|known| known.id == id)
    }

    pub(super) fn listener(&self, ListenerIndex(number): ListenerIndex) -> &str {
        self.listeners.get(number).and_then(Option::as_deref).unwrap_or(UNKNOWN)
    }

    /// The names of a pool and of a backend in it.
    pub(super) fn backend(&self, id: BackendId) -> (&str, &str) {
        let known = self.backends.get(id.slot()).and_then(Option::as_ref);
        let known = known.filter(|known| known.id == id);
        known.map_or((UNKNOWN, UNKNOWN), |known| (&known.pool, &known.name))
    }
}
