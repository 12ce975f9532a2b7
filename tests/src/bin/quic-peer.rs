//! The quinn ends of the namespace suite: servers that count what arrives, and clients that download
//! until they are told to stop. `tests/netns/peer.py` is the same for aioquic.
//!
//! Both say `ready` when they are, end at SIGTERM, and then print what happened as one line of JSON.
//! Clients also say `seen C N` when the server of connection C has seen its Nth address. The HTTP/3
//! clients, on quinn and on s2n-quic, end by themselves; `tests/peers/client.py` is the same for others.
#![expect(clippy::print_stdout, reason = "a program for scripts")]

use std::{
    collections::HashSet,
    io::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use bytes::Buf as _;
use clap::{Args, Parser, ValueEnum};
use quic_lb_tests::{
    audit::Issued,
    certificate::{Certificate, SERVER_NAME, client_tls, provider},
    client::{Client, download, from},
    origin::{Cids, OPAQUE_CID_LEN, Origin},
    pattern, s2n,
    site::local,
};
use serde_json::json;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::{JoinHandle, JoinSet},
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
    /// Asks an origin over HTTP/3, on one connection, and ends.
    Http3(Http3),
    /// Keeps connections busy over HTTP/3 and makes new ones, until SIGTERM.
    Visit(Visit),
    /// Asks an origin once on each connection, over HTTP/3, for what never ends, and listens until SIGTERM: nothing but
    /// acknowledgements leaves.
    Listen {
        /// The listener.
        #[arg(long)]
        target: SocketAddr,
        /// The origins' certificate, in DER.
        #[arg(long)]
        certificate: PathBuf,
        /// Connections, each from a socket of its own.
        #[arg(long, default_value_t = 20)]
        connections: usize,
    },
}

#[derive(Debug, Args)]
struct Visit {
    /// The listener.
    #[arg(long)]
    target: SocketAddr,
    /// The origins' certificate, in DER.
    #[arg(long)]
    certificate: PathBuf,
    /// Connections that last, each from a socket of its own.
    #[arg(long, default_value_t = 20)]
    connections: usize,
    /// Milliseconds from one request to the next on each of them.
    #[arg(long, default_value_t = 100)]
    every: u64,
    /// Milliseconds from one new connection to the next.
    #[arg(long, default_value_t = 100)]
    new_every: u64,
    /// Milliseconds that a new connection may take.
    #[arg(long, default_value_t = 3000)]
    within: u64,
}

