//! Clients and the backend of the benchmark, in one thread: sends within a window, and checks every
//! octet, the order within each flow, and the number of what arrives.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use quic_lb::socket::{
    Departure, Outgoing, Peer, Poller, Ready, Receiver, SLOTS, Sender, Sharing, Socket,
};

use crate::forwarders::{cid_config, server_id};

/// Datagrams in one message of a sender with segmentation offload.
pub(crate) const SEGMENTS: usize = 32;
/// How long nothing may arrive before what is under way counts as lost.
const LOST: Duration = Duration::from_secs(2);

/// First octet, connection ID.
const HEADER: usize = 10;
/// Run, flow, number.
const LABEL: usize = HEADER + 4 + 4 + 8;
const LARGEST: usize = 1_200;

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Line {
    /// Octets of each datagram.
    pub(crate) size: usize,
    /// Client paths, which take turns.
    pub(crate) flows: usize,
    /// Whether the backend sends everything back.
    pub(crate) echo: bool,
    /// Whether clients and backend send several datagrams per message.
    pub(crate) offload: bool,
}

/// Clients and backend.
pub(crate) struct Load {
    client: Socket,
    backend: Socket,
    poller: Poller,
    ready: Ready,
    receiver: Receiver,
    sender: Sender,
    headers: Vec<[u8; HEADER]>,
    pattern: Vec<u8>,
    buffer: Vec<u8>,
    at_backend: Check,
    at_client: Check,
    run: u32,
    /// How many messages have been sent: whose turn it is. It goes on over runs, so that short
    /// runs reach all flows in time.
    turn: usize,
}

/// What has arrived on one side.
#[derive(Default)]
struct Check {
    next: Vec<u64>,
    arrived: u64,
}

impl Load {
    pub(crate) fn new(flows: usize) -> Result<Self> {
        let client = Socket::listener((Ipv4Addr::UNSPECIFIED, 0).into(), Sharing::First)?;
        let backend = Socket::listener((Ipv4Addr::LOCALHOST, 0).into(), Sharing::First)?;
        let poller = Poller::new()?;
        poller.watch(&client, 0)?;
        poller.watch(&backend, 1)?;
        let headers = (0..flows as u64)
            .map(|flow| {
                let cid = cid_config().encode(&server_id(), &flow.to_be_bytes()[2..])?;
                let mut header = [0x40; HEADER];
                header[1..].copy_from_slice(&cid);
                Ok(header)
            })
            .collect::<Result<_>>()?;
        let mut random = 1u64;
        let pattern = std::iter::repeat_with(|| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            random.to_be_bytes()[0]
        });
        Ok(Self {
            client,
            backend,
            poller,
            ready: Ready::new(4),
            receiver: Receiver::new(),
            sender: Sender::new(),
            headers,
            pattern: pattern.take(4_096 + LARGEST).collect(),
            buffer: vec![0; SLOTS * SEGMENTS * LARGEST],
            at_backend: Check::default(),
            at_client: Check::default(),
            run: 0,
            turn: 0,
        })
    }

    pub(crate) fn backend_address(&self) -> Result<SocketAddr> {
        Ok(self.backend.local_address()?)
    }

    /// Sends `count` datagrams through `forwarder`, at most `window` of them under way; says how
    /// many were lost.
    pub(crate) fn run(
        &mut self,
        line: &Line,
        forwarder: SocketAddr,
        count: u64,
        window: u64,
    ) -> Result<u64> {
        self.run += 1;
        self.at_backend.reset(line.flows);
        self.at_client.reset(line.flows);
        let mut numbers = vec![0u64; line.flows];
        let (mut sent, mut lost) = (0, 0);
        let mut last_arrival = Instant::now();
        loop {
            let arrived = if line.echo { self.at_client.arrived } else { self.at_backend.arrived };
            if arrived + lost >= count {
                break;
            }
            let under_way = sent - arrived - lost;
            // Refilled from the half: the forwarder always finds a burst, as under full load.
            if sent < count && under_way <= window / 2 {
                let wanted = (window - under_way).min(count - sent);
                sent += self.send(line, forwarder, wanted, &mut numbers)?;
            }
            let got = self.serve_backend(line)? + self.serve_client()?;
            if got > 0 {
                last_arrival = Instant::now();
            } else if last_arrival.elapsed() > LOST {
                lost = sent - arrived;
            } else {
                self.poller.wait(&mut self.ready, Duration::from_millis(10))?;
            }
        }
        Ok(lost)
    }

    fn send(
        &mut self,
        line: &Line,
        forwarder: SocketAddr,
        wanted: u64,
        numbers: &mut [u64],
    ) -> Result<u64> {
        let per_message = if line.offload { SEGMENTS } else { 1 };
        let mut left = wanted.div_ceil(per_message as u64);
        let mut total = 0;
        while left > 0 {
            let messages = left.min(SLOTS as u64);
            left -= messages;
            let mut flows = [0; SLOTS];
            for (at, message) in
                self.buffer.chunks_mut(per_message * line.size).enumerate().take(messages as usize)
            {
                let flow = self.turn % line.flows;
                self.turn += 1;
                flows[at] = flow;
                for datagram in message.chunks_mut(line.size) {
                    let number = numbers[flow];
                    numbers[flow] += 1;
                    datagram[..HEADER].copy_from_slice(&self.headers[flow]);
                    datagram[HEADER..HEADER + 4].copy_from_slice(&self.run.to_be_bytes());
                    datagram[HEADER + 4..HEADER + 8].copy_from_slice(&(flow as u32).to_be_bytes());
                    datagram[HEADER + 8..LABEL].copy_from_slice(&number.to_be_bytes());
                    let body = line.size - LABEL;
                    datagram[LABEL..].copy_from_slice(body_of(&self.pattern, flow, number, body));
                }
            }
            let mut outgoing = self.sender.compose();
            for (message, flow) in
                self.buffer.chunks(per_message * line.size).zip(flows).take(messages as usize)
            {
                let departure = Departure {
                    to: Some(forwarder),
                    from: Some(address_of(flow)),
                    class: None,
                    hops: None,
                    segment: line.offload.then_some(line.size as u16),
                    ipv6: false,
                };
                outgoing.push(&departure, [message]);
            }
            transmit(&self.client, &mut outgoing)?;
            total += messages * per_message as u64;
        }
        Ok(total)
    }

    /// Takes what has arrived at the backend, and sends it back if the line says so.
    fn serve_backend(&mut self, line: &Line) -> Result<usize> {
        let got = self.receiver.receive(&self.backend, 0..SLOTS, Peer::Asked)?;
        let Self { receiver, sender, at_backend, pattern, run, .. } = self;
        for slot in 0..got {
            at_backend.take(receiver, slot, pattern, *run)?;
        }
        if !line.echo || got == 0 {
            return Ok(got);
        }
        let mut outgoing = sender.compose();
        let mut slot = 0;
        while slot < got {
            let first = *receiver.received(slot);
            let departure = Departure {
                to: Some(first.from),
                from: None,
                class: None,
                hops: None,
                segment: None,
                ipv6: false,
            };
            if !line.offload {
                for datagram in receiver.octets(slot, 0..first.len).chunks(first.segment) {
                    if !outgoing.has_room(1) {
                        transmit(&self.backend, &mut outgoing)?;
                        outgoing = sender.compose();
                    }
                    outgoing.push(&departure, [datagram]);
                }
                slot += 1;
                continue;
            }
            // A backend with segmentation offload answers in bursts even if it was asked one by one.
            let start = slot;
            let mut count = 0;
            while slot < got {
                let next = receiver.received(slot);
                if next.from != first.from
                    || next.segment != first.segment
                    || count + next.datagrams() > SEGMENTS
                {
                    break;
                }
                count += next.datagrams();
                slot += 1;
            }
            slot = slot.max(start + 1);
            if !outgoing.has_room(slot - start) {
                transmit(&self.backend, &mut outgoing)?;
                outgoing = sender.compose();
            }
            let parts =
                (start..slot).map(|slot| receiver.octets(slot, 0..receiver.received(slot).len));
            let segment =
                (slot > start + 1 || first.datagrams() > 1).then_some(first.segment as u16);
            outgoing.push(&Departure { segment, ..departure }, parts);
        }
        transmit(&self.backend, &mut outgoing)?;
        Ok(got)
    }

    fn serve_client(&mut self) -> Result<usize> {
        let got = self.receiver.receive(&self.client, 0..SLOTS, Peer::Asked)?;
        for slot in 0..got {
            self.at_client.take(&self.receiver, slot, &self.pattern, self.run)?;
        }
        Ok(got)
    }
}

