//! Which shard of an endpoint a datagram belongs to.
//!
//! The kernel spreads clients over the sockets of an address by their own address. When that
//! changes, a connection's datagrams come to another socket. The first octet of the nonce in its
//! connection IDs, which is encrypted, says where they belong. Connection IDs that are not routable
//! have an encrypted octet of their own ([`ShardMark`]).

use tokio::sync::mpsc;

use crate::{
    invariants::Packet,
    routable::{CidConfig, ConfigId, ServerId, ShardMark},
    transport::Received,
};

/// Datagrams on their way to one other shard. They are few: a client that moved stays moved, but a
/// shard that is behind must not make the others wait.
const IN_TRANSIT: usize = 256;
/// Former configurations whose connection IDs may still be in use.
const MAX_FORMER: usize = 8;

/// A datagram that came to the wrong shard.
#[derive(Debug)]
pub(super) struct Stray {
    pub(super) from: Received,
    pub(super) octets: Box<[u8]>,
}

/// What one shard knows about the others.
#[derive(Debug)]
pub(super) struct Others {
    own: usize,
    inboxes: Vec<mpsc::Sender<Stray>>,
    /// Newest first: configurations that take the number of the shard for the end of the server ID,
    /// and the server ID before that.
    views: Vec<(CidConfig, ServerId)>,
    /// Reads connection IDs that are not routable, of the lengths that were in use.
    marks: Vec<ShardMark>,
    handed_over: u64,
    lost: u64,
}

/// The knowledge of each of `count` shards, and what is handed over to it.
pub(super) fn connect(count: usize) -> Vec<(Others, mpsc::Receiver<Stray>)> {
    let (senders, receivers): (Vec<_>, Vec<_>) =
        (0..count).map(|_| mpsc::channel(IN_TRANSIT)).unzip();
    let others = (0..count).map(|own| Others {
        own,
        inboxes: senders.clone(),
        views: Vec::new(),
        marks: Vec::new(),
        handed_over: 0,
        lost: 0,
    });
    others.zip(receivers).collect()
}

impl Others {
    /// Connection IDs are made for `server_id` with `config` from now on.
    pub(super) fn set_config(&mut self, config: &CidConfig, server_id: ServerId) {
        if let Some(view) = config.with_partition() {
            self.views.insert(0, (view, server_id));
            self.views.truncate(MAX_FORMER);
        }
    }

    /// Connection IDs that are not routable are made with `mark` from now on.
    pub(super) fn set_mark(&mut self, mark: ShardMark) {
        if self.marks.iter().all(|known| known.cid_len() != mark.cid_len()) {
            self.marks.push(mark);
        }
    }

    /// Datagrams that went to other shards, and those that found their inbox full.
    pub(super) const fn counts(&self) -> (u64, u64) {
        (self.handed_over, self.lost)
    }

    /// Hands a datagram over if another shard's connection ID is on it; returns whether it did.
    pub(super) fn hand_over(&mut self, from: Received, datagram: &[u8]) -> bool {
        let Some(shard) = self.shard_of(datagram).filter(|&shard| shard != self.own) else {
            return false;
        };
        let Some(inbox) = self.inboxes.get(shard) else { return false };
        match inbox.try_send(Stray { from, octets: datagram.into() }) {
            Ok(()) => self.handed_over += 1,
            Err(_) => self.lost += 1,
        }
        true
    }

    fn shard_of(&self, datagram: &[u8]) -> Option<usize> {
        let dcid = match Packet::read(datagram).ok()? {
            Packet::Short(short) => short.rest,
            Packet::Long(long) => long.dcid,
        };
        let first = *dcid.first()?;
        let Some(id) = ConfigId::from_first_octet(first) else {
            // Not routable, and its length is in the first octet.
            let len = usize::from(first & 0x1f) + 1;
            let mark = self.marks.iter().find(|mark| mark.cid_len() == len)?;
            return mark.shard(dcid).map(usize::from);
        };
        let (view, server_id) = self.views.iter().find(|(view, _)| view.id() == id)?;
        let decoded = view.decode(dcid)?;
        let (&shard, owner) = decoded.as_slice().split_last()?;
        // A client's own choice, or made for another server: this shard is as good as any.
        (owner == server_id.as_slice()).then_some(usize::from(shard))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routable::{CidGenerator, Key, Partition};

    const SHARD: u8 = 3;

    /// What a balancer may have in front of it: as many octets as there are, and no more.
    fn long(dcid: &[u8]) -> Vec<u8> {
        let len = [u8::try_from(dcid.len()).unwrap()];
        [&[0xc0, 0, 0, 0, 1], &len[..], dcid, &[0]].concat()
    }

    fn short(dcid: &[u8]) -> Vec<u8> {
        [&[0x40], dcid, &[0x55; 30]].concat()
    }

    #[test]
    fn req_m17_every_layout_leads_to_its_shard_by_long_headers_and_short_ones() {
        let from = Received { remote: ([192, 0, 2, 1], 1000).into(), local: None, ecn: None };
        // One octet of the server ID is left for the shard.
        for (server_id_len, nonce_len) in
            (1..15usize).flat_map(|server| (4..=19 - server).map(move |nonce| (server, nonce)))
        {
            for key in [None, Some(Key::new([5; 16]))] {
                let id = ConfigId::new(1).unwrap();
                let config = CidConfig::new(id, server_id_len, nonce_len, key.as_ref()).unwrap();
                let [own, foreign] =
                    [9, 8].map(|octet| ServerId::new(&[octet; 15][..server_id_len]).unwrap());
                let cid = |server| {
                    let partition = Partition::Of256(SHARD);
                    let made = CidGenerator::new(config.clone(), server, partition, [1; 32]);
                    made.unwrap().generate().unwrap()
                };
                let mut shards = connect(5);
                let (others, _) = &mut shards[0];
                others.set_config(&config, own);
                let layout = format!("{config:?}");
                for datagram in [long(&cid(own)), short(&cid(own))] {
                    assert!(others.hand_over(from, &datagram), "{layout}");
                }
                for datagram in [long(&cid(foreign)), short(&cid(foreign))] {
                    assert!(!others.hand_over(from, &datagram), "{layout}");
                }
                let (_, inbox) = &mut shards[usize::from(SHARD)];
                assert_eq!(std::iter::from_fn(|| inbox.try_recv().ok()).count(), 2, "{layout}");
            }
        }
    }
}
