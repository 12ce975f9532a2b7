//! A peer with the right keys and bad intentions, against a client or a server of ours.
//!
//! Both ends are real endpoints without a network between them. The attacker completes as much of
//! the handshake as the plan says, then seals whatever frames the plan names, from whatever
//! addresses, while time passes and the victim's application goes on with its own work. Four things
//! have to hold: nothing panics; memory stays within a bound that does not depend on the plan; when
//! the victim closes, its code fits what it was sent; and in the end, with the attacker silent, the
//! victim's endpoint becomes empty.

use std::{
    alloc::System,
    collections::BTreeSet,
    net::SocketAddr,
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use arbitrary::Arbitrary;
use bytes::Bytes;
use quic::{
    transport::{
        CidIssuer, ClientConfig, Code, ConnectionError, ConnectionHandle, Dir, Endpoint,
        EndpointConfig, Event, Received, ResetKey, RetryPolicy, ServerConfig, Side, StreamId,
        StreamLimits, TransportConfig,
        fuzzing::{self, Level},
    },
    varint,
};
use quic_lb_tests::sim::{
    crypto::{self, CertificateSize},
    origin, wall,
};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Octets that one connection may cost above what both endpoints need idle: the windows of
/// [`limits`] twice over, and room for bookkeeping that is bounded by constants.
const MEMORY_BOUND: usize = 512 * 1024;
/// Octets that may be left when the connection is gone.
const MEMORY_AFTER: usize = 64 * 1024;
/// Datagrams of the victim's that the attacker keeps to answer later.
const KEPT: usize = 64;
/// Datagrams after one input: several times the largest window that a path here can reach.
const MOST_OUTPUT: usize = 10_000;
/// Streams that the victim's application handles.
const STREAMS: u64 = 4;

/// What happens.
#[derive(Arbitrary, Debug)]
pub struct Plan {
    /// Rounds of the handshake before the attack; from 6 on it is complete.
    rounds: u8,
    retry: bool,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// Packets with these frames, `times` over, the numbers in them growing by their strides.
    Frames { level: Seal, frames: Vec<Forged>, times: u8 },
    /// A packet whose payload is anything.
    Payload { level: Seal, octets: Vec<u8> },
    /// A datagram that is anything.
    Datagram(Vec<u8>),
    /// The attacker's last datagram again, one octet changed unless that is 0.
    Again { place: u16, change: u8 },
    /// The attacker's own endpoint takes what the victim has sent, and answers.
    Behave,
    /// Packets come from another address.
    Address(u8),
    /// Time passes.
    Wait { milliseconds: u16 },
    /// The victim's application does something.
    Use(Use),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Seal {
    Initial,
    Handshake,
    OneRtt,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Use {
    Open { unidirectional: bool },
    Accept { unidirectional: bool },
    Write { stream: u8, octets: u16 },
    Read { stream: u8, octets: u16 },
    Finish { stream: u8 },
    Reset { stream: u8 },
    Stop { stream: u8 },
    Send { octets: u16 },
    Receive,
    UpdateKeys,
    Migrate,
    Rotate,
    Ping,
    Close,
}

/// A frame in the right encoding. What it says is another matter.
#[derive(Arbitrary, Debug)]
enum Forged {
    Padding(u8),
    Ping,
    Ack { largest: Number, delay: u8, first: u8, ranges: Vec<(u8, u8)>, ecn: Option<[u8; 3]> },
    ResetStream { id: Number, code: u8, size: Number },
    StopSending { id: Number, code: u8 },
    Crypto { offset: Number, data: Data },
    NewToken(Data),
    Stream { id: Number, offset: Number, data: Data, fin: bool, open_ended: bool },
    MaxData(Number),
    MaxStreamData { id: Number, limit: Number },
    MaxStreams { unidirectional: bool, limit: Number },
    DataBlocked(Number),
    StreamDataBlocked { id: Number, limit: Number },
    StreamsBlocked { unidirectional: bool, limit: Number },
    NewConnectionId { sequence: Number, retire_prior_to: Number, length: u8 },
    RetireConnectionId(Number),
    PathChallenge(u8),
    PathResponse(u8),
    Close { application: bool, code: Number, reason: Data },
    HandshakeDone,
    Datagram { data: Data, open_ended: bool },
    Unknown(Number),
}

/// A number that is mostly small, and grows from packet to packet.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Number {
    base: Base,
    stride: u8,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Base {
    Small(u8),
    Medium(u16),
    Large(u64),
    /// So far below the largest.
    Highest(u8),
}

impl Number {
    fn at(self, turn: u64) -> u64 {
        let base = match self.base {
            Base::Small(number) => number.into(),
            Base::Medium(number) => number.into(),
            Base::Large(number) => number & varint::MAX,
            Base::Highest(below) => varint::MAX - u64::from(below),
        };
        (base + u64::from(self.stride) * turn).min(varint::MAX)
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Data {
    length: u16,
    octet: u8,
}

impl Data {
    fn octets(self) -> Vec<u8> {
        vec![self.octet; usize::from(self.length) % 1100]
    }
}

impl Forged {
    fn write(&self, turn: u64, out: &mut Vec<u8>) {
        let start = out.len();
        let mut fields = |numbers: &[u64]| {
            numbers.iter().for_each(|&number| varint::write(number, out));
        };
        let of = |unidirectional: &bool| u64::from(*unidirectional);
        match self {
            Self::Padding(more) => out.resize(start + 1 + usize::from(*more), 0),
            Self::Ping => fields(&[0x01]),
            Self::Ack { largest, delay, first, ranges, ecn } => {
                let kind = 0x02 + u64::from(ecn.is_some());
                let count = ranges.len() as u64;
                fields(&[kind, largest.at(turn), u64::from(*delay), count, u64::from(*first)]);
                for &(gap, length) in ranges {
                    fields(&[gap.into(), length.into()]);
                }
                ecn.iter().flatten().for_each(|&count| fields(&[count.into()]));
            }
            Self::ResetStream { id, code, size } => {
                fields(&[0x04, id.at(turn), u64::from(*code), size.at(turn)]);
            }
            Self::StopSending { id, code } => fields(&[0x05, id.at(turn), u64::from(*code)]),
            Self::Crypto { offset, data } => {
                let data = data.octets();
                fields(&[0x06, offset.at(turn), data.len() as u64]);
                out.extend(data);
            }
            Self::NewToken(data) => {
                let data = data.octets();
                fields(&[0x07, data.len() as u64]);
                out.extend(data);
            }
            Self::Stream { id, offset, data, fin, open_ended } => {
                let data = data.octets();
                let kind = 0x0c + u64::from(!open_ended) * 2 + u64::from(*fin);
                fields(&[kind, id.at(turn), offset.at(turn)]);
                if !open_ended {
                    fields(&[data.len() as u64]);
                }
                out.extend(data);
            }
            Self::MaxData(limit) => fields(&[0x10, limit.at(turn)]),
            Self::MaxStreamData { id, limit } => fields(&[0x11, id.at(turn), limit.at(turn)]),
            Self::MaxStreams { unidirectional, limit } => {
                fields(&[0x12 + of(unidirectional), limit.at(turn)]);
            }
            Self::DataBlocked(limit) => fields(&[0x14, limit.at(turn)]),
            Self::StreamDataBlocked { id, limit } => fields(&[0x15, id.at(turn), limit.at(turn)]),
            Self::StreamsBlocked { unidirectional, limit } => {
                fields(&[0x16 + of(unidirectional), limit.at(turn)]);
            }
            Self::NewConnectionId { sequence, retire_prior_to, length } => {
                let sequence = sequence.at(turn);
                fields(&[0x18, sequence, retire_prior_to.at(turn), u64::from(*length)]);
                let octets = sequence.to_be_bytes();
                out.extend(octets.iter().cycle().take(usize::from(*length)));
                out.extend(octets.iter().cycle().take(16));
            }
            Self::RetireConnectionId(sequence) => fields(&[0x19, sequence.at(turn)]),
            Self::PathChallenge(octet) => out.extend([0x1a].iter().chain(&[*octet; 8])),
            Self::PathResponse(octet) => out.extend([0x1b].iter().chain(&[*octet; 8])),
            Self::Close { application, code, reason } => {
                let reason = reason.octets();
                let head: &[u64] = if *application { &[0x1d] } else { &[0x1c] };
                fields(head);
                fields(&[code.at(turn)]);
                if !application {
                    fields(&[0]);
                }
                fields(&[reason.len() as u64]);
                out.extend(reason);
            }
            Self::HandshakeDone => fields(&[0x1e]),
            Self::Datagram { data, open_ended } => {
                let data = data.octets();
                fields(&[0x30 + u64::from(!open_ended)]);
                if !open_ended {
                    fields(&[data.len() as u64]);
                }
                out.extend(data);
            }
            Self::Unknown(kind) => fields(&[kind.at(turn).max(0x40)]),
        }
    }

    /// The codes that a connection may close with because of this frame, besides
    /// PROTOCOL_VIOLATION where a packet of this kind may not carry it.
    fn codes(&self) -> &'static [Code] {
        const LIMIT: Code = Code::STREAM_LIMIT_ERROR;
        const STATE: Code = Code::STREAM_STATE_ERROR;
        const SIZE: Code = Code::FINAL_SIZE_ERROR;
        const FLOW: Code = Code::FLOW_CONTROL_ERROR;
        const ENCODING: Code = Code::FRAME_ENCODING_ERROR;
        const VIOLATION: Code = Code::PROTOCOL_VIOLATION;
        match self {
            Self::Padding(_)
            | Self::Ping
            | Self::MaxData(_)
            | Self::DataBlocked(_)
            | Self::PathChallenge(_)
            | Self::Close { .. } => &[],
            Self::Ack { .. } | Self::NewToken(_) => &[ENCODING, VIOLATION],
            Self::ResetStream { .. } => &[LIMIT, STATE, SIZE, FLOW],
            Self::Stream { .. } => &[LIMIT, STATE, SIZE, FLOW, ENCODING],
            Self::StopSending { .. }
            | Self::MaxStreamData { .. }
            | Self::StreamDataBlocked { .. } => &[LIMIT, STATE],
            // And the alerts of TLS, see `fits`.
            Self::Crypto { .. } => &[
                ENCODING,
                VIOLATION,
                Code::CRYPTO_BUFFER_EXCEEDED,
                Code::TRANSPORT_PARAMETER_ERROR,
            ],
            Self::MaxStreams { .. } | Self::StreamsBlocked { .. } | Self::Unknown(_) => &[ENCODING],
            Self::NewConnectionId { .. } => &[ENCODING, VIOLATION, Code::CONNECTION_ID_LIMIT_ERROR],
            Self::RetireConnectionId(_)
            | Self::PathResponse(_)
            | Self::HandshakeDone
            | Self::Datagram { .. } => &[VIOLATION],
        }
    }
}

/// Runs a plan against a victim in this role.
///
/// # Panics
///
/// When one of the four things does not hold.
pub fn run(victim: Side, plan: &Plan) {
    // Made once, so that they count as what was there before.
    LazyLock::force(&TLS);
    let before = live();
    let mut scene = Scene::new(victim, plan.retry);
    for _ in 0..plan.rounds.min(6) {
        scene.behave();
    }
    for step in &plan.steps {
        scene.step(step);
        let memory = live().saturating_sub(before);
        assert!(memory <= MEMORY_BOUND, "{memory} octets");
    }
    let Scene { victim: mut endpoint, mut now, attacker, received, .. } = scene;
    drop((attacker, received));
    drain_to_empty(&mut endpoint, &mut now);
    let memory = live().saturating_sub(before);
    assert!(memory <= MEMORY_AFTER, "{memory} octets after the end");
}

/// With nobody to speak to, a connection ends in the time it has said.
fn drain_to_empty(endpoint: &mut Endpoint, now: &mut Instant) {
    let start = *now;
    let mut buffer = Vec::new();
    loop {
        while endpoint.poll_transmit(*now, 10, &mut buffer).is_some() {
            buffer.clear();
        }
        while endpoint.poll_event().is_some() {}
        let Some(deadline) = endpoint.deadline() else { break };
        *now = deadline.max(*now);
        assert!(*now - start < Duration::from_secs(600), "a connection that does not end");
        endpoint.handle_deadline(*now);
    }
    assert_eq!(endpoint.connection_count(), 0, "a connection that waits for nothing");
    assert!(!endpoint.has_work());
}

static TLS: LazyLock<(Arc<rustls::ServerConfig>, Arc<rustls::ClientConfig>)> =
    LazyLock::new(|| {
        let size = CertificateSize::Small;
        let mut client = Arc::unwrap_or_clone(crypto::client(1, size, None));
        // What is kept for another connection would be counted as lost.
        client.resumption = rustls::client::Resumption::disabled();
        let mut server = Arc::unwrap_or_clone(crypto::server(2, size));
        server.send_tls13_tickets = 0;
        (Arc::new(server), Arc::new(client))
    });

fn limits() -> TransportConfig {
    let streams = StreamLimits {
        max_bidi: STREAMS,
        max_uni: STREAMS,
        stream_window: 8 * 1024,
        max_stream_window: 16 * 1024,
        connection_window: 16 * 1024,
        max_connection_window: 32 * 1024,
        send_buffer: 16 * 1024,
        max_send_buffer: 16 * 1024,
    };
    TransportConfig {
        streams,
        idle_timeout: Duration::from_secs(10),
        datagram_receive_buffer: 8 * 1024,
        datagram_send_buffer: 8 * 1024,
        ..TransportConfig::default()
    }
}

fn live() -> usize {
    let stats = ALLOCATOR.stats();
    stats.bytes_allocated.saturating_sub(stats.bytes_deallocated)
}

/// The two ends.
struct Scene {
    now: Instant,
    side: Side,
    victim: Endpoint,
    attacker: Endpoint,
    /// Where the attacker is.
    address: u8,
    /// What the victim has sent and the attacker has not looked at.
    received: Vec<Vec<u8>>,
    last: Vec<u8>,
    /// Codes that are fair by now; `None` once anything is.
    fair: Option<BTreeSet<u64>>,
    /// Connections that have ended: nothing may follow.
    ended: Vec<ConnectionHandle>,
}

impl Scene {
    fn new(side: Side, retry: bool) -> Self {
        let now = origin();
        let transport = Arc::new(limits());
        let mut server = ServerConfig::new(Arc::clone(&TLS.0));
        server.transport = Arc::clone(&transport);
        server.retry = if retry { RetryPolicy::Always } else { RetryPolicy::Never };
        let cids = CidIssuer::standalone(8, [1; 32], ResetKey::new([2; 32]));
        let server = Endpoint::new(EndpointConfig::server(server, cids, [3; 32]), now, wall());
        let mut client = Endpoint::new(EndpointConfig::client([4; 32]), now, wall());
        let mut config = ClientConfig::new(Arc::clone(&TLS.1));
        config.transport = transport;
        client
            .connect(now, &config, address(Side::Server, 0), crypto::SERVER_NAME)
            .expect("a valid configuration");
        let (victim, attacker) = match side {
            Side::Client => (client, server),
            Side::Server => (server, client),
        };
        let mut scene = Self {
            now,
            side,
            victim,
            attacker,
            address: 0,
            received: Vec::new(),
            last: Vec::new(),
            fair: Some(BTreeSet::new()),
            ended: Vec::new(),
        };
        scene.drain();
        scene
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Frames { level, frames, times } => {
                for turn in 0..=u64::from(*times) {
                    let mut payload = Vec::new();
                    for frame in frames {
                        frame.write(turn, &mut payload);
                    }
                    // What fits no datagram is cut short, and then anything may be wrong with it.
                    if payload.len() > 1300 {
                        payload.truncate(1300);
                        self.fair = None;
                    }
                    if let Some(fair) = &mut self.fair {
                        let codes = frames.iter().flat_map(Forged::codes);
                        fair.extend(codes.map(|code| code.to_wire()));
                        if !matches!(level, Seal::OneRtt) || frames.is_empty() {
                            fair.insert(Code::PROTOCOL_VIOLATION.to_wire());
                        }
                        if frames.iter().any(|frame| matches!(frame, Forged::Crypto { .. })) {
                            fair.extend((0..=255).map(|alert| Code::crypto(alert).to_wire()));
                        }
                    }
                    self.forge(*level, &payload);
                }
            }
            Step::Payload { level, octets } => {
                self.fair = None;
                self.forge(*level, octets);
            }
            Step::Datagram(octets) => self.deliver(octets.clone()),
            Step::Again { place, change } => {
                let mut datagram = self.last.clone();
                if let Some(octet) = datagram.get_mut(usize::from(*place)) {
                    *octet ^= change;
                }
                self.deliver(datagram);
            }
            Step::Behave => self.behave(),
            Step::Address(address) => self.address = *address,
            Step::Wait { milliseconds } => {
                self.now += Duration::from_millis((*milliseconds).into());
                self.victim.handle_deadline(self.now);
                self.drain();
                self.attacker.handle_deadline(self.now);
            }
            Step::Use(action) => {
                self.use_victim(*action);
                self.drain();
            }
        }
    }

    /// Seals a payload with the attacker's keys and hands it to the victim.
    fn forge(&mut self, level: Seal, payload: &[u8]) {
        let level = match level {
            Seal::Initial => Level::Initial,
            Seal::Handshake => Level::Handshake,
            Seal::OneRtt => Level::OneRtt,
        };
        let Some(handle) = self.attacker.connections().next() else { return };
        let Some(mut connection) = self.attacker.connection_mut(handle) else { return };
        let mut datagram = fuzzing::forge(&mut connection, self.now, level, payload);
        drop(connection);
        if datagram.is_empty() {
            return;
        }
        if level == Level::Initial {
            // Outside the packet, as some clients do.
            datagram.resize(datagram.len().max(1200), 0);
        }
        self.last.clone_from(&datagram);
        self.deliver(datagram);
    }

    fn deliver(&mut self, mut datagram: Vec<u8>) {
        let remote = address(self.side.peer(), self.address);
        let from = Received { remote, local: None, ecn: None };
        self.victim.handle_datagram(self.now, from, &mut datagram);
        self.drain();
    }

    /// The attacker does what an endpoint should, once.
    fn behave(&mut self) {
        let from = Received { remote: address(self.side, 0), local: None, ecn: None };
        for mut datagram in std::mem::take(&mut self.received) {
            self.attacker.handle_datagram(self.now, from, &mut datagram);
        }
        let mut sent = Vec::new();
        let mut buffer = Vec::new();
        while self.attacker.poll_transmit(self.now, 1, &mut buffer).is_some() {
            sent.push(std::mem::take(&mut buffer));
        }
        while self.attacker.poll_event().is_some() {}
        for datagram in sent {
            self.last.clone_from(&datagram);
            self.deliver(datagram);
        }
        self.now += Duration::from_millis(10);
        self.victim.handle_deadline(self.now);
        self.drain();
        self.attacker.handle_deadline(self.now);
    }

    /// Takes what the victim gives, until only a deadline is left.
    fn drain(&mut self) {
        let mut output = 0;
        loop {
            let mut buffer = Vec::new();
            if self.victim.poll_transmit(self.now, 1, &mut buffer).is_some() {
                output += 1;
                assert!(output < MOST_OUTPUT, "output without end");
                if self.received.len() < KEPT {
                    self.received.push(buffer);
                }
            } else if let Some((handle, event)) = self.victim.poll_event() {
                assert!(!self.ended.contains(&handle), "{event:?} after the end");
                if let Event::Closed(error) = event {
                    self.ended.push(handle);
                    self.judge(&error);
                }
            } else {
                return;
            }
        }
    }

    /// Whether a connection may end like this.
    fn judge(&self, error: &ConnectionError) {
        let code = match error {
            ConnectionError::Peer(error) => error.code,
            ConnectionError::Tls { code, .. } => *code,
            ConnectionError::Internal(what) => panic!("internal error: {what}"),
            ConnectionError::VersionMismatch(_) => panic!("{error}"),
            ConnectionError::PeerClosed(_)
            | ConnectionError::Reset
            | ConnectionError::IdleTimeout
            | ConnectionError::HandshakeTimeout { .. }
            | ConnectionError::ClosedLocally => return,
        };
        assert!(code != Code::INTERNAL_ERROR && code != Code::NO_ERROR, "{error}");
        let fits = self.fair.as_ref().is_none_or(|fair| fair.contains(&code.to_wire()));
        assert!(fits, "{error}, which nothing that was sent deserves");
    }

    fn use_victim(&mut self, action: Use) {
        let Some(handle) = self.victim.connections().next() else { return };
        if let Use::Rotate = action {
            let cids = CidIssuer::standalone(8, [5; 32], ResetKey::new([6; 32]));
            return self.victim.set_cid_config(cids);
        }
        let now = self.now;
        let Some(mut connection) = self.victim.connection_mut(handle) else { return };
        let dir = |unidirectional| if unidirectional { Dir::Uni } else { Dir::Bi };
        // Streams of both sides and directions, a few of each.
        let id = |stream: u8| {
            let side = if stream & 1 == 0 { Side::Client } else { Side::Server };
            let index = u64::from(stream >> 2) % STREAMS;
            StreamId::new(side, dir(stream & 2 != 0), index)
        };
        // Refusals are fine.
        match action {
            Use::Open { unidirectional } => drop(connection.open(dir(unidirectional))),
            Use::Accept { unidirectional } => drop(connection.accept(dir(unidirectional))),
            Use::Write { stream, octets } => {
                let data = vec![7; usize::from(octets)];
                let _ = connection.write(id(stream), &data);
            }
            Use::Read { stream, octets } => {
                let mut out = vec![0; usize::from(octets)];
                let _ = connection.read(id(stream), &mut out);
            }
            Use::Finish { stream } => drop(connection.finish(id(stream))),
            Use::Reset { stream } => drop(connection.reset(id(stream), 1)),
            Use::Stop { stream } => drop(connection.stop(id(stream), 2)),
            Use::Send { octets } => {
                let message = Bytes::from(vec![8; usize::from(octets)]);
                let _ = connection.send_datagram(message);
            }
            Use::Receive => drop(connection.receive_datagram()),
            Use::UpdateKeys => connection.update_keys(),
            Use::Migrate => drop(connection.migrate(now, None)),
            Use::Rotate => {}
            Use::Ping => connection.ping(),
            Use::Close => connection.close(now, 3, Bytes::from_static(b"enough")),
        }
    }
}

fn address(side: Side, number: u8) -> SocketAddr {
    match side {
        Side::Client => SocketAddr::from(([198, 51, 100, number >> 4], 1000 + u16::from(number))),
        Side::Server => SocketAddr::from(([192, 0, 2, number >> 4], 443 + u16::from(number))),
    }
}
