//! A node that is an endpoint of ours, with an application on top.

use std::{net::SocketAddr, time::Instant};

use quic::transport::{ConnectionHandle, Endpoint, EndpointConfig, Event, Received};

use super::{Node, Packet, origin, wall};

/// What an application does with events.
pub trait App: 'static {
    /// Something happened on a connection.
    fn on_event(
        &mut self,
        now: Instant,
        endpoint: &mut Endpoint,
        connection: ConnectionHandle,
        event: Event,
    );

    /// Called before every wait: the place to start connections.
    fn on_idle(&mut self, now: Instant, endpoint: &mut Endpoint);

    /// When [`Self::on_idle`] should be called although nothing happens.
    fn deadline(&self) -> Option<Instant> {
        None
    }
}

/// An endpoint with an address and an application.
#[derive(Debug)]
pub struct Host<A> {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// The application.
    pub app: A,
    address: SocketAddr,
    /// Datagrams of one size that leave at once.
    pub segments: usize,
    /// Every octet sent, hashed: two runs are the same when this is.
    pub digest: u64,
}

impl<A: App> Host<A> {
    /// A host at `address`.
    #[must_use]
    pub fn new(address: SocketAddr, config: EndpointConfig, app: A) -> Self {
        let endpoint = Endpoint::new(config, origin(), wall());
        Self { endpoint, app, address, segments: 10, digest: 0xcbf2_9ce4_8422_2325 }
    }

    /// Moves to another address, without telling the endpoint.
    pub fn set_address(&mut self, address: SocketAddr) {
        self.address = address;
    }
}

impl<A: App> Node for Host<A> {
    fn handle(&mut self, now: Instant, mut packet: Packet) {
        let from = Received { remote: packet.from, local: Some(packet.to.ip()), ecn: packet.ecn };
        self.endpoint.handle_datagram(now, from, &mut packet.octets);
    }

    fn drive(&mut self, now: Instant, out: &mut Vec<Packet>) {
        if self.endpoint.deadline().is_some_and(|at| at <= now) {
            self.endpoint.handle_deadline(now);
        }
        let mut buffer = Vec::new();
        // Far more rounds than any application needs.
        for _ in 0..100_000 {
            buffer.clear();
            while let Some(transmit) = self.endpoint.poll_transmit(now, self.segments, &mut buffer)
            {
                assert_eq!(transmit.len, buffer.len());
                for octets in buffer.chunks(transmit.segment) {
                    for &octet in octets {
                        self.digest =
                            (self.digest ^ u64::from(octet)).wrapping_mul(0x100_0000_01b3);
                    }
                    out.push(Packet {
                        from: self.address,
                        to: transmit.remote,
                        ecn: transmit.ecn,
                        octets: octets.to_vec(),
                    });
                }
                buffer.clear();
            }
            match self.endpoint.poll_event() {
                Some((connection, event)) => {
                    self.app.on_event(now, &mut self.endpoint, connection, event);
                }
                None => {
                    self.app.on_idle(now, &mut self.endpoint);
                    if !self.endpoint.has_work() {
                        return;
                    }
                }
            }
        }
        panic!("an endpoint that is never done");
    }

    fn deadline(&mut self) -> Option<Instant> {
        [self.endpoint.deadline(), self.app.deadline()].into_iter().flatten().min()
    }
}
