//! The processes that are compared: each copies datagrams between clients and one backend.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{IpAddr, SocketAddr, UdpSocket},
    num::{NonZeroU32, NonZeroUsize},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use arc_swap::ArcSwap;
use quic::routable::{CidConfig, ConfigId, Key, ServerId};
use quic_lb::{
    backend::BackendState,
    memory::Memory,
    registry::Registry,
    routing::Routing,
    worker::{Listen, Workers},
};
use quic_lb_config::{Admission, Backend, Config, HashBy, Limits, Listener, Log, Pool, Timeouts};

/// Client paths that a forwarder must be able to hold.
const MAX_FLOWS: usize = 120_000;

/// A running forwarder.
pub(crate) struct Forwarder {
    pub(crate) kind: Kind,
    pub(crate) address: SocketAddr,
    child: Child,
    /// Its end is the sign for the balancer to end.
    _stdin: Option<ChildStdin>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Balancer,
    /// Another build of the balancer: the program is that build's benchmark.
    Beside,
    NatFloor,
    CopyFloor,
    Nginx,
}

impl Forwarder {
    /// Starts one in front of `backend`; `None` if this host does not have it.
    pub(crate) fn start(
        kind: Kind,
        backend: SocketAddr,
        workers: usize,
        scratch: &Path,
    ) -> Result<Option<Self>> {
        let command = match kind {
            Kind::Balancer => balancer(&std::env::current_exe()?, backend, workers),
            Kind::Beside => bail!("it is started from its program"),
            Kind::NatFloor | Kind::CopyFloor => {
                let mut command = pinned(&compile_floor(scratch)?);
                let mode = if kind == Kind::CopyFloor { "copy" } else { "nat" };
                command.args([mode, &backend.port().to_string(), &workers.to_string()]);
                command
            }
            Kind::Nginx => return Self::start_nginx(backend, scratch),
        };
        Self::spawn(kind, command).map(Some)
    }

    /// Starts the balancer of another build, whose benchmark is `program`.
    pub(crate) fn start_beside(program: &Path, backend: SocketAddr) -> Result<Self> {
        Self::spawn(Kind::Beside, balancer(program, backend, 1))
    }

    /// Starts what says its port on standard output and ends with standard input.
    fn spawn(kind: Kind, mut command: Command) -> Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        let stdout = child.stdout.take().context("a pipe was asked for")?;
        BufReader::new(stdout).read_line(&mut line)?;
        let port = line.trim().parse().with_context(|| format!("{kind:?} says {line:?}"))?;
        let stdin = child.stdin.take();
        Ok(Self { kind, address: local(port), child, _stdin: stdin })
    }

    fn start_nginx(backend: SocketAddr, scratch: &Path) -> Result<Option<Self>> {
        let module = ["/usr/lib/nginx/modules/ngx_stream_module.so"];
        let module = module.iter().find(|path| Path::new(path).exists());
        if Command::new("nginx").arg("-v").stderr(Stdio::null()).status().is_err() {
            return Ok(None);
        }
        let load = module.map_or(String::new(), |path| format!("load_module {path};"));
        let address = UdpSocket::bind(local(0))?.local_addr()?;
        let dir = scratch.display();
        let config = format!(
            "{load} daemon off; master_process off; pid {dir}/nginx.pid; error_log stderr crit;
             worker_rlimit_nofile 20000;
             events {{ worker_connections 40000; }}
             stream {{ server {{
                 listen {address} udp rcvbuf=8m sndbuf=8m;
                 proxy_pass {backend};
                 proxy_bind 127.0.0.31;
                 proxy_timeout 600s;
             }} }}"
        );
        let path = scratch.join("nginx.conf");
        fs::write(&path, config)?;
        let mut command = pinned(Path::new("nginx"));
        command.args(["-e", "stderr", "-p"]).arg(scratch).arg("-c").arg(&path);
        let mut child = command.stdin(Stdio::null()).spawn()?;
        let start = Instant::now();
        // Its port is taken once it listens.
        while UdpSocket::bind(address).is_ok() {
            if start.elapsed() > Duration::from_secs(5) || child.try_wait()?.is_some() {
                let _ = child.kill();
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Some(Self { kind: Kind::Nginx, address, child, _stdin: None }))
    }

    /// Nanoseconds that all its threads and descendants have spent on a processor.
    pub(crate) fn cpu(&self) -> Result<u64> {
        cpu_of(self.child.id())
    }

    /// Octets that it has in memory.
    pub(crate) fn resident(&self) -> Result<u64> {
        let statm = fs::read_to_string(format!("/proc/{}/statm", self.child.id()))?;
        let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
        Ok(pages.context("statm has a second number")? * 4096)
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn cpu_of(process: u32) -> Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{process}/task"))? {
        let task = task?.path();
        let schedstat = fs::read_to_string(task.join("schedstat"))?;
        let ns = schedstat.split(' ').next().and_then(|ns| ns.parse::<u64>().ok());
        sum += ns.context("schedstat begins with a number")?;
        for child in fs::read_to_string(task.join("children"))?.split_whitespace() {
            sum += cpu_of(child.parse()?)?;
        }
    }
    Ok(sum)
}

