//! From a worker to the writer: bounded, and never waited for.
//!
//! The channels of the standard library do: a bounded one takes and gives by single atomic operations as long as nobody waits at
//! it, and nobody does. Each worker has one of its own, so that workers share no counter. It is made when the log is turned on
//! first: a log that is off takes no memory.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicU64, Ordering::Relaxed},
    mpsc::{self, Receiver, SyncSender},
};

use super::record::Record;
use crate::counters::Counter;

/// Records that wait at most, of each worker: those of ten thousand connections a second for half a second, some megabyte.
pub(super) const CAPACITY: usize = 8_192;

/// What a worker leaves its records in.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    records: OnceLock<SyncSender<Record>>,
    /// Records that there was no room for.
    dropped: Counter,
}

impl Queue {
    /// Whether anybody is going to look for records.
    pub(super) fn is_open(&self) -> bool {
        self.records.get().is_some()
    }

    /// Leaves a record, if there is room. For the worker that owns the queue.
    pub(super) fn leave(&self, record: Record) {
        if !self.has_taken(record) {
            self.dropped.add(1);
        }
    }

    /// As [`Self::leave`]; says whether there was room, and counts nothing.
    pub(super) fn has_taken(&self, record: Record) -> bool {
        self.records.get().is_some_and(|records| records.try_send(record).is_ok())
    }
}

/// The queues of all workers, and what has become of records.
#[derive(Debug)]
pub(crate) struct Queues {
    queues: Box<[Arc<Queue>]>,
    pub(super) written: AtomicU64,
    /// Those that could not be written.
    pub(super) lost: AtomicU64,
}

/// What has become of records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct LogCounts {
    /// Written.
    pub written: u64,
    /// Dropped because the queue of a worker had no room.
    pub queue_full: u64,
    /// Dropped because they could not be written.
    pub unwritten: u64,
}

impl Queues {
    /// Of so many workers.
    pub(crate) fn new(workers: usize) -> Self {
        let queues = (0..workers).map(|_| Arc::default()).collect();
        Self { queues, written: AtomicU64::new(0), lost: AtomicU64::new(0) }
    }

    /// That of one of them.
    pub(crate) fn of(&self, worker: usize) -> Arc<Queue> {
        Arc::clone(&self.queues[worker])
    }

    /// Opens them; says where the records arrive. Nothing, if they have been opened before.
    pub(super) fn open(&self) -> Vec<Receiver<Record>> {
        let open = |queue: &Arc<Queue>| {
            let (sender, receiver) = mpsc::sync_channel(CAPACITY);
            queue.records.set(sender).is_ok().then_some(receiver)
        };
        self.queues.iter().filter_map(open).collect()
    }

    pub(crate) fn counts(&self) -> LogCounts {
        LogCounts {
            written: self.written.load(Relaxed),
            queue_full: self.queues.iter().map(|queue| queue.dropped.get()).sum(),
            unwritten: self.lost.load(Relaxed),
        }
    }
}
