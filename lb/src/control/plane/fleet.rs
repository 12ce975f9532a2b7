//! All watched backends: in the order of what is wanted, and by name.

use std::{collections::HashMap, sync::Arc};

use super::watched::Watched;

/// All watched backends.
#[derive(Debug, Default)]
pub(super) struct Fleet {
    /// As those of [`Wanted`](crate::wanted::Wanted).
    pools: Vec<Vec<Watched>>,
    /// The place of each pool, and those of its backends.
    places: HashMap<String, (usize, HashMap<Arc<str>, usize>)>,
}

/// Backends by the names of their pools, and by their own.
pub(super) type Named = HashMap<String, HashMap<Arc<str>, Watched>>;

impl Fleet {
    /// Adds a pool.
    pub(super) fn add(
        &mut self,
        pool: &str,
        backends: impl IntoIterator<Item = (Arc<str>, Watched)>,
    ) {
        let (names, backends): (Vec<_>, Vec<_>) = backends.into_iter().unzip();
        let places = names.into_iter().enumerate().map(|(place, name)| (name, place)).collect();
        self.places.insert(pool.to_owned(), (self.pools.len(), places));
        self.pools.push(backends);
    }

    /// Gives all of them away.
    pub(super) fn into_named(self) -> Named {
        let mut pools: Vec<Vec<_>> =
            self.pools.into_iter().map(|of| of.into_iter().map(Some).collect()).collect();
        let named = |(pool, (of, places)): (_, (usize, HashMap<Arc<str>, usize>))| {
            let backends = pools.get_mut(of).map(std::mem::take).unwrap_or_default();
            let mut backends: Vec<Option<Watched>> = backends;
            let of_place = |(name, place): (_, usize)| {
                let watched = backends.get_mut(place)?.take()?;
                Some((name, watched))
            };
            (pool, places.into_iter().filter_map(of_place).collect())
        };
        self.places.into_iter().map(named).collect()
    }

    fn place(&self, pool: &str, name: &str) -> Option<(usize, usize)> {
        let (pool, places) = self.places.get(pool)?;
        Some((*pool, *places.get(name)?))
    }

    pub(super) fn get(&self, pool: &str, name: &str) -> Option<&Watched> {
        let (pool, place) = self.place(pool, name)?;
        self.pools.get(pool)?.get(place)
    }

    pub(super) fn get_mut(&mut self, pool: &str, name: &str) -> Option<&mut Watched> {
        let (pool, place) = self.place(pool, name)?;
        self.pools.get_mut(pool)?.get_mut(place)
    }

    /// Those of each pool, in the order of the configuration.
    pub(super) fn pools(&self) -> &[Vec<Watched>] {
        &self.pools
    }

    pub(super) fn pools_mut(&mut self) -> impl Iterator<Item = &mut Vec<Watched>> {
        self.pools.iter_mut()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Watched> {
        self.pools.iter_mut().flatten()
    }
}
