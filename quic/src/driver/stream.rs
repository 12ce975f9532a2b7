//! Handles of streams.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    error::{ClosedStream, ReadError, ReadExactError, ReadToEndError, WriteError},
    owner::Owner,
    waiters::SendOutcome,
};
use crate::transport::{self, ConnectionError, Read, StreamId};

/// Octets that [`RecvStream::read_to_end`] asks for at once.
const CHUNK: usize = 16 * 1024;

/// The sending half of a stream. Dropping it finishes the stream.
#[derive(Debug)]
pub struct SendStream {
    owner: Arc<Owner>,
    id: StreamId,
    /// Finished, reset, or stopped by the peer.
    ended: bool,
}

impl SendStream {
    pub(super) fn new(owner: &Arc<Owner>, id: StreamId) -> Self {
        Self { owner: Arc::clone(owner), id, ended: false }
    }

    /// The stream's ID.
    #[must_use]
    pub const fn id(&self) -> StreamId {
        self.id
    }

    /// Writes some of `data`, and says how much. Waits while buffers and limits have no room.
    ///
    /// # Errors
    ///
    /// [`WriteError`] when the stream takes no more.
    pub async fn write(&mut self, data: &[u8]) -> Result<usize, WriteError> {
        poll_fn(|cx| self.poll_write_some(cx, data)).await
    }

    /// Writes all of `data`.
    ///
    /// # Errors
    ///
    /// [`WriteError`] when the stream takes no more; some of `data` may have been written.
    pub async fn write_all(&mut self, mut data: &[u8]) -> Result<(), WriteError> {
        while !data.is_empty() {
            let written = self.write(data).await?;
            data = &data[written..];
        }
        Ok(())
    }

    /// Ends the stream after what was written. [`Self::stopped`] tells when the peer has all of it.
    ///
    /// # Errors
    ///
    /// When it was ended before.
    pub fn finish(&mut self) -> Result<(), ClosedStream> {
        self.end(transport::Connection::finish)
    }

    /// Abandons the stream, with a code of the application.
    ///
    /// # Errors
    ///
    /// When it was reset before, or the peer has all of it.
    pub fn reset(&mut self, code: u64) -> Result<(), ClosedStream> {
        // Also after it was finished: what was not delivered yet need not be.
        self.ended = false;
        self.end(|connection, id| connection.reset(id, code))
    }

    /// Sets the priority: higher ones go first, the default is 0, equal ones take turns.
    ///
    /// # Errors
    ///
    /// When the stream is closed.
    pub fn set_priority(&self, priority: i32) -> Result<(), ClosedStream> {
        let set = self.owner.act(|connection, _| connection.set_priority(self.id, priority));
        set.map_err(|_| ClosedStream)?.map_err(|_| ClosedStream)
    }

    /// Waits until the peer wants no more, and gives its code; `None` when it has acknowledged all
    /// of a finished stream.
    ///
    /// # Errors
    ///
    /// When the connection is over before.
    pub async fn stopped(&self) -> Result<Option<u64>, ConnectionError> {
        let outcome = &self.owner.signals().outcome;
        let ended = self.owner.until(outcome, |_, waiters| waiters.outcome(self.id)).await?;
        Ok(match ended {
            SendOutcome::Finished => None,
            SendOutcome::Stopped(code) => Some(code),
        })
    }

    fn end(
        &mut self,
        end: impl FnOnce(&mut transport::Connection, StreamId) -> Result<(), transport::WriteError>,
    ) -> Result<(), ClosedStream> {
        if std::mem::replace(&mut self.ended, true) {
            return Err(ClosedStream);
        }
        match self.owner.act(|connection, _| end(connection, self.id)) {
            // A peer that wants no more is found out by `stopped`; a lost connection anyhow.
            Ok(Ok(()) | Err(transport::WriteError::Stopped(_))) | Err(_) => Ok(()),
            Ok(Err(transport::WriteError::Closed)) => Err(ClosedStream),
        }
    }

    pub(crate) fn poll_write_some(
        &mut self,
        cx: &Context<'_>,
        data: &[u8],
    ) -> Poll<Result<usize, WriteError>> {
        if self.ended {
            return Poll::Ready(Err(WriteError::Closed));
        }
        let id = self.id;
        let written = self.owner.act(|connection, waiters| {
            if let Some(error) = &waiters.error {
                return Err(WriteError::ConnectionLost(error.clone()));
            }
            match connection.write(id, data) {
                Ok(0) if !data.is_empty() => {
                    waiters.await_writable(id, cx);
                    Ok(None)
                }
                Ok(count) => Ok(Some(count)),
                Err(transport::WriteError::Stopped(code)) => Err(WriteError::Stopped(code)),
                Err(transport::WriteError::Closed) => match waiters.outcome(id) {
                    Some(SendOutcome::Stopped(code)) => Err(WriteError::Stopped(code)),
                    _ => Err(WriteError::Closed),
                },
            }
        });
        match written {
            Ok(Ok(Some(count))) => Poll::Ready(Ok(count)),
            Ok(Ok(None)) => Poll::Pending,
            Ok(Err(error)) => {
                self.ended = true;
                Poll::Ready(Err(error))
            }
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }
}

impl AsyncWrite for SendStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_write_some(cx, data).map_err(Into::into)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // One that has ended already is as shut as it can be.
        let _ = self.get_mut().finish();
        Poll::Ready(Ok(()))
    }
}

impl Drop for SendStream {
    fn drop(&mut self) {
        let (id, ended) = (self.id, self.ended);
        let _ = self.owner.act(|connection, waiters| {
            waiters.forget_sender(id);
            // An error says that the peer wanted no more.
            let _ = if ended { Ok(()) } else { connection.finish(id) };
        });
    }
}

