//! A QUIC-aware layer-4 load balancer: datagrams come in, and each goes to the server that holds
//! its connection.
//!
//! It refuses to terminate QUIC, to keep state that a packet could not do without, and to decide
//! anything by what somebody else's packet said.
//!
//! # Map
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`forwarder`] | the decision about each datagram, pure |
//! | [`admission`] | whether what begins a connection may: Retry, limits |
//! | [`routing`] | the immutable snapshot that decisions are made from |
//! | [`registry`] | what outlives snapshots |
//! | [`wanted`] | which backends there are to be, and in which state |
//! | [`maglev`] | consistent hashing |
//! | [`memory`] | what all workers remember together |
//! | [`learnt`] | the connection IDs of servers without routable ones |
//! | `bounded` | what those are made of |
//! | [`client_path`] | the client's side: where a datagram comes from and arrives |
//! | [`cid_tag`] | what stands for a connection ID where only sameness matters |
//! | [`backend`] | the server's side: numbers and states of backends |
//! | `explained` | a decision in words |
//! | [`verdict`] | rules, reasons, verdicts: the vocabulary of decisions |
//! | [`refusal`] | why the kernel does not send to a backend |
//! | [`check`] | what an active check of a backend comes to |
//! | [`counters`] | what a worker counts |
//! | [`connection_log`] | a record for each connection that begins and ends |
//! | [`worker`] | the threads that carry the datagrams |
//! | `succession` | what a process hands over to its successor |
//! | [`socket`] | UDP sockets: batches, offloads, marks |
//! | [`control`] | reload, health, admin interface, the life of the process |
//! | [`totals`] | what all workers counted, added up |
//! | [`metrics`] | what `/metrics` shows |
//! | `colours` | whether output is coloured |
//! | `words` | bytes and numbers as they are typed and shown |
//! | `zoned` | socket addresses as they are written for a successor |
//! | [`logging`] | log records |
//! | [`cli`] | the command line |
#![deny(unsafe_code)]
#![cfg_attr(
    test,
    allow(
        clippy::disallowed_methods,
        clippy::iter_over_hash_type,
        reason = "tests are their own shell"
    )
)]

pub mod admission;
mod affinity;
pub mod backend;
mod bounded;
pub mod check;
pub mod cid_tag;
pub mod cli;
pub mod client_path;
mod colours;
pub mod connection_log;
pub mod control;
pub mod counters;
mod explained;
#[cfg(test)]
mod fixtures;
mod flows;
pub mod forwarder;
pub mod learnt;
mod listeners;
pub mod logging;
pub mod maglev;
pub mod memory;
pub mod metrics;
pub mod refusal;
mod refusing;
pub mod registry;
pub mod routing;
pub mod socket;
mod succession;
pub mod totals;
pub mod verdict;
pub mod wanted;
mod words;
pub mod worker;
mod zoned;
