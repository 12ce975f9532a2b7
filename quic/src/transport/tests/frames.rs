//! Section F of the requirements: what frames say, and that what is lost comes again.

use super::*;
use crate::transport::frame::Frame;

/// The names of the frames in `datagrams` to the client.
fn names(pair: &mut Pair, datagrams: &[Vec<u8>]) -> Vec<String> {
    let mut all = vec![];
    for datagram in datagrams {
        for packet in pair.at_client().peek(datagram) {
            let name = |frame: Frame<'_>| {
                let text = format!("{frame:?}");
                text.split(['(', ' ']).next().unwrap_or_default().to_owned()
            };
            all.extend(packet.frames().map(name));
        }
    }
    all
}

/// Whether all of `wanted` are among `found`.
fn all_in(wanted: &[&str], found: &[String]) -> bool {
    wanted.iter().all(|wanted| found.iter().any(|found| found == wanted))
}

#[test]
fn req_f02_a_packet_is_acknowledged_only_after_its_frames_were_processed() {
    let mut pair = Pair::connected();
    // A good frame before a bad one.
    let frames = [vec![1], fields(0x2f, &[])].concat();
    let packet = pair.forge(Space::Data, &frames);
    pair.deliver(packet);
    let answer = pair.down();
    assert_eq!(names(&mut pair, &answer), ["Close"]);
}

#[test]
fn req_f07_e09_acknowledgments_state_how_long_they_waited_and_those_of_the_handshake_do_not() {
    let mut pair = Pair::new(Scene::default());
    for datagram in pair.first_flights() {
        for packet in pair.at_client().peek(&datagram) {
            for frame in packet.frames() {
                let Frame::Ack(ack) = frame else { continue };
                assert_eq!(ack.delay, 0);
            }
        }
        pair.deliver_down(datagram);
    }
    // The client acknowledges at once, too.
    let up = pair.up();
    let server = pair.half_open();
    let acknowledged = up.iter().flat_map(|datagram| server.peek(datagram)).any(|packet| {
        packet.space != Space::Data && packet.frames().any(|frame| matches!(frame, Frame::Ack(_)))
    });
    assert!(acknowledged);
    let mut pair = Pair::connected();
    let ping = pair.forge(Space::Data, &[1]);
    pair.deliver(ping);
    assert!(pair.down().is_empty());
    pair.pass(Duration::from_millis(25));
    let down = pair.down();
    let delays: Vec<_> = pair.at_client().peek(&down[0])[0]
        .frames()
        .filter_map(|frame| if let Frame::Ack(ack) = frame { Some(ack.delay << 3) } else { None })
        .collect();
    assert_eq!(delays, [25_000]);
}

#[test]
fn req_f09_what_a_server_says_after_the_handshake_comes_again_until_it_is_acknowledged() {
    let mut pair = Pair::new(Scene::default());
    for datagram in pair.first_flights() {
        pair.deliver_down(datagram);
    }
    for datagram in pair.up() {
        pair.deliver(datagram);
    }
    let wanted = ["HandshakeDone", "Crypto", "NewToken"];
    for round in 0..3 {
        let lost = pair.down();
        let found = names(&mut pair, &lost);
        assert!(all_in(&wanted, &found), "round {round}: {found:?}");
        pair.pass(Duration::from_secs(1 << round));
    }
    pair.settle();
    assert!(pair.at_client().is_confirmed());
    pair.pass(Duration::from_secs(10));
    let quiet = pair.down();
    assert!(!all_in(&["HandshakeDone"], &names(&mut pair, &quiet)));
}

#[test]
fn req_f09_connection_ids_are_announced_and_retired_until_that_is_acknowledged() {
    let mut pair = Pair::connected();
    let fresh = CidIssuer::standalone(8, [9; 32], ResetKey::new([8; 32]));
    pair.server.set_cid_config(fresh);
    for round in 0..3 {
        let lost = pair.down();
        let found = names(&mut pair, &lost);
        assert!(all_in(&["NewConnectionId"], &found), "round {round}: {found:?}");
        pair.pass(Duration::from_secs(1 << round));
    }
    for datagram in pair.down() {
        pair.deliver_down(datagram);
    }
    for round in 0..3 {
        let retires = |packet: &connection::Seen| {
            packet.frames().any(|frame| matches!(frame, Frame::RetireConnectionId { .. }))
        };
        let up = pair.up();
        let found = up.iter().any(|datagram| pair.peek(true, datagram).iter().any(retires));
        assert!(found, "round {round}");
        pair.pass(Duration::from_secs(1 << round));
    }
    pair.settle();
    assert_eq!(pair.at_server().local_cids().count(), 4);
}

