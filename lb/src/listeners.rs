//! The numbers of listeners, by which workers, flows and counters know them.
//!
//! A listener is its address: while that stays it keeps its number, whatever its name and its pool. One that leaves the
//! configuration goes on for the connections that it has, and is gone when they are. Its number belongs to nobody
//! else until all that was remembered under it is forgotten.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use quic_lb_config::{Config, Listener, MAX_LISTENERS};
use serde::{Deserialize, Serialize};

use crate::client_path::ListenerIndex;

/// Who has which number.
#[derive(Clone, Debug, Default)]
pub(crate) struct ListenerNumbers(Vec<Slot>);

#[derive(Clone, Debug)]
struct Slot {
    /// As the configuration has it, or had it last.
    listener: Listener,
    /// The name of its pool.
    pool: String,
    stage: Stage,
}

/// How far a listener has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Stage {
    Serving,
    /// It is not in the configuration any more, and goes on for its connections.
    Leaving,
    /// Since when, if somebody has looked at the clock.
    Gone(#[serde(skip)] Option<Instant>),
    /// Nothing is remembered under its number.
    Forgotten,
}

/// A listener that has a socket.
#[derive(Clone, Debug)]
pub(crate) struct Placed {
    pub(crate) index: ListenerIndex,
    /// Its pool is one of the present configuration.
    pub(crate) listener: Listener,
    /// Whether it takes no new connections, because it is not in the configuration any more.
    pub(crate) leaves: bool,
}

/// A listener that needs sockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Opening {
    pub(crate) index: ListenerIndex,
    pub(crate) listener: Listener,
}

/// Who has a number, for a successor.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct HandedListener {
    name: String,
    #[serde(with = "crate::zoned")]
    address: SocketAddr,
    both_families: bool,
    pool: String,
    stage: Stage,
}

impl ListenerNumbers {
    /// Who has which number, for a successor.
    pub(crate) fn handed(&self) -> Vec<HandedListener> {
        let handed = |Slot { listener, pool, stage }: &Slot| HandedListener {
            name: listener.name.clone(),
            address: listener.address,
            both_families: listener.both_families,
            pool: pool.clone(),
            stage: *stage,
        };
        self.0.iter().map(handed).collect()
    }

    /// As a predecessor has handed them over. What stands in the configuration beside the address is taken from there.
    pub(crate) fn succeeding(handed: Vec<HandedListener>) -> Self {
        let slot = |HandedListener { name, address, both_families, pool, stage }| {
            let listener = Listener { name, address, both_families, pool: 0, retry_mode: None };
            Slot { listener, pool, stage }
        };
        Self(handed.into_iter().take(MAX_LISTENERS).map(slot).collect())
    }

    /// The numbers after a change to `config`, and who needs sockets by then; `None` while too many numbers of others rest.
    pub(crate) fn planned(&self, config: &Config) -> Option<(Self, Vec<Opening>)> {
        let mut planned = self.clone();
        if !planned.assign(config) {
            return None;
        }
        let is_open = |index: ListenerIndex| self.0.get(index.0).is_some_and(Slot::is_open);
        let opened = planned.placed().filter(|placed| !is_open(placed.index));
        let opened = opened.map(|Placed { index, listener, .. }| Opening { index, listener });
        let opened = opened.collect();
        Some((planned, opened))
    }

    /// Gives the listeners of `config` their numbers; `false` when there is none left for one.
    pub(crate) fn assign(&mut self, config: &Config) -> bool {
        let pool = |listener: &Listener| config.pools.get(listener.pool).map(|of| of.name.clone());
        let mut wanted = [false; MAX_LISTENERS];
        let mut without = vec![];
        // All that are known come before the first that is new, lest that one take the number of another.
        for listener in &config.listeners {
            let known = self.0.iter_mut().zip(&mut wanted).find(|(slot, wanted)| {
                !**wanted
                    && slot.stage != Stage::Forgotten
                    && slot.is_at(listener.address, listener.both_families)
            });
            let Some((slot, wanted)) = known else {
                without.push(listener);
                continue;
            };
            (*wanted, slot.stage) = (true, Stage::Serving);
            slot.pool = pool(listener).unwrap_or_default();
            slot.listener = listener.clone();
        }
        let mut all = true;
        for listener in without {
            let pool = pool(listener).unwrap_or_default();
            let slot = Slot { listener: listener.clone(), pool, stage: Stage::Serving };
            let index = if self.0.len() < MAX_LISTENERS {
                self.0.push(slot);
                self.0.len() - 1
            } else {
                let forgotten = |slot: &Slot| slot.stage == Stage::Forgotten;
                let Some(index) = self.0.iter().position(forgotten) else {
                    all = false;
                    continue;
                };
                self.0[index] = slot;
                index
            };
            wanted[index] = true;
        }
        for (slot, _) in self.0.iter_mut().zip(wanted).filter(|(_, wanted)| !wanted) {
            let pool = config.pools.iter().position(|pool| pool.name == slot.pool);
            match (slot.is_open(), pool) {
                (true, Some(pool)) => {
                    slot.listener.pool = pool;
                    slot.stage = Stage::Leaving;
                }
                // Its connections have lost their servers.
                (true, None) => slot.stage = Stage::Gone(None),
                (false, _) => {}
            }
        }
        all
    }

