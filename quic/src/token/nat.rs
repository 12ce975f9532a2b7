//! The token of balancers that rewrite addresses.
//!
//! ```text
//! 0 (1 bit) ‖ original DCID length (7) ‖ original DCID ‖ 0 (1) ‖ key sequence (7) ‖ nonce (96)
//!   ‖ AES-128-GCM(expiry (64) ‖ client IP (128) ‖ client port (16)) ‖ tag (128)
//! ```
//!
//! with everything up to the nonce, then the length (8) of the Retry's source connection ID and that
//! connection ID as associated data. The expiry is in seconds since 1970; IPv4 addresses are
//! IPv4-mapped. To a server that only knows the draft it is a token without shared state.
//!
//! # Its key
//!
//! Each token is sealed with a key of its own, so that none of the limits on what one key of AES-GCM may
//! seal is ever near: a balancer makes a token for each datagram of a flood.
//!
//! ```text
//! derivation key = AES-128(configured key, "quic-lb NAT" ‖ 0 (40))     one block
//! token's key    = AES-CMAC(derivation key, associated data)           RFC 4493
//! ```
//!
//! and the nonce of AES-GCM is that of the token. The configured key's IV plays no part.
//!
//! *Separation.* The configured key also seals tokens of [`super::shared_state`]. AES-GCM with nonces of
//! 96 bits computes AES of the zero block and of blocks whose last 32 bits count from 1. The label is
//! neither: it is not zero, and ends in 32 zero bits. So the derivation key is as good as random to
//! whoever sees all those tokens, as long as AES-128 is a pseudorandom permutation.
//!
//! *How many.* The associated data has 96 random bits of nonce and 61 of our Retry's connection ID in it:
//! that of two tokens is the same with a probability of less than q²/2^158 among q tokens. AES-CMAC of
//! different messages of at most four blocks can be told from independent random keys with an advantage of
//! less than 81 q²/2^128 (Iwata and Kurosawa, "OMAC: One-Key CBC MAC", theorem 5.1), the step
//! from permutation to function included. Then each key seals one token of two blocks, at which AES-GCM
//! neither repeats a nonce nor tires; a forger who tries v times succeeds with a probability of less than
//! 8 v/2^128. After 2^45 tokens, a year at a million a second, all that is below 2^-31. Guessing at the keys
//! of many tokens at once gains nothing, since each has another nonce, and the key of one opens no other.

use aes::Aes128Enc;
use aes_gcm::{
    AesGcm, KeyInit,
    aead::{AeadInOut, consts::U12},
};
use cmac::{Cmac, Mac};

use super::{
    InvalidToken, MAX_RETRY_LIFETIME, NEW_TOKEN_BIT, NONCE_LEN, ORIGINAL_DCID_LEN, RetryClaim,
    SEAL_LEN, Token, TokenKey, TokenKeys, check_time, from_sixteen, from_unix_seconds, to_sixteen,
    unix_seconds,
};
use crate::connection_id::ConnectionId;
use std::net::SocketAddr;
use std::time::SystemTime;

/// What the derivation key is the configured key's encryption of.
pub(super) const DERIVATION_LABEL: [u8; 16] = *b"quic-lb NAT\0\0\0\0\0";

const BODY_LEN: usize = 8 + 16 + 2;
const MAX_ASSOCIATED_LEN: usize = 1 + 20 + 1 + NONCE_LEN + 1 + 20;

/// Seals `claim` for the client whose next Initial carries `retry_scid` as its destination. `nonce`
/// comes from a cryptographic source. `None` when the original connection ID is not one that a
/// client may draw.
#[must_use]
pub fn seal(
    key: &TokenKey,
    nonce: [u8; 12],
    claim: &RetryClaim,
    retry_scid: &ConnectionId,
) -> Option<Token> {
    let original_dcid = claim.original_dcid;
    if !ORIGINAL_DCID_LEN.contains(&original_dcid.len()) {
        return None;
    }
    let mut token = Token::new();
    #[expect(clippy::cast_possible_truncation, reason = "at most 20, checked above")]
    token.put(&[original_dcid.len() as u8]);
    token.put(&original_dcid);
    token.put(&[key.sequence]);
    token.put(&nonce);
    let (associated, associated_len) = associated(&token, retry_scid);

    let mut body = [0; BODY_LEN];
    body[..8].copy_from_slice(&unix_seconds(claim.expires).to_be_bytes());
    body[8..24].copy_from_slice(&to_sixteen(claim.client.ip()));
    body[24..].copy_from_slice(&claim.client.port().to_be_bytes());
    let associated = &associated[..associated_len];
    let tag = cipher(key, associated)
        .encrypt_inout_detached(&nonce.into(), associated, body.as_mut_slice().into())
        .ok()?;
    token.put(&body);
    token.put(&tag);
    Some(token)
}

