//! Datagrams that a network adapter or the kernel had joined into one frame when it was captured
//! (segmentation and receive offload), taken apart again.
//!
//! A capture does not say that this was done, nor where the seams are. All parts but the last are
//! of one size, and each begins with the form of a QUIC packet and with the same connection ID: that
//! is what is looked for. Where it is not found, a frame is one datagram.

/// More than an Ethernet link carries in one datagram: 1,500 bytes without the headers of IPv4 and
/// UDP.
const MTU_PAYLOAD: usize = 1472;

/// A part is at least a packet: header, connection ID, packet number, tag.
const MIN_PART: usize = 21;

/// So many bytes of a connection ID in the same places by chance are one in 2^48.
const MARK: usize = 6;

/// One datagram: what was captured of it, and how long it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part<'a> {
    pub(super) octets: &'a [u8],
    pub(super) wire_len: usize,
}

/// The datagrams in a payload of `wire_len` bytes, of which `octets` were captured.
pub(super) fn parts(octets: &[u8], wire_len: usize) -> Vec<Part<'_>> {
    let Some(size) = part_size(octets, wire_len) else { return vec![Part { octets, wire_len }] };
    let starts = (0..wire_len).step_by(size);
    starts
        .map(|start| {
            let end = wire_len.min(start + size);
            let captured = octets.len().min(end);
            Part { octets: octets.get(start..captured).unwrap_or_default(), wire_len: end - start }
        })
        .collect()
}

fn part_size(octets: &[u8], wire_len: usize) -> Option<usize> {
    let (&first, rest) = octets.split_first()?;
    let is_long = first & 0x80 != 0;
    let cid = if is_long {
        // Several packets with long headers may share a datagram, so that a second one is no seam
        // unless the frame could not be a datagram.
        if wire_len <= MTU_PAYLOAD {
            return None;
        }
        let len = usize::from(*rest.get(4)?);
        rest.get(5..5 + len)?
    } else {
        // How long it is, is not on the wire.
        rest.get(..MARK)?
    };
    let mark = cid.get(..MARK)?;
    let version = is_long.then(|| &rest[..4]);
    let begins = |at: usize| {
        let (&first, rest) = octets[at..].split_first()?;
        if first & 0x80 == 0 {
            return Some(first & 0x40 != 0 && rest.get(..MARK)? == mark);
        }
        let version = version?;
        Some(rest.get(..4)? == version && rest.get(5..5 + MARK)? == mark)
    };
    let largest = wire_len.min(octets.len()).saturating_sub(1 + MARK);
    (MIN_PART..=largest).find(|&size| {
        // Where the capture ends inside a mark, that seam is taken on trust from those before.
        let mut seams = (size..wire_len.min(octets.len())).step_by(size);
        begins(size) == Some(true) && seams.all(|at| begins(at).unwrap_or(true))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bytes that repeat nothing.
    fn noise(seed: u8, len: usize) -> Vec<u8> {
        let mut state = u32::from(seed).wrapping_mul(2_654_435_761) | 1;
        let next = || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state.to_be_bytes()[1]
        };
        std::iter::repeat_with(next).take(len).collect()
    }

    fn short(seed: u8, len: usize) -> Vec<u8> {
        [&[0x40 | (seed & 0x1f)][..], &[1, 2, 3, 4, 5, 6, 7, 8], &noise(seed, len - 9)].concat()
    }

    fn long(seed: u8, len: usize) -> Vec<u8> {
        let head = [0xc0, 0, 0, 0, 1, 8, 1, 2, 3, 4, 5, 6, 7, 8, 0];
        [&head[..], &noise(seed, len - head.len())].concat()
    }

    fn lengths(octets: &[u8], wire_len: usize) -> Vec<(usize, usize)> {
        let parts = parts(octets, wire_len);
        parts.iter().map(|part| (part.octets.len(), part.wire_len)).collect()
    }

    #[test]
    fn parts_of_one_size_are_told_by_their_connection_id() {
        let joined = [short(1, 1200), short(2, 1200), short(3, 700)].concat();
        let all = parts(&joined, joined.len());
        assert_eq!(all[0].octets, short(1, 1200));
        assert_eq!(all[2].octets, short(3, 700));
        assert_eq!(lengths(&joined, 3100), [(1200, 1200), (1200, 1200), (700, 700)]);
        let acks = [short(1, 35), short(2, 35)].concat();
        assert_eq!(lengths(&acks, 70), [(35, 35), (35, 35)]);
        let handshake = [long(1, 1250), long(2, 1250), short(3, 100)].concat();
        assert_eq!(lengths(&handshake, 2600), [(1250, 1250), (1250, 1250), (100, 100)]);
    }

    #[test]
    fn what_was_captured_of_each_part_is_known() {
        let joined = [short(1, 1200), short(2, 1200), short(3, 700)].concat();
        assert_eq!(lengths(&joined[..1300], 3100), [(1200, 1200), (100, 1200), (0, 700)]);
        assert_eq!(lengths(&joined[..1000], 3100), [(1000, 3100)], "no seam was captured");
    }

    #[test]
    fn one_datagram_stays_one() {
        for datagram in [
            short(1, 1400),
            // Packets that share a datagram.
            [long(1, 600), long(2, 600)].concat(),
            [long(1, 600), long(2, 500), short(3, 100)].concat(),
            vec![0; 3000],
            vec![0x40],
            vec![],
        ] {
            let len = datagram.len();
            let alone = [(len, len)];
            // Zeros are alike everywhere, and the form says that they are no packets.
            assert_eq!(lengths(&datagram, len), alone, "{len}");
        }
    }

    proptest! {
        #[test]
        fn parts_are_the_whole_and_nothing_else(
            octets in proptest::collection::vec(prop_oneof![Just(0x40u8), any::<u8>()], 0..400),
            more in 0usize..3000,
        ) {
            let wire_len = octets.len() + more;
            let parts = parts(&octets, wire_len);
            let all: Vec<u8> = parts.iter().flat_map(|part| part.octets).copied().collect();
            prop_assert_eq!(&all, &octets);
            prop_assert_eq!(parts.iter().map(|part| part.wire_len).sum::<usize>(), wire_len);
            prop_assert!(parts.iter().all(|part| part.octets.len() <= part.wire_len));
        }
    }
}
