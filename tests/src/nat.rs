//! A NAT between a client and a target that forgets its bindings when told to. Unlike
//! [`crate::client::Client::rebind`] the client does not notice, so it keeps its connection ID.

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
    rebinds: AtomicUsize,
}

#[derive(Debug)]
struct Shared {
    target: SocketAddr,
    carried: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    outside: IpAddr,
    bindings: HashMap<SocketAddr, Binding>,
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
        let inside = Arc::new(UdpSocket::bind((outside, 0)).await?);
        let address = inside.local_addr()?;
        let state = Mutex::new(State { outside, bindings: HashMap::new() });
        let shared = Arc::new(Shared { target, carried: AtomicU64::new(0), state });
        let task = tokio::spawn(run(inside, Arc::clone(&shared))).abort_handle();
        Ok(Self { inside: address, shared, task, rebinds: AtomicUsize::new(0) })
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
        state.bindings.clear();
        self.rebinds.fetch_add(1, Relaxed);
    }

    /// Octets that it has carried, both ways.
    #[must_use]
    pub fn carried(&self) -> u64 {
        self.shared.carried.load(Relaxed)
    }

    /// How often it forgot.
    #[must_use]
    pub fn rebinds(&self) -> usize {
        self.rebinds.load(Relaxed)
    }
}

impl Drop for Nat {
    fn drop(&mut self) {
        self.task.abort();
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner).bindings.clear();
    }
}

const MAX_DATAGRAM: usize = 1 << 16;

async fn run(inside: Arc<UdpSocket>, shared: Arc<Shared>) {
    let mut buffer = vec![0; MAX_DATAGRAM];
    while let Ok((length, client)) = inside.recv_from(&mut buffer).await {
        if let Ok(socket) = shared.binding(client, &inside) {
            shared.carried.fetch_add(length as u64, Relaxed);
            // As any router, it drops what the next hop does not take.
            let _ = socket.send_to(&buffer[..length], shared.target).await;
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
    fn binding(
        self: &Arc<Self>,
        client: SocketAddr,
        inside: &Arc<UdpSocket>,
    ) -> std::io::Result<Arc<UdpSocket>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(binding) = state.bindings.get(&client) {
            return Ok(Arc::clone(&binding.socket));
        }
        let socket = std::net::UdpSocket::bind((state.outside, 0))?;
        socket.set_nonblocking(true)?;
        let socket = Arc::new(UdpSocket::from_std(socket)?);
        let returning =
            bring_back(Arc::clone(self), Arc::clone(&socket), Arc::clone(inside), client);
        let returning = tokio::spawn(returning).abort_handle();
        state.bindings.insert(client, Binding { socket: Arc::clone(&socket), returning });
        Ok(socket)
    }
}
