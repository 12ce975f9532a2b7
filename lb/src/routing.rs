//! The routing snapshot: what a worker needs to know of the configuration and of the state of the
//! backends, immutable, replaced as a whole.

use std::{
    collections::BTreeMap, hash::Hasher, net::IpAddr, num::NonZeroU32, sync::Arc, time::Duration,
};

use hashbrown::HashMap;
use quic::routable::{Decoded, Decoder};
use quic_lb_config::{Config, HashBy, Listener, Pool, Timeouts};
use siphasher::sip::SipHasher13;

use crate::{
    admission::Gate,
    backend::{BackendAddr, BackendId, BackendState, MAX_BACKENDS, PoolIndex},
    client_path::{ClientAddr, ListenerIndex},
    connection_log::sample::Sample,
    learnt::LearntCids,
    listeners::Placed,
    maglev::{Maglev, Size},
    refusing::Refusing,
    registry::{Lasting, Registry},
    wanted::{Known, Wanted, WantedBackend},
};

/// The snapshot.
#[derive(Debug)]
pub struct Routing {
    /// How long what is remembered lives.
    pub lifetimes: Lifetimes,
    /// Which flows are logged, if any.
    pub logged: Option<Sample>,
    /// Backends that have refused something lately.
    pub(crate) refusing: Arc<Refusing>,
    /// By number.
    listeners: Vec<Option<ListenerRoute>>,
    pools: Vec<PoolRoute>,
    backends: Vec<Option<BackendRoute>>,
}

/// How long what is remembered of clients and servers lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetimes {
    /// A flow without a datagram either way.
    pub flow_idle: Duration,
    /// A flow whose backend has not answered.
    pub flow_unanswered: Duration,
    /// A learnt connection ID that nobody uses.
    pub learnt: Duration,
}

impl From<&Timeouts> for Lifetimes {
    fn from(timeouts: &Timeouts) -> Self {
        let &Timeouts { flow_idle, flow_unanswered, learnt, .. } = timeouts;
        Self { flow_idle, flow_unanswered, learnt }
    }
}

/// What a listener leads to, and whom it lets in.
#[derive(Debug)]
pub struct ListenerRoute {
    /// Reads the connection IDs of every pool behind it: the pool of a packet is an answer.
    pub decoder: Decoder,
    /// The pools behind it.
    pub pools: Vec<PoolIndex>,
    /// The one of them that gets what no server is known for.
    pub default_pool: PoolIndex,
    /// Whether what begins a connection may.
    pub gate: Gate,
    /// Whether it is not in the configuration any more, and goes on for the connections that it has.
    pub leaves: bool,
    /// The metric label.
    pub name: String,
    servers: HashMap<Decoded, BackendId, ahash::RandomState>,
}

/// By what means datagrams go to the backends of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forwarding {
    /// From an upstream socket for each client path and backend, through which the answers come.
    Nat,
    /// As they are: the backends answer the clients themselves.
    Direct,
}

/// What a pool leads to.
#[derive(Debug)]
pub struct PoolRoute {
    /// The metric label.
    pub name: String,
    /// Whether the pool's servers are expected to issue routable connection IDs.
    pub routable: bool,
    /// Local addresses that datagrams to the backends leave from; empty lets the kernel choose.
    pub source_addresses: Vec<IpAddr>,
    /// By what means datagrams go to the backends.
    pub forwarding: Forwarding,
    /// What decides about packets whose server nobody knows.
    pub hash: HashBy,
    /// Sets the hashes of this pool apart from those of others.
    pub tag: u64,
    /// The connection IDs of its servers that are not routable.
    pub learnt: Arc<LearntCids>,
    /// What `table` follows from.
    choices: Arc<[Choice]>,
    size: Size,
    table: Option<Maglev<BackendId>>,
}

/// A backend that consistent hashing may choose.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Choice {
    name: Arc<str>,
    share: NonZeroU32,
    id: BackendId,
}

/// One backend.
#[derive(Clone, Debug)]
pub struct BackendRoute {
    /// Its number.
    pub id: BackendId,
    /// The metric label.
    pub name: Arc<str>,
    /// The pool that it is in.
    pub pool: PoolIndex,
    /// Where it listens.
    pub address: BackendAddr,
    /// Whether it gets new connections.
    pub state: BackendState,
}

impl Routing {
    /// The snapshot of `config` as it stands in the file, without commands, with backend numbers
    /// from `registry` and the state of each backend (pool name, backend name) as `observed`.
    pub fn new(
        config: &Config,
        registry: &mut Registry,
        observed: impl Fn(&str, &str) -> BackendState,
    ) -> Self {
        Self::behind(config, pools_behind, registry, observed)
    }

