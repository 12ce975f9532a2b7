//! Protected packets: their headers, packet numbers, and the protection itself.
//!
//! Reading takes two steps, as the layout demands: [`Header::read`] needs no keys; then
//! [`Header::unprotect`] reveals the packet number, and [`open`] the payload. Building goes the
//! other way through [`Builder`].

use std::ops::Range;

use super::{
    space::Space,
    tls::{HeaderProtectionKey, PacketKey, SAMPLE_LEN, TAG_LEN},
};
use crate::{
    connection_id::ConnectionId,
    header::{Kind, LongType, Version},
    invariants::Packet,
    varint,
};

/// Set in every packet of versions 1 and 2.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-17.2>
const FIXED_BIT: u8 = 0x40;
const LONG_HEADER: u8 = 0x80;
const SPIN_BIT: u8 = 0x20;
const KEY_PHASE: u8 = 0x04;
const LONG_RESERVED: u8 = 0x0c;
const SHORT_RESERVED: u8 = 0x18;

/// Why a packet or a datagram was dropped without further effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DropReason {
    /// Not a QUIC packet, or cut short.
    Malformed,
    /// A version that nobody here speaks.
    UnknownVersion,
    /// The fixed bit is not set.
    FixedBit,
    /// Too short to be protected.
    TooShort,
    /// Addressed to another connection than the datagram's first packet.
    OtherConnection,
    /// A connection ID nobody here has, and no stateless reset was due.
    UnknownConnection,
    /// Keys for it are not there yet, or no longer.
    NoKeys,
    /// Its protection did not match.
    Undecryptable,
    /// Its packet number came before, or is older than what is remembered.
    Duplicate,
    /// From an address that may not speak on this connection.
    UnexpectedAddress,
    /// An Initial in a datagram of less than 1200 octets.
    SmallInitial,
    /// A Retry or Version Negotiation that may not be honoured now.
    UnexpectedNegotiation,
    /// New connections are not accepted now.
    Saturated,
    /// An Initial with the token of a Retry that has begun a connection already, which it does not belong to.
    SpentToken,
    /// A connection ID nobody here has, and too many stateless resets were sent before.
    TooManyResets,
    /// The connection is closing or draining.
    Closing,
    /// A packet type that has no business here.
    UnexpectedType,
}

impl DropReason {
    /// The number of reasons, for tables of counters.
    pub const COUNT: usize = Self::UnexpectedType as usize + 1;
}

/// What can be read of a packet without keys.
#[derive(Clone, Debug)]
pub(crate) struct Header {
    pub(crate) kind: PacketKind,
    pub(crate) dcid: ConnectionId,
    /// Where the packet number starts.
    number_at: usize,
    /// Octets of the whole packet.
    pub(crate) len: usize,
}

/// The type of a packet, with the fields that only it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PacketKind {
    Initial { version: Version, scid: ConnectionId, token: Range<usize> },
    ZeroRtt { version: Version },
    Handshake { version: Version, scid: ConnectionId },
    Retry { version: Version, scid: ConnectionId },
    VersionNegotiation { scid: ConnectionId },
    OneRtt,
}

impl Header {
    /// Reads the first packet of `datagram`. A short header has to carry `dcid` when there is one
    /// given: the connection ID of the packet before it.
    pub(crate) fn read(datagram: &[u8], dcid_len: usize) -> Result<Self, DropReason> {
        let header = match Packet::read(datagram).map_err(|_| DropReason::Malformed)? {
            Packet::Short(short) => {
                let dcid = short.rest.get(..dcid_len).ok_or(DropReason::TooShort)?;
                let dcid = ConnectionId::new(dcid).ok_or(DropReason::Malformed)?;
                let number_at = 1 + dcid_len;
                Self { kind: PacketKind::OneRtt, dcid, number_at, len: datagram.len() }
            }
            Packet::Long(long) => {
                // "Endpoints that receive a version 1 long header with a value larger than 20 MUST
                // drop the packet." https://www.rfc-editor.org/rfc/rfc9000.html#section-17.2
                let dcid = ConnectionId::new(long.dcid).ok_or(DropReason::Malformed)?;
                let scid = ConnectionId::new(long.scid).ok_or(DropReason::Malformed)?;
                let rest_at = datagram.len() - long.rest.len();
                let whole = |kind| Self { kind, dcid, number_at: rest_at, len: datagram.len() };
                let (version, long_type) = match long.kind() {
                    Kind::VersionNegotiation => {
                        return Ok(whole(PacketKind::VersionNegotiation { scid }));
                    }
                    Kind::UnknownVersion => return Err(DropReason::UnknownVersion),
                    Kind::Known(version, long_type) => (version, long_type),
                };
                let mut rest = long.rest;
                let kind = match long_type {
                    LongType::Retry => return Ok(whole(PacketKind::Retry { version, scid })),
                    LongType::Initial => {
                        let (len, after) = varint::read(rest).ok_or(DropReason::Malformed)?;
                        let len = usize::try_from(len).map_err(|_| DropReason::Malformed)?;
                        let token_at = datagram.len() - after.len();
                        rest = after.get(len..).ok_or(DropReason::Malformed)?;
                        PacketKind::Initial { version, scid, token: token_at..token_at + len }
                    }
                    LongType::ZeroRtt => PacketKind::ZeroRtt { version },
                    LongType::Handshake => PacketKind::Handshake { version, scid },
                };
                let (len, rest) = varint::read(rest).ok_or(DropReason::Malformed)?;
                let number_at = datagram.len() - rest.len();
                let len = usize::try_from(len).ok().filter(|&len| len <= rest.len());
                let len = number_at + len.ok_or(DropReason::Malformed)?;
                Self { kind, dcid, number_at, len }
            }
        };
        if datagram[0] & FIXED_BIT == 0 && header.kind_is_protected() {
            return Err(DropReason::FixedBit);
        }
        Ok(header)
    }

