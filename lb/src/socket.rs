//! UDP sockets as the data plane wants them: many datagrams per system call, offloads in both
//! directions, ECN and local addresses per datagram, fragmentation refused.
//!
//! [`Socket`] is a descriptor with its options set, [`Receiver`] the memory that datagrams arrive
//! in, [`Sender`] the arrays that a gathered send is described with, [`Poller`] says which socket
//! has something. Nothing here knows QUIC, and nothing allocates after construction. This is one
//! of the two places where the crate may be unsafe: the batched calls and the control messages
//! have no safe binding.
//!
//! Descriptors are private to a thread that called `unshare_descriptors`, so none of the types
//! that hold one can be sent to another thread.
#![allow(unsafe_code)]

use std::{
    io,
    marker::PhantomData,
    mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    ops::Range,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    ptr,
    time::Duration,
};

use libc::{c_int, c_void};

/// Messages per system call. Thirty-two already bring most of what batching can bring.
pub const SLOTS: usize = 64;
/// The most datagrams that one offloaded send may carry (the kernel's limit before Linux 6.9).
pub const MAX_SEGMENTS: usize = 64;
/// The most octets that one offloaded send may carry: what fits a packet of 65,535 octets below
/// an IPv6 and a UDP header, which is less than IPv4 allows.
pub const MAX_SEND_LEN: usize = 65_535 - 40 - 8;

/// The most pieces of memory that the messages of one send may be gathered from (the kernel
/// takes 1,024 per message).
const MAX_PARTS: usize = 1_024;
/// The most octets that arrive as one message: the length fields of UDP and IP have 16 bits.
const SLOT_LEN: usize = 65_536;
/// From one slot to the next. With a power of two the first octets of all slots would compete for
/// the same few lines of the L1 cache; nineteen lines, 1,216 octets, spread them.
const SLOT_STRIDE: usize = SLOT_LEN + 19 * 64;
/// What a listener may have in flight on either side; the kernel caps it at its own limit.
const LISTENER_BUFFER: c_int = 8 << 20;
/// What an upstream socket may have in flight on either side: several offloaded sends.
const UPSTREAM_BUFFER: c_int = 1 << 20;

/// The two bits that routers mark congestion with (RFC 3168, section 5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ecn(u8);

impl Ecn {
    /// Not ECN-capable transport.
    pub const NOT_ECT: Self = Self(0b00);
    /// ECN-capable transport, the second codepoint.
    pub const ECT_1: Self = Self(0b01);
    /// ECN-capable transport, the first codepoint.
    pub const ECT_0: Self = Self(0b10);
    /// Congestion experienced.
    pub const CE: Self = Self(0b11);

