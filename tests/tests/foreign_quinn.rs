//! Our transport against quinn over loopback, in both roles: handshake, bulk both ways with every
//! octet checked, Retry, resumption, key update, rebinding, migration, ChaCha20, datagrams.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use quic::{
    driver,
    transport::{CidIssuer, ClientConfig, ResetKey, RetryPolicy, ServerConfig},
};
use quic_lb_tests::pattern;
use rustls::{
    SupportedCipherSuite,
    crypto::aws_lc_rs::{
        cipher_suite::{TLS13_AES_128_GCM_SHA256, TLS13_CHACHA20_POLY1305_SHA256},
        default_provider,
    },
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
};

const ALPN: &[u8] = b"hq-test";
const NAME: &str = "localhost";
/// Octets of a bulk transfer. `QUIC_BULK` asks for more; 100 MiB is what a release is tested with.
const BULK: usize = 8 << 20;

fn bulk() -> usize {
    std::env::var("QUIC_BULK").ok().and_then(|text| text.parse().ok()).unwrap_or(BULK)
}

struct Tls {
    server: rustls::ServerConfig,
    client: rustls::ClientConfig,
}

fn tls(suite: Option<SupportedCipherSuite>) -> anyhow::Result<Tls> {
    let made = rcgen::generate_simple_self_signed([NAME.to_owned()])?;
    let der = CertificateDer::from(made.cert);
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
    let mut provider = default_provider();
    if let Some(suite) = suite {
        // quinn wants the suite of Initial packets in the list; servers honour clients' order.
        provider.cipher_suites = vec![suite, TLS13_AES_128_GCM_SHA256];
    }
    let mut server = rustls::ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![der.clone()], key)?;
    server.alpn_protocols = vec![ALPN.to_vec()];
    let mut roots = rustls::RootCertStore::empty();
    roots.add(der)?;
    let mut client = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Tls { server, client })
}

fn local() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

fn socket() -> anyhow::Result<UdpSocket> {
    Ok(UdpSocket::bind(local())?)
}

// Ours.

fn our_server(tls: &Tls, retry: RetryPolicy) -> anyhow::Result<driver::Endpoint> {
    let mut config = ServerConfig::new(Arc::new(tls.server.clone()));
    config.retry = retry;
    let cids = CidIssuer::standalone(8, driver::seed()?, ResetKey::new(driver::seed()?));
    let endpoint = driver::Endpoint::server(local(), config, cids)?;
    let accepting = endpoint.clone();
    tokio::spawn(async move {
        while let Some(connection) = accepting.accept().await {
            tokio::spawn(serve_ours(connection));
        }
    });
    Ok(endpoint)
}

async fn serve_ours(connection: driver::Connection) {
    let echo = connection.clone();
    tokio::spawn(async move {
        while let Ok(message) = echo.read_datagram().await {
            let _ = echo.send_datagram(message).await;
        }
    });
    while let Ok((mut send, mut recv)) = connection.accept_bi().await {
        tokio::spawn(async move {
            let request = recv.read_to_end(usize::MAX).await?;
            let wanted = check_request(&request)?;
            for block in pattern::blocks(wanted) {
                send.write_all(&block).await?;
            }
            send.finish()?;
            send.stopped().await?;
            anyhow::Ok(())
        });
    }
}

async fn exchange_ours(
    connection: &driver::Connection,
    upload: usize,
    download: usize,
) -> anyhow::Result<()> {
    let (mut send, mut recv) = connection.open_bi().await?;
    let sending = async {
        send.write_all(&(download as u64).to_be_bytes()).await?;
        for block in pattern::blocks(upload) {
            send.write_all(&block).await?;
        }
        send.finish()?;
        anyhow::Ok(())
    };
    let receiving = async {
        let mut buffer = vec![0; 64 * 1024];
        let mut received = 0;
        while let Some(count) = recv.read(&mut buffer).await? {
            ensure!(buffer[..count] == pattern::octets(received, count), "at {received}");
            received += count;
        }
        ensure!(received == download, "{received} octets");
        anyhow::Ok(())
    };
    tokio::try_join!(sending, receiving)?;
    Ok(())
}

