//! Several balancers of a fleet: whether they decide alike.

#![allow(clippy::unwrap_used, reason = "a failed test is a fine message")]

mod support;

use serde_json::{Value, json};
use support::{
    KEY,
    balancer::{Balancer, Host},
    quic_lb,
};

/// As the other's, at an address of its own.
fn beside(first: Host, host: Host) -> String {
    let config = first.config();
    let config = config.replace(&first.at(4433).to_string(), &host.at(4433).to_string());
    config.replace(&first.at(9090).to_string(), &host.at(9090).to_string())
}

#[test]
fn balancers_agree_until_one_decides_otherwise() {
    let hosts = [Host::new(), Host::new()];
    let first = Balancer::start(hosts[0]);
    let second = Balancer::start_with(hosts[1], &beside(hosts[0], hosts[1]));
    let urls = hosts.map(|host| format!("http://{}", host.at(9090)));
    let places = hosts.map(|host| host.at(9090).to_string());
    let agree = |more: &[&str]| {
        let urls: Vec<_> = urls.iter().map(String::as_str).collect();
        quic_lb(&[&["agree"], more, &urls].concat())
    };
    let told = agree(&[]).done();
    assert!(told.starts_with("2 balancers agree; digest "), "{told}");

    // A command, a weight and a key at one of them.
    quic_lb(&["drain", "--admin", &places[0], "--reason", "disks", "web/a"]).done();
    let other = "f09245765f80256934e50c66207f8f95";
    let config = beside(hosts[0], hosts[1]).replace("weight: 2", "weight: 3").replace(KEY, other);
    second.rewrite(&config);
    quic_lb(&["reload", "--admin", &places[1]]).done();
    let differ = agree(&[]);
    assert_eq!((differ.code, &*differ.err), (Some(3), ""), "{differ:?}");
    for told in [
        "pools[web].backends[b].weight\n",
        &format!("    {}: 2\n    {}: 3\n", places[0], places[1]),
        "pools[web].quic_lb[0].key\n",
        "check value ",
        "states[web][a]\n",
        &format!("    {}: draining\n    {}: active\n", places[0], places[1]),
        "commands[web/a]\n",
        "disks",
        "2 balancers differ in 4 places\n",
    ] {
        assert!(differ.out.contains(told), "{told:?} in {}", differ.out);
    }
    assert!(!differ.out.contains(KEY) && !differ.out.contains(other), "{}", differ.out);
    let json = agree(&["--json"]);
    let facts: Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!((json.code, &facts["agree"]), (Some(3), &json!(false)));
    assert_ne!(facts["digests"][&places[0]], facts["digests"][&places[1]]);
    assert_eq!(facts["differences"].as_array().unwrap().len(), 4);

    // The same command there, and the file as it was.
    quic_lb(&["drain", "--admin", &places[1], "web/a"]).done();
    second.rewrite(&beside(hosts[0], hosts[1]));
    quic_lb(&["reload", "--admin", &places[1]]).done();
    agree(&[]).done();

    drop(first);
    let gone = agree(&[]);
    assert_eq!((gone.code, &*gone.out), (Some(1), ""), "{gone:?}");
    assert!(gone.err.contains(&format!("no admin interface answers at {}", places[0])), "{gone:?}");
    assert!(gone.err.contains("1 of 2 balancers answered"), "{gone:?}");
}
