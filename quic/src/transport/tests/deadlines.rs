//! Every timer of a connection: it comes due in its time, does something, and is not due again
//! by itself, even when nothing can be sent just then. Otherwise whoever waits for a connection's
//! deadline would wait for nothing, round and round.

use super::*;

/// A new one has to be in the list that [`Connection::deadline`] and
/// [`Connection::handle_deadline`] walk.
const _: () = assert!(Timer::ALL.len() == Timer::Rest as usize + 1, "all timers are listed");

/// Two ends, at one of which a timer runs.
struct Armed {
    pair: Pair,
    at_client: bool,
}

impl Armed {
    fn connection(&mut self) -> &mut Connection {
        if self.at_client { self.pair.at_client() } else { self.pair.at_server() }
    }

    /// What that end has to send.
    fn output(&mut self) -> Vec<Vec<u8>> {
        if self.at_client { self.pair.up() } else { self.pair.down() }
    }
}

fn at_client(pair: Pair) -> Armed {
    Armed { pair, at_client: true }
}

fn at_server(pair: Pair) -> Armed {
    Armed { pair, at_client: false }
}

fn with(change: impl FnOnce(&mut TransportConfig)) -> Scene {
    let mut config = TransportConfig::default();
    change(&mut config);
    Scene::with(config)
}

/// The shortest story in which this timer runs.
fn armed(timer: Timer) -> Armed {
    match timer {
        Timer::End => {
            let mut pair = Pair::connected();
            let now = pair.now;
            pair.at_server().close(now, 7, "bye".into());
            at_server(pair)
        }
        Timer::Idle | Timer::Rest => at_client(Pair::connected()),
        Timer::Handshake => {
            at_client(Pair::new(with(|config| config.idle_timeout = Duration::ZERO)))
        }
        Timer::KeepAlive => at_client(Pair::connected_as(with(|config| {
            config.keep_alive = Some(Duration::from_secs(10));
        }))),
        Timer::Loss => {
            let mut pair = Pair::connected();
            pair.at_client().ping();
            pair.up();
            at_client(pair)
        }
        Timer::Pacing => {
            let mut pair = Pair::connected();
            let stream = pair.at_server().open(Dir::Uni).unwrap();
            pair.at_server().write(stream, &[7; 200_000]).unwrap();
            for _ in 0..50 {
                let sent = pair.down();
                if pair.at_server().deadline_of(Timer::Pacing).is_some() {
                    break;
                }
                pair.pass(Duration::from_millis(50));
                for datagram in sent {
                    pair.deliver_down(datagram);
                }
                for datagram in pair.up() {
                    pair.deliver(datagram);
                }
            }
            at_server(pair)
        }
        Timer::Ack => {
            let mut pair = Pair::connected();
            let ping = pair.forge(Space::Data, &[1]);
            pair.deliver(ping);
            at_server(pair)
        }
        Timer::PathValidation => {
            let mut pair = Pair::connected();
            let ping = pair.forge(Space::Data, &[1]);
            pair.from = "198.51.100.9:1000".parse().unwrap();
            pair.deliver(ping);
            pair.down();
            at_server(pair)
        }
        Timer::MtuSearch => {
            // Nothing above 1200 octets passes, until the search gives up.
            let mut pair = Pair::new(with(|config| config.idle_timeout = Duration::ZERO));
            for _ in 0..400 {
                pair.exchange_up_to(1200);
                if pair.at_server.is_some()
                    && pair.at_server().deadline_of(Timer::MtuSearch).is_some()
                {
                    break;
                }
                pair.pass(Duration::from_millis(50));
            }
            at_server(pair)
        }
        Timer::KeyDiscard => {
            let mut pair = Pair::connected();
            pair.at_client().update_keys();
            pair.at_client().ping();
            for datagram in pair.up() {
                pair.deliver(datagram);
            }
            at_server(pair)
        }
    }
}

