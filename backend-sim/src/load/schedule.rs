//! When requests are due.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// The times of requests, shared by all connections.
#[derive(Debug)]
pub(super) struct Schedule {
    start: Instant,
    duration: Duration,
    /// From one request to the next; `None` where the next one is due at once.
    interval: Option<Duration>,
    next: AtomicU64,
    ended: AtomicBool,
}

impl Schedule {
    pub(super) fn new(start: Instant, duration: Duration, rate: Option<f64>) -> Self {
        let interval = rate
            .filter(|rate| *rate > 0.0)
            .map(|rate| Duration::try_from_secs_f64(1.0 / rate).unwrap_or(duration));
        Self { start, duration, interval, next: AtomicU64::new(0), ended: AtomicBool::new(false) }
    }

    /// When the next request is due, which nobody else is told; `None` when the time is over.
    pub(super) fn next(&self, now: Instant) -> Option<Instant> {
        let due = match self.interval {
            None => now.saturating_duration_since(self.start),
            Some(interval) => {
                let nth = self.next.fetch_add(1, Relaxed);
                Duration::try_from_secs_f64(interval.as_secs_f64() * nth as f64)
                    .unwrap_or(Duration::MAX)
            }
        };
        let over = due >= self.duration || self.is_over(now);
        (!over).then(|| self.start + due)
    }

    pub(super) fn is_over(&self, now: Instant) -> bool {
        self.ended.load(Relaxed) || now.saturating_duration_since(self.start) >= self.duration
    }

    /// Is over from now on.
    pub(super) fn end(&self) {
        self.ended.store(true, Relaxed);
    }

    /// Time since the start, up to the end.
    pub(super) fn elapsed(&self) -> Duration {
        self.start.elapsed().min(self.duration)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn an_open_loop_is_due_at_fixed_times_whoever_asks_when() {
        let start = Instant::now();
        let schedule = Schedule::new(start, SECOND, Some(4.0));
        let due: Vec<_> = (0..5).map(|_| schedule.next(start + SECOND / 2)).collect();
        let quarter = |nth| Some(start + SECOND / 4 * nth);
        assert_eq!(due, [quarter(0), quarter(1), quarter(2), quarter(3), None]);
    }

    #[test]
    fn a_closed_loop_is_due_at_once_until_the_time_is_over() {
        let start = Instant::now();
        let schedule = Schedule::new(start, SECOND, None);
        assert_eq!(schedule.next(start + SECOND / 2), Some(start + SECOND / 2));
        assert_eq!(schedule.next(start + SECOND), None);
        schedule.end();
        assert_eq!(schedule.next(start), None);
    }
}
