//! The daemon. See `diffdisk::cli::serve`.

fn main() -> std::process::ExitCode {
    diffdisk::cli::serve::main()
}
