//! How many streams there may be, and how much of them may be on its way.

use crate::transport::parameters::TransportParameters;

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
    /// Octets that writes may buffer until they are acknowledged, at first. Two congestion windows, if
    /// they are more.
    pub send_buffer: usize,
    /// The most that is.
    pub max_send_buffer: usize,
}

impl Default for StreamLimits {
    fn default() -> Self {
        Self {
            // Enough for a browser's requests in parallel.
            max_bidi: 100,
            max_uni: 100,
            // A first window for short exchanges; those that need more get more.
            stream_window: 256 * 1024,
            // A half of it can be on its way at any time: 100 ms of more than a gigabit.
            max_stream_window: 32 * 1024 * 1024,
            connection_window: 512 * 1024,
            max_connection_window: 32 * 1024 * 1024,
            send_buffer: 1024 * 1024,
            max_send_buffer: 32 * 1024 * 1024,
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

#[derive(Debug, Default)]
pub(super) struct LocalStreams {
    pub(super) opened: u64,
    pub(super) limit: u64,
    pub(super) blocked_due: bool,
    pub(super) blocked_at: Option<u64>,
    pub(super) waiting: bool,
}

#[derive(Debug, Default)]
pub(super) struct RemoteStreams {
    pub(super) opened: u64,
    pub(super) accepted: u64,
    pub(super) closed: u64,
    pub(super) concurrent: u64,
    pub(super) announced: u64,
    pub(super) limit_due: bool,
}

impl RemoteStreams {
    pub(super) fn new(concurrent: u64) -> Self {
        Self { concurrent, announced: concurrent, ..Self::default() }
    }

    /// Has the limit announced when that is worth a frame. Telling one by one would cost a frame
    /// per stream; a peer that is about to run out of streams is told of each one.
    pub(super) fn consider(&mut self) {
        let news = self.closed + self.concurrent - self.announced;
        let left = self.announced - self.opened;
        self.limit_due |= news > 0 && news >= (self.concurrent / 8).min(left / 2);
    }
}
