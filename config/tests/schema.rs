//! The JSON schema and the reader come from the same declarations; here both are asked.

mod common;

use std::collections::BTreeSet;

use common::{FULL, mistakes};
use quic_lb_config::schema;
use serde_json::{Map, Value, json};

/// For each mapping of the schema: what the reader misses in an empty one is what the schema
/// requires, and what the reader offers instead of an unknown key is what the schema has.
#[test]
fn schema_and_reader_know_the_same_keys() {
    let mut mappings = 0;
    for Mapping { path, schema } in mappings_of(&schema()) {
        let properties: BTreeSet<_> =
            schema["properties"].as_object().expect("properties").keys().cloned().collect();
        let required: BTreeSet<_> =
            strings(&schema["required"]).into_iter().map(str::to_owned).collect();
        assert_eq!(schema["additionalProperties"], json!(false), "{path:?}");

        let here = yaml_path(&path);
        let unknown = document(&path, json!({ "zzzzzz": 1 }));
        let mistakes = mistakes(&unknown);
        let at = |wanted: &str| {
            mistakes
                .iter()
                .filter(|mistake| mistake.place.as_ref().is_some_and(|p| p.path == wanted))
                .collect::<Vec<_>>()
        };
        let unknown_key = [here.as_str(), "zzzzzz"].join(if here.is_empty() { "" } else { "." });
        let [mistake] = at(&unknown_key)[..] else { panic!("{unknown}: {mistakes:#?}") };
        let offered = mistake.expected.strip_prefix("one of ").expect("the keys");
        assert_eq!(offered.split(", ").map(str::to_owned).collect::<BTreeSet<_>>(), properties);

        let missed: BTreeSet<_> = at(&here)
            .iter()
            .filter_map(|mistake| mistake.found.strip_prefix("no key \"")?.strip_suffix('"'))
            .map(str::to_owned)
            .collect();
        assert_eq!(missed, required, "{here}");
        mappings += 1;
    }
    assert_eq!(mappings, 19);
}

/// Kinds that the schema excludes are mistakes to the reader, for every key.
#[test]
fn schema_and_reader_want_the_same_kinds() {
    let mut keys = 0;
    for Mapping { path, schema } in mappings_of(&schema()) {
        for (key, schema) in schema["properties"].as_object().expect("properties") {
            keys += 1;
            for wrong in
                [json!(null), json!(true), json!([1]), json!({"zzzzzz": 1}), json!(-1), json!("")]
            {
                if fits(&wrong, schema) {
                    continue;
                }
                let text = document(&path, Value::Object(Map::from_iter([(key.clone(), wrong)])));
                let here = yaml_path(&path);
                let at = [here.as_str(), key].join(if here.is_empty() { "" } else { "." });
                let reported = mistakes(&text).iter().any(|mistake| {
                    mistake.place.as_ref().is_some_and(|place| place.path.starts_with(&at))
                });
                assert!(reported, "{text}");
            }
        }
    }
    assert!(keys > 40, "{keys}");
}

#[test]
fn defaults_satisfy_their_own_schema_and_descriptions_are_there() {
    for Mapping { path, schema } in mappings_of(&schema()) {
        assert!(schema["description"].is_string(), "{path:?}");
        for (key, schema) in schema["properties"].as_object().expect("properties") {
            let description = schema["description"].as_str().unwrap_or_default();
            assert!(description.ends_with('.'), "{path:?} {key}: {description:?}");
            if let Some(default) = schema.get("default") {
                assert!(fits(default, schema), "{path:?} {key}: {default}");
            }
        }
    }
}

/// The defaults that the full example shows are those of the schema.
#[test]
fn the_full_example_shows_every_key_and_every_default() {
    let uncommented = FULL.replace("# ", "");
    for Mapping { schema, .. } in mappings_of(&schema()) {
        for (key, schema) in schema["properties"].as_object().expect("properties") {
            assert!(uncommented.contains(&format!("{key}:")), "{key}");
            match schema.get("default") {
                Some(Value::String(default)) => {
                    let shown = [format!("{key}: {default} "), format!("{key}: \"{default}\"")];
                    assert!(
                        shown.iter().any(|line| uncommented.contains(line)),
                        "{key}: {default}"
                    );
                }
                Some(Value::Number(default)) => {
                    assert!(
                        uncommented.contains(&format!("{key}: {default} ")),
                        "{key}: {default}"
                    );
                }
                _ => {}
            }
        }
    }
}

