//! What the balancer answers by itself: out of the listener's socket, from the address that was
//! asked, as many in one system call as there are.
//!
//! Nobody waits for room to send: whoever is not answered asks again.

use std::io;

use crate::{
    forwarder::{Datagram, Reply},
    socket::{Departure, SLOTS, Sender, Socket},
};

/// The arrays that answers are described with.
pub(super) struct Outbox {
    sender: Sender,
}

impl Outbox {
    pub(super) fn new() -> Self {
        Self { sender: Sender::new() }
    }

    /// Sends `replies` to datagrams of `question`, and tells `done` of each whether it left.
    pub(super) fn send<'a>(
        &mut self,
        socket: &Socket,
        ipv6: bool,
        question: &[Datagram<'_>],
        replies: impl Iterator<Item = Reply<'a>>,
        mut done: impl FnMut(&Reply<'a>, bool),
    ) {
        let mut replies = replies.peekable();
        while replies.peek().is_some() {
            let mut batch = [None; SLOTS];
            let mut outgoing = self.sender.compose();
            while outgoing.has_room(1)
                && let Some(reply) = replies.next()
            {
                batch[outgoing.len()] = Some(reply);
                let path = &question[reply.datagram].path;
                let (to, from) = (Some(path.client.0), path.local);
                let departure =
                    Departure { to, from, class: None, hops: None, segment: None, ipv6 };
                outgoing.push(&departure, [reply.octets]);
            }
            let mut left = [false; SLOTS];
            let mut at = 0;
            while at < outgoing.len() {
                match outgoing.send(socket, at) {
                    Ok(sent) => {
                        left[at..at + sent].fill(true);
                        at += sent;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(_) => at += 1,
                }
            }
            batch.iter().flatten().zip(left).for_each(|(reply, left)| done(reply, left));
        }
    }
}
