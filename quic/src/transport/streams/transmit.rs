//! Frames of streams: which are due, and what became of those that were sent.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use super::{StreamEvent, Streams};
use crate::{
    transport::{
        frame,
        recovery::SentFrame,
        stream_id::{Dir, StreamId},
    },
    varint,
};

impl Streams {
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
}
