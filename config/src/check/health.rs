//! Active checks: what has to be true of their keys beside each other, and the certificates that they trust.

use std::{num::NonZeroU32, sync::Arc};

use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};

use crate::{
    checked::{self, CertificatePolicy, CheckKind, Handshake, Request, TrustAnchors},
    document::{HealthCheck, Pool},
    file,
    leaf::{CertificateWord, CheckWord, Text},
    mistake::{Mistakes, Place},
    read::{At, Given},
    surroundings::Surroundings,
    system_error::reason,
    yaml::shown,
};

/// What most servers speak.
const DEFAULT_ALPN: &str = "h3";

/// The most octets of an application protocol.
///
/// <https://www.rfc-editor.org/rfc/rfc7301.html#section-3.1>
const MAX_ALPN_LEN: usize = 255;

/// The most octets of a path that is asked for.
const MAX_PATH_LEN: usize = 1024;

/// How a pool is checked; `None` also where that could not be read.
pub(super) fn check(
    pool: &Pool,
    surroundings: &Surroundings<'_>,
    mistakes: &mut Mistakes,
) -> Option<checked::HealthCheck> {
    let At { value: health_check, place } = pool.health_check.here()?;
    let HealthCheck { interval, timeout, rise, fall, port, panic_below, slow_start, .. } =
        health_check;
    if let Given::Here(timeout) = timeout
        && timeout.value.0 > interval.value.0
    {
        let found = "a longer time than from one check to the next";
        mistakes.error(&timeout.place, found, "at most `interval`");
        mistakes.see_also(&interval.place);
    }
    if fall.value.0 == 1 {
        let found = "a backend that is down after one failed check: one lost datagram does it";
        mistakes.warning(&fall.place, found, "2 or more");
    }
    if panic_below.value.0 == 100 {
        let found = "checks that are ignored as soon as one backend fails";
        mistakes.warning(&panic_below.place, found, "a smaller share, such as \"50%\"");
    }
    let kind = match health_check.kind.as_ref()?.value {
        CheckWord::VersionNegotiation => {
            let HealthCheck { alpn, server_name, ca_file, certificate, .. } = health_check;
            let kind = "version_negotiation";
            refuse("alpn", alpn, kind, "`kind: quic`", mistakes);
            refuse("server_name", server_name, kind, "`kind: quic`", mistakes);
            refuse("ca_file", ca_file, kind, "`kind: quic`", mistakes);
            refuse("certificate", certificate, kind, "`kind: quic`", mistakes);
            refuse_request(health_check, kind, mistakes);
            CheckKind::VersionNegotiation
        }
        CheckWord::Quic => {
            refuse_request(health_check, "quic", mistakes);
            CheckKind::Quic(handshake(health_check, place, surroundings, mistakes)?)
        }
        CheckWord::Http3 => {
            let expected = "no `alpn`: it is that of HTTP/3";
            refuse("alpn", &health_check.alpn, "http3", expected, mistakes);
            let request = request(health_check, mistakes);
            let handshake = handshake(health_check, place, surroundings, mistakes);
            CheckKind::Http3(handshake?, request?)
        }
    };
    Some(checked::HealthCheck {
        kind,
        interval: interval.value.0,
        timeout: timeout.here().map_or(interval.value.0 / 2, |timeout| timeout.value.0),
        rise: NonZeroU32::new(rise.value.0)?,
        fall: NonZeroU32::new(fall.value.0)?,
        port: port.here().and_then(|port| u16::try_from(port.value.0).ok()),
        panic_below: panic_below.value.0,
        slow_start: slow_start.value.0,
    })
}

/// Reports a key that means nothing to this kind of checks: whoever wrote it relies on it.
fn refuse<T>(key: &str, given: &Given<T>, kind: &str, expected: &str, mistakes: &mut Mistakes) {
    if let Given::Here(At { place, .. }) = given {
        let found = format!("`{key}` beside `kind: {kind}`, to which it means nothing");
        mistakes.error(place, found, expected);
    }
}

fn refuse_request(health_check: &HealthCheck, kind: &str, mistakes: &mut Mistakes) {
    let HealthCheck { path, expect_status, .. } = health_check;
    refuse("path", path, kind, "`kind: http3`", mistakes);
    refuse("expect_status", expect_status, kind, "`kind: http3`", mistakes);
}

