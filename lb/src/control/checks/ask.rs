//! How a check asks: sockets of its own, and what their errors say. And the check that asks for versions.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use tokio::{net::UdpSocket, time::timeout};
use tracing::debug;

use super::probe::{Probe, RANDOM};
use crate::{check::CheckResult, control::plane::backends::CheckTarget, refusal::Refusal};

/// Datagrams that are read in search of an answer.
const READS: usize = 8;

/// The most octets of an answer that are looked at: more than a hundred versions.
const ANSWER_LEN: usize = 512;

/// Asks from `socket`, or from a new one.
pub(super) async fn ask_for_versions(
    target: &CheckTarget,
    socket: &mut Option<UdpSocket>,
) -> CheckResult {
    let mut random = [0; RANDOM];
    if let Err(error) = getrandom::fill(&mut random) {
        return failure(target, &io::Error::other(error));
    }
    let probe = Probe::new(&random);
    let socket = match socket {
        Some(socket) => Ok(&*socket),
        None => connect(target).map(|new| &*socket.insert(new)),
    };
    let socket = match socket {
        Ok(socket) => socket,
        Err(error) => return failure(target, &error),
    };
    let answered = timeout(target.check.timeout, async {
        if let Err(error) = socket.send(&probe.datagram()).await {
            return failure(target, &error);
        }
        let mut octets = [0; ANSWER_LEN];
        for _ in 0..READS {
            match socket.recv(&mut octets).await {
                Ok(len) if probe.is_answered_by(&octets[..len]) => return CheckResult::Answered,
                Ok(_) => {}
                Err(error) => return failure(target, &error),
            }
        }
        CheckResult::Wrong
    });
    answered.await.unwrap_or(CheckResult::Timeout)
}

/// A new socket, connected to where the backend is checked.
pub(super) fn connect(target: &CheckTarget) -> io::Result<UdpSocket> {
    let any = match target.address {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let socket = std::net::UdpSocket::bind((target.source.unwrap_or(any), 0))?;
    socket.set_nonblocking(true)?;
    socket.connect(target.address)?;
    UdpSocket::from_std(socket)
}

pub(super) fn failure(target: &CheckTarget, error: &io::Error) -> CheckResult {
    let (pool, backend) = &target.name;
    debug!(pool, backend, address = %target.address, %error, "check");
    if Refusal::of(error).is_about_backend() { CheckResult::Refused } else { CheckResult::Unsent }
}
