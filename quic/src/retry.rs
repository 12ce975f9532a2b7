//! Retry packets of versions 1 and 2: written by whoever wants a client to prove its address,
//! verified by clients.
//!
//! <https://www.rfc-editor.org/rfc/rfc9000.html#section-17.2.5> and, for the integrity tag,
//! <https://www.rfc-editor.org/rfc/rfc9001.html#section-5.8>. Writing needs no memory but the
//! caller's buffer.

use aes_gcm::{Aes128Gcm, KeyInit, Tag, aead::AeadInOut};

use crate::{
    connection_id::ConnectionId,
    header::{LongType, Version},
};

/// Octets of the integrity tag.
pub const TAG_LEN: usize = 16;

/// The longest token that [`write`] takes: longer than any of [`crate::token`], and short enough
/// for a Retry to be smaller than the Initial it answers.
pub const MAX_TOKEN_LEN: usize = 256;

/// The most octets that [`write`] needs.
pub const MAX_LEN: usize = 1 + 4 + 2 * (1 + 20) + MAX_TOKEN_LEN + TAG_LEN;

/// A Retry packet in a form that can be written.
#[derive(Clone, Copy, Debug)]
pub struct Retry<'a> {
    /// The version of the Initial that it answers.
    pub version: Version,
    /// The source connection ID of the Initial.
    pub dcid: &'a [u8],
    /// A connection ID that the client uses from now on; it has to differ from `original_dcid`
    /// (section 17.2.5.1).
    pub scid: &'a ConnectionId,
    /// The destination connection ID of the Initial.
    pub original_dcid: &'a [u8],
    /// What the client shows with its next Initial; not empty.
    pub token: &'a [u8],
}

impl Retry<'_> {
    /// Writes the packet to the front of `out` and returns its length. `None` when `out` is too
    /// short, the token is empty or too long, or a connection ID has more than 20 octets.
    ///
    /// `unused` fills the four bits that nobody reads and that should be random.
    #[must_use]
    pub fn write(&self, unused: u8, out: &mut [u8]) -> Option<usize> {
        let fits = (1..=MAX_TOKEN_LEN).contains(&self.token.len())
            && self.dcid.len() <= 20
            && self.original_dcid.len() <= 20;
        if !fits {
            return None;
        }
        // The tag covers the original connection ID in front of the packet.
        let mut scratch = [0u8; 1 + 20 + MAX_LEN];
        let mut writer = Writer { out: &mut scratch, len: 0 };
        writer.prefixed(self.original_dcid);
        let start = writer.len;
        let kind = LongType::Retry.to_first_octet(self.version);
        writer.put(&[0xc0 | kind | (unused & 0x0f)]);
        writer.put(&self.version.to_wire().to_be_bytes());
        writer.prefixed(self.dcid);
        writer.prefixed(self.scid);
        writer.put(self.token);
        let end = writer.len;
        let tag = tag(self.version, &scratch[..end]);
        let len = end - start + TAG_LEN;
        let out = out.get_mut(..len)?;
        out[..end - start].copy_from_slice(&scratch[start..end]);
        out[end - start..].copy_from_slice(&tag);
        Some(len)
    }
}

/// Whether `packet`, a whole Retry packet, carries the tag of somebody who saw the Initial with
/// `original_dcid`.
#[must_use]
pub fn verify(version: Version, original_dcid: &[u8], packet: &[u8]) -> bool {
    let Ok(len) = u8::try_from(original_dcid.len()) else { return false };
    let Some((packet, claimed)) = packet.split_last_chunk::<TAG_LEN>() else { return false };
    let mut covered = Vec::with_capacity(1 + original_dcid.len() + packet.len());
    covered.push(len);
    covered.extend_from_slice(original_dcid);
    covered.extend_from_slice(packet);
    // The keys are public: comparing in constant time would protect nothing.
    tag(version, &covered) == *claimed
}

/// The tag of `packet`, which lacks it, whatever else is wrong with it.
#[cfg(all(test, feature = "transport"))]
pub(crate) fn tag_of(version: Version, original_dcid: &[u8], packet: &[u8]) -> [u8; TAG_LEN] {
    let len = u8::try_from(original_dcid.len()).unwrap_or_default();
    tag(version, &[&[len], original_dcid, packet].concat())
}

