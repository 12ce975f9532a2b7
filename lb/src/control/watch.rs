//! Reload: SIGHUP, changes of the file, and a look at it every few seconds, because the ways in
//! which mounted configurations are replaced do not all make a file event.
//!
//! A file that cannot be used changes nothing. It is reported once, not at every look.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use notify::{RecursiveMode, Watcher};
use quic_lb_config::{Loaded, Mistake, Report, Severity};
use tokio::{
    signal::unix::Signal,
    sync::mpsc,
    time::{self, MissedTickBehavior},
};
use tracing::{debug, info, warn};

use super::{plane::Applied, shared::Shared, systemd};
use crate::logging::Logging;

/// From one look at the file to the next.
const POLL: Duration = Duration::from_secs(3);

/// How long after a file event the file is read: whoever writes it has more to write.
const SETTLE: Duration = Duration::from_millis(200);

/// Reloads for as long as the process lives.
pub(super) async fn watch(
    path: PathBuf,
    shared: Arc<Shared>,
    logging: Logging,
    mut hangups: Signal,
) {
    let (events, mut changed) = mpsc::channel(1);
    let watcher = watch_folder(&path, events);
    if let Err(error) = &watcher {
        warn!(file = %path.display(), %error, "no file events; the file is looked at now and then");
    }
    let mut reloader = Reloader { path, shared, logging, last_rejected: None };
    let mut poll = time::interval(POLL);
    poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
    poll.tick().await;
    loop {
        tokio::select! {
            signal = hangups.recv() => {
                if signal.is_none() {
                    return;
                }
                systemd::reloading();
                reloader.reload(Cause::Asked).await;
                systemd::ready();
            }
            Some(()) = changed.recv() => {
                time::sleep(SETTLE).await;
                while changed.try_recv().is_ok() {}
                reloader.reload(Cause::Noticed).await;
            }
            _ = poll.tick() => reloader.reload(Cause::Noticed).await,
        }
    }
}

/// Why the file is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    /// Somebody asked for it, and wants an answer.
    Asked,
    /// It may have changed.
    Noticed,
}

struct Reloader {
    path: PathBuf,
    shared: Arc<Shared>,
    logging: Logging,
    /// What was wrong with the file when it was last looked at.
    last_rejected: Option<String>,
}

impl Reloader {
    async fn reload(&mut self, cause: Cause) {
        let path = self.path.clone();
        // Reading may block, on a network file system for long.
        match tokio::task::spawn_blocking(move || quic_lb_config::load(path)).await {
            Ok(Ok(loaded)) => self.on_loaded(cause, loaded).await,
            Ok(Err(report)) => self.on_mistakes(cause, &report),
            Err(error) => warn!(%error, "the configuration was not read"),
        }
    }

    async fn on_loaded(&mut self, cause: Cause, loaded: Loaded) {
        let Loaded { config, warnings } = loaded;
        let (level, digest) = (config.log.level, config.digest());
        let file = self.path.display();
        let seen = config.masked_document().to_string() + &digest;
        if cause == Cause::Noticed && self.last_rejected.as_ref() == Some(&seen) {
            return;
        }
        let applied = self.shared.change(|plane| plane.apply(config));
        match applied {
            Applied::Unchanged => {
                self.last_rejected = None;
                if cause == Cause::Asked {
                    info!(%file, digest, "configuration unchanged");
                } else {
                    debug!(%file, "configuration unchanged");
                }
            }
            Applied::Changed => {
                self.last_rejected = None;
                self.logging.set_level(level);
                log_mistakes(&warnings);
                if self.shared.until_in_force().await {
                    info!(%file, digest, "configuration applied");
                } else {
                    warn!(%file, digest, "configuration taken, and not in force yet");
                }
            }
            Applied::NeedsRestart(reasons) => {
                self.last_rejected = Some(seen);
                for reason in reasons {
                    warn!(%file, reason, "change that needs a restart");
                }
                warn!(%file, "configuration rejected, the old one goes on");
            }
        }
    }

    fn on_mistakes(&mut self, cause: Cause, report: &Report) {
        let seen = report.to_string();
        if cause == Cause::Noticed && self.last_rejected.as_ref() == Some(&seen) {
            return;
        }
        self.last_rejected = Some(seen);
        self.shared.plane().on_rejected();
        log_mistakes(&report.mistakes);
        let (file, errors) = (self.path.display(), report.errors());
        warn!(%file, errors, "configuration rejected, the old one goes on");
    }
}

/// One record for each mistake.
pub(super) fn log_mistakes(mistakes: &[Mistake]) {
    for mistake in mistakes {
        let Mistake { severity, place, found, expected, related: _ } = mistake;
        let (line, column) = place.as_ref().map(|place| (place.line, place.column)).unzip();
        let path = place.as_ref().map(|place| place.path.as_str());
        match severity {
            Severity::Error => {
                warn!(line, column, path, found, expected, "mistake in the configuration");
            }
            Severity::Warning => {
                warn!(line, column, path, found, expected, "doubt about the configuration");
            }
        }
    }
}

/// Sends an event for everything that happens in the folder of `path`: editors and mounted
/// configurations replace the file, so that watching the file itself would end with the first
/// change.
fn watch_folder(
    path: &Path,
    events: mpsc::Sender<()>,
) -> notify::Result<notify::RecommendedWatcher> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Reading the file is an event, too, and must not lead to reading it.
        if event.is_ok_and(|event| !event.kind.is_access()) {
            // One that waits to be seen stands for all that follow.
            let _ = events.try_send(());
        }
    })?;
    watcher.watch(folder.unwrap_or(Path::new(".")), RecursiveMode::NonRecursive)?;
    Ok(watcher)
}
