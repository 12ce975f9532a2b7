//! Reload: SIGHUP, a request of the admin interface, changes of the file, and a look at it every few seconds, because
//! the ways in which mounted configurations are replaced do not all make a file event.
//!
//! A file that cannot be used changes nothing. It is reported and counted once, and told again to whoever asks. The looks
//! in between read nothing while the file, and what else it depends on, is the same. Reading takes
//! place on a thread of its own and has a time limit: a disk that does not answer holds up that
//! thread alone, and nothing else is read until it does.

#![expect(clippy::disallowed_methods, reason = "the shell gives the state its time")]

use std::{
    collections::BTreeSet,
    ffi::OsString,
    path::{Component, Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use notify::{Event, RecursiveMode, Watcher};
use quic_lb_config::{Config, Loaded, Mistake, Report, Severity};
use tokio::{
    signal::unix::Signal,
    sync::mpsc,
    task::{self, JoinHandle},
    time::{self, MissedTickBehavior, Sleep},
};
use tracing::{debug, error, info, warn};

use super::{
    changes::{Change, Changes},
    listening,
    plane::Applied,
    reloads::{Reloaded, Request},
    seen::Seen,
    shared::Shared,
    systemd,
};
use crate::{connection_log::writer::Log, logging::Logging};

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
    log: Arc<Log>,
    mut hangups: Signal,
    mut requests: mpsc::Receiver<Request>,
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
    let mut reloader = Reloader {
        path,
        shared,
        logging,
        log,
        reading,
        seen: Seen::default(),
        last_rejected: None,
    };
    let mut poll = time::interval(POLL);
    poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // Whoever asks does not wait until the writer is done, so that this is no pause of the loop.
    let mut settled: Option<Pin<Box<Sleep>>> = None;
    loop {
        tokio::select! {
            signal = hangups.recv() => {
                if signal.is_none() {
                    return;
                }
                systemd::reloading();
                reloader.reload(Cause::Asked { forced: false }).await;
                systemd::ready();
            }
            Some(Request { forced, answer }) = requests.recv() => {
                systemd::reloading();
                let outcome = reloader.reload(Cause::Asked { forced }).await;
                systemd::ready();
                // It may have gone.
                let _ = answer.send(outcome);
            }
            Some(()) = changed.recv() => {
                settled.get_or_insert_with(|| Box::pin(time::sleep(SETTLE)));
            }
            () = async { if let Some(settled) = &mut settled { settled.await } }, if settled.is_some() => {
                settled = None;
                reloader.reload(Cause::Noticed).await;
            }
            _ = poll.tick() => {
                reloader.reload(Cause::Looked).await;
            }
        }
    }
}

/// Why the file is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    /// Somebody asked for it, and wants an answer.
    Asked {
        /// Whether to take away what live connections use.
        forced: bool,
    },
    /// It may have changed.
    Noticed,
    /// It is time to see whether it has.
    Looked,
}

impl Cause {
    const fn is_asked(self) -> bool {
        matches!(self, Self::Asked { .. })
    }
}

/// What was found at one look.
struct Look {
    seen: Seen,
    /// `None` while all is as it was.
    read: Option<Result<Candidate, Report>>,
}

/// A configuration that may become the running one.
struct Candidate {
    config: Config,
    warnings: Vec<Mistake>,
    digest: String,
    /// From the running one.
    changes: Changes,
    /// Differs where configurations do.
    identity: String,
}

struct Reloader {
    path: PathBuf,
    shared: Arc<Shared>,
    logging: Logging,
    log: Arc<Log>,
    reading: Beside<Look>,
    /// The files as they were when they were read last.
    seen: Seen,
    /// What was wrong with the file when it was read last.
    last_rejected: Option<String>,
}

