//! What an origin answers, and how it behaves over its life.

mod support;

use std::{collections::HashSet, sync::Arc, time::Duration};

use anyhow::{Context as _, ensure};
use backend_sim::{
    BACKEND_HEADER,
    certificate::{Certificate, Trust},
    load::Session,
    pattern,
    serve::{Misbehaviour, Origin, Settings},
};
use bytes::{Buf as _, Bytes};
use http::{Method, StatusCode};
use quic::{
    h3::ALPN,
    transport::{ClientConfig, ConnectionError, PeerClose},
};
use serde_json::Value;
use support::{CONFIG, NAME, Site, SlowLink, config, get, settings, soon, text};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

#[tokio::test]
async fn routes_answer_and_name_their_backend() -> anyhow::Result<()> {
    let site = Site::start(settings()?).await?;
    let session = site.session().await?;
    let page = text(&session, "/").await?;
    ensure!(page.contains("<span id=\"backend\">a</span>"), "{page}");
    ensure!(page.contains("<span id=\"protocol\">h3</span>"), "{page}");
    ensure!(text(&session, "/health").await? == "ok\n", "health");
    ensure!(text(&session, "/delay/1").await? == "1 milliseconds later\n", "delay");
    for length in [0_u64, 1, 65_536, 65_537, 3_000_000] {
        let mut answer = get(&session, &format!("/bytes/{length}")).await?;
        ensure!(answer.head.headers()[BACKEND_HEADER] == "a", "{answer:?}");
        let body = answer.body(1 << 22).await?;
        ensure!(body.len() as u64 == length && pattern::matches(0, &body), "{length}");
    }
    for (path, status) in [
        ("/nowhere", StatusCode::NOT_FOUND),
        ("/bytes/x", StatusCode::BAD_REQUEST),
        ("/bytes/-1", StatusCode::BAD_REQUEST),
        ("/delay/99999999", StatusCode::BAD_REQUEST),
        ("/echo", StatusCode::METHOD_NOT_ALLOWED),
    ] {
        let answer = get(&session, path).await?;
        ensure!(answer.head.status() == status, "{path}: {answer:?}");
    }
    ensure!(site.origin.counters().requests >= 13, "{:?}", site.origin.counters());
    Ok(())
}

#[tokio::test]
async fn whoami_says_who_answers_whom() -> anyhow::Result<()> {
    let site = Site::start(settings()?).await?;
    let session = site.session().await?;
    let who: Value = serde_json::from_str(&text(&session, "/whoami").await?)?;
    ensure!(who["backend"] == "a" && who["pool"] == "web", "{who}");
    ensure!(who["server_id"] == "0001" && who["config_id"] == 0, "{who}");
    ensure!(who["client"] == site.endpoint.local_addr().to_string(), "{who}");
    ensure!(who["path_changes"] == 0, "{who}");
    ensure!(cids(&who)?.contains(&remote_cid(&session)?), "{who}");
    Ok(())
}

#[tokio::test]
async fn bodies_come_back_up_to_the_limit() -> anyhow::Result<()> {
    let mut settings = settings()?;
    settings.max_body = 100_000;
    let site = Site::start(settings).await?;
    let session = site.session().await?;
    let sent: Bytes = pattern::blocks(100_000).flatten().collect::<Vec<_>>().into();
    let mut answer = session.request(Method::POST, "/echo", sent.clone()).await?;
    ensure!(answer.body(1 << 20).await? == sent, "the echo is another one");
    let too_much: Bytes = pattern::blocks(100_001).flatten().collect::<Vec<_>>().into();
    let outcome = async {
        let mut answer = session.request(Method::POST, "/echo", too_much).await?;
        answer.body(1 << 20).await
    };
    ensure!(outcome.await.is_err(), "more than the limit came back");
    ensure!(text(&session, "/health").await? == "ok\n", "the connection goes on");
    Ok(())
}

