//! Backends that have refused something lately. A host says so of few datagrams a second, whichever worker sent them: what one of
//! them hears goes for all. The control plane passes it on, several times a second.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use arc_swap::ArcSwap;

use crate::backend::BackendId;

/// What was told last.
#[derive(Debug, Default)]
pub(crate) struct Refusing {
    /// How often something was.
    told: AtomicU64,
    backends: ArcSwap<Vec<BackendId>>,
}

impl Refusing {
    /// Tells all workers.
    pub(crate) fn tell(&self, backends: Vec<BackendId>) {
        self.backends.store(Arc::new(backends));
        self.told.fetch_add(1, Relaxed);
    }

    /// Those that were told of since `heard`, which is what there is by now afterwards. Whoever asks seldom has the last word alone: the rest was
    /// long ago.
    pub(crate) fn news(&self, heard: &mut u64) -> Option<Arc<Vec<BackendId>>> {
        let told = self.told.load(Relaxed);
        if told == *heard {
            return None;
        }
        *heard = told;
        Some(self.backends.load_full())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    #[test]
    fn each_worker_hears_once_of_what_was_told() {
        let [a, b] = fixtures::backend_ids();
        let refusing = Refusing::default();
        let (mut one, mut other) = (0, 0);
        assert_eq!(refusing.news(&mut one), None);
        refusing.tell(vec![a]);
        assert_eq!(*refusing.news(&mut one).unwrap(), [a]);
        assert_eq!(refusing.news(&mut one), None);
        refusing.tell(vec![a, b]);
        assert_eq!(*refusing.news(&mut other).unwrap(), [a, b]);
        assert_eq!(*refusing.news(&mut one).unwrap(), [a, b]);
    }
}
