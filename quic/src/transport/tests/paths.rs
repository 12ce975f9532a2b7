//! Section I of the requirements: paths, migration, preferred addresses.

use std::collections::BTreeSet;

use super::*;
use crate::transport::frame::Frame;

const PREFERRED: &str = "192.0.2.77:4433";

fn with_preferred_address() -> Scene {
    let mut scene = Scene::default();
    let ipv4 = Some(PREFERRED.parse().unwrap());
    scene.server.preferred_address = Some(PreferredAddress { ipv4, ipv6: None });
    scene
}

/// Moves datagrams both ways, each from and to the addresses it says, until there are none; those to
/// `nowhere` are lost.
fn route(pair: &mut Pair, nowhere: Option<SocketAddr>) {
    for _ in 0..40 {
        let mut buffer = vec![];
        while let Some(sent) = pair.client.poll_transmit(pair.now, 1, &mut buffer) {
            let mut datagram = std::mem::take(&mut buffer);
            if Some(sent.remote) != nowhere {
                let local = Some(sent.remote.ip());
                let from = Received { remote: pair.from, local, ecn: None };
                pair.server.handle_datagram(pair.now, from, &mut datagram);
            }
        }
        while let Some(sent) = pair.server.poll_transmit(pair.now, 1, &mut buffer) {
            let mut datagram = std::mem::take(&mut buffer);
            let port = if sent.local == Some(preferred().ip()) { 4433 } else { 443 };
            let remote = SocketAddr::new(sent.local.unwrap(), port);
            let from = Received { remote, local: None, ecn: None };
            pair.client.handle_datagram(pair.now, from, &mut datagram);
        }
        while let Some((handle, event)) = pair.server.poll_event() {
            if event == Event::Connected {
                pair.at_server = Some(handle);
            }
        }
        while pair.client.poll_event().is_some() {}
        pair.pass(Duration::from_millis(30));
    }
}

fn preferred() -> SocketAddr {
    PREFERRED.parse().unwrap()
}

#[test]
fn req_i09_a_client_goes_to_the_preferred_address_once_that_answers() {
    let mut pair = Pair::new(with_preferred_address());
    route(&mut pair, None);
    let announced = pair.at_server().local_cids().next().unwrap();
    let (path, cid) = (pair.at_client().path(), pair.at_client().remote_cid());
    assert_eq!((path.remote, path.validated), (preferred(), true));
    assert_eq!(cid, announced, "the connection ID with number 1");
    // The one of the handshake was given back. The server has validated the new path too.
    assert!(pair.at_server().path().validated);
    assert_eq!(pair.at_server().stats().path_validations, 1);
    let stream = pair.at_client().open(Dir::Bi).unwrap();
    pair.at_client().write(stream, b"here").unwrap();
    route(&mut pair, Some(SERVER.parse().unwrap()));
    assert_eq!(pair.at_server().read(stream, &mut [0; 9]), Ok(Read::Data(4)));
}

#[test]
fn req_i09_a_preferred_address_that_does_not_answer_is_forgotten() {
    let mut pair = Pair::new(with_preferred_address());
    for _ in 0..10 {
        route(&mut pair, Some(preferred()));
    }
    let path = pair.at_client().path();
    assert_eq!((path.remote, path.validated), (SERVER.parse().unwrap(), true));
    let now = pair.now;
    assert!(pair.at_client().migrate(now, None).is_ok());
}

#[test]
fn req_i09_a_client_may_stay_where_it_is() {
    let mut scene = with_preferred_address();
    let stay = TransportConfig { follow_preferred_address: false, ..TransportConfig::default() };
    scene.client.transport = Arc::new(stay);
    let mut pair = Pair::new(scene);
    route(&mut pair, None);
    assert_eq!(pair.at_client().path().remote, SERVER.parse().unwrap());
    assert_eq!(pair.at_client().stats().path_validations, 0);
}

/// The challenges in `datagrams` to the client, and whether each had its datagram padded.
fn challenges(pair: &mut Pair, datagrams: &[Vec<u8>]) -> Vec<([u8; 8], bool)> {
    let mut all = vec![];
    for datagram in datagrams {
        for packet in pair.at_client().peek(datagram) {
            for frame in packet.frames() {
                if let Frame::PathChallenge(data) = frame {
                    all.push((data, datagram.len() >= 1200));
                }
            }
        }
    }
    all
}

