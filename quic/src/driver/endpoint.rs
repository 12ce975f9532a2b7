//! Endpoints: an address, its shards, and what is the same for all of their connections.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::{Instant, SystemTime},
};

use bytes::Bytes;

use super::{
    accept::AcceptQueue,
    connection::{Connecting, Incoming},
    error::ConnectError,
    shard::{Shard, State, Unclaimed},
    sharding,
    socket::Socket,
    task::Task,
    waiters::Waiters,
};
use crate::{
    routable::{CidConfig, CidGenerator, ConfigId, Key, Partition, ServerId, ShardMark},
    token::{InvalidToken, TokenKey, TokenKeys},
    transport::{
        self, CidIssuer, ClientConfig, DropReason, MigrateError, ResetKey, ServerConfig, Side,
        TokenPolicy, TokenResult,
    },
};

/// The most shards an endpoint can have: what fits the octet of a nonce.
const MAX_SHARDS: usize = 256;

/// Octets of connection IDs that no balancer looks at.
const STANDALONE_LEN: usize = 8;

/// Where connection IDs come from.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Cids {
    /// No balancer looks at them.
    Standalone,
    /// They lead a balancer with the same configuration to this server.
    Routable {
        /// The configuration.
        config: CidConfig,
        /// Which server of it we are.
        server_id: ServerId,
        /// What stateless-reset tokens are derived from, as long as this configuration is in use.
        reset_key: ResetKey,
    },
    /// They tell a balancer that we have no configuration: one per connection, and clients are told
    /// not to migrate.
    Unroutable {
        /// Octets, 8 to 20.
        len: usize,
        /// What stateless-reset tokens are derived from.
        reset_key: ResetKey,
    },
}

/// What an endpoint is made of.
#[derive(Debug)]
pub struct Options {
    /// Where its socket is. Ignored where `socket` is given.
    pub address: SocketAddr,
    /// A socket to take instead of binding one; the endpoint has one shard then.
    pub socket: Option<UdpSocket>,
    /// Present where connections are accepted.
    pub server: Option<ServerConfig>,
    /// Where connection IDs come from.
    pub cids: Cids,
    /// Whose address tokens are honoured; `None` for this endpoint's own.
    pub tokens: Option<TokenPolicy>,
    /// Sockets and tasks that share the work of a server, at most 256. A client has one.
    pub shards: usize,
    /// Who counts datagrams of connections that are not here.
    pub unclaimed: Option<Unclaimed>,
}

impl Options {
    /// A client at `address`.
    #[must_use]
    pub const fn client(address: SocketAddr) -> Self {
        Self {
            address,
            socket: None,
            server: None,
            cids: Cids::Standalone,
            tokens: None,
            shards: 1,
            unclaimed: None,
        }
    }

    /// A server at `address`, in one shard, that no balancer stands before.
    #[must_use]
    pub fn server(server: ServerConfig, address: SocketAddr) -> Self {
        Self { server: Some(server), ..Self::client(address) }
    }
}

/// Connections of one UDP address. Clones are handles of the same endpoint.
#[derive(Clone, Debug)]
pub struct Endpoint {
    shared: Arc<EndpointInner>,
    default_client: Option<ClientConfig>,
}

/// Abandons the shards with the last handle.
#[derive(Debug)]
struct EndpointInner {
    shards: Vec<Arc<Shard>>,
    /// What shards mark connection IDs with that are not routable, as long as the endpoint lives.
    mark_key: Key,
    accepts: Arc<AcceptQueue>,
}

impl Endpoint {
    /// An endpoint that connects, from `address`. Needs a tokio runtime, as all constructors.
    ///
    /// # Errors
    ///
    /// When the address is not to be had.
    pub fn client(address: SocketAddr) -> io::Result<Self> {
        Self::new(Options::client(address))
    }

    /// An endpoint that accepts at `address`, and can connect too.
    ///
    /// # Errors
    ///
    /// When the address is not to be had.
    pub fn server(config: ServerConfig, address: SocketAddr) -> io::Result<Self> {
        Self::new(Options::server(config, address))
    }

