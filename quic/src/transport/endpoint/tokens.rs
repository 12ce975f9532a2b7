//! Address tokens as a server sees them: which it honours, which it makes.

use std::{
    collections::HashSet,
    hash::BuildHasher,
    net::{IpAddr, SocketAddr},
    time::{Duration, SystemTime},
};

use crate::{
    ConnectionId,
    random::Random,
    token::{
        RetryClaim, Token, TokenKey, TokenKeys, is_new_token, proxied,
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
    Proxied(TokenKeys),
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
pub(super) enum Verdict {
    /// A valid token of a Retry, and what it says.
    Retried(RetryClaim),
    /// The client has had this address before.
    Known,
    /// It proves nothing, as if it were absent.
    Nothing,
    /// It claims to be of a Retry, and is not.
    Invalid,
}

/// Tokens that began a connection, by their hashes, so that they begin no second one. Tokens are
/// bound to an address and expire; this memory is for those that come again before. It is of fixed
/// size: after so many others, an old token may count again.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-8.1.4>: "servers MUST ensure that replay of
/// tokens is prevented or limited".
#[derive(Debug, Default)]
pub(super) struct SpentTokens {
    recent: HashSet<u64>,
    older: HashSet<u64>,
}

impl SpentTokens {
    /// Tokens in each of the two generations.
    const GENERATION: usize = 8192;

    pub(super) fn contains(&self, hasher: &impl BuildHasher, token: &[u8]) -> bool {
        let hash = hasher.hash_one(token);
        self.recent.contains(&hash) || self.older.contains(&hash)
    }

    pub(super) fn insert(&mut self, hasher: &impl BuildHasher, token: &[u8]) {
        if self.recent.len() >= Self::GENERATION {
            self.older = std::mem::take(&mut self.recent);
        }
        self.recent.insert(hasher.hash_one(token));
    }
}

impl TokenPolicy {
    /// Tokens that only this server understands.
    pub(super) fn own(random: &mut Random) -> Self {
        let key = TokenKey::new(0, random.octets(), random.octets()).expect("0 is below 128");
        Self::SharedState { minting: key.sequence(), keys: TokenKeys::new([key]) }
    }

    /// Judges the token of an Initial from `client` to `dcid`.
    pub(super) fn judge(
        &self,
        token: &[u8],
        client: SocketAddr,
        dcid: &ConnectionId,
        now: SystemTime,
    ) -> Verdict {
        let Some(is_new) = is_new_token(token) else { return Verdict::Nothing };
        let claim = match self {
            Self::SharedState { keys, .. } => shared_state::open(keys, token, client, dcid, now),
            Self::Proxied(keys) => proxied::open(keys, token, dcid, now).map(Claim::Retry),
        };
        match claim {
            Ok(Claim::Retry(claim)) => Verdict::Retried(claim),
            Ok(Claim::NewToken { .. }) => Verdict::Known,
            Err(_) if is_new => Verdict::Nothing,
            Err(_) => Verdict::Invalid,
        }
    }

    /// The token for a Retry, if it is for this server to send one.
    pub(super) fn retry(
        &self,
        random: &mut Random,
        client: SocketAddr,
        original_dcid: ConnectionId,
        retry_scid: &ConnectionId,
        now: SystemTime,
    ) -> Option<Token> {
        let Self::SharedState { minting, keys } = self else { return None };
        let key = keys.get(*minting)?;
        let claim = RetryClaim { original_dcid, client, expires: now + RETRY_LIFETIME };
        shared_state::seal_retry(key, random.octets(), &claim, retry_scid)
    }

    /// The token for a NEW_TOKEN frame, if this server makes any. The client is seen at `remote`; a
    /// Retry token has told that whoever is seen there is at `sealed`.
    pub(super) fn new_token(
        &self,
        random: &mut Random,
        remote: IpAddr,
        sealed: Option<IpAddr>,
        now: SystemTime,
    ) -> Option<Token> {
        let (key, client) = match self {
            Self::SharedState { minting, keys } => (keys.get(*minting)?, remote),
            Self::Proxied(keys) => (keys.iter().next()?, sealed?),
        };
        let client = client.to_canonical();
        shared_state::seal_new_token(key, random.octets(), client, now + NEW_TOKEN_LIFETIME)
    }
}

#[cfg(test)]
mod tests {
    use std::hash::{BuildHasherDefault, DefaultHasher};

    use super::*;

    #[test]
    fn req_e06_a_million_tokens_are_remembered_within_a_fixed_size() {
        let hasher = BuildHasherDefault::<DefaultHasher>::default();
        let mut spent = SpentTokens::default();
        for number in 0..1_000_000u32 {
            let token = number.to_be_bytes();
            assert!(!spent.contains(&hasher, &token));
            spent.insert(&hasher, &token);
            assert!(spent.contains(&hasher, &token));
            assert!(spent.recent.len() + spent.older.len() <= 2 * SpentTokens::GENERATION);
        }
        let last = 1_000_000 - u32::try_from(SpentTokens::GENERATION).unwrap();
        assert!(spent.contains(&hasher, &last.to_be_bytes()));
        assert!(!spent.contains(&hasher, &0u32.to_be_bytes()));
    }
}
