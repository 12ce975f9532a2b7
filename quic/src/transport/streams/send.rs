//! The sending half of one stream.
//!
//! ```text
//! Open ──finish──► Finishing ──everything acknowledged──► (gone)
//!   └─────reset──────┴──► Reset ──acknowledged──► (gone)
//! ```
//!
//! <https://www.rfc-editor.org/rfc/rfc9000.html#section-3.1>

use std::ops::Range;

use super::super::send_buffer::SendBuffer;

/// A sending half that is not done yet.
#[derive(Debug)]
pub(super) struct SendStream {
    pub(super) buffer: SendBuffer,
    state: State,
    /// The peer's MAX_STREAM_DATA.
    pub(super) limit: u64,
    pub(super) priority: i32,
    /// Whether the stream stands in the queue of those with output.
    pub(super) queued: bool,
    /// The peer's STOP_SENDING.
    stopped: Option<u64>,
    /// The application waits for room.
    pub(super) waiting: bool,
    /// STREAM_DATA_BLOCKED is due; and the limit it was last sent for.
    pub(super) blocked_due: bool,
    blocked_at: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    /// `due`: the FIN has to be sent, or again. `acked`: the peer has it.
    Finishing {
        due: bool,
        acked: bool,
    },
    Reset {
        code: u64,
        final_size: u64,
        due: bool,
    },
}

/// What a poll gives out.
#[derive(Debug)]
pub(super) struct Chunk {
    pub(super) range: Range<u64>,
    pub(super) fin: bool,
}

impl SendStream {
    pub(super) fn new(limit: u64) -> Self {
        Self {
            buffer: SendBuffer::default(),
            state: State::Open,
            limit,
            priority: 0,
            queued: false,
            stopped: None,
            waiting: false,
            blocked_due: false,
            blocked_at: None,
        }
    }

    /// A new stream in the memory of one that is gone.
    pub(super) fn again(mut self: Box<Self>, limit: u64) -> Box<Self> {
        let buffer = std::mem::take(&mut self.buffer);
        *self = Self { buffer, ..Self::new(limit) };
        self
    }

    pub(super) const fn is_open(&self) -> bool {
        matches!(self.state, State::Open)
    }

    pub(super) const fn stopped(&self) -> Option<u64> {
        self.stopped
    }

    /// Octets the peer would still take.
    pub(super) fn credit(&self) -> u64 {
        self.limit.saturating_sub(self.buffer.end())
    }

    /// Takes MAX_STREAM_DATA; returns whether the limit grew.
    pub(super) fn set_limit(&mut self, limit: u64) -> bool {
        let grew = limit > self.limit;
        self.limit = self.limit.max(limit);
        grew
    }

    /// Notes that the application ran into the limit. A frame says so once per limit.
    pub(super) fn on_blocked(&mut self) -> bool {
        if self.blocked_at == Some(self.limit) {
            return false;
        }
        self.blocked_at = Some(self.limit);
        self.blocked_due = true;
        true
    }

    /// Marks the end. Returns whether this changed anything.
    pub(super) fn finish(&mut self) -> bool {
        let open = self.is_open();
        if open {
            self.state = State::Finishing { due: true, acked: false };
        }
        open
    }

    /// Abandons what is not delivered yet. Returns whether this changed anything.
    pub(super) fn reset(&mut self, code: u64) -> bool {
        if matches!(self.state, State::Reset { .. }) {
            return false;
        }
        let final_size = self.buffer.unsent();
        self.state = State::Reset { code, final_size, due: true };
        self.buffer.clear();
        true
    }

    /// Takes STOP_SENDING. Returns whether it is news.
    pub(super) fn stop(&mut self, code: u64) -> bool {
        let news = self.stopped.is_none();
        self.stopped.get_or_insert(code);
        news
    }

    /// The RESET_STREAM frame to send, as code and final size.
    pub(super) fn poll_reset(&mut self) -> Option<(u64, u64)> {
        match &mut self.state {
            State::Reset { code, final_size, due: due @ true } => {
                *due = false;
                Some((*code, *final_size))
            }
            _ => None,
        }
    }

