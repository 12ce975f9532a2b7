//! Real servers of QUIC, on our own stack.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::Response;
use quic::{
    driver::{Cids, Connection, Endpoint, Options},
    routable::{CidConfig, ConfigId, Key, ServerId},
    transport::{ResetKey, ServerConfig},
};
use rustls::pki_types::PrivatePkcs8KeyDer;
use tokio::runtime::Runtime;

/// A certificate, and who trusts it.
pub(crate) struct Certificate(rcgen::CertifiedKey<rcgen::KeyPair>);

impl Certificate {
    /// A self-signed one.
    pub(crate) fn new(name: &str) -> Self {
        Self(rcgen::generate_simple_self_signed([name.to_owned()]).unwrap())
    }

    pub(crate) fn pem(&self) -> String {
        self.0.cert.pem()
    }

    fn server(&self, alpn: &str) -> rustls::ServerConfig {
        let key = PrivatePkcs8KeyDer::from(self.0.signing_key.serialize_der());
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let mut tls = rustls::ServerConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![self.0.cert.der().clone()], key.into())
            .unwrap();
        tls.alpn_protocols = vec![alpn.as_bytes().to_vec()];
        tls
    }
}

/// What a server's application does with a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Application {
    Keeps,
    /// Closes it at once, with a code of its own.
    Closes,
    /// Answers each request over HTTP/3 with a status, which is 200 at first.
    Answers,
}

/// A server. Lives until dropped.
pub(crate) struct Origin {
    status: Arc<AtomicU16>,
    endpoint: Endpoint,
    runtime: Option<Runtime>,
}

impl Origin {
    pub(crate) fn start(
        address: SocketAddr,
        certificate: &Certificate,
        alpn: &str,
        cids: Cids,
        application: Application,
    ) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let server = ServerConfig::new(Arc::new(certificate.server(alpn)));
        let options = Options { cids, ..Options::server(server, address) };
        let endpoint = runtime.block_on(async { Endpoint::new(options).unwrap() });
        let (accepting, status) = (endpoint.clone(), Arc::new(AtomicU16::new(200)));
        let answered = Arc::clone(&status);
        runtime.spawn(async move {
            while let Some(incoming) = accepting.accept().await {
                let Ok(connection) = incoming.await else { continue };
                match application {
                    Application::Closes => connection.close(7, b"nothing to say"),
                    Application::Keeps => {}
                    Application::Answers => {
                        tokio::spawn(answer(connection.clone(), Arc::clone(&answered)));
                    }
                }
                tokio::spawn(async move { connection.closed().await });
            }
        });
        Self { status, endpoint, runtime: Some(runtime) }
    }

    /// Answers with this status from now on.
    pub(crate) fn set_status(&self, status: u16) {
        self.status.store(status, Ordering::SeqCst);
    }

    /// Goes on with other connection IDs.
    pub(crate) fn set_cids(&self, cids: Cids) {
        let _entered = self.runtime.as_ref().map(Runtime::enter);
        self.endpoint.set_cid_config(cids).unwrap();
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Whoever comes next may want its port.
            runtime.shutdown_timeout(Duration::from_secs(10));
        }
    }
}

/// Answers requests for `/health` until the connection ends, others not at all.
async fn answer(connection: Connection, status: Arc<AtomicU16>) {
    let transport = quic::h3::Connection::from(connection);
    let Ok(mut http) = h3::server::Connection::<_, Bytes>::new(transport).await else { return };
    while let Ok(Some(resolver)) = http.accept().await {
        let Ok((request, mut stream)) = resolver.resolve_request().await else { continue };
        if request.uri().path() == "/health" && request.uri().host() == Some("origin.test") {
            let answer =
                Response::builder().status(status.load(Ordering::SeqCst)).body(()).unwrap();
            let _ = stream.send_response(answer).await;
            let _ = stream.send_data(Bytes::from_static(b"well\n")).await;
            let _ = stream.finish().await;
        }
    }
}

/// Connection IDs of the backend whose server ID has this last octet, as the balancer is configured to read
/// them.
pub(crate) fn routable(server_id: u8) -> Cids {
    routable_by(0, server_id)
}

/// The same by another config ID, whose configuration differs in nothing else.
pub(crate) fn routable_by(config_id: u8, server_id: u8) -> Cids {
    let key = super::KEY.as_bytes();
    let octet = |at: usize| {
        let digits = std::str::from_utf8(&key[2 * at..2 * at + 2]).unwrap();
        u8::from_str_radix(digits, 16).unwrap()
    };
    let key = Key::new(std::array::from_fn(octet));
    let config = CidConfig::new(ConfigId::new(config_id).unwrap(), 2, 6, Some(&key)).unwrap();
    let server_id = ServerId::new(&[0, server_id]).unwrap();
    Cids::Routable { config, server_id, reset_key: ResetKey::new([server_id.as_slice()[1]; 32]) }
}

/// Writes `certificate` where the configuration in this folder looks for it.
pub(crate) fn trust(folder: &Path, certificate: &Certificate) {
    let new = folder.join("ca.pem.new");
    std::fs::write(&new, certificate.pem()).unwrap();
    std::fs::rename(new, folder.join("ca.pem")).unwrap();
}
