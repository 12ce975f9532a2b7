//! What the tasks of an application and the driver share: the endpoint, and who waits for what.
//!
//! Everything is under one lock, held for as long as a call into the endpoint takes and never
//! across an await.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Waker,
    time::Instant,
};

use tokio::sync::Notify;

use super::socket::{Buffers, Socket};
use crate::transport::{
    self, ConnectionError, ConnectionHandle, Event, Side, StreamEvent, StreamId,
};

/// Batches received before what they call for is sent.
const BATCHES: usize = 4;
/// Datagrams sent in a row before the socket is read again.
const SENDS: usize = 64;

/// Shared by all handles and the driver.
pub(super) struct Shared {
    state: Mutex<State>,
    /// Wakes the driver: something was changed that may call for sending.
    pub(super) work: Notify,
    /// Wakes those who wait for connections to come or go.
    pub(super) connections: Notify,
}

pub(super) struct State {
    pub(super) endpoint: transport::Endpoint,
    pub(super) socket: Arc<Socket>,
    pub(super) known: BTreeMap<ConnectionHandle, Known>,
    /// Connections of clients, for the application to accept.
    pub(super) accepted: VecDeque<ConnectionHandle>,
    /// Handles of the application to the endpoint.
    pub(super) handles: usize,
    /// The socket failed; nothing works any more.
    pub(super) failed: bool,
}

/// What is kept for a connection besides the connection.
#[derive(Default)]
pub(super) struct Known {
    pub(super) connected: bool,
    pub(super) error: Option<ConnectionError>,
    /// Wakes those who wait for anything but a particular stream.
    pub(super) changed: Arc<Notify>,
    pub(super) readers: BTreeMap<StreamId, Waker>,
    pub(super) writers: BTreeMap<StreamId, Waker>,
    /// Handles of the application to the connection, its streams included.
    pub(super) handles: usize,
}

impl Shared {
    pub(super) fn new(endpoint: transport::Endpoint, socket: Arc<Socket>) -> Self {
        Self {
            state: Mutex::new(State {
                endpoint,
                socket,
                known: BTreeMap::new(),
                accepted: VecDeque::new(),
                handles: 1,
                failed: false,
            }),
            work: Notify::new(),
            connections: Notify::new(),
        }
    }

    /// The state. A panic elsewhere does not make it wrong: calls into the endpoint do not panic.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `poll` gives something; it is asked again after each change of `notify`.
    pub(super) async fn until<T>(
        &self,
        notify: &Notify,
        mut poll: impl FnMut(&mut State) -> Option<T>,
    ) -> T {
        loop {
            let mut notified = pin!(notify.notified());
            notified.as_mut().enable();
            if let Some(value) = poll(&mut self.lock()) {
                return value;
            }
            notified.await;
        }
    }

    /// The driver: moves datagrams and time until nobody holds the endpoint any more and all of
    /// its connections are gone.
    pub(super) async fn drive(self: Arc<Self>) {
        let mut buffers = Buffers::new();
        let mut octets = Vec::new();
        let mut timer = pin!(tokio::time::sleep_until(Instant::now().into()));
        loop {
            let more = self.transmit(&mut octets).await;
            let (socket, deadline) = {
                let state = self.lock();
                if state.handles == 0 && state.endpoint.connection_count() == 0 {
                    return;
                }
                (Arc::clone(&state.socket), state.endpoint.deadline())
            };
            if let Some(at) = deadline
                && timer.deadline() != at.into()
            {
                timer.as_mut().reset(at.into());
            }
            tokio::select! {
                readable = socket.readable() => {
                    if readable.is_err() || self.receive(&socket, &mut buffers).is_err() {
                        return self.fail();
                    }
                }
                () = self.work.notified() => {}
                () = &mut timer, if deadline.is_some() => {
                    let mut state = self.lock();
                    state.endpoint.handle_deadline(Instant::now());
                }
                () = std::future::ready(()), if more => {}
            }
        }
    }

    /// Sends what is to be sent, up to a limit; returns whether there is more.
    async fn transmit(&self, octets: &mut Vec<u8>) -> bool {
        for _ in 0..SENDS {
            octets.clear();
            let (transmit, socket) = {
                let mut state = self.lock();
                let socket = Arc::clone(&state.socket);
                let segments = socket.max_segments();
                let now = Instant::now();
                let transmit = state.endpoint.poll_transmit(now, segments, octets);
                if transmit.is_none() {
                    self.dispatch(&mut state);
                    // Waking an application may have given it time to act on another thread.
                    return state.endpoint.has_work();
                }
                (transmit, socket)
            };
            if let Some(transmit) = transmit {
                socket.send(&transmit, octets).await;
            }
        }
        true
    }

