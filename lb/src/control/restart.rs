//! Which changes of the configuration a running process can follow, and what the others take.

use quic_lb_config::Config;
use serde_json::Value;

use super::changes::Changes;

/// Whether two configurations are the same, keys included.
pub(crate) fn is_same(old: &Config, new: &Config) -> bool {
    Changes::between(old, new) == Changes::default()
        && old.admin == new.admin
        && old
            .pools
            .iter()
            .map(|pool| &pool.health_check)
            .eq(new.pools.iter().map(|pool| &pool.health_check))
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
