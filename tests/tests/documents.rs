//! The documents speak of what exists: links lead somewhere, named files are there, and what is named
//! as a proof is a test, a benchmark, a fuzz target or a suite.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// A size that can be read in one go.
const MAX_SPECIFICATION: usize = 20 * 1024;

#[test]
fn links_of_documents_lead_somewhere() {
    let mut broken = vec![];
    for document in documents() {
        let text = read(&document);
        for link in links(&text).filter(|link| !link.contains("://")) {
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => document.clone(),
                file => {
                    Path::new(&document).parent().unwrap().join(file).to_str().unwrap().to_owned()
                }
            };
            let leads = root().join(&target).exists()
                && (heading.is_empty() || headings(&read(&target)).contains(heading));
            if !leads {
                broken.push(format!("{document}: {link}"));
            }
        }
    }
    assert_eq!(broken, [""; 0]);
}

#[test]
fn files_that_documents_name_are_there() {
    let mut missing = vec![];
    let mut files = 0;
    for document in documents() {
        for name in spans(&read(&document)).filter_map(path_in) {
            files += 1;
            if is_missing(name, &document) {
                missing.push(format!("{document}: {name}"));
            }
        }
    }
    assert_eq!(missing, [""; 0]);
    assert!(files > 50, "{files} files are too few to be all");
}

#[test]
fn proofs_exist() {
    let known = &KNOWN;
    let mut missing = vec![];
    let mut proofs = 0;
    for document in documents() {
        for cell in proof_cells(&read(&document)) {
            for proof in spans(cell) {
                proofs += 1;
                if !known.has(proof) {
                    missing.push(format!("{document}: {proof}"));
                }
            }
        }
    }
    assert_eq!(missing, [""; 0]);
    assert!(proofs > 100, "{proofs} proofs are too few to be all");
}

#[test]
fn every_promise_names_its_proof() {
    let text = read("SPECIFICATION.md");
    let promises: Vec<_> = rows(&text).filter(|row| row.header == "promise").collect();
    assert!(promises.len() > 50, "{} promises are too few to be all", promises.len());
    for row in promises {
        assert!(spans(row.last).next().is_some(), "no proof: {}", row.first);
    }
    assert!(text.len() <= MAX_SPECIFICATION, "SPECIFICATION.md has {} bytes", text.len());
}

#[test]
fn the_changelog_tells_of_this_version() {
    let text = read("CHANGELOG.md");
    let start = format!("## [{}] - ", env!("CARGO_PKG_VERSION"));
    let date = text.lines().find_map(|line| line.strip_prefix(&*start)).expect("a section of it");
    let shape: String = date.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    assert_eq!(shape, "0000-00-00");
}

/// The documents for people, from the root of the workspace.
fn documents() -> Vec<String> {
    let fixed =
        ["README.md", "ARCHITECTURE.md", "SPECIFICATION.md", "CONTRIBUTING.md", "CHANGELOG.md"];
    let mut documents: Vec<_> = fixed.into_iter().map(str::to_owned).collect();
    documents.extend(["SECURITY.md", "deploy/README.md", "tests/README.md"].map(str::to_owned));
    for entry in fs::read_dir(root().join("docs")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        documents.extend(name.ends_with(".md").then(|| format!("docs/{name}")));
    }
    documents
}

static KNOWN: LazyLock<Known> = LazyLock::new(Known::of_this_workspace);

/// What can be named as a proof.
struct Known {
    tests: BTreeSet<String>,
    fuzz_targets: BTreeSet<String>,
    scenarios: String,
}

impl Known {
    fn of_this_workspace() -> Self {
        let mut tests = BTreeSet::new();
        for folder in ["quic", "config", "lb", "backend-sim", "tests"] {
            for file in rust_files(&root().join(folder)) {
                let text = fs::read_to_string(&file).unwrap();
                tests.extend(tests_in(&text).unwrap_or_else(|| panic!("{}", file.display())));
            }
        }
        assert!(tests.len() > 500, "{} tests are too few to be all", tests.len());
        let targets = rust_files(&root().join("tests/fuzz/fuzz_targets"));
        let name = |file: &PathBuf| file.file_stem().unwrap().to_str().unwrap().to_owned();
        Self {
            tests,
            fuzz_targets: targets.iter().map(name).collect(),
            scenarios: read("tests/netns/suite.py"),
        }
    }

