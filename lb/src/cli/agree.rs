//! `agree`: whether the balancers of a fleet decide alike, and where they differ.

use std::{
    collections::BTreeSet,
    io::{self, Write},
};

use serde_json::{Map, Value, json};

use super::{
    admin::{self, Balancer},
    args::AgreeArgs,
    outcome::{Failure, print_to_stderr},
};
use crate::words::count;

/// More are counted and not told: nobody reads them.
const MAX_TOLD: usize = 50;
/// How much of a value is told, in characters.
const MAX_VALUE: usize = 120;

/// What is kept by names, for so many steps down; everything else is a fact with a word of ours.
const NAMED: [(&str, u8); 5] =
    [("pools", 1), ("backends", 1), ("quic_lb", 1), ("listeners", 1), ("states", 2)];

/// A place where balancers differ.
#[derive(Debug, PartialEq, Eq)]
struct Difference {
    /// Such as `pools[web].backends[a].weight`.
    at: String,
    /// What is there, of each balancer in the order in which they were given.
    values: Vec<Option<Value>>,
}

pub(super) fn agree(args: &AgreeArgs, out: &mut impl Write) -> Result<(), Failure> {
    let balancers = args.balancers.iter();
    let balancers = balancers.map(|place| Balancer::of(place.clone(), args.token_file.as_ref()));
    let balancers: Vec<_> = balancers.collect::<Result<_, _>>()?;
    let (mut names, mut answers) = (vec![], vec![]);
    for (place, answer) in args.balancers.iter().zip(admin::run(ask(balancers))?) {
        match answer {
            Ok(answer) => {
                names.push(place.to_string());
                answers.push(answer);
            }
            Err(failure) => super::outcome::report_failure(failure),
        }
    }
    let differences = differences(&answers);
    if args.json {
        let json = serde_json::to_string_pretty(&facts(&names, &answers, &differences));
        writeln!(out, "{}", json.map_err(Failure::other)?)?;
    } else if names.len() > 1 {
        tell(&names, &answers, &differences, out)?;
    }
    out.flush()?;
    if names.len() < args.balancers.len() {
        let asked = count(args.balancers.len(), "balancer");
        print_to_stderr(format_args!("quic-lb: {} of {asked} answered", names.len()));
        return Err(Failure::Told);
    }
    if differences.is_empty() { Ok(()) } else { Err(Failure::No) }
}

/// All at a time: who does not answer holds up the others no longer than that takes.
async fn ask(balancers: Vec<Balancer>) -> Result<Vec<Result<Value, Failure>>, Failure> {
    let ask = |balancer: Balancer| async move {
        let answer = balancer.get("/api/v1/decisions").await;
        let read = |body: String| serde_json::from_str(&body).map_err(io::Error::other);
        answer.and_then(read).map_err(|error| balancer.refused(&error))
    };
    let asked: Vec<_> = balancers.into_iter().map(|of| tokio::spawn(ask(of))).collect();
    let mut answers = Vec::with_capacity(asked.len());
    for answer in asked {
        answers.push(answer.await.map_err(Failure::other)?);
    }
    Ok(answers)
}

fn differences(answers: &[Value]) -> Vec<Difference> {
    let mut found = vec![];
    let part = |name: &str| answers.iter().map(|answer| answer.get(name)).collect::<Vec<_>>();
    // What decisions follow from needs no word before it.
    compare("", 0, &part("decisions"), &mut found);
    compare("states", named_below("states"), &part("states"), &mut found);
    let commands = part("commands");
    let given: BTreeSet<_> =
        commands.iter().flatten().filter_map(|of| of.as_object()).flat_map(Map::keys).collect();
    for backend in given {
        let values: Vec<_> = commands.iter().map(|of| of.and_then(|of| of.get(backend))).collect();
        // Who gave it, and when, is for people.
        let mut wanted = values.iter().map(|command| command.map(|command| &command["wanted"]));
        let first = wanted.next();
        if wanted.any(|wanted| Some(wanted) != first) {
            let values = values.into_iter().map(Option::<&Value>::cloned).collect();
            found.push(Difference { at: format!("commands[{backend}]"), values });
        }
    }
    found
}

fn compare(at: &str, named: u8, values: &[Option<&Value>], found: &mut Vec<Difference>) {
    if values.windows(2).all(|pair| pair[0] == pair[1]) {
        return;
    }
    let maps = values.iter().map(|value| value.as_ref()?.as_object());
    let Some(maps) = maps.collect::<Option<Vec<_>>>() else {
        let values = values.iter().map(|value| value.cloned()).collect();
        found.push(Difference { at: at.to_owned(), values });
        return;
    };
    let keys: BTreeSet<_> = maps.iter().flat_map(|map| map.keys()).collect();
    for key in keys {
        let values: Vec<_> = maps.iter().map(|map| map.get(key)).collect();
        let (at, below) = match (named, at) {
            (1.., at) => (format!("{at}[{key}]"), named - 1),
            (0, "") => (key.clone(), named_below(key)),
            (0, at) => (format!("{at}.{key}"), named_below(key)),
        };
        compare(&at, below, &values, found);
    }
}

fn named_below(key: &str) -> u8 {
    NAMED.into_iter().find(|(name, _)| *name == key).map_or(0, |(_, steps)| steps)
}

