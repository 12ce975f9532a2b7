//! From a document to a [`Config`]: what has to be true of values beside each other.
//!
//! Each check reports all it can and stays silent about what was reported before: a name that could
//! not be read is not missed a second time. Only when there is no error at all does a [`Config`]
//! come out.

mod retry;

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    hash::Hash,
    net::{IpAddr, SocketAddr},
    num::{NonZeroU32, NonZeroUsize},
};

use quic::routable::{CidConfig, ConfigId, MAX_ENCODED_LEN, ServerId};

use crate::{
    Surroundings,
    checked::{self, Admission, Config},
    document::{Backend, Document, HealthCheck, Listener, Pool, QuicLb, Route},
    keys::{self, KeyChoice, KeySource},
    leaf::{Count, Identity, Name, PerConfig},
    mistake::{Mistakes, Place},
    read::{At, Given, List},
    yaml::shown,
};

/// Listeners of one process; each costs a socket for each worker.
const MAX_LISTENERS: usize = 64;
/// Backends of one process, of all pools together.
const MAX_BACKENDS: usize = 4096;
/// A random connection ID may hit a backend once in so many times.
const MIN_MISSES: usize = 256;

/// The configuration that `document` describes; `None` when there are errors.
pub(crate) fn check(
    document: &Document,
    surroundings: &Surroundings<'_>,
    mistakes: &mut Mistakes,
) -> Option<Config> {
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
    let admin = check_admin(document, mistakes);
    let timeouts = check_timeouts(document, mistakes);
    let retry = retry::check(document, surroundings, mistakes);
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
        limits: checked::Limits {
            flows: non_zero(limits.flows.value.0)?,
            remembered: non_zero(limits.remembered.value.0)?,
            new_connections: retry::new_connections(&limits.new_connections_per_second.value),
            unknown_short_headers: limits.unknown_short_headers.value,
        },
        timeouts,
        log: checked::Log { level: log.level.value, format: log.format.value },
        retry: retry?,
    })
}

/// Pools by name.
struct PoolNames<'a> {
    index: HashMap<&'a str, usize>,
    /// Whether there are pools with unreadable names.
    incomplete: bool,
}

impl<'a> PoolNames<'a> {
    fn new(pools: &'a List<Pool>, mistakes: &mut Mistakes) -> Self {
        let names = pools.items.iter().map(|pool| pool.value.name.as_ref());
        check_unique(names.clone().flatten().map(|at| (&at.value.0, at)), "name", mistakes);
        let mut index = HashMap::new();
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
            let mut known: Vec<_> = self.index.keys().copied().collect();
            known.sort_unstable();
            known.truncate(10);
            let expected = format!("the name of a pool, such as {}", known.join(", "));
            let found = format!("\"{}\", which no pool is called", shown(&name.value.0));
            mistakes.error(&name.place, found, expected);
        }
        found
    }
}

/// A listener with the pools that it can send to.
struct CheckedListener {
    listener: Option<checked::Listener>,
    pools: Vec<usize>,
    /// Whether `pools` are all of them.
    complete: bool,
}

fn check_listeners(
    listeners: &List<Listener>,
    pool_names: &PoolNames<'_>,
    mistakes: &mut Mistakes,
) -> Vec<CheckedListener> {
    let items = || listeners.items.iter().map(|listener| &listener.value);
    let names = items().filter_map(|listener| listener.name.as_ref());
    check_unique(names.map(|at| (&at.value.0, at)), "name", mistakes);
    let addresses = items().filter_map(|listener| listener.address.as_ref());
    check_unique(addresses.map(|at| (at.value.0, at)), "address", mistakes);
    items()
        .map(|listener| {
            let pool = listener.pool.as_ref().and_then(|name| pool_names.find(name, mistakes));
            let routes = check_routes(listener, pool_names, mistakes);
            let complete = pool.is_some() && routes.iter().all(Option::is_some);
            CheckedListener {
                listener: make_listener(listener, pool),
                pools: routes.into_iter().chain([pool]).flatten().collect(),
                complete,
            }
        })
        .collect()
}

