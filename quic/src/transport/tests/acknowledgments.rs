//! What is acknowledged, what an acknowledgment is believed, and what happens without any.

use super::{
    wire::{Fate, Wire, all_arrive},
    *,
};
use crate::transport::frame::Frame;

const ROUND_TRIP: Duration = Duration::from_millis(100);

/// Nothing but congestion limits what is on its way, so that a client that downloads sends
/// acknowledgments alone.
fn unlimited() -> Scene {
    Scene::with(TransportConfig {
        streams: StreamLimits {
            stream_window: 1 << 30,
            connection_window: 1 << 30,
            ..StreamLimits::default()
        },
        ..TransportConfig::default()
    })
}

/// Has the server send a PING now, which arrives nowhere; returns the number of its packet.
fn ping(pair: &mut Pair) -> u64 {
    pair.at_server().ping();
    let datagrams = pair.down();
    pair.peek(false, &datagrams[0])[0].number
}

/// Has the server hear an ACK frame with these fields.
fn acknowledge(pair: &mut Pair, fields_of_ack: &[u64]) {
    let packet = pair.forge(Space::Data, &fields(types::ACK, fields_of_ack));
    pair.deliver(packet);
}

#[test]
fn req_j01_a_peers_delay_counts_up_to_what_it_promised_and_by_its_exponent() {
    const EXPONENT: u8 = 10;
    let promised = Duration::from_millis(40);
    for (claimed, believed) in [(20, 20), (90, 40)] {
        let mut wire = Wire::new(Scene::default(), ROUND_TRIP);
        wire.pair.at_client().announce(Arc::clone(&tls().client), |parameters| {
            parameters.max_ack_delay = promised;
            parameters.ack_delay_exponent = EXPONENT;
        });
        wire.run(Duration::from_secs(5), &mut all_arrive);
        let mut pair = wire.pair;
        let before = pair.at_server().path();
        let number = ping(&mut pair);
        let took = before.min_rtt + Duration::from_millis(100);
        pair.now += took;
        acknowledge(&mut pair, &[number, (claimed * 1000) >> EXPONENT, 0, 0]);
        let after = pair.at_server().path();
        let expected = (before.rtt * 7 + took - Duration::from_millis(believed)) / 8;
        let off = after.rtt.abs_diff(expected);
        assert!(off < Duration::from_millis(1), "{claimed} ms: {:?}, not {expected:?}", after.rtt);
    }
}

#[test]
fn req_j01_only_the_highest_packet_gives_a_sample_and_only_when_it_is_news() {
    let mut pair = Wire::connected(Scene::default(), ROUND_TRIP).pair;
    let (first, second) = (ping(&mut pair), ping(&mut pair));
    assert_eq!(first + 1, second);
    pair.now += ROUND_TRIP;
    acknowledge(&mut pair, &[second, 0, 0, 0]);
    let before = pair.at_server().path();
    pair.now += Duration::from_millis(10);
    acknowledge(&mut pair, &[second, 0, 0, 1]);
    let after = pair.at_server().path();
    assert!(after.in_flight < before.in_flight, "the first one was acknowledged too");
    assert_eq!(after.rtt, before.rtt);
}

#[test]
fn req_f03_a_single_packet_is_acknowledged_within_the_delay_we_promise_and_not_before() {
    let mut wire = Wire::connected(Scene::default(), ROUND_TRIP);
    let (start, mut answers) = (wire.pair.now, vec![]);
    wire.download(100);
    wire.run(ROUND_TRIP, &mut |_, datagram| {
        if datagram.upward {
            answers.push(datagram.at - start);
        }
        Fate::Arrives
    });
    assert_eq!(answers, [ROUND_TRIP / 2 + Duration::from_millis(25)]);
}

