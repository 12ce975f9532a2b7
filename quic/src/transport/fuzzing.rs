//! What fuzz targets reach and nobody else can: the decoders by themselves, and packets sealed with
//! a connection's own keys that no connection would send. Compiled with `--cfg fuzzing` only.

use std::time::Instant;

use super::{
    connection::Connection,
    error::Code,
    frame::{Frame, Frames},
    packet::{Header, PacketKind},
    parameters::TransportParameters,
    space::Space,
    stream_id::Side,
};
use crate::varint;

/// Which keys seal a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Those of Initial packets.
    Initial,
    /// Those of Handshake packets.
    Handshake,
    /// Those of short-header packets.
    OneRtt,
}

/// A packet with `frames` as its payload, whatever they are, from this connection to its peer.
/// Empty when there are no such keys, not yet or not any more.
pub fn forge(connection: &mut Connection, now: Instant, level: Level, frames: &[u8]) -> Vec<u8> {
    let space = match level {
        Level::Initial => Space::Initial,
        Level::Handshake => Space::Handshake,
        Level::OneRtt => Space::Data,
    };
    connection.forge(now, space, frames)
}

/// Reads a packet's payload. Returns how many frames it has.
///
/// # Errors
///
/// What the connection would close with.
///
/// # Panics
///
/// When a frame is not what frames have to be below the decoder.
pub fn read_frames(payload: &[u8]) -> Result<usize, Code> {
    let mut count = 0;
    for frame in Frames::new(payload).map_err(|error| error.code)? {
        let within = |offset: u64, data: &[u8]| offset + data.len() as u64 <= varint::MAX;
        match frame.map_err(|error| error.code)? {
            Frame::Ack(ack) => {
                let mut above = None;
                for (low, high) in ack.ranges() {
                    assert!(low <= high && above.is_none_or(|above| high + 1 < above));
                    above = Some(low);
                }
            }
            Frame::Crypto { offset, data } => assert!(within(offset, data)),
            Frame::Stream(stream) => assert!(within(stream.offset, stream.data)),
            Frame::NewToken(token) => assert!(!token.is_empty()),
            Frame::NewConnectionId(frame) => {
                assert!(!frame.id.is_empty() && frame.retire_prior_to <= frame.sequence);
            }
            _ => {}
        }
        count += 1;
    }
    Ok(count)
}

/// Reads the transport parameters that `sender` sent.
///
/// # Errors
///
/// What the connection would close with.
///
/// # Panics
///
/// When they, written and read again, are not the same.
pub fn read_transport_parameters(octets: &[u8], sender: Side) -> Result<(), Code> {
    let read = TransportParameters::read(octets, sender).map_err(|error| error.code)?;
    let mut written = Vec::new();
    read.write(1_000_000, &mut written);
    assert_eq!(TransportParameters::read(&written, sender).as_ref(), Ok(&read));
    Ok(())
}

/// Reads the headers of a datagram's packets, as an endpoint whose connection IDs have `dcid_len`
/// octets does. Returns how many there are.
///
/// # Panics
///
/// When a packet is not within the datagram.
#[must_use]
pub fn read_headers(mut datagram: &[u8], dcid_len: usize) -> usize {
    let mut count = 0;
    while !datagram.is_empty() {
        let Ok(header) = Header::read(datagram, dcid_len) else { break };
        assert!((1..=datagram.len()).contains(&header.len));
        if let PacketKind::Initial { token, .. } = &header.kind {
            assert!(token.start <= token.end && token.end <= header.len);
        }
        datagram = &datagram[header.len..];
        count += 1;
    }
    count
}
