//! The process that takes over.

#![expect(clippy::disallowed_methods, reason = "a shell around the state that it takes over")]

use std::{
    env,
    fs::File,
    io,
    os::fd::{AsFd as _, OwnedFd},
    time::Instant,
};

use quic_lb_config::Config;
use tracing::warn;

use super::{Answer, Hello, PREPARING, Rest, VARIABLE};
use crate::{
    control::{
        doors::Handed,
        plane::{ControlPlane, handed::HandedPlane},
    },
    memory::{HandedBasis, Memory},
    registry::HandedNumbers,
    socket::Channel,
    succession::VERSION,
    worker::{StartError, Successors, Workers},
};

/// The process that hands over to this one.
#[derive(Debug)]
pub(in crate::control) struct Predecessor(Channel);

/// What it hands over at first.
#[derive(Debug)]
pub(in crate::control) struct Legacy {
    pub(in crate::control) memory: HandedBasis,
    pub(in crate::control) numbers: HandedNumbers,
    pub(in crate::control) plane: HandedPlane,
    /// A channel to each worker.
    pub(in crate::control) workers: Vec<OwnedFd>,
    pub(in crate::control) doors: Handed,
    /// Whether this process began without the rights that it would give up.
    pub(in crate::control) confined: bool,
}

impl Predecessor {
    /// That of this process, if it has one.
    pub(in crate::control) fn of_this_process() -> io::Result<Option<Self>> {
        if env::var_os(VARIABLE).is_none() {
            return Ok(None);
        }
        let stdin = io::stdin();
        let channel = Channel::from(stdin.as_fd().try_clone_to_owned()?);
        // Whoever looks at the standard streams should find nothing strange.
        rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
        channel.set_patience(Some(PREPARING))?;
        Ok(Some(Self(channel)))
    }

    /// What it hands over at first, if that goes together with `config`.
    pub(in crate::control) fn legacy(&self, config: &Config) -> io::Result<Legacy> {
        let (version, _) = self.0.receive::<u32>()?;
        if version != VERSION {
            return Err(io::Error::other(format!(
                "the running process hands over in version {version} of the format, this one knows {VERSION}: it takes a restart"
            )));
        }
        let (hello, mut descriptors) = self.0.receive::<Hello>()?;
        let Hello { workers, doors, confined, memory, numbers, plane } = hello;
        if let Some(wanted) = config.workers.filter(|wanted| wanted.get() != workers) {
            return Err(io::Error::other(format!(
                "it takes a restart: workers changes from {workers} to {wanted}"
            )));
        }
        if descriptors.len() != workers + doors.len() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let open = descriptors.split_off(workers);
        let doors = Handed(doors.into_iter().zip(open).collect());
        Ok(Legacy { memory, numbers, plane, workers: descriptors, doors, confined })
    }

    /// Says that the hand-over can begin, and takes over the rest.
    pub(in crate::control) fn take_over(
        &self,
        workers: Successors,
        plane: &mut ControlPlane,
        memory: &Memory,
    ) -> Result<Workers, StartError> {
        let rest = self.0.send(&Answer::Prepared, &[]).and_then(|()| self.0.receive::<Rest>());
        let (rest, _) = rest.map_err(StartError::Predecessor)?;
        if !memory.take_over(&plane.routing().load(), rest.memory) {
            warn!("what was remembered means nothing to this build and is forgotten");
        }
        plane.take_over(Instant::now(), rest.plane);
        let workers = workers.taken_over()?;
        // From here on the predecessor reads nothing any more, whatever becomes of this process.
        let serving = self.0.send(&Answer::Serving, &[]);
        serving.and_then(|()| workers.orders().begin()).map_err(StartError::Predecessor)?;
        Ok(workers)
    }

    /// Says why this process does not take over.
    pub(in crate::control) fn refuse(&self, reason: impl ToString) {
        // It may not listen any more.
        let _ = self.0.send(&Answer::Refused(reason.to_string()), &[]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    #[test]
    fn a_format_of_another_version_is_refused() {
        let (channel, end) = Channel::pair().unwrap();
        let predecessor = Predecessor(Channel::from(end));
        predecessor.0.set_patience(Some(PREPARING)).unwrap();
        channel.send(&(VERSION + 1), &[]).unwrap();
        let refused = predecessor.legacy(&fixtures::config(true)).unwrap_err().to_string();
        assert!(
            refused.contains(&format!("in version {} of the format", VERSION + 1)),
            "{refused}"
        );
        predecessor.refuse(&refused);
        let (answer, _) = channel.receive::<Answer>().unwrap();
        assert!(matches!(answer, Answer::Refused(reason) if reason == refused));
    }
}
