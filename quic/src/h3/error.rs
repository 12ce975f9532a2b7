//! Our errors, in the words of `h3`.

use std::sync::Arc;

use h3::quic::{ConnectionErrorIncoming, StreamErrorIncoming};

use crate::{
    driver::{ReadError, WriteError},
    transport::{ConnectionError, PeerClose},
};

pub(super) fn of_connection(error: ConnectionError) -> ConnectionErrorIncoming {
    match error {
        ConnectionError::PeerClosed(PeerClose::Application { code, .. }) => {
            ConnectionErrorIncoming::ApplicationClose { error_code: code }
        }
        ConnectionError::IdleTimeout | ConnectionError::HandshakeTimeout { .. } => {
            ConnectionErrorIncoming::Timeout
        }
        ConnectionError::Internal(reason) => {
            ConnectionErrorIncoming::InternalError(reason.to_owned())
        }
        other => ConnectionErrorIncoming::Undefined(Arc::new(other)),
    }
}

pub(super) fn of_stream(error: ConnectionError) -> StreamErrorIncoming {
    StreamErrorIncoming::ConnectionErrorIncoming { connection_error: of_connection(error) }
}

pub(super) fn of_write(error: WriteError) -> StreamErrorIncoming {
    match error {
        WriteError::Stopped(error_code) => StreamErrorIncoming::StreamTerminated { error_code },
        WriteError::ConnectionLost(error) => of_stream(error),
        WriteError::Closed => StreamErrorIncoming::Unknown(Box::new(error)),
    }
}

pub(super) fn of_read(error: ReadError) -> StreamErrorIncoming {
    match error {
        ReadError::Reset(error_code) => StreamErrorIncoming::StreamTerminated { error_code },
        ReadError::ConnectionLost(error) => of_stream(error),
        ReadError::Closed => StreamErrorIncoming::Unknown(Box::new(error)),
    }
}
