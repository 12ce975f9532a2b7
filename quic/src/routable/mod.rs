//! Routable connection IDs: the server's identity inside the connection ID, in the clear or
//! encrypted, so that a load balancer that has never seen a connection knows where it lives.
//!
//! Everything here follows draft-ietf-quic-load-balancers-21, section 5, and nothing outside this
//! module depends on that draft. Octet 0 holds a [`ConfigId`] in its top three bits; the octets
//! after it hold server ID and nonce, as one [`CidConfig`] says; what follows is the server's own.
//!
//! A balancer holds a [`Decoder`], a server a [`CidGenerator`]; both are built from [`CidConfig`].

mod codec;
mod decoder;
mod generator;

use std::fmt;

use zeroize::Zeroize;

pub use codec::CidConfig;
pub use decoder::{Decoded, Decoder, Unroutable};
pub use generator::{CidGenerator, NoncesExhausted, Partition, ShardMark};

/// The longest server ID: 19 octets less the shortest nonce.
pub const MAX_SERVER_ID_LEN: usize = 15;
/// The shortest nonce, in octets.
pub const MIN_NONCE_LEN: usize = 4;
/// The most octets that server ID and nonce may have together.
pub const MAX_ENCODED_LEN: usize = 19;
/// The config bits that say "not routable: use the 4-tuple".
pub const UNROUTABLE_BITS: u8 = 0b111;

/// Which of up to seven configurations a connection ID was made with: 0 to 6.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ConfigId(u8);

impl ConfigId {
    /// The number of configurations that can be alive at once.
    pub const COUNT: usize = 7;

    /// `None` for 7, which means "not routable", and above.
    #[must_use]
    pub const fn new(id: u8) -> Option<Self> {
        if (id as usize) < Self::COUNT { Some(Self(id)) } else { None }
    }

    /// The config ID in the first octet of a connection ID; `None` for 0b111.
    #[must_use]
    pub const fn from_first_octet(octet: u8) -> Option<Self> {
        Self::new(octet >> 5)
    }

    /// The number, 0 to 6.
    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }

    const fn index(self) -> usize {
        self.0 as usize
    }

    const fn bits(self) -> u8 {
        self.0 << 5
    }
}

impl fmt::Display for ConfigId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a routable connection ID says about its server: 1 to 15 octets.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServerId {
    octets: [u8; MAX_SERVER_ID_LEN],
    len: u8,
}

impl ServerId {
    /// `None` unless there are 1 to [`MAX_SERVER_ID_LEN`] octets.
    #[must_use]
    pub fn new(octets: &[u8]) -> Option<Self> {
        if octets.is_empty() {
            return None;
        }
        let mut id = Self { octets: [0; MAX_SERVER_ID_LEN], len: u8::try_from(octets.len()).ok()? };
        id.octets.get_mut(..octets.len())?.copy_from_slice(octets);
        Some(id)
    }

    /// The octets.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.octets[..usize::from(self.len)]
    }
}

impl fmt::Display for ServerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_slice().iter().try_for_each(|octet| write!(f, "{octet:02x}"))
    }
}

impl fmt::Debug for ServerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServerId({self})")
    }
}

/// An AES-128 key shared by servers and balancers. Its octets are never printed, and end with it.
#[derive(Clone, PartialEq, Eq)]
pub struct Key([u8; 16]);

impl Key {
    /// A key of these octets.
    #[must_use]
    pub const fn new(octets: [u8; 16]) -> Self {
        Self(octets)
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(masked)")
    }
}

/// Lengths that the format cannot carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidConfig {
    /// The server ID has no octets or more than fit.
    #[error("a server ID has 1 to {MAX_SERVER_ID_LEN} bytes, not {0}")]
    ServerIdLength(usize),
    /// The nonce is too short.
    #[error("a nonce has at least {MIN_NONCE_LEN} bytes, not {0}")]
    NonceLength(usize),
    /// Together they exceed a connection ID.
    #[error("server ID and nonce have at most {MAX_ENCODED_LEN} bytes together, not {0}")]
    EncodedLength(usize),
}

/// Why a connection ID cannot be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// The server ID is not as long as the configuration says.
    #[error("the configuration wants a server ID of {expected} bytes, not {found}")]
    ServerIdLength {
        /// What the configuration says.
        expected: usize,
        /// What was given.
        found: usize,
    },
    /// The nonce is not as long as the configuration says.
    #[error("the configuration wants a nonce of {expected} bytes, not {found}")]
    NonceLength {
        /// What the configuration says.
        expected: usize,
        /// What was given.
        found: usize,
    },
}
