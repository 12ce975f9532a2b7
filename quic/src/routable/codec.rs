//! One configuration: how server ID and nonce become the octets of a connection ID, and back.
//!
//! Without a key the octets stand in the clear. With one, sixteen octets are a single AES block;
//! any other number goes through four rounds of a Feistel network whose round function is one AES
//! encryption (draft-ietf-quic-load-balancers-21, section 5.4).

use aes::{
    Aes128Dec, Aes128Enc, Block,
    cipher::{BlockCipherDecrypt, BlockCipherEncrypt},
};

use super::{
    ConfigId, EncodeError, InvalidConfig, Key, MAX_ENCODED_LEN, MAX_SERVER_ID_LEN, MIN_NONCE_LEN,
    ServerId,
};
use crate::{connection_id::ConnectionId, wiped::Wiped};

/// The number of octets that one AES block covers.
const BLOCK_LEN: usize = 16;

/// How the connection IDs of one config ID are laid out and encrypted.
#[derive(Clone, Debug)]
pub struct CidConfig {
    id: ConfigId,
    server_id_len: u8,
    nonce_len: u8,
    /// The octets of the server ID within a [`load`]ed text.
    server_id_mask: u128,
    method: Method,
}

#[derive(Clone, Debug)]
enum Method {
    Clear,
    SinglePass(Box<SinglePass>),
    FourPass(Box<FourPass>),
}

#[derive(Clone)]
struct SinglePass {
    encrypt: Wiped<Aes128Enc>,
    decrypt: Wiped<Aes128Dec>,
}

impl std::fmt::Debug for SinglePass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SinglePass(masked)")
    }
}

impl CidConfig {
    /// A configuration for `id`. Without a key, connection IDs are in the clear.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig`] for lengths (in octets) that the format cannot carry.
    pub fn new(
        id: ConfigId,
        server_id_len: usize,
        nonce_len: usize,
        key: Option<&Key>,
    ) -> Result<Self, InvalidConfig> {
        if !(1..=MAX_SERVER_ID_LEN).contains(&server_id_len) {
            return Err(InvalidConfig::ServerIdLength(server_id_len));
        }
        if nonce_len < MIN_NONCE_LEN {
            return Err(InvalidConfig::NonceLength(nonce_len));
        }
        let encoded_len = server_id_len.saturating_add(nonce_len);
        if encoded_len > MAX_ENCODED_LEN {
            return Err(InvalidConfig::EncodedLength(encoded_len));
        }
        let method = match key {
            None => Method::Clear,
            Some(Key(key)) if encoded_len == BLOCK_LEN => {
                Method::SinglePass(Box::new(SinglePass {
                    encrypt: Wiped::new(key.into()),
                    decrypt: Wiped::new(key.into()),
                }))
            }
            Some(key) => Method::FourPass(Box::new(FourPass::new(key, encoded_len))),
        };
        let server_id_mask = (1 << (8 * server_id_len)) - 1;
        #[expect(clippy::cast_possible_truncation, reason = "both are at most 19, checked above")]
        let (server_id_len, nonce_len) = (server_id_len as u8, nonce_len as u8);
        Ok(Self { id, server_id_len, nonce_len, server_id_mask, method })
    }

    /// The config ID.
    #[must_use]
    pub const fn id(&self) -> ConfigId {
        self.id
    }

    /// Octets of a server ID.
    #[must_use]
    pub const fn server_id_len(&self) -> usize {
        self.server_id_len as usize
    }

    /// Octets of a nonce.
    #[must_use]
    pub const fn nonce_len(&self) -> usize {
        self.nonce_len as usize
    }

    /// Octets of a connection ID that ends with the nonce: one more than server ID and nonce.
    #[must_use]
    pub const fn cid_len(&self) -> usize {
        1 + self.encoded_len()
    }

    /// Whether connection IDs are encrypted.
    #[must_use]
    pub const fn is_encrypted(&self) -> bool {
        !matches!(self.method, Method::Clear)
    }

    const fn encoded_len(&self) -> usize {
        self.server_id_len() + self.nonce_len()
    }

