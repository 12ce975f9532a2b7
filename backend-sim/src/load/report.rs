//! What was measured.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use hdrhistogram::Histogram;
use serde::Serialize;
use tracing::warn;

use super::locked;

/// The longest latency that is told from longer ones.
const MAX_LATENCY: Duration = Duration::from_secs(600);

/// What a load has come to. Counts by cause or name list only what has happened.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// How long requests were made.
    pub seconds: f64,
    /// Connections whose handshake was completed.
    pub connections: u64,
    /// How long handshakes took.
    pub handshakes: Latency,
    /// Completed handshakes in which something was not answered in time and said again: a server, or the way there, was not
    /// there or slow.
    pub handshakes_repeated: u64,
    /// Handshakes that failed, by cause.
    pub handshakes_failed: BTreeMap<&'static str, u64>,
    /// Requests whose answer was verified to the last octet.
    pub requests: u64,
    /// Other requests, by cause.
    pub requests_failed: BTreeMap<&'static str, u64>,
    /// Verified requests per second.
    pub requests_per_second: f64,
    /// Octets of verified bodies.
    pub bytes_verified: u64,
    /// The same per second.
    pub bytes_per_second: f64,
    /// From when a request was due to the end of its answer.
    pub latency: Latency,
    /// Changes of port with the same connection ID.
    pub rebinds: u64,
    /// Migrations with a fresh connection ID.
    pub migrations: u64,
    /// Connections that ended without being asked to.
    pub lost: u64,
    /// The same by cause.
    pub lost_by_cause: BTreeMap<&'static str, u64>,
    /// Connections that are there and have waited for anything from their server for more than a second.
    pub silent: u64,
    /// Answers from another backend than that of the connection's first answer.
    pub misrouted: u64,
    /// Verified requests by the backend that answered.
    pub backends: BTreeMap<String, u64>,
}

/// A distribution, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Latency {
    /// Half of all are below.
    pub p50_us: u64,
    /// Nine of ten.
    pub p90_us: u64,
    /// 99 of a hundred.
    pub p99_us: u64,
    /// 999 of a thousand.
    pub p999_us: u64,
    /// All.
    pub max_us: u64,
}

impl Report {
    /// Whether nothing went wrong: none lost, misrouted or failed, and something was done at all.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.requests > 0
            && self.lost == 0
            && self.misrouted == 0
            && self.handshakes_failed.is_empty()
            && self.requests_failed.is_empty()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let causes = |causes: &BTreeMap<&str, u64>| {
            if causes.is_empty() {
                return "0".to_owned();
            }
            let parts: Vec<_> =
                causes.iter().map(|(cause, count)| format!("{count} {cause}")).collect();
            parts.join(", ")
        };
        writeln!(f, "connections   {}, handshake {}", self.connections, self.handshakes)?;
        if self.handshakes_repeated > 0 {
            let repeated = self.handshakes_repeated;
            writeln!(f, "  repeated    {repeated} handshakes, as nobody had answered in time")?;
        }
        writeln!(f, "  failed      {}", causes(&self.handshakes_failed))?;
        writeln!(f, "  lost        {}", causes(&self.lost_by_cause))?;
        if self.silent > 0 {
            writeln!(f, "  silent      {}", self.silent)?;
        }
        writeln!(
            f,
            "requests      {} in {:.1} s, {:.0} per second",
            self.requests, self.seconds, self.requests_per_second
        )?;
        writeln!(f, "  failed      {}", causes(&self.requests_failed))?;
        writeln!(f, "  misrouted   {}", self.misrouted)?;
        writeln!(f, "  latency     {}", self.latency)?;
        writeln!(
            f,
            "bodies        {:.1} MB verified, {:.1} MB per second",
            self.bytes_verified as f64 / 1e6,
            self.bytes_per_second / 1e6
        )?;
        writeln!(f, "moves         {} rebinds, {} migrations", self.rebinds, self.migrations)?;
        let backends: Vec<_> =
            self.backends.iter().map(|(name, count)| format!("{name} {count}")).collect();
        write!(f, "backends      {}", backends.join(", "))
    }
}

