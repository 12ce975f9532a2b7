//! Which changes of the configuration a running process can follow, and what the others take.

use quic::token::TokenKey;
use quic_lb_config::{Config, Pool, Retry};
use serde_json::Value;

use super::changes::reads_the_same;

/// Whether two configurations are the same, keys included.
pub(crate) fn is_same(old: &Config, new: &Config) -> bool {
    let Config { pools, listeners, admin, retry, .. } = new;
    // What is about the process alone is little.
    old.own_document() == new.own_document()
        && old.admin == *admin
        && old.listeners == *listeners
        && is_same_retry(&old.retry, retry)
        && old.pools.len() == pools.len()
        && old.pools.iter().zip(pools).all(|(old, new)| is_same_pool(old, new))
}

fn is_same_pool(old: &Pool, new: &Pool) -> bool {
    let Pool {
        name,
        cid_configs,
        backends,
        source_addresses,
        reset_secret,
        hash,
        health_check,
        honours_tokens,
        report_token,
    } = new;
    old.name == *name
        && old.cid_configs.len() == cid_configs.len()
        && old.cid_configs.iter().zip(cid_configs).all(|(old, new)| reads_the_same(old, new))
        && old.backends == *backends
        && old.source_addresses == *source_addresses
        && old.reset_secret == *reset_secret
        && old.hash == *hash
        && old.health_check == *health_check
        && old.honours_tokens == *honours_tokens
        && old.report_token == *report_token
}

fn is_same_retry(old: &Retry, new: &Retry) -> bool {
    let Retry {
        mode,
        format,
        keys,
        lifetime,
        transition,
        other_versions,
        except_versions,
        adaptive,
    } = new;
    let of_keys = |keys: &[TokenKey]| {
        keys.iter().map(|key| (key.sequence(), key.check_value())).collect::<Vec<_>>()
    };
    old.mode == *mode
        && old.format == *format
        && of_keys(&old.keys) == of_keys(keys)
        && old.lifetime == *lifetime
        && old.transition == *transition
        && old.other_versions == *other_versions
        && old.except_versions == *except_versions
        && old.adaptive == *adaptive
}

/// A setting that a running process keeps.
#[derive(Clone, Copy)]
struct Kept {
    /// What it is called.
    name: &'static str,
    /// Where it is in the document: the first place that there is.
    places: &'static [&'static str],
    /// How it is called where it is in none.
    absent: &'static str,
    takes: Takes,
}

/// What it takes to have another one.
#[derive(Clone, Copy)]
enum Takes {
    /// A process that takes over: it is sized, and opens its doors, when it starts, and loses nothing of what was there.
    Upgrade,
    Restart,
}

// Workers: the kernel spreads client paths by how many sockets there are, so that another number would send those of living flows to
// workers that do not know them.
const KEPT: [Kept; 7] = [
    Kept::new("workers", &["workers"], "one for each core", Takes::Restart),
    Kept::new("admin.address", &["admin.address"], "no address", Takes::Upgrade),
    Kept::new(
        "admin.commands",
        &["admin.commands.unix", "admin.commands.address"],
        "the default",
        Takes::Upgrade,
    ),
    Kept::new("limits.flows", &["limits.flows"], "", Takes::Upgrade),
    Kept::new("limits.remembered", &["limits.remembered"], "", Takes::Upgrade),
    Kept::new("log.format", &["log.format"], "", Takes::Upgrade),
    Kept::new("state_dir", &["state_dir"], "no folder", Takes::Restart),
];

impl Kept {
    const fn new(
        name: &'static str,
        places: &'static [&'static str],
        absent: &'static str,
        takes: Takes,
    ) -> Self {
        Self { name, places, absent, takes }
    }

    fn of(self, document: &Value) -> String {
        let at = |place: &&str| place.split('.').try_fold(document, |of, key| of.get(key));
        match self.places.iter().find_map(at) {
            Some(Value::String(text)) => text.clone(),
            Some(value) => value.to_string(),
            None => self.absent.to_owned(),
        }
    }
}

/// A sentence for each change that a running process cannot follow, with what it takes. Of the two documents it wants what
/// [`Config::own_document`] has.
pub(crate) fn not_followed(old: &Value, new: &Value) -> Vec<String> {
    let changed = |kept: &Kept| {
        let (Kept { name, takes, .. }, old, new) = (kept, kept.of(old), kept.of(new));
        let takes = match takes {
            Takes::Upgrade => "takes `quic-lb upgrade`",
            Takes::Restart => "needs a restart",
        };
        (old != new).then(|| format!("{name} changes from {old} to {new}, which {takes}"))
    };
    KEPT.iter().filter_map(changed).collect()
}

#[cfg(test)]
mod tests {
    use quic::token::TokenKey;

    use super::*;
    use crate::fixtures;

    /// Nobody decides by them, and yet whoever begins to ask for proof wants the newest.
    #[test]
    fn keys_that_are_not_in_use_change_a_configuration_too() {
        let with = |octet: u8| {
            let mut config = fixtures::config(true);
            config.retry.keys = vec![TokenKey::new(0, [octet; 16], [0; 12]).unwrap()];
            config
        };
        assert_eq!(with(1).digest(), with(2).digest());
        assert!(is_same(&with(1), &with(1)));
        assert!(!is_same(&with(1), &with(2)));
    }
}
