//! The program on disk takes over from a running balancer: real processes, real sockets, real datagrams.

#![allow(clippy::unwrap_used, reason = "a failed test is a fine message")]
#![allow(clippy::disallowed_methods, reason = "tests are their own shell")]

mod support;

use std::{
    fs,
    net::{SocketAddr, UdpSocket},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use serde_json::{Value, json};
use support::{
    Folder,
    balancer::{Balancer, Host, PATIENCE, Server, initial, short},
    quic_lb,
};

/// A server that speaks when the test wants.
fn server(host: Host, port: u16) -> UdpSocket {
    let socket = UdpSocket::bind(host.at(port)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut octets = [0; 2_000];
    let (len, from) = socket.recv_from(&mut octets).unwrap();
    (octets[..len].to_vec(), from)
}

fn client(host: Host) -> UdpSocket {
    let socket = UdpSocket::bind(host.at(0)).unwrap();
    socket.connect(host.at(4433)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// The command says so too, and both processes see the same.
#[test]
fn a_client_that_only_receives_is_reached_after_many_upgrades() {
    let host = Host::new();
    let a = server(host, 5001);
    let mut balancer = Balancer::start(host);
    let cid = balancer.cid("a");
    let clients: Vec<_> = (0..30).map(|_| client(host)).collect();
    let mut paths = vec![];
    for client in &clients {
        client.send(&short(&cid)).unwrap();
        paths.push(receive(&a).1);
    }
    for nth in 0..5 {
        let told = balancer.upgrade();
        assert!(told.contains(" goes on with 30 flows; handed over in "), "{told}");
        for (at, (client, path)) in clients.iter().zip(&paths).enumerate() {
            let words = format!("only received, {at} {nth}");
            a.send_to(words.as_bytes(), path).unwrap();
            assert_eq!(String::from_utf8(receive(client).0).unwrap(), words);
        }
        assert_eq!(balancer.metric("quic_lb_flows{listener=\"edge\"}"), 30.0);
    }
    // And whoever speaks is whom the server knows.
    for (client, path) in clients.iter().zip(&paths) {
        client.send(&short(&cid)).unwrap();
        assert_eq!(receive(&a).1, *path);
    }
    // Ports in use are known: another client gets another one.
    let another = client(host);
    another.send(&short(&cid)).unwrap();
    assert!(!paths.contains(&receive(&a).1));
    assert_eq!(balancer.metric("quic_lb_worker_panics_total{worker=\"0\"}"), 0.0);
}

/// Each datagram is numbered, both ways.
#[test]
fn an_upgrade_loses_nothing() {
    const UPGRADES: usize = 10;
    let host = Host::new();
    let (a, answered) = (server(host, 5001), Arc::new(AtomicU64::new(0)));
    let counts = Arc::clone(&answered);
    thread::spawn(move || {
        let mut octets = [0; 2_000];
        while let Ok((len, from)) = a.recv_from(&mut octets) {
            counts.fetch_add(1, SeqCst);
            a.send_to(&octets[..len], from).unwrap();
        }
    });
    let mut balancer = Balancer::start(host);
    let cid = balancer.cid("a");
    let stop = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let (client, stop) = (client(host), Arc::clone(&stop));
            let datagram = short(&cid);
            thread::spawn(move || {
                let mut sent = 0;
                // As many on their way as fit the smallest buffer.
                while !stop.load(SeqCst) {
                    for _ in 0..10 {
                        sent += 1;
                        client.send(&datagram).unwrap();
                    }
                    (0..10).for_each(|_| drop(receive(&client)));
                }
                sent
            })
        })
        .collect();
    for _ in 0..UPGRADES {
        balancer.upgrade();
        thread::sleep(Duration::from_millis(100));
    }
    stop.store(true, SeqCst);
    let sent: u64 = threads.into_iter().map(|thread| thread.join().unwrap()).sum();
    assert!(sent > 1_000, "{sent}");
    assert_eq!(answered.load(SeqCst), sent);
    assert_eq!(balancer.records("handed over").len(), UPGRADES);
}

#[test]
fn what_an_operator_has_commanded_and_what_is_remembered_outlives_the_process() {
    let host = Host::new();
    let (_a, _b) = (Server::start(host.at(5001), "a"), Server::start(host.at(5002), "b"));
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().display();
    let text = |weight: u8| {
        let config = host.config().replace("weight: 2", &format!("weight: {weight}"));
        format!("state_dir: \"{state}\"\n{config}")
    };
    let mut balancer = Balancer::start_with(host, &text(2));
    // A handshake is known by what it began with.
    let (client, nonce) = (0..100)
        .map(|nonce| (balancer.client(), nonce))
        .find(|(client, nonce)| client.ask(&initial(*nonce)).starts_with("a "))
        .expect("one of many goes to a");
    let before = client.ask(&initial(nonce));
    assert_eq!(balancer.post("/api/v1/backends/web/a/drain").status, 200);
    let connections = "quic_lb_remembered{table=\"handshakes\"}";
    let remembered = balancer.metric(connections);
    balancer.upgrade();
    let a = balancer.backend("a");
    assert_eq!((&a["state"], &a["wanted_by"]), (&json!("draining"), &json!("operator")));
    assert_eq!(balancer.metric(connections), remembered);
    assert_eq!(client.ask(&initial(nonce)), before, "a drained backend keeps what it has");
    for nonce in 1_000..1_020 {
        assert!(balancer.client().ask(&initial(nonce)).starts_with("b "));
    }
    balancer.rewrite(&text(3));
    balancer.wait("the reload", |balancer| balancer.backend("b")["weight"] == 3);
    assert_eq!(balancer.backend("a")["state"], "draining");
    // The new process, which has not opened the file, goes on keeping what is commanded.
    assert_eq!(balancer.post("/api/v1/backends/web/a/activate").status, 200);
    assert_eq!(balancer.post("/api/v1/backends/web/b/drain?by=ann").status, 200);
    let kept = fs::read_to_string(folder.path().join("commands.json")).unwrap();
    let kept: Value = serde_json::from_str(kept.lines().last().unwrap()).unwrap();
    let b =
        json!({ "pool": "web", "backend": "b", "state": "draining", "by": "ann", "reason": null });
    let mut last = kept[0].clone();
    last.as_object_mut().unwrap().remove("unix_time");
    assert_eq!((kept.as_array().unwrap().len(), last), (1, b));
}

/// What a process is sized by, and its doors, take one that takes over: a reload says so, and no flow is touched.
#[test]
fn what_a_reload_refuses_for_an_upgrade_the_upgrade_does() {
    let host = Host::new();
    let a = server(host, 5001);
    let mut balancer = Balancer::start(host);
    let (client, cid) = (client(host), balancer.cid("a"));
    client.send(&short(&cid)).unwrap();
    let path = receive(&a).1;
    let config =
        host.config().replace("flows: 1000, remembered: 1000", "flows: 1500, remembered: 3000");
    let config = config.replace(&host.at(9090).to_string(), &host.at(9091).to_string());
    balancer.rewrite(&config);
    let refused = quic_lb(&["reload", "--admin", &host.at(9090).to_string()]).failed(1);
    for what in [
        "admin.address changes from ",
        "limits.flows changes from ",
        "limits.remembered changes from ",
    ] {
        let line = refused.lines().find(|line| line.starts_with(what));
        assert!(
            line.is_some_and(|line| line.ends_with("which takes `quic-lb upgrade`")),
            "{refused}"
        );
    }
    balancer.upgrade();
    a.send_to(b"still there", path).unwrap();
    assert_eq!(receive(&client).0, b"still there");
    client.send(&short(&cid)).unwrap();
    assert_eq!(receive(&a).1, path);
    let told = balancer
        .raw_http_at(9091, b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .body;
    for metric in [
        "quic_lb_flow_limit 1500",
        "quic_lb_remembered_limit{table=\"handshakes\"} 1500",
        "quic_lb_config_last_reload_successful 1",
    ] {
        assert!(told.contains(metric), "{metric} in {told}");
    }
}

#[test]
fn sigusr2_upgrades_and_the_service_manager_is_told_which_process_is_the_service() {
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
    balancer.signal("USR2");
    let process = balancer.wait_for_record("handed over")["process"].as_u64().unwrap();
    assert_eq!(balancer.exit_code(), Some(0), "{}", balancer.log());
    balancer.follow(process.try_into().unwrap());
    let messages = [told(), told()].concat();
    assert!(messages.contains(&format!("MAINPID={process}")), "{messages}");
    assert!(messages.contains("READY=1"), "{messages}");
    assert_eq!(balancer.get("/readyz").status, 200);
}

/// A balancer whose program is a link, and what that leads to next.
fn linked() -> (Host, Balancer, impl Fn(&Path)) {
    let host = Host::new();
    let folder = Folder::with(&host.config());
    let link = folder.path().join("quic-lb");
    symlink(env!("CARGO_BIN_EXE_quic-lb"), &link).unwrap();
    let command = support::command_at(&link);
    let config = folder.config();
    let balancer = Balancer::start_as(command, host, folder, config);
    let replace = move |program: &Path| {
        fs::remove_file(&link).unwrap();
        symlink(program, &link).unwrap();
    };
    (host, balancer, replace)
}

fn program(balancer: &Balancer, name: &str, text: &str) -> std::path::PathBuf {
    let path = balancer.folder.write(name, text.as_bytes());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
    path
}

#[test]
fn a_failed_upgrade_changes_nothing() {
    let (host, mut balancer, replace) = linked();
    let a = server(host, 5001);
    let (client, cid) = (client(host), balancer.cid("a"));
    let datagram = short(&cid);
    client.send(&datagram).unwrap();
    let path = receive(&a).1;
    let refused = |expected: &str, balancer: &Balancer| {
        let complaint = balancer.try_to_upgrade().failed(1);
        assert!(complaint.contains(expected), "{complaint}");
        client.send(&datagram).unwrap();
        assert_eq!(receive(&a).1, path, "the flow is the same");
        assert_eq!(balancer.get("/readyz").status, 200);
    };
    let dies = program(&balancer, "dies", "#!/bin/sh\nexit 7\n");
    replace(&dies);
    refused("the new process has ended: exit status: 7", &balancer);
    replace(&program(&balancer, "speaks", "#!/bin/sh\nhead -c 100 /dev/zero >&0\nsleep 60\n"));
    refused("cannot be understood", &balancer);
    // It says that it is prepared, as the format has it, and dies when the workers have stopped.
    let prepared = r"printf '\001\000\000\000\000\000\000\000\001' >&0; sleep 1; exit 8";
    replace(&program(&balancer, "prepared", &format!("#!/bin/sh\n{prepared}\n")));
    refused("the new process has ended: exit status: 8", &balancer);
    replace(Path::new("/nonexistent/quic-lb"));
    refused("cannot start", &balancer);

    replace(Path::new(env!("CARGO_BIN_EXE_quic-lb")));
    let good = host.config();
    let state_dir = format!("workers: 2\nstate_dir: {}", balancer.folder.path().display());
    for (from, to, expected) in [
        ("workers: 2", state_dir.as_str(), "it takes a restart to begin"),
        ("weight: 2", "weight: 0", "weight"),
        ("workers: 2", "workers: 3", "workers changes from 2 to 3"),
        (":4433", ":4434", "listener edge at "),
    ] {
        // Without the running process noticing.
        balancer.rewrite(&good.replace(from, to));
        refused(expected, &balancer);
    }
    let failures = balancer.records("upgrade failed, this process goes on");
    assert_eq!(failures.len(), 8, "{}", balancer.log());
    assert!(failures.iter().all(|record| record["level"] == "ERROR"));

    balancer.rewrite(&good);
    // Which has noticed some of it, and would notice this amid the upgrade.
    quic_lb(&["reload", "--admin", &host.at(9090).to_string()]).done();
    balancer.upgrade();
    a.send_to(b"to the end", path).unwrap();
    assert_eq!(receive(&client).0, b"to the end");
}

#[test]
fn one_upgrade_at_a_time() {
    let (host, balancer, replace) = linked();
    replace(&program(&balancer, "sleeps", "#!/bin/sh\nexec sleep 5\n"));
    let waiting = thread::spawn({
        let admin = host.at(9090).to_string();
        move || quic_lb(&["upgrade", "--admin", &admin]).failed(1)
    });
    let mut balancer = balancer;
    balancer.wait_for_record("upgrade begins");
    let complaint = balancer.try_to_upgrade().failed(1);
    assert!(complaint.contains("another upgrade is under way"), "{complaint}");
    let complaint = waiting.join().unwrap();
    assert!(complaint.contains("the new process has ended"), "{complaint}");
}
