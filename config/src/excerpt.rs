//! Reports for people: each mistake beneath the line that it is in, in the shape that rustc has made
//! known.
//!
//! A line may hold a key. What could be one is covered, letter by letter, so that carets stay where
//! they belong.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use annotate_snippets::{AnnotationKind, Group, Level, Origin, Renderer, Snippet};

use crate::mistake::{Mistake, Place, Report, Severity};

/// What is shown of a longer line, in characters: so many before the place, and so many from there.
const WINDOW: usize = 100;

/// As many hex digits in a row could be a key, or most of one.
const SECRET_DIGITS: usize = 16;

impl Report {
    /// The report with an excerpt of the file for each mistake, in colours of ANSI terminals or
    /// without any. It shows no keys.
    #[must_use]
    pub fn excerpts(&self, colours: bool) -> String {
        let text = self.text.as_str();
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let places = self.mistakes.iter().flat_map(|mistake| [&mistake.place, &mistake.related]);
        let needed: BTreeSet<usize> = places.flatten().map(|place| place.line).collect();
        let numbered = (1..).zip(text.lines());
        let lines = numbered.filter(|(number, _)| needed.contains(number)).collect();
        let renderer = if colours { Renderer::styled() } else { Renderer::plain() };
        let mistakes = self.mistakes.iter();
        let shown = mistakes.map(|mistake| renderer.render(&[self.group(mistake, &lines)]));
        shown.collect::<Vec<_>>().join("\n\n")
    }

    fn group<'a>(&'a self, mistake: &'a Mistake, lines: &BTreeMap<usize, &str>) -> Group<'a> {
        let Mistake { severity, place, found, expected, related } = mistake;
        let level = match severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let title = Group::with_title(level.primary_title(found));
        let mut group = match place {
            None => title.element(Origin::path(&self.file)),
            Some(place) => match self.snippet(place, lines, AnnotationKind::Primary, None) {
                Some(snippet) => title.element(snippet),
                None => {
                    let origin = Origin::path(&self.file).line(place.line);
                    title.element(origin.char_column(place.column))
                }
            },
        };
        let see_also = related.as_ref().and_then(|related| {
            self.snippet(related, lines, AnnotationKind::Context, Some("see also"))
        });
        if let Some(see_also) = see_also {
            group = group.element(see_also);
        }
        group = group.element(Level::NOTE.with_name(Some("expected")).message(expected));
        match place {
            Some(place) if !place.path.is_empty() => {
                group.element(Level::NOTE.with_name(Some("at")).message(&place.path))
            }
            _ => group,
        }
    }

    fn snippet<'a>(
        &'a self,
        place: &Place,
        lines: &BTreeMap<usize, &str>,
        kind: AnnotationKind,
        label: Option<&'a str>,
    ) -> Option<Snippet<'a, annotate_snippets::Annotation<'a>>> {
        let line = lines.get(&place.line)?;
        let (shown, span) = excerpt(line, place);
        let snippet = Snippet::source(shown).line_start(place.line).path(&self.file);
        Some(snippet.annotation(kind.span(span).label(label)))
    }
}

/// What is shown of `line`, and where in that the value at `place` is, in bytes.
fn excerpt(line: &str, place: &Place) -> (String, Range<usize>) {
    let mut chars: Vec<char> = line.chars().map(printable).collect();
    let start = place.column.saturating_sub(1).min(chars.len());
    let end = end_of_value(&chars, start);
    cover_secrets(&mut chars);
    if is_secret(&place.path) {
        cover(&mut chars, start..end);
    }
    let from = start.saturating_sub(WINDOW);
    let to = chars.len().min(start + WINDOW);
    let end = end.min(to);
    let ellipsis = |cut: bool| if cut { "…" } else { "" };
    let text = |range: Range<usize>| chars[range].iter().collect::<String>();
    let before = format!("{}{}", ellipsis(from > 0), text(from..start));
    let value = text(start..end);
    let span = before.len()..before.len() + value.len();
    (format!("{before}{value}{}{}", text(end..to), ellipsis(to < chars.len())), span)
}

/// Where the value that starts at `start` ends on its line.
fn end_of_value(chars: &[char], start: usize) -> usize {
    let rest = &chars[start..];
    let behind = |nth: Option<usize>| nth.map_or(chars.len(), |nth| start + nth);
    let end = match rest.first() {
        None => start,
        Some('[' | '{' | '|' | '>') => start + 1,
        Some(quote @ ('"' | '\'')) => {
            let closing = rest.iter().skip(1).position(|c| c == quote);
            behind(closing.map(|nth| nth + 2))
        }
        Some(_) => {
            let next = |nth: usize| rest.get(nth + 1).is_none_or(|c| c.is_whitespace());
            let ends = |(nth, c): (usize, &char)| match c {
                ',' | ']' | '}' => true,
                ':' => next(nth),
                '#' => nth > 0 && rest[nth - 1].is_whitespace(),
                _ => false,
            };
            behind(rest.iter().enumerate().position(ends))
        }
    };
    let blank = chars[start..end].iter().rev().take_while(|c| c.is_whitespace()).count();
    end - blank
}

/// Whether a value at this path is a secret.
fn is_secret(path: &str) -> bool {
    matches!(path.rsplit('.').next(), Some("key" | "iv"))
}

fn printable(c: char) -> char {
    let reorders = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    if (c.is_control() && c != '\t') || reorders { '\u{fffd}' } else { c }
}

