//! Which datagrams may leave together.
//!
//! Datagrams that lie side by side in a receive buffer and belong to one flow form a [`Run`]; runs
//! of one flow that the kernel can send as one message, a [`Bundle`]. A message may hold datagrams
//! of one length, of which only the last may be shorter, marked alike. Order within a flow is
//! kept: a run that does not fit the bundle before it begins another one.

use crate::socket::{MAX_SEGMENTS, MAX_SEND_LEN, Marks};

/// No run follows.
pub(super) const NO_RUN: u16 = u16::MAX;

/// Datagrams of one flow, side by side in one slot, all with one `tag`: the rule that found the backend
/// on the way there, nothing on the way back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run<T> {
    pub(super) slot: u8,
    pub(super) tag: T,
    /// As they leave.
    pub(super) marks: Marks,
    /// How many there are.
    pub(super) count: u16,
    /// Octets of each; the last may have fewer.
    pub(super) segment: u16,
    pub(super) start: u16,
    pub(super) len: u16,
    /// The next run of the flow.
    pub(super) next: u16,
}

impl<T: Copy + PartialEq> Run<T> {
    /// Takes in `next`, if it lies behind this run and could have been part of it.
    pub(super) fn extend(&mut self, next: &Self) -> bool {
        let fits = self.slot == next.slot
            && self.tag == next.tag
            && u32::from(self.start) + u32::from(self.len) == u32::from(next.start)
            && self.is_full()
            && next.continues(self.segment)
            && usize::from(self.count + next.count) <= MAX_SEGMENTS
            && usize::from(self.len) + usize::from(next.len) <= MAX_SEND_LEN;
        if fits {
            self.count += next.count;
            self.len += next.len;
        }
        fits
    }

    /// Whether these datagrams may follow full ones of `segment` octets in a message.
    fn continues(&self, segment: u16) -> bool {
        // A single datagram states its own length as that of its segments.
        match self.count {
            1 => (1..=segment).contains(&self.len),
            _ => self.segment == segment,
        }
    }

    /// Where each datagram begins and ends in the slot.
    pub(super) fn datagrams(&self) -> impl Iterator<Item = std::ops::Range<usize>> + use<T> {
        let (start, end) =
            (usize::from(self.start), usize::from(self.start) + usize::from(self.len));
        let segment = usize::from(self.segment);
        (0..usize::from(self.count)).map(move |at| {
            let begin = start + at * segment;
            begin..(begin + segment).min(end)
        })
    }

    /// All of them.
    pub(super) fn range(&self) -> std::ops::Range<usize> {
        usize::from(self.start)..usize::from(self.start) + usize::from(self.len)
    }

    fn is_full(&self) -> bool {
        u32::from(self.len) == u32::from(self.segment) * u32::from(self.count)
    }
}

/// Runs that leave as one message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bundle {
    /// The first of its runs, which are linked.
    pub(super) first: u16,
    pub(super) runs: u16,
    pub(super) count: u16,
    pub(super) segment: u16,
    /// As they leave.
    pub(super) marks: Marks,
    octets: u32,
    full: bool,
}

impl Bundle {
    /// A bundle of the run with number `index`.
    pub(super) fn new<T: Copy + PartialEq>(index: u16, run: &Run<T>) -> Self {
        Self {
            first: index,
            runs: 1,
            count: run.count,
            segment: run.segment,
            marks: run.marks,
            octets: u32::from(run.len),
            full: run.is_full(),
        }
    }

    /// Takes in the run that follows, if it may leave in the same message.
    pub(super) fn extend<T: Copy + PartialEq>(&mut self, run: &Run<T>) -> bool {
        let fits = self.full
            && run.continues(self.segment)
            && run.marks == self.marks
            && usize::from(self.count + run.count) <= MAX_SEGMENTS
            && self.octets as usize + usize::from(run.len) <= MAX_SEND_LEN;
        if fits {
            self.runs += 1;
            self.count += run.count;
            self.octets += u32::from(run.len);
            self.full = self.octets == u32::from(self.segment) * u32::from(self.count);
        }
        fits
    }

