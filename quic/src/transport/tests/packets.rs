//! Sections A and B of the requirements: packets, their numbers, connection IDs, stateless resets.

use std::collections::BTreeSet;

use super::*;
use crate::{
    header::Version,
    transport::{
        connection::Seen,
        frame::Frame,
        packet::{Header, PacketKind},
    },
};

#[test]
fn req_a08_datagrams_with_initials_are_padded_by_both_and_small_ones_dropped() {
    let mut pair = Pair::new(Scene::default());
    let up = pair.up();
    assert!(up.iter().all(|datagram| datagram.len() >= 1200));
    pair.deliver(up[0][..1199].to_vec());
    assert_eq!(pair.server.dropped(DropReason::SmallInitial), 1);
    assert_eq!(pair.server.connection_count(), 0);
    for datagram in up {
        pair.deliver(datagram);
    }
    let eliciting = |datagram: &&Vec<u8>| datagram[0] & 0xf0 == 0xc0;
    let down = pair.down();
    assert!(down.iter().filter(eliciting).all(|datagram| datagram.len() >= 1200));
    assert!(down.iter().any(|datagram| datagram[0] & 0xf0 == 0xc0));
}

#[test]
fn req_a10_coalesced_packets_of_another_connection_are_ignored() {
    let mut pair = Pair::new(Scene::default());
    let mut first = pair.first_flights().remove(0);
    let initial = Header::read(&first, 8).unwrap().len;
    assert!(initial < first.len(), "an Initial and a Handshake packet");
    // The first octet of the second one's destination.
    first[initial + 6] ^= 1;
    pair.deliver_down(first);
    let client = pair.at_client();
    assert_eq!(client.dropped(DropReason::OtherConnection), 1);
    assert!(client.holds_keys(Space::Handshake), "the first packet counts");
}

/// Two handshakes of one client at once.
#[test]
fn req_a11_packets_share_a_datagram_within_one_connection_and_in_the_order_of_their_keys() {
    let mut pair = Pair::new(Scene::default());
    pair.reconnect();
    let mut shared = 0;
    for _ in 0..40 {
        for upward in [true, false] {
            let datagrams = if upward { pair.up() } else { pair.down() };
            for mut datagram in datagrams {
                let (mut rest, mut kinds) = (&mut datagram.clone()[..], vec![]);
                while let Ok(header) = Header::read(rest, 8) {
                    let level = match header.kind {
                        PacketKind::Initial { .. } => 0,
                        PacketKind::Handshake { .. } => 1,
                        PacketKind::OneRtt => 2,
                        other => panic!("{other:?}"),
                    };
                    kinds.push((level, header.dcid));
                    rest = &mut rest[header.len..];
                }
                assert!(kinds.is_sorted_by_key(|(level, _)| *level), "{kinds:?}");
                assert!(kinds.windows(2).all(|pair| pair[0].1 == pair[1].1), "{kinds:?}");
                shared += usize::from(kinds.len() > 1);
                match upward {
                    true => pair.deliver(std::mem::take(&mut datagram)),
                    false => pair.deliver_down(std::mem::take(&mut datagram)),
                }
            }
        }
        pair.pass(Duration::from_millis(10));
    }
    assert_eq!(pair.client.connection_count(), 2);
    assert!(shared >= 4, "{shared} datagrams of several packets");
}

#[test]
fn req_a12_f08_every_space_counts_for_itself_and_acknowledges_what_it_got() {
    let mut pair = Pair::new(Scene::default());
    let mut sent: [[BTreeSet<u64>; 3]; 2] = Default::default();
    for _ in 0..40 {
        for upward in [true, false] {
            let datagrams = if upward { pair.up() } else { pair.down() };
            for datagram in datagrams {
                // Some keys are there only before, some only after it has arrived.
                let mut seen = pair.peek(upward, &datagram);
                match upward {
                    true => pair.deliver(datagram.clone()),
                    false => pair.deliver_down(datagram.clone()),
                }
                for packet in pair.peek(upward, &datagram) {
                    let same =
                        |other: &Seen| (other.space, other.number) == (packet.space, packet.number);
                    if !seen.iter().any(same) {
                        seen.push(packet);
                    }
                }
                for packet in seen {
                    let (own, other) = (usize::from(upward), usize::from(!upward));
                    let space = packet.space.index();
                    assert!(sent[own][space].insert(packet.number), "a number is used once");
                    for frame in packet.frames() {
                        let Frame::Ack(ack) = frame else { continue };
                        // What was opened too early for us to see aside, it was sent in this space.
                        let known = sent[other][space].last().copied();
                        assert!(known.is_none_or(|known| ack.largest <= known + 2));
                    }
                }
            }
        }
        pair.pass(Duration::from_millis(10));
    }
    assert!(sent[0].iter().all(|numbers| !numbers.is_empty()));
    assert_eq!(sent[0][0].first(), Some(&0), "numbers start at zero");
}