fn make_listener(listener: &Listener, pool: Option<usize>) -> Option<checked::Listener> {
    let name = listener.name.as_ref()?.value.0.clone();
    let address = listener.address.as_ref()?.value.0;
    let retry_mode = match &listener.retry {
        Given::Absent => None,
        Given::Wrong => return None,
        Given::Here(retry) => Some(retry.value.mode.as_ref()?.value),
    };
    Some(checked::Listener { name, address, pool: pool?, retry_mode })
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
fn check_use(
    listeners: &List<Listener>,
    pools: &List<Pool>,
    checked: &[CheckedListener],
    mistakes: &mut Mistakes,
) {
    if listeners.incomplete || checked.iter().any(|listener| !listener.complete) {
        return;
    }
    let used: HashSet<usize> = checked.iter().flat_map(|l| &l.pools).copied().collect();
    for (index, pool) in pools.items.iter().enumerate() {
        if !used.contains(&index) {
            let found = "a pool that no listener sends to";
            mistakes.warning(&pool.place, found, "a listener with this `pool`, or no such pool");
        }
    }
}

/// A connection ID says nothing about the pool: behind one listener, its config ID has to.
fn check_config_ids_of_listeners(
    listeners: &List<Listener>,
    pools: &List<Pool>,
    pool_names: &PoolNames<'_>,
    mistakes: &mut Mistakes,
) {
    let mut reported = Vec::new();
    for listener in &listeners.items {
        let routes = listener.value.routes.here().map_or(&[][..], |routes| &routes.value.items);
        let of_routes = routes.iter().filter_map(|route| route.value.pool.as_ref());
        let mut reachable: Vec<usize> = listener
            .value
            .pool
            .iter()
            .chain(of_routes)
            .filter_map(|name| pool_names.index.get(name.value.0.as_str()).copied())
            .collect();
        reachable.sort_unstable();
        reachable.dedup();
        let mut seen: HashMap<u32, (usize, &Place)> = HashMap::new();
        for index in reachable {
            let configs =
                pools.items[index].value.quic_lb.here().map(|configs| &configs.value.items);
            let ids = configs.into_iter().flatten().filter_map(|c| c.value.config_id.as_ref());
            for id in ids {
                match seen.entry(id.value.0) {
                    Entry::Vacant(free) => {
                        free.insert((index, &id.place));
                    }
                    Entry::Occupied(taken) => {
                        let (other, first) = *taken.get();
                        if other == index || reported.contains(&(first, &id.place)) {
                            continue;
                        }
                        reported.push((first, &id.place));
                        let found = format!(
                            "config ID {}, which another pool behind {} uses",
                            id.value.0, listener.place.path
                        );
                        let expected = "config IDs that tell the pools of a listener apart";
                        mistakes.error(&id.place, found, expected);
                        mistakes.see_also(first);
                    }
                }
            }
        }
    }
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
    check_health(pool, mistakes);
    let layouts = Layouts::check(pool, surroundings, mistakes);
    let sources = check_sources(pool, mistakes);
    let backends = pool.backends.as_ref()?;
    let items = || backends.value.items.iter();
    if backends.value.is_empty() {
        mistakes.error(&backends.place, "no backend", "at least one");
    }
    let names = items().filter_map(|backend| backend.value.name.as_ref());
    check_unique(names.map(|at| (&at.value.0, at)), "name", mistakes);
    let addresses = items().filter_map(|backend| backend.value.address.as_ref());
    check_unique(addresses.map(|at| (at.value.0, at)), "address", mistakes);

    let mut identities = Identities::default();
    let mut checked_backends = Vec::with_capacity(backends.value.items.len());
    for backend in items() {
        let server_ids = check_server_ids(backend, &layouts, &mut identities, mistakes);
        check_backend_address(&backend.value, sources.as_deref(), mistakes);
        checked_backends.push(make_backend(&backend.value, server_ids));
    }
    identities.check_clear_against_encrypted(&layouts, mistakes);
    identities.check_space(&layouts, mistakes);
    let is_active = |backend: &At<Backend>| backend.value.state.value == Admission::Active;
    if !backends.value.is_empty() && !items().any(is_active) {
        let found = "backends of which none takes new connections";
        mistakes.warning(&backends.place, found, "one with `state: active`");
    }

    let mut cid_configs: Vec<CidConfig> =
        layouts.known.into_iter().map(|layout| layout.config).collect::<Option<_>>()?;
    cid_configs.sort_by_key(CidConfig::id);
    Some(checked::Pool {
        name: pool.name.as_ref()?.value.0.clone(),
        cid_configs,
        backends: checked_backends.into_iter().collect::<Option<_>>()?,
        source_addresses: sources?,
    })
}

fn check_health(pool: &Pool, mistakes: &mut Mistakes) {
    let Some(At { value: HealthCheck { interval, timeout }, .. }) = pool.health_check.here() else {
        return;
    };
    if timeout.value.0 > interval.value.0 {
        let found = "a longer time than from one probe to the next";
        mistakes.error(&timeout.place, found, "at most `interval`");
        mistakes.see_also(&interval.place);
    }
}

fn make_backend(
    backend: &Backend,
    server_ids: Vec<(ConfigId, ServerId)>,
) -> Option<checked::Backend> {
    Some(checked::Backend {
        name: backend.name.as_ref()?.value.0.clone(),
        address: backend.address.as_ref()?.value.0,
        server_ids,
        weight: NonZeroU32::new(backend.weight.value.0)?,
        admission: backend.state.value,
    })
}

/// What is known of a configuration of connection IDs with a readable config ID.
struct Layout<'a> {
    id: ConfigId,
    place: &'a Place,
    server_id_length: Option<&'a At<Count<1, 15>>>,
    /// `None` when that could not be read.
    encrypted: Option<bool>,
    config: Option<CidConfig>,
}

