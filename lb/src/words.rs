//! Bytes in hex and numbers of things, as they are typed and shown: on the command line and by the
//! admin interface.

use std::{fmt, str::FromStr};

/// Bytes, typed in hex; colons and white space between them do not matter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hex(pub(crate) Vec<u8>);

impl FromStr for Hex {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut digits = Vec::with_capacity(text.len());
        for character in text.chars().filter(|c| *c != ':' && !c.is_ascii_whitespace()) {
            let digit = character.to_digit(16).and_then(|digit| u8::try_from(digit).ok());
            digits.push(digit.ok_or_else(|| format!("{character:?} is not a hex digit"))?);
        }
        let (octets, []) = digits.as_chunks::<2>() else {
            return Err(format!("{} hex digits are half a byte too many", digits.len()));
        };
        Ok(Self(octets.iter().map(|[high, low]| high << 4 | low).collect()))
    }
}

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|octet| write!(f, "{octet:02x}"))
    }
}

/// So many of them, in the plural unless it is one.
pub(crate) fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_is_read_with_and_without_separators() {
        let octets = Ok(Hex(vec![0x07, 0xc4, 0x60]));
        assert_eq!("07c460".parse(), octets);
        assert_eq!("07:C4:60".parse(), octets);
        assert_eq!(" 07c4 60\n".parse(), octets);
        assert_eq!("".parse(), Ok(Hex(vec![])));
        assert_eq!("07c".parse::<Hex>(), Err("3 hex digits are half a byte too many".into()));
        assert_eq!("0g".parse::<Hex>(), Err("'g' is not a hex digit".into()));
    }
}
