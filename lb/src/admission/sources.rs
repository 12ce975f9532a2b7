//! Addresses that no client of ours has.

use std::net::IpAddr;

use quic_lb_config::Config;

use crate::{
    client_path::{ClientAddr, ListenerAddr},
    verdict::DropReason,
};

/// UDP services that answer anyone, and by that serve attackers who forge the address of whom they
/// attack: what comes from these ports was not asked for by a QUIC client. The list is that of
/// <https://www.rfc-editor.org/rfc/rfc9308.html#section-8.1> and of what is known to be abused.
const REFLECTORS: [u16; 24] = [
    0,     // not a port that anyone can answer to
    7,     // Echo
    13,    // Daytime
    17,    // Quote of the day
    19,    // Character generator
    53,    // DNS
    69,    // TFTP
    111,   // Portmapper
    123,   // NTP
    137,   // NetBIOS names
    138,   // NetBIOS datagrams
    161,   // SNMP
    162,   // SNMP traps
    389,   // CLDAP
    500,   // IKE
    520,   // RIP
    623,   // IPMI
    1434,  // SQL Server Browser
    1900,  // SSDP
    3702,  // WS-Discovery
    5353,  // Multicast DNS
    5355,  // LLMNR
    10001, // Ubiquiti discovery
    11211, // memcached
];

/// Whether `port` belongs to such a service.
pub(super) fn is_reflector(port: u16) -> bool {
    REFLECTORS.binary_search(&port).is_ok()
}

/// The addresses that this balancer listens on, and those of the backends. What claims to come from there
/// would be answered to there, and might go round for ever: a backend that answers to whatever arrives would
/// answer its own answer.
#[derive(Debug)]
pub(super) struct OwnAddresses {
    listeners: Vec<ListenerAddr>,
    /// In order.
    backends: Vec<(IpAddr, u16)>,
    /// All their ports, one bit each: hardly any client has one of them.
    ports: Vec<u64>,
}

impl OwnAddresses {
    pub(super) fn new(config: &Config) -> Self {
        let backends = config.pools.iter().flat_map(|pool| &pool.backends);
        let backends = backends.map(|backend| (backend.address.ip(), backend.address.port()));
        let mut backends: Vec<_> = backends.collect();
        backends.sort_unstable();
        backends.dedup();
        let listeners: Vec<_> =
            config.listeners.iter().map(|listener| ListenerAddr(listener.address)).collect();
        let mut ports = vec![0; 1 << 10];
        let of_listeners = listeners.iter().map(|ListenerAddr(own)| own.port());
        for port in of_listeners.chain(backends.iter().map(|(_, port)| *port)) {
            ports[usize::from(port / 64)] |= 1 << (port % 64);
        }
        Self { listeners, backends, ports }
    }

    /// Why a datagram to the address `local` that claims to come from `client` comes from no client: it
    /// claims to come from ourselves, or from a backend. On a listener for all addresses, `local` is
    /// the one that is known.
    pub(super) fn refuse(
        &self,
        ClientAddr(client): ClientAddr,
        local: Option<IpAddr>,
    ) -> Option<DropReason> {
        let port = client.port();
        if self.ports[usize::from(port / 64)] >> (port % 64) & 1 == 0 {
            return None;
        }
        let is_ours = self.listeners.iter().any(|ListenerAddr(own)| {
            let same =
                own.ip() == client.ip() || own.ip().is_unspecified() && local == Some(client.ip());
            own.port() == client.port() && same
        });
        if is_ours {
            return Some(DropReason::OwnAddress);
        }
        let of_backend = self.backends.binary_search(&(client.ip(), client.port())).is_ok();
        of_backend.then_some(DropReason::BackendAddress)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_of_reflectors_are_told_from_those_of_clients() {
        assert!(REFLECTORS.is_sorted());
        for port in REFLECTORS {
            assert!(is_reflector(port));
        }
        for port in [443, 1024, 4433, 32_768, 50_000, 65_535] {
            assert!(!is_reflector(port), "{port}");
        }
    }

    #[test]
    fn our_own_addresses_are_known_with_their_ports() {
        let mut config = crate::fixtures::config(true);
        let template = config.listeners[0].clone();
        config.listeners = ["192.0.2.1:443", "[::]:443"]
            .map(|own| quic_lb_config::Listener {
                address: own.parse().unwrap(),
                ..template.clone()
            })
            .into();
        let own = OwnAddresses::new(&config);
        let contains = |client: &str, local: Option<&str>| {
            let client = ClientAddr(client.parse().unwrap());
            let refused = own.refuse(client, local.map(|local| local.parse().unwrap()));
            refused == Some(DropReason::OwnAddress)
        };
        assert!(contains("192.0.2.1:443", None));
        assert!(!contains("192.0.2.1:444", None));
        assert!(!contains("192.0.2.2:443", None));
        assert!(contains("[2001:db8::1]:443", Some("2001:db8::1")));
        assert!(!contains("[2001:db8::1]:443", Some("2001:db8::2")));
    }
    #[test]
    fn addresses_of_backends_are_known_with_their_ports() {
        let mut config = crate::fixtures::config(true);
        config.pools[0].backends[0].address = "[fe80::1%2]:5001".parse().unwrap();
        let own = OwnAddresses::new(&config);
        let refuse = |client: &str| own.refuse(ClientAddr(client.parse().unwrap()), None);
        for client in ["127.0.0.1:5002", "127.0.0.1:5003", "[fe80::1%2]:5001"] {
            assert_eq!(refuse(client), Some(DropReason::BackendAddress), "{client}");
        }
        for client in ["127.0.0.1:5001", "127.0.0.1:5004", "127.0.0.2:5002", "[fe80::1%2]:5002"] {
            assert_eq!(refuse(client), None, "{client}");
        }
    }
}
