//! A check that begins a connection: it takes all that a client needs of a server, from its certificate to its
//! randomness.
//!
//! The transport has no sockets of its own, so that what is read, and for how long, is decided here: a server
//! that floods or says half of what it should ends its own check, and no more of it is read. A check has passed
//! when the handshake is done, whatever the server's application makes of the connection: it may well close
//! one that asks for nothing. When the server's transport objects, clients get no further either.
//!
//! Where something is asked over HTTP/3, it takes the answer too. The connection IDs that the server has chosen come
//! out in either case: the first one, and those that it gives right behind the handshake.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use quic::{
    connection_id::ConnectionId,
    header::Version,
    invariants::Packet,
    random::Random,
    token::InvalidToken,
    transport::{
        AnyCertificate, ClientConfig, Code, Connection, ConnectionError, ConnectionHandle, Dir,
        Endpoint, EndpointConfig, Event, PeerClose, Read, Received, StreamId, TransportConfig,
    },
};
use quic_lb_config::{CertificatePolicy, Handshake, Request};
use rustls::{RootCertStore, client::Resumption, crypto::aws_lc_rs};
use tokio::{
    net::UdpSocket,
    time::{sleep_until, timeout},
};
use tracing::debug;

use super::{
    ask::{connect, failure},
    honours::TokenAnswer,
    http3::{self, Answer, Said},
};
use crate::{
    admission::tokens::{MAX_RETRY_LEN, Tokens},
    check::{CheckResult, Finding},
    control::plane::backends::CheckTarget,
};

/// Datagrams that are read: several times what the longest chain of certificates takes.
const READS: usize = 64;

/// The most octets of a datagram; we announce less.
const DATAGRAM_LEN: usize = 2048;

/// Connection IDs of a server that are looked at; we announce fewer.
const CIDS: usize = 16;

/// How long a server may take to give connection IDs after it has confirmed the handshake. It does both at once,
/// or with the next flight.
const CIDS_FOLLOW: Duration = Duration::from_millis(25);

/// All datagrams fit a path that carries QUIC at all.
const MAX_UDP_PAYLOAD: u16 = 1200;

/// What the handshakes with the servers of a pool have in common.
#[derive(Debug)]
pub(super) struct Client {
    config: ClientConfig,
    /// `None` for the address.
    server_name: Option<String>,
    /// What is asked over HTTP/3, if anything is.
    request: Option<Request>,
}

impl Client {
    /// A client that connects as `handshake` says, with `limit` of time for each, and makes this request.
    pub(super) fn new(
        handshake: &Handshake,
        request: Option<&Request>,
        limit: Duration,
    ) -> Result<Self, rustls::Error> {
        let Handshake { alpn, server_name, certificate } = handshake;
        let provider = Arc::new(aws_lc_rs::default_provider());
        let any = AnyCertificate::new(&provider);
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?;
        let builder = match certificate {
            CertificatePolicy::Verified(of) => {
                builder.with_root_certificates(RootCertStore { roots: of.anchors.as_ref().clone() })
            }
            CertificatePolicy::Ignored => {
                builder.dangerous().with_custom_certificate_verifier(Arc::new(any))
            }
        };
        let mut tls = builder.with_no_client_auth();
        tls.alpn_protocols = vec![alpn.clone().into_bytes()];
        // Each check is to see all of a handshake.
        tls.resumption = Resumption::disabled();
        let transport = TransportConfig {
            handshake_timeout: limit,
            // What is lost is sent again within the limit, twice.
            initial_rtt: limit / 20,
            max_udp_payload: MAX_UDP_PAYLOAD,
            ecn: false,
            follow_preferred_address: false,
            ..TransportConfig::default()
        };
        let transport = Arc::new(transport);
        let config = ClientConfig { tls: Arc::new(tls), transport, version: Version::V1 };
        Ok(Self { config, server_name: server_name.clone(), request: request.cloned() })
    }
}

/// With what a connection begins as those of clients do that have been sent a Retry.
pub(super) struct Offer {
    /// What makes the Retry, and the token in it.
    pub(super) tokens: Arc<Tokens>,
    /// When it is made.
    pub(super) time: SystemTime,
}

