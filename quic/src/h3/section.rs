//! Encoded field sections (RFC 9204), as far as it takes to tell pseudo-header fields from others: which, how often, in which order.
//!
//! `h3` decodes sections into its own words, in which the second `:path` takes the place of the first. Nothing is decoded here: fields
//! are recognized by their index in the static table, or by the octets of their name, of which the Huffman code allows one form.

use crate::qpack::{self, Lines, Text};

/// Why a section is not that of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadSection {
    /// It cannot be read to its end without a dynamic table.
    Unreadable,
    /// A pseudo-header field that requests do not have.
    Unknown,
    /// A pseudo-header field comes twice.
    Twice,
    /// A pseudo-header field comes behind another field.
    Late,
    /// `:path` is empty.
    EmptyPath,
}

/// The pseudo-header fields of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pseudo {
    Method,
    Scheme,
    Authority,
    Path,
}

/// The name of a field.
enum Name {
    Pseudo(Pseudo),
    /// A pseudo-header field of another kind of message, or of none.
    Foreign,
    Regular,
}

impl Name {
    /// `None` for an entry that the static table does not have.
    fn of(name: qpack::Name<'_>) -> Option<Self> {
        match name {
            qpack::Name::Static(index) => of_static(index),
            qpack::Name::Literal(text) => Some(of_literal(text)),
        }
    }
}

/// The pseudo-header fields by name, and their names in Huffman code (RFC 7541, appendix B).
const NAMES: [(Pseudo, &[u8], &[u8]); 4] = [
    (Pseudo::Method, b":method", &[0xb9, 0x49, 0x53, 0x39, 0xe4]),
    (Pseudo::Scheme, b":scheme", &[0xb8, 0x82, 0x4e, 0x5a, 0x4b]),
    (Pseudo::Authority, b":authority", &[0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f]),
    (Pseudo::Path, b":path", &[0xb9, 0x58, 0xd3, 0x3f]),
];

/// What every name in Huffman code begins with that begins with a colon: seven bits.
const HUFFMAN_COLON: u8 = 0xb8;

/// How many of each there are, by [`Pseudo`].
pub(super) type Counts = [u32; 4];

/// Counts the pseudo-header fields of `section`, which is the head of a request.
///
/// <https://www.rfc-editor.org/rfc/rfc9114.html#section-4.3>
pub(super) fn count(section: &[u8]) -> Result<Counts, BadSection> {
    let mut counts = Counts::default();
    let mut lines = Lines::of(section).ok_or(BadSection::Unreadable)?;
    let mut late = false;
    while !lines.is_empty() {
        let line = lines.read().ok_or(BadSection::Unreadable)?;
        let is_empty = line.value.is_some_and(|value| value.octets.is_empty());
        match Name::of(line.name).ok_or(BadSection::Unreadable)? {
            Name::Regular => late = true,
            Name::Foreign => return Err(BadSection::Unknown),
            Name::Pseudo(_) if late => return Err(BadSection::Late),
            Name::Pseudo(Pseudo::Path) if is_empty => return Err(BadSection::EmptyPath),
            Name::Pseudo(pseudo) => {
                let count = &mut counts[pseudo as usize];
                *count += 1;
                if *count > 1 {
                    return Err(BadSection::Twice);
                }
            }
        }
    }
    Ok(counts)
}

/// Whether there are pseudo-header fields, of whatever kind, in `section`, as far as it can be read.
pub(super) fn has_pseudo_fields(section: &[u8]) -> bool {
    let Some(mut lines) = Lines::of(section) else { return false };
    while let Some(name) = lines.read().and_then(|line| Name::of(line.name)) {
        if !matches!(name, Name::Regular) {
            return true;
        }
    }
    false
}

/// Whether a request with these pseudo-header fields has what its method wants.
///
/// <https://www.rfc-editor.org/rfc/rfc9114.html#section-4.3.1>: "All HTTP/3 requests MUST include exactly one value for the :method,
/// :scheme, and :path pseudo-header fields, unless the request is a CONNECT request"
pub(super) fn is_complete(counts: &Counts, is_connect: bool) -> bool {
    let has = |pseudo: Pseudo| counts[pseudo as usize] == 1;
    let named = has(Pseudo::Scheme) && has(Pseudo::Path);
    let unnamed = !has(Pseudo::Scheme) && !has(Pseudo::Path) && has(Pseudo::Authority);
    has(Pseudo::Method) && if is_connect { unnamed } else { named }
}

/// The last entry of the static table.
const LAST_STATIC: usize = 98;

/// <https://www.rfc-editor.org/rfc/rfc9204.html#appendix-A>
fn of_static(index: usize) -> Option<Name> {
    Some(match index {
        0 => Name::Pseudo(Pseudo::Authority),
        1 => Name::Pseudo(Pseudo::Path),
        15..=21 => Name::Pseudo(Pseudo::Method),
        22..=23 => Name::Pseudo(Pseudo::Scheme),
        // `:status`.
        24..=28 | 63..=71 => Name::Foreign,
        _ if index <= LAST_STATIC => Name::Regular,
        _ => return None,
    })
}

