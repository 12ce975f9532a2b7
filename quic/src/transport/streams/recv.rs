//! The receiving half of one stream.
//!
//! ```text
//! Open ──final size──► Open with final size ──all read──► (gone)
//!   └──RESET_STREAM──────┴──► Reset ──told to the application──► (gone)
//! ```
//!
//! <https://www.rfc-editor.org/rfc/rfc9000.html#section-3.2>

use super::{
    super::{
        assembler::Assembler,
        error::{Code, TransportError},
    },
    window::Window,
};

/// A receiving half that is not done yet.
#[derive(Debug)]
pub(super) struct RecvStream {
    assembler: Assembler,
    pub(super) window: Window,
    /// The end of the highest octet received; what counts for flow control.
    highest: u64,
    final_size: Option<u64>,
    reset: Option<u64>,
    /// The application wants no more; the code to tell the peer.
    stopped: Option<u64>,
    pub(super) stop_due: bool,
    /// The application was told that there is something to read.
    pub(super) notified: bool,
}

/// What a read gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// So many octets, at least one.
    Data(usize),
    /// Nothing now.
    Blocked,
    /// The peer has finished the stream, and everything was read.
    Finished,
}

/// Octets by which connection-level counters move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    /// Newly counted against the limit.
    pub(super) received: u64,
    /// Given back, without having been read.
    pub(super) discarded: u64,
}

impl RecvStream {
    pub(super) fn new(window: Window) -> Self {
        Self {
            assembler: Assembler::default(),
            window,
            highest: 0,
            final_size: None,
            reset: None,
            stopped: None,
            stop_due: false,
            notified: false,
        }
    }

    /// A new stream in the memory of one that is gone.
    pub(super) fn again(mut self: Box<Self>, window: Window) -> Box<Self> {
        let assembler = std::mem::take(&mut self.assembler);
        *self = Self { assembler, ..Self::new(window) };
        self
    }

    /// Forgets what was received, and keeps a little memory for a stream to come.
    pub(super) fn empty(&mut self) {
        self.assembler.empty();
    }

    /// Takes the data of a STREAM frame; `credit` is what the connection's limit still allows.
    pub(super) fn on_data(
        &mut self,
        offset: u64,
        data: &[u8],
        fin: bool,
        credit: u64,
    ) -> Result<Progress, TransportError> {
        let end = offset + data.len() as u64;
        let received = self.count(end, fin.then_some(end), credit)?;
        if self.reset.is_some() {
            return Ok(Progress { received, discarded: received });
        }
        if self.stopped.is_some() {
            return Ok(Progress { received, discarded: received });
        }
        self.assembler.insert(offset, data);
        Ok(Progress { received, discarded: 0 })
    }

    /// Takes RESET_STREAM.
    pub(super) fn on_reset(
        &mut self,
        code: u64,
        final_size: u64,
        credit: u64,
    ) -> Result<Progress, TransportError> {
        // An empty stream that is reset is not one that ended.
        let complete = self.is_complete();
        let received = self.count(final_size, Some(final_size), credit)?;
        if self.reset.is_some() || complete {
            return Ok(Progress { received, discarded: received });
        }
        self.reset = Some(code);
        let discarded = if self.stopped.is_some() { received } else { self.unread() };
        self.assembler = Assembler::default();
        Ok(Progress { received, discarded })
    }

    /// Holds the limits and the final size against octets up to `end`.
    fn count(
        &mut self,
        end: u64,
        final_size: Option<u64>,
        credit: u64,
    ) -> Result<u64, TransportError> {
        let contradiction = match (self.final_size, final_size) {
            (Some(known), Some(new)) => known != new,
            (Some(known), None) => end > known,
            (None, Some(new)) => new < self.highest,
            (None, None) => false,
        };
        if contradiction {
            return Err(TransportError::new(
                Code::FINAL_SIZE_ERROR,
                "data beyond the final size, or another final size",
            ));
        }
        let received = end.saturating_sub(self.highest);
        if end > self.window.limit() || received > credit {
            return Err(TransportError::new(
                Code::FLOW_CONTROL_ERROR,
                "more data than the limits allow",
            ));
        }
        self.highest += received;
        self.final_size = self.final_size.or(final_size);
        Ok(received)
    }

    /// Reads; returns what the application gets and how many octets left the buffer.
    pub(super) fn read(&mut self, out: &mut [u8]) -> Result<Read, u64> {
        self.notified = false;
        if let Some(code) = self.reset {
            return Err(code);
        }
        match self.assembler.read(out) {
            0 if self.is_complete() => Ok(Read::Finished),
            0 => Ok(Read::Blocked),
            count => Ok(Read::Data(count)),
        }
    }