impl Layout<'_> {
    fn server_id_len(&self) -> Option<usize> {
        self.server_id_length.map(|at| at.value.0 as usize)
    }
}

/// The configurations of a pool.
struct Layouts<'a> {
    known: Vec<Layout<'a>>,
    /// Whether there are more, reported as wrong.
    incomplete: bool,
}

impl<'a> Layouts<'a> {
    fn check(pool: &'a Pool, surroundings: &Surroundings<'_>, mistakes: &mut Mistakes) -> Self {
        let configs = match &pool.quic_lb {
            Given::Absent => return Self { known: Vec::new(), incomplete: false },
            Given::Wrong => return Self { known: Vec::new(), incomplete: true },
            Given::Here(configs) => configs,
        };
        let ids = configs.value.items.iter().filter_map(|config| config.value.config_id.as_ref());
        check_unique(ids.map(|at| (at.value.0, at)), "config ID", mistakes);
        let mut layouts = Self { known: Vec::new(), incomplete: configs.value.incomplete };
        for config in &configs.value.items {
            let layout = layout(config, surroundings, mistakes);
            match layout {
                Some(layout) if layouts.of(layout.id).is_none() => layouts.known.push(layout),
                _ => layouts.incomplete = true,
            }
        }
        layouts
    }

    fn of(&self, id: ConfigId) -> Option<&Layout<'a>> {
        self.known.iter().find(|layout| layout.id == id)
    }

    fn none(&self) -> bool {
        self.known.is_empty() && !self.incomplete
    }

    /// How long server IDs are, for people.
    fn lengths(&self) -> String {
        let lengths: Vec<_> = self
            .known
            .iter()
            .filter_map(|layout| Some((layout.server_id_len()?, layout.id)))
            .map(|(len, id)| format!("{} for config ID {id}", octets(len)))
            .collect();
        lengths.join(", ")
    }
}

