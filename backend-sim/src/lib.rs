//! An HTTP/3 origin server and a load client, on the transport of the crate `quic`.
//!
//! Both can be run as commands (`backend-sim serve`, `backend-sim load`) and inside a process, as
//! `quic-lb demo` and the tests do. The origin reads the balancer's own configuration, and issues
//! connection IDs that lead the balancer to it. The client counts only what it has verified: every
//! octet of every body, and that every answer of a connection comes from the server that gave the
//! first one.
//!
//! # Map
//!
//! | module | what it is for |
//! | --- | --- |
//! | [`serve`] | the origin |
//! | [`load`] | the load client |
//! | [`flood`] | what attackers send, for tests of the balancer's defence |
//! | [`certificate`] | certificates, from files or made at start, and who trusts them |
//! | [`pattern`] | content that can be checked at any offset |
//! | [`cause`] | why connections end, in one word each |
//! | [`cli`] | the command line |
#![forbid(unsafe_code)]

pub mod cause;
pub mod certificate;
pub mod cli;
pub mod flood;
pub mod load;
pub mod pattern;
pub mod serve;

/// The header of every answer that names the backend it comes from.
pub const BACKEND_HEADER: &str = "x-backend";
