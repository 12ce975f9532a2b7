//! What may be typed, and what is meant by it.
//!
//! [`Args`] is what clap reads; completions and manual pages come from the same definitions. Where
//! what was typed and what is meant differ, there is one conversion, here.

use std::{fmt, net::SocketAddr, path::PathBuf, str::FromStr};

use clap::{Args as Arguments, Parser, Subcommand, ValueHint};
use clap_complete::Shell;
use quic::routable::ConfigId;
use quic_lb_config::units::parse_config_id;

use crate::words::Hex;

/// A load balancer for QUIC: every packet reaches the server that holds its connection.
#[derive(Debug, Parser)]
#[command(name = "quic-lb", version, subcommand_required = true, arg_required_else_help = true)]
#[command(after_help = "\
Examples:
  quic-lb check lb.yaml
  quic-lb run --config lb.yaml
  quic-lb cid decode --config lb.yaml 080128dbc123819856
  quic-lb explain --config lb.yaml --pcap trace.pcap")]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the balancer.
    ///
    /// SIGHUP or a changed file reloads the configuration; a file with mistakes is refused as a
    /// whole and everything goes on as before. SIGTERM and SIGINT drain: /readyz says no, forwarding
    /// goes on until no connection lives or timeouts.drain is over, and the exit code is 0. A second signal
    /// ends at once, with 4. SIGUSR2 upgrades, as the command does. SIGUSR1 opens the connection log anew.
    #[command(after_help = "\
Examples:
  quic-lb run --config /etc/quic-lb/lb.yaml
  RUST_LOG=quic_lb=debug quic-lb run --config lb.yaml   more than the file says")]
    Run(RunArgs),
    /// Check configuration files: exit 0, or 1 with every mistake; with --against 3 if a running balancer would refuse it.
    ///
    /// Mistakes and doubts are shown beneath the lines that they are in, in colours on a terminal unless
    /// NO_COLOR is set. Keys are never shown. Relative names of key files start at the folder of the
    /// file, those on standard input at the current one.
    #[command(after_help = "\
