//! From a document to a [`Config`]: what has to be true of values beside each other.
//!
//! Each check reports all it can and stays silent about what was reported before: a name that could
//! not be read is not missed a second time. Only when there is no error at all does a [`Config`]
//! come out.

mod admin;
mod health;
mod listeners;
mod retry;
mod server_ids;
mod tls;
mod unique;
mod warnings;
mod zones;

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
    path::PathBuf,
};

use quic::routable::{CidConfig, ConfigId, ServerId};

use crate::{
    checked::{
        self, Admission, Config, HashBy, HonoursTokens, LogTarget, MAX_BACKENDS, MAX_HASH_SLOTS,
        MAX_LISTENERS, ResetSecret,
    },
    document::{Backend, ConnectionLog, Document, HealthCheck, Listener, Pool, StatelessReset},
    keys::{self, KeyChoice, KeySource},
    leaf::{Endpoint, Text},
    mistake::Mistakes,
    read::{At, Given, List},
    surroundings::Surroundings,
};
use listeners::{PoolNames, check_listeners, check_use, covers, places};
use server_ids::{Identities, Layouts, check_config_ids_of_listeners, check_server_ids};
use unique::{check_unique, count, non_zero};

/// The configuration that `document` describes; `None` when there are errors.
pub(crate) fn check(
    mut document: Document,
    surroundings: &Surroundings<'_>,
    mistakes: &mut Mistakes,
) -> Option<Config> {
    zones::resolve(&mut document, surroundings, mistakes);
    let document = &document;
    let no_listeners = List { items: Vec::new(), incomplete: true };
    let no_pools = List { items: Vec::new(), incomplete: true };
    let listeners = document.listeners.as_ref().map_or(&no_listeners, |at| &at.value);
    let pools = document.pools.as_ref().map_or(&no_pools, |at| &at.value);

    if let Some(At { value, place }) = &document.listeners {
        count(value, place, "listener", MAX_LISTENERS, mistakes);
    }
    if let Some(At { value, place }) = &document.pools
        && value.is_empty()
    {
        mistakes.error(place, "no pool", "at least one");
    }
    let pool_names = PoolNames::new(pools, mistakes);
    let checked_pools = check_pools(pools, surroundings, mistakes);
    let checked_listeners = check_listeners(listeners, &pool_names, mistakes);
    check_config_ids_of_listeners(listeners, pools, &pool_names, mistakes);
    check_loops(listeners, pools, mistakes);
    check_use(listeners, pools, &checked_listeners, mistakes);
    let admin = admin::check_admin(document, surroundings, mistakes);
    let timeouts = check_timeouts(document, mistakes);
    let retry = retry::check(document, surroundings, mistakes);
    let state_dir = check_state_dir(document, mistakes);
    warnings::warn(document, &pool_names, surroundings, mistakes);
    if mistakes.has_errors() {
        return None;
    }

    let limits = &document.limits.value;
    let log = &document.log.value;
    Some(Config {
        workers: document.workers.here().and_then(|workers| non_zero(workers.value.0)),
        listeners: checked_listeners
            .into_iter()
            .map(|listener| listener.listener)
            .collect::<Option<_>>()?,
        pools: checked_pools.into_iter().collect::<Option<_>>()?,
        admin,
        state_dir,
        limits: checked::Limits {
            flows: non_zero(limits.flows.value.0)?,
            remembered: non_zero(limits.remembered.value.0)?,
            new_connections: retry::new_connections(&limits.new_connections_per_second.value),
            unknown_short_headers: limits.unknown_short_headers.value,
        },
        timeouts,
        log: checked::Log {
            level: log.level.value,
            format: log.format.value,
            connections: log
                .connections
                .here()
                .and_then(|at| connection_log(&at.value, surroundings)),
        },
        retry: retry?,
    })
}

fn check_pools(
    pools: &List<Pool>,
    surroundings: &Surroundings<'_>,
    mistakes: &mut Mistakes,
) -> Vec<Option<checked::Pool>> {
    let mut backends = 0;
    pools
        .items
        .iter()
        .map(|pool| {
            if let Some(list) = &pool.value.backends {
                let before = backends;
                backends += list.value.items.len();
                if backends > MAX_BACKENDS && before <= MAX_BACKENDS {
                    let found = format!("{backends} backends up to here");
                    mistakes.error(&list.place, found, format!("{MAX_BACKENDS} at most"));
                }
            }
            check_pool(&pool.value, surroundings, mistakes)
        })
        .collect()
}

