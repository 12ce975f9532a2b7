//! Active checks that begin connections: whom they trust, and what they ask for.

mod common;

use std::fs;

use common::{contract_with, mistakes_at_marks, read};
use quic_lb_config::{
    CertificatePolicy, CheckKind, Config, Handshake, Report, Request, Surroundings, from_str,
};

/// The contract with this check of its pool.
fn with(check: &str) -> String {
    contract_with("  - name: web", &format!("  - health_check: {check}\n    name: web"))
}

fn config(text: &str) -> Config {
    read(text).unwrap_or_else(|report| panic!("{report}")).config
}

fn handshake(config: &Config) -> &Handshake {
    match &config.pools[0].health_check.as_ref().expect("a check").kind {
        CheckKind::Quic(handshake) | CheckKind::Http3(handshake, _) => handshake,
        CheckKind::VersionNegotiation => panic!("another kind"),
    }
}

/// A certificate in PEM.
fn certificate(name: &str) -> String {
    let made = rcgen::generate_simple_self_signed([name.to_owned()]).expect("a certificate");
    made.cert.pem()
}

/// PEM around octets that are no certificate.
const NO_CERTIFICATE: &str = "-----BEGIN CERTIFICATE-----\naGVsbG8=\n-----END CERTIFICATE-----\n";

#[test]
fn a_check_with_a_connection_asks_for_http3_of_the_address_unless_it_says_otherwise() {
    let plain = config(&with("{kind: quic, certificate: ignored}"));
    let expected =
        Handshake { alpn: "h3".into(), server_name: None, certificate: CertificatePolicy::Ignored };
    assert_eq!(handshake(&plain), &expected);
    let all =
        config(&with("{kind: quic, certificate: ignored, alpn: doq, server_name: A.Example.}"));
    let expected =
        Handshake { alpn: "doq".into(), server_name: Some("a.example".into()), ..expected };
    assert_eq!(handshake(&all), &expected);
}

#[test]
fn keys_of_connections_are_told_what_would_do() {
    let long = "x".repeat(256);
    for (check, key, found, expected) in [
        ("§{kind: quic}", "", "no `ca_file`", "`certificate: ignored`"),
        ("{kind: quic, certificate: §good}", ".certificate", "good", "\"ignored\""),
        (
            "{kind: quic, ca_file: ca.pem, certificate: §ignored}",
            ".certificate",
            "beside `ca_file`",
            "one of",
        ),
        ("{kind: quic, certificate: ignored, alpn: §\"\"}", ".alpn", "an empty text", "text"),
        ("{kind: quic, certificate: ignored, alpn: §LONG}", ".alpn", "256 bytes", "255"),
        (
            "{kind: quic, certificate: ignored, server_name: §a..b}",
            ".server_name",
            "which no certificate can carry",
            "the name of a host",
        ),
        ("{kind: quic, ca_file: §none.pem}", ".ca_file", "cannot be read", "a file of"),
        ("{kind: version_negotiation, alpn: §h3}", ".alpn", "`alpn` beside", "`kind: quic`"),
        ("{kind: version_negotiation, ca_file: §a}", ".ca_file", "`ca_file` beside", "quic"),
        (
            "{kind: version_negotiation, certificate: §ignored}",
            ".certificate",
            "`certificate` beside",
            "quic",
        ),
        (
            "{kind: version_negotiation, server_name: §a.example}",
            ".server_name",
            "`server_name` beside",
            "quic",
        ),
    ] {
        let text = with(&check.replace("LONG", &long));
        let mistakes = mistakes_at_marks(&text, &[&format!("pools[0].health_check{key}")]);
        assert!(mistakes[0].found.contains(found), "{}", mistakes[0]);
        assert!(mistakes[0].expected.contains(expected), "{}", mistakes[0]);
    }
}

#[test]
fn a_check_over_http3_asks_for_the_root_and_wants_200_unless_it_says_otherwise() {
    let request = |more: &str| {
        let config = config(&with(&format!("{{kind: http3, certificate: ignored{more}}}")));
        let check = config.pools[0].health_check.clone().expect("a check");
        let CheckKind::Http3(handshake, request) = check.kind else { panic!("another kind") };
        assert_eq!(handshake.alpn, "h3");
        request
    };
    assert_eq!(request(""), Request { path: "/".into(), expect_status: vec![200] });
    let expected = Request { path: "/health?all".into(), expect_status: vec![200, 204] };
    assert_eq!(request(", path: /health?all, expect_status: [200, 204]"), expected);
    for (check, key, found, expected) in [
        ("{kind: http3, certificate: ignored, alpn: §h3}", ".alpn", "`alpn` beside", "no `alpn`"),
        ("{kind: http3, certificate: ignored, path: §health}", ".path", "health", "begins with /"),
        ("{kind: http3, certificate: ignored, path: §\"/a b\"}", ".path", "/a b", "spaces"),
        (
            "{kind: http3, certificate: ignored, expect_status: §[]}",
            ".expect_status",
            "no status",
            "at least one",
        ),
        (
            "{kind: http3, certificate: ignored, expect_status: [200, §100]}",
            ".expect_status[1]",
            "100",
            "from 200 to 599",
        ),
        ("{kind: quic, certificate: ignored, path: §/}", ".path", "`path` beside", "http3"),
        (
            "{kind: version_negotiation, expect_status: §[200]}",
            ".expect_status",
            "`expect_status` beside",
            "http3",
        ),
    ] {
        let mistakes = mistakes_at_marks(&with(check), &[&format!("pools[0].health_check{key}")]);
        assert!(mistakes[0].found.contains(found), "{}", mistakes[0]);
        assert!(mistakes[0].expected.contains(expected), "{}", mistakes[0]);
    }
}

