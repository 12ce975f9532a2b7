//! The commands that run and end, through the real binary.

#![allow(clippy::unwrap_used, reason = "a failed test is a fine message")]

mod support;

use std::slice::from_ref;

use serde_json::{Value, json};
use support::{CONTRACT, Folder, KEY, quic_lb, quic_lb_cut_off, quic_lb_reading};

#[test]
fn check_takes_the_contracts_example() {
    let out = Folder::with(CONTRACT).run(&["check"], &[]).done();
    assert!(out.contains("1 listener, 1 pool, 2 backends"), "{out}");
}

#[test]
fn check_prints_five_mistakes_with_their_lines() {
    let lines = [
        "listeners:",
        "  - name: edge",
        "    address: nowhere",
        "    pool: web",
        "pools:",
        "  - name: web",
        "    quic_lb:",
        "      - config_id: 9",
        "        server_id_length: 2",
        "        nonce_length: 6",
        "    backends:",
        "      - name: a",
        "        address: \"127.0.0.1:5001\"",
        "        server_id: \"0001\"",
        "        wieght: 3",
        "timeouts:",
        "  flow_idle: 30",
        "log:",
        "  level: loud",
    ];
    let folder = Folder::with(&lines.join("\n"));
    let complaint = folder.run(&["check"], &[]).failed(1);
    let config = folder.config();
    for line in [3, 8, 15, 17, 19] {
        let place = format!("{}:{line}:", config.display());
        assert!(complaint.contains(&place), "no mistake in line {line}:\n{complaint}");
    }
    assert!(complaint.ends_with("5 errors\n"), "{complaint}");
}

#[test]
fn check_shows_each_mistake_beneath_its_line() {
    let folder = Folder::with(&CONTRACT.replace("weight: 2", "weight: 0"));
    let complaint = folder.run(&["check"], &[]).failed(1);
    let lines: Vec<_> = complaint.lines().map(str::trim_end).collect();
    let config = folder.config();
    let place = format!("  --> {}:20:17", config.display());
    let expected = [
        "error: the number 0",
        &*place,
        "   |",
        "20 |         weight: 0",
        "   |                 ^",
        "   |",
        "   = expected: a whole number from 1 to 1000",
        "   = at: pools[0].backends[1].weight",
        &*format!("quic-lb: {}: 1 error", config.display()),
    ];
    assert_eq!(lines, expected, "{complaint}");

    let twice = CONTRACT.replace("name: b", "name: a");
    let complaint = Folder::with(&twice).run(&["check"], &[]).failed(1);
    assert!(complaint.contains("- see also"), "{complaint}");
}

#[test]
fn check_takes_several_files_and_standard_input() {
    let folder = Folder::with(CONTRACT);
    let (good, bad) = (folder.config(), folder.write("bad.yaml", b"listeners: []\n"));
    let (good, bad) = (good.to_str().unwrap(), bad.to_str().unwrap());
    assert!(quic_lb(&["check", good]).done().starts_with(&format!("{good}: valid: ")));
    let two = quic_lb(&["check", good, "--config", good]).done();
    assert_eq!(two.lines().count(), 2, "{two}");

    let mixed = quic_lb(&["check", bad, good]);
    assert_eq!(mixed.code, Some(1));
    assert!(mixed.out.starts_with(&format!("{good}: valid: ")), "{mixed:?}");
    assert!(mixed.err.ends_with(&format!("quic-lb: {bad}: 2 errors\n")), "{mixed:?}");

    let valid = quic_lb_reading(CONTRACT.as_bytes(), &["check", "-"]).done();
    assert!(valid.starts_with("standard input: valid: 1 listener"), "{valid}");
    let wrong = quic_lb_reading(b"listeners: []\n", &["check", "-"]).failed(1);
    assert!(wrong.contains("standard input:1:12"), "{wrong}");
    let cid =
        quic_lb_reading(CONTRACT.as_bytes(), &["cid", "encode", "--config", "-", "--backend", "a"]);
    assert_eq!(cid.done().trim().len(), 18);
    let complaint = quic_lb_reading(CONTRACT.as_bytes(), &["run", "--config", "-"]).failed(1);
    assert!(complaint.contains("give it a file"), "{complaint}");
    quic_lb(&["check"]).failed(2);
}

