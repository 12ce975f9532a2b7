//! The client's side of a flow: where its datagrams come from, and where they arrive.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// A listener, by its place in the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ListenerIndex(pub usize);

/// Where a datagram came from and which of the balancer's addresses it was sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClientPath {
    /// The client's address and port, as the balancer sees them.
    pub client: SocketAddr,
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
        let scope = match path.client {
            SocketAddr::V4(_) => 0,
            SocketAddr::V6(client) => u64::from(client.scope_id()),
        };
        let family = u64::from(path.client.is_ipv6());
        let rest = u64::from(path.client.port())
            | (listener.0 as u64 & 0x7fff) << 16
            | family << 31
            | scope << 32;
        Self { client: bits(path.client.ip()), local: path.local.map_or(0, bits), rest }
    }
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => Ipv6Addr::to_bits(address),
    }
}
