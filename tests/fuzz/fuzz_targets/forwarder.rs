//! Whatever arrives from clients and servers, in any order: no panic, bounded flows and memory,
//! one verdict each, and a routable connection ID still goes to its server.
#![no_main]

use std::{
    sync::{Arc, LazyLock},
    time::{Duration, Instant, UNIX_EPOCH},
};

use libfuzzer_sys::fuzz_target;
use quic_lb::{
    client_path::{ClientPath, ListenerIndex},
    forwarder::{Clock, Datagram, Forwarder, Start},
    memory::{Memory, Sizes},
    registry::Registry,
    routing::Routing,
    verdict::{DropReason, Ended, Verdict},
};
use quic_lb_config::{Config, Surroundings, from_str};

const YAML: &str = r#"
listeners: [{ name: edge, address: "127.0.0.1:4433", pool: web }]
pools:
  - name: web
    honours_tokens: true
    quic_lb: [{ config_id: 0, server_id_length: 2, nonce_length: 6 }]
    backends:
      - { name: a, address: "127.0.0.1:5001", server_id: "0001" }
      - { name: b, address: "127.0.0.1:5002", server_id: "0002" }
"#;
const DEFENCE: &str = r#"
retry: { mode: always, keys: [{ sequence: 0, key: "000102030405060708090a0b0c0d0e0f" }] }
limits: { new_connections_per_second: { per_address: 3, per_network: 5, total: 9 } }
"#;

static OPEN: LazyLock<Config> = LazyLock::new(|| config(YAML));
static DEFENDED: LazyLock<Config> = LazyLock::new(|| config(&[YAML, DEFENCE].concat()));

fn config(text: &str) -> Config {
    let surroundings =
        Surroundings::of_text("fuzz.yaml");
    from_str(text, &surroundings).expect("the configuration is right").config
}

fuzz_target!(|octets: &[u8]| {
    let Some((&kind, octets)) = octets.split_first() else { return };
    let config = if kind % 2 == 0 { &*OPEN } else { &*DEFENDED };
    let start = Instant::now();
    let routing = Routing::new(config, &mut Registry::default(), |_, _| Default::default());
    let routing = Arc::new(routing);
    let memory = Arc::new(Memory::new(32, start, [7; 4]));
    let start_with = Start { clock: Clock { now: start, unix: UNIX_EPOCH }, seed: [7; 32] };
    let mut forwarder = Forwarder::new(16, Arc::clone(&routing), Arc::clone(&memory), &start_with);
    let path =
        |port: u8| ClientPath { client: ([192, 0, 2, 1], 1 + u16::from(port)).into(), local: None };
    let send = |forwarder: &mut Forwarder, now, port, octets: &[u8]| {
        let mut verdict = [Verdict::Drop(DropReason::Empty)];
        let datagram = Datagram { path: path(port), octets };
        forwarder.decide_batch(now, ListenerIndex(0), &[datagram], &mut verdict);
        for reply in forwarder.replies() {
            assert!(reply.octets.len() <= octets.len());
        }
        verdict[0]
    };
    let mut now = start;
    let mut expired = Vec::new();
    let mut open = Vec::new();
    let mut rest = octets;
    while let Some((&[operation, argument, len], tail)) = rest.split_first_chunk::<3>() {
        let (octets, tail) = tail.split_at(usize::from(len).min(tail.len()));
        rest = tail;
        match operation % 4 {
            0 | 1 => {
                if let Verdict::Forward { via, .. } = send(&mut forwarder, now, argument, octets)
                    && let Some(flow) = via.flow()
                    && !open.contains(&flow)
                {
                    open.push(flow);
                }
            }
            2 => {
                if let Some(&flow) = open.get(usize::from(argument)) {
                    let _ = forwarder.returned(now, flow, octets);
                }
            }
            _ => {
                now += Duration::from_secs(u64::from(argument));
                forwarder.sweep(now, &mut expired);
                memory.sweep(now, &routing);
                open.retain(|&flow| !expired.iter().any(|ended: &Ended| ended.flow == flow));
                expired.clear();
            }
        }
        assert!(forwarder.flow_count() <= 16 && open.len() <= 16);
        let Sizes { handshakes, connections, .. } = memory.sizes(&routing);
        assert!(handshakes <= 16 && connections <= 16);
    }
    for server in [1, 2] {
        let cid = [0x40, 0x08, 0, server, 1, 2, 3, 4, 5, 6, 9, 9, 9];
        if let Verdict::Forward { backend, .. } = send(&mut forwarder, now, 0, &cid) {
            assert_eq!(backend.slot(), usize::from(server) - 1);
        }
    }
});
