//! Section K of the requirements, and what section J says about congestion, over a network.

use super::{
    wire::{Fate, Wire, all_arrive},
    *,
};
use crate::transport::congestion::Algorithm;

const ROUND_TRIP: Duration = Duration::from_millis(100);
/// The search for larger datagrams is off, so that a window is easily counted in them.
const DATAGRAM: u64 = 1200;

fn scene(congestion: Algorithm) -> Scene {
    Scene::with(TransportConfig {
        congestion,
        max_udp_payload: 1200,
        // Nothing but congestion limits what is on its way.
        streams: StreamLimits {
            stream_window: 1 << 30,
            connection_window: 1 << 30,
            ..StreamLimits::default()
        },
        ..TransportConfig::default()
    })
}

fn window(wire: &mut Wire) -> u64 {
    wire.pair.at_server().path().congestion_window
}

/// A connection whose window was opened by a download, and that rests now.
fn opened(congestion: Algorithm) -> Wire {
    let mut wire = Wire::connected(scene(congestion), ROUND_TRIP);
    wire.download(200_000);
    wire.run(Duration::from_secs(3), &mut all_arrive);
    assert_eq!(wire.read, 200_000);
    let window = window(&mut wire);
    assert!((60 * DATAGRAM..200 * DATAGRAM).contains(&window), "{window}");
    wire
}

#[test]
fn req_k05_a_window_leaves_in_bursts_of_ten_datagrams_and_at_the_paced_rate_between() {
    // In slow start two windows per round trip, after a loss five quarters of one.
    for (lossy, gain) in [(false, 2.0), (true, 1.25)] {
        let mut wire = opened(Algorithm::Cubic);
        if lossy {
            let mut count = 0;
            wire.download(40 * 1000);
            wire.run(Duration::from_secs(2), &mut |_, datagram| {
                count += u32::from(!datagram.upward);
                if count == 5 && !datagram.upward { Fate::Lost } else { Fate::Arrives }
            });
        }
        let (start, window) = (wire.pair.now, window(&mut wire));
        let mut left = vec![];
        wire.download(usize::try_from(2 * window).unwrap());
        wire.run(ROUND_TRIP, &mut |_, datagram| {
            if !datagram.upward {
                left.push((datagram.at - start, datagram.bytes.len() as u64));
            }
            Fate::Arrives
        });
        #[expect(clippy::cast_precision_loss, reason = "a few hundred kilobytes")]
        let rate = gain * window as f64 / ROUND_TRIP.as_secs_f64();
        let mut sum = 0;
        for &(at, len) in &left {
            sum += len;
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small")]
            let allowed = 10 * DATAGRAM + (rate * at.as_secs_f64()) as u64;
            assert!(sum <= allowed + DATAGRAM, "{sum} bytes after {at:?}, lossy {lossy}");
        }
        // Pacing spreads the window, and does not hold it back.
        assert!(sum + DATAGRAM > window, "{sum} bytes of {window} in a round trip");
        let at_once = left.iter().filter(|(at, _)| at.is_zero()).count();
        assert!((9..=10).contains(&at_once), "{at_once} datagrams at once");
    }
}

#[test]
fn req_k04_a_window_that_the_application_does_not_fill_does_not_grow() {
    for congestion in [Algorithm::Cubic, Algorithm::NewReno] {
        let mut wire = Wire::connected(scene(congestion), ROUND_TRIP);
        let before = window(&mut wire);
        for _ in 0..50 {
            wire.download(3000);
            wire.run(ROUND_TRIP, &mut all_arrive);
        }
        assert_eq!(wire.read, 150_000);
        assert_eq!(window(&mut wire), before);
        wire.download(100_000);
        wire.run(Duration::from_secs(3), &mut all_arrive);
        assert!(window(&mut wire) > 2 * before, "it grows once it is filled");
    }
}

#[test]
fn a_send_buffer_holds_no_window_back() {
    const BUFFER: usize = 20_000;
    let mut scene = scene(Algorithm::Cubic);
    let mut server = TransportConfig::clone(&scene.server.transport);
    server.streams.send_buffer = BUFFER;
    scene.server.transport = Arc::new(server);
    let mut wire = Wire::connected(scene, ROUND_TRIP);
    let mut most = 0;
    wire.download(1_000_000);
    wire.run(Duration::from_secs(3), &mut |pair, _| {
        most = most.max(pair.at_server().path().in_flight);
        Fate::Arrives
    });
    assert_eq!(wire.read, 1_000_000);
    assert!(most > 10 * BUFFER as u64, "{most} bytes were in flight at most");
}