impl fmt::Display for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { p50_us, p90_us, p99_us, p999_us, max_us } = self;
        let all = [("p50", p50_us), ("p90", p90_us), ("p99", p99_us), ("p99.9", p999_us)];
        for (name, microseconds) in all {
            write!(f, "{name} {:?}, ", Duration::from_micros(*microseconds))?;
        }
        write!(f, "max {:?}", Duration::from_micros(*max_us))
    }
}

/// Where connections put down what happens.
#[derive(Debug)]
pub(super) struct Tally {
    /// Connections that have not connected for the first time, nor failed to.
    missing: AtomicUsize,
    stopped: AtomicBool,
    figures: Mutex<Figures>,
}

#[derive(Debug)]
struct Figures {
    report: Report,
    handshakes: Histogram<u64>,
    latency: Histogram<u64>,
}

impl Tally {
    pub(super) fn new(connections: usize) -> Self {
        let figures =
            Figures { report: Report::default(), handshakes: histogram(), latency: histogram() };
        Self {
            missing: AtomicUsize::new(connections),
            stopped: AtomicBool::new(false),
            figures: Mutex::new(figures),
        }
    }

    /// Whether this was the last one that was missing.
    pub(super) fn on_first_attempt(&self) -> bool {
        self.missing.fetch_sub(1, Relaxed) == 1
    }

    pub(super) fn stop(&self) {
        self.stopped.store(true, Relaxed);
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Relaxed)
    }

    pub(super) fn on_handshake(&self, took: Duration, is_repeated: bool) {
        let mut figures = locked(&self.figures);
        figures.report.connections += 1;
        figures.report.handshakes_repeated += u64::from(is_repeated);
        figures.handshakes.saturating_record(microseconds(took));
    }

    pub(super) fn on_handshake_failed(&self, cause: &'static str) {
        *locked(&self.figures).report.handshakes_failed.entry(cause).or_default() += 1;
    }

    pub(super) fn on_answer(&self, took: Duration, octets: u64, backend: &str) {
        let mut figures = locked(&self.figures);
        figures.latency.saturating_record(microseconds(took));
        let report = &mut figures.report;
        report.requests += 1;
        report.bytes_verified += octets;
        match report.backends.get_mut(backend) {
            Some(count) => *count += 1,
            None => drop(report.backends.insert(backend.to_owned(), 1)),
        }
    }

    pub(super) fn on_request_failed(&self, cause: &'static str) {
        *locked(&self.figures).report.requests_failed.entry(cause).or_default() += 1;
    }

    pub(super) fn on_misrouted(&self) {
        locked(&self.figures).report.misrouted += 1;
    }

    pub(super) fn on_lost(&self, cause: &'static str) {
        let mut figures = locked(&self.figures);
        figures.report.lost += 1;
        let count = figures.report.lost_by_cause.entry(cause).or_default();
        *count += 1;
        if *count == 1 {
            warn!(cause, "connections are lost");
        }
    }

    pub(super) fn on_rebind(&self) {
        locked(&self.figures).report.rebinds += 1;
    }

    pub(super) fn on_migration(&self) {
        locked(&self.figures).report.migrations += 1;
    }

    pub(super) fn report(&self, elapsed: Duration) -> Report {
        let figures = locked(&self.figures);
        let seconds = elapsed.as_secs_f64();
        let per_second = |count: u64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        Report {
            seconds,
            handshakes: latency(&figures.handshakes),
            latency: latency(&figures.latency),
            requests_per_second: per_second(figures.report.requests),
            bytes_per_second: per_second(figures.report.bytes_verified),
            ..figures.report.clone()
        }
    }
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_max(microseconds(MAX_LATENCY), 3).expect("three digits are few enough")
}

fn microseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn latency(histogram: &Histogram<u64>) -> Latency {
    let at = |quantile| histogram.value_at_quantile(quantile);
    Latency {
        p50_us: at(0.5),
        p90_us: at(0.9),
        p99_us: at(0.99),
        p999_us: at(0.999),
        max_us: histogram.max(),
    }
}