#[test]
fn req_f04_who_only_acknowledges_asks_for_an_acknowledgment_now_and_then() {
    let mut wire = Wire::connected(unlimited(), ROUND_TRIP);
    let (mut silent, mut longest, mut asked, mut all) = (0, 0, 0, 0);
    wire.download(2_000_000);
    wire.run(Duration::from_secs(5), &mut |pair, datagram| {
        if datagram.upward {
            all += 1;
            let asks = datagram.says(pair, |frame| frame.is_ack_eliciting());
            (silent, asked) = if asks { (0, asked + 1) } else { (silent + 1, asked) };
            longest = longest.max(silent);
        }
        Fate::Arrives
    });
    assert_eq!(wire.read, 2_000_000);
    assert!(all > 300, "{all} acknowledgments");
    assert!(longest <= 32, "{longest} in a row elicit nothing");
    assert!(asked <= 1 + all / 32, "{asked} of {all} ask");
}

#[test]
fn req_f06_what_the_peer_is_known_to_know_is_not_said_again() {
    let mut wire = Wire::connected(unlimited(), ROUND_TRIP);
    let (mut count, mut most, mut last) = (0, 0, 0);
    wire.download(600_000);
    wire.run(Duration::from_secs(30), &mut |pair, datagram| {
        if datagram.upward {
            datagram.says(pair, |_| false);
            for packet in pair.peek(true, &datagram.bytes) {
                for frame in packet.frames() {
                    if let Frame::Ack(ack) = frame {
                        last = ack.ranges().count();
                        most = last.max(most);
                    }
                }
            }
            return Fate::Arrives;
        }
        count += 1;
        // Half of the download is lossy: its gaps never fill, since numbers are used once.
        if count < 250 && count % 8 == 0 { Fate::Lost } else { Fate::Arrives }
    });
    assert_eq!(wire.read, 600_000);
    // Numbers that the server leaves out on purpose make a few gaps to the end.
    assert!(most > 10, "{most} ranges at most");
    assert!(last <= 5, "{last} ranges in the end");
}

#[test]
fn req_f11_who_acknowledges_what_it_did_not_get_gives_itself_away() {
    let mut wire = Wire::connected(unlimited(), ROUND_TRIP);
    let mut numbers = vec![];
    wire.download(300_000);
    wire.run(Duration::from_secs(5), &mut |pair, datagram| {
        if !datagram.upward {
            numbers.extend(pair.peek(false, &datagram.bytes).iter().map(|packet| packet.number));
        }
        Fate::Arrives
    });
    let gaps: Vec<_> = numbers.windows(2).filter(|pair| pair[1] != pair[0] + 1).collect();
    assert!(gaps.iter().all(|gap| gap[1] == gap[0] + 2), "{gaps:?}");
    assert!(gaps.len() >= 3, "{} numbers left out of {}", gaps.len(), numbers.len());
    // All that was sent may be acknowledged, but not what is between.
    let (largest, left_out) = (*numbers.last().unwrap(), gaps[gaps.len() - 1][0] + 1);
    let mut pair = wire.pair;
    acknowledge(&mut pair, &[largest, 0, 0, largest - left_out - 1]);
    assert!(!pair.at_server().is_over());
    acknowledge(&mut pair, &[largest, 0, 0, largest - left_out]);
    assert_eq!(pair.code(), Some(Code::PROTOCOL_VIOLATION));
}

#[test]
fn req_k11_packets_with_each_mark_are_counted_and_the_counts_said() {
    let mut pair = Pair::connected();
    for ecn in [Ecn::Ect0, Ecn::Ect1, Ecn::Ect1, Ecn::Ce, Ecn::Ce, Ecn::Ce] {
        let mut packet = pair.forge(Space::Data, &[1]);
        let from = Received { remote: pair.from, local: None, ecn: Some(ecn) };
        pair.server.handle_datagram(pair.now, from, &mut packet);
    }
    let down = pair.down();
    let seen = pair.peek(false, &down[0]);
    let counts = seen.iter().flat_map(|packet| packet.frames()).find_map(|frame| match frame {
        Frame::Ack(ack) => ack.ecn,
        _ => None,
    });
    assert_eq!(counts, Some(frame::EcnCounts { ect0: 1, ect1: 2, ce: 3 }));
}
