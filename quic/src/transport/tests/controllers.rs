//! What a congestion controller is told of a transfer, and what comes of what it answers: by one
//! that decides nothing and writes everything down.

use std::sync::{Mutex, MutexGuard};

use super::{
    super::congestion::{Acked, Controller, Delivered, Lost, Sent},
    *,
};

/// What was said, in this order.
#[derive(Clone, Copy, Debug)]
enum Call {
    Sent(Sent),
    Acked(Acked),
    Delivered(Delivered),
    Lost(Lost),
    Congestion { sent: Instant },
    PersistentCongestion,
}

type Calls = Arc<Mutex<Vec<Call>>>;

#[derive(Debug)]
struct Recorder {
    calls: Calls,
    window: u64,
    rate: Option<u64>,
}

impl Recorder {
    fn note(&self, call: Call) {
        self.calls.lock().unwrap().push(call);
    }
}

impl Controller for Recorder {
    fn on_sent(&mut self, sent: &Sent) {
        self.note(Call::Sent(*sent));
    }

    fn on_acked(&mut self, acked: &Acked) {
        self.note(Call::Acked(*acked));
    }

    fn on_delivered(&mut self, delivered: &Delivered) {
        self.note(Call::Delivered(*delivered));
    }

    fn on_lost(&mut self, lost: &Lost) {
        self.note(Call::Lost(*lost));
    }

    fn on_congestion(&mut self, _now: Instant, sent: Instant) {
        self.note(Call::Congestion { sent });
    }

    fn on_persistent_congestion(&mut self) {
        self.note(Call::PersistentCongestion);
    }

    fn set_datagram(&mut self, _datagram: u16) {}

    fn window(&self) -> u64 {
        self.window
    }

    fn pacing_rate(&self) -> Option<u64> {
        self.rate
    }

    fn in_slow_start(&self) -> bool {
        false
    }
}

const SIZE: u64 = 1200;
const WINDOW: u64 = 20 * SIZE;
const RTT: Duration = Duration::from_millis(100);

/// A server that sends to its client over a path of [`RTT`].
struct Transfer {
    pair: Pair,
    calls: Calls,
    stream: StreamId,
    /// Datagrams of the server so far.
    datagrams: usize,
}

impl Transfer {
    fn new(window: u64, rate: Option<u64>) -> Self {
        // Datagrams of one size: MTU discovery would only blur the sums.
        let mut pair = Pair::connected_as(Scene::with(TransportConfig {
            max_udp_payload: 1200,
            ..TransportConfig::default()
        }));
        let stream = pair.at_server().open(Dir::Uni).unwrap();
        let mut transfer = Self { pair, calls: Calls::default(), stream, datagrams: 0 };
        // The handshake took no time. Probes leave too early until the path is known better.
        for _ in 0..10 {
            transfer.write(1);
            transfer.round(&[]);
        }
        transfer.round(&[]);
        assert_eq!(transfer.pair.at_server().path().in_flight, 0);
        transfer.datagrams = 0;
        let recorder = Recorder { calls: Arc::clone(&transfer.calls), window, rate };
        transfer.pair.at_server().force_controller(Box::new(recorder));
        transfer
    }

    fn write(&mut self, octets: usize) {
        let written = self.pair.at_server().write(self.stream, &vec![7; octets]);
        assert_eq!(written, Ok(octets));
    }

    /// One round trip: what the server has to send arrives, except for what is to be lost, counted
    /// in datagrams since the beginning, and is acknowledged.
    fn round(&mut self, lost: &[usize]) {
        let sent = self.pair.down();
        self.pair.pass(RTT / 2);
        for datagram in sent {
            if !lost.contains(&self.datagrams) {
                self.pair.deliver_down(datagram);
            }
            self.datagrams += 1;
        }
        let acknowledgments = self.pair.up();
        self.pair.pass(RTT / 2);
        for datagram in acknowledgments {
            self.pair.deliver(datagram);
        }
    }

    fn calls(&self) -> MutexGuard<'_, Vec<Call>> {
        self.calls.lock().unwrap()
    }

    /// The sum of what each call amounts to.
    fn sum(&self, octets: impl Fn(&Call) -> u64) -> u64 {
        self.calls().iter().map(octets).sum()
    }
}

