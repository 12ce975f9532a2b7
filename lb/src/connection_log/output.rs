//! Where lines go: standard output or a file, to which they are appended.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use quic_lb_config::LogTarget;

/// Who may read a file that is made: its owner and group. Addresses of clients are in it.
const MODE: u32 = 0o640;

/// Something that lines are written to.
pub(super) struct Output {
    to: Box<dyn Write + Send>,
    /// Whether the last line is not whole.
    is_torn: bool,
}

impl Output {
    pub(super) fn open(target: &LogTarget) -> io::Result<Self> {
        let to: Box<dyn Write + Send> = match target {
            LogTarget::Stdout => Box::new(io::stdout()),
            LogTarget::File(path) => Box::new(append_to(path)?),
        };
        Ok(Self { to, is_torn: false })
    }

    #[cfg(test)]
    pub(super) fn to(to: impl Write + Send + 'static) -> Self {
        Self { to: Box::new(to), is_torn: false }
    }

    /// Writes whole lines; says how many were written, and what stood in the way of the others. A line that was begun
    /// is ended before the next ones, so that one is lost and not two.
    pub(super) fn write(&mut self, lines: &[u8]) -> (usize, io::Result<()>) {
        if self.is_torn {
            match self.to.write_all(b"\n") {
                Ok(()) => self.is_torn = false,
                Err(error) => return (0, Err(error)),
            }
        }
        let mut at = 0;
        let outcome = loop {
            if at == lines.len() {
                break self.to.flush();
            }
            match self.to.write(&lines[at..]) {
                Ok(0) => break Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => at += written,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
        };
        let written = &lines[..at];
        self.is_torn = written.last().is_some_and(|last| *last != b'\n');
        (written.iter().filter(|octet| **octet == b'\n').count(), outcome)
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(MODE).open(path)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// A disk with little room.
    #[derive(Clone, Default)]
    struct Disk(Arc<Mutex<(Vec<u8>, usize)>>);

    impl Write for Disk {
        fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
            let (content, room) = &mut *self.0.lock().unwrap();
            let fits = octets.len().min(*room).min(7);
            if fits == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            *room -= fits;
            content.extend_from_slice(&octets[..fits]);
            Ok(fits)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn on_a_full_disk_the_lines_that_fit_count_and_one_that_is_torn_spoils_no_other() {
        let disk = Disk::default();
        let mut output = Output::to(disk.clone());
        disk.0.lock().unwrap().1 = 14;
        let (written, outcome) = output.write(b"first one\nsecond one\n");
        assert_eq!((written, outcome.unwrap_err().kind()), (1, io::ErrorKind::StorageFull));
        assert_eq!(output.write(b"third\n").0, 0, "still full");
        disk.0.lock().unwrap().1 = 100;
        assert!(matches!(output.write(b"fourth\nfifth\n"), (2, Ok(()))));
        assert_eq!(disk.0.lock().unwrap().0, b"first one\nseco\nfourth\nfifth\n");
    }
}