fn layout<'a>(
    At { value: config, place }: &'a At<QuicLb>,
    surroundings: &Surroundings<'_>,
    mistakes: &mut Mistakes,
) -> Option<Layout<'a>> {
    let QuicLb { key, key_file, key_env, .. } = config;
    let key = keys::find(KeySource { key, key_file, key_env }, surroundings, mistakes);
    let server_id_length = config.server_id_length.as_ref();
    let nonce_length = config.nonce_length.as_ref();
    if let (Some(server_id), Some(nonce)) = (server_id_length, nonce_length) {
        let (server_id_len, nonce_len) = (server_id.value.0 as usize, nonce.value.0 as usize);
        if server_id_len + nonce_len > MAX_ENCODED_LEN {
            let found = format!("{} after {}", octets(nonce_len), octets(server_id_len));
            let expected =
                format!("at most {MAX_ENCODED_LEN} octets for server ID and nonce together");
            mistakes.error(&nonce.place, found, expected);
            mistakes.see_also(&server_id.place);
        }
    }
    let id = ConfigId::new(u8::try_from(config.config_id.as_ref()?.value.0).ok()?)?;
    let (encrypted, key) = match &key {
        KeyChoice::Absent => (Some(false), None),
        KeyChoice::Key(secret) => (Some(true), Some(secret.key())),
        KeyChoice::Unusable => (None, None),
    };
    let config = server_id_length.zip(nonce_length).and_then(|(server_id, nonce)| {
        CidConfig::new(id, server_id.value.0 as usize, nonce.value.0 as usize, key.as_ref()).ok()
    });
    Some(Layout { id, place, server_id_length, encrypted, config })
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
    let address = value.0;
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

/// The server IDs of one backend, one for each configuration unless something was wrong.
fn check_server_ids<'a>(
    backend: &'a At<Backend>,
    layouts: &Layouts<'_>,
    identities: &mut Identities<'a>,
    mistakes: &mut Mistakes,
) -> Vec<(ConfigId, ServerId)> {
    let At { value: Backend { server_id, server_ids, .. }, place } = backend;
    let given = match (server_id, server_ids) {
        (Given::Here(one), Given::Here(many)) => {
            mistakes.error(&many.place, "`server_ids` beside `server_id`", "one of the two");
            mistakes.see_also(&one.place);
            return Vec::new();
        }
        (Given::Here(one), _) if layouts.none() => Some(&one.place),
        (_, Given::Here(many)) if layouts.none() => Some(&many.place),
        _ => None,
    };
    if let Some(place) = given {
        let expected = "`quic_lb` in the pool, or no server ID";
        mistakes.error(place, "a server ID in a pool without `quic_lb`", expected);
        return Vec::new();
    }
    match (server_id, server_ids) {
        (Given::Absent, Given::Absent) => {
            if !layouts.known.is_empty() {
                let expected = format!("`server_id` or `server_ids`: {}", layouts.lengths());
                mistakes.error(place, "a backend without server ID", expected);
            }
            Vec::new()
        }
        (Given::Here(one), Given::Absent) => {
            check_one_for_all(one, layouts, mistakes);
            let fitting = layouts.known.iter().filter(|layout| {
                layout.server_id_len().is_none_or(|len| len == one.value.0.as_slice().len())
            });
            fitting
                .map(|layout| {
                    identities.add(layout.id, one, mistakes);
                    (layout.id, one.value.0)
                })
                .collect()
        }
        (Given::Absent, Given::Here(many)) => {
            check_one_for_each(many, layouts, identities, mistakes);
            let mut ids: Vec<_> =
                many.value.entries.iter().map(|(id, identity)| (*id, identity.value.0)).collect();
            ids.sort_unstable();
            ids
        }
        _ => Vec::new(),
    }
}

fn check_one_for_all(one: &At<Identity>, layouts: &Layouts<'_>, mistakes: &mut Mistakes) {
    let len = one.value.0.as_slice().len();
    let lens = || layouts.known.iter().filter_map(Layout::server_id_len);
    let Some(wrong) =
        layouts.known.iter().find(|l| l.server_id_len().is_some_and(|wanted| wanted != len))
    else {
        return;
    };
    let alike = lens().min() == lens().max();
    let found = format!("a server ID of {}", octets(len));
    let expected = if alike {
        format!("{}, as server_id_length says", lens().next().map(octets).unwrap_or_default())
    } else {
        format!("`server_ids`, because the lengths differ: {}", layouts.lengths())
    };
    mistakes.error(&one.place, found, expected);
    mistakes.see_also(wrong.server_id_length.map_or(wrong.place, |length| &length.place));
}

