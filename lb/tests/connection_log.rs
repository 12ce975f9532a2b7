//! The connection log of a running balancer, which has given up the right to change any other file.

#![allow(clippy::unwrap_used, reason = "a failed test is a fine message")]
#![allow(clippy::disallowed_methods, reason = "tests are their own shell")]

mod support;

use std::{
    fs,
    net::UdpSocket,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use support::{
    Folder,
    balancer::{Balancer, Host, Server, initial, short},
};

/// Flows that end soon, and this in place of the section `log`.
fn config(host: Host, connections: &str) -> String {
    host.config()
        .replace("level: debug", &format!("level: debug{connections}"))
        .replace("drain: \"120s\"", "drain: \"0s\", flow_idle: \"1s\", flow_unanswered: \"200ms\"")
}

fn start(host: Host, connections: &str) -> Balancer {
    Balancer::start_with(host, &config(host, connections))
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Those in which all of these are so.
fn with<'a>(lines: &'a [Value], of: &[(&str, &str)]) -> Vec<&'a Value> {
    let has = |line: &&Value| of.iter().all(|(key, value)| line[key] == *value);
    lines.iter().filter(has).collect()
}

/// Waits for as many lines in which all of these are so.
fn wait_for(balancer: &mut Balancer, path: &Path, count: usize, of: &[(&str, &str)]) -> Vec<Value> {
    balancer.wait(&format!("{count} of {of:?} in {}", path.display()), |_| {
        with(&lines(path), of).len() >= count
    });
    with(&lines(path), of).into_iter().cloned().collect()
}

const EVERY: &str = ", connections: { path: connections.json }";

fn file(balancer: &Balancer) -> PathBuf {
    balancer.folder.path().join("connections.json")
}

#[test]
fn what_begins_and_ends_is_told_with_who_where_how_much_and_why() {
    let host = Host::new();
    let _a = Server::start(host.at(5001), "a");
    let silent = UdpSocket::bind(host.at(5002)).unwrap();
    let mut balancer = start(host, EVERY);
    let path = file(&balancer);
    let (client, cid) = (balancer.client(), balancer.cid("a"));
    let datagram = short(&cid);
    let answer = client.ask(&datagram);
    let unheard = balancer.client();
    unheard.send(&initial(1));
    let _ = silent;

    let begun = wait_for(&mut balancer, &path, 1, &[("event", "begun"), ("rule", "cid")]);
    let (address, port) = (client.address().ip().to_string(), client.address().port());
    let facts = [
        ("listener", "edge"),
        ("client_address", &*address),
        ("pool", "web"),
        ("backend", "a"),
        ("opening", "path_change"),
    ];
    assert_eq!(with(&begun, &facts).len(), 1, "{begun:?}");
    assert_eq!(begun[0]["client_port"], port);
    assert_eq!(begun[0]["version"], Value::Null, "a short header has none");

    let idle = [("event", "ended"), ("reason", "idle"), ("backend", "a"), ("rule", "cid")];
    let ended = wait_for(&mut balancer, &path, 1, &idle).remove(0);
    let number = |key: &str| ended[key].as_u64().unwrap();
    let asked = number("forwarded_datagrams");
    assert!(asked >= 1);
    assert_eq!(number("forwarded_bytes"), asked * datagram.len() as u64);
    assert_eq!(number("returned_datagrams"), asked);
    assert_eq!(number("returned_bytes"), asked * answer.len() as u64);
    assert_eq!((&ended["began"], &ended["client_port"]), (&begun[0]["time"], &port.into()));
    assert!(number("duration_ms") >= 1_000, "{ended}");

    let first = [("event", "begun"), ("rule", "fallback"), ("version", "0x00000001")];
    let first = wait_for(&mut balancer, &path, 1, &first).remove(0);
    assert_eq!((&first["opening"], &first["retry"]), (&"new".into(), &false.into()));
    if first["backend"] == "b" {
        let unanswered = [("event", "ended"), ("reason", "unanswered"), ("backend", "b")];
        let ended = wait_for(&mut balancer, &path, 1, &unanswered).remove(0);
        assert_eq!(ended["returned_datagrams"], 0);
    }
    let written = balancer.metric("quic_lb_connection_log_records_total");
    assert!(written >= 3.0, "{written}");
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&path).unwrap().permissions());
    assert_eq!(mode & 0o007, 0, "addresses of clients are nobody else's business");
}

#[test]
fn what_lives_when_the_process_ends_is_told_as_stopped() {
    let host = Host::new();
    let _a = Server::start(host.at(5001), "a");
    let mut balancer = start(host, EVERY);
    let path = file(&balancer);
    let cid = balancer.cid("a");
    let clients: Vec<_> = (0..20).map(|_| balancer.client()).collect();
    clients.iter().for_each(|client| drop(client.ask(&short(&cid))));
    balancer.signal("TERM");
    balancer.exit_code();
    let lines = lines(&path);
    assert_eq!(with(&lines, &[("event", "begun")]).len(), 20);
    let ended = with(&lines, &[("event", "ended")]).len();
    assert_eq!(ended, 20, "{lines:?}");
    assert!(!with(&lines, &[("reason", "stopped")]).is_empty(), "{lines:?}");
}

