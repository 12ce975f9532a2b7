//! Files as they are read here: regular ones, up to a size, and never one that waits for its writer.

use std::{
    fs::{self, File, Metadata, OpenOptions},
    io::{self, Read as _},
    mem,
    path::Path,
    str::Utf8Error,
};

use zeroize::Zeroizing;

/// Room for the end of a file to be seen without room being made for more.
const SPARE: usize = 64;

/// The first `max` bytes of the file at `path`, which may hold keys.
///
/// A slow disk still takes its time: whoever has something else to do reads on a thread of its own.
pub(crate) fn read(path: &Path, max: u64) -> io::Result<Zeroizing<Vec<u8>>> {
    // Some devices act when they are opened.
    must_be_regular(&fs::metadata(path)?)?;
    let file = open(path)?;
    // Something else may stand there by now.
    let metadata = file.metadata()?;
    must_be_regular(&metadata)?;
    // Room for all at once: whatever grows leaves copies behind.
    let len = usize::try_from(metadata.len().min(max)).unwrap_or(0);
    let mut content = Zeroizing::new(Vec::with_capacity(len + SPARE));
    file.take(max).read_to_end(&mut content)?;
    Ok(content)
}

/// The text that these octets are, which is the same memory; or that they are none, and why.
pub(crate) fn into_text(
    mut octets: Zeroizing<Vec<u8>>,
) -> Result<Zeroizing<String>, (Zeroizing<Vec<u8>>, Utf8Error)> {
    String::from_utf8(mem::take(&mut *octets)).map(Zeroizing::new).map_err(|error| {
        let why = error.utf8_error();
        (Zeroizing::new(error.into_bytes()), why)
    })
}

fn must_be_regular(metadata: &Metadata) -> io::Result<()> {
    if metadata.is_file() {
        return Ok(());
    }
    Err(io::Error::other("it is not a regular file"))
}

/// Without waiting: to open a pipe is to wait for its writer.
#[cfg(unix)]
fn open(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)
}

#[cfg(not(unix))]
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).open(path)
}
