//! Any text is either a configuration or a report of mistakes, never a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Err(report) = quic_lb_config::from_str(text) {
        assert!(!report.to_string().is_empty());
    }
});
