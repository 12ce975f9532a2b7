//! Sans-IO QUIC: what a load balancer, a server and a client need to know about packets, without
//! sockets, clocks or operating-system randomness inside.
//!
//! The crate refuses three things: to read the time (it arrives as an argument), to draw entropy
//! (a seed arrives at construction) and to perform input or output (packets arrive as slices and
//! leave as values). The same inputs and the same seed give the same bytes. Only the feature
//! `driver` adds a module that does all three, around the rest.
//!
//! # Map
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`invariants`] | what holds for every QUIC version (RFC 8999): form, version, connection IDs |
//! | [`header`] | long-header types of versions 1 and 2, and the packets coalesced in a datagram |
//! | [`varint`] | variable-length integers (RFC 9000, section 16) |
//! | [`connection_id`] | a connection ID as an owned value of at most 20 octets |
//! | [`retry`] | Retry packets of versions 1 and 2 |
//! | [`initial`] | Initial packets of versions 1 and 2, and the refusal of a connection by one |
//! | [`token`] | address tokens that a balancer mints and its servers honour |
//! | [`random`] | octets from a seed |
//! | [`bucket`] | how often something may be done that anybody can ask for |
//! | [`routable`] | routable connection IDs (QUIC-LB): encode, decode, generate |
//! | [`qpack`] | encoded field sections of HTTP/3, as far as they need no table |
//! | `wiped` | ciphers whose keys end with them |
#![cfg_attr(feature = "transport", doc = "| [`transport`] | endpoint and connections |")]
#![cfg_attr(feature = "driver", doc = "| [`driver`] | the transport on tokio and UDP sockets |")]
#![cfg_attr(
    feature = "h3",
    doc = "| [`h3`] | HTTP/3 on the driver, through the crate of that name |"
)]
#![cfg_attr(feature = "quinn", doc = "| [`adapters`] | routable connection IDs for other stacks |")]
#![forbid(unsafe_code)]
#![cfg_attr(
    test,
    allow(
        clippy::disallowed_methods,
        clippy::iter_over_hash_type,
        reason = "tests are their own shell"
    )
)]

#[cfg(feature = "quinn")]
pub mod adapters;
pub mod bucket;
pub mod connection_id;
#[cfg(feature = "driver")]
pub mod driver;
#[cfg(feature = "h3")]
pub mod h3;
pub mod header;
pub mod initial;
pub mod invariants;
pub mod qpack;
pub mod random;
pub mod retry;
pub mod routable;
pub mod token;
#[cfg(feature = "transport")]
pub mod transport;
pub mod varint;
mod wiped;

pub use connection_id::ConnectionId;
