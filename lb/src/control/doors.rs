//! The doors of the admin interface: an address to be read, and where commands are taken; opened before the process gives up
//! its rights.

use std::{
    env, fs, io,
    net::{SocketAddr, TcpListener},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{FileTypeExt as _, PermissionsExt as _},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
};

use quic_lb_config::{Admin, Commands};
use serde::{Deserialize, Serialize};

/// What systemd calls the folder of a service with a RuntimeDirectory.
const RUNTIME_DIRECTORY: &str = "RUNTIME_DIRECTORY";

/// The name of the Unix socket there.
const SOCKET: &str = "admin.sock";

/// The owner and the group of the process may command.
const MODE: u32 = 0o660;

/// What may be done behind a door.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Everything,
    /// All but commands, which are taken elsewhere.
    Reading,
    /// Everything, by who shows what `admin.commands` wants to be shown: a token, or a certificate.
    WithProof,
}

/// Where commands are taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Where everything else is read.
    Here,
    Unix(PathBuf),
    Address(SocketAddr),
}

impl Place {
    pub(super) fn of(admin: &Admin) -> Self {
        match &admin.commands {
            Some(Commands::Unix(path)) => Self::Unix(path.clone()),
            Some(Commands::Token(address, _) | Commands::Certificates(address, _)) => {
                Self::Address(*address)
            }
            None => Self::by_default(env::var_os(RUNTIME_DIRECTORY).map(PathBuf::from)),
        }
    }

    fn by_default(runtime_directory: Option<PathBuf>) -> Self {
        // There may be several, of which this process needs none in particular.
        let first = runtime_directory.as_ref().and_then(|list| env::split_paths(list).next());
        let folder = first.filter(|folder| folder.is_absolute());
        folder.map_or(Self::Here, |folder| Self::Unix(folder.join(SOCKET)))
    }

    /// What may be done at the address of the admin interface.
    pub(super) const fn access_at_address(&self) -> Access {
        match self {
            Self::Here => Access::Everything,
            Self::Unix(_) | Self::Address(_) => Access::Reading,
        }
    }
}

/// What a door is known by, here and in a successor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Where {
    Address(#[serde(with = "crate::zoned")] SocketAddr),
    Path(PathBuf),
    /// No door, but handed over for the same reasons: the file that keeps commands in this folder.
    State(PathBuf),
}

/// Doors that a process hands over to its successor: nobody finds them closed meanwhile, and who has given up rights
/// could not open them.
#[derive(Debug, Default)]
pub(super) struct Handed(pub(super) Vec<(Where, OwnedFd)>);

impl Handed {
    /// All of them, open a second time.
    pub(super) fn of(doors: &[(Where, Door, Access)]) -> io::Result<Self> {
        let again = |(place, door, _): &(Where, Door, Access)| {
            let door = match door {
                Door::Tcp(listener) => listener.try_clone()?.into(),
                Door::Unix(listener) => listener.try_clone()?.into(),
            };
            Ok((place.clone(), door))
        };
        doors.iter().map(again).collect::<io::Result<_>>().map(Self)
    }

    /// The one at this place, if it was handed over.
    pub(super) fn take(&mut self, place: &Where) -> Option<OwnedFd> {
        let at = self.0.iter().position(|(of, _)| of == place)?;
        Some(self.0.swap_remove(at).1)
    }
}

/// A socket that waits for connections.
#[derive(Debug)]
pub(super) enum Door {
    Tcp(TcpListener),
    Unix(UnixListener),
}

pub(super) fn open_address(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// A Unix socket at `path`, in place of one that was there: a process that has ended, and may not change files any more, has left it; one that
/// hands over to this one goes on with it.
pub(super) fn open_path(path: &Path) -> io::Result<UnixListener> {
    match fs::symlink_metadata(path) {
        Ok(there) if !there.file_type().is_socket() => {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".new");
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&fresh)?;
    listener.set_nonblocking(true)?;
    // Nobody finds it under its name before.
    fs::set_permissions(&fresh, fs::Permissions::from_mode(MODE))?;
    fs::rename(&fresh, path)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_socket_takes_the_place_of_one_that_was_left_and_of_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        drop(open_path(&path).unwrap());
        assert!(UnixStream::connect(&path).is_err(), "nobody listens");
        let _listener = open_path(&path).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, MODE);
        let names = fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(names, 1);
        let file = folder.path().join("file");
        fs::write(&file, "something").unwrap();
        assert!(open_path(&file).is_err());
        assert_eq!(fs::read(&file).unwrap(), b"something");
    }

    #[test]
    fn the_folder_of_a_service_is_where_commands_are_taken_by_default() {
        let place = |list: &str| Place::by_default(Some(list.into()));
        assert_eq!(place("/run/quic-lb"), Place::Unix("/run/quic-lb/admin.sock".into()));
        assert_eq!(place("/run/a:/run/b"), Place::Unix("/run/a/admin.sock".into()));
        assert_eq!(place(""), Place::Here);
        assert_eq!(Place::by_default(None), Place::Here);
        assert_eq!(Place::Here.access_at_address(), Access::Everything);
        assert_eq!(place("/run/quic-lb").access_at_address(), Access::Reading);
    }
}
