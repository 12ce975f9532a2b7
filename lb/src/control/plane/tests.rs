use std::time::Duration;

use quic::{routable::ServerId, token::TokenKey};
use quic_lb_config::HealthCheck;

use super::{alarms::LOOP_WARNINGS, backends::CheckTarget, views::BackendView, *};
use crate::{
    check::{CheckResult, Finding},
    counters::WorkerCounters,
    fixtures,
    flows::census::{Live, LiveConfig},
    refusal::Refusal,
    routing::FallbackKey,
    verdict::DropReason,
};

const TICK: Duration = Duration::from_millis(200);

struct Bench {
    plane: ControlPlane,
    worker: Arc<WorkerCounters>,
    now: Instant,
}

impl Bench {
    fn new() -> Self {
        Self::of(fixtures::config(true))
    }

    fn of(config: Config) -> Self {
        let now = Instant::now();
        let memory = Arc::new(Memory::new(100, now, [0; 4]));
        let mut plane = ControlPlane::new(config, memory, [1, 2]);
        let worker = Arc::new(WorkerCounters::new(1));
        let mut totals = Totals::default();
        totals.add(Arc::clone(&worker));
        plane.set_workers(1, totals, 1000);
        Self { plane, worker, now }
    }

    fn tick(&mut self) {
        self.now += TICK;
        self.plane.on_tick(self.now);
        self.build();
    }

    /// What the builder does.
    fn build(&mut self) {
        while let Some(order) = self.plane.order() {
            self.plane.install(order.build());
        }
    }

    fn command(&mut self, name: &str, wanted: Admission) -> bool {
        let known = self.plane.command("web", name, command(wanted));
        self.build();
        known
    }

    fn reload(&mut self, change: impl FnOnce(&mut Config)) -> Applied {
        let mut config = fixtures::config(true);
        change(&mut config);
        let applied = self.plane.apply(self.now, config, false);
        self.build();
        applied
    }

    fn view(&self, name: &str) -> BackendView {
        self.plane.views(self.now).into_iter().find(|view| view.backend.name == name).unwrap()
    }

    fn state(&self, name: &str) -> BackendState {
        self.view(name).state
    }

    fn slot(&self, name: &str) -> usize {
        let routing = self.plane.routing().load();
        routing.backends().find(|backend| backend.name == name).unwrap().id.slot()
    }
}

fn command(wanted: Admission) -> Command {
    let author = Author { by: "ann".into(), reason: None };
    Command { wanted, author, unix_time: 0 }
}

fn name(backend: &str) -> Name {
    ("web".to_owned(), backend.to_owned())
}

