//! Datagrams of no connection: Initials that begin one, and everything else that strangers send.
//! Each is answered by at most one datagram.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{
    super::{
        config::RetryPolicy,
        connection::{Arrival, Connection, Setup},
        packet::{DropReason, Header, PacketKind},
        parameters::{MIN_UDP_PAYLOAD, Preferred},
        reset,
    },
    Endpoint, FIRST_DCID_LEN,
    tokens::{TokenResult, TokenVerdict},
};
use crate::{
    connection_id::{ConnectionId, MAX_LEN},
    header::Version,
    initial::{self, Reason, Refusal},
    invariants::{LongHeader, Packet},
    random::Random,
    retry,
    token::InvalidToken,
};

/// Replies that wait to be fetched; more than one only when the calling rule is not kept.
const MAX_REPLIES: usize = 64;
/// The versions to offer in Version Negotiation.
const VERSIONS: [u32; 1] = [Version::V1.to_wire()];

/// An answer that waits to be fetched.
pub(super) struct Reply {
    pub(super) remote: SocketAddr,
    pub(super) local: Option<IpAddr>,
    pub(super) octets: Vec<u8>,
}

/// What kind of datagram belongs to no connection.
pub(super) enum Stranger {
    Short,
    Initial(Version),
    Version,
    Other(DropReason),
}

impl Endpoint {
    pub(super) fn on_unknown_short(
        &mut self,
        arrival: &Arrival,
        datagram: &[u8],
    ) -> Result<(), DropReason> {
        if let Some(tail) = datagram.last_chunk::<16>()
            && let Some(&index) = self.by_reset_token.get(&(arrival.remote, *tail))
        {
            if let Some(entry) = &self.connections[index] {
                entry.connection.lock().handle_reset(arrival.now);
                self.touch(index);
            }
            return Ok(());
        }
        self.note_unclaimed(datagram);
        // "An endpoint MAY limit the rate at which it sends": before any work for it is done.
        if !self.resets.has_room(arrival.now) {
            return Err(DropReason::TooManyResets);
        }
        let token = datagram.get(1..).and_then(|rest| self.issuers.reset_token(rest));
        let token = token.filter(|_| self.server.is_some()).ok_or(DropReason::UnknownConnection)?;
        let mut octets = Vec::new();
        if !reset::write(&token, datagram.len(), &mut self.random, &mut octets) {
            return Err(DropReason::UnknownConnection);
        }
        self.resets.take(arrival.now);
        self.resets_sent += 1;
        self.reply(arrival, octets);
        Ok(())
    }

    /// Remembers whom a datagram was meant for that no connection here is, until
    /// [`Self::take_unclaimed`].
    pub(super) fn note_unclaimed(&mut self, datagram: &[u8]) {
        let meant = match Packet::read(datagram) {
            Ok(Packet::Long(header)) => ConnectionId::new(header.dcid),
            Ok(Packet::Short(short)) => {
                let len = short.rest.len().min(MAX_LEN);
                ConnectionId::new(&short.rest[..len])
            }
            Err(_) => None,
        };
        self.unclaimed = meant;
    }

    /// <https://www.rfc-editor.org/rfc/rfc9000.html#section-6.1>
    pub(super) fn on_unknown_version(
        &mut self,
        arrival: &Arrival,
        datagram: &[u8],
    ) -> Result<(), DropReason> {
        let large_enough = datagram.len() >= usize::from(MIN_UDP_PAYLOAD);
        let Ok(Packet::Long(header)) = Packet::read(datagram) else {
            return Err(DropReason::Malformed);
        };
        if self.server.is_none() || !large_enough {
            return Err(DropReason::UnknownVersion);
        }
        let octets = self.version_negotiation(&header);
        self.reply(arrival, octets);
        Ok(())
    }

    fn version_negotiation(&mut self, header: &LongHeader<'_>) -> Vec<u8> {
        let random: [u8; 5] = self.random.octets();
        let mut octets = vec![0x80 | random[0], 0, 0, 0, 0];
        for id in [header.scid, header.dcid] {
            #[expect(clippy::cast_possible_truncation, reason = "its length came in one octet")]
            octets.push(id.len() as u8);
            octets.extend_from_slice(id);
        }
        // A reserved version keeps clients in the habit of ignoring what they do not know.
        let reserved =
            [random[1], random[2], random[3], random[4]].map(|octet| octet & 0xf0 | 0x0a);
        octets.extend_from_slice(&reserved);
        for version in VERSIONS {
            octets.extend_from_slice(&version.to_be_bytes());
        }
        octets
    }

