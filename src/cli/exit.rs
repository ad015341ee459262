//! Exit codes, and the output of a failure.

use std::io::Write;
use std::process::ExitCode;

use super::print::escape_controls;
use crate::error::Error;

/// Exit codes of `diffdisk`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Exit {
    /// Success.
    Done = 0,
    /// An error.
    Failed = 1,
    /// `check` found corruption.
    Corrupt = 3,
    /// `check` found only leaks or cosmetic defects.
    Leaks = 4,
    /// `compare` found a difference.
    Different = 5,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// Prints an error to standard error, on one line.
pub(super) fn print_failure(verb: &str, e: &Error) {
    // A failed write is ignored, because standard error may be closed.
    let _ = writeln!(std::io::stderr(), "diffdisk: {verb}: {}", escape_controls(&e.line()));
}
