//! Requests as RFC 9114 wants them: what `h3` lets pass and a server may not.
//!
//! "Malformed requests or responses that are detected MUST be treated as a stream error of type `H3_MESSAGE_ERROR`", since whoever
//! stands in front or behind may read them otherwise (<https://www.rfc-editor.org/rfc/rfc9114.html#section-4.1.2>). `h3` reads names and
//! values; [`resolve`] looks at pseudo-header fields that come twice, late or from elsewhere, at fields of HTTP/1.1 connections, and at
//! the announced length, which [`Content`] then holds the body to.

use std::future::poll_fn;

use bytes::Buf;
use h3::{
    error::{Code, StreamError},
    proto::frame::Frame,
    server::{RequestResolver, RequestStream},
};
use http::{HeaderMap, HeaderName, Method, Request, Uri, header};

use super::{
    connection::Connection,
    frames::BadTrailers,
    section::{self, BadSection, Counts},
    stream::BidiStream,
};

/// Why a request is malformed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// A pseudo-header field comes twice.
    #[error("a pseudo-header field comes twice")]
    Twice,
    /// A pseudo-header field comes behind another field.
    #[error("a pseudo-header field comes behind other fields")]
    Late,
    /// A pseudo-header field that requests do not have.
    #[error("a pseudo-header field that requests do not have")]
    Unknown,
    /// A pseudo-header field lacks, or does not go with the method.
    #[error("pseudo-header fields that do not go with the method")]
    Incomplete,
    /// `:path` is empty, or no path.
    #[error("a path that does not begin with a slash")]
    Path,
    /// `:authority` names a user, or there are several hosts.
    #[error("an authority with a user, or several hosts")]
    Authority,
    /// A field that is about a connection of HTTP/1.1, or `te` with anything but `trailers`.
    #[error("a field about a connection")]
    Connection,
    /// `content-length` is no number, or several.
    #[error("a content-length that is no number")]
    Length,
    /// The body is longer or shorter than `content-length` says.
    #[error("a body that does not have the announced length")]
    Body,
}

impl From<BadSection> for Malformed {
    fn from(bad: BadSection) -> Self {
        match bad {
            BadSection::Twice => Self::Twice,
            BadSection::Late => Self::Late,
            BadSection::EmptyPath => Self::Path,
            BadSection::Unknown | BadSection::Unreadable => Self::Unknown,
        }
    }
}

impl From<Malformed> for StreamError {
    fn from(malformed: Malformed) -> Self {
        Self::StreamError { code: Code::H3_MESSAGE_ERROR, reason: malformed.to_string() }
    }
}

/// Whether a stream failed because its message is malformed, which is for whoever reads it to tell the peer, with `H3_MESSAGE_ERROR`.
#[must_use]
pub fn is_malformed(error: &StreamError) -> bool {
    match error {
        StreamError::StreamError { code, .. } => *code == Code::H3_MESSAGE_ERROR,
        StreamError::Undefined(error) => error.is::<BadTrailers>(),
        _ => false,
    }
}

/// A request, the stream that it came on, and what is known of its body.
pub type Resolved<B> = (Request<()>, RequestStream<BidiStream<B>, B>, Content);

/// Waits for the head of a request, as [`RequestResolver::resolve_request`] does; the stream of a malformed one is reset and stopped with
/// `H3_MESSAGE_ERROR`.
///
/// # Errors
///
/// When the stream or the connection failed, or the request is malformed.
pub async fn resolve<B: Buf>(
    mut resolver: RequestResolver<Connection, B>,
) -> Result<Resolved<B>, StreamError> {
    let frame = poll_fn(|cx| resolver.frame_stream.poll_next(cx)).await;
    let counts = match &frame {
        Ok(Some(Frame::Headers(section))) => Some(section::count(section)),
        _ => None,
    };
    let (request, mut stream) = resolver.accept_with_frame(frame)?.resolve().await?;
    match counts.map_or(Ok(Content::default()), |counts| check(counts, &request)) {
        Ok(content) => Ok((request, stream, content)),
        Err(malformed) => {
            stream.stop_stream(Code::H3_MESSAGE_ERROR);
            stream.stop_sending(Code::H3_MESSAGE_ERROR);
            Err(malformed.into())
        }
    }
}

fn check(counts: Result<Counts, BadSection>, request: &Request<()>) -> Result<Content, Malformed> {
    let is_connect = request.method() == Method::CONNECT;
    if !section::is_complete(&counts?, is_connect) {
        return Err(Malformed::Incomplete);
    }
    if !is_connect {
        check_path(request.method(), request.uri())?;
    }
    let authority = request.uri().authority();
    let hosts = request.headers().get_all(header::HOST).iter().count();
    if authority.is_some_and(|authority| authority.as_str().contains('@')) || hosts > 1 {
        return Err(Malformed::Authority);
    }
    check_fields(request.headers())?;
    Content::announced(request.headers())
}

/// <https://www.rfc-editor.org/rfc/rfc9114.html#section-4.3.1>
fn check_path(method: &Method, uri: &Uri) -> Result<(), Malformed> {
    match uri.path() {
        "*" if method == Method::OPTIONS => Ok(()),
        path if path.starts_with('/') => Ok(()),
        _ => Err(Malformed::Path),
    }
}

