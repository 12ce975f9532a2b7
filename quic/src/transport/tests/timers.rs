//! Timeouts: how long a connection waits for an answer, for a sign of life, and after its end.

use super::{
    wire::{Fate, Wire, all_arrive},
    *,
};
use crate::transport::frame::Frame;

const ROUND_TRIP: Duration = Duration::from_millis(100);
/// What our own endpoints promise.
const MAX_ACK_DELAY: Duration = Duration::from_millis(25);

/// How long the server waits after a PING that is lost before it sends a probe.
fn wait_for_probe(wire: &mut Wire) -> Duration {
    let start = wire.pair.now;
    let mut left = vec![];
    wire.pair.at_server().ping();
    let handle = wire.pair.at_server.unwrap();
    wire.pair.server.look_at(handle);
    wire.run(Duration::from_secs(5), &mut |_, datagram| {
        if !datagram.upward {
            left.push(datagram.at - start);
        }
        if left.len() == 1 { Fate::Lost } else { Fate::Arrives }
    });
    assert_eq!(left[0], Duration::ZERO);
    left[1]
}

/// Lets time pass up to one deadline of an end after the other, until something is done.
fn until(
    pair: &mut Pair,
    end: fn(&mut Pair) -> &mut Endpoint,
    mut is_done: impl FnMut(&mut Pair) -> bool,
) {
    for _ in 0..100 {
        let deadline = end(pair).deadline().expect("a deadline");
        pair.pass(deadline.saturating_duration_since(pair.now));
        if is_done(pair) {
            return;
        }
    }
    panic!("nothing comes of deadlines");
}

#[test]
fn req_j03_the_probe_timeout_waits_for_the_delay_that_the_peer_announced() {
    let announced = Duration::from_millis(500);
    let mut wire = Wire::new(Scene::default(), ROUND_TRIP);
    wire.pair.at_client().announce(Arc::clone(&tls().client), |parameters| {
        parameters.max_ack_delay = announced;
    });
    wire.run(Duration::from_secs(5), &mut all_arrive);
    let wait = wait_for_probe(&mut wire);
    assert!(wait > ROUND_TRIP + announced, "{wait:?}");
    assert!(wait < 4 * ROUND_TRIP + announced, "{wait:?}");
}

#[test]
fn req_j03_the_delay_that_the_peer_announced_does_not_count_in_the_handshake() {
    let mut pair = Pair::new(Scene::default());
    pair.at_client().announce(Arc::clone(&tls().client), |parameters| {
        parameters.max_ack_delay = Duration::from_millis(500);
    });
    let flight = pair.first_flights();
    assert!(!flight.is_empty());
    let lost = pair.now;
    until(&mut pair, |pair| &mut pair.server, |pair| !pair.down().is_empty());
    assert_eq!(pair.now - lost, Duration::from_millis(999));
}

#[test]
fn req_j05_a_probe_repeats_what_waits_for_an_answer() {
    let mut wire = Wire::connected(Scene::default(), ROUND_TRIP);
    let mut left = vec![];
    wire.download(100);
    wire.run(Duration::from_secs(2), &mut |pair, datagram| {
        if !datagram.upward {
            left.push(datagram.says(pair, |frame| matches!(frame, Frame::Stream(_))));
        }
        if left.len() == 1 { Fate::Lost } else { Fate::Arrives }
    });
    assert_eq!(left[..2], [true, true]);
    assert_eq!(wire.pair.at_server().stats().probe_timeouts, 1);
}

#[test]
fn req_j05_a_probe_timeout_of_a_handshake_probes_every_space_that_waits() {
    let mut pair = Pair::new(Scene::default());
    let flight = pair.first_flights();
    assert!(!flight.is_empty());
    // The server has packets in flight in both, and the client has heard neither.
    let mut seen = vec![];
    for _ in 0..20 {
        let Some(deadline) = pair.server.deadline().filter(|_| seen.is_empty()) else { break };
        pair.pass(deadline - pair.now);
        for datagram in pair.down() {
            pair.deliver_down(datagram.clone());
            seen.extend(pair.peek(false, &datagram).iter().map(|packet| packet.space));
        }
    }
    for space in [Space::Initial, Space::Handshake] {
        assert!(seen.contains(&space), "{seen:?}");
    }
}

#[test]
fn req_h01_an_idle_timeout_is_never_below_three_probe_timeouts() {
    let config =
        TransportConfig { idle_timeout: Duration::from_millis(10), ..TransportConfig::default() };
    let mut wire = Wire::new(Scene::with(config), ROUND_TRIP);
    // The client's part of the handshake ends with what it hears last.
    let mut last = wire.pair.now;
    wire.run(Duration::from_millis(400), &mut |_, datagram| {
        last = datagram.at + ROUND_TRIP / 2;
        Fate::Arrives
    });
    let least = 3 * (ROUND_TRIP + MAX_ACK_DELAY);
    wire.run(last + least - wire.pair.now, &mut all_arrive);
    assert_eq!((&wire.pair.closed, &wire.pair.client_closed), (&None, &None));
    assert!(wire.pair.at_server().is_confirmed() && wire.pair.at_client().is_confirmed());
    wire.run(Duration::from_secs(3), &mut all_arrive);
    assert_eq!(wire.pair.closed, Some(ConnectionError::IdleTimeout));
    assert_eq!(wire.pair.client_closed, Some(ConnectionError::IdleTimeout));
}

