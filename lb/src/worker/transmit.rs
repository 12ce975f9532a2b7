//! Sending bundles, and what to do when the kernel refuses one.
//!
//! | refusal | what happens |
//! | --- | --- |
//! | connection refused | it is about an earlier datagram: counted, and tried again |
//! | too big, first time | it may be about an earlier datagram too: tried again |
//! | the offload is not to be had | the bundle's datagrams leave one by one; remembered |
//! | no room | one wait of a millisecond per round, then given up: QUIC repeats what matters |
//! | anything else | given up |

use std::{io, mem, time::Duration};

use super::plan::{Bundle, Run};
use crate::{
    refusal::{Refusal, Refusals},
    socket::{Departure, MAX_SEGMENTS, Outgoing, Receiver, Sender, Socket},
    verdict::DropReason,
};

/// How long a round waits, once, for room to send.
const SEND_WAIT: Duration = Duration::from_millis(1);
/// How often one message is tried before it is given up.
const ATTEMPTS: usize = 4;

/// What became of datagrams: `None` when they left.
pub(super) type Fate = Option<DropReason>;

/// What sending needs and remembers.
pub(super) struct Transmitter {
    sender: Sender,
    /// For the datagrams of a refused message, while `sender` still describes the others.
    one_by_one: Sender,
    state: State,
}

/// Datagrams that went the same way: those of a run, or one.
#[derive(Clone, Copy)]
pub(super) struct Sent<'a, T> {
    pub(super) run: &'a Run<T>,
    pub(super) count: u64,
    pub(super) octets: u64,
    pub(super) fate: Fate,
}

/// What one round of sending has seen.
struct State {
    /// Whether the kernel takes several datagrams in one message, by family.
    offload: [bool; 2],
    may_wait: bool,
    /// Whether there is anything in `refusals`, which mostly there is not.
    refused: bool,
    refusals: Refusals,
    /// What a lone datagram met that is tried again.
    first: Option<Refusal>,
}

impl Transmitter {
    pub(super) fn new() -> Self {
        let (sender, one_by_one) = (Sender::new(), Sender::new());
        let state = State {
            offload: [true; 2],
            may_wait: true,
            refused: false,
            refusals: Refusals::default(),
            first: None,
        };
        Self { sender, one_by_one, state }
    }

    /// Begins a round.
    pub(super) fn begin(&mut self) {
        self.state.may_wait = true;
    }

    /// What the kernel has refused since this was asked last, if anything.
    pub(super) fn take_refusals(&mut self) -> Option<Refusals> {
        let State { refused, refusals, first, .. } = &mut self.state;
        // One that came again was about the datagram itself, and is counted. Others were about an earlier one.
        if let Some(first) = first.take()
            && first.is_about_backend()
            && !refusals.has(first)
        {
            *refused = true;
            refusals.add(first, 1);
        }
        mem::take(refused).then(|| mem::take(refusals))
    }

    /// Sends a lone datagram from a connected socket at the least cost; says whether it left. If not, it is for
    /// [`Self::send`] to try again: the error may be about an earlier one.
    #[inline]
    pub(super) fn send_lone(&mut self, socket: &Socket, octets: &[u8]) -> bool {
        match socket.send(octets) {
            Ok(()) => true,
            Err(error) => {
                self.state.first = Some(Refusal::of(&error));
                false
            }
        }
    }

