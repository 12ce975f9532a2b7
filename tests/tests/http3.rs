//! HTTP/3 on our driver, with the crate `h3` at both ends, and with a client that breaks its rules.

use std::{future::poll_fn, net::SocketAddr, sync::Arc};

use anyhow::{Context as _, ensure};
use bytes::{Buf as _, Bytes, BytesMut};
use h3::error::Code;
use h3_datagram::datagram_handler::HandleDatagramsExt as _;
use http::{Method, Request, Response, StatusCode};
use quic::{
    driver::{self, Endpoint},
    h3 as http3,
    transport::{ClientConfig, ConnectionError, PeerClose, ServerConfig, StreamId},
};
use quic_lb_tests::{
    certificate::{Certificate, SERVER_NAME, client_tls, provider},
    pattern,
    site::LOCAL,
};

const ANY: SocketAddr = SocketAddr::new(LOCAL, 0);

type Requests = h3::client::SendRequest<http3::OpenStreams, Bytes>;
type Exchange = h3::client::RequestStream<http3::BidiStream<Bytes>, Bytes>;

#[tokio::test]
async fn requests_with_and_without_a_body_are_answered() -> anyhow::Result<()> {
    let site = Site::start().await?;
    let mut requests = site.http().await?;
    let (status, body) = fetch(&mut requests, Method::GET, "/bytes/10", Bytes::new()).await?;
    ensure!((status, &body[..]) == (StatusCode::OK, &pattern::octets(0, 10)[..]), "{body:?}");
    let (status, body) =
        fetch(&mut requests, Method::POST, "/echo", "there and back".into()).await?;
    ensure!((status, &body[..]) == (StatusCode::OK, b"there and back"), "{body:?}");
    let (status, _) = fetch(&mut requests, Method::GET, "/nowhere", Bytes::new()).await?;
    ensure!(status == StatusCode::NOT_FOUND, "{status}");
    Ok(())
}

#[tokio::test]
async fn bodies_larger_than_every_window_arrive_whole_on_many_streams_at_once() -> anyhow::Result<()>
{
    const LENGTH: usize = 6 << 20;
    const STREAMS: usize = 4;
    let site = Site::start().await?;
    let requests = site.http().await?;
    let fetches = (0..STREAMS).map(|_| {
        let mut requests = requests.clone();
        tokio::spawn(async move {
            fetch(&mut requests, Method::GET, &format!("/bytes/{LENGTH}"), Bytes::new()).await
        })
    });
    for fetched in fetches.collect::<Vec<_>>() {
        let (status, body) = fetched.await??;
        ensure!(status == StatusCode::OK, "{status}");
        ensure!(body == pattern::octets(0, LENGTH), "the body is another one");
    }
    let sent = Bytes::from(pattern::octets(0, LENGTH));
    let (_, body) = fetch(&mut requests.clone(), Method::POST, "/echo", sent.clone()).await?;
    ensure!(body == sent, "the echo is another one");
    Ok(())
}

#[tokio::test]
async fn datagrams_find_their_request() -> anyhow::Result<()> {
    let site = Site::start().await?;
    let connection = site.connect().await?;
    let (control, mut requests) = client(connection.clone()).await?;
    let mut reader = control.get_datagram_reader();
    let _running = run(control);
    // The second request, so that the stream's number has to be right.
    fetch(&mut requests, Method::GET, "/bytes/0", Bytes::new()).await?;
    let mut exchange = requests.send_request(request(Method::GET, "/datagrams")?).await?;
    let stream = StreamId::from(exchange.id());
    exchange.recv_response().await?;
    http3::send_datagram(&connection, stream, b"ping")?;
    let answer = reader.read_datagram().await?;
    ensure!(answer.stream_id() == exchange.id(), "{:?}", answer.stream_id());
    ensure!(&answer.payload()[..] == b"ping", "{answer:?}");
    exchange.finish().await?;
    Ok(())
}

