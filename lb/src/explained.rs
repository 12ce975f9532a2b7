//! What `explain` says of a datagram: in words for people, and the same facts in JSON. The command
//! and the admin interface of a running balancer share it.

use std::fmt;

use quic::{
    header::{self, Kind, LongType, Version},
    invariants::{Malformed, Packet},
};
use serde_json::{Value, json};

use crate::{
    forwarder::{AdmissionStep, Explanation, Outcome},
    routing::Routing,
    verdict::Rule,
    words::{Hex, count},
};

/// A decision about a datagram, ready to be shown.
#[derive(Clone, Debug)]
pub(crate) struct Explained {
    packets: Vec<String>,
    rules: Vec<RuleSaid>,
    admission: Option<AdmissionStep>,
    verdict: Said,
}

/// What a rule said; `None` when it was not asked.
#[derive(Clone, Debug)]
struct RuleSaid {
    rule: Rule,
    said: Option<Answer>,
}

#[derive(Clone, Debug)]
struct Answer {
    finding: String,
    backend: Option<String>,
}

/// The verdict: as a sentence and as facts.
#[derive(Clone, Debug)]
struct Said {
    sentence: String,
    facts: Value,
}

impl Explained {
    /// What `explanation` says of the datagram with these `octets`, with the names of the snapshot
    /// that it was made from.
    pub(crate) fn new(octets: &[u8], explanation: Explanation, routing: &Routing) -> Self {
        let Explanation { known, admission, choice, outcome } = explanation;
        let asked: Vec<_> = known.into_iter().chain(choice).collect();
        let rules = Rule::ALL.into_iter().map(|rule| {
            let said = asked.iter().find(|step| step.rule == rule).map(|step| {
                let backend = step.backend.and_then(|id| routing.backend(id));
                Answer {
                    finding: step.finding.clone(),
                    backend: backend.map(|of| of.name.to_string()),
                }
            });
            RuleSaid { rule, said }
        });
        let verdict = verdict(outcome, routing);
        Self { packets: packets(octets), rules: rules.collect(), admission, verdict }
    }

    /// The facts.
    pub(crate) fn json(&self) -> Value {
        let rules = self.rules.iter().map(|RuleSaid { rule, said }| match said {
            None => json!({ "rule": rule.label(), "asked": false }),
            Some(Answer { finding, backend }) => {
                json!({ "rule": rule.label(), "asked": true, "finding": finding, "backend": backend })
            }
        });
        let admission = self.admission.as_ref();
        let admission = admission
            .map(|AdmissionStep { phase, finding }| json!({ "finding": finding, "address_validation": phase }));
        json!({
            "packets": self.packets,
            "rules": rules.collect::<Vec<_>>(),
            "admission": admission,
            "verdict": self.verdict.facts,
        })
    }
}

impl fmt::Display for Explained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, packet) in (1..).zip(&self.packets) {
            writeln!(f, "  packet {nth}: {packet}")?;
        }
        for (nth, RuleSaid { rule, said }) in (1..).zip(&self.rules) {
            if *rule == Rule::Fallback {
                // Admission is asked between the rules that know a server and the one that chooses.
                match &self.admission {
                    Some(AdmissionStep { phase, finding }) => {
                        writeln!(
                            f,
                            "  admission              {finding} (address validation: {phase})"
                        )?;
                    }
                    None => writeln!(f, "  admission              not asked")?,
                }
            }
            let label = rule.label();
            match said {
                None => writeln!(f, "  rule {nth} {label:<15} not asked")?,
                Some(Answer { finding, backend: None }) => {
                    writeln!(f, "  rule {nth} {label:<15} {finding}: no answer")?;
                }
                Some(Answer { finding, backend: Some(backend) }) => {
                    writeln!(f, "  rule {nth} {label:<15} {finding}: backend {backend}")?;
                }
            }
        }
        writeln!(f, "  verdict: {}", self.verdict.sentence)
    }
}

fn verdict(outcome: Outcome, routing: &Routing) -> Said {
    match outcome {
        Outcome::Forward { backend, rule, retry } => {
            let rule = rule.label();
            let Some(backend) = routing.backend(backend) else {
                // The snapshot is the one that the decision was made from.
                return Said {
                    sentence: "forward".to_owned(),
                    facts: json!({ "does": "forward" }),
                };
            };
            let pool = &routing.pool(backend.pool).name;
            let (name, address) = (&backend.name, backend.address);
            let besides = if retry { ", and answer with a Retry" } else { "" };
            let sentence = format!(
                "forward to backend {name} of pool {pool} at {address} by rule {rule}{besides}"
            );
            let facts = json!({
                "does": "forward",
                "pool": pool,
                "backend": **name,
                "address": address.0,
                "rule": rule,
                "retry": retry,
            });
            Said { sentence, facts }
        }
        Outcome::Reply(kind) => Said {
            sentence: format!("reply, {}", kind.label()),
            facts: json!({ "does": "reply", "kind": kind.label() }),
        },
        Outcome::Drop(reason) => Said {
            sentence: format!("drop, {}", reason.label()),
            facts: json!({ "does": "drop", "reason": reason.label() }),
        },
    }
}

fn packets(octets: &[u8]) -> Vec<String> {
    if octets.is_empty() {
        return vec![Malformed::Empty.to_string()];
    }
    let packets = (1..).zip(header::packets(octets));
    let packets = packets.map(|(nth, packet)| match &packet {
        Ok(packet) => describe(packet),
        Err(_) if nth > 1 => "the rest is no QUIC packet".to_owned(),
        Err(malformed) => malformed.to_string(),
    });
    packets.collect()
}

fn describe(packet: &Packet<'_>) -> String {
    let header = match packet {
        Packet::Short(header) => {
            return format!(
                "short header, {} behind the first byte",
                count(header.rest.len(), "byte")
            );
        }
        Packet::Long(header) => header,
    };
    let kind = match header.kind() {
        Kind::VersionNegotiation => "Version Negotiation".to_owned(),
        Kind::UnknownVersion => format!("long header of version {:#010x}", header.version),
        Kind::Known(version, kind) => {
            let kind = match kind {
                LongType::Initial => "Initial",
                LongType::ZeroRtt => "0-RTT",
                LongType::Handshake => "Handshake",
                LongType::Retry => "Retry",
            };
            let version = match version {
                Version::V1 => 1,
                Version::V2 => 2,
            };
            format!("{kind} of version {version}")
        }
    };
    let cid = |cid: &[u8]| {
        if cid.is_empty() { "(empty)".to_owned() } else { Hex(cid.to_vec()).to_string() }
    };
    format!("{kind}, DCID {}, SCID {}", cid(header.dcid), cid(header.scid))
}