/// Covers what stands behind `key:` and `iv:`, and whatever else could be a key.
fn cover_secrets(chars: &mut [char]) {
    let mut start = 0;
    while start < chars.len() {
        match value_of_secret(chars, start) {
            Some(value) => {
                start = value.end.max(start + 1);
                cover(chars, value);
            }
            None => start += 1,
        }
    }
    let mut run = Vec::new();
    for nth in 0..=chars.len() {
        match chars.get(nth) {
            Some(c) if c.is_ascii_hexdigit() => run.push(nth),
            Some('-' | '_' | ' ' | ':') if !run.is_empty() => {}
            _ => {
                if run.len() >= SECRET_DIGITS {
                    run.iter().for_each(|nth| chars[*nth] = '*');
                }
                run.clear();
            }
        }
    }
}

/// The value of the key that starts at `start`, if that is one of a secret.
fn value_of_secret(chars: &[char], start: usize) -> Option<Range<usize>> {
    let is_word = |c: &char| c.is_alphanumeric() || *c == '_';
    if start > 0 && is_word(&chars[start - 1]) {
        return None;
    }
    let word: String = chars[start..].iter().take_while(|c| is_word(c)).collect();
    if !matches!(&*word.to_ascii_lowercase(), "key" | "iv" | "secret") {
        return None;
    }
    let behind = |from: usize, skipped: &[char]| {
        from + chars[from..].iter().take_while(|c| skipped.contains(c)).count()
    };
    let colon = behind(start + word.len(), &['"', '\'', ' ']);
    if chars.get(colon) != Some(&':') {
        return None;
    }
    let value = behind(colon + 1, &[' ', '\t']);
    let in_flow = chars[..start].contains(&'{');
    let end = match chars.get(value) {
        Some('"' | '\'') => end_of_value(chars, value),
        _ if in_flow => {
            let rest = &chars[value..];
            value + rest.iter().position(|c| matches!(c, ',' | '}')).unwrap_or(rest.len())
        }
        _ => chars.len(),
    };
    Some(value..end)
}

fn cover(chars: &mut [char], range: Range<usize>) {
    for c in &mut chars[range] {
        if !c.is_whitespace() && !matches!(c, '"' | '\'') {
            *c = '*';
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ESCAPE: char = '\u{1b}';

    fn place(path: &str, column: usize) -> Place {
        Place { path: path.to_owned(), line: 1, column }
    }

    #[test]
    fn the_caret_covers_the_value() {
        for (line, column, value) in [
            ("  level: loud   # which?", 10, "loud"),
            ("  - { name: a, weight: 0 }", 24, "0"),
            ("  - [a, b]", 5, "["),
            ("key: 'a b' # x", 6, "'***'"),
            ("wieght: 3", 1, "wieght"),
            ("address: 127.0.0.1:80", 10, "127.0.0.1:80"),
            ("a:", 1, "a"),
            ("a:", 3, ""),
            ("a:", 300, ""),
            ("ü: ß # x", 4, "ß"),
            ("", 1, ""),
        ] {
            let (shown, span) = excerpt(line, &place("x", column));
            // The value of `key` has its blank left alone.
            let expected = value.replace("***", "* *");
            assert_eq!(shown[span], expected, "{line}");
        }
    }

    #[test]
    fn what_could_be_a_key_is_covered() {
        for (line, path) in [
            ("key: \"8f95f09245765f80256934e50c66207f\"", "k"),
            ("key: secret, and more of it", "k"),
            ("- { nonce_length: 99, key: 'se}cret', iv: 12ab }", "k"),
            ("\"key\" : 8f95g", "k"),
            ("# key: 8f95", "k"),
            ("kay: 8f95f09245765f80", "k"),
            ("8f95 secret", "pools[0].quic_lb[0].key"),
            ("KEY: 8f95f0", "k"),
        ] {
            let (shown, _) = excerpt(line, &place(path, 1));
            for part in ["8f95", "secr", "cret", "12ab"] {
                assert!(!shown.contains(part), "{line}: {shown}");
            }
            assert_eq!(shown.chars().count(), line.chars().count(), "{shown}");
        }
        let open = "key_file: a.key  # server_id: a1b2c3d4";
        assert_eq!(excerpt(open, &place("x", 1)).0, open);
    }

    #[test]
    fn long_lines_are_cut_on_both_sides() {
        let line = format!("{}here{}", "<".repeat(5000), ">".repeat(5000));
        let (shown, span) = excerpt(&line, &place("x", 5001));
        assert_eq!(shown.chars().count(), 2 * WINDOW + 2);
        assert!(shown[span].starts_with("here"));
    }

    proptest! {
        #[test]
        fn any_line_and_place_can_be_shown(
            line in any::<String>(),
            path in "[a-z.]{0,9}(key)?",
            column in 0usize..400,
        ) {
            let (shown, span) = excerpt(&line, &place(&path, column));
            prop_assert!(shown.get(span).is_some());
            prop_assert!(!shown.contains(ESCAPE));
            let mistake = Mistake {
                severity: Severity::Error,
                place: Some(place(&path, column)),
                found: "this".to_owned(),
                expected: "that".to_owned(),
                related: Some(place(&path, 1)),
            };
            let report = Report::new("lb.yaml", vec![mistake]).on(&line);
            prop_assert!(report.excerpts(false).contains("this"));
        }
    }
}
