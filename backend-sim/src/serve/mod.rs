//! The origin: an HTTP/3 server that the balancer's own configuration tells who it is.
//!
//! ```text
//! endpoint of the driver ─► http3 (a task per connection) ─┐
//! TLS on TCP, for Alt-Svc ─► tcp ──────────────────────────┴─► routes
//! half-open connections, once a second ─► report ─► admin interface of each balancer
//! refused tokens and resets, once a second ─► tokens ─► metrics and log
//! ```
//!
//! An [`Origin`] runs until it is dropped. [`Origin::reload`] takes another configuration and gives
//! every live connection new connection IDs; [`Origin::drain`] answers what was asked and accepts
//! no more. The keys of stateless resets live as long as the origin, unless the configuration or a file has a secret for them: then the
//! clients of an origin that has started anew are told so at once.

mod http3;
mod metrics;
mod misbehaviour;
mod ranges;
mod report;
mod routes;
mod settings;
mod tcp;
mod tokens;

use std::{
    collections::HashMap,
    net::{SocketAddr, UdpSocket},
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU64},
    time::Duration,
};

use arc_swap::ArcSwap;
use axum::{Router, http::HeaderValue};
use prometheus::IntCounter;
use quic::{
    ConnectionId,
    driver::{Endpoint, Options, Unclaimed},
    h3::ALPN,
    routable::{ConfigId, ServerId},
    transport::{ResetKey, RetryPolicy, ServerConfig, TransportConfig},
};
use quic_lb_config::{Config, ResetSecret};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tracing::info;

pub use metrics::Counters;
pub use misbehaviour::Misbehaviour;
pub use report::{AdminAddress, InvalidAdminAddress};
pub use settings::{ServeError, Settings};

use metrics::Metrics;
use settings::Identity;

/// A running origin. Dropping it closes its connections.
#[derive(Debug)]
pub struct Origin {
    shared: Arc<Shared>,
    /// Absent where it is silent.
    endpoint: Option<Endpoint>,
    address: SocketAddr,
    https: Option<SocketAddr>,
    metrics: Option<SocketAddr>,
    draining: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
    /// Who it is, for reloads.
    name: String,
    config_id: Option<ConfigId>,
    own_secret: Option<ResetSecret>,
    /// Where no other is given: it ends with the process.
    reset_key: ResetKey,
    /// What connections over TCP begin with.
    tcp_tls: Arc<ArcSwap<rustls::ServerConfig>>,
    /// Taken and never read from.
    _silent: Option<UdpSocket>,
}

/// What all tasks of an origin have in common.
#[derive(Debug)]
pub(crate) struct Shared {
    identity: ArcSwap<Identity>,
    metrics: Metrics,
    misbehaviour: Misbehaviour,
    max_body: u64,
    name_header: HeaderValue,
    alt_svc: Option<HeaderValue>,
    /// How many there were, where that matters.
    answers: AtomicU64,
    /// Counters of datagrams that no connection here claims, by what their connection ID carries.
    unclaimed: Mutex<HashMap<Option<(ConfigId, ServerId)>, IntCounter>>,
}

