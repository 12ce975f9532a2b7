//! The one file that touches `rustls::quic`: a TLS session without levels or timers, and the keys
//! it yields. A newer rustls, or another TLS library, changes this file alone.

use std::sync::Arc;

pub(crate) use rustls::quic::{
    DirectionalKeys, HeaderProtectionKey, KeyChange, Keys, PacketKey, PacketKeySet, Secrets,
};
use rustls::{
    HandshakeKind, Side as TlsSide,
    crypto::{aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256, tls13::OkmBlock},
    pki_types::{CertificateDer, ServerName},
    quic::{self, Connection, Suite},
};

use super::{
    error::{Code, ConnectionError},
    stream_id::Side,
};
use crate::{ConnectionId, header::Version};

/// Octets that sealing adds to a payload, for every cipher suite in use.
pub(crate) const TAG_LEN: usize = 16;
/// Octets of a header-protection sample.
pub(crate) const SAMPLE_LEN: usize = 16;

/// `internal_error` of TLS, for failures that name no alert of their own.
const ALERT_INTERNAL_ERROR: u8 = 80;

/// A handshake in progress or done.
pub(crate) struct Session {
    inner: Connection,
}

impl Session {
    pub(crate) fn client(
        config: Arc<rustls::ClientConfig>,
        version: Version,
        name: ServerName<'static>,
        parameters: Vec<u8>,
    ) -> Result<Self, rustls::Error> {
        let inner = quic::ClientConnection::new(config, wire_version(version), name, parameters)?;
        Ok(Self { inner: Connection::Client(inner) })
    }

    pub(crate) fn server(
        config: Arc<rustls::ServerConfig>,
        version: Version,
        parameters: Vec<u8>,
    ) -> Result<Self, rustls::Error> {
        let inner = quic::ServerConnection::new(config, wire_version(version), parameters)?;
        Ok(Self { inner: Connection::Server(inner) })
    }

    /// Takes CRYPTO data, in order.
    pub(crate) fn read(&mut self, data: &[u8]) -> Result<(), ConnectionError> {
        self.inner.read_hs(data).map_err(|error| {
            let alert = self.inner.alert().map_or(ALERT_INTERNAL_ERROR, u8::from);
            ConnectionError::Tls { error, code: Code::crypto(alert) }
        })
    }

    /// Appends CRYPTO data of the current level; data after a key change belongs to the next one.
    pub(crate) fn write(&mut self, out: &mut Vec<u8>) -> Option<KeyChange> {
        self.inner.write_hs(out)
    }

    pub(crate) fn is_handshaking(&self) -> bool {
        self.inner.is_handshaking()
    }

    /// The peer's transport parameters, once they have arrived. Authentic after the handshake.
    pub(crate) fn peer_parameters(&self) -> Option<&[u8]> {
        self.inner.quic_transport_parameters()
    }

    pub(crate) fn alpn(&self) -> Option<&[u8]> {
        self.inner.alpn_protocol()
    }

    pub(crate) fn is_resumed(&self) -> bool {
        self.inner.handshake_kind() == Some(HandshakeKind::Resumed)
    }

    pub(crate) fn peer_certificates(&self) -> Option<&[CertificateDer<'static>]> {
        self.inner.peer_certificates()
    }

    pub(crate) fn server_name(&self) -> Option<&str> {
        match &self.inner {
            Connection::Client(_) => None,
            Connection::Server(server) => server.server_name(),
        }
    }

    pub(crate) fn cipher_suite(&self) -> Option<rustls::CipherSuite> {
        self.inner.negotiated_cipher_suite().map(|suite| suite.suite())
    }

    pub(crate) fn export(
        &self,
        out: &mut [u8],
        label: &[u8],
        context: Option<&[u8]>,
    ) -> Result<(), rustls::Error> {
        self.inner.export_keying_material(out, label, context).map(|_| ())
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
