//! Certificates of origins, from files or made at start, and what clients trust.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use quic::transport::AnyCertificate;
use quic_lb_config::system_error::reason;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject as _},
};

/// A certificate chain and the key of its first certificate.
#[derive(Debug)]
pub struct Certificate {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    /// Where it was made here.
    pem: Option<String>,
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// A file does not hold what it should.
    #[error("{} does not hold {wanted}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is looked for.
        wanted: &'static str,
        /// Why it is not there.
        reason: String,
    },
    /// One could not be made.
    #[error("no certificate could be made: {0}")]
    Make(#[from] rcgen::Error),
    /// The TLS library does not like it.
    #[error("the certificate is of no use: {0}")]
    Tls(#[from] rustls::Error),
}

impl Certificate {
    /// A self-signed one for `names`, made now.
    ///
    /// # Errors
    ///
    /// When a name is not one, or there is no randomness.
    pub fn make(names: impl IntoIterator<Item = String>) -> Result<Self, CertificateError> {
        let names: Vec<_> = names.into_iter().collect();
        let made = rcgen::generate_simple_self_signed(names)?;
        let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
        let pem = Some(made.cert.pem());
        Ok(Self { chain: vec![made.cert.into()], key: key.into(), pem })
    }

    /// The chain and the key of two PEM files.
    ///
    /// # Errors
    ///
    /// When they do not hold them.
    pub fn read(chain: &Path, key: &Path) -> Result<Self, CertificateError> {
        let read = |path: &Path, wanted| {
            let file = |reason| CertificateError::File { path: path.to_owned(), wanted, reason };
            fs::read(path).map_err(move |error| file(reason(&error)))
        };
        let found = "a chain of certificates in PEM";
        let certificates = CertificateDer::pem_slice_iter(&read(chain, found)?)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| error.to_string())
            .and_then(
                |found| if found.is_empty() { Err("none is there".into()) } else { Ok(found) },
            )
            .map_err(|reason| {
                let path = chain.to_owned();
                CertificateError::File { path, wanted: found, reason }
            })?;
        let wanted = "a private key in PEM";
        let private = PrivateKeyDer::from_pem_slice(&read(key, wanted)?).map_err(|error| {
            CertificateError::File { path: key.to_owned(), wanted, reason: error.to_string() }
        })?;
        Ok(Self { chain: certificates, key: private, pem: None })
    }

    /// The chain, for those who are to trust it.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The certificate as PEM, if it was made here.
    #[must_use]
    pub fn made_pem(&self) -> Option<&str> {
        self.pem.as_deref()
    }

    /// TLS 1.3 for servers that offer `protocols`.
    ///
    /// # Errors
    ///
    /// When key and certificate do not belong together.
    pub fn server(&self, protocols: &[&[u8]]) -> Result<ServerConfig, CertificateError> {
        let mut tls = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_single_cert(self.chain.clone(), self.key.clone_key())?;
        tls.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(tls)
    }
}

/// Whom clients trust.
#[derive(Clone, Debug)]
pub enum Trust {
    /// Servers whose chain leads to one of these.
    Roots(Vec<CertificateDer<'static>>),
    /// Everybody; for tests of servers whose certificate was made at start.
    Everybody,
}

impl Trust {
    /// The certificates of a PEM file.
    ///
    /// # Errors
    ///
    /// When it does not hold any.
    pub fn read(path: &Path) -> Result<Self, CertificateError> {
        let failed = |reason| CertificateError::File {
            path: path.to_owned(),
            wanted: "certificates in PEM",
            reason,
        };
        let octets = fs::read(path).map_err(|error| failed(reason(&error)))?;
        let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&octets).collect();
        match found {
            Ok(found) if found.is_empty() => Err(failed("none is there".into())),
            Ok(found) => Ok(Self::Roots(found)),
            Err(error) => Err(failed(error.to_string())),
        }
    }

    /// TLS 1.3 for clients that ask for `protocols`.
    ///
    /// # Errors
    ///
    /// When a certificate is of no use.
    pub fn client(&self, protocols: &[&[u8]]) -> Result<ClientConfig, CertificateError> {
        let provider = provider();
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?;
        let mut tls = match self {
            Self::Roots(certificates) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates {
                    roots.add(certificate.clone())?;
                }
                builder.with_root_certificates(roots).with_no_client_auth()
            }
            Self::Everybody => builder
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(AnyCertificate::new(&provider)))
                .with_no_client_auth(),
        };
        tls.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Ok(tls)
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}
