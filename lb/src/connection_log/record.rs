//! What is said of a flow: small values without names, which a worker can afford to leave behind.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::{
    backend::BackendId,
    client_path::{ClientAddr, ListenerIndex},
    flows::Flow,
    succession::Offset,
    verdict::{Ended, Opening, Rule, Standing},
};

/// A flow as it began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Begun {
    pub(crate) at: Instant,
    pub(crate) listener: ListenerIndex,
    pub(crate) client: ClientAddr,
    pub(crate) backend: BackendId,
    /// The one that found the backend of its first datagram.
    pub(crate) rule: Rule,
    pub(crate) opening: Opening,
    /// Of QUIC, if its first datagram showed one.
    pub(crate) version: Option<u32>,
    /// Whether the client came with the token of a Retry.
    pub(crate) retry: bool,
}

/// What went through a flow, as UDP payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Traffic {
    /// To the backend.
    pub(crate) forwarded: Volume,
    /// From it.
    pub(crate) returned: Volume,
}

/// Datagrams, and the octets in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Volume {
    pub(crate) datagrams: u64,
    pub(crate) octets: u64,
}

impl Volume {
    #[inline]
    pub(crate) const fn add(&mut self, datagrams: u64, octets: u64) {
        self.datagrams = self.datagrams.wrapping_add(datagrams);
        self.octets = self.octets.wrapping_add(octets);
    }
}

/// Why a flow has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EndReason {
    /// Nothing was heard of either side for long enough.
    Idle,
    /// Nothing ever came from the backend.
    Unanswered,
    /// The backend has refused the first flight that it began with, which another one was sent.
    Refused,
    /// Its connection is on another path.
    Moved,
    /// It has made room for another one.
    Evicted,
    /// Its worker has panicked.
    Panic,
    /// The process has ended.
    Stopped,
}

impl EndReason {
    /// Of a flow that was not used any more.
    pub(crate) const fn of_expired(ended: &Ended, traffic: &Traffic) -> Self {
        match ended.standing {
            Standing::Superseded => Self::Moved,
            _ if traffic.returned.datagrams == 0 => Self::Unanswered,
            _ => Self::Idle,
        }
    }

    /// Of a flow that has made room.
    pub(crate) const fn of_evicted(ended: &Ended) -> Self {
        match ended.standing {
            Standing::Superseded => Self::Moved,
            Standing::Unproven | Standing::Proven => Self::Evicted,
        }
    }

    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Unanswered => "unanswered",
            Self::Refused => "refused",
            Self::Moved => "moved",
            Self::Evicted => "evicted",
            Self::Panic => "panic",
            Self::Stopped => "stopped",
        }
    }
}

/// The end of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) at: Instant,
    pub(crate) traffic: Traffic,
    pub(crate) reason: EndReason,
}

/// One line of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) begun: Begun,
    /// `None` where it has only begun.
    pub(crate) end: Option<End>,
}

/// A flow as it began, on its way to a successor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct HandedBegun {
    at: Offset,
    rule: Rule,
    opening: Opening,
    version: Option<u32>,
    retry: bool,
}

impl Begun {
    /// For a successor, which knows the flow itself.
    pub(crate) fn handed(&self, now: Instant) -> HandedBegun {
        let &Self { at, rule, opening, version, retry, .. } = self;
        HandedBegun { at: Offset::new(now, at), rule, opening, version, retry }
    }
}

impl HandedBegun {
    pub(crate) fn taken_over(self, now: Instant, flow: &Flow) -> Begun {
        let Self { at, rule, opening, version, retry } = self;
        let &Flow { listener, path, backend } = flow;
        let (at, client) = (at.from(now), path.client);
        Begun { at, listener, client, backend, rule, opening, version, retry }
    }
}
