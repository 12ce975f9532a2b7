//! The status page for people: one look, no scripts.

use std::fmt::{self, Display, Write};

use super::plane::{views::BackendView, watched::DrainView};
use crate::{
    metrics::Reading,
    verdict::{DropReason, ReplyKind, Rule},
};

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;\
    padding:0 1rem;color:#1d2630;background:#fff}table{border-collapse:collapse;width:100%;\
    margin:.5rem 0 1.5rem}th,td{text-align:left;padding:.25rem .75rem .25rem 0;border-bottom:1px \
    solid #dde3ea}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}.active{color:\
    #0a6b2d}.draining,.probing{color:#8a5a00}.down,.miswired,.no{color:#b00020;font-weight:600}";

/// The page.
pub(super) fn status(reading: &Reading, backends: &[BackendView]) -> String {
    let mut page = String::new();
    // Writing to a string cannot fail.
    let _ = write(&mut page, reading, backends);
    page
}

fn write(page: &mut String, reading: &Reading, backends: &[BackendView]) -> fmt::Result {
    let version = env!("CARGO_PKG_VERSION");
    write!(
        page,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\"><title>quic-lb</title>\
         <style>{STYLE}</style></head><body><h1>quic-lb</h1>"
    )?;
    let ready = if reading.ready { "ready" } else { "<span class=\"no\">not ready</span>" };
    let (workers, digest) = (reading.workers, Escaped(&reading.digest));
    let flows: u64 = reading.listeners.iter().map(|listener| listener.totals.flows).sum();
    let limit = reading.flow_limit;
    write!(
        page,
        "<p>{ready} · version {version} · {workers} workers · {flows} of {limit} flows · \
         configuration {digest}, reloaded {} times, rejected {} times</p>",
        reading.reloads.applied, reading.reloads.rejected
    )?;

    let panics: u64 = reading.panics.iter().sum();
    if panics > 0 {
        write!(
            page,
            "<p class=\"no\">workers have panicked {panics} times, and each time their flows were lost: \
             <a href=\"api/v1/panics\">panics</a></p>"
        )?;
    }

    for pool in reading.pools.iter().filter(|pool| pool.panic) {
        let pool = Escaped(&pool.name);
        write!(
            page,
            "<p class=\"no\">too few backends of pool {pool} pass their checks: these are ignored</p>"
        )?;
    }

    page.push_str("<h2>Backends</h2><table><tr><th>pool</th><th>backend</th><th>address</th>");
    page.push_str("<th>state</th><th>wanted</th><th class=\"n\">weight</th>");
    page.push_str("<th class=\"n\">connections</th><th class=\"n\">to it</th><th class=\"n\">from it</th></tr>");
    for view in backends {
        let (pool, name) = (Escaped(&view.pool), Escaped(&view.backend.name));
        let (address, weight, state) =
            (view.backend.address, view.backend.weight, view.state.label());
        let by = if view.command.is_some() { " (operator)" } else { "" };
        let drained = view.drain.filter(DrainView::is_complete).map_or("", |_| ", drained");
        let live = view.live.connections();
        let (wanted, to, from) =
            (view.wanted.as_str(), view.totals.forwarded, view.totals.returned);
        write!(
            page,
            "<tr><td>{pool}</td><td>{name}</td><td>{address}</td>\
             <td class=\"{state}\">{state}</td><td>{wanted}{by}{drained}</td><td class=\"n\">{weight}</td>\
             <td class=\"n\">{live}</td><td class=\"n\">{to}</td><td class=\"n\">{from}</td></tr>"
        )?;
    }

    page.push_str("</table><h2>Listeners</h2><table><tr><th>listener</th><th>datagrams</th>");
    page.push_str("<th class=\"n\"></th></tr>");
    for listener in &reading.listeners {
        let totals = &listener.totals;
        let rules = Rule::ALL.iter().zip(totals.forwarded);
        let rules = rules.map(|(rule, n)| (format!("forwarded by rule {}", rule.label()), n));
        let reasons = DropReason::ALL.iter().zip(totals.dropped);
        let reasons = reasons.map(|(reason, n)| (format!("dropped, {}", reason.label()), n));
        let refused = totals.replied[ReplyKind::InvalidToken as usize];
        let others = [
            ("returned to clients".to_owned(), totals.returned),
            ("path changes".to_owned(), totals.path_changes),
            ("flows".to_owned(), totals.flows),
            ("flows evicted".to_owned(), totals.evicted.iter().sum()),
            (format!("Retry packets; address validation is {}", listener.phase), totals.retries),
            ("refused for an invalid token".to_owned(), refused),
        ];
        let name = Escaped(&listener.name);
        let rows = [("received".to_owned(), totals.received)].into_iter().chain(rules);
        for (what, n) in rows.chain(reasons.filter(|(_, n)| *n > 0)).chain(others) {
            write!(page, "<tr><td>{name}</td><td>{what}</td><td class=\"n\">{n}</td></tr>")?;
        }
    }
    page.push_str("</table><p><a href=\"metrics\">metrics</a> · <a href=\"api/v1/backends\">");
    page.push_str("backends</a> · <a href=\"api/v1/config\">configuration</a></p></body></html>\n");
    Ok(())
}

/// Text in HTML.
struct Escaped<'a>(&'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|character| match character {
            '&' => f.write_str("&amp;"),
            '<' => f.write_str("&lt;"),
            '>' => f.write_str("&gt;"),
            '"' => f.write_str("&quot;"),
            '\'' => f.write_str("&#39;"),
            other => f.write_char(other),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{metrics::ListenerReading, totals::ListenerTotals};

    #[test]
    fn panics_are_told_if_there_were_any() {
        let page = |panics| status(&Reading { panics, ..Default::default() }, &[]);
        assert!(page(vec![1, 2]).contains("panicked 3 times"));
        assert!(!page(vec![0, 0]).contains("panic"));
    }

    #[test]
    fn names_stay_text() {
        let reading = Reading {
            listeners: vec![ListenerReading {
                receive_dropped: vec![],
                name: "<script>&\"".into(),
                totals: ListenerTotals::default(),
                phase: "inactive",
                switches: [0; 3],
            }],
            ..Default::default()
        };
        let page = status(&reading, &[]);
        assert!(page.contains("&lt;script&gt;&amp;&quot;"));
        assert!(!page.contains("<script"));
    }
}
