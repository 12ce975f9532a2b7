//! The one file that touches `rustls::quic`: a TLS session without levels or timers, and the keys
//! it yields. A newer rustls, or another TLS library, changes this file alone.

use std::sync::Arc;

pub(crate) use rustls::quic::{
    DirectionalKeys, HeaderProtectionKey, KeyChange, Keys, PacketKey, PacketKeySet, Secrets,
};
use rustls::{
    CipherSuite, HandshakeKind, Side as TlsSide,
    crypto::{aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256, tls13::OkmBlock},
    pki_types::{CertificateDer, ServerName},
    quic::{self, Connection, Suite},
};

use super::{
    error::{Code, ConnectionError, TransportError},
    stream_id::Side,
};
use crate::{connection_id::ConnectionId, header::Version};

/// Octets that sealing adds to a payload, for every cipher suite in use.
pub(crate) const TAG_LEN: usize = 16;
/// Octets of a header-protection sample.
pub(crate) const SAMPLE_LEN: usize = 16;

/// `unexpected_message` of TLS.
const ALERT_UNEXPECTED_MESSAGE: u8 = 10;
/// `internal_error` of TLS, for failures that name no alert of their own.
const ALERT_INTERNAL_ERROR: u8 = 80;

/// A handshake in progress, or what is left of it.
pub(crate) struct Session {
    state: State,
}

enum State {
    Live(Box<Connection>),
    Over(Negotiated),
}

/// What stays known of a session when it is gone.
struct Negotiated {
    side: Side,
    alpn: Option<Box<[u8]>>,
    server_name: Option<Box<str>>,
    certificates: Option<Box<[CertificateDer<'static>]>>,
    suite: Option<CipherSuite>,
    resumed: bool,
    /// Octets that are still to come of a message that nobody reads.
    skip: usize,
}

impl Session {
    pub(crate) fn client(
        config: Arc<rustls::ClientConfig>,
        version: Version,
        name: ServerName<'static>,
        parameters: Vec<u8>,
    ) -> Result<Self, rustls::Error> {
        let inner = quic::ClientConnection::new(config, wire_version(version), name, parameters)?;
        Ok(Self { state: State::Live(Box::new(Connection::Client(inner))) })
    }

    pub(crate) fn server(
        config: Arc<rustls::ServerConfig>,
        version: Version,
        parameters: Vec<u8>,
    ) -> Result<Self, rustls::Error> {
        let inner = quic::ServerConnection::new(config, wire_version(version), parameters)?;
        Ok(Self { state: State::Live(Box::new(Connection::Server(inner))) })
    }

    /// Gives up the session after its handshake: only what the application may ask for stays, and
    /// that takes a tenth of the memory. Messages after it are not read any more.
    pub(crate) fn release(&mut self) {
        let State::Live(inner) = &self.state else { return };
        let (side, server_name) = match &**inner {
            Connection::Client(_) => (Side::Client, None),
            Connection::Server(server) => (Side::Server, server.server_name()),
        };
        self.state = State::Over(Negotiated {
            side,
            alpn: inner.alpn_protocol().map(Box::from),
            server_name: server_name.map(Box::from),
            certificates: inner.peer_certificates().map(Box::from),
            suite: inner.negotiated_cipher_suite().map(|suite| suite.suite()),
            resumed: inner.handshake_kind() == Some(HandshakeKind::Resumed),
            skip: 0,
        });
    }

    /// Takes CRYPTO data, in order; returns how much of it.
    pub(crate) fn read(&mut self, data: &[u8]) -> Result<usize, ConnectionError> {
        match &mut self.state {
            State::Live(inner) => match inner.read_hs(data) {
                Ok(()) => Ok(data.len()),
                Err(error) => {
                    let alert = inner.alert().map_or(ALERT_INTERNAL_ERROR, u8::from);
                    Err(ConnectionError::Tls { error, code: Code::crypto(alert) })
                }
            },
            State::Over(outcome) => outcome.skip(data),
        }
    }

    /// Appends CRYPTO data of the current level; data after a key change belongs to the next one.
    pub(crate) fn write(&mut self, out: &mut Vec<u8>) -> Option<KeyChange> {
        match &mut self.state {
            State::Live(inner) => inner.write_hs(out),
            State::Over(_) => None,
        }
    }

    pub(crate) fn is_handshaking(&self) -> bool {
        matches!(&self.state, State::Live(inner) if inner.is_handshaking())
    }

