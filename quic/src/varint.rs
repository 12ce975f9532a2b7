//! Variable-length integers: two bits of length, then 6, 14, 30 or 62 bits of value.
//!
//! <https://www.rfc-editor.org/rfc/rfc9000.html#section-16>

/// The largest value a variable-length integer can carry, 2^62 - 1.
pub const MAX: u64 = (1 << 62) - 1;

/// Reads one integer from the front of `input` and returns it with the octets that follow.
///
/// Returns `None` when `input` ends before the integer does. Every encoding length is accepted for
/// every value, as section 16 allows; callers that need the shortest one check it themselves.
#[must_use]
pub fn read(input: &[u8]) -> Option<(u64, &[u8])> {
    let (&first, rest) = input.split_first()?;
    let extra = (1usize << (first >> 6)) - 1;
    if rest.len() < extra {
        return None;
    }
    let (tail, rest) = rest.split_at(extra);
    let value =
        tail.iter().fold(u64::from(first & 0x3f), |value, &octet| value << 8 | u64::from(octet));
    Some((value, rest))
}

/// Octets that [`write()`] needs for `value`: 1, 2, 4 or 8.
#[must_use]
pub const fn size(value: u64) -> usize {
    match value {
        0..=0x3f => 1,
        0x40..=0x3fff => 2,
        0x4000..=0x3fff_ffff => 4,
        _ => 8,
    }
}

/// Appends `value` in its shortest encoding. Values above [`MAX`] cannot be encoded; their two top
/// bits are lost, so callers keep below it.
pub fn write(value: u64, out: &mut Vec<u8>) {
    debug_assert!(value <= MAX, "a variable-length integer has 62 bits");
    let octets = value.to_be_bytes();
    match size(value) {
        1 => out.push(octets[7]),
        2 => out.extend_from_slice(&[octets[6] | 0x40, octets[7]]),
        4 => out.extend_from_slice(&[octets[4] | 0x80, octets[5], octets[6], octets[7]]),
        _ => {
            out.push((octets[0] & 0x3f) | 0xc0);
            out.extend_from_slice(&octets[1..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The samples of RFC 9000, appendix A.1.
    #[test]
    fn published_samples_decode() {
        let samples: [(&[u8], u64); 5] = [
            (&[0xc2, 0x19, 0x7c, 0x5e, 0xff, 0x14, 0xe8, 0x8c], 151_288_809_941_952_652),
            (&[0x9d, 0x7f, 0x3e, 0x7d], 494_878_333),
            (&[0x7b, 0xbd], 15_293),
            (&[0x25], 37),
            (&[0x40, 0x25], 37),
        ];
        for (octets, value) in samples {
            assert_eq!(read(octets), Some((value, &[][..])));
        }
    }

    #[test]
    fn an_integer_cut_short_is_refused() {
        let full = [0xc2, 0x19, 0x7c, 0x5e, 0xff, 0x14, 0xe8, 0x8c];
        for end in 0..full.len() {
            assert_eq!(read(&full[..end]), None);
        }
    }

    proptest! {
        #[test]
        fn write_then_read_is_identity(value in 0..=MAX, tail in proptest::collection::vec(any::<u8>(), 0..4)) {
            let mut out = Vec::new();
            write(value, &mut out);
            prop_assert_eq!(out.len(), size(value));
            out.extend_from_slice(&tail);
            prop_assert_eq!(read(&out), Some((value, tail.as_slice())));
        }
    }
}
