//! The structure of the sources: who imports whom, and how files are laid out.
//!
//! Each rule keeps a reader's way through the code short. Files that import each other can only be read
//! together (*circle*). A name that a file takes from a module above it, which itself has it from
//! elsewhere, ties the file to everything that stands there (*upward import*): names are imported from
//! where they are defined. A module with children is `x/mod.rs`, everywhere (*module style*).
//!
//! Tests, and what is compiled for tests alone, may import as they like.

#![expect(clippy::unwrap_used, reason = "a test")]

mod reader;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use reader::Import;

/// Folders of the crates whose sources are looked at, with the names under which they import themselves.
const CRATES: [(&str, &str); 4] = [
    ("quic", "quic"),
    ("config", "quic_lb_config"),
    ("lb", "quic_lb"),
    ("backend-sim", "backend_sim"),
];

/// Files by their path, with their text.
type Tree = BTreeMap<String, String>;

#[test]
fn no_file_imports_in_a_circle_or_through_a_module_above_it() {
    let mut offences = vec![];
    for (folder, name) in CRATES {
        let imports = reader::imports(&tree(folder), folder, name);
        assert!(imports.len() > 50, "{folder}: {} imports are too few to be all", imports.len());
        offences.extend(circles(&imports));
        offences.extend(upward_imports(&imports));
    }
    assert!(offences.is_empty(), "\n{}\n", offences.join("\n"));
}

#[test]
fn modules_with_children_are_all_of_one_style() {
    let folders = CRATES.iter().map(|(folder, _)| *folder).chain(["tests"]);
    let offences: Vec<_> = folders.flat_map(|folder| mixed_styles(&tree(folder))).collect();
    assert!(offences.is_empty(), "\n{}\n", offences.join("\n"));
}

// The rules.

/// Files that import each other in a loop, with what ties them.
///
/// A module is made of its parts, and they may use what it defines: where the face of a module and files of
/// its folder make a loop, what the face takes from them does not count. With a file outside of the folder
/// in the loop it does.
fn circles(imports: &[Import]) -> Vec<String> {
    let between = |files: &BTreeSet<&str>| {
        let inside = |import: &&Import| {
            import.from != import.to && files.contains(&*import.from) && files.contains(&*import.to)
        };
        imports.iter().filter(inside).collect::<Vec<_>>()
    };
    let all = imports.iter().flat_map(|import| [&*import.from, &*import.to]).collect();
    let (mut found, mut open) = (vec![], loops(&between(&all)));
    while let Some(files) = open.pop() {
        let mut ties = between(&files);
        if let Some(face) = files.iter().find(|face| is_face_of(face, &files)) {
            ties.retain(|import| import.from != **face);
            open.extend(loops(&ties));
        } else {
            found.push(describe(&ties));
        }
    }
    found.sort_unstable();
    found
}

/// Whether a file is the face of the module in whose folder all `files` are.
fn is_face_of(face: &str, files: &BTreeSet<&str>) -> bool {
    let (folder, name) = face.rsplit_once('/').unwrap();
    let is_inside = |file: &&str| Path::new(file).starts_with(folder);
    ["lib.rs", "main.rs", "mod.rs"].contains(&name) && files.iter().all(is_inside)
}

/// The largest sets of files in which each leads to each.
fn loops<'a>(imports: &[&'a Import]) -> Vec<BTreeSet<&'a str>> {
    let mut arrows: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for import in imports {
        arrows.entry(&import.from).or_default().insert(&import.to);
    }
    let reached: BTreeMap<_, _> =
        arrows.keys().map(|file| (*file, reachable(&arrows, file))).collect();
    let mut loops = BTreeSet::new();
    for (file, files) in reached.iter().filter(|(file, files)| files.contains(*file)) {
        let back = |other: &&&str| reached.get(**other).is_some_and(|files| files.contains(file));
        loops.insert(files.iter().filter(back).copied().collect());
    }
    loops.into_iter().collect()
}

/// All that can be reached from `file`, which is among them only if a loop leads back.
fn reachable<'a>(
    arrows: &BTreeMap<&'a str, BTreeSet<&'a str>>,
    file: &'a str,
) -> BTreeSet<&'a str> {
    let (mut reached, mut open) = (BTreeSet::new(), vec![file]);
    while let Some(file) = open.pop() {
        for next in arrows.get(file).into_iter().flatten() {
            if reached.insert(*next) {
                open.push(next);
            }
        }
    }
    reached
}

