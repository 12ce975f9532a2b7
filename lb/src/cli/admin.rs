//! A client of the admin interface: of a balancer that runs.

use std::{io, net::SocketAddr, time::Duration};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use super::outcome::Failure;

/// For an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// What an answer may have, in bytes.
const MAX_ANSWER: u64 = 16 << 20;

pub(super) async fn get(admin: SocketAddr, path: &str) -> io::Result<String> {
    let answer = request(admin, "GET", path, PATIENCE).await?;
    answer.into_body()
}

pub(super) async fn post(admin: SocketAddr, path: &str) -> io::Result<String> {
    let answer = request(admin, "POST", path, PATIENCE).await?;
    answer.into_body()
}

/// What came back.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: String,
}

impl Answer {
    /// The body, or what is wrong in a sentence.
    pub(super) fn into_body(self) -> io::Result<String> {
        if self.status == 200 {
            return Ok(self.body);
        }
        let answer: Option<Value> = serde_json::from_str(&self.body).ok();
        Err(io::Error::other(match answer.as_ref().and_then(|answer| answer["error"].as_str()) {
            Some(sentence) => sentence.to_owned(),
            None => format!("status {}: {}", self.status, self.body),
        }))
    }
}

/// One request of HTTP/1.0: the answer ends with the connection.
pub(super) async fn request(
    admin: SocketAddr,
    method: &str,
    path: &str,
    patience: Duration,
) -> io::Result<Answer> {
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
        timeout(patience, exchange).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()))?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    Ok(Answer { status, body: body.to_owned() })
}

/// Runs a command that asks a balancer.
pub(super) fn run<T>(task: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::other(format_args!("cannot start: {error}")))?;
    runtime.block_on(task)
}

/// Why a balancer was asked in vain.
pub(super) fn refused(admin: SocketAddr, error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::TimedOut => Failure::other(format_args!(
            "no admin interface answers at {admin}: --admin says where it is"
        )),
        _ => Failure::other(format_args!("the balancer at {admin}: {error}")),
    }
}
