//! The datagrams of a flood.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use quic::{
    ConnectionId,
    header::Version,
    invariants::Packet,
    random::Random,
    retry,
    transport::{ClientConfig, Endpoint, EndpointConfig},
    varint,
};

use super::{FloodError, Kind, Options};
use crate::certificate::Trust;

/// First flights that are made beforehand; false senders make each many.
const FLIGHTS: usize = 256;
/// How long the target may take to answer with a Retry.
const PATIENCE: Duration = Duration::from_secs(2);
/// The size of datagrams that cost their senders little.
const SMALL: usize = 60;
/// What carries an Initial.
const INITIAL: usize = 1200;

pub(super) struct Crafts {
    kind: Kind,
    /// That of a connection that has ended.
    cid: Option<ConnectionId>,
    /// The datagrams of each first flight.
    flights: Vec<Vec<Vec<u8>>>,
    token: Retried,
}

/// Connection ID and token of a Retry to somebody.
#[derive(Default)]
struct Retried {
    dcid: Vec<u8>,
    token: Vec<u8>,
}

/// What one sender sends at once.
pub(super) enum Flight<'a> {
    One(&'a [u8]),
    Twice(&'a [u8]),
    Whole(&'a [Vec<u8>]),
}

impl<'a> Flight<'a> {
    pub(super) fn datagrams(self) -> impl Iterator<Item = &'a [u8]> {
        let (one, times, whole) = match self {
            Self::One(octets) => (octets, 1, &[][..]),
            Self::Twice(octets) => (octets, 2, &[][..]),
            Self::Whole(datagrams) => (&[][..], 0, datagrams),
        };
        std::iter::repeat_n(one, times).chain(whole.iter().map(Vec::as_slice))
    }
}

impl Crafts {
    pub(super) fn new(options: &Options, seed: [u8; 32]) -> Result<Self, FloodError> {
        let &Options { target, kind, cid, .. } = options;
        let mut crafts = Self { kind, cid, flights: Vec::new(), token: Retried::default() };
        if matches!(kind, Kind::Initials | Kind::Mixed) {
            crafts.flights = flights(target, seed)?;
        }
        if matches!(kind, Kind::Tokens | Kind::Mixed) {
            match (ask_for_token(target)?, kind) {
                (Some(token), _) => crafts.token = token,
                // Without validation there are no tokens; the others remain.
                (None, Kind::Mixed) => {}
                (None, _) => return Err(FloodError::NoToken),
            }
        }
        Ok(crafts)
    }

    /// The datagrams to send after `before` others; `scratch` is where they may be made.
    pub(super) fn next<'a>(
        &'a self,
        before: u64,
        random: &mut Random,
        scratch: &'a mut Vec<u8>,
    ) -> Flight<'a> {
        let kinds = [Kind::Initials, Kind::Short, Kind::Tokens, Kind::Garbage];
        let below = |random: &mut Random, bound: usize| {
            usize::try_from(random.number() % bound as u64).unwrap_or(0)
        };
        let kind = match self.kind {
            Kind::Mixed => kinds[usize::try_from(before % 4).unwrap_or(0)],
            kind => kind,
        };
        scratch.clear();
        match kind {
            Kind::Initials | Kind::Mixed => {
                return Flight::Whole(&self.flights[below(random, self.flights.len())]);
            }
            Kind::Short if let Some(cid) = self.cid => {
                scratch.resize(SMALL, 0);
                random.fill(scratch);
                scratch[0] = 0x40 | scratch[0] & 0x3f;
                scratch[1..=cid.len()].copy_from_slice(&cid);
                return Flight::Twice(scratch);
            }
            Kind::Versions => {
                scratch.resize(SMALL, 0);
                random.fill(scratch);
                // Of the versions that are reserved for being unknown.
                let header = [0xc0, 0x1a, 0x2a, 0x3a, 0x4a, 8];
                scratch[..header.len()].copy_from_slice(&header);
                scratch[header.len() + 8] = 8;
                return Flight::Twice(scratch);
            }
            Kind::Short => {
                scratch.resize(30 + below(random, 1170), 0);
                random.fill(scratch);
                scratch[0] = 0x40 | scratch[0] & 0x3f;
            }
            Kind::Tokens => {
                let Retried { dcid, token } = &self.token;
                let dcid = self.cid.as_deref().unwrap_or(dcid);
                initial(dcid, token, scratch);
                // Every other one is as it was made, for somebody else.
                if !token.is_empty() && random.number().is_multiple_of(2) {
                    let bit = below(random, token.len() * 8);
                    let at = scratch.len().min(6 + dcid.len() + 5 + 2 + bit / 8);
                    scratch[at] ^= 1 << (bit % 8);
                }
            }
            Kind::Garbage => {
                scratch.resize(below(random, 1400), 0);
                random.fill(scratch);
            }
        }
        Flight::One(scratch)
    }
}

/// First flights of real clients.
fn flights(target: SocketAddr, seed: [u8; 32]) -> Result<Vec<Vec<Vec<u8>>>, FloodError> {
    let craft = |error: &dyn std::fmt::Display| FloodError::Craft(error.to_string());
    let tls = Trust::Everybody.client(&[b"h3"]).map_err(|error| craft(&error))?;
    let config = ClientConfig::new(Arc::new(tls));
    let now = Instant::now();
    let mut endpoint = Endpoint::new(EndpointConfig::client(seed), now, SystemTime::now());
    let mut flights = Vec::with_capacity(FLIGHTS);
    for _ in 0..FLIGHTS {
        endpoint.connect(now, &config, target, "localhost").map_err(|error| craft(&error))?;
        let (mut flight, mut octets) = (Vec::new(), Vec::new());
        while let Some(transmit) = endpoint.poll_transmit(now, 1, &mut octets) {
            flight.push(octets[octets.len() - transmit.len..].to_vec());
            octets.clear();
        }
        flights.push(flight);
    }
    Ok(flights)
}

/// Asks for a Retry; `None` when none comes.
fn ask_for_token(target: SocketAddr) -> Result<Option<Retried>, FloodError> {
    const DRAWN: &[u8] = b"drawn once";
    let local: SocketAddr = (target.ip(), 0).into();
    let socket = UdpSocket::bind(if target.ip().is_loopback() {
        local
    } else if target.is_ipv4() {
        ([0, 0, 0, 0], 0).into()
    } else {
        ([0; 16], 0).into()
    })?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut hello = Vec::new();
    initial(DRAWN, &[], &mut hello);
    socket.send_to(&hello, target)?;
    let mut answer = [0; 2000];
    let Ok((len, _)) = socket.recv_from(&mut answer) else { return Ok(None) };
    let answer = &answer[..len];
    let is_retry = retry::verify(Version::V1, DRAWN, answer);
    let Ok(Packet::Long(header)) = Packet::read(answer) else { return Ok(None) };
    let token = header.rest.len().checked_sub(retry::TAG_LEN).map(|len| &header.rest[..len]);
    let retried = |token: &[u8]| Retried { dcid: header.scid.to_vec(), token: token.to_vec() };
    Ok(token.filter(|_| is_retry).map(retried))
}

/// An Initial that nobody can open.
fn initial(dcid: &[u8], token: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&[0xc0, 0, 0, 0, 1]);
    #[expect(clippy::cast_possible_truncation, reason = "at most 20 octets")]
    out.push(dcid.len() as u8);
    out.extend_from_slice(dcid);
    out.extend_from_slice(&[4, 1, 2, 3, 4]);
    varint::write(token.len() as u64, out);
    out.extend_from_slice(token);
    out.resize(INITIAL, 0);
}
