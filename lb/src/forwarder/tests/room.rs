//! Who has a flow, who proves it, and who makes room for whom.

use super::*;

#[test]
fn a_blind_sender_proves_nothing_however_often_it_sends() {
    let mut bench = Bench::new(true);
    let stranger = short(&routable_cid(2, 9));
    let unknown = long(0x0a1a_2a3a, &[7; 12], &[9; 8]);
    let negotiation = long(0, &[9; 8], &[7; 12]);
    for (n, (datagram, reply)) in
        [(stranger, &RESET[..]), (unknown, &negotiation)].into_iter().enumerate()
    {
        let path = somewhere(u32::try_from(n).unwrap());
        for _ in 0..200 {
            let flow = bench.flow_from(path, &datagram).unwrap();
            bench.answer(flow, reply);
            bench.later();
            assert!(!bench.is_proven(flow));
        }
    }
}

#[test]
fn a_client_proves_where_it_is_by_what_it_was_told() {
    let mut bench = Bench::new(true);
    let (backend, _, flow) = bench.forwarded(1, &hello(1));
    let cid = cid_of(&backend, 1);
    bench.answer(flow, &answer(1, &cid));
    bench.forwarded(1, &hello(1));
    assert!(!bench.is_proven(flow), "the same Initial again shows nothing");
    bench.forwarded(1, &long(V1, &cid, &1u16.to_be_bytes()));
    assert!(bench.is_proven(flow));

    // On another path the connection is known, and answers to what it sends are enough; one that
    // nobody has seen has to show more.
    bench.later();
    for (n, cid, exchanges) in [(1, cid, 3), (2, cid_of("b", 99), 8)] {
        let path = somewhere(n);
        let flow = bench.flow_from(path, &short(&cid)).unwrap();
        for round in 1..=exchanges {
            assert!(!bench.is_proven(flow), "after {round} of {exchanges}");
            bench.answer(flow, &[0x40; 1200]);
            bench.later();
            assert_eq!(bench.flow_from(path, &short(&cid)), Some(flow));
        }
        assert!(bench.is_proven(flow));
    }
}

#[test]
fn blind_senders_cost_neither_connections_nor_handshakes() {
    const MILLISECONDS: u32 = 5_000;
    let mut bench = Bench::with_flows(true, 2_000);
    let connections: Vec<_> = (1..=5)
        .map(|port| {
            let flow = bench.establish(port);
            cid_of(&bench.backend_of(flow), port.into())
        })
        .collect();
    let (mut stranger, mut attempts, mut made) = (0, 0, 0);
    let mut rebound: Vec<(ClientPath, usize, FlowId, u32)> = Vec::new();
    let mut handshakes: Vec<(ClientPath, u16, FlowId, u32)> = Vec::new();
    for at in 0..MILLISECONDS {
        bench.now += Duration::from_millis(1);
        // 2,400 forged senders a second, each of whom sends twice and never sees the answers.
        for _ in 0..if at % 5 < 2 { 3 } else { 2 } {
            stranger += 1;
            let path = somewhere(0x4000_0000 + stranger % 2_000_000);
            for _ in 0..2 {
                let datagram = match stranger % 2 {
                    0 => short(&routable_cid(1, 9))[..60].to_vec(),
                    _ => long(0x0a1a_2a3a, &[7; 12], &[9; 8])[..60].to_vec(),
                };
                if let Some(flow) = bench.flow_from(path, &datagram) {
                    let _ = bench.forwarder.returned(bench.now, flow, &RESET);
                }
            }
        }
        // Each connection is on another path every second, and speaks with its server there.
        if at % 1_000 < 5 {
            let of = (at % 1_000) as usize;
            let path = somewhere(0x0100_0000 + at);
            let flow =
                bench.flow_from(path, &short(&connections[of])).expect("a connection is lost");
            rebound.push((path, of, flow, at));
        }
        let mut due = Vec::new();
        rebound.retain(|&(path, of, flow, since)| {
            if (at - since) % 40 == 20 {
                due.push((None, path, of, flow));
            } else if at > since && (at - since) % 40 == 0 {
                due.push((Some(of), path, of, flow));
            }
            at - since < 800
        });
        for (sends, path, of, flow) in due {
            match sends {
                None => bench.answer(flow, &[0x40; 1200]),
                Some(_) => {
                    let again = bench.flow_from(path, &short(&connections[of]));
                    assert_eq!(again, Some(flow), "a path that is in use was taken away");
                }
            }
        }
        // Ten new clients a second, whose round trip takes 40 ms.
        if at % 100 == 0 {
            attempts += 1;
            let (path, port) = (somewhere(0x0200_0000 + at), 1_000 + small(at / 100));
            if let Some(flow) = bench.flow_from(path, &hello(port)) {
                handshakes.push((path, port, flow, at));
            }
        }
        for &(path, port, flow, since) in &handshakes {
            let cid = cid_of(&bench.backend_of(flow), port.into());
            if at == since + 20 {
                let _ = bench.forwarder.returned(bench.now, flow, &answer(port, &cid));
            } else if at == since + 40 {
                let again = bench.flow_from(path, &long(V1, &cid, &port.to_be_bytes()));
                made += u32::from(again == Some(flow) && bench.is_proven(flow));
            }
        }
        handshakes.retain(|&(.., since)| at < since + 40);
    }
    assert!(made * 100 >= attempts * 95, "{made} of {attempts}");
    assert!(bench.forwarder.unproven_flow_count() > 1_000, "the attack was none");
}