/// Also in a process that has taken over, which could not make a file anywhere else.
#[test]
fn sigusr1_has_the_file_opened_anew_and_a_successor_ends_what_was_begun_before() {
    let host = Host::new();
    let _a = Server::start(host.at(5001), "a");
    let long = config(host, EVERY).replace("\"1s\"", "\"3s\"");
    let mut balancer = Balancer::start_with(host, &long);
    let path = file(&balancer);
    let cid = balancer.cid("a");
    let client = balancer.client();
    let answer = client.ask(&short(&cid));
    wait_for(&mut balancer, &path, 1, &[("event", "begun")]);

    let rotate = |balancer: &mut Balancer, to: &str| {
        let old = balancer.folder.path().join(to);
        fs::rename(&path, &old).unwrap();
        balancer.signal("USR1");
        balancer.wait("a new file", |_| path.exists());
        old
    };
    rotate(&mut balancer, "first");
    balancer.upgrade();
    let again = client.ask(&short(&cid));
    assert_eq!(answer, again, "it is the same flow");
    let ended = wait_for(&mut balancer, &path, 1, &[("event", "ended")]).remove(0);
    let number = |key: &str| ended[key].as_u64().unwrap();
    assert!(number("forwarded_datagrams") >= 2 && number("returned_datagrams") >= 2, "{ended}");
    assert_eq!(ended["reason"], "idle");
    let first = lines(&balancer.folder.path().join("first"));
    let begun = with(&first, &[("event", "begun")]);
    assert_eq!((begun.len(), first.len()), (1, 1), "it goes on, and ends once");
    // Clocks of processes have no common beginning: microseconds may differ.
    let (began, time) = (ended["began"].as_str().unwrap(), begun[0]["time"].as_str().unwrap());
    assert_eq!(began[..19], time[..19]);

    let second = rotate(&mut balancer, "second");
    let count = lines(&second).len();
    balancer.client().ask(&short(&cid));
    wait_for(&mut balancer, &path, 1, &[("event", "begun")]);
    assert_eq!(lines(&second).len(), count);
}

#[test]
fn a_reload_turns_it_on_and_off_and_changes_where_it_goes_and_how_much_of_it() {
    let host = Host::new();
    let _a = Server::start(host.at(5001), "a");
    let mut command = support::command();
    let folder = Folder::with(&config(host, ""));
    let path = folder.config();
    // As the service manager says.
    command.env("LOGS_DIRECTORY", folder.path());
    let mut balancer = Balancer::start_as(command, host, folder, path);
    let cid = balancer.cid("a");
    let reload = |balancer: &mut Balancer, connections: &str| {
        balancer.rewrite(&config(host, connections));
        support::quic_lb(&["reload", "--admin", &host.at(9090).to_string()]).done();
    };
    let ask = |balancer: &Balancer| balancer.client().ask(&short(&cid));

    ask(&balancer);
    let path = file(&balancer);
    assert!(!path.exists());
    reload(&mut balancer, EVERY);
    balancer.wait("the file", |_| path.exists());
    ask(&balancer);
    wait_for(&mut balancer, &path, 1, &[("event", "begun")]);
    reload(&mut balancer, ", connections: { path: other.log, format: text }");
    let other = balancer.folder.path().join("other.log");
    balancer.wait("another file", |_| other.exists());
    ask(&balancer);
    balancer.wait("a line", |_| {
        fs::read_to_string(&other).unwrap().contains(" -> web/a rule=cid opening=path_change")
    });
    reload(&mut balancer, ", connections: { path: none.log, sample: 0 }");
    let none = balancer.folder.path().join("none.log");
    balancer.wait("a third file", |_| none.exists());
    // Until the workers have the new share.
    balancer.wait("no more lines", |balancer| {
        let written = || balancer.metric("quic_lb_connection_log_records_total");
        let before = written();
        ask(balancer);
        before == written()
    });
    reload(&mut balancer, "");
    balancer.wait_for_record("no connection log any more");
    let (count, text) = (lines(&path).len(), fs::read_to_string(&other).unwrap());
    ask(&balancer);
    assert_eq!((lines(&path).len(), fs::read_to_string(&other).unwrap()), (count, text));
}

#[test]
fn a_full_disk_costs_records_and_nothing_else() {
    let host = Host::new();
    let _a = Server::start(host.at(5001), "a");
    let mut balancer = start(host, ", connections: { path: /dev/full }");
    let cid = balancer.cid("a");
    for _ in 0..10 {
        balancer.client().ask(&short(&cid));
    }
    balancer.wait("losses", |balancer| {
        balancer.metric("quic_lb_connection_log_dropped_total{reason=\"write\"}") >= 10.0
    });
    assert_eq!(balancer.metric("quic_lb_connection_log_records_total"), 0.0);
    let told = balancer.records("the connection log cannot be written, records are dropped");
    assert_eq!(told.len(), 1, "once");
    assert_eq!(balancer.metric("quic_lb_ready"), 1.0);
}

/// Such as standard output that nobody reads.
#[test]
fn a_log_that_takes_nothing_holds_up_nobody() {
    let host = Host::new();
    let _a = Server::start(host.at(5001), "a");
    let folder = Folder::with(&config(host, EVERY).replace("workers: 2", "workers: 1"));
    // To open it takes until somebody reads.
    let pipe = folder.path().join("connections.json");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let path = folder.config();
    let mut balancer = Balancer::start_at(host, folder, path);
    let cid = balancer.cid("a");
    let full = "quic_lb_connection_log_dropped_total{reason=\"queue\"}";
    for _ in 0..100 {
        if balancer.metric(full) > 0.0 {
            break;
        }
        for _ in 0..500 {
            balancer.client().send(&short(&cid));
        }
        balancer.client().ask(&short(&cid));
    }
    assert!(balancer.metric(full) > 0.0);
    assert_eq!(balancer.metric("quic_lb_worker_panics_total{worker=\"0\"}"), 0.0);
    balancer.client().ask(&short(&cid));
    balancer.signal("TERM");
    assert_eq!(balancer.exit_code(), Some(0));
}
