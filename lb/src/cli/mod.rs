//! The command line: reads arguments, runs one command, turns its outcome into an exit code.
//!
//! Standard output carries what was asked for, standard error what went wrong, as one clear
//! sentence or as the list of a file's mistakes. Exit codes: 0 done, 1 not done, 2 not understood.

mod args;
mod capture;
mod cid;
#[cfg(feature = "demo")]
mod demo;
mod explain;
mod generate;

use std::{
    fmt::Display,
    io::{self, BufWriter, Write},
    path::Path,
    process::ExitCode,
};

use clap::Parser;
use quic_lb_config::{Loaded, Report};

use crate::control;
use args::{Args, Cid, Command};

/// The whole program.
#[must_use]
pub fn main() -> ExitCode {
    let command = Args::parse().command;
    let mut out = BufWriter::new(io::stdout().lock());
    let outcome = run(command, &mut out).and_then(|()| Ok(out.flush()?));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads has read enough.
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(failure) => {
            complain(failure);
            ExitCode::FAILURE
        }
    }
}

/// Why a command was not done.
#[derive(Debug)]
enum Failure {
    /// Standard output does not take any more.
    Output(io::Error),
    /// The configuration file has mistakes.
    Config(Report),
    /// Anything else, in one sentence.
    Other(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

impl From<Report> for Failure {
    fn from(report: Report) -> Self {
        Self::Config(report)
    }
}

impl Failure {
    fn other(sentence: impl Display) -> Self {
        Self::Other(sentence.to_string())
    }
}

fn run(command: Command, out: &mut impl Write) -> Result<(), Failure> {
    match command {
        Command::Run(file) => control::run(&file.config).map_err(|error| match error {
            control::RunError::Config(report) => Failure::Config(report),
            other => Failure::other(other),
        }),
        Command::Check(file) => check(&file.config, out),
        Command::Cid(Cid::Decode(args)) => cid::decode(&load(&args.file.config)?, &args, out),
        Command::Cid(Cid::Encode(args)) => cid::encode(&load(&args.file.config)?, &args, out),
        Command::Explain(args) => {
            let explain = args::Explain::from(args);
            explain::explain(&load(&explain.config)?, &explain, out)
        }
        #[cfg(feature = "demo")]
        Command::Demo(args) => demo::demo(&args, out),
        Command::Keygen => generate::key(out),
        Command::Schema => generate::schema(out),
        Command::Completions { shell } => generate::completions(shell, out),
        Command::Man { command } => generate::man(&command, out),
    }
}

fn check(path: &Path, out: &mut impl Write) -> Result<(), Failure> {
    let Loaded { config, warnings } = quic_lb_config::load(path)?;
    let backends = config.pools.iter().map(|pool| pool.backends.len()).sum();
    writeln!(
        out,
        "{}: valid: {}, {}, {}; digest {}",
        path.display(),
        count(config.listeners.len(), "listener"),
        count(config.pools.len(), "pool"),
        count(backends, "backend"),
        config.digest(),
    )?;
    if !warnings.is_empty() {
        out.flush()?;
        tell(Report::new(path.display().to_string(), warnings));
    }
    Ok(())
}

fn load(path: &Path) -> Result<quic_lb_config::Config, Failure> {
    Ok(quic_lb_config::load(path)?.config)
}

fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

fn complain(failure: Failure) {
    match failure {
        Failure::Output(error) => tell(format_args!("quic-lb: cannot write the output: {error}")),
        Failure::Config(report) => {
            let errors = count(report.errors(), "error");
            tell(format_args!("{report}\nquic-lb: {}: {errors}", report.file));
        }
        Failure::Other(sentence) => tell(format_args!("quic-lb: {sentence}")),
    }
}

/// Writes to standard error; where that is gone there is nobody to tell.
fn tell(what: impl Display) {
    let _ = writeln!(io::stderr(), "{what}");
}