impl Origin {
    /// Starts an origin. Needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`ServeError`], in one sentence.
    pub async fn start(settings: Settings) -> Result<Self, ServeError> {
        let own_secret = settings.reset_secret;
        let identity = Identity::find(
            &settings.config,
            &settings.backend,
            settings.config_id,
            own_secret.as_ref(),
        )?;
        if let Some(root) = settings.root.as_deref().filter(|root| !root.is_dir()) {
            return Err(ServeError::Root(root.to_owned()));
        }
        // Everything that can fail is tried before the first datagram is taken.
        let address = settings.address.unwrap_or(identity.address);
        let sockets = settings.socket.map_or_else(|| UdpSocket::bind(address), Ok);
        let socket =
            sockets.map_err(|error| ServeError::Listen { what: "QUIC", address, error })?;
        let address = socket.local_addr().map_err(ServeError::Endpoint)?;
        let https = listen("HTTPS", settings.https).await?;
        let scrapes = listen("metrics", settings.metrics).await?;
        let tcp_tls = settings.certificate.server(&[HTTP_1])?;
        let tcp_tls = Arc::new(ArcSwap::from_pointee(tcp_tls));
        let server = server_config(settings.certificate.server(&[ALPN])?, settings.misbehaviour);
        let reset_key = ResetKey::new(seed()?);

        let public_port = settings.alt_svc_port.or(identity.public_port).unwrap_or(address.port());
        let shared = Arc::new(Shared {
            metrics: Metrics::new(&identity.backend, &identity.pool),
            name_header: header(&identity.backend),
            alt_svc: https.is_some().then(|| header(&format!("h3=\":{public_port}\"; ma=3600"))),
            answers: AtomicU64::new(0),
            misbehaviour: settings.misbehaviour,
            max_body: settings.max_body,
            unclaimed: Mutex::default(),
            identity: ArcSwap::from_pointee(identity.clone()),
        });
        let mut origin = Self {
            endpoint: None,
            address,
            https: https.as_ref().and_then(|listener| listener.local_addr().ok()),
            metrics: scrapes.as_ref().and_then(|listener| listener.local_addr().ok()),
            draining: watch::Sender::new(false),
            tasks: Vec::new(),
            name: settings.backend,
            config_id: settings.config_id,
            own_secret,
            reset_key,
            tcp_tls,
            _silent: None,
            shared,
        };
        let shared = &origin.shared;
        let router = routes::router(Arc::clone(shared), settings.root.as_deref());
        if settings.misbehaviour == Misbehaviour::Silent {
            origin._silent = Some(socket);
        } else {
            let counting = Arc::clone(shared);
            let wrong = settings.misbehaviour == Misbehaviour::WrongServerId;
            let (address, socket) = match settings.shards {
                0 | 1 => (address, Some(socket)),
                // Several sockets share the address, which this one would not.
                _ => {
                    drop(socket);
                    (address, None)
                }
            };
            let options = Options {
                socket,
                cids: identity.cids(&origin.reset_key, wrong),
                tokens: identity.tokens.clone(),
                shards: settings.shards,
                unclaimed: Some(Unclaimed::new(move |id| counting.on_unclaimed(id))),
                ..Options::server(server, address)
            };
            let endpoint = Endpoint::new(options).map_err(ServeError::Endpoint)?;
            origin.address = endpoint.local_addr();
            let accepting = accept(
                endpoint.clone(),
                Arc::clone(shared),
                router.clone(),
                origin.draining.subscribe(),
            );
            origin.tasks.push(tokio::spawn(accepting));
            let watching = tokens::watch(endpoint.clone(), Arc::clone(shared));
            origin.tasks.push(tokio::spawn(watching));
            for balancer in settings.report_half_open {
                let reports = report::half_open(balancer, endpoint.clone(), Arc::clone(shared));
                origin.tasks.push(tokio::spawn(reports));
            }
            origin.endpoint = Some(endpoint);
        }
        if let Some(listener) = https {
            let tls = Arc::clone(&origin.tcp_tls);
            origin.tasks.push(tokio::spawn(tcp::https(listener, tls, router)));
        }
        if let Some(listener) = scrapes {
            origin.tasks.push(tokio::spawn(tcp::metrics(listener, Arc::clone(&origin.shared))));
        }
        Ok(origin)
    }

    /// Where QUIC is.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where HTTPS over TCP is.
    #[must_use]
    pub const fn https_address(&self) -> Option<SocketAddr> {
        self.https
    }

