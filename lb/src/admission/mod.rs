//! Whether a packet that starts something may do so: address validation by Retry, limits, and
//! sources and versions that are refused.
//!
//! It stands between the rules that know a packet's server and the one that chooses where none is
//! known, and is asked about packets that begin a connection, or may: packets of connections whose server is known by their connection ID never
//! get here, and nothing here keeps anything about a packet that it refuses.
//!
//! | part | what it is for |
//! | --- | --- |
//! | [`tokens`] | making Retry packets, and checking the tokens that come back |
//! | [`limits`] | how many connections may begin in a second, by source, listener and in total |
//! | [`mode`] | when validation begins and ends |
//! | `sources` | ports and addresses that no client has |
//! | `versions` | versions that no Retry is known for |
//!
//! # What becomes of an Initial
//!
//! | | inactive | transition | active |
//! | --- | --- | --- | --- |
//! | goes on with a handshake: towards a connection ID of the server, from a client path and connection ID that are remembered | forward | forward | forward if validated, and for ten seconds after the transition; else Retry |
//! | goes on with a handshake that began elsewhere: towards a connection ID that its server gave to a validated client | forward | forward, 32 at most | forward, 32 at most |
//! | the same with a token of a Retry, towards what may be a connection ID of a server, and nothing is remembered: another balancer began with it | forward | forward, 64 a second at most | forward, 64 a second at most |
//! | a token of a Retry that is valid but for its port: its client's NAT has moved since | forward | forward, 64 a second at most | forward, 64 a second at most |
//! | valid token | forward | forward | forward |
//! | invalid Retry token | refuse where no server makes such tokens, else forward | refuse | refuse |
//! | no token, or an invalid one of a NEW_TOKEN frame | forward | Retry and forward | Retry |
//!
//! This is the table of draft-ietf-quic-retry-offload-00, section 4. A client that has heard from
//! its server ignores a Retry (<https://www.rfc-editor.org/rfc/rfc9000.html#section-17.2.5.2>), so the
//! Retry of the transition harms no handshake that is under way. What is refused is told so by a close with INVALID_TOKEN
//! (<https://www.rfc-editor.org/rfc/rfc9000.html#section-8.1.2>), where the draft drops, at a bounded rate.
//!
//! What may be a connection ID of a server is one that decodes, or any but that of a Retry where the servers
//! have no routable ones: then packets with Handshake keys, too, may go on within the bound for what another balancer began with.
//!
//! A token says for which port it was made. A client accepts one Retry
//! (<https://www.rfc-editor.org/rfc/rfc9000.html#section-17.2.5.2>), so that one whose NAT moves before the
//! token is back cannot be asked again. Whoever holds the token has heard what was sent to the address, and gains
//! from another port of it at most that others behind the same address are sent to, within the bound. Tokens that
//! servers check are for them to judge.

pub mod limits;
pub mod mode;
mod sources;
pub mod tokens;
mod versions;

