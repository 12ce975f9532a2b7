//! The list of mutations stays true: each still finds the text that it takes the place of, exactly
//! once. Whether the tests notice them is asked by `tests/mutations/run`, which takes its time.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

/// An entry of the list, by the rules of `tests/mutations/run`.
struct Mutation {
    name: String,
    file: String,
    removed: String,
    added: String,
}

#[test]
fn every_mutation_still_applies() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let list = fs::read_to_string(root.join("tests/mutations/mutations.txt")).expect("the list");
    let mutations = read(&list);
    assert!(mutations.len() >= 19, "{} mutations", mutations.len());
    let mut names = BTreeSet::new();
    let mut wrong = vec![];
    for Mutation { name, file, removed, added } in &mutations {
        let source = fs::read_to_string(root.join(file)).unwrap_or_default();
        let found = occurrences(&source, removed);
        if found != 1 {
            wrong.push(format!("{name}: {found} times in {file}: {removed}"));
        }
        assert!(names.insert(name), "two entries of the name {name}");
        assert_ne!(single_spaced(removed), single_spaced(added), "{name} changes nothing");
    }
    assert!(wrong.is_empty(), "mutations that do not apply any more:\n{}", wrong.join("\n"));
}

#[test]
fn entries_are_read_and_counted_whatever_the_white_space() {
    let list = "# About the list.\n\nname\nsome/file.rs\n- first(\n-     second)\n+ third\n\n\n";
    let [mutation] = &read(list)[..] else { panic!("one entry") };
    assert_eq!((mutation.name.as_str(), mutation.file.as_str()), ("name", "some/file.rs"));
    assert_eq!(single_spaced(&mutation.added), "third");
    for (source, count) in [
        ("a first(\n\tsecond) b", 1),
        ("first( second) first(   second)", 2),
        ("first(second)", 0),
        ("", 0),
    ] {
        assert_eq!(occurrences(source, &mutation.removed), count, "{source}");
    }
}

/// In a tree of its own, with a `cargo` that never ends.
#[test]
#[ignore = "needs python3 and git: the gate asks for it"]
fn an_interrupt_ends_what_was_started_and_takes_the_copy_away() {
    let root = tempfile::tempdir().expect("a folder");
    let at = |name: &str| root.path().join(name);
    for folder in ["tests/mutations", "bin", "some"] {
        fs::create_dir_all(at(folder)).expect("a folder");
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("mutations/run");
    fs::copy(script, at("tests/mutations/run")).expect("the script");
    fs::write(at("tests/mutations/mutations.txt"), "name\nsome/file.rs\n- a\n+ b\n")
        .expect("a list");
    fs::write(at("some/Cargo.toml"), "name = \"some\"\n").expect("a manifest");
    fs::write(at("some/file.rs"), "a\n").expect("a file");
    let endless =
        "#!/bin/sh\nsleep 600 &\necho $$ $! > \"$PIDS.new\"\nmv \"$PIDS.new\" \"$PIDS\"\nwait\n";
    fs::write(at("bin/cargo"), endless).expect("a program");
    fs::set_permissions(at("bin/cargo"), fs::Permissions::from_mode(0o755)).expect("a program");
    let git = Command::new("git").args(["init", "--quiet"]).current_dir(root.path()).status();
    assert!(git.expect("git").success());
    let path = format!("{}:{}", at("bin").display(), std::env::var("PATH").expect("a path"));
    for (signal, status) in [("TERM", 143), ("INT", 130), ("HUP", 129)] {
        let mut run = Command::new("python3")
            .arg(at("tests/mutations/run"))
            .env("PATH", &path)
            .env("PIDS", at("pids"))
            .stdin(Stdio::null())
            .spawn()
            .expect("python3");
        while !at("pids").exists() {
            assert!(run.try_wait().expect("a child").is_none(), "it has ended by itself");
            thread::sleep(Duration::from_millis(10));
        }
        assert!(at("target/mutations/tree").exists());
        let pids = fs::read_to_string(at("pids")).expect("two numbers");
        fs::remove_file(at("pids")).expect("it was there");
        let kill = ["-s", signal, &run.id().to_string()].map(str::to_owned);
        assert!(Command::new("kill").args(kill).status().expect("kill").success());
        assert_eq!(run.wait().expect("a child").code(), Some(status), "SIG{signal}");
        assert!(!at("target/mutations/tree").exists(), "SIG{signal}");
        for pid in pids.split_whitespace() {
            let lives = || {
                let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
                stat.is_ok_and(|stat| !stat.contains(") Z "))
            };
            // Who was killed may still be on its way out.
            for _ in 0..1000 {
                if !lives() {
                    break;
                }
                thread::sleep(Duration::from_millis(10));
            }
            assert!(!lives(), "{pid} lives on after SIG{signal}");
        }
    }
}

fn read(list: &str) -> Vec<Mutation> {
    let mut blocks = vec![vec![]];
    for line in list.lines() {
        match line.trim() {
            "" => blocks.push(vec![]),
            _ if line.starts_with('#') => {}
            _ => blocks.last_mut().expect("one at least").push(line),
        }
    }
    let entries = blocks.iter().filter(|block| !block.is_empty()).map(|block| {
        let [name, file, change @ ..] = &block[..] else { panic!("a name and a file: {block:?}") };
        let part = |sign| {
            let lines = change.iter().filter_map(|line| line.strip_prefix(sign));
            lines.collect::<Vec<_>>().join("\n")
        };
        let [removed, added] = ['-', '+'].map(part);
        assert!(change.iter().all(|line| line.starts_with(['-', '+'])), "{name}: {change:?}");
        Mutation { name: (*name).into(), file: (*file).into(), removed, added }
    });
    entries.collect()
}

fn occurrences(source: &str, text: &str) -> usize {
    let text = single_spaced(text);
    assert!(!text.is_empty(), "an entry replaces something");
    single_spaced(source).matches(&text).count()
}

fn single_spaced(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