    const fn from_traffic_class(octet: u8) -> Self {
        Self(octet & 0b11)
    }
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
        let socket = Self::new(address.ip())?;
        if sharing == Sharing::Join {
            socket.set(libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
        }
        if address.ip().is_unspecified() {
            match address {
                SocketAddr::V4(_) => socket.set(libc::IPPROTO_IP, libc::IP_PKTINFO, 1)?,
                SocketAddr::V6(_) => socket.set(libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1)?,
            }
        }
        socket.set_buffers(LISTENER_BUFFER);
        socket.bind(address)?;
        if sharing == Sharing::First {
            // Set before the bind it would also have let this socket join a stranger's.
            socket.set(libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
        }
        Ok(socket)
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

    /// Marks all datagrams from here on, unless their message says otherwise.
    ///
    /// # Errors
    ///
    /// Those of setsockopt(2).
    pub fn set_ecn(&self, ipv6: bool, ecn: Ecn) -> io::Result<()> {
        if ipv6 {
            self.set(libc::IPPROTO_IPV6, libc::IPV6_TCLASS, c_int::from(ecn.0))
        } else {
            self.set(libc::IPPROTO_IP, libc::IP_TOS, c_int::from(ecn.0))
        }
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

    /// Waits until something can be sent again, or for `patience`.
    ///
    /// # Errors
    ///
    /// Those of poll(2).
    pub fn wait_writable(&self, patience: Duration) -> io::Result<()> {
        let mut poll = libc::pollfd { fd: self.raw(), events: libc::POLLOUT, revents: 0 };
        // SAFETY: one pollfd, alive for the call.
        check(unsafe { libc::poll(&raw mut poll, 1, milliseconds(patience)) })
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
        // Fragmentation is refused without the kernel keeping a path MTU of its own: finding it
        // is up to client and server, whose probes have to leave as they came.
        if family == libc::AF_INET {
            let probe = libc::IP_PMTUDISC_PROBE;
            socket.set(libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, probe)?;
            socket.set(libc::IPPROTO_IP, libc::IP_RECVTOS, 1)?;
        } else {
            let probe = libc::IPV6_PMTUDISC_PROBE;
            socket.set(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)?;
            socket.set(libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, probe)?;
            socket.set(libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1)?;
        }
        // A saving, not a need.
        let _ = socket.set(libc::SOL_UDP, libc::UDP_GRO, 1);
        Ok(socket)
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

/// One message as it arrived: a datagram, or several of one sender that the kernel joined.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// Who sent it; unspecified on a connected socket, where it is known.
    pub from: SocketAddr,
    /// Where it was sent to, on a socket bound to an unspecified address.
    pub local: Option<IpAddr>,
    /// How it was marked.
    pub ecn: Ecn,
    /// Its octets.
    pub len: usize,
    /// The octets of each of its datagrams; the last may have fewer. At least 1.
    pub segment: usize,
}

impl Received {
    const NOTHING: Self = Self {
        from: SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0)),
        local: None,
        ecn: Ecn::NOT_ECT,
        len: 0,
        segment: 1,
    };

    /// The datagrams in it. One without octets is one.
    #[must_use]
    pub fn datagrams(&self) -> usize {
        self.len.div_ceil(self.segment).max(1)
    }
}

/// Memory for [`SLOTS`] messages of any length, and what the kernel says about each.
pub struct Receiver {
    octets: Box<[u8]>,
    received: Box<[Received; SLOTS]>,
    names: Box<[Name; SLOTS]>,
    controls: Box<[Control; SLOTS]>,
    parts: Box<[libc::iovec; SLOTS]>,
    headers: Box<[libc::mmsghdr; SLOTS]>,
}

/// Whether the sender of a message is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// It is the one that the socket is connected to.
    Known,
    /// It is anyone.
    Asked,
}

impl Default for Receiver {
    fn default() -> Self {
        Self::new()
    }
}

impl Receiver {
    /// Memory is taken from the system as slots are used: 64 KiB for those that see joined
    /// datagrams, a page for the others.
    #[must_use]
    pub fn new() -> Self {
        Self {
            octets: vec![0; SLOTS * SLOT_STRIDE].into_boxed_slice(),
            received: Box::new([Received::NOTHING; SLOTS]),
            names: Box::new([Name::EMPTY; SLOTS]),
            controls: Box::new([Control::EMPTY; SLOTS]),
            parts: Box::new([NO_PART; SLOTS]),
            headers: Box::new([no_header(); SLOTS]),
        }
    }

    /// Fills `slots` in order with the messages that wait at `socket`; says how many there were,
    /// which is zero when none waited.
    ///
    /// # Errors
    ///
    /// Those of recvmmsg(2) other than that nothing waits; on a connected socket also what became
    /// of earlier sends.
    ///
    /// # Panics
    ///
    /// When there are no such slots.
    pub fn receive(
        &mut self,
        socket: &Socket,
        slots: Range<usize>,
        peer: Peer,
    ) -> io::Result<usize> {
        let octets = self.octets[slots.start * SLOT_STRIDE..slots.end * SLOT_STRIDE].as_mut_ptr();
        let names = self.names[slots.clone()].as_mut_ptr();
        let controls = self.controls[slots.clone()].as_mut_ptr();
        let parts = self.parts[slots.clone()].as_mut_ptr();
        let headers = &mut self.headers[slots.clone()];
        for (at, header) in headers.iter_mut().enumerate() {
            let header = &mut header.msg_hdr;
            // SAFETY: `at` counts the slots in the range, and each of the four pointers is to
            // that many elements (strides, for the octets). The part is written, not read.
            unsafe {
                let octets = octets.add(at * SLOT_STRIDE).cast();
                parts.add(at).write(libc::iovec { iov_base: octets, iov_len: SLOT_LEN });
                header.msg_iov = parts.add(at);
                header.msg_control = controls.add(at).cast();
                header.msg_name = match peer {
                    Peer::Known => ptr::null_mut(),
                    Peer::Asked => names.add(at).cast(),
                };
            }
            header.msg_namelen = Name::SIZE;
            header.msg_iovlen = 1;
            header.msg_controllen = size_of::<Control>();
        }
        #[expect(clippy::cast_possible_truncation, reason = "at most SLOTS")]
        let count = headers.len() as u32;
        // SAFETY: the kernel writes to the `count` headers, and to the names, control buffers and
        // octets that they point at, each as long as stated. All of it is owned by `self`, which
        // is borrowed mutably, and none of it is touched between here and there.
        let got = unsafe {
            let none = ptr::null_mut();
            libc::recvmmsg(socket.raw(), headers.as_mut_ptr(), count, libc::MSG_DONTWAIT, none)
        };
        let Ok(got) = usize::try_from(got) else {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::WouldBlock { Ok(0) } else { Err(error) };
        };
        for slot in slots.take(got) {
            self.received[slot] = self.describe(slot, peer);
        }
        Ok(got)
    }

