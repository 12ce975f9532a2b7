//! What an active check of a backend comes to, by the words of the metrics.

use std::time::Duration;

use quic::connection_id::ConnectionId;

/// The outcome of one check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckResult {
    /// The backend answered as it should.
    Answered,
    /// It did not within the time that it had.
    Timeout,
    /// It cannot be sent to: nobody listens there, or there is no way.
    Refused,
    /// What came was no answer to what was asked.
    Wrong,
    /// It closed the connection instead of completing the handshake, or because of it.
    Closed,
    /// Its certificate is not good: too old, for another name, or of nobody who is trusted.
    Certificate,
    /// It answered a request with another status than it should.
    Status,
    /// It answered as it should, under connection IDs that do not lead to it.
    Miswired,
    /// Nothing could be asked, for a reason that has nothing to do with the backend.
    Unsent,
}

impl CheckResult {
    /// Every outcome.
    pub const ALL: [Self; 9] = [
        Self::Answered,
        Self::Timeout,
        Self::Refused,
        Self::Wrong,
        Self::Closed,
        Self::Certificate,
        Self::Status,
        Self::Miswired,
        Self::Unsent,
    ];

    /// The metric label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Timeout => "timeout",
            Self::Refused => "refused",
            Self::Wrong => "wrong",
            Self::Closed => "closed",
            Self::Certificate => "certificate",
            Self::Status => "status",
            Self::Miswired => "miswired",
            Self::Unsent => "unsent",
        }
    }
}

/// What a check has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Its outcome. That connection IDs are wrong is not known yet.
    pub result: CheckResult,
    /// The connection IDs that the backend has chosen; empty where the check shows none.
    pub cids: Vec<ConnectionId>,
    /// How long it took.
    pub took: Duration,
}

impl From<CheckResult> for Finding {
    fn from(result: CheckResult) -> Self {
        Self { result, cids: Vec::new(), took: Duration::ZERO }
    }
}

/// How long the passed checks of a pool took.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct CheckTimes {
    /// So many took at most this bound and more than the one before; the last one has no bound.
    counts: [u64; CheckTimes::BOUNDS.len() + 1],
    sum: Duration,
}

impl CheckTimes {
    /// From what takes a rack to what takes the longest of usual timeouts.
    pub const BOUNDS: [Duration; 11] = [
        Duration::from_millis(1),
        Duration::from_millis(2),
        Duration::from_millis(5),
        Duration::from_millis(10),
        Duration::from_millis(20),
        Duration::from_millis(50),
        Duration::from_millis(100),
        Duration::from_millis(200),
        Duration::from_millis(500),
        Duration::from_secs(1),
        Duration::from_secs(5),
    ];

    /// Adds one.
    pub fn add(&mut self, took: Duration) {
        let place = Self::BOUNDS.partition_point(|bound| *bound < took);
        self.counts[place] += 1;
        self.sum = self.sum.saturating_add(took);
    }

    /// How many took at most each bound.
    pub fn cumulative(&self) -> impl Iterator<Item = (Duration, u64)> {
        let sums = self.counts.iter().scan(0, |sum, count| {
            *sum += count;
            Some(*sum)
        });
        Self::BOUNDS.into_iter().zip(sums)
    }

    /// How many there were, and how long they took together.
    #[must_use]
    pub fn total(&self) -> (u64, Duration) {
        (self.counts.iter().sum(), self.sum)
    }
}

/// How often each outcome was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct CheckCounts([u64; CheckResult::ALL.len()]);

impl CheckCounts {
    /// Counts one.
    pub const fn add(&mut self, result: CheckResult) {
        self.0[result as usize] += 1;
    }

    /// All of them, with how often each was seen.
    pub fn iter(self) -> impl Iterator<Item = (CheckResult, u64)> {
        CheckResult::ALL.into_iter().zip(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_fall_at_or_below_their_bounds() {
        let mut times = CheckTimes::default();
        for micros in [0, 1_000, 1_001, 2_000, 5_000_000, 5_000_001] {
            times.add(Duration::from_micros(micros));
        }
        let cumulative: Vec<_> = times.cumulative().map(|(_, count)| count).collect();
        assert_eq!(cumulative, [2, 4, 4, 4, 4, 4, 4, 4, 4, 4, 5]);
        assert_eq!(times.total(), (6, Duration::from_micros(10_004_002)));
    }
}
