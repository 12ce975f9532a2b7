//! What admission is told about a packet.

use quic::{
    header::{Kind, LongType},
    invariants::{LongHeader, Packet},
};

use super::{
    clock::Clock,
    rules::{Known, Question, Rules},
};
use crate::{
    admission::{Arrival, Judgement, Moved, Ruling},
    verdict::Rule,
};

impl Rules<'_> {
    /// Whether a packet may go on, whose server is `known` or not. Short headers of connections
    /// that exist are let through on sight.
    pub(super) fn judge(
        &self,
        question: &Question<'_>,
        known: Option<Known>,
        clock: &Clock,
    ) -> Judgement {
        let &Question { now, listener, route, path, octets, packet, lookup, .. } = question;
        let initial = match &packet {
            Packet::Short(_) if known.is_some() => return Judgement::NOT_ASKED,
            Packet::Long(header) if is_initial(header) => Some(header),
            _ => None,
        };
        let known = known.map(|known| known.rule);
        let to_server_cid = match known {
            Some(Rule::Cid | Rule::Dcid) => true,
            Some(Rule::FourTupleScid) => initial.is_some() && self.learnt(question).is_some(),
            Some(Rule::FourTuple | Rule::Fallback) | None => false,
        };
        let handshake =
            initial.and_then(|header| self.memory.handshake_state(lookup, listener, path, header));
        let may_have_moved = |evidence| match evidence {
            Moved::Given => self.memory.was_given(lookup, question.dcid()),
            Moved::FromElsewhere => self.memory.may_be_from_elsewhere(lookup),
            Moved::Port => self.memory.may_have_another_port(lookup),
        };
        let judgement = route.gate.judge(&Arrival {
            now,
            unix: clock.unix_at(now),
            client: path.client,
            local: path.local,
            datagram_len: octets.len(),
            packet,
            known,
            to_server_cid,
            server_cids_decode: self.routing.pool(route.default_pool).routable,
            handshake,
            may_have_moved: &may_have_moved,
        });
        let goes_on = judgement.ruling == Ruling::Pass && known.is_some();
        if route.leaves && !goes_on { Judgement::LEAVING } else { judgement }
    }
}

fn is_initial(header: &LongHeader<'_>) -> bool {
    matches!(header.kind(), Kind::Known(_, LongType::Initial))
}