fn check_one_for_each<'a>(
    many: &'a At<PerConfig<Identity>>,
    layouts: &Layouts<'_>,
    identities: &mut Identities<'a>,
    mistakes: &mut Mistakes,
) {
    for (id, identity) in &many.value.entries {
        let Some(layout) = layouts.of(*id) else {
            if !layouts.incomplete {
                let found = format!("a server ID for config ID {id}, which the pool does not have");
                let known: Vec<_> = layouts.known.iter().map(|l| l.id.to_string()).collect();
                let expected = format!("config IDs of the pool: {}", known.join(", "));
                mistakes.error(&identity.place, found, expected);
            }
            continue;
        };
        let len = identity.value.0.as_slice().len();
        match layout.server_id_length {
            Some(length) if length.value.0 as usize != len => {
                let found = format!("a server ID of {}", octets(len));
                let wanted = octets(length.value.0 as usize);
                let expected = format!("{wanted}, as server_id_length of config ID {id} says");
                mistakes.error(&identity.place, found, expected);
                mistakes.see_also(&length.place);
            }
            _ => identities.add(*id, identity, mistakes),
        }
    }
    if many.value.incomplete {
        return;
    }
    for layout in &layouts.known {
        if !many.value.entries.iter().any(|(id, _)| *id == layout.id) {
            let found = format!("no server ID for config ID {}", layout.id);
            let expected = match layout.server_id_len() {
                Some(len) => format!("{}: a server ID of {}", layout.id, octets(len)),
                None => "one for each config ID of the pool".to_owned(),
            };
            mistakes.error(&many.place, found, expected);
            mistakes.see_also(layout.place);
        }
    }
}

/// The server IDs of a pool, and where they stand.
#[derive(Default)]
struct Identities<'a> {
    places: HashMap<(ConfigId, ServerId), &'a Place>,
    /// In the order of the file.
    order: Vec<(ConfigId, ServerId)>,
}

impl<'a> Identities<'a> {
    fn add(&mut self, id: ConfigId, identity: &'a At<Identity>, mistakes: &mut Mistakes) {
        match self.places.entry((id, identity.value.0)) {
            Entry::Vacant(free) => {
                free.insert(&identity.place);
                self.order.push((id, identity.value.0));
            }
            Entry::Occupied(taken) => {
                let found = format!(
                    "server ID {} of another backend under config ID {id}",
                    identity.value.0
                );
                mistakes.error(&identity.place, found, "a server ID of its own for each backend");
                mistakes.see_also(taken.get());
            }
        }
    }

    /// Whoever sees a server ID in the clear must not learn what stands in encrypted ones
    /// (draft-ietf-quic-load-balancers-21, section 10.2): one mistake for each pair of
    /// configurations, not for each backend.
    fn check_clear_against_encrypted(&self, layouts: &Layouts<'_>, mistakes: &mut Mistakes) {
        let with = |encrypted| {
            layouts.known.iter().filter(move |layout| layout.encrypted == Some(encrypted))
        };
        for clear in with(false) {
            for encrypted in with(true) {
                let of_clear = self.order.iter().filter(|(id, _)| *id == clear.id);
                let mut shared = of_clear.filter_map(|(_, server_id)| {
                    let other = self.places.get(&(encrypted.id, *server_id))?;
                    Some((server_id, self.places.get(&(clear.id, *server_id))?, other))
                });
                let Some((server_id, place, other)) = shared.next() else { continue };
                let more = match shared.count() {
                    0 => String::new(),
                    more => format!(", and {more} more"),
                };
                let found = format!(
                    "server ID {server_id} in config ID {}, which is in the clear, and in config \
                     ID {}, which is encrypted{more}",
                    clear.id, encrypted.id
                );
                let expected = "`server_ids` with other server IDs where they are in the clear";
                mistakes.error(place, found, expected);
                if place != other {
                    mistakes.see_also(other);
                }
            }
        }
    }

