//! What an origin is started with, and which server of the balancer's configuration it is.

use std::{
    collections::HashMap,
    io,
    net::{SocketAddr, UdpSocket},
    path::PathBuf,
};

use quic::{
    driver::Cids,
    routable::{CidConfig, ConfigId, Decoder, ServerId},
    token::TokenKeys,
    transport::{ResetKey, TokenPolicy},
};
use quic_lb_config::{
    Backend, BearerToken, Config, Pool, ResetSecret, Retry, TokenFormat,
    system_error::why_not_listening,
};

use super::{misbehaviour::Misbehaviour, report::AdminAddress};
use crate::certificate::{Certificate, CertificateError};

/// Octets of connection IDs where the pool has no configuration for them.
const UNROUTABLE_LEN: usize = 8;
/// What a request may carry unless told otherwise.
const MAX_BODY: u64 = 64 << 20;

/// What an origin is started with.
#[derive(Debug)]
pub struct Settings {
    /// The balancer's configuration.
    pub config: Config,
    /// Which server of it to be: `NAME`, or `POOL/NAME` where several pools have that name.
    pub backend: String,
    /// Which configuration of connection IDs to use; `None` for the last in the file.
    pub config_id: Option<ConfigId>,
    /// Where to listen; `None` for the backend's address in the configuration.
    pub address: Option<SocketAddr>,
    /// A socket to take instead of binding one.
    pub socket: Option<UdpSocket>,
    /// What to present to clients.
    pub certificate: Certificate,
    /// Files to serve.
    pub root: Option<PathBuf>,
    /// Where to tell browsers, over TLS on TCP, that HTTP/3 is to be had.
    pub https: Option<SocketAddr>,
    /// The UDP port to tell them; `None` for that of the balancer's listener.
    pub alt_svc_port: Option<u16>,
    /// Where to show metrics.
    pub metrics: Option<SocketAddr>,
    /// What to derive the tokens of stateless resets from, instead of what the configuration says.
    pub reset_secret: Option<ResetSecret>,
    /// Balancers to tell of half-open connections.
    pub report_half_open: Vec<AdminAddress>,
    /// Sockets and tasks that share the work.
    pub shards: usize,
    /// Octets that the body of a request may have.
    pub max_body: u64,
    /// What to do wrong.
    pub misbehaviour: Misbehaviour,
}

impl Settings {
    /// The server `backend` of `config`, with defaults for the rest.
    #[must_use]
    pub fn new(config: Config, backend: impl Into<String>, certificate: Certificate) -> Self {
        Self {
            config,
            backend: backend.into(),
            config_id: None,
            address: None,
            socket: None,
            certificate,
            root: None,
            https: None,
            alt_svc_port: None,
            metrics: None,
            reset_secret: None,
            report_half_open: Vec::new(),
            shards: 1,
            max_body: MAX_BODY,
            misbehaviour: Misbehaviour::default(),
        }
    }
}

/// Why an origin does not start, or does not take another configuration.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The configuration has no such backend.
    #[error("there is no backend {name:?} in the configuration; it has {known}")]
    UnknownBackend {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// Several pools have one.
    #[error("several pools have a backend {name:?}: say {choices}")]
    AmbiguousBackend {
        /// What was asked for.
        name: String,
        /// What would do.
        choices: String,
    },
    /// The pool has no such configuration of connection IDs.
    #[error("the pool {pool:?} has no quic_lb configuration with config_id {config_id}")]
    UnknownConfigId {
        /// The pool.
        pool: String,
        /// What was asked for.
        config_id: u8,
    },
    /// An address is not to be had.
    #[error("cannot listen on {address} ({what}): {}", why_not_listening(error))]
    Listen {
        /// What for.
        what: &'static str,
        /// The address.
        address: SocketAddr,
        /// Why not.
        error: io::Error,
    },
    /// The folder of files is not there.
    #[error("{} is not a folder to serve files from", .0.display())]
    Root(PathBuf),
    /// The certificate is of no use.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// The endpoint does not take the connection IDs, or there is no randomness.
    #[error("the QUIC endpoint refuses: {0}")]
    Endpoint(io::Error),
}

/// Which server an origin is, and how the pool's connection IDs are read.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) pool: String,
    pub(crate) backend: String,
    pub(crate) address: SocketAddr,
    /// The port of the balancer's listener.
    pub(crate) public_port: Option<u16>,
    /// What connection IDs are made with, where the pool has routable ones.
    pub(crate) scheme: Option<(CidConfig, ServerId)>,
    /// What the tokens of stateless resets are made with, where that is to outlive the process.
    pub(crate) reset_key: Option<ResetKey>,
    /// Whose address tokens are honoured, where a balancer can ask for Retry.
    pub(crate) tokens: Option<TokenPolicy>,
    /// What reports to balancers show.
    pub(crate) report_token: Option<BearerToken>,
    pub(crate) decoder: Decoder,
    /// All servers of the pool, by what their connection IDs carry.
    pub(crate) servers: HashMap<(ConfigId, ServerId), String>,
}

