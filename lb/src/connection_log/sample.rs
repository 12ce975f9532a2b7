//! The share of flows that is logged.

/// How many of 2^64 flows are logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample(u64);

impl Sample {
    /// So many of a million.
    #[must_use]
    pub const fn of_millionths(millionths: u32) -> Self {
        Self((u64::MAX / 1_000_000).saturating_mul(millionths as u64))
    }

    /// Whether the flow that has drawn this number is one of them.
    pub(super) const fn takes(self, drawn: u64) -> bool {
        // So that all are all, whatever is lost by division.
        self.0 / (u64::MAX / 1_000_000) == 1_000_000 || drawn < self.0
    }
}
