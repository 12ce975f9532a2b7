//! `docs/requirements.md`, the table of requirements: made from the names of tests, and never stale.
//!
//! `UPDATE=1 cargo test -p quic --test requirements` writes it.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// What stands above the table.
const HEAD: &str = "\
<!-- Generated: edit quic/tests/requirements.txt and run
     UPDATE=1 cargo test -p quic --test requirements -->

# Requirements of the RFCs

The numbered requirements of QUIC, HTTP/3 and QUIC-LB that concern this workspace, with the tests that prove them; M stands for
must, S for should, m for may. Proofs are found by name: a test called `req_a01_…` proves A01. Only functions that `cargo test`
runs count. A row without a proof says *later*, when its part does not exist yet, or **open**, when it lacks something.

";

/// Where tests are.
const CRATES: [&str; 5] = ["quic", "config", "lb", "backend-sim", "tests"];
/// Folders in which `cargo test` runs no tests.
const WITHOUT_TESTS: [&str; 5] = ["target", "bench", "benches", "fuzz", "examples"];

#[test]
fn the_table_of_requirements_is_what_the_tests_prove() {
    let table = format!("{HEAD}{}", table(&requirements(), &tests()));
    let path = workspace().join("docs/requirements.md");
    if fs::read_to_string(&path).is_ok_and(|old| old == table) {
        return;
    }
    assert!(
        std::env::var_os("UPDATE").is_some(),
        "docs/requirements.md is stale; run: UPDATE=1 cargo test -p quic --test requirements"
    );
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, table).unwrap();
}

#[test]
fn every_must_is_proved_or_says_why_not_and_every_proof_has_its_requirement() {
    let (requirements, tests) = (requirements(), tests());
    let mut bare = vec![];
    let mut known = BTreeSet::new();
    for requirement in &requirements {
        assert!(known.insert(&requirement.id), "{} stands twice", requirement.id);
        let excused = matches!(requirement.note, Note::Later(_) | Note::Open(_));
        if !excused && requirement.proofs(&tests).is_empty() {
            bare.push(&requirement.id);
        }
        if let Note::Also(names) = &requirement.note {
            for name in names {
                assert!(tests.names.contains(name), "{}: no test {name}", requirement.id);
            }
        }
    }
    assert!(bare.is_empty(), "no test proves {bare:?}");
    for id in tests.by_id.keys() {
        assert!(known.contains(id), "tests prove {id}, which nobody required");
    }
}

#[test]
fn only_functions_that_are_run_as_tests_count() {
    // The bars keep these lines out of the count of this file.
    let source = r#"
        |fn helper() {}
        |// #[test]
        |fn comment() {}
        |#[test]
        |fn plain() {}
        |#[tokio::test(
        |    flavor = "multi_thread",
        |)]
        |#[expect(clippy::unwrap_used, reason = "]")]
        |async fn asynchronous() {}
        |#[test]
        |#[ignore = "needs a moon"]
        |fn ignored() {}
        |#[cfg(test)]
        |pub(crate) const fn another_helper() {}
        |macro_rules! stories {
        |    ($($name:ident: $count:literal,)*) => { $(#[test] fn $name() { story($count); })* };
        |}
        |stories! {
        |    by_macro: 5,
        |    another_by_macro: 5,
        |}
        |others! {
        |    no_test: 5,
        |}
    "#;
    let source = source.replace("        |", "");
    let found = |ignored_too| Vec::from_iter(tests_of(&source, ignored_too));
    assert_eq!(found(false), ["another_by_macro", "asynchronous", "by_macro", "plain"]);
    assert_eq!(found(true), ["another_by_macro", "asynchronous", "by_macro", "ignored", "plain"]);
    assert_eq!(ids("req_a01_af2_g5_names").collect::<Vec<_>>(), ["A01", "AF2"]);
    let gate =
        "cargo test -p x \\\n  --test one -- --ignored\ncargo test --test two -- --nocapture";
    assert!(asks_for(gate, "one") && !asks_for(gate, "two") && !asks_for(gate, "on"));
}

struct Requirement {
    id: String,
    level: String,
    title: String,
    note: Note,
}

enum Note {
    None,
    Also(Vec<String>),
    Later(String),
    Open(String),
}

impl Requirement {
    /// The tests that prove it.
    fn proofs(&self, tests: &Tests) -> BTreeSet<String> {
        let mut proofs = tests.by_id.get(&self.id).cloned().unwrap_or_default();
        if let Note::Also(names) = &self.note {
            proofs.extend(names.iter().cloned());
        }
        proofs
    }
}

/// The lines of `requirements.txt`.
fn requirements() -> Vec<Requirement> {
    let lines = include_str!("requirements.txt").lines();
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    let parsed = lines.map(|line| {
        let fields: Vec<_> = line.splitn(4, '|').map(str::trim).collect();
        let [id, level, title, note] = fields[..] else { panic!("four fields: {line}") };
        let note = match note.split_once(':') {
            None => Note::None,
            Some(("also", names)) => Note::Also(names.split_whitespace().map(Into::into).collect()),
            Some(("later", why)) => Note::Later(why.trim().into()),
            Some(("open", why)) => Note::Open(why.trim().into()),
            Some((other, _)) => panic!("{other}: {line}"),
        };
        Requirement { id: id.into(), level: level.into(), title: title.into(), note }
    });
    parsed.collect()
}

/// What the sources of all crates test.
struct Tests {
    names: BTreeSet<String>,
    by_id: BTreeMap<String, BTreeSet<String>>,
}

fn tests() -> Tests {
    let gate = fs::read_to_string(workspace().join(".ci/run")).unwrap();
    let mut tests = Tests { names: BTreeSet::new(), by_id: BTreeMap::new() };
    for name in CRATES {
        for file in sources(&workspace().join(name)) {
            let asked_for = asks_for(&gate, file.file_stem().unwrap().to_str().unwrap());
            for name in tests_of(&fs::read_to_string(&file).unwrap(), asked_for) {
                for id in ids(&name) {
                    tests.by_id.entry(id).or_default().insert(name.clone());
                }
                tests.names.insert(name);
            }
        }
    }
    tests
}

/// Whether the gate runs the ignored tests of this file of integration tests.
fn asks_for(gate: &str, file: &str) -> bool {
    gate.replace("\\\n", " ").lines().any(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        let named = words.windows(2).any(|pair| pair == ["--test", file]);
        named && words.iter().any(|word| ["--ignored", "--include-ignored"].contains(word))
    })
}

