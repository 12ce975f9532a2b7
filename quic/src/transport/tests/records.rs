//! What an observer is told, held against what happened, by those who saw it: the network between
//! the two ends, the other end, and the counters.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Mutex,
};

use super::*;

/// A packet by its space and number.
type Number = (Space, u64);

/// What one end told.
#[derive(Default)]
struct Told {
    /// Size of each datagram, as it left and as it came.
    datagrams_sent: Vec<usize>,
    datagrams_received: Vec<usize>,
    sent: BTreeMap<Number, SentPacket>,
    received: BTreeMap<Number, (usize, Vec<u8>)>,
    acked: BTreeSet<Number>,
    lost: BTreeMap<Number, LossReason>,
    late: BTreeSet<Number>,
    lost_probes: u64,
    dropped: BTreeMap<usize, u64>,
    probe_timeouts: u64,
    key_updates: u64,
    installed: Vec<Space>,
    discarded: Vec<Space>,
    signs: Vec<CongestionSign>,
    states: Vec<CongestionState>,
    metrics: Option<RecoveryMetrics>,
    pto_counts: BTreeSet<u32>,
    mtus: Vec<u16>,
    timers: Vec<Timer>,
    validations: Vec<bool>,
    validated: Vec<SocketAddr>,
    failed: Vec<SocketAddr>,
    moved: Vec<SocketAddr>,
    messages_dropped: u64,
    closed: Option<ConnectionError>,
    last: Option<Instant>,
}

/// A packet that left.
struct SentPacket {
    size: usize,
    ack_eliciting: bool,
    frames: Vec<u8>,
}

impl Told {
    fn note(&mut self, now: Instant, record: &Record<'_>) {
        assert!(self.last.is_none_or(|last| last <= now), "records come in their order");
        self.last = Some(now);
        match *record {
            Record::DatagramSent { size } => self.datagrams_sent.push(size),
            Record::DatagramReceived { size } => self.datagrams_received.push(size),
            Record::PacketSent { space, number, size, ack_eliciting, frames } => {
                let told = SentPacket { size, ack_eliciting, frames: frames.to_vec() };
                assert!(self.sent.insert((space, number), told).is_none(), "sent twice");
            }
            Record::PacketReceived { space, number, size, frames } => {
                let told = (size, frames.to_vec());
                assert!(self.received.insert((space, number), told).is_none(), "came twice");
            }
            Record::PacketBuffered { .. } => {}
            Record::PacketDropped { reason, .. } => {
                *self.dropped.entry(reason as usize).or_default() += 1;
            }
            Record::PacketAcked { space, number } => {
                assert!(self.sent.contains_key(&(space, number)));
                assert!(self.acked.insert((space, number)), "acknowledged twice");
            }
            Record::PacketLost { space, number, size, reason, mtu_probe } => {
                let packet = (space, number);
                assert_eq!(self.sent[&packet].size, size);
                assert!(!self.acked.contains(&packet));
                assert!(self.lost.insert(packet, reason).is_none(), "lost twice");
                self.lost_probes += u64::from(mtu_probe);
            }
            Record::PacketLate { space, number } => {
                assert!(self.lost.contains_key(&(space, number)));
                assert!(self.late.insert((space, number)), "late twice");
            }
            Record::CongestionUndone => {}
            Record::ProbeTimeout { count, .. } => {
                assert!(count > 0);
                self.probe_timeouts += 1;
            }
            Record::Congestion(sign) => self.signs.push(sign),
            Record::CongestionStateUpdated(state) => self.states.push(state),
            Record::RecoveryUpdated(metrics) => {
                self.metrics = Some(metrics);
                self.pto_counts.insert(metrics.pto_count);
            }
            Record::KeysInstalled(space) => self.installed.push(space),
            Record::KeysDiscarded(space) => self.discarded.push(space),
            Record::KeysUpdated { .. } => self.key_updates += 1,
            Record::PathValidationStarted { again, .. } => self.validations.push(again),
            Record::PathValidated { remote } => self.validated.push(remote),
            Record::PathValidationFailed { remote } => self.failed.push(remote),
            Record::PathChanged { remote } => self.moved.push(remote),
            Record::MtuUpdated { mtu } => self.mtus.push(mtu),
            Record::MessagesDropped { count } => self.messages_dropped += count,
            Record::TimerExpired(timer) => self.timers.push(timer),
            Record::Closed(error) => {
                assert!(self.closed.replace(error.clone()).is_none(), "closed twice");
            }
        }
    }

