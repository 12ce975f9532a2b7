//! What the kernel says instead of sending a datagram to a backend, or of one that it had sent: errors of
//! connect(2), of sending, and of receiving on a socket that is connected to the backend.

use std::io;

/// An error, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// Nobody listens there.
    ConnectionRefused,
    /// The host cannot be reached, or a firewall on the way says so.
    HostUnreachable,
    /// There is no route.
    NetworkUnreachable,
    /// The host is down.
    HostDown,
    /// The link is down.
    NetworkDown,
    /// The local firewall forbids it.
    NotPermitted,
    /// The address is none to send to, or a route forbids it.
    AccessDenied,
    /// The address makes no sense here: one of a link without its link, above all.
    Invalid,
    /// The source address is not, or not any more, one of this host.
    NoSourceAddress,
    /// The host has no such protocol.
    NoProtocol,
    /// The link carries less than the datagram takes.
    TooBig,
    /// The link, or what stands before it, has no room.
    NoBuffers,
    /// There is no memory.
    NoMemory,
    /// The socket has no room.
    WouldBlock,
    /// Anything else.
    Other,
}

impl Refusal {
    /// Every one.
    pub const ALL: [Self; 15] = [
        Self::ConnectionRefused,
        Self::HostUnreachable,
        Self::NetworkUnreachable,
        Self::HostDown,
        Self::NetworkDown,
        Self::NotPermitted,
        Self::AccessDenied,
        Self::Invalid,
        Self::NoSourceAddress,
        Self::NoProtocol,
        Self::TooBig,
        Self::NoBuffers,
        Self::NoMemory,
        Self::WouldBlock,
        Self::Other,
    ];

    /// What `error` says.
    #[must_use]
    pub fn of(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ECONNREFUSED) => Self::ConnectionRefused,
            Some(libc::EHOSTUNREACH) => Self::HostUnreachable,
            Some(libc::ENETUNREACH) => Self::NetworkUnreachable,
            Some(libc::EHOSTDOWN) => Self::HostDown,
            Some(libc::ENETDOWN) => Self::NetworkDown,
            Some(libc::EPERM) => Self::NotPermitted,
            Some(libc::EACCES) => Self::AccessDenied,
            Some(libc::EINVAL) => Self::Invalid,
            Some(libc::EADDRNOTAVAIL) => Self::NoSourceAddress,
            Some(libc::ENOPROTOOPT) => Self::NoProtocol,
            Some(libc::EMSGSIZE) => Self::TooBig,
            Some(libc::ENOBUFS) => Self::NoBuffers,
            Some(libc::ENOMEM) => Self::NoMemory,
            Some(libc::EAGAIN) => Self::WouldBlock,
            _ => Self::Other,
        }
    }

    /// Whether it says that the backend cannot be sent to, whatever the datagram and the moment.
    #[must_use]
    pub const fn is_about_backend(self) -> bool {
        match self {
            Self::ConnectionRefused
            | Self::HostUnreachable
            | Self::NetworkUnreachable
            | Self::HostDown
            | Self::NetworkDown
            | Self::NotPermitted
            | Self::AccessDenied
            | Self::Invalid
            | Self::NoSourceAddress
            | Self::NoProtocol => true,
            Self::TooBig | Self::NoBuffers | Self::NoMemory | Self::WouldBlock | Self::Other => {
                false
            }
        }
    }

    /// The metric label: the name that manuals call it by.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::ConnectionRefused => "ECONNREFUSED",
            Self::HostUnreachable => "EHOSTUNREACH",
            Self::NetworkUnreachable => "ENETUNREACH",
            Self::HostDown => "EHOSTDOWN",
            Self::NetworkDown => "ENETDOWN",
            Self::NotPermitted => "EPERM",
            Self::AccessDenied => "EACCES",
            Self::Invalid => "EINVAL",
            Self::NoSourceAddress => "EADDRNOTAVAIL",
            Self::NoProtocol => "ENOPROTOOPT",
            Self::TooBig => "EMSGSIZE",
            Self::NoBuffers => "ENOBUFS",
            Self::NoMemory => "ENOMEM",
            Self::WouldBlock => "EAGAIN",
            Self::Other => "other",
        }
    }
}

/// How often each was said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Refusals([u64; Refusal::ALL.len()]);

impl Refusals {
    /// Adds `n` of one.
    pub fn add(&mut self, refusal: Refusal, n: u64) {
        self.0[refusal as usize] += n;
    }

    /// Whether one was said.
    #[must_use]
    pub const fn has(&self, refusal: Refusal) -> bool {
        self.0[refusal as usize] > 0
    }

    /// Those that were said at all, in the order of [`Refusal::ALL`].
    pub fn iter(&self) -> impl Iterator<Item = (Refusal, u64)> + use<> {
        Refusal::ALL.into_iter().zip(self.0).filter(|(_, n)| *n > 0)
    }

    /// All of them.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Those that say that the backend cannot be sent to.
    pub fn about_backend(&self) -> impl Iterator<Item = (Refusal, u64)> + use<> {
        self.iter().filter(|(refusal, _)| refusal.is_about_backend())
    }

    /// What has been added since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self(std::array::from_fn(|at| self.0[at].saturating_sub(earlier.0[at])))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_refusal_has_a_name_and_is_read_from_the_error_of_that_name() {
        let errors = [
            (libc::ECONNREFUSED, "ECONNREFUSED", true),
            (libc::EHOSTUNREACH, "EHOSTUNREACH", true),
            (libc::ENETUNREACH, "ENETUNREACH", true),
            (libc::EHOSTDOWN, "EHOSTDOWN", true),
            (libc::ENETDOWN, "ENETDOWN", true),
            (libc::EPERM, "EPERM", true),
            (libc::EACCES, "EACCES", true),
            (libc::EINVAL, "EINVAL", true),
            (libc::EADDRNOTAVAIL, "EADDRNOTAVAIL", true),
            (libc::ENOPROTOOPT, "ENOPROTOOPT", true),
            (libc::EMSGSIZE, "EMSGSIZE", false),
            (libc::ENOBUFS, "ENOBUFS", false),
            (libc::ENOMEM, "ENOMEM", false),
            (libc::EAGAIN, "EAGAIN", false),
            (libc::EIO, "other", false),
        ];
        let mut seen = BTreeSet::new();
        for (number, name, about_backend) in errors {
            let refusal = Refusal::of(&io::Error::from_raw_os_error(number));
            assert_eq!((refusal.label(), refusal.is_about_backend()), (name, about_backend));
            seen.insert(refusal as usize);
        }
        assert_eq!(seen, (0..Refusal::ALL.len()).collect());
        assert!(Refusal::ALL.iter().enumerate().all(|(at, refusal)| *refusal as usize == at));
    }

    #[test]
    fn refusals_add_up_and_are_told_apart() {
        let mut refusals = Refusals::default();
        refusals.add(Refusal::NoBuffers, 5);
        let before = refusals;
        refusals.add(Refusal::NotPermitted, 2);
        refusals.add(Refusal::ConnectionRefused, 1);
        let about: Vec<_> = refusals.about_backend().collect();
        assert_eq!(about, [(Refusal::ConnectionRefused, 1), (Refusal::NotPermitted, 2)]);
        assert!(refusals.has(Refusal::NotPermitted) && !refusals.has(Refusal::Invalid));
        assert_eq!((refusals.total(), refusals.since(&before).total()), (8, 3));
        assert_eq!(before.since(&refusals), Refusals::default());
    }
}
