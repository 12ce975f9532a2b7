//! Initial packets of versions 1 and 2, and the refusal of a connection by one.
//!
//! Their keys are derived from a connection ID that everybody on the path sees
//! (<https://www.rfc-editor.org/rfc/rfc9001.html#section-5.2>). So their protection keeps no secret, but it tells what a
//! client sent from what was changed on the way or made up without knowledge of that connection ID. Nothing here needs a
//! connection, or memory but the caller's buffer. The transport has its own way with packets, for all their keys.

use aes::{
    Aes128Enc, Block,
    cipher::{BlockCipherEncrypt, KeyInit as _},
};
use aes_gcm::{Aes128Gcm, Tag, aead::AeadInOut as _};
use hkdf::Hkdf;
use sha2::Sha256;

use crate::{
    connection_id::{ConnectionId, MAX_LEN as MAX_CID_LEN},
    header::{Kind, LongType, Version},
    invariants::Packet,
    varint,
};

/// Octets that sealing adds.
const TAG_LEN: usize = 16;
/// Octets of a header-protection sample, and how far behind the start of the packet number it is.
const SAMPLE_LEN: usize = 16;
const SAMPLE_AT: usize = 4;

/// The longest datagram whose first packet is opened: more than a link to clients carries.
const MAX_OPENED: usize = 2048;

/// A frame of type 0x1c with a code and a frame type of one octet each, and a few words
/// (<https://www.rfc-editor.org/rfc/rfc9000.html#section-19.19>).
const CLOSE_LEN: usize = 4 + MAX_WORDS;
const MAX_WORDS: usize = 16;

/// Who sends a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// The client.
    Client,
    /// The server, or whoever answers for it.
    Server,
}

/// An Initial packet in a form that can be written: the first that its sender sends.
#[derive(Clone, Copy, Debug)]
pub struct Initial<'a> {
    /// The version.
    pub version: Version,
    /// Who sends it.
    pub sender: Sender,
    /// The connection ID that keys are derived from: the destination of the client's Initial.
    pub key_cid: &'a [u8],
    /// The destination connection ID.
    pub dcid: &'a [u8],
    /// The source connection ID.
    pub scid: &'a [u8],
    /// The token; servers send none.
    pub token: &'a [u8],
    /// The frames. Fewer than three octets are too few to be protected.
    pub frames: &'a [u8],
}

impl Initial<'_> {
    /// Writes the packet to the front of `out` and returns its length. `None` when `out` is too short, there are too few
    /// or too many frames, or a connection ID has more than 20 octets.
    #[must_use]
    pub fn write(&self, out: &mut [u8]) -> Option<usize> {
        let Self { version, sender, key_cid, dcid, scid, token, frames } = *self;
        let ids = [key_cid, dcid, scid];
        // The number, of one octet, and what is sealed.
        let length = 1 + frames.len() + TAG_LEN;
        let fits = length < 1 << 14 && token.len() < 1 << 14;
        if ids.iter().any(|id| id.len() > MAX_CID_LEN) || frames.len() < SAMPLE_AT - 1 || !fits {
            return None;
        }
        let mut writer = Writer { out, len: 0 };
        writer.put(&[0xc0 | LongType::Initial.to_first_octet(version)])?;
        writer.put(&version.to_wire().to_be_bytes())?;
        for id in [dcid, scid] {
            writer.put(&[u8::try_from(id.len()).ok()?])?;
            writer.put(id)?;
        }
        match u8::try_from(token.len()) {
            Ok(len) if len < 1 << 6 => writer.put(&[len])?,
            _ => writer.put_two(token.len())?,
        }
        writer.put(token)?;
        writer.put_two(length)?;
        writer.put(&[0])?;
        let (number_at, payload_at) = (writer.len - 1, writer.len);
        writer.put(frames)?;
        writer.put(&[0; TAG_LEN])?;
        let len = writer.len;
        let packet = &mut out[..len];
        let keys = Keys::new(version, key_cid, sender);
        let (header, payload) = packet.split_at_mut(payload_at);
        let (payload, tag) = payload.split_at_mut(payload.len() - TAG_LEN);
        // The number is 0, so that the IV is the nonce.
        let sealed = keys.packet.encrypt_inout_detached(&keys.iv.into(), header, payload.into());
        tag.copy_from_slice(&sealed.ok()?);
        let mask = keys.mask(packet, number_at)?;
        packet[0] ^= mask[0] & 0x0f;
        packet[number_at] ^= mask[1];
        Some(len)
    }
}

