//! A quinn server that answers downloads and echoes, and says what arrived at it.
//!
//! One request per bidirectional stream: `GET n` gets n octets of [`pattern`], `WHO` the name of the
//! server, `FROM` the address that the server sees, anything else comes back as it is.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::Context as _;
use quic::{
    adapters::quinn::RoutableCids,
    routable::{CidConfig, CidGenerator, ConfigId, Key, Partition},
};
use quic_lb_config::{Backend, Config, Pool};
use quinn::{Runtime as _, TokioRuntime};
use quinn_proto::RandomConnectionIdGenerator;

use crate::{
    audit::{Arrivals, Audited, Issued, Ledger},
    certificate::Certificate,
    pattern,
};

/// A running server. Dropping it closes its connections.
#[derive(Debug)]
pub struct Origin {
    name: String,
    endpoint: quinn::Endpoint,
    ledger: Ledger,
    log: Arc<Log>,
}

/// What became of connections.
#[derive(Debug, Default)]
struct Log {
    accepted: AtomicUsize,
    lost: Mutex<Vec<String>>,
}

/// Which connection IDs a server hands out.
#[derive(Clone, Debug)]
pub enum Cids {
    /// Those of the balancer's configuration.
    Routable(RoutableCids),
    /// Random ones of this length.
    Opaque(usize),
}

impl Cids {
    /// What the configuration says for `backend` of `pool`, with the configuration `config_id` or,
    /// if that is `None`, the first one. Servers of pools without any get random connection IDs.
    ///
    /// # Errors
    ///
    /// When there is no such pool, backend or configuration.
    pub fn of(
        config: &Config,
        pool: &str,
        backend: &str,
        config_id: Option<u8>,
    ) -> anyhow::Result<Self> {
        let (pool, backend) = find(config, pool, backend)?;
        let wanted = |id: ConfigId| config_id.is_none_or(|wanted| wanted == id.get());
        let Some(scheme) = pool.cid_configs.iter().find(|scheme| wanted(scheme.id())) else {
            anyhow::ensure!(config_id.is_none(), "no such configuration");
            return Ok(Self::Opaque(OPAQUE_CID_LEN));
        };
        Self::routable(backend, scheme.clone())
    }

    /// [`Cids::of`] with another key than that of the configuration.
    ///
    /// # Errors
    ///
    /// As [`Cids::of`].
    pub fn with_key(config: &Config, pool: &str, backend: &str, key: &Key) -> anyhow::Result<Self> {
        let (pool, backend) = find(config, pool, backend)?;
        let scheme = pool.cid_configs.first().context("no configuration")?;
        let (id, lengths) = (scheme.id(), (scheme.server_id_len(), scheme.nonce_len()));
        Self::routable(backend, CidConfig::new(id, lengths.0, lengths.1, Some(key))?)
    }

    fn routable(backend: &Backend, scheme: CidConfig) -> anyhow::Result<Self> {
        let server_id = backend.server_ids.iter().find(|(id, _)| *id == scheme.id());
        let (_, server_id) = server_id.context("no server ID for this configuration")?;
        let generator = CidGenerator::new(scheme, *server_id, Partition::Whole, seed()?)?;
        Ok(Self::Routable(RoutableCids::new(generator, seed()?)))
    }
}

fn find<'a>(
    config: &'a Config,
    pool: &str,
    backend: &str,
) -> anyhow::Result<(&'a Pool, &'a Backend)> {
    let pool = config.pools.iter().find(|each| each.name == pool).context("no such pool")?;
    let backend = pool.backends.iter().find(|each| each.name == backend);
    Ok((pool, backend.context("no such backend")?))
}

/// The length that most servers use.
pub const OPAQUE_CID_LEN: usize = 8;

impl Origin {
    /// Starts a server at `address`.
    ///
    /// # Errors
    ///
    /// When the address is taken.
    pub fn start(
        name: &str,
        address: SocketAddr,
        cids: Cids,
        issued: &Issued,
        certificate: &Certificate,
    ) -> anyhow::Result<Self> {
        let ledger = Ledger::default();
        let socket = UdpSocket::bind(address).with_context(|| format!("{name} at {address}"))?;
        let audited = Audited {
            inner: TokioRuntime.wrap_udp_socket(socket)?,
            server: name.to_owned(),
            issued: issued.clone(),
            ledger: ledger.clone(),
        };
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(certificate.server()?));
        server.transport_config(Arc::new(transport()));
        let endpoint = quinn::Endpoint::new_with_abstract_socket(
            endpoint_config(name, cids, issued),
            Some(server),
            Arc::new(audited),
            Arc::new(TokioRuntime),
        )?;
        let log = Arc::<Log>::default();
        tokio::spawn(accept(name.into(), endpoint.clone(), Arc::clone(&log)));
        Ok(Self { name: name.to_owned(), endpoint, ledger, log })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What arrived.
    #[must_use]
    pub fn arrivals(&self) -> Arrivals {
        self.ledger.read()
    }