#[test]
fn req_k03_losses_of_one_flight_reduce_the_window_once() {
    for (congestion, percent) in [(Algorithm::Cubic, 70), (Algorithm::NewReno, 50)] {
        let mut wire = opened(congestion);
        let before = window(&mut wire);
        let mut count = 0;
        wire.download(40 * 1000);
        wire.run(Duration::from_secs(2), &mut |_, datagram| {
            count += u32::from(!datagram.upward);
            let lost = !datagram.upward && [5, 12, 20].contains(&count);
            if lost { Fate::Lost } else { Fate::Arrives }
        });
        assert_eq!(wire.pair.at_server().stats().lost_packets, 3);
        assert_eq!(window(&mut wire), before * percent / 100);
        // Those of a later flight do so again.
        count = 0;
        wire.download(30 * 1000);
        wire.run(Duration::from_secs(2), &mut |_, datagram| {
            count += u32::from(!datagram.upward);
            if !datagram.upward && count == 5 { Fate::Lost } else { Fate::Arrives }
        });
        assert_eq!(window(&mut wire), before * percent / 100 * percent / 100);
    }
}

/// How many packets of 40 are lost or late, and what the window is after that, which was at `before`.
fn after(wire: &mut Wire, fate: impl Fn(u32) -> Fate) -> u64 {
    let mut count = 0;
    wire.download(40 * 1000);
    wire.run(Duration::from_secs(2), &mut |_, datagram| {
        count += u32::from(!datagram.upward);
        if datagram.upward { Fate::Arrives } else { fate(count) }
    });
    window(wire)
}

const LATE: Fate = Fate::Late(Duration::from_millis(20));

#[test]
fn a_reduction_ends_when_all_arrive_that_were_given_up() {
    for (congestion, percent) in [(Algorithm::Cubic, 70), (Algorithm::NewReno, 50)] {
        let mut wire = opened(congestion);
        let before = window(&mut wire);
        let given_up = |count| [5, 6, 20].contains(&count);
        let late = |count| if given_up(count) { LATE } else { Fate::Arrives };
        assert_eq!(after(&mut wire, late), before, "{congestion:?}");
        let stats = wire.pair.at_server().stats();
        assert!(stats.late_packets > 0 && stats.late_packets == stats.lost_packets, "{stats:?}");
        // The path is known to reorder now.
        assert_eq!(after(&mut wire, late), before);
        assert_eq!(wire.pair.at_server().stats().lost_packets, stats.lost_packets);
        // One of them is lost in earnest.
        let mut wire = opened(congestion);
        let before = window(&mut wire);
        let one = |count| if count == 6 { Fate::Lost } else { late(count) };
        assert_eq!(after(&mut wire, one), before * percent / 100);
        // One was marked besides.
        let mut wire = opened(congestion);
        let before = window(&mut wire);
        let marked = |count| if count == 7 { Fate::Marked } else { late(count) };
        assert_eq!(after(&mut wire, marked), before * percent / 100);
    }
}

#[test]
fn req_k02_acknowledgments_that_come_late_on_purpose_gain_nothing() {
    for congestion in [Algorithm::Cubic, Algorithm::NewReno] {
        let [mut honest, mut liar] = [(); 2].map(|()| opened(congestion));
        for turn in 1..20 {
            // Later each time, so that it counts as lost again and again.
            let late = Fate::Late(Duration::from_millis(20 * turn));
            let honest = after(&mut honest, |_| Fate::Arrives);
            let liar = after(&mut liar, |count| if count == 5 { late } else { Fate::Arrives });
            assert!(liar <= honest, "{congestion:?}, turn {turn}: {liar}, {honest} of the honest");
        }
        assert!(liar.pair.at_server().stats().late_packets > 3);
    }
}

#[test]
fn after_a_loss_new_reno_grows_by_a_datagram_in_a_round_trip() {
    let mut wire = opened(Algorithm::NewReno);
    wire.download(1 << 30);
    let mut count = 0;
    wire.run(Duration::from_secs(2), &mut |_, datagram| {
        count += u32::from(!datagram.upward);
        if count == 20 && !datagram.upward { Fate::Lost } else { Fate::Arrives }
    });
    let before = window(&mut wire);
    wire.run(20 * ROUND_TRIP, &mut all_arrive);
    let grown = (window(&mut wire) - before) / DATAGRAM;
    assert!((18..=21).contains(&grown), "{grown} datagrams in 20 round trips");
}

