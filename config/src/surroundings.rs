//! What a file refers to beyond itself: the folder of its key files, the environment, the network
//! interfaces and ports of its host. And what can be known of the file from outside.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

/// What a file refers to.
#[derive(Clone, Copy)]
pub struct Surroundings<'a> {
    /// How reports name the file.
    pub file: &'a str,
    /// Where relative names of key files start.
    pub directory: &'a Path,
    /// Looks up environment variables.
    pub environment: &'a dyn Fn(&str) -> Option<String>,
    /// Looks up the number of a network interface.
    pub interface: &'a dyn Fn(&str) -> Option<u32>,
    /// How many local ports there are for datagrams to backends.
    pub local_ports: Option<usize>,
    /// The permissions of the file, as they are shown in octal.
    pub mode: Option<u32>,
    /// Is told each file that the configuration depends on, before it is read.
    pub depends_on: &'a dyn Fn(&Path),
}

impl<'a> Surroundings<'a> {
    /// Those of a text that refers to nothing.
    #[must_use]
    pub fn of_text(file: &'a str) -> Self {
        Self {
            file,
            directory: Path::new(""),
            environment: &|_| None,
            interface: &|_| None,
            local_ports: None,
            mode: None,
            depends_on: &|_| (),
        }
    }

    /// Those of a file of this host that reports name `file`.
    #[must_use]
    pub fn of_file(file: &'a str, path: &'a Path) -> Self {
        Self {
            directory: path.parent().unwrap_or(Path::new("")),
            mode: mode(path),
            ..Self::of_this_host(file)
        }
    }

    /// Those of a text on this host; key files are looked for in the current folder.
    #[must_use]
    pub fn of_this_host(file: &'a str) -> Self {
        Self {
            environment: &|name| std::env::var(name).ok(),
            interface: &interface,
            local_ports: local_ports(),
            ..Self::of_text(file)
        }
    }
}

impl fmt::Debug for Surroundings<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, directory, local_ports, mode, .. } = self;
        f.debug_struct("Surroundings")
            .field("file", file)
            .field("directory", directory)
            .field("local_ports", local_ports)
            .field("mode", mode)
            .finish_non_exhaustive()
    }
}

fn interface(name: &str) -> Option<u32> {
    fs::read_to_string(interface_file(name)?).ok()?.trim().parse().ok()
}

/// Where the number of a network interface stands, and nothing while there is none.
pub(crate) fn interface_file(name: &str) -> Option<PathBuf> {
    // A name that is a path would lead elsewhere.
    let is_name = !name.contains('/') && !matches!(name, "" | "." | "..");
    is_name.then(|| PathBuf::from(format!("/sys/class/net/{name}/ifindex")))
}

fn local_ports() -> Option<usize> {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
    let reserved = fs::read_to_string("/proc/sys/net/ipv4/ip_local_reserved_ports");
    free_ports(&range, &reserved.unwrap_or_default())
}

/// How many ports there are in a range such as `32768 60999` without those in a list such as
/// `8080,9148-9200`.
fn free_ports(range: &str, reserved: &str) -> Option<usize> {
    let port = |text: &str| text.trim().parse::<u16>().ok();
    let span = |text: &str| {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        Some(port(first)?..=port(last)?)
    };
    let reserved: Vec<_> = reserved.split(',').filter_map(span).collect();
    let mut ends = range.split_whitespace().map(port);
    let (first, last) = (ends.next()??, ends.next()??);
    let is_free = |port: &u16| !reserved.iter().any(|span| span.contains(port));
    Some((first..=last).filter(is_free).count())
}

/// The permissions of a file.
#[cfg(unix)]
pub(crate) fn mode(path: &Path) -> Option<u32> {
    use std::os::unix::fs::PermissionsExt as _;
    Some(fs::metadata(path).ok()?.permissions().mode() & 0o777)
}

/// The permissions of a file.
#[cfg(not(unix))]
pub(crate) fn mode(_path: &Path) -> Option<u32> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_ports_are_not_there() {
        assert_eq!(free_ports("32768\t60999\n", "\n"), Some(28_232));
        assert_eq!(free_ports("32768\t60999\n", "4433,40000-40009,9090\n"), Some(28_222));
        assert_eq!(free_ports("7 6", ""), Some(0));
        for broken in ["", "7", "7 x", "7 70000"] {
            assert_eq!(free_ports(broken, ""), None, "{broken}");
        }
    }
}
