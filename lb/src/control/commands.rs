//! What operators have commanded about backends, and the file that keeps it over restarts.
//!
//! The file has a line for each time that something has changed, with all commands that are in force; the last line that can be
//! read counts. It is begun anew when the process listens, and appended to: the process may not make files later on, and whatever
//! interrupts it leaves the line before in place.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use quic_lb_config::Admission;
use serde::{Deserialize, Serialize};

use super::{plane::watched::Name, query::decoded};

/// The last command about each backend.
pub(crate) type Commands = BTreeMap<Name, Command>;

/// What somebody wants of a backend instead of what the file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Command {
    pub(crate) wanted: Admission,
    pub(crate) author: Author,
    /// When, in seconds since 1970.
    pub(crate) unix_time: u64,
}

/// Who gave a command, as they say themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Author {
    pub(crate) by: String,
    pub(crate) reason: Option<String>,
}

/// How much each may say, in characters.
const MAX_SAID: usize = 200;

impl Author {
    /// What the query of a request says.
    pub(super) fn read(query: &str) -> Result<Self, String> {
        let (mut by, mut reason) = (None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decoded(value)?;
            if value.chars().count() > MAX_SAID || value.contains(char::is_control) {
                return Err(format!(
                    "{key} may have {MAX_SAID} characters, none of which controls anything"
                ));
            }
            match key {
                "by" => by = Some(value),
                "reason" => reason = Some(value),
                _ => return Err(format!("\"{key}\" is neither by nor reason")),
            }
        }
        let said =
            |text: Option<Cow<'_, str>>| text.filter(|text| !text.is_empty()).map(Cow::into_owned);
        Ok(Self {
            by: said(by).unwrap_or_else(|| "somebody at the admin interface".to_owned()),
            reason: said(reason),
        })
    }
}

/// A command as it is kept and handed over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Kept {
    pool: String,
    backend: String,
    state: State,
    by: String,
    reason: Option<String>,
    unix_time: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Active,
    Draining,
}

/// The file that keeps commands.
#[derive(Debug)]
pub(super) struct Keeper {
    file: File,
    /// `None` when it is not known what is there.
    kept: Option<Commands>,
}

/// In the folder for what outlives the process.
const FILE: &str = "commands.json";
/// Commands about all backends that there may be are far less.
const MAX_FILE: u64 = 64 << 20;

/// What was in force when the file in `folder` was written last.
///
/// # Errors
///
/// When it cannot be read.
pub(super) fn kept_in(folder: &Path) -> io::Result<Commands> {
    match File::open(folder.join(FILE)) {
        Ok(file) => read(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Commands::new()),
        Err(error) => Err(error),
    }
}

impl Keeper {
    /// Begins a new file in `folder`, in place of the one that was there: whoever may not listen must not, since it may be that of
    /// a process that runs.
    ///
    /// # Errors
    ///
    /// When files cannot be made there.
    pub(super) fn begin(folder: &Path, commands: &Commands) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let path = folder.join(FILE);
        // The lines of before are not needed any more.
        let fresh = path.with_extension("fresh");
        let options = || OpenOptions::new().create(true).write(true).mode(0o600).clone();
        let mut file = options().truncate(true).open(&fresh)?;
        file.write_all(&line(commands))?;
        file.sync_all()?;
        fs::rename(&fresh, &path)?;
        let file = options().append(true).open(&path)?;
        Ok(Self { file, kept: Some(commands.clone()) })
    }

    /// Goes on with the file of a predecessor.
    pub(super) const fn succeeding(file: File) -> Self {
        Self { file, kept: None }
    }

    /// The file, for a successor.
    ///
    /// # Errors
    ///
    /// When there are no more descriptors.
    pub(super) fn try_clone(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Has `commands` outlive the process.
    ///
    /// # Errors
    ///
    /// When they cannot be written.
    pub(super) fn keep(&mut self, commands: Commands) -> io::Result<()> {
        if self.kept.as_ref() == Some(&commands) {
            return Ok(());
        }
        let line = line(&commands);
        if self.file.metadata()?.len() + line.len() as u64 > MAX_FILE {
            self.file.set_len(0)?;
        }
        self.file.write_all(&line)?;
        self.file.sync_data()?;
        self.kept = Some(commands);
        Ok(())
    }
}

