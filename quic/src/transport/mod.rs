//! The transport: an [`Endpoint`] and its [`Connection`]s, without sockets, clocks or entropy.
//!
//! An endpoint owns what a socket's worth of datagrams needs: connection IDs, acceptance, and the
//! connections themselves. A connection owns everything between its datagrams and its streams.
//!
//! # The calling rule
//!
//! One input, then drain the outputs until only a deadline is left:
//!
//! 1. Give **one** input: [`Endpoint::handle_datagram`], [`Endpoint::handle_deadline`], or a method
//!    of a connection through [`Endpoint::connection_mut`]. Or through [`Endpoint::share`], by other
//!    threads too; then [`Endpoint::look_at`] is the input.
//! 2. Call [`Endpoint::poll_transmit`] until it gives nothing more, then [`Endpoint::poll_event`]
//!    likewise. Acting on an event is an input: go back to 1.
//! 3. Wait for a datagram, or until [`Endpoint::deadline`].
//!
//! Time is whatever `now` says; it must not run backwards. Randomness comes from the seed given at
//! construction, so that the same seed and inputs give the same octets, as far as TLS does: its
//! randoms come from the `CryptoProvider`, which tests replace by a seeded one.
//!
//! # Map
//!
//! | part | modules |
//! | --- | --- |
//! | datagrams to connections | `endpoint`, `reset` |
//! | one connection | `connection` and the files it names |
//! | on the wire | `packet`, `frame`, `parameters`, `stream_id` |
//! | keys and TLS | `tls` (the only file that knows rustls' QUIC API), `keys` |
//! | octets in order | `streams`, `assembler`, `send_buffer`, `datagrams`, `ranges` |
//! | loss and rate | `recovery`, `acks`, `rtt`, [`congestion`], `pacer`, `mtu` |
//! | who is where | `path`, `cids` |

mod acks;
mod assembler;
mod cids;
mod config;
pub mod congestion;
mod connection;
mod datagrams;
mod endpoint;
mod error;
mod frame;
#[cfg(fuzzing)]
pub mod fuzzing;
mod keys;
mod mtu;
mod pacer;
mod packet;
mod parameters;
mod path;
mod ranges;
mod recovery;
mod reset;
mod rtt;
mod send_buffer;
mod space;
mod stream_id;
mod streams;
#[cfg(test)]
mod tests;
mod tls;

pub use config::{ClientConfig, PreferredAddress, RetryPolicy, ServerConfig, TransportConfig};
pub use connection::{
    Connection, Event, MigrateError, PathInfo, SendDatagramError, Stats, Traffic,
};
pub use endpoint::{
    CidIssuer, ConnectError, ConnectionHandle, Endpoint, EndpointConfig, Received,
    SharedConnection, TokenPolicy, TokenResult, Transmit,
};
pub use error::{Code, ConnectionError, PeerClose, TransportError};
pub use packet::DropReason;
pub use reset::ResetKey;
pub use stream_id::{Dir, Side, StreamId};
pub use streams::{Read, ReadError, StreamEvent, StreamLimits, WriteError};

/// An ECN codepoint other than Not-ECT.
///
/// <https://www.rfc-editor.org/rfc/rfc3168.html#section-5>
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ecn {
    /// ECN-capable transport, the codepoint that QUIC uses.
    Ect0,
    /// ECN-capable transport, for L4S.
    Ect1,
    /// Congestion experienced.
    Ce,
}

impl Ecn {
    /// The codepoint in the two low bits of the IP header's traffic class.
    #[must_use]
    pub const fn from_bits(bits: u8) -> Option<Self> {
        match bits & 0b11 {
            0b10 => Some(Self::Ect0),
            0b01 => Some(Self::Ect1),
            0b11 => Some(Self::Ce),
            _ => None,
        }
    }

    /// The two bits.
    #[must_use]
    pub const fn to_bits(self) -> u8 {
        match self {
            Self::Ect0 => 0b10,
            Self::Ect1 => 0b01,
            Self::Ce => 0b11,
        }
    }
}