fn tell(
    names: &[String],
    answers: &[Value],
    differences: &[Difference],
    out: &mut impl Write,
) -> Result<(), Failure> {
    let balancers = count(names.len(), "balancer");
    if differences.is_empty() {
        let digest = answers.first().and_then(|answer| answer["digest"].as_str());
        return Ok(writeln!(out, "{balancers} agree; digest {}", digest.unwrap_or("unknown"))?);
    }
    for Difference { at, values } in differences.iter().take(MAX_TOLD) {
        writeln!(out, "{at}")?;
        for (value, names) in by_value(names, values) {
            writeln!(out, "    {}: {value}", names.join(", "))?;
        }
    }
    if differences.len() > MAX_TOLD {
        writeln!(out, "and {} more", differences.len() - MAX_TOLD)?;
    }
    Ok(writeln!(out, "{balancers} differ in {}", count(differences.len(), "place"))?)
}

/// Who has which value, in the order in which they were given.
fn by_value<'a>(names: &'a [String], values: &[Option<Value>]) -> Vec<(String, Vec<&'a str>)> {
    let mut groups: Vec<(String, Vec<&str>)> = vec![];
    for (name, value) in names.iter().zip(values) {
        let value = value.as_ref().map_or("nothing".to_owned(), Value::to_string);
        match groups.iter_mut().find(|(of, _)| *of == value) {
            Some((_, names)) => names.push(name),
            None => groups.push((value, vec![name])),
        }
    }
    for (value, _) in &mut groups {
        *value = shortened(value);
    }
    groups
}

fn shortened(value: &str) -> String {
    let value = value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).unwrap_or(value);
    match value.char_indices().nth(MAX_VALUE) {
        Some((end, _)) => format!("{}…", &value[..end]),
        None => value.to_owned(),
    }
}

fn facts(names: &[String], answers: &[Value], differences: &[Difference]) -> Value {
    let digests: Map<_, _> =
        names.iter().zip(answers).map(|(name, of)| (name.clone(), of["digest"].clone())).collect();
    let difference = |Difference { at, values }: &Difference| {
        let values: Map<_, _> =
            names.iter().zip(values).map(|(name, value)| (name.clone(), json!(value))).collect();
        json!({ "at": at, "values": values })
    };
    json!({
        "agree": differences.is_empty(),
        "digests": digests,
        "differences": differences.iter().map(difference).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(weight: u32, state: &str, commands: Value) -> Value {
        let backends = json!({ "a": { "weight": weight }, "b.c": { "weight": 1 } });
        json!({
            "digest": "0123",
            "decisions": { "pools": { "web": { "backends": backends, "hash": "dcid" } } },
            "states": { "web": { "a": state, "b.c": "active" } },
            "commands": commands,
        })
    }

    fn places(answers: &[Value]) -> Vec<String> {
        differences(answers).into_iter().map(|difference| difference.at).collect()
    }

    #[test]
    fn each_difference_has_its_place_and_says_who_has_what() {
        let none = json!({});
        let same = answer(1, "active", none.clone());
        assert_eq!(places(&[same.clone(), same.clone(), same.clone()]), [""; 0]);
        let drained = json!({ "web/a": { "wanted": "draining", "by": "root" } });
        let other = answer(2, "draining", drained.clone());
        let all = [same.clone(), other, same];
        assert_eq!(
            places(&all),
            ["pools[web].backends[a].weight", "states[web][a]", "commands[web/a]"]
        );
        let found = differences(&all);
        assert_eq!(found[2].values, [None, Some(drained["web/a"].clone()), None]);
        let names = ["x", "y", "z"].map(str::to_owned);
        let mut told = vec![];
        tell(&names, &all, &found[..2], &mut told).unwrap();
        let told = String::from_utf8(told).unwrap();
        let lines: Vec<_> = told.lines().collect();
        assert_eq!(
            lines,
            [
                "pools[web].backends[a].weight",
                "    x, z: 1",
                "    y: 2",
                "states[web][a]",
                "    x, z: active",
                "    y: draining",
                "3 balancers differ in 2 places",
            ]
        );
    }

    /// Who gave a command, and when, is for people: the same command, given to each balancer, is the same.
    #[test]
    fn commands_are_compared_by_what_they_say() {
        let given = |by: &str, time: u64, wanted: &str| {
            let command = json!({ "wanted": wanted, "by": by, "reason": by, "unix_time": time });
            answer(1, "draining", json!({ "web/b.c": command }))
        };
        assert_eq!(places(&[given("x", 1, "draining"), given("y", 2, "draining")]), [""; 0]);
        assert_eq!(
            places(&[given("x", 1, "draining"), given("x", 1, "active")]),
            ["commands[web/b.c]"]
        );
    }

    #[test]
    fn no_more_is_told_than_somebody_reads() {
        let many = |weight: u32| {
            let backends = (0..500).map(|n| (n.to_string(), json!({ "weight": weight })));
            let backends: Map<_, _> = backends.collect();
            json!({ "decisions": { "pools": { "web": { "backends": backends } } } })
        };
        let all = [many(1), many(2)];
        let mut told = vec![];
        let names = ["x", "y"].map(str::to_owned);
        tell(&names, &all, &differences(&all), &mut told).unwrap();
        let told = String::from_utf8(told).unwrap();
        assert_eq!(told.lines().count(), 3 * MAX_TOLD + 2, "{told}");
        assert!(told.ends_with("and 450 more\n2 balancers differ in 500 places\n"), "{told}");
    }
}
