//! CUBIC, after RFC 9438. The window is reckoned in datagrams, as the RFC does.

use std::time::{Duration, Instant};

use super::{Acked, Controller, initial_window, minimum_window};

/// <https://www.rfc-editor.org/rfc/rfc9438.html#section-5.1>
const C: f64 = 0.4;
/// <https://www.rfc-editor.org/rfc/rfc9438.html#section-4.6>
const BETA: f64 = 0.7;
/// <https://www.rfc-editor.org/rfc/rfc9438.html#section-4.3>
const ALPHA: f64 = 3.0 * (1.0 - BETA) / (1.0 + BETA);

/// Grows by a cubic function of the time since the last congestion.
#[derive(Clone, Debug)]
pub struct Cubic {
    datagram: u16,
    window: u64,
    slow_start_threshold: u64,
    recovery_start: Option<Instant>,
    /// The window before the last reduction, in datagrams; W_max.
    max: f64,
    /// The congestion avoidance since then.
    epoch: Option<Epoch>,
    /// What was before the last reduction, if that may have been for nothing.
    before: Option<Before>,
}

/// <https://www.rfc-editor.org/rfc/rfc9438.html#section-4.9.2>
#[derive(Clone, Debug)]
struct Before {
    window: u64,
    slow_start_threshold: u64,
    recovery_start: Option<Instant>,
    max: f64,
    epoch: Option<Epoch>,
}

#[derive(Clone, Debug)]
struct Epoch {
    /// When it began. Moved on by the time the application had too little to send, so that idling
    /// grows nothing (section 5.8).
    start: Instant,
    /// Since when the application has been the limit.
    idle_since: Option<Instant>,
    /// Seconds until the window is back at `max`; K.
    k: f64,
    /// What Reno would have by now, in datagrams; W_est.
    estimate: f64,
    /// The fraction of an octet not yet added.
    remainder: f64,
}

impl Cubic {
    /// The initial state, for datagrams of this size.
    #[must_use]
    pub fn new(datagram: u16) -> Self {
        Self {
            datagram,
            window: initial_window(datagram),
            slow_start_threshold: u64::MAX,
            recovery_start: None,
            max: 0.0,
            epoch: None,
            before: None,
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "windows are far below 2^53 octets")]
    fn datagrams(&self, octets: u64) -> f64 {
        octets as f64 / f64::from(self.datagram)
    }

    /// Congestion avoidance, <https://www.rfc-editor.org/rfc/rfc9438.html#section-4.2>
    fn avoid(&mut self, acked: &Acked) {
        let window = self.datagrams(self.window);
        let acked_datagrams = self.datagrams(acked.size);
        let max = self.max;
        let epoch = self.epoch.get_or_insert_with(|| Epoch {
            start: acked.now,
            idle_since: None,
            k: ((max - window).max(0.0) / C).cbrt(),
            estimate: window,
            remainder: 0.0,
        });
        if let Some(since) = epoch.idle_since.take() {
            epoch.start += acked.now.saturating_duration_since(since);
        }
        let cubic = |time: Duration, origin: f64| {
            let distance = time.as_secs_f64() - epoch.k;
            C * distance * distance * distance + origin
        };
        // Below its last maximum the curve is concave around that; above, it starts from here.
        let origin = max.max(epoch.estimate.min(window)).max(1.0);
        let elapsed = acked.now.saturating_duration_since(epoch.start);
        let now = cubic(elapsed, origin);
        let target = cubic(elapsed + acked.rtt, origin).clamp(window, 1.5 * window);
        // Section 4.3: as Reno would grow; at its own rate once past the last maximum.
        let alpha = if epoch.estimate >= max { 1.0 } else { ALPHA };
        epoch.estimate += alpha * acked_datagrams / window;
        let grown = if now < epoch.estimate {
            epoch.estimate.max(window)
        } else {
            window + (target - window) / window * acked_datagrams
        };
        let octets = (grown - window) * f64::from(self.datagram) + epoch.remainder;
        let whole = octets.max(0.0).floor();
        epoch.remainder = octets - whole;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "not negative, and at most half a window"
        )]
        {
            self.window += whole as u64;
        }
    }
}

impl Controller for Cubic {
    fn on_acked(&mut self, acked: &Acked) {
        if acked.app_limited {
            if let Some(epoch) = &mut self.epoch {
                epoch.idle_since.get_or_insert(acked.now);
            }
            return;
        }
        if self.recovery_start.is_some_and(|start| acked.sent <= start) {
            return;
        }
        if self.in_slow_start() {
            self.window += acked.size;
        } else {
            self.avoid(acked);
        }
    }

    fn on_congestion(&mut self, now: Instant, sent: Instant) {
        if self.recovery_start.is_some_and(|start| sent <= start) {
            return;
        }
        self.before = Some(Before {
            window: self.window,
            slow_start_threshold: self.slow_start_threshold,
            recovery_start: self.recovery_start,
            max: self.max,
            epoch: self.epoch.take(),
        });
        self.recovery_start = Some(now);
        let window = self.datagrams(self.window);
        // Fast convergence, section 4.7.
        self.max = if window < self.max { window * (1.0 + BETA) / 2.0 } else { window };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "a fraction of a window"
        )]
        let reduced = (self.window as f64 * BETA) as u64;
        self.window = reduced.max(minimum_window(self.datagram));
        self.slow_start_threshold = self.window;
    }

    fn on_spurious_congestion(&mut self) {
        let Some(before) = self.before.take().filter(|before| before.window > self.window) else {
            return;
        };
        self.window = before.window;
        self.slow_start_threshold = before.slow_start_threshold;
        self.recovery_start = before.recovery_start;
        self.max = before.max;
        self.epoch = before.epoch;
    }

    fn on_persistent_congestion(&mut self) {
        self.before = None;
        // Section 4.8.
        self.recovery_start = None;
        self.epoch = None;
        self.slow_start_threshold =
            self.slow_start_threshold.min(self.window).max(2 * minimum_window(self.datagram));
        self.max = 0.0;
        self.window = minimum_window(self.datagram);
    }

    fn set_datagram(&mut self, datagram: u16) {
        let scale = f64::from(self.datagram) / f64::from(datagram);
        self.max *= scale;
        if let Some(before) = &mut self.before {
            before.max *= scale;
            before.epoch = None;
        }
        self.datagram = datagram;
        self.window = self.window.max(minimum_window(datagram));
        self.epoch = None;
    }

    fn window(&self) -> u64 {
        self.window
    }

    fn in_slow_start(&self) -> bool {
        self.window < self.slow_start_threshold
    }
}
