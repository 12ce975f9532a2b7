//! Frames: octets in, a borrowed [`Frame`] out, and back.
//!
//! Reading never panics and judges only what RFC 9000 calls an encoding error. Whether a frame may
//! stand in this packet, on this stream or in this state is decided by whoever handles it.

use bytes::BufMut;

use super::{
    error::{Code, TransportError},
    ranges::RangeSet,
    stream_id::{Dir, StreamId},
};
use crate::{connection_id::ConnectionId, varint};

/// The largest offset or final size a stream can have.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-4.5>
const MAX_OFFSET: u64 = varint::MAX;
/// The most streams of one type, cumulatively.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-4.6>
pub(crate) const MAX_STREAM_COUNT: u64 = 1 << 60;

/// Frame types, <https://www.rfc-editor.org/rfc/rfc9000.html#section-12.4>
pub(crate) mod types {
    pub(crate) const PADDING: u64 = 0x00;
    pub(crate) const PING: u64 = 0x01;
    pub(crate) const ACK: u64 = 0x02;
    pub(crate) const ACK_ECN: u64 = 0x03;
    pub(crate) const RESET_STREAM: u64 = 0x04;
    pub(crate) const STOP_SENDING: u64 = 0x05;
    pub(crate) const CRYPTO: u64 = 0x06;
    pub(crate) const NEW_TOKEN: u64 = 0x07;
    pub(crate) const STREAM: u64 = 0x08;
    pub(crate) const STREAM_LAST: u64 = 0x0f;
    pub(crate) const MAX_DATA: u64 = 0x10;
    pub(crate) const MAX_STREAM_DATA: u64 = 0x11;
    pub(crate) const MAX_STREAMS_BIDI: u64 = 0x12;
    pub(crate) const MAX_STREAMS_UNI: u64 = 0x13;
    pub(crate) const DATA_BLOCKED: u64 = 0x14;
    pub(crate) const STREAM_DATA_BLOCKED: u64 = 0x15;
    pub(crate) const STREAMS_BLOCKED_BIDI: u64 = 0x16;
    pub(crate) const STREAMS_BLOCKED_UNI: u64 = 0x17;
    pub(crate) const NEW_CONNECTION_ID: u64 = 0x18;
    pub(crate) const RETIRE_CONNECTION_ID: u64 = 0x19;
    pub(crate) const PATH_CHALLENGE: u64 = 0x1a;
    pub(crate) const PATH_RESPONSE: u64 = 0x1b;
    pub(crate) const CONNECTION_CLOSE: u64 = 0x1c;
    pub(crate) const APPLICATION_CLOSE: u64 = 0x1d;
    pub(crate) const HANDSHAKE_DONE: u64 = 0x1e;
    /// <https://www.rfc-editor.org/rfc/rfc9221.html#section-4>
    pub(crate) const DATAGRAM: u64 = 0x30;
    pub(crate) const DATAGRAM_WITH_LENGTH: u64 = 0x31;

    /// The bits of a STREAM frame's type.
    pub(crate) const STREAM_FIN: u64 = 0x01;
    pub(crate) const STREAM_LEN: u64 = 0x02;
    pub(crate) const STREAM_OFF: u64 = 0x04;
}

