//! Ciphers whose keys end with them.

use std::{fmt, ops::Deref};

use aes::cipher::{Key, KeyInit};
use zeroize::optimization_barrier;

/// A cipher that takes the place of its key by another before its memory is given back.
///
/// The crates of ciphers offer that themselves, but for all ciphers of a program: those too that live for one token, or for one packet
/// whose keys everybody knows. They write some seven hundred octets for each, one by one.
#[derive(Clone)]
pub(crate) struct Wiped<C: KeyInit>(C);

impl<C: KeyInit> Wiped<C> {
    /// With `key`, of which the caller has the only other copy.
    pub(crate) fn new(key: &Key<C>) -> Self {
        Self(C::new(key))
    }
}

impl<C: KeyInit> Drop for Wiped<C> {
    fn drop(&mut self) {
        self.0 = C::new(&Key::<C>::default());
        // Nobody reads it any more: the compiler is not to leave it out.
        optimization_barrier(&self.0);
    }
}

impl<C: KeyInit> Deref for Wiped<C> {
    type Target = C;

    fn deref(&self) -> &C {
        &self.0
    }
}

impl<C: KeyInit> fmt::Debug for Wiped<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wiped(masked)")
    }
}
