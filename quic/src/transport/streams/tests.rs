use std::time::{Duration, Instant};

use super::*;
use crate::{transport::recovery::SentFrame, varint};

fn server(limits: StreamLimits) -> Streams {
    let mut streams = Streams::new(Side::Server, limits, SendMemory::default());
    streams.set_peer_limits(&TransportParameters {
        initial_max_data: 10_000,
        initial_max_stream_data_bidi_local: 4_000,
        initial_max_stream_data_bidi_remote: 4_000,
        initial_max_stream_data_uni: 4_000,
        initial_max_streams_bidi: 2,
        initial_max_streams_uni: 2,
        ..TransportParameters::default()
    });
    streams
}

fn small() -> StreamLimits {
    StreamLimits {
        max_bidi: 4,
        max_uni: 4,
        stream_window: 1000,
        max_stream_window: 1000,
        connection_window: 1500,
        max_connection_window: 1500,
        send_buffer: 6000,
        max_send_buffer: 6000,
    }
}

fn id(number: u64) -> StreamId {
    StreamId::from_wire(number)
}

fn data(number: u64, offset: u64, data: &[u8], fin: bool) -> frame::Stream<'_> {
    frame::Stream { id: id(number), offset, data, fin }
}

fn code<T: std::fmt::Debug>(result: Result<T, TransportError>) -> Code {
    result.unwrap_err().code
}

#[test]
fn req_g01_opening_a_stream_opens_the_lower_ones() {
    let mut streams = server(small());
    streams.on_stream(&data(8, 0, b"x", false)).unwrap();
    assert_eq!(streams.poll_event(), Some(StreamEvent::Opened(Dir::Bi)));
    let accepted: Vec<_> = std::iter::from_fn(|| streams.accept(Dir::Bi)).collect();
    assert_eq!(accepted, [id(0), id(4), id(8)]);
}

#[test]
fn req_g06_limits_of_stream_and_connection_hold() {
    let mut streams = server(small());
    let too_much = [0; 1001];
    assert_eq!(code(streams.on_stream(&data(0, 0, &too_much, false))), Code::FLOW_CONTROL_ERROR);
    let mut streams = server(small());
    streams.on_stream(&data(0, 0, &too_much[..1000], false)).unwrap();
    streams.on_stream(&data(4, 0, &too_much[..500], false)).unwrap();
    assert_eq!(code(streams.on_stream(&data(8, 0, b"x", false))), Code::FLOW_CONTROL_ERROR);
    assert_eq!(
        code(streams.on_stream(&data(0, varint_max() - 1, b"x", false))),
        Code::FLOW_CONTROL_ERROR
    );
}

fn varint_max() -> u64 {
    varint::MAX
}

#[test]
fn req_g08_the_final_size_is_final() {
    for second in [data(0, 0, b"longer than before", false), data(0, 0, b"lo", true)] {
        let mut streams = server(small());
        streams.on_stream(&data(0, 0, b"long", true)).unwrap();
        assert_eq!(code(streams.on_stream(&second)), Code::FINAL_SIZE_ERROR);
    }
    let mut streams = server(small());
    streams.on_stream(&data(0, 0, b"long", false)).unwrap();
    let reset = frame::ResetStream { id: id(0), code: 1, final_size: 3 };
    assert_eq!(code(streams.on_reset_stream(&reset)), Code::FINAL_SIZE_ERROR);
}

#[test]
fn req_g08_a_reset_counts_its_final_size_and_gives_the_credit_back() {
    let mut streams = server(small());
    let reset = frame::ResetStream { id: id(0), code: 7, final_size: 900 };
    streams.on_reset_stream(&reset).unwrap();
    assert_eq!((streams.received, streams.consumed), (900, 900));
    assert!(streams.max_data_due);
    assert_eq!(streams.read(id(0), &mut [0; 9]), Err(ReadError::Reset(7)));
    assert_eq!(streams.read(id(0), &mut [0; 9]), Err(ReadError::Closed));
}

#[test]
fn req_g09_streams_beyond_the_limit_are_errors_and_open_nothing() {
    let mut streams = server(small());
    for number in [4 * 4, 4 * 4 + 2, 1 << 61] {
        assert_eq!(code(streams.on_stream(&data(number, 0, b"", false))), Code::STREAM_LIMIT_ERROR);
    }
    assert!(streams.recv.is_empty());
}

