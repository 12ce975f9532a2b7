//! An echo server on quinn that can stand behind the balancer: its connection IDs carry its server
//! ID, as the balancer's own configuration file says.
//!
//! ```text
//! cargo run --release -- run --config config/examples/contract.yaml
//! cargo run --release -p quic-lb-tests --example quinn-echo -- --config config/examples/contract.yaml --backend a
//! ```
//!
//! Run the second command again with `--backend b`, and connect to the listener with ALPN
//! `quic-lb-echo`. What a client sends on a bidirectional stream comes back; `GET n` gets n octets, of
//! which 4k to 4k+3 are k as a big-endian number. The certificate is made at start and signed by
//! nobody else; each server has its own, and `--certificate FILE` writes it out for clients that
//! check it.
#![expect(clippy::print_stderr, reason = "a program for people")]

use std::{path::PathBuf, sync::Arc};

use anyhow::Context as _;
use clap::Parser;
use quic::{
    adapters::quinn::RoutableCids,
    routable::{CidGenerator, Partition},
};
use quinn::{Connection, Endpoint, EndpointConfig, RecvStream, SendStream, ServerConfig};
use rustls::pki_types::PrivateKeyDer;

const ALPN: &[u8] = b"quic-lb-echo";

/// An echo server with routable connection IDs.
#[derive(Debug, Parser)]
struct Arguments {
    /// The balancer's configuration.
    #[arg(long)]
    config: PathBuf,
    /// Which of its backends this server is.
    #[arg(long)]
    backend: String,
    /// The pool of that backend; needed when several have one of this name.
    #[arg(long)]
    pool: Option<String>,
    /// Where to write the certificate, in DER.
    #[arg(long)]
    certificate: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let Loaded { backend, endpoint_config } = load(&arguments)?;
    let server_config = server_config(&arguments)?;
    let socket = std::net::UdpSocket::bind(backend.address)?;
    let runtime = Arc::new(quinn::TokioRuntime);
    let endpoint = Endpoint::new(endpoint_config, Some(server_config), socket, runtime)?;
    eprintln!("{} listens on {}", backend.name, backend.address);
    while let Some(incoming) = endpoint.accept().await {
        tokio::spawn(async move {
            match incoming.await {
                Ok(connection) => answer(&connection).await,
                Err(error) => eprintln!("no connection: {error}"),
            }
        });
    }
    Ok(())
}

struct Loaded {
    backend: quic_lb_config::Backend,
    endpoint_config: EndpointConfig,
}

/// This is all that makes connection IDs routable: a [`CidGenerator`] of the pool's configuration
/// and the backend's server ID, handed to quinn.
fn load(arguments: &Arguments) -> anyhow::Result<Loaded> {
    let config = quic_lb_config::load(&arguments.config)?.config;
    let wanted = |pool: &&quic_lb_config::Pool| {
        arguments.pool.as_ref().is_none_or(|name| *name == pool.name)
            && pool.backends.iter().any(|backend| backend.name == arguments.backend)
    };
    let pool = config.pools.iter().find(wanted).context("no such backend")?;
    let backend = pool.backends.iter().find(|backend| backend.name == arguments.backend);
    let backend = backend.context("no such backend")?.clone();

    let scheme = pool.cid_configs.last().context("the pool has no quic_lb configuration")?.clone();
    let server_id = backend.server_ids.iter().find(|(config_id, _)| *config_id == scheme.id());
    let &(_, server_id) = server_id.context("the backend has no server ID")?;
    let generator = CidGenerator::new(scheme, server_id, Partition::Whole, seed()?)?;
    let cids = RoutableCids::new(generator, seed()?);
    let mut endpoint_config = EndpointConfig::default();
    endpoint_config.cid_generator(move || Box::new(cids.clone()));
    Ok(Loaded { backend, endpoint_config })
}

fn server_config(arguments: &Arguments) -> anyhow::Result<ServerConfig> {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
    if let Some(path) = &arguments.certificate {
        std::fs::write(path, made.cert.der())?;
    }
    let key = PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
    let mut tls = rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.into()], key)?;
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let tls = quinn::crypto::rustls::QuicServerConfig::try_from(tls)?;
    Ok(ServerConfig::with_crypto(Arc::new(tls)))
}

async fn answer(connection: &Connection) {
    while let Ok((send, recv)) = connection.accept_bi().await {
        tokio::spawn(serve(send, recv));
    }
}

async fn serve(mut send: SendStream, mut recv: RecvStream) -> anyhow::Result<()> {
    const MAX_LINE: usize = 64;
    let mut head = Vec::new();
    while head.len() < 4
        && let Some(chunk) = recv.read_chunk(usize::MAX, true).await?
    {
        head.extend_from_slice(&chunk.bytes);
    }
    if let Some(length) = head.strip_prefix(b"GET ") {
        let line = [length, &recv.read_to_end(MAX_LINE).await?].concat();
        let length: u64 = str::from_utf8(&line)?.trim().parse()?;
        let mut words = (0..=u32::MAX).cycle();
        let mut left = usize::try_from(length)?;
        while left > 0 {
            let block: Vec<_> = words.by_ref().take(1 << 14).flat_map(u32::to_be_bytes).collect();
            send.write_all(&block[..block.len().min(left)]).await?;
            left = left.saturating_sub(block.len());
        }
    } else {
        send.write_all(&head).await?;
        while let Some(chunk) = recv.read_chunk(usize::MAX, true).await? {
            send.write_chunk(chunk.bytes).await?;
        }
    }
    Ok(send.finish()?)
}

fn seed() -> anyhow::Result<[u8; 32]> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(|error| anyhow::anyhow!("no randomness: {error}"))?;
    Ok(seed)
}
