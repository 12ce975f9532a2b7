//! Sections C, D and E of the requirements: TLS, parameters, tokens, the handshake as a whole.

use super::*;
use crate::{
    header::Version,
    initial::{Reason, Refusal},
    token::{InvalidToken, RetryClaim, Token, TokenKey, TokenKeys, nat, shared_state},
    transport::connection::Seen,
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

/// One of the formats of Retry tokens: how a server is told to honour it, and how it is sealed.
struct Format {
    policy: fn(TokenKeys) -> TokenPolicy,
    seal: fn(&TokenKey, [u8; 12], &RetryClaim, &ConnectionId) -> Option<Token>,
}

const SHARED_STATE: Format = Format {
    policy: |keys| TokenPolicy::SharedState { minting: 5, keys },
    seal: shared_state::seal_retry,
};
const NAT: Format = Format { policy: TokenPolicy::Nat, seal: nat::seal };

impl Format {
    /// A server that honours tokens of this format, and its client.
    fn pair(&self) -> Pair {
        let tokens = Some((self.policy)(TokenKeys::new([token_key()])));
        Pair::new(Scene { tokens, ..Scene::default() })
    }

    /// The token of a balancer's Retry to the client of `pair`, good for ten seconds.
    fn token(&self, pair: &mut Pair) -> Vec<u8> {
        let claim = RetryClaim {
            original_dcid: pair.at_client().original_dcid(),
            client: pair.from,
            expires: SystemTime::UNIX_EPOCH + Duration::from_secs(10),
        };
        (self.seal)(&token_key(), [1; 12], &claim, &retry_scid()).unwrap().to_vec()
    }
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
fn req_e04_forged_foreign_and_old_tokens_of_both_formats_are_refused() {
    for format in [SHARED_STATE, NAT] {
        // What becomes of the token, how much later it comes, and whether it is good.
        type Case = (&'static str, fn(&mut Vec<u8>), i64, bool);
        let cases: [Case; 7] = [
            ("as it was made", |_| {}, 12, true),
            ("expired", |_| {}, 13, false),
            ("of the future", |_| {}, -3600, false),
            ("another seal", |token| *token.last_mut().unwrap() ^= 1, 0, false),
            ("another claim", |token| *token.iter_mut().nth_back(20).unwrap() ^= 1, 0, false),
            ("cut short", |token| token.truncate(30), 0, false),
            ("invented", |token| token[1..].fill(9), 0, false),
        ];
        for (what, change, later, good) in cases {
            let mut pair = format.pair();
            pair.up();
            let mut token = format.token(&mut pair);
            change(&mut token);
            let apart = Duration::from_secs(later.unsigned_abs());
            let wall = match later {
                0.. => SystemTime::UNIX_EPOCH + apart,
                _ => SystemTime::UNIX_EPOCH - apart,
            };
            pair.server.set_wall_clock(pair.now, wall);
            let retry = retry(&mut pair, &token);
            pair.deliver_down(retry);
            pair.exchange();
            let count = usize::from(good);
            assert_eq!(pair.server.connection_count(), count, "{what}");
            assert_eq!(pair.server.tokens(TokenResult::Retry), count as u64, "{what}");
            let refused = closed_with(&pair.client_closed, Code::INVALID_TOKEN);
            assert_eq!(refused, !good, "{what}: {:?}", pair.client_closed);
            // A clock that is wrong is told so.
            let words = match &pair.client_closed {
                Some(ConnectionError::PeerClosed(PeerClose::Transport { reason, .. })) => reason,
                _ => &Default::default(),
            };
            let expected = match what {
                "expired" => "expired",
                "of the future" => "future",
                _ => "",
            };
            assert_eq!(words, expected, "{what}");
            let by_reason = InvalidToken::ALL.map(|why| pair.server.tokens_refused(why));
            let invalid = pair.server.tokens(TokenResult::Invalid);
            assert_eq!(by_reason.iter().sum::<u64>(), invalid, "{what}");
            let why = match what {
                "expired" => InvalidToken::Expired,
                "of the future" => InvalidToken::Future,
                "another seal" | "another claim" => InvalidToken::Seal,
                _ => continue,
            };
            assert_eq!(pair.server.tokens_refused(why), invalid, "{what}: {by_reason:?}");
        }
    }
}

/// A token of the draft's format says whom it was made for; in the other one the balancer checks that.
#[test]
fn req_e04_a_retry_token_of_another_client_is_refused() {
    let mut pair = SHARED_STATE.pair();
    pair.up();
    let token = SHARED_STATE.token(&mut pair);
    pair.from.set_port(2000);
    let retry = retry(&mut pair, &token);
    pair.deliver_down(retry);
    pair.exchange();
    assert!(closed_with(&pair.client_closed, Code::INVALID_TOKEN), "{:?}", pair.client_closed);
    assert_eq!(pair.server.connection_count(), 0);
}

/// Whoever answers for the servers refuses the Initials of forgers too, and the answer goes to the address that a forger
/// wrote on it. It is sealed for the connection ID that the forger made up, and means nothing to a client that drew another.
/// Whoever saw the client's own could have sealed the same by itself; once the client has heard of its server, it takes the
/// packet's number for one that it has had.
#[test]
fn a_refusal_of_an_initial_that_somebody_forged_ends_no_handshake() {
    for original_dcid in [None, Some(b"made up".as_slice())] {
        for heard_of_the_server in [false, true] {
            let ends = original_dcid.is_none() && !heard_of_the_server;
            let mut pair = Pair::new(Scene::default());
            let mut answers = pair.first_flights().into_iter();
            if heard_of_the_server {
                pair.deliver_down(answers.next().unwrap());
            }
            let client = pair.at_client();
            let (client_cid, drawn) = (client.local_cids().next().unwrap(), client.original_dcid());
            let refusal = Refusal {
                version: Version::V1,
                client_cid: &client_cid,
                original_dcid: original_dcid.unwrap_or(&drawn),
                scid: &retry_scid(),
                reason: Reason::InvalidToken,
                words: "",
            };
            let mut octets = [0; Refusal::MAX_LEN];
            let len = refusal.write(&mut octets).unwrap();
            pair.deliver_down(octets[..len].to_vec());
            answers.for_each(|answer| pair.deliver_down(answer));
            pair.settle();
            let refused = closed_with(&pair.client_closed, Code::INVALID_TOKEN);
            assert_eq!(refused, ends, "{:?}", pair.client_closed);
            assert_eq!(pair.client_closed.is_none(), !ends);
            assert!(ends || pair.at_client().is_confirmed());
        }
    }
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
    // Two that begin together do not share one.
    assert_eq!(pair.client.kept_tokens(), 1);
    pair.reconnect();
    pair.reconnect();
    assert_eq!(pair.client.kept_tokens(), 0);
    pair.settle();
    assert_eq!(pair.server.tokens(TokenResult::NewToken), 40);
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
    for format in [SHARED_STATE, NAT] {
        // A balancer that begins to send Retries forwards what it answers for a while.
        let mut pair = format.pair();
        assert!(!pair.first_flights().is_empty());
        assert_eq!((pair.server.half_open(), pair.server.connection_count()), (1, 1));
        let token = format.token(&mut pair);
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
}

/// What the server answers is lost at first, with the NAT's binding.
#[test]
fn a_client_that_moves_amid_the_handshake_after_a_retry_goes_on_with_it() {
    for repeated in [false, true] {
        let mut pair = NAT.pair();
        pair.up();
        let token = NAT.token(&mut pair);
        let retry = retry(&mut pair, &token);
        pair.deliver_down(retry);
        let second_flight = pair.up();
        for datagram in second_flight.clone() {
            pair.deliver(datagram);
        }
        pair.down();
        pair.from.set_port(2000);
        if repeated {
            // The same packets again: nothing in them is new.
            for datagram in second_flight.clone() {
                pair.deliver(datagram);
            }
            assert_eq!(pair.half_open().path().remote.port(), 1000);
        }
        let deadline = pair.client.deadline().unwrap();
        pair.pass(deadline - pair.now);
        for datagram in pair.up() {
            pair.deliver(datagram);
        }
        assert_eq!(pair.half_open().path().remote.port(), 2000);
        pair.pass(Duration::from_secs(1));
        pair.settle();
        assert_eq!((pair.server.half_open(), pair.server.connection_count()), (0, 1));
        assert!(pair.at_client().is_confirmed() && pair.at_server().is_confirmed());
        assert_eq!(pair.at_server().path().remote.port(), 2000);
        assert_eq!(pair.server.tokens(TokenResult::Retry), 1);

        // It begins nothing else, wherever it comes from, also when the handshake is long over.
        pair.from.set_port(3000);
        let spent = pair.server.dropped(DropReason::SpentToken);
        for datagram in second_flight {
            pair.deliver(datagram);
        }
        assert!(pair.server.dropped(DropReason::SpentToken) > spent);
        assert_eq!(pair.server.connection_count(), 1);
        assert_eq!(pair.at_server().path().remote.port(), 2000);
    }
}

#[test]
fn a_validated_retry_token_drops_nothing_of_another_address() {
    let mut pair = SHARED_STATE.pair();
    assert!(!pair.first_flights().is_empty());
    pair.from.set_port(2000);
    let token = SHARED_STATE.token(&mut pair);
    let retry = retry(&mut pair, &token);
    pair.deliver_down(retry);
    for datagram in pair.up() {
        pair.deliver(datagram);
    }
    assert_eq!(pair.server.tokens(TokenResult::Retry), 1);
    assert_eq!((pair.server.half_open(), pair.server.connection_count()), (2, 2));
}

#[test]
fn a_handshake_that_nobody_answers_ends_with_advice() {
    let mut pair = Pair::new(Scene::default());
    let started = pair.now;
    for _ in 0..1000 {
        if pair.client_closed.is_some() {
            break;
        }
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
        let mut offset = pair.at_server().crypto_sent(Space::Data);
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

#[test]
fn req_c04_a_hello_of_several_initials_is_put_together_in_any_order() {
    let mut pair = Pair::new(Scene { client: with_groups(&[POST_QUANTUM]), ..Scene::default() });
    let mut up = pair.up();
    assert!(up.len() >= 2, "a key share of more than 1200 octets");
    up.reverse();
    for datagram in up {
        pair.deliver(datagram);
    }
    pair.settle();
    assert!(pair.at_server().is_confirmed());
}

#[test]
fn req_c09_a_hello_retry_request_stays_in_initials() {
    let mut scene = Scene { client: with_groups(&[X25519, P256]), ..Scene::default() };
    let mut server = rustls::ServerConfig::clone(&tls().server);
    let mut provider = rustls::crypto::CryptoProvider::clone(server.crypto_provider());
    provider.kx_groups.retain(|group| group.name() == P256);
    server = rustls::ServerConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::clone(&server.cert_resolver));
    server.alpn_protocols = vec![b"test".to_vec()];
    scene.server.tls = Arc::new(server);
    let mut pair = Pair::new(scene);
    for datagram in pair.first_flights() {
        assert!(pair.peek(false, &datagram).iter().all(|packet| packet.space == Space::Initial));
        pair.deliver_down(datagram);
    }
    assert!(!pair.at_client().holds_keys(Space::Handshake));
    pair.settle();
    assert!(pair.at_server().is_confirmed());
}

#[test]
fn req_c05_c10_a_certificate_that_nobody_vouches_for_ends_the_handshake_with_its_alert() {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    client.alpn_protocols = vec![b"test".to_vec()];
    let mut pair =
        Pair::new(Scene { client: ClientConfig::new(Arc::new(client)), ..Scene::default() });
    pair.exchange();
    // unknown_ca
    let Some(ConnectionError::Tls { code, .. }) = &pair.client_closed else {
        panic!("{:?}", pair.client_closed)
    };
    assert_eq!(code.alert(), Some(48));
    assert!(closed_with(&pair.closed, *code), "{:?}", pair.closed);
}

#[test]
fn req_c22_without_a_common_protocol_the_handshake_fails() {
    let mut client = rustls::ClientConfig::clone(&tls().client);
    client.alpn_protocols = vec![b"other".to_vec()];
    let mut pair =
        Pair::new(Scene { client: ClientConfig::new(Arc::new(client)), ..Scene::default() });
    pair.exchange();
    assert!(closed_with(&pair.client_closed, Code::crypto(120)), "{:?}", pair.client_closed);
    // Nor does one that offers none at all get through, even to a server that has none either.
    for server_has_one in [true, false] {
        let mut client = rustls::ClientConfig::clone(&tls().client);
        client.alpn_protocols = vec![];
        let mut server = rustls::ServerConfig::clone(&tls().server);
        server.alpn_protocols.retain(|_| server_has_one);
        let mut pair = Pair::new(Scene {
            client: ClientConfig::new(Arc::new(client)),
            server: ServerConfig::new(Arc::new(server)),
            ..Scene::default()
        });
        pair.exchange();
        let errors = [&pair.client_closed, &pair.closed];
        let refused = errors.iter().any(|error| {
            matches!(error, Some(ConnectionError::Tls { code, .. }) if code.alert() == Some(120))
        });
        assert!(refused, "{errors:?}");
    }
}

#[test]
fn req_c06_c11_keys_go_as_the_handshake_completes_and_is_confirmed() {
    let mut pair = Pair::new(Scene::default());
    for datagram in pair.first_flights() {
        pair.deliver_down(datagram);
    }
    assert!(pair.half_open().holds_keys(Space::Initial), "until a Handshake packet arrives");
    let keys = |connection: &Connection| Space::ALL.map(|space| connection.holds_keys(space));
    // Complete at the client, which has sent nothing in a Handshake packet yet.
    assert!(pair.at_client().is_connected() && !pair.at_client().is_confirmed());
    assert_eq!(keys(pair.at_client()), [true, true, true]);
    let up = pair.up();
    assert_eq!(keys(pair.at_client()), [false, true, true]);
    for datagram in up {
        pair.deliver(datagram);
    }
    // Complete and confirmed at the server.
    assert!(pair.half_open().is_confirmed());
    assert_eq!(keys(pair.half_open()), [false, false, true]);
    for datagram in pair.down() {
        pair.deliver_down(datagram);
    }
    // HANDSHAKE_DONE has come.
    assert!(pair.at_client().is_confirmed());
    assert_eq!(keys(pair.at_client()), [false, false, true]);
}

#[test]
fn req_c15_what_fails_authentication_is_counted_and_changes_nothing() {
    let mut pair = Pair::connected();
    let mut packet = pair.forge(Space::Data, &[1]);
    *packet.last_mut().unwrap() ^= 1;
    for _ in 0..10 {
        pair.deliver(packet.clone());
    }
    assert_eq!(pair.at_server().dropped(DropReason::Undecryptable), 10);
    assert!(pair.down().is_empty() && !pair.at_server().is_over());
}

#[test]
fn req_c18_keys_are_updated_after_confirmation_and_one_acknowledgment_at_a_time() {
    let mut pair = Pair::new(Scene::default());
    pair.at_client().update_keys();
    for datagram in pair.first_flights() {
        pair.deliver_down(datagram);
    }
    pair.up();
    assert_eq!(pair.at_client().stats().key_updates, 0, "not confirmed");
    let mut pair = Pair::connected();
    for _ in 0..5 {
        pair.at_client().update_keys();
        pair.at_client().ping();
        pair.up();
        assert_eq!(pair.at_client().stats().key_updates, 1, "nothing is acknowledged");
    }
    pair.settle();
    pair.pass(Duration::from_secs(5));
    pair.at_client().ping();
    pair.settle();
    assert_eq!(pair.at_client().stats().key_updates, 2);
    assert_eq!(pair.at_server().stats().key_updates, 2, "and the server has followed");
}

#[test]
fn req_c20_old_keys_open_what_was_sent_before_an_update_for_three_probe_timeouts() {
    let mut pair = Pair::connected();
    let late: Vec<_> = (0..3).map(|_| pair.forge(Space::Data, &[1])).collect();
    pair.at_client().force_phase();
    let first = pair.forge(Space::Data, &[1]);
    pair.deliver(first);
    pair.down();
    assert_eq!(pair.at_server().stats().key_updates, 1);
    let forgeries = |pair: &mut Pair| {
        let reasons = [DropReason::Undecryptable, DropReason::NoKeys];
        reasons.map(|reason| pair.at_server().dropped(reason)).iter().sum::<u64>()
    };
    pair.deliver(late[0].clone());
    assert_eq!(forgeries(&mut pair), 0, "in time");
    let probe_timeout = pair.at_server().probe_timeout(Space::Data);
    pair.pass(3 * probe_timeout - Duration::from_millis(1));
    pair.deliver(late[1].clone());
    assert_eq!(forgeries(&mut pair), 0, "still in time");
    pair.pass(Duration::from_millis(2));
    pair.deliver(late[2].clone());
    assert_eq!(forgeries(&mut pair), 1, "too late");
    assert_eq!((pair.at_server().stats().key_updates, pair.closed.clone()), (1, None));
}

/// What header protection hides says nothing until the packet is known to be the peer's: a flipped
/// reserved bit is no violation then, and a flipped phase no update.
#[test]
fn req_c27_reserved_bits_and_phase_count_only_in_packets_that_open() {
    for bit in [0x10, 0x08, 0x04] {
        let mut pair = Pair::connected();
        let mut packet = pair.forge(Space::Data, &[1]);
        packet[0] ^= bit;
        pair.deliver(packet);
        pair.exchange();
        assert_eq!(pair.at_server().dropped(DropReason::Undecryptable), 1, "bit {bit:#x}");
        assert_eq!(pair.at_server().stats().key_updates, 0);
        assert_eq!(pair.closed, None, "bit {bit:#x}");
    }
}

#[test]
fn req_c21_keys_are_updated_before_their_limit_and_forgeries_end_the_connection_at_theirs() {
    let config = TransportConfig { key_update_after: Some(100), ..TransportConfig::default() };
    let mut pair = Pair::connected_as(Scene::with(config));
    for _ in 0..500 {
        pair.at_client().ping();
        pair.exchange();
        pair.pass(Duration::from_millis(30));
    }
    let updates = pair.at_client().stats().key_updates;
    assert!((4..20).contains(&updates), "{updates} updates");
    let mut packet = pair.forge(Space::Data, &[1]);
    *packet.last_mut().unwrap() ^= 1;
    pair.at_server().force_failures_left(2);
    pair.deliver(packet.clone());
    assert!(!pair.at_server().is_over());
    pair.deliver(packet);
    assert_eq!(pair.code(), Some(Code::AEAD_LIMIT_REACHED));
}

/// Each row: what a client says instead of its hello, and what it earns.
#[test]
fn req_c01_c23_c26_hellos_that_quic_does_not_allow() {
    let hello = |pair: &mut Pair| {
        let mut pieces: Vec<_> = vec![];
        for datagram in pair.up() {
            pair.deliver(datagram.clone());
            pieces.extend(pair.half_open().peek(&datagram).iter().flat_map(Seen::crypto));
        }
        pieces.sort();
        pieces.dedup();
        pieces.into_iter().flat_map(|(_, data)| data).collect::<Vec<_>>()
    };
    for (name, change, codes) in [
        // protocol_version
        ("c01 TLS 1.2 only", without_extension as fn(&[u8], u16) -> Vec<u8>, vec![70]),
        // missing_extension
        ("c23 no transport parameters", without_extension, vec![109]),
        ("c26 a legacy session ID", with_session_id, vec![47]),
    ] {
        let mut source = Pair::new(Scene { client: with_groups(&[X25519]), ..Scene::default() });
        let original = hello(&mut source);
        let extension = if name.starts_with("c01") { 43 } else { 0x39 };
        let changed = change(&original, extension);
        let mut pair = Pair::new(Scene::default());
        pair.up();
        let mut frames = vec![];
        frame::write_crypto_header(0, changed.len(), &mut frames);
        frames.extend_from_slice(&changed);
        let now = pair.now;
        let packet = pair.at_client().forge_padded(now, Space::Initial, &frames);
        pair.hold = true;
        pair.deliver(packet);
        let code = pair.code();
        let alert = code.and_then(Code::alert);
        let violation = code == Some(Code::PROTOCOL_VIOLATION);
        assert!(violation || alert.is_some_and(|alert| codes.contains(&alert)), "{name}: {code:?}");
    }
}

#[test]
fn req_c02_c03_c24_tls_data_where_it_does_not_belong() {
    // New data at a level that is done.
    let mut pair = Pair::new(Scene::default());
    pair.first_flights();
    let end = pair.at_client().crypto_sent(Space::Initial);
    let mut frames = vec![];
    frame::write_crypto_header(end, 4, &mut frames);
    frames.extend_from_slice(&[1, 0, 0, 0]);
    let now = pair.now;
    let packet = pair.at_client().forge_padded(now, Space::Initial, &frames);
    pair.hold = true;
    pair.deliver(packet);
    assert_eq!(pair.code(), Some(Code::PROTOCOL_VIOLATION));
    // EndOfEarlyData, and nothing but a Finished is due.
    let mut pair = Pair::new(Scene::default());
    for datagram in pair.first_flights() {
        pair.deliver_down(datagram);
    }
    let mut frames = vec![];
    frame::write_crypto_header(0, 4, &mut frames);
    frames.extend_from_slice(&[5, 0, 0, 0]);
    assert_eq!(pair.verdict(Space::Handshake, &frames), Some(Code::crypto(10)));
}

#[test]
fn req_e02_a_handshake_packet_or_a_token_validates_the_address() {
    let mut pair = Pair::new(Scene::default());
    for datagram in pair.first_flights() {
        pair.deliver_down(datagram);
    }
    assert!(!pair.half_open().path().validated);
    for datagram in pair.up() {
        pair.deliver(datagram);
    }
    assert!(pair.half_open().path().validated);
    let mut pair = Pair::new(Scene::with_retry(RetryPolicy::Always));
    for datagram in pair.first_flights() {
        pair.deliver_down(datagram);
    }
    pair.first_flights();
    assert!(pair.half_open().path().validated);
}

#[test]
fn req_e03_a_client_with_nothing_in_flight_still_probes_a_server_that_may_be_stuck() {
    let mut pair = Pair::new(Scene::default());
    let up = pair.up();
    for datagram in &up {
        pair.deliver(datagram.clone());
    }
    pair.down();
    // An Initial of the server's that acknowledges the hello, and nothing else arrives.
    let now = pair.now;
    let largest = up.len() as u64 - 1;
    let packet =
        pair.half_open().forge(now, Space::Initial, &fields(types::ACK, &[largest, 0, 0, largest]));
    pair.deliver_down(packet);
    assert_eq!(pair.at_client().path().in_flight, 0);
    let deadline = pair.client.deadline().unwrap();
    pair.pass(deadline - pair.now);
    let probes = pair.up();
    assert!(!probes.is_empty() && probes.iter().all(|probe| probe.len() >= 1200));
}

#[test]
fn req_e10_a_server_at_its_limit_sets_no_probe_timer() {
    let mut pair = Pair::new(Scene::default());
    let up = pair.up();
    let received: usize = up.iter().map(Vec::len).sum();
    for datagram in up {
        pair.deliver(datagram);
    }
    let mut sent = 0;
    for _ in 0..10 {
        sent += pair.down().iter().map(Vec::len).sum::<usize>();
        let Some(deadline) = pair.server.deadline() else { break };
        if deadline - pair.now > Duration::from_secs(20) {
            break;
        }
        pair.pass(deadline - pair.now);
    }
    assert!(sent <= 3 * received && sent + 1200 > 3 * received, "{sent} for {received}");
    let deadline = pair.server.deadline().unwrap();
    assert!(deadline - pair.now > Duration::from_secs(10), "only the end is awaited");
    // A further datagram sets it off again.
    pair.at_client().ping();
    pair.pass(Duration::from_millis(1100));
    for datagram in pair.up() {
        pair.deliver(datagram);
    }
    assert!(!pair.down().is_empty());
}

const X25519: rustls::NamedGroup = rustls::NamedGroup::X25519;
const P256: rustls::NamedGroup = rustls::NamedGroup::secp256r1;
const POST_QUANTUM: rustls::NamedGroup = rustls::NamedGroup::X25519MLKEM768;

/// A client that offers these groups for the key exchange, the first with a key share.
fn with_groups(groups: &[rustls::NamedGroup]) -> ClientConfig {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    let all = std::mem::take(&mut provider.kx_groups);
    let find = |name: &rustls::NamedGroup| all.iter().copied().find(|group| group.name() == *name);
    provider.kx_groups = groups.iter().map(|name| find(name).unwrap()).collect();
    let mut client = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(tls().roots.clone())
        .with_no_client_auth();
    client.alpn_protocols = vec![b"test".to_vec()];
    ClientConfig::new(Arc::new(client))
}

/// Where the extensions of a ClientHello begin, with their length in front.
fn extensions_at(hello: &[u8]) -> usize {
    let mut at = 4 + 2 + 32;
    at += 1 + usize::from(hello[at]);
    at += 2 + usize::from(u16::from_be_bytes([hello[at], hello[at + 1]]));
    at + 1 + usize::from(hello[at])
}

/// Sets the length of the message, and of its extensions.
fn with_lengths(mut hello: Vec<u8>) -> Vec<u8> {
    let at = extensions_at(&hello);
    let len = u16::try_from(hello.len() - at - 2).unwrap();
    hello[at..at + 2].copy_from_slice(&len.to_be_bytes());
    let len = u32::try_from(hello.len() - 4).unwrap();
    hello[1..4].copy_from_slice(&len.to_be_bytes()[1..]);
    hello
}

fn without_extension(hello: &[u8], gone: u16) -> Vec<u8> {
    let at = extensions_at(hello);
    let mut changed = hello[..at + 2].to_vec();
    let mut rest = &hello[at + 2..];
    while let [high, low, len_high, len_low, ..] = *rest {
        let len = 4 + usize::from(u16::from_be_bytes([len_high, len_low]));
        if u16::from_be_bytes([high, low]) != gone {
            changed.extend_from_slice(&rest[..len]);
        }
        rest = &rest[len..];
    }
    with_lengths(changed)
}

fn with_session_id(hello: &[u8], _: u16) -> Vec<u8> {
    let mut changed = hello[..38].to_vec();
    changed.push(32);
    changed.extend_from_slice(&[7; 32]);
    changed.extend_from_slice(&hello[39..]);
    with_lengths(changed)
}

/// The order in which qh3 writes them.
#[test]
fn acknowledgments_may_follow_what_completes_the_handshake() {
    let mut pair = Pair::new(Scene::default());
    for datagram in pair.up() {
        pair.deliver(datagram);
    }
    for datagram in pair.down() {
        pair.deliver_down(datagram);
    }
    let now = pair.now;
    let packet = pair.at_client().forge_with_ack_last(now);
    pair.deliver(packet);
    pair.hold = true;
    pair.exchange();
    assert_eq!(pair.closed, None);
    assert!(pair.at_server().is_confirmed());
}
