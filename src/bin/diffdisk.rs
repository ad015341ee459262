//! The program `diffdisk`: the image tool. See `diffdisk::cli`.

fn main() -> std::process::ExitCode {
    diffdisk::cli::tool::main()
}
