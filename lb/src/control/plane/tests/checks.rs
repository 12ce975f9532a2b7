//! What checks take and give.

use super::*;

/// A bench of which the pool is checked.
fn checked() -> Bench {
    let mut config = fixtures::config(true);
    config.pools[0].health_check = Some(health_check());
    Bench::of(config)
}

pub(super) fn health_check() -> HealthCheck {
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
    let another = bench.plane.routing().load().backends().find(|of| *of.name == *"b").unwrap().id;
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
    let named = bench.plane.named(&routing, bench.plane.fleet.get("web", "a").unwrap()).unwrap();
    assert_eq!((&*named.name, named.id.slot()), ("b", b));
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
    let another = bench.plane.routing().load().backends().find(|of| *of.name == *"b").unwrap().id;
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