/// Whether `datagram` begins with an Initial of a client whose protection matches the connection ID that it is directed at:
/// the client began with that connection ID, or a Retry gave it to it, and nothing was changed on the way.
#[must_use]
pub fn is_authentic(datagram: &[u8]) -> bool {
    is_open(datagram).is_some()
}

fn is_open(datagram: &[u8]) -> Option<()> {
    let Ok(Packet::Long(long)) = Packet::read(datagram) else { return None };
    let Kind::Known(version, LongType::Initial) = long.kind() else { return None };
    let (token_len, rest) = varint::read(long.rest)?;
    let rest = rest.get(usize::try_from(token_len).ok()?..)?;
    let (length, rest) = varint::read(rest)?;
    let number_at = datagram.len() - rest.len();
    let len = number_at.checked_add(usize::try_from(length).ok()?)?;
    let mut scratch = [0; MAX_OPENED];
    let packet = scratch.get_mut(..len)?;
    packet.copy_from_slice(datagram.get(..len)?);
    if long.dcid.len() > MAX_CID_LEN {
        return None;
    }
    let keys = Keys::new(version, long.dcid, Sender::Client);
    let mask = keys.mask(packet, number_at)?;
    packet[0] ^= mask[0] & 0x0f;
    let payload_at = number_at + 1 + usize::from(packet[0] & 0x03);
    let mut nonce = keys.iv;
    // A client's first numbers are below what their lengths can say.
    for (at, mask) in (number_at..payload_at).zip(&mask[1..]) {
        packet[at] ^= mask;
        nonce[nonce.len() - (payload_at - at)] ^= packet[at];
    }
    let (header, sealed) = packet.split_at_mut_checked(payload_at)?;
    let (payload, tag) = sealed.split_last_chunk_mut::<TAG_LEN>()?;
    let tag = Tag::from(*tag);
    keys.packet.decrypt_inout_detached(&nonce.into(), header, payload.into(), &tag).ok()
}

/// Why a client is refused: codes of RFC 9000, section 20.1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// INTERNAL_ERROR.
    Internal = 0x1,
    /// CONNECTION_REFUSED.
    Refused = 0x2,
    /// INVALID_TOKEN.
    InvalidToken = 0xb,
}

/// The answer to a client's Initial that begins nothing: an Initial with CONNECTION_CLOSE, whose sender keeps nothing.
///
/// <https://www.rfc-editor.org/rfc/rfc9000.html#section-8.1.2>: "the server SHOULD immediately close the connection with an
/// INVALID_TOKEN error"
#[derive(Clone, Copy, Debug)]
pub struct Refusal<'a> {
    /// The version of the Initial.
    pub version: Version,
    /// The source connection ID of the Initial.
    pub client_cid: &'a [u8],
    /// The destination connection ID of the Initial.
    pub original_dcid: &'a [u8],
    /// A connection ID for whatever the client may still send.
    pub scid: &'a ConnectionId,
    /// Why.
    pub reason: Reason,
    /// The same for people: 16 octets at most.
    pub words: &'a str,
}

impl Refusal<'_> {
    /// The most octets that [`Self::write`] needs: far fewer than an Initial of a client has.
    pub const MAX_LEN: usize = 1 + 4 + 2 * (1 + MAX_CID_LEN) + 1 + 2 + 1 + CLOSE_LEN + TAG_LEN;

    /// Writes the packet to the front of `out` and returns its length. `None` when `out` is too short, a connection ID
    /// has more than 20 octets, or there are too many words.
    #[must_use]
    pub fn write(&self, out: &mut [u8]) -> Option<usize> {
        let mut close = [0; CLOSE_LEN];
        let (head, words) = close.split_at_mut(4);
        words.get_mut(..self.words.len())?.copy_from_slice(self.words.as_bytes());
        head.copy_from_slice(&[0x1c, self.reason as u8, 0, u8::try_from(self.words.len()).ok()?]);
        let initial = Initial {
            version: self.version,
            sender: Sender::Server,
            key_cid: self.original_dcid,
            dcid: self.client_cid,
            scid: self.scid,
            token: &[],
            frames: close.get(..4 + self.words.len())?,
        };
        initial.write(out)
    }
}

