//! What `/metrics` shows: every family with its help text, and how one [`Reading`] of the counters becomes text.
//!
//! Labels are names from the configuration and words of this program; never anything that a client
//! can choose. Verdicts are read before arrivals, so that a scrape in the middle of traffic shows more
//! verdicts than datagrams by no more than a batch for each worker; at rest they are equal.

use std::{
    fmt::{self, Write as _},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::Duration,
};

use prometheus::{TextEncoder, core::Collector, process_collector::ProcessCollector};
use quic::routable::ConfigId;

use crate::{
    admission::{
        mode::{Phase, Reason},
        tokens::TokensMade,
    },
    backend::BackendState,
    check::{CheckCounts, CheckTimes},
    connection_log::queue::LogCounts,
    memory::Sizes,
    refusal::Refusal,
    totals::{BackendTotals, ListenerTotals, LiveTotals, Usage},
    verdict::{DropReason, ReplyKind, Rule, Standing, TokenResult},
};

const DATAGRAMS_RECEIVED: Family = Family::counter(
    "quic_lb_datagrams_received_total",
    &["listener"],
    "Datagrams from clients. Each ends in exactly one of forwarded, dropped and replied.",
);
const DATAGRAMS_FORWARDED: Family = Family::counter(
    "quic_lb_datagrams_forwarded_total",
    &["listener", "rule"],
    "Datagrams sent to backends, by the rule that found the backend.",
);
const DATAGRAMS_DROPPED: Family = Family::counter(
    "quic_lb_datagrams_dropped_total",
    &["listener", "reason"],
    "Datagrams from clients that were not sent to any backend.",
);
const DATAGRAMS_REPLIED: Family = Family::counter(
    "quic_lb_datagrams_replied_total",
    &["listener", "kind"],
    "Datagrams from clients that the balancer answered by itself and did not forward.",
);
const DATAGRAMS_RETURNED: Family = Family::counter(
    "quic_lb_datagrams_returned_total",
    &["listener"],
    "Datagrams from backends that were sent to clients.",
);
const RETURN_FAILED: Family = Family::counter(
    "quic_lb_return_failed_total",
    &["listener"],
    "Datagrams from backends that could not be sent to their clients.",
);
const BYTES: Family = Family::counter(
    "quic_lb_bytes_total",
    &["listener", "direction"],
    "UDP payload bytes: received from clients, returned to clients.",
);
const FLOWS: Family = Family::gauge(
    "quic_lb_flows",
    &["listener"],
    "Client paths bound to a backend; each holds a descriptor and an upstream port.",
);
const FLOW_LIMIT: Family =
    Family::gauge("quic_lb_flow_limit", &[], "Flows that all listeners together may have.");
const FLOWS_EVICTED: Family = Family::counter(
    "quic_lb_flows_evicted_total",
    &["listener", "standing"],
    "Flows that ended to make room for others: superseded ones, whose connections had gone to another \
     path; unproven ones, which may be forged; proven ones, the least recently used first.",
);
const FLOWS_UNPROVEN: Family = Family::gauge(
    "quic_lb_flows_unproven",
    &[],
    "Flows that have not shown that there is a client at their address. Many are a flood of forged \
     datagrams.",
);
const RETURN_STALE: Family = Family::counter(
    "quic_lb_return_stale_total",
    &["listener"],
    "Datagrams from backends, not sent, that were for a client who had the upstream port before.",
);
const PATH_CHANGES: Family = Family::counter(
    "quic_lb_path_changes_total",
    &["listener"],
    "Connection IDs of servers, routable or learnt, on a client path not seen with them: rebinding and \
     migration.",
);
const REMEMBERED: Family = Family::gauge(
    "quic_lb_remembered",
    &["table"],
    "Entries remembered by all workers together: handshakes in progress, and connection IDs of \
     servers without routable ones.",
);
const REMEMBERED_LIMIT: Family = Family::gauge(
    "quic_lb_remembered_limit",
    &["table"],
    "Entries that may be remembered; of a full table, new ones are refused. Handshakes whose clients \
     have not proved their address get half of theirs at most.",
);
const BACKEND_DATAGRAMS: Family = Family::counter(
    "quic_lb_backend_datagrams_total",
    &["pool", "backend"],
    "Datagrams sent to the backend.",
);
const BACKEND_RETURNED: Family = Family::counter(
    "quic_lb_backend_returned_datagrams_total",
    &["pool", "backend"],
    "Datagrams received from the backend.",
);
const LIVE_CIDS: Family = Family::gauge(
    "quic_lb_live_cids",
    &["pool", "backend", "config_id"],
    "Live connections of the backend, by the configuration of their connection IDs (\"none\" without one), as far as \
     traffic of the last five to ten seconds tells; of client paths with many connections, an estimate.",
);
const BACKEND_FLOWS: Family =
    Family::gauge("quic_lb_backend_flows", &["pool", "backend"], "Flows to the backend.");
