//! What is wrong with a file: where, what was found, and what would do.
//!
//! Reading never stops at the first mistake; it collects [`Mistake`]s and goes on. A [`Report`]
//! prints them. Nothing in here ever holds a key: the readers of secrets describe what they found
//! by its length.

use std::{fmt, sync::Arc};

use zeroize::Zeroizing;

/// Everything that is wrong with one file, in the order of its lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The file as it was named to us.
    pub file: String,
    /// At least one error when loading failed; only warnings otherwise.
    pub mistakes: Vec<Mistake>,
    /// What the file holds, for excerpts.
    pub(crate) text: Text,
}

/// The text of a file, which may hold keys.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct Text(Arc<Zeroizing<String>>);

impl Text {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Text(masked)")
    }
}

impl Report {
    /// A report on `file`.
    #[must_use]
    pub fn new(file: impl Into<String>, mistakes: Vec<Mistake>) -> Self {
        Self { file: file.into(), mistakes, text: Text::default() }
    }

    /// The same report, which can show excerpts of `text`.
    #[must_use]
    pub fn on(self, text: &str) -> Self {
        Self { text: Text(Arc::new(text.to_owned().into())), ..self }
    }

    /// How many of the mistakes are errors.
    #[must_use]
    pub fn errors(&self) -> usize {
        self.mistakes.iter().filter(|mistake| mistake.severity == Severity::Error).count()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, mistake) in self.mistakes.iter().enumerate() {
            if nth > 0 {
                writeln!(f)?;
            }
            mistake.write(f, &self.file)?;
        }
        Ok(())
    }
}

impl std::error::Error for Report {}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// Whether the file can be used all the same.
    pub severity: Severity,
    /// Where; `None` when it concerns the file as a whole.
    pub place: Option<Place>,
    /// What stands there.
    pub found: String,
    /// What would do instead.
    pub expected: String,
    /// Another place that has to do with it, such as the first of two equal names.
    pub related: Option<Place>,
}

impl Mistake {
    fn write(&self, f: &mut fmt::Formatter<'_>, file: &str) -> fmt::Result {
        f.write_str(file)?;
        if let Some(place) = &self.place {
            let colon = if file.is_empty() { "" } else { ":" };
            write!(f, "{colon}{}:{}", place.line, place.column)?;
        }
        if !(file.is_empty() && self.place.is_none()) {
            f.write_str(": ")?;
        }
        write!(f, "{}", self.severity)?;
        match &self.place {
            Some(place) if !place.path.is_empty() => write!(f, " at {}", place.path)?,
            _ => {}
        }
        write!(f, "\n  found:    {}\n  expected: {}", self.found, self.expected)?;
        if let Some(Place { path, line, column }) = &self.related {
            write!(f, "\n  see also: line {line}, column {column} ({path})")?;
        }
        Ok(())
    }
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, "")
    }
}

/// Whether a file with this mistake can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// It cannot.
    Error,
    /// It can, but someone should look.
    Warning,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Warning => "warning",
        })
    }
}

/// A place in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The keys and indices that lead there, such as `pools[0].backends[1].server_id`; empty for
    /// the top of the document.
    pub path: String,
    /// Counted from 1.
    pub line: usize,
    /// Counted from 1, in characters.
    pub column: usize,
}

/// Mistakes as they are found.
#[derive(Debug, Default)]
pub(crate) struct Mistakes(Vec<Mistake>);

impl Mistakes {
    pub(crate) fn error(
        &mut self,
        place: &Place,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) {
        self.push(Severity::Error, Some(place), found, expected);
    }

    pub(crate) fn warning(
        &mut self,
        place: &Place,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) {
        self.push(Severity::Warning, Some(place), found, expected);
    }

    /// A warning that would say the same in several places: it is given at the first.
    pub(crate) fn warning_once(
        &mut self,
        place: &Place,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) {
        let found = found.into();
        if !self.0.iter().any(|mistake| mistake.found == found) {
            self.warning(place, found, expected);
        }
    }

    /// An error that concerns the file as a whole.
    pub(crate) fn file_error(&mut self, found: impl Into<String>, expected: impl Into<String>) {
        self.push(Severity::Error, None, found, expected);
    }

    /// Points the latest mistake to a second place.
    pub(crate) fn see_also(&mut self, place: &Place) {
        if let Some(mistake) = self.0.last_mut() {
            mistake.related = Some(place.clone());
        }
    }

    pub(crate) fn has_errors(&self) -> bool {
        self.0.iter().any(|mistake| mistake.severity == Severity::Error)
    }

    /// In the order of the file.
    pub(crate) fn into_sorted(mut self) -> Vec<Mistake> {
        let position = |place: &Place| (place.line, place.column);
        self.0.sort_by_key(|mistake| mistake.place.as_ref().map(position));
        self.0
    }

    fn push(
        &mut self,
        severity: Severity,
        place: Option<&Place>,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) {
        self.0.push(Mistake {
            severity,
            place: place.cloned(),
            found: found.into(),
            expected: expected.into(),
            related: None,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_names_file_line_column_path_and_both_sides() {
        let mut mistakes = Mistakes::default();
        mistakes.error(&place("pools[0].name", 7, 3), "nothing", "a name");
        mistakes.see_also(&place("pools[1].name", 9, 3));
        mistakes.warning(&place("", 1, 1), "a", "b");
        mistakes.file_error("c", "d");
        assert_eq!(
            Report::new("lb.yaml", mistakes.into_sorted()).to_string(),
            "lb.yaml: error\n  found:    c\n  expected: d\n\
             lb.yaml:1:1: warning\n  found:    a\n  expected: b\n\
             lb.yaml:7:3: error at pools[0].name\n  found:    nothing\n  expected: a name\n  \
             see also: line 9, column 3 (pools[1].name)"
        );
    }

    fn place(path: &str, line: usize, column: usize) -> Place {
        Place { path: path.to_owned(), line, column }
    }
}
