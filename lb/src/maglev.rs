//! Weighted Maglev hashing: a table that every balancer with the same configuration fills alike, and
//! that changes little when a backend comes or goes.
//!
//! Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016,
//! section 3.4. Weights: a backend takes its turn as often as its share of the largest weight says.
//!
//! Most tables have 65,537 slots. Where that is less than one for the lightest backend, a larger table is
//! filled; in the largest, one that is due less than a slot has one all the same. The size follows
//! from the pool as it stands in the file and not from who is active, since another size moves
//! almost everything.

use std::{cmp::Reverse, collections::BinaryHeap, hash::Hasher, sync::Arc};

use quic_lb_config::MAX_HASH_SLOTS;
use siphasher::sip::SipHasher13;

/// How many slots a table may have; primes, so that every step visits every slot. Of 1,000 backends one that
/// leaves moves half a percent of the others' slots in the first two, a quarter in the last: too little
/// to take four megabytes for it.
const SIZES: [usize; 3] = [65_537, 262_147, MAX_HASH_SLOTS];

/// How many slots the table of a pool has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(usize);

impl Size {
    /// That for backends with these weights, whether they take connections now or not.
    #[must_use]
    pub fn of(weights: impl IntoIterator<Item = u32>) -> Self {
        let (mut total, mut lightest) = (0, u64::MAX);
        for weight in weights.into_iter().filter(|weight| *weight > 0).map(u64::from) {
            (total, lightest) = (total + weight, lightest.min(weight));
        }
        let fits = |size: &usize| lightest.saturating_mul(*size as u64) >= total;
        Self(SIZES.into_iter().find(fits).unwrap_or(MAX_HASH_SLOTS))
    }
}

/// A filled table of values. Clones share it.
#[derive(Clone, Debug)]
pub struct Maglev<T> {
    slots: Arc<[T]>,
}

impl<T: Copy> Maglev<T> {
    /// A table of `entries`: what makes a backend itself (a name that is the same on every
    /// balancer), its weight, and what the slots are to say. The order of entries does not matter.
    /// `None` without entries of positive weight.
    #[must_use]
    pub fn new<'a>(
        Size(size): Size,
        entries: impl IntoIterator<Item = (&'a str, u32, T)>,
    ) -> Option<Self> {
        let mut entries: Vec<_> =
            entries.into_iter().filter(|&(_, weight, _)| weight > 0).collect();
        entries.sort_by_key(|&(name, ..)| name);
        let weights = || entries.iter().map(|&(_, weight, _)| u64::from(weight));
        let (heaviest, total) = (weights().max()?, weights().sum());
        let pace = Pace { size, heaviest, total };
        let mut turns: Vec<_> = entries.iter().map(|&entry| Turn::new(&pace, entry)).collect();

        // Whose turn is next: the round, and within it the order of names.
        let mut next: BinaryHeap<_> =
            turns.iter().enumerate().map(|(at, turn)| Reverse((turn.round(&pace), at))).collect();
        let mut slots: Box<[Option<T>]> = vec![None; size].into();
        for _ in 0..size {
            let Reverse((_, at)) = next.pop()?;
            let turn = &mut turns[at];
            let slot = turn.next_empty(&slots);
            slots[slot] = Some(turn.value);
            turn.taken += 1;
            next.push(Reverse((turn.round(&pace), at)));
        }
        slots.into_iter().collect::<Option<Arc<[T]>>>().map(|slots| Self { slots })
    }

    /// Whether this is the very table that `other` is, and not one that was filled anew.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.slots, &other.slots)
    }

    /// The value for a hashed key.
    #[must_use]
    pub fn get(&self, hash: u64) -> T {
        // The remainder of a prime below 2^21 keeps the bias under 2^-43.
        self.slots[usize::try_from(hash % self.slots.len() as u64).unwrap_or_default()]
    }
}

/// How often turns come: in each round, a backend gets as much credit as it has weight, and takes its turn when it
/// has as much as the heaviest gets.
struct Pace {
    size: usize,
    heaviest: u64,
    total: u64,
}