fn check_pool(
    pool: &Pool,
    surroundings: &Surroundings<'_>,
    mistakes: &mut Mistakes,
) -> Option<checked::Pool> {
    let health_check = health::check(pool, surroundings, mistakes);
    let layouts = Layouts::check(pool, surroundings, mistakes);
    let sources = check_sources(pool, mistakes);
    let hash = check_hash(pool, mistakes);
    let reset_secret = check_stateless_reset(pool, surroundings, mistakes);
    let honours_tokens = match &pool.honours_tokens {
        Given::Here(at) => Some(at.value),
        Given::Absent => Some(HonoursTokens::default()),
        Given::Wrong => None,
    };
    let report_token = match &pool.report_token_file {
        Given::Here(file) => admin::read_token(file, surroundings, mistakes).map(Some),
        Given::Absent => Some(None),
        Given::Wrong => None,
    };
    let backends = pool.backends.as_ref()?;
    let items = || backends.value.items.iter();
    if backends.value.is_empty() {
        mistakes.error(&backends.place, "no backend", "at least one");
    }
    let names = items().filter_map(|backend| backend.value.name.as_ref());
    check_unique(names.map(|at| (&at.value.0, at)), "name", mistakes);
    let addresses = items().filter_map(|backend| backend.value.address.as_ref());
    check_unique(addresses.map(|at| (at.value.address, at)), "address", mistakes);

    let mut identities = Identities::default();
    let mut checked_backends = Vec::with_capacity(backends.value.items.len());
    for backend in items() {
        let server_ids = check_server_ids(backend, &layouts, &mut identities, mistakes);
        check_backend_address(&backend.value, sources.as_deref(), mistakes);
        check_address_of_checks(&backend.value, &pool.health_check, mistakes);
        checked_backends.push(make_backend(&backend.value, server_ids));
    }
    identities.check_clear_against_encrypted(&layouts, mistakes);
    identities.check_space(&layouts, mistakes);
    check_weights(&backends.value, mistakes);
    let is_active = |backend: &At<Backend>| backend.value.state.value == Admission::Active;
    if !backends.value.is_empty() && !items().any(is_active) {
        let found = "backends of which none takes new connections";
        mistakes.warning(&backends.place, found, "one with `state: active`");
    }

    let cid_configs: Vec<CidConfig> =
        layouts.known.into_iter().map(|layout| layout.config).collect::<Option<_>>()?;
    Some(checked::Pool {
        name: pool.name.as_ref()?.value.0.clone(),
        cid_configs,
        backends: checked_backends.into_iter().collect::<Option<_>>()?,
        source_addresses: sources?,
        reset_secret,
        hash: hash?,
        health_check,
        honours_tokens: honours_tokens?,
        report_token: report_token?,
    })
}

fn check_stateless_reset(
    pool: &Pool,
    surroundings: &Surroundings<'_>,
    mistakes: &mut Mistakes,
) -> Option<ResetSecret> {
    let At { value: StatelessReset { key, key_file, key_env }, place } =
        pool.stateless_reset.here()?;
    match keys::find(KeySource { key, key_file, key_env }, surroundings, mistakes) {
        KeyChoice::Key(secret) => Some(ResetSecret::new(secret.octets())),
        KeyChoice::Absent => {
            mistakes.error(place, "no key", "one of `key`, `key_file` and `key_env`");
            None
        }
        KeyChoice::Unusable => None,
    }
}

/// Warns of backends that are due less than one slot of the largest table.
fn check_weights(backends: &List<Backend>, mistakes: &mut Mistakes) {
    let weight = |backend: &At<Backend>| u64::from(backend.value.weight.value.0);
    let total: u64 = backends.items.iter().map(weight).sum();
    let due_less = |backend: &&At<Backend>| weight(backend) * (MAX_HASH_SLOTS as u64) < total;
    if let Some(light) = backends.items.iter().find(due_less) {
        let place = &light.value.weight.place;
        let found = format!("a weight of {} where all together have {total}", weight(light));
        let expected = "weights that differ less: such a backend gets more than its share";
        mistakes.warning(place, found, expected);
    }
}

/// What a pool hashes by; `None` when that could not be read.
fn check_hash(pool: &Pool, mistakes: &mut Mistakes) -> Option<HashBy> {
    let routable = !pool.quic_lb.is_absent();
    let hash = match &pool.hash {
        Given::Absent => return Some(HashBy::default_of(routable)),
        Given::Wrong => return None,
        Given::Here(hash) => hash,
    };
    if hash.value == HashBy::Dcid && !routable {
        let found = "\"dcid\" without quic_lb: later packets of a connection do not show what it was hashed by";
        mistakes.warning(
            &hash.place,
            found,
            "\"client_address\", so that other balancers find the server too",
        );
    }
    Some(hash.value)
}

fn make_backend(
    backend: &Backend,
    server_ids: Vec<(ConfigId, ServerId)>,
) -> Option<checked::Backend> {
    Some(checked::Backend {
        name: backend.name.as_ref()?.value.0.clone(),
        address: backend.address.as_ref()?.value.address,
        server_ids,
        weight: NonZeroU32::new(backend.weight.value.0)?,
        admission: backend.state.value,
        check_address: backend.check_address.here().map(|at| at.value.address),
    })
}

/// The local addresses of a pool; `None` when they could not all be read.
fn check_sources(pool: &Pool, mistakes: &mut Mistakes) -> Option<Vec<IpAddr>> {
    let sources = match &pool.source_addresses {
        Given::Absent => return Some(Vec::new()),
        Given::Wrong => return None,
        Given::Here(sources) => &sources.value,
    };
    check_unique(sources.items.iter().map(|at| (at.value.0, at)), "address", mistakes);
    let addresses = sources.items.iter().map(|at| at.value.0).collect();
    (!sources.incomplete).then_some(addresses)
}

