//! A QUIC-aware layer-4 load balancer.