    /// Sends `bundles` in order, each as `departure` says, and tells `done` what became of them.
    pub(super) fn send<T: Copy + PartialEq>(
        &mut self,
        socket: &Socket,
        receiver: &Receiver,
        runs: &[Run<T>],
        bundles: &[Bundle],
        departure: impl Fn(&Bundle) -> Departure,
        mut done: impl FnMut(Sent<'_, T>),
    ) {
        let Self { sender, one_by_one, state } = self;
        let mut next = 0;
        while let Some(bundle) = bundles.get(next) {
            let ipv6 = departure(bundle).ipv6;
            let alone = |state: &State, bundle: &Bundle| {
                bundle.count > 1 && !state.offload[usize::from(ipv6)]
            };
            if alone(state, bundle) {
                let how = departure(bundle);
                state.send_one_by_one(one_by_one, socket, receiver, runs, bundle, &how, &mut done);
                next += 1;
                continue;
            }
            let mut outgoing = sender.compose();
            let first = next;
            while let Some(bundle) = bundles.get(next)
                && outgoing.has_room(usize::from(bundle.runs))
                && !alone(state, bundle)
            {
                let segment = (bundle.count > 1).then_some(bundle.segment);
                let parts = bundle.runs(runs).map(|run| octets(receiver, run, run.range()));
                outgoing.push(&Departure { segment, ..departure(bundle) }, parts);
                next += 1;
            }
            let mut at = first;
            while at < next {
                match state.attempt(socket, &mut outgoing, at - first) {
                    Ok(sent) => {
                        report(&bundles[at..at + sent], runs, None, &mut done);
                        at += sent;
                    }
                    Err(error) => {
                        let bundle = &bundles[at];
                        if bundle.count > 1 && is_about_offload(&error) {
                            let how = departure(bundle);
                            let all_sent = state.send_one_by_one(
                                one_by_one, socket, receiver, runs, bundle, &how, &mut done,
                            );
                            let never = error.raw_os_error() == Some(libc::EIO);
                            let not_here = error.raw_os_error() == Some(libc::EINVAL) && all_sent;
                            if never || not_here {
                                state.offload[usize::from(how.ipv6)] = false;
                            }
                        } else {
                            state.refuse(&error);
                            let fate = Some(reason(&error));
                            report(&bundles[at..=at], runs, fate, &mut done);
                        }
                        at += 1;
                    }
                }
            }
        }
    }
}

impl State {
    /// Sends the message with number `first` and those after it, patiently.
    fn attempt(
        &mut self,
        socket: &Socket,
        outgoing: &mut Outgoing<'_, '_>,
        first: usize,
    ) -> io::Result<usize> {
        let mut was_too_big = false;
        let mut attempt = 1;
        loop {
            let error = match outgoing.send(socket, first) {
                Ok(sent) => return Ok(sent),
                Err(error) => error,
            };
            match error.raw_os_error() {
                // The last attempt is counted by whoever gives up.
                Some(libc::ECONNREFUSED) if attempt < ATTEMPTS => self.refuse(&error),
                Some(libc::EMSGSIZE) if !was_too_big => was_too_big = true,
                Some(libc::EAGAIN | libc::ENOBUFS) if self.may_wait => {
                    self.may_wait = false;
                    socket.wait_writable(SEND_WAIT)?;
                }
                _ => return Err(error),
            }
            if attempt == ATTEMPTS {
                return Err(error);
            }
            attempt += 1;
        }
    }

    #[cold]
    fn refuse(&mut self, error: &io::Error) {
        self.refused = true;
        self.refusals.add(Refusal::of(error), 1);
    }

    /// Sends each datagram as a message; says whether all of them left.
    #[expect(clippy::too_many_arguments, reason = "what one message of several needs")]
    fn send_one_by_one<T: Copy + PartialEq>(
        &mut self,
        sender: &mut Sender,
        socket: &Socket,
        receiver: &Receiver,
        runs: &[Run<T>],
        bundle: &Bundle,
        departure: &Departure,
        done: &mut impl FnMut(Sent<'_, T>),
    ) -> bool {
        let datagrams = || bundle.runs(runs).flat_map(|run| run.datagrams().map(move |d| (run, d)));
        let mut outgoing = sender.compose();
        for (run, range) in datagrams() {
            outgoing.push(departure, [octets(receiver, run, range)]);
        }
        let mut fates = [None; MAX_SEGMENTS];
        let mut at = 0;
        while at < outgoing.len() {
            match self.attempt(socket, &mut outgoing, at) {
                Ok(sent) => at += sent,
                Err(error) => {
                    self.refuse(&error);
                    fates[at] = Some(reason(&error));
                    at += 1;
                }
            }
        }
        for ((run, range), fate) in datagrams().zip(fates) {
            done(Sent { run, count: 1, octets: range.len() as u64, fate });
        }
        fates.iter().all(Option::is_none)
    }
}

fn octets<'a, T>(receiver: &'a Receiver, run: &Run<T>, range: std::ops::Range<usize>) -> &'a [u8] {
    receiver.octets(usize::from(run.slot), range)
}

