//! What the balancer answers by itself to the datagrams of one batch.

use crate::{
    admission::tokens::MAX_RETRY_LEN,
    verdict::{DropReason, ReplyKind},
};

/// The most datagrams that the forwarder takes at a time.
pub const BATCH: usize = 64;

/// What the forwarder answers to a datagram by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply<'a> {
    /// The number of the datagram in its batch.
    pub datagram: usize,
    /// What it is.
    pub kind: ReplyKind,
    /// The UDP payload: never longer than that of the datagram.
    pub octets: &'a [u8],
}

/// The answers to one batch, in memory that is there from the start.
#[derive(Debug)]
pub(super) struct Replies {
    octets: Box<[u8]>,
    entries: Vec<ReplyEntry>,
}

#[derive(Clone, Copy, Debug)]
struct ReplyEntry {
    datagram: usize,
    kind: ReplyKind,
    len: usize,
}

impl Replies {
    pub(super) fn new() -> Self {
        let octets = vec![0; BATCH * MAX_RETRY_LEN].into_boxed_slice();
        Self { octets, entries: Vec::with_capacity(BATCH) }
    }

    pub(super) fn clear(&mut self) {
        self.entries.clear();
    }

    pub(super) fn push(
        &mut self,
        datagram: usize,
        kind: ReplyKind,
        write: impl FnOnce(&mut [u8]) -> Result<usize, DropReason>,
    ) -> Result<(), DropReason> {
        // A batch has no more answers than datagrams.
        let room = self.octets.chunks_exact_mut(MAX_RETRY_LEN).nth(self.entries.len());
        let len = write(room.ok_or(DropReason::Malformed)?)?;
        self.entries.push(ReplyEntry { datagram, kind, len });
        Ok(())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Reply<'_>> {
        let octets = self.octets.chunks_exact(MAX_RETRY_LEN);
        self.entries.iter().zip(octets).map(|(&ReplyEntry { datagram, kind, len }, octets)| Reply {
            datagram,
            kind,
            octets: &octets[..len],
        })
    }
}
