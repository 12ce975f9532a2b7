//! Bulk between our stack and the others, in both roles and both ways, behind a NAT that moves every
//! two seconds or every tenth of the content, whichever comes first.
//!
//! `FOREIGN_BULK_OCTETS` says how much (4 MiB unless told otherwise). Content is compared by digest.
//! Each test prints what it moved. Those with aioquic run when they are asked for, see
//! [`quic_lb_tests::aioquic`].

use std::{
    net::SocketAddr,
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use quic::{
    driver::{Connection, Endpoint},
    transport::TransportConfig,
};
use quic_lb_tests::{
    aioquic,
    certificate::{self, Certificate, SERVER_NAME, provider},
    exchange,
    nat::Nat,
    ours,
    site::LOCAL,
};

/// The longest time between two moves of the NAT.
const MOVES_EVERY: Duration = Duration::from_secs(2);
/// What a client says now and then, so that it stays within reach behind its NAT.
const KEEP_ALIVE: Duration = Duration::from_millis(300);

fn octets() -> usize {
    let told = std::env::var("FOREIGN_BULK_OCTETS").ok();
    told.map_or(4 << 20, |octets| octets.parse().expect("FOREIGN_BULK_OCTETS is a number"))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Down,
    Up,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_client_downloads_from_quinn() -> Result<()> {
    ours_to_quinn(Way::Down).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_client_uploads_to_quinn() -> Result<()> {
    ours_to_quinn(Way::Up).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs aioquic: cargo test -p quic-lb-tests --test foreign_bulk -- --ignored"]
async fn our_client_downloads_from_aioquic() -> Result<()> {
    ours_to_aioquic(Way::Down).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs aioquic: cargo test -p quic-lb-tests --test foreign_bulk -- --ignored"]
async fn our_client_uploads_to_aioquic() -> Result<()> {
    ours_to_aioquic(Way::Up).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quinn_downloads_from_our_server() -> Result<()> {
    quinn_to_ours(Way::Down).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quinn_uploads_to_our_server() -> Result<()> {
    quinn_to_ours(Way::Up).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs aioquic: cargo test -p quic-lb-tests --test foreign_bulk -- --ignored"]
async fn aioquic_downloads_from_our_server() -> Result<()> {
    aioquic_to_ours(Way::Down).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs aioquic: cargo test -p quic-lb-tests --test foreign_bulk -- --ignored"]
async fn aioquic_uploads_to_our_server() -> Result<()> {
    aioquic_to_ours(Way::Up).await
}

async fn ours_to_quinn(way: Way) -> Result<()> {
    let certificate = Certificate::new()?;
    let config = quinn::ServerConfig::with_crypto(Arc::new(certificate.server()?));
    let server = quinn::Endpoint::server(config, SocketAddr::new(LOCAL, 0))?;
    let target = server.local_addr()?;
    let serving = tokio::spawn(async move {
        while let Some(incoming) = server.accept().await {
            let Ok(connection) = incoming.await else { continue };
            while let Ok((send, recv)) = connection.accept_bi().await {
                tokio::spawn(exchange::serve(send, recv));
            }
        }
    });
    ours_to("quinn", target, &certificate, way).await?;
    serving.abort();
    Ok(())
}

async fn ours_to_aioquic(way: Way) -> Result<()> {
    let python = aioquic::python().await?;
    let (certificate, files) = (Certificate::new()?, tempfile::tempdir()?);
    let (_server, target) = aioquic::serve(python, files.path(), &certificate, &[]).await?;
    ours_to("aioquic", target, &certificate, way).await
}

/// Our client and a server of `peer`'s at `target`.
async fn ours_to(
    peer: &str,
    target: SocketAddr,
    certificate: &Certificate,
    way: Way,
) -> Result<()> {
    let nat = MovingNat::start(target).await?;
    let mut config = ours::client(certificate.der(), provider())?;
    let transport = TransportConfig { keep_alive: Some(KEEP_ALIVE), ..TransportConfig::default() };
    config.transport = Arc::new(transport);
    let client = Endpoint::client(SocketAddr::new(LOCAL, 0))?;
    let connection: Connection = client.connect_with(&config, nat.address(), SERVER_NAME)?.await?;
    let (send, recv) = connection.open_bi().await?;
    match way {
        Way::Down => exchange::get(send, recv, octets(), |_| {}).await?,
        Way::Up => exchange::put(send, recv, octets(), |_| {}).await?,
    }
    let lost = connection.close_reason();
    ensure!(lost.is_none(), "{lost:?}");
    connection.close(0, b"done");
    client.wait_idle().await;
    nat.report("ours", peer, way)
}

async fn quinn_to_ours(way: Way) -> Result<()> {
    let certificate = Certificate::new()?;
    let server = ours::Server::on_loopback(LOCAL, &certificate, provider(), |_, _| {})?;
    let nat = MovingNat::start(server.address()).await?;
    let mut transport = quinn::TransportConfig::default();
    transport.keep_alive_interval(Some(KEEP_ALIVE));
    let tls = certificate::client(certificate.der())?;
    let mut config = quinn::ClientConfig::new(Arc::new(tls));
    config.transport_config(Arc::new(transport));
    let client = quinn::Endpoint::client(SocketAddr::new(LOCAL, 0))?;
    let connection = client.connect_with(config, nat.address(), SERVER_NAME)?.await?;
    let (send, recv) = connection.open_bi().await?;
    match way {
        Way::Down => exchange::get(send, recv, octets(), |_| {}).await?,
        Way::Up => exchange::put(send, recv, octets(), |_| {}).await?,
    }
    client.close(0u8.into(), b"done");
    client.wait_idle().await;
    ensure!(server.lost().is_empty() && server.accepted() == 1, "{:?}", server.lost());
    nat.report("quinn", "ours", way)
}

async fn aioquic_to_ours(way: Way) -> Result<()> {
    let python = aioquic::python().await?;
    let (certificate, files) = (Certificate::new()?, tempfile::tempdir()?);
    let server = ours::Server::on_loopback(LOCAL, &certificate, provider(), |_, _| {})?;
    let nat = MovingNat::start(server.address()).await?;
    let mut command = aioquic::command(python, "client", files.path(), &certificate)?;
    command.args(["--target", &nat.address().to_string(), "--keep-alive"]);
    command.args(["--octets", &octets().to_string()]);
    command.arg(if way == Way::Down { "--only-get" } else { "--only-put" });
    let output = command.stdin(Stdio::null()).output().await?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{errors}\nat the server: {:?}", server.lost());
    ensure!(server.lost().is_empty() && server.accepted() == 1, "{:?}", server.lost());
    nat.report("aioquic", "ours", way)
}

/// A NAT that moves while there is something to carry.
struct MovingNat {
    nat: Arc<Nat>,
    moving: tokio::task::AbortHandle,
    start: Instant,
}

impl MovingNat {
    async fn start(target: SocketAddr) -> Result<Self> {
        let nat = Arc::new(Nat::start(target, LOCAL).await?);
        let moved = Arc::clone(&nat);
        let part = octets() as u64 / 10;
        let moving = tokio::spawn(async move {
            let (mut at, mut carried) = (Instant::now(), part / 2);
            loop {
                tokio::time::sleep(Duration::from_millis(1)).await;
                if at.elapsed() >= MOVES_EVERY
                    || moved.carried() - carried.min(moved.carried()) >= part
                {
                    moved.rebind(LOCAL);
                    (at, carried) = (Instant::now(), moved.carried());
                }
            }
        });
        Ok(Self { nat, moving: moving.abort_handle(), start: Instant::now() })
    }

    fn address(&self) -> SocketAddr {
        self.nat.address()
    }

    /// Says what happened.
    #[expect(clippy::print_stdout, reason = "figures of a long run")]
    fn report(&self, client: &str, server: &str, way: Way) -> Result<()> {
        let (octets, rebinds) = (octets(), self.nat.rebinds());
        let seconds = self.start.elapsed().as_secs_f64();
        println!(
            "{client} client, {server} server, {way:?}: {octets} octets in {seconds:.1} s, \
             {rebinds} rebinds, digests equal"
        );
        ensure!(rebinds >= 3, "{rebinds} rebinds");
        Ok(())
    }
}

impl Drop for MovingNat {
    fn drop(&mut self) {
        self.moving.abort();
    }
}