/// The client's address changes without its knowledge, and it says something.
fn rebind(pair: &mut Pair, to: &str) -> Vec<Vec<u8>> {
    pair.from = to.parse().unwrap();
    pair.at_client().ping();
    for datagram in pair.up() {
        pair.deliver(datagram);
    }
    pair.down()
}

const REBOUND: &str = "192.0.2.2:2000";
const REBOUND_AGAIN: &str = "192.0.2.2:4000";
const MOVED: &str = "198.51.100.2:1000";

#[test]
fn req_i01_nobody_migrates_before_the_handshake_is_confirmed_or_where_it_is_forbidden() {
    let mut pair = Pair::new(Scene::default());
    let now = pair.now;
    assert_eq!(pair.at_client().migrate(now, None), Err(MigrateError::NotEstablished));
    // An Initial from elsewhere does not move a handshake: whoever has seen one can make another.
    for datagram in pair.first_flights() {
        pair.deliver_down(datagram);
    }
    let home = pair.from;
    let initial = pair.at_client().forge_padded(now, Space::Initial, &[1]);
    pair.from = MOVED.parse().unwrap();
    pair.deliver(initial);
    assert_eq!(pair.half_open().path().remote, home);
    assert_eq!(pair.half_open().dropped(DropReason::UnexpectedAddress), 1, "nor is it heard");
    let cids = CidIssuer::unroutable(8, [1; 32], ResetKey::new([2; 32]));
    let mut pair = Pair::connected_as(Scene { cids, ..Scene::default() });
    let now = pair.now;
    assert_eq!(pair.at_client().migrate(now, None), Err(MigrateError::Disabled));
    assert_eq!(pair.at_server().migrate(now, None), Err(MigrateError::NotClient));
}

#[test]
fn req_i02_challenges_are_padded_and_differ_each_time() {
    let mut pair = Pair::connected();
    let now = pair.now;
    // What the limit before validation leaves out of account: a full datagram of the client's.
    let packet = pair.at_client().forge_padded(now, Space::Data, &[1]);
    pair.from = MOVED.parse().unwrap();
    pair.deliver(packet);
    let mut seen = BTreeSet::new();
    for _ in 0..3 {
        let down = pair.down();
        for (data, padded) in challenges(&mut pair, &down) {
            assert!(padded, "the client sent enough");
            assert!(seen.insert(data), "a challenge was used twice");
        }
        // An acknowledgment is no answer.
        let acknowledgment = pair.forge(Space::Data, &fields(types::ACK, &[0, 0, 0, 0]));
        pair.deliver(acknowledgment);
        assert!(!pair.at_server().path().validated);
        pair.pass(Duration::from_secs(1));
    }
    assert!(seen.len() >= 2, "{seen:?}");
}

#[test]
fn req_i05_e01_a_new_address_gets_three_times_what_it_sent_until_it_answers() {
    let mut pair = Pair::connected();
    let stream = pair.at_server().open(Dir::Uni).unwrap();
    pair.at_server().write(stream, &[7; 100_000]).unwrap();
    let held = pair.forge(Space::Data, &[1]);
    let size = held.len();
    pair.from = MOVED.parse().unwrap();
    pair.deliver(held);
    let mut sent = 0;
    for _ in 0..10 {
        sent += down_here(&mut pair).iter().map(Vec::len).sum::<usize>();
        pair.pass(Duration::from_millis(50));
    }
    assert!(sent <= 3 * size, "{sent} octets for {size}");
}

#[test]
fn req_i05_only_the_newest_packet_that_is_no_probe_moves_the_connection() {
    let mut pair = Pair::connected();
    let home = pair.from;
    let older = pair.forge(Space::Data, &[1]);
    let newer = pair.forge(Space::Data, &[1]);
    pair.deliver(newer);
    pair.from = MOVED.parse().unwrap();
    pair.deliver(older);
    assert_eq!(pair.at_server().path().remote, home, "an older packet");
    let mut probe = vec![];
    frame::write_path(types::PATH_CHALLENGE, [1; 8], &mut probe);
    let probe = pair.forge(Space::Data, &probe);
    pair.deliver(probe);
    assert_eq!(pair.at_server().path().remote, home, "a probe");
    let newest = pair.forge(Space::Data, &[1]);
    pair.deliver(newest);
    assert_eq!(pair.at_server().path().remote, pair.from);
}

