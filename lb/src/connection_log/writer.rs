//! The thread that writes the log. What it is to do comes from the control plane; records come from the workers.

#![expect(
    clippy::disallowed_methods,
    reason = "the shell around the log: it dates records, and waits"
)]

use std::{
    io,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::Receiver,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime},
};

use arc_swap::ArcSwap;
use quic_lb_config::{ConnectionLog, LogTarget};
use tracing::{error, info};

use super::{
    line::{self, Clocks},
    names::Names,
    output::Output,
    queue::{CAPACITY, Queues},
    record::Record,
};
use crate::routing::Routing;

/// From one look into the queues to the next.
const PAUSE: Duration = Duration::from_millis(50);
/// Octets that are written at once.
const BATCH: usize = 64 * 1024;
/// Until a file is tried again that could not be opened.
const RETRY: Duration = Duration::from_secs(5);
/// How long an end of the process waits for the last records. Standard output may be a pipe that nobody reads.
const FAREWELL: Duration = Duration::from_secs(2);

/// The log, as the control plane has it.
#[derive(Debug)]
pub(crate) struct Log {
    orders: Arc<Orders>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the thread is to do.
#[derive(Debug, Default)]
struct Orders {
    changed: Condvar,
    orders: Mutex<Order>,
}

#[derive(Clone, Debug, Default)]
struct Order {
    wanted: Option<ConnectionLog>,
    /// How often it was to be opened anew.
    reopened: u64,
    is_over: bool,
}

impl Log {
    /// Starts the thread, which does nothing until it is told to.
    ///
    /// # Errors
    ///
    /// When there is no thread to be had.
    pub(crate) fn start(queues: Arc<Queues>, routing: Arc<ArcSwap<Routing>>) -> io::Result<Self> {
        let orders = Arc::new(Orders::default());
        let writer = Writer {
            queues,
            routing,
            clocks: Clocks { now: Instant::now(), unix: SystemTime::now() },
            records: Vec::new(),
            names: Names::new(),
            lines: Vec::with_capacity(BATCH),
            wanted: None,
            output: None,
            next_try: None,
            is_failing: false,
        };
        let followed = Arc::clone(&orders);
        let thread = thread::Builder::new().name("connection-log".to_owned());
        let thread = thread.spawn(move || writer.run(&followed))?;
        Ok(Self { orders, thread: Mutex::new(Some(thread)) })
    }

    /// Goes on as the configuration says.
    pub(crate) fn set(&self, wanted: Option<ConnectionLog>) {
        self.order(|order| order.wanted = wanted);
    }

    /// Has the file opened anew, which somebody may have moved away; says whether there is one.
    pub(crate) fn reopen(&self) -> bool {
        self.order(|order| {
            order.reopened += 1;
            let target = order.wanted.as_ref().map(|wanted| &wanted.to);
            matches!(target, Some(LogTarget::File(_)))
        })
    }

    /// Has what the workers have left written, and ends.
    pub(crate) fn finish(&self) {
        self.order(|order| order.is_over = true);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else { return };
        let until = Instant::now() + FAREWELL;
        while !thread.is_finished() && Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
        if thread.is_finished() {
            let _ = thread.join();
        }
    }

    fn order<T>(&self, change: impl FnOnce(&mut Order) -> T) -> T {
        let mut orders = self.orders.orders.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = change(&mut orders);
        self.orders.changed.notify_one();
        outcome
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.order(|order| order.is_over = true);
    }
}

/// The thread at work.
struct Writer {
    queues: Arc<Queues>,
    routing: Arc<ArcSwap<Routing>>,
    clocks: Clocks,
    /// Where records arrive, once the log was turned on.
    records: Vec<Receiver<Record>>,
    names: Names,
    lines: Vec<u8>,
    wanted: Option<ConnectionLog>,
    output: Option<Output>,
    /// When a file that could not be opened is tried again.
    next_try: Option<Instant>,
    /// Whether it was said that records are lost.
    is_failing: bool,
}

impl Writer {
    fn run(mut self, orders: &Orders) {
        let mut followed = Order::default();
        loop {
            let order = self.next_order(orders, &followed);
            if order.wanted != followed.wanted {
                // What was left before goes where it was to go.
                self.write_all();
                self.change(order.wanted.clone());
            } else if order.reopened != followed.reopened {
                self.write_all();
                self.reopen();
            }
            self.write_all();
            if order.is_over {
                return;
            }
            followed = order;
        }
    }

