//! `reload`: has a running balancer read its configuration, and says what came of it.

use std::{io::Write, time::Duration};

use serde::Deserialize;

use super::{
    admin::{self, Balancer},
    args::ReloadArgs,
    outcome::{Failure, print_to_stderr},
};
use crate::words::count;

/// Longer than a balancer takes to give up: ten seconds for its disk, and as many for its tables.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the admin interface says of a reload.
#[derive(Debug, Deserialize)]
#[serde(tag = "result", rename_all = "snake_case")]
enum Told {
    Applied { digest: String, changes: Vec<String>, more_changes: usize },
    Unchanged { digest: String },
}

#[derive(Debug, Deserialize)]
struct Refused {
    error: String,
    mistakes: Vec<String>,
}

pub(super) fn reload(args: &ReloadArgs, out: &mut impl Write) -> Result<(), Failure> {
    let balancer = Balancer::meant(&args.admin)?;
    let path = if args.force { "/api/v1/reload?force=true" } else { "/api/v1/reload" };
    let answer = admin::run(async {
        let answer = balancer.request("POST", path, PATIENCE).await;
        answer.map_err(|error| balancer.refused(&error))
    })?;
    if let Ok(Refused { error, mistakes }) = serde_json::from_str(&answer.body) {
        for mistake in mistakes {
            print_to_stderr(mistake);
        }
        return Err(Failure::other(error));
    }
    let told = answer.into_body().and_then(|body| Ok(serde_json::from_str(&body)?));
    match told.map_err(|error| balancer.refused(&error))? {
        Told::Applied { digest, changes, more_changes } => {
            for change in &changes {
                writeln!(out, "{change}")?;
            }
            let changes = count(changes.len() + more_changes, "change");
            Ok(writeln!(out, "configuration applied: {changes}; digest {digest}")?)
        }
        Told::Unchanged { digest } => {
            Ok(writeln!(out, "configuration unchanged; digest {digest}")?)
        }
    }
}
