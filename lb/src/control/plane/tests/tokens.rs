//! Whether servers honour the tokens of Retries.

use std::collections::BTreeMap;

use super::*;
use crate::control::checks::honours::TokenAnswer;

#[test]
fn validation_waits_until_servers_are_known_to_honour_tokens_and_ends_when_one_does_not() {
    for mode in [RetryMode::Always, RetryMode::Adaptive] {
        let mut config = fixtures::config(true);
        config.pools[0].honours_tokens = HonoursTokens::Probe;
        config.retry.mode = mode;
        config.retry.adaptive.on_rate = 10;
        config.retry.keys = vec![TokenKey::new(0, [1; 16], [0; 12]).unwrap()];
        let mut bench = Bench::of(config);
        let phase = |bench: &mut Bench, result: Option<TokenAnswer>| {
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
        let _ = bench.plane.on_token(&third, TokenAnswer::Honoured);
        assert_eq!(phase(&mut bench, None), "inactive");
        assert_eq!(phase(&mut bench, Some(TokenAnswer::Nothing)), "inactive");
        assert_eq!(phase(&mut bench, Some(TokenAnswer::Honoured)), "active", "two of three do");
        assert_eq!(gate(&bench), "active");
        assert_eq!(phase(&mut bench, Some(TokenAnswer::Nothing)), "active", "it is busy");
        assert_eq!(phase(&mut bench, Some(TokenAnswer::Expired)), "active", "once");
        assert_eq!(phase(&mut bench, Some(TokenAnswer::Refused)), "inactive");
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

/// What answers checks elsewhere may be another server.
#[test]
fn it_is_the_backend_that_is_asked_for_tokens_wherever_it_is_checked() {
    let mut config = fixtures::config(true);
    config.pools[0].health_check = Some(HealthCheck { port: Some(7), ..checks::health_check() });
    config.pools[0].backends[1].check_address = Some("127.0.0.9:7".parse().unwrap());
    config.pools[0].honours_tokens = HonoursTokens::Probe;
    config.retry.mode = RetryMode::Always;
    config.retry.keys = vec![TokenKey::new(0, [1; 16], [0; 12]).unwrap()];
    let asked = Bench::of(config).plane.token_targets();
    assert_eq!(asked.len(), 3);
    for of in asked {
        assert_eq!(of.target.address, of.target.backend);
    }
}

#[test]
fn the_clock_of_a_backend_is_shown_as_far_as_it_is_known() {
    let mut config = fixtures::config(true);
    config.pools[0].honours_tokens = HonoursTokens::Probe;
    config.retry.mode = RetryMode::Always;
    config.retry.keys = vec![TokenKey::new(0, [1; 16], [0; 12]).unwrap()];
    let mut bench = Bench::of(config);
    let mut target = bench.plane.token_targets().remove(0).target;
    let skews = |bench: &Bench| {
        let backends = bench.plane.reading(bench.now).backends;
        backends.iter().map(|of| of.clock_skew).collect::<Vec<_>>()
    };
    assert_eq!(skews(&bench), [None; 3]);
    for known in [Some(-3600), Some(1), None] {
        bench.plane.on_skew(&target, known);
        assert_eq!(skews(&bench), [known, None, None]);
    }
    // What was found of another server that had this name.
    target.backend.set_port(1);
    bench.plane.on_skew(&target, Some(7));
    assert_eq!(skews(&bench), [None; 3]);
}

#[test]
fn how_often_validation_began_does_not_go_back_when_a_listener_comes_back() {
    let adaptive = |config: &mut Config| {
        config.pools[0].honours_tokens = HonoursTokens::Yes;
        config.retry.mode = RetryMode::Adaptive;
        config.retry.keys = vec![TokenKey::new(1, [1; 16], [0; 12]).unwrap()];
    };
    let elsewhere = |config: &mut Config| {
        adaptive(config);
        config.listeners[0].name = "elsewhere".into();
        config.listeners[0].address.set_port(1);
    };
    let mut config = fixtures::config(true);
    adaptive(&mut config);
    let name = config.listeners[0].name.clone();
    let mut bench = Bench::of(config);
    let begun = |bench: &Bench| -> Option<u64> {
        let listeners = bench.plane.reading(bench.now).listeners;
        let of_name = listeners.iter().find(|of| of.name == name)?;
        Some(of_name.switches.iter().sum())
    };
    assert!(bench.plane.on_half_open(bench.now, "web", "a", u64::MAX));
    bench.tick();
    assert_eq!(begun(&bench), Some(1));
    assert_eq!(bench.reload(elsewhere), Applied::Changed);
    bench.tick();
    assert_eq!(begun(&bench), None, "it has ended");
    bench.now += Duration::from_secs(10);
    assert_eq!(bench.reload(adaptive), Applied::Changed);
    bench.tick();
    assert_eq!(begun(&bench), Some(1));
}

/// Whoever puts a key in front goes by what servers have made of it, and not of another one that had its number.
#[test]
fn what_servers_made_of_a_key_is_forgotten_with_the_key() {
    let key = |sequence, octet| TokenKey::new(sequence, [octet; 16], [0; 12]).unwrap();
    let with_keys = |keys: &[(u8, u8)]| {
        let mut config = fixtures::config(true);
        config.pools[0].honours_tokens = HonoursTokens::Probe;
        config.retry.mode = RetryMode::Always;
        config.retry.keys = keys.iter().map(|&(sequence, octet)| key(sequence, octet)).collect();
        config
    };
    let mut bench = Bench::of(with_keys(&[(1, 1), (2, 2)]));
    let asked = bench.plane.token_targets().remove(0).target;
    let honoured = BTreeMap::from([(1, true), (2, true)]);
    let shown = |bench: &Bench| bench.view("a").token_keys.unwrap();
    let old = bench.plane.tokens().unwrap();
    bench.plane.on_token_keys(&asked, &old, honoured.clone());
    assert_eq!(shown(&bench), honoured);

    let mut other = with_keys(&[(1, 1), (2, 2)]);
    other.pools[0].backends[1].weight = NonZeroU32::MAX;
    assert_eq!(bench.plane.apply(bench.now, other, false), Applied::Changed);
    assert_eq!(shown(&bench), honoured, "the keys are the same");
    for keys in [[(1, 1), (2, 3)], [(1, 1), (3, 3)], [(3, 3), (1, 1)]] {
        assert_eq!(bench.plane.apply(bench.now, with_keys(&keys), false), Applied::Changed);
        assert!(shown(&bench).is_empty(), "{keys:?}");
        // An answer that was under way is about the keys of before.
        bench.plane.on_token_keys(&asked, &old, honoured.clone());
        assert!(shown(&bench).is_empty(), "{keys:?}");
    }
}
