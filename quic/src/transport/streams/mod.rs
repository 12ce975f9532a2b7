//! The streams of one connection: opening, reading, writing, and flow control on both levels.
//!
//! Streams that are done on both sides are forgotten; a stream below the highest opened one that
//! is not in the tables is therefore a closed one, and frames for it are ignored. Opening a stream
//! opens all lower ones of its kind, which costs at most as many entries as the limit we gave.

mod limits;
mod memory;
mod queue;
mod recv;
mod send;
#[cfg(test)]
mod tests;
mod transmit;
mod window;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

pub use limits::StreamLimits;
use limits::{LocalStreams, RemoteStreams};
pub use memory::SendMemory;
use memory::Share;
pub use recv::Read;
use recv::{Progress, RecvStream};
use send::SendStream;
use window::Window;

use self::queue::SendQueue;
use super::{
    error::{Code, TransportError},
    frame,
    parameters::TransportParameters,
    stream_id::{Dir, Side, StreamId},
};

/// Something an application may wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamEvent {
    /// The peer has opened streams of this kind.
    Opened(Dir),
    /// A stream has data, its end, or its reset.
    Readable(StreamId),
    /// A stream on which a write was short has room.
    Writable(StreamId),
    /// The peer has acknowledged all of a finished stream.
    Finished(StreamId),
    /// The peer wants no more of a stream, for this reason of its application.
    Stopped(StreamId, u64),
    /// More streams of this kind can be opened, after an attempt failed.
    Available(Dir),
}

/// Why a write is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// The peer wants no more.
    #[error("the peer stopped the stream with code {0}")]
    Stopped(u64),
    /// The stream is finished, was reset, or does not exist.
    #[error("the stream is closed for writing")]
    Closed,
}

/// Why a read is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The peer has abandoned the stream.
    #[error("the peer reset the stream with code {0}")]
    Reset(u64),
    /// The stream was read to its end, was stopped, or does not exist.
    #[error("the stream is closed for reading")]
    Closed,
}

/// Halves of streams that are gone, and whose memory is kept while the connection does not rest; of
/// each kind.
const MAX_SPARE: usize = 16;

/// All streams of a connection.
#[derive(Debug)]
#[expect(clippy::vec_box, reason = "the boxes go back into the maps")]
pub(crate) struct Streams {
    side: Side,
    limits: StreamLimits,
    send: BTreeMap<StreamId, Box<SendStream>>,
    recv: BTreeMap<StreamId, Box<RecvStream>>,
    /// Halves that are gone, whose memory those to come use: without it, each request would pass
    /// memory from the task that receives to the one that answers.
    spare_send: Vec<Box<SendStream>>,
    spare_recv: Vec<Box<RecvStream>>,
    local: [LocalStreams; 2],
    remote: [RemoteStreams; 2],
    /// What the peer allows on a new stream: we opened it both ways, the peer did, we did one way.
    peer_windows: [u64; 3],
    /// The peer's MAX_DATA, and what was written against it.
    send_limit: u64,
    written: u64,
    /// Octets in all send buffers, how many the congestion window asks for, and what was taken of the
    /// memory that connections share because that is more than the first size.
    buffered: usize,
    target: usize,
    share: Share,
    data_blocked_due: bool,
    data_blocked_at: Option<u64>,
    /// Streams whose writes were short because of a limit of the connection.
    waiting: BTreeSet<StreamId>,
    window: Window,
    max_data_due: bool,
    received: u64,
    consumed: u64,
    queue: SendQueue,
    /// Streams with a control frame due.
    control: BTreeSet<StreamId>,
    events: VecDeque<StreamEvent>,
}

impl Streams {
    pub(crate) fn new(side: Side, limits: StreamLimits, memory: SendMemory) -> Self {
        Self {
            side,
            send: BTreeMap::new(),
            recv: BTreeMap::new(),
            spare_send: Vec::new(),
            spare_recv: Vec::new(),
            local: Default::default(),
            remote: [RemoteStreams::new(limits.max_bidi), RemoteStreams::new(limits.max_uni)],
            peer_windows: [0; 3],
            send_limit: 0,
            written: 0,
            buffered: 0,
            target: limits.send_buffer,
            share: Share::new(memory),
            data_blocked_due: false,
            data_blocked_at: None,
            waiting: BTreeSet::new(),
            window: Window::new(limits.connection_window, limits.max_connection_window),
            max_data_due: false,
            received: 0,
            consumed: 0,
            queue: SendQueue::default(),
            control: BTreeSet::new(),
            events: VecDeque::new(),
            limits,
        }
    }

