//! Durations, sizes and config IDs as people write them: `"200ms"`, `"5s"`, `"1m"`, `"64KiB"`, `6`.
//!
//! A number without a unit is refused: whoever reads it has to guess. These functions serve the
//! YAML and command lines alike.

use std::time::Duration;

use quic::routable::ConfigId;

/// A text that is no duration, size or config ID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Not a duration.
    #[error("a duration is a whole number with a unit: \"200ms\", \"5s\", \"1m\" or \"1h\"")]
    Duration,
    /// Not a size.
    #[error("a size is a whole number with a unit: \"512B\", \"64KiB\", \"4MiB\" or \"1GiB\"")]
    Size,
    /// Not a config ID.
    #[error("a config ID is a number from 0 to 6")]
    ConfigId,
}

const DURATION_UNITS: [(&str, u64); 4] =
    [("ms", 1), ("s", 1_000), ("m", 60 * 1_000), ("h", 60 * 60 * 1_000)];
const SIZE_UNITS: [(&str, u64); 4] =
    [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("B", 1)];

/// Reads `"200ms"`, `"5s"`, `"1m"` or `"1h"`.
///
/// # Errors
///
/// [`UnitError::Duration`] for everything else, among it what does not fit 64 bits of milliseconds.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    parse(text, &DURATION_UNITS).map(Duration::from_millis).ok_or(UnitError::Duration)
}

/// Reads `"512B"`, `"64KiB"`, `"4MiB"` or `"1GiB"` into octets.
///
/// # Errors
///
/// [`UnitError::Size`] for everything else, among it what does not fit 64 bits.
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    parse(text, &SIZE_UNITS).ok_or(UnitError::Size)
}

/// Reads the number of a configuration of connection IDs: one digit.
///
/// # Errors
///
/// [`UnitError::ConfigId`] for everything else.
pub fn parse_config_id(text: &str) -> Result<ConfigId, UnitError> {
    let id = match text.as_bytes() {
        [digit @ b'0'..=b'9'] => ConfigId::new(digit - b'0'),
        _ => None,
    };
    id.ok_or(UnitError::ConfigId)
}

/// Writes a duration of whole milliseconds so that [`parse_duration`] reads the same.
#[must_use]
pub fn display_duration(duration: Duration) -> String {
    let millis = duration.as_millis();
    for (unit, factor) in [("h", 3_600_000), ("s", 1_000)] {
        if millis > 0 && millis.is_multiple_of(factor) {
            return format!("{}{unit}", millis / factor);
        }
    }
    format!("{millis}ms")
}

/// What a duration in some other notation comes to, such as `1h30m`, `1.5 s` or `5sec`: to be offered
/// to whoever wrote it.
pub(crate) fn guess_duration(text: &str) -> Option<Duration> {
    const UNITS: [(&str, f64); 22] = [
        ("ms", 1.0),
        ("msec", 1.0),
        ("msecs", 1.0),
        ("millisecond", 1.0),
        ("milliseconds", 1.0),
        ("s", 1e3),
        ("sec", 1e3),
        ("secs", 1e3),
        ("second", 1e3),
        ("seconds", 1e3),
        ("m", 60e3),
        ("min", 60e3),
        ("mins", 60e3),
        ("minute", 60e3),
        ("minutes", 60e3),
        ("h", 3600e3),
        ("hr", 3600e3),
        ("hour", 3600e3),
        ("hours", 3600e3),
        ("d", 86_400e3),
        ("day", 86_400e3),
        ("days", 86_400e3),
    ];
    let (mut rest, mut total) = (text.trim().to_ascii_lowercase(), 0.0);
    if rest.is_empty() || rest.len() > 40 {
        return None;
    }
    while !rest.is_empty() {
        let number_len = rest.bytes().take_while(|b| b.is_ascii_digit() || *b == b'.').count();
        let number: f64 = rest[..number_len].parse().ok()?;
        let behind = rest[number_len..].trim_start();
        let unit_len = behind.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (_, factor) = UNITS.iter().find(|(name, _)| *name == &behind[..unit_len])?;
        total += number * factor;
        rest = behind[unit_len..].trim_start_matches([' ', ',']).to_owned();
    }
    let duration = Duration::try_from_secs_f64(total / 1e3).ok()?;
    (total.fract() == 0.0).then_some(duration)
}

/// As [`display_duration`], in minutes too.
pub(crate) fn largest_unit(duration: Duration) -> String {
    let millis = duration.as_millis();
    let fits = |factor: u64| millis > 0 && millis.is_multiple_of(factor.into());
    let unit = DURATION_UNITS.iter().rev().find(|(_, factor)| fits(*factor));
    let (unit, factor) = unit.unwrap_or(&DURATION_UNITS[0]);
    format!("{}{unit}", millis / u128::from(*factor))
}

fn parse(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_a_whole_number_and_a_unit() {
        assert_eq!(parse_duration("200ms"), Ok(Duration::from_millis(200)));
        assert_eq!(parse_duration("5s"), Ok(Duration::from_secs(5)));
        assert_eq!(parse_duration("1m"), Ok(Duration::from_secs(60)));
        assert_eq!(parse_duration("2h"), Ok(Duration::from_secs(7200)));
        for wrong in ["", "5", "s", "5 s", " 5s", "1.5s", "-1s", "5S", "5sec", "1m30s", "٣s"] {
            assert_eq!(parse_duration(wrong), Err(UnitError::Duration), "{wrong}");
        }
        assert_eq!(parse_duration("18446744073709551615h"), Err(UnitError::Duration));
        assert_eq!(parse_duration("99999999999999999999ms"), Err(UnitError::Duration));
    }

    #[test]
    fn other_notations_of_durations_are_understood_well_enough_to_be_answered() {
        for (text, meant) in [
            ("1h30m", "90m"),
            ("1h 30m", "90m"),
            ("90 s", "90s"),
            ("5sec", "5s"),
            ("5S", "5s"),
            ("1.5s", "1500ms"),
            ("2 minutes, 30 seconds", "150s"),
            ("1d", "24h"),
            ("60min", "1h"),
        ] {
            assert_eq!(guess_duration(text).map(largest_unit).as_deref(), Some(meant), "{text}");
        }
        for text in ["", "s", "5", "1.5.5s", "-1s", "5 parsecs", "1e5s", "0.0001s", "٣s", "5ü"] {
            assert_eq!(guess_duration(text), None, "{text}");
        }
        assert_eq!(guess_duration(&format!("{}h", "9".repeat(39))), None);
    }

    #[test]
    fn sizes_need_a_whole_number_and_a_unit() {
        assert_eq!(parse_size("512B"), Ok(512));
        assert_eq!(parse_size("64KiB"), Ok(65_536));
        assert_eq!(parse_size("4MiB"), Ok(4 << 20));
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        for wrong in ["", "64", "64k", "64KB", "64kib", "1.5MiB", "18446744073709551615KiB"] {
            assert_eq!(parse_size(wrong), Err(UnitError::Size), "{wrong}");
        }
    }

    #[test]
    fn durations_survive_being_written() {
        for text in ["0ms", "1500ms", "180s", "24h"] {
            assert_eq!(parse_duration(text).map(display_duration).as_deref(), Ok(text));
        }
    }
}
