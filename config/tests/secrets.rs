//! Keys come from the file, another file or the environment, and are never printed.

mod common;

use std::fs;

use common::{CONTRACT, KEY, contract_with, mistakes_at_marks, read, read_beside};
use proptest::prelude::*;
use quic_lb_config::{Config, load, read_reset_secret};

const LINE: &str = "key: \"8f95f09245765f80256934e50c66207f\"";
const OTHER: &str = "f09245765f80256934e50c66207f8f95";

#[test]
fn all_sources_of_a_key_are_worth_the_same() {
    let directory = tempfile::tempdir().expect("a directory");
    fs::write(directory.path().join("web.key"), format!("{KEY}\n")).expect("a key file");
    restrict(&directory.path().join("web.key"));
    let from_file = contract_with(LINE, "key_file: web.key");
    let loaded = read_beside(&from_file, directory.path()).expect("a configuration");
    assert_eq!(loaded.warnings, []);
    let expected = config(CONTRACT).digest();
    assert_eq!(loaded.config.digest(), expected);
    assert_eq!(config(&contract_with(LINE, "key_env: LB_KEY")).digest(), expected);
    assert_eq!(config(&CONTRACT.replace(KEY, &KEY.to_uppercase())).digest(), expected);
    assert_ne!(config(&CONTRACT.replace(KEY, OTHER)).digest(), expected);
}

#[test]
fn the_secret_of_stateless_resets_comes_from_where_keys_do_and_goes_nowhere() {
    let directory = tempfile::tempdir().expect("a directory");
    fs::write(directory.path().join("reset.key"), format!("{OTHER}\n")).expect("a key file");
    restrict(&directory.path().join("reset.key"));
    let with = |given: &str| {
        contract_with("    backends:", &format!("    stateless_reset: {given}\n    backends:"))
    };
    let read = |given: &str| read_beside(&with(given), directory.path());
    for given in [&format!("{{ key: \"{OTHER}\" }}"), "{ key_file: reset.key }"] {
        let loaded = read(given).expect("a configuration");
        assert_eq!(loaded.warnings, []);
        let secret = loaded.config.pools[0].reset_secret.as_ref().expect("a secret");
        assert_eq!(secret.octets()[..3], [0xf0, 0x92, 0x45]);
        assert_eq!(loaded.config.digest(), config(CONTRACT).digest(), "balancers decide alike");
        let shown = format!("{:?}{}", loaded.config, loaded.config.masked_document());
        assert!(shown.contains("stateless_reset") && !shown.contains(OTHER), "{shown}");
    }
    assert!(config(CONTRACT).pools[0].reset_secret.is_none());
    for (given, found) in [("{}", "no key"), ("{ key_file: none }", "cannot be read")] {
        let report = read(given).expect_err("a mistake");
        assert!(report.to_string().contains(found), "{report}");
    }
    let own = |name: &str| read_reset_secret(&directory.path().join(name));
    assert_eq!(own("reset.key").map(|secret| secret.octets()[0]), Ok(0xf0));
    fs::write(directory.path().join("wrong"), "f0").expect("a file");
    for (name, sentence) in [("none", "No such file"), ("wrong", "32 hex digits were expected")] {
        let error = own(name).expect_err("a mistake");
        assert!(error.contains(sentence), "{error}");
    }
}

#[test]
fn a_file_beside_the_configuration_is_found_whatever_the_working_directory() {
    let directory = tempfile::tempdir().expect("a directory");
    let key_file = directory.path().join("web.key");
    fs::write(&key_file, KEY).expect("a key file");
    restrict(&key_file);
    let file = directory.path().join("lb.yaml");
    fs::write(&file, contract_with(LINE, "key_file: web.key")).expect("a file");
    assert!(load(&file).is_ok());
    let absolute = format!("key_file: {}", key_file.display());
    fs::write(&file, contract_with(LINE, &absolute)).expect("a file");
    assert!(load(&file).is_ok());
}

