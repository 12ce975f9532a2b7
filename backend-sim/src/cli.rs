//! The command line: reads arguments, runs one command, turns its outcome into an exit code.
//!
//! Standard output carries what was asked for, standard error what went wrong, as one clear
//! sentence or as the list of a file's mistakes. Exit codes: 0 done, 1 not done, 2 not understood.

use std::{
    io::{self, IsTerminal as _, Write as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::pin,
    process::ExitCode,
    time::Duration,
};

use clap::{Args as Arguments, Parser, Subcommand, ValueHint};
use indicatif::ProgressBar;
use quic::{ConnectionId, routable::ConfigId};
use quic_lb_config::{
    read_reset_secret,
    units::{parse_config_id, parse_duration, parse_size},
};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};
use tracing_subscriber::EnvFilter;

use crate::{
    certificate::{Certificate, Trust},
    flood::{self, Kind},
    load::{Load, Options, Report},
    serve::{AdminAddress, Misbehaviour, Origin, Settings},
};

/// An HTTP/3 origin server and a load client for quic-lb.
#[derive(Debug, Parser)]
#[command(name = "backend-sim", version, subcommand_required = true, arg_required_else_help = true)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run one origin server of a balancer's configuration.
    ///
    /// SIGHUP reads the file again and gives every live connection new connection IDs. SIGTERM and
    /// SIGINT drain: what was asked is answered, nothing new is accepted. A second signal ends at
    /// once.
    #[command(after_help = "\
Routes: /  /whoami  /bytes/N  /echo (POST)  /delay/MS  /stream  /health, and the files of --root

Examples:
  backend-sim serve --config lb.yaml --backend a
  backend-sim serve --config lb.yaml --backend a --https 127.0.0.1:8443 --root public")]
    Serve(ServeArgs),
    /// Make requests, change ports and addresses, and verify every byte that comes back.
    ///
    /// First all connections are made, then the clock starts. Exit 0 if nothing was lost, misrouted
    /// or failed, 1 otherwise.
    #[command(after_help = "\
Examples:
  backend-sim load --target 127.0.0.1:4433 --insecure --connections 50 --rebind-every 1s
  backend-sim load --target 192.0.2.1:443 --name www.example.org --ca ca.pem --rate 1000 --json")]
    Load(LoadArgs),
    /// Send what attackers send, to a balancer on this machine.
    ///
    /// Refuses targets that are not on loopback, unless it runs in a network namespace of its own and
    /// the target has a private address. With the right to make raw sockets, senders are forged.
    #[command(after_help = "\
Examples:
  backend-sim flood --target 127.0.0.1:4433 --kind initials --rate 20000 --duration 60s
  backend-sim flood --target 127.0.0.1:4433 --kind short --json")]
    Flood(FloodArgs),
}