#[test]
fn req_i05_an_address_that_does_not_answer_gives_way_to_the_last_one_that_did() {
    let mut pair = Pair::connected();
    let home = pair.from;
    // An attacker repeats a packet of the client's from its own address, and answers nothing.
    let packet = pair.forge(Space::Data, &[1]);
    pair.from = MOVED.parse().unwrap();
    pair.deliver(packet);
    assert_eq!(pair.at_server().path().remote, pair.from);
    for _ in 0..20 {
        pair.down();
        pair.pass(Duration::from_millis(500));
    }
    let path = pair.at_server().path();
    assert_eq!((path.remote, path.validated), (home, true));
    let [_, _, paths, ..] = pair.at_server().holdings();
    assert_eq!(paths, 1, "nothing of it is left");
    pair.from = home;
    pair.at_client().ping();
    pair.settle();
    assert!(!pair.at_server().is_over());
}

#[test]
fn req_i05_where_all_paths_are_proved_a_further_address_takes_the_place_of_the_oldest() {
    let mut pair = Pair::connected();
    for port in [2000, 3000] {
        let packet = pair.forge(Space::Data, &[1]);
        pair.from.set_port(port);
        pair.deliver(packet);
        // A challenge in a small datagram proves the address alone, so that the paths before stay.
        let down = down_here(&mut pair);
        for (data, padded) in challenges(&mut pair, &down) {
            assert!(!padded);
            let mut response = vec![];
            frame::write_path(types::PATH_RESPONSE, data, &mut response);
            let packet = pair.forge(Space::Data, &response);
            pair.deliver(packet);
        }
        assert!(pair.at_server().path().validated);
    }
    assert_eq!(pair.at_server().holdings()[2], 3);
    rebind(&mut pair, REBOUND_AGAIN);
    let path = pair.at_server().path();
    assert_eq!((path.remote, path.validated), (pair.from, false));
    assert_eq!(pair.at_server().holdings()[2], 3);
    pair.settle();
    assert!(pair.at_server().path().validated);
    assert_eq!(pair.at_server().holdings()[2], 1);
}

#[test]
fn req_i06_what_was_learned_stays_with_the_host_and_not_with_another() {
    for (to, kept) in [(REBOUND, true), (MOVED, false)] {
        let mut pair = Pair::connected();
        let stream = pair.at_server().open(Dir::Uni).unwrap();
        pair.at_server().write(stream, &[7; 200_000]).unwrap();
        (0..3).for_each(|_| pair.settle());
        let before = pair.at_server().path();
        assert!(before.congestion_window > 20_000, "{before:?}");
        rebind(&mut pair, to);
        let after = pair.at_server().path();
        assert_eq!(after.remote, to.parse().unwrap());
        assert_eq!(after.congestion_window == before.congestion_window, kept, "{to}");
        assert_eq!(after.mtu == before.mtu, kept, "{to}");
    }
}

#[test]
fn req_i08_b18_a_client_that_moves_takes_fresh_connection_ids_and_so_does_the_server() {
    let mut pair = Pair::connected();
    let (to_server, to_client) = (pair.at_client().remote_cid(), pair.at_server().remote_cid());
    let now = pair.now;
    pair.at_client().migrate(now, None).unwrap();
    assert_ne!(pair.at_client().remote_cid(), to_server);
    pair.from = MOVED.parse().unwrap();
    for datagram in pair.up() {
        pair.deliver(datagram);
    }
    for datagram in down_here(&mut pair) {
        let seen = pair.peek(false, &datagram);
        assert!(seen.iter().all(|packet| packet.dcid != to_client));
        pair.deliver_down(datagram);
    }
    pair.settle();
    assert!(pair.at_server().path().validated);
    // A NAT that has moved: the client knows of nothing, and the server keeps its connection ID.
    let (to_server, to_client) = (pair.at_client().remote_cid(), pair.at_server().remote_cid());
    rebind(&mut pair, REBOUND);
    assert_eq!(pair.at_client().remote_cid(), to_server);
    assert_eq!(pair.at_server().remote_cid(), to_client);
}

#[test]
fn req_i07_a_new_address_that_was_validated_gets_a_token() {
    let mut pair = Pair::connected();
    let before = pair.client.kept_tokens();
    for datagram in rebind(&mut pair, MOVED) {
        pair.deliver_down(datagram);
    }
    pair.settle();
    assert!(pair.at_server().path().validated);
    assert_eq!(pair.client.kept_tokens(), before + 1);
}

