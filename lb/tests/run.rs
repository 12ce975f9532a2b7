//! `quic-lb run`: the real binary with real datagrams, signals, files and scrapes.

#![allow(clippy::unwrap_used, reason = "a failed test is a fine message")]

mod support;

use std::{
    io::Write,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use quic_lb::verdict::DropReason;
use serde_json::{Value, json};
use support::{
    Folder, KEY,
    balancer::{Balancer, Host, PATIENCE, Server, initial, run_in_vain, short},
    command, quic_lb,
};

const APPLIED: &str = "quic_lb_config_reloads_total{result=\"applied\"}";
const SUCCESSFUL: &str = "quic_lb_config_last_reload_successful";
const REJECTED: &str = "quic_lb_config_reloads_total{result=\"rejected\"}";

#[test]
fn a_scrape_shows_every_datagram_with_its_verdict() {
    let host = Host::new();
    let (_a, _b) = (Server::start(host.at(5001), "a"), Server::start(host.at(5002), "b"));
    let mut balancer = Balancer::start(host);
    let client = balancer.client();
    let (a, b) = (balancer.cid("a"), balancer.cid("b"));
    assert!(client.ask(&short(&a)).starts_with("a "));
    assert!(client.ask(&short(&b)).starts_with("b "));
    (0..20).for_each(|nonce| client.send(&initial(nonce)));
    (0..5).for_each(|_| client.send(&[0xc0, 0, 0]));
    (0..5).for_each(|_| client.send(&[]));

    balancer.wait("all datagrams", |balancer| {
        balancer.metric("quic_lb_datagrams_received_total{listener=\"edge\"}") >= 32.0
    });
    let samples = balancer.metrics();
    let sum = |prefix: &str| -> f64 {
        samples.iter().filter(|(name, _)| name.starts_with(prefix)).map(|(_, value)| value).sum()
    };
    let received = sum("quic_lb_datagrams_received_total");
    let verdicts = sum("quic_lb_datagrams_forwarded_total")
        + sum("quic_lb_datagrams_dropped_total")
        + sum("quic_lb_datagrams_replied_total");
    assert_eq!(verdicts, received, "{samples:#?}");
    let dropped = |reason| {
        samples
            [&format!("quic_lb_datagrams_dropped_total{{listener=\"edge\",reason=\"{reason}\"}}")]
    };
    assert_eq!((dropped("malformed"), dropped("empty")), (5.0, 5.0));
    let cid = samples["quic_lb_datagrams_forwarded_total{listener=\"edge\",rule=\"cid\"}"];
    assert!(cid >= 2.0);
    assert_eq!(sum("quic_lb_backend_datagrams_total"), sum("quic_lb_datagrams_forwarded_total"));
    assert_eq!(samples["quic_lb_flows{listener=\"edge\"}"], 2.0);
    assert_eq!(samples["quic_lb_flow_limit"], 1000.0);
    assert_eq!(samples["quic_lb_workers"], 2.0);
    assert!(samples["quic_lb_bytes_total{direction=\"received\",listener=\"edge\"}"] > 600.0);
    assert!(samples["quic_lb_datagrams_returned_total{listener=\"edge\"}"] >= 2.0);
    assert_eq!(samples["quic_lb_ready"], 1.0);
}

#[test]
fn what_the_kernel_has_no_room_for_is_counted_and_so_is_the_work() {
    /// More than the largest buffer that a listener asks for.
    const SENT: u32 = 60_000;
    let mut balancer = Balancer::start(Host::new());
    let client = balancer.client();
    balancer.signal("STOP");
    (0..SENT).for_each(|_| client.send(&[0xc0]));
    balancer.signal("CONT");
    let sum = |balancer: &Balancer, name: &str| -> f64 {
        let samples = balancer.metrics();
        samples.iter().filter(|(sample, _)| sample.starts_with(name)).map(|(_, n)| n).sum()
    };
    let received = "quic_lb_datagrams_received_total";
    balancer.wait("every datagram, here or there", |balancer| {
        let dropped = sum(balancer, "quic_lb_receive_dropped_total{listener=\"edge\"");
        dropped > 0.0 && dropped + sum(balancer, received) == f64::from(SENT)
    });
    let batches = sum(&balancer, "quic_lb_worker_batches_total");
    assert!(batches >= sum(&balancer, received) / 64.0, "{batches}");
    assert!(sum(&balancer, "quic_lb_worker_cpu_seconds_total") > 0.0);
    let metrics = balancer.metrics();
    assert!(metrics.contains_key("quic_lb_worker_cpu_seconds_total{worker=\"1\"}"));
}

/// Where the tests run as root there is something to give up.
#[test]
fn a_running_balancer_has_given_up_what_it_does_not_need_and_goes_on() {
    let host = Host::new();
    let _a = Server::start(host.at(5001), "a");
    let mut balancer = Balancer::start(host);
    let threads = balancer.threads();
    assert!(threads.len() >= 3, "two workers and the control plane");
    for thread in threads {
        assert_eq!(thread["NoNewPrivs"], "1", "{}", thread["Name"]);
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(thread[set], "0000000000000000", "{}: {set}", thread["Name"]);
        }
    }
    // It opens upstream sockets, reads its file and answers scrapes all the same.
    let client = balancer.client();
    assert!(client.ask(&short(&balancer.cid("a"))).starts_with("a "));
    balancer.rewrite(&host.config().replace("weight: 2", "weight: 3"));
    balancer.wait("the reload", |balancer| balancer.metric(APPLIED) == 1.0);
    let warnings: Vec<_> =
        balancer.log().lines().filter(|line| line.contains("rights")).map(str::to_owned).collect();
    assert_eq!(warnings, [""; 0]);
}

#[test]
fn req_o03_every_reason_to_drop_has_a_counter_before_anything_was_dropped() {
    let balancer = Balancer::start(Host::new());
    let samples = balancer.metrics();
    for reason in DropReason::ALL {
        let reason = reason.label();
        let name =
            format!("quic_lb_datagrams_dropped_total{{listener=\"edge\",reason=\"{reason}\"}}");
        assert_eq!(samples.get(&name), Some(&0.0), "{reason}");
    }
}

