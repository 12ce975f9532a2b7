//! Active checks: the real binary and servers that answer, are silent, lie and flood.

#![allow(clippy::unwrap_used, reason = "a failed test is a fine message")]

mod support;

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    thread,
};

use quic::{driver::Cids, transport::ResetKey};
use serde_json::json;
use support::{
    Folder, KEY,
    balancer::{Balancer, Host, Server, initial, short},
    origin::{Application, Certificate, Origin, routable, routable_by, trust},
    quic_lb,
};

/// What a server does with the question of a check, or with the beginning of a connection.
#[derive(Clone, Copy)]
enum Mood {
    Answers,
    Silent,
    Lies,
    Floods,
}

/// A server that is checked. To anything else it says its name. Lives until dropped.
struct Checked {
    mood: Arc<AtomicU8>,
    questions: Arc<AtomicU64>,
    others: Arc<AtomicU64>,
    address: SocketAddr,
    thread: Option<thread::JoinHandle<()>>,
}

impl Checked {
    fn start(address: SocketAddr, name: &'static str, mood: Mood) -> Self {
        let socket = UdpSocket::bind(address).unwrap();
        let counter = || Arc::new(AtomicU64::new(0));
        let (questions, others, mood) = (counter(), counter(), Arc::new(AtomicU8::new(mood as u8)));
        let mut server = Self {
            mood: Arc::clone(&mood),
            questions: Arc::clone(&questions),
            others: Arc::clone(&others),
            address,
            thread: None,
        };
        let thread = thread::spawn(move || {
            let mut datagram = [0; 2000];
            while let Ok((len, from)) = socket.recv_from(&mut datagram) {
                let datagram = &datagram[..len];
                if datagram == b"stop" {
                    return;
                }
                if !is_question(datagram) && !is_handshake(datagram) {
                    others.fetch_add(1, Ordering::SeqCst);
                    let _ = socket.send_to(format!("{name} {from}").as_bytes(), from);
                    continue;
                }
                questions.fetch_add(1, Ordering::SeqCst);
                let good = answer(datagram);
                let mut bad = good.clone();
                bad[8] ^= 1;
                match mood.load(Ordering::SeqCst) {
                    mood if mood == Mood::Answers as u8 => {
                        let _ = socket.send_to(&good, from);
                    }
                    mood if mood == Mood::Lies as u8 => {
                        (0..20).for_each(|_| drop(socket.send_to(&bad, from)));
                    }
                    mood if mood == Mood::Floods as u8 => {
                        (0..3000).for_each(|_| drop(socket.send_to(&[0xff; 1000], from)));
                    }
                    _silent => {}
                }
            }
        });
        server.thread = Some(thread);
        server
    }

    fn set(&self, mood: Mood) {
        self.mood.store(mood as u8, Ordering::SeqCst);
    }

    fn questions(&self) -> u64 {
        self.questions.load(Ordering::SeqCst)
    }

    fn others(&self) -> u64 {
        self.others.load(Ordering::SeqCst)
    }
}