#[tokio::test]
async fn an_answer_before_the_end_of_the_request_is_an_answer() -> anyhow::Result<()> {
    let site = Site::start(settings()?).await?;
    let session = site.session().await?;
    // No window holds so much: the server asks for no more of it while it is on its way.
    let body = Bytes::from(vec![0; 32 << 20]);
    let answer = session.request(Method::POST, "/health", body).await?;
    ensure!(answer.head.status() == StatusCode::METHOD_NOT_ALLOWED, "{answer:?}");
    Ok(())
}

#[tokio::test]
async fn files_are_served_with_types_and_ranges_and_nothing_outside() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let root = folder.path().join("public");
    std::fs::create_dir(&root)?;
    std::fs::write(root.join("page.html"), "<p>a page</p>")?;
    std::fs::write(folder.path().join("secret"), "not for you")?;
    let mut settings = settings()?;
    settings.root = Some(root);
    let site = Site::start(settings).await?;
    let session = site.session().await?;
    let mut answer = get(&session, "/page.html").await?;
    ensure!(answer.head.headers()["content-type"] == "text/html", "{answer:?}");
    ensure!(answer.body(100).await? == b"<p>a page</p>", "another page");
    for path in ["/../secret", "/%2e%2e/secret", "/..%2fsecret", "/x/../../secret", "//secret"] {
        let mut answer = get(&session, path).await?;
        let (status, body) = (answer.head.status(), answer.body(100).await?);
        ensure!(status.is_client_error() && body != b"not for you", "{path}: {status}");
    }
    Ok(())
}

#[tokio::test]
async fn a_reload_gives_live_connections_new_connection_ids() -> anyhow::Result<()> {
    let site = Site::start(settings()?).await?;
    let session = site.session().await?;
    let zero = CONFIG.lines().find(|line| line.contains("config_id: 0,")).context("it is there")?;
    let six = "      - { config_id: 6, server_id_length: 3, nonce_length: 8 }";
    let ids = CONFIG
        .replace("server_id: \"0001\"", "server_ids: { 0: \"0001\", 6: \"a1b2c3\" }")
        .replace("server_id: \"0002\"", "server_ids: { 0: \"0002\", 6: \"a1b2c4\" }");
    // The last of the file is the newest, whatever its number.
    for (order, newest, server_id) in [([zero, six], 6, "a1b2c3"), ([six, zero], 0, "0001")] {
        let before = cids(&serde_json::from_str(&text(&session, "/whoami").await?)?)?;
        site.origin.reload(&config(&ids.replace(zero, &order.join("\n")))?)?;
        // A few round trips until the client has asked no more for the old ones.
        let mut left = 100;
        loop {
            let who: Value = serde_json::from_str(&text(&session, "/whoami").await?)?;
            let now = cids(&who)?;
            if now.is_disjoint(&before) {
                ensure!(who["config_id"] == newest && who["server_id"] == server_id, "{who}");
                ensure!(now.contains(&remote_cid(&session)?), "{who}");
                break;
            }
            left -= 1;
            ensure!(left > 0, "old connection IDs are still in use");
        }
    }
    Ok(())
}

#[tokio::test]
async fn another_certificate_is_for_new_connections_and_one_of_no_use_for_none()
-> anyhow::Result<()> {
    let mut site = Site::start(settings()?).await?;
    let before = site.session().await?;
    let renewed = Certificate::make([NAME.to_owned()])?;
    site.origin.use_certificate(&renewed)?;
    ensure!(site.session().await.is_err(), "it goes on with the one before");
    let trust = Trust::Roots(renewed.chain().to_vec());
    site.client = ClientConfig::new(Arc::new(trust.client(&[ALPN])?));
    let after = site.session().await?;
    for session in [&before, &after] {
        text(session, "/health").await?;
    }
    // Draining is not taken back by it.
    let Site { origin, .. } = &site;
    let (drained, used) = tokio::join!(origin.drain(Duration::from_millis(200)), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        origin.use_certificate(&renewed)
    });
    let () = drained;
    used?;
    ensure!(site.session().await.is_err(), "it accepts again");
    Ok(())
}

