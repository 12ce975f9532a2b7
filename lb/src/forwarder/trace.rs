//! Who watches the rules: nobody on the packet path, `explain` otherwise; and what a rule saw, in
//! words.

use std::net::IpAddr;

use quic::{
    invariants::Packet,
    routable::{Decoded, Unroutable},
};

use crate::{
    backend::BackendId,
    routing::{FallbackKey, ListenerRoute, Routing},
    verdict::Rule,
};

/// One rule.
#[derive(Clone, Debug)]
pub struct Step {
    /// Which.
    pub rule: Rule,
    /// What it found, for people.
    pub finding: String,
    /// What it answered.
    pub backend: Option<BackendId>,
}

/// Somebody who wants to know how a decision comes about.
pub(super) trait Trace {
    fn step(&mut self, rule: Rule, backend: Option<BackendId>, finding: impl FnOnce() -> String);
}

/// Nobody: what the packet path passes.
pub(super) struct Untraced;

impl Trace for Untraced {
    fn step(&mut self, _: Rule, _: Option<BackendId>, _: impl FnOnce() -> String) {}
}

impl Trace for Vec<Step> {
    fn step(&mut self, rule: Rule, backend: Option<BackendId>, finding: impl FnOnce() -> String) {
        self.push(Step { rule, finding: finding(), backend });
    }
}

pub(super) fn decoded(
    routing: &Routing,
    listener: &ListenerRoute,
    decoded: Result<Decoded, Unroutable>,
    present: Option<BackendId>,
) -> String {
    match decoded {
        _ if !routing.pools_behind(listener).any(|pool| pool.routable) => {
            let names: Vec<_> = routing.pools_behind(listener).map(|pool| &*pool.name).collect();
            match names.as_slice() {
                [name] => format!("pool {name} has no quic_lb configuration"),
                names => format!("no pool has a quic_lb configuration: {}", names.join(", ")),
            }
        }
        Err(unroutable) => unroutable.to_string(),
        Ok(Decoded { config_id, server_id }) if present.is_some() => {
            format!("config {config_id}, server ID {server_id}")
        }
        Ok(Decoded { config_id, server_id }) => {
            format!("config {config_id}, server ID {server_id}, which no backend has")
        }
    }
}

pub(super) fn handshake(
    packet: Packet<'_>,
    remembered: Option<BackendId>,
    present: Option<BackendId>,
) -> String {
    let ids = "this 4-tuple and source connection ID are";
    match (packet, remembered, present) {
        (Packet::Short(_), ..) => "a short header has no source connection ID".into(),
        (_, None, _) => format!("{ids} not remembered"),
        (_, _, Some(_)) => format!("{ids} remembered"),
        (_, Some(_), None) => format!("{ids} remembered with a backend that is down or gone"),
    }
}

pub(super) fn learnt(is_remembered: bool) -> String {
    match is_remembered {
        false => "no server was seen to use this connection ID".into(),
        true => "a server was seen to use this connection ID".into(),
    }
}

pub(super) fn four_tuple(remembered: Option<BackendId>, present: Option<BackendId>) -> String {
    match (remembered, present) {
        (None, _) => "this 4-tuple is not remembered".into(),
        (Some(_), Some(_)) => "this 4-tuple is remembered".into(),
        (Some(_), None) => "this 4-tuple is remembered, which does not bind this packet".into(),
    }
}

pub(super) fn fallback(key: FallbackKey<'_>) -> String {
    match key {
        FallbackKey::ConnectionId(_) => "hashed the destination connection ID".into(),
        FallbackKey::Address(IpAddr::V4(_)) => "hashed the client's address".into(),
        FallbackKey::Address(IpAddr::V6(_)) => {
            "hashed the first 64 bits of the client's address".into()
        }
        FallbackKey::Client(_) => "hashed the client's address and port".into(),
    }
}
