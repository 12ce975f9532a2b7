//! What the handles of our stack's driver promise, with our stack at both ends.

use std::{
    net::{Ipv6Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context as _, ensure};
use quic::{
    driver::{Connection, Endpoint, ReadError, WriteError},
    transport::{ClientConfig, ConnectionError, PeerClose, ServerConfig, TransportConfig},
};
use quic_lb_tests::{
    certificate::{Certificate, SERVER_NAME, client_tls, provider},
    ours,
    site::LOCAL,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const ANY: SocketAddr = SocketAddr::new(LOCAL, 0);

#[tokio::test]
async fn dropping_the_halves_of_a_stream_finishes_one_and_stops_the_other() -> anyhow::Result<()> {
    let pair = Pair::start().await?;
    let (mut send, recv) = pair.client.open_bi().await?;
    send.write_all(b"all of it").await?;
    drop((send, recv));
    let (send, mut recv) = pair.server.accept_bi().await?;
    ensure!(recv.read_to_end(100).await? == b"all of it", "the stream ends where it was dropped");
    ensure!(send.stopped().await? == Some(0), "nobody reads the other half");
    Ok(())
}

#[tokio::test]
async fn finished_and_acknowledged_streams_say_so() -> anyhow::Result<()> {
    let pair = Pair::start().await?;
    let mut send = pair.client.open_uni().await?;
    send.write_all(b"x").await?;
    send.finish()?;
    ensure!(send.finish().is_err(), "a stream ends once");
    ensure!(send.write(b"y").await == Err(WriteError::Closed), "nothing follows the end");
    ensure!(send.stopped().await?.is_none(), "the peer has all of it");
    let mut recv = pair.server.accept_uni().await?;
    let mut all = String::new();
    recv.read_to_string(&mut all).await?;
    ensure!(all == "x", "{all}");
    Ok(())
}

#[tokio::test]
async fn reset_and_stop_carry_their_codes() -> anyhow::Result<()> {
    let pair = Pair::start().await?;
    let (mut send, mut recv) = pair.client.open_bi().await?;
    send.write_all(b"x").await?;
    send.reset(7)?;
    recv.stop(8)?;
    let (mut answer, mut question) = pair.server.accept_bi().await?;
    let reset = question.read_to_end(10).await.err().context("it was reset")?;
    ensure!(reset.to_string() == ReadError::Reset(7).to_string(), "{reset}");
    ensure!(answer.stopped().await? == Some(8), "the code");
    let refused = answer.write_all(b"y").await;
    ensure!(refused == Err(WriteError::Stopped(8)), "{refused:?}");
    Ok(())
}

#[tokio::test]
async fn a_writer_waits_for_a_reader() -> anyhow::Result<()> {
    const OCTETS: usize = 32 << 20;
    let pair = Pair::start().await?;
    let mut send = pair.client.open_uni().await?;
    let taken = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&taken);
    let writing = tokio::spawn(async move {
        let octets = vec![3; OCTETS];
        while count.load(Relaxed) < OCTETS {
            let written = send.write(&octets[count.load(Relaxed)..]).await?;
            count.fetch_add(written, Relaxed);
        }
        anyhow::Ok(send.shutdown().await?)
    });
    let mut recv = pair.server.accept_uni().await?;
    // The sender has stalled when nothing is on its way and nothing more is taken, look after look.
    let (mut before, mut quiet) = (0, 0);
    soon("the sender stalls", || {
        let now = taken.load(Relaxed);
        let in_flight = pair.client.path().map_or(0, |path| path.in_flight);
        let stands_still = now > 0 && now == before && in_flight == 0;
        (before, quiet) = (now, if stands_still { quiet + 1 } else { 0 });
        quiet == 20
    })
    .await?;
    let window = TransportConfig::default().streams.stream_window;
    let taken = taken.load(Relaxed);
    ensure!(taken as u64 == window, "{taken} octets were taken, {window} may be ahead of a reader");
    ensure!(recv.read_to_end(OCTETS).await?.len() == OCTETS, "everything arrives");
    writing.await??;
    Ok(())
}

#[tokio::test]
async fn opening_waits_while_the_peer_allows_no_more_streams() -> anyhow::Result<()> {
    let pair = Pair::start().await?;
    let mut streams = Vec::new();
    let allowed = TransportConfig::default().streams.max_uni;
    for _ in 0..allowed {
        let mut send = pair.client.open_uni().await?;
        send.write_all(b"x").await?;
        streams.push(send);
    }
    let client = pair.client.clone();
    let opening = tokio::spawn(async move { client.open_uni().await });
    let mut first = pair.server.accept_uni().await?;
    ensure!(!opening.is_finished(), "one more than allowed");
    drop(streams);
    first.read_to_end(10).await?;
    for _ in 1..allowed {
        pair.server.accept_uni().await?.read_to_end(10).await?;
    }
    opening.await??;
    Ok(())
}

#[tokio::test]
async fn dropping_the_last_handle_closes_the_connection() -> anyhow::Result<()> {
    let Pair { client, server, client_endpoint, server_endpoint } = Pair::start().await?;
    let (mut send, mut recv) = client.open_bi().await?;
    drop(client);
    // A stream is a handle too: what is said now would come after the word of the end.
    send.write_all(b"still here").await?;
    let (mut answer, mut question) = server.accept_bi().await?;
    let mut words = [0; 10];
    question.read_exact(&mut words).await?;
    answer.write_all(&words).await?;
    recv.read_exact(&mut words).await?;
    ensure!(server.close_reason().is_none(), "closed although a stream is left");
    drop((send, recv));
    let reason = server.closed().await;
    let expected = PeerClose::Application { code: 0, reason: Default::default() };
    ensure!(reason == ConnectionError::PeerClosed(expected), "{reason}");
    client_endpoint.wait_idle().await;
    server_endpoint.wait_idle().await;
    Ok(())
}

#[tokio::test]
async fn closing_an_endpoint_ends_its_connections_and_accepts_no_more() -> anyhow::Result<()> {
    let pair = Pair::start().await?;
    pair.server_endpoint.close(5, b"enough");
    ensure!(pair.server_endpoint.accept().await.is_none(), "it is closed");
    ensure!(pair.server.closed().await == ConnectionError::ClosedLocally, "we did it");
    let expected = PeerClose::Application { code: 5, reason: (&b"enough"[..]).into() };
    let reason = pair.client.closed().await;
    ensure!(reason == ConnectionError::PeerClosed(expected), "{reason}");
    ensure!(pair.client.open_uni().await.is_err(), "nothing opens on it");
    pair.server_endpoint.wait_idle().await;
    Ok(())
}

#[tokio::test]
async fn what_arrived_before_the_end_can_be_read() -> anyhow::Result<()> {
    let pair = Pair::start().await?;
    let mut send = pair.client.open_uni().await?;
    send.write_all(b"last words").await?;
    let mut recv = pair.server.accept_uni().await?;
    pair.client.close(1, b"");
    pair.server.closed().await;
    let mut words = [0; 10];
    recv.read_exact(&mut words).await?;
    ensure!(&words == b"last words", "{words:?}");
    ensure!(recv.read_u8().await.is_err(), "more than was sent");
    Ok(())
}

#[tokio::test]
async fn failed_handshakes_reach_both_sides_as_typed_errors() -> anyhow::Result<()> {
    let certificate = Certificate::new()?;
    let server = Endpoint::server(server_config(&certificate)?, ANY)?;
    let client = Endpoint::client(ANY)?;
    let mut tls = client_tls(certificate.der(), provider())?;
    tls.alpn_protocols = vec![b"something else".to_vec()];
    let config = ClientConfig::new(Arc::new(tls));
    let connecting = client.connect_with(&config, server.local_addr(), SERVER_NAME)?;
    let (ours, theirs) = tokio::join!(connecting, async { server.accept().await?.await.err() });
    let ours = ours.err().context("no protocol in common")?;
    ensure!(matches!(ours, ConnectionError::PeerClosed(_)), "{ours}");
    let theirs = theirs.context("the server is told")?;
    ensure!(matches!(theirs, ConnectionError::Tls { .. }), "{theirs}");
    ensure!(theirs.to_string().contains("ALPN"), "it says what to do: {theirs}");
    Ok(())
}

/// For Wireshark and the like.
#[tokio::test]
async fn req_o02_secrets_go_to_the_key_log_of_the_tls_configuration() -> anyhow::Result<()> {
    let (at_client, at_server) = (Arc::new(Secrets::default()), Arc::new(Secrets::default()));
    let certificate = Certificate::new()?;
    let mut tls = certificate.server_tls(provider())?;
    tls.key_log = Arc::<Secrets>::clone(&at_server);
    let server = Endpoint::server(ServerConfig::new(Arc::new(tls)), ANY)?;
    let mut tls = client_tls(certificate.der(), provider())?;
    tls.key_log = Arc::<Secrets>::clone(&at_client);
    let (client, config) = (Endpoint::client(ANY)?, ClientConfig::new(Arc::new(tls)));
    let connecting = client.connect_with(&config, server.local_addr(), SERVER_NAME)?;
    let (connection, incoming) = tokio::join!(connecting, server.accept());
    let (_connection, _incoming) = (connection?, incoming.context("it is open")?.await?);
    for label in ["CLIENT_HANDSHAKE_TRAFFIC_SECRET", "SERVER_TRAFFIC_SECRET_0"] {
        let (ours, theirs) = (at_client.get(label), at_server.get(label));
        ensure!(ours.is_some() && ours == theirs, "{label}: {ours:?} {theirs:?}");
    }
    Ok(())
}

/// A key log in memory.
#[derive(Debug, Default)]
struct Secrets(Mutex<Vec<(String, Vec<u8>)>>);

impl Secrets {
    fn get(&self, label: &str) -> Option<Vec<u8>> {
        let all = self.0.lock().expect("nobody panics with it");
        all.iter().find(|(found, _)| found == label).map(|(_, secret)| secret.clone())
    }
}

impl rustls::KeyLog for Secrets {
    fn log(&self, label: &str, _client_random: &[u8], secret: &[u8]) {
        let mut all = self.0.lock().expect("nobody panics with it");
        all.push((label.to_owned(), secret.to_vec()));
    }
}

/// On sockets of every kind: what the simulator says of marks says nothing of control messages.
#[tokio::test]
async fn req_k11_a_megabyte_each_way_leaves_marks_in_use_at_both_ends() -> anyhow::Result<()> {
    const OCTETS: usize = 1 << 20;
    for (at, from) in [
        ("127.0.0.1:0", "127.0.0.1:0"),
        ("0.0.0.0:0", "127.0.0.1:0"),
        ("[::1]:0", "[::1]:0"),
        ("[::]:0", "[::]:0"),
        ("[::]:0", "127.0.0.1:0"),
    ] {
        let pair = Pair::between(at.parse()?, from.parse()?).await?;
        let (mut question, mut answer) = pair.client.open_bi().await?;
        let asking = tokio::spawn(async move {
            question.write_all(&vec![1; OCTETS]).await?;
            anyhow::Ok(question.finish()?)
        });
        let (mut send, mut recv) = pair.server.accept_bi().await?;
        ensure!(recv.read_to_end(OCTETS).await?.len() == OCTETS, "the question");
        asking.await??;
        let answering = tokio::spawn(async move {
            send.write_all(&vec![2; OCTETS]).await?;
            anyhow::Ok(send.finish()?)
        });
        ensure!(answer.read_to_end(OCTETS).await?.len() == OCTETS, "the answer");
        answering.await??;
        for (end, of) in [("client", &pair.client), ("server", &pair.server)] {
            let path = of.path().context("it is open")?;
            ensure!(path.ecn, "{end}, {from} to {at}: marks are not in use");
        }
    }
    Ok(())
}

/// Waits until something holds, with a patience.
async fn soon(what: &str, mut holds: impl FnMut() -> bool) -> anyhow::Result<()> {
    const LOOKS: usize = 3000;
    for _ in 0..LOOKS {
        if holds() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    anyhow::bail!("in vain: {what}")
}

/// A connection, seen from both ends.
struct Pair {
    client: Connection,
    server: Connection,
    client_endpoint: Endpoint,
    server_endpoint: Endpoint,
}

impl Pair {
    async fn start() -> anyhow::Result<Self> {
        Self::between(ANY, ANY).await
    }

    /// A client at `from` of a server at `at`, which is on this machine where it does not say.
    async fn between(at: SocketAddr, from: SocketAddr) -> anyhow::Result<Self> {
        let certificate = Certificate::new()?;
        let server_endpoint = Endpoint::server(server_config(&certificate)?, at)?;
        let mut client_endpoint = Endpoint::client(from)?;
        client_endpoint.set_default_client_config(ours::client(certificate.der(), provider())?);
        let mut server = server_endpoint.local_addr();
        if server.ip().is_unspecified() {
            server.set_ip(if from.is_ipv4() { LOCAL } else { Ipv6Addr::LOCALHOST.into() });
        }
        let connecting = client_endpoint.connect(server, SERVER_NAME)?;
        let (client, incoming) = tokio::join!(connecting, server_endpoint.accept());
        let server = incoming.context("the endpoint is open")?.await?;
        Ok(Self { client: client?, server, client_endpoint, server_endpoint })
    }
}

fn server_config(certificate: &Certificate) -> anyhow::Result<ServerConfig> {
    Ok(ServerConfig::new(Arc::new(certificate.server_tls(provider())?)))
}
