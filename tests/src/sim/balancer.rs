//! A node that is the balancer: its own forwarder decides, and this carries the verdicts out as a
//! worker does, with one upstream port per flow.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    num::{NonZeroU32, NonZeroUsize},
    sync::Arc,
    time::{Duration, Instant},
};

use quic::routable::{CidConfig, ServerId};
use quic_lb::{
    admission::mode::{Load, Settings, Switch},
    backend::BackendState,
    client_path::{ClientAddr, ClientPath, ListenerIndex},
    counters::WorkerCounters,
    forwarder::{Clock, Datagram, Forwarder, Returned, Start},
    memory::Memory,
    registry::Registry,
    routing::Routing,
    totals::{LiveTotals, Totals},
    verdict::{DropReason, Ended, FlowId, Opened, Verdict, Via},
};
use quic_lb_config::{
    Admission, Backend, Config, HashBy, Limits, Listener, Log, Pool, Retry as RetryConfig, Timeouts,
};

use super::{Node, Packet, origin, wall};

/// One listener and one pool.
#[derive(Debug)]
pub struct Balancer {
    front: SocketAddr,
    inside: IpAddr,
    forwarder: Forwarder,
    routing: Arc<Routing>,
    registry: Registry,
    config: Config,
    validation: Switch,
    /// The upstream port of a flow, and the flow of a port.
    ports: BTreeMap<usize, u16>,
    flows: BTreeMap<u16, FlowId>,
    next_port: u16,
    out: Vec<Packet>,
    counters: Arc<WorkerCounters>,
    totals: Totals,
    /// Which backend, by its number, the datagrams of a client's address went to last.
    pub went: BTreeMap<IpAddr, usize>,
    /// How often a rule decided.
    pub decided: BTreeMap<&'static str, u64>,
    /// How often nothing was sent, and why.
    pub dropped: Vec<DropReason>,
}

impl Balancer {
    /// Listens on `front` and speaks to `backends` from the ports of `inside`. Each backend has an
    /// address and its server IDs, one per configuration.
    #[must_use]
    pub fn new(
        front: SocketAddr,
        inside: IpAddr,
        cid_configs: &[CidConfig],
        backends: &[(SocketAddr, ServerId)],
    ) -> Self {
        let mut registry = Registry::default();
        let config = config(front, cid_configs, backends);
        let routing = Routing::new(&config, &mut registry, |_, _| BackendState::Active);
        let routing = Arc::new(routing);
        let clock = Clock { now: origin(), unix: wall() };
        let start = Start { clock, seed: [0xb1; 32] };
        let memory = Arc::new(Memory::new(10_000, origin(), [0xb1; 4]));
        let counters = Arc::new(WorkerCounters::new(1));
        let mut totals = Totals::default();
        totals.add(Arc::clone(&counters));
        Self {
            front,
            inside,
            forwarder: Forwarder::new(10_000, Arc::clone(&routing), memory, &start),
            routing,
            registry,
            validation: Switch::at_start(config.retry.mode),
            config,
            ports: BTreeMap::new(),
            flows: BTreeMap::new(),
            next_port: 10_000,
            out: Vec::new(),
            counters,
            totals,
            went: BTreeMap::new(),
            decided: BTreeMap::new(),
            dropped: Vec::new(),
        }
    }

    /// Replaces the configurations of connection IDs, as a reload does.
    pub fn reload(&mut self, cid_configs: &[CidConfig], backends: &[(SocketAddr, ServerId)]) {
        self.config.pools = config(self.front, cid_configs, backends).pools;
        self.apply();
    }

    /// Changes how addresses are validated and what is limited, as a reload does.
    pub fn configure(&mut self, now: Instant, change: impl FnOnce(&mut Config)) {
        change(&mut self.config);
        let RetryConfig { mode, transition, adaptive, .. } = self.config.retry;
        let settings = Settings { mode, transition, adaptive };
        self.validation = self.validation.on_load(now, Load::default(), &settings);
        self.registry.admission.set_phase(0, self.validation.phase());
        self.apply();
    }

    /// Gives a backend, by its number, no new connections.
    pub fn drain(&mut self, backend: usize) {
        self.config.pools[0].backends[backend].admission = Admission::Draining;
        self.apply();
    }

    /// What a worker does now and then.
    pub fn sweep(&mut self, now: Instant) {
        let mut expired = Vec::new();
        self.forwarder.sweep(now, &mut expired);
        for Ended { flow, .. } in expired {
            if let Some(port) = self.ports.remove(&flow.index()) {
                self.flows.remove(&port);
            }
        }
        self.forwarder.tell_live(&self.counters);
    }

    /// The live connections of a backend, by its number, as of the last sweeps.
    #[must_use]
    pub fn live(&self, backend: usize) -> LiveTotals {
        let name = backend.to_string();
        let id = self.routing.backends().find(|route| *route.name == *name).map(|route| route.id);
        id.map(|id| self.totals.live(id)).unwrap_or_default()
    }

