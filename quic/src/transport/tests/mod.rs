//! A client and a server by themselves, without a network between them, and a client whose packets
//! are forged: what a peer may not do ends the connection with the right code, and what it may do
//! a million times costs no memory.

mod acknowledgments;
mod addresses;
mod ceilings;
mod closing;
mod congestion;
mod controllers;
mod deadlines;
mod ends;
mod flow;
mod frames;
mod handshake;
mod ids;
mod packets;
mod paths;
mod records;
mod recovery;
mod repeats;
mod sizes;
mod timers;
mod unsent;
mod vectors;
mod wire;

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::{Duration, Instant, SystemTime},
};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use super::{
    frame::{self, NewConnectionId, types},
    space::Space,
    *,
};
use crate::{ConnectionId, varint};

const CLIENT: &str = "192.0.2.2:1000";
const SERVER: &str = "192.0.2.1:443";

/// What both ends are made of.
struct Scene {
    client: ClientConfig,
    server: ServerConfig,
    cids: CidIssuer,
    tokens: Option<TokenPolicy>,
}

impl Default for Scene {
    fn default() -> Self {
        Self {
            client: ClientConfig::new(Arc::clone(&tls().client)),
            server: ServerConfig::new(Arc::clone(&tls().server)),
            cids: CidIssuer::standalone(8, [1; 32], ResetKey::new([2; 32])),
            tokens: None,
        }
    }
}

impl Scene {
    /// Both ends with the same settings.
    fn with(transport: TransportConfig) -> Self {
        let mut scene = Self::default();
        scene.client.transport = Arc::new(transport.clone());
        scene.server.transport = Arc::new(transport);
        scene
    }

    fn with_retry(retry: RetryPolicy) -> Self {
        let mut scene = Self::default();
        scene.server.retry = retry;
        scene
    }
}

/// Both ends, and a clock.
struct Pair {
    now: Instant,
    client: Endpoint,
    server: Endpoint,
    config: ClientConfig,
    /// Where the client is, as the server sees it.
    from: SocketAddr,
    at_client: ConnectionHandle,
    at_server: Option<ConnectionHandle>,
    /// Why the server's connection ended.
    closed: Option<ConnectionError>,
    /// Why the client's did.
    client_closed: Option<ConnectionError>,
    /// Datagrams of the client that are held back instead of delivered.
    hold: bool,
}

struct Tls {
    server: Arc<rustls::ServerConfig>,
    client: Arc<rustls::ClientConfig>,
    roots: rustls::RootCertStore,
}

fn tls() -> &'static Tls {
    static TLS: OnceLock<Tls> = OnceLock::new();
    TLS.get_or_init(|| {
        let made = rcgen::generate_simple_self_signed(["server.test".to_owned()]).unwrap();
        let der = CertificateDer::from(made.cert);
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()));
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![der.clone()], key)
            .unwrap();
        server.alpn_protocols = vec![b"test".to_vec()];
        let mut roots = rustls::RootCertStore::empty();
        roots.add(der).unwrap();
        let mut client = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots.clone())
            .with_no_client_auth();
        client.alpn_protocols = vec![b"test".to_vec()];
        Tls { server: Arc::new(server), client: Arc::new(client), roots }
    })
}

impl Pair {
    /// Before the first datagram.
    fn new(scene: Scene) -> Self {
        let now = Instant::now();
        let mut config = EndpointConfig::server(scene.server, scene.cids, [3; 32]);
        config.tokens = scene.tokens;
        let server = Endpoint::new(config, now, SystemTime::UNIX_EPOCH);
        let config = EndpointConfig::client([4; 32]);
        let mut client = Endpoint::new(config, now, SystemTime::UNIX_EPOCH);
        let config = scene.client;
        let at_client = client.connect(now, &config, SERVER.parse().unwrap(), "server.test");
        Self {
            now,
            client,
            server,
            config,
            from: CLIENT.parse().unwrap(),
            at_client: at_client.unwrap(),
            at_server: None,
            closed: None,
            client_closed: None,
            hold: false,
        }
    }

    /// After the handshake, with nothing left to say.
    fn connected() -> Self {
        Self::connected_as(Scene::default())
    }

