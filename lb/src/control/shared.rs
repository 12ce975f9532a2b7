//! What the tasks of the control plane share: its state behind a lock, and the registry of metrics
//! that reads it.

#![expect(
    clippy::disallowed_methods,
    reason = "the shell around the state of the control plane: it gives it the time"
)]

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use super::plane::ControlPlane;
use crate::metrics::Metrics;

/// What the tasks of the control plane have in common.
pub(crate) struct Shared {
    plane: Arc<Mutex<ControlPlane>>,
    metrics: Metrics,
}

impl Shared {
    pub(crate) fn new(plane: ControlPlane) -> Self {
        let plane = Arc::new(Mutex::new(plane));
        let read = Arc::clone(&plane);
        Self { plane, metrics: Metrics::new(move || locked(&read).reading(Instant::now())) }
    }

    /// The state. To be given back before anything is awaited.
    pub(crate) fn plane(&self) -> MutexGuard<'_, ControlPlane> {
        locked(&self.plane)
    }

    /// What `/metrics` shows; the state must not be held meanwhile.
    pub(crate) fn metrics(&self) -> String {
        self.metrics.render()
    }
}

fn locked(plane: &Mutex<ControlPlane>) -> MutexGuard<'_, ControlPlane> {
    // The state is replaced piece by piece, each of them whole: a panic leaves nothing half done
    // that would be worse than to stop.
    plane.lock().unwrap_or_else(PoisonError::into_inner)
}