    pub(super) fn on_initial(
        &mut self,
        arrival: &Arrival,
        version: Version,
        datagram: &mut [u8],
    ) -> Result<(), DropReason> {
        if self.server.is_none() {
            return Err(DropReason::UnknownConnection);
        }
        if !VERSIONS.contains(&version.to_wire()) {
            return self.on_unknown_version(arrival, datagram);
        }
        // "A server MUST discard an Initial packet that is carried in a UDP datagram with a
        // payload that is smaller than the smallest allowed maximum datagram size of 1200 bytes."
        // https://www.rfc-editor.org/rfc/rfc9000.html#section-14.1
        if datagram.len() < usize::from(MIN_UDP_PAYLOAD) {
            return Err(DropReason::SmallInitial);
        }
        let header = Header::read(datagram, 0)?;
        let PacketKind::Initial { scid, token, .. } = header.kind.clone() else {
            return Err(DropReason::Malformed);
        };
        if header.dcid.len() < FIRST_DCID_LEN {
            return Err(DropReason::Malformed);
        }
        let token = datagram[token].to_vec();
        if let Some(index) = self.began_with(arrival, &token, &header.dcid) {
            self.deliver_moved(index, arrival, datagram, &header.dcid);
            return Ok(());
        }
        let verdict = self.judge(arrival, &token, &header.dcid);
        let Some(server) = &self.server else { return Err(DropReason::UnknownConnection) };
        let retry_wanted = match server.retry {
            RetryPolicy::Never => false,
            RetryPolicy::Always => true,
            RetryPolicy::AboveHalfOpen(limit) => self.half_open >= limit,
        };
        let (original_dcid, retry_scid) = match verdict {
            TokenVerdict::Retried(claim) => (claim.original_dcid, Some(header.dcid)),
            TokenVerdict::Invalid(why) => {
                // Whoever has the key has a clock too, which may be the wrong one.
                let words = match why {
                    InvalidToken::Expired | InvalidToken::Future => why.label(),
                    _ => "",
                };
                let why = (Reason::InvalidToken, words);
                return self.refuse(arrival, version, &header, datagram, why);
            }
            TokenVerdict::Spent => return Err(DropReason::SpentToken),
            TokenVerdict::Nothing if retry_wanted => {
                return self.send_retry(arrival, version, header.dcid, &scid);
            }
            TokenVerdict::Known | TokenVerdict::Nothing => (header.dcid, None),
        };
        if self.half_open >= server.max_half_open {
            return Err(DropReason::Saturated);
        }
        if self.count >= server.max_connections {
            return self.refuse(arrival, version, &header, datagram, (Reason::Refused, ""));
        }
        let tls = Arc::clone(&server.tls);
        let config = Arc::clone(&server.transport);
        let preferred = server.preferred_address.filter(|_| self.issuers.per_connection() > 1);
        let preferred = match preferred
            .map(|address| (address, self.issuers.issue(|id| self.by_cid.contains_key(id))))
        {
            Some((address, Ok((connection_id, stateless_reset_token)))) => {
                Some(Preferred { address, connection_id, stateless_reset_token })
            }
            _ => None,
        };
        let preferred_cid = preferred.as_ref().map(|preferred| preferred.connection_id);
        let (local_cid, reset_token) = self
            .issuers
            .issue(|id| self.by_cid.contains_key(id))
            .map_err(|_| DropReason::Saturated)?;
        let setup = Setup {
            now: arrival.now,
            version,
            config,
            remote: arrival.remote,
            local: arrival.local,
            local_cid,
            reset_token,
            remote_cid: scid,
            original_dcid,
            retry_scid,
            token: Vec::new(),
            address_validated: verdict != TokenVerdict::Nothing,
            disable_active_migration: !self.issuers.allows_migration(),
            preferred,
            random: Random::new(self.random.octets()),
        };
        let limit = self.issuers.per_connection();
        let Ok(mut connection) = Connection::server(setup, tls, limit) else {
            return self.refuse(arrival, version, &header, datagram, (Reason::Internal, ""));
        };
        connection.handle_datagram(*arrival, datagram, header.dcid.len());
        // Whatever does not open with the keys that anybody can derive is noise, not a client.
        if !connection.is_heard() {
            return Err(DropReason::Undecryptable);
        }
        if verdict != TokenVerdict::Nothing {
            self.spent_tokens.insert(&token);
        }
        if let TokenVerdict::Retried(claim) = verdict {
            self.supersede(arrival.remote, claim.original_dcid, scid);
        }
        let first = (arrival.remote, header.dcid);
        let index = self.insert(connection, Some(first), None);
        if let (TokenVerdict::Retried(claim), Some(entry)) = (verdict, &mut self.connections[index])
        {
            entry.sealed_client = Some((arrival.remote, claim.client));
            self.by_retry.insert(header.dcid, index);
        }
        for id in std::iter::once(local_cid).chain(preferred_cid) {
            self.by_cid.insert(id, index);
        }
        self.by_first_dcid.insert(first, index);
        Ok(())
    }

