//! What a flow has shown so far of the client behind it.
//!
//! Whoever forges the source of a datagram never sees an answer. Three things are therefore no proof: that the client
//! was heard again, that the server answered, and both in turn, since servers answer anything with a stateless reset
//! or a Version Negotiation. Proof is
//!
//! - a valid token, which was sent to that address;
//! - a connection ID that the server has given in a long header of this very flow, used by the client;
//! - of a connection that was seen with proof before: a few exchanges, since there is room for few such flows;
//! - otherwise many exchanges in which the server has sent more than resets are made of.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::succession::Offset;

/// Exchanges that prove the path of a connection that was seen before.
const EXCHANGES_OF_KNOWN: u8 = 3;
/// Exchanges that prove any other one, if the server has sent [`OCTETS`] besides.
const EXCHANGES: u8 = 8;
/// Octets from the server, in datagrams that are [`LARGER_THAN_RESET`].
const OCTETS: u16 = 4_096;
/// Stateless resets of common servers have 21 to 60 octets.
const LARGER_THAN_RESET: usize = 100;

/// The evidence of one flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Evidence {
    /// A hash of the connection ID that the server gave last in a long header.
    pub(super) server_cid: u64,
    /// Whether the server was heard after the client.
    server_spoke: bool,
    /// How often the client was heard after the server.
    exchanges: u8,
    /// Octets from the server in datagrams of some size.
    octets: u16,
}

impl Evidence {
    /// Takes note of `count` datagrams of `len` octets from the server.
    pub(super) fn server_was_heard(&mut self, len: usize, count: usize) {
        self.server_spoke = true;
        if len > LARGER_THAN_RESET {
            let octets = u16::try_from(len * count).unwrap_or(u16::MAX);
            self.octets = self.octets.saturating_add(octets);
        }
    }

    /// Begins anew with what can be seen of exchanges.
    pub(super) fn forget_exchanges(&mut self) {
        *self = Self { server_cid: self.server_cid, ..Self::default() };
    }

    /// Takes note of a datagram of the client with this destination connection ID, if the length of those is known;
    /// says whether the flow is proved now. `known` says that its connection was seen before.
    pub(super) fn client_was_heard(
        &mut self,
        dcid: Option<&[u8]>,
        known: bool,
        hash: &ahash::RandomState,
    ) -> bool {
        if std::mem::take(&mut self.server_spoke) {
            self.exchanges = self.exchanges.saturating_add(1);
        }
        let is_echo = || dcid.is_some_and(|cid| hash.hash_one(cid) == self.server_cid);
        known && self.exchanges >= EXCHANGES_OF_KNOWN
            || self.exchanges >= EXCHANGES && self.octets >= OCTETS
            || is_echo()
    }
}

/// Which connection IDs clients have given as theirs on a flow, as a set that never misses one and rarely finds one
/// too many: one socket may carry any number of connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ClientCids(u64);

impl ClientCids {
    /// Contains all of them.
    pub(super) const ANY: Self = Self(u64::MAX);

    pub(super) fn insert(&mut self, cid: &[u8], hash: &ahash::RandomState) {
        self.0 |= Self::bits(cid, hash);
    }

    pub(super) fn may_contain(self, cid: &[u8], hash: &ahash::RandomState) -> bool {
        let bits = Self::bits(cid, hash);
        self.0 & bits == bits
    }

    /// Three of the 64 bits.
    fn bits(cid: &[u8], hash: &ahash::RandomState) -> u64 {
        let hash = hash.hash_one(cid);
        [0, 6, 12].iter().fold(0, |bits, shift| bits | 1 << (hash >> shift & 63))
    }
}

/// The connection ID that a client uses and that no server was seen to give.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct InUse<T = Instant> {
    /// A hash of it.
    cid: u64,
    /// How often the client used it, and nothing else, after the server was heard.
    exchanges: u8,
    /// When it was to be learnt last: there may have been no room for it.
    tried: Option<T>,
}

impl<T> Default for InUse<T> {
    fn default() -> Self {
        Self { cid: 0, exchanges: 0, tried: None }
    }
}

impl InUse<Offset> {
    pub(super) fn taken_over(self, now: Instant) -> InUse {
        let Self { cid, exchanges, tried } = self;
        InUse { cid, exchanges, tried: tried.map(|tried| tried.from(now)) }
    }
}

impl InUse {
    /// For a successor.
    pub(super) fn handed(self, now: Instant) -> InUse<Offset> {
        let Self { cid, exchanges, tried } = self;
        InUse { cid, exchanges, tried: tried.map(|tried| Offset::new(now, tried)) }
    }

    /// Takes note of a datagram of the client, and whether `server_spoke` since the last; says whether its server goes on
    /// answering to this connection ID, once and again every [`TRY_INTERVAL`].
    pub(super) fn client_was_heard(
        &mut self,
        now: Instant,
        cid: &[u8],
        server_spoke: bool,
        hash: &ahash::RandomState,
    ) -> bool {
        let cid = hash.hash_one(cid);
        if self.cid != cid {
            *self = Self { cid, ..Self::default() };
        } else if server_spoke {
            self.exchanges = self.exchanges.saturating_add(1);
        }
        let has_rested = |tried: Instant| now.saturating_duration_since(tried) >= TRY_INTERVAL;
        let is_due = self.exchanges >= EXCHANGES_IN_USE && self.tried.is_none_or(has_rested);
        if is_due {
            self.tried = Some(now);
        }
        is_due
    }
}

/// Exchanges after which a connection ID counts as one of the server's.
const EXCHANGES_IN_USE: u8 = 2;
/// How often one that is still not known is to be learnt: as often as a flow may learn one more.
const TRY_INTERVAL: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_that_arrive_together_prove_as_much_as_one_by_one() {
        let hash = ahash::RandomState::with_seeds(1, 2, 3, 4);
        let proves = |len: usize, count: usize, times: usize| {
            let mut evidence = Evidence::default();
            (0..times).any(|_| {
                evidence.server_was_heard(len, count);
                evidence.client_was_heard(None, false, &hash)
            })
        };
        // Eight exchanges, and 4,096 octets in them.
        assert!(proves(512, 1, 8) && !proves(512, 1, 7));
        assert!(!proves(511, 1, 8) && proves(511, 1, 9));
        assert!(proves(128, 4, 8) && !proves(127, 4, 8));
        // As small as resets, however many.
        assert!(!proves(100, 64, 100));
        assert!(proves(65_000, 64, 8));
    }
}
