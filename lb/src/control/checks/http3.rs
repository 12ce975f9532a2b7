//! The least of HTTP/3, pure: one GET, and the status of its answer.
//!
//! A whole client would have to be fed by a driver, which reads as much as a server sends. Here octets come in, as
//! many as a head may take, and what is not needed is left where it is: whatever else the server says on
//! other streams, and the content.

use std::net::SocketAddr;

use quic::{
    qpack::{self, Line, Lines, Name, Text},
    varint,
};

/// What our control stream says: its type, and SETTINGS without any.
///
/// <https://www.rfc-editor.org/rfc/rfc9114.html#section-6.2.1>
pub(super) const CONTROL: [u8; 3] = [0x00, FRAME_SETTINGS, 0];

/// The application's code for an end without an error.
///
/// <https://www.rfc-editor.org/rfc/rfc9114.html#section-8.1>
pub(super) const NO_ERROR: u64 = 0x100;

const FRAME_DATA: u64 = 0;
const FRAME_HEADERS: u64 = 1;
const FRAME_SETTINGS: u8 = 4;

/// The most octets of an answer that are looked at for its status.
const ANSWER_LEN: usize = 16 * 1024;

// Entries of the static table: <https://www.rfc-editor.org/rfc/rfc9204.html#appendix-A>
const AUTHORITY: u8 = 0;
const PATH: u8 = 1;
const METHOD_GET: u8 = 17;
const SCHEME_HTTPS: u8 = 23;
const USER_AGENT: u8 = 95;

/// The octets of a request for `path` of the server called `name` at `address`.
pub(super) fn request(name: Option<&str>, address: SocketAddr, path: &str) -> Vec<u8> {
    let port = address.port();
    let authority = match name {
        Some(name) => format!("{name}:{port}"),
        // Zones mean nothing to others.
        None => SocketAddr::new(address.ip(), port).to_string(),
    };
    let mut section = vec![];
    qpack::write_prefix(&mut section);
    qpack::write_static(METHOD_GET, &mut section);
    qpack::write_static(SCHEME_HTTPS, &mut section);
    qpack::write_named(AUTHORITY, authority.as_bytes(), &mut section);
    qpack::write_named(PATH, path.as_bytes(), &mut section);
    qpack::write_named(USER_AGENT, b"quic-lb", &mut section);
    let mut request = vec![];
    varint::write(FRAME_HEADERS, &mut request);
    varint::write(section.len() as u64, &mut request);
    request.extend_from_slice(&section);
    request
}

/// An answer, as far as it has come.
#[derive(Debug, Default)]
pub(super) struct Answer {
    octets: Vec<u8>,
}

/// What an answer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// Not enough yet.
    Nothing,
    /// Its status.
    Status(u16),
    /// Something that is no answer.
    Nonsense,
}

impl Answer {
    /// Takes more of it.
    pub(super) fn take(&mut self, octets: &[u8]) -> Said {
        self.octets.extend_from_slice(octets);
        match said(&self.octets) {
            Said::Nothing if self.octets.len() > ANSWER_LEN => Said::Nonsense,
            said => said,
        }
    }
}

/// The final status in the frames of an answer.
fn said(mut rest: &[u8]) -> Said {
    loop {
        let frame = varint::read(rest).and_then(|(kind, rest)| {
            let (len, rest) = varint::read(rest)?;
            Some((kind, usize::try_from(len).ok()?, rest))
        });
        let Some((kind, len, behind)) = frame else { return Said::Nothing };
        if kind == FRAME_DATA {
            return Said::Nonsense;
        }
        let Some((content, behind)) = behind.split_at_checked(len) else { return Said::Nothing };
        rest = behind;
        if kind != FRAME_HEADERS {
            continue;
        }
        match status(content) {
            // Interim answers come before the one that counts.
            Some(100..=199) => {}
            Some(status) => return Said::Status(status),
            None => return Said::Nonsense,
        }
    }
}

