//! What moving data costs: our transport and quinn's, in one run, in turns.
//!
//! ```text
//! cargo bench -p quic-lb-tests --bench transport              # the table of docs/benchmarks.md
//! cargo bench -p quic-lb-tests --bench transport -- --quick   # one round, fewer octets
//! cargo bench -p quic-lb-tests --bench transport -- --rounds N | --only WORD
//! ```
//!
//! Client and server share one process and a runtime of two threads; they speak over loopback, with
//! the defaults of their stacks, the same cipher suite and the same largest datagram. Octets are
//! compared where they arrive. Processor time is that of all threads (`schedstat`), both ends
//! together. Rounds take turns between the stacks; the table has medians.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::cast_precision_loss,
    reason = "a program for people, on numbers of its own making"
)]

mod stacks;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use quic_lb_tests::{certificate::Certificate, pattern};
use stacks::{Ours, Quinn, Stack};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    task::JoinSet,
};

const MIB: u64 = 1 << 20;
/// The content repeats after so many octets, which are kept to compare with.
const PERIOD: usize = 1 << 20;
/// Octets that are read and written at once.
const PIECE: usize = 1 << 16;
/// Octets of a question, and of its answer.
const QUESTION: usize = 100;
const ANSWER: usize = 1000;
/// Questions under way on each connection.
const CONCURRENT: usize = 8;

/// One line of the table.
#[derive(Clone, Copy)]
struct Line {
    name: &'static str,
    connections: usize,
    load: Load,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Load {
    Download,
    Upload,
    Requests,
}

const LINES: [Line; 6] = [
    Line { name: "download, 1 connection", connections: 1, load: Load::Download },
    Line { name: "download, 16 connections", connections: 16, load: Load::Download },
    Line { name: "upload, 1 connection", connections: 1, load: Load::Upload },
    Line { name: "upload, 16 connections", connections: 16, load: Load::Upload },
    Line { name: "requests, 1 connection", connections: 1, load: Load::Requests },
    Line { name: "requests, 16 connections", connections: 16, load: Load::Requests },
];

/// How much of it is done.
#[derive(Clone, Copy)]
struct Amount {
    octets: u64,
    requests: u64,
}

/// What one run took.
#[derive(Clone, Copy)]
struct Sample {
    /// Octets or requests.
    units: f64,
    wall: Duration,
    processor: Duration,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |name: &str| arguments.iter().any(|argument| argument == name);
    let value = |name: &str| {
        arguments.iter().position(|a| a == name).and_then(|at| arguments.get(at + 1)).cloned()
    };
    let quick = has("--quick");
    let rounds = if quick { 1 } else { value("--rounds").map_or(Ok(5), |n| n.parse())? };
    let amount = if quick {
        Amount { octets: 64 * MIB, requests: 5_000 }
    } else {
        Amount { octets: 512 * MIB, requests: 40_000 }
    };
    let only = value("--only");
    let stack = value("--stack");
    let wanted = |name: &str| stack.as_deref().is_none_or(|stack| stack == name);

    println!("| | ours, wall | quinn, wall | ratio | ours, CPU | quinn, CPU | ratio |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for line in LINES {
        if only.as_ref().is_some_and(|only| !line.name.contains(only.as_str())) {
            continue;
        }
        let (mut ours, mut quinn) = (Vec::new(), Vec::new());
        for round in 0..rounds {
            if wanted("ours") {
                ours.push(run::<Ours>(line, amount).context("ours")?);
            }
            if wanted("quinn") {
                quinn.push(run::<Quinn>(line, amount).context("quinn")?);
            }
            if let (Some(ours), Some(quinn)) = (ours.last(), quinn.last()) {
                eprintln!("{} {round}: {:.3}", line.name, ours.per_wall() / quinn.per_wall());
            }
        }
        let scale = if line.load == Load::Requests { 1.0 } else { 1e6 };
        let of = |samples: &[Sample], rate: Rate| median(samples, rate) / scale;
        let (wall, processor): (Rate, Rate) = (Sample::per_wall, Sample::per_processor);
        println!(
            "| {} | {:.0} | {:.0} | **{:.2}** | {:.0} | {:.0} | **{:.2}** |",
            line.name,
            of(&ours, wall),
            of(&quinn, wall),
            of(&ours, wall) / of(&quinn, wall),
            of(&ours, processor),
            of(&quinn, processor),
            of(&ours, processor) / of(&quinn, processor),
        );
    }
    println!();
    println!("MB (requests: number) per second of wall time and of processor time, both ends.");
    Ok(())
}

/// Units per second of one kind of time.
type Rate = fn(&Sample) -> f64;

impl Sample {
    fn per_wall(&self) -> f64 {
        self.units / self.wall.as_secs_f64()
    }

    fn per_processor(&self) -> f64 {
        self.units / self.processor.as_secs_f64()
    }
}

fn median(samples: &[Sample], rate: Rate) -> f64 {
    let mut rates: Vec<_> = samples.iter().map(rate).collect();
    rates.sort_unstable_by(f64::total_cmp);
    rates.get(rates.len() / 2).copied().unwrap_or(f64::NAN)
}

fn run<S: Stack>(line: Line, amount: Amount) -> Result<Sample> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let sample = runtime.block_on(async { tokio::spawn(measure::<S>(line, amount)).await? });
    runtime.shutdown_timeout(Duration::from_secs(1));
    sample
}