fn check_request(request: &[u8]) -> anyhow::Result<usize> {
    let (head, body) = request.split_first_chunk::<8>().context("a request without a head")?;
    ensure!(body == pattern::octets(0, body.len()), "an upload that differs");
    Ok(usize::try_from(u64::from_be_bytes(*head))?)
}

// quinn's.

fn quinn_server(tls: &Tls, retry: bool) -> anyhow::Result<quinn::Endpoint> {
    let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(tls.server.clone())?;
    let config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    let endpoint = quinn::Endpoint::server(config, local())?;
    let accepting = endpoint.clone();
    tokio::spawn(async move {
        while let Some(incoming) = accepting.accept().await {
            if retry && !incoming.remote_address_validated() {
                let _ = incoming.retry();
                continue;
            }
            tokio::spawn(async move {
                let connection = incoming.await?;
                serve_quinn(connection).await;
                anyhow::Ok(())
            });
        }
    });
    Ok(endpoint)
}

async fn serve_quinn(connection: quinn::Connection) {
    let echo = connection.clone();
    tokio::spawn(async move {
        while let Ok(message) = echo.read_datagram().await {
            let _ = echo.send_datagram(message);
        }
    });
    while let Ok((mut send, mut recv)) = connection.accept_bi().await {
        tokio::spawn(async move {
            let request = recv.read_to_end(usize::MAX).await?;
            let wanted = check_request(&request)?;
            for block in pattern::blocks(wanted) {
                send.write_all(&block).await?;
            }
            send.finish()?;
            send.stopped().await?;
            anyhow::Ok(())
        });
    }
}

fn quinn_client(tls: &Tls) -> anyhow::Result<quinn::Endpoint> {
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls.client.clone())?;
    let mut endpoint = quinn::Endpoint::client(local())?;
    endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(crypto)));
    Ok(endpoint)
}

async fn exchange_quinn(
    connection: &quinn::Connection,
    upload: usize,
    download: usize,
) -> anyhow::Result<()> {
    let (mut send, mut recv) = connection.open_bi().await?;
    let sending = async {
        send.write_all(&(download as u64).to_be_bytes()).await?;
        for block in pattern::blocks(upload) {
            send.write_all(&block).await?;
        }
        send.finish()?;
        anyhow::Ok(())
    };
    let receiving = async {
        let mut buffer = vec![0; 64 * 1024];
        let mut received = 0;
        while let Some(count) = recv.read(&mut buffer).await? {
            ensure!(buffer[..count] == pattern::octets(received, count), "at {received}");
            received += count;
        }
        ensure!(received == download, "{received} octets");
        anyhow::Ok(())
    };
    tokio::try_join!(sending, receiving)?;
    Ok(())
}

fn client_config(tls: &Tls) -> ClientConfig {
    ClientConfig::new(Arc::new(tls.client.clone()))
}

/// Fails rather than hangs.
async fn soon<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    match tokio::time::timeout(Duration::from_secs(120), work).await {
        Ok(result) => result,
        Err(_) => bail!("not done after two minutes"),
    }
}

