//! The process that hands over.

#![expect(clippy::disallowed_methods, reason = "a shell: it starts processes and waits for them")]

use std::{
    env,
    ffi::OsString,
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::{self, Child, Command, ExitStatus, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use serde::de::DeserializeOwned;

use super::{Answer, Hello, PREPARING, Rest, STANDSTILL, VARIABLE};
use crate::{
    control::{
        doors::Handed,
        plane::Stage,
        shared::{Shared, Succeeded},
    },
    memory::Memory,
    socket::Channel,
    succession::VERSION,
    worker::orders::Orders,
};

/// The file of this program, and what it was started with.
#[derive(Clone, Debug)]
pub(in crate::control) struct Binary {
    path: PathBuf,
    arguments: Vec<OsString>,
}

impl Binary {
    /// To be asked before anybody replaces the file.
    pub(in crate::control) fn of_this_process() -> io::Result<Self> {
        let mut arguments = env::args_os();
        // As it was called: what is a link leads to the new file when that is replaced.
        let called = arguments.next().map(PathBuf::from).filter(|path| path.is_absolute());
        let path = match called {
            Some(path) => path,
            None => env::current_exe()?,
        };
        Ok(Self { path, arguments: arguments.collect() })
    }

    pub(in crate::control) fn path(&self) -> &Path {
        &self.path
    }
}

/// All that an upgrade takes.
#[derive(Debug)]
pub(in crate::control) struct Upgrader {
    pub(in crate::control) binary: Binary,
    pub(in crate::control) orders: Arc<Orders>,
    pub(in crate::control) memory: Arc<Memory>,
    pub(in crate::control) doors: Handed,
    pub(in crate::control) confined: bool,
}

impl Upgrader {
    /// Starts a successor and hands over to it. An error says why it has not come to that; this process then goes on as if nothing
    /// had been.
    pub(in crate::control) fn upgrade(&self, shared: &Shared) -> Result<Succeeded, String> {
        if process::id() == 1 {
            return Err(
                "the first process of a container is its end too: replace the container".to_owned()
            );
        }
        let mut successor = Successor::start(&self.binary)
            .map_err(|error| format!("cannot start {}: {error}", self.binary.path.display()))?;
        let outcome = self.hand_over(shared, &mut successor);
        if outcome.is_err() {
            // Before anybody here goes on: two would read from the same sockets.
            successor.end();
            self.orders.go_on();
        }
        outcome
    }

    fn hand_over(&self, shared: &Shared, successor: &mut Successor) -> Result<Succeeded, String> {
        let settled = shared.plane().settled();
        let workers = self.hello(shared, successor)?;
        successor.expect(PREPARING, |answer| matches!(answer, Answer::Prepared))?;
        if shared.plane().stage() != Stage::Running {
            return Err("this process is about to end".to_owned());
        }
        let began = Instant::now();
        let flows = self.orders.hand_over(workers, STANDSTILL);
        let flows = flows.map_err(|error| format!("a worker does not hand over: {error}"))?;
        // What has come with it, the successor does not know.
        if shared.plane().settled() != settled {
            return Err("the configuration was changed meanwhile: try again".to_owned());
        }
        let rest = {
            let plane = shared.plane();
            let routing = plane.routing().load_full();
            Rest { memory: self.memory.handed(&routing), plane: plane.handed(Instant::now()) }
        };
        successor.tell(|channel| channel.send(&rest, &[]))?;
        successor.expect(STANDSTILL, |answer| matches!(answer, Answer::Serving))?;
        Ok(Succeeded { process: successor.child.id(), flows, standstill: began.elapsed() })
    }

    /// Tells the successor what it has to know from the beginning; gives the ends of the channels for workers.
    fn hello(&self, shared: &Shared, successor: &mut Successor) -> Result<Vec<OwnedFd>, String> {
        let now = Instant::now();
        let hello = {
            let plane = shared.plane();
            Hello {
                workers: self.orders.len(),
                doors: self.doors.0.iter().map(|(place, _)| place.clone()).collect(),
                confined: self.confined,
                memory: self.memory.basis(now),
                numbers: plane.handed_numbers(),
                plane: plane.handed(now),
            }
        };
        let pairs = (0..self.orders.len()).map(|_| Channel::pair()).collect::<io::Result<Vec<_>>>();
        let pairs = pairs.map_err(|error| format!("cannot make channels: {error}"))?;
        let (theirs, ours): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        let doors = self.doors.0.iter().map(|(_, door)| door.as_fd());
        let descriptors: Vec<_> = theirs.iter().map(|end| end.as_fd()).chain(doors).collect();
        successor.tell(|channel| {
            channel.send(&VERSION, &[])?;
            channel.send(&hello, &descriptors)
        })?;
        Ok(ours)
    }
}

/// A new process that does not serve yet.
struct Successor {
    child: Child,
    channel: Channel,
}

impl Successor {
    fn start(binary: &Binary) -> io::Result<Self> {
        let (channel, end) = Channel::pair()?;
        let child = Command::new(&binary.path)
            .args(&binary.arguments)
            .env(VARIABLE, "1")
            // It says which process is watched: not that one.
            .env_remove("WATCHDOG_PID")
            // Nor are sockets opened for it: it gets those that are in use.
            .env_remove("LISTEN_PID")
            .env_remove("LISTEN_FDS")
            .env_remove("LISTEN_FDNAMES")
            .stdin(Stdio::from(end))
            .spawn()?;
        Ok(Self { child, channel })
    }

    fn tell(&mut self, tell: impl FnOnce(&Channel) -> io::Result<()>) -> Result<(), String> {
        let told = self.channel.set_patience(Some(STANDSTILL)).and_then(|()| tell(&self.channel));
        match told {
            Ok(()) => Ok(()),
            // It may have said why it does not listen.
            Err(error) => match self.receive::<Answer>(STANDSTILL) {
                Ok(Answer::Refused(reason)) => Err(reason),
                _ => Err(self.why(&error)),
            },
        }
    }

    fn expect(
        &mut self,
        patience: Duration,
        is_it: impl FnOnce(&Answer) -> bool,
    ) -> Result<(), String> {
        match self.receive(patience) {
            Ok(answer) if is_it(&answer) => Ok(()),
            Ok(Answer::Refused(reason)) => Err(reason),
            Ok(_) => Err("the new process does not speak as it should".to_owned()),
            Err(error) => Err(self.why(&error)),
        }
    }

    fn receive<T: DeserializeOwned>(&self, patience: Duration) -> io::Result<T> {
        self.channel.set_patience(Some(patience))?;
        self.channel.receive().map(|(value, _)| value)
    }

    /// What has become of it, if nothing can be heard of it.
    fn why(&mut self, error: &io::Error) -> String {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                "the new process takes too long".to_owned()
            }
            io::ErrorKind::InvalidData => "the new process cannot be understood".to_owned(),
            _ => match self.ended() {
                Some(status) => format!("the new process has ended: {status}"),
                None => format!("the new process cannot be spoken to: {error}"),
            },
        }
    }

    /// A process that ends closes its end of the channel a moment before.
    fn ended(&mut self) -> Option<ExitStatus> {
        (0..100).find_map(|_| {
            let status = self.child.try_wait().ok()?;
            if status.is_none() {
                thread::sleep(Duration::from_millis(10));
            }
            status
        })
    }

    fn end(mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