    /// Where the metrics are.
    #[must_use]
    pub const fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics
    }

    /// The name of the backend.
    #[must_use]
    pub fn name(&self) -> String {
        self.shared.identity.load().backend.clone()
    }

    /// What was counted so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.shared.metrics.read()
    }

    /// The Prometheus text.
    #[must_use]
    pub fn metrics(&self) -> String {
        self.shared.metrics.render()
    }

    /// Takes another configuration, and gives every live connection new connection IDs of it; also
    /// when it is the same. The address stays.
    ///
    /// # Errors
    ///
    /// [`ServeError`] when the backend is not in it any more; everything goes on as before then.
    pub fn reload(&self, config: &Config) -> Result<(), ServeError> {
        let own_secret = self.own_secret.as_ref();
        let identity = Identity::find(config, &self.name, self.config_id, own_secret)?;
        let wrong = self.shared.misbehaviour == Misbehaviour::WrongServerId;
        if let Some(endpoint) = &self.endpoint {
            let cids = identity.cids(&self.reset_key, wrong);
            endpoint.set_cid_config(cids).map_err(ServeError::Endpoint)?;
            if let Some(tokens) = &identity.tokens {
                endpoint.set_token_policy(tokens);
            }
        }
        self.shared.metrics.rotations.inc();
        self.shared.identity.store(Arc::new(identity));
        Ok(())
    }

    /// Begins connections with another certificate from now on. Those that there are stay.
    ///
    /// # Errors
    ///
    /// When it is of no use; the one before goes on then.
    pub fn use_certificate(
        &self,
        certificate: &crate::certificate::Certificate,
    ) -> Result<(), ServeError> {
        let (quic, tcp) = (certificate.server(&[ALPN])?, certificate.server(&[HTTP_1])?);
        if let Some(endpoint) = &self.endpoint
            && !*self.draining.borrow()
        {
            endpoint.set_server_config(Some(&server_config(quic, self.shared.misbehaviour)));
        }
        self.tcp_tls.store(Arc::new(tcp));
        Ok(())
    }

    /// Accepts no more, answers what was asked, and closes each connection after its last answer;
    /// whatever is left after `patience` is closed too.
    pub async fn drain(&self, patience: Duration) {
        let Some(endpoint) = &self.endpoint else { return };
        self.draining.send_replace(true);
        endpoint.set_server_config(None);
        let all = tokio::time::timeout(patience, endpoint.wait_idle()).await;
        if all.is_err() {
            info!(connections = endpoint.connection_count(), "closing what is left");
        }
        endpoint.close(h3::error::Code::H3_NO_ERROR.value(), b"the server ends");
        // Peers that are gone are not waited for.
        let _ = tokio::time::timeout(LAST_WORDS, endpoint.wait_idle()).await;
    }
}

/// The application protocol over TCP.
const HTTP_1: &[u8] = b"http/1.1";

/// How long closing connections may take to tell their peers.
const LAST_WORDS: Duration = Duration::from_secs(3);

impl Drop for Origin {
    fn drop(&mut self) {
        if let Some(endpoint) = &self.endpoint {
            endpoint.close(h3::error::Code::H3_NO_ERROR.value(), b"the server ends");
        }
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Shared {
    /// Counts a datagram of a connection that is not here. Server IDs that the pool does not have
    /// count as one, so that nobody can make up metrics.
    fn on_unclaimed(&self, id: &ConnectionId) {
        let identity = self.identity.load();
        let meant = identity.decoder.decode(id.as_slice()).ok();
        let meant = meant.map(|meant| (meant.config_id, meant.server_id));
        let meant = meant.filter(|meant| identity.servers.contains_key(meant));
        let owner = meant.and_then(|meant| identity.servers.get(&meant));
        if owner.is_some_and(|owner| *owner != identity.backend) {
            self.metrics.misrouted.inc();
        }
        let mut counters = self.unclaimed.lock().unwrap_or_else(PoisonError::into_inner);
        let counter = counters.entry(meant).or_insert_with(|| {
            let label = meant.map_or("unknown".into(), |(_, id)| routes::hex(id.as_slice()));
            self.metrics.unclaimed.with_label_values(&[&label])
        });
        counter.inc();
    }
}

async fn accept(
    endpoint: Endpoint,
    shared: Arc<Shared>,
    router: Router,
    draining: watch::Receiver<bool>,
) {
    while let Some(incoming) = endpoint.accept().await {
        let (shared, router) = (Arc::clone(&shared), router.clone());
        tokio::spawn(http3::serve(shared, router, incoming, draining.clone()));
    }
}

async fn listen(
    what: &'static str,
    address: Option<SocketAddr>,
) -> Result<Option<TcpListener>, ServeError> {
    let Some(address) = address else { return Ok(None) };
    match TcpListener::bind(address).await {
        Ok(listener) => Ok(Some(listener)),
        Err(error) => Err(ServeError::Listen { what, address, error }),
    }
}

fn server_config(tls: rustls::ServerConfig, misbehaviour: Misbehaviour) -> ServerConfig {
    let mut config = ServerConfig::new(Arc::new(tls));
    config.transport = Arc::new(TransportConfig::default());
    // The balancer in front decides about Retry.
    config.retry = RetryPolicy::Never;
    if misbehaviour == Misbehaviour::Refusing {
        config.max_connections = 0;
    }
    config
}

/// Names of backends are letters, digits and a few signs, all of which a header may have.
fn header(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).unwrap_or(HeaderValue::from_static("unnamed"))
}

fn seed() -> Result<[u8; 32], ServeError> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed)
        .map_err(|error| ServeError::Endpoint(std::io::Error::other(error.to_string())))?;
    Ok(seed)
}