#[derive(Debug, Arguments)]
struct FloodArgs {
    /// Where to.
    #[arg(long, value_name = "ADDR")]
    target: SocketAddr,
    /// What: first flights from false senders, short headers that nobody knows, unknown versions,
    /// replayed and changed tokens, random bytes, or all in turns.
    #[arg(long, value_name = "KIND", default_value = "initials", value_parser = ["initials", "short", "versions", "tokens", "garbage", "mixed"])]
    kind: String,
    /// The connection ID of short headers and of Initials with tokens, in hex, as "quic-lb cid encode"
    /// makes it: of a server whose connection has ended. The sender of each short header sends twice.
    #[arg(long, value_name = "HEX", value_parser = parse_cid)]
    cid: Option<ConnectionId>,
    /// Datagrams in a second, 200000 at most.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    rate: u32,
    /// How long, five minutes at most.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    duration: Duration,
    /// Print the report as one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Arguments)]
struct LoadArgs {
    /// Where the server is.
    #[arg(long, value_name = "ADDR")]
    target: SocketAddr,
    /// What it is called in its certificate.
    #[arg(long, value_name = "NAME", default_value = "localhost")]
    name: String,
    /// Believe certificates that lead to one of these (PEM).
    #[arg(long, value_name = "FILE", required_unless_present = "insecure", conflicts_with = "insecure", value_hint = ValueHint::FilePath)]
    ca: Option<PathBuf>,
    /// Believe every certificate.
    #[arg(long)]
    insecure: bool,
    /// Connections at once.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    connections: u32,
    /// Requests at once on each connection.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=100))]
    concurrency: u16,
    /// Requests per second of all connections together, at fixed times (open loop); as many as are
    /// answered otherwise.
    #[arg(long, value_name = "N", value_parser = rate)]
    rate: Option<f64>,
    /// Octets of a body to ask for; may be repeated, and they take turns.
    #[arg(long, value_name = "SIZE", default_value = "1KiB", value_parser = parse_size)]
    size: Vec<u64>,
    /// Change each connection's port this often, as a NAT does.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    rebind_every: Option<Duration>,
    /// Migrate each connection this often, to a fresh connection ID.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    migrate_every: Option<Duration>,
    /// Close each connection after this time, and make another one.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    lifetime: Option<Duration>,
    /// How long to make requests.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    duration: Duration,
    /// Print the report as one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Arguments)]
struct ServeArgs {
    /// The balancer's configuration file (YAML).
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    config: PathBuf,
    /// The backend to be: NAME, or POOL/NAME where several pools have that name.
    #[arg(long, value_name = "NAME")]
    backend: String,
    /// Issue connection IDs of this configuration; of the last one in the file otherwise.
    #[arg(long, value_name = "N", value_parser = parse_config_id)]
    config_id: Option<ConfigId>,
    /// Listen here instead of at the backend's address in the file.
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// The certificate chain (PEM); one is made at start otherwise.
    #[arg(long, value_name = "FILE", requires = "key", value_hint = ValueHint::FilePath)]
    cert: Option<PathBuf>,
    /// The certificate's private key (PEM).
    #[arg(long, value_name = "FILE", requires = "cert", value_hint = ValueHint::FilePath)]
    key: Option<PathBuf>,
    /// A name for the certificate that is made at start; may be repeated.
    #[arg(long, value_name = "NAME", default_values = ["localhost", "127.0.0.1", "::1"])]
    name: Vec<String>,
    /// Write the certificate that is made at start to this file (PEM), for clients to trust.
    #[arg(long, value_name = "FILE", conflicts_with = "cert", value_hint = ValueHint::FilePath)]
    write_cert: Option<PathBuf>,
    /// Serve the files of this folder.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    root: Option<PathBuf>,
    /// Answer over HTTPS on TCP here too, and tell browsers by Alt-Svc that HTTP/3 is to be had.
    #[arg(long, value_name = "ADDR")]
    https: Option<SocketAddr>,
    /// The UDP port to tell them; that of the balancer's listener otherwise.
    #[arg(long, value_name = "PORT")]
    alt_svc_port: Option<u16>,
    /// Show Prometheus metrics here, at /metrics.
    #[arg(long, value_name = "ADDR")]
    metrics: Option<SocketAddr>,
    /// Derive the tokens of stateless resets from the key in this file (32 hex digits, as of `quic-lb keygen`), so that clients
    /// know at once when the server has started anew; from stateless_reset of the pool otherwise.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    reset_key_file: Option<PathBuf>,
    /// Tell this balancer once a second how many connections are half-open: the address of its
    /// admin interface, such as http://127.0.0.1:9090; may be repeated.
    #[arg(long, value_name = "URL", value_hint = ValueHint::Url)]
    report_half_open: Vec<AdminAddress>,
    /// Sockets and tasks that share the work.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    shards: u16,
    /// What the body of a request may have.
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = parse_size)]
    max_body: u64,
    /// What to do wrong, for tests: wrong-server-id, wrong-body, two-faced, silent,
    /// refusing, or slow=200ms.
    #[arg(long, value_name = "HOW", default_value = "none")]
    misbehave: Misbehaviour,
    /// How long SIGTERM waits for answers.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    drain: Duration,
}

