//! `explain`: runs the forwarder on a datagram, or on a capture, and prints what each rule saw.

use std::{
    collections::HashMap,
    io::Write,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use quic::{
    header::{Kind, LongType},
    invariants::Packet,
    varint,
};
use quic_lb_config::{Config, Listener};

use super::{
    args::{Explain, Subject},
    capture::{self, Captured, End},
    joined::{Part, parts},
    outcome::Failure,
    unread::Tally,
};
use crate::{
    backend::BackendState,
    client_path::{ClientAddr, ClientPath, ListenerIndex},
    explained::Explained,
    forwarder::{Clock, Datagram, Explanation, Forwarder, Outcome, Start},
    memory::Memory,
    registry::Registry,
    routing::Routing,
    verdict::{DropReason, FlowId, Opened, ReplyKind, Verdict, Via},
    words::count,
};

/// More flows than a capture that people look at has; the limit of the file may be far above.
const MAX_FLOWS: usize = 1 << 16;

/// Files may state any time; clocks do not go on for ever.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// The longest connection ID of versions 1 and 2.
const MAX_CID_LEN: usize = 20;

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
            let path = ClientPath { client: ClientAddr::written(*from), local: None };
            let listeners = match wanted {
                Some(listener) => listener..listener + 1,
                None => 0..config.listeners.len(),
            };
            for listener in listeners {
                let len = count(octets.len(), "byte");
                let name = &config.listeners[listener].name;
                writeln!(out, "{len} from {from} to listener {name}")?;
                let datagram = Datagram { path, octets };
                let explanation = explainer.explain(Duration::ZERO, listener, &datagram);
                write!(out, "{}", Explained::new(octets, explanation, &explainer.routing))?;
            }
            Ok(())
        }
        Subject::Capture(file) => {
            let mut explained = 0;
            let mut unread = Tally::default();
            let end = capture::read(file, &mut unread, |captured| {
                explained += usize::from(explainer.captured(captured, wanted, out)?);
                Ok(())
            })?;
            write!(out, "{unread}")?;
            if end == End::CutOff {
                writeln!(out, "the file ends inside a frame")?;
            }
            if explainer.clock == CaptureClock::Unknown && explained > 0 {
                writeln!(out, "the capture has no clock: tokens were judged by that of today")?;
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
    clock: CaptureClock,
    /// The flow of each handshake (listener, client, the client's connection ID), so that the
    /// server's answers find it.
    handshakes: HashMap<(usize, SocketAddr, Vec<u8>), FlowId>,
}

/// The time of a capture, by which its tokens are judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CaptureClock {
    /// No frame had one so far.
    Unknown,
    /// When the first frame with a time and the latest were captured, since the beginning of 1970.
    From { first: Duration, latest: Duration },
}

impl CaptureClock {
    /// Goes on to the time of a frame; it does not go back.
    fn follow(&mut self, time: Option<Duration>) {
        let Some(time) = time else { return };
        *self = match *self {
            Self::Unknown => Self::From { first: time, latest: time },
            Self::From { first, latest } => Self::From { first, latest: latest.max(time) },
        };
    }