#[tokio::test]
async fn datagrams_of_other_servers_are_counted_by_their_server_id() -> anyhow::Result<()> {
    let site = Site::start(settings()?).await?;
    let mut other = settings()?;
    other.backend = "b".into();
    let other = Site::start(other).await?;
    let session = other.session().await?;
    text(&session, "/health").await?;
    let to = remote_cid(&session)?;
    let mut datagram = vec![0x40];
    datagram.extend(
        (0..to.len()).step_by(2).filter_map(|at| u8::from_str_radix(&to[at..at + 2], 16).ok()),
    );
    datagram.extend([0; 40]);
    let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
    socket.send_to(&datagram, site.origin.address())?;
    datagram[1] |= 0xe0;
    socket.send_to(&datagram, site.origin.address())?;
    soon("both are seen", || site.origin.counters().unclaimed >= 2).await?;
    ensure!(site.origin.counters().misrouted == 1, "{:?}", site.origin.counters());
    let metrics = site.origin.metrics();
    for id in ["0002", "unknown"] {
        let line = format!("unknown_cid_datagrams_total{{server_id=\"{id}\"}} 1");
        ensure!(metrics.contains(&line), "{metrics}");
    }
    Ok(())
}

#[tokio::test]
async fn draining_answers_what_was_asked_and_closes_without_an_error() -> anyhow::Result<()> {
    let site = Site::start(settings()?).await?;
    let session = site.session().await?;
    let connection = session.connection();
    let sent = || connection.stats().map_or(0, |stats| stats.sent.datagrams);
    let before = sent();
    let (answer, drained) = tokio::join!(text(&session, "/delay/300"), async {
        // What was sent and is not on its way any more has arrived.
        let in_flight = || connection.path().map_or(0, |path| path.in_flight);
        soon("the request arrives", || sent() > before && in_flight() == 0).await?;
        site.origin.drain(Duration::from_secs(20)).await;
        anyhow::Ok(())
    });
    drained?;
    ensure!(answer? == "300 milliseconds later\n", "the answer");
    let ConnectionError::PeerClosed(PeerClose::Application { code, .. }) =
        session.connection().closed().await
    else {
        anyhow::bail!("{:?}", session.connection().close_reason());
    };
    ensure!(code == h3::error::Code::H3_NO_ERROR.value(), "{code:#x}");
    let late = tokio::time::timeout(Duration::from_millis(300), site.session()).await;
    ensure!(!matches!(late, Ok(Ok(_))), "nothing new is accepted");
    ensure!(site.origin.counters().accepted == 1, "{:?}", site.origin.counters());
    Ok(())
}

/// The end of a request may be on its way still when it is answered.
#[tokio::test]
async fn a_request_whose_end_comes_after_its_answer_is_not_told_to_stop() -> anyhow::Result<()> {
    let site = Site::start(settings()?).await?;
    let connecting = site.endpoint.connect_with(&site.client, site.origin.address(), NAME)?;
    let connection = connecting.await?;
    let http = quic::h3::Connection::from(connection.clone());
    let (mut driver, mut requests) = h3::client::builder().build::<_, _, Bytes>(http).await?;
    let driving = tokio::spawn(async move { drop(driver.wait_idle().await) });
    let request = http::Request::get("https://localhost/bytes/1000").body(())?;
    let mut stream = requests.send_request(request).await?;
    ensure!(stream.recv_response().await?.status() == StatusCode::OK);
    let mut octets = 0;
    while let Some(chunk) = stream.recv_data().await? {
        octets += chunk.remaining();
    }
    ensure!(octets == 1000, "{octets}");
    // Whatever the server has said since is here when it has answered another request.
    let mut other =
        requests.send_request(http::Request::get("https://localhost/health").body(())?).await?;
    other.finish().await?;
    ensure!(other.recv_response().await?.status() == StatusCode::OK);
    stream.finish().await?;
    driving.abort();
    Ok(())
}

