//! What differs between two configurations, as an operator would say it: by the names of listeners, pools and backends,
//! and never with a key.

use std::{collections::BTreeMap, fmt};

use quic::routable::{CidConfig, ServerId};
use quic_lb_config::{CertificatePolicy, CheckKind, Commands, Config, Pool, TrustAnchors};
use serde_json::{Map, Value};

/// More are counted and not told: who changes a thousand backends knows that.
const MAX_TOLD: usize = 50;
/// How much of a value is told, in characters.
const MAX_VALUE: usize = 200;

/// What has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    /// The first ones, in the order of their places.
    pub(crate) told: Vec<Change>,
    /// How many there are beyond those.
    pub(crate) more: usize,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    /// Such as `pools[web].backends[a].weight`.
    pub(crate) at: String,
    /// What was there, if anything.
    pub(crate) old: Option<String>,
    /// What is there, if anything.
    pub(crate) new: Option<String>,
}

impl Changes {
    /// Those that lead from `old` to `new`.
    pub(super) fn between(old: &Config, new: &Config) -> Self {
        let mut changes = Self::between_documents(&old.masked_document(), &new.masked_document());
        changes.compare_secrets(old, new);
        changes
    }

    /// Those between documents that show what there is to show of keys.
    pub(crate) fn between_documents(old: &Value, new: &Value) -> Self {
        let mut changes = Self::default();
        changes.compare("", Some(old), Some(new));
        changes
    }

    /// Documents have no keys, nor what is in files of certificates.
    fn compare_secrets(&mut self, old: &Config, new: &Config) {
        for pool in &new.pools {
            let Some(before) = old.pools.iter().find(|before| before.name == pool.name) else {
                continue;
            };
            for config in &pool.cid_configs {
                let before = before.cid_configs.iter().find(|before| before.id() == config.id());
                let was_encrypted = before.filter(|before| before.is_encrypted());
                if was_encrypted.is_some_and(|before| has_another_key(before, config)) {
                    let at = format!("pools[{}].quic_lb[{}].key", pool.name, config.id());
                    self.add(&at, None, Some("another"));
                }
            }
            if let (Some(before), Some(anchors)) = (anchors(before), anchors(pool))
                && before.file == anchors.file
                && before.anchors != anchors.anchors
            {
                let at = format!("pools[{}].health_check.ca_file", pool.name);
                self.add(&at, None, Some("other certificates"));
            }
        }
        for pool in &new.pools {
            let before = old.pools.iter().find(|before| before.name == pool.name);
            if let Some(before) = before.and_then(|before| before.report_token.as_ref())
                && let Some(token) = &pool.report_token
                && before.file == token.file
                && before != token
            {
                let at = format!("pools[{}].report_token_file", pool.name);
                self.add(&at, None, Some("another token"));
            }
        }
        let token = |config: &Config| match config.admin.as_ref()?.commands.clone()? {
            Commands::Token(_, token) => Some(token),
            Commands::Unix(_) | Commands::Certificates(..) => None,
        };
        let tls = |config: &Config| match config.admin.as_ref()?.commands.clone()? {
            Commands::Certificates(_, tls) => Some(tls),
            Commands::Unix(_) | Commands::Token(..) => None,
        };
        if let (Some(before), Some(tls)) = (tls(old), tls(new))
            && (&before.cert_file, &before.key_file, &before.clients.file)
                == (&tls.cert_file, &tls.key_file, &tls.clients.file)
            && before != tls
        {
            self.add("admin.commands.cert_file", None, Some("other certificates"));
        }
        if let (Some(before), Some(token)) = (token(old), token(new))
            && before.file == token.file
            && before != token
        {
            self.add("admin.commands.token_file", None, Some("another token"));
        }
        for key in &new.retry.keys {
            let mut before = old.retry.keys.iter();
            let before = before.find(|before| before.sequence() == key.sequence());
            if before.is_some_and(|before| before.check_value() != key.check_value()) {
                self.add(&format!("retry.keys[{}].key", key.sequence()), None, Some("another"));
            }
        }
    }

