//! An origin in this process, and a client for it.
#![allow(dead_code, reason = "each suite needs a part of it")]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use backend_sim::{
    certificate::{Certificate, Trust},
    load::{Answer, Session},
    serve::{Origin, Settings},
};
use http::Method;
use quic::{driver::Endpoint, h3::ALPN, transport::ClientConfig};
use quic_lb_config::{Config, Surroundings};

pub(crate) const NAME: &str = "localhost";
pub(crate) const CONFIG: &str = r#"
listeners: [{ name: edge, address: "127.0.0.1:4433", pool: web }]
pools:
  - name: web
    quic_lb:
      - { config_id: 0, server_id_length: 2, nonce_length: 6, key: "8f95f09245765f80256934e50c66207f" }
    backends:
      - { name: a, address: "127.0.0.1:5001", server_id: "0001" }
      - { name: b, address: "127.0.0.1:5002", server_id: "0002" }
"#;

pub(crate) fn config(text: &str) -> anyhow::Result<Config> {
    let surroundings = Surroundings::of_text("lb.yaml");
    let loaded = quic_lb_config::from_str(text, &surroundings);
    Ok(loaded.map_err(|report| anyhow::anyhow!("{report}"))?.config)
}

/// Backend a at a port of its own.
pub(crate) fn settings() -> anyhow::Result<Settings> {
    let certificate = Certificate::make([NAME.to_owned()])?;
    let mut settings = Settings::new(config(CONFIG)?, "a", certificate);
    settings.address = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
    Ok(settings)
}

pub(crate) struct Site {
    pub(crate) origin: Origin,
    pub(crate) endpoint: Endpoint,
    pub(crate) client: ClientConfig,
}

impl Site {
    pub(crate) async fn start(settings: Settings) -> anyhow::Result<Self> {
        let trust = Trust::Roots(settings.certificate.chain().to_vec());
        let client = ClientConfig::new(Arc::new(trust.client(&[ALPN])?));
        let origin = Origin::start(settings).await?;
        let endpoint = Endpoint::client(SocketAddr::from(([127, 0, 0, 1], 0)))?;
        Ok(Self { origin, endpoint, client })
    }

    pub(crate) async fn session(&self) -> anyhow::Result<Session> {
        self.session_by(self.origin.address()).await
    }

    pub(crate) async fn session_by(&self, remote: SocketAddr) -> anyhow::Result<Session> {
        Ok(Session::open(&self.endpoint, &self.client, remote, NAME).await?)
    }
}

pub(crate) async fn get(session: &Session, path: &str) -> anyhow::Result<Answer> {
    session.request(Method::GET, path, bytes::Bytes::new()).await.context(path.to_owned())
}

/// Waits until something holds, with a patience.
pub(crate) async fn soon(what: &str, mut holds: impl FnMut() -> bool) -> anyhow::Result<()> {
    const LOOKS: usize = 4000;
    for _ in 0..LOOKS {
        if holds() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    anyhow::bail!("in vain: {what}")
}

pub(crate) async fn text(session: &Session, path: &str) -> anyhow::Result<String> {
    Ok(String::from_utf8(get(session, path).await?.body(1 << 20).await?)?)
}

/// A link in front of a server, as slow as a modem on its way to the client. Dropping it ends it.
pub(crate) struct SlowLink {
    pub(crate) address: SocketAddr,
    tasks: [tokio::task::AbortHandle; 2],
}

impl SlowLink {
    /// Octets in a second.
    const RATE: u32 = 50_000;
    /// Datagrams that wait; more are lost.
    const QUEUE: usize = 20;

    pub(crate) async fn start(server: SocketAddr) -> anyhow::Result<Self> {
        let inside = Arc::new(tokio::net::UdpSocket::bind((server.ip(), 0)).await?);
        let outside = Arc::new(tokio::net::UdpSocket::bind((server.ip(), 0)).await?);
        outside.connect(server).await?;
        let address = inside.local_addr()?;
        let (client, clients) = tokio::sync::watch::channel(address);
        let (to, from) = (Arc::clone(&inside), Arc::clone(&outside));
        let up = tokio::spawn(async move {
            let mut octets = [0; 1 << 11];
            while let Ok((len, sender)) = to.recv_from(&mut octets).await {
                client.send_replace(sender);
                let _ = from.send(&octets[..len]).await;
            }
        });
        let (queue, mut waiting) = tokio::sync::mpsc::channel::<Vec<u8>>(Self::QUEUE);
        let down = tokio::spawn(async move {
            let arrive = async {
                let mut octets = [0; 1 << 11];
                while let Ok(len) = outside.recv(&mut octets).await {
                    let _ = queue.try_send(octets[..len].to_vec());
                }
            };
            let leave = async {
                while let Some(octets) = waiting.recv().await {
                    let len = u32::try_from(octets.len()).unwrap_or(u32::MAX);
                    tokio::time::sleep(Duration::from_secs(1) * len / Self::RATE).await;
                    let client = *clients.borrow();
                    let _ = inside.send_to(&octets, client).await;
                }
            };
            tokio::join!(arrive, leave);
        });
        Ok(Self { address, tasks: [up.abort_handle(), down.abort_handle()] })
    }
}

impl Drop for SlowLink {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::AbortHandle::abort);
    }
}

/// A link in front of a server that loses the first datagram of its client. Dropping it ends it.
pub(crate) struct LossyLink {
    pub(crate) address: SocketAddr,
    task: tokio::task::AbortHandle,
}

impl LossyLink {
    pub(crate) async fn start(server: SocketAddr) -> anyhow::Result<Self> {
        let inside = tokio::net::UdpSocket::bind((server.ip(), 0)).await?;
        let outside = tokio::net::UdpSocket::bind((server.ip(), 0)).await?;
        outside.connect(server).await?;
        let address = inside.local_addr()?;
        let task = tokio::spawn(async move {
            let (mut up, mut down) = ([0; 1 << 16], [0; 1 << 16]);
            let mut client = None;
            loop {
                tokio::select! {
                    Ok((len, sender)) = inside.recv_from(&mut up) => {
                        if client.replace(sender).is_some() {
                            let _ = outside.send(&up[..len]).await;
                        }
                    }
                    Ok(len) = outside.recv(&mut down) => {
                        if let Some(client) = client {
                            let _ = inside.send_to(&down[..len], client).await;
                        }
                    }
                    else => break,
                }
            }
        });
        Ok(Self { address, task: task.abort_handle() })
    }
}

impl Drop for LossyLink {
    fn drop(&mut self) {
        self.task.abort();
    }
}