#[test]
fn req_g10_wrong_directions_and_streams_not_created_are_errors() {
    let state = Code::STREAM_STATE_ERROR;
    let mut streams = server(small());
    let ours = streams.open(Dir::Uni).unwrap();
    let theirs = StreamId::new(Side::Client, Dir::Uni, 0);
    let uncreated = StreamId::new(Side::Server, Dir::Bi, 0);
    let reset = |id| frame::ResetStream { id, code: 0, final_size: 0 };
    assert_eq!(code(streams.on_stream(&data(ours.to_wire(), 0, b"", false))), state);
    assert_eq!(code(streams.on_reset_stream(&reset(ours))), state);
    assert_eq!(code(streams.on_stream_data_blocked(ours)), state);
    assert_eq!(code(streams.on_stop_sending(theirs, 0)), state);
    assert_eq!(code(streams.on_max_stream_data(theirs, 0)), state);
    assert_eq!(code(streams.on_stream(&data(uncreated.to_wire(), 0, b"", false))), state);
    assert_eq!(code(streams.on_max_stream_data(uncreated, 0)), state);
    assert_eq!(code(streams.on_stop_sending(uncreated, 0)), state);
}

#[test]
fn req_g05_stop_sending_is_answered_by_a_reset_with_its_code() {
    let mut streams = server(small());
    let stream = streams.open(Dir::Uni).unwrap();
    assert_eq!(streams.write(stream, &[0; 100]), Ok(100));
    let (mut out, mut sent) = (Vec::new(), Vec::new());
    streams.write_data(60, &mut out, &mut sent);
    streams.on_stop_sending(stream, 42).unwrap();
    assert_eq!(streams.poll_event(), Some(StreamEvent::Stopped(stream, 42)));
    assert_eq!(streams.write(stream, b"x"), Err(WriteError::Stopped(42)));
    let [SentFrame::Stream { range, .. }] = &sent[..] else { panic!("one frame") };
    let range = range.clone();
    assert_eq!(streams.written, range.end, "what was not sent does not count");
    out.clear();
    streams.write_control(Instant::now(), Duration::ZERO, 200, &mut out, &mut sent);
    let frames: Vec<_> = frame::Frames::new(&out).unwrap().map(Result::unwrap).collect();
    let expected = frame::ResetStream { id: stream, code: 42, final_size: range.end };
    assert_eq!(frames, [frame::Frame::ResetStream(expected)]);
    streams.on_reset_acked(stream);
    assert_eq!(streams.write(stream, b"x"), Err(WriteError::Closed));
}

#[test]
fn req_g09_max_streams_grows_only_when_both_halves_are_done_and_read() {
    let mut streams = server(small());
    streams.on_stream(&data(0, 0, b"hi", true)).unwrap();
    let mut out = [0; 10];
    assert_eq!(streams.read(id(0), &mut out), Ok(Read::Data(2)));
    assert_eq!(streams.read(id(0), &mut out), Ok(Read::Finished));
    assert!(!streams.remote[0].limit_due, "the other half is open");
    streams.finish(id(0)).unwrap();
    let (mut octets, mut sent) = (Vec::new(), Vec::new());
    streams.write_data(1000, &mut octets, &mut sent);
    streams.on_stream_acked(id(0), 0..0, true);
    assert!(streams.remote[0].limit_due);
    octets.clear();
    streams.write_control(Instant::now(), Duration::ZERO, 1000, &mut octets, &mut sent);
    assert_eq!(streams.remote[0].announced, 5);
    // A late frame for the stream that is gone changes nothing.
    streams.on_stream(&data(0, 0, b"hi", true)).unwrap();
    assert!(streams.recv.is_empty());
}

/// Opens, answers and closes stream `number`, and says whether a limit was announced.
fn request(streams: &mut Streams, number: u64) -> bool {
    let stream = StreamId::new(Side::Client, Dir::Bi, number);
    streams.on_stream(&data(stream.to_wire(), 0, b"?", true)).unwrap();
    while let Ok(Read::Data(_)) = streams.read(stream, &mut [0; 8]) {}
    streams.finish(stream).unwrap();
    let (mut out, mut sent) = (Vec::new(), Vec::new());
    streams.write_data(1000, &mut out, &mut sent);
    streams.on_stream_acked(stream, 0..0, true);
    out.clear();
    sent.clear();
    streams.write_control(Instant::now(), Duration::ZERO, 1000, &mut out, &mut sent);
    sent.contains(&SentFrame::MaxStreams(Dir::Bi))
}

#[test]
fn req_g09_a_stream_per_request_costs_an_eighth_of_a_frame_and_never_runs_out() {
    let mut streams = server(StreamLimits { max_bidi: 64, ..small() });
    let frames = (0..1000).filter(|&number| request(&mut streams, number)).count();
    assert_eq!(frames, 1000 / 8);
    assert!(streams.remote[0].announced - streams.remote[0].opened >= 64 - 8);
    // With the last stream in use, every one that closes is news.
    let last = StreamId::new(Side::Client, Dir::Bi, streams.remote[0].announced - 1);
    streams.on_stream(&data(last.to_wire(), 0, b"?", false)).unwrap();
    assert!(request(&mut streams, 1000) && request(&mut streams, 1001));
}

