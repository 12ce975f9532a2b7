//! The client's side of a flow: where its datagrams come from, and where they arrive.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// A listener, by its place in the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ListenerIndex(pub usize);

/// The address and port of a client, as the balancer sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClientAddr(pub SocketAddr);

impl<T: Into<IpAddr>> From<(T, u16)> for ClientAddr {
    fn from(address: (T, u16)) -> Self {
        Self(address.into())
    }
}

impl ClientAddr {
    /// The address without the port.
    #[must_use]
    pub const fn ip(&self) -> IpAddr {
        self.0.ip()
    }
}

/// Where a datagram came from and which of the balancer's addresses it was sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => Ipv6Addr::to_bits(address),
    }
}
