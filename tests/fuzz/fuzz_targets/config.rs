//! Any text is either a configuration or a report of mistakes, never a panic.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use quic_lb_config::{Surroundings, from_str};

fuzz_target!(|text: &str| {
    let surroundings = Surroundings {
        directory: Path::new("/nowhere"),
        ..Surroundings::of_text("fuzz.yaml")
    };
    match from_str(text, &surroundings) {
        Ok(loaded) => assert!(!loaded.config.pools.is_empty()),
        Err(report) => assert!(!report.to_string().is_empty()),
    }
});
