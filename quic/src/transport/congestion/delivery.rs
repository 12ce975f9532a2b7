//! At what rate a path delivers: what controllers that model the path, as BBR does, live by.
//!
//! Every packet takes along what had been delivered when it left. Its acknowledgment then says how
//! much was delivered since, and in what time: no faster than it was sent, and no faster than it was
//! acknowledged, so that acknowledgments that arrive in a bunch do not look like a fast path.
//!
//! draft-ietf-ccwg-bbr-02, section 4.1

use std::time::{Duration, Instant};

/// What was delivered on a path, and what that says about its rate.
#[derive(Clone, Debug, Default)]
pub(crate) struct Delivery {
    /// Octets acknowledged so far; C.delivered.
    delivered: u64,
    /// When that last grew, or the flight began; C.delivered_time.
    delivered_time: Option<Instant>,
    /// When the packet left whose acknowledgment is the newest, or the first of the flight;
    /// C.first_send_time.
    first_sent_time: Option<Instant>,
    /// Octets lost so far; C.lost.
    lost: u64,
    /// Up to how many octets delivered the application was the limit; 0 when it is not.
    /// C.app_limited.
    app_limited_until: u64,
    /// The newest packet of the ACK frame at hand.
    newest: Option<Stamp>,
    newly_delivered: u64,
    newly_lost: u64,
}

/// What a packet takes along when it leaves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stamp {
    /// When that was.
    pub(crate) at: Instant,
    /// Its octets.
    pub(crate) size: u16,
    delivered: u64,
    delivered_time: Instant,
    first_sent_time: Instant,
    lost: u64,
    /// Octets in flight, the packet's own included.
    in_flight: u32,
    app_limited: bool,
}

/// How fast the path delivered, as one ACK frame shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateSample {
    /// Octets delivered on the path when the packet left that this is about, the newest one that
    /// was acknowledged. A round trip is over when this passes what was delivered at its start.
    pub prior_delivered: u64,
    /// Octets delivered since.
    pub delivered: u64,
    /// In what time: that of sending or that of acknowledging, whichever was longer.
    pub interval: Duration,
    /// Octets found lost since the packet left.
    pub lost: u64,
    /// Octets in flight when it had left.
    pub in_flight: u64,
    /// Whether the application had too little to send: then the path may be faster than this.
    pub app_limited: bool,
}

impl RateSample {
    /// Octets per second.
    #[must_use]
    pub fn rate(&self) -> u64 {
        let nanos = self.interval.as_nanos().max(1);
        let rate = u128::from(self.delivered) * 1_000_000_000 / nanos;
        u64::try_from(rate).unwrap_or(u64::MAX)
    }
}

/// What [`Delivery::on_ack_end`] gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Octets since the last one.
    pub(crate) acked: u64,
    pub(crate) lost: u64,
    /// Octets in all.
    pub(crate) delivered: u64,
    /// `None` when the times are too short to mean anything.
    pub(crate) rate: Option<RateSample>,
}

impl Delivery {
    /// Stamps a packet of `size` octets that leaves at `now`, while others of `in_flight` octets
    /// are in flight.
    pub(crate) fn on_sent(&mut self, now: Instant, size: u16, in_flight: u64) -> Stamp {
        if in_flight == 0 {
            // Idle time is no time of sending.
            (self.first_sent_time, self.delivered_time) = (Some(now), Some(now));
        }
        Stamp {
            at: now,
            size,
            delivered: self.delivered,
            delivered_time: *self.delivered_time.get_or_insert(now),
            first_sent_time: *self.first_sent_time.get_or_insert(now),
            lost: self.lost,
            in_flight: u32::try_from(in_flight + u64::from(size)).unwrap_or(u32::MAX),
            app_limited: self.is_app_limited(),
        }
    }

    /// The application has nothing more to send now, though the window has room: what is sent until
    /// these `in_flight` octets are delivered does not show what the path can do.
    pub(crate) fn on_app_limited(&mut self, in_flight: u64) {
        self.app_limited_until = (self.delivered + in_flight).max(1);
    }

