//! Real QUIC through the real balancer, and what it takes to tell whether anything went wrong.
//!
//! The servers of these tests are quinn's, each with its own UDP socket that is looked over
//! ([`audit`]): every connection ID that any server issues is known to all of them, so a datagram
//! that arrives at another server than the one that issued its connection ID is counted where it
//! arrives. The balancer is the binary `quic-lb`, in a process of its own, and is asked for its
//! metrics like any operator would ask.
//!
//! # Map
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`site`] | balancer, servers and certificate of one scenario; where to start reading |
//! | [`document`] | the YAML of a scenario |
//! | [`binary`] | the programs under test, built when needed |
//! | [`balancer`] | the process: start, reload, kill, ask |
//! | [`metrics`] | what `/metrics` says |
//! | [`origin`] | a quinn server that answers echo and download requests |
//! | [`client`] | a quinn client that rebinds and migrates, and checks what it gets |
//! | [`audit`] | who issued which connection ID, and what arrived where |
//! | [`nat`] | a NAT that forgets its bindings when told to |
//! | [`noise`] | datagrams that nobody should send |
//! | [`pattern`] | content that can be checked at any offset |
//! | [`aioquic`] | the Python peers |
//! | [`exchange`] | requests and answers on any stack's streams |
//! | [`ours`] | servers and clients on our own stack |
//! | [`s2n`] | a client on s2n-quic |
//! | [`certificate`] | the certificate of a scenario |
//! | [`sim`] | the simulator: our own endpoints on virtual time, without sockets |
#![forbid(unsafe_code)]

#[cfg(feature = "real")]
pub mod aioquic;
#[cfg(feature = "real")]
pub mod audit;
#[cfg(feature = "real")]
pub mod balancer;
#[cfg(feature = "real")]
pub mod binary;
#[cfg(feature = "real")]
pub mod certificate;
#[cfg(feature = "real")]
pub mod client;
#[cfg(feature = "real")]
pub mod document;
#[cfg(feature = "real")]
pub mod exchange;
#[cfg(feature = "real")]
pub mod metrics;
#[cfg(feature = "real")]
pub mod nat;
#[cfg(feature = "real")]
pub mod noise;
#[cfg(feature = "real")]
pub mod origin;
#[cfg(feature = "real")]
pub mod ours;
#[cfg(feature = "real")]
pub mod pattern;
#[cfg(feature = "real")]
pub mod s2n;
pub mod sim;
#[cfg(feature = "real")]
pub mod site;
