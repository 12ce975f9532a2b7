//! Any octets open without panic, and nothing that was not sealed with the key opens.
#![no_main]

use std::time::UNIX_EPOCH;

use libfuzzer_sys::fuzz_target;
use quic::{
    header::Version,
    retry,
    token::{InvalidToken, TokenKey, TokenKeys, nat, shared_state},
};

fuzz_target!(|octets: &[u8]| {
    let keys = TokenKeys::new((0..128).filter_map(|n| TokenKey::new(n, [n; 16], [n; 12])));
    let Some((dcid, token)) = octets.split_at_checked(8) else { return };
    let from = ([192, 0, 2, 1], 443).into();
    // Time is looked at when the seal has been.
    let is_sealed = |error| matches!(error, InvalidToken::Expired | InvalidToken::Future);
    assert!(nat::open(&keys, token, dcid, UNIX_EPOCH).is_err_and(|error| !is_sealed(error)));
    let opened = shared_state::open(&keys, token, from, dcid, UNIX_EPOCH);
    assert!(opened.is_err_and(|error| !is_sealed(error)));
    for version in [Version::V1, Version::V2] {
        assert!(!retry::verify(version, dcid, token));
    }
});
