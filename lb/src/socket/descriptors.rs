//! How many descriptors there can be, and who shares them.

use std::{
    fs, io, mem,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
    sync::atomic::{AtomicBool, Ordering},
};

use super::kernel::check;

/// A descriptor of the process, lent to a thread that is about to get a table of its own. It stays its
/// owner's, who must keep it open until the thread has taken it over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lent(RawFd);

impl Lent {
    pub(crate) fn new(owned: &impl AsFd) -> Self {
        Self(owned.as_fd().as_raw_fd())
    }
}

/// What a thread has after [`unshare_descriptors`].
#[derive(Debug)]
pub(crate) struct Table {
    /// Whether the table is the thread's own; where that is forbidden, it is that of the process.
    pub(crate) is_own: bool,
    /// The descriptors that it has taken over, in the order in which they were lent.
    pub(crate) inherited: Vec<OwnedFd>,
}

/// Gives the calling thread a descriptor table of its own, empty but for standard input, output and
/// error and the descriptors that are `lent` to it. A table with a single user is read without locked
/// instructions, and the limit on descriptors holds for each table by itself. No copy of a lent
/// descriptor stays in any table but the thread's and its owner's.
///
/// Descriptors opened before mean nothing to this thread afterwards, and the other way round. That
/// holds for the descriptors that handlers of signals write to as well, so that this thread leaves
/// signals to the others, whether or not it gets its table.
///
/// # Errors
///
/// Those of fcntl(2) for a lent descriptor.
pub(crate) fn unshare_descriptors(lent: &[Lent]) -> io::Result<Table> {
    let mut kept: Vec<RawFd> = lent.iter().map(|lent| lent.0).collect();
    kept.sort_unstable();
    if kept.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let is_own = block_signals().and_then(|()| close_all_but(&kept)).is_ok();
    let take_over = |&Lent(number): &Lent| {
        // SAFETY: the descriptor is open, or the call says that it is not.
        check(unsafe { libc::fcntl(number, libc::F_GETFD) })?;
        if is_own {
            // SAFETY: it is open in a table that only this thread has. Nothing else in this thread
            // owns it: its owner lives in the thread that has lent it, whose table is another one,
            // and no number was lent twice.
            Ok(unsafe { OwnedFd::from_raw_fd(number) })
        } else {
            // SAFETY: it is open, and its owner keeps it open for as long as this takes.
            unsafe { BorrowedFd::borrow_raw(number) }.try_clone_to_owned()
        }
    };
    let inherited = lent.iter().map(take_over).collect::<io::Result<_>>()?;
    Ok(Table { is_own, inherited })
}

/// Unshares the table, and closes in it all descriptors but the standard ones and those `kept`, which
/// ascend.
fn close_all_but(kept: &[RawFd]) -> io::Result<()> {
    let mut last = libc::c_uint::MAX;
    // From the end: the first call unshares, and copies no more than what lies before its range.
    let mut flags = libc::CLOSE_RANGE_UNSHARE;
    // The standard ones stay, lent or not.
    for fence in kept.iter().rev().copied().filter(|&kept| kept > 2).chain([2]) {
        let fence = libc::c_uint::try_from(fence).map_err(|_| io::ErrorKind::InvalidInput)?;
        let first = fence + 1;
        if first <= last {
            // SAFETY: only descriptors of the new table are closed, and no value that owns one of
            // them has reached this thread: the types here are not `Send`, and this is called first
            // thing.
            let done = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
            if done < 0 {
                return Err(io::Error::last_os_error());
            }
            flags = 0;
        }
        last = fence.saturating_sub(1);
    }
    Ok(())
}

/// Has the kernel deliver signals of the process to other threads. Those that the thread causes
/// itself by a fault are as deadly as before.
fn block_signals() -> io::Result<()> {
    // SAFETY: a set of signals is made of integers, for which zero is a valid value; both calls
    // write or read this one set, alive for them.
    let result = unsafe {
        let mut all: libc::sigset_t = mem::zeroed();
        libc::sigfillset(&raw mut all);
        for fault in [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE] {
            libc::sigdelset(&raw mut all, fault);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
}

/// The sockets that the service manager has opened for this process (sd_listen_fds(3)), where it has any. They are given once.
///
/// # Errors
///
/// That what the environment says of them does not hold.
pub(crate) fn activated() -> io::Result<Vec<OwnedFd>> {
    static GIVEN: AtomicBool = AtomicBool::new(false);
    if GIVEN.swap(true, Ordering::Relaxed) {
        return Ok(vec![]);
    }
    let own = |number| {
        // SAFETY: the descriptor is open, or the call says that it is not.
        check(unsafe { libc::fcntl(number, libc::F_GETFD) })?;
        // SAFETY: it is open. The service manager has opened it for this process, by whose number the environment says so, and
        // nothing here has made a value that owns it: they are given once.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    };
    sd_notify::listen_fds()?.map(own).collect()
}

/// How many descriptors the table of the calling thread has; `None` where nobody says it. It takes as long as there are
/// descriptors.
pub(crate) fn open_descriptors() -> Option<usize> {
    // The folder itself is open while it is read.
    Some(fs::read_dir("/proc/thread-self/fd").ok()?.count().saturating_sub(1))
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