fn describe(ties: &[&Import]) -> String {
    let mut names: BTreeMap<(&str, &str), BTreeSet<&str>> = BTreeMap::new();
    for Import { from, to, name, .. } in ties {
        names.entry((from, to)).or_default().insert(name);
    }
    let files: BTreeSet<_> = names.keys().map(|(from, _)| from).collect();
    let mut out = format!("circle of {} files:", files.len());
    for ((from, to), names) in &names {
        let names: Vec<_> = names.iter().copied().collect();
        out.push_str(&format!("\n    {from} takes {} from {to}", names.join(", ")));
    }
    out
}

/// Names that a file takes from a module above it, but which are defined elsewhere.
fn upward_imports(imports: &[Import]) -> BTreeSet<String> {
    let upward = imports.iter().filter_map(|Import { from, to, name, through }| {
        let face = through.as_deref()?;
        Some(format!("upward import: {from} takes {name} through {face}; it is defined in {to}"))
    });
    upward.collect()
}

/// Modules `x.rs` beside a folder `x`.
fn mixed_styles(tree: &Tree) -> Vec<String> {
    let folders: BTreeSet<_> =
        tree.keys().flat_map(|file| Path::new(file).ancestors().skip(1)).collect();
    let beside =
        tree.keys().filter(|file| folders.contains(Path::new(file).with_extension("").as_path()));
    beside
        .map(|file| format!("module style: {file} has a folder beside it; move it to mod.rs there"))
        .collect()
}

/// The sources of a crate of this workspace.
fn tree(folder: &str) -> Tree {
    fn read(root: &Path, folder: &Path, tree: &mut Tree) {
        for entry in fs::read_dir(root.join(folder)).unwrap() {
            let name = folder.join(entry.unwrap().file_name());
            if root.join(&name).is_dir() {
                read(root, &name, tree);
            } else if name.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(root.join(&name)).unwrap();
                tree.insert(name.to_str().unwrap().to_owned(), text);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut tree = Tree::new();
    let sources = Path::new(folder).join("src");
    read(&root, &sources, &mut tree);
    let tests = Path::new(folder).join("tests");
    if root.join(&tests).is_dir() {
        read(&root, &tests, &mut tree);
    }
    tree
}

// The rules and the reader, each on a tree that breaks it.

#[test]
fn a_circle_is_found_with_what_ties_it() {
    let found = offences(&[
        ("lib.rs", "mod a; mod b; mod c;"),
        ("a.rs", "use crate::b::B; pub struct A(B);"),
        ("b.rs", "use crate::c; pub struct B(c::C);"),
        ("c.rs", "pub struct C(Box<super::a::A>);"),
    ]);
    assert_eq!(
        found,
        [
            "circle of 3 files:\n    x/src/a.rs takes B from x/src/b.rs\n    x/src/b.rs takes C from \
          x/src/c.rs\n    x/src/c.rs takes A from x/src/a.rs"
        ]
    );
}

#[test]
fn two_files_that_stand_outside_of_a_circle_are_no_part_of_it() {
    let found = offences(&[
        ("lib.rs", "mod a; mod b; mod above; mod below;"),
        ("above.rs", "use crate::a::A;"),
        ("a.rs", "use crate::{b::B, below::Below}; pub struct A;"),
        ("b.rs", "use crate::{a::A, below::Below}; pub struct B;"),
        ("below.rs", "pub struct Below;"),
    ]);
    assert_eq!(found.len(), 1);
    assert!(found[0].starts_with("circle of 2 files:") && !found[0].contains("elow"), "{found:?}");
}

#[test]
fn a_module_and_its_parts_are_no_circle_but_they_can_be_part_of_one() {
    let files = |part: &'static str| {
        offences(&[
            ("lib.rs", "mod room; mod other; pub use room::Room;"),
            ("room/mod.rs", "mod part; mod inner; pub struct Room(part::Part); pub struct Size;"),
            ("room/part.rs", part),
            ("room/inner/mod.rs", "mod deep; use deep::Deep; pub struct Inner(Deep);"),
            ("room/inner/deep.rs", "pub struct Deep(super::super::Size, super::Inner);"),
            ("other.rs", "use crate::room::Room; pub struct Other;"),
        ])
    };
    let nothing: [&str; 0] = [];
    assert_eq!(files("pub struct Part(super::Size, super::inner::Inner);"), nothing);
    let found = files("pub struct Part(super::Size, crate::other::Other);");
    assert_eq!(found.len(), 1);
    assert!(found[0].starts_with("circle of 3 files:"), "{found:?}");
}

#[test]
fn a_name_taken_from_a_module_above_that_has_it_from_elsewhere_is_found() {
    let files = |import: &'static str| {
        offences(&[
            ("lib.rs", "mod room; mod other; pub use room::deep::Thing as Renamed;"),
            ("other.rs", "pub struct Other;"),
            ("room/mod.rs", "mod deep; mod user; pub use deep::Thing; use crate::other::Other;"),
            ("room/deep.rs", "pub struct Thing;"),
            ("room/user.rs", import),
        ])
    };
    let thing = |face: &str| {
        let to = "it is defined in x/src/room/deep.rs";
        vec![format!("upward import: x/src/room/user.rs takes Thing through x/src/{face}; {to}")]
    };
    assert_eq!(files("use super::Thing;"), thing("room/mod.rs"));
    assert_eq!(files("use crate::{room::{Thing}};"), thing("room/mod.rs"));
    assert_eq!(files("use crate::Renamed;"), thing("lib.rs"));
    assert_eq!(files("use super::*; struct User(Thing);"), thing("room/mod.rs"));
    assert_eq!(files("fn user() { super::Thing::new() }"), thing("room/mod.rs"));
    assert_eq!(
        files("fn user() { assert!(true, \"{}\", super::Thing::NAME) }"),
        thing("room/mod.rs")
    );
    assert_eq!(files("use crate::room; fn user() { room::Thing::new() }"), thing("room/mod.rs"));
    assert_eq!(files("pub struct User<T: Into<super::Thing>>(T);"), thing("room/mod.rs"));
    assert_eq!(
        files("use super::Other;")[0].split(';').next().unwrap(),
        "upward import: x/src/room/user.rs takes Other through x/src/room/mod.rs"
    );
    // Where it is defined, and through a face that is not above the file.
    let nothing: [&str; 0] = [];
    assert_eq!(files("use super::deep::Thing;"), nothing);
    assert_eq!(
        files("use crate::other::Other; use super::deep; fn user() -> deep::Thing {}"),
        nothing
    );
}

