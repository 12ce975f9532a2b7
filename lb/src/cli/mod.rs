//! The command line: reads arguments, runs one command, turns its outcome into an exit code.
//!
//! Standard output carries what was asked for, standard error what went wrong, as one clear
//! sentence or as the list of a file's mistakes. Exit codes: 0 done, 1 not done, 2 not understood.

#![expect(
    clippy::disallowed_methods,
    reason = "commands are shells: they give the core time and randomness"
)]

mod args;
mod capture;
mod cid;
#[cfg(feature = "demo")]
mod demo;
mod explain;
mod generate;
mod outcome;

use std::{
    io::{self, BufWriter, Write},
    path::Path,
    process::ExitCode,
};

use clap::Parser;
use quic_lb_config::{Loaded, Report};

use crate::{control, words::count};
use args::{Args, Cid, Command};
use outcome::{Failure, load, print_to_stderr, report_failure};

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
            report_failure(failure);
            ExitCode::FAILURE
        }
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
        print_to_stderr(Report::new(path.display().to_string(), warnings));
    }
    Ok(())
}
