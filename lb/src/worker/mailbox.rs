//! Questions to running workers: what each would do with a datagram, by its own tables.
//!
//! A worker looks once per round whether somebody asks, which costs it one load; only an answer costs
//! more. Nobody waits for anybody: a question that is not answered is replaced by the next one.
//!
//! Whoever asks looks for the answers now and then. A worker must not wake a task of the control
//! plane: that means to write to a descriptor, and workers have descriptor tables of their own.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{
        AtomicBool,
        Ordering::{Acquire, Relaxed, Release},
    },
    mpsc,
};

use crate::{
    client_path::{ClientPath, ListenerIndex},
    explained::Explained,
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

/// A question, and the way back.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) sample: Sample,
    pub(super) answers: mpsc::Sender<Answer>,
}

/// Where a worker finds the question that it is asked.
#[derive(Debug, Default)]
pub(super) struct Mailbox {
    waiting: AtomicBool,
    question: Mutex<Option<Question>>,
}

impl Mailbox {
    fn put(&self, question: Question) {
        *self.question.lock().unwrap_or_else(PoisonError::into_inner) = Some(question);
        self.waiting.store(true, Release);
    }

    /// The question, if there is one.
    #[inline]
    pub(super) fn take(&self) -> Option<Question> {
        if self.waiting.load(Relaxed) { self.open() } else { None }
    }

    #[cold]
    fn open(&self) -> Option<Question> {
        self.waiting.swap(false, Acquire);
        self.question.lock().unwrap_or_else(PoisonError::into_inner).take()
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
            mailbox.put(Question { sample: sample.clone(), answers: answers.clone() });
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
