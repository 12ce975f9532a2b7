//! A Prometheus that scrapes two balancers, and faults that are done to them and their servers: what fires is what is wrong, and
//! nothing else.
//!
//! The rules are the shipped ones with seconds for minutes, so that a run takes two minutes, not an hour. `ALERTS_SCRAPE=15` has them as they
//! are, and scrapes every 15 seconds.

use std::{
    collections::BTreeSet,
    fs::File,
    net::{SocketAddr, UdpSocket},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use quic_lb_tests::{
    balancer::{Balancer, signal},
    binary,
    document::{Document, Listener, Pool, Scheme, free_address},
    site::LOCAL,
};
use serde_json::Value;

/// What is waited for takes so many scrapes at most, and far fewer than that.
const SCRAPES: u32 = 120;

/// Two balancers, three servers behind both, clients, and who watches.
struct Watched {
    folder: tempfile::TempDir,
    balancers: Vec<(Document, Balancer)>,
    servers: Vec<Child>,
    clients: Child,
    prometheus: Child,
    address: SocketAddr,
    scrape: Duration,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Prometheus: cargo test -p quic-lb-tests --test alerts -- --ignored"]
async fn a_prometheus_fires_what_is_wrong_and_nothing_else() -> anyhow::Result<()> {
    let mut watched = Watched::start().await?;
    watched.fires(&[], &[]).await.context("all is well")?;

    watched.kill_server(1)?;
    watched.fires(&["QuicLbBackendDown"], &[]).await.context("a server is dead")?;
    watched.start_server(1)?;
    watched.fires(&[], &["QuicLbBackendDown"]).await.context("it is back")?;

    tell(&watched.servers[1], "STOP")?;
    let silent = ["QuicLbBackendSilent"];
    watched.fires(&["QuicLbBackendDown"], &silent).await.context("a server is silent")?;
    tell(&watched.servers[1], "CONT")?;
    let before = ["QuicLbBackendDown", "QuicLbBackendSilent"];
    watched.fires(&[], &before).await.context("it goes on")?;

    watched.balancers[0].1.write_config("listeners: []\n")?;
    watched.fires(&["QuicLbConfigRejected"], &[]).await.context("a file is rejected")?;
    let (document, balancer) = &watched.balancers[0];
    balancer.write_config(&document.to_string())?;
    watched.fires(&[], &["QuicLbConfigRejected"]).await.context("it is in order again")?;

    let (document, balancer) = &watched.balancers[0];
    let mut other = document.clone();
    other.pools[0].backend("web-c").draining = true;
    balancer.write_config(&other.to_string())?;
    watched.fires(&["QuicLbConfigsDiffer"], &[]).await.context("balancers differ")?;
    let (document, balancer) = &watched.balancers[0];
    balancer.write_config(&document.to_string())?;
    watched.fires(&[], &["QuicLbConfigsDiffer"]).await.context("they agree again")?;

    // What is sent meanwhile is garbage, too.
    let (stop, flood) = watched.overflow()?;
    let dropped = watched.fires(&["QuicLbReceiveDropped"], &["QuicLbGarbage"]).await;
    drop(stop);
    flood.join().map_err(|_| anyhow::anyhow!("the flood"))??;
    dropped.context("the kernel has no room")?;
    let before = ["QuicLbReceiveDropped", "QuicLbGarbage"];
    watched.fires(&[], &before).await.context("it has room again")?;

    let down = ["QuicLbBackendDown"];
    watched.flap(2).await?;
    watched.fires(&["QuicLbBackendFlapping"], &down).await.context("a server comes and goes")?;
    let before = ["QuicLbBackendFlapping", "QuicLbBackendDown"];
    watched.fires(&[], &before).await.context("it stays")?;

    let (document, balancer) = watched.balancers.remove(1);
    drop(balancer);
    watched.fires(&["QuicLbGone"], &[]).await.context("a balancer is gone")?;
    let balancer = Balancer::start(&document).await?;
    watched.balancers.push((document, balancer));
    watched.fires(&[], &["QuicLbGone"]).await.context("it is back")
}

impl Watched {
    async fn start() -> anyhow::Result<Self> {
        let scrape = std::env::var("ALERTS_SCRAPE").ok().map_or(Ok(1), |text| text.parse())?;
        let folder = tempfile::tempdir()?;
        let pool = Pool::new("web", &[Scheme::FOUR_PASS], LOCAL, 3);
        let mut balancers = vec![];
        for _ in 0..2 {
            let address = free_address(LOCAL);
            let document = Document {
                listeners: vec![Listener { name: "edge".into(), address, pool: "web".into() }],
                pools: vec![pool.clone()],
                admin: free_address(LOCAL),
            };
            let balancer = Balancer::start(&document).await?;
            balancers.push((document, balancer));
        }
        std::fs::write(folder.path().join("lb.yaml"), balancers[0].0.to_string())?;
        let servers = pool.backends.iter().map(|backend| server(folder.path(), &backend.name));
        let servers = servers.collect::<anyhow::Result<_>>()?;
        let clients = Command::new(binary::backend_sim()?)
            .args(["load", "--insecure", "--json", "--duration", "2h", "--connections", "10"])
            .args(["--rate", "50", "--lifetime", "500ms", "--size", "1000B"])
            .args(["--target", &balancers[0].0.listeners[0].address.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let address = free_address(LOCAL);
        let targets: Vec<_> = balancers.iter().map(|(of, _)| of.admin.to_string()).collect();
        let rules = std::fs::read_to_string(super::rules())?;
        let rules = if scrape == 1 { in_seconds(&rules) } else { rules };
        std::fs::write(folder.path().join("rules.yaml"), rules)?;
        let config = serde_json::json!({
            "global": { "scrape_interval": format!("{scrape}s"), "evaluation_interval": format!("{scrape}s") },
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{ "job_name": "quic-lb", "static_configs": [{ "targets": targets }] }],
        });
        let file = folder.path().join("prometheus.yaml");
        std::fs::write(&file, config.to_string())?;
        let log = File::create(folder.path().join("prometheus.log"))?;
        let prometheus = Command::new(super::programs().join("prometheus"))
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()))
            .arg(format!("--web.listen-address={address}"))
            .stderr(log)
            .stdout(Stdio::null())
            .spawn()?;
        let scrape = Duration::from_secs(scrape);
        let watched = Self { folder, balancers, servers, clients, prometheus, address, scrape };
        let begin = Instant::now();
        // Until every target has been scraped once.
        while watched.value("sum(up)").await.ok().flatten().as_deref() != Some("2") {
            ensure!(begin.elapsed() < SCRAPES * watched.scrape, "{}", watched.log());
            tokio::time::sleep(watched.scrape).await;
        }
        Ok(watched)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("prometheus.log")).unwrap_or_default()
    }

    async fn ask(&self, path: &str) -> anyhow::Result<Value> {
        let url = format!("http://{}{path}", self.address);
        let answer = tokio::process::Command::new("curl").args(["-sf", &url]).output().await?;
        Ok(serde_json::from_slice(&answer.stdout)?)
    }

    /// The value of an expression that has one.
    async fn value(&self, expression: &str) -> anyhow::Result<Option<String>> {
        let answer = self.ask(&format!("/api/v1/query?query={expression}")).await?;
        Ok(answer["data"]["result"][0]["value"][1].as_str().map(str::to_owned))
    }

    /// Waits until these alerts fire and no others, and for some scrapes more. Meanwhile `besides` may.
    async fn fires(&self, wanted: &[&str], besides: &[&str]) -> anyhow::Result<()> {
        let wanted: BTreeSet<_> = wanted.iter().map(|name| (*name).to_owned()).collect();
        let may = |name: &String| wanted.contains(name) || besides.contains(&name.as_str());
        let mut firing = BTreeSet::new();
        let mut held = 0;
        for _ in 0..SCRAPES {
            let alerts = self.ask("/api/v1/alerts").await?;
            let alerts = alerts["data"]["alerts"].as_array().context("alerts")?;
            let alerts = alerts.iter().filter(|alert| alert["state"] == "firing");
            firing = alerts
                .filter_map(|of| of["labels"]["alertname"].as_str())
                .map(str::to_owned)
                .collect();
            if let Some(other) = firing.iter().find(|name| !may(name)) {
                bail!("{other} fires: {:#}", self.ask("/api/v1/alerts").await?);
            }
            // While something is wrong, more may be.
            let holds =
                if wanted.is_empty() { firing.is_empty() } else { firing.is_superset(&wanted) };
            held = if holds { held + 1 } else { 0 };
            if held == 3 {
                return Ok(());
            }
            tokio::time::sleep(self.scrape).await;
        }
        bail!("{firing:?} fire, and not {wanted:?}\n{}", self.balancers[0].1.log())
    }

    fn kill_server(&mut self, nth: usize) -> anyhow::Result<()> {
        self.servers[nth].kill()?;
        self.servers[nth].wait()?;
        Ok(())
    }

    fn start_server(&mut self, nth: usize) -> anyhow::Result<()> {
        let name = &self.balancers[0].0.pools[0].backends[nth].name;
        self.servers[nth] = server(self.folder.path(), name)?;
        Ok(())
    }

    /// Kills a server and starts it anew, until the first balancer has seen it down four times.
    async fn flap(&mut self, nth: usize) -> anyhow::Result<()> {
        let name = self.balancers[0].0.pools[0].backends[nth].name.clone();
        for _ in 0..4 {
            self.kill_server(nth)?;
            let balancer = &self.balancers[0].1;
            let is = |state: &'static str| {
                let name = name.clone();
                move |metrics: &quic_lb_tests::metrics::Metrics| {
                    metrics.sum("backend_state", &[("backend", &name), ("state", state)]) == 1
                }
            };
            balancer.wait_for("it is down", is("down")).await?;
            tokio::time::sleep(2 * self.scrape).await;
            self.start_server(nth)?;
            let balancer = &self.balancers[0].1;
            balancer.wait_for("it is back", is("active")).await?;
            tokio::time::sleep(2 * self.scrape).await;
        }
        Ok(())
    }

    /// Has the kernel drop what arrives at the first balancer: again and again that stands still for a moment and is sent more than it has
    /// room for. It ends when what is returned is dropped.
    fn overflow(
        &self,
    ) -> anyhow::Result<(std::sync::mpsc::Sender<()>, std::thread::JoinHandle<anyhow::Result<()>>)>
    {
        let (document, balancer) = &self.balancers[0];
        let (id, target) = (balancer.process_id(), document.listeners[0].address);
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let pause = Duration::from_millis(700);
        let flood = std::thread::spawn(move || {
            let socket = UdpSocket::bind((LOCAL, 0))?;
            let mut garbage = vec![0; 60_000];
            garbage[0] = 0xc0;
            while stopped.recv_timeout(pause) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                signal(id, "STOP")?;
                // Of version 0, which no client sends; together more than the largest buffer holds.
                for _ in 0..500 {
                    let _ = socket.send_to(&garbage, target);
                }
                signal(id, "CONT")?;
            }
            Ok(())
        });
        Ok((stop, flood))
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        for process in self.servers.iter_mut().chain([&mut self.clients, &mut self.prometheus]) {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

fn server(folder: &Path, name: &str) -> anyhow::Result<Child> {
    let config: PathBuf = folder.join("lb.yaml");
    let mut command = Command::new(binary::backend_sim()?);
    command.args(["serve", "--shards", "1", "--backend", name, "--config"]).arg(config);
    Ok(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?)
}

fn tell(process: &Child, name: &str) -> anyhow::Result<()> {
    signal(process.id(), name)
}

/// The rules with seconds for minutes.
fn in_seconds(rules: &str) -> String {
    let mut text = rules.to_owned();
    for (minutes, seconds) in [("1m", "3s"), ("5m", "5s"), ("10m", "8s"), ("15m", "8s")] {
        text = text.replace(&format!("for: {minutes}\n"), &format!("for: {seconds}\n"));
    }
    // A window has several scrapes in it.
    for (minutes, seconds) in [("5m", "15s"), ("10m", "20s"), ("15m", "90s")] {
        text = text.replace(&format!("[{minutes}]"), &format!("[{seconds}]"));
    }
    text
}
