//! `cid decode` and `cid encode`.

use std::io::Write;

use quic::routable::{CidConfig, ConfigId, Decoded, Decoder};
use quic_lb_config::{Backend, Config, Pool};
use serde::Serialize;

use super::{
    args::{DecodeArgs, EncodeArgs},
    generate,
    outcome::Failure,
};
use crate::words::Hex;

/// What a connection ID says, as `--json` prints it.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Row {
    cid: String,
    routable: bool,
    config_id: Option<u8>,
    server_id: Option<String>,
    pool: Option<String>,
    backend: Option<String>,
    reason: Option<String>,
}

pub(super) fn decode(
    config: &Config,
    args: &DecodeArgs,
    out: &mut impl Write,
) -> Result<(), Failure> {
    let pools: Vec<&Pool> = match &args.pool {
        None => config.pools.iter().collect(),
        Some(name) => {
            let named = config.pools.iter().find(|pool| &pool.name == name);
            let names = || listed(config.pools.iter().map(|pool| &*pool.name));
            vec![named.ok_or_else(|| {
                Failure::other(format_args!("there is no pool \"{name}\"; there is {}", names()))
            })?]
        }
    };
    let rows: Vec<Row> = args.cids.iter().flat_map(|cid| rows(&pools, cid)).collect();
    if args.json {
        let json = serde_json::to_string_pretty(&rows).map_err(Failure::other)?;
        writeln!(out, "{json}")?;
    } else {
        rows.iter().try_for_each(|row| print(row, out))?;
    }
    out.flush()?;
    if rows.iter().all(|row| row.routable) { Ok(()) } else { Err(Failure::No) }
}

pub(super) fn encode(
    config: &Config,
    args: &EncodeArgs,
    out: &mut impl Write,
) -> Result<(), Failure> {
    let (pool, backend) = find(config, &args.backend)?;
    let cid_config = choose(pool, args)?;
    let server_id = backend.server_ids.iter().find(|(id, _)| *id == cid_config.id());
    let (_, server_id) = server_id.ok_or_else(|| {
        let (name, id) = (&backend.name, cid_config.id());
        Failure::other(format_args!("backend {name} has no server ID in configuration {id}"))
    })?;
    let nonce = match &args.nonce {
        Some(nonce) => nonce.clone(),
        None => generate::random(cid_config.nonce_len())?,
    };
    let cid = cid_config.encode(server_id, &nonce.0).map_err(Failure::other)?;
    Ok(writeln!(out, "{cid}")?)
}

/// One row for each pool in which the connection ID names a backend; where there is none, one that
/// says why.
fn rows(pools: &[&Pool], cid: &Hex) -> Vec<Row> {
    let mut all: Vec<Row> = pools.iter().map(|pool| row(pool, cid)).collect();
    if all.iter().any(|row| row.routable) {
        all.retain(|row| row.routable);
        return all;
    }
    let [first, others @ ..] = all.as_slice() else { return all };
    if others.is_empty() {
        return all;
    }
    let alike = others.iter().all(|row| row.reason == first.reason);
    let reason = if alike {
        first.reason.clone()
    } else {
        let reasons = all.iter().flat_map(|row| Some((row.pool.as_ref()?, row.reason.as_ref()?)));
        let reasons: Vec<_> = reasons.map(|(pool, why)| format!("pool {pool}: {why}")).collect();
        Some(reasons.join("; "))
    };
    let shared = |value: fn(&Row) -> &Option<String>| {
        others.iter().all(|row| value(row) == value(first)).then(|| value(first).clone()).flatten()
    };
    let config_id = others.iter().all(|row| row.config_id == first.config_id);
    vec![Row {
        cid: cid.to_string(),
        routable: false,
        config_id: first.config_id.filter(|_| config_id),
        server_id: shared(|row| &row.server_id),
        pool: None,
        backend: None,
        reason,
    }]
}

fn row(pool: &Pool, cid: &Hex) -> Row {
    let config_id = cid.0.first().and_then(|first| ConfigId::from_first_octet(*first));
    let unroutable = Row {
        cid: cid.to_string(),
        routable: false,
        config_id: config_id.map(ConfigId::get),
        server_id: None,
        pool: Some(pool.name.clone()),
        backend: None,
        reason: None,
    };
    if pool.cid_configs.is_empty() {
        let reason = Some("the pool has no quic_lb configuration".to_owned());
        return Row { reason, ..unroutable };
    }
    let Decoded { config_id, server_id } =
        match Decoder::new(pool.cid_configs.iter().cloned()).decode(&cid.0) {
            Ok(decoded) => decoded,
            Err(why) => return Row { reason: Some(why.to_string()), ..unroutable },
        };
    let decoded = Row {
        config_id: Some(config_id.get()),
        server_id: Some(server_id.to_string()),
        ..unroutable
    };
    let named = |backend: &&Backend| backend.server_ids.contains(&(config_id, server_id));
    match pool.backends.iter().find(named) {
        Some(backend) => Row { routable: true, backend: Some(backend.name.clone()), ..decoded },
        None => {
            let reason = format!("no backend of the pool has server ID {server_id}");
            Row { reason: Some(reason), ..decoded }
        }
    }
}

