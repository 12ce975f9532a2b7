//! The transport: an [`Endpoint`] and its [`Connection`]s, without sockets, clocks or entropy.
//!
//! An endpoint owns what a socket's worth of datagrams needs: connection IDs, acceptance, and the
//! connections themselves. A connection owns everything between its datagrams and its streams.
//!
//! # The calling rule
//!
//! One input, then drain the outputs until only a deadline is left:
//!
//! 1. Give **one** input: [`Endpoint::handle_datagram`], [`Endpoint::handle_deadline`], or a method
//!    of a connection through [`Endpoint::connection_mut`]. Or through [`Endpoint::share`], by other
//!    threads too; then [`Endpoint::look_at`] is the input. Datagrams that arrive together may be
//!    given together.
//! 2. Call [`Endpoint::poll_transmit`] until it gives nothing more, then [`Endpoint::poll_event`]
//!    likewise. Acting on an event is an input: go back to 1.
//! 3. Wait for a datagram, or until [`Endpoint::deadline`].
//!
//! Where there is no room for datagrams, [`Endpoint::poll_transmit`] is left out until there is, and
//! nothing else: events, connection IDs and deadlines follow every input, whether or not anything
//! was sent.
//!
//! Time is whatever `now` says; it must not run backwards. Randomness comes from the seed given at
//! construction, so that the same seed and inputs give the same octets, as far as TLS does: its
//! randoms come from the `CryptoProvider`, which tests replace by a seeded one.
//!
//! # An example
//!
//! A client and a server with nothing between them. Real ones have sockets there, a clock, seeds from
//! the system, and wait for [`Endpoint::deadline`] too.
//!
//! ```
//! # use std::{error::Error, net::SocketAddr, sync::Arc, time::{Instant, SystemTime}};
//! use quic::transport::{
//!     CidIssuer, ClientConfig, Dir, Endpoint, EndpointConfig, Event, Read, Received, ResetKey,
//!     ServerConfig, StreamEvent,
//! };
//!
//! /// Hands everything that `from` has to send, being at `address`, to `to`.
//! fn carry(now: Instant, from: &mut Endpoint, address: SocketAddr, to: &mut Endpoint) -> bool {
//!     let (mut datagram, mut any) = (Vec::new(), false);
//!     while let Some(sent) = from.poll_transmit(now, 1, &mut datagram) {
//!         let received = Received { remote: address, local: None, ecn: sent.ecn };
//!         to.handle_datagram(now, received, &mut datagram);
//!         datagram.clear();
//!         any = true;
//!     }
//!     any
//! }
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
//! # fn main() -> Result<(), Box<dyn Error>> {
//! # let (server_tls, client_tls) = tls();
//! let (now, wall) = (Instant::now(), SystemTime::now());
//! let (server_at, client_at) = ("192.0.2.1:443".parse()?, "192.0.2.2:50000".parse()?);
//! let cids = CidIssuer::standalone(8, [1; 32], ResetKey::new([2; 32]));
//! let config = EndpointConfig::server(ServerConfig::new(server_tls), cids, [3; 32]);
//! let mut server = Endpoint::new(config, now, wall);
//! let mut client = Endpoint::new(EndpointConfig::client([4; 32]), now, wall);
//! client.connect(now, &ClientConfig::new(client_tls), server_at, "server.test")?;
//! let mut heard = [0; 5];
//! loop {
//!     let up = carry(now, &mut client, client_at, &mut server);
//!     while let Some((handle, event)) = server.poll_event() {
//!         if let Event::Stream(StreamEvent::Opened(dir)) = event {
//!             let mut connection = server.connection_mut(handle).expect("it has just spoken");
//!             let stream = connection.accept(dir).expect("one was opened");
//!             assert_eq!(connection.read(stream, &mut heard)?, Read::Data(5));
//!         }
//!     }
//!     let down = carry(now, &mut server, server_at, &mut client);
//!     while let Some((handle, event)) = client.poll_event() {
//!         if event == Event::Connected {
//!             let mut connection = client.connection_mut(handle).expect("it has just begun");
//!             let stream = connection.open(Dir::Uni).expect("the server allows some");
//!             connection.write(stream, b"hello")?;
//!             connection.finish(stream)?;
//!         }
//!     }
//!     if !up && !down && !client.has_work() {
//!         break;
//!     }
//! }
//! assert_eq!(&heard, b"hello");
//! # Ok(())
//! # }
//! ```
//!
//! # Map
//!
//! | part | modules |
//! | --- | --- |
//! | datagrams to connections | `endpoint`, `reset` |
//! | one connection | `connection` and the files it names |
//! | on the wire | `packet`, `frame`, `parameters`, `stream_id` |
//! | keys and TLS | `tls` (the only file that knows rustls' QUIC API), `keys`, `any_certificate` |
//! | octets in order | `streams`, `assembler`, `send_buffer`, `datagrams`, `ranges` |
//! | loss and rate | `recovery`, `acks`, `rtt`, `ecn`, [`congestion`], `pacer`, `mtu` |
//! | who is where | `path`, `cids` |
//! | what is told | `record`, `timer` |

mod acks;
mod any_certificate;
mod assembler;
mod cids;
mod config;
pub mod congestion;
mod connection;
mod datagrams;
mod ecn;
mod endpoint;
mod error;
mod frame;
#[cfg(fuzzing)]
pub mod fuzzing;
mod keys;
mod mtu;
mod pacer;
mod packet;
mod parameters;
mod path;
mod ranges;
mod record;
mod recovery;
mod reordering;
mod reset;
mod rtt;
mod send_buffer;
mod space;
mod stream_id;
mod streams;
#[cfg(test)]
mod tests;
mod timer;
mod tls;

pub use any_certificate::AnyCertificate;
pub use config::{ClientConfig, RetryPolicy, ServerConfig, TransportConfig};
pub use connection::{
    Connection, Event, MigrateError, PathInfo, SendDatagramError, Stats, Traffic,
};
pub use ecn::Ecn;
pub use endpoint::{
    CidIssuer, ConnectError, ConnectionHandle, Endpoint, EndpointConfig, Received,
    SharedConnection, TokenPolicy, TokenResult, Transmit,
};
pub use error::{Code, ConnectionError, PeerClose, TransportError};
pub use packet::DropReason;
pub use parameters::PreferredAddress;
pub use record::{
    CongestionSign, CongestionState, LossReason, Observer, Observers, Record, RecoveryMetrics,
    Subject,
};
pub use reset::ResetKey;
pub use space::Space;
pub use stream_id::{Dir, Side, StreamId};
pub use streams::{Read, ReadError, SendMemory, StreamEvent, StreamLimits, WriteError};
pub use timer::Timer;
