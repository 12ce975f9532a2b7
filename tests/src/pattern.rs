//! The content that `backend-sim` serves, by the lengths and offsets of tests, and its digest.

use backend_sim::pattern;
use bytes::Bytes;
use sha2::{Digest as _, Sha256};

/// A SHA-256 digest.
pub type Digest = [u8; 32];

/// `length` octets from `offset` on.
#[must_use]
pub fn octets(offset: usize, length: usize) -> Vec<u8> {
    let mut out = vec![0; length];
    pattern::fill(offset as u64, &mut out);
    out
}

/// The first `length` octets, in pieces.
pub fn blocks(length: usize) -> impl Iterator<Item = Bytes> {
    pattern::blocks(length as u64)
}

/// The digest of the first `length` octets.
#[must_use]
pub fn digest(length: usize) -> Digest {
    let mut hasher = Sha256::new();
    blocks(length).for_each(|block| hasher.update(block));
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_that_of_the_octets() {
        for length in [0, 1, 65_535, 65_536, 65_537, 200_000] {
            let whole: Digest = Sha256::digest(octets(0, length)).into();
            assert_eq!(digest(length), whole);
        }
    }
}
