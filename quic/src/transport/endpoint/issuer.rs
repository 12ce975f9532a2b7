//! Where our connection IDs come from, and what may be said about those that nobody has any more.
//!
//! From the bottom up: a [`CidGenerator`] makes the octets. A [`CidIssuer`] adds what goes with them:
//! the key of their reset tokens, how many a connection has, whether clients may migrate. [`Issuers`]
//! are the one in use and those before it. What one connection got from here, and what its peer gave
//! it, are the lists of `cids`. The driver's `Cids` is the setting from which it makes an issuer
//! for each shard.

use super::super::reset::ResetKey;
use crate::{
    connection_id::ConnectionId,
    routable::{CidGenerator, NoncesExhausted, UNROUTABLE_BITS},
};

/// Connection IDs a connection has at once where several are allowed.
const PER_CONNECTION: u64 = 4;
/// How often a connection ID is drawn before all of them count as taken.
const ATTEMPTS: u32 = 8;
/// Former issuers whose connection IDs may still be in use.
const MAX_FORMER: usize = 8;

/// Makes connection IDs and the stateless-reset tokens that belong to them: one generator, one
/// reset key, for one config ID.
#[derive(Debug)]
pub struct CidIssuer {
    generator: CidGenerator,
    reset_key: ResetKey,
    per_connection: u64,
    migration: bool,
}

impl CidIssuer {
    /// For a server behind a balancer that knows the generator's configuration.
    #[must_use]
    pub const fn routable(generator: CidGenerator, reset_key: ResetKey) -> Self {
        Self { generator, reset_key, per_connection: PER_CONNECTION, migration: true }
    }

    /// For a server behind a balancer, without a configuration: connection IDs of `len` octets
    /// that say so, one per connection, and clients are told not to migrate.
    ///
    /// draft-ietf-quic-load-balancers-21, section 3.1
    #[must_use]
    pub fn unroutable(len: usize, seed: [u8; 32], reset_key: ResetKey) -> Self {
        Self::unroutable_from(CidGenerator::unroutable(len, seed), reset_key)
    }

    /// As [`Self::unroutable`], with a generator of the caller's.
    #[must_use]
    pub const fn unroutable_from(generator: CidGenerator, reset_key: ResetKey) -> Self {
        Self { generator, reset_key, per_connection: 1, migration: false }
    }

    /// For clients, and for servers that no balancer stands before.
    #[must_use]
    pub fn standalone(len: usize, seed: [u8; 32], reset_key: ResetKey) -> Self {
        let generator = CidGenerator::unroutable(len, seed);
        Self { generator, reset_key, per_connection: PER_CONNECTION, migration: true }
    }

    fn bits(&self) -> u8 {
        self.generator.config_id().map_or(UNROUTABLE_BITS, crate::routable::ConfigId::get)
    }
}

/// The issuer in use, and those before it.
#[derive(Debug)]
pub(super) struct Issuers {
    current: CidIssuer,
    /// Newest first.
    former: Vec<CidIssuer>,
}

impl Issuers {
    pub(super) const fn new(current: CidIssuer) -> Self {
        Self { current, former: Vec::new() }
    }

    /// Replaces the issuer. One with the same config ID takes over its reset key's place too.
    pub(super) fn replace(&mut self, new: CidIssuer) {
        let old = std::mem::replace(&mut self.current, new);
        self.former.insert(0, old);
        self.former.truncate(MAX_FORMER);
    }

    /// A connection ID that is not `taken`, and its reset token. Routable ones never repeat; random
    /// ones might, once in a very long while.
    pub(super) fn issue(
        &mut self,
        taken: impl Fn(&ConnectionId) -> bool,
    ) -> Result<(ConnectionId, [u8; 16]), NoncesExhausted> {
        for _ in 0..ATTEMPTS {
            let id = self.current.generator.generate()?;
            if !taken(&id) {
                return Ok((id, self.current.reset_key.token(&id)));
            }
        }
        Err(NoncesExhausted)
    }

    pub(super) const fn per_connection(&self) -> u64 {
        self.current.per_connection
    }

    pub(super) const fn allows_migration(&self) -> bool {
        self.current.migration
    }

    /// The lengths that a connection ID of ours may have which starts with `first_octet`.
    pub(super) fn lengths(&self, first_octet: u8) -> impl Iterator<Item = usize> {
        let bits = first_octet >> 5;
        let all = std::iter::once(&self.current).chain(&self.former);
        all.filter(move |issuer| issuer.bits() == bits).map(|issuer| issuer.generator.cid_len())
    }

    /// The reset token of a connection ID that was made here and that no connection has. A
    /// connection ID of another server, misrouted to us, has none: its owner is alive, and knowing
    /// the token would be enough to end the connection.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-21.11>
    pub(super) fn reset_token(&self, after_first: &[u8]) -> Option<[u8; 16]> {
        let bits = after_first.first()? >> 5;
        let mut all = std::iter::once(&self.current).chain(&self.former);
        let issuer = all.find(|issuer| issuer.bits() == bits)?;
        let id = after_first.get(..issuer.generator.cid_len())?;
        if !issuer.generator.is_own(id) {
            return None;
        }
        Some(issuer.reset_key.token(&ConnectionId::new(id)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routable::{CidConfig, ConfigId, Key, Partition, ServerId};

    fn issuer(config_id: u8, reset_key: u8) -> CidIssuer {
        let id = ConfigId::new(config_id).unwrap();
        let config = CidConfig::new(id, 2, 6, Some(&Key::new([config_id; 16]))).unwrap();
        let server = ServerId::new(&[0, 1]).unwrap();
        let generator = CidGenerator::new(config, server, Partition::Whole, [1; 32]).unwrap();
        CidIssuer::routable(generator, ResetKey::new([reset_key; 32]))
    }

    #[test]
    fn req_m11_b15_every_configuration_has_a_reset_key_of_its_own_and_former_ones_count() {
        let mut issuers = Issuers::new(issuer(0, 10));
        let (first, first_token) = issuers.issue(|_| false).unwrap();
        issuers.replace(issuer(1, 11));
        let (second, second_token) = issuers.issue(|_| false).unwrap();
        assert_eq!(first_token, ResetKey::new([10; 32]).token(&first));
        assert_eq!(second_token, ResetKey::new([11; 32]).token(&second));
        assert_eq!(issuers.reset_token(&first), Some(first_token));
        assert_eq!(issuers.reset_token(&second), Some(second_token));
        // Another server's, and one of a configuration that nobody had.
        let mut foreign = first.to_vec();
        foreign[3] ^= 1;
        assert_eq!(issuers.reset_token(&foreign), None);
        assert_eq!(issuers.reset_token(&[0x40; 9]), None);
    }

    #[test]
    fn req_b01_one_that_is_taken_is_not_given_out() {
        let mut issuers = Issuers::new(issuer(0, 10));
        let (id, _) = issuers.issue(|_| false).unwrap();
        assert!(issuers.issue(|_| true).is_err());
        assert_ne!(issuers.issue(|_| false).unwrap().0, id);
    }
}