    /// Holds what was told against what the connection has counted.
    fn assert_counted(&self, connection: &Connection) {
        let stats = connection.stats();
        let traffic = |datagrams: &[usize]| Traffic {
            datagrams: datagrams.len() as u64,
            octets: datagrams.iter().map(|&size| size as u64).sum(),
        };
        assert_eq!(stats.sent, traffic(&self.datagrams_sent));
        assert_eq!(stats.received, traffic(&self.datagrams_received));
        assert_eq!(stats.lost_packets, self.lost.len() as u64 - self.lost_probes);
        assert_eq!(stats.late_packets, self.late.len() as u64);
        assert_eq!(stats.probe_timeouts, self.probe_timeouts);
        assert_eq!(stats.key_updates, self.key_updates);
        let begun = self.validations.iter().filter(|&&again| !again).count();
        assert_eq!(stats.path_validations, begun as u64);
        assert_eq!(stats.dropped_datagrams, self.messages_dropped);
        for reason in [DropReason::Undecryptable, DropReason::NoKeys, DropReason::Duplicate] {
            let told = self.dropped.get(&(reason as usize)).copied().unwrap_or(0);
            assert_eq!(connection.dropped(reason), told, "{reason:?}");
        }
    }
}

type Shared = Arc<Mutex<Told>>;

/// Both ends, observed, and a network that may lose datagrams.
struct Observed {
    pair: Pair,
    at_client: Shared,
    at_server: Shared,
    /// Datagrams of the server that left.
    down: usize,
    /// Packets of the server that were lost on their way.
    gone: BTreeSet<Number>,
}

impl Observed {
    fn new(config: TransportConfig) -> Self {
        let (at_client, at_server) = (Shared::default(), Shared::default());
        let told = [Arc::clone(&at_client), Arc::clone(&at_server)];
        let observers = Observers::new(move |subject| {
            let told = Arc::clone(&told[usize::from(subject.side.is_server())]);
            Some(Box::new(move |now, record| told.lock().unwrap().note(now, record)))
        });
        let config = TransportConfig { observers: Some(observers), ..config };
        let pair = Pair::new(Scene::with(config));
        Self { pair, at_client, at_server, down: 0, gone: BTreeSet::new() }
    }

    /// A round trip of 40 ms, in which the network loses those datagrams of the server that it is
    /// told to, by their number.
    fn round(&mut self, loses: impl Fn(usize) -> bool) {
        for datagram in self.pair.up() {
            self.pair.deliver(datagram);
        }
        while let Some((handle, event)) = self.pair.server.poll_event() {
            if event == Event::Connected {
                self.pair.at_server = Some(handle);
            }
        }
        let down = self.pair.down();
        self.pair.pass(Duration::from_millis(20));
        for datagram in down {
            if loses(self.down) {
                let packets = self.pair.peek(false, &datagram);
                self.gone.extend(packets.iter().map(|packet| (packet.space, packet.number)));
            } else {
                self.pair.deliver_down(datagram);
            }
            self.down += 1;
        }
        while self.pair.client.poll_event().is_some() {}
        self.pair.pass(Duration::from_millis(20));
    }