use std::{
    fmt,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use quic::{
    header::{Kind, LongType, Version},
    invariants::{LongHeader, Packet},
    token::{InvalidToken, is_new_token},
    varint,
};
use quic_lb_config::{Config, RetryMode, UnknownPackets};

use crate::client_path::{ClientAddr, ListenerIndex};
use crate::listeners::Placed;
use crate::verdict::{DropReason, Rule, TokenResult};
use limits::{Limiter, Limits};
use mode::Phase;
use sources::OwnAddresses;
use tokens::{KeyUses, Tokens, TokensMade};
use versions::Versions;

/// The smallest datagram that may carry a client's Initial
/// (<https://www.rfc-editor.org/rfc/rfc9000.html#section-14.1>).
const MIN_INITIAL_DATAGRAM: usize = 1200;

/// For how long after validation began Initials of handshakes from before are let through, once they
/// are directed at a connection ID of the server: their clients have heard from it, ignore a Retry
/// and may still have something to repeat. As long as clients try.
const HANDSHAKE_GRACE: Duration = Duration::from_secs(10);

/// The admission of one listener, and what it goes by; part of the routing snapshot.
#[derive(Clone, Debug)]
pub struct Gate {
    mode: RetryMode,
    phase: Phase,
    tokens: Arc<Tokens>,
    limits: Limits,
    versions: Arc<Versions>,
    own: Arc<OwnAddresses>,
    unknown_short_headers: UnknownPackets,
}

/// What outlives snapshots: how often keys were used, how many connections have begun, and where
/// each listener stands between one mode and the next.
#[derive(Debug, Default)]
pub struct AdmissionState {
    seed: [u64; 2],
    uses: KeyUses,
    limiter: Option<Arc<Limiter>>,
    /// By listener; `None` for those that stand where they begin.
    phases: Vec<Option<Phase>>,
}

impl AdmissionState {
    /// A state in which nothing was counted. Nobody outside should know `seed`: whoever does can make
    /// sources share their cells.
    #[must_use]
    pub fn new(seed: [u64; 2]) -> Self {
        Self { seed, ..Self::default() }
    }

    /// Says where the listener with this index stands; before that, it stands where its mode begins.
    pub fn set_phase(&mut self, listener: usize, phase: Phase) {
        while self.phases.len() <= listener {
            self.phases.push(None);
        }
        self.phases[listener] = Some(phase);
    }

    /// Tokens made so far with each key of the current configuration, in its format.
    #[must_use]
    pub fn tokens_made(&self) -> Vec<TokensMade> {
        self.uses.read()
    }

    /// The gate of each of these `listeners`.
    pub(crate) fn gates(&mut self, config: &Config, listeners: &[Placed]) -> Vec<Gate> {
        let tokens = Arc::new(Tokens::new(&config.retry, &mut self.uses));
        let versions = Arc::new(Versions::new(&config.retry));
        let own = Arc::new(OwnAddresses::new(config));
        let limiter = self.limiter.get_or_insert_with(|| Arc::new(Limiter::new(self.seed)));
        let gate = |Placed { index: ListenerIndex(index), listener, .. }: &Placed| {
            let mode = config.retry_mode(listener);
            let phase = match mode {
                // The state may be a moment behind the configuration.
                RetryMode::Off => Phase::Inactive,
                _ => {
                    let at_start = Phase::at_start(config.retry_mode_at_start(listener));
                    self.phases.get(*index).copied().flatten().unwrap_or(at_start)
                }
            };
            Gate {
                mode,
                phase,
                tokens: Arc::clone(&tokens),
                limits: Limits::new(&config.limits.new_connections, Arc::clone(limiter), *index),
                versions: Arc::clone(&versions),
                own: Arc::clone(&own),
                unknown_short_headers: config.limits.unknown_short_headers,
            }
        };
        listeners.iter().map(gate).collect()
    }
}

/// A packet at the door, and what is known about it.
pub(crate) struct Arrival<'a> {
    pub(crate) now: Instant,
    pub(crate) unix: SystemTime,
    pub(crate) client: ClientAddr,
    pub(crate) local: Option<IpAddr>,
    pub(crate) datagram_len: usize,
    pub(crate) packet: Packet<'a>,
    /// The rule that knows its server, if one does.
    pub(crate) known: Option<Rule>,
    /// Whether its destination connection ID is one of a server: decoded or learnt.
    pub(crate) to_server_cid: bool,
    /// Whether connection IDs of the servers can be told from others.
    pub(crate) server_cids_decode: bool,
    /// What is remembered of its 4-tuple and source connection ID.
    pub(crate) handshake: Option<Handshake>,
    /// Whether it may go on with a handshake that began elsewhere; each time it may, that is counted.
    pub(crate) may_have_moved: &'a dyn Fn(Moved) -> bool,
}

/// What speaks for a packet that goes on with a handshake, or may, and comes from an address or a port
/// that has proved nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moved {
    /// A server has given that ID in the handshake of a client that had proved its address.
    Given,
    /// It looks like one of a handshake which another balancer has begun with: an Initial with a token of
    /// a Retry, sealed for the connection ID that the client had before, or a packet with Handshake keys.
    FromElsewhere,
    /// A token of a Retry, made for another port of its address.
    Port,
}

/// What is remembered of a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Handshake {
    /// Whether the client has proved its address.
    pub(crate) validated: bool,
    /// Whether it began with the destination connection ID of the packet at hand.
    pub(crate) same_dcid: bool,
}