impl Reloader {
    async fn reload(&mut self, cause: Cause) -> Reloaded {
        let (path, seen, running) =
            (self.path.clone(), self.seen.clone(), self.shared.plane().newest_config());
        let work = move || look(&path, seen, &running, cause == Cause::Looked);
        let outcome = match self.reading.run(work).await {
            Ended::Done(Look { seen, read }) => {
                self.seen = seen;
                match read {
                    Some(Ok(candidate)) => self.on_candidate(cause, candidate).await,
                    Some(Err(report)) => self.on_mistakes(cause, &report),
                    None => None,
                }
            }
            Ended::Panicked => {
                error!("the configuration was not read");
                Some(Reloaded::Unread("reading the configuration panicked".to_owned()))
            }
            Ended::Hangs { since_before } => Some(self.on_hang(cause, since_before)),
        };
        match outcome {
            Some(outcome) => {
                let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                let failed = matches!(outcome, Reloaded::Rejected(_) | Reloaded::Unread(_));
                self.shared.plane().on_reload(time, !failed);
                outcome
            }
            // Nobody has asked.
            None => Reloaded::Unread("the configuration was looked at before".to_owned()),
        }
    }

    fn on_hang(&self, cause: Cause, since_before: bool) -> Reloaded {
        self.shared.plane().on_hang();
        let (file, patience) = (self.path.display(), READING);
        if !since_before || cause.is_asked() {
            error!(%file, ?patience, "reading the configuration hangs, the old one goes on");
        }
        Reloaded::Unread(format!("reading {file} hangs"))
    }

    /// `None` when there is nothing to be said of it that was not said before.
    async fn on_candidate(&mut self, cause: Cause, candidate: Candidate) -> Option<Reloaded> {
        let Candidate { config, warnings, digest, changes, identity } = candidate;
        let (level, connections) = (config.log.level, config.log.connections.clone());
        let file = self.path.display();
        let is_known = self.last_rejected.as_ref() == Some(&identity);
        if !cause.is_asked() && is_known {
            return None;
        }
        let applied = self.apply(config, cause == Cause::Asked { forced: true }).await;
        match applied {
            Applied::Unchanged => {
                let is_back = self.last_rejected.take().is_some();
                if is_back {
                    self.shared.plane().on_corrected();
                }
                if is_back || cause.is_asked() {
                    info!(%file, digest, "configuration unchanged");
                    return Some(Reloaded::Unchanged { digest });
                }
                debug!(%file, "configuration unchanged");
                None
            }
            Applied::Changed => {
                self.last_rejected = None;
                self.logging.set_level(level);
                self.log.set(connections);
                log_mistakes(&warnings);
                log_changes(&changes);
                if self.shared.until_in_force().await {
                    info!(%file, digest, "configuration applied");
                    return Some(Reloaded::Applied { digest, changes });
                }
                warn!(%file, digest, "configuration taken, and not in force yet");
                Some(Reloaded::Taken)
            }
            Applied::NotFollowed(reasons) => {
                for reason in &reasons {
                    error!(%file, reason, "change that a running process cannot follow");
                }
                Some(self.on_rejected(is_known, identity, reasons))
            }
            Applied::NotListening(reason) => {
                error!(%file, reason, "a new listener cannot be opened");
                Some(self.on_rejected(is_known, identity, vec![reason]))
            }
            Applied::InUse(all) => {
                for taken in &all {
                    error!(%file, %taken, "change that would lose connections");
                }
                let sentence = |taken| format!("{taken}: drain first, or `quic-lb reload --force`");
                let reasons = all.into_iter().map(sentence).collect();
                Some(self.on_rejected(is_known, identity, reasons))
            }
        }
    }

    /// Opens what has to be opened first.
    async fn apply(&self, config: Config, forced: bool) -> Applied {
        let now = Instant::now();
        let opened = match self.shared.plane().plan(now, &config, forced) {
            Ok(opened) => opened,
            Err(applied) => return applied,
        };
        // Those that had ended before are to be closed by then; none ends from now on.
        if !opened.is_empty() {
            self.shared.until_in_force().await;
        }
        if let Err(reason) = listening::open(&self.shared, &opened).await {
            self.shared.plane().give_up();
            return Applied::NotListening(reason);
        }
        self.shared.change(|plane| plane.apply(now, config, forced))
    }

