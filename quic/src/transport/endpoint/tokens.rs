//! Address tokens as a server sees them: which it honours, which it makes.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    hash::BuildHasher,
    net::{IpAddr, SocketAddr},
    time::{Duration, SystemTime},
};

use super::keyed::Keyed;
use crate::{
    connection_id::ConnectionId,
    random::Random,
    token::{
        InvalidToken, MAX_TOKENS_PER_KEY, RetryClaim, Token, TokenKey, TokenKeys, is_new_token,
        nat,
        shared_state::{self, Claim},
    },
};

/// How long the token of a Retry is good for: the client answers at once.
const RETRY_LIFETIME: Duration = Duration::from_secs(10);
/// How long the token of a NEW_TOKEN frame is good for.
const NEW_TOKEN_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Whose tokens a server honours.
#[derive(Clone, Debug)]
pub enum TokenPolicy {
    /// Tokens with shared state: this server's own, and those of everybody with the same keys, be
    /// it other servers or a balancer that leaves addresses as they are.
    SharedState {
        /// The sequence number of the key to make tokens with.
        minting: u8,
        /// The keys of tokens that are honoured.
        keys: TokenKeys,
    },
    /// Retry tokens of a balancer that rewrites addresses. The server asks for no Retry itself.
    /// Tokens for later connections are bound to an address, which it does not see: it makes them,
    /// with the first key, for clients whose address a Retry token has told, and for the balancer
    /// to check.
    Nat(TokenKeys),
}

/// What became of a token in a client's Initial.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TokenResult {
    /// It was of a Retry, and proves the client's address.
    Retry,
    /// It was of a NEW_TOKEN frame, and proves the client's address.
    NewToken,
    /// It was good once, and has been spent: it counts as absent.
    Spent,
    /// It says nothing to us, as one of another server does: it counts as absent.
    Ignored,
    /// It claims to be of a Retry, and is not: the connection is refused.
    Invalid,
}

impl TokenResult {
    /// The number of results, for tables of counters.
    pub const COUNT: usize = Self::Invalid as usize + 1;
}

/// What a token means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenVerdict {
    /// A valid token of a Retry, and what it says.
    Retried(RetryClaim),
    /// The client has had this address before.
    Known,
    /// It proves nothing, as if it were absent.
    Nothing,
    /// It is of a Retry, and has begun a connection already.
    Spent,
    /// It claims to be of a Retry, and is not.
    Invalid(InvalidToken),
}

/// Tokens that began a connection, by their hashes, so that they begin no second one. Tokens are
/// bound to an address and expire; this memory is for those that come again before. It is of fixed
/// size: after so many others, an old token may count again.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-8.1.4>: "servers MUST ensure that replay of
/// tokens is prevented or limited".
#[derive(Debug)]
pub(super) struct SpentTokens {
    hasher: Keyed,
    recent: HashSet<u64, Keyed>,
    older: HashSet<u64, Keyed>,
}

impl SpentTokens {
    /// Tokens in each of the two generations.
    const GENERATION: usize = 8192;

    pub(super) fn new(hasher: Keyed) -> Self {
        let empty = || HashSet::with_hasher(hasher);
        Self { hasher, recent: empty(), older: empty() }
    }

    pub(super) fn contains(&self, token: &[u8]) -> bool {
        let hash = self.hasher.hash_one(token);
        self.recent.contains(&hash) || self.older.contains(&hash)
    }

    pub(super) fn insert(&mut self, token: &[u8]) {
        if self.recent.len() >= Self::GENERATION {
            let empty = HashSet::with_hasher(self.hasher);
            self.older = std::mem::replace(&mut self.recent, empty);
        }
        self.recent.insert(self.hasher.hash_one(token));
    }
}

/// Tokens that servers have sent to a client, for its next connections to them.
#[derive(Debug, Default)]
pub(super) struct KeptTokens {
    by_server: BTreeMap<String, VecDeque<Vec<u8>>>,
}

impl KeptTokens {
    /// Servers whose tokens are kept, and tokens for each.
    const SERVERS: usize = 256;
    const PER_SERVER: usize = 2;

