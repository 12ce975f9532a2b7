//! Commands have a door of their own: a Unix socket, or an address with a token.

#![allow(clippy::unwrap_used, reason = "a failed test is a fine message")]

mod support;

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use serde_json::Value;
use support::{
    Folder,
    balancer::{Balancer, Host},
    quic_lb,
};

const TOKEN: &str = "correct-horse-battery-staple";

fn config(host: Host, commands: &str) -> String {
    let at = host.at(9090);
    host.config().replace(
        &format!("admin: {{ address: \"{at}\" }}"),
        &format!("admin: {{ address: \"{at}\", commands: {commands} }}"),
    )
}

#[test]
fn with_a_socket_for_commands_the_address_is_to_be_read_alone() {
    let host = Host::new();
    let mut balancer = Balancer::start_with(host, &config(host, "{ unix: admin.sock }"));
    let path = balancer.folder.path().join("admin.sock");
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660, "for its owner and group");
    for command in ["/api/v1/backends/web/a/drain", "/api/v1/reload"] {
        let answer = balancer.post(command);
        assert_eq!(answer.status, 403, "{answer:?}");
        assert!(answer.body.contains("admin.commands"), "{answer:?}");
    }
    assert_eq!(balancer.backend("a")["state"], "active");
    for page in ["/", "/metrics", "/healthz", "/readyz", "/api/v1/backends", "/api/v1/config"] {
        assert_eq!(balancer.get(page).status, 200, "{page}");
    }
    let report = "POST /api/v1/backends/web/a/half_open HTTP/1.1\r\nHost: localhost\r\n\
                  Connection: close\r\nContent-Type: application/json\r\nContent-Length: 17\r\n\r\n\
                  {\"half_open\": 12}";
    let refused = balancer.raw_http(report.as_bytes());
    assert_eq!(refused.status, 403, "{refused:?}");
    assert!(refused.body.contains("report_token_file"), "{refused:?}");
    assert_eq!(balancer.backend("a")["half_open"], Value::Null);

    let path = path.to_str().unwrap();
    let drained = quic_lb(&["drain", "--admin", path, "web/a"]).done();
    assert!(drained.starts_with("web/a gets no new connections"), "{drained}");
    assert_eq!(balancer.backend("a")["state"], "draining");
    quic_lb(&["activate", "--admin", path, "web/a"]).done();
    balancer.rewrite(&config(host, "{ unix: other.sock }"));
    let refused = quic_lb(&["reload", "--admin", path]).failed(1);
    assert!(refused.contains("admin.commands changes from"), "{refused}");

    balancer.signal("TERM");
    balancer.exit_code();
    let nobody = quic_lb(&["reload", "--admin", path]).failed(1);
    assert!(nobody.contains("no admin interface answers"), "{nobody}");
    // It has left its socket, since it may not remove files any more. The next one puts its own there.
    let path_of_config =
        balancer.folder.write("lb.yaml", config(host, "{ unix: admin.sock }").as_bytes());
    let folder = std::mem::replace(&mut balancer.folder, Folder::with(""));
    let again = Balancer::start_at(host, folder, path_of_config);
    quic_lb(&["drain", "--admin", path, "web/a"]).done();
    assert_eq!(again.backend("a")["state"], "draining");
}

/// Gives certificates.
struct Authority(rcgen::CertifiedIssuer<'static, rcgen::KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = rcgen::CertificateParams::new(vec![]).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        Self(rcgen::CertifiedIssuer::self_signed(params, key).unwrap())
    }

    /// Writes its certificate, and one with a key for `name`.
    fn write(&self, folder: &Folder, prefix: &str, name: &str) -> [PathBuf; 3] {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        let files =
            [("ca", self.0.pem()), ("cert", certificate.pem()), ("key", key.serialize_pem())];
        files.map(|(file, pem)| folder.write(&format!("{prefix}-{file}.pem"), pem.as_bytes()))
    }
}