#[test]
fn req_a12_the_last_packet_number_ends_the_connection_silently() {
    let mut pair = Pair::connected();
    pair.at_client().force_number(Space::Data, varint::MAX - 1);
    pair.at_client().ping();
    let last = pair.up();
    assert_eq!(last.len(), 1, "no CONNECTION_CLOSE");
    assert!(matches!(pair.client.poll_event(), Some((_, Event::Closed(_)))));
    assert_eq!(pair.client.connection_count(), 0);
}

#[test]
fn req_a16_servers_send_no_token_and_clients_take_none() {
    let mut pair = Pair::new(Scene::default());
    let flight = pair.first_flights();
    // Type, version, and two connection IDs of eight octets; then the length of the token.
    assert_eq!((flight[0][0] & 0xf0, flight[0][23]), (0xc0, 0));
    let now = pair.now;
    let packet = pair.half_open().forge_with_token(now, b"token");
    pair.deliver_down(packet);
    pair.exchange();
    let violation = |error: &TransportError| error.code == Code::PROTOCOL_VIOLATION;
    assert!(matches!(&pair.client_closed, Some(ConnectionError::Peer(e)) if violation(e)));
}

#[test]
fn req_a19_the_spin_bit_is_off_and_drawn_anew_for_each_connection() {
    let mut pair = Pair::connected();
    let mut seen = BTreeSet::new();
    for _ in 0..24 {
        let spin = pair.forge(Space::Data, &[1])[0] & 0x20;
        assert_eq!(pair.forge(Space::Data, &[1])[0] & 0x20, spin);
        seen.insert(spin);
        pair.reconnect();
        pair.settle();
    }
    assert_eq!(seen.len(), 2);
}

#[test]
fn req_b01_connection_ids_are_unique_and_share_nothing() {
    let mut pair = Pair::connected();
    let mut all = BTreeSet::new();
    let mut count = 0;
    for _ in 0..30 {
        let mut ids: Vec<_> = pair.at_server().local_cids().collect();
        ids.extend(pair.at_client().local_cids());
        count += ids.len();
        all.extend(ids.iter().map(|id| id.to_vec()));
        pair.reconnect();
        pair.settle();
    }
    assert_eq!(all.len(), count);
    // The first octet says form and length; those after it are as random as they look.
    let starts: BTreeSet<_> = all.iter().map(|id| id[1..3].to_vec()).collect();
    assert!(starts.len() * 20 > count * 19, "{} starts of {count}", starts.len());
}

#[test]
fn req_b09_b10_what_belongs_to_nobody_is_dropped_or_reset() {
    let mut pair = Pair::connected();
    // A short header with an ID of ours that nobody has.
    let mut stray = pair.forge(Space::Data, &[1; 40]);
    stray[2..9].fill(7);
    pair.deliver(stray.clone());
    let resets = pair.down();
    assert!(matches!(&resets[..], [reset] if reset.len() < stray.len()));
    // One that cannot be ours.
    stray[1] = 0x11;
    pair.deliver(stray);
    assert!(pair.down().is_empty());
    assert_eq!(pair.server.dropped(DropReason::UnknownConnection), 1);
    // 0-RTT without an Initial: kept nowhere.
    let mut early = vec![0xd0, 0, 0, 0, 1, 8, 9, 9, 9, 9, 9, 9, 9, 9, 0, 0x44, 0x80];
    early.resize(1200, 5);
    pair.deliver(early);
    assert!(pair.down().is_empty());
    assert_eq!(pair.server.dropped(DropReason::UnknownConnection), 2);
    assert_eq!(pair.server.connection_count(), 1);
}