    /// Where the next piece begins.
    pub(super) fn next_offset(&self) -> u64 {
        self.buffer.next_offset()
    }

    /// The next piece of at most `max` octets.
    pub(super) fn poll(&mut self, max: usize) -> Option<Chunk> {
        let end = self.buffer.end();
        match &mut self.state {
            State::Reset { .. } => None,
            State::Open => self.buffer.poll(max, u64::MAX).map(|range| Chunk { range, fin: false }),
            State::Finishing { due, .. } => {
                let range = match self.buffer.poll(max, u64::MAX) {
                    Some(range) => range,
                    None if *due && !self.buffer.has_output(u64::MAX) => end..end,
                    None => return None,
                };
                let fin = range.end == end;
                *due &= !fin;
                Some(Chunk { range, fin })
            }
        }
    }

    /// Whether [`Self::poll`] would give something.
    pub(super) fn has_output(&self) -> bool {
        match self.state {
            State::Reset { .. } => false,
            State::Open => self.buffer.has_output(u64::MAX),
            State::Finishing { due, .. } => due || self.buffer.has_output(u64::MAX),
        }
    }

    pub(super) fn on_acked(&mut self, range: Range<u64>, with_fin: bool) {
        self.buffer.on_acked(range);
        if let State::Finishing { due, acked } = &mut self.state
            && with_fin
        {
            (*due, *acked) = (false, true);
        }
    }

    pub(super) fn on_lost(&mut self, range: Range<u64>, with_fin: bool) {
        if matches!(self.state, State::Reset { .. }) {
            return;
        }
        self.buffer.on_lost(range);
        if let State::Finishing { due, acked: false } = &mut self.state
            && with_fin
        {
            *due = true;
        }
    }

    pub(super) fn on_reset_lost(&mut self) {
        if let State::Reset { due, .. } = &mut self.state {
            *due = true;
        }
    }

    /// Whether the peer has to be told something, or again: that it ends, or how.
    pub(super) const fn is_ending(&self) -> bool {
        !matches!(self.state, State::Open)
    }

