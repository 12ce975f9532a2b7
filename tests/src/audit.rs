//! Who issued which connection ID, and what arrived where.
//!
//! [`Issued`] is the truth that the balancer cannot know: every connection ID that any server of the
//! scenario has handed out. [`Audited`] stands around a server's UDP socket and looks each datagram's
//! destination connection ID up in it. So "misdelivered" does not depend on how connection IDs are
//! encoded, nor on any code that the balancer uses.
//!
//! A client may answer what comes for a connection that it has left with a stateless reset, which has
//! a random connection ID and belongs to no server. [`MarkedResets`] makes those of our clients known.

use std::{
    collections::HashMap,
    fmt,
    hash::{DefaultHasher, Hasher as _},
    io::{self, IoSliceMut},
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use quic::invariants::Packet;
use quinn::{
    AsyncUdpSocket, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use quinn_proto::{
    ConnectionId, ConnectionIdGenerator, InvalidCid,
    crypto::{CryptoError, HmacKey},
};

/// The connection IDs of all servers of a scenario, each with the name of the server.
#[derive(Clone, Debug, Default)]
pub struct Issued(Arc<Mutex<HashMap<Vec<u8>, Arc<str>>>>);

impl Issued {
    /// What `generator` makes belongs to `server`.
    #[must_use]
    pub fn record(
        &self,
        server: &str,
        generator: impl ConnectionIdGenerator + 'static,
    ) -> Box<dyn ConnectionIdGenerator> {
        let (issued, server) = (self.clone(), server.into());
        Box::new(Recorded { issued, server, generator })
    }

    fn owner(&self, cid: &[u8]) -> Option<Arc<str>> {
        lock(&self.0).get(cid).cloned()
    }

    /// The server whose connection ID `rest`, all of a short header after its first octet, starts
    /// with.
    fn owner_in_front(&self, rest: &[u8]) -> Option<Arc<str>> {
        const MAX_CID_LEN: usize = 20;
        (1..=MAX_CID_LEN).find_map(|len| self.owner(rest.get(..len)?))
    }
}

struct Recorded<G> {
    issued: Issued,
    server: Arc<str>,
    generator: G,
}

impl<G: ConnectionIdGenerator> ConnectionIdGenerator for Recorded<G> {
    fn generate_cid(&mut self) -> ConnectionId {
        let cid = self.generator.generate_cid();
        let earlier = lock(&self.issued.0).insert(cid.to_vec(), Arc::clone(&self.server));
        assert!(earlier.is_none(), "a connection ID has been issued twice");
        cid
    }

    fn validate(&self, cid: &ConnectionId) -> Result<(), InvalidCid> {
        self.generator.validate(cid)
    }

    fn cid_len(&self) -> usize {
        self.generator.cid_len()
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        self.generator.cid_lifetime()
    }
}

/// What arrived at one server, in datagrams.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Arrivals {
    /// With a connection ID that this server issued.
    pub own: u64,
    /// With a connection ID that another server issued, by the name of that server.
    pub misdelivered: HashMap<String, u64>,
    /// Long headers with a connection ID that nobody issued, as clients send until they know better.
    pub opening: u64,
    /// Stateless resets of our clients.
    pub resets: u64,
    /// Other short headers with a connection ID that nobody issued, and what is no QUIC packet.
    pub unknown: u64,
}

/// [`Arrivals`] while they are being counted.
#[derive(Clone, Debug, Default)]
pub struct Ledger(Arc<Mutex<Arrivals>>);

impl Ledger {
    /// What has arrived so far.
    #[must_use]
    pub fn read(&self) -> Arrivals {
        lock(&self.0).clone()
    }

    fn enter(&self, server: &str, issued: &Issued, datagram: &[u8]) {
        let packet = Packet::read(datagram);
        let owner = match packet {
            Ok(Packet::Long(header)) => issued.owner(header.dcid),
            Ok(Packet::Short(header)) => issued.owner_in_front(header.rest),
            Err(_) => None,
        };
        let mut arrivals = lock(&self.0);
        match (owner, packet) {
            (Some(owner), _) if *owner == *server => arrivals.own += 1,
            (Some(owner), _) => *arrivals.misdelivered.entry(owner.to_string()).or_default() += 1,
            (None, Ok(Packet::Long(_))) => arrivals.opening += 1,
            (None, _) if is_marked_reset(datagram) => arrivals.resets += 1,
            (None, _) => arrivals.unknown += 1,
        }
    }
}

const RESET_TOKEN_LEN: usize = 16;
const MARK: &[u8; 8] = b"\x00A RESET";

fn is_marked_reset(datagram: &[u8]) -> bool {
    let token = datagram.last_chunk::<RESET_TOKEN_LEN>();
    token.is_some_and(|token| token.starts_with(MARK))
}

/// Makes the stateless reset tokens of a client: half of each is the same.
#[derive(Debug)]
pub struct MarkedResets;

impl HmacKey for MarkedResets {
    fn sign(&self, cid: &[u8], token: &mut [u8]) {
        let mut hasher = DefaultHasher::new();
        hasher.write(cid);
        token[..MARK.len()].copy_from_slice(MARK);
        token[MARK.len()..].copy_from_slice(&hasher.finish().to_be_bytes());
    }

    fn signature_len(&self) -> usize {
        RESET_TOKEN_LEN
    }

    fn verify(&self, cid: &[u8], token: &[u8]) -> Result<(), CryptoError> {
        let mut expected = [0; RESET_TOKEN_LEN];
        self.sign(cid, &mut expected);
        if expected == token { Ok(()) } else { Err(CryptoError) }
    }
}

/// The UDP socket of a server, looked over.
pub struct Audited {
    /// The socket.
    pub inner: Arc<dyn AsyncUdpSocket>,
    /// The name of the server.
    pub server: String,
    /// Whose connection IDs are whose.
    pub issued: Issued,
    /// Where arrivals are counted.
    pub ledger: Ledger,
}

impl fmt::Debug for Audited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Audited").field("server", &self.server).finish_non_exhaustive()
    }
}

