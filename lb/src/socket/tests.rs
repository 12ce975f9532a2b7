use std::{
    mem,
    net::{Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6, UdpSocket},
};

use super::*;

const ANY_V4: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0));
const ANY_V6: SocketAddr = SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::LOCALHOST, 0, 0, 0));

fn listener(address: SocketAddr) -> (Socket, SocketAddr) {
    let socket = Socket::listener(address, Sharing::First).unwrap();
    let address = socket.local_address().unwrap();
    (socket, address)
}

fn towards(peer: SocketAddr) -> Socket {
    let local = SocketAddr::new(Socket::source_towards(peer).unwrap(), 0);
    Socket::upstream(local, peer, PortUse::Exclusive).unwrap()
}

fn to_peer(peer: SocketAddr) -> Departure {
    let ipv6 = peer.is_ipv6();
    Departure { to: None, from: None, class: None, hops: None, segment: None, ipv6 }
}

fn receive(receiver: &mut Receiver, socket: &Socket) -> Vec<Received> {
    let got = receiver.receive(socket, 0..SLOTS, Peer::Asked).unwrap();
    (0..got).map(|slot| *receiver.received(slot)).collect()
}

#[test]
fn joined_datagrams_keep_their_boundaries_in_both_families() {
    for address in [ANY_V4, ANY_V6] {
        let (listener, address) = listener(address);
        let upstream = towards(address);
        let octets: Vec<u8> = (0..=255).cycle().take(10 * 1_200 + 300).collect();
        let mut sender = Sender::new();
        let mut outgoing = sender.compose();
        outgoing.push(
            &Departure { segment: Some(1_200), ..to_peer(address) },
            [&octets[..5_000], &octets[5_000..]],
        );
        assert_eq!(outgoing.send(&upstream, 0).unwrap(), 1);
        let mut receiver = Receiver::new();
        let mut arrived = Vec::new();
        let mut lengths = Vec::new();
        for (slot, received) in receive(&mut receiver, &listener).into_iter().enumerate() {
            assert_eq!(received.from, upstream.local_address().unwrap());
            assert_eq!(received.local, None);
            let message = receiver.octets(slot, 0..received.len);
            assert_eq!(message.chunks(received.segment).len(), received.datagrams());
            lengths.extend(message.chunks(received.segment).map(<[u8]>::len));
            arrived.extend_from_slice(message);
        }
        assert_eq!(lengths, [[1_200; 10].as_slice(), &[300]].concat());
        assert!(arrived == octets, "the bytes changed");
    }
}

#[test]
fn several_messages_leave_and_arrive_in_order_with_their_own_names() {
    let (listener, address) = listener(ANY_V4);
    let (sink, sink_address) = self::listener(ANY_V4);
    let mut sender = Sender::new();
    let mut outgoing = sender.compose();
    let bodies: Vec<[u8; 1]> = (0..10).map(|n| [n]).collect();
    for (n, body) in bodies.iter().enumerate() {
        let to = if n % 2 == 0 { sink_address } else { address };
        outgoing.push(&Departure { to: Some(to), ..to_peer(to) }, [body.as_slice()]);
    }
    let mut sent = 0;
    while sent < outgoing.len() {
        sent += outgoing.send(&listener, sent).unwrap();
    }
    let mut receiver = Receiver::new();
    let got: Vec<u8> = (0..receive(&mut receiver, &sink).len())
        .map(|slot| receiver.octets(slot, 0..1)[0])
        .collect();
    assert_eq!(got, [0, 2, 4, 6, 8]);
    assert_eq!(receive(&mut receiver, &listener).len(), 5);
    assert_eq!(receive(&mut receiver, &listener).len(), 0);
}

#[test]
fn datagrams_without_octets_are_datagrams() {
    let (listener, address) = listener(ANY_V4);
    let upstream = towards(address);
    upstream.send(&[]).unwrap();
    upstream.send(&[1]).unwrap();
    let mut receiver = Receiver::new();
    let received = receive(&mut receiver, &listener);
    assert_eq!(
        received.iter().map(|r| (r.len, r.datagrams())).collect::<Vec<_>>(),
        [(0, 1), (1, 1)]
    );
}