#[test]
fn req_g02_octets_that_come_again_differently_change_nothing() {
    let mut streams = server(small());
    streams.on_stream(&data(0, 0, b"first", false)).unwrap();
    streams.on_stream(&data(0, 0, b"other and more", false)).unwrap();
    let mut out = [0; 20];
    assert_eq!(streams.read(id(0), &mut out), Ok(Read::Data(14)));
    assert_eq!(out[..14], *b"first and more");
    streams.on_stream(&data(0, 5, b"late", false)).unwrap();
    assert_eq!(streams.read(id(0), &mut out), Ok(Read::Blocked));
}

/// Every event in every state of a sending half.
#[test]
fn req_g04_what_a_sending_half_does_in_each_of_its_states() {
    // Ready or Send, Data Sent, Reset Sent, Data Recvd, Reset Recvd; see section 3.1.
    for state in 0..5 {
        let fresh = || {
            let mut streams = server(small());
            let stream = streams.open(Dir::Uni).unwrap();
            streams.write(stream, b"abc").unwrap();
            let flush = |streams: &mut Streams| {
                let (mut out, mut sent) = (Vec::new(), Vec::new());
                streams.write_control(Instant::now(), Duration::ZERO, 500, &mut out, &mut sent);
                streams.write_data(500, &mut out, &mut sent);
            };
            match state {
                0 => {}
                1 | 3 => streams.finish(stream).unwrap(),
                _ => streams.reset(stream, 5).unwrap(),
            }
            flush(&mut streams);
            match state {
                3 => streams.on_stream_acked(stream, 0..3, true),
                4 => streams.on_reset_acked(stream),
                _ => {}
            }
            (streams, stream)
        };
        let (mut streams, stream) = fresh();
        assert_eq!(streams.write(stream, b"x").is_ok(), state == 0, "{state}: write");
        let (mut streams, stream) = fresh();
        assert_eq!(streams.finish(stream).is_ok(), state == 0, "{state}: finish");
        let (mut streams, stream) = fresh();
        assert_eq!(streams.reset(stream, 6).is_ok(), state < 2, "{state}: reset");
        let (mut streams, stream) = fresh();
        streams.on_stop_sending(stream, 7).unwrap();
        let told = streams.poll_event() == Some(StreamEvent::Stopped(stream, 7));
        assert_eq!(told, state < 3, "{state}: STOP_SENDING");
        let (mut streams, stream) = fresh();
        streams.on_stream_lost(stream, 0..3, state == 1 || state == 3);
        assert_eq!(streams.has_output(), state < 2, "{state}: loss");
        let (mut streams, stream) = fresh();
        streams.on_max_stream_data(stream, 9_000).unwrap();
        assert_eq!(streams.send_state(stream).is_some(), state < 3, "{state}: MAX_STREAM_DATA");
    }
}

/// Every event in every state of a receiving half.
#[test]
fn req_g04_what_a_receiving_half_does_in_each_of_its_states() {
    // Recv, Size Known, Data Recvd, Reset Recvd, Data Read, Reset Read; see section 3.2.
    for state in 0..6 {
        let fresh = || {
            let mut streams = server(small());
            let reset = frame::ResetStream { id: id(2), code: 9, final_size: 3 };
            match state {
                0 => streams.on_stream(&data(2, 1, b"bc", false)).unwrap(),
                1 => streams.on_stream(&data(2, 1, b"bc", true)).unwrap(),
                2 | 4 => streams.on_stream(&data(2, 0, b"abc", true)).unwrap(),
                _ => streams.on_reset_stream(&reset).unwrap(),
            }
            if state >= 4 {
                while let Ok(Read::Data(_)) = streams.read(id(2), &mut [0; 9]) {}
            }
            streams
        };
        let read = fresh().read(id(2), &mut [0; 9]);
        let expected = match state {
            0 | 1 => Ok(Read::Blocked),
            2 => Ok(Read::Data(3)),
            3 => Err(ReadError::Reset(9)),
            _ => Err(ReadError::Closed),
        };
        assert_eq!(read, expected, "{state}: read");
        let mut streams = fresh();
        assert_eq!(streams.stop(id(2), 4).is_ok(), state < 4, "{state}: stop");
        let mut streams = fresh();
        streams.on_stream(&data(2, 0, b"abc", true)).unwrap();
        let readable = streams.read(id(2), &mut [0; 9]);
        assert_eq!(readable == Ok(Read::Data(3)), state < 3, "{state}: the rest");
        let mut streams = fresh();
        let again = frame::ResetStream { id: id(2), code: 8, final_size: 3 };
        streams.on_reset_stream(&again).unwrap();
        let outcome = streams.read(id(2), &mut [0; 9]);
        let expected = match state {
            // The RFC leaves open what becomes of data that has arrived and was not read.
            0..=2 => Err(ReadError::Reset(8)),
            3 => Err(ReadError::Reset(9)),
            _ => Err(ReadError::Closed),
        };
        assert_eq!(outcome, expected, "{state}: RESET_STREAM");
    }
}