/// What `token` says, if it was sealed with one of `keys` for `retry_scid`, the destination of the
/// Initial that carries it, and has not expired `now`.
///
/// Whether it came from the address that it was made for is for those to check who see the
/// client's true address: [`check_client`].
///
/// # Errors
///
/// [`InvalidToken`] says what is wrong.
pub fn open(
    keys: &TokenKeys,
    token: &[u8],
    retry_scid: &[u8],
    now: SystemTime,
) -> Result<RetryClaim, InvalidToken> {
    let original_dcid = original_dcid(token)?;
    let rest = &token[1 + original_dcid.len()..];
    let (&sequence, rest) = rest.split_first().ok_or(InvalidToken::Truncated)?;
    let (nonce, sealed) = rest.split_first_chunk::<NONCE_LEN>().ok_or(InvalidToken::Truncated)?;
    let (body, tag) = sealed.split_first_chunk::<BODY_LEN>().ok_or(InvalidToken::Truncated)?;
    let tag: &[u8; SEAL_LEN] = tag.try_into().map_err(|_| InvalidToken::Truncated)?;
    let key = keys.get(sequence).ok_or(InvalidToken::UnknownKey)?;
    let retry_scid = ConnectionId::new(retry_scid).ok_or(InvalidToken::Seal)?;

    let (associated, len) = associated(&token[..token.len() - sealed.len()], &retry_scid);
    let (associated, mut body) = (&associated[..len], *body);
    cipher(key, associated)
        .decrypt_inout_detached(
            &(*nonce).into(),
            associated,
            body.as_mut_slice().into(),
            &(*tag).into(),
        )
        .map_err(|_| InvalidToken::Seal)?;
    let mut seconds = [0; 8];
    seconds.copy_from_slice(&body[..8]);
    let mut address = [0; 16];
    address.copy_from_slice(&body[8..24]);
    let expires = from_unix_seconds(u64::from_be_bytes(seconds))?;
    check_time(expires, MAX_RETRY_LIFETIME, now)?;
    let client = SocketAddr::new(from_sixteen(address), u16::from_be_bytes([body[24], body[25]]));
    Ok(RetryClaim { original_dcid, client, expires })
}

/// Whether the claim was made for the client at `from`.
///
/// # Errors
///
/// [`InvalidToken::Address`] when it was not, [`InvalidToken::Port`] when only the port is another.
pub fn check_client(claim: &RetryClaim, from: SocketAddr) -> Result<(), InvalidToken> {
    if claim.client.ip() != from.ip().to_canonical() {
        return Err(InvalidToken::Address);
    }
    if claim.client.port() == from.port() { Ok(()) } else { Err(InvalidToken::Port) }
}

/// The original connection ID, which stands in the clear. It proves nothing by itself; a server
/// without the key may take it only from a balancer that checks every token.
///
/// # Errors
///
/// [`InvalidToken`] when this is not a Retry token of this format.
pub fn original_dcid(token: &[u8]) -> Result<ConnectionId, InvalidToken> {
    let (&len, rest) = token.split_first().ok_or(InvalidToken::Truncated)?;
    if len & NEW_TOKEN_BIT != 0 {
        return Err(InvalidToken::Type);
    }
    let len = usize::from(len);
    if !ORIGINAL_DCID_LEN.contains(&len) {
        return Err(InvalidToken::OriginalDcidLength);
    }
    let octets = rest.get(..len).ok_or(InvalidToken::Truncated)?;
    ConnectionId::new(octets).ok_or(InvalidToken::OriginalDcidLength)
}

