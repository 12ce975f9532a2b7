//! Our server behind the real balancer.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, ensure};
use quic::{
    driver::{Cids, Connection, Endpoint},
    routable::ConfigId,
    transport::{PreferredAddress, ResetKey},
};
use quic_lb_config::{Config, Surroundings};
use quic_lb_tests::{
    balancer::Balancer,
    certificate::{Certificate, provider},
    client::{Client, each},
    document::{Document, Listener, Pool, Scheme, free_address},
    exchange,
    origin::seed,
    ours::{self, Server},
    site::LOCAL,
};

const KIB: usize = 1024;
/// How often the client moves before the rotation, and again after it.
const REBINDS: usize = 25;
/// From one look to the next, and how many there are.
const POLL: Duration = Duration::from_millis(50);
const POLLS: usize = 600;

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

/// The connection ID for the preferred address is told in the handshake, where no balancer sees it. It
/// decodes, and so leads to the server that the connection is with.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_preferred_address_may_be_another_listener_of_the_same_pool() -> anyhow::Result<()> {
    const VISITS: usize = 6;
    let behind = Behind::start_with(&[Scheme::FOUR_PASS], true).await?;
    behind.use_scheme(Scheme::FOUR_PASS)?;
    let preferred = behind.document.listeners[1].address;
    let config = ours::client(behind.certificate.der(), provider())?;
    for _ in 0..VISITS {
        let endpoint = Endpoint::client(SocketAddr::new(LOCAL, 0))?;
        let connection = endpoint.connect_with(&config, behind.address(), "localhost")?.await?;
        wait_until(|| connection.remote_address() == preferred).await.context("it stays")?;
        let (send, recv) = connection.open_bi().await?;
        exchange::get(send, recv, 100 * KIB, |_| {}).await?;
        connection.close(0, b"");
        endpoint.wait_idle().await;
    }
    let metrics = behind.balancer.at_rest().await?;
    let there =
        |name, labels: &[_]| metrics.sum(name, &[labels, &[("listener", "preferred")]].concat());
    let forwarded = there("datagrams_forwarded_total", &[]);
    ensure!(forwarded == there("datagrams_forwarded_total", &[("rule", "cid")]), "not all decode");
    ensure!(there("path_changes_total", &[]) == VISITS as u64, "not each has a flow of its own");
    behind.check(VISITS).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_answers_under_anothers_id_gets_no_new_connections_until_it_is_mended()
-> anyhow::Result<()> {
    let scheme = Scheme::FOUR_PASS;
    let behind = Behind::start(&[scheme]).await?;
    behind.use_scheme(scheme)?;
    let pool = &behind.config.pools[0];
    let [wrong, other] = [0, 1].map(|n| pool.backends[n].name.as_str());
    let ids = |of: &str| Cids::Routable {
        config: pool.cid_configs[0].clone(),
        server_id: pool.backends.iter().find(|backend| backend.name == of).unwrap().server_ids[0].1,
        reset_key: ResetKey::new([7; 32]),
    };
    behind.servers[0].endpoint.set_cid_config(ids(other))?;
    let config = ours::client(behind.certificate.der(), provider())?;
    let endpoint = Endpoint::client(SocketAddr::new(LOCAL, 0))?;
    // What becomes of such a connection is not the point: it may be lost.
    let begin = async || {
        let connecting = endpoint.connect_with(&config, behind.address(), "localhost")?;
        let begun = tokio::time::timeout(Duration::from_secs(1), connecting).await;
        if let Ok(Ok(connection)) = begun {
            connection.close(0, b"");
        }
        anyhow::Ok(())
    };
    let state = async || {
        let metrics = behind.balancer.metrics().await?;
        anyhow::Ok(metrics.backend_state(wrong).map(str::to_owned))
    };
    for _ in 0..100 {
        begin().await?;
        if state().await?.as_deref() == Some("miswired") {
            break;
        }
    }
    ensure!(state().await?.as_deref() == Some("miswired"), "nothing was noticed");
    let metrics = behind.balancer.metrics().await?;
    ensure!(metrics.sum("backend_misnamed_total", &[("backend", wrong)]) >= 3);
    ensure!(metrics.by_label("backend_misnamed_total", "backend").len() == 1, "others are blamed");
    let log = behind.balancer.log();
    ensure!(
        log.contains("under connection IDs that do not lead to it") && log.contains(other),
        "{log}"
    );
    behind.servers[0].endpoint.set_cid_config(ids(wrong))?;
    // It is tried again after a while, and then answers as itself.
    let before = behind.servers[0].accepted();
    for _ in 0..POLLS {
        begin().await?;
        if state().await?.as_deref() == Some("active") {
            break;
        }
        tokio::time::sleep(POLL).await;
    }
    ensure!(behind.servers[0].accepted() > before, "it gets none");
    ensure!(state().await?.as_deref() == Some("active"), "it is not believed");
    Ok(())
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
    for _ in 0..POLLS {
        if wanted() {
            return Ok(());
        }
        tokio::time::sleep(POLL).await;
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
        Self::start_with(schemes, false).await
    }

    /// With a second listener or without, which all servers prefer.
    async fn start_with(schemes: &[Scheme], preferred: bool) -> anyhow::Result<Self> {
        let pool = Pool::new("web", schemes, LOCAL, 3);
        let listener = |name: &str| Listener {
            name: name.into(),
            address: free_address(LOCAL),
            pool: "web".into(),
        };
        let mut listeners = vec![listener("edge")];
        listeners.extend(preferred.then(|| listener("preferred")));
        let preferred = match listeners.get(1).map(|listener| listener.address) {
            Some(SocketAddr::V4(ipv4)) => Some(PreferredAddress { ipv4: Some(ipv4), ipv6: None }),
            _ => None,
        };
        let document = Document { listeners, pools: vec![pool], admin: free_address(LOCAL) };
        let surroundings = Surroundings::of_text("scenario");
        let loaded = quic_lb_config::from_str(&document.to_string(), &surroundings);
        let config = loaded.map_err(|report| anyhow::anyhow!("{report}"))?.config;
        let certificate = Certificate::new()?;
        let mut servers = Vec::new();
        for backend in &document.pools[0].backends {
            servers.push(Server::on_loopback(
                LOCAL,
                &certificate,
                provider(),
                |options, config| {
                    options.address = backend.address;
                    config.preferred_address = preferred;
                },
            )?);
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
        self.check(1).await
    }

    /// Checks that there were so many connections, and that none was lost.
    async fn check(self, connections: usize) -> anyhow::Result<()> {
        let verdicts = self.balancer.at_rest().await?.verdicts();
        ensure!(verdicts.add_up(), "{verdicts:?}");
        for server in &self.servers {
            ensure!(server.lost().is_empty(), "lost: {:?}", server.lost());
        }
        let accepted: usize = self.servers.iter().map(Server::accepted).sum();
        ensure!(accepted == connections, "{accepted} connections");
        Ok(())
    }
}
