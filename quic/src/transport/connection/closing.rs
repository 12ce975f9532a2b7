//! The end of a connection: closing, where what arrives is answered by CONNECTION_CLOSE less and
//! less often; draining, where nothing is sent; and gone.
//!
//! <https://www.rfc-editor.org/rfc/rfc9000.html#section-10.2>

use std::time::Instant;

use bytes::Bytes;

use super::{Connection, Event};
use crate::transport::{
    error::{Code, ConnectionError, PeerClose, TransportError},
    frame,
    record::Record,
    space::Space,
};

/// A connection's life, as far as its end goes.
#[derive(Debug)]
pub(super) enum State {
    Open,
    Closing(Closing),
    Draining { until: Instant, error: ConnectionError },
    Gone(ConnectionError),
}

/// Only what is needed to repeat the close.
#[derive(Debug)]
pub(super) struct Closing {
    close: OwnedClose,
    error: ConnectionError,
    until: Instant,
    /// The close is to be sent.
    due: bool,
    /// Datagrams received since, and after how many the next close goes out: twice as many each
    /// time.
    received: u64,
    answer_at: u64,
}

#[derive(Clone, Debug)]
enum OwnedClose {
    Transport(TransportError),
    Application { code: u64, reason: Bytes },
}

impl State {
    pub(super) const fn error(&self) -> Option<&ConnectionError> {
        match self {
            Self::Open => None,
            Self::Closing(closing) => Some(&closing.error),
            Self::Draining { error, .. } | Self::Gone(error) => Some(error),
        }
    }

    /// When the closing or draining period is over.
    pub(super) const fn deadline(&self) -> Option<Instant> {
        match self {
            Self::Closing(Closing { until, .. }) | Self::Draining { until, .. } => Some(*until),
            Self::Open | Self::Gone(_) => None,
        }
    }

    pub(super) fn handle_deadline(&mut self, now: Instant) {
        if let Self::Closing(Closing { until, error, .. }) | Self::Draining { until, error } = self
            && *until <= now
        {
            *self = Self::Gone(error.clone());
        }
    }
}

impl Connection {
    /// Closes with a code and words of the application. What was written and not delivered is
    /// lost.
    pub fn close(&mut self, now: Instant, code: u64, reason: Bytes) {
        let close = OwnedClose::Application { code, reason };
        self.start_closing(now, close, ConnectionError::ClosedLocally);
    }

    /// Closes like [`Self::close`] once the peer has everything that was written, at once if it has. What
    /// is written meanwhile is delivered too; a peer that does not take it keeps the connection open.
    pub fn close_when_delivered(&mut self, now: Instant, code: u64, reason: Bytes) {
        self.last_words = Some((code, reason));
        self.close_if_delivered(now);
    }

    /// Closes if that is all that is left to do.
    pub(super) fn close_if_delivered(&mut self, now: Instant) {
        if self.last_words.is_some()
            && self.streams.is_delivered()
            && let Some((code, reason)) = self.last_words.take()
        {
            self.close(now, code, reason);
        }
    }

    /// Whether nothing is left to do: the endpoint may forget it.
    pub(crate) const fn is_gone(&self) -> bool {
        matches!(self.state, State::Gone(_))
    }

    /// The peer broke a rule.
    pub(super) fn close_for(&mut self, now: Instant, error: TransportError) {
        let close = OwnedClose::Transport(error.clone());
        self.start_closing(now, close, ConnectionError::Peer(error));
    }

    /// Our side of the handshake failed.
    pub(super) fn close_for_tls(&mut self, now: Instant, error: ConnectionError) {
        let code = match &error {
            ConnectionError::Tls { code, .. } => *code,
            ConnectionError::Peer(transport) => transport.code,
            _ => Code::INTERNAL_ERROR,
        };
        let close = match &error {
            ConnectionError::Peer(transport) => transport.clone(),
            _ => TransportError::new(code, "the TLS handshake failed"),
        };
        self.start_closing(now, OwnedClose::Transport(close), error);
    }