#[test]
fn handshakes_that_come_to_nothing_are_told_once_a_minute_if_there_are_several() {
    let mut bench = Bench::new();
    for (second, more, told) in [
        (0, 7, None),
        (30, 9, None),
        (60, 0, Some(9)),
        (90, 9, None),
        (121, 1, Some(10)),
        (200, 4, None),
        (300, 4, None),
    ] {
        bench.worker.unfinished_flows.add(more);
        let at = bench.now + Duration::from_secs(second);
        assert_eq!(bench.plane.unfinished(at), told, "{second}");
    }
}

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
    assert!(bench.plane.backends[&name("a")].fell_silent);
    // It is tried, by few.
    let share = |bench: &Bench| {
        let routing = bench.plane.routing().load();
        let chosen = (0..1000u32).filter(|n| {
            let key = n.to_be_bytes().repeat(2);
            let pool = routing.pools().next().unwrap();
            let chosen = pool.fallback(FallbackKey::ConnectionId(&key)).unwrap();
            routing.backend(chosen).unwrap().name == "a"
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
fn validation_waits_until_servers_are_known_to_honour_tokens_and_ends_when_one_does_not() {
    for mode in [RetryMode::Always, RetryMode::Adaptive] {
        let mut config = fixtures::config(true);
        config.pools[0].honours_tokens = HonoursTokens::Probe;
        config.retry.mode = mode;
        config.retry.adaptive.on_rate = 10;
        config.retry.keys = vec![TokenKey::new(0, [1; 16], [0; 12]).unwrap()];
        let mut bench = Bench::of(config);
        let phase = |bench: &mut Bench, result: Option<CheckResult>| {
            let asked = bench.plane.token_targets().remove(0).target;
            assert_eq!(asked.name, name("a"));
            if let Some(result) = result {
                let _ = bench.plane.on_token(&asked, result);
            }
            for _ in 0..10 {
                bench.worker.listeners[0].attempts.add(100);
                bench.tick();
            }
            bench.plane.reading(bench.now).listeners[0].phase
        };
        let gate = |bench: &Bench| {
            let gate = &bench.plane.routing().load_full();
            gate.listeners().next().unwrap().gate.phase(bench.now).label()
        };
        assert_eq!(gate(&bench), "inactive", "before the first tick");
        let third = bench.plane.token_targets().remove(2).target;
        let _ = bench.plane.on_token(&third, CheckResult::Answered);
        assert_eq!(phase(&mut bench, None), "inactive");
        assert_eq!(phase(&mut bench, Some(CheckResult::Timeout)), "inactive");
        assert_eq!(phase(&mut bench, Some(CheckResult::Answered)), "active", "two of three do");
        assert_eq!(gate(&bench), "active");
        assert_eq!(phase(&mut bench, Some(CheckResult::Timeout)), "active", "it is busy");
        assert_eq!(phase(&mut bench, Some(CheckResult::Closed)), "active", "once");
        assert_eq!(phase(&mut bench, Some(CheckResult::Wrong)), "inactive");
        assert_eq!(gate(&bench), "inactive");
        let shown = |bench: &Bench| {
            let backends = bench.plane.reading(bench.now).backends;
            backends.iter().map(|of| of.retry_unsupported).collect::<Vec<_>>()
        };
        assert_eq!(shown(&bench), [Some(true), Some(false), Some(false)]);
        // One that gets no connections keeps nobody from it.
        bench.command("a", Admission::Draining);
        assert_eq!(phase(&mut bench, None), "active", "one of two does");
    }
}

#[test]
fn nobody_is_asked_for_tokens_where_it_is_known_or_no_retry_is_sent() {
    let of = |honours, mode| {
        let mut config = fixtures::config(true);
        config.pools[0].honours_tokens = honours;
        config.retry.mode = mode;
        config.retry.keys = vec![TokenKey::new(0, [1; 16], [0; 12]).unwrap()];
        let bench = Bench::of(config);
        let shown = bench.view("a").honours.is_some();
        let asked = bench.plane.token_targets().len();
        assert_eq!(asked, if shown { 3 } else { 0 });
        asked
    };
    assert_eq!(of(HonoursTokens::Probe, RetryMode::Always), 3);
    assert_eq!(of(HonoursTokens::Probe, RetryMode::Adaptive), 3);
    assert_eq!(of(HonoursTokens::Probe, RetryMode::Off), 0);
    assert_eq!(of(HonoursTokens::Yes, RetryMode::Always), 0);
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
        assert_eq!(bench.plane.backends[&name("a")].refusal, said);
        assert_eq!(bench.state("b"), BackendState::Active);
    }
}

/// A bench of which the pool is checked.
fn checked() -> Bench {
    let mut config = fixtures::config(true);
    config.pools[0].health_check = Some(health_check());
    Bench::of(config)
}

fn health_check() -> HealthCheck {
    HealthCheck {
        kind: quic_lb_config::CheckKind::VersionNegotiation,
        interval: Duration::from_secs(1),
        timeout: Duration::from_millis(500),
        rise: 2.try_into().unwrap(),
        fall: 2.try_into().unwrap(),
        port: Some(7),
        panic_below: 50,
        slow_start: Duration::ZERO,
    }
}

impl Bench {
    fn target(&self, backend: &str) -> Arc<CheckTarget> {
        let targets = self.plane.check_targets().into_iter();
        Arc::new({ targets }.find(|target| target.name == name(backend)).unwrap())
    }

    fn check(&mut self, backend: &str, results: &[CheckResult]) -> BackendState {
        for result in results {
            let told = [(self.target(backend), (*result).into())];
            self.plane.on_checks(self.now, &told);
        }
        self.build();
        self.state(backend)
    }
}

#[test]
fn failed_checks_take_a_backend_down_and_passed_ones_bring_it_back() {
    use CheckResult::{Answered, Timeout, Wrong};
    let mut bench = checked();
    assert_eq!(bench.check("a", &[Answered]), BackendState::Active);
    assert_eq!(bench.check("a", &[Timeout]), BackendState::Active);
    assert_eq!(bench.check("a", &[Wrong]), BackendState::Down);
    assert_eq!(bench.state("b"), BackendState::Active);
    let view = bench.view("a").check.unwrap();
    assert_eq!((view.passes, view.last), (Some(false), Some(Wrong)));
    let counts: Vec<_> = view.counts.iter().filter(|(_, n)| *n > 0).collect();
    assert_eq!(counts, [(Answered, 1), (Timeout, 1), (Wrong, 1)]);
    assert_eq!(bench.check("a", &[Answered]), BackendState::Down);
    assert_eq!(bench.check("a", &[Answered]), BackendState::Active);
    // A draining one is checked too, and stays what the operator wants.
    bench.command("a", Admission::Draining);
    assert_eq!(bench.check("a", &[Timeout, Timeout]), BackendState::Draining);
}

#[test]
fn the_first_check_of_a_process_decides_alone_and_until_then_all_get_connections() {
    let mut bench = checked();
    for backend in ["a", "b", "c"] {
        assert_eq!(bench.state(backend), BackendState::Active);
    }
    assert_eq!(bench.check("a", &[CheckResult::Timeout]), BackendState::Down);
}

#[test]
fn who_joins_a_pool_that_is_checked_has_to_answer_first() {
    let mut bench = checked();
    bench.check("a", &[CheckResult::Answered]);
    let change = |config: &mut Config| {
        config.pools[0].health_check = Some(health_check());
        let backend = config.pools[0].backends[0].clone();
        let address = ([127, 0, 0, 1], 6001).into();
        let server_ids = vec![(fixtures::cid_config().id(), fixtures::server_id(9))];
        let joined = Backend { name: "d".into(), address, server_ids, ..backend };
        config.pools[0].backends.push(joined);
    };
    assert_eq!(bench.reload(change), Applied::Changed);
    let states = ["a", "b", "c", "d"].map(|name| bench.state(name));
    let (active, down) = (BackendState::Active, BackendState::Down);
    assert_eq!(states, [active, active, active, down]);
    assert!(bench.plane.panics.is_empty());
    // Where nothing can be asked, nobody is kept waiting.
    assert_eq!(bench.check("d", &[CheckResult::Unsent]), active);
    assert_eq!(bench.check("d", &[CheckResult::Timeout]), down);
    assert_eq!(bench.check("d", &[CheckResult::Answered; 2]), active);
}

#[test]
fn who_was_refused_has_to_pass_its_checks_too() {
    let mut bench = checked();
    let slot = bench.slot("a");
    bench.check("a", &[CheckResult::Answered]);
    bench.worker.backends[slot].refuse(Refusal::ConnectionRefused, 3);
    bench.tick();
    assert_eq!(bench.state("a"), BackendState::Down);
    // Its traffic alone would have it back.
    bench.worker.backends[slot].returned.add(1);
    bench.tick();
    assert_eq!(bench.state("a"), BackendState::Down);
    assert_eq!(bench.check("a", &[CheckResult::Answered; 2]), BackendState::Active);
    // And its checks alone do not help against what its traffic says.
    bench.worker.backends[slot].refuse(Refusal::ConnectionRefused, 1);
    bench.tick();
    bench.now += Duration::from_secs(3);
    assert_eq!(bench.check("a", &[CheckResult::Answered; 9]), BackendState::Down);
}

#[test]
fn where_fewer_than_half_are_left_failed_checks_are_ignored() {
    let mut bench = checked();
    let failed = [CheckResult::Timeout; 2];
    let states = |bench: &Bench| ["a", "b", "c"].map(|name| bench.state(name));
    let panics = |bench: &Bench| bench.plane.reading(bench.now).pools[0].panic;
    let (active, down) = (BackendState::Active, BackendState::Down);
    bench.check("a", &failed);
    assert_eq!((states(&bench), panics(&bench)), ([down, active, active], false));
    bench.check("b", &failed);
    assert_eq!((states(&bench), panics(&bench)), ([active; 3], true));
    // One that was refused is not believed to be well.
    let slot = bench.slot("b");
    bench.worker.backends[slot].refuse(Refusal::ConnectionRefused, 3);
    bench.tick();
    assert_eq!((states(&bench), panics(&bench)), ([active, down, active], true));
    // Where none is left, all are tried anyway, and are shown as what they are.
    bench.check("c", &failed);
    assert_eq!((states(&bench), panics(&bench)), ([down; 3], true));
    bench.check("a", &[CheckResult::Answered; 2]);
    assert_eq!((states(&bench), panics(&bench)), ([active, down, active], true));
    bench.check("c", &[CheckResult::Answered; 2]);
    assert_eq!((states(&bench), panics(&bench)), ([active, down, active], false));
    // Drained ones are not missed.
    bench.command("a", Admission::Draining);
    assert!(!panics(&bench));
}

#[test]
fn checks_that_the_file_does_not_name_any_more_mean_nothing() {
    let mut bench = checked();
    let before = bench.target("a");
    assert_eq!((before.address.port(), before.backend.port()), (7, 5001));
    bench.check("a", &[CheckResult::Timeout]);
    assert_eq!(bench.reload(|_| {}), Applied::Changed);
    assert!(bench.plane.check_targets().is_empty());
    assert_eq!(bench.state("a"), BackendState::Active);
    bench.plane.on_checks(bench.now, &[(Arc::clone(&before), CheckResult::Timeout.into())]);
    bench.build();
    assert_eq!(bench.state("a"), BackendState::Active);
    assert!(bench.view("a").check.is_none());
    // One that has moved is another.
    let move_away = |config: &mut Config| {
        config.pools[0].health_check = Some(health_check());
        config.pools[0].backends[0].address.set_port(6001);
    };
    bench.reload(move_away);
    bench.plane.on_checks(bench.now, &[(before, CheckResult::Timeout.into())]);
    bench.build();
    assert_eq!(bench.state("a"), BackendState::Active);
}

#[test]
fn a_backend_that_answers_under_anothers_name_is_miswired_until_it_does_not() {
    let mut bench = Bench::new();
    let [a, b] = ["a", "b"].map(|name| bench.slot(name));
    let another = bench.plane.routing().load().backends().find(|of| of.name == "b").unwrap().id;
    let answer = |bench: &mut Bench, another| {
        bench.worker.backends[a].answer(another);
        bench.tick();
        bench.state("a")
    };
    // Now and then is chance, and so is what is mixed with good ones.
    for _ in 0..10 {
        assert_eq!(answer(&mut bench, Some(another)), BackendState::Active);
        assert_eq!(answer(&mut bench, Some(another)), BackendState::Active);
        assert_eq!(answer(&mut bench, None), BackendState::Active);
    }
    assert_eq!(answer(&mut bench, Some(another)), BackendState::Active);
    assert_eq!(answer(&mut bench, Some(another)), BackendState::Active);
    assert_eq!(answer(&mut bench, Some(another)), BackendState::Miswired);
    assert_eq!(bench.state("b"), BackendState::Active);
    let routing = bench.plane.routing().load_full();
    let named = bench.plane.named(&routing, &bench.plane.backends[&name("a")]).unwrap();
    assert_eq!((named.name.as_str(), named.id.slot()), ("b", b));
    // What is worse goes before it, and what the operator wants before both.
    bench.worker.backends[a].refuse(Refusal::ConnectionRefused, 3);
    bench.tick();
    assert_eq!(bench.state("a"), BackendState::Down);
    bench.worker.backends[a].returned.add(1);
    bench.tick();
    assert_eq!(bench.state("a"), BackendState::Miswired);
    bench.worker.backends[a].returned.add(1);
    bench.tick();
    bench.command("a", Admission::Draining);
    assert_eq!(bench.state("a"), BackendState::Draining);
    bench.command("a", Admission::Active);
    assert_eq!(bench.state("a"), BackendState::Miswired);
    assert_eq!(answer(&mut bench, None), BackendState::Probing);
    assert_eq!(answer(&mut bench, None), BackendState::Active);
}

#[test]
fn a_miswired_backend_is_tried_again_and_a_reload_forgives_it() {
    let mut bench = Bench::new();
    let slot = bench.slot("a");
    let another = bench.plane.routing().load().backends().find(|of| of.name == "b").unwrap().id;
    let misnamed = |bench: &mut Bench| {
        (0..3).for_each(|_| bench.worker.backends[slot].answer(Some(another)));
        bench.tick();
        assert_eq!(bench.state("a"), BackendState::Miswired);
    };
    misnamed(&mut bench);
    for _ in 0..100 {
        bench.tick();
    }
    assert_eq!(bench.state("a"), BackendState::Probing);
    misnamed(&mut bench);
    let mend = |config: &mut Config| config.pools[0].backends[0].weight = 7.try_into().unwrap();
    assert_eq!(bench.reload(mend), Applied::Changed);
    assert_eq!(bench.state("a"), BackendState::Active);
}

/// A bench of which the pool is checked by connections.
fn connected() -> Bench {
    let mut config = fixtures::config(true);
    config.pools[0].health_check = Some(connecting());
    Bench::of(config)
}

fn connecting() -> HealthCheck {
    let handshake = quic_lb_config::Handshake {
        alpn: "h3".into(),
        server_name: None,
        certificate: quic_lb_config::CertificatePolicy::Ignored,
    };
    HealthCheck { kind: quic_lb_config::CheckKind::Quic(handshake), port: None, ..health_check() }
}

impl Bench {
    /// A check that was passed, of a server whose connection IDs say that it is the `n`th backend.
    fn answer_as(&mut self, backend: &str, n: u8) -> BackendState {
        let cid = |nonce| fixtures::cid_config().encode(&fixtures::server_id(n), &[nonce; 6]);
        let cids = vec![cid(1).unwrap(), cid(2).unwrap()];
        let finding = Finding { cids, ..CheckResult::Answered.into() };
        let told = [(self.target(backend), finding)];
        self.plane.on_checks(self.now, &told);
        self.build();
        self.state(backend)
    }
}

#[test]
fn checks_show_who_answers_under_connection_ids_that_do_not_lead_to_it() {
    use BackendState::{Active, Down, Draining, Miswired};
    let mut bench = connected();
    assert_eq!(bench.answer_as("a", 1), Active);
    assert_eq!(bench.answer_as("a", 2), Active, "once");
    assert_eq!(bench.answer_as("a", 1), Active);
    assert!(bench.view("a").check.unwrap().breach.is_none());
    assert_eq!(bench.answer_as("a", 2), Active);
    assert_eq!(bench.answer_as("a", 2), Miswired, "twice in a row");
    assert_eq!(bench.plane.miswired(), ["web/a"]);
    let view = bench.view("a").check.unwrap();
    assert_eq!((view.passes, view.last), (Some(true), Some(CheckResult::Miswired)));
    let breach = view.breach.unwrap();
    assert_eq!(breach.expected, "server ID 0001 in configuration 0");
    let found = breach.found.to_string();
    assert!(found.starts_with("server ID 0002 in configuration 0, which is backend b"), "{found}");
    // A check that fails says nothing about connection IDs, and what is worse goes before them.
    assert_eq!(bench.check("a", &[CheckResult::Timeout; 2]), Down);
    assert_eq!(bench.answer_as("a", 2), Down);
    assert_eq!(bench.answer_as("a", 2), Miswired);
    bench.command("a", Admission::Draining);
    assert_eq!(bench.state("a"), Draining);
    bench.command("a", Admission::Active);
    // Others are none the worse for it.
    assert_eq!(bench.answer_as("b", 2), Active);
    assert_eq!(bench.answer_as("a", 1), Miswired, "once");
    assert!(bench.view("a").check.unwrap().breach.is_some());
    assert_eq!(bench.answer_as("a", 1), Active, "twice in a row");
    assert!(bench.view("a").check.unwrap().breach.is_none());
}

#[test]
fn a_breach_is_judged_by_the_newest_configuration_and_ends_with_the_checks_that_show_it() {
    let mut bench = connected();
    let checked = |config: &mut Config| config.pools[0].health_check = Some(connecting());
    let swap = |config: &mut Config| {
        checked(config);
        let [a, b, ..] = &mut config.pools[0].backends[..] else { unreachable!() };
        std::mem::swap(&mut a.server_ids, &mut b.server_ids);
    };
    bench.answer_as("a", 2);
    assert_eq!(bench.answer_as("a", 2), BackendState::Miswired);
    // It was the balancer that was wrong.
    assert_eq!(bench.reload(swap), Applied::Changed);
    assert_eq!(bench.state("a"), BackendState::Miswired, "as far as is known");
    bench.answer_as("a", 2);
    assert_eq!(bench.answer_as("a", 2), BackendState::Active);
    // Checks that show no connection IDs, and no checks at all.
    let others = |config: &mut Config| config.pools[0].health_check = Some(health_check());
    let none = |_: &mut Config| {};
    for (change, answers) in [(&others as &dyn Fn(&mut Config), true), (&none, false)] {
        bench.reload(checked);
        bench.answer_as("a", 3);
        assert_eq!(bench.answer_as("a", 3), BackendState::Miswired);
        bench.reload(change);
        if answers {
            bench.check("a", &[CheckResult::Answered]);
        }
        assert_eq!(bench.state("a"), BackendState::Active);
    }
}

#[test]
fn a_backend_that_is_back_gets_its_share_in_steps_once_a_second_at_most() {
    let slow = |config: &mut Config, seconds| {
        let slow_start = Duration::from_secs(seconds);
        config.pools[0].health_check = Some(HealthCheck { slow_start, ..health_check() });
    };
    let mut config = fixtures::config(true);
    slow(&mut config, 9);
    let mut bench = Bench::of(config);
    let shares = |bench: &Bench| {
        let of_pool = &bench.plane.wanted.pools()[0];
        of_pool.iter().map(|backend| backend.share.get()).collect::<Vec<_>>()
    };
    // Who was there from the start has all of it.
    assert_eq!(bench.check("b", &[CheckResult::Answered]), BackendState::Active);
    assert_eq!(shares(&bench), [1, 1, 1]);
    bench.check("a", &[CheckResult::Timeout]);
    assert_eq!(bench.check("a", &[CheckResult::Answered; 2]), BackendState::Active);
    assert_eq!(shares(&bench), [1, 10, 10]);
    assert_eq!(bench.view("a").starting.unwrap().step(), 1);
    let table = bench.plane.routing().load_full();
    let mut seen = vec![];
    // Five ticks are a second.
    for _ in 0..50 {
        let before = bench.plane.newest();
        bench.tick();
        if bench.plane.newest() != before {
            seen.push(shares(&bench)[0]);
        }
    }
    assert_eq!(seen, [2, 3, 4, 5, 6, 7, 8, 9, 1]);
    assert_eq!(shares(&bench), [1, 1, 1]);
    assert!(bench.view("a").starting.is_none());
    assert_eq!(table.tables_not_in(&bench.plane.routing().load()), 1);

    // It begins again when it falls again, and ends where it is not wanted any more.
    bench.check("a", &[CheckResult::Timeout; 2]);
    bench.now += Duration::from_secs(60);
    bench.check("a", &[CheckResult::Answered; 2]);
    assert_eq!(shares(&bench), [1, 10, 10]);
    bench.check("a", &[CheckResult::Timeout; 2]);
    assert_eq!(shares(&bench), [1, 1, 1]);
    bench.now += Duration::from_secs(60);
    bench.check("a", &[CheckResult::Answered; 2]);
    assert_eq!(bench.reload(|config| slow(config, 0)), Applied::Changed);
    (0..7).for_each(|_| bench.tick());
    assert_eq!(shares(&bench), [1, 1, 1]);

    // However short it is, not more than once a second.
    bench.reload(|config| slow(config, 2));
    bench.now += Duration::from_secs(60);
    bench.check("a", &[CheckResult::Timeout; 2]);
    bench.now += Duration::from_secs(60);
    bench.check("a", &[CheckResult::Answered; 2]);
    let before = bench.plane.newest();
    (0..20).for_each(|_| bench.tick());
    assert_eq!(bench.plane.newest() - before, 2);
    assert_eq!(shares(&bench), [1, 1, 1]);
}

#[test]
fn what_answers_checks_elsewhere_need_not_have_the_connection_ids_of_the_server() {
    let elsewhere = "127.0.0.9:7".parse().unwrap();
    let by_port = |config: &mut Config| {
        config.pools[0].health_check = Some(HealthCheck { port: Some(7), ..connecting() });
    };
    let by_address = |config: &mut Config| {
        config.pools[0].health_check = Some(HealthCheck { port: Some(8), ..connecting() });
        config.pools[0].backends[0].check_address = Some(elsewhere);
    };
    let check = |change: &dyn Fn(&mut Config), at: &str| {
        let mut bench = Bench::new();
        assert_eq!(bench.reload(change), Applied::Changed);
        assert_eq!(bench.target("a").address.to_string(), at);
        for _ in 0..3 {
            assert_eq!(bench.answer_as("a", 2), BackendState::Active);
        }
    };
    check(&by_port, "127.0.0.1:7");
    check(&by_address, "127.0.0.9:7");
}

#[test]
fn whose_connection_ids_they_are_follows_the_file() {
    let mut bench = connected();
    let turned = |config: &mut Config| {
        config.pools[0].health_check = Some(connecting());
        config.pools[0].backends.reverse();
        let before = quic_lb_config::Pool { name: "api".into(), ..config.pools[0].clone() };
        config.pools.insert(0, before);
        config.listeners[0].pool = 1;
    };
    assert_eq!(bench.reload(turned), Applied::Changed);
    let none: [&str; 0] = [];
    for (backend, n) in [("a", 1), ("b", 2), ("c", 3)] {
        for _ in 0..2 {
            bench.answer_as(backend, n);
        }
    }
    assert_eq!(bench.plane.miswired(), none);
    for _ in 0..2 {
        bench.answer_as("c", 1);
    }
    assert_eq!(bench.plane.miswired(), ["web/c"]);
}

#[test]
fn a_pool_without_routable_connection_ids_has_none_that_are_wrong() {
    let mut config = fixtures::config(false);
    config.pools[0].health_check = Some(connecting());
    let mut bench = Bench::of(config);
    for _ in 0..3 {
        assert_eq!(bench.answer_as("a", 2), BackendState::Active);
    }
}

#[test]
fn health_survives_a_reload_and_ends_with_the_address() {
    let mut bench = Bench::new();
    let slot = bench.slot("a");
    bench.worker.backends[slot].refuse(Refusal::ConnectionRefused, 3);
    bench.tick();
    let weigh = |config: &mut Config| {
        config.pools[0].backends[0].weight = 7.try_into().unwrap();
    };
    assert_eq!(bench.reload(weigh), Applied::Changed);
    assert_eq!(bench.state("a"), BackendState::Down);
    let move_away = |config: &mut Config| config.pools[0].backends[0].address.set_port(6001);
    assert_eq!(bench.reload(move_away), Applied::Changed);
    assert_eq!(bench.state("a"), BackendState::Active);
    assert_ne!(bench.slot("a"), slot);
}

#[test]
fn the_operators_command_holds_over_reloads_until_the_opposite() {
    let mut bench = Bench::new();
    assert!(bench.command("a", Admission::Draining));
    assert_eq!(bench.state("a"), BackendState::Draining);
    let weigh = |config: &mut Config| {
        config.pools[0].backends[1].weight = 7.try_into().unwrap();
    };
    bench.reload(weigh);
    assert_eq!(bench.state("a"), BackendState::Draining);
    let view = bench.view("a");
    assert_eq!((view.wanted, view.command.is_some()), (Admission::Draining, true));
    assert!(bench.command("a", Admission::Active));
    let view = bench.view("a");
    assert_eq!((view.state, view.command.is_some()), (BackendState::Active, false));
}

#[test]
fn the_operator_can_activate_what_the_file_drains() {
    let mut bench = Bench::new();
    let drain = |config: &mut Config| config.pools[0].backends[0].admission = Admission::Draining;
    bench.reload(drain);
    assert_eq!(bench.state("a"), BackendState::Draining);
    assert!(bench.command("a", Admission::Active));
    assert_eq!(bench.state("a"), BackendState::Active);
    assert!(bench.view("a").command.is_some());
}

#[test]
fn a_command_to_nobody_changes_nothing() {
    let mut bench = Bench::new();
    let before = bench.plane.routing().load_full();
    assert!(!bench.command("x", Admission::Draining));
    assert!(!bench.plane.command("x", "a", command(Admission::Draining)));
    assert!(Arc::ptr_eq(&before, &bench.plane.routing().load_full()));
}

#[test]
fn a_command_ends_with_its_backend() {
    let mut bench = Bench::new();
    bench.command("a", Admission::Draining);
    bench.reload(|config| drop(config.pools[0].backends.remove(0)));
    assert_eq!(bench.reload(|_| {}), Applied::Changed);
    assert_eq!(bench.state("a"), BackendState::Active);
}

#[test]
fn the_same_configuration_is_no_event() {
    let mut bench = Bench::new();
    let before = bench.plane.routing().load_full();
    assert_eq!(bench.reload(|_| {}), Applied::Unchanged);
    assert!(Arc::ptr_eq(&before, &bench.plane.routing().load_full()));
    assert_eq!(bench.plane.reading(bench.now).reloads, Reloads::default());
}

#[test]
fn a_new_key_alone_is_a_change() {
    use quic::routable::{CidConfig, ConfigId, Key};
    let mut bench = Bench::new();
    let id = ConfigId::new(0).unwrap();
    let other = CidConfig::new(id, 2, 6, Some(&Key::new([8; 16]))).unwrap();
    assert_eq!(bench.reload(|c| c.pools[0].cid_configs = vec![other]), Applied::Changed);
    assert_eq!(
        bench.plane.reading(bench.now).reloads,
        Reloads { applied: 1, ..Default::default() }
    );
}

#[test]
fn what_needs_a_restart_is_refused_as_a_whole_and_named() {
    let mut bench = Bench::new();
    let before = bench.plane.routing().load_full();
    let outcome = bench.reload(|config| {
        config.workers = 4.try_into().ok();
        let address = "127.0.0.1:9090".parse().unwrap();
        config.admin = Some(quic_lb_config::Admin { address, host_names: vec![], commands: None });
        config.limits.flows = 7.try_into().unwrap();
        config.limits.remembered = 7.try_into().unwrap();
        config.log.format = quic_lb_config::LogFormat::Json;
        config.listeners[0].name = "other".into();
        config.pools[0].backends.clear();
    });
    let Applied::NeedsRestart(reasons) = outcome else { panic!("{outcome:?}") };
    assert_eq!(
        reasons,
        [
            "workers changes from one for each core to 4",
            "admin.address changes from no address to 127.0.0.1:9090",
            "limits.flows changes from 1000 to 7",
            "limits.remembered changes from 1000 to 7",
            "log.format changes from text to json",
        ]
    );
    assert!(Arc::ptr_eq(&before, &bench.plane.routing().load_full()));
    assert_eq!(bench.plane.reading(bench.now).reloads, Reloads::default());
}

#[test]
fn a_corrected_file_counts_as_applied_also_while_a_snapshot_is_built() {
    let mut bench = Bench::new();
    bench.plane.on_rejected();
    bench.plane.on_reload(Duration::from_secs(5), false);
    bench.plane.on_corrected();
    bench.plane.on_reload(Duration::from_secs(6), true);
    bench.reload(|config| config.pools[0].backends[1].weight = 7.try_into().unwrap());
    let reloads = bench.plane.reading(bench.now).reloads;
    assert_eq!((reloads.applied, reloads.rejected), (2, 1));
    assert_eq!(reloads.last, Some((Duration::from_secs(6), true)));
}

#[test]
fn a_backend_that_comes_back_counts_on() {
    let mut bench = Bench::new();
    let slot = bench.slot("a");
    bench.worker.backends[slot].forwarded.add(10);
    bench.reload(|config| drop(config.pools[0].backends.remove(0)));
    bench.reload(|config| config.pools[0].backends[1].weight = 7.try_into().unwrap());
    assert_eq!(bench.view("a").totals.forwarded, 10);
}

#[test]
fn the_newest_order_wins_and_an_older_one_changes_nothing() {
    let mut bench = Bench::new();
    assert!(bench.plane.order().is_none(), "all that is wanted is in force");
    assert!(bench.plane.command("web", "a", command(Admission::Draining)));
    let older = bench.plane.order().unwrap();
    assert!(bench.plane.command("web", "b", command(Admission::Draining)));
    assert_eq!(bench.state("a"), BackendState::Active, "nothing is in force yet");
    let newer = bench.plane.order().unwrap();
    bench.plane.install(newer.build());
    assert_eq!(bench.plane.in_force(), bench.plane.newest());
    let states = |bench: &Bench| (bench.state("a"), bench.state("b"));
    assert_eq!(states(&bench), (BackendState::Draining, BackendState::Draining));
    bench.plane.install(older.build());
    assert_eq!(states(&bench), (BackendState::Draining, BackendState::Draining));
    assert!(bench.plane.order().is_none());
}

#[test]
fn what_is_shown_is_what_is_in_force() {
    let mut bench = Bench::new();
    let mut config = fixtures::config(true);
    config.pools[0].backends.remove(0);
    let digest = config.digest();
    assert_eq!(bench.plane.apply(bench.now, config, false), Applied::Changed);
    let shown = |bench: &Bench| {
        let reading = bench.plane.reading(bench.now);
        let masked = bench.plane.config().digest();
        (
            reading.digest == digest,
            masked == digest,
            reading.reloads.applied,
            reading.backends.len(),
        )
    };
    assert_eq!(shown(&bench), (false, false, 0, 3));
    bench.build();
    assert_eq!(shown(&bench), (true, true, 1, 2));
}

#[test]
fn a_backend_that_changes_its_state_rebuilds_the_table_of_its_pool_alone() {
    let mut config = fixtures::config(true);
    let mut other = config.pools[0].clone();
    other.name = "api".into();
    config.pools.push(other);
    let mut bench = Bench::of(config);
    let tables = |bench: &mut Bench, change: &dyn Fn(&mut Bench)| {
        let before = bench.plane.routing().load_full();
        change(bench);
        bench.build();
        let after = bench.plane.routing().load_full();
        assert!(!Arc::ptr_eq(&before, &after), "another snapshot");
        after.tables_not_in(&before)
    };
    let drain =
        |bench: &mut Bench| assert!(bench.plane.command("web", "a", command(Admission::Draining)));
    assert_eq!(tables(&mut bench, &drain), 1);
    let down = |bench: &mut Bench| {
        bench.worker.backends[bench.slot("b")].refuse(Refusal::ConnectionRefused, 3);
        bench.plane.on_tick(bench.now);
    };
    assert_eq!(tables(&mut bench, &down), 1);
    // What is wanted is the same, and what a listener lets in is not in any table.
    let repeat =
        |bench: &mut Bench| assert!(bench.plane.command("web", "a", command(Admission::Draining)));
    assert_eq!(tables(&mut bench, &repeat), 0);
    let both = |bench: &mut Bench| {
        assert!(bench.plane.command("web", "a", command(Admission::Active)));
        assert!(bench.plane.command("api", "a", command(Admission::Draining)));
    };
    assert_eq!(tables(&mut bench, &both), 2);
}

#[test]
fn datagrams_that_go_round_are_told_of_once_a_minute() {
    let mut bench = Bench::new();
    let told = |bench: &Bench| bench.plane.loops_warned_of.0;
    bench.worker.listeners[0].drop(DropReason::Loop, 3);
    bench.tick();
    assert_eq!(told(&bench), 3);
    bench.worker.listeners[0].drop(DropReason::Loop, 2);
    bench.tick();
    assert_eq!(told(&bench), 3);
    bench.now += LOOP_WARNINGS;
    bench.tick();
    assert_eq!(told(&bench), 5);
}

#[test]
fn ready_is_said_while_running_only() {
    let mut bench = Bench::new();
    for (stage, ready) in [(Stage::Running, true), (Stage::Draining, false), (Stage::Broken, false)]
    {
        bench.plane.set_stage(stage);
        assert_eq!(bench.plane.reading(bench.now).ready, ready);
    }
}

/// Has the worker say that connections were heard just now: of a backend, by config ID.
fn hear(bench: &Bench, name: &str, connections: &[(u8, u32)]) {
    let routing = bench.plane.routing().load();
    let id = routing.backends().find(|route| route.name == name).unwrap().id;
    let mut live = Live { generation: id.generation(), flows: 1, ..Live::default() };
    for &(config, connections) in connections {
        let last_heard = Some(bench.now);
        live.by_config[usize::from(config)] = LiveConfig { connections, last_heard };
    }
    let time = bench.plane.memory.since_epoch(bench.now);
    let millis = u64::try_from(time.as_millis()).unwrap();
    bench.worker.backends[id.slot()].live.publish(&live, |_| millis);
}

#[test]
fn nothing_that_live_connections_use_is_taken_away_without_force() {
    let told = |applied| match applied {
        Applied::InUse(all) => all.iter().map(ToString::to_string).collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    let without_a = |config: &mut Config| drop(config.pools[0].backends.remove(0));
    let renumbered = |config: &mut Config| {
        let (_, id) = &mut config.pools[0].backends[0].server_ids[0];
        *id = ServerId::new(&vec![0xaa; id.as_slice().len()]).unwrap();
    };
    let without_configs = |config: &mut Config| config.pools[0].cid_configs.clear();
    let changes: [&dyn Fn(&mut Config); 3] = [&without_a, &renumbered, &without_configs];
    let says = ["backend web/a: about 12", "connection IDs of web/a with config ID 0: about 7"];
    for (change, says) in changes.into_iter().zip([says[0], says[1], says[1]]) {
        let mut bench = Bench::new();
        bench.now += 2 * QUIET;
        hear(&bench, "a", &[(0, 7), (7, 5)]);
        let told = told(bench.reload(change));
        assert!(matches!(told.as_slice(), [one] if one.starts_with(says)), "{told:?}");
        assert_eq!(
            bench.plane.config().pools[0].backends.len(),
            fixtures::config(true).pools[0].backends.len()
        );
        // Nor does what is left in place stand in the way, nor others.
        let harmless = |config: &mut Config| config.pools[0].backends[1].weight = NonZeroU32::MAX;
        let mut other = Bench::new();
        other.now += 2 * QUIET;
        hear(&other, "a", &[(0, 7), (7, 5)]);
        assert_eq!(other.reload(harmless), Applied::Changed);
        // Whoever forces it, waits, or has lost the backend, goes on.
        let mut config = fixtures::config(true);
        change(&mut config);
        assert_eq!(bench.plane.apply(bench.now, config, true), Applied::Changed);
        other.now += QUIET;
        assert_eq!(other.reload(change), Applied::Changed);
    }
}

#[test]
fn a_backend_that_is_down_may_be_taken_away_with_what_is_lost_already() {
    let mut bench = Bench::new();
    bench.now += 2 * QUIET;
    bench.worker.backends[bench.slot("a")].refuse(Refusal::ConnectionRefused, 3);
    bench.tick();
    assert_eq!(bench.state("a"), BackendState::Down);
    hear(&bench, "a", &[(0, 7)]);
    let without_a = |config: &mut Config| drop(config.pools[0].backends.remove(0));
    assert_eq!(bench.reload(without_a), Applied::Changed);
}

/// cargo test --release -p quic-lb --lib -- --ignored --nocapture what_a_large_fleet_costs
#[test]
#[ignore = "measures, and proves nothing"]
fn what_a_large_fleet_costs() {
    use std::sync::Mutex;

    use crate::{backend::MAX_BACKENDS, metrics::Metrics};

    for count in [4096, MAX_BACKENDS] {
        let mut config = fixtures::config(true);
        let pool = &mut config.pools[0];
        let backend = pool.backends[0].clone();
        let (id, _) = backend.server_ids[0];
        let named = |n: u16| Backend {
            name: format!("backend-{n}"),
            address: ([10, 0, 0, 1], n).into(),
            server_ids: vec![(id, ServerId::new(&n.to_be_bytes()).unwrap())],
            ..backend.clone()
        };
        pool.backends = (1..=u16::try_from(count).unwrap()).map(named).collect();
        let other = config.clone();
        let mut bench = Bench::of(config);
        let timed = |what: &str, begin: Instant| println!("{count}: {what} {:?}", begin.elapsed());
        for nth in 0..3 {
            let wanted = if nth == 1 { Admission::Active } else { Admission::Draining };
            let begin = Instant::now();
            assert!(bench.plane.command("web", "backend-7", command(wanted)));
            timed("command", begin);
            let begin = Instant::now();
            let order = bench.plane.order().unwrap();
            timed("order", begin);
            let begin = Instant::now();
            let built = order.build();
            timed("build (beside)", begin);
            let begin = Instant::now();
            bench.plane.install(built);
            timed("install", begin);
            let begin = Instant::now();
            bench.plane.on_tick(bench.now);
            timed("tick", begin);
        }
        let begin = Instant::now();
        assert_eq!(bench.plane.apply(bench.now, other, false), Applied::Unchanged);
        timed("unchanged file", begin);
        let plane = Arc::new(Mutex::new(bench.plane));
        let (read, now) = (Arc::clone(&plane), bench.now);
        let metrics = Metrics::new(move || read.lock().unwrap().reading(now));
        for _ in 0..2 {
            let begin = Instant::now();
            drop(plane.lock().unwrap().reading(now));
            timed("reading", begin);
            let begin = Instant::now();
            let text = metrics.render();
            timed(&format!("scrape of {} octets", text.len()), begin);
        }
    }
}

#[test]
fn what_was_commanded_before_holds_for_the_backends_that_there_still_are() {
    let mut before = Bench::new();
    before.command("a", Admission::Draining);
    before.command("b", Admission::Draining);
    let mut bench = Bench::of({
        let mut config = fixtures::config(true);
        config.pools[0].backends.remove(1);
        config
    });
    bench.plane.restore(before.plane.commands().clone());
    bench.build();
    assert_eq!(bench.state("a"), BackendState::Draining);
    assert_eq!(bench.view("a").command, Some(command(Admission::Draining)));
    // One that comes back later is another one.
    assert_eq!(bench.plane.commands().len(), 1);
    assert_eq!(bench.reload(|_| {}), Applied::Changed);
    assert_eq!(bench.state("b"), BackendState::Active);
}