fn tag(version: Version, covered: &[u8]) -> [u8; TAG_LEN] {
    // https://www.rfc-editor.org/rfc/rfc9001.html#section-5.8
    // https://www.rfc-editor.org/rfc/rfc9369.html#section-3.3.3
    let (key, nonce): ([u8; 16], [u8; 12]) = match version {
        Version::V1 => (
            0xbe0c_690b_9f66_575a_1d76_6b54_e368_c84e_u128.to_be_bytes(),
            [0x46, 0x15, 0x99, 0xd3, 0x5d, 0x63, 0x2b, 0xf2, 0x23, 0x98, 0x25, 0xbb],
        ),
        Version::V2 => (
            0x8fb4_b01b_56ac_48e2_60fb_cbce_ad7c_cc92_u128.to_be_bytes(),
            [0xd8, 0x69, 0x69, 0xbc, 0x2d, 0x7c, 0x6d, 0x99, 0x90, 0xef, 0xb0, 0x4a],
        ),
    };
    let tag: Tag = Aes128Gcm::new(&key.into())
        .encrypt_inout_detached(&nonce.into(), covered, (&mut [][..]).into())
        .expect("a packet is shorter than AES-GCM can cover");
    tag.into()
}

struct Writer<'a> {
    out: &'a mut [u8],
    len: usize,
}

impl Writer<'_> {
    fn put(&mut self, octets: &[u8]) {
        self.out[self.len..self.len + octets.len()].copy_from_slice(octets);
        self.len += octets.len();
    }

    fn prefixed(&mut self, id: &[u8]) {
        #[expect(clippy::cast_possible_truncation, reason = "at most 20, checked before")]
        self.put(&[id.len() as u8]);
        self.put(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORIGINAL_DCID: [u8; 8] = [0x83, 0x94, 0xc8, 0xf0, 0x3e, 0x51, 0x57, 0x08];

    /// RFC 9001, appendix A.4, and RFC 9369, appendix A.4: the same packet in both versions.
    const VECTORS: [(Version, u128); 2] = [
        (Version::V1, 0x04a2_65ba_2eff_4d82_9058_fb3f_0f24_96ba),
        (Version::V2, 0xc864_6ce8_bfe3_3952_d955_5436_65dc_c7b6),
    ];

    fn published(version: Version, tag: u128) -> Vec<u8> {
        let first = 0xcf | LongType::Retry.to_first_octet(version);
        let mut packet = vec![first];
        packet.extend(version.to_wire().to_be_bytes());
        packet.extend([0, 8, 0xf0, 0x67, 0xa5, 0x50, 0x2a, 0x42, 0x62, 0xb5]);
        packet.extend(b"token");
        packet.extend(tag.to_be_bytes());
        packet
    }

    #[test]
    fn req_c28_published_retry_packets_are_written_and_verified() {
        for (version, tag) in VECTORS {
            let expected = published(version, tag);
            let scid = ConnectionId::new(&expected[7..15]).unwrap();
            let retry = Retry {
                version,
                dcid: &[],
                scid: &scid,
                original_dcid: &ORIGINAL_DCID,
                token: b"token",
            };
            let mut out = [0; MAX_LEN];
            let len = retry.write(0x0f, &mut out).unwrap();
            assert_eq!(out[..len], expected);
            assert!(verify(version, &ORIGINAL_DCID, &expected));
        }
    }

    #[test]
    fn req_a17_a_flipped_bit_or_another_original_dcid_is_refused() {
        for (version, tag) in VECTORS {
            let packet = published(version, tag);
            for at in 0..packet.len() {
                let mut flipped = packet.clone();
                flipped[at] ^= 1;
                assert!(!verify(version, &ORIGINAL_DCID, &flipped));
            }
            assert!(!verify(version, &ORIGINAL_DCID[..7], &packet));
            assert!(!verify(version, &ORIGINAL_DCID, &packet[..15]));
        }
    }

    #[test]
    fn what_does_not_fit_is_not_written() {
        let scid = ConnectionId::new(&[1; 20]).unwrap();
        let retry = |dcid, token| Retry {
            version: Version::V1,
            dcid,
            scid: &scid,
            original_dcid: &[2; 20],
            token,
        };
        let mut out = [0; MAX_LEN];
        assert_eq!(retry(&[3; 20], &[4; MAX_TOKEN_LEN]).write(0, &mut out), Some(MAX_LEN));
        assert_eq!(retry(&[3; 20], &[4; MAX_TOKEN_LEN + 1]).write(0, &mut out), None);
        assert_eq!(retry(&[3; 21], &[4; 8]).write(0, &mut out), None);
        assert_eq!(retry(&[3; 20], &[]).write(0, &mut out), None);
        assert_eq!(retry(&[3; 20], &[4; 8]).write(0, &mut out[..60]), None);
    }
}