/// `:status` of a field section, which comes first: a response has no other pseudo-header field.
///
/// <https://www.rfc-editor.org/rfc/rfc9114.html#section-4.3.2>
fn status(section: &[u8]) -> Option<u16> {
    /// `:status` in Huffman code (RFC 7541, appendix B).
    const HUFFMAN: [u8; 5] = [0xb8, 0x84, 0x8d, 0x36, 0xa3];
    let Line { name, value } = Lines::of(section)?.read()?;
    let of_table = match name {
        Name::Static(index) => Some(of_static(index)?),
        Name::Literal(Text { is_huffman: false, octets: b":status" }) => None,
        Name::Literal(Text { is_huffman: true, octets }) if octets == HUFFMAN => None,
        Name::Literal(_) => return None,
    };
    match value {
        None => of_table,
        Some(Text { is_huffman: false, octets }) => three_digits(octets.iter().copied()),
        Some(Text { is_huffman: true, octets }) => digits_of_huffman(octets),
    }
}

/// The status of an entry of the static table, which is one of `:status`.
fn of_static(index: usize) -> Option<u16> {
    Some(match index {
        24 => 103,
        25 => 200,
        26 => 304,
        27 => 404,
        28 => 503,
        63 => 100,
        64 => 204,
        65 => 206,
        66 => 302,
        67 => 400,
        68 => 403,
        69 => 421,
        70 => 425,
        71 => 500,
        _ => return None,
    })
}

fn three_digits(digits: impl Iterator<Item = u8>) -> Option<u16> {
    let mut value = 0;
    let mut count = 0;
    for digit in digits {
        value = value * 10 + u16::from(digit.checked_sub(b'0').filter(|digit| *digit < 10)?);
        count += 1;
        if count > 3 {
            return None;
        }
    }
    (count == 3).then_some(value)
}

