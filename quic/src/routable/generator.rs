//! What a server needs: connection IDs that carry its server ID and never repeat.
//!
//! draft-ietf-quic-load-balancers-21, section 5.5: a nonce is used once within a configuration.
//! Under encryption a counter from a random start is enough; in the clear the counter goes through
//! a keyed permutation first, so that an observer cannot tell which connection IDs follow each
//! other. Several threads or processes of one server share the nonces by [`Partition`].

use std::fmt;

use zeroize::Zeroizing;

use super::{
    ConfigId, EncodeError, Key, MAX_ENCODED_LEN, ServerId, UNROUTABLE_BITS,
    codec::{CidConfig, FourPass},
};
use crate::{
    connection_id::{self, ConnectionId},
    random::Random,
};

/// The octets of a nonce that count. Longer nonces have random octets in front.
const MAX_COUNTER_LEN: usize = 8;

/// Which share of a server's nonces one thread or process may use. The index is the first octet of
/// the nonce, so every sharer that passes another index can never make the same connection ID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Partition {
    /// The server has one generator per configuration.
    Whole,
    /// One of up to 256 generators, by number.
    Of256(u8),
}

/// All nonces of this generator's share have been used. The server moves to another configuration
/// or to connection IDs that are not routable ([`CidGenerator::unroutable`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("every nonce of this configuration has been used; change the configuration")]
pub struct NoncesExhausted;

/// Makes connection IDs for one server.
#[derive(Debug)]
pub struct CidGenerator {
    random: Random,
    kind: Kind,
    /// Takes over when the nonces are used up.
    fallback_seed: Option<Seed>,
}

/// What connection IDs follow from, for whoever knows it.
struct Seed(Zeroizing<[u8; 32]>);

impl fmt::Debug for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Seed(masked)")
    }
}

#[derive(Debug)]
enum Kind {
    Routable(Box<Routable>),
    Unroutable { len: usize, shard: Option<(ShardMark, u8)> },
}

/// Which shard of a server a connection ID that is not routable belongs to: one octet, encrypted
/// with the random rest, so that whoever has no key can neither read nor link it.
#[derive(Clone, Debug)]
pub struct ShardMark {
    /// How the octets after the first one are encrypted; its config ID appears nowhere.
    config: CidConfig,
}

impl ShardMark {
    /// For connection IDs of `len` octets, kept within 8 to 20. All shards share `key`, which
    /// nobody else has.
    #[must_use]
    pub fn new(len: usize, key: &Key) -> Self {
        let len = clamped(len);
        let id = ConfigId::new(0).expect("0 is below 7");
        let config = CidConfig::new(id, 1, len - 2, Some(key)).expect("6 to 18 octets fit");
        Self { config }
    }

    /// The shard of a connection ID; any number for those that were not made with the key. `None`
    /// for routable ones.
    #[must_use]
    pub fn shard(&self, id: &[u8]) -> Option<u8> {
        if id.first()? >> 5 != UNROUTABLE_BITS {
            return None;
        }
        self.config.decode(id)?.as_slice().first().copied()
    }

    /// Octets of the connection IDs.
    #[must_use]
    pub const fn cid_len(&self) -> usize {
        self.config.cid_len()
    }
}

#[derive(Debug)]
struct Routable {
    config: CidConfig,
    server_id: ServerId,
    partition: Partition,
    counter: Counter,
}

impl CidGenerator {
    /// A generator of routable connection IDs. `seed` decides all its output and has to come from
    /// a cryptographic source; two generators must not share it.
    ///
    /// # Errors
    ///
    /// [`EncodeError::ServerIdLength`] when `server_id` does not fit `config`.
    pub fn new(
        config: CidConfig,
        server_id: ServerId,
        partition: Partition,
        seed: [u8; 32],
    ) -> Result<Self, EncodeError> {
        let (expected, found) = (config.server_id_len(), server_id.as_slice().len());
        if expected != found {
            return Err(EncodeError::ServerIdLength { expected, found });
        }
        let mut random = Random::new(seed);
        let share = match partition {
            Partition::Whole => config.nonce_len(),
            Partition::Of256(_) => config.nonce_len() - 1,
        };
        let counter = Counter::new(share.min(MAX_COUNTER_LEN), config.is_encrypted(), &mut random);
        let routable = Box::new(Routable { config, server_id, partition, counter });
        Ok(Self { random, kind: Kind::Routable(routable), fallback_seed: None })
    }

    /// A generator for a server without configuration: config bits 0b111, the length in the first
    /// octet, the rest random. `len` is in octets and kept within 8 to 20, as section 3.1 wants.
    #[must_use]
    pub fn unroutable(len: usize, seed: [u8; 32]) -> Self {
        let kind = Kind::Unroutable { len: clamped(len), shard: None };
        Self { random: Random::new(seed), kind, fallback_seed: None }
    }

    /// As [`Self::unroutable`], for one of several shards.
    #[must_use]
    pub fn unroutable_of_shard(mark: ShardMark, shard: u8, seed: [u8; 32]) -> Self {
        let kind = Kind::Unroutable { len: mark.cid_len(), shard: Some((mark, shard)) };
        Self { random: Random::new(seed), kind, fallback_seed: None }
    }

