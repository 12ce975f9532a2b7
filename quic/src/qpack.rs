//! Encoded field sections of HTTP/3 that need no dynamic table (RFC 9204): their lines, as they are written.
//!
//! Nothing is decoded here but integers and lengths. Names and values of the static table are known by their
//! index, others are octets, in Huffman code or not: enough to find a field whose name is known.

/// A string, as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Text<'a> {
    /// Whether it is in Huffman code (RFC 7541, appendix B).
    pub is_huffman: bool,
    /// Its octets.
    pub octets: &'a [u8],
}

/// The name of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Name<'a> {
    /// That of this entry of the static table, if there is such a one.
    Static(usize),
    /// These octets.
    Literal(Text<'a>),
}

/// A field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line<'a> {
    /// Its name.
    pub name: Name<'a>,
    /// Its value; `None` for that of the static table.
    pub value: Option<Text<'a>>,
}

/// The fields of a section that are still to be read.
#[derive(Clone, Copy, Debug)]
pub struct Lines<'a> {
    rest: &'a [u8],
}

impl<'a> Lines<'a> {
    /// Those of `section`; `None` where they need a dynamic table, or there is not even a prefix.
    #[must_use]
    pub fn of(section: &'a [u8]) -> Option<Self> {
        let mut lines = Self { rest: section };
        let (_, required_inserts) = lines.integer(8)?;
        lines.integer(7)?;
        (required_inserts == 0).then_some(lines)
    }

    /// Whether all were read.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// The next one; `None` where there is none that can be read.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9204.html#section-4.5>
    pub fn read(&mut self) -> Option<Line<'a>> {
        match self.rest.first()? {
            // Indexed, static.
            first if first & 0b1100_0000 == 0b1100_0000 => {
                Some(Line { name: Name::Static(self.integer(6)?.1), value: None })
            }
            // Literal with a name of the static table.
            first if first & 0b1101_0000 == 0b0101_0000 => {
                let name = Name::Static(self.integer(4)?.1);
                Some(Line { name, value: Some(self.text(7)?) })
            }
            // Literal with a literal name.
            first if first & 0b1110_0000 == 0b0010_0000 => {
                let name = Name::Literal(self.text(3)?);
                Some(Line { name, value: Some(self.text(7)?) })
            }
            // All others are of the dynamic table.
            _ => None,
        }
    }

    /// An integer with a prefix of so many bits: what stands in front of them, and its value.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc7541.html#section-5.1>
    fn integer(&mut self, prefix: u32) -> Option<(u8, usize)> {
        let (&first, mut rest) = self.rest.split_first()?;
        let mask = u8::try_from((1u32 << prefix) - 1).ok()?;
        let mut value = usize::from(first & mask);
        if first & mask == mask {
            // Nothing here is longer than a section, of which four octets of seven bits say enough.
            for shift in [0, 7, 14, 21] {
                let (&octet, behind) = rest.split_first()?;
                rest = behind;
                value += usize::from(octet & 0x7f) << shift;
                if octet & 0x80 == 0 {
                    self.rest = rest;
                    return Some((first & !mask, value));
                }
            }
            return None;
        }
        self.rest = rest;
        Some((first & !mask, value))
    }

    /// A string whose length has a prefix of so many bits.
    fn text(&mut self, prefix: u32) -> Option<Text<'a>> {
        let (flags, len) = self.integer(prefix)?;
        let (octets, rest) = self.rest.split_at_checked(len)?;
        self.rest = rest;
        Some(Text { is_huffman: flags & 1 << prefix != 0, octets })
    }
}

/// Appends the prefix of a section that needs no dynamic table.
pub fn write_prefix(out: &mut Vec<u8>) {
    out.extend_from_slice(&[0, 0]);
}

/// Appends the field that is this entry of the static table, which has 99.
pub fn write_static(index: u8, out: &mut Vec<u8>) {
    write_integer(0b1100_0000, 6, index.into(), out);
}

/// Appends a field with the name of this entry of the static table and another value.
pub fn write_named(index: u8, value: &[u8], out: &mut Vec<u8>) {
    write_integer(0b0101_0000, 4, index.into(), out);
    write_integer(0, 7, value.len(), out);
    out.extend_from_slice(value);
}

fn write_integer(flags: u8, prefix: u32, value: usize, out: &mut Vec<u8>) {
    let mask = (1usize << prefix) - 1;
    if value < mask {
        out.push(flags | low_octet(value));
        return;
    }
    out.push(flags | low_octet(mask));
    let mut rest = value - mask;
    while rest >= 0x80 {
        out.push(low_octet(rest & 0x7f) | 0x80);
        rest >>= 7;
    }
    out.push(low_octet(rest));
}

const fn low_octet(value: usize) -> u8 {
    value.to_le_bytes()[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut section = vec![];
        write_prefix(&mut section);
        let long = vec![b'x'; 5000];
        for index in [0, 14, 15, 62, 63, 98] {
            write_static(index, &mut section);
            write_named(index, &long[..usize::from(index)], &mut section);
        }
        write_named(1, &long, &mut section);
        let mut lines = Lines::of(&section).unwrap();
        let text = |octets| Some(Text { is_huffman: false, octets });
        for index in [0, 14, 15, 62, 63, 98] {
            let name = Name::Static(index);
            assert_eq!(lines.read(), Some(Line { name, value: None }));
            assert_eq!(lines.read(), Some(Line { name, value: text(&long[..index]) }));
        }
        assert_eq!(lines.read(), Some(Line { name: Name::Static(1), value: text(&long) }));
        assert!(lines.is_empty() && lines.read().is_none());
    }

    #[test]
    fn what_is_cut_off_or_needs_a_dynamic_table_is_not_read() {
        assert!(Lines::of(&[]).is_none());
        assert!(Lines::of(&[0]).is_none());
        assert!(Lines::of(&[2, 0, 0x80]).is_none());
        // Of the dynamic table; literals without their end; an integer without one.
        for line in [&[0x80][..], &[0x10], &[0x41, 0], &[0x51, 2, b'x'], &[0x23, b'x'], &[0xff; 6]]
        {
            let section = [&[0, 0], line].concat();
            assert_eq!(Lines::of(&section).unwrap().read(), None, "{line:02x?}");
        }
    }
}
