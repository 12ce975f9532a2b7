//! What stands for a connection ID of a server where only whether two are the same matters.

use serde::{Deserialize, Serialize};

/// The last octets of a connection ID: of one that servers make, they are random.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CidTag(u64);

impl CidTag {
    /// Of the whole connection ID.
    #[inline]
    #[must_use]
    pub fn new(cid: &[u8]) -> Self {
        match cid.last_chunk::<8>() {
            Some(last) => Self(u64::from_ne_bytes(*last)),
            None => Self(cid.iter().fold(1, |tag, &octet| tag << 8 | u64::from(octet))),
        }
    }

    /// One of 64 places, evenly.
    pub(crate) const fn place(self) -> u32 {
        // The golden ratio of the range: the upper bits depend on all of them.
        (self.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58) as u32
    }
}
