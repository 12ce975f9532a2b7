//! How far packets of a path may be overtaken before they count as lost: learned from those that
//! counted as lost and arrived after all.
//!
//! A path that reorders would otherwise look like one that loses, and be used at a fraction of its
//! rate. What a peer can bring about by late acknowledgments is that losses on its own path show up
//! to two round trips after a packet left, and no later.
//!
//! <https://www.rfc-editor.org/rfc/rfc9002.html#section-6.1>

use std::time::{Duration, Instant};

use super::rtt::Rtt;

/// Packets acknowledged above a packet that make it lost, as long as nothing is known.
///
/// <https://www.rfc-editor.org/rfc/rfc9002.html#section-6.1.1>
const PACKET_THRESHOLD: u64 = 3;
/// Eighths of a round trip that a packet may be late, as long as nothing is known, and at most.
///
/// <https://www.rfc-editor.org/rfc/rfc9002.html#section-6.1.2>
const TIME_THRESHOLD: u32 = 1;
const MAX_TIME_THRESHOLD: u32 = 8;
/// Reductions of the window in a row without anything late, after which what was learned is
/// forgotten: the path may be another one by now.
///
/// <https://www.rfc-editor.org/rfc/rfc8985.html#section-6.2>
const FORGET_AFTER: u32 = 16;

/// What is known of one path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reordering {
    packets: u64,
    eighths: u32,
    /// Reductions since a packet was late.
    calm: u32,
}

impl Default for Reordering {
    fn default() -> Self {
        Self { packets: PACKET_THRESHOLD, eighths: TIME_THRESHOLD, calm: 0 }
    }
}

impl Reordering {
    /// Packets acknowledged above a packet that make it lost.
    pub(crate) const fn packets(&self) -> u64 {
        self.packets
    }

    /// How long after it left a packet counts as lost, once a later one is acknowledged.
    pub(crate) fn delay(&self, rtt: &Rtt) -> Duration {
        rtt.loss_delay(self.eighths)
    }

    /// A packet that counted as lost was acknowledged, `took` after it had left, when one so many
    /// packets later had been acknowledged before.
    pub(crate) fn on_late(&mut self, rtt: &Rtt, took: Duration, overtaken_by: u64) {
        // The next one may be overtaken by a few more.
        self.packets = self.packets.max(overtaken_by + overtaken_by / 4 + 1);
        let base = rtt.conservative().max(Duration::from_micros(1));
        let late = took.saturating_sub(base) * 8;
        let eighths = u32::try_from(late.as_micros() / base.as_micros()).unwrap_or(u32::MAX);
        self.eighths = self.eighths.max(eighths.saturating_add(1).min(MAX_TIME_THRESHOLD));
        self.calm = 0;
    }

    /// The window is reduced for losses.
    pub(crate) fn on_reduction(&mut self) {
        self.calm += 1;
        if self.calm > FORGET_AFTER {
            *self = Self::default();
        }
    }
}

/// A reduction of the window, as long as it is the latest one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reduction {
    /// When it was. Losses of packets that left before are part of it.
    at: Instant,
    /// Packets whose losses led to it and that have not arrived after all; `None` if there was
    /// another reason, so that it stands in any case.
    missing: Option<usize>,
}

impl Reduction {
    /// What the reduction for congestion becomes that the latest of `lost` packets, or of others
    /// that show congestion without being lost, shows, which left at `sent`. Returns whether it is
    /// another one.
    pub(crate) fn note(
        reduction: &mut Option<Self>,
        now: Instant,
        sent: Instant,
        lost: Option<usize>,
    ) -> bool {
        match reduction {
            Some(known) if sent <= known.at => {
                known.missing = known.missing.zip(lost).map(|(before, more)| before + more);
                false
            }
            _ => {
                *reduction = Some(Self { at: now, missing: lost });
                true
            }
        }
    }

    /// A packet that counted as lost and had left at `sent` has arrived. Returns whether with it all
    /// have that led to the reduction.
    pub(crate) fn on_late(&mut self, sent: Instant) -> bool {
        let Some(missing) = self.missing.as_mut().filter(|_| sent <= self.at) else { return false };
        *missing = missing.saturating_sub(1);
        *missing == 0
    }

    /// Lets it stand, whatever arrives.
    pub(crate) const fn settle(&mut self) {
        self.missing = None;
    }
}

#[cfg(test)]
mod tests {
    use super::{super::rtt::INITIAL_RTT, *};

    const fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    fn rtt() -> Rtt {
        let mut rtt = Rtt::new(INITIAL_RTT);
        rtt.sample(ms(80), Duration::ZERO);
        rtt
    }

    #[test]
    fn req_j02_thresholds_follow_what_came_late_up_to_two_round_trips() {
        let rtt = rtt();
        let mut path = Reordering::default();
        assert_eq!((path.packets(), path.delay(&rtt)), (3, ms(90)));
        path.on_late(&rtt, ms(85), 7);
        assert_eq!((path.packets(), path.delay(&rtt)), (9, ms(90)));
        path.on_late(&rtt, ms(95), 4);
        assert_eq!((path.packets(), path.delay(&rtt)), (9, ms(100)));
        path.on_late(&rtt, ms(100_000), 100);
        assert_eq!((path.packets(), path.delay(&rtt)), (126, ms(160)));
    }

    #[test]
    fn a_path_that_loses_and_does_not_reorder_any_more_is_as_any_other_again() {
        let rtt = rtt();
        let mut path = Reordering::default();
        path.on_late(&rtt, ms(100), 50);
        (0..FORGET_AFTER).for_each(|_| path.on_reduction());
        assert!(path.packets() > 50);
        path.on_reduction();
        assert_eq!(path, Reordering::default());
    }

    #[test]
    fn a_reduction_ends_with_the_last_packet_that_it_was_for_and_with_no_other() {
        let start = Instant::now();
        let mut latest = None;
        assert!(Reduction::note(&mut latest, start + ms(100), start, Some(2)));
        assert!(!Reduction::note(&mut latest, start + ms(110), start + ms(100), Some(1)));
        let mut known = latest.unwrap();
        assert!(!known.on_late(start + ms(101)), "not of this one");
        assert!(!known.on_late(start) && !known.on_late(start) && known.on_late(start));
        // A mark is a sign of congestion that no packet takes back.
        assert!(!Reduction::note(&mut latest, start + ms(120), start, None));
        assert!((0..5).all(|_| !latest.as_mut().unwrap().on_late(start)));
        assert!(Reduction::note(&mut latest, start + ms(300), start + ms(101), Some(1)));
        assert!(latest.unwrap().on_late(start + ms(101)));
    }
}