/// One frame, its octets borrowed from the packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Frame<'a> {
    /// One or more octets of padding.
    Padding,
    Ping,
    Ack(Ack<'a>),
    ResetStream(ResetStream),
    StopSending {
        id: StreamId,
        code: u64,
    },
    Crypto {
        offset: u64,
        data: &'a [u8],
    },
    NewToken(&'a [u8]),
    Stream(Stream<'a>),
    MaxData(u64),
    MaxStreamData {
        id: StreamId,
        limit: u64,
    },
    MaxStreams {
        dir: Dir,
        limit: u64,
    },
    DataBlocked,
    StreamDataBlocked {
        id: StreamId,
    },
    StreamsBlocked,
    NewConnectionId(NewConnectionId),
    RetireConnectionId {
        sequence: u64,
    },
    PathChallenge([u8; 8]),
    PathResponse([u8; 8]),
    Close(Close<'a>),
    HandshakeDone,
    Datagram(&'a [u8]),
}

/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-19.8>
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stream<'a> {
    pub(crate) id: StreamId,
    pub(crate) offset: u64,
    pub(crate) data: &'a [u8],
    pub(crate) fin: bool,
}

/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-19.4>
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ResetStream {
    pub(crate) id: StreamId,
    pub(crate) code: u64,
    pub(crate) final_size: u64,
}

/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-19.15>
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NewConnectionId {
    pub(crate) sequence: u64,
    pub(crate) retire_prior_to: u64,
    pub(crate) id: ConnectionId,
    pub(crate) reset_token: [u8; 16],
}

/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-19.19>
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Close<'a> {
    Transport { code: Code, frame_type: u64, reason: &'a [u8] },
    Application { code: u64, reason: &'a [u8] },
}

/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-19.3>
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ack<'a> {
    pub(crate) largest: u64,
    /// Not yet scaled by the exponent.
    pub(crate) delay: u64,
    first_range: u64,
    /// The further ranges, checked to read and not to fall below zero.
    ranges: &'a [u8],
    pub(crate) ecn: Option<EcnCounts>,
}

/// How many packets with each mark were received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct EcnCounts {
    pub(crate) ect0: u64,
    pub(crate) ect1: u64,
    pub(crate) ce: u64,
}

impl Ack<'_> {
    /// Acknowledged ranges, both ends included, from the highest down.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        let mut rest = self.ranges;
        let mut smallest = self.largest - self.first_range;
        std::iter::once((smallest, self.largest)).chain(std::iter::from_fn(move || {
            let (gap, after) = varint::read(rest)?;
            let (len, after) = varint::read(after)?;
            rest = after;
            let high = smallest.checked_sub(gap)?.checked_sub(2)?;
            smallest = high.checked_sub(len)?;
            Some((smallest, high))
        }))
    }
}

impl Frame<'_> {
    /// The type, as an error names it. Types that differ only by flags give the first of them.
    pub(crate) const fn frame_type(&self) -> u64 {
        match self {
            Self::Padding => types::PADDING,
            Self::Ping => types::PING,
            Self::Ack(_) => types::ACK,
            Self::ResetStream(_) => types::RESET_STREAM,
            Self::StopSending { .. } => types::STOP_SENDING,
            Self::Crypto { .. } => types::CRYPTO,
            Self::NewToken(_) => types::NEW_TOKEN,
            Self::Stream(_) => types::STREAM,
            Self::MaxData(_) => types::MAX_DATA,
            Self::MaxStreamData { .. } => types::MAX_STREAM_DATA,
            Self::MaxStreams { dir: Dir::Bi, .. } => types::MAX_STREAMS_BIDI,
            Self::MaxStreams { dir: Dir::Uni, .. } => types::MAX_STREAMS_UNI,
            Self::DataBlocked => types::DATA_BLOCKED,
            Self::StreamDataBlocked { .. } => types::STREAM_DATA_BLOCKED,
            Self::StreamsBlocked => types::STREAMS_BLOCKED_BIDI,
            Self::NewConnectionId(_) => types::NEW_CONNECTION_ID,
            Self::RetireConnectionId { .. } => types::RETIRE_CONNECTION_ID,
            Self::PathChallenge(_) => types::PATH_CHALLENGE,
            Self::PathResponse(_) => types::PATH_RESPONSE,
            Self::Close(Close::Transport { .. }) => types::CONNECTION_CLOSE,
            Self::Close(Close::Application { .. }) => types::APPLICATION_CLOSE,
            Self::HandshakeDone => types::HANDSHAKE_DONE,
            Self::Datagram(_) => types::DATAGRAM,
        }
    }

    /// Whether the peer expects an acknowledgment.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9002.html#section-2>
    pub(crate) const fn is_ack_eliciting(&self) -> bool {
        !matches!(self, Self::Padding | Self::Ack(_) | Self::Close(_))
    }

    /// Whether a packet of nothing but such frames probes a path without moving to it.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-9.1>
    pub(crate) const fn is_probing(&self) -> bool {
        matches!(
            self,
            Self::PathChallenge(_)
                | Self::PathResponse(_)
                | Self::NewConnectionId(_)
                | Self::Padding
        )
    }

    /// Whether the frame may stand in an Initial or Handshake packet.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-12.4>, table 3
    pub(crate) const fn allowed_before_one_rtt(&self) -> bool {
        matches!(
            self,
            Self::Padding
                | Self::Ping
                | Self::Ack(_)
                | Self::Crypto { .. }
                | Self::Close(Close::Transport { .. })
        )
    }
}

