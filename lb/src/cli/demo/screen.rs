//! The picture of a demonstration that goes on: a table on a terminal, a line now and then
//! elsewhere, nothing for those who want JSON.

use std::{
    fmt::Write as _,
    io::{self, IsTerminal as _},
    time::{Duration, Instant},
};

use backend_sim::load::{ClientView, Load, Report};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;

use super::{fleet::Fleet, metrics::Metrics};
use crate::cli::{admin::Balancer, args::DemoArgs, outcome::print_to_stderr};

/// Clients that the table shows.
const CLIENTS: usize = 12;
/// From one line to the next where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(2);

pub(super) struct Screen {
    canvas: Canvas,
    seconds: f64,
    heading: String,
    events: Vec<String>,
}

enum Canvas {
    Nothing,
    Lines { last: Instant },
    Terminal(ProgressBar),
}

impl Screen {
    pub(super) fn new(args: &DemoArgs, fleet: &Fleet) -> Self {
        let (address, admin) = (fleet.address(), fleet.admin());
        let heading = format!(
            "balancer {address} (HTTP/3), status page http://{admin}/, metrics http://{admin}/metrics"
        );
        let canvas = if args.json {
            Canvas::Nothing
        } else if io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.set_style(
                ProgressStyle::with_template("{msg}").unwrap_or(ProgressStyle::default_spinner()),
            );
            Canvas::Terminal(bar)
        } else {
            print_to_stderr(&heading);
            Canvas::Lines { last: Instant::now() }
        };
        Self { canvas, seconds: args.duration.as_secs_f64(), heading, events: Vec::new() }
    }

    /// Says that something happened after so many seconds.
    pub(super) fn note(&mut self, at: f64, what: &str) {
        let event = format!("{at:>4.1} s  {what}");
        if let Canvas::Lines { .. } = self.canvas {
            print_to_stderr(&event);
        }
        self.events.push(event);
    }

    pub(super) async fn show(&mut self, fleet: &Fleet, load: &Load) {
        let report = load.report();
        match &mut self.canvas {
            Canvas::Nothing => {}
            Canvas::Lines { last } if last.elapsed() < LINE_EVERY => {}
            Canvas::Lines { last } => {
                *last = Instant::now();
                print_to_stderr(line(&report));
            }
            Canvas::Terminal(_) => {
                let metrics = Metrics::fetch(fleet.admin()).await.unwrap_or_default();
                let states =
                    Balancer::at(fleet.admin()).get("/api/v1/backends").await.unwrap_or_default();
                let picture = self.picture(&report, &metrics, &states, fleet, &load.clients());
                if let Canvas::Terminal(bar) = &self.canvas {
                    bar.set_message(picture);
                    bar.tick();
                }
            }
        }
    }

    pub(super) fn end(&self) {
        if let Canvas::Terminal(bar) = &self.canvas {
            bar.finish();
            print_to_stderr("");
        }
    }

    fn picture(
        &self,
        report: &Report,
        metrics: &Metrics,
        states: &str,
        fleet: &Fleet,
        clients: &[ClientView],
    ) -> String {
        let mut out = format!("{}\n\n{} of {:.0} s\n", self.heading, line(report), self.seconds);
        let rules = metrics.by_rule();
        let rules: Vec<_> = rules.iter().map(|(rule, count)| format!("{rule} {count}")).collect();
        // Writing to a string does not fail.
        let _ = writeln!(out, "datagrams by rule: {}\n", rules.join(", "));
        let _ = writeln!(
            out,
            "{:<9}{:<10}{:>12}{:>12}{:>10}{:>12}",
            "backend", "state", "connections", "accepted", "requests", "misrouted"
        );
        for (name, counters) in fleet.counters() {
            let _ = writeln!(
                out,
                "{name:<9}{:<10}{:>12}{:>12}{:>10}{:>12}",
                state(states, &name),
                counters.active,
                counters.accepted,
                counters.requests,
                counters.misrouted
            );
        }
        let _ = writeln!(
            out,
            "\n{:<9}{:<22}{:<9}{:>9}{:>9}{:>12}{:>13}",
            "client", "address", "backend", "requests", "rebinds", "migrations", "connections"
        );
        for (number, client) in clients.iter().take(CLIENTS).enumerate() {
            let address = client.address.map_or("-".to_owned(), |address| address.to_string());
            let _ = writeln!(
                out,
                "{:<9}{address:<22}{:<9}{:>9}{:>9}{:>12}{:>13}",
                number + 1,
                client.backend.as_deref().unwrap_or("-"),
                client.requests,
                client.rebinds,
                client.migrations,
                client.connections
            );
        }
        if let Some(more) = clients.len().checked_sub(CLIENTS).filter(|more| *more > 0) {
            let _ = writeln!(out, "and {more} more");
        }
        for event in &self.events {
            let _ = write!(out, "\n{event}");
        }
        out
    }
}

fn line(report: &Report) -> String {
    format!(
        "{:>4.1} s  {} connections, {} requests, {} rebinds, {} migrations, {} lost, {} misrouted",
        report.seconds,
        report.connections,
        report.requests,
        report.rebinds,
        report.migrations,
        report.lost,
        report.misrouted,
    )
}

/// What the admin interface says about a backend.
fn state(states: &str, name: &str) -> String {
    let all: Vec<Value> = serde_json::from_str(states).unwrap_or_default();
    let found = all.iter().find(|backend| backend["name"] == name);
    found.and_then(|backend| backend["state"].as_str()).unwrap_or("-").to_owned()
}
