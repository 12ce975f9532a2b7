//! YAML text to a tree of nodes that know their place.
//!
//! The tree keeps what was typed: a scalar keeps its text and whether it was quoted, a mapping its
//! order and its duplicate keys. Judging that is the reader's business. What would let a small file
//! become a large tree is bounded here: depth, and the number of nodes with all aliases expanded.

use std::{collections::BTreeMap, rc::Rc};

use granit_parser::{Event, Marker, Options, Parser, ScalarStyle, Span};

use zeroize::Zeroizing;

use crate::mistake::{Mistakes, Place};

/// The largest file that is read. The largest fleet in the most talkative notation needs a tenth.
pub const MAX_OCTETS: usize = 16 << 20;
/// Lists and mappings inside each other; the document needs seven.
const MAX_DEPTH: usize = 32;
/// Nodes with aliases expanded; 4,096 backends with seven server IDs each need 110,000.
const MAX_NODES: usize = 1 << 18;

/// A value and where it starts.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) line: usize,
    pub(crate) column: usize,
    pub(crate) content: Content,
    /// This node and all below.
    nodes: usize,
}

#[derive(Clone, Debug)]
pub(crate) enum Content {
    Scalar {
        /// Any text may be a key.
        text: Rc<Zeroizing<String>>,
        plain: bool,
    },
    List(Rc<[Node]>),
    Mapping(Rc<[(Node, Node)]>),
    /// Reported already.
    Broken,
}

/// What a scalar means by the core schema of YAML 1.2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    Nothing,
    Boolean,
    Number,
    Text,
}

/// The one document in `text`; `None` after a mistake that leaves nothing to look at.
pub(crate) fn parse(text: &str, mistakes: &mut Mistakes) -> Option<Node> {
    if text.len() > MAX_OCTETS {
        let found = format!("{} bytes", text.len());
        mistakes.file_error(found, format!("at most {MAX_OCTETS}"));
        return None;
    }
    let mut options = Options::default();
    options.emit_unresolved_aliases = true;
    options.set_emit_comments(false);
    let mut tree = Tree::default();
    for event in Parser::new_from_str_with_options(text, options) {
        let (event, span) = match event {
            Ok(event) => event,
            Err(error) => {
                let place = place(*error.marker());
                mistakes.error(&place, format!("a YAML syntax error: {}", error.info()), SYNTAX);
                return None;
            }
        };
        if tree.root.is_some() && matches!(event, Event::DocumentStart(..)) {
            mistakes.error(&place(span.start), "a second document", "one document in a file");
            break;
        }
        if let Err(too_much) = tree.add(event, span, mistakes) {
            mistakes.error(&place(span.start), too_much, "what a configuration needs");
            return None;
        }
    }
    if tree.root.is_none() {
        mistakes.file_error("an empty file", "at least `listeners` and `pools`");
    }
    tree.root
}

const SYNTAX: &str =
    "well-formed YAML; the cause is here or just before: indentation, a colon, a quote, a bracket";

impl Node {
    /// A scalar that stands in the place of `beside`.
    pub(crate) fn scalar(text: &str, plain: bool, beside: &Place) -> Self {
        Self::beside(beside, Content::Scalar { text: scalar(text.to_owned()), plain })
    }

    /// A mapping without keys that stands in the place of `beside`.
    pub(crate) fn empty_mapping(beside: &Place) -> Self {
        Self::beside(beside, Content::Mapping(Rc::default()))
    }

    fn beside(&Place { line, column, .. }: &Place, content: Content) -> Self {
        Self { line, column, content, nodes: 1 }
    }

    /// The text of a scalar that means text.
    pub(crate) fn text(&self) -> Option<&str> {
        match &self.content {
            Content::Scalar { text, plain } if meaning(text, *plain) == Meaning::Text => Some(text),
            _ => None,
        }
    }

