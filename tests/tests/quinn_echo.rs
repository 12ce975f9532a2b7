//! The example server of the README behind the balancer.

use std::{
    path::Path,
    process::{Child, Command},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use quic_lb_tests::{
    balancer::Balancer,
    binary,
    client::{Client, download, each, echo},
    document::{Document, Listener, Pool, Scheme, free_address},
    site::LOCAL,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_example_server_echoes_behind_the_balancer_while_its_client_moves() -> anyhow::Result<()>
{
    let pool = Pool::new("web", &[Scheme::FOUR_PASS], LOCAL, 1);
    let address = free_address(LOCAL);
    let listener = Listener { name: "edge".into(), address, pool: pool.name.clone() };
    let document =
        Document { listeners: vec![listener], pools: vec![pool], admin: free_address(LOCAL) };
    let folder = tempfile::tempdir()?;
    let _server = Echo::start(&document, folder.path())?;
    let certificate = read_soon(&folder.path().join(CERTIFICATE)).await?;
    let balancer = Balancer::start(&document).await?;
    let client = Client::new(LOCAL, &certificate)?;

    let connection = client.connect(address).await?;
    download(&connection, 8 << 20, each(1 << 18, || client.rebind(LOCAL).expect("a port"))).await?;
    echo(&connection, 1 << 20, |_| {}).await?;

    ensure!(client.rebinds() >= 10, "{} rebinds", client.rebinds());
    client.close().await;
    let metrics = balancer.at_rest().await?;
    ensure!(metrics.verdicts().add_up(), "{:?}", metrics.verdicts());
    ensure!(metrics.sum("path_changes_total", &[]) >= 10, "the connection ID was decoded");
    Ok(())
}

const CERTIFICATE: &str = "certificate";

/// The example, killed at the end.
struct Echo(Child);

impl Echo {
    fn start(document: &Document, folder: &Path) -> anyhow::Result<Self> {
        let config = folder.join("quic-lb.yaml");
        std::fs::write(&config, document.to_string())?;
        let mut command = Command::new(binary::quinn_echo()?);
        command.arg("--config").arg(config).args(["--backend", "web-a"]);
        command.arg("--certificate").arg(folder.join(CERTIFICATE));
        Ok(Self(command.spawn()?))
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn read_soon(path: &Path) -> anyhow::Result<Vec<u8>> {
    for _ in 0..600 {
        match std::fs::read(path) {
            Ok(octets) if !octets.is_empty() => return Ok(octets),
            _ => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
    std::fs::read(path).context("the example does not start")
}