#[test]
fn req_h01_packets_that_nobody_answers_do_not_prolong_a_connection_for_ever() {
    let mut wire = Wire::connected(Scene::default(), ROUND_TRIP);
    let start = wire.pair.now;
    let at_client = wire.pair.at_client;
    while wire.pair.client_closed.is_none() {
        assert!(wire.pair.now - start < Duration::from_secs(60));
        if let Some(mut client) = wire.pair.client.connection_mut(at_client) {
            client.ping();
        }
        wire.run(Duration::from_secs(1), &mut |_, _| Fate::Lost);
    }
    assert_eq!(wire.pair.client_closed, Some(ConnectionError::IdleTimeout));
    // Counted from the first of them.
    let lasted = wire.pair.now - start;
    assert!((30..=31).contains(&lasted.as_secs()), "{lasted:?}");
}

#[test]
fn req_h03_h05_an_end_that_closes_falls_silent_when_the_other_one_closes_too() {
    let mut pair = Pair::connected();
    let packets: Vec<_> = (0..20).map(|_| pair.forge(Space::Data, &[1])).collect();
    let close = pair.forge(Space::Data, &fields(types::APPLICATION_CLOSE, &[0, 0]));
    let now = pair.now;
    pair.at_server().close(now, 7, "bye".into());
    assert_eq!(pair.down().len(), 1);
    pair.deliver(close);
    assert!(pair.down().is_empty());
    for packet in packets {
        pair.deliver(packet);
        assert!(pair.down().is_empty());
    }
    assert_eq!(pair.server.connection_count(), 1, "until it is certain");
}

#[test]
fn req_h03_closing_and_draining_last_three_probe_timeouts() {
    let mut wire = Wire::connected(Scene::default(), ROUND_TRIP);
    let now = wire.pair.now;
    wire.pair.at_server().close(now, 7, "bye".into());
    let handle = wire.pair.at_server.unwrap();
    wire.pair.server.look_at(handle);
    // The client hears of it half a round trip later, and falls silent.
    let least = 3 * (ROUND_TRIP + MAX_ACK_DELAY);
    let mut closes = 0;
    wire.run(least, &mut |_, datagram| {
        assert!(!datagram.upward, "draining is silent");
        closes += 1;
        Fate::Arrives
    });
    assert_eq!(closes, 1);
    assert_eq!(wire.pair.server.connection_count(), 1, "closing");
    // Whoever still sends is still told.
    let late = wire.pair.forge(Space::Data, &[1]);
    wire.pair.deliver(late);
    assert_eq!(wire.pair.down().len(), 1);
    wire.run(ROUND_TRIP / 2, &mut all_arrive);
    assert_eq!(wire.pair.client.connection_count(), 1, "draining");
    wire.run(Duration::from_secs(2), &mut all_arrive);
    assert_eq!((wire.pair.server.connection_count(), wire.pair.client.connection_count()), (0, 0));
}

#[test]
fn req_j07_a_retry_brings_the_probe_timeout_back() {
    let mut pair = Pair::new(Scene::default());
    // Nobody answers for a while.
    pair.up();
    until(
        &mut pair,
        |pair| &mut pair.client,
        |pair| {
            pair.up();
            pair.at_client().stats().probe_timeouts == 3
        },
    );
    let retry = packets::retry(&mut pair, ConnectionId::new(&[3; 8]).unwrap(), b"token");
    pair.deliver_down(retry);
    assert!(!pair.up().is_empty());
    let sent = pair.now;
    until(&mut pair, |pair| &mut pair.client, |pair| !pair.up().is_empty());
    assert_eq!(pair.now - sent, Duration::from_millis(999), "as for a first flight");
}

#[test]
fn req_j03_a_client_keeps_backing_off_until_the_server_has_certainly_validated_it() {
    let mut pair = Pair::new(Scene::default());
    pair.up();
    until(&mut pair, |pair| &mut pair.client, |pair| pair.at_client().stats().probe_timeouts == 1);
    // The probes arrive, and an acknowledgment without a hello comes back.
    let mut largest = 0;
    for datagram in pair.up() {
        pair.deliver(datagram.clone());
        largest = pair.peek(true, &datagram)[0].number;
    }
    pair.down();
    pair.pass(ROUND_TRIP);
    let now = pair.now;
    let frames = fields(types::ACK, &[largest, 0, 0, largest]);
    let answer = pair.half_open().forge_padded(now, Space::Initial, &frames);
    pair.deliver_down(answer);
    assert_eq!((pair.up().len(), pair.at_client().path().in_flight), (0, 0));
    let sent = pair.now;
    until(&mut pair, |pair| &mut pair.client, |pair| !pair.up().is_empty());
    // A first sample makes three round trips of a probe timeout.
    assert_eq!(pair.now - sent, 2 * 3 * ROUND_TRIP);
}

#[test]
fn req_j02_a_loss_that_few_packets_follow_is_noticed_by_time_and_before_a_probe() {
    let mut wire = Wire::connected(Scene::default(), ROUND_TRIP);
    let start = wire.pair.now;
    let (mut down, mut again) = (0, None);
    wire.download(2000);
    wire.run(Duration::from_secs(2), &mut |_, datagram| {
        if datagram.upward {
            return Fate::Arrives;
        }
        down += 1;
        if down == 3 {
            again = Some(datagram.at - start);
        }
        if down == 1 { Fate::Lost } else { Fate::Arrives }
    });
    assert_eq!(wire.read, 2000);
    let stats = wire.pair.at_server().stats();
    assert_eq!((stats.lost_packets, stats.probe_timeouts), (1, 0));
    let again = again.unwrap();
    assert!(again >= ROUND_TRIP * 9 / 8 && again < ROUND_TRIP * 3 / 2, "{again:?}");
}
