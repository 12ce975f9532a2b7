//! The fleet: a balancer and its origin servers, with a configuration file in a folder of its own.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    path::PathBuf,
    thread::JoinHandle,
    time::Duration,
};

use backend_sim::{
    certificate::{Certificate, Trust},
    serve::{Counters, Origin, Settings},
};
use quic_lb_config::Config;
use tempfile::TempDir;
use tokio::time;

use super::metrics::Metrics;
use crate::{
    cli::{admin::Balancer, generate},
    control::{self, Ending, RunError},
};

/// What the servers are called in their certificate.
pub(super) const SERVER_NAME: &str = "localhost";

/// The pool, which the admin interface knows backends by.
const POOL: &str = "demo";
/// How long the balancer may take to start or to take a new file: it looks at that every few
/// seconds where there are no file events.
const PATIENCE: Duration = Duration::from_secs(15);
/// From one look to the next meanwhile.
const LOOK: Duration = Duration::from_millis(20);
/// Ports that were free a moment ago may not be free any more.
const ATTEMPTS: usize = 5;

/// A running fleet.
pub(super) struct Fleet {
    balancer: JoinHandle<Result<Ending, RunError>>,
    plan: Plan,
    origins: Vec<Origin>,
    trust: Trust,
}

/// What the configuration file is written from.
struct Plan {
    listener: SocketAddr,
    admin: SocketAddr,
    backends: Vec<SocketAddr>,
    /// Keys of connection IDs by config ID.
    keys: Vec<String>,
    folder: TempDir,
}

impl Fleet {
    /// Starts a fleet with so many servers.
    pub(super) async fn start(backends: usize) -> Result<Self, String> {
        let mut attempt = 1;
        loop {
            match Self::try_start(backends).await {
                Err(StartError::Ports(_)) if attempt < ATTEMPTS => attempt += 1,
                Err(StartError::Ports(sentence) | StartError::Other(sentence)) => {
                    return Err(sentence);
                }
                Ok(fleet) => return Ok(fleet),
            }
        }
    }

    async fn try_start(backends: usize) -> Result<Self, StartError> {
        let sockets: io::Result<Vec<_>> =
            (0..backends).map(|_| UdpSocket::bind(anywhere())).collect();
        let sockets = sockets.map_err(other)?;
        let addresses: io::Result<Vec<_>> = sockets.iter().map(UdpSocket::local_addr).collect();
        let plan = Plan::new(addresses.map_err(other)?)?;
        let config = plan.write().map_err(StartError::Other)?;
        let file = plan.file();
        let balancer = std::thread::Builder::new().name("balancer".into());
        let balancer = balancer.spawn(move || control::run(&file, false)).map_err(other)?;
        let mut fleet =
            Self { balancer, plan, origins: Vec::new(), trust: Trust::Roots(Vec::new()) };
        for (nth, socket) in sockets.into_iter().enumerate() {
            let certificate = Certificate::make([SERVER_NAME.to_owned()]).map_err(other)?;
            if let Trust::Roots(trusted) = &mut fleet.trust {
                trusted.extend_from_slice(certificate.chain());
            }
            let mut settings = Settings::new(config.clone(), name(nth), certificate);
            settings.socket = Some(socket);
            fleet.origins.push(Origin::start(settings).await.map_err(other)?);
        }
        fleet.until_ready().await?;
        Ok(fleet)
    }

    async fn until_ready(&mut self) -> Result<(), StartError> {
        let ready = async {
            while Balancer::at(self.plan.admin).get("/readyz").await.is_err()
                && !self.balancer.is_finished()
            {
                time::sleep(LOOK).await;
            }
        };
        let in_time = time::timeout(PATIENCE, ready).await;
        self.check().map_err(StartError::Ports)?;
        in_time.map_err(|_| StartError::Other("the balancer does not become ready".into()))
    }

