//! The command line: reads arguments, runs one command, turns its outcome into an exit code.
//!
//! Standard output carries what was asked for, standard error what went wrong, as one clear
//! sentence or as the list of a file's mistakes. Exit codes: 0 done, 1 not done, 2 not understood,
//! 3 done and the answer is no, 4 cut short.

#![expect(
    clippy::disallowed_methods,
    reason = "commands are shells: they give the core time and randomness"
)]

mod admin;
mod against;
mod agree;
mod args;
mod capture;
mod check;
mod cid;
#[cfg(feature = "demo")]
mod demo;
mod drain;
mod explain;
mod generate;
mod joined;
mod links;
mod outcome;
mod reload;
mod rotate;
mod tls;
mod unread;
mod upgrade;

use std::{
    io::{self, BufWriter, Write},
    path::Path,
    process::ExitCode,
};

use crate::control;
use args::{Args, Cid, Command};
use clap::Parser;
use outcome::{Failure, STDIN, load, report_failure};

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
            let code = failure.code();
            report_failure(failure);
            ExitCode::from(code)
        }
    }
}

fn run(command: Command, out: &mut impl Write) -> Result<(), Failure> {
    match command {
        Command::Run(args) if args.file.config == Path::new(STDIN) => Err(Failure::other(
            "a running balancer reads its configuration again and again: give it a file",
        )),
        Command::Run(args) => match control::run(&args.file.config, !args.unconfined) {
            Ok(control::Ending::Drained | control::Ending::HandedOver) => Ok(()),
            Ok(control::Ending::CutShort) => Err(Failure::CutShort),
            Err(control::RunError::Config(report)) => Err(Failure::Config(report)),
            Err(other) => Err(Failure::other(other)),
        },
        Command::Check(args) => check::check(&args, out),
        Command::Cid(Cid::Decode(args)) => cid::decode(&load(&args.file.config)?, &args, out),
        Command::Cid(Cid::Encode(args)) => cid::encode(&load(&args.file.config)?, &args, out),
        Command::Explain(args) => {
            let explain = args::Explain::from(args);
            explain::explain(&load(&explain.config)?, &explain, out)
        }
        Command::Drain(args) => drain::drain(&args, out),
        Command::Agree(args) => agree::agree(&args, out),
        Command::Rotate(what) => rotate::rotate(&what, out),
        Command::Reload(args) => reload::reload(&args, out),
        Command::Activate(args) => drain::activate(&args, out),
        Command::Upgrade(args) => upgrade::upgrade(&args, out),
        #[cfg(feature = "demo")]
        Command::Demo(args) => demo::demo(&args, out),
        Command::Keygen => generate::key(out),
        Command::Schema => generate::schema(out),
        Command::Completions { shell } => generate::completions(shell, out),
        Command::Man { command } => generate::man(&command, out),
    }
}