    /// For callers that cannot handle [`NoncesExhausted`]: after the last nonce, connection IDs of
    /// the same length that are not routable follow.
    #[must_use]
    pub fn or_unroutable(mut self, seed: [u8; 32]) -> Self {
        self.fallback_seed = Some(Seed(Zeroizing::new(seed)));
        self
    }

    /// Octets of every connection ID it makes.
    #[must_use]
    pub const fn cid_len(&self) -> usize {
        match &self.kind {
            Kind::Routable(routable) => routable.config.cid_len(),
            Kind::Unroutable { len, .. } => *len,
        }
    }

    /// Whether `id` may have been made for this server: it decodes to its server ID, or is as
    /// unroutable as all of its connection IDs.
    #[must_use]
    pub fn is_own(&self, id: &[u8]) -> bool {
        match &self.kind {
            Kind::Routable(routable) => {
                routable.config.decode(id).is_some_and(|server| server == routable.server_id)
            }
            Kind::Unroutable { .. } => {
                id.first().is_some_and(|first| first >> 5 == UNROUTABLE_BITS)
            }
        }
    }

    /// The config ID of what it makes; `None` for connection IDs that are not routable.
    #[must_use]
    pub fn config_id(&self) -> Option<ConfigId> {
        match &self.kind {
            Kind::Routable(routable) => Some(routable.config.id()),
            Kind::Unroutable { .. } => None,
        }
    }

    /// A connection ID that this generator has not made before.
    ///
    /// # Errors
    ///
    /// [`NoncesExhausted`] when there is none left.
    pub fn generate(&mut self) -> Result<ConnectionId, NoncesExhausted> {
        let made = self.generate_own();
        if made.is_err()
            && let Some(Seed(seed)) = self.fallback_seed.take()
        {
            *self = Self::unroutable(self.cid_len(), *seed);
            return self.generate_own();
        }
        made
    }

    fn generate_own(&mut self) -> Result<ConnectionId, NoncesExhausted> {
        let mut octets = [0u8; MAX_ENCODED_LEN + 1];
        match &mut self.kind {
            Kind::Routable(routable) => {
                let Routable { config, server_id, partition, counter } = routable.as_mut();
                let nonce = &mut octets[..config.nonce_len()];
                let unique = counter.next().ok_or(NoncesExhausted)?;
                let (front, back) = nonce.split_at_mut(nonce.len() - counter.len);
                self.random.fill(front);
                if let (Partition::Of256(index), Some(first)) = (*partition, front.first_mut()) {
                    *first = index;
                }
                back.copy_from_slice(&unique[..counter.len]);
                Ok(config.encode(server_id, nonce).expect("the lengths were checked in new"))
            }
            Kind::Unroutable { len, shard } => {
                let octets = &mut octets[..*len];
                self.random.fill(octets);
                if let Some((mark, shard)) = shard {
                    let shard = ServerId::new(&[*shard]).expect("one octet");
                    let marked = mark.config.encode(&shard, &octets[2..]);
                    octets
                        .copy_from_slice(&marked.expect("the lengths were set in ShardMark::new"));
                }
                #[expect(clippy::cast_possible_truncation, reason = "at most 20")]
                let own_len = *len as u8 - 1;
                octets[0] = UNROUTABLE_BITS << 5 | own_len;
                Ok(ConnectionId::new(octets).expect("at most 20 octets, clamped in unroutable"))
            }
        }
    }
}

/// A length that connection IDs of servers without configuration may have.
fn clamped(len: usize) -> usize {
    len.clamp(8, connection_id::MAX_LEN)
}

/// Every value of `len` octets once, in an order that starts at random.
#[derive(Debug)]
struct Counter {
    len: usize,
    next: u64,
    /// How many values are left; `None` stands for 2^64.
    left: Option<u64>,
    permutation: Option<FourPass>,
}

impl Counter {
    fn new(len: usize, encrypted: bool, random: &mut Random) -> Self {
        let mut octets = [0; 8];
        random.fill(&mut octets);
        let mut key = [0; 16];
        random.fill(&mut key);
        let permutation = (!encrypted).then(|| FourPass::new(&Key::new(key), len));
        let left = if len < 8 { Some(1u64 << (8 * len)) } else { None };
        Self { len, next: u64::from_le_bytes(octets), left, permutation }
    }

