//! The question of a check by version negotiation, and what answers it. Pure: the random octets come in.
//!
//! A server that gets a long header of a version that it does not have, in a datagram that could hold an
//! Initial, tells the versions that it has, under the connection IDs that it was asked with. It needs no
//! keys and keeps nothing for that. Connection IDs of its own are not in the answer, so that nothing can be
//! learnt from it of how it is wired.

use quic::invariants::Packet;

/// Random octets that a question takes.
pub(super) const RANDOM: usize = 1 + 4 + 8 + 8;

/// "A server MUST discard an Initial packet that is carried in a UDP datagram with a payload that is smaller
/// than the smallest allowed maximum datagram size of 1200 bytes."
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-14.1>
const LEN: usize = 1_200;

/// One question. Nobody who does not see it can answer it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Probe {
    first_octet: u8,
    version: [u8; 4],
    dcid: [u8; 8],
    scid: [u8; 8],
}

impl Probe {
    pub(super) fn new(random: &[u8; RANDOM]) -> Self {
        let [first, a, b, c, d, ids @ ..] = random;
        let (ids, _) = ids.as_chunks::<8>();
        Self {
            // As an Initial of version 1 begins.
            first_octet: 0xc0 | first & 0x0f,
            // "Versions that follow the pattern 0x?a?a?a?a are reserved for use in forcing version negotiation
            // to be exercised": https://www.rfc-editor.org/rfc/rfc9000.html#section-15
            version: [a, b, c, d].map(|octet| octet & 0xf0 | 0x0a),
            dcid: ids[0],
            scid: ids[1],
        }
    }

    /// What to send.
    pub(super) fn datagram(&self) -> Vec<u8> {
        let Self { first_octet, version, dcid, scid } = self;
        let mut datagram = Vec::with_capacity(LEN);
        datagram.push(*first_octet);
        datagram.extend_from_slice(version);
        for id in [dcid, scid] {
            datagram.push(8);
            datagram.extend_from_slice(id);
        }
        datagram.resize(LEN, 0);
        datagram
    }

    /// Whether this is the answer: "The server includes the value from the Source Connection ID field of the
    /// packet it receives in the Destination Connection ID field. The value for Source Connection ID is
    /// copied from the Destination Connection ID of the received packet". Behind them stand versions, which
    /// the one that was asked for is none of.
    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-17.2.1>
    pub(super) fn is_answered_by(&self, datagram: &[u8]) -> bool {
        let Ok(Packet::Long(header)) = Packet::read(datagram) else { return false };
        let (versions, rest) = header.rest.as_chunks::<4>();
        header.version == 0
            && header.dcid == self.scid
            && header.scid == self.dcid
            && !versions.is_empty()
            && rest.is_empty()
            && !versions.contains(&self.version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe() -> Probe {
        Probe::new(&std::array::from_fn(|n| 0xf0 + u8::try_from(n).unwrap() % 16))
    }

    fn answer(probe: &Probe) -> Vec<u8> {
        [&[0x80, 0, 0, 0, 0, 8][..], &probe.scid, &[8], &probe.dcid, &[0, 0, 0, 1]].concat()
    }

    #[test]
    fn the_question_is_a_long_header_of_a_reserved_version_that_fills_an_initial() {
        let probe = probe();
        let datagram = probe.datagram();
        assert_eq!(datagram.len(), 1_200);
        let Ok(Packet::Long(header)) = Packet::read(&datagram) else { panic!("{datagram:?}") };
        assert_eq!((header.dcid, header.scid), (&probe.dcid[..], &probe.scid[..]));
        assert_ne!(header.dcid, header.scid);
        assert_eq!(header.version & 0x0f0f_0f0f, 0x0a0a_0a0a);
        assert_eq!(header.first_octet & 0xf0, 0xc0);
    }

    #[test]
    fn the_versions_of_a_server_under_our_connection_ids_are_the_answer() {
        let probe = probe();
        assert!(probe.is_answered_by(&answer(&probe)));
        let mut longer = answer(&probe);
        longer.extend_from_slice(&[0x6b, 0x33, 0x43, 0xcf]);
        assert!(probe.is_answered_by(&longer));
    }

    #[test]
    fn nothing_else_is() {
        let probe = probe();
        let good = answer(&probe);
        let with = |at: usize, octet: u8| {
            let mut octets = good.clone();
            octets[at] = octet;
            octets
        };
        let own_version = [&good[..good.len() - 4], &probe.version].concat();
        for wrong in [
            vec![],
            probe.datagram(),
            with(0, 0x40),
            with(4, 1),
            with(6, !good[6]),
            with(22, !good[22]),
            with(5, 255),
            own_version,
            good[..good.len() - 4].to_vec(),
            good[..good.len() - 1].to_vec(),
            good[..3].to_vec(),
        ] {
            assert!(!probe.is_answered_by(&wrong), "{wrong:02x?}");
        }
    }
}