    fn compare(&mut self, at: &str, old: Option<&Value>, new: Option<&Value>) {
        match (old, new) {
            (old, new) if old == new => {}
            (Some(Value::Object(old)), Some(Value::Object(new))) => {
                self.compare_keys(at, old, new);
            }
            (Some(Value::Array(old)), Some(Value::Array(new))) => self.compare_items(at, old, new),
            (old, new) => self.add(at, old, new),
        }
    }

    fn compare_keys(&mut self, at: &str, old: &Map<String, Value>, new: &Map<String, Value>) {
        let added = new.keys().filter(|key| !old.contains_key(*key));
        for key in old.keys().chain(added) {
            let dot = if at.is_empty() { "" } else { "." };
            self.compare(&format!("{at}{dot}{key}"), old.get(key), new.get(key));
        }
    }

    fn compare_items(&mut self, at: &str, old: &[Value], new: &[Value]) {
        let (Some(of_old), Some(of_new)) = (by_name(old), by_name(new)) else {
            return self.add(at, Some(&list(old)), Some(&list(new)));
        };
        let before = (self.told.len(), self.more);
        let added = new.iter().filter_map(name).filter(|name| !of_old.contains_key(name));
        for name in old.iter().filter_map(name).chain(added) {
            let (old, new) = (of_old.get(&name).copied(), of_new.get(&name).copied());
            self.compare(&format!("{at}[{name}]"), old, new);
        }
        if (self.told.len(), self.more) == before {
            self.add(at, None, Some("in another order"));
        }
    }

    fn add<T: fmt::Display + ?Sized>(&mut self, at: &str, old: Option<&T>, new: Option<&T>) {
        if self.told.len() == MAX_TOLD {
            self.more += 1;
            return;
        }
        let (old, new) = (old.map(shortened), new.map(shortened));
        self.told.push(Change { at: at.to_owned(), old, new });
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self { at, old: None, new } => {
                write!(f, "{at}: {}", new.as_deref().unwrap_or_default())
            }
            Self { at, old: Some(_), new: None } => write!(f, "{at}: gone"),
            Self { at, old: Some(old), new: Some(new) } => write!(f, "{at}: {new}, was {old}"),
        }
    }
}

fn anchors(pool: &Pool) -> Option<&TrustAnchors> {
    match &pool.health_check.as_ref()?.kind {
        CheckKind::VersionNegotiation => None,
        CheckKind::Quic(handshake) | CheckKind::Http3(handshake, _) => match &handshake.certificate
        {
            CertificatePolicy::Ignored => None,
            CertificatePolicy::Verified(anchors) => Some(anchors),
        },
    }
}

/// Whether two configurations that are written alike make other connection IDs.
/// Whether two configurations of connection IDs are the same, keys included.
pub(super) fn reads_the_same(old: &CidConfig, new: &CidConfig) -> bool {
    let shape = |of: &CidConfig| (of.id(), of.server_id_len(), of.nonce_len(), of.is_encrypted());
    shape(old) == shape(new) && !has_another_key(old, new)
}

fn has_another_key(old: &CidConfig, new: &CidConfig) -> bool {
    let same_shape = old.server_id_len() == new.server_id_len()
        && old.nonce_len() == new.nonce_len()
        && new.is_encrypted();
    let sample = |config: &CidConfig, octet| {
        let server_id = ServerId::new(&vec![octet; config.server_id_len()])?;
        config.encode(&server_id, &vec![0; config.nonce_len()]).ok()
    };
    // The shortest has 40 encrypted bits; two tell any keys apart.
    same_shape && [0, 1].into_iter().any(|octet| sample(old, octet) != sample(new, octet))
}

/// The items of a list by what tells them apart, if they have such a thing.
fn by_name(items: &[Value]) -> Option<BTreeMap<String, &Value>> {
    items.iter().map(|item| Some((name(item)?, item))).collect()
}