/// The last of an answer is not delivered when it is written.
#[tokio::test]
async fn draining_delivers_what_a_slow_link_still_carries() -> anyhow::Result<()> {
    const OCTETS: usize = 200 << 10;
    let site = Site::start(settings()?).await?;
    let link = SlowLink::start(site.origin.address()).await?;
    let session = site.session_by(link.address).await?;
    let mut answer = get(&session, &format!("/bytes/{OCTETS}")).await?;
    let drained = async {
        // All of it is written by now, and little has arrived.
        site.origin.drain(Duration::from_secs(60)).await;
    };
    let (body, ()) = tokio::join!(answer.body(1 << 20), drained);
    let body = body?;
    ensure!(body.len() == OCTETS && pattern::matches(0, &body), "{} octets", body.len());
    let ConnectionError::PeerClosed(PeerClose::Application { code, .. }) =
        session.connection().closed().await
    else {
        anyhow::bail!("{:?}", session.connection().close_reason());
    };
    ensure!(code == h3::error::Code::H3_NO_ERROR.value(), "{code:#x}");
    Ok(())
}

/// One that takes nothing does not keep an origin from its end.
#[tokio::test]
async fn draining_ends_in_time_where_nothing_is_taken() -> anyhow::Result<()> {
    let site = Site::start(settings()?).await?;
    let session = site.session().await?;
    // More than the windows of a client that does not read.
    let _answer = get(&session, "/bytes/40000000").await?;
    let drained = site.origin.drain(Duration::from_millis(300));
    tokio::time::timeout(Duration::from_secs(20), drained).await.context("it goes on")?;
    session.connection().closed().await;
    Ok(())
}

#[tokio::test]
async fn alerts_on_servers_use_metrics_that_exist() -> anyhow::Result<()> {
    let site = Site::start(settings()?).await?;
    let rules = std::fs::read_to_string(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../deploy/prometheus/rules.yaml"
    ))?;
    let words = rules.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let names: Vec<_> = words.filter(|word| word.starts_with("backend_sim_")).collect();
    ensure!(!names.is_empty(), "there is none");
    for name in names {
        soon(name, || site.origin.metrics().contains(&format!("# TYPE {name} "))).await?;
    }
    Ok(())
}

#[tokio::test]
async fn misbehaviour_is_what_was_asked_for() -> anyhow::Result<()> {
    let with = |misbehaviour| {
        let mut settings = settings()?;
        settings.misbehaviour = misbehaviour;
        anyhow::Ok(settings)
    };
    let refusing = Site::start(with(Misbehaviour::Refusing)?).await?;
    let refused = refusing.session().await.err().context("it refuses")?.to_string();
    ensure!(refused.contains("CONNECTION_REFUSED"), "{refused}");

    let slow = Site::start(with(Misbehaviour::Slow(Duration::from_millis(100)))?).await?;
    let session = slow.session().await?;
    let began = std::time::Instant::now();
    text(&session, "/health").await?;
    ensure!(began.elapsed() >= Duration::from_millis(100), "it was not slow");

    let wrong = Site::start(with(Misbehaviour::WrongServerId)?).await?;
    let session = wrong.session().await?;
    let pool = config(CONFIG)?.pools.swap_remove(0);
    let id = session.connection().remote_cid().context("it is there")?;
    let carried = pool.cid_configs[0].decode(id.as_slice()).context("it decodes")?;
    ensure!(carried.as_slice() == [0, 2], "{carried:?}");

    let silent = Site::start(with(Misbehaviour::Silent)?).await?;
    let attempt = tokio::time::timeout(Duration::from_millis(300), silent.session()).await;
    ensure!(attempt.is_err(), "somebody answered");
    Ok(())
}

