//! Memory for what send buffers hold beyond their first size: all connections of a configuration
//! share it, so that many fast ones together take no more than was set aside for them.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// Octets by which shares grow and shrink, so that few writes touch what all share.
const STEP: usize = 256 * 1024;

/// So many octets, for all connections whose configurations hold a clone of this.
#[derive(Clone, Debug)]
pub struct SendMemory(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    limit: usize,
    used: AtomicUsize,
}

impl SendMemory {
    /// Of `limit` octets.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self(Arc::new(Shared { limit, used: AtomicUsize::new(0) }))
    }

    /// Octets that connections have taken.
    #[must_use]
    pub fn used(&self) -> usize {
        self.0.used.load(Ordering::Relaxed)
    }

    fn take(&self, octets: usize) -> bool {
        let take = |used: usize| used.checked_add(octets).filter(|&sum| sum <= self.0.limit);
        self.0.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }
}

impl Default for SendMemory {
    /// A gibibyte: a few dozen connections at a gigabit and 100 ms, or any number of slower ones.
    fn default() -> Self {
        Self::new(1 << 30)
    }
}

/// What one connection has taken. It goes back when this is dropped.
#[derive(Debug)]
pub(super) struct Share {
    of: SendMemory,
    octets: usize,
}

impl Share {
    pub(super) const fn new(of: SendMemory) -> Self {
        Self { of, octets: 0 }
    }

    pub(super) const fn octets(&self) -> usize {
        self.octets
    }

    /// Takes enough for `wanted` octets in all, and a little more, if there is so much left.
    pub(super) fn grow(&mut self, wanted: usize) {
        let more = wanted.saturating_sub(self.octets).next_multiple_of(STEP);
        if more > 0 && self.of.take(more) {
            self.octets += more;
        }
    }

    /// Gives back what `needed` octets do not need.
    pub(super) fn shrink(&mut self, needed: usize) {
        let spare = self.octets.saturating_sub(needed) / STEP * STEP;
        if spare > 0 {
            self.octets -= spare;
            self.of.0.used.fetch_sub(spare, Ordering::Relaxed);
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.of.0.used.fetch_sub(self.octets, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_together_hold_no_more_than_there_is_and_give_it_back() {
        let memory = SendMemory::new(4 * STEP);
        let [mut one, mut two] = [(); 2].map(|()| Share::new(memory.clone()));
        one.grow(2 * STEP + 1);
        assert_eq!((one.octets(), memory.used()), (3 * STEP, 3 * STEP));
        two.grow(STEP + 1);
        assert_eq!((two.octets(), memory.used()), (0, 3 * STEP), "that is too much");
        two.grow(usize::MAX - STEP);
        two.grow(STEP);
        assert_eq!((two.octets(), memory.used()), (STEP, 4 * STEP));
        one.shrink(STEP + 1);
        assert_eq!((one.octets(), memory.used()), (2 * STEP, 3 * STEP));
        drop(one);
        two.shrink(0);
        assert_eq!((two.octets(), memory.used()), (0, 0));
    }
}
