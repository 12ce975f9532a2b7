//! What the tasks of the control plane share: its state behind a lock, and the registry of metrics
//! that reads it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::plane::Plane;
use crate::metrics::Metrics;

/// What the tasks of the control plane have in common.
pub(crate) struct Shared {
    plane: Arc<Mutex<Plane>>,
    metrics: Metrics,
}

impl Shared {
    pub(crate) fn new(plane: Plane) -> Self {
        let plane = Arc::new(Mutex::new(plane));
        let read = Arc::clone(&plane);
        Self { plane, metrics: Metrics::new(move || locked(&read).reading()) }
    }

    /// The state. To be given back before anything is awaited.
    pub(crate) fn plane(&self) -> MutexGuard<'_, Plane> {
        locked(&self.plane)
    }

    /// What `/metrics` shows; the state must not be held meanwhile.
    pub(crate) fn metrics(&self) -> String {
        self.metrics.render()
    }
}

fn locked(plane: &Mutex<Plane>) -> MutexGuard<'_, Plane> {
    // The state is replaced piece by piece, each of them whole: a panic leaves nothing half done
    // that would be worse than to stop.
    plane.lock().unwrap_or_else(PoisonError::into_inner)
}
