//! The driver: the transport on tokio and UDP sockets, for servers and clients.
//!
//! The protocol stays in [`transport`](crate::transport), which knows neither sockets nor clocks.
//! Here is what it lacks: sockets with segmentation offload, ECN and destination addresses, the
//! system's clock and randomness, and futures to wait with.
//!
//! # An example
//!
//! ```
//! # use std::{error::Error, sync::Arc};
//! use quic::{
//!     driver::Endpoint,
//!     transport::{ClientConfig, ServerConfig},
//! };
//!
//! # /// A certificate for this run alone.
//! # fn tls() -> (Arc<rustls::ServerConfig>, Arc<rustls::ClientConfig>) {
//! #     let made = rcgen::generate_simple_self_signed(["server.test".to_owned()]).unwrap();
//! #     let key = made.signing_key.serialize_der();
//! #     let key = rustls::pki_types::PrivatePkcs8KeyDer::from(key).into();
//! #     let mut roots = rustls::RootCertStore::empty();
//! #     roots.add(made.cert.der().clone()).unwrap();
//! #     let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
//! #     let server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider));
//! #     let server = server.with_protocol_versions(&[&rustls::version::TLS13]).unwrap();
//! #     let server = server.with_no_client_auth();
//! #     let mut server = server.with_single_cert(vec![made.cert.into()], key).unwrap();
//! #     server.alpn_protocols = vec![b"example".to_vec()];
//! #     let client = rustls::ClientConfig::builder_with_provider(provider);
//! #     let client = client.with_protocol_versions(&[&rustls::version::TLS13]).unwrap();
//! #     let mut client = client.with_root_certificates(roots).with_no_client_auth();
//! #     client.alpn_protocols = vec![b"example".to_vec()];
//! #     (Arc::new(server), Arc::new(client))
//! # }
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
//! # let (server_tls, client_tls) = tls();
//! let server = Endpoint::server(ServerConfig::new(server_tls), "127.0.0.1:0".parse()?)?;
//! let address = server.local_addr();
//! tokio::spawn(async move {
//!     while let Some(incoming) = server.accept().await {
//!         tokio::spawn(async move {
//!             let connection = incoming.await?;
//!             while let Ok((mut send, mut recv)) = connection.accept_bi().await {
//!                 send.write_all(&recv.read_to_end(64 * 1024).await?).await?;
//!                 send.finish()?;
//!             }
//!             Ok::<_, Box<dyn Error + Send + Sync>>(())
//!         });
//!     }
//! });
//!
//! let client = Endpoint::client("127.0.0.1:0".parse()?)?;
//! let config = ClientConfig::new(client_tls);
//! let connection = client.connect_with(&config, address, "server.test")?.await?;
//! let (mut send, mut recv) = connection.open_bi().await?;
//! send.write_all(b"hello").await?;
//! send.finish()?;
//! assert_eq!(recv.read_to_end(64 * 1024).await?, b"hello");
//! connection.close(0, b"done");
//! client.wait_idle().await;
//! # Ok(())
//! # }
//! ```
//!
//! # For those who come from quinn
//!
//! Handles, streams and most of their methods are called alike. Codes and priorities are plain
//! numbers here, and TLS configurations are rustls' own, without wrappers. What differs:
//!
//! | quinn | here |
//! | --- | --- |
//! | `Endpoint::new(EndpointConfig, …)` | [`Endpoint::new`] with [`Options`] |
//! | `EndpointConfig::cid_generator` | [`Options::cids`], [`Endpoint::set_cid_config`] |
//! | `EndpointConfig::reset_key` | in [`Cids`], one for each configuration |
//! | `ServerConfig::with_crypto`, `token_key`, `max_incoming` | [`ServerConfig::new`], [`Options::tokens`], [`ServerConfig::max_half_open`] |
//! | `TransportConfig::max_concurrent_bidi_streams`, `receive_window`, … | [`TransportConfig::streams`] |
//! | `Endpoint::accept`, then `Incoming::accept`, `refuse`, `retry` | [`Endpoint::accept`] once the handshake is done; Retry is [`ServerConfig::retry`] |
//! | `Connecting::into_0rtt` | nothing: there is no 0-RTT |
//! | `Endpoint::open_connections` | [`Endpoint::connection_count`] |
//! | `Endpoint::rebind` | [`Endpoint::rebind`]; [`Endpoint::migrate`] takes fresh connection IDs |
//! | `Connection::rtt`, `congestion_state` | [`Connection::path`] |
//! | `Connection::handshake_data`, `peer_identity` | [`Connection::alpn`], [`Connection::server_name`], [`Connection::peer_certificates`] |
//! | `Connection::force_key_update` | [`Connection::update_keys`] |
//! | `Connection::set_max_concurrent_bi_streams` | nothing: limits grow as streams end |
//! | `SendStream::write_chunk`, `write_chunks` | [`SendStream::write_all`] |
//! | `RecvStream::read_chunk(max, ordered)` | [`RecvStream::read_chunk`], always in order |
//!
//! [`ServerConfig::new`]: crate::transport::ServerConfig::new
//! [`ServerConfig::max_half_open`]: crate::transport::ServerConfig::max_half_open
//! [`ServerConfig::retry`]: crate::transport::ServerConfig::retry
//! [`TransportConfig::streams`]: crate::transport::TransportConfig::streams
//!
//! # Who owns what
//!
//! ```text
//! Connection, SendStream, RecvStream ─┐ calls
//!   (any task)                        ▼
//!                     ConnectionInner: waiters and    ┌─ Endpoint ─┐
//!                     connection (a lock each)        │            │
//!                                     ▲               │            │
//!                      ┌── shard: core endpoint (one lock) ──┤  accepted connections
//!                      │      ▲ datagrams, deadlines         │
//!                      │      │                              └── another shard …
//!                      └─ task: socket, buffers, one timer
//! ```
//!
//! - A **shard** is one socket, one core endpoint and one task. An endpoint has one shard, or, on
//!   servers that want several cores, several with `SO_REUSEPORT`. Connection IDs then carry the
//!   number of their shard inside the encrypted part, so that a datagram which the kernel gives to
//!   another shard, after the client's address has changed, is handed over.
//! - The **task** is the only one that touches the socket. It receives and sends batches without
//!   a lock, and takes that of the core to hand datagrams to it and to fetch datagrams and events.
//!   The core locks each connection while it works on it, and no longer.
//! - **Handles** lock their connection for one call, have the task look at it when there may be
//!   something to send, and leave a waker where the next event of their kind will look for it. They
//!   lock the core only for what is rare: to connect, to end, to ask for sums. No lock is held
//!   across an await.
//!
//! Locks are taken in this order: the core's; the waiters of a connection; the connection itself;
//! what is left for the task.
//!
//! # What is bounded
//!
//! Everything that waits for the application is the core's, within its limits of streams, flow
//! control and datagrams. What the driver adds: the datagrams of one batch each way (the core is
//! asked for more only once the socket took those), connections that wait to be accepted, and
//! datagrams on their way to another shard. While the socket takes nothing, what arrives is still
//! received and told to the application, and deadlines are kept.
//!
//! # Dropping
//!
//! Dropping a [`SendStream`] finishes it, dropping a [`RecvStream`] stops it. A connection closes
//! with code 0 when its last handle and stream are gone. Dropping the last [`Endpoint`] accepts no
//! more; connections go on until they are over.

#![expect(
    clippy::disallowed_methods,
    reason = "the shell around endpoints and connections: it gives them time and randomness"
)]

mod accept;
mod connection;
mod endpoint;
mod error;
mod owner;
mod shard;
mod sharding;
mod socket;
mod stream;
mod task;
#[cfg(test)]
mod tests;
mod waiters;

pub use connection::{Connecting, Connection, Incoming};
pub use endpoint::{Cids, Endpoint, Options};
pub use error::{
    ClosedStream, ConnectError, ReadError, ReadExactError, ReadToEndError, SendDatagramError,
    WriteError,
};
pub use shard::Unclaimed;
pub use stream::{RecvStream, SendStream};
