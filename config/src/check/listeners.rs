//! Listeners: their names, their addresses, and the pools that each of them leads to.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv6Addr, SocketAddr},
};

use super::unique::check_unique;
use crate::{
    checked::{self, MAX_LISTENERS},
    document::{Listener, Pool, Route},
    leaf::{Endpoint, Name},
    mistake::Mistakes,
    read::{At, Given, List},
    slips::closest,
    yaml::shown,
};

/// Pools by name.
pub(super) struct PoolNames<'a> {
    pub(super) index: BTreeMap<&'a str, usize>,
    /// Whether there are pools with unreadable names.
    incomplete: bool,
}

impl<'a> PoolNames<'a> {
    pub(super) fn new(pools: &'a List<Pool>, mistakes: &mut Mistakes) -> Self {
        let names = pools.items.iter().map(|pool| pool.value.name.as_ref());
        check_unique(names.clone().flatten().map(|at| (&at.value.0, at)), "name", mistakes);
        let mut index = BTreeMap::new();
        for (nth, name) in names.clone().enumerate() {
            if let Some(name) = name {
                index.entry(name.value.0.as_str()).or_insert(nth);
            }
        }
        Self { index, incomplete: pools.incomplete || names.into_iter().any(|n| n.is_none()) }
    }

    /// The pool called `name`, or a mistake.
    fn find(&self, name: &At<Name>, mistakes: &mut Mistakes) -> Option<usize> {
        let found = self.index.get(name.value.0.as_str()).copied();
        if found.is_none() && !self.incomplete {
            let known: Vec<_> = self.index.keys().copied().take(10).collect();
            let such_as = format!("the name of a pool, such as {}", known.join(", "));
            let expected = match closest(&name.value.0, self.index.keys().copied()) {
                Some(meant) => format!("\"{meant}\", if that is meant; otherwise {such_as}"),
                None => such_as,
            };
            let found = format!("\"{}\", which no pool is called", shown(&name.value.0));
            mistakes.error(&name.place, found, expected);
        }
        found
    }
}

/// A listener with the pools that it can send to.
pub(super) struct CheckedListener {
    pub(super) listener: Option<checked::Listener>,
    pools: Vec<usize>,
    /// Whether `pools` are all of them.
    complete: bool,
}

pub(super) fn check_listeners(
    listeners: &List<Listener>,
    pool_names: &PoolNames<'_>,
    mistakes: &mut Mistakes,
) -> Vec<CheckedListener> {
    let items = || listeners.items.iter().map(|listener| &listener.value);
    let names = items().filter_map(|listener| listener.name.as_ref());
    check_unique(names.map(|at| (&at.value.0, at)), "name", mistakes);
    let addresses = items().filter_map(|listener| listener.address.as_ref());
    check_unique(addresses.map(|at| (at.value.address, at)), "address", mistakes);
    check_overlaps(listeners, mistakes);
    items()
        .map(|listener| {
            let pool = listener.pool.as_ref().and_then(|name| pool_names.find(name, mistakes));
            let routes = check_routes(listener, pool_names, mistakes);
            let complete = pool.is_some() && routes.iter().all(Option::is_some);
            CheckedListener {
                listener: make_listener(listener, pool, mistakes),
                pools: routes.into_iter().chain([pool]).flatten().collect(),
                complete,
            }
        })
        .collect()
}

/// Where listeners listen, as far as that could be read, and whether they have both families there.
pub(super) fn places(
    listeners: &List<Listener>,
) -> impl Iterator<Item = (&At<Endpoint>, bool)> + Clone {
    listeners.items.iter().filter_map(|listener| {
        let both = listener.value.ipv6_only.here().is_some_and(|only| !only.value.0);
        Some((listener.value.address.as_ref()?, both))
    })
}

/// Whether a socket on all addresses, of `both` families or of its own, takes what goes to `address`, so
/// that nobody else can.
pub(super) fn covers(all: &SocketAddr, both: bool, address: &SocketAddr) -> bool {
    let of_family = both || all.is_ipv4() == address.is_ipv4();
    all.ip().is_unspecified() && of_family && all.port() == address.port()
}

