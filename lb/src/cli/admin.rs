//! A client of the admin interface: of a balancer that runs.

use std::{
    fmt::Write as _,
    fs, io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpStream, UnixStream},
    time::timeout,
};
use zeroize::Zeroizing;

use super::{
    args::{AdminArgs, AdminPlace},
    outcome::Failure,
    tls::Tls,
};

/// Where commands are taken if nobody says otherwise: the first if there is such a file.
const SOCKET: &str = "/run/quic-lb/admin.sock";
const ADDRESS: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9464));

/// More than a head has, so that what is in it is not left behind when it grows.
const MAX_HEAD: usize = 8 << 10;

/// For an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// What an answer may have, in bytes: more than is said of all backends that there may be.
const MAX_ANSWER: u64 = 64 << 20;

/// A balancer that runs, and how it is asked.
#[derive(Debug)]
pub(super) struct Balancer {
    place: AdminPlace,
    token: Option<Zeroizing<String>>,
    tls: Option<Tls>,
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

impl Balancer {
    /// The one that is meant.
    pub(super) fn meant(args: &AdminArgs) -> Result<Self, Failure> {
        let AdminArgs { admin, token_file, tls } = args;
        let place = admin.clone().unwrap_or_else(|| match Path::new(SOCKET).exists() {
            true => AdminPlace::Unix(SOCKET.into()),
            false => AdminPlace::Address(ADDRESS),
        });
        let tls = Tls::meant(tls)?;
        Ok(Self { tls, ..Self::of(place, token_file.as_ref())? })
    }

    /// The one at `place`, which may want to be shown the token in a file.
    pub(super) fn of(place: AdminPlace, token_file: Option<&PathBuf>) -> Result<Self, Failure> {
        let read = |file: &PathBuf| {
            let cannot = |error| Failure::other(format_args!("{}: {error}", file.display()));
            fs::read_to_string(file).map(Zeroizing::new).map_err(cannot)
        };
        Ok(Self { place, token: token_file.map(read).transpose()?, tls: None })
    }

    /// The one at an address that wants no token.
    #[cfg(feature = "demo")]
    pub(super) const fn at(address: SocketAddr) -> Self {
        Self { place: AdminPlace::Address(address), token: None, tls: None }
    }

    pub(super) async fn get(&self, path: &str) -> io::Result<String> {
        self.request("GET", path, PATIENCE).await?.into_body()
    }

    pub(super) async fn post(&self, path: &str) -> io::Result<String> {
        self.request("POST", path, PATIENCE).await?.into_body()
    }

    pub(super) async fn request(
        &self,
        method: &str,
        path: &str,
        patience: Duration,
    ) -> io::Result<Answer> {
        let exchange = async {
            match &self.place {
                AdminPlace::Address(address) => {
                    self.exchange_by(TcpStream::connect(address).await?, method, path).await
                }
                AdminPlace::Name(name) => {
                    self.exchange_by(TcpStream::connect(name).await?, method, path).await
                }
                AdminPlace::Unix(socket) => {
                    self.exchange(UnixStream::connect(socket).await?, method, path).await
                }
            }
        };
        timeout(patience, exchange).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()))
    }

    async fn exchange_by(&self, stream: TcpStream, method: &str, path: &str) -> io::Result<Answer> {
        match &self.tls {
            None => self.exchange(stream, method, path).await,
            Some(tls) => self.exchange(tls.connect(&self.place, stream).await?, method, path).await,
        }
    }

    /// One request of HTTP/1.0: the answer ends with the connection.
    async fn exchange(
        &self,
        mut stream: impl AsyncRead + AsyncWrite + Unpin,
        method: &str,
        path: &str,
    ) -> io::Result<Answer> {
        let host = match &self.place {
            AdminPlace::Address(address) => address.to_string(),
            AdminPlace::Name(name) => name.clone(),
            AdminPlace::Unix(_) => "localhost".to_owned(),
        };
        let mut head = Zeroizing::new(String::with_capacity(MAX_HEAD));
        // Writing to a string cannot fail.
        let _ = write!(head, "{method} {path} HTTP/1.0\r\nhost: {host}\r\ncontent-length: 0\r\n");
        if let Some(token) = &self.token {
            let _ = write!(head, "authorization: Bearer {}\r\n", token.trim());
        }
        head.push_str("\r\n");
        stream.write_all(head.as_bytes()).await?;
        let mut answer = String::new();
        stream.take(MAX_ANSWER).read_to_string(&mut answer).await?;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        Ok(Answer { status, body: body.to_owned() })
    }

    /// Why it was asked in vain.
    pub(super) fn refused(&self, error: &io::Error) -> Failure {
        let place = &self.place;
        match error.kind() {
            io::ErrorKind::ConnectionRefused
            | io::ErrorKind::TimedOut
            | io::ErrorKind::NotFound => Failure::other(format_args!(
                "no admin interface answers at {place}: --admin says where it is"
            )),
            _ => Failure::other(format_args!("the balancer at {place}: {error}")),
        }
    }
}

/// Runs a command that asks a balancer.
pub(super) fn run<T>(task: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::other(format_args!("cannot start: {error}")))?;
    runtime.block_on(task)
}