    /// The text of a scalar that means a number.
    pub(crate) fn number(&self) -> Option<&str> {
        match &self.content {
            Content::Scalar { text, plain } if meaning(text, *plain) == Meaning::Number => {
                Some(text)
            }
            _ => None,
        }
    }

    /// What a truth value says.
    pub(crate) fn boolean(&self) -> Option<bool> {
        match &self.content {
            Content::Scalar { text, plain } if meaning(text, *plain) == Meaning::Boolean => {
                Some(text.eq_ignore_ascii_case("true"))
            }
            _ => None,
        }
    }

    /// What stands here, in words for a report.
    pub(crate) fn describe(&self) -> String {
        match &self.content {
            Content::Scalar { text, plain } => match meaning(text, *plain) {
                Meaning::Nothing => "nothing".to_owned(),
                Meaning::Number => format!("the number {}", shown(text)),
                Meaning::Boolean => text.to_string(),
                Meaning::Text => format!("\"{}\"", shown(text)),
            },
            _ => self.kind().to_owned(),
        }
    }

    /// What stands here, without its text: for secrets.
    pub(crate) fn kind(&self) -> &'static str {
        match &self.content {
            Content::Scalar { text, plain } => match meaning(text, *plain) {
                Meaning::Nothing => "nothing",
                Meaning::Number => "a number",
                Meaning::Boolean => "a truth value",
                Meaning::Text => "text",
            },
            Content::List(_) => "a list",
            Content::Mapping(_) => "a mapping",
            Content::Broken => "nothing readable",
        }
    }
}

/// `text` for a report: short, printable, and not if it could be a key that was typed in the wrong
/// place.
pub(crate) fn shown(text: &str) -> String {
    const MAX_CHARS: usize = 60;
    /// Shorter than a key, so that one with a few digits missing is covered too.
    const SECRET_DIGITS: usize = 24;
    let mut run = 0;
    for character in text.chars().filter(|c| !matches!(c, '-' | '_' | ' ')) {
        run = if character.is_ascii_hexdigit() { run + 1 } else { 0 };
        if run >= SECRET_DIGITS {
            return format!("({} characters that could be a key)", text.chars().count());
        }
    }
    let mut shown = String::new();
    for (nth, character) in text.chars().enumerate() {
        if nth == MAX_CHARS {
            shown.push('…');
            break;
        }
        match character {
            '"' => shown.push('"'),
            printable if !printable.is_control() => shown.push(printable),
            control => shown.extend(control.escape_default()),
        }
    }
    shown
}

fn meaning(text: &str, plain: bool) -> Meaning {
    if !plain {
        return Meaning::Text;
    }
    match text {
        "" | "~" | "null" | "Null" | "NULL" => Meaning::Nothing,
        "true" | "True" | "TRUE" | "false" | "False" | "FALSE" => Meaning::Boolean,
        _ if is_number(text) => Meaning::Number,
        _ => Meaning::Text,
    }
}

fn is_number(text: &str) -> bool {
    let all = |digits: &str, radix| !digits.is_empty() && digits.chars().all(|c| c.is_digit(radix));
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    if let Some(digits) = text.strip_prefix("0x") {
        return all(digits, 16);
    }
    if let Some(digits) = text.strip_prefix("0o") {
        return all(digits, 8);
    }
    matches!(unsigned, ".inf" | ".Inf" | ".INF" | ".nan" | ".NaN" | ".NAN")
        || (unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.')
            && unsigned.parse::<f64>().is_ok())
}

fn scalar(text: String) -> Rc<Zeroizing<String>> {
    Rc::new(Zeroizing::new(text))
}

fn place(marker: Marker) -> Place {
    Place { path: String::new(), line: marker.line(), column: marker.col() + 1 }
}

/// The tree under construction.
#[derive(Default)]
struct Tree {
    open: Vec<Open>,
    anchors: BTreeMap<usize, Node>,
    nodes: usize,
    root: Option<Node>,
}

/// A list or mapping whose end has not been seen.
struct Open {
    line: usize,
    column: usize,
    anchor: usize,
    nodes: usize,
    inside: Inside,
}