    fn has(&self, proof: &str) -> bool {
        let is_word = |c: char| c == '_' || c.is_ascii_alphanumeric();
        if let Some(command) = proof.strip_prefix("cargo bench -p ") {
            let words: Vec<_> = command.split(' ').collect();
            let [package, "--bench", name, ..] = words[..] else { return false };
            let folder = if package == "quic-lb-tests" { "tests" } else { package };
            let manifest = read(&format!("{folder}/Cargo.toml"));
            manifest.contains(&format!("[[bench]]\nname = \"{name}\"\n"))
        } else if let Some(start) = proof.strip_suffix('*') {
            self.tests.iter().any(|test| test.starts_with(start))
        } else if proof.chars().all(is_word) {
            self.tests.contains(proof) || self.fuzz_targets.contains(proof)
        } else if path_in(proof).is_some() {
            root().join(proof).exists()
        } else {
            self.scenarios.contains(proof)
        }
    }
}

/// The names of the tests in a source file: functions with an attribute that ends in `test`, wherever they
/// stand, and what macros make tests of.
fn tests_in(text: &str) -> Option<BTreeSet<String>> {
    let mut found = Found::default();
    found.look_at(text.parse().ok()?);
    let Found { mut tests, makers, invocations } = found;
    for (name, tokens) in invocations.into_iter().filter(|(name, _)| makers.contains(name)) {
        let tokens: Vec<_> = tokens.into_iter().map(|token| token.to_string()).collect();
        let named = tokens.windows(2).filter(|pair| pair[1] == ":").map(|pair| pair[0].clone());
        tests.extend(named.filter(|test| *test != name));
    }
    Some(tests)
}

#[derive(Default)]
struct Found {
    tests: BTreeSet<String>,
    /// Macros whose expansion has tests that are named by what they are given.
    makers: BTreeSet<String>,
    invocations: Vec<(String, TokenStream)>,
}

impl Found {
    fn look_at(&mut self, tokens: TokenStream) {
        let tokens: Vec<_> = tokens.into_iter().collect();
        let mut is_test = false;
        for (at, token) in tokens.iter().enumerate() {
            let word = |offset: usize| {
                tokens.get(at + offset).map(ToString::to_string).unwrap_or_default()
            };
            match token {
                TokenTree::Punct(punct) if punct.as_char() == ';' => is_test = false,
                TokenTree::Punct(punct) if punct.as_char() == '#' => {
                    if let Some(TokenTree::Group(attribute)) = tokens.get(at + 1) {
                        is_test |= is_test_attribute(attribute.stream());
                    }
                }
                TokenTree::Ident(ident) if ident == "fn" && is_test => {
                    // In a macro's definition it may be a variable.
                    self.tests.extend(Some(word(1)).filter(|name| name != "$"));
                    is_test = false;
                }
                TokenTree::Ident(ident) if word(1) == "!" => {
                    let is_definition = ident == "macro_rules";
                    if let Some(TokenTree::Group(group)) =
                        tokens.get(at + 2 + usize::from(is_definition))
                    {
                        let body = group.stream();
                        if is_definition && makes_tests(&body.to_string()) {
                            self.makers.insert(word(2));
                        } else if !is_definition {
                            self.invocations.push((ident.to_string(), body));
                        }
                    }
                }
                TokenTree::Group(group) => {
                    self.look_at(group.stream());
                    is_test &= group.delimiter() != Delimiter::Brace;
                }
                _ => {}
            }
        }
    }
}

fn is_test_attribute(tokens: TokenStream) -> bool {
    let path = tokens.into_iter().take_while(|token| !matches!(token, TokenTree::Group(_)));
    path.last().is_some_and(|last| last.to_string() == "test")
}

fn makes_tests(body: &str) -> bool {
    let squeezed: String = body.split_whitespace().collect();
    squeezed.contains("#[test]fn$")
}

/// A row of a table.
struct Row<'a> {
    /// What the first column is called.
    header: &'a str,
    first: &'a str,
    last: &'a str,
    /// What the last column is called.
    last_header: &'a str,
}

fn rows(text: &str) -> impl Iterator<Item = Row<'_>> {
    let mut headers = None;
    text.lines().filter_map(move |line| {
        let Some(inner) = line.strip_prefix('|') else {
            headers = None;
            return None;
        };
        let mut cells = inner.trim_end().trim_end_matches('|').split('|').map(str::trim);
        let (first, last) = (cells.clone().next()?, cells.next_back()?);
        let Some((header, last_header)) = headers else {
            headers = Some((first, last));
            return None;
        };
        let is_rule = first.chars().all(|c| "-: ".contains(c)) && !first.is_empty();
        (!is_rule).then_some(Row { header, first, last, last_header })
    })
}

fn proof_cells(text: &str) -> impl Iterator<Item = &str> {
    rows(text).filter(|row| row.last_header == "proof").map(|row| row.last)
}

/// What stands between backquotes, blocks of code apart.
fn spans(text: &str) -> impl Iterator<Item = &str> {
    prose(text).flat_map(|line| line.split('`').skip(1).step_by(2))
}

