//! UDP sockets as the data plane wants them: many datagrams per system call, offloads in both
//! directions, traffic class, hop limit and local addresses per datagram, fragmentation refused.
//!
//! [`Socket`] is a descriptor with its options set, [`Receiver`] the memory that datagrams arrive
//! in, [`Sender`] the arrays that a gathered send is described with, [`Poller`] says which socket
//! has something. Nothing here knows QUIC, and nothing allocates after construction. This is
//! the one place where the crate may be unsafe: the batched calls and the control messages
//! have no safe binding.
//!
//! Descriptors are private to a thread that called `unshare_descriptors`, so none of the types
//! that hold one can be sent to another thread.
#![allow(unsafe_code)]

mod channel;
mod confine;
mod descriptors;
mod kernel;
mod marks;
mod poll;
mod receive;
mod send;
#[cfg(test)]
mod tests;

use std::{
    io,
    marker::PhantomData,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
    time::Duration,
};

use libc::c_int;

pub(crate) use channel::Channel;
pub(crate) use confine::{Confined, Execution, confine_thread, keep_memory_private};
pub use descriptors::raise_descriptor_limit;
pub(crate) use descriptors::{Lent, activated, open_descriptors, unshare_descriptors};
use kernel::{Name, check, milliseconds, octets_of};
pub use marks::{HopLimit, Marks, TrafficClass};
pub use poll::{Poller, Ready};
pub use receive::{Peer, Received, Receiver};
pub use send::{Departure, Outgoing, Sender};

/// Messages per system call. Thirty-two already bring most of what batching can bring.
pub const SLOTS: usize = 64;
/// The most datagrams that one offloaded send may carry (the kernel's limit before Linux 6.9).
pub const MAX_SEGMENTS: usize = 64;
/// The most octets that one offloaded send may carry: what fits a packet of 65,535 octets below
/// an IPv6 and a UDP header, which is less than IPv4 allows.
pub const MAX_SEND_LEN: usize = 65_535 - 40 - 8;

/// What a listener may have in flight on either side; the kernel caps it at its own limit.
const LISTENER_BUFFER: c_int = 8 << 20;
/// What an upstream socket may have in flight on either side: several offloaded sends.
const UPSTREAM_BUFFER: c_int = 1 << 20;

/// The time that the calling thread has had of a processor.
pub(crate) fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec, alive for the call.
    let read = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u32::try_from(time.tv_nsec).unwrap_or(0);
    if read == 0 { Duration::new(seconds, nanos) } else { Duration::ZERO }
}

/// A UDP socket with its options set. It never blocks and refuses fragmentation.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    /// The descriptor means something else, or nothing, in another thread.
    stays: PhantomData<*const ()>,
}

/// Whether a listener may share its address with sockets that were bound before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Nobody may have the address yet; sockets bound later may join.
    First,
    /// Joins those that are there (SO_REUSEPORT).
    Join,
}

/// Which addresses a listener on an unspecified address has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Families {
    /// Those of its own family.
    Own,
    /// On `[::]`, also those of IPv4: clients that use it appear with IPv4 addresses.
    Both,
}

/// How the port of an upstream socket is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortUse {
    /// Nobody may have the port (0: any free port) at this address yet.
    Exclusive,
    /// A socket of ours holds the port, connected to another backend.
    Shared,
}

impl Socket {
    /// A socket for datagrams from anyone to `address`.
    ///
    /// # Errors
    ///
    /// Those of socket(2) and bind(2).
    pub fn listener(address: SocketAddr, sharing: Sharing) -> io::Result<Self> {
        Self::listener_of(address, Families::Own, sharing)
    }

    /// As [`Self::listener`], with addresses of these families.
    ///
    /// # Errors
    ///
    /// As for that one.
    pub fn listener_of(
        address: SocketAddr,
        families: Families,
        sharing: Sharing,
    ) -> io::Result<Self> {
        let socket = Self::new(address.ip())?;
        if families == Families::Both {
            socket.set(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 0)?;
            socket.prepare_ipv4()?;
        }
        if sharing == Sharing::Join {
            socket.set(libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
        }
        socket.ask_for_local_addresses(address)?;
        socket.set_buffers(LISTENER_BUFFER);
        socket.bind(address)?;
        if sharing == Sharing::First {
            // Set before the bind it would also have let this socket join a stranger's.
            socket.set(libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
        }
        Ok(socket)
    }

    /// A listener that somebody else has opened and bound; its options are set as those of one of
    /// ours.
    ///
    /// # Errors
    ///
    /// That it is no UDP socket over IP, or has no address; those of fcntl(2) and setsockopt(2).
    pub fn inherited(fd: OwnedFd) -> io::Result<Self> {
        let socket = Self { fd, stays: PhantomData };
        let kind = socket.get(libc::SOL_SOCKET, libc::SO_TYPE)?;
        let protocol = socket.get(libc::SOL_SOCKET, libc::SO_PROTOCOL)?;
        let address = socket.local_address()?;
        if (kind, protocol) != (libc::SOCK_DGRAM, libc::IPPROTO_UDP) || address.port() == 0 {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "not a bound UDP socket"));
        }
        for (read, write, flag) in [
            (libc::F_GETFL, libc::F_SETFL, libc::O_NONBLOCK),
            (libc::F_GETFD, libc::F_SETFD, libc::FD_CLOEXEC),
        ] {
            // SAFETY: no pointers; the results are checked.
            let flags = unsafe { libc::fcntl(socket.raw(), read) };
            check(flags)?;
            // SAFETY: as before.
            check(unsafe { libc::fcntl(socket.raw(), write, flags | flag) })?;
        }
        socket.prepare(address.ip())?;
        if address.is_ipv6() && socket.get(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY)? == 0 {
            socket.prepare_ipv4()?;
        }
        socket.ask_for_local_addresses(address)?;
        socket.set_buffers(LISTENER_BUFFER);
        Ok(socket)
    }

