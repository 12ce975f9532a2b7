//! What a decision costs: instructions of [`Forwarder::decide_batch`] per datagram, for each way
//! that a datagram can take.
//!
//! `cargo bench -p quic-lb-tests --bench decide` prints them. They are counted by valgrind, and
//! differ by a percent at most from run to run, since hash tables have seeds: comparing the same
//! rows of two builds says whether a change costs anything. Where valgrind is missing it says so.
#![expect(
    clippy::print_stdout,
    clippy::cast_possible_truncation,
    reason = "a program for people, on numbers of its own making"
)]

use std::{
    net::SocketAddr,
    process::Command,
    sync::Arc,
    time::{Instant, SystemTime},
};

use anyhow::{Context, Result, bail};
use quic::{routable::CidConfig, varint};
use quic_lb::{
    backend::BackendState,
    client_path::{ClientAddr, ClientPath, ListenerIndex},
    forwarder::{BATCH, Clock, Datagram, Forwarder, Start},
    memory::Memory,
    registry::Registry,
    routing::Routing,
    verdict::{DropReason, Rule, Verdict},
};
use quic_lb_config::{Config, Surroundings};

/// The only listener.
const LISTENER: ListenerIndex = ListenerIndex(0);
/// Batches per counted run; a run with none is subtracted.
const COUNTED: usize = 200;
/// Exchanges after which a flow is proved, and more.
const EXCHANGES: usize = 20;

const ROUTABLE: &str = "
      quic_lb:
        - { config_id: 0, server_id_length: 2, nonce_length: 6, key: '5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a' }
      backends:
        - { name: a, address: '127.0.0.1:5001', server_id: '0001' }
        - { name: b, address: '127.0.0.1:5002', server_id: '0002' }
";
const OTHERS: &str = "
      backends:
        - { name: a, address: '127.0.0.1:5001' }
        - { name: b, address: '127.0.0.1:5002' }
";
const RETRY: &str = "
retry:
  mode: always
  keys:
    - { sequence: 1, key: '00112233445566778899aabbccddeeff' }
";

/// A way that datagrams can take.
struct Case {
    name: &'static str,
    pool: &'static str,
    retry: bool,
    /// The number of client paths that a batch comes from.
    paths: usize,
    /// What one client path sends; what the batch before was answered with tells it apart.
    datagram: fn(&Bench, usize) -> Vec<u8>,
    /// Whether the servers go on answering, so that the flows are proved.
    answered: bool,
    /// What each decision has to be, lest another way be measured.
    expected: fn(&Verdict) -> bool,
}

const CASES: [Case; 8] = [
    Case {
        name: "routable connection ID, one flow",
        pool: ROUTABLE,
        retry: false,
        paths: 1,
        datagram: |bench, path| short(&bench.cids[path]),
        answered: true,
        expected: |verdict| by(verdict, Rule::Cid),
    },
    Case {
        name: "routable connection ID, 64 flows",
        pool: ROUTABLE,
        retry: false,
        paths: BATCH,
        datagram: |bench, path| short(&bench.cids[path]),
        answered: true,
        expected: |verdict| by(verdict, Rule::Cid),
    },
    Case {
        name: "routable connection ID, 64 flows without an answer",
        pool: ROUTABLE,
        retry: false,
        paths: BATCH,
        datagram: |bench, path| short(&bench.cids[path]),
        answered: false,
        expected: |verdict| by(verdict, Rule::Cid),
    },
    Case {
        name: "remembered handshake, 64 flows",
        pool: ROUTABLE,
        retry: false,
        paths: BATCH,
        datagram: |_, path| initial(path),
        answered: true,
        expected: |verdict| by(verdict, Rule::FourTupleScid),
    },
    Case {
        name: "learnt connection ID, 64 flows",
        pool: OTHERS,
        retry: false,
        paths: BATCH,
        datagram: |_, path| short(&learnt(path)),
        answered: true,
        expected: |verdict| by(verdict, Rule::Dcid),
    },
    Case {
        name: "remembered 4-tuple, 64 flows",
        pool: OTHERS,
        retry: false,
        paths: BATCH,
        datagram: |_, _| short(&[0xee; 12]),
        // An ID whose packets are answered is soon learnt.
        answered: false,
        expected: |verdict| by(verdict, Rule::FourTuple),
    },
    Case {
        name: "answered by a Retry",
        pool: ROUTABLE,
        retry: true,
        paths: BATCH,
        datagram: |_, path| initial(path),
        answered: true,
        expected: |verdict| matches!(verdict, Verdict::Reply(_)),
    },
    Case {
        name: "not QUIC",
        pool: ROUTABLE,
        retry: false,
        paths: BATCH,
        datagram: |_, _| vec![0xc0, 0, 0, 0, 1, 9],
        answered: true,
        expected: |verdict| *verdict == Verdict::Drop(DropReason::Malformed),
    },
];

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, flag, case, batches] = arguments.as_slice()
        && flag == "--count"
    {
        return Bench::new(&CASES[case.parse::<usize>()?])?.run(batches.parse()?);
    }
    println!("| a datagram with | instructions of its decision |");
    println!("| --- | ---: |");
    for (index, case) in CASES.iter().enumerate() {
        let Some(none) = instructions(index, 0)? else {
            println!("\nSKIPPED: valgrind is not installed or cannot run here");
            return Ok(());
        };
        let all = instructions(index, COUNTED)?.context("it just ran")?;
        println!("| {} | {:.0} |", case.name, (all - none) / (COUNTED * BATCH) as f64);
    }
    Ok(())
}

