//! What the IP header of a datagram says that is carried on with it: how routers treat it, and how
//! many of them it may still pass.

use serde::{Deserialize, Serialize};

/// The octet that IPv4 calls type of service and IPv6 traffic class: the differentiated services
/// codepoint in the upper six bits (RFC 2474), congestion in the lower two (RFC 3168, section 5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficClass(u8);

/// How many routers a datagram may still pass, the one that forwards it next included: time to live
/// in IPv4, hop limit in IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct HopLimit(u8);

/// Both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marks {
    /// How it is treated.
    pub class: TrafficClass,
    /// How far it goes.
    pub hops: HopLimit,
}

impl TrafficClass {
    /// Not ECN-capable transport.
    pub const NOT_ECT: Self = Self(0b00);
    /// ECN-capable transport, the second codepoint.
    pub const ECT_1: Self = Self(0b01);
    /// ECN-capable transport, the first codepoint.
    pub const ECT_0: Self = Self(0b10);
    /// Congestion experienced.
    pub const CE: Self = Self(0b11);

    pub(super) const fn from_octet(octet: u8) -> Self {
        Self(octet)
    }

    pub(super) const fn octet(self) -> u8 {
        self.0
    }

    /// With this differentiated services codepoint, of which the lower six bits count.
    #[must_use]
    pub const fn with_dscp(self, dscp: u8) -> Self {
        Self(dscp << 2 | self.0 & 0b11)
    }

    /// Whether a router was congested.
    #[must_use]
    pub const fn is_congested(self) -> bool {
        self.0 & 0b11 == Self::CE.0
    }
}

impl HopLimit {
    /// So many.
    #[must_use]
    pub const fn new(hops: u8) -> Self {
        Self(hops)
    }

    pub(super) const fn octet(self) -> u8 {
        self.0
    }
}

impl Marks {
    /// Those of a socket that nobody has set any: the system says how far its datagrams go.
    pub const UNSET: Self = Self { class: TrafficClass::NOT_ECT, hops: HopLimit(0) };

    /// What a datagram that arrived with these leaves with, as from a router; `None` when it has come
    /// to its end.
    #[must_use]
    pub const fn onward(self) -> Option<Self> {
        match self.hops.0 {
            0 | 1 => None,
            hops => Some(Self { hops: HopLimit(hops - 1), ..self }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_codepoint_leaves_congestion_alone() {
        let class = TrafficClass::ECT_0.with_dscp(46);
        assert_eq!(class.octet(), 0xba);
        assert!(!class.is_congested());
        assert!(TrafficClass::CE.with_dscp(46).is_congested());
        assert_eq!(class.with_dscp(0), TrafficClass::ECT_0);
    }

    #[test]
    fn each_hop_takes_one_and_the_last_ends_it() {
        let class = TrafficClass::ECT_1.with_dscp(10);
        let onward = |hops| Marks { class, hops: HopLimit(hops) }.onward();
        assert_eq!(onward(0), None);
        assert_eq!(onward(1), None);
        assert_eq!(onward(2), Some(Marks { class, hops: HopLimit(1) }));
        assert_eq!(onward(255), Some(Marks { class, hops: HopLimit(254) }));
    }
}
