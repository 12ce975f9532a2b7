//! What a balancer that runs would make of a file: what a reload would change, and why it would be refused. Nothing is done; whether new
//! addresses can be listened at is not tried either.

use std::io::{self, Write};

use quic::routable::ConfigId;
use quic_lb_config::Config;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    admin::{self, Balancer},
    args::{AdminPlace, CheckArgs},
    outcome::Failure,
};
use crate::{
    control::{
        changes::Changes,
        plane::removals::{InUse, Taken},
        restart::not_followed,
    },
    words::count,
};

/// What is known of a balancer that runs.
#[derive(Debug)]
pub(super) struct Running {
    place: AdminPlace,
    told: Told,
}

/// What the admin interface says of it.
#[derive(Debug, Deserialize)]
struct Told {
    /// With check values in place of keys.
    config: Value,
    in_use: Vec<Used>,
}

/// Something that live connections use.
#[derive(Debug, Deserialize)]
struct Used {
    pool: String,
    backend: String,
    /// The connection IDs that they use; `None` for the backend itself.
    config_id: Option<u8>,
    connections: u64,
}

/// What would become of a file.
#[derive(Debug)]
pub(super) struct Reload<'a> {
    place: &'a AdminPlace,
    changes: Changes,
    /// Why it would be refused, a sentence for each reason.
    pub(super) refused: Vec<String>,
}

impl Running {
    /// The one that is meant, if there is one.
    pub(super) fn meant(args: &CheckArgs) -> Result<Option<Self>, Failure> {
        let Some(place) = args.against.clone() else { return Ok(None) };
        let balancer = Balancer::of(place.clone(), args.token_file.as_ref())?;
        let told = admin::run(async {
            let answer = balancer.get("/api/v1/running").await;
            let told =
                answer.and_then(|body| serde_json::from_str(&body).map_err(io::Error::other));
            told.map_err(|error| balancer.refused(&error))
        })?;
        Ok(Some(Self { place, told }))
    }

    pub(super) fn reload(&self, new: &Config) -> Reload<'_> {
        let Self { place, told: Told { config: old, in_use } } = self;
        let new = new.compared_document();
        let mut refused = not_followed(old, &new);
        let taken = in_use.iter().filter(|used| used.is_taken(old, &new));
        refused.extend(taken.filter_map(Used::in_words));
        Reload { place, changes: Changes::between_documents(old, &new), refused }
    }
}

impl Used {
    /// Whether the new document has it no more, or as something else.
    fn is_taken(&self, old: &Value, new: &Value) -> bool {
        let backend = |document| {
            let pool = named(document, "pools", "name", &self.pool.as_str().into())?;
            Some((pool, named(pool, "backends", "name", &self.backend.as_str().into())?))
        };
        let leads = |document| {
            let ((pool, backend), id) = (backend(document)?, self.config_id?);
            let config = named(pool, "quic_lb", "config_id", &id.into())?;
            Some((config, backend.get("server_ids")?.get(id.to_string())?))
        };
        match (backend(new), self.config_id) {
            (None, config_id) => config_id.is_none(),
            (Some(_), None) => false,
            (Some(_), Some(_)) => leads(old).is_some() && leads(old) != leads(new),
        }
    }

    fn in_words(&self) -> Option<String> {
        let Self { pool, backend, config_id, connections } = self;
        let what = match config_id {
            None => Taken::Backend,
            Some(id) => Taken::CidConfig(ConfigId::new(*id)?),
        };
        let taken =
            InUse { pool: pool.clone(), backend: backend.clone(), what, connections: *connections };
        Some(format!("{taken}: drain first, or `quic-lb reload --force`"))
    }
}

/// The item of a list in which `key` is `name`.
fn named<'a>(document: &'a Value, list: &str, key: &str, name: &Value) -> Option<&'a Value> {
    document.get(list)?.as_array()?.iter().find(|item| item.get(key) == Some(name))
}

impl Reload<'_> {
    pub(super) fn tell(&self, out: &mut impl Write) -> Result<(), Failure> {
        let Self { place, changes: Changes { told, more }, refused } = self;
        for change in told {
            writeln!(out, "{change}")?;
        }
        for reason in refused {
            writeln!(out, "refused: {reason}")?;
        }
        let would = match (refused.len(), told.len() + more) {
            (0, 0) => "change nothing".to_owned(),
            (0, changes) => format!("be applied: {}", count(changes, "change")),
            (reasons, _) => format!("be refused: {}", count(reasons, "reason")),
        };
        Ok(writeln!(out, "a reload of {place} would {would}")?)
    }

    pub(super) fn facts(&self) -> Value {
        let Self { place, changes: Changes { told, more }, refused } = self;
        let changes: Vec<_> = told.iter().map(ToString::to_string).collect();
        json!({
            "balancer": place.to_string(),
            "changes": changes,
            "more_changes": more,
            "refused": refused,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(server_id: &str, config_id: u8, key: &str) -> Value {
        let quic_lb =
            json!({ "config_id": config_id, "server_id_length": 2, "nonce_length": 6, "key": key });
        let backend =
            json!({ "name": "a", "weight": 1, "server_ids": { config_id.to_string(): server_id } });
        json!({ "pools": [{ "name": "web", "quic_lb": [quic_lb], "backends": [backend] }] })
    }

    #[test]
    fn what_connections_use_may_change_in_what_they_do_not_use() {
        let used =
            |config_id| Used { pool: "web".into(), backend: "a".into(), config_id, connections: 3 };
        let old = document("0001", 0, "x");
        let taken =
            |new: &Value| (used(None).is_taken(&old, new), used(Some(0)).is_taken(&old, new));
        let mut heavier = old.clone();
        heavier["pools"][0]["backends"][0]["weight"] = json!(7);
        assert_eq!(taken(&heavier), (false, false));
        assert_eq!(taken(&document("0002", 0, "x")), (false, true));
        assert_eq!(taken(&document("0001", 1, "x")), (false, true));
        assert_eq!(taken(&document("0001", 0, "y")), (false, true));
        // Once is enough.
        assert_eq!(taken(&json!({ "pools": [] })), (true, false));
        assert_eq!(
            used(Some(0)).in_words().unwrap(),
            "connection IDs of web/a with config ID 0: about 3 live connections would lose their way: drain first, or `quic-lb reload --force`"
        );
    }
}
