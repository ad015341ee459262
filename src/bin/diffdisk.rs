//! The image tool.

fn main() -> std::process::ExitCode {
    diffdisk::cli::tool::main()
}