    /// Hands the client what the server writes, until it has it all.
    fn download(&mut self, octets: usize, loses: impl Fn(usize) -> bool) {
        let stream = self.pair.at_server().open(Dir::Uni).unwrap();
        let (mut left, mut read) = (octets, 0);
        for _ in 0..1000 {
            if left > 0 {
                left -= self.pair.at_server().write(stream, &vec![7; left]).unwrap();
            }
            self.round(&loses);
            let mut chunk = vec![0; 1 << 16];
            while let Ok(Read::Data(count)) = self.pair.at_client().read(stream, &mut chunk) {
                read += count;
            }
            if read == octets {
                return;
            }
        }
        panic!("{read} of {octets} octets came");
    }
}

#[test]
fn a_handshake_and_a_transfer_with_losses_are_told_as_they_happened() {
    let mut observed = Observed::new(TransportConfig::default());
    for _ in 0..10 {
        observed.round(|_| false);
    }
    let before = observed.down;
    observed.download(1_000_000, |number| number > before && (number - before) % 50 < 2);
    for _ in 0..40 {
        observed.round(|_| false);
    }
    let Observed { mut pair, at_client, at_server, down, gone } = observed;
    let (client, server) = (at_client.lock().unwrap(), at_server.lock().unwrap());
    server.assert_counted(pair.at_server());
    client.assert_counted(pair.at_client());

    // The network has seen the same datagrams, and the other end the same packets.
    assert_eq!((server.datagrams_sent.len(), gone.len() > 20), (down, true));
    for (packet, sent) in &server.sent {
        match client.received.get(packet) {
            Some((size, frames)) => {
                assert!(!gone.contains(packet));
                assert_eq!((*size, frames), (sent.size, &sent.frames), "{packet:?}");
            }
            None => assert!(gone.contains(packet), "{packet:?} did not arrive"),
        }
    }
    for (packet, sent) in &client.sent {
        let (size, frames) = &server.received[packet];
        assert_eq!((*size, frames), (sent.size, &sent.frames), "{packet:?}");
    }

    // What the network lost is told as lost, and what it did not is not; each for its reason.
    let expected: BTreeSet<_> =
        gone.iter().filter(|packet| server.sent[packet].ack_eliciting).copied().collect();
    assert_eq!(server.lost.keys().copied().collect::<BTreeSet<_>>(), expected);
    assert!(expected.iter().all(|packet| !server.acked.contains(packet)));
    assert!(client.lost.is_empty());
    for (&(space, number), reason) in &server.lost {
        let overtaken = server.acked.range((space, number + 3)..).next().is_some();
        assert!(overtaken || *reason == LossReason::TimeThreshold, "{number}");
    }
    assert!(server.lost.values().any(|reason| *reason == LossReason::PacketThreshold));

    // What that led to.
    assert!(server.signs.contains(&CongestionSign::Loss));
    assert_eq!(server.states, [CongestionState::SlowStart, CongestionState::CongestionAvoidance]);
    let path = pair.at_server().path();
    let metrics = server.metrics.unwrap();
    assert_eq!((metrics.smoothed_rtt, metrics.min_rtt), (path.rtt, path.min_rtt));
    assert_eq!((metrics.congestion_window, metrics.in_flight), (path.congestion_window, 0));
    assert!(server.mtus.last() == Some(&path.mtu) && server.mtus.is_sorted_by(|a, b| a < b));
    for told in [&client, &server] {
        assert_eq!(told.installed, [Space::Initial, Space::Handshake, Space::Data]);
        assert_eq!(told.discarded, [Space::Initial, Space::Handshake]);
        assert!(told.timers.contains(&Timer::Rest) && told.closed.is_none());
    }
}

