//! The streams of one connection: opening, reading, writing, and flow control on both levels.
//!
//! Streams that are done on both sides are forgotten; a stream below the highest opened one that
//! is not in the tables is therefore a closed one, and frames for it are ignored. Opening a stream
//! opens all lower ones of its kind, which costs at most as many entries as the limit we gave.

mod queue;
mod recv;
mod send;
mod window;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::Range,
    time::{Duration, Instant},
};

pub use recv::Read;
use recv::{Progress, RecvStream};
use send::SendStream;
use window::Window;

use self::queue::SendQueue;
use super::{
    error::{Code, TransportError},
    frame,
    parameters::TransportParameters,
    recovery::SentFrame,
    stream_id::{Dir, Side, StreamId},
};
use crate::varint;

/// The limits we set for the peer and for ourselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamLimits {
    /// Bidirectional streams that the peer may have open at once.
    pub max_bidi: u64,
    /// Unidirectional streams that the peer may have open at once.
    pub max_uni: u64,
    /// Octets of one stream that the peer may send ahead of the application, at first.
    pub stream_window: u64,
    /// The most that window grows to.
    pub max_stream_window: u64,
    /// Octets of all streams that the peer may send ahead of the application, at first.
    pub connection_window: u64,
    /// The most that window grows to.
    pub max_connection_window: u64,
    /// Octets that writes may buffer until they are acknowledged.
    pub send_buffer: usize,
}

impl Default for StreamLimits {
    fn default() -> Self {
        Self {
            // Enough for a browser's requests in parallel.
            max_bidi: 100,
            max_uni: 100,
            // A first window for short exchanges; those that need more get more.
            stream_window: 256 * 1024,
            max_stream_window: 8 * 1024 * 1024,
            connection_window: 512 * 1024,
            // One second of 128 Mbit/s, or 100 ms of more than a gigabit.
            max_connection_window: 16 * 1024 * 1024,
            send_buffer: 4 * 1024 * 1024,
        }
    }
}

impl StreamLimits {
    /// Puts these limits into our transport parameters.
    pub(crate) fn announce(&self, parameters: &mut TransportParameters) {
        parameters.initial_max_data = self.connection_window;
        parameters.initial_max_stream_data_bidi_local = self.stream_window;
        parameters.initial_max_stream_data_bidi_remote = self.stream_window;
        parameters.initial_max_stream_data_uni = self.stream_window;
        parameters.initial_max_streams_bidi = self.max_bidi;
        parameters.initial_max_streams_uni = self.max_uni;
    }
}

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

/// All streams of a connection.
#[derive(Debug)]
pub(crate) struct Streams {
    side: Side,
    limits: StreamLimits,
    send: BTreeMap<StreamId, SendStream>,
    recv: BTreeMap<StreamId, RecvStream>,
    local: [LocalStreams; 2],
    remote: [RemoteStreams; 2],
    /// What the peer allows on a new stream: we opened it both ways, the peer did, we did one way.
    peer_windows: [u64; 3],
    /// The peer's MAX_DATA, and what was written against it.
    send_limit: u64,
    written: u64,
    /// Octets in all send buffers.
    buffered: usize,
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

#[derive(Debug, Default)]
struct LocalStreams {
    opened: u64,
    limit: u64,
    blocked_due: bool,
    blocked_at: Option<u64>,
    waiting: bool,
}

#[derive(Debug, Default)]
struct RemoteStreams {
    opened: u64,
    accepted: u64,
    closed: u64,
    concurrent: u64,
    announced: u64,
    limit_due: bool,
}

impl RemoteStreams {
    fn new(concurrent: u64) -> Self {
        Self { concurrent, announced: concurrent, ..Self::default() }
    }

