//! Panics of workers: caught, told, and the datagrams that did it kept for a look.
//!
//! A panic is a mistake of this program. It takes along what its worker alone has, its flows, and nothing
//! of anybody else. What workers share is never half done, wherever a panic leaves it: counters and limits are
//! single numbers, the bits of ports are set anew when the worker begins anew, maps give their locks back while the
//! stack unwinds and have an entry or have it not, and the lock of a mailbox guards a value that is replaced as a whole.
//!
//! Nothing here is touched as long as nobody panics.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    net::SocketAddr,
    panic::{self, AssertUnwindSafe, PanicHookInfo},
    sync::{Mutex, MutexGuard, Once, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use crate::client_path::ListenerIndex;

/// The newest panics, of all workers together, that are kept with what they are known of.
const KEPT: usize = 8;
/// Characters of a message that are kept.
const MESSAGE: usize = 500;

/// A worker that panics so many times …
const MANY: usize = 5;
/// … within this time waits before it begins anew, each time twice as long as before. What arrives meanwhile waits in
/// the sockets of its listeners.
const WITHIN: Duration = Duration::from_secs(10);
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What is known of the panics of all workers.
#[derive(Debug)]
pub(crate) struct Panics(Mutex<State>);

#[derive(Debug)]
struct State {
    kept: VecDeque<Panic>,
    lately: Vec<Lately>,
}

/// The panics of one worker.
#[derive(Clone, Debug, Default)]
struct Lately {
    /// The last ones, at most [`MANY`].
    times: VecDeque<Instant>,
    pause: Duration,
}

/// One panic.
#[derive(Clone, Debug)]
pub(crate) struct Panic {
    pub(crate) time: SystemTime,
    pub(crate) worker: usize,
    pub(crate) told: Told,
    /// The flows that have ended with it.
    pub(crate) flows: u64,
    /// What the worker was at, if that was a datagram.
    pub(crate) suspect: Option<Suspect>,
}

/// What a panic says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) message: String,
    /// File, line and column.
    pub(crate) place: String,
}

/// The datagram at which a worker panicked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Suspect {
    pub(crate) origin: Origin,
    /// The client that sent it, or that it was for.
    pub(crate) client: SocketAddr,
    pub(crate) listener: ListenerIndex,
    pub(crate) octets: Box<[u8]>,
}

/// Where a datagram came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    Client,
    Backend,
    /// Nobody sent it: somebody has asked what would become of it.
    Question,
}

impl Origin {
    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Backend => "backend",
            Self::Question => "question",
        }
    }
}

impl Panics {
    /// Of so many workers, none of which has panicked.
    pub(crate) fn new(workers: usize) -> Self {
        let state = State { kept: VecDeque::new(), lately: vec![Lately::default(); workers] };
        Self(Mutex::new(state))
    }

    /// Keeps a panic that has taken nothing along.
    pub(super) fn keep(&self, panic: Panic) {
        self.state().keep(panic);
    }

    /// Keeps a panic after which its worker begins anew; says how long that is to wait.
    pub(crate) fn add(&self, now: Instant, panic: Panic) -> Duration {
        let mut state = self.state();
        let pause = state.lately.get_mut(panic.worker).map(|lately| lately.add(now));
        state.keep(panic);
        pause.unwrap_or_default()
    }

    /// The newest panics, the oldest of them first.
    pub(crate) fn kept(&self) -> Vec<Panic> {
        self.state().kept.iter().cloned().collect()
    }

    /// The workers that panic again and again.
    pub(crate) fn restless(&self, now: Instant) -> Vec<usize> {
        let state = self.state();
        let lately = state.lately.iter().enumerate();
        lately.filter(|(_, lately)| lately.is_restless(now)).map(|(worker, _)| worker).collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change of it is whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn keep(&mut self, panic: Panic) {
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(panic);
    }
}

impl Lately {
    fn add(&mut self, now: Instant) -> Duration {
        if self.times.len() == MANY {
            self.times.pop_front();
        }
        self.times.push_back(now);
        self.pause = match self.is_restless(now) {
            true => (self.pause * 2).clamp(SHORTEST_PAUSE, LONGEST_PAUSE),
            false => Duration::ZERO,
        };
        self.pause
    }

