//! Transport parameters: what each side tells the other during the handshake.
//!
//! <https://www.rfc-editor.org/rfc/rfc9000.html#section-18>

use std::{
    net::{SocketAddrV4, SocketAddrV6},
    time::Duration,
};

use super::{
    error::{Code, TransportError},
    frame::MAX_STREAM_COUNT,
    stream_id::Side,
};
use crate::{connection_id::ConnectionId, varint};

mod ids {
    pub(super) const ORIGINAL_DESTINATION_CONNECTION_ID: u64 = 0x00;
    pub(super) const MAX_IDLE_TIMEOUT: u64 = 0x01;
    pub(super) const STATELESS_RESET_TOKEN: u64 = 0x02;
    pub(super) const MAX_UDP_PAYLOAD_SIZE: u64 = 0x03;
    pub(super) const INITIAL_MAX_DATA: u64 = 0x04;
    pub(super) const INITIAL_MAX_STREAM_DATA_BIDI_LOCAL: u64 = 0x05;
    pub(super) const INITIAL_MAX_STREAM_DATA_BIDI_REMOTE: u64 = 0x06;
    pub(super) const INITIAL_MAX_STREAM_DATA_UNI: u64 = 0x07;
    pub(super) const INITIAL_MAX_STREAMS_BIDI: u64 = 0x08;
    pub(super) const INITIAL_MAX_STREAMS_UNI: u64 = 0x09;
    pub(super) const ACK_DELAY_EXPONENT: u64 = 0x0a;
    pub(super) const MAX_ACK_DELAY: u64 = 0x0b;
    pub(super) const DISABLE_ACTIVE_MIGRATION: u64 = 0x0c;
    pub(super) const PREFERRED_ADDRESS: u64 = 0x0d;
    pub(super) const ACTIVE_CONNECTION_ID_LIMIT: u64 = 0x0e;
    pub(super) const INITIAL_SOURCE_CONNECTION_ID: u64 = 0x0f;
    pub(super) const RETRY_SOURCE_CONNECTION_ID: u64 = 0x10;
    /// <https://www.rfc-editor.org/rfc/rfc9221.html#section-3>
    pub(super) const MAX_DATAGRAM_FRAME_SIZE: u64 = 0x20;
}

/// The smallest datagram every path has to carry.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-14>
pub(crate) const MIN_UDP_PAYLOAD: u16 = 1200;

/// What one endpoint says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TransportParameters {
    pub(crate) original_destination_connection_id: Option<ConnectionId>,
    pub(crate) initial_source_connection_id: Option<ConnectionId>,
    pub(crate) retry_source_connection_id: Option<ConnectionId>,
    pub(crate) stateless_reset_token: Option<[u8; 16]>,
    pub(crate) preferred_address: Option<Preferred>,
    /// Zero: no timeout.
    pub(crate) max_idle_timeout: Duration,
    pub(crate) max_udp_payload_size: u64,
    pub(crate) initial_max_data: u64,
    pub(crate) initial_max_stream_data_bidi_local: u64,
    pub(crate) initial_max_stream_data_bidi_remote: u64,
    pub(crate) initial_max_stream_data_uni: u64,
    pub(crate) initial_max_streams_bidi: u64,
    pub(crate) initial_max_streams_uni: u64,
    pub(crate) ack_delay_exponent: u8,
    pub(crate) max_ack_delay: Duration,
    pub(crate) disable_active_migration: bool,
    pub(crate) active_connection_id_limit: u64,
    /// Zero: no DATAGRAM frames.
    pub(crate) max_datagram_frame_size: u64,
}

/// A further address of a server, in either or both families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PreferredAddress {
    /// For clients that have reached it over IPv4.
    pub ipv4: Option<SocketAddrV4>,
    /// For clients that have reached it over IPv6.
    pub ipv6: Option<SocketAddrV6>,
}

/// A further address of a server, and its connection ID there, whose number is 1.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-9.6>
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Preferred {
    pub(crate) address: PreferredAddress,
    pub(crate) connection_id: ConnectionId,
    pub(crate) stateless_reset_token: [u8; 16],
}