    /// A packet with this stamp was acknowledged.
    pub(crate) fn on_acked(&mut self, now: Instant, stamp: &Stamp) {
        self.delivered += u64::from(stamp.size);
        self.newly_delivered += u64::from(stamp.size);
        self.delivered_time = Some(now);
        if self.newest.is_none_or(|newest| stamp.at > newest.at) {
            self.newest = Some(*stamp);
        }
    }

    /// A packet with this stamp is lost. Returns the octets found lost since it left, its own
    /// included.
    pub(crate) fn on_lost(&mut self, stamp: &Stamp) -> u64 {
        self.lost += u64::from(stamp.size);
        self.newly_lost += u64::from(stamp.size);
        self.lost.saturating_sub(stamp.lost)
    }

    /// All packets of an ACK frame are accounted for; `None` when none was of this path.
    pub(crate) fn on_ack_end(&mut self, min_rtt: Duration) -> Option<Progress> {
        let stamp = self.newest.take()?;
        self.first_sent_time = Some(stamp.at);
        if self.delivered > self.app_limited_until {
            self.app_limited_until = 0;
        }
        let sending = stamp.at.saturating_duration_since(stamp.first_sent_time);
        let acking = self.delivered_time.map_or(Duration::ZERO, |delivered| {
            delivered.saturating_duration_since(stamp.delivered_time)
        });
        let interval = sending.max(acking);
        let rate = (interval >= min_rtt && !interval.is_zero()).then(|| RateSample {
            prior_delivered: stamp.delivered,
            delivered: self.delivered.saturating_sub(stamp.delivered),
            interval,
            lost: self.lost.saturating_sub(stamp.lost),
            in_flight: stamp.in_flight(),
            app_limited: stamp.app_limited,
        });
        Some(Progress {
            acked: std::mem::take(&mut self.newly_delivered),
            lost: std::mem::take(&mut self.newly_lost),
            delivered: self.delivered,
            rate,
        })
    }

    /// Whether what leaves now does not show what the path can do.
    pub(crate) const fn is_app_limited(&self) -> bool {
        self.app_limited_until > 0
    }
}