const BACKEND_SILENT: Family = Family::gauge(
    "quic_lb_backend_silent_seconds",
    &["pool", "backend"],
    "For how long no connection of the backend was heard; absent while none ever was.",
);
const BACKEND_STATE: Family = Family::gauge(
    "quic_lb_backend_state",
    &["pool", "backend", "state"],
    "1 for the state that the backend is in, 0 for the others.",
);
const BACKEND_REFUSED: Family = Family::counter(
    "quic_lb_backend_refused_total",
    &["pool", "backend", "errno"],
    "What the kernel said instead of sending to the backend, or of what it had sent, by the name of \
     the error: ECONNREFUSED when nobody listens at the backend's address.",
);
const RETRY_SENT: Family = Family::counter(
    "quic_lb_retry_sent_total",
    &[],
    "Retry packets sent by the balancer: the datagrams that were answered, and some that were \
     forwarded all the same while address validation began.",
);
const RETRY_UNFINISHED: Family = Family::counter(
    "quic_lb_retry_unfinished_total",
    &[],
    "Flows that have begun with a valid token and come to nothing: within ten seconds their clients have used no \
     connection ID of a server. More than a few mean that servers refuse tokens.",
);
const RETRY_TOKENS: Family = Family::counter(
    "quic_lb_retry_tokens_total",
    &["result"],
    "Tokens of Initials looked at by the balancer: \"valid\", or why they were not.",
);
const RETRY_KEY_TOKENS: Family = Family::gauge(
    "quic_lb_retry_key_tokens",
    &["sequence"],
    "Tokens of the configured format that this process has made with the key. At the limit, if \
     there is one, the next key of the list takes over; balancers with the same keys add up.",
);
const RETRY_KEY_LIMIT: Family = Family::gauge(
    "quic_lb_retry_key_token_limit",
    &["sequence"],
    "Tokens that may be made with the key; absent where there is no limit, as in the format nat.",
);
const ATTEMPTS: Family = Family::counter(
    "quic_lb_connection_attempts_total",
    &["listener"],
    "Attempts to begin a connection, and short headers that nothing is known about: what adaptive \
     address validation goes by.",
);
const UNKNOWN_SERVER_ID: Family = Family::counter(
    "quic_lb_unknown_server_id_total",
    &["listener", "config_id"],
    "Short headers whose connection ID is of this configuration, and of no server or of a configuration \
     that is not there: after a server or a configuration was taken away, its connections that still lived.",
);
const RETRY_PHASE: Family = Family::gauge(
    "quic_lb_retry_phase",
    &["listener", "phase"],
    "1 for where address validation stands on the listener, 0 for the others.",
);
const RETRY_SWITCHES: Family = Family::counter(
    "quic_lb_retry_switches_total",
    &["listener", "reason"],
    "How often address validation began, and why.",
);
const BACKEND_MISNAMED: Family = Family::counter(
    "quic_lb_backend_misnamed_total",
    &["pool", "backend"],
    "Connections that the backend answered with a connection ID that leads to another backend.",
);
const BACKEND_MOVED: Family = Family::counter(
    "quic_lb_backend_refused_moved_total",
    &["pool", "backend"],
    "First flights that the backend refused, or had not answered when it went down, and that were sent to another one.",
);
const BACKEND_UNANSWERED: Family = Family::counter(
    "quic_lb_backend_unanswered_total",
    &["pool", "backend"],
    "First flights that the backend has left unanswered until their flows ended: those that somebody has made up, \
     and all of a server that does not answer.",
);
const RETRY_UNSUPPORTED: Family = Family::gauge(
    "quic_lb_retry_unsupported",
    &["pool", "backend"],
    "1 for backends that do not honour the tokens of Retries: clients of their pool are not asked for proof of their \
     address. Only for backends that are asked.",
);
const CLOCK_SKEW: Family = Family::gauge(
    "quic_lb_clock_skew_seconds",
    &["pool", "backend"],
    "By how much the clock of a backend is ahead of ours, to a second, as the tokens of Retries that it honours show. Only \
     for backends that are asked.",
);
const BACKEND_CHECKS: Family = Family::counter(
    "quic_lb_backend_checks_total",
    &["pool", "backend", "result"],
    "Active checks of the backend: \"answered\", or why they failed; of \"unsent\" the backend knows nothing.",
);
const CHECK_SECONDS: Family = Family::histogram(
    "quic_lb_backend_check_seconds",
    &["pool"],
    "How long active checks took that were passed.",
);
const POOL_PANIC: Family = Family::gauge(
    "quic_lb_pool_panic",
    &["pool"],
    "1 while so few backends of the pool pass their checks that these are ignored; 0 in other pools with checks.",
);
const BACKEND_HALF_OPEN: Family = Family::gauge(
    "quic_lb_backend_half_open",
    &["pool", "backend"],
    "Half-open connections that the backend has reported lately.",
);
const CONFIG_RELOADS: Family = Family::counter(
    "quic_lb_config_reloads_total",
    &["result"],
    "Changed configurations that were applied, or rejected as a whole; looks at the file that hung.",
);
const CONFIG_LAST_SUCCESSFUL: Family = Family::gauge(
    "quic_lb_config_last_reload_successful",
    &[],
    "1 if the configuration was in order when it was read last, at the start or since; 0 while an older one goes on.",
);
const CONFIG_LAST_RELOAD: Family = Family::gauge(
    "quic_lb_config_last_reload_timestamp_seconds",
    &[],
    "When the configuration was taken or refused last, since 1970.",
);
const CONFIG_INFO: Family = Family::gauge(
    "quic_lb_config_info",
    &["digest"],
    "Always 1. Balancers with the same digest make the same decision for the same packet; the digest has nothing that is their own.",
);
const BUILD_INFO: Family = Family::gauge(
    "quic_lb_build_info",
    &["version", "revision"],
    "Always 1. The revision is what QUIC_LB_REVISION was when the program was built.",
);
const RECEIVE_DROPPED: Family = Family::counter(
    "quic_lb_receive_dropped_total",
    &["listener", "worker"],
    "Datagrams from clients that the kernel had no room for in the worker's buffer of the listener. They are in no other counter.",
);
const WORKER_BATCHES: Family = Family::counter(
    "quic_lb_worker_batches_total",
    &["worker"],
    "How often the worker has received something from listeners, 64 messages at once at most: full batches mean that it has no time to spare.",
);
const WORKER_CPU: Family = Family::counter(
    "quic_lb_worker_cpu_seconds_total",
    &["worker"],
    "Time of a processor that the worker has had. One that has a second for each second carries all that it can.",
);
const OPEN_DESCRIPTORS: Family = Family::gauge(
    "quic_lb_open_descriptors",
    &["worker"],
    "Descriptors that the worker has open: one for each flow and listener, and a few. process_open_fds does not see them.",
);
const DESCRIPTOR_LIMIT: Family = Family::gauge(
    "quic_lb_descriptor_limit",
    &["worker"],
    "Descriptors that the worker may have open. Where it cannot have a table of its own, all workers together.",
);
const LOG_RECORDS: Family = Family::counter(
    "quic_lb_connection_log_records_total",
    &[],
    "Records of the connection log that were written: one where a connection begins, one where it ends.",
);
const LOG_DROPPED: Family = Family::counter(
    "quic_lb_connection_log_dropped_total",
    &["reason"],
    "Records of the connection log that were not written: what takes them is too slow (queue), or does not take them (write).",
);
const READY: Family = Family::gauge(
    "quic_lb_ready",
    &[],
    "1 while /readyz says yes; 0 when a worker has ended or stands still, or the process drains.",
);
const WORKERS: Family = Family::gauge("quic_lb_workers", &[], "Worker threads.");
const WORKERS_STUCK: Family = Family::gauge(
    "quic_lb_workers_stuck",
    &[],
    "Workers that have made no progress for six seconds.",
);
const WORKER_PANICS: Family = Family::counter(
    "quic_lb_worker_panics_total",
    &["worker"],
    "How often the worker has panicked, lost its flows and begun anew. Each is a mistake of this program.",
);

