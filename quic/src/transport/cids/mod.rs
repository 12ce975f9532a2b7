//! Connection IDs of one connection: those we gave out ([`Local`]) and those the peer gave us
//! ([`Remote`]), each with its bounds.
//!
//! <https://www.rfc-editor.org/rfc/rfc9000.html#section-5.1>

mod local;
mod remote;

pub(crate) use local::Local;
pub(crate) use remote::Remote;

/// Connection IDs we let the peer have in use for us to send to: our active_connection_id_limit.
pub(crate) const ACTIVE_LIMIT: u64 = 4;
