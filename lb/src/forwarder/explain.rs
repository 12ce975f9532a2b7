//! The decision about a datagram, told and not taken.

use std::time::Instant;

use quic::{bucket::Bucket, initial, invariants::Packet};

use super::{
    clock::Clock,
    rules::{Datagram, Known, Question, Rules},
    trace::Step,
};
use crate::{
    admission::Ruling,
    backend::BackendId,
    bounded::Use,
    client_path::ListenerIndex,
    verdict::{DropReason, ReplyKind, Rule},
};

/// How a decision comes about, in its order.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// Rules 1 to 4, as far as they were asked; the last one knew the server, if any did.
    pub known: Vec<Step>,
    /// What admission saw; `None` when the datagram is no packet.
    pub admission: Option<AdmissionStep>,
    /// Rule 5, where no server was known and admission let the packet through.
    pub choice: Option<Step>,
    /// What came out.
    pub outcome: Outcome,
}

/// What comes out of a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is forwarded.
    Forward {
        /// Where to.
        backend: BackendId,
        /// The rule that found the backend.
        rule: Rule,
        /// Whether the client gets a Retry besides.
        retry: bool,
    },
    /// It is answered and not forwarded.
    Reply(ReplyKind),
    /// Neither.
    Drop(DropReason),
}

/// The step of admission.
#[derive(Clone, Debug)]
pub struct AdmissionStep {
    /// Whether addresses are being validated: a label of [`crate::admission::mode::Phase`].
    pub phase: &'static str,
    /// What it found, for people.
    pub finding: String,
}

/// What the packet path would do with `datagram`, by these rules.
pub(super) fn explain(
    rules: &Rules<'_>,
    clock: &Clock,
    refusals: &Bucket,
    now: Instant,
    listener: ListenerIndex,
    datagram: &Datagram<'_>,
) -> Explanation {
    let Datagram { path, octets } = datagram;
    let route = rules.routing.listener(listener);
    let mut explanation = Explanation {
        known: Vec::new(),
        admission: None,
        choice: None,
        outcome: Outcome::Drop(DropReason::Empty),
    };
    let packet = match Packet::read(octets) {
        Ok(packet) => packet,
        Err(malformed) => {
            explanation.outcome = Outcome::Drop(malformed.into());
            return explanation;
        }
    };
    let decoded = match &packet {
        Packet::Long(header) => route.decoder.decode(header.dcid),
        Packet::Short(header) => route.decoder.decode(header.rest),
    };
    let lookup = &rules.memory.lookup(now, &rules.routing.lifetimes, Use::Peek);
    let question = Question { now, listener, route, path, octets, packet, decoded, lookup };
    let known = rules.known(&question, &mut explanation.known);
    let judgement = rules.judge(&question, known, clock);
    let phase = route.gate.phase(now).label();
    explanation.admission = Some(AdmissionStep { phase, finding: judgement.why.to_string() });
    let retry = match judgement.ruling {
        Ruling::Pass => false,
        Ruling::Begin { retry, .. } => match route.gate.limits().peek(now, path.client.ip()) {
            Ok(()) => retry.is_some(),
            Err(reason) => {
                explanation.outcome = Outcome::Drop(reason);
                return explanation;
            }
        },
        Ruling::Retry(_) => {
            explanation.outcome = Outcome::Reply(ReplyKind::Retry);
            return explanation;
        }
        Ruling::Refuse(_) => {
            let (told, outcome) = refused(refusals, now, octets);
            explanation.admission.iter_mut().for_each(|step| step.finding.push_str(told));
            explanation.outcome = outcome;
            return explanation;
        }
        Ruling::Drop(reason) => {
            explanation.outcome = Outcome::Drop(reason);
            return explanation;
        }
    };
    if let Some(reason) = route.gate.refuse(path.client, path.local) {
        explanation.outcome = Outcome::Drop(reason);
        return explanation;
    }
    explanation.outcome = match known {
        Some(Known { rule, backend, .. }) => Outcome::Forward { backend, rule, retry },
        None => {
            let mut steps = Vec::new();
            let chosen = rules.choose(&question, &mut steps);
            explanation.choice = steps.pop();
            let forward = |backend| Outcome::Forward { backend, rule: Rule::Fallback, retry };
            chosen.map_or(Outcome::Drop(DropReason::NoBackend), forward)
        }
    };
    explanation
}

/// Whether the client behind an invalid token is told so.
fn refused(refusals: &Bucket, now: Instant, octets: &[u8]) -> (&'static str, Outcome) {
    let dropped = Outcome::Drop(DropReason::InvalidToken);
    if !refusals.has_room(now) {
        ("; too many are told so at this moment", dropped)
    } else if !initial::is_authentic(octets) {
        ("; nobody is told so, since the packet does not open", dropped)
    } else {
        ("; the client is told so", Outcome::Reply(ReplyKind::InvalidToken))
    }
}
