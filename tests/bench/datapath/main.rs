//! What a forwarded datagram costs: processor time of the balancer, of the least that user space can
//! do (`floor.c`), and of nginx, in one run, in turns.
//!
//! ```text
//! cargo bench -p quic-lb-tests --bench datapath              # the table of docs/benchmarks.md
//! cargo bench -p quic-lb-tests --bench datapath -- --quick   # one round, fewer datagrams
//! cargo bench -p quic-lb-tests --bench datapath -- --cost | --scale | --only WORD
//! cargo bench -p quic-lb-tests --bench datapath -- --beside PROGRAM   # against another build
//! ```
//!
//! `PROGRAM` is this benchmark as another commit built it: both balancers and the floor take turns
//! in one run, and the ratio says whether a change costs anything.
//!
//! Each forwarder is a process of its own on the second processor; clients and backend share a
//! thread on the first, whose time is not counted. Cost is the time on a processor of all threads
//! of the forwarder (`schedstat`) over the datagrams that it forwarded, both ways. Rounds take
//! turns between forwarders; the table has medians. Everything that arrives is checked.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    reason = "a program for people, on numbers of its own making"
)]

mod forwarders;
mod load;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use forwarders::{Forwarder, Kind};
use load::{Line, Load};

/// Datagrams under way.
const WINDOW: u64 = 512;
/// The same for nginx with one flow that is answered: its upstream socket takes no more.
const WINDOW_OF_A_SMALL_SOCKET: u64 = 64;

/// Messages under way where numbers of flows are compared: less than the least, so that no line
/// gains by joining messages of one flow.
const WINDOW_BELOW_ALL_FLOWS: u64 = 96;

struct Options {
    rounds: usize,
    plain: u64,
    offload: u64,
    only: Option<String>,
    cost: bool,
    scale: bool,
    beside: Option<PathBuf>,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    if arguments.first().is_some_and(|first| first == "serve") {
        return forwarders::serve(&arguments[1..]);
    }
    let has = |name: &str| arguments.iter().any(|argument| argument == name);
    let value = |name: &str| {
        arguments.iter().position(|a| a == name).and_then(|at| arguments.get(at + 1)).cloned()
    };
    let quick = has("--quick");
    let beside = value("--beside").map(PathBuf::from);
    let all = !has("--cost") && !has("--scale") && beside.is_none();
    let options = Options {
        rounds: if quick { 1 } else { value("--rounds").map_or(Ok(5), |n| n.parse())? },
        plain: if quick { 20_000 } else { 60_000 },
        offload: if quick { 100_000 } else { 400_000 },
        only: value("--only"),
        cost: all || has("--cost") || beside.is_some(),
        scale: all || has("--scale"),
        beside,
    };
    forwarders::pin_self();
    let scratch = tempfile::tempdir()?;
    if options.cost {
        cost(&options, scratch.path())?;
    }
    if options.scale {
        scale(&options, scratch.path())?;
    }
    Ok(())
}

/// Nanoseconds per forwarded datagram of every forwarder on every line.
fn cost(options: &Options, scratch: &Path) -> Result<()> {
    let mut load = Load::new(10_000)?;
    let mut forwarders = Vec::new();
    let kinds: &[Kind] = match &options.beside {
        None => &[Kind::Balancer, Kind::NatFloor, Kind::CopyFloor, Kind::Nginx],
        Some(program) => {
            forwarders.push(Forwarder::start_beside(program, load.backend_address()?)?);
            &[Kind::Balancer, Kind::NatFloor]
        }
    };
    for &kind in kinds {
        match Forwarder::start(kind, load.backend_address()?, 1, scratch)? {
            Some(forwarder) => forwarders.push(forwarder),
            None => eprintln!("SKIPPED: no nginx with stream here (nginx, libnginx-mod-stream)"),
        }
    }
    if options.beside.is_some() {
        println!(
            "| datagrams | flows | | other build, ns | balancer, ns | ratio | floor (NAT), ns | ratio |"
        );
        println!("|---|---|---|---|---|---|---|---|");
    } else {
        println!(
            "| datagrams | flows | | balancer, ns | floor (NAT), ns | ratio | floor (copy), ns \
             | ratio | nginx, ns | nginx / balancer |"
        );
        println!("|---|---|---|---|---|---|---|---|---|---|");
    }
    for flows in [1, 100, 10_000] {
        for offload in [false, true] {
            for echo in [false, true] {
                for size in [1_200, 100] {
                    let line = Line { size, flows, echo, offload };
                    if options.only.as_ref().is_none_or(|only| name(&line).contains(only)) {
                        measure_line(options, &mut load, &forwarders, &line)?;
                    }
                }
            }
        }
    }
    Ok(())
}

