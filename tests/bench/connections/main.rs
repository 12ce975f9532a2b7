//! What the connection log costs: processor time of the balancer for each connection that begins and ends, without the log, with
//! one connection in a hundred in it, and with all of them.
//!
//! ```text
//! cargo bench -p quic-lb-tests --bench connections
//! cargo bench -p quic-lb-tests --bench connections -- --seconds 5 --rate 10000 --turns 5
//! ```
//!
//! A connection is a datagram from a client path of its own, an answer to it, and the end of its flow by time. Balancers take turns, a
//! fresh process each with one worker and a file in a temporary folder, and the best turn of each counts: what else
//! the machine does only ever adds. The ratio is that of connections a second that a core could carry; that of
//! workers, what they could where the log has a core to write on.
#![expect(
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "a program for people, on numbers of its own making"
)]

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use quic_lb_tests::{
    balancer::Balancer,
    document::{Document, Listener, Pool, free_address},
    site::LOCAL,
};

/// The log, by what it is called in the table.
const LOGS: [(&str, &str); 3] = [
    ("off", ""),
    ("one in a hundred", "log: { connections: { path: connections.json, sample: 0.01 } }\n"),
    ("all", "log: { connections: { path: connections.json } }\n"),
];
/// Ticks of the kernel in a second, as all systems have it that this runs on.
const TICKS: f64 = 100.0;
/// From one burst of new connections to the next.
const BURST_EVERY: Duration = Duration::from_millis(5);

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let option = |name: &str, default: u64| {
        let at = arguments.iter().position(|argument| argument == name);
        at.and_then(|at| arguments.get(at + 1)).map_or(Ok(default), |value| value.parse())
    };
    let (seconds, rate) = (option("--seconds", 10)?, option("--rate", 10_000)?);
    let turns = option("--turns", 3)?;
    let mut best = [None::<Turn>; LOGS.len()];
    for turn in 0..turns {
        for (best, (name, log)) in best.iter_mut().zip(LOGS) {
            let took = Turn::take(log, rate, seconds).await.context(name)?;
            println!("turn {turn}, {name}: {took:?}");
            let is_better = best.is_none_or(|best| took.cpu < best.cpu);
            *best = if is_better { Some(took) } else { *best };
        }
    }
    println!();
    println!(
        "| connection log | connections/s | CPU, µs/connection | worker alone | ratio | of workers | records | dropped |"
    );
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    let off = best[0].context("a turn")?;
    for (turn, (name, _)) in best.iter().zip(LOGS) {
        let Turn { connections, cpu, worker, records, dropped } = turn.context("a turn")?;
        println!(
            "| {name} | {:.0} | {:.2} | {:.2} | {:.3} | {:.3} | {records} | {dropped} |",
            connections as f64 / seconds as f64,
            cpu * 1e6,
            worker * 1e6,
            off.cpu / cpu,
            off.worker / worker,
        );
    }
    Ok(())
}

/// What one balancer did.
#[derive(Clone, Copy, Debug)]
struct Turn {
    connections: u64,
    /// Seconds of a processor for each, of the whole process.
    cpu: f64,
    /// Of its worker.
    worker: f64,
    records: u64,
    dropped: u64,
}

impl Turn {
    async fn take(log: &str, rate: u64, seconds: u64) -> Result<Self> {
        let echo = UdpSocket::bind((LOCAL, 0))?;
        let mut pool = Pool::new("web", &[], LOCAL, 1);
        pool.backends[0].address = echo.local_addr()?;
        let answered = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&answered);
        thread::spawn(move || {
            let mut octets = [0; 2_000];
            while let Ok((_, from)) = echo.recv_from(&mut octets) {
                // A long header with the connection ID of the client, as it is in all of these.
                let _ = echo.send_to(&[0xc0, 0, 0, 0, 1, 4, 1, 2, 3, 4, 4, 9, 9, 9, 9, 0], from);
                count.fetch_add(1, Relaxed);
            }
        });
        let address = free_address(LOCAL);
        let listener = Listener { name: "edge".into(), address, pool: "web".into() };
        let admin = free_address(LOCAL);
        let document = Document { listeners: vec![listener], pools: vec![pool], admin };
        let text = document.to_string();
        let text = text.replace("limits: { flows: 4000 }", "limits: { flows: 25000 }\nworkers: 1");
        let text = text.replace("drain: ", "flow_idle: \"1s\", flow_unanswered: \"1s\", drain: ");
        ensure!(text.contains("flows: 25000") && text.contains("flow_idle"), "{text}");
        let balancer = Balancer::start_from(&format!("{text}{log}"), admin).await?;
        let before = Used::of(&balancer)?;
        let connections =
            tokio::task::spawn_blocking(move || send(address, rate, seconds)).await??;
        // Until all have ended.
        balancer.wait_for("all flows end", |metrics| metrics.sum("flows", &[]) == 0).await?;
        let after = Used::of(&balancer)?;
        let metrics = balancer.metrics().await?;
        let begun = metrics.sum("datagrams_forwarded_total", &[]);
        ensure!(begun * 10 >= connections * 9, "{begun} of {connections} came through");
        let each = |seconds: f64| seconds / begun as f64;
        Ok(Self {
            connections: begun,
            cpu: each(after.process - before.process),
            worker: each(after.worker - before.worker),
            records: metrics.sum("connection_log_records_total", &[]),
            dropped: metrics.sum("connection_log_dropped_total", &[]),
        })
    }
}

/// Processor time so far.
struct Used {
    process: f64,
    worker: f64,
}

impl Used {
    fn of(balancer: &Balancer) -> Result<Self> {
        let process = format!("/proc/{}", balancer.process_id());
        for thread in std::fs::read_dir(format!("{process}/task"))? {
            let thread = thread?.path();
            if std::fs::read_to_string(thread.join("comm"))?.trim() == "worker-0" {
                let (process, worker) = (cpu(process.as_ref())?, cpu(&thread)?);
                return Ok(Self { process, worker });
            }
        }
        bail!("there is no worker")
    }
}

/// Processor time that a process or thread has had so far, in seconds.
fn cpu(of: &Path) -> Result<f64> {
    let stat = std::fs::read_to_string(of.join("stat"))?;
    let (_, rest) = stat.rsplit_once(')').context("a name")?;
    let fields: Vec<_> = rest.split_whitespace().collect();
    // utime and stime, as proc(5) numbers them.
    Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / TICKS)
}

/// Sends a first flight from so many client paths a second; says how many.
fn send(to: SocketAddr, rate: u64, seconds: u64) -> Result<u64> {
    let began = Instant::now();
    let mut sent = 0u64;
    while began.elapsed() < Duration::from_secs(seconds) {
        let due = u64::try_from(began.elapsed().as_micros())? * rate / 1_000_000;
        while sent < due {
            let [.., high, middle, low, port] = sent.to_be_bytes();
            // Its own address for each 256, and its own port within them.
            let from = Ipv4Addr::new(127, high.saturating_add(1), middle, low);
            let client = UdpSocket::bind((from, 20_000 + u16::from(port)))?;
            client.send_to(&initial(sent), to)?;
            sent += 1;
        }
        thread::sleep(BURST_EVERY);
    }
    Ok(sent)
}

fn initial(number: u64) -> Vec<u8> {
    let ids = [&[8][..], &number.to_be_bytes(), &[4, 1, 2, 3, 4]].concat();
    let mut datagram = [&[0xc0, 0, 0, 0, 1][..], &ids, &[0, 20]].concat();
    datagram.resize(1_200, 0);
    datagram
}