    /// The peer's transport parameters, once they have arrived. Authentic after the handshake.
    pub(crate) fn peer_parameters(&self) -> Option<&[u8]> {
        match &self.state {
            State::Live(inner) => inner.quic_transport_parameters(),
            State::Over(_) => None,
        }
    }

    pub(crate) fn alpn(&self) -> Option<&[u8]> {
        match &self.state {
            State::Live(inner) => inner.alpn_protocol(),
            State::Over(outcome) => outcome.alpn.as_deref(),
        }
    }

    pub(crate) fn is_resumed(&self) -> bool {
        match &self.state {
            State::Live(inner) => inner.handshake_kind() == Some(HandshakeKind::Resumed),
            State::Over(outcome) => outcome.resumed,
        }
    }

    pub(crate) fn peer_certificates(&self) -> Option<&[CertificateDer<'static>]> {
        match &self.state {
            State::Live(inner) => inner.peer_certificates(),
            State::Over(outcome) => outcome.certificates.as_deref(),
        }
    }

    pub(crate) fn server_name(&self) -> Option<&str> {
        match &self.state {
            State::Live(inner) => match &**inner {
                Connection::Client(_) => None,
                Connection::Server(server) => server.server_name(),
            },
            State::Over(outcome) => outcome.server_name.as_deref(),
        }
    }

    pub(crate) fn cipher_suite(&self) -> Option<CipherSuite> {
        match &self.state {
            State::Live(inner) => inner.negotiated_cipher_suite().map(|suite| suite.suite()),
            State::Over(outcome) => outcome.suite,
        }
    }

    pub(crate) fn export(
        &self,
        out: &mut [u8],
        label: &[u8],
        context: Option<&[u8]>,
    ) -> Result<(), rustls::Error> {
        match &self.state {
            State::Live(inner) => inner.export_keying_material(out, label, context).map(|_| ()),
            State::Over(_) => Err(rustls::Error::General(
                "the TLS session was not kept; see TransportConfig::keep_tls_session".into(),
            )),
        }
    }
}

impl Negotiated {
    /// Steps over messages that come after the handshake. A client may get tickets, which it has no
    /// more use for; whatever else comes is an error.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9001.html#section-6>: "Endpoints MUST treat the receipt of
    /// a TLS KeyUpdate message as a connection error of type 0x010a"; likewise section 4.4 for
    /// client authentication.
    fn skip(&mut self, data: &[u8]) -> Result<usize, ConnectionError> {
        const NEW_SESSION_TICKET: u8 = 4;
        if self.skip > 0 {
            let count = self.skip.min(data.len());
            self.skip -= count;
            return Ok(count);
        }
        let ticket = self.side.is_client() && data.first() == Some(&NEW_SESSION_TICKET);
        if !ticket {
            return Err(ConnectionError::Peer(TransportError::new(
                Code::crypto(ALERT_UNEXPECTED_MESSAGE),
                "a TLS message that may not come after the handshake",
            )));
        }
        // Type and length; until all four octets are there, nothing is taken.
        let Some((&[_, high, middle, low], _)) = data.split_first_chunk::<4>() else {
            return Ok(0);
        };
        let len = usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low);
        self.skip = 4 + len;
        self.skip(data)
    }
}

/// The keys of Initial packets.
///
/// <https://www.rfc-editor.org/rfc/rfc9001.html#section-5.2>
pub(crate) fn initial_keys(version: Version, client_dcid: &ConnectionId, side: Side) -> Keys {
    let side = match side {
        Side::Client => TlsSide::Client,
        Side::Server => TlsSide::Server,
    };
    initial_suite().keys(client_dcid, side, wire_version(version))
}

/// HMAC-SHA256, the keyed function behind stateless-reset tokens.
pub(crate) fn hmac_sha256(key: &[u8; 32], message: &[u8]) -> [u8; 32] {
    let tag = initial_suite().suite.hkdf_provider.hmac_sign(&OkmBlock::new(key), message);
    tag.as_ref().try_into().expect("SHA-256 gives 32 octets")
}

/// Initial packets use AES-128-GCM with SHA-256, whatever is negotiated later.
fn initial_suite() -> Suite {
    TLS13_AES_128_GCM_SHA256
        .tls13()
        .and_then(|suite| suite.quic_suite())
        .expect("this suite of TLS 1.3 serves QUIC")
}

fn wire_version(version: Version) -> quic::Version {
    match version {
        Version::V1 => quic::Version::V1,
        Version::V2 => quic::Version::V2,
    }
}
