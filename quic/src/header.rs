//! Long headers of QUIC versions 1 and 2, and the walk over the packets of one datagram.

use crate::{
    invariants::{LongHeader, Malformed, Packet},
    varint,
};

/// A version of which more than the invariants is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Version {
    /// RFC 9000, `0x00000001`.
    V1,
    /// RFC 9369, `0x6b3343cf`.
    V2,
}

impl Version {
    /// The version with this number on the wire, if known.
    #[must_use]
    pub const fn from_wire(number: u32) -> Option<Self> {
        match number {
            0x0000_0001 => Some(Self::V1),
            0x6b33_43cf => Some(Self::V2),
            _ => None,
        }
    }

    /// The number on the wire.
    #[must_use]
    pub const fn to_wire(self) -> u32 {
        match self {
            Self::V1 => 0x0000_0001,
            Self::V2 => 0x6b33_43cf,
        }
    }
}

/// The type of a long-header packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LongType {
    /// Carries the first CRYPTO data, and a token.
    Initial,
    /// Carries application data before the handshake is complete.
    ZeroRtt,
    /// Carries the rest of the handshake.
    Handshake,
    /// Asks the client to prove its address.
    Retry,
}

impl LongType {
    /// The type that the two type bits of `first_octet` stand for in `version`.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-17.2> and, with the codes moved by
    /// one, <https://www.rfc-editor.org/rfc/rfc9369.html#section-3.2>.
    #[must_use]
    pub const fn from_first_octet(version: Version, first_octet: u8) -> Self {
        let bits = (first_octet >> 4) & 0b11;
        let as_v1 = match version {
            Version::V1 => bits,
            Version::V2 => bits.wrapping_sub(1) & 0b11,
        };
        match as_v1 {
            0 => Self::Initial,
            1 => Self::ZeroRtt,
            2 => Self::Handshake,
            _ => Self::Retry,
        }
    }

    /// The two type bits in `version`, placed where the first octet carries them.
    #[must_use]
    pub const fn to_first_octet(self, version: Version) -> u8 {
        let as_v1 = match self {
            Self::Initial => 0u8,
            Self::ZeroRtt => 1,
            Self::Handshake => 2,
            Self::Retry => 3,
        };
        let bits = match version {
            Version::V1 => as_v1,
            Version::V2 => (as_v1 + 1) & 0b11,
        };
        bits << 4
    }
}

/// The kind of the packet behind a long header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Version 0: <https://www.rfc-editor.org/rfc/rfc8999.html#section-6>
    VersionNegotiation,
    /// A packet of a version whose long-header types are known.
    Known(Version, LongType),
    /// A packet of any other version.
    UnknownVersion,
}

impl LongHeader<'_> {
    /// What kind of packet this is.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        if self.version == 0 {
            return Kind::VersionNegotiation;
        }
        match Version::from_wire(self.version) {
            Some(version) => {
                Kind::Known(version, LongType::from_first_octet(version, self.first_octet))
            }
            None => Kind::UnknownVersion,
        }
    }

    /// The length of this packet's version-specific part within [`LongHeader::rest`], when the
    /// packet states one; `None` when it runs to the end of the datagram or the statement is
    /// broken.
    fn stated_rest_len(&self) -> Option<usize> {
        let Kind::Known(_, kind) = self.kind() else { return None };
        let after_token = match kind {
            LongType::Retry => return None,
            LongType::Initial => {
                let (token_len, rest) = varint::read(self.rest)?;
                rest.get(usize::try_from(token_len).ok()?..)?
            }
            LongType::ZeroRtt | LongType::Handshake => self.rest,
        };
        let (length, payload) = varint::read(after_token)?;
        let length = usize::try_from(length).ok()?;
        let header = self.rest.len() - payload.len();
        (length <= payload.len()).then_some(header + length)
    }
}

/// Iterates over the packets coalesced in `datagram`.
///
/// Yields an error once, and ends, when the octets left are not a packet. A packet of an unknown
/// version, a Retry, a Version Negotiation, a short header, or one whose length field is broken
/// takes the rest of the datagram.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-12.2>
#[must_use]
pub const fn packets(datagram: &[u8]) -> Packets<'_> {
    Packets { rest: datagram }
}