    /// Wants no more. Returns the octets that nobody will read.
    pub(super) fn stop(&mut self, code: u64) -> u64 {
        if self.stopped.is_some() {
            return 0;
        }
        self.stopped = Some(code);
        let discarded = if self.reset.is_some() { 0 } else { self.unread() };
        self.stop_due = self.reset.is_none() && self.final_size.is_none();
        self.assembler = Assembler::default();
        discarded
    }

    /// The STOP_SENDING frame to send.
    pub(super) fn poll_stop(&mut self) -> Option<u64> {
        let due = std::mem::take(&mut self.stop_due) && self.final_size.is_none();
        self.stopped.filter(|_| due)
    }

    pub(super) fn on_stop_lost(&mut self) {
        self.stop_due = self.stopped.is_some() && self.final_size.is_none();
    }

    /// Whether the application should look: data, the end, or a reset.
    pub(super) fn is_readable(&self) -> bool {
        self.reset.is_some() || self.assembler.is_readable() || self.is_complete()
    }

    /// Whether nobody has any further business with it.
    pub(super) const fn is_discarded(&self) -> bool {
        self.stopped.is_some() && (self.final_size.is_some() || self.reset.is_some())
    }

    /// Whether the peer can still use a larger limit.
    pub(super) const fn wants_credit(&self) -> bool {
        self.final_size.is_none() && self.stopped.is_none()
    }

    pub(super) const fn consumed(&self) -> u64 {
        self.assembler.read_offset()
    }

    /// Gives spare memory back.
    pub(super) fn shrink(&mut self) {
        self.assembler.shrink();
    }

    fn is_complete(&self) -> bool {
        self.final_size == Some(self.assembler.read_offset()) && self.stopped.is_none()
    }

