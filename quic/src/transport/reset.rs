//! Stateless resets: the tokens, and the datagrams that carry them.
//!
//! <https://www.rfc-editor.org/rfc/rfc9000.html#section-10.3>

use zeroize::{Zeroize, Zeroizing};

use super::tls;
use crate::{connection_id::ConnectionId, random::Random};

/// The shortest datagram that may be a stateless reset.
const MIN_LEN: usize = 21;
/// A trigger at least this long gets an answer of one octet less than this, which is long enough
/// not to be told from a short-header packet with a connection ID of full length.
const FULL_TRIGGER_LEN: usize = 43;

/// The secret that stateless-reset tokens are derived from: one per config ID, shared by whoever
/// may answer for the same server. Its octets are never printed, and end with it.
#[derive(Clone, PartialEq, Eq)]
pub struct ResetKey([u8; 32]);

impl ResetKey {
    /// A key of these octets.
    #[must_use]
    pub const fn new(octets: [u8; 32]) -> Self {
        Self(octets)
    }

    /// The key that `who` derives from a secret of several servers. Nobody can compute another's from it.
    ///
    /// Servers that share a secret need keys that differ: whoever is sent a datagram of another server's connection would else give
    /// away the token that ends it (<https://www.rfc-editor.org/rfc/rfc9000.html#section-21.11>).
    #[must_use]
    pub fn derived(secret: &[u8; 16], who: &[&[u8]]) -> Self {
        let mut message = b"quic-lb stateless reset".to_vec();
        for part in who {
            message.extend_from_slice(&(part.len() as u64).to_be_bytes());
            message.extend_from_slice(part);
        }
        let mut key = Zeroizing::new([0; 32]);
        key[..16].copy_from_slice(secret);
        Self(tls::hmac_sha256(&key, &message))
    }

    /// The token of a connection ID.
    #[must_use]
    pub fn token(&self, id: &ConnectionId) -> [u8; 16] {
        let mut token = [0; 16];
        token.copy_from_slice(&tls::hmac_sha256(&self.0, id)[..16]);
        token
    }
}

impl Drop for ResetKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl std::fmt::Debug for ResetKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ResetKey(masked)")
    }
}

/// Appends a stateless reset in answer to a datagram of `trigger_len` octets. Returns whether one
/// is due: an answer is always shorter than its trigger, so that two endpoints without state fall
/// silent.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-10.3.3>
pub(crate) fn write(
    token: &[u8; 16],
    trigger_len: usize,
    random: &mut Random,
    out: &mut Vec<u8>,
) -> bool {
    let len = trigger_len.min(FULL_TRIGGER_LEN).saturating_sub(1);
    if len < MIN_LEN {
        return false;
    }
    let start = out.len();
    out.resize(start + len, 0);
    random.fill(&mut out[start..]);
    // A short header with the fixed bit.
    out[start] = out[start] & 0x3f | 0x40;
    out[start + len - 16..].copy_from_slice(token);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn req_b13_b16_a_chain_of_resets_dies_out() {
        let mut random = Random::new([1; 32]);
        let (mut len, mut answers) = (1200, 0);
        loop {
            let mut out = Vec::new();
            if !write(&[7; 16], len, &mut random, &mut out) {
                break;
            }
            assert!(out.len() < len && out.len() >= MIN_LEN);
            assert_eq!(out[0] & 0xc0, 0x40);
            assert!(out.ends_with(&[7; 16]));
            len = out.len();
            answers += 1;
        }
        assert_eq!(answers, 22);
    }

    #[test]
    fn keys_of_one_secret_differ_by_whom_they_are_of() {
        let of = |who: &[&[u8]]| ResetKey::derived(&[1; 16], who);
        assert!(of(&[b"web", b"a", &[0]]) == of(&[b"web", b"a", &[0]]));
        for other in
            [&[&b"web"[..], b"b", &[0]][..], &[b"web", b"a", &[1]], &[b"we", b"ba", &[0]], &[]]
        {
            assert!(of(&[b"web", b"a", &[0]]) != of(other), "{other:?}");
        }
        assert!(of(&[]) != ResetKey::derived(&[2; 16], &[]));
    }

    #[test]
    fn req_b15_tokens_depend_on_key_and_connection_id() {
        let id = |octet| ConnectionId::new(&[octet; 8]).unwrap();
        let (one, two) = (ResetKey::new([1; 32]), ResetKey::new([2; 32]));
        assert_eq!(one.token(&id(1)), one.token(&id(1)));
        assert_ne!(one.token(&id(1)), one.token(&id(2)));
        assert_ne!(one.token(&id(1)), two.token(&id(1)));
    }
}
