//! Timers: one list of everything that comes due with time, when each does, and what is done then.
//!
//! No timer is set or stopped: when it is due follows from the state of what it belongs to. What is
//! done when it comes due changes that state, so that it is not due again by itself, whether
//! anything can be sent just then or not.

use std::time::{Duration, Instant};

use super::Connection;
use crate::transport::{
    error::ConnectionError, keys::OneRttKeys, path::Path, record::Record, space::Space,
    timer::Timer,
};

/// Silence after which memory is given back that only traffic needs. Long enough that exchanges of
/// requests and answers do not pay for it, and that a client gets the tickets of its handshake.
const REST_AFTER: Duration = Duration::from_secs(1);

impl Connection {
    /// When [`Self::handle_deadline`] has something to do.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        Timer::ALL.into_iter().filter_map(|timer| self.deadline_of(timer)).min()
    }

    /// Does what is due at `now`.
    pub(crate) fn handle_deadline(&mut self, now: Instant) {
        for timer in Timer::ALL {
            if self.deadline_of(timer).is_some_and(|at| at <= now) {
                self.journal.note(now, Record::TimerExpired(timer));
                self.on_timer(now, timer);
            }
        }
    }

    /// When a timer is due; `None` while there is nothing for it to do.
    pub(crate) fn deadline_of(&self, timer: Timer) -> Option<Instant> {
        match timer {
            Timer::End => self.state.deadline(),
            _ if self.is_over() => None,
            Timer::Idle => self.idle_deadline(),
            Timer::Handshake => self.handshake_deadline(),
            Timer::KeepAlive => self.keep_alive_deadline(),
            Timer::Loss => self.loss_deadline(),
            Timer::Pacing => self.pacing_until,
            Timer::Ack => self.ack_deadline(),
            Timer::PathValidation => self.paths.iter().filter_map(Path::deadline).min(),
            Timer::MtuSearch => self.mtu_search_deadline(),
            Timer::KeyDiscard => self.one_rtt.as_ref().and_then(OneRttKeys::discard_at),
            Timer::Rest => self.rest_deadline(),
        }
    }

    /// Does what has come due.
    fn on_timer(&mut self, now: Instant, timer: Timer) {
        match timer {
            Timer::End => self.state.handle_deadline(now),
            Timer::Idle => self.on_idle(now),
            Timer::Handshake => self.give_up_handshake(now),
            Timer::KeepAlive => self.ping(),
            Timer::Loss => self.on_loss_deadline(now),
            Timer::Pacing => self.pacing_until = None,
            Timer::Ack => self.on_ack_deadlines(now),
            Timer::PathValidation => self.on_path_deadlines(now),
            Timer::MtuSearch => self.paths[0].mtu.handle_deadline(now),
            Timer::KeyDiscard => {
                if let Some(keys) = &mut self.one_rtt {
                    keys.handle_deadline(now);
                }
            }
            Timer::Rest => self.rest(),
        }
    }

    // When each is due, and what it does, where that stands nowhere else.

    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-10.1>
    fn idle_deadline(&self) -> Option<Instant> {
        let ours = self.config.idle_timeout;
        let peer = self.handshake.peer.as_ref().map_or(ours, |peer| peer.max_idle_timeout);
        let timeout = match (ours.is_zero(), peer.is_zero()) {
            (true, true) => return None,
            (true, false) => peer,
            (false, true) => ours,
            (false, false) => ours.min(peer),
        };
        // "To avoid excessively small idle timeout periods, endpoints MUST increase the idle
        // timeout period to be at least three times the current Probe Timeout (PTO)."
        // During the handshake, a lossy path has the probe timeout back off to more than that.
        let backoff = if self.handshake.complete { 1 } else { self.pto_backoff() };
        Some(self.active_since + timeout.max(3 * backoff * self.pto(Space::Data)))
    }

    fn on_idle(&mut self, now: Instant) {
        let answered = self.handshake.any_processed;
        let error = match self.handshake.complete {
            true => ConnectionError::IdleTimeout,
            false => ConnectionError::HandshakeTimeout { answered },
        };
        self.vanish(now, error);
    }

    fn handshake_deadline(&self) -> Option<Instant> {
        let pending = !self.handshake.complete;
        pending.then(|| self.started + self.config.handshake_timeout)
    }

    fn keep_alive_deadline(&self) -> Option<Instant> {
        let interval = self.config.keep_alive.filter(|_| self.handshake.confirmed)?;
        let pending = self.spaces[Space::Data.index()].ping_due;
        (!pending).then(|| self.active_since.max(self.last_sent) + interval)
    }

    fn ack_deadline(&self) -> Option<Instant> {
        let acks = Space::ALL.into_iter().filter_map(|space| {
            let received = &self.spaces[space.index()].received;
            received.deadline(self.ack_delay(space)).filter(|_| self.has_keys(space))
        });
        acks.min()
    }

    fn on_ack_deadlines(&mut self, now: Instant) {
        for space in Space::ALL {
            let delay = self.ack_delay(space);
            self.space(space).received.handle_deadline(now, delay);
        }
    }

    fn mtu_search_deadline(&self) -> Option<Instant> {
        self.paths[0].mtu.deadline().filter(|_| self.handshake.confirmed)
    }

    fn rest_deadline(&self) -> Option<Instant> {
        let busy = self.spaces.iter().any(|state| !state.sent.is_empty());
        let due = self.stirred && !busy && self.handshake.confirmed;
        due.then(|| self.active_since.max(self.last_sent) + REST_AFTER)
    }
}
