//! The main function of `diffdisk`: reads the command line, runs the verb, reports its outcome.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use super::args::ToolArgs;
use super::exit::{Exit, print_failure};
use super::log_level::LogLevel;
use super::print::escape_controls;
use super::system_config::SystemConfig;
use super::{images, signals};

/// Runs `diffdisk` with the arguments of the process.
pub fn main() -> ExitCode {
    let mut args = ToolArgs::parse();
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

fn log_to_stderr(level: &LogLevel) {
    env_logger::Builder::new()
        .filter_level(level.filter())
        .format(|to, record| {
            writeln!(to, "{}: {}", record.level().as_str().to_lowercase(), escape_controls(&record.args().to_string()))
        })
        .init();
}
