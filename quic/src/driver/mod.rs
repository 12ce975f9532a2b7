//! The driver: the transport on tokio and UDP sockets, for servers and clients.
//!
//! The protocol stays in [`transport`](crate::transport), which knows neither sockets nor clocks.
//! Here is what it lacks: sockets with segmentation offload, ECN and destination addresses, the
//! system's clock and randomness, and futures to wait with.
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
