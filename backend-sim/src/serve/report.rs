//! Tells a balancer how many connections are half-open, so that it can begin to validate addresses
//! before forged first flights take all the processor time: a POST to its admin interface once a second.
//!
//! Serving does not depend on it. While a balancer cannot be told, the log says so once, and once
//! more when it can be told again.

use std::{fmt, io, str::FromStr, sync::Arc, time::Duration};

use axum::http::{Request, StatusCode, Uri, header, uri::Scheme};
use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use quic::driver::Endpoint;
use quic_lb_config::BearerToken;
use tokio::{
    net::TcpStream,
    time::{self, MissedTickBehavior},
};
use tracing::{info, warn};

use super::Shared;

/// From one report to the next. A balancer believes a report for ten seconds.
const INTERVAL: Duration = Duration::from_secs(1);
/// For connecting, asking and being answered.
const PATIENCE: Duration = Duration::from_secs(3);
/// The port of HTTP where the address names none.
const HTTP_PORT: u16 = 80;

/// Where a balancer's admin interface is, as `http://HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminAddress {
    /// Host and port as HTTP names them.
    authority: String,
    /// What to connect to.
    destination: String,
}

/// It is not the address of an admin interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the admin address has to look like http://127.0.0.1:9090")]
pub struct InvalidAdminAddress;

impl FromStr for AdminAddress {
    type Err = InvalidAdminAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAdminAddress> {
        let uri: Uri = text.parse().map_err(|_| InvalidAdminAddress)?;
        let is_bare = matches!(uri.path(), "" | "/") && uri.query().is_none();
        let authority = uri.authority().ok_or(InvalidAdminAddress)?;
        if uri.scheme() != Some(&Scheme::HTTP) || !is_bare || authority.host().is_empty() {
            return Err(InvalidAdminAddress);
        }
        let destination =
            format!("{}:{}", authority.host(), authority.port_u16().unwrap_or(HTTP_PORT));
        // Neither a user's name nor a port that is none.
        if authority != authority.host() && authority != destination.as_str() {
            return Err(InvalidAdminAddress);
        }
        Ok(Self { authority: authority.as_str().to_owned(), destination })
    }
}

impl fmt::Display for AdminAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}", self.authority)
    }
}

/// Who reports, and what it shows.
#[derive(Clone, Debug)]
struct Reporter<'a> {
    pool: &'a str,
    backend: &'a str,
    token: Option<&'a BearerToken>,
}

/// What became of a report.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    Taken,
    /// The balancer answers, and does not take it: it knows no such backend, most likely.
    Refused(StatusCode),
    /// There was no answer, for a reason that reads the same as long as it is the same.
    Unanswered(String),
}

/// Reports for as long as it is polled.
pub(super) async fn half_open(balancer: AdminAddress, endpoint: Endpoint, shared: Arc<Shared>) {
    let mut before = None;
    let mut ticks = time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let identity = shared.identity.load_full();
        let (pool, backend) = (identity.pool.as_str(), identity.backend.as_str());
        let reporter = Reporter { pool, backend, token: identity.report_token.as_ref() };
        let outcome = report(&balancer, &reporter, endpoint.half_open()).await;
        if before.as_ref() != Some(&outcome) {
            log(&balancer, &outcome);
            before = Some(outcome);
        }
    }
}

fn log(balancer: &AdminAddress, outcome: &Outcome) {
    match outcome {
        Outcome::Taken => info!(%balancer, "half-open connections are reported"),
        Outcome::Refused(status) => {
            warn!(%balancer, %status, "the report of half-open connections is refused");
        }
        Outcome::Unanswered(reason) => {
            warn!(%balancer, reason, "half-open connections cannot be reported");
        }
    }
}

