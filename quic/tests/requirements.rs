//! The table of requirements in SPECIFICATION.md: made from the names of tests, and never stale.
//!
//! `UPDATE=1 cargo test -p quic --test requirements` writes it.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

const BEGIN: &str =
    "<!-- requirements: made by `UPDATE=1 cargo test -p quic --test requirements` -->";
const END: &str = "<!-- requirements: end -->";
/// Where tests are.
const CRATES: [&str; 5] = ["quic", "config", "lb", "backend-sim", "tests"];

#[test]
fn the_table_of_requirements_is_what_the_tests_prove() {
    let table = table(&requirements(), &tests());
    let path = workspace().join("SPECIFICATION.md");
    let document = fs::read_to_string(&path).unwrap();
    let (before, rest) = document.split_once(BEGIN).unwrap();
    let (old, after) = rest.split_once(END).unwrap();
    if old == table {
        return;
    }
    assert!(
        std::env::var_os("UPDATE").is_some(),
        "SPECIFICATION.md is stale; run: UPDATE=1 cargo test -p quic --test requirements"
    );
    fs::write(path, [before, BEGIN, &table, END, after].concat()).unwrap();
}

#[test]
fn every_must_is_proved_or_says_why_not_and_every_proof_has_its_requirement() {
    let (requirements, tests) = (requirements(), tests());
    let mut bare = vec![];
    for requirement in &requirements {
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
    let known: BTreeSet<_> = requirements.iter().map(|requirement| &requirement.id).collect();
    let sections: BTreeSet<_> = known.iter().map(|id| &id[..1]).collect();
    for id in tests.by_id.keys().filter(|id| sections.contains(&id[..1])) {
        assert!(known.contains(id), "tests prove {id}, which nobody required");
    }
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
    let mut tests = Tests { names: BTreeSet::new(), by_id: BTreeMap::new() };
    for name in CRATES {
        for file in sources(&workspace().join(name)) {
            let text = fs::read_to_string(file).unwrap();
            for (_, rest) in text.match_indices("fn ").map(|(at, _)| text.split_at(at + 3)) {
                let end = rest.find(|c: char| c != '_' && !c.is_ascii_alphanumeric());
                let name = &rest[..end.unwrap_or(rest.len())];
                tests.names.insert(name.to_owned());
                for id in ids(name) {
                    tests.by_id.entry(id).or_default().insert(name.to_owned());
                }
            }
        }
    }
    tests
}

/// The numbers in the name of a test: `req_a01_b02_…` has A01 and B02.
fn ids(name: &str) -> impl Iterator<Item = String> {
    let words = name.strip_prefix("req_").unwrap_or_default().split('_');
    let is_id = |word: &&str| {
        let [section, digits @ ..] = word.as_bytes() else { return false };
        section.is_ascii_lowercase() && digits.len() == 2 && digits.iter().all(u8::is_ascii_digit)
    };
    words.take_while(is_id).map(str::to_ascii_uppercase)
}

/// The Rust files below `folder`, build output left out.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files = vec![];
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

fn table(requirements: &[Requirement], tests: &Tests) -> String {
    let mut out = String::from("\n\n| | | requirement | proof |\n| --- | --- | --- | --- |\n");
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
    out.push('\n');
    out
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}