async fn measure<S: Stack>(line: Line, amount: Amount) -> Result<Sample> {
    let content = Arc::new(Content::new());
    let certificate = Certificate::new()?;
    let server = S::server(&certificate).await?;
    tokio::spawn(serve::<S>(server.clone(), Arc::clone(&content)));
    let client = S::client(&certificate).await?;
    let mut connections = Vec::new();
    for _ in 0..line.connections {
        connections.push(S::connect(&client, S::address(&server)?).await?);
    }
    let share = line.connections as u64;
    let mut tasks = JoinSet::new();
    let (start, before) = (Instant::now(), processor_time()?);
    for connection in &connections {
        match line.load {
            Load::Requests => {
                for _ in 0..CONCURRENT {
                    let count = amount.requests / share / CONCURRENT as u64;
                    let content = Arc::clone(&content);
                    tasks.spawn(ask_often::<S>(connection.clone(), content, count));
                }
            }
            load => {
                let content = Arc::clone(&content);
                let octets = amount.octets / share;
                tasks.spawn(transfer::<S>(connection.clone(), content, load, octets));
            }
        }
    }
    while let Some(result) = tasks.join_next().await {
        result??;
    }
    let (wall, processor) = (start.elapsed(), processor_time()? - before);
    let units = if line.load == Load::Requests { amount.requests } else { amount.octets };
    Ok(Sample { units: units as f64, wall, processor })
}

async fn transfer<S: Stack>(
    connection: S::Connection,
    content: Arc<Content>,
    load: Load,
    octets: u64,
) -> Result<()> {
    let (mut send, mut recv) = S::open(&connection).await?;
    if load == Load::Download {
        send.write_all(b"D").await?;
        send.write_all(&octets.to_be_bytes()).await?;
        send.shutdown().await?;
        return content.read_from(&mut recv, octets).await;
    }
    send.write_all(b"U").await?;
    send.write_all(&octets.to_be_bytes()).await?;
    content.write_to(&mut send, octets).await?;
    send.shutdown().await?;
    let mut answer = Vec::new();
    recv.read_to_end(&mut answer).await?;
    ensure!(answer == b"ok", "the server did not get everything");
    Ok(())
}

async fn ask_often<S: Stack>(
    connection: S::Connection,
    content: Arc<Content>,
    count: u64,
) -> Result<()> {
    for _ in 0..count {
        let (mut send, mut recv) = S::open(&connection).await?;
        let mut question = [b'R'; QUESTION];
        question[1..9].copy_from_slice(&(ANSWER as u64).to_be_bytes());
        send.write_all(&question).await?;
        send.shutdown().await?;
        content.read_from(&mut recv, ANSWER as u64).await?;
    }
    Ok(())
}

async fn serve<S: Stack>(server: S::Endpoint, content: Arc<Content>) {
    while let Some(connection) = S::accept(&server).await {
        let content = Arc::clone(&content);
        tokio::spawn(async move {
            while let Ok((send, recv)) = S::accept_stream(&connection).await {
                tokio::spawn(answer(send, recv, Arc::clone(&content)));
            }
        });
    }
}

async fn answer(
    mut send: impl AsyncWrite + Unpin,
    mut recv: impl AsyncRead + Unpin,
    content: Arc<Content>,
) -> Result<()> {
    let mut head = [0; 9];
    recv.read_exact(&mut head).await?;
    let octets = u64::from_be_bytes(head[1..].try_into().expect("eight"));
    match head[0] {
        b'U' => {
            content.read_from(&mut recv, octets).await?;
            send.write_all(b"ok").await?;
        }
        b'R' => {
            let mut rest = [0; QUESTION];
            while recv.read(&mut rest).await? > 0 {}
            content.write_to(&mut send, octets).await?;
        }
        _ => content.write_to(&mut send, octets).await?,
    }
    Ok(send.shutdown().await?)
}

/// What is sent: the same octets again and again, so that comparing costs little.
struct Content(Vec<u8>);

impl Content {
    fn new() -> Self {
        let mut octets = pattern::octets(0, PERIOD);
        octets.extend_from_within(..PIECE);
        Self(octets)
    }

    fn at(&self, offset: u64) -> &[u8] {
        let offset = usize::try_from(offset % PERIOD as u64).expect("below the period");
        &self.0[offset..offset + PIECE]
    }

    async fn write_to(&self, send: &mut (impl AsyncWrite + Unpin), octets: u64) -> Result<()> {
        let mut done = 0;
        while done < octets {
            let len = usize::try_from(octets - done).map_or(PIECE, |left| left.min(PIECE));
            send.write_all(&self.at(done)[..len]).await?;
            done += len as u64;
        }
        Ok(())
    }

    async fn read_from(&self, recv: &mut (impl AsyncRead + Unpin), octets: u64) -> Result<()> {
        let mut piece = vec![0; if octets < PIECE as u64 { 2 * ANSWER } else { PIECE }];
        let mut done = 0;
        loop {
            let count = recv.read(&mut piece).await?;
            if count == 0 {
                ensure!(done == octets, "{done} bytes instead of {octets}");
                return Ok(());
            }
            ensure!(piece[..count] == self.at(done)[..count], "other content after {done}");
            done += count as u64;
        }
    }
}

/// What all threads of this process have had so far.
fn processor_time() -> Result<Duration> {
    let mut nanos = 0;
    for thread in std::fs::read_dir("/proc/self/task")? {
        let text = std::fs::read_to_string(thread?.path().join("schedstat"))?;
        let running = text.split_whitespace().next().context("schedstat is empty")?;
        nanos += running.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(nanos))
}
