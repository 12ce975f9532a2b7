//! The contract about connection IDs, pure: in pools with routable ones, those that a server has chosen in a check
//! have to lead to it. What it chose goes in, beside what the configuration says; whether it keeps the
//! contract comes out.
//!
//! ```text
//!            broken twice in a row
//!   Kept ───────────────────────────► Broken
//!    ▲                                  │
//!    └──────────────────────────────────┘
//!             kept twice in a row
//! ```
//!
//! Handshakes are authentic, so that one connection ID that leads elsewhere is no accident of the way. But a
//! server and a balancer that are both about to get another configuration are not changed at one moment, and two
//! servers behind one address take turns.

use std::fmt;

use quic::{
    connection_id::ConnectionId,
    routable::{ConfigId, Decoded, Decoder, ServerId, Unroutable},
};
use quic_lb_config::{Backend, Pool};
use serde::{Deserialize, Serialize};

/// So many checks in a row change what is thought of a server.
const IN_A_ROW: u32 = 2;

/// Whether a server chooses connection IDs that lead to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Contract {
    /// It does, as far as is known.
    Kept {
        /// Checks in a row that showed something else.
        broken: u32,
    },
    /// It does not.
    Broken {
        /// Checks in a row that showed nothing wrong.
        kept: u32,
    },
}

impl Default for Contract {
    fn default() -> Self {
        Self::Kept { broken: 0 }
    }
}

impl Contract {
    /// The state after a check that showed connection IDs, all of them good or not.
    #[must_use]
    pub(crate) const fn on_check(self, good: bool) -> Self {
        match (self, good) {
            (Self::Kept { .. }, true) => Self::Kept { broken: 0 },
            (Self::Kept { broken }, false) if broken + 1 < IN_A_ROW => {
                Self::Kept { broken: broken + 1 }
            }
            (Self::Broken { kept }, true) if kept + 1 < IN_A_ROW => Self::Broken { kept: kept + 1 },
            (Self::Broken { .. }, true) => Self::Kept { broken: 0 },
            (Self::Kept { .. } | Self::Broken { .. }, false) => Self::Broken { kept: 0 },
        }
    }

    #[must_use]
    pub(crate) const fn is_broken(self) -> bool {
        matches!(self, Self::Broken { .. })
    }
}

/// What a passed check shows of connection IDs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Shown {
    /// Nothing, or nothing that is known how to read.
    Nothing,
    /// They lead to the server that has chosen them, by this configuration.
    Good(Option<ConfigId>),
    /// One of them does not.
    Breach(Breach),
}

/// What a server's connection IDs should say, and what one of them said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Breach {
    /// In words.
    pub(crate) expected: String,
    pub(crate) found: Found,
}

/// A connection ID that does not lead to the server that has chosen it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    cid: ConnectionId,
    why: Why,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Why {
    Unroutable(Unroutable),
    /// It names another server: one of the pool, or none of it.
    Names(Decoded, Option<String>),
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cid, why } = self;
        match why {
            Why::Unroutable(why) => write!(f, "{why}: {cid}"),
            Why::Names(Decoded { config_id, server_id }, backend) => {
                write!(f, "server ID {server_id} in configuration {config_id}, ")?;
                match backend {
                    Some(backend) => write!(f, "which is backend {backend}: {cid}"),
                    None => write!(f, "which no backend of the pool has: {cid}"),
                }
            }
        }
    }
}

/// The first of the connection IDs, chosen by `backend`, that does not lead to it. The pool has to have routable
/// ones.
pub(crate) fn breach(pool: &Pool, backend: &Backend, cids: &[ConnectionId]) -> Option<Breach> {
    let decoder = Decoder::new(pool.cid_configs.iter().cloned());
    let leads_to = |backend: &Backend, Decoded { config_id, server_id }: Decoded| {
        backend.server_ids.contains(&(config_id, server_id))
    };
    let wrong = |cid: &ConnectionId| {
        let why = match decoder.decode(cid.as_slice()) {
            Err(unroutable) => Why::Unroutable(unroutable),
            Ok(decoded) if leads_to(backend, decoded) => return None,
            Ok(decoded) => {
                let named = pool.backends.iter().find(|other| leads_to(other, decoded));
                Why::Names(decoded, named.map(|named| named.name.clone()))
            }
        };
        Some(Found { cid: *cid, why })
    };
    let found = cids.iter().find_map(wrong)?;
    Some(Breach { expected: identities(&backend.server_ids), found })
}

