//! The randomness of this crate: a generator whose seed comes from the caller, so that the same
//! seed gives the same octets.

use aes::{Aes128Enc, Block, cipher::BlockCipherEncrypt};

use crate::wiped::Wiped;

/// AES-128 in counter mode over a seed, without a source of entropy inside.
pub struct Random {
    cipher: Wiped<Aes128Enc>,
    counter: u128,
}

impl Random {
    /// The generator of `seed`, which has to come from a cryptographic source; no two generators
    /// that run at once may share it.
    #[must_use]
    pub fn new(seed: [u8; 32]) -> Self {
        let mut halves = [[0u8; 16]; 2];
        halves[0].copy_from_slice(&seed[..16]);
        halves[1].copy_from_slice(&seed[16..]);
        Self { cipher: Wiped::new(&halves[0].into()), counter: u128::from_le_bytes(halves[1]) }
    }

    /// Fills `out` with random octets.
    pub fn fill(&mut self, out: &mut [u8]) {
        for chunk in out.chunks_mut(16) {
            let mut block: Block = self.counter.to_le_bytes().into();
            self.counter = self.counter.wrapping_add(1);
            self.cipher.encrypt_block(&mut block);
            chunk.copy_from_slice(&block[..chunk.len()]);
        }
    }

    /// `N` random octets.
    pub fn octets<const N: usize>(&mut self) -> [u8; N] {
        let mut octets = [0; N];
        self.fill(&mut octets);
        octets
    }

    /// A random number.
    pub fn number(&mut self) -> u64 {
        u64::from_le_bytes(self.octets())
    }

    /// A number in `0..bound`; the bias is below 2^-32 for the small bounds in use.
    #[cfg(feature = "transport")]
    pub(crate) fn below(&mut self, bound: u32) -> u32 {
        u32::try_from(self.number() % u64::from(bound.max(1))).unwrap_or(0)
    }
}

impl std::fmt::Debug for Random {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Random(masked)")
    }
}
