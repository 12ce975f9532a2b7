//! Connection IDs we gave to the peer.

use std::collections::VecDeque;

use super::super::error::TransportError;
use crate::connection_id::ConnectionId;

/// Connection IDs given out at once at most, whatever the peer would take.
const MAX_ISSUED: u64 = 8;
/// Connection IDs alive at once, those asked back included. A peer that never retires what it is
/// asked to retire gets no new ones beyond this.
const MAX_ALIVE: usize = 32;

/// The state of what we gave out.
#[derive(Debug)]
pub(crate) struct Local {
    /// Alive ones, by ascending sequence number.
    issued: VecDeque<Issued>,
    next_sequence: u64,
    retire_prior_to: u64,
    /// How many the peer keeps, within our own bound.
    limit: u64,
}

/// One connection ID and its number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Issued {
    pub(crate) sequence: u64,
    pub(crate) id: ConnectionId,
    pub(crate) reset_token: [u8; 16],
}

impl Local {
    /// Starts with the connection ID of the handshake, whose number is 0.
    pub(crate) fn new(id: ConnectionId, reset_token: [u8; 16]) -> Self {
        let issued = VecDeque::from([Issued { sequence: 0, id, reset_token }]);
        Self { issued, next_sequence: 1, retire_prior_to: 0, limit: 1 }
    }

    /// Learns the peer's active_connection_id_limit.
    pub(crate) fn set_limit(&mut self, limit: u64) {
        self.limit = limit.min(MAX_ISSUED);
    }

    /// How many connection IDs should be issued now.
    pub(crate) fn wanted(&self) -> u64 {
        let active = self.issued.iter().filter(|issued| issued.sequence >= self.retire_prior_to);
        let room = MAX_ALIVE.saturating_sub(self.issued.len()) as u64;
        self.limit.saturating_sub(active.count() as u64).min(room)
    }

    /// Adds a connection ID; it has to be announced.
    pub(crate) fn issue(&mut self, id: ConnectionId, reset_token: [u8; 16]) -> u64 {
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        self.issued.push_back(Issued { sequence, id, reset_token });
        sequence
    }

    /// Asks for all of them back: new ones are wanted in their place.
    pub(crate) fn retire_all(&mut self) {
        self.retire_prior_to = self.next_sequence;
    }

    /// The peer retires `sequence`; `used` is the connection ID of the packet that says so.
    ///
    /// # Errors
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-19.16>
    pub(crate) fn on_retired(
        &mut self,
        sequence: u64,
        used: &ConnectionId,
    ) -> Result<Option<ConnectionId>, TransportError> {
        if sequence >= self.next_sequence {
            return Err(TransportError::protocol_violation(
                "a connection ID was retired that was never issued",
            ));
        }
        let Ok(at) = self.issued.binary_search_by_key(&sequence, |issued| issued.sequence) else {
            return Ok(None);
        };
        if self.issued[at].id == *used {
            return Err(TransportError::protocol_violation(
                "a connection ID was retired by a packet sent to it",
            ));
        }
        Ok(self.issued.remove(at).map(|issued| issued.id))
    }

    /// The connection ID with this number, if alive.
    pub(crate) fn get(&self, sequence: u64) -> Option<&Issued> {
        let at = self.issued.binary_search_by_key(&sequence, |issued| issued.sequence).ok()?;
        self.issued.get(at)
    }

    pub(crate) const fn retire_prior_to(&self) -> u64 {
        self.retire_prior_to
    }

    /// All that are alive.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Issued> {
        self.issued.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(octet: u8) -> ConnectionId {
        ConnectionId::new(&[octet; 8]).unwrap()
    }

    fn issue_wanted(local: &mut Local) {
        for _ in 0..local.wanted() {
            #[expect(clippy::cast_possible_truncation, reason = "a test")]
            let octet = local.next_sequence as u8;
            local.issue(id(octet), [octet; 16]);
        }
    }

    #[test]
    fn req_b02_no_more_are_issued_than_the_peer_keeps() {
        let mut local = Local::new(id(0), [0; 16]);
        assert_eq!(local.wanted(), 0);
        local.set_limit(3);
        issue_wanted(&mut local);
        assert_eq!((local.issued.len(), local.wanted()), (3, 0));
        local.set_limit(1_000_000);
        issue_wanted(&mut local);
        assert_eq!(local.issued.len() as u64, MAX_ISSUED);
    }

    #[test]
    fn req_b03_a_retired_one_is_replaced() {
        let mut local = Local::new(id(0), [0; 16]);
        local.set_limit(2);
        issue_wanted(&mut local);
        assert_eq!(local.on_retired(0, &id(1)), Ok(Some(id(0))));
        assert_eq!(local.wanted(), 1);
        assert_eq!(local.on_retired(0, &id(1)), Ok(None));
    }

    #[test]
    fn req_b08_unissued_numbers_and_the_one_in_use_cannot_be_retired() {
        let mut local = Local::new(id(0), [0; 16]);
        assert!(local.on_retired(1, &id(0)).is_err());
        assert!(local.on_retired(0, &id(0)).is_err());
    }

    #[test]
    fn req_m09_a_rotation_asks_all_back_and_wants_new_ones_without_end_of_memory() {
        let mut local = Local::new(id(0), [0; 16]);
        local.set_limit(4);
        issue_wanted(&mut local);
        local.retire_all();
        assert_eq!(local.wanted(), 4);
        issue_wanted(&mut local);
        assert_eq!((local.retire_prior_to(), local.issued.len()), (4, 8));
        for _ in 0..1000 {
            local.retire_all();
            issue_wanted(&mut local);
        }
        assert!(local.issued.len() <= MAX_ALIVE);
    }
}
