//! First flights that a backend refuses are another one's at once, and nothing else is.

#![allow(clippy::unwrap_used, reason = "a failed test is a fine message")]
#![allow(clippy::disallowed_methods, reason = "tests are their own shell")]

mod support;

use std::{
    io,
    net::{SocketAddr, UdpSocket},
};

use support::balancer::{Balancer, Host, PATIENCE, Server, initial, short};

const MOVED: &str = "quic_lb_backend_refused_moved_total{backend=\"a\",pool=\"web\"}";

fn socket(address: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn client(host: Host) -> UdpSocket {
    let client = socket(host.at(0));
    client.connect(host.at(4433)).unwrap();
    client
}

fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    receive_from(socket).unwrap()
}

fn receive_from(socket: &UdpSocket) -> io::Result<(Vec<u8>, SocketAddr)> {
    let mut octets = [0; 2_000];
    let (len, from) = socket.recv_from(&mut octets)?;
    Ok((octets[..len].to_vec(), from))
}

/// Each client sends once, and would wait for ever.
#[test]
fn no_client_waits_because_its_backend_is_gone() {
    let host = Host::new();
    let _b = Server::start(host.at(5002), "b");
    let balancer = Balancer::start(host);
    for nonce in 0..60 {
        let client = client(host);
        client.send(&initial(nonce)).unwrap();
        let (answer, _) = receive(&client);
        assert!(answer.starts_with(b"b "), "{nonce}");
    }
    assert!(balancer.metric(MOVED) >= 1.0);
    let sent = balancer.metric("quic_lb_backend_datagrams_total{backend=\"b\",pool=\"web\"}");
    assert_eq!(sent, 60.0, "each once");
    let forwarded = balancer.metrics();
    let forwarded = forwarded.iter().filter(|(name, _)| {
        name.starts_with("quic_lb_datagrams_forwarded_total") || name.contains("_dropped_total{l")
    });
    let verdicts: f64 = forwarded.map(|(_, count)| count).sum();
    assert_eq!(verdicts, 60.0, "what came from a client has one verdict");
}

/// A first flight that is larger than a datagram is not torn, and the handshake goes on where it went.
#[test]
fn all_datagrams_of_a_first_flight_go_the_same_way_and_what_follows_them_too() {
    let host = Host::new();
    let b = socket(host.at(5002));
    let balancer = Balancer::start(host);
    for nonce in 0..20 {
        let client = client(host);
        let (first, mut second) = (initial(nonce), initial(nonce));
        second.truncate(1_200);
        client.send(&first).unwrap();
        client.send(&second).unwrap();
        let mut got = [receive(&b), receive(&b)];
        // With one that was on its way when the other was refused, order is not promised.
        got.sort_by_key(|(octets, _)| usize::MAX - octets.len());
        assert_eq!([&got[0].0, &got[1].0], [&first, &second], "{nonce}");
        let path = got[1].1;
        client.send(&first).unwrap();
        assert_eq!(receive(&b), (first, path), "{nonce}");
        b.send_to(b"answer", path).unwrap();
        assert_eq!(receive(&client).0, b"answer");
    }
    assert!(balancer.metric(MOVED) >= 1.0);
}

/// A host says of few datagrams that nobody listens there, and so to one worker: the clients of the other do not wait either.
#[test]
fn what_one_worker_is_refused_goes_for_the_first_flights_of_all() {
    // On a machine that stands still for long they are too old to be moved, or the backend is down meanwhile.
    assert!((0..5).any(|_| all_move_for_one_refusal()));
}

fn all_move_for_one_refusal() -> bool {
    let host = Host::new();
    let a = socket(host.at(5001));
    let _b = socket(host.at(5002));
    let mut balancer = Balancer::start(host);
    let clients: Vec<_> = (0..40).map(|_| client(host)).collect();
    for (nonce, client) in (0..).zip(&clients) {
        client.send(&initial(nonce)).unwrap();
    }
    let received = "quic_lb_datagrams_received_total{listener=\"edge\"}";
    let to =
        |name: &str| format!("quic_lb_backend_datagrams_total{{backend={name:?},pool=\"web\"}}");
    balancer.wait("all first flights", |balancer| balancer.metric(received) >= 40.0);
    let left = balancer.metric(&to("a"));
    // Nobody listens there any more, and one more client is all that shows it.
    drop(a);
    for nonce in 40.. {
        client(host).send(&initial(nonce)).unwrap();
        let sent = f64::from(nonce) + 1.0;
        balancer.wait("one more", |balancer| balancer.metric(received) >= sent);
        if balancer.metric(&to("a")) > left {
            break;
        }
    }
    // Several looks of the control plane later.
    std::thread::sleep(std::time::Duration::from_millis(800));
    let moved = balancer.metric(MOVED);
    let is_active = balancer.backend("a")["state"] == "active";
    // Each once.
    moved == left + 1.0 && balancer.metric(&to("b")) == balancer.metric(received) && is_active
}

