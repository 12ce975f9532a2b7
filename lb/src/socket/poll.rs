//! Waiting for many sockets at once.

use std::{
    io,
    marker::PhantomData,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    time::Duration,
};

use libc::c_int;

use super::kernel::{check, milliseconds};

/// Says which of many sockets have something.
#[derive(Debug)]
pub struct Poller {
    fd: OwnedFd,
    /// As in [`Socket`](super::Socket).
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
    pub fn watch(&self, socket: &impl AsFd, token: u64) -> io::Result<()> {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: token };
        let (poller, socket) = (self.fd.as_raw_fd(), socket.as_fd().as_raw_fd());
        // SAFETY: the kernel reads one event, alive for the call.
        check(unsafe { libc::epoll_ctl(poller, libc::EPOLL_CTL_ADD, socket, &raw mut event) })
    }

    /// Waits until a socket has something, or for `timeout`.
    ///
    /// # Errors
    ///
    /// Those of epoll_wait(2) other than an interruption.
    pub fn wait(&self, ready: &mut Ready, timeout: Duration) -> io::Result<()> {
        let room = c_int::try_from(ready.events.len()).unwrap_or(c_int::MAX);
        let events = ready.events.as_mut_ptr();
        // SAFETY: the kernel writes at most `room` events, the length of the array.
        let found =
            unsafe { libc::epoll_wait(self.fd.as_raw_fd(), events, room, milliseconds(timeout)) };
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