    /// Has the limit announced when that is worth a frame. Telling one by one would cost a frame
    /// per stream; a peer that is about to run out of streams is told of each one.
    fn consider(&mut self) {
        let news = self.closed + self.concurrent - self.announced;
        let left = self.announced - self.opened;
        self.limit_due |= news > 0 && news >= (self.concurrent / 8).min(left / 2);
    }
}

impl Streams {
    pub(crate) fn new(side: Side, limits: StreamLimits) -> Self {
        Self {
            side,
            send: BTreeMap::new(),
            recv: BTreeMap::new(),
            local: Default::default(),
            remote: [RemoteStreams::new(limits.max_bidi), RemoteStreams::new(limits.max_uni)],
            peer_windows: [0; 3],
            send_limit: 0,
            written: 0,
            buffered: 0,
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
        let stream = self.send.get_mut(&id).ok_or(WriteError::Closed)?;
        if let Some(code) = stream.stopped() {
            return Err(WriteError::Stopped(code));
        }
        if !stream.is_open() {
            return Err(WriteError::Closed);
        }
        let stream_credit = stream.credit();
        let connection_credit = self.send_limit - self.written;
        let room = self.limits.send_buffer.saturating_sub(self.buffered);
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
        self.send.get(&id).map(SendStream::stopped)
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
        self.recv.values_mut().for_each(RecvStream::shrink);
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

    // What transmit asks for.

    /// Whether any frame is due.
    pub(crate) fn has_output(&self) -> bool {
        self.has_control() || !self.queue.is_empty()
    }

    fn has_control(&self) -> bool {
        !self.control.is_empty()
            || self.max_data_due
            || self.data_blocked_due
            || self.local.iter().any(|local| local.blocked_due)
            || self.remote.iter().any(|remote| remote.limit_due)
    }

    /// Appends control frames up to the length `end` of `out`, and notes them in `sent`.
    pub(crate) fn write_control(
        &mut self,
        now: Instant,
        rtt: Duration,
        end: usize,
        out: &mut Vec<u8>,
        sent: &mut Vec<SentFrame>,
    ) {
        use frame::types;
        let room = |out: &Vec<u8>| end.saturating_sub(out.len()) >= frame::CONTROL_SIZE;
        if self.max_data_due && room(out) {
            self.max_data_due = false;
            self.window.raise(now, rtt, self.consumed);
            frame::write_fields(types::MAX_DATA, &[self.window.limit()], out);
            sent.push(SentFrame::MaxData);
        }
        if self.data_blocked_due && room(out) {
            self.data_blocked_due = false;
            frame::write_fields(types::DATA_BLOCKED, &[self.send_limit], out);
            sent.push(SentFrame::DataBlocked);
        }
        for dir in Dir::BOTH {
            let remote = &mut self.remote[dir.index()];
            if remote.limit_due && room(out) {
                remote.limit_due = false;
                remote.announced = remote.closed + remote.concurrent;
                let frame_type = match dir {
                    Dir::Bi => types::MAX_STREAMS_BIDI,
                    Dir::Uni => types::MAX_STREAMS_UNI,
                };
                frame::write_fields(frame_type, &[remote.announced], out);
                sent.push(SentFrame::MaxStreams(dir));
            }
            let local = &mut self.local[dir.index()];
            if local.blocked_due && room(out) {
                local.blocked_due = false;
                let frame_type = match dir {
                    Dir::Bi => types::STREAMS_BLOCKED_BIDI,
                    Dir::Uni => types::STREAMS_BLOCKED_UNI,
                };
                frame::write_fields(frame_type, &[local.limit], out);
                sent.push(SentFrame::StreamsBlocked(dir));
            }
        }
        // A stream has at most four of them due.
        while end.saturating_sub(out.len()) >= 4 * frame::CONTROL_SIZE {
            let Some(id) = self.control.pop_first() else { break };
            let number = id.to_wire();
            if let Some(stream) = self.send.get_mut(&id) {
                if let Some((code, final_size)) = stream.poll_reset() {
                    frame::write_fields(types::RESET_STREAM, &[number, code, final_size], out);
                    sent.push(SentFrame::ResetStream(id));
                }
                if std::mem::take(&mut stream.blocked_due) {
                    let fields = [number, stream.limit];
                    frame::write_fields(types::STREAM_DATA_BLOCKED, &fields, out);
                    sent.push(SentFrame::StreamDataBlocked(id));
                }
            }
            if let Some(stream) = self.recv.get_mut(&id) {
                if let Some(code) = stream.poll_stop() {
                    frame::write_fields(types::STOP_SENDING, &[number, code], out);
                    sent.push(SentFrame::StopSending(id));
                }
                if stream.wants_credit() && stream.window.is_due(stream.consumed()) {
                    stream.window.raise(now, rtt, stream.consumed());
                    let fields = [number, stream.window.limit()];
                    frame::write_fields(types::MAX_STREAM_DATA, &fields, out);
                    sent.push(SentFrame::MaxStreamData(id));
                }
            }
        }
    }

    /// Appends STREAM frames up to the length `end` of `out`, and notes them in `sent`.
    pub(crate) fn write_data(&mut self, end: usize, out: &mut Vec<u8>, sent: &mut Vec<SentFrame>) {
        loop {
            let room = end.saturating_sub(out.len());
            // Not worth a frame.
            if room < frame::STREAM_OVERHEAD + 8 {
                return;
            }
            let Some(id) = self.queue.pop() else { return };
            let Some(stream) = self.send.get_mut(&id) else { continue };
            stream.queued = false;
            let max = room - frame::stream_overhead(id, stream.next_offset());
            let Some(chunk) = stream.poll(max) else { continue };
            let len = usize::try_from(chunk.range.end - chunk.range.start).unwrap_or(0);
            // A frame that ends where the packet does needs no length. So that packets of bulk data
            // are all of one size, which segmentation offload wants, padding goes in front where the
            // length would not fit.
            let mut length = Some(len);
            if len + varint::size(len as u64) > max {
                out.resize(out.len() + max - len, 0);
                length = None;
            }
            frame::write_stream_header(id, chunk.range.start, length, chunk.fin, out);
            stream.buffer.copy(&chunk.range, out);
            sent.push(SentFrame::Stream { id, range: chunk.range, fin: chunk.fin });
            if stream.has_output() {
                stream.queued = true;
                // A lost piece before new data: the next one of this stream goes along.
                if end.saturating_sub(out.len()) > frame::STREAM_OVERHEAD + 8 {
                    self.queue.push_front(stream.priority, id);
                } else {
                    self.queue.push(stream.priority, id);
                }
            }
        }
    }

    // What became of frames sent.

    pub(crate) fn on_stream_acked(&mut self, id: StreamId, range: Range<u64>, fin: bool) {
        let Some(stream) = self.send.get_mut(&id) else { return };
        let before = stream.buffer.len();
        stream.on_acked(range, fin);
        let released = before - stream.buffer.len();
        if stream.is_finished() {
            self.events.push_back(StreamEvent::Finished(id));
            self.remove_send(id);
        }
        self.release(released);
    }

    pub(crate) fn on_stream_lost(&mut self, id: StreamId, range: Range<u64>, fin: bool) {
        if let Some(stream) = self.send.get_mut(&id) {
            stream.on_lost(range, fin);
            self.enqueue(id);
        }
    }

    pub(crate) fn on_reset_acked(&mut self, id: StreamId) {
        self.remove_send(id);
    }

    pub(crate) fn on_reset_lost(&mut self, id: StreamId) {
        if let Some(stream) = self.send.get_mut(&id) {
            stream.on_reset_lost();
            self.control.insert(id);
        }
    }

    pub(crate) fn on_stop_lost(&mut self, id: StreamId) {
        if let Some(stream) = self.recv.get_mut(&id) {
            stream.on_stop_lost();
            self.control.insert(id);
        }
    }

    pub(crate) fn on_max_stream_data_lost(&mut self, id: StreamId) {
        if let Some(stream) = self.recv.get_mut(&id)
            && stream.wants_credit()
        {
            stream.window.resend();
            self.control.insert(id);
        }
    }

    pub(crate) fn on_max_data_lost(&mut self) {
        self.max_data_due = true;
    }

    pub(crate) fn on_max_streams_lost(&mut self, dir: Dir) {
        self.remote[dir.index()].limit_due = true;
    }

    pub(crate) fn on_stream_data_blocked_lost(&mut self, id: StreamId) {
        if let Some(stream) = self.send.get_mut(&id)
            && stream.credit() == 0
            && stream.is_open()
        {
            stream.blocked_due = true;
            self.control.insert(id);
        }
    }

    pub(crate) fn on_data_blocked_lost(&mut self) {
        self.data_blocked_due = self.written == self.send_limit;
    }

    pub(crate) fn on_streams_blocked_lost(&mut self, dir: Dir) {
        let local = &mut self.local[dir.index()];
        local.blocked_due = local.opened == local.limit;
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
        Ok(self.recv.get_mut(&id))
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
        Ok(self.send.get_mut(&id))
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
            self.send.insert(id, SendStream::new(limit));
        }
        if !ours || id.dir() == Dir::Bi {
            let window = Window::new(self.limits.stream_window, self.limits.max_stream_window);
            self.recv.insert(id, RecvStream::new(window));
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

    /// `octets` left the send buffers.
    fn release(&mut self, octets: usize) {
        self.buffered -= octets;
        if octets > 0 && self.buffered <= self.limits.send_buffer / 2 {
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
        if let Some(stream) = self.send.remove(&id) {
            if stream.queued {
                self.queue.remove(stream.priority, id);
            }
            self.waiting.remove(&id);
            self.on_half_closed(id);
        }
    }

    fn remove_recv(&mut self, id: StreamId) {
        if self.recv.remove(&id).is_some() {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn server(limits: StreamLimits) -> Streams {
        let mut streams = Streams::new(Side::Server, limits);
        streams.set_peer_limits(&TransportParameters {
            initial_max_data: 10_000,
            initial_max_stream_data_bidi_local: 4_000,
            initial_max_stream_data_bidi_remote: 4_000,
            initial_max_stream_data_uni: 4_000,
            initial_max_streams_bidi: 2,
            initial_max_streams_uni: 2,
            ..TransportParameters::default()
        });
        streams
    }

    fn small() -> StreamLimits {
        StreamLimits {
            max_bidi: 4,
            max_uni: 4,
            stream_window: 1000,
            max_stream_window: 1000,
            connection_window: 1500,
            max_connection_window: 1500,
            send_buffer: 6000,
        }
    }

    fn id(number: u64) -> StreamId {
        StreamId::from_wire(number)
    }

    fn data(number: u64, offset: u64, data: &[u8], fin: bool) -> frame::Stream<'_> {
        frame::Stream { id: id(number), offset, data, fin }
    }

    fn code<T: std::fmt::Debug>(result: Result<T, TransportError>) -> Code {
        result.unwrap_err().code
    }

    #[test]
    fn req_g01_opening_a_stream_opens_the_lower_ones() {
        let mut streams = server(small());
        streams.on_stream(&data(8, 0, b"x", false)).unwrap();
        assert_eq!(streams.poll_event(), Some(StreamEvent::Opened(Dir::Bi)));
        let accepted: Vec<_> = std::iter::from_fn(|| streams.accept(Dir::Bi)).collect();
        assert_eq!(accepted, [id(0), id(4), id(8)]);
    }

    #[test]
    fn req_g06_limits_of_stream_and_connection_hold() {
        let mut streams = server(small());
        let too_much = [0; 1001];
        assert_eq!(
            code(streams.on_stream(&data(0, 0, &too_much, false))),
            Code::FLOW_CONTROL_ERROR
        );
        let mut streams = server(small());
        streams.on_stream(&data(0, 0, &too_much[..1000], false)).unwrap();
        streams.on_stream(&data(4, 0, &too_much[..500], false)).unwrap();
        assert_eq!(code(streams.on_stream(&data(8, 0, b"x", false))), Code::FLOW_CONTROL_ERROR);
        assert_eq!(
            code(streams.on_stream(&data(0, varint_max() - 1, b"x", false))),
            Code::FLOW_CONTROL_ERROR
        );
    }

    fn varint_max() -> u64 {
        varint::MAX
    }

    #[test]
    fn req_g08_the_final_size_is_final() {
        for second in [data(0, 0, b"longer than before", false), data(0, 0, b"lo", true)] {
            let mut streams = server(small());
            streams.on_stream(&data(0, 0, b"long", true)).unwrap();
            assert_eq!(code(streams.on_stream(&second)), Code::FINAL_SIZE_ERROR);
        }
        let mut streams = server(small());
        streams.on_stream(&data(0, 0, b"long", false)).unwrap();
        let reset = frame::ResetStream { id: id(0), code: 1, final_size: 3 };
        assert_eq!(code(streams.on_reset_stream(&reset)), Code::FINAL_SIZE_ERROR);
    }

    #[test]
    fn req_g08_a_reset_counts_its_final_size_and_gives_the_credit_back() {
        let mut streams = server(small());
        let reset = frame::ResetStream { id: id(0), code: 7, final_size: 900 };
        streams.on_reset_stream(&reset).unwrap();
        assert_eq!((streams.received, streams.consumed), (900, 900));
        assert!(streams.max_data_due);
        assert_eq!(streams.read(id(0), &mut [0; 9]), Err(ReadError::Reset(7)));
        assert_eq!(streams.read(id(0), &mut [0; 9]), Err(ReadError::Closed));
    }

    #[test]
    fn req_g09_streams_beyond_the_limit_are_errors_and_open_nothing() {
        let mut streams = server(small());
        for number in [4 * 4, 4 * 4 + 2, 1 << 61] {
            assert_eq!(
                code(streams.on_stream(&data(number, 0, b"", false))),
                Code::STREAM_LIMIT_ERROR
            );
        }
        assert!(streams.recv.is_empty());
    }

    #[test]
    fn req_g10_wrong_directions_and_streams_not_created_are_errors() {
        let state = Code::STREAM_STATE_ERROR;
        let mut streams = server(small());
        let ours = streams.open(Dir::Uni).unwrap();
        let theirs = StreamId::new(Side::Client, Dir::Uni, 0);
        let uncreated = StreamId::new(Side::Server, Dir::Bi, 0);
        let reset = |id| frame::ResetStream { id, code: 0, final_size: 0 };
        assert_eq!(code(streams.on_stream(&data(ours.to_wire(), 0, b"", false))), state);
        assert_eq!(code(streams.on_reset_stream(&reset(ours))), state);
        assert_eq!(code(streams.on_stream_data_blocked(ours)), state);
        assert_eq!(code(streams.on_stop_sending(theirs, 0)), state);
        assert_eq!(code(streams.on_max_stream_data(theirs, 0)), state);
        assert_eq!(code(streams.on_stream(&data(uncreated.to_wire(), 0, b"", false))), state);
        assert_eq!(code(streams.on_max_stream_data(uncreated, 0)), state);
        assert_eq!(code(streams.on_stop_sending(uncreated, 0)), state);
    }

    #[test]
    fn req_g05_stop_sending_is_answered_by_a_reset_with_its_code() {
        let mut streams = server(small());
        let stream = streams.open(Dir::Uni).unwrap();
        assert_eq!(streams.write(stream, &[0; 100]), Ok(100));
        let (mut out, mut sent) = (Vec::new(), Vec::new());
        streams.write_data(60, &mut out, &mut sent);
        streams.on_stop_sending(stream, 42).unwrap();
        assert_eq!(streams.poll_event(), Some(StreamEvent::Stopped(stream, 42)));
        assert_eq!(streams.write(stream, b"x"), Err(WriteError::Stopped(42)));
        let [SentFrame::Stream { range, .. }] = &sent[..] else { panic!("one frame") };
        let range = range.clone();
        assert_eq!(streams.written, range.end, "what was not sent does not count");
        out.clear();
        streams.write_control(Instant::now(), Duration::ZERO, 200, &mut out, &mut sent);
        let frames: Vec<_> = frame::Frames::new(&out).unwrap().map(Result::unwrap).collect();
        let expected = frame::ResetStream { id: stream, code: 42, final_size: range.end };
        assert_eq!(frames, [frame::Frame::ResetStream(expected)]);
        streams.on_reset_acked(stream);
        assert_eq!(streams.write(stream, b"x"), Err(WriteError::Closed));
    }

    #[test]
    fn req_g09_max_streams_grows_only_when_both_halves_are_done_and_read() {
        let mut streams = server(small());
        streams.on_stream(&data(0, 0, b"hi", true)).unwrap();
        let mut out = [0; 10];
        assert_eq!(streams.read(id(0), &mut out), Ok(Read::Data(2)));
        assert_eq!(streams.read(id(0), &mut out), Ok(Read::Finished));
        assert!(!streams.remote[0].limit_due, "the other half is open");
        streams.finish(id(0)).unwrap();
        let (mut octets, mut sent) = (Vec::new(), Vec::new());
        streams.write_data(1000, &mut octets, &mut sent);
        streams.on_stream_acked(id(0), 0..0, true);
        assert!(streams.remote[0].limit_due);
        octets.clear();
        streams.write_control(Instant::now(), Duration::ZERO, 1000, &mut octets, &mut sent);
        assert_eq!(streams.remote[0].announced, 5);
        // A late frame for the stream that is gone changes nothing.
        streams.on_stream(&data(0, 0, b"hi", true)).unwrap();
        assert!(streams.recv.is_empty());
    }

    /// Opens, answers and closes stream `number`, and says whether a limit was announced.
    fn request(streams: &mut Streams, number: u64) -> bool {
        let stream = StreamId::new(Side::Client, Dir::Bi, number);
        streams.on_stream(&data(stream.to_wire(), 0, b"?", true)).unwrap();
        while let Ok(Read::Data(_)) = streams.read(stream, &mut [0; 8]) {}
        streams.finish(stream).unwrap();
        let (mut out, mut sent) = (Vec::new(), Vec::new());
        streams.write_data(1000, &mut out, &mut sent);
        streams.on_stream_acked(stream, 0..0, true);
        out.clear();
        sent.clear();
        streams.write_control(Instant::now(), Duration::ZERO, 1000, &mut out, &mut sent);
        sent.contains(&SentFrame::MaxStreams(Dir::Bi))
    }

    #[test]
    fn req_g09_a_stream_per_request_costs_an_eighth_of_a_frame_and_never_runs_out() {
        let mut streams = server(StreamLimits { max_bidi: 64, ..small() });
        let frames = (0..1000).filter(|&number| request(&mut streams, number)).count();
        assert_eq!(frames, 1000 / 8);
        assert!(streams.remote[0].announced - streams.remote[0].opened >= 64 - 8);
        // With the last stream in use, every one that closes is news.
        let last = StreamId::new(Side::Client, Dir::Bi, streams.remote[0].announced - 1);
        streams.on_stream(&data(last.to_wire(), 0, b"?", false)).unwrap();
        assert!(request(&mut streams, 1000) && request(&mut streams, 1001));
    }

    #[test]
    fn req_g02_octets_that_come_again_differently_change_nothing() {
        let mut streams = server(small());
        streams.on_stream(&data(0, 0, b"first", false)).unwrap();
        streams.on_stream(&data(0, 0, b"other and more", false)).unwrap();
        let mut out = [0; 20];
        assert_eq!(streams.read(id(0), &mut out), Ok(Read::Data(14)));
        assert_eq!(out[..14], *b"first and more");
        streams.on_stream(&data(0, 5, b"late", false)).unwrap();
        assert_eq!(streams.read(id(0), &mut out), Ok(Read::Blocked));
    }

    /// Every event in every state of a sending half.
    #[test]
    fn req_g04_what_a_sending_half_does_in_each_of_its_states() {
        // Ready or Send, Data Sent, Reset Sent, Data Recvd, Reset Recvd; see section 3.1.
        for state in 0..5 {
            let fresh = || {
                let mut streams = server(small());
                let stream = streams.open(Dir::Uni).unwrap();
                streams.write(stream, b"abc").unwrap();
                let flush = |streams: &mut Streams| {
                    let (mut out, mut sent) = (Vec::new(), Vec::new());
                    streams.write_control(Instant::now(), Duration::ZERO, 500, &mut out, &mut sent);
                    streams.write_data(500, &mut out, &mut sent);
                };
                match state {
                    0 => {}
                    1 | 3 => streams.finish(stream).unwrap(),
                    _ => streams.reset(stream, 5).unwrap(),
                }
                flush(&mut streams);
                match state {
                    3 => streams.on_stream_acked(stream, 0..3, true),
                    4 => streams.on_reset_acked(stream),
                    _ => {}
                }
                (streams, stream)
            };
            let (mut streams, stream) = fresh();
            assert_eq!(streams.write(stream, b"x").is_ok(), state == 0, "{state}: write");
            let (mut streams, stream) = fresh();
            assert_eq!(streams.finish(stream).is_ok(), state == 0, "{state}: finish");
            let (mut streams, stream) = fresh();
            assert_eq!(streams.reset(stream, 6).is_ok(), state < 2, "{state}: reset");
            let (mut streams, stream) = fresh();
            streams.on_stop_sending(stream, 7).unwrap();
            let told = streams.poll_event() == Some(StreamEvent::Stopped(stream, 7));
            assert_eq!(told, state < 3, "{state}: STOP_SENDING");
            let (mut streams, stream) = fresh();
            streams.on_stream_lost(stream, 0..3, state == 1 || state == 3);
            assert_eq!(streams.has_output(), state < 2, "{state}: loss");
            let (mut streams, stream) = fresh();
            streams.on_max_stream_data(stream, 9_000).unwrap();
            assert_eq!(streams.send_state(stream).is_some(), state < 3, "{state}: MAX_STREAM_DATA");
        }
    }

    /// Every event in every state of a receiving half.
    #[test]
    fn req_g04_what_a_receiving_half_does_in_each_of_its_states() {
        // Recv, Size Known, Data Recvd, Reset Recvd, Data Read, Reset Read; see section 3.2.
        for state in 0..6 {
            let fresh = || {
                let mut streams = server(small());
                let reset = frame::ResetStream { id: id(2), code: 9, final_size: 3 };
                match state {
                    0 => streams.on_stream(&data(2, 1, b"bc", false)).unwrap(),
                    1 => streams.on_stream(&data(2, 1, b"bc", true)).unwrap(),
                    2 | 4 => streams.on_stream(&data(2, 0, b"abc", true)).unwrap(),
                    _ => streams.on_reset_stream(&reset).unwrap(),
                }
                if state >= 4 {
                    while let Ok(Read::Data(_)) = streams.read(id(2), &mut [0; 9]) {}
                }
                streams
            };
            let read = fresh().read(id(2), &mut [0; 9]);
            let expected = match state {
                0 | 1 => Ok(Read::Blocked),
                2 => Ok(Read::Data(3)),
                3 => Err(ReadError::Reset(9)),
                _ => Err(ReadError::Closed),
            };
            assert_eq!(read, expected, "{state}: read");
            let mut streams = fresh();
            assert_eq!(streams.stop(id(2), 4).is_ok(), state < 4, "{state}: stop");
            let mut streams = fresh();
            streams.on_stream(&data(2, 0, b"abc", true)).unwrap();
            let readable = streams.read(id(2), &mut [0; 9]);
            assert_eq!(readable == Ok(Read::Data(3)), state < 3, "{state}: the rest");
            let mut streams = fresh();
            let again = frame::ResetStream { id: id(2), code: 8, final_size: 3 };
            streams.on_reset_stream(&again).unwrap();
            let outcome = streams.read(id(2), &mut [0; 9]);
            let expected = match state {
                // The RFC leaves open what becomes of data that has arrived and was not read.
                0..=2 => Err(ReadError::Reset(8)),
                3 => Err(ReadError::Reset(9)),
                _ => Err(ReadError::Closed),
            };
            assert_eq!(outcome, expected, "{state}: RESET_STREAM");
        }
    }

    #[test]
    fn req_g11_blocked_frames_go_out_once_per_limit() {
        let mut streams = server(small());
        let stream = streams.open(Dir::Bi).unwrap();
        assert_eq!(streams.write(stream, &[0; 5000]), Ok(4000));
        let now = Instant::now();
        let (mut out, mut sent) = (Vec::new(), Vec::new());
        streams.write_control(now, Duration::ZERO, 1000, &mut out, &mut sent);
        assert_eq!(sent, [SentFrame::StreamDataBlocked(stream)]);
        assert_eq!(streams.write(stream, &[0; 1000]), Ok(0));
        streams.write_control(now, Duration::ZERO, 1000, &mut out, &mut sent);
        assert_eq!(sent.len(), 1);
        streams.on_max_stream_data(stream, 4500).unwrap();
        assert_eq!(streams.poll_event(), Some(StreamEvent::Writable(stream)));
        assert_eq!(streams.write(stream, &[0; 1000]), Ok(500));
    }

    #[test]
    fn req_g03_higher_priorities_go_first_and_equal_ones_in_turn() {
        let mut streams = server(small());
        let low = streams.open(Dir::Uni).unwrap();
        let high = streams.open(Dir::Uni).unwrap();
        let other = streams.open(Dir::Bi).unwrap();
        for stream in [low, high, other] {
            streams.write(stream, &[0; 300]).unwrap();
        }
        streams.set_priority(high, 5).unwrap();
        let mut order = vec![];
        while streams.has_output() {
            let (mut out, mut sent) = (Vec::new(), Vec::new());
            streams.write_data(150, &mut out, &mut sent);
            order.extend(sent.into_iter().map(|frame| match frame {
                SentFrame::Stream { id, .. } => id,
                other => panic!("{other:?}"),
            }));
        }
        assert_eq!(order[..3], [high, high, high]);
        assert!(order[3..].windows(2).any(|pair| pair[0] != pair[1]));
    }
}
