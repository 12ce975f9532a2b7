//! For tests, and fuzz targets, which need a part of it: packets that no connection would send, what a
//! datagram says to its receiver, and a look inside.
#![allow(clippy::unwrap_used, reason = "never outside of tests and fuzz targets")]
#![cfg_attr(fuzzing, allow(dead_code, reason = "fuzz targets forge and do no more"))]

use std::time::Instant;

use super::Connection;
#[cfg(test)]
use super::closing::State;
#[cfg(test)]
use crate::transport::{
    cids::ACTIVE_LIMIT, congestion::Controller, send_buffer::SendBuffer, tls::Session,
};
use crate::{
    connection_id::ConnectionId,
    transport::{
        error::TransportError,
        frame::{Frame, Frames},
        packet::{Header, PacketKind, open},
        parameters::TransportParameters,
        space::Space,
    },
};

/// A packet without its protection.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) space: Space,
    pub(crate) number: u64,
    pub(crate) dcid: ConnectionId,
    payload: Vec<u8>,
}

impl Seen {
    pub(crate) fn frames(&self) -> impl Iterator<Item = Frame<'_>> {
        Frames::new(&self.payload).unwrap().map(Result::unwrap)
    }

    /// Octets of CRYPTO frames, with their offsets.
    pub(crate) fn crypto(&self) -> Vec<(u64, Vec<u8>)> {
        let crypto = |frame| match frame {
            Frame::Crypto { offset, data } => Some((offset, data.to_vec())),
            _ => None,
        };
        self.frames().filter_map(crypto).collect()
    }
}

/// How far the end of a connection has come.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    Open,
    /// Closing, and a CONNECTION_CLOSE is to be sent.
    CloseDue,
    Closing,
    Draining,
    Gone,
}

impl Connection {
    /// A packet of `space` with these frames.
    pub(crate) fn forge(&mut self, now: Instant, space: Space, frames: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let packet = self.open_packet_for(space, 0, 1200, &mut out);
        out.extend_from_slice(frames);
        self.seal(now, 0, packet, 0, None, &mut out);
        out
    }

    /// The same in a datagram of 1200 octets.
    pub(crate) fn forge_padded(&mut self, now: Instant, space: Space, frames: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let packet = self.open_packet_for(space, 0, 1200, &mut out);
        out.extend_from_slice(frames);
        self.seal(now, 0, packet, 1200, None, &mut out);
        out
    }

    /// A Handshake packet whose acknowledgments come after its CRYPTO frames.
    pub(crate) fn forge_with_ack_last(&mut self, now: Instant) -> Vec<u8> {
        let mut out = Vec::new();
        let mut packet = self.open_packet_for(Space::Handshake, 0, 1200, &mut out);
        self.write_crypto(&mut packet, &mut out);
        self.write_ack(now, &mut packet, &mut out);
        self.seal(now, 0, packet, 0, None, &mut out);
        out
    }

    /// A 1-RTT packet with these frames and a reserved bit.
    pub(crate) fn forge_with_reserved_bits(&mut self, now: Instant, frames: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let packet = self.open_packet_for(Space::Data, 0, 1200, &mut out);
        out[0] |= 0x10;
        out.extend_from_slice(frames);
        self.seal(now, 0, packet, 0, None, &mut out);
        out
    }

    /// A packet of `space` that names another source.
    pub(crate) fn forge_from(
        &mut self,
        now: Instant,
        space: Space,
        scid: ConnectionId,
        frames: &[u8],
    ) -> Vec<u8> {
        let own = std::mem::replace(&mut self.handshake.local_cid, scid);
        let packet = self.forge(now, space, frames);
        self.handshake.local_cid = own;
        packet
    }

    /// An Initial with a token.
    pub(crate) fn forge_with_token(&mut self, now: Instant, token: &[u8]) -> Vec<u8> {
        let own = std::mem::replace(&mut self.handshake.token, token.to_vec());
        let packet = self.forge_padded(now, Space::Initial, &[1]);
        self.handshake.token = own;
        packet
    }

    /// Moves to the next key phase, allowed or not.
    pub(crate) fn force_phase(&mut self) {
        self.one_rtt.as_mut().expect("1-RTT keys").update();
    }

    /// Has all packets but `count` failed authentication that may.
    #[cfg(test)]
    pub(crate) fn force_failures_left(&mut self, count: u64) {
        self.one_rtt.as_mut().expect("1-RTT keys").set_failures_left(count);
    }

