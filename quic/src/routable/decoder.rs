//! What a balancer knows: up to seven configurations, chosen by the first octet.

use super::{ConfigId, ServerId, codec::CidConfig};

/// How many connection IDs one step of [`Decoder::decode_batch`] works on: as many blocks as the
/// AES unit keeps in flight.
const LANES: usize = 8;

/// The configurations that are alive, at most one per [`ConfigId`].
#[derive(Clone, Debug, Default)]
pub struct Decoder {
    configs: [Option<CidConfig>; ConfigId::COUNT],
}

/// What a routable connection ID says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Decoded {
    /// The configuration it was made with.
    pub config_id: ConfigId,
    /// The server it names; whether such a server exists is for the caller to say.
    pub server_id: ServerId,
}

/// Why a connection ID names no server. It never means that the packet is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Unroutable {
    /// There are no octets.
    #[error("the connection ID is empty")]
    Empty,
    /// The config bits are 0b111.
    #[error("the config bits are 0b111, the server says it is not routable")]
    Reserved,
    /// No configuration has this ID.
    #[error("there is no configuration with ID {0}")]
    UnknownConfig(ConfigId),
    /// Fewer octets than the configuration needs.
    #[error("configuration {0} needs more bytes than there are")]
    TooShort(ConfigId),
}

impl Decoder {
    /// A decoder for `configs`; of two with the same ID the later one stays.
    #[must_use]
    pub fn new(configs: impl IntoIterator<Item = CidConfig>) -> Self {
        let mut decoder = Self::default();
        for config in configs {
            let slot = config.id().index();
            decoder.configs[slot] = Some(config);
        }
        decoder
    }

    /// The configurations, by ascending ID.
    pub fn configs(&self) -> impl Iterator<Item = &CidConfig> {
        self.configs.iter().flatten()
    }

    /// Octets of a connection ID that the configuration in its first octet needs. For a short
    /// header this is the whole of what can be known about the length of the connection ID.
    ///
    /// # Errors
    ///
    /// [`Unroutable`], as [`Decoder::decode`].
    pub fn needed(&self, cid: &[u8]) -> Result<usize, Unroutable> {
        let config = self.config(cid)?;
        if cid.len() < config.cid_len() {
            return Err(Unroutable::TooShort(config.id()));
        }
        Ok(config.cid_len())
    }

    /// Decodes one connection ID. `cid` may be longer than the connection ID, as it is when it
    /// starts right behind the first octet of a short header.
    ///
    /// # Errors
    ///
    /// [`Unroutable`] says why it names no server.
    pub fn decode(&self, cid: &[u8]) -> Result<Decoded, Unroutable> {
        let config = self.config(cid)?;
        let server_id = config.decode(cid).ok_or(Unroutable::TooShort(config.id()))?;
        Ok(Decoded { config_id: config.id(), server_id })
    }

    /// [`Decoder::decode`] for many connection IDs: `out[n]` becomes what `cids[n]` says.
    ///
    /// # Panics
    ///
    /// When `out` is shorter than `cids`.
    pub fn decode_batch(&self, cids: &[&[u8]], out: &mut [Result<Decoded, Unroutable>]) {
        let out = &mut out[..cids.len()];
        let mut seen = [false; ConfigId::COUNT];
        for (cid, out) in cids.iter().zip(out.iter_mut()) {
            match self.config(cid) {
                Ok(config) => {
                    seen[config.id().index()] = true;
                    *out = Err(Unroutable::TooShort(config.id()));
                }
                Err(unroutable) => *out = Err(unroutable),
            }
        }
        for config in self.configs().filter(|config| seen[config.id().index()]) {
            let mut indices = [0; LANES];
            let mut lanes: [Option<&[u8]>; LANES] = [None; LANES];
            let mut filled = 0;
            for (index, cid) in cids.iter().enumerate() {
                if cid.first().copied().and_then(ConfigId::from_first_octet) != Some(config.id()) {
                    continue;
                }
                indices[filled] = index;
                lanes[filled] = Some(cid);
                filled += 1;
                if filled == LANES {
                    Self::flush(config, &indices, &lanes, out);
                    lanes = [None; LANES];
                    filled = 0;
                }
            }
            if filled == 1 {
                if let Some(server_id) = lanes[0].and_then(|cid| config.decode(cid)) {
                    out[indices[0]] = Ok(Decoded { config_id: config.id(), server_id });
                }
            } else if filled > 0 {
                Self::flush(config, &indices[..filled], &lanes, out);
            }
        }
    }

