//! `explain`: runs the forwarder on a datagram, or on a capture, and prints what each rule saw.

use std::{
    collections::HashMap,
    io::Write,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use quic::invariants::Packet;
use quic_lb_config::{Config, Listener};

use super::{
    args::{Explain, Subject},
    capture::{self, Captured, End},
    outcome::Failure,
};
use crate::{
    backend::BackendState,
    client_path::{ClientAddr, ClientPath, ListenerIndex},
    explained::Explained,
    forwarder::{Clock, Datagram, Forwarder, Start},
    memory::Memory,
    registry::Registry,
    routing::Routing,
    verdict::{DropReason, FlowId, Opened, Verdict, Via},
    words::count,
};

/// More flows than a capture that people look at has; the limit of the file may be far above.
const MAX_FLOWS: usize = 1 << 16;

pub(super) fn explain(
    config: &Config,
    explain: &Explain,
    out: &mut impl Write,
) -> Result<(), Failure> {
    let wanted = match &explain.listener {
        None => None,
        Some(name) => Some(listener(config, name)?),
    };
    let mut explainer = Explainer::new(config);
    match &explain.subject {
        Subject::Datagram { from, octets } => {
            let path = ClientPath { client: ClientAddr(*from), local: None };
            let listeners = match wanted {
                Some(listener) => listener..listener + 1,
                None => 0..config.listeners.len(),
            };
            for listener in listeners {
                let len = count(octets.len(), "byte");
                let name = &config.listeners[listener].name;
                writeln!(out, "{len} from {from} to listener {name}")?;
                explainer.print(Duration::ZERO, listener, &Datagram { path, octets }, out)?;
            }
            Ok(())
        }
        Subject::Capture(file) => {
            let mut explained = 0;
            let end = capture::read(file, |captured| {
                explained += usize::from(explainer.captured(captured, wanted, out)?);
                Ok(())
            })?;
            if end == End::CutOff {
                writeln!(out, "the file ends inside a frame")?;
            }
            if explained == 0 {
                let ports: Vec<_> =
                    config.listeners.iter().map(|l| l.address.port().to_string()).collect();
                let ports = ports.join(", ");
                writeln!(out, "no UDP datagram in the capture goes to a listener (port {ports})")?;
            }
            Ok(())
        }
    }
}

/// A forwarder, and what it takes to feed it from a capture.
struct Explainer<'a> {
    config: &'a Config,
    routing: Arc<Routing>,
    forwarder: Forwarder,
    epoch: Instant,
    first: Option<Duration>,
    /// The flow of each handshake (listener, client, the client's connection ID), so that the
    /// server's answers find it.
    handshakes: HashMap<(usize, SocketAddr, Vec<u8>), FlowId>,
}

impl<'a> Explainer<'a> {
    fn new(config: &'a Config) -> Self {
        let epoch = Instant::now();
        let mut registry = Registry::default();
        let routing = Routing::new(config, &mut registry, |_, _| BackendState::Active);
        let routing = Arc::new(routing);
        // Nothing random is printed, and nobody gets the tokens that are made here.
        let max_flows = config.limits.flows.get().min(MAX_FLOWS);
        let memory = Memory::new(config.limits.remembered.get().min(MAX_FLOWS), epoch, [0; 4]);
        let start = Start { clock: Clock { now: epoch, unix: SystemTime::now() }, seed: [0; 32] };
        let forwarder = Forwarder::new(max_flows, Arc::clone(&routing), Arc::new(memory), &start);
        Self { config, routing, forwarder, epoch, first: None, handshakes: HashMap::new() }
    }