    /// Takes the peer's limits from its transport parameters.
    pub(crate) fn set_peer_limits(&mut self, peer: &TransportParameters) {
        self.peer_windows = [
            peer.initial_max_stream_data_bidi_remote,
            peer.initial_max_stream_data_bidi_local,
            peer.initial_max_stream_data_uni,
        ];
        self.on_max_data(peer.initial_max_data);
        self.on_max_streams(Dir::Bi, peer.initial_max_streams_bidi);
        self.on_max_streams(Dir::Uni, peer.initial_max_streams_uni);
    }

    // What the application does.

    /// Opens a stream; `None` while the peer allows no more.
    pub(crate) fn open(&mut self, dir: Dir) -> Option<StreamId> {
        let local = &mut self.local[dir.index()];
        if local.opened >= local.limit {
            local.waiting = true;
            if local.blocked_at != Some(local.limit) {
                local.blocked_at = Some(local.limit);
                local.blocked_due = true;
            }
            return None;
        }
        let id = StreamId::new(self.side, dir, local.opened);
        local.opened += 1;
        self.insert(id);
        Some(id)
    }

    /// The next stream that the peer opened.
    pub(crate) fn accept(&mut self, dir: Dir) -> Option<StreamId> {
        let remote = &mut self.remote[dir.index()];
        if remote.accepted == remote.opened {
            return None;
        }
        let id = StreamId::new(self.side.peer(), dir, remote.accepted);
        remote.accepted += 1;
        Some(id)
    }

    /// Buffers as much of `data` as limits allow; [`StreamEvent::Writable`] follows a short write.
    pub(crate) fn write(&mut self, id: StreamId, data: &[u8]) -> Result<usize, WriteError> {
        let room = self.room(data.len());
        let stream = self.send.get_mut(&id).ok_or(WriteError::Closed)?;
        if let Some(code) = stream.stopped() {
            return Err(WriteError::Stopped(code));
        }
        if !stream.is_open() {
            return Err(WriteError::Closed);
        }
        let stream_credit = stream.credit();
        let connection_credit = self.send_limit - self.written;
        let credit = stream_credit.min(connection_credit);
        let credit = usize::try_from(credit).unwrap_or(usize::MAX).min(room);
        let count = data.len().min(credit);
        stream.buffer.write(&data[..count]);
        self.written += count as u64;
        self.buffered += count;
        if count < data.len() {
            stream.waiting = true;
            if stream_credit <= count as u64 && stream.on_blocked() {
                self.control.insert(id);
            }
            if stream_credit > count as u64 {
                self.waiting.insert(id);
            }
            if connection_credit <= count as u64 && self.data_blocked_at != Some(self.send_limit) {
                self.data_blocked_at = Some(self.send_limit);
                self.data_blocked_due = true;
            }
        }
        self.enqueue(id);
        Ok(count)
    }

    /// Octets of `wanted` that send buffers have room for.
    fn room(&mut self, wanted: usize) -> usize {
        let first = self.limits.send_buffer;
        let end = self.buffered.saturating_add(wanted).min(self.target);
        if end > first + self.share.octets() {
            self.share.grow(end - first);
        }
        (first + self.share.octets()).min(self.target).saturating_sub(self.buffered)
    }

    /// Takes the congestion window, which send buffers follow: one for what is in flight, and one for
    /// what leaves until the application has written more.
    pub(crate) fn set_congestion_window(&mut self, window: u64) {
        let target = usize::try_from(window.saturating_mul(2)).unwrap_or(usize::MAX);
        let first = self.limits.send_buffer;
        self.target = target.clamp(first, self.limits.max_send_buffer.max(first));
        if !self.waiting.is_empty() {
            self.wake_if_there_is_room();
        }
    }

