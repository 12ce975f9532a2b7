//! The part of a packet that every QUIC version shares (RFC 8999), borrowed from the datagram.
//!
//! Reading never judges: whether a version is known, a bit is fixed or a connection ID is too long
//! for version 1 is decided by callers. Nothing is copied.

/// The form of a packet and what RFC 8999 lets anyone read of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packet<'a> {
    /// Long header: <https://www.rfc-editor.org/rfc/rfc8999.html#section-5.1>
    Long(LongHeader<'a>),
    /// Short header: <https://www.rfc-editor.org/rfc/rfc8999.html#section-5.2>
    Short(ShortHeader<'a>),
}

/// The invariant fields of a long header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LongHeader<'a> {
    /// The first octet; only its top bit has a meaning in every version.
    pub first_octet: u8,
    /// The version; 0 is Version Negotiation.
    pub version: u32,
    /// Destination connection ID, 0 to 255 octets.
    pub dcid: &'a [u8],
    /// Source connection ID, 0 to 255 octets.
    pub scid: &'a [u8],
    /// The version-specific rest of the datagram.
    pub rest: &'a [u8],
}

/// The invariant fields of a short header. The length of its destination connection ID is not on
/// the wire: `rest` starts with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShortHeader<'a> {
    /// The first octet; its top bit is 0.
    pub first_octet: u8,
    /// The destination connection ID and all that follows.
    pub rest: &'a [u8],
}

/// Why a datagram is not a QUIC packet of any version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The datagram has no octets.
    #[error("the datagram is empty")]
    Empty,
    /// The datagram ends inside the version or the connection IDs of a long header.
    #[error("the datagram ends inside a long header")]
    Truncated,
}

impl<'a> Packet<'a> {
    /// Reads the first packet of `datagram`.
    ///
    /// # Errors
    ///
    /// [`Malformed`] when the octets end before the fields do. A short header always reads, since
    /// a single octet is all that its invariants promise.
    pub fn read(datagram: &'a [u8]) -> Result<Self, Malformed> {
        let (&first_octet, rest) = datagram.split_first().ok_or(Malformed::Empty)?;
        if first_octet & 0x80 == 0 {
            return Ok(Self::Short(ShortHeader { first_octet, rest }));
        }
        let (version, rest) = rest.split_first_chunk::<4>().ok_or(Malformed::Truncated)?;
        let (dcid, rest) = prefixed(rest).ok_or(Malformed::Truncated)?;
        let (scid, rest) = prefixed(rest).ok_or(Malformed::Truncated)?;
        let version = u32::from_be_bytes(*version);
        Ok(Self::Long(LongHeader { first_octet, version, dcid, scid, rest }))
    }
}

/// Splits off a connection ID that carries its length in front.
fn prefixed(input: &[u8]) -> Option<(&[u8], &[u8])> {
    let (&len, rest) = input.split_first()?;
    rest.split_at_checked(usize::from(len))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn long(version: u32, dcid: &[u8], scid: &[u8], rest: &[u8]) -> Vec<u8> {
        let mut out = vec![0xc0];
        out.extend_from_slice(&version.to_be_bytes());
        for id in [dcid, scid] {
            out.push(u8::try_from(id.len()).unwrap());
            out.extend_from_slice(id);
        }
        out.extend_from_slice(rest);
        out
    }

    #[test]
    fn req_a01_long_headers_of_unknown_versions_carry_ids_of_up_to_255_octets() {
        let octets = long(0xdead_beef, &[1; 255], &[2; 255], b"rest");
        let Ok(Packet::Long(header)) = Packet::read(&octets) else { panic!("a long header") };
        assert_eq!(
            (header.version, header.dcid, header.scid),
            (0xdead_beef, &[1; 255][..], &[2; 255][..])
        );
        assert_eq!(header.rest, b"rest");
    }

    #[test]
    fn req_a02_short_headers_carry_no_length() {
        let Ok(Packet::Short(header)) = Packet::read(&[0x40, 1, 2, 3]) else {
            panic!("a short header")
        };
        assert_eq!(header.rest, &[1, 2, 3]);
        assert_eq!(
            Packet::read(&[0x00]),
            Ok(Packet::Short(ShortHeader { first_octet: 0, rest: &[] }))
        );
    }

    #[test]
    fn a_long_header_cut_anywhere_is_truncated() {
        let octets = long(1, &[1; 8], &[2; 5], b"");
        assert_eq!(Packet::read(&[]), Err(Malformed::Empty));
        for end in 1..octets.len() {
            assert_eq!(Packet::read(&octets[..end]), Err(Malformed::Truncated));
        }
        assert!(Packet::read(&octets).is_ok());
    }

    proptest! {
        #[test]
        fn any_octets_read_without_panic(octets in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = Packet::read(&octets);
        }
    }
}
