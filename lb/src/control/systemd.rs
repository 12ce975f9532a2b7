//! What the service manager is told, where there is one.

use std::time::Duration;

use sd_notify::NotifyState;
use tracing::debug;

pub(super) fn ready() {
    notify(&[NotifyState::Ready]);
}

pub(super) fn reloading() {
    // The time is for services of type notify-reload; without it those would wait for ever.
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(_) => notify(&[NotifyState::Reloading]),
    }
}

/// From now on this one is the service.
pub(super) fn main_process(process: u32) {
    notify(&[NotifyState::MainPid(process)]);
}

/// How often the service manager wants to hear that all is well, if it does.
pub(super) fn watchdog_interval() -> Option<Duration> {
    // Twice, in case that one comes late.
    sd_notify::watchdog_enabled().map(|limit| limit / 2)
}

/// All is well.
pub(super) fn feed_watchdog() {
    notify(&[NotifyState::Watchdog]);
}

pub(super) fn stopping() {
    notify(&[NotifyState::Stopping]);
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        debug!(%error, "the service manager was not told");
    }
}
