//! Rotation with the programs that operators run, one process each: two balancers, three servers, and clients that go on meanwhile. All
//! config IDs take their turns, and so do keys of tokens, each step when `quic-lb rotate` says so; nothing is lost, and no server sees a
//! datagram that is meant for another one.

use std::{
    fs::File,
    net::SocketAddr,
    path::PathBuf,
    process::{Output, Stdio},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use quic_lb_config::Surroundings;
use quic_lb_tests::{
    balancer::{self, Balancer, get},
    binary,
    certificate::Certificate,
    document::{Document, Listener, Pool, Scheme, free_address},
    metrics::Metrics,
    site::LOCAL,
};
use serde_json::Value;
use tempfile::TempDir;
use tokio::process::{Child, Command};

/// Config IDs that there are.
const IDS: usize = 7;
const BALANCERS: usize = 2;
const SERVERS: u8 = 3;
/// Together far more than anything here takes.
const POLLS: usize = 1200;
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// A flow that goes on with another ID after a pause may for so many seconds count as heard with both (`lb/src/flows/census.rs`), and a
/// reload would be refused.
const SILENT: f64 = 11.;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_config_ids_take_turns_under_load_and_nothing_is_lost() -> anyhow::Result<()> {
    rotate_ids(IDS + 1).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes: cargo test -p quic-lb-tests --test rotation -- --ignored"]
async fn config_ids_go_round_several_times_and_nothing_is_lost() -> anyhow::Result<()> {
    rotate_ids(4 * IDS + 1).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn token_keys_take_turns_under_load_and_nothing_is_lost() -> anyhow::Result<()> {
    rotate_keys(3).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes minutes: cargo test -p quic-lb-tests --test rotation -- --ignored"]
async fn token_keys_take_many_turns_and_nothing_is_lost() -> anyhow::Result<()> {
    rotate_keys(40).await
}

/// Goes on to the next config ID so many times, each time with another key.
async fn rotate_ids(steps: usize) -> anyhow::Result<()> {
    let mut site = Site::start(Plan { schemes: vec![scheme(0)], retry: "", keys: vec![] }).await?;
    let web = ["ids", "web"];
    let loads = site.loads().await?;
    for step in 1..=steps {
        // What is not used any more goes, and with it the ID that is to be used again.
        let newest = scheme(step);
        site.wait_for_ids("the next ID is free", |ids| {
            ids.iter().all(|id| id.config_id != newest.config_id || id.is_silent)
        })
        .await?;
        let ids = site.ids().await?;
        site.plan.schemes.retain(|scheme| {
            ids.iter().any(|id| id.config_id == scheme.config_id && !id.is_silent)
        });
        site.plan.schemes.push(newest);
        // Balancers first, one after the other, and then the servers.
        if step == 1 {
            let early = site.rotate(&web, "1", "100ms").await?;
            ensure!(early.0 == Some(3), "no balancer has been told: {early:?}");
        }
        site.reload_balancers().await?;
        site.until(&web, "1").await?;
        let early = site.rotate(&web, "2", "500ms").await?;
        ensure!(
            early.0 == Some(3) && early.1.contains("next: reload the servers web-a, web-b, web-c"),
            "no server has been told: {early:?}"
        );
        site.reload_servers().await?;
        site.until(&web, "2").await?;
        site.wait_for_more(30).await?;
    }
    site.until(&web, "3").await?;
    site.plan.schemes = vec![scheme(steps)];
    site.reload_balancers().await?;
    site.until(&web, "4").await?;
    site.reload_servers().await?;
    site.wait_for_more(30).await?;
    site.end(loads).await
}

/// Goes on to another key so many times.
async fn rotate_keys(steps: u8) -> anyhow::Result<()> {
    let plan = Plan { schemes: vec![scheme(0)], retry: "always", keys: vec![0] };
    let mut site = Site::start(plan).await?;
    let loads = site.loads().await?;
    for step in 1..=steps {
        let (old, new) = (site.plan.keys[0], step);
        let key = new.to_string();
        let key = ["tokens", &key];
        site.plan.keys = vec![old, new];
        if step == 1 {
            // At the end of the list it does no harm, and is not gone on with.
            site.reload_balancers().await?;
            let early = site.rotate(&key, "2", "2s").await?;
            let says = "give key 1 to the servers web/web-a, web/web-b, web/web-c";
            ensure!(early.0 == Some(3) && early.1.contains(says), "no server has it: {early:?}");
        }
        site.reload_servers().await?;
        site.reload_balancers().await?;
        site.until(&key, "2").await?;
        site.plan.keys = vec![new, old];
        site.reload_balancers().await?;
        site.until(&key, "3").await?;
        // Longer than a token is under way.
        site.wait_for_more(60).await?;
        site.plan.keys = vec![new];
        site.reload_balancers().await?;
        site.until(&key, "4").await?;
        site.wait_for_more(30).await?;
        site.reload_servers().await?;
    }
    for balancer in &site.balancers {
        let metrics = balancer.metrics().await?;
        let (asked, valid) = (
            metrics.sum("retry_sent_total", &[]),
            metrics.sum("retry_tokens_total", &[("result", "valid")]),
        );
        ensure!(asked > 50 && valid > 50, "{asked} were asked, {valid} have proved their address");
        let refused = metrics.sum("datagrams_dropped_total", &[("reason", "invalid_token")])
            + metrics.sum("datagrams_replied_total", &[("kind", "invalid_token")]);
        ensure!(refused == 0, "{refused} tokens were refused");
    }
    site.end(loads).await
}

/// That of a step: each has another key, and other lengths than the one before.
fn scheme(step: usize) -> Scheme {
    let config_id = u8::try_from(step % IDS).unwrap_or_default();
    let key: &'static str = format!("{step:032x}").leak();
    Scheme { config_id, server_id_length: 2 + step % 2, nonce_length: 6 + step % 3, key: Some(key) }
}

/// What all of them are configured by.
struct Plan {
    schemes: Vec<Scheme>,
    /// The mode of address validation; none without.
    retry: &'static str,
    keys: Vec<u8>,
}

/// What a balancer says of a config ID.
struct Id {
    config_id: u8,
    is_silent: bool,
}

struct Site {
    plan: Plan,
    pool: Pool,
    /// Each its own.
    documents: Vec<Document>,
    balancers: Vec<Balancer>,
    servers: Vec<Server>,
    folder: TempDir,
}

struct Server {
    process: Child,
    log: PathBuf,
    metrics: SocketAddr,
    reloads: usize,
}

impl Site {
    async fn start(plan: Plan) -> anyhow::Result<Self> {
        let mut pool = Pool::new("web", &plan.schemes, LOCAL, SERVERS);
        // Balancers find that out by asking.
        pool.honours_tokens = false;
        let document = |_| {
            let (name, pool_name) = ("edge".to_owned(), pool.name.clone());
            let listener = Listener { name, address: free_address(LOCAL), pool: pool_name };
            let pools = vec![pool.clone()];
            Document { listeners: vec![listener], pools, admin: free_address(LOCAL) }
        };
        let documents: Vec<_> = (0..BALANCERS).map(document).collect();
        let folder = tempfile::tempdir()?;
        let mut site = Self { plan, pool, documents, balancers: vec![], servers: vec![], folder };
        site.start_servers().await?;
        for document in &site.documents {
            let text = site.text(document);
            site.balancers.push(Balancer::start_from(&text, document.admin).await?);
        }
        Ok(site)
    }

    async fn start_servers(&mut self) -> anyhow::Result<()> {
        let file = |name: &str| self.folder.path().join(name);
        let certificate = Certificate::new()?;
        std::fs::write(file("lb.yaml"), self.text(&self.documents[0]))?;
        std::fs::write(file("cert.pem"), certificate.pem().0)?;
        std::fs::write(file("key.pem"), certificate.pem().1)?;
        for backend in &self.pool.backends {
            let (log, metrics) = (file(&backend.name), free_address(LOCAL));
            let mut command = Command::new(binary::backend_sim()?);
            command.args(["serve", "--backend", &backend.name, "--metrics", &metrics.to_string()]);
            command.arg("--config").arg(file("lb.yaml"));
            command.arg("--cert").arg(file("cert.pem")).arg("--key").arg(file("key.pem"));
            let process = command.stderr(File::create(&log)?).kill_on_drop(true).spawn()?;
            self.servers.push(Server { process, log, metrics, reloads: 0 });
        }
        for server in &self.servers {
            server.wait_for("listening", 1).await?;
        }
        Ok(())
    }

    fn text(&self, document: &Document) -> String {
        let mut document = document.clone();
        document.pools[0].schemes.clone_from(&self.plan.schemes);
        let Plan { retry, keys, .. } = &self.plan;
        if retry.is_empty() {
            return document.to_string();
        }
        let key =
            |n: &u8| format!("{{ sequence: {n}, key: \"{}\" }}", format!("{n:02x}").repeat(16));
        let keys: Vec<_> = keys.iter().map(key).collect();
        format!("{document}retry: {{ mode: {retry}, keys: [{}] }}\n", keys.join(", "))
    }

    /// One after the other, each when the one before has taken it.
    async fn reload_balancers(&self) -> anyhow::Result<()> {
        for (balancer, document) in self.balancers.iter().zip(&self.documents) {
            let text = self.text(document);
            let loaded = quic_lb_config::from_str(&text, &Surroundings::of_text("plan"));
            let digest = loaded.map_err(|report| anyhow::anyhow!("{report}"))?.config.digest();
            balancer.write_config(&text)?;
            let in_force =
                |metrics: &Metrics| metrics.sum("config_info", &[("digest", &digest)]) == 1;
            balancer.wait_for("the configuration is in force", in_force).await?;
        }
        Ok(())
    }

    async fn reload_servers(&mut self) -> anyhow::Result<()> {
        let file = self.folder.path().join("lb.yaml");
        std::fs::write(&file, self.text(&self.documents[0]))?;
        for server in &mut self.servers {
            server.reloads += 1;
            server.signal("HUP")?;
            server.wait_for("reloaded", server.reloads).await?;
        }
        Ok(())
    }

    /// Asks how far a rotation is: the exit code, and what was said.
    async fn rotate(
        &self,
        what: &[&str],
        until: &str,
        timeout: &str,
    ) -> anyhow::Result<(Option<i32>, String)> {
        let mut command = Command::new(binary::balancer()?);
        command.arg("rotate").args(what).args(["--until", until, "--timeout", timeout]);
        command.args(self.documents.iter().map(|document| format!("http://{}", document.admin)));
        let output = command.stdin(Stdio::null()).output().await?;
        let said = [output.stdout, output.stderr].concat();
        Ok((output.status.code(), String::from_utf8(said)?))
    }

    /// Waits for a step of a rotation.
    async fn until(&self, what: &[&str], step: &str) -> anyhow::Result<()> {
        let (code, said) = self.rotate(what, step, "60s").await?;
        ensure!(code == Some(0), "{what:?}, step {step}: {code:?}, {said}");
        Ok(())
    }

    /// As each balancer hears of them.
    async fn ids(&self) -> anyhow::Result<Vec<Id>> {
        let mut ids = vec![];
        for document in &self.documents {
            let told: Value =
                serde_json::from_str(&get(document.admin, "/api/v1/rotation").await?)?;
            for id in told.as_array().context("a list")? {
                let config_id = id["config_id"].as_u64().context("a config ID")?.try_into()?;
                let heard = id["heard_seconds_ago"].as_f64();
                let is_silent = id["unused"] == true && heard.is_none_or(|heard| heard >= SILENT);
                ids.push(Id { config_id, is_silent });
            }
        }
        Ok(ids)
    }

    async fn wait_for_ids(&self, what: &str, wanted: impl Fn(&[Id]) -> bool) -> anyhow::Result<()> {
        for _ in 0..POLLS {
            if wanted(&self.ids().await?) {
                return Ok(());
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        anyhow::bail!("never happened: {what}")
    }

    /// Waits until every server has made so many more connections.
    async fn wait_for_more(&self, connections: u64) -> anyhow::Result<()> {
        for server in &self.servers {
            let before = server.counted("connections_accepted_total").await?;
            let mut polls = 0..POLLS;
            while server.counted("connections_accepted_total").await? < before + connections / 3 {
                ensure!(polls.next().is_some(), "the load has come to a stop");
                tokio::time::sleep(POLL_INTERVAL).await;
            }
        }
        Ok(())
    }

    /// Through each balancer: connections that last and move, and others that come and go.
    async fn loads(&self) -> anyhow::Result<Vec<Child>> {
        let mut loads = vec![];
        for document in &self.documents {
            for kind in [
                ["--connections", "12", "--rebind-every", "700ms", "--migrate-every", "1100ms"],
                ["--connections", "12", "--lifetime", "300ms", "--size", "4KiB"],
            ] {
                let mut load = Command::new(binary::backend_sim()?);
                load.args(["load", "--insecure", "--json", "--rate", "60", "--duration", "1h"]);
                load.args(["--target", &document.listeners[0].address.to_string()]).args(kind);
                load.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
                loads.push(load.stderr(Stdio::null()).spawn()?);
            }
        }
        self.wait_for_more(30).await?;
        Ok(loads)
    }

    /// Ends the clients, and says what became of them and of their datagrams.
    async fn end(mut self, loads: Vec<Child>) -> anyhow::Result<()> {
        for load in loads {
            signal(&load, "TERM")?;
            let Output { stdout, .. } = load.wait_with_output().await?;
            let report: Value = serde_json::from_slice(&stdout)?;
            for none in ["lost", "misrouted", "silent"] {
                ensure!(report[none] == 0, "{none}: {report:#}");
            }
            for none in ["handshakes_failed", "requests_failed"] {
                ensure!(
                    report[none].as_object().is_some_and(serde_json::Map::is_empty),
                    "{report:#}"
                );
            }
            ensure!(report["requests"].as_u64() > Some(100), "{report:#}");
        }
        for balancer in &self.balancers {
            let metrics = balancer.at_rest().await?;
            ensure!(metrics.verdicts().add_up(), "{:?}", metrics.verdicts());
            let unknown = metrics.by_label("unknown_server_id_total", "config_id");
            ensure!(unknown.is_empty(), "no backend has them: {unknown:?}");
        }
        for server in &mut self.servers {
            let misrouted = server.counted("misrouted_datagrams_total").await?;
            let stray =
                server.counted("unknown_cid_datagrams_total{server_id=\"unknown\"}").await?;
            ensure!(
                (misrouted, stray) == (0, 0),
                "{misrouted} of other servers, {stray} of nobody"
            );
        }
        Ok(())
    }
}

impl Server {
    fn signal(&self, name: &str) -> anyhow::Result<()> {
        signal(&self.process, name)
    }

    async fn wait_for(&self, words: &str, times: usize) -> anyhow::Result<()> {
        for _ in 0..POLLS {
            let log = std::fs::read_to_string(&self.log)?;
            ensure!(!log.contains("not reloaded"), "{log}");
            if log.matches(words).count() >= times {
                return Ok(());
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        anyhow::bail!("never in the log: {words}\n{}", std::fs::read_to_string(&self.log)?)
    }

    /// The sample with this name; 0 where there is none.
    async fn counted(&self, name: &str) -> anyhow::Result<u64> {
        let scrape = get(self.metrics, "/metrics").await?;
        let value = |line: &str| {
            line.strip_prefix("backend_sim_")?.strip_prefix(name)?.strip_prefix(' ')?.parse().ok()
        };
        Ok(scrape.lines().find_map(value).unwrap_or(0))
    }
}

fn signal(process: &Child, name: &str) -> anyhow::Result<()> {
    balancer::signal(process.id().context("it has ended")?, name)
}