/// One backend's way through the table.
struct Turn<T> {
    at: usize,
    step: usize,
    weight: u64,
    /// Credit that it has before the first round: less than the heaviest gets in a round.
    start: u64,
    taken: u64,
    value: T,
}

impl<T: Copy> Turn<T> {
    fn new(pace: &Pace, (name, weight, value): (&str, u32, T)) -> Self {
        let &Pace { size, heaviest, total } = pace;
        let within = |seed: u64, limit: u64| {
            let mut hasher = SipHasher13::new_with_keys(seed, 0);
            hasher.write(name.as_bytes());
            hasher.finish() % limit
        };
        let slot = |number: u64| usize::try_from(number).unwrap_or_default();
        let weight = u64::from(weight);
        // Shares of a few slots are rounded, by chance and not all down. Tables of the usual size never did so, and
        // balancers of different versions are to agree about those.
        let chance = if size > SIZES[0] { within(3, heaviest) } else { 0 };
        // One that is due little has a turn in the first round, come what may.
        let is_due_little = weight.saturating_mul(size as u64) < 2 * total;
        let least = if is_due_little { heaviest - weight } else { 0 };
        Self {
            at: slot(within(1, size as u64)),
            step: 1 + slot(within(2, size as u64 - 1)),
            weight,
            start: chance.max(least),
            taken: 0,
            value,
        }
    }

    /// The round that its next turn comes in.
    fn round(&self, pace: &Pace) -> u64 {
        ((self.taken + 1) * pace.heaviest - self.start).div_ceil(self.weight)
    }

