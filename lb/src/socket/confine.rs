//! What a thread gives up once its sockets are open: capabilities, files, and what would bring them back.
//!
//! All of it holds for one thread and for those that it starts. Nothing of it can be taken back.

use std::{
    fs::OpenOptions,
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
    path::{Path, PathBuf},
    ptr,
};

use libc::{c_int, c_long, c_ulong};

use super::kernel::check;

/// What a thread has given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Confined {
    /// Whether it has no right to change any file, nor to execute one; older kernels cannot take that away.
    pub(crate) files: bool,
}

/// Keeps the memory of this process, which has keys in it, out of core dumps and from other processes of its user.
///
/// # Errors
///
/// Those of prctl(2).
pub(crate) fn keep_memory_private() -> io::Result<()> {
    prctl(libc::PR_SET_DUMPABLE, 0)
}

/// Whether a thread keeps the right to execute files. Whatever it executes has no more rights than it has itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Execution {
    /// As the one does that starts a successor of the process.
    Kept,
    /// As all others do.
    GivenUp,
}

/// Gives up every capability and, where the kernel can do that, the right to write, make, remove and mostly also that to execute
/// files, but for making and writing plain files in these folders. Reading files, sockets and whatever is open remain.
///
/// # Errors
///
/// When capabilities remain, or new privileges could be had.
pub(crate) fn confine_thread(execution: Execution, writable: &[PathBuf]) -> io::Result<Confined> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1)?;
    drop_capabilities()?;
    Ok(Confined { files: forbid_files(execution, writable).is_ok() })
}

fn drop_capabilities() -> io::Result<()> {
    // So that root has none after an execution either. Whoever may not do this has none to lose.
    let mut capability = 0;
    while prctl(libc::PR_CAPBSET_READ, capability).is_ok() {
        if prctl(libc::PR_CAPBSET_DROP, capability).is_err() {
            break;
        }
        capability += 1;
    }
    // Kernels before 4.3 have none of these.
    let _ = prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as c_ulong);
    let header = CapabilityHeader { version: CAPABILITY_VERSION_3, thread: 0 };
    let none = [Capabilities { effective: 0, permitted: 0, inheritable: 0 }; 2];
    // SAFETY: the kernel reads a header of this version and the two sets that belong to it.
    check_long(unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) })
}

/// A Landlock ruleset that handles these rights and grants few of them, in these folders.
fn forbid_files(execution: Execution, writable: &[PathBuf]) -> io::Result<()> {
    // SAFETY: without attributes the kernel only says which version it has.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            ptr::null::<u64>(),
            0_usize,
            RULESET_VERSION,
        )
    };
    check_long(version)?;
    let mut handled = match execution {
        Execution::Kept => RIGHTS & !RIGHT_TO_EXECUTE,
        Execution::GivenUp => RIGHTS,
    };
    if version >= 2 {
        handled |= RIGHT_TO_REFER;
    }
    if version >= 3 {
        handled |= RIGHT_TO_TRUNCATE;
    }
    // SAFETY: the attributes begin with the rights to files, and so many octets of them are given.
    let ruleset = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, &raw const handled, size_of::<u64>(), 0)
    };
    check_long(ruleset)?;
    let ruleset = c_int::try_from(ruleset).map_err(io::Error::other)?;
    // SAFETY: the kernel has just opened it, and nobody else has it.
    let ruleset = unsafe { OwnedFd::from_raw_fd(ruleset) };
    for folder in writable {
        allow_files_in(&ruleset, folder)?;
    }
    // SAFETY: a call with numbers alone.
    check_long(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) })
}

/// Grants what it takes to append to files. A folder that is not there has none.
fn allow_files_in(ruleset: &OwnedFd, folder: &Path) -> io::Result<()> {
    let Ok(folder) = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(folder) else {
        return Ok(());
    };
    let rule = PathBeneath { allowed: RIGHT_TO_WRITE | RIGHT_TO_MAKE, parent: folder.as_raw_fd() };
    // SAFETY: the kernel reads a rule of this kind, which refers to a descriptor that is open.
    check_long(unsafe {
        libc::syscall(
            libc::SYS_landlock_add_rule,
            ruleset.as_raw_fd(),
            RULE_PATH_BENEATH,
            &raw const rule,
            0,
        )
    })
}

/// linux/landlock.h.
#[repr(C, packed)]
struct PathBeneath {
    allowed: u64,
    parent: c_int,
}

/// linux/landlock.h.
const RULE_PATH_BENEATH: c_int = 1;
const RIGHT_TO_WRITE: u64 = 1 << 1;
/// Plain files.
const RIGHT_TO_MAKE: u64 = 1 << 8;
const RIGHT_TO_EXECUTE: u64 = 1;
/// Execute, write, remove directories and files, make seven kinds of files.
const RIGHTS: u64 = RIGHT_TO_EXECUTE | 1 << 1 | 0b1_1111_1111 << 4;
const RIGHT_TO_REFER: u64 = 1 << 13;
const RIGHT_TO_TRUNCATE: u64 = 1 << 14;
const RULESET_VERSION: c_int = 1;

/// linux/capability.h.
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    thread: c_int,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Capabilities {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

fn prctl(what: c_int, argument: c_ulong) -> io::Result<()> {
    // SAFETY: all operations that are asked for here take numbers alone.
    check(unsafe { libc::prctl(what, argument, 0, 0, 0) })
}

fn check_long(result: c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
