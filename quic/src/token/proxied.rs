//! The token of balancers that rewrite addresses.
//!
//! ```text
//! 0 (1 bit) ‖ original DCID length (7) ‖ original DCID ‖ 0 (1) ‖ key sequence (7) ‖ nonce (96)
//!   ‖ AES-128-GCM(expiry (64) ‖ client IP (128) ‖ client port (16)) ‖ tag (128)
//! ```
//!
//! with everything up to the nonce and the Retry's source connection ID as associated data. To a
//! server that only knows the draft it is a token without shared state.

use aes_gcm::aead::AeadInOut;

use super::{
    InvalidToken, NEW_TOKEN_BIT, NONCE_LEN, ORIGINAL_DCID_LEN, RetryClaim, SEAL_LEN, Token,
    TokenKey, TokenKeys, check_time, from_sixteen, from_unix_seconds, to_sixteen, unix_seconds,
};
use crate::ConnectionId;
use std::net::SocketAddr;
use std::time::SystemTime;

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
    let tag = key
        .cipher
        .encrypt_inout_detached(
            &nonce.into(),
            &associated[..associated_len],
            body.as_mut_slice().into(),
        )
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
    let mut body = *body;
    key.cipher
        .decrypt_inout_detached(
            &(*nonce).into(),
            &associated[..len],
            body.as_mut_slice().into(),
            &(*tag).into(),
        )
        .map_err(|_| InvalidToken::Seal)?;
    let mut seconds = [0; 8];
    seconds.copy_from_slice(&body[..8]);
    let mut address = [0; 16];
    address.copy_from_slice(&body[8..24]);
    let expires = from_unix_seconds(u64::from_be_bytes(seconds))?;
    check_time(expires, now)?;
    let client = SocketAddr::new(from_sixteen(address), u16::from_be_bytes([body[24], body[25]]));
    Ok(RetryClaim { original_dcid, client, expires })
}

/// Whether the claim was made for the client at `from`.
///
/// # Errors
///
/// [`InvalidToken::Address`] when it was not.
pub fn check_client(claim: &RetryClaim, from: SocketAddr) -> Result<(), InvalidToken> {
    let same = claim.client.ip() == from.ip().to_canonical() && claim.client.port() == from.port();
    if same { Ok(()) } else { Err(InvalidToken::Address) }
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

    #[test]
    fn a_token_says_what_was_sealed_until_it_expires() {
        let scid = ConnectionId::new(&SCID).unwrap();
        for client in ["192.0.2.1:443", "[2001:db8::1]:4433"] {
            for len in [8, 20] {
                let claim = claim(client.parse().unwrap(), &[7; 20][..len]);
                let token = seal(keys().get(6).unwrap(), [1; 12], &claim, &scid).unwrap();
                assert_eq!(open(&keys(), &token, &SCID, at(1_002)), Ok(claim));
                assert_eq!(open(&keys(), &token, &SCID, at(1_003)), Err(InvalidToken::Expired));
                assert_eq!(check_client(&claim, claim.client), Ok(()));
                let other = SocketAddr::new(claim.client.ip(), 1);
                assert_eq!(check_client(&claim, other), Err(InvalidToken::Address));
            }
        }
    }

    #[test]
    fn lengths_that_no_client_draws_are_neither_sealed_nor_opened() {
        let scid = ConnectionId::new(&SCID).unwrap();
        let claim = claim("192.0.2.1:443".parse().unwrap(), &[7; 7]);
        assert!(seal(keys().get(6).unwrap(), [1; 12], &claim, &scid).is_none());
        for len in [0, 7, 21, 0x7f] {
            let mut token = vec![len];
            token.resize(200, 1);
            let opened = open(&keys(), &token, &SCID, at(0));
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
            assert!(open(&keys(), &flipped, &SCID, at(0)).is_err(), "bit {bit}");
        }
        for end in 0..token.len() {
            assert!(open(&keys(), &token[..end], &SCID, at(0)).is_err());
        }
        assert_eq!(open(&keys(), &token, &SCID[..8], at(0)), Err(InvalidToken::Seal));
    }

    proptest! {
        #[test]
        fn any_octets_open_without_panic(token in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = open(&keys(), &token, &SCID, at(0));
        }
    }
}