#[test]
fn check_prints_json_for_programs() {
    let folder = Folder::with(CONTRACT);
    let bad =
        CONTRACT.replace("name: b", "name: a").replace("\"127.0.0.1:9090\"", "\"0.0.0.0:9090\"");
    let bad = folder.write("bad.yaml", bad.as_bytes());
    let (good, bad) = (folder.config(), bad.to_str().unwrap().to_owned());
    let ended = quic_lb(&["check", "--json", good.to_str().unwrap(), &bad]);
    assert_eq!((ended.code, &*ended.err), (Some(1), ""));
    let files: Value = serde_json::from_str(&ended.out).unwrap();
    let digest = files[0]["digest"].clone();
    assert_eq!(digest.as_str().unwrap().len(), 16);
    assert_eq!(
        files[0],
        json!({
            "file": good, "valid": true, "digest": digest, "listeners": 1, "pools": 1,
            "backends": 2, "mistakes": [],
        })
    );
    assert_eq!(
        files[1],
        json!({
            "file": bad,
            "valid": false,
            "mistakes": [
                {
                    "severity": "error", "line": 17, "column": 15,
                    "path": "pools[0].backends[1].name", "found": "a again",
                    "expected": "a unique name",
                    "related": { "path": "pools[0].backends[0].name", "line": 14, "column": 15 },
                },
                {
                    "severity": "warning", "line": 22, "column": 12, "path": "admin.address",
                    "found": "0.0.0.0:9090, which other hosts may reach",
                    "expected": "a loopback address: the admin interface asks for no password",
                    "related": null,
                },
            ],
        })
    );
}

/// On a terminal, which `script` makes.
#[test]
fn colours_are_for_terminals_whose_users_want_them() {
    let folder = Folder::with("listeners: []\n");
    let config = folder.config();
    let on_terminal = |args: &str, environment: &[(&str, &str)]| {
        let line = format!("{} {args} {}", env!("CARGO_BIN_EXE_quic-lb"), config.display());
        let mut script = std::process::Command::new("script");
        script.args(["-qefc", &line, "/dev/null"]).env_remove("NO_COLOR").env("TERM", "xterm");
        let output = script.envs(environment.iter().copied()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("1:12"), "{text}");
        text.contains("\u{1b}[")
    };
    assert!(on_terminal("check", &[]));
    assert!(on_terminal("check", &[("NO_COLOR", "")]), "an empty one says nothing");
    for quiet in [("NO_COLOR", "1"), ("TERM", "dumb")] {
        assert!(!on_terminal("check", &[quiet]), "{quiet:?}");
        assert!(!on_terminal("run --config", &[quiet]), "{quiet:?}");
    }
    assert!(!folder.run(&["check"], &[]).failed(1).contains('\u{1b}'), "no terminal");
}

/// It logs a doubt, and then finds that the address is somebody else's.
#[test]
fn records_are_coloured_for_terminals_whose_users_want_it() {
    let config = CONTRACT.replace("\"127.0.0.1:4433\"", "\"192.0.2.77:4433\"");
    let folder = Folder::with(&format!("{config}timeouts: {{ drain: 1h }}\n"));
    let on_terminal = |environment: &[(&str, &str)]| {
        let (binary, config) = (env!("CARGO_BIN_EXE_quic-lb"), folder.config());
        let line = format!("{binary} run --config {}", config.display());
        let mut script = std::process::Command::new("script");
        script.args(["-qec", &line, "/dev/null"]).env_remove("NO_COLOR").env_remove("RUST_LOG");
        let output = script.env("TERM", "xterm").envs(environment.iter().copied()).output();
        let text = String::from_utf8(output.unwrap().stdout).unwrap();
        assert!(text.contains("doubt about the configuration"), "{text}");
        text.contains('\u{1b}')
    };
    assert!(on_terminal(&[]));
    assert!(!on_terminal(&[("NO_COLOR", "1")]));
}

#[test]
fn a_missing_file_and_an_unreadable_key_are_named() {
    let folder = Folder::with(CONTRACT);
    let missing = folder.path().join("missing.yaml");
    let complaint = quic_lb(&["check", "--config", missing.to_str().unwrap()]).failed(1);
    assert!(complaint.contains("missing.yaml"), "{complaint}");
    assert!(complaint.contains("No such file"), "{complaint}");

    let config = CONTRACT.replace(&format!("key: \"{KEY}\""), "key_file: absent.key");
    for command in ["check", "run"] {
        let complaint = Folder::with(&config).run(&[command], &[]).failed(1);
        assert!(complaint.contains(":12:"), "{complaint}");
        assert!(complaint.contains("absent.key"), "{complaint}");
    }
}

/// The rows of draft-ietf-quic-load-balancers-21, appendix with test vectors: config ID, key,
/// server ID, nonce, connection ID.
const VECTORS: [(u8, Option<&str>, &str, &str, &str); 5] = [
    (0, None, "c4605e", "4504cc4f", "07c4605e4504cc4f"),
    (0, Some(KEY), "ed793a", "ee080dbf", "0720b1d07b359d3c"),
    (1, Some(KEY), "ed793a51d49b8f5fab65", "ee080dbf48", "2fcc381bc74cb4fbad2823a3d1f8fed2"),
    (2, Some(KEY), "ed793a51d49b8f5f", "ee080dbf48c0d1e5", "504dd2d05a7b0de9b2b9907afb5ecf8cc3"),
    (
        3,
        Some(KEY),
        "ed793a51d49b8f5fab",
        "ee080dbf48c0d1e55d",
        "725779c9cc86beb3a3a4a3ca96fce4bfe0cdbc",
    ),
];

