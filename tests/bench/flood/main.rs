//! What a flood of first flights from false senders does to everybody else: handshakes that succeed
//! within three seconds, established connections that are lost, their latency, and the balancer's
//! memory, before, during and after.
//!
//! ```text
//! cargo bench -p quic-lb-tests --bench flood                   # the table of docs/benchmarks.md
//! cargo bench -p quic-lb-tests --bench flood -- --seconds 10   # shorter phases
//! cargo bench -p quic-lb-tests --bench flood -- --kind short   # initials, short, tokens, garbage, mixed
//! ```
//!
//! Servers and clients are ours, in this process; the balancer and `backend-sim flood` have processes
//! of their own, all on the cores of this machine. The flood is ten times what the servers could shake
//! hands with, as measured first. As root its senders are forged. Address validation is adaptive: it
//! begins by itself.
#![expect(
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "a program for people, on numbers of its own making"
)]

use std::{
    net::SocketAddr,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use quic::{
    driver::{Cids, Connection, Endpoint, Options},
    token::TokenKeys,
    transport::{ClientConfig, ResetKey, TokenPolicy},
};
use quic_lb_config::Surroundings;
use quic_lb_tests::{
    balancer::Balancer,
    binary,
    certificate::{Certificate, SERVER_NAME, provider},
    document::{Document, Listener, Pool, Scheme, free_address},
    exchange,
    origin::seed,
    ours::{self, Server},
    site::LOCAL,
};
use tokio::{sync::Mutex, task::JoinSet, time};

const ANY: SocketAddr = SocketAddr::new(LOCAL, 0);
/// Connections that exist before the flood.
const ESTABLISHED: usize = 50;
/// From one request on each of them to the next.
const REQUEST_EVERY: Duration = Duration::from_millis(100);
/// From one new connection to the next.
const CONNECT_EVERY: Duration = Duration::from_millis(50);
/// What a client waits for.
const IN_TIME: Duration = Duration::from_secs(3);
/// For how long it is measured how many handshakes there can be.
const MEASURED: Duration = Duration::from_secs(3);
/// Clients that measure how many handshakes there can be.
const CROWD: usize = 16;

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let option = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1).map(String::as_str)
    };
    let kind = option("--kind").unwrap_or("initials");
    let phase = Duration::from_secs(option("--seconds").map_or(Ok(60), str::parse)?);

    let site = Site::start().await?;
    let capacity = site.capacity(MEASURED).await?;
    // Validation that the measurement has set off ends.
    time::sleep(Duration::from_secs(4)).await;
    let rate = (10.0 * capacity).min(200_000.0);
    println!(
        "the servers shake hands {capacity:.0} times a second; {kind}: {rate:.0} datagrams a second"
    );
    println!();
    println!(
        "| phase | handshakes | within 3 s | established lost | requests | p50, ms | p99, ms | memory, MiB |"
    );
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    let clients = Clients::connect(&site).await?;
    clients.measure("before", phase, &site).await?;
    let flood = Command::new(binary::backend_sim()?)
        .args(["flood", "--target", &site.address().to_string(), "--kind", kind])
        .args(["--rate", &format!("{rate:.0}"), "--duration", &format!("{}s", phase.as_secs() + 1)])
        .stdout(Stdio::piped())
        .spawn()?;
    time::sleep(Duration::from_secs(1)).await;
    clients.measure("during", phase, &site).await?;
    let flood = flood.wait_with_output()?;
    clients.measure("after", phase, &site).await?;
    println!("\n{}", String::from_utf8_lossy(&flood.stdout).trim());
    let metrics = site.balancer.metrics().await?;
    let (sent, verdicts) = (metrics.sum("retry_sent_total", &[]), metrics.verdicts());
    println!("the balancer: {sent} Retry packets, {verdicts:?}");
    println!("dropped: {:?}", metrics.by_label("datagrams_dropped_total", "reason"));
    println!("tokens: {:?}", metrics.by_label("retry_tokens_total", "result"));
    println!("half-open flows evicted: {}", metrics.sum("flows_evicted_total", &[]));
    ensure!(flood.status.success(), "the flood failed");
    Ok(())
}

/// Two of our servers behind a balancer.
struct Site {
    document: Document,
    certificate: Certificate,
    balancer: Balancer,
    _servers: Vec<Server>,
}

impl Site {
    async fn start() -> Result<Self> {
        let pool = Pool::new("web", &[Scheme::FOUR_PASS], LOCAL, 2);
        let listener =
            Listener { name: "edge".into(), address: free_address(LOCAL), pool: "web".into() };
        let document =
            Document { listeners: vec![listener], pools: vec![pool], admin: free_address(LOCAL) };
        // A flow lives for three minutes after its last datagram.
        let limits = "limits: { unknown_short_headers: refuse, flows: 30000 }";
        let defended = document.to_string().replace("limits: { flows: 4000 }", limits);
        let text = format!(
            "{defended}retry: {{ mode: adaptive, adaptive: {{ hold: \"2s\" }}, \
             keys: [{{ sequence: 0, key: \"{}\" }}] }}\n",
            "01".repeat(16)
        );
        let surroundings = Surroundings::of_text("benchmark");
        let config = quic_lb_config::from_str(&text, &surroundings);
        let config = config.map_err(|report| anyhow::anyhow!("{report}"))?.config;
        let certificate = Certificate::new()?;
        let mut servers = Vec::new();
        for backend in &config.pools[0].backends {
            let (_, server_id) = *backend.server_ids.first().context("a server ID")?;
            let cid_config = config.pools[0].cid_configs[0].clone();
            let cids =
                Cids::Routable { config: cid_config, server_id, reset_key: ResetKey::new(seed()?) };
            let tokens = TokenPolicy::Nat(TokenKeys::new(config.retry.keys.clone()));
            let change = |options: &mut Options, _: &mut _| {
                options.address = backend.address;
                options.cids = cids;
                options.tokens = Some(tokens);
            };
            servers.push(Server::on_loopback(LOCAL, &certificate, provider(), change)?);
        }
        let balancer = Balancer::start_from(&text, document.admin).await?;
        Ok(Self { document, certificate, balancer, _servers: servers })
    }

