//! Requests to running workers: what each would do with a datagram, by its own tables; to open or to close a socket, which
//! means something in its own table of descriptors alone.
//!
//! A worker looks once per round whether somebody asks, which costs it one load; only an answer costs
//! more. Nobody waits for anybody: a request that is not answered is replaced by the next one.
//!
//! Whoever asks looks for the answers now and then. A worker must not wake a task of the control
//! plane: that means to write to a descriptor, and workers have descriptor tables of their own.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{
            AtomicBool,
            Ordering::{Acquire, Relaxed, Release},
        },
        mpsc,
    },
};

use crate::{
    client_path::{ClientPath, ListenerAddr, ListenerIndex},
    explained::Explained,
    socket::{Families, Sharing},
};

/// A datagram that a client would send.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    /// The listener that it arrives on.
    pub(crate) listener: ListenerIndex,
    /// Where it comes from and is sent to.
    pub(crate) path: ClientPath,
    /// The UDP payload.
    pub(crate) octets: Arc<[u8]>,
}

/// What one worker says of a [`Sample`].
#[derive(Debug)]
pub(crate) struct Answer {
    /// Its decision.
    pub(crate) explained: Explained,
    /// Whether it knows the client path, which the kernel gives to one worker alone.
    pub(crate) knows_path: bool,
}

/// What a worker is asked for, and the way back.
#[derive(Debug)]
pub(super) enum Request {
    /// What it would do with a datagram.
    Explain(Question),
    /// To open sockets of listeners, which it serves from the first snapshot on that has them.
    Open(Open),
    /// To close such sockets that no snapshot has had yet, and to have done so with those that none has any more.
    Close(Close),
}

/// A question, and the way back.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) sample: Sample,
    pub(super) answers: mpsc::Sender<Answer>,
}

/// Sockets of listeners.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) places: Arc<[Place]>,
    pub(super) sharing: Sharing,
    /// Where they listen then, or which of them could not be opened.
    pub(super) answers: mpsc::Sender<Opened>,
}

/// Where a listener is to listen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub(crate) listener: ListenerIndex,
    pub(crate) address: ListenerAddr,
    pub(crate) families: Families,
}

/// Where listeners listen, in the order in which they were asked for, or which of them could not be opened.
pub(crate) type Opened = Result<Vec<ListenerAddr>, (ListenerIndex, io::Error)>;

/// Sockets of listeners that are not wanted after all.
#[derive(Debug)]
pub(super) struct Close {
    pub(super) listeners: Arc<[ListenerIndex]>,
    pub(super) answers: mpsc::Sender<()>,
}

/// Where a worker finds what it is asked for.
#[derive(Debug, Default)]
pub(super) struct Mailbox {
    waiting: AtomicBool,
    request: Mutex<Option<Request>>,
}

impl Mailbox {
    fn put(&self, request: Request) {
        *self.request.lock().unwrap_or_else(PoisonError::into_inner) = Some(request);
        self.waiting.store(true, Release);
    }

    /// The request, if there is one.
    #[inline]
    pub(super) fn take(&self) -> Option<Request> {
        if self.waiting.load(Relaxed) { self.open() } else { None }
    }

    #[cold]
    fn open(&self) -> Option<Request> {
        self.waiting.swap(false, Acquire);
        self.request.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The mailboxes of all workers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Mailboxes(Vec<Arc<Mailbox>>);

impl Mailboxes {
    /// One for each of so many workers.
    pub(super) fn new(workers: usize) -> Self {
        Self((0..workers).map(|_| Arc::default()).collect())
    }

    /// That of a worker.
    pub(super) fn of(&self, worker: usize) -> Arc<Mailbox> {
        Arc::clone(&self.0[worker])
    }

    /// Asks all workers. Their answers end when all have answered.
    pub(crate) fn ask(&self, sample: &Sample) -> mpsc::Receiver<Answer> {
        let (answers, received) = mpsc::channel();
        for mailbox in &self.0 {
            let question = Question { sample: sample.clone(), answers: answers.clone() };
            mailbox.put(Request::Explain(question));
        }
        received
    }

    /// Has workers open sockets at these `places`: the first worker alone, or, where that has opened its ones, the others.
    pub(crate) fn open(&self, places: &[Place], sharing: Sharing) -> mpsc::Receiver<Opened> {
        let (answers, received) = mpsc::channel();
        let first = self.0.len().min(1);
        let workers = match sharing {
            Sharing::First => &self.0[..first],
            Sharing::Join => &self.0[first..],
        };
        let places: Arc<[Place]> = places.into();
        for mailbox in workers {
            let (places, answers) = (Arc::clone(&places), answers.clone());
            mailbox.put(Request::Open(Open { places, sharing, answers }));
        }
        received
    }

    /// Has all workers close what they have opened for these listeners, if no snapshot has them. Whoever has answered has also closed
    /// what the snapshot in force has no more.
    pub(crate) fn close(&self, listeners: &[ListenerIndex]) -> mpsc::Receiver<()> {
        let (answers, received) = mpsc::channel();
        let listeners: Arc<[ListenerIndex]> = listeners.into();
        for mailbox in &self.0 {
            let (listeners, answers) = (Arc::clone(&listeners), answers.clone());
            mailbox.put(Request::Close(Close { listeners, answers }));
        }
        received
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client_path::ClientAddr;

    fn sample() -> Sample {
        let client = "192.0.2.7:50000".parse().unwrap();
        let path = ClientPath { client: ClientAddr(client), local: None };
        Sample { listener: ListenerIndex(0), path, octets: Arc::default() }
    }

    #[test]
    fn each_worker_finds_each_question_once() {
        let mailboxes = Mailboxes::new(2);
        let (first, second) = (mailboxes.of(0), mailboxes.of(1));
        assert!(first.take().is_none());
        let _answers = mailboxes.ask(&sample());
        assert!(first.take().is_some());
        assert!(first.take().is_none());
        let _answers = mailboxes.ask(&sample());
        assert!(first.take().is_some() && second.take().is_some());
        assert!(first.take().is_none() && second.take().is_none(), "the older one was replaced");
    }

    #[test]
    fn whoever_asks_is_told_that_no_answer_will_come() {
        let mailboxes = Mailboxes::new(2);
        let answers = mailboxes.ask(&sample());
        drop(mailboxes.of(0).take());
        assert_eq!(answers.try_recv().err(), Some(mpsc::TryRecvError::Empty));
        drop(mailboxes.of(1).take());
        assert_eq!(answers.try_recv().err(), Some(mpsc::TryRecvError::Disconnected));
    }
}
