//! Listeners that come, go and move by a reload: with real sockets, and connections that go on.

#![allow(clippy::unwrap_used, reason = "a failed test is a fine message")]

mod support;

use std::net::UdpSocket;

use support::{
    balancer::{Balancer, Host, Server, initial, short},
    quic_lb,
};

const APPLIED: &str = "quic_lb_config_reloads_total{result=\"applied\"}";
const REJECTED: &str = "quic_lb_config_reloads_total{result=\"rejected\"}";

/// The configuration with listeners of these names and ports; flows end soon.
fn config(host: Host, listeners: &[(&str, u16)]) -> String {
    let config = host.config().replace("timeouts: {", "timeouts: { flow_idle: \"2s\",");
    let (_, rest) = config.split_once("pools:").unwrap();
    let lines = listeners.iter().map(|(name, port)| {
        format!("  - {{ name: {name}, address: \"{}\", pool: web }}\n", host.at(*port))
    });
    format!("listeners:\n{}pools:{rest}", lines.collect::<String>())
}

/// Has the balancer read this, and waits until it is in force.
#[track_caller]
fn reload(balancer: &Balancer, listeners: &[(&str, u16)]) -> String {
    balancer.rewrite(&config(balancer.host, listeners));
    let answer = balancer.post("/api/v1/reload");
    assert_eq!(answer.status, 200, "{answer:?}\n{}", balancer.log());
    answer.body
}

fn received(balancer: &Balancer, listener: &str) -> f64 {
    balancer.metric(&format!("quic_lb_datagrams_received_total{{listener=\"{listener}\"}}"))
}

#[test]
fn a_listener_that_is_added_serves_and_touches_no_flow() {
    let host = Host::new();
    let _a = Server::start(host.at(5001), "a");
    let balancer = Balancer::start_with(host, &config(host, &[("edge", 4433)]));
    let (client, cid) = (balancer.client(), balancer.cid("a"));
    let before = client.ask(&short(&cid));
    // In front of the one that there was, so that it has another place.
    let told = reload(&balancer, &[("inner", 4434), ("edge", 4433)]);
    assert!(told.contains("listeners[inner]"), "{told}");
    let inner = balancer.client_of(4434);
    assert!(inner.ask(&short(&cid)).starts_with("a "));
    assert_eq!(client.ask(&short(&cid)), before, "the same upstream port");
    assert!(received(&balancer, "inner") >= 1.0 && received(&balancer, "edge") >= 2.0);
    let listening = balancer.records("listening");
    assert_eq!(listening.last().unwrap()["address"], host.at(4434).to_string());
    let path = format!("/api/v1/explain?from={}&hex=40&listener=inner", client.address());
    assert_eq!(balancer.get(&path).status, 200, "{:?}", balancer.get(&path));
}

#[test]
fn a_listener_that_is_removed_goes_on_for_its_connections_and_ends_with_them() {
    let host = Host::new();
    let _a = Server::start(host.at(5001), "a");
    let both = [("edge", 4433), ("inner", 4434)];
    let mut balancer = Balancer::start_with(host, &config(host, &both));
    let (client, cid) = (balancer.client_of(4434), balancer.cid("a"));
    let before = client.ask(&short(&cid));
    let (newcomer, mover) = (balancer.client_of(4434), balancer.client_of(4434));
    reload(&balancer, &[("edge", 4433)]);

    const REMOVED: &str =
        "quic_lb_datagrams_dropped_total{listener=\"inner\",reason=\"listener_removed\"}";
    balancer.wait("a refused connection", |balancer| {
        assert_eq!(client.ask(&short(&cid)), before, "its connections go on");
        newcomer.send(&initial(7));
        balancer.metrics().get(REMOVED).is_some_and(|dropped| *dropped >= 1.0)
    });
    assert!(mover.ask(&short(&cid)).starts_with("a "), "also on another path");
    // As long as it has connections, it is the same listener that comes back.
    reload(&balancer, &both);
    assert_eq!(client.ask(&short(&cid)), before);
    reload(&balancer, &[("edge", 4433)]);
    assert!(UdpSocket::bind(host.at(4434)).is_err(), "still in use");

    balancer.wait_for_record("the listener has ended");
    balancer.wait("the address", |balancer| UdpSocket::bind(balancer.host.at(4434)).is_ok());
    assert!(!balancer.metrics().contains_key(REMOVED), "it is not shown any more");
    reload(&balancer, &both);
    assert!(client.ask(&short(&cid)).starts_with("a "));
}

#[test]
fn a_listener_that_moves_keeps_its_connections_at_its_old_address_and_its_counters() {
    let host = Host::new();
    let _a = Server::start(host.at(5001), "a");
    let balancer = Balancer::start_with(host, &config(host, &[("edge", 4433)]));
    let (client, cid) = (balancer.client(), balancer.cid("a"));
    let before = client.ask(&short(&cid));
    let counted = received(&balancer, "edge");
    reload(&balancer, &[("edge", 4435)]);
    assert_eq!(client.ask(&short(&cid)), before);
    assert!(balancer.client_of(4435).ask(&short(&cid)).starts_with("a "));
    assert!(received(&balancer, "edge") >= counted + 2.0);
    // Another name is no other listener.
    let told = reload(&balancer, &[("front", 4435)]);
    assert!(told.contains("listeners[front]"), "{told}");
    assert!(received(&balancer, "front") >= 1.0);
}

#[test]
fn a_listener_that_cannot_be_opened_refuses_the_file_as_a_whole() {
    let host = Host::new();
    let _a = Server::start(host.at(5001), "a");
    let mut balancer = Balancer::start_with(host, &config(host, &[("edge", 4433)]));
    let (client, cid) = (balancer.client(), balancer.cid("a"));
    let before = client.ask(&short(&cid));
    let taken = UdpSocket::bind(host.at(4436)).unwrap();
    let wanted = [("edge", 4433), ("inner", 4434), ("taken", 4436)];
    balancer.rewrite(&config(host, &wanted));
    let admin = host.at(9090).to_string();
    let refused = quic_lb(&["reload", "--admin", &admin]).failed(1);
    assert!(refused.contains(&format!("listener taken cannot listen on {}", host.at(4436))));
    balancer.wait("the other one to be closed", |_| UdpSocket::bind(host.at(4434)).is_ok());
    assert_eq!((balancer.metric(APPLIED), balancer.metric(REJECTED)), (0.0, 1.0));
    assert_eq!(client.ask(&short(&cid)), before);

    drop(taken);
    reload(&balancer, &wanted);
    assert!(balancer.client_of(4436).ask(&short(&cid)).starts_with("a "));
    assert_eq!(client.ask(&short(&cid)), before);
    assert_eq!((balancer.metric(APPLIED), balancer.metric(REJECTED)), (1.0, 1.0));
}
