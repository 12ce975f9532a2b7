//! Sockets that the service manager has opened before this process began (socket activation): which of them belong to which
//! listener. They outlive the process, so that what arrives while there is none waits in them, and ports below 1024 take no right.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    os::fd::OwnedFd,
};

use quic_lb_config::{Config, Listener};
use socket2::SockRef;
use tracing::{info, warn};

use crate::worker::Listen;

/// Where the sockets of the listeners of `config` come from: those at its address, or new ones where there are none.
///
/// # Errors
///
/// That one of them has no address, or covers other addresses than its listener is to.
pub(super) fn listen(config: &Config, sockets: Vec<OwnedFd>) -> io::Result<Vec<Listen>> {
    let with_address = |socket| {
        let socket = UdpSocket::from(socket);
        let address = socket.local_addr()?;
        Ok((address, socket))
    };
    let mut sockets = sockets.into_iter().map(with_address).collect::<io::Result<Vec<_>>>()?;
    let mut listen = Listen::at_addresses_of(config);
    for (listener, listen) in config.listeners.iter().zip(&mut listen) {
        let (of_listener, others): (Vec<_>, _) =
            sockets.into_iter().partition(|(address, _)| *address == listener.address);
        sockets = others;
        if of_listener.is_empty() {
            continue;
        }
        for (_, socket) in &of_listener {
            check_families(listener, socket)?;
        }
        let (name, count) = (&listener.name, of_listener.len());
        info!(listener = name, address = %listener.address, sockets = count, "opened by the service manager");
        *listen =
            Listen::Inherit(of_listener.into_iter().map(|(_, socket)| socket.into()).collect());
    }
    for (address, _) in sockets {
        // Whoever has opened it still has it, and what arrives there waits for nobody.
        warn!(%address, "the service manager has opened a socket where no listener is");
    }
    Ok(listen)
}

fn check_families(listener: &Listener, socket: &UdpSocket) -> io::Result<()> {
    let SocketAddr::V6(address) = listener.address else { return Ok(()) };
    if !address.ip().is_unspecified() || SockRef::from(socket).only_v6()? != listener.both_families
    {
        return Ok(());
    }
    let wants = if listener.both_families { "both" } else { "ipv6-only" };
    let sentence = format!("listener {} takes BindIPv6Only={wants}", listener.name);
    Err(io::Error::other(sentence))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    fn socket(address: &str, only_v6: Option<bool>) -> OwnedFd {
        let address: SocketAddr = address.parse().unwrap();
        let domain = socket2::Domain::for_address(address);
        let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, None).unwrap();
        socket.set_reuse_port(true).unwrap();
        if let Some(only) = only_v6 {
            socket.set_only_v6(only).unwrap();
        }
        socket.bind(&address.into()).unwrap();
        socket.into()
    }

    fn address_of(socket: &OwnedFd) -> SocketAddr {
        UdpSocket::from(socket.try_clone().unwrap()).local_addr().unwrap()
    }

    #[test]
    fn a_listener_gets_the_sockets_at_its_address_and_opens_others_itself() {
        let first = socket("127.0.0.1:0", None);
        let address = address_of(&first);
        let again = socket(&address.to_string(), None);
        let stranger = socket("127.0.0.1:0", None);
        let mut config = fixtures::config(true);
        let mut other = config.listeners[0].clone();
        config.listeners[0].address = address;
        other.name = "other".into();
        other.address = "127.0.0.1:9".parse().unwrap();
        config.listeners.insert(0, other);
        let listen = listen(&config, vec![first, stranger, again]).unwrap();
        let [Listen::Bind(bound, _), Listen::Inherit(sockets)] = listen.as_slice() else {
            panic!("{listen:?}")
        };
        assert_eq!(bound.0, config.listeners[0].address);
        assert_eq!(sockets.iter().map(address_of).collect::<Vec<_>>(), [address; 2]);
    }

    #[test]
    fn a_socket_covers_the_addresses_that_its_listener_is_to() {
        for only_v6 in [true, false] {
            let opened = socket("[::]:0", Some(only_v6));
            let mut config = fixtures::config(true);
            config.listeners[0].address = address_of(&opened);
            for both_families in [true, false] {
                config.listeners[0].both_families = both_families;
                let listen = listen(&config, vec![opened.try_clone().unwrap()]);
                assert_eq!(listen.is_ok(), both_families != only_v6);
            }
        }
    }
}