    fn connected_as(scene: Scene) -> Self {
        let mut pair = Self::new(scene);
        pair.settle();
        assert!(pair.at_server().is_confirmed() && pair.at_client().is_confirmed());
        pair
    }

    /// Connects once more, with the same client endpoint.
    fn reconnect(&mut self) {
        let to = SERVER.parse().unwrap();
        let connected = self.client.connect(self.now, &self.config, to, "server.test");
        self.at_client = connected.unwrap();
        (self.at_server, self.closed, self.client_closed) = (None, None, None);
    }

    fn at_server(&mut self) -> &mut Connection {
        self.server.exclusive(self.at_server.unwrap()).unwrap()
    }

    fn at_client(&mut self) -> &mut Connection {
        self.client.exclusive(self.at_client).unwrap()
    }

    /// The server's end before the handshake is complete.
    fn half_open(&mut self) -> &mut Connection {
        let newest = self.server.connections().last().unwrap();
        self.server.exclusive(newest).unwrap()
    }

    /// What a datagram says to the server, or to the client.
    fn peek(&mut self, upward: bool, datagram: &[u8]) -> Vec<connection::Seen> {
        match upward {
            false => self.at_client().peek(datagram),
            true if self.server.connection_count() > 0 => self.half_open().peek(datagram),
            true => vec![],
        }
    }

    /// Delivers the client's first flight, and returns the server's, undelivered.
    fn first_flights(&mut self) -> Vec<Vec<u8>> {
        for datagram in self.up() {
            self.deliver(datagram);
        }
        self.down()
    }

    /// What the server closed with.
    fn code(&mut self) -> Option<Code> {
        self.exchange();
        match &self.closed {
            Some(ConnectionError::Peer(error)) => Some(error.code),
            Some(ConnectionError::Tls { code, .. }) => Some(*code),
            _ => None,
        }
    }

    /// Moves datagrams until there are none.
    fn exchange(&mut self) {
        self.exchange_up_to(usize::MAX);
    }

    /// Moves datagrams until there are none; those larger than this are lost.
    fn exchange_up_to(&mut self, limit: usize) {
        for _ in 0..100_000 {
            let (up, down) = (drain(&mut self.client, self.now), drain(&mut self.server, self.now));
            self.note_events();
            if up.is_empty() && down.is_empty() {
                return;
            }
            for datagram in up {
                if !self.hold && datagram.len() <= limit {
                    self.deliver(datagram);
                }
            }
            for datagram in down {
                if datagram.len() <= limit {
                    self.deliver_down(datagram);
                }
            }
        }
        panic!("the endpoints never fall silent");
    }

    /// Takes the events of both ends.
    fn note_events(&mut self) {
        while let Some((_, event)) = self.client.poll_event() {
            if let Event::Closed(error) = event {
                self.client_closed = Some(error);
            }
        }
        while let Some((handle, event)) = self.server.poll_event() {
            match event {
                Event::Closed(error) => self.closed = Some(error),
                Event::Connected => self.at_server = Some(handle),
                _ => {}
            }
        }
    }

    /// What the client has to send now.
    fn up(&mut self) -> Vec<Vec<u8>> {
        drain(&mut self.client, self.now)
    }

    /// What the server has to send now.
    fn down(&mut self) -> Vec<Vec<u8>> {
        drain(&mut self.server, self.now)
    }

    /// Lets acknowledgments and the like come to rest.
    fn settle(&mut self) {
        for _ in 0..20 {
            self.exchange();
            self.pass(Duration::from_millis(30));
        }
        self.exchange();
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.client.handle_deadline(self.now);
        self.server.handle_deadline(self.now);
    }

    /// Hands the server a datagram.
    fn deliver(&mut self, mut datagram: Vec<u8>) {
        let from = Received { remote: self.from, local: None, ecn: None };
        self.server.handle_datagram(self.now, from, &mut datagram);
    }

    /// Hands the client a datagram.
    fn deliver_down(&mut self, mut datagram: Vec<u8>) {
        let from = Received { remote: SERVER.parse().unwrap(), local: None, ecn: None };
        self.client.handle_datagram(self.now, from, &mut datagram);
    }

