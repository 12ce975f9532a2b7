//! Versions of QUIC that no Retry is known for.

use quic_lb_config::{Admittance, Retry};

/// Which of them are let through while addresses are being validated.
#[derive(Debug)]
pub(super) struct Versions {
    others: Admittance,
    /// Ascending.
    exceptions: Vec<u32>,
}

impl Versions {
    pub(super) fn new(retry: &Retry) -> Self {
        let mut exceptions = retry.except_versions.clone();
        exceptions.sort_unstable();
        Self { others: retry.other_versions, exceptions }
    }

    pub(super) fn allow(&self, version: u32) -> bool {
        let is_exception = self.exceptions.binary_search(&version).is_ok();
        (self.others == Admittance::Allow) != is_exception
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exceptions_turn_the_rule_around() {
        for (others, listed, unlisted) in
            [(Admittance::Allow, false, true), (Admittance::Deny, true, false)]
        {
            let except_versions = vec![9, 7];
            let versions = Versions::new(&Retry {
                other_versions: others,
                except_versions,
                ..Retry::default()
            });
            assert_eq!([7, 8, 9].map(|v| versions.allow(v)), [listed, unlisted, listed]);
        }
    }
}