#[test]
fn marks_pass_by_message_and_by_socket_in_both_families() {
    for address in [ANY_V4, ANY_V6] {
        let (listener, address) = listener(address);
        let upstream = towards(address);
        let mut sender = Sender::new();
        let mut outgoing = sender.compose();
        type Class = TrafficClass;
        let marks = |class: Class, hops| Marks { class, hops: HopLimit::new(hops) };
        let by_message = [
            marks(Class::ECT_1, 1),
            marks(Class::ECT_0.with_dscp(46), 255),
            marks(Class::CE.with_dscp(63), 2),
            marks(Class::NOT_ECT, 64),
        ];
        for Marks { class, hops } in by_message {
            let departure = Departure { class: Some(class), hops: Some(hops), ..to_peer(address) };
            outgoing.push(&departure, [[7].as_slice()]);
        }
        assert_eq!(outgoing.send(&upstream, 0).unwrap(), by_message.len());
        let by_socket =
            [marks(Class::ECT_0.with_dscp(10), 9), marks(Class::ECT_0.with_dscp(10), 8)];
        let mut before = Marks::UNSET;
        for marks in by_socket {
            upstream.set_marks(address.is_ipv6(), before, marks).unwrap();
            upstream.send(&[7]).unwrap();
            before = marks;
        }
        let mut receiver = Receiver::new();
        let got: Vec<Marks> = receive(&mut receiver, &listener).iter().map(|r| r.marks).collect();
        assert_eq!(got, [&by_message[..], &by_socket].concat());
    }
}

#[test]
fn replies_leave_from_the_address_that_was_asked() {
    for (unspecified, asked) in [("0.0.0.0:0", "127.0.0.77"), ("[::]:0", "::1")]
        .map(|(u, a)| (u.parse().unwrap(), a.parse().unwrap()))
    {
        let (listener, address) = listener(unspecified);
        let target = SocketAddr::new(asked, address.port());
        let client = towards(target);
        client.send(&[1]).unwrap();
        let mut receiver = Receiver::new();
        let received = receive(&mut receiver, &listener)[0];
        assert_eq!(received.local, Some(asked));
        let mut sender = Sender::new();
        let mut outgoing = sender.compose();
        let departure = Departure {
            to: Some(received.from),
            from: received.local,
            class: Some(TrafficClass::CE.with_dscp(46)),
            hops: Some(HopLimit::new(7)),
            segment: Some(2),
            ipv6: target.is_ipv6(),
        };
        outgoing.push(&departure, [[2, 2, 3].as_slice()]);
        outgoing.send(&listener, 0).unwrap();
        // The client is connected: it hears nobody but the address that it asked.
        let replies = receive(&mut receiver, &client);
        assert_eq!(replies.iter().map(Received::datagrams).sum::<usize>(), 2);
        assert_eq!(replies[0].from, target);
        let class = TrafficClass::CE.with_dscp(46);
        assert_eq!(replies[0].marks, Marks { class, hops: HopLimit::new(7) });
    }
}

