//! The time, on both clocks that decisions go by.

use std::time::{Instant, SystemTime};

/// The same moment on the clock that only goes forward and on the one that tokens are dated by.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// The former.
    pub now: Instant,
    /// The latter.
    pub unix: SystemTime,
}

impl Clock {
    pub(super) fn unix_at(&self, now: Instant) -> SystemTime {
        let since = now.saturating_duration_since(self.now);
        self.unix.checked_add(since).unwrap_or(self.unix)
    }
}
