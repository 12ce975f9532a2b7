//! Paths: the peer's address changes by a NAT or on purpose, ours changes on purpose, and each
//! time the peer has to show that it is there.
//!
//! <https://www.rfc-editor.org/rfc/rfc9000.html#section-9>

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use super::{Connection, Event, handshake::PREFERRED_SEQUENCE, receive::Arrival};
use crate::{
    connection_id::ConnectionId,
    transport::{
        error::{Code, TransportError},
        packet::PacketKind,
        path::{Answer, Path, PathId},
        record::Record,
        space::Space,
    },
};

/// Paths known at once, the active one included.
const MAX_PATHS: usize = 3;

/// Why a client cannot migrate now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MigrateError {
    /// Only clients migrate.
    #[error("only a client can migrate")]
    NotClient,
    /// The handshake is not confirmed yet, or the connection is over.
    #[error("the connection is not established")]
    NotEstablished,
    /// The server forbids it.
    #[error("the server does not allow migration")]
    Disabled,
    /// The server has given no connection ID for another path yet.
    #[error("the server has not provided a connection ID for another path")]
    NoConnectionId,
}

impl Connection {
    /// Moves to another address of ours: packets go out with a fresh connection ID from now on.
    /// `local` is the address, where it is known.
    ///
    /// # Errors
    ///
    /// [`MigrateError`] when that is not possible; nothing has changed then.
    pub fn migrate(&mut self, now: Instant, local: Option<IpAddr>) -> Result<(), MigrateError> {
        if self.side.is_server() {
            return Err(MigrateError::NotClient);
        }
        // "An endpoint MUST NOT initiate connection migration before the handshake is confirmed".
        if !self.handshake.confirmed || self.is_over() {
            return Err(MigrateError::NotEstablished);
        }
        // The prohibition does not outlive a move to the preferred address, section 18.2.
        let disabled =
            self.handshake.peer.as_ref().is_some_and(|peer| peer.disable_active_migration);
        if disabled && !self.handshake.moved_to_preferred {
            return Err(MigrateError::Disabled);
        }
        let fresh = self.remote_cids.take_unused().ok_or(MigrateError::NoConnectionId)?;
        let remote = self.paths[0].remote;
        let mut path = self.new_path(remote, local, fresh.sequence);
        // The server is where it was; what has to be found out is whether this path works.
        path.set_validated();
        path.start_validation(now, self.validation_timeout());
        self.journal.note(now, Record::PathValidationStarted { remote, again: false });
        self.journal.note(now, Record::PathChanged { remote });
        self.paths.insert(0, path);
        for left in self.paths.split_off(1) {
            self.remote_cids.retire(left.cid);
        }
        Ok(())
    }

