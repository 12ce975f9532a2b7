//! Address tokens as a server sees them: which it honours, which it makes.

use std::{
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
    /// Retry tokens of a balancer that rewrites addresses. The server asks for no Retry itself,
    /// and makes no tokens, since it does not see the addresses they would be bound to.
    Proxied(TokenKeys),
}

/// What a token means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// A valid token of a Retry: the client's first choice of a connection ID was this.
    Retried(ConnectionId),
    /// The client has had this address before.
    Known,
    /// It proves nothing, as if it were absent.
    Nothing,
    /// It claims to be of a Retry, and is not.
    Invalid,
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
            Ok(Claim::Retry(claim)) => Verdict::Retried(claim.original_dcid),
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

    /// The token for a NEW_TOKEN frame, if this server makes any.
    pub(super) fn new_token(
        &self,
        random: &mut Random,
        client: IpAddr,
        now: SystemTime,
    ) -> Option<Token> {
        let Self::SharedState { minting, keys } = self else { return None };
        let key = keys.get(*minting)?;
        let client = client.to_canonical();
        shared_state::seal_new_token(key, random.octets(), client, now + NEW_TOKEN_LIFETIME)
    }
}
