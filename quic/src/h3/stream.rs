//! Streams, as `h3` writes and reads them.

use std::{
    fmt,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use h3::{
    error::Code,
    quic::{self, StreamErrorIncoming, StreamId, WriteBuf},
};

use super::{
    error::{of_read, of_write},
    frames::{BadTrailers, Frames},
};
use crate::driver;

/// Octets that are read at once.
const CHUNK: usize = 16 * 1024;

/// A stream both ways, for one request.
#[derive(Debug)]
pub struct BidiStream<B: Buf> {
    send: SendStream<B>,
    recv: RecvStream,
}

/// The sending half of a stream.
pub struct SendStream<B: Buf> {
    stream: driver::SendStream,
    /// What `h3` has handed over and the stream has not taken yet.
    pending: Option<WriteBuf<B>>,
    /// Dropped now, it would look whole though it is not.
    unfinished: bool,
}

/// The receiving half of a stream.
#[derive(Debug)]
pub struct RecvStream {
    stream: driver::RecvStream,
    /// Of requests: their frames.
    frames: Option<Frames>,
}

impl<B: Buf> BidiStream<B> {
    /// One that we have opened.
    pub(super) fn opened((send, recv): (driver::SendStream, driver::RecvStream)) -> Self {
        let send = SendStream { stream: send, pending: None, unfinished: true };
        Self { send, recv: RecvStream::new(recv) }
    }

    /// One that the peer has opened, for a request.
    pub(super) fn accepted(stream: (driver::SendStream, driver::RecvStream)) -> Self {
        let mut accepted = Self::opened(stream);
        accepted.recv.frames = Some(Frames::new());
        accepted
    }
}

impl<B: Buf> SendStream<B> {
    /// Control and QPACK streams, which have no end of their own.
    pub(super) const fn one_way(stream: driver::SendStream) -> Self {
        Self { stream, pending: None, unfinished: false }
    }

    fn poll_write<D: Buf>(
        stream: &mut driver::SendStream,
        cx: &Context<'_>,
        data: &mut D,
    ) -> Poll<Result<usize, StreamErrorIncoming>> {
        let written = ready!(stream.poll_write_some(cx, data.chunk())).map_err(of_write)?;
        data.advance(written);
        Poll::Ready(Ok(written))
    }
}

impl<B: Buf> quic::SendStream<B> for SendStream<B> {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        while let Some(data) = &mut self.pending {
            if !data.has_remaining() {
                self.pending = None;
                break;
            }
            ready!(Self::poll_write(&mut self.stream, cx, data))?;
        }
        Poll::Ready(Ok(()))
    }

    fn send_data<T: Into<WriteBuf<B>>>(&mut self, data: T) -> Result<(), StreamErrorIncoming> {
        if self.pending.is_some() {
            let misuse = "send_data before poll_ready was ready";
            return Err(StreamErrorIncoming::Unknown(misuse.into()));
        }
        self.pending = Some(data.into());
        Ok(())
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        ready!(quic::SendStream::poll_ready(self, cx))?;
        self.unfinished = false;
        // One that has ended before is as finished as it can be.
        let _ = self.stream.finish();
        Poll::Ready(Ok(()))
    }

    fn reset(&mut self, reset_code: u64) {
        self.unfinished = false;
        self.pending = None;
        let _ = self.stream.reset(reset_code);
    }

    fn send_id(&self) -> StreamId {
        id(self.stream.id())
    }
}

impl<B: Buf> quic::SendStreamUnframed<B> for SendStream<B> {
    fn poll_send<D: Buf>(
        &mut self,
        cx: &mut Context<'_>,
        data: &mut D,
    ) -> Poll<Result<usize, StreamErrorIncoming>> {
        ready!(quic::SendStream::poll_ready(self, cx))?;
        Self::poll_write(&mut self.stream, cx, data)
    }
}

impl<B: Buf> fmt::Debug for SendStream<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendStream").field("stream", &self.stream).finish_non_exhaustive()
    }
}

impl<B: Buf> Drop for SendStream<B> {
    fn drop(&mut self) {
        if self.unfinished {
            let _ = self.stream.reset(Code::H3_REQUEST_CANCELLED.value());
        }
    }
}

impl RecvStream {
    pub(super) const fn new(stream: driver::RecvStream) -> Self {
        Self { stream, frames: None }
    }
}

impl quic::RecvStream for RecvStream {
    type Buf = Bytes;

    fn poll_data(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Bytes>, StreamErrorIncoming>> {
        // Once the head has been read, which may have come with them.
        if self.frames.as_ref().is_some_and(Frames::has_bad_trailers) {
            return Poll::Ready(Err(StreamErrorIncoming::Unknown(BadTrailers.into())));
        }
        // On the stack, since most polls find little or nothing.
        let mut chunk = [0; CHUNK];
        let read = ready!(self.stream.poll_read_some(cx, &mut chunk)).map_err(of_read)?;
        let Some(count) = read else { return Poll::Ready(Ok(None)) };
        let chunk = &chunk[..count];
        if let Some(frames) = &mut self.frames {
            frames.pass(chunk);
        }
        Poll::Ready(Ok(Some(Bytes::copy_from_slice(chunk))))
    }

    fn stop_sending(&mut self, error_code: u64) {
        // One that has ended cannot be stopped, and need not be.
        let _ = self.stream.stop(error_code);
    }

    fn recv_id(&self) -> StreamId {
        id(self.stream.id())
    }
}

impl Drop for RecvStream {
    fn drop(&mut self) {
        let _ = self.stream.stop(Code::H3_NO_ERROR.value());
    }
}

impl<B: Buf> quic::SendStream<B> for BidiStream<B> {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        self.send.poll_ready(cx)
    }

    fn send_data<T: Into<WriteBuf<B>>>(&mut self, data: T) -> Result<(), StreamErrorIncoming> {
        self.send.send_data(data)
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        self.send.poll_finish(cx)
    }

    fn reset(&mut self, reset_code: u64) {
        self.send.reset(reset_code);
    }

    fn send_id(&self) -> StreamId {
        self.send.send_id()
    }
}

impl<B: Buf> quic::SendStreamUnframed<B> for BidiStream<B> {
    fn poll_send<D: Buf>(
        &mut self,
        cx: &mut Context<'_>,
        data: &mut D,
    ) -> Poll<Result<usize, StreamErrorIncoming>> {
        self.send.poll_send(cx, data)
    }
}

impl<B: Buf> quic::RecvStream for BidiStream<B> {
    type Buf = Bytes;

    fn poll_data(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Bytes>, StreamErrorIncoming>> {
        self.recv.poll_data(cx)
    }

    fn stop_sending(&mut self, error_code: u64) {
        self.recv.stop_sending(error_code);
    }

    fn recv_id(&self) -> StreamId {
        self.recv.recv_id()
    }
}

impl<B: Buf> quic::BidiStream<B> for BidiStream<B> {
    type SendStream = SendStream<B>;
    type RecvStream = RecvStream;

    fn split(self) -> (SendStream<B>, RecvStream) {
        (self.send, self.recv)
    }
}

fn id(id: crate::transport::StreamId) -> StreamId {
    StreamId::try_from(id.to_wire()).expect("both are below 2^62")
}
