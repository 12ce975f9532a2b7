//! The files that a configuration depends on, as far as can be told without reading them.

use std::{
    cell::RefCell,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// Files as they were when they were read.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen(Vec<(PathBuf, Option<Stamp>)>);

/// What changes when a file is written, replaced, or reached by another link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    file: (u64, u64),
    len: u64,
    /// Of its content, and of everything else such as its mode; in seconds and nanoseconds.
    times: [(i64, i64); 2],
}

impl Seen {
    /// What `read` returns, and the files that it tells of before it reads them.
    pub(super) fn while_<T>(read: impl FnOnce(&dyn Fn(&Path)) -> T) -> (Self, T) {
        let files = RefCell::new(vec![]);
        let outcome = read(&|path| files.borrow_mut().push((path.to_owned(), Stamp::of(path))));
        (Self(files.into_inner()), outcome)
    }

    /// Whether all of them, of which there is one at least, are as they were.
    pub(super) fn is_current(&self) -> bool {
        !self.0.is_empty() && self.0.iter().all(|(path, stamp)| Stamp::of(path) == *stamp)
    }
}

impl Stamp {
    /// `None` while there is no such file.
    fn of(path: &Path) -> Option<Self> {
        let of = fs::metadata(path).ok()?;
        Some(Self {
            file: (of.dev(), of.ino()),
            len: of.len(),
            times: [(of.mtime(), of.mtime_nsec()), (of.ctime(), of.ctime_nsec())],
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_is_written_replaced_linked_or_gone_is_not_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        assert!(!Seen::default().is_current(), "nothing was read yet");
        let look = || Seen::while_(|tell| [tell(&at("link")), tell(&at("key"))]).0;
        let mut seen = look();
        let mut changes = |what: &str| {
            assert!(!seen.is_current(), "{what}");
            seen = look();
            assert!(seen.is_current(), "{what}");
        };
        fs::write(at("one"), "x").unwrap();
        symlink("one", at("link")).unwrap();
        changes("there is a file");
        fs::write(at("one"), "yz").unwrap();
        changes("it is another size");
        fs::write(at("two"), "yz").unwrap();
        fs::rename(at("two"), at("one")).unwrap();
        changes("it is another file");
        fs::write(at("three"), "yz").unwrap();
        symlink("three", at("new link")).unwrap();
        fs::rename(at("new link"), at("link")).unwrap();
        changes("it is reached by another link");
        fs::write(at("key"), "k").unwrap();
        changes("there is a key");
        fs::remove_file(at("key")).unwrap();
        changes("there is none");
        fs::remove_file(at("three")).unwrap();
        changes("the link leads nowhere");
    }
}
