//! Every mistake is reported, all of them at once, each where it stands. In the texts, `§` marks
//! the places.

mod common;

use std::collections::BTreeSet;

use quic_lb_config::{Commands, HashBy};

use common::{contract_with, mistakes, mistakes_at_marks, read};

const NONE: [&str; 0] = [];

#[test]
fn pools_hash_by_what_fits_them_unless_they_say_otherwise() {
    let hash_of = |routable: bool, hash: &str| {
        let quic_lb =
            "quic_lb: [{ config_id: 0, server_id_length: 1, nonce_length: 4, key_env: LB_KEY }],";
        let (quic_lb, id) = if routable { (quic_lb, ", server_id: \"01\"") } else { ("", "") };
        let text = format!(
            "listeners: [{{ name: edge, address: \"127.0.0.1:443\", pool: web }}]
pools: [{{ name: web, {quic_lb} {hash} backends: [{{ name: a, address: \"192.0.2.1:443\"{id} }}] }}]"
        );
        let config = read(&text).expect("no mistake").config;
        (config.pools[0].hash, config.digest())
    };
    assert_eq!(hash_of(false, "").0, HashBy::ClientAddress);
    assert_eq!(hash_of(true, "").0, HashBy::Dcid);
    for routable in [false, true] {
        let words = ["client_address", "client_address_and_port", "dcid"];
        let all = words.map(|hash| hash_of(routable, &format!("hash: {hash},")));
        let hashes = all.each_ref().map(|(hash, _)| *hash);
        assert_eq!(hashes, [HashBy::ClientAddress, HashBy::ClientAddressAndPort, HashBy::Dcid]);
        let digests: BTreeSet<_> = all.iter().map(|(_, digest)| digest).collect();
        assert_eq!(digests.len(), 3, "balancers that hash otherwise route otherwise");
        assert!(digests.contains(&hash_of(routable, "").1));
    }
    let warned = mistakes(
        "listeners: [{ name: edge, address: \"127.0.0.1:443\", pool: web }]
pools: [{ name: web, hash: dcid, backends: [{ name: a, address: \"192.0.2.1:443\" }] }]",
    );
    assert!(warned.iter().any(|warning| warning.found.contains("without quic_lb")), "{warned:?}");
}

#[test]
fn a_weight_that_is_no_slot_of_the_largest_table_is_worth_a_warning() {
    let with = |heavy: usize, mark: &str| {
        let heavy = (0..heavy).map(|n| {
            format!(
                "    - {{ name: h{n}, address: \"10.0.{}.{}:443\", weight: 1000 }}\n",
                n / 256,
                n % 256
            )
        });
        let heavy: String = heavy.collect();
        format!(
            "listeners: [{{ name: edge, address: \"127.0.0.1:443\", pool: web }}]
limits: {{ flows: 1000 }}
pools:
  - name: web
    backends:
    - {{ name: light, address: \"192.0.2.1:443\", weight: {mark}1 }}
{heavy}"
        )
    };
    assert!(mistakes(&with(1_048, "")).is_empty());
    mistakes_at_marks(&with(1_049, "§"), &["warning pools[0].backends[0].weight"]);
}

#[test]
fn only_a_listener_on_all_ipv6_addresses_has_those_of_ipv4_too() {
    let with = |address: &str, only: &str| {
        let marked = format!(
            "listeners: [{{ name: edge, address: \"{address}\", ipv6_only: {only}, pool: web }}]
pools: [{{ name: web, backends: [{{ name: a, address: \"192.0.2.1:443\" }}] }}]"
        );
        (read(&marked.replace('§', "")), marked)
    };
    for (address, only, both) in [
        ("[::]:443", "false", true),
        ("[::]:443", "true", false),
        ("[2001:db8::1]:443", "true", false),
        ("0.0.0.0:443", "true", false),
    ] {
        let config = with(address, only).0.expect("no mistake").config;
        assert_eq!(config.listeners[0].both_families, both, "{address} {only}");
    }
    let beside = |address: &str, backend: &str| {
        format!(
            "listeners:
  - {{ name: all, address: \"[::]:443\", ipv6_only: false, pool: web }}
  - {{ name: other, address: {address}, pool: web }}
pools: [{{ name: web, backends: [{{ name: a, address: {backend} }}] }}]"
        )
    };
    for covered in ["§\"0.0.0.0:443\"", "§\"192.0.2.7:443\"", "§\"[2001:db8::7]:443\""] {
        mistakes_at_marks(&beside(covered, "\"192.0.2.1:443\""), &["listeners[1].address"]);
    }
    let itself = beside("\"0.0.0.0:444\"", "§\"127.0.0.1:443\"");
    mistakes_at_marks(&itself, &["pools[0].backends[0].address"]);
    for (address, only) in [
        ("[2001:db8::1]:443", "§false"),
        ("0.0.0.0:443", "§false"),
        ("[::]:443", "§\"false\""),
        ("[::]:443", "§no"),
        ("[::]:443", "§0"),
    ] {
        mistakes_at_marks(&with(address, only).1, &["listeners[0].ipv6_only"]);
    }
}

#[test]
fn many_mistakes_of_all_kinds_are_reported_together() {
    let marked = r#"
listeners:
  - name: edge
    §adress: "127.0.0.1:4433"
    pool: web
  - name: §edge
    address: §localhost:4433
    pool: web
    §pool: web
  - §just text
pools:
  - name: web
    quic_lb:
      - config_id: §7
        server_id_length: §"2"
        nonce_length: §06
        key: §"8f95f09245765f80256934e50c66207"
      - { config_id: 1, server_id_length: 2, nonce_length: §18, key_env: §UNSET }
    backends:
      - name: a
        address: §"127.0.0.1:0"
        server_id: §000
      - name: §a
        address: §[1]
        server_id: §"00012"
        weight: §0
        state: §drained
      -
        §§§server_id:
  - name: §web
    backends: §[]
admin:
  address: §10.0.0.1
workers: §0
limits: {flows: §1e3, remembered: §"5"}
timeouts: {flow_idle: §5, drain: §"10 s", §idle: 1s}
log: {level: §verbose, format: §true}
retry: {mode: §auto}
§limts: {}
"#;
    let paths = [
        "listeners[0].adress",
        "listeners[1].name",
        "listeners[1].address",
        "listeners[1].pool",
        "listeners[2]",
        "pools[0].quic_lb[0].config_id",
        "pools[0].quic_lb[0].server_id_length",
        "pools[0].quic_lb[0].nonce_length",
        "pools[0].quic_lb[0].key",
        "pools[0].quic_lb[1].nonce_length",
        "pools[0].quic_lb[1].key_env",
        "pools[0].backends[0].address",
        "pools[0].backends[0].server_id",
        "pools[0].backends[1].name",
        "pools[0].backends[1].address",
        "pools[0].backends[1].server_id",
        "pools[0].backends[1].weight",
        "pools[0].backends[1].state",
        "pools[0].backends[2]",
        "pools[0].backends[2]",
        "pools[0].backends[2].server_id",
        "pools[1].name",
        "pools[1].backends",
        "admin.address",
        "workers",
        "limits.flows",
        "limits.remembered",
        "timeouts.flow_idle",
        "timeouts.drain",
        "timeouts.idle",
        "log.level",
        "log.format",
        "retry.mode",
        "limts",
    ];
    mistakes_at_marks(marked, &paths);

    let report = read(&marked.replace('§', "")).expect_err("many mistakes");
    assert_eq!(report.errors(), paths.len());
    let printed = report.to_string();
    assert!(
        printed.starts_with(
            "lb.yaml:4:5: error at listeners[0].adress\n  found:    the unknown key \"adress\"\n  \
             expected: \"address\", if that is meant; otherwise one of name, address, ipv6_only, pool, \
             retry, routes\n"
        ),
        "{printed}"
    );
    assert!(
        printed.contains(
            "lb.yaml:6:11: error at listeners[1].name\n  found:    edge again\n  expected: a \
             unique name\n  see also: line 3, column 11 (listeners[0].name)\n"
        ),
        "{printed}"
    );
}

#[test]
fn wrong_keys_are_named_with_what_would_do() {
    for (instead_of_weight, path, found, expected) in [
        ("§wieght: 2", "wieght", "the unknown key \"wieght\"", "\"weight\", if that is meant"),
        ("§port: 2", "port", "the unknown key \"port\"", "one of name, address, server_id"),
        ("§<<: {weight: 2}", "<<", "the unknown key \"<<\"", "one of name, address, server_id"),
        ("§name: c", "name", "the key \"name\" again", "each key once"),
        ("§[a]: c", "", "a list as a key", "a word"),
        ("§weight:", "weight", "nothing", "a whole number from 1 to 1000"),
    ] {
        let text = contract_with("weight: 2", instead_of_weight);
        let path = format!("pools[0].backends[1].{path}");
        one_mistake(&text, path.trim_end_matches('.'), found, expected);
    }
    let without_pool = contract_with("    pool: web\n", "").replace("name: edge", "§name: edge");
    let expected = "`pool`: The name of the pool that new connections go to";
    one_mistake(&without_pool, "listeners[0]", "no key \"pool\"", expected);
}

#[test]
fn wrong_names_are_told_from_wrong_types() {
    let expected = "1 to 63 letters, digits, '-', '_' or '.', the first a letter or digit";
    let in_quotes = format!("{expected}, in quotes");
    for (name, found, expected) in [
        ("{a: b}", "a mapping", expected),
        ("[a]", "a list", expected),
        ("7", "the number 7", &in_quotes),
        ("true", "true", &in_quotes),
        ("~", "nothing", expected),
        ("\"a b\"", "\"a b\"", expected),
        ("-x", "\"-x\"", expected),
        ("''", "\"\"", expected),
        ("ä", "\"ä\"", expected),
        ("\"a\\n\"", "\"a\\n\"", expected),
    ] {
        let text = contract_with("name: edge", &format!("name: §{name}"));
        one_mistake(&text, "listeners[0].name", found, expected);
    }
    let with = |len| contract_with("name: edge", &format!("name: {}", "x".repeat(len)));
    assert_eq!(places(&with(63)), NONE);
    assert_eq!(places(&with(64)), ["listeners[0].name at 2:11"]);
}

#[test]
fn addresses_are_of_one_host_and_have_a_port() {
    let form = "\"IP:port\" or \"[IPv6]:port\"";
    for (address, found, expected) in [
        ("127.0.0.1", "\"127.0.0.1\", which has no port", form),
        ("::1", "\"::1\", which has no port", form),
        ("[::1]", "\"[::1]\", which has no port", form),
        ("a.example:1", "the host name \"a.example:1\"", "; names are not resolved"),
        ("localhost", "the host name \"localhost\"", "; names are not resolved"),
        ("1.1.1.1:65536", "\"1.1.1.1:65536\", port 65536", "a port from 1 to 65535"),
        ("1.1.1.1:70000", "\"1.1.1.1:70000\", port 70000", "a port from 1 to 65535"),
        ("[2001:db8::1]:70000", "port 70000", "a port from 1 to 65535"),
        ("2001:db8::1:443", "an IPv6 address without brackets", "\"[2001:db8::1]:443\""),
        ("1:2:3:4:5:6:7:8:443", "an IPv6 address without brackets", "\"[1:2:3:4:5:6:7:8]:443\""),
        ("fe80::1%eth0:443", "an IPv6 address without brackets", "\"[fe80::1%eth0]:443\""),
        ("[1.2.3.4]:443", "\"[1.2.3.4]:443\"", form),
        ("127.0.0.1:0", "\"127.0.0.1:0\", port 0", "a port from 1 to 65535"),
        ("0.0.0.0:5001", "the unspecified address 0.0.0.0", "the address of one host"),
        ("[::]:5001", "the unspecified address ::", "the address of one host"),
        ("224.0.0.1:1", "224.0.0.1, which is many hosts", "the address of one host"),
        ("255.255.255.255:1", "255.255.255.255, which is many", "the address of one host"),
        ("[ff02::1]:1", "ff02::1, which is many hosts", "the address of one host"),
        ("[::ffff:1.2.3.4]:1", "the IPv4 address 1.2.3.4 inside an IPv6", "1.2.3.4 itself"),
        ("127.0.0.1:4433", "127.0.0.1:4433, where a listener is", "the address of a server"),
    ] {
        let text = contract_with("\"127.0.0.1:5001\"", &format!("§\"{address}\""));
        one_mistake(&text, "pools[0].backends[0].address", found, expected);
    }
    let text = contract_with("\"127.0.0.1:5002\"", "§\"127.0.0.1:5001\"");
    one_mistake(&text, "pools[0].backends[1].address", "5001 again", "a unique address");
}

#[test]
fn a_listener_on_all_addresses_covers_backends_on_loopback() {
    let text = contract_with("127.0.0.1:4433", "0.0.0.0:5001");
    let path = "pools[0].backends[0].address";
    one_mistake(&text.replacen("\"127.0.0.1:5001", "§\"127.0.0.1:5001", 1), path, "listener", "");
    assert_eq!(places(&contract_with("127.0.0.1:4433", "[::]:5001")), NONE);
}

#[test]
fn numbers_are_whole_decimal_and_within_bounds() {
    let expected = "a whole number from 1 to 1000";
    let unquoted = "a whole number from 1 to 1000, without quotes";
    for (weight, found, expected) in [
        ("0", "the number 0", expected),
        ("1001", "the number 1001", expected),
        ("99999999999999999999", "the number 99999999999999999999", expected),
        ("-1", "the number -1", expected),
        ("+1", "the number +1", expected),
        ("2.0", "the number 2.0", expected),
        ("0x2", "the number 0x2", expected),
        ("02", "the number 02", expected),
        ("'2'", "\"2\"", unquoted),
        ("''", "\"\"", expected),
        ("heavy", "\"heavy\"", expected),
        ("{}", "a mapping", expected),
    ] {
        let text = contract_with("weight: 2", &format!("weight: §{weight}"));
        one_mistake(&text, "pools[0].backends[1].weight", found, expected);
    }
    for weight in ["1", "1000"] {
        assert_eq!(places(&contract_with("weight: 2", &format!("weight: {weight}"))), NONE);
    }
}

#[test]
fn durations_have_a_unit_and_bounds() {
    let expected = "a duration with its unit (ms, s, m or h) from \"0ms\" to \"1h\"";
    for (drain, found) in [
        ("30", "30, which has no unit"),
        ("2h", "\"2h\""),
        ("\"10 s\"", "\"10 s\""),
        ("3601s", "\"3601s\""),
        ("[]", "a list"),
        ("true", "true"),
    ] {
        let text = contract_with("admin:", &format!("timeouts: {{drain: §{drain}}}\nadmin:"));
        one_mistake(&text, "timeouts.drain", found, expected);
    }
    for (drain, meant) in
        [("1h30m", "90m"), ("\"10 s\"", "10s"), ("1.5s", "1500ms"), ("5sec", "5s")]
    {
        let text = contract_with("admin:", &format!("timeouts: {{flow_idle: §{drain}}}\nadmin:"));
        let expected = format!("\"{meant}\", if that is meant: a duration with its unit");
        one_mistake(&text, "timeouts.flow_idle", "", &expected);
    }
    for drain in ["0s", "59s", "59999ms", "\"200ms\""] {
        let text = contract_with("admin:", &format!("timeouts: {{drain: {drain}}}\nadmin:"));
        assert_eq!(places(&text), NONE, "{drain}");
    }
}

#[test]
fn lengths_fit_a_connection_id() {
    let with = |server_id: u8, nonce: &str| {
        let digits = |last: u8| format!("{:0>1$}", last, 2 * usize::from(server_id));
        contract_with("server_id_length: 2", &format!("server_id_length: {server_id}"))
            .replace("nonce_length: 6", &format!("nonce_length: {nonce}"))
            .replace("0001", &digits(1))
            .replace("0002", &digits(2))
    };
    let path = "pools[0].quic_lb[0].nonce_length";
    assert_eq!(places(&with(2, "17")), NONE);
    one_mistake(&with(2, "§18"), path, "18 bytes after 2 bytes", "at most 19 bytes");
    assert_eq!(places(&with(15, "4")), NONE);
    one_mistake(&with(15, "§5"), path, "5 bytes after 15 bytes", "at most 19 bytes");
    one_mistake(&with(2, "§3"), path, "the number 3", "a whole number from 4 to 18");
}

#[test]
fn config_ids_are_unique_in_a_pool() {
    let text = "
listeners: [{name: l, address: '127.0.0.1:1', pool: p}]
pools:
  - name: p
    quic_lb:
      - {config_id: 0, server_id_length: 2, nonce_length: 4}
      - {config_id: §0, server_id_length: 2, nonce_length: 4}
    backends: [{name: a, address: '127.0.0.1:2', server_id: '0001'}]
";
    one_mistake(text, "pools[0].quic_lb[1].config_id", "0 again", "a unique config ID");
}

#[test]
fn server_ids_are_hex_of_the_right_length() {
    let digits = "two hex digits for each byte that server_id_length says";
    for (server_id, found, expected) in [
        ("000", "an odd number of hex digits, 3", digits),
        ("-001", "the number -001", digits),
        ("0x0001", "the number 0x0001", "\"0001\", if that is meant: two hex digits"),
        ("00:01", "\"00:01\"", "\"0001\", if that is meant"),
        ("\"00-01\"", "\"00-01\"", "\"0001\", if that is meant"),
        ("0x001", "the number 0x001", digits),
        ("~", "nothing", digits),
        ("\"00011\"", "an odd number of hex digits, 5", digits),
        ("\"000g\"", "\"000g\"", digits),
        ("\"\"", "an empty text", digits),
        ("\"00000000000000000000000000000001\"", "32 hex digits, more than 30", digits),
        ("\"01\"", "a server ID of 1 byte", "2 bytes, as server_id_length says"),
        ("\"000001\"", "a server ID of 3 bytes", "2 bytes, as server_id_length says"),
        ("[\"0001\"]", "a list", digits),
    ] {
        let text = contract_with("server_id: \"0001\"", &format!("server_id: §{server_id}"));
        one_mistake(&text, "pools[0].backends[0].server_id", found, expected);
    }
    let shared = contract_with("\"0002\"", "§\"0001\"");
    let found = "server ID 0001 of another backend under config ID 0";
    one_mistake(&shared, "pools[0].backends[1].server_id", found, "of its own");
    let missing = contract_with("        server_id: \"0002\"\n", "");
    let missing = missing.replace("name: b", "§name: b");
    let expected = "`server_id` or `server_ids`: 2 bytes for config ID 0";
    one_mistake(&missing, "pools[0].backends[1]", "a backend without server ID", expected);
    let both = contract_with("weight: 2", "server_ids: §{0: '0002'}");
    one_mistake(&both, "pools[0].backends[1].server_ids", "`server_ids` beside", "one of the two");
}

#[test]
fn pools_without_configurations_have_no_server_ids() {
    for (given, key) in
        [("server_id: §'01'", "server_id"), ("server_ids: §{0: '01'}", "server_ids")]
    {
        let text = format!(
            "
listeners: [{{name: l, address: '127.0.0.1:1', pool: p}}]
pools: [{{name: p, backends: [{{name: a, address: '127.0.0.1:2', {given}}}]}}]
"
        );
        let path = format!("pools[0].backends[0].{key}");
        one_mistake(&text, &path, "a pool without `quic_lb`", "no server ID");
    }
}

#[test]
fn server_ids_follow_the_lengths_of_each_configuration() {
    let text = |ids: &str| {
        format!(
            "
listeners: [{{name: l, address: '127.0.0.1:1', pool: p}}]
pools:
  - name: p
    quic_lb:
      - {{config_id: 2, server_id_length: 3, nonce_length: 4}}
      - {{config_id: 1, server_id_length: 2, nonce_length: 4}}
    backends:
      - {{name: a, address: '127.0.0.1:2', {ids}}}
"
        )
    };
    assert_eq!(places(&text("server_ids: {1: '0102', 2: '010203'}")), NONE);
    for (ids, path, expected) in [
        ("server_id: §'0102'", "server_id", "3 bytes for config ID 2, 2 bytes for config ID 1"),
        ("server_ids: §{1: '0102'}", "server_ids", "2: a server ID of 3 bytes"),
        ("server_ids: {1: '0102', 2: §'0102'}", "server_ids.2", "3 bytes, as server_id_length"),
        ("server_ids: {1: '0102', 2: '010203', 3: §'01'}", "server_ids.3", "of the pool: 2, 1"),
        ("server_ids: {1: '0102', 2: '010203', §'1': ''}", "server_ids.1", "each config ID once"),
        ("server_ids: {1: '0102', 2: '010203', §7: ''}", "server_ids.7", "from 0 to 6"),
        ("server_ids: {1: '0102', 2: '010203', §x: ''}", "server_ids.x", "from 0 to 6"),
        ("server_ids: §['0102', '010203']", "server_ids", "a mapping from config IDs"),
    ] {
        one_mistake(&text(ids), &format!("pools[0].backends[0].{path}"), "", expected);
    }
}

// https://datatracker.ietf.org/doc/html/draft-ietf-quic-load-balancers-21
#[test]
fn clear_and_encrypted_configurations_share_no_server_ids() {
    let text = |a: &str, b: &str| {
        format!(
            "
listeners: [{{name: l, address: '127.0.0.1:1', pool: p}}]
pools:
  - name: p
    quic_lb:
      - {{config_id: 0, server_id_length: 2, nonce_length: 4}}
      - {{config_id: 1, server_id_length: 2, nonce_length: 4, key_env: LB_KEY}}
    backends:
      - {{name: a, address: '127.0.0.1:2', {a}}}
      - {{name: b, address: '127.0.0.1:3', {b}}}
"
        )
    };
    let a = "server_ids: {0: '0a01', 1: '0001'}";
    assert_eq!(places(&text(a, "server_ids: {0: '0a02', 1: '0002'}")), NONE);

    let same = text("server_id: §'0001'", "server_id: '0002'");
    let path = "pools[0].backends[0].server_id";
    one_mistake(&same, path, "which is encrypted, and 1 more", "`server_ids` with other server");

    let crossed = text(a, "server_ids: {0: §'0001', 1: '0002'}");
    let path = "pools[0].backends[1].server_ids.0";
    let [mistake] = &mistakes_at_marks(&crossed, &[path])[..] else { panic!("one mistake") };
    let related = mistake.related.as_ref().expect("the other place");
    assert_eq!(related.path, "pools[0].backends[0].server_ids.1");
}

#[test]
fn pools_behind_one_listener_have_config_ids_of_their_own() {
    let text = |routes: &str, second: &str| {
        format!(
            "
listeners:
  - {{name: l, address: '127.0.0.1:1', pool: p{routes}}}
  - {{name: m, address: '127.0.0.1:2', pool: q}}
pools:
  - name: p
    quic_lb: [{{config_id: 0, server_id_length: 2, nonce_length: 4}}]
    backends: [{{name: a, address: '127.0.0.1:3', server_id: '0001'}}]
  - name: q
    quic_lb: [{{config_id: {second}, server_id_length: 2, nonce_length: 4}}]
    backends: [{{name: a, address: '127.0.0.1:4', server_id: '0001'}}]
"
        )
    };
    assert_eq!(places(&text("", "0")), NONE, "different listeners");
    let routes = ", routes: §[{alpn: h3, pool: q}, {alpn: moq, pool: q}]";
    mistakes_at_marks(&text(routes, "1"), &["listeners[0].routes"]);
    let paths = ["listeners[0].routes", "pools[1].quic_lb[0].config_id"];
    let mistakes = mistakes_at_marks(&text(routes, "§0"), &paths);
    assert!(mistakes[1].found.contains("another pool behind listeners[0]"), "{}", mistakes[1]);
}

#[test]
fn names_of_the_admin_interface_are_names_of_hosts() {
    let with = |names: &str| {
        contract_with("\"127.0.0.1:9090\"", &format!("\"127.0.0.1:9090\"\n  host_names: {names}"))
    };
    assert_eq!(places(&with("[lb.example.org, lb-1, LB_2.]")), NONE);
    let marked = "[a, §\"a:9090\", §\"http://a\", §\"*.a\", §A, §7, b.]";
    let paths: Vec<_> = (1..6).map(|nth| format!("admin.host_names[{nth}]")).collect();
    mistakes_at_marks(&with(marked), &paths.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn routes_are_checked_before_they_are_refused() {
    let routes = "pool: web
    routes:
      §- §{pool: web}
      - {pool: §nowhere, alpn: h3}
      - {alpn: §h3, server_name: x, pool: web}
      - {alpn: moq, server_name: §x, pool: web}
      - {server_name: x.example, pool: web, §port: 3}
      - §{server_name: §''}";
    // A second protocol beside a server name is one mistake, the name again another.
    let routes = routes.replace("{alpn: §h3", "{alpn: §§h3").replace("alpn: moq", "alpn: §moq");
    let paths = [
        "listeners[0].routes",
        "listeners[0].routes[0]",
        "listeners[0].routes[1].pool",
        "listeners[0].routes[2].alpn",
        "listeners[0].routes[2].alpn",
        "listeners[0].routes[3].alpn",
        "listeners[0].routes[3].server_name",
        "listeners[0].routes[4].port",
        "listeners[0].routes[5]",
        "listeners[0].routes[5].server_name",
    ];
    mistakes_at_marks(&contract_with("pool: web", &routes), &paths);
}

#[test]
fn a_pool_that_does_not_exist_is_named_with_those_that_do() {
    let text = contract_with("pool: web", "pool: §wed");
    one_mistake(&text, "listeners[0].pool", "\"wed\", which no pool is called", "such as web");
    for slip in ["wbe", "we", "Web", "weeb"] {
        let text = contract_with("pool: web", &format!("pool: §{slip}"));
        let expected = "\"web\", if that is meant; otherwise the name of a pool";
        one_mistake(&text, "listeners[0].pool", slip, expected);
    }
    let text = contract_with("pool: web", "pool: §other");
    one_mistake(&text, "listeners[0].pool", "other", "the name of a pool, such as web");
}

#[test]
fn what_this_version_does_not_do_is_refused_with_an_alternative() {
    let text = contract_with("pool: web", "pool: web\n    routes: §[{alpn: h3, pool: web}]");
    one_mistake(&text, "listeners[0].routes", "which this version does not do yet", "");
    for to in ["retry: {mode: off}\nadmin:", "retry: {mode: \"off\"}\nadmin:", "retry: {}\nadmin:"]
    {
        assert_eq!(places(&contract_with("admin:", to)), NONE, "{to}");
    }
}

#[test]
fn a_health_check_is_told_what_would_do() {
    let with = |check: &str| {
        contract_with("  - name: web", &format!("  - health_check: {check}\n    name: web"))
    };
    let kind = "kind: version_negotiation";
    let all = format!(
        "{{{kind}, interval: 2s, timeout: 2s, rise: 1, fall: 2, port: 1, panic_below: 0%, slow_start: 30s}}"
    );
    assert_eq!(places(&with(&format!("{{{kind}}}"))), NONE);
    assert_eq!(places(&with(&all)), NONE);
    for (check, key, found, expected) in [
        ("§{}", "", "no key \"kind\"", "version_negotiation"),
        ("{kind: §tcp}", ".kind", "tcp", "one of \"http3\", \"quic\", \"version_negotiation\""),
        ("{KIND, interval: §50ms}", ".interval", "50ms", "from \"100ms\" to \"1h\""),
        ("{KIND, interval: 1s, timeout: §1001ms}", ".timeout", "longer", "at most `interval`"),
        ("{KIND, rise: §0}", ".rise", "0", "from 1 to 100"),
        ("{KIND, fall: §101}", ".fall", "101", "from 1 to 100"),
        ("{KIND, port: §65536}", ".port", "65536", "from 1 to 65535"),
        ("{KIND, port: §4433}", ".port", "port 4433, where a listener is", "a port of the servers"),
        ("{KIND, slow_start: §61m}", ".slow_start", "61m", "from \"0ms\" to \"1h\""),
        ("{KIND, panic_below: §50}", ".panic_below", "50, which has no %", "\"0%\" to \"100%\""),
        ("{KIND, panic_below: §101%}", ".panic_below", "101%", "\"0%\" to \"100%\""),
        ("{KIND, panic_below: §+5%}", ".panic_below", "+5%", "\"0%\" to \"100%\""),
    ] {
        let text = with(&check.replace("KIND", kind));
        one_mistake(&text, &format!("pools[0].health_check{key}"), found, expected);
    }
    for (key, value, found) in
        [("fall", "1", "one lost datagram"), ("panic_below", "100%", "as soon as one")]
    {
        let text = with(&format!("{{{kind}, {key}: §{value}}}"));
        one_mistake(&text, &format!("warning pools[0].health_check.{key}"), found, "");
    }
}

#[test]
fn a_connection_log_is_told_what_would_do() {
    let with = |log: &str| contract_with("admin:", &format!("log: {{connections: {log}}}\nadmin:"));
    for good in ["{path: stdout}", "{path: a.log, sample: 0.000001, format: text}"] {
        assert_eq!(places(&with(good)), NONE);
    }
    for (log, key, found, expected) in [
        ("§{}", "", "no key \"path\"", "\"stdout\""),
        ("{path: §\"\"}", ".path", "an empty text", "text"),
        ("{path: stdout, sample: §1.1}", ".sample", "the number 1.1", "from 0 to 1"),
        ("{path: stdout, sample: §0.0000001}", ".sample", "0.0000001", "from 0 to 1"),
        ("{path: stdout, sample: §50%}", ".sample", "50%", "from 0 to 1"),
        ("{path: stdout, sample: §-0.5}", ".sample", "-0.5", "from 0 to 1"),
        ("{path: stdout, format: §xml}", ".format", "xml", "\"text\""),
    ] {
        one_mistake(&with(log), &format!("log.connections{key}"), found, expected);
    }
}

#[test]
fn address_validation_needs_keys_that_can_be_told_apart() {
    const RETRY: &str = "retry:
  mode: always
  lifetime: §\"2m\"
  keys:
    - {sequence: 5, key: \"8f95f09245765f80256934e50c66207f\"}
    - {sequence: §5, key_env: LB_KEY, iv: §\"0011\"}
    - §{sequence: 6}
    - {sequence: §128, key_env: §UNSET}
  other_versions: §maybe
  except_versions: [\"0xff00001d\", §\"0x6b3343cf\", §ff00001d, §\"0xff00001d\"]
  adaptive: {on_rate: 10, off_rate: §11, on_half_open: 7, off_half_open: §8, hold: §\"0s\"}
admin:";
    let paths = [
        "retry.lifetime",
        "retry.keys[1].sequence",
        "retry.keys[1].iv",
        "retry.keys[2]",
        "retry.keys[3].sequence",
        "retry.keys[3].key_env",
        "retry.other_versions",
        "retry.except_versions[1]",
        "retry.except_versions[2]",
        "retry.except_versions[3]",
        "retry.adaptive.off_rate",
        "retry.adaptive.off_half_open",
        "retry.adaptive.hold",
    ];
    let honoured = |text: String| text.replace("name: web", "name: web\n    honours_tokens: true");
    mistakes_at_marks(&honoured(contract_with("admin:", RETRY)), &paths);
    for (from, to, path) in [
        ("admin:", "retry: {mode: §adaptive}\nadmin:", "retry.mode"),
        ("admin:", "retry: {mode: §always, keys: []}\nadmin:", "retry.mode"),
        ("pool: web", "pool: web\n    retry: {mode: §always}", "listeners[0].retry.mode"),
    ] {
        let expected = "at least one key, which the servers have too";
        one_mistake(&honoured(contract_with(from, to)), path, "without `retry.keys`", expected);
    }
}

#[test]
fn tokens_bound_to_addresses_that_servers_do_not_see_are_worth_a_warning() {
    let with = |mode: &str| {
        let keys = "keys: [{sequence: 0, key_env: LB_KEY, iv: \"000102030405060708090a0b\"}]";
        let text = format!("retry: {{mode: {mode}, format: shared_state, {keys}}}\nadmin:");
        places(
            &contract_with("admin:", &text)
                .replace("name: web", "honours_tokens: true\n    name: web"),
        )
    };
    assert_eq!(with("\"off\""), NONE);
    assert_eq!(with("always"), ["warning retry.format at 21:31"]);
}

#[test]
fn backends_need_a_source_address_of_their_family() {
    let with = |sources: &str| {
        contract_with("    backends:", &format!("    source_addresses: {sources}\n    backends:"))
    };
    assert_eq!(places(&with("[\"127.0.0.1\", \"::1\"]")), NONE);
    assert_eq!(places(&with("[]")), NONE);
    let paths = ["pools[0].backends[0].address", "pools[0].backends[1].address"];
    let marked = with("[\"::1\"]").replace("address: \"127.0.0.1:5", "address: §\"127.0.0.1:5");
    mistakes_at_marks(&marked, &paths);
    let paths = [1, 2, 3, 4].map(|nth| format!("pools[0].source_addresses[{nth}]"));
    let paths: Vec<_> = paths.iter().map(String::as_str).collect();
    let marked = with("[\"127.0.0.1\", §\"127.0.0.1\", §\"0.0.0.0\", §\"127.0.0.1:1\", §5]");
    mistakes_at_marks(&marked, &paths);
}

#[test]
fn warnings_let_the_file_load() {
    for (from, to, path, found) in [
        ("\"127.0.0.1:9090\"", "§\"0.0.0.0:9090\"", "admin.address", "other hosts may reach"),
        (
            "admin:",
            "timeouts: {flow_idle: 5s, flow_unanswered: §6s}\nadmin:",
            "timeouts.flow_unanswered",
            "a longer time than flow_idle",
        ),
        (
            "admin:",
            "  - §{name: idle, backends: [{name: x, address: \"127.0.0.1:1\"}]}\nadmin:",
            "pools[1]",
            "a pool that no listener sends to",
        ),
        (
            "\"8f95f09245765f80256934e50c66207f\"",
            "§\"00000000000000000000000000000000\"",
            "pools[0].quic_lb[0].key",
            "a key of zeros",
        ),
    ] {
        let marked = contract_with(from, to);
        let warnings = mistakes_at_marks(&marked, &[&format!("warning {path}")]);
        assert!(warnings[0].found.contains(found), "{}", warnings[0]);
        assert!(read(&marked.replace('§', "")).is_ok());
    }
}

/// What a program wrote that knows other numbers than YAML 1.2 (PyYAML quotes 0001 and not these).
#[test]
fn hex_digits_are_read_as_they_were_typed() {
    for server_id in ["0008", "00e1", "12e3", "1234", "0o17", "+001"] {
        let text = contract_with("server_id: \"0001\"", &format!("server_id: {server_id}"));
        if let Ok(loaded) = read(&text) {
            assert_eq!(loaded.config.pools[0].backends[0].server_ids[0].1.to_string(), server_id);
            continue;
        }
        assert!(["0o17", "+001"].contains(&server_id), "{server_id}: {:?}", places(&text));
    }
    let ids = contract_with("server_id: \"0001\"", "server_ids: {0: 0009}");
    assert_eq!(places(&ids), NONE);
    let quoted = "\"8f95f09245765f80256934e50c66207f\"";
    for key in ["12345678901234567890123456789012", "1234567890123456789012345678e012"] {
        assert_eq!(places(&contract_with(quoted, key)), NONE, "{key}");
    }
    let retry = "retry:
  keys: [{sequence: 0, key_env: LB_KEY, iv: 000000000000000000000001}]
  except_versions: [0xff00001d]
admin:";
    assert_eq!(places(&contract_with("admin:", retry)), NONE);
}

#[test]
fn words_that_are_none_are_answered_by_the_one_that_is_meant() {
    for (word, meant) in
        [("warning", "warn"), ("err", "error"), ("Info", "info"), ("dbug", "debug")]
    {
        let text = contract_with("admin:", &format!("log: {{level: §{word}}}\nadmin:"));
        let expected = format!("\"{meant}\", if that is meant; otherwise one of \"error\"");
        one_mistake(&text, "log.level", word, &expected);
    }
    let text = contract_with("admin:", "log: {level: §verbose}\nadmin:");
    one_mistake(&text, "log.level", "verbose", "one of \"error\", \"warn\"");
    let text = contract_with("weight: 2", "state: §drained");
    one_mistake(&text, "pools[0].backends[1].state", "drained", "\"draining\", if that is meant");
}

#[test]
fn link_local_addresses_need_their_zone_and_others_have_none() {
    let backend = |address: &str| contract_with("\"127.0.0.1:5001\"", &format!("\"{address}\""));
    let address = |text: &str| read(text).expect("valid").config.pools[0].backends[0].address;
    assert_eq!(address(&backend("[fe80::1%3]:443")).to_string(), "[fe80::1%3]:443");
    assert_eq!(address(&backend("[fe80::1%eth0]:443")).to_string(), "[fe80::1%2]:443");
    for (given, found, expected) in [
        ("[fe80::1]:443", "the link-local address fe80::1 without its zone", "[fe80::1%eth0]:443"),
        ("[febf::1]:443", "the link-local address febf::1 without its zone", "[febf::1%2]:443"),
        (
            "[fe80::1%wlan9]:443",
            "\"wlan9\", and no network interface",
            "its number, as in \"[fe80::1%2]:443\"",
        ),
        ("[2001:db8::1%2]:443", "a zone at 2001:db8::1", "\"[2001:db8::1]:443\""),
        ("[2001:db8::1%eth0]:443", "a zone at 2001:db8::1", "\"[2001:db8::1]:443\""),
        ("[::1%1]:443", "a zone at ::1", "\"[::1]:443\""),
        ("[fe80::1%]:443", "", "\"IP:port\" or \"[IPv6]:port\""),
        ("[fe80::1%a/b]:443", "", "\"IP:port\" or \"[IPv6]:port\""),
    ] {
        let marked = backend(given).replace(&format!("\"{given}"), &format!("§\"{given}"));
        one_mistake(&marked, "pools[0].backends[0].address", found, expected);
    }
    let listener = contract_with("\"127.0.0.1:4433\"", "§\"[fe80::1]:4433\"");
    one_mistake(&listener, "listeners[0].address", "without its zone", "network interface");
    let admin = contract_with("\"127.0.0.1:9090\"", "§\"[fe80::1]:9090\"");
    one_mistake(&admin, "admin.address", "without its zone", "network interface");
    for source in ["fe80::1", "fe80::1%eth0", "fe80::1%2"] {
        let sources =
            format!("    source_addresses: [\"127.0.0.1\", §\"{source}\"]\n    backends:");
        let text = contract_with("    backends:", &sources);
        let path = "pools[0].source_addresses[1]";
        one_mistake(
            &text,
            path,
            "one link alone is reached",
            "the kernel takes that of their link",
        );
    }
}

/// The same address with and without a zone is the same listener to the system.
#[test]
fn listeners_that_cannot_both_be_bound_are_reported_with_each_other() {
    let with = |first: &str, second: &str| {
        contract_with(
            "  - name: edge\n    address: \"127.0.0.1:4433\"",
            &format!(
                "  - {{name: x, address: \"{first}\", pool: web}}\n  - name: edge\n    \
                 address: {second}"
            ),
        )
    };
    for (first, second) in [
        ("0.0.0.0:4433", "§127.0.0.1:4433"),
        ("[::]:4433", "§\"[::1]:4433\""),
        ("[::]:4433", "§\"[fe80::1%2]:4433\""),
    ] {
        let path = "listeners[1].address";
        let marked = with(first, second);
        one_mistake(&marked, path, "which the listener at", "another port");
        let report = read(&marked.replace('§', "")).expect_err("a mistake");
        let related = report.mistakes[0].related.as_ref().expect("the other listener");
        assert_eq!(related.path, "listeners[0].address");
        // Whichever comes first.
        let second = second.trim_matches(['§', '"']);
        let turned = with(second, &format!("\"{first}\""));
        let report = read(&turned).expect_err("a mistake");
        assert_eq!(report.errors(), 1, "{report}");
        assert_eq!(
            report.mistakes[0].place.as_ref().expect("a place").path,
            "listeners[0].address"
        );
    }
    for (first, second) in [
        ("0.0.0.0:4433", "127.0.0.1:4434"),
        ("0.0.0.0:4433", "\"[::]:4433\""),
        ("[::]:4433", "127.0.0.1:4433"),
        ("[fe80::1%2]:4433", "\"[fe80::1%3]:4433\""),
    ] {
        assert!(
            read(&with(first, second)).is_ok(),
            "{first} {second}: {:?}",
            places(&with(first, second))
        );
    }
}

/// Each can be judged without the others.
#[test]
fn a_mistake_hides_no_other() {
    let text = "
listeners: [{name: l, address: '127.0.0.1:1', pool: p}]
pools:
  - name: p
    quic_lb:
      - {config_id: §7, server_id_length: 2, nonce_length: 4, key: §'8f95'}
    backends:
      - {name: a, address: '127.0.0.1:2', server_id: §'010203'}
      - §{name: b, address: '127.0.0.1:3'}
      - {name: c, address: '127.0.0.1:4', server_id: §'01', server_ids: §{0: '0102'}}
";
    let paths = [
        "pools[0].quic_lb[0].config_id",
        "pools[0].quic_lb[0].key",
        "pools[0].backends[0].server_id",
        "pools[0].backends[1]",
        "pools[0].backends[2].server_id",
        "pools[0].backends[2].server_ids",
    ];
    mistakes_at_marks(text, &paths);
    let text = "
listeners: [{name: l, address: '127.0.0.1:1', pool: p}]
pools:
  - name: p
    quic_lb: [{config_id: 0, server_id_length: 2, nonce_length: 4}]
    backends:
      - {name: a, address: '127.0.0.1:2', server_id: §[], server_ids: {0: §'01'}}
      - {name: b, address: '127.0.0.1:3', server_id: §'01', server_ids: §[]}
";
    let paths = [
        "pools[0].backends[0].server_id",
        "pools[0].backends[0].server_ids.0",
        "pools[0].backends[1].server_id",
        "pools[0].backends[1].server_ids",
    ];
    mistakes_at_marks(text, &paths);
}

#[test]
fn flows_that_ports_cannot_carry_are_worth_a_warning() {
    let with = |flows: &str, sources: &str| {
        contract_with("admin:", &format!("limits: {{flows: {flows}}}\nadmin:"))
            .replace("    backends:", &format!("    {sources}\n    backends:"))
    };
    // Two backends with 28,232 ports each.
    assert_eq!(places(&with("56464", "")), NONE);
    let path = "warning limits.flows";
    let found = "56465 flows, of which the 28232 local ports carry 56464";
    one_mistake(&with("§56465", ""), path, found, "`source_addresses`");
    let sources = "source_addresses: ['127.0.0.1', '127.0.0.2', '::1']";
    assert_eq!(places(&with("112928", sources)), NONE);
    one_mistake(&with("§112929", sources), path, "carry 112928", "");
    let one = "
listeners: [{name: l, address: '127.0.0.1:1', pool: p}]
pools: [{name: p, backends: [{name: a, address: '127.0.0.1:2'}]}]
";
    assert_eq!(places(one), NONE, "the default is nobody's claim");
}

#[test]
fn connection_ids_in_the_clear_on_a_public_address_are_worth_a_warning() {
    let with = |address: &str, key: &str| {
        let text = contract_with("127.0.0.1:4433", address);
        let text = text.replace("      - config_id: 0", "      - §config_id: 0");
        text.replace("key: \"8f95f09245765f80256934e50c66207f\"", key)
    };
    let path = "warning pools[0].quic_lb[0]";
    for address in ["0.0.0.0:443", "[::]:443", "198.51.100.7:443", "[2001:db8::7]:443"] {
        one_mistake(&with(address, ""), path, "in the clear on a public address", "keygen");
        assert_eq!(places(&with(address, "key_env: LB_KEY").replace('§', "")), NONE);
    }
    for address in ["127.0.0.1:443", "10.1.2.3:443", "100.64.0.1:443", "[fd00::7]:443", "[::1]:443"]
    {
        assert_eq!(places(&with(address, "").replace('§', "")), NONE, "{address}");
    }
}

#[test]
fn address_validation_is_for_servers_that_honour_tokens() {
    let with = |mode: &str, pool: &str| {
        let retry =
            format!("retry: {{mode: {mode}, keys: [{{sequence: 0, key_env: LB_KEY}}]}}\nadmin:");
        let text = contract_with("admin:", &retry);
        text.replace("  - name: web", &format!("  - {pool}name: web"))
    };
    let doubt = "servers that are not known to honour its tokens";
    for mode in ["always", "adaptive"] {
        one_mistake(&with(mode, "§"), "warning pools[0]", doubt, "`honours_tokens: true`");
        assert_eq!(places(&with(mode, "honours_tokens: true\n    ")), NONE);
        let wrong = with(mode, "honours_tokens: §false\n    ");
        let path = "pools[0].honours_tokens";
        one_mistake(&wrong, path, "servers that do not honour its tokens", "mode: off");
    }
    for pool in ["", "honours_tokens: true\n    ", "honours_tokens: false\n    "] {
        assert_eq!(places(&with("\"off\"", pool)), NONE);
    }
    let of_listener =
        with("\"off\"", "§").replace("pool: web", "pool: web\n    retry: {mode: always}");
    one_mistake(&of_listener, "warning pools[0]", doubt, "");
    let wrong = with("\"off\"", "honours_tokens: §\"true\"\n    ");
    one_mistake(&wrong, "pools[0].honours_tokens", "\"true\"", "true or false, without quotes");
}

#[test]
fn a_drain_that_the_unit_cuts_short_is_worth_a_warning() {
    let text = contract_with("admin:", "timeouts: {drain: §60s}\nadmin:");
    let found = "1m, and a unit (quic-lb.service) that kills after 1m";
    one_mistake(&text, "warning timeouts.drain", found, "TimeoutStopSec");
    let text = contract_with("admin:", "timeouts: {drain: §1h}\nadmin:");
    one_mistake(&text, "warning timeouts.drain", "1h, and", "TimeoutStopSec");
}

#[test]
fn a_pool_that_only_drains_is_worth_a_warning() {
    let text = "
listeners: [{name: l, address: '127.0.0.1:1', pool: p}]
pools: [{name: p, backends: §[{name: a, address: '127.0.0.1:2', state: draining}]}]
";
    one_mistake(text, "warning pools[0].backends", "none takes new connections", "state: active");
}

#[test]
fn the_space_of_server_ids_is_judged_on_both_sides_of_its_bound() {
    let pool = |mark: &str, backends: usize| {
        let mut text = format!(
            "
listeners: [{{name: l, address: '127.0.0.1:1', pool: p}}]
pools:
  - name: p
    quic_lb: [{{config_id: 0, server_id_length: {mark}2, nonce_length: 4}}]
    backends:
"
        );
        for nth in 0..backends {
            let port = 1_000 + nth;
            text += &format!(
                "      - {{name: b{nth}, address: '127.0.0.1:{port}', server_id: '{nth:04x}'}}\n"
            );
        }
        text
    };
    assert_eq!(places(&pool("", 256)), NONE);
    let path = "warning pools[0].quic_lb[0].server_id_length";
    one_mistake(&pool("§", 257), path, "2 bytes to tell 257 server IDs apart", "3 or more");
}

#[test]
fn numbers_of_listeners_and_backends_are_bounded() {
    let text = |listeners: usize, backends: usize| {
        let mut text = "listeners:\n".to_owned();
        for nth in 0..listeners {
            text += &format!("  - {{name: l{nth}, address: '127.0.0.1:{}', pool: p0}}\n", nth + 1);
        }
        for pool in 0..2 {
            let section = if pool == 0 { "pools:\n" } else { "" };
            text += &format!("{section}  - name: p{pool}\n    backends:\n");
            for nth in (pool..backends).step_by(2) {
                text += &format!("      - {{name: b{nth}, address: '10.0.0.1:{}'}}\n", nth + 1);
            }
        }
        text
    };
    let errors = |text: &str| {
        let is_error = |place: &String| !place.starts_with("warning");
        places(text).into_iter().filter(is_error).collect::<Vec<_>>()
    };
    assert_eq!(errors(&text(64, 16_384)), NONE);
    assert_eq!(errors(&text(65, 16_384)), ["listeners at 2:3"]);
    assert_eq!(errors(&text(1, 16_385)), ["pools[1].backends at 8201:7"]);
    mistakes_at_marks("listeners: §[]\npools: §[]\n", &["listeners", "pools"]);
}

#[test]
fn the_top_of_the_file_is_checked_too() {
    assert_eq!(places(""), ["file"]);
    mistakes_at_marks("§- a\n", &[""]);
    mistakes_at_marks("§§{}", &["", ""]);
    mistakes_at_marks("listeners: §[\n", &[""]);
}

#[test]
fn a_byte_order_mark_and_carriage_returns_do_no_harm() {
    let text = format!("\u{feff}{}", common::CONTRACT.replace('\n', "\r\n"));
    assert_eq!(places(&text), NONE);
}

#[test]
fn aliases_may_save_typing() {
    let text = "
listeners: [{name: l, address: '127.0.0.1:1', pool: p}, {name: m, address: '127.0.0.1:2', pool: q}]
pools:
  - name: p
    quic_lb: &ids [{config_id: 0, server_id_length: 2, nonce_length: 4}]
    backends: &backends [{name: a, address: '127.0.0.1:3', server_id: '0001'}]
  - name: q
    quic_lb: *ids
    backends: *backends
";
    assert_eq!(places(text), NONE);
}

/// Asserts that `marked` has one mistake, at its mark, and what it says.
fn one_mistake(marked: &str, path: &str, found: &str, expected: &str) {
    let mistakes = mistakes_at_marks(marked, &[path]);
    assert!(mistakes[0].found.contains(found), "{}", mistakes[0]);
    assert!(mistakes[0].expected.contains(expected), "{}", mistakes[0]);
}

fn places(text: &str) -> Vec<String> {
    mistakes(text).iter().map(common::place).collect()
}

#[test]
fn commands_are_taken_over_tls_with_three_files_that_go_together() {
    let folder = tempfile::tempdir().expect("a directory");
    for name in ["a", "b"] {
        let made =
            rcgen::generate_simple_self_signed([format!("{name}.example")]).expect("a certificate");
        let files = [("cert", made.cert.pem()), ("key", made.signing_key.serialize_pem())];
        for (kind, pem) in files {
            std::fs::write(folder.path().join(format!("{name}.{kind}")), pem).expect("a file");
        }
    }
    let with = |commands: &str| {
        let admin = format!("admin:\n  commands: {{ {commands} }}\n");
        common::read_beside(&contract_with("admin:\n", &admin), folder.path())
    };
    let address = "address: \"192.0.2.1:9465\"";
    let good = "cert_file: a.cert, key_file: a.key, client_ca_file: b.cert";
    for (commands, found) in [
        (format!("{address}, cert_file: a.cert, key_file: a.key"), "some of the files of TLS"),
        (format!("{address}, {good}, token_file: a.key"), "beside"),
        (format!("unix: a.sock, {good}"), "beside"),
        (good.to_owned(), "without an `address`"),
        (
            format!("{address}, cert_file: a.cert, key_file: b.key, client_ca_file: b.cert"),
            "cannot be shown",
        ),
        (
            format!("{address}, cert_file: a.key, key_file: a.key, client_ca_file: b.cert"),
            "has no certificates",
        ),
        (
            format!("{address}, cert_file: a.cert, key_file: a.cert, client_ca_file: b.cert"),
            "has no private key",
        ),
        (
            format!("{address}, cert_file: none, key_file: a.key, client_ca_file: b.cert"),
            "cannot be read",
        ),
        (
            format!("{address}, cert_file: a.cert, key_file: a.key, client_ca_file: a.key"),
            "no certificate",
        ),
    ] {
        let report = with(&commands).expect_err("a mistake").to_string();
        assert!(
            report.contains(found) && report.contains("admin.commands"),
            "{commands}: {report}"
        );
        assert!(!report.contains("PRIVATE"), "{report}");
    }
    let text = format!("{address}, {good}");
    let loaded = with(&text).expect("a configuration");
    assert!(!loaded.warnings.iter().any(|warning| warning.found.contains("in the clear")));
    let shown = format!("{:?}{}", loaded.config, loaded.config.masked_document());
    assert!(shown.contains("client_ca_file") && !shown.contains("PRIVATE"), "{shown}");
    // The same names, and another key.
    assert_eq!(with(&text).expect("the same").config.admin, loaded.config.admin);
    for kind in ["cert", "key"] {
        let [from, to] = ["b", "a"].map(|name| folder.path().join(format!("{name}.{kind}")));
        std::fs::copy(from, to).expect("a file");
    }
    assert_ne!(with(&text).expect("another").config.admin, loaded.config.admin);
}

#[test]
fn commands_are_taken_at_a_socket_or_at_an_address_with_a_token_of_some_length() {
    let folder = tempfile::tempdir().expect("a directory");
    let good = "0123456789abcdef";
    let tokens = [
        ("good", format!("{good}\n")),
        ("short", "0123456789abcde".into()),
        ("spaced", format!("{good} x")),
    ];
    for (name, token) in tokens {
        std::fs::write(folder.path().join(name), token).expect("a file");
    }
    let with = |commands: &str| {
        let admin = format!("admin:\n  commands: {{ {commands} }}\n");
        common::read_beside(&contract_with("admin:\n", &admin), folder.path())
    };
    let address = "address: \"127.0.0.1:9465\"";
    let long = format!("unix: {}", "x".repeat(101));
    for (commands, found) in [
        ("", "neither a Unix socket nor an address with its token"),
        (address, "neither"),
        ("token_file: good", "neither"),
        (&format!("unix: a.sock, {address}, token_file: good"), "neither"),
        (&long, "bytes"),
        (&format!("{address}, token_file: short"), "holds no token"),
        (&format!("{address}, token_file: spaced"), "holds no token"),
        (&format!("{address}, token_file: none"), "cannot be read"),
    ] {
        let report = with(commands).expect_err("a mistake").to_string();
        assert!(
            report.contains(found) && report.contains("admin.commands"),
            "{commands}: {report}"
        );
        assert!(!report.contains("0123456789"), "{report}");
    }
    assert!(with("unix: a.sock").is_ok());
    let loaded = with(&format!("{address}, token_file: good")).expect("a configuration");
    let Some(Commands::Token(_, token)) = loaded.config.admin.clone().expect("admin").commands
    else {
        panic!("{:?}", loaded.config.admin)
    };
    assert!(token.is(good.as_bytes()) && !token.is(b"0123456789abcdeF") && !token.is(b""));
    let shown = format!("{:?}{}", loaded.config, loaded.config.masked_document());
    assert!(shown.contains("token_file") && !shown.contains(good), "{shown}");
    let open = with("address: \"192.0.2.1:9465\", token_file: good").expect("a configuration");
    assert!(open.warnings.iter().any(|warning| warning.found.contains("in the clear")));
}