#[test]
fn fragmentation_is_refused() {
    for address in [ANY_V4, ANY_V6] {
        let (_listener, address) = listener(address);
        let upstream = towards(address);
        let mut value: c_int = -1;
        let mut len = octets_of::<c_int>();
        let (level, option, want) = if address.is_ipv6() {
            (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE)
        } else {
            (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE)
        };
        // SAFETY: an int option read into an int.
        check(unsafe {
            libc::getsockopt(upstream.raw(), level, option, (&raw mut value).cast(), &raw mut len)
        })
        .unwrap();
        assert_eq!(value, want);
    }
    // One octet more than loopback carries in one piece.
    let (_listener, address) = listener(ANY_V6);
    let upstream = towards(address);
    assert!(upstream.send(&[0; 65_536 - 48]).is_ok());
    let error = upstream.send(&[0; 65_536 - 47]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
}

#[test]
fn only_the_first_listener_minds_that_an_address_is_taken() {
    let (_first, address) = listener(ANY_V4);
    let error = Socket::listener(address, Sharing::First).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    let joined = Socket::listener(address, Sharing::Join).unwrap();
    assert_eq!(joined.local_address().unwrap(), address);
}

#[test]
fn a_port_serves_several_backends_once_it_is_ours() {
    let ((_a, a), (_b, b)) = (listener(ANY_V4), listener(ANY_V4));
    let first = towards(a);
    let local = first.local_address().unwrap();
    let error = Socket::upstream(local, b, PortUse::Exclusive).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    let second = Socket::upstream(local, b, PortUse::Shared).unwrap();
    assert_eq!(second.local_address().unwrap(), local);
    // A stranger's port is refused even to those who would share.
    let stranger = UdpSocket::bind(ANY_V4).unwrap();
    let error = Socket::upstream(stranger.local_addr().unwrap(), a, PortUse::Shared).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
}

#[test]
fn a_refusal_is_reported_once_and_the_socket_goes_on() {
    let (gone, address) = listener(ANY_V4);
    let upstream = towards(address);
    drop(gone);
    upstream.send(&[1]).unwrap();
    let mut receiver = Receiver::new();
    let error = receiver.receive(&upstream, 0..1, Peer::Known).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    assert_eq!(receiver.receive(&upstream, 0..1, Peer::Known).unwrap(), 0);
}

#[test]
fn the_poller_reports_what_waits_until_it_is_taken() {
    let (listener, address) = listener(ANY_V4);
    let upstream = towards(address);
    let poller = Poller::new().unwrap();
    poller.watch(&listener, 42).unwrap();
    let mut ready = Ready::new(4);
    poller.wait(&mut ready, Duration::ZERO).unwrap();
    assert!(ready.is_empty());
    upstream.send(&[1]).unwrap();
    for _ in 0..2 {
        poller.wait(&mut ready, Duration::ZERO).unwrap();
        assert_eq!((ready.len(), ready.token(0), ready.is_full()), (1, 42, false));
    }
    receive(&mut Receiver::new(), &listener);
    poller.wait(&mut ready, Duration::ZERO).unwrap();
    assert!(ready.is_empty());
}

#[test]
fn a_thread_can_have_descriptors_of_its_own() {
    let (shared, _) = listener(ANY_V4);
    let raw = shared.raw();
    std::thread::spawn(move || {
        assert!(unshare_descriptors(&[]).unwrap().is_own);
        // SAFETY: asks whether a number is a descriptor; no memory is involved.
        assert_eq!(unsafe { libc::fcntl(raw, libc::F_GETFD) }, -1);
        let (_own, address) = listener(ANY_V4);
        assert_ne!(address.port(), 0);
        // A handler that ran here would write to the wrong descriptor.
        // SAFETY: the set is integers, for which zero is valid, and is written for the call alone.
        let blocks_sigterm = unsafe {
            let mut blocked: libc::sigset_t = mem::zeroed();
            libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), &raw mut blocked);
            libc::sigismember(&raw const blocked, libc::SIGTERM)
        };
        assert_eq!(blocks_sigterm, 1);
    })
    .join()
    .unwrap();
    assert!(shared.local_address().is_ok());
    assert!(raise_descriptor_limit().unwrap() > 0);
}

#[test]
fn a_confined_thread_reads_files_and_sends_and_changes_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let (there, new) = (folder.path().join("there"), folder.path().join("new"));
    std::fs::write(&there, "words").unwrap();
    // It holds for the thread alone.
    let confined = std::thread::spawn({
        let (there, new) = (there.clone(), new.clone());
        move || {
            let Confined { files } = confine_thread(Execution::Kept, &[]).unwrap();
            let executed = std::process::Command::new("true").status().unwrap();
            assert!(executed.success(), "a successor could not be started");
            confine_thread(Execution::GivenUp, &[]).unwrap();
            assert_eq!(std::fs::read_to_string(&there).unwrap(), "words");
            let (socket, to) = (UdpSocket::bind("127.0.0.1:0").unwrap(), "127.0.0.1:9");
            socket.send_to(b"out", to).unwrap();
            assert_eq!(std::fs::write(&new, "").is_err(), files);
            assert_eq!(std::fs::write(&there, "others").is_err(), files);
            assert_eq!(std::process::Command::new("true").status().is_err(), files);
            assert_eq!(std::fs::remove_file(&there).is_err(), files);
            confine_thread(Execution::GivenUp, &[]).unwrap();
        }
    });
    confined.join().unwrap();
    std::fs::write(&there, "the others may").unwrap();
}

#[test]
fn a_confined_thread_may_append_to_files_in_the_folders_that_it_keeps() {
    let folders: [_; 2] = std::array::from_fn(|_| tempfile::tempdir().unwrap());
    let [log, elsewhere] = folders.each_ref().map(|folder| folder.path().join("log"));
    let append = |path: &std::path::Path| {
        std::fs::OpenOptions::new().append(true).create(true).open(path).map(drop)
    };
    let kept = [folders[0].path().to_owned(), folders[0].path().join("not there")];
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let Confined { files } = confine_thread(Execution::Kept, &kept).unwrap();
            append(&log).unwrap();
            append(&log).unwrap();
            assert_eq!(append(&elsewhere).is_err(), files);
            assert_eq!(std::fs::remove_file(&log).is_err(), files);
            assert_eq!(std::fs::create_dir(kept[1].clone()).is_err(), files);
        });
    });
}
