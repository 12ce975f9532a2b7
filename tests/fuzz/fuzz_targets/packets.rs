//! Any octets are walked as a datagram of coalesced packets without panic, and the packets found
//! lie within the datagram, in order, without overlap.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quic::{header::packets, invariants::Packet};

fuzz_target!(|datagram: &[u8]| {
    let mut covered = 0;
    for packet in packets(datagram) {
        let Ok(packet) = packet else { return };
        covered += match packet {
            Packet::Long(header) => {
                let _ = header.kind();
                1 + 4 + 1 + header.dcid.len() + 1 + header.scid.len() + header.rest.len()
            }
            Packet::Short(header) => 1 + header.rest.len(),
        };
    }
    assert_eq!(covered, datagram.len());
});
