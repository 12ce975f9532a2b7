//! What an active check of a backend comes to, by the words of the metrics.

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
}

impl From<CheckResult> for Finding {
    fn from(result: CheckResult) -> Self {
        Self { result, cids: Vec::new() }
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