/// Three digits in Huffman code: `0` to `2` have five bits, the others six. What is left of the last octet is ones.
///
/// <https://www.rfc-editor.org/rfc/rfc7541.html#appendix-B>
fn digits_of_huffman(octets: &[u8]) -> Option<u16> {
    const BITS: usize = 32;
    if octets.is_empty() || octets.len() > BITS / 8 {
        return None;
    }
    let padded = octets.iter().copied().chain(std::iter::repeat(0xff)).take(BITS / 8);
    let bits = padded.fold(0u32, |bits, octet| bits << 8 | u32::from(octet));
    let (mut digits, mut at) = (vec![], 0);
    while digits.len() < 3 {
        let next = bits << at;
        let (digit, len) = match (next >> 27, next >> 26) {
            (five @ 0..=2, _) => (five, 5),
            (_, six @ 0x19..=0x1f) => (six - 0x16, 6),
            _ => return None,
        };
        digits.push(b'0' + u8::try_from(digit).ok()?);
        at += len;
    }
    let is_padding = (bits << at) >> at == u32::MAX >> at;
    let is_short = 8 * octets.len() >= at && 8 * octets.len() - at < 8;
    (is_padding && is_short).then(|| three_digits(digits.into_iter())).flatten()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn headers(section: &[u8]) -> Vec<u8> {
        let len = u8::try_from(section.len()).unwrap();
        [&[1, len][..], section].concat()
    }

    #[test]
    fn a_request_has_all_that_one_needs() {
        let address = "[fe80::1%7]:4433".parse().unwrap();
        let octets = request(None, address, "/health?x");
        let (kind, rest) = varint::read(&octets).unwrap();
        let (len, section) = varint::read(rest).unwrap();
        assert_eq!((kind, len), (1, section.len() as u64));
        let mut lines = Lines::of(section).unwrap();
        let mut seen = vec![];
        while let Some(Line { name: Name::Static(index), value }) = lines.read() {
            seen.push((index, value.map(|value| str::from_utf8(value.octets).unwrap())));
        }
        let expected = [
            (17, None),
            (23, None),
            (0, Some("[fe80::1]:4433")),
            (1, Some("/health?x")),
            (95, Some("quic-lb")),
        ];
        assert_eq!(seen, expected);
        assert!(lines.is_empty());
        let named = request(Some("a.test"), address, "/");
        assert!(named.windows(11).any(|octets| octets == b"a.test:4433"));
    }

    #[test]
    fn a_status_is_read_in_every_form_that_it_may_have() {
        let literal = |name: &[u8], value: &[u8]| [&[0, 0], name, value].concat();
        let by_name = [0x5f, 0x09];
        for (section, status) in [
            (vec![0, 0, 0xc0 | 25], 200),
            (vec![0, 0, 0xc0 | 27, 0xff, 0xff], 404),
            (vec![0, 0, 0xff, 71 - 63], 500),
            (literal(&by_name, b"\x03201"), 201),
            // Huffman: 2 is 00010, 0 is 00000, 4 is 011010, 9 is 011111.
            (literal(&by_name, &[0x82, 0b0001_0000, 0b0001_1010]), 204),
            (literal(&by_name, &[0x83, 0b0110_1001, 0b1111_0111, 0b1111_1111]), 499),
            (literal(b"\x27\x00:status", b"\x03418"), 418),
            (literal(&[0x2d, 0xb8, 0x84, 0x8d, 0x36, 0xa3], b"\x03418"), 418),
        ] {
            let mut answer = Answer::default();
            // Whatever is unknown is passed over, and so is what comes before the final status.
            let before = [&[0x21, 2, 7, 7][..], &headers(&[0, 0, 0xc0 | 24])].concat();
            assert_eq!(answer.take(&before), Said::Nothing);
            let octets = headers(&section);
            for octet in &octets[..octets.len() - 1] {
                assert_eq!(answer.take(&[*octet]), Said::Nothing, "{section:02x?}");
            }
            let said = answer.take(&octets[octets.len() - 1..]);
            assert_eq!(said, Said::Status(status), "{section:02x?}");
        }
    }

    #[test]
    fn nothing_else_is_an_answer() {
        for octets in [
            vec![0, 1, b'x'],
            headers(&[]),
            headers(&[0, 0]),
            headers(&[2, 0, 0xc0 | 25]),
            headers(&[0, 0, 0x80]),
            // Of another field; without digits; with four; with bits that are neither digits nor ones.
            headers(&[0, 0, 0xc0 | 29]),
            headers(b"\x00\x00\x5f\x09\x0320x"),
            headers(b"\x00\x00\x5f\x09\x042000"),
            headers(b"\x00\x00\x5f\x09\x00"),
            headers(&[0, 0, 0x5f, 9, 0x82, 0b0001_0000, 0b0001_1000]),
            headers(&[0, 0, 0x5f, 9, 0x83, 0b0001_0000, 0b0001_1010, 0xff]),
            headers(&[0, 0, 0x5f, 9, 0x81, 0b0001_0000]),
        ] {
            assert_eq!(Answer::default().take(&octets), Said::Nonsense, "{octets:02x?}");
        }
        // Endless frames that are unknown.
        let mut answer = Answer::default();
        let unknown = [&[0x21, 0x40, 0xff][..], &[0; 255]].concat();
        let takes = (0..200).take_while(|_| answer.take(&unknown) == Said::Nothing).count();
        assert_eq!(takes, ANSWER_LEN / unknown.len());
    }

    proptest! {
        /// Whatever comes: no panic, and the same is made of it in whichever pieces it comes.
        #[test]
        fn any_octets_are_read_alike_in_any_pieces(
            octets in prop::collection::vec(any::<u8>(), 0..64),
            head in prop::sample::select(vec![vec![], vec![1, 8, 0, 0], vec![1, 8, 0, 0, 0x5f, 9, 0x83]]),
            piece in 1usize..8,
        ) {
            let octets = [head, octets].concat();
            let whole = Answer::default().take(&octets);
            let mut answer = Answer::default();
            let said = octets.chunks(piece).map(|piece| answer.take(piece));
            let said = { said }.find(|said| *said != Said::Nothing).unwrap_or(Said::Nothing);
            prop_assert_eq!(said, whole);
        }
    }
}