    /// A packet of the client's with these frames.
    fn forge(&mut self, space: Space, frames: &[u8]) -> Vec<u8> {
        let now = self.now;
        self.at_client().forge(now, space, frames)
    }

    /// What the server closes with after such a packet.
    fn verdict(&mut self, space: Space, frames: &[u8]) -> Option<Code> {
        let packet = self.forge(space, frames);
        self.hold = true;
        self.deliver(packet);
        self.exchange();
        self.hold = false;
        self.code()
    }
}

fn closed_with(error: &Option<ConnectionError>, code: Code) -> bool {
    matches!(error,
        Some(ConnectionError::PeerClosed(PeerClose::Transport { code: found, .. }))
            if *found == code)
}

fn drain(endpoint: &mut Endpoint, now: Instant) -> Vec<Vec<u8>> {
    let mut all = vec![];
    let mut buffer = vec![];
    while let Some(transmit) = endpoint.poll_transmit(now, 1, &mut buffer) {
        assert_eq!(transmit.len, buffer.len());
        all.push(std::mem::take(&mut buffer));
        assert!(all.len() < 100_000, "the endpoint never falls silent");
    }
    all
}

fn fields(frame_type: u64, values: &[u64]) -> Vec<u8> {
    let mut out = vec![];
    frame::write_fields(frame_type, values, &mut out);
    out
}

fn stream(id: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    let mut out = vec![];
    frame::write_stream_header(StreamId::from_wire(id), offset, Some(data.len()), false, &mut out);
    out.extend_from_slice(data);
    out
}

fn new_connection_id(sequence: u64, retire_prior_to: u64) -> Vec<u8> {
    let octets = sequence.to_be_bytes();
    let frame = NewConnectionId {
        sequence,
        retire_prior_to,
        id: ConnectionId::new(&octets).unwrap(),
        reset_token: [octets, octets].concat().try_into().unwrap(),
    };
    let mut out = vec![];
    frame::write_new_connection_id(&frame, &mut out);
    out
}

/// Each row: what the client sends in a 1-RTT packet after the handshake, and what it earns.
#[test]
fn req_f01_f11_f13_f15_f19_g06_g09_g10_b06_b08_c25_hostile_frames_close_the_connection_with_the_most_specific_code()
 {
    let crypto = {
        // A TLS KeyUpdate message.
        let mut out = vec![];
        frame::write_crypto_header(0, 5, &mut out);
        out.extend_from_slice(&[24, 0, 0, 1, 0]);
        out
    };
    let unsent = fields(types::ACK, &[10_000, 0, 0, 0]);
    let rows: Vec<(&str, Vec<u8>, Code)> = vec![
        ("f01 unknown frame type", fields(0x2f, &[]), Code::FRAME_ENCODING_ERROR),
        ("f11 acknowledgment of the unsent", unsent, Code::PROTOCOL_VIOLATION),
        ("f13 NEW_TOKEN to a server", vec![7, 1, 9], Code::PROTOCOL_VIOLATION),
        ("f15 HANDSHAKE_DONE to a server", vec![0x1e], Code::PROTOCOL_VIOLATION),
        ("g06 beyond the stream window", stream(0, 1 << 20, b"x"), Code::FLOW_CONTROL_ERROR),
        ("g09 stream 2^59", stream(1 << 61, 0, b"x"), Code::STREAM_LIMIT_ERROR),
        ("g09 MAX_STREAMS", fields(0x12, &[(1 << 60) + 1]), Code::FRAME_ENCODING_ERROR),
        ("g09 STREAMS_BLOCKED", fields(0x16, &[(1 << 60) + 1]), Code::FRAME_ENCODING_ERROR),
        ("g10 STREAM on ours, not open", stream(1, 0, b"x"), Code::STREAM_STATE_ERROR),
        ("g10 STREAM on ours, send-only", stream(3, 0, b"x"), Code::STREAM_STATE_ERROR),
        ("g10 RESET_STREAM send-only", fields(4, &[3, 0, 0]), Code::STREAM_STATE_ERROR),
        ("g10 STOP_SENDING unknown", fields(5, &[1, 0]), Code::STREAM_STATE_ERROR),
        ("g10 STOP_SENDING receive-only", fields(5, &[2, 0]), Code::STREAM_STATE_ERROR),
        ("g10 MAX_STREAM_DATA unknown", fields(0x11, &[1, 0]), Code::STREAM_STATE_ERROR),
        ("g10 MAX_STREAM_DATA receive-only", fields(0x11, &[2, 0]), Code::STREAM_STATE_ERROR),
        ("b06 too many IDs", (10..18).flat_map(|n| new_connection_id(n, 0)).collect(), {
            Code::CONNECTION_ID_LIMIT_ERROR
        }),
        ("b08 RETIRE of the unissued", fields(0x19, &[99]), Code::PROTOCOL_VIOLATION),
        ("c25 TLS KeyUpdate", crypto, Code::crypto(10)),
    ];
    for (name, frames, code) in rows {
        let mut pair = Pair::connected();
        assert_eq!(pair.verdict(Space::Data, &frames), Some(code), "{name}");
        // The client hears of it.
        pair.exchange();
        assert!(
            matches!(
                &pair.client_closed,
                Some(ConnectionError::PeerClosed(PeerClose::Transport { code: heard, .. }))
                    if *heard == code
            ),
            "{name}: {:?}",
            pair.client_closed
        );
    }
}

