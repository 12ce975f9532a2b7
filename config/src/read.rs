//! From nodes to typed values, and from the same types to the JSON schema.
//!
//! A type that can stand in the file implements [`Read`] and [`JsonSchema`]. Reading reports what is
//! wrong and goes on with the siblings; a value that could not be read is left out, and whoever
//! checks later stays silent about it. [`mapping!`] declares a mapping once; key names, which of
//! them are required, defaults, reader and schema all come from that declaration.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::Value;

use crate::{
    mistake::{Mistakes, Place},
    slips::closest,
    yaml::{Content, Node, shown},
};

/// A type that can be read from a node.
pub(crate) trait Read: JsonSchema + Sized {
    /// `None` after reporting why.
    fn read(node: &Node, place: &Place, mistakes: &mut Mistakes) -> Option<Self>;
}

/// A value and its place.
#[derive(Clone, Debug)]
pub(crate) struct At<T> {
    pub(crate) value: T,
    pub(crate) place: Place,
}

impl<T> At<T> {
    /// Whether this key of the mapping at `mapping` was left out, and the value is its default. No
    /// value starts where its mapping does.
    pub(crate) fn is_default_of(&self, mapping: &Place) -> bool {
        (self.place.line, self.place.column) == (mapping.line, mapping.column)
    }
}

/// The value of a key that may be left out.
#[derive(Clone, Debug)]
pub(crate) enum Given<T> {
    Absent,
    /// There, but reported as wrong.
    Wrong,
    Here(At<T>),
}

impl<T> Given<T> {
    pub(crate) fn here(&self) -> Option<&At<T>> {
        match self {
            Self::Here(value) => Some(value),
            Self::Absent | Self::Wrong => None,
        }
    }

    pub(crate) fn is_absent(&self) -> bool {
        matches!(self, Self::Absent)
    }
}

/// The items of a list that could be read.
#[derive(Clone, Debug)]
pub(crate) struct List<T> {
    pub(crate) items: Vec<At<T>>,
    /// Whether the file has more items, reported as wrong.
    pub(crate) incomplete: bool,
}

impl<T> List<T> {
    pub(crate) fn is_empty(&self) -> bool {
        self.items.is_empty() && !self.incomplete
    }
}

impl<T: Read> Read for List<T> {
    fn read(node: &Node, place: &Place, mistakes: &mut Mistakes) -> Option<Self> {
        let nodes = match &node.content {
            Content::List(nodes) => nodes,
            Content::Broken => return None,
            _ => {
                mistakes.error(
                    place,
                    node.describe(),
                    "a list: one or more lines that start with -",
                );
                return None;
            }
        };
        let mut items = Vec::with_capacity(nodes.len());
        for (index, node) in nodes.iter().enumerate() {
            let place = Place { path: format!("{}[{index}]", place.path), ..place_of(node) };
            items.extend(T::read(node, &place, mistakes).map(|value| At { value, place }));
        }
        Some(Self { incomplete: items.len() < nodes.len(), items })
    }
}

impl<T: JsonSchema> JsonSchema for List<T> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        format!("List_of_{}", T::schema_name()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "array", "items": generator.subschema_for::<T>() })
    }
}

/// The entries of a mapping, each known and there at most once.
pub(crate) struct Keys<'a> {
    place: &'a Place,
    entries: Vec<(&'static str, Place, &'a Node)>,
    /// Keys that are meant by unknown ones, and therefore not missed.
    misspelled: Vec<&'static str>,
}