    /// The handshake has taken too long. A peer that was heard is told.
    pub(super) fn give_up_handshake(&mut self, now: Instant) {
        let answered = self.handshake.any_processed;
        let error = ConnectionError::HandshakeTimeout { answered };
        if !answered {
            return self.vanish(now, error);
        }
        let close = TransportError::new(Code::NO_ERROR, "the handshake took too long");
        self.start_closing(now, OwnedClose::Transport(close), error);
    }

    fn start_closing(&mut self, now: Instant, close: OwnedClose, error: ConnectionError) {
        if self.is_over() {
            return;
        }
        // "The closing and draining connection states [...] SHOULD persist for at least three
        // times the current PTO interval" https://www.rfc-editor.org/rfc/rfc9000.html#section-10.2
        let until = now + 3 * self.pto(Space::Data);
        self.tell_closed(now, &error);
        self.state =
            State::Closing(Closing { close, error, until, due: true, received: 0, answer_at: 1 });
    }

    /// The peer has closed.
    pub(super) fn on_peer_close(&mut self, now: Instant, close: &frame::Close<'_>) {
        let close = match *close {
            frame::Close::Transport { code, frame_type, reason } => {
                PeerClose::Transport { code, frame_type, reason: Bytes::copy_from_slice(reason) }
            }
            frame::Close::Application { code, reason } => {
                PeerClose::Application { code, reason: Bytes::copy_from_slice(reason) }
            }
        };
        self.drain(now, ConnectionError::PeerClosed(close));
    }

    /// Falls silent until the peer has certainly noticed.
    pub(super) fn drain(&mut self, now: Instant, error: ConnectionError) {
        let until = now + 3 * self.pto(Space::Data);
        match &self.state {
            State::Open => {
                self.tell_closed(now, &error);
                self.state = State::Draining { until, error };
            }
            State::Closing(closing) => {
                self.state = State::Draining { until: closing.until, error: closing.error.clone() };
            }
            State::Draining { .. } | State::Gone(_) => {}
        }
    }

    /// Ends at once, without a word to the peer.
    pub(super) fn vanish(&mut self, now: Instant, error: ConnectionError) {
        if !self.is_over() {
            self.tell_closed(now, &error);
        }
        self.state = State::Gone(error);
    }

    fn tell_closed(&mut self, now: Instant, error: &ConnectionError) {
        self.events.push_back(Event::Closed(error.clone()));
        self.journal.note(now, Record::Closed(error));
    }

    /// A datagram came while closing: the close goes out again, after the first, second, fourth,
    /// eighth, …
    pub(super) fn answer_while_closing(&mut self) {
        if let State::Closing(closing) = &mut self.state {
            closing.received += 1;
            if closing.received >= closing.answer_at {
                closing.answer_at *= 2;
                closing.due = true;
            }
        }
    }

    pub(super) fn close_is_due(&self) -> bool {
        matches!(&self.state, State::Closing(closing) if closing.due)
    }

    pub(super) fn on_close_sent(&mut self) {
        if let State::Closing(closing) = &mut self.state {
            closing.due = false;
        }
    }

    /// Appends the CONNECTION_CLOSE frame for a packet of `space`.
    pub(super) fn write_close(&self, space: Space, room: usize, out: &mut Vec<u8>) {
        let State::Closing(closing) = &self.state else { return };
        let frame = match (&closing.close, space) {
            (OwnedClose::Transport(error), _) => frame::Close::Transport {
                code: error.code,
                frame_type: error.frame_type,
                reason: error.reason.as_bytes(),
            },
            (OwnedClose::Application { code, reason }, Space::Data) => {
                frame::Close::Application { code: *code, reason }
            }
            // "Sending a CONNECTION_CLOSE of type 0x1d in an Initial or Handshake packet could
            // expose application state [...] A CONNECTION_CLOSE of type 0x1d MUST be replaced by a
            // CONNECTION_CLOSE of type 0x1c when sending the frame in Initial or Handshake
            // packets." https://www.rfc-editor.org/rfc/rfc9000.html#section-10.2.3
            (OwnedClose::Application { .. }, _) => frame::Close::Transport {
                code: Code::APPLICATION_ERROR,
                frame_type: 0,
                reason: &[],
            },
        };
        frame::write_close(&frame, room, out);
    }
}
