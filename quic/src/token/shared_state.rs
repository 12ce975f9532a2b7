//! The draft's token with shared state.
//!
//! ```text
//! type (1 bit) ‖ key sequence (7) ‖ unique token number (96) ‖ AES-128-GCM(body) ‖ tag (128)
//! body            = expiry (64) [‖ original DCID length (8) ‖ original DCID ‖ client port (16)] ‖ opaque
//! associated data = client IP (128) ‖ type and key sequence (8) ‖ unique token number (96)
//!                   [‖ Retry SCID length (8) ‖ Retry SCID]
//! nonce           = the key's IV xor the unique token number
//! ```
//!
//! The bracketed fields are there in Retry tokens (type 0) and not in NEW_TOKEN tokens (type 1).
//! The client's address is part of the associated data: only who sees it can open the token.

use std::{
    net::{IpAddr, SocketAddr},
    time::SystemTime,
};

use aes_gcm::aead::AeadInOut;

use super::{
    InvalidToken, MAX_NEW_TOKEN_LIFETIME, MAX_RETRY_LIFETIME, NEW_TOKEN_BIT, NONCE_LEN,
    ORIGINAL_DCID_LEN, RetryClaim, SEAL_LEN, Token, TokenKey, TokenKeys, check_time, draft_sixteen,
    from_unix_seconds, unix_seconds,
};
use crate::connection_id::ConnectionId;

/// What a token says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// It came in a Retry packet.
    Retry(RetryClaim),
    /// It came in a NEW_TOKEN frame.
    NewToken {
        /// When it ends, in whole seconds.
        expires: SystemTime,
    },
}

/// The most octets that a body of ours has: no opaque part.
const MAX_BODY_LEN: usize = 8 + 1 + 20 + 2;
/// Opaque parts of others are read up to this length.
const MAX_SEALED_LEN: usize = 512;
const HEAD_LEN: usize = 1 + NONCE_LEN;
const MAX_ASSOCIATED_LEN: usize = 16 + HEAD_LEN + 1 + 20;

/// Seals a Retry token for the client whose next Initial carries `retry_scid` as its destination.
/// `unique` comes from a cryptographic source. `None` when the original connection ID is not one
/// that a client may draw.
#[must_use]
pub fn seal_retry(
    key: &TokenKey,
    unique: [u8; 12],
    claim: &RetryClaim,
    retry_scid: &ConnectionId,
) -> Option<Token> {
    if !ORIGINAL_DCID_LEN.contains(&claim.original_dcid.len()) {
        return None;
    }
    let mut body = Token::new();
    body.put(&unix_seconds(claim.expires).to_be_bytes());
    #[expect(clippy::cast_possible_truncation, reason = "at most 20, checked above")]
    body.put(&[claim.original_dcid.len() as u8]);
    body.put(&claim.original_dcid);
    body.put(&claim.client.port().to_be_bytes());
    seal(key, key.sequence, unique, claim.client.ip(), Some(retry_scid), &body)
}

/// Seals a NEW_TOKEN token for the client at `client`.
#[must_use]
pub fn seal_new_token(
    key: &TokenKey,
    unique: [u8; 12],
    client: IpAddr,
    expires: SystemTime,
) -> Option<Token> {
    let body = unix_seconds(expires).to_be_bytes();
    seal(key, key.sequence | NEW_TOKEN_BIT, unique, client, None, &body)
}

fn seal(
    key: &TokenKey,
    type_and_sequence: u8,
    unique: [u8; 12],
    client: IpAddr,
    retry_scid: Option<&ConnectionId>,
    body: &[u8],
) -> Option<Token> {
    let mut token = Token::new();
    token.put(&[type_and_sequence]);
    token.put(&unique);
    let (associated, len) = associated(client, &token, retry_scid);
    let mut sealed = [0; MAX_BODY_LEN];
    let sealed = &mut sealed[..body.len()];
    sealed.copy_from_slice(body);
    let nonce = nonce(key, &unique);
    let tag = key
        .secret
        .cipher
        .encrypt_inout_detached(&nonce.into(), &associated[..len], (&mut *sealed).into())
        .ok()?;
    token.put(sealed);
    token.put(&tag);
    Some(token)
}