    /// Whether the peer has everything.
    pub(super) fn is_finished(&self) -> bool {
        matches!(self.state, State::Finishing { acked: true, .. }) && self.buffer.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where a stream of ten octets may be, all of them sent.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Is {
        Open,
        /// The FIN is still to be sent, or again.
        FinDue,
        FinSent,
        /// The FIN has arrived before the data.
        FinAcked,
        /// Everything has arrived: the stream is gone.
        Done,
        ResetDue,
        ResetSent,
    }

    const STATES: [Is; 6] =
        [Is::Open, Is::FinDue, Is::FinSent, Is::FinAcked, Is::ResetDue, Is::ResetSent];

    #[derive(Clone, Copy, Debug)]
    enum Happens {
        Finish,
        Reset,
        StopSending,
        MaxStreamData,
        Poll,
        PollReset,
        DataAcked,
        FinAcked,
        DataLost,
        FinLost,
        ResetLost,
    }

    const EVENTS: [Happens; 11] = [
        Happens::Finish,
        Happens::Reset,
        Happens::StopSending,
        Happens::MaxStreamData,
        Happens::Poll,
        Happens::PollReset,
        Happens::DataAcked,
        Happens::FinAcked,
        Happens::DataLost,
        Happens::FinLost,
        Happens::ResetLost,
    ];

    /// Where it leads.
    fn next(is: Is, happens: Happens) -> Is {
        match (is, happens) {
            (Is::Open, Happens::Finish) => Is::FinDue,
            (Is::Open | Is::FinDue | Is::FinSent | Is::FinAcked, Happens::Reset) => Is::ResetDue,
            (Is::FinDue, Happens::Poll) => Is::FinSent,
            // It may be due once more, and arrive from the first time.
            (Is::FinDue | Is::FinSent, Happens::FinAcked) => Is::FinAcked,
            (Is::FinSent, Happens::FinLost) => Is::FinDue,
            (Is::FinAcked, Happens::DataAcked) => Is::Done,
            (Is::ResetDue, Happens::PollReset) => Is::ResetSent,
            (Is::ResetSent, Happens::ResetLost) => Is::ResetDue,
            _ => is,
        }
    }

    fn stream(is: Is) -> SendStream {
        let mut stream = SendStream::new(100);
        stream.buffer.write(b"0123456789");
        assert_eq!(stream.poll(100).unwrap().range, 0..10);
        match is {
            Is::Open => {}
            Is::FinDue => assert!(stream.finish()),
            Is::FinSent | Is::FinAcked | Is::Done => {
                assert!(stream.finish());
                let chunk = stream.poll(100).unwrap();
                assert!(chunk.fin && chunk.range == (10..10));
                if is != Is::FinSent {
                    stream.on_acked(10..10, true);
                }
                if is == Is::Done {
                    stream.on_acked(0..10, false);
                }
            }
            Is::ResetDue => assert!(stream.reset(7)),
            Is::ResetSent => {
                assert!(stream.reset(7));
                assert_eq!(stream.poll_reset(), Some((7, 10)));
            }
        }
        stream
    }

    fn state(stream: &SendStream) -> Is {
        match stream.state {
            State::Open => Is::Open,
            State::Finishing { due: true, acked: false } => Is::FinDue,
            State::Finishing { due: false, acked: false } => Is::FinSent,
            State::Finishing { due: false, acked: true } if stream.is_finished() => Is::Done,
            State::Finishing { due: false, acked: true } => Is::FinAcked,
            State::Finishing { due: true, acked: true } => panic!("due, and there already"),
            State::Reset { due: true, .. } => Is::ResetDue,
            State::Reset { due: false, .. } => Is::ResetSent,
        }
    }

    #[test]
    fn every_event_in_every_state_leads_where_it_should() {
        for is in STATES {
            for happens in EVENTS {
                let mut stream = stream(is);
                assert_eq!(state(&stream), is);
                let expected = next(is, happens);
                let reset = matches!(is, Is::ResetDue | Is::ResetSent);
                match happens {
                    Happens::Finish => assert_eq!(stream.finish(), is == Is::Open, "{is:?}"),
                    Happens::Reset => assert_eq!(stream.reset(7), !reset, "{is:?}"),
                    Happens::StopSending => {
                        assert!(stream.stop(9) && !stream.stop(8), "{is:?}");
                        assert_eq!(stream.stopped(), Some(9));
                    }
                    Happens::MaxStreamData => {
                        assert!(!stream.set_limit(100) && stream.set_limit(101), "{is:?}");
                    }
                    Happens::Poll => {
                        let chunk = stream.poll(100).map(|chunk| (chunk.range, chunk.fin));
                        assert_eq!(chunk, (is == Is::FinDue).then_some((10..10, true)), "{is:?}");
                    }
                    Happens::PollReset => {
                        let frame = stream.poll_reset();
                        assert_eq!(frame, (is == Is::ResetDue).then_some((7, 10)), "{is:?}");
                    }
                    Happens::DataAcked => stream.on_acked(0..10, false),
                    Happens::FinAcked => stream.on_acked(10..10, true),
                    Happens::DataLost => {
                        stream.on_lost(0..10, false);
                        assert_eq!(stream.has_output(), !reset, "{is:?}: it is sent again");
                    }
                    Happens::FinLost => stream.on_lost(10..10, true),
                    Happens::ResetLost => stream.on_reset_lost(),
                }
                assert_eq!(state(&stream), expected, "{is:?}, {happens:?}");
            }
        }
    }

    #[test]
    fn only_what_waits_to_leave_is_output() {
        for is in [Is::Done, Is::ResetDue, Is::ResetSent].into_iter().chain(STATES) {
            let mut stream = stream(is);
            let output = stream.has_output();
            assert_eq!(output, is == Is::FinDue, "{is:?}");
            assert_eq!(stream.poll(100).is_some(), output, "{is:?}");
        }
    }
}
