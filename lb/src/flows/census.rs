//! How many connections live on each backend, by the configuration of their connection IDs: counted by the sweep, which
//! sees the whole table in turn, and not on the way of datagrams.
//!
//! A connection is there as long as its client or its server says something: nobody between them can read its end. Flows
//! whose clients have not shown that they are there do not count, lest forged datagrams hold up a drain, nor do paths that
//! connections have left.
//!
//! One flow may carry many connections, of a proxy or a load generator. Their connection IDs are told apart by six bits
//! each, of those that were seen within one or two windows: the number is exact for one, ten per cent off for thirty, and 310
//! is the most that one flow counts for. A connection that changes its connection ID counts twice meanwhile. *Whether* any
//! connection was seen, and when last, is exact.

use std::time::{Duration, Instant};

use quic::routable::ConfigId;
use serde::{Deserialize, Serialize};

use crate::{
    backend::{BackendId, MAX_BACKENDS},
    cid_tag::CidTag,
};

/// By [`ConfigId`]; connection IDs without one, or that are not known yet, come last.
pub(crate) const CONFIGS: usize = ConfigId::COUNT + 1;

/// A connection that was not heard for two of these may be over.
const WINDOW: Duration = Duration::from_secs(5);

/// Whose connection ID it is, by [`CONFIGS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ConfigIndex(u8);

/// The live connections of one backend.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Live {
    /// The backend's, since numbers are used again.
    pub(crate) generation: u16,
    /// Flows, whatever they have shown.
    pub(crate) flows: u32,
    pub(crate) by_config: [LiveConfig; CONFIGS],
}

/// Those of one configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LiveConfig {
    pub(crate) connections: u32,
    /// When one of them was heard last.
    pub(crate) last_heard: Option<Instant>,
}

/// The count under way.
#[derive(Debug)]
pub(super) struct Census {
    /// By the slot of the backend.
    live: Vec<Live>,
    /// What the last pass has come to.
    last: Vec<Live>,
    is_new: bool,
    window_ends: Instant,
    /// Whether this pass begins a window.
    begins_window: bool,
}

/// What one flow has shown in this window and the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Lately {
    cids: [u64; 2],
    /// One bit for each of [`CONFIGS`].
    configs: [u8; 2],
    /// Of the connection ID that was used last.
    config: ConfigIndex,
}

impl ConfigIndex {
    #[expect(clippy::cast_possible_truncation, reason = "it is 7")]
    pub(crate) const NONE: Self = Self(ConfigId::COUNT as u8);

    /// Of a routable connection ID.
    pub(crate) fn of_routable(cid: &[u8]) -> Self {
        let first = cid.first().copied();
        let config = first.and_then(ConfigId::from_first_octet);
        config.map_or(Self::NONE, |config| Self(config.get()))
    }
}

impl Default for Lately {
    fn default() -> Self {
        Self { cids: [0; 2], configs: [0; 2], config: ConfigIndex::NONE }
    }
}

impl Lately {
    /// Takes note of a connection ID that was not the last one.
    pub(super) fn note(&mut self, cid: Option<CidTag>, config: ConfigIndex) {
        self.config = config;
        self.configs[0] |= 1 << config.0;
        self.cids[0] |= cid.map_or(0, |cid| 1 << cid.place());
    }

    fn begin_window(&mut self) {
        self.cids = [0, self.cids[0]];
        self.configs = [0, self.configs[0]];
    }

    /// How many connections that is.
    fn connections(&self) -> u32 {
        let seen = (self.cids[0] | self.cids[1]).count_ones();
        match seen {
            0 | 1 => 1,
            // As many as make so many of 64 places meet none, on average.
            _ => {
                let free = f64::from(64 - seen).max(0.5);
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "between 2 and 311"
                )]
                let connections = (64.0 * (64.0 / free).ln()).round() as u32;
                connections
            }
        }
    }
}

impl Census {
    /// None of any backend; `now` is when the first window begins.
    pub(super) fn new(now: Instant) -> Self {
        // Room that costs nothing until there are so many.
        let room = || Vec::with_capacity(MAX_BACKENDS);
        Self {
            live: room(),
            last: room(),
            is_new: false,
            window_ends: now + WINDOW,
            begins_window: false,
        }
    }

    /// Begins a pass over the whole table.
    pub(super) fn begin(&mut self, now: Instant) {
        self.live.fill(Live::default());
        self.begins_window = now >= self.window_ends;
        if self.begins_window {
            self.window_ends = now + WINDOW;
        }
    }

