//! What the balancer costs a fleet: an origin alone, and the same origin through the balancer, in one
//! run, in turns; then as many connections as a machine of this class is meant to hold.
//!
//! ```text
//! cargo bench -p quic-lb-tests --bench fleet              # the tables of docs/benchmarks.md
//! cargo bench -p quic-lb-tests --bench fleet -- --quick   # one short round, 500 connections
//! cargo bench -p quic-lb-tests --bench fleet -- --compare | --crowd
//! cargo bench -p quic-lb-tests --bench fleet -- --rounds N --seconds N --connections N
//! ```
//!
//! Origin (`backend-sim serve`), balancer (`quic-lb run`) and client (`backend-sim load`) are
//! processes of their own and share the machine. The client verifies every octet. Processor time is
//! that of all threads of a process (`schedstat`). Rounds take turns between the two ways; the
//! tables have medians. Any connection that is lost, any answer from the wrong origin and any
//! request that fails ends the run with an error.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program for people, on numbers of its own making"
)]

mod processes;

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use processes::{Fleet, Load, Sample};

/// One kind of load, with the arguments of the client for it.
#[derive(Clone, Copy)]
struct Line {
    name: &'static str,
    unit: Unit,
    load: &'static [&'static str],
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Unit {
    Megabytes,
    Requests,
}

const LINES: [Line; 4] = [
    Line {
        name: "goodput, 1 connection, MB",
        unit: Unit::Megabytes,
        load: &["--connections", "1", "--size", "16MiB"],
    },
    Line {
        name: "goodput, 16 connections, MB",
        unit: Unit::Megabytes,
        load: &["--connections", "16", "--size", "4MiB"],
    },
    Line {
        name: "requests of 1,000 bytes, 16 connections × 8",
        unit: Unit::Requests,
        load: &["--connections", "16", "--concurrency", "8", "--size", "1000B"],
    },
    ONE_BY_ONE,
];

/// The line that tells latency: nothing waits for anything but its own answer.
const ONE_BY_ONE: Line = Line {
    name: "requests of 1,000 bytes, one by one",
    unit: Unit::Requests,
    load: &["--connections", "1", "--size", "1000B"],
};

struct Options {
    rounds: usize,
    seconds: u64,
    connections: usize,
    compare: bool,
    crowd: bool,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |name: &str| arguments.iter().any(|argument| argument == name);
    let value = |name: &str| -> Result<Option<usize>> {
        let at = arguments.iter().position(|argument| argument == name);
        let given = at.and_then(|at| arguments.get(at + 1));
        given.map(|given| given.parse().context(format!("{name} {given}"))).transpose()
    };
    let quick = has("--quick");
    let all = !has("--compare") && !has("--crowd");
    let options = Options {
        rounds: value("--rounds")?.unwrap_or(if quick { 1 } else { 5 }),
        seconds: value("--seconds")?.unwrap_or(if quick { 2 } else { 5 }) as u64,
        connections: value("--connections")?.unwrap_or(if quick { 500 } else { 5000 }),
        compare: all || has("--compare"),
        crowd: all || has("--crowd"),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        if options.compare {
            compare(&options).await?;
        }
        if options.crowd {
            crowd(&options).await?;
        }
        Ok(())
    })
}

async fn compare(options: &Options) -> Result<()> {
    println!(
        "| | direct, per s | balanced, per s | ratio | direct, per origin CPU s | \
         balanced, per origin CPU s | ratio | balancer CPU / origin CPU |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    let mut latencies = None;
    for line in LINES {
        let (mut direct, mut balanced) = (Vec::new(), Vec::new());
        for round in 0..options.rounds {
            let mut load = Load::new(line.load.iter().copied());
            load.duration = Duration::from_secs(options.seconds);
            let fleet = Fleet::start(1).await?;
            direct.push(fleet.run(&load, fleet.origin()).await.context("direct")?);
            balanced.push(fleet.run(&load, fleet.balancer()).await.context("balanced")?);
            eprintln!("{}, round {round}", line.name);
        }
        let wall: Rate = |sample, unit| units(sample, unit) / sample.seconds;
        let origin: Rate = |sample, unit| units(sample, unit) / sample.origin.as_secs_f64();
        let of = |samples: &[Sample], rate: Rate| {
            median(samples.iter().map(|sample| rate(sample, line.unit)))
        };
        let share = |sample: &Sample| sample.balancer.as_secs_f64() / sample.origin.as_secs_f64();
        println!(
            "| {} | {:.0} | {:.0} | **{:.2}** | {:.0} | {:.0} | **{:.2}** | {:.2} |",
            line.name,
            of(&direct, wall),
            of(&balanced, wall),
            of(&balanced, wall) / of(&direct, wall),
            of(&direct, origin),
            of(&balanced, origin),
            of(&balanced, origin) / of(&direct, origin),
            median(balanced.iter().map(share)),
        );
        if line.name == ONE_BY_ONE.name {
            latencies = Some((direct, balanced));
        }
    }
    let (direct, balanced) = latencies.context("there is a line for latency")?;
    println!("\n| latency, one by one | direct, µs | balanced, µs | added, µs |");
    println!("| --- | --- | --- | --- |");
    let (p50, p99): (Figure, Figure) = (|sample| sample.p50_us, |sample| sample.p99_us);
    for (name, at) in [("p50", p50), ("p99", p99)] {
        let (direct, balanced) = (median(direct.iter().map(at)), median(balanced.iter().map(at)));
        println!("| {name} | {direct:.0} | {balanced:.0} | **{:.0}** |", balanced - direct);
    }
    println!();
    Ok(())
}

/// One figure of a run.
type Figure = fn(&Sample) -> f64;

/// Units per second of one kind of time.
type Rate = fn(&Sample, Unit) -> f64;

fn units(sample: &Sample, unit: Unit) -> f64 {
    match unit {
        Unit::Megabytes => sample.octets / 1e6,
        Unit::Requests => sample.requests,
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Many connections through one balancer, each of which asks and rebinds.
async fn crowd(options: &Options) -> Result<()> {
    let connections = options.connections.to_string();
    // Each connection asks every five seconds and changes its port every fifteen.
    let rate = (options.connections / 5).max(1).to_string();
    let mut load = Load::new([
        "--connections",
        &connections,
        "--rate",
        &rate,
        "--size",
        "1000B",
        "--rebind-every",
        "15s",
    ]);
    load.duration = Duration::from_secs(6 * options.seconds);
    let fleet = Fleet::start(2).await?;
    let idle = fleet.memory()?;
    let sample = fleet.run(&load, fleet.balancer()).await?;
    let full = fleet.memory()?;
    ensure!(sample.connections >= options.connections, "{} connections", sample.connections);
    println!(
        "{} connections at once through one balancer, {:.0} requests ({} per second) and {} rebinds \
         in {:.0} s: none lost, none misrouted; p50 {:.0} µs, p99 {:.0} µs. Flows of the balancer: \
         {}. Memory of the balancer: {} KiB idle, {} KiB at most.",
        sample.connections,
        sample.requests,
        rate,
        sample.rebinds,
        sample.seconds,
        sample.p50_us,
        sample.p99_us,
        fleet.flows().await?,
        idle.now_kib,
        full.peak_kib,
    );
    Ok(())
}
