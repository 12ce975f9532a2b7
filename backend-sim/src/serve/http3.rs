//! From HTTP/3 to the routes and back: one task for each connection and one for each request.

use std::{
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use axum::{Router, body::Body};
use bytes::{Buf as _, Bytes};
use h3::{
    error::{Code, StreamError},
    server::{RequestResolver, RequestStream},
};
use http::{Request, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::BodyExt as _;
use quic::{
    driver::{self, Incoming},
    h3::{
        Connection, Content, Malformed, RecvStream, SendStream, check_fields, is_malformed, resolve,
    },
};
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
    time,
};
use tower::ServiceExt as _;
use tracing::debug;

use super::{Shared, routes::Peer};
use crate::cause;

/// For the fields of a request, in octets.
const MAX_FIELDS: u64 = 64 * 1024;

/// How long a client has, after its last answer, to learn that there will be no more.
const LINGER: Duration = Duration::from_secs(1);

type Resolver = RequestResolver<Connection, Bytes>;

/// Serves a connection from its handshake to its end.
pub(super) async fn serve(
    shared: Arc<Shared>,
    router: Router,
    incoming: Incoming,
    draining: watch::Receiver<bool>,
) {
    let metrics = &shared.metrics;
    let connection = match incoming.await {
        Ok(connection) => connection,
        Err(error) => {
            metrics.handshakes_failed.with_label_values(&[cause::word(&error)]).inc();
            debug!(%error, "handshake failed");
            return;
        }
    };
    metrics.accepted.inc();
    metrics.active.inc();
    if let Err(error) = requests(&connection, router, draining).await {
        debug!(%error, "connection ended");
    }
    connection.close(Code::H3_NO_ERROR.value(), b"");
    if let Some(error) = connection.close_reason() {
        metrics.ended.with_label_values(&[cause::word(&error)]).inc();
    }
    metrics.path_changes.inc_by(connection.path_changes());
    metrics.active.dec();
}

/// Serves requests until the connection ends, or until the last answer is delivered while draining.
async fn requests(
    connection: &driver::Connection,
    router: Router,
    mut draining: watch::Receiver<bool>,
) -> Result<(), h3::error::ConnectionError> {
    let mut http: h3::server::Connection<_, Bytes> = h3::server::builder()
        .max_field_section_size(MAX_FIELDS)
        .build(Connection::from(connection.clone()))
        .await?;
    let mut tasks = JoinSet::new();
    let mut told = false;
    loop {
        tokio::select! {
            accepted = http.accept() => {
                let Some(resolver) = accepted? else { break };
                let (router, peer) = (router.clone(), Peer::Quic(connection.clone()));
                tasks.spawn(async move {
                    if let Err(error) = request(resolver, router, peer).await {
                        debug!(%error, "request ended");
                    }
                });
            }
            Some(_) = tasks.join_next() => {}
            // The client closes once it knows; if not, it has nothing more to say.
            () = time::sleep(LINGER), if told && tasks.is_empty() => break,
            // The origin is gone when nobody can say so any more.
            asked = async { draining.wait_for(|draining| *draining).await.is_ok() }, if !told => {
                if !asked {
                    return Ok(());
                }
                told = true;
                // Those before the next one are answered, says the GOAWAY then.
                http.shutdown(1).await?;
            }
        }
    }
    while tasks.join_next().await.is_some() {}
    // The last answers may be on their way still. Who does not take them is closed when the origin ends.
    connection.close_when_delivered(Code::H3_NO_ERROR.value(), b"");
    connection.closed().await;
    Ok(())
}

async fn request(resolver: Resolver, router: Router, peer: Peer) -> Result<(), StreamError> {
    let (request, stream, content) = resolve(resolver).await?;
    let (mut send, recv) = stream.split();
    let (mut parts, ()) = request.into_parts();
    parts.extensions.insert(peer);
    let expects = expects_continue(&parts.headers);
    let reading = Arc::<Reading>::default();
    let body = RequestBody {
        recv: Some(recv),
        content,
        reading: Arc::clone(&reading),
        only_trailers: false,
        over: false,
    };
    let request = Request::from_parts(parts, Body::new(body));
    let mut routed = pin!(router.oneshot(request));
    let Ok(response) = tokio::select! {
        response = &mut routed => response,
        // "a server that receives a 100-continue expectation [...] MUST send either": it is wanted, or there is an answer.
        () = reading.wanted.notified(), if expects => {
            let mut proceed = Response::new(());
            *proceed.status_mut() = StatusCode::CONTINUE;
            send.send_response(proceed).await?;
            routed.await
        }
    };
    let answered = answer(&mut send, response, &reading).await;
    let unread = reading.unread.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(mut recv) = unread {
        // The end of a request may come after its answer has gone. A client that is told before to stop takes it for a failure.
        let end = async {
            for _ in 0..MAX_UNREAD {
                if !matches!(recv.recv_data().await, Ok(Some(_))) {
                    break;
                }
            }
        };
        let _ = time::timeout(LINGER, end).await;
    }
    if reading.malformed.load(Relaxed) {
        // Whatever was said to it.
        send.stop_stream(Code::H3_MESSAGE_ERROR);
    }
    answered
}

/// Sends a response, unless and until it shows that the request was malformed.
async fn answer(
    send: &mut RequestStream<SendStream<Bytes>, Bytes>,
    response: Response<Body>,
    reading: &Reading,
) -> Result<(), StreamError> {
    let (parts, mut body) = response.into_parts();
    if reading.malformed.load(Relaxed) {
        return Err(Malformed::Body.into());
    }
    send.send_response(Response::from_parts(parts, ())).await?;
    while let Some(frame) = body.frame().await {
        match frame.map(Frame::into_data) {
            Ok(Ok(data)) => send.send_data(data).await?,
            Ok(Err(_)) => {}
            Err(error) => {
                debug!(%error, "response abandoned");
                send.stop_stream(match reading.malformed.load(Relaxed) {
                    true => Code::H3_MESSAGE_ERROR,
                    false => Code::H3_EXCESSIVE_LOAD,
                });
                return Ok(());
            }
        }
    }
    // What nobody read of the request is looked at when it is given up.
    drop(body);
    if reading.malformed.load(Relaxed) {
        return Err(Malformed::Body.into());
    }
    send.finish().await
}

/// <https://www.rfc-editor.org/rfc/rfc9110.html#section-10.1.1>
fn expects_continue(fields: &http::HeaderMap) -> bool {
    fields
        .get(header::EXPECT)
        .is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// What the one who answers knows of the body.
#[derive(Default)]
struct Reading {
    /// Somebody wants to read it.
    wanted: Notify,
    /// It is not as its head has said.
    malformed: AtomicBool,
    /// What of it nobody has read.
    unread: Mutex<Option<RequestStream<RecvStream, Bytes>>>,
}

/// The body of a request, read as it is wanted, and held to what its head says.
struct RequestBody {
    /// There until it is dropped.
    recv: Option<RequestStream<RecvStream, Bytes>>,
    content: Content,
    reading: Arc<Reading>,
    /// All data has come, and perhaps trailers are to come.
    only_trailers: bool,
    /// It has ended, or failed.
    over: bool,
}

/// The most pieces that are looked at of a body that nobody reads.
const MAX_UNREAD: usize = 64;

/// Why there is no more of a body.
#[derive(Debug, thiserror::Error)]
enum BodyError {
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

impl RequestBody {
    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, BodyError>> {
        let Some(recv) = self.recv.as_mut().filter(|_| !self.over) else {
            return Poll::Ready(Ok(None));
        };
        if !self.only_trailers {
            let data = ready!(recv.poll_recv_data(cx)?);
            let data = data.map(|mut data| data.copy_to_bytes(data.remaining()));
            if let Some(data) = data {
                self.content.on_data(data.len())?;
                return Poll::Ready(Ok(Some(data)));
            }
            self.only_trailers = true;
        }
        if let Some(trailers) = ready!(recv.poll_recv_trailers(cx)?) {
            check_fields(&trailers)?;
        }
        self.content.on_end()?;
        Poll::Ready(Ok(None))
    }

    /// As [`Self::poll_data`], and takes note of what came of it.
    fn poll_noted(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BodyError>>> {
        let polled = ready!(self.poll_data(cx)).transpose();
        self.over |= !matches!(polled, Some(Ok(_)));
        let malformed = match &polled {
            Some(Err(BodyError::Malformed(_))) => true,
            Some(Err(BodyError::Stream(error))) => is_malformed(error),
            _ => false,
        };
        if malformed {
            self.reading.malformed.store(true, Relaxed);
            if let Some(recv) = &mut self.recv {
                recv.stop_sending(Code::H3_MESSAGE_ERROR);
            }
        }
        Poll::Ready(polled)
    }
}

impl http_body::Body for RequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        self.reading.wanted.notify_one();
        self.poll_noted(cx).map(|polled| polled.map(|piece| piece.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        self.over
    }
}

impl Drop for RequestBody {
    /// Nobody reads on. What has come all the same is looked at: a head that lies about it is no request, whoever answers it.
    fn drop(&mut self) {
        if self.content.is_announced() {
            let mut cx = Context::from_waker(Waker::noop());
            let mut pieces = 0..MAX_UNREAD;
            while pieces.next().is_some()
                && matches!(self.poll_noted(&mut cx), Poll::Ready(Some(Ok(_))))
            {}
        }
        if !self.over {
            let mut unread = self.reading.unread.lock().unwrap_or_else(PoisonError::into_inner);
            *unread = self.recv.take();
        }
    }
}