impl Default for TransportParameters {
    /// What holds for parameters that are absent.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-18.2>
    fn default() -> Self {
        Self {
            original_destination_connection_id: None,
            initial_source_connection_id: None,
            retry_source_connection_id: None,
            stateless_reset_token: None,
            preferred_address: None,
            max_idle_timeout: Duration::ZERO,
            max_udp_payload_size: 65527,
            initial_max_data: 0,
            initial_max_stream_data_bidi_local: 0,
            initial_max_stream_data_bidi_remote: 0,
            initial_max_stream_data_uni: 0,
            initial_max_streams_bidi: 0,
            initial_max_streams_uni: 0,
            ack_delay_exponent: 3,
            max_ack_delay: Duration::from_millis(25),
            disable_active_migration: false,
            active_connection_id_limit: 2,
            max_datagram_frame_size: 0,
        }
    }
}

impl TransportParameters {
    /// Appends the parameters that differ from their defaults, and a reserved one whose number
    /// `grease` decides, so that peers keep ignoring what they do not know.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-18.1>
    pub(crate) fn write(&self, grease: u32, out: &mut Vec<u8>) {
        let default = Self::default();
        let mut octets = |id: u64, value: &[u8]| {
            varint::write(id, out);
            varint::write(value.len() as u64, out);
            out.extend_from_slice(value);
        };
        octets(31 * u64::from(grease) + 27, &[]);
        for (id, value) in [
            (ids::ORIGINAL_DESTINATION_CONNECTION_ID, &self.original_destination_connection_id),
            (ids::INITIAL_SOURCE_CONNECTION_ID, &self.initial_source_connection_id),
            (ids::RETRY_SOURCE_CONNECTION_ID, &self.retry_source_connection_id),
        ] {
            if let Some(value) = value {
                octets(id, value);
            }
        }
        if let Some(token) = &self.stateless_reset_token {
            octets(ids::STATELESS_RESET_TOKEN, token);
        }
        if let Some(address) = &self.preferred_address {
            octets(ids::PREFERRED_ADDRESS, &address.to_octets());
        }
        if self.disable_active_migration {
            octets(ids::DISABLE_ACTIVE_MIGRATION, &[]);
        }
        for ((id, value), (_, default)) in self.integers().into_iter().zip(default.integers()) {
            if value != default {
                let mut encoded = Vec::with_capacity(8);
                varint::write(value, &mut encoded);
                octets(id, &encoded);
            }
        }
    }

    fn integers(&self) -> [(u64, u64); 12] {
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        [
            (ids::MAX_IDLE_TIMEOUT, millis(self.max_idle_timeout)),
            (ids::MAX_UDP_PAYLOAD_SIZE, self.max_udp_payload_size),
            (ids::INITIAL_MAX_DATA, self.initial_max_data),
            (ids::INITIAL_MAX_STREAM_DATA_BIDI_LOCAL, self.initial_max_stream_data_bidi_local),
            (ids::INITIAL_MAX_STREAM_DATA_BIDI_REMOTE, self.initial_max_stream_data_bidi_remote),
            (ids::INITIAL_MAX_STREAM_DATA_UNI, self.initial_max_stream_data_uni),
            (ids::INITIAL_MAX_STREAMS_BIDI, self.initial_max_streams_bidi),
            (ids::INITIAL_MAX_STREAMS_UNI, self.initial_max_streams_uni),
            (ids::ACK_DELAY_EXPONENT, u64::from(self.ack_delay_exponent)),
            (ids::MAX_ACK_DELAY, millis(self.max_ack_delay)),
            (ids::ACTIVE_CONNECTION_ID_LIMIT, self.active_connection_id_limit),
            (ids::MAX_DATAGRAM_FRAME_SIZE, self.max_datagram_frame_size),
        ]
    }

    /// Reads what `sender` sent.
    ///
    /// # Errors
    ///
    /// TRANSPORT_PARAMETER_ERROR for what cannot be read, stands twice, is out of range or may not
    /// come from `sender`.
    pub(crate) fn read(input: &[u8], sender: Side) -> Result<Self, TransportError> {
        read(input, sender)
            .map_err(|reason| TransportError::new(Code::TRANSPORT_PARAMETER_ERROR, reason))
    }
}

/// How many different parameters an endpoint may send us. Unknown ones count, so that looking for
/// duplicates stays cheap.
const MAX_PARAMETERS: usize = 256;