/// One pool `clear` with the vector in the clear, one pool `web` with all the others; their backend
/// is called `v`.
fn vectors() -> Folder {
    let section = |(id, key, server_id, nonce, _): &(u8, Option<&str>, &str, &str, &str)| {
        let key = key.map(|key| format!("\n        key: \"{key}\"")).unwrap_or_default();
        format!(
            "      - config_id: {id}\n        server_id_length: {}\n        nonce_length: {}{key}\n",
            server_id.len() / 2,
            nonce.len() / 2
        )
    };
    let clear = section(&VECTORS[0]);
    let encrypted: String = VECTORS[1..].iter().map(section).collect();
    let ids: Vec<_> =
        VECTORS[1..].iter().map(|(id, _, sid, ..)| format!("{id}: \"{sid}\"")).collect();
    Folder::with(&format!(
        "listeners:
  - name: edge
    address: \"127.0.0.1:4433\"
    pool: web
  - name: other
    address: \"127.0.0.1:4434\"
    pool: clear
pools:
  - name: clear
    quic_lb:
{clear}    backends:
      - name: v
        address: \"127.0.0.1:5001\"
        server_id: \"c4605e\"
  - name: web
    quic_lb:
{encrypted}    backends:
      - name: v
        address: \"127.0.0.1:5002\"
        server_ids: {{ {} }}
",
        ids.join(", ")
    ))
}

#[test]
fn cid_decode_names_config_server_and_backend_of_every_published_vector() {
    let folder = vectors();
    for (config_id, key, server_id, _, cid) in VECTORS {
        let pool = if key.is_some() { "web" } else { "clear" };
        let rows = decode(&folder, &[cid]);
        let [row] = rows.as_slice() else { panic!("{rows:?}") };
        assert_eq!(row["cid"], cid);
        assert_eq!(row["routable"], true);
        assert_eq!(row["config_id"], config_id);
        assert_eq!(row["server_id"], server_id);
        assert_eq!((&row["pool"], &row["backend"]), (&pool.into(), &"v".into()));
        assert_eq!(row["reason"], Value::Null);

        let text = folder.run(&["cid", "decode"], &["--pool", pool, cid]).done();
        let expected = format!("{cid}: config {config_id}, server ID {server_id}, backend v");
        assert!(text.starts_with(&expected), "{text}");
    }
}

#[test]
fn cid_decode_ignores_what_follows_and_separators() {
    let folder = vectors();
    let rows = decode(&folder, &["07:20:b1:d0:7b:35:9d:3c:aa:bb"]);
    assert_eq!(rows[0]["server_id"], "ed793a");
}

#[test]
fn cid_decode_names_the_reason_of_what_is_unroutable() {
    let folder = Folder::with(CONTRACT);
    for (cid, reason, config_id) in [
        ("e1020304", "config bits are 0b111", Value::Null),
        ("21020304", "no configuration with ID 1", 1.into()),
        ("08010203", "more bytes than there are", 0.into()),
        ("", "empty", Value::Null),
    ] {
        let rows = decode(&folder, &[cid]);
        assert_eq!(rows[0]["routable"], false);
        assert_eq!(rows[0]["backend"], Value::Null);
        assert_eq!(rows[0]["config_id"], config_id);
        assert!(rows[0]["reason"].as_str().unwrap().contains(reason), "{rows:?}");
        let ended = folder.run(&["cid", "decode"], &[cid]);
        assert_eq!((ended.code, &*ended.err), (Some(3), ""));
        let text = ended.out;
        assert!(text.contains("unroutable: ") && text.contains(reason), "{text}");
    }
    // A server ID that nobody has: encoded with the same key for another fleet.
    let other = Folder::with(&CONTRACT.replace("0001", "0909"));
    let cid = other.run(&["cid", "encode"], &["--backend", "a"]).done();
    let rows = decode(&folder, &[cid.trim()]);
    assert_eq!(rows[0]["routable"], false);
    assert_eq!(rows[0]["server_id"], "0909");
    assert_eq!(rows[0]["reason"], "no backend of the pool has server ID 0909");
}

#[test]
fn cid_decode_keeps_the_order_of_its_arguments() {
    let folder = Folder::with(CONTRACT);
    let cids: Vec<_> = ["a", "b", "a"]
        .iter()
        .map(|name| folder.run(&["cid", "encode"], &["--backend", name]).done().trim().to_owned())
        .collect();
    let rows = decode(&folder, &[&cids[0], &cids[1], "e0", &cids[2]]);
    let backends: Vec<_> = rows.iter().map(|row| row["backend"].as_str()).collect();
    assert_eq!(backends, [Some("a"), Some("b"), None, Some("a")]);
}

