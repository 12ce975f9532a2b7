//! The thread of a worker: its descriptors, its listeners, and its report that it is ready.

use std::{fmt, io, net::SocketAddr, sync::mpsc};

use super::{round::Datapath, setup::Setup};
use crate::socket::{self, Sharing, Socket};

/// Descriptors of a worker that are not flows: standard streams, the poller, the short-lived
/// sockets that source addresses are found with; listeners come on top.
const SPARE_DESCRIPTORS: usize = 16;

/// Why the workers could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A listener could not be opened.
    #[error("cannot listen on {address}: {}", Advice(error))]
    Listen {
        /// Its address.
        address: SocketAddr,
        /// What the kernel said.
        error: io::Error,
    },
    /// The poller could not be made.
    #[error("cannot wait for datagrams: {0}")]
    Poll(io::Error),
    /// The limit on descriptors could not be read.
    #[error("cannot read the limit on descriptors: {0}")]
    Descriptors(io::Error),
    /// A thread could not be started.
    #[error("cannot start a worker thread: {0}")]
    Thread(io::Error),
    /// A worker ended before it was ready.
    #[error("a worker ended before it was ready")]
    Ended,
}

/// What to do about an address that cannot be had.
struct Advice<'a>(&'a io::Error);

impl fmt::Display for Advice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0.kind() {
            io::ErrorKind::AddrInUse => {
                "the address is in use; stop the process that listens there, or change the \
                 listener's address"
            }
            io::ErrorKind::AddrNotAvailable => {
                "this host does not have the address; add it to an interface, or change the \
                 listener's address"
            }
            io::ErrorKind::PermissionDenied => {
                "permission denied; ports below 1024 need the capability CAP_NET_BIND_SERVICE"
            }
            _ => return self.0.fmt(f),
        })
    }
}

pub(super) const fn sharing_of(worker: usize) -> Sharing {
    if worker == 0 { Sharing::First } else { Sharing::Join }
}

/// What a worker reports when its listeners are open.
pub(super) struct Readiness {
    pub(super) addresses: Vec<SocketAddr>,
    pub(super) flow_capacity: usize,
}

pub(super) type Report = Result<Readiness, StartError>;

impl Setup {
    /// The life of the thread.
    pub(super) fn run(self, report: &mpsc::Sender<Report>) -> io::Result<()> {
        // Where it is forbidden, the workers share one table, and its limit.
        let tables = if socket::unshare_descriptors().is_ok() { 1 } else { self.siblings };
        let spare = SPARE_DESCRIPTORS + self.addresses.len();
        let max_flows = self.flows.min((self.descriptors / tables).saturating_sub(spare));
        let opened = self.open().and_then(|(listeners, addresses)| {
            let datapath = Datapath::new(&self, listeners, max_flows).map_err(StartError::Poll)?;
            Ok((datapath, Readiness { addresses, flow_capacity: max_flows }))
        });
        // Nobody listens any more when another worker has failed to start.
        match opened {
            Ok((mut datapath, ready)) => {
                let _ = report.send(Ok(ready));
                datapath.run()
            }
            Err(error) => {
                let _ = report.send(Err(error));
                Ok(())
            }
        }
    }

    fn open(&self) -> Result<(Vec<Socket>, Vec<SocketAddr>), StartError> {
        let open = |&address: &SocketAddr| {
            let refused = |error| StartError::Listen { address, error };
            let socket = Socket::listener(address, self.sharing).map_err(refused)?;
            let address = socket.local_address().map_err(refused)?;
            Ok((socket, address))
        };
        self.addresses.iter().map(open).collect()
    }
}
