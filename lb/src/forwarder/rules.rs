//! The five rules that find the backend of a packet. Rules 1 to 4 say which server is known to hold
//! its connection; rule 5 chooses one where none is.
//!
//! Between the two stands admission, which asks whether the server is known and by which rule, and
//! never which backend would be chosen: choosing is work, and a packet that is answered by a Retry
//! or dropped is not worth it.

use std::time::Instant;

use quic::{
    invariants::{LongHeader, Packet},
    routable::{ConfigId, Decoded, Unroutable},
};
use quic_lb_config::HashBy;

use super::trace::{self, Trace};
use crate::{
    affinity::AffinityTable,
    backend::{BackendId, BackendState},
    client_path::{ClientPath, ListenerIndex},
    flows::FlowTable,
    memory::{Lookup, Memory},
    routing::{FallbackKey, ListenerRoute, PoolRoute, Routing},
    verdict::Rule,
};

/// The shortest connection ID that a client may draw for its first flight
/// (<https://www.rfc-editor.org/rfc/rfc9000.html#section-7.2>); shorter ones are not random enough
/// to hash by.
const MIN_FIRST_DCID_LEN: usize = 8;

/// One UDP datagram from a client.
#[derive(Clone, Copy, Debug)]
pub struct Datagram<'a> {
    /// Where it came from and was sent to.
    pub path: ClientPath,
    /// The UDP payload.
    pub octets: &'a [u8],
}

/// All that a decision depends on besides what is remembered.
pub(super) struct Question<'a> {
    pub(super) now: Instant,
    pub(super) listener: ListenerIndex,
    /// What the listener leads to.
    pub(super) route: &'a ListenerRoute,
    pub(super) path: &'a ClientPath,
    /// The UDP payload.
    pub(super) octets: &'a [u8],
    /// The first packet of the datagram.
    pub(super) packet: Packet<'a>,
    pub(super) decoded: Result<Decoded, Unroutable>,
    /// What finding something in memory does to it.
    pub(super) lookup: &'a Lookup,
}

impl<'a> Question<'a> {
    /// The destination connection ID, with all that follows it in a short header.
    #[inline]
    pub(super) const fn dcid(&self) -> &'a [u8] {
        match self.packet {
            Packet::Long(header) => header.dcid,
            Packet::Short(header) => header.rest,
        }
    }

    /// The configuration of the connection ID of a short header, if it may be one of a server that has been taken away,
    /// or whose configuration has been. Those of long headers may have been drawn by a client.
    pub(super) fn unknown_server_id(&self) -> Option<ConfigId> {
        match (self.packet, self.decoded) {
            (Packet::Short(_), Ok(decoded)) => Some(decoded.config_id),
            (Packet::Short(_), Err(Unroutable::UnknownConfig(id))) => {
                self.route.decoder.configs().next().map(|_| id)
            }
            _ => None,
        }
    }
}

/// The server that is known to hold the connection of a packet, and the rule that knows it: one of
/// the first four.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) rule: Rule,
    pub(super) backend: BackendId,
    /// Octets of the destination connection ID, where it is one of the server's: by rules 1 and 3.
    pub(super) cid_len: usize,
}

/// What the rules go by.
#[derive(Clone, Copy)]
pub(super) struct Rules<'a> {
    pub(super) routing: &'a Routing,
    pub(super) memory: &'a Memory,
    pub(super) affinity: &'a AffinityTable,
    pub(super) flows: &'a FlowTable,
}