#[test]
fn a_table_full_of_connections_that_have_ended_refuses_nobody() {
    let mut bench = Bench::with_flows(true, 800);
    let live: Vec<_> = (1..=20).map(|port| (port, bench.establish(port))).collect();
    for n in 0..5_000u32 {
        bench.now += Duration::from_millis(5);
        let port = 1_000 + small(n % 50_000);
        let path = somewhere(n);
        let flow = bench.flow_from(path, &hello(port)).expect("a handshake was refused");
        let cid = cid_of(&bench.backend_of(flow), 100 + n);
        bench.answer(flow, &answer(port, &cid));
        bench.later();
        assert_eq!(bench.flow_from(path, &short(&cid)), Some(flow));
        // It says no more; the live ones do.
        if n % 100 == 0 {
            for &(port, flow) in &live {
                let cid = cid_of(&bench.backend_of(flow), port.into());
                assert_eq!(bench.forwarded(port, &short(&cid)).2, flow, "a live one made room");
            }
        }
    }
}

/// A connection on a new path, until that is proved.
fn move_to(bench: &mut Bench, path: ClientPath, cid: &[u8]) -> FlowId {
    let flow = bench.flow_from(path, &short(cid)).unwrap();
    for _ in 0..3 {
        bench.answer(flow, &[0x40; 1200]);
        bench.later();
        assert_eq!(bench.flow_from(path, &short(cid)), Some(flow));
    }
    assert!(bench.is_proven(flow));
    flow
}

fn evicted(verdict: Verdict) -> Option<Ended> {
    match verdict {
        Verdict::Forward { via: Via::NewFlow(Opened { evicted, .. }), .. } => evicted,
        other => panic!("no flow begins: {other:?}"),
    }
}

#[test]
fn the_paths_that_connections_have_left_make_room_first() {
    let mut bench = Bench::with_flows(true, 80);
    let flows: Vec<_> = (1..=69).map(|port| bench.establish(port)).collect();
    bench.later();
    let cid = cid_of(&bench.backend_of(flows[39]), 40);
    move_to(&mut bench, somewhere(1), &cid);
    // Of all others, none was used for longer than the path that was left.
    let made = evicted(bench.send_from(somewhere(2), &hello(2_000))).unwrap();
    let cid = Some(CidTag::new(&cid));
    assert_eq!(made, Ended { flow: flows[39], standing: Standing::Superseded, cid });
    // A client may come back to a path that it has left, where it was told what it shows again.
    let cid = cid_of(&bench.backend_of(flows[9]), 10);
    move_to(&mut bench, somewhere(3), &cid);
    assert_eq!(bench.forwarder.flows.standing(flows[9]), Some(Standing::Superseded));
    assert_eq!(bench.forwarded(10, &short(&cid)).2, flows[9]);
    assert!(bench.is_proven(flows[9]));
}

