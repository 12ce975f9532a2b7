//! Errors, by whom they blame: the peer broke the rules ([`TransportError`]), our caller misused
//! us (the error types beside each call), or the connection is over ([`ConnectionError`]).

use std::{borrow::Cow, fmt};

use bytes::Bytes;

/// An error code of a CONNECTION_CLOSE frame of type 0x1c.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-20.1>
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Code(u64);

impl Code {
    /// The connection closes without an error.
    pub const NO_ERROR: Self = Self(0x0);
    /// The implementation cannot continue.
    pub const INTERNAL_ERROR: Self = Self(0x1);
    /// The server refuses the connection.
    pub const CONNECTION_REFUSED: Self = Self(0x2);
    /// More data than advertised limits allow.
    pub const FLOW_CONTROL_ERROR: Self = Self(0x3);
    /// A stream beyond the advertised limit.
    pub const STREAM_LIMIT_ERROR: Self = Self(0x4);
    /// A frame for a stream that its state does not permit.
    pub const STREAM_STATE_ERROR: Self = Self(0x5);
    /// A change of a stream's final size.
    pub const FINAL_SIZE_ERROR: Self = Self(0x6);
    /// A frame that cannot be read.
    pub const FRAME_ENCODING_ERROR: Self = Self(0x7);
    /// Transport parameters that cannot be read or are not permitted.
    pub const TRANSPORT_PARAMETER_ERROR: Self = Self(0x8);
    /// More connection IDs than advertised.
    pub const CONNECTION_ID_LIMIT_ERROR: Self = Self(0x9);
    /// A violation that no other code describes better.
    pub const PROTOCOL_VIOLATION: Self = Self(0xa);
    /// A client's token is not valid.
    pub const INVALID_TOKEN: Self = Self(0xb);
    /// The application closed during the handshake.
    pub const APPLICATION_ERROR: Self = Self(0xc);
    /// More CRYPTO data than can be buffered.
    pub const CRYPTO_BUFFER_EXCEEDED: Self = Self(0xd);
    /// A key update that was not allowed yet.
    pub const KEY_UPDATE_ERROR: Self = Self(0xe);
    /// The packets of a key have reached its limit.
    pub const AEAD_LIMIT_REACHED: Self = Self(0xf);
    /// No path can carry the connection.
    pub const NO_VIABLE_PATH: Self = Self(0x10);
    /// <https://www.rfc-editor.org/rfc/rfc9368.html#section-10.1>
    pub const VERSION_NEGOTIATION_ERROR: Self = Self(0x11);

    /// The code with this number on the wire.
    #[must_use]
    pub const fn from_wire(number: u64) -> Self {
        Self(number)
    }

    /// The code for a TLS alert.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9001.html#section-4.8>
    #[must_use]
    pub const fn crypto(alert: u8) -> Self {
        Self(0x100 | alert as u64)
    }

    /// The TLS alert inside, if this is a CRYPTO_ERROR.
    #[must_use]
    pub const fn alert(self) -> Option<u8> {
        if self.0 >> 8 == 1 { Some((self.0 & 0xff) as u8) } else { None }
    }

    /// The number on the wire.
    #[must_use]
    pub const fn to_wire(self) -> u64 {
        self.0
    }

    const fn name(self) -> Option<&'static str> {
        Some(match self.0 {
            0x0 => "NO_ERROR",
            0x1 => "INTERNAL_ERROR",
            0x2 => "CONNECTION_REFUSED",
            0x3 => "FLOW_CONTROL_ERROR",
            0x4 => "STREAM_LIMIT_ERROR",
            0x5 => "STREAM_STATE_ERROR",
            0x6 => "FINAL_SIZE_ERROR",
            0x7 => "FRAME_ENCODING_ERROR",
            0x8 => "TRANSPORT_PARAMETER_ERROR",
            0x9 => "CONNECTION_ID_LIMIT_ERROR",
            0xa => "PROTOCOL_VIOLATION",
            0xb => "INVALID_TOKEN",
            0xc => "APPLICATION_ERROR",
            0xd => "CRYPTO_BUFFER_EXCEEDED",
            0xe => "KEY_UPDATE_ERROR",
            0xf => "AEAD_LIMIT_REACHED",
            0x10 => "NO_VIABLE_PATH",
            0x11 => "VERSION_NEGOTIATION_ERROR",
            _ => return None,
        })
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.name(), self.alert()) {
            (Some(name), _) => f.write_str(name),
            (None, Some(alert)) => write!(f, "CRYPTO_ERROR, TLS alert {alert}"),
            (None, None) => write!(f, "error {:#x}", self.0),
        }
    }
}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Code({self})")
    }
}

