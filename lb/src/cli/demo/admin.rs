//! The balancer's admin interface, as anybody may use it.

use std::{collections::BTreeMap, io, net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

/// For an answer of a process that is this one.
const PATIENCE: Duration = Duration::from_secs(5);
/// What an answer may have, in octets.
const MAX_ANSWER: u64 = 16 << 20;

pub(super) async fn get(admin: SocketAddr, path: &str) -> io::Result<String> {
    request(admin, "GET", path).await
}

pub(super) async fn post(admin: SocketAddr, path: &str) -> io::Result<String> {
    request(admin, "POST", path).await
}

/// One request of HTTP/1.0: the answer ends with the connection.
async fn request(admin: SocketAddr, method: &str, path: &str) -> io::Result<String> {
    let exchange = async {
        let mut stream = TcpStream::connect(admin).await?;
        let head =
            format!("{method} {path} HTTP/1.0\r\nhost: {admin}\r\ncontent-length: 0\r\n\r\n");
        stream.write_all(head.as_bytes()).await?;
        let mut answer = String::new();
        stream.take(MAX_ANSWER).read_to_string(&mut answer).await?;
        io::Result::Ok(answer)
    };
    let answer =
        timeout(PATIENCE, exchange).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()))?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).unwrap_or_default();
    if status == "200" {
        Ok(body.to_owned())
    } else {
        Err(io::Error::other(format!("{method} {path}: {status} {body}")))
    }
}

/// What `/metrics` shows.
#[derive(Debug, Default)]
pub(super) struct Metrics(String);

impl Metrics {
    pub(super) async fn fetch(admin: SocketAddr) -> io::Result<Self> {
        get(admin, "/metrics").await.map(Self)
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
