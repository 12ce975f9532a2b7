//! Why connections end, in one word each, for metrics and reports.

use quic::transport::{ConnectionError, PeerClose};

/// The word for `error`.
#[must_use]
pub const fn word(error: &ConnectionError) -> &'static str {
    match error {
        ConnectionError::PeerClosed(PeerClose::Application { .. }) => "closed_by_peer",
        ConnectionError::PeerClosed(PeerClose::Transport { .. }) => "refused_by_peer",
        ConnectionError::ClosedLocally => "closed",
        ConnectionError::IdleTimeout => "idle_timeout",
        ConnectionError::HandshakeTimeout { .. } => "handshake_timeout",
        ConnectionError::Reset => "stateless_reset",
        ConnectionError::Tls { .. } => "tls",
        ConnectionError::Peer(_) => "peer_broke_protocol",
        ConnectionError::VersionMismatch(_) => "version",
        ConnectionError::Internal(_) => "internal",
    }
}

/// Whether one side has ended the connection on purpose and without an error: by code 0 of a
/// handle that was dropped, or by `H3_NO_ERROR`.
#[must_use]
pub fn is_wished(error: &ConnectionError) -> bool {
    match error {
        ConnectionError::ClosedLocally => true,
        ConnectionError::PeerClosed(PeerClose::Application { code, .. }) => {
            *code == 0 || *code == h3::error::Code::H3_NO_ERROR.value()
        }
        _ => false,
    }
}
