//! Routable connection IDs for servers on other QUIC stacks, each behind a feature of its own.

pub mod quinn;
