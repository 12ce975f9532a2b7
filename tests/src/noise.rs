//! Datagrams that nobody should send, drawn from a seed that replays them.

/// Where the noise of a test starts: `NOISE_SEED`, or something new each time.
///
/// # Errors
///
/// When `NOISE_SEED` is not a number or the system has no randomness.
pub fn seed() -> anyhow::Result<u64> {
    if let Ok(seed) = std::env::var("NOISE_SEED") {
        return Ok(seed.parse()?);
    }
    let mut seed = [0; 8];
    getrandom::fill(&mut seed).map_err(|error| anyhow::anyhow!("no randomness: {error}"))?;
    Ok(u64::from_ne_bytes(seed))
}

/// The longest datagram of [`datagrams`].
pub const MAX_LENGTH: u64 = 1500;

/// `count` datagrams: the empty one, each first octet at each length class, long headers cut off at
/// every field, connection IDs of 255 octets and plain random ones, in turn.
pub fn datagrams(seed: u64, count: usize) -> impl Iterator<Item = Vec<u8>> {
    let mut random = Random(seed);
    (0..count).map(move |nth| match nth % 4 {
        0 => {
            let length = random.below(MAX_LENGTH + 1);
            random.octets(length)
        }
        // Every first octet, at lengths around the borders of the invariants.
        1 => {
            let first = u8::try_from(nth / 4 % 256).expect("below 256");
            let length = [1, 2, 5, 6, 7, 9, 21, 22, 23, 1200][nth / 4 % 10];
            let mut octets = random.octets(length);
            octets[0] = first;
            octets
        }
        // A long header of version 1 that ends somewhere.
        2 => {
            let mut octets = long_header(&mut random, 1, 8, 8);
            let end = random.below(octets.len() as u64 + 1);
            octets.truncate(usize::try_from(end).expect("at most its length"));
            octets
        }
        // The longest connection IDs, in a version that nobody knows.
        _ => {
            let version = random.version();
            long_header(&mut random, version, 255, 255)
        }
    })
}

fn long_header(random: &mut Random, version: u32, dcid: u8, scid: u8) -> Vec<u8> {
    let mut octets = vec![0xc0 | random.octet()];
    octets.extend_from_slice(&version.to_be_bytes());
    for length in [dcid, scid] {
        octets.push(length);
        octets.extend(random.octets(length.into()));
    }
    let length = random.below(MAX_LENGTH - 600);
    octets.extend(random.octets(length));
    octets
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn octet(&mut self) -> u8 {
        self.next().to_be_bytes()[0]
    }

    fn version(&mut self) -> u32 {
        u32::from_be_bytes([(); 4].map(|()| self.octet()))
    }

    fn octets(&mut self, length: u64) -> Vec<u8> {
        (0..length).map(|_| self.octet()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_makes_the_same_noise() {
        let noise = |seed| datagrams(seed, 100).collect::<Vec<_>>();
        assert_eq!(noise(1), noise(1));
        assert_ne!(noise(1), noise(2));
    }

    #[test]
    fn noise_has_every_first_octet_and_keeps_within_its_length() {
        let noise: Vec<_> = datagrams(1, 1024).collect();
        assert!(noise.iter().all(|octets| octets.len() as u64 <= MAX_LENGTH));
        for first in 0..=255 {
            assert!(noise.iter().any(|octets| octets.first() == Some(&first)), "{first:#x}");
        }
    }
}