    /// As [`Self::new`], with `pools_of` each listener, the default one first.
    pub(crate) fn behind(
        config: &Config,
        pools_of: impl Fn(&Listener) -> Vec<PoolIndex>,
        registry: &mut Registry,
        observed: impl Fn(&str, &str) -> BackendState,
    ) -> Self {
        let mut wanted = Wanted::new(&config.pools, registry);
        wanted.decide(|pool, _, backend| {
            let health = observed(&config.pools[pool].name, &backend.name);
            Known { admission: backend.admission, health, step: None }
        });
        Self::made_of(config, pools_of, &wanted, registry.lasting(config), None)
    }

    /// The snapshot of `wanted` backends behind the listeners of `config`, with what it shares with
    /// those before it. The table of a pool that had the same choices `before` is shared with
    /// that snapshot, and not filled again.
    pub(crate) fn build(
        config: &Config,
        wanted: &Wanted,
        lasting: Lasting,
        before: Option<&Self>,
    ) -> Self {
        Self::made_of(config, pools_behind, wanted, lasting, before)
    }

    fn made_of(
        config: &Config,
        pools_of: impl Fn(&Listener) -> Vec<PoolIndex>,
        wanted: &Wanted,
        Lasting { listeners: placed, learnt, refusing }: Lasting,
        before: Option<&Self>,
    ) -> Self {
        let before = before.map(Self::pools_by_name).unwrap_or_default();
        let mut backends: Vec<Option<BackendRoute>> = vec![None; MAX_BACKENDS];
        let mut pools = Vec::with_capacity(config.pools.len());
        let of_pools = config.pools.iter().zip(wanted.pools()).zip(learnt);
        for (index, ((pool, wanted), learnt)) in of_pools.enumerate() {
            for WantedBackend { id, name, address, state, .. } in wanted {
                backends[id.slot()] = Some(BackendRoute {
                    id: *id,
                    name: Arc::clone(name),
                    pool: PoolIndex(index),
                    address: *address,
                    state: *state,
                });
            }
            let before = before.get(pool.name.as_str()).copied();
            pools.push(PoolRoute::new(pool, wanted, learnt, before));
        }
        let servers: Vec<_> = wanted.pools().iter().map(|pool| servers_of(pool)).collect();
        let mut listeners = vec![];
        for (Placed { index, listener, leaves }, gate) in placed {
            listeners.resize_with(listeners.len().max(index.0 + 1), || None);
            let pools = pools_of(&listener);
            let route = ListenerRoute::new(pools, &config.pools, &servers, gate);
            let name = listener.name;
            listeners[index.0] = Some(ListenerRoute { leaves, name, ..route });
        }
        let lifetimes = Lifetimes::from(&config.timeouts);
        let logged = config.log.connections.as_ref();
        let logged = logged.map(|log| Sample::of_millionths(log.sample_millionths));
        Self { lifetimes, logged, refusing, listeners, pools, backends }
    }

    /// How many pools have another table than the pool of their name has in `other`.
    #[must_use]
    pub fn tables_not_in(&self, other: &Self) -> usize {
        let others = other.pools_by_name();
        let is_shared = |pool: &&PoolRoute| match (&pool.table, others.get(pool.name.as_str())) {
            (None, _) => true,
            (Some(table), Some(other)) => other.table.as_ref().is_some_and(|o| table.is(o)),
            (Some(_), None) => false,
        };
        self.pools.iter().filter(|pool| !is_shared(pool)).count()
    }

    fn pools_by_name(&self) -> BTreeMap<&str, &PoolRoute> {
        self.pools.iter().map(|pool| (pool.name.as_str(), pool)).collect()
    }

    /// What `listener` leads to.
    ///
    /// # Panics
    ///
    /// When there is no such listener.
    #[inline]
    #[must_use]
    pub fn listener(&self, listener: ListenerIndex) -> &ListenerRoute {
        self.listeners[listener.0].as_ref().expect("whoever asks has its socket")
    }

    /// Whether there is such a listener.
    #[must_use]
    pub fn has_listener(&self, listener: ListenerIndex) -> bool {
        self.listeners.get(listener.0).is_some_and(Option::is_some)
    }

    /// What the listeners lead to that have sockets.
    pub fn listeners(&self) -> impl Iterator<Item = &ListenerRoute> {
        self.listeners.iter().flatten()
    }

    /// What the listeners that have sockets are called.
    pub fn listener_names(&self) -> impl Iterator<Item = (ListenerIndex, &str)> {
        let listeners = self.listeners.iter().enumerate();
        listeners.filter_map(|(index, of)| Some((ListenerIndex(index), of.as_ref()?.name.as_str())))
    }

