//! Frames of a capture that no datagram came out of, and why.

use std::{collections::BTreeMap, fmt};

use crate::words::count;

/// Why no datagram came out of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Unread {
    /// A link type that is not read, by its number.
    Link(i32),
    /// Part of a datagram; only the first has its ports.
    Fragment,
    /// The capture ends inside the headers.
    CutOff,
    /// Headers that contradict themselves.
    Malformed,
    /// An interface that the file does not describe.
    UnknownInterface,
    /// Something other than IP, such as ARP.
    NoIp,
    /// Something other than UDP.
    NoUdp,
}

impl fmt::Display for Unread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link(number) => write!(f, "of link type {number}, which is not read here"),
            Self::Fragment => f.write_str("with a fragment of a datagram"),
            Self::CutOff => f.write_str("cut off inside the headers"),
            Self::Malformed => f.write_str("with headers that contradict themselves"),
            Self::UnknownInterface => {
                f.write_str("of an interface that the file does not describe")
            }
            Self::NoIp => f.write_str("without IP"),
            Self::NoUdp => f.write_str("without UDP"),
        }
    }
}

/// How many there were, and the first of each kind.
#[derive(Debug, Default)]
pub(super) struct Tally {
    kinds: BTreeMap<Unread, (usize, usize)>,
    others: usize,
}

/// A file can name any number of link types.
const MAX_KINDS: usize = 24;

impl Tally {
    pub(super) fn add(&mut self, frame: usize, unread: Unread) {
        if self.kinds.len() >= MAX_KINDS && !self.kinds.contains_key(&unread) {
            self.others += 1;
            return;
        }
        let (seen, _) = self.kinds.entry(unread).or_insert((0, frame));
        *seen += 1;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unread, (seen, first)) in &self.kinds {
            let frames = count(*seen, "frame");
            match seen {
                1 => writeln!(f, "not read: {frames} {unread}: frame {first}")?,
                _ => writeln!(f, "not read: {frames} {unread}: the first is frame {first}")?,
            }
        }
        if self.others > 0 {
            writeln!(f, "not read: {} of other kinds", count(self.others, "frame"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_counted_and_the_first_is_named() {
        let mut tally = Tally::default();
        for (frame, unread) in
            (3..).zip([Unread::NoUdp, Unread::Link(127), Unread::NoUdp, Unread::Fragment])
        {
            tally.add(frame, unread);
        }
        assert_eq!(
            tally.to_string(),
            "not read: 1 frame of link type 127, which is not read here: frame 4\n\
             not read: 1 frame with a fragment of a datagram: frame 6\n\
             not read: 2 frames without UDP: the first is frame 3\n"
        );
        for link in 0..100 {
            tally.add(9, Unread::Link(link));
        }
        assert!(tally.kinds.len() <= MAX_KINDS);
        assert!(tally.to_string().ends_with("of other kinds\n"));
    }
}
