//! The aioquic ends of tests: a Python with aioquic in it, and the script `foreign/peer.py`.
//!
//! Tests that need them are marked `#[ignore = "needs aioquic: …"]`, so that a run without them says
//! how many were left out and why. Who runs them by `--ignored`, as the gate does, wants them: then it
//! is an error if there is no Python.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
    sync::OnceCell,
    time::timeout,
};

use crate::{certificate::Certificate, site::LOCAL};

/// How long a server may take to start.
const PATIENCE: Duration = Duration::from_secs(60);
const CERTIFICATE: &str = "certificate.pem";
const KEY: &str = "key.pem";

/// The Python that has aioquic. The first test that asks makes it, below the target folder.
///
/// # Errors
///
/// When there is no Python, or aioquic is neither installed nor to be had from the network.
pub async fn python() -> Result<&'static Path> {
    static PYTHON: OnceCell<Result<PathBuf, String>> = OnceCell::const_new();
    let made = || async { make_python().await.map_err(|error| format!("{error:#}")) };
    match PYTHON.get_or_init(made).await {
        Ok(python) => Ok(python),
        Err(error) => bail!("no aioquic: {error}"),
    }
}

/// The peer in this role, with the certificate's files in `folder`.
///
/// # Errors
///
/// When they cannot be written.
pub fn command(
    python: &Path,
    role: &str,
    folder: &Path,
    certificate: &Certificate,
) -> Result<Command> {
    let (certificate, key) = certificate.pem();
    std::fs::write(folder.join(CERTIFICATE), certificate)?;
    std::fs::write(folder.join(KEY), key)?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("foreign/peer.py");
    let mut command = Command::new(python);
    command.arg(script).arg(role).arg("--certificate").arg(folder.join(CERTIFICATE));
    command.kill_on_drop(true).stderr(Stdio::piped());
    Ok(command)
}

/// A server on loopback, and where it is. It ends when it is dropped.
///
/// # Errors
///
/// When it does not start.
pub async fn serve(
    python: &Path,
    folder: &Path,
    certificate: &Certificate,
    arguments: &[&str],
) -> Result<(Child, SocketAddr)> {
    let mut command = command(python, "serve", folder, certificate)?;
    command.args(["--key".into(), folder.join(KEY)]).args(arguments);
    let mut server = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let output = server.stdout.take().context("no output")?;
    let mut lines = BufReader::new(output).lines();
    let line = timeout(PATIENCE, lines.next_line()).await.context("it does not start")??;
    let line = line.context("no server")?;
    let port = line.strip_prefix("ready ").context("no port")?.parse()?;
    Ok((server, SocketAddr::new(LOCAL, port)))
}

async fn make_python() -> Result<PathBuf> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    // The test runs as target/PROFILE/deps/TEST.
    let executable = std::env::current_exe()?;
    let target = executable.ancestors().nth(3).context("a test outside of a target folder")?;
    let folder = target.join("tmp/aioquic");
    std::fs::create_dir_all(target.join("tmp"))?;
    let made = Command::new(manifest.join("foreign/venv")).arg(folder).output().await?;
    if !made.status.success() {
        bail!("{}", String::from_utf8_lossy(&made.stderr).trim());
    }
    Ok(PathBuf::from(String::from_utf8(made.stdout)?.trim()))
}