#[test]
fn what_is_encoded_decodes_to_the_same_backend() {
    let folder = vectors();
    for (config_id, _, _, nonce, cid) in &VECTORS[1..] {
        let id = config_id.to_string();
        let encode = |more: &[&str]| {
            let args = [&["--backend", "web/v", "--config-id", &id], more].concat();
            folder.run(&["cid", "encode"], &args).done().trim().to_owned()
        };
        assert_eq!(encode(&["--nonce", nonce]), *cid);
        let (first, second) = (encode(&[]), encode(&[]));
        assert_ne!(first, second, "nonces are random");
        let rows = decode(&folder, &[&first, &second]);
        assert!(rows.iter().all(|row| row["backend"] == "v" && row["config_id"] == *config_id));
    }
}

#[test]
fn cid_encode_asks_back_where_it_would_have_to_guess() {
    let folder = vectors();
    for (args, expected) in [
        (
            &["--backend", "v"][..],
            "several pools have a backend \"v\": say which with clear/v, web/v",
        ),
        (&["--backend", "web/v"], "choose one with --config-id: 0, 1, 2, 3"),
        (&["--backend", "web/v", "--config-id", "5"], "pool web has no configuration with ID 5"),
        (&["--backend", "x"], "there is no backend \"x\"; there is clear/v, web/v"),
        (&["--backend", "clear/v", "--nonce", "00"], "wants a nonce of 4 bytes, not 1"),
    ] {
        let complaint = folder.run(&["cid", "encode"], args).failed(1);
        assert!(complaint.contains(expected), "{complaint}");
        assert_eq!(complaint.lines().count(), 1, "{complaint}");
    }
}

#[test]
fn wrong_usage_is_told_apart_from_failure() {
    let folder = Folder::with(CONTRACT);
    folder.run(&["cid", "decode"], &["07xy"]).failed(2);
    folder.run(&["cid", "decode"], &[]).failed(2);
    folder.run(&["cid", "encode"], &["--backend", "a", "--config-id", "7"]).failed(2);
    folder.run(&["explain"], &["4000"]).failed(2);
    folder.run(&["explain"], &["--from", "here", "4000"]).failed(2);
    folder.run(&["run"], &["--now"]).failed(2);
    quic_lb(&["cid", "decode", "07"]).failed(2);
    quic_lb(&[]).failed(2);
}

#[test]
fn explain_follows_a_routable_short_header() {
    let folder = Folder::with(CONTRACT);
    let cid = folder.run(&["cid", "encode"], &["--backend", "b"]).done();
    let datagram = format!("40{}00112233", cid.trim());
    let out = folder.run(&["explain"], &["--from", "192.0.2.7:50000", &datagram]).done();
    assert!(out.contains("short header"), "{out}");
    assert!(out.contains("rule 1 cid             config 0, server ID 0002: backend b"), "{out}");
    assert!(out.contains("rule 2 four_tuple_scid not asked"), "{out}");
    let verdict = "verdict: forward to backend b of pool web at 127.0.0.1:5002 by rule cid";
    assert!(out.contains(verdict), "{out}");
}

#[test]
fn explain_names_coalesced_packets_all_rules_and_the_verdict() {
    let out = Folder::with(CONTRACT)
        .run(&["explain"], &["--from", "[2001:db8::7]:50000", &hex(&first_flight())])
        .done();
    for expected in [
        "packet 1: Initial of version 1, DCID 0101010101010101, SCID aaaa",
        "packet 2: 0-RTT of version 1, DCID 0101010101010101, SCID aaaa",
        "rule 1 cid ",
        "rule 2 four_tuple_scid this 4-tuple and source connection ID are not remembered",
        "rule 3 dcid ",
        "rule 4 four_tuple ",
        "rule 5 fallback        hashed the destination connection ID: backend ",
        "admission              begins a connection, and no address is validated now (address validation: inactive)",
        "by rule fallback",
    ] {
        assert!(out.contains(expected), "no {expected:?} in\n{out}");
    }
    let truncated = Folder::with(CONTRACT)
        .run(&["explain"], &["--from", "192.0.2.7:50000", "c00000000108"])
        .done();
    assert!(truncated.contains("verdict: drop, malformed"), "{truncated}");
}

