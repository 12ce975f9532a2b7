//! Connection IDs the peer gave to us, and which of them each path uses.

use std::collections::VecDeque;

use super::{
    super::{
        error::{Code, TransportError},
        frame::NewConnectionId,
        ranges::RangeSet,
    },
    ACTIVE_LIMIT,
};
use crate::connection_id::ConnectionId;

/// RETIRE_CONNECTION_ID frames that may wait or be unacknowledged at once.
///
/// "An endpoint SHOULD limit the number of connection IDs it has retired locally for which
/// RETIRE_CONNECTION_ID frames have not yet been acknowledged. An endpoint SHOULD allow for sending
/// and tracking a number of RETIRE_CONNECTION_ID frames of at least twice the value of the
/// active_connection_id_limit".
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-5.1.2>
const MAX_RETIRING: u64 = 8 * ACTIVE_LIMIT;

/// One connection ID of the peer's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RemoteCid {
    pub(crate) sequence: u64,
    pub(crate) id: ConnectionId,
    pub(crate) reset_token: Option<[u8; 16]>,
    /// Whether a packet was ever sent to it.
    used: bool,
}

/// The state of what we were given.
#[derive(Debug)]
pub(crate) struct Remote {
    /// By ascending sequence number, at most [`ACTIVE_LIMIT`].
    active: Vec<RemoteCid>,
    retire_prior_to: u64,
    /// Numbers to retire, not announced yet.
    to_retire: VecDeque<u64>,
    /// Announced, not acknowledged.
    retiring: Vec<u64>,
    /// Numbers received from `retire_prior_to` on: what was retired does not come back.
    seen: RangeSet,
}

impl Remote {
    /// Starts with the connection ID the peer chose in the handshake, whose number is 0.
    pub(crate) fn new(id: ConnectionId) -> Self {
        Self {
            active: vec![RemoteCid { sequence: 0, id, reset_token: None, used: true }],
            retire_prior_to: 0,
            to_retire: VecDeque::new(),
            retiring: Vec::new(),
            seen: RangeSet::default(),
        }
    }

    /// Replaces the connection ID of the handshake: the peer has chosen another one by now.
    pub(crate) fn set_initial(&mut self, id: ConnectionId) {
        self.active = vec![RemoteCid { sequence: 0, id, reset_token: None, used: true }];
    }

    /// The server's parameters give the token that belongs to number 0.
    pub(crate) fn set_initial_token(&mut self, token: [u8; 16]) {
        if let Some(first) = self.active.iter_mut().find(|cid| cid.sequence == 0) {
            first.reset_token = Some(token);
        }
    }

    /// Takes a NEW_CONNECTION_ID frame.
    ///
    /// # Errors
    ///
    /// For what sections 5.1.1, 5.1.2 and 19.15 of RFC 9000 forbid.
    pub(crate) fn on_new(&mut self, new: &NewConnectionId) -> Result<(), TransportError> {
        // "An endpoint that is sending packets with a zero-length Destination Connection ID MUST
        // treat receipt of a NEW_CONNECTION_ID frame as a connection error of type
        // PROTOCOL_VIOLATION." https://www.rfc-editor.org/rfc/rfc9000.html#section-19.15
        if self.active.iter().any(|cid| cid.id.is_empty()) {
            return Err(TransportError::protocol_violation(
                "a new connection ID from a peer whose connection IDs are empty",
            ));
        }
        let differs = self.active.iter().any(|cid| {
            let same_number = cid.sequence == new.sequence;
            let same_token = cid.reset_token == Some(new.reset_token) || cid.sequence == 0;
            (same_number != (cid.id == new.id)) || (same_number && !same_token)
        });
        if differs {
            return Err(TransportError::protocol_violation(
                "a connection ID was issued with two numbers, or a number with two connection IDs",
            ));
        }
        if new.retire_prior_to > self.retire_prior_to {
            self.retire_prior_to = new.retire_prior_to;
            self.seen.remove(0..new.retire_prior_to);
            let (old, kept) = std::mem::take(&mut self.active)
                .into_iter()
                .partition(|cid: &RemoteCid| cid.sequence < new.retire_prior_to);
            self.active = kept;
            for cid in old {
                self.retire_number(cid.sequence)?;
            }
        }
        if new.sequence < self.retire_prior_to {
            return self.retire_number(new.sequence);
        }
        if !self.seen.insert(new.sequence..new.sequence + 1) {
            return Ok(());
        }
        let at = self.active.partition_point(|cid| cid.sequence < new.sequence);
        self.active.insert(
            at,
            RemoteCid {
                sequence: new.sequence,
                id: new.id,
                reset_token: Some(new.reset_token),
                used: false,
            },
        );
        if self.active.len() as u64 > ACTIVE_LIMIT {
            return Err(TransportError::new(
                Code::CONNECTION_ID_LIMIT_ERROR,
                "more connection IDs than our limit",
            ));
        }
        Ok(())
    }

