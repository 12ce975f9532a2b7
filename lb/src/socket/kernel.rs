//! The kernel's structures: socket addresses, control messages, and what came of a call.

use std::{
    io, mem,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    ptr,
    time::Duration,
};

use libc::{c_int, c_void};

/// A socket address as the kernel has it.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) union Name {
    family: libc::sa_family_t,
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl Name {
    pub(super) const SIZE: libc::socklen_t = octets_of::<Self>();
    pub(super) const EMPTY: Self = Self {
        v6: libc::sockaddr_in6 {
            sin6_family: 0,
            sin6_port: 0,
            sin6_flowinfo: 0,
            sin6_addr: libc::in6_addr { s6_addr: [0; 16] },
            sin6_scope_id: 0,
        },
    };

    #[expect(clippy::cast_possible_truncation, reason = "address families are below 64")]
    pub(super) fn new(address: SocketAddr) -> (Self, libc::socklen_t) {
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

    /// As [`Self::new`], for a socket that is of IPv6 or not. IPv4 addresses go by mapped ones there.
    pub(super) fn towards(address: SocketAddr, ipv6: bool) -> (Self, libc::socklen_t) {
        match address {
            SocketAddr::V4(address) if ipv6 => {
                let mapped = address.ip().to_ipv6_mapped();
                Self::new(SocketAddrV6::new(mapped, address.port(), 0, 0).into())
            }
            address => Self::new(address),
        }
    }

    /// The address; a mapped one as the IPv4 address that it stands for.
    pub(super) fn get(&self) -> Option<SocketAddr> {
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
                libc::AF_INET6 => {
                    let address = Ipv6Addr::from(self.v6.sin6_addr.s6_addr);
                    let port = u16::from_be(self.v6.sin6_port);
                    Some(match address.to_ipv4_mapped() {
                        Some(address) => SocketAddrV4::new(address, port).into(),
                        None => SocketAddrV6::new(address, port, 0, self.v6.sin6_scope_id).into(),
                    })
                }
                _ => None,
            }
        }
    }

    pub(super) const fn as_ptr(&self) -> *const libc::sockaddr {
        (&raw const *self).cast()
    }

    pub(super) const fn as_mut_ptr(&mut self) -> *mut libc::sockaddr {
        (&raw mut *self).cast()
    }
}

/// Room for the control messages of one message, aligned as the kernel wants them: traffic class, hop
/// limit, segment length and packet information take at most 112 octets.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub(super) struct Control([u8; 128]);

impl Control {
    pub(super) const EMPTY: Self = Self([0; 128]);

    /// Appends a control message at `at`.
    pub(super) fn push<T: Copy>(&mut self, at: &mut usize, level: c_int, kind: c_int, value: T) {
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

pub(super) const NO_PART: libc::iovec =
    libc::iovec { iov_base: ptr::null_mut::<c_void>(), iov_len: 0 };

pub(super) fn no_header() -> libc::mmsghdr {
    // SAFETY: a C structure of integers and pointers, for which zero is a valid value; it may
    // have padding that cannot be named.
    unsafe { mem::zeroed() }
}

/// The value at `data`, if its `len` octets hold one.
///
/// # Safety
///
/// `len` octets from `data` on can be read, and every pattern of octets is a valid `T`.
pub(super) unsafe fn read<T: Copy>(data: *const u8, len: usize) -> Option<T> {
    // SAFETY: as the caller promises, after the check of the length.
    (len >= size_of::<T>()).then(|| unsafe { data.cast::<T>().read_unaligned() })
}

pub(super) fn from_in_addr(address: libc::in_addr) -> Ipv4Addr {
    Ipv4Addr::from(u32::from_be(address.s_addr))
}

#[expect(clippy::cast_possible_truncation, reason = "sizes of small structures")]
pub(super) const fn octets_of<T>() -> u32 {
    size_of::<T>() as u32
}

/// Rounded up, so that a short wait is not a busy one.
pub(super) fn milliseconds(duration: Duration) -> c_int {
    c_int::try_from(duration.as_nanos().div_ceil(1_000_000)).unwrap_or(c_int::MAX)
}

pub(super) fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