/// The peer broke a rule, so the connection closes with this code.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {reason}")]
pub struct TransportError {
    /// What goes on the wire.
    pub code: Code,
    /// The type of the frame that broke the rule; 0 when unknown.
    pub frame_type: u64,
    /// For people.
    pub reason: Cow<'static, str>,
}

impl TransportError {
    pub(crate) fn new(code: Code, reason: impl Into<Cow<'static, str>>) -> Self {
        Self { code, frame_type: 0, reason: reason.into() }
    }

    pub(crate) fn protocol_violation(reason: &'static str) -> Self {
        Self::new(Code::PROTOCOL_VIOLATION, reason)
    }

    /// Names the frame, unless one is named already.
    pub(crate) fn in_frame(mut self, frame_type: u64) -> Self {
        if self.frame_type == 0 {
            self.frame_type = frame_type;
        }
        self
    }
}

/// What a CONNECTION_CLOSE frame from the peer said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerClose {
    /// Type 0x1c: the peer's transport closed.
    Transport {
        /// Why, as a number.
        code: Code,
        /// The frame it objected to; 0 when it named none.
        frame_type: u64,
        /// Why, in words. Not necessarily UTF-8.
        reason: Bytes,
    },
    /// Type 0x1d: the peer's application closed.
    Application {
        /// The application's own code.
        code: u64,
        /// Why, in words. Not necessarily UTF-8.
        reason: Bytes,
    },
}

impl fmt::Display for PeerClose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reason = match self {
            Self::Transport { code, reason, .. } => {
                write!(f, "{code}")?;
                reason
            }
            Self::Application { code, reason } => {
                write!(f, "application code {code}")?;
                reason
            }
        };
        if reason.is_empty() {
            return Ok(());
        }
        write!(f, ": {}", String::from_utf8_lossy(reason).escape_debug())
    }
}

/// Why a connection is over.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ConnectionError {
    /// The peer broke a rule and was told so.
    #[error("the peer broke the protocol: {0}")]
    Peer(TransportError),
    /// The TLS handshake failed on our side: a certificate, a key or the application protocol.
    #[error("the TLS handshake failed: {error}; {}", tls_advice(error))]
    Tls {
        /// What the TLS library says.
        error: rustls::Error,
        /// What the peer was told.
        code: Code,
    },
    /// The peer closed.
    #[error("closed by the peer: {0}")]
    PeerClosed(PeerClose),
    /// A stateless reset arrived: the peer has lost the connection's state.
    #[error("the peer has lost the connection (stateless reset)")]
    Reset,
    /// Nothing arrived for the idle timeout.
    #[error("nothing arrived within the idle timeout")]
    IdleTimeout,
    /// The handshake did not complete in time.
    #[error("the handshake did not complete in time: {}", handshake_advice(*.answered))]
    HandshakeTimeout {
        /// Whether anything authentic came from the peer.
        answered: bool,
    },
    /// The server speaks none of our versions.
    #[error("the server speaks none of our QUIC versions (it offers {0:x?})")]
    VersionMismatch(Vec<u32>),
    /// Our application closed it.
    #[error("closed by the application")]
    ClosedLocally,
    /// An invariant of this implementation did not hold.
    #[error("internal error: {0}")]
    Internal(&'static str),
}

/// What to do about a handshake that took too long.
const fn handshake_advice(answered: bool) -> &'static str {
    if answered {
        "the peer answers, but too much is lost or delayed on the way"
    } else {
        "nothing came from the peer; check its address and port, and that UDP passes"
    }
}

/// What to do about a TLS failure.
fn tls_advice(error: &rustls::Error) -> &'static str {
    match error {
        rustls::Error::InvalidCertificate(_) => {
            "check the peer's certificate chain, its names and dates, and our trust anchors"
        }
        rustls::Error::NoApplicationProtocol => {
            "configure an ALPN protocol that both sides have in common"
        }
        rustls::Error::NoCertificatesPresented => "the peer has to be given a certificate",
        rustls::Error::PeerIncompatible(_) => {
            "enable a cipher suite and a key exchange that both sides have in common"
        }
        _ => "see the TLS error",
    }
}
