//! One connection of an HTTP/3 client.

use std::{fmt, future::poll_fn, net::SocketAddr};

use bytes::{Buf as _, Bytes};
use h3::{
    client::{RequestStream, SendRequest},
    error::{Code, StreamError},
};
use http::{HeaderMap, Method, Request, Response, Uri};
use quic::{
    driver::{self, ConnectError, Endpoint},
    h3::{BidiStream, Connection, OpenStreams},
    transport::{ClientConfig, ConnectionError},
};
use tokio::task::JoinHandle;

/// A connection that takes requests. Dropping it closes the connection without an error.
pub struct Session {
    connection: driver::Connection,
    requests: SendRequest<OpenStreams, Bytes>,
    authority: String,
    control: JoinHandle<()>,
}

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It could not be started.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The handshake failed.
    #[error(transparent)]
    Handshake(#[from] ConnectionError),
    /// HTTP/3 could not begin.
    #[error("HTTP/3 did not begin: {0}")]
    Http(#[from] h3::error::ConnectionError),
}

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The stream or the connection failed.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The path is none.
    #[error("{0}")]
    Request(#[from] http::Error),
}

impl Session {
    /// Connects to `name` at `remote`.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub async fn open(
        endpoint: &Endpoint,
        config: &ClientConfig,
        remote: SocketAddr,
        name: &str,
    ) -> Result<Self, OpenError> {
        let connection = endpoint.connect_with(config, remote, name)?.await?;
        let transport = Connection::from(connection.clone());
        let (mut control, requests) = h3::client::builder().build(transport).await?;
        let control = tokio::spawn(async move {
            // Why it has ended is asked of the connection.
            let _ = poll_fn(|cx| control.poll_close(cx)).await;
        });
        Ok(Self { connection, requests, authority: format!("{name}:{}", remote.port()), control })
    }

    /// The connection beneath.
    #[must_use]
    pub const fn connection(&self) -> &driver::Connection {
        &self.connection
    }

    /// Sends a request with its body and waits for the head of the answer.
    ///
    /// # Errors
    ///
    /// [`RequestError`].
    pub async fn request(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Answer, RequestError> {
        self.request_with(method, path, HeaderMap::new(), body).await
    }

    /// As [`Self::request`], with header fields.
    ///
    /// # Errors
    ///
    /// [`RequestError`].
    pub async fn request_with(
        &self,
        method: Method,
        path: &str,
        fields: HeaderMap,
        body: Bytes,
    ) -> Result<Answer, RequestError> {
        let uri = Uri::builder().scheme("https").authority(&*self.authority).path_and_query(path);
        let mut request = Request::builder().method(method).uri(uri.build()?).body(())?;
        *request.headers_mut() = fields;
        let mut requests = self.requests.clone();
        let mut stream = requests.send_request(request).await?;
        let said = async {
            if !body.is_empty() {
                stream.send_data(body).await?;
            }
            stream.finish().await
        };
        match said.await {
            // The answer does not depend on the rest, and is as good as any
            // (<https://www.rfc-editor.org/rfc/rfc9114.html#section-4.1>).
            Err(StreamError::RemoteTerminate { code, .. }) if code == Code::H3_NO_ERROR => {}
            said => said?,
        }
        let head = stream.recv_response().await?;
        Ok(Answer { head, stream, _requests: requests })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.connection.close(Code::H3_NO_ERROR.value(), b"");
        self.control.abort();
    }
}

/// An answer, its body still to be read.
pub struct Answer {
    /// Status and fields.
    pub head: Response<()>,
    stream: RequestStream<BidiStream<Bytes>, Bytes>,
    _requests: SendRequest<OpenStreams, Bytes>,
}

impl Answer {
    /// The next piece of the body.
    ///
    /// # Errors
    ///
    /// When the stream or the connection fails.
    pub async fn next(&mut self) -> Result<Option<Bytes>, RequestError> {
        let data = self.stream.recv_data().await?;
        Ok(data.map(|mut data| data.copy_to_bytes(data.remaining())))
    }

    /// The whole body, if it has no more than `limit` octets; what is beyond them is left.
    ///
    /// # Errors
    ///
    /// As [`Self::next`].
    pub async fn body(&mut self, limit: usize) -> Result<Vec<u8>, RequestError> {
        let mut all = Vec::new();
        while let Some(piece) = self.next().await? {
            all.extend_from_slice(&piece[..piece.len().min(limit - all.len())]);
            if all.len() == limit {
                break;
            }
        }
        Ok(all)
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("connection", &self.connection).finish_non_exhaustive()
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer").field("head", &self.head).finish_non_exhaustive()
    }
}