fn measure_line(
    options: &Options,
    load: &mut Load,
    forwarders: &[Forwarder],
    line: &Line,
) -> Result<()> {
    let mut figures = vec![Vec::new(); forwarders.len()];
    for round in 0..=options.rounds {
        for (forwarder, figures) in forwarders.iter().zip(&mut figures) {
            let warm_up = round == 0;
            let nginx = forwarder.kind == Kind::Nginx;
            let count = match (warm_up, line.offload) {
                (true, _) => {
                    (line.flows as u64 * 2).max(2_000)
                        * if line.offload { load::SEGMENTS as u64 / 2 } else { 1 }
                }
                (false, true) if nginx => options.plain,
                (false, true) => options.offload,
                (false, false) => options.plain,
            };
            let small = nginx && line.echo && line.flows == 1;
            let window = if small { WINDOW_OF_A_SMALL_SOCKET } else { WINDOW };
            let figure = measure(load, forwarder, line, count, window)?;
            if !warm_up {
                figures.push(figure);
            }
        }
    }
    let figure = |kind: Kind| {
        let at = forwarders.iter().position(|forwarder| forwarder.kind == kind)?;
        Some(median(&figures[at]))
    };
    let balancer = figure(Kind::Balancer).context("the balancer always runs")?;
    let ns = |kind| figure(kind).map_or("–".to_owned(), |ns| format!("{ns:.0}"));
    let over = |kind| figure(kind).map_or("–".to_owned(), |ns| format!("{:.2}", balancer / ns));
    let way = if line.echo { "echo" } else { "one-way" };
    if options.beside.is_some() {
        println!(
            "| {} | {} | {way} | {} | {balancer:.0} | {} | {} | {} |",
            name(line),
            line.flows,
            ns(Kind::Beside),
            over(Kind::Beside),
            ns(Kind::NatFloor),
            over(Kind::NatFloor),
        );
        return Ok(());
    }
    let under = figure(Kind::Nginx).map_or("–".to_owned(), |ns| format!("{:.1}", ns / balancer));
    println!(
        "| {} | {} | {way} | {balancer:.0} | {} | {} | {} | {} | {} | {under} |",
        name(line),
        line.flows,
        ns(Kind::NatFloor),
        over(Kind::NatFloor),
        ns(Kind::CopyFloor),
        over(Kind::CopyFloor),
        ns(Kind::Nginx),
    );
    Ok(())
}

/// Nanoseconds per forwarded datagram.
fn measure(
    load: &mut Load,
    forwarder: &Forwarder,
    line: &Line,
    count: u64,
    window: u64,
) -> Result<f64> {
    let before = forwarder.cpu()?;
    let lost = load
        .run(line, forwarder.address, count, window)
        .with_context(|| format!("{:?} on {line:?}", forwarder.kind))?;
    let spent = forwarder.cpu()? - before;
    if lost * 100 > count {
        eprintln!("{:?} lost {lost} of {count} on {line:?}", forwarder.kind);
    }
    let forwarded = (count - lost) * if line.echo { 2 } else { 1 };
    Ok(spent as f64 / forwarded as f64)
}

/// Whether cost per datagram and memory per flow stay flat from 100 to 100,000 flows.
fn scale(options: &Options, scratch: &Path) -> Result<()> {
    const WORKERS: usize = 6;
    const FLOWS: [usize; 4] = [100, 1_000, 10_000, 100_000];
    let mut load = Load::new(FLOWS[3])?;
    let start = |kind, load: &Load| {
        let forwarder = Forwarder::start(kind, load.backend_address()?, WORKERS, scratch)?;
        forwarder.context("it always runs")
    };
    // One pair of processes for each number of flows, so that all take turns.
    let mut subjects = Vec::new();
    for flows in FLOWS {
        let (balancer, floor) = (start(Kind::Balancer, &load)?, start(Kind::NatFloor, &load)?);
        subjects.push((flows, balancer, floor));
    }
    let shapes = [(false, false), (false, true), (true, false)];
    let mut figures = vec![[const { [const { Vec::new() }; 2] }; 3]; FLOWS.len()];
    for round in 0..=options.rounds {
        for ((flows, balancer, floor), figures) in subjects.iter().zip(&mut figures) {
            for ((offload, echo), figures) in shapes.into_iter().zip(figures) {
                let line = Line { size: 1_200, flows: *flows, echo, offload };
                let each = if offload { load::SEGMENTS as u64 } else { 1 };
                let count = match round {
                    0 => (*flows as u64 * each).max(options.plain),
                    _ if offload => options.offload,
                    _ => options.plain,
                };
                for (forwarder, figures) in [balancer, floor].into_iter().zip(figures) {
                    let window = each * WINDOW_BELOW_ALL_FLOWS;
                    let figure = measure(&mut load, forwarder, &line, count, window)?;
                    if round > 0 {
                        figures.push(figure);
                    }
                }
            }
        }
    }
    println!(
        "\n| flows, {WORKERS} workers, 1,200 bytes | plain one-way, ns | ratio to floor | plain echo, \
         ns | ratio | offload one-way, ns | ratio | bytes of memory per flow |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let least = subjects[0].1.resident()?;
    for ((flows, balancer, _), figures) in subjects.iter().zip(&figures) {
        print!("| {flows} |");
        for [balancer, floor] in figures {
            print!(" {:.0} | {:.2} |", median(balancer), median(balancer) / median(floor));
        }
        match balancer.resident()?.saturating_sub(least) / (*flows as u64) {
            0 => println!(" – |"),
            octets => println!(" {octets} |"),
        }
    }
    Ok(())
}

fn name(line: &Line) -> String {
    let offload = if line.offload { "offload" } else { "plain" };
    format!("{} {offload}", line.size)
}

fn median(figures: &[f64]) -> f64 {
    let mut figures = figures.to_vec();
    figures.sort_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or(f64::NAN)
}