fn check_backend_address(backend: &Backend, sources: Option<&[IpAddr]>, mistakes: &mut Mistakes) {
    let Some(At { value, place }) = &backend.address else { return };
    let address = value.address;
    if address.ip().is_unspecified() {
        let found = format!("the unspecified address {}", address.ip());
        mistakes.error(place, found, "the address of one host");
        return;
    }
    let Some(sources) = sources else { return };
    if !sources.is_empty() && !sources.iter().any(|ip| ip.is_ipv4() == address.is_ipv4()) {
        let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
        let found = format!("an {family} address, but no {family} address in source_addresses");
        mistakes.error(place, found, format!("an {family} address in source_addresses too"));
    }
}

fn check_address_of_checks(
    backend: &Backend,
    checks: &Given<HealthCheck>,
    mistakes: &mut Mistakes,
) {
    let Given::Here(At { value, place }) = &backend.check_address else { return };
    if value.address.ip().is_unspecified() {
        let found = format!("the unspecified address {}", value.address.ip());
        mistakes.error(place, found, "the address of one host");
    }
    if checks.is_absent() {
        let found = "an address of checks in a pool that has none";
        mistakes.warning(place, found, "`health_check` in the pool");
    }
}

/// A backend at the address of a listener would get its own datagrams back for ever.
fn check_loops(listeners: &List<Listener>, pools: &List<Pool>, mistakes: &mut Mistakes) {
    let listening: Vec<_> = places(listeners).collect();
    if listening.len() > MAX_LISTENERS {
        return;
    }
    let listener_at = |wanted: SocketAddr| {
        let reaches = |(listener, both): &&(&At<Endpoint>, bool)| {
            let listener = listener.value.address;
            listener == wanted || covers(&listener, *both, &wanted) && wanted.ip().is_loopback()
        };
        listening.iter().find(reaches).map(|(listener, _)| &listener.place)
    };
    for pool in &pools.items {
        let checks = pool.value.health_check.here();
        let mut port = checks.and_then(|checks| checks.value.port.here());
        for backend in pool.value.backends.iter().flat_map(|backends| &backends.value.items) {
            let Some(address) = &backend.value.address else { continue };
            let checked_at = &backend.value.check_address;
            let backend = address.value.address;
            if let Some(listener) = listener_at(backend) {
                let found = format!("{backend}, where a listener is");
                mistakes.error(&address.place, found, "the address of a server");
                mistakes.see_also(listener);
            }
            if let Some(at) = checked_at.here() {
                if let Some(listener) = listener_at(at.value.address) {
                    let found = format!("{}, where a listener is", at.value.address);
                    mistakes.error(&at.place, found, "an address of the server");
                    mistakes.see_also(listener);
                }
                continue;
            }
            let checked = port.and_then(|At { value, .. }| u16::try_from(value.0).ok());
            let checked = checked.map(|port| SocketAddr::new(backend.ip(), port));
            // Of many backends, the first says enough.
            if let Some(listener) = checked.and_then(listener_at)
                && let Some(port) = port.take()
            {
                let found = format!("port {}, where a listener is", port.value.0);
                mistakes.error(&port.place, found, "a port of the servers");
                mistakes.see_also(listener);
            }
        }
    }
}

fn connection_log(
    log: &ConnectionLog,
    surroundings: &Surroundings<'_>,
) -> Option<checked::ConnectionLog> {
    let At { value: Text(path), .. } = log.path.as_ref()?;
    let to = match path.as_str() {
        "stdout" => LogTarget::Stdout,
        path => LogTarget::File(surroundings.directory.join(path)),
    };
    let (sample_millionths, format) = (log.sample.value.millionths, log.format.value);
    Some(checked::ConnectionLog { to, sample_millionths, format })
}

fn check_state_dir(document: &Document, mistakes: &mut Mistakes) -> Option<PathBuf> {
    let At { value: Text(path), place } = document.state_dir.here()?;
    let path = PathBuf::from(path);
    if !path.is_absolute() {
        let found = format!("`{}`", path.display());
        mistakes.error(place, found, "a path from / on, such as /var/lib/quic-lb");
    }
    Some(path)
}

fn check_timeouts(document: &Document, mistakes: &mut Mistakes) -> checked::Timeouts {
    let timeouts = &document.timeouts.value;
    let (idle, unanswered) = (&timeouts.flow_idle, &timeouts.flow_unanswered);
    if unanswered.value.0 > idle.value.0 {
        let found = "a longer time than flow_idle, which ends the flow first";
        mistakes.warning(&unanswered.place, found, "at most flow_idle");
        mistakes.see_also(&idle.place);
    }
    checked::Timeouts {
        flow_idle: idle.value.0,
        flow_unanswered: unanswered.value.0,
        learnt: timeouts.learnt.value.0,
        drain: timeouts.drain.value.0,
    }
}