#[test]
fn a_key_that_cannot_be_had_is_one_clear_mistake() {
    let directory = tempfile::tempdir().expect("a directory");
    for (name, content) in
        [("empty", &b""[..]), ("short", b"8f95f0"), ("odd", b"8f95g"), ("binary", b"\xff\xfe")]
    {
        fs::write(directory.path().join(name), content).expect("a file");
        restrict(&directory.path().join(name));
    }
    for (given, found) in [
        ("key_file: missing", "\"missing\", which cannot be read: No such file or directory"),
        ("key_file: .", "\".\", which cannot be read: it is not a regular file"),
        ("key_file: /dev/zero", "\"/dev/zero\", which cannot be read: it is not a regular file"),
        ("key_file: empty", "\"empty\" with no characters"),
        ("key_file: short", "\"short\" with 6 hex digits"),
        ("key_file: odd", "\"odd\" with 5 characters, of which number 5 is no hex digit"),
        ("key_file: binary", "\"binary\", which cannot be read: it is not text"),
        ("key_file: ''", "an empty text"),
        ("key_env: UNSET", "\"UNSET\", which is not set in the environment"),
        (
            "key_env: LB_BAD",
            "\"LB_BAD\", a variable with 17 characters, of which number 1 is no hex",
        ),
        ("key: secret", "6 characters, of which number 1 is no hex digit"),
        ("key: [secret]", "a list"),
        ("key: 1234567890123456789012345678901", "31 hex digits"),
        ("key: 0x8f95f09245765f80256934e50c66207f", "34 characters, of which number 2"),
        ("key: true", "a truth value"),
        ("key:", "nothing"),
        ("key_file: 8f95f09245765f80256934e50c66207f", "what looks like the key itself"),
        ("key_env: 8f95f09245765f80256934e50c66207f", "what looks like the key itself"),
    ] {
        let report = read_beside(&contract_with(LINE, given), directory.path()).expect_err(given);
        let [mistake] = &report.mistakes[..] else { panic!("{given}: {report}") };
        assert!(mistake.found.starts_with(found), "{given}: {mistake}");
        assert!(!report.to_string().contains("ecret"), "{report}");
        assert!(!report.to_string().contains("8f95f09245"), "{report}");
    }
}

#[test]
fn one_key_has_one_source() {
    for (given, second) in [
        ("key_env: §LB_KEY\n        key: \"8f95f09245765f80256934e50c66207f\"", "key_env"),
        ("key_file: a\n        key_env: §LB_KEY", "key_env"),
    ] {
        let path = format!("pools[0].quic_lb[0].{second}");
        let mistakes = mistakes_at_marks(&contract_with(LINE, given), &[&path]);
        assert_eq!(mistakes[0].expected, "one of `key`, `key_file` and `key_env`");
    }
}

#[test]
fn a_weak_or_open_key_is_worth_a_warning() {
    let zero = read(&contract_with(LINE, "key_env: LB_ZERO")).expect("a configuration");
    assert!(zero.warnings[0].found.contains("a key of zeros"), "{}", zero.warnings[0]);
}

#[cfg(unix)]
#[test]
fn a_key_file_that_others_can_read_is_worth_a_warning() {
    use std::os::unix::fs::PermissionsExt as _;
    let directory = tempfile::tempdir().expect("a directory");
    let key_file = directory.path().join("web.key");
    fs::write(&key_file, KEY).expect("a key file");
    for (mode, warnings) in [(0o600, 0), (0o640, 0), (0o644, 1)] {
        fs::set_permissions(&key_file, fs::Permissions::from_mode(mode)).expect("our file");
        let text = contract_with(LINE, "key_file: web.key");
        let loaded = read_beside(&text, directory.path()).expect("a configuration");
        assert_eq!(loaded.warnings.len(), warnings, "mode {mode:o}");
    }
}