#[test]
fn packets_that_pass_late_are_told_as_lost_by_time() {
    let mut observed = Observed::new(TransportConfig::default());
    for _ in 0..10 {
        observed.round(|_| false);
    }
    // The last but one of a flight: nothing later can overtake it by three.
    let stream = observed.pair.at_server().open(Dir::Uni).unwrap();
    observed.pair.at_server().write(stream, &[7; 4000]).unwrap();
    let first = observed.down;
    for _ in 0..10 {
        observed.round(|number| number == first + 1);
    }
    let server = observed.at_server.lock().unwrap();
    let reasons: Vec<_> = server.lost.values().copied().collect();
    assert_eq!(reasons, [LossReason::TimeThreshold]);
}

#[test]
fn probe_timeouts_in_a_row_are_told_and_that_they_are_over() {
    let mut observed = Observed::new(TransportConfig::default());
    for _ in 0..10 {
        observed.round(|_| false);
    }
    let stream = observed.pair.at_server().open(Dir::Uni).unwrap();
    observed.pair.at_server().write(stream, b"anybody?").unwrap();
    for round in 0..200 {
        observed.round(|_| round < 40);
    }
    let server = observed.at_server.lock().unwrap();
    assert!([0, 1, 2].iter().all(|count| server.pto_counts.contains(count)));
    assert_eq!(server.metrics.map(|metrics| metrics.pto_count), Some(0));
}

#[test]
fn moves_key_updates_drops_and_the_end_are_told() {
    let mut observed = Observed::new(TransportConfig {
        datagram_receive_buffer: 1000,
        ..TransportConfig::default()
    });
    for _ in 0..10 {
        observed.round(|_| false);
    }
    let pair = &mut observed.pair;
    let moved: SocketAddr = "198.51.100.9:1000".parse().unwrap();
    let home = pair.from;
    let mut forgery = pair.forge(Space::Data, &[1]);
    *forgery.last_mut().unwrap() ^= 1;
    pair.deliver(forgery);
    // Nobody reads these.
    for _ in 0..3 {
        pair.at_client().send_datagram(vec![7; 600].into()).unwrap();
    }
    pair.at_client().update_keys();
    pair.at_client().ping();
    observed.round(|_| false);
    // A copy of a packet comes from where nobody answers.
    let copy = observed.pair.forge(Space::Data, &[1]);
    observed.pair.from = moved;
    observed.pair.deliver(copy);
    observed.pair.from = home;
    for _ in 0..100 {
        observed.round(|_| true);
    }
    let now = observed.pair.now;
    observed.pair.at_client().migrate(now, None).unwrap();
    (0..2).for_each(|_| observed.round(|_| false));
    let now = observed.pair.now;
    observed.pair.at_server().close(now, 7, "bye".into());
    observed.round(|_| false);
    let (client, server) = (observed.at_client.lock().unwrap(), observed.at_server.lock().unwrap());
    client.assert_counted(observed.pair.at_client());
    server.assert_counted(observed.pair.at_server());
    assert_eq!((&client.validations[..], client.moved.len()), (&[false][..], 1));
    assert_eq!((server.dropped[&(DropReason::Undecryptable as usize)], server.key_updates), (1, 1));
    assert_eq!((client.key_updates, server.messages_dropped), (1, 2));
    assert_eq!(server.validations, [false, true], "there, and again where it was");
    assert_eq!((&server.moved[..], &server.failed[..]), (&[moved, home][..], &[moved, home][..]));
    assert_eq!(server.closed, Some(ConnectionError::ClosedLocally));
    assert!(matches!(&client.closed, Some(ConnectionError::PeerClosed(_))));
}

#[test]
fn connections_that_nobody_observes_count_all_the_same() {
    let observers = Observers::new(|subject| {
        assert_eq!((subject.side, subject.remote), (Side::Client, SERVER.parse().unwrap()));
        None
    });
    let mut scene = Scene::default();
    let observed = TransportConfig { observers: Some(observers), ..TransportConfig::default() };
    scene.client.transport = Arc::new(observed);
    let mut pair = Pair::connected_as(scene);
    assert!(pair.at_client().stats().sent.datagrams > 2);
    assert_eq!(pair.at_client().stats().lost_packets, 0);
}
