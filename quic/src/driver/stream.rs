//! The two halves of a stream, as tokio's `AsyncRead` and `AsyncWrite`.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::state::Shareholder;
use crate::transport::{ConnectionError, Read, ReadError, StreamId, WriteError};

/// Why a stream cannot go on.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum StreamError {
    /// The connection is over.
    #[error("the connection is over: {0}")]
    Connection(ConnectionError),
    /// The peer wants no more, or the stream is closed.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The peer has abandoned the stream, or it is closed.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// More came than the caller wanted.
    #[error("the stream is longer than {0} octets")]
    TooLong(usize),
}

impl From<StreamError> for io::Error {
    fn from(error: StreamError) -> Self {
        let kind = match &error {
            StreamError::Connection(ConnectionError::IdleTimeout) => io::ErrorKind::TimedOut,
            StreamError::Connection(_) => io::ErrorKind::NotConnected,
            StreamError::Write(WriteError::Stopped(_)) | StreamError::Read(ReadError::Reset(_)) => {
                io::ErrorKind::ConnectionReset
            }
            StreamError::Write(WriteError::Closed) | StreamError::Read(ReadError::Closed) => {
                io::ErrorKind::NotConnected
            }
            StreamError::TooLong(_) => io::ErrorKind::InvalidData,
        };
        Self::new(kind, error)
    }
}

/// The sending half. Dropping it without [`SendStream::finish`] or a reset finishes it.
pub struct SendStream {
    inner: Shareholder,
    id: StreamId,
}

impl SendStream {
    pub(super) const fn new(inner: Shareholder, id: StreamId) -> Self {
        Self { inner, id }
    }

    /// The stream's ID.
    #[must_use]
    pub const fn id(&self) -> StreamId {
        self.id
    }

    /// Writes some of `data`, at least one octet, waiting for room.
    ///
    /// # Errors
    ///
    /// [`StreamError`] when nothing can be written any more.
    pub async fn write(&mut self, data: &[u8]) -> Result<usize, StreamError> {
        poll_fn(|context| self.poll(context, data)).await
    }

    /// Writes all of `data`.
    ///
    /// # Errors
    ///
    /// [`StreamError`] when nothing can be written any more.
    pub async fn write_all(&mut self, mut data: &[u8]) -> Result<(), StreamError> {
        while !data.is_empty() {
            let count = self.write(data).await?;
            data = &data[count..];
        }
        Ok(())
    }

    /// Ends the stream after what was written.
    ///
    /// # Errors
    ///
    /// [`StreamError`] when it has ended before.
    pub fn finish(&mut self) -> Result<(), StreamError> {
        self.act(|connection, id| connection.finish(id).map_err(StreamError::from))
    }

    /// Abandons the stream with a code of the application.
    ///
    /// # Errors
    ///
    /// [`StreamError`] when it has ended before.
    pub fn reset(&mut self, code: u64) -> Result<(), StreamError> {
        self.act(|connection, id| connection.reset(id, code).map_err(StreamError::from))
    }

    /// Sets the priority: higher ones are sent first, the default is 0.
    ///
    /// # Errors
    ///
    /// [`StreamError`] when the stream has ended.
    pub fn set_priority(&self, priority: i32) -> Result<(), StreamError> {
        self.act(|connection, id| connection.set_priority(id, priority).map_err(StreamError::from))
    }

    /// Waits until the peer has acknowledged a finished stream, or wants no more of it: then its
    /// code is given.
    ///
    /// # Errors
    ///
    /// [`StreamError`] when the connection ends before.
    pub async fn stopped(&mut self) -> Result<Option<u64>, StreamError> {
        poll_fn(|context| {
            let mut state = self.inner.shared.lock();
            if let Some(error) = state.error(self.inner.handle) {
                return Poll::Ready(Err(StreamError::Connection(error)));
            }
            let Some(connection) = state.endpoint.connection_mut(self.inner.handle) else {
                return Poll::Ready(Ok(None));
            };
            match connection.send_state(self.id) {
                None => Poll::Ready(Ok(None)),
                Some(Some(code)) => Poll::Ready(Ok(Some(code))),
                Some(None) => {
                    if let Some(known) = state.known.get_mut(&self.inner.handle) {
                        known.writers.insert(self.id, context.waker().clone());
                    }
                    Poll::Pending
                }
            }
        })
        .await
    }

    fn poll(&self, context: &Context<'_>, data: &[u8]) -> Poll<Result<usize, StreamError>> {
        let mut state = self.inner.shared.lock();
        if let Some(error) = state.error(self.inner.handle) {
            return Poll::Ready(Err(StreamError::Connection(error)));
        }
        let Some(connection) = state.endpoint.connection_mut(self.inner.handle) else {
            return Poll::Ready(Err(WriteError::Closed.into()));
        };
        let written = connection.write(self.id, data);
        if written == Ok(0) && !data.is_empty() {
            if let Some(known) = state.known.get_mut(&self.inner.handle) {
                known.writers.insert(self.id, context.waker().clone());
            }
            // A frame that says so may be due.
            self.inner.shared.work.notify_one();
            return Poll::Pending;
        }
        drop(state);
        self.inner.shared.work.notify_one();
        Poll::Ready(written.map_err(StreamError::from))
    }

