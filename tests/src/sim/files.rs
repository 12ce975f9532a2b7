//! The applications of simulations: a server that sends as many octets as it is asked for, and
//! clients that ask, upload, and check what comes.
//!
//! A request is one bidirectional stream: eight octets that say how many octets to send back, then
//! an upload of the pattern. The answer is the pattern, then the end.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use quic::transport::{
    ClientConfig, ConnectionError, ConnectionHandle, Dir, Endpoint, Event, Read, Stats,
    StreamEvent, StreamId, WriteError,
};

use super::{
    NodeId, World,
    crypto::SERVER_NAME,
    host::{App, Host},
};

/// Octets written or read at a time.
const CHUNK: usize = 16 * 1024;

/// The server.
#[derive(Debug, Default)]
pub struct FileServer {
    streams: BTreeMap<(ConnectionHandle, StreamId), Serving>,
    /// Connections whose handshake is complete.
    pub connected: u64,
    /// Connections that resumed a session.
    pub resumed: u64,
    /// Times that a client's address changed.
    pub moves: u64,
    /// How connections ended.
    pub closed: Vec<ConnectionError>,
    /// Datagrams received, which are echoed.
    pub datagrams: u64,
}

#[derive(Debug, Default)]
struct Serving {
    /// The request's head, as far as it has come.
    head: Vec<u8>,
    uploaded: usize,
    ended: bool,
    sent: usize,
}

impl Serving {
    fn wanted(&self) -> Option<usize> {
        let head: [u8; 8] = self.head[..].try_into().ok()?;
        usize::try_from(u64::from_be_bytes(head)).ok()
    }
}

impl FileServer {
    fn read(&mut self, endpoint: &mut Endpoint, handle: ConnectionHandle, id: StreamId) {
        let Some(mut connection) = endpoint.connection_mut(handle) else { return };
        let serving = self.streams.entry((handle, id)).or_default();
        let mut buffer = [0; CHUNK];
        loop {
            match connection.read(id, &mut buffer) {
                Ok(Read::Data(count)) => {
                    let data = &buffer[..count];
                    let head = data.len().min(8 - serving.head.len());
                    serving.head.extend_from_slice(&data[..head]);
                    let body = &data[head..];
                    assert_eq!(body, pattern(serving.uploaded, body.len()), "the upload");
                    serving.uploaded += body.len();
                }
                Ok(Read::Finished) => {
                    serving.ended = true;
                    break;
                }
                Ok(Read::Blocked) => break,
                Err(_) => {
                    self.streams.remove(&(handle, id));
                    return;
                }
            }
        }
        drop(connection);
        self.write(endpoint, handle, id);
    }

    fn write(&mut self, endpoint: &mut Endpoint, handle: ConnectionHandle, id: StreamId) {
        let Some(mut connection) = endpoint.connection_mut(handle) else { return };
        let Some(serving) = self.streams.get_mut(&(handle, id)).filter(|serving| serving.ended)
        else {
            return;
        };
        let wanted = serving.wanted().unwrap_or(0);
        if send_pattern(&mut connection, id, &mut serving.sent, wanted) {
            self.streams.remove(&(handle, id));
        }
    }
}

impl App for FileServer {
    fn on_event(
        &mut self,
        _now: Instant,
        endpoint: &mut Endpoint,
        handle: ConnectionHandle,
        event: Event,
    ) {
        match event {
            Event::Connected => {
                self.connected += 1;
                let resumed = endpoint.connection(handle).is_some_and(|found| found.is_resumed());
                self.resumed += u64::from(resumed);
            }
            Event::Stream(StreamEvent::Opened(dir)) => {
                if let Some(mut connection) = endpoint.connection_mut(handle) {
                    while connection.accept(dir).is_some() {}
                }
            }
            Event::Stream(StreamEvent::Readable(id)) => self.read(endpoint, handle, id),
            Event::Stream(StreamEvent::Writable(id)) => self.write(endpoint, handle, id),
            Event::PeerMoved(_) => self.moves += 1,
            Event::DatagramReceived => {
                if let Some(mut connection) = endpoint.connection_mut(handle) {
                    while let Some(message) = connection.receive_datagram() {
                        self.datagrams += 1;
                        let _ = connection.send_datagram(message);
                    }
                }
            }
            Event::Closed(error) => {
                self.closed.push(error);
                self.streams.retain(|&(of, _), _| of != handle);
            }
            Event::Stream(_) | Event::DatagramsUnblocked => {}
        }
    }

