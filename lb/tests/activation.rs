//! Sockets that outlive the process: a service manager has opened them.

#![allow(clippy::unwrap_used, reason = "a failed test is a fine message")]
#![allow(clippy::disallowed_methods, reason = "tests are their own shell")]

mod support;

use std::{
    net::UdpSocket,
    process::{Command, Stdio},
};

use support::{
    Folder,
    balancer::{Balancer, Host, PATIENCE, Server, short},
};

/// The balancer with `socket` where a service manager puts it. The shell has its process number, and lends it its standard input.
fn activated(socket: &UdpSocket) -> Command {
    let script = "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\" 3<&0 </dev/null";
    let mut command = Command::new("sh");
    command.args(["-c", script, env!("CARGO_BIN_EXE_quic-lb")]);
    command.env_remove("RUST_LOG").env_remove("RUNTIME_DIRECTORY");
    command.stdin(Stdio::from(std::os::fd::OwnedFd::from(socket.try_clone().unwrap())));
    command
}

#[test]
fn what_arrives_while_there_is_no_process_waits_for_the_next_one() {
    let host = Host::new();
    let _a = Server::start(host.at(5001), "a");
    let socket = UdpSocket::bind(host.at(4433)).unwrap();
    let config = host.config().replace("workers: 2", "workers: 1");
    let client = UdpSocket::bind(host.at(0)).unwrap();
    client.connect(host.at(4433)).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let cid = {
        let folder = Folder::with(&config);
        let cid = folder.run(&["cid", "encode"], &["--backend", "a"]).done();
        (0..cid.trim().len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&cid[at..at + 2], 16).unwrap())
            .collect::<Vec<_>>()
    };
    for _ in 0..2 {
        // Before it is there.
        client.send(&short(&cid)).unwrap();
        let folder = Folder::with(&config);
        let path = folder.config();
        let mut balancer = Balancer::start_as(activated(&socket), host, folder, path);
        let mut answer = [0; 2_000];
        let len = client.recv(&mut answer).unwrap();
        assert!(answer[..len].starts_with(b"a "), "{:?}", &answer[..len]);
        assert_eq!(balancer.records("opened by the service manager").len(), 1);
        // A successor has it from the process before it.
        balancer.upgrade();
        client.send(&short(&cid)).unwrap();
        client.recv(&mut answer).unwrap();
        balancer.signal("TERM");
        balancer.wait_for_record("ended");
    }
}

#[test]
fn sockets_are_one_for_each_worker_or_refused() {
    let host = Host::new();
    let socket = UdpSocket::bind(host.at(4433)).unwrap();
    let folder = Folder::with(&host.config());
    let mut command = activated(&socket);
    command.args(["run", "--config"]).arg(folder.config());
    let ended = command.output().unwrap();
    let told = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(1), "{told}");
    assert!(told.contains("are not one for each worker: 1 for 2"), "{told}");
}