/// AES-GCM with the key of the one token that this is the associated data of.
fn cipher(key: &TokenKey, associated: &[u8]) -> AesGcm<Aes128Enc, U12> {
    // The copy, and what follows from it, ends with this token, and is not worth wiping.
    let derivation: &Cmac<Aes128Enc> = &key.secret.derivation;
    let derived = derivation.clone().chain_update(associated).finalize();
    AesGcm::new(&derived.into_bytes())
}

/// Everything in front of the sealed part, then the Retry's source connection ID and its length.
fn associated(front: &[u8], retry_scid: &ConnectionId) -> ([u8; MAX_ASSOCIATED_LEN], usize) {
    let mut out = [0; MAX_ASSOCIATED_LEN];
    let (front_out, rest) = out.split_at_mut(front.len());
    front_out.copy_from_slice(front);
    #[expect(clippy::cast_possible_truncation, reason = "a connection ID has at most 20 octets")]
    let len = retry_scid.len() as u8;
    rest[0] = len;
    rest[1..=retry_scid.len()].copy_from_slice(retry_scid);
    (out, front.len() + 1 + retry_scid.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::{Duration, UNIX_EPOCH};

    fn keys() -> TokenKeys {
        TokenKeys::new([5, 6].map(|n| TokenKey::new(n, [n; 16], [n; 12]).unwrap()))
    }

    fn claim(client: SocketAddr, original_dcid: &[u8]) -> RetryClaim {
        RetryClaim {
            original_dcid: ConnectionId::new(original_dcid).unwrap(),
            client,
            expires: UNIX_EPOCH + Duration::from_secs(1_000),
        }
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    const SCID: [u8; 9] = [9; 9];

    fn hex(text: &str) -> Vec<u8> {
        let octet = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
        (0..text.len()).step_by(2).map(octet).collect()
    }

    struct Row {
        sequence: u8,
        nonce: &'static str,
        client: &'static str,
        original_dcid: &'static str,
        retry_scid: &'static str,
        expires: u64,
        token: &'static str,
    }

    /// With the key "0123456789012345", as another implementation (Python's `cryptography`) made them
    /// of the description above.
    const ROWS: [Row; 2] = [
        Row {
            sequence: 0,
            nonce: "59ef316b70575e793e1a8782",
            client: "127.0.0.1:6666",
            original_dcid: "0c3817b544ca1c94313bba41757547eec937",
            retry_scid: "0301e770d24b3b13070dd5c2a9264307",
            expires: 1_623_703_373,
            token: "120c3817b544ca1c94313bba41757547eec9370059ef316b70575e793e1a87828ac5971f24f6cbe882adbd9130669b55fa1c0f8e9ec97903a85bf10e3b0040600381ace09f8b018a2380",
        },
        Row {
            sequence: 127,
            nonce: "000102030405060708090a0b",
            client: "[2001:db8::1]:443",
            original_dcid: "8394c8f03e515708",
            retry_scid: "e0aabbccddeeff11",
            expires: 1_879_048_192,
            token: "088394c8f03e5157087f000102030405060708090a0bde9a1d65ddcf6ee11abb142770c263c93e3c28c4fdaad99650a568ae6be5e281e5dec42ebd78778c076a",
        },
    ];

    #[test]
    fn vectors_of_nat_tokens_seal_and_open() {
        for row in ROWS {
            let key = TokenKey::new(row.sequence, *b"0123456789012345", [1; 12]).unwrap();
            let mut claim = claim(row.client.parse().unwrap(), &hex(row.original_dcid));
            claim.expires = at(row.expires);
            let scid = ConnectionId::new(&hex(row.retry_scid)).unwrap();
            let nonce = hex(row.nonce).try_into().unwrap();
            let token = seal(&key, nonce, &claim, &scid).unwrap();
            assert_eq!(*token, hex(row.token));
            let opened = open(&TokenKeys::new([key]), &token, &scid, at(row.expires));
            assert_eq!(opened, Ok(claim));
        }
    }

    /// Key and nonce of one token serve for no other, whatever a client makes of its connection ID.
    #[test]
    fn a_nonce_that_comes_again_has_another_key() {
        let key = TokenKey::new(1, [1; 16], [0; 12]).unwrap();
        let client = "192.0.2.1:443".parse().unwrap();
        let body = |original_dcid: &[u8], scid: &[u8]| {
            let scid = ConnectionId::new(scid).unwrap();
            let token = seal(&key, [7; 12], &claim(client, original_dcid), &scid).unwrap();
            token[token.len() - SEAL_LEN - BODY_LEN..][..BODY_LEN].to_vec()
        };
        let first = body(&[5; 8], &SCID);
        assert_ne!(first, body(&[6; 8], &SCID), "the same key stream");
        assert_ne!(first, body(&[5; 8], &[8; 9]), "the same key stream");
        assert_eq!(first, body(&[5; 8], &SCID));
    }

    #[test]
    fn a_token_says_what_was_sealed_until_it_expires() {
        let scid = ConnectionId::new(&SCID).unwrap();
        for client in ["192.0.2.1:443", "[2001:db8::1]:4433"] {
            for len in [8, 20] {
                let claim = claim(client.parse().unwrap(), &[7; 20][..len]);
                let token = seal(keys().get(6).unwrap(), [1; 12], &claim, &scid).unwrap();
                assert_eq!(open(&keys(), &token, &SCID, at(1_002)), Ok(claim));
                assert_eq!(open(&keys(), &token, &SCID, at(1_003)), Err(InvalidToken::Expired));
                assert_eq!(open(&keys(), &token, &SCID, at(1_000 - 62)), Ok(claim));
                assert_eq!(open(&keys(), &token, &SCID, at(1_000 - 63)), Err(InvalidToken::Future));
                assert_eq!(check_client(&claim, claim.client), Ok(()));
                let other = SocketAddr::new(claim.client.ip(), 1);
                assert_eq!(check_client(&claim, other), Err(InvalidToken::Port));
                let elsewhere = SocketAddr::new([192, 0, 2, 2].into(), claim.client.port());
                assert_eq!(check_client(&claim, elsewhere), Err(InvalidToken::Address));
            }
        }
    }

    #[test]
    fn the_longest_connection_ids_have_room() {
        let scid = ConnectionId::new(&[9; 20]).unwrap();
        let claim = claim("[2001:db8::1]:443".parse().unwrap(), &[7; 20]);
        let token = seal(keys().get(6).unwrap(), [1; 12], &claim, &scid).unwrap();
        assert_eq!(open(&keys(), &token, &scid, at(1_000)), Ok(claim));
    }

    #[test]
    fn lengths_that_no_client_draws_are_neither_sealed_nor_opened() {
        let scid = ConnectionId::new(&SCID).unwrap();
        let claim = claim("192.0.2.1:443".parse().unwrap(), &[7; 7]);
        assert!(seal(keys().get(6).unwrap(), [1; 12], &claim, &scid).is_none());
        for len in [0, 7, 21, 0x7f] {
            let mut token = vec![len];
            token.resize(200, 1);
            let opened = open(&keys(), &token, &SCID, at(1_000));
            assert_eq!(opened, Err(InvalidToken::OriginalDcidLength));
        }
    }

    #[test]
    fn no_bit_can_be_flipped_and_no_other_scid_taken() {
        let scid = ConnectionId::new(&SCID).unwrap();
        let claim = claim("192.0.2.1:443".parse().unwrap(), &[7; 8]);
        let token = seal(keys().get(6).unwrap(), [1; 12], &claim, &scid).unwrap();
        for bit in 0..token.len() * 8 {
            let mut flipped = token.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(open(&keys(), &flipped, &SCID, at(1_000)).is_err(), "bit {bit}");
        }
        for end in 0..token.len() {
            assert!(open(&keys(), &token[..end], &SCID, at(1_000)).is_err());
        }
        assert_eq!(open(&keys(), &token, &SCID[..8], at(1_000)), Err(InvalidToken::Seal));
    }

    proptest! {
        #[test]
        fn any_octets_open_without_panic(token in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = open(&keys(), &token, &SCID, at(1_000));
        }
    }
}