    /// What is known about the message in `slot`, which the last [`Receiver::receive`] filled.
    ///
    /// # Panics
    ///
    /// When there is no such slot.
    #[must_use]
    pub fn received(&self, slot: usize) -> &Received {
        &self.received[slot]
    }

    /// Octets of `slot`.
    ///
    /// # Panics
    ///
    /// When there are no such octets.
    #[must_use]
    pub fn octets(&self, slot: usize, range: Range<usize>) -> &[u8] {
        let start = slot * SLOT_STRIDE;
        &self.octets[start..start + SLOT_LEN][range]
    }

    fn describe(&self, slot: usize, peer: Peer) -> Received {
        let header = &self.headers[slot];
        let len = (header.msg_len as usize).min(SLOT_LEN);
        let mut received = Received { len, segment: len.max(1), ..Received::NOTHING };
        if peer == Peer::Asked
            && let Some(from) = self.names[slot].get()
        {
            received.from = from;
        }
        // The kernel left the pointer to the control buffer as it was and set the length to what
        // it wrote, so the header describes the buffer of this slot and nothing else.
        let header = &header.msg_hdr;
        // SAFETY: the walk stays within `msg_controllen` octets of the control buffer, all
        // written by the kernel, whose records are aligned; payloads are read unaligned, each no
        // longer than the record's own length says.
        unsafe {
            let mut record = libc::CMSG_FIRSTHDR(header);
            while let Some(found) = record.as_ref() {
                let data = libc::CMSG_DATA(record);
                let data_len = found.cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
                match (found.cmsg_level, found.cmsg_type) {
                    (libc::IPPROTO_IP, libc::IP_TOS) if data_len >= 1 => {
                        received.ecn = Ecn::from_traffic_class(data.read());
                    }
                    (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                        if let Some(class) = read::<c_int>(data, data_len) {
                            received.ecn = Ecn::from_traffic_class(class.to_le_bytes()[0]);
                        }
                    }
                    (libc::SOL_UDP, libc::UDP_GRO) => {
                        let segment = read::<c_int>(data, data_len)
                            .and_then(|segment| usize::try_from(segment).ok());
                        if let Some(segment) = segment.filter(|segment| *segment > 0) {
                            received.segment = segment;
                        }
                    }
                    (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                        received.local = read::<libc::in_pktinfo>(data, data_len)
                            .map(|info| IpAddr::V4(from_in_addr(info.ipi_spec_dst)));
                    }
                    (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                        received.local = read::<libc::in6_pktinfo>(data, data_len)
                            .map(|info| IpAddr::V6(Ipv6Addr::from(info.ipi6_addr.s6_addr)));
                    }
                    _ => {}
                }
                record = libc::CMSG_NXTHDR(header, record);
            }
        }
        received
    }
}

/// Arrays that sends are described with.
pub struct Sender {
    names: Box<[Name; SLOTS]>,
    controls: Box<[Control; SLOTS]>,
    parts: Box<[libc::iovec; MAX_PARTS]>,
    headers: Box<[libc::mmsghdr; SLOTS]>,
}

/// How a message leaves.
#[derive(Clone, Copy, Debug)]
pub struct Departure {
    /// Where to; `None` on a connected socket.
    pub to: Option<SocketAddr>,
    /// Which of the local addresses it leaves from; `None` for the one that the socket has.
    pub from: Option<IpAddr>,
    /// How it is marked; `None` for the mark that the socket has.
    pub ecn: Option<Ecn>,
    /// The octets of each datagram, if the message holds several.
    pub segment: Option<u16>,
    /// Whether the socket's family is IPv6.
    pub ipv6: bool,
}

impl Default for Sender {
    fn default() -> Self {
        Self::new()
    }
}

impl Sender {
    /// Room for [`SLOTS`] messages.
    #[must_use]
    pub fn new() -> Self {
        Self {
            names: Box::new([Name::EMPTY; SLOTS]),
            controls: Box::new([Control::EMPTY; SLOTS]),
            parts: Box::new([NO_PART; MAX_PARTS]),
            headers: Box::new([no_header(); SLOTS]),
        }
    }

    /// Starts to describe a send of octets that live for `'data`.
    pub fn compose<'data>(&mut self) -> Outgoing<'_, 'data> {
        Outgoing { arrays: self, messages: 0, parts: 0, data: PhantomData }
    }
}

/// Messages that leave with as few system calls as can be.
pub struct Outgoing<'sender, 'data> {
    arrays: &'sender mut Sender,
    messages: usize,
    parts: usize,
    data: PhantomData<&'data [u8]>,
}