/// Every family of this program, in the order of a datagram's life.
pub const FAMILIES: [Family; 56] = [
    DATAGRAMS_RECEIVED,
    RECEIVE_DROPPED,
    DATAGRAMS_FORWARDED,
    DATAGRAMS_DROPPED,
    DATAGRAMS_REPLIED,
    DATAGRAMS_RETURNED,
    RETURN_FAILED,
    RETURN_STALE,
    BYTES,
    ATTEMPTS,
    UNKNOWN_SERVER_ID,
    FLOWS,
    FLOW_LIMIT,
    FLOWS_UNPROVEN,
    FLOWS_EVICTED,
    PATH_CHANGES,
    REMEMBERED,
    REMEMBERED_LIMIT,
    BACKEND_DATAGRAMS,
    BACKEND_RETURNED,
    BACKEND_STATE,
    LIVE_CIDS,
    BACKEND_FLOWS,
    BACKEND_SILENT,
    BACKEND_REFUSED,
    BACKEND_MISNAMED,
    BACKEND_UNANSWERED,
    BACKEND_MOVED,
    RETRY_UNSUPPORTED,
    CLOCK_SKEW,
    BACKEND_HALF_OPEN,
    BACKEND_CHECKS,
    CHECK_SECONDS,
    POOL_PANIC,
    RETRY_SENT,
    RETRY_TOKENS,
    RETRY_UNFINISHED,
    RETRY_KEY_TOKENS,
    RETRY_KEY_LIMIT,
    RETRY_PHASE,
    RETRY_SWITCHES,
    CONFIG_RELOADS,
    CONFIG_LAST_SUCCESSFUL,
    CONFIG_LAST_RELOAD,
    CONFIG_INFO,
    BUILD_INFO,
    LOG_RECORDS,
    LOG_DROPPED,
    READY,
    WORKERS,
    WORKER_BATCHES,
    WORKER_CPU,
    OPEN_DESCRIPTORS,
    DESCRIPTOR_LIMIT,
    WORKERS_STUCK,
    WORKER_PANICS,
];

/// What is told about one metric name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Family {
    /// The name, with the prefix of this program.
    pub name: &'static str,
    /// Whether it can go down.
    pub kind: Kind,
    /// The names of its labels.
    pub labels: &'static [&'static str],
    /// What it counts.
    pub help: &'static str,
}

/// How a family behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Goes up, and starts at 0 with the process.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts durations by bounds.
    Histogram,
}

/// Everything that is exported, read at one moment.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// In the order of the configuration.
    pub listeners: Vec<ListenerReading>,
    /// All of them together, and those that are gone, whose counts must not go back.
    pub all_listeners: ListenerTotals,
    /// Those of which the backends are checked.
    pub pools: Vec<PoolReading>,
    /// Those of the current configuration.
    pub backends: Vec<BackendReading>,
    /// What all workers remember together.
    pub remembered: Sizes,
    /// How much of it there may be.
    pub remembered_limits: Sizes,
    /// Flows that all workers together may have.
    pub flow_limit: usize,
    /// Flows that have not shown that there is a client at their address.
    pub unproven_flows: u64,
    /// Flows that have begun with a valid token and come to nothing.
    pub unfinished_flows: u64,
    /// Worker threads.
    pub workers: usize,
    /// How often each of them has panicked.
    pub panics: Vec<u64>,
    /// What each of them does, and what that takes.
    pub usage: Vec<Usage>,
    /// How many of them stand still.
    pub stuck: usize,
    /// What /readyz says.
    pub ready: bool,
    /// Tokens made with each key.
    pub tokens_made: Vec<TokensMade>,
    /// Reloads so far.
    pub reloads: Reloads,
    /// The digest of the configuration.
    pub digest: String,
    /// What has become of records of connections.
    pub connection_log: LogCounts,
}

/// One listener.
#[derive(Clone, Debug)]
pub struct ListenerReading {
    /// The label.
    pub name: String,
    /// The sums over all workers.
    pub totals: ListenerTotals,
    /// Where address validation stands: a label of [`Phase`].
    pub phase: &'static str,
    /// How often it began, by reason.
    pub switches: [u64; Reason::ALL.len()],
    /// What the kernel had no room for, by worker.
    pub receive_dropped: Vec<u64>,
}