    /// Waits for an order, or until it is time to look into the queues.
    fn next_order(&self, orders: &Orders, followed: &Order) -> Order {
        let order = orders.orders.lock().unwrap_or_else(PoisonError::into_inner);
        let is_followed = |order: &mut Order| {
            (&order.wanted, order.reopened, order.is_over)
                == (&followed.wanted, followed.reopened, followed.is_over)
        };
        let order = match self.wanted {
            None => orders.changed.wait_while(order, is_followed),
            Some(_) => {
                let waited = orders.changed.wait_timeout_while(order, PAUSE, is_followed);
                return waited.unwrap_or_else(PoisonError::into_inner).0.clone();
            }
        };
        order.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change(&mut self, wanted: Option<ConnectionLog>) {
        let stays = self.wanted.as_ref().map(|log| &log.to) == wanted.as_ref().map(|log| &log.to);
        self.wanted = wanted;
        match &self.wanted {
            Some(log) => {
                let to = target(log);
                info!(to, sample_millionths = log.sample_millionths, "connection log");
                self.records.append(&mut self.queues.open());
                if !stays {
                    self.reopen();
                }
            }
            None => {
                info!("no connection log any more");
                (self.output, self.is_failing) = (None, false);
            }
        }
    }

    fn reopen(&mut self) {
        // It may be the last that has the old one, on a disk that is full.
        self.output = None;
        self.next_try = None;
        self.open();
    }

    /// Opens the output, unless that has failed a moment ago.
    fn open(&mut self) {
        let now = Instant::now();
        let Some(log) = &self.wanted else { return };
        if self.output.is_some() || self.next_try.is_some_and(|next_try| now < next_try) {
            return;
        }
        match Output::open(&log.to) {
            Ok(output) => self.output = Some(output),
            Err(error) => {
                self.next_try = Some(now + RETRY);
                self.fail(&error);
            }
        }
    }

    /// Writes what the workers have left.
    fn write_all(&mut self) {
        let Some(format) = self.wanted.as_ref().map(|log| log.format) else { return };
        self.names.see(&self.routing.load());
        self.clocks.follow(Clocks { now: Instant::now(), unix: SystemTime::now() });
        let clocks = self.clocks;
        for at in 0..self.records.len() {
            // What workers leave meanwhile is for the next look.
            for _ in 0..CAPACITY {
                let Ok(record) = self.records[at].try_recv() else { break };
                if !self.names.knows(record.begun.backend) {
                    self.names.see(&self.routing.load());
                }
                line::write(&mut self.lines, format, &record, &self.names, &clocks);
                if self.lines.len() >= BATCH {
                    self.write_lines();
                }
            }
        }
        self.write_lines();
    }

    fn write_lines(&mut self) {
        if self.lines.is_empty() {
            return;
        }
        self.open();
        let wanted = self.lines.iter().filter(|octet| **octet == b'\n').count();
        let (written, outcome) = match &mut self.output {
            Some(output) => output.write(&self.lines),
            None => (0, Ok(())),
        };
        self.lines.clear();
        add(&self.queues.written, written);
        add(&self.queues.lost, wanted - written);
        match outcome {
            Ok(()) if written > 0 && std::mem::take(&mut self.is_failing) => {
                info!("the connection log is written again");
            }
            Ok(()) => {}
            Err(error) => self.fail(&error),
        }
    }

    /// Says once that records are lost.
    fn fail(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.is_failing, true) {
            let to = self.wanted.as_ref().map(target);
            error!(to, %error, "the connection log cannot be written, records are dropped");
        }
    }
}

fn target(log: &ConnectionLog) -> String {
    match &log.to {
        LogTarget::Stdout => "stdout".to_owned(),
        LogTarget::File(path) => path.display().to_string(),
    }
}

/// Only the writer counts there.
fn add(counter: &AtomicU64, count: usize) {
    counter.fetch_add(count as u64, Relaxed);
}