impl<'data> Outgoing<'_, 'data> {
    /// How many messages were pushed.
    #[must_use]
    pub fn len(&self) -> usize {
        self.messages
    }

    /// Whether none was pushed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.messages == 0
    }

    /// Whether a message of `parts` pieces still fits.
    #[must_use]
    pub fn has_room(&self, parts: usize) -> bool {
        self.messages < SLOTS && self.parts + parts <= MAX_PARTS
    }

    /// Adds a message whose octets are those of `parts`, one after the other.
    ///
    /// # Panics
    ///
    /// When there is no room.
    pub fn push(&mut self, departure: &Departure, parts: impl IntoIterator<Item = &'data [u8]>) {
        let Sender { names, controls, parts: part_array, headers } = &mut *self.arrays;
        let header = &mut headers[self.messages].msg_hdr;
        header.msg_namelen = 0;
        if let Some(to) = departure.to {
            let (name, len) = Name::new(to);
            names[self.messages] = name;
            header.msg_namelen = len;
        }
        header.msg_controllen = departure.write(&mut controls[self.messages]);
        let first_part = self.parts;
        for part in parts {
            part_array[self.parts] =
                libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() };
            self.parts += 1;
        }
        header.msg_iovlen = self.parts - first_part;
        self.messages += 1;
    }

    /// Sends the messages from number `first` on, and says how many of them left: at least one,
    /// and fewer than there are if the next one was refused.
    ///
    /// # Errors
    ///
    /// Those of sendmmsg(2): why message `first` was refused.
    ///
    /// # Panics
    ///
    /// When there is no message `first`.
    pub fn send(&mut self, socket: &Socket, first: usize) -> io::Result<usize> {
        let Sender { names, controls, parts, headers } = &mut *self.arrays;
        let headers = &mut headers[..self.messages];
        let (names, controls) = (names.as_mut_ptr(), controls.as_mut_ptr());
        let mut part = parts.as_mut_ptr();
        for (at, header) in headers.iter_mut().enumerate() {
            let header = &mut header.msg_hdr;
            // SAFETY: `at` is below SLOTS, the length of both arrays; the counts of parts were
            // taken while they were written, one after the other from the start of theirs.
            unsafe {
                header.msg_iov = part;
                part = part.add(header.msg_iovlen);
                let named = header.msg_namelen > 0;
                header.msg_name = if named { names.add(at).cast() } else { ptr::null_mut() };
                let controlled = header.msg_controllen > 0;
                header.msg_control =
                    if controlled { controls.add(at).cast() } else { ptr::null_mut() };
            }
        }
        let headers = &mut headers[first..];
        assert!(!headers.is_empty(), "a message to send");
        #[expect(clippy::cast_possible_truncation, reason = "at most SLOTS")]
        let count = headers.len() as u32;
        // SAFETY: the headers point into arrays that `self` borrows mutably; the parts point at
        // slices borrowed for 'data, which outlives `self`, and the kernel only reads them. It
        // writes the number of octets sent into the headers.
        let sent = unsafe {
            libc::sendmmsg(socket.raw(), headers.as_mut_ptr(), count, libc::MSG_DONTWAIT)
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }
}

impl Departure {
    /// Writes what the kernel has to be told; says how many octets that took.
    fn write(&self, control: &mut Control) -> usize {
        let mut at = 0;
        if let Some(segment) = self.segment {
            control.push(&mut at, libc::SOL_UDP, libc::UDP_SEGMENT, segment);
        }
        if let Some(Ecn(ecn)) = self.ecn {
            let (level, kind) = if self.ipv6 {
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS)
            } else {
                (libc::IPPROTO_IP, libc::IP_TOS)
            };
            control.push(&mut at, level, kind, c_int::from(ecn));
        }
        match self.from {
            Some(IpAddr::V4(address)) => {
                let info = libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: libc::in_addr { s_addr: u32::from(address).to_be() },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                };
                control.push(&mut at, libc::IPPROTO_IP, libc::IP_PKTINFO, info);
            }
            Some(IpAddr::V6(address)) => {
                // A link-local address means nothing without its link, which is the client's.
                let link = match self.to {
                    Some(SocketAddr::V6(to)) if address.is_unicast_link_local() => to.scope_id(),
                    _ => 0,
                };
                let info = libc::in6_pktinfo {
                    ipi6_addr: libc::in6_addr { s6_addr: address.octets() },
                    ipi6_ifindex: link,
                };
                control.push(&mut at, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, info);
            }
            None => {}
        }
        at
    }
}

/// Says which of many sockets have something.
#[derive(Debug)]
pub struct Poller {
    fd: OwnedFd,
    /// As in [`Socket`].
    stays: PhantomData<*const ()>,
}