    fn kind_is_protected(&self) -> bool {
        !matches!(self.kind, PacketKind::VersionNegotiation { .. })
    }

    /// Removes header protection from `packet`, which has [`Header::len`] octets.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9001.html#section-5.4>
    pub(crate) fn unprotect(
        &self,
        key: &dyn HeaderProtectionKey,
        packet: &mut [u8],
        largest: Option<u64>,
    ) -> Result<Unprotected, DropReason> {
        let (head, tail) = packet.split_at_mut(self.number_at);
        let (number, rest) = tail.split_at_mut_checked(4).ok_or(DropReason::TooShort)?;
        let sample = rest.get(..SAMPLE_LEN).ok_or(DropReason::TooShort)?;
        let first = head.first_mut().ok_or(DropReason::TooShort)?;
        key.decrypt_in_place(sample, first, number).map_err(|_| DropReason::Undecryptable)?;
        let first = *first;
        let number_len = usize::from(first & 0x03) + 1;
        let truncated = number[..number_len].iter().fold(0, |all, &one| all << 8 | u64::from(one));
        let expected = largest.map_or(0, |largest| largest + 1);
        let reserved = if first & LONG_HEADER != 0 { LONG_RESERVED } else { SHORT_RESERVED };
        Ok(Unprotected {
            number: expand_number(truncated, number_len, expected),
            header_len: self.number_at + number_len,
            key_phase: first & LONG_HEADER == 0 && first & KEY_PHASE != 0,
            reserved_bits: first & reserved != 0,
        })
    }
}

/// What removing header protection reveals.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unprotected {
    pub(crate) number: u64,
    pub(crate) header_len: usize,
    pub(crate) key_phase: bool,
    /// Whether a reserved bit is set; an error once the packet proves authentic.
    pub(crate) reserved_bits: bool,
}

/// Decrypts the payload of `packet` in place.
pub(crate) fn open<'a>(
    key: &dyn PacketKey,
    unprotected: &Unprotected,
    packet: &'a mut [u8],
) -> Result<&'a [u8], DropReason> {
    let (header, payload) = packet.split_at_mut(unprotected.header_len);
    if payload.len() < TAG_LEN {
        return Err(DropReason::TooShort);
    }
    key.decrypt_in_place(unprotected.number, header, payload).map_err(|_| DropReason::Undecryptable)
}

/// The whole packet number closest to `expected` that ends in the octets received.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-a.3>
fn expand_number(truncated: u64, len: usize, expected: u64) -> u64 {
    let window = 1u64 << (8 * len);
    let candidate = (expected & !(window - 1)) | truncated;
    if candidate + window / 2 <= expected && candidate + window <= varint::MAX {
        candidate + window
    } else if candidate > expected + window / 2 && candidate >= window {
        candidate - window
    } else {
        candidate
    }
}

/// How many octets `number` needs so that a peer which may have seen nothing above
/// `largest_acked` expands it rightly.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-a.2>
fn number_len(number: u64, largest_acked: Option<u64>) -> usize {
    let unacked = largest_acked.map_or(number + 1, |acked| number.saturating_sub(acked));
    // One bit more than the count of packets in question.
    match unacked.saturating_mul(2) {
        0..=0xff => 1,
        0x100..=0xffff => 2,
        0x1_0000..=0xff_ffff => 3,
        _ => 4,
    }
}

