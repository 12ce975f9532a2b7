//! The quinn ends of the namespace suite: servers that count what arrives, and clients that download
//! until they are told to stop. `tests/netns/peer.py` is the same for aioquic.
//!
//! Both say `ready` when they are, end at SIGTERM, and then print what happened as one line of JSON.
//! Clients also say `seen C N` when the server of connection C has seen its Nth address.
#![expect(clippy::print_stdout, reason = "a program for scripts")]

use std::{
    collections::HashSet,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
};

use anyhow::Context as _;
use clap::Parser;
use quic_lb_tests::{
    audit::Issued,
    certificate::Certificate,
    client::{Client, download, from},
    origin::{Cids, OPAQUE_CID_LEN, Origin},
};
use serde_json::json;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// Servers and clients on quinn, for scripts.
#[derive(Debug, Parser)]
enum Command {
    /// Serves as all backends of some pools until SIGTERM.
    Serve {
        /// The balancer's configuration.
        #[arg(long)]
        config: PathBuf,
        /// A pool to serve.
        #[arg(long, required = true)]
        pool: Vec<String>,
        /// Connection IDs are not routable, whatever the configuration says.
        #[arg(long)]
        opaque: bool,
        /// Where to write the certificate, in DER.
        #[arg(long)]
        certificate: PathBuf,
    },
    /// Downloads again and again until SIGTERM.
    Fetch {
        /// The listener.
        #[arg(long)]
        target: SocketAddr,
        /// The servers' certificate, in DER.
        #[arg(long)]
        certificate: PathBuf,
        /// Connections, each from a socket of its own.
        #[arg(long, default_value_t = 1)]
        connections: usize,
        /// Octets of each download.
        #[arg(long, default_value_t = 1 << 20)]
        octets: usize,
    },
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let report = match Command::parse() {
        Command::Serve { config, pool, opaque, certificate } => {
            serve(&config, &pool, opaque, &certificate).await?
        }
        Command::Fetch { target, certificate, connections, octets } => {
            fetch(target, &certificate, connections, octets).await?
        }
    };
    println!("{report}");
    Ok(())
}

async fn serve(
    config: &PathBuf,
    pools: &[String],
    opaque: bool,
    certificate_file: &PathBuf,
) -> anyhow::Result<serde_json::Value> {
    let config = quic_lb_config::load(config)?.config;
    let (issued, certificate) = (Issued::default(), Certificate::new()?);
    std::fs::write(certificate_file, certificate.der())?;
    let mut origins = Vec::new();
    for name in pools {
        let pool = config.pools.iter().find(|pool| pool.name == *name).context("no such pool")?;
        for backend in &pool.backends {
            let cids = match opaque {
                true => Cids::Opaque(OPAQUE_CID_LEN),
                false => Cids::of(&config, name, &backend.name, None)?,
            };
            let (name, address) = (&backend.name, backend.address);
            origins.push(Origin::start(name, address, cids, &issued, &certificate)?);
        }
    }
    say("ready")?;
    signal(SignalKind::terminate())?.recv().await;
    let servers = origins.iter().map(|origin| {
        let arrivals = origin.arrivals();
        json!({
            "name": origin.name(),
            "connections": origin.accepted(),
            "lost": origin.lost(),
            "own": arrivals.own,
            "opening": arrivals.opening,
            "resets": arrivals.resets,
            "unknown": arrivals.unknown,
            "misdelivered": arrivals.misdelivered.values().sum::<u64>(),
        })
    });
    Ok(servers.collect())
}

async fn fetch(
    target: SocketAddr,
    certificate: &PathBuf,
    connections: usize,
    octets: usize,
) -> anyhow::Result<serde_json::Value> {
    let certificate = std::fs::read(certificate)?;
    let any = match target {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let (stop, stopped) = watch::channel(false);
    let mut downloads = Vec::new();
    for nth in 0..connections {
        let client = Client::new(any, &certificate)?.with_keep_alive();
        let connection = client.connect(target).await?;
        let stopped = stopped.clone();
        downloads.push(tokio::spawn(async move {
            let report = download_until(nth, &connection, octets, &stopped).await;
            client.close().await;
            report
        }));
    }
    say("ready")?;
    signal(SignalKind::terminate())?.recv().await;
    stop.send_replace(true);
    let mut reports = Vec::new();
    for download in downloads {
        reports.push(download.await?);
    }
    Ok(reports.into())
}

async fn download_until(
    nth: usize,
    connection: &quinn::Connection,
    octets: usize,
    stopped: &watch::Receiver<bool>,
) -> serde_json::Value {
    let (mut downloads, mut addresses, mut lost) = (0, HashSet::new(), None);
    while lost.is_none() && !*stopped.borrow() {
        let watching = async {
            loop {
                if addresses.insert(from(connection).await?) {
                    say(&format!("seen {nth} {}", addresses.len()))?;
                }
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        let result = tokio::select! {
            result = download(connection, octets, |_| {}) => result,
            failed = watching => failed,
        };
        match result {
            Ok(()) => downloads += 1,
            Err(error) => lost = Some(format!("{error:#}")),
        }
    }
    let rebinds = addresses.len().saturating_sub(1);
    json!({ "downloads": downloads, "octets": downloads * octets, "rebinds": rebinds, "lost": lost })
}

fn say(line: &str) -> anyhow::Result<()> {
    println!("{line}");
    Ok(std::io::stdout().flush()?)
}