#[test]
fn strangers_take_nothing_from_connections_that_are_in_use() {
    let mut bench = Bench::with_flows(true, 80);
    let flows: Vec<_> = (1..=80)
        .map(|n| {
            let path = somewhere(n);
            let port = small(n);
            let flow = bench.flow_from(path, &hello(port));
            flow.map(|flow| {
                let cid = cid_of(&bench.backend_of(flow), n);
                bench.answer(flow, &answer(port, &cid));
                bench.flow_from(path, &short(&cid));
                (path, cid, flow)
            })
        })
        .collect();
    // What connections that exist may need is not for those that begin.
    let (flows, refused) = flows.split_at(70);
    assert!(refused.iter().all(Option::is_none));
    bench.later();
    assert_eq!(bench.send(71, &hello(71)), Verdict::Drop(DropReason::FlowLimit));

    // Connections that exist may move, each a few times without proof, to the end of the reserve and
    // beyond, at the cost of what was not used for longest.
    for (n, seen) in (0..).zip(flows.iter().take(20)) {
        let (_, cid, _) = seen.as_ref().unwrap();
        bench.later();
        let made = evicted(bench.send_from(somewhere(1_000 + n), &short(cid)));
        assert_eq!(made.is_some(), n >= 10, "{n}");
        assert!(made.is_none_or(|made| made.standing == Standing::Unproven));
    }
    // Copies of one connection's packets from forged addresses soon count as strangers'.
    let (_, cid, _) = flows[30].as_ref().unwrap();
    for (_, _, flow) in flows.iter().flatten() {
        assert!(bench.forwarder.flows.standing(*flow).is_some());
    }
    let claims = (0..50).map(|n| {
        let flow = bench.flow_from(somewhere(2_000 + n), &short(cid));
        flow.is_some_and(|flow| bench.forwarder.flows.is_known(flow))
    });
    assert_eq!(claims.filter(|known| *known).count(), 4);

    // What is idle makes room for strangers too, until they have their share.
    bench.now += Duration::from_secs(1);
    let made = evicted(bench.send_from(somewhere(3_000), &hello(3_000))).unwrap();
    assert_ne!(made.standing, Standing::Superseded);
}

#[test]
fn strangers_take_what_is_idle_until_they_have_their_share_and_then_from_each_other() {
    let mut bench = Bench::with_flows(true, 64);
    // As many as may begin without having been seen before.
    for n in 0..56u32 {
        let (path, port) = (somewhere(n << 8), small(n));
        let flow = bench.flow_from(path, &hello(port)).unwrap();
        let cid = cid_of(&bench.backend_of(flow), n);
        bench.answer(flow, &answer(port, &cid));
        assert_eq!(bench.flow_from(path, &short(&cid)), Some(flow));
        assert!(bench.is_proven(flow));
    }
    bench.now += Duration::from_secs(1);
    for n in 0..20u32 {
        bench.later();
        let made = evicted(bench.send_from(somewhere((100 + n) << 8), &hello(1_000 + small(n))));
        // An eighth of 56.
        let expected = if n < 7 { Standing::Proven } else { Standing::Unproven };
        assert_eq!(made.map(|made| made.standing), Some(expected), "{n}");
    }
}

#[test]
fn flows_that_were_used_again_outlive_those_that_were_not() {
    let mut bench = Bench::with_flows(true, 64);
    let place = |n: u32| somewhere(n << 8);
    let flows: Vec<_> = (0..56)
        .map(|n| {
            bench.later();
            bench.flow_from(place(n), &hello(small(n))).unwrap()
        })
        .collect();
    let (used, unused) = flows.split_at(32);
    for (n, &flow) in (0..).zip(used) {
        bench.later();
        assert_eq!(bench.flow_from(place(n), &hello(small(n))), Some(flow));
    }
    let gone: Vec<_> = (100..110)
        .map(|n| {
            bench.later();
            evicted(bench.send_from(place(n), &hello(small(n)))).unwrap().flow
        })
        .collect();
    // Sixteen are looked at each time, so that the order is not exact.
    assert_eq!(gone.iter().filter(|flow| unused.contains(flow)).count(), 8, "{gone:?}");
}

#[test]
fn a_flow_without_a_port_is_not_kept_from_one_by_many_of_its_own_connection() {
    let mut bench = Bench::new(true);
    let copy = short(&routable_cid(1, 9));
    for n in 0..40 {
        bench.flow_from(somewhere(n << 8), &copy).unwrap();
    }
    bench.later();
    let at_a = (1..100).find(|&port| bench.forwarded(port, &hello(port)).0 == "a").unwrap();
    let (_, _, other) = bench.forwarded(at_a, &hello(at_a));
    bench.now += Duration::from_secs(1);
    let new = bench.flow_from(somewhere(50 << 8), &copy).unwrap();
    let failed = bench.forwarder.flow_failed(bench.now, new, DropReason::PortsExhausted);
    assert!(matches!(failed, OnFailure::RetryAfter(ended) if ended.flow == other), "{failed:?}");
}

