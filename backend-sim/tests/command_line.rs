//! The commands, through the real binary.

mod support;

use std::{
    io::{BufRead as _, BufReader},
    net::UdpSocket,
    process::{Child, Command, Output, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use support::CONFIG;

#[test]
fn a_server_reloads_on_hangup_and_drains_on_termination() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let config = folder.path().join("lb.yaml");
    std::fs::write(&config, CONFIG)?;
    let certificate = folder.path().join("cert.pem");
    let mut server = Server::start(&[
        "--config",
        config.to_str().context("UTF-8")?,
        "--backend",
        "a",
        "--listen",
        "127.0.0.1:0",
        "--write-cert",
        certificate.to_str().context("UTF-8")?,
    ])?;
    let listening = server.until("listening")?;
    let (_, address) = listening.split_once("address=").context("where it is")?;
    let load = backend_sim(&[
        "load",
        "--target",
        address.trim(),
        "--ca",
        certificate.to_str().context("UTF-8")?,
        "--duration",
        "300ms",
        "--json",
    ])?;
    ensure!(load.status.success(), "{load:?}");
    let report: Value = serde_json::from_slice(&load.stdout)?;
    ensure!(report["requests"].as_u64() > Some(0) && report["backends"]["a"].is_u64(), "{report}");
    server.signal("HUP")?;
    server.until("connection IDs rotated")?;
    std::fs::write(&config, "listeners: []")?;
    server.signal("HUP")?;
    server.until("the old configuration goes on")?;
    server.signal("TERM")?;
    server.until("draining")?;
    ensure!(server.process.wait()?.success(), "it ends well");
    Ok(())
}

#[test]
fn what_is_wrong_is_one_sentence_and_exit_1() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let config = folder.path().join("lb.yaml");
    std::fs::write(&config, CONFIG)?;
    let file = config.to_str().context("UTF-8")?;
    let taken = UdpSocket::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?.to_string();
    for (arguments, sentence) in [
        (&["--config", file, "--backend", "zz"][..], "there is no backend \"zz\""),
        (
            &["--config", file, "--backend", "a", "--listen", &address],
            "stop the process that listens there",
        ),
        (
            &["--config", file, "--backend", "a", "--cert", "/nowhere/c", "--key", "/nowhere/k"],
            "/nowhere/c does not hold a chain of certificates",
        ),
        (&["--config", "/nowhere/lb.yaml", "--backend", "a"], "No such file"),
    ] {
        let output = backend_sim(&[&["serve"], arguments].concat())?;
        let words = String::from_utf8(output.stderr)?;
        ensure!(output.status.code() == Some(1) && words.contains(sentence), "{words}");
        ensure!(!words.contains("panicked"), "{words}");
    }
    Ok(())
}

#[test]
fn what_is_not_understood_is_exit_2() -> anyhow::Result<()> {
    for arguments in [
        &["load", "--target", "127.0.0.1:1"][..],
        &["load", "--target", "127.0.0.1:1", "--insecure", "--rate", "0"],
        &["load", "--target", "127.0.0.1:1", "--insecure", "--size", "12"],
        &["serve", "--config", "x"],
        &["serve", "--config", "x", "--backend", "a", "--misbehave", "well"],
        &["serve", "--config", "x", "--backend", "a", "--config-id", "7"],
    ] {
        let output = backend_sim(arguments)?;
        ensure!(output.status.code() == Some(2), "{arguments:?}: {output:?}");
    }
    Ok(())
}

/// How long a server may take to say something.
const PATIENCE: Duration = Duration::from_secs(30);

struct Server {
    process: Child,
    log: mpsc::Receiver<String>,
}

impl Server {
    fn start(arguments: &[&str]) -> anyhow::Result<Self> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_backend-sim"));
        command.arg("serve").args(arguments).env("RUST_LOG", "info").stderr(Stdio::piped());
        let mut process = command.spawn()?;
        let lines = BufReader::new(process.stderr.take().context("its standard error")?).lines();
        // Read to the end, whoever listens: it must not find its standard error closed.
        let (said, log) = mpsc::channel();
        thread::spawn(move || lines.map_while(Result::ok).for_each(|line| drop(said.send(line))));
        Ok(Self { process, log })
    }

    /// The next line of its log that contains `words`.
    fn until(&self, words: &str) -> anyhow::Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.log.recv_timeout(left);
            let line = line.with_context(|| format!("it does not say {words:?}"))?;
            if line.contains(words) {
                return Ok(line);
            }
        }
    }

    fn signal(&self, name: &str) -> anyhow::Result<()> {
        let process = self.process.id().to_string();
        let sent = Command::new("kill").args([&format!("-{name}"), &process]).status()?;
        ensure!(sent.success(), "{sent}");
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // One that has ended is as good as one that is killed.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn backend_sim(arguments: &[&str]) -> anyhow::Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_backend-sim"));
    Ok(command.args(arguments).env_remove("RUST_LOG").output()?)
}

#[test]
fn a_flood_is_bounded_and_stays_on_this_machine() -> anyhow::Result<()> {
    let sink = UdpSocket::bind("127.0.0.1:0")?;
    let target = sink.local_addr()?.to_string();
    for kind in ["initials", "short", "garbage", "mixed"] {
        let output = backend_sim(&[
            "flood",
            "--target",
            &target,
            "--kind",
            kind,
            "--rate",
            "1000",
            "--duration",
            "300ms",
            "--json",
        ])?;
        ensure!(output.status.success(), "{output:?}");
        let report: Value = serde_json::from_slice(&output.stdout)?;
        let sent = report["sent"].as_u64().context("a number")?;
        ensure!((1..=400).contains(&sent), "{report}");
        sink.recv_from(&mut [0; 2000])?;
    }
    for refused in [
        &["--target", "192.0.2.1:443"][..],
        &["--target", &target, "--rate", "200001"],
        &["--target", &target, "--duration", "301s"],
        &["--target", &target, "--kind", "tokens"],
    ] {
        let output = backend_sim(&[&["flood"], refused].concat())?;
        ensure!(output.status.code() == Some(1) && output.stdout.is_empty(), "{output:?}");
    }
    Ok(())
}
