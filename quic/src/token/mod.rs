//! Address tokens that a load balancer mints and the servers behind it honour, in the two formats
//! of draft-ietf-quic-retry-offload-00 and its working copy of 2026-05.
//!
//! After a Retry only the token can tell a server that never saw the first Initial which
//! connection ID the client had drawn, and the server has to repeat it in its transport parameters
//! (<https://www.rfc-editor.org/rfc/rfc9000.html#section-7.3>).
//!
//! - [`shared_state`]: the draft's encrypted token. It is bound to the client's address, so whoever
//!   checks it has to see that address.
//! - [`nat`]: for balancers that rewrite addresses, as a NAT does. The original connection ID is in
//!   the clear, as in the draft's format without shared state; what follows it is sealed with a key
//!   shared by balancer and servers. The balancer checks the address; a server trusts the seal, not
//!   a bit, and learns the client's true address from it.
//!
//! The first bit of every token tells Retry tokens (0) from NEW_TOKEN tokens (1).

pub mod nat;
pub mod shared_state;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aes::{Aes128Enc, cipher::BlockCipherEncrypt};
use aes_gcm::{Aes128Gcm, aead::AeadInOut};
use cmac::Cmac;
use zeroize::{Zeroize, Zeroizing};

use crate::{connection_id::ConnectionId, wiped::Wiped};

/// By how much the clocks of balancers and servers may differ.
pub const CLOCK_SKEW: Duration = Duration::from_secs(2);

/// How long the token of a Retry may be good for. One that says more comes from a clock that is ahead: it is not honoured, lest a
/// wrong clock make tokens that are good for hours.
pub const MAX_RETRY_LIFETIME: Duration = Duration::from_secs(60);

/// As [`MAX_RETRY_LIFETIME`], for the tokens of NEW_TOKEN frames.
pub const MAX_NEW_TOKEN_LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);

/// How many tokens with [`shared_state`] may be made with one key (section 4.3 of the draft). Those of
/// [`nat`] have a key each and no such limit.
pub const MAX_TOKENS_PER_KEY: u64 = 1 << 23;

/// The lengths of a client's first destination connection ID
/// (<https://www.rfc-editor.org/rfc/rfc9000.html#section-7.2>).
const ORIGINAL_DCID_LEN: std::ops::RangeInclusive<usize> = 8..=20;

const NONCE_LEN: usize = 12;
const SEAL_LEN: usize = 16;
/// The bit that sets NEW_TOKEN tokens apart.
const NEW_TOKEN_BIT: u8 = 0x80;

/// Keys by their sequence number. Any of them opens tokens; the one named at the time seals.
#[derive(Clone, Default)]
pub struct TokenKeys {
    keys: Vec<TokenKey>,
}

/// One key and its sequence number, 0 to 127. Its octets are never printed, and end with it.
#[derive(Clone)]
pub struct TokenKey {
    sequence: u8,
    /// In one place, wherever the key is moved: what a vector leaves behind when it grows is not wiped.
    secret: Arc<Secret>,
}

struct Secret {
    cipher: Wiped<Aes128Gcm>,
    iv: Zeroizing<[u8; NONCE_LEN]>,
    /// What the keys of single tokens are derived with: see [`nat`].
    derivation: Wiped<Cmac<Aes128Enc>>,
}

impl TokenKey {
    /// `None` when `sequence` needs more than seven bits.
    #[must_use]
    pub fn new(sequence: u8, mut key: [u8; 16], iv: [u8; 12]) -> Option<Self> {
        let iv = Zeroizing::new(iv);
        let mut derivation = nat::DERIVATION_LABEL;
        let with: Wiped<Aes128Enc> = Wiped::new((&key).into());
        with.encrypt_block((&mut derivation).into());
        let cipher = Wiped::new((&key).into());
        let of_tokens = Wiped::new((&derivation).into());
        key.zeroize();
        derivation.zeroize();
        let secret = Arc::new(Secret { cipher, iv, derivation: of_tokens });
        (sequence < 0x80).then_some(Self { sequence, secret })
    }

    /// A value that differs between keys and does not help to compute them, so that two holders can
    /// find out whether they have the same.
    #[must_use]
    pub fn check_value(&self) -> [u8; 16] {
        // No token is sealed with nothing inside and this beside it.
        const ASSOCIATED: &[u8] = b"quic-lb token key check value";
        let Secret { cipher, iv, .. } = &*self.secret;
        let tag = cipher.encrypt_inout_detached(
            &[0xff; NONCE_LEN].into(),
            &[ASSOCIATED, &[self.sequence][..], &iv[..]].concat(),
            (&mut [][..]).into(),
        );
        tag.map(Into::into).expect("a few octets are shorter than AES-GCM can cover")
    }

    /// The sequence number.
    #[must_use]
    pub const fn sequence(&self) -> u8 {
        self.sequence
    }
}

impl std::fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TokenKey({}, masked)", self.sequence)
    }
}

impl std::fmt::Debug for TokenKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(&self.keys).finish()
    }
}

