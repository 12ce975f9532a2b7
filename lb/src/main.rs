//! The `quic-lb` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    quic_lb::cli::main()
}
