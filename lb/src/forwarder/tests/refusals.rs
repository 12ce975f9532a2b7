//! A backend that refuses a first flight: where that goes, and what does not go anywhere.

use super::*;

impl Bench {
    /// What becomes of a flow whose backend has refused this, and others before: which backend gets it, by which flow.
    fn refused(
        &mut self,
        flow: FlowId,
        octets: &[u8],
        before: &[BackendId],
    ) -> Option<(Ended, Option<(String, Via)>)> {
        let Self { forwarder, now, .. } = self;
        let datagrams = std::iter::once(octets);
        let refused = forwarder.refused(*now, flow, datagrams, before.iter().copied());
        let name = |id| forwarder.routing.backend(id).unwrap().name.to_string();
        refused.map(|(ended, other)| (ended, other.map(|(id, via)| (name(id), via))))
    }
}

#[test]
fn a_first_flight_goes_to_each_backend_once_and_the_handshake_stays_where_it_went() {
    for routable in [true, false] {
        let mut bench = Bench::new(routable);
        let hello = long(V1, b"client drawn", b"client");
        let (first, _, mut flow) = bench.forwarded(7, &hello);
        let (mut asked, mut before) = (BTreeSet::from([first]), vec![]);
        for _ in 0..2 {
            let refuses = bench.forwarder.flow(flow).backend;
            let (ended, other) = bench.refused(flow, &hello, &before).unwrap();
            assert_eq!(ended.flow, flow);
            let Some((name, Via::NewFlow(opened))) = other else { panic!("there is room") };
            assert!(opened.asks && asked.insert(name.clone()), "{name} again");
            before.push(refuses);
            flow = opened.flow;
            // The second datagram, and the first one again.
            assert_eq!(bench.forwarded(7, &hello), (name, Rule::FourTupleScid, flow));
        }
        assert_eq!(bench.refused(flow, &hello, &before), None, "there are three");
        assert_eq!(bench.forwarder.flow_count(), 1);
    }
}

#[test]
fn what_was_answered_or_shows_a_connection_id_of_a_server_is_not_moved() {
    let mut bench = Bench::new(true);
    let hello = long(V1, b"client drawn", b"client");
    let (_, _, flow) = bench.forwarded(1, &hello);
    let _ = bench.forwarder.returned(bench.now, flow, &long(V1, b"client", b"of a server"));
    assert_eq!(bench.refused(flow, &hello, &[]), None);
    let (name, _, flow) = bench.forwarded(2, &hello);
    let server = fixtures::config(true).pools[0].backends.iter().position(|b| b.name == name);
    let server = u8::try_from(server.unwrap() + 1).unwrap();
    // A connection that has come here with its client.
    assert_eq!(bench.forwarded(2, &short(&routable_cid(server, 1))), (name, Rule::Cid, flow));
    assert_eq!(bench.refused(flow, &hello, &[]), None);
    // No first flight.
    let (_, _, flow) = bench.forwarded(3, &short(&routable_cid(1, 2)));
    assert_eq!(bench.refused(flow, &hello, &[]), None);
    // It has ended.
    let (_, _, flow) = bench.forwarded(4, &hello);
    assert!(bench.refused(flow, &hello, &[]).is_some());
    assert_eq!(bench.refused(flow, &hello, &[]), None);
}

#[test]
fn another_connection_of_the_client_lends_its_flow() {
    let mut bench = Bench::new(true);
    let mut flows: Vec<(String, FlowId, Vec<u8>)> = vec![];
    // Of one socket, until two backends have been asked.
    for nth in 0..100u8 {
        let hello = long(V1, &[nth; 12], &[nth; 6]);
        let (name, _, flow) = bench.forwarded(1, &hello);
        if flows.iter().all(|(other, ..)| *other != name) {
            flows.push((name, flow, hello));
        }
    }
    let third = bench.forwarder.flow(flows[2].1).backend;
    let (_, other) = bench.refused(flows[0].1, &flows[0].2, &[third]).unwrap();
    assert_eq!(other, Some((flows[1].0.clone(), Via::Flow(flows[1].1))));
    assert_eq!(bench.forwarder.flow_count(), 2);
}