    /// An endpoint made of `options`.
    ///
    /// # Errors
    ///
    /// When the address is not to be had, the system has no randomness, or the connection IDs do not
    /// fit their configuration.
    pub fn new(options: Options) -> io::Result<Self> {
        let Options { address, socket, server, cids, tokens, shards, unclaimed } = options;
        let count = if server.is_some() && socket.is_none() { shards } else { 1 };
        let count = count.clamp(1, MAX_SHARDS);
        let sockets = match socket {
            Some(socket) => vec![socket],
            None => bind(address, count)?,
        };
        let (cids, reset_key) = (cids.resolved(count)?, ResetKey::new(seed()?));
        // Tokens have to be good with all shards.
        let tokens = match tokens {
            Some(tokens) => tokens,
            None => own_tokens()?,
        };
        let mut mark_key = [0; 16];
        fill(&mut mark_key)?;
        let mark_key = Key::new(mark_key);
        let accepts = Arc::<AcceptQueue>::default();
        let mut shards = Vec::new();
        let connected = sharding::connect(count);
        for (index, (socket, (others, strays))) in sockets.into_iter().zip(connected).enumerate() {
            let socket = Socket::new(socket)?;
            let core = transport::Endpoint::new(
                transport::EndpointConfig {
                    cids: cids.issuer(partition(index, count), &reset_key, &mark_key)?,
                    server: server.clone(),
                    tokens: Some(tokens.clone()),
                    seed: seed()?,
                },
                Instant::now(),
                SystemTime::now(),
            );
            let (mut others, strays) =
                ((count > 1).then_some(others), (count > 1).then_some(strays));
            cids.announce(&mut others, &mark_key);
            let shard = Arc::new(Shard::new(core, socket.address(), others, unclaimed.clone()));
            let task = Task::new(Arc::clone(&shard), Arc::clone(&accepts), socket, strays);
            tokio::spawn(task);
            shards.push(shard);
        }
        let shared = Arc::new(EndpointInner { shards, mark_key, accepts });
        Ok(Self { shared, default_client: None })
    }

    /// What [`Self::connect`] uses.
    pub fn set_default_client_config(&mut self, config: ClientConfig) {
        self.default_client = Some(config);
    }

    /// Connects to `server_name` at `remote` with the default configuration.
    ///
    /// # Errors
    ///
    /// [`ConnectError`], before anything is sent.
    pub fn connect(
        &self,
        remote: SocketAddr,
        server_name: &str,
    ) -> Result<Connecting, ConnectError> {
        let config = self.default_client.as_ref().ok_or(ConnectError::NoConfiguration)?;
        self.connect_with(config, remote, server_name)
    }

    /// Connects to `server_name` at `remote`.
    ///
    /// # Errors
    ///
    /// [`ConnectError`], before anything is sent.
    pub fn connect_with(
        &self,
        config: &ClientConfig,
        remote: SocketAddr,
        server_name: &str,
    ) -> Result<Connecting, ConnectError> {
        if self.shared.accepts.is_closed() {
            return Err(ConnectError::EndpointClosed);
        }
        let shard = &self.shared.shards[0];
        let mut state = shard.lock();
        let target = Socket::reachable(state.address, remote);
        let target = target.ok_or(ConnectError::Address(remote))?;
        let handle = state.core.connect(Instant::now(), config, target, server_name)?;
        let connection = state.core.share(handle).ok_or(ConnectError::EndpointClosed)?;
        let waiters = Waiters::new(Side::Client);
        let connection = state.adopt(shard, handle, waiters, target, connection);
        shard.wake();
        Ok(Connecting::new(connection))
    }

    /// The next connection, its handshake done or failed; `None` once the endpoint is closed.
    pub async fn accept(&self) -> Option<Incoming> {
        self.shared.accepts.next().await
    }

    /// Switches to other connection IDs: every connection gets new ones and asks the old ones back.
    ///
    /// # Errors
    ///
    /// When the system has no randomness, or the server ID does not fit the configuration; nothing
    /// has changed then.
    pub fn set_cid_config(&self, cids: Cids) -> io::Result<()> {
        let EndpointInner { shards, mark_key, .. } = &*self.shared;
        let (cids, reset_key) = (cids.resolved(shards.len())?, ResetKey::new(seed()?));
        let issuers: io::Result<Vec<_>> = (0..shards.len())
            .map(|index| cids.issuer(partition(index, shards.len()), &reset_key, mark_key))
            .collect();
        for (shard, issuer) in shards.iter().zip(issuers?) {
            let mut state = shard.lock();
            cids.announce(&mut state.others, mark_key);
            state.core.set_cid_config(issuer);
            shard.wake();
        }
        Ok(())
    }