fn name(item: &Value) -> Option<String> {
    let keys = ["name", "config_id", "sequence"];
    let name = keys.iter().find_map(|key| item.get(key))?;
    Some(name.as_str().map_or_else(|| name.to_string(), ToOwned::to_owned))
}

fn list(items: &[Value]) -> Value {
    Value::Array(items.to_vec())
}

fn shortened(value: &(impl fmt::Display + ?Sized)) -> String {
    let value = value.to_string();
    let value = value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).unwrap_or(&value);
    match value.char_indices().nth(MAX_VALUE) {
        Some((end, _)) => format!("{}…", &value[..end]),
        None => value.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use quic::routable::Key;
    use serde_json::json;

    use super::*;
    use crate::fixtures;

    fn told(old: &Value, new: &Value) -> Vec<String> {
        let mut changes = Changes::default();
        changes.compare("", Some(old), Some(new));
        changes.told.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn changes_are_told_by_the_names_of_what_they_concern() {
        let backend = |name: &str, weight: u32| json!({ "name": name, "weight": weight });
        let pool = |backends: &[Value]| json!({ "pools": [{ "name": "web", "backends": backends }], "limits": { "flows": 7 } });
        let old = pool(&[backend("a", 1), backend("b", 2)]);
        assert_eq!(told(&old, &old), [""; 0]);
        let new = pool(&[backend("c", 1), backend("b", 3)]);
        assert_eq!(
            told(&old, &new),
            [
                "pools[web].backends[a]: gone",
                "pools[web].backends[b].weight: 3, was 2",
                "pools[web].backends[c]: {\"name\":\"c\",\"weight\":1}",
            ]
        );
        let turned = pool(&[backend("b", 2), backend("a", 1)]);
        assert_eq!(told(&old, &turned), ["pools[web].backends: in another order"]);
        let more = json!({ "limits": { "flows": 8, "remembered": [1] }, "log": "x" });
        assert_eq!(
            told(&json!({ "limits": { "flows": 7, "remembered": [1, 2] } }), &more),
            ["limits.flows: 8, was 7", "limits.remembered: [1], was [1,2]", "log: x"]
        );
    }

    #[test]
    fn no_more_is_told_than_somebody_reads() {
        let many = |weight: u32| -> Value {
            (0..500).map(|n| json!({ "name": n.to_string(), "weight": weight })).collect()
        };
        let mut changes = Changes::default();
        changes.compare("pools", Some(&many(1)), Some(&many(2)));
        assert_eq!((changes.told.len(), changes.more), (MAX_TOLD, 450));
        let long = json!("é".repeat(1000));
        let told = told(&json!({ "a": 1 }), &json!({ "a": long }));
        assert_eq!(told, [format!("a: {}…, was 1", "é".repeat(MAX_VALUE))]);
    }

    #[test]
    fn other_keys_are_told_and_not_shown() {
        let (old, new) = (fixtures::config(true), fixtures::config(true));
        assert_eq!(Changes::between(&old, &new), Changes::default());
        let mut new = new;
        let key = Key::new([9; 16]);
        let before = &new.pools[0].cid_configs[0];
        let (id, of_server, of_nonce) = (before.id(), before.server_id_len(), before.nonce_len());
        let other = CidConfig::new(id, of_server, of_nonce, Some(&key)).unwrap();
        new.pools[0].cid_configs[0] = other;
        new.pools[0].backends[1].name = "x".into();
        let told = Changes::between(&old, &new).told;
        let places: Vec<_> = told.iter().map(|change| change.at.as_str()).collect();
        assert_eq!(
            places,
            ["pools[web].backends[b]", "pools[web].backends[x]", "pools[web].quic_lb[0].key"]
        );
        assert_eq!(told[2].to_string(), "pools[web].quic_lb[0].key: another");
    }
}
