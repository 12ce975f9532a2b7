//! Whatever the file holds, reading it ends with a configuration or a report.

mod common;

use std::fs;

use common::{FULL, read};
use proptest::prelude::*;
use quic_lb_config::{Report, load};

proptest! {
    #[test]
    fn arbitrary_text_is_read_or_reported(text in any::<String>()) {
        is_consistent(&text)?;
    }

    #[test]
    fn text_of_yaml_pieces_is_read_or_reported(pieces in prop::collection::vec(piece(), 0..60)) {
        is_consistent(&pieces.concat())?;
    }

    #[test]
    fn documents_with_strange_values_are_read_or_reported(values in prop::collection::vec(value(), 1..8)) {
        let mut text = FULL.replace("    # ", "    ").replace("# workers", "workers");
        for (line, value) in values {
            let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
            let at = line % lines.len();
            if let Some((key, _)) = lines[at].split_once(':') {
                lines[at] = format!("{key}: {value}");
            }
            text = lines.join("\n");
        }
        is_consistent(&text)?;
    }
}

#[test]
fn a_file_that_cannot_be_read_is_one_clear_sentence() {
    let directory = tempfile::tempdir().expect("a directory");
    let missing = directory.path().join("missing.yaml");
    let report = load(&missing).expect_err("no file");
    assert_eq!(
        report.to_string(),
        format!(
            "{}: error\n  found:    a file that cannot be read: No such file or directory\n  \
             expected: a regular file that this process may read",
            missing.display()
        )
    );
    let report = load(directory.path()).expect_err("a directory");
    assert!(report.mistakes[0].found.ends_with("it is not a regular file"), "{report}");
}

/// To open a pipe is to wait for its writer, and to read a device may never end.
#[cfg(unix)]
#[test]
fn what_is_no_regular_file_is_refused_and_not_waited_for() {
    let directory = tempfile::tempdir().expect("a directory");
    let pipe = directory.path().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().expect("mkfifo");
    assert!(made.success());
    let key = format!("key_file: {}", pipe.display());
    let (told, ends) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let with_key = common::contract_with(&format!("key: \"{}\"", common::KEY), &key);
        for report in [load(&pipe), load("/dev/zero"), read(&with_key)] {
            let _ = told.send(report.expect_err("no regular file").to_string());
        }
    });
    for _ in 0..3 {
        // Far longer than it takes.
        let report = ends.recv_timeout(std::time::Duration::from_secs(60)).expect("a report");
        assert!(report.contains("it is not a regular file"), "{report}");
    }
}

#[test]
fn text_that_is_not_utf_8_is_reported_where_it_begins() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("lb.yaml");
    fs::write(&file, b"a: 1\nb: \xc3\xbc\xff\n").expect("a file");
    let report = load(&file).expect_err("no text");
    let place = report.mistakes[0].place.as_ref().expect("a place");
    assert_eq!((place.line, place.column), (2, 5));
}

#[test]
fn files_beyond_all_measure_are_not_read_to_their_end() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("lb.yaml");
    // It takes no room on the disk.
    fs::File::create(&file).expect("a file").set_len(1 << 40).expect("a long file");
    let report = load(&file).expect_err("no configuration");
    assert!(report.to_string().contains("bytes"), "{report}");
    let deep = "[".repeat(1 << 20);
    assert_eq!(read(&deep).expect_err("too deep").mistakes.len(), 1);
    let wide = format!("pools: [{}]", "{}, ".repeat(1 << 20));
    assert_eq!(read(&wide).expect_err("too wide").mistakes.len(), 1);
    let long = format!("workers: {}", "1".repeat(1 << 20));
    assert!(read(&long).expect_err("too long").to_string().len() < 2_000);
}

/// A report has an error and prints; a configuration comes without errors and is closed in itself.
fn is_consistent(text: &str) -> Result<(), TestCaseError> {
    match read(text) {
        Ok(loaded) => {
            prop_assert_eq!(Report::new("", loaded.warnings).errors(), 0);
            let config = loaded.config;
            prop_assert!(config.listeners.iter().all(|l| l.pool < config.pools.len()));
            for pool in &config.pools {
                for backend in &pool.backends {
                    prop_assert_eq!(backend.server_ids.len(), pool.cid_configs.len());
                }
            }
            prop_assert_eq!(config.digest().len(), 16);
            prop_assert!(config.masked_document().is_object());
        }
        Err(report) => {
            prop_assert!(report.errors() > 0);
            prop_assert!(!report.to_string().is_empty());
        }
    }
    Ok(())
}

fn piece() -> impl Strategy<Value = String> {
    let fixed = vec![
        "\n",
        "\n",
        "\n  ",
        "\n    ",
        " ",
        "- ",
        ": ",
        ":",
        "{",
        "}",
        "[",
        "]",
        ", ",
        "\"",
        "'",
        "#",
        "&a ",
        "*a",
        "!t ",
        "|",
        ">",
        "---\n",
        "...\n",
        "%YAML 1.2\n",
        "? ",
        "<<: ",
        "~",
        "\t",
        "\r",
        "listeners",
        "pools",
        "name",
        "address",
        "pool",
        "quic_lb",
        "config_id",
        "backends",
        "key",
        "server_id",
        "server_ids",
        "0001",
        "\"0001\"",
        "127.0.0.1:1",
        "[::1]:2",
        "5s",
        "0",
        "-1",
    ];
    prop_oneof![
        9 => prop::sample::select(fixed).prop_map(str::to_owned),
        1 => any::<String>(),
    ]
}

fn value() -> impl Strategy<Value = (usize, String)> {
    let fixed = vec![
        "",
        "~",
        "0",
        "1",
        "2",
        "7",
        "-1",
        "1e9",
        "0x10",
        "true",
        "off",
        "\"\"",
        "\"x\"",
        "[]",
        "{}",
        "[[]]",
        "{0: \"01\", 1: \"02\"}",
        "\"0001\"",
        "\"00000000000000000000000000000000\"",
        "5s",
        "\"127.0.0.1:4433\"",
        "\"[::1]:1\"",
        "\"0.0.0.0:1\"",
        "web",
        "*x",
        "&x 1",
        "!t 1",
        "LB_KEY",
    ];
    let text = prop_oneof![
        9 => prop::sample::select(fixed).prop_map(str::to_owned),
        1 => any::<String>(),
    ];
    (any::<usize>(), text)
}
