//! What others may see of a [`Config`]: a document without secrets.

use std::net::Ipv6Addr;

use serde_json::{Map, Value, json};

use crate::{
    checked::{
        Admin, Backend, CertificatePolicy, CheckKind, Commands, Config, ConnectionLog, Handshake,
        HealthCheck, HonoursTokens, LogTarget, NewConnections, Pool, Request, Retry,
    },
    leaf::{CertificateWord, CheckWord},
    units::display_duration,
};

impl Config {
    /// The configuration in the shape of the file, with every default written out and `"masked"`
    /// in place of keys.
    #[must_use]
    pub fn masked_document(&self) -> Value {
        let listeners: Vec<_> = self
            .listeners
            .iter()
            .map(|listener| {
                let pool = self.pools.get(listener.pool).map(|pool| &pool.name);
                let mut value =
                    json!({ "name": listener.name, "address": listener.address, "pool": pool });
                if listener.address.ip() == Ipv6Addr::UNSPECIFIED {
                    value["ipv6_only"] = json!(!listener.both_families);
                }
                if let Some(mode) = listener.retry_mode {
                    value["retry"] = json!({ "mode": mode.as_str() });
                }
                value
            })
            .collect();
        let mut document = self.own_document();
        document["listeners"] = listeners.into();
        document["pools"] = self.pools.iter().map(pool).collect();
        document["retry"] = retry(&self.retry);
        document
    }

    /// What of [`Self::masked_document`] is about the process alone: all but listeners, pools and address validation.
    #[must_use]
    pub fn own_document(&self) -> Value {
        let mut document = json!({
            "limits": {
                "flows": self.limits.flows,
                "remembered": self.limits.remembered,
                "new_connections_per_second": new_connections(&self.limits.new_connections),
                "unknown_short_headers": self.limits.unknown_short_headers.as_str(),
            },
            "timeouts": {
                "flow_idle": display_duration(self.timeouts.flow_idle),
                "flow_unanswered": display_duration(self.timeouts.flow_unanswered),
                "learnt": display_duration(self.timeouts.learnt),
                "drain": display_duration(self.timeouts.drain),
            },
            "log": { "level": self.log.level.as_str(), "format": self.log.format.as_str() },
        });
        if let Some(connections) = &self.log.connections {
            document["log"]["connections"] = connection_log(connections);
        }
        if let Some(state_dir) = &self.state_dir {
            document["state_dir"] = json!(state_dir);
        }
        if let Some(workers) = self.workers {
            document["workers"] = json!(workers);
        }
        if let Some(Admin { address, host_names, commands }) = &self.admin {
            document["admin"] = json!({ "address": address, "host_names": host_names });
            match commands {
                Some(Commands::Unix(path)) => {
                    document["admin"]["commands"] = json!({ "unix": path });
                }
                Some(Commands::Token(address, token)) => {
                    document["admin"]["commands"] =
                        json!({ "address": address, "token_file": token.file });
                }
                Some(Commands::Certificates(address, tls)) => {
                    document["admin"]["commands"] = json!({
                        "address": address,
                        "cert_file": tls.cert_file,
                        "key_file": tls.key_file,
                        "client_ca_file": tls.clients.file,
                    });
                }
                None => {}
            }
        }
        document
    }
}

fn pool(pool: &Pool) -> Value {
    let quic_lb: Vec<_> = pool
        .cid_configs
        .iter()
        .map(|config| {
            let mut value = json!({
                "config_id": config.id().get(),
                "server_id_length": config.server_id_len(),
                "nonce_length": config.nonce_len(),
            });
            if config.is_encrypted() {
                value["key"] = json!("masked");
            }
            value
        })
        .collect();
    let mut value = json!({
        "name": pool.name,
        "quic_lb": quic_lb,
        "backends": pool.backends.iter().map(backend).collect::<Vec<_>>(),
        "source_addresses": pool.source_addresses,
        "hash": pool.hash.as_str(),
    });
    if let Some(health_check) = &pool.health_check {
        value["health_check"] = self::health_check(health_check);
    }
    if pool.honours_tokens != HonoursTokens::Probe {
        value["honours_tokens"] = json!(pool.honours_tokens == HonoursTokens::Yes);
    }
    if let Some(token) = &pool.report_token {
        value["report_token_file"] = json!(token.file);
    }
    if pool.reset_secret.is_some() {
        value["stateless_reset"] = json!({ "key": "masked" });
    }
    value
}

