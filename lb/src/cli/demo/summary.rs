//! What a demonstration has come to.

use std::{collections::BTreeMap, fmt};

use backend_sim::{load::Report, serve::Counters};
use serde_json::{Value, json};

/// The figures, and whether they are good.
#[derive(Debug)]
pub(super) struct Summary {
    report: Report,
    rules: BTreeMap<String, u64>,
    servers: Vec<(String, Counters)>,
    complete: bool,
}

impl Summary {
    pub(super) const fn new(
        report: Report,
        rules: BTreeMap<String, u64>,
        servers: Vec<(String, Counters)>,
        complete: bool,
    ) -> Self {
        Self { report, rules, servers, complete }
    }

    /// Connections that ended without being asked to, or did not come about.
    fn lost(&self) -> u64 {
        self.report.lost + self.report.handshakes_failed.values().sum::<u64>()
    }

    /// Answers from another server than the connection's first one, and datagrams that reached a
    /// server other than that of their connection ID.
    fn misrouted(&self) -> u64 {
        let datagrams: u64 = self.servers.iter().map(|(_, counters)| counters.misrouted).sum();
        self.report.misrouted + datagrams
    }

    fn failed(&self) -> u64 {
        self.report.requests_failed.values().sum()
    }

    /// A sentence about what went wrong, if anything did.
    pub(super) fn verdict(&self) -> Result<(), String> {
        let (lost, misrouted, failed) = (self.lost(), self.misrouted(), self.failed());
        if self.report.requests == 0 {
            return Err("no request was answered".to_owned());
        }
        if (lost, misrouted, failed) != (0, 0, 0) {
            let Report { lost_by_cause, handshakes_failed, requests_failed, .. } = &self.report;
            return Err(format!(
                "lost {lost} ({lost_by_cause:?}, handshakes {handshakes_failed:?}), \
                 misrouted {misrouted}, requests failed {failed} ({requests_failed:?})"
            ));
        }
        Ok(())
    }

    pub(super) fn to_json(&self) -> Value {
        let report = &self.report;
        let servers: BTreeMap<_, _> = self
            .servers
            .iter()
            .map(|(name, counters)| {
                let Counters { accepted, requests, unclaimed, misrouted, .. } = counters;
                let figures = json!({
                    "connections": accepted,
                    "requests": requests,
                    "unclaimed_datagrams": unclaimed,
                    "misrouted_datagrams": misrouted,
                });
                (name, figures)
            })
            .collect();
        json!({
            "connections": report.connections,
            "requests": report.requests,
            "rebinds": report.rebinds,
            "migrations": report.migrations,
            "lost": self.lost(),
            "misrouted": self.misrouted(),
            "requests_failed": self.failed(),
            "seconds": report.seconds,
            "bytes_verified": report.bytes_verified,
            "latency": report.latency,
            "drained_and_rotated": self.complete,
            "lost_by_cause": report.lost_by_cause,
            "datagrams_by_rule": self.rules,
            "backends": servers,
        })
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let report = &self.report;
        let rules: Vec<_> =
            self.rules.iter().map(|(rule, count)| format!("{rule} {count}")).collect();
        let servers: Vec<_> = self
            .servers
            .iter()
            .map(|(name, counters)| format!("{name} {}", counters.accepted))
            .collect();
        writeln!(f, "connections  {} ({})", report.connections, servers.join(", "))?;
        writeln!(
            f,
            "requests     {}, every byte of {:.1} MB verified",
            report.requests,
            report.bytes_verified as f64 / 1e6
        )?;
        writeln!(f, "latency      {}", report.latency)?;
        writeln!(f, "datagrams    by rule: {}", rules.join(", "))?;
        writeln!(f, "rebinds      {}", report.rebinds)?;
        writeln!(f, "migrations   {}", report.migrations)?;
        writeln!(f, "lost         {}", self.lost())?;
        write!(f, "misrouted    {}", self.misrouted())
    }
}
