//! Retry packets and the tokens in them: made for clients that have to prove their address,
//! checked when they come back.
//!
//! Making needs randomness and the time, both handed in, and the caller's memory; checking needs
//! the time. Nothing is remembered but how many tokens were made with each key.
//!
//! # The connection ID of a Retry
//!
//! It, like that of a refusal, is drawn at random and marked as one that decodes to no server (config bits `0b111`). The
//! Initial that follows is then routed like any first Initial, by hashing that connection ID, which
//! needs no memory and comes out the same on every balancer with this configuration, and goes by the
//! pool as it is by then. A routable connection ID would have to share the server's nonces, lest it
//! be one that the server has in use, and would give anybody who asks, from any address, a key to
//! one server.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use quic::{
    ConnectionId,
    header::Version,
    initial::{Reason, Refusal},
    invariants::LongHeader,
    random::Random,
    retry::{self, Retry},
    token::{
        InvalidToken, MAX_TOKENS_PER_KEY, RetryClaim, Token, TokenKey, TokenKeys, is_new_token,
        nat, shared_state,
    },
};
use quic_lb_config::TokenFormat;

use crate::verdict::DropReason;

/// The most octets that a Retry of ours has, whatever the client's connection IDs.
pub const MAX_RETRY_LEN: usize = 1 + 4 + 1 + 20 + 1 + OWN_CID_LEN + Token::MAX_LEN + retry::TAG_LEN;

/// Enough to hash by, and to be unique among the connections of one client path.
const OWN_CID_LEN: usize = 8;

/// Octets of randomness behind one Retry: connection ID, unused bits, nonce.
const RANDOM_LEN: usize = OWN_CID_LEN + 1 + 12;

/// How many tokens of a format may be made with one key; `None` where each has a key of its own.
pub(crate) const fn limit(format: TokenFormat) -> Option<u64> {
    match format {
        TokenFormat::Nat => None,
        TokenFormat::SharedState => Some(MAX_TOKENS_PER_KEY),
    }
}

/// Keys and formats.
#[derive(Debug)]
pub struct Tokens {
    format: TokenFormat,
    lifetime: Duration,
    opening: TokenKeys,
    /// In the order in which they are used up, where they can be.
    minting: Vec<(TokenKey, Arc<AtomicU64>)>,
}

impl Tokens {
    pub(super) fn new(retry: &quic_lb_config::Retry, uses: &mut KeyUses) -> Self {
        uses.keep(retry);
        let minting = retry.keys.iter().map(|key| (key.clone(), uses.of(key, retry.format)));
        Self {
            format: retry.format,
            lifetime: retry.lifetime,
            opening: TokenKeys::new(retry.keys.iter().cloned()),
            minting: minting.collect(),
        }
    }

    /// The sequence numbers of the keys, in the order in which they are used up.
    pub(crate) fn sequences(&self) -> impl Iterator<Item = u8> {
        self.minting.iter().map(|(key, _)| key.sequence())
    }

    /// What tells the keys from others, in the same order.
    pub(crate) fn check_values(&self) -> impl Iterator<Item = (u8, [u8; 16])> {
        self.minting.iter().map(|(key, _)| (key.sequence(), key.check_value()))
    }

    /// The same with one of the keys alone to make tokens with; `None` where there is none.
    pub(crate) fn with_key(&self, sequence: u8) -> Option<Self> {
        let minting = self.minting.iter().find(|(key, _)| key.sequence() == sequence)?.clone();
        let (format, lifetime) = (self.format, self.lifetime);
        let opening = TokenKeys::new([minting.0.clone()]);
        Some(Self { format, lifetime, opening, minting: vec![minting] })
    }

    /// How long a token is good for.
    pub(crate) const fn lifetime(&self) -> Duration {
        self.lifetime
    }

    /// Whether every Retry token that servers honour is made by a balancer: servers that do not see
    /// their clients' addresses ask for none.
    pub(super) fn only_ours(&self) -> bool {
        self.format == TokenFormat::Nat
    }

