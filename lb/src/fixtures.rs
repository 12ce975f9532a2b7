//! A configuration that several unit tests share.

use std::{num::NonZeroU32, time::Duration};

use quic::{
    header::{LongType, Version},
    initial::{Initial, Sender},
    routable::{CidConfig, ConfigId, Key, ServerId},
    varint,
};
use quic_lb_config::{Admission, Backend, Config, HashBy, Limits, Listener, Log, Pool, Timeouts};

use crate::{backend::BackendId, registry::Registry};

/// One listener `edge`, one pool `web` with backends `a`, `b` and `c` on 127.0.0.1:5001 and up,
/// whose server IDs are 0001, 0002 and 0003 when they are to be routable.
pub(crate) fn config(routable: bool) -> Config {
    let backend = |n: u8, name: &str| Backend {
        name: name.into(),
        address: ([127, 0, 0, 1], 5000 + u16::from(n)).into(),
        server_ids: if routable { vec![(cid_config().id(), server_id(n))] } else { vec![] },
        weight: NonZeroU32::MIN,
        admission: Admission::Active,
        check_address: None,
    };
    Config {
        workers: None,
        listeners: vec![Listener {
            name: "edge".into(),
            address: ([127, 0, 0, 1], 4433).into(),
            both_families: false,
            pool: 0,
            retry_mode: None,
        }],
        pools: vec![Pool {
            name: "web".into(),
            cid_configs: if routable { vec![cid_config()] } else { vec![] },
            backends: vec![backend(1, "a"), backend(2, "b"), backend(3, "c")],
            source_addresses: vec![],
            reset_secret: None,
            hash: HashBy::default_of(routable),
            health_check: None,
            honours_tokens: quic_lb_config::HonoursTokens::Yes,
            report_token: None,
        }],
        admin: None,
        limits: Limits {
            flows: 1000.try_into().unwrap(),
            remembered: 1000.try_into().unwrap(),
            new_connections: Default::default(),
            unknown_short_headers: Default::default(),
        },
        timeouts: Timeouts {
            flow_idle: Duration::from_secs(180),
            flow_unanswered: Duration::from_secs(10),
            learnt: Duration::from_secs(600),
            drain: Duration::from_secs(30),
        },
        state_dir: None,
        log: Log { level: Default::default(), format: Default::default(), connections: None },
        retry: Default::default(),
    }
}

/// Numbers of backends.
pub(crate) fn backend_ids<const N: usize>() -> [BackendId; N] {
    let names: [String; N] = std::array::from_fn(|n| n.to_string());
    let backends = (5000..).zip(&names);
    let backends = backends.map(|(port, name)| ("web", &**name, ([127, 0, 0, 1], port).into()));
    let ids = Registry::default().assign(backends);
    std::array::from_fn(|n| ids[n].unwrap())
}

/// The configuration of routable connection IDs: two octets of server ID, six of nonce, a key.
pub(crate) fn cid_config() -> CidConfig {
    CidConfig::new(ConfigId::new(0).unwrap(), 2, 6, Some(&Key::new([7; 16]))).unwrap()
}

/// The server ID of the `n`th backend.
pub(crate) fn server_id(n: u8) -> ServerId {
    ServerId::new(&[0, n]).unwrap()
}

/// An Initial of 1,200 octets that says nothing.
pub(crate) fn initial(version: Version, dcid: &[u8], scid: &[u8], token: &[u8]) -> Vec<u8> {
    let mut out = vec![0xc0 | LongType::Initial.to_first_octet(version)];
    out.extend_from_slice(&version.to_wire().to_be_bytes());
    for id in [dcid, scid] {
        out.push(u8::try_from(id.len()).unwrap());
        out.extend_from_slice(id);
    }
    varint::write(token.len() as u64, &mut out);
    out.extend_from_slice(token);
    out.resize(1200, 0);
    out
}

/// An Initial of 1,200 octets as a client writes it, whose protection matches its destination.
pub(crate) fn sealed_initial(version: Version, dcid: &[u8], scid: &[u8], token: &[u8]) -> Vec<u8> {
    written(&client_initial(version, dcid, scid, token))
}

/// An Initial of a client that says nothing.
pub(crate) fn client_initial<'a>(
    version: Version,
    dcid: &'a [u8],
    scid: &'a [u8],
    token: &'a [u8],
) -> Initial<'a> {
    Initial {
        version,
        sender: Sender::Client,
        key_cid: dcid,
        dcid,
        scid,
        token,
        frames: &[0; 1000],
    }
}

/// The octets of `initial` in a datagram of 1,200.
pub(crate) fn written(initial: &Initial<'_>) -> Vec<u8> {
    let mut out = vec![0; 1300];
    let len = initial.write(&mut out).unwrap();
    out[len..].fill(0);
    out.truncate(len.max(1200));
    out
}

/// Datagrams that end like this make a forwarder panic, each at its place.
pub(crate) const AT_VERDICT: &[u8] = b" panic at the verdict";
pub(crate) const AT_DECODING: &[u8] = b" panic while decoding";
pub(crate) const AT_RETURN: &[u8] = b" panic on the way back";

/// Panics if a datagram is to have that effect at this place.
#[track_caller]
pub(crate) fn trip(place: &[u8], octets: &[u8]) {
    assert!(!octets.ends_with(place), "as the test wants");
}