#[test]
fn req_b11_the_servers_first_source_connection_id_stays() {
    let mut pair = Pair::new(Scene::default());
    let up = pair.up();
    let drawn = pair.at_client().original_dcid();
    assert!(drawn.len() >= 8);
    assert!(up.iter().all(|datagram| datagram[6..14] == drawn[..]));
    for datagram in up {
        pair.deliver(datagram);
    }
    let flight = pair.down();
    pair.deliver_down(flight[0].clone());
    let chosen = pair.half_open().local_cids().next().unwrap();
    assert_eq!(pair.at_client().remote_cid(), chosen);
    let now = pair.now;
    let other = ConnectionId::new(&[5; 8]).unwrap();
    for space in [Space::Initial, Space::Handshake] {
        let dropped = pair.at_client().dropped(DropReason::OtherConnection);
        let packet = pair.half_open().forge_from(now, space, other, &[1]);
        pair.deliver_down(packet);
        assert_eq!(pair.at_client().dropped(DropReason::OtherConnection), dropped + 1);
    }
    assert_eq!(pair.at_client().remote_cid(), chosen);
    // The server holds on to the client's as well.
    let packet = pair.at_client().forge_from(now, Space::Handshake, other, &[1]);
    pair.deliver(packet);
    assert_eq!(pair.half_open().dropped(DropReason::OtherConnection), 1);
    pair.settle();
    assert!(pair.at_server().is_confirmed());
    // And another connection begins with another choice.
    pair.reconnect();
    assert_ne!(pair.at_client().original_dcid(), drawn);
}

#[test]
fn req_b12_connection_ids_in_parameters_have_to_be_those_on_the_wire() {
    let other = ConnectionId::new(&[9; 8]);
    for retried in [false, true] {
        let retry = if retried { RetryPolicy::Always } else { RetryPolicy::Never };
        let mut pair = Pair::connected_as(Scene::with_retry(retry));
        let good = pair.at_client().peer();
        assert_eq!(pair.at_client().judge(&good), Ok(()));
        assert_eq!(good.retry_source_connection_id.is_some(), retried);
        for change in 0..6 {
            let mut bad = good.clone();
            match change {
                0 => bad.initial_source_connection_id = other,
                1 => bad.initial_source_connection_id = None,
                2 => bad.original_destination_connection_id = other,
                3 => bad.original_destination_connection_id = None,
                4 => bad.retry_source_connection_id = other,
                _ => bad.retry_source_connection_id = if retried { None } else { other },
            }
            let error = pair.at_client().judge(&bad).unwrap_err();
            assert_eq!(error.code, Code::TRANSPORT_PARAMETER_ERROR, "{change}");
        }
        let mut bad = pair.at_server().peer();
        assert_eq!(pair.at_server().judge(&bad), Ok(()));
        bad.initial_source_connection_id = other;
        assert!(pair.at_server().judge(&bad).is_err());
    }
}

#[test]
fn req_b14_a_stateless_reset_ends_the_connection_without_a_word() {
    let mut pair = Pair::connected();
    let key = ResetKey::new([2; 32]);
    let in_use = pair.at_client().remote_cid();
    let mut reset = vec![0x55; 40];
    // The token of a connection ID that was never sent to is just noise.
    let spare = pair.at_server().local_cids().find(|id| *id != in_use).unwrap();
    reset[24..].copy_from_slice(&key.token(&spare));
    pair.deliver_down(reset.clone());
    assert!(!pair.at_client().is_over());
    reset[24..].copy_from_slice(&key.token(&in_use));
    pair.deliver_down(reset);
    assert!(pair.up().is_empty());
    assert_eq!(pair.at_client().error(), Some(&ConnectionError::Reset));
}

#[test]
fn stateless_resets_are_sent_at_a_bounded_rate() {
    let mut pair = Pair::connected();
    // A connection ID of the server's that no connection has.
    let datagram = [&[0x40, 0xe7][..], &[9; 48]].concat();
    let asked = |pair: &mut Pair| {
        let answers = (0..2000).filter(|_| {
            pair.deliver(datagram.clone());
            !pair.down().is_empty()
        });
        answers.count()
    };
    assert_eq!(asked(&mut pair), 1000);
    assert_eq!(pair.server.dropped(DropReason::TooManyResets), 1000);
    pair.now += Duration::from_millis(100);
    assert_eq!(asked(&mut pair), 100);
    assert_eq!(pair.server.resets_sent(), 1100);
    assert!(pair.server.take_unclaimed().is_some(), "whoever counts them sees all");
}

