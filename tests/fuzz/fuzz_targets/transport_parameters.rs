//! Any transport parameters read or are an error, and those that read are the same when written
//! and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quic::transport::{Code, Side, fuzzing::read_transport_parameters};

fuzz_target!(|octets: &[u8]| {
    for sender in [Side::Client, Side::Server] {
        if let Err(code) = read_transport_parameters(octets, sender) {
            assert_eq!(code, Code::TRANSPORT_PARAMETER_ERROR);
        }
    }
});