#[test]
fn req_b08_the_connection_id_in_use_cannot_be_retired() {
    let mut pair = Pair::connected();
    let verdict = pair.verdict(Space::Data, &fields(types::RETIRE_CONNECTION_ID, &[0]));
    assert_eq!(verdict, Some(Code::PROTOCOL_VIOLATION));
}

#[test]
fn req_f01_frames_of_other_packet_types_are_refused_in_handshake_packets() {
    for frames in [
        vec![0x1a; 9],
        stream(0, 0, b"x"),
        vec![0x1e],
        fields(types::MAX_DATA, &[1]),
        fields(types::APPLICATION_CLOSE, &[0, 0]),
    ] {
        let mut pair = Pair::new(Scene::default());
        // Until the client has Handshake keys, and the server does not know it yet.
        for datagram in drain(&mut pair.client, pair.now) {
            pair.deliver(datagram);
        }
        for datagram in drain(&mut pair.server, pair.now) {
            pair.deliver_down(datagram);
        }
        assert_eq!(pair.verdict(Space::Handshake, &frames), Some(Code::PROTOCOL_VIOLATION));
    }
}

#[test]
fn req_f17_datagrams_that_were_not_offered_are_refused() {
    let mut pair = Pair::new(Scene::with(TransportConfig {
        datagram_receive_buffer: 0,
        ..TransportConfig::default()
    }));
    pair.settle();
    assert_eq!(pair.verdict(Space::Data, &[0x31, 1, 9]), Some(Code::PROTOCOL_VIOLATION));
    assert_eq!(pair.at_client().max_datagram(), None);
}

#[test]
fn req_c30_crypto_data_is_bounded() {
    let mut pair = Pair::connected();
    let mut frames = vec![];
    frame::write_crypto_header(1 << 20, 1, &mut frames);
    frames.push(0);
    assert_eq!(pair.verdict(Space::Data, &frames), Some(Code::CRYPTO_BUFFER_EXCEEDED));
}

#[test]
fn req_i03_a_flood_of_path_challenges_leaves_one_answer_due() {
    let mut pair = Pair::connected();
    for round in 0..10_000u64 {
        let mut frames = vec![];
        frame::write_path(types::PATH_CHALLENGE, round.to_be_bytes(), &mut frames);
        let packet = pair.forge(Space::Data, &frames.repeat(100));
        pair.deliver(packet);
    }
    let answers = drain(&mut pair.server, pair.now);
    assert!(answers.len() <= 2, "{} datagrams", answers.len());
    assert_eq!(pair.closed, None);
}

#[test]
fn req_b07_a_flood_of_retirements_ends_the_connection() {
    let mut pair = Pair::connected();
    for sequence in 10..1000 {
        let packet = pair.forge(Space::Data, &new_connection_id(sequence, sequence));
        pair.deliver(packet);
        // The client acknowledges nothing of what it hears.
        drain(&mut pair.server, pair.now);
    }
    let error = pair.at_server().error().cloned();
    assert!(
        matches!(&error, Some(ConnectionError::Peer(error))
            if error.code == Code::CONNECTION_ID_LIMIT_ERROR),
        "{error:?}"
    );
}

