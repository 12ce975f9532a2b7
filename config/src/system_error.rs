//! Errors of the operating system, in words for people. They serve everything that reads files and
//! opens sockets: the configuration, the balancer and the origin server.

use std::io;

/// What the system says, without the number of the error.
#[must_use]
pub fn reason(error: &io::Error) -> String {
    let reason = error.to_string();
    reason.split(" (os error").next().unwrap_or_default().to_owned()
}

/// Why nobody can listen on an address, and what to do about it.
#[must_use]
pub fn why_not_listening(error: &io::Error) -> String {
    let sentence = match error.kind() {
        io::ErrorKind::AddrInUse => {
            "the address is in use; stop the process that listens there, or choose another address"
        }
        io::ErrorKind::AddrNotAvailable => {
            "this host does not have the address; add it to an interface, or choose another address"
        }
        io::ErrorKind::PermissionDenied => {
            "permission denied; ports below 1024 need the capability CAP_NET_BIND_SERVICE"
        }
        _ => return reason(error),
    };
    sentence.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_the_system_is_left_out() {
        let error = io::Error::from_raw_os_error(98);
        assert!(error.to_string().contains("(os error 98)"), "{error}");
        assert_eq!(reason(&error), "Address already in use");
        assert!(why_not_listening(&error).starts_with("the address is in use; "));
        let other = io::Error::from_raw_os_error(105);
        assert_eq!(why_not_listening(&other), "No buffer space available");
        assert_eq!(reason(&io::Error::other("no number")), "no number");
    }
}