    /// Since the first frame.
    fn elapsed(self) -> Duration {
        match self {
            Self::Unknown => Duration::ZERO,
            Self::From { first, latest } => latest.saturating_sub(first).min(LONGEST),
        }
    }
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
        let clock = CaptureClock::Unknown;
        Self { config, routing, forwarder, epoch, clock, handshakes: HashMap::new() }
    }

    /// Explains what went to a listener and takes note of what went to clients. Says whether it was
    /// the former.
    fn captured(
        &mut self,
        captured: &Captured<'_>,
        wanted: Option<usize>,
        out: &mut impl Write,
    ) -> Result<bool, Failure> {
        let &Captured { time, source, destination, octets, wire_len, .. } = captured;
        self.follow(time);
        if let Some(listener) = self.listener_at(destination, wanted) {
            let parts = parts(octets, wire_len);
            for (nth, part) in (1..).zip(&parts) {
                let of_several = (parts.len() > 1).then_some((nth, parts.len()));
                self.arrived(captured, listener, part, of_several, out)?;
            }
            return Ok(true);
        }
        if let Some(listener) = self.listener_at(source, wanted) {
            for part in parts(octets, wire_len) {
                self.returned(self.clock.elapsed(), listener, destination, part.octets);
            }
        }
        Ok(false)
    }

    /// Explains one datagram to a listener, and lets the forwarder take it if all that decides is
    /// in the capture.
    fn arrived(
        &mut self,
        &Captured { frame, source, destination, .. }: &Captured<'_>,
        listener: usize,
        &Part { octets, wire_len }: &Part<'_>,
        of_several: Option<(usize, usize)>,
        out: &mut impl Write,
    ) -> Result<(), Failure> {
        let time = self.clock.elapsed();
        let Listener { name, address, .. } = &self.config.listeners[listener];
        write!(out, "frame {frame}")?;
        if let Some((nth, all)) = of_several {
            write!(out, ", datagram {nth} of {all} that offload had joined")?;
        }
        let (seconds, len) = (time.as_secs_f64(), count(wire_len, "byte"));
        write!(out, ", {seconds:.6} s: {len} from {source} to listener {name}")?;
        if octets.len() < wire_len {
            write!(out, ", of which {} are in the capture", octets.len())?;
        }
        writeln!(out)?;
        if let Some(missing) = self.missing(listener, octets, wire_len) {
            return not_known(missing, out);
        }
        // How long it was counts, too. What fills it up is not looked at.
        let mut whole = octets.to_vec();
        whole.resize(wire_len.max(octets.len()), 0);
        let local = address.ip().is_unspecified().then_some(destination.ip());
        let path = ClientPath { client: ClientAddr(source), local };
        let datagram = Datagram { path, octets: &whole };
        let explanation = self.explain(time, listener, &datagram);
        if octets.len() < wire_len && is_of_invalid_token(explanation.outcome) {
            // Whether the client is told so depends on whether the packet opens.
            return not_known("the rest of a packet with an invalid token", out);
        }
        write!(out, "{}", Explained::new(octets, explanation, &self.routing))?;
        self.decide(time, listener, &datagram);
        Ok(())
    }

    /// What the forwarder would look at and was not captured.
    fn missing(&self, listener: usize, octets: &[u8], wire_len: usize) -> Option<&'static str> {
        if octets.len() >= wire_len {
            return None;
        }
        let header = match Packet::read(octets) {
            Err(_) => return Some("the header"),
            Ok(Packet::Long(header)) => header,
            Ok(Packet::Short(header)) => {
                let route = self.routing.listener(ListenerIndex(listener));
                let decoded = route.decoder.decode(header.rest).ok();
                let is_known = decoded.is_some_and(|decoded| route.server(&decoded).is_some());
                // Any of the bytes that a connection ID may have is looked at otherwise.
                let is_whole = header.rest.len() >= MAX_CID_LEN.min(wire_len - 1);
                return (!is_known && !is_whole).then_some("the connection ID");
            }
        };
        let Kind::Known(_, LongType::Initial) = header.kind() else { return None };
        if self.config.retry.keys.is_empty() {
            return None;
        }
        let token = varint::read(header.rest).map(|(len, rest)| (usize::try_from(len), rest));
        match token {
            Some((Ok(len), rest)) if len <= rest.len() => None,
            _ => Some("the token"),
        }
    }

    /// Goes on to the time of a frame, on both clocks.
    fn follow(&mut self, time: Option<Duration>) {
        self.clock.follow(time);
        if let CaptureClock::From { latest, .. } = self.clock
            && let Some(unix) = SystemTime::UNIX_EPOCH.checked_add(latest)
        {
            let now = self.epoch + self.clock.elapsed();
            self.forwarder.set_clock(Clock { now, unix });
        }
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

    fn explain(&self, time: Duration, listener: usize, datagram: &Datagram<'_>) -> Explanation {
        self.forwarder.explain(self.epoch + time, ListenerIndex(listener), datagram)
    }

    /// Lets the forwarder take the datagram, so that the next ones find what it remembers.
    fn decide(&mut self, time: Duration, listener: usize, datagram: &Datagram<'_>) {
        let now = self.epoch + time;
        let mut verdicts = [Verdict::Drop(DropReason::Empty)];
        let mut expired = vec![];
        self.forwarder.sweep(now, &mut expired);
        if !expired.is_empty() {
            self.handshakes.retain(|_, flow| !expired.iter().any(|ended| ended.flow == *flow));
        }
        self.forwarder.decide_batch(now, ListenerIndex(listener), &[*datagram], &mut verdicts);
        let [Verdict::Forward { via, .. }] = verdicts else { return };
        if let Via::NewFlow(Opened { evicted: Some(evicted), .. }) = via {
            self.handshakes.retain(|_, flow| *flow != evicted.flow);
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
            let _ = self.forwarder.returned(self.epoch + time, flow, octets);
        }
    }
}

fn not_known(missing: &str, out: &mut impl Write) -> Result<(), Failure> {
    Ok(writeln!(out, "  verdict: not known: {missing}, which decides, is not in the capture")?)
}

fn is_of_invalid_token(outcome: Outcome) -> bool {
    matches!(
        outcome,
        Outcome::Drop(DropReason::InvalidToken) | Outcome::Reply(ReplyKind::InvalidToken)
    )
}

fn listener(config: &Config, name: &str) -> Result<usize, Failure> {
    config.listeners.iter().position(|listener| listener.name == name).ok_or_else(|| {
        let names: Vec<_> = config.listeners.iter().map(|l| l.name.as_str()).collect();
        let names = names.join(", ");
        Failure::other(format_args!("there is no listener \"{name}\"; there is {names}"))
    })
}
