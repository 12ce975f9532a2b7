//! Sending: many messages per system call, each gathered from where its octets already are.

use std::{
    io,
    marker::PhantomData,
    net::{IpAddr, SocketAddr},
    ptr,
};

use libc::c_int;

use super::{
    SLOTS, Socket,
    kernel::{Control, NO_PART, Name, no_header},
    marks::{HopLimit, TrafficClass},
};

/// The most pieces of memory that the messages of one send may be gathered from (the kernel
/// takes 1,024 per message).
const MAX_PARTS: usize = 1_024;

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
    /// Where to; `None` on a connected socket. An IPv4 address also where the socket has both families.
    pub to: Option<SocketAddr>,
    /// Which of the local addresses it leaves from; `None` for the one that the socket has.
    pub from: Option<IpAddr>,
    /// How it is treated; `None` for what the socket says.
    pub class: Option<TrafficClass>,
    /// How far it goes; `None` for what the socket says.
    pub hops: Option<HopLimit>,
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
            let (name, len) = Name::towards(to, departure.ipv6);
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
        // On a socket with both families, it is the datagram's own that counts.
        let (level, class, hops) = if self.to.map_or(self.ipv6, |to| to.is_ipv6()) {
            (libc::IPPROTO_IPV6, libc::IPV6_TCLASS, libc::IPV6_HOPLIMIT)
        } else {
            (libc::IPPROTO_IP, libc::IP_TOS, libc::IP_TTL)
        };
        if let Some(value) = self.class {
            control.push(&mut at, level, class, c_int::from(value.octet()));
        }
        if let Some(value) = self.hops {
            control.push(&mut at, level, hops, c_int::from(value.octet()));
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