    /// The listeners that have sockets.
    pub(crate) fn placed(&self) -> impl Iterator<Item = Placed> {
        let open = self.0.iter().enumerate().filter(|(_, slot)| slot.is_open());
        open.map(|(index, Slot { listener, stage, .. })| Placed {
            index: ListenerIndex(index),
            listener: listener.clone(),
            leaves: *stage == Stage::Leaving,
        })
    }

    /// The number of a listener of the configuration.
    pub(crate) fn of(&self, listener: &Listener) -> Option<ListenerIndex> {
        let is_it = |slot: &Slot| {
            slot.stage == Stage::Serving
                && slot.listener.name == listener.name
                && slot.is_at(listener.address, listener.both_families)
        };
        self.0.iter().position(is_it).map(ListenerIndex)
    }

    /// The name of the listener with this number, which may be gone.
    pub(crate) fn name(&self, index: ListenerIndex) -> Option<&str> {
        self.0.get(index.0).map(|slot| slot.listener.name.as_str())
    }

    /// All numbers that listeners of this name have, or had last.
    pub(crate) fn named(&self, name: &str) -> impl Iterator<Item = ListenerIndex> {
        let named = self.0.iter().enumerate().filter(move |(_, slot)| slot.listener.name == name);
        named.map(|(index, _)| ListenerIndex(index))
    }

    /// Has the listeners end that leave and for which nothing `is_left`, and forgets those that have been gone for as long as anything
    /// is remembered of them. Returns those that have ended.
    pub(crate) fn on_tick(
        &mut self,
        now: Instant,
        remembered_for: Duration,
        is_left: impl Fn(ListenerIndex) -> bool,
    ) -> Vec<Listener> {
        let mut ended = vec![];
        for (index, slot) in self.0.iter_mut().enumerate() {
            slot.stage = match slot.stage {
                Stage::Leaving if !is_left(ListenerIndex(index)) => {
                    ended.push(slot.listener.clone());
                    Stage::Gone(Some(now))
                }
                Stage::Gone(None) => Stage::Gone(Some(now)),
                Stage::Gone(Some(since))
                    if now.saturating_duration_since(since) > remembered_for
                        && !is_left(ListenerIndex(index)) =>
                {
                    Stage::Forgotten
                }
                other => other,
            };
        }
        ended
    }
}

impl Slot {
    const fn is_open(&self) -> bool {
        matches!(self.stage, Stage::Serving | Stage::Leaving)
    }