    /// Counts a flow. `cid` is what its client has used last, `is_there` says whether it has shown that it is there.
    pub(super) fn count(
        &mut self,
        now: Instant,
        backend: BackendId,
        last_used: Instant,
        cid: Option<CidTag>,
        lately: &mut Lately,
        is_there: bool,
    ) {
        if self.live.len() <= backend.slot() {
            self.live.resize(backend.slot() + 1, Live::default());
        }
        let live = &mut self.live[backend.slot()];
        if live.generation != backend.generation() {
            // The flows of a backend that is gone are nobody's drain.
            if live.generation > backend.generation() {
                return;
            }
            *live = Live { generation: backend.generation(), ..Live::default() };
        }
        live.flows += 1;
        if self.begins_window {
            lately.begin_window();
        }
        if !is_there {
            return;
        }
        let is_recent = now.saturating_duration_since(last_used) < WINDOW;
        if is_recent {
            lately.note(cid, lately.config);
        }
        let current = usize::from(lately.config.0);
        for (config, of_config) in live.by_config.iter_mut().enumerate() {
            let was_seen = (lately.configs[0] | lately.configs[1]) >> config & 1 == 1;
            // Which of several was heard when is not kept: any of them may have been it.
            if was_seen || config == current {
                of_config.last_heard = of_config.last_heard.max(Some(last_used));
            }
            if was_seen {
                of_config.connections += if config == current { lately.connections() } else { 1 };
            }
        }
    }

    /// Ends a pass.
    pub(super) fn end(&mut self) {
        std::mem::swap(&mut self.live, &mut self.last);
        self.is_new = true;
    }

    /// What the last pass has come to, once; by the slot of the backend.
    pub(super) fn take(&mut self) -> Option<&[Live]> {
        std::mem::take(&mut self.is_new).then_some(&self.last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    const FIRST: ConfigIndex = ConfigIndex(0);
    const SECOND: ConfigIndex = ConfigIndex(1);

    fn tag(n: u64) -> CidTag {
        CidTag::new(&n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes())
    }

    /// What one flow counts for, that was used at `last_used`.
    fn counted(census: &mut Census, now: Instant, last_used: Instant, lately: &mut Lately) -> Live {
        let [backend] = fixtures::backend_ids();
        census.begin(now);
        census.count(now, backend, last_used, Some(tag(1)), lately, true);
        census.end();
        let live = census.take().unwrap()[backend.slot()];
        assert!(census.take().is_none());
        live
    }

    #[test]
    fn connections_that_share_a_flow_are_told_apart() {
        let now = Instant::now();
        for connections in [1u32, 2, 10, 30, 60] {
            let mut lately = Lately::default();
            (0..connections).for_each(|n| lately.note(Some(tag(n.into())), FIRST));
            let estimate = lately.connections();
            let error = estimate.abs_diff(connections) * 100 / connections;
            assert!(error <= 15, "{estimate} of {connections}");
        }
        let mut lately = Lately::default();
        (0..10_000).for_each(|n| lately.note(Some(tag(n)), FIRST));
        let live = counted(&mut Census::new(now), now, now, &mut lately);
        assert_eq!(live.by_config[0].connections, 311);
    }

    #[test]
    fn a_configuration_is_seen_for_at_most_two_windows_after_its_last_connection() {
        let start = Instant::now();
        let mut census = Census::new(start);
        let mut lately = Lately::default();
        lately.note(Some(tag(9)), FIRST);
        lately.note(Some(tag(1)), SECOND);
        let live = counted(&mut census, start, start, &mut lately);
        assert_eq!(live.by_config[0], LiveConfig { connections: 1, last_heard: Some(start) });
        assert_eq!(live.by_config[1].connections, 2);
        assert_eq!(live.by_config[2], LiveConfig::default());
        let later = start + 2 * WINDOW;
        // The flow goes on with the second alone.
        let mut seen = Vec::new();
        for seconds in 1..=10 {
            let now = start + Duration::from_secs(seconds);
            seen.push(counted(&mut census, now, now, &mut lately).by_config[0].connections);
        }
        assert_eq!(seen, [1, 1, 1, 1, 1, 1, 1, 1, 1, 0]);
        let live = counted(&mut census, later, later, &mut lately);
        assert_eq!(live.by_config[1], LiveConfig { connections: 1, last_heard: Some(later) });
        assert_eq!(live.by_config[0].last_heard, None);
    }

    #[test]
    fn silence_ends_the_count_and_not_the_memory_of_when_it_was() {
        let start = Instant::now();
        let mut census = Census::new(start);
        let mut lately = Lately::default();
        lately.note(Some(tag(1)), FIRST);
        for seconds in 0..=20 {
            let now = start + Duration::from_secs(seconds);
            let live = counted(&mut census, now, start, &mut lately);
            assert_eq!(live.by_config[0].last_heard, Some(start));
            assert_eq!(live.flows, 1);
            assert_eq!(live.by_config[0].connections, u32::from(seconds < 10), "{seconds} s");
        }
    }

    #[test]
    fn flows_of_a_backend_that_is_gone_do_not_count_for_the_one_in_its_place() {
        let [old] = fixtures::backend_ids();
        let new = BackendId { generation: old.generation + 1, ..old };
        let now = Instant::now();
        for order in [[old, new], [new, old]] {
            let mut census = Census::new(now);
            census.begin(now);
            for backend in order {
                let mut lately = Lately::default();
                census.count(now, backend, now, Some(tag(1)), &mut lately, true);
            }
            census.end();
            let live = census.take().unwrap()[new.slot()];
            assert_eq!((live.generation, live.flows), (new.generation, 1));
        }
    }
}
