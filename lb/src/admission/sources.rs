//! Addresses that no client of ours has.

use std::net::{IpAddr, SocketAddr};

use quic_lb_config::Config;

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

/// The addresses that this balancer listens on. What claims to come from there would be answered
/// to there, and might go round for ever.
#[derive(Debug)]
pub(super) struct OwnAddresses(Vec<SocketAddr>);

impl OwnAddresses {
    pub(super) fn new(config: &Config) -> Self {
        Self(config.listeners.iter().map(|listener| listener.address).collect())
    }

    /// Whether a datagram to the address `local` that claims to come from `client` claims to come
    /// from ourselves. On a listener for all addresses, `local` is the one that is known.
    pub(super) fn contains(&self, client: SocketAddr, local: Option<IpAddr>) -> bool {
        self.0.iter().any(|own| {
            let same =
                own.ip() == client.ip() || own.ip().is_unspecified() && local == Some(client.ip());
            own.port() == client.port() && same
        })
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
        let own = OwnAddresses(vec!["192.0.2.1:443".parse().unwrap(), "[::]:443".parse().unwrap()]);
        let contains = |client: &str, local: Option<&str>| {
            own.contains(client.parse().unwrap(), local.map(|local| local.parse().unwrap()))
        };
        assert!(contains("192.0.2.1:443", None));
        assert!(!contains("192.0.2.1:444", None));
        assert!(!contains("192.0.2.2:443", None));
        assert!(contains("[2001:db8::1]:443", Some("2001:db8::1")));
        assert!(!contains("[2001:db8::1]:443", Some("2001:db8::2")));
    }
}