#[tokio::test]
async fn a_response_that_is_abandoned_does_not_look_whole() -> anyhow::Result<()> {
    let site = Site::start().await?;
    let mut requests = site.http().await?;
    let fetched = fetch(&mut requests, Method::GET, "/abandoned", Bytes::new()).await;
    let error = fetched.err().context("half of it passed for the whole")?.downcast()?;
    let expected = Code::H3_REQUEST_CANCELLED;
    let h3::error::StreamError::RemoteTerminate { code, .. } = error else {
        return Err(error.into());
    };
    ensure!(code == expected, "{code}");
    Ok(())
}

#[tokio::test]
async fn a_request_that_the_server_does_not_want_to_the_end_is_answered() -> anyhow::Result<()> {
    let site = Site::start().await?;
    let mut requests = site.http().await?;
    let mut exchange = requests.send_request(request(Method::POST, "/bytes/5")?).await?;
    let response = exchange.recv_response().await?;
    ensure!(response.status() == StatusCode::OK, "{response:?}");
    ensure!(body_of(&mut exchange).await? == pattern::octets(0, 5), "the body is another one");
    // More than any window holds, so that it is told sooner or later.
    let block = Bytes::from(vec![0; 1 << 16]);
    let mut refused = None;
    for _ in 0..1024 {
        refused = exchange.send_data(block.clone()).await.err();
        if refused.is_some() {
            break;
        }
    }
    let error = refused.context("64 MiB were taken that nobody reads")?;
    let h3::error::StreamError::RemoteTerminate { code, .. } = error else {
        return Err(error.into());
    };
    ensure!(code == Code::H3_NO_ERROR, "{code}");
    Ok(())
}

#[tokio::test]
async fn closing_is_seen_with_its_code_by_the_other_side() -> anyhow::Result<()> {
    let site = Site::start().await?;
    let connection = site.connect().await?;
    let (control, _requests) = client(connection.clone()).await?;
    let running = run(control);
    site.server().await?.close(Code::H3_EXCESSIVE_LOAD.value(), b"enough");
    let error = running.await?;
    let h3::error::ConnectionError::Remote(error) = error else { return Err(error.into()) };
    ensure!(
        matches!(error, h3::quic::ConnectionErrorIncoming::ApplicationClose { error_code }
            if error_code == Code::H3_EXCESSIVE_LOAD.value()),
        "{error}"
    );
    Ok(())
}

/// RFC 9114, section 6.2.1: the type of the stream, then SETTINGS before anything else, once, and
/// the stream stays.
#[tokio::test]
async fn req_n01_control_streams_begin_with_settings_come_once_and_never_end() -> anyhow::Result<()>
{
    for (streams, code) in [
        (&[&[0x00, 0x00, 0][..]][..], Code::H3_MISSING_SETTINGS),
        (&[&[0x00, 0x07, 1, 0]], Code::H3_MISSING_SETTINGS),
        (&[&[0x00, 0x04, 0], &[0x00, 0x04, 0]], Code::H3_STREAM_CREATION_ERROR),
    ] {
        let (_site, connection) = Site::start().await?.connect_and_keep().await?;
        let _open = say(&connection, streams).await?;
        expect_close(&connection, code).await?;
    }
    let (_site, connection) = Site::start().await?.connect_and_keep().await?;
    let mut open = say(&connection, &[&[0x00, 0x04, 0]]).await?;
    open[0].finish()?;
    expect_close(&connection, Code::H3_CLOSED_CRITICAL_STREAM).await
}

/// RFC 9114, section 7.2: each row is a type, a length and a payload.
#[tokio::test]
async fn req_n02_frames_on_streams_that_are_not_theirs_are_unexpected() -> anyhow::Result<()> {
    let on_requests: [(&str, &[u8]); 6] = [
        ("DATA before HEADERS", &[0x00, 1, 0]),
        ("SETTINGS", &[0x04, 0]),
        ("GOAWAY", &[0x07, 1, 0]),
        ("MAX_PUSH_ID", &[0x0d, 1, 0]),
        ("PUSH_PROMISE", &[0x05, 1, 0]),
        ("PING of HTTP/2", &[0x06, 0]),
    ];
    for (name, frame) in on_requests {
        let (_site, connection) = Site::start().await?.connect_and_keep().await?;
        let (mut send, _recv) = connection.open_bi().await?;
        send.write_all(frame).await?;
        expect_close(&connection, Code::H3_FRAME_UNEXPECTED).await.context(name)?;
    }
    let on_control_streams: [(&str, &[u8]); 4] = [
        ("DATA", &[0x00, 0x04, 0, 0x00, 1, 0]),
        ("HEADERS", &[0x00, 0x04, 0, 0x01, 1, 0]),
        ("SETTINGS again", &[0x00, 0x04, 0, 0x04, 0]),
        ("WINDOW_UPDATE of HTTP/2", &[0x00, 0x04, 0, 0x08, 0]),
    ];
    for (name, stream) in on_control_streams {
        let (_site, connection) = Site::start().await?.connect_and_keep().await?;
        let _open = say(&connection, &[stream]).await?;
        expect_close(&connection, Code::H3_FRAME_UNEXPECTED).await.context(name)?;
    }
    Ok(())
}

