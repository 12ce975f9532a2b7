//! A connection ID as a value: at most 20 octets, kept in place, cheap to copy and compare.

use std::fmt;

/// The longest connection ID of QUIC versions 1 and 2, in octets.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-17.2>
pub const MAX_LEN: usize = 20;

/// A connection ID of 0 to 20 octets.
///
/// Octets past the length are always zero, so comparing and hashing the whole value is sound.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct ConnectionId {
    octets: [u8; MAX_LEN],
    len: u8,
}

impl ConnectionId {
    /// Copies `octets`; `None` when there are more than [`MAX_LEN`].
    #[must_use]
    pub fn new(octets: &[u8]) -> Option<Self> {
        let mut id = Self { octets: [0; MAX_LEN], len: u8::try_from(octets.len()).ok()? };
        id.octets.get_mut(..octets.len())?.copy_from_slice(octets);
        Some(id)
    }

    /// The octets on the wire.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.octets[..usize::from(self.len)]
    }
}

impl std::ops::Deref for ConnectionId {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl AsRef<[u8]> for ConnectionId {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_slice().iter().try_for_each(|octet| write!(f, "{octet:02x}"))
    }
}

impl fmt::Debug for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ConnectionId({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twenty_octets_fit_and_one_more_does_not() {
        assert_eq!(ConnectionId::new(&[7; 20]).map(|id| id.len()), Some(20));
        assert_eq!(ConnectionId::new(&[7; 21]), None);
        assert_eq!(ConnectionId::new(&[]), Some(ConnectionId::default()));
    }
}
