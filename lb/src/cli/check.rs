//! `check`: whether configuration files can be used, and by a balancer that runs, for people or as JSON.

use std::{io::Write, path::Path};

use quic_lb_config::{Loaded, Mistake, Place, Report, Severity};
use serde_json::{Value, json};

use super::{
    against::Running,
    args::CheckArgs,
    outcome::{Failure, Read, excerpts, name, print_to_stderr, read},
};
use crate::words::count;

pub(super) fn check(args: &CheckArgs, out: &mut impl Write) -> Result<(), Failure> {
    let mut checked = Vec::new();
    let (mut wrong, mut refused) = (0, 0);
    let running = Running::meant(args)?;
    for file in args.files() {
        let outcome = read(file);
        wrong += usize::from(outcome.is_err());
        let reload = running.as_ref().zip(outcome.as_ref().ok());
        let reload = reload.map(|(running, (loaded, _))| running.reload(&loaded.config));
        refused += usize::from(reload.as_ref().is_some_and(|reload| !reload.refused.is_empty()));
        if args.json {
            let mut facts = facts(file, &outcome);
            if let Some(reload) = reload {
                facts["reload"] = reload.facts();
            }
            checked.push(facts);
        } else {
            tell(file, outcome, out)?;
            reload.map_or(Ok(()), |reload| reload.tell(out))?;
        }
    }
    if args.json {
        let json = serde_json::to_string_pretty(&checked).map_err(Failure::other)?;
        writeln!(out, "{json}")?;
    }
    out.flush()?;
    match (wrong, refused) {
        (1.., _) => Err(Failure::Told),
        (0, 1..) => Err(Failure::No),
        (0, 0) => Ok(()),
    }
}

fn tell(file: &Path, outcome: Read, out: &mut impl Write) -> Result<(), Failure> {
    let (loaded, text) = match outcome {
        Ok(read) => read,
        Err(report) => {
            out.flush()?;
            print_to_stderr(excerpts(&report));
            return Ok(());
        }
    };
    let file = name(file);
    let Loaded { config, warnings } = loaded;
    let backends = config.pools.iter().map(|pool| pool.backends.len()).sum();
    writeln!(
        out,
        "{file}: valid: {}, {}, {}; digest {}",
        count(config.listeners.len(), "listener"),
        count(config.pools.len(), "pool"),
        count(backends, "backend"),
        config.digest(),
    )?;
    if !warnings.is_empty() {
        out.flush()?;
        print_to_stderr(excerpts(&Report::new(file, warnings).on(&text)));
    }
    Ok(())
}

fn facts(file: &Path, outcome: &Read) -> Value {
    let mut facts = json!({ "file": name(file), "valid": outcome.is_ok() });
    let mistakes = match outcome {
        Ok((Loaded { config, warnings }, _)) => {
            let backends: usize = config.pools.iter().map(|pool| pool.backends.len()).sum();
            facts["digest"] = config.digest().into();
            facts["listeners"] = config.listeners.len().into();
            facts["pools"] = config.pools.len().into();
            facts["backends"] = backends.into();
            warnings
        }
        Err(report) => &report.mistakes,
    };
    facts["mistakes"] = mistakes.iter().map(mistake).collect();
    facts
}

fn mistake(Mistake { severity, place, found, expected, related }: &Mistake) -> Value {
    let (line, column) = place.as_ref().map(|place| (place.line, place.column)).unzip();
    let at = |Place { path, line, column }: &Place| json!({ "path": path, "line": line, "column": column });
    json!({
        "severity": match severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        },
        "line": line,
        "column": column,
        "path": place.as_ref().map(|place| &place.path),
        "found": found,
        "expected": expected,
        "related": related.as_ref().map(at),
    })
}
