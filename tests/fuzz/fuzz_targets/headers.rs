//! Any datagram's headers read as the transport reads them, within the datagram, without panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quic::transport::fuzzing::read_headers;

fuzz_target!(|input: (u8, &[u8])| {
    let (dcid_len, datagram) = input;
    let _ = read_headers(datagram, usize::from(dcid_len) % 21);
});
