//! What loads and will not do as its writer expects: more flows than there are ports, connection IDs
//! that anybody can read, Retry tokens that nobody honours, a drain that is cut short.

use std::{collections::BTreeSet, net::IpAddr};

use super::listeners::PoolNames;
use crate::{
    checked::{HonoursTokens, RetryMode, UNIT_STOP_LIMIT},
    document::{Document, Listener, Pool, QuicLb},
    mistake::Mistakes,
    read::{At, Given},
    surroundings::Surroundings,
    units::largest_unit,
};

pub(super) fn warn(
    document: &Document,
    pool_names: &PoolNames<'_>,
    surroundings: &Surroundings<'_>,
    mistakes: &mut Mistakes,
) {
    warn_of_flows(document, surroundings, mistakes);
    warn_of_drain(document, mistakes);
    let pools = document.pools.as_ref().map_or(&[][..], |pools| &pools.value.items);
    let listeners = document.listeners.iter().flat_map(|listeners| &listeners.value.items);
    let mut warned_of = BTreeSet::new();
    for At { value: listener, .. } in listeners {
        let pool = listener.pool.as_ref().and_then(|name| pool_names.index.get(&*name.value.0));
        let Some((index, pool)) = pool.and_then(|index| Some((*index, pools.get(*index)?))) else {
            continue;
        };
        if is_public(listener) && warned_of.insert((index, "clear text")) {
            warn_of_clear_text(listener, &pool.value, mistakes);
        }
        if validates(listener, document) && warned_of.insert((index, "tokens")) {
            judge_tokens(listener, pool, document, mistakes);
        }
    }
}

/// Warns of a limit that was written down and cannot be reached.
fn warn_of_flows(document: &Document, surroundings: &Surroundings<'_>, mistakes: &mut Mistakes) {
    let (limits, Some(ports)) = (&document.limits, surroundings.local_ports) else { return };
    let flows = &limits.value.flows;
    let Some(pools) = document.pools.as_ref().filter(|pools| !pools.value.incomplete) else {
        return;
    };
    if flows.is_default_of(&limits.place) {
        return;
    }
    let paths: usize = pools.value.items.iter().map(|pool| paths_to_backends(&pool.value)).sum();
    let carried = paths.saturating_mul(ports);
    if carried > 0 && carried < flows.value.0 as usize {
        let found =
            format!("{} flows, of which the {ports} local ports carry {carried}", flows.value.0);
        let expected = format!(
            "{carried} at most, or more `source_addresses`, or a wider \
             net.ipv4.ip_local_port_range: each backend gets every port once from each source \
             address"
        );
        mistakes.warning(&flows.place, found, expected);
    }
}

/// Backends, each as often as there are source addresses for it.
fn paths_to_backends(pool: &Pool) -> usize {
    let sources = pool.source_addresses.here().map_or(&[][..], |sources| &sources.value.items);
    let backends = pool.backends.iter().flat_map(|backends| &backends.value.items);
    let paths = backends.map(|backend| {
        let address = backend.value.address.as_ref().map(|at| at.value.address);
        let of_family = |source: IpAddr| address.is_none_or(|a| a.is_ipv4() == source.is_ipv4());
        sources.iter().filter(|source| of_family(source.value.0)).count().max(1)
    });
    paths.sum()
}

fn warn_of_drain(document: &Document, mistakes: &mut Mistakes) {
    let drain = &document.timeouts.value.drain;
    if drain.value.0 >= UNIT_STOP_LIMIT {
        let limit = largest_unit(UNIT_STOP_LIMIT);
        let found = format!(
            "{}, and a unit (quic-lb.service) that kills after {limit}",
            largest_unit(drain.value.0)
        );
        let expected = format!(
            "less than {limit}, or a longer TimeoutStopSec (systemd), \
             terminationGracePeriodSeconds (Kubernetes)"
        );
        mistakes.warning(&drain.place, found, expected);
    }
}

fn warn_of_clear_text(listener: &Listener, pool: &Pool, mistakes: &mut Mistakes) {
    let configs = pool.quic_lb.here().map_or(&[][..], |configs| &configs.value.items);
    for At { value: QuicLb { key, key_file, key_env, .. }, place } in configs {
        if key.is_absent() && key_file.is_absent() && key_env.is_absent() {
            let found = "connection IDs in the clear on a public address: whoever sees them \
                         tells the servers apart, and the clients that move";
            mistakes.warning(place, found, "a `key` (`quic-lb keygen`), `key_file` or `key_env`");
            if let Some(address) = &listener.address {
                mistakes.see_also(&address.place);
            }
        }
    }
}

/// Whether strangers may send there. All addresses are taken for public ones.
fn is_public(listener: &Listener) -> bool {
    match listener.address.as_ref().map(|at| at.value.address.ip()) {
        None => false,
        Some(IpAddr::V4(v4)) => {
            let [first, second, ..] = v4.octets();
            let is_shared = first == 100 && second & 0xc0 == 64;
            !(v4.is_loopback() || v4.is_private() || v4.is_link_local() || is_shared)
        }
        Some(IpAddr::V6(v6)) => {
            !(v6.is_loopback() || v6.is_unique_local() || v6.is_unicast_link_local())
        }
    }
}

fn validates(listener: &Listener, document: &Document) -> bool {
    let mode = match &listener.retry {
        Given::Here(retry) => retry.value.mode.as_ref().map(|mode| mode.value),
        Given::Absent => Some(document.retry.value.mode.value),
        Given::Wrong => None,
    };
    mode.is_some_and(|mode| mode != RetryMode::Off)
}

fn judge_tokens(
    listener: &Listener,
    At { value: pool, place }: &At<Pool>,
    document: &Document,
    mistakes: &mut Mistakes,
) {
    let of_listener = listener.retry.here().and_then(|retry| retry.value.mode.as_ref());
    let mode = of_listener.unwrap_or(&document.retry.value.mode);
    match &pool.honours_tokens {
        Given::Here(At { value: HonoursTokens::No, place }) => {
            let found = "address validation in front of servers that do not honour its tokens";
            mistakes.error(place, found, "`retry: { mode: off }` on the listeners of this pool");
            mistakes.see_also(&mode.place);
        }
        Given::Absent => {
            let found = "address validation in front of servers that are not known to honour its \
                         tokens: it does not begin before connections with tokens have shown it";
            let expected =
                "`honours_tokens: true` when they have the same `retry.keys`, or \"probe\"";
            mistakes.warning(place, found, expected);
            mistakes.see_also(&mode.place);
        }
        Given::Here(_) | Given::Wrong => {}
    }
}
