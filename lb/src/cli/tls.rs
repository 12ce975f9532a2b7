//! TLS to a balancer that wants a certificate to be shown.

use std::{fs, io, path::Path, sync::Arc};

use tokio::net::TcpStream;
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::aws_lc_rs,
        pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
    },
};
use zeroize::Zeroizing;

use super::{args::AdminPlace, args::TlsArgs, outcome::Failure};

/// How TLS is spoken.
#[derive(Clone)]
pub(super) struct Tls(Arc<ClientConfig>);

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tls")
    }
}

impl Tls {
    /// With the files that are given, if there are any.
    pub(super) fn meant(args: &TlsArgs) -> Result<Option<Self>, Failure> {
        let TlsArgs { ca_file: Some(ca), cert_file, key_file } = args else { return Ok(None) };
        let (ca_pem, mut roots) = (read(ca)?, RootCertStore::empty());
        for certificate in CertificateDer::pem_slice_iter(&ca_pem) {
            let added = certificate.map_err(|error| error.to_string());
            let added = added.and_then(|of| roots.add(of).map_err(|error| error.to_string()));
            added.map_err(|error| cannot(ca, error))?;
        }
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider);
        let builder = builder.with_safe_default_protocol_versions();
        let builder = builder.map_err(Failure::other)?.with_root_certificates(roots);
        let config = match (cert_file, key_file) {
            (Some(cert), Some(key)) => {
                let (chain, pem) = (read(cert)?, read(key)?);
                let chain = CertificateDer::pem_slice_iter(&chain).collect::<Result<Vec<_>, _>>();
                let chain = chain.map_err(|error| cannot(cert, error))?;
                let private = PrivateKeyDer::from_pem_slice(&pem);
                let private = private.map_err(|error| cannot(key, error))?;
                let config = builder.with_client_auth_cert(chain, private);
                config.map_err(|error| cannot(cert, error))?
            }
            _ => builder.with_no_client_auth(),
        };
        Ok(Some(Self(Arc::new(config))))
    }

    /// Speaks it to the balancer at `place`, whose certificate carries its name or address.
    pub(super) async fn connect(
        &self,
        place: &AdminPlace,
        stream: TcpStream,
    ) -> io::Result<TlsStream<TcpStream>> {
        let name = match place {
            AdminPlace::Address(address) => ServerName::from(address.ip()),
            AdminPlace::Name(name) => {
                let (host, _) = name.split_once(':').unwrap_or((name, ""));
                ServerName::try_from(host.to_owned()).map_err(io::Error::other)?
            }
            AdminPlace::Unix(_) => return Err(io::ErrorKind::Unsupported.into()),
        };
        TlsConnector::from(Arc::clone(&self.0)).connect(name, stream).await
    }
}

fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, Failure> {
    fs::read(path).map(Zeroizing::new).map_err(|error| cannot(path, error))
}

fn cannot(path: &Path, error: impl std::fmt::Display) -> Failure {
    Failure::other(format_args!("{}: {error}", path.display()))
}