    fn on_idle(&mut self, _now: Instant, _endpoint: &mut Endpoint) {}
}

/// One file to fetch.
#[derive(Clone, Copy, Debug)]
pub struct Fetch {
    /// Octets to download.
    pub download: usize,
    /// Octets to upload before.
    pub upload: usize,
}

/// A client: connections one after the other, each fetching the same files.
#[derive(Debug)]
pub struct FileClient {
    /// What it connects with.
    pub config: ClientConfig,
    server: SocketAddr,
    files: Vec<Fetch>,
    /// Connections still to make, the current one not counted.
    pub connections_left: u32,
    /// The current connection.
    pub current: Option<ConnectionHandle>,
    next_file: usize,
    streams: BTreeMap<StreamId, Fetching>,
    /// Files fetched and checked.
    pub done: usize,
    /// Handshakes completed.
    pub connected: u32,
    /// Sessions resumed.
    pub resumed: u32,
    /// How connections ended, other than as planned.
    pub failed: Vec<ConnectionError>,
    /// Connections ended as planned.
    pub closed: u32,
    /// Figures of the last connection.
    pub stats: Stats,
    /// Streams open at once, at most.
    pub peak: usize,
    /// Datagrams that came back.
    pub datagrams: u64,
    /// Whether the connection stays open when all is fetched.
    pub stay: bool,
}

#[derive(Debug)]
struct Fetching {
    fetch: Fetch,
    head_sent: usize,
    uploaded: usize,
    received: usize,
}

impl FileClient {
    /// A client of the server at `server`.
    #[must_use]
    pub const fn new(config: ClientConfig, server: SocketAddr, files: Vec<Fetch>) -> Self {
        Self {
            config,
            server,
            files,
            connections_left: 1,
            current: None,
            next_file: 0,
            streams: BTreeMap::new(),
            done: 0,
            connected: 0,
            resumed: 0,
            failed: Vec::new(),
            closed: 0,
            stats: NO_STATS,
            peak: 0,
            datagrams: 0,
            stay: false,
        }
    }

    /// Whether there is nothing left to do.
    #[must_use]
    pub const fn is_done(&self) -> bool {
        self.connections_left == 0 && self.current.is_none()
    }

    fn open(&mut self, endpoint: &mut Endpoint, handle: ConnectionHandle) {
        while let Some(&fetch) = self.files.get(self.next_file) {
            let Some(mut connection) = endpoint.connection_mut(handle) else { return };
            let Some(id) = connection.open(Dir::Bi) else { return };
            drop(connection);
            self.next_file += 1;
            let fetching = Fetching { fetch, head_sent: 0, uploaded: 0, received: 0 };
            self.streams.insert(id, fetching);
            self.peak = self.peak.max(self.streams.len());
            self.write(endpoint, handle, id);
        }
    }

    fn write(&mut self, endpoint: &mut Endpoint, handle: ConnectionHandle, id: StreamId) {
        let Some(mut connection) = endpoint.connection_mut(handle) else { return };
        let Some(fetching) = self.streams.get_mut(&id) else { return };
        let head = (fetching.fetch.download as u64).to_be_bytes();
        while fetching.head_sent < head.len() {
            match connection.write(id, &head[fetching.head_sent..]) {
                Ok(0) | Err(_) => return,
                Ok(count) => fetching.head_sent += count,
            }
        }
        send_pattern(&mut connection, id, &mut fetching.uploaded, fetching.fetch.upload);
    }

