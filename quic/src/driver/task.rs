//! The task of a shard: socket to core, core to socket, and one timer.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Instant,
};

use tokio::{sync::mpsc, time::Sleep};

use super::{
    accept::AcceptQueue,
    shard::Shard,
    sharding::Stray,
    socket::{Inbound, Outbound, Socket},
    waiters::ConnectionInner,
};

/// Rounds until other tasks of the runtime get their turn.
const ROUNDS: usize = 16;

/// Runs until no handle is left and every connection is over.
pub(super) struct Task {
    shard: Arc<Shard>,
    accepts: Arc<AcceptQueue>,
    socket: Socket,
    strays: Option<mpsc::Receiver<Stray>>,
    inbound: Inbound,
    outbound: Outbound,
    timer: Pin<Box<Sleep>>,
    wakers: Vec<Waker>,
    acted_on: Vec<Arc<ConnectionInner>>,
}

/// How things stand after a round.
struct Standing {
    deadline: Option<Instant>,
    /// The core may have more to send.
    more: bool,
    /// Nothing is left to do, ever.
    over: bool,
    /// There is another socket, which nobody has asked for datagrams yet.
    moved: bool,
}

impl Task {
    pub(super) fn new(
        shard: Arc<Shard>,
        accepts: Arc<AcceptQueue>,
        socket: Socket,
        strays: Option<mpsc::Receiver<Stray>>,
    ) -> Self {
        Self {
            shard,
            accepts,
            socket,
            strays,
            inbound: Inbound::new(),
            outbound: Outbound::new(),
            timer: Box::pin(tokio::time::sleep_until(Instant::now().into())),
            wakers: Vec::new(),
            acted_on: Vec::new(),
        }
    }

    /// Has the core take what has arrived and give what is due.
    fn round(&mut self, cx: &mut Context<'_>, may_send: bool) -> Standing {
        let now = Instant::now();
        let mut state = self.shard.lock();
        self.shard.on_look(cx.waker(), &mut self.acted_on);
        state.take_acted_on(&mut self.acted_on);
        let fresh = state.fresh_socket.take();
        self.inbound.drain(|from, datagram| state.handle_datagram(now, from, datagram));
        if let Some(strays) = &mut self.strays {
            while let Poll::Ready(Some(mut stray)) = strays.poll_recv(cx) {
                state.take_datagram(now, stray.from, &mut stray.octets);
            }
        }
        if state.core.deadline().is_some_and(|at| at <= now) {
            state.core.handle_deadline(now);
        }
        let segments = self.socket.max_segments();
        let more = may_send
            && self.outbound.fill(|octets| state.core.poll_transmit(now, segments, octets));
        state.dispatch(now, &self.shard, &self.accepts, &mut self.wakers);
        let idle = state.core.connection_count() == 0;
        if idle {
            self.shard.idle.notify_waiters();
        }
        let over = idle && state.abandoned && !more;
        let deadline = state.core.deadline();
        drop(state);
        let moved = fresh.is_some();
        if let Some(socket) = fresh {
            self.socket = socket;
        }
        Standing { deadline, more, over, moved }
    }

    /// Sets the timer; returns whether it has gone off already.
    fn poll_timer(&mut self, cx: &mut Context<'_>, deadline: Option<Instant>) -> bool {
        let Some(deadline) = deadline else { return false };
        if self.timer.deadline() != deadline.into() {
            self.timer.as_mut().reset(deadline.into());
        }
        self.timer.as_mut().poll(cx).is_ready()
    }
}

impl Future for Task {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        for _ in 0..ROUNDS {
            let sent = this.outbound.poll_flush(cx, &this.socket);
            let received = this.inbound.poll(cx, &this.socket);
            let standing = this.round(cx, sent);
            this.wakers.drain(..).for_each(Waker::wake);
            if standing.over && this.outbound.is_empty() {
                return Poll::Ready(());
            }
            let due = this.poll_timer(cx, standing.deadline);
            let waiting = sent && (standing.more || !this.outbound.is_empty());
            if !received && !due && !waiting && !standing.moved {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}
