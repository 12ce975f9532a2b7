//! A record as a line: a JSON object, or text for people. Nothing in it needs to be escaped: names are made of few characters, and
//! all else are numbers and words of this program.

use std::{
    io::{self, Write as _},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use quic_lb_config::LogFormat;

use super::{
    names::Names,
    record::{Begun, End, Record},
};
use crate::{client_path::ClientAddr, verdict::Opening};

/// One moment on both clocks.
#[derive(Clone, Copy)]
pub(super) struct Clocks {
    pub(super) now: Instant,
    pub(super) unix: SystemTime,
}

/// A clock that is off by so much was set. Less is left as it is, so that a moment is the same in each record that has it.
const SET: Duration = Duration::from_millis(5);

impl Clocks {
    /// Goes on with what clocks say `now`, if one was set.
    pub(super) fn follow(&mut self, now: Self) {
        let unix = now.unix.duration_since(UNIX_EPOCH).unwrap_or_default();
        let expected = self.unix.duration_since(UNIX_EPOCH).unwrap_or_default()
            + now.now.saturating_duration_since(self.now);
        if unix.abs_diff(expected) >= SET {
            *self = now;
        }
    }

    /// Since 1970.
    fn of(&self, moment: Instant) -> Duration {
        let unix = self.unix.duration_since(UNIX_EPOCH).unwrap_or_default();
        match moment.checked_duration_since(self.now) {
            Some(after) => unix + after,
            None => unix.saturating_sub(self.now.saturating_duration_since(moment)),
        }
    }
}

/// Appends a record and a line break.
pub(super) fn write(
    out: &mut Vec<u8>,
    format: LogFormat,
    record: &Record,
    names: &Names,
    clocks: &Clocks,
) {
    // Memory takes everything.
    let _ = match format {
        LogFormat::Json => json(out, record, names, clocks),
        LogFormat::Text => text(out, record, names, clocks),
    };
}

fn json(out: &mut Vec<u8>, record: &Record, names: &Names, clocks: &Clocks) -> io::Result<()> {
    let Record { begun, end } = record;
    let ClientAddr(client) = begun.client;
    let (pool, backend) = names.backend(begun.backend);
    let listener = names.listener(begun.listener);
    let at = end.map_or(begun.at, |end| end.at);
    out.extend_from_slice(b"{\"time\":\"");
    time(out, clocks.of(at))?;
    write!(
        out,
        "\",\"event\":\"{}\",\"listener\":\"{listener}\",\"client_address\":\"{}\",\"client_port\":{},\
         \"pool\":\"{pool}\",\"backend\":\"{backend}\",\"rule\":\"{}\",\"opening\":\"{}\"",
        event(end.as_ref()),
        client.ip(),
        client.port(),
        begun.rule.label(),
        opening(begun),
    )?;
    if let Some(version) = begun.version {
        write!(out, ",\"version\":\"{version:#010x}\"")?;
    }
    write!(out, ",\"retry\":{}", begun.retry)?;
    if let Some(End { at, traffic, reason }) = end {
        out.extend_from_slice(b",\"began\":\"");
        time(out, clocks.of(begun.at))?;
        write!(
            out,
            "\",\"duration_ms\":{},\"forwarded_datagrams\":{},\"forwarded_bytes\":{},\
             \"returned_datagrams\":{},\"returned_bytes\":{},\"reason\":\"{}\"",
            at.saturating_duration_since(begun.at).as_millis(),
            traffic.forwarded.datagrams,
            traffic.forwarded.octets,
            traffic.returned.datagrams,
            traffic.returned.octets,
            reason.word(),
        )?;
    }
    out.extend_from_slice(b"}\n");
    Ok(())
}

fn text(out: &mut Vec<u8>, record: &Record, names: &Names, clocks: &Clocks) -> io::Result<()> {
    let Record { begun, end } = record;
    let ClientAddr(client) = begun.client;
    let (pool, backend) = names.backend(begun.backend);
    let listener = names.listener(begun.listener);
    time(out, clocks.of(end.map_or(begun.at, |end| end.at)))?;
    write!(
        out,
        " {} {listener} {client} -> {pool}/{backend} rule={} opening={}",
        event(end.as_ref()),
        begun.rule.label(),
        opening(begun),
    )?;
    if let Some(version) = begun.version {
        write!(out, " version={version:#010x}")?;
    }
    write!(out, " retry={}", begun.retry)?;
    if let Some(End { at, traffic, reason }) = end {
        write!(
            out,
            " duration_ms={} forwarded_datagrams={} forwarded_bytes={} returned_datagrams={} \
             returned_bytes={} reason={}",
            at.saturating_duration_since(begun.at).as_millis(),
            traffic.forwarded.datagrams,
            traffic.forwarded.octets,
            traffic.returned.datagrams,
            traffic.returned.octets,
            reason.word(),
        )?;
    }
    out.push(b'\n');
    Ok(())
}

const fn event(end: Option<&End>) -> &'static str {
    if end.is_some() { "ended" } else { "begun" }
}

const fn opening(begun: &Begun) -> &'static str {
    match begun.opening {
        Opening::New => "new",
        Opening::PathChange => "path_change",
    }
}