    fn read(
        &mut self,
        now: Instant,
        endpoint: &mut Endpoint,
        handle: ConnectionHandle,
        id: StreamId,
    ) {
        let Some(mut connection) = endpoint.connection_mut(handle) else { return };
        let Some(fetching) = self.streams.get_mut(&id) else { return };
        let mut buffer = [0; CHUNK];
        loop {
            match connection.read(id, &mut buffer) {
                Ok(Read::Data(count)) => {
                    let data = &buffer[..count];
                    assert_eq!(data, pattern(fetching.received, count), "the download");
                    fetching.received += count;
                }
                Ok(Read::Blocked) => return,
                Ok(Read::Finished) => break,
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(fetching.received, fetching.fetch.download, "the length of the download");
        self.streams.remove(&id);
        self.done += 1;
        if self.streams.is_empty() && self.next_file == self.files.len() && !self.stay {
            self.stats = connection.stats();
            connection.close(now, 0, bytes::Bytes::from_static(b"done"));
        }
    }
}

const NO_STATS: Stats = Stats {
    sent: quic::transport::Traffic { datagrams: 0, octets: 0 },
    received: quic::transport::Traffic { datagrams: 0, octets: 0 },
    lost_packets: 0,
    late_packets: 0,
    probe_timeouts: 0,
    key_updates: 0,
    path_validations: 0,
    dropped_datagrams: 0,
};

impl App for FileClient {
    fn on_event(
        &mut self,
        now: Instant,
        endpoint: &mut Endpoint,
        handle: ConnectionHandle,
        event: Event,
    ) {
        if self.current != Some(handle) {
            return;
        }
        match event {
            Event::Connected => {
                self.connected += 1;
                let resumed = endpoint.connection(handle).is_some_and(|found| found.is_resumed());
                self.resumed += u32::from(resumed);
                self.open(endpoint, handle);
            }
            Event::Stream(StreamEvent::Readable(id)) => self.read(now, endpoint, handle, id),
            Event::Stream(StreamEvent::Writable(id)) => self.write(endpoint, handle, id),
            Event::Stream(StreamEvent::Available(_)) => self.open(endpoint, handle),
            Event::DatagramReceived => {
                if let Some(mut connection) = endpoint.connection_mut(handle) {
                    while connection.receive_datagram().is_some() {
                        self.datagrams += 1;
                    }
                }
            }
            Event::Closed(error) => {
                self.current = None;
                self.streams.clear();
                match error {
                    ConnectionError::ClosedLocally => self.closed += 1,
                    error => self.failed.push(error),
                }
            }
            Event::Stream(_) | Event::DatagramsUnblocked | Event::PeerMoved(_) => {}
        }
    }

    fn on_idle(&mut self, now: Instant, endpoint: &mut Endpoint) {
        if self.current.is_none() && self.connections_left > 0 {
            self.connections_left -= 1;
            self.next_file = 0;
            let started = endpoint.connect(now, &self.config, self.server, SERVER_NAME);
            self.current = Some(started.expect("a valid configuration"));
        }
    }
}

/// `length` octets of the pattern from `offset` on: words that count themselves.
fn pattern(offset: usize, length: usize) -> Vec<u8> {
    let mut octets = Vec::with_capacity(length + 8);
    for word in offset / 4..(offset + length).div_ceil(4) {
        octets.extend_from_slice(&(word as u64).to_be_bytes()[4..]);
    }
    octets.drain(..offset % 4);
    octets.truncate(length);
    octets
}

/// Writes the pattern up to `total`, then the end. Returns whether it is through.
fn send_pattern(
    connection: &mut quic::transport::Connection,
    id: StreamId,
    sent: &mut usize,
    total: usize,
) -> bool {
    while *sent < total {
        let chunk = pattern(*sent, CHUNK.min(total - *sent));
        match connection.write(id, &chunk) {
            Ok(count) => {
                *sent += count;
                if count < chunk.len() {
                    return false;
                }
            }
            Err(WriteError::Stopped(_) | WriteError::Closed) => return true,
        }
    }
    let _ = connection.finish(id);
    true
}

/// Runs until each of these clients, a [`Host<FileClient>`] with one connection, has all it wanted.
///
/// # Panics
///
/// When one has failed, or has not ended by `limit`.
pub fn fetch_all(world: &mut World, clients: &[NodeId], limit: Duration) {
    let done = world.run(limit, |world| {
        clients.iter().all(|&client| world.node::<Host<FileClient>>(client).app.is_done())
    });
    for &client in clients {
        let app = &world.node::<Host<FileClient>>(client).app;
        assert!(done && app.failed.is_empty() && app.done == 1, "{app:?}");
    }
}