#[cfg(unix)]
#[test]
fn a_key_in_a_configuration_that_others_can_read_is_worth_one_warning() {
    use std::os::unix::fs::PermissionsExt as _;
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("lb.yaml");
    let retry = format!("retry: {{keys: [{{sequence: 0, key: \"{KEY}\"}}]}}\nadmin:");
    for (text, inline) in
        [(contract_with("admin:", &retry), true), (contract_with(LINE, "# no key"), false)]
    {
        fs::write(&file, text).expect("a file");
        for (mode, warned) in [(0o600, false), (0o640, false), (0o644, inline)] {
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).expect("our file");
            let warnings = load(&file).expect("a configuration").warnings;
            let found: Vec<_> = warnings.iter().map(|warning| &*warning.found).collect();
            let expected = ["a key in a file that everyone can read (mode 644)"];
            assert_eq!(found, expected[..usize::from(warned)], "mode {mode:o}");
        }
    }
}

/// Whatever the mistake, wherever the key.
#[test]
fn excerpts_show_no_keys() {
    for (from, to) in [
        ("nonce_length: 6", "nonce_length: 99"),
        ("key:", "kay:"),
        (KEY, "8f95f09245765f80"),
        (KEY, "8f95f09245765f80256934e50c66207"),
        (&format!("key: \"{KEY}\""), &*format!("key:\n          \"{}\"", &KEY[..14])),
        (&format!("key: \"{KEY}\""), &*format!("key_file: {KEY}")),
        (&format!("key: \"{KEY}\""), &*format!("{{ key: {KEY} }}")),
        ("config_id: 0", &*format!("{{ config_id: 9, key: {KEY} }}")),
        ("name: edge", &*format!("name: edge {KEY}")),
    ] {
        let report = read(&contract_with(from, to)).expect_err(to);
        for colours in [false, true] {
            let excerpts = report.excerpts(colours);
            assert!(!excerpts.contains("8f95f0"), "{excerpts}");
        }
        assert!(!format!("{report:?}").contains("8f95f0"), "{report:?}");
    }
}

#[test]
fn the_masked_document_shows_everything_but_keys() {
    let document = config(CONTRACT).masked_document();
    let expected = serde_json::json!({
        "listeners": [{ "name": "edge", "address": "127.0.0.1:4433", "pool": "web" }],
        "pools": [{
            "name": "web",
            "quic_lb": [
                { "config_id": 0, "server_id_length": 2, "nonce_length": 6, "key": "masked" },
            ],
            "backends": [
                {
                    "name": "a", "address": "127.0.0.1:5001", "weight": 1, "state": "active",
                    "server_ids": { "0": "0001" },
                },
                {
                    "name": "b", "address": "127.0.0.1:5002", "weight": 2, "state": "active",
                    "server_ids": { "0": "0002" },
                },
            ],
            "hash": "dcid",
            "source_addresses": [],
        }],
        "admin": { "address": "127.0.0.1:9090", "host_names": [] },
        "limits": {
            "flows": 50000,
            "remembered": 262_144,
            "new_connections_per_second": {},
            "unknown_short_headers": "forward",
        },
        "timeouts": { "flow_idle": "180s", "flow_unanswered": "10s", "learnt": "600s", "drain": "30s" },
        "log": { "level": "info", "format": "text" },
        "retry": {
            "mode": "off",
            "format": "nat",
            "lifetime": "10s",
            "transition": "200ms",
            "other_versions": "allow",
            "adaptive": {
                "on_rate": 1000,
                "on_half_open": 1000,
                "off_rate": 500,
                "off_half_open": 500,
                "hold": "30s",
            },
        },
    });
    assert_eq!(document, expected);
}

