//! How many connections may begin in a second: in total, on a listener, from an address, from a
//! network.
//!
//! Everything is counted in cells of eight octets that all workers share without locks. A cell is
//! a token bucket in the form of the generic cell rate algorithm: the time at which the bucket
//! would be full again. It holds what may begin in one second.
//!
//! Sources are counted in a table of fixed size with two rows. Each source has a cell in each row,
//! found by a keyed hash, and is refused only when both say so: whoever shares one cell with a
//! source that does too much still has the other.

use std::{
    hash::Hasher,
    net::IpAddr,
    num::NonZeroU32,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use quic_lb_config::{MAX_LISTENERS, NewConnections};
use siphasher::sip::SipHasher13;

use crate::{client_path::network, verdict::DropReason};

/// Cells of one row: together with the other row, 1 MiB for each kind of source.
const ROW: usize = 1 << 16;
/// What a bucket holds.
const BURST: u64 = 1_000_000_000;

/// The cells.
#[derive(Debug)]
pub(super) struct Limiter {
    seed: [u64; 2],
    epoch: OnceLock<Instant>,
    total: Cell,
    listeners: [Cell; MAX_LISTENERS],
    addresses: OnceLock<Table>,
    networks: OnceLock<Table>,
}

/// The limits of one listener.
#[derive(Clone, Debug)]
pub struct Limits {
    rates: NewConnections,
    listener: usize,
    limiter: Arc<Limiter>,
}

impl Limiter {
    /// Nobody outside should know `seed`.
    pub(super) fn new(seed: [u64; 2]) -> Self {
        Self {
            seed,
            epoch: OnceLock::new(),
            total: Cell::default(),
            listeners: std::array::from_fn(|_| Cell::default()),
            addresses: OnceLock::new(),
            networks: OnceLock::new(),
        }
    }
}

impl Limits {
    pub(super) fn new(rates: &NewConnections, limiter: Arc<Limiter>, listener: usize) -> Self {
        // Here, and not when the first connection begins: memory is taken from the control plane.
        if rates.per_address.is_some() {
            limiter.addresses.get_or_init(Table::new);
        }
        if rates.per_network.is_some() {
            limiter.networks.get_or_init(Table::new);
        }
        Self { rates: *rates, listener, limiter }
    }

    /// Whether there is any.
    pub(super) fn any(&self) -> bool {
        self.rates != NewConnections::default()
    }

    /// Counts a connection that begins, or says which limit forbids it to; then nothing is counted.
    ///
    /// # Errors
    ///
    /// The limit.
    pub(crate) fn take(&self, now: Instant, client: IpAddr) -> Result<(), DropReason> {
        self.visit(now, client, true)
    }

    /// As [`Self::take`], without counting.
    ///
    /// # Errors
    ///
    /// The limit.
    pub(crate) fn peek(&self, now: Instant, client: IpAddr) -> Result<(), DropReason> {
        self.visit(now, client, false)
    }

    fn visit(&self, now: Instant, client: IpAddr, take: bool) -> Result<(), DropReason> {
        if !self.any() {
            return Ok(());
        }
        let limiter = &*self.limiter;
        let epoch = *limiter.epoch.get_or_init(|| now);
        // An hour ahead, so that a full bucket is not before the beginning of time.
        let since = now.saturating_duration_since(epoch) + Duration::from_secs(3600);
        let now = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX / 2);

        let NewConnections { total, per_listener, per_address, per_network } = self.rates;
        let (address, network) = prefixes(client);
        let address = limiter.addresses.get().map(|table| table.cells(limiter.seed, address));
        let network = limiter.networks.get().map(|table| table.cells(limiter.seed, network));
        let (address, network) = (per_address.zip(address), per_network.zip(network));
        let listener = per_listener.zip(limiter.listeners.get(self.listener));
        let total = total.map(|rate| (rate, &limiter.total));

        for (limit, reason) in
            [(address, DropReason::AddressLimit), (network, DropReason::NetworkLimit)]
        {
            if let Some((rate, cells)) = limit
                && !cells.iter().any(|cell| cell.has_room(now, rate))
            {
                return Err(reason);
            }
        }
        for (limit, reason) in
            [(listener, DropReason::ListenerLimit), (total, DropReason::TotalLimit)]
        {
            if let Some((rate, cell)) = limit
                && !cell.has_room(now, rate)
            {
                return Err(reason);
            }
        }
        if take {
            let sources = [address, network].into_iter().flatten();
            sources.for_each(|(rate, cells)| cells.iter().for_each(|cell| cell.take(now, rate)));
            let others = [listener, total].into_iter().flatten();
            others.for_each(|(rate, cell)| cell.take(now, rate));
        }
        Ok(())
    }
}

