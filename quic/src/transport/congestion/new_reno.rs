//! NewReno, as RFC 9002 gives it in section 7 and appendix B.

use std::time::Instant;

use super::{Acked, Controller, initial_window, minimum_window};

/// Halves on congestion, grows by one datagram per round trip.
#[derive(Clone, Debug)]
pub struct NewReno {
    datagram: u16,
    window: u64,
    slow_start_threshold: u64,
    recovery_start: Option<Instant>,
    /// Octets acknowledged in congestion avoidance that have not yet grown the window.
    credit: u64,
    /// Window, threshold and start of recovery before the last reduction, if that may have been for
    /// nothing.
    before: Option<(u64, u64, Option<Instant>)>,
}

impl NewReno {
    /// The initial state, for datagrams of this size.
    #[must_use]
    pub fn new(datagram: u16) -> Self {
        Self {
            datagram,
            window: initial_window(datagram),
            slow_start_threshold: u64::MAX,
            recovery_start: None,
            credit: 0,
            before: None,
        }
    }
}

impl Controller for NewReno {
    fn on_acked(&mut self, acked: &Acked) {
        if acked.app_limited || self.recovery_start.is_some_and(|start| acked.sent <= start) {
            return;
        }
        if self.in_slow_start() {
            self.window += acked.size;
            return;
        }
        self.credit += acked.size;
        if self.credit >= self.window {
            self.credit -= self.window;
            self.window += u64::from(self.datagram);
        }
    }

    fn on_congestion(&mut self, now: Instant, sent: Instant) {
        if self.recovery_start.is_some_and(|start| sent <= start) {
            return;
        }
        self.before = Some((self.window, self.slow_start_threshold, self.recovery_start));
        self.recovery_start = Some(now);
        self.window = (self.window / 2).max(minimum_window(self.datagram));
        self.slow_start_threshold = self.window;
        self.credit = 0;
    }

    fn on_spurious_congestion(&mut self) {
        let Some(before) = self.before.take().filter(|&(window, ..)| window > self.window) else {
            return;
        };
        (self.window, self.slow_start_threshold, self.recovery_start) = before;
        self.credit = 0;
    }

    fn on_persistent_congestion(&mut self) {
        self.before = None;
        self.recovery_start = None;
        self.window = minimum_window(self.datagram);
        self.credit = 0;
    }

    fn set_datagram(&mut self, datagram: u16) {
        self.datagram = datagram;
        self.window = self.window.max(minimum_window(datagram));
    }

    fn window(&self) -> u64 {
        self.window
    }

    fn in_slow_start(&self) -> bool {
        self.window < self.slow_start_threshold
    }
}
