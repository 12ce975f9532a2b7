//! The command to a balancer that runs: be replaced by the program on disk.

use std::{
    io::{self, Write},
    time::Duration,
};

use serde::Deserialize;

use super::{
    admin::{Answer, Balancer, run},
    args::UpgradeArgs,
    outcome::Failure,
};

/// Longer than a balancer waits for its successor.
const PATIENCE: Duration = Duration::from_secs(50);

/// What the admin interface says of an upgrade.
#[derive(Debug, Deserialize)]
struct Told {
    process: u32,
    flows: usize,
    standstill_seconds: f64,
}

pub(super) fn upgrade(args: &UpgradeArgs, out: &mut impl Write) -> Result<(), Failure> {
    let balancer = Balancer::meant(&args.admin)?;
    let told = run(async {
        let answer = balancer.request("POST", "/api/v1/upgrade", PATIENCE).await;
        let told = answer.and_then(Answer::into_body);
        let told = told.and_then(|body| serde_json::from_str(&body).map_err(io::Error::other));
        told.map_err(|error| balancer.refused(&error))
    })?;
    let Told { process, flows, standstill_seconds } = told;
    let millis = standstill_seconds * 1e3;
    Ok(writeln!(out, "process {process} goes on with {flows} flows; handed over in {millis} ms")?)
}