    /// A connection ID whose first octet states its own length.
    ///
    /// # Errors
    ///
    /// [`EncodeError`] when `server_id` or `nonce` is not as long as this configuration says.
    pub fn encode(&self, server_id: &ServerId, nonce: &[u8]) -> Result<ConnectionId, EncodeError> {
        let server_id = server_id.as_slice();
        if server_id.len() != self.server_id_len() {
            let (expected, found) = (self.server_id_len(), server_id.len());
            return Err(EncodeError::ServerIdLength { expected, found });
        }
        if nonce.len() != self.nonce_len() {
            let (expected, found) = (self.nonce_len(), nonce.len());
            return Err(EncodeError::NonceLength { expected, found });
        }
        let mut octets = [0u8; 1 + MAX_ENCODED_LEN];
        let encoded = &mut octets[1..self.cid_len()];
        encoded[..server_id.len()].copy_from_slice(server_id);
        encoded[server_id.len()..].copy_from_slice(nonce);
        match &self.method {
            Method::Clear => {}
            Method::SinglePass(cipher) => {
                let mut block = Block::default();
                block.copy_from_slice(encoded);
                cipher.encrypt.encrypt_block(&mut block);
                encoded.copy_from_slice(&block);
            }
            Method::FourPass(cipher) => cipher.encrypt(encoded),
        }
        octets[0] = self.id.bits() | (self.server_id_len + self.nonce_len);
        Ok(ConnectionId::new(&octets[..self.cid_len()]).expect("at most 20 octets, checked in new"))
    }

    /// The server ID in `cid`, which may be longer than this configuration needs. `None` when it
    /// is shorter. The config bits are not looked at.
    #[must_use]
    pub fn decode(&self, cid: &[u8]) -> Option<ServerId> {
        let [server_id] = self.decode_lanes(&[Some(cid)]);
        server_id
    }

    /// This configuration, with the first octet of the nonce as the last one of the server ID: what
    /// it decodes shows the [`Partition`](super::Partition) too. `None` where that is too long.
    #[cfg(feature = "driver")]
    pub(crate) fn with_partition(&self) -> Option<Self> {
        let server_id_len = self.server_id_len + 1;
        if usize::from(server_id_len) > MAX_SERVER_ID_LEN {
            return None;
        }
        Some(Self {
            server_id_len,
            nonce_len: self.nonce_len - 1,
            server_id_mask: (1 << (8 * server_id_len)) - 1,
            ..self.clone()
        })
    }

    /// [`CidConfig::decode`] for up to `N` connection IDs at once, so that the cipher works on
    /// independent blocks side by side. Entries of `cids` that are too short stay `None`.
    pub(super) fn decode_lanes<const N: usize>(
        &self,
        cids: &[Option<&[u8]>; N],
    ) -> [Option<ServerId>; N] {
        let long_enough = cids.map(|cid| cid.filter(|cid| cid.len() >= self.cid_len()));
        let texts: [u128; N] = match &self.method {
            Method::Clear => long_enough.map(|cid| cid.map_or(0, |cid| load(cid, 1))),
            Method::SinglePass(cipher) => {
                let mut blocks = long_enough
                    .map(|cid| Block::from(cid.map_or(0, |cid| load(cid, 1)).to_le_bytes()));
                if N == 1 {
                    cipher.decrypt.decrypt_block(&mut blocks[0]);
                } else {
                    cipher.decrypt.decrypt_blocks(&mut blocks);
                }
                blocks.map(|block| u128::from_le_bytes(block.into()))
            }
            Method::FourPass(cipher) => {
                let mut halves =
                    long_enough.map(|cid| cid.map_or((0, 0), |cid| cipher.split(cid, 1)));
                cipher.decrypt(&mut halves, self.needs_first_pass());
                halves.map(|halves| cipher.join_front(halves))
            }
        };
        std::array::from_fn(|lane| long_enough[lane].map(|_| self.server_id(texts[lane])))
    }

    /// The server ID spills into the right half only when it is longer than the nonce; otherwise
    /// the pass that restores the right half can be left out.
    const fn needs_first_pass(&self) -> bool {
        self.server_id_len > self.nonce_len
    }

    fn server_id(&self, text: u128) -> ServerId {
        let mut octets = [0; MAX_SERVER_ID_LEN];
        octets.copy_from_slice(&(text & self.server_id_mask).to_le_bytes()[..MAX_SERVER_ID_LEN]);
        ServerId { octets, len: self.server_id_len }
    }
}

