//! Any payload reads as frames, to the end or to an error, without panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quic::transport::{Code, fuzzing::read_frames};

fuzz_target!(|payload: &[u8]| match read_frames(payload) {
    Ok(count) => assert!((1..=payload.len()).contains(&count)),
    Err(code) => assert!([Code::FRAME_ENCODING_ERROR, Code::PROTOCOL_VIOLATION].contains(&code)),
});
