//! A connection that `h3` opens and accepts streams on.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Buf;
use h3::{
    error::Code,
    quic::{self, ConnectionErrorIncoming, StreamErrorIncoming},
};

use super::{
    error::{of_connection, of_stream},
    stream::{BidiStream, RecvStream, SendStream},
};
use crate::{driver, transport::ConnectionError};

/// A connection of the driver, for `h3`.
#[derive(Debug)]
pub struct Connection {
    opener: OpenStreams,
    accepting: Waiting<(driver::SendStream, driver::RecvStream)>,
    accepting_one_way: Waiting<driver::RecvStream>,
}

/// Opens streams. Clones share the connection, each waits for itself.
#[derive(Debug)]
pub struct OpenStreams {
    connection: driver::Connection,
    opening: Waiting<(driver::SendStream, driver::RecvStream)>,
    opening_one_way: Waiting<driver::SendStream>,
}

impl Connection {
    /// Wraps a connection whose application protocol is [`ALPN`](super::ALPN).
    #[must_use]
    pub const fn new(connection: driver::Connection) -> Self {
        Self {
            opener: OpenStreams::new(connection),
            accepting: Waiting::NOT,
            accepting_one_way: Waiting::NOT,
        }
    }

    pub(super) const fn inner(&self) -> &driver::Connection {
        &self.opener.connection
    }
}

impl<B: Buf> quic::Connection<B> for Connection {
    type RecvStream = RecvStream;
    type OpenStreams = OpenStreams;

    fn poll_accept_recv(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<RecvStream, ConnectionErrorIncoming>> {
        let connection = &self.opener.connection;
        let accepted = ready!(self.accepting_one_way.poll(cx, || {
            let connection = connection.clone();
            async move { connection.accept_uni().await }
        }));
        Poll::Ready(accepted.map(RecvStream::new).map_err(of_connection))
    }

    fn poll_accept_bidi(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<BidiStream<B>, ConnectionErrorIncoming>> {
        let connection = &self.opener.connection;
        let accepted = ready!(self.accepting.poll(cx, || {
            let connection = connection.clone();
            async move { connection.accept_bi().await }
        }));
        Poll::Ready(accepted.map(BidiStream::accepted).map_err(of_connection))
    }

    fn opener(&self) -> OpenStreams {
        self.opener.clone()
    }
}

impl<B: Buf> quic::OpenStreams<B> for Connection {
    type BidiStream = BidiStream<B>;
    type SendStream = SendStream<B>;

    fn poll_open_bidi(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<BidiStream<B>, StreamErrorIncoming>> {
        self.opener.poll_open_bidi(cx)
    }

    fn poll_open_send(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<SendStream<B>, StreamErrorIncoming>> {
        self.opener.poll_open_send(cx)
    }

    fn close(&mut self, code: Code, reason: &[u8]) {
        quic::OpenStreams::<B>::close(&mut self.opener, code, reason);
    }
}

impl OpenStreams {
    const fn new(connection: driver::Connection) -> Self {
        Self { connection, opening: Waiting::NOT, opening_one_way: Waiting::NOT }
    }
}

impl Clone for OpenStreams {
    fn clone(&self) -> Self {
        Self::new(self.connection.clone())
    }
}

impl<B: Buf> quic::OpenStreams<B> for OpenStreams {
    type BidiStream = BidiStream<B>;
    type SendStream = SendStream<B>;

    fn poll_open_bidi(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<BidiStream<B>, StreamErrorIncoming>> {
        let connection = &self.connection;
        let opened = ready!(self.opening.poll(cx, || {
            let connection = connection.clone();
            async move { connection.open_bi().await }
        }));
        Poll::Ready(opened.map(BidiStream::opened).map_err(of_stream))
    }

    fn poll_open_send(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<SendStream<B>, StreamErrorIncoming>> {
        let connection = &self.connection;
        let opened = ready!(self.opening_one_way.poll(cx, || {
            let connection = connection.clone();
            async move { connection.open_uni().await }
        }));
        Poll::Ready(opened.map(SendStream::one_way).map_err(of_stream))
    }

    fn close(&mut self, code: Code, reason: &[u8]) {
        self.connection.close(code.value(), reason);
    }
}

/// A future of the driver that is polled from time to time, as `h3` does.
pub(super) struct Waiting<T>(Option<Pin<Box<dyn Future<Output = Outcome<T>> + Send + Sync>>>);

type Outcome<T> = Result<T, ConnectionError>;

impl<T> Waiting<T> {
    pub(super) const NOT: Self = Self(None);

    /// Polls what is under way, or else what `start` starts.
    pub(super) fn poll<F>(
        &mut self,
        cx: &mut Context<'_>,
        start: impl FnOnce() -> F,
    ) -> Poll<F::Output>
    where
        F: Future<Output = Outcome<T>> + Send + Sync + 'static,
    {
        let future = self.0.get_or_insert_with(|| Box::pin(start()));
        let outcome = ready!(future.as_mut().poll(cx));
        self.0 = None;
        Poll::Ready(outcome)
    }
}

impl<T> fmt::Debug for Waiting<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "waiting" } else { "not waiting" })
    }
}
