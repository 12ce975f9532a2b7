//! An origin server and load client on the `quic` stack.
fn main() {}