#[test]
fn with_certificates_commands_are_taken_over_tls_from_those_who_have_one() {
    let host = Host::new();
    let folder = Folder::with("");
    let (ours, theirs) = (Authority::new(), Authority::new());
    let [server_ca, ..] = ours.write(&folder, "server", &host.at(0).ip().to_string());
    let [_, cert, key] = ours.write(&folder, "client", "operator.example");
    let [stranger_ca, wrong_cert, wrong_key] =
        theirs.write(&folder, "stranger", "operator.example");
    let files =
        "cert_file: server-cert.pem, key_file: server-key.pem, client_ca_file: server-ca.pem";
    let commands = format!("{{ address: \"{}\", {files} }}", host.at(9091));
    let path = folder.write("lb.yaml", config(host, &commands).as_bytes());
    let mut balancer = Balancer::start_at(host, folder, path);
    let place = host.at(9091).to_string();
    let ask = |[ca, cert, key]: [&Path; 3], what: &[&str]| {
        let [ca, cert, key] = [ca, cert, key].map(|path| path.to_str().unwrap());
        let how = ["--admin", &place, "--ca-file", ca, "--cert-file", cert, "--key-file", key];
        quic_lb(&[&what[..1], &how, &what[1..]].concat())
    };
    ask([&server_ca, &cert, &key], &["drain", "web/a"]).done();
    assert_eq!(balancer.backend("a")["state"], "draining");
    // A stranger's certificate, none and no TLS at all, and a balancer that shows another authority's.
    ask([&server_ca, &wrong_cert, &wrong_key], &["activate", "web/a"]).failed(1);
    let ca = server_ca.to_str().unwrap();
    quic_lb(&["activate", "--admin", &place, "--ca-file", ca, "web/a"]).failed(1);
    let none = balancer.raw_http_at(9091, b"POST /api/v1/backends/web/a/activate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    assert_eq!(none.status, 0, "{none:?}");
    ask([&stranger_ca, &cert, &key], &["activate", "web/a"]).failed(1);
    assert_eq!(balancer.backend("a")["state"], "draining");

    // Another authority, by a reload that the old one's client asks for: strangers are none any more.
    let old_ca = balancer.folder.write("old-ca.pem", ours.0.pem().as_bytes());
    balancer.folder.write("server-ca.pem", theirs.0.pem().as_bytes());
    let told = ask([&old_ca, &cert, &key], &["reload"]).done();
    assert!(told.contains("admin.commands.cert_file: other certificates"), "{told}");
    ask([&old_ca, &cert, &key], &["activate", "web/a"]).failed(1);
    ask([&old_ca, &wrong_cert, &wrong_key], &["activate", "web/a"]).done();
    assert_eq!(balancer.backend("a")["state"], "active");

    // And a token at the same address: a certificate is not enough, and nobody speaks TLS any more.
    let token = balancer.folder.write("token", TOKEN.as_bytes());
    std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o600)).unwrap();
    let commands = format!("{{ address: \"{}\", token_file: token }}", host.at(9091));
    balancer.rewrite(&config(host, &commands));
    balancer.wait("the token", |_| {
        let how = ["--admin", &place, "--token-file", token.to_str().unwrap(), "web/a"];
        quic_lb(&[&["drain"], &how[..]].concat()).code == Some(0)
    });
    let without = quic_lb(&["activate", "--admin", &place, "web/a"]).failed(1);
    assert!(without.contains("Authorization: Bearer"), "{without}");

    // Back again: a connection from before has shown nothing.
    let mut kept = TcpStream::connect(host.at(9091)).unwrap();
    let mut status = |request: &str| {
        kept.write_all(
            format!("{request} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
                .as_bytes(),
        )
        .unwrap();
        let (mut answer, mut octets) = (String::new(), [0; 2_000]);
        for _ in 0..100 {
            let len = kept.read(&mut octets).unwrap();
            answer += str::from_utf8(&octets[..len]).unwrap();
            if answer.ends_with('}') {
                break;
            }
        }
        answer.split(' ').nth(1).unwrap().parse::<u16>().unwrap()
    };
    assert_eq!(status("GET /healthz"), 200);
    let commands = format!("{{ address: \"{}\", {files} }}", host.at(9091));
    balancer.rewrite(&config(host, &commands));
    balancer.wait("certificates", |_| {
        ask([&old_ca, &wrong_cert, &wrong_key], &["drain", "web/a"]).code == Some(0)
    });
    assert_eq!(status("POST /api/v1/backends/web/a/activate"), 401);
    assert_eq!(balancer.backend("a")["state"], "draining");
}