#[test]
fn req_a14_a_packet_that_came_before_changes_nothing() {
    let mut pair = Pair::connected();
    let packet = pair.forge(Space::Data, &stream(0, 0, b"once"));
    for _ in 0..3 {
        pair.deliver(packet.clone());
    }
    assert_eq!(pair.at_server().dropped(DropReason::Duplicate), 2);
}

#[test]
fn req_a15_reserved_bits_are_a_violation() {
    let mut pair = Pair::connected();
    let now = pair.now;
    let packet = pair.at_client().forge_with_reserved_bits(now, &[1]);
    pair.deliver(packet);
    pair.exchange();
    assert!(
        matches!(&pair.closed, Some(ConnectionError::Peer(error))
            if error.code == Code::PROTOCOL_VIOLATION),
        "{:?}",
        pair.closed
    );
}

#[test]
fn req_c19_two_key_updates_without_an_acknowledgment_are_an_error() {
    let mut pair = Pair::connected();
    for round in 0..2 {
        pair.at_client().force_phase();
        let packet = pair.forge(Space::Data, &[1]);
        pair.deliver(packet);
        assert_eq!(pair.server.connection(pair.at_server.unwrap()).unwrap().is_over(), round == 1);
    }
    pair.exchange();
    assert!(
        matches!(&pair.closed, Some(ConnectionError::Peer(error))
            if error.code == Code::KEY_UPDATE_ERROR),
        "{:?}",
        pair.closed
    );
}

#[test]
fn req_h03_a_closing_endpoint_answers_less_and_less() {
    let mut pair = Pair::connected();
    let now = pair.now;
    pair.at_server().close(now, 7, "bye".into());
    let mut closes = drain(&mut pair.server, now).len();
    assert_eq!(closes, 1);
    for _ in 0..1000 {
        let packet = pair.forge(Space::Data, &[1]);
        pair.deliver(packet);
        closes += drain(&mut pair.server, now).len();
    }
    assert!(closes <= 12, "{closes} closes");
    // After three probe timeouts it is forgotten.
    pair.pass(Duration::from_secs(30));
    drain(&mut pair.server, pair.now);
    assert_eq!(pair.server.connection_count(), 0);
}

#[test]
fn req_h01_an_idle_connection_ends_on_both_sides() {
    let mut pair = Pair::connected();
    pair.pass(Duration::from_secs(31));
    pair.exchange();
    assert_eq!(pair.closed, Some(ConnectionError::IdleTimeout));
    assert_eq!(pair.client_closed, Some(ConnectionError::IdleTimeout));
    assert_eq!((pair.server.connection_count(), pair.client.connection_count()), (0, 0));
    assert_eq!(pair.server.deadline(), None);
}

#[test]
fn req_e07_an_application_close_during_the_handshake_says_nothing_of_the_application() {
    let mut pair = Pair::new(Scene::default());
    for datagram in drain(&mut pair.client, pair.now) {
        pair.deliver(datagram);
    }
    let now = pair.now;
    pair.at_client().close(now, 77, "secret".into());
    pair.exchange();
    assert!(
        matches!(&pair.closed, Some(ConnectionError::PeerClosed(PeerClose::Transport { code, .. }))
            if *code == Code::APPLICATION_ERROR),
        "{:?}",
        pair.closed
    );
}

#[test]
fn req_a03_a05_a07_unknown_versions_are_answered_when_the_datagram_is_large_enough() {
    let mut pair = Pair::connected();
    let mut initial = vec![0xc0, 0x1a, 0x2a, 0x3a, 0x4a, 30];
    initial.extend([7; 30]);
    initial.extend([3, 1, 2, 3]);
    initial.resize(1199, 0);
    pair.deliver(initial.clone());
    assert!(drain(&mut pair.server, pair.now).is_empty());
    initial.push(0);
    pair.deliver(initial.clone());
    let answers = drain(&mut pair.server, pair.now);
    let [answer] = &answers[..] else { panic!("one answer") };
    assert!(answer.len() < initial.len());
    assert_eq!(answer[1..5], [0; 4]);
    assert_eq!(answer[5..9], [3, 1, 2, 3]);
    assert!(answer.ends_with(&[0, 0, 0, 1]));
    // Version Negotiation is never an answer to Version Negotiation.
    initial[1..5].fill(0);
    pair.deliver(initial);
    assert!(drain(&mut pair.server, pair.now).is_empty());
}

