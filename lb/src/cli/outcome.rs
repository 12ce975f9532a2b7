//! Why a command was not done, and how that is said.

use std::{
    fmt::Display,
    io::{self, Write},
    path::Path,
};

use quic_lb_config::Report;

use crate::words::count;

/// Why a command was not done.
#[derive(Debug)]
pub(crate) enum Failure {
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
    pub(crate) fn other(sentence: impl Display) -> Self {
        Self::Other(sentence.to_string())
    }
}

pub(crate) fn load(path: &Path) -> Result<quic_lb_config::Config, Failure> {
    Ok(quic_lb_config::load(path)?.config)
}

pub(crate) fn report_failure(failure: Failure) {
    match failure {
        Failure::Output(error) => {
            print_to_stderr(format_args!("quic-lb: cannot write the output: {error}"))
        }
        Failure::Config(report) => {
            let errors = count(report.errors(), "error");
            print_to_stderr(format_args!("{report}\nquic-lb: {}: {errors}", report.file));
        }
        Failure::Other(sentence) => print_to_stderr(format_args!("quic-lb: {sentence}")),
    }
}

/// Writes to standard error; where that is gone there is nobody to tell.
pub(crate) fn print_to_stderr(what: impl Display) {
    let _ = writeln!(io::stderr(), "{what}");
}
