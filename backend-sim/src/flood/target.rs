//! Whom a flood may hit: this machine, and namespaces that tests have made.

use std::net::{IpAddr, SocketAddr};

/// A target that is not ours to flood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0} is neither on loopback nor a private address inside a network namespace of its own: \
     floods are for tests on this machine"
)]
pub struct RefusedTarget(pub SocketAddr);

pub(super) fn check(target: SocketAddr) -> Result<(), RefusedTarget> {
    let allowed = target.ip().is_loopback() || is_private(target.ip()) && in_own_namespace();
    if allowed { Ok(()) } else { Err(RefusedTarget(target)) }
}

fn is_private(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_private(),
        IpAddr::V6(ip) => ip.is_unique_local(),
    }
}

/// Whether an ancestor of this process is in another network namespace, as the first process of the
/// machine is when a test has made one. What cannot be seen counts as not.
fn in_own_namespace() -> bool {
    let namespace = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/net")).ok();
    let Some(own) = namespace("self") else { return false };
    let mut process = "self".to_owned();
    while let Some(parent) = parent(&process) {
        // The first process is not always to be seen, but those between it and this one are.
        if namespace(&parent).is_some_and(|other| other != own) {
            return true;
        }
        process = parent;
    }
    false
}

/// The parent of a process; that of the first has no number.
fn parent(process: &str) -> Option<String> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim();
    (parent != "0").then(|| parent.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ancestors_end_with_the_first_process() {
        let mut process = parent("self").expect("who started the test");
        assert_eq!(process, std::os::unix::process::parent_id().to_string());
        for _ in 0..1000 {
            let Some(next) = parent(&process) else { return };
            process = next;
        }
        panic!("{process} has ancestors without end");
    }

    #[test]
    fn only_this_machine_is_flooded() {
        for allowed in ["127.0.0.1:4433", "127.9.9.9:1", "[::1]:443"] {
            assert_eq!(check(allowed.parse().expect("an address")), Ok(()));
        }
        for refused in ["192.0.2.1:443", "8.8.8.8:53", "[2001:db8::1]:443", "0.0.0.0:443"] {
            let target = refused.parse().expect("an address");
            assert_eq!(check(target), Err(RefusedTarget(target)));
        }
        if !in_own_namespace() {
            let target = "10.0.0.1:443".parse().expect("an address");
            assert_eq!(check(target), Err(RefusedTarget(target)));
        }
    }
}
