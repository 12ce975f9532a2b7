//! Our stack against aioquic, in both roles, over loopback.
//!
//! `FOREIGN_OCTETS` says how many octets go each way (1 MiB unless told otherwise). The tests need
//! Python, and a network the first time, so that they run only when they are asked for; see
//! [`quic_lb_tests::aioquic`].

use std::{net::SocketAddr, process::Stdio};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use quic::{
    driver::{Connection, Endpoint},
    transport::{ClientConfig, RetryPolicy, ServerConfig},
};
use quic_lb_tests::{
    aioquic,
    certificate::{Certificate, SERVER_NAME, provider, provider_with},
    client::each,
    exchange, ours,
    site::LOCAL,
};
use rustls::{CipherSuite, crypto::CryptoProvider};
use tempfile::TempDir;
use tokio::process::Child;

const KIB: usize = 1024;

fn octets() -> usize {
    let told = std::env::var("FOREIGN_OCTETS").ok();
    told.map_or(1024 * KIB, |octets| octets.parse().expect("FOREIGN_OCTETS is a number"))
}

// Our client, aioquic's server.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs aioquic: cargo test -p quic-lb-tests --test foreign_aioquic -- --ignored"]
async fn our_client_moves_bulk_both_ways_while_it_is_rebound() -> Result<()> {
    let pair = OursToAioquic::start(&[], provider()).await?;
    let connection = pair.connect().await?;
    get(&connection, |_| {}).await?;
    let rebind = || {
        let socket = std::net::UdpSocket::bind((LOCAL, 0)).expect("a free port");
        pair.client.rebind(socket).expect("a socket");
    };
    get(&connection, each(200 * KIB, rebind)).await?;
    put(&connection, |_| {}).await?;
    let migrate = || {
        let socket = std::net::UdpSocket::bind((LOCAL, 0)).expect("a free port");
        pair.client.migrate(socket).expect("a socket");
    };
    get(&connection, each(200 * KIB, migrate)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs aioquic: cargo test -p quic-lb-tests --test foreign_aioquic -- --ignored"]
async fn our_client_answers_a_retry_and_resumes() -> Result<()> {
    let pair = OursToAioquic::start(&["--retry"], provider()).await?;
    let first = pair.connect().await?;
    get(&first, |_| {}).await?;
    let second = pair.connect().await?;
    ensure!(!first.is_resumed() && second.is_resumed(), "not resumed");
    get(&second, |_| {}).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs aioquic: cargo test -p quic-lb-tests --test foreign_aioquic -- --ignored"]
async fn our_client_updates_keys_of_chacha20() -> Result<()> {
    const SUITE: CipherSuite = CipherSuite::TLS13_CHACHA20_POLY1305_SHA256;
    let pair = OursToAioquic::start(&["--chacha20"], provider_with(SUITE)).await?;
    let connection = pair.connect().await?;
    ensure!(connection.cipher_suite() == Some(SUITE), "{:?}", connection.cipher_suite());
    get(&connection, each(200 * KIB, || connection.update_keys())).await?;
    put(&connection, each(200 * KIB, || connection.update_keys())).await?;
    let updates = connection.stats().context("it is open")?.key_updates;
    ensure!(updates >= 1, "{updates} key updates");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs aioquic: cargo test -p quic-lb-tests --test foreign_aioquic -- --ignored"]
async fn our_client_exchanges_datagrams() -> Result<()> {
    let pair = OursToAioquic::start(&[], provider()).await?;
    let connection = pair.connect().await?;
    for size in [0, 1, 100, 1000] {
        let message = Bytes::from(vec![7; size]);
        connection.send_datagram(message.clone())?;
        ensure!(connection.read_datagram().await? == message, "{size} octets");
    }
    Ok(())
}

// Aioquic's client, our server.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs aioquic: cargo test -p quic-lb-tests --test foreign_aioquic -- --ignored"]
async fn our_server_moves_bulk_and_datagrams_and_resumes() -> Result<()> {
    aioquic_to_ours(&["--datagrams", "--resume"], provider(), |_| {}).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs aioquic: cargo test -p quic-lb-tests --test foreign_aioquic -- --ignored"]
async fn our_server_asks_for_a_retry() -> Result<()> {
    let always = |config: &mut ServerConfig| config.retry = RetryPolicy::Always;
    aioquic_to_ours(&[], provider(), always).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs aioquic: cargo test -p quic-lb-tests --test foreign_aioquic -- --ignored"]
async fn our_server_follows_key_updates_of_chacha20() -> Result<()> {
    let suite = provider_with(CipherSuite::TLS13_CHACHA20_POLY1305_SHA256);
    aioquic_to_ours(&["--chacha20", "--update-keys"], suite, |_| {}).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs aioquic: cargo test -p quic-lb-tests --test foreign_aioquic -- --ignored"]
async fn our_server_follows_a_client_behind_a_nat_that_rebinds() -> Result<()> {
    aioquic_to_ours(&["--rebind"], provider(), |_| {}).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs aioquic: cargo test -p quic-lb-tests --test foreign_aioquic -- --ignored"]
async fn our_server_follows_a_client_that_migrates() -> Result<()> {
    aioquic_to_ours(&["--migrate"], provider(), |_| {}).await
}

// The pairs.

/// Our client and an aioquic server.
struct OursToAioquic {
    client: Endpoint,
    config: ClientConfig,
    target: SocketAddr,
    _server: Child,
    _files: TempDir,
}

impl OursToAioquic {
    async fn start(arguments: &[&str], provider: CryptoProvider) -> Result<Self> {
        let python = aioquic::python().await?;
        let (certificate, files) = (Certificate::new()?, tempfile::tempdir()?);
        let (server, target) =
            aioquic::serve(python, files.path(), &certificate, arguments).await?;
        Ok(Self {
            client: Endpoint::client(SocketAddr::new(LOCAL, 0))?,
            config: ours::client(certificate.der(), provider)?,
            target,
            _server: server,
            _files: files,
        })
    }

    async fn connect(&self) -> Result<Connection> {
        Ok(self.client.connect_with(&self.config, self.target, SERVER_NAME)?.await?)
    }
}

async fn get(connection: &Connection, progress: impl FnMut(usize)) -> Result<()> {
    let (send, recv) = connection.open_bi().await?;
    exchange::get(send, recv, octets(), progress).await
}

async fn put(connection: &Connection, progress: impl FnMut(usize)) -> Result<()> {
    let (send, recv) = connection.open_bi().await?;
    exchange::put(send, recv, octets(), progress).await
}

/// Runs an aioquic client, which checks by itself, against our server.
async fn aioquic_to_ours(
    arguments: &[&str],
    provider: CryptoProvider,
    change: impl FnOnce(&mut ServerConfig),
) -> Result<()> {
    let python = aioquic::python().await?;
    let (certificate, files) = (Certificate::new()?, tempfile::tempdir()?);
    let change = |_: &mut _, config: &mut ServerConfig| change(config);
    let server = ours::Server::on_loopback(LOCAL, &certificate, provider, change)?;
    let mut command = aioquic::command(python, "client", files.path(), &certificate)?;
    command.args(["--target", &server.address().to_string()]);
    command.args(["--octets", &octets().to_string()]).args(arguments);
    let output = command.stdin(Stdio::null()).output().await?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{errors}\nat the server: {:?}", server.lost());
    ensure!(server.lost().is_empty(), "{:?}", server.lost());
    Ok(())
}
