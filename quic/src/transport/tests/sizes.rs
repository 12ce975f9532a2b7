//! Section L of the requirements, and what a peer allows: how large datagrams are.

use super::{
    wire::{Fate, Wire, all_arrive},
    *,
};

const ROUND_TRIP: Duration = Duration::from_millis(100);

/// A script for a path that carries datagrams of up to `limit` bytes, and notes the largest.
fn carrying(limit: usize, largest: &mut usize) -> impl FnMut(&mut Pair, &wire::Datagram) -> Fate {
    move |_, datagram| {
        if !datagram.upward {
            *largest = (*largest).max(datagram.bytes.len());
        }
        if datagram.bytes.len() > limit { Fate::Lost } else { Fate::Arrives }
    }
}

#[test]
fn req_l06_no_datagram_is_larger_than_the_peer_takes_on_any_path() {
    let mut wire = Wire::new(Scene::default(), ROUND_TRIP);
    wire.pair.at_client().announce(Arc::clone(&tls().client), |parameters| {
        parameters.max_udp_payload_size = 1300;
    });
    let mut largest = 0;
    wire.run(Duration::from_secs(5), &mut carrying(9000, &mut largest));
    wire.download(100_000);
    wire.run(Duration::from_secs(5), &mut carrying(9000, &mut largest));
    assert_eq!((wire.read, wire.pair.at_server().path().mtu, largest), (100_000, 1300, 1300));
    // The same holds where the client moves to, although nothing is known of that path.
    wire.pair.from = "198.51.100.2:1000".parse().unwrap();
    let at_client = wire.pair.at_client;
    wire.pair.client.connection_mut(at_client).unwrap().ping();
    largest = 0;
    wire.run(Duration::from_secs(5), &mut carrying(9000, &mut largest));
    wire.download(100_000);
    wire.run(Duration::from_secs(5), &mut carrying(9000, &mut largest));
    let path = wire.pair.at_server().path();
    assert_eq!((path.remote, path.mtu, largest), (wire.pair.from, 1300, 1300));
}

#[test]
fn req_k02_l01_a_probe_for_a_larger_size_waits_until_the_window_has_room_for_it() {
    let mut probes = 0;
    // Each size leaves another remainder of the window.
    for bytes in (10_000..30_000).step_by(1777) {
        let mut wire = Wire::new(Scene::default(), ROUND_TRIP);
        wire.download(bytes);
        wire.run(Duration::from_secs(2), &mut |pair, datagram| {
            if !datagram.upward && pair.server.connection_count() > 0 {
                let path = pair.half_open().path();
                assert!(path.in_flight <= path.congestion_window, "{path:?}");
                probes += usize::from(datagram.bytes.len() > usize::from(path.mtu));
            }
            Fate::Arrives
        });
        assert_eq!(wire.read, bytes);
    }
    assert!(probes > 10, "{probes} probes");
}

#[test]
fn req_f17_no_datagram_frame_is_larger_than_the_peer_takes() {
    let mut wire = Wire::new(Scene::default(), ROUND_TRIP);
    wire.pair.at_client().announce(Arc::clone(&tls().client), |parameters| {
        parameters.max_datagram_frame_size = 100;
    });
    wire.run(Duration::from_secs(5), &mut all_arrive);
    // One byte of type, two for the length.
    let max = wire.pair.at_server().max_datagram();
    assert_eq!(max, Some(97));
    let message = |len| vec![7; len].into();
    let refused = Err(SendDatagramError::TooLarge);
    assert_eq!(wire.pair.at_server().send_datagram(message(98)), refused);
    let server = wire.pair.at_server.unwrap();
    let mut server = wire.pair.server.connection_mut(server).unwrap();
    assert_eq!(server.send_datagram(message(97)), Ok(()));
    drop(server);
    wire.run(Duration::from_secs(1), &mut all_arrive);
    assert_eq!(wire.pair.at_client().receive_datagram().map(|found| found.len()), Some(97));
}

#[test]
fn req_l03_a_path_that_carries_less_than_it_did_is_noticed_and_used_on() {
    let mut wire = Wire::connected(Scene::default(), ROUND_TRIP);
    assert_eq!(wire.pair.at_server().path().mtu, 1452);
    wire.download(100_000);
    let mut largest = 0;
    wire.run(Duration::from_secs(20), &mut carrying(1250, &mut largest));
    assert_eq!((largest, wire.read), (1452, 100_000));
    let mtu = wire.pair.at_server().path().mtu;
    assert!((1238..=1250).contains(&mtu), "{mtu}");
}

#[test]
fn req_l05_a_path_that_carries_more_after_ten_minutes_is_noticed_without_anything_to_send() {
    let config = TransportConfig { idle_timeout: Duration::ZERO, ..TransportConfig::default() };
    let mut wire = Wire::new(Scene::with(config), ROUND_TRIP);
    let mut largest = 0;
    wire.run(Duration::from_secs(60), &mut carrying(1300, &mut largest));
    let mtu = wire.pair.at_server().path().mtu;
    assert!((1288..=1300).contains(&mtu), "{mtu}");
    wire.run(Duration::from_secs(500), &mut all_arrive);
    assert_eq!(wire.pair.at_server().path().mtu, mtu);
    wire.run(Duration::from_secs(100), &mut all_arrive);
    assert_eq!(wire.pair.at_server().path().mtu, 1452);
}

#[test]
fn req_l05_nothing_is_searched_on_a_path_that_carries_all_that_it_may() {
    let config = TransportConfig { idle_timeout: Duration::ZERO, ..TransportConfig::default() };
    let mut wire = Wire::connected(Scene::with(config), ROUND_TRIP);
    let server = wire.pair.at_server();
    assert_eq!((server.path().mtu, server.deadline()), (1452, None));
}
