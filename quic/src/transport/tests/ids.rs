//! Connection IDs over the life of a connection: as many as the peer keeps, and given back with the
//! paths they were for.

use std::collections::BTreeSet;

use super::{
    wire::{Wire, all_arrive},
    *,
};

const ROUND_TRIP: Duration = Duration::from_millis(100);

#[test]
fn req_b02_no_more_connection_ids_are_announced_than_the_peer_keeps() {
    for limit in [2, 3] {
        let mut wire = Wire::new(Scene::default(), ROUND_TRIP);
        wire.pair.at_client().announce(Arc::clone(&tls().client), |parameters| {
            parameters.active_connection_id_limit = limit;
        });
        wire.run(Duration::from_secs(5), &mut all_arrive);
        assert_eq!(wire.pair.at_server().local_cids().count() as u64, limit);
        // Nor after all were exchanged for others.
        let issuer = CidIssuer::standalone(8, [9; 32], ResetKey::new([9; 32]));
        wire.pair.server.set_cid_config(issuer);
        wire.run(Duration::from_secs(5), &mut all_arrive);
        assert_eq!(wire.pair.at_server().local_cids().count() as u64, limit);
    }
}

#[test]
fn req_b02_either_end_has_the_connection_ids_that_the_other_gave() {
    let mut pair = Pair::connected();
    let server = (set(pair.at_server().local_cids()), set(pair.at_server().remote_cids()));
    let client = (set(pair.at_client().remote_cids()), set(pair.at_client().local_cids()));
    assert_eq!(server, client);
    assert_eq!((server.0.len(), server.1.len()), (4, 4));
}

fn set(ids: impl Iterator<Item = ConnectionId>) -> BTreeSet<Vec<u8>> {
    ids.map(|id| id.to_vec()).collect()
}

#[test]
fn req_b05_a_connection_id_that_is_asked_back_is_not_sent_to_any_more() {
    let mut pair = Pair::connected();
    let before = pair.at_server().remote_cid();
    let packet = pair.forge(Space::Data, &new_connection_id(9, 9));
    pair.deliver(packet);
    let after = pair.at_server().remote_cid();
    assert_eq!(after, ConnectionId::new(&9u64.to_be_bytes()).unwrap());
    pair.at_server().ping();
    let down = pair.down();
    assert!(!down.is_empty() && before != after);
    assert!(down.iter().all(|datagram| datagram[1..9] == after[..]));
}

#[test]
fn req_i08_both_ends_give_back_the_connection_ids_of_a_path_that_was_left() {
    let mut wire = Wire::connected(Scene::default(), ROUND_TRIP);
    let (to_server, to_client) =
        (wire.pair.at_client().remote_cid(), wire.pair.at_server().remote_cid());
    let now = wire.pair.now;
    let at_client = wire.pair.at_client;
    wire.pair.client.connection_mut(at_client).unwrap().migrate(now, None).unwrap();
    wire.pair.from = "198.51.100.2:1000".parse().unwrap();
    wire.run(Duration::from_secs(5), &mut all_arrive);
    assert!(wire.pair.at_server().path().validated);
    assert!(wire.pair.at_server().local_cids().all(|id| id != to_server));
    assert!(wire.pair.at_client().local_cids().all(|id| id != to_client));
    // Others have taken their place.
    assert_eq!(wire.pair.at_server().local_cids().count(), 4);
    assert_eq!(wire.pair.at_client().local_cids().count(), 4);
}