impl TokenKeys {
    /// Of two keys with the same sequence number the later one stays.
    #[must_use]
    pub fn new(keys: impl IntoIterator<Item = TokenKey>) -> Self {
        let mut all = Self::default();
        for key in keys {
            all.keys.retain(|known| known.sequence != key.sequence);
            all.keys.push(key);
        }
        all
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &TokenKey> {
        self.keys.iter()
    }

    /// The key with this sequence number.
    #[must_use]
    pub fn get(&self, sequence: u8) -> Option<&TokenKey> {
        self.keys.iter().find(|key| key.sequence == sequence)
    }
}

/// What a Retry token says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RetryClaim {
    /// The connection ID that the client had drawn for its first Initial: 8 to 20 octets.
    pub original_dcid: ConnectionId,
    /// The client's true address and port.
    pub client: SocketAddr,
    /// When it ends, in whole seconds.
    pub expires: SystemTime,
}

/// Why a token is not honoured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum InvalidToken {
    /// It is of the other type: a NEW_TOKEN token where a Retry token was wanted, or the reverse.
    #[error("the token is of the other type")]
    Type,
    /// It is shorter than its format.
    #[error("the token ends early")]
    Truncated,
    /// No key has its sequence number.
    #[error("there is no key with the token's sequence number")]
    UnknownKey,
    /// It was not sealed with the key, or not for this address and connection ID.
    #[error("the seal does not match")]
    Seal,
    /// The original connection ID is not one that a client draws.
    #[error("the original connection ID does not have 8 to 20 bytes")]
    OriginalDcidLength,
    /// Its time is over.
    #[error("the token has expired")]
    Expired,
    /// It would be good for longer than tokens are: the clock of its maker is ahead.
    #[error("the token is of the future")]
    Future,
    /// It was made for another address.
    #[error("the token was made for another address")]
    Address,
    /// It was made for another port of the address that it came from.
    #[error("the token was made for another port of this address")]
    Port,
}

impl InvalidToken {
    /// Every reason, in their order.
    pub const ALL: [Self; 9] = [
        Self::Type,
        Self::Truncated,
        Self::UnknownKey,
        Self::Seal,
        Self::OriginalDcidLength,
        Self::Expired,
        Self::Future,
        Self::Address,
        Self::Port,
    ];

    /// A word for metrics and logs.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Type => "type",
            Self::Truncated => "truncated",
            Self::UnknownKey => "unknown_key",
            Self::Seal => "seal",
            Self::OriginalDcidLength => "original_dcid_length",
            Self::Expired => "expired",
            Self::Future => "future",
            Self::Address => "address",
            Self::Port => "port",
        }
    }
}

/// Whether `token` says that it came in a NEW_TOKEN frame; `None` for an empty token.
#[must_use]
pub fn is_new_token(token: &[u8]) -> Option<bool> {
    token.first().map(|first| first & NEW_TOKEN_BIT != 0)
}

/// The octets of a token, kept in place.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Token {
    octets: [u8; Token::MAX_LEN],
    len: usize,
}

impl Token {
    /// Octets of the longest token that this module makes.
    pub const MAX_LEN: usize = 128;

    const fn new() -> Self {
        Self { octets: [0; Self::MAX_LEN], len: 0 }
    }

    fn put(&mut self, octets: &[u8]) {
        self.octets[self.len..self.len + octets.len()].copy_from_slice(octets);
        self.len += octets.len();
    }
}

impl std::ops::Deref for Token {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.octets[..self.len]
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Token({} octets)", self.len)
    }
}

/// Whole seconds since 1970; times before count as 1970.
fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn from_unix_seconds(seconds: u64) -> Result<SystemTime, InvalidToken> {
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).ok_or(InvalidToken::Expired)
}

/// Whether a token that is good for `lifetime` at most is good now.
fn check_time(
    expires: SystemTime,
    lifetime: Duration,
    now: SystemTime,
) -> Result<(), InvalidToken> {
    match expires.duration_since(now) {
        Ok(left) if left > lifetime + CLOCK_SKEW => Err(InvalidToken::Future),
        Err(over) if over.duration() > CLOCK_SKEW => Err(InvalidToken::Expired),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// An address in sixteen octets, IPv4 in the form that IPv6 has for it.
fn to_sixteen(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

fn from_sixteen(octets: [u8; 16]) -> IpAddr {
    Ipv6Addr::from(octets).to_canonical()
}

/// An address in sixteen octets as the draft wants it: IPv4 in the first four, the rest zero.
fn draft_sixteen(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => {
            let mut octets = [0; 16];
            octets[..4].copy_from_slice(&Ipv4Addr::octets(&address));
            octets
        }
        IpAddr::V6(address) => address.octets(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_reason_has_a_word_of_its_own_that_metrics_can_have() {
        let words: BTreeSet<_> = InvalidToken::ALL.map(InvalidToken::label).into();
        assert_eq!(words.len(), InvalidToken::ALL.len());
        let is_fit = |word: &str| word.bytes().all(|octet| matches!(octet, b'a'..=b'z' | b'_'));
        assert!(words.iter().all(|word| is_fit(word) && word.len() > 3), "{words:?}");
    }
}