    pub(super) fn add(&mut self, server: &str, token: Vec<u8>) {
        if self.by_server.len() >= Self::SERVERS && !self.by_server.contains_key(server) {
            self.by_server.pop_first();
        }
        let tokens = self.by_server.entry(server.to_owned()).or_default();
        if tokens.len() == Self::PER_SERVER {
            tokens.pop_front();
        }
        tokens.push_back(token);
    }

    /// The latest token for a server, which is used once.
    pub(super) fn take(&mut self, server: &str) -> Option<Vec<u8>> {
        self.by_server.get_mut(server)?.pop_back()
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.by_server.values().map(VecDeque::len).sum()
    }
}

/// A policy, and how many tokens were made by it. All that a server makes have the format with a limit:
/// when a key is used up, it makes no more.
#[derive(Debug)]
pub(super) struct Tokens {
    policy: TokenPolicy,
    /// Whether its keys are this server's alone, so that another may follow one that is used up.
    is_own: bool,
    /// How many tokens the key that makes them has made.
    made: u64,
    /// How many others had made when they were replaced, by their check values.
    made_by_former: BTreeMap<[u8; 16], u64>,
}

impl Tokens {
    /// Tokens that only this server understands.
    pub(super) fn own(random: &mut Random) -> Self {
        let key = TokenKey::new(0, random.octets(), random.octets()).expect("0 is below 128");
        let policy = TokenPolicy::SharedState { minting: 0, keys: TokenKeys::new([key]) };
        Self { is_own: true, ..Self::new(policy) }
    }

    pub(super) const fn new(policy: TokenPolicy) -> Self {
        Self { policy, is_own: false, made: 0, made_by_former: BTreeMap::new() }
    }

    /// Replaces the policy. A key that comes back has been used.
    pub(super) fn replace(&mut self, policy: TokenPolicy) {
        if let Some(key) = self.policy.minting() {
            self.made_by_former.insert(key.check_value(), self.made);
        }
        let before =
            policy.minting().and_then(|key| self.made_by_former.remove(&key.check_value()));
        (self.policy, self.is_own, self.made) = (policy, false, before.unwrap_or(0));
    }

    /// Judges the token of an Initial from `client` to `dcid`.
    pub(super) fn judge(
        &self,
        token: &[u8],
        client: SocketAddr,
        dcid: &ConnectionId,
        now: SystemTime,
    ) -> TokenVerdict {
        self.policy.judge(token, client, dcid, now)
    }

    /// The token for a Retry, if it is for this server to send one.
    pub(super) fn retry(
        &mut self,
        random: &mut Random,
        client: SocketAddr,
        original_dcid: ConnectionId,
        retry_scid: &ConnectionId,
        now: SystemTime,
    ) -> Option<Token> {
        if matches!(self.policy, TokenPolicy::Nat(_)) {
            return None;
        }
        let key = self.use_key(random)?;
        let claim = RetryClaim { original_dcid, client, expires: now + RETRY_LIFETIME };
        shared_state::seal_retry(key, random.octets(), &claim, retry_scid)
    }

    /// The token for a NEW_TOKEN frame, if this server makes any. The client is seen at `remote`; a
    /// Retry token has told that whoever is seen there is at `sealed`.
    pub(super) fn new_token(
        &mut self,
        random: &mut Random,
        remote: IpAddr,
        sealed: Option<IpAddr>,
        now: SystemTime,
    ) -> Option<Token> {
        let client = match self.policy {
            TokenPolicy::SharedState { .. } => remote,
            TokenPolicy::Nat(_) => sealed?,
        };
        let key = self.use_key(random)?;
        let expires = now + NEW_TOKEN_LIFETIME;
        shared_state::seal_new_token(key, random.octets(), client.to_canonical(), expires)
    }

    /// The key for the next token, which counts as made; `None` when it has made all that it may.
    fn use_key(&mut self, random: &mut Random) -> Option<&TokenKey> {
        if self.made >= MAX_TOKENS_PER_KEY {
            if !self.is_own {
                return None;
            }
            self.follow(random);
        }
        self.made += 1;
        self.policy.minting()
    }

