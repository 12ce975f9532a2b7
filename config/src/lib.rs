//! The YAML of quic-lb, read into a [`Config`] that cannot be wrong.
//!
//! [`load`] reads a file and reports every mistake in it at once, each with line, column and path,
//! what was found and what would do. Below [`Config`] nobody checks again. Secrets come in, and
//! never go out: not in reports, not in `Debug`, not in [`Config::masked_document`].
//!
//! The way of a file: `yaml` (text to nodes with places) → `read` and `leaf` (nodes to typed values)
//! as `document` declares → `check` (values beside each other, keys from where they are kept) →
//! `not_yet` (what this version does not do) → [`Config`]. The JSON schema of [`schema`] comes from
//! the declarations in `document`.
#![forbid(unsafe_code)]
#![cfg_attr(
    test,
    allow(
        clippy::disallowed_methods,
        clippy::iter_over_hash_type,
        reason = "tests are their own shell"
    )
)]

mod check;
mod checked;
mod decisions;
mod document;
mod excerpt;
mod file;
mod keys;
mod leaf;
mod mistake;
mod not_yet;
mod read;
mod slips;
mod surroundings;
pub mod system_error;
pub mod units;
mod view;
mod yaml;

use std::path::Path;

pub use checked::*;
pub use keys::read_reset_secret;
use mistake::Mistakes;
pub use mistake::{Mistake, Place, Report, Severity};
use read::Read as _;
use schemars::generate::SchemaSettings;
pub use surroundings::Surroundings;
pub use yaml::MAX_OCTETS;
use zeroize::Zeroizing;

/// A configuration, and what someone should look at all the same.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// None of them an error.
    pub warnings: Vec<Mistake>,
}

/// Reads the file at `path`. Key files are looked for beside it, `key_env` in the environment of
/// the process.
///
/// # Errors
///
/// Every mistake of the file, or the one that it cannot be read.
pub fn load(path: impl AsRef<Path>) -> Result<Loaded, Report> {
    load_telling(path.as_ref(), &|_| ())
}

/// As [`load`]; `depends_on` is told each file that the outcome depends on, before it is read.
///
/// # Errors
///
/// As those of [`load`].
pub fn load_telling(path: &Path, depends_on: &dyn Fn(&Path)) -> Result<Loaded, Report> {
    let file = path.display().to_string();
    depends_on(path);
    let text = read_text(path)?;
    from_str(&text, &Surroundings { depends_on, ..Surroundings::of_file(&file, path) })
}

/// Reads the text of the file at `path`.
///
/// # Errors
///
/// That it cannot be read, or is no text.
pub fn read_text(path: &Path) -> Result<Zeroizing<String>, Report> {
    let file = || path.display().to_string();
    let octets = file::read(path, MAX_OCTETS as u64 + 1).map_err(|error| {
        let mut mistakes = Mistakes::default();
        let found = format!("a file that cannot be read: {}", system_error::reason(&error));
        mistakes.file_error(found, "a regular file that this process may read");
        Report::new(file(), mistakes.into_sorted())
    })?;
    text_of(octets, &file())
}

/// The text that these bytes of a file are, which reports name `file`.
///
/// # Errors
///
/// The place of the first that are none.
pub fn text_of(
    octets: impl Into<Zeroizing<Vec<u8>>>,
    file: &str,
) -> Result<Zeroizing<String>, Report> {
    file::into_text(octets.into()).map_err(|(octets, error)| {
        let before = &octets[..error.valid_up_to()];
        let line_start = before.iter().rposition(|octet| *octet == b'\n').map_or(0, |nth| nth + 1);
        let place = Place {
            path: String::new(),
            line: before.iter().filter(|octet| **octet == b'\n').count() + 1,
            column: String::from_utf8_lossy(&before[line_start..]).chars().count() + 1,
        };
        let mut mistakes = Mistakes::default();
        mistakes.error(&place, "a byte that is not UTF-8", "text in UTF-8");
        Report::new(file, mistakes.into_sorted())
    })
}

/// Reads a configuration from `text`.
///
/// # Errors
///
/// Every mistake in it.
pub fn from_str(text: &str, surroundings: &Surroundings<'_>) -> Result<Loaded, Report> {
    let mut mistakes = Mistakes::default();
    let config = read(text, surroundings, &mut mistakes);
    let has_errors = mistakes.has_errors();
    let mistakes = mistakes.into_sorted();
    match config {
        Some(config) if !has_errors => Ok(Loaded { config, warnings: mistakes }),
        _ => Err(Report::new(surroundings.file, mistakes).on(text)),
    }
}

/// The JSON schema (draft 7, which editors know best) of what [`load`] reads.
#[must_use]
pub fn schema() -> serde_json::Value {
    let settings = SchemaSettings::draft07().with(|settings| settings.inline_subschemas = true);
    settings.into_generator().into_root_schema_for::<document::Document>().to_value()
}

fn read(text: &str, surroundings: &Surroundings<'_>, mistakes: &mut Mistakes) -> Option<Config> {
    let root = yaml::parse(text, mistakes)?;
    let document = document::Document::read(&root, &read::place_of(&root), mistakes)?;
    not_yet::refuse(&document, mistakes);
    check::check(document, surroundings, mistakes)
}
