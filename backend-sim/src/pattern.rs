//! Content that can be checked at any offset: octets 4k to 4k+3 are k as a big-endian number, so
//! that whatever is lost, doubled or moved shows. It repeats after 16 GiB.

use bytes::Bytes;

/// Octets that are made at once.
const BLOCK: usize = 1 << 16;

/// Writes the pattern from `offset` on into all of `out`.
pub fn fill(offset: u64, out: &mut [u8]) {
    let (mut at, mut rest) = (offset, out);
    // Up to the next whole word, then words, then what is left.
    while !at.is_multiple_of(4) {
        let Some((first, others)) = rest.split_first_mut() else { return };
        *first = octet(at);
        (at, rest) = (at + 1, others);
    }
    let (words, tail) = rest.as_chunks_mut::<4>();
    for out in words {
        *out = word(at);
        at += 4;
    }
    for out in tail {
        *out = octet(at);
        at += 1;
    }
}

/// Whether `octets` are the pattern from `offset` on.
#[must_use]
pub fn matches(offset: u64, octets: &[u8]) -> bool {
    let (mut at, mut rest) = (offset, octets);
    while !at.is_multiple_of(4) {
        let Some((first, others)) = rest.split_first() else { return true };
        if *first != octet(at) {
            return false;
        }
        (at, rest) = (at + 1, others);
    }
    let (words, tail) = rest.as_chunks::<4>();
    words.iter().zip(0..).all(|(found, nth)| *found == word(at + 4 * nth)) && {
        let end = at + 4 * words.len() as u64;
        tail.iter().zip(end..).all(|(found, at)| *found == octet(at))
    }
}

/// The first `length` octets, in pieces.
pub fn blocks(length: u64) -> impl Iterator<Item = Bytes> {
    (0..length).step_by(BLOCK).map(move |offset| {
        let size = usize::try_from(length - offset).map_or(BLOCK, |left| left.min(BLOCK));
        let mut block = vec![0; size];
        fill(offset, &mut block);
        block.into()
    })
}

const fn octet(at: u64) -> u8 {
    word(at)[(at % 4) as usize]
}

/// The word that the octet at `at` belongs to.
const fn word(at: u64) -> [u8; 4] {
    #[expect(clippy::cast_possible_truncation, reason = "the pattern repeats after 16 GiB")]
    let word = (at / 4) as u32;
    word.to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn octets(offset: u64, length: usize) -> Vec<u8> {
        let mut out = vec![0; length];
        fill(offset, &mut out);
        out
    }

    #[test]
    fn the_pattern_is_the_same_from_wherever_it_is_written() {
        let whole = octets(0, 2000);
        assert_eq!(&whole[1020..1028], &[0, 0, 0, 255, 0, 0, 1, 0]);
        for offset in [0, 1, 2, 3, 1021] {
            for length in [0, 1, 2, 5, 500] {
                let part = octets(offset, length);
                assert_eq!(part, whole[usize::try_from(offset).unwrap()..][..length]);
                assert!(matches(offset, &part));
            }
        }
    }

    #[test]
    fn every_changed_octet_shows() {
        for offset in 0..4 {
            let right = octets(offset, 11);
            for at in 0..right.len() {
                let mut wrong = right.clone();
                wrong[at] ^= 0x10;
                assert!(!matches(offset, &wrong), "byte {at} from {offset} on");
            }
            assert!(!matches(offset + 1, &right[..]));
        }
    }

    #[test]
    fn blocks_make_up_the_whole() {
        for length in [0, 1, 65_535, 65_536, 65_537, 200_000] {
            let joined: Vec<u8> = blocks(length).flatten().collect();
            assert_eq!(joined, octets(0, usize::try_from(length).unwrap()));
        }
    }
}