/// When the bucket would be full again, in nanoseconds.
#[derive(Debug, Default)]
struct Cell(AtomicU64);

impl Cell {
    fn has_room(&self, now: u64, rate: NonZeroU32) -> bool {
        let full_at = self.0.load(Relaxed).max(now);
        full_at - now + interval(rate) <= BURST
    }

    fn take(&self, now: u64, rate: NonZeroU32) {
        // Never beyond an empty bucket: the other cell may have had the room.
        let after = |full_at: u64| Some((full_at.max(now) + interval(rate)).min(now + BURST));
        let _ = self.0.fetch_update(Relaxed, Relaxed, after);
    }
}

/// How long one connection takes to be made up for.
fn interval(rate: NonZeroU32) -> u64 {
    BURST / u64::from(rate.get())
}

#[derive(Debug)]
struct Table([Box<[Cell]>; 2]);

impl Table {
    fn new() -> Self {
        Self(std::array::from_fn(|_| std::iter::repeat_with(Cell::default).take(ROW).collect()))
    }

    fn cells(&self, seed: [u64; 2], prefix: u128) -> [&Cell; 2] {
        let hash = |row: u64| {
            let mut hasher = SipHasher13::new_with_keys(seed[0], seed[1]);
            hasher.write_u64(row);
            hasher.write_u128(prefix);
            hasher.finish()
        };
        #[expect(clippy::cast_possible_truncation, reason = "a row has fewer cells than usize")]
        let at = |hash: u64| (hash % ROW as u64) as usize;
        [&self.0[0][at(hash(0))], &self.0[1][at(hash(1))]]
    }
}

