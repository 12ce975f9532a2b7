//! Reading text in surroundings that are the same everywhere.
#![allow(dead_code, reason = "each test crate uses its own part")]

use std::path::{Path, PathBuf};

use quic_lb_config::{Loaded, Mistake, Report, Severity, Surroundings, from_str};

pub(crate) const KEY: &str = "8f95f09245765f80256934e50c66207f";
pub(crate) const CONTRACT: &str = include_str!("../../examples/contract.yaml");
pub(crate) const FULL: &str = include_str!("../../examples/full.yaml");

/// Reads `text` with an environment in which only `LB_KEY`, `LB_ZERO` and `LB_BAD` are set.
pub(crate) fn read(text: &str) -> Result<Loaded, Report> {
    read_beside(text, Path::new("/nonexistent"))
}

/// Reads `text` as if its file stood in `directory`.
pub(crate) fn read_beside(text: &str, directory: &Path) -> Result<Loaded, Report> {
    let environment = |name: &str| match name {
        "LB_KEY" => Some(format!("{KEY}\n")),
        "LB_ZERO" => Some("0".repeat(32)),
        "LB_BAD" => Some("secret-but-no-hex".to_owned()),
        _ => None,
    };
    let interface = |name: &str| (name == "eth0").then_some(2);
    let surroundings = Surroundings {
        directory,
        environment: &environment,
        interface: &interface,
        local_ports: Some(28_232),
        ..Surroundings::of_text("lb.yaml")
    };
    from_str(text, &surroundings)
}

/// Everything there is to say about `text`, warnings too.
pub(crate) fn mistakes(text: &str) -> Vec<Mistake> {
    match read(text) {
        Ok(loaded) => loaded.warnings,
        Err(report) => report.mistakes,
    }
}

/// Severity, line, column and path, on one line.
pub(crate) fn place(mistake: &Mistake) -> String {
    let severity = match mistake.severity {
        Severity::Error => "",
        Severity::Warning => "warning ",
    };
    match &mistake.place {
        Some(place) => format!("{severity}{} at {}:{}", place.path, place.line, place.column),
        None => format!("{severity}file"),
    }
}

/// The mistakes of a text in which `§` marks where they are, one for each of `paths`, in order.
pub(crate) fn mistakes_at_marks(marked: &str, paths: &[&str]) -> Vec<Mistake> {
    let (mut text, mut line, mut column, mut marks) = (String::new(), 1, 1, Vec::new());
    for character in marked.chars() {
        match character {
            '§' => {
                marks.push((line, column));
                continue;
            }
            '\n' => (line, column) = (line + 1, 1),
            _ => column += 1,
        }
        text.push(character);
    }
    assert_eq!(marks.len(), paths.len(), "marks and paths in {marked}");
    let expected: Vec<_> = paths
        .iter()
        .zip(marks)
        .map(|(path, (line, column))| format!("{path} at {line}:{column}"))
        .collect();
    let mistakes = mistakes(&text);
    assert_eq!(mistakes.iter().map(place).collect::<Vec<_>>(), expected, "in {marked}");
    mistakes
}

/// The contract with the one place where `from` stands replaced.
pub(crate) fn contract_with(from: &str, to: &str) -> String {
    assert_eq!(CONTRACT.matches(from).count(), 1, "{from}");
    CONTRACT.replace(from, to)
}

pub(crate) fn examples() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("examples")
}