/// What becomes of a packet, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Judgement {
    pub(crate) ruling: Ruling,
    pub(crate) why: Why,
    /// What its token was worth, if it was looked at.
    pub(crate) token: Option<TokenResult>,
    /// Whether it counts as an attempt to begin a connection, or at least a flow, which the mode
    /// "adaptive" goes by.
    pub(crate) attempt: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ruling {
    /// It goes on with what there is.
    Pass,
    /// It begins something, as far as the limits allow.
    Begin {
        /// Whether the client has proved its address.
        validated: bool,
        /// Whether the client gets a Retry besides.
        retry: Option<Version>,
    },
    /// The client gets a Retry and nothing is forwarded.
    Retry(Version),
    /// The client is told that its token is invalid, if that many may be told, and nothing is forwarded.
    Refuse(Version),
    Drop(DropReason),
}

/// The reason of a ruling, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    NotAsked,
    GoesOn,
    Moved,
    MovedFromElsewhere,
    MovedPort,
    Repeated,
    Begins,
    ValidToken,
    ValidNewToken,
    InvalidToken(InvalidToken),
    InvalidNewToken(InvalidToken),
    NoToken,
    Transition,
    BrokenInitial,
    SmallInitial,
    Source(DropReason),
    VersionAllowed,
    VersionDenied,
    Unvalidated,
    UnknownShort,
    Leaving,
}

impl Gate {
    /// Where the listener stands now.
    #[must_use]
    pub fn phase(&self, now: Instant) -> Phase {
        self.phase.at(now)
    }

    pub(crate) const fn tokens(&self) -> &Arc<Tokens> {
        &self.tokens
    }