/// The frames of one packet's payload. Ends after the first error.
#[derive(Clone, Debug)]
pub(crate) struct Frames<'a> {
    rest: &'a [u8],
}

impl<'a> Frames<'a> {
    /// # Errors
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-12.4>: "The payload of a packet that
    /// contains frames MUST contain at least one frame".
    pub(crate) fn new(payload: &'a [u8]) -> Result<Self, TransportError> {
        if payload.is_empty() {
            return Err(TransportError::protocol_violation("a packet without frames"));
        }
        Ok(Self { rest: payload })
    }
}

impl<'a> Iterator for Frames<'a> {
    type Item = Result<Frame<'a>, TransportError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let mut reader = Reader { rest: self.rest };
        let frame = reader.frame();
        self.rest = if frame.is_ok() { reader.rest } else { &[] };
        Some(frame)
    }
}

/// A cursor over a payload; every method says what was missing by an error.
struct Reader<'a> {
    rest: &'a [u8],
}

/// A frame that cannot be read.
struct Malformed(&'static str);

impl<'a> Reader<'a> {
    fn frame(&mut self) -> Result<Frame<'a>, TransportError> {
        let before = self.rest.len();
        let frame_type = self
            .varint()
            .map_err(|Malformed(reason)| TransportError::new(Code::FRAME_ENCODING_ERROR, reason))?;
        // "An endpoint MAY treat the receipt of a frame type that uses a longer encoding than
        // necessary as a connection error of type PROTOCOL_VIOLATION."
        // https://www.rfc-editor.org/rfc/rfc9000.html#section-12.4
        if before - self.rest.len() != varint::size(frame_type) {
            return Err(TransportError::protocol_violation("a frame type longer than necessary")
                .in_frame(frame_type));
        }
        self.body(frame_type).map_err(|Malformed(reason)| {
            TransportError::new(Code::FRAME_ENCODING_ERROR, reason).in_frame(frame_type)
        })
    }

    fn body(&mut self, frame_type: u64) -> Result<Frame<'a>, Malformed> {
        Ok(match frame_type {
            types::PADDING => {
                let padding = self.rest.iter().take_while(|&&octet| octet == 0).count();
                self.rest = &self.rest[padding..];
                Frame::Padding
            }
            types::PING => Frame::Ping,
            types::ACK | types::ACK_ECN => Frame::Ack(self.ack(frame_type == types::ACK_ECN)?),
            types::RESET_STREAM => Frame::ResetStream(ResetStream {
                id: self.stream_id()?,
                code: self.varint()?,
                final_size: self.varint()?,
            }),
            types::STOP_SENDING => {
                Frame::StopSending { id: self.stream_id()?, code: self.varint()? }
            }
            types::CRYPTO => {
                let offset = self.varint()?;
                let data = self.prefixed()?;
                within_offsets(offset, data)?;
                Frame::Crypto { offset, data }
            }
            types::NEW_TOKEN => {
                let token = self.prefixed()?;
                if token.is_empty() {
                    return Err(Malformed("a NEW_TOKEN frame with an empty token"));
                }
                Frame::NewToken(token)
            }
            types::STREAM..=types::STREAM_LAST => Frame::Stream(self.stream(frame_type)?),
            types::MAX_DATA => Frame::MaxData(self.varint()?),
            types::MAX_STREAM_DATA => {
                Frame::MaxStreamData { id: self.stream_id()?, limit: self.varint()? }
            }
            types::MAX_STREAMS_BIDI => {
                Frame::MaxStreams { dir: Dir::Bi, limit: self.stream_count()? }
            }
            types::MAX_STREAMS_UNI => {
                Frame::MaxStreams { dir: Dir::Uni, limit: self.stream_count()? }
            }
            types::DATA_BLOCKED => {
                self.varint()?;
                Frame::DataBlocked
            }
            types::STREAM_DATA_BLOCKED => {
                let id = self.stream_id()?;
                self.varint()?;
                Frame::StreamDataBlocked { id }
            }
            types::STREAMS_BLOCKED_BIDI | types::STREAMS_BLOCKED_UNI => {
                self.stream_count()?;
                Frame::StreamsBlocked
            }
            types::NEW_CONNECTION_ID => Frame::NewConnectionId(self.new_connection_id()?),
            types::RETIRE_CONNECTION_ID => Frame::RetireConnectionId { sequence: self.varint()? },
            types::PATH_CHALLENGE => Frame::PathChallenge(self.array()?),
            types::PATH_RESPONSE => Frame::PathResponse(self.array()?),
            types::CONNECTION_CLOSE => Frame::Close(Close::Transport {
                code: Code::from_wire(self.varint()?),
                frame_type: self.varint()?,
                reason: self.prefixed()?,
            }),
            types::APPLICATION_CLOSE => {
                Frame::Close(Close::Application { code: self.varint()?, reason: self.prefixed()? })
            }
            types::HANDSHAKE_DONE => Frame::HandshakeDone,
            types::DATAGRAM => Frame::Datagram(std::mem::take(&mut self.rest)),
            types::DATAGRAM_WITH_LENGTH => Frame::Datagram(self.prefixed()?),
            _ => return Err(Malformed("a frame of unknown type")),
        })
    }

    fn ack(&mut self, with_ecn: bool) -> Result<Ack<'a>, Malformed> {
        const BELOW_ZERO: Malformed = Malformed("an ACK range below packet number 0");
        let largest = self.varint()?;
        let delay = self.varint()?;
        let count = self.varint()?;
        let first_range = self.varint()?;
        // "If any computed packet number is negative, an endpoint MUST generate a connection error
        // of type FRAME_ENCODING_ERROR." https://www.rfc-editor.org/rfc/rfc9000.html#section-19.3.1
        let mut smallest = largest.checked_sub(first_range).ok_or(BELOW_ZERO)?;
        let start = self.rest;
        for _ in 0..count {
            let (gap, len) = (self.varint()?, self.varint()?);
            let high = smallest.checked_sub(gap).and_then(|high| high.checked_sub(2));
            smallest = high.and_then(|high| high.checked_sub(len)).ok_or(BELOW_ZERO)?;
        }
        let ranges = &start[..start.len() - self.rest.len()];
        let ecn = if with_ecn {
            Some(EcnCounts { ect0: self.varint()?, ect1: self.varint()?, ce: self.varint()? })
        } else {
            None
        };
        Ok(Ack { largest, delay, first_range, ranges, ecn })
    }

    fn stream(&mut self, frame_type: u64) -> Result<Stream<'a>, Malformed> {
        let id = self.stream_id()?;
        let offset = if frame_type & types::STREAM_OFF != 0 { self.varint()? } else { 0 };
        let data = if frame_type & types::STREAM_LEN != 0 {
            self.prefixed()?
        } else {
            std::mem::take(&mut self.rest)
        };
        within_offsets(offset, data)?;
        Ok(Stream { id, offset, data, fin: frame_type & types::STREAM_FIN != 0 })
    }

    fn new_connection_id(&mut self) -> Result<NewConnectionId, Malformed> {
        let sequence = self.varint()?;
        let retire_prior_to = self.varint()?;
        if retire_prior_to > sequence {
            return Err(Malformed("Retire Prior To is above the sequence number"));
        }
        let len = usize::from(self.array::<1>()?[0]);
        if len == 0 {
            return Err(Malformed("a new connection ID of no bytes"));
        }
        let id = ConnectionId::new(self.take(len)?)
            .ok_or(Malformed("a new connection ID of more than 20 bytes"))?;
        Ok(NewConnectionId { sequence, retire_prior_to, id, reset_token: self.array()? })
    }

    fn stream_id(&mut self) -> Result<StreamId, Malformed> {
        self.varint().map(StreamId::from_wire)
    }

    fn stream_count(&mut self) -> Result<u64, Malformed> {
        let count = self.varint()?;
        if count > MAX_STREAM_COUNT {
            return Err(Malformed("more than 2^60 streams"));
        }
        Ok(count)
    }

    fn prefixed(&mut self) -> Result<&'a [u8], Malformed> {
        let len = usize::try_from(self.varint()?).map_err(|_| CUT_SHORT)?;
        self.take(len)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (octets, rest) = self.rest.split_first_chunk().ok_or(CUT_SHORT)?;
        self.rest = rest;
        Ok(*octets)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (octets, rest) = self.rest.split_at_checked(len).ok_or(CUT_SHORT)?;
        self.rest = rest;
        Ok(octets)
    }

    fn varint(&mut self) -> Result<u64, Malformed> {
        let (value, rest) = varint::read(self.rest).ok_or(CUT_SHORT)?;
        self.rest = rest;
        Ok(value)
    }
}

