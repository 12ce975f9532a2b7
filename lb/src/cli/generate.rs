//! What comes out of the program itself: keys, the schema, completions, manual pages.

use std::io::Write;

use clap::CommandFactory;
use clap_complete::Shell;

use super::{args::Args, outcome::Failure};
use crate::words::Hex;

/// What manual pages say they belong to.
const VERSION: &str = concat!("quic-lb ", env!("CARGO_PKG_VERSION"));

pub(super) fn key(out: &mut impl Write) -> Result<(), Failure> {
    Ok(writeln!(out, "{}", random(16)?)?)
}

pub(super) fn schema(out: &mut impl Write) -> Result<(), Failure> {
    Ok(writeln!(out, "{:#}", quic_lb_config::schema())?)
}

pub(super) fn completions(shell: Shell, out: &mut impl Write) -> Result<(), Failure> {
    // The generator panics when it cannot write; memory always takes it.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "quic-lb", &mut script);
    Ok(out.write_all(&script)?)
}

/// The manual page of the command with this path of names; of the program when there is none.
pub(super) fn man(path: &[String], out: &mut impl Write) -> Result<(), Failure> {
    let mut command = Args::command();
    command.build();
    for name in path {
        let found = command.find_subcommand(name).cloned();
        command = found.ok_or_else(|| {
            Failure::other(format_args!("there is no command \"{}\"", path.join(" ")))
        })?;
    }
    let title = command.get_display_name().unwrap_or("quic-lb").to_owned();
    Ok(clap_mangen::Man::new(command).title(title).source(VERSION).render(out)?)
}

/// Octets that nobody can guess.
pub(super) fn random(octets: usize) -> Result<Hex, Failure> {
    let mut random = vec![0; octets];
    getrandom::fill(&mut random).map_err(|error| {
        Failure::other(format_args!("the system gives no random bytes: {error}"))
    })?;
    Ok(Hex(random))
}
