//! `rotate`: how far a fleet has come with new configurations of connection IDs, or a new key of tokens, and what is next. It does
//! nothing itself: files are where they are, on balancers and servers, and whoever distributes them goes on when this says so.

use std::{
    collections::BTreeSet,
    fmt::{self, Write as _},
    io::{self, Write},
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{
    admin::{self, Balancer},
    args::{FleetArgs, Rotate, RotateIdsArgs, RotateTokensArgs},
    outcome::{Failure, print_to_stderr},
};

/// From one look at the fleet to the next.
const LOOK: Duration = Duration::from_millis(250);
/// How many looks in a row may fail: a balancer may be restarted meanwhile.
const FAILURES: u32 = 60;
/// From one line about what is waited for to the next.
const TELL: Duration = Duration::from_secs(10);
/// A connection that was not heard for so long is over; as the balancers have it.
const QUIET: f64 = 8.;

/// The one after which it is over.
const LAST_STEP: u8 = 4;

/// How far it has come.
#[derive(Debug, PartialEq, Eq)]
struct Rotation {
    /// What is rotated.
    title: String,
    /// What each balancer has, in the order in which they were given.
    balancers: Vec<String>,
    /// In their order; none where nothing is being rotated.
    steps: Vec<Step>,
    /// What is to be done, or waited for.
    next: String,
}

#[derive(Debug, PartialEq, Eq)]
struct Step {
    /// What holds when it is done.
    holds: String,
    is_done: bool,
    /// What was seen.
    seen: String,
}

impl Rotation {
    /// The first so many steps are done.
    fn done(&self) -> usize {
        self.steps.iter().take_while(|step| step.is_done).count()
    }

    fn is_over(&self) -> bool {
        self.done() == self.steps.len()
    }

    /// Whether so many steps are done. Where nothing is being rotated, none is but the last: the first may not have begun, and whoever
    /// waits for it would go on to servers whose connection IDs no balancer reads.
    fn has_reached(&self, step: u8) -> bool {
        match self.steps.is_empty() {
            true => step >= LAST_STEP,
            false => self.done() >= usize::from(step),
        }
    }
}

impl fmt::Display for Rotation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.title)?;
        self.balancers.iter().try_for_each(|balancer| writeln!(f, "  {balancer}"))?;
        let done = self.done();
        for (nth, Step { holds, seen, .. }) in self.steps.iter().enumerate() {
            let state = match nth.cmp(&done) {
                std::cmp::Ordering::Less => "done",
                std::cmp::Ordering::Equal => "to do",
                std::cmp::Ordering::Greater => "later",
            };
            writeln!(f, "  {}. {holds}: {state}{seen}", nth + 1)?;
        }
        writeln!(f, "next: {}", self.next)
    }
}

/// What the balancers were asked for.
#[derive(Debug)]
struct Seen {
    /// The balancer, as it was typed.
    name: String,
    rotation: Value,
    decisions: Value,
    backends: Value,
}

pub(super) fn rotate(what: &Rotate, out: &mut impl Write) -> Result<(), Failure> {
    match what {
        Rotate::Ids(RotateIdsArgs { pool, fleet }) => {
            follow(fleet, out, |seen| ids(pool, seen, fleet.force))
        }
        Rotate::Tokens(RotateTokensArgs { key, fleet }) => {
            follow(fleet, out, |seen| tokens(*key, seen, fleet.force))
        }
    }
}