#[test]
fn explain_says_what_address_validation_and_limits_do() {
    let honoured = CONTRACT.replace("name: web", "name: web\n    honours_tokens: true");
    let retry =
        format!("{honoured}\nretry: {{ mode: always, keys: [{{ sequence: 0, key: {KEY:?} }}] }}");
    let folder = Folder::with(&retry);
    let explain = |from: &str, octets: &[u8]| {
        let out = folder.run(&["explain"], &["--from", from, &hex(octets)]).done();
        let lines =
            out.lines().filter(|line| line.contains("admission") || line.contains("verdict"));
        lines.map(|line| line.trim().to_owned()).collect::<Vec<_>>()
    };
    let hello = first_flight();
    let admission =
        |saw: &str| format!("admission              {saw} (address validation: active)");
    assert_eq!(
        explain("192.0.2.7:50000", &hello),
        [
            admission("no token: the client is asked to prove its address"),
            "verdict: reply, retry".to_owned()
        ]
    );
    let mut forged = hello.clone();
    forged[17..20].copy_from_slice(&[2, 8, 1]);
    assert_eq!(
        explain("192.0.2.7:50000", &forged),
        [
            admission(
                "claims to be of a Retry: the token ends early; nobody is told so, since the packet does not open"
            ),
            "verdict: drop, invalid_token".to_owned()
        ]
    );
    assert_eq!(
        explain("192.0.2.7:53", &hello),
        [
            admission("comes from a port of services that attackers reflect from"),
            "verdict: drop, reflector_port".to_owned()
        ]
    );
    assert_eq!(
        explain("192.0.2.7:50000", &hello[..100]),
        [
            admission("an Initial in less than 1200 bytes"),
            "verdict: drop, small_initial".to_owned()
        ]
    );
}

#[test]
fn explain_takes_a_listener_by_name_or_all_of_them() {
    let folder = vectors();
    let args = ["--from", "192.0.2.7:50000", "4007c4605e4504cc4f"];
    let all = folder.run(&["explain"], &args).done();
    assert!(all.contains("to listener edge") && all.contains("to listener other"), "{all}");
    let args = [&args[..2], &["--listener", "other"], &args[2..]].concat();
    let one = folder.run(&["explain"], &args).done();
    assert!(!one.contains("to listener edge"), "{one}");
    assert!(one.contains("server ID c4605e: backend v"), "{one}");
    let nobody = folder.run(&["explain"], &["--listener", "x", "--from", "192.0.2.7:5", "40"]);
    assert_eq!(nobody.failed(1), "quic-lb: there is no listener \"x\"; there is edge, other\n");
}

#[test]
fn explain_reads_a_capture_and_remembers_along_the_way() {
    let folder = Folder::with(CONTRACT);
    let hello = first_flight();
    let capture = pcap(&[
        udp(50000, 4433, &hello),
        udp(53, 50000, b"something else"),
        udp(50000, 4433, &hello),
        udp(50001, 4433, &[]),
    ]);
    let path = folder.write("trace.pcap", &capture);
    let out = folder.run(&["explain"], &["--pcap", path.to_str().unwrap()]).done();
    let verdicts: Vec<_> = out.lines().filter(|line| line.contains("verdict: ")).collect();
    assert_eq!(verdicts.len(), 3, "{out}");
    assert!(verdicts[0].ends_with("by rule fallback"), "{out}");
    assert!(verdicts[1].ends_with("by rule four_tuple_scid"), "{out}");
    assert!(verdicts[2].ends_with("drop, empty"), "{out}");
    assert!(out.contains("frame 3, 2.000000 s: "), "{out}");

    let config = folder.config();
    let from_stdin = ["explain", "--config", config.to_str().unwrap(), "--pcap", "/dev/stdin"];
    assert_eq!(quic_lb_reading(&capture, &from_stdin).done(), out);
}

