//! What can be configured about connections, and the defaults with their reasons.

use std::{sync::Arc, time::Duration};

use super::{
    congestion::Algorithm,
    parameters::{MIN_UDP_PAYLOAD, PreferredAddress},
    path::PathDefaults,
    record::Observers,
    rtt::INITIAL_RTT,
    streams::{SendMemory, StreamLimits},
};
use crate::header::Version;

/// How connections behave; the same for both roles.
#[derive(Clone, Debug)]
pub struct TransportConfig {
    /// Limits of streams and flow control.
    pub streams: StreamLimits,
    /// What send buffers may take in all beyond their first sizes.
    pub send_memory: SendMemory,
    /// Silence after which a connection ends; zero for never. The smaller of both sides' counts.
    pub idle_timeout: Duration,
    /// Silence after which a PING goes out, to keep the connection and NAT bindings alive.
    pub keep_alive: Option<Duration>,
    /// How long a handshake may take in all. Silence ends it sooner: after `idle_timeout`, but not
    /// before three probe timeouts, backed off.
    pub handshake_timeout: Duration,
    /// Which congestion controller paths get.
    pub congestion: Algorithm,
    /// The largest datagram that MTU discovery tries; 1200 turns discovery off.
    pub max_udp_payload: u16,
    /// The round-trip time to assume before the first sample.
    pub initial_rtt: Duration,
    /// Octets of received DATAGRAM frames that wait for the application; zero refuses them.
    pub datagram_receive_buffer: usize,
    /// Octets of DATAGRAM frames that wait to be sent.
    pub datagram_send_buffer: usize,
    /// Packets after which keys are updated; `None` leaves it to the limit of the cipher.
    pub key_update_after: Option<u64>,
    /// Whether to mark packets ECT(0).
    pub ecn: bool,
    /// Whether the TLS session is kept after the handshake, at about 3 KiB per connection, so that
    /// keying material can be exported. Servers release it when the handshake completes, clients
    /// when tickets had the time to arrive.
    pub keep_tls_session: bool,
    /// Whether a client moves to the preferred address of a server that has one.
    pub follow_preferred_address: bool,
    /// Who is told what happens on connections.
    pub observers: Option<Observers>,
}

impl Default for TransportConfig {
    fn default() -> Self {
        Self {
            streams: StreamLimits::default(),
            send_memory: SendMemory::default(),
            // Below the two minutes after which RFC 4787 lets NATs forget, and the usual choice.
            idle_timeout: Duration::from_secs(30),
            keep_alive: None,
            // Twice the idle timeout: enough for a path that loses every third packet, and an end
            // for peers that keep a handshake alive without completing it.
            handshake_timeout: Duration::from_secs(60),
            congestion: Algorithm::default(),
            // What fits an Ethernet frame over IPv6.
            max_udp_payload: 1452,
            initial_rtt: INITIAL_RTT,
            datagram_receive_buffer: 256 * 1024,
            datagram_send_buffer: 256 * 1024,
            key_update_after: None,
            ecn: true,
            // Few applications export keys, and all have idle connections.
            keep_tls_session: false,
            // A client SHOULD, by section 9.6.1 of RFC 9000.
            follow_preferred_address: true,
            observers: None,
        }
    }
}

impl TransportConfig {
    pub(crate) fn path_defaults(&self) -> PathDefaults {
        PathDefaults {
            initial_rtt: self.initial_rtt,
            congestion: self.congestion,
            mtu_ceiling: self.max_udp_payload.max(MIN_UDP_PAYLOAD),
            ecn: self.ecn,
        }
    }
}

/// What a client connects with.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// TLS: trust anchors, ALPN, a session store.
    pub tls: Arc<rustls::ClientConfig>,
    /// Everything else.
    pub transport: Arc<TransportConfig>,
    /// The version of the first flight. One TLS configuration serves one version, since tickets
    /// are not bound to it (RFC 9369, section 5).
    pub version: Version,
}

impl ClientConfig {
    /// Version 1 with default transport settings.
    #[must_use]
    pub fn new(tls: Arc<rustls::ClientConfig>) -> Self {
        Self { tls, transport: Arc::default(), version: Version::V1 }
    }
}

/// What a server accepts with.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// TLS: certificate, ALPN, tickets.
    pub tls: Arc<rustls::ServerConfig>,
    /// Everything else.
    pub transport: Arc<TransportConfig>,
    /// When clients have to prove their address by a Retry.
    pub retry: RetryPolicy,
    /// Connections that may be in their handshake at once; beyond it Initials are dropped.
    pub max_half_open: usize,
    /// Connections at once; beyond it new ones are refused.
    pub max_connections: usize,
    /// Where clients should go after the handshake, which has to lead to the same endpoint. Not
    /// sent with connection IDs that are not routable, since there is only one of them.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-9.6>
    pub preferred_address: Option<PreferredAddress>,
}

impl ServerConfig {
    /// Default transport settings, and a Retry only under load.
    #[must_use]
    pub fn new(tls: Arc<rustls::ServerConfig>) -> Self {
        Self {
            tls,
            transport: Arc::default(),
            // A Retry costs clients a round trip; below this, handshakes cost us little memory.
            retry: RetryPolicy::AboveHalfOpen(1000),
            max_half_open: 10_000,
            max_connections: 100_000,
            preferred_address: None,
        }
    }
}

/// When a server asks for a Retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetryPolicy {
    /// Never; also what a server behind a balancer with Retry offload uses.
    Never,
    /// For every client without a valid token.
    Always,
    /// While more than so many handshakes are in progress.
    AboveHalfOpen(usize),
}