/// What [`Poller::wait`] found.
pub struct Ready {
    events: Box<[libc::epoll_event]>,
    count: usize,
}

impl Poller {
    /// One that watches nothing.
    ///
    /// # Errors
    ///
    /// Those of epoll_create1(2).
    pub fn new() -> io::Result<Self> {
        // SAFETY: no pointers; the result is checked.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        check(fd)?;
        // SAFETY: the kernel just gave us this descriptor and nobody else has it.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) }, stays: PhantomData })
    }

    /// Reports `socket` as `token` for as long as it is open and has something: datagrams, or
    /// news of what became of earlier ones.
    ///
    /// # Errors
    ///
    /// Those of epoll_ctl(2).
    pub fn watch(&self, socket: &Socket, token: u64) -> io::Result<()> {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: token };
        let (poller, socket) = (self.fd.as_raw_fd(), socket.raw());
        // SAFETY: the kernel reads one event, alive for the call.
        check(unsafe { libc::epoll_ctl(poller, libc::EPOLL_CTL_ADD, socket, &raw mut event) })
    }

    /// Waits until a socket has something, or for `patience`.
    ///
    /// # Errors
    ///
    /// Those of epoll_wait(2) other than an interruption.
    pub fn wait(&self, ready: &mut Ready, patience: Duration) -> io::Result<()> {
        let room = c_int::try_from(ready.events.len()).unwrap_or(c_int::MAX);
        let events = ready.events.as_mut_ptr();
        // SAFETY: the kernel writes at most `room` events, the length of the array.
        let found =
            unsafe { libc::epoll_wait(self.fd.as_raw_fd(), events, room, milliseconds(patience)) };
        let found = check(found).map(|()| found);
        ready.count = match found {
            Ok(found) => usize::try_from(found).unwrap_or(0),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        Ok(())
    }
}

impl Ready {
    /// Room for `limit` sockets.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { events: vec![libc::epoll_event { events: 0, u64: 0 }; limit].into(), count: 0 }
    }

    /// How many sockets were found.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether none was found.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether there may have been more than there was room for.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.count == self.events.len()
    }

    /// The token that socket number `at` is watched under.
    ///
    /// # Panics
    ///
    /// When fewer were found.
    #[must_use]
    pub fn token(&self, at: usize) -> u64 {
        self.events[..self.count][at].u64
    }
}

/// Gives the calling thread a descriptor table of its own, empty but for standard input, output
/// and error. A table with a single user is read without locked instructions, and the limit on
/// descriptors holds for each table by itself.
///
/// Descriptors opened before mean nothing to this thread afterwards, and the other way round.
///
/// # Errors
///
/// Those of close_range(2).
pub(crate) fn unshare_descriptors() -> io::Result<()> {
    let first: libc::c_uint = 3;
    // SAFETY: only descriptors of the new table are closed, and no value that owns a descriptor
    // has reached this thread: the types here are not `Send`, and this is called first thing.
    let done = unsafe {
        libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_UNSHARE)
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Raises the number of descriptors that a table may hold as far as the system allows, and says
/// how far that is.
///
/// # Errors
///
/// Those of getrlimit(2) and setrlimit(2).
pub fn raise_descriptor_limit() -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one structure, alive for the call.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    if limit.rlim_cur < limit.rlim_max {
        limit.rlim_cur = limit.rlim_max;
        // SAFETY: the kernel reads one structure, alive for the call.
        check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) })?;
    }
    Ok(limit.rlim_cur)
}