/// 64 KiB are the most that the fields of a message may have (RFC 9114, section 4.2.2).
#[tokio::test]
async fn req_n07_requests_with_too_many_fields_are_refused_and_cost_nothing_else()
-> anyhow::Result<()> {
    let site = Site::start(settings()?).await?;
    let session = site.session().await?;
    for (length, answered) in [(60_000_u32, true), (70_000, false)] {
        // GET, https, `/health`, `x` and a field of its own with a long value.
        let mut fields = vec![0, 0, 0xc0 | 17, 0xc0 | 23, 0x51, 7];
        fields.extend_from_slice(b"/health\x50\x01x\x21a");
        fields.extend(prefixed(length));
        fields.resize(fields.len() + usize::try_from(length)?, b'v');
        let mut frame = vec![1];
        quic::varint::write(fields.len() as u64, &mut frame);
        let (mut send, mut recv) = session.connection().open_bi().await?;
        send.write_all(&[frame, fields].concat()).await?;
        send.finish()?;
        let answer = recv.read_to_end(1 << 20).await;
        // HEADERS, with the status 200 (25 of the static table), or a reset.
        let ok =
            answer.as_ref().is_ok_and(|answer| answer[0] == 1 && answer.contains(&(0xc0 | 25)));
        ensure!(ok == answered, "{length}: {answer:?}");
    }
    ensure!(text(&session, "/health").await? == "ok\n", "the connection goes on");
    Ok(())
}

/// RFC 9114, sections 4.1.2, 4.2 and 4.3: each costs its stream, and the connection goes on.
#[tokio::test]
async fn req_n04_malformed_requests_are_stream_errors() -> anyhow::Result<()> {
    let site = Site::start(settings()?).await?;
    let session = site.session().await?;
    let head = [(":method", "POST"), (":scheme", "https"), (":authority", "localhost")];
    let echo = [&head[..], &[(":path", "/echo")]].concat();
    let health = [(":method", "GET"), (":scheme", "https"), (":path", "/health"), ("host", "x")];
    let and = |fields: &[Field], more: &[Field]| [fields, more].concat();
    let message_error = h3::error::Code::H3_MESSAGE_ERROR.value();
    for (fields, body, good) in [
        (and(&echo, &[]), "abc", true),
        (and(&echo, &[("content-length", "3")]), "abc", true),
        (and(&echo, &[("te", "trailers")]), "abc", true),
        (and(&health, &[]), "", true),
        (and(&health, &[("content-length", "3")]), "abc", true),
        // A length that does not match, either way, whether somebody reads the body or nobody does.
        (and(&echo, &[("content-length", "4")]), "abc", false),
        (and(&echo, &[("content-length", "2")]), "abc", false),
        (and(&echo, &[("content-length", "3")]), "", false),
        (and(&health, &[("content-length", "4")]), "abc", false),
        (and(&health, &[("content-length", "2")]), "abc", false),
        (and(&echo, &[("content-length", "3"), ("content-length", "4")]), "abc", false),
        (and(&echo, &[("content-length", "+3")]), "abc", false),
        // Fields about connections.
        (and(&echo, &[("transfer-encoding", "chunked")]), "abc", false),
        (and(&echo, &[("connection", "close")]), "abc", false),
        (and(&echo, &[("keep-alive", "timeout=5")]), "abc", false),
        (and(&echo, &[("proxy-connection", "close")]), "abc", false),
        (and(&echo, &[("upgrade", "websocket")]), "abc", false),
        (and(&echo, &[("te", "gzip")]), "abc", false),
        // Pseudo-header fields.
        (and(&echo, &[(":path", "/health")]), "abc", false),
        (and(&echo, &[("accept", "*/*"), (":path", "/health")]), "abc", false),
        (and(&head, &[("accept", "*/*"), (":path", "/echo")]), "abc", false),
        (and(&echo, &[(":status", "200")]), "abc", false),
        (and(&echo, &[(":protocol", "websocket")]), "abc", false),
        (and(&head, &[]), "abc", false),
        (and(&head, &[(":path", "")]), "abc", false),
        (and(&head, &[(":path", "echo")]), "abc", false),
        (and(&echo[1..], &[]), "abc", false),
        (and(&[head[0], head[2]], &[(":path", "/echo")]), "abc", false),
        (and(&health[..3], &[("host", "x"), ("host", "y")]), "", false),
        (and(&health[..3], &[(":authority", "somebody@x")]), "", false),
    ] {
        let (mut send, mut recv) = session.connection().open_bi().await?;
        let mut request = headers(&fields);
        if !body.is_empty() {
            request.extend([0, u8::try_from(body.len())?]);
            request.extend_from_slice(body.as_bytes());
        }
        // At once: nobody is to find out only when it is too late.
        send.write_all(&request).await?;
        send.finish()?;
        let answer = recv.read_to_end(1000).await;
        match good {
            true => ensure!(answer.as_ref().is_ok_and(|a| a[0] == 1), "{fields:?}: {answer:?}"),
            false => {
                let expected = quic::driver::ReadError::Reset(message_error);
                ensure!(answer == Err(expected.into()), "{fields:?}: {answer:?}");
            }
        }
    }
    ensure!(text(&session, "/health").await? == "ok\n", "the connection goes on");
    Ok(())
}