    fn apply(&mut self) {
        let Self { config, registry, .. } = self;
        let backends = &config.pools[0].backends;
        let drains = |name: &str| {
            let mut named = backends.iter().filter(|backend| backend.name == name);
            named.any(|backend| backend.admission == Admission::Draining)
        };
        let state = |_: &str, name: &str| match drains(name) {
            true => BackendState::Draining,
            false => BackendState::Active,
        };
        self.routing = Arc::new(Routing::new(config, registry, state));
        self.forwarder.set_routing(Arc::clone(&self.routing));
    }

    fn handle_client(&mut self, now: Instant, packet: Packet) {
        let path = ClientPath { client: ClientAddr(packet.from), local: Some(self.front.ip()) };
        let datagram = Datagram { path, octets: &packet.octets };
        let mut verdicts = [Verdict::Drop(DropReason::Empty)];
        self.forwarder.decide_batch(now, ListenerIndex(0), &[datagram], &mut verdicts);
        for reply in self.forwarder.replies() {
            let octets = reply.octets.to_vec();
            self.out.push(Packet { from: self.front, to: packet.from, octets, ..packet });
        }
        match verdicts[0] {
            Verdict::Drop(reason) => self.dropped.push(reason),
            Verdict::Reply(kind) => *self.decided.entry(kind.label()).or_default() += 1,
            Verdict::Forward { backend, rule, via } => {
                *self.decided.entry(rule.label()).or_default() += 1;
                if let Via::NewFlow(Opened { flow, evicted, .. }) = via {
                    if let Some(port) = evicted.and_then(|old| self.ports.remove(&old.flow.index()))
                    {
                        self.flows.remove(&port);
                    }
                    self.next_port += 1;
                    self.ports.insert(flow.index(), self.next_port);
                    self.flows.insert(self.next_port, flow);
                }
                let Some(backend) = self.routing.backend(backend) else { return };
                if let Ok(number) = backend.name.parse() {
                    self.went.insert(packet.from.ip(), number);
                }
                let port = via.flow().and_then(|flow| self.ports.get(&flow.index()));
                let Some(&port) = port else { return };
                let from = SocketAddr::new(self.inside, port);
                self.out.push(Packet { from, to: backend.address.0, ..packet });
            }
        }
    }

    fn handle_backend(&mut self, now: Instant, packet: Packet) {
        let Some(&flow) = self.flows.get(&packet.to.port()) else { return };
        if self.forwarder.returned(now, flow, &packet.octets) == Returned::Stale {
            return;
        }
        let client = self.forwarder.flow(flow).path.client.0;
        self.out.push(Packet { from: self.front, to: client, ..packet });
    }
}

impl Node for Balancer {
    fn handle(&mut self, now: Instant, packet: Packet) {
        if packet.to == self.front {
            self.handle_client(now, packet);
        } else {
            self.handle_backend(now, packet);
        }
    }

    fn drive(&mut self, _now: Instant, out: &mut Vec<Packet>) {
        out.append(&mut self.out);
    }

    fn deadline(&mut self) -> Option<Instant> {
        None
    }
}

fn config(
    front: SocketAddr,
    cid_configs: &[CidConfig],
    backends: &[(SocketAddr, ServerId)],
) -> Config {
    let ids = |server_id| cid_configs.iter().map(|config| (config.id(), server_id)).collect();
    let backends = backends.iter().enumerate().map(|(index, &(address, server_id))| Backend {
        name: index.to_string(),
        address,
        server_ids: ids(server_id),
        weight: NonZeroU32::MIN,
        admission: Admission::Active,
        check_address: None,
    });
    Config {
        workers: None,
        listeners: vec![Listener {
            name: "edge".into(),
            address: front,
            both_families: false,
            pool: 0,
            retry_mode: None,
        }],
        pools: vec![Pool {
            name: "web".into(),
            cid_configs: cid_configs.to_vec(),
            backends: backends.collect(),
            source_addresses: vec![],
            reset_secret: None,
            hash: HashBy::default_of(!cid_configs.is_empty()),
            health_check: None,
            honours_tokens: quic_lb_config::HonoursTokens::Yes,
            report_token: None,
        }],
        admin: None,
        limits: Limits {
            flows: NonZeroUsize::MAX,
            remembered: NonZeroUsize::MIN.saturating_add(9_999),
            new_connections: Default::default(),
            unknown_short_headers: Default::default(),
        },
        timeouts: Timeouts {
            flow_idle: Duration::from_secs(180),
            flow_unanswered: Duration::from_secs(10),
            learnt: Duration::from_secs(600),
            drain: Duration::from_secs(30),
        },
        state_dir: None,
        log: Log { level: Default::default(), format: Default::default(), connections: None },
        retry: Default::default(),
    }
}
