//! Which changes of the configuration a running process can follow, and which need a restart.

use quic_lb_config::{Config, Listener};

/// Whether two configurations are the same, keys included: the digest covers those. Trust anchors of checks stand in
/// neither, and may change while their file has the same name.
pub(crate) fn is_same(old: &Config, new: &Config) -> bool {
    old.digest() == new.digest()
        && old.masked_document() == new.masked_document()
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
    changed("workers", workers(old), workers(new));
    changed("admin.address", admin(old), admin(new));
    changed("limits.flows", old.limits.flows.to_string(), new.limits.flows.to_string());
    changed(
        "limits.remembered",
        old.limits.remembered.to_string(),
        new.limits.remembered.to_string(),
    );
    let format = |config: &Config| config.log.format.as_str().to_owned();
    changed("log.format", format(old), format(new));
    reasons.extend(listener_changes(&old.listeners, &new.listeners));
    reasons
}

fn listener_changes(old: &[Listener], new: &[Listener]) -> Vec<String> {
    let mut changes = vec![];
    for Listener { name, address, both_families, .. } in old {
        match new.iter().find(|listener| &listener.name == name) {
            None => changes.push(format!("listener {name} is gone")),
            Some(new) if new.address != *address => {
                changes.push(format!("listener {name} moves from {address} to {}", new.address));
            }
            Some(new) if new.both_families != *both_families => {
                changes.push(format!("listener {name} has other families of addresses"));
            }
            Some(_) => {}
        }
    }
    for Listener { name, .. } in new {
        if !old.iter().any(|listener| &listener.name == name) {
            changes.push(format!("listener {name} is new"));
        }
    }
    let names = |listeners: &[Listener]| -> Vec<_> {
        listeners.iter().map(|listener| listener.name.clone()).collect()
    };
    if changes.is_empty() && names(old) != names(new) {
        changes.push("the listeners are in another order".to_owned());
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_may_not_move_or_change_places() {
        let listener = |name: &str, port| Listener {
            name: name.into(),
            address: ([127, 0, 0, 1], port).into(),
            both_families: false,
            pool: 0,
            retry_mode: None,
        };
        let old = [listener("a", 1), listener("b", 2)];
        assert_eq!(listener_changes(&old, &old), Vec::<String>::new());
        assert_eq!(
            listener_changes(&old, &[listener("b", 2), listener("a", 1)]),
            ["the listeners are in another order"]
        );
        assert_eq!(
            listener_changes(&old, &[listener("a", 1), listener("b", 3)]),
            ["listener b moves from 127.0.0.1:2 to 127.0.0.1:3"]
        );
        let both = Listener { both_families: true, ..listener("b", 2) };
        assert_eq!(
            listener_changes(&old, &[listener("a", 1), both]),
            ["listener b has other families of addresses"]
        );
    }
}