    /// Why no flow may begin at `client`, which sends to `local`, whatever it shows: nobody answers from
    /// there but ourselves and the backends.
    pub(crate) fn refuse(&self, client: ClientAddr, local: Option<IpAddr>) -> Option<DropReason> {
        self.own.refuse(client, local)
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Judges a packet before a backend is chosen for it, if its server is not known.
    pub(crate) fn judge(&self, arrival: &Arrival<'_>) -> Judgement {
        let phase = self.phase(arrival.now);
        let header = match &arrival.packet {
            Packet::Long(header) => header,
            Packet::Short(_) => return self.judge_short(arrival, phase),
        };
        match header.kind() {
            Kind::Known(version, LongType::Initial) => {
                self.judge_initial(arrival, header, version, phase)
            }
            kind => self.judge_other(arrival, kind, header.version, phase),
        }
    }

    fn judge_short(&self, arrival: &Arrival<'_>, phase: Phase) -> Judgement {
        if arrival.known.is_some() {
            return Judgement::new(Ruling::Pass, Why::NotAsked);
        }
        if let Some(refused) = self.refused_source(arrival) {
            return refused;
        }
        // It starts a flow, as an attempt to begin a connection does: a flood of these is noticed.
        let refuse = self.unknown_short_headers == UnknownPackets::Refuse;
        let judgement = match refuse && phase != Phase::Inactive {
            true => Judgement::drop(DropReason::UnknownShortHeader, Why::UnknownShort),
            false => Judgement::new(Ruling::Pass, Why::NotAsked),
        };
        Judgement { attempt: true, ..judgement }
    }

    /// Long headers other than Initials. Nothing tells those that begin something from those that
    /// go on, unless their connection ID is a server's or the handshake is remembered.
    fn judge_other(
        &self,
        arrival: &Arrival<'_>,
        kind: Kind,
        version: u32,
        phase: Phase,
    ) -> Judgement {
        if !matches!(arrival.known, None | Some(Rule::FourTuple)) {
            return Judgement::new(Ruling::Pass, Why::NotAsked);
        }
        if let Some(refused) = self.refused_source(arrival) {
            return refused;
        }
        let begin = Ruling::Begin { validated: false, retry: None };
        let is_unknown = matches!(kind, Kind::UnknownVersion);
        if phase == Phase::Inactive {
            return Judgement { attempt: is_unknown, ..Judgement::new(begin, Why::Begins) };
        }
        match kind {
            Kind::UnknownVersion if self.versions.allow(version) => {
                Judgement { attempt: true, ..Judgement::new(begin, Why::VersionAllowed) }
            }
            Kind::UnknownVersion => Judgement::drop(DropReason::Version, Why::VersionDenied),
            // In the transition they may belong to a handshake in progress.
            _ if phase.is_transition() => Judgement::new(begin, Why::Transition),
            Kind::Known(_, LongType::Handshake)
                if !arrival.server_cids_decode
                    && (arrival.may_have_moved)(Moved::FromElsewhere) =>
            {
                Judgement { attempt: true, ..Judgement::new(begin, Why::MovedFromElsewhere) }
            }
            _ => Judgement::drop(DropReason::Unvalidated, Why::Unvalidated),
        }
    }

    fn judge_initial(
        &self,
        arrival: &Arrival<'_>,
        header: &LongHeader<'_>,
        version: Version,
        phase: Phase,
    ) -> Judgement {
        let active = phase != Phase::Inactive;
        let lenient = !active || self.phase.is_within(HANDSHAKE_GRACE, arrival.now);
        let remembered = arrival.handshake.filter(|handshake| handshake.validated || lenient);
        if remembered.is_some() && arrival.to_server_cid {
            return Judgement::new(Ruling::Pass, Why::GoesOn);
        }
        if active && arrival.to_server_cid && (arrival.may_have_moved)(Moved::Given) {
            return Judgement::new(Ruling::Pass, Why::Moved);
        }
        if arrival.datagram_len < MIN_INITIAL_DATAGRAM {
            return Judgement::drop(DropReason::SmallInitial, Why::SmallInitial);
        }
        if let Some(refused) = self.refused_source(arrival) {
            return refused;
        }
        if self.mode == RetryMode::Off {
            return Judgement::begin(arrival, Why::Begins);
        }
        let Some(token) = token(header) else {
            return Judgement::drop(DropReason::Malformed, Why::BrokenInitial);
        };
        // Nobody but the balancer makes Retry tokens where servers do not see addresses, so that
        // one is forged also while none is asked for.
        if !active && (!self.tokens.only_ours() || arrival.to_server_cid) {
            return Judgement::begin(arrival, Why::Begins);
        }
        let checked = match is_new_token(token) {
            None => None,
            Some(is_new) => {
                let checked = self.tokens.check(token, arrival.client.0, header.dcid, arrival.unix);
                Some((is_new, checked))
            }
        };
        let retry = |why| Judgement {
            ruling: match phase {
                Phase::Inactive => Ruling::Begin { validated: false, retry: None },
                Phase::Transition { .. } => {
                    Ruling::Begin { validated: false, retry: Some(version) }
                }
                Phase::Active => Ruling::Retry(version),
            },
            why: if phase.is_transition() { Why::Transition } else { why },
            token: None,
            attempt: true,
        };
        let repeated = arrival.handshake.is_some_and(|h| h.validated && h.same_dcid);
        let proved = match repeated {
            true => Ruling::Pass,
            false => Ruling::Begin { validated: true, retry: None },
        };
        let may_have_moved = |moved| !active || repeated || (arrival.may_have_moved)(moved);
        let may_be_server_cid = arrival.to_server_cid
            || !arrival.server_cids_decode && !tokens::may_be_own_cid(header.dcid);
        match checked {
            Some((is_new, Ok(()))) => {
                let why = if is_new { Why::ValidNewToken } else { Why::ValidToken };
                let token = Some(TokenResult::Valid);
                Judgement { ruling: proved, why, token, attempt: is_new && !repeated }
            }
            Some((false, Err(InvalidToken::Port)))
                if self.tokens.only_ours() && may_have_moved(Moved::Port) =>
            {
                let token = Some(TokenResult::Port);
                Judgement { ruling: proved, why: Why::MovedPort, token, attempt: !repeated }
            }
            Some((false, Err(invalid @ InvalidToken::Seal)))
                if may_be_server_cid && (arrival.may_have_moved)(Moved::FromElsewhere) =>
            {
                let begin = Ruling::Begin { validated: false, retry: None };
                let judgement = Judgement::new(begin, Why::MovedFromElsewhere);
                Judgement { token: Some(invalid.into()), attempt: true, ..judgement }
            }
            Some((false, Err(invalid))) => Judgement {
                token: Some(invalid.into()),
                ..Judgement::new(Ruling::Refuse(version), Why::InvalidToken(invalid))
            },
            Some((true, Err(invalid))) => {
                Judgement { token: Some(invalid.into()), ..retry(Why::InvalidNewToken(invalid)) }
            }
            None if !active => Judgement::begin(arrival, Why::Begins),
            None => retry(Why::NoToken),
        }
    }

    fn refused_source(&self, arrival: &Arrival<'_>) -> Option<Judgement> {
        let reason = if sources::is_reflector(arrival.client.0.port()) {
            DropReason::ReflectorPort
        } else {
            self.own.refuse(arrival.client, arrival.local)?
        };
        Some(Judgement::drop(reason, Why::Source(reason)))
    }
}

impl Judgement {
    /// On a packet that begins nothing.
    pub(crate) const NOT_ASKED: Self = Self::new(Ruling::Pass, Why::NotAsked);