    fn is_at(&self, address: SocketAddr, both_families: bool) -> bool {
        self.listener.address == address && self.listener.both_families == both_families
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    fn config(listeners: &[(&str, u16)]) -> Config {
        let mut config = fixtures::config(false);
        let listener = config.listeners[0].clone();
        let listener = |&(name, port): &(&str, u16)| Listener {
            name: name.to_owned(),
            address: ([127, 0, 0, 1], port).into(),
            ..listener.clone()
        };
        config.listeners = listeners.iter().map(listener).collect();
        config
    }

    fn placed(numbers: &ListenerNumbers) -> Vec<(usize, String, bool)> {
        numbers.placed().map(|of| (of.index.0, of.listener.name, of.leaves)).collect()
    }

    fn at(index: usize, name: &str, leaves: bool) -> (usize, String, bool) {
        (index, name.to_owned(), leaves)
    }

    #[test]
    fn a_listener_keeps_its_number_for_as_long_as_its_address() {
        let mut numbers = ListenerNumbers::default();
        assert!(numbers.assign(&config(&[("a", 1), ("b", 2)])));
        assert_eq!(placed(&numbers), [at(0, "a", false), at(1, "b", false)]);
        // In another order, one with another name, one at another address.
        let next = config(&[("c", 2), ("a", 3)]);
        let (planned, opened) = numbers.planned(&next).unwrap();
        let opened: Vec<_> = opened.iter().map(|opening| opening.index.0).collect();
        assert_eq!(opened, [2], "sockets for the address that is new");
        numbers = planned;
        assert_eq!(placed(&numbers), [at(0, "a", true), at(1, "c", false), at(2, "a", false)]);
        assert_eq!(numbers.of(&next.listeners[1]), Some(ListenerIndex(2)));
        let named: Vec<_> = numbers.named("a").collect();
        assert_eq!(named, [ListenerIndex(0), ListenerIndex(2)], "counters go on");
    }

    #[test]
    fn one_that_comes_back_before_its_connections_have_ended_needs_no_sockets() {
        let mut numbers = ListenerNumbers::default();
        let (both, one) = (config(&[("a", 1), ("b", 2)]), config(&[("a", 1)]));
        numbers.assign(&both);
        numbers.assign(&one);
        assert_eq!(placed(&numbers), [at(0, "a", false), at(1, "b", true)]);
        let (back, opened) = numbers.planned(&both).unwrap();
        assert_eq!((placed(&back), opened), (vec![at(0, "a", false), at(1, "b", false)], vec![]));

        let now = Instant::now();
        assert!(numbers.on_tick(now, Duration::ZERO, |_| true).is_empty());
        let ended = numbers.on_tick(now, Duration::ZERO, |_| false);
        assert_eq!(ended[0].name, "b");
        assert_eq!(placed(&numbers), [at(0, "a", false)]);
        let (back, opened) = numbers.planned(&both).unwrap();
        assert_eq!(placed(&back), [at(0, "a", false), at(1, "b", false)], "the same number");
        assert_eq!(opened.len(), 1);
    }

    #[test]
    fn a_successor_gives_everybody_their_number_and_knows_who_leaves() {
        let mut numbers = ListenerNumbers::default();
        numbers.assign(&config(&[("a", 1), ("b", 2), ("c", 3)]));
        numbers.assign(&config(&[("a", 1), ("c", 3)]));
        let octets = postcard::to_stdvec(&numbers.handed()).unwrap();
        let successor = ListenerNumbers::succeeding(postcard::from_bytes(&octets).unwrap());
        // The order is that of the file.
        let (after, opened) = successor.planned(&config(&[("c", 3), ("a", 1)])).unwrap();
        assert_eq!(opened, []);
        assert_eq!(placed(&after), [at(0, "a", false), at(1, "b", true), at(2, "c", false)]);
        let (_, opened) = successor.planned(&config(&[("a", 1), ("new", 9)])).unwrap();
        assert_eq!(opened[0].listener.name, "new");
    }

    #[test]
    fn one_whose_pool_is_gone_too_ends_at_once() {
        let mut numbers = ListenerNumbers::default();
        numbers.assign(&config(&[("a", 1), ("b", 2)]));
        let mut other = config(&[("a", 1)]);
        other.pools[0].name = "other".into();
        numbers.assign(&other);
        assert_eq!(placed(&numbers), [at(0, "a", false)]);
    }

    #[test]
    fn numbers_rest_until_nothing_is_remembered_under_them() {
        let mut numbers = ListenerNumbers::default();
        let all: Vec<_> = (1..).take(MAX_LISTENERS).map(|port| ("x", port)).collect();
        assert!(numbers.assign(&config(&all)));
        let first = config(&all[1..]);
        numbers.assign(&first);
        let mut next = all[1..].to_vec();
        next.push(("new", 1000));
        let next = config(&next);
        assert!(numbers.planned(&next).is_none(), "the first one leaves");
        let (now, hour) = (Instant::now(), Duration::from_secs(3600));
        numbers.on_tick(now, hour, |_| false);
        numbers.on_tick(now + hour, hour, |_| false);
        assert!(numbers.planned(&next).is_none(), "something is remembered of it");
        numbers.on_tick(now + 2 * hour, hour, |_| true);
        assert!(numbers.planned(&next).is_none(), "a flow is left");
        numbers.on_tick(now + 2 * hour, hour, |_| false);
        let (numbers, opened) = numbers.planned(&next).unwrap();
        assert_eq!((opened[0].index.0, opened.len()), (0, 1));
        assert_eq!(numbers.name(ListenerIndex(0)), Some("new"));
        assert!(numbers.planned(&config(&all)).is_none(), "its number is somebody else's");
    }
}