/// Counters are read while they change: verdicts and datagrams differ by what is on its way through
/// the workers, and by nothing in the end.
#[test]
fn scrapes_during_traffic_add_up() {
    const SENT: u32 = 20_000;
    /// Two workers with a batch each.
    const IN_FLIGHT: f64 = 2.0 * 64.0;
    let host = Host::new();
    let _b = Server::start(host.at(5002), "b");
    let mut balancer = Balancer::start(host);
    let (client, cid) = (balancer.client(), balancer.cid("b"));
    let sender = thread::spawn(move || {
        for nonce in 0..SENT {
            match nonce % 3 {
                0 => client.send(&short(&cid)),
                1 => client.send(&initial(nonce % 100)),
                _ => client.send(&[0xc0]),
            }
        }
    });
    let count = |balancer: &Balancer| {
        let samples = balancer.metrics();
        let sum = |name: &str| -> f64 {
            let samples = samples.iter().filter(|(sample, _)| sample.contains(name));
            samples.map(|(_, value)| value).sum()
        };
        let received = sum("quic_lb_datagrams_received_total");
        (
            sum("quic_lb_datagrams_forwarded_total") + sum("quic_lb_datagrams_dropped_total"),
            received,
        )
    };
    while !sender.is_finished() {
        let (verdicts, received) = count(&balancer);
        let more = verdicts - received;
        assert!(more <= IN_FLIGHT, "{verdicts} verdicts on {received} datagrams");
    }
    sender.join().unwrap();
    balancer.wait("equality at rest", |balancer| {
        let (verdicts, received) = count(balancer);
        verdicts == received && received > 0.0
    });
}

#[test]
fn the_service_manager_is_told() {
    use std::os::unix::net::UnixDatagram;
    let host = Host::new();
    let folder = Folder::with(&host.config());
    let manager = UnixDatagram::bind(folder.path().join("notify")).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let told = || {
        let mut message = [0; 500];
        let len = manager.recv(&mut message).unwrap();
        String::from_utf8(message[..len].to_vec()).unwrap()
    };
    let config = folder.config();
    let mut balancer = Balancer::start_at(host, folder, config);
    assert!(told().contains("READY=1"));
    balancer.signal("HUP");
    assert!(told().contains("RELOADING=1"));
    assert!(told().contains("READY=1"));
    balancer.signal("TERM");
    assert!(told().contains("STOPPING=1"));
    assert_eq!(balancer.exit_code(), Some(0));
}

#[test]
fn the_watchdog_is_fed_while_all_workers_make_progress() {
    use std::os::unix::net::UnixDatagram;
    let host = Host::new();
    let folder = Folder::with(&host.config());
    let manager = UnixDatagram::bind(folder.path().join("notify")).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let (config, mut command) = (folder.config(), command());
    command.env("WATCHDOG_USEC", "1000000").env_remove("WATCHDOG_PID");
    let balancer = Balancer::start_as(command, host, folder, config);
    let mut fed = 0;
    for _ in 0..20 {
        let mut message = [0; 500];
        let len = manager.recv(&mut message).unwrap();
        fed += usize::from(message[..len].starts_with(b"WATCHDOG=1"));
    }
    assert!(fed >= 15, "{fed}");
    assert_eq!(balancer.metric("quic_lb_workers_stuck"), 0.0);
}

#[test]
fn the_log_says_where_it_listens() {
    let host = Host::new();
    let mut balancer = Balancer::start(host);
    let listening = balancer.wait_for_record("listening");
    assert_eq!(listening["listener"], "edge");
    assert_eq!(listening["address"], host.at(4433).to_string());
    let admin = balancer.wait_for_record("admin interface");
    assert_eq!(admin["address"], host.at(9090).to_string());
}

#[test]
fn the_admin_interface_answers_each_path_and_refuses_the_rest_clearly() {
    let balancer = Balancer::start(Host::new());
    assert_eq!(balancer.get("/healthz").json(), json!({ "healthy": true }));
    assert_eq!(balancer.get("/readyz").json(), json!({ "ready": true }));
    let page = balancer.get("/");
    assert!(page.head.contains("content-type: text/html"), "{page:?}");
    assert!(page.body.contains("<td>web</td><td>a</td>"), "{page:?}");
    let metrics = balancer.get("/metrics");
    assert!(metrics.head.contains("content-type: text/plain; version=0.0.4"), "{metrics:?}");

    let backends = balancer.get("/api/v1/backends").json();
    assert_eq!(
        backends[1],
        json!({
            "pool": "web",
            "name": "b",
            "address": balancer.host.at(5002),
            "check": null,
            "drain": null,
            "live": { "connections": 0, "flows": 0, "heard_seconds_ago": null, "by_config_id": {} },
            "state": "active",
            "wanted": "active",
            "wanted_by": "file",
            "command": null,
            "weight": 2,
            "weight_percent": 100,
            "server_ids": { "0": "0002" },
            "datagrams_forwarded": 0,
            "datagrams_returned": 0,
            "refused": 0,
            "refused_by_errno": {},
            "misnamed": 0,
            "half_open": null,
            "honours_tokens": null, "token_keys": null,
            "clock_skew_seconds": null,
        })
    );
    let config = balancer.get("/api/v1/config").json();
    assert_eq!(config["pools"][0]["quic_lb"][0]["key"], "masked");

    for (method, path, status) in [
        ("GET", "/nothing", 404),
        ("POST", "/metrics", 405),
        ("DELETE", "/api/v1/backends", 405),
        ("GET", "/api/v1/backends/web/a/drain", 405),
        ("POST", "/api/v1/backends/web/x/drain", 404),
        ("POST", "/api/v1/backends/x/a/activate", 404),
        ("POST", "/api/v1/backends/web/a/explode", 404),
        ("GET", "/api/v1/upgrade", 405),
    ] {
        let answer = balancer.http(method, path, "");
        assert_eq!(answer.status, status, "{method} {path}: {answer:?}");
        assert!(answer.json()["error"].is_string(), "{answer:?}");
    }
    assert!(balancer.http("POST", "/metrics", "").head.contains("allow: get"));
    assert_eq!(balancer.http("HEAD", "/readyz", "").status, 200);
}

