//! HTTP datagrams.
//!
//! <https://www.rfc-editor.org/rfc/rfc9297.html#section-2.1>

use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut as _, Bytes, BytesMut};
use h3::quic::ConnectionErrorIncoming;
use h3_datagram::{
    datagram::EncodedDatagram,
    quic_traits::{DatagramConnectionExt, RecvDatagram, SendDatagram, SendDatagramErrorIncoming},
};

use super::{
    connection::{Connection, Waiting},
    error::of_connection,
};
use crate::{
    driver::{self, SendDatagramError},
    transport::StreamId,
    varint,
};

/// Sends a datagram that belongs to the request on `stream`.
///
/// # Errors
///
/// [`SendDatagramError`] says what is in the way.
pub fn send_datagram(
    connection: &driver::Connection,
    stream: StreamId,
    payload: &[u8],
) -> Result<(), SendDatagramError> {
    let mut message = Vec::with_capacity(payload.len() + 8);
    varint::write(stream.to_wire() / 4, &mut message);
    message.put_slice(payload);
    connection.send_datagram(message.into())
}

/// Sends what `h3-datagram` has encoded. While the send buffer is full, datagrams are dropped: they
/// promise no more, and its errors have no word for it.
#[derive(Debug)]
pub struct DatagramSender {
    connection: driver::Connection,
}

/// Receives datagrams for `h3-datagram` to decode.
#[derive(Debug)]
pub struct DatagramReceiver {
    connection: driver::Connection,
    waiting: Waiting<Bytes>,
}

impl<B: Buf> DatagramConnectionExt<B> for Connection {
    type SendDatagramHandler = DatagramSender;
    type RecvDatagramHandler = DatagramReceiver;

    fn send_datagram_handler(&self) -> DatagramSender {
        DatagramSender { connection: self.inner().clone() }
    }

    fn recv_datagram_handler(&self) -> DatagramReceiver {
        DatagramReceiver { connection: self.inner().clone(), waiting: Waiting::NOT }
    }
}

impl<B: Buf> SendDatagram<B> for DatagramSender {
    fn send_datagram<T: Into<EncodedDatagram<B>>>(
        &mut self,
        data: T,
    ) -> Result<(), SendDatagramErrorIncoming> {
        let mut message = BytesMut::new();
        message.put(data.into());
        match self.connection.send_datagram(message.freeze()) {
            Ok(()) | Err(SendDatagramError::Blocked) => Ok(()),
            Err(SendDatagramError::Unsupported) => Err(SendDatagramErrorIncoming::NotAvailable),
            Err(SendDatagramError::TooLarge) => Err(SendDatagramErrorIncoming::TooLarge),
            Err(SendDatagramError::ConnectionLost(error)) => {
                Err(SendDatagramErrorIncoming::ConnectionError(of_connection(error)))
            }
        }
    }
}

impl RecvDatagram for DatagramReceiver {
    type Buffer = Bytes;

    fn poll_incoming_datagram(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Bytes, ConnectionErrorIncoming>> {
        let connection = &self.connection;
        let received = ready!(self.waiting.poll(cx, || {
            let connection = connection.clone();
            async move { connection.read_datagram().await }
        }));
        Poll::Ready(received.map_err(of_connection))
    }
}
