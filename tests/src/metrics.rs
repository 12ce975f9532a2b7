//! What `/metrics` says: the text format of Prometheus, as far as it is used.

use std::collections::{BTreeMap, BTreeSet};

/// One scrape.
#[derive(Clone, Debug)]
pub struct Metrics {
    samples: Vec<Sample>,
}

#[derive(Clone, Debug)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

/// Where the datagrams of one listener, or of all, have gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdicts {
    /// From clients.
    pub received: u64,
    /// To backends.
    pub forwarded: u64,
    /// To nobody.
    pub dropped: u64,
    /// Answered by the balancer itself.
    pub replied: u64,
}

impl Verdicts {
    /// Whether each datagram received has exactly one verdict.
    #[must_use]
    pub const fn add_up(&self) -> bool {
        self.received == self.forwarded + self.dropped + self.replied
    }
}

impl Metrics {
    /// Reads what a scrape returned. Lines that are not samples are left out.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        Self { samples: text.lines().filter_map(Sample::parse).collect() }
    }

    /// The sum of the samples called `quic_lb_{name}` that have all of `labels`.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "counts far below 2^53"
    )]
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> u64 {
        let wanted = |sample: &&Sample| {
            sample.name.strip_prefix("quic_lb_") == Some(name)
                && labels.iter().all(|&(key, value)| sample.has(key, value))
        };
        self.samples.iter().filter(wanted).map(|sample| sample.value).sum::<f64>() as u64
    }

    /// What [`Self::sum`] would say of each value of a label, without those that are zero.
    #[must_use]
    pub fn by_label(&self, name: &str, label: &str) -> BTreeMap<String, u64> {
        let of_name = self.samples.iter().filter(|s| s.name.strip_prefix("quic_lb_") == Some(name));
        let values: BTreeSet<_> = of_name.filter_map(|sample| sample.labels.get(label)).collect();
        let sums =
            values.into_iter().map(|value| (value.clone(), self.sum(name, &[(label, value)])));
        sums.filter(|&(_, sum)| sum > 0).collect()
    }

    /// Memory of the process that is in use.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "octets far below 2^53"
    )]
    pub fn resident_octets(&self) -> u64 {
        let name = "process_resident_memory_bytes";
        let resident = self.samples.iter().find(|sample| sample.name == name);
        resident.map_or(0, |sample| sample.value as u64)
    }

    /// The verdicts on all listeners together.
    #[must_use]
    pub fn verdicts(&self) -> Verdicts {
        Verdicts {
            received: self.sum("datagrams_received_total", &[]),
            forwarded: self.sum("datagrams_forwarded_total", &[]),
            dropped: self.sum("datagrams_dropped_total", &[]),
            replied: self.sum("datagrams_replied_total", &[]),
        }
    }

    /// Datagrams that `rule` found a backend for.
    #[must_use]
    pub fn by_rule(&self, rule: &str) -> u64 {
        self.sum("datagrams_forwarded_total", &[("rule", rule)])
    }

    /// Whether there is a backend with this name, and in which state.
    #[must_use]
    pub fn backend_state(&self, backend: &str) -> Option<&str> {
        let current = self.samples.iter().find(|sample| {
            sample.name == "quic_lb_backend_state"
                && sample.has("backend", backend)
                && sample.value == 1.0
        });
        Some(current?.labels.get("state")?.as_str())
    }
}

impl Sample {
    fn parse(line: &str) -> Option<Self> {
        let (series, value) = line.rsplit_once(' ')?;
        let value = value.parse().ok()?;
        let (name, labels) = match series.split_once('{') {
            None => (series, ""),
            Some((name, rest)) => (name, rest.strip_suffix('}')?),
        };
        // The names in these scenarios contain neither commas nor quotes.
        let labels = labels.split(',').filter_map(|label| {
            let (key, value) = label.split_once('=')?;
            Some((key.to_owned(), value.trim_matches('"').to_owned()))
        });
        Some(Self { name: name.to_owned(), labels: labels.collect(), value })
    }

    fn has(&self, key: &str, value: &str) -> bool {
        self.labels.get(key).is_some_and(|found| found == value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
# HELP quic_lb_datagrams_received_total Datagrams.
# TYPE quic_lb_datagrams_received_total counter
quic_lb_datagrams_received_total{listener=\"edge\"} 12
quic_lb_datagrams_received_total{listener=\"side\"} 3
quic_lb_datagrams_forwarded_total{listener=\"edge\",rule=\"cid\"} 9
quic_lb_datagrams_forwarded_total{listener=\"edge\",rule=\"dcid\"} 2
quic_lb_datagrams_dropped_total{listener=\"side\",reason=\"empty\"} 4
quic_lb_backend_state{backend=\"a\",pool=\"web\",state=\"active\"} 0
quic_lb_backend_state{backend=\"a\",pool=\"web\",state=\"draining\"} 1
";

    #[test]
    fn samples_add_up_over_the_labels_that_are_not_named() {
        let metrics = Metrics::parse(TEXT);
        assert_eq!(metrics.sum("datagrams_received_total", &[("listener", "side")]), 3);
        let expected = Verdicts { received: 15, forwarded: 11, dropped: 4, replied: 0 };
        assert_eq!(metrics.verdicts(), expected);
        assert!(expected.add_up());
        assert_eq!(metrics.by_rule("dcid"), 2);
        let by_listener = metrics.by_label("datagrams_received_total", "listener");
        assert_eq!(by_listener, [("edge".into(), 12), ("side".into(), 3)].into());
        assert_eq!(metrics.by_rule("fallback"), 0);
    }

    #[test]
    fn the_state_of_a_backend_is_the_one_that_is_set() {
        let metrics = Metrics::parse(TEXT);
        assert_eq!(metrics.backend_state("a"), Some("draining"));
        assert_eq!(metrics.backend_state("b"), None);
    }
}
