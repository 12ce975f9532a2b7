//! A NAT between a client and a target that forgets its bindings when told to, or before a certain
//! datagram of each client. Unlike [`crate::client::Client::rebind`] the client does not notice, so it
//! keeps its connection ID.
//!
//! What arrives at a binding that is forgotten is lost, as with NATs: a binding that has ended is in
//! nobody's table (<https://www.rfc-editor.org/rfc/rfc4787#section-4.3>). Between a client's last
//! datagram by the old binding and its first by the new one, NATs differ. One that loses its table, or whose
//! timer ends, takes nothing in until the client speaks again: what answers the last datagram is lost. Where
//! the client's route changes, the old one carries that answer still. [`Moves::deaf`] says which.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
};

use tokio::{net::UdpSocket, task::AbortHandle};

/// A running NAT. Dropping it ends it.
#[derive(Debug)]
pub struct Nat {
    inside: SocketAddr,
    shared: Arc<Shared>,
    task: AbortHandle,
}

/// When a NAT moves by itself, each client for itself.
#[derive(Clone, Copy, Debug)]
pub struct Moves {
    /// Before which datagram of the client for the first time, counted from 1.
    pub before: u64,
    /// After how many more each time.
    pub every: u64,
    /// How often.
    pub times: usize,
    /// Whether it takes nothing in between the client's datagrams before and after a move.
    pub deaf: bool,
}

impl Moves {
    /// Whether it moves before the `nth` datagram of a client that has moved `moves` times.
    fn is_due(&self, nth: u64, moves: usize) -> bool {
        moves < self.times && nth == self.before + moves as u64 * self.every
    }
}

#[derive(Debug)]
struct Shared {
    targets: Vec<SocketAddr>,
    moves: Option<Moves>,
    carried: AtomicU64,
    rebinds: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    outside: IpAddr,
    clients: HashMap<SocketAddr, Client>,
}

/// One client address.
#[derive(Debug, Default)]
struct Client {
    sent: u64,
    moves: usize,
    binding: Option<Binding>,
}

impl Client {
    fn rebind(&mut self) {
        self.binding = None;
        self.moves += 1;
    }
}

/// The outside socket of one client address. What arrives there after its end is lost.
#[derive(Debug)]
struct Binding {
    socket: Arc<UdpSocket>,
    returning: AbortHandle,
}

impl Drop for Binding {
    fn drop(&mut self) {
        self.returning.abort();
    }
}

impl Nat {
    /// A NAT in front of `target` whose outside address is `outside`.
    ///
    /// # Errors
    ///
    /// When `outside` is not an address of this machine.
    pub async fn start(target: SocketAddr, outside: IpAddr) -> anyhow::Result<Self> {
        Self::start_moving(vec![target], outside, None).await
    }

    /// As [`Nat::start`], in front of several targets, one after the other: the next each time that it
    /// moves.
    ///
    /// # Errors
    ///
    /// As [`Nat::start`].
    pub async fn start_moving(
        targets: Vec<SocketAddr>,
        outside: IpAddr,
        moves: Option<Moves>,
    ) -> anyhow::Result<Self> {
        anyhow::ensure!(!targets.is_empty(), "no target");
        let inside = Arc::new(UdpSocket::bind((outside, 0)).await?);
        let address = inside.local_addr()?;
        let state = Mutex::new(State { outside, clients: HashMap::new() });
        let (carried, rebinds) = (AtomicU64::new(0), AtomicUsize::new(0));
        let shared = Arc::new(Shared { targets, moves, carried, rebinds, state });
        let task = tokio::spawn(run(inside, Arc::clone(&shared))).abort_handle();
        Ok(Self { inside: address, shared, task })
    }

    /// Where clients send to.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.inside
    }

    /// Forgets all bindings; new ones are made at `outside`.
    pub fn rebind(&self, outside: IpAddr) {
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.outside = outside;
        state.clients.values_mut().for_each(Client::rebind);
        self.shared.rebinds.fetch_add(1, Relaxed);
    }

    /// Octets that it has carried, both ways.
    #[must_use]
    pub fn carried(&self) -> u64 {
        self.shared.carried.load(Relaxed)
    }

    /// How often it forgot.
    #[must_use]
    pub fn rebinds(&self) -> usize {
        self.shared.rebinds.load(Relaxed)
    }

    /// How many addresses its clients have had.
    #[must_use]
    pub fn clients(&self) -> usize {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner).clients.len()
    }
}

impl Drop for Nat {
    fn drop(&mut self) {
        self.task.abort();
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner).clients.clear();
    }
}

const MAX_DATAGRAM: usize = 1 << 16;

async fn run(inside: Arc<UdpSocket>, shared: Arc<Shared>) {
    let mut buffer = vec![0; MAX_DATAGRAM];
    while let Ok((length, client)) = inside.recv_from(&mut buffer).await {
        if let Ok((socket, target)) = shared.binding(client, &inside) {
            shared.carried.fetch_add(length as u64, Relaxed);
            // As any router, it drops what the next hop does not take.
            let _ = socket.send_to(&buffer[..length], target).await;
        }
    }
}

async fn bring_back(
    shared: Arc<Shared>,
    outside: Arc<UdpSocket>,
    inside: Arc<UdpSocket>,
    client: SocketAddr,
) {
    let mut buffer = vec![0; MAX_DATAGRAM];
    while let Ok((length, _)) = outside.recv_from(&mut buffer).await {
        shared.carried.fetch_add(length as u64, Relaxed);
        let _ = inside.send_to(&buffer[..length], client).await;
    }
}

impl Shared {
    /// The socket by which a client's next datagram goes out, and where to.
    fn binding(
        self: &Arc<Self>,
        client: SocketAddr,
        inside: &Arc<UdpSocket>,
    ) -> std::io::Result<(Arc<UdpSocket>, SocketAddr)> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { outside, clients } = &mut *state;
        let entry = clients.entry(client).or_default();
        entry.sent += 1;
        let due = |nth, moves| self.moves.is_some_and(|when| when.is_due(nth, moves));
        let deaf = self.moves.is_some_and(|when| when.deaf);
        if !deaf && due(entry.sent, entry.moves) {
            entry.rebind();
            self.rebinds.fetch_add(1, Relaxed);
        }
        let target = self.targets[entry.moves % self.targets.len()];
        let socket = match &entry.binding {
            Some(binding) => Arc::clone(&binding.socket),
            None => {
                let socket = std::net::UdpSocket::bind((*outside, 0))?;
                socket.set_nonblocking(true)?;
                let socket = Arc::new(UdpSocket::from_std(socket)?);
                let returning =
                    bring_back(Arc::clone(self), Arc::clone(&socket), Arc::clone(inside), client);
                let returning = tokio::spawn(returning).abort_handle();
                entry.binding = Some(Binding { socket: Arc::clone(&socket), returning });
                socket
            }
        };
        if deaf && due(entry.sent + 1, entry.moves) {
            entry.rebind();
            self.rebinds.fetch_add(1, Relaxed);
        }
        Ok((socket, target))
    }
}