const CUT_SHORT: Malformed = Malformed("a frame that ends before its fields do");

fn within_offsets(offset: u64, data: &[u8]) -> Result<(), Malformed> {
    match offset.checked_add(data.len() as u64) {
        Some(end) if end <= MAX_OFFSET => Ok(()),
        _ => Err(Malformed("data beyond offset 2^62 - 1")),
    }
}

/// Octets of a CRYPTO or STREAM frame besides its data, at most: type, stream ID, offset, length.
pub(crate) const STREAM_OVERHEAD: usize = 1 + 8 + 8 + 2;
/// Octets of a RESET_STREAM, STOP_SENDING, MAX_STREAM_DATA or smaller control frame, at most.
pub(crate) const CONTROL_SIZE: usize = 1 + 8 + 8 + 8;
/// Octets of a NEW_CONNECTION_ID frame, at most.
pub(crate) const NEW_CONNECTION_ID_SIZE: usize = 1 + 8 + 8 + 1 + 20 + 16;
/// Octets of a PATH_CHALLENGE or PATH_RESPONSE frame.
pub(crate) const PATH_SIZE: usize = 9;
/// Octets of a CONNECTION_CLOSE frame besides its reason, at most.
const CLOSE_OVERHEAD: usize = 1 + 8 + 8 + 2;

