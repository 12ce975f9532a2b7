//! What the process orders its workers: to begin with what they have taken over, to hand over, to go on.
//!
//! A worker has a channel of its own for it, which its poller watches beside the sockets: an order costs nothing
//! as long as there is none, and can carry a descriptor into the table of the worker.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::socket::Channel;

/// What a worker is told.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Order {
    /// To begin, with what it has taken over.
    Begin,
    /// To hand over to whom comes with it. The number is for the report.
    HandOver(u64),
    /// To go on where it was.
    GoOn,
}

/// What became of a hand-over.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Report {
    pub(super) attempt: u64,
    /// How many flows were handed over, or why that was not done.
    pub(super) outcome: Result<usize, String>,
}

/// The way to all workers.
#[derive(Debug)]
pub(crate) struct Orders {
    workers: Vec<Channel>,
    attempts: AtomicU64,
}

impl Orders {
    /// For so many workers, and the end of each.
    pub(super) fn new(workers: usize) -> io::Result<(Self, Vec<OwnedFd>)> {
        let pairs = (0..workers).map(|_| Channel::pair()).collect::<io::Result<Vec<_>>>()?;
        let (workers, ends) = pairs.into_iter().unzip();
        Ok((Self { workers, attempts: AtomicU64::new(0) }, ends))
    }

    /// How many workers there are.
    pub(crate) const fn len(&self) -> usize {
        self.workers.len()
    }

    /// Has all begin that have taken over.
    pub(crate) fn begin(&self) -> io::Result<()> {
        self.workers.iter().try_for_each(|worker| worker.send(&Order::Begin, &[]))
    }

    /// Has each worker stop and hand over to one of the `successors`; says how many flows they have handed over. Whatever
    /// comes of it, they stand still until they are told to go on.
    #[expect(clippy::disallowed_methods, reason = "a shell: it waits for others")]
    pub(crate) fn hand_over(
        &self,
        successors: Vec<OwnedFd>,
        patience: Duration,
    ) -> io::Result<usize> {
        let attempt = self.attempts.fetch_add(1, Relaxed);
        for (worker, successor) in self.workers.iter().zip(successors) {
            worker.set_patience(Some(patience))?;
            worker.send(&Order::HandOver(attempt), &[successor.as_fd()])?;
        }
        let deadline = Instant::now() + patience;
        let mut flows = 0;
        for worker in &self.workers {
            flows += loop {
                let left = deadline.saturating_duration_since(Instant::now());
                worker.set_patience(Some(left.max(Duration::from_millis(1))))?;
                let (report, _) = worker.receive::<Report>()?;
                // One of an earlier attempt may have come late.
                if report.attempt == attempt {
                    break report.outcome.map_err(io::Error::other)?;
                }
            };
        }
        Ok(flows)
    }

    /// Has all go on that have stopped.
    pub(crate) fn go_on(&self) {
        // Who cannot be told has ended, which is noticed elsewhere.
        self.workers.iter().for_each(|worker| drop(worker.send(&Order::GoOn, &[])));
    }

    /// Says that there will be no orders any more: whoever waits for one goes on.
    pub(super) fn close(&self) {
        self.workers.iter().for_each(Channel::close);
    }
}
