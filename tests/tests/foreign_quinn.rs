//! Our stack against quinn, in both roles, over loopback.
//!
//! Content is compared by digest. `FOREIGN_OCTETS` says how many octets go each way (2 MiB unless
//! told otherwise).

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use quic::{
    driver::{self, Cids},
    transport::{self, ResetKey, RetryPolicy},
};
use quic_lb_tests::{
    certificate::{self, Certificate, SERVER_NAME, provider, provider_with},
    client::each,
    exchange,
    nat::Nat,
    ours,
    site::{LOCAL, LOCAL_V6, local},
};
use rustls::{CipherSuite, crypto::CryptoProvider};

const KIB: usize = 1024;

fn octets() -> usize {
    let told = std::env::var("FOREIGN_OCTETS").ok();
    told.map_or(2048 * KIB, |octets| octets.parse().expect("FOREIGN_OCTETS is a number"))
}

// Our client, quinn's server.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_client_moves_bulk_both_ways() -> anyhow::Result<()> {
    let pair = OursToQuinn::start(provider(), QuinnServer::default()).await?;
    pair.get(octets(), |_| {}).await?;
    pair.put(octets(), |_| {}).await?;
    ensure!(pair.connection.alpn().as_deref() == Some(certificate::ALPN), "the protocol");
    ensure!(pair.connection.peer_certificates().is_some(), "the certificate");
    pair.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_client_answers_a_retry() -> anyhow::Result<()> {
    let server = QuinnServer { retry: true, ..QuinnServer::default() };
    let pair = OursToQuinn::start(provider(), server).await?;
    pair.get(100 * KIB, |_| {}).await?;
    pair.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_client_resumes_a_session() -> anyhow::Result<()> {
    let pair = OursToQuinn::start(provider(), QuinnServer::default()).await?;
    ensure!(!pair.connection.is_resumed(), "the first time");
    pair.get(100 * KIB, |_| {}).await?;
    let again = pair.client.connect_with(&pair.config, pair.target, SERVER_NAME)?.await?;
    ensure!(again.is_resumed(), "the second time");
    let (send, recv) = again.open_bi().await?;
    exchange::get(send, recv, 100 * KIB, |_| {}).await?;
    drop(again);
    pair.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_client_updates_keys() -> anyhow::Result<()> {
    let pair = OursToQuinn::start(provider(), QuinnServer::default()).await?;
    pair.get(octets(), each(256 * KIB, || pair.connection.update_keys())).await?;
    pair.put(octets(), each(256 * KIB, || pair.connection.update_keys())).await?;
    // One update has to have settled before the next may come.
    const ENOUGH: u64 = 4;
    let updates = || pair.connection.stats().map_or(0, |stats| stats.key_updates);
    for _ in 0..1000 {
        if updates() >= ENOUGH {
            break;
        }
        pair.connection.update_keys();
        pair.get(10 * KIB, |_| {}).await?;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    ensure!(updates() >= ENOUGH, "{} key updates", updates());
    pair.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_client_follows_key_updates_of_the_server() -> anyhow::Result<()> {
    let server = QuinnServer { update_keys: true, ..QuinnServer::default() };
    let pair = OursToQuinn::start(provider(), server).await?;
    pair.get(octets(), |_| {}).await?;
    pair.put(octets(), |_| {}).await?;
    let updates = pair.connection.stats().context("it is open")?.key_updates;
    ensure!(updates >= 1, "{updates} key updates");
    pair.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_client_is_rebound_without_losing_anything() -> anyhow::Result<()> {
    let pair = OursToQuinn::start(provider(), QuinnServer::default()).await?;
    let rebind = || pair.client.rebind(fresh_socket(LOCAL)).expect("a socket");
    pair.get(octets(), each(200 * KIB, rebind)).await?;
    pair.put(octets(), each(200 * KIB, rebind)).await?;
    pair.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_client_migrates_with_fresh_connection_ids() -> anyhow::Result<()> {
    let pair = OursToQuinn::start(provider(), QuinnServer::default()).await?;
    let mut used = vec![pair.connection.remote_cid()];
    let migrate = || {
        let ip = local(2 + u8::try_from(used.len() % 7).expect("below 7"));
        pair.client.migrate(fresh_socket(ip)).expect("a socket");
        used.push(pair.connection.remote_cid());
    };
    pair.get(octets(), each(300 * KIB, migrate)).await?;
    pair.put(octets(), |_| {}).await?;
    let moves = used.len();
    used.sort_unstable();
    used.dedup();
    ensure!(2 * used.len() > moves, "{} connection IDs for {moves} places", used.len());
    pair.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_client_speaks_chacha20() -> anyhow::Result<()> {
    let pair = OursToQuinn::start(provider_with(CHACHA20), QuinnServer::default()).await?;
    let suite = pair.connection.cipher_suite();
    ensure!(suite == Some(CHACHA20), "{suite:?}");
    pair.get(octets(), |_| {}).await?;
    pair.put(octets(), |_| {}).await?;
    pair.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_client_exchanges_datagrams() -> anyhow::Result<()> {
    let pair = OursToQuinn::start(provider(), QuinnServer::default()).await?;
    ensure!(pair.connection.max_datagram_size() >= Some(1000), "quinn takes datagrams");
    for size in [0, 1, 100, 1000] {
        let message = Bytes::from(vec![7; size]);
        pair.connection.send_datagram(message.clone())?;
        ensure!(pair.connection.read_datagram().await? == message, "{size} octets");
    }
    let too_large = pair.connection.send_datagram(Bytes::from(vec![7; 9000]));
    ensure!(too_large == Err(driver::SendDatagramError::TooLarge), "{too_large:?}");
    pair.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_client_says_what_is_wrong_with_a_certificate() -> anyhow::Result<()> {
    let pair = OursToQuinn::start(provider(), QuinnServer::default()).await?;
    let config = ours::client(Certificate::new()?.der(), provider())?;
    let refused = pair.client.connect_with(&config, pair.target, SERVER_NAME)?.await;
    let error = refused.err().context("another certificate is trusted")?;
    ensure!(matches!(error, transport::ConnectionError::Tls { .. }), "{error}");
    pair.end().await
}

// Quinn's client, our server.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_server_moves_bulk_both_ways() -> anyhow::Result<()> {
    for ip in [LOCAL, LOCAL_V6] {
        let pair = QuinnToOurs::start(provider(), |options, _| options.address.set_ip(ip)).await?;
        pair.get(octets(), |_| {}).await?;
        pair.put(octets(), |_| {}).await?;
        pair.end().await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_server_asks_for_a_retry() -> anyhow::Result<()> {
    let always = |_: &mut _, config: &mut transport::ServerConfig| {
        config.retry = RetryPolicy::Always;
    };
    let pair = QuinnToOurs::start(provider(), always).await?;
    pair.get(100 * KIB, |_| {}).await?;
    pair.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_server_resumes_a_session() -> anyhow::Result<()> {
    let pair = QuinnToOurs::start(provider(), |_, _| {}).await?;
    pair.get(100 * KIB, |_| {}).await?;
    let again = pair.client.connect(pair.target, SERVER_NAME)?.await?;
    let (send, recv) = again.open_bi().await?;
    exchange::get(send, recv, 100 * KIB, |_| {}).await?;
    let resumed = pair.server.connections();
    let resumed: Vec<_> = resumed.iter().map(driver::Connection::is_resumed).collect();
    ensure!(resumed == [false, true], "{resumed:?}");
    drop(again);
    pair.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_server_follows_key_updates() -> anyhow::Result<()> {
    let pair = QuinnToOurs::start(provider(), |_, _| {}).await?;
    let update = || pair.connection.force_key_update();
    pair.get(octets(), each(512 * KIB, update)).await?;
    pair.put(octets(), each(512 * KIB, update)).await?;
    let updates = pair.stats()?.key_updates;
    ensure!(updates >= 1, "{updates} key updates");
    pair.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_server_updates_keys() -> anyhow::Result<()> {
    let pair = QuinnToOurs::start(provider(), |_, _| {}).await?;
    pair.get(10 * KIB, |_| {}).await?;
    let server = pair.server.connections()[0].clone();
    pair.get(octets(), each(256 * KIB, || server.update_keys())).await?;
    pair.put(octets(), |_| {}).await?;
    // One update has to have settled before the next may come.
    for _ in 0..1000 {
        if pair.stats()?.key_updates >= 2 {
            break;
        }
        server.update_keys();
        pair.get(10 * KIB, |_| {}).await?;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let updates = pair.stats()?.key_updates;
    ensure!(updates >= 2, "{updates} key updates");
    drop(server);
    pair.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_server_follows_a_client_that_migrates() -> anyhow::Result<()> {
    let pair = QuinnToOurs::start(provider(), |_, _| {}).await?;
    let rebind = |ip| pair.client.rebind(fresh_socket(ip)).expect("a socket");
    pair.get(octets(), each(200 * KIB, || rebind(LOCAL))).await?;
    pair.put(octets(), each(200 * KIB, || rebind(local(3)))).await?;
    let validations = pair.stats()?.path_validations;
    ensure!(validations >= 4, "{validations} path validations");
    pair.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_server_follows_a_client_behind_a_nat_that_rebinds() -> anyhow::Result<()> {
    let pair = QuinnToOurs::start(provider(), |_, _| {}).await?;
    let nat = Nat::start(pair.target, LOCAL).await?;
    let connection = pair.client.connect(nat.address(), SERVER_NAME)?.await?;
    let (send, recv) = connection.open_bi().await?;
    exchange::get(send, recv, octets(), each(200 * KIB, || nat.rebind(LOCAL))).await?;
    let (send, recv) = connection.open_bi().await?;
    exchange::put(send, recv, octets(), each(200 * KIB, || nat.rebind(LOCAL))).await?;
    ensure!(nat.rebinds() >= 4, "{} rebinds", nat.rebinds());
    pair.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_server_in_several_shards_follows_clients_that_move() -> anyhow::Result<()> {
    let unroutable = Cids::Unroutable { len: 8, reset_key: ResetKey::new([1; 32]) };
    for cids in [Cids::Standalone, unroutable] {
        let pair = QuinnToOurs::start(provider(), |options, _| {
            (options.shards, options.cids) = (4, cids);
        });
        let pair = pair.await?;
        let rebind = || pair.client.rebind(fresh_socket(LOCAL)).expect("a socket");
        for _ in 0..4 {
            pair.get(octets(), each(200 * KIB, rebind)).await?;
        }
        let (handed_over, lost) = pair.server.endpoint.handed_over();
        println!("{handed_over} datagrams handed over, {lost} lost");
        ensure!(handed_over > 0, "the kernel always hit the right shard");
        pair.end().await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_server_speaks_chacha20() -> anyhow::Result<()> {
    let pair = QuinnToOurs::start(provider_with(CHACHA20), |_, _| {}).await?;
    pair.get(octets(), |_| {}).await?;
    pair.put(octets(), |_| {}).await?;
    let suite = pair.server.connections()[0].cipher_suite();
    ensure!(suite == Some(CHACHA20), "{suite:?}");
    pair.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_server_returns_datagrams() -> anyhow::Result<()> {
    let pair = QuinnToOurs::start(provider(), |_, _| {}).await?;
    for size in [0, 1, 100, 1000] {
        let message = Bytes::from(vec![7; size]);
        pair.connection.send_datagram(message.clone())?;
        ensure!(pair.connection.read_datagram().await? == message, "{size} octets");
    }
    pair.end().await
}

// The pairs.

const CHACHA20: CipherSuite = CipherSuite::TLS13_CHACHA20_POLY1305_SHA256;

/// Our client, connected to a quinn server.
struct OursToQuinn {
    client: driver::Endpoint,
    config: transport::ClientConfig,
    connection: driver::Connection,
    target: SocketAddr,
    server: quinn::Endpoint,
}

/// What a quinn server does besides answering.
#[derive(Clone, Copy, Default)]
struct QuinnServer {
    retry: bool,
    update_keys: bool,
}

impl OursToQuinn {
    async fn start(provider: CryptoProvider, behaviour: QuinnServer) -> anyhow::Result<Self> {
        let certificate = Certificate::new()?;
        let tls = certificate.server_tls(with_initial_suite(provider.clone()))?;
        let tls = quinn::crypto::rustls::QuicServerConfig::try_from(tls)?;
        let config = quinn::ServerConfig::with_crypto(Arc::new(tls));
        let server = quinn::Endpoint::server(config, SocketAddr::new(LOCAL, 0))?;
        tokio::spawn(behaviour.serve(server.clone()));
        let target = server.local_addr()?;
        let client = driver::Endpoint::client(SocketAddr::new(LOCAL, 0))?;
        let config = ours::client(certificate.der(), provider)?;
        let connection = client.connect_with(&config, target, SERVER_NAME)?.await?;
        Ok(Self { client, config, connection, target, server })
    }

    async fn get(&self, length: usize, progress: impl FnMut(usize)) -> anyhow::Result<()> {
        let (send, recv) = self.connection.open_bi().await?;
        exchange::get(send, recv, length, progress).await
    }

    async fn put(&self, length: usize, progress: impl FnMut(usize)) -> anyhow::Result<()> {
        let (send, recv) = self.connection.open_bi().await?;
        exchange::put(send, recv, length, progress).await
    }

    async fn end(self) -> anyhow::Result<()> {
        let lost = self.connection.close_reason();
        ensure!(lost.is_none(), "{lost:?}");
        self.connection.close(0, b"done");
        self.client.wait_idle().await;
        self.server.wait_idle().await;
        Ok(())
    }
}

impl QuinnServer {
    async fn serve(self, endpoint: quinn::Endpoint) {
        while let Some(incoming) = endpoint.accept().await {
            if self.retry && !incoming.remote_address_validated() {
                incoming.retry().expect("not validated");
                continue;
            }
            tokio::spawn(async move {
                let Ok(connection) = incoming.await else { return };
                let datagrams = connection.clone();
                tokio::spawn(async move {
                    while let Ok(message) = datagrams.read_datagram().await {
                        let _ = datagrams.send_datagram(message);
                    }
                });
                while let Ok((send, recv)) = connection.accept_bi().await {
                    if self.update_keys {
                        connection.force_key_update();
                    }
                    tokio::spawn(exchange::serve(send, recv));
                }
            });
        }
    }
}

/// Quinn's client, connected to our server.
struct QuinnToOurs {
    client: quinn::Endpoint,
    connection: quinn::Connection,
    target: SocketAddr,
    server: ours::Server,
}

impl QuinnToOurs {
    async fn start(
        provider: CryptoProvider,
        change: impl FnOnce(&mut driver::Options, &mut transport::ServerConfig),
    ) -> anyhow::Result<Self> {
        let certificate = Certificate::new()?;
        let server = ours::Server::on_loopback(LOCAL, &certificate, provider.clone(), change)?;
        let target = server.address();
        let tls = certificate::client_tls(certificate.der(), with_initial_suite(provider))?;
        let tls = quinn::crypto::rustls::QuicClientConfig::try_from(tls)?;
        let mut client = quinn::Endpoint::client(SocketAddr::new(target.ip(), 0))?;
        let mut config = quinn::ClientConfig::new(Arc::new(tls));
        // A client that only receives says nothing after its NAT has rebound, and is out of the
        // server's reach until it does.
        let mut transport = quinn::TransportConfig::default();
        transport.keep_alive_interval(Some(Duration::from_millis(300)));
        config.transport_config(Arc::new(transport));
        client.set_default_client_config(config);
        let connection = client.connect(target, SERVER_NAME)?.await?;
        Ok(Self { client, connection, target, server })
    }

    async fn get(&self, length: usize, progress: impl FnMut(usize)) -> anyhow::Result<()> {
        let (send, recv) = self.connection.open_bi().await?;
        exchange::get(send, recv, length, progress).await
    }

    async fn put(&self, length: usize, progress: impl FnMut(usize)) -> anyhow::Result<()> {
        let (send, recv) = self.connection.open_bi().await?;
        exchange::put(send, recv, length, progress).await
    }

    /// The server's figures of the first connection.
    fn stats(&self) -> anyhow::Result<transport::Stats> {
        self.server.connections()[0].stats().context("it is open")
    }

    async fn end(self) -> anyhow::Result<()> {
        self.client.close(0u8.into(), b"done");
        self.client.wait_idle().await;
        let idle = self.server.endpoint.wait_idle();
        tokio::time::timeout(Duration::from_secs(60), idle).await?;
        let lost = self.server.lost();
        ensure!(lost.is_empty(), "lost: {lost:?}");
        Ok(())
    }
}

/// Quinn derives the keys of Initials from the suites that it is given.
fn with_initial_suite(mut provider: CryptoProvider) -> CryptoProvider {
    let initial = provider_with(CipherSuite::TLS13_AES_128_GCM_SHA256).cipher_suites;
    if !provider.cipher_suites.iter().any(|suite| suite.suite() == initial[0].suite()) {
        provider.cipher_suites.extend(initial);
    }
    provider
}

fn fresh_socket(ip: IpAddr) -> UdpSocket {
    UdpSocket::bind((ip, 0)).expect("a free port")
}