    /// Ends a stream after what was written.
    pub(crate) fn finish(&mut self, id: StreamId) -> Result<(), WriteError> {
        let stream = self.send.get_mut(&id).ok_or(WriteError::Closed)?;
        if let Some(code) = stream.stopped() {
            return Err(WriteError::Stopped(code));
        }
        if !stream.finish() {
            return Err(WriteError::Closed);
        }
        self.enqueue(id);
        Ok(())
    }

    /// Abandons a stream.
    pub(crate) fn reset(&mut self, id: StreamId, code: u64) -> Result<(), WriteError> {
        let stream = self.send.get_mut(&id).ok_or(WriteError::Closed)?;
        let (held, unsent) = (stream.buffer.len(), stream.buffer.end() - stream.buffer.unsent());
        if !stream.reset(code) {
            return Err(WriteError::Closed);
        }
        // What was never sent does not count towards the final size.
        self.written -= unsent;
        self.release(held);
        self.control.insert(id);
        Ok(())
    }

    /// Sets the priority of a stream: higher ones go first, the default is 0.
    pub(crate) fn set_priority(&mut self, id: StreamId, priority: i32) -> Result<(), WriteError> {
        let stream = self.send.get_mut(&id).ok_or(WriteError::Closed)?;
        let before = std::mem::replace(&mut stream.priority, priority);
        if stream.queued && before != priority {
            self.queue.remove(before, id);
            self.queue.push(priority, id);
        }
        Ok(())
    }

    /// Reads.
    pub(crate) fn read(&mut self, id: StreamId, out: &mut [u8]) -> Result<Read, ReadError> {
        let stream = self.recv.get_mut(&id).ok_or(ReadError::Closed)?;
        match stream.read(out) {
            Ok(Read::Data(count)) => {
                if stream.wants_credit() && stream.window.is_due(stream.consumed()) {
                    self.control.insert(id);
                }
                self.consume(count as u64);
                Ok(Read::Data(count))
            }
            Ok(Read::Blocked) => Ok(Read::Blocked),
            Ok(Read::Finished) => {
                self.remove_recv(id);
                Ok(Read::Finished)
            }
            Err(code) => {
                self.remove_recv(id);
                Err(ReadError::Reset(code))
            }
        }
    }

    /// Wants no more of a stream.
    pub(crate) fn stop(&mut self, id: StreamId, code: u64) -> Result<(), ReadError> {
        let stream = self.recv.get_mut(&id).ok_or(ReadError::Closed)?;
        let discarded = stream.stop(code);
        let done = stream.is_discarded();
        self.control.insert(id);
        self.consume(discarded);
        if done {
            self.remove_recv(id);
        }
        Ok(())
    }

    /// Whether a sending half is still there, and the code by which the peer stopped it.
    pub(crate) fn send_state(&self, id: StreamId) -> Option<Option<u64>> {
        self.send.get(&id).map(|stream| stream.stopped())
    }

    pub(crate) fn poll_event(&mut self) -> Option<StreamEvent> {
        self.events.pop_front()
    }

    /// Gives spare memory back.
    pub(crate) fn shrink(&mut self) {
        // An empty map keeps the memory of its last node.
        if self.send.is_empty() {
            self.send = BTreeMap::new();
        }
        if self.recv.is_empty() {
            self.recv = BTreeMap::new();
        }
        self.send.values_mut().for_each(|stream| stream.buffer.shrink());
        self.recv.values_mut().for_each(|stream| stream.shrink());
        (self.spare_send, self.spare_recv) = (Vec::new(), Vec::new());
        for set in [&mut self.waiting, &mut self.control] {
            if set.is_empty() {
                *set = BTreeSet::new();
            }
        }
        self.events.shrink_to_fit();
        self.queue.shrink();
    }

    // What frames say.

    pub(crate) fn on_stream(&mut self, frame: &frame::Stream<'_>) -> Result<(), TransportError> {
        let credit = self.window.limit() - self.received;
        let Some(stream) = self.receiving(frame.id)? else { return Ok(()) };
        let progress = stream.on_data(frame.offset, frame.data, frame.fin, credit)?;
        self.progress(frame.id, progress);
        Ok(())
    }

