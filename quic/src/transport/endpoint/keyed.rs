//! The hasher of an endpoint's tables.

use std::hash::BuildHasher;

use siphasher::sip::SipHasher13;

use crate::random::Random;

/// SipHash with keys from the endpoint's seed: peers choose what is hashed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Keyed {
    keys: (u64, u64),
}

impl Keyed {
    pub(super) fn new(random: &mut Random) -> Self {
        Self { keys: (random.number(), random.number()) }
    }
}

impl BuildHasher for Keyed {
    type Hasher = SipHasher13;

    fn build_hasher(&self) -> SipHasher13 {
        SipHasher13::new_with_keys(self.keys.0, self.keys.1)
    }
}
