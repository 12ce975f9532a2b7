//! A client of the admin interface: of a balancer that runs.

use std::{io, net::SocketAddr, time::Duration};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

/// For an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// What an answer may have, in bytes.
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
        return Ok(body.to_owned());
    }
    let answer: Option<Value> = serde_json::from_str(body).ok();
    Err(io::Error::other(match answer.as_ref().and_then(|answer| answer["error"].as_str()) {
        Some(sentence) => sentence.to_owned(),
        None => format!("{method} {path}: {status} {body}"),
    }))
}