/// Nothing says that it is not there: it is found to be silent.
#[test]
fn first_flights_that_a_backend_has_left_unanswered_go_elsewhere_when_it_goes_down() {
    let host = Host::new();
    let _silent = socket(host.at(5001));
    let b = socket(host.at(5002));
    std::thread::spawn(move || {
        while let Ok((octets, from)) = receive_from(&b) {
            // To the connection ID of the client, as `initial` has it.
            let answer =
                [&[0xc0, 0, 0, 0, 1, 4][..], &octets[15..19], &[4, 9, 9, 9, 9, 0]].concat();
            b.send_to(&answer, from).unwrap();
        }
    });
    let balancer = Balancer::start(host);
    let mut clients = vec![];
    for nonce in 0..400 {
        let client = client(host);
        client.send(&initial(nonce)).unwrap();
        clients.push(client);
        if balancer.metric(MOVED) > 0.0 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(25));
    }
    let moved = balancer.metric(MOVED);
    assert!(moved > 0.0);
    // Those that have waited longest go on waiting for their clients to repeat themselves.
    let mut answered = 0;
    for client in &clients {
        client.set_nonblocking(true).unwrap();
        answered += usize::from(client.recv(&mut [0; 2_000]).is_ok());
    }
    assert!(answered < clients.len());
    let at_b = balancer.metric("quic_lb_backend_datagrams_total{backend=\"b\",pool=\"web\"}");
    assert!(at_b >= moved);
    assert_eq!(balancer.backend("a")["state"], "down");
}

#[test]
fn a_connection_that_its_server_has_answered_is_never_moved() {
    let host = Host::new();
    let a = socket(host.at(5001));
    let b = socket(host.at(5002));
    let mut balancer = Balancer::start(host);
    let cid = balancer.cid("a");
    // Some that a has answered, and of some the connection ID is known to be of a.
    let clients: Vec<_> = (0..40).map(|_| client(host)).collect();
    for (nonce, client) in (0..).zip(&clients) {
        client.send(&initial(nonce)).unwrap();
    }
    balancer.wait("all datagrams", |balancer| {
        balancer.metric("quic_lb_datagrams_received_total{listener=\"edge\"}") >= 40.0
    });
    let drain = |socket: &UdpSocket| {
        socket.set_nonblocking(true).unwrap();
        let mut octets = [0; 2_000];
        let paths = std::iter::from_fn(|| socket.recv_from(&mut octets).ok().map(|(_, from)| from));
        let paths: Vec<_> = paths.collect();
        socket.set_nonblocking(false).unwrap();
        paths
    };
    let at_a = drain(&a);
    assert_eq!(at_a.len() + drain(&b).len(), 40);
    assert!(!at_a.is_empty());
    for path in &at_a {
        a.send_to(b"answer", path).unwrap();
    }
    let known = client(host);
    known.send(&short(&cid)).unwrap();
    receive(&a);
    balancer.wait("answers", |balancer| {
        balancer.metric("quic_lb_datagrams_returned_total{listener=\"edge\"}") >= at_a.len() as f64
    });
    drop(a);
    let refused =
        "quic_lb_backend_refused_total{backend=\"a\",errno=\"ECONNREFUSED\",pool=\"web\"}";
    let none = balancer.metrics().get(refused).copied().unwrap_or(0.0);
    for (nonce, client) in (0..).zip(&clients) {
        // Some would be at b, which has them.
        client.send(&initial(nonce)).unwrap();
    }
    known.send(&short(&cid)).unwrap();
    balancer.wait("refusals", |balancer| {
        balancer.metrics().get(refused).copied().unwrap_or(0.0) >= none + at_a.len() as f64
    });
    assert_eq!(balancer.metric(MOVED), 0.0);
    assert_eq!(drain(&b).len(), 40 - at_a.len());
}
