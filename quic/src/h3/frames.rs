//! The frames of a request as they pass, for what `h3` does not tell of them: pseudo-header fields among trailers.
//!
//! <https://www.rfc-editor.org/rfc/rfc9114.html#section-4.3>: "Pseudo-header fields MUST NOT appear in trailer sections."

use super::section;
use crate::varint;

/// <https://www.rfc-editor.org/rfc/rfc9114.html#section-7.2.2>
const HEADERS: u64 = 0x01;

/// The longest trailers that are looked at, in octets. A field that does harm may stand behind them.
const MAX_TRAILERS: u64 = 64 * 1024;

/// Type and length of a frame, in octets.
const MAX_FRONT: usize = 16;

/// Trailers have a pseudo-header field, or are too long to look for one.
#[derive(Debug, thiserror::Error)]
#[error("pseudo-header fields among trailers, or very long ones")]
pub(super) struct BadTrailers;

/// What is known of the frames of a request.
#[derive(Debug)]
pub(super) struct Frames {
    state: State,
    /// Whether the head has begun, so that the next section is that of trailers.
    has_head: bool,
    bad_trailers: bool,
}

#[derive(Debug)]
enum State {
    /// In front of a payload: so many octets of type and length.
    Front([u8; MAX_FRONT], usize),
    /// So many octets before the end of a payload that nobody looks at.
    Passing(u64),
    /// So many octets before the end of trailers, of which these have come.
    Trailers(u64, Vec<u8>),
}

impl State {
    const START: Self = Self::Front([0; MAX_FRONT], 0);
}

impl Frames {
    /// At the start of a stream.
    pub(super) const fn new() -> Self {
        Self { state: State::START, has_head: false, bad_trailers: false }
    }

    /// Takes note of the next octets of the stream.
    pub(super) fn pass(&mut self, mut octets: &[u8]) {
        while let Some((&first, rest)) = octets.split_first() {
            match &mut self.state {
                State::Front(front, len) => {
                    front[*len] = first;
                    *len += 1;
                    octets = rest;
                    let front = varint::read(&front[..*len]);
                    let front = front.and_then(|(kind, rest)| Some((kind, varint::read(rest)?.0)));
                    if let Some((kind, length)) = front {
                        self.enter(kind, length);
                    }
                }
                State::Passing(left) => {
                    octets = split(octets, left).1;
                    if *left == 0 {
                        self.state = State::START;
                    }
                }
                State::Trailers(left, section) => {
                    let (part, rest) = split(octets, left);
                    section.extend_from_slice(part);
                    octets = rest;
                    if *left == 0 {
                        self.bad_trailers |= section::has_pseudo_fields(section);
                        self.state = State::START;
                    }
                }
            }
        }
    }

    /// Whether there were trailers with pseudo-header fields, or longer ones than are looked at.
    pub(super) const fn has_bad_trailers(&self) -> bool {
        self.bad_trailers
    }

    /// Begins the payload of a frame.
    fn enter(&mut self, kind: u64, length: u64) {
        let is_trailers = kind == HEADERS && self.has_head;
        self.has_head |= kind == HEADERS;
        self.bad_trailers |= is_trailers && length > MAX_TRAILERS;
        self.state = match length {
            0 => State::START,
            1..=MAX_TRAILERS if is_trailers => State::Trailers(length, Vec::new()),
            _ => State::Passing(length),
        };
    }
}

/// As many octets as are `left`, which are fewer then, and the others.
fn split<'a>(octets: &'a [u8], left: &mut u64) -> (&'a [u8], &'a [u8]) {
    let count = usize::try_from(*left).map_or(octets.len(), |left| left.min(octets.len()));
    *left -= count as u64;
    octets.split_at(count)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DATA: u64 = 0x00;
    /// GET, https, `/`.
    const HEAD: [u8; 5] = [0, 0, 0xc0 | 17, 0xc0 | 23, 0xc0 | 1];
    /// `accept: */*`.
    const ACCEPT: [u8; 3] = [0, 0, 0xc0 | 29];
    const PATH: [u8; 4] = [0, 0, 0xc0 | 29, 0xc0 | 1];

    fn frame(kind: u64, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        varint::write(kind, &mut out);
        varint::write(payload.len() as u64, &mut out);
        out.extend_from_slice(payload);
        out
    }

    fn is_bad(octets: &[u8], at_once: usize) -> bool {
        let mut frames = Frames::new();
        octets.chunks(at_once).for_each(|part| frames.pass(part));
        frames.has_bad_trailers()
    }

    #[test]
    fn pseudo_header_fields_are_seen_among_trailers_and_nowhere_else() {
        let head = frame(HEADERS, &HEAD);
        // As long as what looks like trailers takes two octets of length.
        let data = frame(DATA, &[&PATH[..], &[0; 100]].concat());
        let grease = frame(0x21, &PATH);
        for (frames, expected) in [
            (vec![&head], false),
            (vec![&grease, &head, &data], false),
            (vec![&head, &frame(HEADERS, &ACCEPT)], false),
            (vec![&head, &data, &data, &frame(HEADERS, &ACCEPT), &grease], false),
            (vec![&head, &frame(HEADERS, &PATH)], true),
            (vec![&head, &data, &grease, &frame(HEADERS, &PATH)], true),
            (vec![&head, &frame(DATA, &[]), &frame(HEADERS, &HEAD), &data], true),
            (vec![&head, &frame(HEADERS, &[0, 0, 0xc0 | 25])], true),
            // What cannot be read is for h3 to judge.
            (vec![&head, &frame(HEADERS, &[]), &frame(HEADERS, &[0, 0, 0x80])], false),
        ] {
            let octets: Vec<u8> = frames.into_iter().flatten().copied().collect();
            for at_once in [1, 2, 3, 7, octets.len()] {
                assert_eq!(is_bad(&octets, at_once), expected, "{octets:x?} by {at_once}");
            }
        }
    }

    #[test]
    fn trailers_that_are_too_long_are_not_kept() {
        for (length, expected) in [(MAX_TRAILERS, false), (MAX_TRAILERS + 1, true)] {
            let mut octets = frame(HEADERS, &HEAD);
            varint::write(HEADERS, &mut octets);
            varint::write(length, &mut octets);
            assert_eq!(is_bad(&octets, 5), expected);
        }
    }

    proptest! {
        #[test]
        fn any_octets_pass_without_panic(octets in prop::collection::vec(any::<u8>(), 1..300)) {
            let whole = is_bad(&octets, octets.len());
            prop_assert_eq!(whole, is_bad(&octets, 1));
        }
    }
}
