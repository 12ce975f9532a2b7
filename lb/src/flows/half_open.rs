//! The half-open flows: their numbers in the order in which they came, any of which can leave: a doubly linked list in
//! one vector, without an allocation per entry.

const NONE: u32 = u32::MAX;

/// The numbers.
#[derive(Debug)]
pub(super) struct HalfOpen {
    links: Vec<Neighbours>,
    oldest: u32,
    newest: u32,
}

#[derive(Clone, Copy, Debug)]
struct Neighbours {
    older: u32,
    newer: u32,
    waits: bool,
}

impl Neighbours {
    const OUT: Self = Self { older: NONE, newer: NONE, waits: false };
}

impl HalfOpen {
    /// None; it allocates nothing as long as numbers are below `capacity`.
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Self { links: Vec::with_capacity(capacity), oldest: NONE, newest: NONE }
    }

    /// Adds `number` as the newest; it must not be there.
    pub(super) fn push(&mut self, number: u32) {
        let at = number as usize;
        if self.links.len() <= at {
            self.links.resize(at + 1, Neighbours::OUT);
        }
        debug_assert!(!self.links[at].waits);
        self.links[at] = Neighbours { older: self.newest, newer: NONE, waits: true };
        match self.newest {
            NONE => self.oldest = number,
            newest => self.links[newest as usize].newer = number,
        }
        self.newest = number;
    }

    /// Takes `number` out, if it is there.
    pub(super) fn remove(&mut self, number: u32) {
        let Some(link) = self.links.get_mut(number as usize) else { return };
        let Neighbours { older, newer, waits } = std::mem::replace(link, Neighbours::OUT);
        if !waits {
            return;
        }
        match older {
            NONE => self.oldest = newer,
            older => self.links[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.links[newer as usize].older = older,
        }
    }

    /// The numbers, the one that came first first.
    pub(super) fn iter(&self) -> impl Iterator<Item = u32> {
        let number = |number: u32| (number != NONE).then_some(number);
        std::iter::successors(number(self.oldest), move |&at| number(self.links[at as usize].newer))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_keeps_the_order_of_arrival(steps in prop::collection::vec((0u32..20, any::<bool>()), 0..200)) {
            let mut half_open = HalfOpen::with_capacity(4);
            let mut model: Vec<u32> = Vec::new();
            for (number, comes) in steps {
                if !comes {
                    half_open.remove(number);
                    model.retain(|&other| other != number);
                } else if !model.contains(&number) {
                    half_open.push(number);
                    model.push(number);
                }
                prop_assert_eq!(half_open.iter().collect::<Vec<_>>(), model.clone());
            }
        }
    }
}