/// Begins a connection, and ends it as soon as it is known to work.
pub(super) async fn try_out(
    target: &CheckTarget,
    client: &Result<Client, rustls::Error>,
) -> Finding {
    let mut attempt = match Attempt::begin(target, client, None) {
        Ok(attempt) => attempt,
        Err(error) => return failure(target, &error).into(),
    };
    let result = match timeout(target.check.timeout, attempt.run()).await {
        Ok(Ok(End::Passed)) => CheckResult::Answered,
        Ok(Ok(End::Flooded)) => attempt.result_so_far(CheckResult::Wrong),
        Ok(Ok(End::Closed(error))) => {
            let (pool, backend) = &target.name;
            debug!(pool, backend, address = %target.address, %error, "check");
            of_end(attempt.is_content(), &error)
        }
        Ok(Ok(End::Answered(Said::Status(status)))) => {
            let (pool, backend) = &target.name;
            debug!(pool, backend, address = %target.address, status, "check");
            CheckResult::Status
        }
        Ok(Ok(End::Answered(Said::Nothing | Said::Nonsense))) => CheckResult::Wrong,
        Ok(Err(error)) => failure(target, &error),
        Err(_) => attempt.result_so_far(CheckResult::Timeout),
    };
    let cids = attempt.close();
    Finding { cids, ..result.into() }
}

/// Begins a connection as a client does that has been sent a Retry: says what the server makes of the token.
pub(super) async fn offer(
    target: &CheckTarget,
    client: &Result<Client, rustls::Error>,
    offer: Offer,
) -> TokenAnswer {
    let Ok(mut attempt) = Attempt::begin(target, client, Some(offer)) else {
        return TokenAnswer::Nothing;
    };
    let ended = timeout(target.check.timeout, attempt.run()).await;
    let answer = match ended {
        Ok(Ok(End::Closed(error))) if !attempt.connected => {
            let (pool, backend) = &target.name;
            debug!(pool, backend, address = %target.address, %error, "token");
            of_token(&error)
        }
        // By the time that a handshake is done the token has been honoured, or the client had complained.
        _ if attempt.connected => TokenAnswer::Honoured,
        _ => TokenAnswer::Nothing,
    };
    drop(attempt.close());
    answer
}

/// A connection that is tried out.
struct Attempt<'a> {
    target: &'a CheckTarget,
    socket: UdpSocket,
    endpoint: Endpoint,
    connection: ConnectionHandle,
    connected: bool,
    /// Those that the server has chosen, once it is connected.
    cids: Vec<ConnectionId>,
    /// When no more of them are waited for.
    enough: Option<Instant>,
    exchange: Option<Exchange<'a>>,
    /// What the first Initial is answered with, before it is sent.
    offer: Option<Offer>,
}

/// A request over HTTP/3, and its answer.
struct Exchange<'a> {
    expect_status: &'a [u16],
    control: Option<StreamId>,
    stream: Option<StreamId>,
    /// What is left to be sent of the request.
    request: Vec<u8>,
    answer: Answer,
    said: Said,
}

/// How a connection ends before its time does.
enum End {
    /// The server has confirmed the handshake, and answered as it should if it was asked.
    Passed,
    /// It answered something else.
    Answered(Said),
    Closed(ConnectionError),
    /// More came than belongs to a handshake.
    Flooded,
}

impl<'a> Attempt<'a> {
    fn begin(
        target: &'a CheckTarget,
        client: &'a Result<Client, rustls::Error>,
        offer: Option<Offer>,
    ) -> io::Result<Self> {
        let client = client.as_ref().map_err(|error| io::Error::other(error.to_string()))?;
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(io::Error::other)?;
        let socket = connect(target)?;
        let now = Instant::now();
        let mut endpoint = Endpoint::new(EndpointConfig::client(seed), now, SystemTime::now());
        let address = target.address;
        let name = client.server_name.clone().unwrap_or_else(|| address.ip().to_string());
        let connection = endpoint.connect(now, &client.config, address, &name);
        let connection = connection.map_err(|error| io::Error::other(error.to_string()))?;
        let exchange = client.request.as_ref().map(|Request { path, expect_status }| Exchange {
            expect_status,
            control: None,
            stream: None,
            request: http3::request(client.server_name.as_deref(), address, path),
            answer: Answer::default(),
            said: Said::Nothing,
        });
        let (connected, cids, enough) = (false, vec![], None);
        Ok(Self { target, socket, endpoint, connection, connected, cids, enough, exchange, offer })
    }

