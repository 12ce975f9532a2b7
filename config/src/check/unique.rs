//! Small checks that several sections share: values that have to differ, lists that have to have
//! some entries and not too many.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fmt::Display,
    num::NonZeroUsize,
};

use crate::{
    mistake::{Mistakes, Place},
    read::{At, List},
    yaml::shown,
};

/// Reports lists that are empty or too long.
pub(super) fn count<T>(
    list: &List<T>,
    place: &Place,
    what: &str,
    max: usize,
    mistakes: &mut Mistakes,
) {
    if list.is_empty() {
        mistakes.error(place, format!("no {what}"), "at least one");
    }
    if list.items.len() > max {
        let found = format!("{} {what}s", list.items.len());
        mistakes.error(place, found, format!("{max} at most"));
    }
}

/// Reports every value that stands further up already.
pub(super) fn check_unique<'a, K: Ord + Display, T: 'a>(
    values: impl Iterator<Item = (K, &'a At<T>)>,
    what: &str,
    mistakes: &mut Mistakes,
) {
    let mut first_places: BTreeMap<K, &Place> = BTreeMap::new();
    for (key, At { place, .. }) in values {
        match first_places.entry(key) {
            Entry::Vacant(free) => {
                free.insert(place);
            }
            Entry::Occupied(taken) => {
                let found = format!("{} again", shown(&taken.key().to_string()));
                mistakes.error(place, found, format!("a unique {what}"));
                mistakes.see_also(taken.get());
            }
        }
    }
}

pub(super) fn octets(count: usize) -> String {
    if count == 1 { "1 byte".to_owned() } else { format!("{count} bytes") }
}

pub(super) fn non_zero(count: u32) -> Option<NonZeroUsize> {
    usize::try_from(count).ok().and_then(NonZeroUsize::new)
}