/// RFC 9114, section 7.2.4: pairs of identifier and value.
#[tokio::test]
async fn req_n03_settings_that_come_twice_or_are_of_http2_are_errors() -> anyhow::Result<()> {
    let twice: &[u8] = &[0x00, 0x04, 4, 0x06, 1, 0x06, 1];
    let of_http2: &[u8] = &[0x00, 0x04, 2, 0x02, 0];
    for stream in [twice, of_http2] {
        let (_site, connection) = Site::start().await?.connect_and_keep().await?;
        let _open = say(&connection, &[stream]).await?;
        expect_close(&connection, Code::H3_SETTINGS_ERROR).await?;
    }
    Ok(())
}

/// RFC 9114, section 5.2: a server may say first that requests below 8 are answered, then that only
/// those below 4 are, and not the other way round. The end of its control stream is an error either
/// way, if it was not one before.
#[tokio::test]
async fn req_n05_a_goaway_that_takes_back_an_earlier_one_is_an_error() -> anyhow::Result<()> {
    for (goaways, code) in [
        (&[0x07, 1, 8, 0x07, 1, 4][..], Code::H3_CLOSED_CRITICAL_STREAM),
        (&[0x07, 1, 4, 0x07, 1, 8], Code::H3_ID_ERROR),
    ] {
        let certificate = Certificate::new()?;
        let (server, client) = endpoints(&certificate)?;
        let connecting = client.connect(server.local_addr(), SERVER_NAME)?;
        let (connection, incoming) = tokio::join!(connecting, server.accept());
        let (control, _requests) = self::client(connection?).await?;
        let running = run(control);
        let server = incoming.context("the endpoint is open")?.await?;
        let mut open = say(&server, &[&[&[0x00, 0x04, 0], goaways].concat()]).await?;
        open[0].finish()?;
        expect_close(&server, code).await?;
        running.await?;
    }
    Ok(())
}

/// RFC 9114, sections 6.2.3, 7.2.8 and 7.2.4.1: what is reserved to be ignored is.
#[tokio::test]
async fn req_n06_unknown_streams_frames_and_settings_are_ignored() -> anyhow::Result<()> {
    let site = Site::start().await?;
    let connection = site.connect().await?;
    let settings_and_a_frame = [&[0x00, 0x04, 2, 0x21, 7][..], &[0x21, 3, 1, 2, 3]].concat();
    let unknown_stream = [0x21, b'?'];
    let _open = say(&connection, &[&settings_and_a_frame, &unknown_stream]).await?;
    let (mut send, mut recv) = connection.open_bi().await?;
    // A reserved frame, then HEADERS: GET, https, the path `/` and the authority `x` (static 17, 23,
    // 1 and, by name, 0).
    send.write_all(&[0x21, 1, 0, 0x01, 8, 0, 0, 0xc0 | 17, 0xc0 | 23, 0xc0 | 1, 0x50, 1, b'x'])
        .await?;
    send.finish()?;
    let answer = recv.read_to_end(1000).await?;
    ensure!(answer.first() == Some(&0x01), "no HEADERS: {answer:?}");
    ensure!(connection.close_reason().is_none(), "{:?}", connection.close_reason());
    Ok(())
}

