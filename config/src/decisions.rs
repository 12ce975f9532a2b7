//! What a balancer's decisions follow from, without anything that is its own: a document that two balancers can compare, and a
//! digest of it.

use std::collections::BTreeMap;

use quic::{
    routable::{CidConfig, ServerId},
    token::TokenKey,
};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use crate::{
    checked::{Backend, Config, HonoursTokens, Listener, Pool, Retry, RetryMode},
    units::display_duration,
};

/// What stands for the listeners where they all lead to the same; no listener has such a name.
const EVERY: &str = "*";

/// Octets of a check value: two keys by chance never have the same.
const CHECK_VALUE_LEN: usize = 8;

impl Config {
    /// What decides where a packet goes: to which pool listeners lead and when their clients have to prove their address, the pools
    /// that they lead to with backends, server IDs and configurations of connection IDs, and tokens where any are asked for. Maps by name,
    /// in no order of the file. Keys are there as check values, which tell nothing of them.
    ///
    /// Addresses of listeners are not in it: they are a balancer's own. Nor are their names, unless they lead to different
    /// pools. Limits, timeouts, checks and logging are not, and neither are pools that nothing leads to.
    #[must_use]
    pub fn decisions(&self) -> Value {
        let validates = self.listeners.iter().any(|of| self.retry_mode(of) != RetryMode::Off);
        let used = |index: &usize| self.listeners.iter().any(|listener| listener.pool == *index);
        let pools = self.pools.iter().enumerate().filter(|(index, _)| used(index));
        let pools = pools.map(|(_, of)| (of.name.clone(), pool(of, validates)));
        let mut decisions = json!({
            "listeners": self.listeners_decide(),
            "pools": pools.collect::<Map<_, _>>(),
        });
        if validates {
            decisions["retry"] = retry(&self.retry);
            decisions["unknown_short_headers"] = json!(self.limits.unknown_short_headers.as_str());
        }
        decisions
    }

    /// [`Self::masked_document`] with check values in place of keys, to be compared with that of another balancer, or of a file.
    #[must_use]
    pub fn compared_document(&self) -> Value {
        let mut document = self.masked_document();
        for (index, pool) in self.pools.iter().enumerate() {
            for (at, config) in pool.cid_configs.iter().enumerate() {
                if let Some(value) = key_of_cids(config) {
                    document["pools"][index]["quic_lb"][at]["key"] = json!(value);
                }
            }
        }
        for (at, key) in self.retry.keys.iter().enumerate() {
            document["retry"]["keys"][at]["key"] = json!(key_of_tokens(key));
        }
        document
    }

    /// Sixteen hex digits that differ where [`Self::decisions`] do.
    #[must_use]
    pub fn digest(&self) -> String {
        hex(&Sha256::digest(self.decisions().to_string())[..8])
    }

    fn listeners_decide(&self) -> Map<String, Value> {
        let decides = |listener: &Listener| {
            json!({
                "pool": self.pools.get(listener.pool).map(|pool| &pool.name),
                "retry": self.retry_mode(listener).as_str(),
            })
        };
        let named = self.listeners.iter().map(|of| (of.name.clone(), decides(of)));
        let named: Map<_, _> = named.collect();
        let mut all = named.values();
        match all.next() {
            Some(first) if all.all(|of| of == first) => {
                [(EVERY.to_owned(), first.clone())].into_iter().collect()
            }
            _ => named,
        }
    }
}

fn pool(pool: &Pool, validates: bool) -> Value {
    let quic_lb = pool.cid_configs.iter().map(|of| (of.id().to_string(), cid_config(of)));
    let backends = pool.backends.iter().map(|of| (of.name.clone(), backend(of)));
    let mut value = json!({
        "hash": pool.hash.as_str(),
        "quic_lb": quic_lb.collect::<Map<_, _>>(),
        "backends": backends.collect::<Map<_, _>>(),
    });
    if validates {
        value["honours_tokens"] = json!(match pool.honours_tokens {
            HonoursTokens::Probe => "probe",
            HonoursTokens::Yes => "true",
            HonoursTokens::No => "false",
        });
    }
    value
}

fn cid_config(config: &CidConfig) -> Value {
    let mut value = json!({
        "server_id_length": config.server_id_len(),
        "nonce_length": config.nonce_len(),
    });
    if let Some(key) = key_of_cids(config) {
        value["key"] = json!(key);
    }
    value
}

fn backend(backend: &Backend) -> Value {
    let ids = backend.server_ids.iter();
    json!({
        "address": backend.address,
        "state": backend.admission.as_str(),
        "weight": backend.weight,
        "server_ids": ids.map(|(id, of)| (id.to_string(), of.to_string())).collect::<BTreeMap<_, _>>(),
    })
}

/// The order of keys says which makes tokens.
fn retry(retry: &Retry) -> Value {
    let key = |key: &TokenKey| json!({ "sequence": key.sequence(), "key": key_of_tokens(key) });
    let versions = retry.except_versions.iter().map(|version| format!("{version:#010x}"));
    let mut versions: Vec<_> = versions.collect();
    versions.sort_unstable();
    json!({
        "format": retry.format.as_str(),
        "keys": retry.keys.iter().map(key).collect::<Vec<_>>(),
        "lifetime": display_duration(retry.lifetime),
        "other_versions": retry.other_versions.as_str(),
        "except_versions": versions,
    })
}

/// `None` where connection IDs are in the clear.
fn key_of_cids(config: &CidConfig) -> Option<String> {
    /// The shortest connection ID has 40 encrypted bits; so many tell any two keys apart.
    const SAMPLES: u8 = 4;
    if !config.is_encrypted() {
        return None;
    }
    // Hashed, so that no connection ID is given away with which somebody could ask a server.
    let mut made_with_it = Sha256::new();
    for sample in 0..SAMPLES {
        let server_id = ServerId::new(&vec![sample; config.server_id_len()]);
        let nonce = vec![0; config.nonce_len()];
        let cid = server_id.and_then(|server_id| config.encode(&server_id, &nonce).ok());
        made_with_it.update(cid.as_ref().map_or(&[][..], |cid| cid.as_slice()));
    }
    Some(check_value(&made_with_it.finalize()))
}

fn key_of_tokens(key: &TokenKey) -> String {
    check_value(&Sha256::digest(key.check_value()))
}

fn check_value(hashed: &[u8]) -> String {
    format!("check value {}", hex(&hashed[..CHECK_VALUE_LEN]))
}

fn hex(octets: &[u8]) -> String {
    octets.iter().map(|octet| format!("{octet:02x}")).collect()
}
