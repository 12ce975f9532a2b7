//! The `backend-sim` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    backend_sim::cli::main()
}