#[test]
fn req_a06_version_negotiation_is_honoured_only_before_anything_else() {
    for (offered, late, ended) in
        [(0x0a0a_0a0a_u32, false, true), (1, false, false), (0x0a0a_0a0a, true, false)]
    {
        let mut pair = Pair::new(Scene::default());
        let first = drain(&mut pair.client, pair.now).remove(0);
        if late {
            pair.deliver(first.clone());
            pair.exchange();
        }
        let (dcid, scid) = (&first[6..14], &first[15..23]);
        let mut packet = vec![0x80, 0, 0, 0, 0, 8];
        packet.extend_from_slice(scid);
        packet.push(8);
        packet.extend_from_slice(dcid);
        packet.extend_from_slice(&offered.to_be_bytes());
        pair.deliver_down(packet);
        pair.exchange();
        let mismatch = matches!(pair.client_closed, Some(ConnectionError::VersionMismatch(_)));
        assert_eq!(mismatch, ended, "{offered:x} late {late}");
    }
}

#[test]
fn req_e08_servers_that_are_full_refuse_and_keep_nothing() {
    let mut pair = Pair::new(Scene::default());
    let mut config = ServerConfig::new(Arc::clone(&tls().server));
    config.max_connections = 0;
    pair.server.set_server_config(Some(config));
    pair.exchange();
    assert!(
        matches!(&pair.client_closed,
            Some(ConnectionError::PeerClosed(PeerClose::Transport { code, .. }))
                if *code == Code::CONNECTION_REFUSED),
        "{:?}",
        pair.client_closed
    );
    assert_eq!(pair.server.connection_count(), 0);
}

#[test]
fn a_connection_takes_little_room_besides_tls() {
    let size = size_of::<Connection>();
    assert!(size <= 6 * 1024, "{size} octets");
}

#[test]
fn noise_before_and_after_the_handshake_leaves_nothing_behind() {
    let mut pair = Pair::connected();
    let mut random = crate::random::Random::new([9; 32]);
    for _ in 0..20_000 {
        let len = random.below(1400) as usize;
        let mut noise = vec![0; len];
        random.fill(&mut noise);
        // Most of it looks like an Initial of version 1.
        if len > 30 && random.below(4) > 0 {
            noise[0] = 0xc0 | noise[0] & 0x0f;
            noise[1..5].copy_from_slice(&[0, 0, 0, 1]);
            (noise[5], noise[14]) = (8, 8);
            noise[23] = 0;
        }
        pair.deliver(noise);
        drain(&mut pair.server, pair.now);
    }
    assert_eq!(pair.server.connection_count(), 1);
    assert_eq!(pair.closed, None);
}

#[test]
fn frames_at_random_never_panic_whatever_they_lead_to() {
    let mut random = crate::random::Random::new([8; 32]);
    let mut pair = Pair::connected();
    for _ in 0..3000 {
        let mut frames = vec![];
        for _ in 0..random.below(6) + 1 {
            let frame_type = u64::from(random.below(0x33));
            varint::write(frame_type, &mut frames);
            for _ in 0..random.below(6) {
                let bits = random.below(62);
                varint::write(random.number() >> (64 - bits.max(1)) & varint::MAX, &mut frames);
            }
            let len = random.below(40) as usize;
            let at = frames.len();
            frames.resize(at + len, 0);
            random.fill(&mut frames[at..]);
        }
        frames.truncate(1100);
        if pair.server.connection(pair.at_server.unwrap()).is_none_or(|found| found.is_over()) {
            pair = Pair::connected();
        }
        let packet = pair.forge(Space::Data, &frames);
        pair.deliver(packet);
        drain(&mut pair.server, pair.now);
        while pair.server.poll_event().is_some() {}
        pair.pass(Duration::from_millis(u64::from(random.below(50))));
    }
}