async fn report(balancer: &AdminAddress, reporter: &Reporter<'_>, half_open: usize) -> Outcome {
    match time::timeout(PATIENCE, post(balancer, reporter, half_open)).await {
        Ok(Ok(status)) if status.is_success() => Outcome::Taken,
        Ok(Ok(status)) => Outcome::Refused(status),
        Ok(Err(error)) => Outcome::Unanswered(error.to_string()),
        Err(_) => Outcome::Unanswered("it takes too long".to_owned()),
    }
}

async fn post(
    balancer: &AdminAddress,
    reporter: &Reporter<'_>,
    half_open: usize,
) -> io::Result<StatusCode> {
    let stream = TcpStream::connect(&balancer.destination).await?;
    let handshake = http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(io::Error::other)?;
    // Names of pools and backends are letters, digits and a few signs, all of which a path may have.
    let Reporter { pool, backend, token } = reporter;
    let mut request = Request::post(format!("/api/v1/backends/{pool}/{backend}/half_open"));
    if let Some(token) = token {
        request = request.header(header::AUTHORIZATION, token.header().as_str());
    }
    let request = request
        .header(header::HOST, &balancer.authority)
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(format!("{{\"half_open\":{half_open}}}"))))
        .map_err(io::Error::other)?;
    tokio::select! {
        answer = sender.send_request(request) => {
            answer.map(|answer| answer.status()).map_err(io::Error::other)
        }
        ended = connection => Err(ended.err().map_or_else(closed, io::Error::other)),
    }
}

fn closed() -> io::Error {
    io::Error::other("the connection was closed without an answer")
}

#[cfg(test)]
mod tests {
    use quic_lb_config::{Surroundings, from_str};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    #[tokio::test]
    async fn a_report_shows_the_token_of_its_pool() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("web.token"), "correct-horse-battery-staple").unwrap();
        let text = include_str!("../../../config/examples/contract.yaml");
        let told = async |text: &str| {
            let surroundings =
                Surroundings { directory: folder.path(), ..Surroundings::of_text("lb.yaml") };
            let config = from_str(text, &surroundings).unwrap().config;
            let token = config.pools[0].report_token.as_ref();
            let reporter = Reporter { pool: "web", backend: "a", token };
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let balancer = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
            let balancer_side = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                let (mut head, mut octets) = (String::new(), [0; 1_000]);
                for _ in 0..100 {
                    let len = stream.read(&mut octets).await.unwrap();
                    head += str::from_utf8(&octets[..len]).unwrap();
                    if head.contains("{\"half_open\":7}") {
                        break;
                    }
                }
                stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
                (head, stream)
            };
            let (outcome, (head, _open)) =
                tokio::join!(report(&balancer, &reporter, 7), balancer_side);
            assert_eq!(outcome, Outcome::Taken);
            head.to_lowercase()
        };
        assert!(!told(text).await.contains("authorization"));
        let with = text.replace("    backends:", "    report_token_file: web.token\n    backends:");
        let head = told(&with).await;
        assert!(head.contains("authorization: bearer correct-horse-battery-staple\r\n"), "{head}");
    }

    #[test]
    fn admin_addresses_are_plain_http_and_nothing_else() {
        for (text, destination) in [
            ("http://127.0.0.1:9090", "127.0.0.1:9090"),
            ("http://[::1]:9090/", "[::1]:9090"),
            ("http://balancer.example", "balancer.example:80"),
        ] {
            let address: AdminAddress = text.parse().unwrap();
            assert_eq!(address.destination, destination);
            assert_eq!(address.to_string(), text.trim_end_matches('/'));
        }
        for text in [
            "",
            "127.0.0.1:9090",
            "https://127.0.0.1:9090",
            "http://127.0.0.1:9090/metrics",
            "http://127.0.0.1:9090/?x",
            "http://somebody@127.0.0.1:9090",
            "http://127.0.0.1:99999",
            "http://:9090",
        ] {
            assert_eq!(text.parse::<AdminAddress>(), Err(InvalidAdminAddress), "{text}");
        }
    }
}