/// The iterator behind [`packets`].
#[derive(Clone, Debug)]
pub struct Packets<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Packets<'a> {
    type Item = Result<Packet<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let datagram = std::mem::take(&mut self.rest);
        let mut packet = match Packet::read(datagram) {
            Ok(packet) => packet,
            Err(malformed) => return Some(Err(malformed)),
        };
        if let Packet::Long(header) = &mut packet
            && let Some(len) = header.stated_rest_len()
        {
            let (own, next) = header.rest.split_at(len);
            header.rest = own;
            self.rest = next;
        }
        Some(Ok(packet))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TYPES: [LongType; 4] =
        [LongType::Initial, LongType::ZeroRtt, LongType::Handshake, LongType::Retry];

    #[test]
    fn req_a21_version_2_moves_the_type_bits_by_one() {
        let bits = |version| TYPES.map(|kind| kind.to_first_octet(version) >> 4);
        assert_eq!(bits(Version::V1), [0b00, 0b01, 0b10, 0b11]);
        assert_eq!(bits(Version::V2), [0b01, 0b10, 0b11, 0b00]);
        for version in [Version::V1, Version::V2] {
            assert_eq!(Version::from_wire(version.to_wire()), Some(version));
            for kind in TYPES {
                let first = 0xc0 | kind.to_first_octet(version);
                assert_eq!(LongType::from_first_octet(version, first), kind);
            }
        }
    }

    fn initial(token: &[u8], payload: &[u8]) -> Vec<u8> {
        let mut out = vec![0xc3, 0, 0, 0, 1, 2, 0xaa, 0xbb, 1, 0xcc];
        varint::write(token.len() as u64, &mut out);
        out.extend_from_slice(token);
        varint::write(payload.len() as u64, &mut out);
        out.extend_from_slice(payload);
        out
    }

    fn handshake(payload: &[u8]) -> Vec<u8> {
        let mut out = vec![0xe3, 0, 0, 0, 1, 2, 0xaa, 0xbb, 1, 0xcc];
        varint::write(payload.len() as u64, &mut out);
        out.extend_from_slice(payload);
        out
    }

    #[test]
    fn req_a10_coalesced_packets_are_walked_in_order() {
        let mut datagram = initial(b"token", &[1; 70]);
        datagram.extend(handshake(&[2; 30]));
        datagram.extend([0x40, 0xaa, 0xbb, 9, 9, 9]);
        let kinds: Vec<_> = packets(&datagram)
            .map(|packet| match packet.unwrap() {
                Packet::Long(header) => (Some(header.kind()), header.rest.len()),
                Packet::Short(header) => (None, header.rest.len()),
            })
            .collect();
        assert_eq!(
            kinds,
            [
                (Some(Kind::Known(Version::V1, LongType::Initial)), 1 + 5 + 2 + 70),
                (Some(Kind::Known(Version::V1, LongType::Handshake)), 1 + 30),
                (None, 5),
            ]
        );
    }

    #[test]
    fn a_length_beyond_the_datagram_takes_all_that_is_left() {
        let mut datagram = initial(b"", &[1; 70]);
        datagram.truncate(datagram.len() - 1);
        assert_eq!(packets(&datagram).count(), 1);
    }

    #[test]
    fn zero_octets_after_the_last_packet_read_as_a_short_header() {
        let mut datagram = initial(b"", &[1; 70]);
        datagram.extend([0; 100]);
        assert!(matches!(packets(&datagram).nth(1), Some(Ok(Packet::Short(_)))));
    }

    #[test]
    fn version_zero_is_version_negotiation() {
        let octets = [0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        let Ok(Packet::Long(header)) = Packet::read(&octets) else { panic!("a long header") };
        assert_eq!(header.kind(), Kind::VersionNegotiation);
    }

    proptest! {
        #[test]
        fn the_walk_over_any_octets_ends(octets in proptest::collection::vec(any::<u8>(), 0..600)) {
            prop_assert!(packets(&octets).count() <= octets.len());
        }
    }
}
