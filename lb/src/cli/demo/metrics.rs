//! What the balancer's `/metrics` says of a run.

use std::{collections::BTreeMap, io, net::SocketAddr};

use crate::cli::admin::Balancer;

/// A page of it.
#[derive(Debug, Default)]
pub(super) struct Metrics(String);

impl Metrics {
    pub(super) async fn fetch(admin: SocketAddr) -> io::Result<Self> {
        Balancer::at(admin).get("/metrics").await.map(Self)
    }

    /// Datagrams from clients by the rule that sent them on.
    pub(super) fn by_rule(&self) -> BTreeMap<String, u64> {
        let forwarded = self.samples("quic_lb_datagrams_forwarded_total");
        let rule = |labels: &str| {
            let (_, rest) = labels.split_once("rule=\"")?;
            Some(rest.split_once('"')?.0.to_owned())
        };
        forwarded.filter_map(|(labels, value)| Some((rule(labels)?, value))).collect()
    }

    /// The sum over all labels.
    pub(super) fn sum(&self, name: &str) -> u64 {
        self.samples(name).map(|(_, value)| value).sum()
    }

    /// Labels and values of one metric.
    fn samples(&self, name: &str) -> impl Iterator<Item = (&str, u64)> {
        self.0.lines().filter_map(move |line| {
            let (labels, value) = line.strip_prefix(name)?.rsplit_once(' ')?;
            let whole = labels.is_empty() || labels.starts_with('{');
            Some((labels, value.parse().ok()?)).filter(|_| whole)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_found_by_their_whole_name() {
        let text =
            "# HELP x\nx_total{listener=\"edge\",rule=\"cid\"} 5\nx_total_more 7\nx_total 1\n";
        let metrics = Metrics(text.replace('x', "quic_lb_datagrams_forwarded"));
        assert_eq!(metrics.sum("quic_lb_datagrams_forwarded_total"), 6);
        assert_eq!(metrics.by_rule(), BTreeMap::from([("cid".to_owned(), 5)]));
    }
}
