//! The streams with something to send: the highest priority first, those of one priority in turn.

use std::collections::{BTreeMap, VecDeque};

use super::super::stream_id::StreamId;

/// A queue per priority in use.
#[derive(Debug, Default)]
pub(super) struct SendQueue {
    /// Ascending; the last one is served.
    levels: BTreeMap<i32, VecDeque<StreamId>>,
}

impl SendQueue {
    pub(super) fn push(&mut self, priority: i32, id: StreamId) {
        self.levels.entry(priority).or_default().push_back(id);
    }

    /// Puts a stream back that was served in part, before the others of its priority.
    pub(super) fn push_front(&mut self, priority: i32, id: StreamId) {
        self.levels.entry(priority).or_default().push_front(id);
    }

    pub(super) fn pop(&mut self) -> Option<StreamId> {
        loop {
            let others = self.levels.len() > 1;
            let mut level = self.levels.last_entry()?;
            let id = level.get_mut().pop_front();
            // An empty level goes, except the only one: it would come back with the next stream.
            if level.get().is_empty() && others {
                level.remove();
            } else if id.is_none() {
                return None;
            }
            if id.is_some() {
                return id;
            }
        }
    }

    pub(super) fn remove(&mut self, priority: i32, id: StreamId) {
        if let Some(level) = self.levels.get_mut(&priority) {
            level.retain(|&queued| queued != id);
            if level.is_empty() {
                self.levels.remove(&priority);
            }
        }
    }

    /// Gives spare memory back.
    pub(super) fn shrink(&mut self) {
        if self.is_empty() {
            self.levels = BTreeMap::new();
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.levels.values().all(VecDeque::is_empty)
    }
}