    /// Goes on with another key of our own. Tokens of the one before remain good.
    fn follow(&mut self, random: &mut Random) {
        let Some(before) = self.policy.minting().cloned() else { return };
        let sequence = (before.sequence() + 1) % 128;
        let Some(key) = TokenKey::new(sequence, random.octets(), random.octets()) else { return };
        let keys = TokenKeys::new([before, key]);
        self.policy = TokenPolicy::SharedState { minting: sequence, keys };
        self.made = 0;
    }
}

impl TokenPolicy {
    /// The key that makes tokens.
    fn minting(&self) -> Option<&TokenKey> {
        match self {
            Self::SharedState { minting, keys } => keys.get(*minting),
            Self::Nat(keys) => keys.iter().next(),
        }
    }

    /// Judges the token of an Initial from `client` to `dcid`.
    fn judge(
        &self,
        token: &[u8],
        client: SocketAddr,
        dcid: &ConnectionId,
        now: SystemTime,
    ) -> TokenVerdict {
        let Some(is_new) = is_new_token(token) else { return TokenVerdict::Nothing };
        let claim = match self {
            Self::SharedState { keys, .. } => shared_state::open(keys, token, client, dcid, now),
            Self::Nat(keys) => nat::open(keys, token, dcid, now).map(Claim::Retry),
        };
        match claim {
            Ok(Claim::Retry(claim)) => TokenVerdict::Retried(claim),
            Ok(Claim::NewToken { .. }) => TokenVerdict::Known,
            Err(_) if is_new => TokenVerdict::Nothing,
            Err(invalid) => TokenVerdict::Invalid(invalid),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn req_e06_a_million_tokens_are_remembered_within_a_fixed_size() {
        let mut spent = SpentTokens::new(Keyed::new(&mut Random::new([3; 32])));
        for number in 0..1_000_000u32 {
            let token = number.to_be_bytes();
            assert!(!spent.contains(&token));
            spent.insert(&token);
            assert!(spent.contains(&token));
            assert!(spent.recent.len() + spent.older.len() <= 2 * SpentTokens::GENERATION);
        }
        let last = 1_000_000 - u32::try_from(SpentTokens::GENERATION).unwrap();
        assert!(spent.contains(&last.to_be_bytes()));
        assert!(!spent.contains(&0u32.to_be_bytes()));
    }

    fn policy(sequence: u8) -> TokenPolicy {
        let key = TokenKey::new(sequence, [sequence; 16], [0; 12]).unwrap();
        TokenPolicy::SharedState { minting: sequence, keys: TokenKeys::new([key]) }
    }

    fn make(tokens: &mut Tokens) -> Option<Token> {
        let remote = IpAddr::from([192, 0, 2, 1]);
        tokens.new_token(&mut Random::new([1; 32]), remote, Some(remote), SystemTime::UNIX_EPOCH)
    }

    #[test]
    fn a_key_makes_no_more_tokens_than_the_draft_allows_also_over_reloads() {
        for nat in [false, true] {
            let policy = |sequence| match policy(sequence) {
                TokenPolicy::SharedState { keys, .. } if nat => TokenPolicy::Nat(keys),
                policy => policy,
            };
            let mut tokens = Tokens::new(policy(1));
            tokens.made = MAX_TOKENS_PER_KEY - 2;
            assert!(make(&mut tokens).is_some());
            tokens.replace(policy(1));
            assert!(make(&mut tokens).is_some());
            assert!(make(&mut tokens).is_none());
            tokens.replace(policy(2));
            assert!(make(&mut tokens).is_some());
            tokens.replace(policy(1));
            assert!(make(&mut tokens).is_none());
        }
    }

    #[test]
    fn a_key_of_our_own_that_is_used_up_is_followed_by_another_and_still_opens() {
        let mut tokens = Tokens::own(&mut Random::new([2; 32]));
        tokens.made = MAX_TOKENS_PER_KEY - 1;
        let (client, dcid) = ("192.0.2.1:1".parse().unwrap(), ConnectionId::new(&[1; 8]).unwrap());
        let made = [make(&mut tokens).unwrap(), make(&mut tokens).unwrap()];
        assert_ne!(made[0][0], made[1][0], "the sequence number of the key");
        for token in made {
            let judged = tokens.judge(&token, client, &dcid, SystemTime::UNIX_EPOCH);
            assert_eq!(judged, TokenVerdict::Known);
        }
    }
}
