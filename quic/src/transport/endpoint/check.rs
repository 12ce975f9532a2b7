//! For tests: connections that nobody shares, and whether the tables of an endpoint agree with its connections.

use std::collections::BTreeSet;

use super::{super::connection::Connection, ConnectionHandle, Endpoint};

impl Endpoint {
    /// [`Self::connection_mut`] where nobody shares the connection.
    pub(crate) fn exclusive(&mut self, handle: ConnectionHandle) -> Option<&mut Connection> {
        self.look_at(handle);
        let entry = self.connections.get_mut(handle.index)?.as_mut()?;
        if entry.generation == handle.generation { entry.connection.exclusive() } else { None }
    }

    /// # Panics
    ///
    /// When a table has an entry that no connection has, or lacks one.
    pub(crate) fn assert_consistent(&self) {
        let live = || {
            let entries = self.connections.iter().enumerate();
            entries.filter_map(|(index, entry)| Some((index, entry.as_ref()?)))
        };
        assert_eq!(self.count, live().count());
        assert_eq!(self.half_open, live().filter(|(_, entry)| entry.half_open).count());
        assert_eq!(self.free.len() + self.count, self.connections.len());
        let cids: BTreeSet<_> = live()
            .flat_map(|(index, entry)| {
                let ids: Vec<_> = entry.connection.lock().local_cids().collect();
                ids.into_iter().map(move |id| (id.to_vec(), index))
            })
            .collect();
        let table: BTreeSet<_> =
            self.by_cid.iter().map(|(id, &index)| (id.to_vec(), index)).collect();
        assert_eq!(table, cids, "connection IDs");
        let firsts = live().filter(|(_, entry)| entry.first_dcid.is_some()).count();
        assert_eq!(self.by_first_dcid.len(), firsts);
        for (first, &index) in &self.by_first_dcid {
            let entry = self.connections[index].as_ref().expect("a connection");
            assert_eq!(entry.first_dcid.as_ref(), Some(first));
        }
        for (token, &index) in &self.by_reset_token {
            let entry = self.connections[index].as_ref().expect("a connection");
            assert!(entry.reset_tokens.contains(token));
        }
        let deadlines: BTreeSet<_> =
            live().filter_map(|(index, entry)| Some((entry.deadline?, index))).collect();
        assert_eq!(self.deadlines, deadlines);
    }

    /// Whether nothing at all is left.
    pub(crate) fn is_blank(&self) -> bool {
        self.count == 0
            && self.half_open == 0
            && self.by_cid.is_empty()
            && self.by_first_dcid.is_empty()
            && self.by_reset_token.is_empty()
            && self.deadlines.is_empty()
            && self.to_settle.is_empty()
            && self.may_send.is_empty()
            && self.replies.is_empty()
            && self.events.is_empty()
    }
}