    fn address(&self) -> SocketAddr {
        self.document.listeners[0].address
    }

    fn client(&self) -> Result<ClientConfig> {
        ours::client(self.certificate.der(), provider())
    }

    /// Handshakes a second, as many as there can be.
    async fn capacity(&self, duration: Duration) -> Result<f64> {
        let done = Arc::new(AtomicU64::new(0));
        let start = Instant::now();
        let mut crowd = JoinSet::new();
        for _ in 0..CROWD {
            let (config, target, done) = (self.client()?, self.address(), Arc::clone(&done));
            crowd.spawn(async move {
                let endpoint = Endpoint::client(ANY)?;
                while start.elapsed() < duration {
                    connect(&endpoint, &config, target).await?.close(0, b"");
                    done.fetch_add(1, Relaxed);
                }
                anyhow::Ok(())
            });
        }
        while let Some(ended) = crowd.join_next().await {
            ended??;
        }
        Ok(done.load(Relaxed) as f64 / start.elapsed().as_secs_f64())
    }
}

async fn connect(
    endpoint: &Endpoint,
    config: &ClientConfig,
    target: SocketAddr,
) -> Result<Connection> {
    Ok(endpoint.connect_with(config, target, SERVER_NAME)?.await?)
}

/// Those who have nothing to do with the flood.
struct Clients {
    established: Vec<Connection>,
    _endpoints: Vec<Endpoint>,
}

impl Clients {
    async fn connect(site: &Site) -> Result<Self> {
        let (mut established, mut endpoints) = (Vec::new(), Vec::new());
        let config = site.client()?;
        for _ in 0..ESTABLISHED {
            let endpoint = Endpoint::client(ANY)?;
            established.push(connect(&endpoint, &config, site.address()).await?);
            endpoints.push(endpoint);
        }
        Ok(Self { established, _endpoints: endpoints })
    }

    /// One phase, and its line of the table.
    async fn measure(&self, name: &str, duration: Duration, site: &Site) -> Result<()> {
        let memory = || async {
            let octets = site.balancer.metrics().await?.resident_octets();
            anyhow::Ok(octets as f64 / f64::from(1 << 20))
        };
        let memory_before = memory().await?;
        let over = Arc::new(AtomicBool::new(false));
        let latencies = Arc::new(Mutex::new(Vec::new()));
        let mut requests = JoinSet::new();
        for connection in &self.established {
            let (connection, over) = (connection.clone(), Arc::clone(&over));
            let latencies = Arc::clone(&latencies);
            requests.spawn(async move {
                let mut ticks = time::interval(REQUEST_EVERY);
                while !over.load(Relaxed) {
                    ticks.tick().await;
                    let start = Instant::now();
                    let (send, recv) = connection.open_bi().await?;
                    exchange::get(send, recv, 1000, |_| {}).await?;
                    latencies.lock().await.push(start.elapsed());
                }
                anyhow::Ok(())
            });
        }
        let (mut handshakes, mut started) = (JoinSet::new(), 0u64);
        let mut ticks = time::interval(CONNECT_EVERY);
        let (start, config) = (Instant::now(), site.client()?);
        while start.elapsed() < duration {
            ticks.tick().await;
            started += 1;
            let (config, target) = (config.clone(), site.address());
            handshakes.spawn(async move {
                let endpoint = Endpoint::client(ANY).ok()?;
                let connecting = time::timeout(IN_TIME, connect(&endpoint, &config, target));
                connecting.await.ok()?.ok()?.close(0, b"");
                Some(())
            });
        }
        let in_time = handshakes.join_all().await.into_iter().flatten().count();
        over.store(true, Relaxed);
        let lost = requests.join_all().await.into_iter().filter(Result::is_err).count();
        let mut latencies = std::mem::take(&mut *latencies.lock().await);
        latencies.sort_unstable();
        let percentile = |percent: usize| {
            let at = (latencies.len() * percent / 100).min(latencies.len().saturating_sub(1));
            latencies.get(at).map_or(f64::NAN, |latency| latency.as_secs_f64() * 1000.0)
        };
        let memory_after = memory().await?;
        println!(
            "| {name} | {started} | {:.1} % | {lost} | {} | {:.1} | {:.1} | {memory_before:.1} → {memory_after:.1} |",
            in_time as f64 * 100.0 / started as f64,
            latencies.len(),
            percentile(50),
            percentile(99),
        );
        Ok(())
    }
}