#[test]
fn req_a17_a_retry_counts_once_and_only_before_anything_else() {
    // An empty token, and a source that is the client's own choice.
    for change in 0..2 {
        let mut pair = Pair::new(Scene::default());
        pair.up();
        let drawn = pair.at_client().original_dcid();
        let scid = if change == 0 { ConnectionId::new(&[3; 8]).unwrap() } else { drawn };
        let mut retry = retry(&mut pair, scid, b"token");
        if change == 0 {
            // Without its token, and with a tag that fits.
            retry.truncate(retry.len() - 16 - 5);
            let tag = crate::retry::tag_of(Version::V1, &drawn, &retry);
            retry.extend_from_slice(&tag);
        }
        pair.deliver_down(retry);
        assert_eq!(pair.at_client().dropped(DropReason::UnexpectedNegotiation), 1, "{change}");
        assert_eq!(pair.at_client().remote_cid(), drawn);
    }
    // A second one.
    let mut pair = Pair::new(Scene::default());
    pair.up();
    let [first, second] = [[3; 8], [4; 8]].map(|octets| ConnectionId::new(&octets).unwrap());
    for scid in [first, second] {
        let retry = retry(&mut pair, scid, b"token");
        pair.deliver_down(retry);
    }
    assert_eq!(pair.at_client().dropped(DropReason::UnexpectedNegotiation), 1);
    assert_eq!(pair.at_client().remote_cid(), first);
    // One after an Initial.
    let mut pair = Pair::new(Scene::default());
    let flight = pair.first_flights().remove(0);
    pair.deliver_down(flight);
    let retry = retry(&mut pair, first, b"token");
    pair.deliver_down(retry);
    assert_eq!(pair.at_client().dropped(DropReason::UnexpectedNegotiation), 1);
    pair.settle();
    assert!(pair.at_client().is_confirmed());
}

#[test]
fn req_a18_c12_j07_after_a_retry_numbers_go_on_and_the_same_hello_leaves_under_new_keys() {
    let mut pair = Pair::new(Scene::default());
    let drawn = pair.at_client().original_dcid();
    let before = pair.up();
    let scid = ConnectionId::new(&[3; 8]).unwrap();
    let retry = retry(&mut pair, scid, b"token");
    pair.deliver_down(retry);
    assert_eq!(pair.at_client().path().in_flight, 0, "what was in flight is forgotten");
    let after = pair.up();
    let (first, second) = (initials(&before, drawn), initials(&after, scid));
    assert!(second.numbers.iter().min() > first.numbers.iter().max());
    assert_eq!(second.hello, first.hello);
    assert!(!first.hello.is_empty());
    assert!(after.iter().all(|datagram| datagram[6..14] == scid[..]));
    assert!(after.iter().all(|datagram| datagram[23] == 5 && datagram[24..29] == *b"token"));
}

/// What the Initials of a client carry.
struct Initials {
    numbers: Vec<u64>,
    hello: Vec<u8>,
}

/// Opens the Initials that a client sends to `dcid`.
fn initials(datagrams: &[Vec<u8>], dcid: ConnectionId) -> Initials {
    let keys = tls::initial_keys(Version::V1, &dcid, Side::Server);
    let mut pieces = vec![];
    let mut numbers = vec![];
    for datagram in datagrams {
        let header = Header::read(datagram, 8).unwrap();
        let mut packet = datagram[..header.len].to_vec();
        let found = header.unprotect(&*keys.remote.header, &mut packet, None).unwrap();
        let payload = packet::open(&*keys.remote.packet, &found, &mut packet);
        numbers.push(found.number);
        for frame in frame::Frames::new(payload.unwrap()).unwrap() {
            if let Frame::Crypto { offset, data } = frame.unwrap() {
                pieces.push((offset, data.to_vec()));
            }
        }
    }
    pieces.sort();
    Initials { numbers, hello: pieces.into_iter().flat_map(|(_, data)| data).collect() }
}

pub(super) fn retry(pair: &mut Pair, scid: ConnectionId, token: &[u8]) -> Vec<u8> {
    let client = pair.at_client();
    let packet = crate::retry::Retry {
        version: Version::V1,
        dcid: &client.local_cids().next().unwrap(),
        scid: &scid,
        original_dcid: &client.original_dcid(),
        token,
    };
    let mut octets = vec![0; crate::retry::MAX_LEN];
    let len = packet.write(0, &mut octets).unwrap();
    octets.truncate(len);
    octets
}
