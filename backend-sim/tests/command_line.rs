//! The commands, through the real binary.

mod support;

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream, UdpSocket},
    process::{Child, Command, Output, Stdio},
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, ensure};
use backend_sim::{certificate::Trust, load::Session};
use quic::{
    ConnectionId,
    driver::Endpoint,
    h3::ALPN,
    header::Version,
    initial::{Initial, Sender},
    token::{RetryClaim, TokenKey, nat},
    transport::{ClientConfig, ConnectionError},
};
use serde_json::Value;
use support::{CONFIG, NAME, text};

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

/// By a file of its own, or by what the configuration says for all servers of the pool.
#[tokio::test]
async fn clients_of_a_server_that_was_killed_and_started_anew_know_at_once() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(path("reset.key"), "00112233445566778899aabbccddeeff\n")?;
    std::fs::write(path("alone.yaml"), CONFIG)?;
    let backends = "    backends:";
    let fleet = format!("    stateless_reset: {{ key_file: reset.key }}\n{backends}");
    std::fs::write(path("fleet.yaml"), CONFIG.replace(backends, &fleet))?;
    for (config, own) in [("alone.yaml", true), ("fleet.yaml", false)] {
        let address = UdpSocket::bind("127.0.0.1:0")?.local_addr()?;
        let (listen, config, key) = (address.to_string(), path(config), path("reset.key"));
        let mut arguments = vec!["--config", &*config, "--backend", "a", "--listen", &*listen];
        if own {
            arguments.extend(["--reset-key-file", &*key]);
        }
        let start = || -> anyhow::Result<Server> {
            let server = Server::start(&arguments)?;
            server.until("listening")?;
            Ok(server)
        };
        let server = start()?;
        let client = ClientConfig::new(Arc::new(Trust::Everybody.client(&[ALPN])?));
        let endpoint = Endpoint::client("127.0.0.1:0".parse()?)?;
        let session = Session::open(&endpoint, &client, address, NAME).await?;
        ensure!(text(&session, "/health").await? == "ok\n", "it answers");
        drop(server);
        let _server = start()?;
        let (_, ended) = tokio::join!(text(&session, "/health"), session.connection().closed());
        ensure!(ended == ConnectionError::Reset, "{ended:?}");
    }
    Ok(())
}

#[test]
fn the_load_client_says_that_its_connections_were_reset() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(path("reset.key"), "00112233445566778899aabbccddeeff\n")?;
    std::fs::write(path("lb.yaml"), CONFIG)?;
    let address = UdpSocket::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let (config, key) = (path("lb.yaml"), path("reset.key"));
    let start = || -> anyhow::Result<Server> {
        let own = ["--backend", "a", "--listen", &address, "--reset-key-file", &key];
        let server = Server::start(&[&["--config", &*config], &own[..]].concat())?;
        server.until("listening")?;
        Ok(server)
    };
    let server = start()?;
    let mut load = Command::new(env!("CARGO_BIN_EXE_backend-sim"));
    load.args(["load", "--target", &address, "--insecure", "--connections", "3"]);
    load.args(["--rate", "100", "--duration", "8s", "--json"]);
    let load =
        load.stdout(Stdio::piped()).stderr(Stdio::piped()).env("RUST_LOG", "info").spawn()?;
    // Long enough for all to have connected, and not for the load to end.
    thread::sleep(Duration::from_secs(2));
    drop(server);
    thread::sleep(Duration::from_millis(1500));
    let _server = start()?;
    let output = load.wait_with_output()?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(report["lost_by_cause"] == serde_json::json!({ "stateless_reset": 3 }), "{report}");
    let log = String::from_utf8(output.stderr)?;
    ensure!(log.contains("connections are lost") && log.contains("stateless_reset"), "{log}");
    Ok(())
}

#[test]
fn refused_tokens_are_counted_by_reason_and_told_with_what_to_compare() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let config = folder.path().join("lb.yaml").display().to_string();
    let keys = format!("retry: {{ keys: [{{ sequence: 3, key: \"{}\" }}] }}\n", "07".repeat(16));
    std::fs::write(&config, format!("{CONFIG}{keys}"))?;
    let listen = UdpSocket::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let metrics = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let own = ["--backend", "a", "--listen", &listen, "--metrics", &metrics];
    let server = Server::start(&[&["--config", &*config], &own[..]].concat())?;
    server.until("listening")?;
    let client = UdpSocket::bind("127.0.0.1:0")?;
    for (sequence, key) in [(3, [7; 16]), (4, [7; 16]), (3, [8; 16])] {
        let dcid = ConnectionId::new(b"of the Retry").context("it is short")?;
        let claim = RetryClaim {
            original_dcid: ConnectionId::new(b"drawn first").context("it is short")?,
            client: client.local_addr()?,
            // A clock stands still.
            expires: SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000),
        };
        let key = TokenKey::new(sequence, key, [0; 12]).context("a key")?;
        let token = nat::seal(&key, [1; 12], &claim, &dcid).context("a token")?;
        let initial = Initial {
            version: Version::V1,
            sender: Sender::Client,
            key_cid: &dcid,
            dcid: &dcid,
            scid: b"client",
            token: &token,
            frames: &[0; 1200],
        };
        let mut octets = [0; 1500];
        let len = initial.write(&mut octets).context("it fits")?;
        client.send_to(&octets[..len], &listen)?;
        client.recv_from(&mut octets)?;
    }
    // Each once, in whatever order the looks at them fall.
    let mut lines = Vec::new();
    for _ in 0..3 {
        lines.push(server.until("Retry tokens are refused")?);
    }
    for (why, hint) in [("unknown_key", "retry.keys"), ("seal", "forged"), ("expired", "clocks")] {
        let told = lines.iter().any(|line| line.contains(why) && line.contains(hint));
        ensure!(told, "{why}: {lines:?}");
    }
    let mut scrape = TcpStream::connect(&metrics)?;
    scrape.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    scrape.read_to_string(&mut text)?;
    for why in ["expired", "unknown_key", "seal"] {
        let line = format!("backend_sim_address_tokens_total{{result=\"{why}\"}} 1");
        ensure!(text.contains(&line), "{text}");
    }
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