    /// Whether `token`, not empty, proves that the sender of an Initial towards `dcid` is at
    /// `client`. Tokens of NEW_TOKEN frames have one format in both cases, since they say nothing
    /// that a server needs.
    ///
    /// # Errors
    ///
    /// [`InvalidToken`] says what is wrong.
    pub fn check(
        &self,
        token: &[u8],
        client: SocketAddr,
        dcid: &[u8],
        now: SystemTime,
    ) -> Result<(), InvalidToken> {
        if self.format == TokenFormat::SharedState || is_new_token(token) == Some(true) {
            return shared_state::open(&self.opening, token, client, dcid, now).map(drop);
        }
        let claim = nat::open(&self.opening, token, dcid, now)?;
        nat::check_client(&claim, client)
    }

    /// Writes the Retry that answers an Initial with this header, which came from `client`, to the
    /// front of `out`, and returns its length.
    ///
    /// # Errors
    ///
    /// The reason to drop the Initial instead.
    pub fn write_retry(
        &self,
        random: &mut Random,
        version: Version,
        initial: &LongHeader<'_>,
        client: SocketAddr,
        now: SystemTime,
        out: &mut [u8],
    ) -> Result<usize, DropReason> {
        let original_dcid = ConnectionId::new(initial.dcid).ok_or(DropReason::Malformed)?;
        let key = self.key().ok_or(DropReason::TokenLimit)?;
        let random: [u8; RANDOM_LEN] = random.octets();
        let (scid, rest) = random.split_at(OWN_CID_LEN);
        let (unused, nonce) = rest.split_at(1);
        let scid = own_cid(scid, initial.dcid).ok_or(DropReason::Malformed)?;
        let nonce = nonce.first_chunk().copied().unwrap_or_default();
        let client = SocketAddr::new(client.ip().to_canonical(), client.port());
        let claim = RetryClaim { original_dcid, client, expires: now + self.lifetime };
        let token = match self.format {
            TokenFormat::Nat => nat::seal(key, nonce, &claim, &scid),
            TokenFormat::SharedState => shared_state::seal_retry(key, nonce, &claim, &scid),
        };
        let token = token.ok_or(DropReason::Malformed)?;
        let retry = Retry {
            version,
            dcid: initial.scid,
            scid: &scid,
            original_dcid: initial.dcid,
            token: &token,
        };
        retry.write(unused[0], out).ok_or(DropReason::Malformed)
    }

    /// Writes the refusal of an Initial with this header and an invalid token to the front of `out`, and returns its length.
    ///
    /// # Errors
    ///
    /// The reason to drop the Initial instead.
    pub fn write_refusal(
        &self,
        random: &mut Random,
        version: Version,
        initial: &LongHeader<'_>,
        out: &mut [u8],
    ) -> Result<usize, DropReason> {
        let random: [u8; OWN_CID_LEN] = random.octets();
        let scid = own_cid(&random, initial.dcid).ok_or(DropReason::InvalidToken)?;
        let refusal = Refusal {
            version,
            client_cid: initial.scid,
            original_dcid: initial.dcid,
            scid: &scid,
            reason: Reason::InvalidToken,
            words: "",
        };
        refusal.write(out).ok_or(DropReason::InvalidToken)
    }

    /// The key for the next token, which counts as made.
    fn key(&self) -> Option<&TokenKey> {
        let limit = limit(self.format).unwrap_or(u64::MAX);
        let has_room = |made: u64| (made < limit).then_some(made + 1);
        let mut keys = self.minting.iter();
        keys.find(|(_, made)| made.fetch_update(Relaxed, Relaxed, has_room).is_ok())
            .map(|(key, _)| key)
    }
}

/// The connection ID that the client is to use: not the one that it used
/// (<https://www.rfc-editor.org/rfc/rfc9000.html#section-17.2.5.1>).
fn own_cid(random: &[u8], original: &[u8]) -> Option<ConnectionId> {
    let mut octets: [u8; OWN_CID_LEN] = random.try_into().ok()?;
    octets[0] = own_first_octet(&octets);
    if octets == original {
        octets[OWN_CID_LEN - 1] ^= 1;
        octets[0] = own_first_octet(&octets);
    }
    ConnectionId::new(&octets)
}