/// Written as a file again, a masked document differs from what was read by its keys alone.
#[test]
fn the_masked_document_is_a_document() {
    let keys = "keys: [{sequence: 3, key_env: LB_KEY}]\n  except_versions: [\"0xff00001d\"]";
    let limits =
        "new_connections_per_second: {total: 9, per_listener: 8, per_address: 7, per_network: 6}";
    let original =
        common::FULL.replace("mode: \"off\"", &format!("mode: always\n  {keys}")) + "workers: 3\n";
    let original = original.replace("new_connections_per_second: {}", limits);
    let original = original.replace("# retry: { mode: adaptive }", "retry: { mode: adaptive }");
    let document = config(&original).masked_document();
    let unmasked = document.to_string().replace("\"masked\"", &format!("{KEY:?}"));
    let again = config(&unmasked);
    assert_eq!(again.masked_document(), document);
    assert_eq!(again.digest(), config(&original).digest());
}

#[test]
fn the_digest_covers_what_routing_depends_on_and_nothing_else() {
    let digest = config(CONTRACT).digest();
    assert_eq!(digest.len(), 16);
    assert!(digest.chars().all(|c| c.is_ascii_hexdigit()));
    let other = |from: &str, to: &str| config(&contract_with(from, to)).digest();
    for (from, to) in [
        ("127.0.0.1:9090", "127.0.0.1:9091"),
        ("admin:", "workers: 2\nlimits: {flows: 7}\nlog: {level: debug}\nadmin:"),
        ("admin:", "timeouts: {drain: 1s}\nadmin:"),
        ("name: edge", "name: front"),
        ("127.0.0.1:4433", "192.0.2.1:443"),
        ("127.0.0.1:4433\"", "[::]:4433\"\n    ipv6_only: false"),
        ("admin:", &format!("{SPARE}\nadmin:")),
        ("admin:", &retry("off", 0, KEY)),
    ] {
        assert_eq!(other(from, to), digest, "{to}");
    }
    for (from, to) in [
        ("127.0.0.1:5001", "127.0.0.1:5003"),
        ("name: b", "name: c"),
        ("server_id: \"0002\"", "server_id: \"0003\""),
        ("weight: 2", "weight: 3"),
        ("weight: 2", "state: draining"),
        ("nonce_length: 6", "nonce_length: 7"),
        ("config_id: 0", "config_id: 1"),
        (LINE, "# in the clear"),
        ("admin:", &retry("always", 0, KEY)),
    ] {
        assert_ne!(other(from, to), digest, "{to}");
    }
    let with = |mode, sequence, key| other("admin:", &retry(mode, sequence, key));
    let validating = with("always", 0, KEY);
    assert_eq!(with("always", 0, KEY), validating);
    assert_ne!(with("adaptive", 0, KEY), validating);
    assert_ne!(with("always", 1, KEY), validating);
    assert_ne!(with("always", 0, &KEY.replace('8', "9")), validating);
    let validating_with = |more: &str| {
        let retry = retry("always", 0, KEY).replace("mode:", &format!("{more}, mode:"));
        other("admin:", &retry)
    };
    assert_eq!(validating_with("transition: 1s"), validating);
    assert_ne!(validating_with("lifetime: 7s"), validating, "one refuses what the other takes");
    let refuse = contract_with("admin:", &retry("always", 0, KEY))
        + "limits: {unknown_short_headers: refuse}\n";
    assert_ne!(config(&refuse).digest(), validating);
    let mut reordered = config(CONTRACT);
    reordered.pools[0].backends.reverse();
    assert_eq!(reordered.digest(), digest);
    // Balancers of different builds compare theirs: where this changes, the changelog says so.
    assert_eq!(digest, "efaf8412c70958cf");
}

/// Which listeners are alike at two balancers, their names say; whose address is whose own.
#[test]
fn where_listeners_lead_to_different_pools_their_names_count() {
    let two = |edge: &str, media: &str, at: u16| {
        let text = contract_with("admin:", &format!("{SPARE}\nadmin:"));
        let second =
            format!("  - {{name: media, address: \"127.0.0.1:{at}\", pool: {media}}}\npools:");
        config(&text.replace("pool: web", &format!("pool: {edge}")).replace("pools:", &second))
            .digest()
    };
    assert_eq!(two("web", "spare", 4434), two("web", "spare", 4435));
    assert_ne!(two("web", "spare", 4434), two("spare", "web", 4434));
    assert_ne!(two("web", "spare", 4434), two("spare", "spare", 4434));
    assert_eq!(two("web", "web", 4434), config(CONTRACT).digest(), "one more way to the same");
}

