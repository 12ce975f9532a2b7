//! A flow-control limit that follows what the application consumes, and grows when consumption is
//! faster than a round trip lets the limit follow.

use std::time::{Duration, Instant};

/// One receive window, of a stream or of the connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    size: u64,
    max: u64,
    limit: u64,
    updated: Option<Instant>,
    /// The last update was lost: the limit goes out again.
    resend: bool,
}

impl Window {
    /// Starts with `size` octets, which may grow to `max`.
    pub(crate) const fn new(size: u64, max: u64) -> Self {
        let max = if max > size { max } else { size };
        Self { size, max, limit: size, updated: None, resend: false }
    }

    /// What the peer has been told, or is about to be.
    pub(crate) const fn limit(&self) -> u64 {
        self.limit
    }

    /// Whether the limit should be raised after `consumed` octets: half of the window is used up.
    pub(crate) const fn is_due(&self, consumed: u64) -> bool {
        self.resend || self.limit.saturating_sub(consumed) <= self.size / 2
    }

    /// The last update was lost.
    pub(crate) const fn resend(&mut self) {
        self.resend = true;
    }

    /// Raises the limit. A window half of which went within two round trips doubles.
    pub(crate) fn raise(&mut self, now: Instant, rtt: Duration, consumed: u64) {
        if self.updated.is_some_and(|at| now.saturating_duration_since(at) < 2 * rtt) {
            self.size = (self.size * 2).min(self.max);
        }
        self.updated = Some(now);
        self.resend = false;
        self.limit = self.limit.max(consumed.saturating_add(self.size));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn req_g07_windows_grow_when_they_are_used_up_fast_and_never_shrink() {
        let rtt = Duration::from_millis(100);
        let start = Instant::now();
        let (mut slow, mut fast) = (Window::new(1000, 8000), Window::new(1000, 8000));
        let mut before = (0, 0);
        for step in 1..10u32 {
            slow.raise(start + 10 * step * rtt, rtt, u64::from(step) * 500);
            fast.raise(start + step * rtt, rtt, u64::from(step) * 500);
            assert!(slow.limit() >= before.0 && fast.limit() >= before.1);
            before = (slow.limit(), fast.limit());
        }
        assert_eq!(before, (4500 + 1000, 4500 + 8000));
    }
}
