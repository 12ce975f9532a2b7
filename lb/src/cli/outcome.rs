//! Why a command was not done, and how that is said.

use std::{
    fmt::Display,
    io::{self, IsTerminal as _, Read as _, Write},
    path::Path,
};

use quic_lb_config::{Config, Loaded, MAX_OCTETS, Mistake, Report, Severity, Surroundings};
use zeroize::Zeroizing;

use crate::{colours, words::count};

/// What stands for standard input in the place of a file.
pub(crate) const STDIN: &str = "-";

/// Why a command was not done.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Standard output does not take any more.
    Output(io::Error),
    /// The configuration file has mistakes.
    Config(Report),
    /// Anything else, in one sentence.
    Other(String),
    /// It has been told already.
    Told,
    /// What was asked has been told, and it is no.
    No,
    /// A second signal ended what the first one had asked for.
    CutShort,
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

    /// What the process ends with.
    pub(crate) const fn code(&self) -> u8 {
        match self {
            Self::Output(_) | Self::Config(_) | Self::Other(_) | Self::Told => 1,
            Self::No => 3,
            Self::CutShort => 4,
        }
    }
}

pub(crate) fn load(path: &Path) -> Result<Config, Failure> {
    Ok(read(path)?.0.config)
}

/// A configuration and its text.
pub(crate) type Read = Result<(Loaded, Zeroizing<String>), Report>;

/// The configuration in a file or on standard input.
pub(crate) fn read(path: &Path) -> Read {
    let file = name(path);
    if path != Path::new(STDIN) {
        let text = quic_lb_config::read_text(path)?;
        let loaded = quic_lb_config::from_str(&text, &Surroundings::of_file(&file, path))?;
        return Ok((loaded, text));
    }
    let mut octets = Vec::new();
    let input = io::stdin().lock().take(MAX_OCTETS as u64 + 1).read_to_end(&mut octets);
    if let Err(error) = input {
        let mistake = Mistake {
            severity: Severity::Error,
            place: None,
            found: format!("standard input that cannot be read: {error}"),
            expected: "a configuration".to_owned(),
            related: None,
        };
        return Err(Report::new(file, vec![mistake]));
    }
    let text = quic_lb_config::text_of(octets, &file)?;
    let loaded = quic_lb_config::from_str(&text, &Surroundings::of_this_host(&file))?;
    Ok((loaded, text))
}

/// A file as it is called in reports.
pub(crate) fn name(path: &Path) -> String {
    if path == Path::new(STDIN) { "standard input".to_owned() } else { path.display().to_string() }
}

/// A report for standard error: excerpts, and how many errors there are.
pub(crate) fn excerpts(report: &Report) -> String {
    let excerpts = report.excerpts(colours::wanted(io::stderr().is_terminal()));
    match report.errors() {
        0 => excerpts,
        errors => format!("{excerpts}\nquic-lb: {}: {}", report.file, count(errors, "error")),
    }
}

pub(crate) fn report_failure(failure: Failure) {
    match failure {
        Failure::Output(error) => {
            print_to_stderr(format_args!("quic-lb: cannot write the output: {error}"))
        }
        Failure::Config(report) => print_to_stderr(excerpts(&report)),
        Failure::Told | Failure::No | Failure::CutShort => {}
        Failure::Other(sentence) => print_to_stderr(format_args!("quic-lb: {sentence}")),
    }
}

/// Writes to standard error; where that is gone there is nobody to tell.
pub(crate) fn print_to_stderr(what: impl Display) {
    // At once: a process that hands over to this one writes there too.
    let _ = io::stderr().write_all(format!("{what}\n").as_bytes());
}
