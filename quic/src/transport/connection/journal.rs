//! The journal: what happens is noted here, once, and from there counted and told.

use std::time::Instant;

use super::{Stats, Traffic};
use crate::transport::{
    packet::DropReason,
    record::{CongestionState, Observer, Record},
};

/// Counts of what happened, and who is told of it.
pub(super) struct Journal {
    stats: Stats,
    drops: [u64; DropReason::COUNT],
    observer: Option<Observer>,
    /// How the congestion controller worked when that was last told.
    congestion: Option<CongestionState>,
}

impl Journal {
    pub(super) fn new(observer: Option<Observer>) -> Self {
        Self { stats: Stats::default(), drops: [0; DropReason::COUNT], observer, congestion: None }
    }

    /// Counts what is counted, and tells the observer.
    #[inline]
    pub(super) fn note(&mut self, now: Instant, record: Record<'_>) {
        let stats = &mut self.stats;
        match record {
            Record::DatagramSent { size } => count(&mut stats.sent, size),
            Record::DatagramReceived { size } => count(&mut stats.received, size),
            Record::PacketDropped { reason, .. } => self.drops[reason as usize] += 1,
            Record::PacketLost { mtu_probe, .. } => stats.lost_packets += u64::from(!mtu_probe),
            Record::PacketLate { .. } => stats.late_packets += 1,
            Record::ProbeTimeout { .. } => stats.probe_timeouts += 1,
            Record::KeysUpdated { .. } => stats.key_updates += 1,
            Record::PathValidationStarted { again, .. } => {
                stats.path_validations += u64::from(!again);
            }
            Record::MessagesDropped { count } => stats.dropped_datagrams += count,
            Record::PacketSent { .. }
            | Record::PacketReceived { .. }
            | Record::PacketBuffered { .. }
            | Record::PacketAcked { .. }
            | Record::Congestion(_)
            | Record::CongestionUndone
            | Record::CongestionStateUpdated(_)
            | Record::RecoveryUpdated(_)
            | Record::KeysInstalled(_)
            | Record::KeysDiscarded(_)
            | Record::PathValidated { .. }
            | Record::PathValidationFailed { .. }
            | Record::PathChanged { .. }
            | Record::MtuUpdated { .. }
            | Record::TimerExpired(_)
            | Record::Closed(_) => {}
        }
        if let Some(observer) = &mut self.observer {
            observer(now, &record);
        }
    }

    /// Notes how the congestion controller works, if that is new.
    pub(super) fn note_congestion_state(&mut self, now: Instant, state: CongestionState) {
        if self.congestion.replace(state) != Some(state) {
            self.note(now, Record::CongestionStateUpdated(state));
        }
    }

    /// Whether anybody is told: what takes effort to find out may be left out otherwise, as long as
    /// it is not counted.
    pub(super) const fn is_observed(&self) -> bool {
        self.observer.is_some()
    }

    pub(super) const fn stats(&self) -> Stats {
        self.stats
    }

    pub(super) const fn dropped(&self, reason: DropReason) -> u64 {
        self.drops[reason as usize]
    }
}

fn count(traffic: &mut Traffic, size: usize) {
    traffic.datagrams += 1;
    traffic.octets += size as u64;
}
