//! What the file can say and this version does not do.
//!
//! Each of these is read and checked like everything else and then refused here, rather than
//! ignored: whoever wrote it relies on it. Lifting one means to delete its lines here and to give
//! [`Config`](crate::checked::Config) the fields that carry it.

use crate::{document::Document, mistake::Mistakes};

/// Reports what this version does not do.
pub(crate) fn refuse(document: &Document, mistakes: &mut Mistakes) {
    let listeners = document.listeners.iter().flat_map(|listeners| &listeners.value.items);
    for routes in listeners.filter_map(|listener| listener.value.routes.here()) {
        let found = "routes by server name or ALPN, which this version does not do yet";
        let expected = "no `routes`: a listener of its own, with its own address, for each pool";
        mistakes.error(&routes.place, found, expected);
    }
}
