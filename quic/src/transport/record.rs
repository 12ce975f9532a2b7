//! Records: what happens on a connection, told to whoever observes it, as it happens.
//!
//! A connection makes a [`Record`] wherever something happens that is counted or worth a line in a
//! log, and an observer gets it at once, with the time. Observers come from [`Observers`], which
//! [`TransportConfig::observers`](super::TransportConfig::observers) has and every new connection
//! asks for one.
//!
//! They are called instead of records being queued, since a queue would have to grow or to lose some
//! while nobody drains it, and would copy what a call can lend: a packet's frames. Where nobody
//! observes, a record is never even put together. An observer runs while the connection is worked
//! on, and should be as quick as that.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    error::ConnectionError, packet::DropReason, space::Space, stream_id::Side, timer::Timer,
};
use crate::connection_id::ConnectionId;

/// Something that happened on a connection.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Record<'a> {
    /// A datagram was handed out for sending.
    DatagramSent {
        /// Octets of its payload.
        size: usize,
    },
    /// A datagram came.
    DatagramReceived {
        /// Octets of its payload.
        size: usize,
    },
    /// A packet is part of a datagram that leaves.
    PacketSent {
        /// Its packet number space, and thus its type.
        space: Space,
        /// Its number.
        number: u64,
        /// Its octets, header and protection included.
        size: usize,
        /// Whether the peer has to acknowledge it.
        ack_eliciting: bool,
        /// Its frames as they stand on the wire, without protection.
        frames: &'a [u8],
    },
    /// An authentic packet came that had not come before.
    PacketReceived {
        /// Its packet number space, and thus its type.
        space: Space,
        /// Its number.
        number: u64,
        /// Its octets, header and protection included.
        size: usize,
        /// Its frames as they stand on the wire, without protection.
        frames: &'a [u8],
    },
    /// A packet came before its keys, and waits for them.
    PacketBuffered {
        /// Its packet number space, and thus its type.
        space: Space,
        /// Its octets, header and protection included.
        size: usize,
    },
    /// A packet, or what there was instead of one, was dropped without further effect.
    PacketDropped {
        /// Why.
        reason: DropReason,
        /// Its octets.
        size: usize,
    },
    /// The peer has acknowledged a packet that was in flight.
    PacketAcked {
        /// Its packet number space, and thus its type.
        space: Space,
        /// Its number.
        number: u64,
    },
    /// A packet counts as lost.
    PacketLost {
        /// Its packet number space, and thus its type.
        space: Space,
        /// Its number.
        number: u64,
        /// Its octets.
        size: usize,
        /// What it counts as lost by.
        reason: LossReason,
        /// Whether it was to find out whether the path carries its size.
        mtu_probe: bool,
    },
    /// The peer has acknowledged a packet that counts as lost: it was late.
    PacketLate {
        /// Its packet number space, and thus its type.
        space: Space,
        /// Its number.
        number: u64,
    },
    /// Nothing was acknowledged for so long that probes leave.
    ProbeTimeout {
        /// The packet number space whose time it was.
        space: Space,
        /// How many there were in a row, with this one.
        count: u32,
    },
    /// The congestion controller was told of congestion.
    Congestion(CongestionSign),
    /// All packets that the congestion controller was last told of have arrived after all, and it
    /// was told so.
    CongestionUndone,
    /// The congestion controller works in another way than before.
    CongestionStateUpdated(CongestionState),
    /// What loss detection and congestion control go by may have changed.
    RecoveryUpdated(RecoveryMetrics),
    /// Keys are there that packets of this space can be protected with.
    KeysInstalled(Space),
    /// Keys of this space are gone.
    KeysDiscarded(Space),
    /// The keys of 1-RTT packets were updated.
    KeysUpdated {
        /// Whether the peer began.
        by_peer: bool,
    },
    /// The peer is asked whether it is there.
    PathValidationStarted {
        /// Where.
        remote: SocketAddr,
        /// Whether it had answered there before.
        again: bool,
    },
    /// The peer has answered.
    PathValidated {
        /// Where.
        remote: SocketAddr,
    },
    /// The peer has not answered in time.
    PathValidationFailed {
        /// Where.
        remote: SocketAddr,
    },
    /// Packets go to another path from now on.
    PathChanged {
        /// To where.
        remote: SocketAddr,
    },
    /// Datagrams may have another size than before.
    MtuUpdated {
        /// Octets of their payload, at most.
        mtu: u16,
    },
    /// Messages of DATAGRAM frames that nobody had read made room for others.
    MessagesDropped {
        /// How many.
        count: u64,
    },
    /// A timer has come due.
    TimerExpired(Timer),
    /// The connection is over, for the application.
    Closed(&'a ConnectionError),
}

/// What a packet counts as lost by.
///
/// <https://www.rfc-editor.org/rfc/rfc9002.html#section-6.1>
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LossReason {
    /// Packets so much later were acknowledged.
    PacketThreshold,
    /// A later one was acknowledged, and it was sent so long ago.
    TimeThreshold,
}

/// What shows congestion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CongestionSign {
    /// Packets are lost.
    Loss,
    /// Packets were marked on their way.
    Ecn,
    /// Nothing got through for long.
    Persistent,
}

/// How a congestion controller works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CongestionState {
    /// The window grows by what is acknowledged.
    SlowStart,
    /// It grows with care.
    CongestionAvoidance,
}

/// What loss detection and congestion control of the active path go by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecoveryMetrics {
    /// The smoothed round-trip time.
    pub smoothed_rtt: Duration,
    /// The latest sample.
    pub latest_rtt: Duration,
    /// The shortest one.
    pub min_rtt: Duration,
    /// How much samples vary.
    pub rtt_variation: Duration,
    /// Probe timeouts in a row.
    pub pto_count: u32,
    /// Octets that may be in flight.
    pub congestion_window: u64,
    /// Octets in flight.
    pub in_flight: u64,
    /// Octets per second that the controller asks for, if it does.
    pub pacing_rate: Option<u64>,
}

/// The connection that is to be observed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject {
    /// Which side of it this is.
    pub side: Side,
    /// What the client sent to in the first place: both sides know a connection by it.
    pub original_dcid: ConnectionId,
    /// Where the peer is.
    pub remote: SocketAddr,
}

/// Hears of everything that happens on one connection.
pub type Observer = Box<dyn FnMut(Instant, &Record<'_>) + Send>;

/// Where observers of new connections come from.
#[derive(Clone)]
pub struct Observers(Arc<MakeObserver>);

type MakeObserver = dyn Fn(&Subject) -> Option<Observer> + Send + Sync;

impl Observers {
    /// Asks `make` for each connection; `None` leaves it unobserved.
    pub fn new(make: impl Fn(&Subject) -> Option<Observer> + Send + Sync + 'static) -> Self {
        Self(Arc::new(make))
    }

    pub(crate) fn observe(&self, subject: &Subject) -> Option<Observer> {
        (self.0)(subject)
    }
}

impl std::fmt::Debug for Observers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Observers").finish_non_exhaustive()
    }
}
