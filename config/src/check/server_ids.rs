//! Server IDs and config IDs: what has to be true of them within a pool, and of the pools behind
//! one listener.

use std::collections::{BTreeMap, btree_map::Entry};

use quic::routable::{CidConfig, ConfigId, MAX_ENCODED_LEN, ServerId};

use super::{
    listeners::PoolNames,
    unique::{check_unique, octets},
};
use crate::{
    document::{Backend, Listener, Pool, QuicLb},
    keys::{self, KeyChoice, KeySource},
    leaf::{Count, Identity, PerConfig},
    mistake::{Mistakes, Place},
    read::{At, Given, List},
    surroundings::Surroundings,
};

/// A random connection ID may hit a backend once in so many times.
const MIN_MISSES: usize = 256;

/// What is known of a configuration of connection IDs with a readable config ID.
pub(super) struct Layout<'a> {
    id: ConfigId,
    place: &'a Place,
    server_id_length: Option<&'a At<Count<1, 15>>>,
    /// `None` when that could not be read.
    encrypted: Option<bool>,
    pub(super) config: Option<CidConfig>,
}

impl Layout<'_> {
    fn server_id_len(&self) -> Option<usize> {
        self.server_id_length.map(|at| at.value.0 as usize)
    }
}

/// The configurations of a pool.
pub(super) struct Layouts<'a> {
    pub(super) known: Vec<Layout<'a>>,
    /// What is known of others, which were reported as wrong: the lengths of their server IDs.
    other_lengths: Vec<&'a At<Count<1, 15>>>,
    /// Whether there are others.
    incomplete: bool,
}

impl<'a> Layouts<'a> {
    pub(super) fn check(
        pool: &'a Pool,
        surroundings: &Surroundings<'_>,
        mistakes: &mut Mistakes,
    ) -> Self {
        let configs = match &pool.quic_lb {
            Given::Absent => return Self::none_but(false),
            Given::Wrong => return Self::none_but(true),
            Given::Here(configs) => configs,
        };
        let ids = configs.value.items.iter().filter_map(|config| config.value.config_id.as_ref());
        check_unique(ids.map(|at| (at.value.0, at)), "config ID", mistakes);
        let mut layouts = Self::none_but(configs.value.incomplete);
        for config in &configs.value.items {
            let layout = layout(config, surroundings, mistakes);
            match layout {
                Some(layout) if layouts.of(layout.id).is_none() => layouts.known.push(layout),
                _ => {
                    layouts.other_lengths.extend(&config.value.server_id_length);
                    layouts.incomplete = true;
                }
            }
        }
        layouts
    }

    fn none_but(incomplete: bool) -> Self {
        Self { known: Vec::new(), other_lengths: Vec::new(), incomplete }
    }

    /// All lengths of server IDs, and where they stand.
    fn all_lengths(&self) -> impl Iterator<Item = &'a At<Count<1, 15>>> {
        let known = self.known.iter().filter_map(|layout| layout.server_id_length);
        known.chain(self.other_lengths.iter().copied())
    }

    fn of(&self, id: ConfigId) -> Option<&Layout<'a>> {
        self.known.iter().find(|layout| layout.id == id)
    }

    fn none(&self) -> bool {
        self.known.is_empty() && !self.incomplete
    }

    /// How long server IDs are, for people.
    fn lengths(&self) -> String {
        let known = self.known.iter();
        let known = known.filter_map(|layout| Some((layout.server_id_len()?, layout.id)));
        let known = known.map(|(len, id)| format!("{} for config ID {id}", octets(len)));
        let others = self.other_lengths.iter().map(|length| length.value.0 as usize);
        let others = others.map(|len| format!("{} for one without a readable ID", octets(len)));
        let lengths: Vec<_> = known.chain(others).collect();
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
                format!("at most {MAX_ENCODED_LEN} bytes for server ID and nonce together");
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

/// The server IDs of one backend, one for each configuration unless something was wrong.
pub(super) fn check_server_ids<'a>(
    backend: &'a At<Backend>,
    layouts: &Layouts<'_>,
    identities: &mut Identities<'a>,
    mistakes: &mut Mistakes,
) -> Vec<(ConfigId, ServerId)> {
    let At { value: Backend { server_id, server_ids, .. }, place } = backend;
    let given = match (server_id, server_ids) {
        (Given::Here(one), Given::Here(many)) if !layouts.none() => {
            mistakes.error(&many.place, "`server_ids` beside `server_id`", "one of the two");
            mistakes.see_also(&one.place);
            None
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
    if server_id.is_absent() && server_ids.is_absent() {
        if !(layouts.known.is_empty() && layouts.other_lengths.is_empty()) {
            let lengths = layouts.lengths();
            let lengths = if lengths.is_empty() { lengths } else { format!(": {lengths}") };
            let expected = format!("`server_id` or `server_ids`{lengths}");
            mistakes.error(place, "a backend without server ID", expected);
        }
        return Vec::new();
    }
    if let Given::Here(one) = server_id {
        check_one_for_all(one, layouts, mistakes);
    }
    if let Given::Here(many) = server_ids {
        check_one_for_each(many, layouts, identities, mistakes);
    }
    match (server_id, server_ids) {
        (Given::Here(one), Given::Absent) => {
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
    let lens = || layouts.all_lengths().map(|length| length.value.0 as usize);
    let Some(wrong) = layouts.all_lengths().find(|length| length.value.0 as usize != len) else {
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
    mistakes.see_also(&wrong.place);
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
pub(super) struct Identities<'a> {
    places: BTreeMap<(ConfigId, ServerId), &'a Place>,
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
    pub(super) fn check_clear_against_encrypted(
        &self,
        layouts: &Layouts<'_>,
        mistakes: &mut Mistakes,
    ) {
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
    pub(super) fn check_space(&self, layouts: &Layouts<'_>, mistakes: &mut Mistakes) {
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

/// A connection ID says nothing about the pool: behind one listener, its config ID has to.
pub(super) fn check_config_ids_of_listeners(
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
        let mut seen: BTreeMap<u32, (usize, &Place)> = BTreeMap::new();
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
