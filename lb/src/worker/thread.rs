//! The thread of a worker: its descriptors, its listeners, and its report that it is ready.

use std::{io, net::SocketAddr, sync::mpsc};

use quic_lb_config::system_error::{reason, why_not_listening};

use super::{
    round::Datapath,
    setup::{Setup, Source},
};
use crate::socket::{self, Socket};

/// Descriptors of a worker that are not flows: standard streams, the poller, the short-lived
/// sockets that source addresses are found with; listeners come on top.
const SPARE_DESCRIPTORS: usize = 16;

/// Why the workers could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A listener could not be opened.
    #[error("cannot listen on {address}: {}", why_not_listening(error))]
    Listen {
        /// Its address.
        address: SocketAddr,
        /// What the kernel said.
        error: io::Error,
    },
    /// A socket that was to be taken over cannot be.
    #[error("cannot take over the socket of a listener: {}", reason(.0))]
    Inherit(io::Error),
    /// There is not one socket for each worker.
    #[error(
        "the sockets of a listener to take over are not one for each worker: {sockets} for {workers}"
    )]
    Inherited {
        /// Sockets of the listener.
        sockets: usize,
        /// Workers.
        workers: usize,
    },
    /// The poller could not be made.
    #[error("cannot wait for datagrams: {}", reason(.0))]
    Poll(io::Error),
    /// The limit on descriptors could not be read.
    #[error("cannot read the limit on descriptors: {}", reason(.0))]
    Descriptors(io::Error),
    /// A thread could not be started.
    #[error("cannot start a worker thread: {}", reason(.0))]
    Thread(io::Error),
    /// A worker ended before it was ready.
    #[error("a worker ended before it was ready")]
    Ended,
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
        let opened = self.open();
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

    fn open(&self) -> Result<(Datapath, Readiness), StartError> {
        let lent = self.listeners.iter().filter_map(|source| match source {
            Source::Inherit(lent) => Some(*lent),
            Source::Bind(..) => None,
        });
        let lent: Vec<_> = lent.collect();
        let table = socket::unshare_descriptors(&lent).map_err(StartError::Inherit)?;
        // Where it is forbidden, the workers share one table, and its limit.
        let tables = if table.is_own { 1 } else { self.siblings };
        let spare = SPARE_DESCRIPTORS + self.listeners.len();
        let max_flows = self.flows.min((self.descriptors / tables).saturating_sub(spare));
        let mut inherited = table.inherited.into_iter();
        let mut sockets = Vec::with_capacity(self.listeners.len());
        let mut addresses = Vec::with_capacity(self.listeners.len());
        for source in &self.listeners {
            let (socket, address) = match *source {
                Source::Bind(address, sharing) => {
                    let refused = |error| StartError::Listen { address, error };
                    let socket = Socket::listener(address, sharing).map_err(refused)?;
                    let address = socket.local_address().map_err(refused)?;
                    (socket, address)
                }
                Source::Inherit(_) => {
                    let fd = inherited.next().expect("each that was lent was taken over");
                    let socket = Socket::inherited(fd).map_err(StartError::Inherit)?;
                    let address = socket.local_address().map_err(StartError::Inherit)?;
                    (socket, address)
                }
            };
            sockets.push(socket);
            addresses.push(address);
        }
        let datapath = Datapath::new(self, sockets, max_flows).map_err(StartError::Poll)?;
        Ok((datapath, Readiness { addresses, flow_capacity: max_flows }))
    }
}