    /// Takes one that no path has used, for a new path or in place of one that was retired.
    pub(crate) fn take_unused(&mut self) -> Option<RemoteCid> {
        let fresh = self.active.iter_mut().find(|cid| !cid.used)?;
        fresh.used = true;
        Some(*fresh)
    }

    /// Takes the one with this number, if no path has used it.
    pub(crate) fn take(&mut self, sequence: u64) -> Option<RemoteCid> {
        let fresh = self.active.iter_mut().find(|cid| cid.sequence == sequence && !cid.used)?;
        fresh.used = true;
        Some(*fresh)
    }

    /// All that may be used.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &RemoteCid> {
        self.active.iter()
    }

    /// Any that may be used.
    pub(crate) fn any(&self) -> Option<&RemoteCid> {
        self.active.first()
    }

    /// The one with this number, while it may be used.
    pub(crate) fn get(&self, sequence: u64) -> Option<&RemoteCid> {
        self.active.iter().find(|cid| cid.sequence == sequence)
    }

    /// Gives up the one with this number.
    pub(crate) fn retire(&mut self, sequence: u64) {
        if let Some(at) = self.active.iter().position(|cid| cid.sequence == sequence) {
            self.active.remove(at);
            // We retire what we took ourselves; that stays below the bound by itself.
            let _ = self.retire_number(sequence);
        }
    }

    /// The next number to announce as retired.
    pub(crate) fn poll_retire(&mut self) -> Option<u64> {
        let sequence = self.to_retire.pop_front()?;
        self.retiring.push(sequence);
        Some(sequence)
    }

    pub(crate) fn has_retirements(&self) -> bool {
        !self.to_retire.is_empty()
    }

    pub(crate) fn on_retire_acked(&mut self, sequence: u64) {
        self.retiring.retain(|&retiring| retiring != sequence);
    }

    pub(crate) fn on_retire_lost(&mut self, sequence: u64) {
        if let Some(at) = self.retiring.iter().position(|&retiring| retiring == sequence) {
            self.retiring.swap_remove(at);
            self.to_retire.push_back(sequence);
        }
    }

    /// Whether `datagram` ends in the reset token of a connection ID in use. Takes the same time
    /// whichever octet differs.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-10.3.1>
    pub(crate) fn is_reset(&self, datagram: &[u8]) -> bool {
        let Some(tail) = datagram.last_chunk::<16>() else { return false };
        self.tokens().fold(false, |found, token| found | same(tail, &token))
    }

    /// Reset tokens of connection IDs that packets were sent to.
    pub(crate) fn tokens(&self) -> impl Iterator<Item = [u8; 16]> {
        self.active.iter().filter(|cid| cid.used).filter_map(|cid| cid.reset_token)
    }

    fn is_retiring(&self, sequence: u64) -> bool {
        self.to_retire.contains(&sequence) || self.retiring.contains(&sequence)
    }

    fn retire_number(&mut self, sequence: u64) -> Result<(), TransportError> {
        if self.is_retiring(sequence) {
            return Ok(());
        }
        if (self.to_retire.len() + self.retiring.len()) as u64 >= MAX_RETIRING {
            return Err(TransportError::new(
                Code::CONNECTION_ID_LIMIT_ERROR,
                "too many connection IDs to retire without acknowledgment",
            ));
        }
        self.to_retire.push_back(sequence);
        Ok(())
    }
}