    const fn unread(&self) -> u64 {
        self.highest - self.assembler.read_offset()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where a stream may be of which the first half has come, and perhaps more; ten octets in all.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Is {
        /// Its end is not known.
        Open,
        /// Its end is known, and something before it is missing.
        SizeKnown,
        AllReceived,
        AllRead,
        Reset,
        /// The application wants no more of it, and its end is not known.
        Stopped,
        /// The application wants no more, and nothing more can come: it is gone.
        Discarded,
        /// The same, by a reset.
        DiscardedByReset,
    }

    const STATES: [Is; 8] = [
        Is::Open,
        Is::SizeKnown,
        Is::AllReceived,
        Is::AllRead,
        Is::Reset,
        Is::Stopped,
        Is::Discarded,
        Is::DiscardedByReset,
    ];

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Happens {
        /// What is missing before the end of [`Is::SizeKnown`].
        Gap,
        Rest,
        Beyond,
        BeyondTheWindow,
        ResetStream,
        Read,
        Stop,
        StopLost,
    }

    const EVENTS: [Happens; 8] = [
        Happens::Gap,
        Happens::Rest,
        Happens::Beyond,
        Happens::BeyondTheWindow,
        Happens::ResetStream,
        Happens::Read,
        Happens::Stop,
        Happens::StopLost,
    ];

    /// Where it leads; `Err` for what a peer may not do.
    fn next(is: Is, happens: Happens) -> Result<Is, Code> {
        let ends = !matches!(is, Is::Open | Is::Stopped);
        Ok(match (is, happens) {
            (_, Happens::Beyond | Happens::BeyondTheWindow) if ends => {
                return Err(Code::FINAL_SIZE_ERROR);
            }
            (_, Happens::BeyondTheWindow) => return Err(Code::FLOW_CONTROL_ERROR),
            (Is::SizeKnown, Happens::Gap) => Is::AllReceived,
            (Is::Open | Is::SizeKnown, Happens::Rest) => Is::AllReceived,
            (Is::Stopped, Happens::Rest) => Is::Discarded,
            (Is::Open | Is::SizeKnown | Is::AllReceived, Happens::ResetStream) => Is::Reset,
            (Is::Stopped, Happens::ResetStream) => Is::DiscardedByReset,
            (Is::Discarded, Happens::ResetStream) => Is::DiscardedByReset,
            (Is::AllReceived, Happens::Read) => Is::AllRead,
            (Is::Open, Happens::Stop) => Is::Stopped,
            (Is::SizeKnown | Is::AllReceived | Is::AllRead, Happens::Stop) => Is::Discarded,
            (Is::Reset, Happens::Stop) => Is::DiscardedByReset,
            _ => is,
        })
    }

    const CREDIT: u64 = 1000;

    fn stream(is: Is) -> RecvStream {
        let mut stream = RecvStream::new(Window::new(100, 100));
        let first = stream.on_data(0, b"01234", false, CREDIT);
        assert_eq!(first, Ok(Progress { received: 5, discarded: 0 }));
        match is {
            Is::Open => {}
            Is::SizeKnown => {
                stream.on_data(8, b"89", true, CREDIT).unwrap();
            }
            Is::AllReceived | Is::AllRead => {
                stream.on_data(5, b"56789", true, CREDIT).unwrap();
                if is == Is::AllRead {
                    assert_eq!(stream.read(&mut [0; 100]), Ok(Read::Data(10)));
                }
            }
            Is::Reset => {
                let reset = stream.on_reset(7, 10, CREDIT);
                assert_eq!(reset, Ok(Progress { received: 5, discarded: 10 }));
            }
            Is::Stopped => assert_eq!(stream.stop(9), 5),
            Is::Discarded => {
                assert_eq!(stream.stop(9), 5);
                let rest = stream.on_data(5, b"56789", true, CREDIT);
                assert_eq!(rest, Ok(Progress { received: 5, discarded: 5 }));
            }
            Is::DiscardedByReset => {
                assert_eq!(stream.stop(9), 5);
                let reset = stream.on_reset(7, 10, CREDIT);
                assert_eq!(reset, Ok(Progress { received: 5, discarded: 5 }));
            }
        }
        stream
    }

    fn state(stream: &RecvStream) -> Is {
        match (stream.stopped, stream.reset, stream.final_size) {
            (None, None, None) => Is::Open,
            (None, None, Some(end)) if stream.assembler.read_offset() == end => Is::AllRead,
            (None, None, Some(end)) => {
                // Whatever can be read without a gap.
                let left = usize::try_from(end - stream.assembler.read_offset()).unwrap();
                match stream.assembler.peek().len() == left {
                    true => Is::AllReceived,
                    false => Is::SizeKnown,
                }
            }
            (None, Some(_), _) => Is::Reset,
            (Some(_), None, None) => Is::Stopped,
            (Some(_), None, Some(_)) => Is::Discarded,
            (Some(_), Some(_), _) => Is::DiscardedByReset,
        }
    }

    #[test]
    fn every_event_in_every_state_leads_where_it_should() {
        for is in STATES {
            for happens in EVENTS {
                let mut stream = stream(is);
                assert_eq!(state(&stream), is);
                let unread = stream.highest - stream.assembler.read_offset();
                let result = match happens {
                    Happens::Gap => stream.on_data(5, b"567", false, CREDIT).map(drop),
                    Happens::Rest => stream.on_data(5, b"56789", true, CREDIT).map(drop),
                    Happens::Beyond => stream.on_data(9, b"9ab", false, CREDIT).map(drop),
                    Happens::BeyondTheWindow => stream.on_data(100, b"x", false, CREDIT).map(drop),
                    Happens::ResetStream => stream.on_reset(7, 10, CREDIT).map(drop),
                    Happens::Read => {
                        let expected = match is {
                            Is::Open | Is::SizeKnown => Ok(Read::Data(5)),
                            Is::AllReceived => Ok(Read::Data(10)),
                            Is::AllRead => Ok(Read::Finished),
                            Is::Reset | Is::DiscardedByReset => Err(7),
                            Is::Stopped | Is::Discarded => Ok(Read::Blocked),
                        };
                        assert_eq!(stream.read(&mut [0; 100]), expected, "{is:?}");
                        Ok(())
                    }
                    Happens::Stop => {
                        // What is not read yet and was not given back before.
                        let discarded = match is {
                            Is::Open | Is::SizeKnown | Is::AllReceived => unread,
                            _ => 0,
                        };
                        assert_eq!(stream.stop(8), discarded, "{is:?}");
                        let frame = match is {
                            Is::Open => Some(8),
                            Is::Stopped => Some(9),
                            _ => None,
                        };
                        assert_eq!(stream.poll_stop(), frame, "{is:?}");
                        assert_eq!(stream.poll_stop(), None, "{is:?}: once");
                        Ok(())
                    }
                    Happens::StopLost => {
                        stream.on_stop_lost();
                        let frame = (is == Is::Stopped).then_some(9);
                        assert_eq!(stream.poll_stop(), frame, "{is:?}");
                        Ok(())
                    }
                };
                let expected = next(is, happens);
                let found = result.map(|()| state(&stream)).map_err(|error| error.code);
                assert_eq!(found, expected, "{is:?}, {happens:?}");
                let gone = matches!(expected, Ok(Is::Discarded | Is::DiscardedByReset));
                assert_eq!(stream.is_discarded() && expected.is_ok(), gone, "{is:?}, {happens:?}");
            }
        }
    }
}
