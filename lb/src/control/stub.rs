//! Stands in until the data plane is there.
use crate::{counters::WorkerCounters, memory::Memory, routing::Routing};
use arc_swap::ArcSwap;
use quic_lb_config::Config;
use std::{io, net::SocketAddr, sync::Arc};
#[derive(Debug, thiserror::Error)]
#[error("stub")]
pub struct StartError;
pub(super) struct Workers;
impl Workers {
    pub(super) fn start(
        _: &Config,
        _: Arc<ArcSwap<Routing>>,
        _: Arc<Memory>,
    ) -> Result<Self, StartError> {
        Ok(Self)
    }
    pub(super) fn counters(&self) -> &[Arc<WorkerCounters>] {
        &[]
    }
    pub(super) fn local_addresses(&self) -> Vec<SocketAddr> {
        vec![]
    }
    pub(super) fn failure(&self) -> Option<String> {
        None
    }
    pub(super) fn stop(self) {}
}
pub(super) fn raise_descriptor_limit() -> io::Result<u64> {
    Ok(1)
}
