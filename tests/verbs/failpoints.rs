//! Runs verbs up to their failpoints.

use std::ffi::OsStr;
use std::process::Command;
use std::time::Duration;

pub(crate) use crate::common::failpoints::of;
use crate::common::tool::{DIFFDISK, run};

/// Runs `diffdisk` with `args` and kills it when it reaches `point` for the `count`-th time. Returns false if the
/// program succeeds without reaching `point` that often.
#[track_caller]
pub(crate) fn killed<S: AsRef<OsStr>>(point: &str, count: u32, args: impl IntoIterator<Item = S>) -> bool {
    let mut command = Command::new(DIFFDISK);
    let done = run(command.args(args).env("DIFFDISK_KILL_AT", format!("{point}:{count}")), Duration::from_secs(60));
    assert!(!done.killed, "{point}: hangs");
    assert!(matches!(done.code, None | Some(0)), "{point}: {}", done.stderr);
    done.code.is_none()
}

#[test]
fn a_verb_without_failpoints_is_an_error() {
    assert!(std::panic::catch_unwind(|| of("info")).is_err());
}
