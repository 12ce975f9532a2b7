//! Where datagrams come from and go to: whom a client hears, where challenges are answered, and
//! what a path does not learn from another.

use super::{wire::Wire, *};

const ROUND_TRIP: Duration = Duration::from_millis(100);
const MOVED: &str = "198.51.100.2:1000";

fn challenge(data: u8) -> Vec<u8> {
    let mut out = vec![];
    frame::write_path(types::PATH_CHALLENGE, [data; 8], &mut out);
    out
}

/// The sizes of datagrams with a PATH_RESPONSE, and where they go.
fn responses(pair: &mut Pair, upward: bool) -> Vec<(usize, SocketAddr)> {
    let (mut found, mut bytes) = (vec![], vec![]);
    loop {
        let end = if upward { &mut pair.client } else { &mut pair.server };
        let Some(sent) = end.poll_transmit(pair.now, 1, &mut bytes) else { return found };
        let datagram = std::mem::take(&mut bytes);
        let response = |frame: frame::Frame<'_>| matches!(frame, frame::Frame::PathResponse(_));
        let packets = pair.peek(upward, &datagram);
        if packets.iter().any(|packet| packet.frames().any(response)) {
            found.push((datagram.len(), sent.remote));
        }
    }
}

#[test]
fn req_i03_challenges_are_answered_in_full_datagrams_by_both_ends() {
    let mut pair = Pair::connected();
    let now = pair.now;
    let packet = pair.at_server().forge(now, Space::Data, &challenge(1));
    pair.deliver_down(packet);
    assert_eq!(responses(&mut pair, true), [(1200, SERVER.parse().unwrap())]);
    let packet = pair.forge(Space::Data, &challenge(2));
    pair.deliver(packet);
    assert_eq!(responses(&mut pair, false), [(1200, CLIENT.parse().unwrap())]);
}

#[test]
fn req_i03_a_challenge_from_elsewhere_is_answered_there_in_as_full_a_datagram_as_allowed() {
    for padded in [true, false] {
        let mut pair = Pair::connected();
        let now = pair.now;
        let packet = match padded {
            true => pair.at_client().forge_padded(now, Space::Data, &challenge(1)),
            false => pair.at_client().forge(now, Space::Data, &challenge(1)),
        };
        let size = if padded { 1200 } else { 3 * packet.len() };
        pair.from = MOVED.parse().unwrap();
        pair.deliver(packet);
        assert_eq!(responses(&mut pair, false), [(size, pair.from)]);
        assert_eq!(pair.at_server().path().remote, CLIENT.parse().unwrap());
    }
}

#[test]
fn a_client_hears_its_server_from_no_other_address() {
    let mut pair = Pair::connected();
    let now = pair.now;
    let before = pair.at_client().stats();
    for (at, (remote, heard)) in
        [(MOVED, false), ("192.0.2.1:444", false), (SERVER, true)].into_iter().enumerate()
    {
        let stream = StreamId::new(Side::Server, Dir::Uni, 0);
        let packet = pair.at_server().forge(now, Space::Data, &super::stream(3, 0, b"x"));
        let from = Received { remote: remote.parse().unwrap(), local: None, ecn: None };
        pair.client.handle_datagram(now, from, &mut packet.clone());
        let client = pair.at_client();
        assert_eq!(client.read(stream, &mut [0; 9]).is_ok(), heard, "{remote}");
        let dropped = client.dropped(DropReason::UnexpectedAddress);
        assert_eq!(dropped, (at as u64 + 1).min(2));
    }
    assert_eq!(pair.at_client().stats().received.datagrams, before.received.datagrams + 3);
}

/// A server that has sent a flight to where its client was, and the numbers of its packets.
fn moved_with_a_flight_behind(pair: &mut Pair) -> Vec<u64> {
    let stream = pair.at_server().open(Dir::Uni).unwrap();
    pair.at_server().write(stream, &[7; 8000]).unwrap();
    let flight = pair.down();
    let numbers = flight.iter().flat_map(|datagram| pair.peek(false, datagram));
    let numbers = numbers.map(|packet| packet.number).collect();
    let now = pair.now;
    let packet = pair.at_client().forge_padded(now, Space::Data, &[1]);
    pair.from = MOVED.parse().unwrap();
    pair.deliver(packet);
    assert_eq!(pair.at_server().path().remote, pair.from);
    numbers
}

#[test]
fn req_i06_losses_and_samples_of_the_path_before_say_nothing_about_the_new_one() {
    let mut pair = Wire::connected(Scene::default(), ROUND_TRIP).pair;
    let numbers = moved_with_a_flight_behind(&mut pair);
    let fresh = pair.at_server().path();
    assert_eq!((fresh.in_flight, fresh.congestion_window), (0, 12_000));
    // The last packet to the old address was acknowledged, those before it count as lost.
    pair.now += ROUND_TRIP;
    let last = *numbers.last().unwrap();
    let packet = pair.forge(Space::Data, &fields(types::ACK, &[last, 0, 0, 0]));
    let lost = pair.at_server().stats().lost_packets;
    pair.deliver(packet);
    assert!(pair.at_server().stats().lost_packets > lost);
    let path = pair.at_server().path();
    assert_eq!(path.congestion_window, fresh.congestion_window);
    assert_eq!((path.rtt, path.min_rtt), (fresh.rtt, fresh.min_rtt));
}
