//! Content that can be checked at any offset: octets 4k to 4k+3 are k as a big-endian number, so
//! that whatever is lost, doubled or moved shows.

use sha2::{Digest as _, Sha256};

/// A SHA-256 digest.
pub type Digest = [u8; 32];

/// Writes the pattern from `offset` on into all of `out`.
pub fn fill(offset: usize, out: &mut [u8]) {
    // Up to the next whole word, then word by word: tests move gigabytes of this.
    let within = offset % 4;
    let (head, rest) = out.split_at_mut(out.len().min((4 - within) % 4));
    head.copy_from_slice(&word(offset)[within..][..head.len()]);
    let start = offset + head.len();
    for (at, octets) in (start..).step_by(4).zip(rest.chunks_mut(4)) {
        octets.copy_from_slice(&word(at)[..octets.len()]);
    }
}

/// `length` octets from `offset` on.
#[must_use]
pub fn octets(offset: usize, length: usize) -> Vec<u8> {
    let mut out = vec![0; length];
    fill(offset, &mut out);
    out
}

/// The first `length` octets, in pieces.
pub fn blocks(length: usize) -> impl Iterator<Item = Vec<u8>> {
    const BLOCK: usize = 1 << 16;
    (0..length).step_by(BLOCK).map(move |offset| octets(offset, BLOCK.min(length - offset)))
}

/// The digest of the first `length` octets.
#[must_use]
pub fn digest(length: usize) -> Digest {
    let mut hasher = Sha256::new();
    blocks(length).for_each(|block| hasher.update(block));
    hasher.finalize().into()
}

fn word(at: usize) -> [u8; 4] {
    #[expect(clippy::cast_possible_truncation, reason = "the pattern repeats after 16 GiB")]
    let word = (at / 4) as u32;
    word.to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pattern_is_the_same_from_wherever_it_is_written() {
        let whole = octets(0, 2000);
        assert_eq!(&whole[1020..1028], &[0, 0, 0, 255, 0, 0, 1, 0]);
        for offset in [0, 1, 2, 3, 1021] {
            assert_eq!(octets(offset, 500), whole[offset..][..500]);
        }
    }

    #[test]
    fn the_digest_is_that_of_the_octets() {
        for length in [0, 1, 65_535, 65_536, 65_537, 200_000] {
            let whole: Digest = Sha256::digest(octets(0, length)).into();
            assert_eq!(digest(length), whole);
        }
    }
}
