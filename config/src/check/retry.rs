//! Address validation: keys, thresholds beside each other, and what a mode needs.

use std::num::NonZeroU32;

use quic::token::TokenKey;

use super::unique::check_unique;
use crate::{
    checked::{self, RetryMode, TokenFormat},
    document::{Adaptive, Document, NewConnections, Retry, RetryKey},
    keys::{self, KeyChoice, KeySource},
    leaf::Count,
    mistake::{Mistakes, Place},
    read::{At, Given, Read as _},
    surroundings::Surroundings,
    yaml::Node,
};

/// How `document` validates addresses; `None` when some of it could not be read.
pub(super) fn check(
    document: &Document,
    surroundings: &Surroundings<'_>,
    mistakes: &mut Mistakes,
) -> Option<checked::Retry> {
    let retry = &document.retry.value;
    let keys = check_keys(retry, surroundings, mistakes);
    let validating = validating(document);
    if let Some(mode) = validating.first()
        && keys.as_ref().is_some_and(Vec::is_empty)
    {
        let found = "address validation without `retry.keys`";
        mistakes.error(mode, found, "at least one key, which the servers have too");
    }
    if retry.format.value == TokenFormat::SharedState && !validating.is_empty() {
        let found = "tokens that are bound to the client's address, behind a balancer that \
                     rewrites addresses";
        let expected = "\"nat\", unless the servers learn the clients' addresses otherwise";
        mistakes.warning(&retry.format.place, found, expected);
    }
    check_thresholds(&retry.adaptive.value, mistakes);
    let except_versions = check_versions(retry, mistakes);
    Some(make(retry, keys?, except_versions?))
}

fn make(retry: &Retry, keys: Vec<TokenKey>, except_versions: Vec<u32>) -> checked::Retry {
    let Adaptive { on_rate, on_half_open, off_rate, off_half_open, hold } = &retry.adaptive.value;
    checked::Retry {
        mode: retry.mode.value,
        format: retry.format.value,
        keys,
        lifetime: retry.lifetime.value.0,
        transition: retry.transition.value.0,
        other_versions: retry.other_versions.value,
        except_versions,
        adaptive: checked::Adaptive {
            on_rate: on_rate.value.0,
            on_half_open: on_half_open.value.0,
            off_rate: off_rate.value.0,
            off_half_open: off_half_open.value.0,
            hold: hold.value.0,
        },
    }
}

impl Default for checked::Retry {
    /// What a file without `retry` means.
    fn default() -> Self {
        let top = Place { path: String::new(), line: 1, column: 1 };
        let absent = Node::empty_mapping(&top);
        let retry = Retry::read(&absent, &top, &mut Mistakes::default());
        make(&retry.expect("no key of it is required"), Vec::new(), Vec::new())
    }
}

impl Default for checked::Adaptive {
    /// What a file without `retry.adaptive` means.
    fn default() -> Self {
        checked::Retry::default().adaptive
    }
}

pub(super) fn new_connections(limits: &NewConnections) -> checked::NewConnections {
    let limit = |given: &Given<Count<1, 10_000_000>>| {
        given.here().and_then(|limit| NonZeroU32::new(limit.value.0))
    };
    checked::NewConnections {
        total: limit(&limits.total),
        per_listener: limit(&limits.per_listener),
        per_address: limit(&limits.per_address),
        per_network: limit(&limits.per_network),
    }
}

/// Where the file says that addresses are validated.
fn validating(document: &Document) -> Vec<&Place> {
    let listeners = document.listeners.iter().flat_map(|listeners| &listeners.value.items);
    let of_listeners =
        listeners.filter_map(|listener| listener.value.retry.here()?.value.mode.as_ref());
    let modes = [&document.retry.value.mode].into_iter().chain(of_listeners);
    modes.filter(|mode| mode.value != RetryMode::Off).map(|mode| &mode.place).collect()
}

/// `None` when they could not all be read.
fn check_keys(
    retry: &Retry,
    surroundings: &Surroundings<'_>,
    mistakes: &mut Mistakes,
) -> Option<Vec<TokenKey>> {
    let keys = match &retry.keys {
        Given::Absent => return Some(Vec::new()),
        Given::Wrong => return None,
        Given::Here(keys) => &keys.value,
    };
    let sequences = keys.items.iter().filter_map(|key| key.value.sequence.as_ref());
    check_unique(sequences.map(|at| (at.value.0, at)), "sequence", mistakes);
    let mut checked: Vec<Option<TokenKey>> = Vec::with_capacity(keys.items.len());
    for At { value: key, place } in &keys.items {
        checked.push(check_key(key, place, surroundings, mistakes));
    }
    let checked = checked.into_iter().collect::<Option<_>>()?;
    (!keys.incomplete).then_some(checked)
}

fn check_key(
    given: &RetryKey,
    place: &Place,
    surroundings: &Surroundings<'_>,
    mistakes: &mut Mistakes,
) -> Option<TokenKey> {
    let RetryKey { sequence, key, key_file, key_env, iv } = given;
    let secret = match keys::find(KeySource { key, key_file, key_env }, surroundings, mistakes) {
        KeyChoice::Key(secret) => secret,
        KeyChoice::Absent => {
            mistakes.error(place, "no key", "one of `key`, `key_file` and `key_env`");
            return None;
        }
        KeyChoice::Unusable => return None,
    };
    let iv = match iv {
        Given::Absent => [0; 12],
        Given::Wrong => return None,
        Given::Here(iv) => iv.value.0,
    };
    let sequence = u8::try_from(sequence.as_ref()?.value.0).ok()?;
    TokenKey::new(sequence, secret.octets(), iv)
}

fn check_thresholds(adaptive: &Adaptive, mistakes: &mut Mistakes) {
    for (off, on, name) in [
        (&adaptive.off_rate, &adaptive.on_rate, "on_rate"),
        (&adaptive.off_half_open, &adaptive.on_half_open, "on_half_open"),
    ] {
        if off.value.0 > on.value.0 {
            let found = format!(
                "{}, more than {name}, so that it would begin and end at once",
                off.value.0
            );
            mistakes.error(&off.place, found, format!("at most {name}"));
            mistakes.see_also(&on.place);
        }
    }
}

/// `None` when they could not all be read.
fn check_versions(retry: &Retry, mistakes: &mut Mistakes) -> Option<Vec<u32>> {
    let versions = match &retry.except_versions {
        Given::Absent => return Some(Vec::new()),
        Given::Wrong => return None,
        Given::Here(versions) => &versions.value,
    };
    let shown = |version: u32| format!("{version:#010x}");
    check_unique(versions.items.iter().map(|at| (shown(at.value.0), at)), "version", mistakes);
    for At { value, place } in &versions.items {
        if value.0 == 0 || quic::header::Version::from_wire(value.0).is_some() {
            let found = format!("{}, of which all is known", shown(value.0));
            mistakes.error(place, found, "a version other than 1 and 2");
        }
    }
    let numbers = versions.items.iter().map(|at| at.value.0).collect();
    (!versions.incomplete).then_some(numbers)
}