/// Reports listeners of which not both can be bound.
fn check_overlaps(listeners: &List<Listener>, mistakes: &mut Mistakes) {
    // At most one each for a port and a family: the others are reported as alike.
    let all = places(listeners).filter(|(at, _)| at.value.address.ip().is_unspecified());
    let all: Vec<_> = all.collect();
    if all.len() > MAX_LISTENERS {
        return;
    }
    for (At { value, place }, _) in places(listeners) {
        let address = value.address;
        let is_covered = |(all, both): &&(&At<Endpoint>, bool)| {
            let all = &all.value.address;
            let is_another = !address.ip().is_unspecified() || all.is_ipv4() != address.is_ipv4();
            is_another && covers(all, *both, &address)
        };
        if let Some((all, _)) = all.iter().find(is_covered) {
            let found = format!("{address}, which the listener at {} covers", all.value.address);
            let expected = "another port, or this listener alone";
            mistakes.error(place, found, expected);
            mistakes.see_also(&all.place);
        }
    }
}

fn make_listener(
    listener: &Listener,
    pool: Option<usize>,
    mistakes: &mut Mistakes,
) -> Option<checked::Listener> {
    let both_families = check_families(listener, mistakes);
    let name = listener.name.as_ref()?.value.0.clone();
    let address = listener.address.as_ref()?.value.address;
    let retry_mode = match &listener.retry {
        Given::Absent => None,
        Given::Wrong => return None,
        Given::Here(retry) => Some(retry.value.mode.as_ref()?.value),
    };
    let both_families = both_families?;
    Some(checked::Listener { name, address, both_families, pool: pool?, retry_mode })
}

/// Whether the listener has both families; `None` when that could not be read, or cannot be.
fn check_families(listener: &Listener, mistakes: &mut Mistakes) -> Option<bool> {
    let only = match &listener.ipv6_only {
        Given::Absent => return Some(false),
        Given::Wrong => return None,
        Given::Here(only) => only,
    };
    let address = listener.address.as_ref()?;
    if !only.value.0 && address.value.address.ip() != Ipv6Addr::UNSPECIFIED {
        let found = format!("`ipv6_only: false` beside {}", address.value.address);
        mistakes.error(&only.place, found, "the address [::], or a listener for each family");
        mistakes.see_also(&address.place);
        return None;
    }
    Some(!only.value.0)
}

/// The pools that routes lead to; `None` for those that are not known.
fn check_routes(
    listener: &Listener,
    pool_names: &PoolNames<'_>,
    mistakes: &mut Mistakes,
) -> Vec<Option<usize>> {
    let Given::Here(routes) = &listener.routes else {
        return if listener.routes.is_absent() { Vec::new() } else { vec![None] };
    };
    let items = || routes.value.items.iter();
    for At { value: Route { server_name, alpn, .. }, place } in items() {
        match (server_name, alpn) {
            (Given::Here(first), Given::Here(second)) => {
                let expected = "one of the two in a route";
                mistakes.error(&second.place, "`alpn` beside `server_name`", expected);
                mistakes.see_also(&first.place);
            }
            (Given::Absent, Given::Absent) => {
                let expected = "`server_name` or `alpn`";
                mistakes.error(place, "neither `server_name` nor `alpn`", expected);
            }
            _ => {}
        }
    }
    let names = items().filter_map(|route| route.value.server_name.here());
    check_unique(names.map(|at| (at.value.0.to_ascii_lowercase(), at)), "server name", mistakes);
    let protocols = items().filter_map(|route| route.value.alpn.here());
    check_unique(protocols.map(|at| (&at.value.0, at)), "ALPN", mistakes);
    let mut pools: Vec<_> = items()
        .map(|route| route.value.pool.as_ref().and_then(|name| pool_names.find(name, mistakes)))
        .collect();
    if routes.value.incomplete {
        pools.push(None);
    }
    pools
}

/// Warns of pools that nobody reaches, unless it is unknown who reaches what.
pub(super) fn check_use(
    listeners: &List<Listener>,
    pools: &List<Pool>,
    checked: &[CheckedListener],
    mistakes: &mut Mistakes,
) {
    if listeners.incomplete || checked.iter().any(|listener| !listener.complete) {
        return;
    }
    let used: BTreeSet<usize> = checked.iter().flat_map(|l| &l.pools).copied().collect();
    for (index, pool) in pools.items.iter().enumerate() {
        if !used.contains(&index) {
            let found = "a pool that no listener sends to";
            mistakes.warning(&pool.place, found, "a listener with this `pool`, or no such pool");
        }
    }
}
