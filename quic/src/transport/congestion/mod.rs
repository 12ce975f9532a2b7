//! Congestion control: how many octets may be in flight on a path.
//!
//! One small trait, two controllers: [`NewReno`] as RFC 9002 describes it and [`Cubic`] after
//! RFC 9438. Loss detection and pacing are elsewhere; a controller answers with a window, and with a
//! rate if it has one.
//!
//! A controller is told of each packet that leaves, is acknowledged or is lost, and at the end of
//! each ACK frame what the path has delivered and how fast. Those two need little of it: what they
//! do not care about has a default that does nothing.

mod cubic;
mod delivery;
mod new_reno;

use std::time::{Duration, Instant};

pub use cubic::Cubic;
pub use delivery::RateSample;
pub(crate) use delivery::{Delivery, Stamp};
pub use new_reno::NewReno;

/// Which controller new paths get.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Algorithm {
    /// RFC 9438.
    #[default]
    Cubic,
    /// RFC 9002, section 7.
    NewReno,
}

impl Algorithm {
    /// A controller in its initial state for datagrams of `datagram` octets.
    #[must_use]
    pub fn controller(self, datagram: u16) -> Box<dyn Controller> {
        match self {
            Self::Cubic => Box::new(Cubic::new(datagram)),
            Self::NewReno => Box::new(NewReno::new(datagram)),
        }
    }
}

/// A packet that leaves, as a controller sees it.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// Now.
    pub now: Instant,
    /// Its octets.
    pub size: u64,
    /// Octets in flight besides it; none, when sending begins anew.
    pub in_flight: u64,
    /// Whether the application has had too little to send lately.
    pub app_limited: bool,
}

/// A packet's acknowledgment, as a controller sees it.
#[derive(Clone, Copy, Debug)]
pub struct Acked {
    /// Now.
    pub now: Instant,
    /// When the packet was sent.
    pub sent: Instant,
    /// Its octets.
    pub size: u64,
    /// The smoothed round-trip time.
    pub rtt: Duration,
    /// Whether less was in flight than the window allows, so that it says nothing about the path.
    pub app_limited: bool,
}

/// A packet's loss, as a controller sees it.
#[derive(Clone, Copy, Debug)]
pub struct Lost {
    /// Now.
    pub now: Instant,
    /// When the packet was sent.
    pub sent: Instant,
    /// Its octets.
    pub size: u64,
    /// Octets found lost since it left, its own included.
    pub lost: u64,
    /// Octets in flight when it had left.
    pub in_flight: u64,
}

/// What an ACK frame amounts to, as a controller sees it.
#[derive(Clone, Copy, Debug)]
pub struct Delivered {
    /// Now.
    pub now: Instant,
    /// Octets acknowledged by it.
    pub acked: u64,
    /// Octets found lost since the ACK frame before.
    pub lost: u64,
    /// Octets delivered on the path so far.
    pub delivered: u64,
    /// Octets still in flight.
    pub in_flight: u64,
    /// The round-trip time that it gave a sample of, with the peer's delay in it.
    pub rtt: Option<Duration>,
    /// The shortest round-trip time so far.
    pub min_rtt: Duration,
    /// How fast the path has delivered, where that can be told.
    pub rate: Option<RateSample>,
}

/// Decides the congestion window of one path. What is in flight is told, not for it to add up: some
/// packets leave the account without a word, as those do whose keys are gone.
pub trait Controller: Send + std::fmt::Debug {
    /// A packet leaves that will be in flight.
    fn on_sent(&mut self, _sent: &Sent) {}

    /// A packet in flight was acknowledged.
    fn on_acked(&mut self, acked: &Acked);

    /// All packets of an ACK frame were accounted for, acknowledged or lost.
    fn on_delivered(&mut self, _delivered: &Delivered) {}

    /// A packet is lost, other than an MTU probe, which says nothing about congestion. What follows
    /// for all that are lost at once is [`Self::on_congestion`], and after that perhaps
    /// [`Self::on_persistent_congestion`].
    fn on_lost(&mut self, _lost: &Lost) {}

    /// Packets were lost or marked, the latest of them sent at `sent`.
    fn on_congestion(&mut self, now: Instant, sent: Instant);

    /// All packets that the latest reduction of the window was for have arrived after all: it was
    /// for nothing, and can be taken back. Not called where anything else has shown congestion.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9438.html#section-4.9>
    fn on_spurious_congestion(&mut self) {}