    /// Replaces the configuration for connections to come; `None` accepts no more.
    pub fn set_server_config(&self, server: Option<&ServerConfig>) {
        self.each(|state| state.core.set_server_config(server.cloned()));
    }

    /// Replaces the address tokens that are honoured.
    pub fn set_token_policy(&self, tokens: &TokenPolicy) {
        self.each(|state| state.core.set_token_policy(tokens.clone()));
    }

    /// Goes on with another socket, as if a NAT had moved all connections: their connection IDs stay
    /// as they are.
    ///
    /// # Errors
    ///
    /// When the socket cannot be used, or the endpoint has several shards.
    pub fn rebind(&self, socket: UdpSocket) -> io::Result<()> {
        self.replace_socket(socket, |_, connection| connection.ping())
    }

    /// Goes on with another socket: connections migrate, with fresh connection IDs. Those that
    /// cannot do so now move as by [`Self::rebind`].
    ///
    /// # Errors
    ///
    /// As [`Self::rebind`].
    pub fn migrate(&self, socket: UdpSocket) -> io::Result<()> {
        self.replace_socket(socket, |now, connection| {
            let moved: Result<(), MigrateError> = connection.migrate(now, None);
            if moved.is_err() {
                connection.ping();
            }
        })
    }

    /// Where the socket is.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.shared.shards[0].lock().address
    }

    /// Connections that are not forgotten yet, closing ones included.
    #[must_use]
    pub fn connection_count(&self) -> usize {
        self.shared.shards.iter().map(|shard| shard.lock().core.connection_count()).sum()
    }

    /// How many of them are in their handshake.
    #[must_use]
    pub fn half_open(&self) -> usize {
        self.shared.shards.iter().map(|shard| shard.lock().core.half_open()).sum()
    }

    /// Address tokens of Initials that asked for a connection, by what became of them.
    #[must_use]
    pub fn tokens(&self, result: TokenResult) -> u64 {
        self.shared.shards.iter().map(|shard| shard.lock().core.tokens(result)).sum()
    }

    /// Tokens that claimed to be of a Retry and whose clients were refused, by what was wrong with them.
    #[must_use]
    pub fn tokens_refused(&self, why: InvalidToken) -> u64 {
        self.shared.shards.iter().map(|shard| shard.lock().core.tokens_refused(why)).sum()
    }

    /// Stateless resets sent. Each shard sends a thousand in a second and no more.
    #[must_use]
    pub fn resets_sent(&self) -> u64 {
        self.shared.shards.iter().map(|shard| shard.lock().core.resets_sent()).sum()
    }

    /// Datagrams dropped for this reason before they reached a connection.
    #[must_use]
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.shared.shards.iter().map(|shard| shard.lock().core.dropped(reason)).sum()
    }

    /// Datagrams that the kernel gave to another shard than their connection's: how many were handed
    /// over, and how many were lost because the other shard was behind.
    #[must_use]
    pub fn handed_over(&self) -> (u64, u64) {
        let counts = self
            .shared
            .shards
            .iter()
            .map(|shard| shard.lock().others.as_ref().map_or((0, 0), sharding::Others::counts));
        counts.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }

    /// Closes all connections with a code and words of the application, and accepts no more.
    pub fn close(&self, code: u64, reason: &[u8]) {
        let reason = Bytes::copy_from_slice(reason);
        let waiting = self.shared.accepts.close();
        let now = Instant::now();
        for shard in &self.shared.shards {
            shard.lock().close_all(now, code, &reason);
            shard.wake();
        }
        drop(waiting);
    }

    /// Waits until every connection is over and its peer has had the time to hear of it.
    pub async fn wait_idle(&self) {
        for shard in &self.shared.shards {
            loop {
                let idle = shard.idle.notified();
                if shard.lock().core.connection_count() == 0 {
                    break;
                }
                idle.await;
            }
        }
    }

    fn each(&self, mut action: impl FnMut(&mut State)) {
        self.shared.shards.iter().for_each(|shard| action(&mut shard.lock()));
    }

    fn replace_socket(
        &self,
        socket: UdpSocket,
        mut tell: impl FnMut(Instant, &mut transport::Connection),
    ) -> io::Result<()> {
        let [shard] = &self.shared.shards[..] else {
            let reason = "an endpoint with several shards cannot change its socket";
            return Err(io::Error::new(io::ErrorKind::Unsupported, reason));
        };
        let socket = Socket::new(socket)?;
        let now = Instant::now();
        let mut state = shard.lock();
        state.address = socket.address();
        state.fresh_socket = Some(socket);
        let handles: Vec<_> = state.core.connections().collect();
        for handle in handles {
            if let Some(mut connection) = state.core.connection_mut(handle) {
                tell(now, &mut connection);
            }
        }
        shard.wake();
        Ok(())
    }
}

