//! What the forwarder is asked about at once: datagrams of one message that begin alike.

use std::ops::Range;

use quic::routable::Decoder;

use super::plan::{NO_RUN, Run};
use crate::socket::{MAX_SEGMENTS, Marks, Received, Receiver};

/// Datagrams side by side in one slot about which the forwarder would say the same, if it says that
/// their connection ID is routable: they came as one message, on one client path therefore, and
/// begin with the same short header as far as a routable connection ID goes.
#[derive(Clone, Copy)]
pub(super) struct Burst {
    pub(super) slot: u8,
    /// As they leave.
    pub(super) marks: Marks,
    start: u16,
    len: u16,
    segment: u16,
    pub(super) count: u16,
}

impl Burst {
    /// All that arrived in `slot`, whether it begins alike or not, to leave with `marks`.
    #[expect(clippy::cast_possible_truncation, reason = "a message has less than 65,536 octets")]
    pub(super) fn of_message(slot: usize, message: &Received, marks: Marks) -> Self {
        let Received { len, segment, .. } = *message;
        let (len, segment, count) = (len as u16, segment as u16, message.datagrams() as u16);
        Self { slot: slot as u8, marks, start: 0, len, segment, count }
    }

    /// Takes off the datagrams in front that form a burst: one, or more if they begin alike.
    pub(super) fn split_off_front(&mut self, receiver: &Receiver, decoder: &Decoder) -> Self {
        let mut burst = Self { count: 1, len: self.len.min(self.segment), ..*self };
        if self.count > 1 {
            let octets = receiver.octets(usize::from(self.slot), self.range());
            let short = |octets: &[u8]| octets.first().is_some_and(|first| first & 0x80 == 0);
            let routable = if short(octets) { decoder.needed(&octets[1..]).ok() } else { None };
            if let Some(cid_len) = routable.filter(|len| *len < usize::from(self.segment)) {
                let cid = &octets[1..=cid_len];
                let alike = octets
                    .chunks(usize::from(self.segment))
                    .take(MAX_SEGMENTS)
                    .take_while(|datagram| {
                        short(datagram) && datagram.get(1..=cid_len) == Some(cid)
                    })
                    .count();
                #[expect(clippy::cast_possible_truncation, reason = "at most MAX_SEGMENTS")]
                let count = alike.clamp(1, MAX_SEGMENTS) as u16;
                let full = u32::from(self.segment) * u32::from(count);
                burst.count = count;
                #[expect(clippy::cast_possible_truncation, reason = "at most what it was")]
                let len = full.min(u32::from(self.len)) as u16;
                burst.len = len;
            }
        }
        self.advance(&burst);
        burst
    }

    /// Takes off as many datagrams in front as can leave together.
    pub(super) fn split_off_whole(&mut self) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "a small constant")]
        let count = self.count.min(MAX_SEGMENTS as u16);
        let len = u32::from(self.len).min(u32::from(self.segment) * u32::from(count));
        #[expect(clippy::cast_possible_truncation, reason = "at most what it was")]
        let burst = Self { count, len: len as u16, ..*self };
        self.advance(&burst);
        burst
    }

    fn advance(&mut self, taken: &Self) {
        // At the very end of the largest message there is nothing left to point at.
        self.start = self.start.wrapping_add(taken.len);
        self.len -= taken.len;
        self.count -= taken.count;
    }

    fn range(&self) -> Range<usize> {
        usize::from(self.start)..usize::from(self.start) + usize::from(self.len)
    }

    pub(super) fn first_datagram<'a>(&self, receiver: &'a Receiver) -> &'a [u8] {
        let start = usize::from(self.start);
        let len = usize::from(self.len.min(self.segment));
        receiver.octets(usize::from(self.slot), start..start + len)
    }

    pub(super) fn datagrams(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        self.run(()).datagrams()
    }

    /// Each datagram by itself.
    #[expect(clippy::cast_possible_truncation, reason = "parts of a message")]
    pub(super) fn singles(&self) -> impl Iterator<Item = Self> + use<> {
        let burst = *self;
        self.datagrams().map(move |range| Self {
            start: range.start as u16,
            len: range.len() as u16,
            count: 1,
            ..burst
        })
    }

    /// As a run with this tag.
    pub(super) fn run<T>(&self, tag: T) -> Run<T> {
        let Self { slot, marks, start, len, count, .. } = *self;
        let segment = if count == 1 { len } else { self.segment };
        Run { slot, tag, marks, count, segment, start, len, next: NO_RUN }
    }
}