    /// Nothing got through for so long that the path has to be learned anew.
    ///
    /// <https://www.rfc-editor.org/rfc/rfc9002.html#section-7.6>
    fn on_persistent_congestion(&mut self);

    /// The path carries datagrams of this size now.
    fn set_datagram(&mut self, datagram: u16);

    /// Octets that may be in flight.
    fn window(&self) -> u64;

    /// Octets per second at which packets should leave. `None` leaves it to the pacer, which
    /// spreads the window over a round trip.
    fn pacing_rate(&self) -> Option<u64> {
        None
    }

    /// Whether the window still grows by what is acknowledged, so that a pacer that spreads it
    /// should leave room.
    fn in_slow_start(&self) -> bool;
}

/// <https://www.rfc-editor.org/rfc/rfc9002.html#section-7.2>
fn initial_window(datagram: u16) -> u64 {
    let datagram = u64::from(datagram);
    (10 * datagram).min((2 * datagram).max(14720))
}

/// <https://www.rfc-editor.org/rfc/rfc9002.html#section-7.2>
fn minimum_window(datagram: u16) -> u64 {
    2 * u64::from(datagram)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both() -> [Box<dyn Controller>; 2] {
        [Algorithm::Cubic, Algorithm::NewReno].map(|algorithm| algorithm.controller(1200))
    }

    fn acked(now: Instant, sent: Instant, app_limited: bool) -> Acked {
        Acked { now, sent, size: 1200, rtt: Duration::from_millis(100), app_limited }
    }

    #[test]
    fn req_k01_windows_start_at_ten_datagrams_and_never_fall_below_two() {
        let now = Instant::now();
        assert_eq!(initial_window(1200), 12000);
        assert_eq!(initial_window(1500), 14720);
        assert_eq!(initial_window(9000), 18000);
        for mut controller in both() {
            assert_eq!(controller.window(), 12000);
            for second in 1..40 {
                let at = now + Duration::from_secs(second);
                controller.on_congestion(at, at);
            }
            assert_eq!(controller.window(), 2400);
        }
    }

    #[test]
    fn req_k03_one_reduction_per_recovery_period() {
        let now = Instant::now();
        let later = now + Duration::from_millis(50);
        for mut controller in both() {
            controller.on_congestion(later, now);
            let reduced = controller.window();
            assert!(reduced < 12000 && !controller.in_slow_start());
            controller.on_congestion(later + Duration::from_millis(1), now);
            assert_eq!(controller.window(), reduced);
            controller
                .on_congestion(later + Duration::from_secs(1), later + Duration::from_millis(1));
            assert!(controller.window() < reduced);
        }
    }

    #[test]
    fn req_k04_no_growth_while_the_application_is_the_limit() {
        let now = Instant::now();
        for mut controller in both() {
            controller.on_acked(&acked(now + Duration::from_millis(100), now, true));
            assert_eq!(controller.window(), 12000);
            controller.on_acked(&acked(now + Duration::from_millis(100), now, false));
            assert_eq!(controller.window(), 13200);
        }
    }

    #[test]
    fn a_reduction_for_nothing_is_taken_back_once_and_to_no_more_than_there_was() {
        let now = Instant::now();
        let at = |millis| now + Duration::from_millis(millis);
        for mut controller in both() {
            controller.on_spurious_congestion();
            assert_eq!(controller.window(), 12000, "nothing to take back");
            controller.on_congestion(at(0), at(0));
            controller.on_congestion(at(200), at(100));
            let reduced = controller.window();
            controller.on_spurious_congestion();
            let restored = controller.window();
            assert!(restored > reduced && restored < 12000);
            controller.on_spurious_congestion();
            assert_eq!(controller.window(), restored, "the one before stands");
            controller.on_congestion(at(400), at(300));
            controller.on_persistent_congestion();
            controller.on_spurious_congestion();
            assert_eq!(controller.window(), 2400);
        }
        for mut controller in both() {
            controller.on_congestion(at(0), at(0));
            controller.on_spurious_congestion();
            assert!(controller.in_slow_start() && controller.window() == 12000);
            // What has grown meanwhile stays.
            controller.on_congestion(at(100), at(100));
            for _ in 0..1000 {
                controller.on_acked(&acked(at(300), at(200), false));
            }
            let grown = controller.window();
            assert!(grown > 12000);
            controller.on_spurious_congestion();
            assert_eq!(controller.window(), grown);
        }
    }

    #[test]
    fn req_k07_a_curve_goes_on_where_it_was_before_a_reduction_for_nothing() {
        let start = Instant::now();
        let rtt = Duration::from_millis(100);
        let grown = |spurious: bool| {
            let mut controller = Cubic::new(1200);
            for _ in 0..190 {
                controller.on_acked(&acked(start, start, false));
            }
            controller.on_congestion(start, start);
            for round in 1..=60u32 {
                let now = start + rtt * round;
                if spurious && round % 10 == 0 {
                    controller.on_congestion(now, now);
                    controller.on_spurious_congestion();
                }
                for _ in 0..controller.window() / 1200 {
                    controller.on_acked(&Acked { rtt, ..acked(now, now, false) });
                }
            }
            controller.window()
        };
        assert_eq!(grown(true), grown(false));
    }

    #[test]
    fn req_j10_persistent_congestion_falls_to_the_minimum_and_starts_over() {
        for mut controller in both() {
            controller.on_persistent_congestion();
            assert_eq!(controller.window(), 2400);
            assert!(controller.in_slow_start());
        }
    }

    #[test]
    fn req_k07_a_collapsed_window_recovers_after_idling() {
        // Loss for a while, then an application that has little to send, then a full pipe: the
        // window has to grow again within twenty round trips.
        let start = Instant::now();
        let rtt = Duration::from_millis(50);
        for mut controller in both() {
            let mut now = start;
            for _ in 0..20 {
                now += rtt;
                controller.on_congestion(now, now);
            }
            for _ in 0..200 {
                now += rtt;
                controller.on_acked(&acked(now, now - rtt, true));
            }
            let before = controller.window();
            for _ in 0..60 {
                now += rtt;
                for _ in 0..(controller.window() / 1200).min(100_000) {
                    controller.on_acked(&Acked { rtt, ..acked(now, now - rtt, false) });
                }
            }
            assert!(controller.window() > 10 * before, "{controller:?}");
        }
    }

    #[test]
    fn req_k07_what_counts_is_octets_and_not_packets() {
        let start = Instant::now();
        let rtt = Duration::from_millis(10);
        for algorithm in [Algorithm::Cubic, Algorithm::NewReno] {
            let grown = [300, 600, 1200].map(|size| {
                let mut controller = algorithm.controller(1200);
                controller.on_congestion(start, start);
                let before = controller.window();
                for round in 1..=20 {
                    let now = start + rtt * round;
                    // Twelve datagrams in each round trip, in packets of this size.
                    for _ in 0..12 * 1200 / size {
                        controller.on_acked(&Acked { size, rtt, ..acked(now, now, false) });
                    }
                }
                controller.window() - before
            });
            assert!(grown[0] > 4 * 1200, "{algorithm:?}: {grown:?}");
            assert!(grown.iter().all(|grown_by| grown_by.abs_diff(grown[0]) <= 1200), "{grown:?}");
        }
    }

    #[test]
    fn req_k07_after_persistent_congestion_cubic_starts_slowly_up_to_four_datagrams_at_least() {
        let now = Instant::now();
        let mut controller = Cubic::new(1200);
        // The window is at its minimum, and a half of it would be less than that.
        for _ in 0..3 {
            controller.on_persistent_congestion();
        }
        let mut grows = vec![];
        for _ in 0..4 {
            grows.push(controller.in_slow_start());
            controller.on_acked(&acked(now, now, false));
        }
        assert_eq!(grows, [true, true, false, false]);
    }

    #[test]
    fn req_k07_datagrams_that_grow_leave_the_window_that_cubic_aims_at_where_it_was() {
        let start = Instant::now();
        let rtt = Duration::from_millis(300);
        let mut controller = Cubic::new(1200);
        for _ in 0..90 {
            controller.on_acked(&acked(start, start, false));
        }
        assert_eq!(controller.window(), 120_000);
        controller.on_congestion(start, start);
        controller.set_datagram(2400);
        // From 35 datagrams back to 50 takes 3.3 s.
        for round in 1..=11 {
            let now = start + rtt * round;
            for _ in 0..(controller.window() / 2400).min(1000) {
                controller.on_acked(&Acked { size: 2400, rtt, ..acked(now, now, false) });
            }
        }
        let window = controller.window();
        assert!((110_000..130_000).contains(&window), "{window}");
    }
}
