//! What an origin counts, for `/metrics` and for those who run it in their process.

use prometheus::{
    Encoder as _, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder, core::Collector,
};

/// The counters. Per backend, never per client.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    pub(crate) accepted: IntCounter,
    pub(crate) active: IntGauge,
    /// By cause.
    pub(crate) ended: IntCounterVec,
    /// By cause.
    pub(crate) handshakes_failed: IntCounterVec,
    /// By route and status.
    pub(crate) requests: IntCounterVec,
    pub(crate) path_changes: IntCounter,
    pub(crate) rotations: IntCounter,
    /// By server ID in hex, or `unknown`.
    pub(crate) unclaimed: IntCounterVec,
    pub(crate) misrouted: IntCounter,
    /// By result; refused ones by reason.
    pub(crate) tokens: Copied,
    /// By result.
    pub(crate) resets: Copied,
}

/// Counters that are counted elsewhere.
#[derive(Debug)]
pub(crate) struct Copied(IntCounterVec);

impl Copied {
    /// Says how many there are by now.
    pub(crate) fn set(&self, label: &str, count: u64) {
        let counter = self.0.with_label_values(&[label]);
        counter.inc_by(count.saturating_sub(counter.get()));
    }
}

/// A reading of the counters that a fleet is judged by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Connections whose handshake was completed.
    pub accepted: u64,
    /// Those that are there now.
    pub active: u64,
    /// Requests that were answered.
    pub requests: u64,
    /// Times that a client was found at another address, of connections that have ended.
    pub path_changes: u64,
    /// Datagrams for connections that are not here.
    pub unclaimed: u64,
    /// Those of them whose connection ID belongs to another server of the pool.
    pub misrouted: u64,
}

impl Metrics {
    pub(crate) fn new(backend: &str, pool: &str) -> Self {
        let registry = Registry::new_custom(Some("backend_sim".into()), None);
        let registry = registry.expect("the prefix is a legal one");
        let add = Add(&registry);
        add.by("info", "Which backend this is; always 1", &["backend", "pool"])
            .with_label_values(&[backend, pool])
            .inc();
        Self {
            accepted: add.counter("connections_accepted_total", "Handshakes completed"),
            active: add.gauge("connections", "Connections that are there"),
            ended: add.by("connections_ended_total", "Why connections ended", &["cause"]),
            handshakes_failed: add.by(
                "handshakes_failed_total",
                "Why handshakes failed",
                &["cause"],
            ),
            requests: add.by("requests_total", "Requests answered", &["route", "status"]),
            path_changes: add.counter(
                "path_changes_total",
                "Times that a client was found at another address, counted when its connection ends",
            ),
            rotations: add.counter("cid_rotations_total", "Rotations of all connection IDs"),
            unclaimed: add.by(
                "unknown_cid_datagrams_total",
                "Datagrams for connections that are not here, by the server ID that they carry",
                &["server_id"],
            ),
            misrouted: add.counter(
                "misrouted_datagrams_total",
                "Datagrams whose connection ID belongs to another server of the pool",
            ),
            tokens: Copied(add.by(
                "address_tokens_total",
                "Address tokens of clients by what they were worth; other words than retry, new_token, spent and ignored are why \
                 a Retry token was refused",
                &["result"],
            )),
            resets: Copied(add.by(
                "stateless_resets_total",
                "Stateless resets, sent or withheld because there were too many",
                &["result"],
            )),
            registry,
        }
    }

    /// The Prometheus text.
    pub(crate) fn render(&self) -> String {
        let mut out = Vec::new();
        // Writing to memory does not fail, and names were checked when they were registered.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut out);
        String::from_utf8(out).unwrap_or_default()
    }

    pub(crate) fn read(&self) -> Counters {
        Counters {
            accepted: self.accepted.get(),
            active: self.active.get().try_into().unwrap_or_default(),
            requests: sum(&self.requests),
            path_changes: self.path_changes.get(),
            unclaimed: sum(&self.unclaimed),
            misrouted: self.misrouted.get(),
        }
    }
}

fn sum(counters: &IntCounterVec) -> u64 {
    let families = counters.collect();
    let metrics = families.iter().flat_map(|family| family.get_metric());
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "they were counted one by one"
    )]
    metrics.map(|metric| metric.get_counter().get_value() as u64).sum()
}

/// Makes metrics and registers them; names and labels are this file's.
struct Add<'a>(&'a Registry);

impl Add<'_> {
    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.register(IntCounter::new(name, help))
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.register(IntGauge::new(name, help))
    }

    fn by(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.register(IntCounterVec::new(Opts::new(name, help), labels))
    }

    fn register<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        let made = made.expect("a legal name with legal labels");
        self.0.register(Box::new(made.clone())).expect("each name is registered once");
        made
    }
}
