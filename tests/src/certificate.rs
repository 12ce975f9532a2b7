//! The certificate of a scenario: self-signed, made at start, trusted by its own clients alone.

use std::sync::Arc;

use anyhow::Context as _;
use rustls::{
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
};

/// The application protocol of all servers here.
pub const ALPN: &[u8] = b"quic-lb-echo";
/// The name in the certificate.
pub const SERVER_NAME: &str = "localhost";

/// A certificate and its key.
#[derive(Debug)]
pub struct Certificate {
    der: CertificateDer<'static>,
    key: PrivatePkcs8KeyDer<'static>,
    pem: (String, String),
}

impl Certificate {
    /// A new one.
    ///
    /// # Errors
    ///
    /// When no key can be made.
    pub fn new() -> anyhow::Result<Self> {
        let made = rcgen::generate_simple_self_signed([SERVER_NAME.to_owned()])?;
        let pem = (made.cert.pem(), made.signing_key.serialize_pem());
        Ok(Self { der: made.cert.into(), key: made.signing_key.serialize_der().into(), pem })
    }

    /// What a client has to know of it.
    #[must_use]
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// Certificate and key as PEM.
    #[must_use]
    pub const fn pem(&self) -> (&str, &str) {
        (self.pem.0.as_str(), self.pem.1.as_str())
    }

    /// The TLS side of a server on quinn.
    ///
    /// # Errors
    ///
    /// When rustls does not like the certificate.
    pub fn server(&self) -> anyhow::Result<quinn::crypto::rustls::QuicServerConfig> {
        Ok(self.server_tls(provider())?.try_into()?)
    }

    /// The TLS side of a server with the cipher suites of `provider`.
    ///
    /// # Errors
    ///
    /// When rustls does not like the certificate.
    pub fn server_tls(&self, provider: CryptoProvider) -> anyhow::Result<rustls::ServerConfig> {
        let key = PrivateKeyDer::Pkcs8(self.key.clone_key());
        let mut tls = rustls::ServerConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_single_cert(vec![self.der.clone()], key)?;
        tls.alpn_protocols = vec![ALPN.to_vec()];
        Ok(tls)
    }
}

/// The TLS side of a quinn client that trusts the certificate `der` and no other.
///
/// # Errors
///
/// When `der` is not a certificate.
pub fn client(der: &[u8]) -> anyhow::Result<quinn::crypto::rustls::QuicClientConfig> {
    Ok(client_tls(der, provider())?.try_into()?)
}

/// The TLS side of a client with the cipher suites of `provider` that trusts the certificate `der`
/// and no other.
///
/// # Errors
///
/// When `der` is not a certificate.
pub fn client_tls(der: &[u8], provider: CryptoProvider) -> anyhow::Result<rustls::ClientConfig> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from(der.to_vec())).context("the server's certificate")?;
    let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![ALPN.to_vec()];
    Ok(tls)
}

/// All cipher suites.
#[must_use]
pub fn provider() -> CryptoProvider {
    rustls::crypto::aws_lc_rs::default_provider()
}

/// One cipher suite for what is sent after the handshake, besides the one that QUIC itself needs
/// for Initials: a provider without that cannot be used for QUIC.
#[must_use]
pub fn provider_with(suite: rustls::CipherSuite) -> CryptoProvider {
    let mut provider = provider();
    provider.cipher_suites.retain(|each| each.suite() == suite);
    provider
}