fn read(mut input: &[u8], sender: Side) -> Result<TransportParameters, &'static str> {
    const CUT_SHORT: &str = "a transport parameter is cut short";
    let mut parameters = TransportParameters::default();
    let mut seen = Vec::new();
    while !input.is_empty() {
        let (id, rest) = varint::read(input).ok_or(CUT_SHORT)?;
        let (len, rest) = varint::read(rest).ok_or(CUT_SHORT)?;
        let len = usize::try_from(len).map_err(|_| CUT_SHORT)?;
        let (value, rest) = rest.split_at_checked(len).ok_or(CUT_SHORT)?;
        input = rest;
        if seen.contains(&id) {
            return Err("a transport parameter stands twice");
        }
        if seen.len() == MAX_PARAMETERS {
            return Err("too many transport parameters");
        }
        seen.push(id);
        parameters.set(id, value, sender)?;
    }
    Ok(parameters)
}

impl TransportParameters {
    fn set(&mut self, id: u64, value: &[u8], sender: Side) -> Result<(), &'static str> {
        // "A client MUST NOT include any server-only transport parameter"
        // https://www.rfc-editor.org/rfc/rfc9000.html#section-18.2
        let server_only = matches!(
            id,
            ids::ORIGINAL_DESTINATION_CONNECTION_ID
                | ids::STATELESS_RESET_TOKEN
                | ids::PREFERRED_ADDRESS
                | ids::RETRY_SOURCE_CONNECTION_ID
        );
        if server_only && sender.is_client() {
            return Err("a client sent a parameter that only servers may send");
        }
        match id {
            ids::ORIGINAL_DESTINATION_CONNECTION_ID => {
                self.original_destination_connection_id = Some(connection_id(value)?);
            }
            ids::INITIAL_SOURCE_CONNECTION_ID => {
                self.initial_source_connection_id = Some(connection_id(value)?);
            }
            ids::RETRY_SOURCE_CONNECTION_ID => {
                self.retry_source_connection_id = Some(connection_id(value)?);
            }
            ids::STATELESS_RESET_TOKEN => {
                let token = value.try_into().map_err(|_| "a reset token has 16 bytes")?;
                self.stateless_reset_token = Some(token);
            }
            ids::PREFERRED_ADDRESS => {
                self.preferred_address = Some(Preferred::from_octets(value)?);
            }
            ids::MAX_IDLE_TIMEOUT => self.max_idle_timeout = Duration::from_millis(integer(value)?),
            ids::MAX_UDP_PAYLOAD_SIZE => {
                self.max_udp_payload_size =
                    bounded(value, u64::from(MIN_UDP_PAYLOAD)..=varint::MAX)?;
            }
            ids::INITIAL_MAX_DATA => self.initial_max_data = integer(value)?,
            ids::INITIAL_MAX_STREAM_DATA_BIDI_LOCAL => {
                self.initial_max_stream_data_bidi_local = integer(value)?;
            }
            ids::INITIAL_MAX_STREAM_DATA_BIDI_REMOTE => {
                self.initial_max_stream_data_bidi_remote = integer(value)?;
            }
            ids::INITIAL_MAX_STREAM_DATA_UNI => {
                self.initial_max_stream_data_uni = integer(value)?;
            }
            ids::INITIAL_MAX_STREAMS_BIDI => {
                self.initial_max_streams_bidi = bounded(value, 0..=MAX_STREAM_COUNT)?;
            }
            ids::INITIAL_MAX_STREAMS_UNI => {
                self.initial_max_streams_uni = bounded(value, 0..=MAX_STREAM_COUNT)?;
            }
            ids::ACK_DELAY_EXPONENT => {
                let exponent = bounded(value, 0..=20)?;
                self.ack_delay_exponent = u8::try_from(exponent).map_err(|_| OUT_OF_RANGE)?;
            }
            ids::MAX_ACK_DELAY => {
                self.max_ack_delay = Duration::from_millis(bounded(value, 0..=(1 << 14) - 1)?);
            }
            ids::DISABLE_ACTIVE_MIGRATION => {
                if !value.is_empty() {
                    return Err("disable_active_migration carries no value");
                }
                self.disable_active_migration = true;
            }
            ids::ACTIVE_CONNECTION_ID_LIMIT => {
                self.active_connection_id_limit = bounded(value, 2..=varint::MAX)?;
            }
            ids::MAX_DATAGRAM_FRAME_SIZE => self.max_datagram_frame_size = integer(value)?,
            _ => {}
        }
        Ok(())
    }
}

