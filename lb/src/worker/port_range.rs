//! Which local ports a worker may take for its upstream sockets.
//!
//! The system says which ports are for connections that programs open. They are dealt out to the workers one by
//! one, so that a port which one of them lets rest is not taken by another meanwhile.

use std::{fs, io, ops::RangeInclusive};

const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
const RESERVED: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";

/// What Linux has where nobody has said otherwise.
const DEFAULT: RangeInclusive<u16> = 32_768..=60_999;

/// The ports that all workers together may take.
#[derive(Clone, Debug)]
pub(super) struct PortRange {
    ports: Vec<u16>,
}

impl PortRange {
    /// As the system says, without those that are reserved for somebody.
    pub(super) fn of_the_system() -> Self {
        let range = fs::read_to_string(RANGE).ok().and_then(|text| range(&text));
        let reserved = fs::read_to_string(RESERVED).unwrap_or_default();
        Self::new(range.unwrap_or(DEFAULT), &reserved)
    }

    fn new(range: RangeInclusive<u16>, reserved: &str) -> Self {
        let reserved: Vec<_> = reserved.trim().split(',').filter_map(span).collect();
        let is_free = |port: &u16| !reserved.iter().any(|span| span.contains(port));
        Self { ports: range.filter(is_free).collect() }
    }

    /// The share of worker number `worker` of `workers`, beginning somewhere.
    #[expect(clippy::disallowed_methods, reason = "the shell draws where a worker begins")]
    pub(super) fn share(&self, worker: usize, workers: usize) -> io::Result<Vec<u16>> {
        let mut ports: Vec<_> = self.ports.iter().copied().skip(worker).step_by(workers).collect();
        if let Some(len) = u32::try_from(ports.len()).ok().filter(|&len| len > 0) {
            // Whoever ran here before may have left connections behind on the first ones.
            let from = getrandom::u32().map_err(io::Error::other)? % len;
            ports.rotate_left(from as usize);
        }
        Ok(ports)
    }
}

/// "32768\t60999".
fn range(text: &str) -> Option<RangeInclusive<u16>> {
    let mut ends = text.split_whitespace().map(str::parse);
    match (ends.next()?, ends.next()?) {
        (Ok(first), Ok(last)) if first <= last && first > 0 => Some(first..=last),
        _ => None,
    }
}

/// "8080", "9148-9200".
fn span(text: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    Some(first.parse().ok()?..=last.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ports_are_those_of_the_system_without_reserved_ones() {
        assert_eq!(range("32768\t60999\n"), Some(32_768..=60_999));
        assert_eq!(range("0 5\n"), None);
        assert_eq!(range("7"), None);
        let ports = PortRange::new(100..=110, "101,103-105,9000\n").ports;
        assert_eq!(ports, [100, 102, 106, 107, 108, 109, 110]);
        assert_eq!(PortRange::new(100..=102, "\n").ports, [100, 101, 102]);
        assert!(PortRange::of_the_system().ports.len() > 1);
    }

    #[test]
    fn workers_share_no_port_and_leave_none() {
        let range = PortRange::new(100..=120, "");
        let mut all: Vec<_> = (0..4).flat_map(|worker| range.share(worker, 4).unwrap()).collect();
        all.sort_unstable();
        assert_eq!(all, range.ports);
        assert!(range.share(30, 31).unwrap().is_empty());
    }
}
