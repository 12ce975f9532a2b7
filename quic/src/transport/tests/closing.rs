//! The end of a connection as a table: what may happen, in every state, and where that leads.

use super::{
    connection::{Arrival, Life},
    *,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Happens {
    /// The application closes.
    Close,
    /// The peer breaks a rule.
    Violation,
    /// The peer closes.
    PeerClose,
    /// A stateless reset comes.
    Reset,
    /// The peer goes on as if nothing was.
    Packet,
    /// What is due leaves.
    Transmit,
    /// Less time passes than a closing connection is kept for.
    Moment,
    /// More than that.
    LongTime,
    /// More than any connection is kept for without a word from its peer.
    IdleTime,
}

const STATES: [Life; 5] = [Life::Open, Life::CloseDue, Life::Closing, Life::Draining, Life::Gone];

const EVENTS: [Happens; 9] = [
    Happens::Close,
    Happens::Violation,
    Happens::PeerClose,
    Happens::Reset,
    Happens::Packet,
    Happens::Transmit,
    Happens::Moment,
    Happens::LongTime,
    Happens::IdleTime,
];

/// Where it leads.
fn next(life: Life, happens: Happens) -> Life {
    match (life, happens) {
        (Life::Open, Happens::Close | Happens::Violation) => Life::CloseDue,
        (Life::Open | Life::CloseDue | Life::Closing, Happens::PeerClose | Happens::Reset) => {
            Life::Draining
        }
        (Life::Open, Happens::IdleTime) => Life::Gone,
        (Life::CloseDue, Happens::Transmit) => Life::Closing,
        // Whatever it is, it shows that the peer has not heard of the close.
        (Life::Closing, Happens::Violation | Happens::Packet) => Life::CloseDue,
        (
            Life::CloseDue | Life::Closing | Life::Draining,
            Happens::LongTime | Happens::IdleTime,
        ) => Life::Gone,
        _ => life,
    }
}

/// The server's connection, without its endpoint, which forgets those that are gone.
struct Ending {
    pair: Pair,
}

impl Ending {
    fn at(life: Life) -> Self {
        let mut ending = Self { pair: Pair::connected() };
        let story: &[Happens] = match life {
            Life::Open => &[],
            Life::CloseDue => &[Happens::Close],
            Life::Closing => &[Happens::Close, Happens::Transmit],
            Life::Draining => &[Happens::PeerClose],
            Life::Gone => &[Happens::IdleTime],
        };
        for &happens in story {
            ending.happens(happens);
        }
        ending.events();
        assert_eq!(ending.connection().life(), life);
        ending
    }

    fn connection(&mut self) -> &mut Connection {
        self.pair.at_server()
    }

    fn happens(&mut self, happens: Happens) {
        let now = self.pair.now;
        let ping = fields(types::PING, &[]);
        match happens {
            Happens::Close => self.connection().close(now, 7, "bye".into()),
            Happens::Violation => self.packet(&fields(types::HANDSHAKE_DONE, &[])),
            Happens::PeerClose => self.packet(&fields(types::APPLICATION_CLOSE, &[3, 0])),
            Happens::Reset => self.connection().handle_reset(now),
            Happens::Packet => self.packet(&ping),
            Happens::Transmit => {
                let closing = self.connection().life() == Life::CloseDue;
                let sent = self.connection().poll_transmit(now, 1, &mut vec![]);
                assert_eq!(sent.is_some(), closing);
            }
            Happens::Moment => self.pass(Duration::from_millis(1)),
            Happens::LongTime => self.pass(Duration::from_secs(10)),
            Happens::IdleTime => self.pass(Duration::from_secs(31)),
        }
    }

    /// A packet of the client's comes.
    fn packet(&mut self, frames: &[u8]) {
        let mut packet = self.pair.forge(Space::Data, frames);
        let (now, remote, len) = (self.pair.now, self.pair.from, packet.len());
        let arrival = Arrival { now, remote, local: None, ecn: None, len };
        self.connection().handle_datagram(arrival, &mut packet, 8);
    }

    fn pass(&mut self, time: Duration) {
        let now = self.pair.now + time;
        self.connection().handle_deadline(now);
    }

    /// How often the application is told that it is over.
    fn events(&mut self) -> usize {
        let mut closed = 0;
        while let Some(event) = self.connection().poll_event() {
            closed += usize::from(matches!(event, Event::Closed(_)));
        }
        closed
    }
}

#[test]
fn every_event_in_every_state_leads_where_it_should_and_the_end_is_told_once() {
    for life in STATES {
        for happens in EVENTS {
            let mut ending = Ending::at(life);
            let error = ending.connection().error().cloned();
            assert_eq!(error.is_some(), life != Life::Open);
            ending.happens(happens);
            let expected = next(life, happens);
            assert_eq!(ending.connection().life(), expected, "{life:?}, {happens:?}");
            let ended = life == Life::Open && expected != Life::Open;
            assert_eq!(ending.events(), usize::from(ended), "{life:?}, {happens:?}");
            if life != Life::Open {
                let now = ending.connection().error().cloned();
                assert_eq!(now, error, "{life:?}, {happens:?}: another reason");
            }
            let silent = matches!(expected, Life::Draining | Life::Gone);
            let now = ending.pair.now;
            if silent {
                let sent = ending.connection().poll_transmit(now, 1, &mut vec![]);
                assert_eq!(sent, None, "{life:?}, {happens:?}: not silent");
            }
        }
    }
}