    /// What `pool` leads to.
    ///
    /// # Panics
    ///
    /// When the configuration has fewer pools.
    #[must_use]
    pub fn pool(&self, pool: PoolIndex) -> &PoolRoute {
        &self.pools[pool.0]
    }

    /// All pools.
    pub fn pools(&self) -> impl Iterator<Item = &PoolRoute> {
        self.pools.iter()
    }

    /// The pools behind `listener`.
    pub fn pools_behind(&self, listener: &ListenerRoute) -> impl Iterator<Item = &PoolRoute> {
        listener.pools.iter().map(|&pool| self.pool(pool))
    }

    /// The backend behind `id`, unless it has been removed.
    #[must_use]
    pub fn backend(&self, id: BackendId) -> Option<&BackendRoute> {
        self.backends.get(id.slot())?.as_ref().filter(|backend| backend.id == id)
    }

    /// By what means datagrams go to a backend; one that has been removed is not asked for.
    #[must_use]
    pub fn forwarding(&self, id: BackendId) -> Forwarding {
        self.backend(id).map_or(Forwarding::Nat, |backend| self.pool(backend.pool).forwarding)
    }

    /// Has datagrams to `pool` forwarded by these means.
    #[cfg(test)]
    pub(crate) fn set_forwarding(&mut self, pool: PoolIndex, forwarding: Forwarding) {
        self.pools[pool.0].forwarding = forwarding;
    }

    /// All backends, by ascending slot.
    pub fn backends(&self) -> impl Iterator<Item = &BackendRoute> {
        self.backends.iter().flatten()
    }
}

impl ListenerRoute {
    /// The listener in front of `pools`, the default one first; `all` are the pools of the
    /// configuration and `servers` what their connection IDs decode to. That the configurations of
    /// pools behind one listener can be told apart was checked with the file.
    fn new(
        pools: Vec<PoolIndex>,
        all: &[Pool],
        servers: &[Vec<(Decoded, BackendId)>],
        gate: Gate,
    ) -> Self {
        let configs = pools.iter().flat_map(|pool| all[pool.0].cid_configs.iter().cloned());
        let known = pools.iter().flat_map(|pool| servers[pool.0].iter().copied());
        // Keys come from the configuration alone: nobody outside can make them collide.
        let mut servers: HashMap<_, _, _> =
            HashMap::with_hasher(ahash::RandomState::with_seeds(0, 0, 0, 0));
        servers.extend(known);
        Self {
            decoder: Decoder::new(configs),
            default_pool: pools[0],
            pools,
            gate,
            leaves: false,
            name: String::new(),
            servers,
        }
    }

    /// The server that a decoded connection ID names.
    #[inline]
    #[must_use]
    pub fn server(&self, decoded: &Decoded) -> Option<BackendId> {
        self.servers.get(decoded).copied()
    }
}

/// The pools behind a listener, as far as the file can say it today.
fn pools_behind(listener: &Listener) -> Vec<PoolIndex> {
    vec![PoolIndex(listener.pool)]
}

/// What the connection IDs of these backends decode to.
fn servers_of(backends: &[WantedBackend]) -> Vec<(Decoded, BackendId)> {
    let each = backends.iter().flat_map(|backend| {
        let decoded = |&(config_id, server_id)| Decoded { config_id, server_id };
        backend.server_ids.iter().map(decoded).map(|decoded| (decoded, backend.id))
    });
    each.collect()
}

impl PoolRoute {
    fn new(
        pool: &Pool,
        backends: &[WantedBackend],
        learnt: Arc<LearntCids>,
        before: Option<&Self>,
    ) -> Self {
        let choices = choices(backends);
        // By what the file says: another size moves almost everything.
        let size = Size::of(backends.iter().map(|backend| backend.weight.get()));
        let is_same = |before: &&Self| before.size == size && *before.choices == *choices;
        let (choices, table) = match before.filter(is_same) {
            Some(before) => (Arc::clone(&before.choices), before.table.clone()),
            None => {
                let entries = choices.iter().map(|of| (&*of.name, of.share.get(), of.id));
                let table = Maglev::new(size, entries);
                (choices.into(), table)
            }
        };
        Self {
            name: pool.name.clone(),
            routable: !pool.cid_configs.is_empty(),
            source_addresses: pool.source_addresses.clone(),
            forwarding: Forwarding::Nat,
            hash: pool.hash,
            tag: tag(&pool.name),
            learnt,
            choices,
            size,
            table,
        }
    }