impl<'a> Keys<'a> {
    pub(crate) fn read(
        node: &'a Node,
        place: &'a Place,
        known: &[&'static str],
        mistakes: &mut Mistakes,
    ) -> Option<Self> {
        let nodes = match &node.content {
            Content::Mapping(nodes) => nodes,
            Content::Broken => return None,
            _ => {
                let expected = format!("a mapping with the keys {}", known.join(", "));
                mistakes.error(place, node.describe(), expected);
                return None;
            }
        };
        let mut keys =
            Self { place, entries: Vec::with_capacity(nodes.len()), misspelled: Vec::new() };
        for (key, value) in nodes.iter() {
            let Content::Scalar { text, .. } = &key.content else {
                let found = format!("{} as a key", key.kind());
                mistakes.error(
                    &Place { path: place.path.clone(), ..place_of(key) },
                    found,
                    "a word",
                );
                continue;
            };
            let key_place = Place { path: join(&place.path, &shown(text)), ..place_of(key) };
            let Some(name) = known.iter().find(|name| **name == text.as_str()) else {
                let meant = closest(text, known.iter().copied());
                keys.misspelled.extend(meant);
                let found = format!("the unknown key \"{}\"", shown(text));
                let keys = known.join(", ");
                let expected = match meant {
                    Some(name) => format!("\"{name}\", if that is meant; otherwise one of {keys}"),
                    None => format!("one of {keys}"),
                };
                mistakes.error(&key_place, found, expected);
                continue;
            };
            if let Some((_, first, _)) = keys.entries.iter().find(|(given, ..)| given == name) {
                mistakes.error(&key_place, format!("the key \"{name}\" again"), "each key once");
                mistakes.see_also(first);
                continue;
            }
            keys.entries.push((name, key_place, value));
        }
        Some(keys)
    }

    /// The value of a key that must be there.
    pub(crate) fn required<T: Read>(
        &self,
        name: &'static str,
        doc: &str,
        mistakes: &mut Mistakes,
    ) -> Option<At<T>> {
        match self.optional(name, mistakes) {
            Given::Here(value) => Some(value),
            Given::Wrong => None,
            Given::Absent => {
                let doc = paragraph(doc);
                let first_sentence =
                    doc.split_inclusive(". ").next().unwrap_or_default().trim_end();
                let expected = format!("`{name}`: {}", first_sentence.trim_end_matches('.'));
                mistakes.error(self.place, format!("no key \"{name}\""), expected);
                None
            }
        }
    }

    /// The value of a key that may be left out.
    pub(crate) fn optional<T: Read>(
        &self,
        name: &'static str,
        mistakes: &mut Mistakes,
    ) -> Given<T> {
        let Some((_, key, node)) = self.entries.iter().find(|(given, ..)| *given == name) else {
            let misspelled = self.misspelled.contains(&name);
            return if misspelled { Given::Wrong } else { Given::Absent };
        };
        let place = Place { path: key.path.clone(), ..place_of(node) };
        match T::read(node, &place, mistakes) {
            Some(value) => Given::Here(At { value, place }),
            None => Given::Wrong,
        }
    }

    /// The value of a key, or what `default` reads as.
    pub(crate) fn or_default<T: Read>(
        &self,
        name: &'static str,
        default: &Value,
        mistakes: &mut Mistakes,
    ) -> At<T> {
        if let Given::Here(value) = self.optional(name, mistakes) {
            return value;
        }
        let place = Place { path: join(&self.place.path, name), ..self.place.clone() };
        let node = match default {
            Value::String(text) => Node::scalar(text, false, &place),
            Value::Object(_) => Node::empty_mapping(&place),
            other => Node::scalar(&other.to_string(), true, &place),
        };
        let value = T::read(&node, &place, &mut Mistakes::default())
            .expect("defaults are valid: a test of `document` reads each of them");
        At { value, place }
    }
}

/// What the schema says about one key.
pub(crate) struct KeySchema {
    pub(crate) name: &'static str,
    pub(crate) doc: &'static str,
    pub(crate) schema: Schema,
    pub(crate) required: bool,
    pub(crate) default: Option<Value>,
}

/// The schema of a mapping that has these keys and no others.
pub(crate) fn mapping_schema(doc: &str, keys: Vec<KeySchema>) -> Schema {
    let mut properties = serde_json::Map::new();
    let mut required = Vec::new();
    for KeySchema { name, doc, mut schema, required: is_required, default } in keys {
        schema.insert("description".to_owned(), paragraph(doc).into());
        if let Some(default) = default {
            schema.insert("default".to_owned(), default);
        }
        properties.insert(name.to_owned(), schema.into());
        if is_required {
            required.push(name);
        }
    }
    json_schema!({
        "type": "object",
        "description": paragraph(doc),
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    })
}

/// Declares a mapping of the file: a struct, its reader and its schema.
///
/// A key is `required`, `optional`, or has a `default`, written as it would be in the file. All
/// values come with their place.
macro_rules! mapping {
    (
        $(#[doc = $doc:literal])*
        struct $type:ident {
            $($(#[doc = $key_doc:literal])* $presence:ident $key:ident: $value:ty $(= $default:tt)?,)*
        }
    ) => {
        $(#[doc = $doc])*
        #[derive(Clone, Debug)]
        pub(crate) struct $type {
            $($(#[doc = $key_doc])* pub(crate) $key: $crate::read::mapping!(@type $presence $value),)*
        }

        impl $crate::read::Read for $type {
            fn read(
                node: &$crate::yaml::Node,
                place: &$crate::mistake::Place,
                mistakes: &mut $crate::mistake::Mistakes,
            ) -> Option<Self> {
                let known = [$(stringify!($key)),*];
                let keys = $crate::read::Keys::read(node, place, &known, mistakes)?;
                Some(Self {
                    $($key: $crate::read::mapping!(
                        @read keys mistakes $presence $key (concat!($($key_doc),*)) $($default)?
                    ),)*
                })
            }
        }

        impl schemars::JsonSchema for $type {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
                $crate::read::mapping_schema(concat!($($doc),*), vec![
                    $($crate::read::KeySchema {
                        name: stringify!($key),
                        doc: concat!($($key_doc),*),
                        schema: generator.subschema_for::<$value>(),
                        required: $crate::read::mapping!(@required $presence),
                        default: $crate::read::mapping!(@default $($default)?),
                    },)*
                ])
            }
        }
    };
    (@type required $value:ty) => { Option<$crate::read::At<$value>> };
    (@type optional $value:ty) => { $crate::read::Given<$value> };
    (@type default $value:ty) => { $crate::read::At<$value> };
    (@read $keys:ident $mistakes:ident required $key:ident $doc:tt) => {
        $keys.required(stringify!($key), $doc, $mistakes)
    };
    (@read $keys:ident $mistakes:ident optional $key:ident $doc:tt) => {
        $keys.optional(stringify!($key), $mistakes)
    };
    (@read $keys:ident $mistakes:ident default $key:ident $doc:tt $default:tt) => {
        $keys.or_default(stringify!($key), &serde_json::json!($default), $mistakes)
    };
    (@required required) => { true };
    (@required $other:ident) => { false };
    (@default) => { None };
    (@default $default:tt) => { Some(serde_json::json!($default)) };
}
pub(crate) use mapping;

/// Where a node starts, without the path to it.
pub(crate) fn place_of(&Node { line, column, .. }: &Node) -> Place {
    Place { path: String::new(), line, column }
}

/// The path of `key` in the mapping at `path`.
pub(crate) fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// The lines of a doc comment as one paragraph.
fn paragraph(doc: &str) -> String {
    doc.split_whitespace().collect::<Vec<_>>().join(" ")
}