/// A server has to show that it is one of the pool, wherever it reports, and a command's token is not a server's.
#[test]
fn reports_are_taken_from_who_shows_the_token_of_the_pool() {
    let host = Host::new();
    let folder = Folder::with("");
    for (name, token) in [("commands", TOKEN), ("web", "token-of-all-servers-of-web")] {
        let path = folder.write(name, token.as_bytes());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    }
    let commands = format!("{{ address: \"{}\", token_file: commands }}", host.at(9091));
    let config = config(host, &commands);
    let config = config.replace("    backends:", "    report_token_file: web\n    backends:");
    let path = folder.write("lb.yaml", config.as_bytes());
    let balancer = Balancer::start_at(host, folder, path);
    let report = |port: u16, half_open: u64, shown: &str| {
        let body = format!("{{\"half_open\": {half_open}}}");
        let head = "POST /api/v1/backends/web/a/half_open HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n";
        let shown = if shown.is_empty() {
            String::new()
        } else {
            format!("Authorization: Bearer {shown}\r\n")
        };
        let request = format!("{head}{shown}Content-Length: {}\r\n\r\n{body}", body.len());
        balancer.raw_http_at(port, request.as_bytes()).status
    };
    for port in [9090, 9091] {
        for wrong in ["", TOKEN, "token-of-all-servers-of-we", "token-of-all-servers-of-webb"] {
            assert_eq!(report(port, 99, wrong), 401, "{wrong:?} at {port}");
        }
        let half_open = u64::from(port);
        assert_eq!(report(port, half_open, "token-of-all-servers-of-web"), 204);
        assert_eq!(balancer.backend("a")["half_open"], half_open);
    }
    // What a server has is not enough to command.
    let drain = "POST /api/v1/backends/web/a/drain HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\nAuthorization: Bearer token-of-all-servers-of-web\r\n\r\n";
    assert_eq!(balancer.raw_http_at(9091, drain.as_bytes()).status, 401);
    assert_eq!(balancer.raw_http_at(9090, drain.as_bytes()).status, 403);

    balancer.folder.write("web", b"another-token-of-the-servers");
    let (place, token) = (host.at(9091).to_string(), balancer.folder.path().join("commands"));
    let reload = ["reload", "--admin", &place, "--token-file", token.to_str().unwrap()];
    assert!(quic_lb(&reload).done().contains("pools[web].report_token_file: another token"));
    assert_eq!(report(9090, 1, "token-of-all-servers-of-web"), 401);
    assert_eq!(report(9090, 1, "another-token-of-the-servers"), 204);
}

#[test]
fn with_an_address_for_commands_they_need_the_token_of_the_day() {
    let host = Host::new();
    let folder = Folder::with("");
    let token = folder.write("token", TOKEN.as_bytes());
    std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o600)).unwrap();
    let commands = format!("{{ address: \"{}\", token_file: token }}", host.at(9091));
    let path = folder.write("lb.yaml", config(host, &commands).as_bytes());
    let mut balancer = Balancer::start_at(host, folder, path);
    assert_eq!(balancer.post("/api/v1/backends/web/a/drain").status, 403);

    let status = |method: &str, path: &str, header: &str| {
        let mut stream = TcpStream::connect(host.at(9091)).unwrap();
        let request = format!("{method} {path} HTTP/1.0\r\nHost: localhost\r\n{header}\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer.split(' ').nth(1).unwrap().parse::<u16>().unwrap()
    };
    let drain = |header: &str| status("POST", "/api/v1/backends/web/a/drain", header);
    let shown = format!("Authorization: Bearer {TOKEN}\r\n");
    for wrong in [
        "",
        "Authorization: Bearer correct-horse-battery-stapl\r\n",
        "Authorization: Bearer correct-horse-battery-staple-\r\n",
        "Authorization: Bearer Correct-horse-battery-staple\r\n",
        "Authorization: Bearer \r\n",
        "Authorization: Basic correct-horse-battery-staple\r\n",
        &format!("{shown}{shown}"),
    ] {
        assert_eq!(drain(wrong), 401, "{wrong:?}");
    }
    assert_eq!(status("GET", "/api/v1/config", ""), 401, "neither is anything told there");
    assert_eq!(status("GET", "/healthz", ""), 200);
    assert_eq!(balancer.backend("a")["state"], "active");
    assert_eq!(drain(&shown), 200);
    assert_eq!(balancer.backend("a")["state"], "draining");

    let (place, file) = (host.at(9091).to_string(), token.to_str().unwrap().to_owned());
    let how = ["--admin", &place, "--token-file", &file];
    let refused = quic_lb(&["activate", "--admin", &place, "web/a"]).failed(1);
    assert!(refused.contains("Authorization: Bearer"), "{refused}");
    quic_lb(&[&["activate"], &how[..], &["web/a"]].concat()).done();
    // Another token, by a reload that the old one asks for.
    let old = balancer.folder.write("old", TOKEN.as_bytes());
    balancer.folder.write("token", b"another-token-of-some-length");
    let reload = ["reload", "--admin", &place, "--token-file", old.to_str().unwrap()];
    assert!(quic_lb(&reload).done().contains("token_file: another token"));
    assert_eq!(drain(&shown), 401);
    quic_lb(&[&["drain"], &how[..], &["web/a"]].concat()).done();
    let shown = balancer.get("/api/v1/config").body;
    balancer.signal("TERM");
    balancer.exit_code();
    let told = balancer.log() + &shown;
    assert!(!told.contains(TOKEN) && !told.contains("another-token"), "{told}");
}