/// Keeps this process, which makes the load, away from the forwarders.
pub(crate) fn pin_self() {
    let id = std::process::id().to_string();
    let quiet = Stdio::null;
    let _ =
        Command::new("taskset").args(["-pc", "0", &id]).stdout(quiet()).stderr(quiet()).status();
}

/// Runs `program` on a processor of its own where there are several, and ends it with this process.
fn pinned(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]);
    if std::thread::available_parallelism().is_ok()
        && fs::metadata("/sys/devices/system/cpu/cpu1").is_ok()
    {
        command.args(["taskset", "-c", "1"]);
    }
    command.arg(program);
    command
}

/// The balancer that the benchmark `program` contains.
fn balancer(program: &Path, backend: SocketAddr, workers: usize) -> Command {
    let mut command = pinned(program);
    let sources = if workers > 1 { "spread" } else { "single" };
    command.args(["serve", &backend.to_string(), &workers.to_string(), sources]);
    command
}

fn compile_floor(scratch: &Path) -> Result<std::path::PathBuf> {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/bench/datapath/floor.c");
    let program = scratch.join("floor");
    let status = Command::new("cc").args(["-O2", "-o"]).arg(&program).arg(source).status()?;
    if !status.success() {
        bail!("cc cannot compile {source}");
    }
    Ok(program)
}

fn local(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

/// How connection IDs are made: eight octets in four passes.
pub(crate) fn cid_config() -> CidConfig {
    let id = ConfigId::new(0).expect("zero is one");
    CidConfig::new(id, 2, 6, Some(&Key::new([0x5a; 16]))).expect("lengths that the format carries")
}

/// The one server.
pub(crate) fn server_id() -> ServerId {
    ServerId::new(&[0, 1]).expect("two octets")
}

/// What the child process does that is the balancer: `serve BACKEND WORKERS SOURCES`.
pub(crate) fn serve(arguments: &[String]) -> Result<()> {
    let [backend, workers, sources] = arguments else { bail!("serve BACKEND WORKERS SOURCES") };
    // Every forwarder has source addresses of its own: one has not ports enough for all of them.
    let spread = (11..19).map(|n| IpAddr::from([127, 0, 0, n])).collect();
    let single = vec![IpAddr::from([127, 0, 0, 11])];
    let config = Config {
        workers: Some(workers.parse::<NonZeroUsize>()?),
        listeners: vec![Listener {
            name: "edge".into(),
            address: local(0),
            both_families: false,
            pool: 0,
            retry_mode: None,
        }],
        pools: vec![Pool {
            name: "web".into(),
            cid_configs: vec![cid_config()],
            backends: vec![Backend {
                name: "a".into(),
                address: backend.parse()?,
                server_ids: vec![(cid_config().id(), server_id())],
                weight: NonZeroU32::MIN,
                admission: Admission::Active,
                check_address: None,
            }],
            source_addresses: if sources == "spread" { spread } else { single },
            reset_secret: None,
            hash: HashBy::Dcid,
            health_check: None,
            honours_tokens: quic_lb_config::HonoursTokens::Yes,
            report_token: None,
        }],
        admin: None,
        limits: Limits {
            flows: NonZeroUsize::new(MAX_FLOWS).context("not zero")?,
            remembered: NonZeroUsize::new(100_000).context("not zero")?,
            new_connections: Default::default(),
            unknown_short_headers: Default::default(),
        },
        timeouts: Timeouts {
            flow_idle: Duration::from_secs(3600),
            flow_unanswered: Duration::from_secs(3600),
            learnt: Duration::from_secs(3600),
            drain: Duration::from_secs(1),
        },
        state_dir: None,
        log: Log { level: Default::default(), format: Default::default(), connections: None },
        retry: Default::default(),
    };
    let state = |_: &str, _: &str| BackendState::Active;
    let routing = Arc::new(Routing::new(&config, &mut Registry::default(), state));
    let remembered = config.limits.remembered.get();
    let memory = Arc::new(Memory::new(remembered, Instant::now(), [1; 4]));
    let workers = Workers::start(
        &config,
        Listen::at_addresses_of(&config),
        Arc::new(ArcSwap::new(routing)),
        memory,
        false,
    )?;
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{}", workers.local_addresses()[0].0.port())?;
    stdout.flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    workers.stop();
    Ok(())
}
