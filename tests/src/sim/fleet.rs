//! Servers with routable connection IDs behind the balancer's forwarder: the addresses, server IDs
//! and configurations that scenarios share.

use std::net::SocketAddr;

use quic::{
    routable::{CidConfig, CidGenerator, ConfigId, Key, Partition, ServerId},
    transport::{CidIssuer, ResetKey},
};

use super::{NodeId, World, balancer::Balancer};

/// Servers behind the balancer, numbered from 1.
pub const SERVERS: u8 = 3;

/// The configuration of connection IDs with this config ID: even ones are enciphered in four
/// passes, odd ones in one.
///
/// # Panics
///
/// When there is no such config ID.
#[must_use]
pub fn cid_config(id: u8) -> CidConfig {
    let nonce = if id.is_multiple_of(2) { 14 } else { 6 };
    let id_of = ConfigId::new(id).expect("a config ID");
    CidConfig::new(id_of, 2, nonce, Some(&Key::new([id + 1; 16]))).expect("a valid configuration")
}

/// What a server issues its connection IDs with.
///
/// # Panics
///
/// When there is no such config ID.
#[must_use]
pub fn issuer(server: u8, config: u8) -> CidIssuer {
    let seed = [server * 16 + config; 32];
    let generator =
        CidGenerator::new(cid_config(config), server_id(server), Partition::Whole, seed);
    CidIssuer::routable(generator.expect("a server ID of two octets"), ResetKey::new(seed))
}

/// The server ID of a server.
///
/// # Panics
///
/// Never.
#[must_use]
pub fn server_id(server: u8) -> ServerId {
    ServerId::new(&[0x70, server]).expect("two octets")
}

/// The address of a server, on the balancer's side.
#[must_use]
pub fn address(server: u8, ipv6: bool) -> SocketAddr {
    if ipv6 {
        SocketAddr::from(([0x2001, 0xdb8, 9, 0, 0, 0, 0, u16::from(server)], 443))
    } else {
        SocketAddr::from(([10, 9, 0, server], 443))
    }
}

/// All servers, for the balancer.
#[must_use]
pub fn backends(ipv6: bool) -> Vec<(SocketAddr, ServerId)> {
    (1..=SERVERS).map(|server| (address(server, ipv6), server_id(server))).collect()
}

/// Adds a balancer that listens on `front` and knows configuration 0.
pub fn add_balancer(world: &mut World, front: SocketAddr) -> NodeId {
    add_balancer_as(world, front, 100)
}

/// As [`add_balancer`], for one of several: servers see it at the address of a server with this
/// `number`.
pub fn add_balancer_as(world: &mut World, front: SocketAddr, number: u8) -> NodeId {
    let inside = address(number, front.is_ipv6()).ip();
    let backends = backends(front.is_ipv6());
    let balancer = Balancer::new(front, inside, &[cid_config(0)], &backends);
    let balancer = world.add(&[front], balancer);
    world.give(inside, balancer);
    balancer
}
