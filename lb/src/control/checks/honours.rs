//! Whether servers honour the tokens of Retries, pure: what connections with a token have come to goes in, what is known
//! of a server comes out, and whether clients of a pool may be sent Retries.

use std::{num::NonZeroU32, time::Duration};

use quic_lb_config::{CertificatePolicy, CheckKind, Handshake, HealthCheck};

/// From one question to a server to the next while it is not known to honour tokens.
pub(crate) const UNKNOWN_EVERY: Duration = Duration::from_secs(2);

/// How long a server may take; one that is busy may take a while.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a server has made of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TokenAnswer {
    /// The connection goes on as it does where the token was honoured.
    Honoured,
    /// Its time is over, says the server.
    Expired,
    /// Its time has not come.
    Future,
    /// It was refused for another reason, or without one, or not looked at.
    Refused,
    /// Nothing that has to do with it.
    Nothing,
}

impl TokenAnswer {
    /// For the log.
    #[must_use]
    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::Honoured => "honoured",
            Self::Expired => "expired",
            Self::Future => "future",
            Self::Refused => "refused",
            Self::Nothing => "nothing",
        }
    }
}

/// Whether a server honours the tokens of Retries, for all that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) enum Honours {
    /// It has not said.
    #[default]
    Unknown,
    /// It does.
    Yes {
        /// Whether it has done otherwise since.
        doubted: bool,
    },
    /// It does not.
    No,
}

impl Honours {
    /// What is known after a token was offered.
    #[must_use]
    pub(crate) fn on_answer(self, answer: TokenAnswer) -> Self {
        match answer {
            TokenAnswer::Honoured => Self::Yes { doubted: false },
            TokenAnswer::Expired | TokenAnswer::Future | TokenAnswer::Refused => match self {
                // It may have been about to end.
                Self::Yes { doubted: false } => Self::Yes { doubted: true },
                Self::Yes { doubted: true } | Self::Unknown | Self::No => Self::No,
            },
            TokenAnswer::Nothing => self,
        }
    }

    /// For the admin interface.
    #[must_use]
    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Yes { .. } => "yes",
            Self::No => "no",
        }
    }
}

/// Whether clients may be sent Retries where the servers that get new connections are these: none of them is known not
/// to honour tokens, and half of them are known to.
pub(crate) fn may_validate(servers: impl Iterator<Item = Honours>) -> bool {
    let (mut all, mut honouring) = (0, 0);
    for honours in servers {
        match honours {
            Honours::No => return false,
            Honours::Yes { .. } => honouring += 1,
            Honours::Unknown => {}
        }
        all += 1;
    }
    honouring > 0 && honouring * 2 >= all
}

/// How such a connection begins: as its checks do, where they begin one.
pub(crate) fn question(check: Option<&HealthCheck>) -> HealthCheck {
    let handshake = match check.map(|check| &check.kind) {
        Some(CheckKind::Quic(handshake) | CheckKind::Http3(handshake, _)) => handshake.clone(),
        Some(CheckKind::VersionNegotiation) | None => Handshake {
            alpn: "h3".to_owned(),
            server_name: None,
            certificate: CertificatePolicy::Ignored,
        },
    };
    // Whose certificate it is shows nothing of tokens.
    let handshake = Handshake { certificate: CertificatePolicy::Ignored, ..handshake };
    HealthCheck {
        kind: CheckKind::Quic(handshake),
        interval: UNKNOWN_EVERY,
        timeout: PATIENCE,
        rise: NonZeroU32::MIN,
        fall: NonZeroU32::MIN,
        port: check.and_then(|check| check.port),
        panic_below: 0,
        slow_start: Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    const UNKNOWN: Honours = Honours::Unknown;
    const YES: Honours = Honours::Yes { doubted: false };
    const DOUBTED: Honours = Honours::Yes { doubted: true };
    const NO: Honours = Honours::No;

    #[test]
    fn every_answer_changes_what_is_known_and_silence_does_not() {
        for before in [UNKNOWN, YES, DOUBTED, NO] {
            assert_eq!(before.on_answer(TokenAnswer::Honoured), YES);
            assert_eq!(before.on_answer(TokenAnswer::Nothing), before);
        }
        for refused in [TokenAnswer::Expired, TokenAnswer::Future, TokenAnswer::Refused] {
            assert_eq!(UNKNOWN.on_answer(refused), NO);
            assert_eq!(YES.on_answer(refused), DOUBTED);
            assert_eq!(DOUBTED.on_answer(refused), NO);
            assert_eq!(NO.on_answer(refused), NO);
        }
    }

    #[test]
    fn half_of_the_servers_have_to_honour_tokens_and_none_may_refuse_them() {
        for (servers, may) in [
            (&[][..], false),
            (&[UNKNOWN], false),
            (&[NO], false),
            (&[YES], true),
            (&[DOUBTED], true),
            (&[YES, UNKNOWN], true),
            (&[YES, UNKNOWN, UNKNOWN], false),
            (&[YES, YES, UNKNOWN], true),
            (&[YES, YES, NO], false),
        ] {
            assert_eq!(may_validate(servers.iter().copied()), may, "{servers:?}");
        }
    }
}