    /// The next value, in the first `len` octets.
    fn next(&mut self) -> Option<[u8; MAX_COUNTER_LEN]> {
        self.left = match self.left {
            Some(0) => return None,
            Some(left) => Some(left - 1),
            None => Some(u64::MAX),
        };
        let mut octets = self.next.to_le_bytes();
        self.next = self.next.wrapping_add(1);
        if let Some(permutation) = &self.permutation {
            permutation.encrypt(&mut octets[..self.len]);
        }
        Some(octets)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn what_follows_cannot_be_read_from_what_is_printed() {
        let generator = CidGenerator::unroutable(8, [7; 32]).or_unroutable([9; 32]);
        let printed = format!("{generator:?}");
        assert!(printed.contains("Seed(masked)") && !printed.contains("9, 9"), "{printed}");
    }

    fn config(nonce_len: usize, key: Option<[u8; 16]>) -> CidConfig {
        CidConfig::new(ConfigId::new(2).unwrap(), 2, nonce_len, key.map(Key::new).as_ref()).unwrap()
    }

    fn generator(
        nonce_len: usize,
        key: Option<[u8; 16]>,
        partition: Partition,
        seed: u8,
    ) -> CidGenerator {
        let server_id = ServerId::new(&[0xaa, 0x55]).unwrap();
        CidGenerator::new(config(nonce_len, key), server_id, partition, [seed; 32]).unwrap()
    }

    #[test]
    fn req_m12_nonces_never_repeat_and_every_cid_decodes_to_the_server() {
        for key in [None, Some([9; 16])] {
            for nonce_len in [4, 8, 9, 17] {
                let config = config(nonce_len, key);
                let mut generator = generator(nonce_len, key, Partition::Whole, 1);
                let mut seen = HashSet::new();
                for _ in 0..20_000 {
                    let cid = generator.generate().unwrap();
                    assert_eq!(config.decode(&cid).unwrap().as_slice(), &[0xaa, 0x55]);
                    assert!(seen.insert(cid));
                }
            }
        }
    }

    #[test]
    fn req_m12_exhaustion_is_an_error_and_comes_after_the_last_nonce() {
        for encrypted in [false, true] {
            let mut counter = Counter::new(2, encrypted, &mut Random::new([3; 32]));
            let mut seen = HashSet::new();
            while let Some(octets) = counter.next() {
                assert!(seen.insert(octets[..2].to_vec()));
            }
            assert_eq!(seen.len(), 1 << 16);
            assert_eq!(counter.next(), None);
        }
    }

    #[test]
    fn req_m12_who_cannot_handle_exhaustion_gets_unroutable_cids_after_it() {
        let mut generator = generator(4, None, Partition::Whole, 1).or_unroutable([2; 32]);
        let Kind::Routable(routable) = &mut generator.kind else { panic!("routable") };
        routable.counter.left = Some(1);
        assert_eq!(generator.generate().unwrap()[0] >> 5, 2);
        let after = generator.generate().unwrap();
        assert_eq!((after[0] >> 5, after.len()), (UNROUTABLE_BITS, 8));
    }

    #[test]
    fn partitions_share_no_cid_even_with_the_same_seed() {
        for key in [None, Some([9; 16])] {
            let mut seen = HashSet::new();
            for index in 0..4 {
                let mut generator = generator(4, key, Partition::Of256(index), 1);
                for _ in 0..5_000 {
                    assert!(seen.insert(generator.generate().unwrap()));
                }
            }
        }
    }

    #[test]
    fn req_m03_nonces_in_the_clear_do_not_count() {
        let mut generator = generator(8, None, Partition::Whole, 1);
        let mut nonce = || {
            let cid = generator.generate().unwrap();
            u64::from_le_bytes(cid[3..11].try_into().unwrap())
        };
        let (first, second) = (nonce(), nonce());
        // Half of 64 bits should differ; a counter would differ in two on average.
        assert!((first ^ second).count_ones() > 12);
    }

    #[test]
    fn req_m10_without_a_config_cids_say_so_and_state_their_length() {
        for (asked, len) in [(0, 8), (8, 8), (13, 13), (20, 20), (99, 20)] {
            let cid = CidGenerator::unroutable(asked, [7; 32]).generate().unwrap();
            assert_eq!(cid.len(), len);
            assert_eq!(cid[0] >> 5, UNROUTABLE_BITS);
            assert_eq!(usize::from(cid[0] & 0x1f) + 1, len);
        }
    }

    #[test]
    fn req_m17_shards_read_their_number_where_no_balancer_reads_anything() {
        for len in [8, 13, 20] {
            let mark = ShardMark::new(len, &Key::new([5; 16]));
            let other = ShardMark::new(len, &Key::new([6; 16]));
            let mut misread = 0;
            for shard in 0..=255 {
                let mut generator = CidGenerator::unroutable_of_shard(mark.clone(), shard, [1; 32]);
                let id = generator.generate().unwrap();
                assert_eq!((id.len(), id[0] >> 5), (len, UNROUTABLE_BITS));
                assert_eq!(mark.shard(&id), Some(shard));
                misread += usize::from(other.shard(&id) == Some(shard));
                assert_ne!(id, generator.generate().unwrap());
            }
            assert!(misread < 16, "the number is there to be read without the key");
            assert_eq!(mark.shard(&[0; 20]), None);
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_cids() {
        let cids = |seed| {
            let mut generator = generator(12, None, Partition::Whole, seed);
            [(); 4].map(|()| generator.generate().unwrap())
        };
        assert_eq!(cids(1), cids(1));
        assert_ne!(cids(1), cids(2));
    }
}
