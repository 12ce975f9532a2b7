//! TLS for simulations: certificates made once, and a provider whose randomness is seeded, so that
//! the same seed gives the same octets on the wire.
//!
//! The key exchange here is a toy: it has the sizes of the default one (X25519MLKEM768), so that
//! ClientHellos span two datagrams, and no secrets at all.

use std::sync::{Arc, Mutex, OnceLock};

use rustls::{
    NamedGroup, SupportedCipherSuite,
    crypto::{
        ActiveKeyExchange, CryptoProvider, GetRandomFailed, SecureRandom, SharedSecret,
        SupportedKxGroup, aws_lc_rs,
    },
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
};
use sha2::{Digest as _, Sha256};

use super::rng::Rng;

/// The application protocol of simulations.
pub const ALPN: &[u8] = b"hq-sim";
/// The name in the certificates.
pub const SERVER_NAME: &str = "server.test";

/// How large the server's certificate is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CertificateSize {
    /// Some hundred octets.
    Small,
    /// More than three times a client's first flight.
    Large,
}

/// A certificate and its key.
#[derive(Debug)]
struct Certificate {
    der: CertificateDer<'static>,
    key: PrivatePkcs8KeyDer<'static>,
}

fn certificate(size: CertificateSize) -> &'static Certificate {
    static SMALL: OnceLock<Certificate> = OnceLock::new();
    static LARGE: OnceLock<Certificate> = OnceLock::new();
    let (cell, names) = match size {
        CertificateSize::Small => (&SMALL, 0),
        CertificateSize::Large => (&LARGE, 160),
    };
    cell.get_or_init(|| {
        let mut all = vec![SERVER_NAME.to_owned()];
        all.extend((0..names).map(|name| format!("{name:04}.a-name-that-takes-room.server.test")));
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).expect("an Ed25519 key");
        let mut params = rcgen::CertificateParams::new(all).expect("DNS names");
        params.serial_number = Some(vec![1; 8].into());
        let made = params.self_signed(&key).expect("a certificate");
        Certificate { der: made.into(), key: key.serialize_der().into() }
    })
}

/// A server's TLS.
#[must_use]
pub fn server(seed: u64, size: CertificateSize) -> Arc<rustls::ServerConfig> {
    let certificate = certificate(size);
    let key = PrivateKeyDer::Pkcs8(certificate.key.clone_key());
    let mut tls = rustls::ServerConfig::builder_with_provider(provider(seed, None))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der.clone()], key)
        .expect("a certificate with its key");
    tls.alpn_protocols = vec![ALPN.to_vec()];
    Arc::new(tls)
}

/// A client's TLS, with one cipher suite or all.
#[must_use]
pub fn client(
    seed: u64,
    size: CertificateSize,
    suite: Option<SupportedCipherSuite>,
) -> Arc<rustls::ClientConfig> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate(size).der.clone()).expect("a certificate");
    let mut tls = rustls::ClientConfig::builder_with_provider(provider(seed, suite))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![ALPN.to_vec()];
    Arc::new(tls)
}

fn provider(seed: u64, suite: Option<SupportedCipherSuite>) -> Arc<CryptoProvider> {
    // Providers want references that live forever; a simulation is small and few are run.
    let random: &'static Seeded = Box::leak(Box::new(Seeded(Mutex::new(Rng::new(seed)))));
    let group: &'static Toy = Box::leak(Box::new(Toy(random)));
    let mut provider = aws_lc_rs::default_provider();
    provider.secure_random = random;
    provider.kx_groups = vec![group];
    if let Some(suite) = suite {
        provider.cipher_suites = vec![suite];
    }
    Arc::new(provider)
}

#[derive(Debug)]
struct Seeded(Mutex<Rng>);

impl SecureRandom for Seeded {
    fn fill(&self, out: &mut [u8]) -> Result<(), GetRandomFailed> {
        self.0.lock().map_err(|_| GetRandomFailed)?.fill(out);
        Ok(())
    }
}

/// Octets of a client's share of X25519MLKEM768.
const SHARE: usize = 1216;

#[derive(Debug)]
struct Toy(&'static Seeded);

impl SupportedKxGroup for Toy {
    fn start(&self) -> Result<Box<dyn ActiveKeyExchange>, rustls::Error> {
        let mut share = vec![0; SHARE];
        self.0.fill(&mut share)?;
        Ok(Box::new(ToyExchange(share)))
    }

    fn name(&self) -> NamedGroup {
        NamedGroup::X25519MLKEM768
    }
}

struct ToyExchange(Vec<u8>);

impl ActiveKeyExchange for ToyExchange {
    fn complete(self: Box<Self>, peer: &[u8]) -> Result<SharedSecret, rustls::Error> {
        let both: Vec<u8> = self.0.iter().zip(peer).map(|(ours, theirs)| ours ^ theirs).collect();
        Ok(SharedSecret::from(&Sha256::digest(both)[..]))
    }

    fn pub_key(&self) -> &[u8] {
        &self.0
    }

    fn group(&self) -> NamedGroup {
        NamedGroup::X25519MLKEM768
    }
}