/// A socket address as the kernel has it.
#[derive(Clone, Copy)]
#[repr(C)]
union Name {
    family: libc::sa_family_t,
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl Name {
    const SIZE: libc::socklen_t = octets_of::<Self>();
    const EMPTY: Self = Self {
        v6: libc::sockaddr_in6 {
            sin6_family: 0,
            sin6_port: 0,
            sin6_flowinfo: 0,
            sin6_addr: libc::in6_addr { s6_addr: [0; 16] },
            sin6_scope_id: 0,
        },
    };

    #[expect(clippy::cast_possible_truncation, reason = "address families are below 64")]
    fn new(address: SocketAddr) -> (Self, libc::socklen_t) {
        let mut name = Self::EMPTY;
        match address {
            SocketAddr::V4(address) => {
                name.v4 = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: address.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from(*address.ip()).to_be() },
                    sin_zero: [0; 8],
                };
                (name, octets_of::<libc::sockaddr_in>())
            }
            SocketAddr::V6(address) => {
                name.v6 = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: address.port().to_be(),
                    sin6_flowinfo: address.flowinfo(),
                    sin6_addr: libc::in6_addr { s6_addr: address.ip().octets() },
                    sin6_scope_id: address.scope_id(),
                };
                (name, octets_of::<libc::sockaddr_in6>())
            }
        }
    }

    fn get(&self) -> Option<SocketAddr> {
        // SAFETY: all octets of the union are initialised from its construction on, and every
        // pattern of them is a valid value of each of its fields.
        unsafe {
            match c_int::from(self.family) {
                libc::AF_INET => Some(SocketAddr::V4(SocketAddrV4::new(
                    from_in_addr(self.v4.sin_addr),
                    u16::from_be(self.v4.sin_port),
                ))),
                // The flow label is the sender's own matter and would make one client look
                // like several.
                libc::AF_INET6 => Some(SocketAddr::V6(SocketAddrV6::new(
                    Ipv6Addr::from(self.v6.sin6_addr.s6_addr),
                    u16::from_be(self.v6.sin6_port),
                    0,
                    self.v6.sin6_scope_id,
                ))),
                _ => None,
            }
        }
    }

    const fn as_ptr(&self) -> *const libc::sockaddr {
        (&raw const *self).cast()
    }

    const fn as_mut_ptr(&mut self) -> *mut libc::sockaddr {
        (&raw mut *self).cast()
    }
}

/// Room for the control messages of one message, aligned as the kernel wants them: ECN, segment
/// length and packet information take at most 88 octets.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; 96]);

impl Control {
    const EMPTY: Self = Self([0; 96]);

    /// Appends a control message at `at`.
    fn push<T: Copy>(&mut self, at: &mut usize, level: c_int, kind: c_int, value: T) {
        let value_len = octets_of::<T>();
        // SAFETY: these two only calculate.
        let (space, len) = unsafe { (libc::CMSG_SPACE(value_len), libc::CMSG_LEN(value_len)) };
        let room = &mut self.0[*at..*at + space as usize];
        let record = room.as_mut_ptr().cast::<libc::cmsghdr>();
        // SAFETY: `room` has CMSG_SPACE octets and starts at a multiple of eight, as the buffer
        // is aligned so and every CMSG_SPACE is one, so header and value fit and the header is
        // aligned; the value is written unaligned.
        unsafe {
            (*record).cmsg_len = len as usize;
            (*record).cmsg_level = level;
            (*record).cmsg_type = kind;
            libc::CMSG_DATA(record).cast::<T>().write_unaligned(value);
        }
        *at += space as usize;
    }
}

const NO_PART: libc::iovec = libc::iovec { iov_base: ptr::null_mut::<c_void>(), iov_len: 0 };

fn no_header() -> libc::mmsghdr {
    // SAFETY: a C structure of integers and pointers, for which zero is a valid value; it may
    // have padding that cannot be named.
    unsafe { mem::zeroed() }
}

/// The value at `data`, if its `len` octets hold one.
///
/// # Safety
///
/// `len` octets from `data` on can be read, and every pattern of octets is a valid `T`.
unsafe fn read<T: Copy>(data: *const u8, len: usize) -> Option<T> {
    // SAFETY: as the caller promises, after the check of the length.
    (len >= size_of::<T>()).then(|| unsafe { data.cast::<T>().read_unaligned() })
}

fn from_in_addr(address: libc::in_addr) -> Ipv4Addr {
    Ipv4Addr::from(u32::from_be(address.s_addr))
}

#[expect(clippy::cast_possible_truncation, reason = "sizes of small structures")]
const fn octets_of<T>() -> u32 {
    size_of::<T>() as u32
}

