//! What handles of one connection wait for, and the events that wake them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicBool},
    task::{Context, Waker},
};

use tokio::sync::Notify;

use crate::transport::{
    ConnectionError, ConnectionHandle, Dir, Event, SharedConnection, Side, StreamEvent, StreamId,
};

/// What the handles of a connection share with the task of its shard.
///
/// A handle locks the waiters, then the connection, and leaves its waker before it lets go of
/// either; the task locks one at a time: the connection to take its events, then the waiters to hand
/// them out. So no event passes between a look and the waker that waits for the next one.
#[derive(Debug)]
pub(super) struct ConnectionInner {
    pub(super) handle: ConnectionHandle,
    pub(super) connection: SharedConnection,
    waiters: Mutex<Waiters>,
    /// It was left for the task, which has not looked at it yet.
    pub(super) queued: AtomicBool,
}

impl ConnectionInner {
    pub(super) const fn new(
        handle: ConnectionHandle,
        connection: SharedConnection,
        waiters: Waiters,
    ) -> Self {
        Self { handle, connection, waiters: Mutex::new(waiters), queued: AtomicBool::new(false) }
    }

    pub(super) fn waiters(&self) -> MutexGuard<'_, Waiters> {
        // A panic of one handle's caller leaves the waiters as valid as any error would.
        self.waiters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who waits for what on a connection that the application has handles of, and what they find.
#[derive(Debug)]
pub(super) struct Waiters {
    /// The handshake is complete.
    pub(super) connected: bool,
    /// Why the connection is over.
    pub(super) error: Option<ConnectionError>,
    /// Who waits for the handshake: there is one handle until then.
    pub(super) connecting: Option<Waker>,
    readers: HashMap<StreamId, Waker>,
    /// Sending streams that have a handle, or have ended before they were accepted.
    senders: HashMap<StreamId, Sender>,
    /// How often the peer was found at another address.
    pub(super) moves: u64,
    /// How many streams that carry data both ways were accepted.
    accepted: u64,
    side: Side,
    pub(super) signals: Arc<Signals>,
}

#[derive(Debug, Default)]
struct Sender {
    waker: Option<Waker>,
    outcome: Option<SendOutcome>,
}

/// What any number of tasks may wait for.
#[derive(Debug, Default)]
pub(super) struct Signals {
    pub(super) closed: Notify,
    opened: [Notify; 2],
    available: [Notify; 2],
    pub(super) datagram: Notify,
    pub(super) datagram_room: Notify,
    /// Some sending stream was stopped or acknowledged completely.
    pub(super) outcome: Notify,
}

/// How a sending stream has ended, as far as the peer is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SendOutcome {
    /// Everything was acknowledged.
    Finished,
    /// The peer wants no more, for this reason.
    Stopped(u64),
}

impl Signals {
    pub(super) fn opened(&self, dir: Dir) -> &Notify {
        &self.opened[dir as usize]
    }

    pub(super) fn available(&self, dir: Dir) -> &Notify {
        &self.available[dir as usize]
    }
}

impl Waiters {
    pub(super) fn new(side: Side) -> Self {
        Self {
            connected: false,
            error: None,
            connecting: None,
            readers: HashMap::new(),
            senders: HashMap::new(),
            moves: 0,
            accepted: 0,
            side,
            signals: Arc::default(),
        }
    }

    /// Has `cx` woken when the stream may be read.
    pub(super) fn await_readable(&mut self, id: StreamId, cx: &Context<'_>) {
        let waker = self.readers.entry(id).or_insert_with(|| cx.waker().clone());
        waker.clone_from(cx.waker());
    }

    /// The handle of a receiving stream is gone.
    pub(super) fn forget_reader(&mut self, id: StreamId) {
        self.readers.remove(&id);
    }

    /// A sending stream has a handle from now on.
    pub(super) fn add_sender(&mut self, id: StreamId) {
        if id.initiator() != self.side {
            self.accepted = self.accepted.max(id.index() + 1);
        }
        self.senders.entry(id).or_default();
    }

    /// Has `cx` woken when the stream may be written to.
    pub(super) fn await_writable(&mut self, id: StreamId, cx: &Context<'_>) {
        if let Some(sender) = self.senders.get_mut(&id) {
            sender.waker = Some(cx.waker().clone());
        }
    }

    /// How a sending stream has ended.
    pub(super) fn outcome(&self, id: StreamId) -> Option<SendOutcome> {
        self.senders.get(&id).and_then(|sender| sender.outcome)
    }

    /// The handle of a sending stream is gone.
    pub(super) fn forget_sender(&mut self, id: StreamId) {
        self.senders.remove(&id);
    }

    /// Takes an event of the core. Wakers of streams are left in `wakers`, to be woken without the
    /// lock.
    pub(super) fn on_event(&mut self, event: Event, wakers: &mut Vec<Waker>) {
        match event {
            Event::Connected => {
                self.connected = true;
                wakers.extend(self.connecting.take());
            }
            Event::Stream(StreamEvent::Readable(id)) => wakers.extend(self.readers.remove(&id)),
            Event::Stream(StreamEvent::Writable(id)) => {
                wakers.extend(self.senders.get_mut(&id).and_then(|sender| sender.waker.take()));
            }
            Event::Stream(StreamEvent::Opened(dir)) => self.signals.opened(dir).notify_waiters(),
            Event::Stream(StreamEvent::Available(dir)) => {
                self.signals.available(dir).notify_waiters();
            }
            Event::Stream(StreamEvent::Finished(id)) => {
                self.on_outcome(id, SendOutcome::Finished, wakers);
            }
            Event::Stream(StreamEvent::Stopped(id, code)) => {
                self.on_outcome(id, SendOutcome::Stopped(code), wakers);
            }
            Event::DatagramReceived => self.signals.datagram.notify_waiters(),
            Event::DatagramsUnblocked => self.signals.datagram_room.notify_waiters(),
            Event::PeerMoved(_) => self.moves += 1,
            Event::Closed(error) => self.on_closed(error, wakers),
        }
    }

    fn on_outcome(&mut self, id: StreamId, outcome: SendOutcome, wakers: &mut Vec<Waker>) {
        // There are no more of these than the peer may open.
        if id.initiator() != self.side && id.index() >= self.accepted {
            self.senders.entry(id).or_default();
        }
        if let Some(sender) = self.senders.get_mut(&id) {
            sender.outcome = Some(outcome);
            wakers.extend(sender.waker.take());
            self.signals.outcome.notify_waiters();
        }
    }

    pub(super) fn on_closed(&mut self, error: ConnectionError, wakers: &mut Vec<Waker>) {
        self.error.get_or_insert(error);
        wakers.extend(self.connecting.take());
        wakers.extend(self.readers.drain().map(|(_, waker)| waker));
        wakers.extend(self.senders.values_mut().filter_map(|sender| sender.waker.take()));
        let signals = &self.signals;
        let single = [&signals.closed, &signals.datagram, &signals.datagram_room, &signals.outcome];
        let all = single.into_iter().chain(&signals.opened).chain(&signals.available);
        all.for_each(Notify::notify_waiters);
    }
}