/// Sixteen octets of `octets` from `at` on as a little-endian integer, zeros behind the end. What
/// follows the wanted octets is loaded too and masked by callers: in a packet there nearly always
/// is something, and a load of fixed size is what makes decoding fast.
#[inline]
fn load(octets: &[u8], at: usize) -> u128 {
    if let Some(chunk) = octets.get(at..).and_then(|rest| rest.first_chunk::<16>()) {
        return u128::from_le_bytes(*chunk);
    }
    let rest = octets.get(at..).unwrap_or_default();
    let mut padded = [0; 16];
    padded[..rest.len()].copy_from_slice(rest);
    u128::from_le_bytes(padded)
}

/// Four passes over two halves, for lengths other than one block.
///
/// Halves are held as little-endian integers: octet `n` of a half is bits `8n..8n+8`. When the
/// length is odd the middle octet is shared: the left half keeps its high four bits, the right
/// half its low four.
#[derive(Clone)]
pub(super) struct FourPass {
    cipher: Wiped<Aes128Enc>,
    len: u8,
    left_mask: u128,
    right_mask: u128,
}

impl std::fmt::Debug for FourPass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FourPass(masked)")
    }
}

impl FourPass {
    /// For texts of `len` octets, 2 to 19.
    pub(super) fn new(Key(key): &Key, len: usize) -> Self {
        debug_assert!((2..=MAX_ENCODED_LEN).contains(&len));
        let half = len.div_ceil(2);
        let half_mask = (1u128 << (8 * half)) - 1;
        let (left_mask, right_mask) = if len.is_multiple_of(2) {
            (half_mask, half_mask)
        } else {
            (half_mask & !(0x0f << (8 * (half - 1))), half_mask & !0xf0)
        };
        #[expect(clippy::cast_possible_truncation, reason = "at most 19")]
        Self { cipher: Wiped::new(key.into()), len: len as u8, left_mask, right_mask }
    }

    /// Encrypts `text`, which has the length given at construction, in place.
    pub(super) fn encrypt(&self, text: &mut [u8]) {
        let (mut left, mut right) = self.split(text, 0);
        right ^= self.round(left, 1) & self.right_mask;
        left ^= self.round(right, 2) & self.left_mask;
        right ^= self.round(left, 3) & self.right_mask;
        left ^= self.round(right, 4) & self.left_mask;
        text.copy_from_slice(&self.join((left, right))[..usize::from(self.len)]);
    }

    /// Undoes the passes 4, 3, 2 and, if `first_pass`, 1 on every pair of halves.
    fn decrypt<const N: usize>(&self, halves: &mut [(u128, u128); N], first_pass: bool) {
        self.pass(halves, 4, |(_, right)| *right, |(left, _), f| *left ^= f & self.left_mask);
        self.pass(halves, 3, |(left, _)| *left, |(_, right), f| *right ^= f & self.right_mask);
        self.pass(halves, 2, |(_, right)| *right, |(left, _), f| *left ^= f & self.left_mask);
        if first_pass {
            self.pass(halves, 1, |(left, _)| *left, |(_, right), f| *right ^= f & self.right_mask);
        }
    }

    #[inline]
    fn pass<const N: usize>(
        &self,
        halves: &mut [(u128, u128); N],
        pass: u8,
        from: impl Fn(&(u128, u128)) -> u128,
        into: impl Fn(&mut (u128, u128), u128),
    ) {
        let mut blocks: [Block; N] =
            std::array::from_fn(|lane| self.block(from(&halves[lane]), pass));
        if N == 1 {
            self.cipher.encrypt_block(&mut blocks[0]);
        } else {
            self.cipher.encrypt_blocks(&mut blocks);
        }
        for (lane, block) in halves.iter_mut().zip(blocks) {
            into(lane, u128::from_le_bytes(block.into()));
        }
    }

    fn round(&self, half: u128, pass: u8) -> u128 {
        let mut block = self.block(half, pass);
        self.cipher.encrypt_block(&mut block);
        u128::from_le_bytes(block.into())
    }

    /// The half, zeros up to 14 octets, the length, the number of the pass.
    fn block(&self, half: u128, pass: u8) -> Block {
        (half | u128::from(self.len) << (8 * 14) | u128::from(pass) << (8 * 15))
            .to_le_bytes()
            .into()
    }

