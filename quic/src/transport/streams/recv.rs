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