/// What the header of a packet to build says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outgoing<'a> {
    pub(crate) space: Space,
    pub(crate) version: Version,
    pub(crate) dcid: &'a ConnectionId,
    pub(crate) scid: &'a ConnectionId,
    /// For an Initial.
    pub(crate) token: &'a [u8],
    pub(crate) number: u64,
    pub(crate) largest_acked: Option<u64>,
    pub(crate) key_phase: bool,
    pub(crate) spin: bool,
}

/// A packet under construction at the end of a buffer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Builder {
    start: usize,
    /// Where the two octets of the Length field are, in a long header.
    length_at: Option<usize>,
    number_at: usize,
    payload_at: usize,
    number: u64,
}

impl Builder {
    /// Appends the header. The buffer then takes frames, up to the datagram's end less
    /// [`TAG_LEN`].
    pub(crate) fn start(header: &Outgoing<'_>, out: &mut Vec<u8>) -> Self {
        let start = out.len();
        let number_len = number_len(header.number, header.largest_acked);
        #[expect(clippy::cast_possible_truncation, reason = "1 to 4")]
        let number_bits = (number_len - 1) as u8;
        let long_type = match header.space {
            Space::Initial => Some(LongType::Initial),
            Space::Handshake => Some(LongType::Handshake),
            Space::Data => None,
        };
        let length_at = if let Some(long_type) = long_type {
            let type_bits = long_type.to_first_octet(header.version);
            out.push(LONG_HEADER | FIXED_BIT | type_bits | number_bits);
            out.extend_from_slice(&header.version.to_wire().to_be_bytes());
            for id in [header.dcid, header.scid] {
                #[expect(clippy::cast_possible_truncation, reason = "at most 20")]
                out.push(id.len() as u8);
                out.extend_from_slice(id);
            }
            if header.space == Space::Initial {
                varint::write(header.token.len() as u64, out);
                out.extend_from_slice(header.token);
            }
            out.extend_from_slice(&[0, 0]);
            Some(out.len() - 2)
        } else {
            let phase = if header.key_phase { KEY_PHASE } else { 0 };
            let spin = if header.spin { SPIN_BIT } else { 0 };
            out.push(FIXED_BIT | spin | phase | number_bits);
            out.extend_from_slice(header.dcid);
            None
        };
        let number_at = out.len();
        out.extend_from_slice(&header.number.to_be_bytes()[8 - number_len..]);
        Self { start, length_at, number_at, payload_at: out.len(), number: header.number }
    }

    /// As [`Self::start`], with a packet number of `len` octets, as published samples have it.
    #[cfg(test)]
    pub(crate) fn start_with_number_len(
        header: &Outgoing<'_>,
        len: usize,
        out: &mut Vec<u8>,
    ) -> Self {
        let mut builder = Self::start(header, out);
        for number_len in builder.payload_at - builder.number_at..len {
            out.insert(builder.number_at, 0);
            builder.payload_at += 1;
            out[builder.start] = out[builder.start] & !0x03 | u8::try_from(number_len).unwrap_or(0);
        }
        builder
    }

    /// Octets that a header with these IDs takes, at most, with the tag.
    pub(crate) fn overhead(header: &Outgoing<'_>) -> usize {
        let long = match header.space {
            Space::Data => 0,
            Space::Handshake => 1 + 4 + 1 + header.scid.len() + 2,
            Space::Initial => {
                let token = header.token.len();
                1 + 4 + 1 + header.scid.len() + 2 + varint::size(token as u64) + token
            }
        };
        1 + header.dcid.len() + long + 4 + TAG_LEN
    }

    pub(crate) const fn number(&self) -> u64 {
        self.number
    }

    /// Where the packet starts in the buffer.
    pub(crate) const fn start_of_packet(&self) -> usize {
        self.start
    }

    /// Whether any frame was appended.
    pub(crate) fn is_empty(&self, out: &[u8]) -> bool {
        out.len() == self.payload_at
    }