    #[cfg(test)]
    pub(crate) fn life(&self) -> Life {
        match &self.state {
            State::Open => Life::Open,
            State::Closing(_) if self.close_is_due() => Life::CloseDue,
            State::Closing(_) => Life::Closing,
            State::Draining { .. } => Life::Draining,
            State::Gone(_) => Life::Gone,
        }
    }

    /// Has `controller` decide about the active path.
    #[cfg(test)]
    pub(crate) fn force_controller(&mut self, controller: Box<dyn Controller>) {
        self.paths[0].congestion = controller;
    }

    /// Has a client that has sent nothing yet announce other transport parameters than its own.
    #[cfg(test)]
    pub(crate) fn announce(
        &mut self,
        tls: std::sync::Arc<rustls::ClientConfig>,
        change: impl FnOnce(&mut TransportParameters),
    ) {
        let mut parameters = TransportParameters {
            initial_source_connection_id: Some(self.handshake.local_cid),
            max_idle_timeout: self.config.idle_timeout,
            active_connection_id_limit: ACTIVE_LIMIT,
            ..TransportParameters::default()
        };
        self.config.streams.announce(&mut parameters);
        change(&mut parameters);
        let (mut announced, mut hello) = (Vec::new(), Vec::new());
        parameters.write(0, &mut announced);
        let name = "server.test".try_into().unwrap();
        let mut session = Session::client(tls, self.version, name, announced).unwrap();
        assert!(session.write(&mut hello).is_none());
        self.handshake.session = session;
        let initial = self.space(Space::Initial);
        initial.crypto_out = SendBuffer::default();
        initial.crypto_out.write(&hello);
    }

    #[cfg(test)]
    pub(crate) fn force_number(&mut self, space: Space, number: u64) {
        self.space(space).sent.set_next_number(number);
    }

    /// What a datagram to this connection says, as far as there are keys. Changes nothing.
    pub(crate) fn peek(&mut self, datagram: &[u8]) -> Vec<Seen> {
        let mut octets = datagram.to_vec();
        let mut rest = &mut octets[..];
        let mut all = Vec::new();
        while let Ok(header) = Header::read(rest, self.handshake.local_cid.len()) {
            let (packet, after) = rest.split_at_mut(header.len);
            rest = after;
            let space = match header.kind {
                PacketKind::Initial { .. } => Space::Initial,
                PacketKind::Handshake { .. } => Space::Handshake,
                PacketKind::OneRtt => Space::Data,
                _ => continue,
            };
            let state = &self.spaces[space.index()];
            let largest = state.received.largest();
            let opened = match (space, &mut self.one_rtt, &state.keys) {
                (Space::Data, Some(keys), _) => {
                    let found = header.unprotect(keys.remote_header(), packet, largest).unwrap();
                    let opened = keys.open(&found, packet).map(|opened| opened.payload.to_vec());
                    opened.map(|payload| (found.number, payload))
                }
                (Space::Initial | Space::Handshake, _, Some(keys)) => {
                    let found = header.unprotect(&*keys.remote.header, packet, largest).unwrap();
                    let opened = open(&*keys.remote.packet, &found, packet);
                    opened.map(|payload| (found.number, payload.to_vec()))
                }
                _ => continue,
            };
            if let Ok((number, payload)) = opened {
                all.push(Seen { space, number, dcid: header.dcid, payload });
            }
        }
        all
    }

    /// Octets of CRYPTO data of `space` that were written so far.
    pub(crate) fn crypto_sent(&self, space: Space) -> u64 {
        self.spaces[space.index()].crypto_out.end()
    }

    /// How many things of each kind are held: packets sent, packets that wait for keys, paths,
    /// connection IDs of ours, events.
    pub(crate) fn holdings(&self) -> [usize; 5] {
        [
            self.spaces.iter().map(|state| state.sent.len()).sum(),
            self.waiting.len(),
            self.paths.len(),
            self.local_cids.iter().count() + self.announce.len(),
            self.events.len(),
        ]
    }

    /// What a client sent to in the first place.
    pub(crate) const fn original_dcid(&self) -> ConnectionId {
        self.handshake.original_dcid
    }

    pub(crate) fn holds_keys(&self, space: Space) -> bool {
        self.has_keys(space)
    }

    /// The probe timeout of a space, not backed off.
    #[cfg(test)]
    pub(crate) fn probe_timeout(&self, space: Space) -> std::time::Duration {
        self.pto(space)
    }

    /// The peer's transport parameters.
    pub(crate) fn peer(&self) -> TransportParameters {
        self.handshake.peer.clone().expect("a handshake")
    }

    /// Whether they fit the connection IDs on the wire.
    pub(crate) fn judge(&self, peer: &TransportParameters) -> Result<(), TransportError> {
        self.check_connection_ids(peer)
    }
}
