//! ECN marks, as the IP header carries them.

/// An ECN codepoint other than Not-ECT.
///
/// <https://www.rfc-editor.org/rfc/rfc3168.html#section-5>
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ecn {
    /// ECN-capable transport, the codepoint that QUIC uses.
    Ect0,
    /// ECN-capable transport, for L4S.
    Ect1,
    /// Congestion experienced.
    Ce,
}

impl Ecn {
    /// The codepoint in the two low bits of the IP header's traffic class.
    #[must_use]
    pub const fn from_bits(bits: u8) -> Option<Self> {
        match bits & 0b11 {
            0b10 => Some(Self::Ect0),
            0b01 => Some(Self::Ect1),
            0b11 => Some(Self::Ce),
            _ => None,
        }
    }

    /// The two bits.
    #[must_use]
    pub const fn to_bits(self) -> u8 {
        match self {
            Self::Ect0 => 0b10,
            Self::Ect1 => 0b01,
            Self::Ce => 0b11,
        }
    }
}