fn print(row: &Row, out: &mut impl Write) -> Result<(), Failure> {
    let cid = if row.cid.is_empty() { "(empty)" } else { &row.cid };
    write!(out, "{cid}: ")?;
    if let Some(reason) = &row.reason {
        write!(out, "unroutable: {reason}")?;
        if let (Some(config_id), Some(server_id)) = (row.config_id, &row.server_id) {
            write!(out, " (config {config_id}, server ID {server_id})")?;
        }
        return Ok(writeln!(out)?);
    }
    let word = |value: &Option<String>| value.clone().unwrap_or_default();
    let config_id = row.config_id.unwrap_or_default();
    let (server_id, pool, backend) = (word(&row.server_id), word(&row.pool), word(&row.backend));
    Ok(writeln!(
        out,
        "config {config_id}, server ID {server_id}, backend {backend} of pool {pool}"
    )?)
}

fn find<'a>(config: &'a Config, wanted: &str) -> Result<(&'a Pool, &'a Backend), Failure> {
    let all = || config.pools.iter().flat_map(|p| p.backends.iter().map(move |b| (p, b)));
    let full = |(pool, backend): &(&Pool, &Backend)| format!("{}/{}", pool.name, backend.name);
    let matches: Vec<_> =
        all().filter(|entry| entry.1.name == wanted || full(entry) == wanted).collect();
    match matches.as_slice() {
        [one] => Ok(*one),
        [] => {
            let names = listed(all().map(|entry| full(&entry)));
            Err(Failure::other(format_args!("there is no backend \"{wanted}\"; there is {names}")))
        }
        several => {
            let names = listed(several.iter().map(full));
            Err(Failure::other(format_args!(
                "several pools have a backend \"{wanted}\": say which with {names}"
            )))
        }
    }
}

fn choose<'a>(pool: &'a Pool, args: &EncodeArgs) -> Result<&'a CidConfig, Failure> {
    let ids = || listed(pool.cid_configs.iter().map(|config| config.id()));
    let name = &pool.name;
    match (args.config_id, pool.cid_configs.as_slice()) {
        (_, []) => Err(Failure::other(format_args!("pool {name} has no quic_lb configuration"))),
        (None, [only]) => Ok(only),
        (None, _) => Err(Failure::other(format_args!(
            "pool {name} has several configurations: choose one with --config-id: {}",
            ids()
        ))),
        (Some(id), configs) => configs.iter().find(|config| config.id() == id).ok_or_else(|| {
            Failure::other(format_args!(
                "pool {name} has no configuration with ID {id}; there is {}",
                ids()
            ))
        }),
    }
}

fn listed(items: impl Iterator<Item = impl ToString>) -> String {
    items.map(|item| item.to_string()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    fn config() -> Config {
        let mut config = fixtures::config(true);
        let mut other = config.pools[0].clone();
        other.name = "api".into();
        other.cid_configs.clear();
        other.backends.iter_mut().for_each(|backend| backend.server_ids.clear());
        config.pools.push(other);
        config
    }

    #[test]
    fn one_row_names_the_backend_whatever_the_other_pools_say() {
        let config = config();
        let pools: Vec<_> = config.pools.iter().collect();
        let cid = fixtures::cid_config().encode(&fixtures::server_id(2), &[9; 6]).unwrap();
        let rows = rows(&pools, &Hex(cid.to_vec()));
        let [row] = rows.as_slice() else { panic!("{rows:?}") };
        assert!(row.routable);
        assert_eq!((row.pool.as_deref(), row.backend.as_deref()), (Some("web"), Some("b")));
    }

    #[test]
    fn where_no_pool_knows_it_each_gives_its_reason() {
        let config = config();
        let pools: Vec<_> = config.pools.iter().collect();
        let rows = rows(&pools, &Hex(vec![0xe0; 9]));
        let [row] = rows.as_slice() else { panic!("{rows:?}") };
        let reason = row.reason.as_deref().unwrap();
        assert!(reason.contains("pool web: the config bits are 0b111"), "{reason}");
        assert!(reason.contains("pool api: the pool has no quic_lb"), "{reason}");
    }

    #[test]
    fn a_backend_is_found_by_name_unless_pools_share_it() {
        let config = config();
        assert!(matches!(find(&config, "a"), Err(Failure::Other(why)) if why.contains("api/a")));
        assert_eq!(find(&config, "api/a").unwrap().0.name, "api");
        assert!(matches!(find(&config, "x"), Err(Failure::Other(why)) if why.contains("web/c")));
    }
}