/// RFC 9204, sections 2.2 and 3.1: the decoder has no dynamic table, and the static one ends at 98.
#[tokio::test]
async fn req_n07_field_sections_that_cannot_be_decoded_end_the_connection() -> anyhow::Result<()> {
    let dynamic: &[u8] = &[0x01, 3, 2, 0, 0x80];
    let beyond_the_static_table: &[u8] = &[0x01, 4, 0, 0, 0xff, 99 - 63];
    for frame in [dynamic, beyond_the_static_table] {
        let (_site, connection) = Site::start().await?.connect_and_keep().await?;
        let (mut send, _recv) = connection.open_bi().await?;
        send.write_all(frame).await?;
        expect_close(&connection, Code::QPACK_DECOMPRESSION_FAILED).await?;
    }
    Ok(())
}

#[tokio::test]
async fn req_n04_a_malformed_request_costs_its_stream_and_no_more() -> anyhow::Result<()> {
    let site = Site::start().await?;
    let connection = site.connect().await?;
    let (mut send, mut recv) = connection.open_bi().await?;
    // HEADERS with nothing but `:method: GET` (static table, 17): the other pseudo-headers lack.
    send.write_all(&[0x01, 3, 0, 0, 0xc0 | 17]).await?;
    send.finish()?;
    let answer = recv.read_to_end(1000).await;
    let expected = driver::ReadError::Reset(Code::H3_MESSAGE_ERROR.value());
    ensure!(answer == Err(expected.into()), "{answer:?}");
    let (control, mut requests) = client(connection).await?;
    let _running = run(control);
    let (status, _) = fetch(&mut requests, Method::GET, "/bytes/1", Bytes::new()).await?;
    ensure!(status == StatusCode::OK, "{status}");
    Ok(())
}

/// Opens unidirectional streams that say this, and keeps them open.
async fn say(
    connection: &driver::Connection,
    streams: &[&[u8]],
) -> anyhow::Result<Vec<driver::SendStream>> {
    let mut open = Vec::new();
    for octets in streams {
        let mut send = connection.open_uni().await?;
        send.write_all(octets).await?;
        open.push(send);
    }
    Ok(open)
}

async fn expect_close(connection: &driver::Connection, code: Code) -> anyhow::Result<()> {
    let ConnectionError::PeerClosed(PeerClose::Application { code: seen, reason }) =
        connection.closed().await
    else {
        anyhow::bail!("{:?} instead of {code}", connection.close_reason());
    };
    ensure!(seen == code.value(), "{seen:#x} ({reason:?}) instead of {code}");
    Ok(())
}

/// A server and a client that agree on HTTP/3.
fn endpoints(certificate: &Certificate) -> anyhow::Result<(Endpoint, Endpoint)> {
    let mut tls = certificate.server_tls(provider())?;
    tls.alpn_protocols = vec![http3::ALPN.to_vec()];
    let server = Endpoint::server(ServerConfig::new(Arc::new(tls)), ANY)?;
    let mut tls = client_tls(certificate.der(), provider())?;
    tls.alpn_protocols = vec![http3::ALPN.to_vec()];
    let mut client = Endpoint::client(ANY)?;
    client.set_default_client_config(ClientConfig::new(Arc::new(tls)));
    Ok((server, client))
}

/// A server, and what clients need to know of it.
struct Site {
    endpoint: Endpoint,
    client: Endpoint,
    /// The server's ends of connections.
    accepted: tokio::sync::Mutex<tokio::sync::mpsc::UnboundedReceiver<driver::Connection>>,
}

impl Site {
    async fn start() -> anyhow::Result<Self> {
        let certificate = Certificate::new()?;
        let (endpoint, client) = endpoints(&certificate)?;
        let (announce, accepted) = tokio::sync::mpsc::unbounded_channel();
        let accepting = endpoint.clone();
        tokio::spawn(async move {
            while let Some(incoming) = accepting.accept().await {
                let Ok(connection) = incoming.await else { continue };
                let _ = announce.send(connection.clone());
                tokio::spawn(serve(connection));
            }
        });
        Ok(Self { endpoint, client, accepted: accepted.into() })
    }

    async fn connect(&self) -> anyhow::Result<driver::Connection> {
        Ok(self.client.connect(self.endpoint.local_addr(), SERVER_NAME)?.await?)
    }

