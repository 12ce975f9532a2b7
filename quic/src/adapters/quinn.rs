//! For quinn: a [`ConnectionIdGenerator`] whose connection IDs
//! a balancer can read.
//!
//! ```
//! use quic::{
//!     adapters::quinn::RoutableCids,
//!     routable::{CidConfig, CidGenerator, ConfigId, Key, Partition, ServerId},
//! };
//!
//! # fn seed() -> [u8; 32] { [1; 32] }
//! let config = CidConfig::new(ConfigId::new(0).unwrap(), 2, 6, Some(&Key::new([7; 16])))?;
//! let server_id = ServerId::new(&[0x00, 0x01]).unwrap();
//! let generator = CidGenerator::new(config, server_id, Partition::Whole, seed())?;
//! let cids = RoutableCids::new(generator, seed());
//! // endpoint_config.cid_generator(move || Box::new(cids.clone()));
//! # let _ = cids;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use quinn_proto::{ConnectionId, ConnectionIdGenerator};

use crate::routable::CidGenerator;

/// Makes quinn's connection IDs routable.
///
/// quinn may build one generator per endpoint; clones share one [`CidGenerator`], so that a nonce
/// is used once however many there are.
#[derive(Clone, Debug)]
pub struct RoutableCids {
    generator: Arc<Mutex<CidGenerator>>,
    cid_len: usize,
}

impl RoutableCids {
    /// Hands out what `generator` makes. quinn cannot be told that nonces have run out; should they
    /// ever, connection IDs of the same length that are marked as not routable follow, drawn from
    /// `fallback_seed`.
    #[must_use]
    pub fn new(generator: CidGenerator, fallback_seed: [u8; 32]) -> Self {
        let cid_len = generator.cid_len();
        let generator = generator.or_unroutable(fallback_seed);
        Self { generator: Arc::new(Mutex::new(generator)), cid_len }
    }
}

impl ConnectionIdGenerator for RoutableCids {
    fn generate_cid(&mut self) -> ConnectionId {
        // A generator is whole between calls, so a panic elsewhere has not broken it.
        let mut generator = self.generator.lock().unwrap_or_else(PoisonError::into_inner);
        let cid = generator.generate().expect("or_unroutable never runs out");
        ConnectionId::new(&cid)
    }

    fn cid_len(&self) -> usize {
        self.cid_len
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}
