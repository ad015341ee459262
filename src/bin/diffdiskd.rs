//! The program `diffdiskd`: the daemon. See `diffdisk::cli::serve`.
#![allow(unsafe_code)]

use diffdisk::cli::{InheritedFds, serve};

fn main() -> std::process::ExitCode {
    // SAFETY: `main` has only just begun. No code of this process has opened a descriptor yet, so nothing owns one, and this
    // is the only call.
    serve::main(unsafe { InheritedFds::new() })
}