    async fn connect_and_keep(self) -> anyhow::Result<(Self, driver::Connection)> {
        let connection = self.connect().await?;
        Ok((self, connection))
    }

    async fn http(&self) -> anyhow::Result<Requests> {
        let (control, requests) = client(self.connect().await?).await?;
        run(control);
        Ok(requests)
    }

    async fn server(&self) -> anyhow::Result<driver::Connection> {
        self.accepted.lock().await.recv().await.context("no connection")
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.endpoint.close(Code::H3_NO_ERROR.value(), b"the test ends");
    }
}

async fn client(
    connection: driver::Connection,
) -> anyhow::Result<(h3::client::Connection<http3::Connection, Bytes>, Requests)> {
    let connection = http3::Connection::from(connection);
    Ok(h3::client::builder().enable_datagram(true).build(connection).await?)
}

fn run(
    mut control: h3::client::Connection<http3::Connection, Bytes>,
) -> tokio::task::JoinHandle<h3::error::ConnectionError> {
    tokio::spawn(async move { poll_fn(|cx| control.poll_close(cx)).await })
}

fn request(method: Method, path: &str) -> anyhow::Result<Request<()>> {
    let uri = format!("https://{SERVER_NAME}{path}");
    Ok(Request::builder().method(method).uri(uri).body(())?)
}

async fn fetch(
    requests: &mut Requests,
    method: Method,
    path: &str,
    body: Bytes,
) -> anyhow::Result<(StatusCode, Bytes)> {
    let mut exchange = requests.send_request(request(method, path)?).await?;
    let (mut send, mut recv) = {
        if body.is_empty() {
            exchange.finish().await?;
        }
        exchange.split()
    };
    // Both at once: the echo waits for nobody.
    let sending = async {
        if !body.is_empty() {
            send.send_data(body).await?;
            send.finish().await?;
        }
        anyhow::Ok(())
    };
    let receiving = async {
        let response = recv.recv_response().await?;
        let mut all = BytesMut::new();
        while let Some(data) = recv.recv_data().await? {
            bytes::BufMut::put(&mut all, data);
        }
        anyhow::Ok((response.status(), all.freeze()))
    };
    Ok(tokio::try_join!(sending, receiving)?.1)
}

async fn body_of(exchange: &mut Exchange) -> anyhow::Result<Bytes> {
    let mut all = BytesMut::new();
    while let Some(data) = exchange.recv_data().await? {
        bytes::BufMut::put(&mut all, data);
    }
    Ok(all.freeze())
}

async fn serve(connection: driver::Connection) -> anyhow::Result<()> {
    let transport = http3::Connection::from(connection.clone());
    let mut http: h3::server::Connection<_, Bytes> =
        h3::server::builder().enable_datagram(true).build(transport).await?;
    let mut datagrams = http.get_datagram_reader();
    tokio::spawn(async move {
        while let Ok(datagram) = datagrams.read_datagram().await {
            let stream = StreamId::from(datagram.stream_id());
            let _ = http3::send_datagram(&connection, stream, datagram.payload());
        }
    });
    while let Some(resolver) = http.accept().await? {
        tokio::spawn(async move {
            let (request, mut exchange) = resolver.resolve_request().await?;
            let path = request.uri().path();
            let found = ["/bytes/", "/echo", "/datagrams", "/abandoned"];
            let found = found.iter().any(|start| path.starts_with(start));
            let status = if found { StatusCode::OK } else { StatusCode::NOT_FOUND };
            exchange.send_response(Response::builder().status(status).body(())?).await?;
            match path {
                "/echo" => {
                    while let Some(mut data) = exchange.recv_data().await? {
                        let data = data.copy_to_bytes(data.remaining());
                        exchange.send_data(data).await?;
                    }
                }
                "/datagrams" => while exchange.recv_data().await?.is_some() {},
                "/abandoned" => {
                    exchange.send_data(Bytes::from_static(b"the first half")).await?;
                    return Ok(());
                }
                _ => {
                    if let Some(length) = path.strip_prefix("/bytes/") {
                        for block in pattern::blocks(length.parse()?) {
                            exchange.send_data(block).await?;
                        }
                    }
                }
            }
            anyhow::Ok(exchange.finish().await?)
        });
    }
    Ok(())
}