impl Rules<'_> {
    /// Rules 1 to 4, in order: the first that answers wins.
    #[inline]
    pub(super) fn known(&self, question: &Question<'_>, trace: &mut impl Trace) -> Option<Known> {
        let known = |rule| move |backend| Known { rule, backend, cid_len: 0 };
        if let Some(backend) = self.cid(question, trace) {
            let needed = question.route.decoder.needed(question.dcid());
            return Some(Known { rule: Rule::Cid, backend, cid_len: needed.unwrap_or(0) });
        }
        let scid = self.four_tuple_scid(question, trace);
        if scid.is_some() {
            return scid.map(known(Rule::FourTupleScid));
        }
        if let Some((backend, cid_len)) = self.dcid(question, trace) {
            return Some(Known { rule: Rule::Dcid, backend, cid_len });
        }
        self.four_tuple(question, trace).map(known(Rule::FourTuple))
    }

    /// Rule 5: the backend of a packet whose server nobody knows; `None` when no backend takes
    /// connections.
    pub(super) fn choose(
        &self,
        question: &Question<'_>,
        trace: &mut impl Trace,
    ) -> Option<BackendId> {
        let pool = self.routing.pool(question.route.default_pool);
        let key = fallback_key(pool, question.packet, question.path);
        let is_tried = |id: &BackendId| {
            let backend = self.routing.backend(*id);
            backend.is_some_and(|backend| backend.state == BackendState::Probing)
        };
        // Whoever has tried it in vain is spared trying again.
        let chosen = match pool.fallback(key) {
            Some(id) if is_tried(&id) && self.has_failed(question, id) => {
                pool.fallback_but(key, id)
            }
            chosen => chosen,
        };
        trace.step(Rule::Fallback, chosen, || trace::fallback(key));
        chosen
    }

    /// The backend that was seen to use the destination connection ID of a packet, and the length of
    /// that: rule 3, and what admission wants to know of an Initial.
    #[inline]
    pub(super) fn learnt(&self, question: &Question<'_>) -> Option<(BackendId, usize)> {
        let &Question { route, packet, lookup, .. } = question;
        self.routing.pools_behind(route).find_map(|pool| match packet {
            Packet::Long(LongHeader { dcid, .. }) => {
                let backend = self.memory.connection_id(lookup, pool, dcid)?;
                Some((backend, dcid.len()))
            }
            Packet::Short(header) => self.memory.connection_id_in_front(lookup, pool, header.rest),
        })
    }

    /// Whether a backend that is tried has left a first flight on this path unanswered.
    fn has_failed(&self, question: &Question<'_>, id: BackendId) -> bool {
        let &Question { now, listener, path, .. } = question;
        self.flows.is_unanswered(now, listener, path, id)
    }

    #[inline]
    fn cid(&self, question: &Question<'_>, trace: &mut impl Trace) -> Option<BackendId> {
        let &Question { route, decoded, .. } = question;
        // Whoever is in the table of servers is in the snapshot.
        let present = decoded.ok().and_then(|decoded| route.server(&decoded));
        trace.step(Rule::Cid, present, || trace::decoded(self.routing, route, decoded, present));
        present
    }

    #[inline]
    fn four_tuple_scid(
        &self,
        question: &Question<'_>,
        trace: &mut impl Trace,
    ) -> Option<BackendId> {
        let &Question { listener, path, packet, lookup, .. } = question;
        let remembered = match packet {
            Packet::Long(header) => self.memory.handshake(lookup, listener, path, &header),
            Packet::Short(_) => None,
        };
        // The handshake of such a packet has had no answer with a connection ID that leads to its
        // server: one that is down is not going to give one, another may.
        let may_answer = |id| match self.routing.backend(id).map(|backend| backend.state) {
            Some(BackendState::Active | BackendState::Draining | BackendState::Miswired) => true,
            Some(BackendState::Probing) => !self.has_failed(question, id),
            Some(BackendState::Down) | None => false,
        };
        let present = remembered.filter(|&id| may_answer(id));
        trace.step(Rule::FourTupleScid, present, || trace::handshake(packet, remembered, present));
        present
    }

    #[inline]
    fn dcid(&self, question: &Question<'_>, trace: &mut impl Trace) -> Option<(BackendId, usize)> {
        let remembered = self.learnt(question);
        let present = remembered.filter(|&(id, _)| self.routing.backend(id).is_some());
        trace.step(Rule::Dcid, present.map(|(id, _)| id), || trace::learnt(remembered.is_some()));
        present
    }

    #[inline]
    fn four_tuple(&self, question: &Question<'_>, trace: &mut impl Trace) -> Option<BackendId> {
        let &Question { listener, path, packet, .. } = question;
        let remembered = self.affinity.get(listener, path);
        let present = remembered.filter(|&id| may_keep(self.routing, packet, id));
        trace.step(Rule::FourTuple, present, || trace::four_tuple(remembered, present));
        present
    }
}

/// Whether the 4-tuple's memory decides about this packet.
fn may_keep(routing: &Routing, packet: Packet<'_>, id: BackendId) -> bool {
    let Some(backend) = routing.backend(id) else { return false };
    match packet {
        Packet::Short(_) => true,
        // A long header that got here begins a connection, which has no claim on the backend of
        // another one: where connection IDs are routable it is free to go elsewhere, and a backend
        // that takes no new connections does not get it.
        Packet::Long(_) => {
            !routing.pool(backend.pool).routable && backend.state == BackendState::Active
        }
    }
}

pub(super) fn fallback_key<'a>(
    pool: &PoolRoute,
    packet: Packet<'a>,
    path: &ClientPath,
) -> FallbackKey<'a> {
    match (pool.hash, packet) {
        (HashBy::Dcid, Packet::Long(header)) if header.dcid.len() >= MIN_FIRST_DCID_LEN => {
            FallbackKey::ConnectionId(header.dcid)
        }
        (HashBy::ClientAddress, _) => FallbackKey::Address(path.client.ip()),
        (HashBy::Dcid | HashBy::ClientAddressAndPort, _) => FallbackKey::Client(path.client),
    }
}