/// Appends the type `frame_type` and `fields`, all as integers.
pub(crate) fn write_fields(frame_type: u64, fields: &[u64], out: &mut Vec<u8>) {
    varint::write(frame_type, out);
    for &field in fields {
        varint::write(field, out);
    }
}

/// Appends an ACK frame of the highest of `ranges` that fit into `space` octets. Returns whether
/// there was room for at least one.
pub(crate) fn write_ack(
    ranges: &RangeSet,
    delay: u64,
    ecn: Option<EcnCounts>,
    space: usize,
    out: &mut Vec<u8>,
) -> bool {
    let mut descending = ranges.iter().rev();
    let Some(first) = descending.next() else { return false };
    let largest = first.end - 1;
    let ecn_size = ecn.map_or(0, |ecn| [ecn.ect0, ecn.ect1, ecn.ce].map(varint::size).iter().sum());
    // The count of ranges is at most 2 octets: `ranges` are bounded well below 2^14.
    let first_len = largest - first.start;
    let mut used =
        1 + varint::size(largest) + varint::size(delay) + 2 + varint::size(first_len) + ecn_size;
    if used > space {
        return false;
    }
    let mut count = 0u64;
    let mut smallest = first.start;
    for range in descending.clone() {
        let (gap, len) = (smallest - range.end - 1, range.end - 1 - range.start);
        used += varint::size(gap) + varint::size(len);
        if used > space {
            break;
        }
        smallest = range.start;
        count += 1;
    }
    let frame_type = if ecn.is_some() { types::ACK_ECN } else { types::ACK };
    write_fields(frame_type, &[largest, delay, count, first_len], out);
    smallest = first.start;
    #[expect(clippy::cast_possible_truncation, reason = "counts ranges in memory")]
    for range in descending.take(count as usize) {
        varint::write(smallest - range.end - 1, out);
        varint::write(range.end - 1 - range.start, out);
        smallest = range.start;
    }
    if let Some(ecn) = ecn {
        for count in [ecn.ect0, ecn.ect1, ecn.ce] {
            varint::write(count, out);
        }
    }
    true
}

/// Appends the header of a CRYPTO frame; the caller appends `len` octets.
pub(crate) fn write_crypto_header(offset: u64, len: usize, out: &mut Vec<u8>) {
    write_fields(types::CRYPTO, &[offset, len as u64], out);
}

/// Octets of a STREAM frame besides its data and length: type, stream ID, offset.
pub(crate) const fn stream_overhead(id: StreamId, offset: u64) -> usize {
    let offset = if offset > 0 { varint::size(offset) } else { 0 };
    1 + varint::size(id.to_wire()) + offset
}