impl Preferred {
    fn to_octets(&self) -> Vec<u8> {
        let v4 = self.address.ipv4.unwrap_or(SocketAddrV4::new([0; 4].into(), 0));
        let v6 = self.address.ipv6.unwrap_or(SocketAddrV6::new([0; 16].into(), 0, 0, 0));
        let mut out = Vec::with_capacity(61);
        out.extend_from_slice(&v4.ip().octets());
        out.extend_from_slice(&v4.port().to_be_bytes());
        out.extend_from_slice(&v6.ip().octets());
        out.extend_from_slice(&v6.port().to_be_bytes());
        #[expect(clippy::cast_possible_truncation, reason = "at most 20")]
        out.push(self.connection_id.len() as u8);
        out.extend_from_slice(&self.connection_id);
        out.extend_from_slice(&self.stateless_reset_token);
        out
    }

    fn from_octets(value: &[u8]) -> Result<Self, &'static str> {
        const BROKEN: &str = "a preferred address that cannot be read";
        let (v4, rest) = value.split_first_chunk::<4>().ok_or(BROKEN)?;
        let (v4_port, rest) = rest.split_first_chunk::<2>().ok_or(BROKEN)?;
        let (v6, rest) = rest.split_first_chunk::<16>().ok_or(BROKEN)?;
        let (v6_port, rest) = rest.split_first_chunk::<2>().ok_or(BROKEN)?;
        let (&len, rest) = rest.split_first().ok_or(BROKEN)?;
        let (id, token) = rest.split_at_checked(usize::from(len)).ok_or(BROKEN)?;
        if id.is_empty() {
            return Err("a preferred address without a connection ID");
        }
        let v4 = SocketAddrV4::new((*v4).into(), u16::from_be_bytes(*v4_port));
        let v6 = SocketAddrV6::new((*v6).into(), u16::from_be_bytes(*v6_port), 0, 0);
        Ok(Self {
            address: PreferredAddress {
                ipv4: (v4.port() != 0 && !v4.ip().is_unspecified()).then_some(v4),
                ipv6: (v6.port() != 0 && !v6.ip().is_unspecified()).then_some(v6),
            },
            connection_id: ConnectionId::new(id).ok_or(BROKEN)?,
            stateless_reset_token: token.try_into().map_err(|_| BROKEN)?,
        })
    }
}

const OUT_OF_RANGE: &str = "a transport parameter is out of range";

fn connection_id(value: &[u8]) -> Result<ConnectionId, &'static str> {
    ConnectionId::new(value).ok_or("a connection ID of more than 20 bytes")
}

fn integer(value: &[u8]) -> Result<u64, &'static str> {
    match varint::read(value) {
        Some((integer, [])) => Ok(integer),
        _ => Err("a transport parameter that is not one integer"),
    }
}

