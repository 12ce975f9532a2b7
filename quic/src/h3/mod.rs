//! HTTP/3 on the [`driver`]: the transport traits of the crate `h3`.
//!
//! ```text
//! application ── h3 (frames, QPACK, control streams) ── this module ── driver ── UDP
//! ```
//!
//! Wrap a connection of the driver in [`Connection`] and hand it to `h3::server::builder()` or
//! `h3::client::builder()`. The handle that was wrapped may be kept as a clone, for what `h3` has no
//! words for: migration, figures, connection IDs. `h3-datagram` finds its traits here too; its
//! version 0.0.2 addresses whatever it sends to stream 0, which is what [`send_datagram`] is for.
//!
//! # Malformed requests
//!
//! Servers take the head of a request by [`resolve`], which refuses what `h3` lets pass, and hold its body to the announced length
//! by [`Content`]. Reading on fails where trailers have pseudo-header fields. [`is_malformed`] tells such errors from others.
//!
//! # Whose mistake it was
//!
//! | here | in `h3` |
//! | --- | --- |
//! | the peer's application closed the connection | `ApplicationClose`, with its code |
//! | silence, in the handshake or after it | `Timeout` |
//! | an invariant of ours did not hold | `InternalError` |
//! | any other end of the connection | `Undefined`, with our error inside |
//! | the peer reset or stopped the stream | `StreamTerminated`, with its code |
//!
//! # Dropping
//!
//! A request stream that is dropped before it was finished is reset with `H3_REQUEST_CANCELLED`: a
//! message that ends early must not look whole. One that is dropped before it was read to its end
//! is stopped with `H3_NO_ERROR`, as RFC 9114, section 4.1, wants it of servers that do not need
//! the rest of a request.

mod connection;
mod datagrams;
mod error;
mod frames;
mod request;
mod section;
mod stream;

use crate::{driver, transport::StreamId};

pub use connection::{Connection, OpenStreams};
pub use datagrams::{DatagramReceiver, DatagramSender, send_datagram};
pub use request::{Content, Malformed, Resolved, check_fields, is_malformed, resolve};
pub use stream::{BidiStream, RecvStream, SendStream};

/// The application protocol of HTTP/3, for the TLS configuration.
///
/// <https://www.rfc-editor.org/rfc/rfc9114.html#section-3.1>
pub const ALPN: &[u8] = b"h3";

impl From<h3::quic::StreamId> for StreamId {
    fn from(id: h3::quic::StreamId) -> Self {
        Self::from_wire(id.into_inner())
    }
}

impl From<driver::Connection> for Connection {
    fn from(connection: driver::Connection) -> Self {
        Self::new(connection)
    }
}