    /// How many connections were established.
    #[must_use]
    pub fn accepted(&self) -> usize {
        self.log.accepted.load(Relaxed)
    }

    /// Why connections ended other than by their client's wish, one entry each.
    #[must_use]
    pub fn lost(&self) -> Vec<String> {
        self.log.lost.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.endpoint.close(0u8.into(), b"the server ends");
    }
}

/// What servers and clients have in common: the defaults, for a network that is known to be near.
#[must_use]
pub fn transport() -> quinn::TransportConfig {
    let mut transport = quinn::TransportConfig::default();
    transport.initial_rtt(Duration::from_millis(50));
    transport
}

/// Fresh randomness.
///
/// # Errors
///
/// When the system has none.
pub fn seed() -> anyhow::Result<[u8; 32]> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(|error| anyhow::anyhow!("no randomness: {error}"))?;
    Ok(seed)
}

fn endpoint_config(name: &str, cids: Cids, issued: &Issued) -> quinn::EndpointConfig {
    let mut config = quinn::EndpointConfig::default();
    let (name, issued) = (name.to_owned(), issued.clone());
    config.cid_generator(move || match &cids {
        Cids::Routable(cids) => issued.record(&name, cids.clone()),
        Cids::Opaque(len) => issued.record(&name, RandomConnectionIdGenerator::new(*len)),
    });
    config
}

async fn accept(name: Arc<str>, endpoint: quinn::Endpoint, log: Arc<Log>) {
    while let Some(incoming) = endpoint.accept().await {
        let (name, log) = (Arc::clone(&name), Arc::clone(&log));
        tokio::spawn(async move {
            let reason = match incoming.await {
                Ok(connection) => {
                    log.accepted.fetch_add(1, Relaxed);
                    answer(&name, &connection).await
                }
                Err(reason) => reason,
            };
            use quinn::ConnectionError::{ApplicationClosed, LocallyClosed};
            if !matches!(reason, ApplicationClosed(_) | LocallyClosed) {
                let mut lost = log.lost.lock().unwrap_or_else(PoisonError::into_inner);
                lost.push(reason.to_string());
            }
        });
    }
}

/// Answers requests until the connection ends, and says why it did.
async fn answer(name: &Arc<str>, connection: &quinn::Connection) -> quinn::ConnectionError {
    loop {
        match connection.accept_bi().await {
            Ok((send, recv)) => {
                let (name, connection) = (Arc::clone(name), connection.clone());
                // A stream that ends early belongs to a connection that has.
                tokio::spawn(async move { serve(&name, &connection, send, recv).await });
            }
            Err(reason) => return reason,
        }
    }
}

async fn serve(
    name: &str,
    connection: &quinn::Connection,
    mut send: quinn::SendStream,
    mut recv: quinn::RecvStream,
) -> anyhow::Result<()> {
    const VERB: usize = 4;
    const MAX_LINE: usize = 64;
    let mut head = Vec::new();
    while head.len() < VERB
        && let Some(chunk) = recv.read_chunk(usize::MAX, true).await?
    {
        head.extend_from_slice(&chunk.bytes);
    }
    if head.starts_with(b"GET ") {
        head.extend(recv.read_to_end(MAX_LINE).await?);
        let length = str::from_utf8(&head[VERB..])?.trim().parse()?;
        for block in pattern::blocks(length) {
            send.write_all(&block).await?;
        }
    } else if head.starts_with(b"WHO") {
        send.write_all(name.as_bytes()).await?;
    } else if head.starts_with(b"FROM") {
        send.write_all(connection.remote_address().to_string().as_bytes()).await?;
    } else {
        send.write_all(&head).await?;
        while let Some(chunk) = recv.read_chunk(usize::MAX, true).await? {
            send.write_chunk(chunk.bytes).await?;
        }
    }
    send.finish()?;
    // Dropping the stream earlier would be fine too; waiting keeps resets out of the picture.
    send.stopped().await?;
    Ok(())
}