/// Trailers are fields too.
#[tokio::test]
async fn req_n04_trailers_about_a_connection_are_malformed() -> anyhow::Result<()> {
    judge_trailers(&[(("checksum", "1"), true), (("connection", "close"), false)]).await
}

/// RFC 9114, section 4.3: those of heads, of answers, and of nothing.
#[tokio::test]
async fn req_n04_pseudo_header_fields_among_trailers_are_malformed() -> anyhow::Result<()> {
    judge_trailers(&[
        (("checksum", "1"), true),
        ((":path", "/health"), false),
        ((":authority", "x"), false),
        ((":status", "200"), false),
        ((":protocol", "websocket"), false),
        ((":checksum", "1"), false),
    ])
    .await
}

/// Sends requests with each of these trailers, of which some are good.
async fn judge_trailers(trailers: &[(Field, bool)]) -> anyhow::Result<()> {
    let site = Site::start(settings()?).await?;
    let session = site.session().await?;
    let fields = [(":method", "POST"), (":scheme", "https"), (":path", "/echo"), ("host", "x")];
    for &(trailer, good) in trailers {
        let (mut send, mut recv) = session.connection().open_bi().await?;
        let request = [headers(&fields), vec![0, 3, b'a', b'b', b'c'], headers(&[trailer])];
        send.write_all(&request.concat()).await?;
        send.finish()?;
        let answer = recv.read_to_end(1000).await;
        let error = quic::driver::ReadError::Reset(h3::error::Code::H3_MESSAGE_ERROR.value());
        let fits = if good { answer.is_ok() } else { answer == Err(error.into()) };
        ensure!(fits, "{trailer:?}: {answer:?}");
    }
    ensure!(text(&session, "/health").await? == "ok\n", "the connection goes on");
    Ok(())
}

#[tokio::test]
async fn who_waits_to_be_told_to_send_a_body_is_told() -> anyhow::Result<()> {
    let site = Site::start(settings()?).await?;
    let session = site.session().await?;
    /// The status 100, number 63 of the static table.
    const CONTINUE: [u8; 2] = [0xff, 0];
    let request = |path: &'static str, length: &'static str| {
        headers(&[
            (":method", "POST"),
            (":scheme", "https"),
            (":path", path),
            ("host", "x"),
            ("expect", "100-continue"),
            ("content-length", length),
        ])
    };
    let (mut send, mut recv) = session.connection().open_bi().await?;
    send.write_all(&request("/echo", "3")).await?;
    let interim = frame(&mut recv).await?;
    ensure!(contains(&interim, &CONTINUE), "{interim:?}");
    send.write_all(&[0, 3, b'a', b'b', b'c']).await?;
    send.finish()?;
    let answer = recv.read_to_end(1000).await?;
    ensure!(contains(&answer, &[0xc0 | 25]) && contains(&answer, b"abc"), "{answer:?}");

    // Where nobody wants the body, there is an answer without it.
    for (path, length) in [("/echo", "99999999999"), ("/health", "3")] {
        let (mut send, mut recv) = session.connection().open_bi().await?;
        send.write_all(&request(path, length)).await?;
        let answer = frame(&mut recv).await?;
        ensure!(!contains(&answer, &CONTINUE), "{path}: {answer:?}");
    }
    Ok(())
}

