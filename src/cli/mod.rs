//! Floor 7: human words.
//!
//! Owns: arguments, what is printed, exit codes, the one line of a failure, and the wiring of the daemon. Leaves to
//! others: everything that is done.
//!
//! ```text
//!   diffdisk    args ──> images ──> ops
//!                size      │ └────> progress   a bar, on a terminal only
//!                          └──────> print      people, or JSON
//!   diffdiskd   serve_args ──> serve ──> start ──> vhost
//!                 disk_args     ├── handover   sockets of the starting process (inherited, systemd)
//!                               └── signals    what ends the daemon
//!   both        system_config, runtime
//! ```

mod args;
mod disk_args;
mod handover;
mod images;
mod inherited_fd;
mod print;
mod progress;
mod runtime_dir;
pub mod serve;
mod serve_args;
mod settle;
mod signals;
mod size;
mod start;
mod system_config;
mod systemd;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use crate::error::Error;
pub use inherited_fd::InheritedFds;
use system_config::SystemConfig;

/// The version of the programs, with the commit they are built from.
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (commit ", env!("DIFFDISK_COMMIT"), ")");

/// How a program ended, in the words of the contract.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Exit {
    Done = 0,
    Failed = 1,
    Corrupt = 3,
    Leaks = 4,
    Different = 5,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// The whole of `diffdisk`: reads the command line, does what it says, tells how it went.
pub fn tool_main() -> ExitCode {
    let mut args = args::ToolArgs::parse();
    log_to_stderr(&args.common.log_level);
    signals::survive_file_size_limit();
    match SystemConfig::load(args.common.no_system_config) {
        Ok(config) => args.common.add_system_config(config),
        Err(e) => {
            print_failure("configuration", &e);
            return Exit::Failed.into();
        }
    }
    let (verb, outcome) = images::run(args);
    match outcome {
        Ok(exit) => exit.into(),
        Err(e) => {
            print_failure(verb, &e);
            Exit::Failed.into()
        }
    }
}

/// The one line of a failure.
fn print_failure(verb: &str, e: &Error) {
    // Nobody may be reading.
    let _ = writeln!(std::io::stderr(), "diffdisk: {verb}: {}", print::escape_controls(&e.line()));
}

fn log_to_stderr(level: &args::LogLevel) {
    env_logger::Builder::new()
        .filter_level(level.filter())
        .format(|to, record| {
            writeln!(
                to,
                "{}: {}",
                record.level().as_str().to_lowercase(),
                print::escape_controls(&record.args().to_string())
            )
        })
        .init();
}
