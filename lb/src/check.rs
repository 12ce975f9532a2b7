//! What an active check of a backend comes to, by the words of the metrics.

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
    /// Nothing could be asked, for a reason that has nothing to do with the backend.
    Unsent,
}

impl CheckResult {
    /// Every outcome.
    pub const ALL: [Self; 7] = [
        Self::Answered,
        Self::Timeout,
        Self::Refused,
        Self::Wrong,
        Self::Closed,
        Self::Certificate,
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
            Self::Unsent => "unsent",
        }
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