impl AsyncUdpSocket for Audited {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let count = ready!(self.inner.poll_recv(cx, bufs, meta))?;
        for (buffer, meta) in bufs.iter().zip(meta.iter()).take(count) {
            // What the kernel has coalesced comes in pieces of `stride`, the last one shorter.
            for datagram in buffer[..meta.len].chunks(meta.stride.max(1)) {
                self.ledger.enter(&self.server, &self.issued, datagram);
            }
        }
        Poll::Ready(Ok(count))
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

/// Everything behind these locks is whole between calls.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed(&'static [u8]);

    impl ConnectionIdGenerator for Fixed {
        fn generate_cid(&mut self) -> ConnectionId {
            ConnectionId::new(self.0)
        }
        fn cid_len(&self) -> usize {
            self.0.len()
        }
        fn cid_lifetime(&self) -> Option<Duration> {
            None
        }
    }

    #[test]
    fn a_datagram_is_entered_by_who_issued_its_connection_id() {
        let issued = Issued::default();
        issued.record("a", Fixed(b"of-a")).generate_cid();
        issued.record("b", Fixed(b"of-b-longer")).generate_cid();
        let ledger = Ledger::default();
        let mut reset = *b"\x40random then a reset token";
        MarkedResets.sign(b"its connection ID", reset.last_chunk_mut::<RESET_TOKEN_LEN>().unwrap());
        for datagram in [
            &b"\x40of-a and more"[..],
            b"\x40of-b-longer and more",
            b"\xc0\0\0\0\x01\x04of-a\x00",
            b"\xc0\0\0\0\x01\x04none\x00",
            b"\x40of nobody",
            &reset,
            b"\x40",
            b"\xc0",
        ] {
            ledger.enter("a", &issued, datagram);
        }
        let misdelivered = HashMap::from([("b".to_owned(), 1)]);
        let expected = Arrivals { own: 2, misdelivered, opening: 1, resets: 1, unknown: 3 };
        assert_eq!(ledger.read(), expected);
    }
}