/// Tells how far it is, at once or when the step that is waited for is done.
fn follow(
    args: &FleetArgs,
    out: &mut impl Write,
    judge: impl Fn(&[Seen]) -> Result<Rotation, String>,
) -> Result<(), Failure> {
    let balancer = |place: &super::args::AdminPlace| {
        let balancer = Balancer::of(place.clone(), args.token_file.as_ref())?;
        Ok((place.to_string(), balancer))
    };
    let balancers = args.balancers.iter().map(balancer).collect::<Result<Vec<_>, Failure>>()?;
    let rotation = admin::run(async {
        let begin = Instant::now();
        let (mut told_at, mut failures) = (begin, 0);
        loop {
            match look(&balancers, args.force).await {
                Ok(seen) => {
                    failures = 0;
                    let rotation = judge(&seen).map_err(Failure::other)?;
                    if args.until.is_none_or(|step| rotation.has_reached(step)) {
                        return Ok(rotation);
                    }
                    let is_late = args.timeout.is_some_and(|timeout| begin.elapsed() >= timeout);
                    if is_late {
                        return Ok(rotation);
                    }
                    if told_at.elapsed() >= TELL {
                        told_at = Instant::now();
                        print_to_stderr(format_args!("next: {}", rotation.next));
                    }
                }
                Err(failure) => {
                    failures += 1;
                    if args.until.is_none() || failures == FAILURES {
                        return Err(failure);
                    }
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    })?;
    write!(out, "{rotation}")?;
    out.flush()?;
    let is_done = args.until.map_or(rotation.is_over(), |step| rotation.has_reached(step));
    if is_done { Ok(()) } else { Err(Failure::No) }
}

/// Looks at all balancers; if it is forced to, at those that answer.
async fn look(balancers: &[(String, Balancer)], forced: bool) -> Result<Vec<Seen>, Failure> {
    let mut all = Vec::with_capacity(balancers.len());
    let mut silent = None;
    for (name, balancer) in balancers {
        match look_at(name, balancer).await {
            Ok(seen) => all.push(seen),
            Err(failure) if forced => silent = Some(failure),
            Err(failure) => return Err(failure),
        }
    }
    match silent {
        Some(failure) if all.is_empty() => Err(failure),
        _ => Ok(all),
    }
}

async fn look_at(name: &str, balancer: &Balancer) -> Result<Seen, Failure> {
    let ask = async |path| {
        let answer = balancer.get(path).await;
        let read = |body: String| serde_json::from_str(&body).map_err(io::Error::other);
        answer.and_then(read).map_err(|error| balancer.refused(&error))
    };
    Ok(Seen {
        name: name.to_owned(),
        rotation: ask("/api/v1/rotation").await?,
        decisions: ask("/api/v1/decisions").await?,
        backends: ask("/api/v1/backends").await?,
    })
}

/// The configurations of connection IDs of a pool, as one balancer has them.
struct Configs<'a> {
    of: &'a Seen,
    /// In the order of the file: the last is what servers make connection IDs by.
    ids: Vec<u64>,
}

impl<'a> Configs<'a> {
    fn of(of: &'a Seen, pool: &str) -> Result<Self, String> {
        let rows = rows(&of.rotation).filter(|row| row["pool"] == *pool);
        let ids: Vec<_> = rows.filter_map(|row| row["config_id"].as_u64()).collect();
        if of.decisions["decisions"]["pools"].get(pool).is_none() {
            return Err(format!("no listener of {} leads to a pool {pool}", of.name));
        }
        if ids.is_empty() {
            return Err(format!("pool {pool} has no quic_lb at {}", of.name));
        }
        Ok(Self { of, ids })
    }

    fn newest(&self) -> u64 {
        self.ids.last().copied().unwrap_or_default()
    }

    fn in_words(&self, pool: &str) -> String {
        let of_pool = || rows(&self.of.rotation).filter(|row| row["pool"] == *pool);
        let in_use = of_pool().filter(|row| row["connections"].as_u64() > Some(0));
        let in_use = in_use.map(|row| format!("{} with {}", row["connections"], row["config_id"]));
        let in_use: Vec<_> = in_use.collect();
        let in_use = if in_use.is_empty() { "none".to_owned() } else { in_use.join(", ") };
        format!(
            "{}: configurations {}; connections, about: {in_use}",
            self.of.with_digest(),
            list(&self.ids)
        )
    }
}

impl Seen {
    fn with_digest(&self) -> String {
        format!("{} (digest {})", self.name, self.decisions["digest"].as_str().unwrap_or("unknown"))
    }
}

/// How far a pool has come with a new configuration of connection IDs: balancers first, then servers. Servers that nothing was
/// heard of count as those that make them by it if somebody vouches for them.
fn ids(pool: &str, seen: &[Seen], vouched: bool) -> Result<Rotation, String> {
    let all: Vec<_> = seen.iter().map(|of| Configs::of(of, pool)).collect::<Result<_, _>>()?;
    let newest = newest(&all)?;
    let balancers: Vec<_> = all.iter().map(|of| of.in_words(pool)).collect();
    let old: BTreeSet<u64> = all.iter().flat_map(|of| of.ids.iter().copied()).collect();
    let old: Vec<_> = old.into_iter().filter(|id| *id != newest).collect();
    let with = |id: u64| all.iter().filter(move |of| of.ids.contains(&id));
    let shape = |of: &Configs<'_>| {
        let configs = &of.of.decisions["decisions"]["pools"][pool]["quic_lb"];
        configs[newest.to_string()].clone()
    };
    let mut shapes = with(newest).map(shape);
    let first = shapes.next();
    if shapes.any(|shape| Some(shape) != first) {
        return Err(format!(
            "configuration {newest} of pool {pool} is not the same at all balancers: see `quic-lb agree`"
        ));
    }
    if old.is_empty() {
        let free = (0..7).find(|id| *id != newest).unwrap_or_default();
        let shape = first.unwrap_or_default();
        let (server_id, nonce) = (&shape["server_id_length"], &shape["nonce_length"]);
        return Ok(Rotation {
            title: format!("pool {pool}: every balancer has configuration {newest} alone"),
            balancers,
            steps: vec![],
            next: format!(
                "to begin a rotation, put {{ config_id: {free}, server_id_length: {server_id}, nonce_length: {nonce}, key_file: … }} at the end of quic_lb on all balancers \
                 (`quic-lb keygen` makes keys), with server IDs for it where backends have `server_ids`, and reload them"
            ),
        });
    }
    let without: Vec<_> = all.iter().filter(|of| !of.ids.contains(&newest)).collect();
    let servers = Servers::of(pool, newest, seen);
    if let Some(early) = servers.begun.first()
        && let Some(blind) = without.first()
    {
        return Err(format!(
            "server {early} makes connection IDs by configuration {newest} of pool {pool}, which {} cannot read: put it there at once, and reload",
            blind.of.name
        ));
    }
    let used = |of: &Seen| {
        rows(&of.rotation).any(|row| {
            let is_old = row["pool"] == *pool && row["config_id"].as_u64() != Some(newest);
            is_old && row["unused"] != true
        })
    };
    let using: Vec<_> = seen.iter().filter(|of| used(of)).map(|of| of.name.clone()).collect();
    let left = all.iter().filter(|of| of.ids.len() > 1);
    let left: Vec<_> = left.map(|of| of.of.name.clone()).collect();
    let without: Vec<_> = without.iter().map(|of| of.of.name.clone()).collect();
    let olds = list(&old);
    let steps = vec![
        Step {
            holds: format!("balancers read configuration {newest}"),
            is_done: without.is_empty(),
            seen: but(&without),
        },
        Step {
            holds: format!("servers make connection IDs by it{}", servers.seen()),
            is_done: servers.waiting.is_empty() && (vouched || servers.unheard.is_empty()),
            seen: but(&[&servers.waiting[..], &servers.unheard[..]].concat()),
        },
        Step {
            holds: format!("nobody uses configuration {olds}{}", servers.left()),
            is_done: using.is_empty(),
            seen: but(&using),
        },
        Step {
            holds: format!("balancers do not have configuration {olds} any more"),
            is_done: left.is_empty(),
            seen: but(&left),
        },
    ];
    let rotation = Rotation {
        title: format!("pool {pool}: connection IDs from configuration {olds} to {newest}"),
        balancers,
        steps,
        next: String::new(),
    };
    let next = match rotation.done() {
        0 => format!(
            "put configuration {newest} at the end of quic_lb at {}, and reload; servers come later",
            without.join(", ")
        ),
        1 if servers.waiting.is_empty() => format!(
            "nothing shows yet that these servers make connection IDs by configuration {newest}: {}; reload them and wait for traffic or a check, or vouch for them with --force",
            servers.unheard.join(", ")
        ),
        1 => format!("reload the servers {}", servers.waiting.join(", ")),
        2 => "wait: connections that say nothing for 8 s are taken for over; their servers' idle timeout is the safe time"
            .to_owned(),
        3 => format!(
            "take configuration {olds} out of quic_lb at {}, and reload; then out of the servers' files",
            left.join(", ")
        ),
        _ => "nothing".to_owned(),
    };
    Ok(Rotation { next, ..rotation })
}

/// The configuration that servers are to make connection IDs by: the last, at balancers that know it.
fn newest(all: &[Configs<'_>]) -> Result<u64, String> {
    let knows_all = |of: &&Configs<'_>| all.iter().all(|other| of.ids.contains(&other.newest()));
    let mut newest: Vec<_> = all.iter().filter(knows_all).map(Configs::newest).collect();
    newest.sort_unstable();
    newest.dedup();
    match newest[..] {
        [newest] => Ok(newest),
        _ => {
            let lasts = all.iter().map(|of| format!("{} at {}", of.newest(), of.of.name));
            let lasts: Vec<_> = lasts.collect();
            Err(format!("balancers have different newest configurations: {}", lasts.join(", ")))
        }
    }
}

/// What servers make connection IDs by, for all that was heard.
struct Servers {
    /// Those that make them by the newest configuration.
    begun: Vec<String>,
    /// Those that are heard, and do not.
    waiting: Vec<String>,
    /// Those that get new connections and were not heard with it: without traffic nobody knows what they would do.
    unheard: Vec<String>,
    /// Connections with old ones, and when one was heard last.
    old: u64,
    heard: Option<f64>,
}

impl Servers {
    fn of(pool: &str, newest: u64, seen: &[Seen]) -> Self {
        let mut names: Vec<&str> = vec![];
        let backends = || seen.iter().flat_map(|of| rows(&of.backends));
        let of_pool = || backends().filter(|of| of["pool"] == *pool && of["state"] != "down");
        for backend in of_pool() {
            let name = backend["name"].as_str().unwrap_or_default();
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let mut servers =
            Self { begun: vec![], waiting: vec![], unheard: vec![], old: 0, heard: None };
        for name in names {
            let (mut new, mut old): (Option<f64>, Option<f64>) = (None, None);
            // Checks show it of those without traffic too.
            let shown = |of: &Value| of["check"]["config_id"].as_u64();
            let of_server = || of_pool().filter(|of| of["name"] == *name);
            let shows_new = of_server().any(|of| shown(of) == Some(newest));
            let shows_old = of_server().any(|of| shown(of).is_some_and(|id| id != newest));
            let earliest = |a: Option<f64>, b: f64| Some(a.map_or(b, |a| a.min(b)));
            for backend in of_server() {
                let configs = backend["live"]["by_config_id"].as_object().into_iter().flatten();
                for (id, of_config) in configs {
                    let Some(heard) = of_config["heard_seconds_ago"].as_f64() else { continue };
                    if *id == newest.to_string() {
                        new = earliest(new, heard);
                    } else if id != "none" {
                        old = earliest(old, heard);
                        if heard < QUIET {
                            servers.old += of_config["connections"].as_u64().unwrap_or_default();
                            servers.heard = earliest(servers.heard, heard);
                        }
                    }
                }
            }
            let is_heard = new.is_some_and(|new| new < QUIET);
            let has_begun = is_heard
                || !shows_old
                    && (shows_new || new.is_some_and(|new| old.is_none_or(|old| new < old)));
            if has_begun && (is_heard || shows_new) {
                servers.begun.push(name.to_owned());
            }
            if !has_begun && (shows_old || old.is_some_and(|old| old < QUIET)) {
                servers.waiting.push(name.to_owned());
            } else if !has_begun && of_server().any(|of| of["state"] != "draining") {
                servers.unheard.push(name.to_owned());
            }
        }
        servers
    }

    fn seen(&self) -> String {
        match self.begun.is_empty() {
            true => String::new(),
            false => format!(" ({} do)", self.begun.join(", ")),
        }
    }

    fn left(&self) -> String {
        let Self { old, heard, .. } = self;
        heard.map_or(String::new(), |heard| {
            format!(" (about {old} connections, the last heard {heard:.0} s ago)")
        })
    }
}

/// The sequence number of a key of tokens, and its check value.
type Key = (u64, Value);

/// How far a fleet has come with a key of tokens: servers first, then balancers. Servers that are not asked count as those that
/// honour it if somebody vouches for them.
fn tokens(key: u8, seen: &[Seen], vouched: bool) -> Result<Rotation, String> {
    let keys = |of: &Seen| -> Result<Vec<Key>, String> {
        let keys = of.decisions["decisions"]["retry"]["keys"].as_array();
        let Some(keys) = keys else {
            return Err(format!("no listener of {} asks for proof of addresses", of.name));
        };
        let key = |key: &Value| Some((key["sequence"].as_u64()?, key["key"].clone()));
        Ok(keys.iter().filter_map(key).collect())
    };
    let all: Vec<_> =
        seen.iter().map(|of| Ok((of, keys(of)?))).collect::<Result<Vec<_>, String>>()?;
    let wanted = u64::from(key);
    let value = |keys: &[Key]| {
        keys.iter().find(|(sequence, _)| *sequence == wanted).map(|(_, value)| value.clone())
    };
    let values: Vec<_> = all.iter().filter_map(|(_, keys)| value(keys)).collect();
    if values.windows(2).any(|pair| pair[0] != pair[1]) {
        return Err(format!("key {key} is not the same at all balancers: see `quic-lb agree`"));
    }
    let named = |holds: &dyn Fn(&[Key]) -> bool| {
        let missing = all.iter().filter(|(_, keys)| !holds(keys));
        missing.map(|(of, _)| of.name.clone()).collect::<Vec<_>>()
    };
    let without = named(&|keys| value(keys).is_some());
    let behind = named(&|keys| keys.first().is_some_and(|(first, _)| *first == wanted));
    let left = named(&|keys| keys.len() < 2);
    let (mut refusing, mut unknown) = (BTreeSet::new(), BTreeSet::new());
    for backend in seen.iter().flat_map(|of| rows(&of.backends)).filter(|of| of["state"] != "down")
    {
        let Some(keys) = backend["token_keys"].as_object() else { continue };
        let name = |part: &str| backend[part].as_str().unwrap_or_default();
        let name = format!("{}/{}", name("pool"), name("name"));
        match keys.get(&key.to_string()).and_then(Value::as_bool) {
            Some(true) => {}
            Some(false) => drop(refusing.insert(name)),
            None => drop(unknown.insert(name)),
        }
    }
    for (pool, of) in
        seen.iter().filter_map(|of| of.decisions["decisions"]["pools"].as_object()).flatten()
    {
        // Its clients are sent Retries, and its servers are not asked.
        if of["honours_tokens"] == "true" {
            unknown.insert(format!("all of pool {pool}, where honours_tokens is true"));
        }
    }
    let refusing: Vec<_> = refusing.into_iter().collect();
    let unknown: Vec<_> = unknown.into_iter().collect();
    let balancers = all.iter().map(|(of, keys)| {
        let keys: Vec<_> = keys.iter().map(|(sequence, _)| *sequence).collect();
        format!("{}: keys {}", of.with_digest(), list(&keys))
    });
    let balancers = balancers.collect();
    let steps = vec![
        Step {
            holds: format!("balancers open tokens of key {key}"),
            is_done: without.is_empty(),
            seen: but(&without),
        },
        Step {
            holds: format!("servers honour tokens of key {key}"),
            is_done: refusing.is_empty() && (vouched || unknown.is_empty()),
            seen: but(&[&refusing[..], &unknown[..]].concat()),
        },
        Step {
            holds: format!("balancers make tokens with key {key}"),
            is_done: behind.is_empty(),
            seen: but(&behind),
        },
        Step {
            holds: "balancers have no other key any more".to_owned(),
            is_done: left.is_empty(),
            seen: but(&left),
        },
    ];
    let title = format!("tokens: key {key}");
    let rotation = Rotation { title, balancers, steps, next: String::new() };
    let next = match rotation.done() {
        0 => format!(
            "put key {key} at the end of retry.keys on servers, then at {}, and reload",
            without.join(", ")
        ),
        1 if refusing.is_empty() => format!(
            "nothing shows yet that these honour tokens of key {key}: {}; wait until they were asked, or vouch for them with --force",
            unknown.join(", ")
        ),
        1 => format!(
            "give key {key} to the servers {}, and reload them; balancers look again within seconds",
            refusing.join(", ")
        ),
        2 => format!("put key {key} in front of retry.keys at {}, and reload", behind.join(", ")),
        3 => format!(
            "after a minute, take the other keys out of retry.keys at {}, then on servers; in the format shared_state some may be wanted in reserve",
            left.join(", ")
        ),
        _ => "nothing".to_owned(),
    };
    Ok(Rotation { next, ..rotation })
}

fn rows(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// Where it does not hold yet.
fn but(names: &[String]) -> String {
    if names.is_empty() { String::new() } else { format!(", but for {}", names.join(", ")) }
}

fn list(ids: &[u64]) -> String {
    let mut text = String::new();
    for (nth, id) in ids.iter().enumerate() {
        // Writing to a string cannot fail.
        let _ = write!(text, "{}{id}", if nth == 0 { "" } else { ", " });
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A balancer with these configurations of connection IDs; of each server is told when it was heard with which.
    fn balancer(name: &str, configs: &[u64], servers: &[(&str, &[(u64, f64)])]) -> Seen {
        let heard = |id: u64| {
            let of_id = servers.iter().flat_map(|(_, heard)| *heard).filter(|(of, _)| *of == id);
            of_id.map(|(_, heard)| *heard).fold(f64::INFINITY, f64::min)
        };
        let row =
            |id: &u64| json!({ "pool": "web", "config_id": id, "unused": heard(*id) >= QUIET });
        let shape = |id: &u64| {
            (id.to_string(), json!({ "server_id_length": 2, "nonce_length": 6, "key": id }))
        };
        let quic_lb: serde_json::Map<_, _> = configs.iter().map(shape).collect();
        let server = |(name, heard): &(&str, &[(u64, f64)])| {
            let config = |(id, heard): &(u64, f64)| {
                (id.to_string(), json!({ "connections": 3, "heard_seconds_ago": heard }))
            };
            let by_config: serde_json::Map<_, _> = heard.iter().map(config).collect();
            json!({ "pool": "web", "name": name, "state": "active", "live": { "by_config_id": by_config } })
        };
        Seen {
            name: name.to_owned(),
            rotation: configs.iter().map(row).collect(),
            decisions: json!({ "decisions": { "pools": { "web": { "quic_lb": quic_lb } } } }),
            backends: servers.iter().map(server).collect(),
        }
    }

    #[test]
    fn connection_ids_go_to_balancers_then_to_servers_and_leave_when_nobody_uses_them() {
        let on = |first: &[u64], second: &[u64], a: &[(u64, f64)], b: &[(u64, f64)]| {
            let both =
                [balancer("one", first, &[("a", a), ("b", b)]), balancer("two", second, &[])];
            let rotation = ids("web", &both, false).unwrap();
            (rotation.done(), rotation.next)
        };
        let next = |rotation: (usize, String), done: usize, word: &str| {
            assert_eq!(rotation.0, done, "{}", rotation.1);
            assert!(rotation.1.contains(word), "{}", rotation.1);
        };
        let live = [(0, 0.2)];
        // From 6 to 0 too: the order of the file decides, and nothing else.
        next(on(&[0, 1], &[0], &live, &live), 0, "end of quic_lb at two,");
        next(on(&[0, 1], &[0, 1], &live, &live), 1, "servers a, b");
        next(on(&[0, 1], &[0, 1], &[(0, 0.3), (1, 0.1)], &live), 1, "servers b");
        next(on(&[0, 1], &[0, 1], &[(0, 9.), (1, 0.1)], &[(0, 0.3), (1, 0.2)]), 2, "wait");
        next(
            on(&[0, 1], &[0, 1], &[(0, 9.), (1, 0.1)], &[(0, 9.), (1, 8.)]),
            3,
            "out of quic_lb at one, two,",
        );
        next(on(&[0, 1], &[1], &[(1, 0.1)], &[(1, 70.)]), 3, "out of quic_lb at one,");
        next(
            on(&[6, 0], &[6], &[(6, 0.1)], &[]),
            0,
            "configuration 0 at the end of quic_lb at two,",
        );
        next(on(&[6, 0], &[6, 0], &[(6, 0.1), (0, 400.)], &[]), 1, "servers a");
        let alone = [balancer("one", &[1], &[]), balancer("two", &[1], &[])];
        let over = ids("web", &alone, false).unwrap();
        assert!(
            over.is_over() && over.next.contains("config_id: 0, server_id_length: 2"),
            "{over}"
        );
        // It may be over, or not have begun: a file that no balancer has taken is no reason to go on to servers.
        assert_eq!([1, 2, 3, 4].map(|step| over.has_reached(step)), [false, false, false, true]);
        let begun = [balancer("one", &[0, 1], &[("a", &live)]), balancer("two", &[0, 1], &[])];
        let begun = ids("web", &begun, false).unwrap();
        assert_eq!([1, 2, 3, 4].map(|step| begun.has_reached(step)), [true, false, false, false]);
    }

    /// With little traffic a server may be silent for as long as one that has nothing left to say.
    #[test]
    fn a_server_that_was_not_heard_is_not_taken_for_one_that_has_begun() {
        let both = |b: &[(u64, f64)]| {
            [
                balancer("one", &[0, 1], &[("a", &[(0, 9.), (1, 0.1)]), ("b", b)]),
                balancer("two", &[0, 1], &[]),
            ]
        };
        for silent in [&[][..], &[(0, 60.)], &[(1, 90.), (0, 60.)]] {
            let rotation = ids("web", &both(silent), false).unwrap();
            assert_eq!(rotation.done(), 1, "{rotation}");
            assert!(rotation.next.contains("configuration 1: b; reload"), "{rotation}");
            assert_eq!(ids("web", &both(silent), true).unwrap().done(), 3);
        }
        assert_eq!(ids("web", &both(&[(0, 90.), (1, 60.)]), false).unwrap().done(), 3);
        // A check shows what it would do.
        for (shown, done) in [(1, 3), (0, 1)] {
            let mut checked = both(&[(0, 60.)]);
            checked[1].backends = json!([{ "pool": "web", "name": "b", "state": "active", "check": { "config_id": shown } }]);
            let rotation = ids("web", &checked, shown == 0).unwrap();
            assert_eq!(rotation.done(), done, "{rotation}");
        }
        // Whoever vouches for silent ones does not vouch for one that is heard with an old one.
        assert_eq!(ids("web", &both(&[(0, 1.)]), true).unwrap().done(), 1);
        // One that gets no new connections makes no connection IDs for any.
        let mut drains = both(&[(0, 60.)]);
        drains[0].backends[1]["state"] = json!("draining");
        assert_eq!(ids("web", &drains, false).unwrap().done(), 3);
    }

    #[test]
    fn what_every_balancer_has_is_told() {
        let mut one = balancer("one", &[0, 1], &[("a", &[(0, 0.1)])]);
        one.decisions["digest"] = json!("0123");
        one.rotation[0]["connections"] = json!(17);
        let told = ids("web", &[one, balancer("two", &[0], &[])], false).unwrap().to_string();
        assert!(
            told.contains(
                "one (digest 0123): configurations 0, 1; connections, about: 17 with 0\n"
            ),
            "{told}"
        );
        assert!(
            told.contains("two (digest unknown): configurations 0; connections, about: none\n"),
            "{told}"
        );
    }

    #[test]
    fn what_would_lose_connections_is_no_step_but_an_error() {
        // Nobody can vouch for that either.
        let of = |all: &[Seen]| ids("web", all, true).unwrap_err();
        let early = [balancer("one", &[0, 1], &[("a", &[(1, 0.1)])]), balancer("two", &[0], &[])];
        assert!(of(&early).contains("server a makes connection IDs by configuration 1"));
        assert!(of(&early).contains("which two cannot read"));
        let apart = [balancer("one", &[0, 1], &[]), balancer("two", &[0, 2], &[])];
        assert!(of(&apart).contains("1 at one, 2 at two"));
        let mut other = balancer("two", &[0, 1], &[]);
        other.decisions["decisions"]["pools"]["web"]["quic_lb"]["1"]["key"] = json!("another");
        assert!(of(&[balancer("one", &[0, 1], &[]), other]).contains("not the same"));
        assert!(
            ids("api", &[balancer("one", &[0], &[])], true).unwrap_err().contains("no listener")
        );
    }

    #[test]
    fn a_key_of_tokens_is_put_in_front_when_all_servers_honour_it() {
        let balancer = |name: &str, keys: &[u8], honoured: Value| Seen {
            name: name.to_owned(),
            rotation: json!([]),
            decisions: json!({ "decisions": { "retry": {
                "keys": keys.iter().map(|key| json!({ "sequence": key, "key": key })).collect::<Value>(),
            } } }),
            backends: json!([{ "pool": "web", "name": "a", "state": "active", "token_keys": honoured }]),
        };
        let at = |first: &[u8], second: &[u8], honoured: Value| {
            let rotation = tokens(
                8,
                &[balancer("one", first, honoured.clone()), balancer("two", second, honoured)],
                false,
            );
            let rotation = rotation.unwrap();
            (rotation.done(), rotation.next)
        };
        let yes = json!({ "7": true, "8": true });
        assert_eq!(at(&[7, 8], &[7], yes.clone()).0, 0);
        for (not_yet, says) in [
            (json!({ "7": true, "8": false }), "the servers web/a"),
            (json!({ "7": true }), "key 8: web/a; wait"),
        ] {
            let (done, next) = at(&[7, 8], &[7, 8], not_yet);
            assert!(done == 1 && next.contains(says), "{next}");
        }
        assert_eq!(at(&[7, 8], &[7, 8], yes.clone()).0, 2);
        let (done, next) = at(&[8, 7], &[7, 8], yes.clone());
        assert!(done == 2 && next.contains("in front of retry.keys at two"), "{next}");
        assert_eq!(at(&[8, 7], &[8, 7], yes.clone()).0, 3);
        assert_eq!(at(&[8], &[8], yes).0, 4);
        // Whom nobody asks, the operator vouches for; but not for those that refuse. Those of pools whose clients are sent no Retry
        // need nobody.
        for (honours, honoured, done) in [
            ("true", Value::Null, [1, 2]),
            ("false", Value::Null, [2, 2]),
            ("probe", json!({}), [1, 2]),
            ("probe", json!({ "8": false }), [1, 1]),
        ] {
            let mut of = balancer("one", &[7, 8], honoured);
            of.decisions["decisions"]["pools"] = json!({ "web": { "honours_tokens": honours } });
            for (vouched, done) in [false, true].into_iter().zip(done) {
                let rotation = tokens(8, std::slice::from_ref(&of), vouched).unwrap();
                assert_eq!(rotation.done(), done, "{honours} {vouched}: {rotation}");
            }
        }
        let none =
            Seen { decisions: json!({ "decisions": {} }), ..balancer("one", &[], json!({})) };
        assert!(tokens(8, &[none], false).unwrap_err().contains("no listener of one asks"));
    }
}