    fn act(
        &self,
        act: impl FnOnce(&mut crate::transport::Connection, StreamId) -> Result<(), StreamError>,
    ) -> Result<(), StreamError> {
        let mut state = self.inner.shared.lock();
        if let Some(error) = state.error(self.inner.handle) {
            return Err(StreamError::Connection(error));
        }
        let connection = state.endpoint.connection_mut(self.inner.handle);
        let result = act(connection.ok_or(WriteError::Closed)?, self.id);
        self.inner.shared.work.notify_one();
        result
    }
}

impl Drop for SendStream {
    fn drop(&mut self) {
        let _ = self.finish();
        let mut state = self.inner.shared.lock();
        if let Some(known) = state.known.get_mut(&self.inner.handle) {
            known.writers.remove(&self.id);
        }
    }
}

impl AsyncWrite for SendStream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll(context, data).map_err(io::Error::from)
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.finish().map_err(io::Error::from))
    }
}

impl std::fmt::Debug for SendStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("SendStream").field(&self.id).finish()
    }
}

/// The receiving half. Dropping it before its end tells the peer to stop, with code 0.
pub struct RecvStream {
    inner: Shareholder,
    id: StreamId,
    ended: bool,
}

impl RecvStream {
    pub(super) const fn new(inner: Shareholder, id: StreamId) -> Self {
        Self { inner, id, ended: false }
    }

    /// The stream's ID.
    #[must_use]
    pub const fn id(&self) -> StreamId {
        self.id
    }

    /// Reads into `out`, waiting for at least one octet; `None` at the end of the stream.
    ///
    /// # Errors
    ///
    /// [`StreamError`] when nothing comes any more.
    pub async fn read(&mut self, out: &mut [u8]) -> Result<Option<usize>, StreamError> {
        poll_fn(|context| self.poll(context, out)).await
    }

    /// Reads all that comes until the end, at most `limit` octets.
    ///
    /// # Errors
    ///
    /// [`StreamError`] when the stream breaks off or is longer.
    pub async fn read_to_end(&mut self, limit: usize) -> Result<Vec<u8>, StreamError> {
        const STEP: usize = 16 * 1024;
        let mut all = Vec::new();
        loop {
            let at = all.len();
            all.resize(at + STEP, 0);
            let count = self.read(&mut all[at..]).await?;
            all.truncate(at + count.unwrap_or(0));
            if all.len() > limit {
                return Err(StreamError::TooLong(limit));
            }
            if count.is_none() {
                return Ok(all);
            }
        }
    }

    /// Asks the peer to send no more, with a code of the application.
    ///
    /// # Errors
    ///
    /// [`StreamError`] when the stream has ended.
    pub fn stop(&mut self, code: u64) -> Result<(), StreamError> {
        self.ended = true;
        let mut state = self.inner.shared.lock();
        if let Some(error) = state.error(self.inner.handle) {
            return Err(StreamError::Connection(error));
        }
        let connection = state.endpoint.connection_mut(self.inner.handle);
        connection.ok_or(ReadError::Closed)?.stop(self.id, code)?;
        self.inner.shared.work.notify_one();
        Ok(())
    }

    fn poll(
        &mut self,
        context: &Context<'_>,
        out: &mut [u8],
    ) -> Poll<Result<Option<usize>, StreamError>> {
        if self.ended {
            return Poll::Ready(Ok(None));
        }
        let mut state = self.inner.shared.lock();
        let read = match state.endpoint.connection_mut(self.inner.handle) {
            Some(connection) => connection.read(self.id, out),
            None => Ok(Read::Blocked),
        };
        match read {
            Ok(Read::Data(count)) => {
                drop(state);
                // Windows may be due.
                self.inner.shared.work.notify_one();
                Poll::Ready(Ok(Some(count)))
            }
            Ok(Read::Finished) => {
                self.ended = true;
                Poll::Ready(Ok(None))
            }
            // What arrived before the end of the connection could still be read.
            Ok(Read::Blocked) => {
                if let Some(error) = state.error(self.inner.handle) {
                    return Poll::Ready(Err(StreamError::Connection(error)));
                }
                if out.is_empty() {
                    return Poll::Ready(Ok(Some(0)));
                }
                if let Some(known) = state.known.get_mut(&self.inner.handle) {
                    known.readers.insert(self.id, context.waker().clone());
                }
                Poll::Pending
            }
            Err(error) => {
                self.ended = true;
                Poll::Ready(Err(error.into()))
            }
        }
    }
}

impl Drop for RecvStream {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.stop(0);
        }
        let mut state = self.inner.shared.lock();
        if let Some(known) = state.known.get_mut(&self.inner.handle) {
            known.readers.remove(&self.id);
        }
    }
}

impl AsyncRead for RecvStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let count = ready!(self.poll(context, out.initialize_unfilled()))?;
        out.advance(count.unwrap_or(0));
        Poll::Ready(Ok(()))
    }
}

impl std::fmt::Debug for RecvStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("RecvStream").field(&self.id).finish()
    }
}
