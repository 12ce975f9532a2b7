//! Receiving: many messages per system call, each with what the kernel says about it.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4},
    ops::Range,
    ptr,
};

use libc::c_int;

use super::{
    SLOTS, Socket,
    kernel::{Control, NO_PART, Name, from_in_addr, no_header, read},
    marks::{HopLimit, Marks, TrafficClass},
};

/// The most octets that arrive as one message: the length fields of UDP and IP have 16 bits.
const SLOT_LEN: usize = 65_536;
/// From one slot to the next. With a power of two the first octets of all slots would compete for
/// the same few lines of the L1 cache; nineteen lines, 1,216 octets, spread them.
const SLOT_STRIDE: usize = SLOT_LEN + 19 * 64;
/// The hop limit of a datagram of which the kernel does not say it: what most systems begin with.
const UNTOLD_HOPS: HopLimit = HopLimit::new(64);

/// One message as it arrived: a datagram, or several of one sender that the kernel joined.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// Who sent it; unspecified on a connected socket, where it is known.
    pub from: SocketAddr,
    /// Where it was sent to, on a socket bound to an unspecified address.
    pub local: Option<IpAddr>,
    /// How it was marked.
    pub marks: Marks,
    /// Its octets.
    pub len: usize,
    /// The octets of each of its datagrams; the last may have fewer. At least 1.
    pub segment: usize,
}

impl Received {
    const NOTHING: Self = Self {
        from: SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0)),
        local: None,
        marks: Marks { class: TrafficClass::NOT_ECT, hops: UNTOLD_HOPS },
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
                        received.marks.class = TrafficClass::from_octet(data.read());
                    }
                    (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                        if let Some(class) = read::<c_int>(data, data_len) {
                            received.marks.class = TrafficClass::from_octet(class.to_le_bytes()[0]);
                        }
                    }
                    (libc::IPPROTO_IP, libc::IP_TTL)
                    | (libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT) => {
                        if let Some(hops) = read::<c_int>(data, data_len) {
                            received.marks.hops = HopLimit::new(hops.to_le_bytes()[0]);
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
                            .map(|info| Ipv6Addr::from(info.ipi6_addr.s6_addr).to_canonical());
                    }
                    _ => {}
                }
                record = libc::CMSG_NXTHDR(header, record);
            }
        }
        received
    }
}
