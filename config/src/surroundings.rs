//! What a file refers to beyond itself: the folder of its key files, the environment.

use std::{fmt, path::Path};

/// What a file refers to.
#[derive(Clone, Copy)]
pub struct Surroundings<'a> {
    /// How reports name the file.
    pub file: &'a str,
    /// Where relative names of key files start.
    pub directory: &'a Path,
    /// Looks up environment variables.
    pub environment: &'a dyn Fn(&str) -> Option<String>,
}

impl fmt::Debug for Surroundings<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, directory, environment: _ } = self;
        f.debug_struct("Surroundings")
            .field("file", file)
            .field("directory", directory)
            .finish_non_exhaustive()
    }
}