    fn next_empty(&mut self, slots: &[Option<T>]) -> usize {
        loop {
            let slot = self.at;
            self.at = (self.at + self.step) % slots.len();
            if slots[slot].is_none() {
                return slot;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|n| format!("backend-{n}")).collect()
    }

    fn table<'a, T: Copy>(
        entries: impl IntoIterator<Item = (&'a str, u32, T)> + Clone,
    ) -> Option<Maglev<T>> {
        let size = Size::of(entries.clone().into_iter().map(|(_, weight, _)| weight));
        Maglev::new(size, entries)
    }

    /// Slots by value, of so many values.
    fn counts(table: &Maglev<usize>, values: usize) -> Vec<usize> {
        let mut counts = vec![0; values];
        table.slots.iter().for_each(|&value| counts[value] += 1);
        counts
    }

    fn share(table: &Maglev<usize>, value: usize) -> f64 {
        let slots = table.slots.iter().filter(|&&slot| slot == value).count();
        slots as f64 / table.slots.len() as f64
    }

    /// Of the slots of those that stay, the part that moves when the last of so many leaves.
    fn moved(size: Size, backends: usize) -> f64 {
        let names = names(backends);
        let all = names.iter().enumerate().map(|(n, name)| (name.as_str(), 1, n));
        let before = Maglev::new(size, all.clone()).unwrap();
        let after = Maglev::new(size, all.take(backends - 1)).unwrap();
        let slots = before.slots.iter().zip(after.slots.iter());
        let moved = slots.filter(|&(before, after)| *before != backends - 1 && before != after);
        moved.count() as f64 / before.slots.len() as f64
    }

    #[test]
    fn equal_weights_get_equal_shares() {
        let names = names(8);
        let table = table(names.iter().enumerate().map(|(n, name)| (name.as_str(), 1, n))).unwrap();
        for n in 0..8 {
            assert!((share(&table, n) * 8.0 - 1.0).abs() < 0.02);
        }
    }

    #[test]
    fn shares_follow_weights() {
        let table = table([("a", 1, 0), ("b", 2, 1), ("c", 5, 2), ("off", 0, 3)]).unwrap();
        for (value, weight) in [(0, 1.0), (1, 2.0), (2, 5.0), (3, 0.0)] {
            assert!((share(&table, value) - weight / 8.0).abs() < 0.005);
        }
    }

    #[test]
    fn the_order_of_entries_does_not_matter() {
        let forth = table([("a", 1, 'a'), ("b", 3, 'b'), ("c", 2, 'c')]).unwrap();
        let back = table([("c", 2, 'c'), ("b", 3, 'b'), ("a", 1, 'a')]).unwrap();
        assert_eq!(forth.slots, back.slots);
    }

    #[test]
    fn a_backend_that_leaves_moves_little_of_the_others() {
        let part = moved(Size::of([1; 10]), 10);
        assert!(part < 0.05, "{part}");
        // Beside the thousandth that has to move.
        let part = moved(Size::of([1; 1_000]), 1_000);
        assert!(part < 0.006, "{part}");
    }

    #[test]
    fn light_backends_get_their_share_beside_heavy_ones() {
        let names = names(2_400);
        let weight = |n: usize| if n < 400 { 1_000 } else { 1 };
        let all = names.iter().enumerate().map(|(n, name)| (name.as_str(), weight(n), n));
        let counts = counts(&table(all).unwrap(), 2_400);
        assert!(counts.iter().all(|&slots| slots > 0));
        let (heavy, light) = counts.split_at(400);
        let (heavy, light) = (heavy.iter().sum::<usize>(), light.iter().sum::<usize>());
        let due = 2_000.0 / 402_000.0;
        let share = light as f64 / (light + heavy) as f64;
        assert!((share / due - 1.0).abs() < 0.05, "{share}, {due} are due");
    }

    #[test]
    fn one_that_is_due_less_than_a_slot_of_the_largest_table_has_one() {
        let names = names(4_096);
        let weight = |n: usize| if n == 7 { 1 } else { 1_000 };
        let all = names.iter().enumerate().map(|(n, name)| (name.as_str(), weight(n), n));
        let counts = counts(&table(all).unwrap(), 4_096);
        assert_eq!(counts[7], 1);
        assert!(counts.iter().enumerate().all(|(n, &slots)| n == 7 || (230..290).contains(&slots)));
    }

    #[test]
    fn sizes_are_primes_and_as_large_as_the_pool_needs() {
        for size in SIZES {
            assert!((2..).take_while(|n| n * n <= size).all(|n| size % n != 0), "{size}");
        }
        let size = |weights: &[u32]| Size::of(weights.iter().copied()).0;
        assert_eq!(size(&[]), SIZES[0]);
        assert_eq!(size(&[5; 4_096]), SIZES[0]);
        assert_eq!(size(&[vec![1_000; 65], vec![1]].concat()), SIZES[0]);
        assert_eq!(size(&[vec![1_000; 66], vec![1]].concat()), SIZES[1]);
        assert_eq!(size(&[vec![1_000; 263], vec![1]].concat()), SIZES[2]);
        assert_eq!(size(&[vec![1_000; 4_095], vec![1]].concat()), SIZES[2]);
    }

    /// The usual table, as versions before there were others fill it.
    #[test]
    fn the_usual_table_is_what_it_was() {
        let entries = [("a", 3, 0), ("b", 7, 1), ("c", 1, 2), ("d", 7, 3)];
        let mut turns: Vec<_> = entries
            .iter()
            .map(|&entry| (Turn::new(&Pace { size: SIZES[0], heaviest: 7, total: 18 }, entry), 0))
            .collect();
        let mut slots = vec![None; SIZES[0]];
        let mut empty = slots.len();
        while empty > 0 {
            for (turn, credit) in &mut turns {
                *credit += turn.weight;
                while *credit >= 7 && empty > 0 {
                    *credit -= 7;
                    let slot = turn.next_empty(&slots);
                    slots[slot] = Some(turn.value);
                    empty -= 1;
                }
            }
        }
        let filled = table(entries).unwrap();
        assert!(slots.into_iter().eq(filled.slots.iter().map(|value| Some(*value))));
    }

    #[test]
    fn no_entries_make_no_table() {
        assert!(table::<u8>([]).is_none());
        assert!(table([("a", 0, 1u8)]).is_none());
    }
}