/// Rounded up, so that a short wait is not a busy one.
fn milliseconds(duration: Duration) -> c_int {
    c_int::try_from(duration.as_nanos().div_ceil(1_000_000)).unwrap_or(c_int::MAX)
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANY_V4: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0));
    const ANY_V6: SocketAddr = SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::LOCALHOST, 0, 0, 0));

    fn listener(address: SocketAddr) -> (Socket, SocketAddr) {
        let socket = Socket::listener(address, Sharing::First).unwrap();
        let address = socket.local_address().unwrap();
        (socket, address)
    }

    fn towards(peer: SocketAddr) -> Socket {
        let local = SocketAddr::new(Socket::source_towards(peer).unwrap(), 0);
        Socket::upstream(local, peer, PortUse::Exclusive).unwrap()
    }

    fn to_peer(peer: SocketAddr) -> Departure {
        Departure { to: None, from: None, ecn: None, segment: None, ipv6: peer.is_ipv6() }
    }

    fn receive(receiver: &mut Receiver, socket: &Socket) -> Vec<Received> {
        let got = receiver.receive(socket, 0..SLOTS, Peer::Asked).unwrap();
        (0..got).map(|slot| *receiver.received(slot)).collect()
    }

    #[test]
    fn joined_datagrams_keep_their_boundaries_in_both_families() {
        for address in [ANY_V4, ANY_V6] {
            let (listener, address) = listener(address);
            let upstream = towards(address);
            let octets: Vec<u8> = (0..=255).cycle().take(10 * 1_200 + 300).collect();
            let mut sender = Sender::new();
            let mut outgoing = sender.compose();
            outgoing.push(
                &Departure { segment: Some(1_200), ..to_peer(address) },
                [&octets[..5_000], &octets[5_000..]],
            );
            assert_eq!(outgoing.send(&upstream, 0).unwrap(), 1);
            let mut receiver = Receiver::new();
            let mut arrived = Vec::new();
            let mut lengths = Vec::new();
            for (slot, received) in receive(&mut receiver, &listener).into_iter().enumerate() {
                assert_eq!(received.from, upstream.local_address().unwrap());
                assert_eq!(received.local, None);
                let message = receiver.octets(slot, 0..received.len);
                assert_eq!(message.chunks(received.segment).len(), received.datagrams());
                lengths.extend(message.chunks(received.segment).map(<[u8]>::len));
                arrived.extend_from_slice(message);
            }
            assert_eq!(lengths, [[1_200; 10].as_slice(), &[300]].concat());
            assert!(arrived == octets, "the octets changed");
        }
    }

    #[test]
    fn several_messages_leave_and_arrive_in_order_with_their_own_names() {
        let (listener, address) = listener(ANY_V4);
        let (sink, sink_address) = self::listener(ANY_V4);
        let mut sender = Sender::new();
        let mut outgoing = sender.compose();
        let bodies: Vec<[u8; 1]> = (0..10).map(|n| [n]).collect();
        for (n, body) in bodies.iter().enumerate() {
            let to = if n % 2 == 0 { sink_address } else { address };
            outgoing.push(&Departure { to: Some(to), ..to_peer(to) }, [body.as_slice()]);
        }
        let mut sent = 0;
        while sent < outgoing.len() {
            sent += outgoing.send(&listener, sent).unwrap();
        }
        let mut receiver = Receiver::new();
        let got: Vec<u8> = (0..receive(&mut receiver, &sink).len())
            .map(|slot| receiver.octets(slot, 0..1)[0])
            .collect();
        assert_eq!(got, [0, 2, 4, 6, 8]);
        assert_eq!(receive(&mut receiver, &listener).len(), 5);
        assert_eq!(receive(&mut receiver, &listener).len(), 0);
    }

    #[test]
    fn datagrams_without_octets_are_datagrams() {
        let (listener, address) = listener(ANY_V4);
        let upstream = towards(address);
        upstream.send(&[]).unwrap();
        upstream.send(&[1]).unwrap();
        let mut receiver = Receiver::new();
        let received = receive(&mut receiver, &listener);
        assert_eq!(
            received.iter().map(|r| (r.len, r.datagrams())).collect::<Vec<_>>(),
            [(0, 1), (1, 1)]
        );
    }

    #[test]
    fn marks_pass_by_message_and_by_socket_in_both_families() {
        for address in [ANY_V4, ANY_V6] {
            let (listener, address) = listener(address);
            let upstream = towards(address);
            let mut sender = Sender::new();
            let mut outgoing = sender.compose();
            let marks =
                [None, Some(Ecn::ECT_1), Some(Ecn::ECT_0), Some(Ecn::CE), Some(Ecn::NOT_ECT)];
            for ecn in marks {
                outgoing.push(&Departure { ecn, ..to_peer(address) }, [[7].as_slice()]);
            }
            assert_eq!(outgoing.send(&upstream, 0).unwrap(), marks.len());
            upstream.set_ecn(address.is_ipv6(), Ecn::ECT_0).unwrap();
            upstream.send(&[7]).unwrap();
            let mut receiver = Receiver::new();
            let got: Vec<Ecn> = receive(&mut receiver, &listener).iter().map(|r| r.ecn).collect();
            assert_eq!(
                got,
                [Ecn::NOT_ECT, Ecn::ECT_1, Ecn::ECT_0, Ecn::CE, Ecn::NOT_ECT, Ecn::ECT_0]
            );
        }
    }

    #[test]
    fn replies_leave_from_the_address_that_was_asked() {
        for (unspecified, asked) in [("0.0.0.0:0", "127.0.0.77"), ("[::]:0", "::1")]
            .map(|(u, a)| (u.parse().unwrap(), a.parse().unwrap()))
        {
            let (listener, address) = listener(unspecified);
            let target = SocketAddr::new(asked, address.port());
            let client = towards(target);
            client.send(&[1]).unwrap();
            let mut receiver = Receiver::new();
            let received = receive(&mut receiver, &listener)[0];
            assert_eq!(received.local, Some(asked));
            let mut sender = Sender::new();
            let mut outgoing = sender.compose();
            let departure = Departure {
                to: Some(received.from),
                from: received.local,
                ecn: Some(Ecn::CE),
                segment: Some(2),
                ipv6: target.is_ipv6(),
            };
            outgoing.push(&departure, [[2, 2, 3].as_slice()]);
            outgoing.send(&listener, 0).unwrap();
            // The client is connected: it hears nobody but the address that it asked.
            let replies = receive(&mut receiver, &client);
            assert_eq!(replies.iter().map(Received::datagrams).sum::<usize>(), 2);
            assert_eq!(replies[0].from, target);
            assert_eq!(replies[0].ecn, Ecn::CE);
        }
    }

    #[test]
    fn fragmentation_is_refused() {
        for address in [ANY_V4, ANY_V6] {
            let (_listener, address) = listener(address);
            let upstream = towards(address);
            let mut value: c_int = -1;
            let mut len = octets_of::<c_int>();
            let (level, option, want) = if address.is_ipv6() {
                (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE)
            } else {
                (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE)
            };
            // SAFETY: an int option read into an int.
            check(unsafe {
                libc::getsockopt(
                    upstream.raw(),
                    level,
                    option,
                    (&raw mut value).cast(),
                    &raw mut len,
                )
            })
            .unwrap();
            assert_eq!(value, want);
        }
        // One octet more than loopback carries in one piece.
        let (_listener, address) = listener(ANY_V6);
        let upstream = towards(address);
        assert!(upstream.send(&[0; 65_536 - 48]).is_ok());
        let error = upstream.send(&[0; 65_536 - 47]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
    }

    #[test]
    fn only_the_first_listener_minds_that_an_address_is_taken() {
        let (_first, address) = listener(ANY_V4);
        let error = Socket::listener(address, Sharing::First).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        let joined = Socket::listener(address, Sharing::Join).unwrap();
        assert_eq!(joined.local_address().unwrap(), address);
    }

    #[test]
    fn a_port_serves_several_backends_once_it_is_ours() {
        let ((_a, a), (_b, b)) = (listener(ANY_V4), listener(ANY_V4));
        let first = towards(a);
        let local = first.local_address().unwrap();
        let error = Socket::upstream(local, b, PortUse::Exclusive).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        let second = Socket::upstream(local, b, PortUse::Shared).unwrap();
        assert_eq!(second.local_address().unwrap(), local);
        // A stranger's port is refused even to those who would share.
        let stranger = std::net::UdpSocket::bind(ANY_V4).unwrap();
        let error =
            Socket::upstream(stranger.local_addr().unwrap(), a, PortUse::Shared).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn a_refusal_is_reported_once_and_the_socket_goes_on() {
        let (gone, address) = listener(ANY_V4);
        let upstream = towards(address);
        drop(gone);
        upstream.send(&[1]).unwrap();
        let mut receiver = Receiver::new();
        let error = receiver.receive(&upstream, 0..1, Peer::Known).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(receiver.receive(&upstream, 0..1, Peer::Known).unwrap(), 0);
    }

    #[test]
    fn the_poller_reports_what_waits_until_it_is_taken() {
        let (listener, address) = listener(ANY_V4);
        let upstream = towards(address);
        let poller = Poller::new().unwrap();
        poller.watch(&listener, 42).unwrap();
        let mut ready = Ready::new(4);
        poller.wait(&mut ready, Duration::ZERO).unwrap();
        assert!(ready.is_empty());
        upstream.send(&[1]).unwrap();
        for _ in 0..2 {
            poller.wait(&mut ready, Duration::ZERO).unwrap();
            assert_eq!((ready.len(), ready.token(0), ready.is_full()), (1, 42, false));
        }
        receive(&mut Receiver::new(), &listener);
        poller.wait(&mut ready, Duration::ZERO).unwrap();
        assert!(ready.is_empty());
    }

    #[test]
    fn a_thread_can_have_descriptors_of_its_own() {
        let (shared, _) = listener(ANY_V4);
        let raw = shared.raw();
        std::thread::spawn(move || {
            unshare_descriptors().unwrap();
            // SAFETY: asks whether a number is a descriptor; no memory is involved.
            assert_eq!(unsafe { libc::fcntl(raw, libc::F_GETFD) }, -1);
            let (_own, address) = listener(ANY_V4);
            assert_ne!(address.port(), 0);
        })
        .join()
        .unwrap();
        assert!(shared.local_address().is_ok());
        assert!(raise_descriptor_limit().unwrap() > 0);
    }
}
