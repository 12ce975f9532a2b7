//! Stream IDs: who opened the stream, which way it carries data, and its number.
//!
//! <https://www.rfc-editor.org/rfc/rfc9000.html#section-2.1>

use std::fmt;

/// Which of the two endpoints of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The endpoint that sent the first Initial.
    Client,
    /// The endpoint that answered it.
    Server,
}

impl Side {
    /// The other one.
    #[must_use]
    pub const fn peer(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }

    pub(crate) const fn is_client(self) -> bool {
        matches!(self, Self::Client)
    }

    pub(crate) const fn is_server(self) -> bool {
        matches!(self, Self::Server)
    }
}

/// Whether a stream carries data both ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dir {
    /// Both ways.
    Bi,
    /// From the endpoint that opened it.
    Uni,
}

impl Dir {
    pub(crate) const BOTH: [Self; 2] = [Self::Bi, Self::Uni];

    pub(crate) const fn index(self) -> usize {
        self as usize
    }
}

/// The ID of a stream.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(u64);

impl StreamId {
    /// The stream that `initiator` opened as its `index`th of this direction, from 0.
    #[must_use]
    pub const fn new(initiator: Side, dir: Dir, index: u64) -> Self {
        Self(index << 2 | (dir as u64) << 1 | initiator as u64)
    }

    pub(crate) const fn from_wire(number: u64) -> Self {
        Self(number)
    }

    /// The number on the wire.
    #[must_use]
    pub const fn to_wire(self) -> u64 {
        self.0
    }

    /// Who opened it.
    #[must_use]
    pub const fn initiator(self) -> Side {
        if self.0 & 1 == 0 { Side::Client } else { Side::Server }
    }

    /// Which way it carries data.
    #[must_use]
    pub const fn dir(self) -> Dir {
        if self.0 & 2 == 0 { Dir::Bi } else { Dir::Uni }
    }

    /// How many streams of its kind were opened before it.
    #[must_use]
    pub const fn index(self) -> u64 {
        self.0 >> 2
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StreamId({:?} {:?} {})", self.initiator(), self.dir(), self.index())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn req_g01_the_two_low_bits_say_who_and_which_way() {
        for (number, side, dir) in [
            (0, Side::Client, Dir::Bi),
            (1, Side::Server, Dir::Bi),
            (2, Side::Client, Dir::Uni),
            (3, Side::Server, Dir::Uni),
        ] {
            let id = StreamId::from_wire(number + 4 * 7);
            assert_eq!((id.initiator(), id.dir(), id.index()), (side, dir, 7));
            assert_eq!(StreamId::new(side, dir, 7), id);
        }
    }
}