fn request(health_check: &HealthCheck, mistakes: &mut Mistakes) -> Option<Request> {
    let HealthCheck { path, expect_status, .. } = health_check;
    let path = match path {
        Given::Here(At { value: Text(path), place }) => {
            let fits = path.starts_with('/')
                && path.len() <= MAX_PATH_LEN
                && path.bytes().all(|octet| octet.is_ascii_graphic() && octet != b'#');
            if !fits {
                let found = format!("\"{}\"", shown(path));
                let expected = format!(
                    "a path that begins with /, of {MAX_PATH_LEN} bytes at most, without spaces"
                );
                mistakes.error(place, found, expected);
            }
            fits.then(|| path.clone())
        }
        Given::Absent => Some("/".to_owned()),
        Given::Wrong => None,
    };
    let expect_status = match expect_status {
        Given::Here(At { value: statuses, place }) => {
            if statuses.is_empty() {
                mistakes.error(place, "no status", "at least one, such as 200");
            }
            let all = statuses.items.iter().filter_map(|at| u16::try_from(at.value.0).ok());
            Some(all.collect()).filter(|all: &Vec<u16>| !all.is_empty() && !statuses.incomplete)
        }
        Given::Absent => Some(vec![200]),
        Given::Wrong => None,
    };
    Some(Request { path: path?, expect_status: expect_status? })
}

fn handshake(
    health_check: &HealthCheck,
    place: &Place,
    surroundings: &Surroundings<'_>,
    mistakes: &mut Mistakes,
) -> Option<Handshake> {
    let HealthCheck { alpn, server_name, ca_file, certificate, .. } = health_check;
    let alpn = match alpn {
        Given::Here(At { value: Text(alpn), place }) if alpn.len() > MAX_ALPN_LEN => {
            let found = format!("{} bytes", alpn.len());
            mistakes.error(place, found, format!("{MAX_ALPN_LEN} bytes at most"));
            None
        }
        Given::Here(alpn) => Some(alpn.value.0.clone()),
        Given::Absent => Some(DEFAULT_ALPN.to_owned()),
        Given::Wrong => None,
    };
    let server_name = match server_name {
        Given::Here(At { value, place }) if ServerName::try_from(value.0.as_str()).is_err() => {
            let found = format!("\"{}\", which no certificate can carry", shown(&value.0));
            mistakes.error(place, found, "the name of a host");
            None
        }
        Given::Here(name) => Some(Some(name.value.0.clone())),
        Given::Absent => Some(None),
        Given::Wrong => None,
    };
    let certificate = match (ca_file, certificate) {
        (Given::Here(file), Given::Here(certificate)) => {
            let found = "`certificate` beside `ca_file`";
            mistakes.error(&certificate.place, found, "one of `ca_file` and `certificate`");
            mistakes.see_also(&file.place);
            None
        }
        (Given::Here(file), Given::Absent) => {
            trust_anchors(file, surroundings, mistakes).map(CertificatePolicy::Verified)
        }
        (Given::Absent, Given::Here(At { value: CertificateWord::Ignored, .. })) => {
            Some(CertificatePolicy::Ignored)
        }
        (Given::Absent, Given::Absent) => {
            let found = "no `ca_file`";
            let expected = "`ca_file` with the certificates that those of the servers lead to, or \
                            `certificate: ignored`";
            mistakes.error(place, found, expected);
            None
        }
        (Given::Wrong, _) | (_, Given::Wrong) => None,
    };
    Some(Handshake { alpn: alpn?, server_name: server_name?, certificate: certificate? })
}

/// The trust anchors in a file, of which each has to be of use.
pub(super) fn trust_anchors(
    At { value: Text(name), place }: &At<Text>,
    surroundings: &Surroundings<'_>,
    mistakes: &mut Mistakes,
) -> Option<TrustAnchors> {
    /// Several times what operating systems trust; a wrong file is not read to its end.
    const MAX_OCTETS: u64 = 1 << 20;
    let file = format!("\"{}\"", shown(name));
    let path = surroundings.directory.join(name);
    (surroundings.depends_on)(&path);
    let content = match file::read(&path, MAX_OCTETS + 1) {
        Ok(content) if content.len() as u64 > MAX_OCTETS => {
            let found = format!("{file}, which is larger than {MAX_OCTETS} bytes");
            mistakes.error(place, found, "a file with the certificates of few authorities");
            return None;
        }
        Ok(content) => content,
        Err(error) => {
            let found = format!("{file}, which cannot be read: {}", reason(&error));
            mistakes.error(place, found, "a file of certificates that this process may read");
            return None;
        }
    };
    let mut store = RootCertStore::empty();
    for (nth, certificate) in (1..).zip(CertificateDer::pem_slice_iter(&content)) {
        let added = match certificate {
            Ok(certificate) => store.add(certificate).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = added {
            let found =
                format!("{file}, of which certificate {nth} cannot be trusted: {}", shown(&error));
            mistakes.error(place, found, "certificates of authorities in PEM");
            return None;
        }
    }
    if store.is_empty() {
        let found = format!("{file}, which has no certificate");
        mistakes.error(place, found, "certificates of authorities in PEM");
        return None;
    }
    Some(TrustAnchors { file: name.clone(), anchors: Arc::new(store.roots) })
}