fn bounded(value: &[u8], range: std::ops::RangeInclusive<u64>) -> Result<u64, &'static str> {
    let value = integer(value)?;
    if range.contains(&value) { Ok(value) } else { Err(OUT_OF_RANGE) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parameter(id: u64, value: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        varint::write(id, &mut out);
        varint::write(value.len() as u64, &mut out);
        out.extend_from_slice(value);
        out
    }

    fn number(id: u64, value: u64) -> Vec<u8> {
        let mut octets = Vec::new();
        varint::write(value, &mut octets);
        parameter(id, &octets)
    }

    #[test]
    fn req_d01_duplicates_are_errors_known_or_not() {
        for id in [ids::MAX_ACK_DELAY, 0x7fff] {
            let twice = [number(id, 5), number(id, 5)].concat();
            let error = TransportParameters::read(&twice, Side::Server).unwrap_err();
            assert_eq!(error.code, Code::TRANSPORT_PARAMETER_ERROR);
        }
    }

    #[test]
    fn req_d02_unknown_parameters_are_ignored_and_a_reserved_one_is_sent() {
        let read = TransportParameters::read(&parameter(0x1234_5678, b"x"), Side::Client);
        assert_eq!(read, Ok(TransportParameters::default()));
        let mut out = Vec::new();
        TransportParameters::default().write(3, &mut out);
        assert_eq!(varint::read(&out).map(|(id, _)| id % 31), Some(27));
    }

    #[test]
    fn req_d03_values_out_of_range_are_errors() {
        for (id, good, bad) in [
            (ids::MAX_UDP_PAYLOAD_SIZE, 1200, 1199),
            (ids::ACK_DELAY_EXPONENT, 20, 21),
            (ids::MAX_ACK_DELAY, (1 << 14) - 1, 1 << 14),
            (ids::ACTIVE_CONNECTION_ID_LIMIT, 2, 1),
            (ids::INITIAL_MAX_STREAMS_BIDI, 1 << 60, (1 << 60) + 1),
            (ids::INITIAL_MAX_STREAMS_UNI, 1 << 60, (1 << 60) + 1),
        ] {
            assert!(TransportParameters::read(&number(id, good), Side::Client).is_ok());
            assert!(TransportParameters::read(&number(id, bad), Side::Client).is_err());
        }
        let short_token = parameter(ids::STATELESS_RESET_TOKEN, &[1; 15]);
        assert!(TransportParameters::read(&short_token, Side::Server).is_err());
        let loose = parameter(ids::INITIAL_MAX_DATA, &[5, 0]);
        assert!(TransportParameters::read(&loose, Side::Server).is_err());
    }

    #[test]
    fn req_d04_clients_may_not_send_what_only_servers_may() {
        let preferred = Preferred {
            address: PreferredAddress { ipv4: Some("192.0.2.1:443".parse().unwrap()), ipv6: None },
            connection_id: ConnectionId::new(&[1; 8]).unwrap(),
            stateless_reset_token: [2; 16],
        };
        for (id, value) in [
            (ids::ORIGINAL_DESTINATION_CONNECTION_ID, vec![1; 8]),
            (ids::RETRY_SOURCE_CONNECTION_ID, vec![1; 8]),
            (ids::STATELESS_RESET_TOKEN, vec![1; 16]),
            (ids::PREFERRED_ADDRESS, preferred.to_octets()),
        ] {
            let octets = parameter(id, &value);
            assert!(TransportParameters::read(&octets, Side::Server).is_ok());
            assert!(TransportParameters::read(&octets, Side::Client).is_err());
        }
    }

    #[test]
    fn req_d05_a_preferred_address_needs_a_connection_id() {
        let mut octets = vec![0; 24];
        octets.push(0);
        octets.extend([7; 16]);
        let parameter = parameter(ids::PREFERRED_ADDRESS, &octets);
        assert!(TransportParameters::read(&parameter, Side::Server).is_err());
    }

    #[test]
    fn req_d06_absent_parameters_have_their_defaults() {
        let read = TransportParameters::read(&[], Side::Server).unwrap();
        assert_eq!(read.ack_delay_exponent, 3);
        assert_eq!(read.max_ack_delay, Duration::from_millis(25));
        assert_eq!(read.max_udp_payload_size, 65527);
        assert_eq!(read.active_connection_id_limit, 2);
    }

    #[test]
    fn what_is_written_is_what_is_read() {
        let parameters = TransportParameters {
            original_destination_connection_id: ConnectionId::new(&[1; 8]),
            initial_source_connection_id: ConnectionId::new(&[2; 20]),
            retry_source_connection_id: ConnectionId::new(&[]),
            stateless_reset_token: Some([3; 16]),
            preferred_address: Some(Preferred {
                address: PreferredAddress {
                    ipv4: Some("192.0.2.1:443".parse().unwrap()),
                    ipv6: Some("[2001:db8::1]:443".parse().unwrap()),
                },
                connection_id: ConnectionId::new(&[4; 9]).unwrap(),
                stateless_reset_token: [5; 16],
            }),
            max_idle_timeout: Duration::from_secs(30),
            max_udp_payload_size: 1452,
            initial_max_data: 1 << 24,
            initial_max_stream_data_bidi_local: 1,
            initial_max_stream_data_bidi_remote: 2,
            initial_max_stream_data_uni: 3,
            initial_max_streams_bidi: 100,
            initial_max_streams_uni: 10,
            ack_delay_exponent: 4,
            max_ack_delay: Duration::from_millis(7),
            disable_active_migration: true,
            active_connection_id_limit: 8,
            max_datagram_frame_size: 65535,
        };
        let mut out = Vec::new();
        parameters.write(9, &mut out);
        assert_eq!(TransportParameters::read(&out, Side::Server), Ok(parameters));
    }

    proptest! {
        #[test]
        fn any_octets_read_without_panic(
            octets in proptest::collection::vec(any::<u8>(), 0..200),
            id in 0u64..0x22,
            value in proptest::collection::vec(any::<u8>(), 0..70),
        ) {
            for sender in [Side::Client, Side::Server] {
                let _ = TransportParameters::read(&octets, sender);
                let _ = TransportParameters::read(&parameter(id, &value), sender);
            }
        }
    }
}