#[test]
fn a_face_that_is_not_above_a_file_hands_names_on() {
    let tree = [
        ("lib.rs", "mod room; mod user;"),
        ("user.rs", "use crate::room::Thing;"),
        ("room/mod.rs", "mod deep; pub use deep::Thing;"),
        ("room/deep.rs", "pub struct Thing;"),
    ];
    assert!(offences(&tree).is_empty());
    let imports = reader::imports(&made_up(&tree), "x", "x");
    let of_user: Vec<_> = imports.iter().filter(|import| import.from == "x/src/user.rs").collect();
    assert_eq!(of_user.len(), 1);
    assert_eq!(of_user[0].to, "x/src/room/deep.rs");
}

#[test]
fn tests_may_import_as_they_like() {
    let found = offences(&[
        ("lib.rs", "mod a; mod b; #[cfg(test)] mod fixtures;"),
        ("a.rs", "use crate::b::B; pub struct A; #[cfg(test)] mod tests { use super::*; }"),
        (
            "b.rs",
            "#[cfg(test)] use crate::a::A; pub struct B; impl B { #[cfg(test)] fn b(_: crate::a::A) {} }
             #[cfg(all(test, unix))] mod tests { use crate::a::A; } #[test] fn t() { crate::a::A; }",
        ),
        ("fixtures.rs", "use crate::a::A;"),
    ]);
    let nothing: [&str; 0] = [];
    assert_eq!(found, nothing);
}

#[test]
fn what_is_left_out_of_tests_is_read() {
    let found = offences(&[
        ("lib.rs", "mod a; mod b;"),
        ("a.rs", "#[cfg(not(test))] use crate::b::B; pub struct A;"),
        ("b.rs", "use crate::a::A; pub struct B;"),
    ]);
    assert_eq!(found.len(), 1);
}

#[test]
fn a_program_imports_its_library_by_name() {
    let imports = reader::imports(
        &made_up(&[
            ("lib.rs", "mod a; pub use a::run;"),
            ("a.rs", "pub fn run() {}"),
            ("main.rs", "fn main() { x::run() }"),
        ]),
        "x",
        "x",
    );
    assert!(
        imports.iter().any(|import| import.from == "x/src/main.rs" && import.to == "x/src/a.rs")
    );
}

#[test]
fn a_module_beside_its_folder_is_found() {
    let found =
        mixed_styles(&made_up(&[("a.rs", ""), ("a/b.rs", ""), ("c/mod.rs", ""), ("d.rs", "")]));
    assert_eq!(found, ["module style: x/src/a.rs has a folder beside it; move it to mod.rs there"]);
}

fn offences(files: &[(&str, &str)]) -> Vec<String> {
    let imports = reader::imports(&made_up(files), "x", "x");
    circles(&imports).into_iter().chain(upward_imports(&imports)).collect()
}

fn made_up(files: &[(&str, &str)]) -> Tree {
    files.iter().map(|(file, text)| (format!("x/src/{file}"), (*text).to_owned())).collect()
}