#[tokio::test]
async fn our_client_and_server_together() -> anyhow::Result<()> {
    let tls = tls(None)?;
    let server = our_server(&tls, RetryPolicy::Always)?;
    let client = driver::Endpoint::client(local())?;
    soon(async {
        let connection = client.connect(&client_config(&tls), server.local_addr()?, NAME).await?;
        exchange_ours(&connection, bulk(), bulk()).await?;
        for _ in 0..20 {
            client.rebind(socket()?)?;
            exchange_ours(&connection, 10_000, 200_000).await?;
        }
        connection.close(0, b"done");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn our_client_and_quinns_server() -> anyhow::Result<()> {
    for (suite, retry) in
        [(None, false), (None, true), (Some(TLS13_CHACHA20_POLY1305_SHA256), false)]
    {
        let tls = tls(suite)?;
        let server = quinn_server(&tls, retry)?;
        let remote = server.local_addr()?;
        let client = driver::Endpoint::client(local())?;
        let config = client_config(&tls);
        soon(async {
            let connection = client.connect(&config, remote, NAME).await?;
            ensure!(!connection.is_resumed());
            let negotiated = client.with(|endpoint| {
                let handle = endpoint.connections().next()?;
                endpoint.connection(handle)?.cipher_suite()
            });
            ensure!(suite.is_none() || negotiated == suite.map(|suite| suite.suite()));
            exchange_ours(&connection, bulk(), bulk()).await?;
            connection.force_key_update();
            exchange_ours(&connection, 1000, 1 << 20).await?;
            // quinn updates keys of its own accord as well.
            ensure!(connection.stats().key_updates >= 1);

            // A NAT that moves, then the client on purpose, both under load.
            let loaded = connection.clone();
            let load = tokio::spawn(async move { exchange_ours(&loaded, bulk(), bulk()).await });
            for round in 0..6 {
                tokio::time::sleep(Duration::from_millis(20)).await;
                if round % 2 == 0 {
                    client.replace_socket(socket()?)?;
                } else {
                    client.rebind(socket()?)?;
                }
            }
            load.await??;

            connection.send_datagram(Bytes::from_static(b"hello")).await?;
            ensure!(connection.read_datagram().await? == "hello");
            connection.close(7, b"bye");

            let again = client.connect(&config, remote, NAME).await?;
            ensure!(again.is_resumed(), "the session was not resumed");
            exchange_ours(&again, 10, 10).await
        })
        .await
        .with_context(|| format!("suite {suite:?}, retry {retry}"))?;
    }
    Ok(())
}

#[tokio::test]
async fn quinns_client_and_our_server() -> anyhow::Result<()> {
    for (suite, retry) in [
        (None, RetryPolicy::Never),
        (None, RetryPolicy::Always),
        (Some(TLS13_CHACHA20_POLY1305_SHA256), RetryPolicy::Never),
    ] {
        let tls = tls(suite)?;
        let server = our_server(&tls, retry)?;
        let client = quinn_client(&tls)?;
        soon(async {
            let remote = server.local_addr()?;
            let connection = client.connect(remote, NAME)?.await?;
            exchange_quinn(&connection, bulk(), bulk()).await?;
            connection.force_key_update();
            exchange_quinn(&connection, 1000, 1 << 20).await?;

            let loaded = connection.clone();
            let load = tokio::spawn(async move { exchange_quinn(&loaded, bulk(), bulk()).await });
            for _ in 0..6 {
                tokio::time::sleep(Duration::from_millis(20)).await;
                client.rebind(socket()?)?;
            }
            load.await??;

            connection.send_datagram(Bytes::from_static(b"hello"))?;
            ensure!(connection.read_datagram().await? == "hello");
            connection.close(7u32.into(), b"bye");

            let again = client.connect(remote, NAME)?.await?;
            exchange_quinn(&again, 10, 10).await
        })
        .await
        .with_context(|| format!("suite {suite:?}, retry {retry:?}"))?;
    }
    Ok(())
}

#[tokio::test]
async fn certificate_and_alpn_problems_are_typed_and_say_what_to_do() -> anyhow::Result<()> {
    let (ours, other) = (tls(None)?, tls(None)?);
    let server = quinn_server(&ours, false)?;
    let client = driver::Endpoint::client(local())?;
    let failed = client.connect(&client_config(&other), server.local_addr()?, NAME).await;
    let text = failed.expect_err("a stranger's certificate").to_string();
    ensure!(text.contains("trust anchors"), "{text}");
    let mut alien = tls(None)?;
    alien.client = ours.client.clone();
    alien.client.alpn_protocols = vec![b"something else".to_vec()];
    let failed = client.connect(&client_config(&alien), server.local_addr()?, NAME).await;
    let text = failed.expect_err("no common protocol").to_string();
    ensure!(text.contains("alert 120") || text.contains("ALPN"), "{text}");
    Ok(())
}