#[test]
fn req_k06_k11_marks_of_one_flight_reduce_the_window_once() {
    for (congestion, percent) in [(Algorithm::Cubic, 70), (Algorithm::NewReno, 50)] {
        let mut wire = opened(congestion);
        assert!(wire.pair.at_server().path().ecn);
        let before = window(&mut wire);
        let mut count = 0;
        wire.download(40 * 1000);
        wire.run(Duration::from_secs(2), &mut |_, datagram| {
            count += u32::from(!datagram.upward);
            let marked = !datagram.upward && [5, 12, 20].contains(&count);
            if marked { Fate::Marked } else { Fate::Arrives }
        });
        let server = wire.pair.at_server();
        assert_eq!((server.stats().lost_packets, server.path().ecn), (0, true));
        assert_eq!(window(&mut wire), before * percent / 100);
    }
}

#[test]
fn req_k11_counts_of_acknowledgments_that_were_overtaken_are_not_looked_at() {
    let mut pair = Wire::connected(scene(Algorithm::Cubic), ROUND_TRIP).pair;
    let mut numbers = vec![];
    for _ in 0..2 {
        pair.at_server().ping();
        let datagrams = pair.down();
        numbers.push(pair.peek(false, &datagrams[0])[0].number);
    }
    // The later one comes first. The earlier one acknowledges news too, with a lower count.
    for (number, ect0) in [(numbers[1], 1001), (numbers[0], 1000)] {
        let in_flight = pair.at_server().path().in_flight;
        let frames = fields(types::ACK_ECN, &[number, 0, 0, 0, ect0, 0, 0]);
        let packet = pair.forge(Space::Data, &frames);
        pair.deliver(packet);
        let path = pair.at_server().path();
        assert!(path.in_flight < in_flight, "it acknowledges a packet");
        assert!(path.ecn, "{number}");
    }
}

#[test]
fn req_j10_a_blackout_of_three_probe_timeouts_collapses_the_window_and_a_shorter_one_does_not() {
    // The probe timeout is about 130 ms: probes leave 0.13, 0.4 and 0.9 s after the blackout began.
    for (blackout, collapses) in [(250, false), (700, true)] {
        for congestion in [Algorithm::Cubic, Algorithm::NewReno] {
            let mut wire = opened(congestion);
            let before = window(&mut wire);
            let dark = wire.pair.now + Duration::from_millis(blackout);
            let mut least = u64::MAX;
            wire.download(20 * 1000);
            wire.run(Duration::from_secs(5), &mut |pair, datagram| {
                least = least.min(pair.at_server().path().congestion_window);
                if datagram.at < dark { Fate::Lost } else { Fate::Arrives }
            });
            assert_eq!(wire.read, 220_000);
            assert!(wire.pair.at_server().stats().lost_packets > 10);
            if collapses {
                assert_eq!(least, 2 * DATAGRAM, "{congestion:?}");
            } else {
                assert!(least >= before / 2, "{congestion:?}: {least} of {before}");
            }
        }
    }
}

#[test]
fn req_k07_after_a_loss_the_window_follows_the_cubic_curve() {
    let mut wire = opened(Algorithm::Cubic);
    wire.download(1 << 30);
    let (mut count, mut top) = (0, 0);
    let mut fell = None;
    let mut curve = vec![];
    wire.run(Duration::from_secs(7), &mut |pair, datagram| {
        let window = pair.at_server().path().congestion_window;
        if fell.is_none() {
            if window < top {
                fell = Some((datagram.at, top));
            }
            top = window;
        }
        if let Some((since, _)) = fell {
            curve.push((datagram.at - since, window));
        }
        count += u32::from(!datagram.upward);
        if count == 20 && !datagram.upward { Fate::Lost } else { Fate::Arrives }
    });
    let Some((_, top)) = fell else { panic!("no loss") };
    // https://www.rfc-editor.org/rfc/rfc9438.html#section-4.2
    #[expect(clippy::cast_precision_loss, reason = "a few hundred datagrams")]
    let in_datagrams = |bytes: u64| bytes as f64 / DATAGRAM as f64;
    let max = in_datagrams(top);
    let k = (max * 0.3 / 0.4).cbrt();
    let cubic = |seconds: f64| 0.4 * (seconds - k).powi(3) + max;
    // The curve begins with the first acknowledgment after recovery, and aims a round trip ahead.
    let slack = 2.0 * ROUND_TRIP.as_secs_f64();
    let mut checked = 0;
    for (at, window) in curve {
        let (at, window) = (at.as_secs_f64(), in_datagrams(window));
        if at > 1.0 && at < k + 0.5 {
            let (low, high) = (cubic(at - slack) - 1.0, cubic(at + slack) + 1.0);
            assert!(
                (low..high).contains(&window),
                "{window} datagrams after {at} s, {max} at most"
            );
            checked += 1;
        }
    }
    assert!(checked > 1000);
}
