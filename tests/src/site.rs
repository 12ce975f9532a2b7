//! Balancer, servers and certificate of one scenario on loopback.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, ensure};
use quic_lb_config::{Config, Surroundings};

use crate::{
    audit::{Arrivals, Issued},
    balancer::{Balancer, Reload},
    certificate::Certificate,
    client::Client,
    document::{Document, Listener, Pool, free_address},
    metrics::Metrics,
    origin::{Cids, Origin},
};

/// IPv4 loopback.
pub const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// IPv6 loopback.
pub const LOCAL_V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

/// The `n`th address of this machine: on Linux all of 127.0.0.0/8 is its own.
#[must_use]
pub const fn local(n: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(127, 0, 0, n))
}

/// A balancer with servers behind it.
#[derive(Debug)]
pub struct Site {
    /// What is configured now.
    pub document: Document,
    /// The balancer.
    pub balancer: Balancer,
    /// The servers, in the order in which they were started.
    pub origins: Vec<Origin>,
    issued: Issued,
    certificate: Certificate,
}

impl Site {
    /// One listener on 127.0.0.1 in front of `pool`, whose servers do as the configuration says.
    ///
    /// # Errors
    ///
    /// When something does not start.
    pub async fn start(pool: Pool) -> anyhow::Result<Self> {
        Self::of(vec![(LOCAL, pool)], configured).await
    }

    /// A listener on each of the addresses, each in front of its pool. `cids` chooses the connection
    /// IDs of each server.
    ///
    /// # Errors
    ///
    /// When something does not start.
    pub async fn of(
        pools: Vec<(IpAddr, Pool)>,
        cids: impl Fn(&Config, &str, &str) -> anyhow::Result<Cids>,
    ) -> anyhow::Result<Self> {
        let listeners = pools.iter().map(|(ip, pool)| Listener {
            name: format!("to-{}", pool.name),
            address: free_address(*ip),
            pool: pool.name.clone(),
        });
        let listeners = listeners.collect();
        let pools = pools.into_iter().map(|(_, pool)| pool).collect();
        let document = Document { listeners, pools, admin: free_address(LOCAL) };
        let (issued, certificate) = (Issued::default(), Certificate::new()?);
        let config = checked(&document)?;
        let mut origins = Vec::new();
        for pool in &document.pools {
            for backend in &pool.backends {
                let cids = cids(&config, &pool.name, &backend.name)?;
                let (name, address) = (&backend.name, backend.address);
                origins.push(Origin::start(name, address, cids, &issued, &certificate)?);
            }
        }
        let balancer = Balancer::start(&document).await?;
        Ok(Self { document, balancer, origins, issued, certificate })
    }