    const fn new(ruling: Ruling, why: Why) -> Self {
        Self { ruling, why, token: None, attempt: false }
    }

    /// At a listener that is not in the configuration any more.
    pub(crate) const LEAVING: Self = Self::drop(DropReason::ListenerRemoved, Why::Leaving);

    const fn drop(reason: DropReason, why: Why) -> Self {
        Self::new(Ruling::Drop(reason), why)
    }

    /// An Initial while nobody has to prove anything: new unless it was seen before.
    fn begin(arrival: &Arrival<'_>, why: Why) -> Self {
        if arrival.handshake.is_some_and(|handshake| handshake.same_dcid) {
            return Self::new(Ruling::Pass, Why::Repeated);
        }
        let begin = Ruling::Begin { validated: false, retry: None };
        Self { attempt: true, ..Self::new(begin, why) }
    }
}

/// The token of an Initial; empty when it has none, `None` when the packet is broken.
fn token<'a>(header: &LongHeader<'a>) -> Option<&'a [u8]> {
    let (len, rest) = varint::read(header.rest)?;
    rest.get(..usize::try_from(len).ok()?)
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAsked => f.write_str("not asked: it begins nothing"),
            Self::GoesOn => f.write_str("goes on with a handshake that is remembered"),
            Self::Moved => f.write_str("goes on with the handshake of a client that has proved its address, elsewhere"),
            Self::MovedFromElsewhere => f.write_str(
                "may go on with a handshake that another balancer has begun with",
            ),
            Self::MovedPort => f.write_str(
                "the token of a Retry, made for another port of this address: the client's NAT may have moved",
            ),
            Self::Repeated => f.write_str("this Initial was let through before"),
            Self::Begins => f.write_str("begins a connection, and no address is validated now"),
            Self::ValidToken => f.write_str("the token of a Retry, valid"),
            Self::ValidNewToken => f.write_str("the token of a NEW_TOKEN frame, valid"),
            Self::InvalidToken(invalid) => write!(f, "claims to be of a Retry: {invalid}"),
            Self::InvalidNewToken(invalid) => {
                write!(f, "claims to be of a NEW_TOKEN frame: {invalid}; the client is asked")
            }
            Self::NoToken => f.write_str("no token: the client is asked to prove its address"),
            Self::Transition => f.write_str("no proof of the address, while validation begins"),
            Self::BrokenInitial => f.write_str("an Initial that ends inside its token"),
            Self::SmallInitial => f.write_str("an Initial in less than 1200 bytes"),
            Self::Source(DropReason::ReflectorPort) => {
                f.write_str("comes from a port of services that attackers reflect from")
            }
            Self::Source(DropReason::BackendAddress) => {
                f.write_str("comes from the address of a backend")
            }
            Self::Source(_) => f.write_str("comes from an address of this balancer"),
            Self::VersionAllowed => f.write_str("a version of which no Retry is known, allowed"),
            Self::VersionDenied => f.write_str("a version of which no Retry is known, denied"),
            Self::Unvalidated => {
                f.write_str("begins with no Initial, while addresses are being validated")
            }
            Self::Leaving => f.write_str("begins something, and the listener is not in the configuration any more"),
            Self::UnknownShort => {
                f.write_str("nothing is known about it, while addresses are being validated")
            }
        }
    }
}

#[cfg(test)]
mod tests;