fn report<T>(bundles: &[Bundle], runs: &[Run<T>], fate: Fate, done: &mut impl FnMut(Sent<'_, T>)) {
    for bundle in bundles {
        for run in bundle.runs(runs) {
            let (count, octets) = (u64::from(run.count), u64::from(run.len));
            done(Sent { run, count, octets, fate });
        }
    }
}

/// Whether the datagrams may leave one by one although they did not together. Without a driver
/// that can checksum, the kernel says EIO; a path that it does not offload, or does not fit a
/// segment, EINVAL or EMSGSIZE.
fn is_about_offload(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE))
}

/// Why a datagram that the kernel refused with `error` was dropped.
fn reason(error: &io::Error) -> DropReason {
    match error.raw_os_error() {
        Some(libc::EMSGSIZE) => DropReason::TooBig,
        _ => DropReason::SendFailed,
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;
    use crate::{
        socket::{Marks, Peer, PortUse, SLOTS},
        worker::plan::NO_RUN,
    };

    /// Sends one datagram twice as workers send lone ones; says what was refused, and what became of it.
    fn send_lone(socket: &Socket, octets: &[u8]) -> (Vec<(Refusal, u64)>, Fate) {
        let ours = Socket::listener(([127, 0, 0, 1], 0).into(), crate::socket::Sharing::First);
        let ours = ours.expect("a socket");
        let sender = UdpSocket::bind("127.0.0.1:0").expect("another");
        sender.send_to(octets, ours.local_address().expect("bound")).expect("loopback");
        let mut receiver = Receiver::new();
        while receiver.receive(&ours, 0..SLOTS, Peer::Known).expect("received") == 0 {}

        let len = u16::try_from(octets.len()).expect("one datagram");
        let marks = Marks::UNSET;
        let run =
            Run { slot: 0, tag: (), marks, count: 1, segment: len, start: 0, len, next: NO_RUN };
        let mut transmitter = Transmitter::new();
        let mut fate = None;
        if !transmitter.send_lone(socket, octets) {
            let departure = |_: &Bundle| Departure {
                to: None,
                from: None,
                class: None,
                hops: None,
                segment: None,
                ipv6: false,
            };
            let bundles = [Bundle::new(0, &run)];
            transmitter.send(socket, &receiver, &[run], &bundles, departure, |sent| {
                fate = sent.fate;
            });
        }
        let refusals = transmitter.take_refusals();
        assert!(transmitter.take_refusals().is_none(), "each is told once");
        (refusals.iter().flat_map(Refusals::iter).collect(), fate)
    }

    #[test]
    fn what_the_kernel_goes_on_refusing_counts_once_for_a_lone_datagram() {
        let peer = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        let peer = peer.local_addr().expect("bound");
        let local = ([127, 0, 0, 1], 0).into();
        let socket = Socket::upstream(local, peer, PortUse::Exclusive).expect("another");
        socket.spoil();
        let (refusals, fate) = send_lone(&socket, &[0x40; 300]);
        assert_eq!(refusals, [(Refusal::Invalid, 1)]);
        assert_eq!(fate, Some(DropReason::SendFailed));
    }

    #[test]
    fn what_was_about_an_earlier_datagram_counts_too() {
        let nobody = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        let peer = nobody.local_addr().expect("bound");
        drop(nobody);
        let local = ([127, 0, 0, 1], 0).into();
        let socket = Socket::upstream(local, peer, PortUse::Exclusive).expect("another");
        assert_eq!(send_lone(&socket, &[0x40; 300]), (vec![], None));
        assert_eq!(send_lone(&socket, &[0x40; 300]), (vec![(Refusal::ConnectionRefused, 1)], None));
    }
}
