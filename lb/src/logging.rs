//! Log records: to standard error, as text for people or one JSON object per line, never with a
//! client address above debug; in colours on a terminal, unless NO_COLOR is set.
//!
//! `RUST_LOG` goes before the level of the configuration, so that a single module can be looked at
//! without touching the file.

use std::io::{self, IsTerminal};

use quic_lb_config::{Log, LogFormat, LogLevel};
use tracing_subscriber::{
    EnvFilter, Layer, Registry, layer::SubscriberExt, reload, util::SubscriberInitExt,
};

use crate::colours;

/// The environment variable that goes before the configuration.
const OVERRIDE: &str = "RUST_LOG";

/// Changes the level of a running process.
#[derive(Clone, Debug)]
pub struct Logging {
    filter: Option<reload::Handle<EnvFilter, Registry>>,
}

impl Logging {
    /// Starts logging as `log` says. Of two calls in one process the first counts.
    #[must_use]
    pub fn start(log: &Log) -> Self {
        let (filter, handle) = reload::Layer::new(filter(log.level));
        let records = tracing_subscriber::fmt::layer().with_writer(io::stderr);
        let colours = colours::wanted(io::stderr().is_terminal());
        let records = match log.format {
            LogFormat::Text => records.with_ansi(colours).boxed(),
            LogFormat::Json => records.json().flatten_event(true).boxed(),
        };
        let started = tracing_subscriber::registry().with(filter).with(records).try_init();
        Self { filter: started.is_ok().then_some(handle) }
    }

    /// Goes on with another level.
    pub fn set_level(&self, level: LogLevel) {
        if let Some(handle) = &self.filter {
            // It fails only when the subscriber is gone, and then nobody logs.
            let _ = handle.reload(filter(level));
        }
    }
}

fn filter(level: LogLevel) -> EnvFilter {
    // The TLS library tells each step of the handshakes of checks at the level debug: with a fleet, nothing else
    // would be found.
    let directives = match level {
        LogLevel::Error => "error",
        LogLevel::Warn => "warn",
        LogLevel::Info => "info",
        LogLevel::Debug => "debug,rustls=info",
        LogLevel::Trace => "trace",
    };
    EnvFilter::try_from_env(OVERRIDE).unwrap_or_else(|_| EnvFilter::new(directives))
}
