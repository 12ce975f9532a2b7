//! The programs under test: built by `cargo build` from this workspace, in the profile that the tests
//! were built with, at the first time that somebody asks for them.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::OnceLock,
};

use anyhow::{Context as _, bail, ensure};

/// The balancer, or what `QUIC_LB_BINARY` names instead of it.
///
/// # Errors
///
/// When it cannot be built.
pub fn balancer() -> anyhow::Result<PathBuf> {
    match std::env::var_os("QUIC_LB_BINARY") {
        Some(path) => Ok(path.into()),
        None => built("quic-lb"),
    }
}

/// The origin server and load client, or what `BACKEND_SIM_BINARY` names instead of it.
///
/// # Errors
///
/// When it cannot be built.
pub fn backend_sim() -> anyhow::Result<PathBuf> {
    match std::env::var_os("BACKEND_SIM_BINARY") {
        Some(path) => Ok(path.into()),
        None => built("backend-sim"),
    }
}

/// The example server on quinn.
///
/// # Errors
///
/// When it cannot be built.
pub fn quinn_echo() -> anyhow::Result<PathBuf> {
    built("quinn-echo")
}

fn built(name: &str) -> anyhow::Result<PathBuf> {
    static EXECUTABLES: OnceLock<Result<Vec<PathBuf>, String>> = OnceLock::new();
    match EXECUTABLES.get_or_init(|| build().map_err(|error| format!("{error:#}"))) {
        Ok(executables) => {
            let named = |path: &&PathBuf| path.file_stem().is_some_and(|stem| stem == name);
            executables.iter().find(named).cloned().with_context(|| format!("no {name} was built"))
        }
        Err(error) => bail!("the programs under test cannot be built: {error}"),
    }
}

/// Builds all of them at once. This choice of packages and targets makes cargo choose the features
/// that it chooses for `cargo test --workspace`, so that after it there is nothing left to build.
fn build() -> anyhow::Result<Vec<PathBuf>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .args(["build", "--quiet", "--message-format", "json-render-diagnostics"])
        .args([
            "--workspace",
            "--bin",
            "quic-lb",
            "--bin",
            "backend-sim",
            "--example",
            "quinn-echo",
        ]);
    if !cfg!(debug_assertions) {
        // Which is how packages are built.
        command.args(["--profile", "bench"]);
    }
    let output = command.stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "{}", output.status);
    let messages = String::from_utf8(output.stdout)?;
    let executables = messages.lines().filter_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        message.get("executable")?.as_str().map(PathBuf::from)
    });
    Ok(executables.collect())
}
