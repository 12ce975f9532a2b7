//! A stream between two threads or two processes that carries values, and descriptors with them.
//!
//! ```text
//! ┌─────────────┬────────────────┬───────────────────────────────┬───────────┐
//! │ octets: u32 │ descriptors:   │ one octet for each batch of   │ the value │
//! │             │ u32            │ descriptors, which go with it │           │
//! └─────────────┴────────────────┴───────────────────────────────┴───────────┘
//! ```
//!
//! Unlike sockets of this module a channel is used in whatever thread its descriptor is open.

use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    thread,
    time::Duration,
};

use rustix::{
    cmsg_space,
    io::Errno,
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
};
use serde::{Serialize, de::DeserializeOwned};

/// Descriptors that the kernel takes with one message (SCM_MAX_FD).
const BATCH: usize = 253;
/// The largest value, in octets: the memory of a balancer that remembers ten million entries.
const MAX_VALUE: usize = 256 << 20;
/// The most descriptors that come with one value.
const MAX_DESCRIPTORS: usize = 64 * BATCH;
/// Descriptors that are under way count against the limit of open ones. Where that is reached, the other side has to take some
/// first: so often it is waited for, a millisecond each time.
const WAITS: usize = 1_000;

/// One end of a stream.
#[derive(Debug)]
pub(crate) struct Channel(UnixStream);

impl Channel {
    /// Both ends of a new one; the second is to be given away.
    ///
    /// # Errors
    ///
    /// Those of socketpair(2).
    pub(crate) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (near, far) = UnixStream::pair()?;
        Ok((Self(near), far.into()))
    }

    /// How long sending and receiving may wait for the other side: `None` for ever.
    pub(crate) fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        self.0.set_read_timeout(patience)?;
        self.0.set_write_timeout(patience)
    }

    /// Sends a value, and descriptors, which stay open here.
    pub(crate) fn send(
        &self,
        value: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let value = postcard::to_stdvec(value).map_err(io::Error::other)?;
        let too_much = || io::Error::from(io::ErrorKind::FileTooLarge);
        if value.len() > MAX_VALUE || descriptors.len() > MAX_DESCRIPTORS {
            return Err(too_much());
        }
        let length = |n: usize| u32::try_from(n).map(u32::to_le_bytes).map_err(|_| too_much());
        let mut stream = &self.0;
        stream.write_all(&length(value.len())?)?;
        stream.write_all(&length(descriptors.len())?)?;
        descriptors.chunks(BATCH).try_for_each(|batch| self.send_batch(batch))?;
        stream.write_all(&value)
    }

    /// Receives a value, and the descriptors that come with it.
    pub(crate) fn receive<T: DeserializeOwned>(&self) -> io::Result<(T, Vec<OwnedFd>)> {
        let mut stream = &self.0;
        let mut length = [0; 4];
        let mut read_length = || -> io::Result<usize> {
            stream.read_exact(&mut length)?;
            usize::try_from(u32::from_le_bytes(length)).map_err(io::Error::other)
        };
        let (octets, count) = (read_length()?, read_length()?);
        if octets > MAX_VALUE || count > MAX_DESCRIPTORS {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut descriptors = Vec::with_capacity(count);
        while descriptors.len() < count {
            self.receive_batch((count - descriptors.len()).min(BATCH), &mut descriptors)?;
        }
        let mut value = Vec::new();
        stream.take(octets as u64).read_to_end(&mut value)?;
        if value.len() < octets {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match postcard::take_from_bytes(&value) {
            Ok((value, [])) => Ok((value, descriptors)),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Has whoever waits at the other end wait no longer.
    pub(crate) fn close(&self) {
        // It may be closed already.
        let _ = self.0.shutdown(Shutdown::Both);
    }

    fn send_batch(&self, batch: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut waits = 0;
        loop {
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(BATCH))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fits = control.push(SendAncillaryMessage::ScmRights(batch));
            debug_assert!(fits, "there is room for a batch");
            let octet = [IoSlice::new(&[0])];
            match sendmsg(&self.0, &octet, &mut control, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::TOOMANYREFS) if waits < WAITS => {
                    waits += 1;
                    thread::sleep(Duration::from_millis(1));
                }
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Appends `count` descriptors, which were sent together.
    fn receive_batch(&self, count: usize, descriptors: &mut Vec<OwnedFd>) -> io::Result<()> {
        let before = descriptors.len();
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(BATCH))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut octet = [0];
        let read = loop {
            let mut parts = [IoSliceMut::new(&mut octet)];
            match recvmsg(&self.0, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Err(Errno::INTR) => {}
                read => break read?.bytes,
            }
        };
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                descriptors.extend(received);
            }
        }
        if descriptors.len() - before == count {
            return Ok(());
        }
        // The kernel hands out as many as the table has room for, and closes the others.
        Err(io::Error::other("there is no room for the descriptors that are received"))
    }
}

impl From<OwnedFd> for Channel {
    fn from(end: OwnedFd) -> Self {
        Self(end.into())
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::{net::UdpSocket, os::fd::AsRawFd as _};

    use super::*;

    fn pair() -> (Channel, Channel) {
        let (near, far) = Channel::pair().unwrap();
        let far = Channel::from(far);
        for end in [&near, &far] {
            end.set_patience(Some(Duration::from_secs(60))).unwrap();
        }
        (near, far)
    }

    #[test]
    fn values_come_in_their_order_with_their_descriptors() {
        let (near, far) = pair();
        let sockets: Vec<_> = (0..254).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
        let sender = thread::spawn(move || {
            for count in [0, 1, 252, 253, 254] {
                let descriptors: Vec<_> = sockets[..count].iter().map(AsFd::as_fd).collect();
                near.send(&(count, vec![7_u8; count * 1_000]), &descriptors).unwrap();
            }
            sockets
        });
        let mut received = vec![];
        for expected in [0, 1, 252, 253, 254] {
            received.clear();
            let ((count, octets), descriptors) = far.receive::<(usize, Vec<u8>)>().unwrap();
            assert_eq!((count, octets.len()), (expected, expected * 1_000));
            received = descriptors;
            assert_eq!(received.len(), expected);
        }
        let sockets = sender.join().unwrap();
        for (ours, theirs) in sockets.iter().zip(received) {
            assert_ne!(ours.as_raw_fd(), theirs.as_raw_fd());
            let theirs = UdpSocket::from(theirs);
            assert_eq!(ours.local_addr().unwrap(), theirs.local_addr().unwrap());
        }
        far.receive::<()>().unwrap_err();
    }

    #[test]
    fn what_was_never_sent_is_an_error() {
        let (near, far) = pair();
        near.send(&300_u32, &[]).unwrap();
        far.receive::<u8>().unwrap_err();
        (&near.0).write_all(&[0xff; 8]).unwrap();
        assert_eq!(far.receive::<u8>().unwrap_err().kind(), io::ErrorKind::InvalidData);
        (&near.0).write_all(&[5, 0, 0, 0, 0, 0, 0, 0, 1]).unwrap();
        near.close();
        assert_eq!(far.receive::<u8>().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