#[test]
fn what_is_compared_has_no_keys() {
    let text = contract_with("admin:", &retry("always", 7, OTHER));
    let decisions = config(&text).decisions();
    let shown = decisions.to_string();
    assert!(!shown.contains(KEY) && !shown.contains(OTHER), "{shown}");
    let key =
        |decisions: &serde_json::Value| decisions["pools"]["web"]["quic_lb"]["0"]["key"].clone();
    let (first, again) = (key(&decisions), key(&config(CONTRACT).decisions()));
    assert!(first.as_str().is_some_and(|value| value.starts_with("check value ")), "{first}");
    assert_eq!(first, again);
    assert_ne!(first, key(&config(&CONTRACT.replace(KEY, OTHER)).decisions()));
    assert_eq!(decisions["retry"]["keys"][0]["sequence"], 7);
    let document = config(&text).compared_document();
    assert_eq!(document["pools"][0]["quic_lb"][0]["key"], first);
    assert_eq!(document["retry"]["keys"][0]["key"], decisions["retry"]["keys"][0]["key"]);
    let shown = document.to_string();
    assert!(!shown.contains(KEY) && !shown.contains(OTHER), "{shown}");
    assert!(!shown.contains("masked"), "{shown}");
}

/// A pool that no listener leads to.
const SPARE: &str = "  - {name: spare, backends: [{name: x, address: \"127.0.0.1:5009\"}]}";

fn retry(mode: &str, sequence: u8, key: &str) -> String {
    format!("retry: {{mode: {mode}, keys: [{{sequence: {sequence}, key: \"{key}\"}}]}}\nadmin:")
}

proptest! {
    /// Whatever slip of the hand there is, no part of the key gets out.
    #[test]
    fn no_edit_of_a_file_brings_its_key_to_light(edits in edits(CONTRACT.len())) {
        let text = edited(CONTRACT, &edits);
        let printed = match read(&text) {
            Ok(loaded) => {
                format!("{:?} {}", loaded, loaded.config.masked_document())
            }
            Err(report) => format!("{report} {report:?}"),
        };
        // Eight digits in a row do not come from elsewhere.
        for at in 0..=KEY.len() - 8 {
            prop_assert!(!printed.contains(&KEY[at..at + 8]), "{printed}\n{text}");
        }
    }
}

/// A place, how many octets to take away there, and what to put there.
type Edit = (usize, usize, &'static str);

fn edits(len: usize) -> impl Strategy<Value = Vec<Edit>> {
    let pieces = prop::sample::select(vec![
        "",
        "",
        " ",
        "\n",
        "\n  ",
        "\"",
        "'",
        ":",
        ": ",
        "- ",
        "#",
        "{",
        "}",
        "[",
        "]",
        ",",
        "*",
        "&a ",
        "!",
        "|\n",
        "x",
        "key_env: ",
        "name: ",
        "server_id: ",
    ]);
    prop::collection::vec((0..len, 0..6_usize, pieces), 1..4)
}

fn edited(text: &str, edits: &[Edit]) -> String {
    let mut text = text.as_bytes().to_vec();
    for (at, taken, put) in edits {
        let at = (*at).min(text.len());
        let end = (at + taken).min(text.len());
        text.splice(at..end, put.bytes());
    }
    String::from_utf8(text).expect("the contract is ASCII")
}

fn config(text: &str) -> Config {
    read(text).unwrap_or_else(|report| panic!("{report}")).config
}

fn restrict(path: &std::path::Path) {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("our file");
    }
    #[cfg(not(unix))]
    let _ = path;
}