#[derive(Debug, Args)]
struct Http3 {
    /// Whose client.
    #[arg(long, value_enum, default_value_t = Stack::Quinn)]
    stack: Stack,
    /// The listener.
    #[arg(long)]
    target: SocketAddr,
    /// The origins' certificate, in DER.
    #[arg(long)]
    certificate: PathBuf,
    /// Downloads.
    #[arg(long, default_value_t = 1)]
    requests: usize,
    /// Octets of each.
    #[arg(long, default_value_t = 100_000)]
    octets: usize,
    /// Milliseconds after each.
    #[arg(long, default_value_t = 0)]
    pause: u64,
    /// Go on from another address after each; quinn can.
    #[arg(long)]
    migrate: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Stack {
    Quinn,
    S2nQuic,
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
        Command::Http3(options) => match options.stack {
            Stack::Quinn => http3_on_quinn(&options).await?,
            Stack::S2nQuic => http3_on_s2n_quic(&options).await?,
        },
        Command::Visit(options) => visit(&options).await?,
        Command::Listen { target, certificate, connections } => {
            listen(target, &certificate, connections).await?
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
    let (stop, stopped) = watch::channel(false);
    let mut downloads = Vec::new();
    for nth in 0..connections {
        let client = Client::new(any(target), &certificate)?.with_keep_alive();
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
                tokio::time::sleep(Duration::from_millis(20)).await;
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

async fn http3_on_quinn(options: &Http3) -> anyhow::Result<serde_json::Value> {
    let certificate = std::fs::read(&options.certificate)?;
    let mut requester = Requester::connect(options.target, &certificate).await?;
    let endpoint = requester.endpoint.clone();
    let migrate = |nth: usize| {
        let ip = local(2 + u8::try_from(nth % 7)?);
        Ok(endpoint.rebind(std::net::UdpSocket::bind((ip, 0))?)?)
    };
    let report = ask(options, async |path| requester.get(&path).await, migrate).await?;
    requester.close().await;
    Ok(report)
}

/// One connection of quinn's, from a socket of its own, that speaks HTTP/3.
struct Requester {
    endpoint: quinn::Endpoint,
    authority: String,
    requests: h3::client::SendRequest<h3_quinn::OpenStreams, bytes::Bytes>,
    driving: JoinHandle<()>,
}

impl Requester {
    async fn connect(target: SocketAddr, certificate: &[u8]) -> anyhow::Result<Self> {
        Self::connect_with(target, certificate, Some(Duration::from_millis(300))).await
    }

    async fn connect_with(
        target: SocketAddr,
        certificate: &[u8],
        keep_alive: Option<Duration>,
    ) -> anyhow::Result<Self> {
        let mut tls = client_tls(certificate, provider())?;
        tls.alpn_protocols = vec![b"h3".to_vec()];
        let tls = quinn::crypto::rustls::QuicClientConfig::try_from(tls)?;
        let mut transport = quinn::TransportConfig::default();
        transport.keep_alive_interval(keep_alive);
        let mut config = quinn::ClientConfig::new(Arc::new(tls));
        config.transport_config(Arc::new(transport));
        let endpoint = quinn::Endpoint::client(SocketAddr::new(any(target), 0))?;
        let connection = endpoint.connect_with(config, target, SERVER_NAME)?.await?;
        let (mut driver, requests) = h3::client::new(h3_quinn::Connection::new(connection)).await?;
        let driving = tokio::spawn(async move { drop(driver.wait_idle().await) });
        let authority = format!("{SERVER_NAME}:{}", target.port());
        Ok(Self { endpoint, authority, requests, driving })
    }

    async fn get(&mut self, path: &str) -> anyhow::Result<Vec<u8>> {
        let uri = format!("https://{}{path}", self.authority);
        let mut stream = self.requests.send_request(http::Request::get(uri).body(())?).await?;
        stream.finish().await?;
        let status = stream.recv_response().await?.status();
        ensure!(status == http::StatusCode::OK, "{path}: {status}");
        let mut body = Vec::new();
        while let Some(mut chunk) = stream.recv_data().await? {
            body.extend_from_slice(&chunk.copy_to_bytes(chunk.remaining()));
        }
        Ok(body)
    }

    /// Listens to what never ends until `stopped`; says how many octets came, and for how long none did at most.
    async fn listen(
        &mut self,
        stopped: &mut watch::Receiver<bool>,
    ) -> anyhow::Result<(usize, Duration)> {
        let uri = format!("https://{}/stream", self.authority);
        let mut stream = self.requests.send_request(http::Request::get(uri).body(())?).await?;
        stream.finish().await?;
        let status = stream.recv_response().await?.status();
        ensure!(status == http::StatusCode::OK, "/stream: {status}");
        let (mut octets, mut silence, mut heard) = (0, Duration::ZERO, Instant::now());
        loop {
            tokio::select! {
                chunk = stream.recv_data() => {
                    octets += chunk?.context("what never ends has ended")?.remaining();
                    silence = silence.max(heard.elapsed());
                    heard = Instant::now();
                }
                _ = stopped.wait_for(|stopped| *stopped) => {
                    return Ok((octets, silence.max(heard.elapsed())));
                }
            }
        }
    }

    /// As [`Requester::get`], with content that is known.
    async fn download(&mut self, octets: usize) -> anyhow::Result<()> {
        let body = self.get(&format!("/bytes/{octets}")).await?;
        ensure!(body == pattern::octets(0, octets), "other content");
        Ok(())
    }

    async fn close(self) {
        drop(self.requests);
        self.endpoint.close(0u8.into(), b"done");
        self.driving.abort();
        self.endpoint.wait_idle().await;
    }
}

async fn visit(options: &Visit) -> anyhow::Result<serde_json::Value> {
    const OCTETS: usize = 1000;
    let certificate: Arc<[u8]> = std::fs::read(&options.certificate)?.into();
    let (stop, stopped) = watch::channel(false);
    let every = Duration::from_millis(options.every);
    let mut lasting = JoinSet::new();
    for _ in 0..options.connections {
        let mut requester = Requester::connect(options.target, &certificate).await?;
        let stopped = stopped.clone();
        lasting.spawn(async move {
            let mut requests = 0u64;
            while !*stopped.borrow() {
                requester.download(OCTETS).await?;
                requests += 1;
                tokio::time::sleep(every).await;
            }
            requester.close().await;
            anyhow::Ok(requests)
        });
    }
    say("ready")?;

    let new_every = Duration::from_millis(options.new_every);
    let (mut visits, mut ticks) = (JoinSet::new(), tokio::time::interval(new_every));
    let began = Instant::now();
    let mut terminated = signal(SignalKind::terminate())?;
    let within = Duration::from_millis(options.within);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = terminated.recv() => break,
        }
        let (target, certificate) = (options.target, Arc::clone(&certificate));
        let at = began.elapsed();
        visits.spawn(async move {
            let visit = async {
                let connecting = Requester::connect(target, &certificate);
                let connected = tokio::time::timeout(within, connecting).await;
                let mut requester = connected.context("not in time")??;
                requester.download(OCTETS).await?;
                requester.close().await;
                anyhow::Ok(())
            };
            (at, visit.await)
        });
    }
    let (mut handshakes, mut refused, mut refused_at) = (0, Vec::new(), Vec::new());
    while let Some(visit) = visits.join_next().await {
        match visit? {
            (_, Ok(())) => handshakes += 1,
            (at, Err(error)) => {
                refused.push(format!("{error:#}"));
                refused_at.push(at.as_secs_f64());
            }
        }
    }
    stop.send_replace(true);
    let (mut requests, mut lost) = (0, Vec::new());
    while let Some(connection) = lasting.join_next().await {
        match connection? {
            Ok(served) => requests += served,
            Err(error) => lost.push(format!("{error:#}")),
        }
    }
    Ok(json!({
        "established": options.connections,
        "lost": lost,
        "requests": requests,
        "handshakes": handshakes,
        "refused": refused,
        "refused_at": refused_at,
    }))
}

async fn listen(
    target: SocketAddr,
    certificate: &PathBuf,
    connections: usize,
) -> anyhow::Result<serde_json::Value> {
    let certificate = std::fs::read(certificate)?;
    let (stop, stopped) = watch::channel(false);
    let mut listeners = JoinSet::new();
    for _ in 0..connections {
        let mut requester = Requester::connect_with(target, &certificate, None).await?;
        let mut stopped = stopped.clone();
        listeners.spawn(async move { requester.listen(&mut stopped).await });
    }
    say("ready")?;
    signal(SignalKind::terminate())?.recv().await;
    stop.send_replace(true);
    let (mut octets, mut silence, mut lost) = (Vec::new(), Duration::ZERO, Vec::new());
    while let Some(listener) = listeners.join_next().await {
        match listener? {
            Ok((heard, longest)) => {
                octets.push(heard);
                silence = silence.max(longest);
            }
            Err(error) => lost.push(format!("{error:#}")),
        }
    }
    Ok(json!({ "lost": lost, "octets": octets, "silence": silence.as_secs_f64() }))
}

async fn http3_on_s2n_quic(options: &Http3) -> anyhow::Result<serde_json::Value> {
    let certificate = std::fs::read(&options.certificate)?;
    let mut client =
        s2n::Client::connect(any(options.target), options.target, &certificate).await?;
    let get = async |path: String| client.get(&path).await;
    let report = ask(options, get, |_| bail!("s2n-quic's clients do not migrate")).await?;
    client.close().await;
    Ok(report)
}

/// What an origin says of us at first, downloads, and what it says in the end.
async fn ask(
    options: &Http3,
    mut get: impl AsyncFnMut(String) -> anyhow::Result<Vec<u8>>,
    migrate: impl Fn(usize) -> anyhow::Result<()>,
) -> anyhow::Result<serde_json::Value> {
    let who = |body: &[u8]| serde_json::from_slice::<serde_json::Value>(body);
    let before = who(&get("/whoami".into()).await?)?;
    for nth in 0..options.requests {
        let body = get(format!("/bytes/{}", options.octets)).await?;
        ensure!(body == pattern::octets(0, options.octets), "other content");
        if options.migrate {
            migrate(nth)?;
        }
        tokio::time::sleep(Duration::from_millis(options.pause)).await;
    }
    let after = who(&get("/whoami".into()).await?)?;
    Ok(json!({ "before": before, "after": after }))
}

/// The unspecified address of the target's family.
const fn any(target: SocketAddr) -> IpAddr {
    match target {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    }
}

fn say(line: &str) -> anyhow::Result<()> {
    println!("{line}");
    Ok(std::io::stdout().flush()?)
}