enum Inside {
    List(Vec<Node>),
    /// The entries, and the key whose value comes next.
    Mapping(Vec<(Node, Node)>, Option<Node>),
}

impl Tree {
    /// `Err` says what there is too much of.
    fn add(&mut self, event: Event<'_>, span: Span, mistakes: &mut Mistakes) -> Result<(), String> {
        let place = place(span.start);
        if let Some(tag) = event.tag() {
            let found = format!("the tag {}", shown(&tag.original()));
            mistakes.error(&place, found, "the value without a tag");
        }
        match event {
            Event::Scalar(text, style, anchor, _) => {
                let plain = style == ScalarStyle::Plain;
                // The parser writes "~" for a value that is not there.
                let is_there = !plain || !span.is_empty();
                let text = scalar(if is_there { text.into_owned() } else { String::new() });
                self.count(1)?;
                self.close(Node::beside(&place, Content::Scalar { text, plain }), anchor);
            }
            Event::Alias(anchor) => {
                let node = match self.anchors.get(&anchor) {
                    Some(node) => Node { line: place.line, column: place.column, ..node.clone() },
                    None => {
                        let found = "an alias inside the value that it stands for";
                        mistakes.error(&place, found, "the value itself");
                        Node::beside(&place, Content::Broken)
                    }
                };
                self.count(node.nodes)?;
                self.close(node, 0);
            }
            Event::UnresolvedAlias(name) => {
                let found = format!("the alias *{}, but no such anchor above", shown(&name));
                let expected = format!("&{} before the value that is meant", shown(&name));
                mistakes.error(&place, found, expected);
                self.close(Node::beside(&place, Content::Broken), 0);
            }
            Event::SequenceStart(_, anchor, _) => {
                self.open(&place, anchor, Inside::List(Vec::new()))?;
            }
            Event::MappingStart(_, anchor, _) => {
                self.open(&place, anchor, Inside::Mapping(Vec::new(), None))?;
            }
            Event::SequenceEnd | Event::MappingEnd => {
                if let Some(Open { line, column, anchor, nodes, inside }) = self.open.pop() {
                    let content = match inside {
                        Inside::List(items) => Content::List(items.into()),
                        Inside::Mapping(entries, _) => Content::Mapping(entries.into()),
                    };
                    self.close(Node { line, column, content, nodes }, anchor);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn count(&mut self, nodes: usize) -> Result<(), String> {
        self.nodes += nodes;
        if self.nodes > MAX_NODES {
            return Err(format!("more than {MAX_NODES} values with all aliases expanded"));
        }
        Ok(())
    }

    fn open(&mut self, place: &Place, anchor: usize, inside: Inside) -> Result<(), String> {
        self.count(1)?;
        if self.open.len() == MAX_DEPTH {
            return Err(format!("more than {MAX_DEPTH} lists and mappings inside each other"));
        }
        let &Place { line, column, .. } = place;
        self.open.push(Open { line, column, anchor, nodes: 1, inside });
        Ok(())
    }

    /// Puts a complete node where it belongs.
    fn close(&mut self, mut node: Node, anchor: usize) {
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        let Some(parent) = self.open.last_mut() else {
            self.root = Some(node);
            return;
        };
        parent.nodes += node.nodes;
        match &mut parent.inside {
            Inside::List(items) => items.push(node),
            Inside::Mapping(entries, key) => match key.take() {
                None => *key = Some(node),
                Some(key) => {
                    if matches!(&node.content, Content::Scalar { text, plain: true } if text.is_empty())
                    {
                        // A value that is not there has no place worth pointing at.
                        (node.line, node.column) = (key.line, key.column);
                    }
                    entries.push((key, node));
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_know_where_they_start() {
        let root = parsed("a: 1\nb:\n  - x\n  - \"y\"\nc:\nü: 2\n");
        let Content::Mapping(entries) = &root.content else { panic!("a mapping") };
        let places: Vec<_> = entries
            .iter()
            .map(|(key, value)| (key.line, key.column, value.line, value.column))
            .collect();
        assert_eq!(places, [(1, 1, 1, 4), (2, 1, 3, 3), (5, 1, 5, 1), (6, 1, 6, 4)]);
    }

    #[test]
    fn scalars_mean_what_yaml_1_2_says() {
        for nothing in ["", "~", "null"] {
            assert_eq!(meaning(nothing, true), Meaning::Nothing, "{nothing}");
        }
        for number in ["0", "0001", "-1", "+2", "1e5", "1.5", ".5", "0x1F", "0o17", ".inf", "-.nan"]
        {
            assert_eq!(meaning(number, true), Meaning::Number, "{number}");
            assert_eq!(meaning(number, false), Meaning::Text, "{number}");
        }
        for text in ["off", "a1b2", "1m", "127.0.0.1:1", "0x", "nan", "-", "1e", "0b1"] {
            assert_eq!(meaning(text, true), Meaning::Text, "{text}");
        }
    }

    #[test]
    fn aliases_stand_for_their_anchor_at_their_own_place() {
        let root = parsed("a: &x [1, 2]\nb: *x\n");
        let Content::Mapping(entries) = &root.content else { panic!("a mapping") };
        let alias = &entries[1].1;
        assert_eq!((alias.line, alias.column), (2, 4));
        let Content::List(items) = &alias.content else { panic!("a list") };
        assert_eq!((items.len(), items[0].line), (2, 1));
    }

    #[test]
    fn aliases_cannot_multiply_without_end() {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..10 {
            let below = format!("*a{}, ", level - 1).repeat(10);
            text.push_str(&format!("a{level}: &a{level} [{below}]\n"));
        }
        assert!(first_mistake(&text).contains("aliases expanded"));
    }

    #[test]
    fn what_cannot_be_looked_at_is_one_mistake_with_its_place() {
        assert!(first_mistake("a: [1, 2\nb: 3\n").starts_with("2:2: error"));
        assert!(first_mistake("a: \"b\n").contains("syntax error"));
        let nested = |depth| "[".repeat(depth) + &"]".repeat(depth);
        parsed(&nested(MAX_DEPTH));
        assert!(first_mistake(&nested(MAX_DEPTH + 1)).contains("inside each other"));
        assert!(first_mistake(&"- ".repeat(MAX_DEPTH + 1)).contains("inside each other"));
        assert!(first_mistake("").contains("an empty file"));
        assert!(first_mistake("# nothing\n").contains("an empty file"));
        assert!(first_mistake(&"#".repeat(MAX_OCTETS + 1)).contains("bytes"));
    }

    #[test]
    fn what_is_not_ours_is_refused_and_the_rest_still_read() {
        assert!(first_mistake("a: 1\n---\nb: 2\n").starts_with("2:1: error"));
        assert!(first_mistake("a: !!str 1\n").contains("the tag !!str"));
        assert!(first_mistake("a: *nowhere\n").contains("*nowhere"));
        assert!(first_mistake("a: &a [*a]\n").contains("inside the value"));
    }

    #[test]
    fn text_in_reports_is_short_printable_and_no_key() {
        assert_eq!(shown("a\u{1b}[1m\n"), "a\\u{1b}[1m\\n");
        assert_eq!(shown(&"x".repeat(100)).chars().count(), 61);
        assert!(!shown("x8f95f092-45765f80 256934e50c66207").contains("8f95"));
        assert_eq!(shown("2001:db8::1"), "2001:db8::1");
    }

    fn parsed(text: &str) -> Node {
        let mut mistakes = Mistakes::default();
        let root = parse(text, &mut mistakes).expect("a document");
        assert_eq!(mistakes.into_sorted(), []);
        root
    }

    fn first_mistake(text: &str) -> String {
        let mut mistakes = Mistakes::default();
        parse(text, &mut mistakes);
        mistakes.into_sorted().first().expect("a mistake").to_string()
    }
}
