//! Section H of the requirements: how connections end.

use super::*;

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