#[test]
fn a_controller_hears_of_every_octet_that_leaves_arrives_or_is_lost() {
    let mut transfer = Transfer::new(WINDOW, Some(u64::MAX));
    transfer.write(250_000);
    let before = transfer.pair.at_server().stats();
    for _ in 0..40 {
        transfer.round(&[5, 6, 50, 51, 52, 120]);
    }
    let path = transfer.pair.at_server().path();
    assert_eq!(path.in_flight, 0);
    let stats = transfer.pair.at_server().stats();
    let sent = transfer.sum(|call| if let Call::Sent(sent) = call { sent.size } else { 0 });
    let acked = transfer.sum(|call| if let Call::Acked(acked) = call { acked.size } else { 0 });
    let lost = transfer.sum(|call| if let Call::Lost(lost) = call { lost.size } else { 0 });
    assert!(sent > 250_000 && lost == 6 * SIZE, "{sent} sent, {lost} lost");
    assert_eq!(sent, acked + lost);
    let delivered = |call: &Call| match call {
        Call::Delivered(delivered) => (delivered.acked, delivered.lost),
        _ => (0, 0),
    };
    assert_eq!(transfer.sum(|call| delivered(call).0), acked);
    assert_eq!(transfer.sum(|call| delivered(call).1), lost);
    let count = transfer.calls().iter().filter(|call| matches!(call, Call::Lost(_))).count();
    assert_eq!(count as u64, stats.lost_packets - before.lost_packets);
}

#[test]
fn losses_come_one_by_one_with_their_times_and_the_congestion_they_mean_after_them() {
    let mut transfer = Transfer::new(WINDOW, Some(u64::MAX));
    transfer.write(100_000);
    let start = transfer.pair.now;
    for _ in 0..10 {
        transfer.round(&[5, 6]);
    }
    let calls = transfer.calls();
    let first = calls.iter().position(|call| matches!(call, Call::Lost(_))).unwrap();
    let [Call::Lost(one), Call::Lost(two), Call::Congestion { sent }, ..] = calls[first..] else {
        panic!("{:?}", &calls[first..first + 3]);
    };
    assert_eq!((one.sent, two.sent, sent), (start, start, start));
    assert_eq!((one.now, one.size, one.lost), (start + RTT, SIZE, SIZE));
    assert_eq!((two.now, two.size, two.lost), (start + RTT, SIZE, 2 * SIZE));
    assert_eq!((one.in_flight, two.in_flight), (6 * SIZE, 7 * SIZE));
    assert!(!calls.iter().any(|call| matches!(call, Call::PersistentCongestion)));
}

#[test]
fn rate_samples_say_what_the_window_lets_through_in_a_round_trip_until_data_runs_out() {
    let mut transfer = Transfer::new(WINDOW, Some(u64::MAX));
    transfer.write(10 * usize::try_from(WINDOW).unwrap());
    for _ in 0..12 {
        transfer.round(&[]);
    }
    // The path could do more than this.
    transfer.write(100);
    (0..2).for_each(|_| transfer.round(&[]));
    let calls = transfer.calls();
    let samples: Vec<_> = calls
        .iter()
        .filter_map(|call| match call {
            Call::Delivered(delivered) => Some((delivered, delivered.rate.unwrap())),
            _ => None,
        })
        .collect();
    // An ACK frame for each flight, for the rest of the data, and for what was written later.
    assert_eq!(samples.len(), 12);
    assert!(samples[0].1.app_limited, "it left when there was nothing else");
    for (delivered, rate) in &samples[1..10] {
        // Twenty datagrams in 100 ms.
        assert_eq!(rate.rate(), WINDOW * 10);
        assert_eq!((rate.interval, rate.lost), (RTT, 0));
        assert_eq!((rate.in_flight, rate.app_limited), (WINDOW, false));
        assert_eq!(rate.prior_delivered + rate.delivered, delivered.delivered);
    }
    let (_, last) = samples[11];
    assert!(last.app_limited && last.rate() < WINDOW, "{last:?}");
    let rtts = calls.iter().filter(|call| matches!(call, Call::Delivered(d) if d.rtt == Some(RTT)));
    assert!(rtts.count() >= 10, "a sample with each flight");
    // A flight begins with nothing in flight, and says so.
    let begun = calls.iter().filter(|call| matches!(call, Call::Sent(sent) if sent.in_flight == 0));
    assert!(begun.count() >= 10);
}

#[test]
fn packets_leave_at_the_rate_that_the_controller_asks_for() {
    // 100 datagrams a second, and a window that is never full.
    let mut transfer = Transfer::new(1 << 30, Some(100 * SIZE));
    transfer.write(250_000);
    let start = transfer.pair.now;
    let mut left = transfer.pair.down().len();
    assert_eq!(left, 10, "the first burst");
    while transfer.pair.now < start + Duration::from_secs(1) {
        transfer.pair.pass(Duration::from_millis(5));
        for datagram in transfer.pair.down() {
            left += 1;
            transfer.pair.deliver_down(datagram);
        }
        for datagram in transfer.pair.up() {
            transfer.pair.deliver(datagram);
        }
    }
    assert!((105..=111).contains(&left), "{left} datagrams in a second");
}