/// Servers without routable connection IDs: what they answer in the capture is learnt.
#[test]
fn explain_learns_from_the_servers_in_a_capture() {
    let config = "
listeners: [{ name: edge, address: \"127.0.0.1:4433\", pool: old }]
pools:
  - name: old
    backends:
      - { name: a, address: \"127.0.0.1:5001\" }
      - { name: b, address: \"127.0.0.1:5002\" }
";
    let folder = Folder::with(config);
    let server_cid = [7u8; 8];
    let answer = [&[0xc0, 0, 0, 0, 1, 2, 0xaa, 0xaa, 8][..], &server_cid, &[0, 1, 0]].concat();
    let short = [&[0x40][..], &server_cid, &[0; 20]].concat();
    let capture = pcap(&[
        udp(50000, 4433, &first_flight()),
        udp(4433, 50000, &answer),
        udp(60000, 4433, &short),
    ]);
    let path = folder.write("trace.pcap", &capture);
    let out = folder.run(&["explain"], &["--pcap", path.to_str().unwrap()]).done();
    let backend = |line: &str| line.split(' ').nth(6).unwrap().to_owned();
    let verdicts: Vec<_> = out.lines().filter(|line| line.contains("verdict: ")).collect();
    assert_eq!(verdicts.len(), 2, "{out}");
    assert!(verdicts[1].ends_with("by rule dcid"), "{out}");
    assert_eq!(backend(verdicts[0]), backend(verdicts[1]), "{out}");
}

#[test]
fn explain_says_when_a_capture_holds_nothing_for_it() {
    let folder = Folder::with(CONTRACT);
    let path = folder.write("trace.pcap", &pcap(&[udp(1, 2, b"x")]));
    let out = folder.run(&["explain"], &["--pcap", path.to_str().unwrap()]).done();
    assert_eq!(out, "no UDP datagram in the capture goes to a listener (port 4433)\n");
    let config = folder.config();
    let complaint = folder.run(&["explain"], &["--pcap", config.to_str().unwrap()]).failed(1);
    assert!(complaint.contains("neither a pcap nor a pcapng file"), "{complaint}");
}

/// A handshake with a Retry, captured a while ago: its token was good for ten seconds.
#[test]
fn explain_judges_tokens_by_the_time_of_the_capture() {
    let folder = Folder::with(include_str!("captures/retry.yaml"));
    let whole = include_bytes!("captures/retry.pcap");
    let path = folder.write("retry.pcap", whole);
    let explain = |path: &std::path::Path| {
        folder.run(&["explain"], &["--pcap", path.to_str().unwrap()]).done()
    };
    let out = explain(&path);
    let verdicts: Vec<_> = out.lines().filter(|line| line.contains("verdict: ")).collect();
    assert_eq!(verdicts[0], "  verdict: reply, retry", "{out}");
    assert!(verdicts[1].contains("verdict: forward to backend "), "{out}");
    assert!(out.contains("frame 3, 0.008729 s: 1200 bytes"), "{out}");

    // A minute more between the Retry and its token.
    let mut late = whole.to_vec();
    let third = 24 + 2 * 16 + 1242 + 141;
    let seconds = u32::from_le_bytes(late[third..third + 4].try_into().unwrap());
    late[third..third + 4].copy_from_slice(&(seconds + 60).to_le_bytes());
    let out = explain(&folder.write("late.pcap", &late));
    assert!(out.contains("the token has expired"), "{out}");
    assert!(out.contains(", invalid_token"), "{out}");
}

/// Snapshots of 96 and 46 bytes: the token of the one and the connection ID of the other are cut.
#[test]
fn explain_makes_up_nothing_that_was_not_captured() {
    let cut = |snap: usize, frames: &[Vec<u8>]| {
        let frames: Vec<_> = frames.iter().map(|frame| (frame, frame.len().min(snap))).collect();
        pcap_cut(&frames)
    };
    let folder = Folder::with(CONTRACT);
    let explain = |capture: &[u8]| {
        let path = folder.write("cut.pcap", capture);
        folder.run(&["explain"], &["--pcap", path.to_str().unwrap()]).done()
    };
    let cid = folder.run(&["cid", "encode"], &["--backend", "b"]).done();
    let cid: Vec<u8> =
        (0..9).map(|n| u8::from_str_radix(&cid[2 * n..2 * n + 2], 16).unwrap()).collect();
    let short = udp(50000, 4433, &[&[0x40], &cid[..], &[7; 40]].concat());
    // Headers of 28 bytes, the first byte, and so many of the connection ID.
    for captured in 0..9 {
        let out = explain(&cut(29 + captured, from_ref(&short)));
        let missing = "verdict: not known: the connection ID, which decides, is not in the capture";
        assert!(out.contains(missing), "{captured}: {out}");
        assert!(!out.contains("server ID"), "{captured}: {out}");
        assert!(
            out.contains(&format!(
                "50 bytes from 127.0.0.1:50000 to listener edge, of which {} are",
                captured + 1
            )),
            "{out}"
        );
    }
    let out = explain(&cut(38, from_ref(&short)));
    assert!(out.contains("config 0, server ID 0002: backend b"), "{out}");

    // A header that is cut teaches nothing: the same packet later is new, too.
    let hello = udp(50000, 4433, &first_flight());
    let out = explain(&pcap_cut(&[(&hello, 40), (&hello, hello.len())]));
    assert!(out.contains("not known: the header"), "{out}");
    assert!(out.contains("by rule fallback"), "{out}");
    // One that is there decides; the padding behind it is nobody's packet.
    let out = explain(&cut(50, &[hello]));
    assert!(out.contains("by rule fallback"), "{out}");
    assert!(!out.contains("packet 2"), "{out}");

    let folder = Folder::with(include_str!("captures/retry.yaml"));
    let whole = include_bytes!("captures/retry.pcap");
    let third = &whole[24 + 2 * 16 + 1242 + 141 + 16 + 14..][..1228].to_vec();
    let path = folder.write("cut.pcap", &cut(82, from_ref(third)));
    let out = folder.run(&["explain"], &["--pcap", path.to_str().unwrap()]).done();
    assert!(out.contains("verdict: not known: the token"), "{out}");
    // The token is whole and of another time; whether the packet opens is not known.
    let mut later = cut(400, from_ref(third));
    later[24..28].copy_from_slice(&2_000_000_000u32.to_le_bytes());
    let path = folder.write("cut.pcap", &later);
    let out = folder.run(&["explain"], &["--pcap", path.to_str().unwrap()]).done();
    let rest = "verdict: not known: the rest of a packet with an invalid token";
    assert!(out.contains(rest), "{out}");
}

#[test]
fn explain_takes_apart_what_offload_had_joined() {
    let folder = Folder::with(CONTRACT);
    let cid = folder.run(&["cid", "encode"], &["--backend", "b"]).done();
    let cid: Vec<u8> =
        (0..9).map(|n| u8::from_str_radix(&cid[2 * n..2 * n + 2], 16).unwrap()).collect();
    let short = |fill: u8, len: usize| [&[0x40], &cid[..], &vec![fill; len - 10]].concat();
    let joined = [short(1, 1200), short(2, 1200), short(3, 300)].concat();
    let path = folder.write("joined.pcap", &pcap(&[udp(50000, 4433, &joined)]));
    let out = folder.run(&["explain"], &["--pcap", path.to_str().unwrap()]).done();
    for (nth, len) in [(1, 1200), (2, 1200), (3, 300)] {
        let heading = format!(
            "frame 1, datagram {nth} of 3 that offload had joined, 0.000000 s: {len} bytes from "
        );
        assert!(out.contains(&heading), "{out}");
    }
    assert_eq!(out.matches("verdict: forward to backend b").count(), 3, "{out}");
}

#[test]
fn explain_names_the_frames_that_it_does_not_read() {
    let folder = Folder::with(CONTRACT);
    let mut capture = pcap(&[udp(50000, 4433, &first_flight()), udp(50000, 4433, b"")]);
    capture[20..24].copy_from_slice(&127u32.to_le_bytes());
    let path = folder.write("radio.pcap", &capture);
    let out = folder.run(&["explain"], &["--pcap", path.to_str().unwrap()]).done();
    let named =
        "not read: 2 frames of link type 127, which is not read here: the first is frame 1\n";
    assert!(out.starts_with(named), "{out}");
    // Raw IP under an older number.
    capture[20..24].copy_from_slice(&12u32.to_le_bytes());
    let path = folder.write("old.pcap", &capture);
    let out = folder.run(&["explain"], &["--pcap", path.to_str().unwrap()]).done();
    assert_eq!(out.matches("verdict: ").count(), 2, "{out}");
}

#[test]
fn keygen_makes_keys_that_differ_and_that_the_file_takes() {
    let (first, second) = (quic_lb(&["keygen"]).done(), quic_lb(&["keygen"]).done());
    assert_ne!(first, second);
    assert_eq!(first.trim().len(), 32);
    Folder::with(&CONTRACT.replace(KEY, first.trim())).run(&["check"], &[]).done();
}

/// That this schema is what the reader reads, key by key, is shown in `config/tests/schema.rs`.
#[test]
fn the_schema_is_that_of_the_reader() {
    let schema: Value = serde_json::from_str(&quic_lb(&["schema"]).done()).unwrap();
    assert_eq!(schema, quic_lb_config::schema());
}

#[test]
fn completions_and_manual_pages_come_for_every_command() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(quic_lb(&["completions", shell]).done().contains("keygen"), "{shell}");
    }
    for command in [
        &["run"][..],
        &["check"],
        &["cid", "decode"],
        &["cid", "encode"],
        &["explain"],
        &["keygen"],
    ] {
        let page = quic_lb(&[&["man"], command].concat()).done();
        assert!(page.contains(&format!("quic\\-lb\\-{}", command.join("\\-"))), "{page}");
        assert!(page.contains("Examples:"), "{page}");
        let help = quic_lb(&[command, &["--help"]].concat()).done();
        assert!(help.contains("Examples:"), "{help}");
    }
    assert!(quic_lb(&["man"]).done().contains("SUBCOMMANDS"));
    assert!(quic_lb(&["man", "nonsense"]).failed(1).contains("no command \"nonsense\""));
}

/// With the shipped example in the place of `lb.yaml`.
#[test]
fn the_examples_of_the_help_do_what_they_show() {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/examples/contract.yaml");
    let mut tried = 0;
    for command in [&[][..], &["cid", "decode"], &["cid", "encode"], &["explain"]] {
        let help = quic_lb(&[command, &["--help"]].concat()).done();
        let lines = help.lines().map(str::trim);
        for line in lines.filter(|line| {
            line.starts_with("quic-lb cid ")
                || line.starts_with("quic-lb explain --config lb.yaml --from")
        }) {
            let quic_lb = env!("CARGO_BIN_EXE_quic-lb");
            let typed =
                line.replace("lb.yaml", example).replace("quic-lb ", &format!("{quic_lb} "));
            let ended: support::Ended =
                std::process::Command::new("sh").args(["-c", &typed]).output().unwrap().into();
            let out = ended.done();
            assert!(!out.contains("unroutable"), "{line}: {out}");
            if line.contains("explain") {
                assert!(out.contains("by rule cid"), "{line}: {out}");
            }
            tried += 1;
        }
    }
    assert!(tried >= 6, "{tried}");
}

#[test]
fn a_reader_that_has_read_enough_is_no_error() {
    assert_eq!(quic_lb_cut_off(10, &["schema"]), (Some(0), String::new()));
}

#[test]
fn no_command_prints_a_key() {
    let folder = Folder::with(CONTRACT);
    let cid = folder.run(&["cid", "encode"], &["--backend", "a"]).done();
    let datagram = format!("40{}", cid.trim());
    for (command, args) in [
        (&["check"][..], &[][..]),
        (&["cid", "decode"], &["--json", cid.trim()]),
        (&["explain"], &["--from", "192.0.2.7:50000", &datagram]),
    ] {
        let ended = folder.run(command, args);
        assert!(!ended.out.contains(KEY) && !ended.err.contains(KEY), "{ended:?}");
    }
    // Nor of a file that is wrong, wherever the key stands.
    for (from, to) in [("key:", "kay:"), ("server_id_length: 2", "server_id_length: 99")] {
        let complaint = Folder::with(&CONTRACT.replace(from, to)).run(&["check"], &[]).failed(1);
        assert!(!complaint.contains(KEY), "{complaint}");
    }
}

fn decode(folder: &Folder, cids: &[&str]) -> Vec<Value> {
    let ended = folder.run(&["cid", "decode"], &[&["--json"], cids].concat());
    let rows: Vec<Value> = serde_json::from_str(&ended.out).unwrap();
    let code = if rows.iter().all(|row| row["routable"] == true) { 0 } else { 3 };
    assert_eq!((ended.code, &*ended.err), (Some(code), ""));
    rows
}

/// An Initial and a 0-RTT packet of version 1 that share connection IDs, and padding.
fn first_flight() -> Vec<u8> {
    let ids = [&[8][..], &[1; 8], &[2, 0xaa, 0xaa]].concat();
    let initial = [&[0xc0, 0, 0, 0, 1][..], &ids, &[0, 4], &[0; 4]].concat();
    let early = [&[0xd0, 0, 0, 0, 1][..], &ids, &[4], &[0; 4]].concat();
    let mut datagram = [initial, early].concat();
    datagram.resize(1200, 0);
    datagram
}

fn hex(octets: &[u8]) -> String {
    octets.iter().map(|octet| format!("{octet:02x}")).collect()
}

/// A raw IPv4 packet.
fn udp(from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let builder = etherparse::PacketBuilder::ipv4([127, 0, 0, 1], [127, 0, 0, 1], 64);
    let mut packet = vec![];
    builder.udp(from, to).write(&mut packet, payload).unwrap();
    packet
}

/// A capture of raw IP packets, one second apart.
fn pcap(packets: &[Vec<u8>]) -> Vec<u8> {
    pcap_cut(&packets.iter().map(|packet| (packet, packet.len())).collect::<Vec<_>>())
}

/// As [`pcap`], with the first so many bytes of each packet.
fn pcap_cut(packets: &[(&Vec<u8>, usize)]) -> Vec<u8> {
    let mut file = vec![0xd4, 0xc3, 0xb2, 0xa1, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    file.extend(65535u32.to_le_bytes());
    file.extend(101u32.to_le_bytes());
    for (second, (packet, captured)) in (1_700_000_000u32..).zip(packets) {
        let [len, wire_len] = [*captured, packet.len()].map(|len| u32::try_from(len).unwrap());
        file.extend(
            [second.to_le_bytes(), [0; 4], len.to_le_bytes(), wire_len.to_le_bytes()].concat(),
        );
        file.extend(&packet[..*captured]);
    }
    file
}

#[cfg(feature = "demo")]
#[test]
fn the_demo_moves_drains_and_rotates_and_loses_nothing() {
    let args = ["demo", "--duration", "6s", "--backends", "2", "--clients", "6", "--json"];
    let out = quic_lb(&args).done();
    let summary: Value = serde_json::from_str(&out).unwrap();
    for (key, wanted) in [("lost", 0), ("misrouted", 0), ("requests_failed", 0)] {
        assert_eq!(summary[key], wanted, "{key}: {summary:#}");
    }
    for key in ["connections", "requests", "rebinds", "migrations"] {
        assert!(summary[key].as_u64().unwrap() > 5, "{key}: {summary:#}");
    }
    assert_eq!(summary["drained_and_rotated"], true, "{summary:#}");
}
