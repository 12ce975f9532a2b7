//! What is lost is said again: each kind of frame that has to be, when the datagram with the first
//! one of its kind is lost.
//!
//! <https://www.rfc-editor.org/rfc/rfc9000.html#section-13.3>

use super::{
    wire::{Fate, Wire, all_arrive},
    *,
};
use crate::transport::frame::Frame;

const ROUND_TRIP: Duration = Duration::from_millis(100);

struct Row {
    name: &'static str,
    /// Sent by the client.
    upward: bool,
    wanted: fn(&Frame<'_>) -> bool,
    /// What makes an end say it.
    cause: fn(&mut Pair),
}

/// Limits that are reached soon.
fn narrow() -> Scene {
    Scene::with(TransportConfig {
        streams: StreamLimits {
            max_bidi: 4,
            max_uni: 4,
            stream_window: 8000,
            max_stream_window: 8000,
            connection_window: 8000,
            max_connection_window: 8000,
            ..StreamLimits::default()
        },
        ..TransportConfig::default()
    })
}

fn client(pair: &mut Pair) -> std::sync::MutexGuard<'_, Connection> {
    pair.client.connection_mut(pair.at_client).unwrap()
}

const ROWS: [Row; 12] = [
    Row {
        name: "RESET_STREAM",
        upward: true,
        wanted: |frame| matches!(frame, Frame::ResetStream(_)),
        cause: |pair| {
            let stream = client(pair).open(Dir::Uni).unwrap();
            client(pair).write(stream, b"x").unwrap();
            client(pair).reset(stream, 1).unwrap();
        },
    },
    Row {
        name: "STOP_SENDING",
        upward: true,
        wanted: |frame| matches!(frame, Frame::StopSending { .. }),
        cause: |pair| {
            let stream = client(pair).open(Dir::Bi).unwrap();
            client(pair).write(stream, b"x").unwrap();
            client(pair).stop(stream, 1).unwrap();
        },
    },
    Row {
        name: "STREAM",
        upward: true,
        wanted: |frame| matches!(frame, Frame::Stream(_)),
        cause: |pair| {
            let stream = client(pair).open(Dir::Uni).unwrap();
            client(pair).write(stream, b"x").unwrap();
        },
    },
    Row {
        name: "STREAM with nothing but an end",
        upward: true,
        wanted: |frame| matches!(frame, Frame::Stream(stream) if stream.fin),
        cause: |pair| {
            let stream = client(pair).open(Dir::Uni).unwrap();
            client(pair).finish(stream).unwrap();
        },
    },
    Row {
        name: "DATA_BLOCKED",
        upward: true,
        wanted: |frame| matches!(frame, Frame::DataBlocked),
        cause: |pair| {
            for _ in 0..3 {
                let stream = client(pair).open(Dir::Uni).unwrap();
                client(pair).write(stream, &[7; 4000]).unwrap();
            }
        },
    },
    Row {
        name: "STREAM_DATA_BLOCKED",
        upward: true,
        wanted: |frame| matches!(frame, Frame::StreamDataBlocked { .. }),
        cause: |pair| {
            let stream = client(pair).open(Dir::Uni).unwrap();
            client(pair).write(stream, &[7; 9000]).unwrap();
        },
    },
    Row {
        name: "STREAMS_BLOCKED",
        upward: true,
        wanted: |frame| matches!(frame, Frame::StreamsBlocked),
        cause: |pair| while client(pair).open(Dir::Uni).is_some() {},
    },
    Row {
        name: "MAX_STREAMS",
        upward: false,
        wanted: |frame| matches!(frame, Frame::MaxStreams { .. }),
        cause: |pair| {
            for _ in 0..4 {
                let stream = client(pair).open(Dir::Uni).unwrap();
                client(pair).reset(stream, 1).unwrap();
            }
        },
    },
    Row {
        name: "MAX_DATA",
        upward: true,
        wanted: |frame| matches!(frame, Frame::MaxData(_)),
        cause: |_| {},
    },
    Row {
        name: "MAX_STREAM_DATA",
        upward: true,
        wanted: |frame| matches!(frame, Frame::MaxStreamData { .. }),
        cause: |_| {},
    },
    Row {
        name: "NEW_CONNECTION_ID",
        upward: false,
        wanted: |frame| matches!(frame, Frame::NewConnectionId(_)),
        cause: rotate,
    },
    Row {
        name: "RETIRE_CONNECTION_ID",
        upward: true,
        wanted: |frame| matches!(frame, Frame::RetireConnectionId { .. }),
        cause: rotate,
    },
];

fn rotate(pair: &mut Pair) {
    pair.server.set_cid_config(CidIssuer::standalone(8, [9; 32], ResetKey::new([9; 32])));
}

#[test]
fn req_f09_every_frame_that_matters_comes_again_when_its_datagram_is_lost() {
    for row in ROWS {
        let mut wire = Wire::connected(narrow(), ROUND_TRIP);
        // A reader that begins late: the server has used up what it was allowed, and does not get on
        // without MAX_DATA and MAX_STREAM_DATA.
        wire.download(50_000);
        wire.client_reads = false;
        wire.run(Duration::from_secs(2), &mut all_arrive);
        wire.client_reads = true;
        (row.cause)(&mut wire.pair);
        // Who is blocked has to stay so; who is done has to be read.
        wire.server_reads = !row.upward;
        let mut said = vec![];
        wire.run(Duration::from_secs(10), &mut |pair, datagram| {
            if datagram.upward != row.upward || !datagram.says(pair, row.wanted) {
                return Fate::Arrives;
            }
            said.push(datagram.at);
            if said.len() == 1 { Fate::Lost } else { Fate::Arrives }
        });
        let name = row.name;
        assert!(said.len() >= 2, "{name} was said {} times", said.len());
        assert!(said[1] - said[0] < 10 * ROUND_TRIP, "{name}: {:?} later", said[1] - said[0]);
        assert_eq!(wire.read, 50_000, "{name}");
    }
}
