//! The octets of a stream from the moment they are written until the peer has acknowledged them.

use std::{collections::VecDeque, ops::Range};

use super::ranges::RangeSet;

/// Above this capacity an empty buffer gives its memory back at once, and not only when the
/// connection rests.
const KEEP: usize = 256 * 1024;

/// Octets of capacity that an emptied buffer may keep.
const KEEP_FOR_NEXT: usize = 4096;

/// The send side of a stream of octets.
#[derive(Debug, Default)]
pub(crate) struct SendBuffer {
    /// Octets from `base` on.
    octets: VecDeque<u8>,
    /// Everything below is acknowledged.
    base: u64,
    /// The first octet never sent.
    unsent: u64,
    /// Acknowledged ranges above `base`.
    acked: RangeSet,
    /// Ranges to send again.
    lost: RangeSet,
}

impl SendBuffer {
    pub(crate) fn write(&mut self, data: &[u8]) {
        self.octets.extend(data);
    }

    /// Where [`Self::poll`] goes on.
    pub(crate) fn next_offset(&self) -> u64 {
        self.lost.first().map_or(self.unsent, |lost| lost.start)
    }

    /// What to send next, lost octets before new ones, at most `max` of them and none at or beyond
    /// `limit`.
    pub(crate) fn poll(&mut self, max: usize, limit: u64) -> Option<Range<u64>> {
        if max == 0 {
            return None;
        }
        if let Some(lost) = self.lost.first().cloned() {
            let range = lost.start..lost.end.min(lost.start + max as u64);
            self.lost.remove(range.clone());
            return Some(range);
        }
        let range = self.unsent..self.end().min(limit).min(self.unsent + max as u64);
        if range.is_empty() {
            return None;
        }
        self.unsent = range.end;
        Some(range)
    }

    /// Appends the octets of `range`, which [`Self::poll`] gave and nobody acknowledged since.
    pub(crate) fn copy(&self, range: &Range<u64>, out: &mut Vec<u8>) {
        let (first, second) = self.octets.as_slices();
        let (start, end) = (self.index(range.start), self.index(range.end));
        let split = first.len();
        out.extend_from_slice(&first[start.min(split)..end.min(split)]);
        out.extend_from_slice(&second[start.saturating_sub(split)..end.saturating_sub(split)]);
    }

    pub(crate) fn on_acked(&mut self, range: Range<u64>) {
        let range = range.start.max(self.base)..range.end.min(self.unsent);
        if range.is_empty() {
            return;
        }
        self.lost.remove(range.clone());
        if range.start > self.base {
            self.acked.insert(range);
            return;
        }
        let mut end = range.end;
        while self.acked.first().is_some_and(|next| next.start <= end) {
            end = self.acked.pop_first().map_or(end, |next| end.max(next.end));
        }
        self.octets.drain(..self.index(end));
        self.base = end;
        if self.octets.is_empty() && self.octets.capacity() > KEEP {
            self.octets = VecDeque::new();
        }
    }

    pub(crate) fn on_lost(&mut self, range: Range<u64>) {
        let range = range.start.max(self.base)..range.end.min(self.unsent);
        if range.is_empty() {
            return;
        }
        self.lost.insert(range.clone());
        if self.acked.is_empty() {
            return;
        }
        for acked in self.acked.iter() {
            if acked.end > range.start && acked.start < range.end {
                self.lost.remove(acked.clone());
            }
        }
    }

    /// Forgets everything, as a reset stream does.
    pub(crate) fn clear(&mut self) {
        self.base = self.end();
        self.unsent = self.base;
        self.octets = VecDeque::new();
        self.acked = RangeSet::default();
        self.lost = RangeSet::default();
    }

    /// Forgets everything, and keeps a little memory for a stream to come.
    pub(crate) fn empty(&mut self) {
        let mut octets = std::mem::take(&mut self.octets);
        octets.clear();
        if octets.capacity() > KEEP_FOR_NEXT {
            octets = VecDeque::new();
        }
        *self = Self { octets, ..Self::default() };
    }

    /// Gives spare memory back.
    pub(crate) fn shrink(&mut self) {
        self.octets.shrink_to_fit();
        self.acked.shrink();
        self.lost.shrink();
    }

    /// The offset after the last octet written.
    pub(crate) fn end(&self) -> u64 {
        self.base + self.octets.len() as u64
    }

    /// The first offset never sent.
    pub(crate) const fn unsent(&self) -> u64 {
        self.unsent
    }

    /// Octets held.
    pub(crate) fn len(&self) -> usize {
        self.octets.len()
    }

    /// Whether every octet was acknowledged.
    pub(crate) fn is_empty(&self) -> bool {
        self.octets.is_empty()
    }

    /// Whether [`Self::poll`] would give something below `limit`.
    pub(crate) fn has_output(&self, limit: u64) -> bool {
        !self.lost.is_empty() || self.unsent < self.end().min(limit)
    }

    #[expect(clippy::cast_possible_truncation, reason = "an index into memory we hold")]
    const fn index(&self, offset: u64) -> usize {
        (offset - self.base) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn whatever_is_lost_or_acked_every_octet_arrives_once_more_or_is_dropped(
            total in 1usize..5000,
            steps in proptest::collection::vec((0u8..3, 0usize..50, 1usize..700), 0..120),
        ) {
            let data: Vec<u8> = (0..total).map(|at| u8::try_from(at % 251).unwrap()).collect();
            let mut buffer = SendBuffer::default();
            buffer.write(&data);
            let mut in_flight: Vec<Range<u64>> = vec![];
            let mut arrived = RangeSet::default();
            let deliver = |buffer: &mut SendBuffer, max| {
                let range = buffer.poll(max, u64::MAX)?;
                let mut out = Vec::new();
                buffer.copy(&range, &mut out);
                let place = usize::try_from(range.start).unwrap();
                assert_eq!(out, data[place..place + out.len()]);
                Some(range)
            };
            for (step, pick, max) in steps {
                match step {
                    0 => in_flight.extend(deliver(&mut buffer, max)),
                    _ if in_flight.is_empty() => {}
                    1 => {
                        let range = in_flight.swap_remove(pick % in_flight.len());
                        arrived.insert(range.clone());
                        buffer.on_acked(range);
                    }
                    _ => buffer.on_lost(in_flight.swap_remove(pick % in_flight.len())),
                }
            }
            for range in in_flight.drain(..) {
                buffer.on_lost(range);
            }
            while let Some(range) = deliver(&mut buffer, 333) {
                arrived.insert(range.clone());
                buffer.on_acked(range);
            }
            prop_assert!(buffer.is_empty());
            prop_assert!(arrived.iter().eq([&(0..total as u64)]));
        }
    }
}
