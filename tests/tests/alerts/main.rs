//! The alerts that come with the balancer, as Prometheus sees them: each fires when it has to, stays for as long as the fault
//! lasts, and ends; and no other fires.
//!
//! What needs Prometheus is ignored unless it is asked for: `cargo test -p quic-lb-tests --test alerts -- --ignored`
//! fetches it from Debian's archive, below the target folder.

#![allow(clippy::unwrap_used, reason = "a failed test is a fine message")]

mod cases;
mod real;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};

use cases::{CASES, Case, PHASES, Shape, WELL};
use serde_json::{Value, json};

/// How often rules are looked at, in seconds.
const EVALUATION: u32 = 15;

#[test]
fn every_alert_has_a_case_and_every_case_an_alert() {
    let rules = std::fs::read_to_string(rules()).unwrap();
    let rules: Value = serde_yaml::from_str(&rules).unwrap();
    let groups = rules["groups"].as_array().unwrap();
    let all = groups.iter().flat_map(|group| group["rules"].as_array().unwrap());
    let alerts: BTreeSet<_> = all.map(|rule| rule["alert"].as_str().unwrap()).collect();
    let cases: BTreeSet<_> = CASES.iter().map(|case| case.alert).collect();
    assert_eq!(alerts, cases);
    let besides = CASES.iter().flat_map(|case| case.besides);
    assert_eq!(besides.filter(|name| !alerts.contains(*name)).count(), 0);
}

#[test]
#[ignore = "needs Prometheus: cargo test -p quic-lb-tests --test alerts -- --ignored"]
fn alerts_fire_stay_and_end_with_their_faults_alone() {
    let promtool = programs().join("promtool");
    let folder = tempfile::tempdir().unwrap();
    // What is scraped often, and seldom.
    for interval in [1, 15] {
        let tests: Vec<_> = CASES.iter().map(|case| test(case, interval)).collect();
        let input = json!({
            "rule_files": [rules()],
            "evaluation_interval": format!("{EVALUATION}s"),
            "tests": tests,
        });
        let file = folder.path().join(format!("{interval}.json"));
        std::fs::write(&file, input.to_string()).unwrap();
        let run = Command::new(&promtool).args(["test", "rules"]).arg(&file).output().unwrap();
        let said = [run.stdout, run.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(run.status.success(), "scraped every {interval} s\n{said}");
    }
}

/// A case as promtool takes it.
fn test(case: &Case, interval: u32) -> Value {
    let mut series: BTreeMap<_, _> = WELL.iter().copied().collect();
    series.extend(case.series.iter().copied());
    let series = series
        .into_iter()
        .map(|(name, shape)| json!({ "series": name, "values": values(shape, interval) }));
    let [begin, lasts, after] = PHASES;
    let end = begin + lasts;
    let [early, late] = case.fires;
    let silent = (0..begin).step_by(60).chain((early > 0).then_some(begin + early));
    let silent = silent.chain((end + case.ends..end + after).step_by(60));
    let firing = (begin + late..=end).step_by(60).map(|at| (at, true));
    let besides = case.besides.join("|");
    let expression =
        format!("group by (alertname) (ALERTS{{alertstate=\"firing\",alertname!~\"{besides}\"}})");
    let looks = silent.map(|at| (at, false)).chain(firing).map(|(at, fires)| {
        let sample = json!({ "labels": format!("{{alertname=\"{}\"}}", case.alert), "value": 1 });
        let samples: Vec<_> = fires.then_some(sample).into_iter().collect();
        json!({ "eval_time": format!("{at}s"), "expr": expression, "exp_samples": samples })
    });
    json!({
        "name": format!("{}: {}", case.alert, case.fault),
        "interval": format!("{interval}s"),
        "input_series": series.collect::<Vec<_>>(),
        "promql_expr_test": looks.collect::<Vec<_>>(),
    })
}

/// What is seen of a metric that is scraped so often, in the words of promtool.
fn values(shape: Shape, interval: u32) -> String {
    let mut seen = vec![];
    let mut was_there = false;
    for at in (0..=PHASES.iter().sum()).step_by(interval as usize) {
        let value = value(shape, at);
        seen.push(match value {
            Some(value) => value.to_string(),
            None if was_there => "stale".to_owned(),
            None => "_".to_owned(),
        });
        was_there = value.is_some();
    }
    seen.join(" ")
}

fn value(shape: Shape, at: u32) -> Option<f64> {
    let [begin, lasts, _] = PHASES;
    let end = begin + lasts;
    let phase = usize::from(at >= begin) + usize::from(at >= end);
    let during = |of: u32| (at.wrapping_sub(begin)) % of;
    let value = match (shape, phase) {
        (Shape::Level(values), _) => values[phase],
        (Shape::Rate(rates), _) => {
            let [well, fault, after] =
                [at.min(begin), at.clamp(begin, end) - begin, at.max(end) - end];
            // Counters are whole.
            rates[0]
                .mul_add(well.into(), rates[1].mul_add(fault.into(), rates[2] * f64::from(after)))
                .floor()
        }
        (Shape::Pulse { on, of }, 1) => f64::from(u8::from(during(of) < on)),
        (Shape::Pulse { .. } | Shape::Late { .. }, 0 | 2..) => 0.,
        (Shape::Gap { off, of } | Shape::Late { off, of }, 1) => {
            f64::from(u8::from(during(of) >= off))
        }
        (Shape::Absent(_), 1) => f64::NAN,
        (Shape::Gap { .. }, _) => 1.,
        (Shape::Absent(value), _) => value,
    };
    (!value.is_nan()).then_some(value)
}

fn rules() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/prometheus/rules.yaml")
}

/// Where the programs of Prometheus are.
fn programs() -> PathBuf {
    // The test runs as target/PROFILE/deps/TEST.
    let executable = std::env::current_exe().unwrap();
    let folder = executable.ancestors().nth(3).unwrap().join("tmp/prometheus");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("foreign/prometheus");
    let run = Command::new(script).arg(folder).output().unwrap();
    assert!(run.status.success(), "no Prometheus: {}", String::from_utf8_lossy(&run.stderr));
    PathBuf::from(String::from_utf8(run.stdout).unwrap().trim())
}
