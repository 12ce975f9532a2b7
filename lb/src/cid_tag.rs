//! What stands for a connection ID of a server where only whether two are the same matters.

/// The last octets of a connection ID: of one that servers make, they are random.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CidTag(u64);

impl CidTag {
    /// Of the whole connection ID.
    #[inline]
    #[must_use]
    pub fn new(cid: &[u8]) -> Self {
        match cid.last_chunk::<8>() {
            Some(last) => Self(u64::from_ne_bytes(*last)),
            None => Self(cid.iter().fold(1, |tag, &octet| tag << 8 | u64::from(octet))),
        }
    }
}