    /// Explains a datagram to a listener and takes note of those to clients. Says whether it was
    /// one of the former.
    fn captured(
        &mut self,
        captured: &Captured<'_>,
        wanted: Option<usize>,
        out: &mut impl Write,
    ) -> Result<bool, Failure> {
        let &Captured { frame, time, source, destination, octets, wire_len } = captured;
        let time = time.saturating_sub(*self.first.get_or_insert(time));
        if let Some(listener) = self.listener_at(destination, wanted) {
            let name = &self.config.listeners[listener].name;
            let (seconds, len) = (time.as_secs_f64(), count(wire_len, "byte"));
            write!(out, "frame {frame}, {seconds:.6} s: {len} from {source} to listener {name}")?;
            if octets.len() < wire_len {
                write!(out, ", of which {} are in the capture", octets.len())?;
            }
            writeln!(out)?;
            let unspecified = self.config.listeners[listener].address.ip().is_unspecified();
            let local = unspecified.then_some(destination.ip());
            // Captures are often made of the first octets of each frame; the rest is not looked at,
            // but how much there was is.
            let mut whole = octets.to_vec();
            whole.resize(wire_len.max(octets.len()), 0);
            let octets = &whole;
            let datagram =
                Datagram { path: ClientPath { client: ClientAddr(source), local }, octets };
            self.print(time, listener, &datagram, out)?;
            self.decide(time, listener, &datagram);
            return Ok(true);
        }
        if let Some(listener) = self.listener_at(source, wanted) {
            self.returned(time, listener, destination, octets);
        }
        Ok(false)
    }

    /// The listener that a datagram with this address belongs to. Captures are also made on other
    /// hosts and in front of address translation: the port decides, the address where it can.
    fn listener_at(&self, address: SocketAddr, wanted: Option<usize>) -> Option<usize> {
        let candidates = || {
            let all = self.config.listeners.iter().enumerate();
            all.filter(|(index, listener)| {
                wanted.is_none_or(|wanted| wanted == *index)
                    && listener.address.port() == address.port()
            })
        };
        let exact = |(_, listener): &(usize, &Listener)| listener.address == address;
        let family =
            |(_, listener): &(usize, &Listener)| listener.address.is_ipv4() == address.is_ipv4();
        let best = candidates().find(exact).or_else(|| candidates().find(family));
        best.or_else(|| candidates().next()).map(|(index, _)| index)
    }

    fn print(
        &self,
        time: Duration,
        listener: usize,
        datagram: &Datagram<'_>,
        out: &mut impl Write,
    ) -> Result<(), Failure> {
        let explanation =
            self.forwarder.explain(self.epoch + time, ListenerIndex(listener), datagram);
        write!(out, "{}", Explained::new(datagram.octets, explanation, &self.routing))?;
        Ok(())
    }

    /// Lets the forwarder take the datagram, so that the next ones find what it remembers.
    fn decide(&mut self, time: Duration, listener: usize, datagram: &Datagram<'_>) {
        let now = self.epoch + time;
        let mut verdicts = [Verdict::Drop(DropReason::Empty)];
        let mut expired = vec![];
        self.forwarder.sweep(now, &mut expired);
        if !expired.is_empty() {
            self.handshakes.retain(|_, flow| !expired.contains(flow));
        }
        self.forwarder.decide_batch(now, ListenerIndex(listener), &[*datagram], &mut verdicts);
        let [Verdict::Forward { via, .. }] = verdicts else { return };
        if let Via::NewFlow(Opened { evicted: Some(evicted), .. }) = via {
            self.handshakes.retain(|_, flow| *flow != evicted);
        }
        if let Some(flow) = via.flow()
            && let Ok(Packet::Long(header)) = Packet::read(datagram.octets)
            && self.handshakes.len() < MAX_FLOWS
        {
            let key = (listener, datagram.path.client.0, header.scid.to_vec());
            self.handshakes.insert(key, flow);
        }
    }

    /// Lets the forwarder learn from a server's long header.
    fn returned(&mut self, time: Duration, listener: usize, client: SocketAddr, octets: &[u8]) {
        let Ok(Packet::Long(header)) = Packet::read(octets) else { return };
        let key = (listener, client, header.dcid.to_vec());
        if let Some(&flow) = self.handshakes.get(&key) {
            self.forwarder.returned(self.epoch + time, flow, octets);
        }
    }
}

fn listener(config: &Config, name: &str) -> Result<usize, Failure> {
    config.listeners.iter().position(|listener| listener.name == name).ok_or_else(|| {
        let names: Vec<_> = config.listeners.iter().map(|l| l.name.as_str()).collect();
        let names = names.join(", ");
        Failure::other(format_args!("there is no listener \"{name}\"; there is {names}"))
    })
}
