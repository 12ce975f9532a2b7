//! What is heard of backends on the way.

use super::*;

#[test]
fn a_backend_that_refuses_goes_down_and_comes_back_when_it_answers() {
    let mut bench = Bench::new();
    let slot = bench.slot("a");
    bench.worker.backends[slot].refuse(Refusal::ConnectionRefused, 3);
    bench.tick();
    assert_eq!(bench.state("a"), BackendState::Down);
    assert_eq!(bench.state("b"), BackendState::Active);
    bench.worker.backends[slot].returned.add(1);
    bench.tick();
    assert_eq!(bench.state("a"), BackendState::Probing);
    bench.worker.backends[slot].returned.add(1);
    bench.tick();
    assert_eq!(bench.state("a"), BackendState::Active);
}

impl Bench {
    /// So many ticks in which both backends are asked, and those of them answer that are to.
    fn ask(&mut self, ticks: u32, answering: &[&str]) {
        for _ in 0..ticks {
            for backend in ["a", "b"] {
                let counters = &self.worker.backends[self.slot(backend)];
                counters.asked.add(5);
                if answering.contains(&backend) {
                    counters.answered.add(5);
                    counters.returned.add(20);
                }
            }
            self.tick();
        }
    }
}

#[test]
fn a_backend_that_is_silent_while_others_answer_gets_no_new_connections_until_it_does() {
    let mut bench = Bench::new();
    bench.ask(10, &["a", "b"]);
    bench.ask(8, &["b"]);
    assert_eq!(bench.state("a"), BackendState::Active, "it may be slow");
    bench.ask(1, &["b"]);
    assert_eq!(bench.state("a"), BackendState::Down);
    assert!(bench.plane.fleet.get("web", "a").unwrap().fell_silent);
    // It is tried, by few.
    let share = |bench: &Bench| {
        let routing = bench.plane.routing().load();
        let chosen = (0..1000u32).filter(|n| {
            let key = n.to_be_bytes().repeat(2);
            let pool = routing.pools().next().unwrap();
            let chosen = pool.fallback(FallbackKey::ConnectionId(&key)).unwrap();
            *routing.backend(chosen).unwrap().name == *"a"
        });
        chosen.count()
    };
    assert_eq!(share(&bench), 0);
    for _ in 0..10 {
        bench.tick();
    }
    assert_eq!(bench.state("a"), BackendState::Probing);
    // One part in eleven, or in 21 where the others weigh twice as much.
    assert!((20..150).contains(&share(&bench)), "{}", share(&bench));
    bench.ask(9, &["b"]);
    assert_eq!(bench.state("a"), BackendState::Down, "it has not answered");
    for _ in 0..30 {
        bench.tick();
    }
    assert_eq!(bench.state("a"), BackendState::Probing);
    bench.ask(1, &["a", "b"]);
    assert_eq!(bench.state("a"), BackendState::Active);
    assert!(share(&bench) > 200, "{}", share(&bench));
}

#[test]
fn where_nobody_answers_nobody_is_down_for_it() {
    let mut bench = Bench::new();
    bench.ask(10, &["a", "b"]);
    bench.ask(500, &[]);
    for backend in ["a", "b"] {
        assert_eq!(bench.state(backend), BackendState::Active);
    }
}

#[test]
fn first_flights_that_no_server_answers_take_no_backend_down() {
    let mut bench = Bench::new();
    for turn in 0..1000u32 {
        // A flood, besides a client now and then, which this backend or that answers.
        for (nth, backend) in (0..).zip(["a", "b"]) {
            let counters = &bench.worker.backends[bench.slot(backend)];
            counters.asked.add(100);
            if turn / 20 % 2 == nth {
                counters.asked.add(1);
                counters.answered.add(1);
                counters.returned.add(4);
            }
        }
        bench.tick();
        assert_eq!(["a", "b"].map(|of| bench.state(of)), [BackendState::Active; 2], "{turn}");
    }
}

#[test]
fn one_refusal_and_silence_are_enough() {
    let mut bench = Bench::new();
    let slot = bench.slot("a");
    bench.worker.backends[slot].refuse(Refusal::ConnectionRefused, 1);
    bench.ask(3, &[]);
    assert_eq!(bench.state("a"), BackendState::Active);
    bench.ask(1, &[]);
    assert_eq!((bench.state("a"), bench.state("b")), (BackendState::Down, BackendState::Active));
}

#[test]
fn a_backend_that_cannot_be_sent_to_goes_down_whatever_the_kernel_calls_it() {
    for refusal in Refusal::ALL {
        let mut bench = Bench::new();
        let slot = bench.slot("a");
        bench.worker.backends[slot].refuse(refusal, 2);
        bench.tick();
        assert_eq!(bench.state("a"), BackendState::Active, "{refusal:?}, twice");
        bench.worker.backends[slot].refuse(refusal, 1);
        bench.tick();
        let (state, said) = match refusal.is_about_backend() {
            true => (BackendState::Down, Some(refusal)),
            false => (BackendState::Active, None),
        };
        assert_eq!(bench.state("a"), state, "{refusal:?}");
        assert_eq!(bench.plane.fleet.get("web", "a").unwrap().refusal, said);
        assert_eq!(bench.state("b"), BackendState::Active);
    }
}
