//! Errors of the operating system, in words for people.

use std::io;

/// Why reading failed, without the number of the operating system.
pub(crate) fn reason(error: &io::Error) -> String {
    let reason = error.to_string();
    reason.split(" (os error").next().unwrap_or_default().to_owned()
}