#[test]
fn req_f09_stream_frames_come_again_as_things_are_then() {
    let mut pair = Pair::connected();
    let (data, reset) = (pair.at_server().open(Dir::Uni), pair.at_server().open(Dir::Uni));
    let (data, reset) = (data.unwrap(), reset.unwrap());
    pair.at_server().write(data, b"first").unwrap();
    pair.at_server().finish(data).unwrap();
    pair.at_server().write(reset, b"gone").unwrap();
    pair.at_server().reset(reset, 7).unwrap();
    let stopped = pair.at_client().open(Dir::Uni).unwrap();
    pair.at_client().write(stopped, &[0; 1000]).unwrap();
    for datagram in pair.up() {
        pair.deliver(datagram);
    }
    pair.at_server().stop(stopped, 9).unwrap();
    let wanted = ["Stream", "ResetStream", "StopSending"];
    for round in 0..3 {
        let lost = pair.down();
        let found = names(&mut pair, &lost);
        assert!(all_in(&wanted, &found), "round {round}: {found:?}");
        pair.pass(Duration::from_secs(1 << round));
    }
    // Once it is reset, the data of a stream is not repeated.
    pair.at_server().reset(data, 1).unwrap();
    let down = pair.down();
    assert!(!all_in(&["Stream"], &names(&mut pair, &down)));
    pair.pass(Duration::from_secs(10));
    pair.settle();
    assert_eq!(pair.at_client().read(data, &mut [0; 9]), Err(ReadError::Reset(1)));
    assert_eq!(pair.at_client().read(reset, &mut [0; 9]), Err(ReadError::Reset(7)));
}

#[test]
fn req_f09_challenges_are_repeated_with_new_data_and_responses_are_not() {
    let mut pair = Pair::connected();
    let mut frames = vec![];
    frame::write_path(types::PATH_CHALLENGE, [9; 8], &mut frames);
    let packet = pair.forge(Space::Data, &frames);
    pair.deliver(packet);
    let lost = pair.down();
    assert!(all_in(&["PathResponse"], &names(&mut pair, &lost)));
    for _ in 0..3 {
        pair.pass(Duration::from_secs(1));
        let again = pair.down();
        assert!(!all_in(&["PathResponse"], &names(&mut pair, &again)));
    }
}

#[test]
fn req_f14_reasons_for_closing_are_carried_and_not_trusted() {
    let mut pair = Pair::connected();
    let reason = [b'\n', 0xff, 0xfe, b'x'];
    let mut frames = fields(types::APPLICATION_CLOSE, &[77, reason.len() as u64]);
    frames.extend_from_slice(&reason);
    let packet = pair.forge(Space::Data, &frames);
    pair.deliver(packet);
    pair.exchange();
    let error = pair.closed.clone().unwrap();
    let expected = PeerClose::Application { code: 77, reason: reason.to_vec().into() };
    assert_eq!(error, ConnectionError::PeerClosed(expected));
    assert!(!error.to_string().contains('\n'));
    // Ours says who, what and why.
    let mut pair = Pair::connected();
    assert_eq!(pair.verdict(Space::Data, &[7, 1, 9]), Some(Code::PROTOCOL_VIOLATION));
    let Some(ConnectionError::PeerClosed(PeerClose::Transport { frame_type, reason, .. })) =
        &pair.client_closed
    else {
        panic!("{:?}", pair.client_closed)
    };
    assert_eq!((*frame_type, reason.is_empty()), (7, false));
}

#[test]
fn req_f18_datagrams_are_acknowledged_and_counted_and_never_repeated() {
    let mut pair = Pair::connected();
    pair.at_server().send_datagram(bytes::Bytes::from_static(b"once")).unwrap();
    let lost = pair.down();
    assert!(all_in(&["Datagram"], &names(&mut pair, &lost)));
    assert!(pair.at_server().path().in_flight > 0);
    for round in 0..3 {
        pair.pass(Duration::from_secs(1 << round));
        let probes = pair.down();
        assert!(!all_in(&["Datagram"], &names(&mut pair, &probes)));
        for probe in probes {
            pair.deliver_down(probe);
        }
        pair.exchange();
    }
    assert_eq!(pair.at_server().path().in_flight, 0);
    assert!(pair.at_server().stats().lost_packets > 0);
    // One that arrives is acknowledged.
    pair.at_server().send_datagram(bytes::Bytes::from_static(b"twice")).unwrap();
    pair.settle();
    assert_eq!(pair.at_client().receive_datagram().as_deref(), Some(&b"twice"[..]));
    assert_eq!(pair.at_server().path().in_flight, 0);
}

#[test]
fn req_f16_a_ping_is_acknowledged_and_padding_is_not() {
    for (space, frames, answered) in [
        (Space::Data, &[1][..], true),
        (Space::Data, &[0], false),
        (Space::Data, &[0, 1, 0, 0], true),
        (Space::Data, &[0; 1000], false),
        (Space::Initial, &[0, 1], true),
        (Space::Initial, &[0, 0], false),
    ] {
        let mut pair = match space {
            Space::Data => Pair::connected(),
            _ => Pair::new(Scene::default()),
        };
        let now = pair.now;
        let packet = pair.at_client().forge_padded(now, space, frames);
        pair.deliver(packet);
        pair.pass(Duration::from_millis(30));
        assert_eq!(!pair.down().is_empty(), answered, "{space:?} {frames:?}");
        assert_eq!(pair.code(), None);
    }
}