#[test]
fn masked_documents_of_the_examples_satisfy_the_schema() {
    let schema = schema();
    for entry in std::fs::read_dir(common::examples()).expect("the examples") {
        let loaded = quic_lb_config::load(entry.expect("an entry").path()).expect("an example");
        assert!(fits(&loaded.config.masked_document(), &schema));
    }
    assert!(!fits(&json!({ "listeners": [] }), &schema));
}

/// A mapping somewhere in the schema.
struct Mapping {
    /// The keys that lead there; those of lists end with `[]`.
    path: Vec<String>,
    schema: Value,
}

fn mappings_of(schema: &Value) -> Vec<Mapping> {
    fn walk(schema: &Value, path: &[String], mappings: &mut Vec<Mapping>) {
        let Some(properties) = schema.get("properties") else { return };
        mappings.push(Mapping { path: path.to_vec(), schema: schema.clone() });
        for (key, schema) in properties.as_object().expect("properties") {
            let (key, schema) = match schema.get("items") {
                Some(items) => (format!("{key}[]"), items),
                None => (key.clone(), schema),
            };
            walk(schema, &[path, &[key]].concat(), mappings);
        }
    }
    let mut mappings = Vec::new();
    walk(schema, &[], &mut mappings);
    mappings
}

fn yaml_path(path: &[String]) -> String {
    path.join(".").replace("[]", "[0]")
}

/// A document with nothing but `inner` at `path`. JSON is YAML.
fn document(path: &[String], inner: Value) -> String {
    let wrap = |inner: Value, key: &String| {
        let (key, value) = match key.strip_suffix("[]") {
            Some(key) => (key, json!([inner])),
            None => (key.as_str(), inner),
        };
        Value::Object(Map::from_iter([(key.to_owned(), value)]))
    };
    path.iter().rev().fold(inner, wrap).to_string()
}

fn strings(value: &Value) -> Vec<&str> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// The part of JSON schema that ours uses; patterns only as far as they exclude the empty text.
fn fits(value: &Value, schema: &Value) -> bool {
    let known = [
        "$schema",
        "additionalProperties",
        "default",
        "description",
        "enum",
        "items",
        "maximum",
        "minLength",
        "minimum",
        "pattern",
        "patternProperties",
        "properties",
        "required",
        "title",
        "type",
    ];
    for keyword in schema.as_object().expect("a schema").keys() {
        assert!(known.contains(&keyword.as_str()), "{keyword} is not judged here");
    }
    // Words of several types.
    if let (None, Some(words)) = (schema.get("type"), schema["enum"].as_array()) {
        return words.contains(value);
    }
    match schema["type"].as_str().expect("a type") {
        "object" => {
            let Some(entries) = value.as_object() else { return false };
            let of_pattern =
                schema["patternProperties"].as_object().and_then(|p| p.values().next());
            strings(&schema["required"]).iter().all(|key| entries.contains_key(*key))
                && entries.iter().all(|(key, value)| match schema["properties"].get(key) {
                    Some(schema) => fits(value, schema),
                    None => of_pattern.is_some_and(|s| key.len() == 1 && fits(value, s)),
                })
        }
        "array" => value
            .as_array()
            .is_some_and(|items| items.iter().all(|item| fits(item, &schema["items"]))),
        "integer" => {
            let (min, max) = (schema["minimum"].as_i64(), schema["maximum"].as_i64());
            value.as_i64().is_some_and(|number| {
                min.is_none_or(|min| min <= number) && max.is_none_or(|max| number <= max)
            })
        }
        "number" => {
            let (min, max) = (schema["minimum"].as_f64(), schema["maximum"].as_f64());
            value.as_f64().is_some_and(|number| {
                min.is_none_or(|min| min <= number) && max.is_none_or(|max| number <= max)
            })
        }
        "boolean" => value.is_boolean(),
        "string" => value.as_str().is_some_and(|text| {
            let words = schema.get("enum").map(strings);
            words.is_none_or(|words| words.contains(&text))
                && !(text.is_empty()
                    && (schema.get("pattern").is_some() || schema.get("minLength").is_some()))
        }),
        other => panic!("{other} is not judged here"),
    }
}
