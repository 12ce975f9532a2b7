//! How many descriptors there can be, and who shares them.

use std::{io, mem, ptr};

use super::kernel::check;

/// Gives the calling thread a descriptor table of its own, empty but for standard input, output
/// and error. A table with a single user is read without locked instructions, and the limit on
/// descriptors holds for each table by itself.
///
/// Descriptors opened before mean nothing to this thread afterwards, and the other way round. That
/// holds for the descriptors that handlers of signals write to as well, so that this thread leaves
/// signals to the others, whether or not it gets its table.
///
/// # Errors
///
/// Those of pthread_sigmask(3) and close_range(2).
pub(crate) fn unshare_descriptors() -> io::Result<()> {
    block_signals()?;
    let first: libc::c_uint = 3;
    // SAFETY: only descriptors of the new table are closed, and no value that owns a descriptor
    // has reached this thread: the types here are not `Send`, and this is called first thing.
    let done = unsafe {
        libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_UNSHARE)
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
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