/// What `token` says, if it was sealed with one of `keys` for the client at `from`, has not expired
/// `now` and, being a Retry token, came with `dcid` as destination.
///
/// # Errors
///
/// [`InvalidToken`] says what is wrong.
pub fn open(
    keys: &TokenKeys,
    token: &[u8],
    from: SocketAddr,
    dcid: &[u8],
    now: SystemTime,
) -> Result<Claim, InvalidToken> {
    let (head, sealed) = token.split_first_chunk::<HEAD_LEN>().ok_or(InvalidToken::Truncated)?;
    let (body, tag) = sealed.split_last_chunk::<SEAL_LEN>().ok_or(InvalidToken::Truncated)?;
    let is_retry = head[0] & NEW_TOKEN_BIT == 0;
    let key = keys.get(head[0] & !NEW_TOKEN_BIT).ok_or(InvalidToken::UnknownKey)?;
    let retry_scid = match is_retry {
        true => Some(ConnectionId::new(dcid).ok_or(InvalidToken::Seal)?),
        false => None,
    };
    let (associated, len) = associated(from.ip().to_canonical(), head, retry_scid.as_ref());
    let mut opened = [0; MAX_SEALED_LEN];
    let opened = opened.get_mut(..body.len()).ok_or(InvalidToken::Seal)?;
    opened.copy_from_slice(body);
    let mut unique = [0; NONCE_LEN];
    unique.copy_from_slice(&head[1..]);
    let nonce = nonce(key, &unique);
    key.secret
        .cipher
        .decrypt_inout_detached(
            &nonce.into(),
            &associated[..len],
            (&mut *opened).into(),
            &(*tag).into(),
        )
        .map_err(|_| InvalidToken::Seal)?;

    let (seconds, rest) = opened.split_first_chunk::<8>().ok_or(InvalidToken::Truncated)?;
    let expires = from_unix_seconds(u64::from_be_bytes(*seconds))?;
    let lifetime = if is_retry { MAX_RETRY_LIFETIME } else { MAX_NEW_TOKEN_LIFETIME };
    check_time(expires, lifetime, now)?;
    if !is_retry {
        return Ok(Claim::NewToken { expires });
    }
    let (&len, rest) = rest.split_first().ok_or(InvalidToken::Truncated)?;
    let len = usize::from(len);
    if !ORIGINAL_DCID_LEN.contains(&len) {
        return Err(InvalidToken::OriginalDcidLength);
    }
    let (original_dcid, rest) = rest.split_at_checked(len).ok_or(InvalidToken::Truncated)?;
    let original_dcid = ConnectionId::new(original_dcid).ok_or(InvalidToken::OriginalDcidLength)?;
    let (port, _opaque) = rest.split_first_chunk::<2>().ok_or(InvalidToken::Truncated)?;
    if u16::from_be_bytes(*port) != from.port() {
        return Err(InvalidToken::Port);
    }
    Ok(Claim::Retry(RetryClaim { original_dcid, client: from, expires }))
}

fn nonce(key: &TokenKey, unique: &[u8; NONCE_LEN]) -> [u8; NONCE_LEN] {
    std::array::from_fn(|at| key.secret.iv[at] ^ unique[at])
}

