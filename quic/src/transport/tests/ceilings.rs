//! What a peer can make us hold, driven to its worst, and the tables of the endpoint under whatever
//! happens. Containers that stand alone have their ceilings beside them; memory as a whole is
//! counted in `tests/memory.rs`.

use proptest::prelude::*;

use super::*;

#[test]
fn challenges_that_nobody_acknowledges_fill_no_memory() {
    let mut pair = Pair::connected();
    let mut answers = 0;
    for round in 0..50_000u64 {
        let mut challenge = vec![];
        frame::write_path(types::PATH_CHALLENGE, round.to_be_bytes(), &mut challenge);
        let packet = pair.forge(Space::Data, &challenge);
        pair.deliver(packet);
        // Answers are padded, acknowledgments are not.
        answers += pair.down().iter().filter(|datagram| datagram.len() >= 1200).count();
        if round % 1000 == 0 {
            let [sent, _, paths, ..] = pair.at_server().holdings();
            let most = most_sent(&mut pair);
            assert!(sent as u64 <= most && paths == 1, "{sent} packets, {paths} paths");
        }
    }
    assert!((10..100).contains(&answers), "{answers} answers");
}

#[test]
fn an_address_for_each_packet_leaves_three_paths_and_few_packets() {
    let mut pair = Pair::connected();
    for port in 1..20_000 {
        let packet = pair.forge(Space::Data, &[1]);
        pair.from.set_port(port);
        pair.deliver(packet);
        pair.down();
        while pair.server.poll_event().is_some() {}
        if port % 1000 == 0 {
            let [sent, _, paths, cids, events] = pair.at_server().holdings();
            let most = most_sent(&mut pair);
            let bounded = sent as u64 <= most && paths <= 3 && cids <= 8 && events <= 2;
            assert!(bounded, "{:?}, at most {most} packets", pair.at_server().holdings());
            pair.server.assert_consistent();
        }
    }
}

#[test]
fn req_c17_packets_that_come_before_their_keys_are_few() {
    let mut pair = Pair::new(Scene::default());
    pair.first_flights();
    let cid = pair.half_open().local_cids().next().unwrap();
    for round in 0..10_000u32 {
        let mut early = vec![0x40];
        early.extend_from_slice(&cid);
        early.extend_from_slice(&round.to_be_bytes().repeat(300));
        pair.deliver(early);
        assert!(pair.half_open().holdings()[1] <= 5);
    }
    pair.settle();
}

#[test]
fn req_e11_handshakes_that_never_end_are_bounded_and_forgotten() {
    let mut scene = Scene::with_retry(RetryPolicy::Never);
    scene.server.max_half_open = 20;
    let mut pair = Pair::new(scene);
    for port in 1..200 {
        pair.from.set_port(port);
        pair.reconnect();
        for datagram in pair.up() {
            pair.deliver(datagram);
        }
        pair.down();
        assert!(pair.server.half_open() <= 20);
        pair.server.assert_consistent();
    }
    assert!(pair.server.dropped(DropReason::Saturated) > 100);
    for _ in 0..100 {
        pair.pass(Duration::from_secs(1));
        pair.down();
        while pair.server.poll_event().is_some() {}
    }
    assert!(pair.server.is_blank());
}

#[test]
fn req_g12_a_stream_of_each_number_costs_what_the_limit_says() {
    let mut pair = Pair::connected();
    // The last one of each kind opens all; those beyond are refused elsewhere.
    for round in 0..2000u64 {
        let number = 4 * (round % 100) + 2 * (round % 2);
        let packet = pair.forge(Space::Data, &stream(number, round % 7, b"x").repeat(100));
        pair.deliver(packet);
        pair.down();
    }
    let events = std::iter::from_fn(|| pair.server.poll_event()).count();
    assert!(events <= 2 * 100 + 10, "{events} events for 200 streams");
    assert!(!pair.at_server().is_over());
}

/// Packets that may be in flight: what path frames are allowed, and a window besides.
fn most_sent(pair: &mut Pair) -> u64 {
    80 + 3 * pair.at_server().path().congestion_window / 1200
}

/// Something that may happen to connections.
#[derive(Clone, Copy, Debug)]
enum Step {
    Connect,
    Close(usize),
    Rotate(u8),
    Migrate(usize),
    Rebind(u16),
    Say(usize),
    Lose,
    Pass(u16),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => Just(Step::Connect),
        1 => any::<usize>().prop_map(Step::Close),
        1 => any::<u8>().prop_map(Step::Rotate),
        2 => any::<usize>().prop_map(Step::Migrate),
        2 => (1..5000u16).prop_map(Step::Rebind),
        3 => any::<usize>().prop_map(Step::Say),
        1 => Just(Step::Lose),
        3 => (0..4000u16).prop_map(Step::Pass),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn tables_agree_with_connections_whatever_happens_and_nothing_stays(
        steps in proptest::collection::vec(step(), 1..60)
    ) {
        let mut pair = Pair::new(Scene::default());
        for step in steps {
            let handles: Vec<_> = pair.client.connections().collect();
            let picked = |at: usize| handles.get(at % handles.len().max(1)).copied();
            let now = pair.now;
            match step {
                Step::Connect => pair.reconnect(),
                Step::Close(at) => {
                    let connection = picked(at).and_then(|at| pair.client.connection_mut(at));
                    if let Some(mut connection) = connection {
                        connection.close(now, 0, "".into());
                    }
                }
                Step::Rotate(seed) => {
                    let key = ResetKey::new([seed; 32]);
                    pair.server.set_cid_config(CidIssuer::standalone(8, [seed; 32], key));
                }
                Step::Migrate(at) => {
                    let connection = picked(at).and_then(|at| pair.client.connection_mut(at));
                    if let Some(mut connection) = connection {
                        let _ = connection.migrate(now, None);
                    }
                }
                Step::Rebind(port) => pair.from.set_port(port),
                Step::Say(at) => {
                    let connection = picked(at).and_then(|at| pair.client.connection_mut(at));
                    if let Some(mut connection) = connection {
                        connection.ping();
                    }
                }
                Step::Lose => {
                    pair.up();
                    pair.down();
                }
                Step::Pass(millis) => pair.pass(Duration::from_millis(millis.into())),
            }
            pair.exchange();
            pair.client.assert_consistent();
            pair.server.assert_consistent();
        }
        for _ in 0..200 {
            pair.pass(Duration::from_secs(1));
            pair.exchange();
        }
        prop_assert!(pair.client.is_blank() && pair.server.is_blank());
    }
}
