//! A client of ours whose peer has the keys and bad intentions.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quic::transport::Side;
use quic_lb_fuzz::attack::{self, Plan};

fuzz_target!(|plan: Plan| attack::run(Side::Client, &plan));
