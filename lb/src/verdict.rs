//! What becomes of a datagram, in words that are metric labels, log words and test assertions at
//! once.

use quic::{invariants::Malformed, token::InvalidToken};
use serde::{Deserialize, Serialize};

use crate::{backend::BackendId, cid_tag::CidTag};

/// The forwarding rule that found the backend: the first that answers wins
/// (draft-ietf-quic-load-balancers-21, section 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Rule {
    /// The destination connection ID decodes to a server.
    Cid,
    /// A long header whose 4-tuple and source connection ID are remembered.
    FourTupleScid,
    /// The destination connection ID was learnt from a server that has no routable ones.
    Dcid,
    /// The 4-tuple is remembered.
    FourTuple,
    /// Consistent hashing.
    Fallback,
}

impl Rule {
    /// Every rule, in the order in which they are asked.
    pub const ALL: [Self; 5] =
        [Self::Cid, Self::FourTupleScid, Self::Dcid, Self::FourTuple, Self::Fallback];

    /// The metric label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Cid => "cid",
            Self::FourTupleScid => "four_tuple_scid",
            Self::Dcid => "dcid",
            Self::FourTuple => "four_tuple",
            Self::Fallback => "fallback",
        }
    }
}

/// Why a datagram from a client was not forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DropReason {
    /// It has no octets.
    Empty,
    /// It ends inside the invariant part of a long header, or is an Initial that no client sends.
    Malformed,
    /// An Initial that begins a connection in a datagram of less than 1,200 octets.
    SmallInitial,
    /// It claims to come from the port of a service that attackers reflect from.
    ReflectorPort,
    /// It claims to come from an address of the balancer.
    OwnAddress,
    /// It claims to come from the address of a backend.
    BackendAddress,
    /// It has passed all the routers that it may.
    HopLimit,
    /// It comes round again and again: somewhere behind a backend's address stands the balancer itself.
    Loop,
    /// An Initial with a token that claims to be of a Retry and is not good, whose sender is not told: it is not authentic, or
    /// too many were told.
    InvalidToken,
    /// It began with no Initial, while addresses were being validated.
    Unvalidated,
    /// A version that is denied while addresses are being validated.
    Version,
    /// A short header that nothing was known about, while addresses were being validated.
    UnknownShortHeader,
    /// An Initial that was to be answered by a Retry, and every key has made all its tokens, where
    /// their number is limited.
    TokenLimit,
    /// Too many connections begin at this address.
    AddressLimit,
    /// Too many connections begin in this network.
    NetworkLimit,
    /// Too many connections begin on this listener.
    ListenerLimit,
    /// Too many connections begin altogether.
    TotalLimit,
    /// It would begin something on a listener that is not in the configuration any more.
    ListenerRemoved,
    /// No backend of the pool takes new connections.
    NoBackend,
    /// It would start a flow, and the limit on flows is reached.
    FlowLimit,
    /// It would start a flow, and no descriptor was left for its upstream socket.
    DescriptorLimit,
    /// It would start a flow, and no upstream port was left for its backend.
    PortsExhausted,
    /// It is larger than the link to the backend carries, and fragmentation is refused.
    TooBig,
    /// The kernel refused to send it.
    SendFailed,
    /// A worker panicked while it had it.
    Panic,
}

impl DropReason {
    /// Every reason.
    pub const ALL: [Self; 25] = [
        Self::Empty,
        Self::Malformed,
        Self::SmallInitial,
        Self::ReflectorPort,
        Self::OwnAddress,
        Self::BackendAddress,
        Self::HopLimit,
        Self::Loop,
        Self::InvalidToken,
        Self::Unvalidated,
        Self::Version,
        Self::UnknownShortHeader,
        Self::TokenLimit,
        Self::AddressLimit,
        Self::NetworkLimit,
        Self::ListenerLimit,
        Self::TotalLimit,
        Self::ListenerRemoved,
        Self::NoBackend,
        Self::FlowLimit,
        Self::DescriptorLimit,
        Self::PortsExhausted,
        Self::TooBig,
        Self::SendFailed,
        Self::Panic,
    ];

    /// The metric label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Malformed => "malformed",
            Self::SmallInitial => "small_initial",
            Self::ReflectorPort => "reflector_port",
            Self::OwnAddress => "own_address",
            Self::BackendAddress => "backend_address",
            Self::HopLimit => "hop_limit",
            Self::Loop => "loop",
            Self::InvalidToken => "invalid_token",
            Self::Unvalidated => "unvalidated",
            Self::Version => "version",
            Self::UnknownShortHeader => "unknown_short_header",
            Self::TokenLimit => "token_limit",
            Self::AddressLimit => "address_limit",
            Self::NetworkLimit => "network_limit",
            Self::ListenerLimit => "listener_limit",
            Self::TotalLimit => "total_limit",
            Self::ListenerRemoved => "listener_removed",
            Self::NoBackend => "no_backend",
            Self::FlowLimit => "flow_limit",
            Self::DescriptorLimit => "descriptor_limit",
            Self::PortsExhausted => "ports_exhausted",
            Self::TooBig => "too_big",
            Self::SendFailed => "send_failed",
            Self::Panic => "panic",
        }
    }
}

impl From<Malformed> for DropReason {
    fn from(malformed: Malformed) -> Self {
        match malformed {
            Malformed::Empty => Self::Empty,
            Malformed::Truncated => Self::Malformed,
        }
    }
}