fn connection_log(log: &ConnectionLog) -> Value {
    let ConnectionLog { to, sample_millionths, format } = log;
    let path = match to {
        LogTarget::Stdout => json!("stdout"),
        LogTarget::File(path) => json!(path),
    };
    let sample = f64::from(*sample_millionths) / 1e6;
    json!({ "path": path, "sample": sample, "format": format.as_str() })
}

fn health_check(check: &HealthCheck) -> Value {
    let (kind, handshake) = match &check.kind {
        CheckKind::VersionNegotiation => (CheckWord::VersionNegotiation, None),
        CheckKind::Quic(handshake) => (CheckWord::Quic, Some(handshake)),
        CheckKind::Http3(handshake, _) => (CheckWord::Http3, Some(handshake)),
    };
    let mut value = json!({
        "kind": kind.as_str(),
        "interval": display_duration(check.interval),
        "timeout": display_duration(check.timeout),
        "rise": check.rise,
        "fall": check.fall,
        "panic_below": format!("{}%", check.panic_below),
        "slow_start": display_duration(check.slow_start),
    });
    if let Some(port) = check.port {
        value["port"] = json!(port);
    }
    if let Some(Handshake { alpn, server_name, certificate }) = handshake {
        if let CheckKind::Http3(_, Request { path, expect_status }) = &check.kind {
            value["path"] = json!(path);
            value["expect_status"] = json!(expect_status);
        } else {
            value["alpn"] = json!(alpn);
        }
        if let Some(server_name) = server_name {
            value["server_name"] = json!(server_name);
        }
        match certificate {
            CertificatePolicy::Ignored => {
                value["certificate"] = json!(CertificateWord::Ignored.as_str());
            }
            CertificatePolicy::Verified(anchors) => value["ca_file"] = json!(anchors.file),
        }
    }
    value
}

fn backend(backend: &Backend) -> Value {
    let mut value = json!({
        "name": backend.name,
        "address": backend.address,
        "weight": backend.weight,
        "state": backend.admission.as_str(),
    });
    if !backend.server_ids.is_empty() {
        let ids =
            backend.server_ids.iter().map(|(id, sid)| (id.to_string(), json!(sid.to_string())));
        value["server_ids"] = ids.collect::<Map<_, _>>().into();
    }
    if let Some(address) = backend.check_address {
        value["check_address"] = json!(address);
    }
    value
}

fn new_connections(limits: &NewConnections) -> Value {
    let NewConnections { total, per_listener, per_address, per_network } = limits;
    let limits = [
        ("total", total),
        ("per_listener", per_listener),
        ("per_address", per_address),
        ("per_network", per_network),
    ];
    let given =
        limits.into_iter().filter_map(|(name, limit)| Some((name.to_owned(), json!((*limit)?))));
    given.collect::<Map<_, _>>().into()
}

fn retry(retry: &Retry) -> Value {
    let mut value = json!({
        "mode": retry.mode.as_str(),
        "format": retry.format.as_str(),
        "lifetime": display_duration(retry.lifetime),
        "transition": display_duration(retry.transition),
        "other_versions": retry.other_versions.as_str(),
        "adaptive": {
            "on_rate": retry.adaptive.on_rate,
            "on_half_open": retry.adaptive.on_half_open,
            "off_rate": retry.adaptive.off_rate,
            "off_half_open": retry.adaptive.off_half_open,
            "hold": display_duration(retry.adaptive.hold),
        },
    });
    if !retry.keys.is_empty() {
        let keys = retry.keys.iter();
        value["keys"] =
            keys.map(|key| json!({ "sequence": key.sequence(), "key": "masked" })).collect();
    }
    if !retry.except_versions.is_empty() {
        let versions = retry.except_versions.iter();
        value["except_versions"] = versions.map(|version| format!("{version:#010x}")).collect();
    }
    value
}
