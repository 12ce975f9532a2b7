//! What the parts of a process have in common that hand over to a successor: the version of the format, and how
//! moments and keyed hashes cross.

use std::{
    fmt,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::{
    backend::BackendId,
    cid_tag::CidTag,
    client_path::{ClientAddr, ClientPath, ListenerIndex},
};

/// The version of all that crosses. To be raised with every change of it: values are written without names or
/// lengths. A successor that has another one refuses, and its predecessor goes on.
pub(crate) const VERSION: u32 = 2;

/// A moment, counted from that of the hand-over. Clocks of different processes have no common beginning; the few
/// milliseconds that a value is under way do not matter to anything that is measured here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Offset(i64);

impl Offset {
    /// Of `moment` when it is `now`.
    pub(crate) fn new(now: Instant, moment: Instant) -> Self {
        let micros = |span: Duration| i64::try_from(span.as_micros()).unwrap_or(i64::MAX);
        match moment.checked_duration_since(now) {
            Some(ahead) => Self(micros(ahead)),
            None => Self(-micros(now.saturating_duration_since(moment))),
        }
    }

    /// The moment, when it is `now`.
    pub(crate) fn from(self, now: Instant) -> Instant {
        let span = Duration::from_micros(self.0.unsigned_abs());
        let moment = if self.0 < 0 { now.checked_sub(span) } else { now.checked_add(span) };
        moment.unwrap_or(now)
    }
}

/// Keys of a hasher, so that what has been hashed with them means something to a successor. Nobody outside should know them.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HashKeys {
    keys: [u64; 4],
    /// The hash of something: a successor may be built with another hash function under the same name.
    probe: u64,
}

impl HashKeys {
    pub(crate) fn new(keys: [u64; 4]) -> Self {
        let path = ClientPath { client: ClientAddr(([192, 0, 2, 7], 443).into()), local: None };
        let backend = BackendId { slot: 1, generation: 2 };
        let all = ("probe", ListenerIndex(3), path, &[4_u8, 5][..], (backend, CidTag::new(&[6])));
        Self { keys, probe: hasher(keys).hash_one(all) }
    }

    pub(crate) fn hasher(&self) -> ahash::RandomState {
        hasher(self.keys)
    }

    /// Whether this process hashes as the one that the keys are from.
    pub(crate) fn mean_the_same_here(&self) -> bool {
        *self == Self::new(self.keys)
    }
}

fn hasher([a, b, c, d]: [u64; 4]) -> ahash::RandomState {
    ahash::RandomState::with_seeds(a, b, c, d)
}

impl fmt::Debug for HashKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HashKeys").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_before_and_after_cross() {
        let now = Instant::now() + Duration::from_secs(100);
        let (before, after) = (now - Duration::from_secs(7), now + Duration::from_millis(3));
        let later = now + Duration::from_secs(50);
        for moment in [before, now, after] {
            let there = Offset::new(now, moment).from(later);
            assert_eq!(there, moment + Duration::from_secs(50));
        }
    }

    #[test]
    fn other_hash_functions_are_noticed() {
        let keys = HashKeys::new([1, 2, 3, 4]);
        assert!(keys.mean_the_same_here());
        assert!(!HashKeys { probe: keys.probe + 1, ..keys }.mean_the_same_here());
        assert!(!format!("{keys:?}").contains('1'));
    }
}
