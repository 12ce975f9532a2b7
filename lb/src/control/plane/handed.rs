//! What the control plane of a successor takes over: the numbers of backends, what an operator has commanded, and what is known of
//! the health of backends. The configuration is in the file.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use quic_lb_config::Config;
use serde::{Deserialize, Serialize};

use super::{
    ControlPlane,
    watched::{Name, Watched},
};
use crate::{
    control::{
        checks::{contract::Contract, state::Checked},
        commands::{Kept, packed, unpacked},
        health::Health,
    },
    listeners::Opening,
    memory::Memory,
    registry::{HandedNumbers, Registry},
    succession::Offset,
    wanted::WantedBackend,
};

/// Commands and health.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct HandedPlane {
    commands: Vec<Kept>,
    backends: Vec<HandedBackend>,
}

#[derive(Debug, Serialize, Deserialize)]
struct HandedBackend {
    name: Name,
    #[serde(with = "crate::zoned")]
    address: SocketAddr,
    health: Health<Offset>,
    wiring: Health<Offset>,
    checked: Option<Checked<Offset>>,
    contract: Contract,
    drains_since: Option<Duration>,
}

impl ControlPlane {
    /// As [`ControlPlane::new`], with the numbers that backends and listeners had for the predecessor.
    ///
    /// # Errors
    ///
    /// Why not, if `config` has listeners that the predecessor has not opened.
    pub(crate) fn succeeding(
        config: Config,
        memory: Arc<Memory>,
        seed: [u64; 2],
        numbers: HandedNumbers,
    ) -> Result<Self, Vec<String>> {
        let registry = Registry::succeeding(numbers);
        let Some((_, opened)) = registry.listeners.planned(&config) else {
            return Err(vec!["there are more new listeners than there are numbers".to_owned()]);
        };
        if opened.is_empty() {
            return Ok(Self::with(config, memory, seed, registry));
        }
        let reason = |Opening { listener, .. }: &Opening| {
            format!("listener {} at {} is new", listener.name, listener.address)
        };
        Err(opened.iter().map(reason).collect())
    }

    /// Who has which number, for a successor.
    pub(crate) fn handed_numbers(&self) -> HandedNumbers {
        self.registry.handed()
    }

    /// How many configurations have been applied; `None` while one is about to be.
    pub(crate) fn settled(&self) -> Option<u64> {
        self.planned.is_none().then_some(self.reloads.applied)
    }

    /// What a successor takes over.
    pub(crate) fn handed(&self, now: Instant) -> HandedPlane {
        let offset = |moment| Offset::new(now, moment);
        let pools = self.config.pools.iter().zip(self.wanted.pools()).zip(self.fleet.pools());
        let named = pools.flat_map(|((pool, wanted), watched)| {
            let named = |(of, watched): (&WantedBackend, _)| {
                ((pool.name.clone(), of.name.to_string()), watched)
            };
            wanted.iter().zip(watched).map(named)
        });
        let backends = named.map(|(name, watched): (_, &Watched)| HandedBackend {
            name,
            address: watched.address,
            health: watched.health.map(offset),
            wiring: watched.wiring.map(offset),
            checked: watched.checked.map(|checked| checked.map(offset)),
            contract: watched.contract,
            drains_since: watched.drains_since,
        });
        HandedPlane { commands: packed(&self.commands), backends: backends.collect() }
    }

    /// Goes on with what a predecessor has handed over, and puts it in force.
    pub(crate) fn take_over(&mut self, now: Instant, handed: HandedPlane) {
        self.knows_since = self.memory.since_epoch(now);
        self.commands = unpacked(handed.commands);
        self.heed_commands();
        for of in handed.backends {
            let (pool, name) = &of.name;
            let watched = self.fleet.get_mut(pool, name);
            // In the file it may be another one by now.
            let Some(watched) = watched.filter(|watched| watched.address == of.address) else {
                continue;
            };
            let moment = |offset: Offset| offset.from(now);
            watched.health = of.health.map(moment);
            watched.wiring = of.wiring.map(moment);
            watched.contract = of.contract;
            watched.drains_since = of.drains_since;
            if watched.checked.is_some() {
                watched.checked = of.checked.map(|checked| checked.map(moment)).or(watched.checked);
            }
        }
        self.want();
        if let Some(order) = self.order() {
            self.install(order.build());
        }
    }
}
