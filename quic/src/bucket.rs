//! A token bucket: how often something may be done that anybody can ask for.

use std::time::{Duration, Instant};

/// A token bucket, kept as the time at which it would be full again.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    full_at: Instant,
    /// What one token takes to come back.
    interval: Duration,
    /// What all of them take.
    depth: Duration,
}

impl Bucket {
    /// A full bucket of `burst` tokens, of which `per_second` come back in a second; none of both is 0.
    #[must_use]
    pub fn new(now: Instant, per_second: u32, burst: u32) -> Self {
        let interval = Duration::from_secs(1) / per_second.max(1);
        Self { full_at: now, interval, depth: interval * burst.max(1) }
    }

    /// Whether there is a token.
    #[must_use]
    pub fn has_room(&self, now: Instant) -> bool {
        self.full_at.saturating_duration_since(now) + self.interval <= self.depth
    }

    /// Takes a token, if there is one.
    pub fn take(&mut self, now: Instant) -> bool {
        let has_room = self.has_room(now);
        if has_room {
            self.full_at = self.full_at.max(now) + self.interval;
        }
        has_room
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_brings_so_many_and_no_more() {
        for (per_second, burst) in [(1000, 100), (10, 10), (1, 1), (1, 7)] {
            let start = Instant::now();
            let mut bucket = Bucket::new(start, per_second, burst);
            let mut taken = |now| (0..10_000).filter(|_| bucket.take(now)).count();
            assert_eq!(taken(start), burst as usize);
            let steps = (1..=1000).map(|step| start + Duration::from_millis(10 * step));
            let later: usize = steps.map(&mut taken).sum();
            assert_eq!(later, 10 * per_second as usize);
            assert_eq!(taken(start + Duration::from_secs(3600)), burst as usize);
        }
    }
}
