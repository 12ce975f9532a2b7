//! Socket addresses as serde should write them: with the zones of link-local ones, which it leaves out by itself.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};

use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

pub(crate) fn serialize<S: Serializer>(
    address: &SocketAddr,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let zone = match address {
        SocketAddr::V4(_) => 0,
        SocketAddr::V6(address) => address.scope_id(),
    };
    (address.ip(), address.port(), zone).serialize(serializer)
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<SocketAddr, D::Error> {
    let (ip, port, zone) = <(IpAddr, u16, u32)>::deserialize(deserializer)?;
    Ok(match ip {
        IpAddr::V4(ip) => (ip, port).into(),
        IpAddr::V6(ip) => SocketAddrV6::new(ip, port, 0, zone).into(),
    })
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    use super::*;

    #[test]
    fn addresses_keep_their_zones() {
        #[derive(Serialize, Deserialize)]
        struct Wrapped(#[serde(with = "super")] SocketAddr);
        let zoned = SocketAddrV6::new("fe80::1".parse().unwrap(), 443, 0, 7).into();
        for address in [zoned, "192.0.2.1:443".parse().unwrap()] {
            let octets = postcard::to_stdvec(&Wrapped(address)).unwrap();
            assert_eq!(postcard::from_bytes::<Wrapped>(&octets).unwrap().0, address);
        }
    }
}