    /// The backend that consistent hashing gives to `key`; `None` when none takes connections.
    #[must_use]
    pub fn fallback(&self, key: FallbackKey<'_>) -> Option<BackendId> {
        Some(self.table.as_ref()?.get(self.hash(key, 0)))
    }

    /// As [`Self::fallback`], for whoever should have another than `not`, if there is one.
    #[must_use]
    pub fn fallback_but(&self, key: FallbackKey<'_>, not: BackendId) -> Option<BackendId> {
        /// Backends that are to be avoided have a small share: each but the first fails rarely.
        const TRIES: u64 = 8;
        let table = self.table.as_ref()?;
        let mut others = (1..=TRIES).map(|n| table.get(self.hash(key, n)));
        Some(others.find(|other| *other != not).unwrap_or(not))
    }

    /// As [`Self::fallback`], for whoever has been refused by these. `None` where no other gets new connections.
    #[must_use]
    pub fn fallback_after(
        &self,
        key: FallbackKey<'_>,
        refused: impl Iterator<Item = BackendId> + Clone,
    ) -> Option<BackendId> {
        const TRIES: u64 = 8;
        let table = self.table.as_ref()?;
        let is_other = |id: &BackendId| refused.clone().all(|refused| refused != *id);
        let mut others = (1..=TRIES).map(|n| table.get(self.hash(key, n))).filter(is_other);
        // Where most have refused it, any is good enough.
        let any = || self.choices.iter().map(|choice| choice.id).find(is_other);
        others.next().or_else(any)
    }

    fn hash(&self, key: FallbackKey<'_>, nth: u64) -> u64 {
        // Fixed keys: every balancer with this configuration has to get the same answer.
        let mut hasher = SipHasher13::new_with_keys(self.tag, nth);
        match key {
            FallbackKey::ConnectionId(dcid) => hasher.write(dcid),
            FallbackKey::Address(IpAddr::V4(ip)) => hasher.write(&ip.octets()),
            // What a provider gives to one customer; within it, addresses change by themselves
            // (<https://www.rfc-editor.org/rfc/rfc8981.html>).
            FallbackKey::Address(IpAddr::V6(ip)) => hasher.write(&ip.octets()[..8]),
            FallbackKey::Client(ClientAddr(client)) => {
                match client.ip() {
                    IpAddr::V4(ip) => hasher.write(&ip.octets()),
                    IpAddr::V6(ip) => hasher.write(&ip.octets()),
                }
                hasher.write(&client.port().to_be_bytes());
            }
        }
        hasher.finish()
    }
}

/// The backends that get new connections.
fn choices(backends: &[WantedBackend]) -> Vec<Choice> {
    let in_states = |wanted: &[BackendState]| {
        let backends = backends.iter().filter(|backend| wanted.contains(&backend.state));
        let choices = backends.map(|WantedBackend { name, share, id, .. }| Choice {
            name: Arc::clone(name),
            share: *share,
            id: *id,
        });
        choices.collect::<Vec<_>>()
    };
    // When nobody is known to be well, trying those that seem down beats refusing everyone: the
    // observation may be what is wrong. Draining backends were taken out on purpose.
    // One that answers under another's connection IDs comes last: its connections are known to break.
    let states: [&[_]; 3] = [
        &[BackendState::Active, BackendState::Probing],
        &[BackendState::Down],
        &[BackendState::Miswired],
    ];
    states.into_iter().map(in_states).find(|choices| !choices.is_empty()).unwrap_or_default()
}

/// What consistent hashing goes by.
///
/// The draft's baseline is the 4-tuple. Of it, the client's half is taken: the other half is the
/// same for all packets of a listener, and may differ between balancers behind one address.
///
/// Where servers issue routable connection IDs, a long header that does not decode is part of a
/// first flight, and the connection ID that the client drew at random is the better key: it spreads
/// the connections of one socket and stays the same when a NAT rebinds before the server's answer.
/// Servers without routable connection IDs need what later packets show too, also those that come to
/// another balancer or from another port: the client's address. Its price is that all clients behind
/// one address share a server, so that pools may say otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FallbackKey<'a> {
    /// The destination connection ID of a client's first flight.
    ConnectionId(&'a [u8]),
    /// The client's address; of an IPv6 address, the first 64 bits.
    Address(IpAddr),
    /// The client's address and port.
    Client(ClientAddr),
}

/// A number that is the same for the same name on every balancer.
fn tag(name: &str) -> u64 {
    let mut hasher = SipHasher13::new_with_keys(0, 0);
    hasher.write(name.as_bytes());
    hasher.finish()
}