/// The targets of links.
fn links(text: &str) -> impl Iterator<Item = &str> {
    prose(text).flat_map(|line| line.split("](").skip(1)).filter_map(|rest| rest.split(')').next())
}

/// The lines that are no block of code.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    text.split("```").step_by(2).flat_map(str::lines)
}

/// The anchors of a document's headings.
fn headings(text: &str) -> BTreeSet<String> {
    let titles = prose(text).filter(|line| line.starts_with('#'));
    let anchor = |line: &str| {
        let kept = |c: &char| c.is_alphanumeric() || " -_".contains(*c);
        line.trim_start_matches('#').trim().to_lowercase().chars().filter(kept).collect::<String>()
    };
    titles.map(|line| anchor(line).replace(' ', "-")).collect()
}

/// A span that is the path of a file or folder, and nothing else.
fn path_in(span: &str) -> Option<&str> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || "_-./".contains(c);
    let is_path = span.contains('/') && span.chars().all(is_part) && !span.starts_with('/');
    is_path.then_some(span)
}

/// Whether a path that a document names is not there, seen from the root or from the document's folder. A path
/// that begins with no folder of ours is somebody else's, and what is built is not there yet.
fn is_missing(path: &str, document: &str) -> bool {
    let document = root().join(document);
    let first = path.split('/').next().unwrap_or_default();
    let bases = [&root(), document.parent().unwrap()];
    let is_ours = |base: &&Path| first != "target" && base.join(first).is_dir();
    let mut ours = bases.into_iter().filter(is_ours).peekable();
    ours.peek().is_some() && !ours.any(|base| base.join(path).exists())
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = vec![];
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

fn read(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

// The reader, on texts that have what it has to find.

#[test]
fn tests_are_told_from_other_functions() {
    let text = r#"
        #[test] #[should_panic] fn plain() { inner(); fn inner() {} }
        #[tokio::test(flavor = "multi_thread")] async fn with_tokio() {}
        fn helper() {}
        proptest! { #[test] fn of_values(x in 0..9) {} }
        #[cfg(test)] mod tests { use x; fn helper_of_tests() {} #[test] #[ignore = "why"] fn ignored() {} }
        macro_rules! cases { ($($name:ident: $seeds:literal,)*) => { $(#[test] fn $name() {})* }; }
        cases! { transfer: 5, loss: 5, }
        vec_of! { no_test: 5 }
    "#;
    let found = tests_in(text).unwrap();
    let expected = ["ignored", "loss", "of_values", "plain", "transfer", "with_tokio"];
    assert!(found.iter().eq(expected), "{found:?}");
}

#[test]
fn rows_links_spans_and_headings_are_found() {
    let text = "# A, b\n\n| promise | proof |\n| --- | --- |\n| one `x` | `a`, `b*` |\n\n[to](c.md#d)\n\
                ```sh\n`no` [no](no.md)\n```\n`quic/src/lib.rs` | `x y`\n";
    assert_eq!(proof_cells(text).flat_map(spans).collect::<Vec<_>>(), ["a", "b*"]);
    assert_eq!(links(text).collect::<Vec<_>>(), ["c.md#d"]);
    assert_eq!(headings(text), BTreeSet::from(["a-b".to_owned()]));
    assert_eq!(spans(text).filter_map(path_in).collect::<Vec<_>>(), ["quic/src/lib.rs"]);
}

#[test]
fn paths_are_looked_for_from_the_root_and_from_the_document() {
    for (path, document) in [
        ("quic/src/lib.rs", "README.md"),
        ("quic/src/", "README.md"),
        ("quic/src/lib.rs", "tests/README.md"),
        ("src/lib.rs", "tests/README.md"),
        ("usr/bin/quic-lb", "README.md"),
    ] {
        assert!(!is_missing(path, document), "{document}: {path}");
    }
    for (path, document) in [("quic/src/gone.rs", "README.md"), ("src/gone.rs", "tests/README.md")]
    {
        assert!(is_missing(path, document), "{document}: {path}");
    }
}

#[test]
fn what_does_not_exist_is_no_proof() {
    let known = &KNOWN;
    for proof in ["tests_are_told_from_other_functions", "tests_are*", "tests/tests/real_quic.rs"] {
        assert!(known.has(proof), "{proof}");
    }
    for proof in [
        "cargo bench -p quic --bench cid",
        "cargo bench -p quic-lb-tests --bench datapath -- --scale",
    ] {
        assert!(known.has(proof), "{proof}");
    }
    let nothing = ["of_this_workspace", "no_such*", "tests/tests/gone.rs", "no such scenario"];
    for proof in nothing.into_iter().chain(["cargo bench -p quic --bench gone", "cargo bench"]) {
        assert!(!known.has(proof), "{proof}");
    }
}
