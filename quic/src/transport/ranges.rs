//! A set of integers kept as sorted, disjoint, non-adjacent ranges: packet numbers received,
//! octets acknowledged, octets to send again.

use std::ops::Range;

/// Half-open ranges in ascending order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RangeSet {
    ranges: Vec<Range<u64>>,
}

impl RangeSet {
    /// Adds `new`; returns whether any value was not in the set before.
    pub(crate) fn insert(&mut self, new: Range<u64>) -> bool {
        if new.is_empty() {
            return false;
        }
        // Everything from `first` up to `last` touches or overlaps `new`.
        let first = self.ranges.partition_point(|range| range.end < new.start);
        let last = first + self.ranges[first..].partition_point(|range| range.start <= new.end);
        let Some(touched) = self.ranges.get(first..last).filter(|touched| !touched.is_empty())
        else {
            self.ranges.insert(first, new);
            return true;
        };
        let (lowest, highest) = (touched[0].start, touched[touched.len() - 1].end);
        if touched.len() == 1 && lowest <= new.start && new.end <= highest {
            return false;
        }
        self.ranges[first] = lowest.min(new.start)..highest.max(new.end);
        self.ranges.drain(first + 1..last);
        true
    }

    /// Removes `gone`.
    pub(crate) fn remove(&mut self, gone: Range<u64>) {
        if gone.is_empty() {
            return;
        }
        let first = self.ranges.partition_point(|range| range.end <= gone.start);
        let last = first + self.ranges[first..].partition_point(|range| range.start < gone.end);
        if first == last {
            return;
        }
        let left = self.ranges[first].start..gone.start;
        let right = gone.end..self.ranges[last - 1].end;
        let rest = [left, right].into_iter().filter(|range| !range.is_empty());
        self.ranges.splice(first..last, rest);
    }

    /// Takes the lowest range out.
    pub(crate) fn pop_first(&mut self) -> Option<Range<u64>> {
        (!self.ranges.is_empty()).then(|| self.ranges.remove(0))
    }

    pub(crate) fn contains(&self, value: u64) -> bool {
        let at = self.ranges.partition_point(|range| range.end <= value);
        self.ranges.get(at).is_some_and(|range| range.start <= value)
    }

    /// The highest value.
    pub(crate) fn max(&self) -> Option<u64> {
        self.ranges.last().map(|range| range.end - 1)
    }

    pub(crate) fn first(&self) -> Option<&Range<u64>> {
        self.ranges.first()
    }

    /// Gives spare memory back.
    pub(crate) fn shrink(&mut self) {
        self.ranges.shrink_to_fit();
    }

    /// Ranges in ascending order.
    pub(crate) fn iter(&self) -> std::slice::Iter<'_, Range<u64>> {
        self.ranges.iter()
    }

    /// How many ranges there are.
    pub(crate) fn len(&self) -> usize {
        self.ranges.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn behaves_as_a_set_of_integers(
            steps in proptest::collection::vec((any::<bool>(), 0u64..60, 0u64..12), 0..80)
        ) {
            let (mut ranges, mut model) = (RangeSet::default(), BTreeSet::new());
            for (insert, start, len) in steps {
                let range = start..start + len;
                if insert {
                    let fresh = range.clone().any(|value| !model.contains(&value));
                    prop_assert_eq!(ranges.insert(range.clone()), fresh);
                    model.extend(range);
                } else {
                    ranges.remove(range.clone());
                    model.retain(|value| !range.contains(value));
                }
                for value in 0..80 {
                    prop_assert_eq!(ranges.contains(value), model.contains(&value));
                }
                prop_assert_eq!(ranges.max(), model.last().copied());
                let pairs = ranges.iter().zip(ranges.iter().skip(1));
                prop_assert!(pairs.clone().all(|(low, high)| low.end < high.start));
            }
        }
    }
}