/// Marks a connection ID as one that decodes to no server, and as ours: by the sum of the rest.
fn own_first_octet(octets: &[u8]) -> u8 {
    let sum = octets[1..].iter().fold(0u8, |sum, octet| sum.wrapping_add(*octet));
    0b111 << 5 | sum >> 3
}

/// Whether a connection ID looks like that of a Retry. One in 256 of a server's that are as long and drawn
/// at random does.
pub(super) fn may_be_own_cid(cid: &[u8]) -> bool {
    cid.len() == OWN_CID_LEN && cid[0] == own_first_octet(cid)
}

/// How many tokens were made with a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokensMade {
    /// The sequence number of the key.
    pub sequence: u8,
    /// Tokens since the process began.
    pub made: u64,
    /// How many there may be, if there is a limit.
    pub limit: Option<u64>,
}

/// How many tokens of each format were made with each key since the process began, over reloads. A
/// key is its sequence number, its octets and its IV.
#[derive(Debug, Default)]
pub(super) struct KeyUses(Vec<KeyUse>);

#[derive(Debug)]
struct KeyUse {
    sequence: u8,
    check_value: [u8; 16],
    format: TokenFormat,
    made: Arc<AtomicU64>,
    current: bool,
}

impl KeyUses {
    /// Marks the keys of `retry` as the current ones. Others are kept: a key that comes back has been
    /// used.
    fn keep(&mut self, retry: &quic_lb_config::Retry) {
        /// Keys that can be remembered after they are gone.
        const MAX_FORMER: usize = 1024;
        let format = retry.format;
        let values: Vec<_> = retry.keys.iter().map(TokenKey::check_value).collect();
        for known in &mut self.0 {
            known.current = known.format == format && values.contains(&known.check_value);
        }
        if self.0.len() > MAX_FORMER {
            self.0.retain(|known| known.current);
        }
        for (key, check_value) in retry.keys.iter().zip(values) {
            let is_same =
                |known: &KeyUse| known.check_value == check_value && known.format == format;
            if !self.0.iter().any(is_same) {
                let (sequence, made) = (key.sequence(), Arc::default());
                self.0.push(KeyUse { sequence, check_value, format, made, current: true });
            }
        }
    }

    fn of(&self, key: &TokenKey, format: TokenFormat) -> Arc<AtomicU64> {
        let check_value = key.check_value();
        let is_same = |known: &&KeyUse| known.check_value == check_value && known.format == format;
        self.0.iter().find(is_same).map(|known| Arc::clone(&known.made)).unwrap_or_default()
    }

    pub(super) fn read(&self) -> Vec<TokensMade> {
        let current = self.0.iter().filter(|known| known.current);
        let read = |known: &KeyUse| TokensMade {
            sequence: known.sequence,
            made: known.made.load(Relaxed),
            limit: limit(known.format),
        };
        current.map(read).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use proptest::prelude::*;
    use quic::invariants::Packet;

    use super::*;
    use crate::admission;

    const NOW: SystemTime = UNIX_EPOCH;

    fn key(n: u8) -> TokenKey {
        TokenKey::new(n, [n; 16], [n; 12]).unwrap()
    }

    fn tokens(format: TokenFormat, keys: &[u8]) -> Tokens {
        let keys = keys.iter().copied().map(key).collect();
        let retry = quic_lb_config::Retry { format, keys, ..quic_lb_config::Retry::default() };
        Tokens::new(&retry, &mut KeyUses::default())
    }

    fn initial(dcid: &[u8], scid: &[u8], token: &[u8]) -> Vec<u8> {
        crate::fixtures::initial(Version::V1, dcid, scid, token)
    }

    fn header(octets: &[u8]) -> LongHeader<'_> {
        match Packet::read(octets) {
            Ok(Packet::Long(header)) => header,
            _ => panic!("a long header"),
        }
    }

