//! The keys of 1-RTT packets: both phases, the update between them, and the limits of the cipher.
//!
//! <https://www.rfc-editor.org/rfc/rfc9001.html#section-6>

use std::time::Instant;

use super::{
    error::{Code, TransportError},
    packet::{DropReason, Unprotected, open},
    tls::{DirectionalKeys, HeaderProtectionKey, Keys, PacketKey, PacketKeySet, Secrets},
};

/// How many packets before the confidentiality limit an update is due.
const UPDATE_MARGIN: u64 = 1 << 16;

/// Keys of the current phase, the next one, and for a while the previous one.
pub(crate) struct OneRttKeys {
    local: DirectionalKeys,
    remote: DirectionalKeys,
    secrets: Secrets,
    /// Derived ahead, so that a flipped phase bit costs no time an observer could measure.
    next: PacketKeySet,
    previous: Option<Previous>,
    phase: bool,
    /// Whether the peer acknowledged a packet of the current phase. The very first phase counts as
    /// acknowledged: there the handshake has to be confirmed instead.
    confirmed: bool,
    /// The first packet we sent in the current phase.
    first_sent: Option<u64>,
    /// The first packet received in the current phase that showed the peer uses it.
    first_received: Option<u64>,
    /// Whether we acknowledged such a packet in the current phase.
    acknowledged: bool,
    sealed: u64,
    failed: u64,
    update_after: u64,
}

struct Previous {
    key: Box<dyn PacketKey>,
    /// Set when the peer has followed: then the old key goes at this time.
    discard_at: Option<Instant>,
}

/// A packet that opened, and what it means for the phase.
pub(crate) struct Opened<'a> {
    pub(crate) payload: &'a [u8],
    /// The peer has moved to the next phase with this packet: [`OneRttKeys::follow`] is due.
    pub(crate) next_phase: bool,
}

/// Which key a packet's number and phase bit point at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    Previous,
    Current,
    Next,
}

impl OneRttKeys {
    /// `update_after` is the most packets to seal before an update; the cipher's own limit counts
    /// anyhow.
    pub(crate) fn new(keys: Keys, mut secrets: Secrets, update_after: Option<u64>) -> Self {
        let limit = keys.local.packet.confidentiality_limit().saturating_sub(UPDATE_MARGIN);
        let next = secrets.next_packet_keys();
        Self {
            local: keys.local,
            remote: keys.remote,
            secrets,
            next,
            previous: None,
            phase: false,
            confirmed: true,
            first_sent: None,
            first_received: None,
            acknowledged: true,
            sealed: 0,
            failed: 0,
            update_after: update_after.map_or(limit, |after| after.min(limit)),
        }
    }

    pub(crate) fn remote_header(&self) -> &dyn HeaderProtectionKey {
        &*self.remote.header
    }