#[test]
fn req_g11_blocked_frames_go_out_once_per_limit() {
    let mut streams = server(small());
    let stream = streams.open(Dir::Bi).unwrap();
    assert_eq!(streams.write(stream, &[0; 5000]), Ok(4000));
    let now = Instant::now();
    let (mut out, mut sent) = (Vec::new(), Vec::new());
    streams.write_control(now, Duration::ZERO, 1000, &mut out, &mut sent);
    assert_eq!(sent, [SentFrame::StreamDataBlocked(stream)]);
    assert_eq!(streams.write(stream, &[0; 1000]), Ok(0));
    streams.write_control(now, Duration::ZERO, 1000, &mut out, &mut sent);
    assert_eq!(sent.len(), 1);
    streams.on_max_stream_data(stream, 4500).unwrap();
    assert_eq!(streams.poll_event(), Some(StreamEvent::Writable(stream)));
    assert_eq!(streams.write(stream, &[0; 1000]), Ok(500));
}

#[test]
fn req_g03_higher_priorities_go_first_and_equal_ones_in_turn() {
    let mut streams = server(small());
    let low = streams.open(Dir::Uni).unwrap();
    let high = streams.open(Dir::Uni).unwrap();
    let other = streams.open(Dir::Bi).unwrap();
    for stream in [low, high, other] {
        streams.write(stream, &[0; 300]).unwrap();
    }
    streams.set_priority(high, 5).unwrap();
    let mut order = vec![];
    while streams.has_output() {
        let (mut out, mut sent) = (Vec::new(), Vec::new());
        streams.write_data(150, &mut out, &mut sent);
        order.extend(sent.into_iter().map(|frame| match frame {
            SentFrame::Stream { id, .. } => id,
            other => panic!("{other:?}"),
        }));
    }
    assert_eq!(order[..3], [high, high, high]);
    assert!(order[3..].windows(2).any(|pair| pair[0] != pair[1]));
}

/// A stream of a server whose peer takes anything, and how much of ten mebibytes it buffers.
fn written(streams: &mut Streams) -> usize {
    let stream = streams.open(Dir::Uni).unwrap();
    streams.write(stream, &vec![7; 10 << 20]).unwrap()
}

fn generous(memory: &SendMemory) -> Streams {
    let limits =
        StreamLimits { send_buffer: 1 << 20, max_send_buffer: 4 << 20, ..StreamLimits::default() };
    let mut streams = Streams::new(Side::Server, limits, memory.clone());
    streams.set_peer_limits(&TransportParameters {
        initial_max_data: 1 << 40,
        initial_max_stream_data_uni: 1 << 40,
        initial_max_streams_uni: 10,
        ..TransportParameters::default()
    });
    streams
}

#[test]
fn send_buffers_follow_the_congestion_window_and_not_what_the_peer_would_take() {
    for (window, buffer) in [(12_000, 1 << 20), (1 << 20, 2 << 20), (1 << 40, 4 << 20)] {
        let mut streams = generous(&SendMemory::default());
        streams.set_congestion_window(window);
        assert_eq!(written(&mut streams), buffer, "{window}");
    }
}

#[test]
fn send_buffers_of_many_connections_share_what_they_take_beyond_their_first_size() {
    let memory = SendMemory::new(5 << 20);
    let mut all = [(); 4].map(|()| generous(&memory));
    let sizes = all.each_mut().map(|streams| {
        streams.set_congestion_window(1 << 30);
        written(streams)
    });
    // Who comes too late has the first size all the same.
    assert_eq!((sizes[0], sizes[3]), (4 << 20, 1 << 20));
    assert!(sizes.iter().sum::<usize>() <= 9 << 20 && memory.used() <= 5 << 20, "{sizes:?}");
    drop(all);
    assert_eq!(memory.used(), 0);
}

#[test]
fn a_writer_that_waits_is_woken_when_the_window_has_grown() {
    let mut streams = generous(&SendMemory::default());
    assert_eq!(written(&mut streams), 1 << 20);
    assert_eq!(streams.poll_event(), None);
    streams.set_congestion_window(1 << 20);
    assert!(matches!(streams.poll_event(), Some(StreamEvent::Writable(_))));
}
