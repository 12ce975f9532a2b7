//! A connection as its endpoint shares it with those who act on it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::super::connection::Connection;

/// A connection under a lock of its own. The endpoint holds it for one datagram, one deadline or
/// one transmission at a time, so that tasks which act on other connections wait for nobody, and
/// those of this one not for long.
///
/// Whoever acts on a connection by this handle has the endpoint look at it afterwards:
/// [`Endpoint::look_at`](super::Endpoint::look_at). Whoever holds a lock must not call the endpoint,
/// which takes it too.
#[derive(Clone, Debug)]
pub struct SharedConnection(Arc<Mutex<Connection>>);

impl SharedConnection {
    pub(super) fn new(connection: Connection) -> Self {
        Self(Arc::new(Mutex::new(connection)))
    }

    /// Waits for the connection, and holds it until the guard is dropped.
    pub fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic of somebody who held it leaves the connection as valid as any error would.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(super) fn exclusive(&mut self) -> Option<&mut Connection> {
        Some(Arc::get_mut(&mut self.0)?.get_mut().unwrap_or_else(PoisonError::into_inner))
    }
}
