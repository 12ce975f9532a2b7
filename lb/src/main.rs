//! The `quic-lb` command.
fn main() {}