fn same(left: &[u8; 16], right: &[u8; 16]) -> bool {
    let differing = left.iter().zip(right).fold(0, |all, (left, right)| all | (left ^ right));
    std::hint::black_box(differing) == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(sequence: u64, retire_prior_to: u64) -> NewConnectionId {
        let octets = sequence.to_be_bytes();
        NewConnectionId {
            sequence,
            retire_prior_to,
            id: ConnectionId::new(&octets).unwrap(),
            reset_token: [octets, octets].concat().try_into().unwrap(),
        }
    }

    fn remote() -> Remote {
        Remote::new(ConnectionId::new(&[0xff; 8]).unwrap())
    }

    #[test]
    fn req_b04_a_number_stands_for_one_connection_id_and_one_token() {
        let mut remote = remote();
        assert_eq!(remote.on_new(&frame(1, 0)), Ok(()));
        assert_eq!(remote.on_new(&frame(1, 0)), Ok(()), "a repeated frame is harmless");
        for bad in [
            NewConnectionId { id: ConnectionId::new(&[9; 8]).unwrap(), ..frame(1, 0) },
            NewConnectionId { reset_token: [9; 16], ..frame(1, 0) },
            NewConnectionId { sequence: 2, ..frame(1, 0) },
        ] {
            assert_eq!(remote.on_new(&bad).unwrap_err().code, Code::PROTOCOL_VIOLATION);
        }
        let mut empty = Remote::new(ConnectionId::default());
        assert_eq!(empty.on_new(&frame(1, 0)).unwrap_err().code, Code::PROTOCOL_VIOLATION);
    }

    #[test]
    fn req_b05_retire_prior_to_acts_at_once_and_on_late_frames() {
        let mut remote = remote();
        remote.on_new(&frame(3, 3)).unwrap();
        assert!(remote.get(0).is_none() && remote.get(3).is_some());
        assert_eq!(remote.poll_retire(), Some(0));
        remote.on_new(&frame(1, 0)).unwrap();
        assert_eq!(remote.poll_retire(), Some(1));
        assert!(remote.get(1).is_none());
    }

    #[test]
    fn req_b06_more_than_our_limit_is_an_error() {
        let mut remote = remote();
        for sequence in 1..ACTIVE_LIMIT {
            remote.on_new(&frame(sequence, 0)).unwrap();
        }
        let error = remote.on_new(&frame(ACTIVE_LIMIT, 0)).unwrap_err();
        assert_eq!(error.code, Code::CONNECTION_ID_LIMIT_ERROR);
    }

    #[test]
    fn req_b07_retirements_without_acknowledgment_are_bounded() {
        let mut remote = remote();
        let mut error = None;
        for sequence in 1..1_000_000 {
            if let Err(found) = remote.on_new(&frame(sequence, sequence)) {
                error = Some((sequence, found.code));
                break;
            }
            remote.poll_retire();
        }
        assert_eq!(error, Some((MAX_RETIRING + 1, Code::CONNECTION_ID_LIMIT_ERROR)));
    }

    #[test]
    fn req_b14_only_tokens_of_connection_ids_in_use_reset() {
        let mut remote = remote();
        remote.on_new(&frame(1, 0)).unwrap();
        let datagram = [&[0x40; 10][..], &frame(1, 0).reset_token].concat();
        assert!(!remote.is_reset(&datagram));
        assert_eq!(remote.take_unused().map(|cid| cid.sequence), Some(1));
        assert!(remote.is_reset(&datagram));
        remote.retire(1);
        assert!(!remote.is_reset(&datagram));
        assert!(!remote.is_reset(&[1; 15]));
    }

    proptest! {
        #[test]
        fn any_sequence_of_frames_stays_bounded_and_never_panics(
            frames in proptest::collection::vec((0u64..30, 0u64..30, 0u8..4), 0..200)
        ) {
            let mut remote = remote();
            for (sequence, retire, then) in frames {
                if remote.on_new(&frame(sequence.max(retire), retire)).is_err() {
                    break;
                }
                match then {
                    0 => { remote.poll_retire(); }
                    1 => remote.on_retire_acked(sequence),
                    2 => remote.on_retire_lost(sequence),
                    _ => { remote.take_unused(); }
                }
                prop_assert!(remote.active.len() as u64 <= ACTIVE_LIMIT);
                prop_assert!((remote.to_retire.len() + remote.retiring.len()) as u64 <= MAX_RETIRING);
                prop_assert!(remote.active.iter().all(|cid| cid.sequence >= remote.retire_prior_to));
            }
        }
    }
}
