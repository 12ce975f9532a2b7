//! The processes under test, and what each run took of them.

use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use quic_lb_tests::{
    balancer::Balancer,
    binary,
    document::{Document, Listener, Pool, Scheme, free_address},
    site::LOCAL,
};
use serde_json::Value;

/// What a client with a socket for each connection needs, with some to spare.
const DESCRIPTORS: usize = 65_536;

/// Origins with a balancer in front. Dropping it ends them.
pub(crate) struct Fleet {
    document: Document,
    balancer: Balancer,
    origins: Vec<Child>,
    folder: tempfile::TempDir,
}

/// What the client is to do.
pub(crate) struct Load {
    arguments: Vec<String>,
    pub(crate) duration: Duration,
}

/// What one run has come to and what it took.
pub(crate) struct Sample {
    pub(crate) seconds: f64,
    pub(crate) connections: usize,
    pub(crate) requests: f64,
    pub(crate) octets: f64,
    pub(crate) rebinds: u64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    /// Processor time of the origins.
    pub(crate) origin: Duration,
    pub(crate) balancer: Duration,
}

/// Memory of a process.
pub(crate) struct Memory {
    pub(crate) now_kib: u64,
    pub(crate) peak_kib: u64,
}

impl Load {
    pub(crate) fn new<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Self {
        let arguments = arguments.into_iter().map(str::to_owned).collect();
        Self { arguments, duration: Duration::from_secs(1) }
    }
}

impl Fleet {
    pub(crate) async fn start(origins: u8) -> Result<Self> {
        let pool = Pool::new("web", &[Scheme::FOUR_PASS], LOCAL, origins);
        let address = free_address(LOCAL);
        let document = Document {
            listeners: vec![Listener { name: "edge".into(), address, pool: "web".into() }],
            pools: vec![pool],
            admin: free_address(LOCAL),
        };
        let folder = tempfile::tempdir()?;
        let config = folder.path().join("lb.yaml");
        // Room for a crowd that moves, where tests are content with less.
        let text = document.to_string().replace("flows: 4000", "flows: 50000");
        ensure!(text.contains("flows: 50000"), "{text}");
        fs::write(&config, &text)?;
        let mut fleet = Self {
            balancer: Balancer::start_from(&text, document.admin).await?,
            document,
            origins: Vec::new(),
            folder,
        };
        for backend in &fleet.document.pools[0].backends {
            let log = fs::File::create(fleet.folder.path().join(&backend.name))?;
            let mut command = with_descriptors(binary::backend_sim()?);
            command.args(["serve", "--backend", &backend.name, "--config"]).arg(&config);
            fleet.origins.push(command.stderr(log).spawn()?);
        }
        fleet.until_listening().await?;
        Ok(fleet)
    }

    /// The first origin.
    pub(crate) fn origin(&self) -> SocketAddr {
        self.document.pools[0].backends[0].address
    }

    pub(crate) fn balancer(&self) -> SocketAddr {
        self.document.listeners[0].address
    }

    /// Has the client do `load` at `target`.
    pub(crate) async fn run(&self, load: &Load, target: SocketAddr) -> Result<Sample> {
        let mut command = with_descriptors(binary::backend_sim()?);
        command.args(["load", "--insecure", "--json", "--target", &target.to_string()]);
        command.args(["--duration", &format!("{}ms", load.duration.as_millis())]);
        command.args(&load.arguments).stdout(Stdio::piped()).stderr(Stdio::null());
        let before = (self.origin_time()?, processor_time(self.balancer.process_id())?);
        let child = command.spawn()?;
        let output = tokio::task::spawn_blocking(move || child.wait_with_output()).await??;
        let after = (self.origin_time()?, processor_time(self.balancer.process_id())?);
        let report: Value = serde_json::from_slice(&output.stdout).context("the report")?;
        ensure!(output.status.success(), "not clean: {report:#}");
        let figure = |value: &Value| value.as_f64().with_context(|| format!("{report:#}"));
        let count = |value: &Value| value.as_u64().with_context(|| format!("{report:#}"));
        Ok(Sample {
            seconds: figure(&report["seconds"])?,
            connections: usize::try_from(count(&report["connections"])?)?,
            requests: figure(&report["requests"])?,
            octets: figure(&report["bytes_verified"])?,
            rebinds: count(&report["rebinds"])?,
            p50_us: figure(&report["latency"]["p50_us"])?,
            p99_us: figure(&report["latency"]["p99_us"])?,
            origin: after.0.saturating_sub(before.0),
            balancer: after.1.saturating_sub(before.1),
        })
    }

    /// Memory of the balancer.
    pub(crate) fn memory(&self) -> Result<Memory> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.balancer.process_id()))?;
        let field = |name: &str| -> Result<u64> {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let value = line.and_then(|line| line.split_whitespace().next());
            Ok(value.with_context(|| format!("no {name}"))?.parse()?)
        };
        Ok(Memory { now_kib: field("VmRSS:")?, peak_kib: field("VmHWM:")? })
    }

    /// Flows of the balancer.
    pub(crate) async fn flows(&self) -> Result<u64> {
        Ok(self.balancer.metrics().await?.sum("flows", &[]))
    }

    fn origin_time(&self) -> Result<Duration> {
        self.origins.iter().map(|origin| processor_time(origin.id())).sum()
    }

    async fn until_listening(&mut self) -> Result<()> {
        let logs = self.document.pools[0].backends.iter().map(|backend| &backend.name);
        for (name, origin) in logs.zip(&mut self.origins) {
            let log = self.folder.path().join(name);
            while !fs::read_to_string(&log)?.contains("listening") {
                let ended = origin.try_wait()?;
                ensure!(ended.is_none(), "{name}: {}", fs::read_to_string(&log)?);
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        Ok(())
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for origin in &mut self.origins {
            // One that has ended is as good as one that is killed.
            let _ = origin.kill();
            let _ = origin.wait();
        }
    }
}

/// A command that may open many sockets, as far as the system lets it.
fn with_descriptors(program: PathBuf) -> Command {
    let mut command = Command::new("sh");
    let script = format!("ulimit -n {DESCRIPTORS} || ulimit -n $(ulimit -H -n); exec \"$@\"");
    command.args(["-c", &script, "sh"]).arg(program);
    command
}

/// What all threads of a process have had so far.
fn processor_time(process: u32) -> Result<Duration> {
    let mut nanos = 0;
    for thread in fs::read_dir(format!("/proc/{process}/task"))? {
        let text = fs::read_to_string(thread?.path().join("schedstat"))?;
        let running = text.split_whitespace().next().context("schedstat is empty")?;
        nanos += running.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(nanos))
}
