mod checks;
mod signals;
mod tokens;

use std::time::Duration;

use quic::{routable::ServerId, token::TokenKey};
use quic_lb_config::HealthCheck;

use super::{
    alarms::{FLOOD_SAID_EVERY, LOOP_WARNINGS},
    backends::CheckTarget,
    views::BackendView,
    *,
};
use crate::{
    check::{CheckResult, Finding},
    counters::WorkerCounters,
    fixtures,
    flows::census::{Live, LiveConfig},
    metrics::Metrics,
    refusal::Refusal,
    routing::FallbackKey,
    verdict::{DropReason, TokenResult},
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
        routing.backends().find(|backend| *backend.name == *name).unwrap().id.slot()
    }
}

fn command(wanted: Admission) -> Command {
    let author = Author { by: "ann".into(), reason: None };
    Command { wanted, author, unix_time: 0 }
}

fn name(backend: &str) -> (String, String) {
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
fn what_a_running_process_cannot_follow_is_refused_as_a_whole_and_named() {
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
    let Applied::NotFollowed(reasons) = outcome else { panic!("{outcome:?}") };
    assert_eq!(
        reasons,
        [
            "workers changes from one for each core to 4, which needs a restart",
            "admin.address changes from no address to 127.0.0.1:9090, which takes `quic-lb upgrade`",
            "limits.flows changes from 1000 to 7, which takes `quic-lb upgrade`",
            "limits.remembered changes from 1000 to 7, which takes `quic-lb upgrade`",
            "log.format changes from text to json, which takes `quic-lb upgrade`",
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

/// A worker that hears of a backend has nothing to make for it.
#[test]
fn counters_are_there_before_a_backend_is_and_no_others() {
    let mut bench = Bench::new();
    let made = |bench: &Bench| bench.worker.backends.iter().count();
    let few = made(&bench);
    assert!(bench.worker.backends.get(bench.slot("a")).is_some() && few < 1_000, "{few}");
    bench.reload(|config| {
        let pool = &mut config.pools[0];
        let like = pool.backends[0].clone();
        let joins = |n: u16| Backend {
            name: format!("n{n}"),
            address: ([10, 0, 0, 1], n).into(),
            server_ids: vec![],
            ..like.clone()
        };
        pool.backends.extend((1..=600).map(joins));
    });
    let routing = bench.plane.routing().load();
    assert!(routing.backends().all(|of| bench.worker.backends.get(of.id.slot()).is_some()));
    assert!(made(&bench) > few && made(&bench) < 2_000);
}

#[test]
fn what_is_counted_of_all_listeners_does_not_go_back_when_one_is_gone() {
    let mut bench = Bench::new();
    bench.worker.listeners[0].retries.add(3);
    bench.worker.listeners[0].tokens[TokenResult::Expired as usize].add(2);
    let counted = |bench: &Bench| {
        let reading = bench.plane.reading(bench.now);
        let names: Vec<_> = reading.listeners.iter().map(|of| of.name.clone()).collect();
        let text = Metrics::new(move || reading.clone()).render();
        let has = |line: &str| text.lines().any(|of_text| of_text == line);
        let sent = has("quic_lb_retry_sent_total 3");
        (names, sent, has("quic_lb_retry_tokens_total{result=\"expired\"} 2"))
    };
    let before = counted(&bench);
    assert_eq!((before.1, before.2), (true, true));
    bench.reload(|config| {
        config.listeners[0].name = "elsewhere".into();
        config.listeners[0].address.set_port(1);
    });
    bench.tick();
    assert_eq!(counted(&bench), (vec!["elsewhere".to_owned()], true, true));
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
fn flows_that_may_be_forged_are_told_of_when_they_are_most_and_once_in_a_while() {
    let mut bench = Bench::new();
    let told = |bench: &mut Bench, unproven| {
        bench.worker.unproven_flows.set(unproven);
        bench.plane.flood_said = None;
        bench.tick();
        bench.plane.flood_said.is_some()
    };
    // The table has room for 1,000.
    assert!(!told(&mut bench, 0));
    assert!(!told(&mut bench, 500));
    assert!(told(&mut bench, 501));
    let said = bench.plane.flood_said;
    bench.tick();
    assert_eq!(bench.plane.flood_said, said, "it was said just now");
    bench.now += FLOOD_SAID_EVERY;
    bench.tick();
    assert_ne!(bench.plane.flood_said, said);
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
    let id = routing.backends().find(|route| *route.name == *name).unwrap().id;
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

    use crate::backend::MAX_BACKENDS;

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

/// A client that keeps its connection open for requests to come says something every few seconds.
#[test]
fn a_process_that_ends_waits_for_connections_that_were_heard_lately() {
    let mut bench = Bench::new();
    hear(&bench, "a", &[(0, 1)]);
    let began = bench.now;
    let is_quiet = |bench: &Bench| bench.plane.is_quiet(bench.now, began);
    bench.now = began + QUIET - TICK;
    assert!(!is_quiet(&bench));
    bench.now = began + QUIET;
    assert!(is_quiet(&bench));
    // Where nothing was heard yet, the sweep may not have seen it.
    let mut bench = Bench::new();
    bench.now = began + CENSUS - TICK;
    assert!(!bench.plane.is_quiet(bench.now, began));
    bench.now = began + CENSUS;
    assert!(bench.plane.is_quiet(bench.now, began));
}