impl Identity {
    pub(crate) fn find(
        config: &Config,
        name: &str,
        config_id: Option<ConfigId>,
        own_secret: Option<&ResetSecret>,
    ) -> Result<Self, ServeError> {
        let (index, pool, backend) = find(config, name)?;
        let scheme = match config_id {
            None => pool.cid_configs.last(),
            Some(wanted) => {
                let found = pool.cid_configs.iter().find(|scheme| scheme.id() == wanted);
                Some(found.ok_or_else(|| ServeError::UnknownConfigId {
                    pool: pool.name.clone(),
                    config_id: wanted.get(),
                })?)
            }
        };
        let scheme = scheme.and_then(|scheme| {
            let (_, id) = backend.server_ids.iter().find(|(config, _)| *config == scheme.id())?;
            Some((scheme.clone(), *id))
        });
        // A key for each server, and one for each configuration (draft-ietf-quic-load-balancers-21).
        let reset_key = own_secret.or(pool.reset_secret.as_ref()).map(|secret| {
            let config_id = scheme.as_ref().map_or(u8::MAX, |(config, _)| config.id().get());
            let who: [&[u8]; 3] = [pool.name.as_bytes(), backend.name.as_bytes(), &[config_id]];
            ResetKey::derived(secret.octets(), &who)
        });
        let servers = pool.backends.iter().flat_map(|backend| {
            backend.server_ids.iter().map(|(config, id)| ((*config, *id), backend.name.clone()))
        });
        let listener = config.listeners.iter().find(|listener| listener.pool == index);
        Ok(Self {
            pool: pool.name.clone(),
            backend: backend.name.clone(),
            address: backend.address,
            public_port: listener.map(|listener| listener.address.port()),
            scheme,
            reset_key,
            tokens: tokens(&config.retry),
            report_token: pool.report_token.clone(),
            decoder: Decoder::new(pool.cid_configs.iter().cloned()),
            servers: servers.collect(),
        })
    }

    /// Where connection IDs come from. With `wrong`, they lead to another server of the pool. Where no reset key outlives the
    /// process it is that `of_process`.
    pub(crate) fn cids(&self, of_process: &ResetKey, wrong: bool) -> Cids {
        let reset_key = self.reset_key.as_ref().unwrap_or(of_process).clone();
        let Some((config, server_id)) = self.scheme.clone() else {
            return Cids::Unroutable { len: UNROUTABLE_LEN, reset_key };
        };
        let mut others = self.servers.keys();
        let other = others.find(|(id, other)| *id == config.id() && *other != server_id);
        let server_id = match other {
            Some((_, other)) if wrong => *other,
            _ => server_id,
        };
        Cids::Routable { config, server_id, reset_key }
    }
}

/// The balancer's tokens, if it has any keys for them.
fn tokens(retry: &Retry) -> Option<TokenPolicy> {
    let minting = retry.keys.first()?.sequence();
    let keys = TokenKeys::new(retry.keys.iter().cloned());
    Some(match retry.format {
        TokenFormat::Nat => TokenPolicy::Nat(keys),
        TokenFormat::SharedState => TokenPolicy::SharedState { minting, keys },
    })
}

fn find<'a>(config: &'a Config, name: &str) -> Result<(usize, &'a Pool, &'a Backend), ServeError> {
    let full = |pool: &Pool, backend: &Backend| format!("{}/{}", pool.name, backend.name);
    let all = || {
        let pools = config.pools.iter().enumerate();
        pools.flat_map(|(nth, pool)| pool.backends.iter().map(move |each| (nth, pool, each)))
    };
    let found: Vec<_> = all()
        .filter(|(_, pool, backend)| backend.name == name || full(pool, backend) == name)
        .collect();
    let list = |backends: &mut dyn Iterator<Item = (usize, &Pool, &Backend)>| {
        let names: Vec<_> = backends.map(|(_, pool, backend)| full(pool, backend)).collect();
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    };
    match found[..] {
        [one] => Ok(one),
        [] => Err(ServeError::UnknownBackend { name: name.to_owned(), known: list(&mut all()) }),
        _ => Err(ServeError::AmbiguousBackend {
            name: name.to_owned(),
            choices: list(&mut found.into_iter()).replace(", ", " or "),
        }),
    }
}
