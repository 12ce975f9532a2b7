//! What is remembered of handshakes and learnt of connection IDs, and for whom it answers.

use super::*;

#[test]
fn an_entry_of_one_handshake_does_not_answer_for_another() {
    // Without a source connection ID, as most browsers are, and with one that is used again.
    for scid in [&b""[..], b"constant"] {
        let mut bench = Bench::new(true);
        let drained = |name: &str| match name {
            "a" => BackendState::Draining,
            _ => BackendState::Active,
        };
        let goes_to_a = |&n: &u8| Bench::new(true).forwarded(1, &long(V1, &[n; 8], scid)).0 == "a";
        let to_a = (0..=255).find(goes_to_a).expect("one of them goes there");
        let to_a = long(V1, &[to_a; 8], scid);
        assert_eq!(bench.forwarded(1, &to_a).0, "a");
        bench.reload_with(|_| {}, true, drained);
        // Its handshake stays there; those that begin go elsewhere, and spread.
        assert_eq!(bench.forwarded(1, &to_a).0, "a");
        let mut seen = std::collections::HashSet::new();
        for n in 0..50u8 {
            seen.insert(bench.forwarded(1, &long(V1, &[n, 1, 2, 3, 4, 5, 6, 7], scid)).0);
        }
        assert!(!seen.contains("a") && seen.len() == 2, "{seen:?}");
        assert_eq!(bench.forwarded(1, &to_a).0, "a");
    }
}

#[test]
fn a_handshake_that_left_a_dead_server_stays_where_it_was_answered() {
    let mut bench = Bench::new(false);
    let (dead, ..) = bench.forwarded(7, &hello(7));
    let is_dead = |name: &str| {
        if name == dead { BackendState::Down } else { BackendState::Active }
    };
    bench.reload_with(|_| {}, false, is_dead);
    let (alive, _, flow) = bench.forwarded(7, &hello(7));
    assert_ne!(alive, dead);
    bench.answer(flow, &answer(7, &[0xee; 9]));
    // A connection ID that was in no long header.
    let (backend, rule, _) = bench.forwarded(7, &short(&[0xdd; 9]));
    assert_eq!((backend, rule), (alive.clone(), Rule::FourTuple));
    // When the dead one is back, nothing goes to it, whatever it answers.
    bench.reload_with(|_| {}, false, |_| BackendState::Active);
    assert_eq!(bench.forwarded(7, &short(&[0xdd; 9])).0, alive);

    // One that was answered and whose server dies begins anew elsewhere.
    let is_dead = |name: &str| {
        if name == alive { BackendState::Down } else { BackendState::Active }
    };
    bench.reload_with(|_| {}, false, is_dead);
    let (next, _, flow) = bench.forwarded(7, &long(V1, b"another one", b"another"));
    assert_ne!(next, alive);
    bench.answer(flow, &long(V1, b"another", &[0xcc; 9]));
    assert_eq!(bench.forwarded(7, &short(&[0xbb; 9])).0, next);
}

#[test]
fn connection_ids_that_no_long_header_showed_are_learnt_from_their_use() {
    let mut bench = Bench::new(false);
    let (backend, _, flow) = bench.forwarded(1, &hello(1));
    bench.answer(flow, &answer(1, &[0xee; 9]));
    bench.forwarded(1, &short(&[0xee; 9]));
    // The client changes its connection ID right after the handshake; the server goes on answering.
    let fresh = [0xdd; 9];
    for round in 0..3 {
        assert_eq!(bench.forwarded(1, &short(&fresh)).1, Rule::FourTuple, "round {round}");
        bench.answer(flow, &[0x40; 100]);
        bench.later();
    }
    let (elsewhere, rule, moved) = bench.forwarded(99, &short(&fresh));
    assert_eq!((elsewhere, rule), (backend.clone(), Rule::Dcid));
    // And again, on the path that shows no long header at all.
    for _ in 0..8 {
        bench.answer(moved, &[0x40; 1200]);
        bench.forwarded(99, &short(&fresh));
    }
    assert!(bench.is_proven(moved));
    let third = [0xcc; 9];
    for _ in 0..3 {
        bench.forwarded(99, &short(&third));
        bench.answer(moved, &[0x40; 100]);
    }
    assert_eq!(bench.forwarded(100, &short(&third)).1, Rule::Dcid);
}

#[test]
fn what_nobody_answers_to_is_not_learnt_and_of_one_flow_not_much() {
    let mut bench = Bench::new(false);
    let (_, _, flow) = bench.forwarded(1, &hello(1));
    // Of a sender that has proved nothing, nothing.
    for _ in 0..10 {
        bench.forwarded(1, &short(&[0xdd; 9]));
        bench.answer(flow, &RESET);
    }
    bench.answer(flow, &answer(1, &[0xee; 9]));
    bench.forwarded(1, &short(&[0xee; 9]));
    assert!(bench.is_proven(flow));
    let before = bench.sizes().connection_ids;
    // Without answers in between, and with another one each time.
    for n in 0..100 {
        bench.forwarded(1, &short(&[0xdd; 9]));
        bench.forwarded(1, &short(&[n; 9]));
        bench.answer(flow, &[0x40; 100]);
    }
    assert_eq!(bench.sizes().connection_ids, before);
    // Of one flow, a few at once; of one server that gives away many, too.
    for n in 0..100 {
        for _ in 0..3 {
            bench.forwarded(1, &short(&[n; 9]));
            bench.answer(flow, &[0x40; 100]);
        }
        bench.answer(flow, &answer(1, &[200 - n; 9]));
    }
    assert_eq!(bench.sizes().connection_ids, 16);
}