/// The keys of one side.
struct Keys {
    packet: Aes128Gcm,
    iv: [u8; 12],
    header: Aes128Enc,
}

impl Keys {
    /// <https://www.rfc-editor.org/rfc/rfc9001.html#section-5.2> and
    /// <https://www.rfc-editor.org/rfc/rfc9369.html#section-3.3>
    fn new(version: Version, key_cid: &[u8], sender: Sender) -> Self {
        let (salt, labels): (_, [&[u8]; 3]) = match version {
            Version::V1 => (
                [
                    0x38, 0x76, 0x2c, 0xf7, 0xf5, 0x59, 0x34, 0xb3, 0x4d, 0x17, 0x9a, 0xe6, 0xa4,
                    0xc8, 0x0c, 0xad, 0xcc, 0xbb, 0x7f, 0x0a,
                ],
                [b"quic key", b"quic iv", b"quic hp"],
            ),
            Version::V2 => (
                [
                    0x0d, 0xed, 0xe3, 0xde, 0xf7, 0x00, 0xa6, 0xdb, 0x81, 0x93, 0x81, 0xbe, 0x6e,
                    0x26, 0x9d, 0xcb, 0xf9, 0xbd, 0x2e, 0xd9,
                ],
                [b"quicv2 key", b"quicv2 iv", b"quicv2 hp"],
            ),
        };
        let side: &[u8] = match sender {
            Sender::Client => b"client in",
            Sender::Server => b"server in",
        };
        let initial = Hkdf::<Sha256>::new(Some(&salt), key_cid);
        let secret: [u8; 32] = expand(&initial, side);
        let secret = Hkdf::from_prk(&secret).expect("32 octets are a key of SHA-256");
        let [key, iv, hp] = labels;
        let (key, iv, hp): ([u8; 16], _, [u8; 16]) =
            (expand(&secret, key), expand(&secret, iv), expand(&secret, hp));
        Self { packet: Aes128Gcm::new(&key.into()), iv, header: Aes128Enc::new(&hp.into()) }
    }

    /// The mask of the first octet and of the packet number; `None` when the packet is too short to have one.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9001.html#section-5.4.2>
    fn mask(&self, packet: &[u8], number_at: usize) -> Option<[u8; 5]> {
        let sample = packet.get(number_at + SAMPLE_AT..)?.first_chunk::<SAMPLE_LEN>()?;
        let mut block = Block::from(*sample);
        self.header.encrypt_block(&mut block);
        block.first_chunk().copied()
    }
}

/// HKDF-Expand-Label of TLS 1.3, without context.
///
/// <https://www.rfc-editor.org/rfc/rfc8446.html#section-7.1>
fn expand<const N: usize>(secret: &Hkdf<Sha256>, label: &[u8]) -> [u8; N] {
    const PREFIX: &[u8] = b"tls13 ";
    let octet = |len: usize| u8::try_from(len).expect("labels and keys are short");
    let (len, label_len) = ([0, octet(N)], [octet(PREFIX.len() + label.len())]);
    let mut out = [0; N];
    secret
        .expand_multi_info(&[&len, &label_len, PREFIX, label, &[0]], &mut out)
        .expect("SHA-256 yields 8160 octets");
    out
}

struct Writer<'a> {
    out: &'a mut [u8],
    len: usize,
}

