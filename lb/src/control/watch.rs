//! Reload: SIGHUP, changes of the file, and a look at it every few seconds, because the ways in
//! which mounted configurations are replaced do not all make a file event.
//!
//! A file that cannot be used changes nothing. It is reported once, not at every look. Reading takes
//! place on a thread of its own and has a time limit: a disk that does not answer holds up that
//! thread alone, and nothing else is read until it does.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    path::{Component, Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use notify::{Event, RecursiveMode, Watcher};
use quic_lb_config::{Loaded, Mistake, Report, Severity};
use tokio::{
    signal::unix::Signal,
    sync::mpsc,
    task::{self, JoinHandle},
    time::{self, MissedTickBehavior},
};
use tracing::{debug, info, warn};

use super::{plane::Applied, shared::Shared, systemd};
use crate::logging::Logging;

/// From one look at the file to the next.
const POLL: Duration = Duration::from_secs(3);

/// How long after a file event the file is read: whoever writes it has more to write.
const SETTLE: Duration = Duration::from_millis(200);

/// How long reading the file and the keys beside it may take. A slow disk takes a second.
const READING: Duration = Duration::from_secs(10);

/// Reloads for as long as the process lives.
pub(super) async fn watch(
    path: PathBuf,
    shared: Arc<Shared>,
    logging: Logging,
    mut hangups: Signal,
) {
    let (events, mut changed) = mpsc::channel(1);
    let watcher = watch_folder(&path, move |_| {
        // One that waits to be seen stands for all that follow.
        let _ = events.try_send(());
    });
    if let Err(error) = &watcher {
        warn!(file = %path.display(), %error, "no file events; the file is looked at now and then");
    }
    let reading = Beside::new(READING);
    let mut reloader = Reloader { path, shared, logging, reading, last_rejected: None };
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
    reading: Beside<Result<Loaded, Report>>,
    /// What was wrong with the file when it was last looked at.
    last_rejected: Option<String>,
}

impl Reloader {
    async fn reload(&mut self, cause: Cause) {
        let path = self.path.clone();
        match self.reading.run(move || quic_lb_config::load(path)).await {
            Ended::Done(Ok(loaded)) => self.on_loaded(cause, loaded).await,
            Ended::Done(Err(report)) => self.on_mistakes(cause, &report),
            Ended::Panicked => warn!("the configuration was not read"),
            Ended::Hangs { since_before } => self.on_hang(cause, since_before),
        }
    }

    fn on_hang(&self, cause: Cause, since_before: bool) {
        self.shared.plane().on_hang();
        if since_before && cause == Cause::Noticed {
            return;
        }
        let (file, patience) = (self.path.display(), READING);
        warn!(%file, ?patience, "reading the configuration hangs, the old one goes on");
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

/// Work on a thread beside the one that answers: one piece at a time, each with a time limit.
struct Beside<T> {
    limit: Duration,
    /// What is being waited for no longer.
    hanging: Option<JoinHandle<T>>,
}

/// How work ended.
#[derive(Debug, PartialEq, Eq)]
enum Ended<T> {
    Done(T),
    Panicked,
    /// It has not ended. What hangs keeps its thread, so that there is never more than one of them.
    Hangs {
        /// Whether it is earlier work, for whose sake this was not begun.
        since_before: bool,
    },
}

impl<T: Send + 'static> Beside<T> {
    const fn new(limit: Duration) -> Self {
        Self { limit, hanging: None }
    }

    async fn run(&mut self, work: impl FnOnce() -> T + Send + 'static) -> Ended<T> {
        // What has ended since may be old by now: its outcome is not looked at.
        self.hanging.take_if(|hanging| hanging.is_finished());
        if self.hanging.is_some() {
            return Ended::Hangs { since_before: true };
        }
        let mut running = task::spawn_blocking(work);
        match time::timeout(self.limit, &mut running).await {
            Ok(Ok(outcome)) => Ended::Done(outcome),
            Ok(Err(_)) => Ended::Panicked,
            Err(_) => {
                self.hanging = Some(running);
                Ended::Hangs { since_before: false }
            }
        }
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

/// Calls `changed` for what happens to the file at `path` in its folder: editors and mounted
/// configurations replace the file, so that watching the file itself would end with the first
/// change. Whatever else happens there, such as a log that grows, is nobody's business.
fn watch_folder(
    path: &Path,
    mut changed: impl FnMut(&Event) + Send + 'static,
) -> notify::Result<notify::RecommendedWatcher> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let names = names_of(path);
    let concerns = move |event: &Event| {
        let named = |path: &PathBuf| path.file_name().is_some_and(|name| names.contains(name));
        // Reading the file is an event, too, and must not lead to reading it.
        !event.kind.is_access() && (event.need_rescan() || event.paths.iter().any(named))
    };
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
        if let Some(event) = event.ok().filter(&concerns) {
            changed(&event);
        }
    })?;
    watcher.watch(folder.unwrap_or(Path::new(".")), RecursiveMode::NonRecursive)?;
    Ok(watcher)
}

/// The names in its folder by which the file is reached: its own, and that of the link in its way
/// which is swapped when a mounted configuration changes (`lb.yaml` leads to `..data/lb.yaml`).
fn names_of(path: &Path) -> BTreeSet<OsString> {
    let target = std::fs::read_link(path).ok();
    let first = target.as_deref().and_then(|target| target.components().next());
    let link = match first {
        Some(Component::Normal(name)) => Some(name.to_owned()),
        _ => None,
    };
    path.file_name().map(ToOwned::to_owned).into_iter().chain(link).collect()
}

#[cfg(test)]
mod tests {
    use std::{fs, sync::mpsc};

    use super::*;

    /// The first event is that of the file, though others came before.
    #[test]
    fn what_else_is_written_in_the_folder_wakes_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::os::unix::fs::symlink("..data/lb.yaml", at("lb.yaml")).unwrap();
        let (told, events) = mpsc::channel();
        let watcher = watch_folder(&at("lb.yaml"), move |event| {
            let _ = told.send(event.paths.clone());
        });
        let first = || events.recv_timeout(Duration::from_secs(60)).unwrap();
        for nth in 0..100 {
            fs::write(at("app.log"), nth.to_string()).unwrap();
        }
        fs::remove_file(at("app.log")).unwrap();
        fs::create_dir(at("..data")).unwrap();
        assert_eq!(first(), [at("..data")]);
        fs::write(at("other.yaml"), "").unwrap();
        fs::rename(at("other.yaml"), at("lb.yaml")).unwrap();
        assert!(first().contains(&at("lb.yaml")));
        drop(watcher);
    }

    #[tokio::test]
    async fn work_that_hangs_is_given_up_and_nothing_begun_until_it_ends() {
        let mut beside = Beside::new(Duration::from_millis(10));
        let (release, released) = mpsc::channel::<()>();
        let hangs = move || {
            let _ = released.recv();
            1
        };
        assert_eq!(beside.run(hangs).await, Ended::Hangs { since_before: false });
        for _ in 0..3 {
            let never = || unreachable!("one thread that hangs is enough");
            assert_eq!(beside.run(never).await, Ended::Hangs { since_before: true });
        }
        drop(release);
        while !beside.hanging.as_ref().is_some_and(JoinHandle::is_finished) {
            task::yield_now().await;
        }
        beside.limit = READING;
        assert_eq!(beside.run(|| 2).await, Ended::Done(2), "and not what is old by now");
    }
}