    /// A listener or an upstream socket that another process of this program has opened, with all options set.
    pub(crate) fn taken_over(fd: OwnedFd) -> Self {
        Self { fd, stays: PhantomData }
    }

    /// A socket for datagrams between `local` and `peer` and nobody else.
    ///
    /// # Errors
    ///
    /// Those of socket(2), bind(2) and connect(2).
    pub fn upstream(local: SocketAddr, peer: SocketAddr, port: PortUse) -> io::Result<Self> {
        let socket = Self::new(peer.ip())?;
        if port == PortUse::Shared {
            socket.set(libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        }
        socket.bind(local)?;
        if port == PortUse::Exclusive {
            // Only now: set before the bind it would have let this socket take a port that a
            // stranger holds with the same option.
            socket.set(libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        }
        socket.set_buffers(UPSTREAM_BUFFER);
        socket.connect(peer)?;
        // Until it was connected, the socket was open to everyone.
        while socket.discard_one() {}
        Ok(socket)
    }

    /// The local address that the kernel would send to `peer` from.
    ///
    /// # Errors
    ///
    /// Those of connect(2): above all, that there is no route.
    pub fn source_towards(peer: SocketAddr) -> io::Result<IpAddr> {
        let socket = Self::new(peer.ip())?;
        socket.connect(peer)?;
        Ok(socket.local_address()?.ip())
    }

    /// Where it is bound to.
    ///
    /// # Errors
    ///
    /// Those of getsockname(2).
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        let mut name = Name::EMPTY;
        let mut len = Name::SIZE;
        // SAFETY: the kernel writes at most `len` octets, the size of `name`, which outlives the
        // call; both families that our sockets have fit.
        check(unsafe { libc::getsockname(self.raw(), name.as_mut_ptr(), &raw mut len) })?;
        name.get().ok_or_else(|| io::ErrorKind::Unsupported.into())
    }

    /// Marks all datagrams from here on with `marks`, unless their message says otherwise. Until now
    /// they were marked with those of `before`.
    ///
    /// # Errors
    ///
    /// Those of setsockopt(2).
    pub fn set_marks(&self, ipv6: bool, before: Marks, marks: Marks) -> io::Result<()> {
        let (level, class, hops) = if ipv6 {
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS, libc::IPV6_UNICAST_HOPS)
        } else {
            (libc::IPPROTO_IP, libc::IP_TOS, libc::IP_TTL)
        };
        if marks.class != before.class {
            self.set(level, class, c_int::from(marks.class.octet()))?;
        }
        if marks.hops != before.hops {
            self.set(level, hops, c_int::from(marks.hops.octet()))?;
        }
        Ok(())
    }