/// What a timer is there for has happened.
fn has_acted(timer: Timer, armed: &mut Armed) -> bool {
    let error = armed.connection().error().cloned();
    match timer {
        Timer::End => armed.connection().is_gone(),
        Timer::Idle => error == Some(ConnectionError::IdleTimeout),
        Timer::Handshake => error == Some(ConnectionError::HandshakeTimeout { answered: false }),
        Timer::Loss => armed.output().len() == 2,
        Timer::KeepAlive | Timer::Pacing | Timer::Ack => !armed.output().is_empty(),
        Timer::PathValidation => {
            // Asked again, or given up.
            let home = CLIENT.parse().unwrap();
            armed.connection().path().remote == home || !armed.output().is_empty()
        }
        Timer::MtuSearch => armed.output().iter().any(|datagram| datagram.len() > 1200),
        Timer::KeyDiscard | Timer::Rest => armed.connection().deadline_of(timer).is_none(),
    }
}

#[test]
fn every_timer_comes_due_acts_and_is_not_due_again_by_itself() {
    for timer in Timer::ALL {
        // On time, and after the caller has slept, or was kept from sending, for long.
        for late in [Duration::ZERO, Duration::from_secs(15)] {
            let mut armed = armed(timer);
            let at = armed.connection().deadline_of(timer);
            let at = at.unwrap_or_else(|| panic!("{timer:?} does not run"));
            assert!(armed.connection().deadline().is_some_and(|first| first <= at), "{timer:?}");
            let before = at.checked_sub(Duration::from_nanos(1)).unwrap();
            if armed.connection().deadline() == Some(at) {
                armed.connection().handle_deadline(before);
                assert_eq!(armed.connection().deadline(), Some(at), "{timer:?} came too early");
            }
            let now = at + late;
            armed.connection().handle_deadline(now);
            for other in Timer::ALL {
                let due = armed.connection().deadline_of(other);
                assert!(due.is_none_or(|due| due > now), "{timer:?} leaves {other:?} due");
            }
            armed.pair.now = now;
            assert!(has_acted(timer, &mut armed), "{timer:?} {late:?} late");
        }
    }
}

#[test]
fn once_a_connection_is_over_only_its_end_is_waited_for() {
    let mut armed = armed(Timer::Loss);
    let now = armed.pair.now;
    armed.connection().close(now, 7, "bye".into());
    for timer in Timer::ALL {
        let runs = armed.connection().deadline_of(timer).is_some();
        assert_eq!(runs, timer == Timer::End, "{timer:?}");
    }
    let end = armed.connection().deadline().unwrap();
    armed.connection().handle_deadline(end);
    assert_eq!(armed.connection().deadline(), None);
}

#[test]
fn an_acknowledgment_that_may_not_leave_is_waited_for_by_nobody() {
    // The server owes an ACK to an address that may get less than a packet.
    let mut pair = Pair::connected();
    let ping = pair.forge(Space::Data, &[1]);
    pair.from = "198.51.100.9:1000".parse().unwrap();
    pair.deliver(ping);
    pair.down();
    for _ in 0..4 {
        let ping = pair.forge(Space::Data, &[1]);
        pair.deliver(ping);
    }
    let now = pair.now + Duration::from_millis(30);
    pair.at_server().handle_deadline(now);
    assert!(pair.at_server().deadline().unwrap() > now);
}

#[test]
fn a_larger_size_is_searched_for_once_the_window_has_room_and_not_waited_for_before() {
    let mut armed = armed(Timer::MtuSearch);
    let stream = armed.pair.at_server().open(Dir::Uni).unwrap();
    armed.pair.at_server().write(stream, &[7; 200_000]).unwrap();
    armed.pair.now = armed.connection().deadline_of(Timer::MtuSearch).unwrap();
    // A full window, and no acknowledgment.
    armed.output();
    let path = armed.connection().path();
    assert!(path.in_flight + u64::from(path.mtu) > path.congestion_window);
    let now = armed.pair.now;
    armed.connection().handle_deadline(now);
    assert!(armed.connection().deadline().unwrap() > now);
}
