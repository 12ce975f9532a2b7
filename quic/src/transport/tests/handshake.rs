//! Sections C, D and E of the requirements: TLS, parameters, tokens, the handshake as a whole.

use super::*;
use crate::{
    header::Version,
    token::{RetryClaim, TokenKey, TokenKeys, shared_state},
};

/// A Retry in answer to the client's first flight.
fn retry(pair: &mut Pair, token: &[u8]) -> Vec<u8> {
    let client = pair.at_client();
    let packet = crate::retry::Retry {
        version: Version::V1,
        dcid: &client.local_cids().next().unwrap(),
        scid: &retry_scid(),
        original_dcid: &client.original_dcid(),
        token,
    };
    let mut octets = vec![0; crate::retry::MAX_LEN];
    let len = packet.write(0, &mut octets).unwrap();
    octets.truncate(len);
    octets
}

fn retry_scid() -> ConnectionId {
    ConnectionId::new(&[0xab; 10]).unwrap()
}

fn token_key() -> TokenKey {
    TokenKey::new(5, [5; 16], [5; 12]).unwrap()
}

fn token_policy() -> TokenPolicy {
    TokenPolicy::SharedState { minting: 5, keys: TokenKeys::new([token_key()]) }
}

#[test]
fn req_e04_a_retry_token_that_is_not_valid_is_refused() {
    let mut pair = Pair::new(Scene::with_retry(RetryPolicy::Never));
    pair.up();
    let retry = retry(&mut pair, &[0; 40]);
    pair.deliver_down(retry);
    pair.exchange();
    assert!(closed_with(&pair.client_closed, Code::INVALID_TOKEN), "{:?}", pair.client_closed);
    assert!(pair.server.tokens(TokenResult::Invalid) > 0);
    assert_eq!(pair.server.connection_count(), 0);
}

#[test]
fn req_e05_tokens_of_a_server_are_used_once_and_kept_within_bounds() {
    let mut pair = Pair::connected();
    pair.reconnect();
    pair.settle();
    assert_eq!(pair.server.tokens(TokenResult::NewToken), 1);
    // Each connection leaves one token, and spends one.
    for round in 2..40 {
        pair.reconnect();
        pair.settle();
        assert_eq!(pair.server.tokens(TokenResult::NewToken), round);
    }
    assert_eq!(pair.server.tokens(TokenResult::Spent), 0);
    // A server may give as many as it likes.
    for number in 0..1000u32 {
        let mut frames = vec![];
        frame::write_octets(types::NEW_TOKEN, &number.to_be_bytes(), &mut frames);
        let now = pair.now;
        let packet = pair.at_server().forge(now, Space::Data, &frames);
        pair.deliver_down(packet);
        pair.up();
    }
    assert_eq!(pair.client.kept_tokens(), 2);
}

#[test]
fn req_e06_a_token_that_comes_again_counts_as_absent() {
    let mut pair = Pair::connected();
    pair.reconnect();
    let first_flight = pair.up();
    for datagram in &first_flight {
        pair.deliver(datagram.clone());
    }
    assert_eq!(pair.server.half_open(), 1);
    assert_eq!(pair.server.tokens(TokenResult::NewToken), 1);
    let validated = |pair: &Pair| {
        let handles: Vec<_> = pair.server.connections().collect();
        let last = *handles.last().unwrap();
        pair.server.connection(last).unwrap().path().validated
    };
    assert!(validated(&pair));
    // The same datagrams from another port: the address is still the token's.
    pair.from.set_port(2000);
    for datagram in &first_flight {
        pair.deliver(datagram.clone());
    }
    assert_eq!(pair.server.tokens(TokenResult::Spent), 1);
    assert!(!validated(&pair));
}