Examples:
  quic-lb check lb.yaml
  quic-lb check new.yaml && mv new.yaml lb.yaml   a running balancer reloads it
  quic-lb check --json fleet/*.yaml
  quic-lb check --against http://127.0.0.1:9464 new.yaml   what would it change?
  render-config | quic-lb check -")]
    Check(CheckArgs),
    /// Decode and encode routable connection IDs.
    #[command(subcommand)]
    Cid(Cid),
    /// Say which rule sends a datagram where, and why.
    ///
    /// Runs the forwarder itself, with nothing remembered at first. With --pcap every datagram of the
    /// capture to the port of a listener is explained in turn, and changes what is remembered for the
    /// next one, as do the servers' answers in the capture. Tokens are judged by the time of the capture.
    /// What was not captured decides nothing and is remembered of nobody; datagrams that offload had
    /// joined are taken apart; frames that are not read are counted with the reason.
    #[command(after_help = "\
Examples:
  quic-lb explain --config lb.yaml --from 192.0.2.7:50000 40080128dbc123819856
  quic-lb explain --config lb.yaml --pcap trace.pcapng
  tcpdump -i any -w - -c 100 udp port 4433 | quic-lb explain --config lb.yaml --pcap /dev/stdin")]
    Explain(ExplainArgs),
    /// Have a running balancer read its configuration, and wait until it is in force.
    ///
    /// Prints what has changed. Exit 0 if the file is in force, 1 with every mistake if it was refused: the old configuration
    /// goes on then.
    #[command(after_help = "\
Examples:
  quic-lb reload
  quic-lb check lb.yaml && quic-lb reload --admin 127.0.0.1:9464")]
    Reload(ReloadArgs),
    /// Give a backend no new connections, and wait until those that it has are over.
    ///
    /// A command to a balancer that runs, by its admin interface. Where several balancers stand in front of the
    /// backend, each is to be asked. A connection is over when nothing was heard of it for as long as --quiet says: nobody
    /// can read its end. Clients that keep connections for long without a word need a longer one, up to the idle timeout
    /// of the servers. Exit 0 if the backend is drained, or without --wait if it gets no new connections; 3 if
    /// --timeout is over first.
    #[command(after_help = "\
Examples:
  quic-lb drain --wait web/a
  quic-lb drain --wait --quiet 30s --timeout 1h --admin 127.0.0.1:9464 web/a && ssh a reboot")]
    Drain(DrainArgs),
    /// Give a backend new connections again.
    #[command(after_help = "\
Examples:
  quic-lb activate web/a")]
    Activate(BackendArgs),
    /// Compare what the balancers of a fleet decide by, and say where they differ.
    ///
    /// They should send the same packet to the same server. Compared are the pools that listeners lead to, backends with their weights and server
    /// IDs, configurations of connection IDs and tokens with their keys (by check values, which tell nothing of the
    /// keys), the states of backends as each balancer sees them, and operators' commands. What is a balancer's own is not: addresses of
    /// listeners, limits, logging. Exit 0 if all agree, 3 if they differ, 1 if one of them could not be asked.
    #[command(after_help = "\
Examples:
  quic-lb agree http://192.0.2.11:9464 http://192.0.2.12:9464
  quic-lb agree lb-{1..8}.example:9464 || echo differ     names need admin.host_names
  quic-lb agree --json 192.0.2.11:9464 192.0.2.12:9464 | jq -r '.differences[].at'")]
    Agree(AgreeArgs),
    /// Say how far a rotation of keys has come in a fleet, and what is next.
    ///
    /// Nothing is changed: files are distributed by whoever does that, and this says when to go on. Connection IDs go to
    /// balancers first and then to servers, keys of tokens to servers first. Exit 0 if the steps are done, 3 if not.
    #[command(subcommand)]
    Rotate(Rotate),
    /// Replace the program of a running balancer by the one that is on disk now, without loss.
    ///
    /// The file that the balancer was started from is executed with the same arguments, beside the running process, which hands over its sockets,
    /// flows and memories and ends. No connection notices. If the new program does not start, or refuses the
    /// configuration, the running one goes on, and the exit code is 1.
    #[command(after_help = "\
Examples:
  install new/quic-lb /usr/bin/quic-lb && quic-lb upgrade")]
    Upgrade(UpgradeArgs),
    /// Show it all in one process: a balancer, origin servers and clients that move all the time.
    ///
    /// Everything is on loopback, at ports that are free. Clients fetch over HTTP/3, check every byte,
    /// and change their ports and addresses. Half-way a backend is drained and the keys of connection
    /// IDs are rotated, by the admin interface and by the configuration file, as an operator would.
    /// Exit 0 if no connection was lost and no answer came from the wrong server, 1 otherwise.
    #[cfg(feature = "demo")]
    #[command(after_help = "\
Examples:
  quic-lb demo
  quic-lb demo --duration 60s --backends 5 --clients 100
  quic-lb demo --duration 5s --json")]
    Demo(DemoArgs),
    /// Print a random key for connection IDs, 32 hex digits.
    #[command(after_help = "\
Examples:
  quic-lb keygen
  (umask 077; quic-lb keygen > web-0.key)     for key_file:")]
    Keygen,
    /// Print the JSON schema of the configuration file, for editors.
    #[command(after_help = "\
Examples:
  quic-lb schema > quic-lb.schema.json
  # then, as the first line of lb.yaml:
  # yaml-language-server: $schema=quic-lb.schema.json")]
    Schema,
    /// Print a completion script for a shell.
    #[command(after_help = "\
Examples:
  quic-lb completions bash > /etc/bash_completion.d/quic-lb
  quic-lb completions zsh > \"${fpath[1]}/_quic-lb\"")]
    Completions {
        /// The shell.
        shell: Shell,
    },
    /// Print the manual page of this program or of one of its commands.
    #[command(after_help = "\
Examples:
  quic-lb man | man -l -
  quic-lb man cid decode > quic-lb-cid-decode.1")]
    Man {
        /// The command; none for the program.
        command: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Cid {
    /// Say which server each connection ID names, or why none.
    ///
    /// Octets behind the end of a connection ID are ignored, as on the wire. Exit 0 if each names a
    /// server, 3 if one does not.
    #[command(after_help = "\
Examples:
  quic-lb cid decode --config lb.yaml 080128dbc123819856
  quic-lb cid decode --config lb.yaml --pool web --json 080128dbc123819856 08fabe536a5594d71e
  quic-lb cid decode --config lb.yaml $(quic-lb cid encode --config lb.yaml --backend a)")]
    Decode(DecodeArgs),
    /// Print a connection ID that names a backend.
    #[command(after_help = "\
Examples:
  quic-lb cid encode --config lb.yaml --backend a
  quic-lb cid encode --config lb.yaml --backend web/a --config-id 0 --nonce ee080dbf48c0")]
    Encode(EncodeArgs),
}

#[derive(Debug, Arguments)]
pub(crate) struct ConfigFile {
    /// The configuration file (YAML); - for standard input, but not to `run`.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) config: PathBuf,
}

#[derive(Debug, Arguments)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) file: ConfigFile,
    /// Keep what is given up otherwise once the sockets are open: capabilities, the right to change and execute files, core dumps.
    /// For debuggers.
    #[arg(long)]
    pub(crate) unconfined: bool,
}

#[derive(Debug, Arguments)]
pub(crate) struct CheckArgs {
    /// Configuration files (YAML); - for standard input.
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath, required_unless_present = "config")]
    files: Vec<PathBuf>,
    /// Another configuration file.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    config: Vec<PathBuf>,
    /// A balancer that runs, as http://127.0.0.1:9464, an address or the path of a Unix socket: says what a reload of the file would
    /// change there, and whether it would be refused. Nothing is done.
    #[arg(long, value_name = "URL")]
    pub(crate) against: Option<AdminPlace>,
    /// A file with the token that it wants to be shown, if it does.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires = "against")]
    pub(crate) token_file: Option<PathBuf>,
    /// Print a JSON array with one object for each file.
    #[arg(long)]
    pub(crate) json: bool,
}

impl CheckArgs {
    /// All files, whichever way they were given.
    pub(crate) fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.config.iter().chain(&self.files)
    }
}

/// How a running balancer is asked.
#[derive(Debug, Arguments)]
pub(crate) struct AdminArgs {
    /// Where the balancer takes commands: an address or the path of a Unix socket. Left out, /run/quic-lb/admin.sock if that is
    /// there, and 127.0.0.1:9464 otherwise.
    #[arg(long, value_name = "ADDR|PATH")]
    pub(crate) admin: Option<AdminPlace>,
    /// A file with the token that the balancer wants to be shown.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) token_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) tls: TlsArgs,
}

/// Files for balancers that take commands over TLS.
#[derive(Clone, Debug, Default, Arguments)]
pub(crate) struct TlsArgs {
    /// A file of certificates in PEM that the balancer's has to lead to: it is asked over TLS.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) ca_file: Option<PathBuf>,
    /// A file with the chain of certificates that is shown to it, in PEM.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires_all = ["ca_file", "key_file"])]
    pub(crate) cert_file: Option<PathBuf>,
    /// A file with its private key, in PEM.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires = "cert_file")]
    pub(crate) key_file: Option<PathBuf>,
}

/// Where a balancer is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum AdminPlace {
    Address(SocketAddr),
    /// A name with a port.
    Name(String),
    Unix(PathBuf),
}

impl FromStr for AdminPlace {
    type Err = String;

    fn from_str(typed: &str) -> Result<Self, String> {
        let of_url =
            typed.strip_prefix("http://").map(|rest| rest.strip_suffix('/').unwrap_or(rest));
        let path = typed.strip_prefix("unix:").unwrap_or(typed);
        if of_url.is_none() && path.contains('/') {
            return Ok(Self::Unix(path.into()));
        }
        let place = of_url.unwrap_or(typed);
        if let Ok(address) = place.parse() {
            return Ok(Self::Address(address));
        }
        let is_name = |name: &str| {
            let may_be = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            !name.is_empty() && name.chars().all(may_be)
        };
        match place.split_once(':') {
            Some((name, port)) if is_name(name) && port.parse::<u16>().is_ok() => {
                Ok(Self::Name(place.to_owned()))
            }
            _ => Err("an address such as 127.0.0.1:9464 is wanted, or a path such as /run/quic-lb/admin.sock".to_owned()),
        }
    }
}

impl fmt::Display for AdminPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name(name) => name.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

#[derive(Debug, Arguments)]
pub(crate) struct ReloadArgs {
    #[command(flatten)]
    pub(crate) admin: AdminArgs,
    /// Take away backends and configurations of connection IDs even if live connections use them.
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Arguments)]
pub(crate) struct AgreeArgs {
    /// The balancers: where each takes requests, as http://192.0.2.11:9464, 192.0.2.11:9464 or the path of a Unix socket.
    #[arg(value_name = "URL", required = true, num_args = 2..)]
    pub(crate) balancers: Vec<AdminPlace>,
    /// A file with the token that they want to be shown, if they do.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) token_file: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Rotate {
    /// Configurations of connection IDs of a pool: from the old ones to the last in the file.
    ///
    /// Step 1: balancers read it. Step 2: servers make connection IDs by it. Step 3: nobody uses the old ones any more, by what
    /// all balancers have heard. Step 4: they are gone from the balancers.
    #[command(after_help = "\
Examples:
  quic-lb rotate ids web http://192.0.2.11:9464 http://192.0.2.12:9464
  quic-lb rotate ids web --until 3 --timeout 1h 192.0.2.11:9464 192.0.2.12:9464 && take-the-old-one-away")]
    Ids(RotateIdsArgs),
    /// A key of Retry tokens.
    ///
    /// Step 1: balancers open its tokens. Step 2: servers honour them, which balancers find out by asking. Step 3: balancers make
    /// tokens with it. Step 4: no other key is left.
    #[command(after_help = "\
Examples:
  quic-lb rotate tokens 8 http://192.0.2.11:9464 http://192.0.2.12:9464
  quic-lb rotate tokens 8 --until 2 192.0.2.11:9464 192.0.2.12:9464 && put-it-in-front")]
    Tokens(RotateTokensArgs),
}

#[derive(Debug, Arguments)]
pub(crate) struct RotateIdsArgs {
    /// The pool.
    #[arg(value_name = "POOL")]
    pub(crate) pool: String,
    #[command(flatten)]
    pub(crate) fleet: FleetArgs,
}

#[derive(Debug, Arguments)]
pub(crate) struct RotateTokensArgs {
    /// The sequence number of the key.
    #[arg(value_name = "KEY")]
    pub(crate) key: u8,
    #[command(flatten)]
    pub(crate) fleet: FleetArgs,
}

/// All balancers in front of the servers.
#[derive(Debug, Arguments)]
pub(crate) struct FleetArgs {
    /// The balancers, all of them: where each takes requests, as http://192.0.2.11:9464, 192.0.2.11:9464 or the path of a Unix socket.
    #[arg(value_name = "URL", required = true)]
    pub(crate) balancers: Vec<AdminPlace>,
    /// A file with the token that they want to be shown, if they do.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) token_file: Option<PathBuf>,
    /// Go on without what cannot be seen: balancers that do not answer, servers without traffic or that nobody asks. Not against what is
    /// seen: what live connections use, `quic-lb reload --force` alone takes away.
    #[arg(long)]
    pub(crate) force: bool,
    /// Wait until so many steps are done.
    #[arg(long, value_name = "STEP", value_parser = clap::value_parser!(u8).range(1..=4))]
    pub(crate) until: Option<u8>,
    /// How long to wait at most; for ever otherwise.
    #[arg(long, value_name = "TIME", requires = "until", value_parser = quic_lb_config::units::parse_duration)]
    pub(crate) timeout: Option<std::time::Duration>,
}

#[derive(Debug, Arguments)]
pub(crate) struct UpgradeArgs {
    #[command(flatten)]
    pub(crate) admin: AdminArgs,
}

#[derive(Debug, Arguments)]
pub(crate) struct BackendArgs {
    #[command(flatten)]
    pub(crate) admin: AdminArgs,
    /// The backend.
    #[arg(value_name = "POOL/BACKEND", value_parser = backend_name)]
    pub(crate) backend: BackendName,
    /// Why, for whoever looks later.
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<String>,
}

#[derive(Debug, Arguments)]
pub(crate) struct DrainArgs {
    #[command(flatten)]
    pub(crate) backend: BackendArgs,
    /// Wait until no connection is left.
    #[arg(long)]
    pub(crate) wait: bool,
    /// After how long without a word a connection is over.
    #[arg(long, value_name = "TIME", default_value = "8s", requires = "wait", value_parser = quic_lb_config::units::parse_duration)]
    pub(crate) quiet: std::time::Duration,
    /// How long to wait at most; for ever otherwise.
    #[arg(long, value_name = "TIME", requires = "wait", value_parser = quic_lb_config::units::parse_duration)]
    pub(crate) timeout: Option<std::time::Duration>,
}

/// A backend and the pool that it is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BackendName {
    pub(crate) pool: String,
    pub(crate) name: String,
}

fn backend_name(typed: &str) -> Result<BackendName, String> {
    match typed.split_once('/') {
        Some((pool, name)) if !pool.is_empty() && !name.is_empty() => {
            Ok(BackendName { pool: pool.to_owned(), name: name.to_owned() })
        }
        _ => Err("a pool and a backend of it are wanted, such as web/a".to_owned()),
    }
}

#[cfg(feature = "demo")]
#[derive(Debug, Arguments)]
pub(crate) struct DemoArgs {
    /// How long the clients go on.
    #[arg(long, value_name = "TIME", default_value = "20s", value_parser = quic_lb_config::units::parse_duration)]
    pub(crate) duration: std::time::Duration,
    /// How many origin servers.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=26))]
    pub(crate) backends: u8,
    /// How many clients, each with a connection at a time.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=2000))]
    pub(crate) clients: u16,
    /// Print nothing but the summary, as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Arguments)]
pub(crate) struct DecodeArgs {
    #[command(flatten)]
    pub(crate) file: ConfigFile,
    /// Decode as this pool does; all pools are tried otherwise.
    #[arg(long, value_name = "POOL")]
    pub(crate) pool: Option<String>,
    /// Print a JSON array with one object for each connection ID.
    #[arg(long)]
    pub(crate) json: bool,
    /// Connection IDs in hex.
    #[arg(required = true, value_name = "HEX")]
    pub(crate) cids: Vec<Hex>,
}

#[derive(Debug, Arguments)]
pub(crate) struct EncodeArgs {
    #[command(flatten)]
    pub(crate) file: ConfigFile,
    /// The backend: NAME, or POOL/NAME where several pools have that name.
    #[arg(long, value_name = "NAME")]
    pub(crate) backend: String,
    /// The configuration to encode with; needed where the pool has several.
    #[arg(long, value_name = "N", value_parser = parse_config_id)]
    pub(crate) config_id: Option<ConfigId>,
    /// The nonce in hex; random otherwise.
    #[arg(long, value_name = "HEX")]
    pub(crate) nonce: Option<Hex>,
}

#[derive(Debug, Arguments)]
pub(crate) struct ExplainArgs {
    #[command(flatten)]
    file: ConfigFile,
    /// The listener that the datagrams arrive on; otherwise each one, or, with --pcap, the one that
    /// they were sent to.
    #[arg(long, value_name = "NAME")]
    listener: Option<String>,
    /// The client's address and port.
    #[arg(long, value_name = "ADDR", required_unless_present = "pcap", conflicts_with = "pcap")]
    from: Option<SocketAddr>,
    /// Explain the datagrams of a capture (pcap or pcapng).
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pcap: Option<PathBuf>,
    /// The UDP payload in hex.
    #[arg(value_name = "HEX-DATAGRAM", required_unless_present = "pcap", conflicts_with = "pcap")]
    datagram: Option<Hex>,
}

/// What `explain` is to explain.
#[derive(Debug)]
pub(crate) struct Explain {
    pub(crate) config: PathBuf,
    pub(crate) listener: Option<String>,
    pub(crate) subject: Subject,
}

#[derive(Debug)]
pub(crate) enum Subject {
    Datagram { from: SocketAddr, octets: Vec<u8> },
    Capture(PathBuf),
}

impl From<ExplainArgs> for Explain {
    fn from(typed: ExplainArgs) -> Self {
        let ExplainArgs { file, listener, from, pcap, datagram } = typed;
        let subject = match (pcap, from, datagram) {
            (Some(capture), ..) => Subject::Capture(capture),
            (None, Some(from), Some(Hex(octets))) => Subject::Datagram { from, octets },
            (None, ..) => unreachable!("clap wants both when there is no --pcap"),
        };
        Self { config: file.config, listener, subject }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definitions_are_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_balancer_is_asked_at_an_address_a_name_or_a_path() {
        let read = |typed: &str| typed.parse::<AdminPlace>().ok();
        let address = Some(AdminPlace::Address(([192, 0, 2, 1], 9464).into()));
        for typed in ["192.0.2.1:9464", "http://192.0.2.1:9464", "http://192.0.2.1:9464/"] {
            assert_eq!(read(typed), address, "{typed}");
        }
        assert!(matches!(read("http://[::1]:9464"), Some(AdminPlace::Address(_))));
        assert_eq!(
            read("http://lb-1.example:9464"),
            Some(AdminPlace::Name("lb-1.example:9464".to_owned()))
        );
        for typed in ["/run/a.sock", "unix:/run/a.sock", "./a.sock"] {
            assert!(matches!(read(typed), Some(AdminPlace::Unix(_))), "{typed}");
        }
        for typed in [
            "",
            "lb",
            "http://lb",
            "lb:x",
            "lb:99999",
            "a b:1",
            "http://lb:1/x",
            ":1",
            "https://lb:1",
        ] {
            assert!(
                !matches!(read(typed), Some(AdminPlace::Address(_) | AdminPlace::Name(_))),
                "{typed}"
            );
        }
    }

    #[test]
    fn a_datagram_needs_its_sender_and_a_capture_must_not_have_one() {
        let parse = |args: &[&str]| {
            let all = ["quic-lb", "explain", "--config", "f"].iter().chain(args);
            Args::try_parse_from(all).map_err(|error| error.kind())
        };
        use clap::error::ErrorKind::{ArgumentConflict, MissingRequiredArgument};
        assert!(parse(&["--from", "192.0.2.1:5", "40"]).is_ok());
        assert!(parse(&["--pcap", "f"]).is_ok());
        assert!(parse(&["--pcap", "f", "--listener", "edge"]).is_ok());
        assert_eq!(parse(&["40"]).err(), Some(MissingRequiredArgument));
        assert_eq!(parse(&["--from", "192.0.2.1:5"]).err(), Some(MissingRequiredArgument));
        assert_eq!(parse(&[]).err(), Some(MissingRequiredArgument));
        assert_eq!(parse(&["--pcap", "f", "40"]).err(), Some(ArgumentConflict));
        assert_eq!(parse(&["--pcap", "f", "--from", "192.0.2.1:5"]).err(), Some(ArgumentConflict));
    }
}