impl Stamp {
    /// Octets that were in flight when the packet had left.
    pub(crate) fn in_flight(&self) -> u64 {
        u64::from(self.in_flight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u16 = 1000;
    const RTT: Duration = Duration::from_millis(100);

    const fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    /// A path whose packets are acknowledged when a test says so.
    struct Flight {
        start: Instant,
        delivery: Delivery,
        in_flight: u64,
        sent: Vec<Stamp>,
    }

    impl Flight {
        fn new() -> Self {
            Self {
                start: Instant::now(),
                delivery: Delivery::default(),
                in_flight: 0,
                sent: vec![],
            }
        }

        /// Sends a packet after so many milliseconds, counted from the start.
        fn send(&mut self, at: u64) {
            let now = self.start + ms(at);
            let stamp = self.delivery.on_sent(now, SIZE, self.in_flight);
            self.in_flight += u64::from(SIZE);
            self.sent.push(stamp);
        }

        /// One ACK frame for packets by their position, the highest first.
        fn ack(&mut self, at: u64, packets: impl IntoIterator<Item = usize>) -> Progress {
            for packet in packets {
                self.in_flight -= u64::from(SIZE);
                self.delivery.on_acked(self.start + ms(at), &self.sent[packet]);
            }
            self.delivery.on_ack_end(RTT).expect("packets")
        }

        fn lose(&mut self, packet: usize) -> u64 {
            self.in_flight -= u64::from(SIZE);
            self.delivery.on_lost(&self.sent[packet])
        }
    }

    #[test]
    fn a_steady_sender_is_measured_at_the_rate_it_sends_at() {
        // A packet each 10 ms, each acknowledged 100 ms later.
        let mut flight = Flight::new();
        for step in 0..50usize {
            let at = 10 * step as u64;
            if step >= 10 {
                let progress = flight.ack(at, [step - 10]);
                assert_eq!((progress.acked, progress.lost), (1000, 0));
                assert_eq!(progress.delivered, 1000 * (step as u64 - 9));
                let rate = progress.rate.expect("a round trip");
                if step >= 20 {
                    assert_eq!(rate.rate(), 100_000, "step {step}: {rate:?}");
                    assert_eq!((rate.delivered, rate.interval), (10_000, RTT));
                    assert_eq!(rate.prior_delivered + rate.delivered, progress.delivered);
                }
                assert!(!rate.app_limited && rate.lost == 0);
            }
            flight.send(at);
        }
    }

    #[test]
    fn the_first_round_trip_counts_from_its_first_packet() {
        let mut flight = Flight::new();
        for _ in 0..10 {
            flight.send(0);
        }
        let rate = flight.ack(100, (0..10).rev()).rate.unwrap();
        assert_eq!((rate.delivered, rate.interval, rate.rate()), (10_000, RTT, 100_000));
        assert_eq!((rate.prior_delivered, rate.in_flight), (0, 10_000));
    }

    #[test]
    fn idle_time_is_no_time_of_sending() {
        let mut flight = Flight::new();
        flight.send(0);
        flight.ack(100, [0]);
        flight.send(60_000);
        flight.send(60_000);
        let rate = flight.ack(60_100, [2, 1]).rate.unwrap();
        assert_eq!((rate.delivered, rate.interval), (2000, RTT));
    }

    #[test]
    fn samples_are_marked_until_what_was_in_flight_when_data_ran_out_is_delivered() {
        let mut flight = Flight::new();
        flight.send(0);
        flight.send(0);
        assert!(!flight.delivery.is_app_limited());
        flight.delivery.on_app_limited(flight.in_flight);
        flight.send(50);
        assert!(!flight.ack(100, [1, 0]).rate.unwrap().app_limited, "they left before");
        // Exactly what was in flight is delivered: only the packet after it ends the phase.
        assert!(flight.delivery.is_app_limited());
        flight.send(120);
        assert!(flight.ack(150, [2]).rate.unwrap().app_limited);
        assert!(!flight.delivery.is_app_limited());
        assert!(flight.ack(220, [3]).rate.unwrap().app_limited, "it left before that");
        flight.send(300);
        assert!(!flight.ack(400, [4]).rate.unwrap().app_limited);
    }

    #[test]
    fn an_application_that_never_sent_is_the_limit_too() {
        let mut delivery = Delivery::default();
        delivery.on_app_limited(0);
        assert!(delivery.is_app_limited());
    }

    #[test]
    fn acknowledgments_in_a_bunch_do_not_look_like_a_fast_path() {
        // A packet each 10 ms; the acknowledgments of ten wait for each other.
        let mut flight = Flight::new();
        for step in 0..30 {
            if step == 20 {
                flight.ack(200, (0..10).rev());
            }
            flight.send(10 * step);
        }
        for (after, packet) in (10..20).enumerate() {
            let rate = flight.ack(300 + after as u64 / 10, [packet]).rate.unwrap();
            assert!(rate.rate() <= 100_000, "packet {packet}: {rate:?}");
        }
        // Twenty were acknowledged in the last 120 ms. It took 200 to send them.
        let rate = flight.ack(320, (20..30).rev()).rate.unwrap();
        assert_eq!((rate.delivered, rate.interval), (20_000, ms(200)));
    }

    #[test]
    fn what_is_lost_was_not_delivered_and_is_told_apart() {
        let mut flight = Flight::new();
        for step in 0..10 {
            flight.send(10 * step);
        }
        assert_eq!(flight.lose(2), 1000);
        assert_eq!(flight.lose(3), 2000);
        let progress = flight.ack(190, [9, 8, 7, 6, 5, 4, 1, 0]);
        assert_eq!((progress.acked, progress.lost, progress.delivered), (8000, 2000, 8000));
        let rate = progress.rate.unwrap();
        assert_eq!((rate.delivered, rate.lost, rate.interval), (8000, 2000, ms(190)));
        flight.send(200);
        let progress = flight.ack(300, [10]);
        assert_eq!((progress.lost, progress.rate.unwrap().lost), (0, 0), "told once");
    }

    #[test]
    fn times_below_a_round_trip_give_no_rate() {
        let mut flight = Flight::new();
        flight.send(0);
        assert_eq!(flight.ack(99, [0]).rate, None);
        assert_eq!(flight.delivery.on_ack_end(RTT), None, "no ACK, no progress");
    }
}