    /// Warns when the random connection IDs that clients start with hit a backend too often.
    fn check_space(&self, layouts: &Layouts<'_>, mistakes: &mut Mistakes) {
        for layout in &layouts.known {
            let Some(length) = layout.server_id_length else { continue };
            let used = self.order.iter().filter(|(id, _)| *id == layout.id).count();
            let enough = |len: usize| {
                let space = u32::try_from(8 * len).ok().and_then(|bits| 1usize.checked_shl(bits));
                space.is_none_or(|space| space / MIN_MISSES >= used)
            };
            let len = length.value.0 as usize;
            if !enough(len) {
                let found = format!("{} to tell {used} server IDs apart", octets(len));
                let better = (len..).find(|len| enough(*len)).unwrap_or(len);
                let expected =
                    format!("{better} or more, so that random connection IDs rarely hit a backend");
                mistakes.warning(&length.place, found, expected);
            }
        }
    }
}

/// A backend at the address of a listener would get its own datagrams back for ever.
fn check_loops(listeners: &List<Listener>, pools: &List<Pool>, mistakes: &mut Mistakes) {
    let listening: Vec<&At<_>> =
        listeners.items.iter().filter_map(|listener| listener.value.address.as_ref()).collect();
    if listening.len() > MAX_LISTENERS {
        return;
    }
    let backends = pools.items.iter().filter_map(|pool| pool.value.backends.as_ref());
    for backend in backends.flat_map(|backends| &backends.value.items) {
        let Some(address) = &backend.value.address else { continue };
        let reaches = |listener: &SocketAddr, backend: &SocketAddr| {
            let covers = listener.ip().is_unspecified()
                && listener.is_ipv4() == backend.is_ipv4()
                && backend.ip().is_loopback();
            listener.port() == backend.port() && (listener.ip() == backend.ip() || covers)
        };
        if let Some(listener) = listening.iter().find(|l| reaches(&l.value.0, &address.value.0)) {
            let found = format!("{}, where a listener is", address.value.0);
            mistakes.error(&address.place, found, "the address of a server");
            mistakes.see_also(&listener.place);
        }
    }
}

fn check_admin(document: &Document, mistakes: &mut Mistakes) -> Option<SocketAddr> {
    let At { value, place } = document.admin.here()?.value.address.as_ref()?;
    if !value.0.ip().is_loopback() {
        let found = format!("{}, which other hosts may reach", value.0);
        mistakes.warning(
            place,
            found,
            "a loopback address: the admin interface asks for no password",
        );
    }
    Some(value.0)
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
        drain: timeouts.drain.value.0,
    }
}

/// Reports lists that are empty or too long.
fn count<T>(list: &List<T>, place: &Place, what: &str, max: usize, mistakes: &mut Mistakes) {
    if list.is_empty() {
        mistakes.error(place, format!("no {what}"), "at least one");
    }
    if list.items.len() > max {
        let found = format!("{} {what}s", list.items.len());
        mistakes.error(place, found, format!("{max} at most"));
    }
}

/// Reports every value that stands further up already.
fn check_unique<'a, K: Eq + Hash + std::fmt::Display, T: 'a>(
    values: impl Iterator<Item = (K, &'a At<T>)>,
    what: &str,
    mistakes: &mut Mistakes,
) {
    let mut first_places: HashMap<K, &Place> = HashMap::new();
    for (key, At { place, .. }) in values {
        match first_places.entry(key) {
            Entry::Vacant(free) => {
                free.insert(place);
            }
            Entry::Occupied(taken) => {
                let found = format!("{} again", shown(&taken.key().to_string()));
                mistakes.error(place, found, format!("a unique {what}"));
                mistakes.see_also(taken.get());
            }
        }
    }
}

fn octets(count: usize) -> String {
    if count == 1 { "1 octet".to_owned() } else { format!("{count} octets") }
}

fn non_zero(count: u32) -> Option<NonZeroUsize> {
    usize::try_from(count).ok().and_then(NonZeroUsize::new)
}