/// Instructions of this program for so many batches of a case; `None` without valgrind.
fn instructions(case: usize, batches: usize) -> Result<Option<f64>> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe()?)
        .args(["--count", &case.to_string(), &batches.to_string()])
        .output();
    let Ok(output) = output else { return Ok(None) };
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    if !output.status.success() {
        bail!("{text}");
    }
    let collected =
        text.split("Collected :").nth(1).and_then(|rest| rest.split_whitespace().next());
    Ok(collected.map(str::parse).transpose()?)
}

/// A forwarder, and a batch of datagrams that it has seen before.
struct Bench {
    forwarder: Forwarder,
    now: Instant,
    /// Connection IDs of backend `a` by client path, where there are routable ones.
    cids: Vec<Vec<u8>>,
    batch: Vec<(ClientPath, Vec<u8>)>,
    expected: fn(&Verdict) -> bool,
}

impl Bench {
    fn new(case: &Case) -> Result<Self> {
        let retry = if case.retry { RETRY } else { "" };
        let config = config(&format!(
            "listeners:\n  - {{ name: edge, address: '127.0.0.1:4433', pool: web }}\n\
             pools:\n    - honours_tokens: true\n      name: web{}{retry}",
            case.pool
        ))?;
        let now = Instant::now();
        let routing = Routing::new(&config, &mut Registry::default(), |_, _| BackendState::Active);
        let memory = Memory::new(10_000, now, [5; 4]);
        let start = Start { clock: Clock { now, unix: SystemTime::now() }, seed: [7; 32] };
        let forwarder = Forwarder::new(1_000, Arc::new(routing), Arc::new(memory), &start);
        let pool = &config.pools[0];
        let mut cids = Vec::new();
        for (path, config) in (0..case.paths).zip(pool.cid_configs.iter().cycle()) {
            cids.push(of_server(config, pool, path)?);
        }
        let batch = Vec::with_capacity(BATCH);
        let mut bench = Self { forwarder, now, cids, batch, expected: case.expected };
        for path in 0..case.paths {
            bench.acquaint(path)?;
        }
        let datagrams = (0..BATCH).map(|at| at % case.paths);
        let datagrams = datagrams.map(|at| (path(at), (case.datagram)(&bench, at))).collect();
        bench.batch = datagrams;
        let exchanges = if case.answered { EXCHANGES } else { 1 };
        for _ in 0..exchanges {
            bench.exchange(case.answered)?;
        }
        Ok(bench)
    }