/// One pool of which the backends are checked.
#[derive(Clone, Debug)]
pub struct PoolReading {
    /// The label.
    pub name: String,
    /// Whether checks are ignored, because too few backends would be left.
    pub panic: bool,
    /// How long passed checks took.
    pub times: CheckTimes,
}

/// One backend.
#[derive(Clone, Debug)]
pub struct BackendReading {
    /// The label.
    pub pool: String,
    /// The label.
    pub name: String,
    /// Whether it gets new connections.
    pub state: BackendState,
    /// The sums over all workers since the backend has been known.
    pub totals: BackendTotals,
    /// Half-open connections, if it has reported any lately.
    pub half_open: Option<u64>,
    /// Whether it is known not to honour the tokens of Retries, if it is asked.
    pub retry_unsupported: Option<bool>,
    /// By how many seconds its clock is ahead, if that is known.
    pub clock_skew: Option<i64>,
    /// Its live connections.
    pub live: LiveTotals,
    /// For how long none of them was heard, if any ever was.
    pub silent: Option<Duration>,
    /// The configurations that its connection IDs may have.
    pub config_ids: Vec<ConfigId>,
    /// How its active checks went, if there are any.
    pub checks: Option<CheckCounts>,
}

/// How reloads went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Reloads {
    /// Became the running configuration.
    pub applied: u64,
    /// Changed nothing.
    pub rejected: u64,
    /// Looks at the file that had no end, or that such a one was in the way of.
    pub hung: u64,
    /// Those that took back what had been rejected, so that nothing had to change; in `applied` when they are read.
    pub corrected: u64,
    /// When the last one ended, since 1970, and whether well.
    pub last: Option<(Duration, bool)>,
}

impl Reloads {
    /// The values of the label `result`.
    pub const RESULTS: [&str; 3] = ["applied", "rejected", "hung"];
}

/// What `/metrics` shows.
pub struct Metrics {
    read: Box<dyn Fn() -> Reading + Send + Sync>,
    process: ProcessCollector,
    /// As long as the last page, and some.
    room: AtomicUsize,
}

impl Metrics {
    /// Exports what `read` returns, and facts about this process.
    #[must_use]
    pub fn new(read: impl Fn() -> Reading + Send + Sync + 'static) -> Self {
        let process = ProcessCollector::for_self();
        Self { read: Box::new(read), process, room: AtomicUsize::new(1 << 14) }
    }

    /// The text format of Prometheus, written anew from one reading for each scrape, so that backends and digests of former
    /// configurations leave nothing behind.
    #[must_use]
    pub fn render(&self) -> String {
        let reading = (self.read)();
        let mut out = String::with_capacity(self.room.load(Relaxed));
        of_listeners(&mut out, &reading);
        of_backends(&mut out, &reading);
        of_the_process(&mut out, &reading);
        // It fails for families without samples alone.
        let _ = TextEncoder::new().encode_utf8(&self.process.collect(), &mut out);
        self.room.store(out.len() + out.len() / 8, Relaxed);
        out
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Family {
    const fn counter(
        name: &'static str,
        labels: &'static [&'static str],
        help: &'static str,
    ) -> Self {
        Self { name, kind: Kind::Counter, labels, help }
    }

    const fn gauge(
        name: &'static str,
        labels: &'static [&'static str],
        help: &'static str,
    ) -> Self {
        Self { name, kind: Kind::Gauge, labels, help }
    }