    fn flush(
        config: &CidConfig,
        indices: &[usize],
        lanes: &[Option<&[u8]>; LANES],
        out: &mut [Result<Decoded, Unroutable>],
    ) {
        for (&index, server_id) in indices.iter().zip(config.decode_lanes(lanes)) {
            if let Some(server_id) = server_id {
                out[index] = Ok(Decoded { config_id: config.id(), server_id });
            }
        }
    }

    fn config(&self, cid: &[u8]) -> Result<&CidConfig, Unroutable> {
        let first = *cid.first().ok_or(Unroutable::Empty)?;
        let id = ConfigId::from_first_octet(first).ok_or(Unroutable::Reserved)?;
        self.configs[id.index()].as_ref().ok_or(Unroutable::UnknownConfig(id))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Key;
    use super::*;
    use proptest::prelude::*;

    fn config(id: u8, server_id_len: usize, nonce_len: usize, key: Option<[u8; 16]>) -> CidConfig {
        CidConfig::new(
            ConfigId::new(id).unwrap(),
            server_id_len,
            nonce_len,
            key.map(Key::new).as_ref(),
        )
        .unwrap()
    }

    fn seven() -> Decoder {
        Decoder::new([
            config(0, 2, 6, None),
            config(1, 2, 6, Some([1; 16])),
            config(2, 8, 8, Some([2; 16])),
            config(3, 9, 9, Some([3; 16])),
            config(4, 10, 5, Some([4; 16])),
            config(5, 1, 4, Some([5; 16])),
            config(6, 15, 4, None),
        ])
    }

    #[test]
    fn req_m08_unroutable_names_its_reason() {
        let decoder = Decoder::new([config(0, 2, 6, None)]);
        let id = |id| ConfigId::new(id).unwrap();
        assert_eq!(decoder.decode(&[]), Err(Unroutable::Empty));
        assert_eq!(decoder.decode(&[0xe8; 9]), Err(Unroutable::Reserved));
        let unknown = Unroutable::UnknownConfig(id(1));
        assert_eq!(decoder.decode(&[0x28; 9]), Err(unknown));
        assert_eq!(unknown.to_string(), "there is no configuration with ID 1");
        assert_eq!(decoder.decode(&[0x08; 8]), Err(Unroutable::TooShort(id(0))));
        assert!(decoder.decode(&[0x08; 9]).is_ok());
        assert!(decoder.decode(&[0x1f; 20]).is_ok(), "the length bits are not looked at");
    }

    #[test]
    fn all_seven_configs_are_alive_at_once() {
        let decoder = seven();
        for config in decoder.configs() {
            let server_id = ServerId::new(&vec![0xab; config.server_id_len()]).unwrap();
            let cid = config.encode(&server_id, &vec![0xcd; config.nonce_len()]).unwrap();
            assert_eq!(decoder.decode(&cid), Ok(Decoded { config_id: config.id(), server_id }));
            assert_eq!(decoder.needed(&cid), Ok(cid.len()));
        }
    }

    proptest! {
        #[test]
        fn a_batch_says_what_each_says_alone(
            cids in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..24), 0..70),
        ) {
            let decoder = seven();
            let slices: Vec<&[u8]> = cids.iter().map(Vec::as_slice).collect();
            let mut out = vec![Err(Unroutable::Empty); slices.len()];
            decoder.decode_batch(&slices, &mut out);
            for (cid, batched) in slices.iter().zip(out) {
                prop_assert_eq!(batched, decoder.decode(cid));
            }
        }
    }
}
