//! The client's side of a flow: where its datagrams come from, and where they arrive.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use serde::{Deserialize, Serialize};

/// A listener, by its number: its place in the configuration that the process has begun with, and that of one which has ended or a
/// new one since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ListenerIndex(pub usize);

/// Where a listener listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ListenerAddr(pub SocketAddr);

impl fmt::Display for ListenerAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The address and port of a client, as the balancer sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ClientAddr(#[serde(with = "crate::zoned")] pub SocketAddr);

impl<T: Into<IpAddr>> From<(T, u16)> for ClientAddr {
    fn from(address: (T, u16)) -> Self {
        Self(address.into())
    }
}

impl ClientAddr {
    /// An address as somebody has written it: a mapped one as the IPv4 address that it stands for, as it
    /// arrives.
    #[must_use]
    pub fn written(address: SocketAddr) -> Self {
        match address.ip().to_canonical() {
            IpAddr::V4(ip) => Self((ip, address.port()).into()),
            IpAddr::V6(_) => Self(address),
        }
    }

    /// The address without the port.
    #[must_use]
    pub const fn ip(&self) -> IpAddr {
        self.0.ip()
    }
}

/// Where a datagram came from and which of the balancer's addresses it was sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ClientPath {
    /// Where it came from.
    pub client: ClientAddr,
    /// The destination address, for listeners on an unspecified address.
    pub local: Option<IpAddr>,
}

/// A listener and a client path, as a key of tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PathKey {
    client: u128,
    local: u128,
    /// Client port, listener, families: all that is left of the path.
    rest: u64,
}

impl PathKey {
    pub(crate) fn new(listener: ListenerIndex, path: &ClientPath) -> Self {
        let ClientAddr(client) = path.client;
        let scope = match client {
            SocketAddr::V4(_) => 0,
            SocketAddr::V6(client) => u64::from(client.scope_id()),
        };
        let family = u64::from(client.is_ipv6());
        let rest = u64::from(client.port())
            | (listener.0 as u64 & 0x7fff) << 16
            | family << 31
            | scope << 32;
        Self { client: bits(client.ip()), local: path.local.map_or(0, bits), rest }
    }
}

/// What one operator of clients has at least: /24 of IPv4, /48 of IPv6.
pub(crate) fn network(client: IpAddr) -> u128 {
    match client.to_canonical() {
        IpAddr::V4(address) => {
            let network = Ipv4Addr::from_bits(address.to_bits() & 0xffff_ff00);
            network.to_ipv6_mapped().to_bits()
        }
        IpAddr::V6(address) => address.to_bits() >> 80 << 80,
    }
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => Ipv6Addr::to_bits(address),
    }
}