#[test]
fn one_network_shares_its_part_of_a_table_that_fills() {
    let mut bench = Bench::with_flows(true, 320);
    for n in 0..160 {
        bench.flow_from(somewhere(n), &hello(1_000 + small(n))).unwrap();
    }
    // Of one network, twenty: one part in sixteen. More of them make room for each other.
    for port in 1..=60 {
        bench.later();
        let made = evicted(bench.send(port, &hello(port)));
        let expected = (port > 20).then(|| path(port - 20));
        let path = made.map(|made| bench.forwarder.flow(made.flow).path);
        // The number is given away already, to the one that came.
        assert_eq!(path.is_some(), expected.is_some(), "{port}");
    }
    assert_eq!(bench.forwarder.flow_count(), 180);
    // Those of others are not concerned.
    bench.later();
    assert_eq!(evicted(bench.send_from(somewhere(500), &hello(5_000))), None);
}

#[test]
fn paths_that_change_count_as_attempts() {
    let mut bench = Bench::new(true);
    let flow = bench.establish(1);
    let cid = cid_of(&bench.backend_of(flow), 1);
    bench.forwarded(1, &short(&cid));
    assert_eq!(bench.forwarder.tally().attempts, 0);
    bench.send_from(somewhere(1), &short(&cid));
    assert_eq!(bench.forwarder.tally().attempts, 1);
}

#[test]
fn packets_of_servers_and_configurations_that_were_taken_away_are_counted() {
    let mut bench = Bench::new(true);
    let flow = bench.establish(1);
    let backend = bench.backend_of(flow);
    let cid = cid_of(&backend, 1);
    let id = usize::from(cid_config().id().get());
    let unknown = |bench: &Bench| bench.forwarder.tally().unknown_server_ids[id];
    bench.send_from(somewhere(1), &short(&cid));
    assert_eq!(unknown(&bench), 0);
    bench.reload(|config| config.pools[0].backends.retain(|of| of.name != backend), true);
    bench.send_from(somewhere(2), &short(&cid));
    assert_eq!(unknown(&bench), 1);
    // What clients draw may look like anything.
    bench.send_from(somewhere(3), &long(1, &cid, b"client"));
    assert_eq!(unknown(&bench), 0);
    let another = |config: &mut quic_lb_config::Config| {
        let other = ConfigId::new(u8::from(id == 0)).unwrap();
        config.pools[0].cid_configs = vec![CidConfig::new(other, 2, 6, None).unwrap()];
        config.pools[0].backends.iter_mut().for_each(|of| of.server_ids.clear());
    };
    bench.reload(another, true);
    bench.send_from(somewhere(4), &short(&cid));
    assert_eq!(unknown(&bench), 1);
    bench.reload(|_| {}, false);
    bench.send_from(somewhere(5), &short(&cid));
    assert_eq!(unknown(&bench), 0, "there are none to be unknown");
}

#[test]
fn a_flow_without_a_port_takes_one_of_another_with_its_backend_and_not_of_its_connection() {
    let mut bench = Bench::new(true);
    bench.establish(1);
    let old: Vec<_> = (2..10).map(|port| bench.forwarded(port, &hello(port)).2).collect();
    bench.later();
    let (_, _, new) = bench.forwarded(10, &hello(10));
    let name = bench.backend_of(new);
    let alike = old.into_iter().find(|&flow| bench.backend_of(flow) == name).unwrap();
    let (now, count) = (bench.now, bench.forwarder.flow_count());
    // The oldest of them makes room once; then the new one is given up.
    let why = DropReason::PortsExhausted;
    let failed = |bench: &mut Bench, flow| bench.forwarder.flow_failed(now, flow, why);
    let ended = Ended { flow: alike, standing: Standing::Unproven, cid: None };
    assert_eq!(failed(&mut bench, new), OnFailure::RetryAfter(ended));
    assert_eq!(failed(&mut bench, new), OnFailure::Drop(why));
    assert_eq!(bench.forwarder.flow_count(), count - 2);
    // Other failures are not for want of room.
    let (_, _, new) = bench.forwarded(11, &hello(11));
    let failed = bench.forwarder.flow_failed(now, new, DropReason::SendFailed);
    assert_eq!(failed, OnFailure::Drop(DropReason::SendFailed));

    // A connection that moves must not get the port that it had before.
    let mut bench = Bench::new(true);
    let flow = bench.establish(1);
    let cid = cid_of(&bench.backend_of(flow), 1);
    bench.later();
    let moved = bench.flow_from(somewhere(1), &short(&cid)).unwrap();
    let failed = bench.forwarder.flow_failed(bench.now, moved, why);
    assert_eq!(failed, OnFailure::Drop(why));
    // Copies of one connection's packets, which cannot have each other's ports, take those of nobody who is in use.
    let mut bench = Bench::new(true);
    let copies: Vec<_> = (0..9)
        .map(|n| {
            bench.later();
            bench.flow_from(somewhere(n), &short(&routable_cid(1, 9))).unwrap()
        })
        .collect();
    let starts_at_a = (1..).find(|&port| bench.forwarded(port, &hello(port)).0 == "a").unwrap();
    bench.later();
    let copy = bench.flow_from(somewhere(9), &short(&routable_cid(1, 9))).unwrap();
    assert_eq!(bench.forwarder.flow_failed(bench.now, copy, why), OnFailure::Drop(why));
    // A handshake may have that of a copy.
    let other = (starts_at_a + 1..).find(|&port| bench.forwarded(port, &hello(port)).0 == "a");
    let (_, _, handshake) = bench.forwarded(other.unwrap(), &hello(other.unwrap()));
    let failed = bench.forwarder.flow_failed(bench.now, handshake, why);
    assert!(matches!(failed, OnFailure::RetryAfter(ended) if ended.flow == copies[0]));

    let mut bench = Bench::new(true);
    let flow = bench.establish(1);
    let cid = cid_of(&bench.backend_of(flow), 1);
    bench.later();
    let descriptors = DropReason::DescriptorLimit;
    let moved = bench.flow_from(somewhere(1), &short(&cid)).unwrap();
    let failed = bench.forwarder.flow_failed(bench.now, moved, descriptors);
    assert!(matches!(failed, OnFailure::RetryAfter(ended) if ended.flow == flow));
}