    /// Asks the server's preferred address whether it is there; once it answers, that is where the
    /// client goes.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-9.6.1>
    pub(super) fn follow_preferred_address(&mut self, now: Instant) {
        let preferred =
            self.handshake.peer.as_ref().and_then(|peer| peer.preferred_address.as_ref());
        let Some(address) = preferred.map(|preferred| preferred.address) else { return };
        let current = self.paths[0].remote;
        // A socket of both families has IPv4 peers in mapped form.
        let (mapped, v4) = (current.is_ipv6(), current.ip().to_canonical().is_ipv4());
        let target = match (v4, address.ipv4, address.ipv6) {
            (true, Some(v4), _) if mapped => {
                Some(SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()))
            }
            (true, Some(v4), _) => Some(SocketAddr::V4(v4)),
            (false, _, Some(v6)) => Some(SocketAddr::V6(v6)),
            _ => None,
        };
        let wanted = self.side.is_client() && self.config.follow_preferred_address;
        let Some(target) = target.filter(|&target| wanted && target != current) else { return };
        let Some(cid) = self.remote_cids.take(PREFERRED_SEQUENCE) else { return };
        let mut path = self.new_path(target, None, cid.sequence);
        path.set_chosen();
        path.start_validation(now, self.validation_timeout());
        let started = Record::PathValidationStarted { remote: target, again: false };
        self.journal.note(now, started);
        self.paths.push(path);
    }

    /// Whether a datagram may come from where it came. Until the handshake is confirmed, its packets
    /// are asked too: [`Self::may_carry`].
    pub(super) fn may_arrive_from(&self, arrival: &Arrival) -> bool {
        if self.side.is_client() {
            // "Clients MUST discard these packets" from unknown server addresses.
            // https://www.rfc-editor.org/rfc/rfc9000.html#section-9
            return self.paths.iter().any(|path| path.remote == arrival.remote);
        }
        let hears_handshake = self.has_keys(Space::Handshake);
        self.handshake.confirmed || hears_handshake || self.path_id_of(arrival).is_some()
    }

    /// Whether a packet may come from where it came.
    ///
    /// A client must not migrate before the handshake is confirmed, but the NAT before it may move at
    /// any time. What is protected with Handshake keys is heard from anywhere then, and may move the
    /// handshake as a packet of the application moves a connection. Not so Initials, which whoever
    /// has seen one can make, but for those with a token ([`Self::hear_from`]), nor 1-RTT packets, which cannot be opened yet.
    pub(super) fn may_carry(&self, arrival: &Arrival, kind: &PacketKind) -> bool {
        self.side.is_client()
            || self.handshake.confirmed
            || matches!(kind, PacketKind::Handshake { .. })
            || self.path_id_of(arrival).is_some()
    }

    /// The client of a handshake may speak from here: a token has proved its address.
    pub(crate) fn hear_from(&mut self, arrival: &Arrival, dcid: &ConnectionId) {
        self.ensure_path(arrival, dcid);
        if let Some(path) = self.path_of(arrival) {
            path.set_validated();
        }
    }

    /// Makes sure that the address of an authentic packet is a path.
    pub(super) fn ensure_path(&mut self, arrival: &Arrival, dcid: &ConnectionId) {
        if self.side.is_client() || self.path_id_of(arrival).is_some() {
            return;
        }
        if self.paths.len() == MAX_PATHS {
            // Not the way back, whoever copies packets to how many addresses.
            let unproved = (1..MAX_PATHS).rev().find(|&at| !self.paths[at].is_validated());
            self.drop_path(unproved.unwrap_or(MAX_PATHS - 1));
        }
        // A peer that moved on purpose uses another connection ID; so should we then. Behind a NAT
        // that has moved, it uses the same one.
        let moved = self.peer_used != *dcid;
        let fresh = if moved { self.remote_cids.take_unused() } else { None };
        let cid = fresh.map_or(self.paths[0].cid, |fresh| fresh.sequence);
        let mut path = self.new_path(arrival.remote, arrival.local, cid);
        path.on_datagram_received(arrival.len);
        self.paths.insert(1, path);
        if self.handshake.complete {
            self.validate_paths(arrival.now);
        }
    }

    /// Asks on every path whose peer was not proved to be there. The frames need 1-RTT keys at both
    /// ends: during the handshake, paths have to wait, and get three times what came from there.
    pub(super) fn validate_paths(&mut self, now: Instant) {
        let timeout = self.validation_timeout();
        let unproved = |path: &&mut Path| !path.is_validated() && !path.is_validating();
        for path in self.paths.iter_mut().filter(unproved) {
            path.start_validation(now, timeout);
            let started = Record::PathValidationStarted { remote: path.remote, again: false };
            self.journal.note(now, started);
        }
    }

    /// A packet has been processed; `decides` says that it is the newest one, and not a probe.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-9.3>
    pub(super) fn on_path_of_packet(
        &mut self,
        arrival: &Arrival,
        dcid: &ConnectionId,
        decides: bool,
    ) {
        if self.side.is_client() {
            return;
        }
        let Some(id) = self.path_id_of(arrival) else { return };
        if id == self.paths[0].id {
            self.peer_used = *dcid;
            return;
        }
        if !decides {
            return;
        }
        self.peer_used = *dcid;
        self.activate(arrival.now, id);
        if self.handshake.complete {
            self.events.push_back(Event::PeerMoved(arrival.remote));
        }
    }

    fn activate(&mut self, now: Instant, id: PathId) {
        let Some(at) = self.paths.iter().position(|path| path.id == id) else { return };
        let mut path = self.paths.remove(at);
        let old = &mut self.paths[0];
        let defaults = self.config.path_defaults();
        // "unless the only change in the peer's address is its port number"
        // https://www.rfc-editor.org/rfc/rfc9000.html#section-9.4
        if old.remote.ip() == path.remote.ip() && !path.rtt.is_measured() {
            path.inherit(old, &defaults);
        }
        self.journal.note(now, Record::PathChanged { remote: path.remote });
        self.paths.insert(0, path);
        (self.pto_count, self.loss_run) = (0, None);
        if self.handshake.complete {
            self.validate_paths(now);
            // "endpoints MUST validate the previously active path using a PATH_CHALLENGE frame",
            // lest a copy that overtook its original lead away a peer that is still there.
            // https://www.rfc-editor.org/rfc/rfc9000.html#section-9.3.3
            let timeout = self.validation_timeout();
            let former = &mut self.paths[1];
            former.start_validation(now, timeout);
            let started = Record::PathValidationStarted { remote: former.remote, again: true };
            self.journal.note(now, started);
        }
    }

    // Validation.

    pub(super) fn on_path_challenge(&mut self, arrival: &Arrival, data: [u8; 8]) {
        let id = self.path_id_of(arrival);
        let index = self.paths.iter().position(|path| Some(path.id) == id);
        // A client may see another address of its own than it knows of.
        let index = index.or(self.side.is_client().then_some(0));
        if let Some(path) = index.and_then(|index| self.paths.get_mut(index)) {
            path.response_due = Some(data);
        }
    }

    pub(super) fn on_path_response(&mut self, now: Instant, data: [u8; 8]) {
        let answers = self.paths.iter_mut().map(|path| path.on_response(data));
        let answered = answers.enumerate().find(|(_, answer)| *answer != Answer::Unknown);
        let Some((mut index, answer)) = answered else { return };
        if answer == Answer::Validated {
            let remote = self.paths[index].remote;
            self.journal.note(now, Record::PathValidated { remote });
        }
        if self.side.is_client() && index > 0 && answer == Answer::Validated {
            // The only path a client has besides the active one.
            self.paths.swap(0, index);
            self.handshake.moved_to_preferred = true;
            self.tell_moved(now);
            (index, self.pto_count) = (0, 0);
        }
        if index == 0 && answer == Answer::Validated {
            while self.paths.len() > 1 {
                self.drop_path(1);
            }
            // "A server SHOULD send [a NEW_TOKEN] after validating a new address", section 9.3.
            self.wants_token = self.side.is_server();
        }
        self.last_sent = self.last_sent.max(now);
    }

    pub(super) fn on_path_deadlines(&mut self, now: Instant) {
        let mut index = 0;
        while index < self.paths.len() {
            let failed = self.paths[index].handle_deadline(now);
            if failed {
                let remote = self.paths[index].remote;
                self.journal.note(now, Record::PathValidationFailed { remote });
            }
            if failed && index > 0 && !self.paths[index].is_validated() {
                self.drop_path(index);
                continue;
            }
            if failed && index == 0 && !self.paths[0].is_validated() {
                // Another one is the active path now, and looked at next.
                self.fall_back(now);
                continue;
            }
            index += 1;
        }
    }

    /// The active path proved to lead nowhere: back to the one before.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-9.3.2>
    fn fall_back(&mut self, now: Instant) {
        let Some(at) = self.paths.iter().position(Path::is_validated) else {
            let reason = "the peer does not answer on any path";
            return self.close_for(now, TransportError::new(Code::NO_VIABLE_PATH, reason));
        };
        self.paths.swap(0, at);
        while self.paths.len() > 1 {
            self.drop_path(1);
        }
        self.tell_moved(now);
    }

    /// The active path is another one than before, without a packet having come there just now.
    fn tell_moved(&mut self, now: Instant) {
        let remote = self.paths[0].remote;
        self.events.push_back(Event::PeerMoved(remote));
        self.journal.note(now, Record::PathChanged { remote });
    }

    fn drop_path(&mut self, index: usize) {
        let gone = self.paths.remove(index);
        if self.paths.iter().all(|path| path.cid != gone.cid) {
            self.remote_cids.retire(gone.cid);
        }
    }

    // Connection IDs of paths.

    /// Paths whose connection ID the peer asked back get others.
    pub(super) fn replace_retired_cids(&mut self) -> Result<(), TransportError> {
        for index in 0..self.paths.len() {
            let retired = self.paths[index].cid;
            if self.remote_cids.get(retired).is_some() {
                continue;
            }
            let fresh = self.remote_cids.take_unused().map(|cid| cid.sequence);
            let fresh = fresh.or_else(|| self.remote_cids.any().map(|cid| cid.sequence));
            let Some(fresh) = fresh else {
                return Err(TransportError::protocol_violation(
                    "the last connection ID was asked back",
                ));
            };
            for path in self.paths.iter_mut().filter(|path| path.cid == retired) {
                path.cid = fresh;
            }
        }
        Ok(())
    }

    fn new_path(&mut self, remote: SocketAddr, local: Option<IpAddr>, cid: u64) -> Path {
        let id = PathId(self.next_path);
        self.next_path = self.next_path.wrapping_add(1);
        let mut path = Path::new(id, remote, local, cid, &self.config.path_defaults());
        if let Some(peer) = &self.handshake.peer {
            path.mtu.limit(peer.max_udp_payload_size);
        }
        path
    }

    fn validation_timeout(&self) -> Duration {
        let fresh = super::super::rtt::Rtt::new(self.config.initial_rtt).pto();
        self.pto(Space::Data).max(fresh)
    }
}