    pub(crate) fn on_reset_stream(
        &mut self,
        frame: &frame::ResetStream,
    ) -> Result<(), TransportError> {
        let credit = self.window.limit() - self.received;
        let Some(stream) = self.receiving(frame.id)? else { return Ok(()) };
        let progress = stream.on_reset(frame.code, frame.final_size, credit)?;
        self.progress(frame.id, progress);
        Ok(())
    }

    pub(crate) fn on_stop_sending(
        &mut self,
        id: StreamId,
        code: u64,
    ) -> Result<(), TransportError> {
        let Some(stream) = self.sending(id)? else { return Ok(()) };
        // "An endpoint that receives a STOP_SENDING frame MUST send a RESET_STREAM frame if the
        // stream is in the "Ready" or "Send" state. [...] An endpoint SHOULD copy the error code"
        // https://www.rfc-editor.org/rfc/rfc9000.html#section-3.5
        if stream.stop(code) {
            let _ = self.reset(id, code);
            self.events.push_back(StreamEvent::Stopped(id, code));
        }
        Ok(())
    }

    pub(crate) fn on_max_data(&mut self, limit: u64) {
        if limit > self.send_limit {
            self.send_limit = limit;
            self.wake_waiting();
        }
    }

    pub(crate) fn on_max_stream_data(
        &mut self,
        id: StreamId,
        limit: u64,
    ) -> Result<(), TransportError> {
        let Some(stream) = self.sending(id)? else { return Ok(()) };
        if stream.set_limit(limit) && std::mem::take(&mut stream.waiting) {
            self.waiting.remove(&id);
            self.events.push_back(StreamEvent::Writable(id));
        }
        Ok(())
    }

    pub(crate) fn on_max_streams(&mut self, dir: Dir, limit: u64) {
        let local = &mut self.local[dir.index()];
        if limit > local.limit {
            local.limit = limit;
            if std::mem::take(&mut local.waiting) {
                self.events.push_back(StreamEvent::Available(dir));
            }
        }
    }

    pub(crate) fn on_stream_data_blocked(&mut self, id: StreamId) -> Result<(), TransportError> {
        self.receiving(id).map(|_| ())
    }

    // Inside.

    /// The receiving half that a frame is about; `None` when it is closed.
    fn receiving(&mut self, id: StreamId) -> Result<Option<&mut RecvStream>, TransportError> {
        if id.initiator() == self.side && id.dir() == Dir::Uni {
            return Err(TransportError::new(
                Code::STREAM_STATE_ERROR,
                "data on a stream that only we send on",
            ));
        }
        self.ensure_open(id)?;
        Ok(self.recv.get_mut(&id).map(Box::as_mut))
    }

    /// The sending half that a frame is about; `None` when it is closed.
    fn sending(&mut self, id: StreamId) -> Result<Option<&mut SendStream>, TransportError> {
        if id.initiator() != self.side && id.dir() == Dir::Uni {
            return Err(TransportError::new(
                Code::STREAM_STATE_ERROR,
                "a frame to a sender about a stream that only the peer sends on",
            ));
        }
        self.ensure_open(id)?;
        Ok(self.send.get_mut(&id).map(Box::as_mut))
    }

    /// Opens what the peer opens with `id`, within our limit.
    fn ensure_open(&mut self, id: StreamId) -> Result<(), TransportError> {
        let dir = id.dir();
        if id.initiator() == self.side {
            if id.index() >= self.local[dir.index()].opened {
                return Err(TransportError::new(
                    Code::STREAM_STATE_ERROR,
                    "a frame for a stream of ours that is not open",
                ));
            }
            return Ok(());
        }
        let remote = &mut self.remote[dir.index()];
        if id.index() >= remote.announced {
            return Err(TransportError::new(Code::STREAM_LIMIT_ERROR, "a stream beyond the limit"));
        }
        let opened = remote.opened..id.index() + 1;
        if opened.is_empty() {
            return Ok(());
        }
        remote.opened = opened.end;
        remote.consider();
        for index in opened {
            self.insert(StreamId::new(id.initiator(), dir, index));
        }
        if !self.events.contains(&StreamEvent::Opened(dir)) {
            self.events.push_back(StreamEvent::Opened(dir));
        }
        Ok(())
    }