/// A time since 1970 as RFC 3339 has it, in UTC.
fn time(out: &mut Vec<u8>, since_1970: Duration) -> io::Result<()> {
    const DAY: u64 = 86_400;
    let seconds = since_1970.as_secs();
    let (year, month, day) = date(seconds / DAY);
    let (hour, minute, second) = (seconds % DAY / 3_600, seconds % 3_600 / 60, seconds % 60);
    let micros = since_1970.subsec_micros();
    write!(out, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
}

/// Year, month and day, so many days after the first of 1970. Years begin in March here, so that what differs between them is at
/// their end; and 400 of them are always as long.
const fn date(days: u64) -> (u64, u64, u64) {
    const OF_400_YEARS: u64 = 146_097;
    const OF_100_YEARS: u64 = 36_524;
    const OF_4_YEARS: u64 = 1_461;
    /// From March of the year 0 to 1970.
    const BEFORE_1970: u64 = 719_468;
    let days = days + BEFORE_1970;
    let (era, day) = (days / OF_400_YEARS, days % OF_400_YEARS);
    let leap_days = day / (OF_4_YEARS - 1) - day / OF_100_YEARS + day / (OF_400_YEARS - 1);
    let year = (day - leap_days) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // From March on, five months have 153 days.
    let month = (5 * day + 2) / 153;
    let day_of_month = day - (153 * month + 2) / 5 + 1;
    let (month, is_next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year + is_next, month, day_of_month)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        backend::BackendState,
        client_path::ListenerIndex,
        connection_log::record::{EndReason, Traffic},
        fixtures,
        registry::Registry,
        routing::Routing,
        verdict::Rule,
    };

    #[test]
    fn days_are_those_of_the_calendar() {
        for (days, expected) in [
            (0, (1970, 1, 1)),
            (58, (1970, 2, 28)),
            (59, (1970, 3, 1)),
            (789, (1972, 2, 29)),
            (11_016, (2000, 2, 29)),
            (11_017, (2000, 3, 1)),
            (20_788, (2026, 12, 1)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
        ] {
            assert_eq!(date(days), expected, "{days}");
        }
        let mut before = date(0);
        for days in 1..200_000 {
            let (year, month, day) = date(days);
            let follows = match before {
                (y, m, d) if (y, m) == (year, month) => day == d + 1,
                (y, m, d) => day == 1 && d >= 28 && (y * 12 + m + 1 == year * 12 + month),
            };
            assert!(follows, "{before:?} is not before {:?}", (year, month, day));
            before = (year, month, day);
        }
    }

    #[test]
    fn a_clock_that_is_set_is_followed_and_one_that_wavers_is_not() {
        let (now, unix) = (Instant::now(), UNIX_EPOCH + Duration::from_secs(1_000));
        let mut clocks = Clocks { now, unix };
        let moment = now + Duration::from_secs(3);
        let before = clocks.of(moment);
        assert_eq!(before, Duration::from_secs(1_003));
        let later = |millis| Clocks {
            now: now + Duration::from_secs(10),
            unix: unix + Duration::from_millis(millis),
        };
        clocks.follow(later(10_004));
        assert_eq!(clocks.of(moment), before);
        clocks.follow(later(9_000));
        assert_eq!(clocks.of(moment), Duration::from_secs(1_002));
        clocks.follow(later(13_600_000));
        assert_eq!(clocks.of(moment), Duration::from_secs(14_593));
    }

    #[test]
    fn a_record_is_a_line() {
        let mut registry = Registry::default();
        let config = fixtures::config(true);
        let routing = Routing::new(&config, &mut registry, |_, _| BackendState::Active);
        let backend = routing.backends().next().unwrap().id;
        let mut names = Names::new();
        names.see(&Arc::new(routing));
        let now = Instant::now() + Duration::from_secs(10);
        let clocks = Clocks { now, unix: UNIX_EPOCH + Duration::from_millis(1_796_116_621_500) };
        let begun = Begun {
            at: now - Duration::from_millis(1_250),
            listener: ListenerIndex(0),
            client: ([192, 0, 2, 1], 4242).into(),
            backend,
            rule: Rule::Fallback,
            opening: Opening::New,
            version: Some(1),
            retry: true,
        };
        let mut traffic = Traffic::default();
        traffic.forwarded.add(3, 1_300);
        traffic.returned.add(5, 6_000);
        let end = End { at: now, traffic, reason: EndReason::Moved };
        let line = |format, record| {
            let mut out = vec![];
            write(&mut out, format, &record, &names, &clocks);
            String::from_utf8(out).unwrap()
        };
        let first = line(LogFormat::Json, Record { begun, end: None });
        assert_eq!(
            first,
            "{\"time\":\"2026-12-01T09:17:00.250000Z\",\"event\":\"begun\",\"listener\":\"edge\",\
             \"client_address\":\"192.0.2.1\",\"client_port\":4242,\"pool\":\"web\",\"backend\":\"a\",\
             \"rule\":\"fallback\",\"opening\":\"new\",\"version\":\"0x00000001\",\"retry\":true}\n"
        );
        let last = line(LogFormat::Json, Record { begun, end: Some(end) });
        let last: serde_json::Value = serde_json::from_str(&last).unwrap();
        assert_eq!(last["event"], "ended");
        assert_eq!(last["time"], "2026-12-01T09:17:01.500000Z");
        assert_eq!(last["began"], "2026-12-01T09:17:00.250000Z");
        for (key, value) in [
            ("duration_ms", 1_250),
            ("forwarded_datagrams", 3),
            ("forwarded_bytes", 1_300),
            ("returned_datagrams", 5),
            ("returned_bytes", 6_000),
        ] {
            assert_eq!(last[key], value, "{key}");
        }
        assert_eq!(last["reason"], "moved");
        let short = Begun { version: None, opening: Opening::PathChange, ..begun };
        assert_eq!(
            line(LogFormat::Text, Record { begun: short, end: None }),
            "2026-12-01T09:17:00.250000Z begun edge 192.0.2.1:4242 -> web/a rule=fallback \
             opening=path_change retry=true\n"
        );
    }
}
