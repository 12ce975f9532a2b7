//! What comes due with time in a connection.

/// A timer of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Timer {
    /// The closing or draining period is over.
    End,
    /// Nothing was heard for too long.
    Idle,
    /// The handshake takes too long.
    Handshake,
    /// A path's challenge is to be repeated, or its validation has failed.
    PathValidation,
    /// Nothing was said for so long that the peer, or a NAT, might forget the connection.
    KeepAlive,
    /// Packets count as lost, or a probe is due.
    Loss,
    /// The pacer lets another datagram leave.
    Pacing,
    /// An acknowledgment has waited long enough.
    Ack,
    /// The path may carry larger datagrams than when that was last tried.
    MtuSearch,
    /// Keys of the former phase are of no more use.
    KeyDiscard,
    /// There was no traffic for so long that its memory is given back.
    Rest,
}

impl Timer {
    /// In the order in which they are looked at when several are due: those first that end a
    /// connection, then what moves it to another path, by which the others go.
    pub const ALL: [Self; 11] = [
        Self::End,
        Self::Idle,
        Self::Handshake,
        Self::PathValidation,
        Self::KeepAlive,
        Self::Loss,
        Self::Pacing,
        Self::Ack,
        Self::MtuSearch,
        Self::KeyDiscard,
        Self::Rest,
    ];
}