    fn on_rejected(&mut self, is_known: bool, identity: String, reasons: Vec<String>) -> Reloaded {
        self.last_rejected = Some(identity);
        if !is_known {
            self.shared.plane().on_rejected();
        }
        let file = self.path.display();
        error!(%file, "configuration rejected, the old one goes on");
        Reloaded::Rejected(reasons)
    }

    /// `None` when nothing is to be said of them that was not said before.
    fn on_mistakes(&mut self, cause: Cause, report: &Report) -> Option<Reloaded> {
        let identity = report.to_string();
        let is_known = self.last_rejected.as_ref() == Some(&identity);
        if !cause.is_asked() && is_known {
            return None;
        }
        self.last_rejected = Some(identity);
        if !is_known {
            self.shared.plane().on_rejected();
        }
        log_mistakes(&report.mistakes);
        let (file, errors) = (self.path.display(), report.errors());
        error!(%file, errors, "configuration rejected, the old one goes on");
        let mistakes = report.mistakes.iter();
        let mistakes = mistakes.filter(|mistake| mistake.severity == Severity::Error);
        Some(Reloaded::Rejected(mistakes.map(ToString::to_string).collect()))
    }
}

/// Reads the file, `if_changed` only when it or something that it depends on is not as it was.
fn look(path: &Path, seen: Seen, running: &Config, if_changed: bool) -> Look {
    if if_changed && seen.is_current() {
        return Look { seen, read: None };
    }
    let (seen, read) = Seen::while_(|depends_on| quic_lb_config::load_telling(path, depends_on));
    let candidate = |Loaded { config, warnings }| {
        let digest = config.digest();
        let changes = Changes::between(running, &config);
        let identity = config.masked_document().to_string() + &digest;
        Candidate { config, warnings, digest, changes, identity }
    };
    Look { seen, read: Some(read.map(candidate)) }
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
                error!(line, column, path, found, expected, "mistake in the configuration");
            }
            Severity::Warning => {
                warn!(line, column, path, found, expected, "doubt about the configuration");
            }
        }
    }
}

fn log_changes(Changes { told, more }: &Changes) {
    for Change { at, old, new } in told {
        info!(at, old, new, "configuration change");
    }
    if *more > 0 {
        info!(more, "configuration changes that are not told one by one");
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

    #[test]
    fn what_is_as_it_was_is_not_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let (path, key) = (folder.path().join("lb.yaml"), folder.path().join("web.key"));
        fs::write(&key, "8f95f09245765f80256934e50c66207f").unwrap();
        let text = include_str!("../../../config/examples/contract.yaml");
        let text = text.replace("key: \"8f95f09245765f80256934e50c66207f\"", "key_file: web.key");
        fs::write(&path, &text).unwrap();
        let running = quic_lb_config::load(&path).unwrap().config;
        let look_at = |seen: &Seen, if_changed| look(&path, seen.clone(), &running, if_changed);
        let Look { mut seen, read } = look_at(&Seen::default(), true);
        assert_eq!(read.unwrap().unwrap().changes, Changes::default());
        assert!(look_at(&seen, true).read.is_none());
        assert!(look_at(&seen, false).read.is_some(), "whoever asks has it read");
        for (file, content) in [(&key, "9f95f09245765f80256934e50c66207f"), (&path, "no")] {
            fs::write(file, content).unwrap();
            let Look { seen: now, read } = look_at(&seen, true);
            assert!(read.is_some(), "{}", file.display());
            seen = now;
            assert!(look_at(&seen, true).read.is_none(), "{}", file.display());
        }
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