    fn receive(&self, socket: &Socket, buffers: &mut Buffers) -> io::Result<()> {
        let mut state = self.lock();
        let now = Instant::now();
        for _ in 0..BATCHES {
            let endpoint = &mut state.endpoint;
            let count = socket.receive(buffers, &mut |from, datagram| {
                endpoint.handle_datagram(now, from, datagram);
            })?;
            if count == 0 {
                break;
            }
        }
        Ok(())
    }

    /// Tells those who wait.
    fn dispatch(&self, state: &mut State) {
        while let Some((handle, event)) = state.endpoint.poll_event() {
            match event {
                Event::Connected => {
                    let side = state.endpoint.connection(handle).map(transport::Connection::side);
                    let known = state.known.entry(handle).or_default();
                    known.connected = true;
                    known.changed.notify_waiters();
                    if side == Some(Side::Server) {
                        state.accepted.push_back(handle);
                        self.connections.notify_waiters();
                    }
                }
                Event::Stream(event) => {
                    let Some(known) = state.known.get_mut(&handle) else { continue };
                    match event {
                        StreamEvent::Readable(id) => wake(&mut known.readers, id),
                        StreamEvent::Writable(id)
                        | StreamEvent::Finished(id)
                        | StreamEvent::Stopped(id, _) => wake(&mut known.writers, id),
                        StreamEvent::Opened(_) | StreamEvent::Available(_) => {
                            known.changed.notify_waiters();
                        }
                    }
                }
                Event::DatagramReceived | Event::DatagramsUnblocked | Event::PeerMoved(_) => {
                    if let Some(known) = state.known.get(&handle) {
                        known.changed.notify_waiters();
                    }
                }
                Event::Closed(error) => {
                    state.close(handle, &error);
                    self.connections.notify_waiters();
                }
            }
        }
    }

    /// The socket is gone, and with it every connection.
    fn fail(&self) {
        let mut state = self.lock();
        state.failed = true;
        let handles: Vec<_> = state.known.keys().copied().collect();
        for handle in handles {
            state.close(handle, &ConnectionError::Internal("the socket failed"));
        }
        self.connections.notify_waiters();
    }
}

impl State {
    fn close(&mut self, handle: ConnectionHandle, error: &ConnectionError) {
        // Nobody has it yet, or any more: nothing has to be remembered.
        self.accepted.retain(|&waiting| waiting != handle);
        let Some(known) = self.known.get_mut(&handle) else { return };
        known.error = Some(error.clone());
        known.changed.notify_waiters();
        for (_, waker) in std::mem::take(&mut known.readers) {
            waker.wake();
        }
        for (_, waker) in std::mem::take(&mut known.writers) {
            waker.wake();
        }
        if known.handles == 0 {
            self.known.remove(&handle);
        }
    }

    /// Why a connection is over, if it is.
    pub(super) fn error(&self, handle: ConnectionHandle) -> Option<ConnectionError> {
        self.known.get(&handle)?.error.clone()
    }
}

fn wake(wakers: &mut BTreeMap<StreamId, Waker>, id: StreamId) {
    if let Some(waker) = wakers.remove(&id) {
        waker.wake();
    }
}

/// A connection as the application's handles share it; the last one to go closes it.
pub(super) struct Shareholder {
    pub(super) shared: Arc<Shared>,
    pub(super) handle: ConnectionHandle,
    pub(super) changed: Arc<Notify>,
}

impl Shareholder {
    pub(super) fn new(shared: &Arc<Shared>, state: &mut State, handle: ConnectionHandle) -> Self {
        let known = state.known.entry(handle).or_default();
        known.handles += 1;
        Self { shared: Arc::clone(shared), handle, changed: Arc::clone(&known.changed) }
    }
}

impl Clone for Shareholder {
    fn clone(&self) -> Self {
        Self::new(&self.shared, &mut self.shared.lock(), self.handle)
    }
}

impl Drop for Shareholder {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        let Some(known) = state.known.get_mut(&self.handle) else { return };
        known.handles -= 1;
        if known.handles > 0 {
            return;
        }
        state.known.remove(&self.handle);
        if let Some(connection) = state.endpoint.connection_mut(self.handle) {
            connection.close(Instant::now(), 0, bytes::Bytes::new());
            self.shared.work.notify_one();
        }
    }
}