    /// The runs, given all of them.
    pub(super) fn runs<'a, T>(
        &self,
        all: &'a [Run<T>],
    ) -> impl Iterator<Item = &'a Run<T>> + use<'a, T> {
        let mut next = self.first;
        (0..self.runs).map(move |_| {
            let run = &all[usize::from(next)];
            next = run.next;
            run
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::socket::{HopLimit, TrafficClass};
    use proptest::prelude::*;

    fn run(segment: u16, len: u16, marks: Marks) -> Run<()> {
        let count = if segment == 0 { 1 } else { len.div_ceil(segment) };
        Run { slot: 0, tag: (), marks, count, segment, start: 0, len, next: NO_RUN }
    }

    fn bundles(lengths: &[(u16, u16)]) -> Vec<u16> {
        let mut bundles: Vec<Bundle> = Vec::new();
        for &(segment, len) in lengths {
            let run = run(segment, len, Marks::UNSET);
            if !bundles.last_mut().is_some_and(|bundle| bundle.extend(&run)) {
                bundles.push(Bundle::new(0, &run));
            }
        }
        bundles.iter().map(|bundle| bundle.count).collect()
    }

    #[test]
    fn equal_lengths_leave_together_and_a_shorter_one_ends_the_message() {
        let one = |len| (len, len);
        assert_eq!(bundles(&[one(1200), one(1200), one(700), one(700)]), [3, 1]);
        assert_eq!(bundles(&[one(700), one(1200)]), [1, 1]);
        assert_eq!(bundles(&[(1200, 6000), one(1200), (1200, 3000)]), [9]);
        assert_eq!(bundles(&[(1200, 6100), one(1200)]), [6, 1]);
        assert_eq!(bundles(&[one(1200), (600, 1200)]), [1, 2]);
    }

    #[test]
    fn a_datagram_without_octets_leaves_alone() {
        assert_eq!(bundles(&[(10, 10), (0, 0), (0, 0), (10, 10), (10, 10)]), [1, 1, 1, 2]);
    }

    #[test]
    fn no_message_exceeds_what_the_kernel_takes() {
        assert_eq!(bundles(&[(10, 10); 130]), [64, 64, 2]);
        assert_eq!(bundles(&[(1200, 1200); 60]), [54, 6]);
        assert_eq!(bundles(&[(32_744, 32_744), (32_743, 32_743)]), [2]);
        assert_eq!(bundles(&[(32_744, 32_744), (32_744, 32_744)]), [1, 1]);
    }

    #[test]
    fn another_mark_begins_another_message() {
        let (class, hops) = (TrafficClass::ECT_0, HopLimit::new(60));
        let marks = Marks { class, hops };
        let mut bundle = Bundle::new(0, &run(10, 10, marks));
        let others = [
            Marks { class: TrafficClass::CE, hops },
            Marks { class: class.with_dscp(46), hops },
            Marks { class, hops: HopLimit::new(59) },
        ];
        for other in others {
            assert!(!bundle.extend(&run(10, 10, other)));
        }
        assert!(bundle.extend(&run(10, 10, marks)));
    }

    proptest! {
        /// Whatever arrives, the datagrams of a run are those that went into it.
        #[test]
        fn a_run_gives_back_the_datagrams_it_took(
            pieces in prop::collection::vec((0u16..50, 1u16..5), 1..80),
        ) {
            let mut runs: Vec<Run<()>> = Vec::new();
            let mut start = 0;
            let mut given = Vec::new();
            for &(segment, count) in &pieces {
                let count = if segment == 0 { 1 } else { count };
                let len = segment * count;
                let piece = Run { slot: 3, start, count, ..run(segment, len, Marks::UNSET) };
                given.extend(piece.datagrams());
                if !runs.last_mut().is_some_and(|run| run.extend(&piece)) {
                    runs.push(piece);
                }
                start += len;
            }
            let got: Vec<_> = runs.iter().flat_map(Run::datagrams).collect();
            prop_assert_eq!(got, given);
            prop_assert!(runs.iter().all(|run| usize::from(run.count) <= MAX_SEGMENTS));
        }
    }
}