impl Writer<'_> {
    fn put(&mut self, octets: &[u8]) -> Option<()> {
        let end = self.len + octets.len();
        self.out.get_mut(self.len..end)?.copy_from_slice(octets);
        self.len = end;
        Some(())
    }

    /// A number below 2^14.
    fn put_two(&mut self, number: usize) -> Option<()> {
        self.put(&(u16::try_from(number).ok()? | 0x4000).to_be_bytes())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CLIENT_DCID: [u8; 8] = [0x83, 0x94, 0xc8, 0xf0, 0x3e, 0x51, 0x57, 0x08];

    fn hello<'a>(version: Version, dcid: &'a [u8], token: &'a [u8]) -> Initial<'a> {
        Initial {
            version,
            sender: Sender::Client,
            key_cid: dcid,
            dcid,
            scid: b"client",
            token,
            frames: &[0; 1000],
        }
    }

    fn written(initial: &Initial<'_>) -> Vec<u8> {
        let mut out = vec![0; MAX_OPENED];
        let len = initial.write(&mut out).unwrap();
        out.truncate(len);
        out
    }

    /// RFC 9001, appendix A.1, and RFC 9369, appendix A.1.
    #[test]
    fn published_keys_are_derived() {
        for (version, sender, iv) in [
            (Version::V1, Sender::Client, 0xfa04_4b2f_42a3_fd3b_46fb_255c_u128),
            (Version::V1, Sender::Server, 0x0ac1_493c_a190_5853_b0bb_a03e),
            (Version::V2, Sender::Client, 0x91f7_3e23_51d8_fa91_660e_909f),
            (Version::V2, Sender::Server, 0xdd13_c276_499c_0249_d331_0652),
        ] {
            let keys = Keys::new(version, &CLIENT_DCID, sender);
            assert_eq!(keys.iv, iv.to_be_bytes()[4..], "{version:?} {sender:?}");
        }
    }

    #[test]
    fn what_a_client_writes_opens_and_what_a_server_writes_does_not() {
        for version in [Version::V1, Version::V2] {
            for token in [&[][..], b"token", &[7; 300]] {
                let hello = hello(version, &CLIENT_DCID, token);
                let octets = written(&hello);
                assert!(is_authentic(&octets), "{version:?}");
                // Whatever follows in the datagram does not matter.
                assert!(is_authentic(&[&octets[..], b"and more"].concat()));
                assert!(!is_authentic(&written(&Initial { sender: Sender::Server, ..hello })));
                let other = Initial { key_cid: b"another one", ..hello };
                assert!(!is_authentic(&written(&other)), "directed at a connection ID of a server");
            }
        }
    }

    #[test]
    fn a_flipped_bit_shows() {
        let octets = written(&hello(Version::V1, &CLIENT_DCID, b"the token of a Retry"));
        for bit in 0..octets.len() * 8 {
            let mut flipped = octets.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(!is_authentic(&flipped), "bit {bit}");
        }
    }

    #[test]
    fn a_refusal_is_short_whatever_the_connection_ids() {
        let scid = ConnectionId::new(&[3; 20]).unwrap();
        for version in [Version::V1, Version::V2] {
            let with = |client_cid, words| Refusal {
                words,
                version,
                client_cid,
                original_dcid: &[2; 20],
                scid: &scid,
                reason: Reason::InvalidToken,
            };
            let (longest, longer) = ("w".repeat(MAX_WORDS), "w".repeat(MAX_WORDS + 1));
            let refusal = |client_cid| with(client_cid, &longest);
            let mut out = [0; Refusal::MAX_LEN];
            assert_eq!(with(&[], "").write(&mut out), Some(Refusal::MAX_LEN - 20 - MAX_WORDS));
            assert_eq!(with(&[], &longer).write(&mut out), None);
            assert_eq!(refusal(&[1; 20]).write(&mut out), Some(Refusal::MAX_LEN));
            assert_eq!(refusal(&[]).write(&mut out), Some(Refusal::MAX_LEN - 20));
            assert_eq!(refusal(&[1; 20]).write(&mut out[1..]), None);
            assert_eq!(refusal(&[1; 21]).write(&mut out), None);
        }
    }

    proptest! {
        #[test]
        fn any_octets_are_judged_without_panic(
            mut octets in prop::collection::vec(any::<u8>(), 0..2500),
            hint: bool,
            dcid_len in 0usize..24,
        ) {
            if hint && octets.len() > 6 {
                octets[..5].copy_from_slice(&[0xc0, 0, 0, 0, 1]);
                octets[5] = u8::try_from(dcid_len).unwrap();
            }
            prop_assert!(!is_authentic(&octets));
        }
    }
}
