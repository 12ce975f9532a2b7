//! Errors of the handles: what the core says, and that a connection may be over.

use std::io;

use crate::transport::{self, ConnectionError};

/// Why a connection cannot be started.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ConnectError {
    /// The endpoint was closed.
    #[error("the endpoint is closed")]
    EndpointClosed,
    /// [`Endpoint::connect`](super::Endpoint::connect) needs a default configuration.
    #[error("there is no default client configuration; set one, or use connect_with")]
    NoConfiguration,
    /// The socket cannot send there: port 0, or IPv6 from an IPv4 socket.
    #[error("{0} cannot be reached from this socket")]
    Address(std::net::SocketAddr),
    /// The core refuses.
    #[error(transparent)]
    Transport(#[from] transport::ConnectError),
}

/// Why a write failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum WriteError {
    /// The peer wants no more, for this reason of its application.
    #[error("the peer stopped the stream with code {0}")]
    Stopped(u64),
    /// The connection is over.
    #[error("the connection is over: {0}")]
    ConnectionLost(#[from] ConnectionError),
    /// The stream was finished or reset before.
    #[error("the stream is closed for writing")]
    Closed,
}

/// Why a read failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ReadError {
    /// The peer has abandoned the stream, for this reason of its application.
    #[error("the peer reset the stream with code {0}")]
    Reset(u64),
    /// The connection is over.
    #[error("the connection is over: {0}")]
    ConnectionLost(#[from] ConnectionError),
    /// The stream was stopped or reset before.
    #[error("the stream is closed for reading")]
    Closed,
}

/// Why a buffer could not be filled.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ReadExactError {
    /// The stream has ended after so many octets.
    #[error("the stream ended after {0} bytes")]
    FinishedEarly(usize),
    /// Reading failed.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// Why a stream could not be read to its end.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ReadToEndError {
    /// It is longer than the caller allows.
    #[error("the stream is longer than {0} bytes")]
    TooLong(usize),
    /// Reading failed.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// The stream was finished, stopped or reset before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stream is closed")]
pub struct ClosedStream;

/// Why a datagram cannot be sent.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SendDatagramError {
    /// The peer takes none.
    #[error("the peer does not accept DATAGRAM frames")]
    Unsupported,
    /// It does not fit into a packet now.
    #[error("the message is larger than the path or the peer allows")]
    TooLarge,
    /// The buffer is full.
    #[error("the send buffer is full")]
    Blocked,
    /// The connection is over.
    #[error("the connection is over: {0}")]
    ConnectionLost(#[from] ConnectionError),
}

impl From<transport::SendDatagramError> for SendDatagramError {
    fn from(error: transport::SendDatagramError) -> Self {
        match error {
            transport::SendDatagramError::Unsupported => Self::Unsupported,
            transport::SendDatagramError::TooLarge => Self::TooLarge,
            transport::SendDatagramError::Blocked => Self::Blocked,
        }
    }
}

impl From<ReadError> for io::Error {
    fn from(error: ReadError) -> Self {
        let kind = match error {
            ReadError::Reset(_) => io::ErrorKind::ConnectionReset,
            ReadError::ConnectionLost(_) | ReadError::Closed => io::ErrorKind::NotConnected,
        };
        Self::new(kind, error)
    }
}

impl From<WriteError> for io::Error {
    fn from(error: WriteError) -> Self {
        let kind = match error {
            WriteError::Stopped(_) => io::ErrorKind::ConnectionReset,
            WriteError::ConnectionLost(_) | WriteError::Closed => io::ErrorKind::NotConnected,
        };
        Self::new(kind, error)
    }
}
