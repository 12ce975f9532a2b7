//! Where keys come from: the file itself, another file, or the environment.

use std::path::Path;

use zeroize::Zeroizing;

use crate::{
    checked::ResetSecret,
    file,
    leaf::{Secret, Text},
    mistake::{Mistakes, Place},
    read::{At, Given},
    surroundings::{Surroundings, mode},
    system_error::reason,
    yaml::shown,
};

/// The three keys of a mapping that can hold a secret or lead to one.
#[derive(Clone, Copy)]
pub(crate) struct KeySource<'a> {
    pub(crate) key: &'a Given<Secret>,
    pub(crate) key_file: &'a Given<Text>,
    pub(crate) key_env: &'a Given<Text>,
}

/// What a mapping says about its key.
pub(crate) enum KeyChoice {
    /// There is none.
    Absent,
    /// This one.
    Key(Secret),
    /// One that was reported as wrong.
    Unusable,
}

/// Finds the key that `source` means.
pub(crate) fn find(
    source: KeySource<'_>,
    surroundings: &Surroundings<'_>,
    mistakes: &mut Mistakes,
) -> KeyChoice {
    let KeySource { key, key_file, key_env } = source;
    let given = [
        place_of_given("key", key),
        place_of_given("key_file", key_file),
        place_of_given("key_env", key_env),
    ];
    let mut given = given.into_iter().flatten();
    match (given.next(), given.next()) {
        (Some((first, first_place)), Some((second, place))) => {
            let found = format!("`{second}` beside `{first}`");
            mistakes.error(place, found, "one of `key`, `key_file` and `key_env`");
            mistakes.see_also(first_place);
            return KeyChoice::Unusable;
        }
        (None, _) if key.is_absent() && key_file.is_absent() && key_env.is_absent() => {
            return KeyChoice::Absent;
        }
        _ => {}
    }
    let found = match (key, key_file, key_env) {
        (Given::Here(key), ..) => {
            warn_if_open(&key.place, surroundings, mistakes);
            Some((key.value.clone(), &key.place))
        }
        (_, Given::Here(path), _) => {
            from_file(path, surroundings, mistakes).map(|secret| (secret, &path.place))
        }
        (_, _, Given::Here(name)) => {
            from_environment(name, surroundings, mistakes).map(|secret| (secret, &name.place))
        }
        _ => None,
    };
    let Some((secret, place)) = found else { return KeyChoice::Unusable };
    if secret.is_zero() {
        mistakes.warning(
            place,
            "a key of zeros, which anyone guesses",
            "a key of `quic-lb keygen`",
        );
    }
    KeyChoice::Key(secret)
}

/// A key in the configuration itself is as secret as that file.
fn warn_if_open(place: &Place, surroundings: &Surroundings<'_>, mistakes: &mut Mistakes) {
    if let Some(mode) = surroundings.mode.filter(|mode| mode & OTHERS_READ != 0) {
        let found = format!("a key in a file that everyone can read (mode {mode:03o})");
        let expected = "mode 600, or 640 for a group; or `key_file` or `key_env`";
        mistakes.warning_once(place, found, expected);
    }
}

/// The permission of everybody to read a file.
const OTHERS_READ: u32 = 0o004;

/// The secret in a file with 32 hex digits, for those whose servers have one of their own.
///
/// # Errors
///
/// What is wrong with the file, in one sentence.
pub fn read_reset_secret(path: &Path) -> Result<ResetSecret, String> {
    let content =
        read_file(path).map_err(|reason| format!("{} cannot be read: {reason}", path.display()))?;
    let secret = Secret::parse(content.trim()).map_err(|found| {
        let expected = Secret::EXPECTED;
        format!(
            "{} has {found}, and {expected} were expected, as of `quic-lb keygen`",
            path.display()
        )
    })?;
    Ok(ResetSecret::new(secret.octets()))
}

fn place_of_given<'a, T>(
    name: &'static str,
    given: &'a Given<T>,
) -> Option<(&'static str, &'a Place)> {
    given.here().map(|at| (name, &at.place))
}

fn from_file(
    path: &At<Text>,
    surroundings: &Surroundings<'_>,
    mistakes: &mut Mistakes,
) -> Option<Secret> {
    let place = &path.place;
    let name = &path.value.0;
    if Secret::parse(name).is_ok() {
        mistakes.error(place, "what looks like the key itself", "the name of a file, or `key`");
        return None;
    }
    let full = surroundings.directory.join(name);
    (surroundings.depends_on)(&full);
    let content = match read_file(&full) {
        Ok(content) => content,
        Err(reason) => {
            let found = format!("\"{}\", which cannot be read: {reason}", shown(name));
            mistakes.error(place, found, "a file with the key that this process may read");
            return None;
        }
    };
    if let Some(mode) = mode(&full).filter(|mode| mode & OTHERS_READ != 0) {
        let found = format!("\"{}\", readable by everyone (mode {mode:03o})", shown(name));
        mistakes.warning(place, found, "mode 600, or 640 for a group");
    }
    Secret::parse(content.trim())
        .map_err(|found| {
            let found = format!("\"{}\" with {found}", shown(name));
            mistakes.error(place, found, format!("a file with {} and no more", Secret::EXPECTED));
        })
        .ok()
}

fn from_environment(
    name: &At<Text>,
    surroundings: &Surroundings<'_>,
    mistakes: &mut Mistakes,
) -> Option<Secret> {
    let At { value: Text(name), place } = name;
    if Secret::parse(name).is_ok() {
        let expected = "the name of an environment variable, or `key`";
        mistakes.error(place, "what looks like the key itself", expected);
        return None;
    }
    let value = (surroundings.environment)(name).map(Zeroizing::new);
    let Some(value) = value else {
        let found = format!("\"{}\", which is not set in the environment", shown(name));
        mistakes.error(place, found, format!("a variable that holds {}", Secret::EXPECTED));
        return None;
    };
    Secret::parse(value.trim())
        .map_err(|found| {
            let found = format!("\"{}\", a variable with {found}", shown(name));
            mistakes.error(place, found, format!("a variable that holds {}", Secret::EXPECTED));
        })
        .ok()
}

/// `Err` is the reason in words.
fn read_file(path: &Path) -> Result<Zeroizing<String>, String> {
    /// More than a key with white space; a wrong file is not read to its end.
    const MAX_OCTETS: u64 = 4096;
    let content = file::read(path, MAX_OCTETS).map_err(|error| reason(&error))?;
    file::into_text(content).map_err(|_| "it is not text".to_owned())
}