#[tokio::test]
async fn several_ranges_of_a_file_come_in_one_answer() -> anyhow::Result<()> {
    let root = tempfile::tempdir()?;
    std::fs::write(root.path().join("digits.txt"), "0123456789")?;
    let mut settings = settings()?;
    settings.root = Some(root.path().to_owned());
    let site = Site::start(settings).await?;
    let session = site.session().await?;
    let ask = async |method: Method, fields: &[(http::HeaderName, &str)]| {
        let mut map = http::HeaderMap::new();
        for (name, value) in fields {
            map.insert(name, value.parse()?);
        }
        let mut answer = session.request_with(method, "/digits.txt", map, Bytes::new()).await?;
        let body = String::from_utf8(answer.body(10_000).await?)?;
        anyhow::Ok((answer.head, body))
    };
    let range = http::header::RANGE;
    let (head, body) = ask(Method::GET, &[(range.clone(), "bytes=0-1, 4-5,-2")]).await?;
    ensure!(head.status() == StatusCode::PARTIAL_CONTENT, "{head:?}");
    let kind = head.headers()["content-type"].to_str()?;
    let boundary = kind.strip_prefix("multipart/byteranges; boundary=").context("several")?;
    let part = |place: &str, digits: &str| {
        let fields = format!("content-type: text/plain\r\ncontent-range: bytes {place}/10");
        format!("--{boundary}\r\n{fields}\r\n\r\n{digits}\r\n")
    };
    let parts = [part("0-1", "01"), part("4-5", "45"), part("8-9", "89")].concat();
    ensure!(body == format!("{parts}--{boundary}--\r\n"), "{body}");
    ensure!(head.headers()["content-length"] == body.len().to_string(), "{head:?}");

    let many = (0..17).map(|nth| format!("{nth}-{nth}")).collect::<Vec<_>>().join(",");
    let many = format!("bytes={many}");
    for (asked, status, expected) in [
        ("bytes=2-3,40-50", StatusCode::PARTIAL_CONTENT, "23"),
        ("bytes=40-50,60-", StatusCode::RANGE_NOT_SATISFIABLE, ""),
        // More than anybody needs: the whole file.
        ("bytes=0-4,3-5", StatusCode::OK, "0123456789"),
        (&many, StatusCode::OK, "0123456789"),
    ] {
        let (head, body) = ask(Method::GET, &[(range.clone(), asked)]).await?;
        ensure!(head.status() == status && body == expected, "{asked}: {head:?} {body}");
    }
    for asked in ["bytes=0-1,4-5", "bytes=0-1"] {
        let conditional = [(range.clone(), asked), (http::header::IF_RANGE, "\"another\"")];
        let (head, body) = ask(Method::GET, &conditional).await?;
        ensure!(head.status() == StatusCode::OK && body == "0123456789", "{asked}: {head:?}");
    }
    Ok(())
}

type Field = (&'static str, &'static str);

/// A HEADERS frame with literal names and values.
fn headers(fields: &[Field]) -> Vec<u8> {
    let mut section = vec![0, 0];
    for (name, value) in fields {
        match u8::try_from(name.len()).unwrap_or(u8::MAX) {
            len if len < 7 => section.push(0x20 | len),
            len => section.extend([0x27, len - 7]),
        }
        section.extend_from_slice(name.as_bytes());
        section.push(u8::try_from(value.len()).unwrap_or(u8::MAX));
        section.extend_from_slice(value.as_bytes());
    }
    let mut frame = vec![1];
    quic::varint::write(section.len() as u64, &mut frame);
    frame.extend(section);
    frame
}