    /// Where clients of the first listener connect to.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.document.listeners[0].address
    }

    /// A client at `ip` that trusts the servers.
    ///
    /// # Errors
    ///
    /// When `ip` is not an address of this machine.
    pub fn client(&self, ip: IpAddr) -> anyhow::Result<Client> {
        Client::new(ip, self.certificate.der())
    }

    /// The server with this name.
    ///
    /// # Panics
    ///
    /// When there is none.
    #[must_use]
    pub fn origin(&self, name: &str) -> &Origin {
        let origin = self.origins.iter().find(|origin| origin.name() == name);
        origin.unwrap_or_else(|| panic!("no server {name}"))
    }

    /// Adds a server to the first pool, starts it and tells the balancer.
    ///
    /// # Errors
    ///
    /// When it does not start or the balancer does not take it up.
    pub async fn add_backend(&mut self, how: Reload) -> anyhow::Result<String> {
        let pool = &mut self.document.pools[0];
        let name = pool.add_backend(LOCAL);
        let (pool_name, address) = (pool.name.clone(), pool.backend(&name).address);
        let cids = configured(&checked(&self.document)?, &pool_name, &name)?;
        self.origins.push(Origin::start(&name, address, cids, &self.issued, &self.certificate)?);
        self.balancer.reload(&self.document, how)?;
        let known = |metrics: &Metrics| metrics.backend_state(&name) == Some("active");
        self.balancer.wait_for("the new backend is known", known).await?;
        Ok(name)
    }

    /// Takes new connections away from `name`, a server of the first pool.
    ///
    /// # Errors
    ///
    /// When the balancer does not take it up.
    pub async fn drain_backend(&mut self, name: &str, how: Reload) -> anyhow::Result<()> {
        self.document.pools[0].backend(name).draining = true;
        self.balancer.reload(&self.document, how)?;
        let draining = |metrics: &Metrics| metrics.backend_state(name) == Some("draining");
        self.balancer.wait_for("the backend drains", draining).await?;
        Ok(())
    }

    /// Takes `name` out of the first pool. The server itself goes on.
    ///
    /// # Errors
    ///
    /// When the balancer does not take it up.
    pub async fn remove_backend(&mut self, name: &str) -> anyhow::Result<()> {
        self.document.pools[0].backends.retain(|backend| backend.name != name);
        self.balancer.force_reload(&self.document).await?;
        let gone = |metrics: &Metrics| metrics.backend_state(name).is_none();
        self.balancer.wait_for("the backend is gone", gone).await?;
        Ok(())
    }

    /// Connections that the servers have accepted, together.
    #[must_use]
    pub fn accepted(&self) -> usize {
        self.origins.iter().map(Origin::accepted).sum()
    }

    /// When all clients have closed: no connection was lost, nothing arrived at a wrong server, each
    /// datagram got one verdict, and what the balancer says it forwarded is what arrived.
    ///
    /// # Errors
    ///
    /// When one of these is not so.
    pub async fn check(&self) -> anyhow::Result<Metrics> {
        let metrics = self.check_with_noise().await?;
        for origin in &self.origins {
            let Arrivals { unknown, .. } = origin.arrivals();
            ensure!(unknown == 0, "{}: {unknown} datagrams of nobody", origin.name());
        }
        Ok(metrics)
    }

    /// [`Site::check`] where somebody has sent datagrams that belong to no connection.
    ///
    /// # Errors
    ///
    /// As [`Site::check`].
    pub async fn check_with_noise(&self) -> anyhow::Result<Metrics> {
        self.check_except(&[]).await
    }

    /// [`Site::check_with_noise`] where connections of the servers `removed` may be lost, and their
    /// datagrams with nowhere to go may have been sent anywhere.
    ///
    /// # Errors
    ///
    /// As [`Site::check`].
    pub async fn check_except(&self, removed: &[&str]) -> anyhow::Result<Metrics> {
        let metrics = self.balancer.at_rest().await?;
        let verdicts = metrics.verdicts();
        ensure!(verdicts.add_up(), "{verdicts:?}");
        ensure!(metrics.sum("return_failed_total", &[]) == 0, "datagrams were not returned");
        for origin in &self.origins {
            let mut misdelivered = origin.arrivals().misdelivered;
            misdelivered.retain(|owner, _| !removed.contains(&owner.as_str()));
            ensure!(misdelivered.is_empty(), "at {}: {misdelivered:?}", origin.name());
            if !removed.contains(&origin.name()) {
                ensure!(origin.lost().is_empty(), "{} lost {:?}", origin.name(), origin.lost());
            }
        }
        Ok(metrics)
    }
}

/// Connection IDs as the configuration says.
///
/// # Errors
///
/// When it does not know the server.
pub fn configured(config: &Config, pool: &str, backend: &str) -> anyhow::Result<Cids> {
    Cids::of(config, pool, backend, None)
}

fn checked(document: &Document) -> anyhow::Result<Config> {
    let surroundings = Surroundings::of_text("scenario");
    let loaded = quic_lb_config::from_str(&document.to_string(), &surroundings);
    Ok(loaded.map_err(|report| anyhow::anyhow!("{report}")).context("the scenario")?.config)
}
