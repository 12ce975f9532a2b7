//! Whether whoever reads wants colours.

use std::env;

/// Whether to write in colours to standard error or output: where that is a terminal which knows
/// them, unless the environment says no (<https://no-color.org>).
pub(crate) fn wanted(is_terminal: bool) -> bool {
    let is_set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
    is_terminal && !is_set("NO_COLOR") && env::var_os("TERM").is_none_or(|term| term != "dumb")
}
