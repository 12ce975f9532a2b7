//! Nothing may be sent: the socket takes no more, and nobody asks an endpoint for datagrams. What
//! comes in counts all the same, for the application, the tables and the deadlines.

use super::*;

/// All events of the server's, without asking it for datagrams.
fn events(pair: &mut Pair) -> Vec<Event> {
    std::iter::from_fn(|| pair.server.poll_event()).map(|(_, event)| event).collect()
}

/// What the server's application reads.
fn read(pair: &mut Pair, id: StreamId) -> Read {
    let handle = pair.at_server.unwrap();
    pair.server.connection_mut(handle).unwrap().read(id, &mut [0; 10]).unwrap()
}

#[test]
fn data_is_told_to_readers_while_nothing_may_be_sent() {
    let mut pair = Pair::connected();
    let id = pair.at_client().open(Dir::Uni).unwrap();
    pair.at_client().write(id, b"first").unwrap();
    pair.up().into_iter().for_each(|datagram| pair.deliver(datagram));
    let opened = [StreamEvent::Opened(Dir::Uni), StreamEvent::Readable(id)].map(Event::Stream);
    assert_eq!(events(&mut pair), opened);
    let handle = pair.at_server.unwrap();
    assert_eq!(pair.server.connection_mut(handle).unwrap().accept(Dir::Uni), Some(id));
    assert_eq!(read(&mut pair, id), Read::Data(5));
    assert_eq!(read(&mut pair, id), Read::Blocked);
    assert_eq!(events(&mut pair), []);
    pair.at_client().write(id, b"second").unwrap();
    pair.up().into_iter().for_each(|datagram| pair.deliver(datagram));
    assert_eq!(events(&mut pair), [Event::Stream(StreamEvent::Readable(id))]);
    assert_eq!(read(&mut pair, id), Read::Data(6));
}

#[test]
fn deadlines_follow_what_comes_in_and_what_is_done_while_nothing_may_be_sent() {
    let mut pair = Pair::connected();
    let packet = pair.forge(Space::Data, &[1]);
    pair.deliver(packet);
    assert_eq!(pair.server.deadline(), Some(pair.now + Duration::from_millis(25)));
    // Closing takes three probe timeouts, whether or not anybody hears of it.
    let mut pair = Pair::connected();
    let (now, handle) = (pair.now, pair.at_server.unwrap());
    pair.server.connection_mut(handle).unwrap().close(now, 7, "bye".into());
    let deadline = pair.server.deadline().unwrap();
    assert!(deadline <= now + Duration::from_secs(1), "{:?}", deadline - now);
    assert_eq!(events(&mut pair), [Event::Closed(ConnectionError::ClosedLocally)]);
    pair.server.handle_deadline(deadline);
    assert_eq!(pair.server.deadline(), None);
    assert_eq!(pair.server.connection_count(), 0);
}

#[test]
fn retired_connection_ids_lead_nowhere_while_nothing_may_be_sent() {
    let mut pair = Pair::connected();
    let before: Vec<_> = pair.at_server().local_cids().collect();
    let packet = pair.forge(Space::Data, &fields(types::RETIRE_CONNECTION_ID, &[1]));
    pair.deliver(packet);
    assert_eq!(events(&mut pair), []);
    pair.server.assert_consistent();
    let after: Vec<_> = pair.at_server().local_cids().collect();
    assert_eq!(after.len() + 1, before.len());
    let retired = before.into_iter().find(|id| !after.contains(id)).unwrap();
    let mut datagram = vec![0x40];
    datagram.extend_from_slice(&retired);
    datagram.resize(60, 0);
    pair.deliver(datagram);
    assert_eq!(pair.server.take_unclaimed().map(|id| id[..8].to_vec()), Some(retired.to_vec()));
}

/// With nothing to send, or no way to send it, an endpoint has few things to do: a deadline that has
/// been handled does not stay due.
#[test]
fn a_connection_whose_datagrams_cannot_leave_ends_by_its_deadlines_alone() {
    let mut pair = Pair::connected();
    let packet = pair.forge(Space::Data, &stream(0, 0, b"a question"));
    pair.deliver(packet);
    let handle = pair.at_server.unwrap();
    let mut connection = pair.server.connection_mut(handle).unwrap();
    let id = connection.accept(Dir::Bi).unwrap();
    connection.write(id, &[7; 100_000]).unwrap();
    drop(connection);
    let mut ends = vec![];
    let mut steps = 0;
    while let Some(deadline) = pair.server.deadline() {
        pair.now = pair.now.max(deadline);
        pair.server.handle_deadline(pair.now);
        ends.extend(events(&mut pair));
        steps += 1;
        assert!(steps < 100, "a deadline that stays due");
    }
    assert_eq!(ends.last(), Some(&Event::Closed(ConnectionError::IdleTimeout)));
    // Also what they left in the queues is gone.
    assert!(pair.down().is_empty());
    assert!(pair.server.is_blank());
}