/// The address (IPv4) or its network of 64 bits (IPv6, where a client has at least that), and the
/// network of 24 or 48 bits that one organisation has.
fn prefixes(client: IpAddr) -> (u128, u128) {
    match client.to_canonical() {
        IpAddr::V4(address) => (address.to_ipv6_mapped().to_bits(), network(client)),
        IpAddr::V6(address) => (address.to_bits() >> 64 << 64, network(client)),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn limits(rates: NewConnections) -> Limits {
        Limits::new(&rates, Arc::new(Limiter::new([1, 2])), 0)
    }

    fn per(rate: u32) -> Option<NonZeroU32> {
        NonZeroU32::new(rate)
    }

    fn client(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// How many of `tries` at once may begin.
    fn granted(limits: &Limits, now: Instant, from: &str, tries: usize) -> usize {
        (0..tries).filter(|_| limits.take(now, client(from)).is_ok()).count()
    }

    #[test]
    fn without_limits_everything_may_begin_and_no_table_is_made() {
        let limits = limits(NewConnections::default());
        assert!(!limits.any());
        assert_eq!(granted(&limits, Instant::now(), "192.0.2.1", 100_000), 100_000);
        assert!(limits.limiter.addresses.get().is_none());
    }

    #[test]
    fn a_second_brings_what_the_limit_says_and_no_more() {
        for rate in [1, 3, 100, 7777] {
            let limits = limits(NewConnections { per_address: per(rate), ..Default::default() });
            let start = Instant::now();
            let expected = rate as usize;
            assert_eq!(granted(&limits, start, "192.0.2.1", 20_000), expected, "{rate}");
            // Over ten seconds in small steps, no more than ten times that.
            let steps = (1..=1000).map(|step| start + Duration::from_millis(10 * step));
            let more: usize = steps.map(|at| granted(&limits, at, "192.0.2.1", 1000)).sum();
            assert!((9 * expected..=10 * expected + 10).contains(&more), "{more} of {rate}/s");
            let later = start + Duration::from_secs(3600);
            assert_eq!(granted(&limits, later, "192.0.2.1", 20_000), expected, "{rate}");
        }
    }

    #[test]
    fn sources_are_told_apart_by_what_one_client_has() {
        let now = Instant::now();
        let rates = NewConnections { per_address: per(2), ..Default::default() };
        for (one, same, other) in [
            ("192.0.2.1", "192.0.2.1", "192.0.2.2"),
            ("2001:db8::1", "2001:db8::ffff", "2001:db8:0:1::1"),
            ("::ffff:192.0.2.1", "192.0.2.1", "192.0.2.2"),
        ] {
            let limits = limits(rates);
            assert_eq!(granted(&limits, now, one, 9), 2);
            assert_eq!(granted(&limits, now, same, 9), 0);
            assert_eq!(granted(&limits, now, other, 9), 2);
        }
        let rates = NewConnections { per_network: per(2), ..Default::default() };
        for (one, same, other) in [
            ("192.0.2.1", "192.0.2.254", "192.0.3.1"),
            ("2001:db8::1", "2001:db8:0:ffff::1", "2001:db8:1::1"),
        ] {
            let limits = limits(rates);
            assert_eq!(granted(&limits, now, one, 9), 2);
            assert_eq!(limits.peek(now, client(same)), Err(DropReason::NetworkLimit));
            assert_eq!(granted(&limits, now, other, 9), 2);
        }
    }

    #[test]
    fn what_one_limit_refuses_is_not_counted_by_the_others() {
        let now = Instant::now();
        let rates = NewConnections {
            total: per(10),
            per_listener: per(5),
            per_address: per(2),
            per_network: per(4),
        };
        let limits = limits(rates);
        let take = |from: &str| limits.take(now, client(from));
        assert_eq!(granted(&limits, now, "192.0.2.1", 100), 2);
        assert_eq!(take("192.0.2.1"), Err(DropReason::AddressLimit));
        assert_eq!(granted(&limits, now, "192.0.2.2", 100), 2);
        assert_eq!(take("192.0.2.3"), Err(DropReason::NetworkLimit));
        assert_eq!(take("198.51.100.1"), Ok(()));
        assert_eq!(take("198.51.100.1"), Err(DropReason::ListenerLimit));
        let other = Limits { listener: 1, ..limits.clone() };
        for n in 0..5 {
            assert_eq!(other.take(now, client(&format!("203.0.{n}.1"))), Ok(()));
        }
        let third = Limits { listener: 2, ..limits.clone() };
        assert_eq!(third.take(now, client("203.0.113.1")), Err(DropReason::TotalLimit));
    }

    /// A flood from a hundred thousand networks at their limits does not shut out most others.
    #[test]
    fn a_full_table_refuses_few_of_those_that_do_little() {
        let limits = limits(NewConnections { per_address: per(4), ..Default::default() });
        let now = Instant::now();
        for n in 0..20_000u32 {
            let flood = IpAddr::V4(Ipv4Addr::from_bits(0x0a00_0000 + n));
            assert!((0..8).any(|_| limits.take(now, flood).is_err()));
        }
        let refused = (0..10_000u32).filter(|n| {
            limits.take(now, IpAddr::V4(Ipv4Addr::from_bits(0xc000_0000 + n))).is_err()
        });
        // Both cells taken: (1 - e^(-20000/65536))^2 is 7 %.
        assert!(refused.count() < 1_000);
    }
}