/// The command knows the file alone; the running balancer knows its clients too.
#[test]
fn the_running_balancer_explains_by_what_its_workers_remember() {
    // No server is named, so that the 4-tuple decides.
    const UNROUTABLE: &str = "40e0000000000000000000000000000000";
    let host = Host::new();
    let (_a, _b) = (Server::start(host.at(5001), "a"), Server::start(host.at(5002), "b"));
    let balancer = Balancer::start(host);
    let explain = |from: SocketAddr, hex: &str, headers: &str| {
        let path = format!("/api/v1/explain?from={from}&hex={hex}");
        let answer = balancer.http("GET", &path, headers);
        assert_eq!(answer.status, 200, "{answer:?}");
        answer
    };
    // So many clients that each worker has some.
    let clients: Vec<_> = (0..12).map(|_| balancer.client()).collect();
    for (client, name) in clients.iter().zip(["a", "b"].into_iter().cycle()) {
        assert!(client.ask(&short(&balancer.cid(name))).starts_with(name));
        let text = explain(client.address(), UNROUTABLE, "").body;
        let remembered =
            format!("rule 4 four_tuple      this 4-tuple is remembered: backend {name}\n");
        assert!(text.contains(&remembered), "{text}");
        let verdict = format!("verdict: forward to backend {name} of pool web at ");
        assert!(text.contains(&verdict) && text.ends_with(" by rule four_tuple\n"), "{text}");
    }

    let from = clients[0].address();
    let json = explain(from, UNROUTABLE, "Accept: application/json\r\n").json();
    let verdict = json!({
        "does": "forward",
        "pool": "web",
        "backend": "a",
        "address": host.at(5001),
        "rule": "four_tuple",
        "retry": false,
    });
    assert_eq!(json[0]["verdict"], verdict);
    assert_eq!((&json[0]["listener"], &json[0]["bytes"]), (&json!("edge"), &json!(17)));
    assert_eq!(json[0]["rules"][4], json!({ "rule": "fallback", "asked": false }));

    // Of a stranger, it says what the command says, word for word.
    let stranger = host.at(1);
    for hex in [UNROUTABLE, "c000000001", ""] {
        let from = stranger.to_string();
        let command = balancer.folder.run(&["explain"], &["--from", &from, hex]).done();
        assert_eq!(explain(stranger, hex, "").body, command);
    }
}

#[test]
fn to_explain_changes_nothing() {
    let host = Host::new();
    let _b = Server::start(host.at(5002), "b");
    let mut balancer = Balancer::start(host);
    let client = balancer.client();
    client.ask(&short(&balancer.cid("b")));
    let flows = "quic_lb_backend_flows{backend=\"b\",pool=\"web\"}";
    balancer.wait("the sweep", |balancer| balancer.metric(flows) == 1.0);
    let seen = || {
        let samples = balancer.metrics().into_iter();
        // To look is work, too.
        let samples = samples.filter(|(name, _)| !name.starts_with("quic_lb_worker_cpu_seconds"));
        samples.filter(|(name, _)| name.starts_with("quic_lb_")).collect::<Vec<_>>()
    };
    let before = seen();
    let hex: String = initial(7).iter().map(|octet| format!("{octet:02x}")).collect();
    for from in [client.address(), host.at(1)] {
        for _ in 0..3 {
            let answer = balancer.get(&format!("/api/v1/explain?from={from}&hex={hex}"));
            assert!(answer.body.contains("verdict: forward to backend"), "{answer:?}");
        }
    }
    assert_eq!(seen(), before);
}

#[test]
fn a_question_that_cannot_be_answered_gets_a_sentence_that_says_what_would_be_right() {
    let balancer = Balancer::start(Host::new());
    for (query, status, sentence) in [
        ("", 400, "from is missing: the client's address and port, such as from=192.0.2.7:50000"),
        ("?from=192.0.2.7:5", 400, "hex is missing: the UDP payload in hex"),
        ("?from=nobody&hex=40", 400, "from=\"nobody\" is no address"),
        ("?from=192.0.2.7:5&hex=4x", 400, "hex: 'x' is not a hex digit"),
        ("?from=192.0.2.7:5&hex=40&listener=x", 404, "there is no listener \"x\"; there is edge"),
        ("?from=192.0.2.7:5&hex=40&port=7", 400, "\"port\" is none of from, hex, listener and to"),
    ] {
        let answer = balancer.get(&format!("/api/v1/explain{query}"));
        assert_eq!(answer.status, status, "{query}: {answer:?}");
        let told = answer.json()["error"].as_str().unwrap().to_owned();
        assert!(told.contains(sentence), "{query}: {told}");
    }
    assert_eq!(balancer.http("POST", "/api/v1/explain?from=192.0.2.7:5&hex=40", "").status, 405);
    let huge = format!("/api/v1/explain?from=192.0.2.7:5&hex={}", "40".repeat(100_000));
    assert!(balancer.get(&huge).status >= 400);
    assert_eq!(balancer.get("/readyz").status, 200);
}

