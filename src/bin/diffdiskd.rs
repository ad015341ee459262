//! The daemon. See `diffdisk::cli::serve`.
#![allow(unsafe_code)]

use diffdisk::cli::{InheritedFds, serve};

fn main() -> std::process::ExitCode {
    // SAFETY: the first thing that the process does, so it has opened nothing.
    serve::main(unsafe { InheritedFds::new() })
}
