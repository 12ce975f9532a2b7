//! The YAML of quic-lb, read into a [`Config`] that cannot be wrong.
#![forbid(unsafe_code)]

mod checked;

pub use checked::*;