    /// The halves of the text that starts at `at` in `octets`.
    fn split(&self, octets: &[u8], at: usize) -> (u128, u128) {
        let left = load(octets, at) & self.left_mask;
        let right = load(octets, at + self.right_start()) & self.right_mask;
        (left, right)
    }

    /// The first sixteen octets of the text, which hold the longest server ID.
    fn join_front(&self, (left, right): (u128, u128)) -> u128 {
        left | right << (8 * self.right_start())
    }

    /// The whole text, in the first octets of what is returned.
    fn join(&self, (left, right): (u128, u128)) -> [u8; 32] {
        let start = self.right_start();
        let mut octets = [0u8; 32];
        octets[start..start + 16].copy_from_slice(&right.to_le_bytes());
        for (octet, left) in octets.iter_mut().zip(left.to_le_bytes()) {
            *octet |= left;
        }
        octets
    }

    const fn right_start(&self) -> usize {
        self.len as usize / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
            .collect()
    }

    fn key(text: &str) -> Key {
        Key::new(hex(text).try_into().unwrap())
    }

    const DRAFT_KEY: &str = "8f95f09245765f80256934e50c66207f";

    /// draft-ietf-quic-load-balancers-21, appendix with test vectors; rows: config ID, key, server
    /// ID, nonce, connection ID. The draft prints the first octet of the last row as 12; config ID
    /// 3 with 18 octets to follow gives 72.
    const VECTORS: [(u8, Option<&str>, &str, &str, &str); 5] = [
        (0, None, "c4605e", "4504cc4f", "07c4605e4504cc4f"),
        (0, Some(DRAFT_KEY), "ed793a", "ee080dbf", "0720b1d07b359d3c"),
        (
            1,
            Some(DRAFT_KEY),
            "ed793a51d49b8f5fab65",
            "ee080dbf48",
            "2fcc381bc74cb4fbad2823a3d1f8fed2",
        ),
        (
            2,
            Some(DRAFT_KEY),
            "ed793a51d49b8f5f",
            "ee080dbf48c0d1e5",
            "504dd2d05a7b0de9b2b9907afb5ecf8cc3",
        ),
        (
            3,
            Some(DRAFT_KEY),
            "ed793a51d49b8f5fab",
            "ee080dbf48c0d1e55d",
            "725779c9cc86beb3a3a4a3ca96fce4bfe0cdbc",
        ),
    ];

    #[test]
    fn req_m01_m04_m05_m06_published_vectors_encode_and_decode() {
        for (id, key_text, server_id, nonce, cid) in VECTORS {
            let (server_id, nonce, cid) = (hex(server_id), hex(nonce), hex(cid));
            let key = key_text.map(key);
            let config = CidConfig::new(
                ConfigId::new(id).unwrap(),
                server_id.len(),
                nonce.len(),
                key.as_ref(),
            )
            .unwrap();
            let server_id = ServerId::new(&server_id).unwrap();
            assert_eq!(config.encode(&server_id, &nonce).unwrap().as_slice(), cid);
            assert_eq!(config.decode(&cid), Some(server_id));
            assert_eq!(
                config.decode_lanes(&[Some(&cid), None, Some(&cid)]),
                [Some(server_id), None, Some(server_id)]
            );
        }
    }

    /// The worked example of section 5.4.2, its intermediate values included.
    #[test]
    fn the_worked_example_passes_through_the_published_halves() {
        let cipher = FourPass::new(&key("fdf726a9893ec05c0632d3956680baf0"), 7);
        let half = |text: &str| {
            let mut octets = [0; 16];
            octets[..4].copy_from_slice(&hex(text));
            u128::from_le_bytes(octets)
        };
        let mut text = hex("31441a9c69c275");
        let (left_0, right_0) = cipher.split(&text, 0);
        assert_eq!((left_0, right_0), (half("31441a90"), half("0c69c275")));
        let right_1 = right_0 ^ cipher.round(left_0, 1) & cipher.right_mask;
        assert_eq!(right_1, half("0e3c1ff9"));
        let left_1 = left_0 ^ cipher.round(right_1, 2) & cipher.left_mask;
        assert_eq!(left_1, half("d4a04850"));
        cipher.encrypt(&mut text);
        assert_eq!(text, hex("67947d29be054a"));
    }