/// Appends the header of a STREAM frame; the caller appends the data. Without `len`, that reaches to
/// the end of the packet.
pub(crate) fn write_stream_header(
    id: StreamId,
    offset: u64,
    len: Option<usize>,
    fin: bool,
    out: &mut Vec<u8>,
) {
    let mut frame_type = types::STREAM;
    let mut fields = [id.to_wire(), 0, 0];
    let mut count = 1;
    if fin {
        frame_type |= types::STREAM_FIN;
    }
    if offset > 0 {
        frame_type |= types::STREAM_OFF;
        fields[count] = offset;
        count += 1;
    }
    if let Some(len) = len {
        frame_type |= types::STREAM_LEN;
        fields[count] = len as u64;
        count += 1;
    }
    write_fields(frame_type, &fields[..count], out);
}

/// Appends a NEW_CONNECTION_ID frame.
pub(crate) fn write_new_connection_id(frame: &NewConnectionId, out: &mut Vec<u8>) {
    write_fields(types::NEW_CONNECTION_ID, &[frame.sequence, frame.retire_prior_to], out);
    #[expect(clippy::cast_possible_truncation, reason = "at most 20")]
    out.push(frame.id.len() as u8);
    out.put_slice(&frame.id);
    out.put_slice(&frame.reset_token);
}

/// Appends a PATH_CHALLENGE or PATH_RESPONSE frame.
pub(crate) fn write_path(frame_type: u64, data: [u8; 8], out: &mut Vec<u8>) {
    varint::write(frame_type, out);
    out.put_slice(&data);
}

/// Appends a frame that is one octet string with its length: NEW_TOKEN or DATAGRAM.
pub(crate) fn write_octets(frame_type: u64, data: &[u8], out: &mut Vec<u8>) {
    write_fields(frame_type, &[data.len() as u64], out);
    out.put_slice(data);
}