fn of_literal(Text { is_huffman, octets }: Text<'_>) -> Name {
    let known = NAMES
        .iter()
        .find(|(_, plain, huffman)| octets == if is_huffman { *huffman } else { *plain });
    let first = octets.first().copied().unwrap_or_default();
    match known {
        Some((pseudo, ..)) => Name::Pseudo(*pseudo),
        None if is_huffman && first & 0xfe == HUFFMAN_COLON => Name::Foreign,
        None if !is_huffman && first == b':' => Name::Foreign,
        None => Name::Regular,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// GET, https, `/` and nothing else: static 17, 23, 1.
    const GET: [u8; 3] = [0xc0 | 17, 0xc0 | 23, 0xc0 | 1];

    fn section(fields: &[&[u8]]) -> Vec<u8> {
        [&[0, 0][..], &fields.concat()].concat()
    }

    /// A literal field with a literal name.
    fn literal(name: &[u8], huffman: bool, value: &[u8]) -> Vec<u8> {
        let len = u8::try_from(name.len()).unwrap();
        let flags = 0x20 | u8::from(huffman) << 3;
        let mut out = if len < 7 { vec![flags | len] } else { vec![flags | 7, len - 7] };
        out.extend_from_slice(name);
        out.push(u8::try_from(value.len()).unwrap());
        out.extend_from_slice(value);
        out
    }

    #[test]
    fn names_are_recognized_in_every_form() {
        for (pseudo, plain, huffman) in NAMES {
            for (name, is_huffman) in [(plain, false), (huffman, true)] {
                let counts = count(&section(&[&literal(name, is_huffman, b"x")])).unwrap();
                assert_eq!(counts[pseudo as usize], 1, "{pseudo:?}");
                assert_eq!(counts.iter().sum::<u32>(), 1);
            }
        }
        // By reference with another value, as most clients send `:path` and `:authority`.
        let by_name = section(&[&[0xc0 | 17, 0xc0 | 23], &[0x51, 2, b'/', b'x'], &[0x50, 1, b'x']]);
        assert_eq!(count(&by_name), Ok([1, 1, 1, 1]));
    }

    #[test]
    fn what_requests_do_not_have_is_told_apart() {
        let get: &[u8] = &GET;
        let accept: &[u8] = &[0xc0 | 29];
        for (fields, expected) in [
            (vec![get, &[0xc0 | 1]], BadSection::Twice),
            (vec![get, &literal(b":path", false, b"/")], BadSection::Twice),
            (vec![get, &literal(NAMES[3].2, true, b"/")], BadSection::Twice),
            (vec![get, &[0xc0 | 25]], BadSection::Unknown),
            (vec![get, &[0xff, 63 - 63]], BadSection::Unknown),
            (vec![get, &literal(b":protocol", false, b"x")], BadSection::Unknown),
            (
                vec![get, &literal(&[0xb9, 0x5d, 0x87, 0x49, 0xc8, 0x7a, 0x3f], true, b"x")],
                BadSection::Unknown,
            ),
            (vec![accept, get], BadSection::Late),
            (vec![get, accept, &literal(b":authority", false, b"x")], BadSection::Late),
            (vec![&get[..2], &[0x51, 0]], BadSection::EmptyPath),
            // Of the dynamic table, behind the end of the static one, cut short.
            (vec![get, &[0x80]], BadSection::Unreadable),
            (vec![get, &[0xff, 99 - 63]], BadSection::Unreadable),
            (vec![get, &[0x51, 3, b'/']], BadSection::Unreadable),
        ] {
            assert_eq!(count(&section(&fields)), Err(expected), "{fields:?}");
        }
        assert_eq!(count(&[1, 0]), Err(BadSection::Unreadable), "needs an entry");
        assert_eq!(count(&section(&[get, accept])), Ok([1, 1, 0, 1]));
    }

    #[test]
    fn connect_names_no_path_and_all_others_do() {
        for (counts, is_connect, complete) in [
            ([1, 1, 1, 1], false, true),
            ([1, 1, 0, 1], false, true),
            ([0, 1, 1, 1], false, false),
            ([1, 0, 1, 1], false, false),
            ([1, 1, 1, 0], false, false),
            ([1, 0, 1, 0], true, true),
            ([1, 0, 0, 0], true, false),
            ([1, 1, 1, 1], true, false),
        ] {
            assert_eq!(is_complete(&counts, is_connect), complete, "{counts:?} {is_connect}");
        }
    }

    proptest! {
        #[test]
        fn any_octets_are_read_without_panic(octets in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = count(&octets);
        }
    }
}
