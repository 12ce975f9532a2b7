//! Doubly linked lists of flow numbers in one vector, without an allocation per entry: each number is in one list at
//! most, in the order in which it was linked, and can leave at any time.

use std::{hash::Hash, time::Instant};

use hashbrown::HashMap;

const NONE: u32 = u32::MAX;

/// One list for each key that has entries.
#[derive(Debug)]
pub(super) struct Lists<K> {
    links: Vec<Link>,
    ends: HashMap<K, Ends, ahash::RandomState>,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    older: u32,
    newer: u32,
    /// When it was linked; `None` when it is in no list.
    since: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Ends {
    oldest: u32,
    newest: u32,
    len: usize,
}

impl Link {
    const OUT: Self = Self { older: NONE, newer: NONE, since: None };
}

impl<K: Copy + Eq + Hash> Lists<K> {
    /// No entries; it allocates nothing as long as numbers are below `capacity` and there are no more than `keys`.
    pub(super) fn with_capacity(capacity: usize, keys: usize, hash: &ahash::RandomState) -> Self {
        Self {
            links: Vec::with_capacity(capacity),
            ends: HashMap::with_capacity_and_hasher(keys, hash.clone()),
        }
    }

    /// Adds `number` to the list of `key` as the newest; it must be in no list.
    pub(super) fn push(&mut self, key: K, number: u32, now: Instant) {
        let at = number as usize;
        if self.links.len() <= at {
            self.links.resize(at + 1, Link::OUT);
        }
        debug_assert_eq!(self.links[at].since, None);
        let empty = Ends { oldest: number, newest: NONE, len: 0 };
        let ends = self.ends.entry(key).or_insert(empty);
        self.links[at] = Link { older: ends.newest, newer: NONE, since: Some(now) };
        if ends.newest != NONE {
            self.links[ends.newest as usize].newer = number;
        }
        ends.newest = number;
        ends.len += 1;
    }

    /// Takes `number` out of the list of `key`, if it is there.
    pub(super) fn remove(&mut self, key: K, number: u32) {
        let Some(link) = self.links.get_mut(number as usize) else { return };
        let Link { older, newer, since: Some(_) } = std::mem::replace(link, Link::OUT) else {
            return;
        };
        if older != NONE {
            self.links[older as usize].newer = newer;
        }
        if newer != NONE {
            self.links[newer as usize].older = older;
        }
        let Some(ends) = self.ends.get_mut(&key) else { return };
        ends.len -= 1;
        if ends.len == 0 {
            self.ends.remove(&key);
            return;
        }
        if older == NONE {
            ends.oldest = newer;
        }
        if newer == NONE {
            ends.newest = older;
        }
    }

    /// Makes `number`, which is in the list of `key`, its newest.
    pub(super) fn link_anew(&mut self, key: K, number: u32, now: Instant) {
        self.remove(key, number);
        self.push(key, number, now);
    }

    /// Writes the numbers that were linked first, and when, to `into`; says how many.
    pub(super) fn first(&self, key: K, into: &mut [(u32, Instant)]) -> usize {
        let mut at = self.ends.get(&key).map_or(NONE, |ends| ends.oldest);
        let mut count = 0;
        for out in into {
            let Some(&Link { newer, since: Some(since), .. }) = self.links.get(at as usize) else {
                break;
            };
            *out = (at, since);
            count += 1;
            at = newer;
        }
        count
    }

    pub(super) fn len(&self, key: K) -> usize {
        self.ends.get(&key).map_or(0, |ends| ends.len)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn they_keep_the_order_of_arrival(
            steps in prop::collection::vec((0u32..20, 0u8..3, any::<bool>()), 0..200)
        ) {
            let hash = ahash::RandomState::with_seeds(1, 2, 3, 4);
            let mut lists = Lists::with_capacity(4, 4, &hash);
            let mut model: BTreeMap<u8, Vec<u32>> = BTreeMap::new();
            let now = Instant::now();
            for (number, key, comes) in steps {
                let is_in = model.iter().find(|(_, list)| list.contains(&number)).map(|(&key, _)| key);
                match (comes, is_in) {
                    (true, None) => {
                        lists.push(key, number, now);
                        model.entry(key).or_default().push(number);
                    }
                    (false, Some(key)) => {
                        lists.remove(key, number);
                        model.entry(key).or_default().retain(|&other| other != number);
                    }
                    (false, None) => lists.remove(key, number),
                    (true, Some(_)) => {}
                }
                for (&key, list) in &model {
                    prop_assert_eq!(lists.len(key), list.len());
                    let mut first = [(0, now); 5];
                    let count = lists.first(key, &mut first);
                    let numbers = first[..count].iter().map(|(number, _)| number);
                    prop_assert!(numbers.eq(list.iter().take(5)));
                }
            }
        }
    }
}