fn read(file: File) -> io::Result<Commands> {
    let mut octets = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut octets)?;
    // One that was interrupted cannot be read.
    let read = |line: &[u8]| serde_json::from_slice::<Vec<Kept>>(line).ok();
    let last = octets.rsplit(|octet| *octet == b'\n').find_map(read);
    Ok(unpacked(last.unwrap_or_default()))
}

fn line(commands: &Commands) -> Vec<u8> {
    // Text and numbers can always be written.
    let mut line = serde_json::to_vec(&packed(commands)).unwrap_or_default();
    // Behind a line that was interrupted, too.
    line.insert(0, b'\n');
    line.push(b'\n');
    line
}

/// As they are kept and handed over.
pub(crate) fn packed(commands: &Commands) -> Vec<Kept> {
    let kept = commands.iter().map(|((pool, backend), command)| {
        let Command { wanted, author: Author { by, reason }, unix_time } = command.clone();
        let state = match wanted {
            Admission::Active => State::Active,
            Admission::Draining => State::Draining,
        };
        Kept { pool: pool.clone(), backend: backend.clone(), state, by, reason, unix_time }
    });
    kept.collect()
}

pub(crate) fn unpacked(kept: Vec<Kept>) -> Commands {
    let commands = kept.into_iter().map(|kept| {
        let Kept { pool, backend, state, by, reason, unix_time } = kept;
        let wanted = match state {
            State::Active => Admission::Active,
            State::Draining => Admission::Draining,
        };
        ((pool, backend), Command { wanted, author: Author { by, reason }, unix_time })
    });
    commands.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(wanted: Admission, reason: Option<&str>) -> Command {
        let author = Author { by: "ops".into(), reason: reason.map(Into::into) };
        Command { wanted, author, unix_time: 1_700_000_000 }
    }

    #[test]
    fn what_was_in_force_last_is_read_again_whatever_interrupted_the_writing() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("made").join("at need");
        let mut commands = Commands::new();
        assert_eq!(kept_in(&at).unwrap(), commands);
        let mut keeper = Keeper::begin(&at, &commands).unwrap();
        for n in 0..5 {
            let name = ("web".to_owned(), format!("a\n{n}"));
            commands.insert(name, command(Admission::Draining, Some("\"disk\"\n")));
            keeper.keep(commands.clone()).unwrap();
        }
        commands.insert(("web".into(), "b".into()), command(Admission::Active, None));
        commands.remove(&("web".to_owned(), "a\n0".to_owned()));
        keeper.keep(commands.clone()).unwrap();
        assert_eq!(kept_in(&at).unwrap(), commands);

        let path = at.join(FILE);
        let whole = fs::read(&path).unwrap();
        let mut later = commands.clone();
        later.insert(("web".into(), "c".into()), command(Admission::Draining, None));
        let line = line(&later);
        for cut in 0..line.len() - 2 {
            fs::write(&path, [&whole, &line[..cut]].concat()).unwrap();
            assert_eq!(kept_in(&at).unwrap(), commands, "{cut}");
            let mut keeper = Keeper::begin(&at, &commands).unwrap();
            keeper.keep(later.clone()).unwrap();
            assert_eq!(kept_in(&at).unwrap(), later, "{cut}");
        }
        fs::write(&path, b"\xff[{}]").unwrap();
        assert_eq!(kept_in(&at).unwrap(), Commands::new());
    }

    #[test]
    fn who_commands_says_so_in_few_words() {
        let read = |query: &str| Author::read(query).map(|author| (author.by, author.reason));
        assert_eq!(
            read("by=ann&reason=new%20kernel"),
            Ok(("ann".into(), Some("new kernel".into())))
        );
        assert_eq!(read(""), Ok(("somebody at the admin interface".into(), None)));
        assert_eq!(read("by=&reason="), read(""));
        let long = format!("reason={}", "x".repeat(MAX_SAID + 1));
        for wrong in ["who=ann", "by=a%0ab", "by=%ff", &long] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