/// What the server has to send to where the client is. The path before is asked too, by datagrams
/// that are lost.
fn down_here(pair: &mut Pair) -> Vec<Vec<u8>> {
    let (mut all, mut buffer) = (vec![], vec![]);
    while let Some(sent) = pair.server.poll_transmit(pair.now, 1, &mut buffer) {
        let datagram = std::mem::take(&mut buffer);
        if sent.remote == pair.from {
            all.push(datagram);
        }
    }
    all
}

/// Moves datagrams both ways for some seconds. Those to other addresses than the client's are lost;
/// returns their octets.
fn go_on(pair: &mut Pair) -> usize {
    let mut astray = 0;
    for _ in 0..200 {
        for datagram in pair.up() {
            pair.deliver(datagram);
        }
        let mut buffer = vec![];
        while let Some(sent) = pair.server.poll_transmit(pair.now, 1, &mut buffer) {
            let datagram = std::mem::take(&mut buffer);
            if sent.remote == pair.from {
                pair.deliver_down(datagram);
            } else {
                astray += datagram.len();
            }
        }
        while let Some((handle, event)) = pair.server.poll_event() {
            if event == Event::Connected {
                pair.at_server = Some(handle);
            }
        }
        while pair.client.poll_event().is_some() {}
        pair.pass(Duration::from_millis(50));
    }
    astray
}

#[test]
fn req_i05_e01_a_handshake_goes_on_where_a_nat_has_moved_it() {
    for to in [REBOUND, MOVED] {
        let mut pair = Pair::new(Scene::default());
        for datagram in pair.first_flights() {
            pair.deliver_down(datagram);
        }
        pair.from = to.parse().unwrap();
        let mut received = 0;
        for datagram in pair.up() {
            received += datagram.len();
            pair.deliver(datagram);
        }
        let path = pair.half_open().path();
        assert_eq!((path.remote, path.validated), (pair.from, false));
        let down = pair.down();
        let sent: usize = down.iter().map(Vec::len).sum();
        assert!(sent <= 3 * received, "{sent} octets for {received}");
        for datagram in down {
            pair.deliver_down(datagram);
        }
        go_on(&mut pair);
        assert!(pair.at_client().is_confirmed());
        let path = pair.at_server().path();
        assert_eq!((path.remote, path.validated), (pair.from, true));
    }
}

#[test]
fn req_i05_e01_whoever_copies_packets_of_a_handshake_does_not_get_it() {
    let mut pair = Pair::new(Scene::default());
    for datagram in pair.first_flights() {
        pair.deliver_down(datagram);
    }
    // The copies come first, from more addresses than there are paths, and nobody answers there.
    let home = pair.from;
    let mut copied = 0;
    for (at, datagram) in pair.up().into_iter().enumerate() {
        copied += datagram.len();
        pair.from = SocketAddr::from(([198, 51, 100, 9], 1000 + u16::try_from(at).unwrap()));
        pair.deliver(datagram.clone());
        pair.from = home;
        pair.deliver(datagram);
    }
    assert_ne!(pair.half_open().path().remote, home, "led away for the moment");
    let astray = go_on(&mut pair);
    assert!(astray <= 3 * copied, "{astray} octets for {copied}");
    assert!(pair.at_client().is_confirmed());
    let path = pair.at_server().path();
    assert_eq!((path.remote, path.validated), (home, true));
}

#[test]
fn req_i05_copies_that_overtake_lead_nobody_away_who_is_still_there() {
    let mut pair = Pair::connected();
    let home = pair.from;
    for copy in 0..5 {
        pair.at_client().ping();
        for datagram in pair.up() {
            pair.from = SocketAddr::from(([198, 51, 100, 9], 1000 + copy));
            pair.deliver(datagram.clone());
            pair.from = home;
            pair.deliver(datagram);
        }
    }
    assert_ne!(pair.at_server().path().remote, home, "led away for the moment");
    // The path before is asked too, and the client's answer leads back.
    for datagram in pair.down() {
        pair.deliver_down(datagram);
    }
    for datagram in pair.up() {
        pair.deliver(datagram);
    }
    let path = pair.at_server().path();
    assert_eq!((path.remote, path.validated), (home, true));
}
