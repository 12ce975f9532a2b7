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
//!    threads too; then [`Endpoint::look_at`] is the input. Datagrams that arrive together may be
//!    given together.
//! 2. Call [`Endpoint::poll_transmit`] until it gives nothing more, then [`Endpoint::poll_event`]
//!    likewise. Acting on an event is an input: go back to 1.
//! 3. Wait for a datagram, or until [`Endpoint::deadline`].
//!
//! Where there is no room for datagrams, [`Endpoint::poll_transmit`] is left out until there is, and
//! nothing else: events, connection IDs and deadlines follow every input, whether or not anything
//! was sent.
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
//! | loss and rate | `recovery`, `acks`, `rtt`, `ecn`, [`congestion`], `pacer`, `mtu` |
//! | who is where | `path`, `cids` |
//! | what is told | `record`, `timer` |

mod acks;
mod assembler;
mod cids;
mod config;
pub mod congestion;
mod connection;
mod datagrams;
mod ecn;
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
mod record;
mod recovery;
mod reset;
mod rtt;
mod send_buffer;
mod space;
mod stream_id;
mod streams;
#[cfg(test)]
mod tests;
mod timer;
mod tls;

pub use config::{ClientConfig, RetryPolicy, ServerConfig, TransportConfig};
pub use connection::{
    Connection, Event, MigrateError, PathInfo, SendDatagramError, Stats, Traffic,
};
pub use ecn::Ecn;
pub use endpoint::{
    CidIssuer, ConnectError, ConnectionHandle, Endpoint, EndpointConfig, Received,
    SharedConnection, TokenPolicy, TokenResult, Transmit,
};
pub use error::{Code, ConnectionError, PeerClose, TransportError};
pub use packet::DropReason;
pub use parameters::PreferredAddress;
pub use record::{
    CongestionSign, CongestionState, LossReason, Observer, Observers, Record, RecoveryMetrics,
    Subject,
};
pub use reset::ResetKey;
pub use space::Space;
pub use stream_id::{Dir, Side, StreamId};
pub use streams::{Read, ReadError, StreamEvent, StreamLimits, WriteError};
pub use timer::Timer;