    /// Whether the balancer still runs.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.balancer.is_finished() {
            return Err("the balancer has ended; RUST_LOG=info shows why".into());
        }
        Ok(())
    }

    pub(super) const fn address(&self) -> SocketAddr {
        self.plan.listener
    }

    pub(super) const fn admin(&self) -> SocketAddr {
        self.plan.admin
    }

    /// Whom clients of this fleet trust.
    pub(super) fn trust(&self) -> Trust {
        self.trust.clone()
    }

    /// Names and counters of the servers.
    pub(super) fn counters(&self) -> Vec<(String, Counters)> {
        self.origins.iter().map(|origin| (origin.name(), origin.counters())).collect()
    }

    /// Lets the last server get no new connections, through the admin interface.
    pub(super) async fn drain(&self) -> Result<String, String> {
        self.command("drain").await?;
        Ok(format!("drained backend {} through the admin interface", self.last()))
    }

    /// The opposite of [`Self::drain`].
    pub(super) async fn activate(&self) -> Result<String, String> {
        self.command("activate").await?;
        Ok(format!("activated backend {} again", self.last()))
    }

    async fn command(&self, verb: &str) -> Result<(), String> {
        let path = format!("/api/v1/backends/{POOL}/{}/{verb}", self.last());
        Balancer::at(self.plan.admin).post(&path).await.map_err(|error| error.to_string())?;
        Ok(())
    }

    fn last(&self) -> String {
        name(self.plan.backends.len() - 1)
    }

    /// Adds a configuration of connection IDs with a key of its own: first the balancer learns to
    /// read it, from its file, then the servers go over to it.
    pub(super) async fn rotate(&mut self) -> Result<String, String> {
        let admin = self.plan.admin;
        let before = reloads(admin).await;
        self.plan.keys.push(key()?);
        let config = self.plan.write()?;
        let taken = async {
            while reloads(admin).await == before {
                time::sleep(LOOK).await;
            }
        };
        let taken = time::timeout(PATIENCE, taken).await;
        taken.map_err(|_| "the balancer does not take its new file".to_owned())?;
        for origin in &self.origins {
            origin.reload(&config).map_err(|error| error.to_string())?;
        }
        Ok("rotated the keys of connection IDs: the balancer's file, then every server".to_owned())
    }
}

impl Plan {
    fn new(backends: Vec<SocketAddr>) -> Result<Self, StartError> {
        // Held until all are found, so that no two are the same.
        let udp = UdpSocket::bind(anywhere()).map_err(other)?;
        let tcp = TcpListener::bind(anywhere()).map_err(other)?;
        Ok(Self {
            listener: udp.local_addr().map_err(other)?,
            admin: tcp.local_addr().map_err(other)?,
            backends,
            keys: vec![key().map_err(StartError::Other)?],
            folder: tempfile::Builder::new().prefix("quic-lb-demo").tempdir().map_err(other)?,
        })
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("lb.yaml")
    }

    /// Writes the file, whole at every moment, and reads it as everybody else does.
    fn write(&self) -> Result<Config, String> {
        let new = self.folder.path().join("new.yaml");
        std::fs::write(&new, self.text())
            .and_then(|()| std::fs::rename(new, self.file()))
            .map_err(|error| format!("cannot write the configuration: {error}"))?;
        let loaded = quic_lb_config::load(self.file()).map_err(|report| report.to_string())?;
        Ok(loaded.config)
    }

    fn text(&self) -> String {
        let Self { listener, admin, backends, keys, .. } = self;
        let configs: String = keys
            .iter()
            .enumerate()
            .map(|(id, key)| {
                format!("      - {{ config_id: {id}, server_id_length: 2, nonce_length: 6, key: \"{key}\" }}\n")
            })
            .collect();
        let backends: String = backends
            .iter()
            .enumerate()
            .map(|(nth, address)| {
                let name = name(nth);
                format!(
                    "      - {{ name: {name}, address: \"{address}\", server_id: \"{:04x}\" }}\n",
                    nth + 1
                )
            })
            .collect();
        format!(
            "listeners:\n  - {{ name: edge, address: \"{listener}\", pool: {POOL} }}\n\
             pools:\n  - name: {POOL}\n    quic_lb:\n{configs}    backends:\n{backends}\
             admin:\n  address: \"{admin}\"\n\
             limits:\n  flows: 10000\n\
             log:\n  level: error\n"
        )
    }
}

/// Why a fleet does not start.
enum StartError {
    /// Perhaps with other ports it does.
    Ports(String),
    Other(String),
}

fn other(error: impl std::fmt::Display) -> StartError {
    StartError::Other(error.to_string())
}

/// Configurations that the balancer has taken.
async fn reloads(admin: SocketAddr) -> u64 {
    let metrics = Metrics::fetch(admin).await.unwrap_or_default();
    metrics.sum("quic_lb_config_reloads_total{result=\"applied\"}")
}

/// a, b, c, …
fn name(nth: usize) -> String {
    let letter = u8::try_from(nth).ok().and_then(|nth| b'a'.checked_add(nth));
    letter.map(char::from).filter(char::is_ascii_lowercase).map_or(nth.to_string(), String::from)
}

fn key() -> Result<String, String> {
    generate::random(16).map(|key| key.to_string()).map_err(|_| "no random bytes".to_owned())
}

const fn anywhere() -> SocketAddr {
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0)
}
