//! A client and a server with a network between them: datagrams take their time, and a script says
//! which of them arrive.

use std::collections::BTreeMap;

use super::*;
use crate::transport::frame::Frame;

/// Times at which something happens, before a test counts as stuck.
const MAX_STEPS: usize = 500_000;

/// A datagram that has just left.
pub(super) struct Datagram {
    pub(super) at: Instant,
    /// From the client to the server.
    pub(super) upward: bool,
    pub(super) ecn: Option<Ecn>,
    pub(super) bytes: Vec<u8>,
}

/// What becomes of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Arrives,
    /// A router marks it instead of dropping it.
    Marked,
    /// It takes so much longer, and others overtake it.
    Late(Duration),
    Lost,
}

/// Decides the fate of each datagram. The ends are there to be looked at.
pub(super) type Script<'a> = &'a mut dyn FnMut(&mut Pair, &Datagram) -> Fate;

pub(super) fn all_arrive(_: &mut Pair, _: &Datagram) -> Fate {
    Fate::Arrives
}

/// The network, and an application at either end that downloads.
pub(super) struct Wire {
    pub(super) pair: Pair,
    /// How long a datagram takes, in either direction.
    pub(super) delay: Duration,
    /// Bytes that the server has still to write to a stream of its own.
    pub(super) unwritten: usize,
    /// Bytes that the client has read.
    pub(super) read: usize,
    /// Whether the client reads what the server sends.
    pub(super) client_reads: bool,
    /// Whether the server reads what clients send.
    pub(super) server_reads: bool,
    accepted: Vec<StreamId>,
    pub(super) stream: Option<StreamId>,
    under_way: BTreeMap<(Instant, u64), Datagram>,
    count: u64,
}

impl Wire {
    /// Before the first datagram.
    pub(super) fn new(scene: Scene, round_trip: Duration) -> Self {
        Self {
            pair: Pair::new(scene),
            delay: round_trip / 2,
            unwritten: 0,
            read: 0,
            client_reads: true,
            server_reads: false,
            accepted: vec![],
            stream: None,
            under_way: BTreeMap::new(),
            count: 0,
        }
    }

    /// After the handshake, with nothing left to say.
    pub(super) fn connected(scene: Scene, round_trip: Duration) -> Self {
        let mut wire = Self::new(scene, round_trip);
        wire.run(Duration::from_secs(5), &mut all_arrive);
        assert!(wire.pair.at_server().is_confirmed() && wire.pair.at_client().is_confirmed());
        wire
    }

    /// Has the server send `bytes` more, which the client reads as they come.
    pub(super) fn download(&mut self, bytes: usize) {
        self.unwritten += bytes;
    }

    /// Lets time pass, and everything happen that is due until then.
    pub(super) fn run(&mut self, time: Duration, script: Script<'_>) {
        let until = self.pair.now + time;
        for _ in 0..MAX_STEPS {
            self.drain(script);
            let arrival = self.under_way.first_key_value().map(|(&(at, _), _)| at);
            let due = [arrival, self.pair.client.deadline(), self.pair.server.deadline()];
            let next = due.into_iter().flatten().min().filter(|&at| at <= until);
            let Some(next) = next else {
                self.pair.now = until;
                return;
            };
            self.pair.now = self.pair.now.max(next);
            if arrival.is_some_and(|at| at <= self.pair.now) {
                let (_, datagram) = self.under_way.pop_first().unwrap();
                self.deliver(datagram);
            } else {
                self.pair.pass(Duration::ZERO);
            }
        }
        panic!("the ends do not come to rest");
    }

    /// Takes from both ends what they have to say, to each other and to their applications.
    fn drain(&mut self, script: Script<'_>) {
        self.pair.note_events();
        self.transfer();
        let now = self.pair.now;
        for upward in [true, false] {
            let mut bytes = vec![];
            for left in (0..MAX_STEPS).rev() {
                assert!(left > 0, "the end never falls silent");
                let end = if upward { &mut self.pair.client } else { &mut self.pair.server };
                let Some(sent) = end.poll_transmit(now, 1, &mut bytes) else { break };
                let bytes = std::mem::take(&mut bytes);
                let mut datagram = Datagram { at: now, upward, ecn: sent.ecn, bytes };
                let there = if upward { SERVER.parse().unwrap() } else { self.pair.from };
                let fate = script(&mut self.pair, &datagram);
                if fate == Fate::Marked {
                    datagram.ecn = Some(Ecn::Ce);
                }
                if fate != Fate::Lost && sent.remote == there {
                    self.count += 1;
                    let late = if let Fate::Late(late) = fate { late } else { Duration::ZERO };
                    self.under_way.insert((now + self.delay + late, self.count), datagram);
                }
            }
        }
        self.pair.note_events();
    }

    fn deliver(&mut self, datagram: Datagram) {
        let Datagram { upward, ecn, mut bytes, .. } = datagram;
        let remote = if upward { self.pair.from } else { SERVER.parse().unwrap() };
        let from = Received { remote, local: None, ecn };
        let end = if upward { &mut self.pair.server } else { &mut self.pair.client };
        end.handle_datagram(self.pair.now, from, &mut bytes);
    }

    fn transfer(&mut self) {
        let Some(at_server) = self.pair.at_server else { return };
        if self.unwritten > 0
            && let Some(mut server) = self.pair.server.connection_mut(at_server)
            && let Some(stream) = self.stream.or_else(|| server.open(Dir::Uni))
        {
            self.stream = Some(stream);
            let chunk = [7; 64 * 1024];
            while self.unwritten > 0 {
                let chunk = &chunk[..self.unwritten.min(chunk.len())];
                let Ok(count @ 1..) = server.write(stream, chunk) else { break };
                self.unwritten -= count;
            }
        }
        if self.server_reads
            && let Some(mut server) = self.pair.server.connection_mut(at_server)
        {
            self.accepted.extend(std::iter::from_fn(|| server.accept(Dir::Uni)));
            let mut chunk = [0; 4096];
            self.accepted.retain(|&stream| {
                loop {
                    match server.read(stream, &mut chunk) {
                        Ok(Read::Data(_)) => {}
                        Ok(Read::Blocked) => break true,
                        Ok(Read::Finished) | Err(_) => break false,
                    }
                }
            });
        }
        if self.client_reads
            && let Some(stream) = self.stream
            && let Some(mut client) = self.pair.client.connection_mut(self.pair.at_client)
        {
            let mut chunk = [0; 64 * 1024];
            while let Ok(Read::Data(count)) = client.read(stream, &mut chunk) {
                self.read += count;
            }
        }
    }
}

impl Datagram {
    /// Whether a packet of this datagram has a frame of the kind that is wanted.
    pub(super) fn says(&self, pair: &mut Pair, wanted: impl Fn(&Frame<'_>) -> bool) -> bool {
        let packets = pair.peek(self.upward, &self.bytes);
        packets.iter().any(|packet| packet.frames().any(|frame| wanted(&frame)))
    }
}