impl Drop for Checked {
    fn drop(&mut self) {
        let stop = UdpSocket::bind((self.address.ip(), 0)).unwrap();
        let _ = stop.send_to(b"stop", self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A datagram that fills an Initial, of a version that nobody has.
fn is_question(datagram: &[u8]) -> bool {
    datagram.len() == 1200
        && datagram[0] & 0xc0 == 0xc0
        && datagram[1..5].iter().all(|octet| octet & 0x0f == 0x0a)
}

/// A long header of version 1, as clients of real servers send it. The clients of [`initial`] are nobody's.
fn is_handshake(datagram: &[u8]) -> bool {
    datagram.len() == 1200 && datagram.starts_with(&[datagram[0] | 0xc0, 0, 0, 0, 1, 8])
}

fn answer(question: &[u8]) -> Vec<u8> {
    let (dcid, scid) = (&question[5..14], &question[14..23]);
    [&[0x80, 0, 0, 0, 0], scid, dcid, &[0, 0, 0, 1]].concat()
}

/// The usual configuration, with checks that say `more`.
fn config(host: Host, more: &str) -> String {
    let check = format!("health_check: {{ kind: version_negotiation, interval: 200ms{more} }}");
    host.config().replace("  - name: web\n", &format!("  - name: web\n    {check}\n"))
}

/// The usual configuration, with checks that begin connections. The first result is soon there, and there is time
/// for a handshake on a busy machine.
fn connecting(host: Host, more: &str) -> String {
    let check = format!("health_check: {{ kind: quic, interval: 1s, timeout: 1s{more} }}");
    host.config().replace("  - name: web\n", &format!("  - name: web\n    {check}\n"))
}

/// A balancer that begins connections with its backends, and believes `certificate`.
fn connecting_balancer(host: Host, more: &str, certificate: &Certificate) -> Balancer {
    let text = connecting(host, &format!(", ca_file: ca.pem, server_name: origin.test{more}"));
    balancer_that_trusts(host, &text, certificate)
}

fn balancer_that_trusts(host: Host, text: &str, certificate: &Certificate) -> Balancer {
    let folder = Folder::with(text);
    trust(folder.path(), certificate);
    let path = folder.config();
    Balancer::start_at(host, folder, path)
}

fn state(balancer: &Balancer, name: &str) -> String {
    balancer.backend(name)["state"].as_str().unwrap().to_owned()
}

fn results(balancer: &Balancer, name: &str, result: &str) -> u64 {
    balancer.backend(name)["check"]["results"][result].as_u64().unwrap()
}

fn wait_for_state(balancer: &mut Balancer, name: &str, wanted: &str) {
    balancer.wait(&format!("{name} {wanted}"), |balancer| state(balancer, name) == wanted);
}

#[test]
fn a_silent_backend_gets_no_new_connections_until_it_answers_again() {
    let host = Host::new();
    let a = Checked::start(host.at(5001), "a", Mood::Answers);
    let b = Checked::start(host.at(5002), "b", Mood::Answers);
    let mut balancer = Balancer::start_with(host, &config(host, ""));
    balancer.wait("answers", |balancer| results(balancer, "a", "answered") > 1);
    assert_eq!((state(&balancer, "a"), state(&balancer, "b")), ("active".into(), "active".into()));
    let client = balancer.client();
    let of_a = short(&balancer.cid("a"));
    assert!(client.ask(&of_a).starts_with("a "));

    a.set(Mood::Silent);
    wait_for_state(&mut balancer, "a", "down");
    let view = balancer.backend("a")["check"].clone();
    assert_eq!((&view["passes"], &view["last"]), (&json!(false), &json!("timeout")));
    assert!(view["results"]["timeout"].as_u64().unwrap() >= 2, "{view}");
    let record = balancer.wait_for_record("backend gets no new connections");
    assert_eq!((&record["backend"], &record["check"]), (&json!("a"), &json!("timeout")));
    let before = a.others();
    for nonce in 0..100 {
        assert!(client.ask(&initial(nonce)).starts_with("b "));
    }
    assert_eq!(a.others(), before, "no new connection");
    // What it has stays with it.
    assert!(client.ask(&of_a).starts_with("a "));
    let metric = "quic_lb_backend_checks_total{backend=\"a\",pool=\"web\",result=\"timeout\"}";
    assert!(balancer.metric(metric) >= 2.0);
    let answered = results(&balancer, "b", "answered");
    let timed = balancer.metric("quic_lb_backend_check_seconds_count{pool=\"web\"}");
    assert!(timed >= answered as f64, "{timed} and {answered}");

    a.set(Mood::Answers);
    wait_for_state(&mut balancer, "a", "active");
    assert_eq!(balancer.backend("a")["check"]["passes"], true);
    assert!(b.questions() > 0);
}

#[test]
fn one_that_is_back_gets_few_new_connections_at_first() {
    let host = Host::new();
    let a = Checked::start(host.at(5001), "a", Mood::Silent);
    let _b = Checked::start(host.at(5002), "b", Mood::Answers);
    let mut balancer = Balancer::start_with(host, &config(host, ", slow_start: 1h"));
    wait_for_state(&mut balancer, "a", "down");
    a.set(Mood::Answers);
    wait_for_state(&mut balancer, "a", "active");
    let percent = |name| balancer.backend(name)["weight_percent"].clone();
    assert_eq!((percent("a"), percent("b")), (json!(10), json!(100)));
    let client = balancer.client();
    let is_of_a = |nonce: &u32| client.ask(&initial(*nonce)).starts_with("a ");
    // A third of them is its share, and it gets a tenth of that.
    let some = (0..300).filter(is_of_a).count();
    assert!((1..=30).contains(&some), "{some} of 300");
}

#[test]
fn one_that_lies_or_floods_harms_nobody_but_itself() {
    let host = Host::new();
    let a = Checked::start(host.at(5001), "a", Mood::Lies);
    let _b = Checked::start(host.at(5002), "b", Mood::Answers);
    let mut balancer = Balancer::start_with(host, &config(host, ", fall: 3"));
    wait_for_state(&mut balancer, "a", "down");
    assert_eq!(balancer.backend("a")["check"]["last"], "wrong");
    a.set(Mood::Floods);
    let (wrong, answered) = (results(&balancer, "a", "wrong"), results(&balancer, "b", "answered"));
    balancer.wait("floods", |balancer| results(balancer, "a", "wrong") > wrong + 5);
    balancer.wait("answers", |balancer| results(balancer, "b", "answered") > answered + 5);
    assert_eq!(balancer.get("/healthz").status, 200);
    // It never was down: that would be in the log.
    let fallen = balancer.records("backend gets no new connections");
    assert!(fallen.iter().all(|record| record["backend"] == "a"), "{fallen:?}");
    a.set(Mood::Answers);
    wait_for_state(&mut balancer, "a", "active");
}

#[test]
fn nobody_at_the_address_is_known_at_once_and_another_port_can_be_asked() {
    let host = Host::new();
    let (_a, _b) = (Server::start(host.at(5001), "a"), Server::start(host.at(5002), "b"));
    let text = config(host, ", port: 7000, panic_below: 0%");
    let mut balancer = Balancer::start_with(host, &text);
    wait_for_state(&mut balancer, "a", "down");
    assert_eq!(balancer.backend("a")["check"]["last"], "refused");
    let _both = Checked::start(host.at(7000), "checks", Mood::Answers);
    wait_for_state(&mut balancer, "a", "active");
    wait_for_state(&mut balancer, "b", "active");
    assert!(balancer.client().ask(&short(&balancer.cid("a"))).starts_with("a "));
    // One of them alone, at another address.
    let of_a = Checked::start(host.at(7001), "check of a", Mood::Silent);
    let there = format!("name: a, check_address: \"{}\",", host.at(7001));
    balancer.rewrite(&text.replace("name: a,", &there));
    wait_for_state(&mut balancer, "a", "down");
    assert!(of_a.questions() > 0);
    assert_eq!(state(&balancer, "b"), "active");
}

#[test]
fn where_most_of_a_pool_fails_its_checks_they_are_ignored_and_said_to_be() {
    const PANIC: &str = "quic_lb_pool_panic{pool=\"web\"}";
    let host = Host::new();
    let a = Checked::start(host.at(5001), "a", Mood::Answers);
    let b = Checked::start(host.at(5002), "b", Mood::Answers);
    let mut balancer = Balancer::start_with(host, &config(host, ", panic_below: 51%"));
    balancer.wait("answers", |balancer| results(balancer, "a", "answered") > 0);
    assert_eq!(balancer.metric(PANIC), 0.0);
    a.set(Mood::Silent);
    balancer.wait("panic", |balancer| balancer.metric(PANIC) == 1.0);
    let says = "too few backends pass their checks: these are ignored for new connections";
    assert_eq!(balancer.wait_for_record(says)["pool"], "web");
    wait_for_state(&mut balancer, "a", "active");
    assert_eq!(balancer.backend("a")["check"]["passes"], false);
    // Where none is left, all are tried, and it shows.
    b.set(Mood::Silent);
    wait_for_state(&mut balancer, "a", "down");
    wait_for_state(&mut balancer, "b", "down");
    let _answered = balancer.client().ask(&initial(7));
    a.set(Mood::Answers);
    b.set(Mood::Answers);
    balancer.wait("the end of it", |balancer| balancer.metric(PANIC) == 0.0);
    wait_for_state(&mut balancer, "a", "active");
}

#[test]
fn checks_begin_change_and_end_with_a_reload() {
    let host = Host::new();
    let a = Checked::start(host.at(5001), "a", Mood::Silent);
    let _b = Checked::start(host.at(5002), "b", Mood::Answers);
    let mut balancer = Balancer::start(host);
    assert_eq!(balancer.backend("a")["check"], json!(null));
    balancer.rewrite(&config(host, ""));
    wait_for_state(&mut balancer, "a", "down");
    balancer.rewrite(&host.config());
    wait_for_state(&mut balancer, "a", "active");
    assert_eq!(balancer.backend("a")["check"], json!(null));
    let asked = a.questions();
    assert!(asked >= 1);
    // One that joins a pool gets connections when it has answered.
    a.set(Mood::Answers);
    let text = config(host, "");
    let alone = text.lines().filter(|line| !line.contains("name: b,")).collect::<Vec<_>>();
    balancer.rewrite(&alone.join("\n"));
    balancer.wait("the first answer", |balancer| {
        let all = balancer.get("/api/v1/backends").json();
        all.as_array().unwrap().len() == 1 && all[0]["check"]["passes"] == true
    });
    balancer.rewrite(&text);
    balancer.wait("both", |balancer| {
        balancer.get("/api/v1/backends").json().as_array().unwrap().len() == 2
    });
    wait_for_state(&mut balancer, "b", "active");
    assert!(results(&balancer, "b", "answered") >= 1);
}

#[test]
fn a_check_that_begins_connections_sees_certificates() {
    let host = Host::new();
    let (good, other) = (Certificate::new("origin.test"), Certificate::new("origin.test"));
    let keeps = Application::Keeps;
    let _a = Origin::start(host.at(5001), &good, "h3", routable(1), keeps);
    let _b = Origin::start(host.at(5002), &other, "h3", routable(2), keeps);
    let mut balancer = connecting_balancer(host, "", &good);
    wait_for_state(&mut balancer, "b", "down");
    assert_eq!(balancer.backend("b")["check"]["last"], "certificate");
    balancer.wait("answers", |balancer| results(balancer, "a", "answered") > 2);
    // It never was down: that would be in the log.
    let fallen = balancer.records("backend gets no new connections");
    assert!(fallen.iter().all(|record| record["backend"] == "b"), "{fallen:?}");
    // Why is in the log at the level debug, where the TLS library does not drown it.
    let log = balancer.log();
    assert!(log.contains("check the peer's certificate chain"), "{log}");
    assert!(!log.contains("rustls::"), "{log}");
    // The file of certificates is read again when it has changed, though nothing else has.
    trust(balancer.folder.path(), &other);
    wait_for_state(&mut balancer, "b", "active");
    wait_for_state(&mut balancer, "a", "down");
}

#[test]
fn a_certificate_for_another_name_is_not_good_unless_certificates_are_ignored() {
    let host = Host::new();
    let certificate = Certificate::new("another.test");
    let _a = Origin::start(host.at(5001), &certificate, "h3", routable(1), Application::Keeps);
    let _b = Origin::start(host.at(5002), &certificate, "h3", routable(2), Application::Keeps);
    let mut balancer = connecting_balancer(host, ", panic_below: 0%", &certificate);
    wait_for_state(&mut balancer, "a", "down");
    assert_eq!(balancer.backend("a")["check"]["last"], "certificate");
    balancer.rewrite(&connecting(host, ", certificate: ignored"));
    wait_for_state(&mut balancer, "a", "active");
    wait_for_state(&mut balancer, "b", "active");
}

#[test]
fn an_application_that_closes_right_after_the_handshake_passes_and_a_transport_that_does_not() {
    let host = Host::new();
    let certificate = Certificate::new("origin.test");
    let closes = Application::Closes;
    let _a = Origin::start(host.at(5001), &certificate, "h3", routable(1), closes);
    // It has another protocol.
    let _b = Origin::start(host.at(5002), &certificate, "doq", routable(2), closes);
    let mut balancer = connecting_balancer(host, "", &certificate);
    wait_for_state(&mut balancer, "b", "down");
    assert_eq!(balancer.backend("b")["check"]["last"], "closed");
    balancer.wait("answers", |balancer| results(balancer, "a", "answered") > 2);
    // On a busy machine one may take too long.
    for result in ["refused", "wrong", "closed", "certificate", "unsent"] {
        assert_eq!(results(&balancer, "a", result), 0, "{result}");
    }
}

#[test]
fn connections_that_nobody_answers_or_that_bring_a_flood_delay_nobody_else() {
    let host = Host::new();
    let certificate = Certificate::new("origin.test");
    let a = Checked::start(host.at(5001), "a", Mood::Silent);
    let _b = Origin::start(host.at(5002), &certificate, "h3", routable(2), Application::Keeps);
    let mut balancer = connecting_balancer(host, "", &certificate);
    wait_for_state(&mut balancer, "a", "down");
    assert_eq!(balancer.backend("a")["check"]["last"], "timeout");
    assert!(a.questions() > 1, "what may be lost is sent again");
    a.set(Mood::Floods);
    let answered = results(&balancer, "b", "answered");
    balancer.wait("floods", |balancer| results(balancer, "a", "wrong") > 2);
    balancer.wait("answers", |balancer| results(balancer, "b", "answered") > answered + 2);
    assert_eq!(balancer.get("/healthz").status, 200);
    let fallen = balancer.records("backend gets no new connections");
    assert!(fallen.iter().all(|record| record["backend"] == "a"), "{fallen:?}");
    // Nobody there at all.
    drop(a);
    balancer.wait("refusals", |balancer| results(balancer, "a", "refused") > 0);
    let _a = Origin::start(host.at(5001), &certificate, "h3", routable(1), Application::Keeps);
    wait_for_state(&mut balancer, "a", "active");
}

/// Nobody has to come to it for that.
#[test]
fn a_server_without_traffic_shows_by_its_checks_how_far_a_rotation_is() {
    let host = Host::new();
    let certificate = Certificate::new("origin.test");
    let keeps = Application::Keeps;
    let a = Origin::start(host.at(5001), &certificate, "h3", routable(1), keeps);
    let b = Origin::start(host.at(5002), &certificate, "h3", routable(2), keeps);
    let text = connecting(host, ", ca_file: ca.pem, server_name: origin.test");
    let mut balancer = balancer_that_trusts(host, &text, &certificate);
    let config_id =
        |balancer: &Balancer, name: &str| balancer.backend(name)["check"]["config_id"].as_u64();
    balancer.wait("checks", |balancer| {
        [config_id(balancer, "a"), config_id(balancer, "b")] == [Some(0), Some(0)]
    });
    let first = format!(
        "      - {{ config_id: 0, server_id_length: 2, nonce_length: 6, key: \"{KEY}\" }}\n"
    );
    let second = first.replace("config_id: 0", "config_id: 1");
    balancer.rewrite(&text.replace(&first, &format!("{first}{second}")));
    let admin = host.at(9090).to_string();
    quic_lb(&["reload", "--admin", &admin]).done();
    let rotate = |step: &str| {
        quic_lb(&["rotate", "ids", "web", "--until", step, "--timeout", "100ms", &admin])
    };
    rotate("1").done();
    for (server, number, left) in [(None, 0, "a, b"), (Some(&a), 1, "b")] {
        if let Some(server) = server {
            server.set_cids(routable_by(1, number));
            balancer.wait("a check", |balancer| config_id(balancer, "a") == Some(1));
        }
        let waits = rotate("2");
        let says = format!("next: reload the servers {left}\n");
        assert!(waits.code == Some(3) && waits.out.contains(&says), "{waits:?}");
    }
    b.set_cids(routable_by(1, 2));
    balancer.wait("a check", |balancer| config_id(balancer, "b") == Some(1));
    rotate("2").done();
    // Another balancer may read none of that, unless it is gone for good.
    let nobody = host.at(9).to_string();
    let gone = quic_lb(&["rotate", "ids", "web", &admin, &nobody]).failed(1);
    assert!(gone.contains(&format!("no admin interface answers at {nobody}")), "{gone}");
    quic_lb(&["rotate", "ids", "web", "--force", "--until", "2", &admin, &nobody]).done();
}

#[test]
fn a_server_under_anothers_ids_is_miswired_until_it_is_right_again() {
    const SAYS: &str =
        "backend answers under connection IDs that do not lead to it, and gets no new connections";
    let host = Host::new();
    let certificate = Certificate::new("origin.test");
    let keeps = Application::Keeps;
    let a = Origin::start(host.at(5001), &certificate, "h3", routable(1), keeps);
    let b = Origin::start(host.at(5002), &certificate, "h3", routable(1), keeps);
    let mut balancer = connecting_balancer(host, "", &certificate);
    wait_for_state(&mut balancer, "b", "miswired");
    let view = balancer.backend("b")["check"].clone();
    assert_eq!((&view["passes"], &view["last"]), (&json!(true), &json!("miswired")));
    assert_eq!(view["connection_ids"]["expected"], "server ID 0002 in configuration 0");
    assert_eq!(view["config_id"], json!(null), "it makes none of its own");
    let found = view["connection_ids"]["found"].as_str().unwrap();
    assert!(found.starts_with("server ID 0001 in configuration 0, which is backend a"), "{found}");
    let ready = balancer.get("/readyz").json();
    assert_eq!((&ready["ready"], &ready["miswired"]), (&json!(true), &json!(["web/b"])));
    assert!(ready["detail"].as_str().unwrap().contains("/api/v1/backends"), "{ready}");
    let checks = "quic_lb_backend_checks_total{backend=\"b\",pool=\"web\",result=\"miswired\"}";
    assert!(balancer.metric(checks) >= 2.0);
    // No new connections.
    let forwarded = |balancer: &Balancer, name: &str| {
        let count = &balancer.backend(name)["datagrams_forwarded"];
        count.as_u64().unwrap()
    };
    let client = balancer.client();
    (0..50).for_each(|nonce| client.send(&initial(nonce)));
    balancer.wait("new connections", |balancer| forwarded(balancer, "a") >= 50);
    assert_eq!(forwarded(&balancer, "b"), 0);

    b.set_cids(routable(2));
    wait_for_state(&mut balancer, "b", "active");
    assert_eq!(balancer.backend("b")["check"]["connection_ids"], json!(null));
    assert_eq!(balancer.get("/readyz").json(), json!({ "ready": true }));
    // Told once.
    let records = balancer.records(SAYS);
    let [record] = &records[..] else { panic!("{records:?}") };
    assert_eq!((&record["backend"], &record["level"]), (&json!("b"), &json!("WARN")));
    assert_eq!(record["expected"], "server ID 0002 in configuration 0");
    assert!(record["found"].as_str().unwrap().contains("server ID 0001"), "{record}");

    // Connection IDs that lead nowhere.
    a.set_cids(Cids::Unroutable { len: 8, reset_key: ResetKey::new([7; 32]) });
    wait_for_state(&mut balancer, "a", "miswired");
    let found = balancer.backend("a")["check"]["connection_ids"]["found"].clone();
    assert!(found.as_str().unwrap().starts_with("the config bits are 0b111"), "{found}");
}

#[test]
fn a_request_over_http3_has_to_be_answered_with_the_status_that_is_expected() {
    let host = Host::new();
    let certificate = Certificate::new("origin.test");
    let asking = |more: &str| {
        let usual = format!(", ca_file: ca.pem, server_name: origin.test, path: /health{more}");
        connecting(host, &usual).replace("kind: quic", "kind: http3")
    };
    let answers = Application::Answers;
    let a = Origin::start(host.at(5001), &certificate, "h3", routable(1), answers);
    let b = Origin::start(host.at(5002), &certificate, "h3", routable(1), answers);
    b.set_status(503);
    let mut balancer = balancer_that_trusts(host, &asking(", panic_below: 0%"), &certificate);
    wait_for_state(&mut balancer, "b", "down");
    assert_eq!(balancer.backend("b")["check"]["last"], "status");
    balancer.wait("answers", |balancer| results(balancer, "a", "answered") > 1);
    assert_eq!(state(&balancer, "a"), "active");
    // One that is not in the static table of HTTP/3.
    b.set_status(299);
    let expects = ", panic_below: 0%, expect_status: [299, 200]";
    balancer.rewrite(&asking(expects));
    // Its connection IDs are looked at as well.
    wait_for_state(&mut balancer, "b", "miswired");
    b.set_cids(routable(2));
    wait_for_state(&mut balancer, "b", "active");
    // What it does not answer to, it has not passed.
    balancer.rewrite(&asking(expects).replace("/health", "/other"));
    wait_for_state(&mut balancer, "a", "down");
    let last = balancer.backend("a")["check"]["last"].clone();
    assert!(["wrong", "timeout"].contains(&last.as_str().unwrap()), "{last}");
    drop(a);
    let _a = Origin::start(host.at(5001), &certificate, "h3", routable(1), Application::Closes);
    balancer.wait("ends", |balancer| results(balancer, "a", "closed") > 1);
}

#[test]
fn certificates_that_cannot_be_trusted_are_mistakes_and_leave_the_checks_as_they_were() {
    let host = Host::new();
    let certificate = Certificate::new("origin.test");
    let _a = Origin::start(host.at(5001), &certificate, "h3", routable(1), Application::Keeps);
    let _b = Origin::start(host.at(5002), &certificate, "h3", routable(2), Application::Keeps);
    let mut balancer = connecting_balancer(host, "", &certificate);
    balancer.wait("answers", |balancer| results(balancer, "a", "answered") > 0);
    let no_certificate = b"-----BEGIN CERTIFICATE-----\naGVsbG8=\n-----END CERTIFICATE-----\n";
    balancer.folder.write("ca.pem", no_certificate);
    let checked = balancer.folder.run(&["check"], &[]).failed(1);
    assert!(checked.contains("certificate 1 cannot be trusted"), "{checked}");
    let rejected = balancer.wait_for_record("configuration rejected, the old one goes on");
    assert_eq!(rejected["errors"], 1);
    let answered = results(&balancer, "a", "answered");
    balancer.wait("answers", |balancer| results(balancer, "a", "answered") > answered + 1);
    assert_eq!(state(&balancer, "a"), "active");
}
