//! Our server behind the real balancer.

use std::{net::SocketAddr, path::Path, time::Duration};

use anyhow::{Context as _, ensure};
use quic::{
    driver::{Cids, Connection},
    routable::ConfigId,
    transport::ResetKey,
};
use quic_lb_config::{Config, Surroundings};
use quic_lb_tests::{
    balancer::Balancer,
    certificate::{Certificate, provider},
    client::{Client, each},
    document::{Document, Listener, Pool, Scheme, free_address},
    exchange,
    origin::seed,
    ours::Server,
    site::LOCAL,
};

const KIB: usize = 1024;
/// How often the client moves before the rotation, and again after it.
const REBINDS: usize = 25;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quinn_client_keeps_its_connection_across_rebinds_and_a_rotation() -> anyhow::Result<()> {
    let (old, new) = (Scheme::FOUR_PASS, Scheme::SINGLE_PASS);
    let behind = Behind::start(&[old, new]).await?;
    behind.use_scheme(old)?;
    let client = Client::new(LOCAL, behind.certificate.der())?;
    let connection = client.connect(behind.address()).await?;

    move_about(&client, &connection, REBINDS).await?;
    let server = behind.connection()?;
    ensure!(config_ids(&server) == [Some(old.config_id)], "{:?}", server.local_cids());
    let before = server.local_cids();

    behind.use_scheme(new)?;
    move_about(&client, &connection, 2 * REBINDS).await?;

    let after = server.local_cids();
    ensure!(config_ids(&server) == [Some(new.config_id)], "old ones are in use: {after:?}");
    ensure!(after.len() > 1 && after.iter().all(|id| !before.contains(id)), "{after:?}");
    ensure!(client.rebinds() >= 2 * REBINDS, "{} rebinds", client.rebinds());
    drop(server);
    behind.end(client).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_go_on_when_the_configuration_is_taken_away() -> anyhow::Result<()> {
    let scheme = Scheme::FOUR_PASS;
    let behind = Behind::start(&[scheme]).await?;
    behind.use_scheme(scheme)?;
    let client = Client::new(LOCAL, behind.certificate.der())?;
    let connection = client.connect(behind.address()).await?;
    get(&connection, 100 * KIB, |_| {}).await?;

    for server in &behind.servers {
        let reset_key = ResetKey::new(seed()?);
        server.endpoint.set_cid_config(Cids::Unroutable { len: 8, reset_key })?;
    }
    let server = behind.connection()?;
    wait_until(|| config_ids(&server) == [None]).await.context("old ones are in use")?;
    ensure!(server.local_cids().len() == 1, "{:?}", server.local_cids());
    get(&connection, 100 * KIB, |_| {}).await?;
    drop(server);
    behind.end(client).await
}

/// Downloads and uploads until the client has moved `rebinds` times altogether.
async fn move_about(
    client: &Client,
    connection: &quinn::Connection,
    rebinds: usize,
) -> anyhow::Result<()> {
    let rebind = || client.rebind(LOCAL).expect("a free port");
    // Each round moves at least once.
    for _ in 0..rebinds {
        if client.rebinds() >= rebinds {
            break;
        }
        get(connection, 1024 * KIB, each(100 * KIB, rebind)).await?;
        let (send, recv) = connection.open_bi().await?;
        exchange::put(send, recv, 200 * KIB, |_| {}).await?;
    }
    ensure!(client.rebinds() >= rebinds, "{} rebinds", client.rebinds());
    Ok(())
}

async fn get(
    connection: &quinn::Connection,
    length: usize,
    progress: impl FnMut(usize),
) -> anyhow::Result<()> {
    let (send, recv) = connection.open_bi().await?;
    exchange::get(send, recv, length, progress).await
}

/// The config IDs of the connection IDs that the peer may use.
fn config_ids(connection: &Connection) -> Vec<Option<u8>> {
    let ids = connection.local_cids();
    let ids = ids.iter().map(|id| ConfigId::from_first_octet(id[0]).map(ConfigId::get));
    let mut ids: Vec<_> = ids.collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

async fn wait_until(wanted: impl Fn() -> bool) -> anyhow::Result<()> {
    const POLLS: usize = 600;
    for _ in 0..POLLS {
        if wanted() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    anyhow::bail!("it never happened")
}

/// Three of our servers behind a balancer.
struct Behind {
    document: Document,
    config: Config,
    certificate: Certificate,
    servers: Vec<Server>,
    balancer: Balancer,
}

impl Behind {
    async fn start(schemes: &[Scheme]) -> anyhow::Result<Self> {
        let pool = Pool::new("web", schemes, LOCAL, 3);
        let listener =
            Listener { name: "edge".into(), address: free_address(LOCAL), pool: "web".into() };
        let document =
            Document { listeners: vec![listener], pools: vec![pool], admin: free_address(LOCAL) };
        let surroundings =
            Surroundings { file: "scenario", directory: Path::new(""), environment: &|_| None };
        let loaded = quic_lb_config::from_str(&document.to_string(), &surroundings);
        let config = loaded.map_err(|report| anyhow::anyhow!("{report}"))?.config;
        let certificate = Certificate::new()?;
        let mut servers = Vec::new();
        for backend in &document.pools[0].backends {
            servers.push(Server::on_loopback(LOCAL, &certificate, provider(), |options, _| {
                options.address = backend.address;
            })?);
        }
        let balancer = Balancer::start(&document).await?;
        Ok(Self { document, config, certificate, servers, balancer })
    }

    fn address(&self) -> SocketAddr {
        self.document.listeners[0].address
    }

    /// Has all servers issue connection IDs of `scheme`.
    fn use_scheme(&self, scheme: Scheme) -> anyhow::Result<()> {
        let pool = &self.config.pools[0];
        let config = pool.cid_configs.iter().find(|config| config.id().get() == scheme.config_id);
        let config = config.context("no such scheme")?;
        for (server, backend) in self.servers.iter().zip(&pool.backends) {
            let server_id = backend.server_ids.iter().find(|(id, _)| *id == config.id());
            let (_, server_id) = *server_id.context("no server ID")?;
            let reset_key = ResetKey::new(seed()?);
            let cids = Cids::Routable { config: config.clone(), server_id, reset_key };
            server.endpoint.set_cid_config(cids)?;
        }
        Ok(())
    }

    /// The servers' end of the only connection.
    fn connection(&self) -> anyhow::Result<Connection> {
        let mut all = self.servers.iter().flat_map(Server::connections);
        let only = all.next().context("no connection")?;
        ensure!(all.next().is_none(), "more than one connection");
        Ok(only)
    }

    async fn end(self, client: Client) -> anyhow::Result<()> {
        client.close().await;
        let verdicts = self.balancer.at_rest().await?.verdicts();
        ensure!(verdicts.add_up(), "{verdicts:?}");
        for server in &self.servers {
            ensure!(server.lost().is_empty(), "lost: {:?}", server.lost());
        }
        let accepted: usize = self.servers.iter().map(Server::accepted).sum();
        ensure!(accepted == 1, "{accepted} connections");
        Ok(())
    }
}