    fn insert(&mut self, id: StreamId) {
        let ours = id.initiator() == self.side;
        if ours || id.dir() == Dir::Bi {
            let limit = match (id.dir(), ours) {
                (Dir::Bi, true) => self.peer_windows[0],
                (Dir::Bi, false) => self.peer_windows[1],
                (Dir::Uni, _) => self.peer_windows[2],
            };
            let stream = match self.spare_send.pop() {
                Some(spare) => spare.again(limit),
                None => Box::new(SendStream::new(limit)),
            };
            self.send.insert(id, stream);
        }
        if !ours || id.dir() == Dir::Bi {
            let window = Window::new(self.limits.stream_window, self.limits.max_stream_window);
            let stream = match self.spare_recv.pop() {
                Some(spare) => spare.again(window),
                None => Box::new(RecvStream::new(window)),
            };
            self.recv.insert(id, stream);
        }
    }

    fn progress(&mut self, id: StreamId, progress: Progress) {
        self.received += progress.received;
        self.consume(progress.discarded);
        let Some(stream) = self.recv.get_mut(&id) else { return };
        if stream.is_discarded() {
            self.remove_recv(id);
        } else if stream.is_readable() && !stream.notified {
            stream.notified = true;
            self.events.push_back(StreamEvent::Readable(id));
        }
    }

    fn consume(&mut self, octets: u64) {
        self.consumed += octets;
        self.max_data_due |= self.window.is_due(self.consumed);
    }

    /// Whether the peer has everything that was written, and every end.
    pub(crate) fn is_delivered(&self) -> bool {
        self.buffered == 0 && !self.send.values().any(|stream| stream.is_ending())
    }

    /// `octets` left the send buffers.
    fn release(&mut self, octets: usize) {
        self.buffered -= octets;
        self.share.shrink(self.buffered.saturating_sub(self.limits.send_buffer));
        if octets > 0 {
            self.wake_if_there_is_room();
        }
    }

    /// Wakes writers when a quarter is free, so that what is left lasts until they have written.
    fn wake_if_there_is_room(&mut self) {
        let free = self.target / 4;
        if self.buffered <= self.target - free && self.room(free) > 0 {
            self.wake_waiting();
        }
    }

    fn wake_waiting(&mut self) {
        while let Some(id) = self.waiting.pop_first() {
            if let Some(stream) = self.send.get_mut(&id)
                && std::mem::take(&mut stream.waiting)
            {
                self.events.push_back(StreamEvent::Writable(id));
            }
        }
    }

    fn enqueue(&mut self, id: StreamId) {
        if let Some(stream) = self.send.get_mut(&id)
            && !stream.queued
            && stream.has_output()
        {
            stream.queued = true;
            self.queue.push(stream.priority, id);
        }
    }

    fn remove_send(&mut self, id: StreamId) {
        if let Some(mut stream) = self.send.remove(&id) {
            if stream.queued {
                self.queue.remove(stream.priority, id);
            }
            if self.spare_send.len() < MAX_SPARE {
                stream.buffer.empty();
                self.spare_send.push(stream);
            }
            self.waiting.remove(&id);
            self.on_half_closed(id);
        }
    }

    fn remove_recv(&mut self, id: StreamId) {
        if let Some(mut stream) = self.recv.remove(&id) {
            if self.spare_recv.len() < MAX_SPARE {
                stream.empty();
                self.spare_recv.push(stream);
            }
            self.on_half_closed(id);
        }
    }

    /// A stream of the peer's whose halves are both gone makes room for another one.
    fn on_half_closed(&mut self, id: StreamId) {
        let gone = !self.send.contains_key(&id) && !self.recv.contains_key(&id);
        if !gone || id.initiator() == self.side {
            return;
        }
        let remote = &mut self.remote[id.dir().index()];
        remote.closed += 1;
        remote.consider();
    }
}