#[test]
fn an_id_that_finds_no_room_is_tried_once_a_minute_and_leaves_others_their_turn() {
    let mut bench = Bench::new(false);
    let has_room_for = |bench: &Bench, count| {
        bench.forwarder.routing.pool(PoolIndex(0)).learnt.set_capacity(count);
    };
    let (_, _, flow) = bench.forwarded(1, &hello(1));
    bench.answer(flow, &answer(1, &[0xee; 9]));
    bench.forwarded(1, &short(&[0xee; 9]));
    has_room_for(&bench, 1);
    let refused = [0xdd; 9];
    let goes_on = |bench: &mut Bench, cid: &[u8]| {
        for _ in 0..40 {
            bench.forwarded(1, &short(cid));
            bench.answer(flow, &[0x40; 100]);
        }
    };
    goes_on(&mut bench, &refused);
    assert_eq!(bench.sizes().connection_ids, 1);
    has_room_for(&bench, 100);
    goes_on(&mut bench, &refused);
    assert_eq!(bench.sizes().connection_ids, 1, "within a minute");
    goes_on(&mut bench, &[0xcc; 9]);
    assert_eq!(bench.forwarded(98, &short(&[0xcc; 9])).1, Rule::Dcid);
    has_room_for(&bench, 1);
    goes_on(&mut bench, &refused);
    has_room_for(&bench, 100);
    bench.now += Duration::from_secs(60);
    goes_on(&mut bench, &refused);
    assert_eq!(bench.forwarded(99, &short(&refused)).1, Rule::Dcid);
}

#[test]
fn connections_that_take_turns_on_a_flow_are_learnt_once_each() {
    let mut bench = Bench::new(false);
    let (_, _, flow) = bench.forwarded(1, &hello(1));
    for _ in 0..20 {
        bench.answer(flow, &answer(1, &[0xee; 9]));
        bench.answer(flow, &answer(1, &[0xdd; 9]));
    }
    assert_eq!(bench.sizes().connection_ids, 2);
    bench.answer(flow, &answer(1, &[0xcc; 9]));
    assert_eq!(bench.sizes().connection_ids, 3);
}

#[test]
fn a_pool_that_fills_its_memory_takes_none_of_another_s() {
    let mut bench = two_pools(false);
    let room = bench.memory.capacity(&bench.forwarder.routing).connection_ids / 2;
    assert_eq!(room, 250);
    for n in 0..2 * room {
        bench.later();
        let (port, n) = (u16::try_from(n).unwrap(), u32::try_from(n).unwrap());
        let (_, _, flow) = bench.forwarded_on(EDGE, port, &hello(port));
        bench.answer(flow, &answer(port, &[&[0xff; 7][..], &n.to_be_bytes()].concat()));
    }
    assert_eq!(bench.sizes().connection_ids, room);
    for port in 1..=60 {
        bench.later();
        let (backend, _, flow) = bench.forwarded_on(INNER, port, &hello(port));
        let cid = [&[0xfe; 7][..], &port.to_be_bytes()].concat();
        bench.answer(flow, &answer(port, &cid));
        let (after, rule, _) = bench.forwarded_on(INNER, 1_000 + port, &short(&cid));
        assert_eq!((after, rule), (backend, Rule::Dcid));
    }
}

#[test]
fn lengths_that_no_server_uses_any_more_are_not_tried() {
    let mut bench = Bench::new(false);
    let (_, _, flow) = bench.forwarded(1, &hello(1));
    bench.answer(flow, &answer(1, &[0xee; 4]));
    bench.now += Duration::from_secs(400);
    let (_, _, flow) = bench.forwarded(2, &hello(2));
    bench.answer(flow, &answer(2, &[0xdd; 9]));
    let lengths = |bench: &Bench| {
        let memory = format!("{:?}", bench.forwarder.routing.pool(PoolIndex(0)).learnt);
        let (_, rest) = memory.split_once(" lengths: ").unwrap();
        rest.split(',').next().unwrap().parse::<u32>().unwrap()
    };
    assert_eq!(lengths(&bench), 1 << 4 | 1 << 9);
    bench.now += Duration::from_secs(300);
    for _ in 0..2 {
        bench.memory.sweep(bench.now, &bench.forwarder.routing);
    }
    assert_eq!(lengths(&bench), 1 << 9);
    assert_eq!(bench.forwarded(3, &short(&[0xdd; 9])).1, Rule::Dcid);
}

#[test]
fn learnt_connection_ids_outlive_flows_and_their_moves_count_as_path_changes() {
    let mut bench = Bench::new(false);
    let (backend, _, flow) = bench.forwarded(1, &hello(1));
    let cid = [0xee; 9];
    bench.answer(flow, &answer(1, &cid));
    bench.now += Duration::from_secs(590);
    (0..16).for_each(|_| bench.forwarder.sweep(bench.now, &mut Vec::new()));
    bench.memory.sweep(bench.now, &bench.forwarder.routing);
    assert_eq!(bench.forwarder.flow_count(), 0);
    match bench.send(2, &short(&cid)) {
        Verdict::Forward { rule: Rule::Dcid, via: Via::NewFlow(opened), .. } => {
            assert_eq!(opened.opening, Opening::PathChange);
            assert_eq!(bench.backend_of(opened.flow), backend);
        }
        other => panic!("{other:?}"),
    }
}