    fn write(
        tokens: &Tokens,
        version: Version,
        initial: &[u8],
        client: SocketAddr,
    ) -> Result<Vec<u8>, DropReason> {
        let mut out = [0; MAX_RETRY_LEN];
        let header = header(initial);
        let mut random = Random::new([3; 32]);
        let len = tokens.write_retry(&mut random, version, &header, client, NOW, &mut out)?;
        Ok(out[..len].to_vec())
    }

    /// Connection ID and token of a Retry.
    fn read(retry: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let header = header(retry);
        (header.scid.to_vec(), header.rest[..header.rest.len() - retry::TAG_LEN].to_vec())
    }

    #[test]
    fn the_token_of_a_retry_is_good_for_its_client_alone_and_for_its_time() {
        let client: SocketAddr = "198.51.100.7:4000".parse().unwrap();
        for format in [TokenFormat::Nat, TokenFormat::SharedState] {
            let tokens = tokens(format, &[1, 2]);
            for version in [Version::V1, Version::V2] {
                let first = initial(&[5; 20], &[6; 20], &[]);
                let retry = write(&tokens, version, &first, client).unwrap();
                assert!(retry.len() <= MAX_RETRY_LEN);
                assert!(retry::verify(version, &[5; 20], &retry));
                assert_eq!(header(&retry).dcid, [6; 20]);
                let (scid, token) = read(&retry);
                assert_eq!(scid[0] >> 5, 0b111, "it decodes to no server");
                assert_eq!(tokens.check(&token, client, &scid, NOW), Ok(()));
                let late = NOW + Duration::from_secs(12);
                assert_eq!(tokens.check(&token, client, &scid, late), Ok(()));
                let late = NOW + Duration::from_secs(13);
                assert_eq!(tokens.check(&token, client, &scid, late), Err(InvalidToken::Expired));
                // Made by a balancer whose clock is an hour ahead.
                let ago = NOW - Duration::from_secs(3600);
                assert_eq!(tokens.check(&token, client, &scid, ago), Err(InvalidToken::Future));
                for other in ["198.51.100.7:4001", "198.51.100.8:4000", "[::1]:4000"] {
                    assert!(tokens.check(&token, other.parse().unwrap(), &scid, NOW).is_err());
                }
                assert!(tokens.check(&token, client, &scid[1..], NOW).is_err());
            }
        }
    }

    #[test]
    fn connection_ids_that_no_client_draws_get_no_retry() {
        let client = "198.51.100.7:4000".parse().unwrap();
        let tokens = tokens(TokenFormat::Nat, &[1]);
        for (dcid, scid, expected) in [
            (&[1; 8][..], &[][..], true),
            (&[1; 20], &[2; 20], true),
            (&[1; 7], &[2; 8], false),
            (&[1; 21], &[2; 8], false),
            (&[1; 8], &[2; 21], false),
        ] {
            let written = write(&tokens, Version::V1, &initial(dcid, scid, &[]), client);
            assert_eq!(written.is_ok(), expected, "{dcid:?} {scid:?}");
        }
    }

    #[test]
    fn a_retry_never_repeats_the_connection_id_of_the_client() {
        for random in [[0xe0; 8], [0xff; 8], [0; 8]] {
            let own = own_cid(&random, &[]).unwrap();
            let other = own_cid(&random, &own).unwrap();
            assert_ne!(own, other);
            for cid in [own, other] {
                assert!(may_be_own_cid(&cid) && cid[0] >> 5 == 0b111);
            }
        }
        let at_random = (0..=u64::MAX).step_by(usize::MAX / 100_000);
        let taken = at_random.filter(|n: &u64| may_be_own_cid(&n.to_be_bytes()));
        assert!(taken.count() < 1_000);
    }