/// Fields, be it of a head or of trailers, that HTTP/3 has no place for.
///
/// <https://www.rfc-editor.org/rfc/rfc9114.html#section-4.2>
///
/// # Errors
///
/// [`Malformed::Connection`].
pub fn check_fields(fields: &HeaderMap) -> Result<(), Malformed> {
    const OF_CONNECTIONS: [HeaderName; 5] = [
        header::CONNECTION,
        HeaderName::from_static("keep-alive"),
        HeaderName::from_static("proxy-connection"),
        header::TRANSFER_ENCODING,
        header::UPGRADE,
    ];
    let foreign = OF_CONNECTIONS.iter().any(|name| fields.contains_key(name));
    let te = fields.get_all(header::TE).iter().any(|te| te != "trailers");
    if foreign || te { Err(Malformed::Connection) } else { Ok(()) }
}

/// How much of a body has come, and how much was announced.
#[derive(Clone, Copy, Debug, Default)]
pub struct Content {
    announced: Option<u64>,
    received: u64,
}

impl Content {
    /// A body of which nothing has come, whose head has these fields.
    ///
    /// # Errors
    ///
    /// [`Malformed::Length`].
    pub fn announced(fields: &HeaderMap) -> Result<Self, Malformed> {
        let mut announced = None;
        for value in fields.get_all(header::CONTENT_LENGTH) {
            // Digits and nothing else: no sign, no list.
            let text = value.to_str().map_err(|_| Malformed::Length)?;
            let is_number = text.bytes().all(|octet| octet.is_ascii_digit());
            let length = text.parse().ok().filter(|_| is_number).ok_or(Malformed::Length)?;
            if announced.is_some_and(|before: u64| before != length) {
                return Err(Malformed::Length);
            }
            announced = Some(length);
        }
        Ok(Self { announced, received: 0 })
    }

    /// Whether the head says how long it is.
    #[must_use]
    pub const fn is_announced(&self) -> bool {
        self.announced.is_some()
    }

    /// Takes note of so many octets.
    ///
    /// # Errors
    ///
    /// [`Malformed::Body`] when there are more than were announced.
    pub fn on_data(&mut self, octets: usize) -> Result<(), Malformed> {
        self.received = self.received.saturating_add(octets as u64);
        let too_many = self.announced.is_some_and(|announced| self.received > announced);
        if too_many { Err(Malformed::Body) } else { Ok(()) }
    }

    /// Takes note of the end.
    ///
    /// # Errors
    ///
    /// [`Malformed::Body`] when there are fewer than were announced.
    pub fn on_end(&self) -> Result<(), Malformed> {
        let fits = self.announced.is_none_or(|announced| self.received == announced);
        if fits { Ok(()) } else { Err(Malformed::Body) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let fields = fields
            .iter()
            .map(|&(name, value)| (HeaderName::from_static(name), value.parse().expect("a value")));
        fields.collect()
    }

    #[test]
    fn a_length_is_one_number() {
        for (values, expected) in [
            (&[][..], Ok(None)),
            (&[("content-length", "0")], Ok(Some(0))),
            (&[("content-length", "18446744073709551615")], Ok(Some(u64::MAX))),
            (&[("content-length", "18446744073709551616")], Err(Malformed::Length)),
            (&[("content-length", "+1")], Err(Malformed::Length)),
            (&[("content-length", "1, 1")], Err(Malformed::Length)),
            (&[("content-length", "")], Err(Malformed::Length)),
        ] {
            assert_eq!(Content::announced(&fields(values)).map(|c| c.announced), expected);
        }
        for (second, fits) in [("5", true), ("6", false)] {
            let mut twice = fields(&[("content-length", "5")]);
            twice.append(header::CONTENT_LENGTH, second.parse().expect("a value"));
            assert_eq!(Content::announced(&twice).is_ok(), fits);
        }
    }

    #[test]
    fn a_body_has_the_length_that_was_announced() {
        let mut content = Content::announced(&fields(&[("content-length", "5")])).expect("5");
        assert_eq!(content.on_data(4), Ok(()));
        assert_eq!(content.on_end(), Err(Malformed::Body));
        assert_eq!(content.on_data(1), Ok(()));
        assert_eq!(content.on_end(), Ok(()));
        assert_eq!(content.on_data(1), Err(Malformed::Body));
        let mut any = Content::default();
        assert_eq!(
            (any.on_data(usize::MAX), any.on_data(9), any.on_end()),
            (Ok(()), Ok(()), Ok(()))
        );
    }

    #[test]
    fn fields_of_connections_have_no_place() {
        for (name, value, fits) in [
            ("connection", "close", false),
            ("keep-alive", "timeout=5", false),
            ("proxy-connection", "close", false),
            ("transfer-encoding", "chunked", false),
            ("upgrade", "websocket", false),
            ("te", "gzip", false),
            ("te", "trailers", true),
            ("trailer", "x", true),
        ] {
            assert_eq!(check_fields(&fields(&[(name, value)])).is_ok(), fits, "{name}: {value}");
        }
    }
}