/// The next frame, which is a short one.
async fn frame(recv: &mut quic::driver::RecvStream) -> anyhow::Result<Vec<u8>> {
    let mut head = [0; 2];
    recv.read_exact(&mut head).await?;
    let mut len = usize::from(head[1]);
    if head[1] & 0xc0 == 0x40 {
        let mut low = [0];
        recv.read_exact(&mut low).await?;
        len = usize::from(head[1] & 0x3f) << 8 | usize::from(low[0]);
    }
    let mut payload = vec![0; len];
    recv.read_exact(&mut payload).await?;
    Ok(payload)
}

fn contains(octets: &[u8], part: &[u8]) -> bool {
    octets.windows(part.len()).any(|window| window == part)
}

/// An integer after a prefix of seven bits (RFC 9204, section 4.1.1), the prefix included.
fn prefixed(value: u32) -> Vec<u8> {
    let (mut octets, mut left) = (vec![0x7f], value - 0x7f);
    while left >= 0x80 {
        octets.push(left.to_le_bytes()[0] | 0x80);
        left >>= 7;
    }
    octets.push(left.to_le_bytes()[0]);
    octets
}

#[tokio::test]
async fn browsers_are_told_where_http3_is() -> anyhow::Result<()> {
    let mut settings = settings()?;
    settings.https = Some(([127, 0, 0, 1], 0).into());
    let trust = Trust::Roots(settings.certificate.chain().to_vec());
    let tls = tokio_rustls::TlsConnector::from(Arc::new(trust.client(&[b"http/1.1"])?));
    let site = Site::start(settings).await?;
    let address = site.origin.https_address().context("it listens")?;
    let stream = tokio::net::TcpStream::connect(address).await?;
    let mut stream = tls.connect(NAME.try_into()?, stream).await?;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    ensure!(answer.contains("alt-svc: h3=\":4433\"; ma=3600"), "{answer}");
    ensure!(answer.contains("<span id=\"backend\">a</span>"), "{answer}");
    Ok(())
}

#[tokio::test]
async fn what_is_wrong_is_said_in_one_sentence() -> anyhow::Result<()> {
    let certificate = || Certificate::make([NAME.to_owned()]);
    let unknown = Settings::new(config(CONFIG)?, "c", certificate()?);
    let sentence = Origin::start(unknown).await.err().context("unknown")?.to_string();
    ensure!(
        sentence == "there is no backend \"c\" in the configuration; it has web/a, web/b",
        "{sentence}"
    );
    let taken = std::net::UdpSocket::bind("127.0.0.1:0")?;
    let mut in_use = settings()?;
    in_use.address = Some(taken.local_addr()?);
    let sentence = Origin::start(in_use).await.err().context("in use")?.to_string();
    ensure!(
        sentence.ends_with("stop the process that listens there, or choose another address"),
        "{sentence}"
    );
    let mut no_folder = settings()?;
    no_folder.root = Some("/nowhere/at/all".into());
    let sentence = Origin::start(no_folder).await.err().context("no folder")?.to_string();
    ensure!(sentence == "/nowhere/at/all is not a folder to serve files from", "{sentence}");
    let mut no_config = settings()?;
    no_config.config_id = quic::routable::ConfigId::new(3);
    let sentence = Origin::start(no_config).await.err().context("no such ID")?.to_string();
    ensure!(
        sentence == "the pool \"web\" has no quic_lb configuration with config_id 3",
        "{sentence}"
    );
    let missing = Certificate::read("/nowhere/cert.pem".as_ref(), "/nowhere/key.pem".as_ref());
    let sentence = missing.err().context("missing")?.to_string();
    ensure!(
        sentence
            == "/nowhere/cert.pem does not hold a chain of certificates in PEM: No such file or directory",
        "{sentence}"
    );
    Ok(())
}

fn cids(who: &Value) -> anyhow::Result<HashSet<String>> {
    let ids = who["connection_ids"].as_array().context("no connection IDs")?;
    Ok(ids.iter().filter_map(Value::as_str).map(str::to_owned).collect())
}

fn remote_cid(session: &Session) -> anyhow::Result<String> {
    let id = session.connection().remote_cid().context("no connection")?;
    Ok(id.as_slice().iter().map(|octet| format!("{octet:02x}")).collect())
}