    #[test]
    fn a_used_up_key_is_followed_by_the_next_and_the_last_by_none() {
        let client = "198.51.100.7:4000".parse().unwrap();
        let tokens = tokens(TokenFormat::SharedState, &[1, 2]);
        let sequence = |retry: Vec<u8>| read(&retry).1[0];
        let first = initial(&[5; 8], &[6; 8], &[]);
        tokens.minting[0].1.store(MAX_TOKENS_PER_KEY - 1, Relaxed);
        assert_eq!(write(&tokens, Version::V1, &first, client).map(sequence), Ok(1));
        assert_eq!(write(&tokens, Version::V1, &first, client).map(sequence), Ok(2));
        tokens.minting[1].1.store(MAX_TOKENS_PER_KEY, Relaxed);
        assert_eq!(write(&tokens, Version::V1, &first, client), Err(DropReason::TokenLimit));
        assert_eq!(tokens.minting[0].1.load(Relaxed), MAX_TOKENS_PER_KEY);
    }

    #[test]
    fn tokens_with_a_key_each_never_run_out() {
        let client = "198.51.100.7:4000".parse().unwrap();
        let tokens = tokens(TokenFormat::Nat, &[1, 2]);
        let first = initial(&[5; 8], &[6; 8], &[]);
        for made in [MAX_TOKENS_PER_KEY - 1, MAX_TOKENS_PER_KEY, 1 << 48] {
            tokens.minting[0].1.store(made, Relaxed);
            let retry = write(&tokens, Version::V1, &first, client).unwrap();
            assert_eq!(read(&retry).1[1 + 8], 1, "another key took over");
            assert_eq!(tokens.minting[0].1.load(Relaxed), made + 1);
        }
    }

    #[test]
    fn uses_of_a_key_are_counted_over_reloads() {
        let mut uses = KeyUses::default();
        let mut with = |format, keys: &[u8]| {
            let keys = keys.iter().copied().map(key).collect();
            let retry = quic_lb_config::Retry { format, keys, ..quic_lb_config::Retry::default() };
            let tokens = Tokens::new(&retry, &mut uses);
            tokens.key();
            let used = uses.read();
            assert!(used.iter().all(|of| of.limit == limit(format)));
            used.iter().map(|of| (of.sequence, of.made)).collect::<Vec<_>>()
        };
        let format = TokenFormat::SharedState;
        assert_eq!(with(format, &[1]), [(1, 1)]);
        assert_eq!(with(format, &[1, 2]), [(1, 2), (2, 0)]);
        assert_eq!(with(format, &[2, 1]), [(1, 2), (2, 1)]);
        assert_eq!(with(format, &[2]), [(2, 2)]);
        assert_eq!(with(format, &[1]), [(1, 3)]);
        // What one format makes of a key is not used up for the other.
        assert_eq!(with(TokenFormat::Nat, &[1, 2]), [(1, 1), (2, 0)]);
        assert_eq!(with(format, &[1]), [(1, 4)]);
    }

    proptest! {
        /// Every bit of the token, and of the connection ID that it came with.
        #[test]
        fn no_flipped_bit_passes(
            dcid in prop::collection::vec(any::<u8>(), 8..=20),
            port: u16,
            shared: bool,
        ) {
            let client = SocketAddr::from(([198, 51, 100, 7], port));
            let format = if shared { TokenFormat::SharedState } else { TokenFormat::Nat };
            let tokens = tokens(format, &[1, 2, 3]);
            let retry = write(&tokens, Version::V1, &initial(&dcid, &[], &[]), client).unwrap();
            let (scid, token) = read(&retry);
            for bit in 0..token.len() * 8 {
                let mut flipped = token.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                prop_assert!(tokens.check(&flipped, client, &scid, NOW).is_err(), "bit {bit}");
            }
            for bit in 0..scid.len() * 8 {
                let mut flipped = scid.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                prop_assert!(tokens.check(&token, client, &flipped, NOW).is_err(), "bit {bit}");
            }
        }

        #[test]
        fn any_initial_is_judged_without_panic(octets in prop::collection::vec(any::<u8>(), 0..300)) {
            let tokens = tokens(TokenFormat::Nat, &[1]);
            if let Ok(Packet::Long(header)) = Packet::read(&octets)
                && let Some(token) = admission::token(&header)
            {
                let _ = tokens.check(token, "[::1]:1".parse().unwrap(), header.dcid, NOW);
            }
        }
    }
}
