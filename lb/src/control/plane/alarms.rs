//! What somebody has to know of the traffic: datagrams that go round, handshakes that come to nothing, flows
//! that may be forged. Each is said now and then, and not again and again.

use std::time::{Duration, Instant};

use quic_lb_config::MAX_LISTENERS;
use tracing::warn;

use super::ControlPlane;
use crate::verdict::DropReason;

/// From one warning that datagrams go round to the next, at least.
pub(super) const LOOP_WARNINGS: Duration = Duration::from_secs(60);

/// How often it is logged that handshakes come to nothing, and from how many on.
const UNFINISHED_SAID_EVERY: Duration = Duration::from_secs(60);
const MANY_UNFINISHED: u64 = 5;

/// How often a flood that goes on is logged.
pub(super) const FLOOD_SAID_EVERY: Duration = Duration::from_secs(60);

impl ControlPlane {
    /// Says now and then that datagrams go round.
    pub(super) fn warn_of_loops(&mut self, now: Instant) {
        let all = self.totals.of_listeners(0..MAX_LISTENERS);
        let (told, last) = self.loops_warned_of;
        let seen = all.dropped[DropReason::Loop as usize];
        let lately = |last| now.saturating_duration_since(last) < LOOP_WARNINGS;
        if seen > told && !last.is_some_and(lately) {
            let datagrams = seen - told;
            warn!(datagrams, "datagrams go round: a backend's address leads back to this balancer");
            self.loops_warned_of = (seen, Some(now));
        }
    }

    /// How many flows that began with a valid token have come to nothing within the last minute, once a minute; those of clients that
    /// went away are not worth a word.
    pub(super) fn unfinished(&mut self, now: Instant) -> Option<u64> {
        let count = self.totals.unfinished_flows();
        let (since, before) = *self.unfinished_seen.get_or_insert((now, count));
        if now.saturating_duration_since(since) < UNFINISHED_SAID_EVERY {
            return None;
        }
        self.unfinished_seen = Some((now, count));
        Some(count - before).filter(|&more| more >= MANY_UNFINISHED)
    }

    /// Says so when most of the flow table is held by senders that may be forged.
    pub(super) fn watch_flows(&mut self, now: Instant) {
        let unproven = self.totals.unproven_flows();
        let is_flood = unproven > self.flow_capacity as u64 / 2;
        let may_say_so = self
            .flood_said
            .is_none_or(|said| now.saturating_duration_since(said) >= FLOOD_SAID_EVERY);
        if is_flood && may_say_so {
            self.flood_said = Some(now);
            let limit = self.flow_capacity;
            warn!(
                unproven,
                limit, "most flows may be forged: their clients have shown no proof of being there"
            );
        }
    }
}