#[test]
fn what_a_server_still_sends_to_the_client_before_is_for_nobody() {
    let mut bench = Bench::new(true);
    let (backend, _, flow) = bench.forwarded(1, &hello(1));
    let cid = cid_of(&backend, 1);
    assert_eq!(bench.forwarder.returned(bench.now, flow, &answer(2, &cid)), Returned::Stale);
    bench.answer(flow, &answer(1, &cid));
    // A second connection of the client's socket.
    bench.forwarded(1, &long(V1, &cid, b"second"));
    bench.answer(flow, &long(V1, b"second", &cid));
    bench.answer(flow, &RESET);
}

fn flows(ended: &[Ended]) -> Vec<FlowId> {
    ended.iter().map(|ended| ended.flow).collect()
}

#[test]
fn flows_end_when_unused_and_sooner_when_never_answered() {
    let mut bench = Bench::new(true);
    let (_, _, answered) = bench.forwarded(1, &short(&routable_cid(1, 1)));
    let (_, _, unanswered) = bench.forwarded(2, &short(&routable_cid(1, 1)));
    let _ = bench.forwarder.returned(bench.now, answered, &short(&[1; 8]));
    let mut sweep = |after: u64| {
        let mut expired = Vec::new();
        let now = bench.now + Duration::from_secs(after);
        (0..16).for_each(|_| bench.forwarder.sweep(now, &mut expired));
        expired
    };
    assert_eq!(sweep(10), []);
    assert_eq!(flows(&sweep(11)), [unanswered]);
    assert_eq!(sweep(180), []);
    assert_eq!(flows(&sweep(181)), [answered]);
    assert_eq!(bench.forwarder.flow_count(), 0);
}

#[test]
fn a_reload_with_shorter_timeouts_ends_flows_and_forgets_what_was_learnt() {
    let mut bench = Bench::new(false);
    let cid = [0xee; 9];
    let (backend, _, answered) = bench.forwarded(1, &hello(1));
    bench.answer(answered, &answer(1, &cid));
    let (_, _, unanswered) = bench.forwarded(2, &hello(2));
    bench.now += Duration::from_secs(6);
    let sweep = |bench: &mut Bench| {
        let mut expired = Vec::new();
        (0..16).for_each(|_| bench.forwarder.sweep(bench.now, &mut expired));
        bench.memory.sweep(bench.now, &bench.forwarder.routing);
        expired
    };
    assert_eq!(sweep(&mut bench), []);
    assert_eq!(bench.sizes().connection_ids, 1);

    bench.reload(|config| config.timeouts.flow_unanswered = Duration::from_secs(5), false);
    assert_eq!(flows(&sweep(&mut bench)), [unanswered]);
    // From an address that nothing is remembered of, so that the connection ID alone tells.
    assert_eq!(bench.forwarded(3, &short(&cid)).1, Rule::Dcid);

    bench.now += Duration::from_secs(6);
    bench.reload(
        |config| {
            config.timeouts.flow_idle = Duration::from_secs(5);
            config.timeouts.learnt = Duration::from_secs(5);
        },
        false,
    );
    assert_ne!(bench.forwarded(4, &short(&cid)).1, Rule::Dcid, "{backend} is not remembered");
    assert!(flows(&sweep(&mut bench)).contains(&answered));
    assert_eq!(bench.sizes().connection_ids, 0);
}