#[test]
fn a_validated_retry_token_drops_what_the_same_client_began_before_it() {
    // A balancer that begins to send Retries forwards what it answers for a while.
    let mut pair = Pair::new(Scene { tokens: Some(token_policy()), ..Scene::default() });
    for datagram in pair.up() {
        pair.deliver(datagram);
    }
    assert!(!pair.down().is_empty());
    assert_eq!((pair.server.half_open(), pair.server.connection_count()), (1, 1));
    let claim = RetryClaim {
        original_dcid: pair.at_client().original_dcid(),
        client: pair.from,
        expires: SystemTime::UNIX_EPOCH + Duration::from_secs(10),
    };
    let token = shared_state::seal_retry(&token_key(), [1; 12], &claim, &retry_scid()).unwrap();
    let retry = retry(&mut pair, &token);
    pair.deliver_down(retry);
    for datagram in pair.up() {
        pair.deliver(datagram);
    }
    assert_eq!((pair.server.half_open(), pair.server.connection_count()), (1, 1));
    assert_eq!(pair.server.tokens(TokenResult::Retry), 1);
    pair.settle();
    assert!(pair.at_client().is_confirmed() && pair.at_server().is_confirmed());
    assert_eq!((pair.server.half_open(), pair.server.connection_count()), (0, 1));
    assert_eq!(pair.closed, None, "the older one goes silently");
}

#[test]
fn a_handshake_that_nobody_answers_ends_with_advice() {
    let mut pair = Pair::new(Scene::default());
    let started = pair.now;
    while pair.client_closed.is_none() {
        pair.up();
        while let Some((_, event)) = pair.client.poll_event() {
            if let Event::Closed(error) = event {
                pair.client_closed = Some(error);
            }
        }
        let Some(deadline) = pair.client.deadline() else { break };
        pair.pass(deadline - pair.now);
    }
    let error = pair.client_closed.clone().expect("an end");
    assert_eq!(error, ConnectionError::HandshakeTimeout { answered: false });
    assert!(error.to_string().contains("check its address"));
    let took = pair.now - started;
    assert!(took >= Duration::from_secs(30) && took <= Duration::from_secs(60), "{took:?}");
}

#[test]
fn req_c05_c25_tickets_may_come_when_tls_is_gone_and_nothing_else() {
    let ticket = [&[4, 0, 0, 30][..], &[9; 30]].concat();
    for (first, expected) in [(4, None), (24, Some(Code::crypto(10))), (13, Some(Code::crypto(10)))]
    {
        let mut pair = Pair::connected();
        pair.pass(Duration::from_secs(2));
        pair.settle();
        let mut message = ticket.clone();
        message[0] = first;
        // After the real tickets, in pieces.
        let mut offset = pair.at_server().crypto_sent();
        for piece in message.chunks(3) {
            let mut frames = vec![];
            frame::write_crypto_header(offset, piece.len(), &mut frames);
            frames.extend_from_slice(piece);
            offset += piece.len() as u64;
            let now = pair.now;
            let packet = pair.at_server().forge(now, Space::Data, &frames);
            pair.deliver_down(packet);
        }
        let error = pair.at_client().error().cloned();
        let code = match error {
            Some(ConnectionError::Peer(error)) => Some(error.code),
            None => None,
            other => panic!("{other:?}"),
        };
        assert_eq!(code, expected);
        assert_eq!(pair.at_client().alpn(), Some(&b"test"[..]));
        assert!(pair.at_client().peer_certificates().is_some());
    }
}

#[test]
fn keying_material_can_be_exported_where_the_session_is_kept() {
    for keep in [true, false] {
        let config = TransportConfig { keep_tls_session: keep, ..TransportConfig::default() };
        let mut pair = Pair::connected_as(Scene::with(config));
        pair.pass(Duration::from_secs(2));
        pair.settle();
        let (mut ours, mut theirs) = ([0; 32], [1; 32]);
        let exported = pair.at_client().export_keying_material(&mut ours, b"label", None);
        assert_eq!(exported.is_ok(), keep);
        let exported = pair.at_server().export_keying_material(&mut theirs, b"label", None);
        assert_eq!(exported.is_ok(), keep);
        assert_eq!(ours == theirs, keep);
    }
}

fn closed_with(error: &Option<ConnectionError>, code: Code) -> bool {
    matches!(error,
        Some(ConnectionError::PeerClosed(PeerClose::Transport { code: found, .. }))
            if *found == code)
}