    async fn run(&mut self) -> io::Result<End> {
        let mut datagram = vec![0; DATAGRAM_LEN];
        let mut reads = 0;
        loop {
            if let Some(end) = self.settle().await? {
                return Ok(end);
            }
            let deadline = self.endpoint.deadline().into_iter().chain(self.enough).min();
            let due = async {
                match deadline {
                    Some(deadline) => sleep_until(deadline.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                len = self.socket.recv(&mut datagram) => {
                    let from = Received { remote: self.target.address, local: None, ecn: None };
                    let octets = &mut datagram[..len?];
                    self.endpoint.handle_datagram(Instant::now(), from, octets);
                    reads += 1;
                    if reads == READS {
                        return Ok(End::Flooded);
                    }
                }
                () = due => self.endpoint.handle_deadline(Instant::now()),
            }
        }
    }

    /// Sends what there is to be sent, and looks what has become of the connection.
    async fn settle(&mut self) -> io::Result<Option<End>> {
        if let Some(exchange) = &mut self.exchange
            && self.connected
            && let Some(mut connection) = self.endpoint.connection_mut(self.connection)
        {
            exchange.go_on(&mut connection);
        }
        let mut datagram = Vec::with_capacity(DATAGRAM_LEN);
        while self.endpoint.poll_transmit(Instant::now(), 1, &mut datagram).is_some() {
            match self.offer.take() {
                Some(offer) => self.retry(&offer, &datagram)?,
                None => drop(self.socket.send(&datagram).await?),
            }
            datagram.clear();
        }
        if let Some(connection) = self.endpoint.connection(self.connection)
            && connection.is_connected()
        {
            self.connected = true;
            for cid in connection.remote_cids() {
                if self.cids.len() < CIDS && !self.cids.contains(&cid) {
                    self.cids.push(cid);
                }
            }
            if connection.is_confirmed() && self.enough.is_none() {
                self.enough = Some(Instant::now() + CIDS_FOLLOW);
            }
        }
        while let Some((_, event)) = self.endpoint.poll_event() {
            if let Event::Closed(error) = event {
                return Ok(Some(End::Closed(error)));
            }
        }
        match self.exchange.as_ref().map(|exchange| (exchange.said, exchange.expect_status)) {
            None => {}
            Some((Said::Nothing, _)) => return Ok(None),
            Some((Said::Status(status), expected)) if expected.contains(&status) => {}
            Some((said, _)) => return Ok(Some(End::Answered(said))),
        }
        let Some(enough) = self.enough else { return Ok(None) };
        let passed = self.cids.len() > 1 || Instant::now() >= enough;
        Ok(passed.then_some(End::Passed))
    }

    /// Answers the first Initial with a Retry, as the balancer answers those of clients.
    fn retry(&mut self, Offer { tokens, time }: &Offer, initial: &[u8]) -> io::Result<()> {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(io::Error::other)?;
        let Ok(Packet::Long(header)) = Packet::read(initial) else {
            return Err(io::Error::other("it begins with no Initial"));
        };
        // What the server sees of us, and what stands in a token that is bound to it.
        let client = self.socket.local_addr()?;
        let (mut retry, mut random) = ([0; MAX_RETRY_LEN], Random::new(seed));
        let len = tokens.write_retry(&mut random, Version::V1, &header, client, *time, &mut retry);
        let len = len.map_err(|reason| io::Error::other(reason.label()))?;
        let from = Received { remote: self.target.address, local: None, ecn: None };
        self.endpoint.handle_datagram(Instant::now(), from, &mut retry[..len]);
        Ok(())
    }

    /// What it comes to when no more is waited for.
    fn result_so_far(&self, otherwise: CheckResult) -> CheckResult {
        if self.is_content() { CheckResult::Answered } else { otherwise }
    }

    /// Whether all that was asked of the server is known to be well.
    fn is_content(&self) -> bool {
        let exchange = self.exchange.as_ref();
        let answered = exchange.is_none_or(|Exchange { said, expect_status, .. }| {
            matches!(said, Said::Status(status) if expect_status.contains(status))
        });
        self.connected && answered
    }

    /// Tells the server that nothing follows, so that it keeps nothing; the connection IDs that it chose are left.
    fn close(mut self) -> Vec<ConnectionId> {
        let now = Instant::now();
        if let Some(mut connection) = self.endpoint.connection_mut(self.connection) {
            let code = if self.exchange.is_some() { http3::NO_ERROR } else { 0 };
            connection.close(now, code, Default::default());
        }
        let mut datagram = Vec::with_capacity(DATAGRAM_LEN);
        if self.endpoint.poll_transmit(now, 1, &mut datagram).is_some() {
            // If it is lost, the server finds out by itself.
            let _ = self.socket.try_send(&datagram);
        }
        self.cids
    }
}

impl Exchange<'_> {
    /// Sends what can be sent, and reads what is there.
    fn go_on(&mut self, connection: &mut Connection) {
        // A write is refused, and a read too, when the server wants no more: that is no answer.
        if self.control.is_none() {
            self.control = connection.open(Dir::Uni);
            let written = self.control.map(|id| connection.write(id, &http3::CONTROL));
            if written.is_some_and(|written| written != Ok(http3::CONTROL.len())) {
                self.said = Said::Nonsense;
            }
        }
        self.stream = self.stream.or_else(|| connection.open(Dir::Bi));
        let Some(id) = self.stream else { return };
        if !self.request.is_empty() {
            let written = connection.write(id, &self.request);
            let Ok(written) = written else { return self.said = Said::Nonsense };
            self.request.drain(..written);
            if self.request.is_empty() && connection.finish(id).is_err() {
                self.said = Said::Nonsense;
            }
        }
        let mut octets = [0; 1024];
        while self.said == Said::Nothing {
            self.said = match connection.read(id, &mut octets) {
                Ok(Read::Data(len)) => self.answer.take(&octets[..len]),
                Ok(Read::Blocked) => return,
                Ok(Read::Finished) | Err(_) => Said::Nonsense,
            };
        }
    }
}

/// What it means that a connection is over, of which all that was asked had been `content`.
fn of_end(content: bool, error: &ConnectionError) -> CheckResult {
    match error {
        ConnectionError::PeerClosed(close) if content && is_of_application(close) => {
            CheckResult::Answered
        }
        ConnectionError::PeerClosed(_) => CheckResult::Closed,
        ConnectionError::Tls { error: rustls::Error::InvalidCertificate(_), .. } => {
            CheckResult::Certificate
        }
        ConnectionError::IdleTimeout | ConnectionError::HandshakeTimeout { .. } if !content => {
            CheckResult::Timeout
        }
        ConnectionError::IdleTimeout | ConnectionError::HandshakeTimeout { .. } => {
            CheckResult::Answered
        }
        ConnectionError::Internal(_) | ConnectionError::ClosedLocally => CheckResult::Unsent,
        ConnectionError::Tls { .. }
        | ConnectionError::Peer(_)
        | ConnectionError::Reset
        | ConnectionError::VersionMismatch(_) => CheckResult::Wrong,
    }
}

/// What it means for the token with which a handshake began that it has failed. Servers also close for reasons of their own: they
/// have no room, or do not speak the application protocol, which shows nothing.
fn of_token(error: &ConnectionError) -> TokenAnswer {
    match error {
        ConnectionError::PeerClosed(PeerClose::Transport { code, reason, .. })
            if *code == Code::INVALID_TOKEN =>
        {
            let says = |why: InvalidToken| reason == why.label();
            match () {
                () if says(InvalidToken::Future) => TokenAnswer::Future,
                () if says(InvalidToken::Expired) => TokenAnswer::Expired,
                () => TokenAnswer::Refused,
            }
        }
        // They do not say what a server says that has honoured the token.
        ConnectionError::Peer(error) if error.code == Code::TRANSPORT_PARAMETER_ERROR => {
            TokenAnswer::Refused
        }
        ConnectionError::Peer(_)
        | ConnectionError::PeerClosed(_)
        | ConnectionError::Tls { .. }
        | ConnectionError::Reset
        | ConnectionError::VersionMismatch(_)
        | ConnectionError::IdleTimeout
        | ConnectionError::HandshakeTimeout { .. }
        | ConnectionError::Internal(_)
        | ConnectionError::ClosedLocally => TokenAnswer::Nothing,
    }
}

/// Whether the server's application wants no more of a connection that works. Before the handshake is confirmed,
/// the code of the application is not shown (<https://www.rfc-editor.org/rfc/rfc9000.html#section-10.2.3>).
fn is_of_application(close: &PeerClose) -> bool {
    match close {
        PeerClose::Application { .. } => true,
        PeerClose::Transport { code, .. } => {
            [Code::NO_ERROR, Code::APPLICATION_ERROR].contains(code)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, net::SocketAddr};

    use quic::{
        routable::{CidGenerator, Partition},
        token::{TokenKey, TokenKeys},
        transport::{CidIssuer, ResetKey, ServerConfig, TokenPolicy, TransportError},
    };
    use quic_lb_config::{CheckKind, HealthCheck};
    use rustls::{CertificateError, pki_types::PrivatePkcs8KeyDer};

    use super::{
        super::skew::{self, Search},
        *,
    };
    use crate::{control::plane::ControlPlane, fixtures, memory::Memory};
    use CheckResult::{Answered, Certificate, Closed, Timeout, Unsent, Wrong};

    /// Every end of a connection, before the handshake was done and after it.
    #[test]
    fn an_application_may_close_a_connection_that_works_and_nobody_else() {
        let application = |code| PeerClose::Application { code, reason: Default::default() };
        let transport =
            |code| PeerClose::Transport { code, frame_type: 0, reason: Default::default() };
        let closed = ConnectionError::PeerClosed;
        let tls = |error| ConnectionError::Tls { error, code: Code::crypto(42) };
        let broken =
            TransportError { code: Code::PROTOCOL_VIOLATION, frame_type: 0, reason: "".into() };
        for (error, before, after) in [
            (closed(application(0)), Closed, Answered),
            (closed(application(0x10c)), Closed, Answered),
            (closed(transport(Code::NO_ERROR)), Closed, Answered),
            (closed(transport(Code::APPLICATION_ERROR)), Closed, Answered),
            (closed(transport(Code::CONNECTION_REFUSED)), Closed, Closed),
            // The client has no certificate, and is told so when it is done.
            (closed(transport(Code::crypto(116))), Closed, Closed),
            (
                tls(rustls::Error::InvalidCertificate(CertificateError::Expired)),
                Certificate,
                Certificate,
            ),
            (tls(rustls::Error::NoApplicationProtocol), Wrong, Wrong),
            (ConnectionError::Peer(broken), Wrong, Wrong),
            (ConnectionError::Reset, Wrong, Wrong),
            (ConnectionError::VersionMismatch(vec![2]), Wrong, Wrong),
            (ConnectionError::IdleTimeout, Timeout, Answered),
            (ConnectionError::HandshakeTimeout { answered: true }, Timeout, Answered),
            (ConnectionError::ClosedLocally, Unsent, Unsent),
            (ConnectionError::Internal("no"), Unsent, Unsent),
        ] {
            let ends = (of_end(false, &error), of_end(true, &error));
            assert_eq!(ends, (before, after), "{error:?}");
        }
    }

    /// Every end of a connection that began with a token.
    #[test]
    fn a_server_that_has_no_room_or_fails_has_not_refused_a_token() {
        let transport =
            |code| PeerClose::Transport { code, frame_type: 0, reason: Default::default() };
        let closed = ConnectionError::PeerClosed;
        let tls = |error| ConnectionError::Tls { error, code: Code::crypto(42) };
        let broken = |code| TransportError { code, frame_type: 0, reason: "".into() };
        let refused = |reason: &'static str| {
            let (code, reason) = (Code::INVALID_TOKEN, reason.into());
            closed(PeerClose::Transport { code, frame_type: 0, reason })
        };
        let application = PeerClose::Application { code: 0, reason: Default::default() };
        for (error, answer) in [
            (refused(""), TokenAnswer::Refused),
            (refused("expired"), TokenAnswer::Expired),
            (refused("future"), TokenAnswer::Future),
            (refused("futures"), TokenAnswer::Refused),
            (ConnectionError::Peer(broken(Code::TRANSPORT_PARAMETER_ERROR)), TokenAnswer::Refused),
            (closed(application), TokenAnswer::Nothing),
            (closed(transport(Code::CONNECTION_REFUSED)), TokenAnswer::Nothing),
            (closed(transport(Code::NO_ERROR)), TokenAnswer::Nothing),
            (closed(transport(Code::APPLICATION_ERROR)), TokenAnswer::Nothing),
            (closed(transport(Code::INTERNAL_ERROR)), TokenAnswer::Nothing),
            // It speaks none of the protocols that were offered.
            (closed(transport(Code::crypto(120))), TokenAnswer::Nothing),
            (ConnectionError::Peer(broken(Code::PROTOCOL_VIOLATION)), TokenAnswer::Nothing),
            (
                tls(rustls::Error::InvalidCertificate(CertificateError::Expired)),
                TokenAnswer::Nothing,
            ),
            (tls(rustls::Error::NoApplicationProtocol), TokenAnswer::Nothing),
            (ConnectionError::Reset, TokenAnswer::Nothing),
            (ConnectionError::VersionMismatch(vec![2]), TokenAnswer::Nothing),
            (ConnectionError::IdleTimeout, TokenAnswer::Nothing),
            (ConnectionError::HandshakeTimeout { answered: true }, TokenAnswer::Nothing),
            (ConnectionError::ClosedLocally, TokenAnswer::Nothing),
            (ConnectionError::Internal("no"), TokenAnswer::Nothing),
        ] {
            assert_eq!(of_token(&error), answer, "{error:?}");
        }
    }

    /// Serves from `socket`: the connection ID of the handshake names server 1, those that follow name server 2.
    async fn serve_as_two(socket: UdpSocket, tokens: Option<TokenPolicy>) {
        let made = rcgen::generate_simple_self_signed(["a.test".to_owned()]).unwrap();
        let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
        let tls =
            rustls::ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()));
        let tls = tls.with_protocol_versions(&[&rustls::version::TLS13]).unwrap();
        let tls = tls.with_no_client_auth().with_single_cert(vec![made.cert.into()], key.into());
        let mut tls = tls.unwrap();
        tls.alpn_protocols = vec![b"h3".to_vec()];
        let issuer = |n| {
            let (config, server_id) = (fixtures::cid_config(), fixtures::server_id(n));
            let generator =
                CidGenerator::new(config, server_id, Partition::Whole, [n; 32]).unwrap();
            CidIssuer::routable(generator, ResetKey::new([n; 32]))
        };
        let mut config =
            EndpointConfig::server(ServerConfig::new(Arc::new(tls)), issuer(1), [3; 32]);
        config.tokens = tokens;
        let mut server = Endpoint::new(config, Instant::now(), SystemTime::now());
        let (mut datagram, mut first) = (vec![0; DATAGRAM_LEN], true);
        while let Ok((len, remote)) = socket.recv_from(&mut datagram).await {
            let now = Instant::now();
            let from = Received { remote, local: None, ecn: None };
            server.handle_datagram(now, from, &mut datagram[..len]);
            if std::mem::take(&mut first) {
                server.set_cid_config(issuer(2));
            }
            let mut out = vec![];
            while server.poll_transmit(now, 1, &mut out).is_some() {
                socket.send_to(&out, remote).await.unwrap();
                out.clear();
            }
        }
    }

    fn target(address: SocketAddr) -> CheckTarget {
        let handshake = Handshake {
            alpn: "h3".into(),
            server_name: None,
            certificate: CertificatePolicy::Ignored,
        };
        let mut config = fixtures::config(true);
        config.pools[0].backends[0].address = address;
        config.pools[0].health_check = Some(HealthCheck {
            kind: CheckKind::Quic(handshake),
            interval: Duration::from_secs(60),
            timeout: Duration::from_secs(60),
            rise: 1.try_into().unwrap(),
            fall: 1.try_into().unwrap(),
            port: None,
            panic_below: 0,
            slow_start: Duration::ZERO,
        });
        let memory = Arc::new(Memory::new(10, Instant::now(), [0; 4]));
        ControlPlane::new(config, memory, [1, 2]).check_targets().remove(0)
    }

    #[tokio::test]
    async fn the_connection_ids_that_follow_a_handshake_are_seen_too() {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let target = target(socket.local_addr().unwrap());
        let server = tokio::spawn(serve_as_two(socket, None));
        let CheckKind::Quic(handshake) = &target.check.kind else { unreachable!() };
        let client = Client::new(handshake, None, target.check.timeout);
        let found = try_out(&target, &client).await;
        server.abort();
        assert_eq!(found.result, Answered);
        assert!(found.cids.len() > 2, "{found:?}");
        let config = fixtures::cid_config();
        let ids: BTreeSet<_> =
            found.cids.iter().map(|cid| config.decode(cid.as_slice()).unwrap()).collect();
        assert!(ids.contains(&fixtures::server_id(2)), "{ids:?}");
    }

    #[tokio::test]
    async fn a_server_that_honours_the_token_of_a_retry_can_be_told_from_those_that_do_not() {
        let key = |n| TokenKey::new(1, [n; 16], [0; 12]).unwrap();
        let mut config = fixtures::config(true);
        config.retry.keys = vec![key(7)];
        let memory = Arc::new(Memory::new(10, Instant::now(), [0; 4]));
        let plane = ControlPlane::new(config, memory, [1, 2]);
        let policy = |key| Some(TokenPolicy::Nat(TokenKeys::new([key])));
        for (tokens, ahead, expected) in [
            (policy(key(7)), 0, TokenAnswer::Honoured),
            (policy(key(7)), -3600, TokenAnswer::Expired),
            (policy(key(7)), 3600, TokenAnswer::Future),
            (policy(key(8)), 0, TokenAnswer::Refused),
            (None, 0, TokenAnswer::Refused),
        ] {
            let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let target = target(socket.local_addr().unwrap());
            let server = tokio::spawn(serve_as_two(socket, tokens));
            let CheckKind::Quic(handshake) = &target.check.kind else { unreachable!() };
            let client = Client::new(handshake, None, target.check.timeout);
            let tokens = plane.tokens().unwrap();
            let time = skew::shifted(SystemTime::now(), ahead);
            let answer = offer(&target, &client, Offer { tokens, time }).await;
            server.abort();
            assert_eq!(answer, expected, "{ahead} s ahead");
        }
    }

    #[tokio::test]
    async fn the_clock_of_a_server_is_told_by_the_tokens_that_it_honours() {
        let key = TokenKey::new(1, [7; 16], [0; 12]).unwrap();
        let mut config = fixtures::config(true);
        config.retry.keys = vec![key.clone()];
        let memory = Arc::new(Memory::new(10, Instant::now(), [0; 4]));
        let tokens = ControlPlane::new(config, memory, [1, 2]).tokens().unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let target = target(socket.local_addr().unwrap());
        let policy = TokenPolicy::Nat(TokenKeys::new([key]));
        let server = tokio::spawn(serve_as_two(socket, Some(policy)));
        let CheckKind::Quic(handshake) = &target.check.kind else { unreachable!() };
        let client = Client::new(handshake, None, target.check.timeout);
        // It is the balancer whose clock is wrong here.
        for wrong in [0, 30, -8, 3600, -3600] {
            let mut search = Search::new(tokens.lifetime());
            while let Some(ahead) = search.next() {
                let time = skew::shifted(SystemTime::now(), wrong + ahead);
                let made = Offer { tokens: Arc::clone(&tokens), time };
                search.on_answer(offer(&target, &client, made).await);
            }
            let found = search.skew().unwrap();
            assert!((found + wrong).abs() <= 1, "{found} where {wrong} was wrong");
        }
        server.abort();
    }
}
