//! NATs for scripts: says `ready PORT…`, moves to other ports at every line that it reads, and at the end of
//! its input says as JSON how many client addresses each has seen, and how often it moved.
#![expect(clippy::print_stdout, reason = "a program for scripts")]

use std::{io::Write as _, net::SocketAddr};

use anyhow::Context as _;
use clap::Parser;
use quic_lb_tests::nat::{Moves, Nat};

/// NATs between clients on this machine and a target.
#[derive(Debug, Parser)]
struct Args {
    /// Where its clients' datagrams go; of several, to the next after each move.
    #[arg(long, required = true)]
    target: Vec<SocketAddr>,
    /// Moves before this datagram of each client; one NAT for each time that this is given.
    #[arg(long, value_parser = clap::value_parser!(u64).range(2..))]
    before: Vec<u64>,
    /// And moves again whenever a client has sent so many more.
    #[arg(long, default_value_t = 8)]
    every: u64,
    /// Moves of each client in all.
    #[arg(long, default_value_t = 1)]
    times: usize,
    /// Takes nothing in between a client's datagrams before and after a move.
    #[arg(long)]
    deaf: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Args { target: targets, before, every, times, deaf } = Args::parse();
    let outside = targets.first().context("no target")?.ip();
    let mut plans: Vec<_> =
        before.into_iter().map(|before| Some(Moves { before, every, times, deaf })).collect();
    if plans.is_empty() {
        plans.push(None);
    }
    let (mut nats, mut ports) = (Vec::new(), String::new());
    for moves in plans {
        let nat = Nat::start_moving(targets.clone(), outside, moves).await?;
        ports.push_str(&format!(" {}", nat.address().port()));
        nats.push(nat);
    }
    println!("ready{ports}");
    std::io::stdout().flush()?;
    let reading = tokio::task::spawn_blocking(move || {
        for line in std::io::stdin().lines() {
            line?;
            nats.iter().for_each(|nat| nat.rebind(outside));
        }
        std::io::Result::Ok(nats)
    });
    let said: Vec<_> = reading.await??.iter().map(|nat| [nat.clients(), nat.rebinds()]).collect();
    println!("{}", serde_json::json!(said));
    Ok(())
}
