//! The files by which a server shows who it is, and knows its clients.

use std::sync::Arc;

use rustls::{
    RootCertStore, ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use super::health::trust_anchors;
use crate::{
    checked::ServerTls, file, leaf::Text, mistake::Mistakes, read::At, surroundings::Surroundings,
    system_error::reason, yaml::shown,
};

/// A chain of certificates has some kilobytes.
const MAX_OCTETS: u64 = 1 << 20;

/// What the admin interface speaks.
const ALPN: &[u8] = b"http/1.1";

/// `None` when one of the files is of no use.
pub(super) fn server_tls(
    [cert_file, key_file, client_ca_file]: [&At<Text>; 3],
    surroundings: &Surroundings<'_>,
    mistakes: &mut Mistakes,
) -> Option<ServerTls> {
    let chain = content(cert_file, "a chain of certificates in PEM", surroundings, mistakes);
    let key = content(key_file, "a private key in PEM", surroundings, mistakes);
    let anchors = trust_anchors(client_ca_file, surroundings, mistakes);
    let (chain, key, anchors) = (chain?, key?, anchors?);
    let mut hash = Sha256::new();
    for content in [&*chain, &*key] {
        hash.update((content.len() as u64).to_be_bytes());
        hash.update(&**content);
    }
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&chain).collect();
    let Some(certificates) = certificates.ok().filter(|all| !all.is_empty()) else {
        let found = format!("\"{}\", which has no certificates", shown(&cert_file.value.0));
        mistakes.error(&cert_file.place, found, "a chain of certificates in PEM");
        return None;
    };
    let Ok(key) = PrivateKeyDer::from_pem_slice(&key) else {
        let found = format!("\"{}\", which has no private key", shown(&key_file.value.0));
        mistakes.error(&key_file.place, found, "a private key in PEM");
        return None;
    };
    let provider = Arc::new(aws_lc_rs::default_provider());
    let roots = Arc::new(RootCertStore { roots: anchors.anchors.to_vec() });
    let clients = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider)).build();
    let made = clients.map_err(|error| error.to_string()).and_then(|clients| {
        let builder = ServerConfig::builder_with_provider(provider);
        let builder = builder.with_safe_default_protocol_versions();
        let builder = builder.map(|builder| builder.with_client_cert_verifier(clients));
        let made = builder.and_then(|builder| builder.with_single_cert(certificates, key));
        made.map_err(|error| error.to_string())
    });
    match made {
        Ok(mut config) => {
            config.alpn_protocols = vec![ALPN.to_vec()];
            Some(ServerTls {
                cert_file: cert_file.value.0.clone(),
                key_file: key_file.value.0.clone(),
                clients: anchors,
                config: Arc::new(config),
                hash: hash.finalize().into(),
            })
        }
        Err(error) => {
            let found = format!("a certificate that cannot be shown: {}", shown(&error));
            mistakes.error(&cert_file.place, found, "one that belongs to the key");
            mistakes.see_also(&key_file.place);
            None
        }
    }
}

fn content(
    At { value: Text(name), place }: &At<Text>,
    expected: &str,
    surroundings: &Surroundings<'_>,
    mistakes: &mut Mistakes,
) -> Option<Zeroizing<Vec<u8>>> {
    let path = surroundings.directory.join(name);
    (surroundings.depends_on)(&path);
    let found = match file::read(&path, MAX_OCTETS + 1) {
        Ok(content) if content.len() as u64 <= MAX_OCTETS => return Some(content),
        Ok(_) => format!("\"{}\", which is larger than {MAX_OCTETS} bytes", shown(name)),
        Err(error) => format!("\"{}\", which cannot be read: {}", shown(name), reason(&error)),
    };
    mistakes.error(place, found, expected);
    None
}
