//! The program `diffdiskd`: the daemon. See `diffdisk::cli::serve`.
#![allow(unsafe_code)]

use diffdisk::cli::{InheritedFds, serve};

fn main() -> std::process::ExitCode {
    // SAFETY: `new` requires that nothing in this process owns an inherited descriptor, and that `new` is called once.
    // This is the first statement of `main` and the only call. No code of this process has opened a descriptor before
    // `main` except the standard streams, which `new` leaves out.
    serve::main(unsafe { InheritedFds::new() })
}
