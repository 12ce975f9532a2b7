//! The list of mutations stays true: each still finds the text that it takes the place of, exactly
//! once. Whether the tests notice them is asked by `tests/mutations/run`, which takes its time.

use std::{collections::BTreeSet, fs, path::Path};

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
