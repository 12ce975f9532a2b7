//! A NAT for scripts: says `ready PORT`, moves to another port at every line that it reads, and at
//! the end of its input says how often it did.
#![expect(clippy::print_stdout, reason = "a program for scripts")]

use std::{io::Write as _, net::SocketAddr};

use clap::Parser;
use quic_lb_tests::nat::Nat;

/// A NAT between clients on this machine and a target.
#[derive(Debug, Parser)]
struct Args {
    /// Where its clients' datagrams go.
    #[arg(long)]
    target: SocketAddr,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Args { target } = Args::parse();
    let nat = Nat::start(target, target.ip()).await?;
    println!("ready {}", nat.address().port());
    std::io::stdout().flush()?;
    let reading = tokio::task::spawn_blocking(move || {
        for line in std::io::stdin().lines() {
            line?;
            nat.rebind(target.ip());
        }
        std::io::Result::Ok(nat.rebinds())
    });
    println!("{}", reading.await??);
    Ok(())
}