    fn is_restless(&self, now: Instant) -> bool {
        let first = self.times.front().filter(|_| self.times.len() == MANY);
        first.is_some_and(|first| now.saturating_duration_since(*first) <= WITHIN)
    }
}

thread_local! {
    /// Whether somebody catches the panics of this thread and tells of them.
    static IS_CAUGHT: Cell<bool> = const { Cell::new(false) };
    static TOLD: RefCell<Option<Told>> = const { RefCell::new(None) };
}

/// Has panics that are caught by [`caught`] told by it alone. Others are told as before.
pub(super) fn tell_by_catching() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if IS_CAUGHT.get() {
                TOLD.set(Some(Told::new(info)));
            } else {
                before(info);
            }
        }));
    });
}

/// Does some `work`; says what it has panicked with, if it has. Whatever it had changed is to be thrown away then, or to
/// be as this module says of what workers share.
pub(super) fn caught<T>(work: impl FnOnce() -> T) -> Result<T, Told> {
    let before = IS_CAUGHT.replace(true);
    let outcome = panic::catch_unwind(AssertUnwindSafe(work));
    IS_CAUGHT.set(before);
    outcome.map_err(|_| TOLD.take().unwrap_or_else(Told::nothing))
}

impl Told {
    fn new(info: &PanicHookInfo<'_>) -> Self {
        let message = info.payload_as_str().unwrap_or("no message");
        let message = message.chars().take(MESSAGE).collect();
        let place = info.location().map_or_else(String::new, ToString::to_string);
        Self { message, place }
    }

    fn nothing() -> Self {
        Self { message: "no message".to_owned(), place: String::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panic_of(worker: usize) -> Panic {
        let told = Told { message: worker.to_string(), place: String::new() };
        Panic { time: SystemTime::UNIX_EPOCH, worker, told, flows: 0, suspect: None }
    }

    #[test]
    fn who_panics_now_and_then_begins_anew_at_once_and_who_does_again_and_again_waits() {
        let panics = Panics::new(2);
        let mut now = Instant::now();
        let mut pause = |after: u64| {
            now += Duration::from_millis(after);
            let pause = panics.add(now, panic_of(1));
            (pause.as_millis(), panics.restless(now))
        };
        for _ in 0..10 {
            assert_eq!(pause(3_000), (0, vec![]));
        }
        pause(11_000);
        for _ in 0..3 {
            assert_eq!(pause(1_000), (0, vec![]));
        }
        for longer in [100, 200, 400, 800, 1_000, 1_000] {
            assert_eq!(pause(1_000), (longer, vec![1]));
        }
        assert_eq!(pause(9_000), (0, vec![]), "five take more than ten seconds now");
        let later = now + WITHIN * 2;
        assert_eq!(panics.restless(later), [0; 0]);
    }

    #[test]
    fn the_newest_are_kept() {
        let panics = Panics::new(100);
        for worker in 0..20 {
            panics.keep(panic_of(worker));
        }
        let kept: Vec<_> = panics.kept().iter().map(|panic| panic.worker).collect();
        assert_eq!(kept, (12..20).collect::<Vec<_>>());
        assert_eq!(panics.add(Instant::now(), panic_of(100)), Duration::ZERO, "nobody's");
    }

    #[test]
    fn a_panic_that_is_caught_says_what_and_where() {
        tell_by_catching();
        assert_eq!(caught(|| 7), Ok(7));
        let told = caught(|| {
            let inner = caught(|| panic!("inside"));
            assert_eq!(inner.map_err(|told| told.message), Err::<(), _>("inside".to_owned()));
            panic!("{}", "x".repeat(10_000))
        });
        let told = told.map(|(): ()| ()).unwrap_err();
        assert_eq!(told.message, "x".repeat(MESSAGE));
        assert!(told.place.contains("panics.rs:"), "{}", told.place);
        let told = caught(|| panic::panic_any(7)).map(|(): ()| ()).unwrap_err();
        assert_eq!(told.message, "no message");
    }
}