/// The functions in a source that `cargo test` runs: those whose attributes say so, and those that a
/// macro of the same source makes. Ignored ones count if `ignored_too`.
fn tests_of(source: &str, ignored_too: bool) -> BTreeSet<String> {
    let mut tests = tests_by_macro(source);
    let mut attributes = String::new();
    let mut lines = source.lines().map(str::trim);
    while let Some(line) = lines.next() {
        if line.starts_with("#[") {
            attributes.push_str(line);
            // An attribute ends with its line, the first or a later one.
            while !attributes.ends_with(']') {
                attributes.push_str(lines.next().unwrap_or("]"));
            }
            continue;
        }
        let is_test = ["#[test]", "#[tokio::test"].iter().any(|test| attributes.contains(test));
        if is_test && (ignored_too || !attributes.contains("#[ignore")) {
            let (_, name) = line.split_once("fn ").unwrap_or_else(|| panic!("no test: {line}"));
            tests.insert(identifier(name).to_owned());
        }
        attributes.clear();
    }
    tests
}

/// The tests that a macro of this source makes of a list `name: …,` with a name in each line.
fn tests_by_macro(source: &str) -> BTreeSet<String> {
    let mut tests = BTreeSet::new();
    for definition in source.split("macro_rules! ").skip(1) {
        let (body, rest) = definition.split_once("\n}").unwrap_or((definition, ""));
        let call = format!("\n{}! {{\n", identifier(definition));
        if !body.contains("#[test] fn $name()") {
            continue;
        }
        for list in rest.split(&call).skip(1) {
            let lines = list.lines().take_while(|line| *line != "}");
            tests.extend(lines.map(|line| identifier(line.trim()).to_owned()));
        }
    }
    tests
}

/// The identifier that `text` begins with.
fn identifier(text: &str) -> &str {
    let end = text.find(|c: char| c != '_' && !c.is_ascii_alphanumeric());
    &text[..end.unwrap_or(text.len())]
}

/// The numbers in the name of a test: `req_a01_b02_…` has A01 and B02, `req_af1_…` has AF1.
fn ids(name: &str) -> impl Iterator<Item = String> {
    let words = name.strip_prefix("req_").unwrap_or_default().split('_');
    let is_id = |word: &&str| match word.as_bytes() {
        [b'a', b'f', digit] => digit.is_ascii_digit(),
        [section, digits @ ..] => {
            section.is_ascii_lowercase()
                && digits.len() == 2
                && digits.iter().all(u8::is_ascii_digit)
        }
        [] => false,
    };
    words.take_while(is_id).map(str::to_ascii_uppercase)
}

/// The Rust files below `folder` that `cargo test` may run.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files = vec![];
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() && !WITHOUT_TESTS.contains(&name) {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

fn table(requirements: &[Requirement], tests: &Tests) -> String {
    let mut out = String::from("| | | requirement | proof |\n| --- | --- | --- | --- |\n");
    for requirement in requirements {
        let proofs = requirement.proofs(tests);
        let mut cells: Vec<_> = proofs.iter().map(|name| format!("`{name}`")).collect();
        match &requirement.note {
            Note::Later(why) => cells.push(format!("*later*: {why}")),
            Note::Open(why) => cells.push(format!("**open**: {why}")),
            Note::None | Note::Also(_) => {}
        }
        let Requirement { id, level, title, .. } = requirement;
        out.push_str(&format!("| {id} | {level} | {title} | {} |\n", cells.join(", ")));
    }
    out
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}
