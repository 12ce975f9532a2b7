//! One direction of a link: delay, rate and queue, and everything that may happen to a datagram.

use std::time::Duration;

use quic::transport::Ecn;

use super::{Packet, rng::Rng};

/// What a link does, by configuration. Probabilities are in parts per million.
#[derive(Clone, Debug)]
pub struct LinkConfig {
    /// How long every datagram takes.
    pub delay: Duration,
    /// A random addition to it, up to this. Datagrams keep their order.
    pub jitter: Duration,
    /// Octets per second; 0 for no limit.
    pub rate: u64,
    /// Datagrams that wait for the link; more are lost.
    pub queue: usize,
    /// Losses.
    pub loss: u32,
    /// Losses, or corruptions, in a row at most.
    pub burst: u32,
    /// Corruptions: one of the first 50 octets is replaced.
    pub corrupt: u32,
    /// Duplicates.
    pub duplicate: u32,
    /// Datagrams held back so that later ones overtake them.
    pub reorder: u32,
    /// CE marks on datagrams that carry ECT.
    pub mark: u32,
    /// What happens to ECN marks.
    pub ecn: EcnTreatment,
    /// The largest datagram.
    pub mtu: usize,
    /// On and off times: nothing passes while it is off.
    pub blackout: Option<(Duration, Duration)>,
    /// Datagrams to drop, counted from 1.
    pub drop_list: std::ops::RangeInclusive<u64>,
}

impl Default for LinkConfig {
    /// 15 ms, 10 Mbit/s, 25 datagrams: what the interop runner calls simple.
    fn default() -> Self {
        Self {
            delay: Duration::from_millis(15),
            jitter: Duration::ZERO,
            rate: 1_250_000,
            queue: 25,
            loss: 0,
            burst: 3,
            corrupt: 0,
            duplicate: 0,
            reorder: 0,
            mark: 0,
            ecn: EcnTreatment::Kept,
            mtu: 1500 - 28,
            blackout: None,
            #[expect(clippy::reversed_empty_ranges, reason = "none")]
            drop_list: 1..=0,
        }
    }
}

/// What a link does to ECN marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EcnTreatment {
    /// Lets them pass, apart from CE marks.
    Kept,
    /// Takes them away.
    Bleached,
    /// Makes all of them this.
    Replaced(Ecn),
}

/// A link at work.
#[derive(Debug)]
pub struct Link {
    /// May be changed at any time.
    pub config: LinkConfig,
    busy_until: Duration,
    last_arrival: Duration,
    queued: std::collections::VecDeque<Duration>,
    in_a_row: u32,
    count: u64,
    /// Datagrams that went in, and octets.
    pub carried: (u64, u64),
    /// Datagrams that did not come out.
    pub lost: u64,
}

impl Link {
    /// A new one.
    #[must_use]
    pub const fn new(config: LinkConfig) -> Self {
        Self {
            config,
            busy_until: Duration::ZERO,
            last_arrival: Duration::ZERO,
            queued: std::collections::VecDeque::new(),
            in_a_row: 0,
            count: 0,
            carried: (0, 0),
            lost: 0,
        }
    }

    /// Sends a datagram; appends when it, and any duplicate, arrive.
    pub fn send(
        &mut self,
        now: Duration,
        mut packet: Packet,
        rng: &mut Rng,
        arrivals: &mut Vec<(Duration, Packet)>,
    ) {
        self.count += 1;
        self.carried.0 += 1;
        self.carried.1 += packet.octets.len() as u64;
        let Some(sent) = self.admit(now, &mut packet, rng) else {
            self.lost += 1;
            return;
        };
        let config = &self.config;
        let jitter = config.jitter.mul_f64(rng.below(1000) as f64 / 1000.0);
        let mut arrival = sent + config.delay + jitter;
        if rng.chance(config.reorder) {
            arrival += config.delay.max(Duration::from_millis(1)) / 2;
        } else {
            arrival = arrival.max(self.last_arrival);
            self.last_arrival = arrival;
        }
        if rng.chance(config.duplicate) {
            arrivals.push((arrival + Duration::from_micros(100), packet.clone()));
        }
        arrivals.push((arrival, packet));
    }

    /// When the datagram has left the queue; `None` when it is lost.
    fn admit(&mut self, now: Duration, packet: &mut Packet, rng: &mut Rng) -> Option<Duration> {
        let config = &self.config;
        if config.drop_list.contains(&self.count) || packet.octets.len() > config.mtu {
            return None;
        }
        if let Some((on, off)) = config.blackout {
            let cycle = (on + off).as_nanos();
            if now.as_nanos() % cycle >= on.as_nanos() {
                return None;
            }
        }
        let unlucky = self.in_a_row < config.burst;
        if unlucky && rng.chance(config.loss) {
            self.in_a_row += 1;
            return None;
        }
        if unlucky && rng.chance(config.corrupt) && !is_version_negotiation(&packet.octets) {
            self.in_a_row += 1;
            let place = rng.below(packet.octets.len().min(50) as u64);
            #[expect(clippy::cast_possible_truncation, reason = "below 256, below 50")]
            {
                packet.octets[place as usize] ^= 1 + rng.below(255) as u8;
            }
        } else {
            self.in_a_row = 0;
        }
        if packet.ecn.is_some() {
            packet.ecn = match config.ecn {
                EcnTreatment::Bleached => None,
                EcnTreatment::Replaced(mark) => Some(mark),
                EcnTreatment::Kept if rng.chance(config.mark) => Some(Ecn::Ce),
                EcnTreatment::Kept => packet.ecn,
            };
        }
        if config.rate == 0 {
            return Some(now);
        }
        while self.queued.front().is_some_and(|&left| left <= now) {
            self.queued.pop_front();
        }
        if self.queued.len() >= config.queue {
            return None;
        }
        let nanos = packet.octets.len() as u64 * 1_000_000_000 / config.rate;
        self.busy_until = self.busy_until.max(now) + Duration::from_nanos(nanos);
        self.queued.push_back(self.busy_until);
        Some(self.busy_until)
    }
}

fn is_version_negotiation(octets: &[u8]) -> bool {
    octets.first().is_some_and(|first| first & 0x80 != 0) && octets.get(1..5) == Some(&[0; 4])
}
