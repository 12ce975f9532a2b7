//! Any octets decode without panic, alike alone and in a batch; what decodes encodes again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quic::routable::{CidConfig, ConfigId, Decoder, Key, Unroutable};

fuzz_target!(|octets: &[u8]| {
    let Some((lengths, cids)) = octets.split_first_chunk::<14>() else { return };
    let configs = (0..7u8).filter_map(|id| {
        let [server_id, nonce] = [lengths[usize::from(id) * 2], lengths[usize::from(id) * 2 + 1]];
        let key = (nonce & 0x80 != 0).then(|| Key::new([id; 16]));
        let lengths = (usize::from(server_id), usize::from(nonce & 0x7f));
        CidConfig::new(ConfigId::new(id)?, lengths.0, lengths.1, key.as_ref()).ok()
    });
    let decoder = Decoder::new(configs);
    let cids: Vec<&[u8]> = cids.chunks(21).collect();
    let mut batched = vec![Err(Unroutable::Empty); cids.len()];
    decoder.decode_batch(&cids, &mut batched);
    for (cid, batched) in cids.iter().zip(batched) {
        let alone = decoder.decode(cid);
        assert_eq!(alone, batched);
        if let Ok(decoded) = alone {
            let config = decoder.configs().find(|config| config.id() == decoded.config_id).unwrap();
            let made = config.encode(&decoded.server_id, &vec![0; config.nonce_len()]).unwrap();
            assert_eq!(decoder.decode(&made), Ok(decoded));
        }
    }
});