#[test]
fn a_backend_may_be_checked_at_another_address() {
    let at = |address: &str| {
        let name = "      - name: a\n";
        let more = format!("      - check_address: {address}\n        name: a\n");
        contract_with(name, &more)
    };
    let checked = |address: &str| {
        let check = "  - health_check: {kind: version_negotiation}\n    name: web\n";
        at(address).replace("  - name: web\n", check)
    };
    let config = config(&checked("\"127.0.0.9:80\""));
    let addresses: Vec<_> = config.pools[0].backends.iter().map(|of| of.check_address).collect();
    assert_eq!(addresses, ["127.0.0.9:80".parse().ok(), None]);
    let shown = &config.masked_document()["pools"][0]["backends"];
    assert_eq!(shown[0]["check_address"], "127.0.0.9:80");
    assert!(shown[1].get("check_address").is_none());
    let path = "pools[0].backends[0].check_address";
    for (text, path, found) in [
        (checked("§\"127.0.0.9\""), path, "which has no port"),
        (checked("§\"0.0.0.0:80\""), path, "unspecified"),
        (checked("§\"127.0.0.1:4433\""), path, "where a listener is"),
        (checked("§\"[fe80::1]:80\""), path, "without its zone"),
        (at("§\"127.0.0.9:80\""), &format!("warning {path}"), "in a pool that has none"),
    ] {
        let mistakes = mistakes_at_marks(&text, &[path]);
        assert!(mistakes[0].found.contains(found), "{}", mistakes[0]);
    }
}

#[test]
fn trust_anchors_are_read_with_the_file_and_each_of_them_has_to_be_of_use() {
    let directory = tempfile::tempdir().expect("a directory");
    let text = with("{kind: quic, ca_file: ca.pem}");
    let load = |content: &[u8]| -> Result<Config, Report> {
        fs::write(directory.path().join("ca.pem"), content).expect("a file");
        let surroundings =
            Surroundings { directory: directory.path(), ..Surroundings::of_text("lb.yaml") };
        from_str(&text, &surroundings).map(|loaded| loaded.config)
    };
    let (one, two) = (certificate("one.example"), certificate("two.example"));
    let both = load(format!("# Two\n{one}\n{two}").as_bytes()).expect("two certificates");
    let CertificatePolicy::Verified(both) = &handshake(&both).certificate else { panic!() };
    assert_eq!((&*both.file, both.anchors.len()), ("ca.pem", 2));
    let alone = load(one.as_bytes()).expect("a certificate");
    let CertificatePolicy::Verified(alone) = &handshake(&alone).certificate else { panic!() };
    assert_eq!(alone.anchors[..], both.anchors[..1]);

    let broken = one.replace("-----END", "----END");
    let second = format!("{one}{NO_CERTIFICATE}");
    let large = vec![b'\n'; (1 << 20) + 1];
    for (content, found) in [
        (&b""[..], "no certificate"),
        (b"hello", "no certificate"),
        (NO_CERTIFICATE.as_bytes(), "certificate 1 cannot be trusted"),
        (second.as_bytes(), "certificate 2 cannot be trusted"),
        (broken.as_bytes(), "certificate 1 cannot be trusted"),
        (&large, "larger than"),
    ] {
        let report = load(content).expect_err(found);
        let [mistake] = &report.mistakes[..] else { panic!("{report}") };
        assert!(mistake.found.contains(found), "{mistake}");
        let place = mistake.place.as_ref().expect("a place");
        assert_eq!(place.path, "pools[0].health_check.ca_file");
    }
}

#[test]
fn the_masked_document_shows_how_connections_are_begun() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("ca.pem");
    fs::write(&file, certificate("one.example")).expect("a file");
    let file = file.to_str().expect("text");
    let masked =
        |check: &str| config(&with(check)).masked_document()["pools"][0]["health_check"].clone();
    let shown = masked(&format!("{{kind: quic, ca_file: \"{file}\", server_name: a.example}}"));
    assert_eq!((&shown["kind"], &shown["ca_file"]), (&"quic".into(), &file.into()));
    assert_eq!((&shown["server_name"], &shown["alpn"]), (&"a.example".into(), &"h3".into()));
    let shown = masked("{kind: quic, certificate: ignored}");
    assert_eq!(shown["certificate"], "ignored");
    let asks = masked("{kind: http3, certificate: ignored, path: /health}");
    assert_eq!((&asks["path"], &asks["expect_status"]), (&"/health".into(), &[200].into()));
    assert!(asks.get("alpn").is_none());
    assert!(shown.get("ca_file").is_none());
}
