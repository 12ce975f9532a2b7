//! The files in `deploy/` speak of things that exist.

#![allow(clippy::unwrap_used, reason = "a failed test is a fine message")]

use std::path::Path;

use quic_lb::{
    admission::mode::{Phase, Reason},
    backend::BackendState,
    check::CheckResult,
    metrics::{FAMILIES, Family, Reloads},
    verdict::{DropReason, Rule, TokenResult},
};
use serde_json::Value;

#[test]
fn alerts_use_metrics_and_labels_that_exist() {
    let rules: Value = serde_yaml::from_str(&deploy("prometheus/rules.yaml")).unwrap();
    let rules = rules["groups"][0]["rules"].as_array().unwrap().clone();
    assert!(rules.len() > 10);
    for rule in rules {
        let name = rule["alert"].as_str().unwrap();
        let expression = rule["expr"].as_str().unwrap();
        assert!(rule["annotations"]["summary"].is_string(), "{name}");
        let severity = rule["labels"]["severity"].as_str().unwrap();
        assert!(["page", "ticket"].contains(&severity), "{name}");

        let mut labels = vec!["instance"];
        for family in families_in(expression) {
            let family = family.unwrap_or_else(|unknown| panic!("{name}: no metric {unknown}"));
            labels.extend(family.labels);
        }
        for (label, value) in matchers_in(expression) {
            assert!(labels.contains(&label) || label == "job", "{name}: no label {label}");
            for word in value.split('|') {
                assert!(words_of(label).contains(&word), "{name}: {label} is never {word}");
            }
        }
        for label in grouping_labels_in(expression) {
            assert!(labels.contains(&label), "{name}: no label {label}");
        }
        let text = rule["annotations"].to_string();
        for label in text.split("$labels.").skip(1) {
            let label = label.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap();
            assert!(labels.contains(&label), "{name}: no label {label}");
        }
    }
}

#[test]
fn the_scrape_configuration_asks_the_default_admin_address() {
    let scrape: Value = serde_yaml::from_str(&deploy("prometheus/scrape.yaml")).unwrap();
    let job = &scrape["scrape_configs"][0];
    assert_eq!(job["job_name"], "quic-lb");
    assert_eq!(job["static_configs"][0]["targets"][0], "127.0.0.1:9464");
}

#[test]
fn fleets_ask_the_default_admin_address_whether_a_balancer_is_ready() {
    for file in ["fleet/keepalived.conf", "fleet/announce"] {
        assert!(deploy(file).contains("http://127.0.0.1:9464/readyz"), "{file}");
    }
    for file in ["fleet/bird.conf", "fleet/frr.conf"] {
        assert!(deploy(file).contains("table 100"), "{file}: the table of announce");
    }
    assert!(deploy("fleet/announce").contains("TABLE:=100"));
}

#[test]
fn the_operators_document_names_every_metric_and_reason() {
    let document = deploy("README.md");
    for family in FAMILIES {
        let labels = family.labels.join(", ");
        let row = format!("| `{}` | {labels} |", family.name).replace("|  |", "| |");
        assert!(document.contains(&row), "no row {row}");
    }
    for reason in DropReason::ALL {
        assert!(document.contains(&format!("`{}`", reason.label())), "{}", reason.label());
    }
    assert_eq!(families_in(&document).find_map(Result::err), None, "no such metric");
}

#[test]
fn the_unit_runs_commands_that_exist() {
    let unit = deploy("quic-lb.service");
    for line in unit.lines().filter(|line| line.contains("=/usr/bin/quic-lb ")) {
        let (_, command) = line.split_once("quic-lb ").unwrap();
        let known =
            ["check --config /etc/quic-lb/lb.yaml", "run --config /etc/quic-lb/lb.yaml", "reload"];
        assert!(known.contains(&command), "{line}");
    }
}

/// `check` warns of a drain that the unit would cut short.
#[test]
fn the_unit_waits_for_as_long_as_check_takes_it_to() {
    let limit = quic_lb_config::UNIT_STOP_LIMIT.as_secs();
    let line = format!("TimeoutStopSec={limit}s");
    assert!(deploy("quic-lb.service").lines().any(|of_unit| of_unit == line), "no {line}");
}

fn deploy(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The metrics of ours that a text names.
fn families_in(text: &str) -> impl Iterator<Item = Result<Family, &str>> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words
        .filter(|word| word.starts_with("quic_lb_"))
        .map(|word| FAMILIES.iter().find(|family| family.name == word).copied().ok_or(word))
}

/// The pairs inside of braces.
fn matchers_in(expression: &str) -> Vec<(&str, &str)> {
    let braces = expression.split('{').skip(1).map(|rest| rest.split('}').next().unwrap());
    let pairs = braces.flat_map(|inside| inside.split(','));
    pairs
        .map(|pair| {
            let (label, value) = pair.split_once(['=', '!']).unwrap();
            (label.trim(), value.trim_matches(['=', '~', '"']))
        })
        .collect()
}

fn grouping_labels_in(expression: &str) -> Vec<&str> {
    let lists = expression.split(" by (").skip(1).map(|rest| rest.split(')').next().unwrap());
    lists.flat_map(|list| list.split(',')).map(str::trim).collect()
}

fn words_of(label: &str) -> Vec<&'static str> {
    match label {
        "reason" => {
            let switches = Reason::ALL.iter().map(|reason| reason.label());
            DropReason::ALL.iter().map(|reason| reason.label()).chain(switches).collect()
        }
        "rule" => Rule::ALL.iter().map(|rule| rule.label()).collect(),
        "state" => BackendState::ALL.iter().map(|state| state.label()).collect(),
        "result" => {
            let tokens = TokenResult::ALL.iter().map(|result| result.label());
            let checks = CheckResult::ALL.iter().map(|result| result.label());
            tokens.chain(checks).chain(Reloads::RESULTS).collect()
        }
        "phase" => Phase::LABELS.to_vec(),
        "job" => vec!["quic-lb"],
        other => panic!("which values has {other}?"),
    }
}