#[test]
fn the_admin_interface_stands_what_is_not_http() {
    let balancer = Balancer::start(Host::new());
    assert_eq!(
        balancer.raw_http(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n").status,
        400
    );
    let huge = format!("GET / HTTP/1.1\r\nHost: x\r\nA: {}\r\n\r\n", "a".repeat(100_000));
    assert!([400, 431].contains(&balancer.raw_http(huge.as_bytes()).status));
    // Clients that connect and say nothing leave room for others.
    let _silent: Vec<_> =
        (0..20).map(|_| TcpStream::connect(balancer.host.at(9090)).unwrap()).collect();
    assert_eq!(balancer.get("/readyz").status, 200);
}

/// Each says that it has something to say, and does not say it.
#[test]
fn requests_without_their_bodies_leave_room_for_others() {
    let balancer = Balancer::start(Host::new());
    let head = b"POST /api/v1/backends/web/a/half_open HTTP/1.1\r\nHost: localhost\r\n\
        Content-Type: application/json\r\nContent-Length: 20\r\n\r\n";
    let unfinished: Vec<_> = (0..200)
        .map(|_| {
            let mut stream = TcpStream::connect(balancer.host.at(9090)).unwrap();
            // Some make room for others before they have said anything.
            let _ = stream.write_all(head);
            stream
        })
        .collect();
    assert_eq!(balancer.get("/readyz").status, 200);
    assert_eq!(balancer.get("/metrics").status, 200);
    assert_eq!(balancer.post("/api/v1/backends/web/a/drain").status, 200);
    drop(unfinished);
}

/// A page of somebody else reaches the interface by a name that is made to lead to it.
#[test]
fn a_host_that_is_not_ours_is_refused() {
    let host = Host::new();
    let names = format!("admin: {{ host_names: [lb.example], address: \"{}\" }}", host.at(9090));
    let config =
        host.config().replace(&format!("admin: {{ address: \"{}\" }}", host.at(9090)), &names);
    let balancer = Balancer::start_with(host, &config);
    let ask = |method: &str, path: &str, name: &str| {
        let request =
            format!("{method} {path} HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n");
        balancer.raw_http(request.as_bytes()).status
    };
    let drain = "/api/v1/backends/web/a/drain";
    for (name, status) in [
        ("rebound.example", 421),
        ("rebound.example:9090", 421),
        ("localhost:9090", 200),
        ("lb.example:9090", 200),
        (&*host.at(9090).to_string(), 200),
    ] {
        for path in ["/", "/metrics", "/api/v1/config", "/api/v1/backends"] {
            assert_eq!(ask("GET", path, name), status, "{path} of {name}");
        }
        assert_eq!(ask("POST", drain, name), status, "{name}");
        assert_eq!(ask("GET", "/readyz", name), 200, "probes ask by any name");
    }
}

#[test]
fn commands_are_not_taken_from_web_pages() {
    let balancer = Balancer::start(Host::new());
    let path = "/api/v1/backends/web/a/drain";
    let answer = balancer.http("POST", path, "Origin: http://example.org\r\n");
    assert_eq!(answer.status, 403, "{answer:?}");
    assert_eq!(balancer.backend("a")["state"], "active");
}

#[test]
fn a_file_with_mistakes_is_refused_as_a_whole_and_everything_goes_on() {
    let host = Host::new();
    let _a = Server::start(host.at(5001), "a");
    let mut balancer = Balancer::start(host);
    let (client, cid) = (balancer.client(), balancer.cid("a"));
    let before = client.ask(&short(&cid));

    let good = host.config();
    let bad =
        good.replace("server_id: \"0001\"", "server_id: \"01\"").replace("weight: 2", "weight: 0");
    balancer.rewrite(&bad);
    balancer.wait_for_record("configuration rejected, the old one goes on");
    let mistakes = balancer.records("mistake in the configuration");
    assert_eq!(mistakes.len(), 2, "{}", balancer.log());
    assert!(mistakes.iter().all(|mistake| mistake["line"].is_u64()), "{mistakes:?}");
    assert_eq!(balancer.metric(REJECTED), 1.0);
    assert_eq!(client.ask(&short(&cid)), before, "the flow goes on");
    assert_eq!(balancer.backend("b")["weight"], 2);

    assert_eq!(balancer.metric(SUCCESSFUL), 0.0);

    // Whoever asks again is told again; it is the same file, and counted once.
    balancer.signal("HUP");
    balancer.wait("second rejection", |balancer| {
        balancer.records("configuration rejected, the old one goes on").len() == 2
    });
    let rejected = balancer.records("configuration rejected, the old one goes on");
    assert!(rejected.iter().chain(&mistakes).all(|record| record["level"] == "ERROR"));

    balancer.rewrite(&good);
    balancer.wait("the correction", |balancer| balancer.metric(APPLIED) == 1.0);
    assert_eq!((balancer.metric(REJECTED), balancer.metric(SUCCESSFUL)), (1.0, 1.0));
    balancer.signal("HUP");
    balancer.wait("the answer", |balancer| {
        balancer.records("configuration unchanged").iter().any(|record| record["level"] == "INFO")
    });
    assert_eq!(balancer.metric(APPLIED), 1.0, "nothing was wrong in between");
}

/// The signal does not wait until the writer of the file is done, nor does what it leads to count twice.
#[test]
fn a_write_and_a_signal_together_count_once() {
    let host = Host::new();
    let mut balancer = Balancer::start(host);
    let reads = |balancer: &Balancer| balancer.records("configuration unchanged").len();
    balancer.wait("the first look", |balancer| reads(balancer) == 1);
    balancer.rewrite(&host.config().replace("weight: 2", "weight: 3"));
    balancer.signal("HUP");
    balancer.wait("the reload and the look after the write", |balancer| reads(balancer) == 2);
    assert_eq!((balancer.metric(APPLIED), balancer.metric(REJECTED)), (1.0, 0.0));
    let changes = balancer.records("configuration change");
    let [change] = changes.as_slice() else { panic!("{changes:?}") };
    assert_eq!(
        (&change["at"], &change["old"], &change["new"]),
        (&json!("pools[web].backends[b].weight"), &json!("2"), &json!("3"))
    );
}

#[test]
fn the_command_reload_waits_and_says_what_came_of_it() {
    let host = Host::new();
    let mut balancer = Balancer::start(host);
    let admin = host.at(9090).to_string();
    let reload = || quic_lb(&["reload", "--admin", &admin]);
    assert!(reload().done().starts_with("configuration unchanged; digest "));
    balancer.rewrite(&host.config().replace("weight: 2", "weight: 3"));
    let told = reload().done();
    assert!(told.starts_with("pools[web].backends[b].weight: 3, was 2\n"), "{told}");
    assert!(told.contains("configuration applied: 1 change; digest "), "{told}");
    assert_eq!(balancer.backend("b")["weight"], 3, "it waits until it is in force");

    balancer.rewrite(&host.config().replace("weight: 2", "weight: 0"));
    let refused = reload().failed(1);
    assert!(refused.contains("pools[0].backends[1].weight"), "{refused}");
    assert!(refused.contains("rejected, the old one goes on"), "{refused}");
    balancer.rewrite(&host.config().replace("workers: 2", "workers: 1"));
    let refused = reload().failed(1);
    assert!(refused.contains("workers changes from 2 to 1, which needs a restart"), "{refused}");
    assert_eq!((balancer.metric(REJECTED), balancer.metric(SUCCESSFUL)), (2.0, 0.0));

    balancer.signal("TERM");
    balancer.exit_code();
    let nobody = reload().failed(1);
    assert!(nobody.contains("no admin interface answers"), "{nobody}");
}

/// One for each flow; the rest is as the kernel has it, where it may be asked: tables of workers are not the process's.
#[test]
fn workers_tell_how_many_descriptors_they_have() {
    const FLOWS: usize = 20;
    let host = Host::new();
    let _a = Server::start(host.at(5001), "a");
    let mut balancer = Balancer::start(host);
    let cid = balancer.cid("a");
    let of_workers = |balancer: &Balancer| {
        let of =
            |worker| balancer.metric(&format!("quic_lb_open_descriptors{{worker=\"{worker}\"}}"));
        [of(0), of(1)]
    };
    let before: f64 = of_workers(&balancer).iter().sum();
    assert!(before >= 2.0 * 6.0, "{before}");
    let clients: Vec<_> = (0..FLOWS).map(|_| balancer.client()).collect();
    for client in &clients {
        client.ask(&short(&cid));
    }
    balancer.wait("descriptors", |balancer| {
        of_workers(balancer).iter().sum::<f64>() == before + FLOWS as f64
    });
    let process = balancer.process();
    for task in std::fs::read_dir(format!("/proc/{process}/task")).unwrap() {
        let task = task.unwrap().path();
        let name = std::fs::read_to_string(task.join("comm")).unwrap();
        let Some(worker) = name.trim().strip_prefix("worker-") else { continue };
        // The process is not dumpable: without root its owner may not look.
        let Ok(open) = std::fs::read_dir(task.join("fd")) else { continue };
        let told = of_workers(&balancer)[worker.parse::<usize>().unwrap()];
        assert_eq!(told, open.count() as f64, "worker {worker}");
    }
    let limit = balancer.metric("quic_lb_descriptor_limit{worker=\"1\"}");
    assert!(limit >= before + FLOWS as f64, "{limit}");
}

#[test]
fn check_says_what_a_reload_would_change_or_why_it_would_be_refused() {
    let host = Host::new();
    let balancer = Balancer::start(host);
    let url = format!("http://{}/", host.at(9090));
    let check = |config: &str, more: &[&str]| {
        let path = balancer.folder.write("new.yaml", config.as_bytes());
        let args = ["check", "--against", &url, path.to_str().unwrap()];
        quic_lb(&[&args[..], more].concat())
    };
    // With a word about timeouts.drain.
    let same = check(&host.config(), &[]).out;
    assert!(
        same.ends_with(&format!("a reload of {} would change nothing\n", host.at(9090))),
        "{same}"
    );
    let other = "f09245765f80256934e50c66207f8f95";
    let config = host.config().replace("weight: 2", "weight: 3").replace(KEY, other);
    let applied = check(&config, &[]);
    assert_eq!(applied.code, Some(0), "{applied:?}");
    let applied = applied.out;
    assert!(applied.contains("pools[web].backends[b].weight: 3, was 2\n"), "{applied}");
    assert!(applied.contains("pools[web].quic_lb[0].key: check value "), "{applied}");
    assert!(applied.contains("would be applied: 2 changes\n"), "{applied}");
    assert!(!applied.contains(KEY) && !applied.contains(other), "{applied}");

    let refused = check(
        &host
            .config()
            .replace("workers: 2\nlimits: { flows: 1000", "workers: 3\nlimits: { flows: 7"),
        &["--json"],
    );
    assert_eq!(refused.code, Some(3), "{refused:?}");
    let facts: Value = serde_json::from_str(&refused.out).unwrap();
    let reload = &facts[0]["reload"];
    assert_eq!(reload["refused"][0], "workers changes from 2 to 3, which needs a restart");
    assert_eq!(
        reload["refused"][1],
        "limits.flows changes from 1000 to 7, which takes `quic-lb upgrade`"
    );
    assert_eq!(reload["refused"].as_array().unwrap().len(), 2);
    assert_eq!(
        (balancer.metric(APPLIED), balancer.metric(REJECTED)),
        (0.0, 0.0),
        "nothing is done"
    );
    assert_eq!(check("listeners: []\n", &[]).code, Some(1));
}

#[test]
fn a_reload_that_would_lose_connections_has_to_be_forced() {
    let host = Host::new();
    let (_a, _b) = (Server::start(host.at(5001), "a"), Server::start(host.at(5002), "b"));
    let mut balancer = Balancer::start(host);
    let (client, nonce) = (0..100)
        .map(|nonce| (balancer.client(), nonce))
        .find(|(client, nonce)| client.ask(&initial(*nonce)).starts_with("a "))
        .expect("one of many goes to a");
    balancer.wait("the census", |balancer| {
        client.send(&initial(nonce));
        balancer.backend("a")["live"]["connections"] == 1
    });
    let line = host.config().lines().find(|line| line.contains("name: a,")).unwrap().to_owned();
    balancer.rewrite(&host.config().replace(&line, ""));
    let admin = host.at(9090).to_string();
    let reload = |more: &[&str]| quic_lb(&[&["reload", "--admin", &admin], more].concat());
    // Whoever asks before is told the same.
    let path = balancer.folder.config();
    let foreseen = quic_lb(&["check", "--against", &admin, path.to_str().unwrap()]);
    assert_eq!(foreseen.code, Some(3), "{foreseen:?}");
    let lost = "backend web/a: about 1 live connections would lose their way: drain first";
    assert!(foreseen.out.contains(&format!("refused: {lost}")), "{foreseen:?}");
    let refused = reload(&[]).failed(1);
    assert!(refused.contains(lost), "{refused}");
    assert!(refused.contains("--force"), "{refused}");
    assert_eq!((balancer.metric(REJECTED), balancer.metric(SUCCESSFUL)), (1.0, 0.0));
    assert!(client.ask(&initial(nonce)).starts_with("a "));
    let done = reload(&["--force"]).done();
    assert!(done.contains("pools[web].backends[a]: gone"), "{done}");
    assert!(balancer.log().contains("taken away although it is in use"), "{}", balancer.log());
    assert_eq!(balancer.metric(SUCCESSFUL), 1.0);
}

#[test]
fn a_config_id_that_live_connections_use_is_taken_away_by_force_alone_and_counted() {
    let host = Host::new();
    let (_a, _b) = (Server::start(host.at(5001), "a"), Server::start(host.at(5002), "b"));
    let mut balancer = Balancer::start(host);
    let cid = balancer.cid("a");
    let client = (0..100).map(|nonce| (balancer.client(), nonce));
    let client = client.into_iter().find(|(of, nonce)| of.ask(&initial(*nonce)).starts_with("a "));
    let (client, _) = client.expect("one of many goes to a");
    balancer.wait("the census", |balancer| {
        client.ask(&short(&cid));
        balancer.backend("a")["live"]["by_config_id"]["0"]["connections"].as_u64() > Some(0)
    });
    let unknown = |config_id: u8| {
        format!("quic_lb_unknown_server_id_total{{config_id=\"{config_id}\",listener=\"edge\"}}")
    };
    // Another key makes another configuration of it, whatever its number.
    let other = host.config().replace(KEY, "f09245765f80256934e50c66207f8f95");
    let without = host.config().replace("config_id: 0", "config_id: 1");
    let admin = host.at(9090).to_string();
    let reload = |more: &[&str]| quic_lb(&[&["reload", "--admin", &admin], more].concat());
    let lost = "connection IDs of web/a with config ID 0: about ";
    for file in [&other, &without] {
        client.ask(&short(&cid));
        balancer.rewrite(file);
        let refused = reload(&[]).failed(1);
        assert!(refused.contains(lost) && refused.contains("--force"), "{refused}");
        assert!(client.ask(&short(&cid)).starts_with("a "), "it goes on");
    }
    assert_eq!((balancer.metric(&unknown(0)), balancer.metric(SUCCESSFUL)), (0.0, 0.0));

    reload(&["--force"]).done();
    let taken = balancer.wait_for_record("taken away although it is in use");
    assert!(taken["taken"].as_str().unwrap().starts_with(lost), "{taken}");
    assert_eq!(taken["level"], "WARN");
    // The client itself is known by its address; from elsewhere nothing tells whose it is.
    let moved = balancer.client();
    balancer.wait("the count", |balancer| {
        moved.send(&short(&cid));
        balancer.metric(&unknown(0)) > 0.0
    });
    assert_eq!(balancer.metric(&unknown(1)), 0.0);
}

/// To open a pipe is to wait for its writer, who never comes.
#[test]
fn a_pipe_in_place_of_the_file_holds_no_reload_up() {
    let host = Host::new();
    let mut balancer = Balancer::start(host);
    let pipe = balancer.folder.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    std::fs::rename(pipe, balancer.folder.config()).unwrap();
    balancer.wait_for_record("configuration rejected, the old one goes on");
    assert_eq!(balancer.metric(REJECTED), 1.0);
    let mistakes = balancer.records("mistake in the configuration");
    assert!(mistakes[0]["found"].as_str().unwrap().contains("not a regular file"), "{mistakes:?}");
    balancer.rewrite(&host.config().replace("weight: 2", "weight: 3"));
    balancer.wait("the reload", |balancer| balancer.metric(APPLIED) == 1.0);
}

#[test]
fn a_good_file_is_applied_without_touching_a_flow() {
    let host = Host::new();
    let (_a, _c) = (Server::start(host.at(5001), "a"), Server::start(host.at(5003), "c"));
    let mut balancer = Balancer::start(host);
    let (client, a) = (balancer.client(), balancer.cid("a"));
    let before = client.ask(&short(&a));
    let digest = balancer.metrics().into_keys().find(|name| name.contains("config_info")).unwrap();

    let b = format!("name: b, address: \"{}\", server_id: \"0002\"", host.at(5002));
    let c = format!("name: c, address: \"{}\", server_id: \"0003\"", host.at(5003));
    balancer.rewrite(&host.config().replace(&b, &c));
    balancer.wait("the new configuration", |balancer| balancer.metric(APPLIED) == 1.0);

    assert_eq!(client.ask(&short(&a)), before, "same upstream port");
    assert!(client.ask(&short(&balancer.cid("c"))).starts_with("c "));
    let names: Vec<_> = balancer
        .get("/api/v1/backends")
        .json()
        .as_array()
        .unwrap()
        .iter()
        .map(|backend| backend["name"].clone())
        .collect();
    assert_eq!(names, ["a", "c"]);
    assert!(!balancer.metrics().contains_key(&digest), "another digest");
    assert_eq!(balancer.metric(REJECTED), 0.0);
}

#[test]
fn other_timeouts_hold_for_flows_that_exist() {
    let host = Host::new();
    let _a = Server::start(host.at(5001), "a");
    let mut balancer = Balancer::start(host);
    balancer.client().ask(&short(&balancer.cid("a")));
    assert_eq!(balancer.metric("quic_lb_flows{listener=\"edge\"}"), 1.0);
    balancer.rewrite(&host.config().replace("timeouts: {", "timeouts: { flow_idle: \"1s\","));
    balancer.wait("the end of the flow", |balancer| {
        balancer.metric("quic_lb_flows{listener=\"edge\"}") == 0.0
    });
    assert_eq!(balancer.metric(APPLIED), 1.0);
}

/// A mounted config map: the file is a link to a link to a folder, and that one is swapped.
#[test]
fn a_swapped_link_is_noticed() {
    use std::os::unix::fs::symlink;
    let host = Host::new();
    let folder = Folder::with("");
    let base = folder.path().to_owned();
    for (name, weight) in [("first", "2"), ("second", "5")] {
        std::fs::create_dir(base.join(name)).unwrap();
        let config = host.config().replace("weight: 2", &format!("weight: {weight}"));
        std::fs::write(base.join(name).join("mounted.yaml"), config).unwrap();
    }
    symlink("first", base.join("..data")).unwrap();
    symlink("..data/mounted.yaml", base.join("mounted.yaml")).unwrap();
    let mut balancer = Balancer::start_at(host, folder, base.join("mounted.yaml"));
    assert_eq!(balancer.backend("b")["weight"], 2);
    symlink("second", base.join("..data_tmp")).unwrap();
    std::fs::rename(base.join("..data_tmp"), base.join("..data")).unwrap();
    balancer.wait("the new weight", |balancer| balancer.backend("b")["weight"] == 5);
}

/// No file event can tell of a key file elsewhere; the look now and then finds it.
#[test]
fn a_new_key_in_a_key_file_is_noticed() {
    let host = Host::new();
    let folder = Folder::with("");
    std::fs::create_dir(folder.path().join("keys")).unwrap();
    folder.write("keys/web.key", KEY.as_bytes());
    let config = host.config().replace(&format!("key: \"{KEY}\""), "key_file: keys/web.key");
    folder.write("lb.yaml", config.as_bytes());
    let path = folder.config();
    let mut balancer = Balancer::start_at(host, folder, path);
    balancer.folder.write("keys/web.key", KEY.replace('8', "7").as_bytes());
    balancer.wait("the new key", |balancer| balancer.metric(APPLIED) == 1.0);
}

#[test]
fn what_needs_a_restart_is_refused_and_named() {
    let host = Host::new();
    let mut balancer = Balancer::start(host);
    let config = host
        .config()
        .replace("workers: 2", "workers: 1")
        .replace("flows: 1000", "flows: 2000")
        .replace("weight: 2", "weight: 3");
    balancer.rewrite(&config);
    balancer.wait_for_record("configuration rejected, the old one goes on");
    let reasons: Vec<_> = balancer
        .records("change that a running process cannot follow")
        .into_iter()
        .map(|record| record["reason"].clone())
        .collect();
    assert_eq!(
        reasons,
        [
            "workers changes from 2 to 1, which needs a restart",
            "limits.flows changes from 1000 to 2000, which takes `quic-lb upgrade`"
        ]
    );
    assert_eq!(balancer.metric(REJECTED), 1.0);
    assert_eq!(balancer.backend("b")["weight"], 2, "nothing of it is applied");
}

#[test]
fn a_drained_backend_keeps_its_connections_and_gets_no_new_ones() {
    let host = Host::new();
    let (_a, _b) = (Server::start(host.at(5001), "a"), Server::start(host.at(5002), "b"));
    let mut balancer = Balancer::start(host);
    let client = balancer.client();
    let cid = balancer.cid("a");
    let before = client.ask(&short(&cid));

    let drained = balancer.post("/api/v1/backends/web/a/drain");
    assert_eq!((drained.status, &drained.json()["state"]), (200, &json!("draining")));
    assert_eq!(client.ask(&short(&cid)), before);
    for nonce in 0..20 {
        assert!(balancer.client().ask(&initial(nonce)).starts_with("b "));
    }

    balancer.rewrite(&host.config().replace("weight: 2", "weight: 3"));
    balancer.wait("the reload", |balancer| balancer.backend("b")["weight"] == 3);
    let a = balancer.backend("a");
    assert_eq!((&a["state"], &a["wanted_by"]), (&json!("draining"), &json!("operator")));
    let sample = "quic_lb_backend_state{backend=\"a\",pool=\"web\",state=\"draining\"}";
    assert_eq!(balancer.metric(sample), 1.0);

    let activated = balancer.post("/api/v1/backends/web/a/activate").json();
    assert_eq!((&activated["state"], &activated["wanted_by"]), (&json!("active"), &json!("file")));
}

#[test]
fn drain_waits_for_the_last_connection_and_activate_takes_it_back() {
    let host = Host::new();
    let (_a, _b) = (Server::start(host.at(5001), "a"), Server::start(host.at(5002), "b"));
    let mut balancer = Balancer::start(host);
    let (client, nonce) = (0..100)
        .map(|nonce| (balancer.client(), nonce))
        .find(|(client, nonce)| client.ask(&initial(*nonce)).starts_with("a "))
        .expect("one of many goes to a");
    let admin = host.at(9090).to_string();
    let mut drain = command()
        .args(["drain", "--wait", "--quiet", "3s", "--admin", &admin, "web/a"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // As long as the connection is heard it lives.
    for _ in 0..60 {
        assert!(client.ask(&initial(nonce)).starts_with("a "), "it stays where it is");
        assert_eq!(drain.try_wait().unwrap(), None, "{}", balancer.backend("a"));
        thread::sleep(Duration::from_millis(100));
    }
    let a = balancer.backend("a");
    assert_eq!((&a["state"], &a["drain"]["complete"]), (&json!("draining"), &json!(false)));
    assert_eq!(a["live"]["by_config_id"]["none"]["connections"], 1, "{a}");
    assert_eq!(balancer.metric("quic_lb_backend_flows{backend=\"a\",pool=\"web\"}"), 1.0);
    balancer.wait("the end of the drain", |_| drain.try_wait().unwrap().is_some());
    let ended = drain.wait_with_output().unwrap();
    assert!(ended.status.success());
    let told = String::from_utf8(ended.stdout).unwrap();
    assert_eq!(told, "web/a is drained: silent for 3 s\n");

    let rotation = balancer.get("/api/v1/rotation").json();
    assert_eq!((&rotation[0]["pool"], &rotation[0]["connections"]), (&json!("web"), &json!(0)));

    let waited =
        ["drain", "--wait", "--quiet", "1h", "--timeout", "10ms", "--admin", &admin, "web/a"];
    quic_lb(&waited).failed(3);
    let told = quic_lb(&["activate", "--admin", &admin, "web/a"]).done();
    assert_eq!(told, "web/a is active\n");
    let complaint = quic_lb(&["drain", "--admin", &admin, "web/c"]).failed(1);
    assert!(complaint.contains("there is no backend \"c\" in a pool \"web\""), "{complaint}");
    let nobody = host.at(9).to_string();
    let complaint = quic_lb(&["drain", "--admin", &nobody, "web/a"]).failed(1);
    assert!(complaint.contains("--admin says where it is"), "{complaint}");
}

#[test]
fn what_operators_command_survives_the_process_and_says_who_and_why() {
    let host = Host::new();
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let text = format!("state_dir: \"{}\"\n{}", state.display(), host.config());
    let mut balancer = Balancer::start_with(host, &text);
    let admin = host.at(9090).to_string();
    let drain = ["drain", "--admin", &admin, "--reason", "new disks & kernel", "web/a"];
    quic_lb(&drain).done();
    let of_a = |balancer: &Balancer| {
        let a = balancer.backend("a");
        (a["state"].clone(), a["command"].clone())
    };
    let (_, given) = of_a(&balancer);
    assert_eq!(given["reason"], "new disks & kernel");
    assert!(
        given["by"].is_string() && given["unix_time"].as_u64() > Some(1_700_000_000),
        "{given}"
    );

    balancer.signal("KILL");
    balancer.exit_code();
    let mut balancer = Balancer::start_with(host, &text);
    balancer.wait("what was in force", |balancer| of_a(balancer).0 == "draining");
    assert_eq!(of_a(&balancer).1, given);
    assert!(balancer.log().contains("operator's command from before"), "{}", balancer.log());
    // One that is started by mistake and finds the address taken leaves the file to its owner.
    let complaint = run_in_vain(&text.replace(":9090", ":9191"));
    assert!(complaint.contains(":4433"), "{complaint}");
    quic_lb(&["activate", "--admin", &admin, "web/a"]).done();
    balancer.signal("KILL");
    balancer.exit_code();
    let balancer = Balancer::start_with(host, &text);
    assert_eq!(of_a(&balancer), (json!("active"), Value::Null));
}

#[test]
fn a_backend_that_refuses_goes_down_and_comes_back_by_itself() {
    let host = Host::new();
    let _b = Server::start(host.at(5002), "b");
    let mut balancer = Balancer::start(host);
    let (client, cid) = (balancer.client(), balancer.cid("a"));
    let down = "quic_lb_backend_state{backend=\"a\",pool=\"web\",state=\"down\"}";
    balancer.wait("state down", |balancer| {
        client.send(&short(&cid));
        balancer.metric(down) == 1.0
    });
    assert_eq!(balancer.backend("a")["state"], "down");
    let refused =
        "quic_lb_backend_refused_total{backend=\"a\",errno=\"ECONNREFUSED\",pool=\"web\"}";
    assert!(balancer.metric(refused) >= 3.0);
    let record = balancer.wait_for_record("backend gets no new connections");
    assert_eq!((&record["backend"], &record["level"]), (&json!("a"), &json!("WARN")));

    let _a = Server::start(host.at(5001), "a");
    assert!(client.ask(&short(&cid)).starts_with("a "), "the connection was never given up");
    balancer.wait("state active", |balancer| balancer.backend("a")["state"] == "active");
}

#[test]
fn sigterm_without_flows_ends_at_once() {
    for signal in ["TERM", "INT"] {
        let mut balancer = Balancer::start(Host::new());
        balancer.signal(signal);
        assert_eq!(balancer.exit_code(), Some(0), "{}", balancer.log());
        assert_eq!(balancer.records("ended")[0]["reason"], "no flow is left");
    }
}

#[test]
fn sigterm_goes_on_forwarding_and_a_second_signal_ends_it() {
    let host = Host::new();
    let _a = Server::start(host.at(5001), "a");
    let mut balancer = Balancer::start(host);
    let (client, cid) = (balancer.client(), balancer.cid("a"));
    let before = client.ask(&short(&cid));
    balancer.signal("TERM");
    balancer.wait("no readiness", |balancer| balancer.get("/readyz").status == 503);
    assert_eq!(balancer.get("/readyz").json()["reason"], "draining");
    assert_eq!(balancer.get("/healthz").status, 200);
    assert_eq!(balancer.metric("quic_lb_ready"), 0.0);
    assert_eq!(client.ask(&short(&cid)), before);
    balancer.signal("TERM");
    assert_eq!(balancer.exit_code(), Some(4), "it was cut short\n{}", balancer.log());
}

#[test]
fn sigterm_ends_when_no_connection_lives_any_more() {
    let host = Host::new();
    let (_a, _b) = (Server::start(host.at(5001), "a"), Server::start(host.at(5002), "b"));
    let mut balancer = Balancer::start(host);
    let client = balancer.client();
    client.ask(&initial(1));
    balancer.signal("TERM");
    // Longer than a connection may be silent that lives.
    for _ in 0..40 {
        client.ask(&initial(1));
        assert!(balancer.records("ended").is_empty(), "{}", balancer.log());
        thread::sleep(Duration::from_millis(250));
    }
    assert_eq!(balancer.metric("quic_lb_flows{listener=\"edge\"}"), 1.0);
    assert_eq!(balancer.exit_code(), Some(0), "{}", balancer.log());
    assert_eq!(balancer.records("ended")[0]["reason"], "no connection lives");
}

#[test]
fn a_signal_for_a_log_that_is_off_does_not_kill() {
    let host = Host::new();
    let _a = Server::start(host.at(5001), "a");
    let mut balancer = Balancer::start(host);
    let (client, cid) = (balancer.client(), balancer.cid("a"));
    balancer.signal("USR1");
    let record = balancer.wait_for_record("the connection log is opened anew, if it is a file");
    assert_eq!((&record["signal"], &record["is_file"]), (&"SIGUSR1".into(), &false.into()));
    assert!(client.ask(&short(&cid)).starts_with("a "));
}

#[test]
fn draining_ends_when_its_time_is_over() {
    let host = Host::new();
    let _a = Server::start(host.at(5001), "a");
    let config = host.config().replace("drain: \"120s\"", "drain: \"1s\"");
    let mut balancer = Balancer::start_with(host, &config);
    balancer.client().ask(&short(&balancer.cid("a")));
    balancer.signal("TERM");
    assert_eq!(balancer.exit_code(), Some(0), "{}", balancer.log());
    assert_eq!(balancer.records("ended")[0]["reason"], "time to drain is over");
}

#[test]
fn an_address_in_use_is_told_in_one_sentence() {
    let host = Host::new();
    let taken = UdpSocket::bind(host.at(4433)).unwrap();
    let complaint = run_in_vain(&host.config());
    assert_one_sentence(&complaint, &host.at(4433).to_string());
    drop(taken);
    let _taken = TcpListener::bind(host.at(9090)).unwrap();
    let complaint = run_in_vain(&host.config());
    assert_one_sentence(&complaint, &host.at(9090).to_string());
}

#[test]
fn an_address_of_somebody_else_is_told_in_one_sentence() {
    let host = Host::new();
    let config = host.config().replace(&host.at(4433).to_string(), "192.0.2.77:4433");
    assert_one_sentence(&run_in_vain(&config), "192.0.2.77:4433");
}

/// Two balancers on one address would share its datagrams at random.
#[test]
fn a_second_balancer_does_not_join_the_first() {
    let host = Host::new();
    let balancer = Balancer::start(host);
    let config = host.config().replace(&host.at(9090).to_string(), &host.at(9091).to_string());
    assert_one_sentence(&run_in_vain(&config), "in use");
    assert_eq!(balancer.get("/readyz").status, 200);
}

#[test]
fn no_key_leaves_the_process() {
    let host = Host::new();
    let mut balancer = Balancer::start(host);
    let bad = host.config().replace("weight: 2", "weight: 0");
    balancer.rewrite(&bad);
    balancer.wait_for_record("configuration rejected, the old one goes on");
    balancer.rewrite(&host.config().replace("weight: 2", "weight: 3"));
    balancer.wait("the reload", |balancer| balancer.metric(APPLIED) == 1.0);
    for path in ["/", "/metrics", "/api/v1/backends", "/api/v1/config", "/nothing"] {
        assert!(!balancer.get(path).body.contains(KEY), "{path}");
    }
    balancer.signal("TERM");
    balancer.exit_code();
    assert!(!balancer.log().contains(KEY), "{}", balancer.log());
    assert!(!balancer.records("running").is_empty());
}

#[track_caller]
fn assert_one_sentence(complaint: &str, about: &str) {
    let lines: Vec<_> =
        complaint.lines().filter(|line| serde_json::from_str::<Value>(line).is_err()).collect();
    let [sentence] = lines.as_slice() else { panic!("{complaint}") };
    assert!(sentence.starts_with("quic-lb: ") && sentence.contains(about), "{sentence}");
}