    const fn histogram(
        name: &'static str,
        labels: &'static [&'static str],
        help: &'static str,
    ) -> Self {
        Self { name, kind: Kind::Histogram, labels, help }
    }

    /// Writes the family with these samples: values of the labels, value. Without any, there is no family.
    fn write<'a, const LABELS: usize>(
        &self,
        out: &mut String,
        samples: impl IntoIterator<Item = ([&'a str; LABELS], u64)>,
    ) {
        debug_assert_eq!(self.labels.len(), LABELS, "{}", self.name);
        let mut any = false;
        for (values, value) in samples {
            if !any {
                self.write_head(out);
                any = true;
            }
            out.push_str(self.name);
            self.write_labels(out, &values, None);
            write_number(out, value);
        }
    }

    /// As [`Self::write`], of numbers that may be below zero.
    fn write_signed<'a, const LABELS: usize>(
        &self,
        out: &mut String,
        samples: impl IntoIterator<Item = ([&'a str; LABELS], i64)>,
    ) {
        for (nth, (values, value)) in samples.into_iter().enumerate() {
            if nth == 0 {
                self.write_head(out);
            }
            out.push_str(self.name);
            self.write_labels(out, &values, None);
            let _ = writeln!(out, " {value}");
        }
    }

    /// As [`Self::write`], of durations.
    fn write_seconds<'a, const LABELS: usize>(
        &self,
        out: &mut String,
        samples: impl IntoIterator<Item = ([&'a str; LABELS], Duration)>,
    ) {
        for (nth, (values, time)) in samples.into_iter().enumerate() {
            if nth == 0 {
                self.write_head(out);
            }
            out.push_str(self.name);
            self.write_labels(out, &values, None);
            let _ = writeln!(out, " {}", time.as_secs_f64());
        }
    }

    /// Writes the family with one histogram for each value of its label.
    fn write_times<'a>(
        &self,
        out: &mut String,
        samples: impl IntoIterator<Item = (&'a str, &'a CheckTimes)>,
    ) {
        for (nth, (value, times)) in samples.into_iter().enumerate() {
            if nth == 0 {
                self.write_head(out);
            }
            let (count, sum) = times.total();
            let bounds = times.cumulative().map(|(bound, n)| (bound.as_secs_f64().to_string(), n));
            for (bound, below) in bounds.chain([("+Inf".to_owned(), count)]) {
                let _ = write!(out, "{}_bucket", self.name);
                self.write_labels(out, &[value], Some(&bound));
                write_number(out, below);
            }
            let _ = write!(out, "{}_sum", self.name);
            self.write_labels(out, &[value], None);
            let _ = writeln!(out, " {}", sum.as_secs_f64());
            let _ = write!(out, "{}_count", self.name);
            self.write_labels(out, &[value], None);
            write_number(out, count);
        }
    }

    fn write_head(&self, out: &mut String) {
        let Self { name, kind, help, .. } = self;
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        // Writing to a string cannot fail, here as elsewhere.
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// Labels by ascending name, as everybody writes them; the bound of a bucket comes last.
    fn write_labels(&self, out: &mut String, values: &[&str], bound: Option<&str>) {
        let mut separator = '{';
        let mut last = "";
        for _ in self.labels {
            let labels = self.labels.iter().zip(values).filter(|(name, _)| **name > last);
            let Some((name, value)) = labels.min_by_key(|(name, _)| **name) else { break };
            last = name;
            out.push(separator);
            separator = ',';
            out.push_str(name);
            out.push_str("=\"");
            write_escaped(out, value);
            out.push('"');
        }
        if let Some(bound) = bound {
            let _ = write!(out, "{separator}le=\"{bound}\"");
            separator = ',';
        }
        if separator == ',' {
            out.push('}');
        }
    }
}

/// Names come from the configuration, and may have anything in them.
fn write_escaped(out: &mut String, value: &str) {
    if !value.contains(['\\', '"', '\n']) {
        return out.push_str(value);
    }
    for letter in value.chars() {
        match letter {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            other => out.push(other),
        }
    }
}

fn write_number(out: &mut String, number: u64) {
    let _ = writeln!(out, " {number}");
}

fn of_listeners(out: &mut String, reading: &Reading) {
    let each = |value: fn(&ListenerTotals) -> u64| {
        reading.listeners.iter().map(move |of| ([of.name.as_str()], value(&of.totals)))
    };
    let forwarded = reading.listeners.iter().flat_map(|of| {
        let rules = Rule::ALL.iter().zip(of.totals.forwarded);
        rules.map(|(rule, value)| ([of.name.as_str(), rule.label()], value))
    });
    let evicted = reading.listeners.iter().flat_map(|of| {
        let standings = Standing::ALL.iter().zip(of.totals.evicted);
        standings.map(|(standing, value)| ([of.name.as_str(), standing.label()], value))
    });
    let dropped = reading.listeners.iter().flat_map(|of| {
        let reasons = DropReason::ALL.iter().zip(of.totals.dropped);
        reasons.map(|(reason, value)| ([of.name.as_str(), reason.label()], value))
    });
    let bytes = reading.listeners.iter().flat_map(|of| {
        [("received", of.totals.received_bytes), ("returned", of.totals.returned_bytes)]
            .map(|(direction, value)| ([of.name.as_str(), direction], value))
    });
    let replied = reading.listeners.iter().flat_map(|of| {
        let kinds = ReplyKind::ALL.iter().zip(of.totals.replied);
        kinds.map(|(kind, value)| ([of.name.as_str(), kind.label()], value))
    });
    let phases = reading.listeners.iter().flat_map(|of| {
        Phase::LABELS.map(|phase| ([of.name.as_str(), phase], u64::from(phase == of.phase)))
    });
    let labels: Vec<_> = (0..ConfigId::COUNT).map(|id| id.to_string()).collect();
    let unknown = reading.listeners.iter().flat_map(|of| {
        let counts = labels.iter().zip(of.totals.unknown_server_ids);
        counts.map(|(id, value)| ([of.name.as_str(), id.as_str()], value))
    });
    let switches = reading.listeners.iter().flat_map(|of| {
        let reasons = Reason::ALL.iter().zip(of.switches);
        reasons.map(|(reason, value)| ([of.name.as_str(), reason.label()], value))
    });
    DATAGRAMS_RECEIVED.write(out, each(|totals| totals.received));
    let workers = reading.listeners.iter().map(|of| of.receive_dropped.len()).max().unwrap_or(0);
    let workers: Vec<_> = (0..workers).map(|worker| worker.to_string()).collect();
    let overflowed = reading.listeners.iter().flat_map(|of| {
        let of_workers = workers.iter().zip(&of.receive_dropped);
        of_workers.map(|(worker, dropped)| ([of.name.as_str(), worker.as_str()], *dropped))
    });
    RECEIVE_DROPPED.write(out, overflowed);
    DATAGRAMS_FORWARDED.write(out, forwarded);
    DATAGRAMS_DROPPED.write(out, dropped);
    DATAGRAMS_REPLIED.write(out, replied);
    DATAGRAMS_RETURNED.write(out, each(|totals| totals.returned));
    RETURN_FAILED.write(out, each(|totals| totals.return_failed));
    BYTES.write(out, bytes);
    ATTEMPTS.write(out, each(|totals| totals.attempts));
    UNKNOWN_SERVER_ID.write(out, unknown);
    FLOWS.write(out, each(|totals| totals.flows));
    RETURN_STALE.write(out, each(|totals| totals.return_stale));
    FLOWS_EVICTED.write(out, evicted);
    PATH_CHANGES.write(out, each(|totals| totals.path_changes));
    RETRY_PHASE.write(out, phases);
    RETRY_SWITCHES.write(out, switches);
}

fn of_backends(out: &mut String, reading: &Reading) {
    let each = |value: fn(&BackendTotals) -> u64| {
        reading
            .backends
            .iter()
            .map(move |of| ([of.pool.as_str(), of.name.as_str()], value(&of.totals)))
    };
    let states = reading.backends.iter().flat_map(|of| {
        BackendState::ALL.map(|state| {
            ([of.pool.as_str(), of.name.as_str(), state.label()], u64::from(state == of.state))
        })
    });
    // Most never happen; the first one always has a sample, so that there is one to begin with.
    let refused = reading.backends.iter().flat_map(|of| {
        let (pool, name) = (of.pool.as_str(), of.name.as_str());
        let first = Refusal::ALL[0];
        let seen = of.totals.refused.iter().any(|(refusal, _)| refusal == first);
        let none = (!seen).then_some(([pool, name, first.label()], 0));
        let others = of.totals.refused.iter();
        none.into_iter().chain(others.map(move |(refusal, n)| ([pool, name, refusal.label()], n)))
    });
    let labels: Vec<String> = (0..ConfigId::COUNT).map(|id| id.to_string()).collect();
    let live = reading.backends.iter().flat_map(|of| {
        let (pool, name) = (of.pool.as_str(), of.name.as_str());
        let label = |index: usize| labels.get(index).map_or("none", String::as_str);
        let of_config = of.live.by_config.iter().enumerate();
        let shown = of_config.filter(|(index, of_config)| {
            of_config.connections > 0
                || of.config_ids.iter().any(|id| usize::from(id.get()) == *index)
        });
        let shown = shown.map(|(index, of_config)| (index, of_config.connections));
        // One sample at least, so that there is one to begin with.
        let none = of.config_ids.is_empty() && of.live.by_config[labels.len()].connections == 0;
        let shown = shown.chain(none.then_some((labels.len(), 0))).collect::<Vec<_>>();
        shown.into_iter().map(move |(index, n)| ([pool, name, label(index)], n)).collect::<Vec<_>>()
    });
    let flows =
        reading.backends.iter().map(|of| ([of.pool.as_str(), of.name.as_str()], of.live.flows));
    let silent = reading
        .backends
        .iter()
        .filter_map(|of| Some(([of.pool.as_str(), of.name.as_str()], of.silent?.as_secs())));
    let half_open = reading.backends.iter();
    let half_open =
        half_open.filter_map(|of| Some(([of.pool.as_str(), of.name.as_str()], of.half_open?)));
    // As with refusals.
    let unsupported = reading.backends.iter().filter_map(|of| {
        Some(([of.pool.as_str(), of.name.as_str()], u64::from(of.retry_unsupported?)))
    });
    let skews = reading.backends.iter();
    let skews = skews.filter_map(|of| Some(([of.pool.as_str(), of.name.as_str()], of.clock_skew?)));
    let checks = reading.backends.iter().flat_map(|of| {
        let counts = of.checks.into_iter().flat_map(CheckCounts::iter).enumerate();
        let seen = counts.filter(|(nth, (_, n))| *nth == 0 || *n > 0);
        seen.map(|(_, (result, n))| ([of.pool.as_str(), of.name.as_str(), result.label()], n))
    });
    let panics = reading.pools.iter().map(|of| ([of.name.as_str()], u64::from(of.panic)));
    BACKEND_DATAGRAMS.write(out, each(|totals| totals.forwarded));
    BACKEND_RETURNED.write(out, each(|totals| totals.returned));
    BACKEND_STATE.write(out, states);
    LIVE_CIDS.write(out, live);
    BACKEND_FLOWS.write(out, flows);
    BACKEND_SILENT.write(out, silent);
    BACKEND_REFUSED.write(out, refused);
    BACKEND_MISNAMED.write(out, each(|totals| totals.misnamed));
    BACKEND_UNANSWERED.write(out, each(|totals| totals.unanswered));
    BACKEND_MOVED.write(out, each(|totals| totals.moved));
    BACKEND_HALF_OPEN.write(out, half_open);
    RETRY_UNSUPPORTED.write(out, unsupported);
    CLOCK_SKEW.write_signed(out, skews);
    BACKEND_CHECKS.write(out, checks);
    CHECK_SECONDS.write_times(out, reading.pools.iter().map(|of| (of.name.as_str(), &of.times)));
    POOL_PANIC.write(out, panics);
}

fn of_the_process(out: &mut String, reading: &Reading) {
    let by_table = |Sizes { handshakes, connections, connection_ids }| {
        [
            (["handshakes"], handshakes as u64),
            (["connections"], connections as u64),
            (["connection_ids"], connection_ids as u64),
        ]
    };
    let Reloads { applied, rejected, hung, corrected: _, last } = reading.reloads;
    let reloads = Reloads::RESULTS.into_iter().zip([applied, rejected, hung]);
    let ListenerTotals { retries, tokens, .. } = reading.all_listeners;
    let keys = reading.tokens_made.iter();
    let keys: Vec<_> = keys.map(|key| (key.sequence.to_string(), key)).collect();
    let made = keys.iter().map(|(sequence, key)| ([sequence.as_str()], key.made));
    let limits = keys.iter().filter_map(|(sequence, key)| Some(([sequence.as_str()], key.limit?)));
    let panics = reading.panics.iter().enumerate();
    let panics: Vec<_> = panics.map(|(worker, &count)| (worker.to_string(), count)).collect();
    FLOW_LIMIT.write(out, [([], reading.flow_limit as u64)]);
    FLOWS_UNPROVEN.write(out, [([], reading.unproven_flows)]);
    REMEMBERED.write(out, by_table(reading.remembered));
    REMEMBERED_LIMIT.write(out, by_table(reading.remembered_limits));
    RETRY_SENT.write(out, [([], retries)]);
    RETRY_UNFINISHED.write(out, [([], reading.unfinished_flows)]);
    RETRY_TOKENS
        .write(out, TokenResult::ALL.map(|result| ([result.label()], tokens[result as usize])));
    RETRY_KEY_TOKENS.write(out, made);
    RETRY_KEY_LIMIT.write(out, limits);
    CONFIG_RELOADS.write(out, reloads.map(|(result, count)| ([result], count)));
    let ended_well = last.is_none_or(|(_, ended_well)| ended_well);
    CONFIG_LAST_SUCCESSFUL.write(out, [([], u64::from(ended_well))]);
    CONFIG_LAST_RELOAD.write(out, last.iter().map(|(time, _)| ([], time.as_secs())));
    CONFIG_INFO.write(out, [([reading.digest.as_str()], 1)]);
    let revision = option_env!("QUIC_LB_REVISION").unwrap_or("unknown");
    BUILD_INFO.write(out, [([env!("CARGO_PKG_VERSION"), revision], 1)]);
    let LogCounts { written, queue_full, unwritten } = reading.connection_log;
    LOG_RECORDS.write(out, [([], written)]);
    LOG_DROPPED.write(out, [(["queue"], queue_full), (["write"], unwritten)]);
    let workers: Vec<_> = (0..reading.usage.len()).map(|worker| worker.to_string()).collect();
    let usage = || workers.iter().map(String::as_str).zip(&reading.usage);
    WORKER_BATCHES.write(out, usage().map(|(worker, of)| ([worker], of.batches)));
    WORKER_CPU.write_seconds(out, usage().map(|(worker, of)| ([worker], of.cpu)));
    OPEN_DESCRIPTORS.write(out, usage().map(|(worker, of)| ([worker], of.descriptors)));
    DESCRIPTOR_LIMIT.write(out, usage().map(|(worker, of)| ([worker], of.descriptor_limit)));
    READY.write(out, [([], u64::from(reading.ready))]);
    WORKERS.write(out, [([], reading.workers as u64)]);
    WORKERS_STUCK.write(out, [([], reading.stuck as u64)]);
    WORKER_PANICS.write(out, panics.iter().map(|(worker, count)| ([worker.as_str()], *count)));
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, time::Duration};

    use super::*;
    use crate::{check::CheckResult, refusal::Refusals};

    #[test]
    fn every_declared_family_is_exported_and_no_other() {
        let text = Metrics::new(reading).render();
        let ours = text.lines().filter_map(|line| line.strip_prefix("# HELP quic_lb_"));
        let exported: BTreeSet<_> = ours.filter_map(|line| line.split(' ').next()).collect();
        let declared: BTreeSet<_> =
            FAMILIES.iter().map(|family| family.name.strip_prefix("quic_lb_").unwrap()).collect();
        assert_eq!(exported, declared);
        assert!(text.contains("process_resident_memory_bytes"));
    }

    #[test]
    fn samples_carry_the_labels_of_the_contract() {
        let text = Metrics::new(reading).render();
        for line in [
            "quic_lb_datagrams_received_total{listener=\"edge\"} 12",
            "quic_lb_datagrams_forwarded_total{listener=\"edge\",rule=\"four_tuple_scid\"} 7",
            "quic_lb_datagrams_dropped_total{listener=\"edge\",reason=\"flow_limit\"} 5",
            "quic_lb_bytes_total{direction=\"returned\",listener=\"edge\"} 99",
            "quic_lb_backend_datagrams_total{backend=\"a\",pool=\"web\"} 7",
            "quic_lb_backend_state{backend=\"a\",pool=\"web\",state=\"down\"} 1",
            "quic_lb_backend_state{backend=\"a\",pool=\"web\",state=\"active\"} 0",
            "quic_lb_backend_refused_total{backend=\"a\",errno=\"EPERM\",pool=\"web\"} 3",
            "quic_lb_backend_refused_total{backend=\"a\",errno=\"ECONNREFUSED\",pool=\"web\"} 0",
            "quic_lb_connection_log_records_total 70",
            "quic_lb_connection_log_dropped_total{reason=\"queue\"} 8",
            "quic_lb_connection_log_dropped_total{reason=\"write\"} 9",
            "quic_lb_config_reloads_total{result=\"rejected\"} 2",
            "quic_lb_config_reloads_total{result=\"hung\"} 3",
            "quic_lb_config_last_reload_successful 0",
            "quic_lb_config_last_reload_timestamp_seconds 5",
            "quic_lb_config_info{digest=\"0123\"} 1",
            "quic_lb_datagrams_replied_total{kind=\"retry\",listener=\"edge\"} 6",
            "quic_lb_retry_sent_total 8",
            "quic_lb_retry_tokens_total{result=\"expired\"} 2",
            "quic_lb_retry_key_tokens{sequence=\"3\"} 77",
            "quic_lb_retry_key_token_limit{sequence=\"3\"} 99",
            "quic_lb_retry_key_tokens{sequence=\"4\"} 100",
            "quic_lb_retry_phase{listener=\"edge\",phase=\"active\"} 1",
            "quic_lb_retry_phase{listener=\"edge\",phase=\"inactive\"} 0",
            "quic_lb_retry_switches_total{listener=\"edge\",reason=\"rate\"} 4",
            "quic_lb_backend_misnamed_total{backend=\"a\",pool=\"web\"} 4",
            "quic_lb_backend_unanswered_total{backend=\"a\",pool=\"web\"} 5",
            "quic_lb_backend_refused_moved_total{backend=\"a\",pool=\"web\"} 6",
            "quic_lb_backend_state{backend=\"a\",pool=\"web\",state=\"miswired\"} 0",
            "quic_lb_live_cids{backend=\"a\",config_id=\"1\",pool=\"web\"} 0",
            "quic_lb_live_cids{backend=\"a\",config_id=\"2\",pool=\"web\"} 5",
            "quic_lb_backend_flows{backend=\"a\",pool=\"web\"} 6",
            "quic_lb_backend_silent_seconds{backend=\"a\",pool=\"web\"} 4",
            "quic_lb_backend_half_open{backend=\"a\",pool=\"web\"} 12",
            "quic_lb_retry_unsupported{backend=\"a\",pool=\"web\"} 1",
            "quic_lb_clock_skew_seconds{backend=\"a\",pool=\"web\"} -3",
            "quic_lb_backend_checks_total{backend=\"a\",pool=\"web\",result=\"answered\"} 0",
            "quic_lb_backend_checks_total{backend=\"a\",pool=\"web\",result=\"timeout\"} 1",
            "quic_lb_backend_check_seconds_bucket{pool=\"web\",le=\"0.02\"} 0",
            "quic_lb_backend_check_seconds_bucket{pool=\"web\",le=\"0.05\"} 1",
            "quic_lb_backend_check_seconds_bucket{pool=\"web\",le=\"+Inf\"} 1",
            "quic_lb_backend_check_seconds_sum{pool=\"web\"} 0.03",
            "quic_lb_backend_check_seconds_count{pool=\"web\"} 1",
            "quic_lb_pool_panic{pool=\"web\"} 1",
            "quic_lb_remembered{table=\"connection_ids\"} 9",
            "quic_lb_workers_stuck 1",
            "quic_lb_worker_panics_total{worker=\"1\"} 2",
            "quic_lb_receive_dropped_total{listener=\"edge\",worker=\"1\"} 31",
            "quic_lb_worker_batches_total{worker=\"1\"} 5",
            "quic_lb_worker_cpu_seconds_total{worker=\"1\"} 1.5",
            "quic_lb_open_descriptors{worker=\"1\"} 70",
            "quic_lb_descriptor_limit{worker=\"1\"} 1024",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
        }
        assert!(!text.contains("quic_lb_retry_key_token_limit{sequence=\"4\"}"), "no limit");
    }

    /// Of two samples of one series Prometheus keeps the first.
    #[test]
    fn no_series_has_two_samples() {
        let read = || {
            let mut reading = reading();
            reading.backends[0].totals.refused.add(Refusal::ALL[0], 88);
            reading
        };
        let text = Metrics::new(read).render();
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        let mut seen = BTreeSet::new();
        for series in samples.filter_map(|line| Some(line.rsplit_once(' ')?.0)) {
            assert!(seen.insert(series), "{series}");
        }
        let line =
            r#"quic_lb_backend_refused_total{backend="a",errno="ECONNREFUSED",pool="web"} 88"#;
        assert!(text.lines().any(|of_text| of_text == line), "{text}");
    }

    #[test]
    fn names_from_the_configuration_cannot_break_the_format() {
        let read = || {
            let mut reading = reading();
            reading.listeners[0].name = "a\"b\\c\nd".into();
            reading
        };
        let text = Metrics::new(read).render();
        assert!(text.contains(r#"{listener="a\"b\\c\nd"} 12"#), "{text}");
    }

    fn reading() -> Reading {
        let mut edge = ListenerTotals { received: 12, returned_bytes: 99, ..Default::default() };
        edge.forwarded[Rule::FourTupleScid as usize] = 7;
        edge.dropped[DropReason::FlowLimit as usize] = 5;
        edge.replied[ReplyKind::Retry as usize] = 6;
        edge.retries = 8;
        edge.tokens[TokenResult::Expired as usize] = 2;
        let mut refused = Refusals::default();
        refused.add(Refusal::NotPermitted, 3);
        let mut live = LiveTotals { flows: 6, ..Default::default() };
        live.by_config[2].connections = 5;
        let mut checks = CheckCounts::default();
        checks.add(CheckResult::Timeout);
        let mut times = CheckTimes::default();
        times.add(Duration::from_millis(30));
        Reading {
            all_listeners: edge,
            listeners: vec![ListenerReading {
                name: "edge".into(),
                totals: edge,
                phase: Phase::LABELS[2],
                switches: [0, 4, 0],
                receive_dropped: vec![0, 31],
            }],
            backends: vec![BackendReading {
                pool: "web".into(),
                name: "a".into(),
                state: BackendState::Down,
                totals: BackendTotals {
                    forwarded: 7,
                    unanswered: 5,
                    moved: 6,
                    refused,
                    misnamed: 4,
                    ..Default::default()
                },
                half_open: Some(12),
                retry_unsupported: Some(true),
                clock_skew: Some(-3),
                live,
                silent: Some(Duration::from_millis(4_700)),
                config_ids: vec![ConfigId::new(1).unwrap()],
                checks: Some(checks),
            }],
            pools: vec![PoolReading { name: "web".into(), panic: true, times }],
            remembered: Sizes { handshakes: 8, connections: 7, connection_ids: 9 },
            tokens_made: [(3, 77, Some(99)), (4, 100, None)]
                .map(|(sequence, made, limit)| TokensMade { sequence, made, limit })
                .to_vec(),
            reloads: Reloads {
                applied: 1,
                rejected: 2,
                hung: 3,
                corrected: 4,
                last: Some((Duration::from_millis(5_700), false)),
            },
            panics: vec![0, 2],
            usage: vec![
                Usage::default(),
                Usage {
                    batches: 5,
                    cpu: Duration::from_millis(1_500),
                    descriptors: 70,
                    descriptor_limit: 1_024,
                },
            ],
            stuck: 1,
            digest: "0123".into(),
            connection_log: LogCounts { written: 70, queue_full: 8, unwritten: 9 },
            ..Default::default()
        }
    }
}