impl Check {
    fn reset(&mut self, flows: usize) {
        self.next.clear();
        self.next.resize(flows, 0);
        self.arrived = 0;
    }

    /// Checks the datagrams in `slot`.
    fn take(&mut self, receiver: &Receiver, slot: usize, pattern: &[u8], run: u32) -> Result<()> {
        let message = receiver.received(slot);
        for datagram in receiver.octets(slot, 0..message.len).chunks(message.segment) {
            let label = datagram.get(HEADER..LABEL).context("a datagram that is too short")?;
            let field =
                |at: usize| u32::from_be_bytes(label[at..at + 4].try_into().expect("4 octets"));
            if field(0) != run {
                continue;
            }
            let flow = field(4) as usize;
            let number = u64::from(field(8)) << 32 | u64::from(field(12));
            let body = &datagram[LABEL..];
            ensure!(body == body_of(pattern, flow, number, body.len()), "the bytes have changed");
            let next = self.next.get_mut(flow).context("a flow that nobody has")?;
            ensure!(number >= *next, "flow {flow}: {number} after {next}");
            *next = number + 1;
            self.arrived += 1;
        }
        Ok(())
    }
}

/// Sends all, waiting as long as it takes.
fn transmit(socket: &Socket, outgoing: &mut Outgoing<'_, '_>) -> Result<()> {
    let mut at = 0;
    while at < outgoing.len() {
        match outgoing.send(socket, at) {
            Ok(sent) => at += sent,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                socket.wait_writable(Duration::from_millis(10))?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn body_of(pattern: &[u8], flow: usize, number: u64, len: usize) -> &[u8] {
    let at = (flow * 31 + number as usize * 7) & 4_095;
    &pattern[at..at + len]
}

fn address_of(flow: usize) -> IpAddr {
    let first = u32::from(Ipv4Addr::new(127, 16, 0, 0));
    Ipv4Addr::from(first + flow as u32).into()
}