    /// The frames so far.
    pub(crate) fn frames<'a>(&self, out: &'a [u8]) -> &'a [u8] {
        &out[self.payload_at..]
    }

    /// Octets of the packet, once it is sealed as it is now.
    pub(crate) const fn sealed_len(&self, out: &[u8]) -> usize {
        out.len() + TAG_LEN - self.start
    }

    /// Takes the packet back.
    pub(crate) fn abandon(self, out: &mut Vec<u8>) {
        out.truncate(self.start);
    }

    /// Pads to `datagram_end` at least (0: no padding), as far as the tag leaves room.
    pub(crate) fn pad(&self, datagram_end: usize, out: &mut Vec<u8>) {
        // "an endpoint [...] pads, so that the combined lengths of the encoded packet number and
        // protected payload is at least 4 bytes longer than the sample"
        // https://www.rfc-editor.org/rfc/rfc9001.html#section-5.4.2
        let least = (self.number_at + 4).max(datagram_end.saturating_sub(TAG_LEN));
        if out.len() < least {
            out.resize(least, 0);
        }
    }

    /// Pads to `datagram_end` at least (0: no padding), seals, and protects the header. Returns
    /// the octets of the packet.
    pub(crate) fn finish(
        self,
        header_key: &dyn HeaderProtectionKey,
        packet_key: &dyn PacketKey,
        datagram_end: usize,
        out: &mut Vec<u8>,
    ) -> Result<usize, rustls::Error> {
        self.pad(datagram_end, out);
        if let Some(length_at) = self.length_at {
            let length = out.len() - self.number_at + TAG_LEN;
            // A datagram is far below 2^14 octets, so that two octets always do.
            #[expect(clippy::cast_possible_truncation, reason = "below 2^14")]
            let length = (length as u16 | 0x4000).to_be_bytes();
            out[length_at..length_at + 2].copy_from_slice(&length);
        }
        let (header, payload) = out[self.start..].split_at_mut(self.payload_at - self.start);
        let tag = packet_key.encrypt_in_place(self.number, header, payload)?;
        out.extend_from_slice(tag.as_ref());
        let (head, sample) = out.split_at_mut(self.number_at + 4);
        let (first, number) = head[self.start..].split_at_mut(self.number_at - self.start);
        let number_len = self.payload_at - self.number_at;
        header_key.encrypt_in_place(
            &sample[..SAMPLE_LEN],
            &mut first[0],
            &mut number[..number_len],
        )?;
        Ok(out.len() - self.start)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{stream_id::Side, tls::initial_keys},
        *,
    };
    use proptest::prelude::*;

    /// The samples of RFC 9000, appendix A.2 and A.3.
    #[test]
    fn req_a13_published_samples_of_packet_numbers() {
        assert_eq!(number_len(0xac5c02, Some(0xabe8b3)), 2);
        assert_eq!(number_len(0xace8fe, Some(0xabe8b3)), 3);
        assert_eq!(expand_number(0x9b32, 2, 0xa82f30eb), 0xa82f9b32);
    }

    proptest! {
        #[test]
        fn req_a13_a_truncated_number_expands_to_itself(
            number in 0..varint::MAX, behind in 0u64..1000, acked_behind in 0u64..1_000_000
        ) {
            let acked = number.checked_sub(acked_behind + 1);
            let largest = number.checked_sub(behind + 1).max(acked);
            let len = number_len(number, acked);
            let truncated = number & ((1 << (8 * len)) - 1);
            let expected = largest.map_or(0, |largest| largest + 1);
            prop_assert_eq!(expand_number(truncated, len, expected), number);
        }

        #[test]
        fn any_octets_read_without_panic(
            octets in proptest::collection::vec(any::<u8>(), 0..200), dcid_len in 0usize..21
        ) {
            if let Ok(header) = Header::read(&octets, dcid_len) {
                prop_assert!(header.len <= octets.len());
                let keys = initial_keys(Version::V1, &ConnectionId::default(), Side::Client);
                let mut packet = octets[..header.len].to_vec();
                if let Ok(unprotected) = header.unprotect(&*keys.remote.header, &mut packet, None) {
                    let _ = open(&*keys.remote.packet, &unprotected, &mut packet);
                }
            }
        }
    }

    #[test]
    fn req_a04_long_headers_with_connection_ids_above_20_octets_are_dropped() {
        let mut octets = vec![0xc0, 0, 0, 0, 1, 21];
        octets.extend([7; 60]);
        assert_eq!(Header::read(&octets, 8).unwrap_err(), DropReason::Malformed);
    }

    #[test]
    fn req_a15_a_clear_fixed_bit_is_dropped() {
        assert_eq!(Header::read(&[0x00; 40], 8).unwrap_err(), DropReason::FixedBit);
        assert!(Header::read(&[0x40; 40], 8).is_ok());
    }

    #[test]
    fn req_c14_packets_too_short_to_sample_are_dropped() {
        let keys = initial_keys(Version::V1, &ConnectionId::default(), Side::Client);
        for len in 9..60 {
            let mut octets = vec![0x40; len];
            let header = Header::read(&octets, 8).unwrap();
            let result = header.unprotect(&*keys.remote.header, &mut octets, None);
            assert_eq!(result.is_ok(), len >= 1 + 8 + 4 + SAMPLE_LEN);
        }
    }
}