/// What the balancer answers by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ReplyKind {
    /// A Retry packet: the client has to prove its address.
    Retry,
    /// CONNECTION_CLOSE with INVALID_TOKEN: the token that was to prove it does not.
    InvalidToken,
}

impl ReplyKind {
    /// Every kind.
    pub const ALL: [Self; 2] = [Self::Retry, Self::InvalidToken];

    /// The metric label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Retry => "retry",
            Self::InvalidToken => "invalid_token",
        }
    }
}

/// What the token of an Initial was worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TokenResult {
    /// It proves the client's address.
    Valid,
    /// As [`InvalidToken::Truncated`].
    Truncated,
    /// As [`InvalidToken::UnknownKey`].
    UnknownKey,
    /// As [`InvalidToken::Seal`].
    Seal,
    /// As [`InvalidToken::OriginalDcidLength`].
    OriginalDcidLength,
    /// As [`InvalidToken::Expired`].
    Expired,
    /// As [`InvalidToken::Future`].
    Future,
    /// As [`InvalidToken::Address`].
    Address,
    /// As [`InvalidToken::Port`]: honoured within a bound, where the client's NAT may have moved.
    Port,
    /// As [`InvalidToken::Type`].
    Type,
}

impl TokenResult {
    /// Every result.
    pub const ALL: [Self; 10] = [
        Self::Valid,
        Self::Truncated,
        Self::UnknownKey,
        Self::Seal,
        Self::OriginalDcidLength,
        Self::Expired,
        Self::Future,
        Self::Address,
        Self::Port,
        Self::Type,
    ];

    /// The metric label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Valid => "valid",
            Self::Truncated => InvalidToken::Truncated.label(),
            Self::UnknownKey => InvalidToken::UnknownKey.label(),
            Self::Seal => InvalidToken::Seal.label(),
            Self::OriginalDcidLength => InvalidToken::OriginalDcidLength.label(),
            Self::Expired => InvalidToken::Expired.label(),
            Self::Future => InvalidToken::Future.label(),
            Self::Address => InvalidToken::Address.label(),
            Self::Port => InvalidToken::Port.label(),
            Self::Type => InvalidToken::Type.label(),
        }
    }
}

impl From<InvalidToken> for TokenResult {
    fn from(invalid: InvalidToken) -> Self {
        match invalid {
            InvalidToken::Type => Self::Type,
            InvalidToken::Truncated => Self::Truncated,
            InvalidToken::UnknownKey => Self::UnknownKey,
            InvalidToken::Seal => Self::Seal,
            InvalidToken::OriginalDcidLength => Self::OriginalDcidLength,
            InvalidToken::Expired => Self::Expired,
            InvalidToken::Future => Self::Future,
            InvalidToken::Address => Self::Address,
            InvalidToken::Port => Self::Port,
        }
    }
}

/// What the forwarder decided about one datagram from a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Send it to `backend`.
    Forward {
        /// Where it goes.
        backend: BackendId,
        /// The rule that found the backend.
        rule: Rule,
        /// What carries it there.
        via: Via,
    },
    /// Do not send it, and answer the client: one of [`crate::forwarder::Forwarder::replies`].
    Reply(ReplyKind),
    /// Do not send it.
    Drop(DropReason),
}

/// By what means a datagram goes to its backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// Out of the upstream socket of this flow.
    Flow(FlowId),
    /// By a flow that begins with it.
    NewFlow(Opened),
    /// As it is: the pool's servers answer clients themselves, and nothing is kept open for it.
    Direct,
}

impl Via {
    /// The flow, if one carries it.
    #[must_use]
    pub const fn flow(self) -> Option<FlowId> {
        match self {
            Self::Flow(flow) | Self::NewFlow(Opened { flow, .. }) => Some(flow),
            Self::Direct => None,
        }
    }
}

/// A flow that begins. Its upstream socket is to be opened before the next batch is decided about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// The flow.
    pub flow: FlowId,
    /// The flow that has ended to make room, whose socket is to be closed before: it may have had
    /// the same number.
    pub evicted: Option<Ended>,
    /// Why there is a new one.
    pub opening: Opening,
    /// Whether it begins with a first flight, to which the backend was chosen.
    pub asks: bool,
}

/// A flow that has ended, and whose socket is to be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The flow.
    pub flow: FlowId,
    /// What was known of its client.
    pub standing: Standing,
    /// The connection ID of a server that its client has used last.
    pub cid: Option<CidTag>,
}

/// What is known of the client of a flow; the weaker ones make room for others first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Standing {
    /// Its connection has gone to another path.
    Superseded,
    /// It may be forged.
    Unproven,
    /// It has shown what only somebody at its address can know.
    Proven,
}

impl Standing {
    /// Every standing, the weakest first.
    pub const ALL: [Self; 3] = [Self::Superseded, Self::Unproven, Self::Proven];

    /// The metric label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Superseded => "superseded",
            Self::Unproven => "unproven",
            Self::Proven => "proven",
        }
    }
}

/// Why there is a new flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Opening {
    /// A connection begins, or nothing is known of one.
    New,
    /// The flow is new and its connection is not: a short header with a connection ID of a server, routable or
    /// learnt, on a client path that has not carried any for this backend.
    PathChange,
}

/// A client path bound to one backend, within one worker. Numbers are small and are used again
/// after the flow has ended, so that workers can keep their own tables by [`FlowId::index`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowId(pub(crate) u32);

impl FlowId {
    /// Where the flow stands in tables kept by flow.
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}