    /// Has a client begin a connection on this path, and its server answer with an ID to learn.
    fn acquaint(&mut self, at: usize) -> Result<()> {
        let octets = initial(at);
        let mut verdict = [Verdict::Drop(DropReason::Empty)];
        let datagram = Datagram { path: path(at), octets: &octets };
        self.forwarder.decide_batch(self.now, LISTENER, &[datagram], &mut verdict);
        match verdict[0] {
            Verdict::Forward { via, .. } => {
                let flow = via.flow().context("the pool is behind a NAT")?;
                let _ = self.forwarder.returned(self.now, flow, &long(&scid(at), &learnt(at)));
                Ok(())
            }
            Verdict::Reply(_) => Ok(()),
            Verdict::Drop(reason) => bail!("a first flight was dropped: {reason:?}"),
        }
    }

    /// Has the batch decided, and the servers answer; the first one may open flows, what is counted does
    /// not.
    fn exchange(&mut self, answered: bool) -> Result<()> {
        let batch = self.batch.iter().map(|(path, octets)| Datagram { path: *path, octets });
        let batch: Vec<_> = batch.collect();
        let mut verdicts = [Verdict::Drop(DropReason::Empty); BATCH];
        self.forwarder.decide_batch(self.now, LISTENER, &batch, &mut verdicts);
        for verdict in &verdicts {
            if !(self.expected)(verdict) {
                bail!("another way was taken: {verdict:?}");
            }
            if let Verdict::Forward { via, .. } = verdict
                && let Some(flow) = via.flow()
                && answered
            {
                self.forwarder.returned_short(self.now, flow, &short(&[0; 8]), 1);
            }
        }
        Ok(())
    }

    fn run(&mut self, batches: usize) -> Result<()> {
        let batch = self.batch.iter().map(|(path, octets)| Datagram { path: *path, octets });
        let batch: Vec<_> = batch.collect();
        let mut verdicts = [Verdict::Drop(DropReason::Empty); BATCH];
        for _ in 0..batches {
            self.forwarder.decide_batch(self.now, LISTENER, &batch, &mut verdicts);
            std::hint::black_box(&verdicts);
        }
        Ok(())
    }
}

fn config(text: &str) -> Result<Config> {
    let surroundings = Surroundings::of_text("bench");
    match quic_lb_config::from_str(text, &surroundings) {
        Ok(loaded) => Ok(loaded.config),
        Err(report) => bail!("{report}"),
    }
}

fn of_server(cids: &CidConfig, pool: &quic_lb_config::Pool, path: usize) -> Result<Vec<u8>> {
    let (_, server_id) = pool.backends[0].server_ids.first().context("it has a server ID")?;
    Ok(cids.encode(server_id, &[9, 9, 9, 9, 9, path as u8])?.to_vec())
}

fn by(verdict: &Verdict, wanted: Rule) -> bool {
    matches!(verdict, Verdict::Forward { rule, .. } if *rule == wanted)
}

fn path(at: usize) -> ClientPath {
    let client = SocketAddr::from(([192, 0, 2, 1], 40_000 + at as u16));
    ClientPath { client: ClientAddr(client), local: None }
}

fn scid(at: usize) -> [u8; 8] {
    (at as u64 + 1).to_be_bytes()
}

/// A connection ID of no configuration, as a server without routable ones uses it.
fn learnt(at: usize) -> [u8; 12] {
    let mut cid = [0xff; 12];
    cid[11] = at as u8;
    cid
}

fn short(dcid: &[u8]) -> Vec<u8> {
    let mut octets = [&[0x40], dcid].concat();
    octets.resize(1200, 0);
    octets
}

fn long(dcid: &[u8], scid: &[u8]) -> Vec<u8> {
    let mut octets = vec![0xc0, 0, 0, 0, 1];
    for id in [dcid, scid] {
        octets.push(id.len() as u8);
        octets.extend_from_slice(id);
    }
    varint::write(0, &mut octets);
    octets.resize(1200, 0);
    octets
}

/// The first flight of this path: a connection ID that no server made, and no token.
fn initial(at: usize) -> Vec<u8> {
    long(&[[0xf0; 8], scid(at)].concat(), &scid(at))
}