/// The receiving half of a stream. Dropping it before its end stops the stream with code 0.
#[derive(Debug)]
pub struct RecvStream {
    owner: Arc<Owner>,
    id: StreamId,
    end: Option<End>,
}

/// How a receiving stream has ended.
#[derive(Clone, Copy, Debug)]
enum End {
    /// Everything was read.
    Finished,
    Reset(u64),
    /// We want no more.
    Stopped,
}

impl RecvStream {
    pub(super) fn new(owner: &Arc<Owner>, id: StreamId) -> Self {
        Self { owner: Arc::clone(owner), id, end: None }
    }

    /// The stream's ID.
    #[must_use]
    pub const fn id(&self) -> StreamId {
        self.id
    }

    /// Reads into `out`, and says how much; `None` at the end of the stream.
    ///
    /// # Errors
    ///
    /// [`ReadError`] when nothing more can be read.
    pub async fn read(&mut self, out: &mut [u8]) -> Result<Option<usize>, ReadError> {
        poll_fn(|cx| self.poll_read_some(cx, out)).await
    }

    /// Fills `out`.
    ///
    /// # Errors
    ///
    /// [`ReadExactError`] when the stream ends before, or nothing more can be read.
    pub async fn read_exact(&mut self, out: &mut [u8]) -> Result<(), ReadExactError> {
        let mut done = 0;
        while done < out.len() {
            match self.read(&mut out[done..]).await? {
                Some(count) => done += count,
                None => return Err(ReadExactError::FinishedEarly(done)),
            }
        }
        Ok(())
    }

    /// The next octets, at most `max`; `None` at the end of the stream.
    ///
    /// # Errors
    ///
    /// [`ReadError`] when nothing more can be read.
    pub async fn read_chunk(&mut self, max: usize) -> Result<Option<Bytes>, ReadError> {
        let mut chunk = BytesMut::zeroed(max.min(CHUNK));
        let count = self.read(&mut chunk).await?;
        Ok(count.map(|count| {
            chunk.truncate(count);
            chunk.freeze()
        }))
    }

    /// Everything up to the end of the stream, if that is no more than `limit` octets.
    ///
    /// # Errors
    ///
    /// [`ReadToEndError`] when the stream is longer, or nothing more can be read.
    pub async fn read_to_end(&mut self, limit: usize) -> Result<Vec<u8>, ReadToEndError> {
        let mut all = Vec::new();
        loop {
            let start = all.len();
            // One octet beyond the limit shows that there are more.
            all.resize(start + CHUNK.min(limit + 1 - start), 0);
            let count = self.read(&mut all[start..]).await?;
            all.truncate(start + count.unwrap_or(0));
            if all.len() > limit {
                return Err(ReadToEndError::TooLong(limit));
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
    /// When the stream has ended before.
    pub fn stop(&mut self, code: u64) -> Result<(), ClosedStream> {
        if self.end.is_some() {
            return Err(ClosedStream);
        }
        self.end = Some(End::Stopped);
        let stopped = self.owner.act(|connection, _| connection.stop(self.id, code));
        // A lost connection is found out anyhow.
        stopped.unwrap_or(Ok(())).map_err(|_| ClosedStream)
    }

    pub(crate) fn poll_read_some(
        &mut self,
        cx: &Context<'_>,
        out: &mut [u8],
    ) -> Poll<Result<Option<usize>, ReadError>> {
        match self.end {
            Some(End::Finished) => return Poll::Ready(Ok(None)),
            Some(End::Reset(code)) => return Poll::Ready(Err(ReadError::Reset(code))),
            Some(End::Stopped) => return Poll::Ready(Err(ReadError::Closed)),
            None if out.is_empty() => return Poll::Ready(Ok(Some(0))),
            None => {}
        }
        let id = self.id;
        let read = self.owner.act(|connection, waiters| {
            match (connection.read(id, out), &waiters.error) {
                // What has arrived can be read also when the connection is over.
                (Ok(Read::Blocked), Some(error)) => Err(ReadError::ConnectionLost(error.clone())),
                (Ok(Read::Blocked), None) => {
                    waiters.await_readable(id, cx);
                    Ok(Read::Blocked)
                }
                (Ok(read), _) => Ok(read),
                (Err(transport::ReadError::Reset(code)), _) => Err(ReadError::Reset(code)),
                (Err(transport::ReadError::Closed), _) => Err(ReadError::Closed),
            }
        });
        Poll::Ready(match read.map_err(ReadError::from).flatten() {
            Ok(Read::Data(count)) => Ok(Some(count)),
            Ok(Read::Blocked) => return Poll::Pending,
            Ok(Read::Finished) => {
                self.end = Some(End::Finished);
                Ok(None)
            }
            Err(ReadError::Reset(code)) => {
                self.end = Some(End::Reset(code));
                Err(ReadError::Reset(code))
            }
            Err(error) => Err(error),
        })
    }
}

impl AsyncRead for RecvStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let count = ready!(self.get_mut().poll_read_some(cx, out.initialize_unfilled()))?;
        out.advance(count.unwrap_or(0));
        Poll::Ready(Ok(()))
    }
}

impl Drop for RecvStream {
    fn drop(&mut self) {
        let (id, ended) = (self.id, self.end.is_some());
        let _ = self.owner.act(|connection, waiters| {
            waiters.forget_reader(id);
            // An error says that there was nothing left to stop.
            let _ = if ended { Ok(()) } else { connection.stop(id, 0) };
        });
    }
}
