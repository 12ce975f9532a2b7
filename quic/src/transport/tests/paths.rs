//! Section I of the requirements: paths, migration, preferred addresses.

use super::*;

const PREFERRED: &str = "192.0.2.77:4433";

fn with_preferred_address() -> Scene {
    let mut scene = Scene::default();
    let ipv4 = Some(PREFERRED.parse().unwrap());
    scene.server.preferred_address = Some(PreferredAddress { ipv4, ipv6: None });
    scene
}

/// Moves datagrams both ways, each from and to the addresses it says, until there are none; those to
/// `nowhere` are lost.
fn route(pair: &mut Pair, nowhere: Option<SocketAddr>) {
    for _ in 0..40 {
        let mut buffer = vec![];
        while let Some(sent) = pair.client.poll_transmit(pair.now, 1, &mut buffer) {
            let mut datagram = std::mem::take(&mut buffer);
            if Some(sent.remote) != nowhere {
                let local = Some(sent.remote.ip());
                let from = Received { remote: pair.from, local, ecn: None };
                pair.server.handle_datagram(pair.now, from, &mut datagram);
            }
        }
        while let Some(sent) = pair.server.poll_transmit(pair.now, 1, &mut buffer) {
            let mut datagram = std::mem::take(&mut buffer);
            let port = if sent.local == Some(preferred().ip()) { 4433 } else { 443 };
            let remote = SocketAddr::new(sent.local.unwrap(), port);
            let from = Received { remote, local: None, ecn: None };
            pair.client.handle_datagram(pair.now, from, &mut datagram);
        }
        while let Some((handle, event)) = pair.server.poll_event() {
            if event == Event::Connected {
                pair.at_server = Some(handle);
            }
        }
        while pair.client.poll_event().is_some() {}
        pair.pass(Duration::from_millis(30));
    }
}

fn preferred() -> SocketAddr {
    PREFERRED.parse().unwrap()
}

#[test]
fn req_i09_a_client_goes_to_the_preferred_address_once_that_answers() {
    let mut pair = Pair::new(with_preferred_address());
    route(&mut pair, None);
    let announced = pair.at_server().local_cids().next().unwrap();
    let (path, cid) = (pair.at_client().path(), pair.at_client().remote_cid());
    assert_eq!((path.remote, path.validated), (preferred(), true));
    assert_eq!(cid, announced, "the connection ID with number 1");
    // The one of the handshake was given back. The server has validated the new path too.
    assert!(pair.at_server().path().validated);
    assert_eq!(pair.at_server().stats().path_validations, 1);
    let stream = pair.at_client().open(Dir::Bi).unwrap();
    pair.at_client().write(stream, b"here").unwrap();
    route(&mut pair, Some(SERVER.parse().unwrap()));
    assert_eq!(pair.at_server().read(stream, &mut [0; 9]), Ok(Read::Data(4)));
}

#[test]
fn req_i09_a_preferred_address_that_does_not_answer_is_forgotten() {
    let mut pair = Pair::new(with_preferred_address());
    for _ in 0..10 {
        route(&mut pair, Some(preferred()));
    }
    let path = pair.at_client().path();
    assert_eq!((path.remote, path.validated), (SERVER.parse().unwrap(), true));
    let now = pair.now;
    assert!(pair.at_client().migrate(now, None).is_ok());
}

#[test]
fn req_i09_a_client_may_stay_where_it_is() {
    let mut scene = with_preferred_address();
    let stay = TransportConfig { follow_preferred_address: false, ..TransportConfig::default() };
    scene.client.transport = Arc::new(stay);
    let mut pair = Pair::new(scene);
    route(&mut pair, None);
    assert_eq!(pair.at_client().path().remote, SERVER.parse().unwrap());
    assert_eq!(pair.at_client().stats().path_validations, 0);
}