    /// Sends one datagram from a connected socket.
    ///
    /// # Errors
    ///
    /// Those of send(2).
    pub fn send(&self, octets: &[u8]) -> io::Result<()> {
        // SAFETY: the kernel reads `octets.len()` octets from a live slice.
        let sent = unsafe {
            libc::send(self.raw(), octets.as_ptr().cast(), octets.len(), libc::MSG_DONTWAIT)
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Waits until something can be sent again, or for `timeout`.
    ///
    /// # Errors
    ///
    /// Those of poll(2).
    pub fn wait_writable(&self, timeout: Duration) -> io::Result<()> {
        let mut poll = libc::pollfd { fd: self.raw(), events: libc::POLLOUT, revents: 0 };
        // SAFETY: one pollfd, alive for the call.
        check(unsafe { libc::poll(&raw mut poll, 1, milliseconds(timeout)) })
    }

    /// Has the kernel refuse all but the shortest datagrams, as it does where a backend cannot be sent to.
    #[cfg(test)]
    pub(crate) fn spoil(&self) {
        // Segments of one octet, of which it takes a hundred or so in a message.
        self.set(libc::SOL_UDP, libc::UDP_SEGMENT, 1).expect("offload");
    }

    fn new(family_of: IpAddr) -> io::Result<Self> {
        let family = match family_of {
            IpAddr::V4(_) => libc::AF_INET,
            IpAddr::V6(_) => libc::AF_INET6,
        };
        let kind = libc::SOCK_DGRAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: no pointers; the result is checked.
        let fd = unsafe { libc::socket(family, kind, 0) };
        check(fd)?;
        // SAFETY: the kernel just gave us this descriptor and nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let socket = Self { fd, stays: PhantomData };
        if family == libc::AF_INET6 {
            socket.set(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)?;
        }
        socket.prepare(family_of)?;
        Ok(socket)
    }

    /// Sets what every socket of ours has.
    fn prepare(&self, family_of: IpAddr) -> io::Result<()> {
        match family_of {
            IpAddr::V4(_) => self.prepare_ipv4()?,
            IpAddr::V6(_) => self.prepare_ipv6()?,
        }
        // A saving, not a need.
        let _ = self.set(libc::SOL_UDP, libc::UDP_GRO, 1);
        Ok(())
    }

    /// Fragmentation is refused without the kernel keeping a path MTU of its own: finding it is up to
    /// client and server, whose probes have to leave as they came.
    fn prepare_ipv4(&self) -> io::Result<()> {
        self.set(libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE)?;
        self.set(libc::IPPROTO_IP, libc::IP_RECVTOS, 1)?;
        self.set(libc::IPPROTO_IP, libc::IP_RECVTTL, 1)
    }

    fn prepare_ipv6(&self) -> io::Result<()> {
        self.set(libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE)?;
        self.set(libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1)?;
        self.set(libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT, 1)
    }

    /// Has a listener on an unspecified address told which address each datagram was sent to.
    fn ask_for_local_addresses(&self, address: SocketAddr) -> io::Result<()> {
        if !address.ip().is_unspecified() {
            return Ok(());
        }
        match address {
            SocketAddr::V4(_) => self.set(libc::IPPROTO_IP, libc::IP_PKTINFO, 1),
            SocketAddr::V6(_) => self.set(libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1),
        }
    }

    /// As much as the kernel grants: more with the privilege to exceed its limit.
    fn set_buffers(&self, octets: c_int) {
        for (forced, polite) in
            [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)]
        {
            if self.set(libc::SOL_SOCKET, forced, octets).is_err() {
                // Smaller buffers lose datagrams in bursts and nothing else.
                let _ = self.set(libc::SOL_SOCKET, polite, octets);
            }
        }
    }

    fn bind(&self, address: SocketAddr) -> io::Result<()> {
        let (name, len) = Name::new(address);
        // SAFETY: `name` holds a socket address of `len` octets.
        check(unsafe { libc::bind(self.raw(), name.as_ptr(), len) })
    }

    fn connect(&self, address: SocketAddr) -> io::Result<()> {
        let (name, len) = Name::new(address);
        // SAFETY: `name` holds a socket address of `len` octets.
        check(unsafe { libc::connect(self.raw(), name.as_ptr(), len) })
    }

    fn set(&self, level: c_int, option: c_int, value: c_int) -> io::Result<()> {
        let len = octets_of::<c_int>();
        // SAFETY: every option set in this module is an int, and `value` outlives the call.
        check(unsafe {
            libc::setsockopt(self.raw(), level, option, (&raw const value).cast(), len)
        })
    }

    /// How many datagrams the kernel had no room for in the buffer of this socket; it begins anew beyond 2^32.
    ///
    /// # Errors
    ///
    /// Those of getsockopt(2).
    pub(crate) fn receive_dropped(&self) -> io::Result<u32> {
        let mut memory = [0_u32; libc::SK_MEMINFO_DROPS as usize + 1];
        let mut len = octets_of::<[u32; libc::SK_MEMINFO_DROPS as usize + 1]>();
        // SAFETY: the kernel writes at most `len` octets into the array, and both outlive the call.
        check(unsafe {
            let memory = memory.as_mut_ptr().cast();
            libc::getsockopt(self.raw(), libc::SOL_SOCKET, libc::SO_MEMINFO, memory, &raw mut len)
        })?;
        Ok(memory[libc::SK_MEMINFO_DROPS as usize])
    }

    fn get(&self, level: c_int, option: c_int) -> io::Result<c_int> {
        let mut value: c_int = 0;
        let mut len = octets_of::<c_int>();
        // SAFETY: every option read in this module is an int; the kernel writes at most `len` octets
        // into `value`, and both outlive the call.
        check(unsafe {
            let value = (&raw mut value).cast();
            libc::getsockopt(self.raw(), level, option, value, &raw mut len)
        })?;
        Ok(value)
    }

    fn discard_one(&self) -> bool {
        // SAFETY: nothing is written through the null pointer, as its length is zero; the
        // datagram is cut to that length.
        let got = unsafe { libc::recv(self.raw(), ptr::null_mut(), 0, libc::MSG_DONTWAIT) };
        got >= 0
    }

    fn raw(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