    /// Opens `packet`, choosing the key by phase bit and number.
    pub(crate) fn open<'a>(
        &mut self,
        unprotected: &Unprotected,
        packet: &'a mut [u8],
    ) -> Result<Opened<'a>, DropReason> {
        let which = self.which(unprotected);
        let key = match which {
            Which::Previous => &self.previous.as_ref().ok_or(DropReason::NoKeys)?.key,
            Which::Current => &self.remote.packet,
            Which::Next => &self.next.remote,
        };
        match open(&**key, unprotected, packet) {
            Ok(payload) => Ok(Opened { payload, next_phase: which == Which::Next }),
            Err(reason) => {
                self.failed += 1;
                Err(reason)
            }
        }
    }

    fn which(&self, unprotected: &Unprotected) -> Which {
        if unprotected.key_phase == self.phase {
            return Which::Current;
        }
        // Before the peer has followed our update, the other phase is still the previous one.
        // "packets with lower packet numbers than [the first of the new phase] use the old keys"
        // https://www.rfc-editor.org/rfc/rfc9001.html#section-6.5
        let older = self.first_received.is_none_or(|first| unprotected.number < first);
        if self.previous.is_some() && older { Which::Previous } else { Which::Next }
    }

    /// Notes that packet `number` of the current phase arrived.
    pub(crate) fn on_received(&mut self, number: u64, phase: bool, discard_previous_at: Instant) {
        if phase != self.phase {
            return;
        }
        if let Some(previous) = &mut self.previous {
            previous.discard_at.get_or_insert(discard_previous_at);
        }
        match &mut self.first_received {
            Some(first) => *first = (*first).min(number),
            None => self.first_received = Some(number),
        }
    }

    /// Follows the peer into the next phase, which packet `number` opened.
    ///
    /// # Errors
    ///
    /// KEY_UPDATE_ERROR when the peer updates again before it can know that we have followed its
    /// last update.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9001.html#section-6.2>
    pub(crate) fn follow(
        &mut self,
        number: u64,
        discard_previous_at: Instant,
    ) -> Result<(), TransportError> {
        if !self.acknowledged {
            return Err(TransportError::new(
                Code::KEY_UPDATE_ERROR,
                "keys were updated twice without awaiting an acknowledgment",
            ));
        }
        self.advance(Some(discard_previous_at));
        self.first_received = Some(number);
        Ok(())
    }

    /// Whether we may start an update: none is underway.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9001.html#section-6.1>
    pub(crate) fn may_update(&self) -> bool {
        self.confirmed && self.previous.is_none()
    }

    /// Whether an update is due because of the number of packets sealed.
    pub(crate) fn wants_update(&self) -> bool {
        self.sealed >= self.update_after
    }

    /// Starts an update.
    pub(crate) fn update(&mut self) {
        self.advance(None);
        self.first_received = None;
    }

    fn advance(&mut self, discard_previous_at: Option<Instant>) {
        let after = self.secrets.next_packet_keys();
        let next = std::mem::replace(&mut self.next, after);
        self.local.packet = next.local;
        let key = std::mem::replace(&mut self.remote.packet, next.remote);
        self.previous = Some(Previous { key, discard_at: discard_previous_at });
        self.phase = !self.phase;
        self.confirmed = false;
        self.acknowledged = false;
        self.first_sent = None;
        self.sealed = 0;
    }

    /// The keys, for one packet to seal, and its phase.
    pub(crate) fn seal_with(&mut self, number: u64) -> &DirectionalKeys {
        self.sealed += 1;
        self.first_sent.get_or_insert(number);
        &self.local
    }

    pub(crate) const fn phase(&self) -> bool {
        self.phase
    }

    /// Notes that an ACK frame which covers `largest` was sent in the current phase.
    pub(crate) fn on_ack_sent(&mut self, largest: u64) {
        if self.first_received.is_some_and(|first| largest >= first) {
            self.acknowledged = true;
        }
    }

    /// Notes that the peer acknowledged packet `number`.
    pub(crate) fn on_acked(&mut self, number: u64) {
        if self.first_sent.is_some_and(|first| number >= first) {
            self.confirmed = true;
        }
    }

    pub(crate) fn discard_at(&self) -> Option<Instant> {
        self.previous.as_ref().and_then(|previous| previous.discard_at)
    }

    /// Drops the previous key when its time has come.
    pub(crate) fn handle_deadline(&mut self, now: Instant) {
        if self.discard_at().is_some_and(|at| at <= now) {
            self.previous = None;
        }
    }

    /// Leaves `count` failures until the integrity limit.
    #[cfg(test)]
    pub(crate) fn set_failures_left(&mut self, count: u64) {
        self.failed = self.remote.packet.integrity_limit() - count;
    }

    /// Whether a limit of the cipher is reached and the connection has to end.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9001.html#section-6.6>
    pub(crate) fn is_exhausted(&self) -> bool {
        self.failed >= self.remote.packet.integrity_limit()
            || self.sealed >= self.local.packet.confidentiality_limit()
    }
}