    /// The connection that this token of a Retry began with: its client goes on repeating it, also where its
    /// NAT has moved since.
    fn began_with(&self, arrival: &Arrival, token: &[u8], dcid: &ConnectionId) -> Option<usize> {
        let &index = self.by_retry.get(dcid)?;
        let now = self.wall_clock(arrival.now);
        let verdict = self.tokens.judge(token, arrival.remote, dcid, now);
        matches!(verdict, TokenVerdict::Retried(_)).then_some(index)
    }

    /// Judges the token of an Initial, and counts what came of it.
    fn judge(&mut self, arrival: &Arrival, token: &[u8], dcid: &ConnectionId) -> TokenVerdict {
        if token.is_empty() {
            return TokenVerdict::Nothing;
        }
        let now = self.wall_clock(arrival.now);
        let verdict = self.tokens.judge(token, arrival.remote, dcid, now);
        let (verdict, result) = match verdict {
            TokenVerdict::Invalid(invalid) => {
                self.tokens_refused[invalid as usize] += 1;
                (verdict, TokenResult::Invalid)
            }
            TokenVerdict::Nothing => (verdict, TokenResult::Ignored),
            TokenVerdict::Spent => (verdict, TokenResult::Spent),
            // A connection that began with it a second time would not know what its client had drawn.
            TokenVerdict::Retried(_) if self.spent_tokens.contains(token) => {
                (TokenVerdict::Spent, TokenResult::Spent)
            }
            _ if self.spent_tokens.contains(token) => (TokenVerdict::Nothing, TokenResult::Spent),
            TokenVerdict::Retried(_) => (verdict, TokenResult::Retry),
            TokenVerdict::Known => (verdict, TokenResult::NewToken),
        };
        self.token_results[result as usize] += 1;
        verdict
    }

    /// A client has answered a Retry: what its first Initial began here before the Retry was asked
    /// for, it knows nothing of. That happens while a balancer in front starts sending Retries.
    fn supersede(&mut self, remote: SocketAddr, original: ConnectionId, client_cid: ConnectionId) {
        let Some(&older) = self.by_first_dcid.get(&(remote, original)) else { return };
        let Some(entry) = &self.connections[older] else { return };
        let shared = entry.connection.clone();
        let connection = shared.lock();
        if connection.is_half_open()
            && !connection.path().validated
            && connection.remote_cid() == client_cid
        {
            self.remove(older, &connection);
        }
    }

    fn send_retry(
        &mut self,
        arrival: &Arrival,
        version: Version,
        original_dcid: ConnectionId,
        client_scid: &ConnectionId,
    ) -> Result<(), DropReason> {
        let (scid, _) = self
            .issuers
            .issue(|id| self.by_cid.contains_key(id))
            .map_err(|_| DropReason::Saturated)?;
        let now = self.wall_clock(arrival.now);
        let token = self.tokens.retry(&mut self.random, arrival.remote, original_dcid, &scid, now);
        let token = token.ok_or(DropReason::Saturated)?;
        let retry = retry::Retry {
            version,
            dcid: client_scid,
            scid: &scid,
            original_dcid: &original_dcid,
            token: &token,
        };
        let mut octets = vec![0; retry::MAX_LEN];
        let [unused] = self.random.octets();
        let len = retry.write(unused, &mut octets).ok_or(DropReason::Malformed)?;
        octets.truncate(len);
        self.reply(arrival, octets);
        Ok(())
    }

    /// Answers an Initial by CONNECTION_CLOSE, without keeping anything; if it is authentic, lest
    /// a corrupted token end a connection that a clean one would begin.
    fn refuse(
        &mut self,
        arrival: &Arrival,
        version: Version,
        initial: &Header,
        datagram: &[u8],
        (reason, words): (Reason, &str),
    ) -> Result<(), DropReason> {
        let PacketKind::Initial { scid: client_cid, .. } = &initial.kind else {
            return Err(DropReason::Malformed);
        };
        if !initial::is_authentic(datagram) {
            return Err(DropReason::Undecryptable);
        }
        let (original_dcid, scid) = (&initial.dcid, &initial.dcid);
        let refusal = Refusal { version, client_cid, original_dcid, scid, reason, words };
        let mut octets = vec![0; Refusal::MAX_LEN];
        let len = refusal.write(&mut octets).ok_or(DropReason::Malformed)?;
        octets.truncate(len);
        self.reply(arrival, octets);
        Ok(())
    }

    fn reply(&mut self, arrival: &Arrival, octets: Vec<u8>) {
        if self.replies.len() < MAX_REPLIES {
            let Arrival { remote, local, .. } = *arrival;
            self.replies.push_back(Reply { remote, local, octets });
        }
    }
}