/// The configuration of the connection ID that was chosen last.
pub(crate) fn made_by(pool: &Pool, cids: &[ConnectionId]) -> Option<ConfigId> {
    let decoder = Decoder::new(pool.cid_configs.iter().cloned());
    let newest = cids.last()?;
    decoder.decode(newest.as_slice()).ok().map(|decoded| decoded.config_id)
}

/// What connection IDs of a backend may say.
fn identities(server_ids: &[(ConfigId, ServerId)]) -> String {
    let each = server_ids.iter().map(|(config_id, server_id)| {
        format!("server ID {server_id} in configuration {config_id}")
    });
    each.collect::<Vec<_>>().join(", or ")
}

#[cfg(test)]
mod tests {
    use quic::routable::{CidConfig, ConfigId};

    use super::*;
    use crate::fixtures;

    #[test]
    fn every_state_meets_both_kinds_of_checks() {
        let (kept, broken) = (|broken| Contract::Kept { broken }, |kept| Contract::Broken { kept });
        for (before, good, after) in [
            (kept(0), true, kept(0)),
            (kept(0), false, kept(1)),
            (kept(1), true, kept(0)),
            (kept(1), false, broken(0)),
            (broken(0), false, broken(0)),
            (broken(0), true, broken(1)),
            (broken(1), false, broken(0)),
            (broken(1), true, kept(0)),
        ] {
            assert_eq!(before.on_check(good), after, "{before:?}, {good}");
        }
        assert_eq!(Contract::default(), kept(0));
        assert!(!kept(1).is_broken() && broken(1).is_broken());
    }

    #[test]
    fn connection_ids_have_to_lead_to_who_has_chosen_them() {
        let mut pool = fixtures::config(true).pools.remove(0);
        let clear = CidConfig::new(ConfigId::new(3).unwrap(), 1, 4, None).unwrap();
        pool.cid_configs.push(clear.clone());
        let id_of_a = ServerId::new(&[0xa1]).unwrap();
        pool.backends[0].server_ids.push((clear.id(), id_of_a));
        let encode = |n| fixtures::cid_config().encode(&fixtures::server_id(n), &[7; 6]).unwrap();
        let cid = |octets: &[u8]| ConnectionId::new(octets).unwrap();
        let in_clear = clear.encode(&id_of_a, &[1, 2, 3, 4]).unwrap();
        let longer = cid(&[encode(1).as_slice(), &[1, 2]].concat());
        let found = |cids: &[ConnectionId]| {
            breach(&pool, &pool.backends[0], cids).map(|breach| breach.found.to_string())
        };
        for good in [&[][..], &[encode(1)], &[in_clear], &[encode(1), in_clear, longer]] {
            assert_eq!(found(good), None, "{good:?}");
        }
        for (wrong, says) in [
            (encode(2), "server ID 0002 in configuration 0, which is backend b: "),
            (encode(9), "server ID 0009 in configuration 0, which no backend of the pool has: "),
            (cid(&[0x65, 9, 1, 2, 3, 4]), "server ID 09 in configuration 3, which no backend"),
            (cid(&[0x65, 0xa1, 1, 2, 3]), "configuration 3 needs more bytes than there are: 65a1"),
            (cid(&[0x20; 9]), "there is no configuration with ID 1: 2020"),
            (cid(&[0xff; 8]), "the config bits are 0b111"),
            (cid(&[]), "the connection ID is empty"),
        ] {
            let said = found(&[encode(1), wrong]).unwrap();
            assert!(said.starts_with(says), "{said}");
        }
        let expected = breach(&pool, &pool.backends[0], &[encode(2)]).unwrap().expected;
        assert_eq!(
            expected,
            "server ID 0001 in configuration 0, or server ID a1 in configuration 3"
        );
    }
}
