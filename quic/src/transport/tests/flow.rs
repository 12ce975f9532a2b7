//! Flow control over the life of a connection: what is given up is given back.

use super::{
    wire::{Wire, all_arrive},
    *,
};

const ROUND_TRIP: Duration = Duration::from_millis(100);
const WINDOW: usize = 20_000;

/// A connection that lets the server have so much on its way, on one stream or all.
fn connected() -> Wire {
    let scene = Scene::with(TransportConfig {
        streams: StreamLimits {
            stream_window: WINDOW as u64,
            max_stream_window: WINDOW as u64,
            connection_window: WINDOW as u64,
            max_connection_window: WINDOW as u64,
            ..StreamLimits::default()
        },
        ..TransportConfig::default()
    });
    Wire::connected(scene, ROUND_TRIP)
}

fn server(wire: &mut Wire) -> std::sync::MutexGuard<'_, Connection> {
    let at_server = wire.pair.at_server.unwrap();
    wire.pair.server.connection_mut(at_server).unwrap()
}

/// Has the server open a stream and write as much as it may, a window at most.
fn write(wire: &mut Wire) -> (StreamId, usize) {
    let stream = server(wire).open(Dir::Uni).unwrap();
    let written = server(wire).write(stream, &[7; WINDOW]).unwrap();
    (stream, written)
}

fn stop(wire: &mut Wire, stream: StreamId) {
    let at_client = wire.pair.at_client;
    wire.pair.client.connection_mut(at_client).unwrap().stop(stream, 1).unwrap();
}

/// The server may send half of a window at least on a new stream, and all of it arrives. What is
/// given back is told when it is the other half.
fn assert_credit_is_back(wire: &mut Wire) {
    let (stream, written) = write(wire);
    assert!(written >= WINDOW / 2, "{written} bytes");
    wire.run(Duration::from_secs(2), &mut all_arrive);
    let read = wire.pair.at_client().read(stream, &mut [0; 2 * WINDOW]);
    assert_eq!(read, Ok(Read::Data(written)));
}

#[test]
fn req_g06_g07_what_a_stopped_stream_held_is_given_back() {
    let mut wire = connected();
    let (stream, written) = write(&mut wire);
    assert_eq!(written, WINDOW);
    wire.run(Duration::from_secs(2), &mut all_arrive);
    stop(&mut wire, stream);
    wire.run(Duration::from_secs(2), &mut all_arrive);
    assert_credit_is_back(&mut wire);
}

#[test]
fn req_g06_g07_what_comes_after_a_stop_is_given_back() {
    let mut wire = connected();
    let stream = server(&mut wire).open(Dir::Uni).unwrap();
    server(&mut wire).write(stream, b"x").unwrap();
    wire.run(ROUND_TRIP, &mut all_arrive);
    // A flight is under way when the client wants no more.
    server(&mut wire).write(stream, &[7; WINDOW]).unwrap();
    wire.run(Duration::from_millis(10), &mut all_arrive);
    stop(&mut wire, stream);
    wire.run(Duration::from_secs(2), &mut all_arrive);
    assert_credit_is_back(&mut wire);
}

#[test]
fn req_g08_what_was_never_sent_of_a_stream_that_was_reset_costs_no_credit() {
    let mut wire = connected();
    let before = wire.pair.at_server().path();
    assert!(before.congestion_window < WINDOW as u64, "{before:?}");
    let (stream, _) = write(&mut wire);
    wire.run(Duration::from_millis(1), &mut all_arrive);
    server(&mut wire).reset(stream, 1).unwrap();
    let (_, written) = write(&mut wire);
    let sent = before.congestion_window;
    assert!(written as u64 + sent >= WINDOW as u64, "{written} bytes after {sent} at most");
}
