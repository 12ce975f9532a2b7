//! Shared helpers of the quic-lb test suites.