impl Drop for EndpointInner {
    fn drop(&mut self) {
        // Dropped last, since connections lock their shards.
        let _waiting = self.accepts.close();
        for shard in &self.shards {
            let mut state = shard.lock();
            state.core.set_server_config(None);
            state.abandoned = true;
            shard.wake();
        }
    }
}

impl Cids {
    /// What can be told apart by shard: with several of them, connection IDs have to be decodable.
    fn resolved(self, shards: usize) -> io::Result<Self> {
        match self {
            Self::Standalone if shards > 1 => {
                let (key, reset_key) = (seed()?, ResetKey::new(seed()?));
                let mut half = [0; 16];
                half.copy_from_slice(&key[..16]);
                let id = ConfigId::new(0).expect("0 is below 7");
                let config = CidConfig::new(id, 1, STANDALONE_LEN - 2, Some(&Key::new(half)))
                    .expect("one octet and six fit");
                let server_id = ServerId::new(&[0]).expect("one octet");
                Ok(Self::Routable { config, server_id, reset_key })
            }
            other => Ok(other),
        }
    }

    fn issuer(
        &self,
        partition: Partition,
        own: &ResetKey,
        mark_key: &Key,
    ) -> io::Result<CidIssuer> {
        Ok(match self {
            Self::Standalone => CidIssuer::standalone(STANDALONE_LEN, seed()?, own.clone()),
            Self::Unroutable { len, reset_key } => {
                let generator = match partition {
                    Partition::Whole => CidGenerator::unroutable(*len, seed()?),
                    Partition::Of256(shard) => {
                        let mark = ShardMark::new(*len, mark_key);
                        CidGenerator::unroutable_of_shard(mark, shard, seed()?)
                    }
                };
                CidIssuer::unroutable_from(generator, reset_key.clone())
            }
            Self::Routable { config, server_id, reset_key } => {
                let made = CidGenerator::new(config.clone(), *server_id, partition, seed()?);
                let made = made.map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error));
                CidIssuer::routable(made?, reset_key.clone())
            }
        })
    }

    /// Lets a shard tell its own connection IDs from those of others.
    fn announce(&self, others: &mut Option<sharding::Others>, mark_key: &Key) {
        let Some(others) = others else { return };
        match self {
            Self::Standalone => {}
            Self::Routable { config, server_id, .. } => others.set_config(config, *server_id),
            Self::Unroutable { len, .. } => others.set_mark(ShardMark::new(*len, mark_key)),
        }
    }
}

fn partition(index: usize, count: usize) -> Partition {
    match u8::try_from(index) {
        Ok(index) if count > 1 => Partition::Of256(index),
        _ => Partition::Whole,
    }
}

/// `count` sockets at `address`; where its port is 0, all at the port that the first one gets.
fn bind(address: SocketAddr, count: usize) -> io::Result<Vec<UdpSocket>> {
    let first = Socket::bind(address, count > 1)?;
    let address = first.local_addr()?;
    let rest = (1..count).map(|_| Socket::bind(address, true));
    std::iter::once(Ok(first)).chain(rest).collect()
}

/// Tokens that only this endpoint understands, in all of its shards.
fn own_tokens() -> io::Result<TokenPolicy> {
    let (mut key, mut iv) = ([0; 16], [0; 12]);
    fill(&mut key)?;
    fill(&mut iv)?;
    let key = TokenKey::new(0, key, iv).expect("0 needs no more than seven bits");
    Ok(TokenPolicy::SharedState { minting: key.sequence(), keys: TokenKeys::new([key]) })
}

fn seed() -> io::Result<[u8; 32]> {
    let mut seed = [0; 32];
    fill(&mut seed)?;
    Ok(seed)
}

fn fill(octets: &mut [u8]) -> io::Result<()> {
    getrandom::fill(octets).map_err(|error| io::Error::other(format!("no randomness: {error}")))
}
