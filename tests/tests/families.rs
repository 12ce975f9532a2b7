//! Every metric family of the balancer is set by something: one process lives through what balancers live through, and shows it; of what it
//! does not show, it is written down which code sets it and which test sees that. Counters never go back meanwhile.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::UdpSocket,
    path::Path,
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use quic_lb::metrics::FAMILIES;
use quic_lb_tests::{
    balancer::{Balancer, get, signal},
    binary,
    document::{Document, Listener, Pool, Scheme, free_address},
    site::LOCAL,
};
use tempfile::TempDir;
use tokio::process::{Child, Command};

/// Together far more than anything here takes.
const POLLS: usize = 200;
/// How often a server is killed at most.
const TURNS: usize = 8;
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Fewer than there are strangers.
const FLOWS: usize = 64;
const STRANGERS: usize = 150;
/// More than the buffer of a listener has room for.
const FLOOD: usize = 20_000;

/// What the process below does not show.
struct Explained {
    family: &'static str,
    /// The file and the words by which it is set.
    set: [&'static str; 2],
    /// The file and the test that sees it.
    seen: [&'static str; 2],
}

const EXPLAINED: &[Explained] = &[
    Explained {
        family: "quic_lb_return_failed_total",
        set: ["lb/src/worker/back.rs", "counters.return_failed.add("],
        seen: [
            "lb/tests/datapath.rs",
            "fn a_datagram_goes_as_far_as_its_sender_said_and_no_further_both_ways()",
        ],
    },
    Explained {
        family: "quic_lb_return_stale_total",
        set: ["lb/src/worker/back.rs", "counters.return_stale.add("],
        seen: [
            "lb/tests/datapath.rs",
            "fn what_is_for_another_client_of_the_port_is_not_sent_on()",
        ],
    },
    Explained {
        family: "quic_lb_backend_misnamed_total",
        set: ["lb/src/counters.rs", "self.misnamed.add("],
        seen: [
            "tests/tests/own_server.rs",
            "fn a_server_that_answers_under_anothers_id_gets_no_new_connections_until_it_is_mended()",
        ],
    },
    Explained {
        family: "quic_lb_connection_log_dropped_total",
        set: ["lb/src/connection_log/writer.rs", "add(&self.queues.lost,"],
        seen: ["lb/tests/connection_log.rs", "fn a_full_disk_costs_records_and_nothing_else()"],
    },
    Explained {
        family: "quic_lb_workers_stuck",
        set: ["lb/src/control/plane/views.rs", "stuck: self.stuck().len()"],
        seen: ["tests/netns/suite.py", "def stuck(self)"],
    },
    Explained {
        family: "quic_lb_worker_panics_total",
        set: ["lb/src/counters.rs", "self.panics.add(1)"],
        seen: ["lb/src/worker/tests.rs", "fn a_panic_takes_only_the_flows_of_its_worker_along()"],
    },
    // Tokens of the format that is good for servers behind a balancer have none.
    Explained {
        family: "quic_lb_retry_key_token_limit",
        set: ["lb/src/admission/tokens.rs", "limit: limit(known.format)"],
        seen: ["lb/src/admission/tokens.rs", "fn uses_of_a_key_are_counted_over_reloads()"],
    },
    // The clock of servers on this machine is ours.
    Explained {
        family: "quic_lb_clock_skew_seconds",
        set: ["lb/src/control/plane/backends.rs", "watched.clock_skew = ahead"],
        seen: [
            "lb/src/control/plane/tests/tokens.rs",
            "fn the_clock_of_a_backend_is_shown_as_far_as_it_is_known()",
        ],
    },
];

#[test]
fn what_explains_a_family_is_there() -> anyhow::Result<()> {
    for Explained { family, set, seen } in EXPLAINED {
        for [file, words] in [set, seen] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file);
            let text = std::fs::read_to_string(path).with_context(|| (*file).to_owned())?;
            ensure!(text.contains(words), "{family}: {file} has no {words}");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_family_is_set_in_the_life_of_a_process_or_explained_and_no_counter_goes_back()
-> anyhow::Result<()> {
    let mut life = Life::start().await?;
    let id = life.balancer.process_id();
    life.until("servers that do not honour tokens", &["retry_unsupported"]).await?;
    let validates = "quic_lb_retry_phase{listener=\"to-web\",phase=\"active\"}";
    life.until_sample("servers that do", validates).await?;
    life.load(0, &["--rebind-every", "300ms"])?;
    life.load(0, &["--lifetime", "300ms"])?;
    life.load(1, &["--lifetime", "300ms"])?;
    life.balancer.report_half_open("web", "web-a", 5).await?;
    life.until("clients", &["path_changes_total", "retry_tokens_total", "live_cids", "remembered"])
        .await?;

    let strangers = (0..STRANGERS).map(|_| Ok(UdpSocket::bind((LOCAL, 0))?));
    let strangers = strangers.collect::<anyhow::Result<Vec<_>>>()?;
    let web = life.document.listeners[0].address;
    for (stranger, n) in strangers.iter().zip(0u8..) {
        // A short header with a connection ID of the configuration, and of nobody; and what is not QUIC.
        let octets = [&[0x40, 8, n, 7, 7, 7, 7, 7, 7, 7, 7][..], &[n; 40]].concat();
        stranger.send_to(&octets, web)?;
        stranger.send_to(&[0], web)?;
    }
    life.until(
        "strangers",
        &["unknown_server_id_total", "datagrams_dropped_total", "flows_evicted_total"],
    )
    .await?;

    life.balancer.write_config("listeners: nonsense\n")?;
    life.until_sample("a refused file", "quic_lb_config_reloads_total{result=\"rejected\"}")
        .await?;
    life.balancer.write_config(&life.text().replace("drain: \"1s\"", "drain: \"2s\""))?;
    life.until_sample("a reload", "quic_lb_config_reloads_total{result=\"applied\"}").await?;

    signal(id, "STOP")?;
    for _ in 0..FLOOD {
        // One that is refused is as good as one that is dropped.
        let _ = strangers[0].send_to(&[0; 1_200], web);
    }
    signal(id, "CONT")?;
    life.until("a flood", &["receive_dropped_total"]).await?;

    // Nobody may have begun a connection between its end and the refusal that has it down.
    let refused = ["backend_refused_total", "backend_refused_moved_total"];
    for turn in 1..=TURNS {
        life.server("web-a")?.kill().await?;
        if life.sees(&refused, POLLS / TURNS).await? {
            break;
        }
        ensure!(turn < TURNS, "no first flight was moved: {}", life.balancer.log());
        life.start_server("web-a", "web.yaml")?;
        let active = "quic_lb_backend_state{backend=\"web-a\",pool=\"web\",state=\"active\"}";
        life.until_sample("it is back", active).await?;
    }
    let other = life.server("web-b")?.id().context("it runs")?;
    signal(other, "STOP")?;
    let silent = [
        "pool_panic",
        "backend_unanswered_total",
        "backend_silent_seconds",
        "retry_unfinished_total",
    ];
    life.until("no server that answers", &silent).await?;

    let explained: BTreeSet<_> = EXPLAINED.iter().map(|of| of.family).collect();
    let all: BTreeSet<_> = FAMILIES.iter().map(|family| family.name).collect();
    let unset = all.iter().filter(|name| !life.set.contains(**name) && !explained.contains(*name));
    let unset: Vec<_> = unset.collect();
    ensure!(unset.is_empty(), "nothing sets them, or it is not written down what does: {unset:?}");
    let unknown: Vec<_> = explained.difference(&all).collect();
    ensure!(unknown.is_empty(), "there are no such families: {unknown:?}");
    for (name, kind) in &life.kinds {
        ensure!((kind == "counter") == name.ends_with("_total"), "{name} is a {kind}");
    }
    Ok(())
}

struct Life {
    document: Document,
    balancer: Balancer,
    servers: Vec<(String, Child)>,
    loads: Vec<Child>,
    folder: TempDir,
    /// What each family is.
    kinds: BTreeMap<String, String>,
    /// Families that have shown something else than 0.
    set: BTreeSet<String>,
    /// Samples of the last scrape.
    samples: BTreeMap<String, f64>,
}

impl Life {
    async fn start() -> anyhow::Result<Self> {
        let mut web = Pool::new("web", &[Scheme::FOUR_PASS], LOCAL, 2);
        let mut plain = Pool::new("plain", &[], LOCAL, 1);
        (web.honours_tokens, plain.honours_tokens) = (false, false);
        let pools = vec![web, plain];
        let listener = |pool: &Pool| Listener {
            name: format!("to-{}", pool.name),
            address: free_address(LOCAL),
            pool: pool.name.clone(),
        };
        let listeners = pools.iter().map(listener).collect();
        let document = Document { listeners, pools, admin: free_address(LOCAL) };
        let folder = tempfile::tempdir()?;
        // Servers of the second pool know no keys of tokens.
        let keyless = document.to_string();
        let text = text(&document, folder.path());
        std::fs::write(folder.path().join("web.yaml"), &text)?;
        std::fs::write(folder.path().join("plain.yaml"), keyless)?;
        let balancer = Balancer::start_from(&text, document.admin).await?;
        let (kinds, set, samples) = Default::default();
        let (servers, loads) = (vec![], vec![]);
        let mut life = Self { document, balancer, servers, loads, folder, kinds, set, samples };
        for (name, file) in
            [("web-a", "web.yaml"), ("web-b", "web.yaml"), ("plain-a", "plain.yaml")]
        {
            life.start_server(name, file)?;
        }
        Ok(life)
    }

    fn start_server(&mut self, name: &str, file: &str) -> anyhow::Result<()> {
        let mut server = Command::new(binary::backend_sim()?);
        server.args(["serve", "--backend", name, "--config"]).arg(self.folder.path().join(file));
        self.servers.retain(|(of, _)| of != name);
        self.servers.push((name.to_owned(), quiet(server).spawn()?));
        Ok(())
    }

    fn text(&self) -> String {
        text(&self.document, self.folder.path())
    }

    fn load(&mut self, listener: usize, how: &[&str]) -> anyhow::Result<()> {
        let mut load = Command::new(binary::backend_sim()?);
        load.args(["load", "--insecure", "--rate", "40", "--duration", "1h", "--connections", "8"]);
        load.args(["--target", &self.document.listeners[listener].address.to_string()]).args(how);
        self.loads.push(quiet(load).spawn()?);
        Ok(())
    }

    fn server(&mut self, name: &str) -> anyhow::Result<&mut Child> {
        let server = self.servers.iter_mut().find(|(of, _)| of == name);
        Ok(&mut server.context("no such server")?.1)
    }

    /// Scrapes until each of these families has shown something.
    async fn until(&mut self, what: &str, families: &[&str]) -> anyhow::Result<()> {
        let seen = self.sees(families, POLLS).await?;
        ensure!(seen, "{what}: not all of {families:?} in {:?}\n{}", self.set, self.balancer.log());
        Ok(())
    }

    /// Whether each of these families has shown something by the last of so many scrapes.
    async fn sees(&mut self, families: &[&str], polls: usize) -> anyhow::Result<bool> {
        for _ in 0..polls {
            self.scrape().await?;
            if families.iter().all(|name| self.set.contains(&format!("quic_lb_{name}"))) {
                return Ok(true);
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        Ok(false)
    }

    async fn until_sample(&mut self, what: &str, sample: &str) -> anyhow::Result<()> {
        for _ in 0..POLLS {
            self.scrape().await?;
            if self.samples.get(sample).is_some_and(|value| *value > 0.) {
                return Ok(());
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        bail!("{what}: no {sample}\n{}", self.balancer.log())
    }

    /// Looks at all samples, and whether counters have gone back.
    async fn scrape(&mut self) -> anyhow::Result<()> {
        let text = get(self.document.admin, "/metrics").await?;
        let mut samples = BTreeMap::new();
        let mut family = "";
        for line in text.lines() {
            if let Some((name, kind)) =
                line.strip_prefix("# TYPE ").and_then(|of| of.split_once(' '))
            {
                family = name;
                if name.starts_with("quic_lb_") {
                    self.kinds.insert(name.to_owned(), kind.to_owned());
                }
            }
            if line.starts_with('#') || !family.starts_with("quic_lb_") {
                continue;
            }
            let (series, value) = line.rsplit_once(' ').context("a sample")?;
            let value: f64 = value.parse()?;
            if value != 0. {
                self.set.insert(family.to_owned());
            }
            let is_counter = self.kinds.get(family).is_some_and(|kind| kind != "gauge");
            let before = self.samples.get(series).copied().filter(|_| is_counter).unwrap_or(0.);
            ensure!(value >= before || !is_counter, "{series} went from {before} to {value}");
            let twice = samples.insert(series.to_owned(), value).is_some();
            ensure!(!twice, "{series} is there twice");
        }
        self.samples = samples;
        Ok(())
    }
}

fn text(document: &Document, folder: &Path) -> String {
    let check = "    health_check: { kind: version_negotiation, interval: \"500ms\", timeout: \"400ms\", rise: 1, fall: 2 }\n";
    let text =
        document.to_string().replacen("    backends:\n", &format!("{check}    backends:\n"), 1);
    let text = text.replace("flows: 4000", &format!("flows: {FLOWS}"));
    let text = text.replace("drain: \"1s\"", "drain: \"1s\", flow_unanswered: \"1s\"");
    let log = folder.join("connections.json");
    let key = "01".repeat(16);
    format!(
        "{text}workers: 1\nlog: {{ connections: {{ path: {log:?} }} }}\n\
         retry: {{ mode: always, keys: [{{ sequence: 1, key: \"{key}\" }}] }}\n"
    )
}

fn quiet(mut command: Command) -> Command {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    command
}
