//! The three packet number spaces.
//!
//! <https://www.rfc-editor.org/rfc/rfc9000.html#section-12.3>

/// A packet number space. 0-RTT packets share the last one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Space {
    /// Of Initial packets.
    Initial,
    /// Of Handshake packets.
    Handshake,
    /// Of 1-RTT packets.
    Data,
}

impl Space {
    pub(crate) const ALL: [Self; 3] = [Self::Initial, Self::Handshake, Self::Data];

    pub(crate) const fn index(self) -> usize {
        self as usize
    }
}
