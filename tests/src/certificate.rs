//! The certificate of a scenario: self-signed, made at start, trusted by its own clients alone.

use std::sync::Arc;

use anyhow::Context as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

/// The application protocol of all servers here.
pub const ALPN: &[u8] = b"quic-lb-echo";
/// The name in the certificate.
pub const SERVER_NAME: &str = "localhost";

/// A certificate and its key.
#[derive(Debug)]
pub struct Certificate {
    der: CertificateDer<'static>,
    key: PrivatePkcs8KeyDer<'static>,
}

impl Certificate {
    /// A new one.
    ///
    /// # Errors
    ///
    /// When no key can be made.
    pub fn new() -> anyhow::Result<Self> {
        let made = rcgen::generate_simple_self_signed([SERVER_NAME.to_owned()])?;
        Ok(Self { der: made.cert.into(), key: made.signing_key.serialize_der().into() })
    }

    /// What a client has to know of it.
    #[must_use]
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// The TLS side of a server.
    ///
    /// # Errors
    ///
    /// When rustls does not like the certificate.
    pub fn server(&self) -> anyhow::Result<quinn::crypto::rustls::QuicServerConfig> {
        let key = PrivateKeyDer::Pkcs8(self.key.clone_key());
        let mut tls = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_single_cert(vec![self.der.clone()], key)?;
        tls.alpn_protocols = vec![ALPN.to_vec()];
        Ok(tls.try_into()?)
    }
}

/// The TLS side of a client that trusts the certificate `der` and no other.
///
/// # Errors
///
/// When `der` is not a certificate.
pub fn client(der: &[u8]) -> anyhow::Result<quinn::crypto::rustls::QuicClientConfig> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from(der.to_vec())).context("the server's certificate")?;
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![ALPN.to_vec()];
    Ok(tls.try_into()?)
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}