fn associated(
    client: IpAddr,
    head: &[u8],
    retry_scid: Option<&ConnectionId>,
) -> ([u8; MAX_ASSOCIATED_LEN], usize) {
    let mut out = [0; MAX_ASSOCIATED_LEN];
    out[..16].copy_from_slice(&draft_sixteen(client));
    out[16..16 + HEAD_LEN].copy_from_slice(head);
    let mut len = 16 + HEAD_LEN;
    if let Some(scid) = retry_scid {
        #[expect(clippy::cast_possible_truncation, reason = "at most 20 octets")]
        let scid_len = scid.len() as u8;
        out[len] = scid_len;
        out[len + 1..len + 1 + scid.len()].copy_from_slice(scid);
        len += 1 + scid.len();
    }
    (out, len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::{Duration, UNIX_EPOCH};

    use super::super::CLOCK_SKEW;

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
            .collect()
    }

    const UNIQUE: &str = "59ef316b70575e793e1a8782";

    fn key(sequence: u8) -> TokenKey {
        TokenKey::new(sequence, *b"0123456789012345", *b"123456789012").unwrap()
    }

    fn unique(text: &str) -> [u8; 12] {
        hex(text).try_into().unwrap()
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    struct Row {
        sequence: u8,
        unique: &'static str,
        client: &'static str,
        original_dcid: &'static str,
        retry_scid: &'static str,
        expires: u64,
        token: &'static str,
    }

    /// Computed from the draft's text; the vector in the draft's own appendix follows an older
    /// layout.
    const RETRY_ROWS: [Row; 2] = [
        Row {
            sequence: 0,
            unique: UNIQUE,
            client: "127.0.0.1:6666",
            original_dcid: "0c3817b544ca1c94313bba41757547eec937",
            retry_scid: "0301e770d24b3b13070dd5c2a9264307",
            expires: 1_623_703_373,
            token: "0059ef316b70575e793e1a87826f28a87ec6bb8f3ff79358bc2219e404d09a8031527a0cc58ce873f6fa5c5a5ef73cedb769510bb2c191b8d087",
        },
        Row {
            sequence: 127,
            unique: "000102030405060708090a0b",
            client: "[2001:db8::1]:443",
            original_dcid: "8394c8f03e515708",
            retry_scid: "e0aabbccddeeff11",
            expires: 1_879_048_192,
            token: "7f000102030405060708090a0beeddf942a96f6e5c4771af9544e055b890a9f004117dd2ce95aa7e1c53d5e9a6d75445",
        },
    ];

    #[test]
    fn vectors_of_retry_tokens_seal_and_open() {
        for row in RETRY_ROWS {
            let claim = RetryClaim {
                original_dcid: ConnectionId::new(&hex(row.original_dcid)).unwrap(),
                client: row.client.parse().unwrap(),
                expires: at(row.expires),
            };
            let scid = ConnectionId::new(&hex(row.retry_scid)).unwrap();
            let token = seal_retry(&key(row.sequence), unique(row.unique), &claim, &scid).unwrap();
            assert_eq!(*token, hex(row.token));
            let keys = TokenKeys::new([key(row.sequence)]);
            let open = |from: SocketAddr, dcid: &[u8], now| open(&keys, &token, from, dcid, now);
            assert_eq!(open(claim.client, &scid, at(row.expires + 2)), Ok(Claim::Retry(claim)));
            let late = open(claim.client, &scid, at(row.expires + 3));
            let early = open(claim.client, &scid, at(row.expires - 63));
            assert_eq!(early, Err(InvalidToken::Future));
            assert_eq!(open(claim.client, &scid, at(row.expires - 62)), Ok(Claim::Retry(claim)));
            assert_eq!(late, Err(InvalidToken::Expired));
            let other_port = SocketAddr::new(claim.client.ip(), 1);
            assert_eq!(open(other_port, &scid, at(row.expires)), Err(InvalidToken::Port));
            let other_ip = SocketAddr::new([192, 0, 2, 1].into(), claim.client.port());
            assert_eq!(open(other_ip, &scid, at(row.expires)), Err(InvalidToken::Seal));
            assert_eq!(open(claim.client, &scid[1..], at(row.expires)), Err(InvalidToken::Seal));
        }
    }

    #[test]
    fn the_vector_of_a_new_token_token_seals_and_opens_from_any_port() {
        let client: IpAddr = [127, 0, 0, 1].into();
        let expires = at(1_623_703_373);
        let token = seal_new_token(&key(5), unique(UNIQUE), client, expires).unwrap();
        let expected = "8559ef316b70575e793e1a87826f28a87ec6bb8f3f75c97bc7aed5edafc8d6e9abb38bad39";
        assert_eq!(*token, hex(expected));
        let keys = TokenKeys::new([key(5)]);
        for port in [1, 6666] {
            let open = |now| open(&keys, &token, SocketAddr::new(client, port), &[1; 8], now);
            let most = MAX_NEW_TOKEN_LIFETIME + CLOCK_SKEW;
            for now in [expires, expires + CLOCK_SKEW, expires - most] {
                assert_eq!(open(now), Ok(Claim::NewToken { expires }));
            }
            let moment = Duration::from_millis(1);
            assert_eq!(open(expires + CLOCK_SKEW + moment), Err(InvalidToken::Expired));
            assert_eq!(open(expires - most - moment), Err(InvalidToken::Future));
        }
        let unknown = open(&TokenKeys::default(), &token, SocketAddr::new(client, 1), &[], at(0));
        assert_eq!(unknown, Err(InvalidToken::UnknownKey));
    }

    #[test]
    fn the_longest_connection_ids_have_room() {
        let scid = ConnectionId::new(&[9; 20]).unwrap();
        let client = "[2001:db8::1]:443".parse().unwrap();
        let original_dcid = ConnectionId::new(&[7; 20]).unwrap();
        let claim = RetryClaim { original_dcid, client, expires: at(1_000) };
        let token = seal_retry(&key(5), unique(UNIQUE), &claim, &scid).unwrap();
        let opened = open(&TokenKeys::new([key(5)]), &token, client, &scid, at(1_000));
        assert_eq!(opened, Ok(Claim::Retry(claim)));
    }

    #[test]
    fn no_bit_can_be_flipped() {
        let row = &RETRY_ROWS[0];
        let (token, scid) = (hex(row.token), hex(row.retry_scid));
        let keys = TokenKeys::new((0..128).map(key));
        let from = row.client.parse().unwrap();
        assert!(open(&keys, &token, from, &scid, at(row.expires)).is_ok());
        for bit in 0..token.len() * 8 {
            let mut flipped = token.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(open(&keys, &flipped, from, &scid, at(row.expires)).is_err(), "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn any_octets_open_without_panic(
            token in proptest::collection::vec(any::<u8>(), 0..700),
            dcid in proptest::collection::vec(any::<u8>(), 0..30),
        ) {
            let keys = TokenKeys::new((0..128).map(key));
            let _ = open(&keys, &token, "192.0.2.1:1".parse().unwrap(), &dcid, at(0));
        }
    }
}