/// Appends a CONNECTION_CLOSE frame, its reason cut to fit into `space` octets.
pub(crate) fn write_close(close: &Close<'_>, space: usize, out: &mut Vec<u8>) {
    let reason = match *close {
        Close::Transport { code, frame_type, reason } => {
            write_fields(types::CONNECTION_CLOSE, &[code.to_wire(), frame_type], out);
            reason
        }
        Close::Application { code, reason } => {
            write_fields(types::APPLICATION_CLOSE, &[code], out);
            reason
        }
    };
    let len = reason.len().min(space.saturating_sub(CLOSE_OVERHEAD));
    varint::write(len as u64, out);
    out.put_slice(&reason[..len]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read_one(octets: &[u8]) -> Result<Frame<'_>, TransportError> {
        Frames::new(octets)?.next().expect("there are octets")
    }

    fn code_of(octets: &[u8]) -> Code {
        read_one(octets).expect_err("a malformed frame").code
    }

    #[test]
    fn req_f01_unknown_types_and_empty_payloads_are_errors() {
        for frame_type in [0x1fu64, 0x2f, 0x32, 0x4000, 0xaf, 0xff04_de1b, varint::MAX] {
            let mut octets = Vec::new();
            write_fields(frame_type, &[], &mut octets);
            assert_eq!(code_of(&octets), Code::FRAME_ENCODING_ERROR);
        }
        assert_eq!(Frames::new(&[]).map(|_| ()).unwrap_err().code, Code::PROTOCOL_VIOLATION);
    }

    #[test]
    fn req_a28_frame_types_are_minimal() {
        assert_eq!(read_one(&[0x01]), Ok(Frame::Ping));
        assert_eq!(code_of(&[0x40, 0x01]), Code::PROTOCOL_VIOLATION);
    }

    #[test]
    fn req_f10_ack_ranges_never_fall_below_zero() {
        // Largest 5 and a first range of 6.
        assert_eq!(code_of(&[2, 5, 0, 0, 6]), Code::FRAME_ENCODING_ERROR);
        // 5..=5, then a gap that leaves no room.
        assert_eq!(code_of(&[2, 5, 0, 1, 0, 4, 0]), Code::FRAME_ENCODING_ERROR);
        let Ok(Frame::Ack(ack)) = read_one(&[2, 5, 0, 1, 0, 3, 0]) else { panic!("an ACK") };
        assert_eq!(ack.ranges().collect::<Vec<_>>(), [(5, 5), (0, 0)]);
    }

    #[test]
    fn req_f12_crypto_and_stream_data_end_below_2_to_the_62() {
        let mut octets = Vec::new();
        write_crypto_header(varint::MAX, 1, &mut octets);
        octets.push(0);
        assert_eq!(code_of(&octets), Code::FRAME_ENCODING_ERROR);
        octets.clear();
        write_stream_header(StreamId::from_wire(0), varint::MAX, Some(1), false, &mut octets);
        octets.push(0);
        assert_eq!(code_of(&octets), Code::FRAME_ENCODING_ERROR);
    }

    #[test]
    fn req_f13_an_empty_new_token_is_an_encoding_error() {
        assert_eq!(code_of(&[7, 0]), Code::FRAME_ENCODING_ERROR);
    }

    #[test]
    fn req_g09_more_than_2_to_the_60_streams_is_an_encoding_error() {
        for frame_type in [types::MAX_STREAMS_BIDI, types::STREAMS_BLOCKED_UNI] {
            let mut octets = Vec::new();
            write_fields(frame_type, &[MAX_STREAM_COUNT + 1], &mut octets);
            assert_eq!(code_of(&octets), Code::FRAME_ENCODING_ERROR);
        }
    }

    #[test]
    fn req_b04_new_connection_ids_have_1_to_20_octets_and_a_sane_retire_prior_to() {
        let frame = |retire, len: u8| {
            let mut octets = vec![0x18, 3, retire, len];
            octets.extend(vec![9; usize::from(len) + 16]);
            octets
        };
        assert!(read_one(&frame(3, 20)).is_ok());
        for bad in [frame(4, 8), frame(0, 0), frame(0, 21)] {
            assert_eq!(code_of(&bad), Code::FRAME_ENCODING_ERROR);
        }
    }

    #[test]
    fn every_frame_cut_short_is_an_encoding_error() {
        let mut frames: Vec<Vec<u8>> = vec![];
        let mut add = |write: &dyn Fn(&mut Vec<u8>)| {
            let mut octets = Vec::new();
            write(&mut octets);
            frames.push(octets);
        };
        let mut ranges = RangeSet::default();
        ranges.insert(3..9);
        ranges.insert(100..1000);
        let counts = EcnCounts { ect0: 1, ect1: 2, ce: 3 };
        add(&|out| assert!(write_ack(&ranges, 7, Some(counts), 1000, out)));
        add(&|out| write_fields(types::RESET_STREAM, &[1, 2, 3], out));
        add(&|out| write_path(types::PATH_CHALLENGE, [1; 8], out));
        add(&|out| write_octets(types::NEW_TOKEN, b"token", out));
        add(&|out| write_octets(types::DATAGRAM_WITH_LENGTH, b"data", out));
        let close = Close::Application { code: 1, reason: b"bye" };
        add(&|out| write_close(&close, 100, out));
        for octets in frames {
            assert!(read_one(&octets).is_ok());
            for end in 1..octets.len() {
                assert_eq!(code_of(&octets[..end]), Code::FRAME_ENCODING_ERROR, "{octets:x?}");
            }
        }
    }

    proptest! {
        #[test]
        fn acks_written_are_acks_read(
            values in proptest::collection::btree_set(0u64..200, 1..40),
            space in 8usize..80,
        ) {
            let mut ranges = RangeSet::default();
            for &value in &values {
                ranges.insert(value..value + 1);
            }
            let mut octets = Vec::new();
            prop_assume!(write_ack(&ranges, 5, None, space, &mut octets));
            prop_assert!(octets.len() <= space);
            let Ok(Frame::Ack(ack)) = read_one(&octets) else { panic!("an ACK") };
            let expected = ranges.iter().rev().map(|range| (range.start, range.end - 1));
            let read: Vec<_> = ack.ranges().collect();
            prop_assert!(expected.take(read.len()).eq(read.iter().copied()));
        }

        #[test]
        fn any_octets_read_to_an_end(octets in proptest::collection::vec(any::<u8>(), 1..300)) {
            let frames = Frames::new(&octets).unwrap();
            prop_assert!(frames.take(301).count() <= octets.len());
        }
    }
}
