//! Section H of the requirements: how connections end.

use super::{
    wire::{Fate, Wire, all_arrive},
    *,
};

#[test]
fn req_h04_e01_a_server_that_closes_stays_within_three_times_what_it_got() {
    let mut pair = Pair::new(Scene::default());
    let first = pair.up();
    pair.deliver(first[0].clone());
    let mut sent: usize = pair.down().iter().map(Vec::len).sum();
    let now = pair.now;
    pair.half_open().close(now, 1, "no".into());
    for _ in 0..50 {
        sent += pair.down().iter().map(Vec::len).sum::<usize>();
        // What arrives while closing may be answered, but does not raise the limit by much.
        pair.deliver(first[0].clone());
    }
    let received = 51 * first[0].len();
    assert!(sent <= 3 * received);
    assert!(sent <= 8 * 1200, "{sent} octets to an address that nobody proved");
}

#[test]
fn req_h05_an_endpoint_that_was_told_of_the_end_falls_silent() {
    let mut pair = Pair::connected();
    let now = pair.now;
    pair.at_client().close(now, 3, "bye".into());
    for datagram in pair.up() {
        pair.deliver(datagram);
    }
    for _ in 0..20 {
        let packet = pair.forge(Space::Data, &[1]);
        pair.deliver(packet);
        assert!(pair.down().is_empty());
    }
    assert_eq!(pair.server.connection_count(), 1, "for three probe timeouts");
    pair.pass(Duration::from_secs(10));
    pair.down();
    assert_eq!(pair.server.connection_count(), 0);
}

#[test]
fn req_d07_h01_the_smaller_idle_timeout_counts_at_both_ends() {
    for (client, server, expected) in [(30, 10, 10), (10, 30, 10), (0, 10, 10), (10, 0, 10)] {
        let with = |seconds| {
            let idle_timeout = Duration::from_secs(seconds);
            Arc::new(TransportConfig { idle_timeout, ..TransportConfig::default() })
        };
        let mut scene = Scene::default();
        (scene.client.transport, scene.server.transport) = (with(client), with(server));
        let mut pair = Pair::connected_as(scene);
        pair.pass(Duration::from_secs(expected) - Duration::from_secs(1));
        pair.exchange();
        assert_eq!((&pair.closed, &pair.client_closed), (&None, &None));
        pair.pass(Duration::from_secs(2));
        pair.exchange();
        assert_eq!(pair.closed, Some(ConnectionError::IdleTimeout));
        assert_eq!(pair.client_closed, Some(ConnectionError::IdleTimeout));
    }
}

#[test]
fn req_h01_a_packet_that_arrives_and_the_first_one_sent_restart_the_idle_time() {
    let mut pair = Pair::connected();
    pair.pass(Duration::from_secs(20));
    pair.at_client().ping();
    let lost = pair.up();
    assert!(!lost.is_empty() && pair.down().is_empty());
    // Thirty seconds after the ping left, not after the handshake.
    pair.pass(Duration::from_secs(20));
    assert!(!pair.at_client().is_over());
    pair.up();
    // The server, which has heard nothing for 40 seconds, is gone.
    pair.down();
    for datagram in lost {
        pair.deliver(datagram);
    }
    assert_eq!(pair.server.connection_count(), 0);
    pair.pass(Duration::from_secs(11));
    pair.up();
    assert_eq!(pair.client.connection_count(), 0);
}

#[test]
fn req_h02_keep_alives_leave_only_where_they_are_asked_for() {
    for asked in [false, true] {
        let keep_alive = asked.then_some(Duration::from_secs(10));
        let mut scene = Scene::default();
        let config = TransportConfig { keep_alive, ..TransportConfig::default() };
        scene.client.transport = Arc::new(config);
        let mut pair = Pair::connected_as(scene);
        for _ in 0..20 {
            pair.pass(Duration::from_secs(5));
            pair.exchange();
        }
        assert_eq!(pair.server.connection_count(), usize::from(asked));
    }
}

#[test]
fn what_was_written_arrives_before_the_end_if_that_may_wait() {
    let mut wire = Wire::connected(Scene::default(), Duration::from_millis(100));
    wire.download(200_000);
    // It is written, and every tenth datagram is lost.
    let mut count = 0;
    let mut lossy = |_: &mut Pair, _: &wire::Datagram| {
        count += 1;
        if count % 10 == 0 { Fate::Lost } else { Fate::Arrives }
    };
    wire.run(Duration::from_millis(1), &mut lossy);
    assert_eq!(wire.unwritten, 0);
    let now = wire.pair.now;
    let (at_server, stream) = (wire.pair.at_server.unwrap(), wire.stream.unwrap());
    let mut server = wire.pair.server.connection_mut(at_server).unwrap();
    server.close_when_delivered(now, 7, "done".into());
    // What is written meanwhile is delivered too, and the end of a stream alone.
    assert_eq!(server.write(stream, &[7; 100]), Ok(100));
    server.finish(stream).unwrap();
    drop(server);
    wire.run(Duration::from_millis(200), &mut lossy);
    assert_eq!(wire.pair.client_closed, None, "{} have arrived", wire.read);
    wire.run(Duration::from_secs(60), &mut lossy);
    assert_eq!(wire.read, 200_100);
    let told = PeerClose::Application { code: 7, reason: "done".into() };
    assert_eq!(wire.pair.client_closed, Some(ConnectionError::PeerClosed(told)));
}

#[test]
fn an_end_that_waits_comes_at_once_when_there_is_nothing_to_deliver_and_never_without_delivery() {
    let mut pair = Pair::connected();
    let now = pair.now;
    pair.at_server().close_when_delivered(now, 7, "done".into());
    pair.exchange();
    assert!(pair.client_closed.is_some(), "nothing was written");

    let config = TransportConfig { idle_timeout: Duration::ZERO, ..TransportConfig::default() };
    let mut wire = Wire::connected(Scene::with(config), Duration::from_millis(100));
    wire.download(10_000);
    let mut unheard = |_: &mut Pair, datagram: &wire::Datagram| match datagram.upward {
        true => Fate::Lost,
        false => Fate::Arrives,
    };
    wire.run(Duration::from_secs(1), &mut unheard);
    let now = wire.pair.now;
    wire.pair.at_server().close_when_delivered(now, 7, "done".into());
    wire.run(Duration::from_secs(60), &mut unheard);
    assert_eq!(
        (wire.read, &wire.pair.client_closed),
        (10_000, &None),
        "nobody knows that it has arrived"
    );
    // An end that does not wait takes its place.
    let now = wire.pair.now;
    wire.pair.at_server().close(now, 8, "enough".into());
    wire.run(Duration::from_secs(1), &mut all_arrive);
    let told = PeerClose::Application { code: 8, reason: "enough".into() };
    assert_eq!(wire.pair.client_closed, Some(ConnectionError::PeerClosed(told)));
}
