//! The tables by which an endpoint finds its connections, and what keeps them in step with those.

use std::{collections::VecDeque, net::SocketAddr, time::Instant};

use super::{super::connection::Connection, ConnectionHandle, Endpoint, shared::SharedConnection};
use crate::connection_id::ConnectionId;

/// A connection as its endpoint keeps it.
pub(super) struct Entry {
    pub(super) connection: SharedConnection,
    pub(super) generation: u64,
    /// The tables do not follow it yet.
    pub(super) unsettled: bool,
    pub(super) half_open: bool,
    /// The deadline it is registered with.
    pub(super) deadline: Option<Instant>,
    pub(super) first_dcid: Option<(SocketAddr, ConnectionId)>,
    /// Where its client was seen when it began, and where a Retry token said that it is.
    pub(super) sealed_client: Option<(SocketAddr, SocketAddr)>,
    pub(super) reset_tokens: Vec<(SocketAddr, [u8; 16])>,
    pub(super) server_name: Option<String>,
}

impl Entry {
    /// Where the client is that speaks from `remote`, as far as a Retry token has told.
    pub(super) fn sealed_client(&self, remote: SocketAddr) -> Option<SocketAddr> {
        self.sealed_client.filter(|(seen, _)| *seen == remote).map(|(_, client)| client)
    }
}

/// Connections in the order in which they get their turn, each once: there are never more of them
/// than places in the table, whatever is added and however rarely they are taken.
#[derive(Default)]
pub(super) struct Turns {
    order: VecDeque<usize>,
    /// Whether a connection is in `order`, by its index.
    waits: Vec<bool>,
}

impl Turns {
    /// Gives a connection a turn after all others, if it waits for none.
    pub(super) fn add(&mut self, index: usize) {
        if index >= self.waits.len() {
            self.waits.resize(index + 1, false);
        }
        if !std::mem::replace(&mut self.waits[index], true) {
            self.order.push_back(index);
        }
    }

    /// Whose turn it is; that connection may have gone meanwhile.
    pub(super) fn next(&mut self) -> Option<usize> {
        let index = self.order.pop_front()?;
        self.waits[index] = false;
        Some(index)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.order.is_empty()
    }
}

impl Endpoint {
    pub(super) fn insert(
        &mut self,
        connection: Connection,
        first_dcid: Option<(SocketAddr, ConnectionId)>,
        server_name: Option<String>,
    ) -> usize {
        let generation = self.next_generation;
        self.next_generation += 1;
        let entry = Entry {
            connection: SharedConnection::new(connection),
            generation,
            unsettled: false,
            half_open: true,
            deadline: None,
            first_dcid,
            sealed_client: None,
            reset_tokens: Vec::new(),
            server_name,
        };
        let index = self.free.pop().unwrap_or(self.connections.len());
        if index == self.connections.len() {
            self.connections.push(Some(entry));
        } else {
            self.connections[index] = Some(entry);
        }
        self.count += 1;
        self.half_open += 1;
        self.touch(index);
        index
    }

    pub(super) fn entry(&self, handle: ConnectionHandle) -> Option<&Entry> {
        let entry = self.connections.get(handle.index)?.as_ref()?;
        (entry.generation == handle.generation).then_some(entry)
    }

    pub(super) fn handle_of(&self, index: usize) -> ConnectionHandle {
        let generation = self.connections[index].as_ref().map_or(0, |entry| entry.generation);
        ConnectionHandle { index, generation }
    }

    /// Notes that a connection was acted on: outputs have to follow.
    pub(super) fn touch(&mut self, index: usize) {
        if let Some(entry) = &mut self.connections[index] {
            entry.unsettled = true;
            self.to_settle.add(index);
            self.may_send.add(index);
        }
    }

    /// Gives a connection what it wants before it transmits: connection IDs, and a token.
    pub(super) fn supply(&mut self, now: Instant, index: usize, connection: &mut Connection) {
        for _ in 0..connection.wanted_cids() {
            let Ok((id, reset_token)) = self.issuers.issue(|id| self.by_cid.contains_key(id))
            else {
                break;
            };
            self.by_cid.insert(id, index);
            connection.issue_cid(id, reset_token);
        }
        if connection.take_token_request() {
            let wall = self.wall_clock(now);
            let remote = connection.path().remote;
            let sealed = self.connections[index].as_ref();
            let sealed = sealed.and_then(|entry| entry.sealed_client(remote));
            let sealed = sealed.map(|client| client.ip());
            let token = self.tokens.new_token(&mut self.random, remote.ip(), sealed, wall);
            if let Some(token) = token {
                connection.send_token(token.to_vec());
            }
        }
    }

    /// Brings tables, events and deadlines up to date with all connections that were acted on.
    pub(super) fn settle_all(&mut self) {
        while let Some(index) = self.to_settle.next() {
            let Some(entry) = self.connections[index].as_ref() else { continue };
            // Most were settled when they had nothing more to send.
            if entry.unsettled {
                let shared = entry.connection.clone();
                self.settle(index, &mut shared.lock());
            }
        }
    }

    /// Brings tables, events and deadlines up to date with one connection.
    pub(super) fn settle(&mut self, index: usize, connection: &mut Connection) {
        let Some(entry) = &mut self.connections[index] else { return };
        entry.unsettled = false;
        let handle = ConnectionHandle { index, generation: entry.generation };
        while let Some(event) = connection.poll_event() {
            self.events.push_back((handle, event));
        }
        for id in connection.take_retired() {
            self.by_cid.remove(&id);
        }
        if let Some(name) = &entry.server_name {
            for token in connection.take_tokens() {
                self.kept_tokens.add(name, token);
            }
        }
        if entry.half_open && !connection.is_half_open() {
            entry.half_open = false;
            self.half_open -= 1;
        }
        if connection.is_confirmed()
            && let Some(first) = entry.first_dcid.take()
        {
            self.by_first_dcid.remove(&first);
            self.by_retry.remove(&first.1);
        }
        if !connection.reset_tokens().eq(entry.reset_tokens.iter().copied()) {
            for token in entry.reset_tokens.drain(..) {
                self.by_reset_token.remove(&token);
            }
            entry.reset_tokens.extend(connection.reset_tokens());
            for &token in &entry.reset_tokens {
                self.by_reset_token.insert(token, index);
            }
        }
        if connection.is_gone() {
            return self.remove(index, connection);
        }
        // A deadline that has moved back stays registered: when it comes, the connection is asked
        // again. That saves an update per datagram.
        let deadline = connection.deadline();
        if let Some(at) = deadline
            && entry.deadline.is_none_or(|registered| at < registered)
        {
            if let Some(registered) = entry.deadline.replace(at) {
                self.deadlines.remove(&(registered, index));
            }
            self.deadlines.insert((at, index));
        }
    }

    pub(super) fn remove(&mut self, index: usize, connection: &Connection) {
        let Some(entry) = self.connections[index].take() else { return };
        for id in connection.local_cids() {
            self.by_cid.remove(&id);
        }
        if let Some(first) = entry.first_dcid {
            self.by_first_dcid.remove(&first);
            self.by_retry.remove(&first.1);
        }
        for token in entry.reset_tokens {
            self.by_reset_token.remove(&token);
        }
        if let Some(at) = entry.deadline {
            self.deadlines.remove(&(at, index));
        }
        self.half_open -= usize::from(entry.half_open);
        self.count -= 1;
        self.free.push(index);
    }
}