    #[test]
    fn req_m02_lengths_at_the_borders() {
        let new = |server_id, nonce| {
            CidConfig::new(ConfigId::new(0).unwrap(), server_id, nonce, None)
                .map(|config| config.cid_len())
        };
        assert_eq!(new(1, 4), Ok(6));
        assert_eq!(new(15, 4), Ok(20));
        assert_eq!(new(1, 18), Ok(20));
        assert_eq!(new(0, 4), Err(InvalidConfig::ServerIdLength(0)));
        assert_eq!(new(16, 4), Err(InvalidConfig::ServerIdLength(16)));
        assert_eq!(new(1, 3), Err(InvalidConfig::NonceLength(3)));
        assert_eq!(new(15, 5), Err(InvalidConfig::EncodedLength(20)));
        assert_eq!(new(1, usize::MAX), Err(InvalidConfig::EncodedLength(usize::MAX)));
    }

    #[test]
    fn wrong_lengths_are_refused_by_name() {
        let config = CidConfig::new(ConfigId::new(0).unwrap(), 2, 4, None).unwrap();
        let (two, three) = (ServerId::new(&[1; 2]).unwrap(), ServerId::new(&[1; 3]).unwrap());
        assert_eq!(
            config.encode(&three, &[0; 4]),
            Err(EncodeError::ServerIdLength { expected: 2, found: 3 })
        );
        assert_eq!(
            config.encode(&two, &[0; 5]),
            Err(EncodeError::NonceLength { expected: 4, found: 5 })
        );
    }

    #[test]
    fn secrets_are_never_printed() {
        let secret = key(DRAFT_KEY);
        let config = CidConfig::new(ConfigId::new(0).unwrap(), 2, 6, Some(&secret)).unwrap();
        for text in [format!("{config:?}"), format!("{secret:?}")] {
            assert!(text.contains("masked") && !text.contains("143"), "{text}");
        }
    }

    /// Every legal pair of lengths, with and without key: 180 configurations.
    fn every_config(key: &Key) -> impl Iterator<Item = CidConfig> {
        let id = ConfigId::new(3).unwrap();
        (1..=MAX_SERVER_ID_LEN)
            .flat_map(|server_id| {
                (MIN_NONCE_LEN..=MAX_ENCODED_LEN - server_id).map(move |n| (server_id, n))
            })
            .flat_map(move |(s, n)| [None, Some(key.clone())].map(|key| (s, n, key)))
            .map(move |(s, n, key)| {
                let config = CidConfig::new(id, s, n, key.as_ref()).unwrap();
                assert_eq!(config.is_encrypted(), key.is_some());
                config
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn decode_undoes_encode_for_every_legal_config(
            key_octets in any::<[u8; 16]>(),
            octets in any::<[u8; 40]>(),
            tail in proptest::collection::vec(any::<u8>(), 0..8),
        ) {
            for config in every_config(&Key::new(key_octets)) {
                let server_id = ServerId::new(&octets[..config.server_id_len()]).unwrap();
                let nonce = &octets[20..20 + config.nonce_len()];
                let cid = config.encode(&server_id, nonce).unwrap();
                prop_assert_eq!(cid.len(), config.cid_len());
                prop_assert_eq!(usize::from(cid[0] & 0x1f) + 1, cid.len());
                let mut longer = cid.to_vec();
                longer.extend_from_slice(&tail);
                prop_assert_eq!(config.decode(&longer), Some(server_id));
                prop_assert_eq!(config.decode_lanes(&[Some(&longer), Some(&cid[..cid.len() - 1])]), [Some(server_id), None]);
                prop_assert_eq!(config.decode(&cid[..cid.len() - 1]), None);
            }
        }

        #[test]
        fn an_encrypted_cid_shows_neither_server_id_nor_nonce(
            key_octets in any::<[u8; 16]>(),
            octets in any::<[u8; 40]>(),
        ) {
            // Ten octets and more: a chance match is out of reach.
            for config in every_config(&Key::new(key_octets)).filter(|c| c.is_encrypted() && c.cid_len() > 10) {
                let server_id = ServerId::new(&octets[..config.server_id_len()]).unwrap();
                let cid = config.encode(&server_id, &octets[20..20 + config.nonce_len()]).unwrap();
                let mut clear = octets[..config.server_id_len()].to_vec();
                clear.extend_from_slice(&octets[20..20 + config.nonce_len()]);
                prop_assert_ne!(&cid[1..], clear.as_slice());
            }
        }
    }
}
