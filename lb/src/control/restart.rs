//! Which changes of the configuration a running process can follow, and which need a restart.

use quic_lb_config::{Commands, Config};

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

/// A sentence for each change that a running process cannot follow.
pub(crate) fn needs_restart(old: &Config, new: &Config) -> Vec<String> {
    let mut reasons = vec![];
    let mut changed = |what: &str, old: String, new: String| {
        if old != new {
            reasons.push(format!("{what} changes from {old} to {new}"));
        }
    };
    let workers = |config: &Config| {
        config.workers.map_or("one for each core".to_owned(), |workers| workers.to_string())
    };
    let admin = |config: &Config| {
        let admin = config.admin.as_ref();
        admin.map_or("no address".to_owned(), |admin| admin.address.to_string())
    };
    let commands = |config: &Config| match config.admin.as_ref()?.commands.as_ref()? {
        Commands::Unix(path) => Some(path.display().to_string()),
        Commands::Token(address, _) => Some(address.to_string()),
    };
    let commands = |config: &Config| commands(config).unwrap_or_else(|| "the default".to_owned());
    changed("workers", workers(old), workers(new));
    changed("admin.address", admin(old), admin(new));
    changed("admin.commands", commands(old), commands(new));
    changed("limits.flows", old.limits.flows.to_string(), new.limits.flows.to_string());
    changed(
        "limits.remembered",
        old.limits.remembered.to_string(),
        new.limits.remembered.to_string(),
    );
    let format = |config: &Config| config.log.format.as_str().to_owned();
    changed("log.format", format(old), format(new));
    let folder = |config: &Config| {
        let folder = config.state_dir.as_ref();
        folder.map_or("no folder".to_owned(), |folder| folder.display().to_string())
    };
    changed("state_dir", folder(old), folder(new));
    reasons
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
