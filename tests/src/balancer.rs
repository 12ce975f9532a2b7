//! The balancer under test: the binary `quic-lb` in a process of its own.

use std::{
    ffi::OsStr,
    fs::File,
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{binary, document::Document, metrics::Metrics};

/// How often something is asked for that takes a while, and how long is waited in between: together
/// far more than anything here needs, since a machine may be busy.
const POLLS: usize = 600;
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// A running balancer. Dropping it kills it.
#[derive(Debug)]
pub struct Balancer {
    process: Child,
    folder: TempDir,
    admin: SocketAddr,
}

/// How a running balancer is told about a new configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reload {
    /// The file is replaced, and the balancer finds out by itself.
    FileChange,
    /// The file is replaced and the process gets SIGHUP.
    Signal,
}

impl Balancer {
    /// Starts one and waits until it is ready.
    ///
    /// # Errors
    ///
    /// When it does not become ready; what it wrote is part of the message.
    pub async fn start(document: &Document) -> anyhow::Result<Self> {
        Self::start_from(&document.to_string(), document.admin).await
    }

    /// As [`Self::start`], from the text of a configuration whose admin interface is at `admin`.
    ///
    /// # Errors
    ///
    /// As [`Self::start`].
    pub async fn start_from(text: &str, admin: SocketAddr) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        std::fs::write(folder.path().join(CONFIG), text)?;
        let process = spawn(folder.path())?;
        let mut balancer = Self { process, folder, admin };
        balancer.wait_until_ready().await?;
        Ok(balancer)
    }

    /// Kills the process without warning and starts another one with the same configuration.
    ///
    /// # Errors
    ///
    /// When the new one does not become ready.
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        self.process = spawn(self.folder.path())?;
        self.wait_until_ready().await
    }

    /// Replaces the configuration. Whether it has been taken up is for the caller to find out.
    ///
    /// # Errors
    ///
    /// When the file cannot be replaced or the process is gone.
    pub fn reload(&mut self, document: &Document, how: Reload) -> anyhow::Result<()> {
        self.write_config(&document.to_string())?;
        if how == Reload::Signal { self.signal("HUP") } else { Ok(()) }
    }

    /// Replaces the file, and has it applied though connections lose their servers by that.
    ///
    /// # Errors
    ///
    /// When the file cannot be replaced or is refused.
    pub async fn force_reload(&self, document: &Document) -> anyhow::Result<()> {
        self.write_config(&document.to_string())?;
        let head = format!(
            "POST /api/v1/reload?force=true HTTP/1.1\r\nHost: {}\r\nContent-Length: 0",
            self.admin
        );
        request(self.admin, &head, "").await.map(drop)
    }

    /// Replaces the file by `text`, whatever that is.
    ///
    /// # Errors
    ///
    /// When the file cannot be replaced.
    pub fn write_config(&self, text: &str) -> anyhow::Result<()> {
        // Renamed into place, so that nobody reads half of it.
        let path = self.folder.path().join(CONFIG);
        let fresh = path.with_extension("fresh");
        std::fs::write(&fresh, text)?;
        Ok(std::fs::rename(fresh, path)?)
    }

    /// Sends SIGTERM and waits for the end of the process.
    ///
    /// # Errors
    ///
    /// When it ends otherwise than with exit code 0.
    pub async fn terminate(&mut self) -> anyhow::Result<()> {
        self.signal("TERM")?;
        for _ in 0..POLLS {
            if let Some(status) = self.process.try_wait()? {
                ensure!(status.success(), "{status}\n{}", self.log());
                return Ok(());
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        bail!("it did not end after SIGTERM\n{}", self.log())
    }

    /// The number of its process.
    #[must_use]
    pub fn process_id(&self) -> u32 {
        self.process.id()
    }

    /// What it has written.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join(LOG)).unwrap_or_default()
    }

    /// One scrape.
    ///
    /// # Errors
    ///
    /// When it does not answer.
    pub async fn metrics(&self) -> anyhow::Result<Metrics> {
        Ok(Metrics::parse(&get(self.admin, "/metrics").await?))
    }

    /// Reports the half-open connections of a server, as it would itself.
    ///
    /// # Errors
    ///
    /// When that is refused.
    pub async fn report_half_open(
        &self,
        pool: &str,
        backend: &str,
        half_open: u64,
    ) -> anyhow::Result<()> {
        let body = format!("{{ \"half_open\": {half_open} }}");
        let head = format!(
            "POST /api/v1/backends/{pool}/{backend}/half_open HTTP/1.1\r\nHost: {}\r\n\
             Content-Type: application/json\r\nContent-Length: {}",
            self.admin,
            body.len()
        );
        request(self.admin, &head, &body).await.map(drop)
    }

    /// Scrapes until `wanted` is the case.
    ///
    /// # Errors
    ///
    /// When that takes too long.
    pub async fn wait_for(
        &self,
        what: &str,
        wanted: impl Fn(&Metrics) -> bool,
    ) -> anyhow::Result<Metrics> {
        for _ in 0..POLLS {
            let metrics = self.metrics().await?;
            if wanted(&metrics) {
                return Ok(metrics);
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        bail!("never happened: {what}\n{}", self.log())
    }

    /// Scrapes until no more datagrams come in.
    ///
    /// # Errors
    ///
    /// When they never stop.
    pub async fn at_rest(&self) -> anyhow::Result<Metrics> {
        let mut before = self.metrics().await?.verdicts();
        for _ in 0..POLLS {
            // Longer than the interval at which a waiting QUIC endpoint asks again.
            tokio::time::sleep(4 * POLL_INTERVAL).await;
            let metrics = self.metrics().await?;
            if metrics.verdicts() == before {
                return Ok(metrics);
            }
            before = metrics.verdicts();
        }
        bail!("datagrams keep coming in: {before:?}")
    }

    async fn wait_until_ready(&mut self) -> anyhow::Result<()> {
        for _ in 0..POLLS {
            if let Some(status) = self.process.try_wait()? {
                bail!("the balancer ended: {status}\n{}", self.log());
            }
            if get(self.admin, "/readyz").await.is_ok() {
                return Ok(());
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        bail!("the balancer does not become ready\n{}", self.log())
    }

    fn signal(&self, name: &str) -> anyhow::Result<()> {
        signal(self.process.id(), name)
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

const CONFIG: &str = "quic-lb.yaml";
const LOG: &str = "log";

fn spawn(folder: &Path) -> anyhow::Result<Child> {
    let log = File::options().create(true).append(true).open(folder.join(LOG))?;
    Command::new(binary::balancer()?)
        .args([OsStr::new("run"), OsStr::new("--config"), folder.join(CONFIG).as_os_str()])
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("the balancer does not start")
}

/// Sends a process a signal.
///
/// # Errors
///
/// When it is gone.
pub fn signal(process: u32, name: &str) -> anyhow::Result<()> {
    let id = process.to_string();
    let status = Command::new("sh").args(["-c", "kill -s \"$0\" \"$1\"", name, &id]).status()?;
    ensure!(status.success(), "no process {id} to send SIG{name} to");
    Ok(())
}

/// The body of a successful answer to `GET path`.
///
/// # Errors
///
/// When there is none.
pub async fn get(address: SocketAddr, path: &str) -> anyhow::Result<String> {
    request(address, &format!("GET {path} HTTP/1.1\r\nHost: {address}"), "").await
}

/// The body of a successful answer to a request with this head, as far as it differs.
async fn request(address: SocketAddr, head: &str, body: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("{head}\r\nConnection: close\r\n\r\n{body}");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").context("not HTTP")?;
    ensure!(head.starts_with("HTTP/1.1 2"), "{request}: {head}");
    Ok(body.to_owned())
}
