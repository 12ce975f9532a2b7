//! Sections J, K and L of the requirements, as a whole connection shows them.

use super::*;

#[test]
fn req_j03_j05_each_probe_timeout_is_twice_the_last_and_sends_one_or_two_packets() {
    let mut pair = Pair::connected();
    let stream = pair.at_client().open(Dir::Uni).unwrap();
    pair.at_client().write(stream, b"hello?").unwrap();
    assert_eq!(pair.up().len(), 1);
    let before = pair.at_client().stats().probe_timeouts;
    let mut waits = vec![];
    let mut last = pair.now;
    for _ in 0..20 {
        let deadline = pair.client.deadline().unwrap();
        pair.pass(deadline - pair.now);
        let probes = pair.up().len();
        assert!(probes <= 2);
        if probes > 0 {
            waits.push(pair.now - last);
            last = pair.now;
        }
        if waits.len() == 5 {
            break;
        }
    }
    assert_eq!(waits.len(), 5, "{waits:?}");
    for pair in waits.windows(2) {
        let ratio = pair[1].as_secs_f64() / pair[0].as_secs_f64();
        assert!((1.9..2.1).contains(&ratio), "{waits:?}");
    }
    assert_eq!(pair.at_client().stats().probe_timeouts, before + 5);
    // An answer brings it back.
    (0..3).for_each(|_| pair.settle());
    assert_eq!(pair.at_client().path().in_flight, 0);
}

#[test]
fn req_j08_discarded_keys_take_their_packets_and_timers_along() {
    let mut pair = Pair::new(Scene::default());
    for datagram in pair.first_flights() {
        pair.deliver_down(datagram);
    }
    assert!(pair.half_open().path().in_flight > 0);
    let up = pair.up();
    assert!(!pair.at_client().holds_keys(Space::Initial));
    // Only what left in the later spaces is in flight.
    let later: usize = up.iter().map(Vec::len).sum();
    assert!(pair.at_client().path().in_flight <= later as u64);
    pair.settle();
    assert!(!pair.at_client().holds_keys(Space::Handshake));
    assert_eq!((pair.at_client().path().in_flight, pair.at_server().path().in_flight), (0, 0));
}

#[test]
fn req_k02_j09_no_more_than_the_window_is_in_flight_but_probes_leave() {
    let mut pair = Pair::connected();
    let stream = pair.at_server().open(Dir::Uni).unwrap();
    pair.at_server().write(stream, &[0; 200_000]).unwrap();
    for _ in 0..20 {
        pair.down();
        let path = pair.at_server().path();
        assert!(path.in_flight <= path.congestion_window, "{path:?}");
    }
    let path = pair.at_server().path();
    assert!(path.in_flight + u64::from(path.mtu) > path.congestion_window, "the window is full");
    for _ in 0..20 {
        if pair.at_server().stats().probe_timeouts > 0 {
            break;
        }
        let deadline = pair.server.deadline().unwrap();
        pair.pass(deadline - pair.now);
    }
    assert_eq!(pair.at_server().stats().probe_timeouts, 1);
    assert!(matches!(pair.down().len(), 1..=2));
}

#[test]
fn req_l02_a_lost_probe_for_a_larger_size_is_no_congestion_and_carries_no_data() {
    let mut pair = Pair::new(Scene::default());
    let mut lost = 0;
    for _ in 0..400 {
        for datagram in pair.up() {
            pair.deliver(datagram);
        }
        for datagram in pair.down() {
            if datagram.len() > 1200 {
                lost += 1;
                for packet in pair.at_client().peek(&datagram) {
                    let plain = |frame: frame::Frame<'_>| {
                        matches!(frame, frame::Frame::Ping | frame::Frame::Padding)
                    };
                    assert!(packet.frames().all(plain));
                }
            } else {
                pair.deliver_down(datagram);
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
    assert!(lost >= 3, "{lost} probes");
    let (path, stats) = (pair.at_server().path(), pair.at_server().stats());
    assert_eq!((path.mtu, stats.lost_packets), (1200, 0));
    assert!(path.congestion_window >= 12_000);
}

#[test]
fn req_j10_losses_before_the_first_sample_are_no_persistent_congestion() {
    let mut pair = Pair::new(Scene::default());
    // The client's first flights vanish for a long while.
    for _ in 0..4 {
        pair.up();
        let deadline = pair.client.deadline().unwrap();
        pair.pass(deadline - pair.now);
    }
    pair.settle();
    assert!(pair.at_client().is_confirmed());
    // Seven tenths of ten datagrams, for the losses alone.
    assert!(pair.at_client().path().congestion_window >= 8_400);
}

#[test]
fn req_k06_a_congestion_mark_costs_window_as_a_loss_does() {
    let download = |marked: Option<usize>| {
        let mut pair = Pair::new(Scene::default());
        let (mut arrived, mut written) = (0, false);
        for _ in 0..60 {
            for datagram in pair.up() {
                pair.deliver(datagram);
            }
            while let Some((handle, event)) = pair.server.poll_event() {
                if event == Event::Connected {
                    pair.at_server = Some(handle);
                }
            }
            for mut datagram in pair.down() {
                let ecn = if marked == Some(arrived) { Ecn::Ce } else { Ecn::Ect0 };
                let from =
                    Received { remote: SERVER.parse().unwrap(), local: None, ecn: Some(ecn) };
                pair.client.handle_datagram(pair.now, from, &mut datagram);
                arrived += usize::from(written);
            }
            if !written && pair.at_server.is_some() && pair.at_server().is_confirmed() {
                let stream = pair.at_server().open(Dir::Uni).unwrap();
                pair.at_server().write(stream, &[0; 40_000]).unwrap();
                written = true;
            }
            pair.pass(Duration::from_millis(5));
        }
        assert!(arrived > 20, "{arrived} datagrams");
        assert_eq!(pair.at_server().stats().lost_packets, 0);
        pair.at_server().path().congestion_window
    };
    let (without, with) = (download(None), download(Some(10)));
    assert!(with < without, "{with} after a mark, {without} without one");
}
