//! Weighted Maglev hashing: a table of 65,537 slots that every balancer with the same
//! configuration fills alike, and that changes little when a backend comes or goes.
//!
//! Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016,
//! section 3.4. Weights: a backend takes its turn as often as its share of the largest weight says.

use std::{hash::Hasher, sync::Arc};

use siphasher::sip::SipHasher13;

/// Slots of a table; a prime, so that every step visits every slot.
pub const SLOTS: usize = 65_537;

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
    pub fn new<'a>(entries: impl IntoIterator<Item = (&'a str, u32, T)>) -> Option<Self> {
        let mut entries: Vec<_> =
            entries.into_iter().filter(|&(_, weight, _)| weight > 0).collect();
        entries.sort_by_key(|&(name, ..)| name);
        let heaviest = u64::from(entries.iter().map(|&(_, weight, _)| weight).max()?);
        let mut turns: Vec<_> =
            entries.iter().map(|&(name, weight, value)| Turn::new(name, weight, value)).collect();

        let mut slots: Box<[Option<T>]> = vec![None; SLOTS].into();
        let mut empty = SLOTS;
        while empty > 0 {
            for turn in &mut turns {
                turn.credit += turn.weight;
                while turn.credit >= heaviest && empty > 0 {
                    turn.credit -= heaviest;
                    let slot = turn.next_empty(&slots);
                    slots[slot] = Some(turn.value);
                    empty -= 1;
                }
            }
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
        // The remainder of a prime below 2^17 keeps the bias under 2^-46.
        self.slots[usize::try_from(hash % SLOTS as u64).unwrap_or_default()]
    }
}

/// One backend's way through the table.
struct Turn<T> {
    at: usize,
    step: usize,
    weight: u64,
    credit: u64,
    value: T,
}

impl<T: Copy> Turn<T> {
    fn new(name: &str, weight: u32, value: T) -> Self {
        let within = |seed: u64, limit: usize| {
            let mut hasher = SipHasher13::new_with_keys(seed, 0);
            hasher.write(name.as_bytes());
            usize::try_from(hasher.finish() % limit as u64).unwrap_or_default()
        };
        Self {
            at: within(1, SLOTS),
            step: 1 + within(2, SLOTS - 1),
            weight: u64::from(weight),
            credit: 0,
            value,
        }
    }

    fn next_empty(&mut self, slots: &[Option<T>]) -> usize {
        loop {
            let slot = self.at;
            self.at = (self.at + self.step) % SLOTS;
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

    fn share(table: &Maglev<usize>, value: usize) -> f64 {
        table.slots.iter().filter(|&&slot| slot == value).count() as f64 / SLOTS as f64
    }

    #[test]
    fn equal_weights_get_equal_shares() {
        let names = names(8);
        let table =
            Maglev::new(names.iter().enumerate().map(|(n, name)| (name.as_str(), 1, n))).unwrap();
        for n in 0..8 {
            assert!((share(&table, n) * 8.0 - 1.0).abs() < 0.02);
        }
    }

    #[test]
    fn shares_follow_weights() {
        let table = Maglev::new([("a", 1, 0), ("b", 2, 1), ("c", 5, 2), ("off", 0, 3)]).unwrap();
        for (value, weight) in [(0, 1.0), (1, 2.0), (2, 5.0), (3, 0.0)] {
            assert!((share(&table, value) - weight / 8.0).abs() < 0.005);
        }
    }

    #[test]
    fn the_order_of_entries_does_not_matter() {
        let forth = Maglev::new([("a", 1, 'a'), ("b", 3, 'b'), ("c", 2, 'c')]).unwrap();
        let back = Maglev::new([("c", 2, 'c'), ("b", 3, 'b'), ("a", 1, 'a')]).unwrap();
        assert_eq!(forth.slots, back.slots);
    }

    #[test]
    fn a_backend_that_leaves_moves_little_of_the_others() {
        let names = names(10);
        let all = names.iter().enumerate().map(|(n, name)| (name.as_str(), 1, n));
        let before = Maglev::new(all.clone()).unwrap();
        let after = Maglev::new(all.take(9)).unwrap();
        let moved = before
            .slots
            .iter()
            .zip(after.slots.iter())
            .filter(|&(&before, &after)| before != 9 && before != after)
            .count();
        assert!((moved as f64) < 0.05 * SLOTS as f64, "{moved} slots moved");
    }

    #[test]
    fn no_entries_make_no_table() {
        assert!(Maglev::<u8>::new([]).is_none());
        assert!(Maglev::new([("a", 0, 1u8)]).is_none());
    }
}
