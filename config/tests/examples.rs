//! The examples load as they are, and what they say arrives.

use std::{num::NonZeroU32, path::PathBuf, time::Duration};

use quic_lb_config::{
    Admission, Config, LogFormat, LogLevel, Mistake, Retry, Surroundings, from_str, load,
};

#[test]
fn every_example_loads_without_warnings() {
    let mut examples = 0;
    for entry in std::fs::read_dir(directory()).expect("the examples") {
        let path = entry.expect("an entry").path();
        let loaded = load(&path).unwrap_or_else(|report| panic!("{report}"));
        // Their keys are no secrets, and whoever checks them out may read them.
        let open = |warning: &&Mistake| !warning.found.starts_with("a key in a file that everyone");
        let warnings: Vec<_> = loaded.warnings.iter().filter(open).collect();
        assert_eq!(warnings, Vec::<&Mistake>::new(), "{}", path.display());
        examples += 1;
    }
    assert_eq!(examples, 6);
}

#[test]
fn the_contract_says_what_it_says() {
    let config = example("contract.yaml");
    assert_eq!(config.listeners.len(), 1);
    let listener = &config.listeners[0];
    assert_eq!((&*listener.name, listener.address.to_string()), ("edge", "127.0.0.1:4433".into()));
    let pool = &config.pools[listener.pool];
    assert_eq!(pool.name, "web");
    let cid_config = &pool.cid_configs[0];
    assert_eq!(
        (cid_config.id().get(), cid_config.server_id_len(), cid_config.nonce_len()),
        (0, 2, 6)
    );
    assert!(cid_config.is_encrypted());
    let [a, b] = &pool.backends[..] else { panic!("two backends") };
    assert_eq!((&*a.name, a.address.to_string()), ("a", "127.0.0.1:5001".into()));
    assert_eq!((a.weight, a.admission), (NonZeroU32::MIN, Admission::Active));
    assert_eq!(b.weight.get(), 2);
    let (id, server_id) = b.server_ids[0];
    assert_eq!((id.get(), server_id.as_slice()), (0, &[0, 2][..]));
    assert_eq!(config.admin.expect("an address").address.to_string(), "127.0.0.1:9090");
}

#[test]
fn full_shows_the_defaults() {
    let (full, contract) = (example("full.yaml"), example("contract.yaml"));
    assert_eq!(full.workers, contract.workers);
    assert_eq!(full.limits, contract.limits);
    assert_eq!(full.timeouts, contract.timeouts);
    assert_eq!(full.log, contract.log);
    assert_eq!(full.masked_document()["retry"], contract.masked_document()["retry"]);
    let default = Retry::default();
    assert_eq!(full.retry.adaptive, default.adaptive);
    assert_eq!(
        (full.retry.lifetime, full.retry.transition),
        (default.lifetime, default.transition)
    );
    assert_eq!((default.adaptive.on_rate, default.adaptive.off_rate), (1000, 500));
    assert_eq!((default.lifetime, default.transition), {
        (Duration::from_secs(10), Duration::from_millis(200))
    });
    assert_eq!(full.pools[0].backends[0].weight, contract.pools[0].backends[0].weight);
    assert_eq!((full.limits.flows.get(), full.limits.remembered.get()), (50_000, 262_144));
    assert_eq!(full.timeouts.flow_idle, Duration::from_secs(180));
    assert_eq!(full.timeouts.flow_unanswered, Duration::from_secs(10));
    assert_eq!(full.timeouts.drain, Duration::from_secs(30));
    assert_eq!((full.log.level, full.log.format), (LogLevel::Info, LogFormat::Text));
}

#[test]
fn configurations_come_in_the_order_of_the_file() {
    let config = example("several-configs.yaml");
    let ids: Vec<_> = config.pools[0].cid_configs.iter().map(|c| c.id().get()).collect();
    assert_eq!(ids, [0, 1]);
    for backend in &config.pools[0].backends {
        let ids: Vec<_> = backend.server_ids.iter().map(|(id, _)| id.get()).collect();
        assert_eq!(ids, [0, 1], "{}", backend.name);
    }
    // The last is what servers go by, whatever its number; balancers read all of them.
    let of = |ids: [u8; 2]| {
        let configs =
            ids.map(|id| format!("{{ config_id: {id}, server_id_length: 2, nonce_length: 6 }}"));
        let text = format!(
            "listeners: [{{ name: edge, address: \"127.0.0.1:4433\", pool: web }}]\n\
             pools: [{{ name: web, quic_lb: [{}], backends: [{{ name: a, address: \"127.0.0.1:5001\", server_id: \"0001\" }}] }}]",
            configs.join(", ")
        );
        let config = from_str(&text, &Surroundings::of_text("order")).unwrap().config;
        let found: Vec<_> = config.pools[0].cid_configs.iter().map(|of| of.id().get()).collect();
        assert_eq!(found, ids);
        config.digest()
    };
    assert_eq!(of([6, 0]), of([0, 6]));
}

fn example(name: &str) -> Config {
    load(directory().join(name)).unwrap_or_else(|report| panic!("{report}")).config
}

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("examples")
}