/// The whole program.
#[must_use]
pub fn main() -> ExitCode {
    let command = Args::parse().command;
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| format!("cannot start: {error}"))
        .and_then(|runtime| runtime.block_on(run(command)));
    match outcome {
        Ok(code) => code,
        Err(sentence) => {
            tell(&format!("backend-sim: {sentence}"));
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command) -> Result<ExitCode, String> {
    match command {
        Command::Serve(args) => serve(args).await,
        Command::Load(args) => load(args).await,
        Command::Flood(args) => flood(&args),
    }
}

async fn serve(args: ServeArgs) -> Result<ExitCode, String> {
    start_logging();
    let loaded = quic_lb_config::load(&args.config).map_err(|report| report.to_string())?;
    let certificate = match (&args.cert, &args.key) {
        (Some(chain), Some(key)) => Certificate::read(chain, key),
        _ => Certificate::make(args.name.iter().cloned()),
    };
    let certificate = certificate.map_err(|error| error.to_string())?;
    if let (Some(path), Some(pem)) = (&args.write_cert, certificate.made_pem()) {
        std::fs::write(path, pem)
            .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    }
    let mut settings = Settings::new(loaded.config, args.backend, certificate);
    settings.config_id = args.config_id;
    settings.address = args.listen;
    settings.root = args.root;
    settings.https = args.https;
    settings.alt_svc_port = args.alt_svc_port;
    settings.metrics = args.metrics;
    settings.reset_secret = args.reset_key_file.as_deref().map(read_reset_secret).transpose()?;
    settings.report_half_open = args.report_half_open;
    settings.shards = args.shards.into();
    settings.max_body = args.max_body;
    settings.misbehaviour = args.misbehave;
    let origin = Origin::start(settings).await.map_err(|error| error.to_string())?;
    info!(backend = origin.name(), address = %origin.address(), "listening");
    if let Some(address) = origin.https_address() {
        info!(%address, "HTTPS");
    }
    if let Some(address) = origin.metrics_address() {
        info!(%address, "metrics");
    }
    let files = args.cert.as_deref().zip(args.key.as_deref());
    until_told(&origin, &args.config, files).await?;
    tokio::select! {
        () = origin.drain(args.drain) => {}
        () = ended() => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// A connection ID in hex.
fn parse_cid(text: &str) -> Result<ConnectionId, String> {
    let octets: Option<Vec<u8>> = text
        .as_bytes()
        .chunks(2)
        .map(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 16).ok())
        .collect();
    let cid = octets.filter(|octets| text.len().is_multiple_of(2) && !octets.is_empty());
    let cid = cid.and_then(|octets| ConnectionId::new(&octets));
    cid.ok_or_else(|| "1 to 20 bytes in hex are expected".into())
}

fn flood(args: &FloodArgs) -> Result<ExitCode, String> {
    let kind = match &*args.kind {
        "short" => Kind::Short,
        "versions" => Kind::Versions,
        "tokens" => Kind::Tokens,
        "garbage" => Kind::Garbage,
        "mixed" => Kind::Mixed,
        _ => Kind::Initials,
    };
    let FloodArgs { target, cid, rate, duration, .. } = *args;
    let options = flood::Options { target, kind, cid, rate, duration };
    let report = flood::run(&options).map_err(|error| error.to_string())?;
    let text = if args.json {
        serde_json::to_string(&report).map_err(|error| error.to_string())?
    } else {
        report.to_string()
    };
    writeln!(io::stdout(), "{text}")
        .map_err(|error| format!("cannot write the report: {error}"))?;
    Ok(ExitCode::SUCCESS)
}

async fn load(args: LoadArgs) -> Result<ExitCode, String> {
    start_logging();
    let trust = args.ca.as_deref().map_or(Ok(Trust::Everybody), Trust::read);
    let trust = trust.map_err(|error| error.to_string())?;
    let mut options = Options::new(args.target, args.name, trust);
    options.connections = args.connections.try_into().unwrap_or(usize::MAX);
    options.concurrency = args.concurrency.into();
    options.rate = args.rate;
    options.sizes = args.size;
    options.rebind_every = args.rebind_every;
    options.migrate_every = args.migrate_every;
    options.lifetime = args.lifetime;
    options.duration = args.duration;
    let mut load = Load::start(options).map_err(|error| error.to_string())?;
    let progress = Progress::new(args.json);
    loop {
        tokio::select! {
            () = load.wait() => break,
            () = ended() => load.stop(),
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
        }
        progress.show(&load.report());
    }
    progress.end();
    let report = load.report();
    let text = if args.json {
        serde_json::to_string(&report).map_err(|error| error.to_string())?
    } else {
        report.to_string()
    };
    writeln!(io::stdout(), "{text}")
        .map_err(|error| format!("cannot write the report: {error}"))?;
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// One line about a load that goes on: rewritten on a terminal, otherwise one each second, unless
/// somebody wants the report for a program.
struct Progress {
    line: Option<ProgressBar>,
    silent: bool,
}

impl Progress {
    fn new(silent: bool) -> Self {
        let terminal = io::stderr().is_terminal();
        Self { line: terminal.then(ProgressBar::new_spinner), silent: silent && !terminal }
    }

    fn show(&self, report: &Report) {
        // Nothing is lost until it is known to be.
        let silent = match report.silent {
            0 => String::new(),
            silent => format!(", {silent} silent"),
        };
        let text = format!(
            "{:.0} s: {} connections, {:.0} requests per second, p50 {:?}, {} rebinds, \
             {} migrations, {} lost{silent}, {} misrouted",
            report.seconds,
            report.connections,
            report.requests_per_second,
            Duration::from_micros(report.latency.p50_us),
            report.rebinds,
            report.migrations,
            report.lost,
            report.misrouted,
        );
        match &self.line {
            Some(line) => {
                line.set_message(text);
                line.tick();
            }
            None if self.silent => {}
            None => tell(&text),
        }
    }

    fn end(&self) {
        if let Some(line) = &self.line {
            line.finish_and_clear();
        }
    }
}

/// Reloads on SIGHUP until a signal ends it.
async fn until_told(
    origin: &Origin,
    file: &Path,
    certificate: Option<(&Path, &Path)>,
) -> Result<(), String> {
    let mut hangups = signal(SignalKind::hangup()).map_err(|error| error.to_string())?;
    // One for all turns: a signal that comes during a reload counts.
    let mut ended = pin!(ended());
    loop {
        tokio::select! {
            _ = hangups.recv() => reload(origin, file, certificate),
            () = &mut ended => {
                info!("draining");
                return Ok(());
            }
        }
    }
}

/// Reads the files again; one that is of no use leaves what it was about as it is.
fn reload(origin: &Origin, file: &Path, certificate: Option<(&Path, &Path)>) {
    if let Some((chain, key)) = certificate {
        let read = Certificate::read(chain, key).map_err(|error| error.to_string());
        let used =
            read.and_then(|of| origin.use_certificate(&of).map_err(|error| error.to_string()));
        match used {
            Ok(()) => info!(file = %chain.display(), "new connections begin with the certificate"),
            Err(error) => warn!(error, "the certificate before goes on"),
        }
    }
    match quic_lb_config::load(file) {
        Ok(loaded) => match origin.reload(&loaded.config) {
            Ok(()) => info!(file = %file.display(), "reloaded, connection IDs rotated"),
            Err(error) => warn!(%error, "not reloaded, the old configuration goes on"),
        },
        Err(report) => warn!(%report, "not reloaded, the old configuration goes on"),
    }
}

/// Waits for SIGTERM or SIGINT.
async fn ended() {
    let wait = |kind| async move {
        match signal(kind) {
            Ok(mut signal) => drop(signal.recv().await),
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = wait(SignalKind::terminate()) => {}
        () = wait(SignalKind::interrupt()) => {}
    }
}

fn start_logging() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // Of two in one process the first counts.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .try_init();
}

/// Writes to standard error; where that is gone there is nobody to tell.
fn tell(what: &str) {
    let _ = writeln!(io::stderr(), "{what}");
}

fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate: &f64| rate.is_finite() && *rate > 0.0);
    rate.ok_or_else(|| "a rate is a number above 0".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_definitions_are_consistent() {
        Args::command().debug_assert();
    }
}
